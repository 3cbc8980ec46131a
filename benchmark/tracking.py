"""Weights & Biases: one run per (protocol, method, seed), grouped by protocol. The record on disk stays the source of truth."""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from benchmark import plots
from benchmark.errors import UserError
from benchmark.protocol import digest
from benchmark.record import Record

Mode = Literal["online", "offline", "disabled"]


def check(mode: Mode | None) -> None:
    """Refuse what `log` would refuse; called before hours of training, not after them.

    Raises:
        UserError: online was asked for, here or by WANDB_MODE, and there is no key.
    """
    if (mode or _asked_mode()) == "online" and not _has_key():
        raise UserError(
            "--wandb online finds no valid API key: run `wandb login`, set WANDB_API_KEY, or use --wandb offline"
        )


def log(record: Record, path: Path, mode: Mode | None, directory: Path) -> Path | None:
    """Log the record at `path`; returns the folder of the run's files, None if disabled.

    `mode` None is WANDB_MODE or W&B's own settings, else online with an API key, else offline. The run's id derives from
    what was measured, so that the same command replaces its run instead of adding another. W&B failing never loses a
    result: it is a warning.

    Raises:
        UserError: as `check`.
    """
    check(mode)
    try:
        mode = mode or _asked_mode() or _default_mode()
        return None if mode == "disabled" else _log(record, path, mode, directory)
    except Exception as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        warnings.warn(f"W&B: not logged ({why}); the record is safe in {path}", stacklevel=2)
        return None


def _log(record: Record, path: Path, mode: Mode, directory: Path) -> Path:
    import wandb

    what = [record.protocol.sha256, record.protocol.split, record.method.reference, record.method.hyperparameters]
    name = plots.label(record)
    directory.mkdir(parents=True, exist_ok=True)
    with wandb.init(
        project="compatbench",
        group=record.protocol.id,
        name=f"{name} seed {record.seed}",
        id=digest([*what, record.method.mode, record.seed])[:16],  # `resume` stays unset: a new log replaces the old
        reinit="create_new",  # a run that the caller has open stays theirs
        job_type=record.method.mode,
        tags=[record.method.settings, record.protocol.split, *["off-protocol"] * bool(record.protocol.overrides)],
        config=record.model_dump(
            mode="json", include={"protocol", "suite", "method", "seed", "data_fingerprint", "environment"}
        ),
        mode=mode,
        dir=directory,
        # a network that is gone costs half a minute here and five minutes there, not forever; the files stay for `wandb sync`
        settings=wandb.Settings(
            silent=True,
            console="off",
            x_disable_stats=True,
            init_timeout=30,
            finish_timeout=300,
            finish_timeout_raises=True,
        ),
    ) as run:
        _log_losses(run, record)
        _log_matrices(run, record)
        run.summary.update(dict(_numbers(record)))
        artifact = wandb.Artifact(
            re.sub(r"[^\w.-]+", "-", f"{record.protocol.id}-{name}-seed{record.seed}"), type="record"
        )
        artifact.add_file(str(path), name="record.json")
        for output in record.outputs:
            artifact.add_file(str(path.parent / output), name=output)
        run.log_artifact(artifact)
        return Path(run.dir)


def _log_losses(run: Any, record: Record) -> None:
    """Loss terms against the epoch of their own release."""
    for t, release in enumerate(record.releases):
        run.define_metric(f"release{t}/epoch", hidden=True)
        run.define_metric(f"release{t}/*", step_metric=f"release{t}/epoch")
        for epoch in range(max((len(values) for values in release.losses.values()), default=0)):
            terms = {f"release{t}/{term}": values[epoch] for term, values in release.losses.items()}
            run.log({f"release{t}/epoch": epoch + 1, **terms})


def _log_matrices(run: Any, record: Record) -> None:
    """Every matrix as a table of its cells, null where undefined, and a heat map a metric."""
    import wandb
    from PIL import Image

    names = [release.name for release in record.releases]
    logged: dict[str, Any] = {}
    for metric, by_stratum in record.matrices.items():
        columns: list[str | int] = ["query release", "gallery release", "t", "k", metric, "independent"]
        for stratum, matrix in by_stratum.items():
            bound = record.independent[metric][stratum]
            rows = [
                [names[t], names[k], t, k, matrix[t][k], bound[t][k]] for t in range(len(matrix)) for k in range(t + 1)
            ]
            logged[f"matrix/{metric}/{stratum}"] = wandb.Table(columns=columns, data=rows)
        picture = Image.open(io.BytesIO(plots.png(plots.heatmap(record, metric))))
        logged[f"heatmap/{metric}"] = wandb.Image(picture, caption=f"{plots.label(record)}: {metric}")
    run.log(logged)


def _numbers(record: Record) -> Iterator[tuple[str, float]]:
    """The summaries' scalars and flips, cost and timing under flat names, as the columns of W&B's table of runs."""
    for metric, by_stratum in record.summary.items():
        for stratum, entry in by_stratum.items():
            scalars = {key: value for key, value in entry.items() if not isinstance(value, list)}  # matrices are tables
            yield from _flat(f"{metric}/{stratum}", scalars)
    yield from _flat("cost", record.cost.model_dump())
    yield from _flat("timing", record.timing.model_dump())


def _flat(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(f"{name}/{key}", item)
    elif isinstance(value, list):
        for t, item in enumerate(value):
            yield from _flat(f"{name}/{t}", item)
    elif isinstance(value, int | float):
        yield name, value


def _asked_mode() -> Mode | None:
    """What WANDB_MODE asks for, W&B's older names for it included."""
    modes: dict[str, Mode] = {"dryrun": "offline", "offline": "offline", "disabled": "disabled"}
    modes |= {"online": "online", "run": "online"}
    return modes.get(os.environ.get("WANDB_MODE", ""))


def _default_mode() -> Mode:
    """Offline after `wandb offline` or without a key."""
    import wandb

    return "online" if wandb.setup().settings.mode == "online" and _has_key() else "offline"


def _has_key() -> bool:
    """Whether W&B finds a well-formed key, in the environment or from `wandb login`; looked up without the network."""
    import wandb
    from wandb.errors import AuthenticationError
    from wandb.sdk.lib import wbauth

    host = wandb.setup().settings.base_url  # which host it is depends on the version and on `wandb login --host`
    try:
        known = wbauth.authenticate_session(host=host, source="compatbench", prompt=False, update_session=False)
    except AuthenticationError:
        return False
    return known is not None
