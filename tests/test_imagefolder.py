"""ImageFolder on real files in the layouts that users have; CIFAR-100's refusals on a fake of its files."""

from __future__ import annotations

import dataclasses
import os
import pickle
import shutil
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from benchmark import protocol as protocols
from benchmark.errors import UserError
from benchmark.protocol import Protocol
from benchmark.runner import open_task
from tasks import imagefolder
from tasks.cifar100 import Cifar100
from tasks.imagefolder import ImageFolder

EXAMPLE = Path(__file__).parent / "data" / "imagefolder.yaml"
TINY_IMAGENET = Path(os.environ.get("COMPATBENCH_DATA", "nowhere")) / "tiny-imagenet-100"
CLASSES = ["ash", "birch", "cedar", "elm", "fir", "gum"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def picture(seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def write_split(folder: Path, train: int = 5, test: int = 3) -> Path:
    """DIR/{train,val}/<class>/<i>.png, every picture another."""
    for part, count in (("train", train), ("val", test)):
        for c, name in enumerate(CLASSES):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                picture(100 * c + i + 50 * (part == "val")).save(folder / part / name / f"{i}.png")
    return folder


def write_flat(folder: Path, count: int = 10) -> Path:
    for c, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            picture(100 * c + i).save(folder / name / f"{i}.png")
    return folder


def example(**task_args: Any) -> Protocol:
    """The example with other `task_args`; None removes one."""
    found = protocols.load(EXAMPLE)
    args = {key: value for key, value in {**found.task_args, **task_args}.items() if value is not None}
    return dataclasses.replace(found, task_args=args)


def open_folder(root: Path | None, **task_args: Any) -> ImageFolder:
    task = open_task(example(**task_args), root, "cpu")
    assert isinstance(task, ImageFolder)
    return task


def pixels(path: Path, mode: str = "RGB") -> torch.Tensor:
    """(C, H, W) uint8, read naively."""
    array = np.asarray(Image.open(path).convert(mode))
    return torch.tensor(array[None] if mode == "L" else array.transpose(2, 0, 1))


# ---------------------------------------------------------------------------------------------------- what is read


def test_the_example_reads_every_file_once_in_path_order(tmp_path: Path) -> None:
    root = write_split(tmp_path / "data")
    task = open_folder(root)
    for split, part, count in (("train", "train", 5), ("test", "val", 3)):
        expected = [pixels(root / part / name / f"{i}.png") for name in CLASSES for i in range(count)]
        assert torch.equal(task.sets[split].images, torch.stack(expected))
        assert task.sets[split].labels.tolist() == [c for c in range(6) for _ in range(count)]
    assert task.class_total() == 4 and task.train_index(0).tolist() == [0, 1, 2, 5, 6, 7]  # 2 of 5 held out
    assert [len(task.items("test", side)[0]) for side in ("query", "gallery")] == [15, 15]  # all but validation's class
    assert task.items("test", "query")[1].unique().tolist() == [0, 1, 2, 3, 5]
    assert task.fingerprint == open_folder(root).fingerprint


def test_the_example_trains_its_timm_network(tmp_path: Path) -> None:
    """timm's networks by name, in any protocol: forward and backward on the task's own batch."""
    task = open_folder(write_split(tmp_path / "data"))
    network = task.backbone(1, 16)
    batch = next(iter(task.train_loader(1, "train", seed=0)))
    vectors = network(batch.x["image"])
    task.head(1, 16)(vectors, batch.y).backward()
    assert vectors.shape == (4, 16) and all(p.grad is not None for p in network.parameters())


def test_order_comes_from_names_not_from_the_disk(tmp_path: Path) -> None:
    forwards, backwards = tmp_path / "a", tmp_path / "b"
    write_split(forwards)
    for path in sorted(forwards.rglob("*.png"), reverse=True):
        target = backwards / path.relative_to(forwards)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    assert open_folder(forwards).fingerprint == open_folder(backwards).fingerprint


def test_classes_default_to_all_folders(tmp_path: Path) -> None:
    lists = {"classes": None, "validation_classes": None, "unseen_classes": None, "heldout": None}
    task = open_folder(write_split(tmp_path / "data"), **lists)
    assert task.train_classes == CLASSES


def test_only_the_protocols_classes_are_read(tmp_path: Path) -> None:
    root = write_split(tmp_path / "data")
    (root / "train" / "zinnia").mkdir()
    (root / "train" / "zinnia" / "broken.png").write_bytes(b"no image")
    assert len(open_folder(root).sets["train"].images) == 30


def test_one_folder_is_split_by_file_name(tmp_path: Path) -> None:
    root = write_flat(tmp_path / "data")
    task = open_folder(root, test_share=0.3)
    train, test = (task.sets[split] for split in ("train", "test"))
    assert train.labels.bincount().tolist() == [7] * 6 and test.labels.bincount().tolist() == [3] * 6
    both = {image.numpy().tobytes() for part in (train, test) for image in part.images}
    assert both == {pixels(path).numpy().tobytes() for path in root.rglob("*.png")}  # a partition
    held = {image.numpy().tobytes() for image in test.images}
    (root / "ash" / "10.png").write_bytes((root / "elm" / "0.png").read_bytes())
    again = {image.numpy().tobytes() for image in open_folder(root, test_share=0.3).sets["test"].images}
    assert len(held - again) <= 1  # a file more moves at most one other


@pytest.mark.parametrize(("test", "chosen"), [(None, "validation"), ("holdout", "holdout")])
def test_the_test_folder_is_found_or_named(tmp_path: Path, test: str | None, chosen: str) -> None:
    root = write_split(tmp_path / "data")
    (root / "val").rename(root / chosen)
    assert len(open_folder(root, test=test).sets["test"].images) == 18


def test_what_is_not_an_image_is_passed_over(tmp_path: Path) -> None:
    root = write_split(tmp_path / "data")
    before = open_folder(root).fingerprint
    (root / "train" / "notes.txt").write_text("hello")
    (root / "train" / ".git").mkdir()
    for name in ("Thumbs.db", "notes.txt", "._0.png", ".DS_Store"):
        (root / "train" / "ash" / name).write_bytes(b"\x00\x05\x16\x07")
    assert open_folder(root).fingerprint == before


def test_subfolders_links_and_capitals_are_followed(tmp_path: Path) -> None:
    root = write_split(tmp_path / "data")
    (root / "train" / "ash").rename(tmp_path / "elsewhere")
    (root / "train" / "ash").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "more").mkdir()
    picture(7).save(tmp_path / "elsewhere" / "more" / "x.PNG")
    images = open_folder(root).sets["train"].images
    assert len(images) == 31 and torch.equal(images[5], pixels(tmp_path / "elsewhere" / "more" / "x.PNG"))


# ------------------------------------------------------------------------------------------- how an image is read


def read_one(folder: Path, write: Any, suffix: str = ".png", **task_args: Any) -> torch.Tensor:
    """The first training image after `write(path)` has made it."""
    root = write_split(folder)
    (root / "train" / "ash" / "0.png").unlink()
    write(root / "train" / "ash" / f"0{suffix}")
    return open_folder(root, **task_args).sets["train"].images[0]


def test_the_centre_of_a_wide_image_is_kept(tmp_path: Path) -> None:
    array = np.zeros((64, 192, 3), np.uint8)
    array[:, 64:128] = (10, 200, 30)
    image = read_one(tmp_path, Image.fromarray(array).save)
    assert image.shape == (3, 32, 32)
    inner = image[:, :, 2:-2].reshape(3, -1)  # resampling mixes the outermost columns
    assert (inner == torch.tensor([[10], [200], [30]])).all()


def test_resizing_keeps_the_mean(tmp_path: Path) -> None:
    """As a block mean would: the resize is antialiased. Large JPEGs take the short cut through their own scaling."""
    ramp = np.broadcast_to(np.linspace(0, 255, 512)[:, None, None], (512, 512, 3)).astype(np.uint8)
    image = read_one(tmp_path, lambda path: Image.fromarray(ramp).save(path, quality=95), suffix=".JPEG")
    blocks = torch.tensor(ramp[:, 0, 0].reshape(32, 16).mean(1))
    assert (image[0].float().mean(1) - blocks)[2:-2].abs().max() < 2


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("L", ".png"), ("1", ".png"), ("P", ".png"), ("RGBA", ".png"), ("LA", ".png"), ("CMYK", ".jpg")],
)
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str, suffix: str) -> None:
    source = Image.new("RGB", (32, 32), (255, 255, 255)).convert(mode)
    assert (read_one(tmp_path, source.save, suffix) == 255).all()


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    array = (np.arange(32 * 32, dtype=np.uint16) * 64).reshape(32, 32)
    assert torch.equal(read_one(tmp_path, Image.fromarray(array).save)[1], torch.tensor((array >> 8).astype(np.uint8)))


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    array = np.zeros((32, 32, 3), np.uint8)
    array[:16] = 255  # the bright half is on top of the stored image
    exif = Image.Exif()
    exif[0x0112] = 3  # "turned by 180 degrees"
    image = read_one(tmp_path, lambda path: Image.fromarray(array).save(path, exif=exif))
    assert (image[:, 16:] == 255).all() and (image[:, :16] == 0).all()


def test_one_channel_on_request(tmp_path: Path) -> None:
    root = write_split(tmp_path / "data")
    task = open_folder(root, channels=1, mean=[100], std=[50])
    assert torch.equal(task.sets["train"].images[0], pixels(root / "train" / "ash" / "0.png", "L"))
    batch = next(iter(task.item_loader("test", "query")))
    expected = (task.sets["test"].images[:1].float() - 100) / 50
    torch.testing.assert_close(batch.x["image"][:1], expected)


# ------------------------------------------------------------------------------------------------------ the cache


def test_slow_decoding_is_cached_until_a_file_changes(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_split(tmp_path / "data")
    (root / "train" / "ash" / "3.png").write_bytes(b"broken")
    monkeypatch.setattr(imagefolder, "SLOW", -1)
    before = open_folder(root, skip_corrupt=True)
    (cached,) = own_cache.rglob("*.safetensors")
    decode = imagefolder._square
    monkeypatch.setattr(imagefolder, "_square", lambda *_: pytest.fail("decoded again"))
    again = open_folder(root, skip_corrupt=True)
    assert again.fingerprint == before.fingerprint and again.skipped == before.skipped
    assert capsys.readouterr().err.count("skipped 1 of 48") == 2
    monkeypatch.setattr(imagefolder, "_square", decode)
    cached.write_bytes(cached.read_bytes()[:1000])  # damaged: decoded anew
    assert open_folder(root, skip_corrupt=True).fingerprint == before.fingerprint
    picture(999).save(root / "train" / "ash" / "0.png")
    assert open_folder(root, skip_corrupt=True).fingerprint != before.fingerprint


def test_an_unwritable_cache_costs_nothing_but_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(imagefolder, "SLOW", -1)
    assert len(open_folder(write_split(tmp_path / "data")).sets["train"].images) == 30


def test_a_progress_bar_shows_where_there_is_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rich.console import Console

    screen = io.StringIO()
    monkeypatch.setattr(imagefolder, "get_console", lambda: Console(file=screen, force_terminal=True))
    open_folder(write_split(tmp_path / "data", train=180, test=2))  # 1,092 images
    assert "reading images" in screen.getvalue()


# ------------------------------------------------------------------------------------------------------ bad input


def truncated(root: Path) -> None:
    victim = root / "train" / "cedar" / "2.png"
    victim.write_bytes(victim.read_bytes()[:200])


def truncated_jpeg(root: Path) -> None:
    victim = root / "val" / "elm" / "2.jpg"
    picture(3, (100, 80)).save(victim)
    victim.write_bytes(victim.read_bytes()[:-500])


def not_an_image(root: Path) -> None:
    (root / "train" / "ash" / "x.jpg").write_text("<html>404</html>")


def dangling(root: Path) -> None:
    (root / "train" / "ash" / "x.png").symlink_to(root / "gone.png")


def floats(root: Path) -> None:
    Image.fromarray(np.ones((32, 32), np.float32)).save(root / "train" / "ash" / "x.tif")


def emptied(root: Path) -> None:
    for path in (root / "val" / "birch").iterdir():
        path.unlink()


def one_test_image(root: Path) -> None:
    for path in sorted((root / "val" / "birch").iterdir())[1:]:
        path.unlink()


def two_tests(root: Path) -> None:
    (root / "test").mkdir()


def without(name: str) -> Any:
    return lambda root: shutil.rmtree(root / name)


CASES: dict[
    str, tuple[Any, dict[str, Any], list[str]]
] = {  # name -> (what happens to a good folder, other task_args, words that the one line must hold)
    "truncated PNG": (truncated, {}, ["cedar/2.png", "decoded", "repair or remove", "skip_corrupt"]),
    "truncated JPEG": (truncated_jpeg, {}, ["elm/2.jpg", "truncated", "repair or remove"]),
    "not an image": (not_an_image, {}, ["ash/x.jpg", "remove"]),
    "dangling link": (dangling, {}, ["ash/x.png", "No such file"]),
    "32-bit floats": (floats, {}, ["ash/x.tif", "32-bit"]),
    "no folder": (without("."), {}, ["no folder", "--data"]),
    "no train folder": (without("train"), {}, ["'train'", "test_share"]),
    "no test folder": (without("val"), {}, ["no val, validation or test", "`test`"]),
    "two test folders": (two_tests, {}, ["val and test", "`test`"]),
    "test folder that is not there": (None, {"test": "valid"}, ["'valid'"]),
    "class folder missing": (without("val/gum"), {}, ["val", "'gum'"]),
    "class with a typo": (None, {"classes": ["ash", "brich"]}, ["'brich'", "did you mean birch?"]),
    "class unlike any": (None, {"unseen_classes": ["zzz"]}, ["'zzz'", "it has 6", "ash, birch"]),
    "class twice": (None, {"unseen_classes": ["ash"]}, ["twice"]),
    "class names that YAML made numbers": (None, {"classes": [1, 2]}, ["classes", "quotes"]),
    "empty class folder": (emptied, {}, ["val/birch", "no image", ".jpg"]),
    "no file of the extensions": (None, {"extensions": [".jpg"]}, ["no image (.jpg)"]),
    "too few test images": (one_test_image, {}, ["birch", "1 test image", "match"]),
    "too few training images": (None, {"heldout": 5}, ["ash", "5 training images", "heldout = 5"]),
    "no share of a split folder": (None, {"test_share": 0.2}, ["train, val", "drop test_share"]),
    "share of nothing": (None, {"test_share": 1.5}, ["test_share", "between 0 and 1"]),
    "too large for memory": (None, {"limit_gb": 1e-5}, ["48 images of 3 x 32 x 32", "147,456 bytes", "limit_gb"]),
    "typo in task_args": (None, {"pixel": 8}, ["'pixel'", "pixels"]),
    "wrong type": (None, {"pixels": "many"}, ["pixels", "'many'"]),
    "no pixels": (None, {"pixels": 0}, ["pixels", "at least 1"]),
    "other channels": (None, {"channels": 4}, ["channels", "1 or 3"]),
    "mean of another length": (None, {"mean": [1.0]}, ["mean needs 3"]),
    "zero deviation": (None, {"std": [1, 0, 1]}, ["std above 0"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_clear_line(case: str, tmp_path: Path) -> None:
    spoil, task_args, words = CASES[case]
    root = write_split(tmp_path / "data")
    if spoil:
        spoil(root)
    with pytest.raises(UserError) as caught:
        open_folder(root, **task_args)
    line = str(caught.value)
    assert "\n" not in line and line.startswith("imagefolder")
    for word in words:
        assert word in line, line


def test_no_folder_given() -> None:
    with pytest.raises(UserError, match="--data DIR"):
        open_folder(None)


def test_corrupt_images_are_skipped_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_split(tmp_path / "data")
    whole = open_folder(root).sets["train"]
    truncated(root)
    not_an_image(root)
    task = open_folder(root, skip_corrupt=True)
    assert task.skipped == [root / "train" / "ash" / "x.jpg", root / "train" / "cedar" / "2.png"]
    notice = capsys.readouterr().err
    assert "skipped 2 of 49" in notice and "ash/x.jpg" in notice
    kept = [i for i in range(30) if i != 12]
    assert torch.equal(task.sets["train"].images, whole.images[kept])
    assert torch.equal(task.sets["train"].labels, whole.labels[kept])


# -------------------------------------------------------------------------------------------------- real images


@pytest.mark.skipif(not TINY_IMAGENET.is_dir(), reason="set COMPATBENCH_DATA to a folder that holds tiny-imagenet-100")
def test_tiny_imagenet_whole() -> None:
    args = {"pixels": 64, "classes": None, "validation_classes": None, "unseen_classes": None, "heldout": 0}
    task = open_folder(TINY_IMAGENET, **args)
    train, test = (task.sets[split] for split in ("train", "test"))
    assert train.images.shape == (4000, 3, 64, 64) and train.labels.bincount().tolist() == [40] * 100
    assert test.images.shape == (2000, 3, 64, 64) and test.labels.bincount().tolist() == [20] * 100
    first = sorted((TINY_IMAGENET / "train" / task.train_classes[0]).iterdir())[0]
    assert torch.equal(train.images[0], pixels(first))
    gray = [i for i in range(4000) if (train.images[i, 0] == train.images[i, 1]).all()]
    assert gray, "a few per cent of the files are grayscale: they must have been converted, not refused"


# ----------------------------------------------------------------------------------------------------- CIFAR-100


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder laid out as CIFAR-100, 40 + 20 images, with the published hashes replaced by its own; no network."""
    from torchvision.datasets import CIFAR100
    from torchvision.datasets.utils import calculate_md5

    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("train", 40), ("test", 20)):
        data = {"data": rng.integers(0, 256, (count, 3072), np.uint8), "fine_labels": [i % 4 for i in range(count)]}
        (folder / name).write_bytes(pickle.dumps(data))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": CLASSES[:4]}))
    monkeypatch.setattr(CIFAR100, "train_list", [["train", calculate_md5(folder / "train")]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", calculate_md5(folder / "test")]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": calculate_md5(folder / "meta")})
    monkeypatch.setattr("tasks.cifar100.FILES", {"train": 40, "test": 20})

    def no_network(self: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(CIFAR100, "download", no_network)
    return tmp_path


def open_cifar(root: Path | None, **task_args: Any) -> Cifar100:
    found = dataclasses.replace(
        protocols.load(EXAMPLE), task="Cifar100", task_args={"classes": CLASSES[:4], **task_args}
    )
    task = open_task(found, root, "cpu")
    assert isinstance(task, Cifar100)
    return task


def test_cifar_is_read_and_halved(cifar: Path) -> None:
    whole, half = open_cifar(cifar), open_cifar(cifar, pixels=16)
    raw = pickle.loads((cifar / "cifar-100-python" / "train").read_bytes())
    assert torch.equal(whole.sets["train"].images, torch.tensor(raw["data"]).view(40, 3, 32, 32))
    assert whole.sets["train"].labels.tolist() == raw["fine_labels"]
    blocks = raw["data"].reshape(40, 3, 16, 2, 16, 2).astype(float).mean((3, 5))
    assert np.abs(half.sets["train"].images.numpy() - blocks).max() <= 0.5
    assert Cifar100.missing(cifar) is None


@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_a_short_cifar_file_is_named(cifar: Path, name: str) -> None:
    path = cifar / "cifar-100-python" / name
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="MD5") as caught:
        open_cifar(cifar)
    others = {"train", "test", "meta"} - {name}
    assert str(path) in str(caught.value) and "remove" in str(caught.value) and "\n" not in str(caught.value)
    assert not any(f"cifar-100-python/{other}" in str(caught.value) for other in others)


def test_an_absent_cifar_file_is_named_and_the_way_out(cifar: Path) -> None:
    (cifar / "cifar-100-python" / "test").unlink()
    problem = Cifar100.missing(cifar)
    assert problem and "lacks test;" in problem
    with pytest.raises(UserError) as caught:
        open_cifar(cifar)
    for word in ("not found under", "no route to host", "train, test and meta", str(cifar), "--data"):
        assert word in str(caught.value)


def test_a_cifar_of_another_length_is_refused(cifar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.cifar100.FILES", {"train": 50_000, "test": 10_000})
    with pytest.raises(UserError, match="train holds 40 images and 40 labels, not 50000"):
        open_cifar(cifar)
    with pytest.raises(UserError, match="16, 32 or more, not 20"):
        open_cifar(cifar, pixels=20)
