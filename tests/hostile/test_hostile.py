"""Nothing runs, leaks, hangs or is lost by a folder from somebody else: every kind of the corpus with its commands."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.hostile.commands import COMMANDS, answer, connected, listener
from tests.hostile.make_corpus import KINDS, make, train

AIMED = [(name, command) for name, kind in KINDS.items() for command in kind.aims]
ALL = [(name, command) for name in KINDS for command in COMMANDS]


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("corpus") / "as-it-was")


@pytest.fixture
def corpus(template, tmp_path):
    """Makes a kind, and removes it after the test: some are large or deep."""
    server = listener()
    yield lambda name: make(name, template, tmp_path / name, port=server.getsockname()[1])
    assert not connected(server)
    shutil.rmtree(tmp_path, ignore_errors=True)


def test_the_corpus_has_the_kinds_that_it_should():
    assert len(KINDS) >= 40 and len(AIMED) >= len(KINDS)
    assert {command for _, command in AIMED} == set(COMMANDS)


@pytest.mark.parametrize(("name", "command"), AIMED)
def test_a_hostile_folder_is_answered(corpus, name, command):
    found = answer(corpus(name), name, command)
    assert not found.faults, f"{found.faults}\n{found.taken}\n{found.output}"


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_every_command_answers_every_kind(corpus, name):
    place, faults = corpus(name), {}
    for command in [command for command in COMMANDS if command != "resume"] + ["resume"]:
        found = answer(place, name, command)
        if found.faults:
            faults[command] = (found.faults, found.output[-2000:])
    assert not faults, faults
