"""What every Hugging Face type does as a text tower, or why it is none.

Three types of different make are in the gate, all of hf_types.SIZES among the slow tests.
"""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch.nn.functional import cosine_similarity

from clipkit.checkpoint import save_checkpoint
from clipkit.command.compose import register_resolvers, resolved
from clipkit.command.values import check_values
from clipkit.export import save_sentence_transformer
from clipkit.loading import load_model, model_config, with_architecture
from clipkit.losses import create_loss
from clipkit.model import create_model
from clipkit.optim import parameter_groups
from clipkit.planner.measure import Measured
from clipkit.towers import check_text_tower, create_text_tower
from clipkit.towers.hugging_face import without_weights
from tests.processes import ROOT, launch
from tests.towers.fsdp_types import trained
from tests.towers.hf_types import (
    CAUSAL,
    DROPOUT,
    EOT,
    EXPORTED,
    IDS,
    NO_BLOCKS,
    PAD,
    REFUSED,
    SHARED,
    SIZES,
    dual,
    texts,
    tower,
    words,
)

transformers = pytest.importorskip("transformers")

CONF = ROOT / "conf"
# The others are tests/towers/test_hugging_face_tower.py's.
GATE = ("albert", "gpt2", "qwen3")


def types(*gate: str):
    """The mark of a test over every type; those that are not named are slow."""
    return pytest.mark.parametrize(
        "name", [name if name in gate else pytest.param(name, marks=pytest.mark.slow) for name in SIZES]
    )


every_type = types(*GATE)


def layers(name: str) -> int:
    return 1 if name in SHARED else 3


def peer(ours):
    """transformers' own model with a tower's weights."""
    model = transformers.AutoModel.from_config(ours.body.config).eval()
    state = ours.body.state_dict()
    encoder = model.get_encoder() if hasattr(model, "decoder") else model
    # The class of T5's encoder alone names its parts as the whole does.
    target = model if any(key.startswith("encoder.block") for key in state) else encoder
    missing, unexpected = target.load_state_dict(state, strict=False)
    assert not unexpected and all(key.startswith(("pooler", "decoder")) for key in missing), missing
    return encoder


@every_type
def test_each_text_has_the_state_that_transformers_gives_it_alone(name):
    padded, rows = texts()
    model = dual(name, {"pooling": None}).eval()
    ours = model.text_tower
    theirs = peer(ours)
    assert ours.causal == (name in CAUSAL) and ours.pooling == ("last" if name in CAUSAL else "mean")
    with torch.no_grad():
        for pooling in ("mean", "last", "eot", "cls"):
            ours.pooling = pooling
            features = ours(padded)
            for row, feature in zip(rows, features, strict=True):
                states = theirs(
                    input_ids=row[None], attention_mask=torch.ones_like(row)[None]
                ).last_hidden_state[0]
                wanted = {"mean": states.mean(0), "last": states[-1], "eot": states[-1], "cls": states[0]}[
                    pooling
                ]
                torch.testing.assert_close(feature, wanted, atol=2e-6, rtol=1e-5)
            # The same texts padded on the other side, or less.
            left = torch.stack([torch.cat([row.new_full((10 - len(row),), PAD), row]) for row in rows])
            torch.testing.assert_close(ours(left), features, atol=0, rtol=0)
            torch.testing.assert_close(ours(padded[1:, :6]), features[1:], atol=2e-6, rtol=1e-5)


@every_type
def test_layers_are_numbered_by_depth_and_every_parameter_learns(name):
    ours = tower(name).train()
    assert ours.num_layers == layers(name) and len(ours.blocks()) == (
        0 if name in NO_BLOCKS else layers(name)
    )
    depth = {id(one): ours.layer_of(key) for key, one in ours.named_parameters()}
    assert depth[id(ours.token_embedding.weight)] == 0
    for place, block in enumerate(ours.blocks()):
        assert {depth[id(one)] for one in block.parameters()} == {place + 1}
    # A final norm is after the layers, and nothing else is.
    after = [key for key, _ in ours.named_parameters() if ours.layer_of(key) == layers(name) + 1]
    assert all("norm" in key.lower() or "ln_f" in key for key in after), after
    finals = ("body.final", "body.encoder.final", "body.ln_f", "body.norm.")
    assert {key for key, _ in ours.named_parameters() if key.startswith(finals)} == set(after)

    padded, _ = texts()
    out = ours(padded)
    assert out.shape == (4, ours.width) and ours.width == 32
    (out * torch.linspace(-1, 1, 32)).sum().backward()
    without = [key for key, one in ours.named_parameters() if (one.grad is None) == one.requires_grad]
    assert without == []
    # A block's gradient reaches the embedding of each token, the end's too, and of no padding.
    moved = ours.token_embedding.weight.grad.abs().sum(dim=1) > 0
    assert moved[padded.unique()[1:]].all() and not moved[PAD]
    unused = [key for key, one in ours.named_parameters() if not one.requires_grad]
    assert name == "xlnet" or unused == []


@every_type
def test_frozen_layers_keep_their_values_and_the_rest_moves(name):
    ours = tower(name, freeze=1)
    frozen = {key for key, one in ours.named_parameters() if not one.requires_grad}
    before = copy.deepcopy(ours.state_dict())
    padded, _ = texts()
    out = ours.train()(padded)
    if name in SHARED:
        # All of ALBERT but what stands outside its one layer.
        assert not any(one.requires_grad for block in ours.blocks() for one in block.parameters())
        assert not out.requires_grad
        return
    (out * torch.linspace(-1, 1, 32)).sum().backward()
    torch.optim.SGD([one for one in ours.parameters() if one.requires_grad], lr=0.5).step()
    moved = {key for key, value in ours.state_dict().items() if not torch.equal(value, before[key])}
    assert not moved & frozen and moved
    assert not ours.token_embedding.weight.requires_grad
    if name not in NO_BLOCKS:
        assert not any(one.requires_grad for one in ours.blocks()[0].parameters())
        assert all(one.requires_grad for one in ours.blocks()[1].parameters()) or name == "xlnet"
    assert not any(one.requires_grad for one in tower(name, freeze="all").parameters())


@every_type
def test_activation_checkpointing_changes_memory_and_nothing_else(name):
    if name in NO_BLOCKS:
        with pytest.raises(ValueError, match="names no blocks.*activation_checkpointing: false"):
            tower(name, activation_checkpointing=True)
        return
    padded, _ = texts()
    results = []
    for recompute in (False, True):
        ours = tower(name, activation_checkpointing=recompute).train()
        held: dict[int, int] = {}
        weights = {one.data_ptr() for one in ours.parameters()}
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, held=held: held.update({t.data_ptr(): t.numel()}) or t, lambda t: t
        ):
            out = ours(padded)
        kept = sum(size for place, size in held.items() if place not in weights)
        (out * torch.linspace(-1, 1, 32)).sum().backward()
        results.append((out.detach(), {key: one.grad for key, one in ours.named_parameters()}, kept))
    (out, grads, kept), (again, grads_again, kept_again) = results
    torch.testing.assert_close(again, out, atol=0, rtol=0)
    torch.testing.assert_close(grads_again, grads, atol=1e-6, rtol=1e-5)
    assert kept_again < 0.6 * kept


@every_type
def test_layer_decay_multiplies_the_rate_once_a_layer(name):
    model = dual(name)
    ours, n = model.text_tower, layers(name)
    rates = {
        id(one): group["lr"]
        for group in parameter_groups(model, lr=1.0, weight_decay=0.1, layer_decay=0.5)
        for one in group["params"]
    }
    assert rates[id(model.text_projection.weight)] == 1.0
    assert rates[id(ours.token_embedding.weight)] == 0.5 ** (n + 1)
    for place, block in enumerate(ours.blocks()):
        assert {rates[id(one)] for one in block.parameters() if one.requires_grad} == {0.5 ** (n - place)}


@every_type
def test_dropout_is_what_is_set_or_refused(name):
    padded, _ = texts()
    still = tower(name, **{f"{kind}_dropout": 0.0 for kind in DROPOUT[name]}).train()
    assert not still.has_dropout
    torch.testing.assert_close(still(padded), still(padded), atol=0, rtol=0)
    for kind in ("hidden", "attention"):
        if kind not in DROPOUT[name]:
            with pytest.raises(ValueError, match=f"has no text_tower.{kind}_dropout"):
                tower(name, **{f"{kind}_dropout": 0.3})
            continue
        other = {f"{one}_dropout": 0.0 for one in DROPOUT[name] if one != kind}
        shaken = tower(name, **{f"{kind}_dropout": 0.3}, **other).train()
        assert shaken.has_dropout
        first, second = shaken(torch.cat([padded, padded])).split(len(padded))
        # Each text by itself, also where it is joined with its second view.
        assert all(not torch.allclose(a, b, atol=1e-4) for a, b in zip(first, second, strict=True))
        torch.testing.assert_close(shaken.eval()(padded), still.eval()(padded), atol=0, rtol=0)


@every_type
def test_simcse_learns_or_is_refused_for_want_of_dropout(name):
    loss = create_loss("simcse")
    model = dual(name)
    if not model.text_tower.has_dropout:
        with pytest.raises(ValueError, match="drops nothing.*attention_dropout"):
            model.check_inputs(loss.inputs)
    model = dual(name, {f"{DROPOUT[name][0]}_dropout": 0.1}).train()
    model.check_inputs(loss.inputs)
    padded, _ = texts()
    features = model({"text": padded}, loss.inputs)
    views = [value for key, value in features.items() if key.startswith("text_features")]
    assert len(views) == 2 and (cosine_similarity(*views) < 1 - 1e-6).all()
    loss(features)["loss"].backward()
    assert all(one.grad is not None for one in model.text_tower.parameters() if one.requires_grad)


@every_type
def test_masked_language_needs_both_sides(name):
    if name in CAUSAL:
        with pytest.raises(ValueError, match="sees both sides.*model_type"):
            dual(name, mlm_probability=0.3)
        return
    model = dual(name, mlm_probability=0.3).train()
    padded, _ = texts()
    features = model({"text": padded}, ("mlm_logits", "mlm_labels"))
    assert features["mlm_logits"].shape == (len(features["mlm_labels"]), IDS["vocab_size"])
    assert not set(features["mlm_labels"].tolist()) & {PAD, EOT}
    torch.nn.functional.cross_entropy(features["mlm_logits"], features["mlm_labels"]).backward()
    assert model.text_tower.token_embedding.weight.grad.isfinite().all()


def saved(name: str, folder, dtype: torch.dtype = torch.float32):
    """A folder with weights of a type that is not clipkit's, in two spare rows."""
    config = tower(name).body.config
    config.vocab_size = IDS["vocab_size"] + 2
    torch.manual_seed(4)
    model = transformers.AutoModel.from_config(config)
    # Norms and biases away from their start, or a lost one would not be seen.
    for one in model.parameters():
        torch.nn.init.normal_(one, mean=0.05, std=0.2)
    model.to(dtype).save_pretrained(folder)
    return model.float().eval()


@every_type
def test_a_saved_folder_loads_trains_and_is_not_needed_again(name, tmp_path):
    source = tmp_path / "source"
    theirs = saved(name, source)
    config = {
        "embed_dim": 8,
        "image_tower": {"name": "timm", "model": "test_resnet", "pretrained": False},
        "text_tower": {"name": "hf", "pretrained": str(source), "context_length": 10, "pooling": "last"},
    }
    tokenizer = words()
    model = create_model(model_config(config), tokenizer=tokenizer).eval()
    padded, rows = texts()
    encoder = theirs.get_encoder() if hasattr(theirs, "decoder") else theirs
    with torch.no_grad():
        for row, feature in zip(rows, model.text_tower(padded), strict=True):
            wanted = encoder(
                input_ids=row[None], attention_mask=torch.ones_like(row)[None]
            ).last_hidden_state[0, -1]
            torch.testing.assert_close(feature, wanted, atol=1e-4, rtol=1e-4)
    path = save_checkpoint(
        tmp_path / "checkpoints",
        1,
        weights={f"model.{key}": tensor for key, tensor in model.state_dict().items()},
        train_state={},
        config=with_architecture(config),
        tokenizer=tokenizer,
    )
    shutil.rmtree(source)
    again, _, _ = load_model(path)
    assert torch.equal(again.encode_text(padded), model.encode_text(padded))
    assert again.text_tower.causal == model.text_tower.causal
    assert again.text_tower.num_layers == model.text_tower.num_layers


@types("gpt2")
@torch.no_grad()
def test_it_exports_to_sentence_transformers_or_says_why_not(name, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model, tokenizer = dual(name).eval(), words()
    if name not in EXPORTED:
        with pytest.raises(ValueError, match=f"{name}.*sentence-transformers"):
            save_sentence_transformer(model, tmp_path / "out", tokenizer=tokenizer)
        assert not (tmp_path / "out").exists()
        return
    folder = save_sentence_transformer(model, tmp_path / "out", tokenizer=tokenizer)
    captions = ["waa wab wac", "waz", "waa " * 20, "wbd wbc wbb wba"]
    theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu").encode(captions)
    torch.testing.assert_close(
        model.encode_text(tokenizer(captions)), torch.from_numpy(theirs), atol=2e-6, rtol=0
    )


@types("gpt2")
def test_it_can_be_planned(name):
    image = {"name": "timm", "model": "test_resnet", "image_size": 32}
    text = {"name": "hf", "model_type": name, "config": SIZES[name]}
    text |= {"activation_checkpointing": name not in NO_BLOCKS}
    model = {"embed_dim": 16, "image_tower": image, "text_tower": text}
    found = Measured(
        model=model,
        loss="infonce",
        optim={"lr": 1e-3},
        tokenizer=words(),
        precision="bf16",
        fused_attention=True,
    )
    real = tower(name)
    planned = found.model.text_tower
    assert {key: one.shape for key, one in planned.named_parameters()} == {
        key: one.shape for key, one in real.named_parameters()
    }
    assert found.text.flops(8, backward=False) > 0


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("vit", "nystromformer") else pytest.param(name, marks=pytest.mark.slow)
        for name in REFUSED
    ],
)
def test_a_type_that_makes_no_exact_states_is_refused_with_its_reason(name):
    sizes, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason):
        create_text_tower(
            {"name": "hf", "model_type": name, "config": sizes, "context_length": 10}, embed_dim=8, **IDS
        )


def test_weights_in_half_precision_become_whole(tmp_path):
    saved("qwen3", tmp_path, dtype=torch.bfloat16)
    ours = create_text_tower(
        {"name": "hf", "pretrained": str(tmp_path), "context_length": 10}, embed_dim=8, **IDS
    )
    assert {one.dtype for one in ours.parameters()} == {torch.float32}


def test_a_folder_without_all_the_weights_is_refused(tmp_path):
    saved("bert", tmp_path)
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="no weights for 1 tensors.*encoder.layer.1.output.dense.weight"):
        create_text_tower(
            {"name": "hf", "pretrained": str(tmp_path), "context_length": 10}, embed_dim=8, **IDS
        )


@pytest.mark.parametrize("name", ["clip", "gemma3"])
def test_of_a_model_of_several_parts_the_text_encoder_is_taken(name, tmp_path):
    text = tower(name).body.config.to_dict()
    vision = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vision |= {"hidden_size": 32 if name == "clip" else 16, "image_size": 16, "patch_size": 8}
    if name == "clip":
        whole = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
        theirs = whole.text_model
    else:
        whole = transformers.Gemma3ForConditionalGeneration(
            transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
        )
        theirs = whole.model.language_model
    for one in theirs.parameters():
        torch.nn.init.normal_(one, mean=0.05, std=0.2)
    source = tmp_path / "source"
    whole.save_pretrained(source)
    spec = {"name": "hf", "pretrained": str(source), "context_length": 10, "attention_dropout": 0.2}
    ours = create_text_tower(spec, embed_dim=8, **IDS)
    assert ours.has_dropout
    row = texts()[1][0]
    with torch.no_grad():
        wanted = theirs.eval()(
            input_ids=row[None], attention_mask=torch.ones_like(row)[None]
        ).last_hidden_state[0, -1]
        torch.testing.assert_close(ours.eval()(row[None])[0], wanted, atol=1e-5, rtol=1e-5)
        # A checkpoint's sizes make it again.
        again = create_text_tower(without_weights(spec), embed_dim=8, **IDS).eval()
        again.load_state_dict(ours.state_dict())
        assert torch.equal(again(row[None]), ours(row[None]))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fsdp", "ddp"])
def test_ranks_train_every_type_as_one_process_does(way):
    wanted = trained(list(SIZES), "alone")
    for found in launch(trained, 2, list(SIZES), way, timeout_s=600):
        for name in SIZES:
            assert found[name]["losses"] == pytest.approx(wanted[name]["losses"], rel=1e-4), name
            assert wanted[name]["losses"][0] != wanted[name]["losses"][1]
            for key, one in wanted[name]["weights"].items():
                torch.testing.assert_close(
                    found[name]["weights"][key],
                    one,
                    atol=2e-5,
                    rtol=1e-3,
                    msg=lambda text, at=f"{name} {key}": f"{at}: {text}",
                )


# `source` is whatever tower a source has.
CHOICES = [path for path in sorted((CONF / "text_tower").glob("*.yaml")) if path.stem != "source"]


@pytest.mark.parametrize("path", CHOICES, ids=lambda path: path.stem)
def test_a_text_tower_of_conf_is_built_under_the_default_experiment(path):
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("pretrain", overrides=[f"text_tower={path.stem}"])
    config = resolved(cfg, "pretrain")
    check_values(config, "pretrain")
    spec = config["text_tower"]
    check_text_tower(spec)
    if spec.get("pretrained"):
        # A name of the hub, which no test reaches.
        assert spec["name"] == "hf" and spec["model_type"] is None
        return
    with torch.device("meta"):
        made = create_text_tower(spec, embed_dim=config["embed_dim"], context_length=16, **IDS)
    assert made.num_layers >= 2
