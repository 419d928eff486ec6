"""Each format, read back by a reader that is not ours."""

import csv
import json
import os
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
from whatwhere.errors import DataError, InputError
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
    assert first["model_version"] == f"{found.told.name} ({found.told.model[:12]})"
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


def written(base: Path, names: dict[str, Path | str], source: Path) -> Annotations:
    """A run of pictures, by their names in the source and where they are made; a cross in each."""
    for place in names.values():
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene(1, (H, W))[0]).save(str(place), "PNG")
    out = base / "out"
    tidy(out)
    images, digest = write_list(source_of(str(source)).items(), out, 512)
    items = list(source_of(str(source)).items())
    assert [one.name for one in items] == list(names)
    told = {"method": "cam", "max_pixels": 10**6}, "m", "net", LABELS, str(source), source_of(str(source)).root
    Told(*told, images, 512, digest).save(out)
    write_part(out, 0, [row(i, one.path, masks()[1], 0.9) for i, one in enumerate(items)])
    return Annotations(out)


def in_folder(base: Path, *names: str) -> Annotations:
    return written(base, {name: base / "pictures" / name for name in names}, base / "pictures")


BOX = (26.0, 5.0, 54.0, 25.0)


@pytest.mark.parametrize("form", ["coco", "yolo", "voc"])
def test_what_is_written_is_a_data_set_of_ours(tmp_path, form):
    """Names with spaces, dots, folders called images, twice the same, and too long for a file's name."""
    y, x = np.nonzero(masks()[1])
    assert (x.min(), y.min(), x.max() + 1, y.max() + 1) == BOX
    long = "é" * 60
    names = ["a b.png", "a.b.png", "a.jpg", "a.png", "images/c.png", "x/images/images/d.png", f"{long}/{long}/x.png"]
    found = in_folder(tmp_path, *names)
    write_formats(found, [form])
    dataset = open_dataset(found.folder / form / "instances.json" if form == "coco" else found.folder / form)
    assert {one.path.resolve() for one in dataset} == {tmp_path / "pictures" / name for name in names}
    assert len(dataset) == len({one.path for one in dataset}) == len(names)
    for one in dataset:
        ((box,),) = one.boxes.values()
        assert np.allclose(box.to_list(), BOX, atol=1e-3)
        assert one.photo().size == (H, W)


def test_names_that_become_one(tmp_path):
    found = in_folder(tmp_path, *(f"{'x' * 240}{odd}.png" for odd in "#$%&"))
    for form, folder in (("yolo", "images"), ("voc", "JPEGImages")):
        write_formats(found, [form])
        names = sorted(path.name for path in (found.folder / form / folder).iterdir())
        assert names == [f"{'x' * 196}{again}.png" for again in ("-2", "-3", "-4", "")]


def test_coco_of_pictures_whose_first_has_gone(tmp_path):
    found = in_folder(tmp_path, "a.png", "b.png")
    write_formats(found, ["coco"])
    (tmp_path / "pictures" / "a.png").unlink()
    assert len(open_dataset(found.folder / "coco" / "instances.json")) == 2
    (tmp_path / "pictures" / "b.png").unlink()
    with pytest.raises(DataError, match=r"found nowhere near: a\.png"):
        open_dataset(found.folder / "coco" / "instances.json")


def test_label_studio_of_a_list_that_names_pictures_elsewhere(tmp_path):
    lists, other = tmp_path / "lists", tmp_path / "other é" / "b.png"
    lists.mkdir()
    names = {"a.png": lists / "a.png", "../c.png": tmp_path / "c.png", str(other): other}
    names["/dev/shm/../shm/x.png"] = tmp_path / "far.png"
    (lists / "list.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    write_formats(written(tmp_path, names, lists / "list.txt"), ["labelstudio"])
    tasks = json.loads((tmp_path / "out" / "labelstudio" / "tasks.json").read_text())
    assert [task["data"]["image"].removeprefix("/data/local-files/?d=") for task in tasks] == [
        "lists/a.png",
        "c.png",
        "other%20%C3%A9/b.png",
        "dev/shm/x.png",
    ]


def test_folders_whose_names_are_no_text(tmp_path):
    odd = tmp_path / os.fsdecode(b"\xff")
    found = in_folder(odd, "a.png")
    for folder in write_formats(found, list(FORMATS)):
        assert any(folder.iterdir())
    task = json.loads((odd / "out" / "labelstudio" / "tasks.json").read_text())[0]
    assert task["data"]["image"].endswith("?d=pictures/a.png")
    assert len(open_dataset(odd / "out" / "coco" / "instances.json")) == 1


def test_csv_of_odd_names_and_wide_pictures(tmp_path):
    found = in_folder(tmp_path, "a\rb.png", 'c"\n,.png')
    wide = np.zeros((1, 1_234_570), bool)
    wide[:, 1_234_567:] = True
    write_part(found.folder, 1, [row(2, "wide.png", wide, 0.9)])
    write_formats(found, ["csv"])
    with (found.folder / "csv" / "annotations.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [one["path"] for one in rows] == ["a\rb.png", 'c"\n,.png', "wide.png"]
    assert [rows[2][edge] for edge in ("x0", "y0", "x1", "y1")] == ["1234567", "0", "1234570", "1"]


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
