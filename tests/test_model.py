"""DualEncoder: which passes it makes, how it normalises, and what it refuses before the first step."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from clipkit.losses import create_loss, list_losses
from clipkit.losses.registry import losses
from clipkit.model import FEATURES, DualEncoder, create_model
from clipkit.towers import create_image_tower, create_text_tower
from tests.fsdp_case import two_steps
from tests.processes import launch

PAD, SOT, EOT, V = 0, 48, 49, 50
TOKENIZER = SimpleNamespace(vocab_size=V, context_length=12, pad_id=PAD, sot_id=SOT, eot_id=EOT)
IMAGE = {"name": "timm", "model": "test_resnet", "image_size": 32}
TEXT = {"name": "transformer", "width": 32, "layers": 2, "heads": 4}


def model(text=None, image=None, **settings):
    torch.manual_seed(0)
    config = {
        "embed_dim": 24,
        "image_tower": image if image and "name" in image else {**IMAGE, **(image or {})},
        "text_tower": {**TEXT, **(text or {})},
        **settings,
    }
    return create_model(config, tokenizer=TOKENIZER)


def texts(rows, length=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(1, SOT, (rows, length), generator=generator)
    text[:, 0] = SOT
    for row in range(rows):
        end = 2 + row % (length - 2)
        text[row, end], text[row, end + 1 :] = EOT, PAD
    return text


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (4, 3, 32, 32), generator=generator, dtype=torch.uint8) for _ in range(3)]
    return {
        "image": images[0],
        "image_view1": images[1],
        "image_view2": images[2],
        "text": texts(4),
        "key": ["a", "b", "c", "d"],
        "sample_index": torch.arange(4),
        "premise": texts(3, 8, seed=1),
        "entailment": texts(3, 9, seed=2),
        "contradiction": texts(3, 7, seed=3),
        "pair_premise": texts(2, 6, seed=4),
        "pair_hypothesis": texts(2, 6, seed=5),
        "nli_labels": torch.tensor([0, 2]),
    }


def test_default_inputs_are_clips(batch):
    features = model()(batch)
    assert set(features) == {"image_features", "text_features", "logit_scale"}
    assert features["image_features"].shape == features["text_features"].shape == (4, 24)
    assert features["logit_scale"].shape == ()
    for name in ("image_features", "text_features"):
        torch.testing.assert_close(features[name].norm(dim=1), torch.ones(4))


def test_every_feature_has_its_shape_and_no_parameter_is_left_out(batch):
    dual = model({"dropout": 0.1, "causal": False}, mlm_probability=0.3, init_logit_bias=-10.0).train()
    batch["pair_ids"] = torch.tensor([0, 0, 1, 2])
    batch["hard_negative"] = texts(8, 10, seed=6).unflatten(0, (4, 2))
    given = {
        "text_index": torch.arange(4),
        "sample_weight": torch.ones(4),
        "content_features": torch.ones(4, 24),
    }
    given["hard_negative_image_features"] = torch.ones(4, 2, 24)
    given |= {f"dist_{side}_features": torch.ones(4, 5) for side in ("image", "text")}
    given["dist_logit_scale"] = torch.tensor(9.0)
    batch |= given
    features = dual(batch, FEATURES)
    assert all(features.pop(name) is value for name, value in given.items())
    assert set(features) == set(FEATURES) - set(given)
    rows = {"image": 4, "text": 4, "premise": 3, "entailment": 3, "contradiction": 3, "pair": 2}
    for name, value in features.items():
        if "_features" in name:
            shape = (4, 2) if name == "hard_negative_features" else (rows[name.split("_")[0]],)
            assert value.shape == (*shape, 24), name
    assert features["mlm_logits"].shape == (len(features["mlm_labels"]), V)
    assert features["logit_bias"].item() == -10.0 and features["logit_bias"].shape == ()
    sum((value.float() * torch.rand_like(value.float())).sum() for value in features.values()).backward()
    assert [name for name, parameter in dual.named_parameters() if parameter.grad is None] == []


def test_a_teachers_rows_stand_beside_those_of_several_captions(batch):
    """Row i m + k is picture i with its caption k."""
    batch["text"] = torch.stack([texts(4, 10, seed=seed) for seed in range(3)], dim=1)
    batch["dist_image_features"] = torch.arange(4.0)[:, None]
    batch["dist_text_features"] = torch.arange(12.0).view(4, 3, 1)
    features = model()(batch, ("text_features", "dist_image_features", "dist_text_features"))
    assert features["text_features"].shape[0] == 12
    assert features["dist_image_features"].flatten().tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert features["dist_text_features"].flatten().tolist() == list(range(12))


def test_what_a_loss_may_use_is_known_and_not_missed(batch):
    dual = model()
    for name in list_losses():
        optional = getattr(losses.get(name), "optional_inputs", ())
        assert isinstance(optional, property) or set(optional) <= set(FEATURES), name
    optional = ("pair_ids", "hard_negative_features", "sample_weight", "content_features", "text_index")
    assert set(dual(batch, ("image_features", *optional))) == {"image_features"}


@pytest.mark.parametrize("text", [{}, {"causal": False, "pooling": "mean"}], ids=["causal", "both_sides"])
def test_one_joined_text_pass_equals_separate_passes(batch, text):
    dual = model(text).eval()
    names = (
        "text_features",
        "premise_features",
        "entailment_features",
        "contradiction_features",
        "pair_premise_features",
        "pair_hypothesis_features",
    )
    joined = dual(batch, names)
    for name in names:
        torch.testing.assert_close(
            joined[name], dual.encode_text(batch[name.removesuffix("_features")]), atol=1e-6, rtol=0
        )


def several(batch, count):
    """The batch with so many captions a picture."""
    return {
        **batch,
        "text": texts(4 * count, seed=8).unflatten(0, (4, count)),
        "pair_ids": torch.tensor([7, 7, 1, 2]),
    }


def test_a_picture_stands_beside_each_of_its_captions(batch):
    dual = model().eval()
    batch = {**several(batch, 3), "hard_negative": texts(24, 9, seed=9).unflatten(0, (4, 6))}
    calls = []
    dual.image_tower.register_forward_hook(
        lambda module, inputs, output: calls.append(("image", len(output)))
    )
    dual.text_tower.register_forward_hook(lambda module, inputs, output: calls.append(("text", len(output))))
    names = (
        "image_features",
        "text_features",
        "pair_ids",
        "sample_index",
        "image_features_view1",
        "premise_features",
        "hard_negative_features",
    )
    features = dual(batch, names)
    assert calls == [("image", 8), ("text", 12 + 3 + 24)], "each tower once, the image tower a row a picture"
    one_by_one = dual.encode_text(batch["text"].flatten(0, 1))
    torch.testing.assert_close(features["text_features"], one_by_one, atol=1e-6, rtol=0)
    pictures = dual.encode_image(batch["image"])
    for i in range(4):
        for k in range(3):
            torch.testing.assert_close(features["image_features"][3 * i + k], pictures[i], atol=1e-6, rtol=0)
    wrong = dual.encode_text(batch["hard_negative"].flatten(0, 1))
    torch.testing.assert_close(features["hard_negative_features"], wrong.view(12, 2, 24), atol=1e-6, rtol=0)
    assert features["pair_ids"].tolist() == [7] * 6 + [1] * 3 + [2] * 3
    assert features["sample_index"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert len(features["image_features_view1"]) == 4 and len(features["premise_features"]) == 3


def logsumexp(values):
    return torch.stack(list(values)).logsumexp(0)


@pytest.mark.parametrize("name", ["infonce", "infonce mask", "sigmoid", "cyclic"])
def test_several_captions_have_the_gradient_of_the_written_out_loss(batch, name):
    """N pictures against N m texts, in float64 and pair by pair, without a picture's features ever repeated."""
    loss, _, same_ids = name.partition(" ")
    image = {"name": "clip_vit", "patch_size": 16, "width": 16, "layers": 1, "heads": 2}
    dual = model(image={**image, "image_size": 32}, init_logit_bias=-2.0).double()
    batch = several(batch, 3)
    settings = (
        {"same_ids": same_ids}
        if same_ids
        else {"in_modal": 0.25, "cross_modal": 0.5}
        if loss == "cyclic"
        else {}
    )
    objective = create_loss({loss: settings})
    found = objective(dual(batch, (*objective.inputs, *objective.optional_inputs)))["loss"]
    gradient = torch.autograd.grad(found, [*dual.parameters()], allow_unused=True)

    x, y = dual.encode_image(batch["image"]), dual.encode_text(batch["text"].flatten(0, 1))
    ids, owner = batch["pair_ids"].tolist(), [i for i in range(4) for _ in range(3)]
    scale, bias = dual.logit_scale, dual.logit_bias.sum()
    z = [[scale * (x[i] * y[t]).sum() for t in range(12)] for i in range(4)]
    same = [[ids[i] == ids[owner[t]] for t in range(12)] for i in range(4)]
    if name == "infonce":
        # An image's target is even over the texts of its id, a text's over the pictures; log m is what counting each
        # picture m times adds to a text's sum.
        rows = [logsumexp(z[i]) - mean(z[i][t] for t in range(12) if same[i][t]) for i in range(4)]
        columns = [
            logsumexp(z[i][t] for i in range(4)) - mean(z[i][t] for i in range(4) if same[i][t])
            for t in range(12)
        ]
        expected = (mean(rows) + mean(columns) + math.log(3)) / 2
    elif name == "infonce mask":
        # An image and one of its texts against the texts of other ids; a text and its picture against each other picture,
        # once for each of that one's texts.
        rows = [
            logsumexp([z[i][t], *(z[i][u] for u in range(12) if not same[i][u])]) - z[i][t]
            for t in range(12)
            for i in [owner[t]]
        ]
        columns = [
            logsumexp([z[owner[t]][t], *(z[i][t] + math.log(3) for i in range(4) if not same[i][t])])
            - z[owner[t]][t]
            for t in range(12)
        ]
        expected = (mean(rows) + mean(columns)) / 2
    elif name == "sigmoid":
        terms = [
            F.softplus(-(z[i][t] + bias) if same[i][t] else z[i][t] + bias)
            for i in range(4)
            for t in range(12)
        ]
        expected = sum(terms) / 4
    else:
        expected = 0.0
        for t in range(12):
            for u in range(12):
                i, j = owner[t], owner[u]
                expected += 0.25 * ((x[i] * x[j]).sum() - (y[t] * y[u]).sum()) ** 2 / 12
                expected += 0.5 * ((x[i] * y[u]).sum() - (x[j] * y[t]).sum()) ** 2 / 12
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    wanted = torch.autograd.grad(expected, [*dual.parameters()], allow_unused=True)
    for one, other in zip(gradient, wanted):
        # The bias shifts no softmax; its gradient is absent here, or zero.
        one, other = (torch.zeros(1).double() if g is None else g.flatten() for g in (one, other))
        # The scale and the bias are handed to losses in fp32.
        assert (one - other).norm() <= (1e-6 if len(one) == 1 else 1e-9) * other.norm() + 1e-15


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def test_only_the_passes_asked_for_are_made(batch):
    dual = model({"dropout": 0.1})
    seen = []
    dual.image_tower.register_forward_hook(lambda module, inputs, output: seen.append(("image", len(output))))
    dual.text_tower.register_forward_hook(lambda module, inputs, output: seen.append(("text", len(output))))
    dual({"text": batch["text"]}, ("text_features", "text_features_view2"))
    assert seen == [("text", 8)]
    seen.clear()
    dual(batch, ("image_features", "image_features_view1", "image_features_view2"))
    assert seen == [("image", 12)]
    seen.clear()
    assert set(dual({}, ("logit_scale",))) == {"logit_scale"} and seen == []


def test_two_text_views_have_independent_masks(batch):
    dual = model({"dropout": 0.2}).train()
    names = ("text_features", "text_features_view2")
    views = dual(batch, names)
    assert (views["text_features"] - views["text_features_view2"]).abs().amax(dim=1).min() > 1e-4
    dual.eval()
    still = dual(batch, names)
    torch.testing.assert_close(still["text_features"], still["text_features_view2"], atol=1e-6, rtol=0)


def test_a_second_view_without_dropout_is_refused(batch):
    with pytest.raises(ValueError, match="text_tower.dropout"):
        model()(batch, ("text_features", "text_features_view2"))
    with pytest.raises(ValueError, match="text_tower.dropout"):
        model().check_inputs(("text_features_view2",))


def test_uint8_images_are_normalised_as_the_tower_says(batch):
    dual = model(image={"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}).eval()
    mean, std = (
        torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    )
    normalised = (batch["image"].double() / 255 - mean) / std
    torch.testing.assert_close(dual.normalize_image(batch["image"]).double(), normalised, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        dual.encode_image(batch["image"]), dual.encode_image(normalised.float()), atol=1e-6, rtol=0
    )


def test_normalisation_stays_in_fp32_under_bf16(batch):
    dual = model().eval()
    exact = dual.normalize_image(batch["image"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(dual.normalize_image(batch["image"]), exact, atol=0, rtol=0)
        features = dual(batch)
    assert features["image_features"].dtype == features["text_features"].dtype == torch.float32
    torch.testing.assert_close(features["image_features"].norm(dim=1), torch.ones(4))
    # Weights in bf16: the image is rounded once, after the arithmetic.
    half = dual.to(torch.bfloat16)
    torch.testing.assert_close(half.normalize_image(batch["image"]), exact.bfloat16(), atol=0, rtol=0)
    assert half(batch)["image_features"].dtype == torch.float32


def test_channel_statistics_survive_the_meta_device(batch):
    expected = model().normalize_image(batch["image"])
    with torch.device("meta"):
        late = model()
    late.to_empty(device="cpu")
    torch.testing.assert_close(late.normalize_image(batch["image"]), expected, atol=0, rtol=0)


def test_channels_last_changes_the_layout_and_not_the_features(batch):
    last, first = model().eval(), model(channels_last=False).eval()
    assert last.normalize_image(batch["image"]).is_contiguous(memory_format=torch.channels_last)
    assert first.normalize_image(batch["image"]).is_contiguous()
    torch.testing.assert_close(
        last.encode_image(batch["image"]), first.encode_image(batch["image"]), atol=1e-5, rtol=0
    )


def test_float64_models_give_float64_features(batch):
    features = model().double()(batch)
    assert features["image_features"].dtype == features["text_features"].dtype == torch.float64


@pytest.mark.parametrize(
    "image", [torch.zeros(3, 32, 32), torch.zeros(2, 32, 32, 3), torch.zeros(2, 3, 32, 32, dtype=torch.long)]
)
def test_images_of_another_kind_are_refused(image):
    with pytest.raises(ValueError, match="images must be"):
        model().encode_image(image)


def test_logit_scale_starts_at_clips_temperature_and_is_clamped():
    dual = model()
    assert dual.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-6)
    assert dual.log_logit_scale.shape == (1,)
    with torch.no_grad():
        dual.log_logit_scale.fill_(math.log(250.0))
    dual.clamp_logit_scale()
    assert dual.logit_scale.item() == pytest.approx(100.0, rel=1e-6)
    dual.clamp_logit_scale(max=20.0)
    assert dual.logit_scale.item() == pytest.approx(20.0, rel=1e-6)
    dual.clamp_logit_scale(max=50.0)
    assert dual.logit_scale.item() == pytest.approx(20.0, rel=1e-6)
    dual.logit_scale.backward()
    assert dual.log_logit_scale.grad.item() == pytest.approx(20.0, rel=1e-6)


def test_towers_that_project_get_no_second_projection():
    spec = {"name": "clip_vit", "image_size": 32, "patch_size": 16, "width": 64, "layers": 1}
    config = {"embed_dim": 24, "image_tower": spec, "text_tower": TEXT}
    dual = create_model(config, tokenizer=TOKENIZER)
    assert [name for name, _ in dual.image_projection.named_parameters()] == []
    assert model().image_projection.weight.shape == (24, 96) and model().image_projection.bias is None
    tower = create_image_tower(spec, embed_dim=16)
    text = create_text_tower(TEXT, embed_dim=24, vocab_size=V, pad_id=PAD, eot_id=EOT, context_length=12)
    with pytest.raises(ValueError, match="projects to 16 columns but embed_dim is 24"):
        DualEncoder(tower, text, embed_dim=24)


def test_state_dict_keys_are_stable():
    keys = set(model({"dropout": 0.1}, init_logit_bias=0.0).state_dict())
    assert {"log_logit_scale", "logit_bias", "image_projection.weight", "text_projection.weight"} < keys
    assert "image_tower.trunk.layer1.0.conv1.weight" in keys
    assert "text_tower.body.transformer.resblocks.0.attn.in_proj_weight" in keys
    assert keys == set(model({"activation_checkpointing": True}, init_logit_bias=0.0).state_dict())


def test_mlm_head_is_berts_on_the_hidden_tokens(batch):
    dual = model({"causal": False}, mlm_probability=0.5).eval()
    torch.manual_seed(1)
    features = dual(batch, ("mlm_logits", "mlm_labels"))
    torch.manual_seed(1)
    hidden, drawn = dual.mlm_head.hide(batch["text"], V)
    torch.testing.assert_close(features["mlm_labels"], batch["text"][drawn])
    # The definition, one token at a time.
    states = dual.text_tower.tokens(hidden)
    rows = []
    for row, column in drawn.nonzero().tolist():
        state = F.gelu(dual.mlm_head.dense.weight @ states[row, column] + dual.mlm_head.dense.bias)
        state = F.layer_norm(state, state.shape, dual.mlm_head.norm.weight, dual.mlm_head.norm.bias)
        rows.append(dual.text_tower.token_embedding.weight @ state + dual.mlm_head.bias)
    torch.testing.assert_close(features["mlm_logits"], torch.stack(rows), atol=1e-5, rtol=1e-5)
    assert not any("embedding" in name for name, _ in dual.mlm_head.named_parameters())


def test_mlm_hides_the_stated_shares_and_no_special_token():
    dual = model({"causal": False, "context_length": 12}, mlm_probability=0.15)
    text = torch.randint(1, SOT, (20000, 12))
    text[:, 0], text[:, 9], text[:, 10:] = SOT, EOT, PAD
    torch.manual_seed(0)
    hidden, drawn = dual.mlm_head.hide(text, V)
    special = (text == SOT) | (text == EOT) | (text == PAD)
    assert not (drawn & special).any() and torch.equal(hidden[~drawn], text[~drawn])
    share = drawn[~special].float().mean().item()
    masked = (hidden[drawn] == SOT).float().mean().item()
    kept = (hidden[drawn] == text[drawn]).float().mean().item()
    # 160,000 tokens, 24,000 drawn. A random id is the mask's or the token's own once in 50.
    assert share == pytest.approx(0.15, abs=0.005)
    assert masked == pytest.approx(0.8 + 0.1 / V, abs=0.01)
    assert kept == pytest.approx(0.1 + 0.1 / V, abs=0.01)


def test_mlm_always_hides_at_least_one_token():
    dual = model({"causal": False}, mlm_probability=1e-6)
    _, drawn = dual.mlm_head.hide(texts(3), V)
    assert drawn.sum() == 1
    nothing = torch.full((2, 3), PAD)
    assert not dual.mlm_head.hide(nothing, V)[1].any()


def test_mlm_uses_the_tokenizers_mask_where_it_has_one():
    tokenizer = copy.copy(TOKENIZER)
    tokenizer.mask_id = 47
    config = {
        "embed_dim": 8,
        "image_tower": IMAGE,
        "text_tower": {**TEXT, "causal": False},
        "mlm_probability": 0.5,
    }
    assert create_model(config, tokenizer=tokenizer).mlm_head.mask_id == 47
    assert create_model(config, tokenizer=TOKENIZER).mlm_head.mask_id == SOT


@pytest.mark.parametrize(
    ("missing", "name", "message"),
    [
        ("premise", "premise_features", "premise_features needs 'premise'.*data.sentences"),
        ("nli_labels", "nli_labels", "nli_labels needs 'nli_labels'"),
        ("image", "image_features", "image_features needs 'image'"),
        ("sample_index", "sample_index", "sample_index needs 'sample_index'"),
    ],
)
def test_a_missing_batch_entry_is_named_with_its_source(batch, missing, name, message):
    del batch[missing]
    with pytest.raises(ValueError, match=message):
        model()(batch, (name,))


def test_pair_ids_are_optional(batch):
    assert "pair_ids" not in model()(batch, ("logit_scale", "pair_ids"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text_feature", "'text_feature'.*'text_features'"),
        ("logit_bias", "init_logit_bias"),
        ("mlm_logits", "mlm_probability"),
    ],
)
def test_inputs_the_model_cannot_make_are_named(batch, name, message):
    with pytest.raises(ValueError, match=message):
        model()(batch, (name,))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"embed_dims": 3}, "'embed_dims'.*'embed_dim'"),
        ({"embed_dim": None}, "no 'embed_dim'"),
        ({"init_logit_scale": -1.0}, "above 0"),
        ({"text": {"context_length": 8}}, "12 tokens but the text tower holds 8"),
        ({"mlm_probability": 0.15}, "causal: false"),
        ({"mlm_probability": 2.0, "text": {"causal": False}}, "mlm_probability is a share"),
    ],
)
def test_wrong_model_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        model(**settings)


@pytest.mark.parametrize("image", ["vit", "resnet"])
def test_compiles_with_activation_checkpointing(batch, image):
    vit = {"name": "clip_vit", "image_size": 32, "patch_size": 16, "width": 64, "layers": 1}
    spec = {**(vit if image == "vit" else IMAGE), "activation_checkpointing": True}
    config = {"embed_dim": 24, "image_tower": spec, "text_tower": {**TEXT, "activation_checkpointing": True}}
    torch.manual_seed(0)
    dual = create_model(config, tokenizer=TOKENIZER).train()
    plain = copy.deepcopy(dual)
    plain.image_tower.set_activation_checkpointing(False)
    plain.text_tower.set_activation_checkpointing(False)
    # BatchNorm in a recomputed block stays outside the graph.
    compiled = torch.compile(dual, fullgraph=image == "vit", backend="eager")
    for encode in (compiled, plain):
        features = encode(batch, ("image_features", "text_features"))
        (features["image_features"] @ features["text_features"].T).diagonal().sum().backward()
    for (name, ours), expected in zip(dual.named_parameters(), plain.parameters()):
        if expected.grad is not None:
            torch.testing.assert_close(
                ours.grad, expected.grad, atol=1e-5, rtol=1e-4, msg=lambda text: f"{name}: {text}"
            )
    torch.testing.assert_close(dict(dual.named_buffers()), dict(plain.named_buffers()), atol=1e-6, rtol=0)


def test_compiles_without_graph_breaks(batch):
    dual = model().eval()
    compiled = torch.compile(dual, fullgraph=True, backend="eager")
    for name, value in dual(batch).items():
        torch.testing.assert_close(compiled(batch)[name], value, atol=1e-6, rtol=0)


def test_sharded_by_fsdp2_it_trains_as_in_one_process():
    expected = two_steps(sharded=False)
    assert expected["logit_scale"] <= 5.0 * (1 + 1e-6)
    for result in launch(two_steps, 2, True, timeout_s=120):
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert result["logit_scale"] == pytest.approx(expected["logit_scale"], rel=1e-6)
        for kind in ("weights", "averaged"):
            torch.testing.assert_close(result[kind], expected[kind], atol=1e-5, rtol=1e-4)
