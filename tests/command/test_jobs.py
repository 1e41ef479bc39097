"""The jobs of a sweep, before any begins: expanded, checked and given their folders; and a search's objective."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from clipkit.command import compose, jobs, processes, programs


def test_an_objective_that_no_task_gives_is_named():
    with pytest.raises(ValueError, match=r"unknown task of objective 'retreival/R@1'.*retrieval/\.\.\."):
        programs.check_objective({"objective": "retreival/R@1", "eval": {"retrieval": {}}})
    with pytest.raises(ValueError, match="Did you mean 'zero_shot/top1'"):
        programs.objective_value({"zero_shot/top1": 0.5}, "zero_shot/top11")
    with pytest.raises(ValueError, match="cannot be ranked"):
        programs.objective_value({"zero_shot/top1": float("nan")}, "zero_shot/top1")
    assert programs.objective_value({"zero_shot/top1": 0.5}, "zero_shot/top1") == 0.5


def test_comma_lists_expand_as_hydra_expands_them():
    assert jobs.expand(["loss=clip,[cyclip,simcse]", "seed=range(0,2)"]) == [
        ["loss=clip", "seed=0"],
        ["loss=clip", "seed=1"],
        ["loss=[cyclip,simcse]", "seed=0"],
        ["loss=[cyclip,simcse]", "seed=1"],
    ]


def test_every_job_is_checked_before_the_first_begins(tmp_path):
    compose.register_resolvers()
    compose.start_hydra()
    output = f"output_dir={tmp_path}"
    with pytest.raises(ValueError, match="optim.lr='abc' is text"):
        processes.plan([["seed=0", output], ["seed=1", "optim.lr=abc", output]])
    with pytest.raises(ValueError, match="two jobs would be one run"):
        processes.plan([["seed=0", output], ["seed=0", "log_every=3", output]])
    with pytest.raises(ValueError, match="launchers and sweepers are for clipkit-pretrain -m"):
        processes.plan(jobs.expand(["seed=0,1", "hydra/launcher=joblib"]))
    (job,) = processes.plan([["seed=3", "loss=cyclip", output]], threads=2)
    assert (
        Path(job.run_dir) == tmp_path / compose.run_name("loss=cyclip,seed=3")
        and "num_threads=2" in job.overrides
    )
    assert not list(tmp_path.iterdir())


def test_a_finished_run_of_other_settings_is_not_taken_for_the_job(tmp_path):
    """As when a YAML file has changed since; what the run's version did not know yet is no change."""
    compose.register_resolvers()
    compose.start_hydra()
    settings = ["seed=3", "batch_size=256", f"output_dir={tmp_path}"]
    folder = processes.job_folder("pretrain", settings)
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text('{"finished": true}')
    config = compose.resolved(compose.compose("pretrain", settings), "pretrain")
    del config["max_logit_scale"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert processes.job_folder("pretrain", settings) == folder
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "batch_size": 64}))
    with pytest.raises(ValueError, match=r"holds a run of other settings \(batch_size: 64 -> 256\)"):
        processes.plan([settings])
