"""CVAT for images 1.1, as XML: a box and a mask a region, in one group; masks are run lengths inside their box."""

from pathlib import Path
from xml.sax.saxutils import XMLGenerator

import numpy as np

from whatwhere.annotate.parts import Annotations
from whatwhere.annotate.rows import Row
from whatwhere.types import Mask

FILE = "annotations.xml"


def write(found: Annotations, folder: Path) -> None:
    """``annotations.xml``; pictures are known by their names under the source's root. Trust is an attribute."""
    with (folder / FILE).open("w", encoding="utf-8") as file:
        xml = XMLGenerator(file, "utf-8", short_empty_elements=True)
        xml.startDocument()
        xml.startElement("annotations", {})
        _text(xml, "version", "1.1")
        _meta(xml, list(dict.fromkeys(found.told.labels.values())), found.told.images)
        for picture in found:
            if picture.size is None:
                continue
            height, width = picture.size
            named = {"id": str(picture.image), "name": picture.path, "width": str(width), "height": str(height)}
            xml.characters("\n")
            xml.startElement("image", named)
            for number, row in enumerate(picture.regions, 1):
                _region(xml, row, number)
            xml.endElement("image")
        xml.endElement("annotations")
        xml.endDocument()


def _meta(xml: XMLGenerator, labels: list[str], size: int) -> None:
    xml.startElement("meta", {})
    xml.startElement("task", {})
    _text(xml, "size", str(size))
    xml.startElement("labels", {})
    for label in labels:
        xml.startElement("label", {})
        _text(xml, "name", label)
        xml.startElement("attributes", {})
        xml.startElement("attribute", {})
        for word, value in (("name", "trust"), ("mutable", "False"), ("input_type", "text"), ("default_value", "")):
            _text(xml, word, value)
        _text(xml, "values", "")
        xml.endElement("attribute")
        xml.endElement("attributes")
        xml.endElement("label")
    xml.endElement("labels")
    xml.endElement("task")
    xml.endElement("meta")


def _region(xml: XMLGenerator, row: Row, group: int) -> None:
    assert row.box is not None
    assert row.pixels is not None
    both = {
        "label": row.label or "",
        "source": "auto",
        "occluded": "0",
        "z_order": "0",
        "group_id": str(group),
    }
    edges = {"xtl": row.box.x0, "ytl": row.box.y0, "xbr": row.box.x1, "ybr": row.box.y1}
    left, top, right, bottom = (int(edge) for edge in row.box.to_list())
    inside = {
        "rle": ", ".join(map(str, runs(row.pixels[top:bottom, left:right]))),
        "left": str(left),
        "top": str(top),
        "width": str(right - left),
        "height": str(bottom - top),
    }
    for word, told in (("box", {name: f"{edge:.2f}" for name, edge in edges.items()}), ("mask", inside)):
        xml.startElement(word, both | told)
        xml.startElement("attribute", {"name": "trust"})
        xml.characters(f"{row.trust:.3f}")
        xml.endElement("attribute")
        xml.endElement(word)


def runs(mask: Mask) -> list[int]:
    """Lengths of runs row by row, beginning with the pixels that are off."""
    flat = mask.ravel()
    edges = np.flatnonzero(np.diff(flat, prepend=False))
    found: list[int] = np.diff(edges, prepend=0, append=flat.size).tolist()
    return found


def _text(xml: XMLGenerator, word: str, value: str) -> None:
    xml.startElement(word, {})
    xml.characters(value)
    xml.endElement(word)
