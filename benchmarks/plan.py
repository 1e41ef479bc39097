"""clipkit-plan's predictions beside what real steps take on this CPU: memory, time, operations.

    python benchmarks/plan.py --out benchmarks/results/2026-11-cpu2-plan.md

Each step runs in a process of its own, one thread. Memory is what a step adds to weights and optimizer state,
which are in place before: the highest sum of torch's own allocations (its profiler's events), and the
process's high-water mark, which adds the workspaces of libraries and what the allocator keeps. Time is that
of a step after the first, in seconds of the processor, which others may share; the prediction takes this
machine's rates, measured before, at efficiency 1. Operations are compared with published counts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from types import SimpleNamespace
from typing import Any

import torch
from harness import PeakMemory, header, in_child, quantiles, report, table

from clipkit.planner import GPU, Assumptions, Measured, Planner

CPU = GPU("cpu", None, None, None, None, 5.0, 1.25, 1, None)
TINY = {"name": "transformer", "width": 256, "layers": 2, "heads": 4, "dropout": 0.1}
CLIP = {"name": "transformer", "dropout": 0.0}
RESNET = {"name": "timm", "model": "resnet10t", "image_size": 64}
SMALL = {"name": "timm", "model": "test_resnet", "image_size": 32}
MODEL = ("embed_dim", "image_tower", "text_tower")
SAVING = {"activation_checkpointing": True}
# name -> (towers, tokens a text, vocabulary, pairs, micro-batch, loss, steps)
CASES: dict[str, tuple] = {
    "resnet10t 64 px, 512 pairs": (RESNET, TINY, 24, 3000, 512, None, "dense", 2),
    "the same, micro-batches of 64": (RESNET, TINY, 24, 3000, 512, 64, "dense", 2),
    "the same, checkpointed, 512 pairs": (RESNET | SAVING, TINY | SAVING, 24, 3000, 512, None, "dense", 2),
    "test_resnet 32 px, 4,096 pairs, dense": (SMALL, TINY, 16, 100, 4096, 256, "dense", 2),
    "the same, chunked": (SMALL, TINY, 16, 100, 4096, 256, "chunked", 2),
    "CLIP RN50 224 px, 8 pairs": ({"name": "clip_resnet50"}, CLIP, 77, 49408, 8, None, "dense", 2),
    "CLIP ViT-B/32 224 px, 16 pairs": ({"name": "clip_vit"}, CLIP, 77, 49408, 16, None, "dense", 2),
}
# 1e9 operations of a forward of one image and one text: open_clip's model profile (its
# docs/model_profile.csv).
PUBLISHED = {"CLIP RN50 224 px, 8 pairs": (12.22, 5.96), "CLIP ViT-B/32 224 px, 16 pairs": (8.82, 5.96)}


def settings(name: str) -> tuple[dict[str, Any], Any, int]:
    """(config, tokenizer, steps) of a case."""
    image, text, length, vocabulary, pairs, micro, impl, steps = CASES[name]
    config = {
        "embed_dim": 1024 if image["name"] == "clip_resnet50" else 512,
        "image_tower": image,
        "text_tower": text,
        "loss": {"infonce": {"impl": impl}, "cyclic": {}},
        "batch_size": pairs,
        "micro_batch_size": micro,
        "optim": {"name": "adamw", "lr": 1e-4, "weight_decay": 0.1},
    }
    tokenizer = SimpleNamespace(
        vocab_size=vocabulary, context_length=length, pad_id=0, sot_id=vocabulary - 2, eot_id=vocabulary - 1
    )
    return config, tokenizer, steps


def child(name: str) -> dict[str, Any]:
    """Real steps: bytes above what was held before, and seconds."""
    from clipkit.losses import create_loss
    from clipkit.model import create_model
    from clipkit.optim import create_optimizer

    torch.set_num_threads(1)
    config, tokenizer, steps = settings(name)
    model = create_model({key: config[key] for key in MODEL}, tokenizer=tokenizer).train()
    loss = create_loss(config["loss"])
    optimizer = create_optimizer([model, loss], **config["optim"])
    # Optimizer state, and what libraries set up once.
    step(model, loss, optimizer, tokenizer, 4, None)
    peaks, seconds = [], []
    for _ in range(steps):
        memory, start = PeakMemory(torch.device("cpu")), time.process_time()
        step(model, loss, optimizer, tokenizer, config["batch_size"], config["micro_batch_size"])
        seconds.append(time.process_time() - start)
        peaks.append(memory.bytes())
    allocated = allocations(
        lambda: step(model, loss, optimizer, tokenizer, config["batch_size"], config["micro_batch_size"])
    )
    return {"peak": peaks[0], "allocated": allocated, "seconds": seconds[1:] or seconds}


def allocations(work: Any) -> int:
    """Bytes that torch's CPU allocator had given out at most at once during `work`, above the start."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def step(model, loss, optimizer, tokenizer, pairs: int, micro: int | None) -> None:
    """One training step on random pairs, made inside so that they count."""
    from clipkit.grad_cache import cached_backward

    size = model.image_tower.image_size
    text = torch.randint(1, tokenizer.vocab_size - 2, (pairs, tokenizer.context_length))
    text[:, -1] = tokenizer.eot_id
    batch = {"image": torch.randint(0, 256, (pairs, 3, size, size), dtype=torch.uint8), "text": text}
    cached_backward(model, loss, batch, micro_batch_size=micro or pairs)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def predicted(name: str, gpu: GPU) -> dict[str, Any]:
    config, tokenizer, _ = settings(name)
    measured = Measured(
        model={key: config[key] for key in MODEL},
        loss=config["loss"],
        optim=config["optim"],
        tokenizer=tokenizer,
        precision="fp32",
        fused_attention=False,
    )
    planner = Planner(
        measured,
        gpu,
        Assumptions(efficiency=1.0, launch_us=5.0, reserve_gb=0),
        batch_size=config["batch_size"],
        micro_batch_size=config["micro_batch_size"],
    )
    plan = planner.plan(1)
    held = plan["memory"]["weights"] + plan["memory"]["optimizer state"]
    per_pair = measured.image.flops(1, backward=False) / 1e9, measured.text.flops(1, backward=False) / 1e9
    return {
        "peak": plan["memory_total"] - held,
        "seconds": plan["seconds_total"],
        "forward": per_pair,
        "plan": plan,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out", help="result file to write")
    parser.add_argument("--only", nargs="*", help="cases whose name contains one of these")
    given = parser.parse_args()
    if given.child:
        print(json.dumps(child(json.loads(given.child)["name"])))
        return
    torch.set_num_threads(1)
    facts, gpu = header(torch.device("cpu")), CPU.measured()
    facts["Rates"] = (
        f"{gpu.fp32_tflops * 1e3:.0f} GFLOP/s in an fp32 product, {gpu.memory_gbs:.1f} GB/s in a copy"
    )
    rows, counts, results, skipped = (
        [],
        [],
        {},
        ["Any GPU: none was here. Collectives and a real FSDP2: by tests/test_planner.py, in bytes."],
    )
    for name in CASES:
        if given.only and not any(part in name for part in given.only):
            continue
        real, plan = in_child(sys.argv[0], {"name": name}, timeout=600), predicted(name, gpu)
        if "skipped" in real:
            skipped.append(f"{name}: {real['skipped']}")
            continue
        seconds = quantiles(real["seconds"])[0]
        rows.append(
            {
                "step": name,
                "predicted, MB": f"{plan['peak'] / 1e6:.0f}",
                "allocated, MB": f"{real['allocated'] / 1e6:.0f}",
                "ratio": f"{plan['peak'] / real['allocated']:.2f}",
                "process, MB": f"{real['peak'] / 1e6:.0f}",
                "ratio ": f"{plan['peak'] / real['peak']:.2f}",
                "CPU seconds": f"{seconds:.2f}",
                "predicted, s": f"{plan['seconds']:.2f}",
                "ratio  ": f"{plan['seconds'] / seconds:.2f}",
            }
        )
        for part, counted, published in zip(
            ("image", "text"), plan["forward"], PUBLISHED.get(name, ()), strict=False
        ):
            counts.append(
                {
                    "tower": f"{name.split(',')[0]}, {part}",
                    "counted, 1e9": f"{counted:.2f}",
                    "published": f"{published:.2f}",
                }
            )
        results[name] = {"real": real, "predicted": plan}
        print(rows[-1], file=sys.stderr, flush=True)
    sections = [("A step's memory and time", table(rows)), ("Operations of a forward", table(counts))]
    report("clipkit-plan against real steps", facts, sections, results, skipped, given.out)


if __name__ == "__main__":
    main()
