"""What the repository shows is what its records give, and its protocols keep their own rules."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from benchmark import catalog, outputs, protocol, record
from benchmark.bridge import Bridge
from benchmark.errors import UserError
from benchmark.files import sha256_file
from leaderboards import pages, reproduction, tables
from leaderboards.__main__ import boards, texts

LITE = protocol.LEADERBOARDS / "cifar100-lite@1"
STRATA = ("all", "old-seen", "new-only", "never-seen")
BOARDS = [protocol.LEADERBOARDS / name for name in protocol.shipped()]


@pytest.fixture(scope="module")
def lite() -> list[tables.Row]:
    return tables.rows(LITE)


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


def test_all_methods_have_all_seeds_and_share_old_releases_and_bounds(lite: list[tables.Row]) -> None:
    definition, found = protocol.load(LITE), lite
    trained = {n for n in catalog.entries("method") if not issubclass(catalog.load("method", n), Bridge)}
    assert {row.name for row in found} >= trained - {*catalog.PARTS}
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


def test_every_step_is_a_real_upgrade(lite: list[tables.Row]) -> None:
    """The rule under which a protocol may be released: lower bounds above 3 points of the primary metric."""
    steps = tables.upgrades(tables.independent_row(lite), protocol.load(LITE).primary_metric)
    assert len(steps) == 3 and all(interval.lower > 0.03 for interval in steps.values())


def test_without_compatibility_cross_cells_are_near_chance(lite: list[tables.Row]) -> None:
    C = tables.independent_row(lite).mean("cmc@1", "all")
    assert (C[np.tril_indices(3, -1)] < 0.025).all()


def test_the_recipe_was_chosen_on_the_validation_split_and_on_seeds_that_are_not_reported() -> None:
    trials = [json.loads(line) for line in (LITE / "trials.jsonl").read_text().splitlines()]
    candidates = yaml.safe_load((LITE / "trials.yaml").read_text())["candidates"]
    assert {trial["candidate"] for trial in trials} == set(candidates) and all(
        t["split"] == "validation" for t in trials
    )
    assert not {trial["seed"] for trial in trials} & set(protocol.load(LITE).seeds)


@pytest.mark.parametrize("folder", boards(), ids=lambda folder: folder.name)
def test_the_pages_shown_are_up_to_date(folder: Path, lite: list[tables.Row]) -> None:
    found = lite if folder == LITE else tables.rows(folder)
    for path, text in texts(folder, found):
        assert path.read_text() == text, f"{path} is stale: make leaderboards"


def test_the_reproduction_page_is_up_to_date() -> None:
    assert reproduction.PAGE.read_text() == reproduction.render(reproduction.load()), "stale: make leaderboards"


def test_a_changed_number_is_refused(tmp_path: Path) -> None:
    source = LITE / "BCT" / "seed0.json"
    data = json.loads(source.read_text())
    data["matrices"]["cmc@1"]["all"][1][0] += 0.01
    (tmp_path / "seed0.json").write_text(json.dumps(data))
    (tmp_path / "seed0.safetensors").write_bytes(source.with_suffix(".safetensors").read_bytes())
    with pytest.raises(UserError, match="not what its per-query outputs give"):
        tables.checked(tmp_path / "seed0.json", record.load(tmp_path / "seed0.json"))


def test_ranks_are_within_equal_bytes_and_shared_by_rows_that_cannot_be_told_apart(lite: list[tables.Row]) -> None:
    mask = outputs.strata(lite[0].outputs[0])["all"]
    by_name = {row.name: row for row in lite}
    twin = replace(by_name["BCT"], name="Twin")
    few = replace(by_name["BT2"].only([0, 1, 2, 3, 4]), name="Few")
    shown = [by_name["BCT"], by_name["Independent"], by_name["BT2"], twin, few]
    ranks = tables.ranks(shown, ["cmc@1"], mask)["cmc@1"]
    assert ranks == {"BCT": "1=", "Twin": "1=", "Independent": "3", "BT2": "1", "Few": "indicative"}


# ----------------------------------------------------------------- intervals, oracles and cost, again from the raw files


def hits(method: str, t: int, k: int) -> np.ndarray:
    """(seeds, queries) of cmc@1, read without the suite."""
    files = sorted((LITE / method).glob("seed*.safetensors"))
    return np.stack([(load_file(file)[f"first/{t}/{k}"] == 1).astype(float) for file in files])


def naive_bootstrap(values: np.ndarray, labels: np.ndarray, seed: int, resamples: int = 400) -> np.ndarray:
    """Draw seeds, then classes, then in each class as many queries as it has; the mean of all that is drawn."""
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    means = []
    for _ in range(resamples):
        drawn = [members[i] for i in rng.integers(len(members), size=len(members))]
        queries = np.concatenate([rng.choice(group, size=len(group)) for group in drawn])
        means.append(np.mean([values[s, queries].mean() for s in rng.integers(len(values), size=len(values))]))
    return np.array(means)


def shown(stratum: str) -> dict[str, dict[str, str]]:
    """method -> column -> cell of the stratum's table of cmc@1 in the committed page."""
    section = (LITE / "README.md").read_text().partition(f"## cmc@1, queries: {stratum} (")[2].partition("\n## ")[0]
    table = [[c.strip() for c in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    # one head a kind of row
    return {line[0].removesuffix("†"): dict(zip(table[0], line)) for line in table if line[0] not in ("method", "---")}


@pytest.mark.parametrize("stratum", ["all", "never-seen"])
def test_an_interval_and_an_oracle_are_what_the_raw_files_give(stratum: str) -> None:
    raw = load_file(LITE / "BT2" / "seed0.safetensors")
    mask = raw[f"mask/{stratum}"].astype(bool)
    labels = raw["labels"][mask]
    am = np.mean([hits("BT2", t, k)[:, mask] for t in range(3) for k in range(t + 1)], 0)
    lower, upper = np.quantile(naive_bootstrap(am, labels, seed=1), [0.025, 0.975])
    mean, half = map(float, shown(stratum)["BT2"]["AM"].split(" ± "))
    assert abs(mean - 100 * am.mean()) < 0.051
    assert abs(half - 50 * (upper - lower)) < 0.15 * half  # 400 resamples
    queries_alone = 100 * 1.96 * am.mean(0).std() / len(labels) ** 0.5
    assert half > 1.5 * queries_alone  # seeds and classes are in it
    for method in ("BT2", "CoReS"):
        for t in range(3):
            oracle = 100 * hits("Independent", t, t)[:, mask].mean()
            assert abs(float(shown(stratum)[method][f"oracle {t + 1}/{t + 1}"]) - oracle) < 0.051


def test_the_intervals_of_drop_and_flips_are_paired(lite: list[tables.Row]) -> None:
    found = [row for row in lite if row.name in ("Independent", "Triplet")]
    (line,) = (line for line in tables.lines(found, ["cmc@1"], "all")["cmc@1"] if line.row.name == "Triplet")
    labels = load_file(LITE / "Triplet" / "seed0.safetensors")["labels"]
    drop = np.mean([hits("Triplet", t, t) - hits("Independent", t, t) for t in (1, 2)], 0)
    lost = np.mean([hits("Triplet", k, k) > hits("Triplet", t, k) for t, k in [(1, 0), (2, 0), (2, 1)]], 0)
    for ours, values in ((line.drop, drop), (line.flips, lost)):
        assert ours and abs(ours.mean - values.mean()) < 1e-6
        naive = np.quantile(naive_bootstrap(values, labels, seed=1), [0.025, 0.975])
        assert np.allclose([ours.lower, ours.upper], naive, atol=0.15 * (ours.upper - ours.lower))
    own = line.cells[2, 2]
    assert line.drop and line.drop.upper - line.drop.lower < 0.5 * (own.upper - own.lower)


def test_in_pairwise_mode_the_old_release_is_the_independent_one(lite: list[tables.Row]) -> None:
    by_name = {row.name: row for row in lite}
    chain = by_name["L2"]
    records = [
        one.model_copy(update={"method": one.method.model_copy(update={"mode": "pairwise"})}) for one in chain.records
    ]
    found = [by_name["Independent"], chain, replace(chain, name="pairwise", records=records)]
    made = {line.row.name: line for line in tables.lines(found, ["cmc@1"], "all")["cmc@1"]}
    old = {k: hits("Independent", k, k).mean() for k in range(3)}
    cells = {(t, k): hits("L2", t, k).mean() for t in range(3) for k in range(t)}
    assert made["pairwise"].ac == sum(value > old[k] for (_, k), value in cells.items()) / 3 == 0
    assert made["L2"].ac == 1 / 3  # 3→2 above its own, spoiled 2/2
    gains = [(value - old[k]) / (old[t] - old[k]) for (t, k), value in cells.items()]
    gain = made["pairwise"].gain
    assert gain and abs(gain.mean - np.mean(gains)) < 1e-6 and gain.lower < gain.mean < gain.upper


def test_the_cost_table_bills_what_the_records_say(lite: list[tables.Row]) -> None:
    table = [[c.strip() for c in line.strip("|").split("|")] for line in pages.cost(lite).splitlines()]
    rows = {line[0].removesuffix("†"): dict(zip(table[0], line)) for line in table[2:] if len(line) > 1}
    assert rows.keys() == {row.name for row in lite}
    raw, bound = (json.loads((LITE / name / "seed0.json").read_text())["cost"] for name in ("BT2", "Independent"))
    assert rows["BT2"]["bytes/item by release"] == "256 / 384 / 512"
    assert rows["BT2"]["teacher forwards"] == f"{raw['teacher_forwards'] / 1e6:.2f} M"
    extra = raw["released_parameters"][2] - bound["released_parameters"][2]
    assert rows["BT2"]["released"] == f"{extra:+,}" and extra > 0
    assert rows["MixBCT-tuned"]["in trials"] != "0" == rows["MixBCT"]["in trials"]
    assert rows["BT2"]["multiply-adds/item ingested"] == "–"
    one = next(row for row in lite if row.name == "Procrustes-gallery")
    billed = one.records[0].cost.model_copy(update={"ingest_multiply_adds": [3, 1_000_000, 2_500_000]})
    with_side = replace(one, records=[one.records[0].model_copy(update={"cost": billed})])
    assert "| 2.50 M |" in pages.cost([tables.independent_row(lite), with_side])


def changed(row: tables.Row, name: str, **cost: object) -> tables.Row:
    """The row under another name and with another bill."""
    records = [one.model_copy(update={"cost": one.cost.model_copy(update=cost)}) for one in row.records]
    return replace(row, name=name, records=records)


def test_rows_stand_under_the_heading_of_what_serving_takes(lite: list[tables.Row]) -> None:
    kinds = {row.name: row.kind for row in lite}
    assert {name for name, kind in kinds.items() if kind == tables.FUSED} == {
        row.name for row in lite if row.records[0].cost.query_encoders == 2
    }
    assert {kinds[name] for name in ("SLERP", "NLERP", "AdaptiveNLERP", "Merge")} == {tables.FUSED}
    assert {kinds[name] for name in ("Ridge", "RQT", "Identity")} == {tables.MAPPED}
    assert {kinds[name] for name in ("Independent", "BCT", "BT2")} == {tables.COMPATIBLE}
    assert kinds["Ridge-gallery"] == tables.MOVED
    order = [tables.KINDS.index(row.kind) for row in tables.in_order(lite, "cmc@1", "all")]
    assert order == sorted(order)


def test_rows_of_one_and_of_two_query_encoders_share_no_rank(lite: list[tables.Row]) -> None:
    mask = outputs.strata(lite[0].outputs[0])["all"]
    by_name = {row.name: row for row in lite}
    twice = changed(by_name["BCT"], "Twice", query_encoders=2)
    found = [by_name["BCT"], by_name["Independent"], twice]
    assert tables.ranks(found, ["cmc@1"], mask)["cmc@1"] == {"BCT": "1", "Independent": "2", "Twice": "1"}
    text = pages.compact(tables.lines(found, ["cmc@1"], "all")["cmc@1"])
    head, _, *body = [[c.strip() for c in x.strip("|").split("|")] for x in text.splitlines() if x[:1] == "|"]
    at = head.index("query encoders")
    assert {line[0]: line[at] for line in body if line[0][0].isupper()} == {
        "BCT": "1",
        "Independent": "1",
        "Twice": "2",
    }
    assert text.count("**") == 4


def test_reconstructions_are_marked_in_every_table(lite: list[tables.Row]) -> None:
    assert {row.name for row in lite if row.shown != row.name} == {row.name for row in lite if row.name[:3] == "RQT"}
    kept = [row for row in lite if row.name in ("Independent", "Ridge", "RQT", "RQT-MCL")]
    made = tables.lines(kept, ["cmc@1"], "all")["cmc@1"]
    for text in (pages.compact(made), pages.accuracy(made), pages.cost(kept)):
        assert "| RQT† |" in text and "| RQT-MCL† |" in text and "| Ridge |" in text
        assert text.endswith("\n\n" + catalog.RECONSTRUCTION)
    plain = [line for line in made if line.row.name[:3] != "RQT"]
    assert "†" not in pages.compact(plain) + pages.accuracy(plain)
    assert {one["method"] for one in csv.DictReader(pages.spreadsheet([("cmc@1", "all", made)]).splitlines())} == {
        row.name for row in kept
    }


def test_every_number_of_the_page_is_in_the_csv() -> None:
    lines = list(csv.DictReader((LITE / "table.csv").open()))
    at = {(x["stratum"], x["method"], x["quantity"]): x for x in lines if x["metric"] == "cmc@1"}
    for stratum in STRATA:
        for method, cells in shown(stratum).items():
            for column in ("AM", "2→1", "3/3"):
                mean, half = cells[column].removesuffix(" ✓").split(" ± ")
                one = at[stratum, method, column]
                assert abs(100 * float(one["value"]) - float(mean)) < 0.0511
                assert abs(50 * (float(one["upper"]) - float(one["lower"])) - float(half)) < 0.0511
            assert at[stratum, method, "rank"]["value"] == cells["rank"]


# -------------------------------------------------------------------------------------------------- rows that lack something


def lacking(row: tables.Row, t: int, k: int) -> tables.Row:
    """The row with an undefined cell."""
    records = []
    for one in row.records:
        data = one.model_dump()
        for by_stratum in data["matrices"].values():
            for matrix in by_stratum.values():
                matrix[t][k] = None
        for by_stratum in data["summary"].values():
            for entry in by_stratum.values():
                entry.get("flips", {}).pop(f"{t},{k}", None)
        records.append(record.Record.model_validate(data))
    kept = [{name: v for name, v in one.items() if not name.endswith(f"/{t}/{k}")} for one in row.outputs]
    return replace(row, records=records, outputs=kept)


def test_a_row_with_an_undefined_cell_is_shown_without_what_needs_it(lite: list[tables.Row]) -> None:
    by_name = {row.name: row for row in lite}
    found = [by_name["Independent"], replace(lacking(by_name["BCT"], 2, 0), name="Partial"), by_name["BCT"]]
    made = {line.row.name: line for line in tables.lines(found, ["cmc@1"], "all")["cmc@1"]}
    partial, whole = made["Partial"], made["BCT"]
    assert (2, 0) not in partial.cells and partial.am is None and partial.gain is None and partial.rank == "–"
    assert partial.cells == {at: one for at, one in whole.cells.items() if at != (2, 0)}
    assert partial.ac == 0 and partial.drop == whole.drop
    text = pages.accuracy(list(made.values()))
    assert len({line.count("|") for line in text.splitlines()}) == 1


def test_rows_of_fewer_seeds_are_paired_with_the_same_seeds_of_independent(lite: list[tables.Row]) -> None:
    by_name = {row.name: row for row in lite}
    few = replace(by_name["BCT"].only([3, 1]), name="Few")
    made = {line.row.name: line for line in tables.lines([by_name["Independent"], few], ["cmc@1"], "all")["cmc@1"]}
    oracle = hits("Independent", 2, 2)[[3, 1]].mean()
    assert abs(made["Few"].oracle[2] - oracle) < 1e-9 and made["Few"].rank == "indicative"
    assert made["Few"].am and made["Few"].am.seeds == 2
    with pytest.raises(UserError, match="Independent has no seed 3"):
        tables.lines([by_name["Independent"].only([0, 1]), few], ["cmc@1"], "all")
