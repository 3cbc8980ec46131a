"""What every kind of training must survive."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from benchmark import runner
from benchmark.plan import Node
from benchmark.store import Store


def assert_resumes_bit_for_bit(node: Node, task: Any, store: Store) -> None:
    """Train a finished node again, stopped half way and started once more: its files come out as they were."""
    folder = store.folder(node)
    kept = ("link.safetensors" if "k" in node.spec else "encoder.safetensors", "train.json")
    before = [(folder / file).read_bytes() for file in kept]
    shutil.rmtree(folder)

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.compute(node, task, store, stop)
    assert (folder / ".last.ckpt").is_file() and not store.done(node)
    runner.compute(node, task, store, lambda done, total: None)
    assert [(folder / file).read_bytes() for file in kept] == before
