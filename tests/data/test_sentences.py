"""NLI sentence batches: exact order, validated files."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from clipkit.data import create_sentences


@pytest.fixture
def files(tmp_path):
    triplets = tmp_path / "triplets.jsonl"
    triplets.write_text(
        "".join(
            json.dumps({"sent0": f"p{i}", "sent1": f"e{i}", "hard_neg": f"c{i}"}) + "\n" for i in range(12)
        )
    )
    pairs = tmp_path / "pairs.jsonl"
    labels = ["entailment", "neutral", "contradiction", 0, 1, 2, "-"]
    pairs.write_text(
        "".join(
            json.dumps({"premise": f"p{i}", "hypothesis": f"h{i}", "label": labels[i % 7]}) + "\n"
            for i in range(14)
        )
    )
    return {"triplets": str(triplets), "pairs": str(pairs)}


def take(stream, steps):
    iterator = iter(stream)
    return [next(iterator) for _ in range(steps)]


def words(rows):
    return [bytes(row).rstrip(b"\0").decode() for row in rows.tolist()]


def test_triplets_stay_together_and_come_once_an_epoch(files, byte_tokenizer):
    batches = take(
        create_sentences({"triplets": files["triplets"]}, tokenizer=byte_tokenizer, batch_size=4, seed=0), 6
    )
    rows = [
        row
        for b in batches
        for row in zip(words(b["premise"]), words(b["entailment"]), words(b["contradiction"]))
    ]
    assert all((p[1:], e[0], c[0]) == (e[1:], "e", "c") and p[1:] == c[1:] for p, e, c in rows)
    expected = sorted(f"p{i}" for i in range(12))
    assert sorted(p for p, _, _ in rows[:12]) == expected and sorted(p for p, _, _ in rows[12:]) == expected
    assert [r[0] for r in rows[:12]] != [r[0] for r in rows[12:]]


def test_labels_are_numbers_and_unlabelled_pairs_are_left_out(files, byte_tokenizer):
    stream = create_sentences({"pairs": files["pairs"]}, tokenizer=byte_tokenizer, batch_size=12, seed=0)
    assert stream.pairs == 12
    (batch,) = take(stream, 1)
    found = dict(zip(words(batch["pair_premise"]), batch["nli_labels"].tolist()))
    assert found == {f"p{i}": (i % 7) % 3 for i in range(14) if i % 7 != 6}
    assert batch["nli_labels"].dtype == torch.int64
    assert [w[1:] for w in words(batch["pair_premise"])] == [w[1:] for w in words(batch["pair_hypothesis"])]


def test_ranks_split_the_batch_of_one_process(files, byte_tokenizer):
    one = take(create_sentences(files, tokenizer=byte_tokenizer, batch_size=4, seed=1), 5)
    two = [
        take(create_sentences(files, tokenizer=byte_tokenizer, batch_size=2, seed=1, rank=r, world_size=2), 5)
        for r in range(2)
    ]
    for step in range(5):
        for name in one[step]:
            assert torch.equal(one[step][name], torch.cat([rank[step][name] for rank in two])), name


def test_a_resume_continues(files, byte_tokenizer):
    make = lambda seed=0: create_sentences(files, tokenizer=byte_tokenizer, batch_size=5, seed=seed)
    whole, first = take(make(), 7), make()
    take(first, 3)
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for one, other in zip(take(resumed, 4), whole[3:]):
        assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(ValueError, match="another seed"):
        make(1).load_state_dict(first.state_dict())


def test_simcse_csv_equals_the_jsonl(test_data, byte_tokenizer):
    folder = test_data("nli-mini")
    make = lambda name: create_sentences(
        {"triplets": str(folder / name)}, tokenizer=byte_tokenizer, batch_size=64, seed=0
    )
    csv, jsonl = make("nli_for_simcse.csv"), make("triplets.jsonl")
    assert csv.triplets == jsonl.triplets == 4096
    for one, other in zip(take(csv, 3), take(jsonl, 3)):
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_the_real_pairs_are_read(test_data, byte_tokenizer):
    assert (
        create_sentences(
            {"pairs": str(test_data("nli-mini/pairs.jsonl"))}, tokenizer=byte_tokenizer, batch_size=8, seed=0
        ).pairs
        == 6890
    )


@pytest.mark.parametrize(
    "line, message",
    [
        ("{broken", "line 2: not JSON"),
        ("[1]", "line 2: expected an object"),
        ('{"sent0": "a", "sent1": "b"}', "line 2: hard_neg is missing"),
        ('{"sent0": 1, "sent1": "b", "hard_neg": "c"}', "line 2: sent0 is 1"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, byte_tokenizer, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"sent0": "a", "sent1": "b", "hard_neg": "c"}\n' + line + "\n")
    with pytest.raises(ValueError, match="bad.jsonl, " + message):
        create_sentences({"triplets": str(path)}, tokenizer=byte_tokenizer, batch_size=1, seed=0)


def test_other_mistakes_say_what_is_right(tmp_path, files, byte_tokenizer):
    def make(spec, batch_size=1):
        return create_sentences(spec, tokenizer=byte_tokenizer, batch_size=batch_size, seed=0)

    with pytest.raises(ValueError, match="names no file"):
        make({})
    with pytest.raises(ValueError, match="Did you mean 'triplets'"):
        make({"triplet": files["triplets"]})
    with pytest.raises(ValueError, match="there is no file"):
        make({"pairs": str(tmp_path / "none.jsonl")})
    with pytest.raises(ValueError, match="fewer than the global batch of 13"):
        make({"triplets": files["triplets"]}, batch_size=13)
    (tmp_path / "a.csv").write_text("sent0,sent1\nx,y\n")
    with pytest.raises(ValueError, match="no column hard_neg"):
        make({"triplets": str(tmp_path / "a.csv")})
    (tmp_path / "label.jsonl").write_text('{"premise": "a", "hypothesis": "b", "label": "entails"}\n')
    with pytest.raises(ValueError, match="label.jsonl, line 1: label is 'entails'"):
        make({"pairs": str(tmp_path / "label.jsonl")})


# Three premises as SNLI and MNLI have them; the second has no gold label in one pair, the third a blank hypothesis.
RAW = [
    ("p1", "e1", "entailment"),
    ("p1", '"n1" is neutral', "neutral"),
    ("p1", "c1", "contradiction"),
    ("p2", "x", "-"),
    ("p2", "c2", "contradiction"),
    ("p2", "e2", "entailment"),
    ("p2", "e2b", "entailment"),
    ("p3", " ", "entailment"),
    ("p3", '"c3', "contradiction"),
]
PAIRS = [
    (p, h, ["entailment", "neutral", "contradiction"].index(g)) for p, h, g in RAW if h.strip() and g != "-"
]
TRIPLETS = [("p1", "e1", "c1"), ("p2", "e2", "c2")]


def raw_file(path):
    """SNLI's jsonl and txt, GLUE's MNLI tsv, Hugging Face's parquet, a plain csv: other columns stand around."""
    if path.suffix == ".jsonl":
        rows = [
            {"annotator_labels": [g], "captionID": "1#0", "gold_label": g, "sentence1": p, "sentence2": h}
            for p, h, g in RAW
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        numbers = {"entailment": 0, "neutral": 1, "contradiction": 2, "-": -1}
        premise, hypothesis, label = zip(*RAW)
        hypothesis = [None if not text.strip() else text for text in hypothesis]
        columns = {"premise": premise, "hypothesis": hypothesis, "label": [numbers[one] for one in label]}
        parquet.write_table(pyarrow.table(columns), path)
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["premise", "hypothesis", "label"])
            writer.writerows(RAW)
    else:
        header = "gold_label\tsentence1_binary_parse\tsentence1\tsentence2\tpairID\tlabel1\tlabel2\n"
        lines = [f"{g}\t( {p} )\t{p}\t{h}\t{i}\t{g}\t\n" for i, (p, h, g) in enumerate(RAW)]
        path.write_text(header + "".join(lines))
    return str(path)


@pytest.mark.parametrize("name", ["snli.jsonl", "snli.txt", "mnli.tsv", "hf.parquet", "plain.csv"])
def test_raw_files_are_read_as_they_are(tmp_path, byte_tokenizer, name, capsys):
    file = raw_file(tmp_path / name)
    pairs = create_sentences({"pairs": file}, tokenizer=byte_tokenizer, batch_size=7, seed=0)
    assert pairs.left_out == {file: {"blank sentence": 1, "no gold label": 1}}
    assert "1 with blank sentence, 1 with no gold label" in capsys.readouterr().err
    (batch,) = take(pairs, 1)
    found = zip(words(batch["pair_premise"]), words(batch["pair_hypothesis"]), batch["nli_labels"].tolist())
    assert sorted(found) == sorted(PAIRS)
    triplets = create_sentences({"triplets": file}, tokenizer=byte_tokenizer, batch_size=2, seed=0)
    (batch,) = take(triplets, 1)
    assert (
        sorted(zip(*(words(batch[name]) for name in ("premise", "entailment", "contradiction")))) == TRIPLETS
    )


@pytest.mark.parametrize("columns", [("sent0", "sent1", "hard_neg"), ("anchor", "positive", "negative")])
def test_triplets_go_by_several_names(tmp_path, byte_tokenizer, columns):
    path = tmp_path / "t.tsv"
    path.write_text("\t".join(columns) + "\n" + "".join("\t".join(row) + "\n" for row in TRIPLETS))
    stream = create_sentences({"triplets": str(path)}, tokenizer=byte_tokenizer, batch_size=2, seed=0)
    (batch,) = take(stream, 1)
    assert (
        sorted(zip(*(words(batch[name]) for name in ("premise", "entailment", "contradiction")))) == TRIPLETS
    )


def test_globs_and_lists_are_read_in_order(tmp_path, files, byte_tokenizer):
    for i in range(3):
        (tmp_path / f"part{i}.jsonl").write_text(
            json.dumps({"sent0": f"p{i}", "sent1": "e", "hard_neg": "c"}) + "\n"
        )
    make = lambda spec: create_sentences({"triplets": spec}, tokenizer=byte_tokenizer, batch_size=3, seed=0)
    listed = make([str(tmp_path / f"part{i}.jsonl") for i in range(3)])
    assert (
        make(str(tmp_path / "part*.jsonl"))._fingerprint() == listed._fingerprint() and listed.triplets == 3
    )
    assert make([str(tmp_path / "part*.jsonl"), files["triplets"]]).triplets == 15
    with pytest.raises(ValueError, match="there is no file .*none"):
        make(str(tmp_path / "none*.jsonl"))
    (tmp_path / "part9.xlsx").write_text("x")
    with pytest.raises(ValueError, match="part9.xlsx is no file of"):
        make(str(tmp_path / "part*"))


def test_a_file_of_blank_sentences_alone_is_an_error(tmp_path, byte_tokenizer):
    path = tmp_path / "t.jsonl"
    path.write_text('{"premise": "a", "hypothesis": " ", "label": 1}\n' * 3)
    with pytest.raises(ValueError, match="t.jsonl has no rows.*'blank sentence': 3"):
        create_sentences({"pairs": str(path)}, tokenizer=byte_tokenizer, batch_size=1, seed=0)


def test_labels_without_both_kinds_make_no_triplet(tmp_path, byte_tokenizer):
    path = tmp_path / "t.jsonl"
    path.write_text('{"premise": "a", "hypothesis": "b", "label": 0}\n')
    with pytest.raises(ValueError, match="both an entailment and a contradiction"):
        create_sentences({"triplets": str(path)}, tokenizer=byte_tokenizer, batch_size=1, seed=0)
