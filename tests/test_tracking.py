"""What W&B gets is what the record says, read back from the offline run's own files."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmark import protocol, record, tracking
from benchmark.errors import UserError

PATH = protocol.LEADERBOARDS / "digits@1" / "BCT" / "seed0.json"


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_the_matrices_are_read_back_from_an_offline_run(tmp_path: Path) -> None:
    one = record.load(PATH)
    files = tracking.log(one, PATH, None, tmp_path)  # offline is the default without a key
    assert files is not None and "offline-run" in str(files)
    tables = {path.name: json.loads(path.read_text()) for path in files.glob("media/table/**/*.table.json")}
    for metric, by_stratum in one.matrices.items():
        for stratum, matrix in by_stratum.items():
            (found,) = [t for path, t in stored_tables(files).items() if path.startswith(f"matrix/{metric}/{stratum}_")]
            assert found["columns"] == ["query release", "gallery release", "t", "k", metric, "independent"]
            values = {(row[2], row[3]): row[4] for row in found["data"]}
            assert values == {(t, k): matrix[t][k] for t in range(len(matrix)) for k in range(t + 1)}
    assert len(tables) == sum(len(by_stratum) for by_stratum in one.matrices.values())
    assert len(list(files.glob("media/images/**/*.png"))) == len(one.matrices)


def stored_tables(files: Path) -> dict[str, dict]:
    folder = files / "media" / "table"
    return {str(path.relative_to(folder)): json.loads(path.read_text()) for path in folder.glob("**/*.table.json")}


def test_losses_and_summary_are_in_the_offline_log(tmp_path: Path) -> None:
    from wandb.proto import wandb_internal_pb2

    one = record.load(PATH)
    files = tracking.log(one, PATH, "offline", tmp_path)
    assert files is not None
    (log,) = files.parent.glob("*.wandb")
    history: dict[str, list[float]] = {}
    for data in log_entries(log.read_bytes()):
        entry = wandb_internal_pb2.Record()
        entry.ParseFromString(data)
        for item in entry.history.item:
            history.setdefault(item.key or "/".join(item.nested_key), []).append(json.loads(item.value_json))
    for t, release in enumerate(one.releases):
        for term, values in release.losses.items():
            assert history[f"release{t}/{term}"] == values


def log_entries(data: bytes) -> Iterator[bytes]:
    """Entries of a .wandb file: LevelDB's log format (blocks of 32 KiB, parts of an entry marked 1 whole, 2 first, 4 last)."""
    block, at, parts = 1 << 15, 7, []
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block  # the rest of a block is too short for a header
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts.append(data[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []


def test_disabled_writes_nothing(tmp_path: Path) -> None:
    assert tracking.log(record.load(PATH), PATH, "disabled", tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_online_without_a_key_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="wandb login"):
        tracking.log(record.load(PATH), PATH, "online", tmp_path)


def test_a_failing_service_is_a_warning_not_a_loss(tmp_path: Path) -> None:
    one = record.load(PATH).model_copy(update={"outputs": {"missing.safetensors": "0"}})
    with pytest.warns(UserWarning, match="the record is safe"):
        assert tracking.log(one, PATH, "offline", tmp_path) is None
