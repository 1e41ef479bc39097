"""Every damage to every file of a run folder: the run goes on to the same bits, or says which file is wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from clipkit.checkpoint import list_checkpoints
from tests.damage import DAMAGE
from tests.recipes.runs import SMALL, only_run, run, start
from tests.recipes.test_interrupted import same_bits

FILES = [
    "config.yaml", "metrics.jsonl", "history.jsonl", ".lock", "error.txt", "loss_spikes.jsonl", "summary.json",
    *(f"checkpoints/step_00000004/{name}" for name in
      ("manifest.json", "model.safetensors", "optimizer.safetensors", "train.pt", "config.json", "tokenizer.json")),
]  # fmt: skip
QUICK = {
    ("config.yaml", "emptied"),
    ("metrics.jsonl", "fifo"),
    (FILES[-6], "other_json"),
    (FILES[-3], "zeros"),
}
CASES = [
    pytest.param(file, kind, marks=[] if (file, kind) in QUICK else [pytest.mark.slow])
    for file in FILES
    for kind in DAMAGE
]


@pytest.fixture(scope="module")
def settings(shapes) -> list[str]:
    return [*SMALL, shapes, "eval=none", "logger=none", "save_every=2", "keep=9", "steps=6"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, settings) -> Path:
    """The run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    run(*settings, f"output_dir={folder}")
    return only_run(folder)


@pytest.mark.parametrize(("file", "kind"), CASES)
def test_the_run_goes_on_to_the_same_bits_or_names_the_file(file, kind, tmp_path, settings, whole):
    run_dir = tmp_path / whole.parent.name / whole.name
    shutil.copytree(whole, run_dir)
    # As it was after step 4, with what a run may leave besides.
    shutil.rmtree(run_dir / "checkpoints" / "step_00000006")
    summary = run_dir / "summary.json"
    summary.write_text(summary.read_text().replace('"finished": true', '"finished": false'))
    (run_dir / "history.jsonl").write_text('{"step": 2, "settings": {"clip_grad_norm": 1.0}}\n')
    (run_dir / "error.txt").write_text("Traceback\n")
    (run_dir / "loss_spikes.jsonl").write_text('{"step": 3}\n')
    (run_dir / ".lock").write_text('{"host": "here", "pid": 1, "started": 1.0, "job": "9"}')
    DAMAGE[kind](run_dir / file)
    process = start(*settings, f"output_dir={tmp_path}", env={"SLURM_JOB_ID": "9"})
    process.wait()
    output = process.output
    assert "Traceback" not in output, output
    if "Final numbers" in output:
        assert same_bits(run_dir, whole)
    else:
        assert file in output or Path(file).name in output or "holds a run of other settings" in output, (
            output
        )
        assert len(list_checkpoints(run_dir / "checkpoints")) >= 1
