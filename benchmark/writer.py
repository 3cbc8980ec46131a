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
from typing import Any, BinaryIO

import numpy as np

from benchmark.errors import UserError
from benchmark.files import same_file, write_json
from benchmark.vectors import Array, Raw, Safetensors, Vectors

NOTE = 2.0  # seconds of work that a kill may cost, besides that on a row group
PIECE = 2**22  # bytes copied at a time


class Writer:
    """Writes `out` in the format of the file `like`, with the vectors given to `write` and all else kept.

    What is written goes to a hidden partial file beside `out` and is renamed at the end of the `with` block, so an older
    `out` stays whole until then. If a copy was interrupted, `done` rows of the partial file are good and the caller goes on
    behind them, provided that `key` (of what makes the vectors) and the input's path, size and time are the same. An input
    that is refused midway (a `UserError` in the block) leaves nothing. float16 stays float16, all else becomes float32.

    Raises UserError: another suffix than the input's, the input itself as output, no space, another writer at work.
    """

    def __init__(self, out: Path, like: Vectors, dim: int, key: str):
        if out.suffix != like.path.suffix:
            raise UserError(
                f"{out}: the output has the input's format; name it {out.with_suffix(like.path.suffix).name}"
            )
        if same_file(out, like.path):
            raise UserError(f"{out}: would replace its own input, which a rollback needs; choose another name")
        self.out, self.like, self.dim = out, like, dim
        self.partial = out.with_name(f".{out.name}.partial")
        self.notes = out.with_name(f".{out.name}.progress.json")
        stat = like.path.stat()
        source = f"{key} {like.path.resolve()} {stat.st_size} {stat.st_mtime_ns} {dim}"
        self.key = hashlib.sha256(source.encode()).hexdigest()
        self.done = 0
        self.failed = False  # to write, which more space may mend, so that what is written stays

    def __enter__(self) -> Writer:
        with self._explained():
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.file: BinaryIO = os.fdopen(os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.out}: another process is writing it; wait for its end") from None
        try:
            with self._explained():
                self.form = self._form()
        except BaseException:
            if not self.done:
                self._leave_nothing()
            raise
        return self

    def _form(self) -> Any:
        if isinstance(self.like, Raw):
            return _RawForm(self)
        from benchmark.parquet import ParquetForm

        return ParquetForm(self)

    def noted(self) -> dict[str, Any]:
        """What an interrupted run has promised, if it did the same work."""
        try:
            notes = json.loads(self.notes.read_text())
            return notes if notes["key"] == self.key else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def promise(self, **notes: Any) -> None:
        os.fsync(self.file.fileno())  # rows first: a note never promises what is not on the disk
        write_json(self.notes, {"key": self.key, **notes})

    @property
    def pause(self) -> float:
        """Seconds between two notes."""
        return NOTE

    def write(self, vectors: Array) -> None:
        """The next rows (n, dim)."""
        if vectors.shape[1:] != (self.dim,) or self.done + len(vectors) > len(self.like):
            raise ValueError(
                f"expected rows of {self.dim} dims, {len(self.like) - self.done} at most, got {vectors.shape}"
            )
        with self._explained():
            self.form.write(vectors.astype(self.like.dtype, copy=False))
            self.done += len(vectors)
            self.form.note()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        whole = error is None and self.done == len(self.like)
        if isinstance(error, UserError) and not self.failed:
            self._leave_nothing()
            return
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

    def _leave_nothing(self) -> None:
        self.partial.unlink(missing_ok=True)
        self.notes.unlink(missing_ok=True)
        self.file.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failed = True
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
        notes = writer.noted()
        writer.done = int(notes["rows"]) if notes and writer.partial.stat().st_size == total else 0
        if not writer.done:
            writer.notes.unlink(missing_ok=True)
            file.truncate(0)
            os.posix_fallocate(file.fileno(), 0, total)
            file.write(header)
            with like.path.open("rb") as source:
                for begin, target, length in copies:
                    source.seek(begin)
                    file.seek(target)
                    for at in range(0, length, PIECE):
                        file.write(source.read(min(PIECE, length - at)))
        file.seek(self.offset + writer.done * self.row_bytes)

    def write(self, vectors: np.ndarray) -> None:
        self.writer.file.write(np.ascontiguousarray(vectors).data)

    def note(self, now: bool = False) -> None:
        if now or time.monotonic() - self.noted >= NOTE:
            self.writer.file.flush()
            self.writer.promise(rows=self.writer.done)
            self.noted = time.monotonic()

    def close(self, whole: bool) -> None:
        if not whole:
            self.note(now=True)


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
