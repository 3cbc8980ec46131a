"""Every method, found by discovery, keeps the suite's promises; every loss equals a naive loop written from its formula."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmark import bill, catalog, plan, protocol, runner, training
from benchmark.backbones import ConvNet
from benchmark.bridge import Bridge
from benchmark.embeddings import Embeddings
from benchmark.errors import UserError
from benchmark.heads import Head
from benchmark.images import Batch
from benchmark.method import Context, Encoder
from benchmark.protocol import HeadSpec, Release
from benchmark.store import Store
from tests.resuming import assert_resumes_bit_for_bit

NAMES = catalog.names("method")  # variants included
BRIDGES = [name for name in NAMES if issubclass(catalog.load("method", name), Bridge)]  # no release is trained again
CLOSED = [name for name in BRIDGES if catalog.load("method", name).closed_form]  # no loss
TRAINED = [name for name in NAMES if name not in CLOSED]
QUICK = [f"releases.{t}.recipe.epochs=1" for t in range(3)]
DIM, K, OLD_K, B = 6, 5, 3, 20


def small(name: str) -> dict[str, int]:
    """FCT's transformation has five million parameters by default."""
    return {"hidden": 16} if "hidden" in catalog.method(name)[1] else {}


def run(name: str, root: Path, *overrides: str, mode: plan.Mode = "chain") -> tuple[plan.Plan, Store, Any]:
    definition = protocol.load("digits@1", [*QUICK, *overrides])
    task = runner.open_task(definition, None, "cpu")
    made = plan.build(definition, plan.MethodRun.of(name, small(name)), 0, task.fingerprint, mode)
    store = Store(root)
    runner.execute([made], task, store, threads=1)
    return made, store, task


def learned(made: plan.Plan) -> list[plan.Node]:
    """What the method itself has trained or fitted: its new releases, or the steps between releases."""
    return bill.steps(made) or list(made.releases[1:])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all, so that old releases and oracles are trained once."""
    return tmp_path_factory.mktemp("runs")


# ----------------------------------------------------------------------------------------------------- conformance


@pytest.mark.parametrize("mode", ["chain", "pairwise"])
@pytest.mark.parametrize("name", NAMES)
def test_trains_a_sequence_and_fills_the_matrix(name: str, mode: plan.Mode, root: Path) -> None:
    made, store, _ = run(name, root, mode=mode)
    for (t, k), node in made.cells.items():
        if (name, mode, t - k) == ("RQT-MCL-embedding", "pairwise", 2):  # a chain through another training's release
            assert node is None
            continue
        assert node is not None, f"cell {t},{k} is undefined"
        scores = store.read_json(node, "scores.json")
        assert all(0 <= scores["all"][metric] <= 1 for metric in ("cmc@1", "cmc@5", "map"))
    for node in learned(made):
        history = store.read_json(node, "train.json")["history"]
        assert (history or node.kind == "fit") and all(
            math.isfinite(value) for epoch in history for value in epoch.values()
        )


@pytest.mark.parametrize("name", NAMES)
def test_unequal_dims_are_linked_or_refused(name: str, root: Path) -> None:
    made, _, _ = run(name, root, "releases.0.dim=8", "releases.1.dim=16", "releases.2.dim=12")
    declared = made.method.cls.link is not catalog.load("method", "Independent").link
    if getattr(made.method.cls, "adapter", None) in ("ConstantShift", "Diagonal"):
        declared = False
    for (t, k), node in made.cells.items():
        assert (node is not None) == (declared or t == k)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", catalog.entries("method"))
def test_trains_in_other_precisions(name: str, precision: str, root: Path) -> None:
    made, store, _ = run(name, root, *(f"releases.{t}.recipe.precision={precision}" for t in range(3)))
    for node in learned(made):
        assert all(math.isfinite(v) for epoch in store.read_json(node, "train.json")["history"] for v in epoch.values())


@pytest.mark.parametrize("name", catalog.entries("method"))
def test_every_hyperparameter_is_checked_and_explained(name: str) -> None:
    cls, defaults = catalog.method(name)
    assert set(defaults) <= set(catalog.argument_docs(cls))
    assert set(cls.space) <= set(defaults)
    with pytest.raises(UserError, match="no_such_thing"):
        catalog.method(name, {"no_such_thing": 1})
    for key in defaults:
        with pytest.raises(UserError, match=key):
            catalog.method(name, {key: object()})


# ------------------------------------------------------------------------------------- one batch, fixed teachers


class Old(torch.nn.Module):
    """Batch norm that must not move, and embeddings that differ between images, as an untrained ConvNet's hardly do."""

    def __init__(self, dim: int):
        super().__init__()
        self.convnet, self.linear = ConvNet(dim, width=2, channels=1), torch.nn.Linear(64, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.convnet(x) + self.linear(x.flatten(1))


def teacher(seed: int, classes: int, dim: int = DIM) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(Old(dim), dim, Head(torch.randn(classes, dim), HeadSpec()))


def context(**changes: Any) -> Context:
    torch.manual_seed(3)
    spec, smoothing = changes.pop("head_spec", HeadSpec("cosine", 8.0)), 0.1
    labels = torch.arange(4 * B) % K  # of the training list, of which a batch is the first part
    means = F.normalize(torch.randn(K, DIM)) * 0.7
    old, new = (means[labels] + 0.2 * torch.randn(4 * B, DIM) for _ in range(2))
    stored = Embeddings(torch.arange(4 * B), {(0, "main"): old}, labels)
    items = Embeddings(torch.arange(4 * B), {(1, "main"): new}, labels)
    given: dict[str, Any] = {
        "t": 1,
        "k": 0,
        "seed": 0,
        "release": Release("new", "convnet", DIM),
        "classes": K,
        "similarity": "cosine",
        "backbone": partial(ConvNet, width=2, channels=1),
        "head": lambda width: Head(torch.randn(K, width), spec, smoothing),
        "prototype_head": lambda rows: Head(rows.clone(), spec, smoothing).requires_grad_(False),
        "old_dim": DIM,
        "encoders": {
            "old": teacher(1, OLD_K),
            "oracle": teacher(2, K),
            "new": teacher(2, K),
            "side": teacher(5, OLD_K),
        },
        "dims": {"side": DIM},
        "means": {"old_means": means},
        "embeddings": {"old_train": stored, "old_items": stored, "new_items": items},
        "loader": lambda view: [Batch(torch.arange(4 * B), {"image": torch.randn(4 * B, 1, 8, 8)}, labels)],
    }
    return Context(**{**given, **changes})


@pytest.fixture
def batch() -> Batch:
    torch.manual_seed(9)
    return Batch(torch.arange(B), images(), torch.arange(B) % K)


def images() -> dict[str, Tensor]:
    return {name: torch.randn(B, 1, 8, 8) for name in ("image", "image2")}


def make(name: str, given: Mapping[str, Any] | None = None, **changes: Any) -> Any:
    """A method in the middle of its training."""
    cls, hyperparameters = catalog.method(name, {**small(name), **(given or {})})
    method = cls(context(**changes), **hyperparameters)
    if "side" not in cls.requires(1, **hyperparameters):
        method.context.encoders.pop("side", None)
    method.done = 0.5
    if hasattr(method, "refresh"):
        method.refresh()
    return method


# terms that move the head alone, and the one that the code of a reference leaves without any gradient
HEAD_ONLY, INERT = {("LCE", "align")}, {("NCCL-reference", "logit")}


@pytest.mark.parametrize("name", TRAINED)
def test_every_term_is_finite_and_has_a_gradient(name: str, batch: Batch) -> None:
    method = make(name)
    for term, value in method.loss(batch).items():
        assert math.isfinite(value.item()), term
        if (name, term) in INERT:
            assert not value.requires_grad
            continue
        method.zero_grad()
        value.backward(retain_graph=True)
        part = method.head if (name, term) in HEAD_ONLY else method if name in BRIDGES else method.backbone
        moved = sum(float(p.grad.abs().sum()) for p in part.parameters() if p.grad is not None)
        assert moved > 0, term


# OCA's rotation learns or does not; weakened L2 differs once a distance is below its slack; the two MixBCT may draw the same
# rows of this batch. Their own tests tell them apart.
ALIKE_AT_FIRST = {("OCA", "OCA-frozenQ"), ("L2", "L2-weakened"), ("MixBCT", "MixBCT-reference")}


def test_no_method_is_another_in_disguise(batch: Batch) -> None:
    """Gradient of the shared convolutions: same start, same batch, another direction for every method and ablation."""
    batch = batch._replace(x={name: image.double() for name, image in batch.x.items()})
    directions = {}
    names = [name for name in NAMES if name not in BRIDGES]
    for name in names:
        method = make(name).double()
        for encoder in method.context.encoders.values():
            encoder.double()
        state = ConvNet(DIM, width=2, channels=1).features.state_dict()
        torch.manual_seed(4)
        method.backbone.features.load_state_dict(
            {key: torch.rand_like(v.float()).to(v.dtype) for key, v in state.items()}
        )
        sum(method.loss(batch).values()).backward()
        gradient = torch.cat([p.grad.flatten() for p in method.backbone.features.parameters()])
        directions[name] = gradient / gradient.norm()
        if name in ("OCA", "OCA-frozenQ"):  # alike at the start but for this: the rotation learns, or does not
            assert any(p.grad is not None for p in method.rotate.parameters()) == (name == "OCA")
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            if (a, b) in ALIKE_AT_FIRST:
                continue
            assert float(directions[a] @ directions[b]) < 1 - 1e-9, (a, b)


def test_no_bridge_is_another_in_disguise(batch: Batch) -> None:
    """Gradient of all trained numbers: same start, same batch, another direction."""
    batch = batch._replace(x={name: image.double() for name, image in batch.x.items()})
    gradients: dict[str, Tensor] = {}
    for name in (n for n in TRAINED if n in BRIDGES and not n.endswith("-direct")):
        method = make(name).double()
        for encoder in method.context.encoders.values():
            encoder.double()
        torch.manual_seed(4)
        for p in method.parameters():
            p.data.copy_(0.3 * torch.randn(p.shape))
        torch.manual_seed(5)
        sum(method.loss(batch).values()).backward()
        gradients[name] = torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])
    for i, (a, x) in enumerate(gradients.items()):
        for b, y in list(gradients.items())[i + 1 :]:
            assert len(x) != len(y) or float(x @ y / (x.norm() * y.norm())) < 1 - 1e-9 or serve_apart(a, b), (a, b)


def serve_apart(a: str, b: str) -> bool:
    """Trained alike, but the gallery of one is moved and that of the other is not."""
    return {a, b} == {"LambdaOrthogonality", "LambdaOrthogonality-backward"}


@pytest.mark.parametrize("name", TRAINED)
def test_training_leaves_the_old_encoder_bit_identical(name: str, root: Path) -> None:
    made, store, _ = run(name, root)
    for node in learned(made):
        for source in (s for s in node.inputs.values() if s.kind == "train" or s.kind == "frozen"):
            store.check(source)  # the hash of its file
    method = make(name)
    before = {key: value.clone() for key, value in method.context.encoders["old"].state_dict().items()}
    method.train()
    assert not method.context.encoders["old"].training
    x = images()
    optimizer = torch.optim.SGD(method.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        sum(method.loss(Batch(torch.arange(B), x, torch.arange(B) % K)).values()).backward()
        optimizer.step()
    after = method.context.encoders["old"].state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any("encoders" in key for key in method.state_dict())  # nor does a checkpoint drag it along


@pytest.mark.parametrize("name", [name for name in catalog.entries("method") if name in TRAINED])
def test_interrupted_and_resumed_it_ends_bit_for_bit_as_it_would_have(name: str, root: Path) -> None:
    """Queues, prototypes made on the way, schedules, random masks: whatever a method keeps must be in its checkpoint."""
    made, store, task = run(name, root, "releases.1.recipe.epochs=3")
    assert_resumes_bit_for_bit(learned(made)[0], task, store)


def of_images() -> list[str]:
    """Shipped protocols whose task is of images alone."""
    return [name for name in protocol.shipped() if not catalog.load("task", protocol.load(name).task).sides]


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("shipped", of_images())
def test_every_term_becomes_active_in_every_shipped_protocol(shipped: str, name: str, batch: Batch) -> None:
    """Schedules are shares of training, so no protocol is too short for them."""
    for release in protocol.load(shipped).releases[1:]:
        epochs = release.recipe.epochs
        cls, hyperparameters = catalog.method(name, small(name))
        method = cls(context(), **hyperparameters)
        method._trainer = SimpleNamespace(max_epochs=epochs, current_epoch=0)
        active: dict[str, float] = {}
        for epoch in sorted(
            {*range(min(epochs, 3)), *(round(epochs * share) for share in (10 / 35, 20 / 35)), epochs - 1}
        ):
            method.trainer.current_epoch, method.done = epoch, epoch / epochs
            method.on_train_epoch_start()
            for term, value in method.loss(batch).items():
                active[term] = max(active.get(term, 0.0), abs(value.item()))
        assert all(value > 0 for value in active.values()), active


def test_a_released_encoder_loads_to_the_same_embeddings(root: Path) -> None:
    for name in ("BT2", "OCA"):
        made, store, task = run(name, root)
        stored = store.embeddings(next(n for n in made.nodes if n.label.startswith("embed test:query, train " + name)))
        node = made.releases[next(iter(stored.views))[0]]
        encoder, _ = training.load_released(node, task, store)
        again = runner.embed(encoder, task.item_loader("test", "query"), lambda done, total: None)["main"]
        assert torch.equal(again, stored.main(node.spec["t"]))


# ----------------------------------------------------------------------------------- losses against naive loops


def unit(v: np.ndarray) -> np.ndarray:
    return v / math.sqrt(sum(float(x) ** 2 for x in v))


def cross_entropy(logits: list[float], y: int, smoothing: float) -> float:
    total = math.log(sum(math.exp(x) for x in logits))
    logs = [x - total for x in logits]
    return -(1 - smoothing) * logs[y] - smoothing * sum(logs) / len(logs)


def array(z: Tensor) -> np.ndarray:
    return z.detach().double().numpy()


def cosine_loss(z: np.ndarray, W: np.ndarray, y: list[int], scale: float = 8.0, smoothing: float = 0.1) -> list[float]:
    return [cross_entropy([scale * float(unit(a) @ unit(w)) for w in W], c, smoothing) for a, c in zip(z, y)]


def plain_loss(z: np.ndarray, V: np.ndarray, y: list[int], scale: float, smoothing: float) -> float:
    return float(np.mean([cross_entropy([scale * float(unit(a) @ v) for v in V], c, smoothing) for a, c in zip(z, y)]))


@pytest.mark.parametrize("prototypes", ["means", "head", "both"])
def test_bct_influence(prototypes: str, batch: Batch) -> None:
    method = make("BCT", {"prototypes": prototypes, "weight": 2.0, "extra_dims": 3})
    z = array(method.backbone(batch.x["image"]))
    means, old = array(method.context.means["old_means"]), array(method.context.encoders["old"].head.weight)
    W = {"means": means, "head": old, "both": np.concatenate([old, means[OLD_K:]])}[prototypes]
    total = 0.0
    for a, c in zip(z, batch.y.tolist()):
        if c < len(W):  # a class that the old head lacks contributes 0
            total += cosine_loss(a[None, :DIM], W, [c])[0]
    terms = method.loss(batch)
    assert terms["influence"].item() == pytest.approx(2.0 * total / B, rel=1e-5)
    assert terms["classification"].item() == pytest.approx(
        np.mean(cosine_loss(z, array(method.head.weight), batch.y.tolist())), rel=1e-5
    )


def test_bct_reference_influence_has_plain_logits_on_unnormalised_means(batch: Batch) -> None:
    method = make("BCT-reference")
    z, V = array(method.backbone(batch.x["image"])), array(method.context.means["old_means"])
    assert method.loss(batch)["influence"].item() == pytest.approx(
        10 * plain_loss(z, V, batch.y.tolist(), 1.0, 0.1), rel=1e-5
    )


@pytest.mark.parametrize("structure", ["resnet", "vit"])
def test_bt2_terms(structure: str, batch: Batch) -> None:
    method = make("BT2", {"structure": structure, "extra_dims": 4})
    net, y = method.network, batch.y.tolist()
    g = array(method.backbone(batch.x["image"]))  # (B, 2 DIM)
    A, c = array(net.old_branch.weight), array(net.old_branch.bias)
    P1, P2 = array(net.p1.weight), array(net.p2.weight)
    old, oracle = (array(method.context.encoders[n](batch.x)["main"]) for n in ("old", "oracle"))
    F_, B_ = [], []
    for row in g:
        f = unit(row[:DIM])
        u = unit(A @ (np.maximum(row, 0) if structure == "resnet" else row) + c)  # the extra dims
        z = np.concatenate([u, P1 @ (2.0 * f)])
        F_.append(f)
        B_.append(P2 @ z[:DIM])
    terms = {name: value.item() for name, value in method.loss(batch).items()}
    assert terms["classification"] == pytest.approx(
        np.mean(cosine_loss(np.array(F_), array(method.head.weight), y)), rel=1e-5
    )
    expected = 1 - np.mean([unit(a) @ unit(b) for a, b in zip(oracle, F_)])
    assert terms["match_new"] == pytest.approx(expected, rel=1e-5)
    V = array(method.context.means["old_means"])
    assert terms["influence"] == pytest.approx(10 * plain_loss(np.array(B_), V, y, 1.0, 0.0), rel=1e-5)
    expected = 5 * (1 - np.mean([unit(a) @ unit(b) for a, b in zip(old, B_)]))
    assert terms["match_old"] == pytest.approx(expected, rel=1e-5)


def test_oca_terms(batch: Batch) -> None:
    method = make("OCA", {"extra_dims": 4})
    y, V = batch.y.tolist(), array(method.context.means["old_means"])
    h = np.array([unit(row) for row in array(method.backbone(batch.x["image"]))])
    Q, bias = array(method.rotate.weight), array(method.rotate.bias)
    rotated = np.array([Q @ row + bias for row in h])
    terms = {name: value.item() for name, value in method.loss(batch).items()}
    assert terms["classification"] == pytest.approx(
        5 * np.mean(cosine_loss(rotated, array(method.head.weight), y)), rel=1e-5
    )
    assert terms["influence"] == pytest.approx(10 * plain_loss(h[:, :DIM], V, y, 1.0, 0.1), rel=1e-5)
    expected = 5 * np.mean([1 - unit(V[c]) @ unit(row[:DIM]) for row, c in zip(h, y)])
    assert terms["align"] == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------------------------------- invariants


def stepped(name: str, batch: Batch) -> Any:
    method = make(name)
    optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], 0.01)
    for _ in range(10):
        optimizer.zero_grad()
        sum(method.loss(batch).values()).backward()
        optimizer.step()
    return method


def test_bt2_has_constant_norm_and_orthogonal_maps_after_steps(batch: Batch) -> None:
    method = stepped("BT2", batch)
    v = method.released()(batch.x)["main"]
    torch.testing.assert_close(v.square().sum(1), torch.full((B,), 1 + 2.0**2))
    for layer in (method.network.p1, method.network.p2):
        torch.testing.assert_close(layer.weight @ layer.weight.T, torch.eye(DIM), atol=1e-5, rtol=0)


def test_oca_rotation_is_orthogonal_learned_or_frozen_and_leaves_rankings_alone(batch: Batch) -> None:
    for name, learns in (("OCA", True), ("OCA-frozenQ", False)):
        before, method = make(name).rotate.weight.detach().clone(), stepped(name, batch)
        Q = method.rotate.weight.detach()
        torch.testing.assert_close(Q @ Q.T, torch.eye(len(Q)), atol=1e-5, rtol=0)
        assert torch.allclose(before, Q, atol=1e-6) != learns
        h = method.network(batch.x["image"]).detach().double()
        rotated = h @ Q.double().T
        torch.testing.assert_close(h @ h.T, rotated @ rotated.T, atol=1e-5, rtol=0)
    assert isinstance(make("OCA-noQ").rotate, torch.nn.Identity)


@pytest.mark.parametrize("name", ["BT2", "OCA", "BCT-extra"])
def test_extra_dims_grow_release_by_release(name: str, root: Path) -> None:
    made, _, _ = run(name, root)
    assert [node.spec["dim"] for node in made.releases] == [16, 48, 80]
