"""However ranks are started, they are one training with the same losses: torchrun, srun, two nodes, a group that is there."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from tests.processes import ROOT, command, fork, fork_ranks
from tests.recipes.runs import SMALL, lines, only_run, run, run_ranks

QUIET = [*SMALL, "eval=none", "logger=none", "steps=4"]


@pytest.fixture(scope="module")
def torchrun_losses(tmp_path_factory, shapes) -> list[float]:
    folder = tmp_path_factory.mktemp("torchrun")
    # Traced, which changes nothing that the others are compared with; each rank leaves a file.
    run_ranks(*QUIET, shapes, f"output_dir={folder}", "profile.start=1", "profile.steps=1")
    traces = sorted(path.name for path in (only_run(folder) / "profile").iterdir())
    assert traces == [f"rank_{rank}.1.pt.trace.json.gz" for rank in (0, 1)]
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


@pytest.mark.slow
def test_ray_trains_the_losses_of_torchrun_and_of_one_process(tmp_path, shapes, torchrun_losses):
    """Two workers of Ray Train on this machine; a tower without BatchNorm, whose ranks see what one process sees."""
    pytest.importorskip("ray")
    plain = [
        "image_tower=timm",
        "image_tower.model=test_vit",
        "image_tower.image_size=null",
        "text_tower.dropout=0.0",
    ]
    run(*QUIET, *plain, shapes, f"output_dir={tmp_path}/one")
    alone = losses(only_run(tmp_path / "one"))
    assert len(alone) == 4
    environment = {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    for name, more, expected, tolerance in (("rn", [], torchrun_losses, 1e-6), ("vit", plain, alone, 1e-5)):
        settings = command(
            ROOT / "recipes" / "pretrain.py", *QUIET, *more, shapes, "--cfg", "job", "--resolve"
        )
        (tmp_path / f"{name}.yaml").write_text(settings.finished())
        program = ROOT / "recipes" / "own_trainer" / "ray_train.py"
        # From another folder than the workers'.
        command(program, f"{name}.yaml", f"on_ray/{name}", env=environment, cwd=tmp_path).finished()
        folder = tmp_path / "on_ray" / name
        assert losses(folder) == pytest.approx(expected, rel=tolerance)
        (session,) = (folder / "sessions.jsonl").read_text().splitlines()
        assert json.loads(session)["ranks"] == 2
