"""A teacher's stored features, found by what they are of: an image file's bytes, a caption's text.

    FOLDER/teacher.json              what made them, their widths and parts, and the parts' sha256; written last
    FOLDER/image-00000.safetensors   ids (n,) int64, features (n, E) float32 or float16, unit norm
    FOLDER/text-00000.safetensors    the same of captions

An id is a 64-bit hash of the content, so shards may be renamed, mixed, packed anew and read in any order: a vector is
never another sample's. Two of N contents share one with a probability of N^2 / 2^65: 3e-6 in ten million.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clipkit.data.faults import DataError
from clipkit.files import flush, write_json
from clipkit.foreign import BrokenFile, read_bytes, read_json

SIDES = ("image", "text")
INDEX = "teacher.json"
_FORMAT = 1
# Of a unit vector as float16 has it.
_NORM_TOLERANCE = 0.01


class _Side(TypedDict):
    width: int
    count: int
    parts: dict[str, str]


class _Index(TypedDict):
    """What teacher.json holds."""

    format: int
    teacher: str
    logit_scale: float | None
    sides: dict[str, _Side]


def content_of(content: bytes | str) -> int:
    """The id of an image file's bytes or a caption, an int64."""
    raw = content.encode("utf-8") if isinstance(content, str) else content
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little", signed=True)


class Teacher:
    """The features of a folder that `TeacherWriter` wrote.

    Args:
        folder: data.teacher.
        sides: image, text or both: what is read; None: all there is.

    Attributes:
        sides: as read.
        widths: {side: columns E}.
        logit_scale: the teacher's multiplier; None where it has none.
        fingerprint: of the whole content.

    Raises:
        ValueError: no such folder, one that is not whole, or without a side that is asked for.
    """

    def __init__(self, folder: str | Path, sides: Sequence[str] | None = None):
        self.folder = Path(folder)
        if not (self.folder / INDEX).is_file():
            raise ValueError(
                f"data.teacher is {folder}, which holds no {INDEX}: give a folder that `clipkit-predict teacher` has "
                "written to its end"
            )
        index: Any = read_json(self.folder / INDEX, _Index)
        if index["format"] != _FORMAT:
            raise ValueError(
                f"{self.folder} is of format {index['format']}, and this clipkit reads {_FORMAT}"
            )
        self.sides = tuple(index["sides"]) if sides is None else tuple(sides)
        for side in self.sides:
            if side not in index["sides"] or side not in SIDES:
                raise ValueError(
                    f"data.teacher {self.folder} holds features of {' and '.join(index['sides']) or 'nothing'}, made by "
                    f"{index['teacher']}, and the loss asks for {side} features: choose its `sides`, or another teacher"
                )
        self.logit_scale: float | None = index["logit_scale"]
        self.fingerprint = hashlib.blake2b(
            read_bytes(self.folder / INDEX, limit=1 << 26), digest_size=16
        ).hexdigest()
        self.widths = {side: index["sides"][side]["width"] for side in self.sides}
        self._parts = {side: sorted(index["sides"][side]["parts"]) for side in self.sides}
        self._files: dict[tuple[str, int], Any] = {}
        self._ids, self._places = {}, {}
        for side in self.sides:
            self._ids[side], self._places[side] = self._read_ids(side, index["sides"][side])

    def __getstate__(self) -> dict[str, Any]:
        # A worker opens its own.
        return {**self.__dict__, "_files": {}}

    def check(self, image: int, captions: Sequence[str]) -> None:
        """DataError missing_teacher unless the features of this image and of each of its captions are there."""
        if "image" in self.sides and not self._has("image", [image]):
            raise DataError("missing_teacher", f"{self.folder} holds no feature of the image")
        if "text" in self.sides and not self._has("text", [content_of(text) for text in captions]):
            raise DataError("missing_teacher", f"{self.folder} holds no feature of a caption")

    def entries(self, images: Sequence[int], texts: Sequence[str], per_image: int) -> dict[str, Tensor]:
        """What a batch has of a teacher: dist_image_features (B, E), dist_text_features (B, E) or, with several captions
        an image, (B, m, E), and dist_logit_scale ().

        Args:
            images: the images' ids; texts: their captions, `per_image` each; `check` has passed for all.
        """
        made = {}
        if "image" in self.sides:
            made["dist_image_features"] = self.features("image", images)
        if "text" in self.sides:
            found = self.features("text", [content_of(text) for text in texts])
            made["dist_text_features"] = (
                found if per_image == 1 else found.unflatten(0, (len(images), per_image))
            )
        if self.logit_scale is not None:
            made["dist_logit_scale"] = torch.tensor(self.logit_scale)
        return made

    def features(self, side: str, ids: Sequence[int]) -> Tensor:
        """(len(ids), E) float32 of contents that are there; ValueError for a row that is no unit vector."""
        wanted = np.asarray(ids, dtype=np.int64)
        at = self._places[side][np.searchsorted(self._ids[side], wanted)]
        rows = torch.stack([self._row(side, int(part), int(row)) for part, row in at]).float()
        norms = rows.norm(dim=1)
        if not bool(((norms - 1).abs() <= _NORM_TOLERANCE).all()):
            raise ValueError(
                f"{self.folder} holds a {side} feature of norm {norms.min():.4g} to {norms.max():.4g}, where all are 1: it is "
                "damaged. Write it again"
            )
        return rows

    def _has(self, side: str, ids: Sequence[int]) -> bool:
        known, wanted = self._ids[side], np.asarray(ids, dtype=np.int64)
        at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        return len(known) > 0 and bool((known[at] == wanted).all())

    def _row(self, side: str, part: int, row: int) -> Tensor:
        return self._open(side, part).get_slice("features")[row]

    def _open(self, side: str, part: int) -> Any:
        if (side, part) not in self._files:
            path = self.folder / self._parts[side][part]
            try:
                self._files[side, part] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise BrokenFile(f"{path} is no whole safetensors file ({str(error)[:200]})") from None
        return self._files[side, part]

    def _read_ids(self, side: str, index: _Side) -> tuple[np.ndarray, np.ndarray]:
        """The ids in order, (n,), and the part and row of each, (n, 2)."""
        ids, places = [np.empty(0, np.int64)], [np.empty((0, 2), np.int64)]
        for part, name in enumerate(self._parts[side]):
            if Path(name).name != name:
                raise BrokenFile(f"{self.folder / INDEX} names a file outside of its folder")
            file = self._open(side, part)
            shapes = (
                {key: tuple(file.get_slice(key).get_shape()) for key in ("ids", "features")}
                if {*file.keys()} >= {"ids", "features"}
                else {}
            )
            rows = shapes.get("ids", (0,))[0]
            if shapes != {"ids": (rows,), "features": (rows, index["width"])}:
                raise BrokenFile(
                    f"{self.folder / name} holds {shapes}, and not ids (n,) with features (n, {index['width']})"
                )
            ids.append(file.get_tensor("ids").numpy().astype(np.int64))
            places.append(np.stack([np.full(rows, part), np.arange(rows)], 1))
        every, where = np.concatenate(ids), np.concatenate(places)
        if len(every) != index["count"]:
            raise BrokenFile(
                f"{self.folder} holds {len(every)} {side} features, where {index['count']} are said"
            )
        order = np.argsort(every, kind="stable")
        return every[order], where[order]


class TeacherWriter:
    """Writes a folder that `Teacher` reads, a part at a time; it gets its name when it is whole.

    Args:
        folder: to be made.
        teacher: what makes the features, for people to read.
        logit_scale: its multiplier, of a CLIP model.
        half: keep float16, in half the space.
        rows: features of a part.

    Raises:
        ValueError: the folder is there already and holds something.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        teacher: str,
        logit_scale: float | None = None,
        half: bool = False,
        rows: int = 65_536,
    ):
        self.folder = Path(folder)
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ValueError(f"{self.folder} is there already: give another folder, or remove it")
        self._temporary = self.folder.with_name(f".{self.folder.name}.writing")
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)
        self._index: dict[str, Any] = {"format": _FORMAT, "teacher": teacher, "logit_scale": logit_scale}
        self._index["sides"] = {}
        self._rows, self._type = rows, torch.float16 if half else torch.float32
        self._held: dict[str, list[tuple[int, Tensor]]] = {}
        self._seen: dict[str, set[int]] = {}

    def missing(self, side: str, content: int) -> bool:
        """Whether a content is new; it counts as there from now on."""
        seen = self._seen.setdefault(side, set())
        if content in seen:
            return False
        seen.add(content)
        return True

    def add(self, side: str, ids: Sequence[int], features: Tensor) -> None:
        """Features (n, E), unit norm, of contents that `missing` was asked about."""
        held = self._held.setdefault(side, [])
        held += list(zip(ids, features.detach().cpu().to(self._type), strict=True))
        while len(held) >= self._rows:
            self._write(side, held[: self._rows])
            del held[: self._rows]

    def close(self) -> Path:
        """Write the last parts and the index, and give the folder its name."""
        for side, held in self._held.items():
            if held:
                self._write(side, held)
        write_json(self._temporary / INDEX, self._index)
        if self.folder.exists():
            self.folder.rmdir()
        self._temporary.rename(self.folder)
        flush(self.folder.parent)
        return self.folder

    def _write(self, side: str, held: Sequence[tuple[int, Tensor]]) -> None:
        features = torch.stack([row for _, row in held])
        known = self._index["sides"].setdefault(side, {"width": features.shape[1], "count": 0, "parts": {}})
        path = self._temporary / f"{side}-{len(known['parts']):05d}.safetensors"
        save_file({"ids": torch.tensor([one for one, _ in held]), "features": features}, path)
        # safetensors writes files that none but the owner may read.
        path.chmod(0o644)
        known["parts"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        known["count"] += len(held)
