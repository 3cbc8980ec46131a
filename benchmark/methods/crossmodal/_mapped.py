"""What the methods of this folder share: towers behind a map into the old space, and LoRA that leaves no trace."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmark.method import Context
from benchmark.towers import TwoSided

Phi = Literal["linear", "mlp", "residual"]


class Mapped(TwoSided):
    """norm(phi(norm(tower(x)))) on both sides, by one map or by one for each.

    Args:
        towers: of the new release.
        maps: (B, d_n) -> (B, d_o): one for both sides, or those of images and of texts.
    """

    log_scale: Tensor

    def __init__(self, towers: TwoSided, *maps: nn.Module):
        super().__init__()
        self.towers, self.maps = towers, nn.ModuleList(maps)
        self.register_buffer("log_scale", torch.tensor(0.0))

    @property
    def logit_scale(self) -> Tensor:  # type: ignore[override]
        return self.log_scale

    def image(self, x: Tensor) -> Tensor:
        return F.normalize(self.maps[0](F.normalize(self.towers.image(x))))

    def text(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.maps[-1](F.normalize(self.towers.text(tokens))))


class Projection(nn.Module):
    """phi(x) = x A + b + W2 GELU(W1 LN(x)), hidden width 4 d_o; W2 = 0 at the start, so that it starts as A.

    "linear" has the first part alone, "mlp" the second (with its own start, as it would have no gradient from 0).
    """

    def __init__(self, source: int, target: int, kind: Phi = "residual"):
        super().__init__()
        self.linear = nn.Linear(source, target) if kind != "mlp" else None
        self.inner, self.outer = None, None
        if kind != "linear":
            self.inner, self.outer = nn.Linear(source, 4 * target), nn.Linear(4 * target, target, bias=False)
            if kind == "residual":
                nn.init.zeros_(self.outer.weight)

    @torch.no_grad()
    def start(self, matrix: Tensor) -> None:
        """Let A (d_n, d_o) be this matrix and b zero."""
        if self.linear is not None:
            self.linear.weight.copy_(matrix.T)
            self.linear.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x) if self.linear is not None else torch.zeros((), device=x.device)
        if self.inner is not None and self.outer is not None:
            y = y + self.outer(F.gelu(self.inner(F.layer_norm(x, x.shape[-1:]))))
        return y


def unit(context: Context, name: str, release: int, side: str) -> Tensor:
    """Cached embeddings of a need, (N, D) unit rows."""
    return F.normalize(context.embeddings[name].views[release, side])


def add_lora(model: nn.Module, rank: int, alpha: int) -> nn.Module:
    """Freeze an open_clip model and put LoRA on its attention (q, k, v, out) and MLP layers, in place, through peft.

    The target is the whole `attn` module: open_clip's blocks compute attention from out_proj.weight without calling that
    layer, so that LoRA on "out_proj" alone is counted as trainable and never trained.

    peft adds the update of `attn` to its weights in every forward pass and subtracts it afterwards, which loses bits:
    the frozen weights would drift. Hooks put the very same tensors back, so that removing LoRA restores the model bit for bit.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora.layer import MultiheadAttention

    model.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["attn", "c_fc", "c_proj"])
    inject_adapter_in_model(config, model)
    for layer in model.modules():
        if isinstance(layer, MultiheadAttention):
            kept: list[Tensor] = []
            layer.register_forward_pre_hook(_keeper(kept))
            layer.register_forward_hook(_restorer(kept), always_call=True)
    return model


def _frozen(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    base = layer.get_base_layer()
    return base.in_proj_weight, base.out_proj.get_base_layer().weight


def _keeper(kept: list[Tensor]) -> Any:
    def hook(layer: Any, inputs: Any) -> None:
        kept[:] = [weight.data for weight in _frozen(layer)]

    return hook


def _restorer(kept: list[Tensor]) -> Any:
    def hook(layer: Any, inputs: Any, output: Any) -> None:
        for weight, before in zip(_frozen(layer), kept):
            weight.data = before

    return hook


def remove_lora(model: nn.Module) -> nn.Module:
    """The model without its LoRA layers, in place: the one that `add_lora` was given."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)]
    for name, layer in reversed(layers):  # inner ones first
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    return model
