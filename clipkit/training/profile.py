"""A window of steps traced by torch.profiler: RUN/profile, for TensorBoard, Perfetto or chrome://tracing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import profiler

from clipkit.distributed import rank


class Profile:
    """Traces some steps of a session: operators, kernels and their shapes, on every rank; no number of the run changes.

    Args:
        folder: gets rank_R.STEP.pt.trace.json.gz, STEP the last one before the window.
        start: steps of the session that come before.
        steps: how many are traced; 0: none, and nothing is started.
    """

    def __init__(self, folder: Path, *, start: int = 10, steps: int = 0):
        self._folder, self._start, self._steps = folder, start, steps

    def over(
        self,
        steps: range,
        *,
        say: Callable[[str], None] = print,
        paused: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> Iterator[int]:
        """The same steps. Leaving the loop within the window ends it, and keeps what was traced.

        Args:
            say: prints a line.
            paused: stops the run's clock while the trace is begun and written.
        """
        if not self._steps:
            yield from steps
            return
        window = steps[self._start : self._start + self._steps]
        if len(window) < self._steps:
            say(
                f"warning: profile.start={self._start} and profile.steps={self._steps} reach beyond the {len(steps)} steps "
                f"that are left: {len(window)} are traced"
            )
        yield from steps[: self._start]
        if window:
            yield from self._traced(window, say, paused)
        yield from steps[self._start + self._steps :]

    def _traced(
        self, window: range, say: Callable[[str], None], paused: Callable[[], AbstractContextManager[None]]
    ) -> Iterator[int]:
        cuda = [profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        tracer = profiler.profile(activities=[profiler.ProfilerActivity.CPU, *cuda], record_shapes=True)
        with paused():
            tracer.start()
        try:
            for step in window:
                with profiler.record_function(f"ProfilerStep#{step + 1}"):
                    yield step
        finally:
            with paused():
                if cuda:
                    torch.cuda.synchronize()
                tracer.stop()
                self._write(tracer, self._folder / f"rank_{rank()}.{window.start}.pt.trace.json.gz", say)

    def _write(self, tracer: profiler.profile, path: Path, say: Callable[[str], None]) -> None:
        """A disk that takes no more costs the trace, and a link of its name is replaced."""
        part = path.with_name(f".{path.name.removesuffix('.gz')}.{os.getpid()}.gz")
        try:
            path.parent.mkdir(exist_ok=True)
            part.unlink(missing_ok=True)
            tracer.export_chrome_trace(str(part))
            os.replace(part, path)
        except (OSError, RuntimeError) as error:
            say(f"warning: the trace could not be written to {path}: {error}")
            return
        finally:
            with contextlib.suppress(OSError):
                part.unlink()
        say(f"the trace of the steps after {path.name.split('.')[1]} is in {path.parent}")
