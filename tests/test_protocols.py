"""The shipped protocols: hashes that records hang on stay; FCT's and BT2's settings are theirs, and run."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmark import plan, protocol, record
from benchmark.__main__ import main
from benchmark.method import Context, Method
from benchmark.protocol import Recipe, Release
from benchmark.runner import open_task

PUBLISHED = ["cifar100-bt2@1", "cifar100-fct224@1"]
PINNED = {
    "digits@1": "e5de5e818c79fa7ae68f5cac6d42b3a6f33af247066839584eb403adfecc8cfb",
    "cifar100-lite@1": "7ade0dc985f6610169ff3e108833df6d6934511bde314a002a2ac459cac41c9c",
    "cifar100-open@1": "01010f4a1926b914975133b372d4f5a48d669f3cc576f4bc0bd0e65cdfeb9e8f",
    "cifar100-classes@1": "614c3e1a8b7edd1d64b8d912699732cf21358e6ea47b4c8457b4ffc3b07e7771",
}


@pytest.mark.parametrize("name", PINNED)
def test_a_field_added_to_the_dataclasses_would_orphan_the_records(name: str) -> None:
    assert protocol.load(name).sha256 == PINNED[name]


def test_the_nodes_of_a_published_row_keep_their_ids() -> None:
    """Of trainings without a method's own code, which may change: cached work and frozen releases hang on them."""
    definition = protocol.load("cifar100-lite@1")
    made = plan.build(definition, plan.MethodRun.of("Independent"), 0, definition.fingerprint or "")
    assert [node.id for node in made.bounds] == [
        "1e09963d34789319194b",
        "fd902609dc012f8bc319",
        "a7cee4d2a68cfeee3009",
    ]


# --------------------------------------------------------------------------------------- the settings of FCT and BT2


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder laid out as CIFAR-100, 100 classes of 3 training and 2 test images, with hashes of its own."""
    from torchvision.datasets import CIFAR100
    from torchvision.datasets.utils import calculate_md5

    folder, rng = tmp_path / "cifar-100-python", np.random.default_rng(0)
    folder.mkdir()
    names = sorted(protocol.load("cifar100-fct224@1").task_args["classes"])
    for name, count in (("train", 300), ("test", 200)):
        data = {"data": rng.integers(0, 256, (count, 3072), np.uint8), "fine_labels": [i % 100 for i in range(count)]}
        (folder / name).write_bytes(pickle.dumps(data))
        monkeypatch.setattr(CIFAR100, f"{name}_list", [[name, calculate_md5(folder / name)]])
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": calculate_md5(folder / "meta")})
    monkeypatch.setattr("tasks.cifar100.FILES", {"train": 300, "test": 200})
    return tmp_path


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_first_50_classes_are_those_of_folders_sorted_as_strings(name: str) -> None:
    classes = protocol.load(name).task_args["classes"]
    alphabetical = sorted(classes)  # CIFAR-100's fine labels are numbered so
    assert len(set(classes)) == 100
    assert [alphabetical.index(c) for c in classes] == [int(folder) for folder in sorted(str(i) for i in range(100))]
    assert {alphabetical.index(c) for c in classes[:50]} == {*range(6), *range(10, 54)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_batches_are_resized_and_the_images_stay_small(name: str, cifar: Path) -> None:
    task = open_task(protocol.load(name, ["fingerprint=null"]), cifar, "cpu")
    loader = task.item_loader("test", "query")
    batch = next(iter(loader))
    assert batch.x["image"].shape == (200, 3, 224, 224) and loader.images.shape == (200, 3, 32, 32)  # type: ignore[attr-defined]
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
    raw = task.sets["test"].images[int(task.items("test", "query")[0][7])].float() / 255  # type: ignore[attr-defined]
    for c in range(3):
        wanted = (raw[c].mean() - mean[c]) / std[c]
        assert float(batch.x["image"][7, c].mean()) == pytest.approx(float(wanted), abs=0.02)


@pytest.mark.parametrize("name", PUBLISHED)
def test_one_command_runs_all_stages(name: str, cifar: Path, tmp_path: Path) -> None:
    """Shortened: ResNet-18 at 33 px, one epoch, small batches. The matrix of each method comes out whole."""
    overrides = ["fingerprint=null", "task_args.pixels=33"]
    for t in (0, 1):
        overrides += [f"releases.{t}.backbone_args.depth=18", f"releases.{t}.dim=16"]
        overrides += [f"releases.{t}.recipe.epochs=1", f"releases.{t}.recipe.batch_size=50"]
    arguments = ["run", name, "--method", "Independent", "BCT", "BT2", "--data", str(cifar), "--runs", str(tmp_path)]
    arguments += ["--wandb", "disabled", "--threads", "1", "--device", "cpu"]
    assert main([*arguments, *(part for override in overrides for part in ("--override", override))]) == 0
    for method, width in (("Independent", 16), ("BCT", 16), ("BT2", 48)):
        made = record.load(tmp_path / name / f"{method}-off-protocol" / "seed0.json")
        assert np.isfinite(np.array(made.matrices["map"]["all"], dtype=float)[np.tril_indices(2)]).all()
        assert [release.dim for release in made.releases] == [16, width]


def test_heavyball_is_sgd_with_momentum_and_without_nesterovs() -> None:
    """Three steps on a quadratic against the recurrence v = m v + g + d w, w = w - lr v."""

    class Quadratic(Method):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.w = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
            recipe = Recipe(
                optimizer="heavyball", lr=0.1, momentum=0.875, weight_decay=0.25, schedule="constant", warmup=0
            )
            self.context = Context(0, 0, Release("r", "convnet", 2, recipe=recipe), 2, "cosine", *[None] * 3)  # type: ignore

        trainer = type("Trainer", (), {"estimated_stepping_batches": 3})()

    method = Quadratic()
    optimizer = method.configure_optimizers()["optimizer"]
    w, v = np.array([1.0, -2.0]), np.zeros(2)
    for _ in range(3):
        optimizer.zero_grad()
        method.w.square().sum().backward()
        optimizer.step()
        v = 0.875 * v + 2 * w + 0.25 * w
        w = w - 0.1 * v
    np.testing.assert_allclose(method.w.detach().numpy(), w)
