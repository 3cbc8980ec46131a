"""What every adapter is: a module with a config, fitted to pairs."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from benchmark.adapters.pairs import Moments, Screen, check_shapes
from benchmark.errors import UserError, unknown


class Adapter(nn.Module):
    """A row-wise map (B, d_s) -> (B, d_t), float32, of vectors of any norm; frozen once fitted."""

    streams: ClassVar[bool] = True  # can be fitted to `Moments`; else only to the pairs themselves

    def __init__(self, source_dim: int, target_dim: int):
        super().__init__()
        if source_dim < 1 or target_dim < 1:
            raise UserError(f"{self.kind}: dims must be positive, got {source_dim} and {target_dim}")
        self.source_dim, self.target_dim = source_dim, target_dim
        self.hyperparameters: dict[str, Any] = {}

    @property
    def kind(self) -> str:
        return type(self).__name__

    @classmethod
    def build(cls, source_dim: int, target_dim: int, **hyperparameters: Any) -> Self:
        """An adapter whose numbers are all zero yet. Refuses hyperparameters that this kind does not have."""
        known = [*inspect.signature(cls).parameters][2:]
        for name in hyperparameters:
            if name not in known:
                raise unknown(f"hyperparameter of {cls.__name__}", name, known or ["none"])
        types = get_type_hints(cls.__init__)
        for name, value in hyperparameters.items():
            if not _is(value, types[name]):
                raise UserError(f"{cls.__name__}: {name} must be {_words(types[name])}, got {value!r}")
        return cls(source_dim, target_dim, **hyperparameters)

    @classmethod
    def needed(cls, source_dim: int, target_dim: int, **hyperparameters: Any) -> int:
        """The least number of pairs that determines the map."""
        raise NotImplementedError

    @classmethod
    def fit(
        cls, source: Tensor | Moments, target: Tensor | None = None, *, seed: int = 0, **hyperparameters: Any
    ) -> Self:
        """The adapter that takes source (N, d_s) nearest to target (N, d_t), row i of both being the same input.

        Args:
            source: the pairs' source vectors; or `Moments` of pairs that were streamed, for kinds that say `streams`.
            target: the pairs' target vectors; None with `Moments`.
            seed: of held-out pairs, batches and clusters; closed forms ignore it.

        Raises:
            UserError: pairs that are refused (see `Screen`), too few of them, hyperparameters unknown or out of range.
        """
        if isinstance(source, Moments):
            if not cls.streams:
                raise UserError(
                    f"{cls.__name__} reads the pairs more than once: give the embeddings instead of Moments"
                )
            adapter = cls.build(source.source_dim, source.target_dim, **hyperparameters)
            pairs: Screen = source
        else:
            if target is None:
                raise UserError("target is missing: give source and target embeddings, or Moments of both")
            check_shapes(source, target)
            adapter = cls.build(source.shape[1], target.shape[1], **hyperparameters)  # refuses before the long pass
            pairs = (Moments if cls.streams else Screen).of(source, target)
        pairs.check(cls.needed(pairs.source_dim, pairs.target_dim, **hyperparameters), cls.__name__)
        with torch.no_grad():
            if isinstance(pairs, Moments):
                adapter._solve(pairs)
            else:
                assert isinstance(source, Tensor) and target is not None
                adapter._learn(source.detach(), target.detach(), seed)
        return adapter.eval().requires_grad_(False)

    def _solve(self, pairs: Moments) -> None:
        raise NotImplementedError

    def _learn(self, source: Tensor, target: Tensor, seed: int) -> None:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.source_dim:
            raise UserError(
                f"{self.kind} maps vectors of {self.source_dim} dims, got {x.shape[-1]}; give embeddings of the model "
                f"that it was fitted on"
            )
        return self._map(x.float())

    def _map(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """Kind, dims and hyperparameters as JSON values; with the state dict all that `rebuild` needs."""
        dims = {"source_dim": self.source_dim, "target_dim": self.target_dim}
        return {"kind": self.kind, **dims, **self.hyperparameters}

    @property
    def parameters_count(self) -> int:
        """Numbers stored."""
        return sum(value.numel() for value in self.state_dict().values())

    @property
    def multiply_adds(self) -> int:
        """Per vector mapped; the additions of a bias are not counted."""
        raise NotImplementedError

    def _require(self, valid: bool, rule: str) -> None:
        if not valid:
            raise UserError(f"{self.kind}: {rule}, got {self.hyperparameters}")

    def _zeros(self, **shapes: tuple[int, ...]) -> None:
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))

    def _store(self, **values: Tensor) -> None:
        for name, value in values.items():
            getattr(self, name).copy_(value)


def _is(value: object, hint: Any) -> bool:
    """Whether a hyperparameter has the type that its signature asks for; an int is a float too, True is no number."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_args(hint):
        return any(_is(value, part) for part in get_args(hint))
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _words(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", type(None): "null", str: "a word"}
    return " or ".join(
        map(str, get_args(hint)) if get_origin(hint) is Literal else (_words(part) for part in get_args(hint))
    ) or names.get(hint, str(hint))
