"""The command line wins over an experiment, for every choice of every group on every experiment."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

import clipkit.conf
from clipkit.command.compose import compose, register_resolvers, resolved, start_hydra
from clipkit.command.unread import unread

CONF = Path(clipkit.conf.__path__[0])
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
SWAPPED = ("image_tower", "text_tower", "optim", "data", "loss", "eval", "logger")
CHOICES = {group: sorted(path.stem for path in (CONF / group).glob("*.yaml")) for group in SWAPPED}
CASES = [case for group in SWAPPED for case in product(EXPERIMENTS, [group], CHOICES[group])]


@pytest.fixture(autouse=True)
def hydra():
    register_resolvers()
    start_hydra()
    yield
    GlobalHydra.instance().clear()


def own_file(group: str, choice: str) -> dict:
    """A choice's own file with the files of its group that it starts from, read without hydra."""
    found = yaml.safe_load((CONF / group / f"{choice}.yaml").read_text()) or {}
    values: dict = {}
    for part in found.pop("defaults", ["_self_"]):
        values = merged(values, found if part == "_self_" else own_file(group, part))
    return values


def merged(below: dict, above: dict) -> dict:
    out = dict(below)
    for key, value in above.items():
        out[key] = (
            merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
        )
    return out


def chosen_by(experiment: str) -> dict[str, str]:
    listed = yaml.safe_load((CONF / "experiment" / f"{experiment}.yaml").read_text())["defaults"]
    return {key.removeprefix("override /"): value for entry in listed for key, value in entry.items()}


def group_of(cfg, group: str) -> dict:
    return OmegaConf.to_container(cfg[group], resolve=False) if group in cfg else {}


# The others differ from these in what they choose, not in how they do it.
GATE = ("quickstart", "cyclip_rn50_cc3m")


@pytest.mark.parametrize(
    "experiment", [pytest.param(name, marks=[] if name in GATE else pytest.mark.slow) for name in EXPERIMENTS]
)
def test_a_choice_on_the_command_line_is_built_from_its_own_file(experiment):
    """The experiment's settings inside a group count for its own choice alone; what belongs to the run counts always."""
    own, seen = chosen_by(experiment), 0
    settings = yaml.safe_load((CONF / "experiment" / f"{experiment}.yaml").read_text())
    for _, group, choice in [case for case in CASES if case[0] == experiment]:
        cfg = compose("pretrain", [f"experiment={experiment}", f"{group}={choice}"])
        wanted = own_file(group, choice)
        if own.get(group, "tensorboard" if group == "logger" else None) == choice:
            wanted = merged(wanted, settings.get(group, {}))
        assert group_of(cfg, group) == wanted, (group, choice)
        for key, value in settings.items():
            if key not in (*SWAPPED, "defaults"):
                assert cfg[key] == value, (group, choice, key)
        for other in set(SWAPPED) - {group, "loss", "eval", "logger"}:
            assert group_of(cfg, other) == merged(own_file(other, own[other]), settings.get(other, {}))
        seen += 1
    assert seen == len(CASES) // len(EXPERIMENTS) >= 45


def test_what_was_seen():
    def tower(*overrides):
        return compose("pretrain", list(overrides))

    found = tower("experiment=flickr8k_tiny", "image_tower=resnet50").image_tower
    assert (found.model, found.image_size) == ("resnet50", 224)
    found = tower("experiment=flickr8k_tiny", "text_tower=transformer").text_tower
    assert (found.width, found.layers, found.heads, found.dropout) == (512, 12, 8, 0.0)
    assert tower("optim=lion").optim.lr == 1e-4
    assert list(tower("experiment=cyclip_rn50_cc3m", "optim=lion").optim.betas) == [0.9, 0.99]
    assert tower("optim=sgd").optim.weight_decay == 1e-4 and tower("optim=sgd").warmup_steps == 40
    assert "dropout" not in tower("text_tower=bert_base").text_tower
    # A key on the command line counts whatever the choice.
    assert tower(
        "experiment=flickr8k_tiny", "image_tower=resnet50", "image_tower.image_size=96"
    ).image_tower == {
        **own_file("image_tower", "resnet50"),
        "image_size": 96,
    }
    # The experiment's own choice, named again, keeps its settings.
    assert tower("experiment=flickr8k_tiny", "image_tower=timm").image_tower.model == "resnet10t"


def test_a_sweep_composes_each_job_so():
    both = [
        compose(
            "pretrain", ["experiment=flickr8k_tiny", f"image_tower={name}"], mode=RunMode.RUN
        ).image_tower.model
        for name in ("resnet50", "vit_base_patch32")
    ]
    assert both == ["resnet50", "vit_base_patch32_224"]


def write(folder: Path, text: str, name: str = "mine") -> None:
    path = folder / "experiment" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("# @package _global_\n" + text)


def test_the_rule_holds_for_a_users_experiments_and_for_those_that_start_from_others(tmp_path):
    write(
        tmp_path,
        "defaults: [flickr8k_tiny, _self_]\nimage_tower: {drop_path: 0.25}\nsteps: 7\nepochs: null\n",
        "more",
    )
    write(
        tmp_path,
        "defaults:\n  - quickstart\n  - override /text_tower: transformer\n  - _self_\ntext_tower: {heads: 4}\n",
    )
    write(tmp_path, "optim: {lr: 0.5}\nloss: {infonce: {weight: 3.0}}\n", "plain")
    start_hydra(str(tmp_path))
    found = compose("pretrain", ["experiment=more"])
    assert (found.image_tower.model, found.image_tower.drop_path, found.steps) == ("resnet10t", 0.25, 7)
    found = compose("pretrain", ["experiment=more", "image_tower=resnet50"])
    assert (found.image_tower.model, found.image_tower.drop_path, found.steps) == ("resnet50", None, 7)
    # quickstart's width was meant for the tower that `mine` has replaced.
    found = compose("pretrain", ["experiment=mine"])
    assert (found.text_tower.width, found.text_tower.heads, found.optim.lr) == (512, 4, 5e-3)
    assert (
        compose("pretrain", ["experiment=plain"]).optim.lr,
        compose("pretrain", ["experiment=plain", "optim=sgd"]).optim.lr,
    ) == (0.5, 0.1)
    assert compose("pretrain", ["experiment=plain"]).loss.infonce.weight == 3.0
    assert (
        compose("pretrain", ["experiment=plain", "loss=[cyclip,simcse]"]).loss.infonce.get("weight", 1.0)
        == 1.0
    )


def test_what_is_left_out_is_kept_for_the_user_to_see():
    cfg = compose("pretrain", ["experiment=flickr8k_tiny", "image_tower=resnet50", "optim=lion"])
    assert list(cfg.hydra.runtime.choices.left_out) == [
        "flickr8k_tiny sets image_tower.model, image_tower.image_size for image_tower=timm alone: left out",
        "flickr8k_tiny sets optim.lr, optim.weight_decay for optim=adamw_beta98 alone: left out",
    ]
    assert list(compose("pretrain", ["experiment=flickr8k_tiny"]).hydra.runtime.choices.left_out) == []
    # Planning composes the same settings.
    assert (
        compose("plan", ["experiment=flickr8k_tiny", "image_tower=resnet50"]).image_tower.model == "resnet50"
    )


@pytest.mark.parametrize("name", ["optim/adamw.yaml", "experiment/quickstart.yaml", "pretrain.yaml"])
def test_a_users_file_that_would_hide_behind_ours_is_refused(name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("lr: 1.0\n")
    with pytest.raises(ValueError, match=f"{path} has the name of clipkit's own"):
        start_hydra(str(tmp_path))
    with pytest.raises(ValueError, match="there is no folder"):
        start_hydra(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.val=elsewhere/*.tar", "eval=flickr8k_mini"], "no task of eval= reads it"),
        (["data.val=elsewhere/*.tar"], None),
        (["experiment=flickr8k_tiny", "data.val=elsewhere/*.tar"], None),
        (["data.sentences.triplets=x.jsonl"], "no loss of this run reads it"),
        (["data.sentences.pairs=x.jsonl", "loss=[clip,nli_contrastive]"], "no loss of this run reads it"),
        (["data.sentences.triplets=x.jsonl", "loss=[clip,nli_contrastive]"], None),
        (["eval=none", "eval_every=5"], "this run is not scored"),
        (["loss.infonce.same_ids=positive"], "the data gives its pairs no ids"),
        (["loss.infonce.same_ids=mask", 'data.pair_ids="key:#"'], None),
        (["loss.infonce.same_ids=positive", "data.captions_per_image=5"], None),
        (["text_tower=source", "data.tokenizer.context_length=9"], "brings its own tokenizer"),
        (["image_tower=none", "data.cache=none"], "reads no picture"),
        (["seed=3", "steps=5"], None),
    ],
    ids=str,
)
def test_what_an_override_does_not_change_is_said(overrides, said):
    lines = list(unread(resolved(compose("pretrain", overrides), "pretrain"), overrides))
    assert (len(lines) == 1 and said in lines[0]) if said else lines == []
