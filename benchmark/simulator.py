"""The operator's question: what accuracy after how many hours, when to cut over, when to roll back.

A backfill curve says what a share of re-embedded items gives; a plan says how fast that share grows. The encoder re-embeds old
items with what capacity the arrivals leave it. Arrivals are written in the new space: a random addition, whatever the order. So
with f the share of the old items that are done and u the share of all items in the new space, accuracy is
order(f) + random(u) - random(f), order and random being the record's curves. Each seed is a forecast of its own. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from benchmark import curves
from benchmark.curves import Backfill, BackfillRecord
from benchmark.errors import UserError, unknown
from benchmark.protocol import describe
from benchmark.record import Strict

STEPS = 1000  # of the forecast
TIE = 1e-6  # records round curves to six decimals
Z = 1.645 + 0.842  # normal quantiles of 95 %, one-sided, and of 80 % power

Rate = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Release = Annotated[int, Field(strict=True, ge=1)]


class BackfillPlan(Strict):
    """What an operator knows. Releases count from 1, as on a leaderboard's page."""

    record: (
        Path  # a backfill record of the method and protocol nearest to the real system, or a folder of all its seeds
    )
    items: int = Field(strict=True, gt=0)  # in the gallery when the backfill begins
    images_per_second: Rate  # of the new encoder, arrivals included
    arrivals_per_hour: Rate = 0.0  # new items, written in the new space
    dual_write: bool = Field(False, strict=True)  # arrivals are also embedded by the old encoder, at the same cost
    release: Release  # to which the gallery passes
    stored: list[Release] = Field(min_length=1)  # releases that hold the gallery at the start
    order: str = "random"
    metric: str = "cmc@1"
    margin: float = Field(0.0, strict=True, ge=0, lt=0.5, allow_inf_nan=False)  # by which to beat the old system
    max_negative_flips: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)  # share of queries; None = any

    @property
    def spare(self) -> float:
        """Old items re-embedded an hour."""
        return self.images_per_second * 3600 - self.arrivals_per_hour * (1 + self.dual_write)


@dataclass(frozen=True)
class Forecast:
    """Arrays are over the hours (H,), from 0 to the end of the backfill, or by seed, (S, H). Shares are in [0, 1]."""

    plan: BackfillPlan
    records: list[BackfillRecord]  # by seed
    backfills: list[Backfill]  # the one of the plan in each record
    hours: NDArray
    done: NDArray  # share of the old items that are re-embedded
    share: NDArray  # of all items then present that are in the new space
    arrived: NDArray  # items
    accuracy: dict[
        str, NDArray
    ]  # metric -> (S, H) of the mixed gallery; first the plan's metric, then the one beside it
    old: dict[str, NDArray]  # metric -> (S, H) of the old system at that hour
    flips: NDArray  # (S, H) share of queries right by the old system and wrong in the mixed gallery

    def lead(self, metric: str) -> NDArray:
        return self.accuracy[metric] - self.old[metric]

    def broken(self) -> NDArray:
        """(S, H) whether the flips are above the plan's limit."""
        limit = self.plan.max_negative_flips
        return self.flips > (1 if limit is None else limit) + TIE

    def wins(self, metric: str) -> NDArray:
        """(S, H) whether the old system is beaten, by the margin and within the limit of flips; a tie is no win."""
        lead = self.lead(metric)
        return (lead > TIE) & (lead >= self.plan.margin - TIE) & ~self.broken()

    def cutovers(self, metric: str) -> list[float | None]:
        """By seed: the first hour from which the mixed gallery wins until the end; None = it does not win at the end."""
        lost = [np.flatnonzero(~row) for row in self.wins(metric)]
        first = [int(at[-1]) + 1 if len(at) else 0 for at in lost]
        return [float(self.hours[i]) if i < len(self.hours) else None for i in first]

    def cutover(self, metric: str | None = None) -> float | None:
        """The latest over the seeds; None if one of them has none."""
        found = self.cutovers(metric or self.plan.metric)
        known = [hour for hour in found if hour is not None]
        return max(known) if len(known) == len(found) else None

    def spans(self, where: NDArray) -> list[tuple[float, float]]:
        """First and last hour of each run of hours at which `where` (S, H) holds in some seed."""
        edges = np.diff(np.concatenate([[False], where.any(0), [False]]).astype(int))
        starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1) - 1
        return [(float(self.hours[a]), float(self.hours[b])) for a, b in zip(starts, ends)]


def load(path: Path) -> BackfillPlan:
    """Read a plan; its record may be given relative to it.

    Raises:
        UserError: no such file, an unknown or ill-typed field, an encoder that the arrivals alone keep busy.
    """
    try:
        given = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(given, dict):
        raise UserError(f"{path}: not a backfill plan: needs lines such as `items: 1000`")
    for field in given:
        if field not in BackfillPlan.model_fields:
            raise UserError(f"{path}: {unknown('field', str(field), BackfillPlan.model_fields)}")
    try:
        plan = BackfillPlan.model_validate(given)
    except ValidationError as error:
        hint = "; points of a share: one point is 0.01" if error.errors()[0]["loc"] == ("margin",) else ""
        raise UserError(f"{path}: {describe(error)}{hint}") from None
    if plan.spare <= 0:
        twice = ", embedded twice (dual_write)" if plan.dual_write else ""
        raise UserError(
            f"{path}: images_per_second: {plan.images_per_second:g} are {plan.images_per_second * 3600:,.0f} an hour, no more "
            f"than the {plan.arrivals_per_hour:,.0f} arrivals{twice} take: the backfill would never end; add encoders"
        )
    return plan.model_copy(update={"record": path.parent / plan.record, "stored": sorted(plan.stored)})


def _records(path: Path) -> list[BackfillRecord]:
    if not path.exists():
        raise UserError(f"record: {path} does not exist")
    files = sorted(path.glob("backfill-seed*.json")) if path.is_dir() else [path]
    if not files:
        raise UserError(
            f"record: {path} holds no backfill-seed<n>.json; name a method's folder, or run `compatbench backfill`"
        )
    records = [curves.load(file) for file in files]
    kinds: dict[str, Path] = {}
    for file, one in zip(files, records):
        kind = one.protocol.id, one.protocol.sha256, one.protocol.split, one.method.name, one.method.mode
        kinds.setdefault(str((kind, one.method.hyperparameters)), file)
    if len(kinds) > 1:
        (a, b), ids = (
            list(kinds.values())[:2],
            {f: f"{r.method.name} on {r.protocol.id}" for f, r in zip(files, records)},
        )
        raise UserError(
            f"record: {path} holds records of several protocols or methods: {a.name} ({ids[a]}), {b.name} ({ids[b]})"
        )
    return sorted(records, key=lambda one: one.seed)


def _backfill(record: BackfillRecord, plan: BackfillPlan) -> Backfill:
    """The plan's one, which holds all curves that the forecast needs."""
    where = f"{plan.record} (seed {record.seed})"
    found = record.find(plan.release - 1, [k - 1 for k in plan.stored])  # records count from 0
    if found is None:
        held = "; ".join(f"release {b.release + 1}, stored {[k + 1 for k in b.stored]}" for b in record.backfills)
        raise UserError(
            f"release, stored: {where} has no release {plan.release}, stored {plan.stored}; it holds {held}"
        )
    orders = [curve.order for curve in found.curves]
    for name in (plan.order, "random"):
        if name not in orders:
            raise UserError(f"order: {where} has no order '{name}'; it holds {', '.join(orders)}")
    metrics = set(found.old_old).intersection(*(c.metrics for c in found.curves))
    for name in (plan.metric, "map", "cmc@1"):
        if name not in metrics:
            raise UserError(f"metric: {where} has no '{name}'; it holds {', '.join(sorted(metrics))}")
    return found


def forecast(plan: BackfillPlan) -> Forecast:
    """Accuracy by the hour until every old item has been re-embedded.

    Raises:
        UserError: records that do not belong together, or a curve that they do not hold.
    """
    records = _records(plan.record)
    backfills = [_backfill(record, plan) for record in records]
    done = np.linspace(0, 1, STEPS + 1)
    hours = done * plan.items / plan.spare
    arrived = plan.arrivals_per_hour * hours
    share = (plan.items * done + arrived) / (plan.items + arrived)
    known = np.ones_like(hours) if plan.dual_write else plan.items / (plan.items + arrived)  # items of the old system

    def mixed(backfill: Backfill, metric: str | None) -> NDArray:
        by_order = {c.order: c.metrics[metric] if metric else c.negative_flips for c in backfill.curves}
        at = [
            np.interp(x, backfill.shares, by_order[o])
            for x, o in ((done, plan.order), (share, "random"), (done, "random"))
        ]
        return np.clip(at[0] + at[1] - at[2], 0, 1)

    metrics = list(dict.fromkeys([plan.metric, "map", "cmc@1"]))
    return Forecast(
        plan, records, backfills, hours, done, share, arrived,
        accuracy={m: np.stack([mixed(b, m) for b in backfills]) for m in metrics},
        old={m: np.stack([b.old_old[m] * known for b in backfills]) for m in metrics},
        flips=np.stack([mixed(b, None) * known for b in backfills]),  # of an arrival's query the old system has no right answer
    )  # fmt: skip


def probe_queries(lead: float, flips: float) -> int | None:
    """Queries that both systems must answer for a lead to be seen: paired test, 95 % one-sided, power 80 %. None = no lead.

    lead: share of queries right by the new system less that by the old one; flips: share right by the old one only. The
    difference of a query's two answers, in {-1, 0, 1}, has the variance flips + gained - lead^2, with gained = lead + flips.
    """
    if lead <= TIE:
        return None
    return max(1, int(np.ceil(Z**2 * (flips + (lead + flips) - lead**2) / lead**2)))
