"""The page of a run of annotate, opened in a browser, and the command that makes it."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import whatwhere
from whatwhere.annotate.parts import Annotations
from whatwhere.apps.cli import app
from whatwhere.classifiers.around import around
from whatwhere.classifiers.zoo import build
from whatwhere.reports.annotation import SHEET, contact_sheet, summary_of

pytest.importorskip("pyarrow")
CHROMIUM = shutil.which("chromium")
LEAST = 0.08


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small network of random weights, as a run's folder."""
    torch.manual_seed(0)
    network, preprocess = build("lenet5", pretrained=False, num_classes=3)
    net = around(network, name="lenet5", labels=["<b>cat", "cup & saucer", "rocket"], preprocess=preprocess)
    return whatwhere.save(net, tmp_path_factory.mktemp("model") / "run")


@pytest.fixture(scope="module")
def annotated(tmp_path_factory, photos, model):
    """The photographs that come with the package, a copy, and a file that is none."""
    root = tmp_path_factory.mktemp("set") / "pictures & <b>more"
    root.mkdir()
    for photo in photos:
        shutil.copyfile(photo, root / photo.name)
    shutil.copyfile(photos[0], root / "again.jpg")
    (root / "z.jpg").write_bytes(b"nothing")
    out = root.parent / "out"
    words = ["--model", model, "--format", "coco,yolo", "--workers", 1, "--min-trust", LEAST]
    return root, out, run("annotate", root, "--out", out, *words)


def test_the_command(annotated, model):
    root, out, result = annotated
    assert result.exit_code == 1, result.output
    errors = " ".join(result.stderr.split())
    assert "5 pictures" in errors
    assert "1 files are copies of others" in errors
    assert "failed 1 x not an image" in errors
    assert {"coco", "yolo", "parts", "run.json", "source.parquet", "index.html", "contact.jpg"} <= {
        path.name for path in out.iterdir()
    }
    coco = json.loads((out / "coco" / "instances.json").read_text())
    method = Annotations(out).told.settings["method"]
    (seen,) = whatwhere.explain(whatwhere.load(model), root / "chelsea.jpg", method=method)
    cat = next(one for one in coco["annotations"] if one["bbox"][:2] == [seen.box.x0, seen.box.y0])
    assert cat["category_id"] == seen.index + 1
    assert cat["bbox"] == [seen.box.x0, seen.box.y0, seen.box.width, seen.box.height]


def test_the_command_goes_on_and_refuses(annotated, model):
    root, out, _ = annotated
    again = run("annotate", root, "--model", model, "--out", out)
    assert again.exit_code == 2
    assert "--resume goes on" in again.stderr
    other = run("annotate", root, "--model", model, "--out", out, "--resume", "--method", "eigencam")
    assert other.exit_code == 2
    assert " then, eigencam now" in " ".join(other.stderr.split())
    more = run("annotate", root, "--model", model, "--out", out, "--resume", "--min-trust", 0, "--format", "csv")
    assert more.exit_code == 1
    assert (out / "csv" / "annotations.csv").is_file()
    wrong = run("annotate", root, "--model", model, "--out", out, "--format", "cocoa")
    assert wrong.exit_code == 2
    assert "nearest: coco" in wrong.stderr
    for words, message in (
        (["--engine", "spark"], "engine is one of local, ray"),
        (["--classes", "nothing"], "nearest"),
    ):
        result = run("annotate", root, "--model", model, "--out", out.parent / "other", *words)
        assert result.exit_code == 2, result.output
        assert message in " ".join(result.stderr.split())
    assert run("annotate", root / "nowhere", "--model", model, "--out", out.parent / "other").exit_code == 1


def test_the_summary_counts(annotated):
    _, out, _ = annotated
    summary = summary_of(Annotations(out, LEAST))
    assert (summary.pictures, summary.failed, summary.copies) == (5, 1, 1)
    rows = [row for row in Annotations(out).rows() if row.box is not None]
    assert summary.regions == sum(summary.bars) == len(rows)
    assert summary.trusted == sum(row.trust >= LEAST for row in rows)
    best = [max(row.trust for row in rows if row.image == image) for image in range(4)]
    assert [one.regions[0].trust for one in summary.doubtful] == sorted(trust for trust in best if trust >= LEAST)
    assert [one.regions[0].trust for one in summary.left_out] == sorted((t for t in best if t < LEAST), reverse=True)
    assert sum(pictures for _, pictures, _, _ in summary.classes()) == 4
    assert [one.image for one in summary.some] == [0, 1, 2, 3]


def test_the_contact_sheet(annotated):
    _, out, _ = annotated
    found = Annotations(out)
    with Image.open(out / "contact.jpg") as sheet:
        assert sheet.size[0] % 168 == 0
        assert np.asarray(sheet).std() > 20
    assert contact_sheet(found, []) is None
    assert len(summary_of(found).some) <= SHEET[0] * SHEET[1]


def test_the_page_in_a_browser(annotated, model):
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    _, out, _ = annotated
    run(
        "annotate", annotated[0], "--model", model, "--out", out, "--resume", "--format", "none", "--min-trust", LEAST
    )
    text = (out / "index.html").read_text()
    assert not re.search(r'(?:src|href)="(?!data:)', text)
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for width in (1200, 390):
            page = browser.new_page(viewport={"width": width, "height": 900})
            asked, errors = [], []
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
            page.goto(f"file://{out}/index.html")
            assert "pictures & <b>more" in page.inner_text("h1")
            assert not errors
            assert all(url.startswith(("file:", "data:")) for url in asked)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.locator(".histogram i").count() == 20
            trusts = re.findall(r"trust (\d\.\d\d)", page.locator("section >> nth=0").inner_text())
            summary = summary_of(Annotations(out, LEAST))
            shown = [*summary.doubtful, *summary.left_out]
            assert trusts == [f"{one.regions[0].trust:.2f}" for one in shown]
            assert "z.jpg: not an image" in page.inner_text("body")
            pictures = page.evaluate("[...document.images].every(one => one.naturalWidth > 0)")
            assert pictures
        browser.close()


def test_a_page_whose_pictures_have_gone(annotated, tmp_path):
    from whatwhere.reports.annotation import write_annotation_report

    root, out, _ = annotated
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    told = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(told | {"root": str(root / "elsewhere")}))
    found = Annotations(copy, LEAST)
    assert "gone" in write_annotation_report(found, summary_of(found), copy).read_text()
