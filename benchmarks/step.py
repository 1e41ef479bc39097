"""A training step: the recipe's loop beside a bare PyTorch loop and open_clip's own, on one model, batch and
optimizer.

    python benchmarks/step.py --out benchmarks/results/2026-11-cpu2-step.md              # a small ResNet and a small ViT
    python benchmarks/step.py --out benchmarks/results/2026-11-h100-step.md              # with a GPU: RN50 and ViT-B/32, bf16, compile

recipe     recipes/pretrain.py's train(), as it is, logging every 20 steps
bare       forward, InfoNCE, backward, clip, AdamW, schedule, clamp: what has to be done, and nothing else
open_clip  open_clip_train.train.train_one_epoch, as it is, on open_clip's CLIP with the same weights
its loop   the same loop on clipkit's model

All take the same batches from memory, uint8 images for the first two and normalised floats, which open_clip's
data pipeline makes, for the others. They take turns, a round each, in one process; a step's time is that
between two draws of a batch: processor seconds on a CPU, which other work on the machine disturbs least, and
wall-clock on a GPU. First all must have one loss at the first step. On a GPU the model's arithmetic is
counted by torch's FlopCounterMode, and the largest batch is found by doubling it, in micro-batches, until
memory is out.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from harness import header, quantiles, report, table

from clipkit.data import create_augment
from clipkit.export import open_clip_config, open_clip_state_dict
from clipkit.grad_cache import cached_backward
from clipkit.losses import create_loss
from clipkit.model import create_model
from clipkit.optim import create_optimizer, create_schedule
from clipkit.recipes.pretrain import train
from clipkit.training import feed, precision, process
from clipkit.training.record import Record
from clipkit.training.speed import Speed

INPUTS = ("image_features", "text_features", "logit_scale")
TOKENS = SimpleNamespace(vocab_size=49408, context_length=77, pad_id=0, sot_id=49406, eot_id=49407)
TEXT = {"name": "transformer", "width": 512, "layers": 12, "heads": 8}
SMALL_TEXT = {"name": "transformer", "width": 128, "layers": 3, "heads": 4}
# Name: (towers and width, batch size, tokens).
CPU = {
    "small ResNet": (
        {
            "image_tower": {"name": "clip_resnet50", "image_size": 64, "layers": [1, 1, 1, 1], "width": 16},
            "text_tower": SMALL_TEXT,
            "embed_dim": 128,
        },
        64,
        32,
    ),
    "small ViT": (
        {
            "image_tower": {
                "name": "clip_vit",
                "image_size": 64,
                "patch_size": 16,
                "width": 128,
                "layers": 4,
                "heads": 4,
            },
            "text_tower": SMALL_TEXT,
            "embed_dim": 128,
        },
        64,
        32,
    ),
}
GPU = {
    "ResNet-50": ({"image_tower": {"name": "clip_resnet50"}, "text_tower": TEXT, "embed_dim": 1024}, 512, 77),
    "ViT-B/32": ({"image_tower": {"name": "clip_vit"}, "text_tower": TEXT, "embed_dim": 512}, 1024, 77),
}
# Dense bf16 peaks in TFLOP/s, from the vendor's datasheets.
PEAKS = {"H100 80GB HBM3": 989.4, "H200": 989.4, "H100 PCIe": 756.0, "A100": 312.0}


class Setting:
    """One model with its batches, on one device."""

    def __init__(
        self, model: dict[str, Any], batch_size: int, tokens: int, device: torch.device, *, batches: int = 4
    ):
        self.config, self.batch_size, self.device = model, batch_size, device
        self.tokenizer = SimpleNamespace(**{**vars(TOKENS), "context_length": tokens})
        self.bf16 = device.type == "cuda"
        size = self.model().image_tower.image_size
        generator = torch.Generator().manual_seed(0)
        self.batches = []
        for _ in range(batches):
            text = torch.randint(1, 49000, (batch_size, tokens), generator=generator)
            text[:, -1] = TOKENS.eot_id
            image = torch.randint(0, 256, (batch_size, 3, size, size), generator=generator, dtype=torch.uint8)
            self.batches.append({"image": image, "text": text, "key": [str(n) for n in range(batch_size)]})

    def model(self) -> torch.nn.Module:
        torch.manual_seed(0)
        return create_model(self.config, tokenizer=self.tokenizer).to(self.device).train()

    def drawn(
        self, count: int, clock: Clock, convert: Callable[[dict], Any] = lambda batch: batch
    ) -> Iterator[Any]:
        """`count` batches, each noted as it is drawn, and the end."""
        for n in range(count):
            clock.note(n, count)
            yield convert(self.batches[n % len(self.batches)])


class Clock:
    """Seconds a step over one round: from the draw after the warm-up to the last draw, with the device idle
    at both.
    """

    def __init__(self, device: torch.device, warm_up: int):
        self.device, self.warm_up, self.rounds, self.started = device, warm_up, [], 0.0

    def note(self, n: int, count: int) -> None:
        if n not in (self.warm_up, count - 1):
            return
        now = self.seconds()
        if n == self.warm_up:
            self.started = now
        else:
            self.rounds.append((now - self.started) / (count - 1 - self.warm_up))

    def seconds(self) -> float:
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()


def first_loss(loss: torch.nn.Module) -> list[float]:
    """A list that will hold the value of the loss's first call."""
    values: list[float] = []

    def note(module: torch.nn.Module, given: Any, terms: dict[str, torch.Tensor]) -> None:
        values.append(terms["loss"].item())
        handle.remove()

    handle = loss.register_forward_hook(note)
    return values


def optimizer_of(model: torch.nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = create_optimizer(model, lr=1e-4, weight_decay=0.1)
    return optimizer, create_schedule(optimizer, warmup_steps=1, total_steps=10**6)


def recipe(setting: Setting, clock: Clock, *, compiled: bool) -> Callable[[int], float]:
    """recipes/pretrain.py's loop; a round goes on where the last one ended. Neither checkpoint nor evaluation
    is timed or made.
    """
    model, folder = setting.model(), Path(tempfile.mkdtemp(prefix="clipkit-step-"))
    if compiled:
        process.compile_towers(model, by_block=False)
    if setting.device.type == "cpu":
        model.image_tower.to(memory_format=torch.channels_last)
    optimizer, schedule = optimizer_of(model)
    loss = create_loss("infonce")
    first, done = first_loss(loss), [0]

    def run(count: int) -> float:
        steps = range(done[0], done[0] + count)
        record = Record(
            folder, total_steps=steps.stop, speed=Speed(setting.batch_size), log_every=20, loss_spike=3.0
        )
        with contextlib.redirect_stdout(io.StringIO()):
            record.start(steps.start)
            train(
                model,
                loss,
                feed.on_device(setting.drawn(count, clock), setting.device),
                optimizer,
                schedule,
                average=None,
                augment=create_augment(None, seed=0),
                steps=steps,
                device=setting.device,
                autocast=precision.autocast("bf16" if setting.bf16 else "fp32", setting.device),
                loss_scale=precision.LossScale("fp32"),
                micro_batch_size=None,
                clip_grad_norm=1.0,
                max_logit_scale=100.0,
                record=record,
                evaluation=SimpleNamespace(after=lambda step, batch: {}),
                checkpoints=SimpleNamespace(after=lambda step, stopping: None),
                skip_nonfinite=False,
                stop=process.StopRequest(),
                metrics={},
            )
        done[0] = steps.stop
        return first[0]

    return run


def bare(setting: Setting, clock: Clock, *, compiled: bool) -> Callable[[int], float]:
    """The least that trains the same model."""
    model, loss = setting.model(), create_loss("infonce")
    if compiled:
        model.image_tower.compile()
        model.text_tower.compile()
    if setting.device.type == "cpu":
        model.image_tower.to(memory_format=torch.channels_last)
    optimizer, schedule = optimizer_of(model)
    first = first_loss(loss)

    def run(count: int) -> float:
        for batch in setting.drawn(count, clock):
            image, text = batch["image"].to(setting.device), batch["text"].to(setting.device)
            with torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.bf16):
                features = model({"image": image, "text": text}, INPUTS)
            value = loss({name: features[name] for name in INPUTS})["loss"]
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            model.clamp_logit_scale()
        return first[0]

    return run


class AsOpenClip(torch.nn.Module):
    """A DualEncoder as open_clip's loop calls a model."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model, self.logit_scale = model, model.log_logit_scale

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.model({"image": image, "text": text}, INPUTS)


def open_clip_loop(
    setting: Setting, clock: Clock, *, compiled: bool, ours: bool = False
) -> Callable[[int], float]:
    """open_clip's epoch with its own loss and AdamW fused as clipkit's, on its own model with the same
    weights or on `ours`.
    """
    import open_clip
    from open_clip_train.train import train_one_epoch

    dual = setting.model()
    if ours:
        if setting.device.type == "cpu":
            dual.image_tower.to(memory_format=torch.channels_last)
        model = AsOpenClip(dual)
    else:
        model = open_clip.CLIP(**open_clip_config(dual), output_dict=True).to(setting.device)
        model.load_state_dict(open_clip_state_dict(dual))
    network = torch.compile(model) if compiled else model
    flat = lambda p: p.ndim < 2
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if flat(p)], "weight_decay": 0.0},
            {"params": [p for p in model.parameters() if not flat(p)], "weight_decay": 0.1},
        ],
        lr=1e-4,
        fused=True,
    )
    args = SimpleNamespace(
        device=str(setting.device),
        precision="amp_bfloat16" if setting.bf16 else "fp32",
        distill=False,
        accum_freq=1,
        skip_scheduler=False,
        grad_clip_norm=1.0,
        horovod=False,
        rank=0,
        local_rank=0,
        log_local=False,
        log_every_n_steps=20,
        world_size=1,
        batch_size=setting.batch_size,
        wandb=False,
    )
    mean, std = dual.image_mean.cpu(), dual.image_std.cpu()
    floats = [((batch["image"] - mean) / std, batch["text"]) for batch in setting.batches]
    done, losses = [0], []
    clip_loss = open_clip.ClipLoss()

    def loss(*args: Any, **kwargs: Any) -> Any:
        terms = clip_loss(*args, **kwargs)
        if not losses:
            losses.append(terms["contrastive_loss"].item())
        return terms

    def run(count: int) -> float:
        def batches() -> Iterator[Any]:
            for n, _ in enumerate(setting.drawn(count, clock)):
                yield floats[n % len(floats)]

        loader = type(
            "Loader",
            (),
            {
                "num_batches": count,
                "num_samples": count * setting.batch_size,
                "__iter__": lambda self: batches(),
            },
        )()
        data = {"train": SimpleNamespace(set_epoch=lambda epoch: None, dataloader=loader)}
        schedule = lambda step: [group.update(lr=1e-4) for group in optimizer.param_groups]
        train_one_epoch(network, data, loss, done[0], optimizer, None, schedule, None, args)
        done[0] += 1
        return losses[0]

    return run


CONTESTANTS = {
    "recipe": recipe,
    "bare": bare,
    "open_clip": open_clip_loop,
    "its loop": functools.partial(open_clip_loop, ours=True),
}


def measure(setting: Setting, *, rounds: int, steps: int, compiled: bool) -> dict[str, Any]:
    """{contestant: seconds a step of every round}, after their first losses were found equal."""
    clocks = {name: Clock(setting.device, warm_up=2) for name in CONTESTANTS}
    runs = {name: make(setting, clocks[name], compiled=compiled) for name, make in CONTESTANTS.items()}
    firsts = {name: run(4) for name, run in runs.items()}
    tolerance = 2e-2 if setting.bf16 else 1e-4
    if max(firsts.values()) - min(firsts.values()) > tolerance * firsts["bare"]:
        raise SystemExit(f"no times: the first step's losses differ: {firsts}")
    for clock in clocks.values():
        clock.rounds.clear()
    names = list(runs)
    for n in range(rounds):
        # Each is first, second, third and fourth in turn.
        for name in names[n % len(names) :] + names[: n % len(names)]:
            runs[name](steps)
    return {"first_losses": firsts, "seconds": {name: clock.rounds for name, clock in clocks.items()}}


def step_flops(setting: Setting) -> int:
    """Multiplications and additions of a forward and backward of the towers, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    model, batch = setting.model(), setting.batches[0]
    with FlopCounterMode(display=False) as counter:
        features = model({name: batch[name].to(setting.device) for name in ("image", "text")}, INPUTS)
        (features["image_features"].sum() + features["text_features"].sum()).backward()
    return counter.get_total_flops()


def largest_batch(setting: Setting, micro_batch_size: int) -> tuple[int, float]:
    """(the largest power of two whose step by gradient caching fits the GPU, its seconds)."""
    model, loss = setting.model(), create_loss("infonce")
    optimizer, _ = optimizer_of(model)
    size, tokens = model.image_tower.image_size, setting.tokenizer.context_length
    best, pairs = (0, math.nan), micro_batch_size
    while pairs <= 2**20:
        try:
            text = torch.randint(1, 49000, (pairs, tokens), device=setting.device)
            text[:, -1] = TOKENS.eot_id
            batch = {
                "image": torch.randint(
                    0, 256, (pairs, 3, size, size), device=setting.device, dtype=torch.uint8
                ),
                "text": text,
            }
            torch.cuda.synchronize()
            started = time.perf_counter()
            cached_backward(
                model,
                loss,
                batch,
                micro_batch_size=micro_batch_size,
                inputs=INPUTS,
                autocast=torch.autocast("cuda", torch.bfloat16),
            )
            optimizer.step()
            torch.cuda.synchronize()
            best = pairs, time.perf_counter() - started
        except torch.cuda.OutOfMemoryError:
            return best
        optimizer.zero_grad(set_to_none=True)
        pairs *= 2
    return best


def row(name: str, setting: Setting, found: dict[str, Any]) -> dict[str, str]:
    """A line of the table; ratios are medians over rounds of the times in one round."""
    seconds = found["seconds"]
    ratio = lambda other: quantiles([a / b for a, b in zip(seconds["recipe"], seconds[other], strict=True)])
    line = {"model": name, "batch": str(setting.batch_size)}
    for contestant, times in seconds.items():
        middle, low, high = quantiles(times)
        line[f"{contestant}, ms a step"] = f"{1e3 * middle:.1f} ({1e3 * low:.1f} to {1e3 * high:.1f})"
    for other in list(seconds)[1:]:
        middle, low, high = ratio(other)
        line[f"recipe / {other}"] = f"{middle:.3f} ({low:.3f} to {high:.3f})"
    return line


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=13, help="of a round, two of them warm-up")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument(
        "--peak", type=float, help="the GPU's dense bf16 peak in TFLOP/s; known ones are looked up"
    )
    parser.add_argument("--out", help="result file to write")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    logging.getLogger().setLevel(logging.WARNING)
    device = torch.device(given.device)
    facts, rows, gpu_rows, results = header(device), [], [], {}
    on_gpu = device.type == "cuda"
    skipped = (
        [] if on_gpu else ["a GPU: none was at hand; images a second, FLOP/s and the largest batch need one"]
    )
    for name, (model, batch_size, tokens) in (GPU if on_gpu else CPU).items():
        setting = Setting(model, batch_size, tokens, device)
        found = measure(setting, rounds=given.rounds, steps=given.steps, compiled=on_gpu)
        rows.append(row(name, setting, found))
        results[name] = found
        if not on_gpu:
            continue
        peak = given.peak or next(
            (value for part, value in PEAKS.items() if part in torch.cuda.get_device_name(device)), None
        )
        flops = step_flops(setting)
        largest, seconds = largest_batch(setting, micro_batch_size=batch_size)
        line = {"model": name, "TFLOP a step": f"{flops / 1e12:.2f}"}
        for contestant, times in found["seconds"].items():
            middle = statistics.median(times)
            line[f"{contestant}, images/s"] = f"{batch_size / middle:,.0f}"
            line[f"{contestant}, of peak"] = (
                f"{flops / middle / peak / 1e12:.1%}" if peak else "peak unknown: give --peak"
            )
        line["largest batch, cached"] = (
            f"{largest:,} ({largest / seconds:,.0f} images/s)" if largest else "none"
        )
        gpu_rows.append(line)
        results[name] |= {"flops": flops, "peak_tflops": peak, "largest_batch": largest}
    sections = [
        (
            "Step time",
            "Median, and 20th to 80th percentile, over the rounds; a ratio is of the times within a round.\n\n"
            + table(rows),
        )
    ]
    if gpu_rows:
        sections.append(("Throughput", table(gpu_rows)))
    report("A training step beside a bare loop and open_clip's", facts, sections, results, skipped, given.out)


if __name__ == "__main__":
    main()
