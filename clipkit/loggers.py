"""Where a run's numbers go: metrics.jsonl always, TensorBoard and wandb when the config asks for them.

A logger that breaks never stops training: it says so once and is dropped. metrics.jsonl is the record: one
line a logged step or evaluation, cut back on resume to the checkpoint's step so that no step stands in it
twice.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from clipkit.files import write_text
from clipkit.registry import Registry

loggers = Registry("logger")


class Logger(Protocol):
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class JSONLines:
    """metrics.jsonl: {"step": n, "train/loss": ...} a line.

    Args:
        path: the file; it is created with its folder.
        start_step: lines of a later step are removed: the run resumes here and will write them again.
    """

    def __init__(self, path: str | Path, *, start_step: int = 0):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            kept = [
                line for line in self.path.read_text(encoding="utf-8").splitlines() if _step(line, start_step)
            ]
            write_text(self.path, "".join(line + "\n" for line in kept))
        self._file = self.path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        # One write a line, flushed: a killed run loses at most the line it was writing.
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _step(line: str, last: int) -> bool:
    """Whether a line of metrics.jsonl is whole and of step `last` or before."""
    try:
        return json.loads(line)["step"] <= last
    except (ValueError, KeyError, TypeError):
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


class Loggers:
    """metrics.jsonl and the chosen loggers behind one `log`; only ever built on rank 0.

    Args:
        run_dir: the run's folder.
        chosen: {"tensorboard": {}, "wandb": {"mode": "offline"}}: a name and its settings.
        shown: settings of the run, for loggers that show them beside the numbers.
        start_step: the step a run resumes from, 0 for a new one.

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
    ):
        self._record = JSONLines(Path(run_dir) / "metrics.jsonl", start_step=start_step)
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
