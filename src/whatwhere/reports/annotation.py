"""What ``annotate`` found -> a summary, a contact sheet, and one page: classes, trust, the doubtful first."""

import heapq
import math
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from whatwhere.annotate.parts import Annotations
from whatwhere.annotate.reading import photo_of
from whatwhere.annotate.rows import Picture
from whatwhere.errors import DataError
from whatwhere.files import aside
from whatwhere.geometry import Box
from whatwhere.images import printable
from whatwhere.reports.page import data_uri, pages
from whatwhere.reports.picture import outline, write

SIDE = 160
"""Pixels of a thumbnail's longer side."""
SHEET = (6, 8)
"""Rows and columns of the contact sheet."""
SHOWN, FAILURES, BINS = 24, 200, 20
"""Doubtful pictures and failures that the page shows; bars of the histogram."""
SHEET_FILE, PAGE = "contact.jpg", "index.html"
_BOX, _INK, _PAPER = (255, 255, 255), (32, 32, 32), (255, 255, 255)


class Summary:
    """What one look through all rows gives.

    Attributes:
        pictures: how many there are.
        failed: that could not be used.
        without: in which nothing speaks for any class that is asked for.
        regions: in all.
        trusted: of at least ``min_trust``.
        copies: pictures whose file is that of an earlier one.
        bars: regions by trust, from 0 to 1.
        reasons: failures by reason.
        failures: the first of them, a line each.
        doubtful: trusted pictures, the least trusted first.
        left_out: pictures that are not trusted, the most trusted first.
        some: for the contact sheet, drawn by their digests.
    """

    def __init__(self, min_trust: float) -> None:
        self.min_trust = min_trust
        self.pictures = self.failed = self.without = self.regions = self.trusted = 0
        self.bars = [0] * BINS
        self.reasons: Counter[str] = Counter()
        self.failures: list[str] = []
        self._digests = array("Q")
        self._of_class: dict[str, list[int]] = {}
        self._doubtful: list[tuple[float, int, Picture]] = []
        self._left_out: list[tuple[float, int, Picture]] = []
        self._some: list[tuple[int, int, Picture]] = []

    def add(self, picture: Picture) -> None:
        """Count a picture, all regions with it."""
        self.pictures += 1
        digest = int(picture.sha256[:16], 16) if picture.sha256 else 0
        if picture.sha256:
            self._digests.append(digest)
        if picture.error is not None:
            self.failed += 1
            self.reasons[picture.error.removeprefix(f"{printable(picture.path)}: ")] += 1
            if len(self.failures) < FAILURES:
                self.failures.append(picture.error)
            return
        if not picture.regions:
            self.without += 1
            return
        for row in picture.regions:
            trust = row.trust or 0.0
            self.regions += 1
            self.bars[min(int(trust * BINS), BINS - 1)] += 1
            self.trusted += trust >= self.min_trust
            counts = self._of_class.setdefault(row.label or "", [0, 0, 0])
            counts[1] += 1
            counts[2] += trust >= self.min_trust
        for label in {row.label or "" for row in picture.regions}:
            self._of_class[label][0] += 1
        best = picture.regions[0].trust or 0.0
        if best >= self.min_trust:
            _keep(self._doubtful, (-best, -picture.image, picture), SHOWN)
        else:
            _keep(self._left_out, (best, -picture.image, picture), SHOWN)
        _keep(self._some, (-digest, -picture.image, picture), SHEET[0] * SHEET[1])

    @property
    def copies(self) -> int:  # noqa: D102
        return len(self._digests) - len(np.unique(np.frombuffer(self._digests, np.uint64)))

    @property
    def doubtful(self) -> list[Picture]:  # noqa: D102
        return [picture for *_, picture in sorted(self._doubtful, key=lambda one: (-one[0], -one[1]))]

    @property
    def left_out(self) -> list[Picture]:  # noqa: D102
        return [picture for *_, picture in sorted(self._left_out, key=lambda one: (-one[0], -one[1]))]

    @property
    def some(self) -> list[Picture]:  # noqa: D102
        return sorted((picture for *_, picture in self._some), key=lambda one: one.image)

    def classes(self) -> list[tuple[str, int, int, int]]:
        """Name, pictures, regions and trusted regions of each class that was found, the most frequent first."""
        found = [(name, one, two, three) for name, (one, two, three) in self._of_class.items()]
        return sorted(found, key=lambda one: (-one[1], one[0]))

    def lines(self) -> list[str]:
        """The numbers, in words."""
        said = [
            f"{self.pictures} pictures, {self.regions} regions, {self.trusted} of them with a trust of at least "
            f"{self.min_trust:g}: these are in the formats, all are in the parts"
        ]
        if self.failed:
            said.append(f"{self.failed} pictures could not be used; the parts say why")
        if self.without:
            said.append(f"in {self.without} pictures nothing speaks for a class")
        if self.copies:
            said.append(f"{self.copies} files are copies of others, and were annotated as they are")
        return said


def _keep(heap: list[Any], entry: Any, most: int) -> None:
    """The largest entries; no two are equal in their first two places."""
    if len(heap) < most:
        heapq.heappush(heap, entry)
    else:
        heapq.heappushpop(heap, entry)


def summary_of(found: Annotations) -> Summary:
    """Look through all rows once; memory is 8 bytes a picture."""
    summary = Summary(found.min_trust)
    for picture in Annotations(found.folder):
        summary.add(picture)
    return summary


def write_annotation_report(found: Annotations, summary: Summary, folder: Path) -> Path:
    """``index.html``, self-contained, and ``contact.jpg``; pictures that have gone are left out of both.

    Returns:
        The page.
    """
    shown = {picture.image: _thumbnail(found, picture) for picture in (*summary.doubtful, *summary.left_out)}
    sheet = contact_sheet(found, summary.some)
    if sheet is not None:
        write(sheet, folder / SHEET_FILE)
    top = max(max(summary.bars), 1)
    page = folder / PAGE
    with aside(page) as written, written.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for text in pages.get_template("annotation.html.j2").generate(
            told=found.told,
            summary=summary,
            classes=summary.classes(),
            bars=[(i / BINS, count, 100 * count / top) for i, count in enumerate(summary.bars)],
            doubtful=_figures(summary.doubtful, shown),
            left_out=_figures(summary.left_out, shown),
            sheet=None if sheet is None else data_uri(sheet),
            reasons=summary.reasons.most_common(20),
        ):
            file.write(text)
    return page


def _figures(pictures: Sequence[Picture], shown: dict[int, Image.Image | None]) -> list[dict[str, Any]]:
    figures = []
    for picture in pictures:
        thumbnail, row = shown[picture.image], picture.regions[0]
        figures.append(
            {
                "picture": data_uri(thumbnail) if thumbnail else None,
                "name": printable(picture.path),
                "label": row.label,
                "trust": row.trust,
                "probability": row.probability,
                "more": len(picture.regions) - 1,
            }
        )
    return figures


def _thumbnail(found: Annotations, picture: Picture) -> Image.Image | None:
    """The picture, with all its boxes; None where it has gone, or has become another."""
    try:
        photo = photo_of(found.told.root, found.item(picture), found.told.settings["max_pixels"])
    except DataError:
        return None
    if photo.size != picture.size:
        return None
    image = Image.fromarray(photo.pixels)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    pen, x, y = ImageDraw.Draw(image), image.width / photo.size[1], image.height / photo.size[0]
    for row in reversed(picture.regions):
        if row.box is not None:
            outline(pen, Box(row.box.x0 * x, row.box.y0 * y, row.box.x1 * x, row.box.y1 * y), _BOX)
    return image


def contact_sheet(found: Annotations, pictures: Sequence[Picture]) -> Image.Image | None:
    """Pictures with their boxes, classes and trust, side by side; None where there are none."""
    thumbnails = [(one, image) for one in pictures if (image := _thumbnail(found, one)) is not None]
    if not thumbnails:
        return None
    columns = min(SHEET[1], math.ceil(math.sqrt(2 * len(thumbnails))))
    rows, cell, line = math.ceil(len(thumbnails) / columns), SIDE + 8, 20
    sheet = Image.new("RGB", (columns * cell, rows * (cell + line)), _PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for i, (picture, image) in enumerate(thumbnails):
        x, y = i % columns * cell, i // columns * (cell + line)
        sheet.paste(image, (x + (cell - image.width) // 2, y + (cell - image.height) // 2))
        row = picture.regions[0]
        text, trust = row.label or "", f" {row.trust:.2f}"
        while pen.textlength(text + trust, font=font) > cell - 8 and len(text) > 2:
            text = text[:-2].rstrip() + "…"
        pen.text((x + 4, y + cell), text + trust, fill=_INK, font=font)
    return sheet
