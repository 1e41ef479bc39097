"""clipkit-report and clipkit-predict on small run folders with real checkpoints."""

from __future__ import annotations

import html.parser
import json
import re
import statistics
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
import yaml

from clipkit.checkpoint import save_checkpoint
from clipkit.data import create_tokenizer, iter_captions, write_shapes
from clipkit.model import create_model
from clipkit.predict import Predictor, load_embeddings
from clipkit.reports.page import write_report
from clipkit.reports.runs import find_runs, group_runs, read_run

VOID = {"meta", "img", "wbr", "br", "link", "input", "hr"}


class Page(html.parser.HTMLParser):
    """Checks that tags nest, and collects text, links and images."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.sources, self.text, self.tags = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two losses by two seeds; the first has a checkpoint. Metrics are made up, the model and its data are
    real.
    """
    root = tmp_path_factory.mktemp("runs")
    shards = write_shapes(root / "data", train=64, val=12, seed=0)
    tokenizer = create_tokenizer(
        {"name": "words", "context_length": 16}, captions=iter_captions(shards["train"])
    )
    torch.manual_seed(0)
    towers = {
        "embed_dim": 16,
        "image_tower": {"name": "timm", "model": "test_resnet", "image_size": 32},
        "text_tower": {"name": "transformer", "width": 32, "layers": 1, "heads": 2},
    }
    evals = {
        "retrieval": {"kind": "retrieval", "shards": shards["val"]},
        "geometry": {"kind": "geometry", "shards": shards["val"]},
        "zero_shot": {
            "kind": "zero_shot",
            "shards": shards["zeroshot"],
            "classes": "shapes",
            "templates": "shapes",
        },
    }
    for loss in ("infonce", "cyclic"):
        for seed in (0, 1):
            folder = root / "runs" / f"{loss}-{seed}"
            folder.mkdir(parents=True)
            config = {**towers, "loss": {loss: {"note": "<script>"}}, "seed": seed, "eval": evals}
            (folder / "config.yaml").write_text(yaml.safe_dump(config))
            lines = [{"step": step, "train/loss": 3.0 / step + seed} for step in (1, 2, 3)]
            for step in (2, 3):
                lines.append(
                    {
                        "step": step,
                        "eval/retrieval/text_to_image_R@1": 0.1 * step
                        + 0.01 * seed
                        + 0.2 * (loss == "cyclic"),
                        "eval/geometry/align_l2": 1.0 / step,
                        "eval/geometry/uniform_t": -float(step),
                    }
                )
            # Killed in the middle of a line.
            text = "\n".join(map(json.dumps, lines)) + '\n{"step": 4, "train/lo'
            (folder / "metrics.jsonl").write_text(text)
            if loss == "infonce" and seed == 0:
                model = create_model(towers, tokenizer=tokenizer)
                save_checkpoint(
                    folder / "checkpoints",
                    3,
                    config=config,
                    tokenizer=tokenizer,
                    train_state={},
                    weights={f"model.{name}": value for name, value in model.state_dict().items()},
                )
                (folder / "summary.json").write_text(json.dumps({"finished": True}))
    return root


def test_runs_that_differ_by_seed_are_one_group_with_mean_and_spread(runs):
    groups = group_runs(find_runs([runs / "runs"]))
    assert [(group.label, len(group.runs)) for group in groups] == [("cyclic", 2), ("infonce", 2)]
    mean, spread, count = groups[0].spread("retrieval/text_to_image_R@1")
    assert (mean, spread, count) == (pytest.approx(0.505), pytest.approx(statistics.stdev([0.5, 0.51])), 2)
    assert groups[1].mean_curve("train/loss") == [(1, 3.5), (2, 2.0), (3, 1.5)]
    assert read_run(runs / "runs" / "infonce-0").final["retrieval/text_to_image_R@1"] == pytest.approx(0.3)


def test_the_page_is_whole_self_contained_and_escaped(runs, tmp_path):
    given = {"title": "a < b", "queries": 3, "trust_paths": True}
    page = write_report([runs / "runs"], tmp_path / "report.html", **given).read_text()
    parsed = Page(page)
    assert parsed.sources and all(source.startswith("data:image/") for source in parsed.sources)
    assert not re.search("https?:", re.sub(r"data:image/[^\"]*", "", page))
    assert "<script" not in page and "&lt;script&gt;" in page and "a &lt; b" in page and "a < b" not in page
    text = " ".join(parsed.text)
    assert "0.5050 <small>± 0.0071" in page and "0.3050 <small>± 0.0071" in page
    assert 'class="best" title="2 runs">0.5050' in page
    # Dots of three metrics, curves of loss and of those, three trade-offs with uniform_t alone present, a
    # matrix, a plane, a confusion.
    assert parsed.tags.count("svg") == 3 + 1 + 3 + 1 + 3
    # Two runs of two groups, three metrics.
    assert page.count('r="3.2"') == 2 * 2 * 3
    assert "uniform_t against alignment" in text
    assert page.count("“") == 3 + 1 and "Confusion of 64 classes" in text
    # A caption's own image is framed, or stands last.
    assert page.count('class="true"><img') + page.count('alt="the true image"') == 3
    assert "No pictures: no checkpoint at" in text


def test_data_elsewhere_is_shown_where_the_user_trusts_the_runs(runs, tmp_path, monkeypatch):
    run = runs / "runs" / "infonce-0"
    page = write_report([run], tmp_path / "report.html", queries=1).read_text()
    assert "<img" not in page and "No pictures" in page and "--trust-paths" in page
    monkeypatch.chdir(runs)
    assert "<img" in write_report([run], tmp_path / "report.html", queries=1).read_text()


def test_a_report_needs_runs(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        write_report([tmp_path / "x"], tmp_path / "r.html")
    with pytest.raises(ValueError, match="no run under"):
        write_report([tmp_path], tmp_path / "r.html")


def test_the_commands_run_as_a_user_runs_them(runs, tmp_path, capsys, monkeypatch):
    from clipkit.recipes import predict, report

    monkeypatch.chdir(tmp_path)
    report.main([str(runs / "runs"), "--output", "r.html", "--no-models"])
    assert capsys.readouterr().out.startswith("r.html") and (tmp_path / "r.html").exists()
    pictures(runs, tmp_path / "pics", 4)
    model = str(runs / "runs" / "infonce-0")
    command = [
        sys.executable,
        "-m",
        "clipkit.recipes.predict",
        "search",
        model,
        "a red circle",
        "pics",
        "--top",
        "2",
        "--allow-skipped",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert len([json.loads(line) for line in done.stdout.splitlines()]) == 2
    assert "skipped pics/broken.jpg" in done.stderr
    predict.main(["embed", model, "--images", "pics", "--output", "e.npy", "--allow-skipped"])
    predict.main(["search", model, "a red circle", "e.npy", "--top", "2"])
    assert capsys.readouterr().out.splitlines()[1:] == done.stdout.splitlines()
    predict.main(["classify", model, "pics", "--labels", "shapes", "--templates", "a {}", "--allow-skipped"])
    assert len(capsys.readouterr().out.splitlines()) == 4
    for command, arguments in ((predict, ["search", "nowhere", "x", "pics"]), (report, ["nowhere"])):
        with pytest.raises(SystemExit, match="Error: .*nowhere"):
            command.main(arguments)


def pictures(runs, folder, count):
    """Some of the generated zero-shot images as files, and one that is broken."""
    folder.mkdir()
    with tarfile.open(next((runs / "data").rglob("zeroshot/*.tar"))) as tar:
        images = [member for member in tar if member.name.endswith((".jpg", ".png", ".webp"))][:count]
        for member in images:
            (folder / member.name).write_bytes(tar.extractfile(member).read())
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


def test_predictor_embeds_searches_and_classifies(runs, tmp_path):
    folder = pictures(runs, tmp_path / "pics", 5)
    predictor = Predictor(str(runs / "runs" / "infonce-0"), batch_size=2)
    keys, features = predictor.embed_images(folder)
    assert keys == sorted(keys) and len(keys) == 5 and features.shape == (5, 16)
    assert torch.allclose(features.norm(dim=1), torch.ones(5))
    assert list(predictor.skipped) == [str(folder / "broken.jpg")]
    query = predictor.embed_texts(["a red circle"])[0].tolist()
    cosines = {
        key: sum(a * b for a, b in zip(row.tolist(), query, strict=True))
        for key, row in zip(keys, features, strict=True)
    }
    expected = sorted(cosines, key=cosines.get, reverse=True)[:3]
    found = predictor.search("a red circle", keys, features, k=3)
    assert [key for key, _ in found] == expected
    assert found[0][1] == pytest.approx(cosines[expected[0]], abs=1e-6)

    scale, names = 10.0, ["red circle", "blue star", "green ring"]
    for key, labels in predictor.classify(folder, names, templates=["a {}"], k=3, logit_scale=scale):
        logits = scale * features[keys.index(key)] @ predictor.embed_texts([f"a {name}" for name in names]).T
        probability = dict(zip(names, logits.softmax(0).tolist(), strict=True))
        assert dict(labels) == pytest.approx(probability, abs=1e-5)
        assert [p for _, p in labels] == sorted((p for _, p in labels), reverse=True)

    with pytest.raises(ValueError, match="there is no image or folder"):
        predictor.embed_images(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image could be read"):
        predictor.embed_images(tmp_path / "empty")


def test_embeddings_are_written_and_read_back(runs, tmp_path):
    from clipkit.predict import save_embeddings

    features = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    save_embeddings(tmp_path / "out" / "e.npy", ["a", "b", "c"], features)
    keys, back = load_embeddings(tmp_path / "out" / "e.npy")
    assert keys == ["a", "b", "c"] and torch.equal(back, features)
    assert np.load(tmp_path / "out" / "e.npy").shape == (3, 4)
    with pytest.raises(ValueError, match=r"\.npy or \.parquet file; got 'e.csv'"):
        save_embeddings(tmp_path / "e.csv", keys, features)
    with pytest.raises(ValueError, match="no file of embeddings"):
        load_embeddings(tmp_path / "none.npy")


def test_parquet(tmp_path):
    pytest.importorskip("pyarrow", reason="pip install pyarrow")
    from clipkit.predict import save_embeddings

    features = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    save_embeddings(tmp_path / "e.parquet", ["a", "b", "c"], features)
    keys, back = load_embeddings(tmp_path / "e.parquet")
    assert keys == ["a", "b", "c"] and torch.equal(back, features)


def test_a_checkpoint_of_another_architecture_is_named(runs, tmp_path):
    from clipkit.checkpoint import load_checkpoint
    from clipkit.data import load_tokenizer
    from clipkit.evals import load_any

    step = next((runs / "runs" / "infonce-0" / "checkpoints").glob("step_*"))
    saved = load_checkpoint(step)
    config = {**saved["config"], "embed_dim": 24}
    path = save_checkpoint(
        tmp_path,
        3,
        config=config,
        tokenizer=load_tokenizer(step / "tokenizer.json"),
        train_state={},
        weights=saved["weights"],
    )
    with pytest.raises(
        ValueError, match=f"(?s)the weights of {path} do not fit the architecture.*projection"
    ):
        load_any(str(path))
    (path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="model.safetensors"):
        load_any(str(path))


def test_the_table_shows_items_intervals_and_chance(tmp_path):
    """One run: its interval. Two: their deviation instead. What is no such file is a run left out, with a reason."""
    for seed in (0, 1):
        folder = tmp_path / "runs" / f"a-{seed}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump({"seed": seed, "loss": {"infonce": None}}))
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 3, "eval/zs/top1": 0.5 + seed / 10}) + "\n")
        score = {"value": 0.5, "n": 731, "interval": [0.4321, 0.5678], "chance": 0.0625, "tied": 2}
        about = {"step": 3, "scores": {"zs/top1": score, "zs/x": {**score, "interval": [1]}}, "records": {}}
        (folder / "evaluation.json").write_text(json.dumps(about))
    one = write_report([tmp_path / "runs" / "a-0"], tmp_path / "one.html").read_text()
    assert "[0.4321, 0.5678]" in one and "731 items" in one and "<td>0.0625</td>" in one
    both = write_report([tmp_path / "runs"], tmp_path / "both.html").read_text()
    assert "[0.4321" not in both and "<td>0.0625</td>" in both
    for broken in ('{"scores": 3}', '{"scores": {"zs/top1": {"chance": "x"}}}', "{"):
        (tmp_path / "runs" / "a-0" / "evaluation.json").write_text(broken)
        write_report([tmp_path / "runs"], tmp_path / "left.html")
        assert "evaluation.json" in (tmp_path / "left.html").read_text()
