"""Shards for the data tests: written here with the standard library, read back with it for expectations."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Indexes and fetched shards of a test stay in its own folder."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("CLIPKIT_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def jpeg() -> Callable[..., bytes]:
    """`jpeg(seed, size=(w, h))`: a small photograph-like JPEG."""
    from PIL import Image

    def make(seed: int, size: tuple[int, int] = (16, 16)) -> bytes:
        colour = (seed * 37 % 256, seed * 101 % 256, seed * 199 % 256)
        image = Image.linear_gradient("L").resize(size).convert("RGB")
        image.paste(colour, (0, 0, size[0] // 2, size[1]))
        out = io.BytesIO()
        image.save(out, "JPEG", quality=90)
        return out.getvalue()

    return make


@pytest.fixture(scope="session")
def write_tar() -> Callable[..., Path]:
    """`write_tar(path, [(name, bytes), ...])`: a tar of regular files."""

    def write(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return write


@pytest.fixture(scope="session")
def sample(jpeg: Callable[..., bytes]) -> Callable[..., list[tuple[str, bytes]]]:
    """`sample("k", 7)`: the three members of a good sample."""

    def make(key: str, seed: int = 0, captions: Sequence[str] = ()) -> list[tuple[str, bytes]]:
        texts = list(captions) or [f"picture {key}"]
        meta = {"key": key, "captions": texts}
        return [
            (f"{key}.jpg", jpeg(seed)),
            (f"{key}.txt", texts[0].encode()),
            (f"{key}.json", json.dumps(meta).encode()),
        ]

    return make


@pytest.fixture(scope="session")
def keys_in() -> Callable[..., list[str]]:
    """The keys of shards by Python's own tarfile, in file order."""

    def read(paths: Sequence[Path | str]) -> list[str]:
        keys = []
        for path in paths:
            with tarfile.open(path) as tar:
                keys += [name.removesuffix(".jpg") for name in tar.getnames() if name.endswith(".jpg")]
        return keys

    return read


@pytest.fixture(scope="session")
def thousand_shards(tmp_path_factory, write_tar, sample) -> list[Path]:
    """1,000 shards of one or two samples."""
    folder = tmp_path_factory.mktemp("thousand")
    paths = []
    for shard in range(1000):
        members = [
            member for i in range(1 + shard % 2) for member in sample(f"{shard:05d}{i:04d}", shard % 16)
        ]
        paths.append(write_tar(folder / f"{shard:06d}.tar", members))
    return paths


@pytest.fixture(scope="session")
def byte_tokenizer() -> Callable:
    """A tokenizer that needs no file: bytes of the text, 24 columns."""
    import torch

    def tokenize(texts: list[str]):
        rows = [list(text.encode()[:24].ljust(24, b"\0")) for text in texts]
        return torch.tensor(rows, dtype=torch.int64)

    return tokenize
