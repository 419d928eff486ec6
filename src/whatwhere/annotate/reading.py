"""Item -> what the network takes of a picture, or why not. This is what worker processes do."""

import hashlib
import io
import os
import re
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from whatwhere.annotate.sources import Files, Item, files_under
from whatwhere.errors import DataError, WhatWhereError
from whatwhere.images import MAX_PIXELS, Photo, Preprocess, photo_in, printable
from whatwhere.types import Pixels, Size

MAX_BYTES = 2**30
"""Files of more are not read from stores and archives, where all of one is held at once."""
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
CHUNK = 2**20


@dataclass(frozen=True, eq=False)
class Read:
    """A picture as the network takes it.

    Attributes:
        digest: SHA-256 of the file, in hexadecimal.
        size: (H, W) of the upright picture.
        resized: (y x d) of the network's input, without padding.
        pixels: (H W 3) of the upright picture, where the reader keeps them.
    """

    digest: str
    size: Size
    resized: UInt8[np.ndarray, "y x d"]
    pixels: Pixels | None = None


@dataclass(frozen=True)
class Failed:
    """A picture that cannot be used.

    Attributes:
        error: why, in one line, with its name.
        digest: SHA-256 of the file; empty where it could not be read.
    """

    error: str
    digest: str = ""


Answer = Read | Failed


@dataclass(frozen=True)
class Reader:
    """Reads items of one source, for one network.

    Attributes:
        root: of the source.
        preprocess: of the network.
        max_pixels: pictures of more are refused before they are decoded.
        keeps: whether pixels go along, for heat that they refine.
    """

    root: str
    preprocess: Preprocess
    max_pixels: int = MAX_PIXELS
    keeps: bool = False

    def __call__(self, item: Item) -> Read | Failed:
        """Whatever a file holds, this answers."""
        digest = ""
        try:
            name, (file, said) = printable(item.name), opened(item, files_under(self.root))
            with file:
                digest = _digest(file)
                photo = photo_in(file, name, self.max_pixels)
                if said is not None and said != _state(file):
                    raise DataError(f"{name}: the file was written to while it was read")
            resized, _ = self.preprocess.resized(photo)
            return Read(digest, photo.size, resized, photo.pixels if self.keeps else None)
        except DataError as error:
            return Failed(_line(str(error), item), digest)
        except OSError as error:
            return Failed(_line(error.strerror or str(error), item), digest)
        except MemoryError:
            return Failed(_line("there is not enough memory for it", item), digest)
        except WhatWhereError:  # no picture's fault
            raise
        except Exception as error:  # what stores and decoders raise is as various as what they are given
            return Failed(_line(f"cannot be read: {type(error).__name__}: {error}", item), digest)


def photo_of(root: str, item: Item, max_pixels: int = MAX_PIXELS) -> Photo:
    """A picture of a source.

    Raises:
        DataError: it cannot be read any more.
    """
    try:
        file, _ = opened(item, files_under(root))
        with file:
            return photo_in(file, printable(item.name), max_pixels)
    except OSError as error:
        raise DataError(f"{printable(item.name)}: {error.strerror or error}") from error


def seen_as(item: Item, read: Read) -> Photo:
    """A photo of that size and name; without its pixels, where they stayed with who read them."""
    pixels = np.broadcast_to(np.uint8(0), (*read.size, 3)) if read.pixels is None else read.pixels
    return Photo(pixels, printable(item.name))


def opened(item: Item, files: Files) -> tuple[io.BufferedIOBase, tuple[int, int] | None]:
    """A file that can be sought in, and its state, where that can change."""
    if item.error:
        raise DataError(item.error)
    if item.shard:
        if not 0 < item.size <= MAX_BYTES:
            raise DataError(f"wanted 1 to {MAX_BYTES} bytes, got {item.size}" if item.size else "the file is empty")
        data = files.part(item.shard, item.offset, item.size)
        if len(data) != item.size:
            raise DataError(f"the archive has changed: wanted {item.size} bytes, got {len(data)}")
        return io.BytesIO(data), None
    file = files.open(item.name)
    if isinstance(file, io.BufferedReader) and _has_descriptor(file):
        return file, _state(file)
    with file:
        data = file.read(MAX_BYTES + 1)
    if not 0 < len(data) <= MAX_BYTES:
        raise DataError(f"wanted at most {MAX_BYTES} bytes, got more" if data else "the file is empty")
    return io.BytesIO(data), None


def _has_descriptor(file: io.BufferedIOBase) -> bool:
    try:
        file.fileno()
    except OSError:
        return False
    return True


def _state(file: io.BufferedIOBase) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def _digest(file: io.BufferedIOBase) -> str:
    found = hashlib.sha256()
    while chunk := file.read(CHUNK):
        found.update(chunk)
    file.seek(0)
    return found.hexdigest()


def _line(why: str, item: Item) -> str:
    """One line that begins with the name and is the same in every run."""
    name, why = printable(item.name), _ADDRESS.sub("", printable(why))
    return why if why.startswith(name) else f"{name}: {why}"
