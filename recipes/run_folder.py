"""A run's folder: config.yaml, metrics.jsonl, checkpoints/, summary.json; what tells a finished run from one
to resume.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipkit.recipes.progress import Progress

# Settings that may differ between the sessions of one run.
FREE = (
    "output_dir",
    "resume",
    "device",
    "num_threads",
    "log_every",
    "logger",
    "name",
    "max_minutes",
    "timeout_minutes",
    "loss_spike",
    "objective",
)


def open_run(run_dir: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Make or enter a run's folder; the summary if the run in it is finished, else None.

    Raises:
        ValueError: the folder holds a run of other settings, or holds one and `resume=false`.
        OSError: the folder cannot be written.
    """
    from omegaconf import OmegaConf

    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"the run folder {run_dir} cannot be made ({error}); give output_dir= a folder you can write"
        ) from error
    if not os.access(run_dir, os.W_OK):
        raise OSError(f"the run folder {run_dir} cannot be written; give output_dir= a folder you can write")
    record = run_dir / "config.yaml"
    if record.exists():
        if not config["resume"]:
            raise ValueError(
                f"{run_dir} holds a run and resume=false: give name=ANOTHER, or delete the folder"
            )
        before = OmegaConf.to_container(OmegaConf.load(record))
        # A top-level setting that the record lacks came with a later version of clipkit.
        now = {key: value for key, value in config.items() if key in before}
        changed = [
            f"{key}: {old!r} -> {new!r}"
            for key, old, new in differences(before, now)
            if key.split(".")[0] not in FREE
        ]
        if changed:
            raise ValueError(
                f"{run_dir} holds a run of other settings ({'; '.join(changed[:5])}): "
                "give name=ANOTHER to start beside it, or delete the folder"
            )
        if (found := read_summary(run_dir)).get("finished"):
            return found
    else:
        temporary = run_dir / f".config.yaml.{os.getpid()}"
        temporary.write_text(OmegaConf.to_yaml(OmegaConf.create(dict(config))), encoding="utf-8")
        os.replace(temporary, record)
    return None


def read_summary(run_dir: Path) -> dict[str, Any]:
    """summary.json, or an empty dict where no run has ended."""
    summary = run_dir / "summary.json"
    return json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {}


def differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) wherever two nested mappings differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}, key=str):
            yield from differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
    elif old != new:
        yield prefix, old, new


def write_summary(run_dir: Path, **entries: Any) -> None:
    """summary.json: final metrics, samples seen, skip counts by cause, wall-clock, versions."""
    from importlib.metadata import PackageNotFoundError, version

    from clipkit.checkpoint import write_json

    versions = {"python": platform.python_version()}
    for package in ("clipkit", "torch", "timm", "open_clip_torch", "transformers", "webdataset"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    write_json(run_dir / "summary.json", {**entries, "versions": versions, "command": sys.argv})


def joined_reports(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """The ranks' data reports as one: every rank counts all samples, but only the faults it met itself."""
    skipped: dict[str, int] = {}
    for report in reports:
        for cause, count in report["skipped"].items():
            skipped[cause] = skipped.get(cause, 0) + count
    return {**reports[0], "skipped": skipped}


def flatten(results: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """{task: {metric: value}} as {"task/metric": value}."""
    return {f"{task}/{name}": value for task, numbers in results.items() for name, value in numbers.items()}


def table(metrics: Mapping[str, float]) -> str:
    """The final table: a line a task and direction, its metrics side by side."""
    rows: dict[tuple[str, str], list[tuple[str, float]]] = {}
    for name, value in metrics.items():
        task, _, metric = name.rpartition("/")
        direction = next((d for d in ("image_to_text", "text_to_image") if metric.startswith(d + "_")), "")
        rows.setdefault((task, direction), []).append((metric.removeprefix(direction + "_"), value))
    lines, header = [], None
    for (task, direction), cells in rows.items():
        names = [name for name, _ in cells]
        if names != header:
            lines.append(" " * 32 + "".join(f"{name:>16}" for name in names))
            header = names
        label = f"  {task} {direction.replace('_', ' ')}".rstrip()
        lines.append(f"{label:<32}" + "".join(f"{value:>16.4g}" for _, value in cells))
    return "\n".join(lines)


def checked_finite(
    terms: Mapping[str, Any], run_dir: Path, *, step: int, keys: list[str]
) -> dict[str, float]:
    """The terms as numbers; RuntimeError when the loss or its gradient is not finite, with the batch's keys
    on record.

    Called before the optimizer's step; every rank has the same loss and the same averaged gradient, so all
    stop.

    Args:
        terms: () tensors, "loss" and "grad_norm" among them.
    """
    import torch

    from clipkit.checkpoint import write_json

    # One copy from the device for all of them.
    values = dict(
        zip(terms, torch.stack([value.detach().float() for value in terms.values()]).tolist(), strict=True)
    )
    bad = [name for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
    if not bad:
        return values
    record = run_dir / f"nonfinite_step_{step}{of_rank()}.json"
    write_json(record, {"terms": {name: str(value) for name, value in values.items()}, "keys": list(keys)})
    raise RuntimeError(
        f"the {' and the '.join(bad)} is not finite at step {step} ({values}); the weights are unchanged and the batch's keys are in {record}. "
        "Lower optim.lr, set clip_grad_norm, or use precision=fp32; the run resumes from its last checkpoint."
    )


def of_rank() -> str:
    """What the name of a file ends in that each rank writes for its share of the batch; nothing on rank 0."""
    from clipkit.distributed import rank

    return f"_rank_{rank()}" if rank() else ""


class SpikeRecord:
    """Steps whose loss stands out, with the keys of their samples: RUN/loss_spikes.jsonl, a file a rank.

    Args:
        factor: a spike is a loss above `factor` times the median of the 100 steps before; None: nothing is
            recorded.
    """

    def __init__(self, run_dir: Path, factor: float | None):
        self.path, self.factor = run_dir / f"loss_spikes{of_rank()}.jsonl", factor
        self.recent: deque[float] = deque(maxlen=100)

    def see(self, step: int, loss: float, keys: Any, progress: Progress) -> None:
        """Take in a step's loss; the first 20 of a session are never spikes."""
        usual = statistics.median(self.recent) if len(self.recent) >= 20 else math.inf
        self.recent.append(loss)
        if self.factor is None or loss <= self.factor * usual:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(
                    json.dumps({"step": step, "loss": loss, "median": usual, "keys": list(keys)}) + "\n"
                )
        except OSError as error:
            progress.say(f"warning: the loss spike at step {step} could not be recorded: {error}")
            return
        progress.say(
            f"loss spike at step {step}: {loss:.4g}, {loss / usual:.1f} times the median before; its samples' keys are in {self.path}"
        )


@contextmanager
def failure_recorded(run_dir: Path) -> Iterator[None]:
    """Leave an error in RUN/error.txt, so that a sweep's failed job can be read later; the next session
    removes it.

    Of several ranks' errors the first stays: the others' are that their peer has gone.
    """
    import traceback

    record = run_dir / "error.txt"
    if os.environ.get("RANK", "0") == "0":
        record.unlink(missing_ok=True)
    try:
        yield
    except Exception:
        try:
            with open(record, "x", encoding="utf-8") as file:
                file.write(traceback.format_exc())
        except OSError:
            pass
        raise
