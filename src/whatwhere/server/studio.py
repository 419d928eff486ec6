"""Label Studio's ML backend protocol: tasks in, predictions out, as ``annotate.formats.labelstudio`` writes them."""

import asyncio
import base64
import binascii
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qs

from pydantic import BaseModel, Field, StrictStr

from whatwhere.annotate.formats.labelstudio import prediction
from whatwhere.annotate.rows import pictures_of, rows_of
from whatwhere.annotate.sources import Item
from whatwhere.errors import DataError, InputError, WhatWhereError, extra
from whatwhere.explanation import Explanation
from whatwhere.server.api import REFUSALS, Service, admitted, body_of, refusal
from whatwhere.server.asked import Asked, Question, answerable, checked
from whatwhere.server.batcher import ClosedError

with extra("serve", "a server"):
    from fastapi import FastAPI, Request

LOCAL = "/data/local-files/?"
"""How Label Studio names a file under its document root."""
TASKS = 1000
"""Of a request, at most."""


class Setup(BaseModel):
    """What Label Studio says of a project; nothing of it is read."""


class Task(BaseModel):
    """A picture to look at; what else Label Studio says of it is not read.

    Attributes:
        data: its fields, "image" among them.
    """

    data: Annotated[
        dict[StrictStr, Any],
        Field(description="image: the picture as a data URL or in base64, or /data/local-files/?d=NAME."),
    ]


class Tasks(BaseModel):
    """What Label Studio asks; its project, label_config and params are not read.

    Attributes:
        tasks: the pictures.
    """

    tasks: Annotated[list[Task], Field(max_length=TASKS)]


def add_studio(app: FastAPI, root: Path | None = None) -> None:
    """Give an application of ``build_app`` the routes ``/predict`` and ``/setup``; call it before ``with_page``.

    Args:
        app: the application.
        root: Label Studio's document root, under which local files are read; without it none are.

    Raises:
        InputError: the root is no folder.
    """
    service: Service = app.state.service
    if root is not None:
        if not root.is_dir():
            raise InputError(f"{root}: wanted a folder, Label Studio's document root")
        root = root.resolve()
    model = next(iter(service.batcher.nets))
    asked = answerable(Question(image="beside"), service.batcher.nets)
    refusals: dict[int | str, dict[str, Any]] = {status: refusal(why) for status, why in REFUSALS.items()}
    takes = {"requestBody": {"required": True, "content": {"application/json": {"schema": _schema()}}}}

    @app.post("/setup", summary="Label Studio connects a project.", responses=refusals, openapi_extra=_anything())
    async def setup(request: Request) -> dict[str, str]:
        async with admitted(service):
            body = await body_of(request, service.bounds.upload, {"application/json"})
            checked(lambda: Setup.model_validate_json(body))
        return {"model_version": model}

    @app.post("/predict", summary="Label Studio's tasks: what, and where.", responses=refusals, openapi_extra=takes)
    async def predict(request: Request) -> dict[str, Any]:
        async with admitted(service):
            body = await body_of(request, service.bounds.upload, {"application/json"})
            tasks = checked(lambda: Tasks.model_validate_json(body)).tasks
            found: list[dict[str, Any]] = []
            while len(found) < len(tasks):
                # as many at once as the queue has room for, this request's own place among them
                count = min(service.bounds.batch, 1 + max(0, service.bounds.queue - service.inside))
                some = tasks[len(found) : len(found) + count]
                service.inside += len(some) - 1
                try:
                    found += await asyncio.gather(*(_predicted(service, asked, one, root) for one in some))
                finally:
                    service.inside -= len(some) - 1
            return {"results": found}


async def _predicted(service: Service, asked: Asked, task: Task, root: Path | None) -> dict[str, Any]:
    """One prediction; a picture that cannot be used has none, and says why."""
    try:
        data = await asyncio.to_thread(bytes_of, task.data.get("image"), root, service.bounds.upload)
        async with service.explained(asked, data) as seen:
            return await asyncio.to_thread(_as_prediction, seen, asked.model)
    except ClosedError:
        raise
    except WhatWhereError as error:
        return {"model_version": asked.model, "score": 0.0, "result": [], "error": str(error)}


def _as_prediction(seen: list[Explanation], model: str) -> dict[str, Any]:
    (picture,) = pictures_of(rows_of(0, Item("image"), "", seen, model))
    return prediction(picture, model)


def bytes_of(image: object, root: Path | None, bound: int) -> bytes:
    """A task's picture.

    Args:
        image: a data URL, base64, or ``/data/local-files/?d=NAME``.
        root: the resolved folder that holds NAME; None where no file is read.
        bound: bytes, at most.

    Raises:
        InputError: none of these, or a file where none is read.
        DataError: no such file under the root, or more bytes than the bound.
    """
    if not isinstance(image, str):
        raise InputError('data: wanted a text called "image", the picture')
    if image.startswith(LOCAL):
        if root is None:
            raise InputError("image: this server reads no files; start it with --label-studio-root FOLDER")
        return _local(parse_qs(image[len(LOCAL) :]).get("d", [""])[0], root, bound)
    text = image
    if image[:5].lower() == "data:":
        head, _, text = image.partition(",")
        if not head.lower().endswith(";base64"):
            raise InputError("image: wanted a data URL in base64")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(
            "image: wanted a data URL, base64 or /data/local-files/?d=NAME; no address is fetched"
        ) from error


def _local(name: str, root: Path, bound: int) -> bytes:
    # what lies outside, and what does not exist, are told in the same words
    none = f"image: no file {name[:200]!r} under this server's --label-studio-root"
    try:
        path = (root / name).resolve()
        if not path.is_relative_to(root) or not path.is_file():
            raise DataError(none)
        with path.open("rb") as file:
            data = file.read(bound + 1)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(none) from error
    if len(data) > bound:
        raise DataError(f"image: wanted at most {bound} bytes, {name[:200]!r} has more")
    return data


def _schema() -> dict[str, Any]:
    found = Tasks.model_json_schema()
    found["properties"]["tasks"]["items"] = found.pop("$defs")["Task"]
    return found


def _anything() -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}}
