"""SLURM's variables as torchrun's."""

from __future__ import annotations

import pytest

from clipkit.command.launch import adopt_slurm, first_host

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[007-009,12],login1", "gpu007"),
        ("n[3,5-7]", "n3"),
        ("rack[1-2]n[03-04]", "rack1n03"),
        ("a-b[10-11].cluster.org,c", "a-b10.cluster.org"),
    ],
)
def test_the_first_host_of_a_compressed_list(nodes, first):
    assert first_host(nodes) == first


def test_a_task_of_srun_gets_torchruns_variables():
    environment = dict(STEP)
    adopt_slurm(environment)
    assert {key: environment[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")} == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu007",
    }
    assert 20000 <= int(environment["MASTER_PORT"]) < 40000
    given = {**STEP, "MASTER_ADDR": "here", "MASTER_PORT": "5"}
    adopt_slurm(given)
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("here", "5")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # the job's script
        {**STEP, "SLURM_STEP_NUM_TASKS": "1"},
        {**STEP, "RANK": "0", "WORLD_SIZE": "2"},  # torchrun, one agent a node
    ],
    ids=["no job", "script", "one task", "torchrun"],
)
def test_elsewhere_nothing_is_set(environment):
    before = dict(environment)
    adopt_slurm(environment)
    assert environment == before


def test_an_incomplete_step_is_said():
    with pytest.raises(ValueError, match="8 tasks of an srun, but SLURM_LOCALID is not set"):
        adopt_slurm({key: value for key, value in STEP.items() if key != "SLURM_LOCALID"})
