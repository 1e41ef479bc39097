"""The corpus of hostile folders, made from one small run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.hostile.commands import connected, listener
from tests.hostile.make_corpus import make, train


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("corpus") / "as-it-was")


@pytest.fixture
def corpus(template, tmp_path):
    """Makes a kind, and removes it after the test: some are large or deep."""
    server = listener()
    yield lambda name: make(name, template, tmp_path / name, port=server.getsockname()[1])
    assert not connected(server)
    # rmtree goes as deep as Python's stack.
    subprocess.run(["rm", "-rf", tmp_path], check=True)
