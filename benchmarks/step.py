"""A training step of recipes/pretrain.py beside a bare PyTorch loop and open_clip's own training loop.

    python benchmarks/step.py --out benchmarks/results/YYYY-MM-cpuN-step.md                  # CPU
    python benchmarks/step.py --device cuda --gpu h100 --out benchmarks/results/YYYY-MM-h100-step.md

The three train copies of one model on the same pairs, in memory, in turns of a few steps within one process; a turn's time is that
of whole iterations, between its first batch and the request for the one after its last. Parity first: after the first turn,
which also warms up, the three models must have the same loss. The bare loop is: to the device, forward, loss, backward, clip, step,
zero_grad. On a CPU others may share, the ratios are of processor seconds. open_clip's is open_clip_train.train.train_one_epoch with its ClipLoss; it takes float images, normalised beforehand, as
its loader makes them, and the same optimizer class.

On CUDA: ResNet-50 and ViT-B/32 with CLIP's Transformer, bf16 and torch.compile for all three; the share of the GPU's peak is the
towers' operations (clipkit.planner) over time; last the largest batch that one GPU takes in micro-batches, doubled until memory ends.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from harness import ROOT, header, quantiles, report, table

from clipkit.losses import create_loss
from clipkit.optim import create_optimizer

# name -> (overrides of clipkit-pretrain, pairs, steps a turn, turns)
CPU_CASES = {
    "test_resnet 32 px + Transformer 128 x 3": ([], 256, 5, 12),
    "resnet10t 64 px + Transformer 256 x 2": (
        ["image_tower=timm", "image_tower.model=resnet10t", "image_tower.image_size=64", "text_tower.width=256", "text_tower.layers=2"],
        64, 3, 10),
}
CLIP = ["text_tower=transformer", "data.tokenizer.name=clip_bpe", "data.tokenizer.context_length=77", "precision=bf16", "compile=true"]
CUDA_CASES = {
    "CLIP ResNet-50 + Transformer": ([*CLIP, "image_tower=clip_resnet50", "embed_dim=1024"], 512, 10, 15),
    "CLIP ViT-B/32 + Transformer": ([*CLIP, "image_tower=clip_vit_b32", "embed_dim=512"], 1024, 10, 15),
}
LR, CLIP_NORM = 1e-4, 1.0


class Turn:
    """`steps` batches, and the seconds a step from the first's request to that of the one after the last, device included.

    seconds: by the clock; used: of the processor, this process's.
    """

    def __init__(self, batches: list, steps: int, device: torch.device):
        self.batches, self.steps, self.device = batches, steps, device
        self.seconds = self.used = math.nan
        # What open_clip's loop reads of a loader.
        first = batches[0]
        self.num_batches = steps
        self.num_samples = steps * len(first[0] if isinstance(first, tuple) else first["image"])

    def __iter__(self) -> Iterator[Any]:
        started, used = _clock(self.device), time.process_time()
        for step in range(self.steps):
            yield self.batches[step % len(self.batches)]
        self.seconds = (_clock(self.device) - started) / self.steps
        self.used = (time.process_time() - used) / self.steps


class Interleaved:
    """The recipe's stream: its turns, and the other contestants' while it waits for a batch."""

    def __init__(self, stream: Any, turns: Callable[[], Iterator[Turn]]):
        self.stream, self.turns = stream, turns

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for turn in self.turns():
            yield from turn

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class OpenClipView(torch.nn.Module):
    """A DualEncoder as open_clip's loop calls its models."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.dual = model
        self.logit_scale = model.log_logit_scale

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.dual({"image": images, "text": texts})


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def built(overrides: list[str], folder: Path, device: torch.device, pairs: int, steps: int) -> Any:
    """The recipe's State, its data the generated shapes, which the benchmark's own pairs then replace."""
    from hydra import compose, initialize_config_dir

    from clipkit.recipes.pretrain import build, resolved

    # The settings that decide what a step does stay the recipe's defaults.
    given = [
        *overrides, f"batch_size={pairs}", f"steps={steps}", f"data.shapes.folder={folder / 'shapes'}", "eval=none", "logger=none",
        f"data.shapes.train={2 * pairs}", "data.shapes.val=8", "text_tower.dropout=0", f"optim.lr={LR}", "optim.schedule=constant",
        "optim.warmup_steps=0", f"clip_grad_norm={CLIP_NORM}", "save_every=0"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = resolved(compose("pretrain", overrides=given))
    (folder / "run").mkdir()
    return build(config, folder / "run", device, 0, 1)


def pairs_in_memory(state: Any, pairs: int, count: int = 4) -> list[dict[str, Any]]:
    """Random uint8 images and texts of full length, pinned where there is a GPU."""
    generator = torch.Generator().manual_seed(0)
    size, tokenizer = state.model.image_tower.image_size, state.tokenizer
    batches = []
    for _ in range(count):
        text = torch.randint(3, tokenizer.eot_id - 2, (pairs, tokenizer.context_length), generator=generator)
        text[:, -1] = tokenizer.eot_id
        image = torch.randint(0, 256, (pairs, 3, size, size), generator=generator, dtype=torch.uint8)
        tensors = {"image": image, "text": text}
        batches.append({k: v.pin_memory() if state.device.type == "cuda" else v for k, v in tensors.items()})
    return batches


def bare_loop(model: torch.nn.Module, state: Any) -> Callable[[Turn], None]:
    """A loop as one writes it first; the model may be compiled."""
    from clipkit.recipes.session import autocast

    loss = create_loss(state.config["loss"]).to(state.device)
    optimizer = create_optimizer([model, loss], **_optim(state))
    context, parameters = autocast(state.config["precision"], state.device), list(model.parameters())
    encode = torch.compile(model) if state.config["compile"] else model

    def run(turn: Turn) -> None:
        model.train()
        for batch in turn:
            batch = {name: value.to(state.device, non_blocking=True) for name, value in batch.items()}
            with context():
                features = encode(batch)
            loss(features)["loss"].backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            model.clamp_logit_scale(100.0)

    return run


def open_clip_loop(model: torch.nn.Module, state: Any, pairs: int) -> Callable[[Turn], None]:
    """open_clip_train.train.train_one_epoch over one turn."""
    from open_clip import ClipLoss
    from open_clip_train.train import train_one_epoch

    view = OpenClipView(model)
    optimizer = create_optimizer(model, **_optim(state))
    args = SimpleNamespace(
        device=str(state.device), precision="amp_bf16" if state.config["precision"] == "bf16" else "fp32", distill=False,
        accum_freq=1, skip_scheduler=True, horovod=False, grad_clip_norm=CLIP_NORM, log_every_n_steps=100, rank=0, local_rank=0,
        world_size=1, batch_size=pairs, wandb=False)
    compiled = torch.compile(view) if state.config["compile"] else view

    def run(turn: Turn) -> None:
        data = SimpleNamespace(dataloader=turn, set_epoch=lambda epoch: None)
        train_one_epoch(compiled, {"train": data}, ClipLoss(), 0, optimizer, None, None, None, args)

    return run


def _optim(state: Any) -> dict[str, Any]:
    kept = ("name", "lr", "betas", "eps", "weight_decay")
    return {key: value for key, value in state.config["optim"].items() if key in kept}


def compare(overrides: list[str], pairs: int, steps: int, turns: int, device: torch.device) -> dict[str, dict]:
    """{contestant: {"seconds": [...], "used": [...]}} a step, one number a turn; RuntimeError when the models part."""
    from clipkit.recipes.pretrain import train

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        # A batch more than the turns lets the last one see its end.
        state = built(overrides, Path(folder), device, pairs, steps * turns + 1)
        batches = pairs_in_memory(state, pairs)
        floats = [(state.model.normalize_image(b["image"].to(device)).cpu(), b["text"]) for b in batches]
        if device.type == "cuda":
            floats = [(image.pin_memory(), text) for image, text in floats]
        models = {"bare loop": copy.deepcopy(state.model), "open_clip's loop": copy.deepcopy(state.model)}
        models["clipkit's recipe"] = state.model
        others = {
            "bare loop": (bare_loop(models["bare loop"], state), batches),
            "open_clip's loop": (open_clip_loop(models["open_clip's loop"], state, pairs), floats)}
        measured: dict[str, dict] = {name: {"seconds": [], "used": []} for name in models}

        def interleaved() -> Iterator[Turn]:
            for number in range(turns):
                mine = Turn(batches, steps, device)
                yield mine
                timed = {"clipkit's recipe": mine}
                # Who comes first changes from turn to turn.
                for name in sorted(others, reverse=number % 2 == 1):
                    loop, data = others[name]
                    timed[name] = Turn(data, steps, device)
                    loop(timed[name])
                if number == 0:
                    _parity(models, batches[0], state)
                    continue
                for name, turn in timed.items():
                    measured[name]["seconds"].append(turn.seconds)
                    measured[name]["used"].append(turn.used)
            yield Turn(batches, 1, device)

        state.stream = Interleaved(state.stream, interleaved)
        train(state)
    return measured


def _parity(models: dict[str, torch.nn.Module], batch: dict[str, torch.Tensor], state: Any) -> None:
    """RuntimeError unless all three have come to the same loss on one batch."""
    values = {}
    for name, model in models.items():
        model.eval()
        with torch.no_grad():
            features = model({key: value.to(state.device) for key, value in batch.items()})
            values[name] = create_loss("infonce")(features)["loss"].item()
        model.train()
    spread = max(values.values()) - min(values.values())
    if not spread <= (5e-2 if state.config["precision"] == "bf16" else 2e-3) * max(values.values()):
        raise RuntimeError(f"the contestants do not train the same model: losses after the first turn {values}")


def rows_of(name: str, pairs: int, measured: dict[str, dict], flops: float, peak: float | None) -> list[dict[str, str]]:
    """One row a contestant; ratios of the same turn, of processor seconds where there is no GPU."""
    kind = "seconds" if peak else "used"
    ours, rows = measured["clipkit's recipe"][kind], []
    shown = lambda q, unit, digits: "{:.{d}f} ({:.{d}f}-{:.{d}f})".format(*(unit * value for value in q), d=digits)
    for contestant, times in measured.items():
        median, low, high = quantiles(times["seconds"])
        ratio = quantiles([mine / theirs for mine, theirs in zip(ours, times[kind], strict=True)])
        rows.append({
            "model": name, "pairs": str(pairs), "loop": contestant, "ms a step": shown((median, low, high), 1e3, 1),
            "CPU ms": shown(quantiles(times["used"]), 1e3, 1), "images/s": f"{pairs / median:.0f}",
            "GFLOP/s": f"{flops / median / 1e9:.0f}", **({"of peak": f"{flops / median / peak:.1%}"} if peak else {}),
            "recipe over this": shown(ratio, 1, 3) if contestant != "clipkit's recipe" else ""})
    return rows


def model_flops(overrides: list[str], pairs: int) -> float:
    """Operations of a forward and a backward of the towers on so many pairs, as clipkit.planner counts them."""
    from hydra import compose, initialize_config_dir

    from clipkit.planner import Measured
    from clipkit.recipes.plan import resolved, vocabulary

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = resolved(compose("plan", overrides=overrides))
    measured = Measured(config, vocabulary(config["data"]["tokenizer"], None)[0], fused_attention=True)
    return sum(tower.flops(pairs, backward=b) for tower in (measured.image, measured.text) for b in (False, True))


def largest_batch(overrides: list[str], device: torch.device, micro: int, minutes: float) -> tuple[int, str]:
    """(pairs of the largest step in micro-batches that went through, why the next did not), doubled from 1,024."""
    from clipkit.grad_cache import cached_backward
    from clipkit.recipes.session import autocast

    started, best, why = time.monotonic(), 0, ""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        state = built([*overrides, "compile=false"], Path(folder), device, 64, 10)
        pairs = 1024
        while not why:
            if time.monotonic() - started > 60 * minutes:
                why = f"{minutes:g} minutes were over before {pairs}"
                break
            try:
                (batch,) = pairs_in_memory(state, 64, count=1)
                batch = {k: v.to(device).repeat(pairs // 64, *[1] * (v.ndim - 1)) for k, v in batch.items()}
                context = autocast(state.config["precision"], device)
                cached_backward(state.model, state.loss, batch, micro_batch_size=micro, autocast=context())
                state.optimizer.step()
                state.optimizer.zero_grad(set_to_none=True)
                best, pairs = pairs, 2 * pairs
            except torch.OutOfMemoryError:
                why = f"{pairs} ran out of memory"
            batch = None
    return best, why


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--gpu", default="h100", help="whose peak to compare with: a file of conf/gpu (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=5.0, help="for the largest batch (default: %(default)s)")
    parser.add_argument("--only", help="models whose name contains this")
    parser.add_argument("--turns", type=int, help="in place of each model's own number")
    parser.add_argument("--out", help="result file to write")
    given = parser.parse_args()
    logging.disable(logging.INFO)
    device = torch.device(given.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    facts, cases = header(device), CUDA_CASES if device.type == "cuda" else CPU_CASES
    rows, largest, results, skipped = [], [], {}, []
    for name, (overrides, pairs, steps, turns) in cases.items():
        if given.only and given.only not in name:
            continue
        measured = compare(overrides, pairs, steps, given.turns or turns, device)
        peak = _peak(given.gpu) if device.type == "cuda" else None
        rows += rows_of(name, pairs, measured, model_flops(overrides, pairs), peak)
        results[name] = {"pairs": pairs, "steps a turn": steps, "loops": measured}
        if device.type == "cuda":
            batch, why = largest_batch(overrides, device, 256, given.minutes)
            largest.append({"model": name, "micro-batch": "256", "largest batch": str(batch), "the next": why})
            results[name]["largest"] = batch
    if device.type == "cpu":
        skipped.append("Any GPU: none was here, so no bf16, no torch.compile, no share of a peak and no largest batch.")
    sections = [("A step", table(rows))] + ([("The largest batch on one GPU", table(largest))] if largest else [])
    report("A training step", facts, sections, results, skipped, given.out)


def _peak(gpu: str) -> float:
    """Operations a second in bf16, from conf/gpu."""
    from omegaconf import OmegaConf

    return OmegaConf.load(ROOT / "conf" / "gpu" / f"{gpu}.yaml").bf16_tflops * 1e12


if __name__ == "__main__":
    main()
