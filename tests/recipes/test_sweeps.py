"""Sweeps as a user runs them: every launcher, a job that fails, the same command again, and the table at the end."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clipkit.evals.comparison import compare, csv_table, text_tables, write_comparison
from clipkit.recipes import cli, jobs
from tests.recipes.runs import ROOT, SMALL, lines, run, start

JOB = [*SMALL, "steps=3", "logger=none", "eval=shapes"]
SWEPT = ["loss=clip,[cyclip,simcse]", "seed=0,1"]
LAUNCHERS = {
    "basic": [],
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit": ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10"],
}


def folder_of(output: Path, *overrides: str) -> Path:
    """The run folder of a job: its overrides in alphabetical order, less those that do not make another run."""
    kept = sorted(entry for entry in overrides if not entry.startswith(("num_threads=", "log_every=", "logger=", "output_dir=")))
    return output / cli.run_name(",".join(kept))


def planted_obstacle(folder: Path) -> None:
    """A run of other settings in a job's folder: the job refuses to mix them, until the folder is gone."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 7\nbatch_size: 64\nresume: true\n")


def summaries(folder: Path) -> dict[Path, float]:
    """Every finished run's folder and when it finished."""
    found = {path: path.stat().st_mtime_ns for path in folder.rglob("summary.json")}
    return {path.parent: when for path, when in found.items() if json.loads(path.read_text())["finished"]}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_sweep_outlives_a_failed_job_and_completes_when_repeated(tmp_path, shapes, launcher):
    runs = tmp_path / "runs"
    settings = [*JOB, shapes, f"output_dir={runs}"]
    failing = folder_of(runs, *settings, "loss=[cyclip,simcse]", "seed=0")
    planted_obstacle(failing)
    command = ["-m", *settings, *SWEPT, *LAUNCHERS[launcher]]

    output = run(*command, status=1)
    first = summaries(runs)
    assert len(first) == 3 and failing not in first
    assert "3 of 4 jobs finished:" in output
    told = output[output.index("3 of 4 jobs finished:"):]
    assert "failed: " in told and "holds a run of other settings" in told and told.count("repeat:") == 1
    repeat = shlex.split(re.search(r"repeat: (.*)", told).group(1))
    assert repeat[0] == "clipkit-pretrain" and {"loss=[cyclip,simcse]", "seed=0"} <= set(repeat)
    assert "ValueError" in (failing / "error.txt").read_text()

    shutil.rmtree(failing)
    output = run(*command)
    second = summaries(runs)
    assert set(second) == {*first, failing} and {path: second[path] for path in first} == first
    assert "4 of 4 jobs finished." in output and output.count("step 3/3") <= 1
    assert not list(failing.glob("error.txt")) and not (runs / ".sweeps").exists()
    # The table's mean is that of the two runs, by hand.
    values = [json.loads((folder_of(runs, *settings, "loss=clip", f"seed={seed}") / "summary.json").read_text()) for seed in (0, 1)]
    values = [value["metrics"]["zero_shot/top5"] for value in values]
    cell = f"{sum(values) / 2:.4f} ± {abs(values[0] - values[1]) / 2 ** 0.5:.4f}"
    (row,) = [line for line in output[output.rindex("\nzero_shot"):].splitlines() if line.startswith("infonce ")]
    assert cell in row and row.split()[1] == "2"
