"""Where a run's numbers go: metrics.jsonl always, TensorBoard and wandb when the config asks for them.

A logger that breaks never stops training: it says so once and is dropped. metrics.jsonl is the record: one
line a logged step or evaluation, cut back on resume to the checkpoint's step so that no step stands in it
twice.
"""

from __future__ import annotations

import errno
import inspect
import json
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from clipkit.files import write_text
from clipkit.foreign import LINES_BYTES, BrokenFile, parse_json, read_bytes
from clipkit.registry import Registry, check_keys

loggers = Registry("logger")


# A link is not followed, and a FIFO without a reader is an error instead of a wait.
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class Logger(Protocol):
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class JSONLines:
    """metrics.jsonl: {"step": n, "train/loss": ...} a line.

    A disk that takes no more costs the lines that do not fit, which is said once; whole lines stay whole.

    Args:
        path: the file; it is created with its folder.
        start_step: lines of a later step are removed: the run resumes here and will write them again.
        scored: False removes the evaluation of `start_step` too.
    """

    def __init__(self, path: str | Path, *, start_step: int = 0, scored: bool = True):
        self.path, self._lost = Path(path), 0
        try:
            if self.path.exists():
                kept = [line for line in _lines(self.path) if _kept(line, start_step, scored)]
                write_text(self.path, "".join(line + "\n" for line in kept))
        except (BrokenFile, OSError) as error:
            _say(f"what {self.path} held before step {start_step} is left as it is: {error}")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        line = (json.dumps({"step": step, **metrics}) + "\n").encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Opened anew for every line: a folder that was moved or a disk that was away is there again. One write a
            # line: a killed run loses at most the line it was writing.
            descriptor = os.open(self.path, _APPEND, 0o666)
            try:
                size = os.fstat(descriptor).st_size
                if os.write(descriptor, line) < len(line):
                    os.ftruncate(descriptor, size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(descriptor)
        except OSError as error:
            self._lost += 1
            if self._lost == 1:
                _say(
                    f"the numbers of step {step} could not be written to {self.path} ({error}); training goes on"
                )

    def close(self) -> None:
        if self._lost:
            _say(f"{self._lost} lines are missing in {self.path}: the disk took no more")


def _say(text: str) -> None:
    warnings.warn(text, stacklevel=3)


def _lines(path: Path) -> list[str]:
    return [line.decode("utf-8", "replace") for line in read_bytes(path, limit=LINES_BYTES).splitlines()]


def _kept(line: str, last: int, scored: bool) -> bool:
    """Whether a line of metrics.jsonl is whole and of step `last` or before."""
    try:
        found = parse_json(line, name="line")
        step = found["step"]
        again = not scored and step == last and any(name.startswith("eval/") for name in found)
        return isinstance(step, int) and step <= last and not again
    except (BrokenFile, KeyError):
        return False


@loggers.register("tensorboard")
class TensorBoard:
    """Scalars as TensorBoard events in RUN/tensorboard."""

    def __init__(self, run_dir: Path, *, shown: Mapping[str, Any], start_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
            str(run_dir / "tensorboard"), purge_step=start_step + 1 if start_step else None
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


@loggers.register("wandb")
class WeightsAndBiases:
    """A wandb run; offline runs lie in RUN/wandb and are sent later with `wandb sync`.

    Args:
        project: wandb's project name.
        entity: user or team; None is the account's default.
        mode: "offline" (no network is used), "online" or "disabled".
        init_timeout: seconds to wait for the server before going on without wandb.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        shown: Mapping[str, Any],
        start_step: int,
        project: str = "clipkit",
        entity: str | None = None,
        mode: Literal["online", "offline", "disabled", "shared"] = "offline",
        init_timeout: float = 30.0,
    ):
        import wandb

        # A run left open by an earlier job of a sweep would be returned instead of a new one.
        if wandb.run is not None:
            wandb.finish()
        self._run = wandb.init(
            project=project,
            entity=entity,
            mode=mode,
            dir=str(run_dir),
            name="/".join(run_dir.parts[-2:]),
            config=dict(shown),
            settings=wandb.Settings(init_timeout=init_timeout, silent=True),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


def tolerate_broken_wandb() -> None:
    """Let timm be imported beside a wandb that fails to import: timm survives its absence alone."""
    try:
        import wandb  # noqa: F401
    except ImportError:
        pass
    except Exception:
        # None marks a module as absent; the wandb logger then reports it, once.
        absent: Any = None
        sys.modules["wandb"] = absent


def check_loggers(chosen: Mapping[str, Mapping[str, Any] | None]) -> None:
    """ValueError for an unknown logger, or a setting that it does not take."""
    for name, settings in chosen.items():
        parameters = inspect.signature(loggers.get(name)).parameters
        own = [key for key in parameters if key not in ("run_dir", "shown", "start_step")]
        check_keys(settings or {}, own, f"logger {name!r}")


class Loggers:
    """metrics.jsonl and the chosen loggers behind one `log`; only ever built on rank 0.

    Args:
        run_dir: the run's folder.
        chosen: {"tensorboard": {}, "wandb": {"mode": "offline"}}: a name and its settings.
        shown: settings of the run, for loggers that show them beside the numbers.
        start_step: the step a run resumes from, 0 for a new one.
        scored: False where the evaluation after `start_step` will be logged again.

    Raises:
        ValueError: an unknown logger. Anything that goes wrong inside a known one is a warning, once.
    """

    def __init__(
        self,
        run_dir: str | Path,
        chosen: Mapping[str, Mapping[str, Any]],
        *,
        shown: Mapping[str, Any],
        start_step: int,
        scored: bool = True,
    ):
        self._record = JSONLines(Path(run_dir) / "metrics.jsonl", start_step=start_step, scored=scored)
        self._others: dict[str, Logger] = {}
        factories = {name: loggers.get(name) for name in chosen}
        for name, factory in factories.items():
            self._guard(
                name,
                lambda name=name, factory=factory: self._others.__setitem__(
                    name, factory(Path(run_dir), shown=shown, start_step=start_step, **(chosen[name] or {}))
                ),
            )

    def _guard(self, name: str, call: Any) -> None:
        # wandb is known to leave through SystemExit-like errors of its own; KeyboardInterrupt must still
        # pass.
        try:
            call()
        except Exception as error:
            self._others.pop(name, None)
            warnings.warn(
                f"logger {name!r} failed ({type(error).__name__}: {error}); training goes on without it, "
                f"and every number is in {self._record.path}",
                stacklevel=3,
            )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record numbers for a step; names are "train/loss" or "eval/<task>/<metric>"."""
        self._record.log(step, metrics)
        for name, logger in list(self._others.items()):
            self._guard(name, lambda logger=logger: logger.log(step, metrics))

    def close(self) -> None:
        for name, logger in list(self._others.items()):
            self._guard(name, logger.close)
        self._record.close()
