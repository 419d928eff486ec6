"""The page for people: a picture in, the five most probable classes, and where each is seen."""

import base64
from abc import ABCMeta
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from whatwhere.classifiers.hooked import HookedClassifier
from whatwhere.errors import WhatWhereError, extra
from whatwhere.explanation import Explanation
from whatwhere.maps import METHODS
from whatwhere.presets import PRESETS
from whatwhere.regions.threshold import mask_of
from whatwhere.reports.picture import caption
from whatwhere.server.api import PATHS, Service
from whatwhere.server.asked import Asked, Question, answerable
from whatwhere.server.view import as_coco, as_npy, as_png, at_threshold, reduced, shown

with extra("serve", "a page"):
    import gradio as gr
    from fastapi import FastAPI, HTTPException
    from fastapi.responses import JSONResponse
    from starlette.datastructures import Headers
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

KEPT_SECONDS = 600
"""How long a picture stays with a page that nobody touches."""
VISITORS = 64
"""Pages whose pictures are kept at once; the one that rested longest is forgotten."""
ENVELOPE = 2**16
"""Bytes that a request may have around the picture that it uploads."""
NOTHING, OWN = "nothing", "its own"
CSS = """
.gradio-container {max-width: 1180px !important; margin: 0 auto !important}
#title {margin: .4rem 0} #title h1 {font-size: 1.35rem; margin: 0} #title p {margin: .15rem 0 0; opacity: .75}
#classes label {width: 100%} #said {min-height: 1.6em}
footer {display: none !important}
"""
_SAVE = """
(text) => {
  if (!text) return;
  const [name, kind, data] = text.split("|"), link = document.createElement("a");
  link.href = `data:${kind};base64,${data}`; link.download = name; link.click();
}
"""


@dataclass(frozen=True, eq=False)
class Seen:
    """What a page's visitor looks at.

    Attributes:
        data: the picture's bytes.
        one: the explanation that is shown.
        other: the one beside it, or None.
    """

    data: bytes
    one: Explanation
    other: Explanation | None


def with_page(app: FastAPI) -> FastAPI:
    """The same application with the page at ``/``.

    Raises:
        MissingExtraError: the extra ``serve`` is not installed.
    """
    service: Service = app.state.service
    theme = gr.themes.Default(primary_hue="slate", neutral_hue="slate", font=["system-ui", "sans-serif"])
    mounted: FastAPI = gr.mount_gradio_app(
        app,
        _page(service),
        "/",
        theme=theme,
        css=CSS,
        max_file_size=service.bounds.upload,
        footer_links=[],
        ssr_mode=False,
    )
    mounted.add_middleware(_Bounded, most=service.bounds.upload + ENVELOPE)
    return mounted


class _Bounded:
    """The page reads requests whole: those of more bytes are refused. What clients ask has bounds of its own."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PATHS:
            await self.app(scope, receive, send)
            return
        came, refusal = 0, HTTPException(413, f"wanted at most {self.most} bytes, got more")
        told = Headers(scope=scope).get("content-length", "")
        if told.isdecimal() and int(told) > self.most:
            await JSONResponse({"detail": refusal.detail}, refusal.status_code)(scope, receive, send)
            return

        async def counted() -> Message:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > self.most:
                raise refusal
            return message

        await self.app(scope, counted, send)


class Looking:
    """What the page asks the server, in its words."""

    def __init__(self, service: Service) -> None:
        """Asks through the same batches and bounds as clients do."""
        self.service = service

    async def what(self, data: bytes, model: str) -> list[Explanation]:
        """The five most probable classes."""
        return await self._answer(data, self._asked(model=model, target="top5"))

    async def where(self, data: bytes, index: int, model: str, layer: str, method: str, beside: str) -> Seen:
        """Where a class is seen, and where what is beside it sees that."""
        own = None if layer == OWN else layer
        (one,) = await self._answer(data, self._asked(model=model, layer=own, method=method, target=index))
        if beside == NOTHING:
            return Seen(data, one, None)
        if beside in self.service.batcher.nets:
            # another model has other classes: its own of that name, else its most probable one
            labels = self.service.batcher.nets[beside].labels
            asked = self._asked(model=beside, method=method, target=one.label if one.label in labels else "top1")
        else:
            asked = self._asked(model=model, layer=own, method=beside, target=index)
        (other,) = await self._answer(data, asked)
        return Seen(data, one, other)

    def _asked(self, **told: Any) -> Asked:
        return answerable(Question(image="beside", **told), self.service.batcher.nets)

    async def _answer(self, data: bytes, asked: Asked) -> list[Explanation]:
        try:
            async with self.service.explained(asked, data) as found:
                return found
        except TimeoutError as error:
            raise _said(f"not answered within {self.service.bounds.seconds:g} s") from error


def layers_of(service: Service, model: str) -> list[str]:
    """Where a model can be split, by name: the modules of its two upper levels, deepest last."""
    net = service.batcher.nets[model]
    found = [name for name, _ in net.network.named_modules() if name and name.count(".") <= 1]
    own = net.layer if isinstance(net, HookedClassifier) else None
    return [OWN, *(name for name in found if name != own)]


def _drawn(seen: Seen | None, threshold: float, opacity: float) -> tuple[Any, Any, str]:
    """Pictures of what is seen already, and a line of words: no network is asked."""
    if seen is None:
        return None, gr.update(value=None, visible=False), ""
    one = at_threshold(seen.one, threshold)
    said = f"**{caption(one)}** by {one.method}: " + (
        "box " + ", ".join(f"{edge:.0f}" for edge in one.box.to_list()) if one.box else "nowhere"
    )
    if seen.other is None:
        return reduced(shown(one, opacity)), gr.update(value=None, visible=False), said
    other = at_threshold(seen.other, threshold)
    return (
        reduced(shown(one, opacity)),
        gr.update(value=reduced(shown(other, opacity)), visible=True),
        f"{said}. Beside it **{caption(other)}** by {other.method}; the regions' IoU is {_overlap(one, other):.2f}",
    )


def _overlap(one: Explanation, other: Explanation) -> float:
    """Intersection over union of two masks."""
    first, second = (mask_of(each.heat, each.threshold) for each in (one, other))
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else 0.0


def _said(what: Exception | str) -> gr.Error:
    """An error for the person who made it, and not for the log."""
    return gr.Error(str(what), duration=8, print_exception=False)


async def _kept(self: Any, source: Any) -> Any:
    """Gradio's own way of an input into its folder, but for addresses, which it would fetch."""
    if not Path(str(source)).is_absolute():
        raise _said("a picture is uploaded; no address is fetched")
    return await gr.Image.async_move_resource_to_block_cache(self, source)


def _as_it_is(self: Any, uploaded: Any) -> Any:
    """The file's path; Gradio would clip 16 bits to 8, and say its paths of what it cannot read."""
    return uploaded.path if uploaded else None


# a class, since Gradio builds components anew for a visitor; made past its metaclass, which writes a file beside this
_OWN = {"async_move_resource_to_block_cache": _kept, "preprocess": _as_it_is}
Upload: Any = ABCMeta.__new__(type(gr.Image), "Image", (gr.Image,), _OWN)


def _page(service: Service) -> Any:
    looking, nets = Looking(service), service.batcher.nets
    first = next(iter(nets))
    ways = [*PRESETS, *METHODS]

    async def where(data: bytes, index: int, *told: Any) -> tuple[Any, ...]:
        *ask, opacity = told
        seen = await looking.where(data, index, *ask)
        threshold = seen.one.threshold if isinstance(seen.one.threshold, float) else 0.25
        return seen, threshold, *_drawn(seen, threshold, opacity)

    async def look(path: str | None, *told: Any) -> tuple[Any, ...]:
        if path is None:
            return None, gr.update(choices=[], value=None), 0.25, *_drawn(None, 0.25, 0.5)
        try:
            data = Path(path).read_bytes()
            found = await looking.what(data, told[0])
            choices = [(caption(one), one.index) for one in found]
            seen, *rest = await where(data, found[0].index, *told)
        except WhatWhereError as error:
            raise _said(error) from error
        return seen, gr.update(choices=choices, value=found[0].index), *rest

    async def again(seen: Seen | None, index: int | None, *told: Any) -> tuple[Any, ...]:
        if seen is None or index is None:
            return None, 0.25, *_drawn(None, 0.25, 0.5)
        try:
            return await where(seen.data, index, *told)
        except WhatWhereError as error:
            raise _said(error) from error

    async def compared(seen: Seen | None, index: int | None, *told: Any) -> tuple[Any, ...]:
        *told_before, opacity, threshold = told  # which stays where the person put it
        found, *_ = await again(seen, index, *told_before, opacity)
        return found, *_drawn(found, threshold, opacity)

    with gr.Blocks(title="whatwhere", analytics_enabled=False, delete_cache=(60, KEPT_SECONDS)) as page:
        gr.Markdown(
            "# What is in the picture, and where\nDrop or paste a picture, or take an example.", elem_id="title"
        )
        state = gr.State(None, time_to_live=KEPT_SECONDS)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                picture = Upload(
                    label="Picture", type="filepath", sources=["upload", "clipboard"], height=250, elem_id="picture"
                )
                examples = sorted(str(one) for one in Path(str(files("whatwhere") / "photos")).glob("*.jpg"))
                gr.Examples(examples, picture, label="Examples", cache_examples=False)
                classes = gr.Radio(
                    [],
                    label="What",
                    info="The most probable; choose one to see where.",
                    elem_id="classes",
                )
            with gr.Column(scale=3, min_width=300):
                with gr.Row():
                    result = gr.Image(label="Where", interactive=False, buttons=["fullscreen"], elem_id="where")
                    beside = gr.Image(label="Beside it", interactive=False, buttons=["fullscreen"], visible=False)
                said = gr.Markdown(elem_id="said")
                threshold = gr.Slider(
                    0,
                    0.99,
                    0.25,
                    step=0.01,
                    label="Threshold",
                    info="Share of the most evidence a region needs.",
                    elem_id="threshold",
                )
                opacity = gr.Slider(0, 1, 0.5, step=0.05, label="Opacity", info="Of the colours over the picture.")
                with gr.Row():
                    method = gr.Dropdown(
                        ways,
                        value="fast",
                        label="Method",
                        info="Fast, balanced, best are presets.",
                        elem_id="method",
                    )
                    against = gr.Dropdown(
                        [NOTHING, *(name for name in nets if name != first), *ways],
                        value=NOTHING,
                        label="Beside it",
                        info="A second method or model.",
                        elem_id="against",
                    )
                with gr.Row():
                    model = gr.Dropdown(list(nets), value=first, label="Model", info="What looks.")
                    layer = gr.Dropdown(
                        layers_of(service, first), value=OWN, label="Layer", info="Where its evidence is read."
                    )
                with gr.Row():
                    saves = [
                        (gr.Button(label, size="sm", min_width=130), make)
                        for label, make in (
                            ("Save picture", _picture_file),
                            ("Save map", _map_file),
                            ("Save map, NPY", _values_file),
                            ("Save box, COCO", _boxes_file),
                        )
                    ]
                file = gr.Textbox(visible="hidden")

        told, drawn = [model, layer, method, against, opacity], [result, beside, said]
        once: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last", "queue": True}
        picture.change(look, [picture, *told], [state, classes, threshold, *drawn])
        against.input(compared, [state, classes, *told, threshold], [state, *drawn])
        for change in (classes.input, method.input, layer.input):
            change(again, [state, classes, *told], [state, threshold, *drawn])
        model.input(lambda name: gr.update(choices=layers_of(service, name), value=OWN), model, layer).then(
            look, [picture, *told], [state, classes, threshold, *drawn]
        )
        for slider in (threshold, opacity):
            slider.input(_drawn, [state, threshold, opacity], drawn, **once)
        for button, make in saves:
            button.click(make, [state, threshold, opacity], file).then(None, file, None, js=_SAVE)
    page.state_session_capacity = VISITORS
    page.queue(max_size=service.bounds.queue, default_concurrency_limit=8)
    return page


def _file(name: str, kind: str, make: Callable[[Explanation, float], bytes]) -> Callable[..., str]:
    """What a button gives to the browser: name, kind and bytes in one text."""

    def made(seen: Seen | None, threshold: float, opacity: float) -> str:
        if seen is None:
            raise _said("wanted a picture first")
        data = make(at_threshold(seen.one, threshold), opacity)
        return f"{name}|{kind}|{base64.b64encode(data).decode()}"

    return made


_picture_file = _file("where.png", "image/png", lambda one, opacity: as_png(shown(one, opacity)))
_map_file = _file("map.png", "image/png", lambda one, _: as_png((one.heat * 255).round().astype("uint8")))
_values_file = _file("map.npy", "application/octet-stream", lambda one, _: as_npy(one))
_boxes_file = _file("boxes.json", "application/json", lambda one, _: as_coco(one))
