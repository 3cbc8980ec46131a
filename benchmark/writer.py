"""Copies of files of embeddings with other vectors in place of their own; whole under their final name or not there at all."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from benchmark.errors import UserError
from benchmark.files import write_json
from benchmark.vectors import Array, Parquet, Raw, Safetensors, Vectors

if TYPE_CHECKING:
    import pyarrow as pa

NOTE = 2.0  # seconds of work that a kill may cost


class Writer:
    """Writes `out` in the format of the file `like`, with the vectors given to `write` and all else kept.

    What is written goes to a hidden partial file beside `out` and is renamed at the end of the `with` block, so an older
    `out` stays whole until then. If a copy was interrupted, `done` rows of the partial file are good and the caller goes on
    behind them, provided that `key` (of what makes the vectors) and the input's path, size and time are the same. Parquet
    has its index at the end of the file and starts again. float16 stays float16, all else becomes float32.

    Raises UserError: another suffix than the input's, the input itself as output, no space, another writer at work.
    """

    def __init__(self, out: Path, like: Vectors, dim: int, key: str):
        if out.suffix != like.path.suffix:
            raise UserError(
                f"{out}: the output has the input's format; name it {out.with_suffix(like.path.suffix).name}"
            )
        if out.resolve() == like.path.resolve():
            raise UserError(f"{out}: would replace its own input, which a rollback needs; choose another name")
        self.out, self.like, self.dim = out, like, dim
        self.partial = out.with_name(f".{out.name}.partial")
        self.notes = out.with_name(f".{out.name}.progress.json")
        stat = like.path.stat()
        source = f"{key} {like.path.resolve()} {stat.st_size} {stat.st_mtime_ns} {dim}"
        self.key = hashlib.sha256(source.encode()).hexdigest()
        self.done = 0

    def __enter__(self) -> Writer:
        with self._explained():
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.file: BinaryIO = os.fdopen(os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.out}: another process is writing it; wait for its end") from None
            self.form = _RawForm(self) if isinstance(self.like, Raw) else _ParquetForm(self)
        return self

    def write(self, vectors: Array) -> None:
        """The next rows (n, dim)."""
        if vectors.shape[1:] != (self.dim,) or self.done + len(vectors) > len(self.like):
            raise ValueError(
                f"expected rows of {self.dim} dims, {len(self.like) - self.done} at most, got {vectors.shape}"
            )
        with self._explained():
            self.form.write(vectors.astype(self.like.dtype))
        self.done += len(vectors)
        self.form.note(self.done)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        whole = error is None and self.done == len(self.like)
        with self._explained():
            self.form.close(whole)
            if whole:
                self.file.flush()
                os.fsync(self.file.fileno())
                self.partial.replace(self.out)
                self.notes.unlink(missing_ok=True)
            self.file.close()
        if error is None and not whole:
            raise ValueError(f"{self.done} of {len(self.like)} rows were written")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write {self.out}: {error.strerror or error}; free space or choose another folder"
            ) from None


class _RawForm:
    """A file of a known size, allocated at once: a full disk is met before the first row, not at the last."""

    def __init__(self, writer: Writer):
        self.writer, self.noted = writer, time.monotonic()
        like, dtype = writer.like, writer.like.dtype
        self.row_bytes = writer.dim * dtype.itemsize
        size = len(like) * self.row_bytes
        if isinstance(like, Safetensors):
            header, self.offset, total, copies = _safetensors_layout(like, writer.dim, size)
        else:
            shape = {"descr": dtype.str, "fortran_order": False, "shape": (len(like), writer.dim)}
            buffer = io.BytesIO()
            np.lib.format.write_array_header_1_0(buffer, shape)
            header, copies = buffer.getvalue(), []
            self.offset, total = len(header), len(header) + size
        file = writer.file
        writer.done = self._noted(total)
        if not writer.done:
            writer.notes.unlink(missing_ok=True)
            file.truncate(0)
            os.posix_fallocate(file.fileno(), 0, total)
            file.write(header)
            for source, target, length in copies:
                file.seek(target)
                file.write(np.fromfile(like.path, np.uint8, length, offset=source).tobytes())
        file.seek(self.offset + writer.done * self.row_bytes)

    def _noted(self, total: int) -> int:
        try:
            notes = json.loads(self.writer.notes.read_text())
            fits = notes["key"] == self.writer.key and self.writer.partial.stat().st_size == total
            return int(notes["rows"]) if fits else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def write(self, vectors: np.ndarray) -> None:
        self.writer.file.write(np.ascontiguousarray(vectors).data)

    def note(self, done: int) -> None:
        if time.monotonic() - self.noted >= NOTE:
            self.writer.file.flush()
            os.fsync(self.writer.file.fileno())  # rows first: a note never promises what is not on the disk
            write_json(self.writer.notes, {"key": self.writer.key, "rows": done})
            self.noted = time.monotonic()

    def close(self, whole: bool) -> None:
        if not whole:
            self.noted = -NOTE
            self.note(self.writer.done)


def _safetensors_layout(like: Safetensors, dim: int, size: int) -> tuple[bytes, int, int, list[tuple[int, int, int]]]:
    """Header, where the embeddings begin, bytes in all, and (from, to, length) of the other tensors.

    Wider types come first, so that each tensor is aligned to its own.
    """
    ours = {"dtype": "F16" if like.dtype == np.float16 else "F32", "shape": [len(like), dim]}
    entries = {**like.header, like.name: {**ours, "data_offsets": [0, size]}}
    wide = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
    placed: dict[str, Any] = {"__metadata__": like.metadata} if like.metadata else {}
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: -wide.get(item[1]["dtype"], 1)):
        begin, end = entry["data_offsets"]
        placed[name] = {**entry, "data_offsets": [at, at + end - begin]}
        at += end - begin
    text = json.dumps(placed).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    copies = [
        (like.start + entry["data_offsets"][0], start + placed[name]["data_offsets"][0],
         entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in like.header.items() if name != like.name
    ]  # fmt: skip
    return len(text).to_bytes(8, "little") + text, start + placed[like.name]["data_offsets"][0], start + at, copies


class _ParquetForm:
    """Row groups as the chunks come, other columns read beside them; the same list type, with as many dims as are given."""

    def __init__(self, writer: Writer):
        import pyarrow as pa
        import pyarrow.parquet as pq

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
        self.ahead = self.like.batches(self.others, 2**14) if self.others else iter(())
        self.rest: pa.Table | None = None
        writer.file.truncate(0)
        self.pq = pq.ParquetWriter(writer.file, self.schema, use_dictionary=self.others)

    def write(self, vectors: np.ndarray) -> None:
        import pyarrow as pa

        flat, n = pa.array(vectors.ravel()), len(vectors)
        if pa.types.is_fixed_size_list(self.type):
            lists = pa.FixedSizeListArray.from_arrays(flat, type=self.type)
        else:
            large = pa.types.is_large_list(self.type)
            offsets = pa.array(np.arange(n + 1) * self.writer.dim, pa.int64() if large else pa.int32())
            lists = (pa.LargeListArray if large else pa.ListArray).from_arrays(offsets, flat, type=self.type)
        others = self._next(n) if self.others else {}
        columns = [lists if name == "vector" else others[name] for name in self.schema.names]
        self.pq.write_table(pa.Table.from_arrays(columns, schema=self.schema))

    def _next(self, rows: int) -> Any:
        """The other columns of the next rows."""
        import pyarrow as pa

        while self.rest is None or self.rest.num_rows < rows:
            more = pa.Table.from_batches([next(self.ahead)])
            self.rest = more if self.rest is None else pa.concat_tables([self.rest, more])
        head, self.rest = self.rest.slice(0, rows), self.rest.slice(rows)
        return head

    def note(self, done: int) -> None:
        pass

    def close(self, whole: bool) -> None:
        self.pq.close()
        if not whole:
            self.writer.partial.unlink(missing_ok=True)
