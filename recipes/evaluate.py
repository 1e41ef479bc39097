"""Score a model: retrieval, zero-shot classification and the rest, by the code that training uses.

    clipkit-evaluate checkpoint=runs/quickstart/default                    # the run's own tasks, its newest checkpoint
    clipkit-evaluate checkpoint=runs/quickstart/default eval=flickr8k_mini
    clipkit-evaluate checkpoint=runs/quickstart/default/checkpoints/step_00000600 output=numbers.json
"""

from __future__ import annotations

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
    """Load what `checkpoint` names, run the tasks, print the table and write the JSON; returns {"task/metric": value}."""
    import torch
    from omegaconf import OmegaConf

    from clipkit.checkpoint import find_checkpoint, load_model, write_json
    from clipkit.evals import create_tasks, evaluate
    from clipkit.recipes.pretrain import choose_device

    config = OmegaConf.to_container(cfg, resolve=True)
    path = find_checkpoint(config["checkpoint"])
    device = choose_device(config["device"])
    model, tokenizer, trained = load_model(path, device=device)
    tasks = config["eval"] or trained["eval"]
    if not tasks:
        raise ValueError(f"neither eval= nor the run of {path} names a task; give eval=NAME")
    create_tasks(tasks)
    results = evaluate(model, tokenizer, tasks, device=device, batch_size=config["batch_size"])
    metrics = run_folder.flatten(results)
    output = Path(config["output"]) if config["output"] else path.parent.parent / "evaluations" / f"{path.name}-{'-'.join(tasks)}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, {"checkpoint": str(path), "tasks": tasks, "metrics": metrics, "torch": torch.__version__})
    print(f"{path}\n{run_folder.table(metrics)}\nwritten to {output}")
    return metrics


if __name__ == "__main__":
    main()
