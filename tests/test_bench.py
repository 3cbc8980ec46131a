"""`make bench` on tiny shapes: contenders agree, figures and verdicts come out, failures stay rows."""

import ast
import inspect
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from rich.progress import Progress

from benchmark import bench, training


@pytest.fixture
def in_threads(monkeypatch):
    """Contenders run here instead of in processes of their own, which take seconds to start."""
    monkeypatch.setattr(bench, "ProcessPoolExecutor", lambda n, context: ThreadPoolExecutor(n))
    monkeypatch.setattr(bench, "DEVICES", ("cpu",))


def test_quick_run_agrees_and_writes_its_figures(in_threads, tmp_path, capsys):
    bench.main(["--quick", "--repeats", "2", "--out", str(tmp_path / "new" / "bench.json")])
    shown, figures = capsys.readouterr().out, json.loads((tmp_path / "new" / "bench.json").read_text())
    assert figures["quick"] and "no verdict" in shown
    assert {"cpu", "cores", "threads", "torch", "load"} <= figures["machine"].keys()
    whole, sampled = ({row["name"]: row for row in cell["rows"]} for cell in figures["cells"])
    assert whole.keys() == bench.CONTENDERS.keys() - {bench.HALF} and sampled.keys() == bench.CONTENDERS.keys()
    for row in (*whole.values(), *sampled.values()):
        assert "error" not in row and len(row["runs"]) == 2 and row["seconds"] > 0 and row["ratio"] > 0
        assert row["difference"] is None if row["name"] == bench.MATMUL else row["difference"] < 1e-6
    assert whole[bench.OURS]["metrics"].keys() == whole[bench.ARGSORT]["metrics"].keys() == set(bench.METRICS)
    assert whole[bench.OURS]["metrics"] != whole[bench.PML]["metrics"]  # another task: the own item is in the gallery
    assert (sampled[bench.PML]["queries"], sampled[bench.PML]["scale"]) == (20, 10)
    assert (sampled[bench.HALF]["queries"], sampled[bench.HALF]["scale"]) == (100, 1)
    (step,) = figures["training"]
    assert step["ratio"] > 0 and step["weights_differ"] == 0  # both did the same work
    assert len(figures["targets"]) == 9 and all(t["target"].split(":")[0] in shown for t in figures["targets"])


def test_a_contender_that_fails_is_a_row_not_the_end(in_threads, monkeypatch):
    def absent(*_):
        raise ModuleNotFoundError("No module named 'rival'\nsecond line")

    monkeypatch.setattr(bench, "CONTENDERS", {bench.OURS: bench.ours, bench.PML: absent})
    with Progress(disable=True) as progress:
        ours, rival = rows = bench.compare(bench.QUICK[0], 1, 1.0, progress)
    assert rival["error"] == "ModuleNotFoundError: No module named 'rival'" and ours["ratio"] == 1
    assert bench.table(bench.QUICK[0], rows).row_count == 2
    assert not any("PML" in target["target"] for target in bench.judge([rows, []], []))


def test_contenders_run_in_processes_of_their_own(monkeypatch):
    monkeypatch.setattr(bench, "CONTENDERS", {bench.OURS: bench.ours})
    monkeypatch.setattr(bench, "DEVICES", ("cpu",))
    with Progress(disable=True) as progress:
        (row,) = bench.compare(bench.QUICK[0], 1, 1.0, progress)
    assert row["difference"] == 0 and 0 <= row["extra_gb"] < 0.5


def test_verdicts_follow_the_figures():
    def row(name, ratio, extra=0.0):
        figures = {"ratio": ratio, "inverse": 1 / ratio, "extra_gb": extra, "difference": 0.0}
        return {"name": name, "device": "cpu", **figures}

    small = [row(bench.OURS, 1, 0.2), row(bench.PML, 31), row(bench.ARGSORT, 9), row(bench.MATMUL, 0.5)]
    large = [row(bench.OURS, 1, 0.2), row(bench.MATMUL, 0.5), row(bench.HALF, 0.5)]
    verdicts = {t["target"]: t["met"] for t in bench.judge([small, large], [{"device": "cpu", "ratio": 1.06}])}
    assert verdicts == {
        "PML over ours, small cell: at least 30": True,
        "argsort over ours, small cell: at least 10": False,
        "ours over the matmul, small cell: at most 2.5": True,
        "ours over the matmul, large cell: at most 1.5": False,
        "ours over ours with half the queries, large cell: at most 2.1": True,
        "extra GB of ours, small cell: at most 0.15": False,
        "extra GB of ours, large cell (all its scores: 0.5): at most 0.5": True,
        "largest difference to ours: at most 1e-06": True,
        "Lightning over the loop by hand, cpu: at most 1.05": False,
    }


def test_the_trainer_is_set_up_as_in_training(monkeypatch):
    class Stop(Exception):
        pass

    def record(**settings):
        used.update(settings)
        raise Stop

    used: dict = {}
    monkeypatch.setattr("lightning.Trainer", record)
    with pytest.raises(Stop), Progress(disable=True) as progress:
        bench.lightning_overhead("cpu", 2, 1, progress)
    calls = (node for node in ast.walk(ast.parse(inspect.getsource(training))) if isinstance(node, ast.Call))
    (call,) = (node for node in calls if ast.unparse(node.func) == "lightning.Trainer")
    wanted = {keyword.arg: keyword.value for keyword in call.keywords}
    assert used.keys() == wanted.keys()
    for name, value in wanted.items():
        assert not isinstance(value, ast.Constant) or used[name] == value.value, name
