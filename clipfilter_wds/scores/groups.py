"""Limits that differ by group: a fraction, or a threshold, for each value of a column of the score tables."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from clipfilter_wds.scores.fraction import Cutoff
from clipfilter_wds.types import ShardError

if TYPE_CHECKING:
    from clipfilter_wds.scores.table import ShardScores


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Samples in groups by the value of a column, and the limits of some groups. Picklable.

    Attributes:
        column: The column; the group of a value is called as the value is in JSON, that of missing ones ``null``.
        limits: By group, its fraction or threshold; the others have the one that is given for all.
    """

    column: str
    limits: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, column: str, limits: str | None) -> "Groups":
        """From a column, and ``en=0.28,de=0.25``.

        Raises:
            ValueError: When the limits are not so written.
        """
        found: dict[str, float] = {}
        for part in limits.split(",") if limits is not None else ():
            name, _, number = part.strip().rpartition("=")
            if name in found:
                raise ValueError(f"group_limits {limits!r} gives the group {name!r} two limits")
            try:
                found[name] = float(number)
            except ValueError:
                name = ""
            if not name:
                raise ValueError(f"group_limits {limits!r}: {part.strip()!r} should be GROUP=NUMBER, such as en=0.28")
        return cls(column=column, limits=found)

    def of(self, scores: "ShardScores") -> np.ndarray:
        """Per sample of a shard, the name of its group, object ``[N]``.

        Raises:
            ShardError: When its table lacks the column.
        """
        names = scores.table.schema.names
        if self.column not in names:
            raise ShardError(f"group_by: there is no column {self.column!r}; the tables have {', '.join(names)}")
        return np.array([_name_of(value) for value in scores.table[self.column].to_pylist()], dtype=object)

    def limits_of(self, groups: np.ndarray, usual: float) -> np.ndarray:
        """Per sample, given its group, what it is compared with: float64 ``[N]``."""
        return np.array([self.limits.get(group, usual) for group in groups], dtype=np.float64)


def _name_of(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class GroupCutoffs:
    """What is kept of one shard when a fraction of each group of the whole run is.

    Attributes:
        by_group: For each group of the shard.
    """

    by_group: Mapping[str, Cutoff]

    def keeps(self, scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """Whether each score of the shard, given its group, is kept, bool ``[N]``."""
        kept = np.zeros(len(scores), dtype=bool)
        rows_of = rows_by_group(groups)
        for group in rows_of.keys() & self.by_group.keys():
            rows = rows_of[group]
            kept[rows] = self.by_group[group].keeps(scores[rows])
        return kept


def rows_by_group(groups: np.ndarray) -> dict[str, list[int]]:
    """The rows of each group, ascending, given the group of each row, object ``[N]``."""
    found: dict[str, list[int]] = {}
    for row, group in enumerate(groups.tolist()):
        found.setdefault(group, []).append(row)
    return found
