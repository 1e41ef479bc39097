"""Where a run's numbers go: metrics.jsonl always, TensorBoard and wandb when the config asks for them.

A logger that breaks never stops training: it says so once and is dropped. metrics.jsonl is the record: one
line a logged step or evaluation, cut back on resume to the checkpoint's step so that no step stands in it
twice.
"""

from __future__ import annotations

import inspect
import json
import re
import secrets
import string
import sys
import typing
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import msgspec
import yaml

from clipkit.files import append_line, write_text
from clipkit.foreign import LINES_BYTES, BrokenFile, checked, parse_json, read_bytes, read_text
from clipkit.registry import Registry, check_keys

if TYPE_CHECKING:
    import torch

loggers = Registry("logger")

# What every logger is given.
_GIVEN = ("run_dir", "shown", "start_step")
Count = Annotated[int, msgspec.Meta(ge=0)]


class Logger(Protocol):
    """What a registered logger is made into: `factory(run_dir, shown=..., start_step=..., **settings)`.

    One that shows pictures also has `samples`, how many, and `log_samples(step, images, captions)`.
    """

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
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Opened anew for every line: a folder that was moved or a disk that was away is there again.
            append_line(self.path, json.dumps({"step": step, **metrics}))
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
    """TensorBoard events in RUN/tensorboard: scalars, the run's settings as text, sample pictures.

    Args:
        samples: pictures and captions of the training batch shown at each evaluation.
    """

    def __init__(self, run_dir: Path, *, shown: Mapping[str, Any], start_step: int, samples: Count = 0):
        from torch.utils.tensorboard import SummaryWriter

        self.samples = samples
        # What an earlier session has logged of steps that are made again is hidden.
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)
        self._writer.add_text("settings", _verbatim(yaml.safe_dump(dict(shown), sort_keys=False)), start_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def log_samples(self, step: int, images: torch.Tensor, captions: Sequence[str]) -> None:
        self._writer.add_images("samples", images, step)
        self._writer.add_text("samples", _verbatim("\n".join(captions)), step)

    def close(self) -> None:
        self._writer.close()


def _verbatim(text: str) -> str:
    """As TensorBoard's Markdown shows it unchanged."""
    return "".join(f"    {line}\n" for line in text.splitlines())


@loggers.register("wandb")
class WeightsAndBiases:
    """A wandb run; offline runs lie in RUN/wandb and are sent later with `wandb sync`.

    The run's id is kept in RUN/wandb_run_id.txt: a run that is resumed stays one run, and what it logs of a step that is
    on wandb's record already is passed over, for wandb takes no step twice. Offline, each session has a folder of
    RUN/wandb with the same id, and `wandb sync` joins them.

    Args:
        project: wandb's project name.
        entity: user or team; None is the account's default.
        mode: "offline" (no network is used), "online" or "disabled".
        group, tags, notes: as wandb shows them; a group gathers runs, such as those of a sweep.
        init_timeout: seconds to wait for the server before going on without wandb.
        samples: pictures and captions of the training batch shown at each evaluation.
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
        group: str | None = None,
        tags: Sequence[str] = (),
        notes: str | None = None,
        init_timeout: float = 30.0,
        samples: Count = 0,
    ):
        import wandb

        # A run left open by an earlier job of a sweep would be returned instead of a new one.
        if wandb.run is not None:
            wandb.finish()
        self.samples, self._wandb = samples, wandb
        self._run = wandb.init(
            project=project,
            entity=entity,
            mode=mode,
            id=_run_id(run_dir / "wandb_run_id.txt"),
            # Offline there is nothing to resume, which wandb says each time.
            resume="allow" if mode == "online" else None,
            group=group,
            tags=list(tags),
            notes=notes,
            dir=str(run_dir),
            name="/".join(run_dir.parts[-2:]),
            config=dict(shown),
            settings=wandb.Settings(init_timeout=init_timeout, silent=True),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def log_samples(self, step: int, images: torch.Tensor, captions: Sequence[str]) -> None:
        pictures = [
            self._wandb.Image(image.permute(1, 2, 0).numpy(), caption=caption)
            for image, caption in zip(images, captions, strict=True)
        ]
        self._run.log({"samples": pictures}, step=step)

    def close(self) -> None:
        self._run.finish()


_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def _run_id(path: Path) -> str:
    """The id kept in a run folder, or a new one; the folder may be a stranger's, and is then told what it holds."""
    try:
        found = read_text(path, limit=1000).strip()
        if _RUN_ID.fullmatch(found):
            return found
        raise BrokenFile(f"{path} holds no id of a wandb run")
    except FileNotFoundError:
        pass
    except (BrokenFile, OSError) as error:
        _say(f"{error}: wandb shows this session as a run of its own")
    letters = string.ascii_lowercase + string.digits
    new = "".join(secrets.choice(letters) for _ in range(8))
    write_text(path, new + "\n")
    return new


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


def settings_of(name: str) -> list[str]:
    """The settings that a logger takes."""
    return [key for key in inspect.signature(loggers.get(name)).parameters if key not in _GIVEN]


def check_loggers(chosen: Mapping[str, Mapping[str, Any] | None]) -> None:
    """ValueError for an unknown logger, a setting that it does not take, or a value of another kind than it says."""
    for name, settings in chosen.items():
        factory = loggers.get(name)
        check_keys(settings or {}, settings_of(name), f"logger {name!r}")
        kinds = typing.get_type_hints(
            factory.__init__ if inspect.isclass(factory) else factory, include_extras=True
        )
        for key, value in (settings or {}).items():
            try:
                checked(value, kinds.get(key, Any), name=f"logger.{name}.{key}={value!r}")
            except TypeError:
                # A kind of a user's own.
                continue


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

    @property
    def samples(self) -> int:
        """The most pictures that one of them shows."""
        return max((getattr(logger, "samples", 0) for logger in self._others.values()), default=0)

    def log_samples(self, step: int, images: torch.Tensor, captions: Sequence[str]) -> None:
        """Show pictures to those that take some, each as many as it wants.

        Args:
            images: (n, 3, H, W) uint8, on the CPU.
            captions: n texts.
        """
        for name, logger in list(self._others.items()):
            if count := getattr(logger, "samples", 0):
                show = logger.log_samples  # pyright: ignore[reportAttributeAccessIssue]
                self._guard(name, lambda show=show, n=count: show(step, images[:n], captions[:n]))

    def close(self) -> None:
        for name, logger in list(self._others.items()):
            self._guard(name, logger.close)
        self._record.close()
