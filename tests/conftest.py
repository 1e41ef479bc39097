"""Shared fixtures: where the real data is, and an offline, quiet process for every test."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import processes
from tests.processes import ROOT

# Tests run side by side, a process a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test may reach a hub; set before anything imports a library that would try.
os.environ.update({"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"})
# Whatever tests start runs this checkout's code, wherever another may be installed.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
).rstrip(os.pathsep)


@pytest.fixture(autouse=True)
def no_process_outlives_its_test() -> Iterator[None]:
    yield
    processes.end_started()


@pytest.fixture(autouse=True)
def hydra_is_left_as_it_was() -> Iterator[None]:
    """Tests start hydra as the command line does, which does so once a process."""
    yield
    if "hydra" in sys.modules:
        sys.modules["hydra.core.global_hydra"].GlobalHydra.instance().clear()


@pytest.fixture(scope="session")
def test_data() -> Callable[[str], Path]:
    """`test_data("flickr8k-mini/val")` is that folder of real data, or a skip that says how to bring it."""
    root = Path(os.environ.get("CLIPKIT_TEST_DATA", ROOT.parent / "shared" / "data"))

    def find(name: str) -> Path:
        path = root / name
        if not path.exists():
            pytest.skip(f"{name} is not under {root}: set CLIPKIT_TEST_DATA to the folder that holds it")
        return path

    return find


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that the workers end together."""
    items.sort(key=lambda item: item.path.parent.name != "recipes")


def pytest_sessionfinish() -> None:
    processes.stop_server()
