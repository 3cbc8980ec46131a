"""Batched augmentation does what a loop over images would, and the epoch alone decides it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from benchmark.errors import UserError
from benchmark.images import ImageLoader

IMAGES = torch.randint(1, 255, (50, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(50) % 7


def loader(**options: object) -> ImageLoader:
    return ImageLoader(IMAGES, LABELS, (0.0,) * 3, (1.0,) * 3, **{"batch_size": 8, **options})  # type: ignore[arg-type]


def every_shift_and_flip(image: torch.Tensor, pad: int, flip: bool) -> list[torch.Tensor]:
    padded = torch.zeros(3, 6 + 2 * pad, 6 + 2 * pad)
    padded[:, pad : pad + 6, pad : pad + 6] = image.float()
    crops = [padded[:, i : i + 6, j : j + 6] for i in range(2 * pad + 1) for j in range(2 * pad + 1)]
    return crops + ([crop.flip(2) for crop in crops] if flip else [])


@pytest.mark.parametrize("augment", [("flip",), ("crop2",), ("flip", "crop1")])
def test_every_output_is_a_shift_or_flip_of_its_own_image(augment: tuple[str, ...]) -> None:
    pad = next((int(name[4:]) for name in augment if name.startswith("crop")), 0)
    used = set()
    for batch in loader(shuffle=True, augment=augment):
        for i, x, y in zip(batch.index, batch.x["image"], batch.y):
            assert y == LABELS[i]
            views = every_shift_and_flip(IMAGES[i], pad, "flip" in augment)
            used |= {v for v, view in enumerate(views) if torch.equal(view, x)} or pytest.fail("no such view")
    assert len(used) > len(views) // 2  # and not always the same one


def test_the_epoch_alone_decides_order_and_augmentation() -> None:
    def epoch(number: int, seed: int = 0) -> torch.Tensor:
        made = loader(shuffle=True, augment=("flip", "crop1"), seed=seed)
        list(made)  # what was drawn before does not matter
        made.sampler.set_epoch(number)
        return torch.cat([batch.x["image"] for batch in made])

    assert torch.equal(epoch(3), epoch(3))
    assert not torch.equal(epoch(3), epoch(4)) and not torch.equal(epoch(3), epoch(3, seed=1))


def test_evaluation_keeps_order_and_every_image() -> None:
    batches = list(loader())
    assert torch.equal(torch.cat([b.index for b in batches]), torch.arange(50)) and len(batches) == len(loader()) == 7
    assert torch.equal(torch.cat([b.x["image"] for b in batches]), IMAGES.float())


def test_training_drops_the_last_partial_batch_and_repeats_no_image() -> None:
    index = torch.cat([batch.index for batch in loader(shuffle=True)])
    assert len(index) == 48 == len(index.unique())


def test_two_views_are_two_draws() -> None:
    batch = next(iter(loader(shuffle=True, augment=("flip", "crop2"), views=2)))
    assert not torch.equal(batch.x["image"], batch.x["image2"])


@pytest.mark.parametrize("augment", [(), ("flip",)])
def test_resizing_equals_pillows_on_every_image(augment: tuple[str, ...]) -> None:
    """Pillow rounds to whole grey levels after each of its two passes, hence up to one level of difference."""
    batch = next(iter(loader(shuffle=bool(augment), augment=augment, size=20)))
    assert batch.x["image"].shape == (8, 3, 20, 20)
    for i, x in zip(batch.index, batch.x["image"]):
        views = [IMAGES[i], IMAGES[i].flip(2)][: 1 + len(augment)]
        pictures = [Image.fromarray(view.permute(1, 2, 0).numpy()).resize((20, 20), Image.BILINEAR) for view in views]
        resized = [torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() for picture in pictures]
        assert min(float((x - wanted).abs().max()) for wanted in resized) <= 1.001


def test_an_unknown_augmentation_is_named() -> None:
    with pytest.raises(UserError, match="'rotate'"):
        loader(augment=("rotate",))
