"""The process a program trains in: its device, precision, rank in a torchrun, and what asks it to stop."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from clipkit.data.faults import FaultCounter
from clipkit.distributed import barrier, full_tensor, gather_objects, is_distributed, rank
from clipkit.model import DualEncoder
from clipkit.registry import unknown
from clipkit.training.run_folder import STOPPED

T = TypeVar("T")


class StopRequest:
    """Turns SIGTERM, Ctrl-C and the end of `max_minutes` into a flag that the loop reads between steps, and faults of all
    ranks' data into an error.

    A second Ctrl-C interrupts at once. A second SIGTERM does not: a scheduler and torchrun each send one.

    Args:
        max_minutes: from now, or None.
        faults: the data stream's; from here on its limits are held against the sums over the ranks.

    Attributes:
        reason: what asked for the stop, or None; after `agree`, the same on every rank.
    """

    # The last signal any of them received: a sweep also stops for one that came too late for its job.
    received: int | None = None

    def __init__(self, max_minutes: float | None = None, *, faults: FaultCounter | None = None) -> None:
        self.reason: str | None = None
        self._code = 0
        self._minutes, self._faults = max_minutes, faults
        if faults is not None:
            faults.agreed = True
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        # Signals can only be caught in the main thread; a launcher may run jobs in others.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._code and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._code = StopRequest.received = number

    def agree(self, device: torch.device) -> str | None:
        """The reason any rank has: ranks must stop at the same step. Called by all ranks, once a step.

        Raises:
            RuntimeError: on every rank, where more of the data is bad than max_bad_fraction tolerates.
        """
        # A signal's number, or one that no signal has.
        code = self._code or (_TIME_IS_UP if self._deadline and time.monotonic() > self._deadline else 0)
        own = [int(code == one) for one in _REASONS] + (self._faults.added() if self._faults else [])
        if is_distributed():
            seen = torch.tensor(own, dtype=torch.int64, device=device)
            distributed.all_reduce(seen)
            own = seen.tolist()
        codes, added = own[: len(_REASONS)], own[len(_REASONS) :]
        if self._faults is not None and (cause := self._faults.over(added)):
            met = [one for examples in gather_objects(self._faults.examples(cause)) for one in examples]
            raise self._faults.error(cause, added, met)
        code = max(number for number, ranks in zip((0, *_REASONS), (1, *codes), strict=True) if ranks)
        if code:
            self.reason = (
                f"max_minutes={self._minutes:g}" if code == _TIME_IS_UP else signal.Signals(code).name
            )
        return self.reason

    def leave(self, step: int) -> NoReturn:
        """Say why and exit with the status of a stopped run; called by all ranks, once everything is saved."""
        if rank() == 0:
            print(
                f"stopped by {self.reason} at step {step}, saved; run the same command to go on", flush=True
            )
        # A rank that leaves is taken for failed and the others are ended: rank 0 must have saved.
        barrier()
        sys.exit(STOPPED)


_TIME_IS_UP = 1000
# What asks for a stop; of several the largest is told.
_REASONS = (signal.SIGINT, signal.SIGTERM, _TIME_IS_UP)


def choose_device(name: str) -> torch.device:
    """The torch device a setting means; under torchrun on GPUs, this rank's own. ValueError when it is not
    there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name}, but torch sees no CUDA device here; give device=cpu or device=auto")
    return device


@contextlib.contextmanager
def process_group(device: torch.device, timeout_minutes: float) -> Iterator[tuple[int, int]]:
    """(rank, world size); with several ranks the default process group is up inside, and taken down after.

    Ranks are torchrun's, srun's (clipkit.command.launch), or whoever's has made the default group already (Ray Train,
    Lightning, Accelerate): that one is joined, and left up.

    When a rank dies, its neighbours' collectives fail (gloo: at once; NCCL: torchrun ends them, or after
    `timeout_minutes`), which is raised as an error that says so.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    joined = distributed.is_available() and distributed.is_initialized()
    if joined:
        world = distributed.get_world_size()
    elif world == 1:
        yield 0, 1
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # gloo beside NCCL: what is gathered of Python objects and checkpoints lives on the CPU.
    if not joined:
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(minutes=timeout_minutes),
        )
    mine, lost = distributed.get_rank(), False
    try:
        yield mine, world
    except RuntimeError as error:
        lost = lost_a_rank(error)
        if lost:
            raise RuntimeError(
                f"rank {mine} of {world} lost another rank, which was killed, crashed or hung (its own output says more, if it could): "
                f"{str(error).splitlines()[0]}. Start the same command again: the run goes on from its last checkpoint."
            ) from error
        raise
    finally:
        # Taking the group down would wait for a rank that is gone.
        if not lost and not joined:
            # A model under DDP holds the group, and is held by a cycle; gloo's threads must not outlive Python.
            gc.collect()
            distributed.destroy_process_group()


def lost_a_rank(error: RuntimeError) -> bool:
    """Whether a collective failed for want of its peers."""
    if isinstance(error, distributed.DistError):
        return True
    # gloo raises a plain RuntimeError that names its source file.
    return "gloo" in str(error) or "Connection closed by peer" in str(error)


def data_parallel(
    module: torch.nn.Module, device: torch.device, *, wanted: tuple[str, ...] = ()
) -> torch.nn.Module:
    """The module under DistributedDataParallel when several ranks run and it has something to train; else as
    it is.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    # FSDP2 has done it already.
    if not is_distributed() or not trained or hasattr(trained[0], "full_tensor"):
        return module
    # DDP waits for every parameter's gradient; a loss that leaves a tower or the scale out must be said.
    all_used = {"image_features", "text_features", "logit_scale"} <= set(wanted) or not wanted
    return DistributedDataParallel(
        module,
        device_ids=[device] if device.type == "cuda" else None,
        find_unused_parameters=not all_used,
        # A loss's buffers (FastCLIP's memory) are equal on all ranks already; a tower's BatchNorm follows
        # rank 0.
        broadcast_buffers=bool(wanted),
    )


def sharded(parallel: str) -> bool:
    """Whether `parallel=ddp|fsdp` splits the weights: with one rank there is nothing to split over."""
    if parallel not in ("ddp", "fsdp"):
        raise unknown("parallel", parallel, ("ddp", "fsdp"))
    return parallel == "fsdp" and is_distributed()


def compile_towers(model: DualEncoder, *, by_block: bool) -> None:
    """torch.compile both towers in place, names unchanged; by block under FSDP2, which acts between the
    blocks.
    """
    for tower in (model.image_tower, model.text_tower):
        for module in (tower.blocks() or [tower]) if by_block else [tower]:
            module.compile()


def clip_grad_norm(parameters: list[torch.nn.Parameter], limit: float) -> torch.Tensor:
    """Scale the gradients down to a global norm of `limit`; () the norm before, over all ranks' parts."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    return full_tensor(norm)


class Buffers:
    """What a forward pass writes besides gradients (BatchNorm's statistics, a loss's memory), to be put back where the
    step is left out.
    """

    def __init__(self, modules: Iterable[torch.nn.Module]):
        self._buffers = [buffer for module in modules for buffer in module.buffers()]
        self._kept: list[torch.Tensor] = []

    def keep(self) -> None:
        """Before the forward pass."""
        self._kept = [buffer.clone() for buffer in self._buffers]

    def restore(self) -> None:
        """As they were when they were kept."""
        for buffer, value in zip(self._buffers, self._kept, strict=True):
            buffer.copy_(value)


def on_rank_0_first(make: Callable[[], T]) -> T:
    """Call on rank 0, then on the others: what writes files does so once, and the others find them.

    An error on rank 0 is an error on all, with its text: none waits for a rank that is gone.
    """
    value: Any = None
    error: Exception | None = None
    if rank() == 0:
        try:
            value = make()
        except Exception as caught:
            error = caught
    # The default group: also where a group of GPUs is up, its gloo half carries objects.
    problem = gather_objects(None if error is None else (isinstance(error, ValueError), str(error)))[0]
    if error is not None:
        raise error
    if problem is not None:
        raise (ValueError if problem[0] else RuntimeError)(f"rank 0 says: {problem[1]}")
    return value if rank() == 0 else make()


@contextlib.contextmanager
def held_by_rank_0(resource: AbstractContextManager) -> Iterator[None]:
    """Enter a context on rank 0 for all; where that fails, it fails on all."""
    on_rank_0_first(lambda: resource.__enter__() if rank() == 0 else None)
    try:
        yield
    finally:
        if rank() == 0:
            resource.__exit__(*sys.exc_info())
