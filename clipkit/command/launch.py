"""Ranks started by SLURM's srun, made to look as torchrun's. Nothing here imports torch."""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

# Where ports are free on most machines; a job's own, so that two jobs of a node do not meet.
_FIRST_PORT, _PORTS = 20000, 20000


def adopt_slurm(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in a task of an srun with several, from SLURM's variables.

    Nothing is set under torchrun, in a job script itself (where no step runs), or in a step of one task. MASTER_ADDR and
    MASTER_PORT that are set already stay.

    Raises:
        ValueError: a step whose variables are incomplete.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environment or "SLURM_STEP_ID" not in environment or tasks == "1":
        return
    needed = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
    missing = [name for name in needed if name not in environment]
    if missing:
        raise ValueError(
            f"this is one of {tasks} tasks of an srun, but {missing[0]} is not set: start the ranks by srun itself, or by "
            "torchrun"
        )
    number = int(environment["SLURM_JOB_ID"]) * 7 + int(environment["SLURM_STEP_ID"])
    environment.setdefault("MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"]))
    environment.setdefault("MASTER_PORT", str(_FIRST_PORT + number % _PORTS))
    environment["WORLD_SIZE"] = tasks
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]


def first_host(nodes: str) -> str:
    """The first host of SLURM's compressed list, such as gpu[007-009,12],login1 or rack[1-2]n[3-4]."""
    # The first comma outside of brackets ends the first entry.
    entry = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes.strip())
    if entry is None:
        raise ValueError(f"SLURM_STEP_NODELIST is {nodes!r}: expected host names, such as node[01-04]")
    return re.sub(r"\[([^\],\-]+)[^\]]*\]", r"\1", entry[0])
