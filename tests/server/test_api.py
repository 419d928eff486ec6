"""What the server answers is what the library says; beyond its bounds it refuses and goes on."""

import base64
import gc
import io
import json
import threading
import time
import weakref
from importlib.resources import files

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis.errors import Unsatisfiable
from PIL import Image

import whatwhere

schemathesis = pytest.importorskip("schemathesis", reason="the extra dev brings schemathesis")
from fastapi.testclient import TestClient  # noqa: E402
from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402

from whatwhere.explanation import Explanation  # noqa: E402
from whatwhere.images import Photo  # noqa: E402
from whatwhere.server import api  # noqa: E402
from whatwhere.server.api import Bounds, build_app  # noqa: E402
from whatwhere.server.asked import Question, answerable  # noqa: E402
from whatwhere.server.batcher import Batcher  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # those of other people's servers and clients
SCHEMA = json.loads((files("whatwhere") / "reports" / "explanation.schema.json").read_text())


def in_base64(data):
    return base64.b64encode(data).decode()


def png(height, width):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def client(net):
    with TestClient(build_app({"lite": net}, Bounds(pixels=1_000_000, upload=2_000_000))) as client:
        yield client


@pytest.mark.parametrize("told", [{"target": "top2"}, {"target": 285, "preset": "balanced", "threshold": 0.3}])
def test_the_answer_is_the_librarys(client, net, photos, told):
    data = photos[0].read_bytes()
    answer = client.post("/explain", json={"image": in_base64(data), **told})
    assert answer.status_code == 200, answer.text
    expected = [one.to_dict() | {"source": "image"} for one in whatwhere.explain(net, photos[0], **told)]
    assert len(answer.json()) == len(expected)
    for one, known in zip(answer.json(), expected, strict=True):
        jsonschema.validate(one, SCHEMA)
        for name in ("logit", "probability", "trust"):  # the server's network is folded
            assert one.pop(name) == pytest.approx(known.pop(name), abs=1e-5)
        assert one == known


def test_a_form_gives_what_json_gives(client, photos):
    data = photos[1].read_bytes()
    form = client.post("/explain", files={"image": ("../../etc/passwd", data)}, data={"target": ["top1", "5"]})
    other = client.post("/explain", json={"image": in_base64(data), "target": ["top1", 5]})
    assert form.status_code == other.status_code == 200, form.text
    assert form.json() == other.json()
    assert form.json()[0]["source"] == "image"


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"image": "/etc/passwd"}, "image"),
        ({"image": "file:///etc/passwd"}, "base64"),
        ({"image": in_base64(b"GIF89a")}, "image"),
        ({"image": in_base64(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")}, "image"),
        ({"method": "gradcm"}, "gradcam"),
        ({"preset": "finest"}, "fast, balanced, best"),
        ({"method": "cam", "preset": "fast"}, "both"),
        ({"target": "no such class"}, "no such class"),
        ({"target": "top11"}, "10"),
        ({"target": -1}, "target"),
        ({"layer": "../x"}, "layer"),
        ({"model": "/tmp"}, "lite"),
        ({"threshold": 1.5}, "threshold"),
        ({"method": "rollout"}, ""),
        ({"more": 1}, "more"),
    ],
)
def test_what_is_wrong_is_said(client, told, said):
    answer = client.post("/explain", json={"image": in_base64(png(30, 40)), **told})
    assert answer.status_code == 422
    assert said in answer.json()["detail"]


def test_beyond_the_bounds(client, net):
    assert client.post("/explain", json={"image": in_base64(png(800, 1300))}).status_code == 413  # noise: 3 MB
    many = io.BytesIO()
    Image.new("RGB", (1001, 1000)).save(many, "PNG")
    answer = client.post("/explain", files={"image": many.getvalue()})
    assert (answer.status_code, "1001 x 1000" in answer.text) == (422, True)
    assert client.post("/explain", content=b"x", headers={"content-type": "text/plain"}).status_code == 415
    with TestClient(build_app({"lite": net}, Bounds(seconds=1e-4))) as hasty:
        assert hasty.post("/explain", json={"image": in_base64(png(30, 40))}).status_code == 503


def test_a_full_queue_refuses_and_what_waits_goes_in_one_batch(net):
    app = build_app({"lite": net}, Bounds(queue=5, batch=4, at_once=1))
    batcher, sizes, begun, go_on = app.state.service.batcher, [], threading.Event(), threading.Event()

    def held(count):
        sizes.append(count)
        begun.set()
        go_on.wait()

    batcher._on_batch = held
    with TestClient(app) as client:
        body = {"image": in_base64(png(30, 40))}
        codes = []
        asking = [threading.Thread(target=lambda: codes.append(client.post("/explain", json=body).status_code))]
        asking[0].start()
        assert begun.wait(60)
        asking += [
            threading.Thread(target=lambda: codes.append(client.post("/explain", json=body).status_code))
            for _ in range(4)
        ]
        for thread in asking[1:]:
            thread.start()
        while batcher.waiting < 4:
            pass
        refused = client.post("/explain", json=body)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        go_on.set()
        for thread in asking:
            thread.join()
        assert codes == [200] * 5
        assert sizes == [1, 4]
        counted = client.get("/metrics").text
        assert 'whatwhere_requests_total{path="/explain",status="200"} 5.0' in counted
        assert 'whatwhere_requests_total{path="/explain",status="429"} 1.0' in counted


def test_batches_are_looked_at_at_once_and_say_what_one_alone_says(net, photos):
    app = build_app({"lite": net}, Bounds(batch=1, at_once=2))
    together = threading.Barrier(2, timeout=60)
    app.state.service.batcher._on_batch = lambda _: together.wait()  # each waits for the other
    answers = {}

    def ask(photo):
        answers[photo] = client.post("/explain", files={"image": photo.read_bytes()}).json()

    with TestClient(app) as client:
        asking = [threading.Thread(target=ask, args=[photo]) for photo in photos[:2]]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
    for photo in photos[:2]:
        (one,) = answers[photo]
        (known,) = whatwhere.explain(net, photo)
        assert (one["label"], one["box"]) == (known.label, known.box.to_list())
        assert one["probability"] == pytest.approx(known.probability, abs=1e-5)


def test_pictures_wait_for_room(net):
    app = build_app({"lite": net}, Bounds(held=2500, at_once=1))  # two of 1200 pixels, or one of any size
    service, sizes, begun, go_on = app.state.service, [], threading.Event(), threading.Event()

    def held(count):
        sizes.append((count, service._held))
        begun.set()
        go_on.wait()

    service.batcher._on_batch = held
    with TestClient(app) as client:
        codes = []

        def ask(picture):
            codes.append(client.post("/explain", json={"image": in_base64(picture)}).status_code)

        asking = [threading.Thread(target=ask, args=[png(*size)]) for size in ((30, 40), (40, 30), (60, 50))]
        asking[0].start()
        assert begun.wait(60)
        asking[1].start()
        while service.batcher.waiting < 1:
            pass
        asking[2].start()  # it is decoded and waits
        while service.inside < 3:
            pass
        asking[2].join(0.3)
        assert (service.batcher.waiting, service._held) == (1, 2400)
        go_on.set()
        for thread in asking:
            thread.join()
    assert codes == [200] * 3
    assert [count for count, _ in sizes] == [1, 1, 1]
    assert sizes[1][1] in {1200, 2400}  # the first may still be written about
    assert sizes[2][1] == 3000
    assert service._held == 0


def test_pictures_have_their_room_until_their_answers_are_written(net, monkeypatch):
    app, alive, most = build_app({"lite": net}, Bounds(held=2400, at_once=1)), [], []
    plainly = api.photo_of

    def noted(*told):
        photo = plainly(*told)
        alive.append(weakref.ref(photo.pixels))
        most.append(sum(one() is not None for one in alive))
        return photo

    monkeypatch.setattr(api, "photo_of", noted)
    monkeypatch.setattr(Explanation, "to_dict", lambda one: time.sleep(0.03) or {"label": one.label})
    with TestClient(app) as client:
        body, codes = {"image": in_base64(png(30, 40))}, []
        asking = [
            threading.Thread(target=lambda: codes.append(client.post("/explain", json=body).status_code))
            for _ in range(16)
        ]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
    assert codes == [200] * 16
    assert max(most) <= 5  # two in the room, two that wait for it, and one that goes
    assert app.state.service._held == 0


def test_a_picture_is_kept_by_nobody_who_waits(net):
    asked, begun, go_on = answerable(Question(image="beside"), {"lite": net}), threading.Event(), threading.Event()

    def held(_):
        begun.set()
        go_on.wait()

    def photo():
        one = Photo(np.zeros((30, 40, 3), np.uint8), "image")
        seen.append(weakref.ref(one))
        return one

    seen, batcher = [], Batcher({"lite": net}, on_batch=held)
    first = batcher.submit(asked, photo(), 60)
    assert begun.wait(60)
    for _ in range(3):
        assert batcher.submit(asked, photo(), 60).cancel()  # given up before anybody looks
    assert batcher.waiting == 0
    go_on.set()
    assert first.result(60)
    del first
    until = time.monotonic() + 10
    while any(one() is not None for one in seen) and time.monotonic() < until:
        gc.collect()
        time.sleep(0.01)
    assert [one() for one in seen] == [None] * 4
    batcher.close()


def test_a_question_that_is_given_up_while_its_picture_is_decoded(net, monkeypatch):
    app = build_app({"lite": net}, Bounds(seconds=0.3))
    service, plainly = app.state.service, api.photo_of

    def slowly(*told):
        time.sleep(0.8)
        return plainly(*told)

    monkeypatch.setattr(api, "photo_of", slowly)
    with TestClient(app) as client:
        assert client.post("/explain", json={"image": in_base64(png(30, 40))}).status_code == 503
        service._readers.shutdown()
        until = time.monotonic() + 10
        while service._held and time.monotonic() < until:
            time.sleep(0.01)
    assert service._held == 0


def test_no_room_in_time(net):
    app = build_app({"lite": net}, Bounds(held=1000, seconds=0.5))
    app.state.service._held = 1
    with TestClient(app) as client:
        answer = client.post("/explain", json={"image": in_base64(png(30, 40))})
        assert (answer.status_code, app.state.service._held) == (503, 1)


def test_ready_until_it_stops(net):
    app = build_app({"lite": net})
    with TestClient(app) as client:
        assert client.get("/health").json() == {"status": "UP"}
        assert client.get("/ready").json() == {"models": ["lite"]}
        app.state.service.batcher.close()
        assert client.get("/ready").status_code == 503
        assert client.post("/explain", json={"image": in_base64(png(30, 40))}).status_code == 503


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
@pytest.mark.parametrize("path", ["/explain", "/health", "/ready", "/metrics"])
def test_it_does_as_its_document_says(client, path, mode):
    async def lasting(scope, receive, send):  # whoever starts and stops it around each request would close it
        if scope["type"] != "lifespan":
            await client.app(scope, receive, send)
            return
        for word in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{word}.complete"})

    described = schemathesis.openapi.from_asgi("/openapi.json", lasting)
    operation = described[path]["post" if path == "/explain" else "get"]
    examples = 60 if path == "/explain" else 5
    seen = set()

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case):
        fields = case.body if isinstance(case.body, dict) and case.media_type == "multipart/form-data" else {}
        assume(not any(isinstance(one, list) and len(one) < 2 for one in fields.values()))  # a field or none, as sent
        # random bytes are of the described type, and no picture: refused, as they should be
        seen.add(case.call_and_validate(excluded_checks=[positive_data_acceptance]).status_code)

    try:
        ask()
    except Unsatisfiable:
        assert mode is schemathesis.GenerationMode.NEGATIVE  # nothing can be wrong with a request that says nothing
        assert path != "/explain"
        return
    assert seen <= {200, 413, 415, 422}


def test_the_documents_own_example_is_answered(client):
    content = client.get("/openapi.json").json()["paths"]["/explain"]["post"]["requestBody"]["content"]
    answer = client.post("/explain", json=content["application/json"]["example"])
    assert answer.status_code == 200
    assert len(answer.json()) == 5
