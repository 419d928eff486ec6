"""Recipes: read, set, refused, and there and back."""

import pytest
import tomli_w

from whatwhere.errors import DataError, InputError
from whatwhere.training.recipe import Recipe, read_recipe, recipe_of, with_settings


def test_a_recipe_goes_through_toml_and_back(tmp_path):
    recipe = Recipe(
        size=(96, 128), aids=("has", "cutmix"), head={"pool": "max"}, validation=0.2, lr=3e-3, mode="full"
    )
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps({"training": recipe.plain()}))
    assert read_recipe(tmp_path / "recipe.toml") == recipe
    assert recipe_of(Recipe().plain()) == Recipe()


def test_a_file_of_differences(tmp_path):
    (tmp_path / "mine.toml").write_text('epochs = 3\nmode = "full"\n[head]\npool = "lse"\norder = "linear-pool"\n')
    found = with_settings(read_recipe(tmp_path / "mine.toml"), [], seed=4)
    assert (found.epochs, found.mode, found.seed) == (3, "full", 4)
    assert found.head == {"pool": "lse", "order": "linear-pool"}


@pytest.mark.parametrize(
    ("word", "name", "value"),
    [
        ("lr=0.01", "lr", 0.01),
        ("epochs=7", "epochs", 7),
        ("weight_decay=1", "weight_decay", 1.0),
        ("flip=false", "flip", False),
        ("size=[96, 128]", "size", (96, 128)),
        ("aids=cutmix", "aids", ("cutmix",)),
        ('aids=["has", "adl"]', "aids", ("has", "adl")),
        ("head.pool=max", "head", {"pool": "max"}),
        ("validation=0.2", "validation", 0.2),
        ("validation=val", "validation", "val"),
        ("model=timm/resnet18", "model", "timm/resnet18"),
        ("model=2024-01-01", "model", "2024-01-01"),
        ("boxes=12", "boxes", "12"),
    ],
)
def test_what_is_set(word, name, value):
    assert getattr(with_settings(Recipe(), [word]), name) == value


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("epoch=3", "nearest: epochs"),
        ("epochs=many", "epochs is a value of the kind int"),
        ("epochs=0", r"epochs is in 1\.\."),
        ("flip=1", "flip"),
        ("lr=true", "lr"),
        ("mode=heavy", "light, full"),
        ("crop=2", "crop is in"),
        ("size=[96]", "size"),
        ("validation=1.5", "validation"),
        ("select=localization", "needs boxes"),
        ("epochs", "NAME=VALUE"),
        ("lr.x=3", "no table"),
        ("aid_options.cutmix.share=0.3", "no aids"),
    ],
)
def test_what_cannot_be_set(word, message):
    with pytest.raises(InputError, match=message):
        with_settings(Recipe(), [word])


def test_a_file_that_is_no_recipe(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_recipe(tmp_path / "none.toml")
    (tmp_path / "odd.toml").write_text("epochs = ")
    with pytest.raises(DataError, match=r"odd\.toml"):
        read_recipe(tmp_path / "odd.toml")
    (tmp_path / "wrong.toml").write_text("epohcs = 3")
    with pytest.raises(InputError, match=r"wrong\.toml.*nearest: epochs"):
        read_recipe(tmp_path / "wrong.toml")


def test_settings_are_judged_together():
    words = ["select=localization", "aids=cutmix", "aid_options.cutmix.share=0.3"]
    found = with_settings(Recipe(), words, boxes="somewhere")
    assert found.aid_options == {"cutmix": {"share": 0.3}}


def test_a_lone_word_is_a_row_of_one():
    assert recipe_of({"aids": "has"}).aids == ("has",)
