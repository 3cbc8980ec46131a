"""One door to the networks: small ones of our own for digits and CIFAR, any timm model by name.

A backbone maps images to embeddings of a wanted width: `build("convnet", dim=64, width=16)`. Outputs are raw; whether
they are normalised is the head's and the protocol's business.
"""

from __future__ import annotations

import difflib
import inspect
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmark.errors import UserError, unknown


class ConvNet(nn.Module):
    """Four 3x3 convolutions (width, 2x, 4x, 8x), global average pooling, one linear map to `dim`.

    Made for 8 to 32 px: pools by 2 after each of the first `pools` convolutions.
    """

    def __init__(self, dim: int, width: int = 16, channels: int = 3, pools: int = 2):
        super().__init__()
        widths = [channels, width, 2 * width, 4 * width, 8 * width]
        layers: list[nn.Module] = []
        for i, (c_in, c_out) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]
            layers += [nn.MaxPool2d(2)] if i < pools else []
        self.features = nn.Sequential(*layers)
        self.project = nn.Linear(widths[-1], dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x.contiguous(memory_format=torch.channels_last))
        return self.project(x.mean((2, 3)))  # (B, 8w, h, w) -> (B, 8w) -> (B, dim)


class ConvViT(nn.Module):
    """A small pre-norm vision transformer behind a convolutional stem; the mean token is mapped to `dim`.

    The stem halves the image `stem` times, one convolution each (Xiao et al. 2021, "Early convolutions help
    transformers see better": patchify stems of small ViTs train badly in few epochs).
    """

    def __init__(
        self,
        dim: int,
        width: int = 96,
        depth: int = 3,
        heads: int = 3,
        stem: int = 2,
        size: int = 16,
        channels: int = 3,
    ):
        super().__init__()
        widths = [channels, *[width >> (stem - 1 - i) for i in range(stem)]]
        layers: list[nn.Module] = []
        for c_in, c_out in itertools.pairwise(widths):
            layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
        self.stem = nn.Sequential(*layers, nn.Conv2d(width, width, 1))
        tokens = (size >> stem) ** 2
        self.position = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.project = nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.contiguous(memory_format=torch.channels_last))  # (B, width, h, w)
        x = x.flatten(2).transpose(1, 2) + self.position  # (B, h*w, width)
        return self.project(self.blocks(x).mean(1))  # (B, dim)


class ResNet(nn.Module):
    """torchvision's ResNet, brought to `dim` by a linear map or by its last block.

    Args:
        depth: 18, 34, 50, 101 or 152.
        stem: "small" = one 3x3 convolution of stride 1 and no pooling, the usual form for 32 px; "imagenet" = 7x7 of stride 2
            and max pooling.
        end: "linear" = a linear map in place of the classifier; "block" = the last block itself has `dim` channels and nothing
            follows the pooling (FCT, BT2, OCA: their released code), all layers with PyTorch's start weights, as there.
        last_relu: with "block", whether ReLU comes before the pooling, so that no embedding is negative (FCT, BT2: yes; OCA: no).
    """

    def __init__(self, dim: int, depth: int = 18, stem: str = "small", end: str = "linear", last_relu: bool = True):
        super().__init__()
        from torchvision.models import resnet

        if stem not in ("small", "imagenet") or not hasattr(resnet, f"resnet{depth}"):
            raise UserError(
                f"backbone resnet: depth is 18, 34, 50, 101 or 152 and stem small or imagenet, not {depth}, {stem}"
            )
        if end not in ("linear", "block"):
            raise UserError(f"backbone resnet: end is linear or block, not {end}")
        self.network = getattr(resnet, f"resnet{depth}")(num_classes=dim)
        if stem == "small":
            self.network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            self.network.maxpool = nn.Identity()
        if end == "block":
            self.network.layer4[-1] = LastBlock(self.network.fc.in_features, dim, depth >= 50, last_relu)
            self.network.fc = nn.Identity()
            for module in self.network.modules():
                if isinstance(module, nn.Conv2d):
                    module.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.contiguous(memory_format=torch.channels_last))  # (B, dim)


class LastBlock(nn.Module):
    """A residual block from `width` to `dim` channels; its shortcut is a 1x1 convolution with batch norm."""

    def __init__(self, width: int, dim: int, bottleneck: bool, relu: bool):
        super().__init__()
        shapes = [(width, 512, 1), (512, 512, 3), (512, dim, 1)] if bottleneck else [(width, dim, 3), (dim, dim, 3)]
        layers: list[nn.Module] = []
        for c_in, c_out, size in shapes:
            layers += [
                nn.Conv2d(c_in, c_out, size, padding=size // 2, bias=False),
                nn.BatchNorm2d(c_out),
                nn.ReLU(inplace=True),
            ]
        self.path = nn.Sequential(*layers[:-1])
        self.shortcut = nn.Sequential(nn.Conv2d(width, dim, 1, bias=False), nn.BatchNorm2d(dim))
        self.last = nn.ReLU() if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.path(x) + self.shortcut(x))  # (B, width, h, w) -> (B, dim, h, w)


OWN: dict[str, Callable[..., nn.Module]] = {"convnet": ConvNet, "convvit": ConvViT, "resnet": ResNet}


def build(name: str, dim: int, **args: object) -> nn.Module:
    """A backbone (B, C, H, W) -> (B, dim): one of `OWN`, or `timm/<model>` with timm's own arguments.

    Raises:
        UserError: unknown name, with the nearest ones, or an argument that the backbone does not take.
    """
    if name.startswith("timm/"):
        return _timm(name.removeprefix("timm/"), dim, args)
    if name not in OWN:
        raise unknown("backbone", name, [*OWN, "timm/<model>"])
    known = set(inspect.signature(OWN[name]).parameters) - {"dim"}
    for key in args:
        if key not in known:
            raise unknown(f"argument of backbone {name}", key, known)
    return OWN[name](dim, **args)


def _timm(model: str, dim: int, args: dict) -> nn.Module:
    import timm

    if not timm.is_model(model):
        raise unknown("timm model", model, difflib.get_close_matches(model, timm.list_models(), n=5, cutoff=0.3))
    try:
        return timm.create_model(model, num_classes=dim, **args)  # timm's classifier is the linear map to `dim`
    except TypeError as error:
        raise UserError(f"timm/{model}: {error}") from None
