"""From fast to best: a map method, and how the picture's own edges then decide.

What stands behind each, and what it costs, is ``PRESETS``. None of them has learned from a box.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from whatwhere.classifiers.classifier import Trace
from whatwhere.errors import InputError, UnsupportedError
from whatwhere.maps.cam import cam
from whatwhere.maps.combine import first_of, looks_at, mean_of, root, zoom
from whatwhere.maps.gradcam import gradcam
from whatwhere.regions.refine import settle
from whatwhere.regions.trust import Trust
from whatwhere.types import Heat, Maps, Pixels, Score

Refine = Callable[[Heat, Pixels], Heat]
"""Heat in pixels of the original, and those -> a sharper one."""


Looks = Callable[[Trace, Score], list[Tensor]]
"""One look at the images or several, of which a map is made."""


@dataclass(frozen=True)
class Preset:
    """A map method whose heat is refined; called as any method is.

    Attributes:
        name: in ``PRESETS``.
        about: what stands behind it, in a line.
        looks: what is looked at; how far they agree is part of how far a box is trusted.
        merge: trace, score and looks -> the map.
        refine: heat and pixels of the original -> heat; None for the heat as it is.
        threshold: of the heat, where the classifier has none of its own: a share of the maximum, near that at which
            most boxes had an IoU of .5 on boxed photographs of Imagenette.
        trust: what a box of it is trusted, fitted on those and on pictures with masks of Oxford-IIIT Pets, how often
            boxes are right being that of the first.
        cost: of the map and all that follows, as a ratio to a plain forward of the embedded classifier (one image of
            224 x 224, 2 threads; ``python benchmarks/sharper.py cost``): a median, on a machine that was shared.
    """

    name: str
    about: str
    looks: Looks
    merge: Callable[[Trace, Score, list[Tensor]], Maps]
    refine: Refine | None
    threshold: float
    trust: Trust
    cost: float

    @property
    def __name__(self) -> str:
        """As a function has it."""
        return self.name

    def __call__(self, trace: Trace, score: Score) -> Maps:
        """The maps, raw: before the picture's edges."""
        return self.seen(trace, score)[0]

    def seen(self, trace: Trace, score: Score) -> tuple[Maps, list[Tensor]]:
        """The maps, and the looks that they are made of."""
        looks = self.looks(trace, score)
        return self.merge(trace, score, looks), looks

    def __reduce__(self) -> tuple[Callable[[str], "Preset"], tuple[str]]:
        return find_preset, (self.name,)


_looked = root(first_of(cam, gradcam))


def _once(trace: Trace, score: Score) -> list[Tensor]:
    return [gradcam(trace, score)]


def _twice(trace: Trace, score: Score) -> list[Tensor]:
    """At the network's own size and at twice that; at its own alone where it takes no other."""
    try:
        return looks_at(_looked, scales=(1.0, 2.0))(trace, score)
    except UnsupportedError:
        return [_looked(trace, score)]


def _mean(trace: Trace, score: Score, looks: list[Tensor]) -> Maps:
    return mean_of(looks)


def _closer(trace: Trace, score: Score, looks: list[Tensor]) -> Maps:
    """Looks closer where the others found something, if the network takes images of other sizes."""
    maps = mean_of(looks)
    return zoom(lambda *_: maps, _looked)(trace, score) if len(looks) > 1 else maps


PRESETS: dict[str, Preset] = {
    one.name: one
    for one in (
        Preset("fast", "Grad-CAM.", _once, _mean, None, 0.25, Trust((1.262, 0.602, -0.959, 0.0), 1.361), 1.0),
        Preset(
            "balanced",
            "CAM at 1 and 2 times the size; colours decide.",
            _twice,
            _mean,
            settle,
            0.45,
            Trust((1.595, 1.229, 4.433, 3.224), -4.224),
            5.0,
        ),
        Preset(
            "best",
            "CAM at 1 and 2 times the size, and closer where that finds something; colours decide.",
            _twice,
            _closer,
            settle,
            0.45,
            Trust((1.163, 0.624, 3.128, 2.738), -2.678),
            7.6,
        ),
    )
}


def find_preset(name: str) -> Preset:
    """A preset by its name.

    Raises:
        InputError: no such preset; names them.
    """
    if name not in PRESETS:
        raise InputError(f"a preset is one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
