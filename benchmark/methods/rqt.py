"""RQT, the reverse query transform, and metric compatible learning (Seo, Uzunbas, Han, Cao, Lim, "Metric Compatible Training
for Online Backfilling in Large-Scale Retrieval", WACV 2025). RECONSTRUCTION: the paper's body was not available; formulas
marked (*) are ours, after what others report of it, and sizes, temperature, weights and optimiser are ours.

While the gallery is being re-embedded, a query meets old items through psi_r (new -> old space, so that one encoder serves
both parts) and new items directly; the two lists are merged by distance. d = Euclidean distance: of unit vectors where the
protocol's similarity is the cosine, else of the vectors themselves.

    L_RQT = mean of d(psi_r(phi_n(x)), phi_o(x))
    s^r_ij = exp(-d(psi_r(phi_n(x_i)), phi_o(x_j)) / tau),   s^n_ij = exp(-d(phi_n(x_i), phi_n(x_j)) / tau)
    L_MCL = sum over m in {r, n} of -1/|P| sum over p in P of log( s^m_ip / (sum_P s^m_ik + sum_N (s^r_ik + s^n_ik)) )   (*)

P, N: items of the same and of other classes. The negatives of both systems stand in each denominator, so that distances of
both become comparable; "independent" calibration has those of its own system alone. Items j are drawn class-balanced from
the stored embeddings of the training images (evaluation view, where anchors are augmented), the anchor's own image left out; the
paper is reported to mine hard examples, which is left away here. Learnable new embedding (*): the release stores
phi_n' = phi_n + rho(phi_n), which takes the place of phi_n above and is kept accurate by the new model's frozen classifier.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmark.bridge import Bridge, transformation_recipe
from benchmark.errors import UserError
from benchmark.images import Batch
from benchmark.method import OLD, ORACLE, Context, Encoder, Need
from benchmark.protocol import Recipe


class RQT(Bridge):
    """A small network sends new queries to the old space; optionally both systems' distances are made comparable.

    Args:
        hidden: width of the two inner layers of psi_r and of rho. Ours: 512.
        contrastive: "none" = L_RQT alone; "joint" = with L_MCL; "independent" = each system calibrated by itself.
        embedding: whether the new embedding is learned too (rho).
        temperature: tau. Ours: 0.1.
        weight: of the contrastive loss. Ours: 1.
        candidates: stored embeddings drawn per class and step. Ours: 4.
        lr: of Adam. Ours: 5e-4, as FCT's code.
        direct: one map for each pair of releases, instead of a chain of those between neighbours; not with `embedding`, whose
            releases have one map each.
    """

    reads_unit = True
    items: Tensor
    counts: Tensor
    variants: ClassVar[dict] = {
        "RQT-MCL": {"contrastive": "joint"},
        "RQT-calibrated": {"contrastive": "independent"},
        "RQT-MCL-embedding": {"contrastive": "joint", "embedding": True},
        "RQT-direct": {"direct": True},
        "RQT-MCL-direct": {"contrastive": "joint", "direct": True},
    }
    space: ClassVar = {"temperature": (0.05, 0.1, 0.2), "weight": (0.3, 1.0, 3.0), "lr": (2e-4, 5e-4, 1e-3, 2e-3)}

    def __init__(
        self,
        context: Context,
        hidden: int = 512,
        contrastive: Literal["none", "independent", "joint"] = "none",
        embedding: bool = False,
        temperature: float = 0.1,
        weight: float = 1.0,
        candidates: int = 4,
        lr: float = 5e-4,
        direct: bool = False,
    ):
        super().__init__(context)
        self.contrastive, self.temperature, self.weight = contrastive, temperature, weight
        self.candidates, self.lr = candidates, lr
        d_new, d_old = self.ends()
        self.step = layers(d_new, hidden, d_old)
        self.learned = embedding
        if embedding:
            frozen, rho = context.backbone(d_new).requires_grad_(False), layers(d_new, hidden, d_new)
            self.network = Improved(frozen, rho, context.similarity)
        if context.embeddings:
            old, new = context.embeddings["old_items"], context.embeddings["new_items"]
            assert new.labels is not None
            order = new.labels.argsort(stable=True)
            self.register_buffer("items", order, persistent=False)  # (N,) by class
            self.register_buffer("counts", new.labels.bincount(minlength=context.classes), persistent=False)  # (K,)
            self.register_buffer("old_items", self.seen(old.main(context.k or 0)), persistent=False)  # (N, d_o)
            self.register_buffer("new_items", new.main(context.t), persistent=False)  # (N, d_n)

    @classmethod
    def keeps_releases(cls, embedding: bool = False, **hyperparameters: Any) -> bool:
        return not embedding

    @classmethod
    def searched(cls, contrastive: str = "none", **hyperparameters: Any) -> Mapping[str, tuple]:
        return cls.space if contrastive != "none" else {"lr": cls.space["lr"]}

    @classmethod
    def requires(
        cls, t: int, contrastive: str = "none", embedding: bool = False, direct: bool = False, **hyperparameters: Any
    ) -> Mapping[str, Need]:
        if embedding and direct:
            raise UserError("RQT: a learned embedding has one map to the release before; leave out direct or embedding")
        needs = dict(super().requires(t))
        if t and contrastive != "none":
            needs |= {"old_items": Need("embeddings", OLD), "new_items": Need("embeddings", ORACLE)}
        return needs

    def recipe(self, default: Recipe) -> Recipe:
        return transformation_recipe(default, self.lr)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        encoders, y = self.context.encoders, batch.y
        with torch.no_grad():
            old, new = encoders["old"](batch.x)["main"], encoders["new"](batch.x)["main"]  # (B, d_o), (B, d_n)
        query = self.embed(new)  # (B, d_n)
        reversed_query = self.seen(self.step(self.seen(query)))  # (B, d_o)
        terms = {"reverse": (reversed_query - self.seen(old)).norm(dim=1).mean()}
        if self.learned:
            head = encoders["new"].head
            assert head is not None
            terms["classification"] = head(query, y)
        if self.contrastive != "none":
            drawn, labels = self.draw()
            logits = [
                -distance(reversed_query, self.old_items[drawn]) / self.temperature,  # log s^r, (B, M)
                -distance(self.seen(query), self.seen(self.embed(self.new_items[drawn]))) / self.temperature,  # log s^n
            ]
            same, own = y[:, None] == labels, batch.index[:, None] == drawn
            terms["contrastive"] = self.weight * contrast(logits, same & ~own, ~same, self.contrastive == "joint")
        return terms

    def seen(self, z: Tensor) -> Tensor:
        """Vectors as the protocol's search sees them."""
        return F.normalize(z) if self.context.similarity == "cosine" else z

    def embed(self, z: Tensor) -> Tensor:
        """The embedding that the release stores, from the independent one."""
        return self.network.improve(z) if self.learned else z

    def draw(self) -> tuple[Tensor, Tensor]:
        """Positions of `candidates` stored items of each class (M,), and their classes."""
        first = self.counts.cumsum(0) - self.counts
        share = torch.rand(len(self.counts), self.candidates, device=self.counts.device)
        at = first[:, None] + (share * self.counts[:, None]).long()  # (K, candidates)
        labels = torch.arange(len(self.counts), device=at.device)[:, None].expand_as(at)
        return self.items[at.flatten()], labels.flatten()

    def released(self) -> Encoder:
        if "new" in self.context.encoders:  # after training; a release that is loaded finds all in its own weights
            self.network.backbone.load_state_dict(self.context.encoders["new"].network.state_dict())
        return Encoder(self.network, self.context.release.dim)


class Improved(nn.Module):
    """phi_n' = phi_n + rho(phi_n), at the start phi_n itself; phi_n stays as it is."""

    def __init__(self, backbone: nn.Module, rho: nn.Sequential, similarity: str):
        super().__init__()
        self.backbone, self.rho, self.similarity = backbone, rho, similarity
        for start in rho[-1].parameters():
            nn.init.zeros_(start)

    def improve(self, z: Tensor) -> Tensor:
        return z + self.rho(F.normalize(z) if self.similarity == "cosine" else z)

    def forward(self, image: Tensor) -> Tensor:
        return self.improve(self.backbone(image))


def contrast(logits: list[Tensor], positive: Tensor, negative: Tensor, joint: bool) -> Tensor:
    """Contrastive loss summed over the systems whose log-similarities (B, M) are given; anchors without positive add 0."""
    total = logits[0].new_zeros(())
    for own in logits:
        others = [x.masked_fill(~negative, -torch.inf) for x in (logits if joint else [own])]
        below = torch.cat([own.masked_fill(~positive, -torch.inf), *others], 1).logsumexp(1, keepdim=True)  # (B, 1)
        loss = (below - own).masked_fill(~positive, 0).sum(1) / positive.sum(1).clamp(min=1)  # (B,)
        total = total + loss.mean()
    return total


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances, (B, D) and (M, D) -> (B, M); the floor keeps the root's gradient finite."""
    square = a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T
    return square.clamp(min=1e-6).sqrt()


def layers(d_in: int, hidden: int, d_out: int) -> nn.Sequential:
    blocks = [nn.Linear(d_in, hidden), nn.BatchNorm1d(hidden), nn.ReLU()]
    return nn.Sequential(
        *blocks, nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, d_out)
    )
