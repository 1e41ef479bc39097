"""Optimizers with named parameter groups, and learning-rate schedules in steps.

Weight decay reaches matrices and higher alone: norms, biases, class tokens, the logit scale and all else of
one dimension stay undecayed. Layer-wise decay multiplies the rate of each tower's layers by depth (Clark et
al. 2020, ELECTRA; Bao et al. 2022, BEiT).
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from clipkit.registry import Registry, check_keys, suggest
from clipkit.towers.base import ImageTower, TextTower, Tower
from clipkit.towers.lora import plain_name

_optimizers = Registry("optimizer")
_schedules = Registry("schedule")


def list_optimizers() -> list[str]:
    """Names that create_optimizer knows besides timm's."""
    return _optimizers.names()


def list_schedules() -> list[str]:
    """Names that create_schedule knows."""
    return _schedules.names()


def parameter_groups(
    modules: nn.Module | Iterable[nn.Module],
    *,
    lr: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    image_tower_lr: float = 1.0,
    text_tower_lr: float = 1.0,
    separate_tables: bool = False,
) -> list[dict]:
    """Trainable parameters as optimizer groups with a `name`, `params`, `lr` and `weight_decay`.

    Args:
        modules: the model, or the model and the losses (some have parameters). A parameter met twice counts
            once.
        lr: of what stands outside the towers and of their last layers.
        layer_decay: above 0, at most 1. Layer d of a tower with n blocks gets lr * layer_decay ** (n + 1 -
            d).
        image_tower_lr, text_tower_lr: factors of lr for a whole tower, above 0. The projections stand outside.
        separate_tables: token and position embeddings in groups of their own, named "tables", decayed as
            matrices.

    Raises:
        ValueError: nothing is trainable, or a factor is out of range.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay is a factor above 0 and at most 1, not {layer_decay}")
    towers = {ImageTower: image_tower_lr, TextTower: text_tower_lr}
    for kind, factor in towers.items():
        if not 0 < factor < math.inf:
            raise ValueError(
                f"the factor of lr for the {kind.__name__} is above 0 (freeze stops a tower), not {factor}"
            )
    modules = [modules] if isinstance(modules, nn.Module) else list(modules)
    groups: dict[str, dict] = {}
    seen: set[int] = set()
    for module in modules:
        scales = _tower_scales(module, layer_decay, towers)
        tables = _tables(module) if separate_tables else set()
        for parameter in module.parameters():
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            decayed = parameter.ndim >= 2
            scale = scales.get(id(parameter), 1.0)
            kind = "tables" if id(parameter) in tables else "decay" if decayed else "no_decay"
            name = kind + ("" if scale == 1.0 else f"_x{scale:.4g}")
            group = groups.setdefault(
                name,
                {
                    "name": name,
                    "params": [],
                    "lr": lr * scale,
                    "weight_decay": weight_decay if decayed else 0.0,
                },
            )
            group["params"].append(parameter)
    if not groups:
        raise ValueError(
            "no parameter is trainable: unfreeze a tower (image_tower.freeze, text_tower.freeze)"
        )
    return list(groups.values())


def create_optimizer(
    modules: nn.Module | Iterable[nn.Module],
    *,
    name: str = "adamw",
    lr: float,
    betas: Sequence[float] | None = None,
    eps: float | None = None,
    weight_decay: float = 0.0,
    layer_decay: float = 1.0,
    image_tower_lr: float = 1.0,
    text_tower_lr: float = 1.0,
    momentum: float | None = None,
    options: Mapping[str, Any] | None = None,
) -> torch.optim.Optimizer:
    """An optimizer over the trainable parameters of the model and the losses.

    Args:
        modules: the model, or a list of the model and the losses.
        name: adamw, sgd (torch), lion, muon (timm; Chen et al. 2023; Jordan et al. 2024), or any other of
            timm.optim.list_optimizers(), such as lamb.
        lr: peak learning rate of a step.
        betas: of the running means; None: the optimizer's own (adamw 0.9, 0.999).
        eps: added to the denominator; None: the optimizer's own (adamw 1e-8).
        weight_decay: decoupled, times the learning rate, on matrices alone.
        layer_decay, image_tower_lr, text_tower_lr: see parameter_groups.
        momentum: of sgd and muon, and of those of timm that have one; None: the optimizer's own (0.9, 0.95).
        options: further settings of an optimizer of timm's, by its own names.

    Raises:
        ValueError: an unknown name, a setting that the optimizer does not have, or nothing to train.
    """
    factory, valid = _optimizers.get(name) if name in _optimizers.names() else _of_timm(name)
    if lr <= 0:
        raise ValueError(f"lr must be above 0, not {lr}")
    given = {
        "betas": None if betas is None else tuple(betas),
        "eps": eps,
        "momentum": momentum,
        **(options or {}),
    }
    settings = {key: value for key, value in given.items() if value is not None}
    check_keys(settings, valid, f"the optimizer {name!r}")
    groups = parameter_groups(
        modules,
        lr=lr,
        weight_decay=weight_decay,
        layer_decay=layer_decay,
        image_tower_lr=image_tower_lr,
        text_tower_lr=text_tower_lr,
        separate_tables=name == "muon",
    )
    return factory(groups, lr, settings)


class Schedule(torch.optim.lr_scheduler.LambdaLR):
    """A learning-rate schedule that knows its settings, as create_schedule takes them."""

    def __init__(self, optimizer: torch.optim.Optimizer, settings: Mapping[str, Any]):
        self.settings = dict(settings)
        super().__init__(optimizer, rate_factor(**settings))

    def step(self, epoch: int | None = None) -> None:
        """After each optimizer step, and after one that was left out."""
        with warnings.catch_warnings():
            # torch tells who leaves out the first one that they have the order wrong.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            super().step(epoch)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Stand where the saved one stood, at the rates of these settings and of each group's `initial_lr`.

        Raises:
            ValueError: it had other settings, by which a step that it took had another rate.
        """
        done = state_dict["last_epoch"]
        check_extension(state_dict.get("settings", self.settings), self.settings, done)
        self.last_epoch, self._step_count = done, done + 1
        self.base_lrs = [group["initial_lr"] for group in self.optimizer.param_groups]
        self._last_lr = [lr * self.lr_lambdas[0](done) for lr in self.base_lrs]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate


def create_schedule(
    optimizer: torch.optim.Optimizer,
    *,
    name: str = "cosine",
    warmup_steps: int,
    total_steps: int,
    final: float = 0.0,
    cooldown_steps: int = 0,
) -> Schedule:
    """A learning-rate schedule; call its .step() after each optimizer.step().

    Step t (from 0) of T with W warm-up steps has the factor (t + 1) / W while t < W; then, with p = (t - W) /
    (T - W), cosine: final + (1 - final) (1 + cos pi p) / 2; linear: 1 - (1 - final) p; constant: 1; wsd (warm-up, stable,
    decay: Hu et al. 2024, MiniCPM): 1, and 1 - (1 - final) (t - T + C) / C in the last C steps. Past T it stays as at T.

    A run with `constant` or `wsd` can be made longer: its rates do not depend on T until the cooldown begins.

    Args:
        warmup_steps, total_steps: in optimizer steps.
        final: factor at the end, 0 to 1.
        cooldown_steps: C, of wsd alone.

    Raises:
        ValueError: an unknown name, or a warm-up and cooldown that are not shorter than the training.
    """
    settings = {"name": name, "warmup_steps": warmup_steps, "total_steps": total_steps, "final": final}
    return Schedule(optimizer, {**settings, "cooldown_steps": cooldown_steps})


def rate_factor(
    *, name: str, warmup_steps: int, total_steps: int, final: float, cooldown_steps: int
) -> Callable[[int], float]:
    """The factor of the peak rate at a step, from 0; see create_schedule."""
    shape = _schedules.get(name)
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps {warmup_steps} is not shorter than the {total_steps} steps of training, so the "
            "peak rate would never be held: lower warmup_steps or train longer"
        )
    if not 0 <= final <= 1:
        raise ValueError(f"final is a factor of the peak rate from 0 to 1, not {final}")
    if (cooldown_steps > 0) != (name == "wsd"):
        raise ValueError(
            f"cooldown_steps={cooldown_steps} with schedule={name}: wsd has a cooldown of at least 1 step, "
            "and no other schedule has one"
        )
    if warmup_steps + cooldown_steps > total_steps:
        raise ValueError(
            f"warmup_steps {warmup_steps} and cooldown_steps {cooldown_steps} are more than the {total_steps} "
            "steps of training: lower one of them or train longer"
        )

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return shape(min(step, total_steps) - warmup_steps, total_steps - warmup_steps, final, cooldown_steps)

    return factor


def check_extension(before: Mapping[str, Any], now: Mapping[str, Any], done: int) -> None:
    """ValueError if one of the `done` steps taken with some settings of a schedule has another rate by others."""
    if before == now:
        return
    then, new = rate_factor(**before), rate_factor(**now)
    other = next(
        (step for step in range(done) if not math.isclose(then(step), new(step), rel_tol=1e-9)), None
    )
    if other is not None:
        raise ValueError(
            f"{done} steps were taken by schedule={before['name']} over {before['total_steps']} steps; by {_words(now)} step "
            f"{other + 1} would have had {new(other):.4g} of the peak rate, and it had {then(other):.4g}. A run can be made "
            "longer while its rate is constant: with schedule=constant, or schedule=wsd before its cooldown. Give name=ANOTHER "
            "to train anew"
        )
    if now["total_steps"] < done:
        raise ValueError(f"{done} steps are done already, more than {_words(now)}")


def _words(settings: Mapping[str, Any]) -> str:
    return f"schedule={settings['name']} over {settings['total_steps']} steps"


class WeightAverage:
    """Exponential moving average of a model's weights, for evaluation (Tarvainen and Valpola 2017).

    average <- d average + (1 - d) weights after each step, with d = min(decay, (1 + t) / (10 + t)) at update
    t from 0, so that the initial weights are soon forgotten. Floating-point buffers (BatchNorm's statistics)
    are averaged too; integer ones are copied.

        average = WeightAverage(model, decay=0.9999)
        ...; optimizer.step(); average.update(model)
        with average.applied(model): evaluate(model)

    Args:
        model: averaged from its present weights; names and shapes must stay.
        decay: 0 to below 1; the average spans about 1 / (1 - decay) steps.
    """

    def __init__(self, model: nn.Module, *, decay: float = 0.9999):
        if not 0 <= decay < 1:
            raise ValueError(f"decay is from 0 to below 1, not {decay}")
        self.decay, self.updates = decay, 0
        # Of bf16 weights, too, in fp32: bf16 has no room for the small steps of an average.
        self.weights = {
            name: tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
            if tensor.is_floating_point()
            else tensor.detach().clone()
            for name, tensor in model.state_dict().items()
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the model's weights after an optimizer step."""
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = model.state_dict()
        # One call a kind of tensor: FSDP shards parameters into DTensors and leaves buffers whole.
        together: dict[type, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for name, average in self.weights.items():
            if average.is_floating_point():
                averages, values = together.setdefault(type(average), ([], []))
                averages.append(average)
                values.append(current[name].detach().to(average.dtype))
            else:
                average.copy_(current[name])
        for averages, values in together.values():
            # torch has no public name for it.
            torch._foreach_lerp_(averages, values, weight)  # pyright: ignore[reportPrivateImportUsage]
        self.updates += 1

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Within it the model holds the average; after it, its own weights again."""
        own = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(self.weights)
        try:
            yield model
        finally:
            model.load_state_dict(own)

    def state_dict(self) -> dict[str, Any]:
        """{"updates": count, "weights": {name: tensor}} for a checkpoint."""
        return {"updates": self.updates, "weights": dict(self.weights)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore state_dict()'s value; ValueError where names differ."""
        if state["weights"].keys() != self.weights.keys():
            names = sorted(state["weights"].keys() ^ self.weights.keys())
            raise ValueError(
                f"the saved average is of another model: {', '.join(names[:5])} in one of the two alone"
            )
        self.updates = int(state["updates"])
        for name, tensor in state["weights"].items():
            self.weights[name].copy_(tensor)


@_schedules.register("cosine")
def _cosine(step: int, steps: int, final: float, cooldown: int) -> float:
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * (step / steps)))


@_schedules.register("linear")
def _linear(step: int, steps: int, final: float, cooldown: int) -> float:
    return 1 - (1 - final) * (step / steps)


@_schedules.register("constant")
def _constant(step: int, steps: int, final: float, cooldown: int) -> float:
    return 1.0


@_schedules.register("wsd")
def _wsd(step: int, steps: int, final: float, cooldown: int) -> float:
    return 1 - (1 - final) * max(0, step - (steps - cooldown)) / cooldown


def _tower_scales(module: nn.Module, layer_decay: float, towers: Mapping[type, float]) -> dict[int, float]:
    """Factor of the learning rate by the id of each tower parameter: its tower's, and its layer's."""
    scales: dict[int, float] = {}
    for tower in module.modules():
        if isinstance(tower, Tower):
            own = next((factor for kind, factor in towers.items() if isinstance(tower, kind)), 1.0)
            for name, parameter in tower.named_parameters():
                depth = tower.num_layers + 1 - tower.layer_of(plain_name(tower, name))
                scales[id(parameter)] = own * layer_decay**depth
    return scales


def _tables(module: nn.Module) -> set[int]:
    """Ids of the embedding matrices: nn.Embedding weights, and bare parameters called so (positions)."""
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    named = {
        id(p) for name, p in module.named_parameters() if p.ndim >= 2 and "embed" in name.rpartition(".")[2]
    }
    return tables | named


def _adamw(groups: list[dict], lr: float, settings: dict) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=lr, fused=_fusable(groups), **settings)


def _sgd(groups: list[dict], lr: float, settings: dict) -> torch.optim.Optimizer:
    # The fused step knows no sharding of DTensors, which AdamW's does.
    sharded = any(hasattr(parameter, "full_tensor") for group in groups for parameter in group["params"])
    return torch.optim.SGD(
        groups, lr=lr, fused=not sharded and _fusable(groups), **{"momentum": 0.9, **settings}
    )


def _lion(groups: list[dict], lr: float, settings: dict) -> torch.optim.Optimizer:
    return _timm().Lion(groups, lr=lr, **settings)


def _muon(groups: list[dict], lr: float, settings: dict) -> torch.optim.Optimizer:
    # Muon orthogonalises maps between features; a table, whose rows are looked up one by one, goes to its
    # AdamW.
    return _timm().Muon(
        [{**group, "use_fallback": group["name"].startswith("tables")} for group in groups], lr=lr, **settings
    )


_optimizers.register("adamw")((_adamw, ("betas", "eps")))
_optimizers.register("sgd")((_sgd, ("momentum",)))
_optimizers.register("lion")((_lion, ("betas",)))
_optimizers.register("muon")((_muon, ("betas", "eps", "momentum")))


def _timm() -> Any:
    """timm's optimizers; importing timm imports wandb, which may be broken, so not before it is asked for."""
    import timm.optim

    return timm.optim


def _of_timm(name: str) -> tuple[Callable[..., torch.optim.Optimizer], tuple[str, ...]]:
    """What makes an optimizer of timm's, and the settings it takes."""
    known = _timm().list_optimizers()
    if name not in known:
        hint = suggest(name, [*_optimizers.names(), *known])
        raise ValueError(
            f"unknown optimizer {name!r}.{hint} Valid names: {', '.join(_optimizers.names())}, or any of "
            "timm.optim.list_optimizers()"
        )
    info = _timm().get_optimizer_info(name)
    if info.second_order:
        raise ValueError(f"the optimizer {name!r} wants second derivatives, which no step here takes")
    try:
        makes = _timm().get_optimizer_class(name, bind_defaults=False)
    except (AssertionError, ImportError, RuntimeError) as error:
        raise ValueError(f"the optimizer {name!r} cannot be made here: {error}") from error
    named = set(inspect.signature(makes).parameters) - {"params", "lr", "weight_decay"}

    def make(groups: list[dict], lr: float, settings: dict) -> torch.optim.Optimizer:
        return _timm().create_optimizer_v2(groups, opt=name, lr=lr, **settings)

    # timm gives a momentum to all and passes it on to those that have one.
    return make, tuple(sorted(named if info.has_momentum else named - {"momentum"}))


def _fusable(groups: list[dict]) -> bool:
    """torch's fused step wants floating-point parameters, all on devices it was written for."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    return all(p.is_floating_point() and p.device.type in ("cuda", "cpu") for p in parameters)
