"""The data settings: what conf/data says is what the package takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from clipkit.data.spec import DATA_DEFAULTS, complete, resolve_data, sources

CONF = Path(__file__).resolve().parents[2] / "conf" / "data"


def test_every_file_is_accepted_and_the_first_explains_every_key():
    files = sorted(CONF.glob("*.yaml"))
    assert [file.stem for file in files] == [
        "cc3m",
        "flickr8k_mini",
        "flickr8k_nli_mini",
        "shapes",
        "shards",
        "table",
    ]
    for file in files:
        given = yaml.safe_load(file.read_text())
        given.pop("defaults", None)
        complete(given)
    assert set(yaml.safe_load((CONF / "shapes.yaml").read_text())) == set(DATA_DEFAULTS) - {"root"}
    for line in (CONF / "shapes.yaml").read_text().splitlines():
        key = line.partition(":")[0]
        if key in DATA_DEFAULTS and key not in ("train", "augmentation", "tokenizer"):
            assert "#" in line, f"{key} has no explanation beside it"


def test_defaults_are_filled_in_and_augmentation_is_merged():
    full = complete({"train": "x.tar", "augmentation": {"flip": 0.5}})
    assert full["augmentation"] == {**DATA_DEFAULTS["augmentation"], "flip": 0.5}
    assert full["window"] == DATA_DEFAULTS["window"] and DATA_DEFAULTS["augmentation"]["flip"] == 0.0


def test_sources_take_every_way_of_writing_them():
    assert sources("a.tar") == [{"name": "train", "shards": "a.tar", "weight": None}]
    assert sources(["a.tar", "b.tar"]) == [{"name": "train", "shards": ["a.tar", "b.tar"], "weight": None}]
    assert sources([{"shards": "a.tar", "weight": 2}, {"name": "b", "shards": "b.tar", "weight": 1}]) == [
        {"name": "source0", "shards": "a.tar", "weight": 2},
        {"name": "b", "shards": "b.tar", "weight": 1},
    ]
    with pytest.raises(ValueError, match="names of data.train's sources repeat"):
        sources([{"name": "a", "shards": "a.tar"}, {"name": "a", "shards": "b.tar"}])


def test_resolving_shards_changes_nothing_on_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_data({"train": "a.tar"})["train"] == "a.tar" and list(tmp_path.iterdir()) == []
