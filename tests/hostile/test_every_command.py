"""Every command on every kind of the corpus: one half. Two files, for two processes to share them."""

from __future__ import annotations

import pytest

from tests.hostile.commands import COMMANDS, answer
from tests.hostile.make_corpus import KINDS


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(KINDS)[::2])
def test_every_command_answers_every_kind(corpus, name):
    place, faults = corpus(name), {}
    # The last one goes on with the run, and changes it.
    for command in COMMANDS:
        found = answer(place, name, command)
        if found.faults:
            faults[command] = (found.faults, found.output[-2000:])
    assert not faults, faults
