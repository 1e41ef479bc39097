"""Using a trained model on one's own files.

    from clipkit.predict import Predictor
    predictor = Predictor("runs/quickstart/default")           # or "open_clip:ViT-B-32=weights.pt"
    keys, features = predictor.embed_images("photos/")
    for key, score in predictor.search("a red circle", keys, features, k=5): ...
    for key, classes in predictor.classify("photos/", ["cat", "dog"], k=2): ...

`save_embeddings` and `load_embeddings` keep features between sessions; `write_teacher` writes those of training data, which
`data.teacher` reads.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from clipkit.data.decode import decode_eval, resizing_of
from clipkit.data.faults import DataError
from clipkit.data.shards import open_sets
from clipkit.data.spec import resolve_data
from clipkit.data.teacher import SIDES, TeacherWriter, content_of
from clipkit.evals.checks import TaskRecord
from clipkit.evals.classification import read_templates, zero_shot_classifier
from clipkit.evals.encoder import Encoder, check_features
from clipkit.evals.items import IMAGE_SUFFIXES, load_image
from clipkit.evals.models import load_any
from clipkit.foreign import VOCABULARY_BYTES, BrokenFile, read_json


class Predictor:
    """A model ready for files: a clipkit run or checkpoint folder, or what load_any takes.

    Attributes:
        skipped: {path: reason} of the images of the last call that could not be read, and of a folder's pictures in
            formats that are not.
        alike: groups of the last call's classes whose prompts are the same tokens: the model cannot tell them apart.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        tokenizer: Callable[[list[str]], Any] | None = None,
        *,
        device: str | torch.device = "cpu",
        batch_size: int = 64,
    ):
        if isinstance(model, (str, Path)):
            loaded, tokenizer = load_any(str(model), device=device)
        elif tokenizer is None:
            raise ValueError("a model object comes with its tokenizer: Predictor(model, tokenizer)")
        else:
            loaded = model
        self.encoder = Encoder(loaded.eval(), tokenizer, device=device, batch_size=batch_size)
        self.skipped: dict[str, str] = {}
        self.alike: list[list[str]] = []

    @torch.no_grad()
    def embed_images(self, images: str | Path | Iterable[str | Path]) -> tuple[list[str], Tensor]:
        """(paths, (N, D) unit-norm float32) of a folder's images (at any depth, sorted), one file, or several
        files.

        An image that cannot be read is left out and stands in `skipped`.

        Raises:
            ValueError: no image at all could be read.
        """
        images = images if isinstance(images, (str, Path)) else list(images)
        paths = find_images(images)
        if not hasattr(self.encoder.model, "encode_image"):
            raise ValueError(f"{type(self.encoder.model).__name__} encodes text only")
        tower = self.encoder.model.image_tower
        how = resizing_of(tower)
        self.skipped, keys, parts = unread_files(images), [], []
        for start in range(0, len(paths), self.encoder.batch_size):
            batch = []
            for path in paths[start : start + self.encoder.batch_size]:
                try:
                    batch.append(load_image(path, tower.image_size, **how))
                    keys.append(str(path))
                except DataError as error:
                    self.skipped[str(path)] = str(error)
            if batch:
                parts.append(
                    self.encoder.model.encode_image(torch.stack(batch).to(self.encoder.device)).float().cpu()
                )
        if not parts:
            first = next(iter(self.skipped.items()), ("", "no file with an image's suffix"))
            raise ValueError(f"no image could be read from {images} ({first[0]} {first[1]})")
        features = torch.cat(parts)
        check_features(features, "image features", keys)
        return keys, features

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(len(texts), D) unit-norm float32."""
        return self.encoder.texts(list(texts))

    def search(
        self, query: str, keys: Sequence[str], features: Tensor, *, k: int = 5
    ) -> list[tuple[str, float]]:
        """The k nearest of (N, D) embedded images or texts to a text: (key, cosine), best first."""
        if len(keys) != len(features):
            raise ValueError(f"{len(keys)} keys for {len(features)} features: give one a row")
        scores = features @ self.embed_texts([query])[0]
        best = scores.topk(min(k, len(keys)))
        return [
            (keys[int(i)], float(score))
            for i, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def classify(
        self,
        images: str | Path | Iterable[str | Path],
        classes: Sequence[str],
        *,
        templates: str | list[str] = "plain",
        k: int = 1,
        logit_scale: float | None = None,
    ) -> list[tuple[str, list[tuple[str, float]]]]:
        """The k likeliest classes of every image: [(path, [(class, probability), ...]), ...].

        A model with a logit_bias was trained pair by pair (SigLIP): its probabilities are sigmoids, which need not add up
        to 1. Others have a softmax over the classes. Equal ones stand in the order of `classes`; see `alike`.

        Args:
            templates: as clipkit.evals.classification.read_templates.
            logit_scale: of the cosines; None: the model's own, or 100.
        """
        if not classes:
            raise ValueError("classify needs a list of class names")
        if logit_scale is not None and logit_scale <= 0:
            raise ValueError(f"logit_scale is a multiplier above 0, not {logit_scale}")
        model = self.encoder.model
        scale = getattr(model, "logit_scale", 100.0) if logit_scale is None else logit_scale
        scale = float(torch.as_tensor(scale).detach())
        bias = getattr(model, "logit_bias", None)
        self.encoder.record = TaskRecord()
        weights = zero_shot_classifier(self.encoder, list(classes), read_templates(templates))
        self.alike = self.encoder.record.checks.get("shared_prompts", {}).get("groups", [])
        keys, features = self.embed_images(images)
        logits = scale * (features.double() @ weights.double().T)
        probabilities = logits.softmax(1) if bias is None else (logits + float(bias)).sigmoid()
        # A stable order: topk leaves equal ones in any.
        values, order = probabilities.sort(dim=1, descending=True, stable=True)
        rows = zip(keys, order[:, :k].tolist(), values[:, :k].tolist(), strict=True)
        return [
            (key, [(classes[int(i)], float(p)) for i, p in zip(found, values, strict=True)])
            for key, found, values in rows
        ]


@torch.no_grad()
def write_teacher(
    predictor: Predictor,
    data: Mapping[str, Any],
    folder: str | Path,
    *,
    name: str,
    sides: Sequence[str] = SIDES,
    half: bool = False,
) -> dict[str, Any]:
    """Write the features of every training image and caption, each content once, for `data.teacher`.

    Args:
        predictor: the teacher.
        data: data settings: `kind` and `train`, as of conf/data.
        folder: to be made.
        name: of the teacher, for people to read.
        sides: image, text or both.
        half: keep float16.

    Returns:
        {"image": how many, "text": how many, "skipped": {cause: samples left out}}.

    Raises:
        ValueError: a teacher without such a tower, or a folder that is there.
    """
    model, encoder = predictor.encoder.model, predictor.encoder
    if "image" in sides and not hasattr(model, "encode_image"):
        raise ValueError(f"{name} encodes text only: ask it for the features of texts alone")
    scale = getattr(model, "logit_scale", None)
    writer = TeacherWriter(
        folder,
        teacher=name,
        logit_scale=None if scale is None else float(torch.as_tensor(scale).detach()),
        half=half,
    )
    tower: Any = model.image_tower if "image" in sides else None
    images: list[tuple[int, Tensor]] = []
    texts: dict[int, str] = {}
    counts: Counter[str] = Counter(dict.fromkeys(sides, 0))
    skipped: Counter[str] = Counter()

    def write(at_least: int) -> None:
        if images and len(images) >= at_least:
            batch = torch.stack([image for _, image in images]).to(encoder.device)
            features = model.encode_image(batch).float().cpu()
            check_features(features, "image features")
            writer.add("image", [one for one, _ in images], features)
            counts["image"] += len(images)
            images.clear()
        if texts and len(texts) >= at_least:
            writer.add("text", list(texts), encoder.texts(list(texts.values())))
            counts["text"] += len(texts)
            texts.clear()

    for samples in open_sets(resolve_data(data))[0]:
        for sample in samples:
            try:
                captions, raw = samples.captions(sample), b""
                if tower is not None:
                    raw = samples.image(sample)
                    picture = decode_eval(raw, tower.image_size, **resizing_of(tower))
                    if writer.missing("image", content_of(raw)):
                        images.append((content_of(raw), picture))
            except DataError as error:
                skipped[error.cause] += 1
                continue
            for text in captions if "text" in sides else ():
                if writer.missing("text", content_of(text)):
                    texts[content_of(text)] = text
            write(encoder.batch_size)
        samples.close()
    write(1)
    if not sum(counts.values()):
        raise ValueError(f"no sample of {data.get('train')} could be read: {dict(skipped)}")
    writer.close()
    return {**counts, "skipped": dict(sorted(skipped.items()))}


def find_images(images: str | Path | Iterable[str | Path]) -> list[Path]:
    """Image files of a folder (at any depth, sorted), or the files given; ValueError for one that is not
    there, or is a FIFO or device.
    """
    given = [Path(images)] if isinstance(images, (str, Path)) else [Path(path) for path in images]
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            found += sorted(
                file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()
            )
        elif path.is_file():
            found.append(path)
        elif path.exists():
            raise ValueError(f"{path} is a FIFO or device, and no image: it was not opened")
        else:
            raise ValueError(f"there is no image or folder {path}")
    return found


# Pictures in formats that are not read: left out by name, not in silence.
UNREAD_SUFFIXES = frozenset(
    f".{one}"
    for one in "svg psd eps ai ico icns tga hdr exr dds pcx xcf jxr wdp raw dng cr2 cr3 nef arw orf rw2 raf".split()
)


def unread_files(images: str | Path | Iterable[str | Path]) -> dict[str, str]:
    """{path: reason} of the pictures in a folder (at any depth) that `find_images` leaves out for their format."""
    given = [Path(images)] if isinstance(images, (str, Path)) else [Path(path) for path in images]
    return {
        str(file): "pictures of this format are not read: convert it, for instance to JPEG"
        for path in given
        if path.is_dir()
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in UNREAD_SUFFIXES
    }


def save_embeddings(path: str | Path, keys: Sequence[str], features: Tensor) -> None:
    """Write PATH.npy with PATH.keys.json beside it, or one .parquet with the columns key and embedding."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise ValueError(
                "writing Parquet needs pyarrow: pip install pyarrow, or give a .npy file"
            ) from error
        values = pyarrow.FixedSizeListArray.from_arrays(
            pyarrow.array(features.flatten().numpy()), features.shape[1]
        )
        table = pyarrow.table({"key": list(keys), "embedding": values})
        # Embeddings repeat no number, and a reader holds a whole group of rows.
        parquet.write_table(table, path, use_dictionary=False, row_group_size=4096)
    elif path.suffix == ".npy":
        parts = [path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("npy", "json")]
        try:
            numpy.save(parts[0], features.numpy())
            parts[1].write_text(json.dumps(list(keys), indent=0), encoding="utf-8")
            # In this order: features never stand beside others' keys.
            path.unlink(missing_ok=True)
            os.replace(parts[1], path.with_suffix(".keys.json"))
            os.replace(parts[0], path)
        finally:
            for part in parts:
                part.unlink(missing_ok=True)
    else:
        raise ValueError(f"embeddings go to a .npy or .parquet file; got {path.name!r}")


def load_embeddings(path: str | Path) -> tuple[list[str], Tensor]:
    """(keys, (N, D)) of what save_embeddings wrote.

    Raises:
        ValueError: it is not there, or not what save_embeddings writes: a key for each row of finite numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file of embeddings {path}")
    if path.suffix == ".parquet":
        keys, values = _read_parquet(path)
    else:
        keys = read_json(path.with_suffix(".keys.json"), list[str], limit=VOCABULARY_BYTES)
        values = _read_npy(path)
    if (
        values.ndim != 2
        or values.dtype.kind != "f"
        or not 2 <= values.dtype.itemsize <= 8
        or len(keys) != len(values)
    ):
        raise BrokenFile(
            f"{path} holds an array of shape {values.shape} and type {values.dtype.str} with {len(keys)} keys; expected "
            "(rows, dimensions) of floats and a key for each row"
        )
    values = numpy.ascontiguousarray(values, dtype=values.dtype.newbyteorder("="))
    # A buffer of Arrow's, or a file that is mapped, must not be written to.
    features = torch.from_numpy(values if values.flags.writeable else values.copy())
    check_features(features, str(path), keys)
    return keys, features


def _read_npy(path: Path) -> numpy.ndarray:
    try:
        # Mapped: a header that claims more than the file holds costs nothing.
        found = numpy.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a crafted header makes NumPy raise nearly anything
        if isinstance(error, OSError) and not path.is_file():
            raise
        raise BrokenFile(f"{path} is no .npy file of numbers: it is cut short or altered") from None
    if not isinstance(found, numpy.ndarray):
        raise BrokenFile(f"{path} is an archive, and no .npy file of numbers")
    return found


def _read_parquet(path: Path) -> tuple[list[str], numpy.ndarray]:
    try:
        import pyarrow
        from pyarrow import compute, parquet
    except ImportError as error:
        raise ValueError("reading Parquet needs pyarrow: pip install pyarrow") from error
    try:
        keys, parts, lengths = [], [], set()
        # Some rows at a time, from Arrow's own buffers: a Python object for each number takes twenty times the memory.
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(4096, columns=["key", "embedding"]):
                keys += batch["key"].to_pylist()
                column = batch["embedding"]
                lengths |= set(compute.call_function("list_value_length", [column]).unique().to_pylist())
                if len(lengths) > 1 or None in lengths or (numbers := column.flatten()).null_count:
                    raise ValueError("rows of unequal length, or without a number")
                parts.append(numbers.to_numpy(zero_copy_only=False).reshape(len(column), -1).copy())
        values = numpy.concatenate(parts)
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, LookupError, ArithmeticError):
        raise BrokenFile(
            f"{path} is no Parquet file with the columns key and embedding: it is damaged, or another"
        ) from None
    if not all(isinstance(key, str) for key in keys):
        raise BrokenFile(f"{path}: a key is no text")
    return keys, values
