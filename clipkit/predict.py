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
from clipkit.evals.classification import read_templates, zero_shot_classifier
from clipkit.evals.encoder import Encoder, check_features
from clipkit.evals.items import IMAGE_SUFFIXES, load_image
from clipkit.evals.models import load_any
from clipkit.foreign import VOCABULARY_BYTES, BrokenFile, read_json


class Predictor:
    """A model ready for files: a clipkit run or checkpoint folder, or what load_any takes.

    Attributes:
        skipped: {path: reason} of the images of the last call that could not be read.
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

    @torch.no_grad()
    def embed_images(self, images: str | Path | Iterable[str | Path]) -> tuple[list[str], Tensor]:
        """(paths, (N, D) unit-norm float32) of a folder's images (at any depth, sorted), one file, or several
        files.

        An image that cannot be read is left out and stands in `skipped`.

        Raises:
            ValueError: no image at all could be read.
        """
        paths = find_images(images)
        if not hasattr(self.encoder.model, "encode_image"):
            raise ValueError(f"{type(self.encoder.model).__name__} encodes text only")
        tower = self.encoder.model.image_tower
        how = resizing_of(tower)
        self.skipped, keys, parts = {}, [], []
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

        Args:
            templates: as clipkit.evals.classification.read_templates.
            logit_scale: of the softmax; None: the model's own, or 100.
        """
        if not classes:
            raise ValueError("classify needs a list of class names")
        scale = logit_scale or float(
            torch.as_tensor(getattr(self.encoder.model, "logit_scale", 100.0)).detach()
        )
        weights = zero_shot_classifier(self.encoder, list(classes), read_templates(templates))
        keys, features = self.embed_images(images)
        best = (scale * features @ weights.T).softmax(1).topk(min(k, len(classes)), dim=1)
        rows = zip(keys, best.indices.tolist(), best.values.tolist(), strict=True)
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
        parquet.write_table(pyarrow.table({"key": list(keys), "embedding": values}), path)
    elif path.suffix == ".npy":
        temporary = path.with_name(f".{path.name}.{os.getpid()}.npy")
        try:
            numpy.save(temporary, features.numpy())
            path.with_suffix(".keys.json").write_text(json.dumps(list(keys), indent=0), encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
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
    features = torch.from_numpy(numpy.ascontiguousarray(values.astype(values.dtype.newbyteorder("="))))
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
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError("reading Parquet needs pyarrow: pip install pyarrow") from error
    try:
        table = parquet.read_table(path, columns=["key", "embedding"])
        keys = table["key"].to_pylist()
        values = numpy.array(table["embedding"].to_pylist(), dtype=numpy.float32)
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, LookupError, ArithmeticError):
        raise BrokenFile(
            f"{path} is no Parquet file with the columns key and embedding: it is damaged, or another"
        ) from None
    if not all(isinstance(key, str) for key in keys):
        raise BrokenFile(f"{path}: a key is no text")
    return keys, values
