"""However ranks are started, they are one training with the same losses: torchrun, srun, two nodes, a group that is there."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.processes import ROOT, command, fork, fork_ranks
from tests.recipes.runs import SMALL, lines, only_run, run_ranks

QUIET = [*SMALL, "eval=none", "logger=none", "steps=4"]


@pytest.fixture(scope="module")
def torchrun_losses(tmp_path_factory, shapes) -> list[float]:
    folder = tmp_path_factory.mktemp("torchrun")
    run_ranks(*QUIET, shapes, f"output_dir={folder}")
    return losses(only_run(folder))


def losses(folder: Path) -> list[float]:
    return [line["train/loss"] for line in lines(folder)]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.mark.parametrize("tasks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_srun_starts_one_training(tasks, tmp_path, shapes, torchrun_losses):
    """Its variables, and no others."""
    step = {
        "SLURM_JOB_ID": free_port(),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_NODELIST": "localhost",
        "MASTER_PORT": free_port(),
    }
    started = [
        fork(
            ROOT / "recipes" / "pretrain.py",
            *QUIET,
            shapes,
            f"output_dir={tmp_path}",
            env={**step, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(tasks)
    ]
    for one in started:
        one.finished()
    found = losses(only_run(tmp_path))
    assert len(found) == 4
    if tasks == 2:
        assert found == pytest.approx(torchrun_losses, rel=1e-6)


def test_a_process_group_that_is_there_is_joined(tmp_path, shapes, torchrun_losses):
    program = Path(__file__).with_name("own_group.py")
    started = fork_ranks(2, program, str(tmp_path / "run"), *QUIET, shapes)
    for one in started:
        assert "the group is still up" in one.finished()
    assert losses(tmp_path / "run") == pytest.approx(torchrun_losses, rel=1e-6)


@pytest.mark.slow
def test_two_nodes_by_torchruns_rendezvous(tmp_path, shapes, torchrun_losses):
    meeting = f"--rdzv-endpoint=localhost:{free_port()}"
    agents = [
        command(
            *(
                "-m",
                "torch.distributed.run",
                "--nnodes=2",
                "--nproc-per-node=1",
                "--rdzv-backend=c10d",
                meeting,
            ),
            *("--rdzv-id=7", f"--local-addr={name}"),
            ROOT / "recipes" / "pretrain.py",
            *QUIET,
            shapes,
            f"output_dir={tmp_path}",
            env={"OMP_NUM_THREADS": "1"},
        )
        for name in ("localhost", "127.0.0.1")
    ]
    for agent in agents:
        agent.finished()
    assert losses(only_run(tmp_path)) == pytest.approx(torchrun_losses, rel=1e-6)
