"""Wherever clipkit is imported from, its own programs and settings come with it: two checkouts, and a wheel."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Says where everything comes from, and what conf/ composes.
PROBE = """
import clipkit, clipkit.conf, clipkit.recipes
from clipkit.command.compose import compose, register_resolvers
register_resolvers()
for module in (clipkit, clipkit.recipes, clipkit.conf):
    print(module.__file__)
print(compose("pretrain", []).seed)
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """Another checkout, whose conf/ has another seed."""
    other = tmp_path_factory.mktemp("elsewhere") / "clone"
    listed = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        source, target = ROOT / name, other / name
        if name.startswith(("tests/", "benchmarks/results/")) or not os.path.lexists(source):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(os.readlink(source))
        else:
            target.write_bytes(source.read_bytes())
    settings = other / "conf" / "pretrain.yaml"
    text = settings.read_text().replace("\nseed: 0 ", "\nseed: 4711 ")
    assert "4711" in text
    settings.write_text(text)
    for folder in ("recipes", "benchmarks"):
        (other / folder / "probe.py").write_text(PROBE)
    return other


def said(*command: str, folder: Path, path: Path | None = None) -> tuple[set[Path], str]:
    """({the folders that hold clipkit/, its recipes/ and its conf/}, the seed) that a probe prints."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    *files, seed = done.stdout.splitlines()
    package, recipes, conf = (Path(file).parent for file in files)
    return {package.parent, recipes.parent.parent, conf.parent.parent}, seed


@pytest.mark.parametrize("started", ["-c", "-m", "recipes", "benchmarks"])
def test_a_checkout_runs_its_own_code_beside_another_one(copy, tmp_path, started):
    """The other one comes first on the path, as an editable install would put it, or is the one installed."""
    command, folder = {
        "-c": (["-c", PROBE], copy),
        "-m": (["-m", "clipkit.recipes.probe"], copy),
        "recipes": ([str(copy / "recipes" / "probe.py")], tmp_path),
        "benchmarks": ([str(copy / "benchmarks" / "probe.py")], tmp_path),
    }[started]
    assert said(*command, folder=folder, path=ROOT) == ({copy}, "4711")


def test_a_program_of_this_checkout_is_not_taken_for_the_others(copy, tmp_path):
    probe = tmp_path / "probe.py"
    probe.write_text(PROBE)
    assert said(str(probe), folder=copy, path=ROOT) == ({ROOT}, "0")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The folder that a wheel of this checkout unpacks to."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    # From a copy, for setuptools builds beside the sources.
    source = tmp_path_factory.mktemp("source") / "clipkit"
    subprocess.run(["git", "clone", "-q", ROOT, source], check=True)
    done = subprocess.run(
        [*command, "--wheel-dir", str(folder), str(source)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    with zipfile.ZipFile(built) as file:
        file.extractall(folder / "site")
    return folder / "site"


def test_a_wheel_holds_programs_settings_and_types(wheel, copy, tmp_path):
    assert (wheel / "clipkit" / "py.typed").exists()
    assert {path.name for path in (wheel / "clipkit" / "conf").rglob("*.yaml")} == {
        path.name for path in (ROOT / "conf").rglob("*.yaml")
    }
    assert said("-c", PROBE, folder=tmp_path, path=wheel) == ({wheel}, "0")
    # In a checkout's root Python's path begins there: then all of it is the checkout's.
    assert said("-c", PROBE, folder=copy, path=wheel) == ({copy}, "4711")
