"""Every command on every kind of the corpus: one half. Two files, for two processes to share them."""

from __future__ import annotations

import pytest

from tests.hostile.commands import check_every_command
from tests.hostile.make_corpus import KINDS


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(KINDS)[::2])
def test_every_command_answers_every_kind(corpus, name):
    check_every_command(corpus(name), name)
