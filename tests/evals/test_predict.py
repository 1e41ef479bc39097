"""A trained model on files that others made: what is no picture is named, embeddings are what was saved."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipkit.predict import Predictor, find_images, load_embeddings, save_embeddings

sys.path.insert(0, str(Path(__file__).resolve().parent))
from eval_cases import TinyModel, tokenize
from test_tasks import image_bytes


def test_pictures_that_cannot_be_read_are_left_out_with_a_reason(tmp_path):
    (tmp_path / "good.png").write_bytes(image_bytes(3))
    (tmp_path / "broken.png").write_bytes(b"broken")
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    Image.new("1", (12_000, 10_000)).save(tmp_path / "huge.png")
    Image.new("L", (4000, 1)).save(tmp_path / "long.png")
    predictor = Predictor(TinyModel(), tokenize)
    keys, features = predictor.embed_images(tmp_path)
    assert [Path(key).name for key in keys] == ["good.png", "long.png"] and features.shape == (2, 16)
    reasons = {Path(path).name: reason for path, reason in predictor.skipped.items()}
    assert set(reasons) == {"broken.png", "huge.png"}
    assert "corrupt_image" in reasons["broken.png"] and "12000 x 10000 is more than" in reasons["huge.png"]
    for name in ("fifo.png", "zero.png"):
        with pytest.raises(ValueError, match=f"{name} is a FIFO or device"):
            find_images([tmp_path / name])
    with pytest.raises(ValueError, match=r"no image could be read from .*broken\.png corrupt_image"):
        predictor.embed_images(tmp_path / "broken.png")


@pytest.mark.parametrize("name", ["a.npy", "a.parquet"])
def test_embeddings_come_back(tmp_path, name):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    features = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    save_embeddings(tmp_path / name, ["x", "y", "\u00e9"], features)
    keys, found = load_embeddings(tmp_path / name)
    assert keys == ["x", "y", "\u00e9"] and torch.equal(found, features)


@pytest.mark.parametrize("step", range(5))
def test_embeddings_whose_writing_ends_early_never_stand_beside_other_keys(step, tmp_path, monkeypatch):
    features = torch.eye(3)
    save_embeddings(tmp_path / "a.npy", ["x", "y", "z"], features)
    left = [step]

    def dying(call):
        def until_then(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return call(*args, **kwargs)

        return until_then

    for owner, name in ((np, "save"), (Path, "write_text"), (Path, "unlink"), (os, "replace")):
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))
    with pytest.raises(KeyboardInterrupt):
        save_embeddings(tmp_path / "a.npy", ["z", "y", "x"], features.flip(0))
    monkeypatch.undo()
    if step < 3:
        keys, found = load_embeddings(tmp_path / "a.npy")
        assert keys == ["x", "y", "z"] and torch.equal(found, features)
    else:
        with pytest.raises(ValueError, match="there is no file of embeddings"):
            load_embeddings(tmp_path / "a.npy")


def npy(array) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


def claims(shape, descr="<f4") -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": descr, "fortran_order": False, "shape": shape})
    return out.getvalue() + b"\0" * 64


GOOD = npy(np.ones((2, 4), np.float32))
BROKEN = {
    "cut": GOOD[:-5],
    "empty": b"",
    "noise": b"noise" * 50,
    "a pickle": pickle.dumps(print),
    "objects": npy(np.array([[print, print]] * 2, dtype=object)),
    "an archive": (lambda out: (np.savez(out, a=np.ones((2, 4))), out.getvalue())[1])(io.BytesIO()),
    "a claim of memory": claims((2, 1 << 40)),
    "a claim beyond 64 bits": claims((2, 1 << 70)),
    "negative": claims((2, -4)),
    "text": npy(np.array([["a", "b"]] * 2)),
    "integers": npy(np.ones((2, 4), np.int64)),
    "one row too many": npy(np.ones((3, 4), np.float32)),
    "flat": npy(np.ones(2, np.float32)),
    "long doubles": npy(np.ones((2, 4), np.longdouble)),
    "not finite": npy(np.array([[1.0, np.nan], [1.0, 1.0]], np.float32)),
}


@pytest.mark.parametrize("what", BROKEN)
def test_embeddings_that_are_none_are_an_error_that_names_the_file(tmp_path, what):
    path = tmp_path / "a.npy"
    (tmp_path / "a.keys.json").write_text('["x", "y"]')
    path.write_bytes(GOOD)
    assert load_embeddings(path)[1].shape == (2, 4)
    path.write_bytes(BROKEN[what])
    with pytest.raises(ValueError, match=str(path)) as raised:
        load_embeddings(path)
    assert "allow_pickle" not in str(raised.value)


@pytest.mark.parametrize("keys", ['["x"]', '["x", 3]', '{"x": 1}', '["x", "y"', "", "[" * 99_999])
def test_keys_of_another_shape_are_an_error_that_names_a_file(tmp_path, keys):
    (tmp_path / "a.npy").write_bytes(GOOD)
    (tmp_path / "a.keys.json").write_text(keys)
    with pytest.raises(ValueError, match=str(tmp_path / "a.")):
        load_embeddings(tmp_path / "a.npy")


def test_big_endian_and_half_precision_are_taken(tmp_path):
    (tmp_path / "a.keys.json").write_text(json.dumps(["x", "y"]))
    for kind in (">f4", "<f2", "<f8"):
        (tmp_path / "a.npy").write_bytes(npy(np.arange(8).reshape(2, 4).astype(kind)))
        assert load_embeddings(tmp_path / "a.npy")[1].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_other_parquet_files_are_an_error_that_names_the_file(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    for columns in ({"a": [1]}, {"key": [1], "embedding": [[1.0]]}, {"key": ["x"], "embedding": ["y"]}):
        parquet.write_table(pyarrow.table(columns), path)
        with pytest.raises(ValueError, match=str(path)):
            load_embeddings(path)
    parquet.write_table(pyarrow.table({"key": ["x", "y"], "embedding": [[1.0], [1.0, 2.0]]}), path)
    with pytest.raises(ValueError, match=str(path)):
        load_embeddings(path)
    for raw in (b"", b"PAR1" + b"\xff" * 50 + b"PAR1", path.read_bytes()[:-9]):
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=str(path)):
            load_embeddings(path)
