"""The base class of every method. `Method` itself is independent training: no compatibility, the reference of all others.

A method is one file in `benchmark/methods/`. Most override `requires` (what must exist before training) and `loss` (named
terms); those that change the network also override `__init__` and `released`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import lightning
import torch
from torch import Tensor, nn

from benchmark.embeddings import Embeddings, Link, Prefix, View
from benchmark.heads import Head
from benchmark.images import Batch, ImageLoader
from benchmark.protocol import Recipe, Release, derive_seed
from benchmark.towers import TwoSided

OLD = "old"  # the release before: the method's own in a chain, the independent one in pairwise mode
ORACLE = "Independent"  # any method's name may stand where `source` does; this one's is the usual
KEPT = 4 * 2**30  # bytes of a frozen encoder's embeddings that are kept while another release is trained


@dataclass(frozen=True)
class Need:
    """Something that must exist before release t is trained; the plan makes it once and shares it.

    kind: "encoder" (the frozen model), "means" (its class means over the training images of release t, test transforms),
        "embeddings" (its embeddings of the training images of release t, test transforms, keyed by `Batch.index`).
    source: OLD, or the name of the method that trains it.
    side: of a two-sided task: embeddings of the training "image"s or of the distinct training captions ("text").
    release: which release of that method; None = release t (for OLD: always t - 1).
    """

    kind: Literal["encoder", "means", "embeddings"]
    source: str = OLD
    release: int | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    side: str | None = None


class Encoder(nn.Module):
    """A released model: frozen, always in evaluation mode, without its own past.

    That `train()` cannot wake it makes a classic bug impossible: Lightning's `train()` moving the old model's batch norm.
    """

    network: Any  # a module; `TwoSided` in tasks of images and texts

    def __init__(self, network: nn.Module, dim: int, head: Head | None = None):
        super().__init__()
        self.network, self.dim, self.head = network, dim, head
        self.images_seen = 0  # forwards, billed as teacher forwards when another release is trained
        self.views: ImageLoader | None = None
        self.kept: dict[str, Tensor] = {}
        self.images_kept = 0  # forwards that filling `kept` took
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Encoder:
        return super().train(False)

    def keep(self, views: ImageLoader) -> None:
        """Embed all views that training can show when the first is asked for, and from then on look them up by "key".

        The forwards are training's own: its precision, device and batch size. So what is looked up equals what a step would have
        made bit for bit, except where a kernel treats the last rows of a batch in another way than the rest: then to rounding
        (seen on a CPU in float64 with a batch of 50; tests). It is the same in every run, resumed ones too.
        """
        self.views = views

    def __call__(self, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.views is not None and "key" in x:
            self._fill(self.views, x["image"].dtype)
            self.views = None
        if not self.kept or "key" not in x:
            return super().__call__(x)
        return {name: rows[x["key"]] for name, rows in self.kept.items()}

    def _fill(self, views: ImageLoader, dtype: torch.dtype) -> None:
        seen, count = self.images_seen, (views.ways or 0) * len(views.labels)
        parts: list[dict[str, Tensor]] = []
        for batch in views.shown():
            parts.append(super().__call__({**batch.x, "image": batch.x["image"].to(dtype)}))
            size = count * sum(rows[0].nbytes for rows in parts[0].values())
            if size > KEPT:
                warnings.warn(
                    f"embeddings of {count} views take {size / 2**30:.1f} GiB: not kept but made in every step",
                    stacklevel=2,
                )
                break
        else:
            self.kept = {name: torch.cat([part[name] for part in parts])[:count] for name in parts[0]}
        self.images_kept, self.images_seen = self.images_seen - seen, seen

    def forward(self, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if isinstance(self.network, TwoSided):
            self.images_seen += len(x["image"]) if "image" in x else 0
            return self.network(x)  # "image", "text" (B, dim), what x holds of the two
        self.images_seen += len(x["image"])
        return {"main": self.network(x["image"])}  # (B, dim)


@dataclass(frozen=True)
class Context:
    """All that a method may know when it trains release `t`."""

    t: int
    seed: int
    release: Release
    classes: int  # K: labels are 0 .. K - 1
    similarity: str
    backbone: Callable[[int], Any]  # a module by width: methods with extra dims widen it
    head: Callable[[int], Any]  # an `Objective`: a `Head` in image tasks, a `PairHead` in two-sided ones
    prototype_head: Callable[[Tensor], Head]  # the task's head on fixed prototypes (K, D)
    old_dim: int | None = None  # stored by the release before; None at release 0
    k: int | None = None  # the release whose items a `Bridge` leads to; for other methods the release before
    dims: Mapping[str, int] = field(default_factory=dict)  # of every need
    # what `requires` named; empty when a released encoder is only rebuilt for loading
    encoders: Mapping[str, Encoder] = field(default_factory=dict)
    means: Mapping[str, Tensor] = field(default_factory=dict)  # (K, D)
    embeddings: Mapping[str, Embeddings] = field(default_factory=dict)
    loader: Callable[[str], Iterable[Batch]] | None = None  # "train" | "two_views" | "eval"

    def reseed(self, *use: Any) -> None:
        """Make what follows depend on the seed and on this use of randomness alone."""
        torch.manual_seed(derive_seed(self.seed, self.t, *use))


class Method(lightning.LightningModule):
    """Base: trains each release on its own data with the task's loss.

    Class attributes:
        variants: named settings of hyperparameters, run as `--method NAME`.
        space: what the tuning rule may search, hyperparameter -> choices.
        trains_first_release: whether release 0 is already trained by this method (else by independent training).
        two_sided: it is for tasks of images and texts, not for tasks of images alone.
    """

    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    space: ClassVar[Mapping[str, tuple]] = {}
    trains_first_release: ClassVar[bool] = False
    two_sided: ClassVar[bool] = False
    view: ClassVar[str] = "train"
    closed_form: ClassVar[bool] = False  # a `Bridge` that is fitted without Trainer

    def __init__(self, context: Context, *, backbone_width: int | None = None, head_width: int | None = None):
        super().__init__()
        self.context = context
        self.width = backbone_width or context.release.dim  # D
        context.reseed("backbone")
        self.backbone = context.backbone(self.width)
        context.reseed("head")
        self.head = context.head(head_width or self.width)
        context.reseed("method")
        self.history: list[dict[str, float]] = []  # one dict of mean loss terms an epoch
        self.done = 0.0  # share of training behind us, in [0, 1): schedules that hang on it fit any number of epochs

    @classmethod
    def searched(cls, **hyperparameters: Any) -> Mapping[str, tuple]:
        """The part of `space` that has a meaning at these settings."""
        return cls.space

    @classmethod
    def requires(cls, t: int, **hyperparameters: Any) -> Mapping[str, Need]:
        """What training release t needs, by the name under which `Context` hands it over."""
        return {}

    @classmethod
    def stored_dim(cls, release: Release, old_dim: int | None, **hyperparameters: Any) -> int:
        """Numbers stored per item by this release; `old_dim` is what the release before stores."""
        return release.dim

    @classmethod
    def keeps_releases(cls, **hyperparameters: Any) -> bool:
        """Whether every release stays as trained independently, so that only links are learned (see `Bridge`)."""
        return False

    @classmethod
    def steps(cls, t: int, stored: int, **hyperparameters: Any) -> list[tuple[int, int]]:
        """The (release, older release) links that together serve queries of `t` on items of `stored`, newest first."""
        return [(t, stored)]

    @classmethod
    def serves(cls, dim: int, stored: int) -> bool:
        """Whether a link can lead from releases of `dim` numbers to items of `stored` numbers."""
        return dim == stored or cls.link is not Method.link

    @classmethod
    def query_views(cls, t: int, stored: int, **hyperparameters: Any) -> tuple[View, ...]:
        """The embeddings of a query that the link of release t reads to search items stored by release `stored`."""
        return ((t, "main"),)

    @classmethod
    def gallery_views(cls, t: int, stored: int, **hyperparameters: Any) -> tuple[View, ...]:
        """The stored vectors of an item that the link reads. A view other than "main" is by the encoder that `requires`
        names so, and was stored with the item when it was ingested."""
        return ((stored, "main"),)

    def recipe(self, default: Recipe) -> Recipe:
        """The protocol's recipe; a method that must deviate returns another, and the deviation is recorded."""
        return default

    def solve(self) -> None:
        """What takes the place of training where the recipe has no epochs: a closed form on `Context.embeddings`."""

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Named, weighted terms; their sum is minimised."""
        return self.head.terms(self.backbone, batch)

    def released(self) -> Encoder:
        return Encoder(self.backbone, self.width, self.head)

    def link(self) -> Link:
        """How queries of this release meet stored items. Extra dims nest, so their methods return `Prefix`."""
        return Link(self.context.t, self.width)

    def parameter_groups(self) -> list[dict]:
        """For the optimiser; a method may give some parameters their own learning rate (as a multiple, "lr_scale")."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    # ---- training, the same for all methods

    def training_step(self, batch: Batch, index: int) -> Tensor:
        self.done = self.global_step / float(self.trainer.estimated_stepping_batches)
        terms = self.loss(batch)
        # sums on the device, read once an epoch: `self.log` in every step would cost more than a small model's step
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        self._steps += 1
        return torch.stack(list(terms.values())).sum()

    def on_fit_start(self) -> None:
        dtype = next(self.parameters()).dtype  # float64 under "64-true"
        for encoder in self.context.encoders.values():
            encoder.to(self.device, dtype)

    def on_train_epoch_start(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self.context.reseed("epoch", self.current_epoch)  # dropout and the like, the same after a resume

    def on_train_epoch_end(self) -> None:
        self.history.append({name: float(total) / self._steps for name, total in self._sums.items()})

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["history"] = self.history

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.history = checkpoint["history"]

    def configure_optimizers(self) -> Any:
        recipe = self.recipe(self.context.release.recipe)
        groups = self.parameter_groups()
        rates = [recipe.lr * group.pop("lr_scale", 1.0) for group in groups]
        groups = [group | {"lr": rate} for group, rate in zip(groups, rates)]
        options: dict[str, Any] = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
        if recipe.optimizer in ("sgd", "heavyball"):
            options |= {"momentum": recipe.momentum, "nesterov": recipe.optimizer == "sgd" and recipe.momentum > 0}
        kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        optimizer = kinds.get(recipe.optimizer, torch.optim.SGD)(groups, **options)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_share(recipe, step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Widened(Method):
    """Base of methods whose spaces nest: the first dims of a release are comparable with all of the release before.

    The embedding may grow: each release stores `extra_dims` more than the release before (BT2's series of updates:
    128 -> 160 -> 192 dims). The first release stores what the protocol says, as does every one if `extra_dims` is 0;
    unequal dims of two releases then meet on the shorter one's, as in openBCT.
    """

    def __init__(
        self,
        context: Context,
        *,
        extra_dims: int = 0,
        backbone_width: int | None = None,
        head_width: int | None = None,
    ):
        stored = self.stored_dim(context.release, context.old_dim, extra_dims=extra_dims)
        super().__init__(context, backbone_width=backbone_width or stored, head_width=head_width)
        self.stored = stored
        self.shared = min(stored, context.old_dim or stored)  # dims comparable with the old release

    @classmethod
    def stored_dim(cls, release: Release, old_dim: int | None, **hyperparameters: Any) -> int:
        extra = hyperparameters.get("extra_dims", 0)
        return max(release.dim, old_dim) + extra if old_dim and extra else release.dim

    def link(self) -> Link:
        return Prefix(self.context.t, self.stored)


def rate_share(recipe: Recipe, step: int, steps: int) -> float:
    """Share of the peak learning rate at `step` of `steps`: warm-up to 1, then the recipe's way down to 0."""
    warm = recipe.warmup * steps
    if step < warm:
        rising = step / max(warm, 1)
        return (
            0.04 + 0.96 * 0.5 * (1 - math.cos(math.pi * rising))
            if recipe.schedule == "onecycle"
            else (step + 1) / (warm + 1)
        )
    if recipe.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min((step - warm) / max(steps - warm, 1), 1.0)))
