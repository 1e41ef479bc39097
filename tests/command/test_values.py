"""Typos and bad values: one clear error each, before data or model are built, wherever they were written."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra

import clipkit.conf
from clipkit.command import compose
from clipkit.command.values import FREE_GROUPS, OWN_TOWERS, SETTINGS, check_values
from clipkit.data.spec import DATA_DEFAULTS
from clipkit.training.names import check_names
from tests.recipes.runs import start

CONF = Path(clipkit.conf.__path__[0])
GROUPS = ("image_tower", "text_tower", "optim", "data")
# (where, what is written, what the message says). A line of a YAML file is indented by its group.
TYPOS = {
    "steps": ("bacth_size: 64", "unknown key 'bacth_size'.*Did you mean 'batch_size'"),
    "precision": ("precison: bf16", "Did you mean 'precision'"),
    "group": ("image_towr: {model: resnet18}", "Did you mean 'image_tower'"),
    "nested": ("optim: {learning_rate: 0.1}", "optim has no 'learning_rate'"),
    "moved": ("optim: {warmup_steps: 5}", "optim has no 'warmup_steps'. It is warmup_steps"),
    "tower": ("image_tower: {modle: resnet18}", "Did you mean 'model'"),
    "text tower": ("text_tower: {widht: 64}", "Did you mean 'width'"),
    "data": ("data: {captoins: all}", "Did you mean 'captions'"),
    "augmentation": ("data: {augmentation: {flips: 0.5}}", "flip"),
    "sentences": ("data: {sentences: {triplet: x.jsonl}}", "triplets"),
    "shapes": ("data: {shapes: {trian: 10}}", "train"),
    "tokenizer": ("data: {tokenizer: {contxt_length: 9}}", "context_length"),
    "loss term": ("loss: {infonc: {}}", "infonce"),
    "loss setting": ("loss: {infonce: {wieght: 2.0}}", "weight"),
    "task": ("eval: {retrieval: {kind: retreival, shards: x}}", "retrieval"),
    "task setting": ("eval: {retrieval: {shard: x}}", "shards"),
    "logger": ("logger: {tensorbord: {}}", "tensorboard"),
    "logger setting": ("logger: {wandb: {projct: x}}", "project"),
    "optimizer setting": ("optim: {momentum: 0.9}", "momentum"),
    "capital": ("Seed: 1", "seed"),
}
VALUES = {
    "clip_grad_norm": (-1, 0, "one", True, float("nan")),
    "log_every": (0, -5, 1.5, None),
    "batch_size": (0, -8, "many", 2.5, None),
    "micro_batch_size": (0, -1),
    "steps": (0, -3, 10.5, "all"),
    "epochs": (0, -1),
    "warmup_steps": (-1, 2.5, None),
    "schedule": ("cosin", None),
    "final_lr": (-0.1, 1.5),
    "precision": ("fp8", 16, None),
    "parallel": ("dpp",),
    "seed": (-1, 1.5, "x"),
    "keep": (0, -1),
    "save_every": (-1,),
    "eval_every": (-1, 0.5),
    "max_minutes": (-5, "all"),
    "ema_decay": (1.0, -0.1),
    "loss_spike": (1, -3),
    "skip_nonfinite": (-1, True),
    "init_logit_scale": (0, -14, float("inf")),
    "max_logit_scale": (0, None),
    "embed_dim": (0, -64, 12.5),
    "num_threads": (0, -2),
    "timeout_minutes": (0, None),
    "optim.lr": (0, -1e-3, "fast", None, float("nan")),
    "optim.weight_decay": (-0.1, None),
    "optim.betas": ([0.9], [0.9, 1.0], [0.9, -0.1], 0.9),
    "optim.eps": (0, -1e-8),
    "optim.layer_decay": (0, 1.5),
    "text_tower.width": (0, -64, "wide"),
    "text_tower.layers": (0, 1.5),
    "text_tower.dropout": (1.0, -0.1),
    "image_tower.image_size": (0, -32, "big"),
    "image_tower.freeze": (-1, "some"),
    "data.num_workers": (-1, 1.5),
    "data.window": (0, -1),
    "data.augmentation.flip": (1.5, -0.5),
    "data.augmentation.crop_scale": ([0.5], [0, 1], [0.5, 2]),
    "data.prefetch": (0,),
    "data.max_bad_fraction": (1.5, -0.1),
    "data.timeout_s": (-1,),
    "data.captions": ("some",),
    "data.max_pixels": (0,),
}
CASES = [(key, value) for key, values in VALUES.items() for value in values]


def good() -> dict:
    """Composed settings of a run, without hydra."""
    compose.register_resolvers()
    compose.start_hydra()
    try:
        return compose.resolved(compose.compose("pretrain", []), "pretrain")
    finally:
        GlobalHydra.instance().clear()


@pytest.fixture(scope="module")
def settings() -> dict:
    return good()


def changed(settings: dict, key: str, value) -> dict:
    head, _, rest = key.partition(".")
    return {**settings, head: changed(settings[head], rest, value) if rest else value}


def test_good_settings_pass(settings):
    check_values(settings, "pretrain")


@pytest.mark.parametrize(("key", "value"), CASES, ids=lambda given: str(given))
def test_a_value_out_of_its_range_is_refused(key, value, settings):
    with pytest.raises(ValueError, match=rf"^{key}=.*expected"):
        check_values(changed(settings, key, value), "pretrain")


def leaves(node, prefix=""):
    for key, value in node.items():
        if (
            isinstance(value, dict)
            and value
            and f"{prefix}{key}" not in ("amend", "text_tower.config", "data.tokenizer")
        ):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_every_key_of_our_files_has_its_range_and_fits_it():
    """And no range stands for a key that is not there."""
    seen = set()
    for name in SETTINGS:
        files = [(name, "")] + [
            (f"{group}/{path.stem}", f"{group}.")
            for group in (GROUPS if name in ("pretrain", "plan") else ())
            for path in (CONF / group).glob("*.yaml")
        ]
        for file, prefix in files:
            content = yaml.safe_load((CONF / f"{file}.yaml").read_text())
            for key, value in leaves(
                {k: v for k, v in content.items() if k not in ("defaults", "hydra")}, prefix
            ):
                assert key in SETTINGS[name], (file, key)
                fits = SETTINGS[name][key].holds(value) or value == "???" or "${" in str(value)
                assert fits, (file, key, value)
                seen.add((name, key))
    # Taken by a function, in no file of ours.
    for key in ("image_tower.mean", "image_tower.std"):
        seen |= {("pretrain", key), ("plan", key)}
    groups = {"data.shapes", "data.sentences", "data.augmentation", "data.tokenizer", "profile"}
    stated = {(name, key) for name in SETTINGS for key in SETTINGS[name] if key not in groups}
    # A plan takes every key of pretrain.yaml, whose file it starts from.
    run = yaml.safe_load((CONF / "pretrain.yaml").read_text())
    assert stated - seen == {("plan", key) for key, _ in [*run.items(), *leaves(run)]} & stated


def test_the_towers_of_our_own_are_all_known_by_name():
    """The others are plugins', whose settings their registry checks."""
    for group, names in OWN_TOWERS.items():
        files = [yaml.safe_load(path.read_text()) for path in (CONF / group).glob("*.yaml")]
        assert {one["name"] for one in files if "name" in one} == set(names)


def test_every_setting_of_data_has_a_range():
    assert {f"data.{key}" for key in DATA_DEFAULTS} <= SETTINGS["pretrain"].keys()
    assert "hydra" in FREE_GROUPS and inspect.isfunction(check_values)


def users_experiment(folder: Path, line: str) -> str:
    (folder / "experiment").mkdir(parents=True)
    text = f"# @package _global_\nsteps: 5\nwarmup_steps: 1\n{line}\n"
    (folder / "experiment" / "mine.yaml").write_text(text)
    return str(folder)


@pytest.mark.parametrize("kind", TYPOS)
def test_a_typo_in_a_users_yaml_is_an_error(kind, tmp_path):
    """On a command line hydra refuses it itself; in a file of the user's own nothing did."""
    line, message = TYPOS[kind]
    compose.register_resolvers()
    compose.start_hydra(users_experiment(tmp_path, line))
    with pytest.raises(ValueError, match=message):
        config = compose.resolved(compose.compose("pretrain", ["experiment=mine"]), "pretrain")
        check_values(config, "pretrain")
        check_names(config)


@pytest.mark.parametrize("kind", ["steps", "task setting"])
def test_it_is_told_before_anything_is_drawn_or_built(kind, tmp_path):
    line, message = TYPOS[kind]
    process = start(
        "--config-dir",
        users_experiment(tmp_path / "mine", line),
        "experiment=mine",
        f"output_dir={tmp_path}/runs",
        f"data.shapes.folder={tmp_path}/shapes",
    )
    output = process.finished(1)
    assert "Traceback" not in output and re.search(message, output), output
    assert not (tmp_path / "shapes").exists() and "step 1/" not in output
