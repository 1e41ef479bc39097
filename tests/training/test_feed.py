"""What the training loop is fed, and what a loss and the data ask of each other."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from clipkit.data.spec import complete
from clipkit.losses import create_loss
from clipkit.training.feed import check_pairs
from tests.processes import launch

# Spawned ranks import the cases by name, and inherit sys.path.
sys.path.insert(0, str(Path(__file__).resolve().parent))
import pairs_ranks
from pairs_ranks import CASES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve pairs, of which many share a caption, a scene or a stem."""
    import io
    import tarfile

    from PIL import Image

    root = tmp_path_factory.mktemp("pairs")
    for shard in range(2):
        with tarfile.open(root / f"{shard}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(6):
                key = f"{shard}{i // 2}#{i % 2}"
                out = io.BytesIO()
                Image.linear_gradient("L").resize((16, 16)).rotate(40 * i + shard).convert("RGB").save(
                    out, "PNG"
                )
                captions = [f"{'abc'[i % 3]} scene", f"{'ABC'[i % 3]} scene!"]
                wrong = [f"no {key}", f"not {key}", f"never {key}"]
                meta = {"captions": captions, "scene": i % 3, "wrong": wrong}
                for name, raw in ((f"{key}.png", out.getvalue()), (f"{key}.json", json.dumps(meta).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(raw)
                    tar.addfile(member, io.BytesIO(raw))
    return str(root)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def check_ranks(folder, world_size):
    for found in launch(pairs_ranks.run_rank, world_size, folder):
        for case in CASES:
            expected = pairs_ranks.run(case, folder, rank=0, world_size=1, micro_batch_size=None)
            for micro in (None, 1):
                for name, value in expected.items():
                    off = (found[case, micro][name] - value).norm() / value.norm()
                    # The scale and the bias are handed to losses in fp32.
                    assert off < 1e-6, (case, micro, name, float(off))


@pytest.mark.parametrize("case", CASES)
def test_micro_batches_have_the_gradient_of_the_whole_batch(folder, case):
    expected = pairs_ranks.run(case, folder, rank=0, world_size=1, micro_batch_size=None)
    for micro in (1, 3, 8):
        found = pairs_ranks.run(case, folder, rank=0, world_size=1, micro_batch_size=micro)
        for name, value in expected.items():
            assert (found[name] - value).norm() < 1e-9 * value.norm(), (micro, name)


def test_two_ranks_have_the_gradient_of_one_process(folder):
    check_ranks(folder, 2)


@pytest.mark.slow
def test_four_ranks_have_the_gradient_of_one_process(folder):
    check_ranks(folder, 4)


@pytest.mark.parametrize("case", [case for case in CASES if case != "hard negatives"])
def test_what_the_data_knows_changes_the_gradient(folder, case, monkeypatch):
    known = pairs_ranks.run(case, folder, rank=0, world_size=1, micro_batch_size=None)
    monkeypatch.setattr("clipkit.data.pairs.content_id", lambda *parts: 0)
    alike = pairs_ranks.run(case, folder, rank=0, world_size=1, micro_batch_size=None)
    assert (known["gradient"] - alike["gradient"]).norm() > 1e-3 * known["gradient"].norm()


REFUSED = [
    ({"pair_ids": "caption"}, {"cyclic": {}}, "no term of the loss"),
    ({"pair_ids": "key"}, {"simcse": {}, "uniformity": {}}, "reads ids"),
    ({}, {"infonce": {"same_ids": "mask"}}, "data gives no ids"),
    ({}, {"infonce": {}, "sigmoid": {"same_ids": "mask"}}, "loss.sigmoid"),
    ({}, {"matryoshka": {"dims": [2], "settings": {"same_ids": "mask"}}}, "loss.matryoshka"),
    ({"captions_per_image": 2}, {"infonce": {}, "infoloob": {}}, "negatives in infoloob"),
    ({"captions_per_image": 2}, {"uniformity": {}}, "negatives in uniformity"),
    ({"captions_per_image": 2}, {"fastclip": {}}, "negatives in fastclip"),
    ({"hard_negatives": "wrong"}, {"cyclic": {}}, "reads hard negatives"),
    ({"hard_negatives": "wrong"}, {"mlm": {}, "slip": {}}, "no term of the loss"),
]
TAKEN = [
    ({}, {"infonce": {}}),
    ({"pair_ids": "caption"}, {"infonce": {"same_ids": "mask"}, "cyclic": {}}),
    ({"captions_per_image": 2}, {"infonce": {"same_ids": "mask"}, "cyclic": {}}),
    (
        {"captions_per_image": 2},
        {"sigmoid": {}, "simcse": {}, "uniformity": {"of": ["text_features"]}, "slip": {}},
    ),
    ({"pair_ids": "json:x"}, {"matryoshka": {"dims": [2], "settings": {"same_ids": "mask"}}}),
]


@pytest.mark.parametrize("data, loss, said", REFUSED)
def test_what_nothing_reads_or_nothing_gives_is_refused(data, loss, said):
    with pytest.raises(ValueError, match=said):
        check_pairs(complete({"train": "x.tar", **data}), create_loss(loss))


@pytest.mark.parametrize("data, loss", TAKEN)
def test_what_is_read_and_given_is_taken(data, loss):
    check_pairs(complete({"train": "x.tar", **data}), create_loss(loss))


def test_a_loss_that_learns_from_hard_negatives_says_where_they_come_from():
    loss = pairs_ranks.WeightedSum({"wrong_captions": pairs_ranks.WrongCaptions()})
    with pytest.raises(ValueError, match="data.hard_negatives"):
        check_pairs(complete({"train": "x.tar"}), loss)
