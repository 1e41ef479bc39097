"""Pretrain a dual encoder from webdataset shards, evaluate it, and leave a run folder.

    clipkit-pretrain                                                # generated shapes: minutes on a laptop
    clipkit-pretrain experiment=flickr8k_tiny loss=cyclip           # real photographs on a CPU
    clipkit-pretrain experiment=cyclip_rn50_cc3m 'loss=[cyclip,simcse]'
    clipkit-pretrain -m 'loss=clip,cyclip,[cyclip,simcse]' seed=0,1  # six runs, six folders

The same command finds the same folder: it resumes a run that was stopped, and only reports one that is
finished. Nothing imported at the top imports torch, so the command line answers at once.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipkit.recipes import batches, run_folder, saving, session
from clipkit.recipes.cli import run
from clipkit.recipes.progress import Progress
from clipkit.registry import unknown

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main() -> None:
    """The console command."""
    run(pretrain, "pretrain")


def pretrain(cfg: DictConfig, run_dir: Path) -> dict[str, float]:
    """One run from its config; returns the final metrics."""
    device = session.choose_device(cfg.device)
    with (
        session.process_group(device, cfg.timeout_minutes) as (rank, world_size),
        run_folder.failure_recorded(run_dir),
    ):
        config = session.on_rank_0_first(lambda: resolved(cfg))
        finished = session.on_rank_0_first(lambda: run_folder.open_run(run_dir, config))
        if finished:
            if rank == 0:
                print(
                    f"{run_dir} is finished; give name=ANOTHER to train again beside it. Its final numbers:"
                )
                print(run_folder.table(finished["metrics"]))
            return finished["metrics"]
        state = build(config, run_dir, device, rank, world_size)
        saving.resume(state)
        return train(state)


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain values. Generated data is written first, so that `${data.val}` names real shards."""
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import InterpolationResolutionError

    from clipkit.data import resolve_data

    with open_dict(cfg):
        cfg.data = resolve_data(OmegaConf.to_container(cfg.data, resolve=True))
        # An empty choice, such as eval=[], leaves its group out altogether.
        for group in ("loss", "eval", "logger"):
            cfg[group] = cfg.get(group) or {}
    try:
        return OmegaConf.to_container(cfg, resolve=True)
    except InterpolationResolutionError as error:
        raise ValueError(
            f"{error.full_key} reads a setting that is not there ({str(error).splitlines()[0]}). If this data has no such part, "
            "choose another eval= (eval=none for no evaluation)"
        ) from error


@dataclass
class State:
    """Everything a run holds; `step` steps are done."""

    config: dict[str, Any]
    run_dir: Path
    device: Any
    rank: int
    world_size: int
    model: Any
    loss: Any
    tokenizer: Any
    stream: Any
    sentences: Any
    optimizer: Any
    schedule: Any
    total: int
    average: Any = None
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    saving: Any = None
    saving_group: Any = None

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"


def build(config: dict[str, Any], run_dir: Path, device: Any, rank: int, world_size: int) -> State:
    """Make what the config names; everything that can be wrong with it is an error here, before the first
    step.
    """
    import torch

    from clipkit.checkpoint import model_config
    from clipkit.data import create_stream, create_tokenizer, train_captions
    from clipkit.evals import create_tasks
    from clipkit.loggers import tolerate_broken_wandb
    from clipkit.losses import create_loss
    from clipkit.model import create_model
    from clipkit.optim import WeightAverage, create_optimizer, create_schedule
    from clipkit.sharding import shard

    tolerate_broken_wandb()
    if config["num_threads"]:
        torch.set_num_threads(config["num_threads"])
    torch.manual_seed(config["seed"])
    loss = create_loss(config["loss"])
    data = config["data"]
    tokenizer = create_tokenizer(data["tokenizer"], captions=lambda: train_captions(data))
    model = create_model(model_config(config), tokenizer=tokenizer)
    model.check_inputs(loss.inputs)
    model, loss = model.to(device), loss.to(device)
    sharded = session.sharded(config["parallel"])
    if config["channels_last"] and not sharded:
        # FSDP2 takes contiguous weights alone; the images come in channels_last all the same.
        model.image_tower.to(memory_format=torch.channels_last)
    if config["compile"]:
        session.compile_towers(model, by_block=sharded)
    if sharded:
        model, loss = shard(model), shard(loss)
    share = {"seed": config["seed"], "rank": rank, "world_size": world_size}
    stream = create_stream(
        data,
        tokenizer=tokenizer,
        image_size=model.image_tower.image_size,
        num_workers=data["num_workers"],
        batch_size=batches.split(config["batch_size"], world_size, "batch_size"),
        **share,
    )
    sentences = batches.sentence_stream(config, loss.inputs, tokenizer, share)
    create_tasks(config["eval"])
    for task in config["final_eval"]:
        if task not in config["eval"]:
            raise unknown("task of final_eval", task, config["eval"])
    if config["best_metric"] and config["best_metric"].split("/")[0] not in config["eval"]:
        raise unknown(
            "task of best_metric", config["best_metric"], [f"{task}/..." for task in config["eval"]]
        )
    total = batches.total_steps(config, stream.batches_per_epoch)
    optim = dict(config["optim"])
    schedule = {
        "name": optim.pop("schedule"),
        "warmup_steps": optim.pop("warmup_steps"),
        "final": optim.pop("final"),
    }
    optimizer = create_optimizer([model, loss], **optim)
    schedule = create_schedule(optimizer, total_steps=total, **schedule)
    average = WeightAverage(model, decay=config["ema_decay"]) if config["ema_decay"] else None
    # Ranks start from the same weights, and go on with dropout masks of their own.
    torch.manual_seed(config["seed"] * world_size + rank)
    return State(
        config,
        run_dir,
        device,
        rank,
        world_size,
        model,
        loss,
        tokenizer,
        stream,
        sentences,
        optimizer,
        schedule,
        total,
        average,
        saving_group=torch.distributed.new_group(backend="gloo") if sharded else None,
    )


def train(state: State) -> dict[str, float]:
    """The loop: batch, features, losses, backward, step; then the final evaluation and summary."""

    from clipkit.data import create_augment
    from clipkit.distributed import barrier, gather_objects
    from clipkit.grad_cache import cached_backward
    from clipkit.loggers import Loggers
    from clipkit.sharding import optimizer_parameters

    config, model, loss = state.config, state.model, state.loss
    loggers = None
    if state.rank == 0:
        loggers = Loggers(state.run_dir, config["logger"], config=config, start_step=state.step)
    progress = Progress(
        step=state.step,
        total=state.total,
        batch_size=config["batch_size"],
        every=config["log_every"],
        enabled=state.rank == 0,
    )
    progress.say(f"run folder {state.run_dir}" + (f", resumed at step {state.step}" if state.step else ""))
    parameters = optimizer_parameters(state.optimizer)
    wanted = (*loss.inputs, *loss.optional_inputs)
    augment = create_augment(config["data"]["augmentation"], seed=config["seed"])
    encode = session.data_parallel(model, state.device, wanted=wanted)
    loss = session.data_parallel(loss, state.device)
    autocast = session.autocast(config["precision"], state.device)
    stop = session.StopRequest(config["max_minutes"])
    spikes = run_folder.SpikeRecord(state.run_dir, config["loss_spike"])
    source = batches.joined(state.stream, state.sentences)
    started = time.monotonic()
    model.train()
    while state.step < state.total:
        waited = time.monotonic()
        batch = batches.to_device(next(source), state.device)
        batch = batches.augmented(batch, augment, wanted, state.step * state.world_size + state.rank)
        waited = time.monotonic() - waited
        if config["micro_batch_size"]:
            terms = cached_backward(
                encode,
                loss,
                batch,
                micro_batch_size=config["micro_batch_size"],
                inputs=wanted,
                autocast=autocast(),
            )
        else:
            with autocast():
                features = encode(batch, wanted)
            terms = loss(features)
            terms["loss"].backward()
        norm = session.clip_grad_norm(parameters, config["clip_grad_norm"] or math.inf)
        keys = batch.get("key", [])
        numbers = run_folder.checked_finite(
            {**terms, "grad_norm": norm}, state.run_dir, step=state.step + 1, keys=keys
        )
        state.optimizer.step()
        state.schedule.step()
        state.optimizer.zero_grad(set_to_none=True)
        model.clamp_logit_scale(config["max_logit_scale"])
        if state.average:
            state.average.update(model)
        state.step += 1
        state.metrics = {}

        last = state.step == state.total
        lr = state.schedule.get_last_lr()[0]
        if last or due(state.step, config["log_every"]):
            logit_scale = model.logit_scale.item()
            if loggers:
                loggers.log(
                    state.step,
                    {
                        **{f"train/{name}": value for name, value in numbers.items()},
                        "train/lr": lr,
                        "train/logit_scale": logit_scale,
                        "train/data_seconds": waited,
                        "train/seconds": time.monotonic() - started,
                    },
                )
        progress.show(state.step, {**{name: numbers[name] for name in terms}, "lr": lr})
        spikes.see(state.step, numbers["loss"], keys, progress)
        if last or due(state.step, config["eval_every"]):
            state.metrics = score(state)
            if loggers and state.metrics:
                loggers.log(state.step, {f"eval/{name}": value for name, value in state.metrics.items()})
            if not last:
                progress.say(f"step {state.step} evaluation\n{run_folder.table(state.metrics)}")
        perhaps_best = bool(state.metrics and config["best_metric"])
        if stop.agree(state.device) or last or perhaps_best or due(state.step, config["save_every"]):
            saving.save(state, progress, now=last or stop.reason is not None)
        if stop.reason and not last:
            progress.close()
            if loggers:
                loggers.close()
                print(
                    f"stopped by {stop.reason} at step {state.step}, saved; run the same command to go on",
                    flush=True,
                )
            # A rank that leaves is taken for failed and the others are ended: rank 0 must have saved.
            barrier()
            sys.exit(session.STOPPED)
    progress.close()
    reports = gather_objects(state.stream.report())
    if loggers:
        loggers.close()
        finish(state, reports, seconds=time.monotonic() - started)
    return state.metrics


def finish(state: State, reports: list[dict[str, Any]], *, seconds: float) -> None:
    """The summary on disk, which marks the run as finished, and the final table."""
    run_folder.write_summary(
        state.run_dir,
        finished=True,
        step=state.step,
        metrics=state.metrics,
        data=run_folder.joined_reports(reports),
        seconds_this_session=round(seconds, 1),
    )
    scores = (
        f"(fractions, 1 is perfect):\n{run_folder.table(state.metrics)}"
        if state.metrics
        else "none: eval= names no task"
    )
    print(f"\nFinal numbers after {state.step} steps {scores}")
    print(f"Everything is in {state.run_dir}: metrics.jsonl, checkpoints/, summary.json")


def score(state: State) -> dict[str, float]:
    """The evaluation tasks due at this step: {"task/metric": value}."""
    from clipkit.evals import evaluate

    tasks = state.config["eval"]
    if state.step < state.total:
        tasks = {name: task for name, task in tasks.items() if name not in state.config["final_eval"]}
    with session.evaluated_model(state) as model:
        results = evaluate(
            model,
            state.tokenizer,
            tasks,
            device=state.device,
            batch_size=state.config["batch_size"],
            group="auto",
        )
    metrics, best = run_folder.flatten(results), state.config["best_metric"]
    if best and best not in metrics:
        raise unknown("best_metric", best, metrics)
    return metrics


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


if __name__ == "__main__":
    main()
