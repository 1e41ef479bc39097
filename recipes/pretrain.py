"""Pretrain a dual encoder from webdataset shards, evaluate it, and leave a run folder.

    clipkit-pretrain                                                # generated shapes: minutes on a laptop
    clipkit-pretrain experiment=flickr8k_tiny loss=cyclip           # real photographs on a CPU
    clipkit-pretrain -m 'loss=clip,cyclip,[cyclip,simcse]' seed=0,1  # six runs, six folders

The same command finds the same folder: it resumes a run that was stopped, and only reports one that is finished.
clipkit.command composes the settings from conf/pretrain.yaml and calls `pretrain` here, once on every rank.

A batch goes from shards through two towers to unit features, and from there to the loss:

    image (B, 3, H, W), text (B, L)  --model-->  image_features (B, D), text_features (B, D), logit_scale ()
    features  --loss-->  {"loss": (), and each term: ()}       for `loss=clip` on one process, in three lines:

        logits = logit_scale * image_features @ text_features.T           # (N, N), the pairs on its diagonal
        labels = torch.arange(len(logits))
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from clipkit.data import Augment, create_augment, create_tokenizer, resolve_data, train_captions
from clipkit.distributed import gather_objects, rank, world_size
from clipkit.grad_cache import cached_backward
from clipkit.loading import model_config
from clipkit.losses import WeightedSum, create_loss
from clipkit.model import DualEncoder, add_adapters, create_model
from clipkit.optim import WeightAverage, create_optimizer, create_schedule
from clipkit.settings import LENGTH
from clipkit.sharding import optimizer_parameters, shard
from clipkit.sources import begin
from clipkit.training import feed, lock, precision, process, run_folder, speed
from clipkit.training.evaluation import Evaluation
from clipkit.training.record import Record
from clipkit.training.saving import Checkpoints


def pretrain(config: Mapping[str, Any], run_dir: Path) -> dict[str, float]:
    """Enter the run folder and train, unless the run in it is finished.

    Args:
        config: the settings of conf/pretrain.yaml, composed and resolved.
        run_dir: the run's folder; it is made, or gone on with.

    Returns:
        The final metrics, {"task/metric": value}.
    """
    device = process.choose_device(config["device"])
    with (
        process.process_group(device, config["timeout_minutes"]),
        process.held_by_rank_0(lock.locked(run_dir)),
        run_folder.failure_recorded(run_dir),
    ):
        finished = process.on_rank_0_first(lambda: run_folder.open_run(run_dir, config))
        if finished is None:
            return build_and_train(run_folder.amended(run_dir, config), run_dir, device)
        if rank() == 0:
            run_folder.show_finished(run_dir, finished)
        return finished["metrics"]


def build_and_train(config: Mapping[str, Any], run_dir: Path, device: torch.device) -> dict[str, float]:
    """Make what the config names, train it, and leave the summary that marks the run as finished.

    Whatever can be wrong with the config is an error here, before the first step.
    """
    if config["num_threads"]:
        torch.set_num_threads(config["num_threads"])
    if precision.use_tf32(config["tf32"] and config["precision"] == "fp32", device) and rank() == 0:
        print("fp32 products on this GPU use TF32; tf32=false for full fp32", flush=True)
    # Every rank draws the same weights.
    torch.manual_seed(config["seed"])

    # Weights to begin with, of another model: they decide what `source` stands for in the settings.
    start = process.on_rank_0_first(lambda: begin(config, run_dir))
    config = start.config

    # Data. The tokenizer comes first, for the model has a row of weights for each of its tokens; the shards are
    # opened once the model has said its image size and the loss what it reads.
    data = process.on_rank_0_first(lambda: resolve_data(config["data"]))
    tokenizer = start.tokenizer or create_tokenizer(data["tokenizer"], captions=lambda: train_captions(data))

    # Model: image tower, text tower, projections, logit_scale.
    sharded = process.sharded(config["parallel"])
    model = create_model(model_config(config), tokenizer=tokenizer, adapters=False)
    run_folder.record_start(run_dir, start.load(model, tokenizer))
    add_adapters(model, config)
    model = model.to(device)
    precision.cast_towers(model, config["precision"], sharded=sharded)
    if config["channels_last"] and not sharded:
        # FSDP2 takes contiguous weights alone; its images come in channels_last all the same.
        model.image_tower.to(memory_format=torch.channels_last)
    if config["compile"]:
        process.compile_towers(model, by_block=sharded)

    # Loss: a weighted sum. What its terms read decides which passes the model makes and what data is read.
    loss = create_loss(config["loss"], towers=config["precision"]).to(device)
    model.check_inputs(loss.inputs)
    stream, sentences = feed.open_streams(
        data,
        loss,
        tokenizer=tokenizer,
        image_tower=model.image_tower,
        batch_size=config["batch_size"],
        seed=config["seed"],
    )

    # Optimizer and schedule, over the parts of the weights that this rank holds.
    if sharded:
        model, loss = shard(model), shard(loss)
    total_steps = feed.total_steps(
        config["steps"],
        config["epochs"],
        batch_size=config["batch_size"],
        batches_per_epoch=stream.batches_per_epoch,
    )
    optimizer = create_optimizer([model, loss], **config["optim"])
    schedule = create_schedule(
        optimizer,
        name=config["schedule"],
        total_steps=total_steps,
        warmup_steps=config["warmup_steps"],
        final=config["final_lr"],
        cooldown_steps=config["cooldown_steps"],
    )
    average = WeightAverage(model, decay=config["ema_decay"]) if config["ema_decay"] else None
    loss_scale = precision.LossScale(config["precision"])

    # What watches the loop: numbers, checkpoints, scores.
    record = Record(
        run_dir,
        total_steps=total_steps,
        log_every=config["log_every"],
        loss_spike=config["loss_spike"],
        skip_nonfinite=config["skip_nonfinite"],
        loggers=config["logger"],
        shown=config,
        speed=speed.create_speed(config, tokenizer, device),
        profile=config["profile"],
    )
    checkpoints = Checkpoints(
        run_dir / "checkpoints",
        model=model,
        loss=loss,
        optimizer=optimizer,
        schedule=schedule,
        stream=stream,
        sentences=sentences,
        average=average,
        loss_scale=loss_scale,
        tokenizer=tokenizer,
        config=config,
        total_steps=total_steps,
        every=config["save_every"],
        keep=config["keep"],
        best_metric=config["best_metric"],
        skipped=record.skipped,
        say=record.say,
    )
    evaluation = Evaluation(
        model,
        tokenizer,
        config["eval"],
        model_config=model_config(config, pretrained=False),
        device=device,
        batch_size=config["batch_size"],
        total_steps=total_steps,
        average=average,
        at_end=config["final_eval"],
        every=config["eval_every"],
        best_metric=config["best_metric"],
        objective=config["objective"],
        record=record,
        checkpoints=checkpoints,
    )
    # From here on ranks draw dropout masks of their own.
    torch.manual_seed(config["seed"] * world_size() + rank())
    step, metrics = checkpoints.resume()
    # A run that ended while it was scored, or could not be, is scored first.
    metrics = evaluation.resume(step, metrics)

    # Loop.
    metrics = train(
        model,
        loss,
        feed.on_device(feed.joined(stream, sentences), device),
        optimizer,
        schedule,
        average=average,
        augment=create_augment(data["augmentation"], seed=config["seed"]),
        steps=range(step, total_steps),
        device=device,
        autocast=precision.autocast(config["precision"], device),
        loss_scale=loss_scale,
        micro_batch_size=config["micro_batch_size"],
        clip_grad_norm=config["clip_grad_norm"],
        max_logit_scale=config["max_logit_scale"],
        record=record,
        evaluation=evaluation,
        checkpoints=checkpoints,
        skip_nonfinite=config["skip_nonfinite"] > 0,
        stop=process.StopRequest(config["max_minutes"], faults=stream.faults),
        metrics=metrics,
    )
    reports = gather_objects(stream.report())
    if rank() == 0:
        run_folder.finish(
            run_dir,
            total_steps,
            metrics,
            reports,
            length={key: config[key] for key in LENGTH},
            seconds=record.seconds,
            skipped_steps=record.skipped,
        )
    return metrics


def train(
    model: DualEncoder,
    loss: WeightedSum,
    batches: Iterator[feed.Batch],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    *,
    average: WeightAverage | None,
    augment: Augment,
    steps: range,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    loss_scale: precision.LossScale,
    micro_batch_size: int | None,
    clip_grad_norm: float | None,
    max_logit_scale: float,
    record: Record,
    evaluation: Evaluation,
    checkpoints: Checkpoints,
    skip_nonfinite: bool,
    stop: process.StopRequest,
    metrics: dict[str, float],
) -> dict[str, float]:
    """The loop: batch, features, loss, backward, step.

    Args:
        batches: this rank's shares, on `device`.
        steps: those to take; the first is more than 0 in a run that resumes.
        autocast: makes the context that the towers run in.
        micro_batch_size: pairs that activations are held for at once; None: all of this rank's.
        skip_nonfinite: a step may be left out, and must then leave nothing behind.
        metrics: of the last evaluation, returned where no step is left.

    Returns:
        The metrics of the evaluation after the last step.
    """
    wanted = (*loss.inputs, *loss.optional_inputs)
    # Ranks encode their own rows; DDP averages the towers' gradients. FSDP2 has put that into the model already.
    encode = process.data_parallel(model, device, wanted=wanted)
    loss = process.data_parallel(loss, device)
    parameters = optimizer_parameters(optimizer)
    buffers = process.Buffers([model, loss] if skip_nonfinite or loss_scale.enabled else [])
    model.train()
    for step in record.steps(steps):
        with record.waiting():
            batch = next(batches)
        batch = feed.augmented(batch, augment, wanted, draw=step * world_size() + rank())
        buffers.keep()

        if micro_batch_size:
            # Summing the losses of micro-batches would contrast each within itself alone. The gradient cache takes
            # the loss over all pairs at once, and runs the towers again to carry its gradient back.
            terms = cached_backward(
                encode,
                loss,
                batch,
                micro_batch_size=micro_batch_size,
                inputs=wanted,
                autocast=autocast(),
                backward_scale=loss_scale.value,
            )
        else:
            with autocast():
                features = encode(batch, wanted)
            # Outside autocast: similarities and their softmax are fp32 whatever the towers' precision. The loss
            # gathers the other ranks' features, so its value and gradient are those of the global batch.
            terms = loss(features)
            (terms["loss"] * loss_scale.value).backward()
        loss_scale.unscale(parameters)
        norm = process.clip_grad_norm(parameters, clip_grad_norm or math.inf)
        if loss_scale.overflowed(terms["loss"], norm):
            record.say(
                f"step {step + 1} overflowed fp16 and is left out; the loss scale is now {loss_scale.value:g}"
            )
            numbers = None
        else:
            # A loss that is not finite stops every rank here, or is left out by every rank, with the weights as they were.
            numbers = record.finite(step + 1, {**terms, "grad_norm": norm}, batch.get("key", []))
        if numbers is not None:
            optimizer.step()
            # The learned temperature may not sharpen without bound (CLIP, section 2.5).
            model.clamp_logit_scale(max_logit_scale)
            if average:
                average.update(model)
        else:
            buffers.restore()
        lr = schedule.get_last_lr()[0]
        schedule.step()
        optimizer.zero_grad(set_to_none=True)

        done = step + 1
        if numbers is not None:
            record.step(done, numbers, lr=lr, logit_scale=model.logit_scale, keys=batch.get("key", []))
        stopping = stop.agree(device)
        with record.paused():
            # Saved before it is scored: an evaluation that fails, or is ended, costs no step.
            checkpoints.after(done, stopping=stopping is not None)
            if stopping and done < steps.stop:
                record.close()
                stop.leave(done)
            metrics = evaluation.after(done, batch)
    record.close()
    return metrics


if __name__ == "__main__":
    from clipkit.command import run

    run("pretrain")
