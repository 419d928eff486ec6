"""What a network is made of and what it looks for -> one page."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torchvision.utils import make_grid

from whatwhere.classifiers.backbones import stages_of
from whatwhere.classifiers.classifier import Classifier
from whatwhere.classifiers.convert import dense
from whatwhere.datasets.sample import Dataset
from whatwhere.errors import UnsupportedError
from whatwhere.files import aside
from whatwhere.geometry import Box
from whatwhere.images import Photo, printable
from whatwhere.inspection.activations import Activations, activation_statistics
from whatwhere.inspection.formula import receptive_fields
from whatwhere.inspection.layers import activations, first_kernels, layers
from whatwhere.inspection.receptive import ReceptiveField
from whatwhere.inspection.stability import stability
from whatwhere.inspection.words import Dictionary
from whatwhere.maps.shape import positive, to_original, unit
from whatwhere.reports.page import data_uri, pages
from whatwhere.reports.patches import crops_of
from whatwhere.reports.picture import coloured, outline
from whatwhere.reports.stability import stability_csv, stability_fragment
from whatwhere.types import Size

KERNELS, CHANNELS = 256, 12
"""Of the first layer, and of each layer for a picture, as many as are shown."""
ZOOM = 2
"""A score map is of a picture so many times as large as the network's own input."""
SIDE, LONG = 120, 360
"""Pixels of an activation map, and of a whole picture."""
COLOURS = ((42, 125, 225), (217, 72, 15), (43, 138, 62), (156, 54, 181), (176, 137, 0), (194, 37, 92))
"""Of the windows of layers, shallow to deep."""


def write_inspection(
    net: Classifier,
    folder: Path,
    photos: Iterable[Photo] = (),
    words: tuple[Dictionary, Dataset] | None = None,
    changed: Sequence[Photo] = (),
    *,
    batch: int = 16,
) -> Path:
    """``index.html``: layers and what their cells see, first kernels, units as words, pictures layer by layer.

    With pictures to change, what normalization does to their activations too, and how classes and maps stand it when
    they are shifted, resized, turned and lit, also as ``stability.csv``.

    Args:
        net: the classifier.
        folder: made where it is missing.
        photos: pictures that are followed through the network.
        words: what ``dictionary`` found, and in which data set.
        changed: pictures to change.
        batch: images that go through the network at once.

    Returns:
        The page.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stable, spreads = None, list[Activations]()
    if changed:
        like = next(net.inner.parameters(), None)
        images = torch.stack([net.preprocess(photo)[0] for photo in changed])
        spreads = activation_statistics(net.inner, images if like is None else images.to(like.device, like.dtype))
        with suppress(UnsupportedError):  # of a network that has no such maps
            found = stability(net, changed, batch=batch)
            stable = stability_fragment(found)
            with aside(folder / "stability.csv") as file:
                file.write_text(stability_csv(found))
    page = folder / "index.html"
    with aside(page) as written, written.open("w", encoding="utf-8", errors="backslashreplace") as out:
        for text in pages.get_template("inspection.html.j2").generate(
            model=net.name,
            layers=[{"said": row, "field": said(row.field)} for row in layers(net)],
            parameters=sum(parameter.numel() for parameter in net.inner.parameters()),
            kernels=_kernels(net),
            entries=(_entry(net, photo) for photo in photos),
            classes=list(_classes(net, *words)) if words else [],
            data=words[1].name if words else "",
            window=said(words[0].field) if words else "",
            layer=words[0].layer if words else "",
            spreads=spreads,
            stable=stable,
        ):
            out.write(text)
    return page


def said(field: ReceptiveField | None) -> str:
    """Size, step and start in words."""
    if field is None:
        return "not known"
    if math.isinf(sum(field.size)):
        return "everything"
    (h, w), (y, x), (top, left) = field.size, field.stride, field.start
    return f"{_pair(h, w)}, every {_pair(y, x)}, from {_pair(top, left)}"


def _pair(one: float, other: float) -> str:
    return f"{one:g}" if one == other else f"{one:g} x {other:g}"


def tiled(kernels: Float[Tensor, "n d h w"]) -> Image.Image:
    """Kernels side by side, each stretched to its own range; in colour where they read three channels."""
    if kernels.shape[1] != 3:
        kernels = kernels.flatten(0, 1)[:, None]
    kernels = kernels[:KERNELS]
    low, high = (getattr(kernels.flatten(1), f"a{end}")(1)[:, None, None, None] for end in ("min", "max"))
    shown = (kernels - low) / (high - low).clamp(min=1e-12)
    times = max(1, round(32 / kernels.shape[-1]))
    shown = shown.repeat_interleave(times, 2).repeat_interleave(times, 3)
    grid = make_grid(shown, nrow=16, padding=2, pad_value=1.0)
    return Image.fromarray((grid * 255).round().byte().permute(1, 2, 0).numpy())


def _kernels(net: Classifier) -> dict[str, Any] | None:
    try:
        kernels = first_kernels(net)
    except UnsupportedError:
        return None
    return {"picture": data_uri(tiled(kernels)), "shape": tuple(kernels.shape)}


def _classes(net: Classifier, found: Dictionary, dataset: Dataset) -> Iterator[dict[str, Any]]:
    used = sorted({word.unit for several in found.words.values() for word in several})
    crops = dict(zip(used, crops_of([found.patches[one] for one in used], dataset), strict=True))
    for label, several in found.words.items():
        words = [{"unit": one.unit, "weight": one.weight, "crops": crops[one.unit]} for one in several]
        yield {"name": net.labels[label], "words": words}


def _entry(net: Classifier, photo: Photo) -> dict[str, Any]:
    pixels, frame = net.preprocess(photo)
    like = next(net.inner.parameters(), pixels)
    images = pixels[None].to(like.device, like.dtype)
    probabilities = net.probabilities(net.logits(images))[0]
    shown: list[dict[str, Any]] = []
    picture = Image.fromarray(photo.pixels)
    picture.thumbnail((LONG, LONG), Image.Resampling.LANCZOS)
    pen, scale = ImageDraw.Draw(picture), picture.width / photo.size[1]
    try:
        names = stages_of(net.inner, images)
    except UnsupportedError:
        names = []
    fields = receptive_fields(net.inner, images)
    for rank, (name, maps) in enumerate(activations(net, images, names).items()):
        strongest = maps[0].flatten(1).mean(1).topk(min(CHANNELS, maps.shape[1])).indices
        tiles = unit(maps[0][strongest].cpu())
        h, w = tiles.shape[1:]
        size = (SIDE, round(SIDE * photo.size[1] / photo.size[0]))
        grid = make_grid(_enlarged(tiles, size), nrow=CHANNELS // 2, padding=2, pad_value=1.0)
        energy = maps[0].square().sum(0)
        cell = divmod(int(energy.argmax()), w)
        box, colour = None, COLOURS[rank % len(COLOURS)]
        if (field := fields.get(name)) is not None and math.isfinite(sum(field.size)):
            box = frame.to_original(field.window(*cell))
            outline(pen, Box(*(scale * edge for edge in (box.x0, box.y0, box.x1, box.y1))), colour, thick=2)
        shown.append(
            {
                "name": name,
                "grid": (h, w),
                "channels": maps.shape[1],
                "picture": data_uri(Image.fromarray((grid * 255).round().byte().permute(1, 2, 0).numpy())),
                "cell": cell,
                "box": box and tuple(round(edge) for edge in (box.x0, box.y0, box.x1, box.y1)),
                "colour": "rgb({}, {}, {})".format(*colour),
            }
        )
    best = probabilities.topk(min(3, len(probabilities)))
    return {
        "source": printable(photo.source),
        "picture": data_uri(picture),
        "said": [(net.labels[int(i)], float(p)) for p, i in zip(best.values, best.indices, strict=True)],
        "layers": shown,
        "scores": list(_scores(net, photo)),
    }


def _enlarged(tiles: Float[Tensor, "n y x"], size: Size) -> Float[Tensor, "n 1 h w"]:
    """Cells as they are, without smoothing."""
    return nn.functional.interpolate(tiles[:, None], size, mode="nearest")


def _scores(net: Classifier, photo: Photo, count: int = 4) -> Iterator[dict[str, Any]]:
    """The network as a predictor of every cell of a larger picture: where it says which class."""
    try:
        cells = dense(net)
    except UnsupportedError:
        return
    (h, w), (H, W) = net.preprocess.size[-2:], photo.size
    side, step = ZOOM * max(h, w), 32
    size = tuple(max(step, step * round(side * one / max(H, W) / step)) for one in (H, W))
    pixels, frame = replace(net.preprocess, size=size, fit="whole")(photo)
    like = next(cells.network.parameters())
    with torch.no_grad():
        maps = cells.network.maps(pixels[None].to(like.device, like.dtype)).float().cpu()  # type: ignore[operator]
    y, x = maps.shape[2:]
    each = net.probabilities(maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])).T.reshape(-1, y, x)
    for label in each.flatten(1).amax(1).topk(min(count, len(each))).indices.tolist():
        heat = to_original(positive(each[label][None]), frame)[0].clamp(0, 1).numpy().astype(np.float32)
        drawn = Image.fromarray(coloured(photo.pixels, heat))
        drawn.thumbnail((LONG, LONG), Image.Resampling.LANCZOS)
        yield {
            "label": net.labels[label],
            "most": float(each[label].amax()),
            "share": float((each.argmax(0) == label).float().mean()),
            "grid": (y, x),
            "picture": data_uri(drawn),
        }
