"""What `import clipkit` promises: every public name is there, and none costs anything before it is used."""

from __future__ import annotations

import configparser
import subprocess
import sys
from importlib import import_module
from pathlib import Path

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
