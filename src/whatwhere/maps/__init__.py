"""WHERE: ``method(trace, score) -> maps (b y x)``, raw and signed, one file a method.

``METHODS`` is all there is to know of them: their names, and functions whose docstrings say the rest.
"""

from collections.abc import Callable

from whatwhere.classifiers.classifier import Trace
from whatwhere.maps.cam import cam
from whatwhere.maps.gradcam import gradcam
from whatwhere.maps.gradcampp import gradcampp
from whatwhere.maps.layercam import layercam
from whatwhere.types import Maps, Score

Method = Callable[[Trace, Score], Maps]

METHODS: dict[str, Method] = {
    "cam": cam,
    "gradcam": gradcam,
    "gradcampp": gradcampp,
    "layercam": layercam,
}
