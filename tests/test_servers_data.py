import csv
import gzip
import threading
import zipfile
from pathlib import Path

import pytest

from servers.data import DataError, Dataset, Search, SearchInterruptedError
from servers.table import column_names, to_rows

NAMES = ["kind", "weight", "note", "ok", "number"]
ROWS = [
    ("apple", 1.5, "Red and sweet", True, 1),
    ("pear", None, 'green; it\'s "soft"', False, 2),
    ("Apple", 2.25, None, None, None),
    ("plum", -3.0, "RED 100% _x_", True, 4),
    (None, 0.5, "häßlich GRÜN", False, 5),
    ("fig", 7.75, "a,b", True, -6),
    ("apple", 4.0, "Drop table part", True, 7),
]


def text(value: object) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small [1]*.csv"  # a name that must not be taken for a pattern
    with path.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(NAMES)
        writer.writerows([text(value) for value in row] for row in ROWS)
    return path


def run(search: Search) -> list[tuple]:
    rows: list[tuple] = []
    search.start()
    while (table := search.next_batch()) is not None:
        assert column_names(table) == list(search._names)
        rows += to_rows(table)
    search.close()
    assert search.sent == len(rows)
    return rows


def expected(words: list[str], rows: list[tuple] = ROWS) -> list[tuple]:
    def matches(row: tuple) -> bool:
        texts = [value.lower() for value in row if isinstance(value, str)]
        return all(any(word.lower() in text for text in texts) for word in words)

    return [row for row in rows if matches(row)]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["apple"],
        ["APPLE"],
        ["red", "apple"],
        ["red", "plum"],
        ["grün"],
        ["100%"],
        ["%"],
        ["_"],
        ["it's"],
        ['"soft"'],
        ["'; DROP TABLE part; --"],
        ["table"],
        ["1.5"],
        ["true"],
        ["nothing at all"],
        ["pear\x1fgreen"],
        ["pluma"],
        [""],
    ],
)
def test_words_find_what_plain_python_finds(file: Path, words: list[str]):
    dataset = Dataset(file)
    assert dataset.rows == dataset.total_rows == len(ROWS)
    search = dataset.search(words)
    assert run(search) == expected(words)
    assert search.matched == len(expected(words))
    assert run(dataset.search([])) == ROWS
    dataset.close()


def test_columns_are_typed(file: Path):
    dataset = Dataset(file)
    assert dataset.types == ("VARCHAR", "DOUBLE", "VARCHAR", "BOOLEAN", "BIGINT")
    dataset.close()


def test_limit_cuts_rows_but_not_the_count(file: Path):
    dataset = Dataset(file)
    search = dataset.search([], limit=2)
    assert run(search) == ROWS[:2]
    assert (search.matched, search.sent) == (len(ROWS), 2)
    dataset.close()


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 10])
def test_parts_are_disjoint_whole_and_of_one_type(file: Path, parts: int):
    datasets = [Dataset(file, (index, parts)) for index in range(parts)]
    assert [row for dataset in datasets for row in run(dataset.search([]))] == ROWS
    assert len({dataset.types for dataset in datasets}) == 1
    sizes = [dataset.rows for dataset in datasets]
    assert max(sizes) - min(sizes) <= 1
    for dataset in datasets:
        dataset.close()


@pytest.mark.parametrize("mean", ["weight", "number"])
@pytest.mark.parametrize("words", [[], ["red"]])
def test_aggregates_of_parts_add_up(file: Path, mean: str, words: list[str]):
    column = NAMES.index(mean)
    totals: dict[object, list] = {}
    for row in expected(words):
        total = totals.setdefault(row[0], [0, 0, 0])
        total[0] += 1
        if row[column] is not None:
            total[1] += 1
            total[2] += row[column]
    merged: dict[object, list] = {}
    for index in range(2):
        dataset = Dataset(file, (index, 2), group_by="kind", mean=mean)
        for group, rows, values, sum_ in run(dataset.search(words, aggregate=True)):
            part = merged.setdefault(group, [0, 0, 0])
            for place, value in enumerate((rows, values, sum_ or 0)):
                part[place] += value
        dataset.close()
    assert merged == totals


@pytest.mark.parametrize("packing", ["zip", "gz"])
def test_packed_files_are_read_and_leave_nothing(
    file: Path, tmp_path: Path, packing: str, monkeypatch: pytest.MonkeyPatch
):
    packed = tmp_path / f"small.csv.{packing}"
    if packing == "zip":
        with zipfile.ZipFile(packed, "w") as archive:
            archive.write(file, "small.csv")
    else:
        packed.write_bytes(gzip.compress(file.read_bytes()))
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    dataset = Dataset(packed)
    assert run(dataset.search([])) == ROWS
    assert list(folder.iterdir()) == []
    dataset.close()


def test_a_column_that_changes_its_type_late_is_text(tmp_path: Path):
    path = tmp_path / "late.csv"
    path.write_text("a,b\n" + "1,2\n" * 30_000 + "1,word\n")
    first, second = Dataset(path, (0, 2)), Dataset(path, (1, 2))
    assert first.types == second.types == ("BIGINT", "VARCHAR")
    assert run(second.search(["word"])) == [(1, "word")]
    first.close()
    second.close()


def test_a_chunk_stays_below_the_message_limit(tmp_path: Path):
    path = tmp_path / "wide.csv"
    path.write_text("a\n" + ("x" * 20_000 + "\n") * 300)
    dataset = Dataset(path)
    search = dataset.search([])
    search.start()
    sizes = []
    while (table := search.next_batch()) is not None:
        sizes.append(table.ByteSize())
    search.close()
    assert search.sent == 300
    assert max(sizes) <= 1 << 20
    dataset.close()


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        (None, {}, "No such file"),
        (b"", {}, "holds no rows"),
        (b"a,b\n", {}, "holds no rows"),
        (b"PK\x03\x04", {"name": "x.zip"}, "zip"),
        (b"junk", {"name": "x.gz"}, "gzip"),
        (b"a,b\n1,2\n", {"group_by": "c", "mean": "b"}, "no column 'c' for group_by"),
        (b"a,b\n1,x\n", {"group_by": "a", "mean": "b"}, "holds no numbers"),
    ],
)
def test_unusable_data_is_named(tmp_path: Path, content: bytes | None, options: dict, says: str):
    path = tmp_path / options.pop("name", "x.csv")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=says):
        Dataset(path, **options)


def test_an_aggregate_that_is_not_configured_is_refused(file: Path):
    dataset = Dataset(file)
    with pytest.raises(DataError, match="no aggregate"):
        dataset.search([], aggregate=True)
    dataset.close()


def test_an_interrupted_search_ends(tmp_path: Path):
    path = tmp_path / "long.csv"
    path.write_text("a\n" + "word\n" * 20_000)
    dataset = Dataset(path)
    search = dataset.search(["word"])
    search.start()
    assert search.next_batch() is not None
    search.interrupt()
    with pytest.raises(SearchInterruptedError):
        search.next_batch()
    search.close()
    # Others go on.
    assert len(run(dataset.search(["word"]))) == 20_000
    dataset.close()


def test_a_running_statement_is_interrupted(tmp_path: Path):
    path = tmp_path / "one.csv"
    path.write_text("a\nword\n")
    dataset = Dataset(path)
    search = dataset.search(["word"])
    ended = threading.Event()

    def slow() -> None:
        with pytest.raises(SearchInterruptedError), search._interruptible():
            search._cursor.execute(
                "SELECT sum(a.range * b.range) FROM range(1000000) a, range(1000000) b"
            )
        ended.set()

    thread = threading.Thread(target=slow)
    thread.start()
    while not ended.wait(0.05):
        search.interrupt()
    thread.join()
    search.close()
    dataset.close()
