import re

import pytest
from huggingface_hub import ModelCard
from scenes import gap_net, plain

import whatwhere
from whatwhere.reports.card import card, write_card


@pytest.fixture
def run():
    """Three classes; 4 of 5 cats right, 1 of 4 dogs, no cup was shown."""
    net = whatwhere.load(gap_net(classes=3), labels=["cat", "dog | wolf", "cup"], preprocess=plain((24, 40)))
    net.about = {
        "data": {
            "root": "/data/pets",
            "train": 60,
            "validation": 9,
            "held_out": 0.15,
            "measured_is_validation": True,
            "per_class": [30, 20, 10],
            "notes": ["2 images of train are there more than once"],
            "unreadable": [],
        },
        "training": {"mode": "full", "seed": 7, "model": "lenet5"},
        "measured": {
            "on": "pets, held out",
            "date": "2026-11-26",
            "top-1": 5 / 9,
            "mean per class": (4 / 5 + 1 / 4) / 2,
            "gradcam MaxBoxAccV2": 0.625,
        },
        "by_class": {"shown": [5, 4, 0], "right": [4, 1, 0], "confused": [[1, 0, 2], [0, 2, 1], [1, 2, 1]]},
        "versions": {"torch": "2.9"},
    }
    net.thresholds = {"gradcam": 0.3125}
    return net


def rows(text, columns):
    """Of the tables with so many columns."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines if len(line) == columns]


def test_numbers_by_hand(run):
    text = card(run, "pets-run")
    assert ["accuracy", "55.6"] in rows(text, 2)
    assert ["balanced accuracy", "52.5"] in rows(text, 2)
    assert ["gradcam MaxBoxAccV2", "62.5"] in rows(text, 2)
    classes = rows(text, 5)
    assert ["cat", "30", "5", "4", "80.0"] in classes
    assert [r"dog \| wolf", "20", "4", "1", "25.0"] in classes
    assert ["cup", "10", "0", "", ""] in classes  # of which nothing is said
    fails = [row for row in rows(text, 4) if row[0] in {"cat", r"dog \| wolf", "cup"}]
    assert fails == [
        [r"dog \| wolf", "1", "4", "25.0"],
        ["cat", "4", "5", "80.0"],
        [r"dog \| wolf", "cat", "2", "4"],
        ["cat", "cup", "1", "5"],
        [r"dog \| wolf", "cup", "1", "4"],
    ]
    assert "60 images to learn from, 9 for validation, 15.0 % of each class, drawn with seed 7." in text
    assert "On pets, held out, 2026-11-26" in text
    assert "The epoch was chosen on these images" in text
    assert "gradcam 0.312" in text
    assert "- 2 images of train are there more than once" in text


def test_the_hub_reads_it(run):
    data = ModelCard(card(run, "pets-run")).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("whatwhere", "image-classification", None)
    found = {one.metric_type: one.metric_value for one in data.eval_results}
    assert found == {"accuracy": 0.5556, "balanced_accuracy": 0.525}
    assert {(one.dataset_name, one.dataset_split) for one in data.eval_results} == {("pets", "pets, held out")}


def test_what_was_not_measured_is_not_in_it(run):
    run.about, run.thresholds = {}, {}
    text = card(run, "plain")
    assert not rows(text, 2)
    assert not rows(text, 5)
    assert "Nothing, as it is here." in text
    assert "is not known here" in text
    assert ModelCard(text).data.eval_results is None


def test_odd_names_break_nothing(run, tmp_path):
    run.about["data"]["root"] = "/data/<b>: `x`\n# y"
    folder = tmp_path / 'odd "name": #1'
    text = write_card(run, folder).read_text()
    assert [path.name for path in folder.iterdir()] == ["card.md"]
    assert ModelCard(text).data.model_name == folder.name
    assert "<b>" not in text.split("---", 2)[2]
    assert "\n# y" not in text.split("---", 2)[2]
