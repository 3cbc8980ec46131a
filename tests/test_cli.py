"""The command line as its users meet it: good runs, bad input, kill and resume, reproduction of a committed row."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmark import outputs, protocol, record
from benchmark.__main__ import main

ROOT = protocol.LEADERBOARDS.parent
QUICK = [f"releases.{t}.recipe.epochs=2" for t in range(3)]


def arguments(runs: Path, *more: str, method: str = "BCT", quick: bool = True) -> list[str]:
    overrides = [part for override in QUICK if quick for part in ("--override", override)]
    return [
        "run",
        "digits@1",
        "--method",
        method,
        "--runs",
        str(runs),
        "--wandb",
        "disabled",
        "--threads",
        "1",
        *overrides,
        *more,
    ]


def the_record(runs: Path) -> record.Record:
    (path,) = runs.glob("digits@1/*/seed0.json")
    return record.load(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs folder of one unbroken quick run of BCT."""
    runs = tmp_path_factory.mktemp("finished")
    assert main(arguments(runs)) == 0
    return runs


# ------------------------------------------------------------------------------------------------------ good runs


def test_a_run_gives_a_whole_record(finished: Path) -> None:
    made = the_record(finished)
    assert made.method.name == "BCT" and made.protocol.overrides == QUICK  # off-protocol, and it says so
    assert set(made.matrices) == {"cmc@1", "cmc@5", "map"}
    assert set(made.matrices["map"]) == {"all", "old-seen", "new-only", "never-seen"}
    for matrix in made.matrices["cmc@1"].values():
        assert [[value is not None for value in row] for row in matrix] == [
            [k <= t for k in range(3)] for t in range(3)
        ]
    assert [set(release.losses) for release in made.releases[1:]] == [{"classification", "influence"}] * 2
    assert all(len(release.losses["classification"]) == 2 for release in made.releases)
    assert made.queries["all"] == sum(made.queries[s] for s in ("old-seen", "new-only", "never-seen"))


def test_the_record_is_what_its_per_query_outputs_give(finished: Path) -> None:
    made = the_record(finished)
    arrays = outputs.load(next(finished.glob("digits@1/*/seed0.safetensors")))
    for metric, by_stratum in made.matrices.items():
        for stratum, matrix in by_stratum.items():
            again = outputs.matrix(arrays, metric, outputs.strata(arrays)[stratum])
            np.testing.assert_allclose(again, np.array(matrix, dtype=float), atol=1e-6)


def test_the_same_command_gives_the_same_record(finished: Path, tmp_path: Path) -> None:
    assert main(arguments(tmp_path)) == 0
    assert the_record(tmp_path).reproducible() == the_record(finished).reproducible()


def test_side_by_side_gives_the_same_record(finished: Path, tmp_path: Path) -> None:
    assert main(arguments(tmp_path, "--jobs", "2")) == 0
    assert the_record(tmp_path).reproducible() == the_record(finished).reproducible()


def test_a_second_run_trains_nothing(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(finished)) == 0
    assert "0 to train" in capsys.readouterr().out


def test_dry_run_shows_what_two_methods_share(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments(finished, "--dry-run"), "--method", "BCT", "OCA"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "BCT/0 OCA/0" in shown and "cached" in shown and "to do" in shown
    assert not list(finished.glob("digits@1/OCA*"))


def test_help_and_list_import_nothing_heavy() -> None:
    code = (
        "import sys; from benchmark.__main__ import main; main(['list']);"
        "print([m for m in ('torch', 'lightning', 'timm', 'open_clip', 'faiss', 'wandb', 'pyarrow') if m in sys.modules])"
    )
    assert run_python("-c", code).stdout.strip().endswith("[]")


def test_reconstructions_are_marked_in_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list", "methods"])
    shown = capsys.readouterr().out
    for name in ("RQT", "RQT-MCL", "RQT-calibrated", "RQT-MCL-embedding", "XBT", "XBTText"):
        assert f"{name}†" in shown
    assert "BCT†" not in shown and "FCT†" not in shown and "† reconstruction" in shown


@pytest.mark.parametrize("command", ["run", "list", "doctor", "show", "evaluate", "adapt", "audit", "demo"])
def test_every_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert (
        stop.value.code == 0
        and f"compatbench {command}" in " ".join(capsys.readouterr().out.split()).split("Example:")[1]
    )


def test_show_prints_a_record_and_draws_it(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "matrix.png"
    assert main(["show", str(finished / "digits@1"), "--metric", "map", "--png", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    value = the_record(finished).matrices["map"]["all"][0][0]
    assert value is not None and f"{100 * value:.1f}" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- reproducibility


def test_the_committed_digits_row_comes_out_again(tmp_path: Path) -> None:
    """Trained in float64, so that another processor's rounding does not grow into other numbers."""
    committed = record.load(protocol.LEADERBOARDS / "digits@1" / "BCT" / "seed0.json")
    assert main(arguments(tmp_path, quick=False)) == 0
    again = the_record(tmp_path)
    assert again.protocol.sha256 == committed.protocol.sha256 and again.data_fingerprint == committed.data_fingerprint
    for metric, by_stratum in committed.matrices.items():
        for stratum, matrix in by_stratum.items():
            expected, found = (np.array(m, dtype=float) for m in (matrix, again.matrices[metric][stratum]))
            np.testing.assert_allclose(found, expected, atol=1e-4, err_msg=f"{metric} {stratum}")


@pytest.mark.parametrize("moments", [1, 3])
def test_killed_and_started_again_it_ends_with_the_same_record(finished: Path, tmp_path: Path, moments: int) -> None:
    """SIGKILL in the middle of real work, several times; the last run finishes."""
    command = [sys.executable, "-m", "benchmark", *arguments(tmp_path)]
    killed = 0
    for moment in range(moments):
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        before = progress_marks(tmp_path)
        while process.poll() is None and progress_marks(tmp_path) <= before + 2 * moment:
            time.sleep(0.01)
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert killed == moments, "the run ended before it could be killed: the test proves nothing"
    assert main(arguments(tmp_path)) == 0
    assert the_record(tmp_path).reproducible() == the_record(finished).reproducible()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads the children of a process as Linux shows them")
def test_workers_end_with_a_run_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmark", *arguments(tmp_path), "--jobs", "2"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and progress_marks(tmp_path) < 2:
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(children) >= 2, "there were no workers: the test proves nothing"
    deadline = time.monotonic() + 30
    while (alive := [pid for pid in children if runs_still(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive


def runs_still(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def progress_marks(runs: Path) -> int:
    """How far a run is: finished nodes, and checkpoints of the one at work."""
    return len(list(runs.glob("nodes/*/done"))) + len(list(runs.glob("nodes/*/.last.ckpt")))


# --------------------------------------------------------------------------------------------------- bad input


def run_python(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment(**more), capture_output=True, text=True
    )


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "WANDB_MODE": "disabled", **more}


def bad_protocol(folder: Path, **changes: object) -> str:
    import yaml

    data = yaml.safe_load((protocol.LEADERBOARDS / "digits@1" / "protocol.yaml").read_text())
    data.update(changes)
    (folder / "bad.yaml").write_text(yaml.safe_dump(data))
    return str(folder / "bad.yaml")


def arrays(folder: Path, **named: np.ndarray) -> dict[str, str]:
    paths = {}
    for name, array in named.items():
        np.save(folder / f"{name}.npy", array)
        paths[name] = str(folder / f"{name}.npy")
    return paths


def evaluate_arguments(
    folder: Path, queries: np.ndarray, gallery: np.ndarray, query_labels: int, gallery_labels: int
) -> list[str]:
    p = arrays(
        folder,
        q=queries.astype(np.float32),
        g=gallery.astype(np.float32),
        ql=np.zeros(query_labels, int),
        gl=np.zeros(gallery_labels, int),
    )
    return [
        "evaluate",
        "--queries",
        p["q"],
        "--gallery",
        p["g"],
        "--query-labels",
        p["ql"],
        "--gallery-labels",
        p["gl"],
    ]


def damaged(runs: Path, tmp: Path, name: str) -> list[str]:
    """A copy of a finished runs folder with one cached file cut short."""
    copy = tmp / "damaged"
    shutil.copytree(runs, copy)
    victim = sorted(copy.glob(f"nodes/*/{name}"))[0]
    victim.write_bytes(victim.read_bytes()[:-20])
    return arguments(copy)


def png_folder(tmp: Path, corrupt: bool = False) -> str:
    from PIL import Image

    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("cat", "dog", "eel"):
            folder = tmp / "images" / part / name
            folder.mkdir(parents=True)
            for i in range(4):
                Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    if corrupt:
        victim = tmp / "images" / "train" / "dog" / "2.png"
        victim.write_bytes(victim.read_bytes()[:40])
    return str(tmp / "images")


IMAGES = {"task": "ImageFolder", "task_args": {"pixels": 8}}
ones, eye = np.ones((4, 8)), np.eye(8)

# what was done wrong -> (arguments from the runs folder of a finished run and an empty folder, words that the line must hold)
CASES = {
    "unknown method": (lambda runs, tmp: arguments(tmp, method="BTC"), ["unknown method 'BTC'", "BCT"]),
    "unknown outside method": (
        lambda runs, tmp: arguments(tmp, method="nowhere.Nothing"),
        ["nowhere.Nothing", "cannot be imported"],
    ),
    "unknown leaderboard": (
        lambda runs, tmp: ["run", "cifar100-light@1", "--method", "BCT"],
        ["cifar100-light@1", "cifar100-lite@1"],
    ),
    "unknown task": (
        lambda runs, tmp: ["run", bad_protocol(tmp, task="Digit"), "--method", "BCT", "--runs", str(tmp)],
        ["unknown task 'Digit'", "Digits"],
    ),
    "typo in the protocol": (
        lambda runs, tmp: ["run", bad_protocol(tmp, seedz=[1]), "--method", "BCT"],
        ["seedz", "seeds"],
    ),
    "wrong type in the protocol": (
        lambda runs, tmp: ["run", bad_protocol(tmp, seeds="many"), "--method", "BCT"],
        ["seeds", "many"],
    ),
    "typo in an override": (
        lambda runs, tmp: arguments(tmp, "--override", "releases.0.recipe.epoch=3"),
        ["epoch", "epochs"],
    ),
    "override of nothing": (lambda runs, tmp: arguments(tmp, "--override", "releases.9.dim=3"), ["releases.9.dim"]),
    "typo in a hyperparameter": (
        lambda runs, tmp: arguments(tmp, "--set", "scal=3"),
        ["hyperparameter", "'scal'", "scale"],
    ),
    "wrong type of a hyperparameter": (lambda runs, tmp: arguments(tmp, "--set", "weight=heavy"), ["weight", "heavy"]),
    "unknown backbone": (
        lambda runs, tmp: arguments(tmp, "--override", "releases.1.backbone=convnext_tiny"),
        ["unknown backbone 'convnext_tiny'", "convnet"],
    ),
    "seed not in the protocol": (lambda runs, tmp: arguments(tmp, "--seed", "77"), ["seed 77", "0, 1, 2"]),
    "wrong class count": (
        lambda runs, tmp: arguments(tmp, "--override", "releases.1.classes=11"),
        ["release 1", "11", "8"],
    ),
    "class that the data lack": (
        lambda runs, tmp: arguments(tmp, "--override", "task_args.classes=['3', x]"),
        ["x"],
    ),
    "missing data": (
        lambda runs, tmp: ["run", "cifar100-lite@1", "--method", "BCT", "--data", str(tmp)],
        ["cifar100", "--data", "train, test and meta"],
    ),
    "short data": (
        lambda runs, tmp: ["run", "cifar100-lite@1", "--method", "BCT", "--data", short_cifar(tmp)],
        ["cifar100", "MD5"],
    ),
    "data other than the frozen ones": (
        lambda runs, tmp: arguments(tmp, "--override", "fingerprint=0123456789abcdef"),
        ["fingerprint", "doctor"],
    ),
    "corrupt image": (
        lambda runs, tmp: [
            *["run", bad_protocol(tmp, **IMAGES, releases=three_channels()), "--method", "BCT"],
            *["--runs", str(tmp), "--data", png_folder(tmp, corrupt=True)],
        ],
        ["dog", "2.png"],
    ),
    "diverging training": (
        lambda runs, tmp: arguments(
            tmp, "--override", "releases.1.recipe.lr=1e300", "--override", "releases.1.recipe.optimizer=sgd"
        ),
        ["release 1", "learning rate"],
    ),
    "damaged weights in the cache": (
        lambda runs, tmp: damaged(runs, tmp, "encoder.safetensors"),
        ["damaged", "encoder.safetensors", "remove"],
    ),
    "damaged scores in the cache": (
        lambda runs, tmp: damaged(runs, tmp, "scores.json"),
        ["damaged", "scores.json", "remove"],
    ),
    "damaged done file": (lambda runs, tmp: damaged(runs, tmp, "done"), ["damaged", "done", "remove"]),
    "runs folder is a file": (lambda runs, tmp: arguments(a_file(tmp)), ["cannot write", "--runs"]),
    "unequal dims": (lambda runs, tmp: evaluate_arguments(tmp, ones, eye[:4, :6], 4, 4), ["8", "6"]),
    "label array of another length": (lambda runs, tmp: evaluate_arguments(tmp, ones, ones, 4, 3), ["label", "3", "4"]),
    "NaN embeddings": (lambda runs, tmp: evaluate_arguments(tmp, ones * np.nan, ones, 4, 4), ["NaN"]),
    "infinite embeddings": (lambda runs, tmp: evaluate_arguments(tmp, ones, ones * np.inf, 4, 4), ["infin"]),
    "record with an unknown field": (lambda runs, tmp: ["show", changed_record(runs, tmp, note="hello")], ["note"]),
    "record of another schema": (
        lambda runs, tmp: ["show", changed_record(runs, tmp, schema_version=9)],
        ["schema version 9"],
    ),
    "show of nothing": (lambda runs, tmp: ["show", "cifar100-lit@1"], ["cifar100-lit@1", "cifar100-lite@1"]),
    "unknown metric": (lambda runs, tmp: ["show", str(runs / "digits@1"), "--metric", "cmc@2"], ["cmc@2", "cmc@1"]),
    "publishing an off-protocol run": (
        lambda runs, tmp: arguments(runs, "--publish"),
        ["cannot be published", "overridden"],
    ),
}


def three_channels() -> list[dict]:
    backbone = {"name": "a", "backbone": "convnet", "backbone_args": {"width": 4, "pools": 1}, "dim": 8}
    return [backbone, {**backbone, "name": "b"}]


def short_cifar(tmp: Path) -> str:
    folder = tmp / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test", "meta"):
        (folder / name).write_bytes(b"short")
    return str(tmp)


def a_file(tmp: Path) -> Path:
    (tmp / "file").write_text("")
    return tmp / "file"


def changed_record(runs: Path, tmp: Path, **changes: object) -> str:
    data = json.loads(next(runs.glob("digits@1/*/seed0.json")).read_text())
    (tmp / "seed0.json").write_text(json.dumps({**data, **changes}))
    return str(tmp / "seed0.json")


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_clear_line(
    case: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, words = CASES[case]
    done = sorted(finished.glob("nodes/*/done"))
    arguments = make(finished, tmp_path)
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("compatbench: ")]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0], lines[0]
    assert sorted(finished.glob("nodes/*/done")) == done, "something already computed was lost"


def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    """A file size limit stands in for a full disk: the write fails in the same place."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from benchmark.__main__ import main; import torch, lightning;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); sys.exit(main(sys.argv[1:]))"
    )
    done = run_python("-c", code, *arguments(tmp_path))
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and "cannot write" in done.stderr


def test_a_foreign_tasks_module_is_named(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "__init__.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from benchmark.__main__ import main; sys.exit(main(['list']))"],
        cwd=tmp_path,
        env=environment(PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and str(tmp_path / "tasks") in done.stderr and "Traceback" not in done.stderr


def test_ctrl_c_says_that_nothing_is_lost(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmark", *arguments(tmp_path)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and progress_marks(tmp_path) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "continues" in errors and "Traceback" not in errors


def test_safetensors_are_evaluated_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"embeddings": np.eye(4, dtype=np.float32), "labels": np.arange(4)}, tmp_path / "q.safetensors")
    path = str(tmp_path / "q.safetensors")
    turned = {"embeddings": np.eye(4, dtype=np.float32)[::-1].copy(), "labels": np.arange(4)[::-1].copy()}
    save_file(turned, tmp_path / "g.safetensors")
    assert main(["evaluate", "--queries", path, "--gallery", str(tmp_path / "g.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cmc@1"] == 1.0
