"""Write a trained model for other libraries: open_clip, sentence-transformers, or plain safetensors.

    python recipes/export.py checkpoint=runs/quickstart/default
    python recipes/export.py checkpoint=runs/quickstart/default to=sentence_transformers output=encoder

open_clip loads the first by `open_clip.create_model_and_transforms("local-dir:FOLDER")`,
sentence-transformers the second by `SentenceTransformer("FOLDER")`, with the features that clipkit computes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from clipkit.recipes.cli import run
from clipkit.registry import unknown

if TYPE_CHECKING:
    from omegaconf import DictConfig

TARGETS = ("open_clip", "safetensors", "sentence_transformers")


def main() -> None:
    """The console command."""
    run(export, "export")


def export(cfg: DictConfig, run_dir: Path) -> Path:
    """Load the checkpoint, write the folder, say how to load it; returns the folder."""
    if cfg.to not in TARGETS:
        raise unknown("export target", cfg.to, TARGETS)
    from clipkit.checkpoint import find_checkpoint, load_model

    path = find_checkpoint(cfg.checkpoint)
    folder = Path(cfg.output) if cfg.output else path.parent.parent / "export" / f"{path.name}-{cfg.to}"
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} already holds files: give output=ANOTHER, or remove them")
    model, tokenizer, _ = load_model(path)
    if cfg.to == "open_clip":
        from clipkit.export import save_open_clip

        save_open_clip(model, folder, tokenizer=tokenizer)
        load = f'open_clip.create_model_and_transforms("local-dir:{folder}")'
    elif cfg.to == "sentence_transformers":
        from clipkit.export import save_sentence_transformer

        save_sentence_transformer(model, folder, tokenizer=tokenizer, project=cfg.project)
        load = f'SentenceTransformer("{folder}")'
    else:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        # T5 names one embedding twice, and safetensors refuses shared memory.
        weights = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
        save_file(weights, folder / "model.safetensors")
        tokenizer.save(folder / "tokenizer.json")
        load = f'model.load_state_dict(safetensors.torch.load_file("{folder / "model.safetensors"}"))'
    print(f"{path}\nwritten to {folder}; load it with\n    {load}")
    return folder


if __name__ == "__main__":
    main()
