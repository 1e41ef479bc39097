"""Score a model: retrieval, zero-shot classification and the rest, by the code that training uses.

    clipkit-evaluate checkpoint=runs/quickstart/default                    # the run's own tasks, its newest checkpoint
    clipkit-evaluate checkpoint=runs/quickstart/default eval=flickr8k_mini
    clipkit-evaluate checkpoint=runs/quickstart/default/checkpoints/step_00000600 output=numbers.json
    clipkit-evaluate "checkpoint='open_clip:RN50=openai'" eval=flickr8k_mini   # ARCHITECTURE=FILE_OR_TAG
    clipkit-evaluate checkpoint=sentence_transformers:FOLDER eval=sts

The table is printed, and every number written to a JSON file with the settings it was computed by.

A checkpoint may come from anybody: its own tasks read files below the present folder or in the folder given alone,
and run and fetch nothing; trust_paths=true lets those of a run that you made name local files anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from clipkit.checkpoint import find_checkpoint
from clipkit.evals import evaluate as score
from clipkit.evals.models import load_any, other_library
from clipkit.files import write_json
from clipkit.foreign import blamed_on, checked, named_by, output_in_run, readable, shown
from clipkit.loading import load_model
from clipkit.training.process import choose_device
from clipkit.training.run_folder import flatten, table


def evaluate(config: Mapping[str, Any], run_dir: Path) -> dict[str, float]:
    """Score the model, print the table, write the numbers with what they were computed from.

    Args:
        config: the settings of conf/evaluate.yaml.
        run_dir: hydra's; nothing is written there.

    Returns:
        {"task/metric": value}.
    """
    device, source, tasks = choose_device(config["device"]), config["checkpoint"], config["eval"]
    with ExitStack() as strangers:
        if other_library(source):
            path, own = None, {}
            model, tokenizer = load_any(source, device=device)
        else:
            strangers.enter_context(blamed_on(source))
            strangers.enter_context(named_by(source, trust_paths=config["trust_paths"]))
            path = find_checkpoint(source)
            model, tokenizer, trained = load_model(path, device=device)
            shape = dict[str, dict[str, Any] | None]
            own = checked(trained.get("eval") or {}, shape, name=f"eval in {path / 'config.json'}")
        if path and tasks:
            # They are the user's own; the model still is a stranger's.
            strangers.close()
            strangers.enter_context(blamed_on(source, settings=False))
        tasks = tasks or own
        if not tasks:
            raise ValueError(f"no task to score {path or source} by: give eval=NAME")
        output = Path(config["output"] or _default_output(config, path, tasks))
        metrics = flatten(score(model, tokenizer, tasks, device=device, batch_size=config["batch_size"]))
    source = str(path or source)
    write_json(
        output,
        {"checkpoint": source, "tasks": shown(tasks), "metrics": metrics, "torch": torch.__version__},
    )
    print(
        f"{source}\n{table({readable(name): value for name, value in metrics.items()})}\nwritten to {output}"
    )
    return metrics


def _default_output(config: Mapping[str, Any], checkpoint: Path | None, tasks: Mapping[str, Any]) -> Path:
    """RUN/evaluations/STEP-TASKS.json; tasks may be called anything, also ../x."""
    parts = (checkpoint.name if checkpoint else config["checkpoint"], "-".join(tasks))
    name = "-".join(re.sub(r"[^\w.\-]+", "-", part, flags=re.ASCII)[:100] for part in parts) + ".json"
    if checkpoint:
        return output_in_run(checkpoint, "evaluations", name)
    return Path(config["output_dir"]) / "evaluations" / name


if __name__ == "__main__":
    from clipkit.command import run

    run("evaluate")
