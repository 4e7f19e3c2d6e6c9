"""Curves as inline SVG: nothing to load, readable in light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 14, 26
MOST = 400  # points of a curve; more are averaged
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """A line of a chart; `dots` marks its points."""

    name: str
    points: Points
    dots: bool = False


def chart(title: str, curves: Sequence[Curve]) -> str:
    """A figure with its axes, curves and, where there are several, their names; empty without a finite point.

    The highest 0.5% of points are cut off: the first steps' spikes would flatten the rest.
    """
    curves = [Curve(c.name, _thin([p for p in c.points if math.isfinite(p[1])]), c.dots) for c in curves]
    curves = [c for c in curves if c.points]
    if not curves:
        return ""
    scale = _Scale([p for c in curves for p in c.points])
    body = [*scale.grid()]
    for i, curve in enumerate(curves):
        places = [scale.place(p) for p in curve.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        body.append(f"<polyline class='curve c{i % 6}' points='{path}'/>")
        if curve.dots:
            body += [
                f"<circle class='dot c{i % 6}' cx={x:.1f} cy={y:.1f} r=3><title>{p[0]:,.0f}: {p[1]:.4g}</title></circle>"
                for (x, y), p in zip(places, curve.points, strict=True)
            ]
    names = "".join(f"<span class='key c{i % 6}'>{escape(c.name)}</span>" for i, c in enumerate(curves))
    last = f"<b>{figure(curves[0].points[-1][1])}</b>" if len(curves) == 1 else names
    return (
        f"<figure><figcaption>{escape(title)} {last}</figcaption>"
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role=img aria-label='{escape(title)}'>{''.join(body)}</svg></figure>"
    )


class _Scale:
    """From values to places in the picture."""

    def __init__(self, points: Points) -> None:
        xs, ys = [p[0] for p in points], sorted(p[1] for p in points)
        self.x0, self.x1 = min(xs), max(xs)
        self.y0, self.y1 = ys[0], ys[min(len(ys) - 1, int(len(ys) * 0.995))]
        margin = (self.y1 - self.y0) * 0.05 or 0.5 * abs(self.y0) or 0.5
        self.y0, self.y1 = self.y0 - margin, self.y1 + margin

    def place(self, p: tuple[float, float]) -> tuple[float, float]:
        across = (p[0] - self.x0) / ((self.x1 - self.x0) or 1)
        up = (min(max(p[1], self.y0), self.y1) - self.y0) / (self.y1 - self.y0)
        return LEFT + (WIDTH - LEFT - RIGHT) * across, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * up

    def grid(self) -> list[str]:
        """Lines and labels at round values."""
        out = []
        for value in round_values(self.y0, self.y1, 5):
            y = self.place((self.x0, value))[1]
            out.append(f"<line class=grid x1={LEFT} x2={WIDTH - RIGHT} y1={y:.1f} y2={y:.1f} />")
            out.append(f"<text x={LEFT - 6} y={y + 4:.1f} text-anchor=end>{figure(value)}</text>")
        for value in round_values(self.x0, self.x1, 6):
            x = self.place((value, 1.0))[0]
            out.append(f"<text x={x:.1f} y={HEIGHT - 8} text-anchor=middle>{value:,.0f}</text>")
        return out


def round_values(low: float, high: float, about: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between low and high, about so many."""
    if high <= low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step) + 1)]


def figure(value: float) -> str:
    """Four digits at most, thousands grouped."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _thin(points: Points) -> Points:
    """At most MOST points, by means of neighbours."""
    step = -(-len(points) // MOST)
    if step <= 1:
        return points
    groups = [points[i : i + step] for i in range(0, len(points), step)]
    return [(g[-1][0], sum(p[1] for p in g) / len(g)) for g in groups]
