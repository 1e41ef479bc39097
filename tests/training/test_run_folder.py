"""A run's folder that is damaged, or belongs to another run: said before a step is taken, and nothing is silently new."""

from __future__ import annotations

import json
import os
import re

import pytest
import yaml

from clipkit.command.compose import resolved
from clipkit.command.values import SETTINGS
from clipkit.settings import EXECUTION, LENGTH, LOCATION
from clipkit.training import run_folder
from tests.damage import DAMAGE
from tests.fuzz_runs import SETTINGS as CONFIG
from tests.test_conf import composed


def begun(tmp_path, **changes):
    folder = tmp_path / "run"
    folder.mkdir()
    assert run_folder.open_run(folder, {**CONFIG, **changes}) is None
    return folder


@pytest.mark.parametrize("kind", sorted(set(DAMAGE) - {"one_bit", "twice", "missing"}))
def test_a_damaged_record_of_the_settings_never_lets_another_run_in(kind, tmp_path, capsys):
    folder = begun(tmp_path)
    other = {**CONFIG, "optim": {"lr": 9.0, "weight_decay": 0.0}}
    DAMAGE[kind](folder / "config.yaml")
    with pytest.raises(ValueError, match=r"config\.yaml.*give name=ANOTHER"):
        run_folder.open_run(folder, CONFIG)
    # A checkpoint knows them, too.
    checkpoint = folder / "checkpoints" / "step_00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text(json.dumps(CONFIG))
    assert run_folder.open_run(folder, CONFIG) is None
    assert "config.yaml" in capsys.readouterr().err
    with pytest.raises(ValueError, match="holds a run of other settings .*optim.lr: 0.1 -> 9.0"):
        run_folder.open_run(folder, other)


def test_a_record_that_lacks_most_settings_is_damaged(tmp_path):
    folder = begun(tmp_path)
    (folder / "config.yaml").write_text("seed: 0\nbatch_size: 8\n")
    with pytest.raises(ValueError, match=r"config\.yaml has no data"):
        run_folder.open_run(folder, CONFIG)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_summary_counts_as_unfinished(kind, tmp_path, capsys):
    folder = begun(tmp_path)
    run_folder.write_summary(folder, finished=True, step=3, metrics={"a/b": 0.5})
    assert run_folder.open_run(folder, CONFIG)["metrics"] == {"a/b": 0.5}
    DAMAGE[kind](folder / "summary.json")
    if kind == "one_bit":
        return
    assert run_folder.open_run(folder, CONFIG) is None
    if kind != "missing":
        assert "summary.json" in capsys.readouterr().err


def changed(settings: dict, key: str, value) -> dict:
    head, _, rest = key.partition(".")
    return {**settings, head: changed(settings.get(head, {}), rest, value) if rest else value}


@pytest.mark.parametrize("key", [*EXECUTION, *LOCATION])
def test_a_run_goes_on_with_another_way_of_carrying_it_out(key, tmp_path, capsys):
    data = {"train": "x", "shapes": {"folder": "y"}, "sentences": {"triplets": None, "pairs": None}}
    settings = {**CONFIG, "data": data, "eval": {}}
    folder = tmp_path / "run"
    folder.mkdir()
    assert run_folder.open_run(folder, settings) is None
    value = True if key == "resume" else None if key == "amend" else "https://u:s3cret@elsewhere/x.tar"
    assert run_folder.open_run(folder, changed(settings, key, value)) is None
    out = capsys.readouterr().out
    assert ("goes on with" in out) == (key in LOCATION) and "s3cret" not in out
    with pytest.raises(ValueError, match="other settings"):
        run_folder.open_run(folder, changed(changed(settings, key, value), "optim.lr", 0.2))


def test_every_other_setting_makes_another_run(tmp_path):
    """Whatever pretrain.yaml and its groups hold, a key at a time."""
    settings = resolved(composed(), "pretrain")
    folder = tmp_path / "run"
    folder.mkdir()
    assert run_folder.open_run(folder, settings) is None
    may_differ = {*EXECUTION, *LOCATION, *LENGTH, "name"}
    seen = 0
    for key, value in leaves(settings):
        named = {key.rpartition(".")[0], key, key.partition(".")[0]}
        if named & may_differ or key.startswith("eval."):
            continue
        seen += 1
        with pytest.raises(ValueError, match=f"other settings .*{re.escape(key)}: "):
            run_folder.open_run(folder, changed(settings, key, "another" if value != "another" else 7))
    # By hand: batch_size, seed, loss, towers, optimizer, augmentation, data.
    assert seen > 60


def leaves(settings: dict, prefix: str = ""):
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def test_every_setting_that_a_run_may_change_is_one():
    known = {*SETTINGS["pretrain"], "logger"}
    assert {*EXECUTION, *LOCATION} <= known


def test_what_is_amended_stays_amended_and_is_on_record(tmp_path, capsys):
    folder = begun(tmp_path)
    assert run_folder.amended(folder, CONFIG) == CONFIG
    told = {**CONFIG, "amend": {"optim.lr": 0.01, "clip_grad_norm": 0.5}}
    now = run_folder.amended(folder, told)
    assert (now["optim"], now["clip_grad_norm"]) == ({"lr": 0.01, "weight_decay": 0.0}, 0.5)
    assert CONFIG["optim"]["lr"] == 0.1
    run_folder.record_amendment(folder, told, 40)
    run_folder.record_amendment(folder, told, 60)
    assert run_folder.open_run(folder, told) is None and run_folder.open_run(folder, CONFIG) is None
    # The plain command goes on with them.
    assert run_folder.amended(folder, CONFIG)["optim"]["lr"] == 0.01
    run_folder.record_amendment(folder, {**CONFIG, "amend": {"optim.lr": 0.001}}, 80)
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [(line["step"], line["settings"]) for line in history] == [
        (40, {"optim.lr": 0.01, "clip_grad_norm": 0.5}),
        (80, {"optim.lr": 0.001}),
    ]
    assert "from step 40 on: optim.lr=0.01" in capsys.readouterr().out


@pytest.mark.parametrize(
    "amend",
    [
        {"optim.lrr": 1},
        {"seed": 1},
        {"batch_size": 4},
        {"optim.lr": "fast"},
        {"optim.lr": True},
        {"optim.lr": float("nan")},
        {"optim.lr": {"a": 1}},
        {"precision": 16},
        {"loss": {}},
    ],
    ids=str,
)
def test_nothing_else_can_be_amended(amend, tmp_path):
    with pytest.raises(ValueError, match="amend"):
        run_folder.amended(begun(tmp_path), {**CONFIG, "amend": amend})


@pytest.mark.parametrize("kind", sorted(set(DAMAGE) - {"missing", "one_bit", "twice", "cut"}))
def test_a_damaged_history_is_named(kind, tmp_path):
    folder = begun(tmp_path)
    run_folder.record_amendment(folder, {**CONFIG, "amend": {"optim.lr": 0.01}}, 40)
    DAMAGE[kind](folder / "history.jsonl")
    if kind == "emptied":
        assert run_folder.amended(folder, CONFIG) == CONFIG
        return
    with pytest.raises((ValueError, OSError), match=r"history\.jsonl"):
        run_folder.amended(folder, CONFIG)


@pytest.mark.parametrize(
    "name", ["config.yaml", "checkpoints", "metrics.jsonl", "summary.json", "tensorboard"]
)
def test_a_link_out_of_the_folder_is_refused(name, tmp_path):
    folder = begun(tmp_path)
    (tmp_path / "outside").mkdir()
    if (folder / name).exists():
        os.rename(folder / name, tmp_path / "outside" / name)
    (folder / name).symlink_to(tmp_path / "outside" / name)
    with pytest.raises(ValueError, match=f"{name} is a link"):
        run_folder.open_run(folder, CONFIG)


def test_the_record_is_whole_and_can_be_read_back(tmp_path):
    assert yaml.safe_load((begun(tmp_path) / "config.yaml").read_text()) == CONFIG
