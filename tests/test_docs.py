"""Every command that a docstring, a guide or a YAML header shows is one that the program takes today.

Nothing is run: settings are composed and checked in this process as clipkit.command does before a job starts, and
argparse programs parse the arguments they are shown with. Links lead to files, and Python in guides compiles; the
examples of losses run.
"""

from __future__ import annotations

import argparse
import ast
import configparser
import inspect
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from clipkit import Predictor
from clipkit.command import _hydras, jobs, plugins
from clipkit.command.check import check_overrides, explain
from clipkit.command.compose import compose, fixed, is_hydras, register_resolvers, resolved, start_hydra
from clipkit.command.listing import ls
from clipkit.data import write_shapes
from clipkit.evals import evaluate, list_tasks
from clipkit.evals.tasks import _TASKS
from clipkit.losses import create_loss, list_losses
from clipkit.losses.registry import losses
from clipkit.towers import create_image_tower
from clipkit.towers.registry import image_towers, text_towers

ROOT = Path(__file__).resolve().parent.parent
GUIDES = [
    path
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("[!.]*/**/*.md")])
    if not {"results", "runs", ".venv"} & set(path.relative_to(ROOT).parts)
    # clipkit/recipes and clipkit/conf are links to folders that are read already.
    and path.parent.resolve() == path.parent
]
SOURCES = [
    *sorted(path for folder in ("recipes", "benchmarks") for path in (ROOT / folder).rglob("*.py")),
    *sorted(path for path in (ROOT / "clipkit").rglob("*.py") if path.resolve() == path),
    *sorted((ROOT / "conf").rglob("*.yaml")),
    *GUIDES,
]
REGISTRIES = (losses, _TASKS, image_towers, text_towers)
# Programs whose settings hydra composes, by their file; the others have a parser.
HYDRAS = ("pretrain", "evaluate", "export", "plan")
COMMAND = re.compile(
    r"(?:[A-Z_]+=\S+ )*"
    r"(?:clipkit-\w+(?=\s|$)|python (?:recipes|benchmarks)/|python -m clipkit\.|torchrun .*\brecipes/)"
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# A block that is a whole file: the words before it end with the file's name.
FILE = re.compile(r"`([\w./]+)`:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def joined(text: str) -> list[str]:
    """The lines, those ended by a backslash joined with the next."""
    return re.sub(r"\\\n\s*", "", text).splitlines()


def commands_in(lines: list[str]) -> list[str]:
    """The lines that are commands, bare of prompts and comments; "... more" is the command before, and more."""
    found: list[str] = []
    whole = ""
    for line in lines:
        line = re.sub(r"(?:^|\s{2,})#.*$", "", line.strip().removeprefix("$ ")).strip()
        if COMMAND.match(line):
            whole = line
            found.append(line)
        elif line.startswith("... ") and whole:
            found.append(f"{whole} {line[4:]}")
        elif " && clipkit-" in line:
            found.append("clipkit-" + line.split(" && clipkit-", 1)[1])
    return found


def docstrings(text: str) -> str:
    """A Python file's docstrings, as Python has them."""
    nodes = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    return "\n".join(filter(None, (ast.get_docstring(node) for node in nodes)))


@cache
def commands(path: Path) -> list[str]:
    """Every command that a file shows."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        # A sentence may begin with a command's name; a command to type is indented.
        return commands_in([line for line in joined(docstrings(text)) if line.startswith("    ")])
    if path.suffix == ".yaml":
        remarks = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
        spans = re.findall(r"`(clipkit-\w+ [^`\n]+)`", "\n".join(remarks))
        # What may be left out stands in brackets.
        return commands_in(remarks) + commands_in([re.sub(r"\s\[[^\]]*\]", "", span) for span in spans])
    blocks = [line for _, block in FENCE.findall(text) for line in joined(block)]
    spans = re.findall(r"`(clipkit-\w+ [^`\n]+)`", FENCE.sub("", text))
    return commands_in(blocks) + commands_in(spans)


def words(command: str) -> list[str]:
    """A command's words, without those that stand for more ("loss=...") and the file that the output goes to."""
    return [word for word in shlex.split(re.sub(r" > \S+$", "", command)) if "..." not in word]


@cache
def console() -> dict[str, Path]:
    """The console commands' programs."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = setup["options.entry_points"]["console_scripts"].strip().splitlines()
    targets = dict(line.split(" = ") for line in lines)
    program = {name: target.split(":") for name, target in targets.items()}
    return {
        name: ROOT
        / "recipes"
        / f"{function if module == 'clipkit.command' else module.rpartition('.')[2]}.py"
        for name, (module, function) in program.items()
    }


def program_of(command: str) -> tuple[Path, list[str]]:
    """The file that a command runs, and the words after it."""
    given = words(command)
    while re.fullmatch(r"[A-Z_]+=.*", given[0]):
        given.pop(0)
    if given[0] == "torchrun":
        # Its own options come first.
        given = given[next(at for at, word in enumerate(given) if word.endswith(".py")) :]
    elif given[:2] == ["python", "-m"]:
        given = [given[2].replace(".", "/") + ".py", *given[3:]]
    elif given[0] == "python":
        given = given[1:]
    path = console()[given[0]] if given[0] in console() else ROOT / given[0]
    assert path.is_file(), f"{command}: there is no program {given[0]}"
    return path.resolve(), given[1:]


# Jobs that were found right: files show the same commands.
taken: set[tuple[str, ...]] = set()


def hydra_takes(program: str, arguments: list[str], config_dir: Path | None = None) -> None:
    """What `clipkit.command.run` checks of a command line before a job starts, for every job of a sweep.

    Args:
        config_dir: the folder of settings beside conf/, also for --config-dir.
    """
    if program == "plan":
        arguments = [_hydras(word) for word in arguments]
    given = get_args_parser().parse_args(arguments)
    register_resolvers()
    loader = start_hydra(str(config_dir) if config_dir else None)
    if given.help or given.info:
        return
    own = [entry for entry in given.overrides if not is_hydras(entry)]
    every = [own]
    if given.multirun:
        cfg = compose(program, fixed(given.overrides), mode=RunMode.MULTIRUN)
        search = cfg.hydra.runtime.choices["hydra/sweeper"] != "basic"
        every = [fixed(own)] if search else jobs.expand(own, loader)
    for overrides in every:
        job = (program, *overrides)
        if job in taken and not config_dir:
            continue
        try:
            cfg = compose(program, overrides)
            check_overrides(cfg, program, overrides)
            config = resolved(cfg, program)
            if program in ("pretrain", "plan"):
                create_loss(config["loss"])
        except Exception as error:
            raise AssertionError(f"{' '.join(overrides)}: {explain(error, program)}") from error
        taken.add(job)


class Parsed(Exception):
    """Carries a program's parser out of its main()."""


@cache
def parser_of(path: Path) -> argparse.ArgumentParser:
    """The parser that a program's main() builds, caught when it is about to parse."""

    def caught(self: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        raise Parsed(self)

    before, modules = list(sys.path), set(sys.modules)
    parse_args = argparse.ArgumentParser.parse_args
    # Programs import what lies beside them.
    sys.path.insert(0, str(path.parent))
    argparse.ArgumentParser.parse_args = caught
    try:
        runpy.run_path(str(path), run_name="shown")["main"]()
    except Parsed as parsed:
        return parsed.args[0]
    finally:
        argparse.ArgumentParser.parse_args = parse_args
        sys.path[:] = before
        for name in set(sys.modules) - modules:
            beside = getattr(sys.modules[name], "__file__", None)
            if beside and Path(beside).parent == path.parent and "." not in name:
                del sys.modules[name]
    raise AssertionError(f"{path} parses no arguments")


def sweep_overrides(path: Path, given: argparse.Namespace) -> list[list[str]]:
    """The overrides that clipkit-sweep and clipkit-study hand to clipkit-pretrain."""
    if path.stem == "sweep":
        return jobs.expand(given.overrides, start_hydra()) if given.overrides else []
    experiment = {"mini": "study_mini", "cc3m": "study_cc3m"}[given.scale]
    return [] if given.table else [[f"experiment={experiment}", *given.overrides]]


def takes(command: str, config_dir: Path | None = None) -> None:
    """AssertionError for a command that its program would refuse."""
    path, arguments = program_of(command)
    if path.parent == ROOT / "recipes" and path.stem in HYDRAS:
        if arguments[:1] == ["ls"]:
            assert "no name matches" not in ls(path.stem, arguments[1:])
            return
        hydra_takes(path.stem, arguments, config_dir)
        return
    try:
        given = parser_of(path).parse_args(arguments)
    except SystemExit as end:
        assert end.code == 0, f"{command}: the program does not take these arguments"
        return
    if path.stem in ("sweep", "study"):
        for overrides in sweep_overrides(path, given):
            hydra_takes("pretrain", overrides)


@pytest.fixture(scope="module", autouse=True)
def references():
    """What overrides are compared with is composed once for each choice of groups: half of the time."""
    known: dict[tuple[str, ...], Any] = {}

    def once(program: str, overrides: list[str]) -> Any:
        key = (program, *overrides)
        if key not in known:
            known[key] = compose(program, overrides)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clipkit.command.check.compose", once)
        yield
    GlobalHydra.instance().clear()


@pytest.fixture(scope="module", autouse=True)
def my_package(tmp_path_factory):
    """The plugin that the guides speak of."""
    folder = tmp_path_factory.mktemp("plugin") / "my_package"
    (folder / "conf" / "loss").mkdir(parents=True)
    for path in (folder / "__init__.py", folder / "conf" / "__init__.py"):
        path.touch()
    (folder / "losses.py").write_text(
        "from clipkit.losses import InfoNCE\nfrom clipkit.losses.registry import register_loss\n\n\n"
        "@register_loss('my_loss')\nclass MyLoss(InfoNCE):\n    pass\n"
    )
    (folder / "conf" / "loss" / "my_loss.yaml").write_text("my_loss:\n  weight: 1.0\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder.parent)
        patch.setattr(plugins, "_packages", [])
        plugins.search(["my_package.losses"])
        plugins.load(["my_package.losses"])
        yield
        # Others of this process walk through all losses.
        del losses._entries["my_loss"]


def with_commands() -> list[Path]:
    return [path for path in SOURCES if commands(path)]


@pytest.mark.parametrize("path", with_commands(), ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_shown_are_taken(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with written(path, tmp_path) as config_dir:
        for command in commands(path):
            try:
                takes(command, config_dir)
            except (Exception, SystemExit) as error:
                pytest.fail(
                    f"{path.relative_to(ROOT)} shows\n    {command}\n{error}\n{capsys.readouterr().err}"
                )


@contextmanager
def written(path: Path, folder: Path) -> Iterator[Path | None]:
    """The files that a guide tells its reader to write are there inside: settings in the folder that is given,
    as if in conf/, and what the library's new files register. None where there are no settings to write.
    """
    blocks = FILE.findall(path.read_text(encoding="utf-8")) if path.suffix == ".md" else []
    (folder / "mine").mkdir()
    before = {registry: dict(registry._entries) for registry in REGISTRIES}
    try:
        for name, block in blocks:
            if name.endswith(".yaml"):
                file = folder / "mine" / Path(*Path(name).parts[1:])
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(block, encoding="utf-8")
            elif name.startswith("clipkit/"):
                exec(compile(block, name, "exec"), {"__name__": "shown"})
        yield folder / "mine" if any((folder / "mine").iterdir()) else None
    finally:
        for registry, entries in before.items():
            registry._entries.clear()
            registry._entries.update(entries)


def test_the_walk_finds_every_program_and_the_ways_of_writing_one():
    shown = {program_of(command)[0] for path in with_commands() for command in commands(path)}
    assert shown >= set(console().values())
    lines = [
        "$ clipkit-report runs/a \\",
        "    --title 'x'  # a remark",
        "torchrun -n 2 recipes/pretrain.py a=1",
    ]
    assert commands_in(joined("\n".join([*lines, "... b=2", "clipkit-plan says"]))) == [
        "clipkit-report runs/a --title 'x'",
        "torchrun -n 2 recipes/pretrain.py a=1",
        "torchrun -n 2 recipes/pretrain.py a=1 b=2",
        "clipkit-plan says",
    ]


@pytest.mark.parametrize(
    "command",
    [
        "clipkit-pretrain los=clip",
        "clipkit-pretrain -m loss=clip,cyclp",
        "clipkit-pretrain loss.infonce.wieght=2",
        "clipkit-evaluate checkpoint=a evil=sts",
        "clipkit-sweep seeds=0,1",
        "clipkit-report runs --ouput page.html",
        "python recipes/sweeps.py seed=0,1",
        "torchrun --nproc-per-node=2 recipes/pretrain.py batchsize=2",
    ],
)
def test_a_wrong_command_is_found(command):
    with pytest.raises((AssertionError, KeyError)):
        takes(command)


def test_no_docstring_has_a_command_that_goes_on_in_the_next_line():
    """Re-wrapping joins a command's line with what follows: a block's line then begins with no command."""
    for path in SOURCES:
        if path.suffix != ".py":
            continue
        for line in docstrings(path.read_text(encoding="utf-8")).splitlines():
            inside = re.search(r"\S.*\s(?:torchrun --|python (?:recipes|benchmarks)/\S+\.py)", line)
            told = re.search(r"[`(]|#|&&|^\s*(?:[A-Z_]+=\S+ )*(?:torchrun|python)\b", line)
            assert not inside or told, f"{path.relative_to(ROOT)}: {line}"


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_python_compiles(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", FENCE.sub("", text)):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), f"{path.relative_to(ROOT)} links to {target}"
    for language, block in FENCE.findall(text):
        if language == "python":
            compile(block, str(path), "exec")


def test_the_readme_has_no_relative_link():
    """A package index shows it where no file lies beside it."""
    text = FENCE.sub("", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert not [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]


def test_files_that_guides_name_are_there():
    """Names in back quotes that look like a path of this repository, but for those that a guide lets its reader write."""
    new = {name for path in GUIDES for name, _ in FILE.findall(path.read_text(encoding="utf-8"))}
    for path in GUIDES:
        text = FENCE.sub("", path.read_text(encoding="utf-8"))
        for name in re.findall(
            r"`((?:clipkit|conf|recipes|benchmarks|tests|\.ci|\.github)/[\w./\-]*)`", text
        ):
            assert name in new or (ROOT / name).exists(), f"{path.relative_to(ROOT)} names {name}"


@pytest.mark.parametrize("path", ["README.md", "clipkit/losses/README.md"])
def test_the_examples_of_losses_run(path):
    """Blocks of Python in their order, but those that are files to write."""
    files = [block for _, block in FILE.findall((ROOT / path).read_text(encoding="utf-8"))]
    blocks = [
        block
        for language, block in FENCE.findall((ROOT / path).read_text(encoding="utf-8"))
        if language == "python" and "clipkit.losses" in block and block not in files
    ]
    assert blocks
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "shown"}
    for block in blocks:
        exec(compile(block, path, "exec"), names)
    for value in (names["loss"], *names["terms"].values()):
        assert value.shape == () and value.isfinite()


class Colours:
    """A model for a task: an image is its mean colour, a text the number of its letters a, b and c."""

    image_tower = SimpleNamespace(image_size=8)

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(image.float().mean(dim=(2, 3)), dim=-1)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(tokens.float() + 1, dim=-1)


def letters(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[text.count(letter) for letter in "abc"] for text in texts])


def test_what_the_guides_add_works(tmp_path):
    """The loss, the task and the tower of the guides, made from the settings they show."""
    for name in ("losses", "evals", "towers"):
        (tmp_path / name).mkdir()
        with written(ROOT / "clipkit" / name / "README.md", tmp_path / name) as folder:
            (file,) = folder.rglob("*.yaml")
            given = yaml.safe_load(file.read_text(encoding="utf-8"))
            if name == "losses":
                x, y = torch.nn.functional.normalize(torch.randn(2, 5, 4, dtype=torch.float64), dim=-1)
                terms = create_loss(given)({"image_features": x, "text_features": y})
                assert terms["loss"].item() == pytest.approx((x - y).square().sum(1).mean().item())
            elif name == "evals":
                shards = write_shapes(tmp_path / "shapes", train=8, val=12, seed=0)["val"]
                given[file.stem]["shards"] = shards
                (share,) = evaluate(Colours(), letters, given)[file.stem].values()
                assert 0 <= share <= 1
            else:
                tower = create_image_tower({**given, "freeze": 1}, embed_dim=8)
                assert tower(torch.randn(2, 3, 32, 32)).shape == (2, tower.width)
                frozen = [name for name, one in tower.named_parameters() if not one.requires_grad]
                assert frozen == ["layers.0.0.weight", "layers.0.0.bias"]
                tower.set_activation_checkpointing()


def table(path: str) -> dict[str, str]:
    """First cell to the rest, of the rows of a guide's tables whose first cell is one name."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return dict(re.findall(r"^\| `([\w-]+)` \| (.*) \|$", text, re.MULTILINE))


def test_tables_name_what_there_is():
    """No row is of a loss, a task or a choice that is gone; a new one is not forced to have a row."""
    assert {"infonce", "simcse"} <= set(table("clipkit/losses/README.md")) <= set(list_losses())
    assert {"retrieval", "sts"} <= set(table("clipkit/evals/README.md")) <= set(list_tasks())
    assert set(table("recipes/README.md")) >= set(console())
    guide = table("conf/README.md")
    for group in ("data", "image_tower", "text_tower", "loss", "optim", "eval", "logger", "gpu", "debug"):
        for name in re.findall(r"`(\w+)`", guide[group]):
            assert (ROOT / "conf" / group / f"{name}.yaml").is_file(), f"{group}={name}"


def test_every_result_file_has_its_line():
    guide = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "benchmarks" / "results").iterdir():
        assert f"(results/{path.name})" in guide, path.name


def test_the_five_lines_of_the_predictor_name_what_it_has():
    guide = (ROOT / "clipkit" / "evals" / "README.md").read_text(encoding="utf-8")
    calls = re.findall(r"predictor\.(\w+)\(", guide)
    assert calls and all(inspect.isfunction(getattr(Predictor, name)) for name in calls)
