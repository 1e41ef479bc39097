"""Charts as text: inline SVG that needs no script, no font and no network. Colours are Okabe and Ito's, safe
for the colour-blind; widths follow the page, so a chart fits a phone.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from clipkit.reports.runs import POINTS, cut
from clipkit.reports.spread import deviation, mean

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f6000", "#444444")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 260, 52, 12, 12, 40


@dataclass
class Series:
    """One line: points (x, y) in drawing order.

    Attributes:
        colour: any CSS colour.
        faint: drawn thin and pale, for the single runs behind a mean.
        arrow: marks where the line ends, for a path in time.
    """

    points: list[tuple[float, float]]
    colour: str
    label: str = ""
    faint: bool = False
    arrow: bool = False


def _drawable(value: float) -> bool:
    """Whether a number has a place on an axis: finite, and so small that differences of two are."""
    return abs(value) < 1e150


def _thinned(points: list[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most so many of the points, evenly, the last among them."""
    every = -(-(len(points) - 1) // (most - 1))
    return points if every <= 1 else points[:-1:every] + points[-1:]


def line_chart(
    title: str, series: Sequence[Series], *, x_label: str, y_label: str = "", points: int = POINTS
) -> str:
    """A figure with a line a series; points that are not finite, or have no place on an axis, are left out.

    Args:
        points: of a line that are drawn, evenly spaced.
    """
    drawn = [
        Series(
            _thinned([p for p in s.points if all(map(_drawable, p))], points),
            s.colour,
            s.label,
            s.faint,
            s.arrow,
        )
        for s in series
    ]
    drawn = [s for s in drawn if s.points]
    if not drawn:
        return ""
    x_axis = Axis([x for s in drawn for x, _ in s.points], LEFT, WIDTH - RIGHT)
    y_axis = Axis([y for s in drawn for _, y in s.points], HEIGHT - BOTTOM, TOP)
    parts = [_frame(x_axis, y_axis, x_label, y_label)]
    for s in drawn:
        place = [(x_axis(x), y_axis(y)) for x, y in s.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in place)
        style = 'stroke-width="1" opacity="0.35"' if s.faint else 'stroke-width="2"'
        tip = f"<title>{escape(s.label)}</title>"
        if len(place) > 1:
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{s.colour}" {style}>{tip}</polyline>'
            )
        if s.arrow or len(place) == 1:
            x, y = place[-1]
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{s.colour}">{tip}</circle>')
    return _figure(title, "".join(parts))


@dataclass
class DotRow:
    """One row of a dot chart: a name and the values of its runs."""

    label: str
    colour: str
    values: list[float]


def dot_chart(title: str, rows: Sequence[DotRow], *, row_height: int = 24, longest: int = 26) -> str:
    """A row of dots a group on one axis, with a line at their mean and a band of one sample standard
    deviation.

    Args:
        rows: drawn from the top; values that are not finite or above 1e150 are left out, a row without any stays empty.
        longest: characters of a label; a longer one is cut in the middle, and whole when pointed at.
    """
    kept = [DotRow(row.label, row.colour, [v for v in row.values if _drawable(v)]) for row in rows]
    spans = [_span(row.values) for row in kept]
    seen = [
        v for row, span in zip(kept, spans, strict=True) for v in (*row.values, *span[1:]) if math.isfinite(v)
    ]
    if not seen:
        return ""
    left = 14 + 5.8 * min(longest, max(len(row.label) for row in kept))
    foot = TOP + row_height * len(kept)
    axis = Axis(seen, left, WIDTH - RIGHT)
    parts = []
    for value in axis.ticks(4):
        x = axis(value)
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{foot}" class="tick"/>')
        parts.append(f'<text x="{x:.1f}" y="{foot + 15}" text-anchor="middle">{value:.6g}</text>')
    for i, (row, (middle, low, high)) in enumerate(zip(kept, spans, strict=True)):
        y = TOP + (i + 0.5) * row_height
        tip = f"<title>{escape(row.label)}</title>"
        parts.append(
            f'<text x="{left - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{escape(cut(row.label, longest))}{tip}</text>'
        )
        if not row.values:
            continue
        parts.append(
            f'<rect x="{axis(low):.1f}" y="{y - 6:.1f}" width="{max(axis(high) - axis(low), 0):.1f}" height="12" '
            f'fill="{row.colour}" opacity="0.2"/>'
            f'<line x1="{axis(middle):.1f}" y1="{y - 8:.1f}" x2="{axis(middle):.1f}" y2="{y + 8:.1f}" stroke="{row.colour}" '
            f'stroke-width="2.5"/>'
        )
        dots = "".join(f'<circle cx="{axis(v):.1f}" cy="{y:.1f}" r="3.2"/>' for v in row.values)
        parts.append(f'<g fill="{row.colour}" stroke="#fff" stroke-width="0.6">{dots}{tip}</g>')
    return _figure(title, "".join(parts), height=foot + 24)


def _span(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, mean - s, mean + s) with the sample standard deviation s, 0 for one value; NaN for none."""
    if not values:
        return math.nan, math.nan, math.nan
    middle, spread = mean(values), deviation(values) or 0.0
    return middle, middle - spread, middle + spread


def scatter(
    title: str,
    groups: Sequence[Series],
    links: Sequence[tuple[tuple[float, float], tuple[float, float]]] = (),
) -> str:
    """Points without axes' meaning (a projection); `links` joins pairs of points by thin lines."""
    x_axis = Axis([x for s in groups for x, _ in s.points], 14, WIDTH - 14)
    y_axis = Axis([y for s in groups for _, y in s.points], HEIGHT - 14, 14)
    parts = [
        f'<line x1="{x_axis(a[0]):.1f}" y1="{y_axis(a[1]):.1f}" x2="{x_axis(b[0]):.1f}" y2="{y_axis(b[1]):.1f}" class="axis"/>'
        for a, b in links
    ]
    for s in groups:
        dots = "".join(f'<circle cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="2.6"/>' for x, y in s.points)
        parts.append(f'<g fill="{s.colour}" opacity="0.75">{dots}<title>{escape(s.label)}</title></g>')
    return _figure(title, "".join(parts))


def heat_map(title: str, values: Any, *, rows: str, columns: str, names: Sequence[str] = ()) -> str:
    """A matrix as an image, white at its smallest value and dark blue at its largest.

    Args:
        values: (R, C) tensor.
        rows, columns: what they are.
        names: one a row and column, drawn when there is room for them (up to 12).
    """
    low, high = float(values.min()), float(values.max())
    shade = ((values - low) / max(high - low, 1e-12)).clamp(0, 1)
    pixels = (255 - shade[..., None] * shade.new_tensor([255, 175, 110])).round().byte()
    side, left, top = (300, 96, 8) if 0 < len(names) <= 12 else (380, 30, 8)
    # Names run down the left and, turned, below: the longest readable ones.
    shown = [escape(str(name)[:13]) for name in names] if 0 < len(names) <= 12 else []
    uri = png_uri(pixels.cpu().numpy())
    parts = [
        f'<image x="{left}" y="{top}" width="{side}" height="{side}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="{uri}"/>',
        f'<rect x="{left}" y="{top}" width="{side}" height="{side}" class="axis" fill="none"/>',
    ]
    for i, name in enumerate(shown):
        middle = top + (i + 0.5) * side / len(shown)
        across = left + (i + 0.5) * side / len(shown)
        parts.append(f'<text x="{left - 4}" y="{middle + 4:.1f}" text-anchor="end">{name}</text>')
        parts.append(
            f'<text transform="translate({across + 4:.1f},{top + side + 6}) rotate(-60)" text-anchor="end">{name}</text>'
        )
    foot = top + side + (70 if shown else 6)
    parts.append(f'<text x="{left + side / 2}" y="{foot + 14}" text-anchor="middle">{escape(columns)}</text>')
    parts.append(
        f'<text transform="translate(14,{top + side / 2}) rotate(-90)" text-anchor="middle">{escape(rows)}</text>'
    )
    return _figure(f"{title} ({low:.2f} white, {high:.2f} dark)", "".join(parts), height=foot + 22)


def png_uri(pixels: Any) -> str:
    """A data URI of (H, W, 3) uint8 pixels."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def jpeg_uri(pixels: Any, quality: int = 80) -> str:
    """A data URI of (H, W, 3) uint8 pixels, lossy and small."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


class Axis:
    """Maps values onto pixels `start`..`stop`, with room around them, and knows its round ticks."""

    def __init__(self, values: Sequence[float], start: float, stop: float):
        low, high = min(values), max(values)
        if high - low < 1e-12 * max(1.0, abs(high)):
            low, high = low - 0.5, high + 0.5
        margin = 0.04 * (high - low)
        self.low, self.high, self.start, self.stop = low - margin, high + margin, start, stop

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """About `count` multiples of 1, 2 or 5 times a power of ten."""
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
        return [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def _frame(x_axis: Axis, y_axis: Axis, x_label: str, y_label: str) -> str:
    parts = []
    for value in x_axis.ticks():
        x = x_axis(value)
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}" class="tick"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{value:.6g}</text>')
    for value in y_axis.ticks():
        y = y_axis(value)
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" class="tick"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    if y_label:
        parts.append(
            f'<text transform="translate(11,{(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
        )
    return "".join(parts)


def _figure(title: str, body: str, height: float = HEIGHT) -> str:
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}">{body}</svg></figure>'
    )
