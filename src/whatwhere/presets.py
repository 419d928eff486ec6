"""From fast to best: a map method, and how the picture's own edges then decide.

What stands behind each, and what it costs, is ``PRESETS``. None of them has learned from a box.
"""

from collections.abc import Callable
from dataclasses import dataclass

from whatwhere.classifiers.classifier import Trace
from whatwhere.errors import InputError
from whatwhere.maps import Method
from whatwhere.maps.cam import cam
from whatwhere.maps.combine import augment, first_of, root
from whatwhere.maps.gradcam import gradcam
from whatwhere.regions.refine import settle
from whatwhere.types import Heat, Maps, Pixels, Score

Refine = Callable[[Heat, Pixels], Heat]
"""Heat in pixels of the original, and those -> a sharper one."""


@dataclass(frozen=True)
class Preset:
    """A map method whose heat is refined; called as any method is.

    Attributes:
        name: in ``PRESETS``.
        about: what stands behind it, in a line.
        method: (trace, score) -> maps (b y x).
        refine: heat and pixels of the original -> heat; None for the heat as it is.
        threshold: of the heat, where the classifier has none of its own: a share of the maximum, near that at which
            most boxes had an IoU of .5 on boxed photographs of Imagenette.
        cost: of the map and all that follows, as a ratio to a plain forward of the embedded classifier (one image of
            224 x 224, 2 threads; ``python benchmarks/sharper.py cost``): a median, on a machine that was shared.
    """

    name: str
    about: str
    method: Method
    refine: Refine | None
    threshold: float
    cost: float

    @property
    def __name__(self) -> str:
        """As a function has it."""
        return self.name

    def __call__(self, trace: Trace, score: Score) -> Maps:
        """The maps, raw: before the picture's edges."""
        return self.method(trace, score)

    def __reduce__(self) -> tuple[Callable[[str], "Preset"], tuple[str]]:
        return find_preset, (self.name,)


def _scaled(*scales: float) -> Method:
    """Looks at several sizes; at the network's own alone where it takes no other."""
    looked = root(first_of(cam, gradcam))
    return first_of(augment(looked, flip=False, scales=scales), looked)


PRESETS: dict[str, Preset] = {
    one.name: one
    for one in (
        Preset("fast", "Grad-CAM.", gradcam, None, 0.25, 1.0),
        Preset("balanced", "CAM at 1 and 1.5 times the size; colours decide.", _scaled(1.0, 1.5), settle, 0.5, 3.7),
        Preset("best", "CAM at 1 and 2 times the size; colours decide.", _scaled(1.0, 2.0), settle, 0.5, 5.0),
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
