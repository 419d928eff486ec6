"""The pictures themselves beside their labels, for tools that want them in one folder."""

import io
import os
import re
import shutil
from pathlib import Path

from whatwhere.annotate.parts import Annotations
from whatwhere.annotate.reading import opened
from whatwhere.annotate.rows import Picture
from whatwhere.annotate.sources import Item, LocalFiles, files_under
from whatwhere.errors import DataError

_ODD = re.compile(r"[^\w.+@ -]")
LONGEST = 200
"""Bytes of a name; file systems take 255, and a number and a suffix may follow."""


class Pictures:
    """The pictures of a run, given names that are unique without their suffix: ``a/b.jpg``, ``a/b-2.png``."""

    def __init__(self, found: Annotations, images: Path, *, flat: bool = False) -> None:
        """Where they are to be.

        Args:
            found: the run.
            images: the folder, which is made.
            flat: all in one folder, with ``_`` in the place of slashes, and of spaces, which end a name in lists.
        """
        self._found, self._files, self._flat = found, files_under(found.told.root), flat
        self._images, self._again = images, dict[Path, int]()
        images.mkdir(parents=True, exist_ok=True)

    def put(self, picture: Picture, labels: Path, suffix: str) -> tuple[Path, Path]:
        """Link a file of the disk, or copy what lies in an archive or a store.

        Args:
            picture: the picture.
            labels: the folder of its label file.
            suffix: of its label file.

        Returns:
            The picture and its label file; neither's name was there before.
        """
        item = self._found.item(picture)
        parts = clean(item.name).split("/")
        if self._flat:
            parts = ["_".join(parts).replace(" ", "_")]
        # readers take labels/x.txt for what lies in the last folder that is called images
        place = Path(*(_short("images_" if part == "images" else part) for part in parts))
        stem = place.with_suffix("")
        again = self._again.get(stem, 0) + 1
        label = labels / (f"{stem}-{again}{suffix}" if again > 1 else f"{stem}{suffix}")
        while label.exists():
            again += 1
            label = labels / f"{stem}-{again}{suffix}"
        self._again[stem] = again
        image = self._images / label.relative_to(labels).with_suffix(place.suffix.lower() or ".jpg")
        for folder in (label.parent, image.parent):
            folder.mkdir(parents=True, exist_ok=True)
        label.touch()
        if isinstance(self._files, LocalFiles) and not item.shard:
            image.symlink_to(self._files.path(item.name))
        else:
            self._copy(item, image)
        return image, label

    def _copy(self, item: Item, image: Path) -> None:
        try:
            file: io.BufferedIOBase = opened(item, self._files)[0]
        except (OSError, DataError):
            file = io.BytesIO()  # it has gone since; its labels stay
        with file, image.open("wb") as out:
            shutil.copyfileobj(file, out)


def clean(name: str) -> str:
    """A name that any tool and any file system takes, in the same folders."""
    parts = [_ODD.sub("_", part) for part in os.fsencode(name).decode("utf-8", "replace").split("/")]
    return "/".join(part.strip() or "_" for part in parts if part not in {"", ".", ".."}) or "_"


def _short(name: str) -> str:
    data, suffix = name.encode(), Path(name).suffix[-16:]
    if len(data) <= LONGEST:
        return name
    return data[: LONGEST - len(suffix.encode())].decode("utf-8", "ignore") + suffix
