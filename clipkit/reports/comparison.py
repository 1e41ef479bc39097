"""Finished runs side by side: those that differ by the seed alone are one row, mean and sample standard
deviation.

    groups = compare(["runs/quickstart"])
    print(text_tables(groups))
    write_comparison(groups, "comparison")     # comparison.md, .csv, .json and .html

A number over n runs is mean = sum(x) / n and s = sqrt(sum((x - mean)^2) / (n - 1)); one run alone has no s.
Settings are shown without credentials, and texts of a run can neither be marks of Markdown nor formulas of a table.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipkit.files import write_text
from clipkit.foreign import readable
from clipkit.reports.page import number, write_page
from clipkit.reports.runs import Group, Run, find_runs, group_runs, metric_names, public_settings

DIRECTIONS = ("image_to_text", "text_to_image")


def compare(paths: Sequence[str | Path], *, order: str | None = None) -> list[Group]:
    """The groups of the finished runs at or below the paths; `finished_groups` of `find_runs`."""
    return finished_groups(find_runs(paths), order=order)


def finished_groups(runs: Sequence[Run], *, order: str | None = None) -> list[Group]:
    """The groups of the finished runs.

    Args:
        order: "task/metric" whose largest mean comes first; None: the order of the runs.

    Raises:
        ValueError: none is finished.
    """
    finished = [run for run in runs if run.summary.get("finished")]
    if not finished:
        names = [str(run.path) for run in runs]
        raise ValueError(
            f"no run is finished, of {', '.join(names[:5] + ['...'][: len(names) > 5])}: summary.json says when one is"
        )
    groups = group_runs(finished)
    if order:
        groups.sort(key=lambda group: -_finite((group.spread(order) or (-math.inf,))[0], -math.inf))
    return groups


def left_out(runs: Sequence[Run]) -> list[str]:
    """A line for every run that a comparison leaves out, and why; one for all that are not finished."""
    lines = [f"Left out: {run.problem}" for run in runs if run.problem]
    lines += [readable(f"Left out: {run.note}") for run in runs if run.note]
    unfinished = [str(run.path) for run in runs if not run.problem and not run.summary.get("finished")]
    return lines + ([readable(f"Not finished, so left out: {', '.join(unfinished)}")] if unfinished else [])


def _finite(value: float, otherwise: Any = None) -> Any:
    return value if math.isfinite(value) else otherwise


def blocks(groups: Sequence[Group]) -> dict[str, list[str]]:
    """{a table's heading: its metrics}: a table a task, and of retrieval one a direction."""
    found: dict[str, list[str]] = {}
    for name in metric_names(groups):
        task, _, metric = name.rpartition("/")
        direction = next((d for d in DIRECTIONS if metric.startswith(f"{d}_")), "")
        found.setdefault(f"{task} {direction.replace('_', ' ')}".strip(), []).append(name)
    return found


def table_rows(groups: Sequence[Group], heading: str, names: Sequence[str]) -> list[list[str]]:
    """One table as text cells, its header first: the group, n, then mean ± s of every metric ("-" where it
    has none).
    """
    short = [name.rpartition("/")[2] for name in names]
    for direction in DIRECTIONS:
        short = [name.removeprefix(f"{direction}_") for name in short]
    rows = [[heading, "n", *short]]
    for group in groups:
        found = [group.spread(name) for name in names]
        counts = sorted({value[2] for value in found if value})
        if counts:
            # Runs of a group may have been scored on different tasks.
            n = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
            rows.append([group.label, n, *map(_cell, found)])
    return rows


def _cell(value: tuple[float, float | None, int] | None) -> str:
    if value is None:
        return "-"
    mean, deviation, _ = value
    return number(mean) if deviation is None else f"{number(mean)} ± {number(deviation)}"


def text_tables(groups: Sequence[Group]) -> str:
    """The tables for a terminal; an empty string when no run was evaluated."""
    tables = []
    for heading, names in blocks(groups).items():
        rows = table_rows(groups, heading, names)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        tables.append(
            "\n".join(
                "  ".join(
                    [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
                ).rstrip()
                for row in rows
            )
        )
    return "\n\n".join(tables)


def markdown_tables(groups: Sequence[Group]) -> str:
    """The tables in Markdown."""
    return "\n\n".join(
        markdown_table(table_rows(groups, heading, names)) for heading, names in blocks(groups).items()
    )


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Cells, the header first, as one Markdown table; numbers are set right."""
    lines = ["| " + " | ".join(map(markdown_text, row)) + " |" for row in rows]
    lines.insert(1, "| --- |" + " ---: |" * (len(rows[0]) - 1))
    return "\n".join(lines)


def markdown_text(text: str) -> str:
    """A text that Markdown shows as it is: no tag, link, picture, code or end of a cell."""
    return re.sub(
        r"[\\|\[\]`<&]", lambda found: {"<": "&lt;", "&": "&amp;"}.get(found[0], f"\\{found[0]}"), text
    )


def _csv_text(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def csv_table(groups: Sequence[Group], left_out: Sequence[str] = ()) -> str:
    """A line a group and metric: group, metric, n, mean, standard_deviation (empty for one run), and each
    run's value; then a line without numbers for everything left out.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["group", "metric", "n", "mean", "standard_deviation", "values"])
    for group in groups:
        for name in metric_names([group]):
            if (spread := group.spread(name)) is None:
                continue
            mean, deviation, n = spread
            values = " ".join(repr(run.final[name]) for run in group.runs if name in run.final)
            writer.writerow(
                [
                    _csv_text(group.label),
                    _csv_text(name),
                    n,
                    repr(mean),
                    "" if deviation is None else repr(deviation),
                    values,
                ]
            )
    writer.writerows([_csv_text(line), "", 0, "", "", ""] for line in left_out)
    return out.getvalue()


def as_json(groups: Sequence[Group], left_out: Sequence[str] = ()) -> dict[str, Any]:
    """Every number with the runs it comes from; null for one that is not finite."""
    return _standard({"groups": [_group_json(group) for group in groups], "left_out": list(left_out)})


def _standard(value: Any) -> Any:
    """A value that JSON has words for: it has none for inf and nan."""
    if isinstance(value, Mapping):
        return {key: _standard(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_standard(one) for one in value]
    return _finite(value) if isinstance(value, float) else value


def _group_json(group: Group) -> dict[str, Any]:
    metrics = {}
    for name in metric_names([group]):
        if (spread := group.spread(name)) is None:
            continue
        mean, deviation, n = spread
        metrics[name] = {
            "n": n,
            "mean": mean,
            "standard_deviation": deviation,
            "values": [run.final.get(name) for run in group.runs],
        }
    runs = [
        {
            "folder": readable(str(run.path)),
            "seed": run.config.get("seed"),
            "step": run.summary.get("step"),
            "seconds": run.summary.get("seconds_this_session"),
            "versions": run.summary.get("versions"),
        }
        for run in group.runs
    ]
    settings = (
        {key: value for key, value in public_settings(group.runs[0].config).items() if key != "seed"}
        if group.runs
        else {}
    )
    return {"label": group.label, "runs": runs, "metrics": metrics, "settings": settings}


def write_comparison(
    groups: Sequence[Group],
    output: str | Path,
    *,
    title: str = "Comparison of runs",
    notes: str = "",
    html: str = "",
    entries: dict[str, Any] | None = None,
    left_out: Sequence[str] = (),
) -> list[Path]:
    """Write OUTPUT.md, OUTPUT.csv, OUTPUT.json and OUTPUT.html; returns their paths.

    Args:
        notes: Markdown set above the tables.
        html: the same for the page.
        entries: more for the JSON, beside "groups".
        left_out: what `left_out` says of the runs that are not in the groups.
    """
    output = Path(output)
    explained = (
        "Mean ± sample standard deviation over n runs that differ by the seed alone. STS and SentEval are per cent, recall and "
        "accuracy fractions of 1."
    )
    missing = "".join(f"- {markdown_text(line)}\n" for line in left_out)
    texts = {
        ".md": f"# {title}\n\n{notes}{explained}\n\n{markdown_tables(groups)}\n"
        + (missing and f"\n{missing}"),
        ".csv": csv_table(groups, left_out),
        ".json": json.dumps(_standard({**(entries or {}), **as_json(groups, left_out)}), indent=1) + "\n",
    }
    paths = []
    for suffix, text in texts.items():
        # Not with_suffix: the name may hold a dot of its own.
        path = output.with_name(output.name + suffix)
        write_text(path, text)
        paths.append(path)
    page = output.with_name(f"{output.name}.html")
    return [*paths, write_page(groups, page, title=title, notes=html, left_out=left_out)]
