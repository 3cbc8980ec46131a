"""Images with captions from the five layouts that users have on disk. No torch; nothing is unpickled.

    read("dataset_coco.json", images="coco", split="test")        Karpathy JSON: COCO, Flickr30k and their like
    read("captions_val2014.json", images="val2014")               COCO's own JSON; nocaps with its domains
    read("captions.csv", images="photos")                         a table with the columns image and caption (or .tsv)
    read("shards/test")                                           webdataset tars: <key>.jpg and <key>.txt, a caption a line

Whatever the layout, an image has any number of captions, and the order is the file's own (COCO's JSON: by image id, as
torchvision's CocoCaptions orders it).
"""

from __future__ import annotations

import csv
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmark.errors import UserError, unknown

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
LAYOUTS = ("karpathy", "coco", "table", "webdataset")


class Member(NamedTuple):
    """An image inside an uncompressed tar."""

    tar: Path
    offset: int
    size: int
    name: str

    def __str__(self) -> str:
        return f"{self.tar}:{self.name}"


ImageSource = Path | Member


@dataclass(frozen=True)
class CaptionDataset:
    """N images and their captions, checked: every image is there and has a caption, no caption is empty."""

    image_ids: list[str]  # unique
    image_paths: list[ImageSource]
    captions: list[list[str]]  # one or more an image
    labels: list[str] | None = None  # class names, where the file has them
    domains: list[str] | None = None  # nocaps: in-domain, near-domain, out-domain

    def __len__(self) -> int:
        return len(self.image_ids)

    def select(self, index: Iterable[int]) -> CaptionDataset:
        """The images at these positions, in this order."""
        kept = list(index)

        def pick(values: Any) -> Any:
            return None if values is None else [values[i] for i in kept]

        return CaptionDataset(
            pick(self.image_ids), pick(self.image_paths), pick(self.captions), pick(self.labels), pick(self.domains)
        )

    def check(self, name: str) -> CaptionDataset:
        """Refuse what would ruin a number in silence.

        Raises:
            UserError: no image at all, an id twice, an image without captions, an empty caption, images that are missing.
        """
        if not self.image_ids:
            raise UserError(f"{name}: holds no images")
        seen: set[str] = set()
        for id, captions in zip(self.image_ids, self.captions):
            if id in seen:
                raise UserError(f"{name}: image {id} stands twice; merge its captions into one entry")
            seen.add(id)
            if not captions:
                raise UserError(f"{name}: image {id} has no captions; add one or take the image out")
            if not all(text.strip() for text in captions):
                raise UserError(f"{name}: image {id} has an empty caption among its {len(captions)}; remove it")
        missing = [path for path in self.image_paths if isinstance(path, Path) and not path.is_file()]
        if missing:
            raise UserError(
                f"{name}: {len(missing)} of {len(self)} images are missing, first {missing[0]}; "
                "give the folder that holds them as `images`"
            )
        return self


def open_image(source: ImageSource) -> Any:
    """The upright RGB image (PIL).

    Raises:
        UserError: it cannot be decoded.
    """
    from PIL import Image, ImageOps

    try:
        if isinstance(source, Member):
            with source.tar.open("rb") as file:
                file.seek(source.offset)
                data = io.BytesIO(file.read(source.size))
        else:
            data = io.BytesIO(source.read_bytes())
        with Image.open(data) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow raises almost anything on damaged files
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{source} cannot be decoded ({reason}); repair it or take it out of the captions") from None


def read(
    source: str | Path, images: str | Path | None = None, split: str = "all", layout: str | None = None
) -> CaptionDataset:
    """Images and captions of any layout, checked.

    Args:
        source: a .json, .csv or .tsv file, a .tar, or a folder of .tar files.
        images: folder that the file's image names start from (default: the file's own folder, or `images` in it).
        split: of a Karpathy file: "train" (COCO's restval included), "val", "test", "restval", or "all", the union that
            XBT's protocol calls full. The other layouts have one split a file, hence "all".
        layout: "karpathy", "coco", "table" or "webdataset"; None = by suffix and content.

    Raises:
        UserError: unreadable, another layout, unknown split, or what `CaptionDataset.check` refuses.
    """
    source = Path(source)
    if not source.exists():
        raise UserError(f"{source}: there is no such file or folder")
    parsed = _json(source) if source.suffix == ".json" else None
    layout = layout or _layout(source, parsed)
    readers: dict[str, Callable[[], CaptionDataset]] = {
        "karpathy": lambda: _karpathy(source, parsed, _root(source, images), split),
        "coco": lambda: _coco(source, parsed, _root(source, images)),
        "table": lambda: _table(source, _root(source, images)),
        "webdataset": lambda: _webdataset(source),
    }
    if layout not in readers:
        raise unknown("layout of captions", layout, LAYOUTS)
    if layout != "karpathy" and split != "all":
        raise UserError(
            f"{source}: has no splits of its own, so split is 'all', not '{split}'; give that split's own file"
        )
    try:
        found = readers[layout]()
    except (KeyError, TypeError, AttributeError) as error:
        what = f"lacks the field {error}" if isinstance(error, KeyError) else f"has an unexpected form ({error})"
        raise UserError(f"{source}: {what}, so it is no {layout} file; give its layout: {', '.join(LAYOUTS)}") from None
    return found.check(str(source))


def _layout(source: Path, parsed: Any) -> str:
    if parsed is not None:
        return "coco" if isinstance(parsed, dict) and "annotations" in parsed else "karpathy"
    if source.is_dir() or source.suffix == ".tar":
        return "webdataset"
    if source.suffix in (".csv", ".tsv", ".txt"):
        return "table"
    raise UserError(f"{source}: captions come as .json, .csv, .tsv, .tar or a folder of .tar files")


def _root(source: Path, images: str | Path | None) -> Path:
    if images is not None:
        if not Path(images).is_dir():
            raise UserError(f"{source}: there is no folder of images {images}")
        return Path(images)
    beside = source.parent / "images"
    return beside if beside.is_dir() else source.parent


def _json(source: Path) -> Any:
    try:
        return json.loads(source.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: cannot be read as JSON: {str(error).splitlines()[0]}") from None


def _karpathy(source: Path, parsed: Any, root: Path, split: str) -> CaptionDataset:
    """`images`: filename, split, sentences[].raw, in COCO also filepath and cocoid; here and there a label."""
    entries = parsed["images"]
    found = {entry["split"] for entry in entries}
    wanted = {"train": {"train", "restval"}, "all": found}.get(split, {split})
    kept = [entry for entry in entries if entry["split"] in wanted]
    if not kept:
        raise UserError(f"{source}: has no split '{split}'; it has {', '.join(sorted(found)) or 'none'}, and 'all'")
    labels = [entry.get("label") for entry in kept]
    return CaptionDataset(
        [str(entry.get("cocoid", entry["filename"])) for entry in kept],
        [root / entry.get("filepath", "") / entry["filename"] for entry in kept],
        [[sentence["raw"] for sentence in entry["sentences"]] for entry in kept],
        None if None in labels else labels,
    )


def _coco(source: Path, parsed: Any, root: Path) -> CaptionDataset:
    """`images` (id, file_name, in nocaps also domain) and `annotations` (image_id, caption)."""
    entries = {entry["id"]: entry for entry in sorted(parsed["images"], key=lambda entry: entry["id"])}
    if len(entries) < len(parsed["images"]):
        raise UserError(f"{source}: {len(parsed['images']) - len(entries)} image ids stand twice")
    captions: dict[Any, list[str]] = {id: [] for id in entries}
    for annotation in parsed["annotations"]:
        if annotation["image_id"] not in captions:
            raise UserError(
                f"{source}: a caption names image {annotation['image_id']}, which is not among its {len(entries)} images"
            )
        captions[annotation["image_id"]].append(annotation["caption"])
    domains = [entry.get("domain") for entry in entries.values()]
    return CaptionDataset(
        [str(id) for id in entries],
        [root / entry["file_name"] for entry in entries.values()],
        list(captions.values()),
        None,
        None if None in domains else domains,
    )


def _table(source: Path, root: Path) -> CaptionDataset:
    """One caption a line under the header `image,caption`, further columns ignored; a label column is read if there is one.

    With those two columns alone, captions may hold bare commas, as in the Flickr30k files of CLIP_benchmark.
    """
    try:
        text = source.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: cannot be read as UTF-8 text: {error}") from None
    comma = "\t" if source.suffix == ".tsv" or "\t" in text.partition("\n")[0] else ","
    lines = list(csv.reader(io.StringIO(text), delimiter=comma))
    header = [name.strip().lower() for name in lines[0]] if lines else []
    if not {"image", "caption"} <= {*header}:
        raise UserError(
            f"{source}: the first line names the columns image and caption, not '{comma.join(header)[:60]}'"
        )
    at, of = header.index("image"), header.index("caption")
    label = header.index("label") if "label" in header else None
    captions: dict[str, list[str]] = {}
    labels: dict[str, str] = {}
    for number, line in enumerate(lines[1:], 2):
        if not line:
            continue
        if len(line) > len(header) == 2 and header == ["image", "caption"]:
            line = [line[0], comma.join(line[1:])]
        if len(line) != len(header):
            raise UserError(
                f"{source}, line {number}: {len(line)} columns under a header of {len(header)}; quote the caption"
            )
        captions.setdefault(line[at], []).append(line[of])
        if label is not None and labels.setdefault(line[at], line[label]) != line[label]:
            raise UserError(f"{source}, line {number}: image {line[at]} has two labels")
    names = list(captions)
    return CaptionDataset(
        names, [root / name for name in names], list(captions.values()), list(labels.values()) or None
    )


def _webdataset(source: Path) -> CaptionDataset:
    """Tars in numerical order; a sample is all members with one key: an image, and .txt (a caption a line) or .json."""
    tars = [source] if source.is_file() else sorted(source.glob("*.tar"), key=_numerical)
    if not tars:
        raise UserError(f"{source}: holds no .tar files")
    images: dict[str, Member] = {}
    captions: dict[str, list[str]] = {}
    labels: dict[str, str] = {}
    for tar in tars:
        try:
            with tarfile.open(tar, "r:") as archive:
                for member in archive:
                    if member.isfile():
                        _add_member(tar, archive, member, images, captions, labels)
        except (OSError, tarfile.TarError) as error:
            raise UserError(f"{tar}: cannot be read as an uncompressed tar: {error}") from None
    if orphan := next((key for key in captions if key not in images), None):
        raise UserError(f"{source}: sample {orphan} has captions but no image")
    return CaptionDataset(
        list(images),
        list(images.values()),
        [captions.get(key, []) for key in images],
        [labels[key] for key in images] if len(labels) == len(images) else None,
    )


def _add_member(
    tar: Path,
    archive: tarfile.TarFile,
    member: tarfile.TarInfo,
    images: dict[str, Member],
    captions: dict[str, list[str]],
    labels: dict[str, str],
) -> None:
    folder, _, name = member.name.rpartition("/")
    key, _, suffix = name.partition(".")
    key, suffix = f"{folder}/{key}" if folder else key, f".{suffix.lower()}"
    if suffix in IMAGE_SUFFIXES:
        if key in images:
            raise UserError(f"{tar}: sample {key} has two images, here and in {images[key].tar}")
        images[key] = Member(tar, member.offset_data, member.size, member.name)
    elif suffix in (".txt", ".json", ".cls"):
        file = archive.extractfile(member)
        data = file.read() if file else b""
        try:
            text = data.decode()
            if suffix == ".txt":
                captions[key] = text.removesuffix("\n").split("\n")
            elif suffix == ".cls":
                labels[key] = text.strip()
            else:
                found: Sequence[str] | str = json.loads(text).get("captions") or json.loads(text)["caption"]
                captions.setdefault(key, [found] if isinstance(found, str) else list(found))
        except (ValueError, AttributeError, KeyError) as error:
            raise UserError(f"{tar}: {member.name} holds no captions ({error})") from None


def _numerical(path: Path) -> list[Any]:
    """2.tar before 10.tar."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]
