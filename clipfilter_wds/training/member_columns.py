"""Gives training other members of its samples, decoded by their extensions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clipfilter_wds.preprocess.members import decode_member
from clipfilter_wds.training.collate import collate
from clipfilter_wds.types import Sample

#: Members by extension, with ``__key__`` and ``__url__`` -> columns of a row.
SampleTransform = Callable[[dict[str, Any]], Mapping[str, Any]]

#: Columns that a batch has anyway.
_RESERVED = frozenset(("image", "text", "score", "is_padding", "__key__", "__url__"))


@dataclass(frozen=True, kw_only=True)
class MemberColumns:
    """Which members of a sample become columns of a batch. Picklable if its transform is.

    Attributes:
        columns: Extensions of members; None for those that the transform needs, which may be any.
        transform: Makes the columns of them; None gives them as they are.

    Raises:
        ValueError: When a batch has a column of that name anyway, or it is no extension.
        TypeError: When ``columns`` is one text.
    """

    columns: Sequence[str] | None = None
    transform: SampleTransform | None = None

    def __post_init__(self) -> None:
        if isinstance(self.columns, str):
            raise TypeError(f"columns is {self.columns!r}; give a list of extensions, such as [{self.columns!r}]")
        if self.columns is not None:
            object.__setattr__(self, "columns", tuple(self.columns))  # looked at more than once
        for name in self.columns or ():
            if not name or name != name.lower().lstrip("."):
                raise ValueError(f"a column is {name!r}; extensions are in lower case and begin with no dot")
        if self.transform is None:
            _check_names(self.columns or ())

    @property
    def to_read(self) -> tuple[str, ...] | None:
        """The ``others`` of a ``SampleLayout``: extensions of the members to read, None for all."""
        if self.columns is not None:
            return tuple(self.columns)
        return () if self.transform is None else None

    def row_of(self, sample: Sample, url: str) -> dict[str, Any]:
        """A sample's columns, from those of its members that were read."""
        if self.transform is None and not self.columns:
            return {}
        members = {member.extension: member.data for member in sample.members}
        wanted = members if self.to_read is None else self.to_read
        decoded = {name: decode_member(name, members[name]) if name in members else None for name in wanted}
        if self.transform is None:
            return decoded
        row = self.transform({"__key__": sample.key, "__url__": url, **decoded})
        if not isinstance(row, Mapping):
            raise TypeError(f"sample_transform gave a {type(row).__name__}; it has to give a dict of columns")
        _check_names(row)
        return dict(row)

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The columns of rows: lists of what the members hold; collated by torch where there is a transform.

        Raises:
            ValueError: When the transform has given them different columns.
        """
        if not rows:
            return {}
        if self.transform is None:
            return {name: [row[name] for row in rows] for name in rows[0]}
        for row in rows:
            if row.keys() != rows[0].keys():
                raise ValueError(
                    f"sample_transform gave one sample the columns {sorted(rows[0])} and another {sorted(row)}; "
                    "it has to give all samples the same"
                )
        return {name: collate([row[name] for row in rows]) for name in rows[0]}


def _check_names(names: Mapping[str, Any] | Sequence[str]) -> None:
    if taken := sorted(_RESERVED.intersection(names)):
        raise ValueError(f"a batch has a column {taken[0]!r} anyway; give this one another name in a sample_transform")
