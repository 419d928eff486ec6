"""What a person does with the page, in a browser, at a desk's width and a phone's."""

import base64
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

import whatwhere
from whatwhere.reports.picture import caption

pytest.importorskip("gradio", reason="the extra serve brings gradio")
sync_api = pytest.importorskip("playwright.sync_api", reason="the extra dev brings playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


@pytest.fixture(scope="module")
def address(net, tmp_path_factory):
    """Of the command itself, in a process of its own, with two models."""
    second = tmp_path_factory.mktemp("runs") / "second"
    whatwhere.save(whatwhere.load(labels=[name.upper() for name in net.labels]), second)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = f"http://127.0.0.1:{port}"
    words = ["serve", "efficientnet-lite0", str(second), "--port", str(port)]
    with subprocess.Popen([sys.executable, "-m", "whatwhere", *words]) as server:
        try:
            while not answers(f"{found}/ready"):
                assert server.poll() is None
                time.sleep(0.1)
            yield found
        finally:
            server.terminate()


def answers(address):
    try:
        with urllib.request.urlopen(address) as answer:
            return answer.read().decode()
    except urllib.error.URLError:
        return ""


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as run:
        browser = run.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def batches(address):
    return re.search(r"^whatwhere_batch_count (\S+)$", answers(f"{address}/metrics"), re.MULTILINE)[1]


def source_of(page):
    return page.locator("#where img").first.get_attribute("src")


@pytest.mark.parametrize("width", [1280, 390])
def test_a_person_sees_what_and_where(address, browser, net, photos, tmp_path, width):
    page = browser.new_page(viewport={"width": width, "height": 900})
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(address)
    page.locator("#picture input[type=file]").set_input_files(photos[0])
    known = whatwhere.explain(net, photos[0], target="top5")
    choices = page.locator("#classes label")
    sync_api.expect(choices).to_have_count(5, timeout=60_000)
    for choice, one in zip(choices.all(), known, strict=True):
        assert one.label in choice.inner_text()
    said = page.locator("#said")
    sync_api.expect(said).to_contain_text(known[0].label)
    page.wait_for_selector("#where img")
    page.screenshot(path=tmp_path / f"seen-{width}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    page.locator("#classes input").nth(0).focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Space")  # the second class, by keyboard
    sync_api.expect(said).to_contain_text(known[1].label, timeout=60_000)

    before, looked = source_of(page), batches(address)
    words = said.inner_text()
    slider = page.locator("#threshold input[type=range]")
    slider.focus()
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("(words) => document.querySelector('#said').innerText.trim() != words.trim()", arg=words)
    page.wait_for_function("(before) => document.querySelector('#where img').src != before", arg=before)
    assert batches(address) == looked  # the box followed, and nobody looked again
    threshold = float(slider.input_value())
    (expected,) = whatwhere.explain(net, photos[0], target=known[1].index, threshold=threshold)
    box = ", ".join(f"{edge:.0f}" for edge in expected.box.to_list())
    sync_api.expect(said).to_contain_text(f"box {box}")

    with page.expect_download() as got:
        page.get_by_role("button", name="Save map, NPY").click()
    heat = np.load(io.BytesIO(got.value.path().read_bytes()))
    np.testing.assert_allclose(heat, expected.heat, atol=1e-5)
    with page.expect_download() as got:
        page.get_by_role("button", name="Save box, COCO").click()
    found = json.loads(got.value.path().read_text())
    x, y, w, h = found["annotations"][0]["bbox"]
    assert [x, y, x + w, y + h] == expected.box.to_list()

    page.locator("#against input").click()
    page.get_by_role("option", name="hirescam", exact=True).click()
    sync_api.expect(said).to_contain_text("by hirescam", timeout=60_000)
    page.screenshot(path=tmp_path / f"beside-{width}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert not problems
    page.close()


def chosen(page, label, name):
    page.get_by_label(label, exact=True).click()
    page.get_by_role("option", name=name, exact=True).click()


def test_examples_layers_models_and_what_is_no_picture(address, browser, net, photos, tmp_path):
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.goto(address)
    said, first = page.locator("#said"), page.locator("#classes label").first
    page.locator("button:has(img)").first.click()  # the first example
    (known,) = whatwhere.explain(net, photos[0])
    sync_api.expect(said).to_contain_text(known.label, timeout=60_000)

    before = source_of(page)
    opacity = page.get_by_label("range slider for Opacity")
    opacity.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("(before) => document.querySelector('#where img').src != before", arg=before)

    chosen(page, "Layer", "blocks.4")
    (deep,) = whatwhere.explain(net.at("blocks.4"), photos[0])
    sync_api.expect(said).to_contain_text("box " + ", ".join(f"{e:.0f}" for e in deep.box.to_list()), timeout=60_000)
    chosen(page, "Layer", "its own")
    chosen(page, "Beside it", "second")  # the same network with names of its own
    sync_api.expect(said).to_contain_text("IoU is 1.00", timeout=60_000)
    chosen(page, "Model", "second")
    sync_api.expect(said).to_contain_text(f"{known.label.upper()} ", timeout=60_000)
    page.locator("#classes label", has_text=known.label.upper()).wait_for()
    page.screenshot(path=tmp_path / "models.png", full_page=True)

    broken = tmp_path / "broken.png"
    broken.write_bytes(photos[0].read_bytes()[:3000])
    page.get_by_label("Remove Image").click()
    sync_api.expect(first).to_have_count(0, timeout=60_000)
    page.locator("#picture input[type=file]").set_input_files(broken)
    page.get_by_text("image:").wait_for()
    page.get_by_label("Remove Image").click()

    words = tmp_path / "words.jpg"
    words.write_text("no picture")
    page.locator("#picture input[type=file]").set_input_files(words)
    page.get_by_text("got 10 bytes that are none").wait_for()
    page.get_by_label("Remove Image").click()

    (other,) = whatwhere.explain(net, photos[1])
    assert other.label != known.label
    page.evaluate(
        """async (data) => {
          const picture = await createImageBitmap(await (await fetch(data)).blob());
          const canvas = new OffscreenCanvas(picture.width, picture.height);
          canvas.getContext("2d").drawImage(picture, 0, 0);
          const png = await canvas.convertToBlob({type: "image/png"});
          await navigator.clipboard.write([new ClipboardItem({"image/png": png})]);
        }""",
        "data:image/jpeg;base64," + base64.b64encode(photos[1].read_bytes()).decode(),
    )
    page.get_by_label("Paste from clipboard").click()
    sync_api.expect(said).to_contain_text(other.label.upper(), timeout=60_000)
    context.close()


def test_odd_pictures_are_seen_as_the_library_sees_them(address, browser, net, tmp_path):
    deep, long = tmp_path / "deep.png", tmp_path / "long.png"
    grey = np.linspace(0, 65_535, 60 * 80).reshape(60, 80).astype(np.uint16)
    Image.fromarray(grey).save(deep)
    Image.new("RGB", (17_000, 2), "red").save(long)
    for file in (deep, long):
        page = browser.new_page()
        page.goto(address)
        page.locator("#picture input[type=file]").set_input_files(file)
        (known,) = whatwhere.explain(net, file)
        sync_api.expect(page.locator("#said")).to_contain_text(caption(known), timeout=60_000)
        page.wait_for_selector("#where img")
        page.close()


@pytest.mark.parametrize(
    ("path", "said"), [("/etc/passwd", "error"), ("http://example.org/a.png", "no address is fetched")]
)
def test_the_page_reads_no_path_and_fetches_no_address(address, path, said):
    picture = {"path": path, "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [picture, "efficientnet-lite0", "its own", "fast", "nothing", 0.5]}).encode()
    ask = urllib.request.Request(f"{address}/gradio_api/call/look", body, {"content-type": "application/json"})
    with urllib.request.urlopen(ask) as asked:
        event = json.load(asked)["event_id"]
    answer = answers(f"{address}/gradio_api/call/look/{event}")
    assert "event: error" in answer
    assert said in answer


def test_the_page_takes_no_more_bytes_than_its_bound(net):
    from fastapi.testclient import TestClient

    from whatwhere.server.api import Bounds, build_app
    from whatwhere.server.page import ENVELOPE, with_page

    bound = 100_000
    with TestClient(with_page(build_app({"lite": net}, Bounds(upload=bound, at_once=1)))) as client:

        def chunks():
            for _ in range(50):
                yield b"x" * 10_000

        for path in ("/gradio_api/queue/join", "/gradio_api/call/look", "/gradio_api/upload", "/explain"):
            answer = client.post(path, content=b"x" * 500_000, headers={"content-type": "application/json"})
            assert answer.status_code == 413, path
        answer = client.post("/gradio_api/call/look", content=chunks(), headers={"content-type": "application/json"})
        assert answer.status_code in {400, 413}
        files = {"files": ("a.png", b"x" * (bound - ENVELOPE // 2))}
        assert client.post("/gradio_api/upload", files=files).status_code == 200
