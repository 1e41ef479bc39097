"""Which variant of the similarity kernels a training run takes on a GPU, told without one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import fork
from tests.recipes.runs import SMALL

PROGRAM = Path(__file__).with_name("variant_run.py")
SETTINGS = {
    "fp32": (["precision=fp32", "tf32=false"], "triton_high"),
    "tf32": (["precision=fp32", "tf32=true"], "triton_high"),
    "bf16": (["precision=bf16"], "triton"),
    "fp16": (["precision=fp16"], "triton"),
    "pure_bf16": (["precision=pure_bf16"], "triton"),
    "bf16, in micro-batches": (["precision=bf16", "micro_batch_size=16"], "triton"),
    "bf16, asked for": (["precision=bf16", "loss.infonce.precision=high"], "triton_high"),
}


def variants(folder: Path, *overrides: str) -> list[str]:
    quiet = ["eval=none", "logger=none", "steps=1", "warmup_steps=0", f"output_dir={folder}"]
    output = fork(PROGRAM, *SMALL, *quiet, *overrides).finished()
    return [line.split()[1] for line in output.splitlines() if line.startswith("pair_")]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_takes_the_variant_of_its_precision(tmp_path, shapes, name):
    overrides, variant = SETTINGS[name]
    assert variants(tmp_path, shapes, *overrides) == [variant]


def test_every_pair_loss_follows_the_run(tmp_path, shapes):
    losses = "loss=[cyclip,infoloob,cloob,simcse,slip,uniformity,fastclip,queue,matryoshka,sigmoid]"
    more = ["text_tower.dropout=0.1", "data.augmentation.flip=0.5", "init_logit_bias=-10"]
    found = variants(tmp_path, shapes, losses, *more, "precision=bf16")
    assert len(found) > 9 and set(found) == {"triton"}
