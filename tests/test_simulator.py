"""Forecasts of a backfill from made-up records, whose answers are known by hand.

A plan of 144,000 items at 10 images/s takes four hours: an hour for each quarter between the shares of the records.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from benchmark import __main__ as cli
from benchmark import advice, curves, simulator
from benchmark.errors import UserError
from benchmark.protocol import LEADERBOARDS
from tests.records import backfill_record

SHARES = [0, 0.25, 0.5, 0.75, 1]
STEP = 4 / simulator.STEPS + 1e-9  # hours
NONE = [0.0] * 5
RISING = [0.2, 0.4, 0.5, 0.6, 0.7]


def curve(order: str, cmc: Sequence[float], flips: Sequence[float], ap: Sequence[float]) -> curves.Curve:
    return curves.Curve(
        order=order,
        draws=1,
        metrics={"cmc@1": list(cmc), "map": list(ap)},
        negative_flips=list(flips),
        area={},
        area_spread=None,
        fastfill_mean={},
        relative_gain={},
        greatest_fall=0,
        monotone=True,
    )


def record(
    random: Sequence[float],
    seed: int = 0,
    flips: Sequence[float] = NONE,
    own: tuple[Sequence[float], Sequence[float]] | None = None,
    stored: Sequence[int] = (0,),
    name: str = "Ridge",
    protocol: str = "board@1",
    **changes: Any,
) -> curves.BackfillRecord:
    """Old system: cmc@1 0.3, map 0.1; the curve of map is half that of cmc@1. `own`: cmc@1 and flips of that order."""
    made = [curve("random", random, flips, [v / 2 for v in random])]
    made += [curve("own", own[0], own[1], [v / 2 for v in own[0]])] if own else []
    given = {
        "release": max(stored) + 1,
        "stored": list(stored),
        "start": [1 / len(stored)] * len(stored),
        "old_old": {"cmc@1": 0.3, "map": 0.1},
        "new_new": {"cmc@1": random[-1], "map": random[-1] / 2},
        "shares": SHARES,
        "query_encoders": 1,
        "moved": False,
        "curves": made,
        **changes,
    }
    return backfill_record(name, protocol, seed, [curves.Backfill(**given)], gallery=4500)


def write(folder: Path, *records: curves.BackfillRecord, **changes: Any) -> Path:
    for i, one in enumerate(records):
        one.save(folder / "records" / f"backfill-seed{i}.json")
    given = {"record": "records", "items": 144000, "images_per_second": 10, "release": 2, "stored": [1], **changes}
    (folder / "plan.yaml").write_text(json.dumps(given))
    return folder / "plan.yaml"


def forecast(folder: Path, *records: curves.BackfillRecord, **changes: Any) -> simulator.Forecast:
    return simulator.forecast(simulator.load(write(folder, *records, **changes)))


def text(found: simulator.Forecast, width: int = 2000) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(*advice.report(found), sep="\n", highlight=False)
    return captured.get()


# ------------------------------------------------------------------------------------------------------ hours, values


def test_hours_follow_from_capacity_and_arrivals(tmp_path: Path) -> None:
    assert forecast(tmp_path, record(RISING)).hours[-1] == pytest.approx(4)
    busy = forecast(tmp_path, arrivals_per_hour=12000)  # of 36,000
    assert busy.hours[-1] == pytest.approx(6)
    assert busy.share[500] == pytest.approx((72000 + 36000) / (144000 + 36000))
    both = forecast(tmp_path, arrivals_per_hour=12000, dual_write=True)  # two encoders leave 12,000 an hour
    assert both.hours[-1] == pytest.approx(12)
    assert both.share[500] == pytest.approx((72000 + 72000) / (144000 + 72000))


OWN = ([0.2, 0.6, 0.6, 0.7, 0.8], [0.1, 0.2, 0.2, 0.1, 0.1])
RANDOM, FLIPS = [0.2, 0.3, 0.5, 0.6, 0.8], [0.1, 0.1, 0.1, 0.2, 0.1]


def test_arrivals_are_a_random_addition_to_an_order_that_is_not(tmp_path: Path) -> None:
    """After three of six hours half of the old items are done and 0.6 of all are in the new space."""
    found = forecast(tmp_path, record(RANDOM, flips=FLIPS, own=OWN), order="own", arrivals_per_hour=12000)
    assert found.hours[500] == pytest.approx(3)
    assert found.accuracy["cmc@1"][0, 500] == pytest.approx(0.6 + (0.5 + 0.1 * 0.4) - 0.5)
    assert found.accuracy["map"][0, 500] == pytest.approx(0.32)
    assert found.old["cmc@1"][0, 500] == pytest.approx(0.3 * 144 / 180)  # 36,000 arrivals that it does not know
    assert found.flips[0, 500] == pytest.approx((0.2 + (0.1 + 0.1 * 0.4) - 0.1) * 144 / 180)
    assert found.accuracy["cmc@1"][0, [0, -1]] == pytest.approx([0.2, 0.8])
    random = forecast(tmp_path, arrivals_per_hour=12000)
    assert random.accuracy["cmc@1"][0, 500] == pytest.approx(0.54)


def test_with_dual_write_the_old_system_keeps_up(tmp_path: Path) -> None:
    one = record(RANDOM, flips=FLIPS, own=OWN)
    found = forecast(tmp_path, one, order="own", arrivals_per_hour=12000, dual_write=True)
    assert found.accuracy["cmc@1"][0, 500] == pytest.approx(0.6 + (0.5 + 0.1 * 2 / 3) - 0.5)
    assert (found.old["cmc@1"] == 0.3).all()
    assert found.flips[0, 500] == pytest.approx(0.2 + (0.1 + 0.1 * 2 / 3) - 0.1)


def test_values_stay_shares(tmp_path: Path) -> None:
    own = ([0.2, 1, 1, 1, 0.8], [0.1, 0, 0, 0, 0.1])
    one = record(RANDOM, flips=[0.1, 0.1, 0.1, 0, 0.1], own=own)
    found = forecast(tmp_path, one, order="own", arrivals_per_hour=12000)
    assert found.accuracy["cmc@1"][0, 500] == 1 and found.flips[0, 500] == 0


def test_a_mixed_gallery(tmp_path: Path) -> None:
    alone, mixed = record(RISING, stored=[1]), record([0.25, 0.35, 0.4, 0.5, 0.7], stored=[0, 1])
    both = alone.model_copy(update={"backfills": [*alone.backfills, *mixed.backfills]})
    found = forecast(tmp_path, both, release=3, stored=[2, 1])
    assert found.accuracy["cmc@1"][0, 250] == pytest.approx(0.35)
    assert found.cutover() == pytest.approx(0.5, abs=STEP)  # halfway from 0.25 to 0.35
    assert "Gallery of 1 (50 %) and 2 (50 %), queries of 3, random order." in text(found)
    assert forecast(tmp_path, release=3, stored=[2]).accuracy["cmc@1"][0, 250] == pytest.approx(0.4)


# ------------------------------------------------------------------------------------------------------------ cutover


def test_an_early_lead_that_is_lost_again_is_no_cutover(tmp_path: Path) -> None:
    found = forecast(tmp_path, record([0.35, 0.45, 0.25, 0.45, 0.6]))
    assert found.cutover() == pytest.approx(2.25, abs=STEP)
    ((start, end),) = found.spans(found.lead("cmc@1") < 0)
    assert (start, end) == (pytest.approx(1.75, abs=STEP), pytest.approx(2.25, abs=STEP))
    assert "cmc@1 is below the old system from 1.75 to 2.25 hours." in text(found)


def test_the_margin_delays_the_cutover(tmp_path: Path) -> None:
    found = forecast(tmp_path, record(RISING), margin=0.2)
    assert found.cutover() == pytest.approx(2)  # at a lead of exactly the margin
    assert "Cut over after 2.00 hours: from then on cmc@1 is above the old system by 20 points or more." in text(found)
    assert found.cutovers("map") == [pytest.approx(3)]
    assert "By map, asked the same, the cutover is after 3.00 hours." in text(found)


def test_a_tie_is_no_win(tmp_path: Path) -> None:
    found = forecast(tmp_path, record([0.3, 0.3, 0.3, 0.4, 0.5]))
    assert found.cutover() == pytest.approx(2 + STEP, abs=1e-6)  # the first step after the tie
    said = text(found)
    assert "above the old system (a tie is no win)." in said and "is below the old system" not in said
    never = forecast(tmp_path, record([0.2, 0.2, 0.2, 0.3, 0.3]))
    assert never.cutover() is None
    said = text(never)
    assert (
        "A lead in cmc@1 cannot be met: the finished backfill is +0.00 points above the old system. A tie is no win."
        in said
    )
    assert "is at once" not in said and "Cut over" not in said and "roll back below" not in said


def test_queries_broken_in_two_spans(tmp_path: Path) -> None:
    found = forecast(tmp_path, record([0.4] * 4 + [0.6], flips=[0, 0.2, 0, 0.2, 0]), max_negative_flips=0.1)
    assert np.allclose(found.spans(found.broken()), [(0.5, 1.5), (2.5, 3.5)], atol=STEP)
    assert found.cutover() == pytest.approx(3.5, abs=STEP)
    assert "Broken queries are above the limit from 0.50 to 1.50, from 2.50 to 3.50 hours." in text(found)
    free = forecast(tmp_path)
    assert free.cutover() == 0 and "Cut over at once" in text(free) and "limit" not in text(free)


def test_what_cannot_be_met_is_named(tmp_path: Path) -> None:
    flips = [0, 0, 0, 0, 0.08]
    short = text(forecast(tmp_path, record(RISING, flips=flips), margin=0.45, metric="cmc@1"))
    assert "No cutover by cmc@1." in short and "No cutover by map either." in short
    assert (
        "The margin of 45 points cannot be met: the finished backfill is +40.00 points above the old system." in short
    )
    assert "broken queries cannot be met" not in short
    limited = text(forecast(tmp_path, max_negative_flips=0.05))
    assert "The limit of 5 % broken queries cannot be met: the finished backfill breaks 8.00 %." in limited
    assert "margin" not in limited and limited.count("cannot be met") == 1
    for said in (short, limited):
        assert "Without a cutover there is nothing to roll back" in said
        assert "Cut over" not in said and "probe" not in said


def test_every_seed_is_forecast_and_the_latest_cutover_is_advised(tmp_path: Path) -> None:
    early, late = [0.2, 0.3, 0.5, 0.6, 0.7], [0.1, 0.2, 0.2, 0.3, 0.5]
    found = forecast(tmp_path, record(early), record(late, seed=1))
    assert found.cutovers("cmc@1") == [pytest.approx(1, abs=STEP), pytest.approx(3, abs=STEP)]
    assert found.cutover() == max(found.cutovers("cmc@1"))
    said = text(found)
    assert "seeds 0, 1: mean (least–most)" in said and "unknown" not in said
    assert "Cut over after 3.00 hours (the latest of the seeds: 1.00 to 3.00)" in said
    assert "cmc@1 is below the old system (in one seed at least) from 0.00 to 3.00 hours." in said
    assert "35.0 (20.0–50.0)" in said  # after two hours
    alone = forecast(tmp_path, record="records/backfill-seed1.json")
    assert alone.cutover() == pytest.approx(3, abs=STEP) and "seed 1 alone: the spread is unknown" in text(alone)


def test_a_seed_without_a_cutover_leaves_none(tmp_path: Path) -> None:
    found = forecast(tmp_path, record(RISING), record([0.2, 0.3, 0.3, 0.3, 0.31], seed=1), margin=0.05)
    assert found.cutovers("cmc@1")[0] == pytest.approx(0.75, abs=STEP) and found.cutovers("cmc@1")[1] is None
    assert found.cutover() is None
    assert "cannot be met in 1 of 2 seeds: the finished backfill is +20.50 (+1.00 to +40.00) points" in text(found)


# ---------------------------------------------------------------------------------------------------------- roll back


def test_the_size_of_the_probe_set() -> None:
    """By hand: (1.645 + 0.842)^2 = 6.185169 times (0.05 + 0.15 - 0.01) / 0.01 = 19, hence 117.5."""
    assert simulator.probe_queries(0.1, 0.05) == 118
    assert simulator.probe_queries(0.0, 0.05) is None and simulator.probe_queries(-0.1, 0.2) is None
    assert simulator.probe_queries(1.0, 0.0) == 1


def test_a_probe_set_of_that_size_sees_the_lead_four_times_in_five() -> None:
    size = simulator.probe_queries(0.03, 0.05)
    assert size == 888  # 6.185169 * (0.05 + 0.08 - 0.0009) / 0.0009 = 887.2
    draws = np.random.default_rng(0).multinomial(size, [0.05, 0.08, 0.87], size=20000)  # broken, gained, equal
    lead = (draws[:, 1] - draws[:, 0]) / size
    error = np.sqrt(((draws[:, 0] + draws[:, 1]) / size - lead**2) / size)
    assert (lead / error > 1.645).mean() == pytest.approx(0.8, abs=0.015)


def test_when_to_roll_back_and_what_it_costs(tmp_path: Path) -> None:
    one = record([0.2, 0.3, 0.4, 0.4, 0.4], flips=[0.05] * 5)
    found = forecast(tmp_path, one, margin=0.1, max_negative_flips=0.06)
    said = text(found)
    assert found.cutover() == pytest.approx(2)
    assert "at the cutover, 118 probe queries; at the end, 118 probe queries." in said
    assert "or more than 6 % of the queries break" in said and "no embedding: nothing arrives" in said
    rows = {line.split()[0]: line.split() for line in said.splitlines() if line.strip()[:1].isdigit()}
    assert rows["2.00"][-1] == rows["4.00"][-1] == "30.0"  # the old system
    assert rows["1.60"][-1] == "5.0"  # before the cutover the column is empty: the flips are the last
    seeds = text(forecast(tmp_path, one, record([0.2, 0.3, 0.4, 0.4, 0.6], flips=[0.05] * 5, seed=1)))
    # a mean lead of 0.2: 6.185169 * (0.05 + 0.25 - 0.04) / 0.04 = 40.2
    assert "at the end, 41 probe queries (up to 118 by seed)" in seeds


def test_going_back_means_embedding_what_arrived(tmp_path: Path) -> None:
    one = record([0.2, 0.24, 0.24, 0.6, 0.6])
    found = forecast(tmp_path, one, arrivals_per_hour=12000)
    at = int(np.searchsorted(found.hours, found.cutover()))
    said = text(found)
    assert f"{12000 * found.cutover():,.0f} at the cutover, 72,000 at the end." in said and 0 < at < simulator.STEPS
    assert "does not know the arrivals" in said
    rows = [line.split() for line in said.splitlines() if line.startswith("  6.00")]
    assert rows[0][-1] == "20.0"  # 0.3 * 144,000 / 216,000
    both = text(forecast(tmp_path, arrivals_per_hour=12000, dual_write=True))
    assert "the old system has all arrivals" in both and "is taken to cost as much as the new one" in both
    assert "12,000 arrivals an hour, by both encoders" in both and "does not know" not in both


# ------------------------------------------------------------------------------------------------------------- output


def test_the_header_and_what_is_taken_for_granted(tmp_path: Path) -> None:
    said = text(forecast(tmp_path, record(RISING, query_encoders=2, moved=True)))
    assert "Ridge on board@1" in said and "Gallery of 1, queries of 2, random order." in said
    assert "144,000 items, 10 images/s, 0 arrivals an hour: 4.00 hours." in said
    assert "2 query encoders: every query is embedded by so many models" in said
    assert "All stored vectors pass the method's map before hour 0" in said
    assert "cmc@1 30.0 -> 70.0; map 10.0 -> 35.0" in said
    assert "record's gallery holds 4,500 items, the plan's 144,000" in said
    assert "it hides that items not yet re-embedded cannot be found" in said
    plain = text(forecast(tmp_path, record(RISING)))
    assert "One query encoder." in plain and "hour 0;" not in plain


def test_the_plans_metric_comes_first_and_map_is_always_there(tmp_path: Path) -> None:
    found = forecast(tmp_path, record(RISING), metric="map")
    assert list(found.accuracy) == ["map", "cmc@1"]
    assert found.cutover() == found.cutovers("map")[0] == pytest.approx(STEP, abs=1e-6)  # a tie at hour 0
    said = text(found)
    assert (
        "from then on map is above the old system" in said
        and "By cmc@1, asked the same, the cutover is after 0.50 hours." in said
    )
    assert "at the cutover, no number would do: cmc@1 does not lead there" in said


def test_all_fits_a_hundred_columns(tmp_path: Path) -> None:
    records = [record([v + 0.01 * seed for v in RISING], seed=seed, flips=[0.1] * 5) for seed in range(3)]
    found = forecast(tmp_path, *records, items=10**9, arrivals_per_hour=12000)  # three broad columns
    lines = text(found, width=100).splitlines()
    assert max(map(len, lines)) <= 100 and not any("…" in line for line in lines)
    assert any(line.lstrip().startswith("41,667 ") and "71.0 (70.0–72.0)" in line for line in lines)


def test_the_chart(tmp_path: Path) -> None:
    found = forecast(tmp_path, record(RISING), record([0.1, 0.2, 0.3, 0.4, 0.5], seed=1), arrivals_per_hour=12000)
    for axis, metric, end in zip(advice.figure(found).axes, ("cmc@1", "map"), (60, 30), strict=True):
        assert axis.get_ylabel() == f"{metric}, %" and len(axis.collections) == 1  # the band
        lines = {line.get_label(): np.asarray(line.get_ydata()) for line in axis.lines}
        assert lines["while re-embedding"][-1] == pytest.approx(end) == lines["finished backfill"][0]
        assert lines["old system"][-1] == pytest.approx(lines["old system"][0] * 144 / 216)
        (cut,) = (line.get_xdata()[0] for line in axis.lines if line.get_label() == "cutover")
        assert cut == found.cutover(metric)
    alone = advice.figure(forecast(tmp_path, record="records/backfill-seed0.json", margin=0.45)).axes[0]
    assert not alone.collections and alone.get_title() == "no cutover"
    assert "cutover" not in {line.get_label() for line in alone.lines}


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write(tmp_path, record(RISING))
    assert cli.main(["backfill", "--plan", str(path), "--png", str(tmp_path / "chart.png")]) == 0
    assert "Cut over after 0.50 hours" in capsys.readouterr().out
    assert (tmp_path / "chart.png").stat().st_size > 10_000
    assert cli.main(["backfill", "--plan", str(tmp_path / "absent.yaml")]) == 2


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"margin": 1}, r"plan.yaml: margin: .*less than 0.5, got 1; points of a share: one point is 0.01"),
        ({"margin": -0.1}, r"plan.yaml: margin: .*points of a share"),
        ({"margin": float("nan")}, r"plan.yaml: margin: .*points of a share"),
        ({"items": "many"}, r"plan.yaml: items: .*valid integer, got 'many'"),
        ({"items": True}, r"plan.yaml: items: .*valid integer"),
        ({"items": 0}, r"plan.yaml: items: .*greater than 0"),
        ({"release": 0}, r"plan.yaml: release: .*greater than or equal to 1"),
        ({"stored": 1}, r"plan.yaml: stored: .*list"),
        ({"stored": []}, r"plan.yaml: stored: "),
        ({"stored": [0]}, r"plan.yaml: stored.0: .*greater than or equal to 1"),
        ({"max_negative_flips": 5}, r"plan.yaml: max_negative_flips: .*less than or equal to 1"),
        ({"dual_write": "both"}, r"plan.yaml: dual_write: .*boolean"),
        ({"item": 5}, r"plan.yaml: unknown field 'item'; did you mean: items"),
        ({"images_per_second": 0}, r"plan.yaml: images_per_second: 0 are 0 an hour.*never end"),
        ({"arrivals_per_hour": 36000}, r"plan.yaml: images_per_second: 10 are 36,000 an hour.*36,000 arrivals take"),
        ({"arrivals_per_hour": 18000, "dual_write": True}, r"18,000 arrivals, embedded twice \(dual_write\) take"),
        ({"record": "nowhere"}, r"record: .*nowhere does not exist"),
        ({"record": "."}, r"record: .* holds no backfill-seed<n>.json"),
        ({"record": "plan.yaml"}, r"plan.yaml: not a backfill record"),
        ({"release": 3}, r"release, stored: .*records .*no release 3, stored \[1\]; it holds release 2, stored \[1\]"),
        ({"stored": [1, 1]}, r"no release 2, stored \[1, 1\]"),
        ({"order": "mine"}, r"order: .*records .*no order 'mine'; it holds random, own"),
        ({"metric": "recall"}, r"metric: .*records .*no 'recall'; it holds cmc@1, map"),
    ],
)
def test_a_mistake_is_one_line_that_names_file_and_field(tmp_path: Path, changes: dict, expected: str) -> None:
    path = write(tmp_path, record(RISING, own=OWN), **changes)
    with pytest.raises(UserError, match=expected) as caught:
        simulator.forecast(simulator.load(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["record", "items", "images_per_second", "release", "stored"])
def test_a_field_that_has_no_default_must_be_there(tmp_path: Path, field: str) -> None:
    path = write(tmp_path, record(RISING))
    given = json.loads(path.read_text())
    del given[field]
    path.write_text(json.dumps(given))
    with pytest.raises(UserError, match=f"plan.yaml: {field}: field required"):
        simulator.load(path)


@pytest.mark.parametrize(("written", "expected"), [("", "not a backfill plan"), ("items: [", "not YAML")])
def test_a_file_that_is_no_plan(tmp_path: Path, written: str, expected: str) -> None:
    (tmp_path / "plan.yaml").write_text(written)
    with pytest.raises(UserError, match=f"plan.yaml: {expected}"):
        simulator.load(tmp_path / "plan.yaml")
    with pytest.raises(UserError, match=r"absent.yaml: cannot be read"):
        simulator.load(tmp_path / "absent.yaml")


@pytest.mark.parametrize("other", [{"name": "BCT"}, {"protocol": "other@1"}])
def test_records_of_two_kinds_are_refused(tmp_path: Path, other: dict) -> None:
    with pytest.raises(
        UserError, match=r"several protocols or methods: backfill-seed0.json \(Ridge on board@1\), back"
    ):
        forecast(tmp_path, record(RISING), record(RISING, seed=1, **other))


def test_a_record_without_map_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no 'map'; it holds cmc@1"):
        forecast(tmp_path, record(RISING, old_old={"cmc@1": 0.3}))


def test_the_plan_of_the_readme_is_one(tmp_path: Path) -> None:
    root = LEADERBOARDS.parent
    (block,) = re.findall(r"```yaml\n(# plan.yaml.*?)```", (root / "README.md").read_text(), re.DOTALL)
    (tmp_path / "plan.yaml").write_text(block)
    plan = simulator.load(tmp_path / "plan.yaml")
    assert list((root / plan.record.relative_to(tmp_path)).glob("backfill-seed*.json"))
