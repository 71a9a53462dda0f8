"""Rows of Python values to typed columns of the wire, and back."""

from collections.abc import Iterator, Sequence

from servers.pb import shmcoord_cluster_pb2 as pb

Value = int | float | str | bool | None
Row = tuple[Value, ...]

# The column types of the wire, by the name that DuckDB gives them: the field of a Column, and
# what stands in it for a null.
_FIELDS: dict[str, tuple[str, Value]] = {
    "BOOLEAN": ("bools", False),
    "BIGINT": ("int64s", 0),
    "DOUBLE": ("doubles", 0.0),
    "VARCHAR": ("strings", ""),
}
TYPES = tuple(_FIELDS)

BATCH_ROWS = 1000
# A message stays well below gRPC's default limit of 4 MiB.
BATCH_BYTES = 1 << 20


def to_tables(names: Sequence[str], types: Sequence[str], rows: Sequence[Row]) -> list[pb.Table]:
    """Rows as tables of at most BATCH_ROWS and BATCH_BYTES, unless one row alone is larger."""
    table = to_table(names, types, rows) if len(rows) <= BATCH_ROWS else None
    if table is not None and (len(rows) <= 1 or table.ByteSize() <= BATCH_BYTES):
        return [table]
    middle = len(rows) // 2
    return [*to_tables(names, types, rows[:middle]), *to_tables(names, types, rows[middle:])]


def to_table(names: Sequence[str], types: Sequence[str], rows: Sequence[Row]) -> pb.Table:
    """Rows as columns; `types` are words of TYPES, None is null."""
    columns = zip(*rows, strict=True) if rows else iter([()] * len(names))
    return pb.Table(
        rows=len(rows),
        columns=[
            _column(name, kind, values)
            for name, kind, values in zip(names, types, columns, strict=True)
        ],
    )


def _column(name: str, kind: str, values: Sequence[Value]) -> pb.Column:
    field, filler = _FIELDS[kind]
    column = pb.Column(name=name)
    typed = getattr(column, field)
    typed.SetInParent()  # a column without values still says which type it has
    if None in values:
        column.valid.extend(value is not None for value in values)
        values = [filler if value is None else value for value in values]
    typed.values.extend(values)
    return column


def column_names(table: pb.Table) -> list[str]:
    """The names of a table's columns."""
    return [column.name for column in table.columns]


def column_values(column: pb.Column) -> list[Value]:
    """The values of one column, None where the value is null."""
    kind = column.WhichOneof("values")
    if kind is None:
        return []
    values: list[Value] = list(getattr(column, kind).values)
    if column.valid:
        return [value if valid else None for value, valid in zip(values, column.valid, strict=True)]
    return values


def to_rows(table: pb.Table) -> Iterator[Row]:
    """The rows of a table, in its order."""
    return zip(*(column_values(column) for column in table.columns), strict=True)


def head(table: pb.Table, rows: int) -> pb.Table:
    """The first rows of a table; the table itself if it has no more."""
    if table.rows <= rows:
        return table
    short = pb.Table(rows=rows)
    for column in table.columns:
        kept = short.columns.add(name=column.name, valid=column.valid[:rows])
        kind = column.WhichOneof("values")
        if kind is not None:
            getattr(kept, kind).values.extend(getattr(column, kind).values[:rows])
    return short
