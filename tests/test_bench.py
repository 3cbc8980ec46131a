"""`make bench` on tiny shapes: the contenders agree with ours, the table and the JSON come out, failures stay rows."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from rich.progress import Progress

from benchmark import bench


@pytest.fixture
def in_threads(monkeypatch):
    """Contenders run here instead of in processes of their own, which take seconds to start."""
    monkeypatch.setattr(bench, "ProcessPoolExecutor", lambda n, context: ThreadPoolExecutor(n))
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")


def test_quick_run_agrees_and_writes_its_figures(in_threads, tmp_path, capsys):
    bench.main(["--quick", "--repeats", "2", "--out", str(tmp_path / "new" / "bench.json")])
    shown, figures = capsys.readouterr().out, json.loads((tmp_path / "new" / "bench.json").read_text())
    assert {"cpu", "cores", "threads", "torch", "load"} <= figures["machine"].keys()
    (shape,) = figures["shapes"]
    rows = {row["contender"]: row for row in shape["rows"] if row["device"] == "cpu"}
    assert rows.keys() == bench.CONTENDERS.keys()
    for name, row in rows.items():
        assert name in shown and "error" not in row
        assert len(row["runs"]) == 2 and row["seconds"] > 0 and row["half_seconds"] > 0 and row["ratio"] > 0
        assert row["difference"] is None if name == "matmul alone" else row["difference"] < 1e-6
    assert rows["ours"]["metrics"].keys() == rows["chunked argsort"]["metrics"].keys() == {"map", "cmc@1", "cmc@5"}
    assert figures["lightning"]["ratio"] > 0 and "median ratio" in shown


def test_a_contender_that_fails_is_a_row_not_the_end(in_threads, monkeypatch):
    def absent(*_):
        raise ModuleNotFoundError("No module named 'rival'\nsecond line")

    monkeypatch.setattr(bench, "CONTENDERS", {"ours": bench.ours, "rival": absent})
    with Progress(disable=True) as progress:
        ours, rival = [r for r in bench.compare(bench.QUICK[0], 1, 1.0, progress) if r["device"] == "cpu"]
    assert rival["error"] == "ModuleNotFoundError: No module named 'rival'" and ours["ratio"] == 1
    assert bench.table(bench.QUICK[0], [ours, rival]).row_count == 2


def test_contenders_run_in_processes_of_their_own(monkeypatch):
    monkeypatch.setattr(bench, "CONTENDERS", {"ours": bench.ours})
    monkeypatch.setattr(bench, "ON_GPU", ())
    with Progress(disable=True) as progress:
        (row,) = bench.compare(bench.QUICK[0]._replace(halved=False), 1, 1.0, progress)
    assert row["difference"] == 0 and row["peak_gb"] < 1
