"""Write a trained model for other libraries: open_clip, sentence-transformers, or plain safetensors.

    clipkit-export checkpoint=runs/quickstart/default
    clipkit-export checkpoint=runs/quickstart/default to=sentence_transformers output=encoder
    clipkit-export 'merge=[runs/pretrained,runs/tuned]' 'alpha=[0,0.25,0.5,0.75,1]'   # scores along the line (WiSE-FT)
    clipkit-export 'merge=[runs/pretrained,runs/tuned]' alpha=0.5                     # the model there
    clipkit-export 'merge=[runs/seed0,runs/seed1,runs/seed2]'                         # the mean of several (model soup)

open_clip loads the first by `open_clip.create_model_and_transforms("local-dir:FOLDER")`,
sentence-transformers the second by `SentenceTransformer("FOLDER")`, with the features that clipkit computes.
Adapters are merged into the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from clipkit.checkpoint import find_checkpoint
from clipkit.data import Tokenizer
from clipkit.evals import evaluate as score
from clipkit.export import save_open_clip, save_sentence_transformer
from clipkit.files import write_json
from clipkit.foreign import blamed_on, checked, named_by, output_in_run, readable, shown
from clipkit.loading import load_model, model_config
from clipkit.merging import has_batch_norm, merged, on_the_line, soup
from clipkit.model import DualEncoder
from clipkit.registry import unknown
from clipkit.towers.lora import merge_lora, without_adapters
from clipkit.training.run_folder import flatten, table

TARGETS = ("open_clip", "safetensors", "sentence_transformers")


def export(config: Mapping[str, Any], run_dir: Path) -> Path:
    """Load the checkpoint, or merge several, write the folder, say how to load it; returns the folder, or the file of scores.

    Args:
        config: the settings of conf/export.yaml.
        run_dir: hydra's; nothing is written there.
    """
    target = config["to"]
    if target not in TARGETS:
        raise unknown("export target", target, TARGETS)
    runs, alpha = list(config["merge"] or []), config["alpha"]
    if bool(runs) == bool(config["checkpoint"]) or (alpha is not None and not runs):
        raise ValueError(
            "give checkpoint=RUN, or merge=[A,B,...] (and perhaps alpha): one of the two, and alpha with merge alone"
        )
    if alpha is not None and len(runs) != 2:
        raise ValueError(f"alpha lies on the line between two runs: merge names {len(runs)}")
    if isinstance(alpha, (list, tuple)):
        return score_the_line(config, runs, list(alpha))
    given = config["checkpoint"] or runs[-1]
    with blamed_on(given), named_by(given):
        path = find_checkpoint(given)
    name = f"{path.name}-{target}" if not runs else f"merged{'' if alpha is None else f'-{alpha:g}'}-{target}"
    folder = Path(config["output"] or output_in_run(path, "export", name))
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} already holds files: give output=ANOTHER, or remove them")
    if runs:
        model, tokenizer, trained = _merged(config, runs, None if alpha is None else on_the_line(alpha))
        _tell_statistics(model)
    else:
        with blamed_on(given), named_by(given):
            model, tokenizer, trained = load_model(path, trust_paths=config["trust_paths"])
        for tower in (model.image_tower, model.text_tower):
            # Other libraries know a tower without adapters.
            merge_lora(tower)
    with blamed_on(given, settings=False):
        if target == "open_clip":
            save_open_clip(model, folder, tokenizer=tokenizer)
            load = f'open_clip.create_model_and_transforms("local-dir:{folder}")'
        elif target == "sentence_transformers":
            save_sentence_transformer(model, folder, tokenizer=tokenizer, project=config["project"])
            load = f'SentenceTransformer("{folder}")'
        else:
            folder.mkdir(parents=True, exist_ok=True)
            # T5 names one embedding twice, and safetensors refuses shared memory.
            weights = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
            save_file(weights, folder / "model.safetensors")
            tokenizer.save(folder / "tokenizer.json")
            # With its settings the folder is a model, which init_from= takes.
            write_json(folder / "config.json", without_adapters(model_config(trained, pretrained=False)))
            load = f'model.load_state_dict(safetensors.torch.load_file("{folder / "model.safetensors"}"))'
    source = " + ".join(runs) if runs else path
    print(f"{source}\nwritten to {folder}; load it with\n    {load}")
    return folder


def score_the_line(config: Mapping[str, Any], runs: list[str], alphas: list[Any]) -> Path:
    """Score the model at every alpha from the first run to the second; returns the file of numbers.

    The tasks are those of eval=NAME, or the second run's own.
    """
    places = [on_the_line(alpha) for alpha in alphas]
    if not places:
        raise ValueError("alpha is empty: give numbers from 0 to 1")
    given, numbers, tasks = runs[-1], {}, config["eval"]
    with blamed_on(given), named_by(given):
        path = find_checkpoint(given)
        output = Path(config["output"] or output_in_run(path, "evaluations", "merged.json"))
    for alpha, weights in zip(alphas, places, strict=True):
        model, tokenizer, trained = _merged(config, runs, weights)
        with ExitStack() as strangers:
            if not config["eval"]:
                strangers.enter_context(blamed_on(given))
                strangers.enter_context(named_by(given, trust_paths=config["trust_paths"]))
                shape = dict[str, dict[str, Any] | None]
                tasks = checked(trained.get("eval") or {}, shape, name=f"eval in {path / 'config.json'}")
            if not tasks:
                raise ValueError(f"no task to score {given} by: give eval=NAME")
            found = flatten(score(model, tokenizer, tasks))
        if not numbers:
            _tell_statistics(model)
        numbers[f"{alpha:g}"] = found
        print(
            f"alpha {alpha:g}\n{table({readable(name): value for name, value in found.items()})}", flush=True
        )
    write_json(
        output,
        {"merge": runs, "tasks": shown(tasks), "metrics_by_alpha": numbers, "torch": torch.__version__},
    )
    print(f"written to {output}")
    return output


def _merged(
    config: Mapping[str, Any], runs: list[str], weights: list[float] | None
) -> tuple[DualEncoder, Tokenizer, dict[str, Any]]:
    if weights is None:
        return soup(runs, trust_paths=config["trust_paths"])
    return merged(runs, weights, trust_paths=config["trust_paths"])


def _tell_statistics(model: DualEncoder) -> None:
    if has_batch_norm(model):
        print(
            "BatchNorm's running statistics are averaged as the weights are, not gathered anew with the merged weights",
            flush=True,
        )


if __name__ == "__main__":
    from clipkit.command import run

    run("export")
