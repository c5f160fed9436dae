# SPDX-License-Identifier: MIT
"""Honest latency over time as an SVG that reads on white and on black: no background, colours of middle brightness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log10
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT = 860, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 46, 42
_INK = "#808080"
_COLOURS = ("#2f8fd8", "#d9822b", "#3fa45b", "#b65fc0")
_FLOOR, _CEILING = 0.001, 30.0
_TICKS = ((0.01, "10 ms"), (0.1, "100 ms"), (1.0, "1 s"), (10.0, "10 s"))


def draw(
    series: Mapping[str, Sequence[tuple[float, float, bool]]],
    *,
    seconds: float,
    siege: tuple[float, float],
    bounds: Mapping[str, float],
    title: str,
) -> str:
    """`series`: by name, points of (when, how long, accepted) in seconds from the beginning. A refusal is a cross."""
    across = _WIDTH - _LEFT - _RIGHT
    down = _HEIGHT - _TOP - _BOTTOM

    def x(when: float) -> float:
        return _LEFT + across * min(max(when / seconds, 0.0), 1.0)

    def y(long: float) -> float:
        share = log10(min(max(long, _FLOOR), _CEILING) / _FLOOR) / log10(_CEILING / _FLOOR)
        return _TOP + down * (1 - share)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12" '
        f'fill="{_INK}" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect x="{x(siege[0]):.1f}" y="{_TOP}" width="{x(siege[1]) - x(siege[0]):.1f}" height="{down}" '
        f'fill="#d04040" fill-opacity="0.12"/>',
        f'<text x="{(x(siege[0]) + x(siege[1])) / 2:.1f}" y="{_TOP + 16}" text-anchor="middle">under attack</text>',
    ]
    for value, label in _TICKS:
        out.append(
            f'<path d="M{_LEFT} {y(value):.1f}H{_WIDTH - _RIGHT}" stroke="{_INK}" stroke-opacity="0.35"/>'
            f'<text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{label}</text>'
        )
    for label, bound in bounds.items():
        out.append(
            f'<path d="M{_LEFT} {y(bound):.1f}H{_WIDTH - _RIGHT}" stroke="#d04040" stroke-dasharray="6 4"/>'
            f'<text x="{_WIDTH - _RIGHT - 4}" y="{y(bound) - 4:.1f}" text-anchor="end">{escape(label)}</text>'
        )
    step = 10 if seconds <= 150 else 60
    for when in range(0, int(seconds) + 1, step):
        out.append(f'<text x="{x(when):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{when} s</text>')
    for number, (name, points) in enumerate(series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        # One path for all dots of a client: a line of no length with round ends.
        dots = "".join(f"M{x(when):.1f} {y(long):.1f}h0" for when, long, accepted in points if accepted)
        if dots:
            out.append(f'<path d="{dots}" stroke="{colour}" stroke-width="4" stroke-linecap="round" fill="none"/>')
        crosses = "".join(
            f"M{x(when) - 3:.1f} {y(long) - 3:.1f}l6 6m0 -6l-6 6" for when, long, accepted in points if not accepted
        )
        if crosses:
            out.append(f'<path d="{crosses}" stroke="{colour}" stroke-width="1.5" fill="none"/>')
        left = _LEFT + number * 265
        out.append(
            f'<circle cx="{left + 4}" cy="28" r="4" fill="{colour}"/><text x="{left + 13}" y="32">{escape(name)}</text>'
        )
    out.append(f'<text x="{_LEFT}" y="13">{escape(title)}</text>')
    out.append("</svg>")
    return "\n".join(out) + "\n"
