"""Run folders from anybody in a report: broken ones are left out and said, and nothing of one is live or leaks."""

from __future__ import annotations

import csv
import html.parser
import io
import json
import math
import os
import random
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from clipkit.command.jobs import Job, Records
from clipkit.foreign import BrokenFile
from clipkit.recipes import report, sweep
from clipkit.reports.charts import DotRow, Series, dot_chart, line_chart
from clipkit.reports.comparison import compare, csv_table, markdown_tables
from clipkit.reports.findings import UNTOLD, paired
from clipkit.reports.page import write_report
from clipkit.reports.runs import POINTS, find_runs, group_runs, read_run
from clipkit.reports.spread import deviation, mean
from tests.damage import nest

SECRET = "hunter2-of-another-file"
ALIASES = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 5)
)


def run_folder(folder: Path, *, lines=None, config=None, summary=None) -> Path:
    """A finished run of two steps with a number or two."""
    folder.mkdir(parents=True)
    lines = lines or [{"step": step, "train/loss": 1.0 / step, "eval/zs/top1": 0.1 * step} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {"seed": 0, "batch_size": 8, "loss": {"infonce": {}}, "eval": {}} if config is None else config
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "summary.json").write_text(json.dumps(summary or {"finished": True, "step": 2}))
    return folder


def replaced(name: str, content: str | bytes):
    def change(folder: Path, outside: Path) -> None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def fifo(name: str):
    def change(folder: Path, outside: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def link_out(name: str):
    def change(folder: Path, outside: Path) -> None:
        (folder / name).rename(outside / name)
        (outside / name).write_text((outside / name).read_text().replace("infonce", SECRET))
        (folder / name).symlink_to(outside / name)

    return change


def unreadable(name: str):
    def change(folder: Path, outside: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(name)

    return change


BROKEN = {
    "settings empty": replaced("config.yaml", ""),
    "settings a list": replaced("config.yaml", f"- {SECRET}"),
    "settings binary": replaced("config.yaml", bytes(range(256))),
    "settings a python object": replaced("config.yaml", "a: !!python/object/apply:os.system ['touch canary']"),
    "settings of aliases": replaced("config.yaml", ALIASES),
    "settings with a long number": replaced("config.yaml", "a: 0x" + "f" * 5000),
    "settings with a text as loss": replaced("config.yaml", f"loss: {SECRET}"),
    "settings with a list as a task": replaced("config.yaml", f"eval: {{a: [{SECRET}]}}"),
    "settings with a list as seed": replaced("config.yaml", f"seed: [{SECRET}]"),
    "settings a FIFO": fifo("config.yaml"),
    "settings elsewhere": link_out("config.yaml"),
    "settings a loop": unreadable("config.yaml"),
    "metrics binary": replaced("metrics.jsonl", b"\xff\xfe\x00" * 99),
    "metrics without a line": replaced("metrics.jsonl", f"{SECRET}\n[1]\n"),
    "metrics a FIFO": fifo("metrics.jsonl"),
    "metrics elsewhere": link_out("metrics.jsonl"),
    "metrics of very many lines": replaced("metrics.jsonl", "\n" * 600_000),
    "summary a list": replaced("summary.json", f'["{SECRET}"]'),
    "summary nested": replaced("summary.json", "[" * 100_000),
    "summary of another shape": replaced("summary.json", f'{{"finished": "{SECRET}"}}'),
    "summary with a step beyond all": replaced("summary.json", '{"finished": true, "step": 1e999}'),
    "summary a FIFO": fifo("summary.json"),
    "summary elsewhere": link_out("summary.json"),
}  # fmt: skip


@pytest.fixture
def outside(tmp_path) -> Path:
    (tmp_path / "outside").mkdir()
    return tmp_path / "outside"


def test_broken_runs_are_left_out_with_their_reasons(tmp_path, outside, capsys):
    runs = tmp_path / "runs"
    run_folder(runs / "good")
    for kind, change in BROKEN.items():
        change(run_folder(runs / kind.replace(" ", "-")), outside)
    page = write_report([runs], tmp_path / "r.html", models=False).read_text()
    told = capsys.readouterr().err
    sweep.main(["--table", str(runs), "--output", str(tmp_path / "c")])
    printed, again = capsys.readouterr()
    texts = {"page": page, "standard error": told, "printed": printed, "again": again}
    texts |= {suffix: (tmp_path / f"c.{suffix}").read_text() for suffix in ("md", "csv", "json", "html")}
    for kind in BROKEN:
        path = str(runs / kind.replace(" ", "-"))
        for name, text in texts.items():
            (line,) = [line for line in re.split(r"\n|<p", text) if f"{path}/" in line]
            assert name and len(line) < 1000 + len(path), (name, line)
    for name, text in texts.items():
        assert SECRET not in text and "Traceback" not in text, name
    assert (
        "infonce" in page
        and "0.2000" in texts["md"]
        and len(json.loads(texts["json"])["left_out"]) == len(BROKEN)
    )
    assert not list(tmp_path.rglob("canary"))


def test_nothing_but_broken_runs_is_an_error_that_names_them(tmp_path, outside):
    for kind in list(BROKEN)[:6]:
        BROKEN[kind](run_folder(tmp_path / "runs" / kind), outside)
    with pytest.raises(ValueError, match=r"no run could be read: .*config.yaml.*; \.\.\.$"):
        write_report([tmp_path / "runs"], tmp_path / "r.html", models=False)
    with pytest.raises(SystemExit, match="Error: no run could be read"):
        report.main([str(tmp_path / "runs"), "--no-models"])
    with pytest.raises(SystemExit):
        sweep.main(["--table", str(tmp_path / "runs")])


def test_links_out_of_a_run_are_followed_where_the_user_says_so(tmp_path, outside):
    folder = run_folder(tmp_path / "run")
    link_out("config.yaml")(folder, outside)
    with pytest.raises(BrokenFile, match="leads out of the run folder"):
        read_run(folder)
    assert SECRET in read_run(folder, trust_paths=True).config["loss"]


def test_numbers_that_no_float_holds_are_shown_and_not_drawn(tmp_path, capsys):
    odd = [1e999, -1e999, math.nan, 10**400, 1e308, -1e308, 5e-324, True, "1", [1], {"a": 1}, None, 10**4000]
    names = [f"eval/zs/{i}" for i in range(len(odd))]
    for seed in range(3):
        line = {"step": 3, **dict(zip(names, odd[seed:] + odd[:seed], strict=True))}
        lines = [
            {"step": 1, "train/loss": 1.0},
            {"step": 2, "train/loss": 1e300},
            {"step": True},
            {"step": 1e999},
            line,
        ]
        run_folder(tmp_path / "runs" / str(seed), lines=lines, config={"seed": seed})
        run_folder(tmp_path / "runs" / f"b{seed}", lines=lines, config={"seed": seed, "lr": math.inf})
    page = write_report([tmp_path / "runs"], tmp_path / "r.html", models=False).read_text()
    sweep.main(["--table", str(tmp_path / "runs"), "--output", str(tmp_path / "c"), "--order", "zs/1"])
    assert "inf" in page and "nan" in capsys.readouterr().out
    drawn = re.findall(r'(?:points|cx|cy|x1|x2|y1|y2|x|y|width)="([^"]*)"', page)
    assert drawn and not any("inf" in one or "nan" in one or "e+" in one for one in drawn)
    told = json.loads((tmp_path / "c.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    values = told["groups"][0]["metrics"]["zs/4"]["values"]
    assert values == [1e308, -1e308, 5e-324] and told["groups"][0]["metrics"]["zs/0"]["mean"] is None
    (group, _) = group_runs(find_runs([tmp_path / "runs"]))
    assert group.runs[0].final["zs/3"] == math.inf and "zs/7" not in group.runs[0].final
    assert dict(group.mean_curve("train/loss")) == {1: 1.0, 2: 1e300}


def test_means_and_deviations_raise_for_no_numbers():
    rng = random.Random(0)
    pool = [1e308, -1e308, 1.7e308, 0.0, -0.0, 5e-324, math.inf, -math.inf, math.nan, 1.0, 1e150]
    for _ in range(2000):
        values = rng.choices(pool, k=rng.randint(1, 5))
        for found in (mean(values), deviation(values)):
            assert found is None or isinstance(found, float)
        told = paired(dict(enumerate(values)), dict(enumerate(rng.choices(pool, k=len(values)))))
        assert told.verdict(1) == UNTOLD or all(map(math.isfinite, told.values))
        rows = [DotRow("a", "#000", values)]
        for chart in (
            dot_chart("t", rows),
            line_chart("t", [Series([(v, v) for v in values], "#000")], x_label="x"),
        ):
            assert "nan" not in chart and "inf" not in chart
    assert (
        mean([1.0, 2.0]) == 1.5
        and deviation([1.0]) is None
        and deviation([1.0, 3.0]) == pytest.approx(2**0.5)
    )


def test_a_run_of_very_many_metrics_and_points_is_bounded(tmp_path, capsys):
    lines = [{"step": 1, **{f"train/{i}": 1.0 for i in range(3000)}, "train/" + "x" * 300: 1.0}]
    run_folder(tmp_path / "wide", lines=lines)
    run = read_run(tmp_path / "wide")
    assert len(run.curves) == 1000 and "the first 1000 metrics" in run.note
    run_folder(tmp_path / "long", lines=[{"step": s, "train/loss": s / 7} for s in range(20_001)])
    curve = read_run(tmp_path / "long").curve("train/loss")
    assert (
        POINTS // 2 <= len(curve) <= POINTS + 1 and curve[0] == (0, 0.0) and curve[-1] == (20_000, 20_000 / 7)
    )
    assert all(value == step / 7 for step, value in curve)
    run_folder(tmp_path / "shorter", lines=[{"step": s, "train/loss": 1.0} for s in range(5_000)])
    (group,) = group_runs(find_runs([tmp_path / "long", tmp_path / "shorter"]))
    assert len(group.mean_curve("train/loss")) > 300
    page = write_report([tmp_path], tmp_path / "r.html", models=False).read_text()
    assert len(page) < 2_000_000 and "the first 1000 metrics" in page
    longest = max(len(points.split()) for points in re.findall(r'points="([^"]*)"', page))
    assert 300 < longest <= POINTS


def test_a_name_of_every_kind_of_character_is_one_line_of_text(tmp_path, capsys):
    names = ["a\x1b]0;x\x07", "a\nb", "\u202eabc", "\x00", "=1+1", "|", "`x`", "[a](javascript:x)"]
    lines = [{"step": 1, **{f"eval/zs/{name}": 1.0 for name in names}}]
    run_folder(tmp_path / "runs" / "a", lines=lines, config={"seed": 0, "x": "\x1b\n"})
    run_folder(tmp_path / "runs" / "b", lines=lines, config={"seed": 0, "x": "=1"})
    write_report([tmp_path / "runs"], tmp_path / "r.html", models=False)
    sweep.main(["--table", str(tmp_path / "runs"), "--output", str(tmp_path / "c")])
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", capsys.readouterr().out)
    groups = compare([tmp_path / "runs"])
    table = markdown_tables(groups)
    assert len(table.splitlines()) == 4 and "[a](" not in re.sub(r"\\.", "", table)
    cells = [cell for row in csv.reader(io.StringIO(csv_table(groups))) for cell in row[:2]]
    assert not any(cell.startswith(("=", "+", "-", "@")) for cell in cells)


def test_no_credential_of_a_run_is_shown(tmp_path, capsys):
    url = "https://user:k3y-1@host/{0..3}.tar?sig=k3y-2#k3y-3"
    for i in (0, 1):
        config = {
            "seed": 0, "lr": i, "data": {"train": [url + str(i), f"pipe:curl -H 'Bearer k3y-4' {url}"], "note": f"see {url}{i}"},
            "logger": {"wandb": {"api_key": f"k3y-5{i}", "password": "k3y-6"}}, "eval": {"a": {"kind": "sts", "shards": url}},
            "loss": {"infonce": {"x": f"PIPE:cat k3y-7{i}"}},
        }  # fmt: skip
        run_folder(tmp_path / "runs" / str(i), config=config)
    (run_folder(tmp_path / "runs" / "study") / "config.yaml").write_text(yaml.safe_dump({"loss": url}))
    write_report([tmp_path / "runs"], tmp_path / "r.html")
    sweep.main(["--table", str(tmp_path / "runs"), "--output", str(tmp_path / "c")])
    told = "".join(capsys.readouterr())
    for text in (told, *(path.read_text() for path in tmp_path.glob("*.*"))):
        assert "k3y" not in text
    assert "https://host/{0..3}.tar?..." in (tmp_path / "r.html").read_text()


class Elements(html.parser.HTMLParser):
    """Every element with its attributes' names, and the values of those that a browser acts on."""

    def __init__(self, page: str):
        super().__init__()
        self.shape, self.acting = [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.shape.append((tag, tuple(name for name, _ in attributes)))
        self.acting += [
            value for name, value in attributes if name in ("href", "src", "style", "class", "http-equiv")
        ]


ATTACKS = [
    '"><script>alert(1)</script>', "' onload='alert(1)", "</style><script>alert(1)</script>", "javascript:alert(1)",
    "</title><img src=x onerror=alert(1)>", "--><svg/onload=alert(1)>", "&lt;script&gt;", "]]><a xlink:href=javascript:x>",
    "<!--", "${7*7}{{7*7}}", "red;background:url(http://x/)", "<wbr><b>_</b>/+",
]  # fmt: skip


def page_of(folder: Path, texts: list[str]) -> str:
    """A page in which every text that a run can bring is one of these."""
    at = iter(texts * 100)
    for seed in (0, 1):
        for loss in (0, 1):
            task, metric = f"t{next(at)}", f"m{next(at)}"
            finals = {
                f"eval/{task}/{metric}": seed / 2,
                f"eval/{task}/align_l2": 1.0,
                f"eval/{task}/uniform_t": 1.0,
            }
            lines = [{"step": s, f"train/{next(at)}": 0.5, **finals} for s in (1, 2)]
            config = {
                "seed": seed, next(at): next(at), "eval": {next(at): {"kind": next(at), next(at): [next(at)]}},
                "loss": {texts[0]: {"x": loss, "y": texts[-1]}},
            }  # fmt: skip
            name = texts[0].replace("/", "∕")
            run_folder(
                folder / f"{loss}{seed}{name}",
                lines=lines,
                config=config,
                summary={"finished": loss == 0, "versions": {next(at): next(at)}},
            )
    broken = run_folder(folder / f"broken {texts[0].replace('/', '∕')}")
    (broken / "config.yaml").write_text(yaml.safe_dump({"loss": texts[0]}))
    return write_report([folder], folder / "r.html", title=texts[0]).read_text()


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_element_or_attribute_of_the_page_comes_from_a_run(attack, tmp_path, capsys):
    harmless = Elements(page_of(tmp_path / "a", [f"x{i}" for i in range(40)]))
    live = Elements(page_of(tmp_path / "b", [f"{attack}{i}" for i in range(40)]))
    count = lambda page: {one: page.shape.count(one) for one in page.shape if one[0] != "wbr"}
    assert count(live) == count(harmless)
    assert {*live.acting} <= {*harmless.acting}


def test_the_page_lets_no_browser_run_or_fetch_anything(tmp_path):
    page = page_of(tmp_path, ["x"])
    policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', page)
    assert page.index(policy[0]) < page.index("<title>") < page.index("<style>")
    assert policy[1].startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")


def test_runs_are_found_past_loops_FIFOs_and_depth(tmp_path):
    run_folder(tmp_path / "a" / "run")
    (tmp_path / "a" / "loop").symlink_to("..")
    (tmp_path / "a" / "run" / "self").symlink_to(".")
    os.mkfifo(tmp_path / "a" / "fifo")
    nest(tmp_path / "a", 1100)
    assert [run.path for run in find_runs([tmp_path / "a", tmp_path / "a" / "loop" / "a"])] == [
        tmp_path / "a" / "run"
    ]
    # pytest's own removal goes no deeper than Python's recursion.
    subprocess.run(["rm", "-rf", tmp_path / "a" / "d"], check=True)


def test_a_sweeps_broken_record_is_a_job_that_never_began(tmp_path, capsys):
    records = Records(tmp_path)
    good = Job(["seed=0"], "finished", str(tmp_path / "runs" / "0"))
    records.write(good)
    for name, text in {
        "a": "",
        "b": "[" * 9999,
        "c": '{"overrides": 5}',
        "d": '{"state": "finished"}',
        "e": "[]",
    }.items():
        (tmp_path / f"{name}.json").write_text(text)
    os.mkfifo(tmp_path / "f.json")
    assert records.read([["seed=0"], ["seed=1"]]) == [good, Job(["seed=1"])]
    told = capsys.readouterr().err
    assert all(str(tmp_path / f"{name}.json") in told for name in "abcdef")
