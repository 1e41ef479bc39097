"""What a user can mistype is an error that names the right word, before torch is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.recipes.runs import run

MISTAKES = {
    "loss=cyclp": ["unknown loss 'cyclp'", "Did you mean 'cyclip'?", "simcse"],
    "loss=[clip,simsce]": ["unknown loss 'simsce'", "Did you mean 'simcse'?", "nli_contrastive"],
    "image_tower=resnet5": ["unknown image_tower 'resnet5'", "Did you mean 'resnet50'?"],
    "experiment=flickr": ["unknown experiment 'flickr'", "flickr8k_tiny"],
    "optim.lrr=1": ["unknown key 'optim.lrr'", "Did you mean 'lr'?", "weight_decay"],
    "+optim.lrr=1": ["unknown key 'optim.lrr'", "Did you mean 'lr'?"],
    "batchsize=3": ["unknown key 'batchsize'", "Did you mean 'batch_size'?"],
    "optim.lr=abc": ["optim.lr='abc' is text", "takes a number"],
    "batch_size=3.5": ["batch_size=3.5 is a number", "takes a whole number"],
    "+loss=[cyclic] loss=[clip]": ["loss=[clip,cyclic]"],
    "loss.infonce.wieght=2": ["unknown key 'loss.infonce.wieght'", "Did you mean 'weight'?"],
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_typo_is_named_with_its_nearest_match(override, tmp_path):
    output = run(*override.split(), f"output_dir={tmp_path}/runs", status=1)
    for text in MISTAKES[override]:
        assert text in output, output
    assert "Traceback" not in output
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("checkpoints"))


def test_the_command_line_answers_without_importing_torch():
    program = (
        "import sys; import clipkit.command; from clipkit.recipes import sweep, study; "
        "print([m for m in ('torch', 'numpy') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
