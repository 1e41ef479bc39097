"""Score a model: retrieval, zero-shot classification and the rest, by the code that training uses.

clipkit-evaluate checkpoint=runs/quickstart/default                    # the run's own tasks, its newest checkpoint
clipkit-evaluate checkpoint=runs/quickstart/default eval=flickr8k_mini
clipkit-evaluate checkpoint=runs/quickstart/default/checkpoints/step_00000600 output=numbers.json
clipkit-evaluate checkpoint=open_clip:RN50 eval=flickr8k_mini          # or open_clip:ARCHITECTURE=FILE_OR_TAG
clipkit-evaluate checkpoint=sentence_transformers:FOLDER eval=sts
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from clipkit.recipes import run_folder
from clipkit.recipes.cli import run

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main() -> None:
    """The console command."""
    run(evaluate_checkpoint, "evaluate")


def evaluate_checkpoint(cfg: DictConfig, run_dir: Path) -> dict[str, float]:
    """Load what `checkpoint` names, run the tasks, print the table and write the JSON; returns
    {"task/metric": value}.
    """
    import torch
    from omegaconf import OmegaConf

    from clipkit.checkpoint import find_checkpoint, load_model, write_json
    from clipkit.evals import evaluate
    from clipkit.evals.models import load_any
    from clipkit.recipes.session import choose_device

    config = OmegaConf.to_container(cfg, resolve=True)
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
    results = evaluate(model, tokenizer, tasks, device=device, batch_size=config["batch_size"])
    metrics = run_folder.flatten(results)
    output = Path(config["output"] or f"{default_output}-{'-'.join(tasks)}.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, {"checkpoint": source, "tasks": tasks, "metrics": metrics, "torch": torch.__version__})
    print(f"{source}\n{run_folder.table(metrics)}\nwritten to {output}")
    return metrics


if __name__ == "__main__":
    main()
