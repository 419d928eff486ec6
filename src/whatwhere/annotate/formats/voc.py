"""Pascal VOC's layout (Everingham et al. 2010): an XML file a picture; pixels count from 1, the last one inside."""

from pathlib import Path
from xml.etree import ElementTree

from whatwhere.annotate.formats.beside import Pictures
from whatwhere.annotate.parts import Annotations
from whatwhere.annotate.rows import Picture, Row


def write(found: Annotations, folder: Path) -> None:
    """``Annotations/x.xml``, ``JPEGImages/x.jpg``, ``ImageSets/Main/trainval.txt``."""
    pictures = Pictures(found, folder / "JPEGImages", flat=True)
    labels, sets = folder / "Annotations", folder / "ImageSets" / "Main"
    sets.mkdir(parents=True)
    labels.mkdir()
    with (sets / "trainval.txt").open("w", encoding="utf-8") as listed:
        for picture in found:
            if picture.size is None:
                continue
            image, label = pictures.put(picture, labels, ".xml")
            label.write_bytes(ElementTree.tostring(_annotation(picture, image.name), encoding="utf-8"))
            listed.write(f"{label.stem}\n")


def _annotation(picture: Picture, name: str) -> ElementTree.Element:
    assert picture.size is not None
    root = ElementTree.Element("annotation")
    _text(root, "folder", "JPEGImages")
    _text(root, "filename", name)
    size = ElementTree.SubElement(root, "size")
    for word, value in (("width", picture.size[1]), ("height", picture.size[0]), ("depth", 3)):
        _text(size, word, str(value))
    _text(root, "segmented", "0")
    for row in picture.regions:
        root.append(_object(row))
    ElementTree.indent(root)
    return root


def _object(row: Row) -> ElementTree.Element:
    assert row.box is not None
    one = ElementTree.Element("object")
    for word, value in (("name", row.label or ""), ("pose", "Unspecified"), ("truncated", "0"), ("difficult", "0")):
        _text(one, word, value)
    box = ElementTree.SubElement(one, "bndbox")
    edges = (("xmin", row.box.x0 + 1), ("ymin", row.box.y0 + 1), ("xmax", row.box.x1), ("ymax", row.box.y1))
    for word, edge in edges:
        _text(box, word, f"{edge:.12g}")
    return one


def _text(parent: ElementTree.Element, word: str, value: str) -> None:
    ElementTree.SubElement(parent, word).text = value
