"""What a run says of its speed: seconds counted by hand, operations by torch's own counter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

import clipkit.conf
from clipkit.data import create_tokenizer
from clipkit.loading import model_config
from clipkit.model import create_model
from clipkit.planner import known_gpus, peak_tflops
from clipkit.training import speed
from clipkit.training.speed import Speed, create_speed

CONFIG = {
    "embed_dim": 32,
    "image_tower": {"name": "timm", "model": "test_resnet", "pretrained": False, "image_size": 32},
    "text_tower": {"name": "transformer", "width": 32, "layers": 2, "heads": 2, "mlp_ratio": 4.0},
    "loss": {"infonce": {}},
    "data": {"sentences": None},
    "precision": "fp32",
    "batch_size": 6,
    "count_flops": True,
}


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(speed.time, "monotonic", lambda: now[0])
    return now


def take(one: Speed, clock: list[float], steps: int, *, wait: float, work: float) -> None:
    for _ in range(steps):
        with one.waiting():
            clock[0] += wait
        clock[0] += work


def test_saving_and_scoring_are_no_steps_time(clock):
    """Four steps of 0.1 s waiting and 0.4 s work with 7 s of saving among them: 2 s for 4 x 8 pairs."""
    one = Speed(8)
    one.start(20)
    # Before the first batch a run that resumes may be scored.
    with one.paused():
        clock[0] += 50
    take(one, clock, 2, wait=0.1, work=0.4)
    assert one.pairs_per_second(22) == pytest.approx(16)
    with pytest.raises(KeyError), one.paused():
        clock[0] += 7
        raise KeyError
    take(one, clock, 2, wait=0.1, work=0.4)
    found = one.entry(24)
    assert found["pairs_per_second"] == pytest.approx(16) and found["step_seconds"] == pytest.approx(0.5)
    assert found["data_seconds"] == pytest.approx(0.1) and found["data_fraction"] == pytest.approx(0.2)
    assert not {"tflops", "mfu", "peak_device_memory_gb"} & set(found)
    # The next interval knows nothing of this one; what is written after an entry is nobody's time either.
    with one.paused():
        clock[0] += 3
    take(one, clock, 1, wait=1.0, work=1.0)
    found = one.entry(25)
    assert found["pairs_per_second"] == pytest.approx(4) and found["data_fraction"] == pytest.approx(0.5)


def test_the_share_of_the_peak_is_operations_by_seconds_by_peak(clock, monkeypatch):
    """3e12 operations a step of 0.5 s are 6 TFLOP/s, a quarter of 24."""
    one = Speed(8, flops=3e12)
    monkeypatch.setattr(one, "_peak", lambda: 24.0)
    one.start(0)
    take(one, clock, 2, wait=0.25, work=0.25)
    found = one.entry(2)
    assert found["tflops"] == pytest.approx(6) and found["mfu"] == pytest.approx(0.25)


def test_the_operations_are_those_that_torch_counts_in_a_step():
    """The towers' forward and backward, run in full; a checkpointed tower asks for no more, and no number is drawn."""
    tokenizer = create_tokenizer({"name": "words", "context_length": 8}, captions=["a red star", "a circle"])
    checkpointed = {**CONFIG, "text_tower": {**CONFIG["text_tower"], "activation_checkpointing": True}}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = create_speed(checkpointed, tokenizer, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    one.start(0)
    with one.waiting():
        pass
    found = one.entry(1)
    # No peak of a CPU is known.
    assert "mfu" not in found

    model = create_model(model_config(CONFIG, pretrained=False), tokenizer=tokenizer).train()
    text = tokenizer(["a red star"] * 6)
    with FlopCounterMode(display=False) as counter:
        image_features = model.encode_image(torch.zeros(6, 3, 32, 32, dtype=torch.uint8))
        (image_features.sum() + model.encode_text(text).sum()).backward()
    counted = found["tflops"] * found["step_seconds"] * 1e12
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_a_rank_takes_its_share_of_the_operations(monkeypatch):
    tokenizer = create_tokenizer({"name": "words", "context_length": 8}, captions=["a red star"])
    batch_size = CONFIG["batch_size"]
    third = speed.step_flops({**CONFIG, "batch_size": batch_size // 3}, tokenizer)
    monkeypatch.setattr(speed, "world_size", lambda: 3)
    assert speed.step_flops({**CONFIG, "batch_size": batch_size // 3 * 3}, tokenizer) == third


def test_what_cannot_be_counted_is_said_and_left_out(monkeypatch):
    tokenizer = create_tokenizer({"name": "words", "context_length": 8}, captions=["a red star"])

    def fail(*_):
        raise NotImplementedError("no fake kernel")

    monkeypatch.setattr(speed, "step_flops", fail)
    with pytest.warns(UserWarning, match="no fake kernel"):
        one = create_speed(CONFIG, tokenizer, torch.device("cpu"))
    one.start(0)
    with one.waiting():
        pass
    assert "tflops" not in one.entry(1)
    # On a CPU only where it is asked for.
    create_speed({**CONFIG, "count_flops": None}, tokenizer, torch.device("cpu"))


def test_peaks_are_the_datasheets_of_parts_known_by_name():
    assert peak_tflops("NVIDIA H100 80GB HBM3", "bf16") == 989
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "tf32") == 156
    assert peak_tflops("NVIDIA GeForce RTX 4090", "fp32") == 82.6
    # Slower parts of the same family, and a part of a divided one.
    for other in ("NVIDIA H100 PCIe", "NVIDIA H200 MIG 1g.18gb", "NVIDIA GeForce RTX 4090 D", "Tesla T4"):
        assert peak_tflops(other, "bf16") is None
    files = [yaml.safe_load(path.read_text()) for path in Path(clipkit.conf.__path__[0]).glob("gpu/*.yaml")]
    names = [name for one in files for name in one["device_names"]]
    assert len(names) == len(set(names)) == len(known_gpus()) >= 9
    for gpu in known_gpus().values():
        assert gpu.fp32_tflops <= gpu.tf32_tflops == pytest.approx(gpu.bf16_tflops / 2, rel=0.02)


def test_tf32_is_seen_however_it_was_set():
    """By torch's older switches and by its newer ones, after which the older cannot be read."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv

    def newer(name: str) -> None:
        matmul.fp32_precision = conv.fp32_precision = name

    def older(allowed: bool) -> None:
        matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed

    before = matmul.fp32_precision, conv.fp32_precision
    try:
        for switch, value, expected in (
            (older, False, "fp32"),
            (older, True, "tf32"),
            (newer, "ieee", "fp32"),
            (newer, "tf32", "tf32"),
        ):
            switch(value)
            assert speed._arithmetic("fp32") == expected
            assert speed._arithmetic("bf16") == speed._arithmetic("fp16") == "bf16"
    finally:
        older(False)
        matmul.fp32_precision, conv.fp32_precision = before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_peak_memory_is_that_of_the_session():
    device = torch.device("cuda")
    torch.zeros(1 << 28, dtype=torch.uint8, device=device)
    one = Speed(2, device=device, flops=1e9, precision="bf16")
    one.start(0)
    with one.waiting():
        kept = torch.zeros(1 << 26, dtype=torch.uint8, device=device)
    found = one.entry(1)
    assert (1 << 26) / 1e9 <= found["peak_device_memory_gb"] < (1 << 27) / 1e9 and len(kept)
    assert ("mfu" in found) == (torch.cuda.get_device_name(device) in known_gpus())
