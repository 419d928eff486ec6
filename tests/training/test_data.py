"""What is read, left out, held out, drawn and shown."""

import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from training.conftest import figure, write

from whatwhere.errors import DataError, InputError
from whatwhere.images import Preprocess
from whatwhere.training.data import Drawn, Shown, split_data
from whatwhere.training.recipe import Recipe

PLAIN = Preprocess(size=(24, 40), mean=(0.0,) * 3, std=(1.0,) * 3)


def test_splits_of_a_folder(figures):
    found = split_data(figures, Recipe())
    assert (len(found.train), found.validation, found.test.name) == (30, None, "data, test")
    assert found.train.classes == ("disc", "square", "stripes")
    assert found.train.targets().sum(0).tolist() == [10, 10, 10]
    assert not found.notes
    assert not found.multiple


def test_a_plain_folder_is_trained_on_and_a_tenth_held_out(tmp_path):
    write(tmp_path / "all", {"disc": 20, "square": 30})
    found = split_data(tmp_path / "all", Recipe())
    assert (len(found.train), len(found.validation)) == (45, 5)
    assert Counter(sample.labels[0] for sample in found.validation.samples) == {0: 2, 1: 3}
    names = {sample.name for sample in found.train.samples} | {sample.name for sample in found.validation.samples}
    assert len(names) == 50
    assert {sample.name for sample in found.test} == {sample.name for sample in found.validation.samples}


def test_a_validation_split_is_found(figures):
    shutil.copytree(figures / "test", figures / "val")
    assert len(split_data(figures, Recipe()).validation) == 9
    assert split_data(figures, Recipe(validation=0.0)).validation is None


def test_what_cannot_be_read_is_left_out_and_said(figures):
    (figures / "train/disc/000.png").write_bytes(b"no picture")
    (figures / "train/disc/001.png").write_bytes(b"")
    found = split_data(figures, Recipe())
    assert len(found.train) == 28
    assert sorted(found.unreadable) == ["train/disc/000.png", "train/disc/001.png"]
    assert "2 images cannot be read" in found.notes[0]
    with pytest.raises(DataError, match=r"train/disc/000\.png.*--strict"):
        split_data(figures, Recipe(), strict=True)


def test_empty_classes_are_left_out_and_said(figures):
    (figures / "train/wheel").mkdir()
    (figures / "test/wheel").mkdir()
    Image.fromarray(figure(0, 7)).save(figures / "test/wheel/one.png")
    found = split_data(figures, Recipe())
    assert found.train.classes == ("disc", "square", "stripes")
    assert "1 classes have no images" in found.notes[0]
    assert "wheel" in found.notes[0]
    assert "1 images of data, test show classes that are not" in found.notes[1]


def test_an_unsplit_folder_and_layouts_by_name(tmp_path):
    write(tmp_path / "all", {"disc": 3, "square": 3})
    assert len(split_data(tmp_path / "all", Recipe(), layout="folder").train) == 6
    write(tmp_path / "odd/training", {"disc": 3, "square": 3})
    write(tmp_path / "odd/testing", {"disc": 1, "square": 1})
    with pytest.raises(InputError, match="learn"):
        split_data(tmp_path / "odd", Recipe(split="learn"))
    found = split_data(tmp_path / "odd", Recipe(split="training", test="testing"))
    assert (len(found.train), len(found.test)) == (6, 2)


def test_other_layouts_are_trained_on_their_training_split(tmp_path):
    """Tiny-ImageNet's own: train/n01/images/*.JPEG, val/images/*.JPEG with a table."""
    root = tmp_path / "tiny-imagenet-200"
    for kind, wnid in enumerate(("n01", "n02")):
        (root / "train" / wnid / "images").mkdir(parents=True)
        for number in range(4):
            Image.fromarray(figure(kind, number)).save(root / f"train/{wnid}/images/{wnid}_{number}.JPEG")
        (root / f"train/{wnid}/{wnid}_boxes.txt").write_text(
            "".join(f"{wnid}_{number}.JPEG\t1\t2\t30\t40\n" for number in range(4))
        )
    (root / "val/images").mkdir(parents=True)
    Image.fromarray(figure(0, 9)).save(root / "val/images/val_0.JPEG")
    (root / "val/val_annotations.txt").write_text("val_0.JPEG\tn01\t1\t2\t30\t40\n")
    (root / "wnids.txt").write_text("n01\nn02\n")
    (root / "words.txt").write_text("n01\tdisc\nn02\tsquare\n")
    found = split_data(root, Recipe())
    assert (len(found.train), len(found.validation)) == (8, 1)
    assert "no images of 1 of the classes" in found.notes[0]


def test_a_validation_split_of_which_nothing_can_be_used(figures):
    (figures / "val/disc").mkdir(parents=True)
    (figures / "val/disc/a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="val: no image"):
        split_data(figures, Recipe())


def test_a_class_of_which_nothing_can_be_read(figures):
    for file in (figures / "train/disc").iterdir():
        file.write_bytes(b"no picture")
    with pytest.raises(DataError, match="no image can be read of disc"):
        split_data(figures, Recipe())


def test_one_class_is_not_enough(tmp_path):
    write(tmp_path / "all", {"disc": 3})
    with pytest.raises(DataError, match="two classes, got 1: disc"):
        split_data(tmp_path / "all", Recipe())


def test_duplicates_across_splits_are_said(figures):
    shutil.copy(figures / "train/disc/004.png", figures / "test/disc/again.png")
    (note,) = split_data(figures, Recipe()).notes
    assert note == "1 images of data, test are trained on as well: test/disc/again.png = train/disc/004.png"
    with pytest.raises(DataError, match="trained on as well"):
        split_data(figures, Recipe(), strict=True)


def test_no_such_split(figures):
    with pytest.raises(InputError, match="learn"):
        split_data(figures, Recipe(split="learn"))


def test_every_image_once_an_epoch_in_another_order(figures):
    pictures = split_data(figures, Recipe()).train
    drawn = Drawn(pictures, Recipe(seed=3))
    orders = []
    for epoch in (0, 1):
        drawn.set_epoch(epoch)
        items = list(drawn)
        assert {one for one, _ in items} == {epoch}
        assert sorted(index for _, index in items) == list(range(30))
        orders.append([index for _, index in items])
    assert orders[0] != orders[1]
    again = Drawn(pictures, Recipe(seed=3))
    assert [index for _, index in again] == orders[0]


def test_devices_share_an_epoch(figures):
    pictures = split_data(figures, Recipe()).train
    shares = [list(Drawn(pictures, Recipe(), rank, 4)) for rank in range(4)]
    assert [len(share) for share in shares] == [7] * 4
    assert len({item for share in shares for item in share}) == 28


def test_balanced_drawing(tmp_path):
    write(tmp_path / "all", {"disc": 40, "square": 4})
    pictures = split_data(tmp_path / "all", Recipe(validation=0.0)).train
    drawn, labels = Drawn(pictures, Recipe(balanced=True)), []
    for epoch in range(20):
        drawn.set_epoch(epoch)
        labels += [pictures.samples[index].labels[0] for _, index in drawn]
    assert np.mean(labels) == pytest.approx(0.5, abs=0.05)


def test_what_is_shown_depends_on_epoch_and_image_alone(figures):
    pictures = split_data(figures, Recipe()).train
    shown = Shown(pictures, PLAIN, Recipe(augment="trivial"))
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, _ = shown[0, 5]
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(shown[0, 5][0], first)
    assert not torch.equal(shown[1, 5][0], first)
    assert first.shape == (3, 24, 40)
    assert shown[0, 5][1].tolist() == [1, 0, 0]


def test_without_augmentation_the_whole_image_is_shown(figures):
    pictures = split_data(figures, Recipe()).train
    shown, _ = Shown(pictures, PLAIN, Recipe(crop=1.0, flip=False))[0, 5]
    seen, _ = PLAIN(pictures.photo(5))
    assert (shown - seen).abs().max() < 3 / 255
