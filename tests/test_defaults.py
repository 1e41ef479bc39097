"""A default stands once: what YAML gives is what Python takes when nothing is given, or the YAML line says why not.

The reason stands on the key's own line, as "differs from the class: ..." (or from the function that has the default).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import clipkit
from clipkit.command.compose import register_resolvers
from clipkit.data.spec import DATA_DEFAULTS, complete, locate_data
from clipkit.data.synthetic import write_shapes
from clipkit.data.table import TableSet
from clipkit.data.tokenizers import ClipBPE, Words
from clipkit.evals.tasks import _TASKS
from clipkit.loggers import loggers
from clipkit.losses import list_losses
from clipkit.losses.registry import losses
from clipkit.model import DualEncoder
from clipkit.optim import create_optimizer, create_schedule, list_optimizers
from clipkit.planner import Assumptions
from clipkit.towers.base import RESIZING, ImageTower
from clipkit.towers.registry import image_towers, text_towers

CONF = Path(__file__).resolve().parent.parent / "conf"
DATA = ("cc3m", "flickr8k_mini", "flickr8k_nli_mini", "shapes", "shards", "table")
# Files of a tower group that hold a tower's settings whole; the others are sizes on top of one of these.
TOWERS = {
    f"{group}/{path.stem}": registry
    for group, registry in (("image_tower", image_towers), ("text_tower", text_towers))
    for path in sorted((CONF / group).glob("*.yaml"))
    # `source` is whatever tower a source has: its settings are null, as there.
    if "\ndefaults:" not in path.read_text(encoding="utf-8") and path.stem != "source"
}


def read(name: str) -> dict[str, Any]:
    """conf/NAME.yaml as it is written, without what it is composed from."""
    given = yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))
    given.pop("defaults", None)
    return given


def explained(name: str) -> set[str]:
    """The keys of conf/NAME.yaml whose line says why they differ."""
    text = (CONF / f"{name}.yaml").read_text(encoding="utf-8")
    return set(re.findall(r"^\s*(\w+):.*#.*differs from [\w. ]+: \w+", text, re.MULTILINE))


def defaults(function: Any) -> dict[str, Any]:
    """The defaults of a function's or class's arguments."""
    parameters = inspect.signature(function).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not one.empty}


def plain(value: Any) -> Any:
    """Tuples as lists, as YAML has them; an empty mapping as None, since a default in Python is immutable."""
    if isinstance(value, (tuple, list)):
        return [plain(one) for one in value]
    if isinstance(value, float):
        return pytest.approx(value, rel=1e-5)
    return None if value == {} else value


def leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def compare(name: str, given: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Every value given equals ours, or its line says why; no line says so of one that is equal."""
    differing = {
        key for key, value in given.items() if key in ours and plain(value) != plain(ours[key])
    } - brought(given)
    excused = explained(name) & set(given)
    told = {key: (given[key], ours[key]) for key in differing - excused}
    assert not told, f"{name}.yaml and its class differ (YAML, class) and no line says why: {told}"
    assert not excused - differing, f"{name}.yaml says that these differ, and they do not: {excused}"


def brought(given: Mapping[str, Any]) -> set[str]:
    """The keys whose value comes from elsewhere, such as ${embed_dim}."""
    return {key for key, value in given.items() if isinstance(value, str) and "${" in value}


@pytest.mark.parametrize("name", list_losses())
def test_a_loss_has_its_classs_defaults(name):
    # A term counts 1 unless told otherwise: clipkit.losses.create_loss.
    ours = {"weight": 1.0, **defaults(losses.get(name))}
    compare(f"loss/{name}", read(f"loss/{name}")[name], ours)


@pytest.mark.parametrize("name", sorted(TOWERS))
def test_a_tower_has_its_classs_defaults(name):
    given = read(name)
    # Of every tower, whatever its class: clipkit.towers.
    shared = {"freeze": 0, "activation_checkpointing": False, "init_from": None}
    pictures = name.startswith("image") and given["name"] != "none"
    shared |= {key: getattr(ImageTower, key) for key in RESIZING} if pictures else {}
    ours = {**shared, **defaults(TOWERS[name].get(given["name"]))}
    assert set(given) >= set(ours) - {"mean", "std"}, f"{name}.yaml leaves out settings of its class"
    compare(name, given, ours)


def composed(*overrides: str) -> dict[str, Any]:
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose("pretrain", overrides=list(overrides)).data, resolve=False)


def test_shards_have_the_defaults_of_a_stream_made_in_python():
    given, ours = composed("data=shards"), complete({})
    # Other functions take these two parts; their defaults are below.
    for part in ("tokenizer", "sentences"):
        assert ours.pop(part) is None and given.pop(part)
    assert set(ours) - set(given) == {"root"}
    compare("data/shards", dict(leaves(given)), dict(leaves(ours)))


def test_a_table_has_the_classs_defaults():
    given = composed("data=table")["table"]
    assert given == complete({"kind": "table"})["table"]
    compare("data/table", given, defaults(TableSet))


def test_tokenizers_of_the_data_files_have_their_classs_defaults():
    for name, tokenizer in (("shapes", Words), ("shards", ClipBPE)):
        given = read(f"data/{name}")["tokenizer"]
        assert given.pop("name") == tokenizer.name
        compare(f"data/{name}", given, defaults(tokenizer))


def test_generated_shapes_have_the_packages_sizes():
    given = read("data/shapes")["shapes"]
    assert given == locate_data({"kind": "shapes"})["shapes"]
    compare("data/shapes", given, defaults(write_shapes))


def test_each_data_setting_and_its_comment_stand_once():
    """A file that starts from another repeats no value of it."""
    starts_from = {
        "shards": "shapes",
        "cc3m": "shards",
        "flickr8k_mini": "shards",
        "flickr8k_nli_mini": "shards",
        "table": "shards",
    }
    assert set(starts_from) == set(DATA) - {"shapes"}
    for name, base in starts_from.items():
        below = dict(leaves(composed(f"data={base}")))
        own = dict(leaves(read(f"data/{name}")))
        repeated = {key: value for key, value in own.items() if key in below and below[key] == value}
        assert not repeated, f"data/{name}.yaml repeats {base}.yaml: {repeated}"


@pytest.mark.parametrize("name", list_optimizers())
def test_an_optimizer_has_its_own_defaults(name):
    """Given none, create_optimizer takes the optimizer's own; the YAML spells them out."""
    given = {**read("optim/adamw"), **read(f"optim/{name}")}
    weights = torch.nn.Linear(2, 2)
    own = create_optimizer(weights, name=name, lr=given["lr"]).param_groups[0]
    wanted = [key for key in ("betas", "eps", "momentum") if given.get(key) is not None]
    compare(f"optim/{name}", {key: given[key] for key in wanted}, {key: own[key] for key in wanted})


def test_the_optimizers_own_settings_and_the_schedule_have_their_functions_defaults():
    given, run = read("optim/adamw"), read("pretrain")
    schedule = {"name": run["schedule"], "final": run["final_lr"], "cooldown_steps": run["cooldown_steps"]}
    # None: the optimizer's own, above.
    ours = {key: value for key, value in defaults(create_optimizer).items() if value is not None}
    compare("optim/adamw", given, ours)
    assert schedule == defaults(create_schedule)


def test_a_run_has_the_models_defaults():
    given = read("pretrain")
    compare("pretrain", given, defaults(DualEncoder))
    assert set(given) & set(defaults(DualEncoder)) == {
        "init_logit_scale",
        "init_logit_bias",
        "mlm_probability",
        "channels_last",
        "text_projection_bias",
    }


def test_a_plan_has_the_planners_assumptions():
    compare("plan", read("plan"), defaults(Assumptions))
    assert set(defaults(Assumptions)) <= set(read("plan"))


def test_an_evaluation_has_the_functions_defaults():
    given = {key: value for key, value in read("evaluate").items() if key != "device"}
    compare("evaluate", given, defaults(clipkit.evaluate))


@pytest.mark.parametrize("name", ["sts", "senteval"])
def test_a_task_of_sentences_has_its_classs_defaults(name):
    given = read(f"eval/{name}")[name]
    compare(f"eval/{name}", given, defaults(_TASKS.get(given["kind"])))


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_logger_has_its_classs_defaults(name):
    given = read(f"logger/{name}")[name]
    assert set(given) == set(defaults(loggers.get(name)))
    compare(f"logger/{name}", given, defaults(loggers.get(name)))


def test_a_difference_without_a_reason_is_found(tmp_path, monkeypatch):
    folder = tmp_path / "loss"
    folder.mkdir()
    monkeypatch.setitem(globals(), "CONF", tmp_path)
    for line, message in (
        ("  t: 3.0", "no line says why"),
        ("  t: 2.0  # differs from the class: it does not", "they do not"),
    ):
        (folder / "uniformity.yaml").write_text(f"uniformity:\n{line}\n")
        with pytest.raises(AssertionError, match=message):
            test_a_loss_has_its_classs_defaults("uniformity")
    (folder / "uniformity.yaml").write_text("uniformity:\n  t: 3.0  # differs from the class: a reason\n")
    test_a_loss_has_its_classs_defaults("uniformity")


def test_data_defaults_are_settings_of_the_first_file():
    assert set(DATA_DEFAULTS) - {"root"} == set(read("data/shapes"))
