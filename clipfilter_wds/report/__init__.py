"""Score tables -> one HTML page that shows what a threshold keeps."""

from clipfilter_wds.report.run import ReportConfig, check_page, write_report

__all__ = ["ReportConfig", "check_page", "write_report"]
