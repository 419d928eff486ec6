"""Explanations -> a folder of pictures and one self-contained page."""

import base64
import io
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from whatwhere.explanation import Explanation
from whatwhere.files import aside
from whatwhere.images import printable
from whatwhere.reports.picture import draw, write

pages = Environment(
    loader=PackageLoader("whatwhere", "reports"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)


def write_report(seen: Iterable[list[Explanation]], folder: Path, model: str, *, keep: Collection[Path] = ()) -> Path:
    """A picture for each image and ``index.html`` with all of them inside, written as they come.

    Args:
        seen: for each image its explanations.
        folder: made where it is missing; pictures of the same names are written over.
        model: named on the page.
        keep: files that no picture is written over, the photographs themselves.

    Returns:
        The page. It appears when the last image is done; pictures appear one by one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "index.html"
    with aside(page) as written, written.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for text in pages.get_template("page.html.j2").generate(entries=_entries(seen, folder, keep), model=model):
            file.write(text)
    return page


def _entries(seen: Iterable[list[Explanation]], folder: Path, keep: Collection[Path]) -> Iterator[dict[str, Any]]:
    here = folder.resolve()
    taken = {file.name for file in map(Path.resolve, keep) if file.parent == here}
    for explanations in seen:
        picture = draw(explanations)
        stem = Path(explanations[0].source).stem[:80] or "image"
        name, again = f"{stem}.png", 1
        while name in taken:
            again += 1
            name = f"{stem}-{again}.png"
        taken.add(name)
        write(picture, folder / name)
        yield {
            "source": explanations[0].source,
            "seen": explanations,
            "picture": data_uri(picture),
            "name": printable(name),
        }


def data_uri(picture: Image.Image) -> str:
    """The picture itself as an address, as JPEG."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
