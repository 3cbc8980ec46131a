"""Methods between independently trained releases: sizes, losses against loops, chained and direct steps, the bill."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal

from benchmark import adapters, fusion, plan, protocol, results, runner
from benchmark.bridge import Mapped, join, multiply_adds
from benchmark.embeddings import Stored
from benchmark.errors import UserError
from benchmark.images import Batch
from benchmark.methods import rqt
from benchmark.methods.fastfill import Uncertain
from benchmark.methods.fct import Transformation
from benchmark.store import Store
from benchmark.training import numbers
from tests.test_methods import DIM, QUICK, B, array, context, cosine_loss, images, make, unit

K = 5


@pytest.fixture
def batch() -> Batch:
    torch.manual_seed(9)
    return Batch(torch.arange(B), images(), torch.arange(B) % K)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_transformations_have_the_published_sizes() -> None:
    assert count(Transformation(128, 128, 128, 2048)) == 5_712_000
    assert count(Uncertain(128, 128, 128, 2048)) == 5_712_129
    assert count(Uncertain(384, 384, 768, 2048)) == 15_026_689  # old, side, new: a count that others report
    linear = [m.weight.numel() for m in Transformation(8, 6, 10, 16).modules() if isinstance(m, nn.Linear)]
    assert multiply_adds(Transformation(8, 6, 10, 16)) == sum(linear)
    assert sum(linear) == 8 * 16 + 16 * 20 + 6 * 12 + 12 * 20 + 40 * 16 + 16 * 16 + 16 * 10


def seen(method: Any, batch: Batch, *names: str) -> list[np.ndarray]:
    return [array(method.context.encoders[name](batch.x)["main"]) for name in names]


def moved(method: Any, batch: Batch) -> np.ndarray:
    """h by hand, batch norm on the batch's own moments."""
    old, side = seen(method, batch, "old", "side")

    def branch(layers: Any, x: np.ndarray) -> np.ndarray:
        for layer in layers:
            if isinstance(layer, nn.Linear):
                x = x @ array(layer.weight).T + (0 if layer.bias is None else array(layer.bias))
            elif isinstance(layer, nn.BatchNorm1d):
                x = (x - x.mean(0)) / np.sqrt(x.var(0) + layer.eps) * array(layer.weight) + array(layer.bias)
            else:
                x = np.maximum(x, 0)
        return x

    h = method.step
    return branch(h.mixer, np.concatenate([branch(h.p1, old), branch(h.p2, side)], 1))


def test_fct_matches_new_embeddings(batch: Batch) -> None:
    method = make("FCT")
    z, (new,) = moved(method, batch), seen(method, batch, "new")
    expected = np.mean([np.mean((a - b) ** 2) for a, b in zip(new, z)])
    assert method.loss(batch)["match"].item() == pytest.approx(expected, rel=1e-4)


def test_fastfill_loss_and_its_optimum(batch: Batch) -> None:
    method = make("FastFill")
    z, (new,) = moved(method, batch), seen(method, batch, "new")
    w, b = array(method.step.sigma.weight)[0], array(method.step.sigma.bias)[0]
    W, total = array(method.context.encoders["new"].head.weight), 0.0
    smoothing = method.context.encoders["new"].head.smoothing
    for row, target, y in zip(z, new, batch.y.tolist()):
        spec_scale = method.context.encoders["new"].head.spec.scale
        c = cosine_loss(row[None], W, [y], spec_scale, smoothing)[0]
        s = float(row @ w + b)
        total += 0.5 * math.exp(-s) * (float(np.mean((target - row) ** 2)) + c) + 0.5 * s
    assert sum(method.loss(batch).values()).item() == pytest.approx(total / B, rel=1e-4)
    level = torch.tensor(0.37)  # exp(-s) l / 2 + s / 2 is least at s = log l
    s = torch.linspace(-4, 3, 7001)
    assert s[(0.5 * torch.exp(-s) * level + 0.5 * s).argmin()].item() == pytest.approx(math.log(0.37), abs=1e-3)


def test_batch_norm_is_frozen_for_the_second_half() -> None:
    method = make("FCT")
    norms = [m for m in method.step.modules() if isinstance(m, nn.BatchNorm1d)]
    for epoch, training in ((0, True), (3, True), (4, False), (7, False)):
        method._trainer = SimpleNamespace(max_epochs=8, current_epoch=epoch)
        method.on_train_epoch_start()
        assert all(m.training == training for m in norms)
    method._trainer = SimpleNamespace(max_epochs=1, current_epoch=0)
    method.on_train_epoch_start()
    assert all(m.training for m in norms)


def test_reverse_transform_is_a_mean_distance(batch: Batch) -> None:
    method = make("RQT")
    old, new = seen(method, batch, "old", "new")
    back = array(method.step(torch.tensor(np.array([unit(v) for v in new])).float()))
    expected = np.mean([np.linalg.norm(unit(a) - unit(b)) for a, b in zip(back, old)])
    assert method.loss(batch)["reverse"].item() == pytest.approx(expected, rel=1e-4)


def test_under_l2_the_reverse_transform_is_trained_on_what_it_serves(batch: Batch) -> None:
    method = make("RQT-MCL", similarity="l2").eval()
    old, new = seen(method, batch, "old", "new")
    link = method.link()
    served = array(link.query({(link.release, "main"): torch.tensor(new).float()}, Stored(0, DIM)))
    expected = np.mean([np.linalg.norm(a - b) for a, b in zip(served, old)])
    assert method.loss(batch)["reverse"].item() == pytest.approx(expected, rel=1e-4)


def test_a_learned_embedding_has_no_direct_maps() -> None:
    with pytest.raises(UserError, match="leave out direct"):
        rqt.RQT.requires(1, embedding=True, direct=True)


@pytest.mark.parametrize("kind", ["slerp", "adaptive"])
def test_the_weight_of_a_fusion_shares_most_neighbours_with_the_new_release(kind: str) -> None:
    """By a loop over the grid and the held-out pairs; the map itself is not fitted to these."""
    both = context().embeddings
    stored = {"old": both["old_items"], "new": both["new_items"]}
    method = make("SLERP", {"kind": kind}, embeddings=stored)
    old, new = (np.array([unit(v) for v in array(x)]) for x in method.unit_pairs())
    facts = method.fit()
    order = method.shuffled(len(old)).numpy()
    held, rest = order[: len(old) // 5], order[len(old) // 5 :]
    again = make("Procrustes", embeddings=stored)
    again.fit_to(*(torch.tensor(x[rest]).float() for x in (old, new)))
    mapped = np.array([unit(v) for v in array(again.step(torch.tensor(new[held]).float()))])

    def first(queries: np.ndarray, items: np.ndarray) -> list[set[int]]:
        k = min(10, len(items) - 1)
        return [set(sorted((j for j in range(len(items)) if j != i), key=lambda j: -(q @ items[j]))[:k])
                for i, q in enumerate(queries)]  # fmt: skip

    wanted, shared = first(new[held], new[held]), []
    for one in fusion.GRIDS[kind]:
        pairs = [torch.tensor(x).double() for x in (old[held], mapped)]
        fused = array(fusion.fuse(kind, *(F.normalize(x) for x in pairs), **one))
        shared.append(sum(len(a & b) for a, b in zip(first(fused, old[held]), wanted)))
    best = [*fusion.GRIDS[kind][int(np.argmax(shared))].values()]
    assert facts["fusion"] == pytest.approx(best) and len(set(shared)) > 1


@pytest.mark.parametrize("joint", [True, False])
def test_metric_compatible_contrast_against_a_loop(joint: bool) -> None:
    torch.manual_seed(2)
    systems = [torch.randn(6, 9), torch.randn(6, 9)]
    same = torch.rand(6, 9) < 0.3
    same[0], same[1] = False, True  # an anchor without positives, one without negatives
    positive, negative = same.clone(), ~same
    positive[2, 0] = negative[2, 0] = False  # its own item
    s, total = [np.exp(x.double().numpy()) for x in systems], 0.0
    for m in (0, 1):
        for i in range(6):
            P = [j for j in range(9) if positive[i, j]]
            N = [j for j in range(9) if negative[i, j]]
            below = sum(s[m][i, j] for j in P) + sum((s[0][i, j] + s[1][i, j]) if joint else s[m][i, j] for j in N)
            total -= sum(math.log(s[m][i, p] / below) for p in P) / max(len(P), 1) / 6
    assert rqt.contrast(systems, positive, negative, joint).item() == pytest.approx(total, rel=1e-5)


def test_candidates_are_balanced_and_never_the_anchor(batch: Batch) -> None:
    method = make("RQT-MCL")
    drawn, labels = method.draw()
    assert labels.bincount().tolist() == [4] * K
    stored = method.context.embeddings["new_items"]
    assert torch.equal(stored.labels[drawn], labels)


def test_a_learned_embedding_begins_as_the_independent_one(batch: Batch) -> None:
    method = make("RQT-MCL-embedding").eval()
    z = torch.randn(3, DIM)
    torch.testing.assert_close(method.embed(z), z)


def test_lambda_orthogonality_terms(batch: Batch) -> None:
    method = make("LambdaOrthogonality-relaxed", {"threshold": 0.5, "sharpness": 2.0})
    old, new = ([unit(v) for v in e] for e in seen(method, batch, "old", "new"))
    b, f = method.step["b"], method.step["f"]
    back = np.array(new) @ array(b.weight).T + array(b.bias)
    fwd = np.array(old) @ array(f.weight).T + array(f.bias)
    y = batch.y.tolist()

    def supcon(a: Any, c: Any) -> float:
        total = 0.0
        for i in range(B):
            e = [math.exp(float(unit(a[i]) @ unit(c[j])) / 0.1) for j in range(B)]
            P = [j for j in range(B) if y[j] == y[i]]
            total -= sum(math.log(e[p] / sum(e)) for p in P) / len(P) / B
        return total

    gap = float(np.linalg.norm(array(b.weight).T @ array(b.weight) - np.eye(DIM)))
    expected = {
        "backward": np.mean([np.sum((p - q) ** 2) for p, q in zip(back, old)]),
        "forward": np.mean([np.sum((p - q) ** 2) for p, q in zip(fwd, back)]),
        "contrastive": supcon(fwd, back) + supcon(fwd, old),
        "orthogonality": gap / (1 + math.exp(-2.0 * (gap - 0.5))),
    }
    terms = {name: value.item() for name, value in method.loss(batch).items()}
    assert terms == pytest.approx(expected, rel=1e-4)


def test_strict_lambda_orthogonality_leaves_rankings_among_new_embeddings_alone() -> None:
    b = make("LambdaOrthogonality").step["b"].weight.detach()
    torch.testing.assert_close(b @ b.T, torch.eye(DIM), atol=1e-5, rtol=0)


def test_simclr_against_a_loop(batch: Batch) -> None:
    method = make("SimCLR", {"strength": 0.0, "crop": 1.0})
    torch.manual_seed(0)
    views = [method.distorted(batch.x[name]) for name in ("image", "image2")]
    for before, after in zip(batch.x.values(), views):  # nothing but flips is left
        assert all(
            torch.allclose(a, b, atol=1e-5) or torch.allclose(a.flip(2), b, atol=1e-5) for a, b in zip(before, after)
        )
    torch.manual_seed(0)
    loss = method.loss(batch)["contrastive"].item()
    f = [unit(v) for v in array(method.project(method.backbone(torch.cat(views))))]
    total = 0.0
    for i in range(2 * B):
        e = [math.exp(float(f[i] @ f[j]) / 0.5) for j in range(2 * B) if j != i]
        total -= math.log(math.exp(float(f[i] @ f[(i + B) % (2 * B)]) / 0.5) / sum(e)) / (2 * B)
    assert loss == pytest.approx(total, rel=1e-4)


# --------------------------------------------------------------------------------------------- chains and the bill


class Times(nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor, side: Tensor | None = None) -> Tensor:
        return self.factor * x + (0 if side is None else side)


@pytest.mark.parametrize("side", ["query", "gallery"])
def test_steps_are_chained_in_the_right_order(side: Any) -> None:
    links = [Mapped(3, 2, 2, Times(2.0), side=side, unit=False), Mapped(2, 2, 1, Times(10.0), side=side, unit=False)]
    links[0].step, links[1].step = Times(2.0), nn.ReLU()  # 2x after ReLU, or ReLU after 2x: same; shift to tell
    links[1].step = Shift()
    link, x = join(links), torch.tensor([[1.0, -1.0]])
    q, g = link.query({(3, "main"): x}, Stored(1, 2)), link.gallery({(1, "main"): x}, Stored(1, 2))
    if side == "query":  # from 3 to 2 (twice), then from 2 to 1 (plus 1)
        assert torch.equal(q, 2 * x + 1) and torch.equal(g, x)
    else:  # items go from 1 to 2 (plus 1), then from 2 to 3 (twice)
        assert torch.equal(g, 2 * (x + 1)) and torch.equal(q, x)
    own = Stored(3, 2)
    assert torch.equal(link.query({(3, "main"): x}, own), x) and torch.equal(link.gallery({(3, "main"): x}, own), x)


class Shift(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def test_side_information_reaches_every_step() -> None:
    links = [
        Mapped(3, 1, 2, Times(2.0), side="gallery", unit=False),
        Mapped(2, 1, 1, Times(10.0), side="gallery", unit=False),
    ]
    g = {(1, "main"): torch.tensor([[1.0]]), (1, "side"): torch.tensor([[0.5]])}
    assert join(links).gallery(g, Stored(1, 1)).item() == 2.0 * (10.0 * 1 + 0.5) + 0.5


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Any:
    definition = protocol.load("digits@1", QUICK)
    task, store = runner.open_task(definition, None, "cpu"), Store(tmp_path_factory.mktemp("runs"))
    folder = tmp_path_factory.mktemp("records")

    def row(name: str, **given: Any) -> tuple[plan.Plan, Any]:
        built = plan.build(definition, plan.MethodRun.of(name, given), 0, task.fingerprint)
        runner.execute([built], task, store, threads=1)
        return built, results.assemble(built, task, store, folder / name)[0]

    return row


def test_bridges_train_no_release_and_share_the_oracles(rows: Any) -> None:
    built, record = rows("Ridge")
    assert [n.id for n in built.releases] == [n.id for n in built.bounds]
    assert [(x.release, x.stored) for x in record.links] == [(1, 0), (2, 1)]
    direct, record = rows("Ridge", direct=True)
    assert [(x.release, x.stored) for x in record.links] == [(1, 0), (2, 0), (2, 1)]
    assert direct.cells[1, 0] is not None and direct.cells[2, 1] is not None
    for t in range(3):
        assert built.cells[t, t].id == built.bound_cells[t, t].id  # type: ignore[union-attr]


def test_an_orthogonal_map_ranks_alike_on_either_side(rows: Any) -> None:
    query, gallery = rows("Procrustes")[1], rows("Procrustes", side="gallery")[1]
    for t, k in ((1, 0), (2, 1)):
        a, b = (r.matrices["map"]["all"][t][k] for r in (query, gallery))
        assert a == pytest.approx(b, abs=2e-3)


def test_fusion_at_weight_zero_is_the_old_system(rows: Any) -> None:
    record = rows("SLERP", weight=0.0)[1]
    for t, k in ((1, 0), (2, 0), (2, 1)):
        assert record.matrices["map"]["all"][t][k] == pytest.approx(record.matrices["map"]["all"][k][k], abs=1e-5)
    assert all(x.fusion == [0.0] for x in record.links)
    mapped, alone = rows("SLERP", weight=1.0)[1], rows("Procrustes")[1]
    assert mapped.matrices["map"]["all"][2][0] == pytest.approx(alone.matrices["map"]["all"][2][0], abs=1e-6)


D = 16  # of every release
SMALL = {"hidden": 24}
AFFINE = D * D + D
RQT = (D * 512 + 512) + 2 * 512 + (512 * 512 + 512) + 2 * 512 + (512 * D + D)  # batch norm: scale and shift
RQT_ADDS = D * 512 + 512 * 512 + 512 * D


def transformation(d: int, hidden: int) -> int:
    """Parameters of FCT's network of one dim, batch norm's scale and shift included, layer by layer."""
    branch = (d * 2 * d + 2 * 2 * d) + (2 * d * 2 * d + 2 * 2 * d)
    return 2 * branch + (4 * d * hidden + 2 * hidden) + (hidden * hidden + 2 * hidden) + (hidden * d + d)


def above(one: list[int], other: list[int]) -> list[int]:
    return [a - b for a, b in zip(one, other, strict=True)]


def test_numbers_of_a_map_are_counted_once() -> None:
    assert transformation(128, 2048) == numbers(Transformation(128, 128, 128, 2048)) == 5_712_000
    assert numbers(adapters.KINDS["Ridge"](16, 8)) == 16 * 8 + 8  # closed forms keep their solution in buffers
    assert numbers(orthogonal(nn.Linear(16, 16, bias=False))) == 16 * 16
    assert numbers(rqt.layers(64, 512, 64)) == 330_816
    assert numbers(nn.Identity()) == 0


@pytest.mark.parametrize(
    ("name", "given", "trained", "released"),  # by each step
    [
        ("Identity", {}, 0, 0),
        ("Merge", {}, 0, 0),
        ("Ridge", {}, AFFINE, AFFINE),
        ("RQT", {}, RQT, RQT),
        ("FCT-noside", SMALL, transformation(D, 24), transformation(D, 24)),
        ("LambdaOrthogonality", {}, D * D + AFFINE, D * D + AFFINE),
        ("LambdaOrthogonality-relaxed", {}, 2 * AFFINE, 2 * AFFINE),
        ("LambdaOrthogonality-backward", {}, D * D + AFFINE, D * D),  # its forward map is trained, and serves nothing
    ],
)
def test_the_parameters_of_maps_are_billed(rows: Any, name: str, given: Any, trained: int, released: int) -> None:
    plain, record = rows("Independent")[1].cost, rows(name, **given)[1]
    added = [0, 1, 2] if len(record.links) == 3 else [0, 1, 1]  # direct: the last update adds two maps
    assert [link.parameters for link in record.links] == [released] * sum(added)
    assert above(record.cost.trained_parameters, plain.trained_parameters) == [n * trained for n in added]
    assert above(record.cost.released_parameters, plain.released_parameters) == [n * released for n in added]


def test_a_release_trained_with_its_map_is_billed_for_both(rows: Any) -> None:
    plain, record = rows("Independent")[1].cost, rows("RQT-MCL-embedding")[1]
    cost, both = record.cost, [0, 2 * RQT, 2 * RQT]  # psi_r and rho, which is of the same size here
    assert [(x.release, x.stored, x.parameters) for x in record.links] == [(1, 0, RQT), (2, 1, RQT)]
    assert above(cost.trained_parameters, plain.trained_parameters) == both
    assert above(cost.released_parameters, plain.released_parameters) == both
    assert above(cost.query_multiply_adds, plain.query_multiply_adds) == [0, 2 * RQT_ADDS, 3 * RQT_ADDS]  # 3 -> 2 -> 1
    assert cost.vectors_rewritten == 0 and cost.query_encoders == 1


def test_serving_queries_is_billed(rows: Any) -> None:
    plain = rows("Independent")[1].cost
    assert rows("Identity")[1].cost == plain and plain.gallery_multiply_adds == plain.ingest_multiply_adds == []
    first, second, _ = encoders = plain.query_multiply_adds
    one, both, merged = (rows(name)[1].cost for name in ("Procrustes", "SLERP", "Merge"))
    assert (one.query_encoders, both.query_encoders, merged.query_encoders) == (1, 2, 2)
    assert above(one.query_multiply_adds, encoders) == [0, D * D, 2 * D * D]  # 3 -> 2 -> 1 passes two maps
    dearest = max(second + D * D, first + 2 * D * D)  # of one gallery, not the dearest parts of several
    assert above(both.query_multiply_adds, encoders) == [0, first + D * D, dearest]
    assert above(merged.query_multiply_adds, encoders) == [0, first, max(first, second)]


def test_moving_a_gallery_is_billed(rows: Any) -> None:
    plain, bare, fct = (
        rows(name, **given)[1].cost for name, given in (("Independent", {}), ("FCT-noside", SMALL), ("FCT", SMALL))
    )
    step = multiply_adds(Transformation(D, D, D, 24))
    assert fct.gallery_multiply_adds == bare.gallery_multiply_adds == [0, step, step]  # an update passes what it adds
    assert fct.vectors_rewritten == bare.vectors_rewritten > 0
    assert fct.training_images > bare.training_images > plain.training_images  # SimCLR, then the transformation


def test_side_information_is_billed(rows: Any) -> None:
    plain, bare, fct = (
        rows(name, **given)[1].cost for name, given in (("Independent", {}), ("FCT-noside", SMALL), ("FCT", SMALL))
    )
    simclr = plain.released_parameters[0]  # a network as the first release's
    assert above(fct.released_parameters, bare.released_parameters) == [simclr] * 3
    assert above(fct.trained_parameters, bare.trained_parameters) == [
        simclr + D * D + D + D * D,
        0,
        0,
    ]  # its projection
    assert bare.ingest_multiply_adds == []
    assert above(fct.ingest_multiply_adds, plain.query_multiply_adds) == [plain.query_multiply_adds[0]] * 3


@pytest.mark.parametrize(
    ("name", "given", "vectors"),  # per item, by release
    [
        ("Ridge-gallery", {}, [1, 1, 1]),  # a chain moves what the last update left
        ("Ridge-gallery", {"direct": True}, [1, 2, 2]),  # the next update's maps read the originals
        ("Ridge", {"direct": True}, [1, 1, 1]),
        ("FCT", SMALL, [2, 2, 2]),
        ("FCT-noside", SMALL, [1, 1, 1]),
        ("FCT-direct", SMALL, [2, 3, 3]),
        ("LambdaOrthogonality", {}, [1, 2, 2]),
        ("LambdaOrthogonality-backward", {}, [1, 1, 1]),
    ],
)
def test_originals_that_a_later_map_reads_are_billed(rows: Any, name: str, given: Any, vectors: list[int]) -> None:
    assert rows(name, **given)[1].cost.bytes_per_item == [4 * D * n for n in vectors]


def test_fewer_pairs_are_drawn_from_the_seed(rows: Any, tmp_path: Path) -> None:
    few = rows("Ridge", pairs=40)[1]
    assert [x.pairs for x in few.links] == [40, 40]
    assert few.matrices["map"]["all"][2][0] != rows("Ridge")[1].matrices["map"]["all"][2][0]
