"""Writing whole files or none. Without torch, so that records can be read and written without it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from benchmark.errors import UserError


def write_bytes(path: Path, data: bytes) -> None:
    """Whole or not at all: a killed run leaves no half file under its final name."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free space or choose another folder") from None


def write_json(path: Path, data: object) -> None:
    write_bytes(path, (json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())


def same_file(a: Path, b: Path) -> bool:
    """Whether two paths lead to one file: also by links, hard ones too; of files that may not exist yet."""
    try:
        return a.samefile(b)
    except OSError:
        return a.resolve() == b.resolve()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
