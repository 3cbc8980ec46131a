"""Frozen encoders run once where training shows few views of an image, and nothing but the bill changes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmark import plan, protocol, runner
from benchmark.backbones import build
from benchmark.images import ImageLoader
from benchmark.method import Encoder
from benchmark.store import Store
from tests.resuming import assert_resumes_bit_for_bit

N, B = 75, 32


def loader(augment: tuple[str, ...] = ("flip",), batch_size: int = B, pixels: int = 16) -> ImageLoader:
    images = torch.randint(
        0, 256, (N, 3, pixels, pixels), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    shown = {"batch_size": batch_size, "shuffle": True, "augment": augment}
    return ImageLoader(images, torch.zeros(N, dtype=torch.int64), (127.0,) * 3, (64.0,) * 3, **shown)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------ the views


@pytest.mark.parametrize("augment", [(), ("flip",)])
def test_every_view_is_shown_once_in_the_order_of_its_key(augment: tuple[str, ...]) -> None:
    views, ways = loader(augment), 1 + len(augment)
    batches = list(views.shown())
    assert (
        all(len(batch.x["image"]) == B for batch in batches) and (len(batches) - 1) * B < ways * N <= len(batches) * B
    )
    keys = torch.cat([batch.x["key"] for batch in batches])
    assert torch.equal(keys, torch.arange(len(keys)) % (ways * N))
    for key, image in zip(keys, torch.cat([batch.x["image"] for batch in batches])):
        plain = (views.images[key // ways].float() - 127) / 64
        assert torch.equal(image, plain.flip(2) if augment and key % 2 else plain)


@pytest.mark.parametrize("augment", [(), ("flip",)])
def test_a_key_names_the_view_that_training_shows(augment: tuple[str, ...]) -> None:
    views = loader(augment)
    table = torch.cat([batch.x["image"] for batch in views.shown()])
    keys = []
    for epoch in range(3):
        views.set_epoch(epoch)
        for batch in views:
            assert torch.equal(table[batch.x["key"]], batch.x["image"])
            keys.append(batch.x["key"])
    assert len(torch.cat(keys).unique()) > N * len(augment)  # flips are among them


def test_crops_and_evaluation_have_no_keys() -> None:
    assert "key" not in next(iter(loader(("flip", "crop2")))).x and loader(("crop1",)).ways is None
    evaluation = ImageLoader(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4), (0.0,), (1.0,), batch_size=2)
    assert "key" not in next(iter(evaluation)).x


# ---------------------------------------------------------------------------------------------------- the encoder

NETWORKS: dict[str, dict[str, Any]] = {
    "convnet": {"width": 8},
    "convvit": {"width": 32, "depth": 1, "heads": 2},
    "resnet": {"depth": 18, "stem": "imagenet", "end": "block"},
}


def encoder(name: str = "convnet", dtype: torch.dtype = torch.float32) -> Encoder:
    torch.manual_seed(1)
    return Encoder(build(name, 16, **NETWORKS[name]).to(dtype), 16)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
@pytest.mark.parametrize("name", NETWORKS)
def test_looked_up_and_made_embeddings_are_the_same_bits(name: str, precision: str) -> None:
    dtype = torch.float64 if precision == "64-true" else torch.float32
    kept, made, views = encoder(name, dtype), encoder(name, dtype), loader()
    kept.keep(views)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        for batch in views:
            x = {**batch.x, "image": batch.x["image"].to(dtype)}
            assert torch.equal(kept(x)["main"], made(x)["main"]) and made(x)["main"].dtype == kept(x)["main"].dtype
    assert kept.images_seen == 0 and kept.images_kept == -(-2 * N // B) * B


def test_an_odd_batch_in_float64_is_the_same_to_rounding() -> None:
    """A matrix product may treat the last rows of such a batch in another way."""
    kept, made, views = encoder(dtype=torch.float64), encoder(dtype=torch.float64), loader(batch_size=50)
    kept.keep(views)
    for batch in views:
        x = {**batch.x, "image": batch.x["image"].double()}
        torch.testing.assert_close(kept(x)["main"], made(x)["main"], rtol=0, atol=1e-15)


def test_an_image_without_a_key_is_embedded_itself() -> None:
    kept, made = encoder(), encoder()
    kept.keep(loader())
    kept(next(iter(loader())).x)
    other = {"image": torch.randn(5, 3, 16, 16)}
    assert torch.equal(kept(other)["main"], made(other)["main"]) and kept.images_seen == 5


class Two(Encoder):
    def forward(self, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        main = super().forward(x)["main"]
        return {"main": main, "side": main[:, :3].square()}


def test_all_outputs_of_an_encoder_are_kept() -> None:
    kept = Two(encoder().network, 16)
    kept.keep(loader())
    for batch in loader():
        wanted = Two(encoder().network, 16)(batch.x)
        assert all(torch.equal(kept(batch.x)[name], wanted[name]) for name in ("main", "side"))
    assert kept.images_seen == 0


def test_what_takes_too_much_memory_is_made_anew_with_a_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmark.method.KEPT", 2 * N * 16 * 4 - 1)
    kept, batches = encoder(), list(loader())
    kept.keep(loader())
    with pytest.warns(UserWarning, match="150 views"):
        kept(batches[0].x)
    assert torch.equal(kept(batches[1].x)["main"], encoder()(batches[1].x)["main"])
    assert kept.images_seen == 2 * B and not kept.kept


# ------------------------------------------------------------------------------------------------------- training

EPOCHS = 3


def train(
    root: Path, name: str, augment: str, precision: str, epochs: int = EPOCHS
) -> tuple[Any, Store, plan.Node, Any]:
    settings = {"epochs": epochs, "augment": augment, "precision": precision}
    overrides = [f"releases.{t}.recipe.{key}={value}" for t in range(2) for key, value in settings.items()]
    definition = protocol.load("digits@1", overrides)
    task = runner.open_task(definition, None, "cpu")
    node = plan.build(definition, plan.MethodRun.of(name), 0, task.fingerprint).releases[1]
    store = Store(root)
    runner.execute([node], task, store, threads=1)
    return task, store, node, store.read_json(node, "train.json")


@pytest.mark.parametrize("augment", ["[flip]", "[]"])
@pytest.mark.parametrize("name, precision", [("BT2", "32-true"), ("BT2", "64-true"), ("L2", "bf16-mixed")])
def test_training_gives_the_same_weights_with_and_without(
    name: str, precision: str, augment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, store, node, facts = train(tmp_path / "kept", name, augment, precision)
    monkeypatch.setattr("benchmark.method.KEPT", 0)
    with pytest.warns(UserWarning, match="not kept"):
        _, other, _, made = train(tmp_path / "made", name, augment, precision)
    weights = [(s.folder(node) / "encoder.safetensors").read_bytes() for s in (store, other)]
    assert weights[0] == weights[1] and facts["history"] == made["history"]
    teachers, images, batch = (2 if name == "BT2" else 1), task.train_size(1), 32
    views = images * (2 if "flip" in augment else 1)
    assert facts["teacher_forwards"] == teachers * -(-views // batch) * batch
    assert (
        made["teacher_forwards"] == teachers * facts["images_seen"] + teachers * batch
    )  # and the one that was too big


@pytest.mark.parametrize("augment, epochs", [("[flip, crop1]", EPOCHS), ("[flip]", 2)])
def test_crops_and_few_epochs_run_the_encoder_in_every_step(augment: str, epochs: int, tmp_path: Path) -> None:
    *_, facts = train(tmp_path, "L2", augment, "32-true", epochs)
    assert facts["teacher_forwards"] == facts["images_seen"]


def test_an_encoder_that_only_lends_its_head_is_never_run(tmp_path: Path) -> None:
    *_, facts = train(tmp_path, "BCT-head", "[flip]", "32-true")
    assert facts["teacher_forwards"] == 0


def test_a_resumed_training_ends_with_the_same_weights_and_the_same_bill(tmp_path: Path) -> None:
    task, store, node, _ = train(tmp_path, "BT2", "[flip]", "32-true")
    assert_resumes_bit_for_bit(node, task, store)
