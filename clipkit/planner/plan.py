"""What a training step takes on so many GPUs: memory by part, operations, communication, time, and the
largest batch that fits.

Counted on fake tensors (`measure`): weights, optimizer state, activations, losses. Derived here, for W ranks
with B pairs each, micro-batches of m pairs (K = ceil(B / m) of them), and P bytes of trainable weights:

    gradients       P; FSDP2: P / W, and P while K > 1, since it adds micro-batches up before it reduces them
    DDP             P more, its buckets; sends 2 (W - 1) / W P (ring all-reduce) and BatchNorm's buffers
    FSDP2           weights, gradients, optimizer state and EMA over W; two units gathered at a time beside the unit of all that
                    is in no block. Sends (W - 1) / W of: each block gathered 2 times (K > 1: 3 K times), the
                    rest once (K times), and P reduce-scattered
    gradient cache  K > 1: a forward more, and the features of all B pairs with their gradients; activations of m pairs alone, at
                    another time than the loss's workspace
    time            sum over operators of max(operations / rate, bytes / bandwidth, launch); communication of gradients beyond
                    what the last micro-batch's backward hides; collectives of the losses and FSDP2's gathers
                    in forward in full. Rates are the datasheet's times `efficiency`; W ranks in one node talk
                    by `link_gbs`, in several by `network_gbs`

Activation checkpointing is in the counts; torch.compile is not: it fuses, so it takes less memory and time
than stated.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from clipkit.kernels.pairs import DENSE_PAIRS
from clipkit.planner.measure import LossCost, Measured
from clipkit.planner.meter import RING, volume

IMPLEMENTATIONS = ("dense", "chunked", "triton")


@dataclasses.dataclass(frozen=True)
class GPU:
    """One device, by its datasheet. Gigabytes and gigabytes a second are 1e9; None: measured on this machine
    by `measured`.

    memory_gb; bf16_tflops and fp32_tflops (dense, multiplications and additions); memory_gbs (bandwidth);
    link_gbs and network_gbs (one direction, a GPU, inside a node and between nodes); gpus_per_node;
    capability (major, minor), None without Triton; tf32_tflops, None where it is not known; device_names, what
    torch.cuda.get_device_name() calls parts with these rates.
    """

    name: str
    memory_gb: float | None
    bf16_tflops: float | None
    fp32_tflops: float | None
    memory_gbs: float | None
    link_gbs: float
    network_gbs: float
    gpus_per_node: int
    capability: tuple[int, int] | None
    tf32_tflops: float | None = None
    device_names: Sequence[str] = ()

    def measured(self) -> GPU:
        """With this machine's figures in place of None: its memory, and the rates of a matrix product and of
        a copy.
        """
        found = {
            "memory_gb": lambda: os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
            "bf16_tflops": lambda: _product_rate(torch.bfloat16) / 1e12,
            "fp32_tflops": lambda: _product_rate(torch.float32) / 1e12,
            "memory_gbs": lambda: _copy_rate() / 1e9,
        }
        return dataclasses.replace(
            self, **{key: measure() for key, measure in found.items() if getattr(self, key) is None}
        )


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What no datasheet says.

    efficiency: share of each datasheet rate that is reached. launch_us: the least time of an operator,
    microseconds. reserve_gb: for the driver's context, library workspaces, NCCL and fragmentation.
    """

    efficiency: float = 0.6
    launch_us: float = 5.0
    reserve_gb: float = 2.0

    def __post_init__(self):
        if not 0 < self.efficiency <= 1:
            raise ValueError(
                f"efficiency is a share of the GPU's rates above 0 and at most 1, not {self.efficiency}"
            )
        if self.launch_us < 0 or self.reserve_gb < 0:
            raise ValueError(
                f"launch_us and reserve_gb are at least 0, not {self.launch_us} and {self.reserve_gb}"
            )


class Planner:
    """Plans for one measured step on one kind of GPU.

    Args:
        measured: the model, its optimizer and its losses.
        gpu: with no figure left as None: see `GPU.measured`.
        assumed: None: the defaults.
        batch_size: pairs over all ranks.
        micro_batch_size: pairs of a rank that activations are held for at once; None: all of the rank's.
        parallel: "ddp" or "fsdp".
        averaged: whether an average of the weights is kept beside them.
    """

    def __init__(
        self,
        measured: Measured,
        gpu: GPU,
        assumed: Assumptions | None = None,
        *,
        batch_size: int,
        micro_batch_size: int | None = None,
        parallel: str = "ddp",
        averaged: bool = False,
    ):
        self.measured, self.gpu = measured, gpu
        # Bytes, operations a second (of half precision or not) and bytes a second.
        self.limit = _known(gpu, "memory_gb") * 1e9
        tf32 = measured.tf32 and gpu.tf32_tflops is not None
        rates = {
            True: _known(gpu, "bf16_tflops"),
            False: _known(gpu, "tf32_tflops" if tf32 else "fp32_tflops"),
        }
        self.rates = {half: tflops * 1e12 for half, tflops in rates.items()}
        self.bandwidth = _known(gpu, "memory_gbs") * 1e9
        self.assumed = assumed or Assumptions()
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.sharded, self.averaged = parallel == "fsdp", averaged

    def plan(self, world_size: int) -> dict[str, Any]:
        """Everything about a step on `world_size` GPUs, in bytes, operations and seconds, for each rank.

        Raises:
            ValueError: batch_size is no multiple of world_size.
        """
        batch, micro = self.batch_size, self.micro_batch_size
        pairs = _share(batch, world_size)
        size = min(micro or pairs, pairs)
        memory = self.memory(pairs, size, world_size)
        flops, seconds = self.flops(pairs, size, world_size), self.seconds(pairs, size, world_size)
        step, total = sum(seconds.values()), self.peak(pairs, size, world_size)
        peak = self.rates[self.measured.precision != "fp32"]
        return {
            "gpu": self.gpu.name,
            "gpus": world_size,
            "batch_size": batch,
            "pairs_per_gpu": pairs,
            "micro_batch_size": size,
            "micro_batches": math.ceil(pairs / size),
            "impl": self.implementation(pairs, world_size),
            "operands": self.measured.operands if "triton" in self._runnable() else {},
            "memory": memory,
            "memory_total": total,
            "memory_limit": self.limit,
            "fits": total <= self.limit,
            "loss_workspace": {
                impl: self._loss(pairs, world_size, impl).workspace for impl in self._runnable()
            },
            "flops": flops,
            "flops_total": sum(flops.values()),
            "communication": self.communication(pairs, size, world_size),
            "seconds": seconds,
            "seconds_total": step,
            "images_per_second": batch / step,
            # What the model asks for, without what recomputation adds.
            "model_flops_fraction": (flops["forward"] + flops["backward"]) / step / peak,
        }

    def memory(self, pairs: int, micro: int, world_size: int) -> dict[str, float]:
        """Bytes by part, each at its own highest point; `peak` says what of them is held at once."""
        m, shards = self.measured, world_size if self.sharded else 1
        cached, cost = pairs > micro, self._loss(pairs, world_size, self.implementation(pairs, world_size))
        saved, working = self._activations(pairs, micro, world_size)
        # In fp32 whatever the weights are.
        average = 4 * m.parameters / shards + m.buffers if self.averaged else 0
        parts = {
            "weights": m.weights / shards + m.buffers,
            "gradients": m.trainable / (1 if cached else shards),
            "optimizer state": m.state / shards,
            "EMA": average,
            "DDP buckets": m.trainable if world_size > 1 and not self.sharded else 0,
            "FSDP gathered": m.units[-1] + 2 * max(m.units[:-1], default=0) if shards > 1 else 0,
            "batch": self._batch_bytes(pairs, world_size),
            # Without a cache the features are among the activations.
            "features": cost.features + cost.gradients if cached else cost.gradients,
            "activations": sum(saved.values()) + working,
            "loss workspace": cost.workspace,
            "reserve": self.assumed.reserve_gb * 1e9,
        }
        return {name: value for name, value in parts.items() if value}

    def peak(self, pairs: int, micro: int, world_size: int) -> float:
        """Bytes held at once, which is less than the sum of the parts.

        With micro-batches the loss runs when no activations are held. Without, gradients come as activations
        go: both towers' activations, one's beside the other's gradients, or all gradients.
        """
        parts = self.memory(pairs, micro, world_size)
        workspace, gradients, activations = (
            parts.pop(name, 0) for name in ("loss workspace", "gradients", "activations")
        )
        if pairs > micro:
            return sum(parts.values()) + gradients + max(workspace, activations)
        saved, working = self._activations(pairs, micro, world_size)
        of_tower = {
            name: size / (world_size if self.sharded else 1) for name, size in self.measured.gradients.items()
        }
        held = max(
            saved["image"] + saved["text"],
            saved["image"] + of_tower["text"],
            saved["text"] + of_tower["image"],
            gradients,
        )
        return sum(parts.values()) + workspace + held + working

    def flops(self, pairs: int, micro: int, world_size: int) -> dict[str, float]:
        """Multiplications and additions of a rank's step; `again` is what checkpointing and the gradient
        cache recompute.
        """
        forward = self._tower_flops(pairs, world_size, backward=False)
        backward = self._tower_flops(pairs, world_size, backward=True)
        checkpointed = sum(
            made.recomputed(rows) for made, rows in self.measured.passes(pairs, pairs, world_size)
        )
        cost = self._loss(pairs, world_size, self.implementation(pairs, world_size))
        return {
            "forward": forward,
            "backward": backward - checkpointed,
            "again": checkpointed + (forward if pairs > micro else 0),
            "loss": float(sum(operator.flops for operator in cost.operators)),
        }

    def communication(self, pairs: int, micro: int, world_size: int) -> dict[str, float]:
        """Bytes that a rank sends, and as many that it receives, in a step."""
        m, pieces, ring = self.measured, math.ceil(pairs / micro), (world_size - 1) / world_size
        cost = self._loss(pairs, world_size, self.implementation(pairs, world_size))
        sent = {"losses": float(volume(cost.collectives, world_size))}
        if self.gpu.capability is None:
            # gloo has no reduce-scatter: clipkit.distributed takes an all-reduce.
            scattered = sum(c.size for c in cost.collectives if c.kind == "reduce_scatter")
            sent["losses"] += ring * scattered * (RING["all_reduce"] - RING["reduce_scatter"])
        if self.sharded:
            gathers = 2 if pieces == 1 else 3 * pieces
            sent["weights"] = ring * (gathers * sum(m.units[:-1]) + pieces * m.units[-1])
            sent["gradients"] = ring * m.trainable
        else:
            sent["gradients"] = 2 * ring * m.trainable
            sent["buffers"] = ring * m.buffers
        return sent

    def seconds(self, pairs: int, micro: int, world_size: int) -> dict[str, float]:
        """Time of a step by part; parts add up."""
        pieces, share = math.ceil(pairs / micro), self.assumed.efficiency
        forward = pieces * self._tower_seconds(pairs / pieces, pairs, world_size, backward=False)
        last = self._tower_seconds(pairs / pieces, pairs, world_size, backward=True)
        cost = self._loss(pairs, world_size, self.implementation(pairs, world_size))
        link = (
            (self.gpu.link_gbs if world_size <= self.gpu.gpus_per_node else self.gpu.network_gbs)
            * 1e9
            * share
        )
        sent = self.communication(pairs, micro, world_size)
        m, shards = self.measured, world_size if self.sharded else 1
        # Read and write weights and state, read gradients.
        stepped = (2 * m.trainable + 2 * m.state + m.trainable) / shards
        return {
            "forward": forward * (2 if pieces > 1 else 1),
            "backward": pieces * last,
            "loss": self._time((o.flops, o.moved, o.half) for o in cost.operators),
            "optimizer": stepped / (self.bandwidth * share),
            "communication": (sent["losses"] + sent.get("weights", 0) + sent.get("buffers", 0)) / link
            + max(0.0, sent["gradients"] / link - last),
        }

    def largest_micro_batch(self, world_size: int) -> int | None:
        """The most pairs that fit as one micro-batch of the batch; None when not even one does."""
        pairs = _share(self.batch_size, world_size)
        fits = lambda micro: self._fits(pairs, micro, world_size)
        if not fits(1):
            return None
        low, high = 1, pairs + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def largest_batch(self, world_size: int, *, micro: int | None) -> int | None:
        """The largest power of two of pairs a rank that fits, times the ranks; None when not even one does.

        Args:
            micro: pairs of a micro-batch; None: the whole share at once.
        """
        pairs, best = 1, None
        # 2^24 pairs in all are past any data set's epoch that contrasts so many.
        while pairs * world_size <= 2**24 and self._fits(pairs, min(micro or pairs, pairs), world_size):
            best, pairs = pairs * world_size, pairs * 2
        return best

    def advice(self, plan: Mapping[str, Any]) -> str:
        """For a plan that does not fit: which part is largest, and what to lower."""
        world_size, memory = plan["gpus"], plan["memory"]
        name, size = max(memory.items(), key=lambda item: item[1])
        micro = self.largest_micro_batch(world_size)
        lower = []
        if micro is not None:
            lower.append(f"micro_batch_size={micro} fits")
        elif (batch := self.largest_batch(world_size, micro=1)) is not None:
            lower.append(f"no micro_batch_size does at this batch_size: at most batch_size={batch} would")
        if not self.measured.checkpointing:
            lower.append(
                "image_tower.activation_checkpointing=true and text_tower.activation_checkpointing=true need less"
            )
        if not self.sharded and world_size > 1:
            lower.append("parallel=fsdp splits weights, gradients and optimizer state")
        if plan["impl"] == "dense":
            lower.append("a loss's impl=chunked needs no matrix of all pairs")
        return (
            f"batch_size={plan['batch_size']} with micro_batch_size={plan['micro_batch_size']} on {world_size} "
            f"{plan['gpu']} needs {plan['memory_total'] / 1e9:.1f} GB a GPU, which has {plan['memory_limit'] / 1e9:.1f} GB. Most goes to {name} "
            f"({size / 1e9:.1f} GB): " + "; ".join(lower or ["a GPU with more memory, or smaller towers"])
        )

    def implementation(self, pairs: int, world_size: int) -> str:
        """What impl=auto comes to (clipkit.kernels.pairs), or the one that the losses ask for."""
        if asked := self.measured.impls:
            return next(impl for impl in IMPLEMENTATIONS if impl in asked)
        if "triton" in self._runnable():
            return "triton"
        return "dense" if pairs * pairs * world_size <= DENSE_PAIRS else "chunked"

    def _runnable(self) -> tuple[str, ...]:
        return tuple(i for i in IMPLEMENTATIONS if i != "triton" or (self.gpu.capability or (0, 0)) >= (8, 0))

    def _loss(self, pairs: int, world_size: int, impl: str) -> LossCost:
        return self.measured.loss_cost(pairs, world_size, impl, self.gpu.capability or (9, 0))

    def _fits(self, pairs: int, micro: int, world_size: int) -> bool:
        return self.peak(pairs, micro, world_size) <= self.limit

    def _activations(self, pairs: int, micro: int, world_size: int) -> tuple[dict[str, float], float]:
        """Of one micro-batch: what each tower's passes keep, and the largest of their working memories."""
        # Rows of a piece, rounded up as split_batch does.
        piece = math.ceil(pairs / math.ceil(pairs / micro))
        saved, working = {"image": 0.0, "text": 0.0}, 0.0
        for made, rows in self.measured.passes(piece, pairs, world_size):
            kept, more = made.bytes_at(math.ceil(rows))
            saved["image" if made is self.measured.image else "text"] += kept
            working = max(working, more)
        return saved, working

    def _tower_flops(self, pairs: int, world_size: int, *, backward: bool) -> float:
        return sum(
            made.flops(rows, backward=backward)
            for made, rows in self.measured.passes(pairs, pairs, world_size)
        )

    def _tower_seconds(self, pairs: float, whole: int, world_size: int, *, backward: bool) -> float:
        return sum(
            self._time(made.operators(rows, backward=backward))
            for made, rows in self.measured.passes(pairs, whole, world_size)
        )

    def _time(self, operators: Iterable[tuple[float, float, bool]]) -> float:
        share, launch = self.assumed.efficiency, self.assumed.launch_us * 1e-6
        rates = {half: rate * share for half, rate in self.rates.items()}
        bandwidth = self.bandwidth * share
        return sum(max(flops / rates[half], moved / bandwidth, launch) for flops, moved, half in operators)

    def _batch_bytes(self, pairs: int, world_size: int) -> int:
        """Images of a byte a channel, with the views that losses ask for, and tokens of 8 bytes."""
        rows, size = self.measured.rows(pairs, world_size), self.measured.model.image_tower.image_size
        return rows["image"] * 3 * size**2 + rows["text"] * 8 * self.measured.tokenizer.context_length


def _known(gpu: GPU, figure: str) -> float:
    value = getattr(gpu, figure)
    if value is None:
        raise ValueError(f"the GPU {gpu.name!r} has no {figure}: give it, or plan for gpu.measured()")
    return value


def _share(batch_size: int, world_size: int) -> int:
    if world_size < 1:
        raise ValueError(f"gpus={world_size}: give at least 1")
    if batch_size < world_size or batch_size % world_size:
        raise ValueError(
            f"batch_size={batch_size} does not divide evenly over {world_size} GPUs: give a multiple of {world_size}"
        )
    return batch_size // world_size


def _product_rate(dtype: torch.dtype, size: int = 512) -> float:
    """Operations a second of a square matrix product, the best of 20: short ones, which others may leave
    alone.
    """
    a = torch.randn(size, size).to(dtype)
    return 2 * size**3 / min(_timed(lambda: a @ a) for _ in range(20))


def _copy_rate(size: int = 1 << 26) -> float:
    """Bytes a second, read and written, of a copy past the caches, the best of 20."""
    source = torch.zeros(size, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * size / min(_timed(lambda: target.copy_(source)) for _ in range(20))


def _timed(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
