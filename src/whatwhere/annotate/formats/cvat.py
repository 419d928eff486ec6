"""CVAT for images 1.1, as XML: a box and a mask a region, in one group; masks are run lengths inside their box."""

import re
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

import numpy as np

from whatwhere.annotate.parts import Annotations
from whatwhere.annotate.rows import Picture, Row
from whatwhere.types import Mask

FILE = "annotations.xml"
_NEVER = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
"""What XML has no way to say."""


def write(found: Annotations, folder: Path) -> None:
    """``annotations.xml``; pictures are known by their names under the source's root. Trust is an attribute."""
    with (folder / FILE).open("w", encoding="utf-8") as file:
        file.write('<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n')
        file.write(_said(_meta(list(dict.fromkeys(found.told.labels.values())), found.told.images)))
        for picture in found:
            if picture.size is not None:
                file.write(_said(_image(picture, picture.size)))
        file.write("</annotations>\n")


def _said(element: Element) -> str:
    return ElementTree.tostring(element, encoding="unicode") + "\n"


def _meta(labels: list[str], size: int) -> Element:
    meta = Element("meta")
    task = SubElement(meta, "task")
    SubElement(task, "size").text = str(size)
    group = SubElement(task, "labels")
    for name in labels:
        label = SubElement(group, "label")
        SubElement(label, "name").text = name
        trust = SubElement(SubElement(label, "attributes"), "attribute")
        for word, value in (("name", "trust"), ("mutable", "False"), ("input_type", "text"), ("default_value", "")):
            SubElement(trust, word).text = value
        SubElement(trust, "values")
    return meta


def _image(picture: Picture, size: tuple[int, int]) -> Element:
    named = {
        "id": str(picture.image),
        "name": _NEVER.sub("?", picture.path),
        "width": str(size[1]),
        "height": str(size[0]),
    }
    image = Element("image", named)
    for group, row in enumerate(picture.regions, 1):
        for word, told in (("box", _edges(row)), ("mask", _runs(row))):
            both = {"label": row.label or "", "source": "auto", "occluded": "0", "z_order": "0"}
            shape = SubElement(image, word, both | {"group_id": str(group)} | told)
            SubElement(shape, "attribute", name="trust").text = f"{row.trust:.3f}"
    return image


def _edges(row: Row) -> dict[str, str]:
    return {"xtl": f"{row.x0:.2f}", "ytl": f"{row.y0:.2f}", "xbr": f"{row.x1:.2f}", "ybr": f"{row.y1:.2f}"}


def _runs(row: Row) -> dict[str, str]:
    assert row.box is not None
    assert row.pixels is not None
    left, top, right, bottom = (int(edge) for edge in row.box.to_list())
    inside = {"left": left, "top": top, "width": right - left, "height": bottom - top}
    told = ", ".join(map(str, runs(row.pixels[top:bottom, left:right])))
    return {"rle": told} | {word: str(value) for word, value in inside.items()}


def runs(mask: Mask) -> list[int]:
    """Lengths of runs row by row, beginning with the pixels that are off."""
    flat = mask.ravel()
    edges = np.flatnonzero(np.diff(flat, prepend=False))
    found: list[int] = np.diff(edges, prepend=0, append=flat.size).tolist()
    return found
