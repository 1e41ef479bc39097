"""Where evaluation images come from: shards, CLIP_benchmark's layout, image folders, tars with a folder a
class.

Every source yields its images once, in a fixed order, each batch with its place, so that ranks share the work
and the whole can be put together again. Images outside shards are decoded and resized by PIL (bicubic to the
shorter side, centre crop): the pixels open_clip's evaluation transform makes, before its normalisation.
"""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipkit.data import expand_shards, iter_eval
from clipkit.registry import suggest

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".gif", ".tif", ".tiff")
SOURCE_SETTINGS = ("shards", "clip_benchmark", "folder", "tar", "cifar")


def load_image(data: bytes | Path, image_size: int) -> Tensor:
    """(3, image_size, image_size) uint8 RGB: shorter side to `image_size` by bicubic, then the centre."""
    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
        # 16-bit greyscale would clip to white.
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype("uint8"))
        image = image.convert("RGB")
    short = min(image.size)
    width, height = (int(image_size * side / short) for side in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - image_size) / 2), round((height - image_size) / 2)
    image = image.crop((left, top, left + image_size, top + image_size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class ImageSource:
    """Images with captions or class labels.

    Attributes:
        identity: what the source reads; equal identities are encoded once.
        classes: the class names or folder names the source itself knows, or None.
    """

    identity: str
    classes: list[str] | None = None

    def batches(
        self, image_size: int, batch_size: int, *, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """This rank's batches {image (B, 3, H, W) uint8, captions, labels, keys, meta}, each with its place
        in the order.
        """
        raise NotImplementedError


class Shards(ImageSource):
    """img2dataset shards read by clipkit.data.iter_eval; the class id is `label_key` of the json (`cls` or
    `label`).
    """

    def __init__(self, shards: str | list[str], label_key: str | None = None):
        # A glob that matches nothing is an error now, not after an epoch of training.
        self.shards = expand_shards(shards)
        self.identity = f"shards {shards if isinstance(shards, str) else ', '.join(map(str, shards))}"
        self.label_keys = (label_key,) if label_key else ("cls", "label")

    def batches(self, image_size, batch_size, *, rank=0, world_size=1):
        read = iter_eval(
            self.shards, image_size=image_size, batch_size=batch_size, rank=rank, world_size=world_size
        )
        for batch in read:
            labels = [
                next((meta[key] for key in self.label_keys if key in meta), None) for meta in batch["meta"]
            ]
            yield (
                int(batch["index"][0]),
                {
                    "image": batch["image"],
                    "captions": [list(captions) for captions in batch["captions"]],
                    "labels": [None if label is None else int(label) for label in labels],
                    "keys": list(batch["key"]),
                    "meta": list(batch["meta"]),
                },
            )


class Items(ImageSource):
    """Images listed beforehand; a subclass lists (key, label, captions) and reads the bytes of one."""

    items: list[tuple[str, int | None, list[str]]]

    def read(self, key: str) -> bytes:
        raise NotImplementedError

    def batches(self, image_size, batch_size, *, rank=0, world_size=1):
        for number in range(rank, -(-len(self.items) // batch_size), world_size):
            items = self.items[number * batch_size : (number + 1) * batch_size]
            images = []
            for key, _, _ in items:
                try:
                    images.append(load_image(self.read(key), image_size))
                except OSError as error:
                    raise ValueError(f"{self.identity}: {key} is not a readable image ({error})") from error
            yield (
                number,
                {
                    "image": torch.stack(images),
                    "captions": [captions for _, _, captions in items],
                    "labels": [label for _, label, _ in items],
                    "keys": [key for key, _, _ in items],
                    "meta": [{} for _ in items],
                },
            )

    def _label_by_folder(self, keys: list[str], folders: list[str] | None) -> None:
        """Fill `items` from the folder each key lies in; `folders` fixes the order of the labels."""
        found = sorted({Path(key).parent.name for key in keys})
        if folders is not None and len(folders) == len(found) and not set(found) & set(folders):
            # As ImageNet's folders of wnids under a list of names: both in the same order.
            folders = None
        self.classes = list(folders) if folders is not None else found
        for name in found:
            if name not in self.classes:
                raise ValueError(
                    f"{self.identity}: folder {name!r} is none of the {len(self.classes)} classes."
                    f"{suggest(name, self.classes)}"
                )
        labels = {name: label for label, name in enumerate(self.classes)}
        self.items = [(key, labels[Path(key).parent.name], []) for key in sorted(keys)]
        if not self.items:
            raise ValueError(f"{self.identity} holds no image in a class folder; expected CLASS/NAME.jpg")


class ImageFolder(Items):
    """`folder`/CLASS/NAME.jpg; labels follow `folders`, or the sorted folder names."""

    def __init__(self, folder: str | Path, folders: list[str] | None = None):
        self.folder, self.identity = Path(folder), f"image folder {folder}"
        if not self.folder.is_dir():
            raise ValueError(f"image folder {folder} does not exist")
        keys = [
            str(path.relative_to(self.folder))
            for path in self.folder.glob("*/*")
            if path.suffix.lower() in IMAGE_SUFFIXES
        ]
        filled = {Path(key).parent.name for key in keys}
        for path in sorted(self.folder.iterdir()):
            if path.is_dir() and path.name not in filled:
                raise ValueError(
                    f"{self.identity}: class {path.name!r} is empty; add images or remove the folder"
                )
        self._label_by_folder(keys, folders)

    def read(self, key):
        return (self.folder / key).read_bytes()


class ClassTar(Items):
    """One tar of PART/CLASS/NAME.jpg; labels follow `folders`, or the sorted folder names."""

    def __init__(self, tar: str | Path, folders: list[str] | None = None):
        self.path, self.identity = Path(tar), f"tar {tar}"
        if not self.path.is_file():
            raise ValueError(f"tar {tar} does not exist")
        with tarfile.open(self.path, "r:") as archive:
            members = [m for m in archive if m.isfile() and Path(m.name).suffix.lower() in IMAGE_SUFFIXES]
        self._where = {m.name: (m.offset_data, m.size) for m in members}
        self._label_by_folder(list(self._where), folders)

    def read(self, key):
        offset, size = self._where[key]
        with open(self.path, "rb") as file:
            file.seek(offset)
            return file.read(size)


class ClipBenchmark(Items):
    """CLIP_benchmark's webdataset layout: FOLDER/`split`/N.tar of KEY.jpg|png|webp with KEY.cls or KEY.txt.

    Beside the splits, classnames.txt and zeroshot_classification_templates.txt hold one class and one
    template a line; a retrieval set's .txt holds one caption a line.
    """

    def __init__(self, folder: str | Path, split: str = "test"):
        self.folder, self.identity = Path(folder), f"CLIP_benchmark folder {folder} split {split}"
        tars = sorted((self.folder / split).glob("*.tar"), key=lambda path: (len(path.stem), path.stem))
        if not tars:
            splits = sorted(path.name for path in self.folder.glob("*") if path.is_dir())
            raise ValueError(f"{self.identity} holds no tar; splits found: {', '.join(splits) or 'none'}")
        count = self.folder / split / "nshards.txt"
        if count.exists() and int(count.read_text()) != len(tars):
            raise ValueError(
                f"{self.identity}: nshards.txt says {count.read_text().strip()}, found {len(tars)} tars"
            )
        self.classes = self.lines("classnames.txt")
        self.templates = self.lines("zeroshot_classification_templates.txt")
        self._where: dict[str, tuple[Path, int, int]] = {}
        self.items = []
        for tar in tars:
            self._index(tar)

    def lines(self, name: str) -> list[str] | None:
        path = self.folder / name
        return (
            [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
            if path.exists()
            else None
        )

    def _index(self, tar: Path) -> None:
        samples: dict[str, dict[str, Any]] = {}
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                stem, _, suffix = Path(member.name).name.partition(".")
                sample = samples.setdefault(str(Path(member.name).parent / stem), {})
                if f".{suffix.lower()}" in IMAGE_SUFFIXES:
                    sample["image"] = (member.offset_data, member.size)
                elif suffix in ("cls", "txt") and (file := archive.extractfile(member)) is not None:
                    sample[suffix] = file.read().decode("utf-8").strip()
        for name, sample in samples.items():
            key = f"{tar.name}/{name}"
            if "image" not in sample:
                raise ValueError(f"{self.identity}: sample {key} has no image")
            self._where[key] = (tar, *sample["image"])
            captions = [line.strip() for line in sample.get("txt", "").splitlines() if line.strip()]
            self.items.append((key, int(sample["cls"]) if "cls" in sample else None, captions))

    def read(self, key):
        tar, offset, size = self._where[key]
        with open(tar, "rb") as file:
            file.seek(offset)
            return file.read(size)


class Cifar(Items):
    """CIFAR-10 or CIFAR-100 as torchvision keeps it: FOLDER/cifar-10-batches-py or FOLDER/cifar-100-python.

    The files are pickles; they are read by an unpickler that knows arrays, bytes, lists and dicts alone.
    """

    def __init__(self, folder: str | Path, split: str = "test"):
        names = {
            "cifar-10-batches-py": {
                "test": ["test_batch"],
                "train": [f"data_batch_{i}" for i in range(1, 6)],
            },
            "cifar-100-python": {"test": ["test"], "train": ["train"]},
        }
        self.identity = f"CIFAR in {folder} split {split}"
        root = next((Path(folder) / name for name in names if (Path(folder) / name).is_dir()), Path(folder))
        if root.name not in names:
            raise ValueError(f"{folder} holds neither cifar-10-batches-py nor cifar-100-python")
        if split not in names[root.name]:
            raise ValueError(f"CIFAR has the splits test and train; got {split!r}")
        meta = _load_arrays(
            root / ("batches.meta" if "10-" in root.name and "100" not in root.name else "meta")
        )
        names_key, label_key = (
            (b"label_names", b"labels") if b"label_names" in meta else (b"fine_label_names", b"fine_labels")
        )
        self.classes = [name.decode().replace("_", " ") for name in meta[names_key]]
        batches = [_load_arrays(root / name) for name in names[root.name][split]]
        self._pixels = [row for batch in batches for row in batch[b"data"]]
        labels = [label for batch in batches for label in batch[label_key]]
        self.items = [(f"{split}/{i:05d}", int(label), []) for i, label in enumerate(labels)]

    def read(self, key):
        buffer = io.BytesIO()
        pixels = self._pixels[int(key.rpartition("/")[2])].reshape(3, 32, 32).transpose(1, 2, 0)
        Image.fromarray(pixels).save(buffer, "BMP")
        return buffer.getvalue()


def _load_arrays(path: Path) -> Any:
    """A pickle of plain values and NumPy arrays; anything else in it is a ValueError."""

    class Arrays(pickle.Unpickler):
        def find_class(self, module, name):
            if name in ("_reconstruct", "ndarray", "dtype") and module.startswith("numpy"):
                return super().find_class(
                    "numpy._core.multiarray" if name == "_reconstruct" else "numpy", name
                )
            if (module, name) == ("_codecs", "encode"):
                return super().find_class(module, name)
            raise ValueError(
                f"{path} holds {module}.{name}, which is no array: it is not CIFAR's file, and was not loaded"
            )

    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    with open(path, "rb") as file:
        return Arrays(file, encoding="bytes").load()


def open_source(
    what: str,
    *,
    shards: str | list[str] | None = None,
    clip_benchmark: str | None = None,
    folder: str | None = None,
    tar: str | None = None,
    cifar: str | None = None,
    split: str = "test",
    label_key: str | None = None,
    folders: list[str] | None = None,
) -> ImageSource:
    """The one source that is given; `what` names the task in the error for none or several."""
    given = {
        name: value
        for name, value in zip(SOURCE_SETTINGS, (shards, clip_benchmark, folder, tar, cifar), strict=True)
        if value is not None
    }
    if len(given) != 1:
        raise ValueError(
            f"{what} needs exactly one of {', '.join(SOURCE_SETTINGS)}; got {', '.join(given) or 'none'}"
        )
    if shards is not None:
        return Shards(shards, label_key)
    if clip_benchmark is not None:
        return ClipBenchmark(clip_benchmark, split)
    if cifar is not None:
        return Cifar(cifar, split)
    if folder is not None:
        return ImageFolder(folder, folders)
    assert tar is not None, "one is given"
    return ClassTar(tar, folders)
