"""Weights of several runs averaged: by hand, tensor by tensor, and refused where the models differ."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from clipkit.checkpoint import save_checkpoint, save_frozen
from clipkit.data import create_tokenizer
from clipkit.merging import has_batch_norm, soup, wise_ft
from clipkit.model import create_model
from clipkit.towers.lora import frozen_names
from tests.recipes.runs import start

CONFIG = {
    "embed_dim": 16,
    "image_tower": {"name": "timm", "model": "test_resnet", "image_size": 32},
    "text_tower": {"name": "transformer", "width": 32, "layers": 1, "heads": 2},
}
CAPTIONS = ["a red circle", "two blue squares"]


def write(folder, seed, *, captions=CAPTIONS, image=None, text=None, **more):
    """A run of random weights, BatchNorm's statistics and temperature."""
    tokenizer = create_tokenizer({"name": "words", "context_length": 8}, captions=captions)
    config = {**CONFIG, **more}
    config["image_tower"] = {**CONFIG["image_tower"], **(image or {})}
    config["text_tower"] = {**CONFIG["text_tower"], **(text or {})}
    torch.manual_seed(seed)
    model = create_model(config, tokenizer=tokenizer)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("running_mean", "running_var", "lora_B.default.weight")):
                tensor.copy_(torch.rand_like(tensor) + 0.5)
        model.log_logit_scale.fill_(math.log(10.0 * seed))
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    still = {f"model.{name}" for name in frozen_names(model)}
    frozen = (
        save_frozen(folder / "checkpoints", {n: weights.pop(n) for n in sorted(still)}) if still else None
    )
    save_checkpoint(
        folder / "checkpoints",
        1,
        weights=weights,
        train_state={},
        config=config,
        tokenizer=tokenizer,
        frozen=frozen,
    )
    return folder, {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [write(folder / str(seed), seed, text={"freeze": seed % 2}) for seed in (1, 2, 3)]


def test_every_tensor_lies_on_the_line_between_two_runs(runs):
    """The temperature in log space, BatchNorm's statistics with the weights; the ends to the bit."""
    (first, a), (second, b), _ = runs
    for alpha in (0.0, 0.3, 1.0):
        model, _, _ = wise_ft([first, second], alpha=alpha)
        for name, found in model.state_dict().items():
            if not found.is_floating_point():
                continue
            expected = ((1 - alpha) * a[name].double() + alpha * b[name].double()).float()
            assert torch.equal(found, expected), name
        assert model.logit_scale.item() == pytest.approx(10 ** (1 - alpha) * 20**alpha, rel=1e-6)
    assert has_batch_norm(model) and not model.training


def test_a_soup_is_the_mean_of_all(runs):
    model, _, _ = soup([folder for folder, _ in runs])
    states = [state for _, state in runs]
    for name, found in model.state_dict().items():
        if found.is_floating_point():
            expected = sum(state[name].double() for state in states) / 3
            assert (found.double() - expected).abs().max() < 1e-6, name


def test_an_adapted_run_merges_with_what_it_began_from(runs, tmp_path):
    """Half-way is half the change: W + alpha / rank B A / 2."""
    (plain, base), *_ = runs
    adapted, state = write(tmp_path / "adapted", 1, text={"lora": {"rank": 2, "alpha": 2.0}})
    model, _, _ = wise_ft([plain, adapted], alpha=0.5)
    found = model.state_dict()
    assert not any("lora" in name for name in found)
    layer = "text_tower.body.transformer.resblocks.0.mlp.c_fc"
    change = state[f"{layer}.lora_B.default.weight"] @ state[f"{layer}.lora_A.default.weight"]
    own = state[f"{layer}.base_layer.weight"]
    expected = (base[f"{layer}.weight"] + own + change) / 2
    torch.testing.assert_close(found[f"{layer}.weight"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "change, listed",
    [
        ({"text": {"width": 64}}, "text_tower.width: 32 and 64"),
        ({"image": {"image_size": 64}}, "image_tower.image_size: 32 and 64"),
        ({"text": {"layers": 2}}, "text_tower.layers: 1 and 2"),
        ({"captions": [*CAPTIONS, "more"]}, "the tokenizer"),
        ({"init_logit_bias": -10.0}, "logit_bias: not there and"),
        ({"image": {"mean": [0.5, 0.5, 0.5]}}, "mean"),
    ],
)
def test_other_models_are_refused_and_what_differs_is_listed(runs, tmp_path, change, listed):
    other, _ = write(tmp_path / "other", 4, **change)
    with pytest.raises(ValueError, match=f"cannot be merged.*{listed}"):
        soup([runs[0][0], other])


def test_wrong_numbers_of_runs_and_alphas_say_what_to_give(runs):
    paths = [folder for folder, _ in runs]
    with pytest.raises(ValueError, match="between two runs, and 3 are given"):
        wise_ft(paths, alpha=0.5)
    with pytest.raises(ValueError, match="two or more"):
        soup(paths[:1])
    for alpha in (-0.1, 1.5, "half", True):
        with pytest.raises(ValueError, match="from 0 .* to 1"):
            wise_ft(paths[:2], alpha=alpha)


def export(tmp_path, *overrides, status=0):
    return start(*overrides, f"output_dir={tmp_path}/records", recipe="export.py").finished(status)


def test_the_command_writes_a_soup_and_says_what_it_did_with_statistics(runs, tmp_path):
    paths = ",".join(str(folder) for folder, _ in runs)
    output = export(tmp_path, f"merge=[{paths}]", "to=safetensors", f"output={tmp_path}/soup")
    assert "running statistics are averaged" in output
    expected = soup([folder for folder, _ in runs])[0].state_dict()
    found = load_file(tmp_path / "soup" / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize(
    "given, message",
    [
        (["to=safetensors"], "give checkpoint=RUN, or merge="),
        (["checkpoint={0}", "merge=[{0},{1}]"], "one of the two"),
        (["checkpoint={0}", "alpha=0.5"], "alpha with merge alone"),
        (["merge=[{0},{1},{2}]", "alpha=0.5"], "merge names 3"),
    ],
)
def test_the_command_takes_a_checkpoint_or_a_merge(runs, tmp_path, given, message):
    from clipkit.recipes import export as program

    config = {"to": "open_clip", "merge": None, "alpha": None, "checkpoint": None}
    for one in given:
        key, _, value = one.format(*(folder for folder, _ in runs)).partition("=")
        config[key] = (
            value[1:-1].split(",") if value.startswith("[") else float(value) if key == "alpha" else value
        )
    with pytest.raises(ValueError, match=message):
        program.export(config, tmp_path)
