"""Selects rows of score tables by conditions such as ``width >= 200 and num_tokens > 3``, none of which is run."""

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # a config holds a condition, and pyarrow takes a tenth of a second to import
    import pyarrow as pa
    import pyarrow.compute as pc

_USABLE = (
    "use columns, numbers, texts in quotes, True, False, None, comparisons (< <= > >= == != in, not in, is None), "
    "+ - * / of numbers, and, or, not, parentheses"
)
_COMPARISONS: dict[type, str] = {
    ast.Lt: "less",
    ast.LtE: "less_equal",
    ast.Gt: "greater",
    ast.GtE: "greater_equal",
    ast.Eq: "equal",
    ast.NotEq: "not_equal",
}
_ARITHMETIC: dict[type, str] = {ast.Add: "add", ast.Sub: "subtract", ast.Mult: "multiply", ast.Div: "divide"}
_ROW = "__row__"


@dataclass(frozen=True)
class Where:
    """A condition on the columns of score tables. Picklable.

    Columns are named as they are, with dots where they have some. A comparison with a value that is missing is neither
    true nor false, and such a sample is not selected; ``is None`` finds it. Fractions are compared, and all
    numbers computed with, as float64.

    Attributes:
        text: In Python's notation.

    Raises:
        ValueError: When it is no condition.
    """

    text: str

    def __post_init__(self) -> None:
        for node in ast.walk(ast.Expression(self._tree)):
            for part in ast.iter_child_nodes(node):
                if not isinstance(part, _NODES):  # that of an operator is no text
                    raise ValueError(
                        f"where {self.text!r}: can't use {ast.unparse(part) or ast.unparse(node)!r}; {_USABLE}"
                    )

    @cached_property
    def _tree(self) -> ast.expr:
        try:
            return ast.parse(self.text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            why = error.msg if isinstance(error, SyntaxError) else error
            raise ValueError(f"where {self.text!r} is no condition: {why}; {_USABLE}") from None

    def check(self, schema: "pa.Schema") -> None:
        """See that tables with this schema can be selected from.

        Raises:
            ValueError: When they lack a column, or types don't go together.
        """
        self.selects(schema.empty_table())

    def selects(self, table: "pa.Table") -> np.ndarray:
        """Which rows of a table meet the condition: bool ``[N]``.

        Raises:
            ValueError: As :meth:`check`.
        """
        import pyarrow as pa

        chosen = np.zeros(table.num_rows, dtype=bool)
        numbered = table.append_column(_ROW, pa.array(np.arange(table.num_rows)))
        try:
            rows = numbered.filter(_Compiler(self.text, table.schema).expression(self._tree))[_ROW]
        except RecursionError:
            raise ValueError(f"where {_start(self.text)!r} is nested too deeply") from None
        except (pa.ArrowException, NotImplementedError, TypeError, OverflowError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"where {self.text!r} does not go with the types of the columns: {reason}") from None
        chosen[rows.to_numpy()] = True
        return chosen


#: What a condition may be made of.
_NODES = (
    ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.BinOp, *_ARITHMETIC, ast.Compare, *_COMPARISONS,
    ast.In, ast.NotIn, ast.Is, ast.IsNot, ast.Name, ast.Attribute, ast.Load, ast.Constant, ast.List, ast.Tuple, ast.Set,
)  # fmt: skip


class _Compiler:
    """Makes an expression of pyarrow, for tables of one schema."""

    def __init__(self, text: str, schema: "pa.Schema") -> None:
        self._text, self._schema = text, schema

    def expression(self, node: ast.expr) -> "pc.Expression":
        """What a node stands for."""
        import pyarrow.compute as pc

        match node:
            case ast.BoolOp(op=op, values=values):
                found = self.expression(values[0])
                for value in values[1:]:
                    other = self.expression(value)
                    found = found & other if isinstance(op, ast.And) else found | other
                return found
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return ~self.expression(operand)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return pc.negate(self.expression(operand))
            case ast.BinOp(left=left, op=op, right=right):
                sides = (_as_fractions(self._number(side)) for side in (left, right))
                return getattr(pc, _ARITHMETIC[type(op)])(*sides)
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                found = pc.scalar(True)
                for sign, right in zip(ops, comparators, strict=True):
                    found = found & self._compare(left, sign, right)
                    left = right
                return found
            case ast.Constant(value=value):
                return pc.scalar(value)
            case ast.Name() | ast.Attribute():
                return self._column(ast.unparse(node))
        raise self._error(node)

    def _compare(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> "pc.Expression":
        import pyarrow.compute as pc

        value = self.expression(left)
        if isinstance(op, ast.Is | ast.IsNot):
            if not (isinstance(right, ast.Constant) and right.value is None):
                raise self._error(right)
            return value.is_null() if isinstance(op, ast.Is) else value.is_valid()
        if isinstance(op, ast.In | ast.NotIn):
            values = self._values(right)
            if None in values:
                raise self._none_error(left)
            if self._kind(left) is int and any(isinstance(each, float) for each in values):
                value = _as_fractions(value)
            listed = value.isin(values)
            return value.is_valid() & (listed if isinstance(op, ast.In) else ~listed)
        for side, other in ((left, right), (right, left)):
            if isinstance(side, ast.Constant) and side.value is None:
                raise self._none_error(other)
        sides = [value, self.expression(right)]
        kinds = [self._kind(left), self._kind(right)]
        if float in kinds:
            sides = [_as_fractions(side) if kind is int else side for side, kind in zip(sides, kinds, strict=True)]
        return getattr(pc, _COMPARISONS[type(op)])(*sides)

    def _kind(self, node: ast.expr) -> type[int] | type[float] | None:
        """Whether a node stands for whole numbers or for fractions; None for anything else."""
        import pyarrow as pa

        match node:
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self._kind(operand)
            case ast.BinOp():
                return float
            case ast.Constant(value=value):
                return next((kind for kind in (int, float) if type(value) is kind), None)
            case ast.Name() | ast.Attribute():
                found = self._schema.field(ast.unparse(node)).type
                return float if pa.types.is_floating(found) else int if pa.types.is_integer(found) else None
        return None

    def _number(self, node: ast.expr) -> "pc.Expression":
        found = self.expression(node)
        if isinstance(node, ast.Name | ast.Attribute) and self._kind(node) is None:
            name = ast.unparse(node)
            raise ValueError(f"where {self._text!r}: {name} holds {self._schema.field(name).type}, which is no number")
        return found

    def _values(self, node: ast.expr) -> list[Any]:
        if not isinstance(node, ast.List | ast.Tuple | ast.Set):
            raise self._error(node)
        try:
            return list(ast.literal_eval(node))
        except ValueError:
            raise self._error(node) from None

    def _column(self, name: str) -> "pc.Expression":
        import pyarrow as pa
        import pyarrow.compute as pc

        if name not in self._schema.names:
            raise ValueError(f"where {self._text!r}: there is no column {name!r}; {_listed(self._schema.names)}")
        # pyarrow would round the constant that a float32 is compared with.
        column = pc.field((name,))
        return _as_fractions(column) if pa.types.is_floating(self._schema.field(name).type) else column

    def _none_error(self, node: ast.expr) -> ValueError:
        shown = ast.unparse(node)
        return ValueError(f"where {self._text!r}: nothing equals None; `{shown} is None` finds what is missing")

    def _error(self, node: ast.expr) -> ValueError:
        return ValueError(f"where {self._text!r}: can't use {ast.unparse(node)!r} there; {_USABLE}")


def _as_fractions(expression: "pc.Expression") -> "pc.Expression":
    """As float64, to which whole numbers above 2^53 are rounded."""
    return expression.cast("float64", safe=False)


def _start(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:100]}…"


def _listed(names: Sequence[str]) -> str:
    return f"the tables have {', '.join(names)}"
