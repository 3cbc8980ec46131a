"""The cross-modal task: lists, strata, what releases read, refusals; a chain of three pretrained releases end to end."""

from __future__ import annotations

import json
import os
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from benchmark import captions, embeddings, plan, protocol, results, runner, zeroshot
from benchmark.errors import UserError
from benchmark.store import Store
from benchmark.towers import Spec, check_activation
from tasks.crossmodal import Crossmodal

DEMO = "digitcaptions@1"
UCM = os.environ.get("COMPATBENCH_UCM")


@pytest.fixture(scope="module")
def demo() -> Any:
    return runner.open_task(protocol.load(DEMO), None, "cpu")


def test_no_release_sees_an_evaluation_image(demo: Any) -> None:
    train = {demo.parts["train"].image_ids[i] for i in demo.train_index(1)}
    for split, sets in demo.tests.items():
        for one in sets:
            assert not train & {*one.data.image_ids}, split
    assert len(demo.tests["validation"][0].index) == 10 * demo.heldout
    old, new = (set(demo.train_index(t)) for t in (0, 1))
    assert old < new and len(old) == pytest.approx(len(new) / 2, abs=5)


def test_each_release_reads_its_own_pixels_and_its_own_words(demo: Any) -> None:
    for t, size in ((0, 32), (1, 16)):
        batch = next(iter(demo.side_loader("test", "image", t)))
        assert batch.x["image"].shape[1:] == (3, size, size)
        tokens = next(iter(demo.side_loader("test", "text", t))).x["text"]
        assert tokens.shape == (len(demo.texts("test")), (10, 12)[t])
    assert demo.images("test" if "test" in demo.parts else "digits", 0).shape[-1] == 32


def test_the_pairs_of_a_batch_belong_together_and_change_with_the_epoch(demo: Any) -> None:
    loader, texts, index = demo.train_loader(1, "train", 0), demo.train_texts(1), demo.train_index(1)
    seen = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        batches = list(loader)
        for batch in batches:
            for row, image in zip(batch.x["caption"].tolist(), batch.index.tolist()):
                assert texts[row] in demo.parts["train"].captions[index[image]]
            assert torch.equal(batch.x["text"], loader.tokens[batch.x["caption"]])
        seen.append(torch.cat([batch.x["caption"] for batch in batches]))
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])
    assert len(demo.train_loader(1, "train:40", 0).images) == 40


def test_strata_are_directions_and_whether_training_holds_the_caption(demo: Any) -> None:
    masks, one = demo.query_strata("test"), demo.tests["test"][0]
    images, captions = len(one.data), sum(len(own) for own in one.data.captions)
    known = {text for own in (demo.parts["train"].captions[i] for i in demo.train_index(1)) for text in own}
    flat = [text for own in one.data.captions for text in own]
    assert masks["I2T"].sum() == images and masks["T2I"].sum() == captions and masks["all"].all()
    assert masks["T2I-seen"][images:].tolist() == [text in known for text in flat]
    assert masks["I2T-seen"][:images].tolist() == [{*own} <= known for own in one.data.captions]
    assert torch.equal(masks["T2I"], masks["T2I-seen"] | masks["T2I-unseen"])
    assert len(demo.items("test", "query")[0]) == len(masks["all"])


def test_perfect_embeddings_score_one_and_the_facts_name_chance(demo: Any) -> None:
    texts, one = demo.texts("test"), demo.tests["test"][0]
    row = {text: i for i, text in enumerate(texts)}
    vectors = torch.eye(len(texts))
    images = torch.stack([vectors[[row[text] for text in own]].mean(0) for own in one.data.captions])
    scores = demo.score_all({"I2T": (images, vectors), "T2I": (vectors, images)}, "test")
    assert all(values["cmc@1"] == 1 for values in scores.metrics.values())
    assert all(len(values) == len(demo.items("test", "query")[0]) for values in scores.per_query.values())
    first, second = demo.facts()
    assert first.startswith("digits I2T: 240 queries, gallery of 720, chance R@1") and "class oracle" in second


def test_images_and_settings_are_part_of_the_fingerprint() -> None:
    prints = [
        runner.open_task(protocol.load(DEMO, ["fingerprint=null", *overrides]), None, "cpu").fingerprint
        for overrides in ([], [], ["task_args.heldout=3"], ["releases.0.samples=0.4"])
    ]
    assert prints[0] == prints[1] and len({*prints}) == 3


@pytest.mark.skipif(not UCM, reason="COMPATBENCH_UCM names no folder with UCM-Captions (dataset.json, images/)")
def test_chance_and_class_oracle_of_ucm_captions() -> None:
    task = runner.open_task(protocol.load("crossmodal-ucm@1"), Path(UCM or ""), "cpu")
    relevance, labels = task.tests["test"][0].relevance, task._labels("ucm")
    for direction in ("I2T", "T2I"):
        assert round(100 * relevance.chance(direction), 2) == 1.64
        assert round(100 * relevance.chance_by_index(), 2) == 0.24
        assert round(100 * relevance.class_oracle(direction, labels), 1) == 31.7
    assert task.facts()[0] == (
        "ucm I2T: 420 queries, gallery of 2,100, chance R@1 1.64 % by string (0.24 % by index), class oracle 31.7 %"
    )
    masks = task.query_strata("test")
    assert 0.8 < float(masks["T2I-seen"].sum() / masks["T2I"].sum()) < 0.9  # 0.89 of the whole training set's


# ------------------------------------------------------------------------------------ files, pretrained releases, chains

WORDS = ("red", "green", "blue", "plane", "car", "field", "house")


def local_model(folder: Path, dim: int, size: int) -> str:
    """A released model as open_clip stores one."""
    import open_clip

    text = {"context_length": 8, "width": 16, "heads": 1, "layers": 1, "vocab_size": 49408}
    vision = {"image_size": size, "layers": 1, "width": 16, "head_width": 16, "patch_size": 8}
    torch.manual_seed(dim)
    model = open_clip.CLIP(embed_dim=dim, vision_cfg=dict(vision), text_cfg=dict(text))
    folder.mkdir()
    config = {"model_cfg": {"embed_dim": dim, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {"size": size}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return f"open_clip/local-dir:{folder}"


def pictures(root: Path, name: str, count: int, seed: int, domains: bool = False) -> None:
    """Captioned images in COCO's own layout, in nocaps' with `domains`."""
    draw, entries, annotations = random.Random(seed), [], []
    (root / name).mkdir(parents=True)
    for i in range(count):
        colour = [draw.randrange(256) for _ in range(3)]
        Image.new("RGB", (20 + i % 3, 18), tuple(colour)).save(root / name / f"{i}.png")
        entries.append(
            {"id": i, "file_name": f"{i}.png"} | ({"domain": f"{'in' if i % 2 else 'out'}-domain"} if domains else {})
        )
        annotations += [
            {"id": 9 * i + j, "image_id": i, "caption": f"{name} {' '.join(draw.sample(WORDS, 3))} {i % 10}"}
            for j in range(3)
        ]
    (root / f"{name}.json").write_text(json.dumps({"images": entries, "annotations": annotations}))


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """crossmodal-clip@1 in small: three pretrained releases, two evaluation sets."""
    root = tmp_path_factory.mktemp("clip")
    pictures(root, "train", 60, 0), pictures(root, "val", 20, 1), pictures(root, "nocaps", 12, 2, domains=True)
    given = yaml.safe_load((protocol.LEADERBOARDS / "crossmodal-clip@1" / "protocol.yaml").read_text())
    given["task_args"]["train"] = {"source": "train.json", "images": "train"}
    given["task_args"]["test"] = {name: {"source": f"{name}.json", "images": name} for name in ("val", "nocaps")}
    for release, dim, size in zip(given["releases"], (8, 12, 16), (16, 16, 24)):
        folder = root / release["name"]
        release |= {"backbone": local_model(folder, dim, size), "backbone_args": {}, "dim": dim}
        release["recipe"] = {"epochs": 0, "batch_size": 16}
    (root / "protocol.yaml").write_text(yaml.safe_dump(given))
    return root


@pytest.mark.parametrize("name", ["Independent", "XBTText", "XBT", "Adapted", "Fused"])
def test_a_chain_of_three_pretrained_releases(name: str, released: Path, tmp_path: Path) -> None:
    definition = protocol.load(released / "protocol.yaml")
    task = runner.open_task(definition, released, "cpu")
    given = {"epochs": 1} if name.startswith("XBT") else {}
    made = plan.build(definition, plan.MethodRun.of(name, given), 0, task.fingerprint)
    store = Store(released / "runs")
    runner.execute([made], task, store, threads=1)
    defined = {at for at, node in made.cells.items() if node is not None}
    assert defined == (
        {(0, 0), (1, 1), (2, 2)} if name == "Independent" else {(t, k) for t in range(3) for k in range(t + 1)}
    )
    record, _ = results.assemble(made, task, store, tmp_path)
    assert record.cost.bytes_per_item == [4 * node.spec["dim"] for node in made.releases]  # no side information
    expected = {
        "all",
        "I2T",
        "T2I",
        "val I2T",
        "val T2I",
        "nocaps I2T",
        "nocaps T2I",
        "in-domain I2T",
        "out-domain T2I",
    }
    assert expected <= {*record.matrices["cmc@10"]} and record.queries["all"] == 4 * (20 + 12)
    assert record.cost.query_encoders == (2 if name == "Fused" else 1)
    assert [release.dim for release in record.releases] == ([8, 12, 16] if name == "Independent" else [8, 8, 8])


def test_methods_that_train_towers_say_so_where_releases_are_not_trained(released: Path) -> None:
    definition = protocol.load(released / "protocol.yaml")
    task = runner.open_task(definition, released, "cpu")
    made = plan.build(definition, plan.MethodRun.of("CrossBCT"), 0, task.fingerprint)
    with pytest.raises(UserError, match="CrossBCT trains its towers"):
        runner.execute([made], task, Store(released / "runs"), threads=1)


def test_embeddings_are_stored_with_model_and_preprocessing(released: Path) -> None:
    definition = protocol.load(released / "protocol.yaml")
    task = runner.open_task(definition, released, "cpu")
    made, store = (
        plan.build(definition, plan.MethodRun.of("Independent"), 0, task.fingerprint),
        Store(released / "runs"),
    )
    runner.execute([made], task, store, threads=1)
    ids: dict[int, set[tuple[bytes, bytes]]] = {0: set(), 1: set(), 2: set()}
    for node in made.nodes:
        if node.kind == "embed":
            stored: embeddings.Embeddings = store.embeddings(node)
            assert len(stored.ids) == len(next(iter(stored.views.values())))
            told = (bytes(stored.meta["model"].tolist()), bytes(stored.meta["preprocess"].tolist()))
            ids[node.inputs["encoder"].spec["t"]].add(told)
    assert all(len(found) == 1 for found in ids.values())
    assert len({model for found in ids.values() for model, _ in found}) == 3
    assert (
        len({prepared for found in ids.values() for _, prepared in found}) == 3
    )  # the tokenizer's model is part of it


def test_captions_longer_than_the_context_are_counted(released: Path) -> None:
    definition = protocol.load(released / "protocol.yaml")
    task = runner.open_task(definition, released, "cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        task.tokens(0, ["a plane", "a " + "very " * 20 + "long caption"], "the test")
    assert [str(one.message) for one in caught] == [
        "vit-b-32: 1 of 2 captions of the test are longer than its context (6 tokens) and are cut"
    ]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no test": ({"train": {"source": "train.json"}}, "name `train` and `test`"),
    "typo": ({"train": {"sorce": "x"}, "test": {"v": {"source": "x"}}}, r"unknown field of task_args.train 'sorce'"),
    "no file": ({"train": {"source": "no.json"}, "test": {"v": {"source": "x"}}}, "there is no such file"),
    "no validation": ({}, "holds out no images"),
}


@pytest.mark.parametrize("args, message", REFUSED.values(), ids=REFUSED)
def test_what_the_task_refuses(args: dict[str, Any], message: str, released: Path) -> None:
    definition = protocol.load(released / "protocol.yaml")
    with pytest.raises(UserError, match=message):
        Crossmodal(definition, released, **(args or definition.task_args)).items("validation", "image")
    with pytest.raises(UserError, match="there is no folder"):
        Crossmodal(definition, released / "nowhere", **definition.task_args)


def test_zero_shot_recalls_equal_open_clips_own_way(released: Path) -> None:
    """open_clip's loader, tokenizer and topk, by index, as CLIP_benchmark does it."""
    import open_clip

    folder = released / "vit-l-14"
    data = captions.read(released / "val.json", released / "val")
    found = zeroshot.recalls(Spec.of(f"open_clip/local-dir:{folder}", {}, 12), data, "cpu")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    with torch.no_grad():
        images = torch.stack([transform(Image.open(path)) for path in data.image_paths])
        z = model.eval().encode_image(images, normalize=True)
        texts = [text for own in data.captions for text in own]
        scores = z @ model.encode_text(tokenizer(texts), normalize=True).T  # (20, 60)
    for k, ours_i2t, ours_t2i in zip((1, 5, 10), found["I2T"], found["T2I"]):
        i2t = [any(j // 3 == i for j in row) for i, row in enumerate(scores.topk(k).indices.tolist())]
        t2i = [i // 3 in row for i, row in enumerate(scores.T.topk(k).indices.tolist())]
        assert ours_i2t == pytest.approx(100 * sum(i2t) / 20, abs=0.3) and ours_t2i == pytest.approx(
            100 * sum(t2i) / 60, abs=0.3
        )


def test_zero_shot_names_are_checked_before_any_download() -> None:
    for name, published in zeroshot.PUBLISHED.items():
        model, _, tag = name.partition(":")
        check_activation(model, tag)
        assert all(0 < a < b < c < 100 for part in published[1:] for a, b, c in part.values())
    with pytest.raises(UserError, match="unknown model with published numbers"):
        zeroshot.check(Path("data"), ["ViT-B-32:openai"], "cpu")
