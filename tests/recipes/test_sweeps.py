"""Sweeps as a user runs them: every launcher, a job that fails, the same command again, and the table at the
end.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
import shutil
import signal
import statistics
from pathlib import Path

import pytest
import yaml

from clipkit.command import compose
from clipkit.reports.comparison import (
    as_json,
    compare,
    csv_table,
    markdown_tables,
    text_tables,
    write_comparison,
)
from clipkit.settings import EXECUTION
from tests.processes import Started, children, wait_until
from tests.recipes.runs import SMALL, lines, run, start, typed, weights

JOB = [*SMALL, "steps=3", "logger=none", "eval=shapes"]
SWEPT = ["loss=clip,[cyclip,simcse]", "seed=0,1"]
LAUNCHERS = {
    "basic": [],
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit": ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10"],
}


def folder_of(output: Path, *overrides: str) -> Path:
    """The run folder of a job: its overrides in alphabetical order, less those that do not make another run."""
    kept = sorted(entry for entry in overrides if entry.partition("=")[0] not in EXECUTION)
    return output / compose.run_name(",".join(kept))


def planted_obstacle(folder: Path) -> None:
    """A run of other settings in a job's folder: the job refuses to mix them, until the folder is gone."""
    folder.mkdir(parents=True)
    groups = {group: {} for group in ("data", "image_tower", "text_tower", "loss", "optim")}
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"seed": 7, "batch_size": 64, "resume": True, **groups})
    )


def summaries(folder: Path) -> dict[Path, float]:
    """Every finished run's folder and when it finished."""
    found = {path: path.stat().st_mtime_ns for path in folder.rglob("summary.json")}
    return {path.parent: when for path, when in found.items() if json.loads(path.read_text())["finished"]}


@pytest.mark.parametrize(
    "launcher",
    [pytest.param(name, marks=() if name == "basic" else pytest.mark.slow) for name in LAUNCHERS],
)
def test_a_sweep_outlives_a_failed_job_and_completes_when_repeated(tmp_path, shapes, launcher):
    runs = tmp_path / "runs"
    settings = [*JOB, shapes, f"output_dir={runs}"]
    failing = folder_of(runs, *settings, "loss=[cyclip,simcse]", "seed=0")
    planted_obstacle(failing)
    command = ["-m", *settings, *SWEPT, *LAUNCHERS[launcher]]
    # A launcher's own processes begin from a python of the user's.
    program = run if launcher == "basic" else typed

    output = program(*command, status=1)
    first = summaries(runs)
    assert len(first) == 3 and failing not in first
    assert "3 of 4 jobs finished:" in output
    told = output[output.index("3 of 4 jobs finished:") :]
    assert "failed: " in told and "holds a run of other settings" in told and told.count("repeat:") == 1
    repeat = shlex.split(re.search(r"repeat: (.*)", told).group(1))
    assert repeat[0] == "clipkit-pretrain" and {"loss=[cyclip,simcse]", "seed=0"} <= set(repeat)
    assert "ValueError" in (failing / "error.txt").read_text()

    shutil.rmtree(failing)
    output = program(*command)
    second = summaries(runs)
    assert set(second) == {*first, failing} and {path: second[path] for path in first} == first
    assert "4 of 4 jobs finished." in output and output.count("step 3/3") <= 1
    assert not list(failing.glob("error.txt")) and not (runs / ".sweeps").exists()
    # The table's mean is that of the two runs, by hand.
    values = [
        json.loads((folder_of(runs, *settings, "loss=clip", f"seed={seed}") / "summary.json").read_text())
        for seed in (0, 1)
    ]
    values = [value["metrics"]["zero_shot/top5"] for value in values]
    cell = f"{sum(values) / 2:.4f} ± {abs(values[0] - values[1]) / 2**0.5:.4f}"
    (row,) = [
        line for line in output[output.rindex("\nzero_shot") :].splitlines() if line.startswith("infonce ")
    ]
    assert cell in row and row.split()[1] == "2"


def test_a_signal_stops_a_sweep_and_not_only_its_job(tmp_path, shapes):
    """The running job saves; the next never begins; the same command goes on where it stopped."""
    settings = [
        "-m",
        *SMALL,
        shapes,
        f"output_dir={tmp_path}",
        "save_every=0",
        "eval=none",
        "logger=none",
        "loss=clip",
        "seed=0,1",
    ]
    process = start(*settings, "steps=100000")
    process.wait_for("step 2/")
    process.signal(signal.SIGTERM)
    output = process.finished(75)
    assert "0 of 2 jobs finished" in output, output
    assert "stopped: seed=0" in output and "not started: seed=1" in output
    (folder,) = {path.parent for path in tmp_path.rglob("config.yaml") if "checkpoints" not in path.parts}
    assert weights(folder) and not (folder / "summary.json").exists()


def test_a_sweep_under_torchrun_is_refused_with_the_command_to_type():
    output = run(
        "-m",
        "loss=clip,[cyclip,simcse]",
        "seed=0,1",
        env={"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        status=1,
    )
    assert (
        "clipkit-sweep --processes 2 'loss=clip,[cyclip,simcse]' seed=0,1" in output
        and "Traceback" not in output
    )


def test_a_search_marks_a_failed_trial_and_goes_on(tmp_path, shapes):
    """Three trials, drawn from two losses of which one has no data here: those fail, the others are ranked."""
    settings = [
        *SMALL,
        shapes,
        f"output_dir={tmp_path}",
        "steps=3",
        "logger=none",
        "objective=zero_shot/top5",
        "optim.lr=interval(1e-3,2e-3)",
    ]
    command = [
        "-m",
        *settings,
        "hydra/sweeper=search",
        "hydra.sweeper.n_trials=3",
        "loss=clip,nli_contrastive",
    ]
    output = run(*command, status=1)
    trials = re.findall(r"#\d : (.*)", output)
    fit = [trial for trial in trials if "loss=clip" in trial]
    assert len(trials) == 3 and 0 < len(fit) < 3, "seed 0 of the sampler drew one loss only"
    assert f"{len(fit)} of 3 jobs finished:" in output and output.count(
        "data.sentences.triplets=FILE"
    ) >= 3 - len(fit)
    best = yaml.safe_load((tmp_path / "optimization_results.yaml").read_text())
    scores = [
        json.loads((folder / "summary.json").read_text())["metrics"]["zero_shot/top5"]
        for folder in summaries(tmp_path)
    ]
    assert best["best_value"] == max(scores) and best["best_params"]["loss"] == "clip"
    finished = summaries(tmp_path)
    assert (
        set(re.findall(r"#\d : (.*)", run(*command, status=1))) == set(trials)
        and summaries(tmp_path) == finished
    )


SEARCHES = {
    "no objective": (["hydra/sweeper=search"], "objective=TASK/METRIC"),
    "no direction": (
        ["hydra/sweeper=optuna", "objective=zero_shot/top1"],
        "hydra.sweeper.direction=maximize",
    ),
    "no such launcher": (["hydra/launcher=jobib"], "Did you mean 'joblib'?"),
}


@pytest.mark.parametrize("case", SEARCHES)
def test_a_mistaken_search_is_refused_before_its_first_trial(case, tmp_path):
    settings, message = SEARCHES[case]
    output = run("-m", *settings, "seed=0,1", f"output_dir={tmp_path}", status=1)
    assert message in output and "Traceback" not in output and not list(tmp_path.rglob("config.yaml"))


def clipkit_sweep(*arguments: str, status: int = 0) -> str:
    return run(*arguments, recipe="sweep.py", status=status)


def test_jobs_of_two_processes_fail_alone_and_are_made_up_for(tmp_path, shapes):
    runs = tmp_path / "runs"
    settings = [*JOB, shapes, f"output_dir={runs}", "loss=cyclip"]
    failing, good = (folder_of(runs, *settings, f"seed={seed}") for seed in (0, 1))
    planted_obstacle(failing)
    command = [
        *settings,
        "seed=0,1",
        "--processes",
        "2",
        "--threads",
        "1",
        "--output",
        str(tmp_path / "table"),
    ]
    output = clipkit_sweep(*command, status=1)
    assert "[1/2] failed after" in output and "[2/2] finished after" in output
    told = output[output.index("1 of 2 jobs finished:") :]
    assert (
        "failed: seed=0" in told
        and "holds a run of other settings" in told
        and "clipkit-sweep --processes 2 " in told
    )
    assert list(summaries(runs)) == [good]
    # Both ranks trained: each has half of the batch of 32, and three steps were logged once.
    assert [line["step"] for line in lines(good) if "train/loss" in line] == [1, 2, 3] and (
        good / "output.log"
    ).stat().st_size

    shutil.rmtree(failing)
    before = summaries(runs)
    # The same jobs, however many processes each has.
    command[command.index("--processes") + 1] = "1"
    output = clipkit_sweep(*command)
    assert "[2/2] seed=1: is finished already" in output and "2 of 2 jobs finished." in output
    assert summaries(runs)[good] == before[good] and set(summaries(runs)) == {failing, good}
    written = json.loads((tmp_path / "table.json").read_text())["groups"]
    values = [
        json.loads((folder / "summary.json").read_text())["metrics"]["zero_shot/top5"]
        for folder in (failing, good)
    ]
    assert [group["metrics"]["zero_shot/top5"]["mean"] for group in written] == [
        pytest.approx(sum(values) / 2)
    ]


def wait_for_steps(folder: Path, process: Started) -> None:
    """Until a job has logged steps."""
    record = folder / "metrics.jsonl"
    wait_until(lambda: record.exists() and record.read_text(), process)


def test_a_killed_job_is_a_failure_and_ends_no_other(tmp_path, shapes):
    settings = [*SMALL, shapes, f"output_dir={tmp_path}", "eval=none", "logger=none"]
    process = start(*settings, "steps=100000,3", recipe="sweep.py")
    wait_for_steps(folder_of(tmp_path, *settings, "steps=100000"), process)
    # Another sweep leaves the folder of a job that lives alone.
    assert "another process is training in this folder" in clipkit_sweep(*settings, "steps=100000", status=1)
    (job,) = children(process.pid)
    job.kill()
    output = process.finished(status=1)
    assert "[1/2] failed after" in output and "killed by SIGKILL" in output, output
    assert "[2/2] finished after" in output and "1 of 2 jobs finished:" in output
    assert list(summaries(tmp_path)) == [folder_of(tmp_path, *settings, "steps=3")]


@pytest.mark.parametrize("ranks", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_signal_reaches_the_ranks_of_a_job_which_save(tmp_path, shapes, ranks):
    settings = [
        *SMALL,
        shapes,
        f"output_dir={tmp_path}",
        "eval=none",
        "logger=none",
        "save_every=0",
        "steps=100000",
    ]
    process = start(*settings, "seed=0,1", "--processes", ranks, "--threads", "1", recipe="sweep.py")
    folder = folder_of(tmp_path, *settings, "seed=0")
    wait_for_steps(folder, process)
    process.signal(signal.SIGINT)
    output = process.finished(75)
    assert "stopped: seed=0" in output and "not started: seed=1" in output, output
    assert weights(folder) and not summaries(tmp_path)


def made_up(root: Path) -> Path:
    """Two losses by three and two seeds, the last not finished, with numbers whose mean and spread are plain."""
    values = {
        ("clip", 0): 0.1,
        ("clip", 1): 0.2,
        ("clip", 2): 0.6,
        ("cyclip", 0): 0.5,
        ("cyclip", 1): 0.7,
        ("cyclip", 2): 0.9,
    }
    for (loss, seed), value in values.items():
        folder = root / f"{loss}-{seed}"
        folder.mkdir(parents=True)
        terms = {"infonce": {}, **({"cyclic": {}} if loss == "cyclip" else {})}
        (folder / "config.yaml").write_text(
            yaml.safe_dump({"loss": terms, "seed": seed, "batch_size": 8}, sort_keys=False)
        )
        line = {"step": 9, "eval/retrieval/text_to_image_R@1": value, "eval/zero_shot/top1": 0.25}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        (folder / "summary.json").write_text(json.dumps({"finished": (loss, seed) != ("cyclip", 2)}))
    return root


def test_the_comparison_holds_the_mean_and_the_spread_worked_out_by_hand(tmp_path):
    """(0.1 + 0.2 + 0.6) / 3 = 0.3 and sqrt((0.04 + 0.01 + 0.09) / 2) = 0.26458; 0.6 and sqrt(0.02 / 1) =
    0.14142.
    """
    groups = compare([made_up(tmp_path)], order="retrieval/text_to_image_R@1")
    assert [group.label for group in groups] == ["infonce+cyclic", "infonce"]
    assert "0.3000 ± 0.2646" in text_tables(groups) and "0.6000 ± 0.1414" in text_tables(groups)
    assert "| infonce | 3 | 0.3000 ± 0.2646 |" in markdown_tables(groups)
    assert "| infonce+cyclic | 2 | 0.6000 ± 0.1414 |" in markdown_tables(groups)
    rows = {(row["group"], row["metric"]): row for row in csv.DictReader(io.StringIO(csv_table(groups)))}
    row = rows["infonce", "retrieval/text_to_image_R@1"]
    assert (
        row["n"] == "3"
        and float(row["mean"]) == pytest.approx(0.3)
        and float(row["standard_deviation"]) == pytest.approx(0.07**0.5)
    )
    assert (
        row["values"] == "0.1 0.2 0.6" and float(rows["infonce", "zero_shot/top1"]["standard_deviation"]) == 0
    )
    found = as_json(groups)["groups"][0]["metrics"]["retrieval/text_to_image_R@1"]
    assert found == {
        "n": 2,
        "mean": pytest.approx(0.6),
        "standard_deviation": pytest.approx(0.02**0.5),
        "values": [0.5, 0.7],
    }


def test_the_page_draws_a_dot_a_run(tmp_path):
    paths = write_comparison(compare([made_up(tmp_path / "runs")]), tmp_path / "out" / "v1.2")
    assert [path.name for path in paths] == ["v1.2.md", "v1.2.csv", "v1.2.json", "v1.2.html"]
    page = paths[-1].read_text()
    charts = page.split("<figure>")[1:]
    assert [chart.count('r="3.2"') for chart in charts[:2]] == [5, 5] and "http" not in page.replace(
        "http-equiv", ""
    )


def test_reading_finished_runs_trains_nothing(tmp_path):
    output = clipkit_sweep("--table", str(made_up(tmp_path / "runs")))
    assert "0.3000 ± 0.2646" in output and "cyclip-2" in output[output.index("Not finished") :]
    assert statistics.stdev([0.1, 0.2, 0.6]) == pytest.approx(0.2646, abs=5e-5)
    assert "there is no folder" in clipkit_sweep("--table", str(tmp_path / "nowhere"), status=1)
    assert "trains nothing" in clipkit_sweep("seed=1", "--table", str(tmp_path / "runs"), status=1)


def test_a_sweep_reads_a_users_own_settings(tmp_path, shapes):
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    (folder / "short.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /eval: none\nsteps: 3\nwarmup_steps: 1\nbatch_size: 32\n"
    )
    settings = [
        "experiment=short",
        *SMALL[:2],
        "num_threads=1",
        "logger=none",
        shapes,
        f"output_dir={tmp_path}/runs",
    ]
    output = clipkit_sweep("--config-dir", str(tmp_path / "mine"), *settings, "seed=0,1")
    assert "2 of 2 jobs finished" in output
    assert {json.loads(path.read_text())["step"] for path in tmp_path.rglob("summary.json")} == {3}
    # A typo in the user's file is told before a job starts.
    (folder / "short.yaml").write_text("# @package _global_\nbacth_size: 32\n")
    refused = clipkit_sweep("--config-dir", str(tmp_path / "mine"), *settings, "seed=2,3", status=1)
    assert "Did you mean 'batch_size'" in refused and "began" not in refused
