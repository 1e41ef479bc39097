"""How fast a run goes: pairs and seconds between two of its entries, memory, and what share of the device's peak."""

from __future__ import annotations

import multiprocessing
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import torch

from clipkit.data import Tokenizer
from clipkit.distributed import rank, world_size
from clipkit.loading import model_config
from clipkit.planner import Measured, peak_tflops


class Speed:
    """A clock over the steps since the last entry, which stands still while a run is saved or scored.

    Args:
        batch_size: pairs a step, over all ranks.
        device: the one that trains.
        flops: multiplications and additions of a step on it (`step_flops`); None: not counted.
        precision: of the towers; the peak is that of its arithmetic.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        device: torch.device | None = None,
        flops: float | None = None,
        precision: str = "fp32",
    ):
        self._batch_size, self._device = batch_size, device or torch.device("cpu")
        self._flops, self._precision = flops, precision
        self._begun: float | None = None
        self._step, self._waited, self._away = 0, 0.0, 0.0

    def start(self, step: int) -> None:
        """`step` steps are done; the clock runs from the next batch on."""
        self._begun, self._step = None, step
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While the next batch is awaited."""
        began = time.monotonic()
        if self._begun is None:
            self._restart(began)
        yield
        self._waited += time.monotonic() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While no step is taken: a checkpoint is written, or the model is scored."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._away += time.monotonic() - began

    def pairs_per_second(self, step: int) -> float:
        """Over the steps since the last entry, the last of which is `step`."""
        return (step - self._step) * self._batch_size / self._seconds(time.monotonic())

    def entry(self, step: int) -> dict[str, float]:
        """The numbers of the steps since the last entry, the last of which is `step`; another interval begins."""
        now = time.monotonic()
        steps, seconds = step - self._step, self._seconds(now)
        found = {
            "pairs_per_second": steps * self._batch_size / seconds,
            "step_seconds": seconds / steps,
            "data_seconds": self._waited / steps,
            "data_fraction": self._waited / seconds,
        }
        if self._flops is not None:
            found["tflops"] = self._flops * steps / seconds / 1e12
            if peak := self._peak():
                found["mfu"] = found["tflops"] / peak
        self._restart(now)
        self._step = step
        return found | memory(self._device)

    def _restart(self, now: float) -> None:
        self._begun, self._waited, self._away = now, 0.0, 0.0

    def _seconds(self, now: float) -> float:
        # A step taken without waiting() has no beginning.
        return max(now - (now if self._begun is None else self._begun) - self._away, 1e-9)

    def _peak(self) -> float | None:
        """1e12 operations a second, by the datasheet; None where the device is not known."""
        if self._device.type != "cuda":
            return None
        return peak_tflops(torch.cuda.get_device_name(self._device), _arithmetic(self._precision))


def _arithmetic(precision: str) -> str:
    """bf16 (or fp16, which is as fast), tf32 or fp32: the fastest that products of this precision may use."""
    if "16" in precision:
        return "bf16"
    # torch refuses to read allow_tf32 where TF32 was set in this newer way.
    used = (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision)  # pyright: ignore[reportAttributeAccessIssue]
    return "tf32" if "tf32" in used else "fp32"


def memory(device: torch.device) -> dict[str, float]:
    """GB (10^9 bytes): resident of this process, and of its data workers; on a GPU also the most
    that its tensors held at once, in this session.
    """
    children = 0
    for child in multiprocessing.active_children():
        # It may end meanwhile.
        with suppress(psutil.Error):
            children += psutil.Process(child.pid).memory_info().rss
    found = {
        "memory_gb": psutil.Process().memory_info().rss / 1e9,
        "workers_memory_gb": children / 1e9,
    }
    if device.type == "cuda":
        found["peak_device_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return found


def create_speed(config: Mapping[str, Any], tokenizer: Tokenizer, device: torch.device) -> Speed:
    """A run's clock, which knows the operations of its steps where `count_flops` asks for them.

    Args:
        config: the run's settings; `count_flops` None counts on GPUs alone.
    """
    flops, asked = None, config["count_flops"]
    if rank() == 0 and (device.type == "cuda" if asked is None else asked):
        try:
            flops = step_flops(config, tokenizer)
        # A tower of a user's own may do what fake tensors cannot.
        except Exception as error:
            warnings.warn(
                f"the operations of a step could not be counted ({type(error).__name__}: {error}): train/tflops and "
                "train/mfu are left out",
                stacklevel=2,
            )
    return Speed(config["batch_size"], device=device, flops=flops, precision=config["precision"])


def step_flops(config: Mapping[str, Any], tokenizer: Tokenizer) -> float:
    """Multiplications and additions of the towers in this rank's step, by the planner's count on fake tensors.

    Forward and backward, without what activation checkpointing and the gradient cache compute again, and without the
    loss. Takes a second or a few. No random number is drawn, and nothing is sent to other ranks.
    """
    sentences = config["data"]["sentences"] or {}
    with torch.random.fork_rng(devices=[]):
        measured = Measured(
            model=model_config(config, pretrained=False),
            loss=config["loss"],
            optim=None,
            tokenizer=tokenizer,
            # The same operations in either.
            precision="fp32",
            sentence_batch_size=sentences.get("batch_size") or 0,
            fused_attention=False,
        )
        return measured.model_flops(config["batch_size"] // world_size(), world_size())
