"""Explanation -> picture: the image, the map over it, the boxes, and a caption."""

import os
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from whatwhere.errors import InputError, nearest
from whatwhere.explanation import Explanation
from whatwhere.files import aside
from whatwhere.geometry import Box
from whatwhere.types import Heat, Pixels

_COLORMAPS = {
    name.removeprefix("COLORMAP_").lower(): getattr(cv2, name) for name in dir(cv2) if name.startswith("COLORMAP_")
}
_GAP, _INK, _PAPER, _BOX = 6, (32, 32, 32), (255, 255, 255), (255, 255, 255)


def draw(
    seen: Explanation | Sequence[Explanation],
    out: str | os.PathLike[str] | None = None,
    *,
    side: int = 480,
    opacity: float = 0.5,
    colormap: str = "turbo",
    boxes: bool = True,
) -> Image.Image:
    """One image beside what is seen in it: a panel for the picture, then one for each explanation.

    Args:
        seen: explanations of one image.
        out: write the picture there too; the suffix says the format.
        side: pixels of a panel's longer side.
        opacity: of the map over the picture, in [0, 1].
        colormap: one of OpenCV's, in small letters.
        boxes: outline the regions; the largest thick, the others thin.

    Raises:
        InputError: nothing to draw, explanations of different images, or an unknown colormap.
    """
    several = [seen] if isinstance(seen, Explanation) else list(seen)
    if not several or any(one.pixels is not several[0].pixels for one in several):
        raise InputError("draw takes the explanations of one image; for several images call it for each")
    if colormap not in _COLORMAPS:
        raise InputError(f"no colormap is called {colormap!r}; nearest: {nearest(colormap, _COLORMAPS)}")
    if not 0 <= opacity <= 1 or side < 16:
        raise InputError(f"opacity is in [0, 1] and side at least 16 pixels, got {opacity} and {side}")
    panels = [_panel(Image.fromarray(several[0].pixels), side)]
    captions = [_stem(several[0].source)]
    for one in several:
        panel = _panel(Image.fromarray(overlay(one, opacity=opacity, colormap=colormap)), side)
        if boxes:
            _outline(panel, one)
        panels.append(panel)
        captions.append(caption(one))
    picture = _beside(panels, captions)
    if out is not None:
        write(picture, Path(out))
    return picture


def caption(one: Explanation) -> str:
    """Label and probability, as in: Egyptian cat 77.1 %."""
    return f"{one.label} {one.probability:.1%}".replace("%", " %")


def overlay(one: Explanation, *, opacity: float = 0.5, colormap: str = "turbo") -> Pixels:
    """The heat in colour over the grey picture, (H W 3); what the network did not see is darkened."""
    blend = coloured(one.pixels, one.heat, opacity=opacity, colormap=colormap)
    seen = one.frame.seen
    y0, y1, x0, x1 = (max(0, round(edge)) for edge in (seen.y0, seen.y1, seen.x0, seen.x1))
    out: Pixels = _grey(one.pixels) // 3
    out[y0:y1, x0:x1] = blend[y0:y1, x0:x1]
    return out


def coloured(pixels: Pixels, heat: Heat, *, opacity: float = 0.5, colormap: str = "turbo") -> Pixels:
    """Heat in colour over a picture that is half grey, (H W 3)."""
    levels = np.round(heat * 255).astype(np.uint8)
    colour = cv2.cvtColor(cv2.applyColorMap(levels, _COLORMAPS[colormap]), cv2.COLOR_BGR2RGB)
    base = cv2.addWeighted(pixels, 0.5, _grey(pixels), 0.5, 0)
    blend: Pixels = cv2.addWeighted(colour, opacity, base, 1 - opacity, 0)
    return blend


def textured(pixels: Pixels, heat: Heat) -> Pixels:
    """The picture itself, as strong as the heat (relative to its maximum), over plain grey; (H W 3)."""
    top = float(heat.max())
    share = (heat / top if top > 0 else heat)[..., None]
    shown: Pixels = np.round(pixels * share + 128 * (1 - share)).astype(np.uint8)
    return shown


def _grey(pixels: Pixels) -> Pixels:
    grey: Pixels = cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return grey


def write(picture: Image.Image, path: Path) -> None:
    """Save aside and rename, so that nobody finds half a picture.

    Raises:
        InputError: the suffix is no format that can be written.
    """
    format = Image.registered_extensions().get(path.suffix.lower())
    if format not in Image.SAVE:
        raise InputError(f"{path}: pictures are written as .png, .jpg or .webp, got {path.suffix!r}")
    with aside(path) as file:
        picture.save(file, format)


def _panel(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    return image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS
    )


def _outline(panel: Image.Image, one: Explanation) -> None:
    pen = ImageDraw.Draw(panel)
    scale = panel.width / one.size[1], panel.height / one.size[0]
    for rank, box in reversed(list(enumerate(one.boxes))):
        scaled = Box(box.x0 * scale[0], box.y0 * scale[1], box.x1 * scale[0], box.y1 * scale[1])
        outline(pen, scaled, _BOX, thick=3 if rank == 0 else 1)


def outline(pen: ImageDraw.ImageDraw, box: Box, colour: tuple[int, int, int], *, thick: int = 1) -> None:
    """A box's outline between two dark lines; its outer edge lies on the last pixels inside the half-open box."""
    x0, y0 = round(box.x0), round(box.y0)
    x1, y1 = max(x0, round(box.x1) - 1), max(y0, round(box.y1) - 1)
    pen.rectangle((x0, y0, x1, y1), outline=_INK, width=thick + 2)
    if x1 - x0 > 4 and y1 - y0 > 4:
        pen.rectangle((x0 + 1, y0 + 1, x1 - 1, y1 - 1), outline=colour, width=thick)


def _beside(panels: list[Image.Image], captions: list[str]) -> Image.Image:
    font = ImageFont.load_default(size=16)
    height = max(panel.height for panel in panels)
    width = sum(max(panel.width, 120) for panel in panels) + _GAP * (len(panels) - 1)
    sheet = Image.new("RGB", (width, height + 28), _PAPER)
    pen, x = ImageDraw.Draw(sheet), 0
    for panel, text in zip(panels, captions, strict=True):
        room = max(panel.width, 120)
        sheet.paste(panel, (x, 0))
        while pen.textlength(text, font=font) > room - 4 and len(text) > 2:
            text = text[:-2].rstrip() + "…"
        pen.text((x + 2, height + 4), text, fill=_INK, font=font)
        x += room + _GAP
    return sheet


def _stem(source: str) -> str:
    return source.replace("\\", "/").rpartition("/")[2]
