"""The backfill record: a metric against the share of the gallery that has been re-embedded. Plain JSON, no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from benchmark import compatibility
from benchmark.errors import UserError
from benchmark.files import write_json
from benchmark.protocol import describe
from benchmark.record import MethodInfo, Number, ProtocolInfo, Strict, SuiteInfo

SCHEMA_VERSION = 1


class Curve(Strict):
    """One gallery, one order of re-embedding. Values of random orders are means over their draws."""

    order: str  # random | own | oracle distance | class means
    draws: int
    metrics: dict[str, list[Number]]  # at `Backfill.shares`, over all queries
    negative_flips: list[Number]  # share of queries right by the old system and wrong here, primary metric at rank 1
    area: dict[str, dict[str, Number]]  # metric -> stratum -> trapezoid over the shares
    area_spread: Number | None  # sample standard deviation of the primary metric's area over the draws
    fastfill_mean: dict[str, Number]  # metric -> plain mean of the 22 values at i/21
    relative_gain: dict[str, Number | None]  # metric -> (area - old/old) / (new/new - old/old)
    monotone: bool  # the primary metric never falls by more than 0.001 from one share to the next


class Backfill(Strict):
    """All orders of one gallery, whose items were stored by the releases `stored`, on its way to `release`."""

    release: int
    stored: list[int]
    start: list[Number]  # share of the items that each of `stored` holds at the beginning
    old_old: dict[str, Number]  # metric before the update: the first of `stored`, by its own queries
    new_new: dict[str, Number]
    shares: list[Number]
    query_encoders: int  # run per query while the gallery is mixed
    curves: list[Curve]


class BackfillRecord(Strict):
    """One (protocol, method, seed)."""

    schema_version: int
    protocol: ProtocolInfo
    suite: SuiteInfo
    method: MethodInfo
    seed: int
    data_fingerprint: str
    gallery: int
    backfills: list[Backfill]

    def save(self, path: Path) -> Path:
        write_json(path, self.model_dump(mode="json"))
        return path

    def find(self, release: int, stored: list[int]) -> Backfill:
        return next(b for b in self.backfills if b.release == release and b.stored == stored)


def load(path: Path) -> BackfillRecord:
    """Read a backfill record, ours or a stranger's.

    Raises:
        UserError: not JSON, an unknown or ill-typed field, another schema version.
    """
    try:
        record = BackfillRecord.model_validate_json(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except ValidationError as error:
        raise UserError(f"{path}: not a backfill record of schema {SCHEMA_VERSION}: {describe(error)}") from None
    if record.schema_version != SCHEMA_VERSION:
        raise UserError(f"{path}: schema version {record.schema_version}; this suite reads version {SCHEMA_VERSION}")
    return record


def grid() -> np.ndarray:
    """Shares of the gallery: twentieths, and FastFill's twenty-firsts."""
    return np.unique(np.concatenate([np.arange(21) / 20, compatibility.FASTFILL_SHARES]))


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
        monotone=bool((np.diff(means[primary][twentieths]) > -1e-3).all()),
    )


def _area(shares: np.ndarray, values: np.ndarray) -> float:
    area = compatibility.backfill_area(shares, values)
    assert area is not None
    return area


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(v), 6) for v in values]
