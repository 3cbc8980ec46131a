"""Where nodes are kept: one folder each, whole files only, `done` written last with the hashes of all others."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmark.embeddings import Embeddings, read_tensors, write_tensors
from benchmark.errors import UserError
from benchmark.files import sha256_file, write_json
from benchmark.plan import Node


class Store:
    """The cache of computed nodes under `root`/nodes."""

    def __init__(self, root: Path):
        self.root = Path(root)
        try:
            (self.root / "nodes").mkdir(parents=True, exist_ok=True)
            if not os.access(self.root / "nodes", os.W_OK):
                raise PermissionError(13, "Permission denied")
        except OSError as error:
            raise UserError(
                f"cannot write to {self.root}: {error.strerror}; choose another folder with --runs"
            ) from None

    def folder(self, node: Node) -> Path:
        return self.root / "nodes" / f"{node.kind}-{node.id}"

    def done(self, node: Node) -> bool:
        return (self.folder(node) / "done").is_file()

    @contextlib.contextmanager
    def lock(self, node: Node) -> Iterator[None]:
        """One process at a time works on a node; the lock dies with its process."""
        folder = self.folder(node)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / ".lock").open("w")
        except OSError as error:
            raise UserError(
                f"cannot write to {folder}: {error.strerror}; free space or choose another --runs"
            ) from None
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def finish(self, node: Node, timing: Mapping[str, Any]) -> None:
        """Declare the node computed: from here on it is only read."""
        folder = self.folder(node)
        inputs = {name: other.id for name, other in node.inputs.items()}
        write_json(folder / "node.json", {"label": node.label, "kind": node.kind, "spec": node.spec, "inputs": inputs})
        write_json(folder / "timing.json", timing)
        outputs = {
            p.name: sha256_file(p)
            for p in sorted(folder.iterdir())
            if p.is_file() and p.name[0] != "." and p.name != "done"
        }
        write_json(folder / "done", outputs)

    def check(self, node: Node) -> None:
        """Refuse a node whose files are not what was written.

        Raises:
            UserError: names the file, and how to have the node made again.
        """
        folder = self.folder(node)
        try:
            outputs = json.loads((folder / "done").read_bytes())
            wrong = next((name for name, sha in outputs.items() if sha256_file(folder / name) != sha), None)
        except (OSError, ValueError, AttributeError):
            wrong = "done"
        if wrong:
            raise UserError(
                f"cached {node.label}: {folder / wrong} is damaged; remove {folder} and run again to have it remade"
            )

    def read_json(self, node: Node, name: str) -> Any:
        return json.loads((self.folder(node) / name).read_bytes())

    def write_json(self, node: Node, name: str, data: Any) -> None:
        write_json(self.folder(node) / name, data)

    def read_tensors(self, node: Node, name: str) -> dict[str, Tensor]:
        return read_tensors(self.folder(node) / name)

    def write_tensors(self, node: Node, name: str, tensors: Mapping[str, Tensor]) -> None:
        write_tensors(self.folder(node) / name, tensors)

    def embeddings(self, node: Node) -> Embeddings:
        return Embeddings.load(self.folder(node) / "embeddings.safetensors")
