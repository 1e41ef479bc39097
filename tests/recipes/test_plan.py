"""clipkit-plan: no data, no GPU, no folder left."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.processes import ROOT, fork

# CC3M's settings, with no shard of it here, on towers that are counted in seconds.
SMALL = ["experiment=cyclip_rn50_cc3m", "image_tower=test_resnet", "text_tower=transformer_tiny"]


def plan(folder: Path, *arguments: str, status: int = 0) -> str:
    program = ROOT / "recipes" / "plan.py"
    return fork(program, *arguments, cwd=folder, env={"CLIPKIT_TEST_DATA": "nowhere"}).finished(status)


def test_plans_without_data_and_leaves_no_folder(tmp_path):
    output = plan(
        tmp_path,
        *SMALL,
        "gpus=1,8",
        "batch_size=4096",
        "--json",
        "output=plan.json",
        "+loss=[simcse]",
        "text_tower.dropout=0.1",
    )
    result = json.loads(output)
    assert json.loads((tmp_path / "plan.json").read_text()) == result
    assert os.listdir(tmp_path) == ["plan.json"]
    one, eight = result["plans"]
    # A bf16 run: half operands, and the cyclic loss has none.
    assert one["operands"] == {"infonce": "half", "simcse": "half"}
    assert (one["gpus"], eight["gpus"], eight["pairs_per_gpu"], one["impl"]) == (1, 8, 512, "triton")
    # CLIP's own vocabulary, known without captions: 49,408 rows of 128.
    assert result["parameters"] > 49_408 * 128 and result["assumed"] == []
    assert sum(one["communication"].values()) == 0 < eight["communication"]["gradients"]
    # SimCSE runs every caption twice.
    assert one["fits"] and one["largest"]["batch_size_at_once"] >= 4096


def test_prints_a_table_and_what_it_assumes(tmp_path):
    output = plan(
        tmp_path,
        "gpu=cpu",
        "batch_size=256",
        "gpu.memory_gb=8",
        "gpu.bf16_tflops=0.1",
        "gpu.fp32_tflops=0.1",
        "gpu.memory_gbs=10",
    )
    for text in (
        "assumed: a vocabulary of 10,000 words",
        "1 x cpu, batch 256",
        "optimizer state",
        "activations",
        "dense",
        "fits",
        "pairs/s",
    ):
        assert text in output, output
    assert "triton" not in output


MISTAKES = {
    "gpu=h10": ["unknown gpu 'h10'", "Did you mean 'h100'?", "a100_80gb"],
    "gpus=3": ["batch_size=4096 does not divide evenly over 3 GPUs"],
    "gpu.memory_gb=2.2": ["needs", "has 2.2 GB", "micro_batch_size="],
    "gpu_memory=3": ["unknown key 'gpu_memory'"],
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_named_with_what_to_do(override, tmp_path):
    output = plan(tmp_path, *SMALL, "batch_size=4096", override, status=1)
    assert "Traceback" not in output
    for text in MISTAKES[override]:
        assert text in output, output
