"""The study's table and findings on hand-made run folders, its arms, and its experiments cut down to two
steps.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml

from clipkit.command import compose, jobs, processes
from clipkit.recipes import study
from clipkit.reports import study as findings_of
from clipkit.reports.comparison import compare
from clipkit.reports.findings import (
    OPPOSITE,
    SHOWS,
    UNTOLD,
    difference,
    paired,
    paired_gains,
    t_cumulative,
    t_quantile,
)
from tests.recipes.runs import lines, run

TERMS = {
    "CLIP": [],
    "CLIP + L_s": ["simcse"],
    "CLIP + L_n": ["nli_contrastive"],
    "CLIP + L_s + L_n": ["simcse", "nli_contrastive"],
    "CyCLIP": ["cyclic"],
    "CyCLIP + L_s": ["cyclic", "simcse"],
    "CyCLIP + L_n": ["cyclic", "nli_contrastive"],
    "CyCLIP + L_s + L_n": ["cyclic", "simcse", "nli_contrastive"],
}
EVALS = {
    "geometry": {"kind": "geometry"},
    "retrieval": {"kind": "retrieval"},
    "cifar10": {"kind": "zero_shot"},
    "sts": {"kind": "sts"},
    "senteval": {"kind": "senteval"},
}
# What seeds 0, 1 and 2 add to every arm alike: large, and gone once runs are paired by seed.
SEEDS = (0.0, 5.0, -3.0)
# What they add to one arm: a spread of their own.
OWN = (-0.01, 0.0, 0.01)


def test_students_t_is_that_of_the_tables():
    """scipy.stats.t, and the closed forms of one and two degrees of freedom."""
    stats = pytest.importorskip("scipy.stats")
    for df in (1, 2, 3, 4, 5, 9, 30, 200):
        assert t_quantile(df) == pytest.approx(stats.t.ppf(0.975, df), rel=1e-9)
        for t in (0.0, 0.3, 2.0, 7.5):
            assert t_cumulative(t, df) == pytest.approx(stats.t.cdf(t, df), abs=1e-12)
    assert t_quantile(1, 0.9) == pytest.approx(math.tan(math.pi * 0.4)) and round(t_quantile(2), 3) == 4.303
    with pytest.raises(ValueError, match="1 degree of freedom"):
        t_cumulative(1.0, 0)
    with pytest.raises(ValueError, match="above 0.5"):
        t_quantile(3, 0.4)


def test_a_paired_difference_is_the_one_worked_out_by_hand():
    """Differences 1, 2 and 3: mean 2, s 1, standard error 1/sqrt(3), interval 2 -+ 4.302653 / sqrt(3) =
    -0.48414 to 4.48414.
    """
    found = paired({0: 11.0, 1: 7.0, 2: 4.0, 9: 1.0}, {0: 10.0, 1: 5.0, 2: 1.0})
    assert found.values == (1.0, 2.0, 3.0) and found.mean == 2.0
    assert (found.standard_error, found.low, found.high) == pytest.approx(
        (3**-0.5, -0.48414, 4.48414), abs=1e-5
    )
    assert found.verdict(1) == found.verdict(-1) == UNTOLD
    assert (
        difference([1.9, 2.0, 2.1]).verdict(1) == SHOWS
        and difference([1.9, 2.0, 2.1]).verdict(-1) == OPPOSITE
    )
    assert difference([-1.9, -2.0, -2.1]).verdict(-1) == SHOWS and difference([0.0, 0.0]).verdict(1) == UNTOLD
    alone = difference([7.0])
    assert (
        alone.low is None
        and alone.verdict(1) == UNTOLD
        and difference([]) is None
        and paired({0: 1.0}, {1: 1.0}) is None
    )
    assert paired_gains({0: 5.0, 1: 5.0}, {0: 1.0, 1: 2.0}, {0: 3.0, 1: 3.0}, {0: 2.0, 1: 1.0}).values == (
        3.0,
        1.0,
    )


def numbers(arm: str, seed: int) -> dict[str, float]:
    """An arm's numbers: what the published findings say, of known size, where the comments do not say
    otherwise.
    """
    own = OWN[seed] * (1 + len(TERMS[arm]))
    s, n, cyclic = ("L_s" in arm), ("L_n" in arm), arm.startswith("CyCLIP")
    found = {
        "geometry/uniform_t": SEEDS[seed] - 1.0 * s + own,
        "geometry/align_l2": SEEDS[seed] + 0.5 * s + own,
        # L_s hurts retrieval by 0.2 for CLIP, and helps CyCLIP by 0.4: the opposite, then as published.
        **{
            f"retrieval/{name}": SEEDS[seed] + s * (0.4 if cyclic else -0.2) + 0.3 * n * cyclic + own
            for name in findings_of.RECALLS
        },
        # Smaller than its spread over seeds.
        "cifar10/top1": SEEDS[seed] + 0.005 * s + own,
        "sts/average": 40 + SEEDS[seed] + 6 * n + 2 * n * cyclic + own,
        "senteval/average": 60 + SEEDS[seed] - 1 * n + own,
    }
    return found


def runs_under(root: Path, *, seeds=(0, 1, 2), arms=tuple(TERMS), **settings) -> Path:
    for arm in arms:
        for seed in seeds:
            folder = root / f"{arm.replace(' ', '')}-{seed}"
            folder.mkdir(parents=True)
            loss = {name: {"weight": 1.0} for name in ("infonce", *TERMS[arm])}
            config = {"seed": seed, "batch_size": 8, "eval": EVALS, "loss": loss, **settings}
            (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
            line = {"step": 9, **{f"eval/{name}": value for name, value in numbers(arm, seed).items()}}
            (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
            (folder / "summary.json").write_text(json.dumps({"finished": True, "step": 9}))
    return root


def verdicts(written: Path) -> dict[tuple[str, str, str], str]:
    """{(finding, arm, claim): verdict} of a study.json."""
    return {
        (f["finding"], f["arm"], f["text"]): f["verdict"] for f in json.loads(written.read_text())["findings"]
    }


def test_findings_show_oppose_or_cannot_be_told(tmp_path, capsys):
    study.main(["--table", str(runs_under(tmp_path / "runs")), "--output", str(tmp_path / "study")])
    found = verdicts(tmp_path / "study.json")
    recall = "retrieval: mean recall"
    for base in ("CLIP", "CyCLIP"):
        plain, unsupervised, supervised = base, f"{base} + L_s against {base}", f"{base} + L_n against {base}"
        assert found["a", unsupervised, "geometry: uniform_t falls"] == SHOWS, plain
        assert found["a", unsupervised, "geometry: align_l2 rises"] == SHOWS
        assert found["a", unsupervised, "cifar10: top-1 rises"] == UNTOLD
        assert found["b", supervised, "sts: average rises"] == SHOWS
        assert found["b", supervised, "senteval: average rises"] == OPPOSITE
    assert found["a", "CLIP + L_s against CLIP", f"{recall} rises"] == OPPOSITE
    assert found["a", "CyCLIP + L_s against CyCLIP", f"{recall} rises"] == SHOWS
    assert found["b", "CLIP + L_n against CLIP", f"{recall} does not rise"] == UNTOLD
    assert found["b", "CyCLIP + L_n against CyCLIP", f"{recall} does not rise"] == OPPOSITE
    assert found["c", "L_s: CyCLIP against CLIP", f"{recall} gains more"] == SHOWS
    assert found["c", "L_n: CyCLIP against CLIP", "sts: average gains more"] == SHOWS
    assert found["c", "L_n: CyCLIP against CLIP", "senteval: average gains more"] == UNTOLD
    # The one number in full: differences -1 + own, so -1.01, -1 and -0.99; t * 0.01 / sqrt(3) = 0.02484.
    (claim,) = [
        f
        for f in json.loads((tmp_path / "study.json").read_text())["findings"]
        if (f["arm"], f["text"]) == ("CLIP + L_s against CLIP", "geometry: uniform_t falls")
    ]
    assert claim["difference"]["mean"] == pytest.approx(-1.0)
    assert (claim["difference"]["low"], claim["difference"]["high"]) == pytest.approx(
        (-1.02484, -0.97516), abs=1e-5
    )
    text, page = (tmp_path / "study.md").read_text(), (tmp_path / "study.html").read_text()
    assert (
        "| shows | geometry: uniform_t falls | CLIP + L_s against CLIP | -1.0000 | -1.0248 to -0.9752 | 3 |"
        in text
    )
    assert "24 finished runs of 8 arms, seeds 0, 1, 2" in text and "<td>-1.0248 to -0.9752</td>" in page
    assert (
        text.index("| CyCLIP |") > text.index("| CLIP + L_s + L_n |")
        and "of 8 parts" in capsys.readouterr().out
    )


def test_one_seed_tells_nothing_and_a_missing_arm_is_left_out(tmp_path):
    study.main(["--table", str(runs_under(tmp_path / "runs", seeds=(1,), arms=("CLIP", "CLIP + L_s")))])
    found = verdicts(tmp_path / "runs" / "study.json")
    assert set(found.values()) == {UNTOLD} and {finding for finding, _, _ in found} == {"a"}
    assert "not asked: the runs it compares are not there" in (tmp_path / "runs" / "study.md").read_text()


def test_runs_that_are_no_study_are_refused(tmp_path):
    mixed = runs_under(tmp_path / "mixed", arms=("CLIP",))
    runs_under(mixed / "more", arms=("CLIP + L_s",), batch_size=16)
    with pytest.raises(SystemExit):
        study.main(["--table", str(mixed)])
    groups = compare([mixed])
    with pytest.raises(ValueError, match="differ by more than the loss: batch_size: 8 and 16"):
        findings_of.labelled(groups)
    twice = runs_under(tmp_path / "twice", arms=("CLIP",))
    runs_under(twice / "again", arms=("CLIP",), seeds=(1,))
    with pytest.raises(ValueError, match="CLIP has seed 1 twice"):
        findings_of.labelled(compare([twice]))
    runs_under(tmp_path / "lr", arms=("CLIP",), lr=0.1)
    runs_under(tmp_path / "lr" / "more", arms=("CLIP",), lr=0.2)
    with pytest.raises(ValueError, match="CLIP has runs of different settings"):
        findings_of.labelled(compare([tmp_path / "lr"]))


def test_the_study_runs_eight_arms_a_seed_and_finds_their_folders():
    """The folders are those of `clipkit-pretrain experiment=study_mini loss=... seed=S`, however many threads
    and wherever.
    """
    planned = study.arms("study_mini", [0, 1], ["logger=none"])
    losses = [next(entry for entry in job if entry.startswith("loss=")) for job in planned]
    assert losses[:8] == [
        "loss=clip",
        "loss=cyclip",
        "loss=[clip,simcse]",
        "loss=[cyclip,simcse]",
        "loss=[clip,nli_contrastive]",
        "loss=[cyclip,nli_contrastive]",
        "loss=[clip,simcse,nli_contrastive]",
        "loss=[cyclip,simcse,nli_contrastive]",
    ]
    assert (
        losses[8:] == losses[:8]
        and all("seed=0" in job for job in planned[:8])
        and all("seed=1" in job for job in planned[8:])
    )
    compose.register_resolvers()
    compose.start_hydra()
    found = [Path(job.run_dir) for job in processes.plan(planned[:2], threads=1)]
    assert found == [
        Path.cwd() / "runs" / compose.run_name(f"experiment=study_mini,loss={loss},seed=0")
        for loss in ("clip", "cyclip")
    ]
    with pytest.raises(ValueError, match="sets loss, seed and experiment itself"):
        study.arms("study_mini", [0], ["loss=clip"])
    with pytest.raises(ValueError, match="whole numbers"):
        study.seeds("0;1")
    with pytest.raises(ValueError, match="twice"):
        study.seeds("0,0")


CUT_DOWN = {
    "study_mini": ["text_tower.width=64", "text_tower.layers=1", "text_tower.heads=2"],
    "study_cc3m": [
        "image_tower=timm",
        "image_tower.model=test_resnet",
        "image_tower.image_size=32",
        "text_tower.width=64",
        "text_tower.layers=1",
        "text_tower.heads=2",
        "embed_dim=32",
        "precision=fp32",
        "data.num_workers=0",
    ],
}


@pytest.mark.parametrize("experiment", ["study_mini", pytest.param("study_cc3m", marks=pytest.mark.slow)])
def test_every_arm_takes_two_steps(tmp_path, test_data, experiment):
    shards, sentences = test_data("flickr8k-mini/train"), test_data("nli-mini/triplets.jsonl")
    losses = [
        entry.removeprefix("loss=")
        for job in study.arms(experiment, [0], [])
        for entry in job
        if entry.startswith("loss=")
    ]
    output = run(
        "-m",
        f"experiment={experiment}",
        f"loss={','.join(losses)}",
        *CUT_DOWN[experiment],
        f"data.train={shards}/000000.tar",
        f"data.sentences.triplets={sentences}",
        "data.sentences.batch_size=8",
        "batch_size=8",
        "epochs=null",
        "steps=2",
        "warmup_steps=1",
        "eval=none",
        "final_eval=[]",
        "logger=none",
        "log_every=1",
        "num_threads=1",
        f"output_dir={tmp_path}",
    )
    assert "8 of 8 jobs finished." in output
    terms = set()
    for record in tmp_path.rglob("metrics.jsonl"):
        first, second = lines(record.parent)
        assert all(0 < line["train/loss"] < 100 for line in (first, second))
        terms.add(
            frozenset(key.removeprefix("train/") for key in first)
            & {"infonce", "cyclic", "simcse", "nli_contrastive"}
        )
    assert terms == {frozenset({"infonce", *names}) for names in TERMS.values()}


def test_the_cc3m_study_differs_from_the_published_settings_by_its_dropout_and_evaluation_alone():
    compose.register_resolvers()
    compose.start_hydra()
    ours, published = (
        compose.compose("pretrain", [f"experiment={name}"]) for name in ("study_cc3m", "cyclip_rn50_cc3m")
    )
    changed = {
        key for key in published if key not in ("hydra", "eval", "loss") and ours[key] != published[key]
    }
    assert changed == {"text_tower", "data", "final_eval"}
    assert (ours.text_tower.dropout, published.text_tower.dropout) == (0.1, 0.0)
    assert (
        jobs.distinct(jobs.Job(["a=1", "b=2"]), [jobs.Job(["a=1", "b=2"]), jobs.Job(["a=1", "b=3"])]) == "b=2"
    )
