"""Two-sided encoders from open_clip: each its own preprocessing and tokenizer, and what would ruin a number in silence."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmark.errors import UserError
from benchmark.towers import Preprocess, Spec, check_activation, word_tokenizer

CONFIG = {
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "width": 16, "heads": 1, "layers": 1},
}


def photo(width: int, height: int) -> Image.Image:
    torch.manual_seed(width)
    return Image.fromarray((torch.rand(height, width, 3) * 255).byte().numpy())


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("size", [(50, 31), (31, 50), (40, 40), (17, 90)])
def test_preprocessing_equals_open_clips(size: tuple[int, int], mode: str) -> None:
    from open_clip.transform import image_transform

    ours, image = Preprocess(24, resize_mode=mode), photo(*size)
    theirs = image_transform(24, is_train=False, mean=ours.mean, std=ours.std, resize_mode=mode)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (ours.mean, ours.std))
    assert torch.allclose((ours.pixels(image).float() / 255 - mean) / std, theirs(image), atol=1e-5)


def test_preprocessings_that_differ_have_other_ids() -> None:
    one = Preprocess(24)
    assert one.id == Preprocess(24).id
    assert len({one.id, Preprocess(32).id, Preprocess(24, mean=(0.5, 0.5, 0.5)).id}) == 3
    with pytest.raises(UserError, match="resize_mode longest"):
        Preprocess(24, resize_mode="longest")


def test_the_word_tokenizer_knows_its_words_marks_its_ends_and_counts_what_it_cuts() -> None:
    tokenizer, size = word_tokenizer(["A red plane.", "two red cars"], 6)
    assert size == 3 + 5 + 1  # padding, unknown, start; a cars plane red two; end
    assert tokenizer(["a red boat", "Two red, red red red cars"]).tolist() == [[2, 3, 6, 1, 8, 0], [2, 7, 6, 6, 6, 8]]
    assert tokenizer.cut(["a red boat", "two red red red red cars", "a a a a"]) == 1
    assert tokenizer.id != word_tokenizer(["a red plane"], 6)[0].id


def test_the_end_mark_is_what_open_clip_pools() -> None:
    spec = Spec.of("open_clip", {"config": CONFIG}, 8)
    corpus = ["a red plane", "two cars"]
    model, tokenizer = spec.build(corpus).eval(), spec.tokenizer(corpus)
    tokens = tokenizer(["a red plane"])
    more = tokens.clone()
    more[0, 6:] = 1  # after the end mark: causal attention, so it changes nothing
    assert torch.allclose(model.text(tokens), model.text(more), atol=1e-6)
    more[0, 1] = 1
    assert not torch.allclose(model.text(tokens), model.text(more), atol=1e-4)


def test_bpe_tokens_count_what_they_cut() -> None:
    config = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "tokenizer": "bpe"}}
    tokenizer = Spec.of("open_clip", {"config": config}, 8).tokenizer([])
    assert tokenizer(["a photo of a cat"]).shape == (1, 8)
    assert tokenizer.cut(["a photo of a cat", "a photo of a cat and of a dog"]) == 1


def test_a_config_from_a_json_file_is_the_same_network(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(json.dumps({"embed_dim": 99, **CONFIG}))
    built = []
    for config in (CONFIG, str(tmp_path / "own.json")):
        torch.manual_seed(0)
        built.append(Spec.of("open_clip", {"config": config}, 8).build(["a b"]).state_dict())
    assert all(torch.equal(built[0][name], built[1][name]) for name in built[0])
    assert built[0]["model.text_projection"].shape == (16, 8)


def test_a_local_folder_is_read_with_its_own_preprocessing(tmp_path: Path) -> None:
    import open_clip

    torch.manual_seed(0)
    text = {**CONFIG["text_cfg"], "vocab_size": 49408}
    model = open_clip.CLIP(embed_dim=8, vision_cfg=dict(CONFIG["vision_cfg"]), text_cfg=dict(text))
    preprocess = {"size": 16, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear"}
    config = {
        "model_cfg": {"embed_dim": 8, "vision_cfg": CONFIG["vision_cfg"], "text_cfg": text},
        "preprocess_cfg": preprocess,
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    spec = Spec.of(f"open_clip/local-dir:{tmp_path}", {}, 8)
    assert spec.pretrained and spec.preprocess == Preprocess(16, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear")
    built, tokenizer = spec.build([]), spec.tokenizer([])
    state = model.state_dict()
    assert all(torch.equal(value, state[name.removeprefix("model.")]) for name, value in built.state_dict().items())
    assert tokenizer(["a cat"]).shape == (1, 8) and spec.build([]).model is not built.model
    with pytest.raises(UserError, match=r"embeds into 8 dims, the protocol's release says 16; set dim: 8"):
        Spec.of(f"open_clip/local-dir:{tmp_path}", {}, 16).build([])


BROKEN: dict[str, tuple[str, dict[str, Any], str]] = {
    "no text tower": ("convnet", {}, "has no text tower"),
    "no config": ("open_clip", {}, "needs a config with vision_cfg and text_cfg"),
    "half a config": ("open_clip", {"config": {"vision_cfg": {}}}, "needs a config"),
    "config file": ("open_clip", {"config": "/no/such.json"}, "cannot be read"),
    "argument": ("open_clip/ViT-B-32", {"pretraind": "openai"}, "unknown argument.*pretrained"),
    "model": ("open_clip/ViT-B-23", {"pretrained": "openai"}, "unknown model of open_clip 'ViT-B-23'.*ViT-B-32"),
    "weights": ("open_clip/ViT-B-32", {"pretrained": "opnai"}, "unknown pretrained weights.*openai"),
    "quickgelu": (
        "open_clip/ViT-B-32",
        {"pretrained": "openai"},
        "trained with QuickGELU; take the model ViT-B-32-quickgelu",
    ),
    "folder": ("open_clip/local-dir:/nowhere", {}, "no open_clip_config.json in /nowhere"),
    "own config": ("open_clip", {"config": {**CONFIG, "vision_cgf": {}}}, "not one of open_clip's"),
}


@pytest.mark.parametrize("backbone, args, message", BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_built_is_named(backbone: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Spec.of(backbone, args, 8).build(["a b"])


def test_activations_are_checked_both_ways() -> None:
    check_activation("ViT-B-32-quickgelu", "openai")
    check_activation("ViT-B-32", "openai", forced=True)
    check_activation("ViT-B-32", "laion2b_s34b_b79k")
    with pytest.raises(UserError, match="without QuickGELU; take the model ViT-B-32"):
        check_activation("ViT-B-32", "laion2b_s34b_b79k", forced=True)


def test_a_hub_name_without_network_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"cannot be fetched.*name its folder.*local-dir:/path"):
        Spec.of("open_clip/hf-hub:nobody/no-such-model", {}, 8).build([])
    assert time.monotonic() - started < 30
