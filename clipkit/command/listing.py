"""`clipkit-pretrain ls [GROUP [PATTERN]]`: the groups, their choices, and a line of each from its file's first comment.

Nothing here imports torch, but for the names of timm's models: `ls image_tower PATTERN`.
"""

from __future__ import annotations

import fnmatch
import importlib
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

import yaml

import clipkit
from clipkit.command import plugins
from clipkit.foreign import BrokenFile, read_text, readable
from clipkit.registry import unknown

CONF = Path(clipkit.__file__).parent / "conf"
_COLUMNS = 100


def ls(program: str, arguments: Sequence[str], config_dir: str | None = None) -> str:
    """What `ls` prints.

    Args:
        program: its settings are conf/PROGRAM.yaml.
        arguments: a group, and a pattern of its choices' names (`*` and `?`; none of them: anywhere in a name). Among them
            `plugins=[...]`, whose packages' YAML is listed too.
        config_dir: a folder of the user's own.

    Raises:
        ValueError: an unknown group, an argument too many, or a package that is not there.
    """
    words = [one for one in arguments if "=" not in one]
    overrides = [one for one in arguments if "=" in one]
    foreign = [one for one in overrides if one.partition("=")[0] != plugins.KEY]
    if foreign or len(words) > 2:
        raise ValueError(
            f"ls takes a group, a pattern of names and plugins=[...], not {(foreign or words[2:])[0]!r}: "
            f"clipkit-{program} ls [GROUP [PATTERN]]"
        )
    plugins.search(plugins.given(overrides))
    folders = [CONF, *plugins.folders(), *([Path(config_dir)] if config_dir else [])]
    groups = _groups(program)
    if words and words[0] not in groups:
        raise unknown("group", words[0], groups)
    pattern = words[1] if len(words) > 1 else "*"
    pattern = pattern if re.search(r"[*?\[]", pattern) else f"*{pattern}*"
    shown = words[:1] or list(groups)
    parts = [
        _group(group, groups[group], choices(group, folders), pattern, len(words) > 1) for group in shown
    ]
    if words == ["image_tower"]:
        parts.append(f"timm's names: clipkit-{program} ls image_tower PATTERN, such as 'convnext*'")
    return "\n".join(parts)


def choices(group: str, folders: Sequence[Path]) -> dict[str, str]:
    """{name: its line} of every YAML file of a group, sorted."""
    found = {path.stem: path for folder in folders for path in (folder / group).glob("*.yaml")}
    return {name: line_of(found[name]) for name in sorted(found)}


def line_of(path: Path) -> str:
    """The first sentence of a file's first comment, without commands and hydra's `@package`."""
    try:
        text = read_text(path)
    except (OSError, BrokenFile):
        return "(cannot be read)"
    head = re.match(r"(?:#.*\n?)*", text)
    lines = [line.lstrip("# ").strip() for line in (head[0] if head else "").splitlines()]
    lines = [line for line in lines if not line.startswith("@package")]
    paragraphs = [part.strip() for part in "\n".join(lines).split("\n\n")]
    told = next((part for part in paragraphs if part and not part.startswith("clipkit-")), "")
    inline = re.search(r"\s#\s+(.*)", text)
    joined = " ".join(told.split()) or (inline[1] if inline else "")
    sentence = re.split(r"(?<!\bal)\.\s+(?=[A-Z])", joined)[0].removesuffix(".")
    return readable(sentence)


def _groups(program: str) -> dict[str, list[str]]:
    """{group: the choices that PROGRAM.yaml makes} in its order; of the files that it starts from, too."""
    found: dict[str, list[str]] = {}
    given = yaml.safe_load((CONF / f"{program}.yaml").read_text(encoding="utf-8"))
    for entry in given.get("defaults", []):
        if isinstance(entry, str):
            found |= {} if entry == "_self_" else _groups(entry)
        else:
            for group, name in entry.items():
                if not group.startswith("override "):
                    found[group.lstrip("/")] = name if isinstance(name, list) else [str(name)]
    return found


def _group(group: str, default: list[str], lines: dict[str, str], pattern: str, searched: bool) -> str:
    """A group's heading and a line a choice that matches; of image_tower, timm's names that do as well."""
    kept = {name: line for name, line in lines.items() if fnmatch.fnmatch(name, pattern)}
    width = max((len(name) for name in kept), default=0)
    shown = [f"{group}=  (default: {', '.join(default)})"]
    for name, line in kept.items():
        shown.append(f"  {name:<{width}}  {textwrap.shorten(line, _COLUMNS, placeholder=' ...')}".rstrip())
    if not kept and not searched:
        shown.append("  (none)")
    if searched and group == "image_tower":
        names = importlib.import_module("timm").list_models(pattern)
        shown.append(f"image_tower=timm image_tower.model=  ({len(names)} of timm's match {pattern})")
        shown += [f"  {name}" for name in names]
        kept = {**kept, **dict.fromkeys(names, "")}
    if searched and not kept:
        shown.append(f"  no name matches {pattern}")
    return "\n".join(shown)
