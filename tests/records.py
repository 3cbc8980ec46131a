"""Records made by hand."""

from __future__ import annotations

from benchmark import curves
from benchmark.record import MethodInfo, ProtocolInfo, SuiteInfo


def backfill_record(
    name: str, board: str, seed: int, backfills: list[curves.Backfill], gallery: int
) -> curves.BackfillRecord:
    return curves.BackfillRecord(
        schema_version=curves.SCHEMA_VERSION,
        protocol=ProtocolInfo(id=board, version="1.0", sha256="x", overrides=[], split="test"),
        suite=SuiteInfo(version="0", metrics_version=1, commit=None, dirty=None),
        method=MethodInfo(
            name=name, reference="", hyperparameters={}, settings="paper", source_sha256="", mode="chain"
        ),
        seed=seed,
        data_fingerprint="",
        gallery=gallery,
        backfills=backfills,
    )
