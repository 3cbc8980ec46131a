"""UniBCT (Zhang et al., "Towards universal backward-compatible representation learning", IJCAI 2022).

BCT whose prototypes come from denoised old embeddings: within each class the old embeddings V_o are propagated over an affinity
graph of the new, better ones V_n, and their mean is the prototype. The graph is made anew twice during training.

    A = softmax_rows(V_n V_n^T / tau, diagonal masked),  V^_o = (1 - lambda)(I - lambda A)^{-1} V_o,  p_c = mean of V^_o's rows
    L = L(W z, y) + weight * L(P z, y),  the second term from the first refresh on (10/35 of training; again at 20/35)

Corrected: MixBCT's port takes the softmax over columns. Then 1^T A = 1^T, and the mean of the refined embeddings equals the plain
class mean exactly: the refinement does nothing ("UniBCT-reference"). That code also leaves V_n un-normalised, which makes A
one-hot, and loses the prototypes' unit norm at the first refresh. Adapted: epochs became shares of training; the influence
loss is the task's own head, as in our BCT; learning rates are the protocol's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmark.classwise import members
from benchmark.images import Batch
from benchmark.method import Context, Need, Widened

REFRESH = (10 / 35, 20 / 35)


class UniBCT(Widened):
    """BCT on prototypes refined over the graph of new embeddings.

    Args:
        weight: of the influence loss. Code: 1.
        propagation: lambda, in [0, 1): how far old embeddings are replaced by their neighbours'. Code: 0.9.
        temperature: tau of the affinities. Code: 0.05.
        affinity: normalisation of the graph: "rows" = the formula's; "columns" = the code's, without effect.
    """

    variants: ClassVar = {"UniBCT-reference": {"affinity": "columns"}}
    space: ClassVar = {
        "weight": (0.3, 1.0, 3.0, 10.0),
        "propagation": (0.5, 0.9, 0.99),
        "temperature": (0.02, 0.05, 0.2),
    }

    def __init__(
        self,
        context: Context,
        weight: float = 1.0,
        propagation: float = 0.9,
        temperature: float = 0.05,
        affinity: Literal["rows", "columns"] = "rows",
    ):
        super().__init__(context)
        self.weight, self.propagation, self.temperature, self.affinity = weight, propagation, temperature, affinity
        self.register_buffer("active", torch.tensor(False))  # a buffer, so that a resumed run knows
        if context.embeddings:
            self.old_head = context.prototype_head(torch.zeros(context.classes, self.shared))

    @classmethod
    def requires(cls, t: int, **hyperparameters: Any) -> Mapping[str, Need]:
        return {"old_train": Need("embeddings")} if t else {}

    def on_train_epoch_start(self) -> None:
        epochs = self.trainer.max_epochs or 1
        if self.context.embeddings and self.current_epoch in [round(share * epochs) for share in REFRESH]:
            self.refresh()
        super().on_train_epoch_start()

    @torch.no_grad()
    def refresh(self) -> None:
        """Prototypes from the old embeddings and the present new ones of all training images, test transforms."""
        assert self.context.loader is not None
        dtype = next(self.backbone.parameters()).dtype
        self.backbone.eval()
        parts = [self.backbone(batch.x["image"].to(dtype)).float().cpu() for batch in self.context.loader("eval")]
        self.backbone.train()
        stored = self.context.embeddings["old_train"]
        assert stored.labels is not None
        old = stored.main(self.context.t - 1)[:, : self.shared]
        rows = refine(
            torch.cat(parts),
            old,
            stored.labels,
            self.context.classes,
            self.propagation,
            self.temperature,
            dim=1 if self.affinity == "rows" else 0,
        )
        self.old_head.weight.copy_(rows)
        self.active.fill_(True)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        z = self.backbone(batch.x["image"])  # (B, D)
        influence = self.old_head(z[:, : self.shared], batch.y) if self.active else z.new_zeros(())
        return {"classification": self.head(z, batch.y), "influence": self.weight * influence}


def refine(
    new: Tensor, old: Tensor, labels: Tensor, classes: int, propagation: float, temperature: float, dim: int = 1
) -> Tensor:
    """Prototypes (K, d_o): class by class, the mean of old embeddings propagated over the graph of new ones."""
    new, old = F.normalize(new.double()), F.normalize(old.double())
    rows = []
    for index in members(labels, classes):
        if len(index) < 2:  # no neighbour to learn from
            rows.append(old[index].mean(0))
            continue
        similar = new[index] @ new[index].T / temperature  # (n, n)
        affinity = similar.fill_diagonal_(-torch.inf).softmax(dim)
        system = torch.eye(len(index), dtype=torch.float64) - propagation * affinity
        rows.append(((1 - propagation) * torch.linalg.solve(system, old[index])).mean(0))
    return torch.stack(rows).float()
