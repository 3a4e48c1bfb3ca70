"""The least that an operator of DataFlow needs: a storage, and the plain loop that its outcome is compared with."""

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from PIL import Image, UnidentifiedImageError

from tests.support.toys import Reference


@dataclass
class Memory:
    """The least that is a storage."""

    table: pd.DataFrame
    written: list[pd.DataFrame] = field(default_factory=list)

    def read(self, output_type):
        assert output_type == "dataframe"
        return self.table

    def write(self, data):
        self.written.append(data)


class RowLoop:
    """The plain loop, one row at a time."""

    def __init__(self, folder: Path) -> None:
        self.reference = Reference(folder)

    def similarity(self, path: str, caption: str) -> float:
        try:
            image = Image.open(path).convert("RGB")
        except (FileNotFoundError, UnidentifiedImageError):
            return 0.0
        if not caption.strip():
            return 0.0
        return min(max(self.reference.score(image, caption), 0.0), 1.0)

    def run(self, table: pd.DataFrame, threshold: float) -> pd.DataFrame:
        scores = [self.similarity(row.image, row.caption) for row in table.itertuples()]
        return table[[score >= threshold for score in scores]].reset_index(drop=True)


def run_operator(operator, table, **options):
    storage = Memory(table)
    returned = operator.run(storage, **options)
    (written,) = storage.written
    return returned, written
