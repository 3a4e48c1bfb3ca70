"""Table files: score the pairs that their rows name, keep the rows whose caption describes the image."""

from clipfilter_wds.table.config import TableConfig
from clipfilter_wds.table.run import process_table

__all__ = ["TableConfig", "process_table"]
