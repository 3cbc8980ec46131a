"""The doctor finds what is wrong with packages, modules, frozen releases and data, and times real steps."""

from __future__ import annotations

import importlib.metadata
import io
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from benchmark import catalog, doctor, protocol, steptime
from benchmark.doctor import Check
from benchmark.files import sha256_file

DIGITS = protocol.LEADERBOARDS / "digits@1" / "protocol.yaml"


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Installed versions to pretend, by package; None = not installed."""
    pretended: dict[str, str | None] = {}
    real = importlib.metadata.version

    def version(name: str) -> str:
        found = pretended[name] if name in pretended else real(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    return pretended


@pytest.fixture
def leaderboards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the digits leaderboard with one frozen old release, seen as the shipped ones."""
    folder = tmp_path / "leaderboards" / "digits@1"
    (folder / "old").mkdir(parents=True)
    (folder / "old" / "seed0.safetensors").write_bytes(b"weights")
    (folder / "old" / "seed0.json").write_text("{}")
    data = yaml.safe_load(DIGITS.read_text())
    data["frozen"] = {0: sha256_file(folder / "old" / "seed0.safetensors")}
    (folder / "protocol.yaml").write_text(yaml.safe_dump(data))
    monkeypatch.setattr(doctor, "LEADERBOARDS", folder.parent)
    monkeypatch.setattr(steptime, "SECONDS", 0.02)
    return folder


def only(checks: list[Check], status: str) -> Check:
    (found,) = [check for check in checks if check.status == status]
    return found


def shown(checks: list[Check]) -> str:
    console = Console(width=100, file=io.StringIO())
    console.print(doctor.render(checks))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_sound_machine_and_protocol(leaderboards: Path) -> None:
    checks = doctor.report([str(leaderboards)], None)
    assert doctor.ok(checks), [check for check in checks if check.status == "wrong"]
    text = "\n".join(check.text for check in checks)
    for word in ("cores usable", "memory", "disk", "Python 3.", "torch ", "lightning ", "1 of 1 frozen", "fingerprint"):
        assert word in text
    assert "training images by release" in text and "release 0 frozen" in text
    second = protocol.load(leaderboards).releases[1].recipe
    assert f"of {second.epochs * (255 // second.batch_size)} steps timed" in text  # it trains on 255 images
    table = shown(checks)
    assert "digits@1" in table and "steps timed" in " ".join(table.split())


def test_a_moment_of_training_tells_the_whole(tmp_path: Path) -> None:
    """Against the same release trained to its end; the factor allows for a busy machine."""
    from benchmark.plan import MethodRun, build
    from benchmark.runner import open_task

    found = protocol.load(DIGITS)
    task = open_task(found, None, "cpu")
    node = build(found, MethodRun.of("Independent"), 0, task.fingerprint).releases[1]
    per_step, timed, steps, share = steptime.time_steps(node, task, seconds=0.1)
    whole, all_timed, _, _ = steptime.time_steps(node, task, seconds=1e9)
    assert all_timed == steps - 2  # all but the two that warm up
    assert timed >= 1  # a step that was really timed
    assert timed < all_timed  # it stopped when the moment was over, not at the end of the training
    assert share == 1  # of each batch
    assert whole / 4 < per_step < whole * 4


def test_large_batches_are_timed_in_part_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmark.plan import MethodRun, build
    from benchmark.runner import open_task

    monkeypatch.setattr(steptime, "PIXELS", 8 * 8 * 8)  # eight digits of a batch of 32
    task = open_task(protocol.load(DIGITS), None, "cpu")
    node = build(task.protocol, MethodRun.of("Independent"), 0, task.fingerprint).releases[1]
    _, _, steps, share = steptime.time_steps(node, task, seconds=0.01)
    assert share == 8 / 32 and steps == task.protocol.releases[1].recipe.epochs * (task.train_size(1) // 32)


def test_large_images_are_timed_on_a_cpu_only_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SMALL", 0)
    monkeypatch.setattr(doctor, "_expected_time", lambda task: "timed")
    assert "not measured" in list(doctor.protocol("digits@1", None, asked=False))[-1].text
    assert list(doctor.protocol("digits@1", None))[-1].text == "timed"


def test_missing_data_are_a_warning_with_the_way_out(tmp_path: Path) -> None:
    checks = list(doctor.protocol("cifar100-lite@1", tmp_path))
    problem = only(checks, "warning")
    assert doctor.ok(checks) and str(tmp_path / "cifar-100-python") in problem.text and "--data" in problem.text
    assert not list(tmp_path.iterdir()), "the doctor must not download"
    assert "6 of 6 frozen" in only(checks, "ok").text


def test_a_users_missing_folder_is_a_warning(tmp_path: Path) -> None:
    example = Path(__file__).parent / "data" / "imagefolder.yaml"
    assert "--data DIR" in only(list(doctor.protocol(str(example), None)), "warning").text
    assert "no folder" in only(list(doctor.protocol(str(example), tmp_path / "none")), "warning").text


def test_other_data_than_the_frozen_are_wrong(leaderboards: Path) -> None:
    change(leaderboards, fingerprint="0123456789abcdef")
    checks = list(doctor.protocol(str(leaderboards), None))
    assert "fingerprint" in only(checks, "wrong").text and not doctor.ok(checks)


def test_short_data_are_wrong(tmp_path: Path) -> None:
    (tmp_path / "cifar-100-python").mkdir()
    for name in ("train", "test", "meta"):
        (tmp_path / "cifar-100-python" / name).write_bytes(b"short")
    assert "MD5" in only(list(doctor.protocol("cifar100-lite@1", tmp_path)), "wrong").text


def change(folder: Path, **changes: Any) -> None:
    data = yaml.safe_load((folder / "protocol.yaml").read_text())
    (folder / "protocol.yaml").write_text(yaml.safe_dump({**data, **changes}))


def test_frozen_releases_are_checked(leaderboards: Path) -> None:
    path = leaderboards / "old" / "seed0.safetensors"
    path.write_bytes(b"other weights")
    wrong = only(list(doctor.protocol(str(leaderboards), None, usable=False)), "wrong")
    assert str(path) in wrong.text and "hash" in wrong.text and "restore" in wrong.remedy
    path.unlink()
    assert "missing" in only(list(doctor.protocol(str(leaderboards), None, usable=False)), "wrong").text


def test_a_network_that_does_not_fit_is_found_before_the_run(leaderboards: Path) -> None:
    releases = yaml.safe_load(DIGITS.read_text())["releases"]
    releases[2]["backbone_args"]["size"] = 16
    change(leaderboards, releases=releases)
    assert "training fails" in only(list(doctor.protocol(str(leaderboards), None)), "wrong").text


def test_an_unknown_protocol_is_wrong() -> None:
    assert "digits@1" in only(list(doctor.protocol("digit@1", None)), "wrong").text


def test_malicious_lightning_is_named_and_never_imported(versions: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    versions["lightning"] = "2.6.3"
    monkeypatch.setattr(doctor.importlib, "import_module", lambda name: pytest.fail(f"imported {name}"))
    checks = doctor.report(["digits@1"], None)
    wrong = only(checks, "wrong")
    assert (
        "lightning 2.6.3" in wrong.text
        and "MALICIOUS" in wrong.text
        and "passwords" in wrong.remedy.replace("password ", "passwords ")
    )
    assert "mend the packages" in checks[-1].remedy  # and nothing of the protocol was run


def test_missing_old_and_replaced_packages(versions: dict) -> None:
    versions.update({"pydantic": None, "timm": "0.9.1", "faiss-gpu": None, "faiss-cpu": "1.9.0"})
    wrong = {check.text: check.remedy for check in doctor.packages() if check.status == "wrong"}
    assert set(wrong) == {"pydantic is not installed", "timm 0.9.1, needed >=1.0"}  # faiss-cpu stands in for faiss-gpu
    assert set(wrong.values()) == {"`make setup`"}


def test_a_foreign_tasks_module_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not list(doctor.modules())
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "__init__.py").write_text("")
    (tmp_path / "leaderboards.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = [check.text for check in doctor.modules()]
    assert len(found) == 2 and str(tmp_path / "tasks") in found[0] and str(tmp_path / "leaderboards.py") in found[1]
    assert all(str(catalog.ROOT) in text for text in found)


def test_torch_and_torchvision_that_are_no_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torchvision.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")\n')
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    wrong = only(list(doctor.libraries()), "wrong")
    assert "torchvision::nms" in wrong.text and "not a pair" in wrong.text and "one index" in wrong.remedy


def test_little_memory_and_disk_are_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    monkeypatch.setattr(doctor, "_memory", lambda: (8 * 2**30, 2**29))
    warnings = [check for check in doctor.machine() if check.status == "warning" and "load" not in check.text]
    assert [check.text.split()[0] for check in warnings] == ["memory", "disk"] and all(c.remedy for c in warnings)
    assert doctor.ok(warnings)


def test_paths_with_brackets_are_shown_as_they_are() -> None:
    assert "[bold]/data[0]" in shown([Check("x", "wrong", "[bold]/data[0]", "see [/red]")])
