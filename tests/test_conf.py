"""Every YAML in conf/ composes, and what a user can mistype is an error that names the right word."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir

from clipkit.command.compose import register_resolvers, resolved, run_name
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
