"""The HTTP interface: bounds first, then the question, then its answer; every error is JSON with a ``detail``."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from whatwhere.annotate.local import cores
from whatwhere.classifiers.classifier import Classifier
from whatwhere.errors import DataError, InputError, UnsupportedError, extra
from whatwhere.explanation import Explanation
from whatwhere.server.asked import Asked, Question, answerable, photo_of, question_in_form, question_in_json
from whatwhere.server.batcher import Batcher, ClosedError

with extra("serve", "a server"):
    from fastapi import FastAPI, HTTPException, Request, Response
    from fastapi.openapi.utils import get_openapi
    from fastapi.responses import JSONResponse
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
    from starlette.datastructures import UploadFile
    from starlette.formparsers import MultiPartException, MultiPartParser
    from starlette.requests import ClientDisconnect

Answer = Future[list[Explanation]]
FIELDS = 16
"""Fields of a form, at most."""
PATHS = ("/explain", "/health", "/ready", "/metrics", "/predict", "/setup")
REFUSALS = {
    413: "More bytes than this server takes.",
    415: "Neither JSON nor a form.",
    422: "No picture, one of too many pixels, or an unknown name; says which.",
    429: "Too many questions are waiting.",
    503: "Not answered in time, or stopping.",
}
# a red pixel: what documents show must be true
_EXAMPLE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"


@dataclass(frozen=True)
class Bounds:
    """What a client may cost.

    Attributes:
        upload: bytes of a request.
        pixels: of a picture.
        held: pixels of all pictures that wait, are looked at or written about; more wait undecoded, but for two.
        seconds: from a request's first byte to its answer.
        queue: requests that are being read, waiting or answered.
        batch: pictures that go through a network at once.
        at_once: batches that are looked at at once, on a processor; each has networks of its own.
    """

    upload: int = 20_000_000
    pixels: int = 25_000_000
    held: int = 250_000_000
    seconds: float = 30.0
    queue: int = 128
    batch: int = 16
    at_once: int = field(default_factory=lambda: min(cores(), 4))

    def __post_init__(self) -> None:
        if min(self.upload, self.pixels, self.held, self.queue, self.batch, self.at_once) < 1 or self.seconds <= 0:
            raise InputError(f"every bound is above 0, got {self}")


class Service:
    """Bounds, batches and what is counted; one a server, and what a page asks too."""

    def __init__(self, nets: Mapping[str, Classifier], bounds: Bounds) -> None:
        """Starts the batcher.

        Raises:
            InputError: no classifier at all.
        """
        if not nets:
            raise InputError("wanted at least one model to serve, got none")
        self.bounds = bounds
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "whatwhere_requests", "Answers, by path and status.", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram("whatwhere_seconds", "From request to answer.", ["path"], registry=self.registry)
        batches = Histogram(
            "whatwhere_batch", "Pictures in a batch.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=self.registry
        )
        on_processor = all(net.device.type == "cpu" for net in nets.values())
        self.batcher = Batcher(
            nets, batch=bounds.batch, at_once=bounds.at_once if on_processor else 1, on_batch=batches.observe
        )
        waiting = Gauge("whatwhere_waiting", "Questions in the queue.", registry=self.registry)
        waiting.set_function(lambda: self.batcher.waiting)
        self.inside = 0
        # pictures that are decoded at once: what they cost in memory is bounded by it
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="pictures")
        self._writers = ThreadPoolExecutor(2, thread_name_prefix="answers")  # which make room for pictures
        self._held, self._room = 0, threading.Condition()

    @asynccontextmanager
    async def explained(self, asked: Asked, data: bytes) -> AsyncIterator[list[Explanation]]:
        """The answer to a question; its picture has its room until the context ends.

        Args:
            asked: the question.
            data: the picture's bytes.

        Raises:
            DataError, InputError, UnsupportedError: as ``explain``.
            ClosedError: the server is stopping.
            TimeoutError: there was no room for the picture, or nobody looked at it, in time.
        """

        def queued() -> tuple[Answer, int]:
            photo = photo_of(data, self.bounds.pixels)
            pixels = photo.size[0] * photo.size[1]
            self._take(pixels)
            try:
                return self.batcher.submit(asked, photo, self.bounds.seconds), pixels
            except BaseException:
                self._give(pixels)
                raise

        def left(job: "Future[tuple[Answer, int]]") -> None:  # whenever that is, and however it came to it
            if not job.cancelled() and job.exception() is None:
                answer, pixels = job.result()
                answer.cancel()
                answer.add_done_callback(lambda _: self._give(pixels))

        job = self._readers.submit(queued)
        try:
            answer, _ = await asyncio.wrap_future(job)
            yield await asyncio.wrap_future(answer)
        finally:
            job.add_done_callback(left)

    def _take(self, pixels: int) -> None:
        """Wait until there is room for so many; a picture that is larger than all of it is alone."""
        with self._room:
            if not self._room.wait_for(
                lambda: not self._held or self._held + pixels <= self.bounds.held, self.bounds.seconds
            ):
                raise TimeoutError
            self._held += pixels

    def _give(self, pixels: int) -> None:
        with self._room:
            self._held -= pixels
            self._room.notify_all()

    async def written(self, found: list[Explanation]) -> bytes:
        """The explanations as JSON; regions are found here."""

        def write() -> bytes:
            return json.dumps([one.to_dict() for one in found]).encode()

        return await asyncio.get_running_loop().run_in_executor(self._writers, write)

    def close(self) -> None:
        """Answer what waits, and stop."""
        self.batcher.close()
        self._readers.shutdown()
        self._writers.shutdown()


def build_app(nets: Mapping[str, Classifier], bounds: Bounds | None = None) -> FastAPI:
    """The server as an ASGI application; ``app.state.service`` is what answers.

    Args:
        nets: the classifiers, by the names that clients use; the first where they name none.
        bounds: what a client may cost.

    Raises:
        InputError: no classifier at all.
        MissingExtraError: the extra ``serve`` is not installed.
    """
    service = Service(nets, bounds or Bounds())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(title="whatwhere", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service

    @app.middleware("http")
    async def counted(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        path = request.url.path if request.url.path in PATHS else "other"
        begin, status = time.perf_counter(), 500
        try:
            response = await answer(request)
            status = response.status_code
            return response
        finally:
            service.requests.labels(path, str(status)).inc()
            service.seconds.labels(path).observe(time.perf_counter() - begin)

    @app.exception_handler(InputError)
    @app.exception_handler(DataError)
    @app.exception_handler(UnsupportedError)
    async def refused(_: Request, error: Exception) -> Response:
        return JSONResponse({"detail": str(error)}, 422)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: Exception) -> Response:
        return JSONResponse({"detail": "the client went away"}, 422)

    @app.exception_handler(ClosedError)
    async def stopping(_: Request, error: Exception) -> Response:
        return JSONResponse({"detail": str(error)}, 503)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return JSONResponse({"detail": f"this server failed: {type(error).__name__}"}, 500)

    @app.get("/health", summary="Whether the process answers.")
    async def health() -> dict[str, str]:
        return {"status": "UP"}

    @app.get("/ready", summary="Whether questions are answered.", responses={503: refusal("Stopping.")})
    async def ready() -> dict[str, Any]:
        if not service.batcher.alive:
            raise HTTPException(503, "this server is stopping")
        return {"models": list(service.batcher.nets)}

    text: dict[str, Any] = {"content": {"text/plain": {"schema": {"type": "string"}}}}

    @app.get("/metrics", summary="What is counted, for Prometheus.", response_class=Response, responses={200: text})
    async def metrics() -> Response:
        return Response(generate_latest(service.registry), media_type=CONTENT_TYPE_LATEST)

    @app.post(
        "/explain",
        summary="What is in a picture, and where: one explanation a class.",
        response_class=Response,
        responses={
            200: {
                "description": "One explanation a class.",
                "content": {
                    "application/json": {
                        "schema": {"type": "array", "items": {"$ref": "#/components/schemas/Explanation"}}
                    }
                },
            },
            **{status: refusal(why) for status, why in REFUSALS.items()},
        },
        openapi_extra={"requestBody": {"required": True, "content": _bodies()}},
    )
    async def explain(request: Request) -> Response:
        async with admitted(service):
            question, data = await _read(request, service.bounds.upload)
            asked = answerable(question, service.batcher.nets)
            async with service.explained(asked, data) as found:
                return Response(await service.written(found), media_type="application/json")

    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


@asynccontextmanager
async def admitted(service: Service) -> AsyncIterator[None]:
    """A request's place among those that are here, for as long as it may take.

    Raises:
        HTTPException: 429 where there is no place, 503 where it takes longer.
    """
    bounds = service.bounds
    if service.inside >= bounds.queue:
        raise HTTPException(429, f"{bounds.queue} questions are here already; ask again", {"Retry-After": "1"})
    service.inside += 1
    try:
        async with asyncio.timeout(bounds.seconds):
            yield
    except TimeoutError as error:
        raise HTTPException(503, f"not answered within {bounds.seconds:g} s") from error
    finally:
        service.inside -= 1


def _kind(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def body_of(request: Request, bound: int, kinds: Collection[str]) -> bytes:
    """A request's body.

    Args:
        request: not read yet.
        bound: bytes, at most.
        kinds: content types that are taken.

    Raises:
        HTTPException: 415 where it is of another type, 413 where it has more bytes.
    """
    kind = _kind(request)
    if kind not in kinds:
        raise HTTPException(415, f"wanted {' or '.join(sorted(kinds))}, got {kind[:80]!r}")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > bound:
            raise HTTPException(413, f"wanted at most {bound} bytes, got more")
    return bytes(body)


async def _read(request: Request, bound: int) -> tuple[Question, bytes]:
    body = await body_of(request, bound, {"application/json", "multipart/form-data"})
    return question_in_json(body) if _kind(request) == "application/json" else await _in_form(request, body)


class _InMemory(MultiPartParser):
    """Files of a form stay in memory, whose size is checked already: nothing is written to a disk."""

    spool_max_size = 2**62


async def _in_form(request: Request, body: bytes) -> tuple[Question, bytes]:
    async def whole() -> AsyncIterator[bytes]:
        yield body

    try:
        parser = _InMemory(request.headers, whole(), max_files=1, max_fields=FIELDS)  # type: ignore[arg-type]
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError, AttributeError, TypeError) as error:
        raise InputError(f"body: not a form that can be read: {str(error)[:200]}") from error
    try:
        picture = form.get("image")
        if not isinstance(picture, UploadFile):
            raise InputError("image: wanted a file of that name in the form")
        fields: dict[str, str | list[str]] = {}
        for name in form:
            values = [one for one in form.getlist(name) if isinstance(one, str)]
            if name != "image":
                fields[name] = values if len(values) > 1 else "".join(values)
        return question_in_form(fields), await picture.read()
    finally:
        await form.close()


def refusal(why: str) -> dict[str, Any]:
    """What the OpenAPI document says of an error."""
    schema = {"type": "object", "required": ["detail"], "properties": {"detail": {"type": "string"}}}
    return {"description": why, "content": {"application/json": {"schema": schema}}}


def _bodies() -> dict[str, Any]:
    plain = Question.model_json_schema()
    form: dict[str, Any] = {**plain, "properties": dict(plain["properties"])}
    form["properties"]["image"] = {"type": "string", "format": "binary", "description": "The picture, as a file."}
    for name in ("model", "layer", "method", "preset", "threshold", "target"):
        about = plain["properties"][name]["description"]
        form["properties"][name] = {"type": "string", "minLength": 1, "maxLength": 200, "description": about}
    example = {"image": _EXAMPLE, "target": "top5"}
    return {"multipart/form-data": {"schema": form}, "application/json": {"schema": plain, "example": example}}


def _document(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version="1", routes=app.routes, description="What, and where.")
        text = (files("whatwhere") / "reports" / "explanation.schema.json").read_text()
        one = json.loads(text.replace("#/$defs/", "#/components/schemas/"))
        del one["$schema"]
        parts = found.setdefault("components", {}).setdefault("schemas", {})
        parts |= one.pop("$defs") | {"Explanation": one}
        app.openapi_schema = found
    return app.openapi_schema
