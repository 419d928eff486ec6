"""Every layout as it is published, in small: boxes in pixel edges, classes, masks, what is left out."""

import json

import numpy as np
import pytest
from PIL import Image

from whatwhere.classifiers.labels import Labels
from whatwhere.datasets import LAYOUTS, open_dataset, open_splits, read_mapping
from whatwhere.datasets.sample import box_around
from whatwhere.errors import DataError, InputError
from whatwhere.geometry import Box

H, W = 5, 7


def picture(path, size=(H, W)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((*size, 3), dtype=np.uint8)).save(path)


def mask(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(values, dtype=np.uint8)).save(path)


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def block(value, x0, y0, x1, y1, under=None):
    values = np.zeros((H, W), dtype=np.uint8) if under is None else under
    values[y0:y1, x0:x1] = value
    return values


def xml(name, edges, *, difficult=0, size=(W, H)):
    corners = "".join(
        f"<{key}>{edge}</{key}>" for key, edge in zip(("xmin", "ymin", "xmax", "ymax"), edges, strict=True)
    )
    one = f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{corners}</bndbox></object>"
    return f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{one}</annotation>"


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "birds"
    picture(root / "val" / "b" / "1.png")
    picture(root / "val" / "a" / "2.png")
    picture(root / "train" / "c" / "3.png")
    text(root / "boxes.csv", "path,class,x0,y0,x1,y1\nval/b/1.png,b,1,2,4,5\nval/b/1.png,b,5,0,7,1\n")
    text(root / "classes.csv", 'class,name\na,"auk, great auk"\nb,bee-eater\nc,crow\n')
    mask(root / "masks" / "val" / "b" / "1.png", block(128, 0, 0, 1, 1, block(255, 1, 2, 4, 5)))
    return root


def test_folders(folder):
    found = open_dataset(folder)
    assert found.name == "birds, val"
    assert found.classes == ("a", "b", "c")
    assert [sample.name for sample in found] == ["val/a/2.png", "val/b/1.png"]
    bare, full = found
    assert (bare.labels, dict(bare.boxes), bare.truth(0, (H, W))) == ((0,), {}, None)
    assert full.labels == (1,)
    assert full.boxes == {1: (Box(1, 2, 4, 5), Box(5, 0, 7, 1))}
    truth = full.truth(1, (H, W))
    assert (truth[2:, 1:4] == 1).all()
    assert truth[0, 0] == -1
    assert (truth == 1).sum() == 9
    assert full.truth(0, (H, W)) is None
    assert full.photo().size == (H, W)
    assert found.indices_in(Labels(["bee-eater", "great auk"])) == {0: 1, 1: 0}
    assert open_dataset(folder, "train").classes == found.classes
    with pytest.raises(DataError, match=r"mask has \(H, W\) \(5, 7\), and the picture \(7, 5\)"):
        full.truth(1, (W, H))


def test_folders_without_splits(tmp_path):
    picture(tmp_path / "x" / "b" / "1.png")
    picture(tmp_path / "x" / "a" / "2.png")
    found = open_dataset(tmp_path / "x")
    assert [(sample.name, sample.labels) for sample in found] == [("a/2.png", (0,)), ("b/1.png", (1,))]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("val/b/1.png,b,4,2,1,5", "row 2: a box has x0 < x1"),
        ("val/b/1.png,b,4,2,x,5", "row 2: wanted a box x0 y0 x1 y1, got 4 2 x 5"),
    ],
)
def test_damaged_tables_name_file_and_row(folder, rows, message):
    text(folder / "boxes.csv", f"path,class,x0,y0,x1,y1\n{rows}\n")
    with pytest.raises(DataError, match=rf"boxes.csv, {message}"):
        open_dataset(folder)


def test_a_table_without_its_columns(folder):
    text(folder / "boxes.csv", "path,x0,y0,x1,y1\n")
    with pytest.raises(DataError, match="there is no class"):
        open_dataset(folder)


def test_wrong_places_are_said(tmp_path, folder):
    with pytest.raises(InputError, match="has no split 'tset'; it has val, train"):
        open_dataset(folder, "tset")
    with pytest.raises(InputError, match="no layout is called 'cocoa'; nearest: coco"):
        open_dataset(folder, layout="cocoa")
    with pytest.raises(DataError, match="no such file or folder"):
        open_dataset(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image files"):
        open_dataset(tmp_path / "empty")
    picture(tmp_path / "flat" / "1.png")
    with pytest.raises(DataError, match=r"1\.png: wanted it in a folder named after its class, or in a row of boxes"):
        open_dataset(tmp_path / "flat")
    text(tmp_path / "flat" / "boxes.csv", "path,class,x0,y0,x1,y1\n1.png,b,1,2,4,5\n1.png,a,0,0,1,1\n")
    (only,) = found = open_dataset(tmp_path / "flat")
    assert found.classes == ("a", "b")
    assert (only.labels, only.boxes[1]) == ((0, 1), (Box(1, 2, 4, 5),))


def coco(tmp_path, **changes):
    picture(tmp_path / "val2017" / "1.png")
    picture(tmp_path / "val2017" / "2.png")
    square = [[1, 2, 4, 2, 4, 5, 1, 5]]
    content = {
        "images": [
            {"id": 10, "file_name": "1.png", "width": W, "height": H},
            {"id": 11, "file_name": "2.png", "width": W, "height": H},
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 10, "category_id": 7, "bbox": [1, 2, 3, 3], "segmentation": square},
            {"id": 2, "image_id": 10, "category_id": 3, "bbox": [0.5, 0, 2, 1]},
            {
                "id": 3,
                "image_id": 10,
                "category_id": 7,
                "iscrowd": 1,
                "bbox": [5, 0, 2, 5],
                "segmentation": {"size": [H, W], "counts": [25, 10]},
            },
        ],
        **changes,
    }
    text(tmp_path / "annotations" / "instances_val2017.json", json.dumps(content))
    return tmp_path


def test_coco(tmp_path):
    pytest.importorskip("pycocotools")
    found = open_dataset(coco(tmp_path), "val")
    assert found.classes == ("cat", "dog")
    first, second = found
    assert first.labels == (0, 1)
    assert first.boxes == {0: (Box(0.5, 0, 2.5, 1),), 1: (Box(1, 2, 4, 5),)}
    assert (second.labels, dict(second.boxes)) == ((), {})
    truth = first.truth(1, (H, W))
    assert (truth[2:5, 1:4] == 1).all()
    assert (truth[:, 5:] == -1).all()
    assert (truth == 1).sum() == 9
    assert first.truth(0, (H, W)) is None
    by_file = open_dataset(tmp_path / "annotations" / "instances_val2017.json")
    assert [sample.name for sample in by_file] == ["1.png", "2.png"]


def test_coco_of_another_size_names_the_image(tmp_path):
    found = open_dataset(coco(tmp_path, images=[{"id": 10, "file_name": "1.png", "width": H, "height": W}]))
    with pytest.raises(DataError, match=r"1.png: its annotations are for 5 x 7 pixels, and it has 7 x 5"):
        found.samples[0].photo()


def test_damaged_coco(tmp_path):
    text(tmp_path / "a.json", '{"images": []}')
    with pytest.raises(DataError, match="not COCO's annotations, or damaged: KeyError: 'categories'"):
        open_dataset(tmp_path / "a.json")
    odd = [{"id": 4, "image_id": 10, "category_id": 7, "bbox": edges} for edges in ([1, 2, 0, 3], [1, 2, 3, 3])]
    assert open_dataset(coco(tmp_path / "b", annotations=odd)).samples[0].boxes == {1: (Box(1, 2, 4, 5),)}
    broken = [{"id": 4, "image_id": 10, "category_id": 7, "bbox": [1, 2, "x", 3]}]
    with pytest.raises(DataError, match="not COCO's annotations"):
        open_dataset(coco(tmp_path / "c", annotations=broken))


@pytest.mark.parametrize("nested", [True, False])
def test_voc(tmp_path, nested):
    year = tmp_path / "VOCdevkit" / "VOC2012" if nested else tmp_path / "VOC2012"
    picture(year / "JPEGImages" / "2008_1.jpg")
    picture(year / "JPEGImages" / "2008_2.jpg")
    text(year / "ImageSets" / "Main" / "val.txt", "2008_1\n2008_2\n")
    text(year / "Annotations" / "2008_1.xml", xml("cat", (2, 3, 4, 5)))
    text(year / "Annotations" / "2008_2.xml", xml("dog", (2, 3, 4, 5), difficult=1))
    mask(
        year / "SegmentationClass" / "2008_1.png", block(255, 0, 0, 7, 1, block(12, 5, 3, 7, 5, block(8, 1, 2, 4, 5)))
    )
    found = open_dataset(tmp_path if nested else year)
    assert len(found.classes) == 20
    (cat,) = found
    assert cat.boxes == {7: (Box(1, 2, 4, 5),)}
    truth = cat.truth(7, (H, W))
    assert (truth[2:, 1:4] == 1).all()
    assert (truth == 1).sum() == 9
    assert (truth[0] == -1).all()
    assert truth[4, 6] == 0


def test_yolo(tmp_path):
    text(tmp_path / "data.yaml", "path: .\ntrain: images/train\nval: images/val\nnames:\n  0: cat\n  1: dog\n")
    picture(tmp_path / "images" / "val" / "1.png", (10, 20))
    picture(tmp_path / "images" / "val" / "2.png", (10, 20))
    text(tmp_path / "labels" / "val" / "1.txt", "1 0.5 0.5 0.2 0.4\n0 0.1 0.2 0.4 0.2 0.4 0.8 0.1 0.8\n")
    found = open_dataset(tmp_path)
    assert found.classes == ("cat", "dog")
    first, second = found
    assert first.boxes[1] == (Box(8, 3, 12, 7),)
    assert first.boxes[0] == (Box(2, 2, 8, 8),)
    assert first.truth(0, (10, 20))[5, 5] == 1
    assert first.truth(0, (10, 20))[5, 12] == 0
    assert first.truth(1, (10, 20)) is None
    assert second.labels == ()
    text(tmp_path / "labels" / "val" / "2.txt", "2 0.5 0.5 0.2 0.4\n")
    with pytest.raises(DataError, match=r"2.txt, line 1: wanted a class in 0..1"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("written", ["xml", "table"])
def test_imagenet(tmp_path, written):
    base = tmp_path / "ILSVRC"
    picture(base / "Data" / "CLS-LOC" / "val" / "ILSVRC2012_val_00000001.JPEG")
    if written == "xml":
        text(base / "Annotations" / "CLS-LOC" / "val" / "ILSVRC2012_val_00000001.xml", xml("n01440764", (0, 1, 7, 5)))
    else:
        text(
            tmp_path / "LOC_val_solution.csv",
            "ImageId,PredictionString\nILSVRC2012_val_00000001,n01440764 0 1 7 5 \n",
        )
    text(tmp_path / "LOC_synset_mapping.txt", "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n")
    found = open_dataset(tmp_path)
    assert found.classes == ("n01440764", "n01443537")
    (only,) = found
    assert only.boxes == {0: (Box(0, 1, 7, 5),)}
    assert found.indices_in(Labels(["Carassius auratus", "tench"])) == {0: 1, 1: 0}


def test_cub(tmp_path):
    root = tmp_path / "CUB_200_2011"
    for name in ("001.Black_footed_Albatross/a.jpg", "002.Laysan_Albatross/b.jpg"):
        picture(root / "images" / name)
    text(root / "images.txt", "1 001.Black_footed_Albatross/a.jpg\n2 002.Laysan_Albatross/b.jpg\n")
    text(root / "classes.txt", "1 001.Black_footed_Albatross\n2 002.Laysan_Albatross\n")
    text(root / "image_class_labels.txt", "1 1\n2 2\n")
    text(root / "bounding_boxes.txt", "1 1.0 2.0 3.0 3.0\n2 0.0 0.0 5.0 4.0\n")
    text(root / "train_test_split.txt", "1 0\n2 1\n")
    mask(
        tmp_path / "segmentations" / "001.Black_footed_Albatross" / "a.png",
        block(102, 0, 0, 1, 1, block(204, 1, 2, 4, 5)),
    )
    (test,), (train,) = open_dataset(root), open_dataset(root, "train")
    assert test.boxes == {0: (Box(1, 2, 4, 5),)}
    assert train.boxes == {1: (Box(0, 0, 5, 4),)}
    assert (test.truth(0, (H, W)) == 1).sum() == 9
    assert train.truth(1, (H, W)) is None
    assert open_dataset(root).indices_in(Labels(["Laysan Albatross"])) == {1: 0}


def test_tiny_imagenet(tmp_path):
    text(tmp_path / "wnids.txt", "n2\nn1\n")
    text(tmp_path / "words.txt", "n1\ttench, Tinca tinca\nn2\tgoldfish\nn3\tnobody\n")
    picture(tmp_path / "val" / "images" / "val_0.JPEG", (64, 64))
    text(tmp_path / "val" / "val_annotations.txt", "val_0.JPEG\tn2\t0\t32\t44\t62\n")
    picture(tmp_path / "train" / "n1" / "images" / "n1_0.JPEG", (64, 64))
    text(tmp_path / "train" / "n1" / "n1_boxes.txt", "n1_0.JPEG\t0\t10\t63\t58\n")
    text(tmp_path / "train" / "n2" / "n2_boxes.txt", "")
    (val,), (train,) = open_dataset(tmp_path), open_dataset(tmp_path, "train")
    assert (val.labels, val.boxes) == ((1,), {1: (Box(0, 32, 45, 63),)})
    assert (train.labels, train.boxes) == ((0,), {0: (Box(0, 10, 64, 59),)})
    assert open_dataset(tmp_path).indices_in(Labels(["Tinca tinca"])) == {0: 0}


def test_pets(tmp_path):
    home = tmp_path / "oxford-iiit-pet"
    picture(home / "images" / "Abyssinian_1.jpg")
    picture(home / "images" / "Abyssinian_2.jpg")
    text(home / "annotations" / "test.txt", "Abyssinian_1 1 1 1\n")
    text(home / "annotations" / "trainval.txt", "Abyssinian_2 1 1 1\n")
    around = block(1, 2, 2, 4, 4, block(3, 1, 1, 5, 5, np.full((H, W), 2, dtype=np.uint8)))
    mask(home / "annotations" / "trimaps" / "Abyssinian_1.png", around)
    for root in (tmp_path, home):
        (only,) = found = open_dataset(root)
        assert found.classes == ("Abyssinian",)
        truth = only.truth(0, (H, W))
        assert (truth == 1).sum() == 4
        assert (truth == -1).sum() == 12
        assert box_around(truth) == Box(1.5, 1.5, 4.5, 4.5)


def test_places(tmp_path):
    text(tmp_path / "categories_places365.txt", "/a/airfield 0\n/b/bow_window/indoor 1\n")
    text(tmp_path / "places365_val.txt", "Places365_val_1.jpg 1\n")
    picture(tmp_path / "val_256" / "Places365_val_1.jpg")
    (only,) = found = open_dataset(tmp_path)
    assert found.classes == ("airfield", "bow_window/indoor")
    assert only.labels == (1,)
    assert only.photo().size == (H, W)


def test_boxes_go_half_way_to_unknown_outlines_only():
    truth = np.zeros((9, 20), dtype=np.int8)
    truth[1:6, 1:7] = -1
    truth[2:5, 2:6] = 1
    truth[8, 15:] = -1
    assert box_around(truth) == Box(1.5, 1.5, 6.5, 5.5)


def test_numbers_are_no_indices_of_the_classifier(tmp_path):
    for name in ("1", "2", "tabby"):
        picture(tmp_path / "x" / name / "1.png")
    found = open_dataset(tmp_path / "x")
    assert found.indices_in(Labels(["goldfish", "shark", "ray", "tabby"])) == {2: 3}
    assert found.indices_in(Labels(["2", "1"])) == {0: 1, 1: 0}


def test_a_class_may_be_called_as_a_split_is(tmp_path):
    for name in ("bus", "train"):
        picture(tmp_path / "x" / name / "1.png")
    assert open_dataset(tmp_path / "x").classes == ("bus", "train")


def test_rows_that_name_no_file_are_refused(folder):
    text(folder / "boxes.csv", "path,class,x0,y0,x1,y1\n1.png,b,1,2,4,5\n")
    with pytest.raises(DataError, match=r"boxes.csv: no row's path is a file; the first is 1.png"):
        open_dataset(folder)
    text(folder / "boxes.csv", "path,class,x0,y0,x1,y1\nval/b/1.png\n")
    with pytest.raises(DataError, match=r"boxes.csv, row 2: wanted path, class"):
        open_dataset(folder)


def test_a_table_from_a_spreadsheet(folder):
    (folder / "boxes.csv").write_bytes(b"\xef\xbb\xbfpath,class,x0,y0,x1,y1\r\nval/b/1.png,b,1,2,4,5\r\n")
    assert open_dataset(folder).samples[1].boxes == {1: (Box(1, 2, 4, 5),)}


def test_voc_of_other_classes(tmp_path):
    picture(tmp_path / "JPEGImages" / "1.png")
    text(tmp_path / "ImageSets" / "Main" / "test.txt", "1\n")
    text(tmp_path / "Annotations" / "1.xml", xml("forklift", (2, 3, 4, 5)))
    (only,) = found = open_dataset(tmp_path)
    assert found.classes == ("forklift",)
    assert only.boxes == {0: (Box(1, 2, 4, 5),)}
    assert only.photo().size == (H, W)


def test_yolo_as_other_tools_write_it(tmp_path):
    text(tmp_path / "data.yaml", "val: ../valid/images\nnames: [yes, 1]\n")
    (tmp_path / "valid" / "images").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "valid" / "images" / "1.jpg", exif=exif)
    text(tmp_path / "valid" / "labels" / "1.txt", "1 0.5 0.5 0.2 0.4\n")
    (only,) = found = open_dataset(tmp_path)
    assert found.classes == ("True", "1")
    assert only.photo().size == (20, 10)
    assert only.boxes == {1: (Box(4, 6, 6, 14),)}
    text(tmp_path / "data.yaml", "val: list.txt\nnames: [a, b]\n")
    text(tmp_path / "list.txt", "valid/images/1.jpg\n")
    assert [sample.boxes for sample in open_dataset(tmp_path)] == [only.boxes]


def test_masks_of_one_bit(tmp_path):
    values = np.zeros((H, W), dtype=bool)
    values[1:3, 2:5] = True
    picture(tmp_path / "x" / "a" / "1.png")
    (tmp_path / "x" / "masks" / "a").mkdir(parents=True)
    Image.fromarray(values).save(tmp_path / "x" / "masks" / "a" / "1.png")
    (only,) = open_dataset(tmp_path / "x")
    assert np.array_equal(only.truth(0, (H, W)) == 1, values)


def test_no_box_around_nothing():
    assert box_around(np.zeros((H, W), dtype=np.int8)) is None


def test_classes_that_nobody_knows(folder):
    with pytest.raises(InputError, match="knows none of the classes of birds, val: a, b, c"):
        open_dataset(folder).indices_in(Labels(["x", "y"]))
    with pytest.raises(InputError, match="has no class 'z'"):
        open_dataset(folder).indices_in(Labels(["x", "y"]), {"z": 0})
    assert open_dataset(folder).indices_in(Labels(["x", "y"]), {"a": "y", "b": 0}) == {0: 1, 1: 0}


def test_a_mapping_is_read(tmp_path):
    text(tmp_path / "map.csv", "class,index\na,5\nb,tabby\n")
    assert read_mapping(tmp_path / "map.csv") == {"a": 5, "b": "tabby"}
    text(tmp_path / "map.csv", "class,index\na\n")
    with pytest.raises(DataError, match="row 2: wanted two columns"):
        read_mapping(tmp_path / "map.csv")


def test_a_sample_of_a_data_set_is_always_the_same(tmp_path):
    for number in range(20):
        picture(tmp_path / "x" / "a" / f"{number:02}.png")
    found = open_dataset(tmp_path / "x")
    names = [sample.name for sample in found.sampled(5)]
    assert names == [sample.name for sample in found.sampled(5)]
    assert names == sorted(names)
    assert len(names) == 5
    assert found.sampled(100) is found


def test_every_layout_says_what_it_is():
    for module in LAYOUTS.values():
        assert module.__doc__
        assert module.read.__doc__


@pytest.mark.parametrize(
    ("name", "split", "images", "boxed"), [("imagenet-boxes", "val", 600, 600), ("pets37", "test", 94, 94)]
)
def test_the_pictures_for_development(name, split, images, boxed, imagenet_boxes):
    found = open_dataset(imagenet_boxes.parent / name)
    assert found.name == f"{name}, {split}"
    assert len(found) == images
    assert sum(bool(sample.boxes) for sample in found) == boxed
    first = found.samples[0]
    size = first.photo().size
    for box in first.boxes[first.labels[0]]:
        assert box.intersection(Box(0, 0, size[1], size[0])) == box


def test_all_splits_as_one(tmp_path):
    for name in ("train/cat/a.png", "train/dog/b.png", "test/cat/c.png", "val/dog/d.png"):
        picture(tmp_path / name)
    whole = open_splits(tmp_path)
    assert whole.name == f"{tmp_path.name}, train, val, test"
    assert [(sample.name, sample.split) for sample in whole] == [
        ("train/cat/a.png", "train"),
        ("train/dog/b.png", "train"),
        ("val/dog/d.png", "val"),
        ("test/cat/c.png", "test"),
    ]
    assert [whole.classes[sample.labels[0]] for sample in whole] == ["cat", "dog", "dog", "cat"]
    assert [sample.split for sample in open_splits(tmp_path, ["val", "test"])] == ["val", "test"]
    with pytest.raises(InputError, match="no split 'tset'"):
        open_splits(tmp_path, ["train", "tset"])


def test_a_class_that_is_called_train_is_no_split(tmp_path):
    for name in ("train/a.png", "bus/b.png"):
        picture(tmp_path / name)
    whole = open_splits(tmp_path)
    assert whole.classes == ("bus", "train")
    assert len(whole) == 2


def test_a_damaged_split_is_an_error(tmp_path):
    for name in ("train/cat/a.png", "train/loose.png", "test/cat/b.png"):
        picture(tmp_path / name)
    with pytest.raises(DataError, match=r"loose.png: wanted it in a folder"):
        open_splits(tmp_path)
    assert len(open_splits(tmp_path, ["test"])) == 1


def test_splits_with_classes_of_their_own(tmp_path):
    (tmp_path / "annotations").mkdir()
    for split, names in (("train", ["dog", "cat"]), ("val", ["cat", "cow"])):
        picture(tmp_path / split / "x.png")
        images = [{"id": 1, "file_name": "x.png", "height": H, "width": W}]
        notes = [
            {"id": number, "image_id": 1, "category_id": number, "bbox": [2, 1, 3, 4]} for number in range(len(names))
        ]
        content = {
            "images": images,
            "annotations": notes,
            "categories": [{"id": number, "name": name} for number, name in enumerate(names)],
        }
        (tmp_path / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    whole = open_splits(tmp_path)
    assert whole.classes == ("dog", "cat", "cow")
    assert [sample.name for sample in whole] == ["x.png", "val/x.png"]
    assert [sample.labels for sample in whole] == [(0, 1), (1, 2)]
    single = open_splits(tmp_path / "annotations/instances_val.json")
    assert [(sample.name, sample.split) for sample in single] == [("x.png", "")]
