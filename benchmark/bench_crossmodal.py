"""Time and memory of exact image-text retrieval at the size of full Flickr30k: `python -m benchmark.bench_crossmodal`.

31,014 images with five captions each, random embeddings in which a caption is near its image, both directions, all queries.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

from benchmark.crossmodal import Positives, rank_pairs

IMAGES, CAPTIONS = 31_014, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dims", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(IMAGES, args.dims, generator=generator)
    texts = torch.randn(IMAGES * CAPTIONS, args.dims, generator=generator) + images.repeat_interleave(CAPTIONS, 0)
    captions = [list(range(i * CAPTIONS, (i + 1) * CAPTIONS)) for i in range(IMAGES)]
    owners = [[i // CAPTIONS] for i in range(IMAGES * CAPTIONS)]
    rank_pairs(images[:50], texts, Positives.of(captions[:50], len(texts)))  # compiles
    for direction, queries, gallery, positives in (("I2T", images, texts, captions), ("T2I", texts, images, owners)):
        began, spent = time.perf_counter(), time.process_time()
        recalls = rank_pairs(queries, gallery, Positives.of(positives, len(gallery))).recalls()
        wall, cpu = time.perf_counter() - began, time.process_time() - spent
        print(
            f"{direction}: {len(queries):,} x {len(gallery):,} x {args.dims}: {wall:.0f} s ({cpu:.0f} s of CPU), {recalls}"
        )
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB, {args.threads} threads")


if __name__ == "__main__":
    main()
