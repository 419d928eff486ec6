"""What a client asks, as it comes in: checked against what there is before any work. No name is ever a file's."""

import base64
import binascii
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, TypeVar

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, StrictStr, ValidationError

from whatwhere.classifiers.classifier import Classifier
from whatwhere.errors import DataError, InputError, nearest
from whatwhere.explanation import Target, classes_of, find_method
from whatwhere.images import Photo, open_photo
from whatwhere.presets import find_preset
from whatwhere.regions.threshold import Threshold, parsed

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What is decoded: formats that need no other program and no second file."""
MOST = 10
"""Classes that one request may ask for."""

Told = TypeVar("Told", bound=BaseModel)
Name = Annotated[StrictStr, Field(min_length=1, max_length=200)]
Class = Name | Annotated[StrictInt, Field(ge=0)]


class Question(BaseModel):
    """A picture and what is asked of it.

    Attributes:
        image: the picture's bytes.
        model: one of those served; by default the first.
        layer: split after this one instead.
        method: a map method or a preset; by default "gradcam".
        preset: instead of a method.
        target: a class by name or index, "top5", or several of these; by default "top1".
        threshold: as ``explain`` takes it.
    """

    model_config = ConfigDict(extra="forbid")

    image: Annotated[
        StrictStr, Field(description="The picture's bytes in base64; never a path nor an address.", min_length=1)
    ]
    model: Annotated[Name | None, Field(description="One of those served; by default the first.")] = None
    layer: Annotated[Name | None, Field(description="Split the network after this layer instead.")] = None
    method: Annotated[Name | None, Field(description="A map method or a preset; by default gradcam.")] = None
    preset: Annotated[Name | None, Field(description="Instead of a method: fast, balanced or best.")] = None
    target: Annotated[
        Class | Annotated[list[Class], Field(min_length=1, max_length=MOST)],
        Field(description=f"A class by name or index, top5, or several; {MOST} classes at most."),
    ] = "top1"
    threshold: Annotated[
        Annotated[StrictFloat, Field(ge=0, lt=1)] | Annotated[StrictInt, Field(ge=0, le=0)] | Name | None,
        Field(description='A share of the maximum in [0, 1), "otsu" or "p90"; by default the model\'s own.'),
    ] = None


@dataclass(frozen=True)
class Asked:
    """A question that can be answered: every name in it is known.

    Attributes:
        model: of those served.
        layer: of that model's, or None for its own.
        method: a map method or a preset.
        target: what to explain.
        count: how many classes that is.
        threshold: of the heat, or None for the model's own.
    """

    model: str
    layer: str | None
    method: str
    target: Target
    count: int
    threshold: Threshold | None


def question_in_json(body: bytes) -> tuple[Question, bytes]:
    """The question, and the picture's bytes.

    Raises:
        InputError: no such JSON; the first thing that is wrong with it.
    """
    question = checked(lambda: Question.model_validate_json(body))
    try:
        return question, base64.b64decode(question.image, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"image: wanted the picture's bytes in base64 (no path, no address): {error}") from error


def question_in_form(fields: Mapping[str, str | list[str]]) -> Question:
    """The question in the fields of a form, all of which are text; the picture is beside them.

    Raises:
        InputError: as ``question_in_json``.
    """
    return checked(lambda: Question.model_validate({**fields, "image": "beside"}))


def checked(read: Callable[[], Told]) -> Told:
    """What a client told, read by pydantic.

    Raises:
        InputError: the first thing that is wrong with it.
    """
    try:
        return read()
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise InputError(f"{where}: {first['msg'][:200]}") from error
    except RecursionError as error:
        raise InputError("body: nested too deep") from error


def answerable(question: Question, nets: Mapping[str, Classifier]) -> Asked:
    """The question with every name found.

    Raises:
        InputError: no such model, layer, method, preset, class or threshold; too many classes.
    """
    model = next(iter(nets)) if question.model is None else question.model
    if model not in nets:
        raise InputError(f"no model served is called {model!r}; there are: {', '.join(nets)}")
    net = nets[model]
    if question.layer is not None:
        layers = [name for name, _ in net.network.named_modules() if name]
        if question.layer not in layers:
            raise InputError(f"no layer is called {question.layer!r}; nearest: {nearest(question.layer, layers)}")
    if question.preset is not None and question.method is not None:
        raise InputError("wanted a method or a preset, got both")
    method = find_preset(question.preset).name if question.preset is not None else question.method or "gradcam"
    find_method(method)
    count = len(classes_of(question.target, net.labels, torch.zeros(len(net.labels))))
    if count > MOST:
        raise InputError(f"target: at most {MOST} classes a picture, got {count}")
    threshold = None if question.threshold is None else parsed(question.threshold)
    return Asked(model, question.layer, method, question.target, count, threshold)


def photo_of(data: bytes, max_pixels: int) -> Photo:
    """Decode a picture.

    Raises:
        DataError: it is of another format, broken, or of more pixels than the bound.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # decoders raise whatever comes to hand on broken files
        raise DataError(f"image: wanted {', '.join(FORMATS)}, got {len(data)} bytes that are none") from error
    if image.width * image.height > max_pixels:
        raise DataError(f"image: {image.width} x {image.height} pixels are more than this server's {max_pixels}")
    with image:
        return open_photo(image, name="image", max_pixels=max_pixels)
