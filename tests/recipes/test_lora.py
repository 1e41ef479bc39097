"""Runs with adapters: what their checkpoints hold, going on, ranks, and exports with the adapters merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clipkit.checkpoint import latest_checkpoint, verify
from clipkit.loading import load_model
from clipkit.model import create_model
from clipkit.sources import open_source
from clipkit.towers.lora import is_adapted
from tests.recipes.runs import SMALL, lines, only_run, run, run_ranks, weights

pytest.importorskip("peft")
STEPS = 6
TOWERS = [
    "image_tower=clip_vit_b32",
    "image_tower.image_size=32",
    "image_tower.patch_size=8",
    "image_tower.width=64",
    "image_tower.layers=2",
    "image_tower.heads=2",
    "text_tower.dropout=0.0",
    "text_tower.layers=2",
    "text_tower.pooling=eot",
]
EXACT = ["optim.eps=1e-5", "schedule=constant", f"steps={STEPS}", "eval=none", "logger=none"]
LORA = ["image_tower.lora.rank=4", "image_tower.lora.alpha=8", "text_tower.lora.rank=4"]


@pytest.fixture(scope="module")
def settings(shapes) -> list[str]:
    return [*SMALL, *TOWERS, *EXACT, shapes, "ema_decay=0.9", "save_every=3"]


@pytest.fixture(scope="module")
def adapted(settings, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapted")
    run(*settings, *LORA, f"output_dir={folder}")
    return only_run(folder)


def test_a_checkpoint_holds_the_adapters_and_what_else_is_trained(adapted):
    """The towers' own weights once beside all checkpoints, and in the model that is loaded from one."""
    path = latest_checkpoint(adapted / "checkpoints")
    held = load_file(path / "model.safetensors")
    trained = {name for name in held if name.startswith("model.")}
    others = {"model.text_projection.weight", "model.log_logit_scale"}
    assert {name for name in trained if ".lora_" not in name} == others
    assert {name for name in held if name.startswith("average.")} == {
        f"average.{name[6:]}" for name in trained
    }
    (frozen,) = (adapted / "checkpoints").glob("frozen-*.safetensors")
    assert len(list((adapted / "checkpoints").glob("step_*"))) == 2
    assert frozen.stat().st_mode == (path / "config.json").stat().st_mode
    model, _, _ = load_model(adapted)
    assert {*model.state_dict()} == {name[6:] for name in {*load_file(frozen), *trained}}
    # Two numbers of AdamW and a count for each that is trained, and none for another.
    states = load_file(path / "optimizer.safetensors")
    assert len(states) == 3 * len(trained)
    small = sum((path / name).stat().st_size for name in ("model.safetensors", "optimizer.safetensors"))
    parameters = sum(one.numel() for one in model.parameters())
    # Whole, they would be 4 bytes for each weight and its average, and 8 for AdamW's.
    assert small < 0.4 * 16 * parameters


def test_a_damaged_or_lost_file_of_frozen_weights_is_found(adapted, tmp_path):
    path = latest_checkpoint(adapted / "checkpoints")
    (frozen,) = (adapted / "checkpoints").glob("frozen-*.safetensors")
    content = frozen.read_bytes()
    try:
        frozen.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert "does not have the content" in verify(path)
        frozen.unlink()
        assert "is missing beside it" in verify(path)
        with pytest.raises(ValueError, match="missing"):
            load_model(path)
    finally:
        frozen.write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    told = (path / "manifest.json").read_text()
    try:
        (path / "manifest.json").write_text(json.dumps({**manifest, "frozen": {"../../x.safetensors": "0"}}))
        assert "clipkit did not write" in verify(path)
    finally:
        (path / "manifest.json").write_text(told)


def test_an_export_has_the_adapters_merged(adapted, tmp_path):
    """open_clip's own class makes the features of the adapted model."""
    open_clip = pytest.importorskip("open_clip")
    model, tokenizer, _ = load_model(adapted)
    assert is_adapted(model)
    run(f"checkpoint={adapted}", "to=open_clip", f"output={tmp_path}/out", recipe="export.py")
    peer = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}/out")[0].eval()
    image = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    text = tokenizer(["a red star", "two blue squares", "a circle"])
    with torch.no_grad():
        ours = model.encode_image(image), model.encode_text(text)
        theirs = (
            peer.encode_image(model.normalize_image(image), normalize=True),
            peer.encode_text(text, normalize=True),
        )
    for a, b in zip(ours, theirs):
        assert (a - b).abs().max() < 1e-6


def test_a_run_with_adapters_is_a_source_and_its_export_a_model(adapted, tmp_path):
    """What both give is the model with its adapters merged, and plain towers."""
    model, tokenizer, _ = load_model(adapted)
    text = tokenizer(["a red circle", "two squares"])
    expected = model.encode_text(text)
    source = open_source(str(adapted))
    assert not any("lora" in name or "base_layer" in name for name in source.weights)
    again = create_model(source.settings, tokenizer=tokenizer)
    again.load_state_dict(source.weights)
    run(f"checkpoint={adapted}", "to=safetensors", f"output={tmp_path}/x", recipe="export.py")
    exported, _, _ = load_model(tmp_path / "x")
    for one in (again.eval(), exported):
        assert not is_adapted(one.text_tower) and not is_adapted(one.image_tower)
        torch.testing.assert_close(one.encode_text(text), expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_run_goes_on_to_the_bit(adapted, settings, tmp_path):
    run(*settings, *LORA, f"output_dir={tmp_path}", "max_minutes=0", status=75)
    run(*settings, *LORA, f"output_dir={tmp_path}")
    expected = weights(adapted)
    found = weights(only_run(tmp_path))
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        ["parallel=ddp"],
        ["parallel=ddp", "micro_batch_size=5"],
        ["parallel=fsdp"],
        ["parallel=fsdp", "micro_batch_size=5"],
        ["parallel=fsdp", "image_tower.activation_checkpointing=true"],
    ],
)
def test_ranks_and_micro_batches_leave_the_weights_of_one_process(adapted, settings, tmp_path, how):
    run_ranks(*settings, *LORA, *how, f"output_dir={tmp_path}")
    found = only_run(tmp_path)
    for ours, theirs in zip(lines(found), lines(adapted), strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-5)
        assert ours["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=1e-4)
    expected = weights(adapted)
    for name, tensor in weights(found).items():
        assert (tensor - expected[name]).abs().max() < 1e-5, name
    # What one rank count wrote, another goes on with.
    assert load_model(found)[0].training is False
