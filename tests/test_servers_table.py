import pytest

from servers.table import head, to_rows, to_table

NAMES, TYPES = ("i", "d", "s", "b"), ("BIGINT", "DOUBLE", "VARCHAR", "BOOLEAN")
ROWS = [
    (1, 0.5, "a", True),
    (None, None, None, None),
    (-(2**63), float("inf"), "", False),
    (2**63 - 1, -0.0, "é\0", None),
]


def test_rows_come_back_as_they_were():
    table = to_table(NAMES, TYPES, ROWS)
    assert table.rows == 4
    assert list(to_rows(type(table).FromString(table.SerializeToString()))) == ROWS


def test_an_empty_table_keeps_names_and_types():
    table = to_table(NAMES, TYPES, [])
    assert [column.WhichOneof("values") for column in table.columns] == [
        "int64s",
        "doubles",
        "strings",
        "bools",
    ]
    assert list(to_rows(table)) == []


def test_validity_is_sent_only_where_there_is_a_null():
    table = to_table(NAMES, TYPES, ROWS[:1])
    assert not any(column.valid for column in table.columns)


@pytest.mark.parametrize("rows", range(6))
def test_head_cuts_every_column(rows: int):
    assert list(to_rows(head(to_table(NAMES, TYPES, ROWS), rows))) == ROWS[:rows]
