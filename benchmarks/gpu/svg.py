"""A picture of bars as SVG, without any library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, LABELS, RIGHT = 860, 230, 150
ROW, BAR, GAP, TOP, BOTTOM = 30, 11, 3, 64, 26
OURS, THEIRS, LINES, TEXT, BACKGROUND = "#2563a8", "#d98a2b", "#d4d8dd", "#22262b", "#ffffff"


@dataclass(frozen=True)
class Bar:
    """A share from 0 to 1, and what is written behind it."""

    share: float
    note: str


@dataclass(frozen=True)
class Bars:
    """A label with our bar and, where there is one, theirs under it."""

    label: str
    ours: Bar
    theirs: Bar | None = None


def bar_chart(title: str, subtitle: str, rows: Sequence[Bars], ours: str, theirs: str) -> str:
    """Horizontal bars on a scale from 0 to 100 %; a longer one ends at the edge and says its number."""
    height = TOP + ROW * len(rows) + BOTTOM
    span = WIDTH - LABELS - RIGHT
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    style = f'font-family="sans-serif" font-size="12" fill="{TEXT}" role="img" aria-label="{escape(title, quote=True)}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>',
        f'<rect width="{WIDTH}" height="{height}" fill="{BACKGROUND}"/>',
        _text(16, 22, title, 'font-size="15" font-weight="bold"'),
        _text(16, 40, subtitle),
    ]
    bottom = TOP + ROW * len(rows)
    for percent in range(0, 101, 20):
        x = LABELS + span * percent / 100
        parts.append(f'<line x1="{x:.1f}" y1="{TOP - 6}" x2="{x:.1f}" y2="{bottom}" stroke="{LINES}"/>')
        parts.append(_text(x, bottom + 16, f"{percent} %", 'text-anchor="middle" font-size="11"'))
    for i, row in enumerate(rows):
        y = TOP + ROW * i
        parts.append(_text(LABELS - 8, y + 15, row.label, 'text-anchor="end"'))
        bars = [(row.ours, OURS), *([(row.theirs, THEIRS)] if row.theirs else [])]
        start = y + (ROW - 6 - len(bars) * BAR - (len(bars) - 1) * GAP) / 2
        for bar, color in bars:
            length = span * min(1.0, max(0.0, bar.share))
            parts.append(
                f'<rect x="{LABELS}" y="{start:.1f}" width="{length:.1f}" height="{BAR}" rx="2" fill="{color}"/>'
            )
            note = f"{bar.share:.0%}, {bar.note}"
            parts.append(_text(LABELS + length + 5, start + BAR - 2, note, 'font-size="10"'))
            start += BAR + GAP
    legend = [(ours, OURS), *([(theirs, THEIRS)] if any(row.theirs for row in rows) else [])]
    x = float(WIDTH - 16)
    for name, color in reversed(legend):
        x -= 8 * len(name)
        parts.append(_text(x, 22, name))
        parts.append(f'<rect x="{x - 16:.1f}" y="12" width="11" height="11" rx="2" fill="{color}"/>')
        x -= 34
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, attributes: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}"{" " if attributes else ""}{attributes}>{escape(text)}</text>'
