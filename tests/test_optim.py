"""Optimizer groups counted by hand, schedules against their formulas, and optimizers by name."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import timm.optim
import torch
from torch import nn

from clipkit.model import create_model
from clipkit.optim import (
    WeightAverage,
    create_optimizer,
    create_schedule,
    list_optimizers,
    list_schedules,
    parameter_groups,
)
from clipkit.sharding import load_optimizer, optimizer_settings, optimizer_tensors

TOKENIZER = SimpleNamespace(vocab_size=50, context_length=12, pad_id=0, sot_id=48, eot_id=49)


def model(image=None, text=None, **settings):
    config = {
        "embed_dim": 24,
        "image_tower": {
            "name": "clip_vit",
            "image_size": 32,
            "patch_size": 16,
            "width": 64,
            "layers": 2,
            **(image or {}),
        },
        "text_tower": {"name": "transformer", "width": 32, "layers": 2, "heads": 4, **(text or {})},
        **settings,
    }
    return create_model(config, tokenizer=TOKENIZER)


def names_by_group(module, groups):
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}


def test_groups_counted_by_hand():
    dual = model(init_logit_bias=0.0)
    groups = parameter_groups(dual, lr=1e-3, weight_decay=0.1)
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in groups] in (
        [("decay", 1e-3, 0.1), ("no_decay", 1e-3, 0.0)],
        [("no_decay", 1e-3, 0.0), ("decay", 1e-3, 0.1)],
    )
    count = {group["name"]: len(group["params"]) for group in groups}
    # A block has 4 matrices (in_proj, out_proj, c_fc, c_proj), their 4 biases and 2 norms of 2.
    # Image: patches, positions, projection; class token, ln_pre, ln_post. Text: tokens, positions; ln_final.
    assert count["decay"] == 2 * 4 + 3 + 2 * 4 + 2 + 1
    assert count["no_decay"] == 2 * 8 + 1 + 4 + 2 * 8 + 2 + 2
    undecayed = names_by_group(dual, groups)["no_decay"]
    assert {
        "log_logit_scale",
        "logit_bias",
        "image_tower.body.class_embedding",
        "text_tower.body.ln_final.weight",
    } < undecayed
    assert all(dual.get_parameter(name).ndim == 1 for name in undecayed)


def test_frozen_parameters_are_left_out_and_losses_are_taken_in():
    dual = model(image={"freeze": "all"})
    head = nn.Linear(24, 3)
    groups = names_by_group(
        nn.ModuleList([dual, head]), parameter_groups([dual, head], lr=1.0, weight_decay=0.1)
    )
    every = groups["decay"] | groups["no_decay"]
    assert not any("image_tower" in name for name in every)
    assert "1.weight" in groups["decay"] and "1.bias" in groups["no_decay"]
    assert len(every) == sum(p.requires_grad for p in (*dual.parameters(), *head.parameters()))


def test_a_shared_parameter_is_stepped_once():
    dual = model()
    groups = parameter_groups([dual, dual.text_tower], lr=1.0, weight_decay=0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(dual.parameters()))


def test_nothing_to_train_is_an_error():
    head = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="freeze"):
        create_optimizer(head, lr=1e-3)


def test_layer_decay_by_depth():
    dual = model()
    groups = parameter_groups(dual, lr=1.0, weight_decay=0.1, layer_decay=0.5)
    rate = {name: g["lr"] for g in groups for name in names_by_group(dual, [g])[g["name"]]}
    # Two blocks: embeddings at 0.5^3, block 0 at 0.5^2, block 1 at 0.5, final norm and what is outside at 1.
    assert rate["text_tower.body.token_embedding.weight"] == 0.125
    assert rate["text_tower.body.transformer.resblocks.0.mlp.c_fc.weight"] == 0.25
    assert rate["image_tower.body.transformer.resblocks.1.mlp.c_fc.bias"] == 0.5
    assert rate["image_tower.body.conv1.weight"] == 0.125
    for name in (
        "text_tower.body.ln_final.bias",
        "image_tower.body.proj",
        "text_projection.weight",
        "log_logit_scale",
    ):
        assert rate[name] == 1.0
    assert len({group["name"] for group in groups}) == len(groups) == 8
    with pytest.raises(ValueError, match="layer_decay"):
        parameter_groups(dual, lr=1.0, weight_decay=0.1, layer_decay=0.0)


def test_a_tower_has_a_rate_of_its_own():
    dual = model()
    given = {"lr": 2.0, "weight_decay": 0.1, "layer_decay": 0.5, "image_tower_lr": 0.1, "text_tower_lr": 3.0}
    groups = create_optimizer(dual, **given).param_groups
    rate = {name: g["lr"] for g in groups for name in names_by_group(dual, [g])[g["name"]]}
    assert rate["image_tower.body.proj"] == pytest.approx(0.2)
    assert rate["image_tower.body.conv1.weight"] == pytest.approx(0.2 * 0.125)
    assert rate["text_tower.body.ln_final.bias"] == pytest.approx(6.0)
    assert rate["text_tower.body.transformer.resblocks.0.mlp.c_fc.weight"] == pytest.approx(6.0 * 0.25)
    assert rate["text_projection.weight"] == rate["log_logit_scale"] == 2.0
    with pytest.raises(ValueError, match="ImageTower is above 0"):
        create_optimizer(dual, lr=1.0, image_tower_lr=0.0)


def test_adamw_is_fused_and_decays_matrices_alone():
    linear = nn.Linear(3, 2)
    before = [p.detach().clone() for p in linear.parameters()]
    optimizer = create_optimizer(linear, lr=0.1, betas=[0.9, 0.98], eps=1e-6, weight_decay=0.5)
    assert (
        optimizer.defaults["fused"]
        and optimizer.defaults["betas"] == (0.9, 0.98)
        and optimizer.defaults["eps"] == 1e-6
    )
    for parameter in linear.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    # With no gradient only decoupled decay acts: w (1 - lr * weight_decay).
    torch.testing.assert_close(linear.weight, before[0] * (1 - 0.1 * 0.5))
    torch.testing.assert_close(linear.bias, before[1], atol=0, rtol=0)


def test_adamws_first_step_is_the_learning_rate():
    linear = nn.Linear(3, 2)
    before = linear.weight.detach().clone()
    optimizer = create_optimizer(linear, lr=0.01, weight_decay=0.0)
    linear.weight.grad, linear.bias.grad = torch.randn(2, 3), torch.zeros(2)
    optimizer.step()
    torch.testing.assert_close(linear.weight, before - 0.01 * linear.weight.grad.sign(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "muon"])
def test_every_optimizer_lowers_a_loss(name):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x, y = torch.randn(64, 8), torch.randn(64, 4)
    optimizer = create_optimizer(net, name=name, lr=1e-2, weight_decay=0.01)
    first = nn.functional.mse_loss(net(x), y).item()
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(x), y)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.9 * first
    assert name in list_optimizers()


def test_muon_leaves_embeddings_to_adamw():
    dual = model()
    optimizer = create_optimizer(dual, name="muon", lr=1e-3, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in dual.named_parameters()}
    by_adam = {
        names[id(p)] for group in optimizer.param_groups if group.get("use_fallback") for p in group["params"]
    }
    assert {"text_tower.body.token_embedding.weight", "text_tower.body.positional_embedding"} <= by_adam
    assert not any("resblocks" in name and name.endswith("weight") and "ln" not in name for name in by_adam)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adamW2"}, "'adamW2'.*adamw"),
        ({"name": "lion", "eps": 1e-8}, "'eps'"),
        ({"name": "adamw", "momentum": 0.9}, "'momentum'"),
        ({"lr": 0.0}, "lr must be above 0"),
    ],
)
def test_wrong_optimizer_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        create_optimizer(nn.Linear(2, 2), **{"lr": 1e-3, **settings})


def rates(name, warmup, total, steps, final=0.0, peak=2.0, **settings):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    schedule = create_schedule(
        optimizer, name=name, warmup_steps=warmup, total_steps=total, final=final, **settings
    )
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_cosine_schedule_by_its_formula():
    expected = [2.0 * (step + 1) / 4 for step in range(4)]
    expected += [2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 4) / 6))) for step in range(4, 10)]
    assert rates("cosine", 4, 10, 12, final=0.1) == pytest.approx([*expected, 0.2, 0.2])


def test_linear_and_constant_schedules_by_hand():
    assert rates("linear", 2, 6, 8) == pytest.approx([1.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0, 0.0])
    assert rates("constant", 2, 6, 7) == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    assert rates("cosine", 0, 2, 2) == pytest.approx([2.0, 1.0])
    assert list_schedules() == ["constant", "cosine", "linear", "wsd"]


def test_warm_up_stable_decay_by_hand():
    seen = rates("wsd", 2, 8, 10, final=0.5, cooldown_steps=4)
    assert seen == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0, 1.75, 1.5, 1.25, 1.0, 1.0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "wsd"}, "wsd has a cooldown of at least 1 step"),
        ({"name": "cosine", "cooldown_steps": 2}, "no other schedule has one"),
        ({"name": "wsd", "cooldown_steps": 9}, "warmup_steps 2 and cooldown_steps 9 are more than the 10"),
        ({"name": "wsd", "cooldown_steps": -1}, "cooldown"),
    ],
)
def test_a_cooldown_belongs_to_wsd_and_fits(settings, message):
    with pytest.raises(ValueError, match=message):
        rates(settings.pop("name"), 2, 10, 1, **settings)


# (settings of 20 steps, steps done, other settings, whether those steps had the same rates by hand).
EXTENSIONS = [
    ({"name": "constant"}, 20, {"name": "constant", "total_steps": 30}, True),
    ({"name": "constant"}, 20, {"name": "wsd", "total_steps": 30, "cooldown_steps": 10}, True),
    ({"name": "constant"}, 20, {"name": "wsd", "total_steps": 30, "cooldown_steps": 12}, False),
    ({"name": "wsd", "cooldown_steps": 5}, 15, {"name": "wsd", "total_steps": 30, "cooldown_steps": 5}, True),
    # The first step of a cooldown still has the whole rate.
    ({"name": "wsd", "cooldown_steps": 5}, 16, {"name": "wsd", "total_steps": 30, "cooldown_steps": 5}, True),
    (
        {"name": "wsd", "cooldown_steps": 5},
        17,
        {"name": "wsd", "total_steps": 30, "cooldown_steps": 5},
        False,
    ),
    (
        {"name": "wsd", "cooldown_steps": 5},
        20,
        {"name": "wsd", "total_steps": 30, "cooldown_steps": 5},
        False,
    ),
    ({"name": "cosine"}, 20, {"name": "cosine", "total_steps": 30}, False),
    ({"name": "cosine"}, 2, {"name": "cosine", "total_steps": 30}, True),
    ({"name": "linear"}, 20, {"name": "constant", "total_steps": 30}, False),
    ({"name": "cosine"}, 20, {"name": "cosine", "final": 0.1}, False),
    ({"name": "constant"}, 20, {"name": "constant", "warmup_steps": 3}, False),
    ({"name": "constant"}, 20, {"name": "constant", "total_steps": 19}, False),
    ({"name": "constant"}, 10, {"name": "constant", "total_steps": 15}, True),
]


@pytest.mark.parametrize(("before", "done", "now", "same"), EXTENSIONS)
def test_a_schedule_goes_on_by_other_settings_where_the_steps_taken_had_the_same_rates(
    before, done, now, same
):
    def build(settings):
        settings = {"warmup_steps": 2, "total_steps": 20, **settings}
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
        return optimizer, create_schedule(optimizer, **settings)

    optimizer, schedule = build(before)
    for _ in range(done):
        optimizer.step()
        schedule.step()
    later_optimizer, later = build(now)
    if not same:
        with pytest.raises(ValueError, match="more than|would have had.*schedule=constant"):
            later.load_state_dict(schedule.state_dict())
        return
    later.load_state_dict(schedule.state_dict())
    settings = {"warmup_steps": 2, "total_steps": 20, **now}
    whole = rates(
        settings.pop("name"),
        settings.pop("warmup_steps"),
        total := settings.pop("total_steps"),
        total,
        **settings,
    )
    seen = []
    for _ in range(total - done):
        seen.append(later_optimizer.param_groups[0]["lr"])
        later_optimizer.step()
        later.step()
    assert seen == whole[done:]


def test_a_schedule_goes_on_at_the_rates_of_the_optimizer_that_was_loaded():
    def made(lr):
        optimizer = create_optimizer(nn.Linear(2, 2), lr=lr)
        return optimizer, create_schedule(optimizer, name="linear", warmup_steps=0, total_steps=10)

    optimizer, schedule = made(0.5)
    for _ in range(4):
        optimizer.step()
        schedule.step()
    later, continued = made(0.1)
    later.load_state_dict(optimizer.state_dict())
    continued.load_state_dict(schedule.state_dict())
    later.step()
    continued.step()
    # 1 - 5/10 of the rate that was saved.
    assert [group["lr"] for group in later.param_groups] == pytest.approx([0.25] * len(later.param_groups))


def test_schedule_scales_every_group_by_the_same_factor():
    dual = model()
    optimizer = create_optimizer(dual, lr=1.0, layer_decay=0.5)
    peaks = [group["lr"] for group in optimizer.param_groups]
    create_schedule(optimizer, warmup_steps=4, total_steps=10)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([peak / 4 for peak in peaks])


@pytest.mark.parametrize(("warmup", "total"), [(10, 10), (11, 10), (-1, 10), (0, 0)])
def test_warmup_as_long_as_training_is_an_error(warmup, total):
    with pytest.raises(ValueError, match=f"warmup_steps {warmup} is not shorter than the {total}"):
        rates("cosine", warmup, total, 1)


def test_unknown_schedules_and_final_factors_are_named():
    with pytest.raises(ValueError, match="'cosin'.*'cosine'"):
        rates("cosin", 1, 10, 1)
    with pytest.raises(ValueError, match="final"):
        rates("cosine", 1, 10, 1, final=1.5)


def averaged_net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    return net, WeightAverage(net, decay=0.5)


def test_weight_average_by_hand():
    net, average = averaged_net()
    expected = net[0].weight.detach().double()
    for step, decay in enumerate((0.1, 2 / 11, 0.25, 4 / 13, 5 / 14, 0.4, 7 / 16, 8 / 17, 0.5, 0.5, 0.5)):
        with torch.no_grad():
            net[0].weight.add_(torch.randn(3, 2))
        average.update(net)
        expected = decay * expected + (1 - decay) * net[0].weight.detach().double()
        assert average.updates == step + 1
    torch.testing.assert_close(average.weights["0.weight"].double(), expected, atol=1e-6, rtol=0)


def test_weight_average_is_lent_to_the_model_and_taken_back():
    net, average = averaged_net()
    net.train()(torch.randn(8, 2) + 5)
    with torch.no_grad():
        net[0].bias.fill_(3.0)
    average.update(net)
    own = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    parameter = net[0].bias
    with pytest.raises(RuntimeError, match="inside"):
        with average.applied(net):
            assert net[0].bias is parameter
            assert not torch.equal(net[0].bias, own["0.bias"])
            # A mean of statistics, but the whole count.
            assert 0 < net[1].running_mean.abs().max() < own["1.running_mean"].abs().max()
            assert net[1].num_batches_tracked == 1
            raise RuntimeError("inside")
    assert all(torch.equal(own[name], tensor) for name, tensor in net.state_dict().items())


def test_weight_average_resumes_and_refuses_another_model():
    net, average = averaged_net()
    for _ in range(3):
        average.update(net)
    later_net, later = averaged_net()
    later.load_state_dict(copy.deepcopy(average.state_dict()))
    for one, other in ((net, average), (later_net, later)):
        with torch.no_grad():
            one[0].weight.fill_(1.0)
        other.update(one)
    assert later.updates == 4 and torch.equal(later.weights["0.weight"], average.weights["0.weight"])
    with pytest.raises(ValueError, match="another model"):
        later.load_state_dict({"updates": 1, "weights": {"weight": torch.zeros(1)}})
    with pytest.raises(ValueError, match="decay"):
        WeightAverage(net, decay=1.0)


def test_schedule_resumes_where_it_stopped():
    def build():
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
        return optimizer, create_schedule(optimizer, warmup_steps=3, total_steps=10)

    whole = rates("cosine", 3, 10, 10)
    optimizer, schedule = build()
    for _ in range(5):
        optimizer.step()
        schedule.step()
    later_optimizer, later = build()
    later_optimizer.load_state_dict(optimizer.state_dict())
    later.load_state_dict(schedule.state_dict())
    seen = []
    for _ in range(5):
        seen.append(later_optimizer.param_groups[0]["lr"])
        later_optimizer.step()
        later.step()
    assert seen == pytest.approx(whole[5:])


@pytest.mark.parametrize("name", timm.optim.list_optimizers())
def test_any_optimizer_of_timm_takes_steps_and_goes_on_from_a_checkpoint_to_the_same_bits(name):
    if name.startswith(("bnb", "fused", "adahessian")):
        # Kernels for CUDA alone; second derivatives.
        with pytest.raises(ValueError, match=name):
            create_optimizer(nn.Linear(2, 2), name=name, lr=1e-3)
        return

    def build():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(24, 32), nn.LayerNorm(32), nn.Linear(32, 8))
        return net, create_optimizer(net, name=name, lr=1e-3, weight_decay=0.01)

    def train(net, optimizer, seed):
        torch.manual_seed(seed)
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.randn(16, 24)).square().mean().backward()
            optimizer.step()

    net, optimizer = build()
    train(net, optimizer, 1)
    weights = {key: value.clone() for key, value in net.state_dict().items()}
    tensors = {key: value.clone() for key, value in optimizer_tensors(optimizer).items()}
    settings = copy.deepcopy(optimizer_settings(optimizer))
    train(net, optimizer, 2)
    later, other = build()
    later.load_state_dict(weights)
    load_optimizer(other, settings, tensors)
    train(later, other, 2)
    moved = [not torch.equal(value, weights[key]) for key, value in net.state_dict().items()]
    assert any(moved)
    for key, value in net.state_dict().items():
        assert torch.equal(later.state_dict()[key], value), key


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "lambb"}, "'lambb'.*Did you mean 'lamb'"),
        ({"name": "lamb", "options": {"trust": True}}, "'lamb'.*'trust'"),
        ({"name": "adafactor", "momentum": 0.9}, "'adafactor'.*'momentum'"),
        ({"name": "lamb", "lr": 0.0}, "lr must be above 0"),
    ],
)
def test_settings_that_an_optimizer_of_timm_lacks_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        create_optimizer(nn.Linear(2, 2), **{"lr": 1e-3, **settings})


def test_options_reach_an_optimizer_of_timm():
    optimizer = create_optimizer(nn.Linear(2, 2), name="lamb", lr=1e-3, options={"trust_clip": True})
    assert optimizer.param_groups[0]["trust_clip"] is True
