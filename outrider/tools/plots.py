"""Small SVG plots and the page around them: one self-contained HTML file, no script, no network.

Used by ``bench_html`` only. Colours come from CSS variables, so a page follows the reader's light or dark
theme; exact values show as tooltips (``<title>``). Knows nothing of benchmarks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 50, 44
_MAX_POINTS = 500
_COLOURS = 6

_STYLE = """
:root { --bg: #fff; --fg: #1b1f24; --soft: #667; --grid: #e3e6ea;
  --c0: #0b62d6; --c1: #d1480f; --c2: #17845a; --c3: #8a3ffc; --c4: #b28600; --c5: #c2185b; }
@media (prefers-color-scheme: dark) { :root { --bg: #14171b; --fg: #e8eaed; --soft: #9aa3ad; --grid: #2b3138;
  --c0: #6ea8ff; --c1: #ff9466; --c2: #57c79a; --c3: #be95ff; --c4: #e0b84c; --c5: #ff7eb0; } }
body { font: 15px/1.45 system-ui, sans-serif; background: var(--bg); color: var(--fg); margin: 2rem auto;
  max-width: 1180px; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .2rem .8rem; text-align: right;
  border-bottom: 1px solid var(--grid); font-variant-numeric: tabular-nums; } td:first-child, th:first-child {
  text-align: left; } .plots { display: flex; flex-wrap: wrap; gap: 1rem; } svg { max-width: 100%; height:
  auto; } text { fill: var(--fg); font: 11px system-ui, sans-serif; } .title { font-size: 13px; font-weight:
  600; } .soft { fill: var(--soft); } .grid { stroke: var(--grid); } p.note { color: var(--soft); }
"""


@dataclass(frozen=True)
class Series:
    """One labelled curve (``points`` False) or a set of marks joined by a line (True)."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    points: bool = False


@dataclass(frozen=True)
class Mark:
    """A published or reference figure: a vertical line at ``x``, or a lone dot where ``y`` is given."""

    label: str
    x: float
    y: float | None = None


@dataclass(frozen=True)
class Scale:
    """Maps values to pixels, linearly or by logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Pixel of ``value``; a log scale clamps to its lower end."""
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values inside the range: powers of ten (with 2 and 5), or about five steps of 1, 2 or 5."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            factors = (1, 2, 5) if self.high / self.low < 200 else (1,)
            values = [factor * 10.0**decade for decade in decades for factor in factors]
            return [value for value in values if self.low <= value <= self.high]
        raw = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(power * factor for factor in (1, 2, 5, 10) if raw <= power * factor * 1.0001)
        first = math.ceil(self.low / step)
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


def line_plot(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    *,
    marks: Sequence[Mark] = (),
    log_x: bool = False,
    log_y: bool = False,
) -> str:
    """An SVG of curves with axes, grid, legend and reference marks; empty series are left out."""
    shown = [one for one in series if len(one.xs)]
    xs = [x for one in shown for x in one.xs] + [mark.x for mark in marks]
    ys = [y for one in shown for y in one.ys] + [mark.y for mark in marks if mark.y is not None]
    if not shown or not xs:
        return ""
    x_scale = _scale(xs, _LEFT, WIDTH - _RIGHT, log_x)
    y_scale = _scale(ys, HEIGHT - _BOTTOM, _TOP, log_y)
    parts = [_axes(title, x_label, y_label, x_scale, y_scale)]
    parts += [_curve(one, index, x_scale, y_scale) for index, one in enumerate(shown)]
    parts += [_mark(mark, index + len(shown), x_scale, y_scale) for index, mark in enumerate(marks)]
    parts.append(_legend([one.label for one in shown] + [mark.label for mark in marks]))
    return _svg(parts, title)


def cdf_plot(title: str, unit: str, values: Sequence[float], marks: Sequence[Mark] = ()) -> str:
    """Share of values at or below x, on a logarithmic x axis."""
    ordered = sorted(value for value in values if value > 0)
    shares = [100.0 * (index + 1) / len(ordered) for index in range(len(ordered))]
    series = Series("this run", *_thinned(ordered, shares))
    return line_plot(title, unit, "% of samples at or below", [series], marks=marks, log_x=True)


def span_plot(title: str, spans: Sequence[tuple[float, float, float]]) -> str:
    """One row per request: (start, first token, end) in seconds; waiting drawn light, generating solid."""
    if not spans:
        return ""
    step = max(len(spans) // 600, 1)
    rows = sorted(spans)[::step]
    x_scale = _scale([0.0, *(end for _, _, end in rows)], _LEFT, WIDTH - _RIGHT, False)
    y_scale = Scale(0, len(spans), _TOP, HEIGHT - _BOTTOM)
    parts = [_axes(title, "seconds", "request", x_scale, y_scale)]
    thickness = max((HEIGHT - _TOP - _BOTTOM) / len(rows) * 0.8, 0.4)
    for index, (start, first, end) in enumerate(rows):
        y = y_scale(index * step + step / 2)
        tip = f"<title>TTFT {first - start:.3f} s, total {end - start:.3f} s</title>"
        for left, right, colour, opacity in ((start, first, 1, 0.55), (first, end, 0, 0.9)):
            parts.append(
                f'<line x1="{x_scale(left):.1f}" x2="{x_scale(right):.1f}" y1="{y:.1f}" y2="{y:.1f}" '
                f'stroke="var(--c{colour})" stroke-width="{thickness:.2f}" opacity="{opacity}">{tip}</line>'
            )
    parts.append(_legend(["generating", "waiting for the first token"]))
    return _svg(parts, title)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table of escaped cells."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def page(title: str, intro: str, parts: Sequence[str], plots: Sequence[str]) -> str:
    """The whole document; ``parts`` are HTML, ``plots`` SVG (empty ones are skipped)."""
    drawn = "".join(plot for plot in plots if plot)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f'<body><h1>{escape(title)}</h1><p class="note">{escape(intro)}</p>{"".join(parts)}'
        f'<div class="plots">{drawn}</div></body></html>\n'
    )


def number(value: float) -> str:
    """A short figure for a tick or a cell: 12.3k, 4,002, 0.05."""
    if abs(value) >= 100_000:
        return f"{value / 1000:,.0f}k"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _scale(values: Sequence[float], start: float, end: float, log: bool) -> Scale:
    if log:
        positive = [value for value in values if value > 0] or [1.0]
        low, high = min(positive), max(positive)
        return Scale(low * 0.9, max(high * 1.1, low * 2), start, end, True)
    high = max(max(values), 0.0)
    return Scale(0.0, high * 1.05 if high > 0 else 1.0, start, end)


def _axes(title: str, x_label: str, y_label: str, x_scale: Scale, y_scale: Scale) -> str:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    parts = [f'<text class="title" x="{_LEFT}" y="14">{escape(title)}</text>']
    for tick in x_scale.ticks():
        x = x_scale(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{number(tick)}</text>')
    for tick in y_scale.ticks():
        y = y_scale(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    middle = (_LEFT + right) / 2
    parts.append(
        f'<text class="soft" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>'
    )
    height = (_TOP + bottom) / 2
    turn = f'transform="rotate(-90 13 {height})"'
    parts.append(
        f'<text class="soft" x="13" y="{height}" text-anchor="middle" {turn}>{escape(y_label)}</text>'
    )
    return "".join(parts)


def _curve(series: Series, index: int, x_scale: Scale, y_scale: Scale) -> str:
    colour = f"var(--c{index % _COLOURS})"
    pixels = [(x_scale(x), y_scale(y)) for x, y in zip(series.xs, series.ys, strict=True)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>']
    if series.points:
        for (x, y), value_x, value_y in zip(pixels, series.xs, series.ys, strict=True):
            tip = f"<title>{escape(series.label)}: {value_x:g} → {number(value_y)}</title>"
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}">{tip}</circle>')
    return "".join(parts)


def _mark(mark: Mark, index: int, x_scale: Scale, y_scale: Scale) -> str:
    colour = f"var(--c{index % _COLOURS})"
    x = x_scale(mark.x)
    tip = f"<title>{escape(mark.label)}: {number(mark.x if mark.y is None else mark.y)}</title>"
    if mark.y is None:
        return (
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}" stroke="{colour}" '
            f'stroke-dasharray="4 3" stroke-width="1.5">{tip}</line>'
        )
    y = y_scale(mark.y)
    points = f"{x:.1f},{y - 6:.1f} {x + 6:.1f},{y:.1f} {x:.1f},{y + 6:.1f} {x - 6:.1f},{y:.1f}"
    return f'<polygon points="{points}" fill="{colour}">{tip}</polygon>'


def _legend(labels: Sequence[str]) -> str:
    """Coloured squares and labels in as many rows as they need; two rows clear the plot."""
    parts, x, y = [], float(_LEFT), 20
    for index, label in enumerate(labels):
        width = 26 + 6.3 * len(label)
        if x + width > WIDTH and x > _LEFT:
            x, y = float(_LEFT), y + 13
        parts.append(f'<rect x="{x:.0f}" y="{y}" width="9" height="9" fill="var(--c{index % _COLOURS})"/>')
        parts.append(f'<text x="{x + 13:.0f}" y="{y + 8}">{escape(label)}</text>')
        x += width
    return "".join(parts)


def _thinned(xs: Sequence[float], ys: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """At most ``_MAX_POINTS`` points, the ends kept: a page of two million gaps would not open."""
    if len(xs) <= _MAX_POINTS:
        return xs, ys
    picks = [round(index * (len(xs) - 1) / (_MAX_POINTS - 1)) for index in range(_MAX_POINTS)]
    return [xs[pick] for pick in picks], [ys[pick] for pick in picks]


def _svg(parts: Sequence[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )
