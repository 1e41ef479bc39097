"""Score a model: retrieval, zero-shot classification and the rest, by the code that training uses.

    clipkit-evaluate checkpoint=runs/quickstart/default                    # the run's own tasks, its newest checkpoint
    clipkit-evaluate checkpoint=runs/quickstart/default eval=flickr8k_mini
    clipkit-evaluate checkpoint=runs/quickstart/default/checkpoints/step_00000600 output=numbers.json
    clipkit-evaluate "checkpoint='open_clip:RN50=openai'" eval=flickr8k_mini   # ARCHITECTURE=FILE_OR_TAG
    clipkit-evaluate checkpoint=exported/model eval=flickr8k_mini        # what clipkit-export wrote
    clipkit-evaluate checkpoint=sentence_transformers:FOLDER eval=sts
    torchrun --nproc-per-node=4 -m clipkit.recipes.evaluate checkpoint=runs/quickstart/default   # the work shared

The table is printed, and every number written to a JSON file with the settings and the data it was computed by:
date, versions, how many items, their digest, 95 % intervals, chance levels, and what the checks before scoring found. Lines on standard error say how
far it has come.

A checkpoint may come from anybody: its own tasks read files below the present folder or in the folder given alone,
and run and fetch nothing; trust_paths=true lets those of a run that you made name local files anywhere.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from clipkit.checkpoint import find_checkpoint
from clipkit.evals import create_tasks
from clipkit.evals.checks import TaskRecord, about_numbers
from clipkit.evals.models import load_any, other_library
from clipkit.evals.tasks import run_tasks
from clipkit.files import write_json
from clipkit.foreign import blamed_on, checked, named_by, output_in_run, read_json, readable, shown
from clipkit.loading import load_model
from clipkit.training.process import choose_device, process_group
from clipkit.training.run_folder import flatten, versions


def evaluate(config: Mapping[str, Any], run_dir: Path) -> dict[str, float]:
    """Score the model, print the table, write the numbers with what they were computed from.

    The tasks are made before the model is loaded: a wrong setting costs no time. With several ranks (torchrun) each
    encodes its share, and rank 0 speaks and writes.

    Args:
        config: the settings of conf/evaluate.yaml.
        run_dir: hydra's; nothing is written there.

    Returns:
        {"task/metric": value}.
    """
    device = choose_device(config["device"])
    with process_group(device, timeout_minutes=60) as (rank, world):
        return _evaluate(config, device, rank, world)


def _evaluate(config: Mapping[str, Any], device: torch.device, rank: int, world: int) -> dict[str, float]:
    source, given = config["checkpoint"], config["eval"]

    @contextmanager
    def theirs() -> Iterator[None]:
        """What a run folder says is a stranger's word; other libraries' names are the user's own."""
        if other_library(source):
            yield
        else:
            with blamed_on(source), named_by(source, trust_paths=config["trust_paths"]):
                yield

    path, own = None, {}
    with theirs():
        if not other_library(source):
            path = find_checkpoint(source)
            shape = dict[str, dict[str, Any] | None]
            own = read_json(path / "config.json").get("eval") or {}
            own = checked(own, shape, name=f"eval in {path / 'config.json'}")
    tasks = given or own
    if not tasks:
        raise ValueError(f"no task to score {path or source} by: give eval=NAME")
    # Tasks that the user gives are his own; the model still is a stranger's.
    with nullcontext() if given else theirs():
        built = create_tasks(tasks)
    # A folder that must not be written to is an error now, too.
    _output(config, path, tasks, "")
    with theirs():
        model, tokenizer = load_model(path, device=device)[:2] if path else load_any(source, device=device)
    records: dict[str, TaskRecord] = {}
    began = time.monotonic()

    def tell(line: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {readable(line)}", file=sys.stderr, flush=True)

    with blamed_on(source, settings=False) if given and path else theirs():
        options: dict[str, Any] = {"device": device, "batch_size": config["batch_size"], "group": "auto"}
        results = run_tasks(model, tokenizer, built, **options, records=records, progress=tell)
    metrics = flatten(results)
    if rank == 0:
        numbers = {
            "checkpoint": str(path or source),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": versions(),
            "ranks": world,
            "batch_size": config["batch_size"],
            "tasks": shown(tasks),
            "metrics": metrics,
            **about_numbers(results, records),
        }
        identity = [str(path or source), tasks, [record.data for record in records.values()]]
        output = _output(config, path, tasks, sha256(repr(identity).encode()).hexdigest()[:8])
        write_json(output, numbers)
        print(f"{path or source}\n{_table(numbers['scores'])}\nwritten to {output}")
    return metrics


def _table(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """A line a metric: its value, the 95 % interval over the items, what guessing has, the items, and the tied."""
    lines = [f"{'':<44}{'value':>10}{'95 % interval':>24}{'chance':>10}{'items':>18}"]
    for name, one in scores.items():
        bounds = "[{:.4g}, {:.4g}]".format(*one["interval"]) if one["interval"] else "-"
        chance = "-" if one["chance"] is None else f"{one['chance']:.4g}"
        items = "-" if one["n"] is None else str(one["n"])
        items += f", {one['tied']} tied" if one["tied"] else ""
        lines.append(f"  {readable(name):<42}{one['value']:>10.4g}{bounds:>24}{chance:>10}{items:>18}")
    return "\n".join(lines)


def _output(
    config: Mapping[str, Any], checkpoint: Path | None, tasks: Mapping[str, Any], digest: str
) -> Path:
    """RUN/evaluations/STEP-TASKS-DIGEST.json: other settings or other data are another file.

    Tasks may be called anything, also ../x.
    """
    if config["output"]:
        return Path(config["output"])
    parts = (checkpoint.name if checkpoint else config["checkpoint"], "-".join(tasks))
    name = "-".join(re.sub(r"[^\w.\-]+", "-", part, flags=re.ASCII)[:100] for part in parts)
    if checkpoint:
        return output_in_run(checkpoint, "evaluations", f"{name}-{digest}.json")
    return Path(config["output_dir"]) / "evaluations" / f"{name}-{digest}.json"


if __name__ == "__main__":
    from clipkit.command import run

    run("evaluate")
