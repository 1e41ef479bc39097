"""The table of tile sizes, its override file and the tuning command's parts that need no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clipkit.kernels import configs, tune
from clipkit.kernels.configs import KINDS, TileConfig

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("dim", [64, 512, 768, 4096])
def test_every_kernel_has_a_configuration_everywhere(kind, capability, dim, monkeypatch):
    monkeypatch.delenv("CLIPKIT_KERNEL_CONFIGS", raising=False)
    config = configs.find(kind, capability, dim)
    # A workspace side is whole tiles, and tensor cores want powers of two.
    assert config.outer % config.block_m == 0 and config.outer % config.block_n == 0
    assert all(side & (side - 1) == 0 for side in (config.block_m, config.block_n, config.block_k))
    # Descriptors are hardware from 9.0 on; taken apart by the compiler they would load without overlap.
    assert config.descriptors == (capability[0] >= 9)


def test_an_override_file_comes_first_and_the_nearest_bucket_wins(tmp_path, monkeypatch):
    wide, narrow = TileConfig(block_m=64), TileConfig(block_m=32)
    path = tmp_path / "found.json"
    configs.write_overrides(path, {("lse_sums", (9, 0), 1024): wide, ("lse_sums", (9, 0), 512): narrow})
    monkeypatch.setenv("CLIPKIT_KERNEL_CONFIGS", str(path))
    assert configs.find("lse_sums", (9, 0), 512) == narrow
    assert configs.find("lse_sums", (9, 0), 576) == wide
    assert configs.find("lse_sums", (8, 0), 512).block_m == 128
    assert configs.find("lse_coef", (9, 0), 512).block_m == 128


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "cannot be read as JSON"),
        (
            json.dumps([{"kind": "lse", "capability": [9, 0], "max_dim": 1, "config": {}}]),
            "an entry needs kind",
        ),
        (
            json.dumps([{"kind": "lse_sums", "capability": [9, 0], "max_dim": 1, "config": {"warps": 4}}]),
            "config takes",
        ),
        (
            json.dumps(
                [{"kind": "lse_sums", "capability": [9, 0], "max_dim": 512, "config": {"outer": 200}}]
            ),
            "multiple of block_m and block_n",
        ),
    ],
)
def test_a_wrong_override_file_is_named(text, message, tmp_path, monkeypatch):
    path = tmp_path / "wrong.json"
    path.write_text(text)
    monkeypatch.setenv("CLIPKIT_KERNEL_CONFIGS", str(path))
    with pytest.raises(ValueError, match=message):
        configs.find("lse_sums", (9, 0), 512)


def run(*command: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_tuning_command_lists_its_candidates_and_refuses_without_a_gpu(tmp_path):
    tune = ("-m", "clipkit.kernels.tune", str(tmp_path / "out.json"))
    listed = run(*tune, "--dry-run", "--kinds", "lse_coef")
    assert listed.returncode == 0 and listed.stdout.count("TileConfig(") > 5
    refused = run(*tune)
    assert (
        refused.returncode != 0 and "CUDA device" in refused.stderr and not (tmp_path / "out.json").exists()
    )
    wrong = run(*tune, "--dry-run", "--kinds", "lse_sum")
    assert "Did you mean 'lse_sums'" in wrong.stderr


@pytest.fixture
def quick(monkeypatch):
    """tune.main that measures nothing: (kind, config) of what it asked for, milliseconds by tile."""
    asked = []

    def measure(self, config):
        asked.append((self.kind, config))
        if config.block_n == 16:
            raise KeyboardInterrupt
        return "too large" if config.block_m == 16 else float(config.block_m + config.group)

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(tune.Problem, "measure", measure)
    return asked


def test_tuning_goes_on_where_it_was_ended_and_keeps_other_entries(quick, tmp_path, monkeypatch, capsys):
    own = tmp_path / "own.json"
    configs.write_overrides(own, {("lse_coef", (0, 0), 64): TileConfig(block_m=64)})
    monkeypatch.setenv("CLIPKIT_KERNEL_CONFIGS", str(own))
    out = tmp_path / "out.json"
    other = {("lse_sums", (9, 0), 512): TileConfig(num_stages=5)}
    configs.write_overrides(out, other)
    command = [str(out), "--rehearse", "--kinds", "lse_coef"]
    # The second candidate ends the process; the same command measures what comes after it, and nothing twice.
    with pytest.raises(KeyboardInterrupt):
        tune.main(command)
    assert configs.read_overrides(out) == other
    before = list(quick)
    tune.main(command)
    assert len(quick) == len(set(quick)) and before == quick[: len(before)]
    found = configs.read_overrides(out)
    assert found.pop(("lse_coef", (0, 0), 32)).block_m == 32 and found == other
    # The user's own entry is where the search starts, and stays where it was.
    assert quick[0] == ("lse_coef", TileConfig(block_m=64))
    assert os.environ["CLIPKIT_KERNEL_CONFIGS"] == str(own)
    assert "too large" in capsys.readouterr().err
    tune.main(command)
    assert len(quick) == len(set(quick))


def test_a_candidate_that_computes_something_else_is_no_candidate(monkeypatch):
    problem = tune.Problem("lse_sums", (0, 0), 8, 4, "cpu")
    x, y = (side.detach().double() for side in (problem.x, problem.y))
    logits = 50 * x @ y.T
    logits.diagonal().fill_(-torch.inf)
    right = [torch.logsumexp(logits, 1).float(), torch.logsumexp(logits, 0).float(), x.half(), y.half()]

    def results(self):
        wrong = configs.find("lse_sums", (0, 0), 4) == TileConfig(block_m=64)
        return [*right[:2], right[2] * 1.01 if wrong else right[2], *right[3:]]

    monkeypatch.setattr(tune.Problem, "results", results)
    monkeypatch.setattr(tune.Problem, "_time", lambda self, repeats: 1.0)
    assert problem.measure(TileConfig(block_m=32)) == 1.0
    assert "differs from the table's entry by 1.0e-02" in str(problem.measure(TileConfig(block_m=64)))
    # What it starts from is held against the definition.
    right[0] = right[0] + 0.1
    problem.expected = None
    with pytest.raises(SystemExit, match="against float64"):
        problem.measure(TileConfig(block_m=32))
