"""The registry of evaluation tasks and `evaluate`, which runs the ones a config names.

A task is a class: its constructor's keyword arguments are the settings, checked before anything is encoded,
and calling it with an Encoder gives {metric: value}. Its attribute `metrics` names them beforehand (None or no such
attribute: unknown), so that a wrong `best_metric=` is an error before training; `skipped` comes beside them where items
were left out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from clipkit.distributed import resolve_group
from clipkit.evals.checks import TaskRecord
from clipkit.evals.encoder import Encoder
from clipkit.registry import Registry, check_keys, unknown

Task = Callable[[Encoder], dict[str, float]]

_TASKS = Registry("evaluation task")
register_task = _TASKS.register
list_tasks = _TASKS.names


def create_tasks(tasks: Mapping[str, Mapping[str, Any] | None]) -> dict[str, Task]:
    """Build every task from its spec, so that a wrong setting or a missing file is an error before training
    starts.

    Args:
        tasks: {name: {"kind": registered name, settings...}}; a spec of None is left out.

    Raises:
        ValueError: names the task and what is wrong with it.
    """
    built = {}
    for name, spec in check_tasks(tasks).items():
        try:
            built[name] = _TASKS.get(spec["kind"])(**{key: spec[key] for key in spec if key != "kind"})
        except (ValueError, OSError) as error:
            raise ValueError(f"evaluation {name!r}: {error}") from error
    return built


def check_tasks(tasks: Mapping[str, Mapping[str, Any] | None]) -> dict[str, Mapping[str, Any]]:
    """The specs without those of None; ValueError for an unknown kind or setting. No file is looked at."""
    checked = {}
    for name, spec in tasks.items():
        if spec is None:
            continue
        if not isinstance(spec, Mapping) or "kind" not in spec:
            raise ValueError(
                f"evaluation {name!r} needs a `kind` (one of {', '.join(list_tasks())}); got {spec!r}"
            )
        parameters = inspect.signature(_TASKS.get(spec["kind"])).parameters
        settings = [key for key in spec if key != "kind"]
        check_keys(settings, parameters, f"evaluation {name!r} ({spec['kind']})")
        missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in settings]
        if missing:
            raise ValueError(f"evaluation {name!r} ({spec['kind']}) needs {', '.join(missing)}")
        checked[name] = spec
    return checked


def check_metric(name: str, built: Mapping[str, Task], what: str) -> None:
    """ValueError unless some task reports "task/metric" `name`, as far as tasks say what they report."""
    task, _, metric = name.partition("/")
    known = {one: getattr(built[one], "metrics", None) for one in built}
    if task not in built:
        raise unknown(f"task of {what}", name, [f"{one}/{m}" for one in built for m in known[one] or ["..."]])
    names = known[task]
    if names is not None and metric not in names:
        raise unknown(what, name, [f"{task}/{one}" for one in names])


def evaluate(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Any],
    tasks: Mapping[str, Mapping[str, Any] | None],
    *,
    device: str | torch.device = "cpu",
    batch_size: int = 64,
    group: ProcessGroup | str | None = None,
    records: dict[str, TaskRecord] | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, dict[str, float]]:
    """Run evaluation tasks on a model; a data set used by several tasks is encoded once.

    The model is put in evaluation mode and back. No random number of the global generators is drawn.

    Args:
        model, tokenizer: as clipkit.evals.encoder.Encoder takes them.
        tasks: as create_tasks takes them: what `cfg.eval` is.
        batch_size: images or texts a forward pass.
        group: ranks that share the work ("auto": the default group, when there is one); every rank must call
            this and every rank gets the same numbers. None: this process alone.
        records: is filled with what each task rests on: its data, and what the checks before scoring found.
        progress: is given lines that say how far it has come, on rank 0.

    Returns:
        {task: {metric: value}}.
    """
    options: dict[str, Any] = {"device": device, "batch_size": batch_size, "group": group}
    return run_tasks(model, tokenizer, create_tasks(tasks), **options, records=records, progress=progress)


def run_tasks(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Any],
    built: Mapping[str, Task],
    *,
    device: str | torch.device = "cpu",
    batch_size: int = 64,
    group: ProcessGroup | str | None = None,
    records: dict[str, TaskRecord] | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, dict[str, float]]:
    """`evaluate` of tasks that `create_tasks` has made."""
    if group is not None:
        group = resolve_group(group)
    encoder = Encoder(model, tokenizer, device=device, batch_size=batch_size, group=group, progress=progress)
    training = bool(getattr(model, "training", False))
    if training:
        model.eval()
    try:
        results = {}
        for number, (name, task) in enumerate(built.items(), 1):
            encoder.record = TaskRecord()
            encoder.tell(f"{name}, task {number} of {len(built)}")
            results[name] = task(encoder)
            if records is not None:
                records[name] = encoder.record
            stated = getattr(task, "metrics", None)
            if stated is not None and (unnamed := results[name].keys() - {*stated, "skipped"}):
                raise RuntimeError(
                    f"the task {name!r} reports {min(unnamed)}, which its `metrics` does not name"
                )
        return results
    finally:
        if training:
            model.train()
