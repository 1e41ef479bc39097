"""What a run prints: a bar on a terminal, plain lines elsewhere (a redrawn bar floods a log file)."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm


class Progress:
    """Shows step, loss terms, learning rate, speed and time left; silent on ranks other than 0.

    Args:
        total: steps in all.
        every: steps between plain lines.
        enabled: False on ranks other than 0.
    """

    def __init__(self, *, total: int, every: int, enabled: bool = True):
        self.total, self.every, self.enabled = total, every, enabled
        self.first, self.started = 0, time.monotonic()
        self.bar: tqdm | None = None

    def start(self, step: int) -> None:
        """Steps are about to be taken; `step` are done, more than 0 when a run resumes."""
        self.first, self.started = step, time.monotonic()
        if self.enabled and sys.stderr.isatty():
            self.bar = tqdm(total=self.total, initial=step, unit="step", dynamic_ncols=True, smoothing=0.1)

    def show(self, step: int, numbers: Mapping[str, float], pairs_per_second: float) -> None:
        """Report one finished step; `numbers` are shown as they are named."""
        if not self.enabled:
            return
        text = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        text += f"  {pairs_per_second:,.0f} pairs/s"
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
        elif step % self.every == 0 or step == self.total or step == self.first + 1:
            rate = (step - self.first) / max(time.monotonic() - self.started, 1e-9)
            left = (self.total - step) / rate
            self.say(f"step {step}/{self.total}  {text}  {int(left) // 60}:{int(left) % 60:02d} left")

    def say(self, text: str) -> None:
        """Print a line without breaking the bar; where nothing can be printed, training goes on without."""
        if not self.enabled:
            return
        try:
            if self.bar is not None:
                self.bar.write(text, file=sys.stderr)
            else:
                print(text, flush=True)
        except OSError:
            # The log's disk is full, or whoever read the output has gone.
            self.enabled = False

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
