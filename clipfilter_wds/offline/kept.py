"""Says what a table holds that replaces another one, so that nothing that was saved is lost."""

from collections.abc import Sequence
from typing import NamedTuple, Self

from clipfilter_wds.offline.config import ScoreConfig
from clipfilter_wds.preprocess.json_columns import JsonColumns, column_name
from clipfilter_wds.scores.metadata import DTYPES, Embeddings, ScoreMetadata


class Saved(NamedTuple):
    """What is saved of a shard beside the scores.

    Attributes:
        embeddings: Their type; None for none.
        columns: Further columns of the table; see ``ScoreMetadata``.
    """

    embeddings: Embeddings | None
    columns: tuple[str, ...]

    @classmethod
    def asked_by(cls, config: ScoreConfig) -> Self:
        """What the options of a run ask for."""
        return cls(config.embeddings, config.column_sources)

    @classmethod
    def found_in(cls, metadata: ScoreMetadata) -> Self:
        """What goes with a table."""
        dtype = None if metadata.embeddings is None else metadata.embeddings["dtype"]
        return cls(next((name for name, known in DTYPES.items() if known == dtype), None), metadata.columns)

    @property
    def json_columns(self) -> JsonColumns | None:
        """The columns, as they are read."""
        return JsonColumns(",".join(self.columns)) if self.columns else None

    def lacks(self, asked: "Saved") -> bool:
        """Whether something that is asked for is not there."""
        has_embeddings = asked.embeddings in (None, self.embeddings)
        return not (has_embeddings and set(asked.columns) <= set(self.columns))

    def with_(self, asked: "Saved") -> "Saved":
        """Both together: what is there first, and then what else is asked for.

        Raises:
            ValueError: When one table can't hold both.
        """
        if problem := self.contradicts(asked):
            raise ValueError(problem)
        return Saved(asked.embeddings or self.embeddings, tuple(dict.fromkeys([*self.columns, *asked.columns])))

    def contradicts(self, asked: "Saved") -> str | None:
        """Why one table can't hold both; None where it can."""
        if self.embeddings and asked.embeddings and self.embeddings != asked.embeddings:
            return f"has embeddings in {self.embeddings}, and {asked.embeddings} is asked for"
        there = _by_name(self.columns)
        for name, kind in _by_name(asked.columns).items():
            if there.get(name, kind) != kind:
                return f"has the column {name!r} as {there[name]}, and {kind} is asked for"
        return None


def _by_name(columns: Sequence[str]) -> dict[str, str]:
    """The types of columns, by their names."""
    return {column_name(column): column.rpartition("=")[2] for column in columns}
