from .classifiers.classifier import Classifier, Trace
from .classifiers.labels import Labels
from .classifiers.load import load
from .classifiers.saved import save
from .errors import DataError, InputError, MissingExtraError, UnsupportedError, WhatWhereError
from .explanation import Explanation, explain, explain_each
from .geometry import Box, Frame
from .images import Photo, Preprocess, open_photo
from .maps import METHODS
from .presets import PRESETS
from .reports.picture import draw

__version__: str

__all__ = [
    "METHODS",
    "PRESETS",
    "Box",
    "Classifier",
    "DataError",
    "Explanation",
    "Frame",
    "InputError",
    "Labels",
    "MissingExtraError",
    "Photo",
    "Preprocess",
    "Trace",
    "UnsupportedError",
    "WhatWhereError",
    "draw",
    "explain",
    "explain_each",
    "load",
    "open_photo",
    "save",
]
