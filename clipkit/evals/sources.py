"""Where evaluation images come from: shards, CLIP_benchmark's layout, image folders, tars with a folder a
class, CIFAR's files.
"""

from __future__ import annotations

import io
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipkit.data.captions import clean_caption
from clipkit.data.decode import read_image
from clipkit.data.evalset import open_set, read_set
from clipkit.data.faults import SHARD_CAUSES, DataError
from clipkit.data.tarindex import Member, TarFiles
from clipkit.data.urls import expand_shards
from clipkit.evals.classes import ClassNames
from clipkit.evals.items import IMAGE_SUFFIXES, WHOLE, ImageSource, Items, batch_of, check_faults, class_id
from clipkit.evals.plain_pickle import PickledArray, read_pickle
from clipkit.foreign import BrokenFile, permit, read_text

SOURCE_SETTINGS = ("shards", "clip_benchmark", "folder", "tar", "cifar")
# What indexing a shard leaves out that would have been an item.
_LOST = (
    "missing_image",
    "missing_caption",
    "empty_image",
    "unsafe_path",
    "corrupt_header",
    "truncated_shard",
)
_MEMBER_BYTES = 1 << 20


class Shards(ImageSource):
    """img2dataset shards; the class id is `label_key` of the json, by default `cls` or `label`."""

    def __init__(self, shards: str | list[str], label_key: str | None = None, *, labelled: bool = False):
        # A glob that matches nothing is an error now, not after an epoch of training.
        self.shards, self.labelled = expand_shards(shards), labelled
        self.identity = f"shards {shards if isinstance(shards, str) else ', '.join(map(str, shards))}"
        self.label_keys = (label_key,) if label_key else ("cls", "label")

    def _batches(self, image_size, batch_size, rank, world_size, how):
        with closing(open_set(self.shards)) as data:
            lost = [
                DataError(cause, *((key,) if cause in SHARD_CAUSES else ()), shard=shard, key=key)
                for shard, cause, key in data.faults
                if cause in _LOST
            ]
            self.count = len(data) + sum(fault.cause not in SHARD_CAUSES for fault in lost)
            # Every rank meets the same when it opens the shards: one counts them.
            faults = lost if rank == 0 else []
            read = read_set(
                data,
                image_size=image_size,
                batch_size=batch_size,
                rank=rank,
                world_size=world_size,
                on_bad=faults.append,
                **how,
            )
            for batch in read:
                samples = batch["index"].tolist()
                rows = [
                    {
                        "image": batch["image"][i],
                        "captions": list(batch["captions"][i]),
                        "keys": batch["key"][i],
                        "meta": batch["meta"][i],
                        "where": data.where(samples[i])[0],
                    }
                    for i in range(len(samples))
                ]
                yield samples[0], batch_of(rows, faults[:], image_size)
                faults.clear()
            if faults:
                yield len(data), batch_of([], faults[:], image_size)

    @property
    def content(self):
        return "shards", *map(str, self.shards)

    def label(self, key, meta):
        return class_id(next((meta[key] for key in self.label_keys if key in meta), None))


class ImageFolder(Items):
    """`folder`/CLASS/NAME.jpg; labels follow `classes`, or the sorted folder names."""

    def __init__(self, folder: str | Path, classes: ClassNames | None = None):
        permit(folder, "folder")
        self.folder, self.identity = Path(folder), f"image folder {folder}"
        if not self.folder.is_dir():
            raise ValueError(f"image folder {folder} does not exist")
        keys = [
            str(path.relative_to(self.folder))
            for path in self.folder.glob("*/*")
            if path.suffix.lower() in IMAGE_SUFFIXES
        ]
        for key in keys:
            permit(self.folder / key, "folder")
        filled = {Path(key).parent.name for key in keys}
        for path in sorted(self.folder.iterdir()):
            if path.is_dir() and path.name not in filled:
                raise ValueError(
                    f"{self.identity}: class {path.name!r} is empty; add images or remove the folder"
                )
        self._label_by_folder(keys, classes)

    def read(self, key):
        return read_image(self.folder / key)


class ClassTar(Items):
    """One tar of PART/CLASS/NAME.jpg; labels follow `classes`, or the sorted folder names."""

    def __init__(self, tar: str | Path, classes: ClassNames | None = None):
        permit(tar, "tar")
        self.path, self.identity = Path(tar), f"tar {tar}"
        if not self.path.is_file():
            raise ValueError(f"tar {tar} does not exist, or is not a regular file")
        self._tar = TarFiles(self.path)
        self._where = {
            member.name: member
            for member in self._tar.members
            if Path(member.name).suffix.lower() in IMAGE_SUFFIXES
        }
        self._label_by_folder(list(self._where), classes)

    def read(self, key):
        return self._tar.read(self._where[key])


class ClipBenchmark(Items):
    """CLIP_benchmark's webdataset layout: FOLDER/`split`/N.tar of KEY.jpg|png|webp with KEY.cls or KEY.txt.

    Beside the splits, classnames.txt and zeroshot_classification_templates.txt hold one class and one
    template a line; a retrieval set's .txt holds one caption a line.

    Args:
        captioned: leave out images without a caption.
    """

    def __init__(self, folder: str | Path, split: str = "test", *, captioned: bool = False):
        permit(folder, "clip_benchmark")
        permit(Path(folder) / split, "split")
        self.folder, self.identity = Path(folder), f"CLIP_benchmark folder {folder} split {split}"
        tars = sorted((self.folder / split).glob("*.tar"), key=lambda path: (len(path.stem), path.stem))
        if not tars:
            splits = sorted(path.name for path in self.folder.glob("*") if path.is_dir())
            raise ValueError(f"{self.identity} holds no tar; splits found: {', '.join(splits) or 'none'}")
        self._check_count(self.folder / split / "nshards.txt", len(tars))
        self.classes = self.lines("classnames.txt")
        self.templates = self.lines("zeroshot_classification_templates.txt")
        self._where: dict[str, tuple[TarFiles, Member]] = {}
        self.items, self.lost = [], []
        for tar in expand_shards(tars, what="clip_benchmark"):
            self._index(TarFiles(tar))
        if captioned:
            self.identity += " with captions"
            self.lost += [
                self._fault("missing_caption", key) for key, _, captions in self.items if not captions
            ]
            self.items = [item for item in self.items if item[2]]
        try:
            check_faults(self.lost, self.identity, items=len(self.items) + len(self.lost), shards=len(tars))
        except RuntimeError as error:
            raise ValueError(str(error)) from None

    def _fault(self, cause: str, key: str) -> DataError:
        return DataError(cause, shard=self.identity, key=key)

    def _check_count(self, file: Path, found: int) -> None:
        if file.exists():
            permit(file, "nshards.txt")
            said = read_text(file, limit=_MEMBER_BYTES).strip()
            if not WHOLE.fullmatch(said):
                raise BrokenFile(f"{file} holds no number of tars")
            if int(said) != found:
                raise ValueError(f"{self.identity}: nshards.txt says {int(said)}, found {found} tars")

    def lines(self, name: str) -> list[str] | None:
        path = self.folder / name
        if not path.exists():
            return None
        permit(path, name)
        return [line.strip() for line in read_text(path).splitlines() if line.strip()]

    def _index(self, tar: TarFiles) -> None:
        samples: dict[str, dict[str, Any]] = {}
        for member in tar.members:
            path = Path(member.name)
            stem, _, suffix = path.name.partition(".")
            name = str(path.parent / stem)
            sample = samples.setdefault(name, {})
            part = "image" if f".{suffix.lower()}" in IMAGE_SUFFIXES else suffix
            if part in sample:
                self.lost = [*self.lost, self._fault("duplicate_key", f"{tar.path.name}/{name}")]
            elif part == "image":
                sample["image"] = member
            elif part in ("cls", "txt"):
                if member.size > _MEMBER_BYTES:
                    raise BrokenFile(
                        f"{tar.path}: {member.name[:200]} has {member.size} bytes, which is no class id or caption"
                    )
                try:
                    sample[part] = tar.read(member).decode("utf-8").strip()
                except UnicodeDecodeError:
                    raise BrokenFile(f"{tar.path}: {member.name[:200]} is not UTF-8 text") from None
        for name, sample in samples.items():
            key = f"{tar.path.name}/{name}"
            if "image" not in sample:
                self.lost = [*self.lost, self._fault("missing_image", key)]
                continue
            label = class_id(sample.get("cls"))
            if isinstance(label, DataError):
                raise BrokenFile(f"{tar.path}: the class id of sample {name[:200]} is no whole number")
            self._where[key] = (tar, sample["image"])
            captions = [text for text in map(clean_caption, sample.get("txt", "").splitlines()) if text]
            self.items.append((key, label, captions))

    def read(self, key):
        tar, member = self._where[key]
        return tar.read(member)


class Cifar(Items):
    """CIFAR-10 or CIFAR-100 as torchvision keeps it: FOLDER/cifar-10-batches-py or FOLDER/cifar-100-python.

    The files are pickles; they are read by an unpickler that knows plain values and arrays of bytes alone.
    """

    def __init__(self, folder: str | Path, split: str = "test"):
        names = {
            "cifar-10-batches-py": {
                "test": ["test_batch"],
                "train": [f"data_batch_{i}" for i in range(1, 6)],
            },
            "cifar-100-python": {"test": ["test"], "train": ["train"]},
        }
        permit(folder, "cifar")
        self.identity = f"CIFAR in {folder} split {split}"
        root = next((Path(folder) / name for name in names if (Path(folder) / name).is_dir()), Path(folder))
        if root.name not in names:
            raise ValueError(f"{folder} holds neither cifar-10-batches-py nor cifar-100-python")
        if split not in names[root.name]:
            raise ValueError(f"CIFAR has the splits test and train; got {split!r}")
        meta_file, prefix = ("batches.meta", b"") if root.name.startswith("cifar-10-") else ("meta", b"fine_")
        found = read_pickle(root / meta_file).get(prefix + b"label_names")
        if not isinstance(found, list) or not all(isinstance(name, bytes) for name in found):
            raise BrokenFile(f"{root / meta_file} holds no list of class names")
        self.classes = [name.decode("utf-8", "replace").replace("_", " ") for name in found]
        self._pixels: list[np.ndarray] = []
        labels: list[int] = []
        for path in (root / name for name in names[root.name][split]):
            batch = read_pickle(path)
            pixels, ids = batch.get(b"data"), batch.get(prefix + b"labels")
            rows = pixels.bytes() if isinstance(pixels, PickledArray) else np.empty(0, np.uint8)
            if rows.ndim != 2 or rows.shape[-1] != 3072:
                raise BrokenFile(f"{path} holds no pictures of 32 x 32 (`data` of (N, 3072) bytes)")
            if (
                not isinstance(ids, list)
                or len(ids) != len(rows)
                or not all(isinstance(label, int) and 0 <= label < len(self.classes) for label in ids)
            ):
                raise BrokenFile(
                    f"{path} does not hold a class from 0 to {len(self.classes) - 1} for each picture"
                )
            self._pixels += [np.asarray(row) for row in rows]
            labels += ids
        self.items = [(f"{split}/{i:05d}", int(label), []) for i, label in enumerate(labels)]

    def read(self, key):
        buffer = io.BytesIO()
        pixels = self._pixels[int(key.rpartition("/")[2])].reshape(3, 32, 32).transpose(1, 2, 0)
        Image.fromarray(pixels).save(buffer, "BMP")
        return buffer.getvalue()


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
    classes: ClassNames | None = None,
    labelled: bool = False,
    captioned: bool = False,
) -> ImageSource:
    """The one source that is given; `what` names the task in the error for none or several.

    Args:
        classes: what the labels are rows of; None: the source's own. Shards have numbers alone.
        labelled, captioned: what the task needs of each image; one that has it broken is left out.
    """
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
        return Shards(shards, label_key, labelled=labelled)
    if folder is not None:
        source: Items = ImageFolder(folder, classes)
    elif tar is not None:
        source = ClassTar(tar, classes)
    elif cifar is not None:
        source = Cifar(cifar, split)
    else:
        assert clip_benchmark is not None, "one is given"
        source = ClipBenchmark(clip_benchmark, split, captioned=captioned)
    if classes is not None:
        source.follow(classes)
    source.labelled = labelled
    return source
