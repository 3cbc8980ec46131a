"""What W&B gets is what the record says, read back from the offline run's own files."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmark import protocol, record, tracking
from benchmark.errors import UserError
from benchmark.files import sha256_file
from benchmark.record import Record

PATH = protocol.LEADERBOARDS / "digits@1" / "BCT" / "seed0.json"
METRIC = "cmc@1"
KEY = "a" * 40


def with_an_undefined_cell() -> Record:
    data = record.load(PATH).model_dump()
    for stratum in data["matrices"][METRIC]:
        data["matrices"][METRIC][stratum][2][1] = None
    return Record.model_validate(data)


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing of this machine's W&B is read or written; its service ends with the test, and its settings with it."""
    home = tmp_path_factory.mktemp("home")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "NETRC"):
        monkeypatch.setenv(name, str(home / name))
    yield
    import wandb

    wandb.teardown()


@dataclass
class Offline:
    """An offline run as its files tell it."""

    files: Path
    history: dict[str, list[Any]]
    summary: dict[str, Any]
    config: dict[str, Any]
    run: Any
    artifacts: list[Any]

    def media(self, key: str) -> Path:
        """The file of what was logged under a key; W&B adds step and hash to its name."""
        return self.files / self.history[f"{key}/path"][-1]


def log_offline(one: Record, directory: Path, mode: tracking.Mode | None = "offline") -> Offline:
    files = tracking.log(one, PATH, mode, directory)
    assert files is not None
    read = Offline(files, {}, {}, {}, None, [])
    for entry in entries(files):
        for item in entry.history.item:
            read.history.setdefault(item.key or "/".join(item.nested_key), []).append(json.loads(item.value_json))
        for item in entry.summary.update:
            read.summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        if entry.HasField("run"):
            read.run = entry.run
            read.config |= {item.key: json.loads(item.value_json) for item in entry.run.config.update}
        if entry.HasField("artifact"):
            read.artifacts.append(entry.artifact)
    return read


def entries(files: Path) -> list[Any]:
    """All of a run's .wandb file. W&B's service may write its end some milliseconds after the run is finished."""
    from wandb.proto import wandb_internal_pb2

    (log,) = files.parent.glob("*.wandb")
    late = time.monotonic() + 20
    while True:
        found = [wandb_internal_pb2.Record.FromString(data) for data in chunks(log.read_bytes())]  # type: ignore[attr-defined]
        if found and found[-1].HasField("exit"):
            return found
        assert time.monotonic() < late, "the run's file has no end"
        time.sleep(0.02)


def chunks(data: bytes) -> Iterator[bytes]:
    """The entries of a .wandb file: LevelDB's log format (32 KiB blocks; crc, length, kind) after a header of 7 bytes."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for another head: padding
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts, at = parts + data[at + 7 : at + 7 + length], at + 7 + length
        if at > len(data):
            return  # still being written
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_all_that_was_measured_is_read_back_from_an_offline_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one = with_an_undefined_cell()
    read = log_offline(one, tmp_path, None)  # offline is the default without a key
    assert "offline-run" in str(read.files) and capfd.readouterr() == ("", "")

    names = [release.name for release in one.releases]
    for metric, by_stratum in one.matrices.items():
        for stratum, matrix in by_stratum.items():
            bound = one.independent[metric][stratum]
            found = json.loads(read.media(f"matrix/{metric}/{stratum}").read_text())
            assert found["columns"] == ["query release", "gallery release", "t", "k", metric, "independent"]
            assert found["data"] == [
                [names[t], names[k], t, k, matrix[t][k], bound[t][k]] for t in range(len(names)) for k in range(t + 1)
            ]
        assert read.media(f"heatmap/{metric}").read_bytes().startswith(b"\x89PNG")

    for t, release in enumerate(one.releases):
        epochs = release.recipe["epochs"]
        assert read.history[f"release{t}/epoch"] == list(range(1, epochs + 1))
        for term, values in release.losses.items():
            assert read.history[f"release{t}/{term}"] == values

    entry = one.summary[METRIC]["all"]
    for key in ("average_compatibility", "average_multimodel_accuracy"):
        assert read.summary[f"{METRIC}/all/{key}"] == entry[key]
    assert read.summary[f"{METRIC}/all/flips/2,0/negative"] == entry["flips"]["2,0"]["negative"]
    assert read.summary["cost/bytes_per_item/2"] == one.cost.bytes_per_item[2]
    assert read.summary["timing/training_seconds"] == one.timing.training_seconds

    assert (read.run.project, read.run.run_group) == ("compatbench", "digits@1")
    assert read.run.display_name == "BCT seed 0"
    assert read.config["method"]["hyperparameters"] == one.method.hyperparameters
    assert read.config["protocol"]["sha256"] == one.protocol.sha256
    (artifact,) = [a for a in read.artifacts if a.type == "record"]
    contents = {c.path: Path(c.local_path) for c in artifact.manifest.contents}
    assert set(contents) == {"record.json", *one.outputs}
    assert sha256_file(contents["record.json"]) == sha256_file(PATH)


def test_the_same_measurement_is_the_same_run(tmp_path: Path) -> None:
    one = record.load(PATH)
    stronger = one.method.model_copy(update={"hyperparameters": {"weight": 9.0}, "settings": "custom"})
    first, again = log_offline(one, tmp_path / "1"), log_offline(one, tmp_path / "2")
    other = log_offline(one.model_copy(update={"method": stronger}), tmp_path / "3")
    assert first.run.run_id == again.run.run_id != other.run.run_id
    assert first.run.display_name == again.run.display_name != other.run.display_name


def test_a_run_that_is_open_already_stays_the_callers(tmp_path: Path) -> None:
    import wandb

    with wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(silent=True)) as mine:
        read = log_offline(record.load(PATH), tmp_path)
        mine.log({"loss": 1.0})
        assert read.run.run_id != mine.id and wandb.run is mine


@pytest.mark.parametrize("how", ["argument", "WANDB_MODE"])
def test_disabled_writes_nothing(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "WANDB_MODE":
        monkeypatch.setenv("WANDB_MODE", "disabled")
    assert tracking.log(record.load(PATH), PATH, "disabled" if how == "argument" else None, tmp_path) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["argument", "WANDB_MODE", "malformed key"])
def test_online_without_a_key_names_the_way_out(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "WANDB_MODE":
        monkeypatch.setenv("WANDB_MODE", "online")
    if how == "malformed key":
        monkeypatch.setenv("WANDB_API_KEY", "x")
    mode: tracking.Mode | None = None if how == "WANDB_MODE" else "online"
    with pytest.raises(UserError, match=r"wandb login.*--wandb offline"):
        tracking.check(mode)
    with pytest.raises(UserError, match="wandb login"):
        tracking.log(record.load(PATH), PATH, mode, tmp_path)


@pytest.mark.parametrize("how", ["environment", "wandb login", "wandb login --host", "wandb offline"])
def test_online_is_the_default_with_a_key(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb
    from wandb.sdk.lib.urls import DEFAULT_BASE_URL
    from wandb.sdk.lib.wbauth import write_netrc_auth

    host = "https://wandb.example.org" if how == "wandb login --host" else DEFAULT_BASE_URL
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if how == "environment":
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    else:
        write_netrc_auth(host=host, api_key=KEY)
        wandb.teardown()  # it has read its settings by now
    settings = tmp_path / "config" / "settings"
    settings.parent.mkdir()
    settings.write_text(f"[default]\nbase_url = {host}\nmode = {'offline' if how == 'wandb offline' else 'online'}\n")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(settings.parent))
    tracking.check("online")
    assert tracking._default_mode() == ("offline" if how == "wandb offline" else "online")


@pytest.mark.parametrize("error", [OSError("no space\nmore"), TimeoutError()])
def test_a_failing_service_is_a_warning_not_a_loss(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def fail(**_: Any) -> None:
        raise error

    monkeypatch.setattr(wandb, "init", fail)
    with pytest.warns(UserWarning, match=r"not logged \((no space|TimeoutError)\); the record is safe in") as caught:
        assert tracking.log(record.load(PATH), PATH, "offline", tmp_path) is None
    assert len(str(caught[0].message).splitlines()) == 1


def test_a_missing_file_is_a_warning_and_the_run_ends(tmp_path: Path) -> None:
    import wandb

    one = record.load(PATH).model_copy(update={"outputs": {"missing.safetensors": "0"}})
    with pytest.warns(UserWarning, match=r"missing\.safetensors.*the record is safe"):
        assert tracking.log(one, PATH, "offline", tmp_path) is None
    assert wandb.run is None
