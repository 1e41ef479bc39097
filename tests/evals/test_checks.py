"""What is found before scoring is said and kept, and ties neither gain nor lose: expected values over their orders."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from clipkit.evals import Encoder, consistency_scores, evaluate, zero_shot_classifier
from clipkit.evals import checks as checks_module
from clipkit.evals.classification import read_templates

sys.path.insert(0, str(Path(__file__).resolve().parent))
from eval_cases import TinyModel, tokenize
from test_labels import noise, small_words
from test_tasks import write_tar


class WordModel(TinyModel):
    """Linear layers over a batch, so that a row's last digits depend on its company as in any real model."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.mix = torch.nn.Embedding(64, 48), torch.nn.Linear(48, 16)

    def encode_text(self, tokens):
        return torch.nn.functional.normalize(self.mix(self.table(tokens % 64).tanh().mean(1)), dim=1)


@pytest.fixture(autouse=True)
def nothing_is_said_yet(monkeypatch):
    monkeypatch.setattr(checks_module, "_said", set())


def scored(task, tokenizer=small_words, model=None, **options):
    records = {}
    found = evaluate(model or WordModel(), tokenizer, {"t": task}, records=records, **options)["t"]
    return found, records["t"]


@pytest.fixture
def shards(tmp_path) -> str:
    """Twelve pictures of which 2 and 7 are one, in six classes; captions that a small vocabulary cannot tell apart."""
    members = {}
    for i in range(12):
        members[f"{i:02d}.png"] = noise(2 if i == 7 else i)
        caption = {0: "a cat", 1: "picture a", 5: "cat"}.get(i, f"a cat picture {'a ' * (i % 5)}")
        members[f"{i:02d}.json"] = json.dumps({"caption": caption, "cls": i % 6}).encode()
    return write_tar(tmp_path / "0.tar", members)


CLASSES = ["cat", "emu", "owl", "picture", "gnu", "a", "nobody"]


def test_classes_that_share_their_prompts_are_said_before_scoring_and_kept(shards, capfd):
    task = {"kind": "zero_shot", "shards": shards, "classes": CLASSES, "templates": ["a {}", "{} a"]}
    found, record = scored(task)
    said = capfd.readouterr().err
    # emu, owl, gnu and nobody are no words of the vocabulary.
    assert "4 of 7 classes share all their prompts' tokens with another" in said
    assert "'emu' = 'owl' = 'gnu' = 'nobody'" in said
    assert record.checks["shared_prompts"]["classes"] == 4
    assert record.checks["shared_prompts"]["groups"] == [["emu", "owl", "gnu", "nobody"]]
    assert record.checks["empty_classes"]["names"] == ["nobody"] and "1 of 7 classes have no picture" in said
    assert record.checks["same_images"]["images"] == 2 and "2 of 12 pictures" in said
    assert [one["items"] for one in record.data.values()] == [12]
    scored(task)
    assert capfd.readouterr().err == "", "once in a process"
    clean = {**task, "classes": ["cat", "picture", "a", "a a", "cat cat", "cat a"]}
    assert set(scored(clean)[1].checks) == {"same_images"}
    assert set(found) == {"top1", "top5", "mean_per_class"}


def test_prompts_that_differ_in_one_template_are_told_apart(shards):
    task = {"kind": "zero_shot", "shards": shards, "classes": ["emu", "owl", "gnu", "cat", "a", "b"]}
    record = scored({**task, "templates": ["a {}"]})[1]
    assert record.checks["shared_prompts"]["classes"] == 4
    ids = {"emu": 20, "owl": 21, "gnu": 22}

    def longer(texts):
        tokens = small_words(texts)
        for row, text in enumerate(texts):
            if text.startswith("the"):
                tokens[row, 7] = ids.get(text.split()[1], 0)
        return tokens

    assert "shared_prompts" not in scored({**task, "templates": ["a {}", "the {}"]}, longer)[1].checks


def test_what_is_one_to_the_model_ties_to_the_bit(shards):
    """A batch of another size sums in another order: without care, rounding decides between equal rows."""
    encoder = Encoder(WordModel().eval(), small_words, batch_size=3)
    texts = ["a cat", "a emu", "a picture of", "a owl", "a gnu", "cat cat cat a", "a emu"]
    features = encoder.texts(texts)
    assert torch.equal(features[1], features[3]) and torch.equal(features[3], features[4])
    assert not torch.equal(features[0], features[1])
    weights = zero_shot_classifier(encoder, ["emu", "cat", "owl"], read_templates(["a {}", "the {}", "{}"]))
    assert torch.equal(weights[0], weights[2])
    from clipkit.evals.sources import open_source

    images = encoder.images(open_source("x", shards=shards))
    assert images.same == [[2, 7]] and torch.equal(images.image_features[2], images.image_features[7])


def mean_over_orders(scores: torch.Tensor, right: list[set[int]], k: int) -> float:
    """Hits among the first k, by every order that leaves no lower score before a higher one."""
    total = 0.0
    for row, wanted in zip(scores.tolist(), right, strict=True):
        levels = sorted(set(row), reverse=True)
        groups = [[i for i, s in enumerate(row) if s == level] for level in levels]
        orders = itertools.product(*(list(itertools.permutations(group)) for group in groups))
        hits = [bool(wanted & set(list(itertools.chain(*order))[:k])) for order in orders]
        total += sum(hits) / len(hits)
    return total / len(right)


@pytest.mark.parametrize("k, metric", [(1, "top1"), (5, "top5")])
def test_a_collapsed_class_neither_gains_nor_loses(shards, k, metric):
    task = {"kind": "zero_shot", "shards": shards, "classes": CLASSES, "templates": ["a {}", "{} a"]}
    found, record = scored(task)
    encoder = Encoder(WordModel().eval(), small_words)
    from clipkit.evals.sources import open_source

    images = encoder.images(open_source("x", shards=shards, label_key="cls", labelled=True))
    weights = zero_shot_classifier(encoder, CLASSES, read_templates(["a {}", "{} a"]))
    # Each score once for what is equal, so that products of other shapes do not part them.
    distinct, inverse = weights.unique(dim=0, return_inverse=True)
    scores = (images.image_features.double() @ distinct.double().T)[:, inverse]
    assert found[metric] == pytest.approx(mean_over_orders(scores, [{i % 6} for i in range(12)], k), abs=1e-9)
    # Pictures of emu, owl and gnu: two each.
    assert record.scored[metric].tied == 6 and record.numbers(found)[metric]["tied"] == 6


def test_retrieval_counts_equal_pictures_and_captions_by_expectation(shards):
    found, record = scored({"kind": "retrieval", "shards": shards})
    assert record.checks["shared_captions"]["captions"] >= 2 and record.checks["same_images"]["images"] == 2
    encoder = Encoder(WordModel().eval(), small_words)
    from clipkit.evals.sources import open_source

    source = open_source("x", shards=shards)
    texts, index = encoder.captions(source)
    images = encoder.images(source).image_features
    x, x_of = images.unique(dim=0, return_inverse=True)
    y, y_of = texts.unique(dim=0, return_inverse=True)
    scores = (x.double() @ y.double().T)[x_of][:, y_of]
    assert index.tolist() == list(range(12))
    own = [{i} for i in range(12)]
    assert found["image_to_text_R@1"] == pytest.approx(mean_over_orders(scores, own, 1), abs=1e-9)
    level = [row.count(own) > 1 for row, own in zip(scores.tolist(), scores.diag().tolist(), strict=True)]
    assert record.scored["image_to_text_R@1"].tied == sum(level) > 4
    assert found["text_to_image_R@5"] == pytest.approx(mean_over_orders(scores.T, own, 5), abs=1e-9)


def test_a_text_tower_that_says_nothing_is_at_chance_and_is_said(shards, capfd):
    class Mute(TinyModel):
        def encode_text(self, tokens):
            return torch.ones(len(tokens), 16) / 4

    both = {"train": {"shards": shards}, "test": {"shards": shards}, "classes": CLASSES[:6]}
    task = {"kind": "consistency", **both, "templates": ["a {}"], "k": (1, 5)}
    found, record = scored(task, tokenize, Mute())
    # By argmax the first class alone: 1/6 of pictures that are evenly spread, and all of those of one class.
    assert found == pytest.approx({"consistency@1": 1 / 6, "consistency@5": 1 / 6})
    assert (
        "constant_text_features" in record.checks
        and "same features for all 6 texts" in capfd.readouterr().err
    )
    images = torch.nn.functional.normalize(
        torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), dim=1
    )
    one_class = consistency_scores(
        images, torch.ones(4, 4) / 2, images, torch.zeros(8, dtype=torch.long), k=(1,)
    )
    assert one_class["consistency@1"] == pytest.approx(1 / 4), "the first class would have had all"


def test_a_blind_image_tower_is_said(shards, capfd):
    class Blind(WordModel):
        def encode_image(self, image):
            return torch.ones(len(image), 16) / 4

    found, record = scored({"kind": "retrieval", "shards": shards}, tokenize, Blind())
    assert found["text_to_image_R@1"] == pytest.approx(1 / 12)
    assert record.checks["constant_image_features"]["images"] == 12
    assert "the same features for all 12 pictures" in capfd.readouterr().err


def test_a_long_evaluation_says_how_far_it_has_come(shards, monkeypatch):
    task = {"kind": "retrieval", "shards": shards}
    lines: list[str] = []
    evaluate(WordModel(), tokenize, {"r": task, "s": task}, batch_size=5, progress=lines.append)
    assert lines == ["r, task 1 of 2", "s, task 2 of 2"], "nothing more within ten seconds"
    monkeypatch.setattr("clipkit.evals.encoder.EVERY", 0.0)
    lines.clear()
    evaluate(WordModel(), tokenize, {"r": task}, batch_size=5, progress=lines.append)
    assert [line.partition(" pictures")[0] for line in lines[1:4]] == [
        f"{n} of this rank's about 12" for n in (5, 10, 12)
    ]
    assert "texts" in lines[4] and lines[1].endswith("/s")
