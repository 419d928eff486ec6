"""WHERE: ``method(trace, score) -> maps (b y x)``, raw and signed, one file a method.

``METHODS`` is all there is to know of them: their names, and functions whose docstrings say the rest.
"""

from collections.abc import Callable

from whatwhere.classifiers.classifier import Trace
from whatwhere.maps.ablationcam import ablationcam
from whatwhere.maps.cam import cam
from whatwhere.maps.clustercam import clustercam
from whatwhere.maps.dfl import dfl
from whatwhere.maps.distilled import distilled
from whatwhere.maps.eigencam import eigencam, eigengradcam
from whatwhere.maps.fem import fem
from whatwhere.maps.fullgrad import fullgrad
from whatwhere.maps.gradcam import gradcam
from whatwhere.maps.gradcam_elementwise import gradcam_elementwise
from whatwhere.maps.gradcampp import gradcampp
from whatwhere.maps.hirescam import hirescam
from whatwhere.maps.kpcacam import kpcacam
from whatwhere.maps.layercam import layercam
from whatwhere.maps.legrad import legrad
from whatwhere.maps.occlusion import occlusion
from whatwhere.maps.rise import rise
from whatwhere.maps.rollout import rollout
from whatwhere.maps.scorecam import iscam, scorecam, sscam
from whatwhere.maps.shapleycam import shapleycam
from whatwhere.maps.smoothgradcampp import smoothgradcampp
from whatwhere.maps.xgradcam import xgradcam
from whatwhere.types import Maps, Score

Method = Callable[[Trace, Score], Maps]

METHODS: dict[str, Method] = {
    "cam": cam,
    "gradcam": gradcam,
    "gradcampp": gradcampp,
    "smoothgradcampp": smoothgradcampp,
    "xgradcam": xgradcam,
    "hirescam": hirescam,
    "layercam": layercam,
    "gradcam_elementwise": gradcam_elementwise,
    "shapleycam": shapleycam,
    "eigencam": eigencam,
    "eigengradcam": eigengradcam,
    "kpcacam": kpcacam,
    "fem": fem,
    "fullgrad": fullgrad,
    "ablationcam": ablationcam,
    "scorecam": scorecam,
    "sscam": sscam,
    "iscam": iscam,
    "clustercam": clustercam,
    "rise": rise,
    "occlusion": occlusion,
    "dfl": dfl,
    "distilled": distilled,
    "rollout": rollout,
    "legrad": legrad,
}
