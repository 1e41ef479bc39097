"""Pretrain a dual encoder from webdataset shards, evaluate it, and leave a run folder.

    clipkit-pretrain                                                # generated shapes: minutes on a laptop
    clipkit-pretrain experiment=flickr8k_tiny loss=cyclip           # real photographs on a CPU
    clipkit-pretrain experiment=cyclip_rn50_cc3m 'loss=[cyclip,simcse]'
    clipkit-pretrain -m 'loss=clip,cyclip,[cyclip,simcse]' seed=0,1  # six runs, six folders

The same command finds the same folder: it resumes a run that was stopped, and only reports one that is finished.
Nothing imported at the top imports torch, so the command line answers at once.
"""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipkit.recipes import run_folder
from clipkit.recipes.cli import run
from clipkit.recipes.progress import Progress

if TYPE_CHECKING:
    from omegaconf import DictConfig

# The status of sysexits' EX_TEMPFAIL: stopped by a signal with everything saved; the same command goes on.
STOPPED = 75


def main() -> None:
    """The console command."""
    run(pretrain, "pretrain")


def pretrain(cfg: DictConfig, run_dir: Path) -> dict[str, float]:
    """One run from its config; returns the final metrics."""
    config = resolved(cfg)
    finished = run_folder.open_run(run_dir, config)
    if finished:
        print(f"{run_dir} is finished; give name=ANOTHER to train again beside it. Its final numbers:")
        print(run_folder.table(finished["metrics"]))
        return finished["metrics"]
    with run_folder.failure_recorded(run_dir):
        state = build(config, run_dir)
        resume(state)
        return train(state)


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain values. Generated data is written first, so that `${data.val}` names real shards."""
    from omegaconf import OmegaConf, open_dict

    from clipkit.data import resolve_data

    with open_dict(cfg):
        cfg.data = resolve_data(OmegaConf.to_container(cfg.data, resolve=True))
    return OmegaConf.to_container(cfg, resolve=True)


@dataclass
class State:
    """Everything a run holds; `step` steps are done."""

    config: dict[str, Any]
    run_dir: Path
    device: Any
    model: Any
    loss: Any
    tokenizer: Any
    stream: Any
    sentences: Any
    optimizer: Any
    schedule: Any
    total: int
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"


def build(config: dict[str, Any], run_dir: Path) -> State:
    """Make what the config names; everything that can be wrong with it is an error here, before the first step."""
    import torch

    from clipkit.checkpoint import model_config
    from clipkit.data import create_stream, create_tokenizer, train_captions
    from clipkit.evals import create_tasks
    from clipkit.losses import create_loss
    from clipkit.model import create_model
    from clipkit.optim import create_optimizer, create_schedule

    if config["num_threads"]:
        torch.set_num_threads(config["num_threads"])
    device = choose_device(config["device"])
    torch.manual_seed(config["seed"])
    loss = create_loss(config["loss"])
    data = config["data"]
    tokenizer = create_tokenizer(data["tokenizer"], captions=lambda: train_captions(data))
    model = create_model(model_config(config), tokenizer=tokenizer)
    model.check_inputs(loss.inputs)
    model, loss = model.to(device), loss.to(device)
    if config["channels_last"]:
        model.image_tower.to(memory_format=torch.channels_last)
    stream = create_stream(
        data, tokenizer=tokenizer, image_size=model.image_tower.image_size, batch_size=config["batch_size"],
        seed=config["seed"], num_workers=data["num_workers"])
    sentences = sentence_stream(config, loss.inputs, tokenizer)
    create_tasks(config["eval"] or {})
    total = total_steps(config, stream.batches_per_epoch)
    optim = dict(config["optim"])
    schedule = {"name": optim.pop("schedule"), "warmup_steps": optim.pop("warmup_steps"), "final": optim.pop("final")}
    optimizer = create_optimizer([model, loss], **optim)
    schedule = create_schedule(optimizer, total_steps=total, **schedule)
    return State(config, run_dir, device, model, loss, tokenizer, stream, sentences, optimizer, schedule, total)


def sentence_stream(config: dict[str, Any], inputs: tuple[str, ...], tokenizer: Any) -> Any:
    """The second stream, of NLI sentences, when a loss asks for it; None otherwise."""
    from clipkit.data import create_sentences

    needed = {"triplets": "premise_features" in inputs, "pairs": "pair_premise_features" in inputs}
    if not any(needed.values()):
        return None
    given = config["data"]["sentences"] or {}
    for name in (name for name in needed if needed[name]):
        if not given.get(name):
            raise ValueError(f"this loss learns from NLI {name}: give data.sentences.{name}=FILE (jsonl or csv), or leave it out")
    return create_sentences(
        {name: given[name] for name in needed if needed[name]}, tokenizer=tokenizer, batch_size=given["batch_size"],
        seed=config["seed"])


def train(state: State) -> dict[str, float]:
    """The loop: batch, features, losses, backward, step; then the final evaluation and summary."""
    import torch

    from clipkit.data import create_augment
    from clipkit.grad_cache import cached_backward
    from clipkit.loggers import Loggers

    config, model, loss = state.config, state.model, state.loss
    loggers = Loggers(state.run_dir, config["logger"] or {}, config=config, start_step=state.step)
    progress = Progress(step=state.step, total=state.total, batch_size=config["batch_size"], every=config["log_every"])
    progress.say(f"run folder {state.run_dir}" + (f", resumed at step {state.step}" if state.step else ""))
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    wanted = (*loss.inputs, *loss.optional_inputs)
    augment = create_augment(config["data"]["augmentation"], seed=config["seed"])
    encode = torch.compile(model) if config["compile"] else model
    autocast = precision(config["precision"], state.device)
    stop = StopRequest()
    batches = joined_batches(state.stream, state.sentences)
    started = time.monotonic()
    model.train()
    while state.step < state.total:
        waited = time.monotonic()
        batch = augmented(to_device(next(batches), state.device), augment, wanted, state.step)
        waited = time.monotonic() - waited
        if config["micro_batch_size"]:
            terms = cached_backward(
                encode, loss, batch, micro_batch_size=config["micro_batch_size"], inputs=wanted, autocast=autocast())
        else:
            with autocast():
                features = encode(batch, wanted)
            terms = loss(features)
            terms["loss"].backward()
        check_finite(terms, state, batch)
        norm = torch.nn.utils.clip_grad_norm_(parameters, config["clip_grad_norm"] or math.inf)
        state.optimizer.step()
        state.schedule.step()
        state.optimizer.zero_grad(set_to_none=True)
        model.clamp_logit_scale(config["max_logit_scale"])
        state.step += 1

        numbers = {name: value.item() for name, value in terms.items()}
        if state.step % config["log_every"] == 0 or state.step == state.total:
            loggers.log(state.step, {
                **{f"train/{name}": value for name, value in numbers.items()},
                "train/lr": state.schedule.get_last_lr()[0], "train/grad_norm": norm.item(),
                "train/logit_scale": model.logit_scale.item(), "train/data_seconds": waited,
                "train/seconds": time.monotonic() - started})
        progress.show(state.step, {**numbers, "lr": state.schedule.get_last_lr()[0]})
        last = state.step == state.total
        if last or due(state.step, config["eval_every"]):
            state.metrics = score(state)
            loggers.log(state.step, {f"eval/{name}": value for name, value in state.metrics.items()})
            progress.say(f"step {state.step} evaluation\n{run_folder.table(state.metrics)}")
        if last or stop.signal or due(state.step, config["save_every"]):
            save(state, progress)
        if stop.signal and not last:
            progress.close()
            loggers.close()
            print(f"stopped by {signal.Signals(stop.signal).name} at step {state.step}, saved; run the same command to go on")
            sys.exit(STOPPED)
    progress.close()
    loggers.close()
    run_folder.write_summary(
        state.run_dir, finished=True, step=state.step, metrics=state.metrics, train_loss=numbers["loss"],
        seconds_this_session=round(time.monotonic() - started, 1), data=state.stream.report())
    print(f"\nFinal numbers after {state.step} steps (fractions, 1 is perfect):\n{run_folder.table(state.metrics)}")
    print(f"Everything is in {state.run_dir}: metrics.jsonl, checkpoints/, summary.json")
    return state.metrics


def score(state: State) -> dict[str, float]:
    """Every evaluation task of the config: {"task/metric": value}."""
    from clipkit.evals import evaluate

    state.model.eval()
    results = evaluate(
        state.model, state.tokenizer, state.config["eval"] or {}, device=state.device,
        batch_size=state.config["batch_size"])
    state.model.train()
    return run_folder.flatten(results)


def save(state: State, progress: Progress) -> None:
    """Write a checkpoint and drop old ones; a disk that is full leaves the last good one and a warning."""
    from clipkit.checkpoint import latest_checkpoint, prune, rng_state, save_checkpoint

    weights = {f"model.{name}": tensor for name, tensor in state.model.state_dict().items()}
    weights.update({f"loss.{name}": tensor for name, tensor in state.loss.state_dict().items()})
    train_state = {
        "optimizer": state.optimizer.state_dict(), "schedule": state.schedule.state_dict(), "rng": [rng_state()],
        "stream": state.stream.state_dict(), "sentences": state.sentences.state_dict() if state.sentences else None}
    try:
        save_checkpoint(
            state.checkpoints, state.step, weights=weights, train_state=train_state, config=state.config,
            tokenizer=state.tokenizer, metrics=state.metrics)
    except OSError as error:
        kept = latest_checkpoint(state.checkpoints)
        if state.step == state.total:
            raise OSError(f"the final checkpoint could not be written ({error}); the last good one is {kept}") from error
        progress.say(f"warning: no checkpoint at step {state.step}: {error}; the last good one is {kept}")
        return
    prune(state.checkpoints, keep=state.config["keep"], metric=state.config["best_metric"])


def resume(state: State) -> None:
    """Continue from the folder's newest good checkpoint, if there is one."""
    from clipkit.checkpoint import latest_checkpoint, load_checkpoint, set_rng_state, split_weights

    path = latest_checkpoint(state.checkpoints)
    if path is None:
        return
    loaded = load_checkpoint(path, verified=True)
    state.model.load_state_dict(split_weights(loaded["weights"], "model"))
    state.loss.load_state_dict(split_weights(loaded["weights"], "loss"))
    saved = loaded["train_state"]
    state.optimizer.load_state_dict(saved["optimizer"])
    state.schedule.load_state_dict(saved["schedule"])
    state.stream.load_state_dict(saved["stream"])
    if state.sentences:
        state.sentences.load_state_dict(saved["sentences"])
    set_rng_state(saved["rng"][0])
    state.step, state.metrics = loaded["step"], loaded["metrics"]


class StopRequest:
    """Turns SIGTERM and Ctrl-C into a flag that the loop reads between steps; a second one interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        # Signals can only be caught in the main thread; a launcher may run jobs in others.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number


def choose_device(name: str) -> Any:
    """The torch device a setting means; ValueError when it is not there."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name}, but torch sees no CUDA device here; give device=cpu or device=auto")
    return device


def precision(name: str, device: Any) -> Any:
    """A factory of autocast contexts for `precision=fp32|bf16`."""
    import torch

    if name == "fp32":
        return contextlib.nullcontext
    if name == "bf16":
        return lambda: torch.autocast(device.type, dtype=torch.bfloat16)
    raise ValueError(f"precision={name!r}: expected fp32 or bf16")


def total_steps(config: dict[str, Any], batches_per_epoch: int) -> int:
    """The run's optimizer steps from `steps` or `epochs`, exactly one of which is given."""
    if (config["steps"] is None) == (config["epochs"] is None):
        raise ValueError(f"steps={config['steps']} and epochs={config['epochs']}: give exactly one of the two")
    total = config["steps"] if config["steps"] is not None else config["epochs"] * batches_per_epoch
    if total < 1:
        raise ValueError(
            f"{total} steps to train: steps={config['steps']}, epochs={config['epochs']} with {batches_per_epoch} "
            f"batches an epoch; give more data or a batch_size smaller than {config['batch_size']}")
    return total


def joined_batches(stream: Any, sentences: Any) -> Iterator[dict[str, Any]]:
    """Image-text batches, each with the next sentence batch's entries beside its own."""
    second = iter(sentences) if sentences else None
    for batch in stream:
        yield {**batch, **next(second)} if second else batch


def augmented(batch: dict[str, Any], augment: Any, wanted: tuple[str, ...], step: int) -> dict[str, Any]:
    """The batch with its images augmented on the device, and the extra views that a loss asks for."""
    views = {f"image_view{n}": augment(batch["image"], draw=step, view=n) for n in (1, 2) if f"image_features_view{n}" in wanted}
    return {**batch, **views, "image": augment(batch["image"], draw=step)}


def to_device(batch: dict[str, Any], device: Any) -> dict[str, Any]:
    import torch

    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def check_finite(terms: dict[str, Any], state: State, batch: dict[str, Any]) -> None:
    """Stop before the optimizer's step when the loss is not finite, with the batch's keys on record."""
    from clipkit.checkpoint import write_json

    if math.isfinite(terms["loss"].item()):
        return
    values = {name: value.item() for name, value in terms.items()}
    record = state.run_dir / f"nonfinite_step_{state.step + 1}.json"
    write_json(record, {"terms": {k: str(v) for k, v in values.items()}, "keys": list(batch.get("key", []))})
    raise RuntimeError(
        f"the loss is not finite at step {state.step + 1} ({values}); the weights are unchanged and the batch's keys are in "
        f"{record}. Lower optim.lr, set clip_grad_norm, or use precision=fp32; the run resumes from its last checkpoint.")


if __name__ == "__main__":
    main()
