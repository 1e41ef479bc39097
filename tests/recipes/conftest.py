"""What the recipe tests share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> str:
    """One small set of drawn shapes for every run."""
    return f"data.shapes.folder={tmp_path_factory.mktemp('shapes')}"
