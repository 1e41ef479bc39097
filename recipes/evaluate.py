"""Score a model: retrieval, zero-shot classification and the rest, by the code that training uses.

    clipkit-evaluate checkpoint=runs/quickstart/default                    # the run's own tasks, its newest checkpoint
    clipkit-evaluate checkpoint=runs/quickstart/default eval=flickr8k_mini
    clipkit-evaluate checkpoint=runs/quickstart/default/checkpoints/step_00000600 output=numbers.json
    clipkit-evaluate "checkpoint='open_clip:RN50=openai'" eval=flickr8k_mini   # ARCHITECTURE=FILE_OR_TAG
    clipkit-evaluate checkpoint=sentence_transformers:FOLDER eval=sts

The table is printed, and every number written to a JSON file with the settings it was computed by.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from clipkit.checkpoint import find_checkpoint, load_model
from clipkit.evals import evaluate as score
from clipkit.evals.models import load_any
from clipkit.files import write_json
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
    device = choose_device(config["device"])
    source, tasks = config["checkpoint"], config["eval"]
    if source.partition(":")[0] in ("open_clip", "sentence_transformers"):
        model, tokenizer = load_any(source, device=device)
        default_output = Path(config["output_dir"]) / "evaluations" / re.sub(r"[^\w.\-]+", "-", source)
    else:
        path = find_checkpoint(source)
        model, tokenizer, trained = load_model(path, device=device)
        tasks, source = tasks or trained["eval"], str(path)
        default_output = path.parent.parent / "evaluations" / path.name
    if not tasks:
        raise ValueError(f"no task to score {source} by: give eval=NAME")
    metrics = flatten(score(model, tokenizer, tasks, device=device, batch_size=config["batch_size"]))
    output = Path(config["output"] or f"{default_output}-{'-'.join(tasks)}.json")
    write_json(output, {"checkpoint": source, "tasks": tasks, "metrics": metrics, "torch": torch.__version__})
    print(f"{source}\n{table(metrics)}\nwritten to {output}")
    return metrics


if __name__ == "__main__":
    from clipkit.command import run

    run("evaluate")
