"""The operator's question: what accuracy after how many hours, when to cut over, when to roll back.

A backfill curve says what a share of re-embedded items gives; a plan says how fast that share grows. New items arrive written
in the new space, so that the share rises by itself; the encoder re-embeds old ones with what capacity the arrivals leave it.
No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import Field, ValidationError

from benchmark import curves
from benchmark.errors import UserError
from benchmark.protocol import describe
from benchmark.record import Strict

Positive = Field(gt=0, allow_inf_nan=False)


class BackfillPlan(Strict):
    """What an operator knows. `record` is a backfill record of the method and protocol nearest to the real system."""

    record: Path
    items: int = Field(gt=0)  # in the gallery when the backfill begins
    images_per_second: float = Positive  # of the new encoder, arrivals included
    arrivals_per_hour: float = Field(0.0, ge=0, allow_inf_nan=False)  # new items, written in the new space
    release: int = 1  # of the record: the new one, counted from 0
    stored: list[int] = Field(default_factory=lambda: [0])  # releases that hold the gallery at the start
    order: str = "random"
    metric: str = "cmc@1"
    margin: float = 0.0  # points of the metric, in [0, 1], by which the mixed gallery must beat the old one
    max_negative_flips: float = Field(1.0, ge=0, le=1)  # share of queries that may break before one rolls back


@dataclass(frozen=True)
class Forecast:
    """By hour: arrays of one length."""

    plan: BackfillPlan
    method: str
    hours: np.ndarray  # from 0 to the end of the backfill
    share: np.ndarray  # of all items then present that are in the new space
    accuracy: np.ndarray
    flips: np.ndarray
    old: float  # the system before the update
    new: float  # the finished backfill
    cutover: float | None  # hours until the mixed gallery beats the old one by the margin from then on; None = never
    worst: tuple[float, float]  # (hours, accuracy) at the lowest point


def load(path: Path) -> BackfillPlan:
    """Read a plan; its record may be given relative to it.

    Raises:
        UserError: no such file, an unknown or ill-typed field.
    """
    try:
        plan = BackfillPlan.model_validate(yaml.safe_load(path.read_text()))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {str(error).splitlines()[0]}") from None
    except ValidationError as error:
        raise UserError(f"{path}: not a backfill plan: {describe(error)}") from None
    return plan.model_copy(update={"record": path.parent / plan.record})


def forecast(plan: BackfillPlan) -> Forecast:
    """Accuracy by the hour until every old item has been re-embedded.

    Raises:
        UserError: an encoder that the arrivals alone keep busy, or a curve that the record does not hold.
    """
    record = curves.load(plan.record)
    backfill = next((b for b in record.backfills if (b.release, b.stored) == (plan.release, plan.stored)), None)
    curve = next((c for c in backfill.curves if c.order == plan.order), None) if backfill else None
    if backfill is None or curve is None or plan.metric not in curve.metrics:
        held = "; ".join(
            f"release {b.release} from {b.stored}: {', '.join(c.order for c in b.curves)}" for b in record.backfills
        )
        raise UserError(f"{plan.record} has no such curve of {plan.metric}; it holds {held}")
    spare = plan.images_per_second * 3600 - plan.arrivals_per_hour
    if spare <= 0:
        raise UserError(
            f"{plan.images_per_second:g} images/s are {plan.images_per_second * 3600:g} an hour, no more than the "
            f"{plan.arrivals_per_hour:g} arrivals: the backfill would never end; add encoders"
        )
    end = plan.items / spare
    hours = np.linspace(0, end, 201)
    arrived = plan.arrivals_per_hour * hours
    share = np.clip((spare * hours + arrived) / (plan.items + arrived), 0, 1)
    share[-1] = 1.0
    accuracy, flips = (np.interp(share, backfill.shares, v) for v in (curve.metrics[plan.metric], curve.negative_flips))
    old, new = backfill.old_old[plan.metric], backfill.new_new[plan.metric]
    better = accuracy >= old + plan.margin
    stays = np.flatnonzero(~better)[-1] + 1 if not better.all() else 0  # first hour from which it holds to the end
    low = int(accuracy.argmin())
    cutover = float(hours[stays]) if stays < len(hours) else None
    return Forecast(
        plan, record.method.name, hours, share, accuracy, flips, old, new, cutover, (hours[low], accuracy[low])
    )


def report(found: Forecast) -> list[Any]:
    """A table by the hour and what follows from it, for the terminal."""
    from rich.table import Table

    plan = found.plan
    table = Table("hours", "in the new space", plan.metric, "against the old system", "queries broken")
    for i in np.unique(np.linspace(0, len(found.hours) - 1, 11).astype(int)):
        gain = 100 * (found.accuracy[i] - found.old)
        table.add_row(
            f"{found.hours[i]:.1f}",
            f"{100 * found.share[i]:.0f} %",
            f"{100 * found.accuracy[i]:.1f} %",
            f"{gain:+.1f}",
            f"{100 * found.flips[i]:.1f} %",
        )
    return [table, *advice(found)]


def advice(found: Forecast) -> list[str]:
    plan, end = found.plan, found.hours[-1]
    lines = [f"{found.method}, {plan.order} order: {plan.items:,} items take {end:.1f} hours beside the arrivals."]
    margin = f" by {100 * plan.margin:g} points" if plan.margin else ""
    if found.cutover is None:
        lines.append(f"No cutover: even the finished backfill does not beat the old system{margin}. Do not begin.")
    elif found.cutover == 0:
        lines.append(f"Cut over at once: the mixed gallery beats the old system{margin} from the first query on.")
    else:
        lines.append(
            f"Cut over after {found.cutover:.1f} hours; before that the old system, kept beside it, is better or within the "
            f"margin{margin and ' of' + margin[3:]}."
        )
    broken = np.flatnonzero(found.flips > plan.max_negative_flips)
    if len(broken):
        first, last = found.hours[broken[0]], found.hours[broken[-1]]
        lines.append(
            f"Roll back (or do not switch) between {first:.1f} and {last:.1f} hours: more than "
            f"{100 * plan.max_negative_flips:g} % of the queries would be right by the old system and wrong here."
        )
    lines.append(
        f"Lowest point: {100 * found.worst[1]:.1f} % after {found.worst[0]:.1f} hours (old system {100 * found.old:.1f} %, "
        f"finished {100 * found.new:.1f} %). Roll back if live accuracy falls below it: then the curve does not fit your data."
    )
    lines.append(
        "The curve is that of the record's protocol, not of your data; items are taken as equally likely answers."
    )
    return lines


def chart(found: Forecast, path: Path) -> None:
    """Accuracy against hours, with the old system, the finished backfill and the cutover."""
    from matplotlib.figure import Figure

    from benchmark.plots import save

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axis = figure.subplots()
    axis.plot(found.hours, 100 * found.accuracy, lw=2, label=f"{found.method}, {found.plan.order} order")
    axis.axhline(100 * found.old, color="0.4", ls="--", label="old system")
    axis.axhline(100 * found.new, color="0.4", ls=":", label="finished backfill")
    if found.cutover:
        axis.axvline(found.cutover, color="C3", lw=1, label=f"cutover, {found.cutover:.1f} h")
    axis.set(xlabel="hours", ylabel=f"{found.plan.metric}, %")
    axis.legend()
    axis.grid(alpha=0.3)
    save(figure, path)
