"""The examples run an exported file without this package: in Python, and in the browser."""

import functools
import http.server
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scenes import gap_net, plain

import whatwhere
from whatwhere.classifiers.exported import export

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def sigmoid(photos, tmp_path_factory):
    """A small network of several classes a picture, and the probability of the most probable one."""
    folder = tmp_path_factory.mktemp("sigmoid")
    net = whatwhere.load(gap_net(), preprocess=plain((24, 40)), activation="sigmoid")
    export(net, folder / "model.onnx", threshold=0.25, uint8=True, box=True)
    shutil.copyfile(photos[0], folder / "picture.jpg")
    (one,) = whatwhere.explain(net, photos[0])
    return folder, one.probability


@pytest.fixture(scope="module")
def folder(net, photos, tmp_path_factory):
    """The embedded model exported, and a picture."""
    folder = tmp_path_factory.mktemp("served")
    export(net, folder / "model.onnx", threshold=0.25, uint8=True, box=True)
    shutil.copyfile(photos[0], folder / "picture.jpg")
    return folder


def test_in_python(folder):
    words = [EXAMPLES / "where.py", "model.onnx", "picture.jpg", "seen.png"]
    blocked = "import sys, runpy; sys.modules.update(torch=None, whatwhere=None); sys.argv = sys.argv[1:]; "
    code = f"{blocked}runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *label, odds, x0, y0, x1, y1 = done.stdout.split()
    assert " ".join(label) == "Egyptian cat"
    assert 70 < float(odds.rstrip("%")) < 90
    assert np.abs(np.array([x0, y0, x1, y1], int) - [40, 0, 401, 300]).max() <= 3
    assert pixels(folder / "seen.png").shape == pixels(folder / "picture.jpg").shape


def test_a_picture_that_lies_is_seen_upright(folder):
    upright = Image.open(folder / "picture.jpg")
    lying, orientation = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    orientation[0x112] = 6  # to be turned clockwise
    lying.save(folder / "lying.png", exif=orientation)
    words = [sys.executable, str(EXAMPLES / "where.py"), "model.onnx", "lying.png", "lain.png"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.abs(np.array(done.stdout.split()[-4:], int) - [40, 0, 401, 300]).max() <= 3
    assert pixels(folder / "lain.png").shape == pixels(folder / "picture.jpg").shape


def test_sigmoid_in_python(sigmoid):
    folder, probability = sigmoid
    words = [sys.executable, str(EXAMPLES / "where.py"), "model.onnx", "picture.jpg", "seen.png"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("%")[0].split()[-1]) / 100 == pytest.approx(probability, abs=0.02)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_in_the_browser(activation, folder, sigmoid, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    chromium, npm = shutil.which("chromium"), shutil.which("npm")
    if not chromium or not npm:
        pytest.skip("needs chromium and npm")
    packed = subprocess.run(
        [npm, "pack", "onnxruntime-web@1.30.0", "--silent"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    if packed.returncode != 0:
        pytest.skip("npm cannot fetch onnxruntime-web")
    with tarfile.open(tmp_path / packed.stdout.strip()) as archive:
        archive.extractall(tmp_path, filter="data")
    is_sigmoid = activation == "sigmoid"
    folder, probability = sigmoid if is_sigmoid else (folder, None)
    (tmp_path / "package" / "dist").rename(folder / "ort")
    shutil.copyfile(EXAMPLES / "where.html", folder / "index.html")
    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with playwright.sync_playwright() as running:
            browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page()
            faults = []
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.goto(f"http://127.0.0.1:{server.server_port}/")
            page.wait_for_function("document.getElementById('said').textContent != 'looking ...'", timeout=60_000)
            said = page.inner_text("#said")
            page.locator("#seen").screenshot(path=folder / "seen-in-browser.png")
            browser.close()
        server.shutdown()
    assert not faults
    *label, odds, x0, y0, x1, y1 = said.split()
    if is_sigmoid:
        assert float(odds.rstrip("%")) / 100 == pytest.approx(probability, abs=0.02)
        return
    assert " ".join(label) == "Egyptian cat"
    assert 70 < float(odds.rstrip("%")) < 90
    assert np.abs(np.array([x0, y0, x1, y1], float) - [40, 0, 401, 300]).max() <= 3
    seen, plain = pixels(folder / "seen-in-browser.png"), pixels(folder / "picture.jpg")
    redder = (seen - plain)[..., 0] - (seen - plain)[..., 2]
    assert redder[100:200, 150:300].mean() > redder[:, 410:].mean() + 30


def pixels(file):
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"), float)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}  # noqa: RUF012

    def log_message(self, *words):
        pass
