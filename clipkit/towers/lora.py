"""Low-rank adapters of a tower's linear layers (Hu et al. 2021, LoRA), by peft: added, merged, and told from what they adapt.

    add_lora(tower, rank=8, alpha=16)      # the tower's own weights are frozen, adapters are trained
    merge_lora(tower)                      # W + alpha / rank B A in place of W: the tower as it was made, trained

peft replaces an nn.Linear by one with an adapter beside it. nn.MultiheadAttention reads its projections' weights without
calling them, so an adapter of theirs would be passed over; peft's own wrapper of it (0.21) adds the change of out_proj twice
and takes parameters out of the module in every forward, which neither DDP nor FSDP2 survives. Here its two projections
become linear layers that are called: `LinearAttention`, the same function of the same weights. A layer that a forward pass
does not call is never given an adapter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from clipkit.registry import suggest
from clipkit.towers.base import ImageTower, TextTower, Tower

# No adapters; what `image_tower.lora` and `text_tower.lora` default to.
NONE = {"rank": 0, "alpha": 16.0, "dropout": 0.0, "targets": "all"}
_ADAPTER = re.compile(r"\.(base_layer|lora_[AB]\.default)(?=\.)")


def without_adapters(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A model's settings as its towers are once `merge_lora` has been through them."""
    towers = {
        key: settings[key] for key in ("image_tower", "text_tower") if isinstance(settings[key], Mapping)
    }
    return {
        **settings,
        **{
            key: {name: one for name, one in tower.items() if name != "lora"} for key, tower in towers.items()
        },
    }


def add_lora(
    tower: Tower,
    *,
    rank: int,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all",
) -> None:
    """Freeze a tower and put adapters beside its linear layers, in place: y = W x + (alpha / rank) B A x.

    B starts as 0, so that the tower starts as it was; A is drawn. BatchNorm keeps its running statistics.

    Args:
        rank: rows of A, 1 or more.
        alpha: the change's scale, over rank.
        dropout: of the adapters' input, 0 to below 1.
        targets: "all": every linear layer of the blocks; or names of layers, whole or the last part, such as in_proj and
            out_proj (CLIP's own towers), qkv and proj (timm's), query and value (BERT's).

    Raises:
        ValueError: peft is not there; a rank, alpha or dropout out of range; a target that no layer has, or of which a
            forward pass reads the weight without calling the layer; a tower without linear layers; one that has adapters.
    """
    if is_adapted(tower):
        raise ValueError("this tower has adapters already: merge_lora first")
    if rank < 1 or not alpha > 0 or not math.isfinite(alpha) or not 0 <= dropout < 1:
        raise ValueError(
            f"lora got rank {rank}, alpha {alpha} and dropout {dropout}: give a rank of 1 or more, an alpha above 0 and a "
            "dropout of 0 to below 1"
        )
    peft = _peft()
    tower.freeze("all")
    _open_attention(tower)
    try:
        chosen = _chosen(tower, targets)
    except ValueError:
        _close_attention(tower)
        raise
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        # Whole names: a list would match the ends of others.
        target_modules="|".join(map(re.escape, chosen)),
        # GPT-2's layers hold their weights transposed.
        fan_in_fan_out=any(type(tower.get_submodule(name)).__name__ == "Conv1D" for name in chosen),
    )
    peft.inject_adapter_in_model(config, tower)
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    tower.train(tower.training)


@torch.no_grad()
def merge_lora(tower: Tower) -> Tower:
    """The tower with its adapters, if it has any, added into its weights and taken out, in place: names and shapes as without them."""
    _replace(tower, _is_adapter, _merged)
    _close_attention(tower)
    return tower


def is_adapted(module: nn.Module) -> bool:
    """Whether any layer of it has an adapter."""
    return any(map(_is_adapter, module.modules()))


def frozen_names(module: nn.Module) -> set[str]:
    """Names in a module's state_dict that training leaves as they were: all of adapted towers but the adapters."""
    found: set[str] = set()
    for prefix, tower in module.named_modules():
        if isinstance(tower, Tower) and is_adapted(tower):
            trained = {name for name, one in tower.named_parameters() if one.requires_grad}
            found |= {f"{prefix}.{name}" if prefix else name for name in {*tower.state_dict()} - trained}
    return found


def plain_name(tower: Tower, name: str) -> str:
    """A parameter's name as it is without adapters: that of the weight it is, or is added to."""
    # DLA's own stem is called base_layer, too.
    plain = _ADAPTER.sub(
        lambda found: "" if _is_adapter(tower.get_submodule(name[: found.start()])) else found[0], name
    )
    owner, _, kind = plain.rpartition(".")
    attention, _, part = owner.rpartition(".")
    if part == "in_proj" and isinstance(tower.get_submodule(attention), LinearAttention):
        return f"{attention}.in_proj_{kind}"
    return plain


class LinearAttention(nn.Module):
    """Self-attention of an nn.MultiheadAttention, whose weights it takes over, by linear layers that are called.

    Args:
        attention: with one width for queries, keys and values, and nothing added to them.
    """

    def __init__(self, attention: nn.MultiheadAttention):
        super().__init__()
        width, bias = attention.embed_dim, attention.in_proj_bias is not None
        weight: Any = attention.in_proj_weight
        self.heads, self.batch_first, self.dropout = (
            attention.num_heads,
            attention.batch_first,
            attention.dropout,
        )
        with torch.device("meta"):
            self.in_proj = nn.Linear(width, 3 * width, bias=bias, dtype=weight.dtype)
            self.out_proj = nn.Linear(width, width, bias=attention.out_proj.bias is not None)
        self.in_proj.weight, self.in_proj.bias = weight, attention.in_proj_bias
        self.out_proj.weight, self.out_proj.bias = attention.out_proj.weight, attention.out_proj.bias
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """query: (B, L, width), or (L, B, width) where batch_first is false -> the same, and None for the weights.

        Args:
            attn_mask: (L, L) or (B heads, L, L), added to the logits; of bool, True where a token is not to be seen.
        """
        others = any(one is not None and one is not query for one in (key, value))
        if others or need_weights or key_padding_mask is not None:
            raise ValueError(
                "an attention with adapters attends to its own input and gives no weights; this tower asks for more: leave "
                "its attention out of lora.targets"
            )
        x = query if self.batch_first else query.transpose(0, 1)
        rows, length, width = x.shape
        parts = self.in_proj(x).view(rows, length, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        if attn_mask is not None:
            mask = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask.to(q.dtype)
            attn_mask = mask.view(rows, self.heads, length, length) if mask.ndim == 3 else mask
        made = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, dropout_p=self.dropout if self.training else 0.0
        )
        made = self.out_proj(made.transpose(1, 2).reshape(rows, length, width))
        return made if self.batch_first else made.transpose(0, 1), None

    def closed(self) -> nn.MultiheadAttention:
        """The nn.MultiheadAttention with these weights."""
        with torch.device("meta"):
            made: Any = nn.MultiheadAttention(
                self.in_proj.in_features,
                self.heads,
                dropout=self.dropout,
                bias=self.in_proj.bias is not None,
                batch_first=self.batch_first,
            )
        made.in_proj_weight, made.in_proj_bias = self.in_proj.weight, self.in_proj.bias
        made.out_proj.weight, made.out_proj.bias = self.out_proj.weight, self.out_proj.bias
        return made.train(self.training)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError("adapters (lora) need peft: pip install 'clipkit[peft]'") from error
    return peft


def _is_adapter(module: nn.Module) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "get_base_layer")


def _merged(adapter: Any) -> nn.Module:
    adapter.merge()
    return adapter.get_base_layer()


def _replace(tower: nn.Module, wanted: Callable[[nn.Module], bool], make: Callable[[Any], nn.Module]) -> None:
    for name, module in list(tower.named_modules()):
        if wanted(module):
            parent, _, last = name.rpartition(".")
            setattr(tower.get_submodule(parent), last, make(module))


def _open_attention(tower: nn.Module) -> None:
    _replace(tower, _opens, LinearAttention)


def _close_attention(tower: nn.Module) -> None:
    _replace(tower, lambda module: isinstance(module, LinearAttention), lambda module: module.closed())


def _opens(module: nn.Module) -> bool:
    return (
        type(module) is nn.MultiheadAttention
        and module._qkv_same_embed_dim
        and module.bias_k is None
        and not module.add_zero_attn
    )


def _chosen(tower: Tower, targets: str | Sequence[str]) -> list[str]:
    """Names of the layers that get adapters; ValueError where there are none, or one would be passed over."""
    linear = {name: module for name, module in tower.named_modules() if _is_linear(module)}
    called = _called(tower, linear)
    if targets == "all":
        blocks = {id(module) for block in tower.blocks() for module in block.modules()}
        inside = {name for name, module in linear.items() if not blocks or id(module) in blocks}
        found = [name for name in linear if name in inside and (called is None or name in called)]
        if called is not None and isinstance(tower, TextTower) and len(found) < len(inside):
            # Made again from its checkpoint without values, such a tower cannot be asked which they are.
            raise ValueError(
                f"lora.targets=all is not known to reach {sorted(inside - called)[0]}, whose weight is read without calling "
                f"the layer: name the layers that are to have adapters; those here are {', '.join(_kinds(found))}"
            )
        if not found:
            raise ValueError(
                f"lora has nothing to adapt: {type(tower).__name__} has no linear layers in its blocks that a forward pass "
                "calls (a convolutional tower): fine-tune it whole, or freeze it"
            )
        return found
    names = [targets] if isinstance(targets, str) else list(targets)
    found = []
    for target in names:
        fits = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not fits:
            kinds = _kinds(linear)
            raise ValueError(
                f"lora.targets names {target!r}, which no linear layer is called.{suggest(target, kinds)} Its layers: "
                f"{', '.join(kinds) or 'none'}; or all"
            )
        passed_over = [name for name in fits if called is not None and name not in called]
        if passed_over:
            raise ValueError(
                f"lora.targets names {target!r}, but a forward pass reads the weight of {passed_over[0]} without calling the "
                "layer: an adapter beside it would do nothing. Leave it out"
            )
        found += fits
    if not found:
        raise ValueError("lora.targets is empty: give all, or names of linear layers")
    return [name for name in linear if name in found]


def _kinds(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _is_linear(module: nn.Module) -> bool:
    # Of a class of its own: transformers' Conv1D (GPT-2).
    return type(module) is nn.Linear or type(module).__name__ in ("Conv1D", "NonDynamicallyQuantizableLinear")


def _called(tower: Tower, linear: Mapping[str, nn.Module]) -> set[str] | None:
    """The layers that a forward pass calls; None where it cannot be run, without values."""
    found: set[str] = set()
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: found.add(name))
        for name, module in linear.items()
    ]
    training = tower.training
    parameter = next(tower.parameters())
    try:
        with torch.no_grad():
            tower.eval()
            tower(_example(tower, parameter))
    except Exception:
        if parameter.is_meta or isinstance(parameter, FakeTensor):
            return None
        raise
    finally:
        tower.train(training)
        for hook in hooks:
            hook.remove()
    return found


def _example(tower: Any, like: Tensor) -> Tensor:
    if isinstance(tower, ImageTower):
        return like.new_zeros(1, 3, tower.image_size, tower.image_size)
    ids: Iterable[int] = [one for one in range(min(tower.vocab_size, 4)) if one != tower.pad_id][:1]
    return torch.tensor([[*ids, tower.eot_id]], device=like.device)
