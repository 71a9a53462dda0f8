"""A team's rows, in an in-process DuckDB: word search and the aggregate.

A `Dataset` loads one part of a CSV file and keeps it in memory. A `Search` is one query on it;
its methods block and are meant for a worker thread, `interrupt` may be called from any thread.

Columns are whole numbers, floating-point numbers, truth values or text; whatever else a CSV
holds (dates, times) stays the text that it was.
"""

import contextlib
import gzip
import shutil
import tempfile
import threading
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import duckdb

from servers.pb import shmcoord_cluster_pb2 as pb
from servers.table import BATCH_ROWS, TYPES, Row, to_tables

# Stands between the texts of a row where words are looked for in all of them at once.
SEPARATOR = "\x1f"
# Columns of a partial aggregate: the group, its rows, those with a value, and their sum.
AGGREGATE_COLUMNS = ("group", "rows", "values", "sum")


class DataError(Exception):
    """The data cannot be used as the configuration says; the message says why."""


class SearchInterruptedError(Exception):
    """The search was ended by `interrupt`."""


class Dataset:
    """One part of the rows of a CSV file.

    Args:
        path: the CSV file, plain, or in a .zip with no other file in it, or .gz.
        part: (index, parts): the rows are split by their number into that many parts.
        nulls: the texts that stand for "no value".
        group_by: column that the aggregate groups by, or None for no aggregate.
        mean: numeric column whose mean the aggregate takes.

    Raises:
        DataError: unreadable file, no CSV, or a column that is missing or no number.
    """

    def __init__(
        self,
        path: Path,
        part: tuple[int, int] = (0, 1),
        *,
        nulls: Sequence[str] = ("",),
        group_by: str | None = None,
        mean: str | None = None,
    ) -> None:
        self._database = duckdb.connect(
            ":memory:",
            config={
                "threads": 1,
                "autoinstall_known_extensions": "false",
                "autoload_known_extensions": "false",
            },
        )
        try:
            with _open_csv(path) as file:
                self.total_rows = self._load(file, part, nulls)
            # From here on nothing but the loaded rows can be reached.
            self._database.execute("SET enable_external_access = false")
            self._database.execute("SET lock_configuration = true")
        except (OSError, EOFError, zipfile.BadZipFile) as error:
            self.close()
            raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
        except duckdb.Error as error:
            self.close()
            raise DataError(f"{path}: no usable CSV: {_first_line(error)}") from None
        self.rows = self._count()
        if not self.total_rows:
            self.close()
            raise DataError(f"{path}: holds no rows")
        self.group_by, self.mean = group_by, mean
        try:
            self._check_aggregate(path)
        except DataError:
            self.close()
            raise

    def _load(self, file: IO[bytes], part: tuple[int, int], nulls: Sequence[str]) -> int:
        # The file may have no name any more; a path through /proc also is never taken for a
        # pattern of several files.
        path = f"/proc/self/fd/{file.fileno()}"
        try:
            return self._load_typed(path, part, nulls, sample=20_480)
        except (duckdb.ConversionException, duckdb.InvalidInputException):
            # A column changes its type late in the file: look at all of it.
            return self._load_typed(path, part, nulls, sample=-1)

    def _load_typed(
        self, path: str, part: tuple[int, int], nulls: Sequence[str], sample: int
    ) -> int:
        source = (
            "read_csv(?, header = true, compression = 'none', sample_size = ?, nullstr = ?, "
            f"auto_type_candidates = [{', '.join(repr(kind) for kind in TYPES)}])"
        )
        arguments = [path, sample, list(nulls)]
        # Every part reads every column of the whole file here, so that all of them agree on the
        # types, whatever stands in the rows of the others.
        described = self._database.execute(f"DESCRIBE SELECT * FROM {source}", arguments)
        kinds = {str(row[0]): str(row[1]) for row in described.fetchall()}
        counts = ", ".join(f"count({_quoted(name)})" for name in kinds)
        counted = self._database.execute(
            f"SELECT count(*), {counts} FROM {source}", arguments
        ).fetchone()
        total = int(counted[0]) if counted else 0
        index, parts = part
        first, end = total * index // parts, total * (index + 1) // parts
        self.names, self.types = tuple(kinds), tuple(kinds.values())
        self.words_column = "words"
        while self.words_column in kinds:
            self.words_column += "_"
        self._database.execute(
            f"CREATE OR REPLACE TABLE part AS SELECT *, {self._words_value()} "
            f"AS {_quoted(self.words_column)} FROM {source} LIMIT ? OFFSET ?",
            [*arguments, end - first, first],
        )
        return total

    def _words_value(self) -> str:
        """What words are looked for in: all text of a row, in lower case.

        One column instead of many makes a search eight times as fast, for a tenth more memory.
        """
        texts = ", ".join(_quoted(name) for name in self.text_columns())
        return f"lower(concat_ws(chr({ord(SEPARATOR)}), {texts}))" if texts else "''"

    def text_columns(self) -> list[str]:
        """The columns in which words are looked for."""
        columns = zip(self.names, self.types, strict=True)
        return [name for name, kind in columns if kind == "VARCHAR"]

    def _count(self) -> int:
        row = self._database.execute("SELECT count(*) FROM part").fetchone()
        return int(row[0]) if row else 0

    def _check_aggregate(self, path: Path) -> None:
        for role, name in (("group_by", self.group_by), ("mean", self.mean)):
            if name is not None and name not in self.names:
                raise DataError(
                    f"{path}: no column {name!r} for {role}; columns are {', '.join(self.names)}"
                )
        if self.mean is not None and self.type_of(self.mean) not in ("BIGINT", "DOUBLE"):
            raise DataError(f"{path}: the column {self.mean!r} holds no numbers to take a mean of")

    def type_of(self, column: str) -> str:
        """The type of a column, a word of TYPES."""
        return self.types[self.names.index(column)]

    def search(self, words: Sequence[str], *, limit: int = 0, aggregate: bool = False) -> "Search":
        """A query that has not begun: rows that have every word in one of their text columns.

        Args:
            words: compared without regard to case; none means every row.
            limit: most rows to give, 0 means all.
            aggregate: partial groups instead of rows; `limit` is then not applied.

        Raises:
            DataError: an aggregate is asked for and none is configured.
        """
        if aggregate and (self.group_by is None or self.mean is None):
            raise DataError("no aggregate is configured (data.group_by and data.mean)")
        return Search(self._database.cursor(), self, words, limit, aggregate)

    def close(self) -> None:
        """Gives the memory back. No search may be running."""
        self._database.close()


class Search:
    """One query: `start`, then `next_batch` until it returns None, then `close`.

    The same thread or different ones may call these, one at a time.
    """

    def __init__(
        self,
        cursor: duckdb.DuckDBPyConnection,
        dataset: Dataset,
        words: Sequence[str],
        limit: int,
        aggregate: bool,
    ) -> None:
        self._cursor = cursor
        self._dataset = dataset
        self._words = [word for word in words if word]
        self._limit = limit
        self._aggregate = aggregate
        self._interrupted = threading.Event()
        self._names: Sequence[str] = ()
        self._types: Sequence[str] = ()
        self._pending: list[pb.Table] = []
        self.matched = 0
        self.sent = 0

    def start(self) -> None:
        """Counts the matching rows (`matched`) and begins to read them.

        Raises:
            SearchInterruptedError: `interrupt` was called.
        """
        where, arguments = self._condition()
        with self._interruptible():
            counted = self._cursor.execute(
                f"SELECT count(*) FROM part WHERE {where}", arguments
            ).fetchone()
        self.matched = int(counted[0]) if counted else 0
        with self._interruptible():
            if self._aggregate:
                self._start_aggregate(where, arguments)
            else:
                self._names, self._types = self._dataset.names, self._dataset.types
                columns = ", ".join(_quoted(name) for name in self._names)
                limit = " LIMIT ?" if self._limit else ""
                extra = [self._limit] if self._limit else []
                self._cursor.execute(
                    f"SELECT {columns} FROM part WHERE {where}{limit}", [*arguments, *extra]
                )

    def next_batch(self) -> pb.Table | None:
        """The next rows, or None at the end.

        Raises:
            SearchInterruptedError: `interrupt` was called.
        """
        if not self._pending:
            with self._interruptible():
                rows: list[Row] = self._cursor.fetchmany(BATCH_ROWS)
            if not rows:
                return None
            self._pending = to_tables(self._names, self._types, rows)[::-1]
        table = self._pending.pop()
        self.sent += table.rows
        return table

    def interrupt(self) -> None:
        """Makes `start` and `next_batch` raise SearchInterruptedError, now or at their next call.

        A statement that begins just now may miss it: call again until the thread is back.
        """
        self._interrupted.set()
        self._cursor.interrupt()

    def close(self) -> None:
        """Ends the query."""
        self._cursor.close()

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        if self._interrupted.is_set():
            raise SearchInterruptedError
        try:
            yield
        except duckdb.InterruptException:
            raise SearchInterruptedError from None

    def _condition(self) -> tuple[str, list[str]]:
        conditions, arguments = ["true"], []
        texts = self._dataset.text_columns()
        whole = _quoted(self._dataset.words_column)
        for word in self._words:
            if not texts:
                return "false", []
            # A word with the separator in it could be found across two columns.
            places = [whole]
            if SEPARATOR in word:
                places = [f"lower({_quoted(text)})" for text in texts]
            found = " OR ".join(f"contains({place}, lower(?))" for place in places)
            conditions.append(f"({found})")
            arguments += [word] * len(places)
        return " AND ".join(conditions), arguments

    def _start_aggregate(self, where: str, arguments: Sequence[str]) -> None:
        group, mean = self._dataset.group_by, self._dataset.mean
        assert group is not None  # checked by Dataset.search
        assert mean is not None
        kind = self._dataset.type_of(mean)
        self._names = AGGREGATE_COLUMNS
        self._types = (self._dataset.type_of(group), "BIGINT", "BIGINT", kind)
        self._cursor.execute(
            f"SELECT {_quoted(group)}, count(*), count({_quoted(mean)}), "
            f"CAST(sum({_quoted(mean)}) AS {kind}) "
            f"FROM part WHERE {where} GROUP BY 1 ORDER BY 1 NULLS LAST",
            arguments,
        )


def _open_csv(path: Path) -> IO[bytes]:
    """The CSV as a regular file; what is unpacked has no name, so nothing stays behind."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            members = [item for item in archive.infolist() if not item.is_dir()]
            if len(members) != 1:
                raise DataError(f"{path}: must hold one file, holds {len(members)}")
            with archive.open(members[0]) as packed:
                return _unpacked(packed)
    if path.suffix == ".gz":
        with gzip.open(path) as packed:
            return _unpacked(packed)
    return path.open("rb")


def _unpacked(packed: IO[bytes] | gzip.GzipFile) -> IO[bytes]:
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    try:
        shutil.copyfileobj(packed, file)
        file.flush()
    except BaseException:
        file.close()
        raise
    return file


def _quoted(name: str) -> str:
    """A column's name as SQL takes it."""
    return '"' + name.replace('"', '""') + '"'


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
