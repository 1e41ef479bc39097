"""The command that scores a model: alone and as ranks, what it writes and never writes over, what it says."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipkit.data import create_tokenizer
from clipkit.export import save_open_clip
from clipkit.model import create_model
from tests.evals.test_tasks import write_tar
from tests.processes import ROOT, fork_ranks
from tests.recipes.runs import run


def shards(path: Path, seed: int, count: int = 30) -> str:
    members = {}
    for i in range(count):
        buffer = io.BytesIO()
        # The last two pictures are one.
        pixels = np.random.default_rng([seed, min(i, count - 2)]).integers(
            0, 255, (32, 32, 3), dtype=np.uint8
        )
        Image.fromarray(pixels).save(buffer, "PNG")
        members[f"{i:02d}.png"] = buffer.getvalue()
        members[f"{i:02d}.json"] = json.dumps({"caption": f"picture {i % 28}", "cls": i % 3}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_tar(path, members)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    tokenizer = create_tokenizer({"name": "clip_bpe", "context_length": 8})
    settings = {
        "embed_dim": 16,
        "image_tower": {
            "name": "clip_vit",
            "image_size": 32,
            "patch_size": 16,
            "width": 32,
            "layers": 1,
            "heads": 2,
        },
        "text_tower": {"name": "transformer", "width": 32, "layers": 1, "heads": 2},
    }
    model = create_model(settings, tokenizer=tokenizer)
    return save_open_clip(model, tmp_path_factory.mktemp("model") / "exported", tokenizer=tokenizer)


def arguments(exported: Path, folder: Path, data: str) -> list[str]:
    classes = "[cat,dog,owl]"
    return [
        f"checkpoint={exported}",
        f"output_dir={folder}",
        "device=cpu",
        "batch_size=7",
        "+eval.r.kind=retrieval",
        f"+eval.r.shards={data}",
        "+eval.z.kind=zero_shot",
        f"+eval.z.shards={data}",
        f"+eval.z.classes={classes}",
        "+eval.z.templates=plain",
    ]


def written(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((folder / "evaluations").glob("*.json"))]


def test_ranks_give_one_file_with_the_numbers_of_one_process(exported, tmp_path):
    data = shards(tmp_path / "a" / "0.tar", 0)
    told = run(*arguments(exported, tmp_path / "one", data), recipe="evaluate.py")
    said = [
        rank.finished()
        for rank in fork_ranks(
            2, ROOT / "recipes" / "evaluate.py", *arguments(exported, tmp_path / "two", data)
        )
    ]
    (alone,), (shared,) = written(tmp_path / "one"), written(tmp_path / "two")
    assert shared["metrics"] == pytest.approx(alone["metrics"], abs=1e-6) and len(alone["metrics"]) == 13
    assert shared["records"] == alone["records"] and (alone["ranks"], shared["ranks"]) == (1, 2)
    # Rank 0 speaks alone.
    assert (
        sum("written to" in one for one in said) == 1 and sum("same as another" in one for one in said) == 1
    )
    assert shared["scores"].keys() == alone["scores"].keys() == alone["metrics"].keys()
    for name, one in alone["scores"].items():
        assert shared["scores"][name]["interval"] == pytest.approx(one["interval"], abs=1e-6)
        assert one["n"] == 30 and one["interval"][0] <= one["value"] <= one["interval"][1]
    assert alone["scores"]["z/top1"]["chance"] == pytest.approx(1 / 3) and "95 % interval" in told
    assert alone["scores"]["r/text_to_image_R@5"]["chance"] == pytest.approx(5 / 30)
    assert "r, task 1 of 2" in told and "z, task 2 of 2" in told
    record = alone["records"]["r"]
    (read,) = record["data"].values()
    assert read["items"] == 30 and read["skipped"] == 0 and len(read["digest"]) == 16
    assert record["checks"]["same_images"]["groups"] == [["28", "29"]]
    assert record["checks"]["shared_captions"]["captions"] == 4
    assert torch.__version__.startswith(alone["versions"]["torch"]) and alone["date"].endswith("+00:00")


def test_a_second_folder_writes_a_second_file(exported, tmp_path):
    first = shards(tmp_path / "a" / "0.tar", 0)
    run(*arguments(exported, tmp_path, first), recipe="evaluate.py")
    (before,) = written(tmp_path)
    run(*arguments(exported, tmp_path, shards(tmp_path / "b" / "0.tar", 1)), recipe="evaluate.py")
    assert len(written(tmp_path)) == 2 and before in written(tmp_path)
    # The same place with other pictures in it.
    shards(tmp_path / "a" / "0.tar", 2)
    run(*arguments(exported, tmp_path, first), recipe="evaluate.py")
    assert len(written(tmp_path)) == 3 and before in written(tmp_path)
    # The same once more is the same file, with a later date.
    run(*arguments(exported, tmp_path, first), recipe="evaluate.py")
    assert len(written(tmp_path)) == 3


@pytest.mark.parametrize(
    "change, message", [("+eval.z.clases=[a]", "clases"), ("eval.r.shards=nowhere/*.tar", "nowhere")]
)
def test_tasks_are_checked_before_the_model_is_loaded(exported, tmp_path, change, message):
    """Weights that cannot be read would be the first thing said otherwise."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "open_clip_config.json").write_bytes((exported / "open_clip_config.json").read_bytes())
    (broken / "open_clip_model.safetensors").write_bytes(b"none")
    data = shards(tmp_path / "a" / "0.tar", 0)
    said = run(*arguments(broken, tmp_path, data), change, recipe="evaluate.py", status=1)
    assert message in said and "open_clip cannot load" not in said
    said = run(*arguments(broken, tmp_path, data), recipe="evaluate.py", status=1)
    assert "open_clip cannot load" in said and not (tmp_path / "evaluations").exists()
