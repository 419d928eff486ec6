"""Label Studio's tasks become predictions; a picture is read from nowhere but the root that was told."""

import base64
import io
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from PIL import Image

import whatwhere

schemathesis = pytest.importorskip("schemathesis", reason="the extra dev brings schemathesis")
from fastapi.testclient import TestClient  # noqa: E402

from whatwhere.annotate.formats.labelstudio import packed  # noqa: E402
from whatwhere.regions import rle  # noqa: E402
from whatwhere.regions.components import components  # noqa: E402
from whatwhere.server.api import Bounds, build_app  # noqa: E402
from whatwhere.server.studio import add_studio  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # those of other people's servers and clients


def served(net, root, **bounds):
    app = build_app({"lite": net}, Bounds(**bounds))
    add_studio(app, root)
    return TestClient(app)


@pytest.fixture(scope="module")
def root(tmp_path_factory, photos):
    folder = tmp_path_factory.mktemp("studio") / "root"
    (folder / "a b").mkdir(parents=True)
    (folder / "a b" / "c+d.jpg").write_bytes(photos[0].read_bytes())
    (folder.parent / "outside.jpg").write_bytes(photos[0].read_bytes())
    (folder.parent / "root2").mkdir()
    (folder.parent / "root2" / "near.jpg").write_bytes(photos[0].read_bytes())
    (folder / "link.jpg").symlink_to(folder.parent / "outside.jpg")
    return folder


@pytest.fixture(scope="module")
def client(net, root):
    with served(net, root, upload=2_000_000) as client:
        yield client


def predicted(client, *images):
    body = {"tasks": [{"id": i, "data": {"image": one}} for i, one in enumerate(images)], "project": "1.2"}
    answer = client.post("/predict", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["results"]


def test_a_prediction_is_the_librarys_explanation(client, net, photos):
    data = base64.b64encode(photos[0].read_bytes()).decode()
    told = f"data:image/jpeg;base64,{data}", data, "/data/local-files/?d=a%20b/c%2Bd.jpg"
    found = [predicted(client, one)[0] for one in told]  # one at a time: a batch may round otherwise
    (one,) = whatwhere.explain(net, photos[0])
    (height, width), parts = one.size, components(one.mask)
    assert height != width
    assert found[0] == found[1] == found[2]
    assert found[0]["model_version"] == "lite"
    rectangle, brush = found[0]["result"][:2]
    value, box = rectangle["value"], parts.boxes[0]
    edges = [value["x"] * width, value["y"] * height, value["width"] * width, value["height"] * height]
    assert np.array(edges) / 100 == pytest.approx(np.array([box.x0, box.y0, box.width, box.height], float))
    assert value["rectanglelabels"] == [one.label]
    assert brush["value"]["rle"] == list(packed(rle.encode(parts.mask(0))))
    assert len(found[0]["result"]) == 2 * len(parts.boxes)
    assert 0 < found[0]["score"] <= one.probability


OUTSIDE = ["../outside.jpg", "..%2Foutside.jpg", "../root2/near.jpg", "link.jpg", "/etc/passwd"]
NO_FILE = ["a b", "none.jpg", "", "x%00y", "y" * 5000]


@pytest.mark.parametrize("name", OUTSIDE + NO_FILE)
def test_nothing_is_read_beside_the_root(client, root, name):
    for told in (name, f"{root.parent}/outside.jpg"):
        (found,) = predicted(client, f"/data/local-files/?d={told}")
        assert found["result"] == []
        assert "--label-studio-root" in found["error"]


def test_without_a_root_no_file_is_read(net):
    with served(net, None) as client:
        (found,) = predicted(client, "/data/local-files/?d=a%20b/c%2Bd.jpg")
    assert (found["result"], "reads no files" in found["error"]) == ([], True)


def test_a_bad_picture_loses_no_other(client, photos):
    good = base64.b64encode(photos[1].read_bytes()).decode()
    bad = ["http://127.0.0.1:9/a.jpg", "file:///etc/passwd", "/etc/passwd", "data:text/plain,x", "", 5, None, "AAAA"]
    found = predicted(client, *bad, good)
    assert [one["result"] == [] for one in found] == [True] * len(bad) + [False]
    assert all(one["error"] for one in found[:-1])
    assert "error" not in found[-1]


def test_what_is_no_question_is_refused(client):
    assert client.post("/setup", json=[]).status_code == 422
    for body in (b"", b"[]", b"{}", b'{"tasks": 1}', b'{"tasks": [{}]}', b"[" * 100_000):
        answer = client.post("/predict", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 422
        assert answer.json()["detail"]
    assert client.post("/predict", content=b"x").status_code == 415
    assert client.post("/predict", json={"tasks": [], "more": "x" * 2_000_000}).status_code == 413


def test_more_tasks_than_the_queue_holds(net):
    out = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(out, "PNG")
    with served(net, None, queue=2, batch=2) as client:
        found = predicted(client, *[base64.b64encode(out.getvalue()).decode()] * 5)
        assert len(found) == 5
        assert all("error" not in one for one in found)
        assert client.app.state.service.inside == 0


def test_setup_and_health(client):
    answer = client.post("/setup", json={"project": "1.2", "schema": "<View/>", "hostname": "x"})
    assert answer.json() == {"model_version": "lite"}
    assert client.get("/health").json()["status"] == "UP"


def test_it_is_described(client):
    paths = json.loads(client.get("/openapi.json").text)["paths"]
    assert {"200", "413", "415", "422", "429", "503"} <= set(paths["/predict"]["post"]["responses"])
    assert {"/predict", "/setup"} <= set(paths)


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
@pytest.mark.parametrize("path", ["/predict", "/setup"])
def test_it_does_as_its_document_says(client, path, mode):
    async def lasting(scope, receive, send):  # whoever starts and stops it around each request would close it
        if scope["type"] != "lifespan":
            await client.app(scope, receive, send)
            return
        for word in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{word}.complete"})

    operation = schemathesis.openapi.from_asgi("/openapi.json", lasting)[path]["post"]

    @settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case):
        assert case.call_and_validate().status_code in {200, 415, 422}

    ask()
