"""Which operands a loss's similarities take, as far as the loss decides it."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.nn.functional import normalize

from clipkit.kernels import ops
from clipkit.kernels.pairs import assume_triton
from clipkit.losses import InfoNCE, create_loss, list_losses
from clipkit.losses.registry import losses


@pytest.mark.parametrize("name", list_losses())
def test_a_loss_with_an_implementation_has_a_precision(name):
    settings = inspect.signature(losses.get(name)).parameters
    assert ("impl" in settings) == ("precision" in settings)


@pytest.mark.parametrize(
    "towers, precision", [("fp32", "high"), ("bf16", "half"), ("fp16", "half"), ("pure_bf16", "half")]
)
def test_a_run_decides_for_the_parts_that_say_auto(towers, precision):
    spec = {
        "infonce": {},
        "sigmoid": {"precision": "high"},
        "queue": {"settings": {}, "embed_dim": 4, "size": 8},
        "matryoshka": {"loss": "infonce", "settings": {"precision": "half"}, "embed_dim": 8},
    }
    found = {
        name: {part.precision for part in term.modules() if hasattr(part, "precision")}
        for name, term in create_loss(spec, towers=towers).terms.items()
    }
    assert found == {
        "infonce": {precision},
        "sigmoid": {"high"},
        "queue": {precision},
        "matryoshka": {"half"},
    }
    assert create_loss("infonce").terms["infonce"].precision == "auto"


def test_a_wrong_name_is_told():
    with pytest.raises(ValueError, match="Did you mean 'bf16'"):
        create_loss("infonce", towers="bf61")
    with pytest.raises(ValueError, match="unknown precision 'hlf'.*'half'"):
        create_loss({"infonce": {"precision": "hlf"}})


@pytest.mark.parametrize(
    "dtype, autocast, precision, variant",
    [
        (torch.float32, False, "auto", "triton_high"),
        (torch.float32, True, "auto", "triton"),
        (torch.float32, False, "half", "triton"),
        (torch.bfloat16, False, "auto", "triton"),
        (torch.float16, False, "high", "triton_high"),
    ],
)
def test_alone_a_loss_goes_by_its_features_and_autocast(dtype, autocast, precision, variant, monkeypatch):
    asked, operator = [], ops.pair_lse_op

    def call(*args):
        asked.append(args[-2])
        return operator(*args[:-2], "chunked", args[-1])

    monkeypatch.setattr(ops, "pair_lse_op", call)
    features = normalize(torch.randn(2, 6, 8), dim=2).to(dtype)
    with assume_triton(), torch.autocast("cpu", enabled=autocast):
        InfoNCE(precision=precision)(*features, 10.0)
    assert asked == [variant]
