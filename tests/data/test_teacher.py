"""A teacher's stored features reach the sample they were made of, whatever the order, or the sample is counted out."""

from __future__ import annotations

import hashlib
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from clipkit.data import create_stream
from clipkit.data.faults import DataError
from clipkit.data.spec import complete
from clipkit.data.teacher import Teacher, TeacherWriter, content_of
from clipkit.losses import create_loss
from clipkit.training.feed import check_pairs

SAMPLES, E = 23, 5


def vector(content: bytes | str) -> torch.Tensor:
    """A unit vector that is a function of the content alone, by another way than the code's."""
    raw = content.encode() if isinstance(content, str) else content
    seed = int(hashlib.sha256(raw).hexdigest()[:8], 16)
    return torch.nn.functional.normalize(torch.randn(E, generator=torch.Generator().manual_seed(seed)), dim=0)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, write_tar, sample, jpeg):
    """(shards, {key: image bytes}, captions): three shards; keys of two shards are alike."""
    folder, images, captions = tmp_path_factory.mktemp("pairs"), {}, []
    numbers = iter(range(SAMPLES))
    for shard, count in enumerate((9, 8, 6)):
        members = []
        for place in range(count):
            number = next(numbers)
            texts = [f"picture {number} said {k}" for k in range(3)]
            members += sample(f"{place:03d}", number, texts)
            images[shard, f"{place:03d}"] = jpeg(number)
            captions += texts
        write_tar(folder / f"{shard:05d}.tar", members)
    return str(folder / "*.tar"), images, captions


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pairs):
    _, images, captions = pairs
    return write(tmp_path_factory.mktemp("teacher") / "features", images.values(), captions)


def write(folder, images, captions, **settings):
    writer = TeacherWriter(folder, teacher="a function", logit_scale=17.0, rows=10, **settings)
    for side, contents in (("image", images), ("text", captions)):
        for content in contents:
            if writer.missing(side, content_of(content)):
                writer.add(side, [content_of(content)], vector(content)[None])
    return writer.close()


class Tokens:
    """A caption as its characters."""

    def __call__(self, texts):
        return torch.tensor([[ord(c) for c in text.ljust(24)] for text in texts])


def said(tokens) -> str:
    return "".join(map(chr, tokens.tolist())).rstrip()


def stream(pairs, folder, **settings):
    sides = settings.pop("teacher_sides", None)
    given = {key: settings.pop(key) for key in ("batch_size", "num_workers") if key in settings}
    spec = {"kind": "shards", "train": pairs[0], "teacher": folder and str(folder), **settings}
    return create_stream(
        spec,
        tokenizer=Tokens(),
        image_size=16,
        seed=3,
        epochs=2,
        teacher_sides=sides,
        **{"batch_size": 5, **given},
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cache": "ram", "num_workers": 2},
        {"captions_per_image": 2, "shuffle": False},
        {"cache": "ram", "captions": "all"},
    ],
)
def test_every_row_has_the_features_of_its_own_image_and_caption(pairs, folder, settings):
    count = 0
    for batch in stream(pairs, folder, **settings):
        assert batch["dist_logit_scale"] == 17.0 and batch["dist_image_features"].dtype == torch.float32
        text, of_text = batch["text"], batch["dist_text_features"]
        for row, (index, key) in enumerate(zip(batch["sample_index"].tolist(), batch["key"])):
            shard = sum(index >= start for start in (9, 17))
            assert torch.equal(batch["dist_image_features"][row], vector(pairs[1][shard, key]))
            rows = zip(text[row], of_text[row]) if text.ndim == 3 else [(text[row], of_text[row])]
            for tokens, found in rows:
                assert torch.equal(found, vector(said(tokens)))
            count += 1
    assert count == 45


def test_one_side_alone_is_read_where_the_loss_asks_for_one(pairs, folder):
    batch = next(iter(stream(pairs, folder, teacher_sides=["text"])))
    assert "dist_text_features" in batch and "dist_image_features" not in batch
    assert "dist_text_features" not in next(iter(stream(pairs, folder, teacher_sides=[])))


def test_half_precision_is_kept_and_read_as_float32(pairs, tmp_path):
    batch = next(iter(stream(pairs, write(tmp_path / "half", pairs[1].values(), pairs[2], half=True))))
    expected = torch.stack([vector(said(text)) for text in batch["text"]])
    assert torch.equal(batch["dist_text_features"], expected.half().float())


@pytest.mark.parametrize("cache", ["none", "ram"])
@pytest.mark.parametrize("lost", ["image", "text"])
def test_a_sample_without_its_features_is_replaced_counted_and_bounded(pairs, tmp_path, lost, cache):
    """Sample 4 of the first shard; of the text, one of its three captions."""
    images = [raw for key, raw in pairs[1].items() if lost == "text" or key != (0, "004")]
    captions = [text for text in pairs[2] if lost == "image" or text != "picture 4 said 1"]
    folder = write(tmp_path / "lossy", images, captions)
    made = stream(pairs, folder, max_bad_fraction={"missing_teacher": 0.1}, cache=cache)
    seen = [int(index) for batch in made for index in batch["sample_index"]]
    # 45 of the two epochs' 46 places are delivered.
    assert 4 not in seen and len(seen) == 45
    assert made.report()["skipped"] == {"missing_teacher": 2}
    with pytest.raises((RuntimeError, DataError), match=r"missing_teacher.*data.teacher holds no feature"):
        list(stream(pairs, folder, max_bad_fraction=0.0))


def test_a_run_goes_on_with_the_same_features_alone(pairs, folder, tmp_path):
    made = stream(pairs, folder)
    batches = iter(made)
    next(batches)
    state, expected = made.state_dict(), next(batches)
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in folder.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    again = stream(pairs, moved)
    again.load_state_dict(state)
    assert torch.equal(next(iter(again))["dist_image_features"], expected["dist_image_features"])
    other = stream(pairs, write(tmp_path / "other", pairs[1].values(), pairs[2], half=True))
    for changed in (other, stream(pairs, None)):
        with pytest.raises(ValueError, match="data.teacher holds other features"):
            changed.load_state_dict(state)


def _cut(folder):
    path = folder / "text-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def _swap(folder):
    path = folder / "text-00001.safetensors"
    save_file({"ids": load_file(path)["ids"]}, path)


def _fewer(folder):
    path = folder / "image-00000.safetensors"
    save_file({key: tensor[1:].clone() for key, tensor in load_file(path).items()}, path)


def _outside(folder):
    index = json.loads((folder / "teacher.json").read_text())
    index["sides"]["image"]["parts"] = {"../image-00000.safetensors": ""}
    (folder / "teacher.json").write_text(json.dumps(index))


def _no_index(folder):
    (folder / "teacher.json").unlink()


def _other_shape(folder):
    (folder / "teacher.json").write_text('{"format": 1}')


@pytest.mark.parametrize(
    "change, message",
    [
        (_cut, "no whole safetensors file"),
        (_swap, "and not ids"),
        (_fewer, "holds 22 image features, where 23 are said"),
        (_outside, "outside of its folder|no whole safetensors"),
        (_no_index, "clipkit-predict teacher"),
        (_other_shape, "does not hold what it should"),
    ],
)
def test_a_damaged_folder_is_an_error_before_the_first_step(folder, tmp_path, change, message):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    change(copy)
    with pytest.raises(ValueError, match=message):
        Teacher(copy)


def test_a_feature_that_is_no_unit_vector_stops_the_run(folder, pairs, tmp_path):
    def halve(copy):
        for path in copy.glob("*.safetensors"):
            tensors = load_file(path)
            save_file({"ids": tensors["ids"], "features": tensors["features"] * 0.5}, path)

    (tmp_path / "here").mkdir()
    for file in folder.iterdir():
        (tmp_path / "here" / file.name).write_bytes(file.read_bytes())
    halve(tmp_path / "here")
    with pytest.raises(ValueError, match="norm 0.5 to 0.5"):
        next(iter(stream(pairs, tmp_path / "here")))


def test_a_teacher_travels_to_workers_and_a_folder_is_written_once(folder, pairs, tmp_path):
    teacher = pickle.loads(pickle.dumps(Teacher(folder)))
    assert torch.equal(teacher.features("text", [content_of(pairs[2][7])])[0], vector(pairs[2][7]))
    with pytest.raises(ValueError, match="is there already"):
        TeacherWriter(folder, teacher="another")
    writer = TeacherWriter(tmp_path / "unfinished", teacher="another")
    writer.add("text", [1], torch.eye(E)[:1])
    assert not (tmp_path / "unfinished").exists()


def test_a_side_that_the_folder_lacks_names_both(folder, tmp_path):
    texts = write(tmp_path / "texts", [], ["a word"])
    with pytest.raises(ValueError, match="holds features of text, made by a function.*asks for image"):
        Teacher(texts, ["image"])


@pytest.mark.parametrize(
    "teacher, loss, message",
    [
        ("folder", ["infonce"], "no term of the loss .* has a teacher"),
        (None, ["infonce", "distill_features"], "distill_features learns from a teacher"),
    ],
)
def test_a_teacher_and_a_loss_that_learns_from_one_come_together(teacher, loss, message):
    with pytest.raises(ValueError, match=message):
        check_pairs(complete({"teacher": teacher}), create_loss(loss))
