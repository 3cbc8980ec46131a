"""The bundled digits with captions from templates: the cross-modal demo and its tests. No download."""

from __future__ import annotations

import random
from typing import Any

from benchmark.captions import CaptionDataset
from benchmark.errors import UserError
from benchmark.protocol import digest
from tasks.crossmodal import Crossmodal

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    *("a photo of the digit {}", "a handwritten {}", "the number {} on paper", "this is a {}", "somebody wrote {}"),
    *(
        "one sees the digit {}",
        "a small {}",
        "the sign for {}",
        "{} in pencil",
        "a blurred {}",
        "digit {}",
        "a picture of {}",
    ),
)
SEEN, TESTED = TEMPLATES[:10], TEMPLATES[5:]  # of training and of test captions: 5 are shared


class DigitCaptions(Crossmodal):
    """scikit-learn's 8 x 8 digits, three templated captions an image: equal strings, so relevance is by class and template.

    Some templates are of the training set alone, some of the test set alone, so that queries are seen and unseen.
    """

    name = "digitcaptions"

    def read(self, train: Any = None, test: Any = None) -> tuple[CaptionDataset, dict[str, CaptionDataset]]:
        if train or test:
            raise UserError(f"{self.name}: brings its own data; leave train and test out of task_args")
        from sklearn.datasets import load_digits

        data = load_digits()
        self.digits = data.images
        parts: dict[bool, list[int]] = {False: [], True: []}
        for i in range(0, len(data.target), 3):  # 599 images are enough for a demo
            parts[i % 5 < 2].append(i)
        made = []
        for is_test, index in parts.items():
            templates = TESTED if is_test else SEEN
            names = [NAMES[data.target[i]] for i in index]
            chosen = [random.Random(i).sample(templates, 3) for i in index]
            captions = [[template.format(name) for template in own] for own, name in zip(chosen, names)]
            made.append(CaptionDataset([str(i) for i in index], list(index), captions, names))  # type: ignore[arg-type]
        return made[0], {"digits": made[1]}

    def open(self, source: Any) -> Any:
        from PIL import Image

        return Image.fromarray((self.digits[source] * 255 / 16).astype("uint8")).convert("RGB")

    def _content(self, part: CaptionDataset) -> str:
        return digest([self.digits[i].tolist() for i in part.image_paths])
