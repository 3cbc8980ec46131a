"""The ResNet of FCT and BT2 is what their released code describes."""

from __future__ import annotations

import pytest
import torch

from benchmark.backbones import build
from benchmark.errors import UserError


def conv(c_in: int, c_out: int, size: int) -> int:
    """Weights of a convolution without bias, and of the batch norm behind it."""
    return c_in * c_out * size**2 + 2 * c_out


def bottleneck(c_in: int, width: int, c_out: int) -> int:
    return conv(c_in, width, 1) + conv(width, width, 3) + conv(width, c_out, 1)


def described(dim: int) -> int:
    """ResNet-50 by its description, block by block, the last one from 2048 to `dim` channels; no linear layer."""
    total, channels = conv(3, 64, 7), 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        total += conv(channels, 4 * width, 1)  # the shortcut of the stage's first block
        for _ in range(blocks):
            total += bottleneck(channels, width, 4 * width)
            channels = 4 * width
    usual = bottleneck(2048, 512, 2048)
    return total - usual + bottleneck(2048, 512, dim) + conv(2048, dim, 1)


@pytest.mark.parametrize("dim", [128, 256])  # 256: BT2's widened one, new and old dims
def test_resnet50_has_the_parameters_of_the_description(dim: int) -> None:
    network = build("resnet", dim, depth=50, stem="imagenet", end="block")
    assert sum(p.numel() for p in network.parameters()) == described(dim)
    assert not [module for module in network.modules() if isinstance(module, torch.nn.Linear)]


def test_basic_blocks_end_in_two_convolutions_of_dim_channels() -> None:
    usual, ours = build("resnet", 512, depth=18), build("resnet", 24, depth=18, end="block")
    counts = [sum(p.numel() for p in network.parameters()) for network in (usual, ours)]
    linear, last = 512 * 512 + 512, 2 * conv(512, 512, 3)
    assert counts[1] == counts[0] - linear - last + conv(512, 24, 3) + conv(24, 24, 3) + conv(512, 24, 1)


def test_the_embedding_is_the_pooled_last_block_with_or_without_relu() -> None:
    torch.manual_seed(0)
    network = build("resnet", 16, depth=18, stem="imagenet", end="block").eval()
    signed = build("resnet", 16, depth=18, stem="imagenet", end="block", last_relu=False).eval()
    signed.load_state_dict(network.state_dict())
    maps = []
    signed.network.layer4.register_forward_hook(lambda module, inputs, output: maps.append(output))  # type: ignore[union-attr]
    x = torch.randn(3, 3, 64, 64)
    z, raw = network(x), signed(x)
    (last,) = maps
    assert last.shape == (3, 16, 2, 2) and last.min() < 0
    torch.testing.assert_close(raw, last.mean((2, 3)))
    torch.testing.assert_close(z, last.clamp(min=0).mean((2, 3)))


def test_start_weights_are_pytorchs_in_every_layer() -> None:
    """Uniform in +-1/sqrt(fan in); torchvision's are normal by fan out."""
    network = build("resnet", 128, depth=50, stem="imagenet", end="block")
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            bound = module.weight[0].numel() ** -0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound


def test_an_unknown_end_is_refused() -> None:
    with pytest.raises(UserError, match="end is linear or block, not pool"):
        build("resnet", 16, end="pool")
