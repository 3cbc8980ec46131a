"""The backfill record: a metric against the share of the gallery that has been re-embedded. Plain JSON, no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, ValidationError, model_validator

from benchmark import catalog, compatibility
from benchmark.errors import UserError
from benchmark.files import write_json
from benchmark.protocol import describe
from benchmark.record import MethodInfo, Number, ProtocolInfo, Strict, SuiteInfo

SCHEMA_VERSION = 2
EDGES = (0.01, 0.02, 0.98, 0.99)  # shares beside those that areas need: some curves jump at their ends
FALL = 1e-3  # by which a monotone curve may fall

Share = Annotated[float, Field(ge=0, le=1)]


class Curve(Strict):
    """One gallery, one order of re-embedding. Values of random orders are means over their draws."""

    order: str  # random | own | oracle distance | class means
    draws: int
    metrics: dict[str, list[Share]]  # at `Backfill.shares`, over all queries
    negative_flips: list[Share]  # share of queries right by the old system and wrong here, primary metric at rank 1
    area: dict[str, dict[str, Number]]  # metric -> stratum -> trapezoid over the shares
    area_spread: Number | None  # sample standard deviation of the primary metric's area over the draws
    fastfill_mean: dict[str, Number]  # metric -> plain mean of the 22 values at i/21
    relative_gain: dict[str, Number | None]  # metric -> (area - old/old) / (new/new - old/old)
    greatest_fall: Number  # of the primary metric below the best that it was at a lesser share
    monotone: bool  # that is no more than FALL


class Backfill(Strict):
    """All orders of one gallery, whose items were stored by the releases `stored`, on its way to `release`."""

    release: int
    stored: list[int]
    start: list[Share]  # share of the items that each of `stored` holds at the beginning
    old_old: dict[str, Share]  # metric before the update: the same items, by queries of the newest of `stored`
    new_new: dict[str, Share]
    shares: list[Share]
    query_encoders: int  # run per query while the gallery is mixed
    moved: bool  # whether stored items pass a map before the new queries can search them
    curves: list[Curve]

    @model_validator(mode="after")
    def _fits(self) -> Backfill:
        if self.shares[:1] != [0] or self.shares[-1:] != [1] or (np.diff(self.shares) <= 0).any():
            raise ValueError("shares must rise from 0 to 1")
        if len(self.start) != len(self.stored) or abs(sum(self.start) - 1) > 1e-6:
            raise ValueError("start must give each of the stored releases its share")
        for curve in self.curves:
            if {len(v) for v in (*curve.metrics.values(), curve.negative_flips)} != {len(self.shares)}:
                raise ValueError(f"the curve of order '{curve.order}' must have a value at each of the shares")
        return self


class BackfillRecord(Strict):
    """One (protocol, method, seed)."""

    schema_version: int
    protocol: ProtocolInfo
    suite: SuiteInfo
    method: MethodInfo
    seed: int
    data_fingerprint: str
    gallery: int
    primary_metric: str = "cmc@1"
    backfills: list[Backfill]

    def save(self, path: Path) -> Path:
        write_json(path, self.model_dump(mode="json"))
        return path

    @property
    def mark(self) -> str:
        """What tables and charts show behind the method's name."""
        return catalog.mark(self.method.reference)

    def find(self, release: int, stored: list[int]) -> Backfill | None:
        """The backfill of one gallery; None where the method cannot serve it."""
        return next((b for b in self.backfills if b.release == release and b.stored == stored), None)


def load(path: Path) -> BackfillRecord:
    """Read a backfill record, ours or a stranger's.

    Raises:
        UserError: not JSON, an unknown or ill-typed field, another schema version.
    """
    try:
        data = json.loads(path.read_text())
        version = data["schema_version"]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a backfill record; `compatbench backfill` writes them") from None
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema version {version}; this suite reads version {SCHEMA_VERSION}: run `compatbench backfill` again"
        )
    try:
        return BackfillRecord.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{path}: not a backfill record of schema {SCHEMA_VERSION}: {describe(error)}") from None


Gallery = tuple[int, tuple[int, ...]]  # the release that it passes to, the releases that stored its items
Found = dict[tuple[str, str], dict[Gallery, list[tuple[Backfill, Curve]]]]


def galleries(records: Sequence[BackfillRecord]) -> list[Gallery]:
    """All that some record has a curve of: those of one release first, older queries before newer ones."""
    found = {(b.release, tuple(b.stored)) for record in records for b in record.backfills}
    return sorted(found, key=lambda gallery: (len(gallery[1]), *gallery))


def by_order(records: Sequence[BackfillRecord]) -> Found:
    """(method with its mark, order) -> gallery -> the curve of every seed."""
    found: Found = {}
    for record in records:
        for backfill in record.backfills:
            for curve in backfill.curves:
                row = found.setdefault((record.method.name + record.mark, curve.order), {})
                row.setdefault((backfill.release, tuple(backfill.stored)), []).append((backfill, curve))
    return found


def title(gallery: Gallery) -> str:
    """Counted from 1: "1,2→3"."""
    return f"{','.join(str(k + 1) for k in gallery[1])}→{gallery[0] + 1}"


def grid() -> np.ndarray:
    """Shares of the gallery: twentieths, FastFill's twenty-firsts, and EDGES."""
    return np.unique(np.concatenate([np.arange(21) / 20, compatibility.FASTFILL_SHARES, EDGES]))


def summarise(
    order: str, primary: str, values: dict[str, dict[str, np.ndarray]], flips: np.ndarray, ends: dict[str, Any]
) -> Curve:
    """values: metric -> stratum -> (draws, P) on `grid()`; flips: (draws, P); ends: "old_old", "new_new" by metric."""
    shares = grid()
    twentieths = np.isin(shares, np.arange(21) / 20)
    means = {metric: strata["all"].mean(0) for metric, strata in values.items()}
    area = {
        metric: {name: _area(shares[twentieths], v.mean(0)[twentieths]) for name, v in strata.items()}
        for metric, strata in values.items()
    }
    fall = float((np.maximum.accumulate(means[primary]) - means[primary]).max())
    single = [_area(shares[twentieths], draw[twentieths]) for draw in values[primary]["all"]]
    return Curve(
        order=order,
        draws=len(flips),
        metrics={metric: _rounded(v) for metric, v in means.items()},
        negative_flips=_rounded(flips.mean(0)),
        area=area,
        area_spread=float(np.std(single, ddof=1)) if len(single) > 1 else None,
        fastfill_mean={m: compatibility.fastfill_mean(shares, v) or 0.0 for m, v in means.items()},
        relative_gain={
            m: compatibility.relative_backfill_gain(area[m]["all"], ends["old_old"][m], ends["new_new"][m])
            for m in means
        },
        greatest_fall=fall,
        monotone=fall <= FALL,
    )


def _area(shares: np.ndarray, values: np.ndarray) -> float:
    area = compatibility.backfill_area(shares, values)
    assert area is not None
    return area


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(v), 6) for v in values]
