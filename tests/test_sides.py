"""Stored embeddings of images and texts: numbers of a small case, and every mixture that is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from benchmark.captions import CaptionDataset
from benchmark.errors import UserError
from benchmark.sides import Side, evaluate, join, load, save

DATA = CaptionDataset(["i", "j"], [Path("i.png"), Path("j.png")], [["one", "both"], ["two", "both "]])
IMAGES = Side("image", torch.tensor([[1.0, 0.0], [0.0, 1.0]]), ["i", "j"], "m1", "p1")
TEXTS = Side(
    "text", F.normalize(torch.tensor([[0.9, 0.1], [1.0, 0.95], [0.6, 0.4]])), ["one", "both", "two"], "m1", "p1"
)


def stored(root: Path, one: Side, name: str = "", **changes: Any) -> Path:
    path = root / f"{name or one.side}.safetensors"
    save(path, replace(one, **changes))
    return path


def test_equal_captions_are_one_text_and_fit_both_images(tmp_path: Path) -> None:
    found = evaluate([stored(tmp_path, IMAGES)], [stored(tmp_path, TEXTS)], DATA, ks=(1, 3))
    assert found["I2T"]["r@1"] == 1.0  # of j, "both" lies nearest, which is its own caption too
    assert found["T2I"]["r@1"] == 3 / 4 and found["T2I"]["queries"] == 4  # "two" finds i
    assert found["I2T"]["gallery"] == 4 and found["I2T"]["chance@1"] == pytest.approx(3 / 4)


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    back = load(stored(tmp_path, TEXTS))
    assert torch.equal(back.vectors, TEXTS.vectors) and (back.ids, back.model) == (TEXTS.ids, "m1") and back.normalised


def test_a_gallery_of_two_models_is_refused(tmp_path: Path) -> None:
    first = stored(tmp_path, IMAGES)
    for change, message in (
        ({"model": "m2"}, "made by model m2"),
        ({"preprocess": "p2"}, "made by preprocess p2"),
        ({"vectors": 2 * IMAGES.vectors}, "normalise both or neither"),
        ({"side": "text"}, "holds text embeddings"),
        ({"ids": ["i", "k"]}, "1 items twice"),
    ):
        second = stored(tmp_path, replace(IMAGES, ids=["k", "l"]), "second", **change)
        with pytest.raises(UserError, match=message):
            join([first, second], "image")
    assert len(join([first, stored(tmp_path, IMAGES, "second", ids=["k", "l"])], "image").ids) == 4


def test_sides_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    images = [stored(tmp_path, IMAGES)]
    with pytest.raises(UserError, match="the images are unit vectors, the texts are not"):
        evaluate(images, [stored(tmp_path, TEXTS, vectors=3 * TEXTS.vectors)], DATA)
    other = [stored(tmp_path, TEXTS, model="m2")]
    with pytest.raises(UserError, match="images were embedded by model m1, texts by m2"):
        evaluate(images, other, DATA)
    assert evaluate(images, other, DATA, compatible=True)["I2T"]["r@1"] == 1.0
    with pytest.raises(UserError, match="1 of 3 texts have no embedding, first 'two'"):
        evaluate(images, [stored(tmp_path, TEXTS, vectors=TEXTS.vectors[:2], ids=["one", "both"])], DATA)


def test_files_without_origin_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"vectors": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"no")
    for name, message in (("a", "does not say which model"), ("b", "cannot be read"), ("c", "cannot be read")):
        with pytest.raises(UserError, match=message):
            load(tmp_path / f"{name}.safetensors")
