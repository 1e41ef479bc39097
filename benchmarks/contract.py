"""The gradient contract, ours beside the peers': who gives one process's gradient on several ranks?

    python benchmarks/contract.py                                            # a table, then one JSON line
    python benchmarks/contract.py --write benchmarks/results/2026-11-cpu2-contract.md

Each loss is built as its own documentation says for several processes, run on gloo ranks by
`clipkit.losses.check_gradient_contracts`, and its gradients, averaged as DDP averages them, are compared with
one process on the whole batch (its own one-process form, or plain torch where it has none). 1.00 is right.
Peers that are not installed, and parts that need CUDA, are listed as skipped with the reason. About a minute
on 2 cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from clipkit.losses import ContractCase, check_gradient_contracts, create_loss, list_losses

CLIP = ("image_features", "text_features", "logit_scale")
SIGLIP = (*CLIP, "logit_bias")
PAIRS = CLIP[:2]
VIEWS = ("image_features_view1", "image_features_view2")
PAIRS_IN_ALL = 16
# What a registered loss needs beyond its defaults.
NEEDED = {
    "fastclip": {"num_samples": PAIRS_IN_ALL},
    "matryoshka": {"dims": [4, 8]},
    "nli_softmax": {"embed_dim": 8},
    "queue": {"embed_dim": 8, "size": 20},
}
PACKAGES = ("torch", "open_clip_torch", "sentence-transformers", "lightly", "inf-cl")


def ranks_here() -> dict[str, int]:
    running = dist.is_initialized()
    return {"rank": dist.get_rank() if running else 0, "world_size": dist.get_world_size() if running else 1}


def open_clip_clip_loss(**settings):
    from open_clip.loss import ClipLoss

    return ClipLoss(**settings, **ranks_here())


def open_clip_siglip_loss():
    from open_clip.loss import SigLipLoss

    return SigLipLoss(**ranks_here())


def open_clip_train_step(model, loss, batch, *, micro_batch_size, inputs):
    """One step of open_clip's own training loop, `accum_freq` micro-batches; gradients stay in the model."""
    from open_clip_train.train import train_one_epoch

    class AsOpenClip(nn.Module):
        def __init__(self):
            super().__init__()
            self.towers, self.logit_scale = model, model.log_logit_scale

        def forward(self, image, text):
            return self.towers({"image": image, "text": text}, inputs)

    class Remembers(nn.Module):
        def forward(self, *, output_dict, **features):
            self.value = loss.loss(**features)
            return {"contrastive_loss": self.value}

    remembers = Remembers()
    pairs = zip(batch["image"].split(micro_batch_size), batch["text"].split(micro_batch_size), strict=True)
    loader = Loader(pairs)
    loader.num_batches, loader.num_samples = len(loader), len(batch["image"])
    args = SimpleNamespace(
        device="cpu", precision="fp32", accum_freq=len(loader), distill=False, horovod=False, wandb=False,
        skip_scheduler=True, grad_clip_norm=None, rank=1, log_local=False, log_every_n_steps=1, world_size=1,
        batch_size=micro_batch_size, local_rank=1,
    )  # fmt: skip
    data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
    towers = AsOpenClip()
    optimizer = torch.optim.SGD(towers.parameters(), lr=0.0)
    train_one_epoch(towers, data, remembers, 0, optimizer, None, None, None, args)
    return {"loss": remembers.value.detach()}


class Loader(list):
    """A list of batches that can carry open_clip's counts."""


def sentence_transformers_loss(**settings):
    from sentence_transformers.sentence_transformer import losses

    ranking = losses.MultipleNegativesRankingLoss(nn.Identity(), **settings)

    def loss(image_features, text_features):
        return ranking.compute_loss_from_embeddings([image_features, text_features], None)

    return loss


def lightly_loss(**settings):
    from lightly.loss import NTXentLoss

    loss = NTXentLoss(temperature=0.2, **settings)
    return lambda image_features_view1, image_features_view2: loss(image_features_view1, image_features_view2)


def inf_cl_ring_loss():
    from inf_cl import cal_ring_loss

    def loss(image_features, text_features, logit_scale):
        width = image_features.shape[1]
        there = cal_ring_loss(image_features, text_features, scale=logit_scale, head_dim=width)
        back = cal_ring_loss(text_features, image_features, scale=logit_scale, head_dim=width)
        return (there + back) / 2

    return loss


def plain_clip_loss():
    """Radford et al. 2021, figure 3: the reference where a peer has no one-process form on a CPU."""

    def loss(image_features, text_features, logit_scale):
        logits = logit_scale * image_features @ text_features.T
        labels = torch.arange(len(logits))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    return loss


def rows(world_size: int) -> list[tuple[str, str, str | None, ContractCase]]:
    """(who, which settings, the package it needs, case)."""

    def ours(name, **settings):
        return partial(create_loss, {name: settings})

    def open_clip(**settings):
        return case(partial(open_clip_clip_loss, **settings), inputs=CLIP)

    def accumulated(**settings):
        return dataclasses.replace(open_clip(**settings), micro_batches=4, backward=open_clip_train_step)

    case = partial(ContractCase, batch_size=PAIRS_IN_ALL)
    infonce = partial(case, reference_fn=plain_clip_loss)
    both = {"local_loss": True, "gather_with_grad": True}
    registered = []
    for name in list_losses():
        cached = case(ours(name, **NEEDED.get(name, {})), micro_batches=4)
        registered.append((f"clipkit {name}", "4 micro-batches", None, cached))
    return [
        ("clipkit infonce", "dense", None, infonce(ours("infonce", impl="dense"))),
        ("clipkit infonce", "chunked", None, infonce(ours("infonce", impl="chunked"))),
        ("clipkit infonce", "2 groups of 2 ranks", None, case(ours("infonce"), hybrid_group=2)),
        *registered,
        ("open_clip ClipLoss", "defaults", "open_clip_torch", open_clip()),
        ("open_clip ClipLoss", "local_loss", "open_clip_torch", open_clip(local_loss=True)),
        ("open_clip ClipLoss", "gather_with_grad", "open_clip_torch", open_clip(gather_with_grad=True)),
        ("open_clip ClipLoss", "local_loss, gather_with_grad", "open_clip_torch", open_clip(**both)),
        ("open_clip training loop", "accum_freq 4, defaults", "open_clip_torch", accumulated()),
        ("open_clip training loop", "accum_freq 4, local_loss, gather_with_grad", "open_clip_torch",
         accumulated(**both)),
        ("open_clip SigLipLoss", "defaults", "open_clip_torch", case(open_clip_siglip_loss, inputs=SIGLIP)),
        ("sentence-transformers MNRL", "defaults", "sentence-transformers",
         case(sentence_transformers_loss, inputs=PAIRS)),
        ("sentence-transformers MNRL", "gather_across_devices", "sentence-transformers",
         case(partial(sentence_transformers_loss, gather_across_devices=True), inputs=PAIRS)),
        ("lightly NTXentLoss", "defaults", "lightly", case(lightly_loss, inputs=VIEWS)),
        ("lightly NTXentLoss", "gather_distributed", "lightly",
         case(partial(lightly_loss, gather_distributed=True), inputs=VIEWS)),
        ("inf-cl cal_ring_loss", "scale as a tensor (computes in fp32)", "inf-cl",
         case(inf_cl_ring_loss, reference_fn=plain_clip_loss, inputs=CLIP)),
    ]  # fmt: skip


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def measure(world_size: int) -> tuple[list[dict], list[str]]:
    table, skipped, cases = [], [], {}
    for who, settings, package, case in rows(world_size):
        if package and not installed(package):
            skipped.append(f"{who}, {settings}: {package} is not installed (pip install {package})")
            continue
        cases[who, settings] = case
    skipped.append("inf-cl cal_inf_loss: its Triton kernels assert CUDA tensors, one GPU per rank")
    for (who, settings), report in check_gradient_contracts(cases, world_size=world_size).items():
        by_name = {parameter.name: parameter for parameter in report.parameters}
        towers = [parameter for name, parameter in by_name.items() if name.endswith("tower.weight")]

        def ratio(name, by_name=by_name):
            return by_name[name].ratio if name in by_name else None

        table.append({
            "loss": who, "settings": settings, "world_size": world_size,
            "tower_ratio": [min(p.ratio for p in towers), max(p.ratio for p in towers)],
            "tower_cosine": min(p.cosine for p in towers),
            "logit_scale_ratio": ratio("log_logit_scale"), "logit_bias_ratio": ratio("logit_bias"),
            "worst_error": max(p.relative_error for p in report.parameters),
            "value_spread": report.value_spread, "value_error": report.value_error,
        })  # fmt: skip
    return table, skipped


def markdown(table: list[dict]) -> str:
    heads = ["loss", "settings", "towers", "cosine", "logit_scale", "logit_bias", "error", "value spread"]
    lines = [heads, ["---"] * 2 + ["---:"] * 6]
    for row in table:
        low, high = (f"{value:.2f}" for value in row["tower_ratio"])
        scale, bias = row["logit_scale_ratio"], row["logit_bias_ratio"]
        lines.append([
            row["loss"], row["settings"],
            low if low == high else f"{low} to {high}", f"{row['tower_cosine']:.3f}",
            "" if scale is None else f"{scale:.2f}", "" if bias is None else f"{bias:.2f}",
            f"{row['worst_error']:.0e}", f"{row['value_spread']:.0e}",
        ])  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)


def commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    return found.stdout.strip() or "unknown"


def report(table: list[dict], skipped: list[str], world_size: int) -> str:
    versions = ", ".join(f"{package} {installed(package) or 'absent'}" for package in PACKAGES)
    skips = "\n".join(f"- {line}" for line in skipped)
    return f"""# Gradient contract on {world_size} ranks

{datetime.date.today()}, commit {commit()}, {os.cpu_count()} CPU cores ({platform.machine()}), gloo, no GPU.
Python {platform.python_version()}, {versions}.

Gradient averaged over {world_size} ranks as DDP does, beside one process on the whole batch of {PAIRS_IN_ALL}
pairs: 1.00 is right. `towers`: ||g|| / ||reference|| of the towers' weights; `cosine`: the lowest of their
directions; `logit_scale`, `logit_bias`: the same ratio, empty where the loss has no such parameter; `error`:
the largest ||g - reference|| / ||reference|| of any parameter; `value spread`: the largest relative difference
between the losses that ranks return. float64, unit features of width 8, logit_scale 5, linear towers. The
defaults of sentence-transformers and lightly contrast each rank's own rows alone, which is another, smaller
problem by design. Command: `python benchmarks/contract.py`.

{markdown(table)}

Not measured:

{skips}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world-size", type=int, default=4, help="ranks; 16 pairs are split over them")
    parser.add_argument("--write", type=Path, help="also write the result file here")
    given = parser.parse_args()
    table, skipped = measure(given.world_size)
    text = report(table, skipped, given.world_size)
    print(text)
    if given.write:
        given.write.parent.mkdir(parents=True, exist_ok=True)
        given.write.write_text(text)
    ours = [row for row in table if row["loss"].startswith("clipkit")]
    holds = all(row["worst_error"] < 1e-10 and row["value_spread"] < 1e-10 for row in ours)
    result = {"benchmark": "contract", "holds": holds, "commit": commit(), "rows": table, "skipped": skipped}
    print(json.dumps(_finite(result)))
    if not holds:
        raise SystemExit("clipkit's own rows are not exact: see the table")


def _finite(value):
    """NaN is no JSON."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
