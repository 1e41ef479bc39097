"""Write a trained model for other libraries: open_clip, sentence-transformers, or plain safetensors.

    clipkit-export checkpoint=runs/quickstart/default
    clipkit-export checkpoint=runs/quickstart/default to=sentence_transformers output=encoder

open_clip loads the first by `open_clip.create_model_and_transforms("local-dir:FOLDER")`,
sentence-transformers the second by `SentenceTransformer("FOLDER")`, with the features that clipkit computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from clipkit.checkpoint import find_checkpoint
from clipkit.export import save_open_clip, save_sentence_transformer
from clipkit.foreign import blamed_on, named_by, output_in_run
from clipkit.loading import load_model
from clipkit.registry import unknown
from clipkit.towers.lora import merge_lora

TARGETS = ("open_clip", "safetensors", "sentence_transformers")


def export(config: Mapping[str, Any], run_dir: Path) -> Path:
    """Load the checkpoint, write the folder, say how to load it; returns the folder.

    Args:
        config: the settings of conf/export.yaml.
        run_dir: hydra's; nothing is written there.
    """
    target = config["to"]
    if target not in TARGETS:
        raise unknown("export target", target, TARGETS)
    given = config["checkpoint"]
    with blamed_on(given), named_by(given):
        path = find_checkpoint(given)
    folder = Path(config["output"] or output_in_run(path, "export", f"{path.name}-{target}"))
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} already holds files: give output=ANOTHER, or remove them")
    with blamed_on(given), named_by(given):
        model, tokenizer, _ = load_model(path, trust_paths=config["trust_paths"])
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
            load = f'model.load_state_dict(safetensors.torch.load_file("{folder / "model.safetensors"}"))'
    print(f"{path}\nwritten to {folder}; load it with\n    {load}")
    return folder


if __name__ == "__main__":
    from clipkit.command import run

    run("export")
