"""Maps between two embedding spaces, learned from embeddings of the same inputs by both models; no images, no labels.

    adapter = fit("Procrustes", new, old)     # (N, d_s), (N, d_t): row i of both is the same input
    save("adapter.safetensors", adapter)
    query = F.normalize(adapter(new_query))   # meets the untouched gallery of the old model

Query-side use: source = new, target = old; new queries then meet the untouched gallery (backward compatible).
Gallery-side use: source = old, target = new; stored items are moved without their raw data (forward compatible).
Row vectors throughout: y = x W + b. An adapter maps what it is given and normalises nothing, for that belongs to the
protocol: where the score is a cosine, fit on unit rows and normalise the output again. Fits run in float64, from the
pairs' `Moments` where the map has a closed form, so that pairs may be streamed; outputs are float32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from benchmark.adapters.base import Adapter
from benchmark.adapters.learned import LambdaOrthogonal, LocalProcrustes, ResidualMLP
from benchmark.adapters.maps import RHOS, ConstantShift, Diagonal, Identity, LowRank, Procrustes, Ridge
from benchmark.adapters.pairs import Moments, Screen, check_pairs
from benchmark.errors import UserError, unknown
from benchmark.files import write_bytes
from benchmark.fusion import ALPHAS, B0, FUSIONS, GRIDS, S0, adaptive, fuse, nlerp, slerp

__all__ = [
    "KINDS",
    "RHOS",
    "Adapter",
    "Moments",
    "Screen",
    "check_pairs",
    "fit",
    "is_adapter",
    "load",
    "rebuild",
    "save",
]
__all__ += ["ALPHAS", "B0", "FUSIONS", "GRIDS", "S0", "adaptive", "fuse", "nlerp", "slerp"]

KINDS: dict[str, type[Adapter]] = {
    cls.__name__: cls
    for cls in (
        *(Identity, ConstantShift, Diagonal, Procrustes, Ridge, LowRank),
        *(ResidualMLP, LambdaOrthogonal, LocalProcrustes),
    )
}
HEADER = "compatbench.adapter"  # the one key of the file's metadata, so that equal adapters are equal files


def fit(
    kind: str, source: Tensor | Moments, target: Tensor | None = None, *, seed: int = 0, **hyperparameters: Any
) -> Adapter:
    """`Adapter.fit` by the name of the kind."""
    if kind not in KINDS:
        raise unknown("adapter", kind, KINDS)
    return KINDS[kind].fit(source, target, seed=seed, **hyperparameters)


def rebuild(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Adapter:
    """The adapter that had this `config()` and `state_dict()`; it shares no memory with them.

    Raises:
        UserError: an unknown kind, or numbers that are not those of such an adapter.
    """
    fields = dict(config)
    kind = fields.pop("kind", "")
    if kind not in KINDS:
        raise unknown("adapter", str(kind), KINDS)
    for name, value in state_dict.items():
        if value.dtype != torch.float32 or not value.isfinite().all():
            raise UserError(f"{kind}: {name} holds NaN, infinite values or {value.dtype} instead of float32")
    try:
        with torch.device("meta"):  # dims are a file's word: nothing is allocated for them before they are checked
            adapter = KINDS[kind].build(**fields)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{kind}: its config {fields} is not understood ({str(error).splitlines()[0]})") from None
    expected = {name: tuple(value.shape) for name, value in adapter.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in state_dict.items()}
    if given != expected:
        raise UserError(f"{kind}: its config asks for numbers of shapes {expected}, got {given}")
    adapter.load_state_dict({name: value.clone() for name, value in state_dict.items()}, assign=True)
    return adapter.eval().requires_grad_(False)


def save(path: str | Path, adapter: Adapter, notes: Mapping[str, str] | None = None) -> None:
    """One safetensors file, whole or none; its header holds `config` and the notes as JSON."""
    header = {HEADER: json.dumps({"config": adapter.config(), "notes": dict(notes or {})}, sort_keys=True)}
    tensors = {name: value.detach().cpu().contiguous() for name, value in adapter.state_dict().items()}
    write_bytes(Path(path), safetensors.torch.save(tensors, header))


def is_adapter(path: str | Path) -> bool:
    """Whether a file says that it is one; by its header, nothing else is read."""
    try:
        with safe_open(path, "pt") as file:
            return HEADER in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def load(path: str | Path) -> tuple[Adapter, dict[str, str]]:
    """The adapter and the notes that `save` wrote.

    Raises:
        UserError: the file is missing, damaged, or no adapter.
    """
    try:
        with safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get(HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()} if header else {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} is missing or damaged ({str(error).splitlines()[0]}); fit and save the adapter again"
        ) from None
    try:
        stored = json.loads(header or "")
        return rebuild(stored["config"], tensors), {str(k): str(v) for k, v in stored["notes"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = "no adapter in its header" if not header else str(error).splitlines()[0]
        raise UserError(
            f"{path} holds no adapter ({reason}); give a file that `save` of benchmark.adapters wrote"
        ) from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
