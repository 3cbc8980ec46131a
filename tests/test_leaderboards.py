"""What the repository shows is what its records give, and its protocols keep their own rules."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmark import catalog, outputs, protocol, record
from benchmark.errors import UserError
from benchmark.files import sha256_file
from leaderboards import tables

LITE = protocol.LEADERBOARDS / "cifar100-lite@1"
BOARDS = [protocol.LEADERBOARDS / name for name in protocol.shipped()]


@pytest.mark.parametrize("folder", BOARDS, ids=lambda folder: folder.name)
def test_every_record_was_measured_under_the_protocol_beside_it(folder: Path) -> None:
    definition = protocol.load(folder)
    files = [file for file in folder.glob("*/seed*.json") if file.parent.name != "old"]
    assert files or "No row has been measured yet" in definition.notes
    for file in files:
        one = record.load(file)
        assert one.protocol.sha256 == definition.sha256 and not one.protocol.overrides and one.protocol.split == "test"
        tables.checked(file, one)  # recomputes every matrix from the per-query outputs


@pytest.mark.parametrize("folder", BOARDS, ids=lambda folder: folder.name)
def test_the_frozen_old_releases_are_the_protocols(folder: Path) -> None:
    for seed, sha in protocol.load(folder).frozen.items():
        path = folder / "old" / f"seed{seed}.safetensors"
        assert sha256_file(path) == sha and path.stat().st_size < 1_000_000


def test_all_methods_have_all_seeds_and_share_old_releases_and_bounds() -> None:
    definition, found = protocol.load(LITE), tables.rows(LITE)
    assert {row.name for row in found} >= set(catalog.entries("method"))
    for row in found:
        assert [one.seed for one in row.records] == list(definition.seeds)
    for seed in range(len(definition.seeds)):
        own = [
            row for row in found if catalog.load("method", row.records[0].method.reference).trains_first_release
        ]  # they need another release 0
        assert {row.name for row in own} == {"CoReS", "HOC"}
        for group in (own, [row for row in found if row not in own]):
            assert len({row.records[seed].releases[0].weights_sha256 for row in group}) == 1
        assert all(row.records[seed].independent == found[0].records[seed].independent for row in found)


def test_every_step_is_a_real_upgrade() -> None:
    """The rule under which a protocol may be released: lower bounds above 3 points of the primary metric."""
    steps = tables.upgrades(tables.independent_row(LITE, tables.rows(LITE)), protocol.load(LITE).primary_metric)
    assert len(steps) == 3 and all(interval.lower > 0.03 for interval in steps.values())


def test_without_compatibility_cross_cells_are_near_chance() -> None:
    C = tables.independent_row(LITE, tables.rows(LITE)).mean("cmc@1", "all")
    assert (C[np.tril_indices(3, -1)] < 0.025).all()


def test_the_recipe_was_chosen_on_the_validation_split_and_on_seeds_that_are_not_reported() -> None:
    trials = [json.loads(line) for line in (LITE / "trials.jsonl").read_text().splitlines()]
    candidates = yaml.safe_load((LITE / "trials.yaml").read_text())["candidates"]
    assert {trial["candidate"] for trial in trials} == set(candidates) and all(
        t["split"] == "validation" for t in trials
    )
    assert not {trial["seed"] for trial in trials} & set(protocol.load(LITE).seeds)


def test_the_tables_shown_are_up_to_date() -> None:
    found, metric = tables.rows(LITE), protocol.load(LITE).primary_metric
    table = tables.table(LITE, found, metric)
    assert table in (protocol.LEADERBOARDS.parent / "README.md").read_text()
    shown = (LITE / "README.md").read_text()
    for stratum in found[0].records[0].matrices[metric]:
        assert tables.table(LITE, found, metric, stratum) in shown


def test_a_changed_number_is_refused(tmp_path: Path) -> None:
    source = LITE / "BCT" / "seed0.json"
    data = json.loads(source.read_text())
    data["matrices"]["cmc@1"]["all"][1][0] += 0.01
    (tmp_path / "seed0.json").write_text(json.dumps(data))
    (tmp_path / "seed0.safetensors").write_bytes(source.with_suffix(".safetensors").read_bytes())
    with pytest.raises(UserError, match="not what its per-query outputs give"):
        tables.checked(tmp_path / "seed0.json", record.load(tmp_path / "seed0.json"))


def test_ranks_are_within_equal_bytes_and_shared_by_rows_that_cannot_be_told_apart() -> None:
    found = tables.rows(LITE)
    mask = outputs.strata(found[0].outputs[0])["all"]
    by_name = {row.name: row for row in found}
    twin = replace(by_name["BCT"], name="Twin")
    few = replace(by_name["BT2"], name="Few", records=by_name["BT2"].records[:5], outputs=by_name["BT2"].outputs[:5])
    shown = [by_name["BCT"], by_name["Independent"], by_name["BT2"], twin, few]
    ranks = tables.ranks(shown, "cmc@1", mask)
    assert ranks == {"BCT": "1=", "Twin": "1=", "Independent": "3", "BT2": "1", "Few": "indicative"}
