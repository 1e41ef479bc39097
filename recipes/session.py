"""The process a recipe runs in: its device, precision, rank in a torchrun, and the signals that ask it to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# sysexits' EX_TEMPFAIL: stopped by a signal with everything saved; the same command goes on.
STOPPED = 75


class StopRequest:
    """Turns SIGTERM and Ctrl-C into a flag that the loop reads between steps; a second one interrupts at once.

    Attributes:
        signal: the signal's number, or None; after `agree`, the same on every rank.
    """

    # The last signal any of them received: a sweep also stops for one that came too late for its job.
    received: int | None = None

    def __init__(self) -> None:
        self.signal: int | None = None
        # Signals can only be caught in the main thread; a launcher may run jobs in others.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = StopRequest.received = number

    def agree(self, device: torch.device) -> int | None:
        """The signal any rank has received: ranks must stop at the same step. Called by all ranks, once a step."""
        import torch

        from clipkit.distributed import is_distributed

        if is_distributed():
            seen = torch.tensor(self.signal or 0, device=device)
            torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MAX)
            self.signal = int(seen) or None
        return self.signal


def choose_device(name: str) -> torch.device:
    """The torch device a setting means; under torchrun on GPUs, this rank's own. ValueError when it is not there."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name}, but torch sees no CUDA device here; give device=cpu or device=auto")
    return device


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[tuple[int, int]]:
    """(rank, world size); under torchrun the default process group is up inside, and taken down after."""
    import torch
    from torch import distributed

    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield 0, 1
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield distributed.get_rank(), world
    finally:
        distributed.destroy_process_group()


def autocast(name: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """Makes autocast contexts for `precision=fp32|bf16`."""
    import torch

    if name == "fp32":
        return contextlib.nullcontext
    if name == "bf16":
        return lambda: torch.autocast(device.type, dtype=torch.bfloat16)
    raise ValueError(f"precision={name!r}: expected fp32 or bf16")


def data_parallel(module: torch.nn.Module, device: torch.device, *, wanted: tuple[str, ...] = ()) -> torch.nn.Module:
    """The module under DistributedDataParallel when several ranks run and it has something to train; else as it is."""
    from torch.nn.parallel import DistributedDataParallel

    from clipkit.distributed import is_distributed

    if not is_distributed() or not any(p.requires_grad for p in module.parameters()):
        return module
    # DDP waits for every parameter's gradient; a loss that leaves a tower or the scale out must be said.
    all_used = {"image_features", "text_features", "logit_scale"} <= set(wanted) or not wanted
    return DistributedDataParallel(
        module, device_ids=[device] if device.type == "cuda" else None, find_unused_parameters=not all_used,
        # A loss's buffers (FastCLIP's memory) are equal on all ranks already; a tower's BatchNorm follows rank 0.
        broadcast_buffers=bool(wanted))


def on_rank_0_first(make: Callable[[], Any]) -> Any:
    """Call on rank 0, then on the others: what writes files does so once, and the others find them."""
    from clipkit.distributed import barrier, rank

    if rank() == 0:
        value = make()
    barrier()
    if rank() != 0:
        value = make()
    return value
