"""What the planner counts on fake tensors and derives by formula, against hand counts and real runs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clipkit.kernels import chunked
from clipkit.losses import list_losses
from clipkit.model import create_model
from clipkit.optim import create_optimizer
from clipkit.planner import GPU, Assumptions, Measured, Meter, Planner
from clipkit.planner.meter import chunked_workspace
from tests import planner_case
from tests.planner_case import BATCH_SIZE, LOSS, MODEL, TOKENIZER
from tests.processes import launch

OPTIM = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1}
CARD = GPU("card", 16.0, 100.0, 10.0, 1000.0, 100.0, 10.0, 8, None)


def measure(
    *, loss=LOSS, optim=OPTIM, precision="fp32", sentences=0, fused_attention=False, **model
) -> Measured:
    return Measured(
        model={**MODEL, **model},
        loss=loss,
        optim=optim,
        tokenizer=TOKENIZER,
        precision=precision,
        sentence_batch_size=sentences,
        fused_attention=fused_attention,
    )


@pytest.fixture(scope="module")
def measured() -> Measured:
    return measure()


def planner(measured, gpu=CARD, **changes) -> Planner:
    return Planner(measured, gpu, Assumptions(reserve_gb=0), **{"batch_size": BATCH_SIZE, **changes})


def counted(function) -> Meter:
    with Meter() as meter:
        function()
    return meter


def flops(meter: Meter) -> int:
    return sum(operator.flops for operator in meter.operators)


def test_operations_are_those_counted_by_hand():
    linear, rows = nn.Linear(7, 5), torch.randn(3, 7, requires_grad=True)
    assert flops(counted(lambda: linear(rows))) == 2 * 3 * 7 * 5
    # d input and d weight, a product each.
    assert flops(counted(lambda: linear(rows).sum().backward())) == 3 * 2 * 3 * 7 * 5
    conv, images = nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 8, 8)
    assert flops(counted(lambda: conv(images))) == 2 * 2 * 6 * 8 * 8 * 4 * 9
    q = torch.randn(2, 3, 10, 16)
    assert flops(counted(lambda: F.scaled_dot_product_attention(q, q, q))) == 2 * 2 * 2 * 3 * 10 * 10 * 16


def test_bytes_alive_are_those_of_the_storages_held():
    with Meter() as meter:
        kept = torch.zeros(100).exp()
        # Two of 400 bytes at once, then the view adds none.
        view = kept.view(10, 10)
        assert (meter.alive, meter.peak) == (400, 800)
        del kept, view
    assert meter.alive == 0


def test_towers_take_the_published_operations():
    """ResNet-50: 4.09e9 multiply-adds at 224 pixels (He et al. 2016, table 1: 3.8e9 by an older count;
    torchvision 4.09).
    """
    m = measure(
        embed_dim=64,
        image_tower={"name": "timm", "model": "resnet50"},
        text_tower={"name": "transformer", "width": 128, "layers": 3, "heads": 4},
        fused_attention=True,
    )
    classifier, projection = 2 * 2048 * 1000, 2 * 2048 * 64
    assert m.image.flops(1, backward=False) == pytest.approx(2 * 4.09e9 - classifier + projection, rel=2e-3)
    # A block: 12 d^2 multiply-adds a token for its four matrices, and L^2 d each for scores and for their sum
    # of values.
    d, length = 128, 12
    text = 3 * (2 * 12 * d * d * length + 4 * length**2 * d) + 2 * d * 64
    assert m.text.flops(5, backward=False) == pytest.approx(5 * text)
    assert 1.9 * text < m.text.flops(1, backward=True) < 2.1 * text + 2 * length**2 * d * 3
    # Published sizes, and fp32 of them.
    assert sum(p.numel() for p in m.model.image_tower.parameters()) == 25_557_032 - 2048 * 1000 - 1000


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "muon"])
def test_weights_and_optimizer_state_are_a_real_optimizers(name):
    m = measure(optim={**OPTIM, "name": name})
    model = create_model(planner_case.MODEL, tokenizer=TOKENIZER)
    optimizer = create_optimizer(model, **{**OPTIM, "name": name})
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    assert m.weights == sum(p.numel() * 4 for p in model.parameters())
    assert m.state == sum(v.numel() * v.element_size() for v in state)
    assert m.buffers == sum(b.numel() * b.element_size() for b in model.buffers())


def saved_by_autograd(model: nn.Module, encode, inputs: torch.Tensor) -> int:
    """Bytes of the storages that a real forward saves for its backward, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = encode(inputs)
    storages[output.untyped_storage().data_ptr()] = output.untyped_storage()
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_activations_are_a_real_runs_at_another_size(tower, precision):
    m = measure(precision=precision)
    model = create_model(planner_case.MODEL, tokenizer=TOKENIZER).train()
    rows, encode = 20, getattr(model, f"encode_{tower}")
    inputs = planner_case.batch(rows)[tower]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        real = saved_by_autograd(model, encode, inputs)
    saved, working = getattr(m, tower).bytes_at(rows)
    assert saved == pytest.approx(real, rel=0.03)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with Meter() as meter:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = encode(inputs)
        output.backward(torch.ones_like(output))
    assert saved + working == pytest.approx(meter.peak, rel=0.05)


def test_checkpointing_trades_activations_for_a_second_forward():
    tower = {**MODEL["text_tower"], "activation_checkpointing": True}
    plain, saving = measure(), measure(text_tower=tower)
    assert saving.text.bytes_at(64)[0] < 0.4 * plain.text.bytes_at(64)[0]
    again = saving.text.flops(64, backward=True) - plain.text.flops(64, backward=True)
    # All of a block but its last matrix, whose output nothing saves: 8 of 12 d^2 multiply-adds a token, and
    # attention.
    d, length, rows = 32, 12, 64
    assert again == 2 * rows * (2 * 8 * d * d * length + 4 * length**2 * d)
    assert saving.text.recomputed(rows) == again and plain.text.recomputed(rows) == 0
    assert planner(saving).flops(rows, rows, 1)["again"] == again


def test_the_chunked_workspace_is_what_a_real_run_holds():
    x, y = (F.normalize(torch.randn(n, 32), dim=1) for n in (96, 160))
    scale, pairs = torch.tensor(10.0), chunked.Pairs()
    with Meter() as meter:
        _, _, row, col = chunked.lse_forward(x, y, scale, None, pairs, 64)
    assert meter.peak - meter.alive == pytest.approx(
        chunked_workspace(96, 160, 32, backward=False, chunk=64), rel=0.3
    )
    with Meter() as meter:
        out = chunked.lse_backward(
            torch.ones(96),
            torch.ones(160),
            x,
            y,
            scale,
            None,
            row,
            col,
            pairs,
            64,
            need_x=True,
            need_y=True,
            need_weight=False,
        )
    held = sum(t.numel() * t.element_size() for t in out if t is not None)
    assert meter.peak - held == pytest.approx(
        chunked_workspace(96, 160, 32, backward=True, chunk=64), rel=0.3
    )


def test_a_loss_takes_what_its_formula_says(measured):
    dense, blocks = (measured.loss_cost(2048, 1, impl) for impl in ("dense", "chunked"))
    n, d = 2048, 24
    # InfoNCE: logits and their two gradients; in chunks the logits again. Cyclic: three D x D products, then
    # four.
    cyclic = 7 * 2 * n * d * d
    assert sum(o.flops for o in dense.operators) == 3 * 2 * n * n * d + cyclic
    assert sum(o.flops for o in blocks.operators) == 4 * 2 * n * n * d + cyclic
    assert dense.workspace > 2 * 4 * n * n
    assert blocks.workspace < 4 * 4 * 1024**2
    assert dense.features == 2 * 4 * n * d + 4


def test_fp32_runs_take_triton_three_products(measured):
    triton = measured.loss_cost(2048, 1, "triton")
    n, d = 2048, 24
    assert sum(o.flops for o in triton.operators) == 3 * 4 * 2 * n * n * d + 7 * 2 * n * d * d


@pytest.fixture(scope="module")
def real() -> dict:
    """Bytes by collective on rank 0 of two real ranks."""
    return launch(planner_case.real_step, 2)[0]


@pytest.mark.parametrize("name", planner_case.LOSSES)
def test_the_losses_traffic_is_that_of_real_ranks(name, real):
    tower = {**MODEL["text_tower"], "dropout": 0.1}
    m = measure(loss=planner_case.LOSSES[name], text_tower=tower, init_logit_bias=-10.0)
    sizes = real["losses"][name]
    # Ring algorithms on two ranks: half of a gathered tensor, and twice half of a reduced one.
    sent = sizes["all_gather"] / 2 + sizes["reduce_scatter"] / 2 + sizes["all_reduce"]
    assert planner(m).communication(6, 6, 2)["losses"] == pytest.approx(sent)


def test_ddp_sends_what_its_buckets_hold(measured, real):
    assert planner(measured).communication(6, 6, 2)["gradients"] == pytest.approx(2 * real["ddp"] / 2)


@pytest.mark.parametrize("micro", [6, 2])
def test_fsdp_sends_what_real_ranks_gather_and_scatter(measured, real, micro):
    sizes, sent = real["fsdp"][micro], planner(measured, parallel="fsdp").communication(6, micro, 2)
    # Each shard is padded to a multiple of the ranks.
    assert sent["weights"] == pytest.approx(sizes["all_gather"] / 2, rel=0.02)
    assert sent["gradients"] == pytest.approx(sizes["reduce_scatter"] / 2, rel=0.02)


def test_micro_batches_hold_less_and_compute_a_forward_more(measured):
    once, cached = (planner(measured, batch_size=256, micro_batch_size=micro).plan(1) for micro in (None, 32))
    assert cached["memory"]["activations"] == pytest.approx(once["memory"]["activations"] / 8, rel=0.2)
    assert cached["flops_total"] == pytest.approx(once["flops_total"] + once["flops"]["forward"])
    assert cached["micro_batches"] == 8


def test_sharding_divides_the_state_and_not_the_activations(measured):
    whole = planner(measured, averaged=True).memory(6, 6, 4)
    split = planner(measured, averaged=True, parallel="fsdp").memory(6, 6, 4)
    for name in ("gradients", "optimizer state"):
        assert split[name] == pytest.approx(whole[name] / 4)
    for name in ("weights", "EMA"):
        assert split[name] == pytest.approx((whole[name] - measured.buffers) / 4 + measured.buffers)
    assert split["activations"] == whole["activations"] and "DDP buckets" not in split
    # Micro-batches are added up before they are reduced.
    assert planner(measured, parallel="fsdp").memory(6, 2, 4)["gradients"] == whole["gradients"]


def test_the_largest_that_fits_fits_and_one_more_does_not(measured):
    small = planner(measured, GPU("small", 0.05, 100.0, 10.0, 1000.0, 100.0, 10.0, 8, None), batch_size=4096)
    micro = small.largest_micro_batch(1)
    assert 1 <= micro < 4096
    assert small.peak(4096, micro, 1) <= 0.05e9 < small.peak(4096, micro + 1, 1)
    batch = small.largest_batch(2, micro=micro)
    assert small.peak(batch // 2, micro, 2) <= 0.05e9 < small.peak(batch, micro, 2)


def test_time_is_bounded_by_each_resource(measured):
    pairs, assumed = 512, Assumptions(efficiency=1.0, launch_us=0.0)
    fast = Planner(measured, CARD, assumed, batch_size=pairs)
    flops, seconds = fast.flops(pairs, pairs, 1), fast.seconds(pairs, pairs, 1)
    assert seconds["forward"] >= flops["forward"] / 10e12
    # Every weight is read at least once.
    assert seconds["forward"] >= measured.weights / 1000e9
    slow = Planner(measured, CARD, Assumptions(efficiency=0.5, launch_us=0.0), batch_size=pairs)
    assert sum(slow.seconds(pairs, pairs, 1).values()) == pytest.approx(2 * sum(seconds.values()))


def test_what_does_not_fit_is_said_with_what_to_lower(measured):
    tiny = planner(measured, GPU("tiny", 0.05, 100.0, 10.0, 1000.0, 100.0, 10.0, 8, None), batch_size=4096)
    plan = tiny.plan(2)
    assert not plan["fits"]
    advice = tiny.advice(plan)
    for words in (
        "batch_size=4096",
        "0.1 GB",
        "activations",
        "micro_batch_size=",
        "activation_checkpointing",
        "parallel=fsdp",
    ):
        assert words in advice


def test_a_batch_that_does_not_divide_is_refused(measured):
    with pytest.raises(
        ValueError, match="batch_size=12 does not divide evenly over 5 GPUs: give a multiple of 5"
    ):
        planner(measured).plan(5)
    with pytest.raises(ValueError, match="efficiency"):
        Assumptions(efficiency=1.5)


def test_every_loss_can_be_planned():
    settings = {
        "nli_softmax": {"embed_dim": 24},
        "matryoshka": {"loss": "infonce", "dims": [8, 24]},
        "slip": {"embed_dim": 24},
        "queue": {"embed_dim": 24, "size": 16},
    }
    m = measure(
        # A teacher's features are data, whose width a plan does not know.
        loss={name: settings.get(name, {}) for name in list_losses() if not name.startswith("distill")},
        text_tower={**MODEL["text_tower"], "dropout": 0.1, "causal": False},
        sentences=8,
        init_logit_bias=-10.0,
        mlm_probability=0.25,
        fused_attention=True,
    )
    everything = planner(m)
    rows = everything.measured.rows(6, 2)
    # SLIP's two further views; SimCSE's second pass, and five kinds of sentences, 8 over two ranks.
    assert (rows["image"], rows["text"], rows["mlm"]) == (3 * 6, 2 * 6 + 5 * 4, 6)
    plan = everything.plan(2)
    # A quarter of 6 x 12 tokens, their logits over 50 words and their labels; ten features of 24; two
    # scalars; three lists of int64.
    features = 18 * (4 * 50 + 8) + 4 * 24 * (3 * 6 + 2 * 6 + 5 * 4) + 2 * 4 + 8 * (6 + 4)
    assert everything.measured.loss_cost(6, 2, "dense").features == features
    assert plan["fits"] and plan["flops"]["loss"] > 0 and plan["communication"]["losses"] > 0


def test_adapters_are_refused():
    with pytest.raises(ValueError, match="a plan knows no adapters"):
        measure(text_tower={**MODEL["text_tower"], "lora": {"rank": 2}})


def test_a_teachers_features_are_counted():
    """16 columns of fp32 for 6 pairs on each side, beside the students' of 24, twice: the features and the maps' input."""
    terms = ("distill", "distill_relations", "distill_features", "distill_contrastive")
    wide = {"distill_features": {"embed_dim": 24, "teacher_dim": 16}}
    plain, taught = (
        measure(loss={name: wide.get(name, {}) for name in names})
        for names in (["infonce"], ["infonce", "distill_features"])
    )
    found, expected = (m.loss_cost(6, 2, "dense").features for m in (taught, plain))
    assert found - expected == 2 * 4 * 6 * 16
    assert measure(loss={name: {} for name in terms}).loss_cost(6, 2, "chunked").workspace > 0


def test_a_pretrained_tower_is_planned_by_its_sizes(tmp_path):
    from transformers import BertConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 40}
    BertConfig(vocab_size=50, **sizes).save_pretrained(tmp_path)
    tower = {"name": "hf", "pretrained": str(tmp_path), "context_length": 12}
    # Of the folder's config alone: it holds no weights.
    m = measure(text_tower=tower)
    block = 4 * (32 * 32 + 32) + 2 * 32 * 40 + 40 + 32 + 4 * 32
    embeddings = (50 + 512 + 2) * 32 + 2 * 32
    assert sum(p.numel() for p in m.model.text_tower.parameters()) == 3 * block + embeddings


def test_attention_dropout_is_free_where_kernels_are_fused():
    text = {**MODEL["text_tower"], "attention_dropout": 0.1}
    plain, fused, cpu = (
        measure(text_tower=tower, fused_attention=kept).text.bytes_at(10)[0]
        for tower, kept in ((MODEL["text_tower"], False), (text, True), (text, False))
    )
    assert fused == plain < cpu


def test_what_drops_is_recomputed_as_it_was_computed():
    """Through torch's attention, of CLIP's tower and of Hugging Face's, in the pass that checkpointing repeats too."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 40}
    bert = {"name": "hf", "model_type": "bert", "config": sizes, "hidden_dropout": 0.0}
    for tower in (MODEL["text_tower"], bert):
        still, shaken = (
            measure(
                text_tower={**tower, "attention_dropout": rate, "activation_checkpointing": True},
                fused_attention=True,
            ).text
            for rate in (0.0, 0.1)
        )
        assert shaken.bytes_at(10) == still.bytes_at(10)
        assert shaken.recomputed(10) == still.recomputed(10) > 0


def test_a_processor_is_measured_in_place_of_a_datasheet():
    found = GPU("cpu", None, 0.5, None, None, 5.0, 1.0, 1, None).measured()
    assert found.bf16_tflops == 0.5
    # Between a very slow and a very fast machine: the units are right.
    assert 0.1 < found.memory_gb < 1e5 and 1e-3 < found.fp32_tflops < 100 and 0.1 < found.memory_gbs < 1e4
