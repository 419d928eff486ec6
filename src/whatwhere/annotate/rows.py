"""Explanations -> rows: a region each, plain values, one schema."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any

from whatwhere.annotate.reading import Failed
from whatwhere.annotate.sources import Item
from whatwhere.errors import extra
from whatwhere.explanation import Explanation
from whatwhere.geometry import Box
from whatwhere.regions import rle
from whatwhere.regions.components import components
from whatwhere.types import Mask


@dataclass(frozen=True, kw_only=True)
class Row:
    r"""A region of a picture; or a picture where nothing was found, or that could not be used.

    Attributes:
        image: the picture's number in the source.
        path: its name under the source's root; bytes that are no UTF-8 are written as \xff.
        sha256: of the file; None where it could not be read.
        height: of the upright picture, in pixels, as all that follows; None where it could not be used.
        width: as height.
        class_index: of the class.
        label: its name.
        probability: of the class, in [0, 1].
        trust: in [0, 1], how far the region is to be trusted.
        x0: left edge of the box; edges of pixels, half-open. None where nothing speaks for the class.
        y0: upper edge.
        x1: right edge.
        y1: lower edge.
        mask: the region's pixels, as COCO's uncompressed run lengths.
        method: name of the map method.
        model: digest of the model, as in ``run.json``.
        error: why the picture could not be used.
    """

    image: int
    path: str
    sha256: str | None = None
    height: int | None = None
    width: int | None = None
    class_index: int | None = None
    label: str | None = None
    probability: float | None = None
    trust: float | None = None
    x0: float | None = None
    y0: float | None = None
    x1: float | None = None
    y1: float | None = None
    mask: dict[str, Any] | None = None
    method: str
    model: str
    error: str | None = None

    @property
    def box(self) -> Box | None:
        """Around the region."""
        if self.x0 is None or self.y0 is None or self.x1 is None or self.y1 is None:
            return None
        return Box(self.x0, self.y0, self.x1, self.y1)

    @property
    def pixels(self) -> Mask | None:
        """(H W): the region's pixels."""
        return None if self.mask is None else rle.decode(self.mask)


@dataclass(frozen=True)
class Picture:
    """A picture and the regions that were found in it; what ``annotate.formats`` take.

    Attributes:
        image: its number in the source.
        path: its name under the source's root.
        sha256: of the file.
        size: (H, W); None where it could not be used.
        regions: rows with a box, most trusted first.
        error: why it could not be used.
    """

    image: int
    path: str
    sha256: str | None
    size: tuple[int, int] | None
    regions: tuple[Row, ...]
    error: str | None


def rows_of(image: int, item: Item, sha256: str, seen: Sequence[Explanation], model: str) -> list[Row]:
    """The rows of one picture: a region each, largest first; a class without regions has one row without a box.

    A region that is not its class's largest has as much of the trust as its area is of the largest's.
    """
    rows = []
    for one in seen:
        told: dict[str, Any] = {
            "image": image,
            "path": item.path,
            "sha256": sha256,
            "height": one.size[0],
            "width": one.size[1],
            "class_index": one.index,
            "label": one.label,
            "probability": one.probability,
            "method": one.method,
            "model": model,
        }
        trust, parts = one.trust, components(one.mask)
        if not parts.boxes:
            rows.append(Row(**told, trust=0.0))
        for i, (box, area) in enumerate(zip(parts.boxes, parts.areas, strict=True)):
            x0, y0, x1, y1 = box.to_list()
            edges: dict[str, Any] = {"x0": float(x0), "y0": float(y0), "x1": float(x1), "y1": float(y1)}
            share = trust * (area / parts.areas[0])
            rows.append(Row(**told, **edges, trust=share, mask=rle.encode(parts.mask(i))))
    return rows


def failed_row(image: int, item: Item, failed: Failed, method: str, model: str) -> Row:
    """The row of a picture that could not be used."""
    digest = failed.digest or None
    return Row(image=image, path=item.path, sha256=digest, method=method, model=model, error=failed.error)


def schema() -> Any:
    """Of the Parquet parts, a ``pyarrow.Schema``; its names are those of ``Row``."""
    with extra("scale", "whatwhere annotate"):
        import pyarrow as pa
    runs = pa.list_(pa.field("element", pa.int32(), nullable=False))
    kinds = {
        "image": pa.int64(),
        "height": pa.int32(),
        "width": pa.int32(),
        "class_index": pa.int32(),
        "mask": pa.struct([("size", runs), ("counts", runs)]),
    } | dict.fromkeys(("probability", "trust", "x0", "y0", "x1", "y1"), pa.float64())
    never = {"image", "path", "method", "model"}
    return pa.schema(
        [pa.field(one.name, kinds.get(one.name, pa.string()), one.name not in never) for one in fields(Row)]
    )


def table_of(rows: Iterable[Row]) -> Any:
    """Rows as a ``pyarrow.Table``."""
    with extra("scale", "whatwhere annotate"):
        import pyarrow as pa
    return pa.Table.from_pylist([vars(row) for row in rows], schema())


def rows_in(table: Any) -> Iterator[Row]:
    """The rows of a table."""
    for told in table.to_pylist():
        yield Row(**told)


def pictures_of(rows: Iterable[Row], min_trust: float = 0.0) -> Iterator[Picture]:
    """Rows in order -> pictures, with the regions that are trusted so far."""
    for image, group in groupby(rows, lambda row: row.image):
        several = list(group)
        first = several[0]
        found = [row for row in several if row.box is not None and row.trust is not None and row.trust >= min_trust]
        found.sort(key=lambda row: -(row.trust or 0.0))
        size = None if first.height is None or first.width is None else (first.height, first.width)
        yield Picture(image, first.path, first.sha256, size, tuple(found), first.error)
