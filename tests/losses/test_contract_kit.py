"""The gradient contract of every registered loss, and the kit that measures it.

One process, dense implementation, whole batch, one graph is the reference (itself tested against the papers'
formulas beside each loss). Every loss must give its gradients and value on 1, 2 and 4 ranks, in 1, 2 and 4
micro-batches, dense and chunked, and in pairs of ranks as losses of their own. The kit is tested by losses
whose error is known by hand.
"""

from __future__ import annotations

import inspect
import math
import re
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from clipkit.distributed import all_gather_rows, rank, resolve_group
from clipkit.losses import (
    ContractCase,
    check_gradient_contract,
    check_gradient_contracts,
    create_loss,
    list_losses,
)
from clipkit.losses.registry import losses

PAIRS, EMBED_DIM = 16, 8
# What each loss needs beyond its defaults to be built here; each variant is measured.
# The kit's teacher has 9 columns.
TAUGHT = {"embed_dim": EMBED_DIM, "teacher_dim": 9}
SETTINGS = {
    "distill_contrastive": [TAUGHT],
    "distill_features": [TAUGHT],
    "fastclip": [{"num_samples": PAIRS}],
    "infonce": [{}, {"label_smoothing": 0.1}, {"overlap": "ring"}],
    "matryoshka": [{"dims": [4, 8]}],
    "nli_softmax": [{"embed_dim": EMBED_DIM}],
    "queue": [{"embed_dim": EMBED_DIM, "size": 20}],
    "sigmoid": [{}, {"overlap": "ring"}],
    "slip": [{}, {"head": True, "embed_dim": EMBED_DIM, "hidden_dim": 12, "output_dim": 6}],
    "simcse": [{}, {"head": True, "embed_dim": EMBED_DIM}],
}


def variants(name):
    for settings in SETTINGS.get(name, [{}]):
        yield settings, "+".join(key for key in settings if key in ("head", "label_smoothing", "overlap"))


def cases_of(name, world_size):
    """Every micro-batch count and implementation of one loss, and pairs of ranks where there are four."""
    cases = {}
    for settings, label in variants(name):
        implementations = (
            ("dense", "chunked") if "impl" in inspect.signature(losses.get(name)).parameters else ("only",)
        )
        for implementation in implementations:
            given = settings if implementation == "only" else {**settings, "impl": implementation}
            dense = settings if implementation == "only" else {**settings, "impl": "dense"}
            for micro_batches in (1, 2, 4):
                for hybrid_group in (None, 2) if world_size == 4 and micro_batches != 4 else (None,):
                    key = f"{name} {label} {implementation} x{micro_batches} group {hybrid_group}"
                    cases[key] = ContractCase(
                        partial(create_loss, {name: given}),
                        reference_fn=partial(create_loss, {name: dense}),
                        batch_size=PAIRS,
                        embed_dim=EMBED_DIM,
                        micro_batches=micro_batches,
                        hybrid_group=hybrid_group,
                    )
    return cases


@pytest.fixture(scope="module", params=[1, 2, 4])
def measured(request):
    """All losses' reports at one world size, whose processes start once."""
    cases = {key: case for name in list_losses() for key, case in cases_of(name, request.param).items()}
    assert len(cases) >= 3 * len(list_losses())
    return check_gradient_contracts(cases, world_size=request.param)


@pytest.mark.parametrize("name", list_losses())
def test_every_split_gives_the_gradient_of_one_process(measured, name):
    reports = {key: report for key, report in measured.items() if key.split()[0] == name}
    assert len(reports) >= 3
    for key, report in reports.items():
        assert report.ok, f"{key}\n{report}"
        # At least one tower or parameter must have a gradient to compare: a loss of constants would pass.
        assert any(parameter.ratio > 0 for parameter in report.parameters), key


CLIP = ("image_features", "text_features", "logit_scale")
NEGATIVES = ("hard_negative_features", "hard_negative_image_features")
# Loss, settings, optional inputs: each in all implementations, micro-batches and world sizes.
OPTIONS = [
    (name, settings, optional)
    for name in ("infonce", "sigmoid")
    for settings, optional in (
        ({}, NEGATIVES),
        ({"hard_negatives": "own"}, (*NEGATIVES, "sample_weight")),
        ({"same_ids": "mask"}, ("pair_ids", "sample_weight")),
        ({"overlap": "ring"}, ()),
        ({"overlap": "ring", "same_ids": "mask"}, ("pair_ids", "sample_weight", *NEGATIVES)),
        ({"false_negatives": "mask", "false_negative_threshold": 0.5}, ()),
        ({"false_negatives": "share", "false_negative_threshold": 0.5}, NEGATIVES),
        (
            {"false_negatives": "share", "false_negative_threshold": 0.5},
            ("content_features", "pair_ids", "sample_weight"),
        ),
    )
] + [
    (
        "infonce",
        {"label_smoothing": 0.1, "false_negatives": "mask", "false_negative_threshold": 0.5},
        NEGATIVES,
    ),
    ("infonce", {"overlap": "ring", "label_smoothing": 0.1, "hard_negatives": "own"}, NEGATIVES),
    ("infoloob", {}, (*NEGATIVES, "sample_weight")),
    ("distill", {}, ("sample_weight",)),
]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_option_keeps_the_gradient_of_one_process(world_size):
    cases = {}
    for name, settings, optional in OPTIONS:
        bias = ("logit_bias",) if name == "sigmoid" else ()
        read = (*create_loss({name: settings}).inputs, *optional)
        assert set(CLIP + bias) <= set(read)
        for implementation in ("dense", "chunked"):
            for micro_batches in (1, 3):
                cases[f"{name} {settings} {optional} {implementation} x{micro_batches}"] = ContractCase(
                    partial(create_loss, {name: {**settings, "impl": implementation}}),
                    reference_fn=partial(create_loss, {name: {**settings, "impl": "dense"}}),
                    batch_size=12,
                    embed_dim=EMBED_DIM,
                    inputs=read,
                    micro_batches=micro_batches,
                )
    for key, report in check_gradient_contracts(cases, world_size=world_size).items():
        assert report.ok, f"{key}\n{report}"


def _clip(image_features, text_features, logit_scale):
    """Radford et al. 2021, figure 3, on the rows at hand alone."""
    logits = logit_scale * image_features @ text_features.T
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def _clip_loss():
    return _clip


def _gathered(image_features, text_features, logit_scale):
    """The textbook distributed form: gather both with gradients, the whole loss on every rank."""
    group = resolve_group("auto")
    return _clip(all_gather_rows(image_features, group), all_gather_rows(text_features, group), logit_scale)


def _gathered_loss():
    return _gathered


def _scale_times_world(image_features, text_features, logit_scale):
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    return _gathered(image_features, text_features, logit_scale * ranks - logit_scale.detach() * (ranks - 1))


def _scale_times_world_loss():
    return _scale_times_world


def _value_by_rank(image_features, text_features, logit_scale):
    return _gathered(image_features, text_features, logit_scale) + rank()


def _value_by_rank_loss():
    return _value_by_rank


def _nan_loss():
    return lambda image_features, text_features, logit_scale: image_features.sum() * math.nan


@pytest.fixture(scope="module")
def known():
    factories = {
        "gathered": _gathered_loss,
        "local": _clip_loss,
        "scale": _scale_times_world_loss,
        "value": _value_by_rank_loss,
        "nan": _nan_loss,
    }
    cases = {key: ContractCase(factory, reference_fn=_clip_loss) for key, factory in factories.items()}
    cases["infonce"] = ContractCase(partial(create_loss, "infonce"), reference_fn=_clip_loss)
    return check_gradient_contracts(cases, world_size=2)


def test_registered_infonce_equals_the_textbook_form(known):
    """The reference here is plain torch, so this is not the loss compared with itself."""
    assert known["gathered"].ok and known["infonce"].ok, f"{known['gathered']}\n{known['infonce']}"


def test_a_local_loss_is_found_out(known):
    """Negatives of one's own rank alone: another loss, another direction."""
    report = known["local"]
    assert not report.ok and report.value_spread > 1e-3
    assert report["image_tower.weight"].cosine < 0.999


def test_a_scale_gradient_too_large_by_the_number_of_ranks_is_found_out(known):
    report = known["scale"]
    assert not report.ok
    assert report["log_logit_scale"].ratio == pytest.approx(2.0)
    assert report["log_logit_scale"].cosine == pytest.approx(1.0)
    assert report["image_tower.weight"].ratio == pytest.approx(1.0)


def test_values_that_differ_between_ranks_are_found_out(known):
    report = known["value"]
    assert all(parameter.relative_error < 1e-10 for parameter in report.parameters)
    assert report.value_spread == pytest.approx(1 / report.value)
    assert not report.ok and "DOES NOT HOLD" in str(report)


def test_a_nan_gradient_does_not_pass(known):
    assert not known["nan"].ok


def test_report_reads_as_a_table(known):
    text = str(known["gathered"])
    assert text.splitlines()[0] == "2 ranks against one process (tolerance 1e-10)"
    assert re.search(r"image_tower.weight +1.0000 +1.0000", text) and text.endswith("holds")
    with pytest.raises(ValueError, match="Did you mean 'image_tower.weight'"):
        known["gathered"]["image_tower.weigth"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"batch_size": 6}, "6 over 4 ranks in 1 micro-batches does not give every rank the same"),
        ({"micro_batches": 8}, "every micro-batch at least one"),
        ({"hybrid_group": 3}, "hybrid_group 3 does not divide the 4 ranks"),
        ({"inputs": ("image_feature",)}, "Did you mean 'image_features'"),
        ({"loss_fn": lambda: _clip}, "importable by name"),
    ],
)
def test_wrong_settings_say_what_to_do(settings, message):
    with pytest.raises(ValueError, match=message):
        check_gradient_contract(settings.pop("loss_fn", _clip_loss), **settings)
