"""Captioned coloured shapes: data the package makes itself, so that a fresh clone can train at once.

A picture holds one or two shapes (8 colours x 8 shapes = 64 classes) of two sizes on one of three
backgrounds. About 60 % of the captions are short ("a red circle"), the rest say more ("a small red circle
left of a large blue star"). The validation gallery has one-line descriptions of distinct two-shape scenes,
none of which occurs in training, so that retrieval means something; the zero-shot set has one shape a picture
and its class number. With `copies`, every training scene is drawn so many times, and a scene of two shapes is
told from either of them: false negatives are planted, and `scene` in KEY.json says which pairs are the same.

Shards are laid out as img2dataset's: KEY.jpg, KEY.txt, KEY.json. The same arguments give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import random
import shutil
import tarfile
from pathlib import Path
from typing import Any

from clipkit.foreign import BrokenFile, checked, read_json

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 170, 50),
    "blue": (40, 70, 230),
    "yellow": (245, 220, 30),
    "purple": (150, 40, 190),
    "orange": (250, 140, 20),
    "cyan": (40, 210, 220),
    "brown": (120, 70, 30),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
BACKGROUNDS = {"white": (255, 255, 255), "black": (10, 10, 10), "grey": (128, 128, 128)}
RELATIONS = ("left of", "right of", "above", "below")
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

SHAPE_CLASSES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
SHAPE_TEMPLATES = ["a {}", "a small {}", "a large {}", "a picture of a {}"]

_SUPERSAMPLE = 4
_SHARD = 1000
_VERSION = 1


def write_shapes(
    folder: str | Path, *, train: int, val: int, seed: int, image_size: int = 32, copies: int = 1
) -> dict[str, list[str]]:
    """Write the shapes to `folder` unless a finished copy with the same arguments is there.

    Args:
        folder: where `train/`, `val/` and `zeroshot/` go.
        train: training pictures.
        val: pictures of the retrieval gallery, all with different captions, none a scene of training. The
            zero-shot set has the same number, rounded up to a multiple of 64.
        seed: the same seed gives the same bytes.
        image_size: pixels a side.
        copies: pictures drawn of each training scene; above 1 each json has a `scene`, equal where captions say
            the same.

    Returns:
        {"train": [...], "val": [...], "zeroshot": [...]}: shard paths.

    Raises:
        ValueError: a count that is not positive, or a gallery of more distinct scenes than there are.
    """
    if train < 1 or not 1 <= val <= 5000 or image_size < 16 or copies < 1:
        raise ValueError(
            f"write_shapes got train={train}, val={val}, image_size={image_size}, copies={copies}; expected train >= 1, "
            "val from 1 to 5000 (distinct scenes held out of training), image_size >= 16 pixels and copies >= 1"
        )
    folder = Path(folder)
    settings = {"version": _VERSION, "train": train, "val": val, "seed": seed, "image_size": image_size}
    settings |= {"copies": copies} if copies > 1 else {}
    finished = _finished(folder, settings)
    if finished:
        return finished
    part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    sets = _scenes(train, val, seed, copies)
    shards = {
        name: _write_set(part / name, scenes, f"{seed}/{name}", image_size) for name, scenes in sets.items()
    }
    (part / "finished.json").write_text(json.dumps({**settings, "shards": shards}))
    return _move_in_place(part, folder, settings)


def shape_paths(folder: str | Path, *, train: int, val: int) -> dict[str, list[str]]:
    """{"train", "val", "zeroshot": shard paths} that `write_shapes` leaves in a folder; nothing is written."""
    sizes = {"train": train, "val": val, "zeroshot": -(-val // len(SHAPE_CLASSES)) * len(SHAPE_CLASSES)}
    return {
        name: [str(Path(folder) / name / f"{n:06d}.tar") for n in range(-(-size // _SHARD))]
        for name, size in sizes.items()
    }


def _finished(folder: Path, settings: dict[str, Any]) -> dict[str, list[str]] | None:
    """The shard paths of a finished folder with these settings, or None."""
    try:
        found = read_json(folder / "finished.json")
        shards = checked(found.pop("shards", None), dict[str, list[str]], name="finished.json")
    except (OSError, BrokenFile):
        return None
    if any(Path(part).name != part for name, files in shards.items() for part in (name, *files)):
        return None
    paths = {name: [str(folder / name / file) for file in files] for name, files in shards.items()}
    if found != settings:
        raise ValueError(
            f"{folder} holds shapes made with {str(found)[:300]}, not {settings}; give another folder or remove it"
        )
    return paths if all(Path(p).exists() for files in paths.values() for p in files) else None


def _move_in_place(part: Path, folder: Path, settings: dict[str, Any]) -> dict[str, list[str]]:
    """Rename the finished copy; when another process was first, use its copy."""
    for _ in range(2):
        try:
            os.rename(part, folder)
        except OSError:
            if not _finished(folder, settings):
                shutil.rmtree(folder, ignore_errors=True)  # the remains of a run that was killed
                continue
            shutil.rmtree(part, ignore_errors=True)
        break
    finished = _finished(folder, settings)
    if finished is None:
        raise RuntimeError(f"could not move the generated shapes from {part} to {folder}")
    return finished


def _scenes(train: int, val: int, seed: int, copies: int = 1) -> dict[str, list[dict[str, Any]]]:
    rng = random.Random(f"shapes/{seed}")
    gallery: dict[Any, dict[str, Any]] = {}
    while len(gallery) < val:
        scene = _two_shapes(rng)
        gallery.setdefault(_canonical(scene), scene)
    training = []
    while len(training) < train:
        scene = _one_shape(rng) if rng.random() < 0.6 else _two_shapes(rng)
        if _canonical(scene) not in gallery:
            training += [scene] if copies == 1 else [_told_again(rng, scene) for _ in range(copies)]
    del training[train:]
    count = math.ceil(val / len(SHAPE_CLASSES)) * len(SHAPE_CLASSES)
    zeroshot = [_one_shape(rng, cls=i % len(SHAPE_CLASSES)) for i in range(count)]
    return {"train": training, "val": list(gallery.values()), "zeroshot": zeroshot}


def _shape(rng: random.Random, cls: int | None = None) -> dict[str, Any]:
    cls = rng.randrange(len(SHAPE_CLASSES)) if cls is None else cls
    return {"cls": cls, "size": rng.choice(("small", "large"))}


def _one_shape(rng: random.Random, cls: int | None = None) -> dict[str, Any]:
    shape = _shape(rng, cls)
    background = rng.choice(list(BACKGROUNDS))
    name = SHAPE_CLASSES[shape["cls"]]
    # The class alone in most captions; now and then the size or the background as well.
    caption = rng.choice(
        (
            f"a {name}",
            f"a {name}",
            f"a picture of a {name}",
            f"a {shape['size']} {name}",
            f"a {name} on a {background} background",
        )
    )
    return {
        "shapes": [shape],
        "relation": None,
        "background": background,
        "caption": caption,
        "cls": shape["cls"],
    }


def _two_shapes(rng: random.Random) -> dict[str, Any]:
    first, second = _shape(rng), _shape(rng)
    while second["cls"] == first["cls"]:
        second = _shape(rng)
    relation = rng.choice(RELATIONS)
    background = rng.choice(list(BACKGROUNDS))
    return _told(first, relation, second, background)


def _told(first: dict[str, Any], relation: str, second: dict[str, Any], background: str) -> dict[str, Any]:
    caption = (
        f"a {first['size']} {SHAPE_CLASSES[first['cls']]} {relation} "
        f"a {second['size']} {SHAPE_CLASSES[second['cls']]}"
    )
    return {
        "shapes": [first, second],
        "relation": relation,
        "background": background,
        "caption": caption,
        "cls": -1,
    }


def _told_again(rng: random.Random, scene: dict[str, Any]) -> dict[str, Any]:
    """The scene, one of two shapes from the one or the other, with what its caption says beside it."""
    told = scene
    if scene["relation"] is not None and rng.random() < 0.5:
        first, second = scene["shapes"]
        told = _told(second, _OPPOSITE[scene["relation"]], first, scene["background"])
    return {**told, "scene": str(_canonical(scene))}


def _canonical(scene: dict[str, Any]) -> Any:
    """What the caption says, the same for "A left of B" and "B right of A"."""
    if scene["relation"] is None:
        return scene["caption"]
    a, b = ((shape["cls"], shape["size"]) for shape in scene["shapes"])
    return min((a, scene["relation"], b), (b, _OPPOSITE[scene["relation"]], a))


def _write_set(folder: Path, scenes: list[dict[str, Any]], name: str, image_size: int) -> list[str]:
    folder.mkdir(parents=True)
    rng = random.Random(f"pictures/{name}")
    files = []
    for start in range(0, len(scenes), _SHARD):
        file = f"{start // _SHARD:06d}.tar"
        with tarfile.open(folder / file, "w", format=tarfile.USTAR_FORMAT) as tar:
            for i, scene in enumerate(scenes[start : start + _SHARD]):
                image = _picture(scene, rng, image_size)
                key = f"{start // _SHARD:05d}{i:04d}"
                meta = {
                    "key": key,
                    "status": "success",
                    "caption": scene["caption"],
                    "captions": [scene["caption"]],
                    "cls": scene["cls"],
                    "width": image_size,
                    "height": image_size,
                    "sha256": hashlib.sha256(image).hexdigest(),
                    **({"scene": scene["scene"]} if "scene" in scene else {}),
                }
                for extension, data in (
                    ("jpg", image),
                    ("txt", scene["caption"].encode()),
                    ("json", json.dumps(meta).encode()),
                ):
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        files.append(file)
    return files


def _picture(scene: dict[str, Any], rng: random.Random, image_size: int) -> bytes:
    """The scene as a JPEG, drawn four times larger and averaged down."""
    from PIL import Image, ImageDraw

    side = image_size * _SUPERSAMPLE
    shade = rng.randint(-8, 8)
    background = tuple(min(255, max(0, value + shade)) for value in BACKGROUNDS[scene["background"]])
    image = Image.new("RGB", (side, side), background)
    draw = ImageDraw.Draw(image)
    for shape, centre in zip(scene["shapes"], _centres(scene, rng)):
        radius = rng.uniform(0.13, 0.155) if shape["size"] == "small" else rng.uniform(0.21, 0.235)
        colour, kind = SHAPE_CLASSES[shape["cls"]].split()
        _draw(draw, kind, centre[0] * side, centre[1] * side, radius * side, COLOURS[colour], background)
    image = image.resize((image_size, image_size), Image.Resampling.BOX)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=95, subsampling=0)
    return out.getvalue()


def _centres(scene: dict[str, Any], rng: random.Random) -> list[tuple[float, float]]:
    """Centres of the shapes in fractions of the side; two shapes stand in opposite halves."""
    if scene["relation"] is None:
        return [(rng.uniform(0.26, 0.74), rng.uniform(0.26, 0.74))]
    near, far = rng.uniform(0.24, 0.27), rng.uniform(0.73, 0.76)
    across = [rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7)]
    along = [near, far] if scene["relation"] in ("left of", "above") else [far, near]
    pairs = zip(along, across)
    return [(a, b) if scene["relation"] in ("left of", "right of") else (b, a) for a, b in pairs]


def _draw(draw: Any, kind: str, x: float, y: float, r: float, colour: tuple, background: tuple) -> None:
    box = [x - r, y - r, x + r, y + r]
    if kind == "circle":
        draw.ellipse(box, fill=colour)
    elif kind == "ring":
        draw.ellipse(box, fill=colour)
        hole = 0.52 * r
        draw.ellipse([x - hole, y - hole, x + hole, y + hole], fill=background)
    elif kind == "cross":
        arm = 0.32 * r
        draw.rectangle([x - r, y - arm, x + r, y + arm], fill=colour)
        draw.rectangle([x - arm, y - r, x + arm, y + r], fill=colour)
    else:
        draw.polygon([(x + r * a, y + r * b) for a, b in _outline(kind)], fill=colour)


def _outline(kind: str) -> list[tuple[float, float]]:
    """The polygon of a shape in a square from -1 to 1, y downwards."""
    if kind == "square":
        return [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]
    if kind == "triangle":
        return [(0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)]
    if kind == "diamond":
        return [(0.0, -1.0), (0.75, 0.0), (0.0, 1.0), (-0.75, 0.0)]
    if kind == "star":
        angles = [(math.pi * i / 5, 1.05 if i % 2 == 0 else 0.42) for i in range(10)]
        return [(length * math.sin(angle), -length * math.cos(angle)) for angle, length in angles]
    if kind == "heart":
        steps = [2 * math.pi * i / 40 for i in range(40)]
        return [
            (
                math.sin(t) ** 3,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16,
            )
            for t in steps
        ]
    raise ValueError(f"unknown shape {kind!r}")
