"""The export recipe, then the other library."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from clipkit.checkpoint import save_checkpoint
from clipkit.data import create_tokenizer
from clipkit.model import create_model
from clipkit.recipes import export as export_recipe
from tests.processes import ROOT, fork

CONFIG = {
    "embed_dim": 16,
    "image_tower": {"name": "timm", "model": "test_resnet", "image_size": 32},
    "text_tower": {"name": "transformer", "width": 32, "layers": 1, "heads": 2},
}
CAPTIONS = ["a red circle", "two blue squares"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    tokenizer = create_tokenizer({"name": "words", "context_length": 8}, captions=CAPTIONS)
    torch.manual_seed(0)
    model = create_model(CONFIG, tokenizer=tokenizer).eval()
    run_dir = tmp_path_factory.mktemp("run")
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    save_checkpoint(
        run_dir / "checkpoints",
        5,
        weights=weights,
        train_state={},
        config=CONFIG,
        tokenizer=tokenizer,
        metrics={},
    )
    return run_dir, model, tokenizer


def export(tmp_path, *overrides, status=0):
    return fork(
        ROOT / "recipes" / "export.py", *overrides, f"output_dir={tmp_path / 'records'}", cwd=tmp_path
    ).finished(status)


def test_open_clip_folder(tmp_path, trained):
    import open_clip

    run_dir, model, tokenizer = trained
    output = export(tmp_path, f"checkpoint={run_dir}")
    folder = run_dir / "export" / "step_00000005-open_clip"
    assert f"local-dir:{folder}" in output
    peer, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    with torch.no_grad():
        text = tokenizer(CAPTIONS)
        torch.testing.assert_close(
            peer.eval().encode_text(text, normalize=True), model.encode_text(text), atol=1e-6, rtol=0
        )


def test_a_wrong_target_points_to_the_right_one(tmp_path, trained):
    wrong = export(tmp_path, f"checkpoint={trained[0]}", "to=openclip", status=1)
    assert "Did you mean 'open_clip'" in wrong


def called(trained, to, output):
    """The recipe's function in this process, with the config file's other values."""
    return export_recipe.export(
        OmegaConf.create(
            {
                "checkpoint": str(trained[0]),
                "to": to,
                "output": str(output),
                "project": True,
                "trust_paths": False,
                "merge": None,
                "alpha": None,
            }
        ),
        output,
    )


def test_safetensors_folder_is_never_overwritten(tmp_path, trained):
    from safetensors.torch import load_file

    folder = called(trained, "safetensors", tmp_path / "out")
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in trained[1].state_dict().items())
    with pytest.raises(ValueError, match="already holds files"):
        called(trained, "safetensors", tmp_path / "out")


def test_sentence_transformers_folder(tmp_path, trained):
    from sentence_transformers import SentenceTransformer

    _, model, tokenizer = trained
    called(trained, "sentence_transformers", tmp_path / "out")
    theirs = torch.from_numpy(SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(CAPTIONS))
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(tokenizer(CAPTIONS)), theirs, atol=1e-6, rtol=0)
