"""Parquet files of embeddings: read from any row on, and written in parts that outlast a kill. Imports pyarrow."""

from __future__ import annotations

import os
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmark.errors import UserError
from benchmark.vectors import Array, Vectors

if TYPE_CHECKING:
    from benchmark.writer import Writer

pa.set_memory_pool(pa.system_memory_pool())  # pyarrow's own keeps what it has freed

LONGEST = 1000  # characters of a name; a column of names takes 4 bytes for each, times its longest name
GROUP = 2**26  # bytes of a row group that is written, which are held in memory; larger ones are cut


class Parquet(Vectors):
    random_access = False

    def __init__(self, path: Path):
        super().__init__(path)
        file = self._open()
        self.schema = file.schema_arrow
        names = self.schema.names
        if "vector" not in names:
            raise UserError(f"{path}: has no column 'vector', only {', '.join(names) or 'nothing'}; rename yours")
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise UserError(f"{path}: has more than one column '{twice[0]}'; rename or drop all but one")
        self.id_name = next((name for name in ("id", "ids") if name in names), None)
        self.type = self.schema.field("vector").type
        lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
        if not any(kind(self.type) for kind in lists) or not pa.types.is_floating(self.type.value_type):
            raise UserError(f"{path}: the column 'vector' must hold lists of floats, not {self.type}")
        self.rows = file.metadata.num_rows
        if not self.rows:
            raise UserError(f"{path}: holds no rows")
        if pa.types.is_float16(self.type.value_type):
            self.dtype = np.dtype(np.float16)
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        self.group_bytes = [group.total_byte_size for group in groups]
        self.group_ends = np.cumsum([group.num_rows for group in groups]).tolist()
        if pa.types.is_fixed_size_list(self.type):
            self.dim = self.type.list_size
        else:
            self.dim = len(next(self.batches(["vector"], 1)).column(0)[0].as_py() or ())
        if not self.dim:
            raise UserError(f"{path}: row 0 has no vector; every row needs one")

    def _open(self) -> pq.ParquetFile:
        # without pre-buffering, and with a small buffer, a row group need not fit into memory
        return pq.ParquetFile(self.path, pre_buffer=False, buffer_size=2**20)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:  # of damaged pages, which nobody sees before they are read
            what = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"{self}: cannot be read: {what}; the file is damaged, copy or write it again") from None

    def batches(self, columns: list[str], rows: int, start: int = 0) -> Iterator[pa.RecordBatch]:
        """From row `start` on; the row groups before it are not read."""
        first = bisect_right(self.group_ends, start)
        skip = start - (self.group_ends[first - 1] if first else 0)
        if first == len(self.group_ends):
            return
        with self._readable():
            groups = range(first, len(self.group_ends))
            for batch in self._open().iter_batches(rows, groups, columns, use_threads=False):
                if skip < batch.num_rows:
                    yield batch.slice(skip)
                skip = max(0, skip - batch.num_rows)

    def _chunks(self, rows: int, start: int) -> Iterator[Array]:
        at = start
        for batch in self.batches(["vector"], rows, start):
            lists = batch.column(0)
            if lists.null_count or pc.any(pc.not_equal(pc.list_value_length(lists), self.dim)).as_py():
                lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
                row = int((lengths != self.dim).argmax())
                raise UserError(
                    f"{self}: row {at + row} has {lengths[row]} dims, the first has {self.dim}; all need the same"
                )
            values = lists.flatten()
            if values.null_count:
                row = int(values.is_null().to_numpy(zero_copy_only=False).argmax()) // self.dim
                raise UserError(f"{self}: the vector of row {at + row} has a null in it; remove such rows")
            with np.errstate(over="ignore"):  # refused as infinity, in a line of our own
                chunk = values.to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, self.dim)
            yield chunk
            at += len(chunk)

    @property
    def columns(self) -> list[str]:
        return [name for name in self.schema.names if name not in ("vector", self.id_name)]

    def few(self, name: str, most: int) -> NDArray | None:
        seen: set[str | None] = set()
        for batch in self.batches([name], 2**8):
            texts = self._texts(batch.column(0), name)
            seen.update(pc.unique(texts).to_pylist())
            if len(seen) > most or (pc.max(pc.utf8_length(texts)).as_py() or 0) > LONGEST:
                return None
        return self._column(name)

    def _column(self, name: str) -> NDArray:
        column = self._read(name)
        if pa.types.is_integer(column.type) and not column.null_count:
            return column.to_numpy()
        texts = self._texts(column, name)
        longest = pc.max(pc.utf8_length(texts)).as_py() or 0
        if longest > LONGEST:
            raise UserError(
                f"{self}: the column '{name}' holds a text of {longest:,} characters, names have {LONGEST:,} at most; "
                "take another"
            )
        return pc.fill_null(texts, "null").to_numpy(zero_copy_only=False).astype(str)

    def _read(self, name: str) -> pa.ChunkedArray:
        with self._readable():
            column = self._open().read([name]).column(name)
        return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column

    def _texts(self, column: Any, name: str) -> Any:
        try:
            return column.cast(pa.string())
        except pa.ArrowException:
            raise UserError(f"{self}: the column '{name}' of type {column.type} holds no names; take another") from None

    def _ids(self) -> NDArray | None:
        if self.id_name is None:
            return None
        row = pc.index(self._read(self.id_name).is_null(), True).as_py()
        if row >= 0:
            raise UserError(f"{self}: row {row} has no id (null); give every row its own, or leave such rows out")
        ids = self._column(self.id_name)
        return ids.astype(np.int64) if ids.dtype.kind in "iu" else ids


class ParquetForm:
    """Row groups where the input has them, cut to GROUP bytes; the same list type, with as many dims as are given.

    Every NOTE seconds they become a whole Parquet file of their own, appended to the partial one with offsets that count
    from the start of that; such parts outlast a kill. At the end one footer that lists all their row groups is appended.
    """

    def __init__(self, writer: Writer):
        assert isinstance(writer.like, Parquet)
        self.writer, self.like = writer, writer.like
        value = pa.float16() if self.like.dtype == np.float16 else pa.float32()
        if pa.types.is_fixed_size_list(self.like.type):
            self.type = pa.list_(value, writer.dim)
        else:
            self.type = pa.large_list(value) if pa.types.is_large_list(self.like.type) else pa.list_(value)
        at = self.like.schema.get_field_index("vector")
        self.schema = self.like.schema.set(at, self.like.schema.field(at).with_type(self.type))
        self.others = [name for name in self.schema.names if name != "vector"]
        self.ends = self._ends()
        self.parts = self._noted()  # where each part ends in the partial file
        writer.file.truncate(self.parts[-1] if self.parts else 0)
        self.at = self.grouped = writer.done  # rows taken, and those of them in finished row groups
        self.ahead = self.like.batches(self.others, 2**10, self.at) if self.others else iter(())
        self.rest: pa.Table | None = None
        self.held: list[pa.Array] = []
        self.part: pq.ParquetWriter | None = None

    def _ends(self) -> list[int]:
        ends, begin = [], 0
        for end, size in zip(self.like.group_ends, self.like.group_bytes):
            vectors = (end - begin) * self.writer.dim * self.like.dtype.itemsize
            pieces = min(-(-max(size, vectors) // GROUP), end - begin)
            ends += [begin + (end - begin) * (i + 1) // pieces for i in range(pieces)]
            begin = end
        return ends

    def _noted(self) -> list[int]:
        """Parts of an interrupted run, whose rows are then done."""
        notes = self.writer.noted()
        try:
            parts = [int(end) for end in notes["parts"]]
            if parts and self._footer(parts).num_rows == notes["rows"] and notes["rows"] in self.ends:
                self.writer.done = notes["rows"]
                return parts
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
            pass
        return []

    def _footer(self, parts: list[int]) -> pq.FileMetaData:
        """All row groups of the parts."""
        with pa.memory_map(str(self.writer.partial)) as file:
            whole = file.read_buffer()
            if parts[-1] > whole.size:
                raise ValueError("the partial file was cut")
            footers = [pq.read_metadata(pa.BufferReader(whole.slice(0, end))) for end in parts]
        for other in footers[1:]:
            footers[0].append_row_groups(other)
        return footers[0]

    def write(self, vectors: np.ndarray) -> None:
        while len(vectors):
            end = self.ends[bisect_right(self.ends, self.at)]
            head, vectors = vectors[: end - self.at], vectors[end - self.at :]
            self.held.append(self._lists(head))
            self.at += len(head)
            if self.at == end:
                self._end_group()

    def _lists(self, vectors: np.ndarray) -> pa.Array:
        flat = pa.array(vectors.ravel())
        if pa.types.is_fixed_size_list(self.type):
            return pa.FixedSizeListArray.from_arrays(flat, type=self.type)
        large = pa.types.is_large_list(self.type)
        offsets = pa.array(np.arange(len(vectors) + 1) * self.writer.dim, pa.int64() if large else pa.int32())
        return (pa.LargeListArray if large else pa.ListArray).from_arrays(offsets, flat, type=self.type)

    def _end_group(self) -> None:
        rows = self.at - self.grouped
        others = self._next(rows) if self.others else {}
        vectors = pa.chunked_array(self.held, self.type)
        columns = [vectors if name == "vector" else others[name] for name in self.schema.names]
        if self.part is None:
            self.sink = pa.OSFile(str(self.writer.partial), "ab")
            # it appends wherever it stands, but pyarrow refuses a stream that stands elsewhere than at 0
            os.lseek(self.sink.fileno(), 0, os.SEEK_SET)
            self.part = pq.ParquetWriter(self.sink, self.schema, use_dictionary=self.others)
            self.began = time.monotonic()
        self.part.write_table(pa.Table.from_arrays(columns, schema=self.schema), row_group_size=rows)
        self.held, self.grouped = [], self.at

    def _next(self, rows: int) -> Any:
        """The other columns of the next rows."""
        tables = [] if self.rest is None else [self.rest]
        while sum(table.num_rows for table in tables) < rows:
            tables.append(pa.Table.from_batches([next(self.ahead)]))
        whole = pa.concat_tables(tables)
        self.rest = whole.slice(rows)
        return whole.slice(0, rows)

    def note(self, now: bool = False) -> None:
        if self.part is None or not (now or time.monotonic() - self.began >= self.writer.pause):
            return
        self.part.close()
        self.sink.close()
        self.part = None
        self.parts.append(self.writer.partial.stat().st_size)
        self.writer.promise(rows=self.grouped, parts=self.parts)

    def close(self, whole: bool) -> None:
        self.note(now=True)
        if whole and len(self.parts) > 1:
            footer = pa.BufferOutputStream()
            self._footer(self.parts).write_metadata_file(footer)
            self.writer.file.seek(0, os.SEEK_END)
            self.writer.file.write(footer.getvalue())
