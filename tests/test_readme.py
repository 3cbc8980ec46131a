"""What the README tells a newcomer to do is done here."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from benchmark import protocol, record
from benchmark.__main__ import main

README = (protocol.LEADERBOARDS.parent / "README.md").read_text()


def test_the_worked_method_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "class PullToOld" in block)
    (tmp_path / "my_method.py").write_text(code)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (command,) = re.findall(r"^compatbench (run .*--method my_method.PullToOld.*weight=10)$", README, re.MULTILINE)
    fewer = [part for t in range(3) for part in ("--override", f"releases.{t}.recipe.epochs=6")]
    assert main([*command.split(), *fewer, "--threads", "1", "--runs", str(tmp_path), "--wandb", "disabled"]) == 0
    (path,) = tmp_path.glob("digits@1/*/seed0.json")
    made = record.load(path)
    assert made.method.hyperparameters == {"weight": 10} and made.method.settings == "custom"
    assert all(set(release.losses) == {"classification", "pull"} for release in made.releases[1:])
    first, last = made.matrices["cmc@1"]["all"][1], made.independent["cmc@1"]["all"][1]
    assert first[0] is not None and last[0] is not None and first[0] > last[0] + 0.1  # the pull makes it comparable


def test_every_file_that_the_readme_names_exists() -> None:
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)#]+)\)", prose):
        assert (protocol.LEADERBOARDS.parent / link).exists(), link


def test_every_command_of_the_readme_parses() -> None:
    from benchmark.parser import make_parser

    for line in re.findall(r"^compatbench (.*?)(?:  +#.*)?$", README, re.MULTILINE):
        make_parser().parse_args(line.split())
