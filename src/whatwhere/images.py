"""File -> pixels -> network input: everything that happens before the network looks.

``open_photo`` takes what people have and gives upright 8-bit RGB, or a ``DataError`` that names the
file. ``Preprocess`` belongs to a checkpoint: it turns a photo into the network's input and a ``Frame``
that leads back.
"""

import math
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import IO, Literal, cast, get_args

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from whatwhere.errors import DataError, InputError
from whatwhere.geometry import Frame
from whatwhere.types import Extent, Pixels, Size

MAX_PIXELS = 178_956_970
"""Images of more pixels are refused unless asked for: Pillow's own bound on decompression bombs."""

Fit = Literal["whole", "crop", "letterbox"]
Source = str | os.PathLike[str] | Image.Image | np.ndarray


@dataclass(frozen=True, eq=False)
class Photo:
    """An original image: upright 8-bit RGB pixels, and the name to call it by in messages."""

    pixels: Pixels
    source: str

    @property
    def size(self) -> Size:
        """(H, W) in pixels, as a viewer shows it."""
        return self.pixels.shape[0], self.pixels.shape[1]


def open_photo(source: Source | Photo, *, name: str | None = None, max_pixels: int = MAX_PIXELS) -> Photo:
    """Read an image as people have it.

    Files are turned upright by their EXIF orientation, their first frame is taken, transparency is laid
    on white, 16-bit values are scaled by 255/65535, floating-point ones
    from [0, 1], or from [0, 255] where one is above 1.

    Args:
        source: a path, a PIL image, or a uint8 array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).
        name: what to call the image in messages; by default the path, or "image".
        max_pixels: more pixels than this are refused before they are decoded.

    Raises:
        DataError: the file is missing, empty, truncated, too large or no image.
        InputError: an array of another shape or dtype, or something that is no image at all.
    """
    if isinstance(source, Photo):
        return source
    if isinstance(source, np.ndarray):
        return Photo(_from_array(source, name or "image"), name or "image")
    if isinstance(source, Image.Image):
        return Photo(_decode(source, name or "image", max_pixels), name or "image")
    if not isinstance(source, str | os.PathLike):
        raise InputError(f"an image is a path, a PIL image or a uint8 array, got {type(source).__name__}")
    path = Path(source)
    name = name or printable(path)
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise DataError(f"{name}: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISDIR(status.st_mode):
        raise DataError(f"{name}: wanted an image file, this is a directory")
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{name}: not a regular file")
    if status.st_size == 0:
        raise DataError(f"{name}: the file is empty")
    try:
        with path.open("rb") as file:
            return photo_in(file, name, max_pixels)
    except OSError as error:
        raise DataError(f"{name}: {error.strerror or error}") from error


def photo_in(file: BufferedIOBase, name: str, max_pixels: int = MAX_PIXELS) -> Photo:
    """Read an image from an open file, as ``open_photo`` reads one.

    Raises:
        DataError: it is truncated, too large or no image.
    """
    try:
        with _unbounded_header():
            opened = Image.open(cast("IO[bytes]", file))
        with opened:
            return Photo(_decode(opened, name, max_pixels), name)
    except UnidentifiedImageError as error:
        raise DataError(f"{name}: not an image, or of a format that is not known") from error
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{name}: {error.strerror or error}") from error
    except Exception as error:  # decoders raise whatever comes to hand on broken files
        raise DataError(f"{name}: cannot be decoded: {error}") from error


def printable(path: str | os.PathLike[str]) -> str:
    """A file's name as one line that any terminal or page can show."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def image_files(folder: Path) -> list[Path]:
    """Every file below ``folder`` with an image's suffix, sorted; hidden ones are left out."""
    suffixes = image_suffixes()
    found = (Path(root, file) for root, _, files in os.walk(folder) for file in files)
    return sorted(file for file in found if file.suffix.lower() in suffixes and not _hidden(file.relative_to(folder)))


def image_suffixes() -> set[str]:
    """What names of photographs end with, in small letters."""
    readable = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return readable - _NO_PICTURES


_NO_PICTURES = {
    ".pdf",
    ".mpg",
    ".mpeg",
    ".h5",
    ".hdf",
    ".grib",
    ".bufr",
    ".eps",
    ".ps",
    ".emf",
    ".wmf",
    ".fit",
    ".fits",
}
"""Suffixes that Pillow knows of files that seldom are photographs, or that need another program."""


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


_header_lock = threading.Lock()


@contextmanager
def _unbounded_header() -> Iterator[None]:
    """Pillow's own bound is a global with a warning below it; ours is an argument, checked after the header."""
    with _header_lock:
        bound, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = bound


def _decode(image: Image.Image, name: str, max_pixels: int) -> Pixels:
    if image.width * image.height > max_pixels:
        raise DataError(
            f"{name}: {image.width} x {image.height} pixels are more than the bound of {max_pixels}; "
            "raise max_pixels if the file is to be trusted"
        )
    try:
        image.load()
        upright = _upright(image)
        if upright.mode.startswith(("I", "F")):
            return _from_array(_to_8_bit(np.asarray(upright)), name)
        if upright.mode in {"LA", "La", "PA", "RGBA", "RGBa"} or "transparency" in upright.info:
            upright = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
        return np.asarray(upright.convert("RGB"))
    except Exception as error:  # decoders raise whatever comes to hand on broken files
        raise DataError(f"{name}: cannot be decoded: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block is no reason to lose the picture
        return image


def _to_8_bit(values: np.ndarray) -> np.ndarray:
    if not np.issubdtype(values.dtype, np.floating):
        return ((np.clip(values, 0, 65535).astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)  # type: ignore[no-any-return]
    top = 1.0 if np.nanmax(values, initial=0.0) <= 1 else 255.0
    return (np.clip(np.nan_to_num(values), 0, top) * (255 / top)).round().astype(np.uint8)  # type: ignore[no-any-return]


def _from_array(array: np.ndarray, name: str) -> Pixels:
    if array.dtype != np.uint8:
        raise InputError(f"{name}: an array of pixels is uint8 in 0..255, got {array.dtype}")
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in {1, 3, 4} or 0 in array.shape:
        raise InputError(
            f"{name}: an array of pixels is (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got {array.shape}"
        )
    if array.shape[2] == 1:
        array = np.repeat(array, 3, axis=2)
    if array.shape[2] == 4:
        return _decode(Image.fromarray(array, "RGBA"), name, array.size)
    return array.copy()  # the caller may reuse theirs


@dataclass(frozen=True)
class Preprocess:
    """How a photo becomes the network's input; it travels with the weights.

    Of a network that takes no photos, but images of other channels or volumes, it says what the input looks like:
    ``net.trace`` takes such tensors, preprocessed already.

    Attributes:
        size: (h, w) of the network's input, or (z, h, w) of volumes.
        mean: subtracted per channel, on a scale where white is 1; as many as the network takes channels.
        std: divided by per channel, on the same scale.
        interpolation: "nearest", "bilinear", "bicubic" or "lanczos", antialiased as Pillow does.
        fit: "whole" squashes the whole image, "letterbox" pads it, "crop" cuts the centre out. What a
            crop cuts away cannot be located, so the whole image is the default.
        crop_fraction: share of the shorter side that a crop keeps.
    """

    size: Extent = (224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    fit: Fit = "whole"
    crop_fraction: float = 0.875

    def __post_init__(self) -> None:
        if self.fit not in get_args(Fit):
            raise InputError(f"fit is one of {', '.join(get_args(Fit))}, got {self.fit!r}")
        if str(self.interpolation).upper() not in Image.Resampling.__members__:
            known = ", ".join(Image.Resampling.__members__).lower()
            raise InputError(f"interpolation is one of {known}, got {self.interpolation!r}")
        sides = self.size if isinstance(self.size, tuple | list) else ()
        if len(sides) not in {2, 3} or not all(isinstance(side, int) and side > 0 for side in sides):
            raise InputError(f"size is (height, width) in pixels, or (depth, height, width), got {self.size!r}")
        if not 0 < self.crop_fraction <= 1:
            raise InputError(f"crop_fraction is in (0, 1], got {self.crop_fraction}")
        if not all(map(math.isfinite, (*self.mean, *self.std))):
            raise InputError(f"mean and std are finite, got {self.mean} and {self.std}")
        if len(self.mean) != len(self.std) or not self.mean or 0 in self.std:
            raise InputError(f"mean and std have one number a channel, std not 0; got {self.mean} and {self.std}")

    def frame(self, original: Size) -> Frame:
        """How an original of (H, W) pixels lies in the input.

        Raises:
            InputError: the network takes no photos.
        """
        if len(self.mean) not in {1, 3} or len(self.size) != 2:
            raise InputError(
                f"photos have 1 or 3 channels and two sides, and this network takes {len(self.mean)} channels of "
                f"{' x '.join(map(str, self.size))}; give a tensor of that to net.trace"
            )
        size = self.size[0], self.size[1]
        if self.fit == "crop":
            return Frame.crop(original, size, self.crop_fraction)
        return Frame.letterbox(original, size) if self.fit == "letterbox" else Frame.whole(original, size)

    def __call__(self, photo: Photo) -> tuple[Float[Tensor, "d h w"], Frame]:
        """The network's input, float32, and the frame that leads back; padding holds the mean.

        Raises:
            InputError: the network takes no photos.
        """
        resized, frame = self.resized(photo)
        return self.normalized(resized, frame), frame

    def resized(self, photo: Photo) -> tuple[UInt8[np.ndarray, "y x d"], Frame]:
        """What lies in the input, in bytes, without padding, and the frame that leads back.

        Raises:
            InputError: the network takes no photos.
        """
        frame = self.frame(photo.size)
        placed, seen = frame.placed, frame.seen
        image = Image.fromarray(photo.pixels)
        if len(self.mean) == 1:
            image = image.convert("L")
        image = image.resize(
            (round(placed.width), round(placed.height)),
            Image.Resampling[self.interpolation.upper()],
            box=(max(seen.x0, 0), max(seen.y0, 0), min(seen.x1, image.width), min(seen.y1, image.height)),
        )
        return np.asarray(image).reshape(image.height, image.width, -1), frame

    def normalized(self, resized: UInt8[np.ndarray, "y x d"], frame: Frame) -> Float[Tensor, "d h w"]:
        """The network's input, float32, of what ``resized`` gives."""
        (height, width, _), placed = resized.shape, frame.placed
        y0, x0 = round(placed.y0), round(placed.x0)
        tensor = torch.zeros(len(self.mean), *self.size)
        where = tensor[:, y0 : y0 + height, x0 : x0 + width].numpy()
        mean, std = torch.tensor(self.mean)[:, None], torch.tensor(self.std)[:, None]
        levels = ((torch.arange(256) / 255 - mean) / std).numpy()  # a byte has few values
        for c, channel in enumerate(cv2.split(resized)):
            where[c] = cv2.LUT(channel, levels[c])
        return tensor
