"""What finished runs say about the language-encoder study's published findings: its arms, its claims, its verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from clipkit.foreign import redacted
from clipkit.reports.comparison import (
    finished_groups,
    left_out,
    markdown_table,
    text_tables,
    write_comparison,
)
from clipkit.reports.findings import OPPOSITE, SHOWS, UNTOLD, Difference, paired, paired_gains
from clipkit.reports.runs import Group, Run, cut, find_runs, without_seed
from clipkit.settings import differences

BASES = {"CLIP": "clip", "CyCLIP": "cyclip"}
SENTENCES = {
    "none": [],
    "L_s": ["simcse"],
    "L_n": ["nli_contrastive"],
    "L_s + L_n": ["simcse", "nli_contrastive"],
}
RECALLS = [f"{direction}_R@{k}" for direction in ("image_to_text", "text_to_image") for k in (1, 5, 10)]


@dataclass
class Claim:
    """One part of a published finding, asked of one pair of arms.

    Attributes:
        finding: a, b or c.
        text: what is claimed.
        arm: the arm with the change, and what it is compared with.
        sign: 1 when the claim is that the difference is above zero, -1 below.
    """

    finding: str
    text: str
    arm: str
    sign: int
    difference: Difference

    @property
    def verdict(self) -> str:
        return self.difference.verdict(self.sign)


FINDINGS = {
    "a": "Unsupervised sentence training (L_s) makes text more uniform (uniform_t falls), aligns the modalities less (align_l2 "
    "rises), and helps retrieval and zero-shot classification.",
    "b": "Supervised sentence training (L_n) makes better sentence embeddings (STS, SentEval) without helping cross-modal tasks.",
    "c": "CyCLIP gains more from sentence training than CLIP does.",
}


def arm_of(run: Run) -> str | None:
    """The arm's name from a run's loss terms; None for a sum that is not of the study."""
    terms = set(run.config.get("loss") or {})
    base = "CyCLIP" if "cyclic" in terms else "CLIP"
    rest = terms - {"infonce", "cyclic"}
    name = next((name for name, needed in SENTENCES.items() if set(needed) == rest), None)
    if "infonce" not in terms or name is None:
        return None
    return base if name == "none" else f"{base} + {name}"


def labelled(groups: Sequence[Group]) -> list[Group]:
    """The study's groups under its arms' names, in its order.

    Raises:
        ValueError: no arm among them, an arm with runs of two settings, a seed twice, or arms that differ by
            more than the loss.
    """
    found: dict[str, Group] = {}
    for group in groups:
        seeded = [run for run in group.runs if run.config.get("seed") is not None]
        for run in group.runs:
            if run not in seeded:
                print(f"left out, it has no seed: {run.path}")
        if not seeded:
            continue
        group = Group(group.label, seeded)
        name = arm_of(group.runs[0])
        if name is None:
            print(f"left out, its loss is none of the study's: {group.runs[0].path}")
            continue
        if name in found:
            raise ValueError(
                f"{name} has runs of different settings, such as {found[name].runs[0].path} and {group.runs[0].path}: "
                "give one study's runs"
            )
        twice = [
            run
            for i, run in enumerate(group.runs)
            if run.config["seed"] in [r.config["seed"] for r in group.runs[:i]]
        ]
        if twice:
            raise ValueError(
                f"{name} has seed {twice[0].config['seed']} twice ({twice[0].path}): pairs go by seed"
            )
        found[name] = Group(name, group.runs)
    if not found:
        raise ValueError("no run of the study's losses here: clipkit-study trains them")
    check_alike(list(found.values()))
    order = [base if name == "none" else f"{base} + {name}" for base in BASES for name in SENTENCES]
    return [found[name] for name in order if name in found]


def check_alike(groups: Sequence[Group]) -> None:
    """ValueError when arms differ by more than their loss, for then nothing can be said about the loss."""
    first, *others = ((group, settings_but_loss(group)) for group in groups)
    for group, other in others:
        changed = [
            cut(redacted(f"{key}: {old!r} and {new!r}"), 300)
            for key, old, new in differences(first[1], other)
        ]
        if changed:
            raise ValueError(
                f"{first[0].label} and {group.label} differ by more than the loss: {'; '.join(changed[:5])}"
            )


def settings_but_loss(group: Group) -> dict[str, Any]:
    """What the arms of one study have in common."""
    return {key: value for key, value in without_seed(group.runs[0]).items() if key != "loss"}


def measures(run: Run) -> dict[str, tuple[str, float]]:
    """{what is measured: (its kind, the run's number)}, by the kind of each evaluation task."""
    found: dict[str, tuple[str, float]] = {}
    for task, spec in (run.config.get("eval") or {}).items():
        kind = (spec or {}).get("kind")
        numbers = {
            name[len(task) + 1 :]: value for name, value in run.final.items() if name.startswith(f"{task}/")
        }
        if kind == "retrieval" and all(name in numbers for name in RECALLS):
            # One number a task, for each further one is a further chance to be wrong.
            found[f"{task}: mean recall"] = (kind, sum(numbers[name] for name in RECALLS) / len(RECALLS))
        elif kind == "zero_shot" and "top1" in numbers:
            found[f"{task}: top-1"] = (kind, numbers["top1"])
        elif kind in ("sts", "senteval") and "average" in numbers:
            found[f"{task}: average"] = (kind, numbers["average"])
        elif kind == "geometry":
            found |= {
                f"{task}: {name}": (name, numbers[name])
                for name in ("uniform_t", "align_l2")
                if name in numbers
            }
    return found


def ask(groups: Sequence[Group]) -> list[Claim]:
    """Every claim that the runs at hand allow, finding by finding."""
    by_arm = {group.label: {run.config["seed"]: measures(run) for run in group.runs} for group in groups}
    kinds = {
        name: kind for runs in by_arm.values() for run in runs.values() for name, (kind, _) in run.items()
    }

    def values(arm: str, name: str) -> dict[int, float]:
        return {seed: run[name][1] for seed, run in by_arm.get(arm, {}).items() if name in run}

    up, down, not_up = (1, "rises"), (-1, "falls"), (-1, "does not rise")
    expected = {
        ("a", "L_s"): {"uniform_t": down, "align_l2": up, "retrieval": up, "zero_shot": up},
        ("b", "L_n"): {"sts": up, "senteval": up, "retrieval": not_up, "zero_shot": not_up},
    }
    claims = []
    for (finding, term), wanted in expected.items():
        for wanted_kind, (sign, word) in wanted.items():
            for name in [name for name, kind in kinds.items() if kind == wanted_kind]:
                for base in BASES:
                    found = paired(values(f"{base} + {term}", name), values(base, name))
                    if found:
                        claims.append(
                            Claim(finding, f"{name} {word}", f"{base} + {term} against {base}", sign, found)
                        )
    for term in list(SENTENCES)[1:]:
        for name in [
            name for name, kind in kinds.items() if kind in ("retrieval", "zero_shot", "sts", "senteval")
        ]:
            found = paired_gains(
                values(f"CyCLIP + {term}", name),
                values("CyCLIP", name),
                values(f"CLIP + {term}", name),
                values("CLIP", name),
            )
            if found:
                claims.append(Claim("c", f"{name} gains more", f"{term}: CyCLIP against CLIP", 1, found))
    return claims


def told(claims: Sequence[Claim]) -> list[str]:
    """The findings for a terminal: each with its count, then its parts."""
    lines = []
    for letter, text in FINDINGS.items():
        parts = [claim for claim in claims if claim.finding == letter]
        lines.append(f"({letter}) {text}\n    {count(parts)}")
        lines += [f"    {claim.verdict:<14}  {claim.arm}: {claim.text}; {numbers(claim)}" for claim in parts]
    return lines


def count(parts: Sequence[Claim]) -> str:
    """How many parts of a finding show."""
    if not parts:
        return "not asked: the runs it compares are not there"
    verdicts = [claim.verdict for claim in parts]
    shown, opposite, untold = (verdicts.count(verdict) for verdict in (SHOWS, OPPOSITE, UNTOLD))
    return f"of {len(parts)} parts {shown} show, {opposite} show the opposite, {untold} cannot be told"


def numbers(claim: Claim) -> str:
    """The difference and its interval."""
    found = claim.difference
    if found.low is None:
        return f"difference {found.mean:+.4f}, one seed"
    return f"difference {found.mean:+.4f}, 95 % interval {found.low:+.4f} to {found.high:+.4f}, {len(found.values)} seeds"


RULE = (
    "A difference is paired by seed: d_i is the metric with the change minus without it. Over n seeds the 95 % interval of its "
    "mean is mean d ∓ t(0.975, n - 1) · s / √n, s the sample standard deviation of the d_i. A part shows when the whole interval is "
    'on the claimed side of zero, shows the opposite when it is on the other, and cannot be told when zero is inside. "Does not '
    'rise" therefore shows only where the number falls. Nothing is corrected for the number of parts: of those whose true '
    "difference is zero, 1 in 20 falls outside its interval by chance. Mean recall is the mean of R@1, R@5 and R@10 in both directions."
)


def rows_of(claims: Sequence[Claim]) -> list[list[str]]:
    """A finding's parts as a table's cells, the header first."""
    rows = [["verdict", "claim", "arms", "difference", "95 % interval", "n"]]
    for claim in claims:
        found = claim.difference
        interval = "-" if found.low is None else f"{found.low:+.4f} to {found.high:+.4f}"
        rows.append(
            [claim.verdict, claim.text, claim.arm, f"{found.mean:+.4f}", interval, str(len(found.values))]
        )
    return rows


def markdown(groups: Sequence[Group], claims: Sequence[Claim]) -> str:
    """What study.md says above its tables."""
    seeds = sorted({run.config["seed"] for group in groups for run in group.runs})
    parts = [
        f"{sum(len(group.runs) for group in groups)} finished runs of {len(groups)} arms, seeds {', '.join(map(str, seeds))}. "
        "L_s: simcse, unsupervised. L_n: nli_contrastive, supervised.",
        f"## Findings\n\n{RULE}",
    ]
    for letter, text in FINDINGS.items():
        mine = [claim for claim in claims if claim.finding == letter]
        parts.append(
            f"### ({letter}) {text}\n\nHere: {count(mine)}."
            + (f"\n\n{markdown_table(rows_of(mine))}" if mine else "")
        )
    return "\n\n".join([*parts, "## Numbers", ""])


def html(claims: Sequence[Claim]) -> str:
    """The findings for the page."""
    parts = [f'<h2>Findings</h2><p class="note">{escape(RULE)}</p>']
    for letter, text in FINDINGS.items():
        mine = [claim for claim in claims if claim.finding == letter]
        parts.append(f"<h3>({letter}) {escape(text)}</h3><p>Here: {escape(count(mine))}.</p>")
        if mine:
            head, *body = rows_of(mine)
            cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
            lines = "".join(
                "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body
            )
            parts.append(
                f'<div class="scroll text"><table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>'
            )
    return "".join(parts)


def write_study(folders: Sequence[str], output: str) -> None:
    """Print the table and the findings of the finished runs, and write them to OUTPUT.md, .csv, .json and
    .html.
    """
    runs = find_runs(folders)
    groups = labelled(finished_groups(runs))
    claims = ask(groups)
    print(
        f"Mean ± sample standard deviation over n seeds:\n{text_tables(groups) or 'no run was evaluated'}\n"
    )
    print("\n".join(told(claims)))
    print("".join(f"\n{line}" for line in left_out(runs)))
    written = write_comparison(
        groups,
        output,
        title="The language-encoder study",
        notes=markdown(groups, claims),
        html=html(claims),
        left_out=left_out(runs),
        entries={
            "findings": [
                {**asdict(claim), "verdict": claim.verdict, "published": FINDINGS[claim.finding]}
                for claim in claims
            ]
        },
    )
    print("written: " + ", ".join(map(str, written)))
