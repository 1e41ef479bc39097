"""What `import clipkit` promises: every public name is there, and none costs anything before it is used; and
that imports among clipkit's own modules go one way, by the syntax tree of every file.
"""

from __future__ import annotations

import ast
import configparser
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest

import clipkit

ROOT = Path(__file__).resolve().parent.parent


def test_every_public_name_is_there():
    for name in clipkit.__all__:
        assert callable(getattr(clipkit, name)), name


def test_importing_clipkit_imports_nothing_else():
    program = "import sys, clipkit; print(sorted({'torch', 'numpy', 'timm', 'hydra'} & set(sys.modules)))"
    assert (
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_setup_cfg_packages_every_folder_with_code():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    named = set(config["options"]["packages"].split())
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "clipkit").rglob("*.py")}
    assert found <= named


def test_every_console_command_has_its_program():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    commands = [
        line.split(" = ") for line in config["options.entry_points"]["console_scripts"].strip().splitlines()
    ]
    assert len(commands) >= 2
    for _, target in commands:
        module, function = target.split(":")
        assert callable(getattr(import_module(module), function)), target


class Import(NamedTuple):
    """One imported name of a module of ours, or one other package."""

    module: str
    target: str
    in_function: bool


def named(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


# clipkit/recipes is a link to recipes; own_trainer shows other people's loops.
MODULES = {
    named(path): ast.parse(path.read_text(encoding="utf-8"))
    for folder in ("clipkit", "recipes")
    for path in (ROOT / folder).rglob("*.py")
    if "own_trainer" not in path.parts and not any(parent.is_symlink() for parent in path.parents)
}


def statements(
    node: ast.AST, in_function: bool = False
) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import and whether a function holds it, without what only a type checker or `python FILE` runs."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, in_function
        elif not (
            isinstance(child, ast.If)
            and ast.unparse(child.test) in ("TYPE_CHECKING", "__name__ == '__main__'")
        ):
            yield from statements(child, in_function or isinstance(child, ast.FunctionDef))


def imports(module: str) -> Iterator[Import]:
    for statement, in_function in statements(MODULES[module]):
        if isinstance(statement, ast.ImportFrom):
            assert statement.level == 0, f"{module} has a relative import"
            names = [f"{statement.module}.{alias.name}" for alias in statement.names]
            targets = {name if ours(name) in MODULES else statement.module for name in names}
        else:
            targets = {alias.name for alias in statement.names}
        for target in targets:
            yield Import(module, ours(target), in_function)


def ours(name: str) -> str:
    """clipkit.recipes.X is recipes.X."""
    return name.removeprefix("clipkit.") if f"{name}.".startswith("clipkit.recipes.") else name


IMPORTS = [one for module in MODULES for one in imports(module)]

# What a part of clipkit may import of the others; towers, say, know nothing of the model that holds them.
MAY_IMPORT = {
    "files": "",
    "foreign": "",
    "registry": "",
    "kinds": "",
    "settings": "kinds",
    "distributed": "",
    "kernels": "registry",
    "towers": "registry",
    "data": "files foreign registry",
    "grad_cache": "registry",
    "loggers": "files foreign registry",
    "sharding": "distributed",
    "optim": "registry towers",
    "losses": "distributed grad_cache kernels registry",
    "model": "distributed loggers registry towers",
    "checkpoint": "data distributed files foreign sharding",
    "sources": "checkpoint data files foreign loading loggers model registry settings towers",
    "loading": "checkpoint data foreign model settings towers",
    "export": "data foreign model sources",
    "evals": "data distributed foreign loading loggers losses model registry sources",
    "merging": "data foreign loading model settings towers",
    "predict": "data evals foreign",
    "planner": "kernels loading losses model optim",
    "reports": "evals files foreign loading settings",
    "training": "checkpoint data distributed evals files foreign loading loggers losses model optim planner registry settings sharding sources towers",
    "command": "data files foreign kinds loggers recipes registry reports settings training",
}


def part(module: str) -> str:
    """kernels of clipkit.kernels.ops; recipes; an empty string for clipkit itself."""
    return (module if module.startswith("recipes") else module.partition(".")[2]).partition(".")[0]


def test_imports_go_one_way():
    parts = {part(module) for module in MODULES} - {"", "recipes"}
    assert parts == set(MAY_IMPORT), "a new part of clipkit says here what it may import"
    for one in IMPORTS:
        own, other = part(one.module), part(one.target)
        if own in MAY_IMPORT and one.target.startswith(("clipkit.", "recipes")) and other != own:
            assert other in MAY_IMPORT[own].split(), one


def test_the_ways_of_imports_have_no_circle():
    ways = {own: {o for o in others.split() if o != "recipes"} for own, others in MAY_IMPORT.items()}
    list(graphlib.TopologicalSorter(ways).static_order())


def test_modules_have_no_circle():
    """At module level, where a circle makes what is there depend on who came first."""
    graph = {module: set() for module in MODULES}
    for one in IMPORTS:
        if not one.in_function and one.target in MODULES:
            graph[one.module].add(one.target)
    list(graphlib.TopologicalSorter(graph).static_order())


def test_only_the_command_imports_hydra():
    for one in IMPORTS:
        if one.target.partition(".")[0] in ("hydra", "omegaconf"):
            assert part(one.module) == "command", one


def test_no_program_imports_another():
    for one in IMPORTS:
        if part(one.module) == "recipes":
            assert part(one.target) != "recipes" or one.target == "recipes", one


# Not asked for by setup.cfg's install_requires, and said with the pip command where they are missing.
OPTIONAL = ("peft", "pillow_heif", "pyarrow", "sklearn")


def test_few_imports_hide_in_functions():
    """Those are for what costs seconds, what not every machine has, and what the command line must do without."""
    hidden = [
        one
        for one in IMPORTS
        if one.in_function and part(one.module) != "command" and one.target.partition(".")[0] not in OPTIONAL
    ]
    hidden_stdlib = [one for one in hidden if one.target in sys.stdlib_module_names]
    # fcntl is not on Windows.
    assert {one.target for one in hidden_stdlib} <= {"fcntl"}
    assert len(hidden) <= 40, hidden


# The command line answers a TAB or a typo in a fraction of a second.
LIGHT = (
    "command", "settings", "files", "registry", "training.run_folder", "training.progress", "data.spec",
    "data.synthetic", "reports.runs", "reports.comparison", "reports.findings", "reports.study", "reports.page",
    "reports.charts",
)  # fmt: skip


@pytest.mark.parametrize("name", LIGHT)
def test_what_the_command_line_reads_is_light(name):
    """No path of module-level imports leads from it to torch or numpy."""
    seen, left = set(), [module for module in MODULES if f"{module}.".startswith(f"clipkit.{name}.")]
    assert left
    while left:
        module = left.pop()
        if module in seen:
            continue
        seen.add(module)
        for one in IMPORTS:
            if one.module == module and not one.in_function:
                assert one.target.partition(".")[0] not in ("torch", "numpy"), one
                left += [one.target] if one.target in MODULES else []
