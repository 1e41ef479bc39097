"""A page about some runs: one HTML file that holds everything it shows.

`write_report(runs, output)` reads what the run folders hold; what needs the model (gallery, confusion,
similarities) comes from clipkit.reports.pictures and is left out where a run has no checkpoint or its data is
gone, with the reason on the page.

A run folder may come from anybody: each of its texts is escaped, its settings are shown without credentials, and the
page tells the browser to run nothing and to fetch nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from typing import Any

from clipkit.files import write_text
from clipkit.foreign import readable
from clipkit.reports.charts import PALETTE, DotRow, Series, dot_chart, line_chart
from clipkit.reports.runs import POINTS, Group, find_runs, group_runs, metric_names, public_settings

# Metrics of which less is better.
LOWER = ("rank", "align_l2", "uniform_", "modality_gap", "loss")
# Metrics without a better or worse.
NEITHER = ("C",)
# Charts of one heading, and points of all their lines together.
CHARTS, ALL_POINTS = 400, 1_000_000
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

STYLE = """
:root{color-scheme:light}*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:16px;font:15px/1.5 system-ui,sans-serif;color:#1b1f24;background:#fff;overflow-wrap:anywhere}
h1{font-size:1.5rem;margin:.2em 0}h2{font-size:1.15rem;margin:2em 0 .4em;border-bottom:1px solid #d0d7de}h3{font-size:1rem;margin:1.2em 0 .3em}
p{margin:.4em 0;max-width:75ch}.note{color:#57606a;font-size:.9rem}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;padding:0;list-style:none;margin:.4em 0}
.legend i{display:inline-block;width:14px;height:14px;border-radius:3px;margin-right:6px;vertical-align:-2px}
.scroll{overflow-x:auto;border:1px solid #d0d7de;border-radius:6px}
table{border-collapse:collapse;font-size:.88rem;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:4px 10px;text-align:right;border-bottom:1px solid #eaeef2;white-space:nowrap}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:#fff}
thead th{white-space:normal;vertical-align:bottom;min-width:84px;overflow-wrap:break-word}
.wide th:first-child,.wide td:first-child{white-space:normal;overflow-wrap:normal;min-width:130px;max-width:300px}
.text td:nth-child(-n+3),.text th:nth-child(-n+3){text-align:left;white-space:normal;overflow-wrap:normal}.text td{vertical-align:top}
td small{display:block;color:#57606a;font-weight:400;line-height:1.1}.best{font-weight:700}
.grid{display:grid;gap:16px;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr))}
figure{margin:0;min-width:0}figcaption{font-size:.9rem;font-weight:600}
svg{width:100%;height:auto;display:block;font:11px system-ui,sans-serif;fill:#1b1f24}
svg .tick{stroke:#eaeef2}svg .axis{stroke:#b6bec8;stroke-width:.7}
.query{border:1px solid #d0d7de;border-radius:6px;padding:8px 10px;min-width:0}
.query p{margin:0 0 6px}.hits{display:flex;gap:6px}.hits figure{flex:1 1 0;text-align:center}
.hits img,.query>img{width:100%;max-width:110px;aspect-ratio:1;object-fit:cover;border:3px solid transparent;border-radius:4px;display:block;margin:0 auto}
.hits .true img{border-color:#009e73}.hits figcaption{font-size:.72rem;font-weight:400}
.query ol{margin:6px 0 0;padding-left:1.6em;font-size:.86rem}.query li.true{color:#006b4f;font-weight:600}
details{margin:.6em 0}summary{cursor:pointer}pre{overflow-x:auto;font-size:.78rem;background:#f6f8fa;padding:8px;border-radius:6px}
"""


def write_report(
    runs: Sequence[str | Path],
    output: str | Path,
    *,
    title: str = "clipkit report",
    queries: int = 6,
    device: str = "cpu",
    batch_size: int = 64,
    models: bool = True,
    trust_paths: bool = False,
) -> Path:
    """Write the page and return its path.

    Args:
        runs: run folders, or folders that hold them.
        output: the HTML file.
        queries: retrieval examples of each direction a group.
        device, batch_size: for encoding the evaluation data again.
        models: False leaves out what needs a checkpoint.
        trust_paths: the runs may name local files anywhere, and have links that lead out of their folders.

    Raises:
        ValueError: a path that holds no run, or none that can be read.
    """
    found = find_runs(runs, trust_paths=trust_paths)
    pictures = {"queries": queries, "device": device, "batch_size": batch_size, "trust_paths": trust_paths}
    return write_page(
        group_runs(found),
        output,
        title=title,
        pictures=pictures if models else None,
        left_out=[f"Left out: {text}" for run in found for text in (run.problem, run.note) if text],
    )


def write_page(
    groups: Sequence[Group],
    output: str | Path,
    *,
    title: str,
    notes: str = "",
    pictures: dict[str, Any] | None = None,
    left_out: Sequence[str] = (),
) -> Path:
    """Write the page about groups of runs and return its path.

    Args:
        notes: HTML set before the final numbers.
        pictures: settings of clipkit.reports.pictures.group_pictures; None leaves out what needs a checkpoint.
        left_out: what is said of runs that are not in the groups.
    """
    groups = list(groups)
    colours = {group.label: PALETTE[i % len(PALETTE)] for i, group in enumerate(groups)}
    parts = [_head(title, groups, left_out), _legend(colours), notes, _table(groups), _dots(groups, colours)]
    parts += [
        _tradeoff(groups, colours),
        _curves(groups, colours, "Training", "train/"),
        _curves(groups, colours, "Evaluation during training", "eval/"),
    ]
    if pictures:
        from clipkit.reports.pictures import group_pictures

        for group in groups:
            parts.append(f"<h2>{escape(group.label)}: what the model finds</h2>")
            # The first that has finished, so has a checkpoint.
            run = next((run for run in group.runs if run.summary.get("finished")), group.runs[0])
            parts.append(group_pictures(run, **pictures))
    parts.append(_settings(groups))
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>"
    )
    output = Path(output)
    # A folder's name may hold bytes that are no text.
    write_text(output, page.encode("utf-8", "replace").decode("utf-8"))
    return output


def _head(title: str, groups: list[Group], left_out: Sequence[str]) -> str:
    runs = [run for group in groups for run in group.runs]
    unfinished = [run.path.name for run in runs if not run.summary.get("finished")]
    notes = [f"{len(runs)} runs in {len(groups)} groups; runs of a group differ by their seed alone."]
    if unfinished:
        named = ", ".join(unfinished[:3]) + (
            f" and {len(unfinished) - 3} more" if len(unfinished) > 3 else ""
        )
        notes.append(f"Not finished, so their last evaluation stands: {named}.")
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    missing = "".join(f'<p class="note">{escape(line)}</p>' for line in left_out)
    return f'<h1>{escape(title)}</h1><p class="note">{date}. {escape(" ".join(notes))}</p>{missing}'


def _legend(colours: dict[str, str]) -> str:
    items = "".join(f'<li><i style="background:{c}"></i>{escape(label)}</li>' for label, c in colours.items())
    return f'<ul class="legend">{items}</ul>'


def _direction(metric: str) -> int:
    name = metric.rpartition("/")[2]
    if name in NEITHER:
        return 0
    return -1 if any(part in name for part in LOWER) else 1


def _table(groups: list[Group]) -> str:
    metrics = metric_names(groups)
    if not metrics:
        return "<h2>Final numbers</h2><p>No run has been evaluated yet.</p>"
    head = "".join(f"<th>{_breakable(g.label)}</th>" for g in groups)
    rows = []
    for metric in metrics:
        found = [group.spread(metric) for group in groups]
        means = [value[0] for value in found if value and math.isfinite(value[0])]
        sign = _direction(metric)
        best = max(means, key=lambda mean: sign * mean) if sign and len(set(means)) > 1 else None
        cells = []
        for group, value in zip(groups, found, strict=True):
            if value is None:
                cells.append("<td>-</td>")
                continue
            mean, deviation, count = value
            spread = f" <small>± {number(deviation)}</small>" if deviation is not None else ""
            own = group.about(metric)
            # Of this very number: a run may have gone on since.
            if count == 1 and (ends := own.get("interval")) and own.get("value") == mean:
                spread = f" <small>[{number(ends[0])}, {number(ends[1])}]</small>"
            strong = ' class="best"' if mean == best else ""
            cells.append(f'<td{strong} title="{count} runs">{number(mean)}{spread}</td>')
        arrow = {1: "&nbsp;↑", -1: "&nbsp;↓", 0: ""}[sign]
        about = next((one for group in groups if (one := group.about(metric))), {})
        chance = number(value) if (value := about.get("chance")) is not None else "-"
        items = f"<small>{items} items</small>" if (items := about.get("n")) else ""
        rows.append(f"<tr><td>{_breakable(metric)}{arrow}{items}</td>{''.join(cells)}<td>{chance}</td></tr>")
    sizes = {len(group.runs) for group in groups}
    each = "each" if len(groups) > 1 else "in all"
    counts = (
        f"{sizes.pop()} {each}"
        if len(sizes) == 1
        else ", ".join(f"{group.label}: {len(group.runs)}" for group in groups)
    )
    return (
        '<h2>Final numbers</h2><p class="note">Mean ± sample standard deviation over runs '
        f"({escape(counts)}); ↑ more is better, ↓ less is better, best mean in bold. STS and SentEval are per cent, recall and "
        "accuracy fractions of 1. Chance is what guessing has; of a single run, the 95 % interval of a bootstrap over its items "
        f'stands in brackets.</p><div class="scroll wide"><table><thead><tr><th>metric</th>{head}<th>chance</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _breakable(name: str) -> str:
    """A metric's or group's name whose long words may be broken after underscores, slashes and plus signs."""
    return " ".join(_long(escape(word)) if len(word) > 12 else escape(word) for word in name.split(" "))


def _long(word: str) -> str:
    return word.replace("_", "_<wbr>").replace("/", "/<wbr>").replace("+", "+<wbr>")


def number(value: float) -> str:
    """Four decimals for recalls and distances, two for per cents and ranks."""
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}" if abs(value) < 1000 else f"{value:.4g}"


def _dots(groups: list[Group], colours: dict[str, str]) -> str:
    """Every run's final numbers as dots, where some group has several runs."""
    if len(groups) < 2 or all(len(group.runs) == 1 for group in groups):
        return ""
    names = metric_names(groups)
    charts = []
    for name in names[:CHARTS]:
        rows = [
            DotRow(
                group.label,
                colours[group.label],
                [run.final[name] for run in group.runs if name in run.final],
            )
            for group in groups
        ]
        arrow = {1: " ↑", -1: " ↓", 0: ""}[_direction(name)]
        charts.append(dot_chart(name + arrow, rows))
    return (
        '<h2>Each run</h2><p class="note">A dot is a run; the line is their mean, the band one sample standard deviation to each '
        f'side; ↑ more is better, ↓ less is better.</p><div class="grid">{"".join(charts)}</div>'
    )


def _curves(groups: list[Group], colours: dict[str, str], heading: str, prefix: str) -> str:
    names = dict.fromkeys(
        name for g in groups for run in g.runs for name in run.curves if name.startswith(prefix)
    )
    runs = sum(len(group.runs) + 1 for group in groups)
    most = max(50, min(POINTS, ALL_POINTS // max(1, runs * min(len(names), CHARTS))))
    charts = []
    for name in list(names)[:CHARTS]:
        series = []
        for group in groups:
            if len(group.runs) > 1:
                series += [
                    Series(r.curve(name), colours[group.label], r.path.name, faint=True) for r in group.runs
                ]
            series.append(Series(group.mean_curve(name), colours[group.label], group.label))
        # A single evaluation at the end is in the table already.
        if any(len(s.points) > 1 for s in series):
            charts.append(line_chart(name[len(prefix) :], series, x_label="step", points=most))
    if not charts:
        return ""
    return f'<h2>{heading}</h2><p class="note">Thick: mean over runs; thin: each run.</p><div class="grid">{"".join(charts)}</div>'


def _tradeoff(groups: list[Group], colours: dict[str, str]) -> str:
    """Alignment against uniformity, a path over training for each group (Wang and Isola, 2020, figure 7)."""
    tasks = dict.fromkeys(
        name[: -len("/align_l2")]
        for g in groups
        for run in g.runs
        for name in run.final
        if name.endswith("/align_l2")
    )
    charts = []
    for task in list(tasks)[: CHARTS // 3]:
        for uniform in ("uniform_t", "uniform_i", "uniform_it"):
            series = []
            for group in groups:
                x = dict(group.mean_curve(f"eval/{task}/align_l2"))
                y = dict(group.mean_curve(f"eval/{task}/{uniform}"))
                points = [(x[step], y[step]) for step in x if step in y]
                series.append(Series(points, colours[group.label], group.label, arrow=True))
            charts.append(
                line_chart(
                    f"{task}: {uniform} against alignment", series, x_label="align_l2", y_label=uniform
                )
            )
    charts = [chart for chart in charts if chart]
    if not charts:
        return ""
    return (
        '<h2>Alignment and uniformity</h2><p class="note">A path is training, its dot the last evaluation. Left is better '
        f'aligned, down is more uniform.</p><div class="grid">{"".join(charts)}</div>'
    )


def _settings(groups: list[Group]) -> str:
    blocks = []
    for group in groups:
        flat = "\n".join(f"{key}: {value}" for key, value in public_settings(group.runs[0].config).items())
        folders = "\n".join(readable(str(run.path)) for run in group.runs)
        blocks.append(
            f"<details><summary>{escape(group.label)}</summary><pre>{escape(folders)}\n\n{escape(flat)}</pre></details>"
        )
    return f"<h2>Settings</h2>{''.join(blocks)}"
