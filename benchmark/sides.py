"""Stored embeddings of images or texts with their origin: which items, which model, which preprocessing, normalised or not.

    save("images.safetensors", Side("image", vectors, image_ids, model, preprocess))
    evaluate(["images-0.safetensors", "images-1.safetensors"], ["texts.safetensors"], read("dataset.json", split="test"))

Files of one gallery must agree in all of it: a gallery of two models, or of unit vectors beside raw ones, gives numbers that
look right and are not.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as pack
from torch import Tensor

from benchmark.captions import CaptionDataset
from benchmark.crossmodal import KS, Relevance, evaluate_pairs
from benchmark.errors import UserError
from benchmark.files import write_bytes

HEADER = "compatbench.side"
UNIT = 1e-3  # by how much the length of a unit vector may be off (half precision)


@dataclass(frozen=True)
class Side:
    """Embeddings of one side.

    Attributes:
        vectors: (N, D) float32.
        ids: (N,) image ids, or the captions themselves; unique.
        model, preprocess: ids of the weights, and of the preprocessing or tokenizer.
    """

    side: Literal["image", "text"]
    vectors: Tensor
    ids: list[str]
    model: str
    preprocess: str

    @property
    def normalised(self) -> bool:
        """Whether all rows are unit vectors."""
        return bool(((self.vectors.norm(dim=1) - 1).abs() < UNIT).all())


def save(path: str | Path, side: Side) -> None:
    """One safetensors file; ids and origin as JSON in its header."""
    if len(side.ids) != len(side.vectors):
        raise UserError(f"{path}: {len(side.vectors)} {side.side} embeddings but {len(side.ids)} ids")
    told = {"side": side.side, "ids": side.ids, "model": side.model, "preprocess": side.preprocess}
    write_bytes(Path(path), pack({"vectors": side.vectors.float().contiguous()}, {HEADER: json.dumps(told)}))


def load(path: str | Path) -> Side:
    """What `save` wrote.

    Raises:
        UserError: missing, damaged, without origin, ids that do not fit.
    """
    try:
        with safe_open(path, "pt") as file:
            told = json.loads((file.metadata() or {}).get(HEADER, "null"))
            vectors = file.get_tensor("vectors") if told else None
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
    if told is None or vectors is None:
        raise UserError(f"{path}: does not say which model made it; write it with benchmark.sides.save")
    if len(told["ids"]) != len(vectors):
        raise UserError(f"{path}: {len(vectors)} embeddings but {len(told['ids'])} ids")
    return Side(told["side"], vectors, told["ids"], told["model"], told["preprocess"])


def join(paths: Sequence[str | Path], side: str) -> Side:
    """One gallery (or query list) from its parts.

    Raises:
        UserError: of another side, two models, two preprocessings, unit vectors beside raw ones, an item twice.
    """
    if not paths:
        raise UserError(f"no files of {side} embeddings")
    parts = [load(path) for path in paths]
    for path, part in zip(paths, parts):
        if part.side != side:
            raise UserError(f"{path}: holds {part.side} embeddings where those of {side}s belong")
        for what in ("model", "preprocess"):
            if getattr(part, what) != getattr(parts[0], what):
                raise UserError(
                    f"{path}: made by {what} {getattr(part, what)}, {paths[0]} by {getattr(parts[0], what)}; one gallery "
                    "holds one model's embeddings: embed its parts again, or link the two models and evaluate them apart"
                )
        if part.normalised != parts[0].normalised:
            unit, raw = (path, paths[0]) if part.normalised else (paths[0], path)
            raise UserError(f"{unit} holds unit vectors, {raw} does not; normalise both or neither")
    ids = [id for part in parts for id in part.ids]
    if len({*ids}) < len(ids):
        raise UserError(f"{paths[0]} and its parts hold {len(ids) - len({*ids})} items twice")
    return Side(parts[0].side, torch.cat([part.vectors for part in parts]), ids, parts[0].model, parts[0].preprocess)


def evaluate(
    images: Sequence[str | Path],
    texts: Sequence[str | Path],
    data: CaptionDataset,
    ks: Sequence[int] = KS,
    compatible: bool = False,
) -> dict[str, dict[str, float | int | None]]:
    """R@k in both directions of stored embeddings on a data set, see `benchmark.crossmodal.evaluate_pairs`.

    Args:
        compatible: the two sides may come from two models, as in a new/old cell.

    Raises:
        UserError: what `join` refuses; sides of two models without `compatible`; one normalised and the other not; items
            of the data set that have no embedding.
    """
    found = {"image": join(images, "image"), "text": join(texts, "text")}
    image, text = found["image"], found["text"]
    if image.model != text.model and not compatible:
        raise UserError(
            f"images were embedded by model {image.model}, texts by {text.model}; say compatible=True if that is meant"
        )
    if image.normalised != text.normalised:
        unit, raw = ("images", "texts") if image.normalised else ("texts", "images")
        raise UserError(f"the {unit} are unit vectors, the {raw} are not; normalise both stores or neither")
    relevance = Relevance.of(data.captions)
    rows = []
    for side, wanted in ((image, data.image_ids), (text, relevance.texts)):
        place = {id.strip(): i for i, id in enumerate(side.ids)}
        if missing := [id for id in wanted if id not in place]:
            raise UserError(f"{len(missing)} of {len(wanted)} {side.side}s have no embedding, first '{missing[0]}'")
        rows.append(side.vectors[[place[id] for id in wanted]])
    return evaluate_pairs(rows[0], rows[1], relevance, ks)
