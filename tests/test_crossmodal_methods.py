"""Every cross-modal method on the demo, and what XBT-style promises: all of LoRA is trained, the new model is untouched."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmark import catalog, plan, protocol, runner, training
from benchmark.embeddings import Stored
from benchmark.errors import UserError
from benchmark.heads import contrastive
from benchmark.method import Context
from benchmark.methods.crossmodal._mapped import add_lora, remove_lora
from benchmark.store import Store
from benchmark.towers import Spec
from tests.resuming import assert_resumes_bit_for_bit

NAMES = catalog.names("two-sided method")
QUICK = ["releases.0.recipe.epochs=1", "releases.1.recipe.epochs=1"]
CONFIG = {
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 4},
    "text_cfg": {"context_length": 8, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def run(name: str, root: Path, *overrides: str, **given: Any) -> tuple[plan.Plan, Store, Any]:
    definition = protocol.load("digitcaptions@1", [*QUICK, *overrides])
    task = runner.open_task(definition, None, "cpu")
    made = plan.build(definition, plan.MethodRun.of(name, given), 0, task.fingerprint)
    store = Store(root)
    runner.execute([made], task, store, threads=1)
    return made, store, task


def stages(name: str) -> dict[str, Any]:
    """Short second stages, for tests of their form."""
    defaults = catalog.method(name)[1]
    return {"epochs": 1} if "epochs" in defaults else {}


@pytest.mark.parametrize("name", NAMES)
def test_fills_all_cells_in_both_directions(name: str, root: Path) -> None:
    made, store, _ = run(name, root, **stages(name))
    for at, node in made.cells.items():
        assert node is not None, f"cell {at} is undefined"
        scores = store.read_json(node, "scores.json")
        assert {"all", "I2T", "T2I", "I2T-unseen", "T2I-seen", "T2I-unseen"} <= {*scores}
        for direction in ("I2T", "T2I"):
            assert 0 <= scores[direction]["cmc@1"] <= scores[direction]["cmc@5"] <= scores[direction]["cmc@10"] <= 1
        assert scores["I2T"]["queries"] + scores["T2I"]["queries"] == scores["all"]["queries"]
        assert scores["T2I-seen"]["queries"] + scores["T2I-unseen"]["queries"] == scores["T2I"]["queries"]
    facts = store.read_json(made.releases[1], "train.json")
    assert all(math.isfinite(value) for epoch in facts["history"] for value in epoch.values())
    old, own = made.bounds[0].spec["dim"], made.releases[1].spec["dim"]
    assert own == old or name.startswith("Cross")  # all but those two store vectors of the old space


@pytest.mark.parametrize("name", ["XBTText", "XBT", "CrossBCT", "CrossBT2"])
def test_interrupted_and_resumed_it_ends_bit_for_bit_as_it_would_have(name: str, root: Path) -> None:
    given = {"epochs": 3} if name.startswith("XBT") else {}
    made, store, task = run(name, root, "releases.1.recipe.epochs=3", **given)
    assert_resumes_bit_for_bit(made.releases[1], task, store)


@pytest.mark.parametrize("name", catalog.entries("two-sided method"))
def test_every_hyperparameter_is_explained(name: str) -> None:
    cls, defaults = catalog.method(name)
    assert {*defaults} <= {*catalog.argument_docs(cls)} and {*cls.space} <= {*defaults}


def test_methods_and_tasks_that_do_not_fit_are_refused() -> None:
    for name, board in (("BCT", "digitcaptions@1"), ("XBT", "digits@1"), ("Adapted", "digits@1")):
        with pytest.raises(UserError, match=f"{name} is a method for images"):
            plan.build(protocol.load(board), plan.MethodRun.of(name), 0, "data")


# ------------------------------------------------------------------------------------------------------------ LoRA


def small() -> tuple[torch.nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Spec.of("open_clip", {"config": CONFIG}, 16).build(["a b c d e f"]).model.eval()
    tokens = torch.tensor([[2, 3, 4, 9, 0, 0, 0, 0], [2, 5, 6, 7, 9, 0, 0, 0]])
    return model, {"image": torch.randn(2, 3, 16, 16), "text": tokens}


def embed(model: Any, x: dict[str, Tensor]) -> list[Tensor]:
    return [model.encode_image(x["image"]), model.encode_text(x["text"])]


def test_every_lora_parameter_gets_a_gradient() -> None:
    model, x = small()
    add_lora(model, 4, 8)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 4 * 2 * 2  # A and B of in_proj, out_proj, c_fc, c_proj, two blocks in each tower
    for name, parameter in trained.items():
        if "lora_B" in name:  # B starts at zero, and A has no gradient before B has moved
            torch.nn.init.normal_(parameter, std=0.02)
    sum(z.square().sum() for z in embed(model, x)).backward()
    assert not [name for name, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0]


def test_lora_on_out_proj_alone_is_never_trained() -> None:
    """The trap that `add_lora` avoids."""
    from peft import LoraConfig, inject_adapter_in_model

    model, x = small()
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["out_proj"]), model)
    assert sum(p.requires_grad for p in model.parameters()) == 8  # and yet nothing depends on them:
    assert not any(z.requires_grad for z in embed(model, x))


def test_removing_lora_gives_the_new_model_back_bit_for_bit(root: Path) -> None:
    made, store, task = run("XBT", root, epochs=1)
    adapted, _ = training.load_released(made.releases[1], task, store)
    original, _ = training.load_released(made.bounds[1], task, store)
    x = task.sample(1)
    changed, kept = adapted.network.towers(x), original.network(x)
    assert not torch.equal(changed["image"], kept["image"]) and not torch.equal(changed["text"], kept["text"])
    remove_lora(adapted.network.towers.model)
    state, expected = adapted.network.towers.state_dict(), original.network.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
    back = adapted.network.towers(x)
    assert torch.equal(back["image"], kept["image"]) and torch.equal(back["text"], kept["text"])


def test_forward_passes_leave_no_trace_in_the_frozen_weights() -> None:
    """peft alone adds and subtracts the update of the attention in every pass, and loses bits."""
    model, x = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    add_lora(model, 4, 8)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    for mode in (True, False):
        model.train(mode)
        for _ in range(3):
            sum(z.square().sum() for z in embed(model, x)).backward()
    after = remove_lora(model).state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


# ---------------------------------------------------------------------------------------------------------- losses


def test_the_pair_loss_is_open_clips_where_no_caption_is_repeated() -> None:
    from open_clip import ClipLoss

    torch.manual_seed(0)
    a, b = torch.randn(6, 4), torch.randn(6, 4)
    expected = ClipLoss()(F.normalize(a), F.normalize(b), torch.tensor(7.0))
    assert float(contrastive(a, b, 7.0, torch.arange(6))) == pytest.approx(float(expected), abs=1e-6)


def naive_pair_loss(a: Tensor, b: Tensor, scale: float, ids: list[int]) -> float:
    total = 0.0
    for x, y in ((a.detach(), b.detach()), (b.detach(), a.detach())):
        for i in range(len(x)):
            cosines = [float(x[i] @ y[j] / x[i].norm() / y[j].norm()) for j in range(len(y))]
            others = [math.exp(scale * c) for j, c in enumerate(cosines) if j == i or ids[j] != ids[i]]
            total -= math.log(math.exp(scale * cosines[i]) / sum(others))
    return total / 2 / len(a)


def test_a_repeated_caption_is_no_negative() -> None:
    torch.manual_seed(1)
    a, b, ids = torch.randn(6, 4), torch.randn(6, 4), [0, 1, 0, 2, 1, 0]
    assert float(contrastive(a, b, 5.0, torch.tensor(ids))) == pytest.approx(naive_pair_loss(a, b, 5.0, ids), abs=1e-5)


def teachers(name: str, root: Path, **given: Any) -> tuple[Any, Any]:
    """The method before its first step, as the engine makes it, and a training batch."""
    made, store, task = run(name, root, **given)
    node = made.releases[1]
    encoders, embeddings = {}, {}
    for key, source in node.inputs.items():
        if source.kind == "embed":
            embeddings[key] = store.embeddings(source)
        else:
            encoders[key] = training.load_released(source, task, store)[0]
    loader = lambda view: task.train_loader(1, view, 0)  # noqa: E731
    bare = training.bare_context(node.spec, task)
    method = training.build(node, Context(**bare, encoders=encoders, embeddings=embeddings, loader=loader))
    return method.eval(), next(iter(loader(method.view)))


def cosine(a: Tensor, b: Tensor) -> list[float]:
    return [float(x @ y / x.norm() / y.norm()) for x, y in zip(a.detach(), b.detach())]


def test_stage_one_equals_its_formula_and_starts_as_procrustes(root: Path) -> None:
    method, batch = teachers("XBTText", root, sigma=0.0, epochs=1)
    x, y = method.new[batch.index], method.old[batch.index]
    mapped = x @ procrustes(method.new[clean(method)], method.old[clean(method)])
    scale = float(method.context.encoders["old"].network.logit_scale.exp())
    terms = {name: float(value.detach()) for name, value in method.loss(batch).items()}
    assert terms["match"] == pytest.approx(1 - sum(cosine(mapped, y)) / len(y), abs=1e-5)
    assert terms["contrast"] == pytest.approx(naive_pair_loss(mapped, y, scale, [*range(len(y))]), abs=1e-4)


def clean(method: Any) -> Tensor:
    return method.context.embeddings["new_texts"].labels == 0


def test_stage_one_never_sees_a_test_caption(root: Path) -> None:
    method, _ = teachers("XBTText", root, epochs=1)
    task = runner.open_task(protocol.load("digitcaptions@1", QUICK), None, "cpu")
    texts, test = task.train_texts(1), {*task.texts("test")}
    rows = [row for batch in method.context.loader("texts") for row in batch.index.tolist()]
    assert rows and not {texts[row] for row in rows} & test and {*texts} & test


def test_the_noise_has_the_norm_that_sigma_says(root: Path) -> None:
    method, batch = teachers("XBTText", root, sigma=0.5, epochs=1)
    seen = []
    method.phi.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for _ in range(50):
        method.loss(batch)
    z = method.new[batch.index]
    expected = 1 / (1 + 0.5**2) ** 0.5  # cosine of a unit vector with itself plus orthogonal noise of norm sigma
    assert sum(sum(cosine(z, noisy)) / len(z) for noisy in seen) / 50 == pytest.approx(expected, abs=0.01)


def test_stage_two_equals_its_formula(root: Path) -> None:
    method, batch = teachers("XBT", root, epochs=1)
    z, s = method.network(batch.x), method.texts[batch.x["caption"]]
    u, v, ids = z["image"], z["text"], batch.x["caption"].tolist()
    scale = float(method.context.encoders["stage1"].network.logit_scale.exp())
    terms = {name: float(value.detach()) for name, value in method.loss(batch).items()}
    assert terms["image_to_old"] == pytest.approx(naive_pair_loss(u, s, scale, ids), abs=1e-4)
    assert terms["text_stays"] == pytest.approx(1 - sum(cosine(v, s)) / len(s), abs=1e-5)
    assert terms["pair"] == pytest.approx(naive_pair_loss(u, v, scale, ids), abs=1e-4)
    assert terms["text_stays"] == pytest.approx(0, abs=1e-5)  # LoRA starts at zero and phi as phi_0


def test_bct_on_two_towers_equals_its_formula(root: Path) -> None:
    method, batch = teachers("CrossBCT", root)
    z, ids = method.backbone(batch.x), batch.x["caption"].tolist()
    old_text = method.context.embeddings["old_text"].views[0, "text"][batch.x["caption"]]
    old_image = method.context.embeddings["old_image"].views[0, "image"][batch.index]
    scale, old_scale = (
        float(network.logit_scale.detach().exp())
        for network in (method.backbone, method.context.encoders["old"].network)
    )
    d, terms = old_text.shape[1], method.loss(batch)
    expected = [naive_pair_loss(z[s][:, :d], o, old_scale, ids) for s, o in (("image", old_text), ("text", old_image))]
    assert terms["influence"].item() == pytest.approx(sum(expected) / 2, abs=1e-4)
    assert float(terms["contrastive"]) == pytest.approx(naive_pair_loss(z["image"], z["text"], scale, ids), abs=1e-4)


def test_bt2_on_two_towers_equals_its_formula(root: Path) -> None:
    method, batch = teachers("CrossBT2", root)
    rows, ids = {"image": batch.index, "text": batch.x["caption"]}, batch.x["caption"].tolist()
    old, oracle = (
        {s: method.context.embeddings[f"{n}_{s}"].views[r, s][rows[s]] for s in rows}
        for n, r in (("old", 0), ("oracle", 1))
    )
    v, f = method.network(batch.x), {s: F.normalize(g[:, :24]) for s, g in method.network.towers(batch.x).items()}
    b, scale = {s: z[:, :16] for s, z in v.items()}, float(method.context.encoders["old"].network.logit_scale.exp())
    terms = {name: float(value.detach()) for name, value in method.loss(batch).items()}
    assert terms["match_new"] == pytest.approx(
        sum(1 - sum(cosine(f[s], oracle[s])) / len(ids) for s in f) / 2, abs=1e-4
    )
    assert terms["match_old"] == pytest.approx(
        5 * sum(1 - sum(cosine(b[s], old[s])) / len(ids) for s in b) / 2, abs=1e-4
    )
    influence = [naive_pair_loss(b[s], old[o], scale, ids) for s, o in (("image", "text"), ("text", "image"))]
    assert terms["influence"] == pytest.approx(sum(influence) / 2, abs=1e-4)
    assert all(float(z.square().sum(1).mean()) == pytest.approx(1 + 2.0**2, abs=1e-4) for z in v.values())
    # the new part is in one basis on both sides: <v_i, v_t> = <u_i, u_t> + energy^2 <f_i, f_t>
    u = {s: F.normalize(method.network.change.old_branch(g)) for s, g in method.network.towers(batch.x).items()}
    expected = (u["image"] * u["text"]).sum(1) + 4 * (f["image"] * f["text"]).sum(1)
    assert torch.allclose((v["image"] * v["text"]).sum(1), expected, atol=1e-4)


# --------------------------------------------------------------------------------------------------------- post hoc


def solved(name: str, root: Path, **given: Any) -> Any:
    method, _ = teachers(name, root, **given)
    method.solve()
    return method


def procrustes(source: Tensor, target: Tensor) -> Tensor:
    left, _, right = np.linalg.svd((source.double().T @ target.double()).numpy(), full_matrices=False)
    return torch.from_numpy(left @ right).float()


def test_adapters_are_fitted_to_the_support_that_is_named(root: Path) -> None:
    method = solved("Adapted", root, per_side=True)
    stored, expected = method.context.embeddings, {}
    for side in ("image", "text"):
        new, old = (F.normalize(stored[f"{n}_{side}"].views[r, side]) for n, r in (("new", 1), ("old", 0)))
        kept = stored["new_text"].labels == 0 if side == "text" else torch.ones(len(new), dtype=torch.bool)
        expected[side] = procrustes(new[kept], old[kept])
    assert torch.allclose(method.network.maps[0].weight, expected["image"], atol=1e-5)
    assert torch.allclose(method.network.maps[1].weight, expected["text"], atol=1e-5)
    (only,) = solved("Adapted", root).network.maps
    assert torch.allclose(only.weight, expected["text"], atol=1e-5)


def test_fusion_at_weight_zero_is_old_old_and_its_weight_is_the_best_on_the_training_pairs(root: Path) -> None:
    method = solved("Fused", root, fusion="nlerp")
    link, task = method.link(), runner.open_task(protocol.load("digitcaptions@1", QUICK), None, "cpu")
    stored = {n: method.context.embeddings[n].views[r, n[4:]] for n, r in (("old_image", 0), ("old_text", 0))}
    texts, train = task.train_texts(1), task.parts["train"]
    own = [{texts.index(text) for text in train.captions[i]} for i in task.train_index(1)]
    old, gallery = F.normalize(stored["old_image"]), F.normalize(stored["old_text"])
    new = F.normalize(
        F.normalize(method.context.embeddings["new_image"].views[1, "image"]) @ method.network.maps[0].weight
    )
    recalls = []
    for step in range(11):
        scores = F.normalize((1 - step / 10) * old + step / 10 * new) @ gallery.T
        best = [
            max(s[j] for j in mine) > max(s[j] for j in range(len(s)) if j not in mine)
            for s, mine in zip(scores.tolist(), own)
        ]
        recalls.append(sum(best) / len(best))
    assert float(link.image[0]) == pytest.approx(recalls.index(max(recalls)) / 10)
    link.image.zero_()
    views = {(0, "image"): stored["old_image"], (1, "image"): new}
    assert torch.equal(link.query(views, Stored(0, 16)), old)
