"""Is the whole way from photo to R@k right? Zero-shot numbers that open_clip publishes, measured again with our evaluator.

    python -m benchmark.zeroshot DIR ViT-B-32-quickgelu:openai          DIR as crossmodal-clip@1 wants it

Karpathy's test splits of Flickr30k (flickr30k/dataset_flickr30k.json) and COCO (coco/dataset_coco.json); all captions are
kept (25,010 of COCO's 5,000 images), and a caption fits its own image alone, as there. A difference above 0.3 points fails.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmark import captions
from benchmark.captions import CaptionDataset
from benchmark.crossmodal import DIRECTIONS, Relevance, evaluate_pairs
from benchmark.errors import UserError, unknown
from benchmark.pairs import Photos
from benchmark.towers import Spec

TOLERANCE = 0.003
SETS = {
    "flickr30k": ("flickr30k/dataset_flickr30k.json", "flickr30k/flickr30k-images"),
    "coco": ("coco/dataset_coco.json", "coco"),
}


class Published(NamedTuple):
    """R@1, R@5, R@10 in percent: open_clip, docs/openclip_retrieval_results.csv."""

    dim: int
    flickr30k: dict[str, tuple[float, float, float]]
    coco: dict[str, tuple[float, float, float]]


def _of(dim: int, *rows: tuple[float, float, float]) -> Published:
    flickr_t2i, flickr_i2t, coco_t2i, coco_i2t = rows
    return Published(dim, {"T2I": flickr_t2i, "I2T": flickr_i2t}, {"T2I": coco_t2i, "I2T": coco_i2t})


# model:weights -> T2I and I2T on Flickr30k, T2I and I2T on COCO
PUBLISHED = {
    "RN50-quickgelu:openai": _of(
        1024, (57.36, 83.18, 90.04), (80.00, 95.00, 97.90), (28.54, 52.91, 64.59), (48.84, 72.78, 82.12)
    ),
    "ViT-B-32-quickgelu:openai": _of(
        512, (58.78, 83.56, 90.02), (78.90, 94.90, 98.20), (30.44, 55.94, 66.87), (50.12, 75.00, 83.52)
    ),
    "ViT-B-32:laion2b_s34b_b79k": _of(
        512, (66.78, 88.38, 93.10), (84.10, 96.20, 98.30), (39.34, 65.43, 75.61), (56.32, 79.84, 87.12)
    ),
    "ViT-B-16-quickgelu:openai": _of(
        512, (62.16, 85.72, 91.92), (82.20, 96.60, 99.00), (33.09, 58.42, 68.99), (52.42, 76.70, 84.62)
    ),
    "ViT-L-14-quickgelu:openai": _of(
        768, (64.96, 87.24, 92.04), (85.20, 97.40, 99.20), (36.51, 61.06, 71.13), (56.34, 79.38, 86.60)
    ),
    "ViT-H-14:laion2b_s32b_b79k": _of(
        1024, (77.64, 94.18, 96.60), (90.70, 99.20, 99.70), (49.48, 73.38, 81.51), (65.92, 86.06, 91.88)
    ),
}


def recalls(spec: Spec, data: CaptionDataset, device: str) -> dict[str, list[float]]:
    """direction -> R@1, R@5, R@10 in percent, by index."""
    network, tokenizer, preprocess = spec.build([]).to(device).eval(), spec.tokenizer([]), spec.preprocess
    mean, std = (255 * torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (preprocess.mean, preprocess.std))
    photos = Photos(data.image_paths, captions.open_image, preprocess, device)
    relevance = Relevance.of(data.captions, by_string=False)
    images: list[Tensor] = []
    texts: list[Tensor] = []
    with torch.inference_mode():
        for index in torch.arange(len(photos)).split(128):
            images.append(F.normalize(network.image((photos[index].float() - mean) / std)).cpu())
        for at in range(0, len(relevance.texts), 512):
            texts.append(F.normalize(network.text(tokenizer(relevance.texts[at : at + 512]).to(device))).cpu())
    found = evaluate_pairs(torch.cat(images), torch.cat(texts), relevance, device=device)
    return {direction: [100 * float(found[direction][f"r@{k}"] or 0) for k in (1, 5, 10)] for direction in DIRECTIONS}


def check(root: Path, names: Sequence[str], device: str) -> bool:
    """Print a line for each model, set and direction; whether all are within the tolerance."""
    fine = True
    for name in names:
        if name not in PUBLISHED:
            raise unknown("model with published numbers", name, PUBLISHED)
        published, (model, _, tag) = PUBLISHED[name], name.partition(":")
        for of, (source, images) in SETS.items():
            data = captions.read(root / source, root / images, split="test")
            found = recalls(Spec.of(f"open_clip/{model}", {"pretrained": tag}, published.dim), data, device)
            for direction, values in found.items():
                wanted = getattr(published, of)[direction]
                off = max(abs(a - b) for a, b in zip(values, wanted)) / 100
                fine &= off <= TOLERANCE
                said = " ".join(f"{value:.2f} ({want:.2f})" for value, want in zip(values, wanted))
                print(f"{name} {of} {direction} R@1/5/10: {said}  {'as published' if off <= TOLERANCE else 'DIFFERS'}")
    return fine


def main() -> int:
    """Exit status: 0 all as published, 1 a difference, 2 a mistake that the line on stderr names."""
    if len(sys.argv) < 2:
        print("zeroshot: give the data folder, then names of models (none = all)", file=sys.stderr)
        return 2
    try:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return 0 if check(Path(sys.argv[1]), sys.argv[2:] or list(PUBLISHED), device) else 1
    except UserError as error:
        print(f"zeroshot: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
