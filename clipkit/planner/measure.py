"""What a model, its optimizer and its losses take, counted on fake tensors: no memory, no data, no GPU.

A tower pass is run forward and backward at two batch sizes; bytes, operations and bytes moved are affine in
the rows, operator by operator, and so known at every size. A loss is run at the very size asked for, on rank
0 of a process group that sends nothing. The operators are the CPU's, whose saved tensors differ from CUDA's
in dropout's masks alone (a number each there, a byte each here).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from clipkit.kernels.pairs import assume_triton
from clipkit.loading import model_config, with_architecture
from clipkit.losses import create_loss
from clipkit.model import _IMAGE_PASSES, _TEXT_PASSES, DualEncoder, Vocabulary, create_model
from clipkit.optim import create_optimizer
from clipkit.planner.meter import Collective, Meter, Operator, fused_attention

# Large enough that activations, not one layer's weights, are what the peak consists of.
_SIZES = (32, 64)


@dataclasses.dataclass(frozen=True)
class Pass:
    """A tower's forward and backward at the two row counts of `sizes`.

    saved: bytes that live when the forward is done (what the backward needs, and the output). working: bytes
    beyond `saved` at the highest point of either. forward, backward: their operators.
    """

    sizes: tuple[int, int]
    saved: tuple[int, int]
    working: tuple[int, int]
    forward: tuple[list[Operator], list[Operator]]
    backward: tuple[list[Operator], list[Operator]]

    def bytes_at(self, rows: float) -> tuple[float, float]:
        """(saved, working) for so many rows."""
        return self._at(self.saved, rows), max(0.0, self._at(self.working, rows))

    def operators(self, rows: float, *, backward: bool) -> list[tuple[float, float, bool]]:
        """(operations, bytes moved, in half precision) of each operator, for so many rows."""
        small, large = self.backward if backward else self.forward
        return [
            (self._at((a.flops, b.flops), rows), self._at((a.moved, b.moved), rows), a.half)
            for a, b in zip(small, large, strict=True)
        ]

    def flops(self, rows: float, *, backward: bool) -> float:
        """Multiplications and additions; a backward's include what checkpointing recomputes."""
        return sum(flops for flops, _, _ in self.operators(rows, backward=backward))

    def recomputed(self, rows: float) -> float:
        """Multiplications and additions of the forward that the backward runs again."""
        pairs = zip(self.operators(rows, backward=True), self.backward[0], strict=True)
        return sum(flops for (flops, _, _), operator in pairs if operator.recorded)

    def _at(self, values: tuple[float, float], rows: float) -> float:
        """The line through both measurements; nothing at no rows."""
        if rows == 0:
            return 0.0
        slope = (values[1] - values[0]) / (self.sizes[1] - self.sizes[0])
        return values[0] + slope * (rows - self.sizes[0])


@dataclasses.dataclass(frozen=True)
class LossCost:
    """A loss's forward and backward on one rank: bytes of features and of their gradients, bytes beyond those
    at the peak, operators, collectives.
    """

    features: int
    gradients: int
    workspace: int
    operators: list[Operator]
    collectives: list[Collective]


class Measured:
    """The parts of a training step, measured.

    Args:
        model: what `create_model` takes: embed_dim, image_tower, text_tower and its optional keys. No weights
            are loaded.
        loss: what `create_loss` takes.
        optim: what `create_optimizer` takes beside the weights, such as {"name": "adamw", "lr": 1e-3,
            "weight_decay": 0.1}; None: its state is not measured.
        tokenizer: vocab_size, context_length, pad_id, sot_id, eot_id; no text is made into tokens.
        precision: fp32, bf16, fp16 or pure_bf16, of the towers.
        tf32: whether fp32 products round their operands.
        sentence_batch_size: sentences of the second stream over all ranks, for the losses that read one.
        captions_per_image, hard_negatives_per_caption: texts of each picture; 0 hard negatives: none are read.
        fused_attention: leave out what the CPU keeps for the dropout of attention weights, as CUDA's kernels
            do.

    Attributes:
        impls: the implementations that the losses ask for, "auto" left out.
        operands: {term of the loss: "half" or "high"}, what Triton's products of similarities take.
        checkpointing: whether a tower recomputes its activations.
        weights, buffers, trainable: bytes. gradients: bytes, of the image tower's weights and of all others.
        units: bytes of what FSDP2 gathers at once, one entry a tower block, then the rest.
        state: bytes of the optimizer's state after one step. parameters: their number.
        image, text: Pass. mlm: Pass of the masked-language head and its own run of the tower, or None.
    """

    def __init__(
        self,
        *,
        model: Mapping[str, Any],
        loss: str | Sequence[str] | Mapping[str, Mapping[str, Any] | None],
        optim: Mapping[str, Any] | None,
        tokenizer: Vocabulary,
        precision: str,
        tf32: bool = False,
        fused_attention: bool,
        sentence_batch_size: int = 0,
        captions_per_image: int = 1,
        hard_negatives_per_caption: int = 0,
    ):
        self.tokenizer, self.precision, self.fused_attention = tokenizer, precision, fused_attention
        self.tf32 = tf32 and precision == "fp32"
        self.sentence_batch_size = sentence_batch_size
        self.captions, self.hard_negatives = captions_per_image, hard_negatives_per_caption
        self.mlm_probability = float(model.get("mlm_probability") or 0.15)
        towers = (model["image_tower"], model["text_tower"])
        if any((tower.get("lora") or {}).get("rank") for tower in towers):
            # peft moves what it makes, which tensors without memory do not allow.
            raise ValueError(
                "a plan knows no adapters: leave lora.rank at 0 (and freeze=all for a lower bound of what they take)"
            )
        self.checkpointing = any(tower.get("activation_checkpointing") for tower in towers)
        self._fake = FakeTensorMode()
        with self._fake:
            # Weights that are drawn again while any is out of range are within it.
            with Meter(answer=False):
                self.model = create_model(
                    model_config(with_architecture(model), pretrained=False), tokenizer=tokenizer
                ).train()
            if precision == "pure_bf16":
                self.model.hold_in_bf16()
            self.loss = create_loss(loss, towers=precision)
            self._by_impl: list[Any] = [part for part in self.loss.modules() if hasattr(part, "impl")]
            self.operands = {
                name: part.precision
                for name, term in self.loss.terms.items()
                for part in term.modules()
                if hasattr(part, "precision")
            }
            self.impls = {part.impl for part in self._by_impl} - {"auto"}
            self.model.check_inputs(self.loss.inputs)
            self.inputs = tuple(self.loss.inputs)
            if hard_negatives_per_caption and "hard_negative_features" in self.loss.optional_inputs:
                self.inputs += ("hard_negative_features",)
            self.weights = _bytes(self.model.parameters()) + _bytes(self.loss.parameters())
            self.buffers = _bytes(self.model.buffers())
            self.trainable = _bytes(p for p in self._parameters() if p.requires_grad)
            in_image = _bytes(p for p in self.model.image_tower.parameters() if p.requires_grad)
            self.gradients = {"image": in_image, "text": self.trainable - in_image}
            self.parameters = sum(p.numel() for p in self._parameters())
            self.units = _fsdp_units(self.model)
            for parameter in self._parameters():
                # In place from here on, so that a backward at either size adds to it.
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            self.state = self._optimizer_state(optim) if optim else 0
        size, length = self.model.image_tower.image_size, tokenizer.context_length
        self.image = None
        if self.model.image_tower.encodes:
            self.image = self._pass(self.model.encode_image, lambda rows: _images(rows, size))
        self.text = self._pass(self.model.encode_text, lambda rows: _texts(rows, length))
        self.mlm = None
        head, tower = self.model.mlm_head, self.model.text_tower
        if "mlm_logits" in self.inputs and head is not None:
            self.mlm = self._pass(lambda text: head(tower, text)[0], lambda rows: _texts(rows, length))

    def rows(self, pairs: int, world_size: int) -> dict[str, int]:
        """Rows of each pass and feature on one rank, for so many pairs on it: {"image": .., "text": ..,
        "mlm": .., NAME: ..}.
        """
        rows = dict.fromkeys(_IMAGE_PASSES, pairs)
        # A picture's row stands beside each of its captions, but is made once.
        rows["image_features"] = pairs * self.captions
        of_entry = {"text": pairs * self.captions, "hard_negative": pairs * self.hard_negatives}
        rows |= {
            name: of_entry.get(entry, self.sentence_batch_size // world_size)
            for name, (entry, _) in _TEXT_PASSES.items()
        }
        return {
            "image": sum(pairs for name in self.inputs if name in _IMAGE_PASSES),
            "text": sum(rows[name] for name in self.inputs if name in _TEXT_PASSES),
            "mlm": pairs * self.captions if self.mlm else 0,
            **{name: count for name, count in rows.items() if name in self.inputs},
        }

    def passes(self, pairs: float, whole: int, world_size: int) -> list[tuple[Pass, float]]:
        """(pass, rows) of `pairs` out of a rank's `whole` pairs: sentences are split into as many pieces."""
        rows = self.rows(whole, world_size)
        made = {"image": self.image, "text": self.text, "mlm": self.mlm}
        return [(one, rows[name] * pairs / whole) for name, one in made.items() if one and rows[name]]

    def model_flops(self, pairs: int, world_size: int) -> float:
        """Multiplications and additions of the towers in a rank's step, forward and backward, without what
        checkpointing computes again: what the model asks for.
        """
        return sum(
            made.flops(rows, backward=False) + made.flops(rows, backward=True) - made.recomputed(rows)
            for made, rows in self.passes(pairs, pairs, world_size)
        )

    @functools.cache  # noqa: B019 (lives as long as the plan)
    def loss_cost(
        self, pairs: int, world_size: int, impl: str, capability: tuple[int, int] = (9, 0)
    ) -> LossCost:
        """The losses on one of `world_size` ranks with `pairs` rows each, by `impl`: "dense", "chunked" or
        "triton".
        """
        for part in self._by_impl:
            part.impl = impl
            # As if gathered: a ring holds less; it sends the texts once more, backward, for each of its terms.
            if hasattr(part, "overlap"):
                part.overlap = "none"
        on_gpu = assume_triton() if impl == "triton" else contextlib.nullcontext()
        with _ranks(world_size), self._fake, on_gpu:
            features = self._features(pairs, world_size)
            meter = Meter(answer=False, capability=capability)
            with meter:
                self.loss(features)["loss"].backward()
            gradients = _bytes(f.grad for f in features.values() if f.grad is not None)
        held = _bytes(features.values())
        return LossCost(held, gradients, max(0, meter.peak - gradients), meter.operators, meter.collectives)

    def _features(self, pairs: int, world_size: int) -> dict[str, Tensor]:
        rows, dim = self.rows(pairs, world_size), self.model.embed_dim
        features = {
            name: torch.zeros(rows[name], dim, requires_grad=True) for name in self.inputs if name in rows
        }
        for name in ("logit_scale", "logit_bias"):
            features[name] = torch.zeros((), requires_grad=True)
        # A teacher's columns are the data's: those that a loss was told of, or else the student's.
        columns = [one for part in self.loss.modules() if (one := getattr(part, "teacher_dim", None))]
        for name in ("dist_image_features", "dist_text_features"):
            features[name] = torch.zeros(pairs * self.captions, *(columns or [dim])[:1])
        features["dist_logit_scale"] = torch.zeros(())
        features["sample_index"] = torch.zeros(pairs * self.captions, dtype=torch.int64)
        features["nli_labels"] = torch.zeros(rows.get("pair_premise_features", 0), dtype=torch.int64)
        if self.mlm:
            tokens = max(1, round(self.mlm_probability * rows["mlm"] * self.tokenizer.context_length))
            half = torch.float32 if self.precision == "fp32" else torch.bfloat16
            features["mlm_logits"] = torch.zeros(
                tokens, self.tokenizer.vocab_size, dtype=half, requires_grad=True
            )
            features["mlm_labels"] = torch.zeros(tokens, dtype=torch.int64)
        return {name: value for name, value in features.items() if name in self.inputs}

    def _parameters(self) -> list[nn.Parameter]:
        return [*self.model.parameters(), *self.loss.parameters()]

    def _optimizer_state(self, optim: Mapping[str, Any]) -> int:
        """Bytes of the state that one step of the optimizer leaves."""
        optimizer = create_optimizer([self.model, self.loss], **optim)
        # Counts of steps are read as 1.
        with Meter(answer=True):
            optimizer.step()
        return _bytes(
            value
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        )

    def _pass(self, encode: Any, inputs: Any) -> Pass:
        runs = [self._run(encode, inputs, rows) for rows in _SIZES]
        return Pass(_SIZES, *(tuple(values) for values in zip(*runs, strict=True)))

    def _run(self, encode: Any, inputs: Any, rows: int) -> tuple[int, int, list[Operator], list[Operator]]:
        half = self.precision != "fp32"
        share = self.mlm_probability
        with self._fake, fused_attention() if self.fused_attention else contextlib.nullcontext():
            batch = inputs(rows)
            # Whatever a tower asks of a text's values, such as whether each has its end token, it has.
            with Meter(answer=True, mask_share=share) as meter:
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    output = encode(batch)
                saved, forward = meter.alive, len(meter.operators)
                if output.requires_grad:
                    output.backward(torch.ones_like(output))
        return saved, meter.peak - saved, meter.operators[:forward], meter.operators[forward:]


@contextlib.contextmanager
def _ranks(world_size: int) -> Iterator[None]:
    """Within it torch.distributed looks like rank 0 of so many ranks, and sends nothing.

    RuntimeError where a process group runs already, whose ranks a plan must not be mistaken for.
    """
    if world_size == 1:
        yield
        return
    if dist.is_initialized():
        raise RuntimeError(
            "a plan is made by one process, but torch.distributed is initialised here: start it without torchrun"
        )
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _fsdp_units(model: DualEncoder) -> list[int]:
    """Bytes of each tower block's parameters, then of all others, as clipkit shards them."""
    blocks = [block for tower in (model.image_tower, model.text_tower) for block in tower.blocks()]
    inside = {id(p) for block in blocks for p in block.parameters()}
    return [
        *(_bytes(block.parameters()) for block in blocks),
        _bytes(p for p in model.parameters() if id(p) not in inside),
    ]


def _images(rows: int, size: int) -> Tensor:
    return torch.zeros(rows, 3, size, size, dtype=torch.uint8)


def _texts(rows: int, length: int) -> Tensor:
    return torch.zeros(rows, length, dtype=torch.int64)


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
