"""Caption readers on small files in each layout's true form, and what they refuse."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmark import captions
from benchmark.errors import UserError


def photo(path: Path, colour: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (colour, 0, 0)).save(path)
    return path


def karpathy(root: Path, coco: bool = True) -> Path:
    """Four images in four splits, as `dataset_coco.json` (or `dataset_flickr30k.json`) has them."""
    images = []
    for i, split in enumerate(["train", "restval", "val", "test"]):
        entry: dict[str, Any] = {"filename": f"{i}.png", "imgid": i, "split": split, "sentids": [2 * i, 2 * i + 1]}
        entry["sentences"] = [
            {"raw": f"caption {j} of {i}", "tokens": ["caption"], "imgid": i, "sentid": 2 * i + j}
            for j in range(2 if i else 3)
        ]
        if coco:
            entry |= {"filepath": "train2014" if i == 0 else "val2014", "cocoid": 100 + i}
        photo(root / entry.get("filepath", "") / entry["filename"], i)
        images.append(entry)
    file = root / "dataset.json"
    file.write_text(json.dumps({"dataset": "coco" if coco else "flickr30k", "images": images}))
    return file


@pytest.mark.parametrize("coco", [True, False])
def test_karpathy_splits(tmp_path: Path, coco: bool) -> None:
    file = karpathy(tmp_path, coco)
    sizes = {split: len(captions.read(file, split=split)) for split in ("train", "restval", "val", "test", "all")}
    assert sizes == {"train": 2, "restval": 1, "val": 1, "test": 1, "all": 4}
    found = captions.read(file, split="train")
    assert found.captions == [[f"caption {j} of 0" for j in range(3)], ["caption 0 of 1", "caption 1 of 1"]]
    assert found.image_ids == (["100", "101"] if coco else ["0.png", "1.png"])
    assert captions.open_image(found.image_paths[1]).getpixel((0, 0)) == (1, 0, 0)
    with pytest.raises(UserError, match="no split 'dev'; it has restval, test, train, val"):
        captions.read(file, split="dev")


def test_coco_in_the_order_of_image_ids_and_nocaps_with_domains(tmp_path: Path) -> None:
    data = {
        "images": [{"id": 7, "file_name": "b.png"}, {"id": 3, "file_name": "a.png"}],
        "annotations": [{"id": i, "image_id": n, "caption": f"c{i}"} for i, n in enumerate([7, 3, 7])],
    }
    photo(tmp_path / "val" / "a.png"), photo(tmp_path / "val" / "b.png")
    file = tmp_path / "captions_val2014.json"
    file.write_text(json.dumps(data))
    found = captions.read(file, images=tmp_path / "val")
    assert found.image_ids == ["3", "7"] and found.captions == [["c1"], ["c0", "c2"]] and found.domains is None
    for entry, domain in zip(data["images"], ["out-domain", "in-domain"]):
        entry["domain"] = domain
    file.write_text(json.dumps(data))
    assert captions.read(file, images=tmp_path / "val").domains == ["in-domain", "out-domain"]
    data["annotations"][0]["image_id"] = 8
    file.write_text(json.dumps(data))
    with pytest.raises(UserError, match="names image 8"):
        captions.read(file, images=tmp_path / "val")


@pytest.mark.parametrize("suffix, comma", [(".csv", ","), (".tsv", "\t")])
def test_tables(tmp_path: Path, suffix: str, comma: str) -> None:
    photo(tmp_path / "a.png"), photo(tmp_path / "b.png")
    file = tmp_path / f"captions{suffix}"
    file.write_text(f"image{comma}caption\na.png{comma}one, two\nb.png{comma}three\na.png{comma}four\n")
    found = captions.read(file)
    assert found.image_ids == ["a.png", "b.png"] and found.captions == [["one, two", "four"], ["three"]]


def test_a_table_with_quotes_labels_and_other_columns(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    file = tmp_path / "captions.csv"
    file.write_text('id,image,label,caption\n1,a.png,cat,"one, two"\n')
    found = captions.read(file)
    assert found.captions == [["one, two"]] and found.labels == ["cat"]
    file.write_text("id,image,label,caption\n1,a.png,cat,one, two\n")
    with pytest.raises(UserError, match="line 2: 5 columns under a header of 4"):
        captions.read(file)
    file.write_text("a.png,one\n")
    with pytest.raises(UserError, match="columns image and caption"):
        captions.read(file)


def shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def png(colour: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (4, 4), (colour, 0, 0)).save(data, "PNG")
    return data.getvalue()


def test_webdataset_shards_in_numerical_order(tmp_path: Path) -> None:
    for i in (0, 2, 10):
        shard(tmp_path / f"{i}.tar", {f"s{i:04d}.png": png(i), f"s{i:04d}.txt": b"one\ntwo\n"})
    found = captions.read(tmp_path)
    assert found.image_ids == ["s0000", "s0002", "s0010"] and found.captions == [["one", "two"]] * 3
    assert [captions.open_image(path).getpixel((0, 0))[0] for path in found.image_paths] == [0, 2, 10]
    assert captions.read(tmp_path / "2.tar").image_ids == ["s0002"]


def test_nothing_in_a_shard_is_unpickled_or_extracted(tmp_path: Path) -> None:
    bomb = b"cos\nsystem\n(S'touch %s'\ntR." % str(tmp_path / "exploded").encode()
    members = {
        "a.png": png(1),
        "a.txt": b"one",
        "a.pkl": bomb,
        "a.pyd": bomb,
        "../../b.png": png(2),
        "../../b.txt": b"x",
    }
    found = captions.read(shard(tmp_path / "0.tar", members))
    assert len(found) == 2 and sorted(path.name for path in tmp_path.iterdir()) == ["0.tar"]


BROKEN = {
    "no captions": ({"a.png": png(0)}, "image a has no captions"),
    "empty caption": ({"a.png": png(0), "a.txt": b"one\n\ntwo"}, "image a has an empty caption among its 3"),
    "no image": ({"a.txt": b"one"}, "sample a has captions but no image"),
    "nothing": ({}, "holds no images"),
    "json without": ({"a.png": png(0), "a.json": b"{}"}, "a.json holds no captions"),
}


@pytest.mark.parametrize("members, message", BROKEN.values(), ids=BROKEN)
def test_broken_shards_are_refused(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with pytest.raises(UserError, match=message):
        captions.read(shard(tmp_path / "0.tar", members))


def edited(file: Path, change: Any) -> Path:
    data = json.loads(file.read_text())
    change(data["images"])
    file.write_text(json.dumps(data))
    return file


def test_missing_images_captions_and_ids_are_named(tmp_path: Path) -> None:
    file = karpathy(tmp_path, coco=False)
    edited(file, lambda images: images[2].update(filename="gone.png"))
    with pytest.raises(UserError, match=r"1 of 4 images are missing, first .*gone.png"):
        captions.read(file)
    edited(file, lambda images: images[2].update(filename="2.png", sentences=[]))
    with pytest.raises(UserError, match=r"image 2\.png has no captions"):
        captions.read(file)
    edited(file, lambda images: images[2].update(sentences=[{"raw": " "}]))
    with pytest.raises(UserError, match=r"image 2\.png has an empty caption"):
        captions.read(file)
    edited(file, lambda images: images[2].update(filename="1.png", sentences=[{"raw": "x"}]))
    with pytest.raises(UserError, match=r"image 1.png stands twice"):
        captions.read(file)
    edited(file, lambda images: images[2].pop("sentences"))
    with pytest.raises(UserError, match="lacks the field 'sentences'"):
        captions.read(file)


def test_what_is_no_caption_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{]")
    (tmp_path / "b.json").write_text("[1]")
    (tmp_path / "c.parquet").write_text("")
    (tmp_path / "d.tar").write_bytes(b"no tar")
    wanted = {
        "a.json": "as JSON",
        "b.json": "unexpected form",
        "c.parquet": "captions come as",
        "d.tar": "uncompressed tar",
    }
    for name, message in (wanted | {"e.json": "no such file"}).items():
        with pytest.raises(UserError, match=message):
            captions.read(tmp_path / name)
    with pytest.raises(UserError, match="has no splits"):
        captions.read(shard(tmp_path / "0.tar", {"a.png": png(0), "a.txt": b"x"}), split="test")
    with pytest.raises(UserError, match="no folder of images"):
        captions.read(karpathy(tmp_path / "k"), images=tmp_path / "nowhere")


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"a\.png cannot be decoded"):
        captions.open_image(tmp_path / "a.png")
