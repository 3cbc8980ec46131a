"""Weights & Biases: one run per (protocol, method, seed), grouped by protocol. The record on disk stays the source of truth."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, Literal

from benchmark import plots
from benchmark.errors import UserError
from benchmark.protocol import digest
from benchmark.record import Record

Mode = Literal["online", "offline", "disabled"]


def log(record: Record, path: Path, mode: Mode | None, directory: Path) -> Path | None:
    """Log the record at `path`; returns the folder of the run's files, None if disabled.

    `mode` None is WANDB_MODE, else online with an API key, else offline. The run's id derives from what was measured, so
    that the same command updates its run instead of adding another. W&B failing never loses a result: it is a warning.

    Raises:
        UserError: online was asked for and there is no key.
    """
    mode = mode or _default_mode()
    if mode == "disabled":
        return None
    if mode == "online" and not _has_key():
        raise UserError("--wandb online needs an API key: run `wandb login`, set WANDB_API_KEY, or use --wandb offline")
    try:
        return _log(record, path, mode, directory)
    except Exception as error:
        warnings.warn(f"W&B: not logged ({str(error).splitlines()[0]}); the record is safe in {path}", stacklevel=2)
        return None


def _log(record: Record, path: Path, mode: Mode, directory: Path) -> Path:
    import wandb

    what = [record.protocol.sha256, record.protocol.split, record.method.reference, record.method.hyperparameters]
    run = wandb.init(
        project="compatbench",
        group=record.protocol.id,
        name=f"{record.method.name} seed {record.seed}",
        id=digest([*what, record.method.mode, record.seed])[:16],
        resume="allow",
        job_type=record.method.mode,
        tags=[record.method.settings, *(["off-protocol"] if record.protocol.overrides else [])],
        config=record.model_dump(
            mode="json", include={"protocol", "suite", "method", "seed", "data_fingerprint", "environment"}
        ),
        mode=mode,
        dir=directory,
        settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
    )
    try:
        _log_losses(run, record)
        tables: dict[str, Any] = {}
        names = [release.name for release in record.releases]
        for metric, by_stratum in record.matrices.items():
            for stratum, matrix in by_stratum.items():
                rows = [
                    [names[t], names[k], t, k, value, record.independent[metric][stratum][t][k]]
                    for t, row in enumerate(matrix)
                    for k, value in enumerate(row[: t + 1])
                ]
                columns: list[str | int] = ["query release", "gallery release", "t", "k", metric, "independent"]
                tables[f"matrix/{metric}/{stratum}"] = wandb.Table(columns=columns, data=rows)
            figure = plots.png(plots.heatmap(record, metric))
            tables[f"heatmap/{metric}"] = wandb.Image(_picture(figure), caption=f"{record.method.name}: {metric}")
        run.log(tables)
        for metric, by_stratum in record.summary.items():
            for stratum, entry in by_stratum.items():
                numbers = {key: value for key, value in entry.items() if isinstance(value, int | float)}
                run.summary.update({f"{metric}/{stratum}/{key}": value for key, value in numbers.items()})
        artifact = wandb.Artifact(
            f"{record.protocol.id}-{record.method.name}-seed{record.seed}".replace("@", "-"), "record"
        )
        artifact.add_file(str(path), name="record.json")
        for output in record.outputs:
            artifact.add_file(str(path.parent / output), name=output)
        run.log_artifact(artifact)
        return Path(run.dir)
    finally:
        run.finish()


def _log_losses(run: Any, record: Record) -> None:
    """Loss terms against the epoch of their own release."""
    for t, release in enumerate(record.releases):
        run.define_metric(f"release{t}/epoch")
        run.define_metric(f"release{t}/*", step_metric=f"release{t}/epoch")
        for epoch in range(max((len(values) for values in release.losses.values()), default=0)):
            terms = {f"release{t}/{term}": values[epoch] for term, values in release.losses.items()}
            run.log({f"release{t}/epoch": epoch + 1, **terms})


def _picture(png: bytes) -> Any:
    import io

    from PIL import Image

    return Image.open(io.BytesIO(png))


def _default_mode() -> Mode:
    asked = os.environ.get("WANDB_MODE", "")
    if asked in ("online", "offline", "disabled"):
        return asked  # type: ignore[return-value]
    return "online" if _has_key() else "offline"


def _has_key() -> bool:
    """A key in the environment or left by `wandb login`; looked up without the network."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc

    try:
        known = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].strip("/")
    return host in known
