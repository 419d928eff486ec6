"""A classifier's stability -> a table, and a fragment of a page with the table and its plot."""

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

from whatwhere.inspection.stability import Row, Stability
from whatwhere.inspection.views import Transform
from whatwhere.reports.page import pages

LINES = {
    "consistency": ("same class", "#2a7de1"),
    "change": ("change of probability", "#d9480f"),
    "equivariance": ("map changes likewise: correlation", "#2b8a3e"),
    "follows": ("map follows: share", "#9c36b5"),
}
"""What is measured of a transform, what it is called, and its colour."""
BOUNDS = (-0.5, 1.5)
"""Of the plot; what lies beyond is drawn at its edge."""


def stability_csv(found: Stability) -> str:
    """The table as CSV, a row for each transform; what is not defined is left empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["kind", "direction", "strength", *LINES])
    for row in found.rows:
        kind, strength, direction = row.transform
        numbers = [getattr(row, name) for name in LINES]
        writer.writerow([kind, direction, f"{strength:g}", *("" if math.isnan(x) else f"{x:.4f}" for x in numbers)])
    return file.getvalue()


def stability_fragment(found: Stability) -> str:
    """One ``<section>`` of HTML with a plot and the table, for any page; it needs nothing beside it."""
    rows = [(said(row.transform), [_number(getattr(row, name)) for name in LINES]) for row in found.rows]
    return pages.get_template("stability.html.j2").render(
        found=found, rows=rows, lines=list(LINES.values()), panels=_panels(found.rows)
    )


def said(one: Transform) -> str:
    """A transform as people read it, as in: shift right 4 px, scale x 0.8."""
    strength = {"shift": f"{one.strength:g} px", "rotation": f"{one.strength:g}°"}.get(
        one.kind, f"x {one.strength:g}"
    )
    return " ".join(word for word in (one.kind, one.direction, strength) if word)


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"


def _panels(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A panel for each kind and direction: lines over the strength, in a square of 100."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.transform.kind, row.transform.direction), []).append(row)
    known: list[float] = [value for row in rows for name in LINES if not math.isnan(value := getattr(row, name))]
    # the nearest halves around what there is
    low = math.floor(2 * max(min(0.0, *known), BOUNDS[0])) / 2
    high = math.ceil(2 * min(max(1.0, *known), BOUNDS[1])) / 2

    def height(value: float) -> float:
        return 100 * (high - min(max(value, low), high)) / (high - low)

    grid = [(height(value / 2), value / 2) for value in range(round(2 * low), round(2 * high) + 1)]
    panels = []
    for (kind, direction), own in groups.items():
        own.sort(key=lambda row: row.transform.strength)
        # doubling a factor or a shift is one step, whatever it doubles
        at = [row.transform.strength if kind == "rotation" else math.log(row.transform.strength) for row in own]
        xs = [100 * (x - at[0]) / ((at[-1] - at[0]) or 1.0) for x in at]
        lines = []
        for name, (_, colour) in LINES.items():
            values = [getattr(row, name) for row in own]
            points = [(x, height(value)) for x, value in zip(xs, values, strict=True) if not math.isnan(value)]
            lines.append({"colour": colour, "points": points})
        ticks = [(x, row.transform.strength) for x, row in zip(xs, own, strict=True)]
        panels.append({"name": f"{kind} {direction}".strip(), "lines": lines, "ticks": ticks, "grid": grid})
    return panels
