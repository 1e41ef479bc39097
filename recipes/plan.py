"""What a training config takes on a GPU: memory by part, operations, communication, time, the largest batch.

    clipkit-plan experiment=cyclip_rn50_cc3m gpu=h100 gpus=8 batch_size=32768 micro_batch_size=512
    clipkit-plan experiment=cyclip_rn50_cc3m batch_size=32768 gpus=1,8,64,256,1024      # a table over numbers of GPUs
    clipkit-plan image_tower=clip_vit_b32 text_tower=transformer gpu=a100_80gb gpu.memory_gb=60 --json

Groups and keys are clipkit-pretrain's; `clipkit-plan --help` lists them and the plan's own (conf/plan.yaml,
conf/gpu). It reads no data and needs no GPU: see clipkit.planner for what is counted and what is derived or
assumed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from clipkit.data import create_tokenizer
from clipkit.files import write_json
from clipkit.loading import model_config
from clipkit.planner import GPU, Assumptions, Measured, Planner
from clipkit.sources import begin

ASSUMED_VOCABULARY = 10_000


def plan(config: Mapping[str, Any], run_dir: Path) -> None:
    """Print the plan, and write it to `output`; a ValueError at the end says what to lower where nothing fits.

    Args:
        config: the settings of conf/plan.yaml, which holds conf/pretrain.yaml's.
        run_dir: hydra's; nothing is written there.
    """
    if not config["loss"]:
        raise ValueError("the loss is empty: name at least one term, such as loss=clip")
    start = begin(config)
    config = start.config
    tokenizer, assumed = (
        (start.tokenizer, [])
        if start.tokenizer
        else vocabulary(config["data"]["tokenizer"], config["vocab_size"])
    )
    capability = config["gpu"]["capability"]
    gpu = GPU(**{**config["gpu"], "capability": capability and tuple(capability)}).measured()
    measured = Measured(
        model=model_config(config, pretrained=False),
        loss=config["loss"],
        optim=config["optim"],
        tokenizer=tokenizer,
        precision=config["precision"],
        tf32=config["tf32"],
        sentence_batch_size=config["data"]["sentences"]["batch_size"] or 0,
        captions_per_image=config["data"]["captions_per_image"],
        hard_negatives_per_caption=config["data"]["hard_negatives_per_caption"]
        if config["data"]["hard_negatives"]
        else 0,
        fused_attention=gpu.capability is not None,
    )
    assumptions = Assumptions(config["efficiency"], config["launch_us"], config["reserve_gb"])
    planner = Planner(
        measured,
        gpu,
        assumptions,
        batch_size=config["batch_size"],
        micro_batch_size=config["micro_batch_size"],
        parallel=config["parallel"],
        averaged=bool(config["ema_decay"]),
    )
    plans = [planner.plan(world_size) for world_size in config["gpus"]]
    for one in plans:
        one["largest"] = largest(planner, one["gpus"])
    result = {"parameters": measured.parameters, "assumed": assumed, "plans": plans}
    if config["output"]:
        write_json(Path(config["output"]), result)
    print(json.dumps(result) if config["json"] else text(result))
    if not any(one["fits"] for one in plans):
        raise ValueError(planner.advice(plans[-1]))


def vocabulary(spec: dict[str, Any], vocab_size: int | None) -> tuple[Any, list[str]]:
    """(the tokenizer's sizes and special ids, what of them is assumed)."""
    if spec["name"] != "words" or spec.get("path"):
        return create_tokenizer(spec), []
    size = vocab_size or ASSUMED_VOCABULARY
    assumed = (
        []
        if vocab_size
        else [
            f"a vocabulary of {size:,} words: the tokenizer `words` makes its own from the captions; give vocab_size=N"
        ]
    )
    return SimpleNamespace(
        vocab_size=size, context_length=spec["context_length"], pad_id=0, sot_id=2, eot_id=size - 1
    ), assumed


def largest(planner: Planner, world_size: int) -> dict[str, int | None]:
    """The most that fits: the micro-batch of this batch; the batch at once; the batch in micro-batches."""
    micro = planner.largest_micro_batch(world_size)
    wanted = planner.micro_batch_size or micro
    return {
        "micro_batch_size": micro,
        "batch_size_at_once": planner.largest_batch(world_size, micro=None),
        "batch_size_cached": planner.largest_batch(world_size, micro=min(wanted, micro)) if micro else None,
    }


def text(result: dict[str, Any]) -> str:
    """The plans for people: one in full, several as a table."""
    plans = result["plans"]
    lines = [f"{result['parameters'] / 1e6:.1f} M parameters"] + [
        f"assumed: {line}" for line in result["assumed"]
    ]
    lines += [in_full(plans[0])] if len(plans) == 1 else [scaling(plans)]
    return "\n".join(lines)


def in_full(plan: dict[str, Any]) -> str:
    """Every part of one plan."""
    pieces = (
        f", {plan['micro_batches']} micro-batches of {plan['micro_batch_size']}"
        if plan["micro_batches"] > 1
        else ""
    )
    lines = [
        f"{plan['gpus']} x {plan['gpu']}, batch {plan['batch_size']}: {plan['pairs_per_gpu']} pairs a GPU{pieces}",
        "",
    ]
    lines += _section("memory a GPU, GB", plan["memory"], 1e9)
    lines += [f"  {'at most at once':<22}{plan['memory_total'] / 1e9:>12.2f}"]
    lines += [
        f"  {'of':<22}{plan['memory_limit'] / 1e9:>12.2f}   {'fits' if plan['fits'] else 'DOES NOT FIT'}",
        "",
    ]
    lines += _section("loss workspace by impl, GB", plan["loss_workspace"], 1e9, mark=plan["impl"])
    if plan["operands"]:
        operands = ", ".join(f"{term} {precision}" for term, precision in plan["operands"].items())
        lines += [f"  triton's operands: {operands}"]
    lines += ["", *_section("operations a GPU, 1e12", plan["flops"], 1e12, plan["flops_total"])]
    lines += [
        "",
        *_section("sent by a GPU, MB", plan["communication"], 1e6, sum(plan["communication"].values())),
    ]
    lines += ["", *_section("estimated time, ms", plan["seconds"], 1e-3, plan["seconds_total"])]
    lines += [
        f"  {plan['images_per_second']:,.0f} pairs/s over all GPUs, {plan['model_flops_fraction']:.0%} of the GPU's peak",
        "",
        "largest that fits",
    ]
    largest = plan["largest"]
    lines += [
        f"  micro_batch_size at this batch_size: {largest['micro_batch_size'] or 'none'}",
        f"  batch_size without micro-batches (a power of two a GPU): {largest['batch_size_at_once'] or 'none'}",
        f"  batch_size with micro-batches (a power of two a GPU): {largest['batch_size_cached'] or 'none'}",
    ]
    return "\n".join(lines)


def _section(
    title: str, parts: dict[str, float], unit: float, total: float | None = None, mark: str | None = None
) -> list[str]:
    lines = [title] + [
        f"  {name:<22}{value / unit:>12.2f}{'   <- used' if name == mark else ''}"
        for name, value in parts.items()
    ]
    return lines + ([f"  {'total':<22}{total / unit:>12.2f}"] if total is not None else [])


def scaling(plans: list[dict[str, Any]]) -> str:
    """One line a number of GPUs."""
    first = plans[0]
    lines = [
        f"{first['gpu']}, batch {first['batch_size']}; memory and traffic are a GPU's, pairs/s are of all",
        "",
        f"{'GPUs':>6}{'pairs':>8}{'micro':>7}{'memory GB':>11}{'fits':>6}{'sent MB':>9}{'step ms':>10}{'pairs/s':>12}{'scaling':>10}"
        f"{'largest micro':>15}{'largest batch':>15}",
    ]
    for plan in plans:
        scaled = plan["images_per_second"] / plan["gpus"] / (first["images_per_second"] / first["gpus"])
        lines.append(
            f"{plan['gpus']:>6}{plan['pairs_per_gpu']:>8}{plan['micro_batch_size']:>7}{plan['memory_total'] / 1e9:>11.1f}"
            f"{'yes' if plan['fits'] else 'no':>6}{sum(plan['communication'].values()) / 1e6:>9.0f}{plan['seconds_total'] * 1e3:>10.1f}"
            f"{plan['images_per_second']:>12,.0f}{scaled:>10.0%}{plan['largest']['micro_batch_size'] or 'none':>15}"
            f"{plan['largest']['batch_size_cached'] or 'none':>15}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    from clipkit.command import plan as command

    command()
