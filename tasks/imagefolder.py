"""Any folder of class folders: your own images."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps
from pydantic import ConfigDict, TypeAdapter, ValidationError
from rich import get_console
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmark.errors import UserError
from benchmark.protocol import Protocol, describe, digest
from benchmark.task import ImageRetrieval, ImageSet

IMAGENET = {3: ((123.7, 116.3, 103.5), (58.4, 57.1, 57.4)), 1: ((117.1,), (57.2,))}  # mean, std, 0..255 scale
TEST_FOLDERS = ("val", "validation", "test")
SLOW = 5.0  # seconds of decoding that are worth a cache file


@dataclass(frozen=True)
class Options:
    """What a protocol's `task_args` may say beside the class lists and splits; see `ImageFolder`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    pixels: int = 64
    channels: Literal[1, 3] = 3
    train: str = "train"
    test: str | None = None
    test_share: float | None = None
    extensions: tuple[str, ...] = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    skip_corrupt: bool = False
    limit_gb: float = 8.0


class ImageFolder(ImageRetrieval):
    """Your own images: DIR/{train,val}/<class>/*, or one folder DIR/<class>/* with `test_share`.

    Every image is decoded once, its shorter side resized to `pixels`, the centre cut to a square and kept in memory as
    uint8. So this task is for sets that fit there: N x channels x pixels^2 bytes, and up to as much again in training.
    100,000 images take 1.2 GB at 64 px and 15 GB at 224 px.

    `task_args`, beside those of `ImageRetrieval` (`classes` defaults to all class folders, by name):

    - `pixels`: side of the square; `channels`: 3, or 1 (then the backbones need that too). Files of any mode are converted.
    - `train`, `test`: the two folders under DIR; `test` may be left out where one of val, validation, test exists.
    - `test_share`: for a single folder; this share of each class, chosen by a hash of the file names, is for the test.
    - `mean`, `std`: per channel, on the 0..255 scale (default: ImageNet's).
    - `extensions`: of image files, any case; other files and hidden ones are passed over.
    - `skip_corrupt`: leave out images that cannot be decoded, with a notice (default: refuse them).
    - `limit_gb`: GiB of images that may be kept.

    Images come in the order of their paths within a class, whatever the file system says. Decoding that took more than
    seconds is cached under ~/.cache/compatbench, keyed by paths, sizes and times; remove that folder at any time.
    """

    name = "imagefolder"

    def __init__(self, protocol: Protocol, root: Path | None = None, device: str = "cpu", **task_args: Any):
        self.skipped: list[Path] = []  # undecodable images that `skip_corrupt` left out
        self.wanted: list[str] = []  # classes that the protocol names
        for key in ("classes", "validation_classes", "unseen_classes"):
            names = task_args.get(key) or []
            if isinstance(names, str) or not all(isinstance(name, str) for name in names):
                raise UserError(f'imagefolder: {key} is a list of folder names; put names like 7 or no in quotes: "7"')
            self.wanted += names
        self.reads_all = task_args.get("classes") is None
        super().__init__(protocol, root, device, **task_args)

    @classmethod
    def missing(cls, root: Path | None) -> str | None:
        """What the user must still provide, for `compatbench doctor`; None if it is there to be read."""
        if root is None:
            return "imagefolder: give the folder of class folders with --data DIR"
        return None if Path(root).is_dir() else f"imagefolder: there is no folder {root}; give another one with --data"

    def read(self, **source_args: Any) -> tuple[list[str], ImageSet, ImageSet]:
        options = _checked(source_args)
        if problem := self.missing(self.root):
            raise UserError(problem)
        mean, std = IMAGENET[options.channels]
        self.mean, self.std = options.mean or mean, options.std or std
        train, test = self._files(Path(self.root or ""), options)
        names = sorted(self.wanted) if not self.reads_all else sorted({*train, *test})
        files = [path for part in (train, test) for name in names for path in part.get(name, [])]
        labels = torch.tensor([i for part in (train, test) for i, name in enumerate(names) for _ in part.get(name, [])])
        images, kept = self._images(files, options)
        first_test = sum(len(train.get(name, [])) for name in names)
        cut, labels = int(kept[:first_test].sum()), labels[kept]
        return names, ImageSet(images[:cut], labels[:cut]), ImageSet(images[cut:], labels[cut:])

    def _files(self, root: Path, options: Options) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
        """Image files of the (train, test) part, by class; those of `wanted` classes alone if the protocol lists all."""
        folders = _class_folders(root)
        if options.test_share is not None:
            if folders and {*folders} <= {"train", *TEST_FOLDERS}:
                raise UserError(f"imagefolder: {root} holds {', '.join(folders)}, so it is split; drop test_share")
            train: dict[str, list[Path]] = {}
            test: dict[str, list[Path]] = {}
            for name, files in self._by_folder(root, options).items():
                count = round(options.test_share * len(files))
                ranked = sorted(files, key=lambda path: hashlib.sha256(path.name.encode()).digest())
                test[name], train[name] = sorted(ranked[:count]), sorted(ranked[count:])
            return train, test
        if options.train not in folders:
            raise UserError(
                f"imagefolder: {root} has no folder '{options.train}'; give the folder above it with --data, name it as `train` "
                "in task_args, or, for one folder of class folders, set test_share (e.g. 0.2)"
            )
        candidates = [options.test] if options.test else [name for name in TEST_FOLDERS if name in folders]
        if len(candidates) != 1 or candidates[0] not in folders:
            what = f"no '{options.test}'" if options.test else " and ".join(candidates) or "no val, validation or test"
            raise UserError(
                f"imagefolder: {root} holds {what} beside '{options.train}'; name one as `test` in task_args"
            )
        return self._by_folder(root / options.train, options), self._by_folder(root / candidates[0], options)

    def _by_folder(self, folder: Path, options: Options) -> dict[str, list[Path]]:
        """Class name -> its image files, sorted; refuses classes that are absent or empty."""
        found = _class_folders(folder)
        if not found:
            raise UserError(f"imagefolder: {folder} holds no class folders; the layout is {folder}/<class>/<image>")
        for name in self.wanted:
            if name not in found:
                near = difflib.get_close_matches(name, found, n=3, cutoff=0.5)
                hint = (
                    f"did you mean {', '.join(near)}?" if near else f"it has {len(found)}: {', '.join(found[:5])}, ..."
                )
                raise UserError(f"imagefolder: {folder} has no class folder '{name}' that the protocol names; {hint}")
        extensions = tuple(extension.lower() for extension in options.extensions)
        classes = {
            name: _images_under(folder / name, extensions) for name in (found if self.reads_all else self.wanted)
        }
        for name, files in classes.items():
            if not files:
                raise UserError(
                    f"imagefolder: class folder {folder / name} holds no image ({' '.join(extensions)}); add some, or remove it"
                )
        return classes

    def _by_class(self, split: str, count: int) -> list[Tensor]:
        members = super()._by_class(split, count)
        validation = range(len(self.train_classes), len(self.train_classes) + len(self.validation_classes))
        for label, name in enumerate([*self.train_classes, *self.validation_classes, *self.unseen_classes]):
            n = len(members[label])
            if split == "test" and n < 2 and label not in validation:
                raise UserError(
                    f"imagefolder: class '{name}' has {n} test image under {self.root}; a query and its match need 2: "
                    "add images, leave the class out, or raise test_share if you set it"
                )
            if split == "train" and n <= self.heldout and label < len(self.train_classes):
                raise UserError(
                    f"imagefolder: class '{name}' has {n} training images, and heldout = {self.heldout} takes all"
                )
        return members

    def _images(self, files: list[Path], options: Options) -> tuple[Tensor, Tensor]:
        """Images (K, C, P, P) uint8, and which of the `files` they are: (N,) bool."""
        size = (options.channels, options.pixels, options.pixels)
        need = len(files) * options.channels * options.pixels**2
        if need > options.limit_gb * 2**30:
            raise UserError(
                f"imagefolder: {len(files):,} images of {' x '.join(map(str, size))} need {need:,} bytes "
                f"({need / 2**30:.1f} GiB) of memory, above limit_gb = {options.limit_gb:g}; lower pixels, list fewer "
                "classes, or raise limit_gb in task_args"
            )
        cache = _cache_file(files, options)
        with contextlib.suppress(OSError, SafetensorError, KeyError):  # not there, or damaged: decode
            stored = load_file(cache)
            images, kept = stored["images"], stored["kept"]
            return images, self._without(kept, files)
        started = time.monotonic()
        images = torch.empty(len(files), *size, dtype=torch.uint8)
        kept = torch.tensor(self._decode(files, images, options), dtype=torch.bool)
        if not kept.all():
            images = images[kept]
        if time.monotonic() - started > SLOW:
            _write_cache(cache, {"images": images, "kept": kept})
        return images, self._without(kept, files)

    def _decode(self, files: list[Path], images: Tensor, options: Options) -> list[bool]:
        """Fill `images` in the order of `files`; returns which could be read. Pillow decodes outside Python's lock."""
        target = images.numpy()

        def work(i: int) -> bool:
            try:
                target[i] = _square(files[i], options)
            except Exception as error:  # Pillow raises almost anything on damaged files
                if options.skip_corrupt:
                    return False
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise UserError(
                    f"imagefolder: {files[i]} cannot be decoded ({reason}); "
                    "repair or remove it, or set skip_corrupt: true in task_args"
                ) from None
            return True

        console = get_console()
        quiet = len(files) < 1000 or not console.is_terminal or parent_process() is not None
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # an error cancels what has not begun
            results: Iterable[bool] = pool.map(work, range(len(files)))
            return list(track(results, "reading images", len(files), console=console, transient=True, disable=quiet))

    def _without(self, kept: Tensor, files: Sequence[Path]) -> Tensor:
        self.skipped = [path for path, whole in zip(files, kept.tolist()) if not whole]
        if self.skipped and parent_process() is None:
            print(
                f"imagefolder: skipped {len(self.skipped)} of {len(files)} images that cannot be decoded, first "
                f"{self.skipped[0]}",
                file=sys.stderr,
            )
        return kept


def _checked(given: dict[str, Any]) -> Options:
    try:
        options = TypeAdapter(Options).validate_python(given)
    except ValidationError as error:
        raise UserError(f"imagefolder: task_args: {describe(error, Options)}") from None
    for name in ("mean", "std"):
        values = getattr(options, name)
        if values is not None and (len(values) != options.channels or (name == "std" and min(values) <= 0)):
            raise UserError(f"imagefolder: {name} needs {options.channels} numbers (std above 0), on the 0..255 scale")
    if options.pixels < 1:
        raise UserError(f"imagefolder: pixels is at least 1, not {options.pixels}")
    if options.test_share is not None and not 0 < options.test_share < 1:
        raise UserError(f"imagefolder: test_share lies between 0 and 1, not at {options.test_share:g}")
    return options


def _class_folders(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
    except OSError as error:
        raise UserError(f"imagefolder: {folder} cannot be read: {error.strerror}") from None


def _images_under(folder: Path, extensions: tuple[str, ...]) -> list[Path]:
    """Image files of one class, subfolders and links included, sorted by path."""
    found = []
    for parent, _, names in os.walk(folder, followlinks=True):
        found += [Path(parent, name) for name in names if name.lower().endswith(extensions) and name[0] != "."]
    return sorted(found)


def _square(path: Path, options: Options) -> np.ndarray:
    """(C, P, P) uint8: upright, shorter side resized to P, centre kept."""
    mode, side = {1: "L", 3: "RGB"}[options.channels], options.pixels
    with Image.open(path) as file:
        file.draft(mode, (2 * side, 2 * side))  # large JPEGs are decoded at 1/2, 1/4 or 1/8, never below twice `side`
        image: Image.Image = file
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode in ("I", "F"):
            raise ValueError(f"32-bit pixels (mode {image.mode}) have no known range; save them with 8 or 16 bits")
        if image.mode.startswith("I;16"):  # Pillow would clip 16 bits instead of scaling them
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if "transparency" in image.info:
            image = image.convert("RGBA")
        square = ImageOps.fit(image.convert(mode), (side, side), Image.Resampling.BICUBIC)
    return np.asarray(square).reshape(side, side, options.channels).transpose(2, 0, 1)


def _cache_file(files: Sequence[Path], options: Options) -> Path:
    """Named by all that decides its content."""
    stats = []
    for path in files:
        with contextlib.suppress(OSError):  # a dangling link: decoding will name it
            found = path.stat()
            stats.append((str(path.absolute()), found.st_size, found.st_mtime_ns))
    key = digest([PIL.__version__, options.pixels, options.channels, options.skip_corrupt, stats])
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "compatbench" / "imagefolder" / f"{key[:20]}.safetensors"


def _write_cache(path: Path, tensors: dict[str, Tensor]) -> None:
    """Whole or not at all; a full disk costs the next start time, not this run its life."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        with contextlib.suppress(OSError, SafetensorError):
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial)
            partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
