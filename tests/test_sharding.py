"""Checkpoints of tensors that are split over ranks: whole again, split anew, and lost to a full disk without
harm.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from clipkit.checkpoint import latest_checkpoint, load_checkpoint, verify
from tests.processes import launch
from tests.sharding_cases import fill_the_disk, loaded_parts, save_and_go_on, statistics_of_rank_0


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder with a checkpoint of two ranks, and what they held when they asked for it."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, launch(save_and_go_on, 2, str(folder))[0]


def test_what_ranks_saved_is_whole_and_as_it_was_when_saved(saved):
    """Two ranks train on while their copies are written: the file holds the moment of the call."""
    folder, expected = saved
    path = latest_checkpoint(folder)
    loaded = load_checkpoint(path)
    assert (
        loaded["step"] == 5 and loaded["metrics"] == {"recall": 0.25} and loaded["train_state"] == {"lr": 0.1}
    )
    found = {**loaded["weights"], **loaded["optimizer"]}
    assert found.keys() == expected.keys() and any(name.startswith("optimizer.") for name in found)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_rank_reads_its_part_alone(saved, ranks):
    """Saved by two ranks, read by one, two and three: the parts make up the tensor, and no rank holds more
    than its own.
    """
    folder, expected = saved
    parts = launch(loaded_parts, ranks, str(latest_checkpoint(folder)))
    name = "model.0.weight"
    assert torch.equal(torch.cat([part[name] for part in parts]), expected[name])
    if ranks > 1:
        assert max(len(part[name]) for part in parts) < len(expected[name])


def test_a_flipped_byte_in_a_shard_is_found(tmp_path, saved):
    path = Path(shutil.copytree(latest_checkpoint(saved[0]), tmp_path / "step_00000005"))
    file = sorted((path / "shards").iterdir())[0]
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert (
        verify(path)
        == f"shards/{file.name} does not have the content its manifest states (truncated or altered)"
    )


def test_a_full_disk_is_an_os_error_on_every_rank_and_leaves_the_good_one(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", small], capture_output=True
        ).returncode
    ):
        pytest.skip("mounting a tmpfs needs root, and a machine that allows it")
    try:
        outcomes = launch(fill_the_disk, 2, str(small))
        assert all(
            "could not be written" in outcome and "No space left" in outcome for outcome in outcomes
        ), outcomes
        assert all("Traceback" not in outcome for outcome in outcomes), outcomes
        assert [path.name for path in Path(small).iterdir()] == ["step_00000001"]
        assert verify(small / "step_00000001") is None
    finally:
        subprocess.run(["umount", small], check=True)


def test_running_statistics_are_rank_0s_on_every_rank():
    """Rank r starts from r + 1 in what is not split; what is split stays its own."""
    assert launch(statistics_of_rank_0, 2) == [(1.0, 1.0), (1.0, 2.0)]
