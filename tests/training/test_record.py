"""What a run keeps on record of its losses: spikes, and the first that is not finite."""

from __future__ import annotations

import json

import pytest
import torch

from clipkit.training.progress import Progress
from clipkit.training.record import Record, SpikeRecord
from clipkit.training.speed import Speed


def test_a_loss_spike_is_recorded_with_its_samples(tmp_path, capsys):
    """Thirty losses around 2 (median 2), then 5.9 (not three times as much) and 6.1."""
    spikes = SpikeRecord(tmp_path, 3.0)
    progress = Progress(total=40, every=1)
    for step in range(30):
        spikes.see(step, 2 + (step % 3 - 1) / 10, ["a", "b"], progress)
    spikes.see(30, 5.9, ["c", "d"], progress)
    spikes.see(31, 6.1, ["e", "f"], progress)
    (line,) = (tmp_path / "loss_spikes.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 31, "loss": 6.1, "median": 2.0, "keys": ["e", "f"]}
    assert "loss spike at step 31" in capsys.readouterr().out


def test_early_losses_and_a_factor_of_none_record_nothing(tmp_path):
    progress = Progress(total=40, every=1, enabled=False)
    for factor, start in ((3.0, 1.0), (None, 1.0)):
        spikes = SpikeRecord(tmp_path, factor)
        for step in range(19 if factor else 60):
            spikes.see(step, start * 10 ** (step % 2), [], progress)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", ["loss", "grad_norm"])
def test_what_is_not_finite_is_named_with_the_keys(tmp_path, bad):
    terms = {"loss": torch.tensor(1.5), "infonce": torch.tensor(1.5), "grad_norm": torch.tensor(2.0)}
    record = Record(tmp_path, total_steps=9, speed=Speed(2), log_every=1)
    assert record.finite(3, terms, ["k"]) == {"loss": 1.5, "infonce": 1.5, "grad_norm": 2.0}
    with pytest.raises(RuntimeError, match=f"the {bad} is not finite at step 4"):
        record.finite(4, {**terms, bad: torch.tensor(float("nan"))}, ["k", "l"])
    assert json.loads((tmp_path / "nonfinite_step_4.json").read_text())["keys"] == ["k", "l"]
