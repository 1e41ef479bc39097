"""Batches from worker processes, of which any may be killed: for want of memory, by hand, by a fault.

A batch is a function of its position, so nothing is lost with a worker: new ones go on with the batch that was due.
What died, how, and what to change is said each time; three deaths in a row, or twenty, are the end.

torch's DataLoader installs a handler that raises in the main thread whenever a worker dies, in the middle of whatever
runs there. It is taken back; a worker's end is found when its batch is asked for.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch
from torch.utils.data._utils import signal_handling

# Seconds between two looks at the workers while none delivers.
LOOK_EVERY_S = 1.0
# Seconds that workers have for their end, where one has died.
_END_S = 5.0
_IN_A_ROW, _IN_ALL = 3, 20


class Workers:
    """An iterator over a loader's batches that outlives its workers.

    Args:
        make: makes a loader that begins with the batch that is due; it has a timeout of at most LOOK_EVERY_S.
        timeout_s: seconds without a batch after which a RuntimeError says what it waited for; 0: never.
        awaited: what the batch that is due reads.

    Attributes:
        restarts: how often workers were started again.
    """

    def __init__(
        self,
        make: Callable[[], torch.utils.data.DataLoader],
        *,
        timeout_s: float,
        awaited: Callable[[], str],
        restarts: int = 0,
    ):
        self._make, self._timeout_s, self._awaited = make, timeout_s, awaited
        self.restarts = restarts
        self._in_a_row = 0
        self._batches: Any = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        since = time.monotonic()
        while True:
            try:
                batch = next(self._batches if self._batches is not None else self._start())
            except StopIteration:
                raise
            except Exception as error:
                if str(error).startswith("DataLoader timed out"):
                    if self._timeout_s and time.monotonic() - since >= self._timeout_s:
                        raise RuntimeError(
                            f"no batch for timeout_s = {self._timeout_s:g} s; waiting for {self._awaited()}"
                        ) from error
                    continue
                self._restart(error)
                continue
            self._in_a_row = 0
            return batch

    def _start(self) -> Any:
        in_main = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGCHLD) if in_main else None
        try:
            self._batches = iter(self._make())
        finally:
            if in_main and signal.getsignal(signal.SIGCHLD) is not before:
                signal.signal(signal.SIGCHLD, before if before is not None else signal.SIG_DFL)
        # Where another loader's handler is in place, it does not look at these workers.
        if getattr(self._batches, "_worker_pids_set", False):
            signal_handling._remove_worker_pids(id(self._batches))  # pyright: ignore[reportPrivateImportUsage]
            self._batches._worker_pids_set = False
        return self._batches

    def _restart(self, error: Exception) -> None:
        """Have new workers made, if the error is that some died; else raise it."""
        ended = [] if "in DataLoader worker process" in str(error) else self._ended(error)
        if not ended:
            raise error
        self._in_a_row += 1
        said = describe(ended)
        if self._in_a_row >= _IN_A_ROW or self.restarts >= _IN_ALL:
            times = (
                f"{self._in_a_row} times in a row without a batch" if self._in_a_row >= _IN_A_ROW else "again"
            )
            raise RuntimeError(
                f"{said} It died {times}, after {self.restarts} restarts: waiting for {self._awaited()}"
            ) from error
        self.restarts += 1
        print(f"clipkit.data: {said} New workers go on with the same batch.", file=sys.stderr, flush=True)
        self.close(hurried=True)

    def _ended(self, error: Exception) -> list[tuple[int, int]]:
        """(pid, exit status) of the workers that have ended; waits a moment where the error says that one has."""
        workers = getattr(self._batches, "_workers", [])
        broken = str(error).startswith("DataLoader worker") or isinstance(error, (OSError, EOFError))
        end = time.monotonic() + (2.0 if broken else 0.0)
        while True:
            ended = [(one.pid, one.exitcode) for one in workers if one.exitcode is not None]
            if ended or time.monotonic() >= end:
                return ended
            time.sleep(0.02)

    def close(self, *, hurried: bool = False) -> None:
        """End the workers.

        Args:
            hurried: some are dead and may have taken a lock with them: the others are not waited for for long.
        """
        batches, self._batches = self._batches, None
        if not hurried or batches is None:
            return
        ending = threading.Thread(target=batches._shutdown_workers, daemon=True)
        ending.start()
        ending.join(_END_S)
        for worker in batches._workers:
            if worker.exitcode is None:
                worker.kill()


def describe(ended: list[tuple[int, int]]) -> str:
    """Which workers ended how, how much memory there is, and what to change."""
    how = ", ".join(f"{pid} {_how(status)}" for pid, status in ended)
    memory = psutil.virtual_memory()
    own = psutil.Process().memory_info().rss
    shared = (
        " SIGBUS means that /dev/shm is full: give it more room (docker: --shm-size)."
        if any(status == -signal.SIGBUS for _, status in ended)
        else ""
    )
    return (
        f"data worker {how}. This machine has {memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free and "
        f"this process takes {own / 1e9:.1f} GB: a kernel without memory kills with SIGKILL. Fewer workers "
        f"(data.num_workers), less prepared ahead (data.prefetch) and data.cache=none take less.{shared}"
    )


def _how(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
