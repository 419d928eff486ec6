"""The page of an evaluation, opened in a browser; the files of numbers beside it."""

import csv
import json
import shutil

import numpy as np
import pytest
from scenes import boxed_scene, plain, red_net

import whatwhere
from whatwhere.datasets import open_dataset
from whatwhere.evaluation.evaluate import evaluate, plan_of
from whatwhere.evaluation.tally import Measure
from whatwhere.reports.evaluation import said, write_evaluation
from whatwhere.reports.picture import textured

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "red & <b>hot"
    rows = ["path,class,x0,y0,x1,y1"]
    for number in range(5):
        rows.append(boxed_scene(root, f"red/{number}.png", number, (45, 65)))
    (root / "red" / "broken.png").write_bytes(b"nothing")
    (root / "boxes.csv").write_text("\n".join(rows) + "\n")
    net = whatwhere.load(red_net(), preprocess=plain((45, 65)), labels=["blue", "red"])
    dataset = open_dataset(root)
    evaluation = evaluate(net, dataset, plan_of(["cam", "eigencam"]))
    out = tmp_path_factory.mktemp("out") / "report"
    write_evaluation(evaluation, net, dataset, out)
    return evaluation, out


def test_the_numbers_are_written(written):
    evaluation, out = written
    assert sorted(path.name for path in out.iterdir()) == ["images.csv", "index.html", "results.json"]
    numbers = json.loads((out / "results.json").read_text())
    value, low, high = numbers["localization"]["cam"]["MaxBoxAccV2"]
    assert value == evaluation.where("cam")["MaxBoxAccV2"].value == 1
    assert low <= value <= high
    assert numbers["thresholds"]["cam"] == evaluation.threshold("cam")
    assert "red/broken.png" in numbers["failed"]
    rows = list(csv.DictReader((out / "images.csv").read_text().splitlines()))
    assert len(rows) == 5 * 2
    assert rows[0]["name"] == "red/0.png"
    assert float(rows[0]["iou"]) > 0.5


def test_the_page_in_a_browser(written):
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    evaluation, out = written
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        asked, errors = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto((out / "index.html").as_uri())
        assert "red & <b>hot" in page.title()
        cells = page.locator("#where tr").filter(has_text="MaxBoxAccV2").locator("td").all_inner_texts()
        heads = page.locator("#where th").all_inner_texts()
        shown = cells[heads.index("eigencam")].split()[0]
        assert float(shown) == round(100 * evaluation.where("eigencam")["MaxBoxAccV2"].value, 1)
        pictures = page.locator("#gallery img:visible")
        assert pictures.count() >= 5
        natural = pictures.evaluate_all("all => all.map(one => [one.naturalWidth, one.naturalHeight])")
        assert all(width == 224 and height == 155 for width, height in natural)
        before = pictures.first.get_attribute("src")
        page.locator("label[for=as-texture]").click()
        assert page.locator("#gallery img:visible").count() == pictures.count()
        assert page.locator("#gallery img:visible").first.get_attribute("src") != before
        assert page.locator("#curves polyline").count() >= 8
        assert "broken.png" in page.locator("#failed").inner_text()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
        assert errors == []
        browser.close()


def test_numbers_as_people_read_them():
    assert said("MaxBoxAcc", Measure(0.6833, 0.65, 0.71)) == "68.3"
    assert said("MaxBoxAcc", Measure(0.6833, 0.65, 0.71), interval=True) == "68.3 (65.0 to 71.0)"
    assert said("KL", Measure(1.234, float("nan"), float("nan")), interval=True) == "1.23"
    assert said("PxAP", None) == ""


def test_texture_is_shown_in_proportion_to_the_map():
    pixels = np.full((5, 7, 3), 208, dtype=np.uint8)
    heat = np.zeros((5, 7), dtype=np.float32)
    heat[1, 2], heat[3, 4] = 0.8, 0.4
    shown = textured(pixels, heat)
    assert (shown[1, 2] == 208).all()
    assert (shown[3, 4] == 168).all()
    assert (shown[0, 0] == 128).all()
