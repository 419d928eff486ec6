"""Each format, read back by a reader that is not ours."""

import csv
import json
import warnings
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from corpus import oriented
from PIL import Image
from scenes import plain, scene

import whatwhere
from whatwhere.annotate.formats import FORMATS
from whatwhere.annotate.formats.cvat import runs
from whatwhere.annotate.formats.labelstudio import packed
from whatwhere.annotate.formats.polygons import polygons
from whatwhere.annotate.listing import write_list
from whatwhere.annotate.parts import Annotations, Told, tidy, write_part
from whatwhere.annotate.reading import Failed
from whatwhere.annotate.rows import Row, failed_row
from whatwhere.annotate.run import write_formats
from whatwhere.annotate.sources import source_of
from whatwhere.datasets import open_dataset
from whatwhere.errors import InputError
from whatwhere.regions import rle

pytest.importorskip("pyarrow")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own
LABELS = {3: "cat & <dog>", 7: "räd"}
H, W = 40, 60


def masks() -> list[np.ndarray]:
    """A ring with a hole, an ellipse, a pixel and what touches two edges; none of them square."""
    y, x = np.mgrid[:H, :W] + 0.5
    ellipse = ((y - 15) / 10) ** 2 + ((x - 40) / 14) ** 2 <= 1
    ring = (((y - 20) / 12) ** 2 + ((x - 25) / 18) ** 2 <= 1) & (((y - 20) / 4) ** 2 + ((x - 25) / 6) ** 2 > 1)
    pixel = np.zeros((H, W), bool)
    pixel[7, 11] = True
    corner = np.zeros((H, W), bool)
    corner[30:, :5], corner[35:, :20] = True, True
    return [ring, ellipse, pixel, corner]


def row(image: int, path: str, mask: np.ndarray, trust: float, index: int = 3) -> Row:
    rows, columns = np.nonzero(mask)
    edges = {"x0": columns.min(), "y0": rows.min(), "x1": columns.max() + 1, "y1": rows.max() + 1}
    told = {"height": mask.shape[0], "width": mask.shape[1], "label": LABELS[index], "class_index": index}
    told |= {name: float(edge) for name, edge in edges.items()}
    both = {"probability": 0.9, "method": "cam", "model": "m", "sha256": "ab"}
    return Row(image=image, path=path, mask=rle.encode(mask), trust=trust, **told, **both)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A run of five pictures: two regions, one, none, one that is not trusted, and one that failed."""
    root = tmp_path_factory.mktemp("set") / "pictures"
    (root / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.jpg", "sub/b.png", "sub/c.png"):
        Image.fromarray(scene(1, (H, W))[0]).save(root / name)
    (root / "z.jpg").write_bytes(b"nothing")
    out = root.parent / "out"
    tidy(out)
    images, digest = write_list(source_of(str(root)).items(), out, 512)
    Told({"method": "cam", "max_pixels": 10**6}, "m", "net", LABELS, "pictures", str(root), images, 512, digest).save(
        out
    )
    ring, ellipse, pixel, corner = masks()
    nothing = Row(image=2, path="sub/b.png", sha256="cd", height=H, width=W, trust=0.0, method="cam", model="m")
    write_part(
        out,
        0,
        [
            row(0, "a.png", ring, 0.7),
            row(0, "a.png", pixel, 0.8, 7),
            row(1, "sub/b.jpg", ellipse, 0.6, 7),
            nothing,
            row(3, "sub/c.png", corner, 0.2),
            failed_row(4, source_of(str(root / "z.jpg")).items().__next__(), Failed("z.jpg: bad"), "cam", "m"),
        ],
    )
    found = Annotations(out, 0.5)
    write_formats(found, list(FORMATS))
    return found


def test_rows_come_back_as_they_went(found):
    rows = list(found.rows())
    assert [one.path for one in rows] == ["a.png", "a.png", "sub/b.jpg", "sub/b.png", "sub/c.png", "z.jpg"]
    assert rows[0] == row(0, "a.png", masks()[0], 0.7)
    assert rows[-1].error == "z.jpg: bad"
    pictures = list(found)
    assert [[one.trust for one in picture.regions] for picture in pictures] == [[0.8, 0.7], [0.6], [], [], []]


def test_coco_by_pycocotools(found, capsys):
    coco_api = pytest.importorskip("pycocotools.coco")
    ring, ellipse, pixel, _ = masks()
    for name in ("coco", "coco-polygons"):
        read = coco_api.COCO(str(found.folder / name / "instances.json"))
        capsys.readouterr()
        assert [one["file_name"] for one in read.loadImgs(read.getImgIds())] == [
            "a.png",
            "sub/b.jpg",
            "sub/b.png",
            "sub/c.png",
        ]
        assert {one["name"] for one in read.loadCats(read.getCatIds())} == set(LABELS.values())
        of = {(one["image_id"], one["category_id"]): one for one in read.loadAnns(read.getAnnIds())}
        assert of.keys() == {(1, 4), (1, 8), (2, 8)}
        assert of[1, 8]["bbox"] == [11, 7, 1, 1]
        assert of[2, 8]["area"] == ellipse.sum()
        back = read.annToMask(of[2, 8]).astype(bool)
        if name == "coco":
            assert (back == ellipse).all()
            assert (read.annToMask(of[1, 4]) == ring).all()
        else:
            assert (back & ellipse).sum() / (back | ellipse).sum() > 0.93
            assert read.annToMask(of[1, 4])[20, 25] == 1, "a polygon fills the hole"
        assert read.annToMask(of[1, 8]).sum() == pixel.sum()


@pytest.mark.parametrize("mask", masks())
def test_polygons_lie_on_the_edges_of_pixels(mask):
    from pycocotools import mask as coco_mask

    outlines = [outline.ravel().tolist() for outline in polygons(mask, 0)]
    runs = coco_mask.merge(coco_mask.frPyObjects(outlines, H, W))
    y, x = np.mgrid[:H, :W] + 0.5
    hole = ((y - 20) / 4) ** 2 + ((x - 25) / 6) ** 2 <= 1
    filled = mask | hole if mask[20, 8] else mask
    assert (coco_mask.decode(runs) == filled).all()


def test_yolo_by_supervision(found):
    supervision = pytest.importorskip("supervision")
    ring = masks()[0]
    folder = found.folder / "yolo"
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()) == [
        "data.yaml",
        "images/a.png",
        "images/sub/b.jpg",
        "labels/a.txt",
        "labels/sub/b.txt",
    ]
    for name in ("yolo", "yolo-seg"):
        folder = found.folder / name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read = supervision.DetectionDataset.from_yolo(
                str(folder / "images"),
                str(folder / "labels"),
                str(folder / "data.yaml"),
                force_masks=name == "yolo-seg",
            )
        assert read.classes == list(LABELS.values())
        (boxes,) = [one for path, one in read.annotations.items() if path.endswith("a.png")]
        order = np.argsort(boxes.class_id)
        assert boxes.class_id[order].tolist() == [0, 1]
        rows, columns = np.nonzero(ring)
        expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        if name == "yolo":
            assert np.allclose(boxes.xyxy[order], [expected, [11, 7, 12, 8]], atol=1e-3)
        else:
            assert np.abs(boxes.mask[order][0].sum() / (ring.sum() + np.pi * 4 * 6) - 1) < 0.12
    dataset = open_dataset(found.folder / "yolo" / "data.yaml", "train")
    assert len(dataset) == 2


def test_voc_by_supervision(found):
    supervision = pytest.importorskip("supervision")
    folder = found.folder / "voc"
    names = sorted(path.name for path in (folder / "JPEGImages").iterdir())
    assert names == ["a.png", "sub_b-2.png", "sub_b.jpg", "sub_c.png"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = supervision.DetectionDataset.from_pascal_voc(str(folder / "JPEGImages"), str(folder / "Annotations"))
    (boxes,) = [one for path, one in read.annotations.items() if path.endswith("b.jpg")]
    rows, columns = np.nonzero(masks()[1])
    assert boxes.xyxy.tolist() == [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]
    assert [read.classes[i] for i in boxes.class_id] == ["räd"]


def test_label_studio_by_its_converter(found):
    ring = masks()[0]
    tasks = json.loads((found.folder / "labelstudio" / "tasks.json").read_text())
    assert [task["data"]["image"] for task in tasks] == [
        f"/data/local-files/?d=pictures/{name}" for name in ("a.png", "sub/b.jpg", "sub/b.png", "sub/c.png")
    ]
    (first,) = tasks[0]["predictions"]
    assert first["score"] == 0.8
    rectangle, brush = first["result"][2], first["result"][3]
    rows, columns = np.nonzero(ring)
    value = rectangle["value"]
    assert value["x"] * W / 100 == pytest.approx(columns.min())
    assert (value["y"] + value["height"]) * H / 100 == pytest.approx(rows.max() + 1)
    assert value["rectanglelabels"] == brush["value"]["brushlabels"] == ["cat & <dog>"]
    decode_rle = brush_decoder()
    back = decode_rle(brush["value"]["rle"]).reshape(H, W, 4)
    assert (back[..., 3] == 255 * ring).all()
    config = ElementTree.parse(found.folder / "labelstudio" / "label_config.xml").getroot()
    assert [one.get("value") for one in config.iter("Label")] == 2 * list(LABELS.values())
    assert {one.get("name") for one in config} == {"image", rectangle["from_name"], brush["from_name"]}


def brush_decoder():
    """Label Studio's own, without what else its package imports."""
    import importlib.util

    for package in ("label_studio_sdk", "label_studio_converter"):
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            continue
        base = Path(found.origin).parent
        file = next((path for path in (base / "converter" / "brush.py", base / "brush.py") if path.is_file()), None)
        if file is not None:
            spec = importlib.util.spec_from_file_location("label_studio_brush", file)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module.decode_rle
    return pytest.skip("needs Label Studio's converter")


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 3), (200, 330)])
def test_the_brush_of_any_mask(size):
    decode_rle = brush_decoder()
    for seed in range(3):
        mask = np.random.default_rng(seed).random(size) < (0.5, 0.02, 0)[seed]
        back = decode_rle(list(packed(rle.encode(mask)))).reshape(*size, 4)
        assert (back == 255 * mask[..., None]).all()


def test_cvat_in_xml(found):
    """Its own layout of masks: run lengths of the box, row by row, the first of them off."""
    root = ElementTree.parse(found.folder / "cvat" / "annotations.xml").getroot()
    assert root.findtext("version") == "1.1"
    assert [one.text for one in root.findall("meta/task/labels/label/name")] == list(LABELS.values())
    images = root.findall("image")
    assert [(one.get("name"), one.get("width"), one.get("height")) for one in images][:2] == [
        ("a.png", "60", "40"),
        ("sub/b.jpg", "60", "40"),
    ]
    box, mask = images[0].findall("box")[1], images[0].findall("mask")[1]
    assert box.get("group_id") == mask.get("group_id") == "2"
    left, top, width, height = (int(mask.get(word)) for word in ("left", "top", "width", "height"))
    assert [float(box.get(word)) for word in ("xtl", "ytl", "xbr", "ybr")] == [left, top, left + width, top + height]
    lengths = [int(one) for one in mask.get("rle").split(",")]
    values = np.repeat(np.arange(len(lengths)) % 2, lengths).reshape(height, width)
    assert (values == masks()[0][top : top + height, left : left + width]).all()
    assert mask.findtext("attribute") == "0.700"
    assert runs(np.array([[True, True, False], [False, True, True]])) == [0, 2, 2, 2]


def test_csv_by_its_reader(found):
    text = (found.folder / "csv" / "annotations.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    assert [(one["path"], one["class"], one["error"]) for one in rows] == [
        ("a.png", "räd", ""),
        ("a.png", "cat & <dog>", ""),
        ("sub/b.jpg", "räd", ""),
        ("sub/b.png", "", ""),
        ("sub/c.png", "", ""),
        ("z.jpg", "", "z.jpg: bad"),
    ]
    assert [rows[0][edge] for edge in ("x0", "y0", "x1", "y1")] == ["11", "7", "12", "8"]
    assert (rle.decode(json.loads(rows[1]["rle"])) == masks()[0]).all()


def test_formats_are_written_anew_and_others_refused(found):
    (found.folder / "coco" / "old").touch()
    write_formats(found, ["coco"])
    assert [path.name for path in (found.folder / "coco").iterdir()] == ["instances.json"]
    with pytest.raises(InputError, match="nearest: coco"):
        write_formats(found, ["cocoa"])


def test_a_turned_picture_has_boxes_in_its_upright_pixels(tmp_path):
    """What cv2 and browsers show is upright: the box of a bright corner lies where it is seen."""
    import cv2

    (tmp_path / "a.jpg").write_bytes(oriented(6))
    shown = cv2.imread(str(tmp_path / "a.jpg"))
    assert shown.shape[:2] == whatwhere.open_photo(tmp_path / "a.jpg").size == (42, 30)
    assert plain((4, 6)).frame((42, 30)).original == (42, 30)
