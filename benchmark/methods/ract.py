"""RACT, the loss of hot-refresh model upgrades (Zhang et al., "Hot-refresh model upgrades with regression-alleviating
compatible training in image retrieval", ICLR 2022).

While a gallery is being backfilled it holds old and new items at once. An image's old embedding must therefore beat not only
old negatives but new ones too, or queries that were right turn wrong (negative flips):

    L = L(W z, y) - weight * mean_i log [ e^{<z_i,o_i>/tau} /
            (e^{<z_i,o_i>/tau} + sum_{k in top(i)} e^{<z_i,o_k>/tau} + sum_{k in top'(i)} e^{<z_i,sg(z_k)>/tau}) ]

top, top': the hardest of other classes in the batch, among old and among new embeddings. sg: constants, since the code gathers
the batch without gradient. The paper's landmark recipe is replaced by the protocol's.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from benchmark.methods.contrastive import Contrastive, hardest


class RACT(Contrastive):
    """Hot-refresh: new-to-old InfoNCE with old and new-to-new negatives.

    Args:
        weight: of the contrastive loss. Code: 1.
        temperature: tau. Code: 0.01.
        hardest: negatives of each pool. Code: 10.
    """

    space: ClassVar = Contrastive.space

    def negatives(self, new: Tensor, old: Tensor, y: Tensor) -> list[Tensor]:
        return [hardest(new @ old.T, y, self.hardest), hardest(new @ new.detach().T, y, self.hardest)]
