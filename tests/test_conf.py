"""Every YAML in conf/ composes, and what a user can mistype is an error that names the right word."""

from __future__ import annotations

import hashlib
import re

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from clipkit.command.compose import register_resolvers, resolved, run_name, start_hydra
from tests.processes import ROOT

CONF = ROOT / "conf"
FILES = sorted(CONF.rglob("*.yaml"))
CHOICES = [path.relative_to(CONF) for path in FILES if path.parent != CONF]


def composed(*overrides: str, name: str = "pretrain"):
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, overrides=list(overrides), return_hydra_config=False)


def test_the_walk_over_conf_finds_every_group():
    assert {path.parts[0] for path in CHOICES} >= {
        "data",
        "image_tower",
        "text_tower",
        "loss",
        "optim",
        "eval",
        "logger",
        "experiment",
        "debug",
        "gpu",
    }


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> list[str]:
    return [
        f"data.shapes.folder={tmp_path_factory.mktemp('shapes')}",
        "data.shapes.train=64",
        "data.shapes.val=8",
    ]


@pytest.mark.parametrize("path", CHOICES, ids=str)
def test_composes(path, shapes):
    group, name = path.parent.as_posix(), path.stem
    if group == "data" and name != "shapes":
        # The default evaluation reads the shapes' zero-shot set, which other data does not have.
        shapes = ["eval=none"]
    elif group == "experiment" and name != "quickstart":
        shapes = []
    # The one group that clipkit-plan alone has.
    command = "plan" if group == "gpu" else "pretrain"
    config = resolved(composed(f"{group}={name}", *shapes, name=command), command)
    assert config["loss"] and config["image_tower"]["name"] and config["text_tower"]["name"]


def test_losses_add_up_on_the_command_line():
    assert list(composed("loss=[cyclip,simcse]").loss) == ["infonce", "cyclic", "simcse"]
    assert composed("+loss=[cyclic]", "loss.cyclic.weight=0.1").loss.cyclic.weight == 0.1


@pytest.mark.parametrize("variant", ["clip", "cyclip"])
def test_the_cc3m_experiments_hold_the_published_settings(variant):
    """Goel et al. 2022, section 4 and appendix."""
    cfg = composed(f"experiment={variant}_rn50_cc3m")
    assert (cfg.optim.lr, list(cfg.optim.betas), cfg.optim.weight_decay, cfg.warmup_steps) == (
        5e-4,
        [0.9, 0.999],
        0.1,
        10000,
    )
    assert (cfg.epochs, cfg.batch_size, cfg.image_tower.image_size, cfg.data.tokenizer.context_length) == (
        64,
        128,
        224,
        77,
    )
    assert cfg.init_logit_scale == pytest.approx(1 / 0.07, rel=1e-5) and cfg.max_logit_scale == 100
    assert list(cfg.loss) == {"clip": ["infonce"], "cyclip": ["infonce", "cyclic"]}[variant]


def test_the_same_overrides_name_the_same_folder():
    assert run_name("") == "quickstart/default"
    assert run_name("experiment=flickr8k_tiny") == "flickr8k_tiny/default"
    first, second = run_name("loss=[cyclip,simcse],seed=1"), run_name("loss=[cyclip,simcse],seed=2")
    assert first != second and first == run_name("loss=[cyclip,simcse],seed=1")
    assert len(run_name("a=" + "x" * 500)) < 100


PATHS = "/mnt/datasets/vision-language/2026-01-05-v2/{}/train/{{00000..00331}}.tar"
SWEEPS = {
    "the last of many": [
        "batch_size=4096,data.root=/mnt/datasets/vision-language/cc3m,image_tower=resnet50,loss=cyclip,optim.lr=1e-3,"
        f"optim.weight_decay=0.1,seed={seed}"
        for seed in (0, 1, 12)
    ],
    "the first of many": [
        f"batch_size={size},data.root=/mnt/datasets/vision-language/cc3m,image_tower=resnet50,optim.lr=1e-3,warmup_steps=9"
        for size in (128, 1024, 4096)
    ],
    "one in the middle": [
        "data.root=/mnt/datasets/vision-language/cc3m,image_tower.model=vit_base_patch16_clip_224.openai,"
        f"optim.lr={rate},text_tower=roberta_base,text_tower.pretrained=FacebookAI/roberta-base"
        for rate in ("1e-3", "3e-3", "5e-4")
    ],
    "two keys of one name": [
        "image_tower=vit_base_patch32,image_tower.freeze={},text_tower=roberta_base,text_tower.freeze={}".format(
            *both
        )
        for both in ((0, 4), (4, 0), (4, 4))
    ],
    "losses": [
        f"data.root=/mnt/datasets/vision-language/cc3m,experiment=study_cc3m,loss=[{loss}],output=/some/long/folder/name,seed=0"
        for loss in ("clip,simcse", "cyclip,simcse", "cyclip,simcse,nli_contrastive", "clip,nli_contrastive")
    ],
    "ends of one long value": [f"data.train={PATHS.format('x')}{end},seed=0" for end in ("", ".gz", ".zip")],
    "starts of one long value": [f"tag={start}{'x' * 200}" for start in ("a", "b", "ab")],
    "thirty": [
        ",".join(f"group{i}.key{i}=value{i}" for i in range(29)) + f",seed={seed}" for seed in (0, 1, 2)
    ],
    "other letters": [
        "data.root=/" + "\u6570\u636e" * 40 + f",name=\U00020000\U00020001,seed={seed}" for seed in (0, 1)
    ],
}


@pytest.mark.parametrize("sweep", SWEEPS)
def test_what_tells_the_runs_of_a_sweep_apart_is_in_their_names(sweep):
    names = [run_name(overrides).rpartition("-")[0] for overrides in SWEEPS[sweep]]
    assert len(set(names)) == len(SWEEPS[sweep]), names
    for overrides in SWEEPS[sweep]:
        (folder,) = run_name(overrides).split("/")[1:]
        assert len(folder.encode()) <= 255 and re.fullmatch(r"[\w.+-]+", folder), folder


def test_a_name_that_was_not_cut_is_what_it_was_and_a_folder_of_a_cut_one_is_found(tmp_path):
    """Names of the version before, by hand."""
    assert (
        run_name("loss=cyclip,optim.lr=1e-3,seed=1") == "quickstart/loss-cyclip-optim.lr-1e-3-seed-1-c45dd2"
    )
    overrides = SWEEPS["the last of many"][0]
    digest = hashlib.sha256(overrides.encode()).hexdigest()[:6]
    earlier = f"quickstart/batch_size-4096-data.root-mnt-datasets-vision-language-cc3m--{digest}"
    assert run_name(overrides, str(tmp_path)) == run_name(overrides) != earlier
    (tmp_path / earlier).mkdir(parents=True)
    assert run_name(overrides, str(tmp_path)) == earlier


def test_how_a_run_is_watched_is_no_part_of_its_name(tmp_path):
    """Every execution setting as a command line gives it, the loggers' own among them."""
    register_resolvers()
    names = set()
    watching = [
        "log_every=3",
        "profile.steps=2",
        "count_flops=true",
        "logger=wandb",
        "logger.wandb.tags=[a]",
        "logger.wandb.group=g",
    ]
    for given in ([], watching):
        cfg = start_hydra().load_configuration(
            "pretrain", ["seed=1", f"output_dir={tmp_path}", *given], RunMode.RUN
        )
        HydraConfig.instance().set_config(cfg)
        names.add(cfg.hydra.run.dir)
    assert names == {f"{tmp_path}/{run_name('seed=1')}"}
