"""The tuning rule: same trials everywhere, all recorded and billed, the best one becomes a row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from benchmark import __main__ as cli
from benchmark import catalog, protocol, record, tuning
from benchmark.errors import UserError


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> protocol.Protocol:
    """digits@1 with a validation split, whose logs go elsewhere."""
    folder = tmp_path / "digits@1"
    folder.mkdir()
    data = yaml.safe_load((protocol.LEADERBOARDS / "digits@1" / "protocol.yaml").read_text())
    data["task_args"]["heldout"], data["fingerprint"] = 20, None
    (folder / "protocol.yaml").write_text(yaml.safe_dump(data))
    monkeypatch.setattr(tuning, "LEADERBOARDS", tmp_path)
    return protocol.load(folder)


@pytest.mark.parametrize("name", [n for n in catalog.entries("method") if catalog.method(n)[0].space])
def test_trials_start_from_the_papers_setting_and_stay_within_the_space(name: str) -> None:
    cls, default = catalog.method(name)
    drawn = tuning.settings(name)
    assert drawn[0] == default and drawn == tuning.settings(name)
    assert 1 < len(drawn) <= tuning.TRIALS
    assert len({json.dumps(one, sort_keys=True) for one in drawn}) == len(drawn)
    for one in drawn[1:]:
        assert all(one[key] in cls.space[key] for key in cls.space)
        assert all(one[key] == default[key] for key in default if key not in cls.space)


def test_a_method_without_space_is_refused() -> None:
    with pytest.raises(UserError, match="Independent declares no tuning space"):
        tuning.settings("Independent")


def test_trials_are_short_for_new_releases_only() -> None:
    whole = protocol.load("cifar100-lite@1")
    short = tuning.shortened(whole)
    assert [r.recipe.epochs for r in short.releases] == [10, 5, 6]
    assert short.releases[0] == whole.releases[0]


def test_tune_logs_every_trial_and_the_tuned_row_is_billed(
    board: protocol.Protocol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(tuning, "TRIALS", 2)
    monkeypatch.setattr(tuning, "EPOCHS", 0.1)
    with pytest.raises(UserError, match="compatbench tune digits@1 --method L2"):
        tuning.tuned(board, "L2")
    runs, path = str(tmp_path / "runs"), str(tmp_path / "digits@1")
    assert cli.main(["tune", "digits@1", "--method", "L2", "--runs", runs]) == 2
    assert "no validation split" in capsys.readouterr().err
    assert cli.main(["tune", path, "--method", "L2", "--runs", runs, "--threads", "1"]) == 0
    lines = tuning.trials(board, "L2")
    assert [line["trial"] for line in lines] == [0, 1]
    assert all(line["split"] == "validation" and line["seed"] not in board.seeds for line in lines)
    run = tuning.tuned(board, "L2")
    assert run.hyperparameters == max(lines, key=lambda line: line["am"])["hyperparameters"]
    assert run.tuning_images == sum(line["images"] for line in lines) > 0
    assert "(best)" in capsys.readouterr().out

    command = ["run", path, "--method", "L2", "--tuned", "--runs", runs, "--wandb", "disabled", "--threads", "1"]
    short = [f"releases.{t}.recipe.epochs=1" for t in (1, 2)]
    assert cli.main([*command, *(part for one in short for part in ("--override", one))]) == 0
    found = record.load(next((tmp_path / "runs" / "digits@1").glob("L2-tuned*/seed0.json")))
    assert (found.method.name, found.method.settings) == ("L2-tuned", "tuned")
    assert found.cost.tuning_images == run.tuning_images
    assert cli.main([*command, "--set", "weight=3"]) == 2
