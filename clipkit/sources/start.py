"""What a run begins with: its settings completed by its sources, and their weights put into its model.

    start = begin(config)                     # reads the sources, before data or model are made
    model = create_model(model_config(start.config), tokenizer=start.tokenizer or ...)
    report = start.load(model, tokenizer)

A tower named `source` is as its source has it, its tokenizer with it; one that is spelt out must agree with its source in
everything that changes what it computes. Every tensor of the model and of the sources is accounted for in the report, and
what does not fit is an error.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor, nn

from clipkit.checkpoint import list_checkpoints
from clipkit.data import Tokenizer
from clipkit.data.tokenizers import load_tokenizer
from clipkit.files import write_json
from clipkit.foreign import VOCABULARY_BYTES, BrokenFile, read_json
from clipkit.loading import model_config
from clipkit.model import DualEncoder, create_model
from clipkit.settings import ARCHITECTURE
from clipkit.sources.opening import open_source
from clipkit.sources.positions import resized
from clipkit.sources.source import TOWERS, Source
from clipkit.towers import create_image_tower, create_text_tower
from clipkit.towers.structure import position_limit

# What a run says of a tower whatever its source: how it is trained, how long its inputs are, how pictures are made.
_OF_THE_RUN = (
    "init_from", "pretrained", "freeze", "lora", "activation_checkpointing", "dropout", "attention_dropout", "hidden_dropout",
    "drop_path", "patch_dropout", "image_size", "context_length", "resize_mode", "interpolation",
)  # fmt: skip
_PROJECTIONS = {"image_tower": "image_projection", "text_tower": "text_projection"}


@dataclass
class Report:
    """The account of every tensor: names by what became of them.

    Attributes:
        sources: what was read, by tower.
        loaded: of the model, as the source has them. resized: {name: (shape there, shape here)}.
        new: of the model, that no source has: they begin at random.
        left: of the sources, that the model has no place for.
        notes: what the run's settings say and its source decides.
    """

    sources: dict[str, str] = field(default_factory=dict)
    loaded: list[str] = field(default_factory=list)
    resized: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For people: a line a kind, the first names of long lists."""
        begun = {
            source: [tower for tower, one in self.sources.items() if one == source]
            for source in self.sources.values()
        }
        found = [f"{' and '.join(towers)} from {source}" for source, towers in begun.items()]
        found.append(
            f"  {len(self.loaded)} tensors loaded, {len(self.resized)} resized, {len(self.new)} new, {len(self.left)} left"
        )
        found += [f"  resized {name}: {old} -> {new}" for name, (old, new) in self.resized.items()]
        found += [
            f"  {what}: {_some(names)}"
            for what, names in (("new, at random", self.new), ("left in the source", self.left))
            if names
        ]
        return found + [f"  {note}" for note in self.notes]

    def entries(self) -> dict[str, Any]:
        """For a JSON file."""
        return dict(vars(self))


def begin(config: Mapping[str, Any], run_dir: Path | None = None) -> Start:
    """Read the sources that a run's settings name; a run with checkpoints needs none of them any more.

    Args:
        config: as in conf/pretrain.yaml.
        run_dir: its run folder.

    Raises:
        ValueError: a source that cannot be read or does not hold what is taken from it, a tower named `source` without one,
            settings that contradict it.
    """
    check_named(config)
    names = named_sources(config)
    if not names:
        return Start(dict(config), {}, None)
    if run_dir is not None and (gone_on := _of_checkpoint(config, run_dir / "checkpoints")):
        return gone_on
    opened = {name: open_source(name) for name in {*names.values()}}
    sources = {tower: opened[name] for tower, name in names.items()}
    whole = opened.get(str(config.get("init_from")))
    for tower, source in sources.items():
        if not source.has(tower) or (source.loose and source is whole):
            has = "names that no model here has" if source.loose else f"no {tower.replace('_', ' ')}"
            raise ValueError(
                f"init_from={source.name}: it holds {has} ({source.kind}, {source.place}; its tensors are like "
                f"{_some([*source.weights], 3)}). A single tower begins by image_tower.init_from or text_tower.init_from"
            )
    start = Start(dict(config), sources, whole)
    settled: dict[str, Any] = {}
    for tower, source in sources.items():
        if config[tower]["name"] == "source":
            settled[tower] = _followed(config[tower], tower, source)
    if whole is not None and whole.settings.get("embed_dim") not in (None, config["embed_dim"]):
        if not any(sources[tower] is whole for tower in settled):
            raise ValueError(
                f"embed_dim is {config['embed_dim']} and that of {whole} is {whole.settings['embed_dim']}: set embed_dim to it"
            )
        settled["embed_dim"] = whole.settings["embed_dim"]
        start.notes.append(f"embed_dim is the source's {settled['embed_dim']}, not {config['embed_dim']}")
    if "text_tower" in settled:
        source = sources["text_tower"]
        settled["text_projection_bias"] = bias = bool(source.settings.get("text_projection_bias", False))
        if bias != bool(config.get("text_projection_bias", False)):
            start.notes.append(f"text_projection_bias is the source's {bias}")
        start.tokenizer = _tokenizer(source, config["text_tower"].get("context_length"))
        start.notes.append(
            f"tokenizer: the source's {start.tokenizer.name}, {start.tokenizer.vocab_size} ids, "
            f"{start.tokenizer.context_length} tokens; data.tokenizer is not read"
        )
    start.config[ARCHITECTURE] = settled
    start.check()
    return start


def named_sources(config: Mapping[str, Any]) -> dict[str, str]:
    """{tower: the source that its weights come from}."""
    found = {tower: config[tower].get("init_from") or config.get("init_from") for tower in TOWERS}
    return {tower: name for tower, name in found.items() if name and config[tower].get("name") != "none"}


def check_named(config: Mapping[str, Any]) -> None:
    """ValueError for settings of sources that contradict each other; nothing is opened."""
    names = named_sources(config)
    for tower in TOWERS:
        given = config[tower]
        if given.get("name") == "source" and tower not in names:
            raise ValueError(
                f"{tower}=source is the tower of a source, and none is named: give init_from= or {tower}.init_from="
            )
        if given.get("init_from") and given.get("name") == "none":
            raise ValueError(
                f"{tower}.init_from={given['init_from']} beside {tower}=none: leave one of them out"
            )
        if tower in names and given.get("pretrained"):
            raise ValueError(
                f"{tower}.pretrained={given['pretrained']} and init_from={names[tower]} both say where the {tower}'s weights "
                f"come from: set {tower}.pretrained to {'false' if given['pretrained'] is True else 'null'}, or leave "
                "init_from out"
            )
    if config.get("init_from") and config["init_from"] not in names.values():
        raise ValueError(
            f"init_from={config['init_from']} is of no tower here: each has a source of its own, or is none"
        )


def _followed(given: Mapping[str, Any], tower: str, source: Source) -> dict[str, Any]:
    """A source's tower, with what the run says of it."""
    theirs = source.settings.get(tower)
    if not isinstance(theirs, Mapping):
        raise ValueError(
            f"{source} is weights alone, which do not say what computes them (heads, activation): spell the tower out "
            f"instead of {tower}=source, or name an open_clip model by open_clip:NAME=FILE"
        )
    own = {
        key: value for key, value in given.items() if key not in ("name", "init_from") and value is not None
    }
    settings = {**_bare(theirs), **own}
    length, config = own.get("context_length"), theirs.get("config")
    if length and isinstance(config, Mapping) and "max_position_embeddings" in config:
        limit = position_limit(_peer(tower, source).body)
        if limit and length + limit[1] > limit[0]:
            settings["config"] = {**config, "max_position_embeddings": length + limit[1]}
    return settings


def _tokenizer(source: Source, length: int | None) -> Tokenizer:
    """A source's tokenizer, for texts of another length where one is given."""
    if source.tokenizer is None:
        raise ValueError(f"{source} has no tokenizer: spell the text tower and data.tokenizer out")
    if length in (None, source.tokenizer.context_length):
        return source.tokenizer
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        source.tokenizer.save(path)
        write_json(path, {**read_json(path, limit=VOCABULARY_BYTES), "context_length": length})
        return load_tokenizer(path)


def _of_checkpoint(config: Mapping[str, Any], folder: Path) -> Start | None:
    """What a run that has begun was settled to, by its newest checkpoint that says so."""
    for path in reversed(list_checkpoints(folder)):
        try:
            settled = read_json(path / "config.json").get(ARCHITECTURE, {})
            tokenizer = load_tokenizer(path / "tokenizer.json")
        except (BrokenFile, OSError):
            continue
        for tower in TOWERS:
            if tower in settled:
                key = "activation_checkpointing"
                settled[tower] = {**settled[tower], key: config[tower].get(key, False)}
        return Start({**config, ARCHITECTURE: settled}, {}, None, tokenizer)
    return None


@dataclass
class Start:
    """A run's settings with what its sources decide, and the sources.

    Attributes:
        config: the run's, with the towers as they are to be built under `architecture`.
        tokenizer: the text source's, where the text tower follows it; None: the data settings say.
    """

    config: dict[str, Any]
    sources: dict[str, Source]
    whole: Source | None
    tokenizer: Tokenizer | None = None
    notes: list[str] = field(default_factory=list)

    def load(self, model: DualEncoder, tokenizer: Tokenizer) -> Report | None:
        """Put the sources' weights into the model, in place, and say what became of each tensor.

        Returns:
            None where there is no source, or a run goes on without it.

        Raises:
            ValueError: another tokenizer than the text source's, a tower that computes something else, a tensor that is
                missing, left over in a tower, or of another shape; no weight has changed then.
        """
        if not self.sources:
            return None
        tensors, report = self._match(model, tokenizer)
        state = model.state_dict()
        model.load_state_dict(
            {name: tensor.to(state[name].dtype) for name, tensor in tensors.items()}, strict=False
        )
        # The weights are not needed twice.
        self.sources, self.whole = {}, None
        return report

    def check(self) -> None:
        """Raise what `load` would, without the model's memory, where the tokenizer is known before the data."""
        if self.tokenizer is None:
            return
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = create_model(model_config(self.config, pretrained=False), tokenizer=self.tokenizer)
        self._match(model, self.tokenizer)

    def _match(self, model: DualEncoder, tokenizer: Tokenizer) -> tuple[dict[str, Tensor], Report]:
        report = Report(
            {tower: source.told() for tower, source in self.sources.items()},
            notes=list(self.notes),
        )
        wanted = model.state_dict()
        tensors: dict[str, Tensor] = {}
        taken: dict[int, set[str]] = {}
        for tower, source in self.sources.items():
            if tower == "text_tower" and source.tokenizer is not None:
                check_tokenizer(source, tokenizer)
            if tower not in self.config.get(ARCHITECTURE, {}):
                _check_settings(getattr(model, tower), tower, source, model, tokenizer)
            found = _match_tower(model, tower, source, report)
            tensors |= found
            taken.setdefault(id(source), set()).update(found)
        given = {id(source): source for source in self.sources.values()}
        for key, source in given.items():
            towers = [tower for tower, one in self.sources.items() if one is source]
            for name, tensor in source.weights.items():
                if (
                    source.loose
                    or name in taken[key]
                    or (name.startswith(TOWERS) and name.partition(".")[0] in towers)
                ):
                    continue
                part = name.partition(".")[0]
                # A projection belongs to its tower; the scale and the heads to a model that is begun from as a whole.
                mine = any(part == _PROJECTIONS[tower] for tower in towers) or (
                    source is self.whole and not part.endswith(("_tower", "_projection"))
                )
                if mine and name in wanted and wanted[name].shape == tensor.shape:
                    tensors[name] = tensor
                    report.loaded.append(name)
                elif mine and name in wanted and source is self.whole:
                    raise ValueError(_shapes(name, tensor, wanted[name], source))
                else:
                    report.left.append(name)
            report.left += [name for name in source.ignored if name not in report.left]
        if "log_logit_scale" in tensors and not tensors["log_logit_scale"].is_meta:
            scale = float(tensors["log_logit_scale"].float().exp())
            report.notes.append(
                f"logit_scale begins at the source's {scale:.4g}; init_logit_scale is not read"
            )
        report.new = [name for name in wanted if name not in tensors]
        return tensors, report


def _match_tower(model: nn.Module, tower: str, source: Source, report: Report) -> dict[str, Tensor]:
    """The tensors of one tower; ValueError for one that is missing, left over or of another shape."""
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(f"{tower}.")}
    given = _named(source, tower, wanted)
    fixed = {f"{tower}.{name}" for name in _classifiers(getattr(model, tower))}
    extra = [name for name in given if name not in wanted]
    report.left += [name for name in extra if name in fixed]
    extra = [name for name in extra if name not in fixed]
    missing = [name for name in wanted if name not in given]
    if missing or extra:
        raise ValueError(
            f"{source} does not fit the {tower.replace('_', ' ')}: "
            + "; ".join(
                f"{len(names)} tensors {what}, such as {_some(names, 3)}"
                for what, names in (("missing in the source", missing), ("that the tower has not", extra))
                if names
            )
            + f". Give {tower}=source to take it as it is, or settings that make the same tower"
        )
    body = getattr(model, tower)
    limit = position_limit(body) if tower == "text_tower" else None
    found: dict[str, Tensor] = {}
    for name, tensor in wanted.items():
        one = given[name]
        if one.shape == tensor.shape:
            found[name] = one
            report.loaded.append(name)
            continue
        made = resized(name, one, tuple(tensor.shape), first=limit[1] if limit else 0)
        if made is not None:
            found[name] = made
            report.resized[name] = (list(one.shape), list(tensor.shape))
        else:
            projects = (
                ": this tower projects by itself, so embed_dim must be the source's"
                if _projects(name)
                else ""
            )
            raise ValueError(_shapes(name, one, tensor, source) + projects)
    return found


def _projects(name: str) -> bool:
    """Whether a weight of an image tower makes the shared space's columns."""
    return bool(re.search(r"\.body\.(?:proj|attnpool\.c_proj\..*)$", name))


def _named(source: Source, tower: str, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A source's tensors of a tower under the model's names; those of a loose file have the tower's inner names."""
    if not source.loose:
        return {name: tensor for name, tensor in source.weights.items() if name.startswith(f"{tower}.")}
    candidates = {f"{tower}.", *(f"{tower}.{name.split('.')[1]}." for name in wanted)}
    best = max(sorted(candidates), key=lambda prefix: sum(prefix + name in wanted for name in source.weights))
    if not any(best + name in wanted for name in source.weights):
        raise ValueError(
            f"{source} holds no tensor of this {tower.replace('_', ' ')}: its names are like {_some([*source.weights], 3)}, "
            f"the tower's like {_some([name.partition('.')[2] for name in wanted], 3)}"
        )
    return {best + name: tensor for name, tensor in source.weights.items()}


def _classifiers(tower: Any) -> list[str]:
    """Names, within the tower, of a timm model's classifier, which a tower is made without."""
    trunk = getattr(tower, "trunk", None)
    names = (getattr(trunk, "pretrained_cfg", None) or {}).get("classifier") or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    return [f"trunk.{name}.{kind}" for name in names for kind in ("weight", "bias")]


def check_tokenizer(source: Source, tokenizer: Tokenizer) -> None:
    """ValueError where a tokenizer makes other ids than the source's, which its embeddings would be read by."""
    own = source.tokenizer
    if own is None or _vocabulary(own) == _vocabulary(tokenizer):
        return
    raise ValueError(
        f"{source} was trained with the tokenizer {own.name!r} of {own.vocab_size} ids, and data.tokenizer is "
        f"{tokenizer.name!r} of {tokenizer.vocab_size}: its embeddings would stand for other words. Give text_tower=source, "
        "which takes its tokenizer with it, or the same tokenizer"
    )


def _vocabulary(tokenizer: Tokenizer) -> Any:
    """What a tokenizer makes of texts, but for their length."""
    state = {key: value for key, value in tokenizer.state().items() if key != "context_length"}
    if "backend" in state:
        backend = tokenizers.Tokenizer.from_str(state["backend"])
        backend.no_padding()
        backend.no_truncation()
        state["backend"] = backend.to_str()
    return type(tokenizer).__name__, state


def _check_settings(built: Any, tower: str, source: Source, model: DualEncoder, tokenizer: Tokenizer) -> None:
    """ValueError for a tower of the same shapes that computes something else: other heads, activation, pooling."""
    if not isinstance(source.settings.get(tower), Mapping):
        return
    here, there = (
        _computes(built),
        _computes(_peer(tower, source, embed_dim=model.embed_dim, tokenizer=tokenizer)),
    )
    differing = [
        f"{tower}.{key} is {here.get(key)!r} and the source's {there.get(key)!r}"
        for key in sorted({*here, *there})
        if here.get(key) != there.get(key)
    ]
    if differing:
        raise ValueError(
            f"{source} holds another {tower.replace('_', ' ')}: {'; '.join(differing[:4])}. Give {tower}=source to take it as "
            "it is, or these settings"
        )


def _peer(tower: str, source: Source, *, embed_dim: int = 1, tokenizer: Tokenizer | None = None) -> Any:
    """A source's tower as its settings say, without memory."""
    settings, own = _bare(source.settings[tower]), source.tokenizer or tokenizer
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        if tower == "image_tower":
            return create_image_tower(settings, embed_dim=int(source.settings.get("embed_dim") or embed_dim))
        assert own is not None
        ids = {"vocab_size": own.vocab_size, "pad_id": own.pad_id, "eot_id": own.eot_id}
        return create_text_tower(settings, embed_dim=embed_dim, context_length=own.context_length, **ids)


def _bare(tower: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in tower.items()
        if key not in ("init_from", "freeze", "activation_checkpointing", "pretrained")
    }


def _computes(tower: Any) -> dict[str, Any]:
    """What decides a tower's output besides its weights."""
    settings = {key: value for key, value in (tower.settings or {}).items() if key not in _OF_THE_RUN}
    settings |= {key: list(getattr(tower, key)) for key in ("mean", "std") if hasattr(tower, key)}
    if settings.get("name") == "clip_vit" and settings.get("heads") is None:
        settings["heads"] = max(1, settings["width"] // 64)
    if settings.get("name") == "timm":
        pool = getattr(tower.trunk, "global_pool", None)
        settings["pool"] = pool if isinstance(pool, str) else getattr(pool, "pool_type", settings.get("pool"))
        settings["model"] = tower.trunk.pretrained_cfg.get("architecture") or settings["model"]
    body = getattr(tower, "body", None)
    if settings.get("name") == "hf" and body is not None:
        # A family's sizes are spelt in many ways; its whole config is one.
        sizes = {
            key: value
            for key, value in body.config.to_dict().items()
            if not re.search(
                "drop|max_position|version|dtype|_name_or_path|architectures|use_cache|token_id|label|return_",
                key,
            )
        }
        settings |= {"config": sizes, "model_type": tower.model_type}
    return settings


def _shapes(name: str, given: Tensor, wanted: Tensor, source: Source) -> str:
    return f"{source} does not fit: {name} is {tuple(given.shape)} there and {tuple(wanted.shape)} here"


def _some(names: list[str], count: int = 6) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
