import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import torch
from PIL import Image
from scenes import boxed_scene
from typer.testing import CliRunner

import whatwhere
from whatwhere.apps.cli import app
from whatwhere.datasets import open_dataset

SCHEMA = json.loads(Path(whatwhere.__path__[0], "reports", "explanation.schema.json").read_text())


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_help_does_not_import_torch():
    code = "import sys; from whatwhere.apps.cli import app; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_demo(tmp_path):
    result = run("demo", "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert "Egyptian cat" in result.stdout
    assert "espresso" in result.stdout
    names = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*"))
    photos = ["photos/boxes.csv", *(f"photos/{name}.jpg" for name in ("chelsea", "coffee", "rocket"))]
    assert names == ["chelsea.png", "coffee.png", "index.html", *photos, "rocket.png"]


def test_explain_prints_a_table(photos):
    result = run("explain", photos[0], "--target", "top2", "--target", "tabby")
    assert result.exit_code == 0
    rows = result.stdout.splitlines()
    assert len(rows) == 4
    *box, trust = rows[1].split()[-5:]
    assert box == ["40", "0", "401", "300"]
    (one, *_) = whatwhere.explain(whatwhere.load(), photos[0])
    assert trust == f"{one.trust:.2f}"


def test_json_is_one_line_an_explanation_and_nothing_else(photos, tmp_path):
    result = run("explain", *photos, "--json", "--target", "top2", "--out", tmp_path, "--method", "cam")
    assert result.exit_code == 0
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(lines) == 6
    for line in lines:
        jsonschema.validate(line, SCHEMA)
        assert line["method"] == "cam"
    assert (tmp_path / "index.html").is_file()


def test_a_preset_is_named_where_a_method_is(photos):
    (line,) = run("explain", photos[0], "--preset", "balanced", "--json").stdout.splitlines()
    jsonschema.validate(json.loads(line), SCHEMA)
    assert json.loads(line)["method"] == "balanced"
    wrong = run("explain", photos[0], "--preset", "sharp")
    assert wrong.exit_code == 2
    assert "fast, balanced, best" in wrong.stderr
    assert "balanced" in run("methods").stdout


def test_failed_images_are_named_and_the_others_done(photos, tmp_path):
    (tmp_path / "bad[red].jpg").write_text("text")
    result = run("explain", tmp_path / "bad[red].jpg", photos[0], tmp_path / "none.jpg", "--json")
    assert result.exit_code == 1
    assert len(result.stdout.splitlines()) == 1
    failed = [line for line in result.stderr.splitlines() if line.startswith("failed")]
    assert len(failed) == 2
    assert "bad[red].jpg: not an image" in failed[0]
    assert "none.jpg: No such file" in failed[1]


def test_folders_are_searched_and_our_own_pictures_left_out(photos, tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.jpg", "sub/a.jpg"):
        Image.open(photos[0]).save(tmp_path / name)
    for _ in range(2):
        result = run("explain", tmp_path, "--out", tmp_path / "out", "--json")
        assert len(result.stdout.splitlines()) == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a-2.png", "a.png", "index.html"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target", "tabbi"], "nearest: tabby"),
        (["--method", "gradcan"], "nearest: gradcam"),
        (["--model", "resnet5"], "nearest: resnet50"),
        (["--threshold", "2"], "threshold"),
        (["--layer", "blocks.9"], "no layer"),
        (["--nonsense"], "No such option"),
        (["--method", "cam", "--preset", "best"], "--method or --preset"),
    ],
)
def test_wrong_usage_is_2(photos, words, message):
    result = run("explain", photos[0], *words)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert result.stdout == ""


def test_no_arguments_and_no_photos():
    assert run("explain").exit_code == 2
    assert "Usage" in run().output


def test_an_empty_folder_says_so(tmp_path):
    result = run("explain", tmp_path)
    assert result.exit_code == 1
    assert "no image files" in result.stderr


def test_a_saved_run_by_its_folder(photos, tmp_path, net):
    whatwhere.save(net, tmp_path / "run")
    assert run("explain", photos[0], "--model", tmp_path / "run").exit_code == 0


def test_methods_are_listed():
    result = run("methods")
    for name in whatwhere.METHODS:
        assert name in result.stdout


def test_every_command_and_option_has_its_help():
    for command in app.registered_commands:
        result = run(command.callback.__name__, "--help")
        assert result.exit_code == 0
        assert len(result.stdout.splitlines()) > 5


def test_a_reader_that_leaves_early_is_no_error(photos):
    words = [sys.executable, "-m", "whatwhere", "explain", *map(str, photos * 6), "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read().decode()
        assert process.wait() == 0, errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("out", [".", "photos", "photos/../photos"])
def test_pictures_may_go_where_the_photographs_are(photos, tmp_path, monkeypatch, out):
    (tmp_path / "photos").mkdir()
    Image.open(photos[0]).save(tmp_path / "photos" / "a.jpg")
    monkeypatch.chdir(tmp_path)
    result = run("explain", "photos", "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1


def test_no_photograph_is_ever_written_over(photos, tmp_path, monkeypatch):
    Image.open(photos[0]).save(tmp_path / "mine.png")
    before = (tmp_path / "mine.png").read_bytes()
    monkeypatch.chdir(tmp_path)
    assert run("explain", "mine.png", "--out", ".").exit_code == 0
    assert (tmp_path / "mine.png").read_bytes() == before
    assert (tmp_path / "mine-2.png").is_file()


def test_an_out_that_cannot_be_says_so_before_any_work(photos, tmp_path):
    (tmp_path / "file").touch()
    result = run("explain", photos[0], "--out", tmp_path / "file")
    assert result.exit_code == 1
    assert result.stderr.startswith("error")
    assert "file" in result.stderr


def test_names_too_long_for_a_picture_of_their_own(photos, tmp_path):
    name = os.fsdecode(b"\xff" * 100 + b".jpg")
    (tmp_path / name).write_bytes(photos[0].read_bytes())
    result = run("explain", tmp_path / name, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr


def test_an_empty_name_is_not_the_current_folder():
    assert run("explain", "").exit_code == 2


def test_a_device_that_is_not_there(photos):
    result = run("explain", photos[0], "--device", "bogus")
    assert result.exit_code == 2
    assert "no device 'bogus'" in result.stderr


def test_any_encoding_of_the_terminal_will_do(photos, tmp_path):
    (tmp_path / "é 日本.jpg").write_bytes(photos[0].read_bytes())
    words = [sys.executable, "-m", "whatwhere", "explain", str(tmp_path / "é 日本.jpg"), str(tmp_path / "ü.jpg")]
    result = subprocess.run(words, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, check=False)
    assert result.returncode == 1
    assert b"Traceback" not in result.stderr
    assert b"Egyptian cat" in result.stdout


def test_defaults_are_shown():
    text = " ".join(run("explain", "--help").stdout.replace("│", " ").split())
    assert "[default: top1]" in text
    assert "0.25" in text


def test_a_number_stays_a_number(photos):
    result = run("explain", photos[0], "--json", "--threshold", "0.3")
    assert json.loads(result.stdout)["threshold"] == 0.3


@pytest.fixture(scope="module")
def scenes_on_disk(tmp_path_factory):
    """Ellipses in two classes with boxes, as a data set for the embedded network by a mapping."""
    root = tmp_path_factory.mktemp("data") / "set"
    rows = ["path,class,x0,y0,x1,y1"]
    for number in range(6):
        rows.append(boxed_scene(root, f"val/{'ab'[number % 2]}/{number}.png", number, (60, 80)))
    (root / "boxes.csv").write_text("\n".join(rows) + "\n")
    (root / "map.csv").write_text("class,index\na,285\nb,tabby\n")
    return root


def test_a_gate_says_what_is_too_low(scenes_on_disk):
    words = ["evaluate", "efficientnet-lite0", scenes_on_disk, "--map", scenes_on_disk / "map.csv"]
    assert run(*words, "--fail-under", "maxboxaccv2=0", "--fail-under", "Top-1=0").exit_code == 0
    result = run(*words, "--fail-under", "KL=9")
    assert result.exit_code == 2
    assert "better when it is lower" in result.stderr
    result = run(
        *words, "--fail-under", "MaxBoxAccV2=100.5", "--fail-under", "mAP=101", "--fail-under", "insertion=1"
    )
    assert result.exit_code == 3
    lines = [line for line in result.stderr.splitlines() if line.startswith("below")]
    assert len(lines) == 3
    assert "gradcam, MaxBoxAccV2: wanted at least 100.5, got" in lines[0]
    assert lines[1].startswith("below mAP: wanted at least 101, got")
    assert "insertion: wanted at least 1, and it was not measured" in lines[2]
    for wrong, why in (("maxboxacv2=60", "nearest"), ("maxboxaccv2=lots", "wanted a number"), ("60", "NAME=NUMBER")):
        result = run(*words, "--fail-under", wrong)
        assert result.exit_code == 2
        assert why in result.stderr


def test_evaluate_prints_a_table_and_writes_a_page(scenes_on_disk, tmp_path):
    words = ["evaluate", "efficientnet-lite0", scenes_on_disk, "--map", scenes_on_disk / "map.csv"]
    result = run(*words, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert (
        result.stderr.splitlines()[0] == f"on {scenes_on_disk.name}, val: {len(open_dataset(scenes_on_disk))} images"
    )
    assert "MaxBoxAccV2" in result.stdout
    assert "centre Gaussian" in result.stdout
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["evaluation.npz", "images.csv", "index.html", "results.json"]
    again = run(*words, "--out", tmp_path / "out")
    assert again.stdout == result.stdout
    other = run(*words, "--out", tmp_path / "out", "--method", "layercam")
    assert other.exit_code == 2
    assert "use another folder" in other.stderr


def test_shards_are_added(scenes_on_disk, tmp_path, monkeypatch):
    monkeypatch.setattr("whatwhere.evaluation.evaluate.CHUNK", 2)
    words = ["evaluate", "efficientnet-lite0", scenes_on_disk, "--map", scenes_on_disk / "map.csv"]
    whole = run(*words)
    for shard in ("1/2", "2/2"):
        result = run(*words, "--out", tmp_path / "out", "--shard", shard)
        assert result.exit_code == 0, result.output
        assert "whatwhere report adds them" in result.stderr
    result = run("report", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.stdout == whole.stdout
    assert (tmp_path / "out" / "index.html").exists()


def test_compare_leaves_out_what_does_not_apply(scenes_on_disk, tmp_path, monkeypatch):
    from whatwhere.maps import METHODS

    for name in set(METHODS) - {"cam", "gradcam", "rollout"}:
        monkeypatch.delitem(METHODS, name)
    words = ["compare", "efficientnet-lite0", scenes_on_disk, "--map", scenes_on_disk / "map.csv"]
    result = run(*words, "--methods", "all", "--images", "3", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "left out" in result.stderr
    assert "rollout" in result.stderr
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Methods side by side" in page
    assert "Agreement" in page


def test_calibrate_saves_a_threshold_that_explain_takes(tmp_path, photos):
    words = ["calibrate", "efficientnet-lite0", photos[0].parent, "--to", tmp_path / "run"]
    result = run(*words, "--methods", "gradcam,layercam")
    assert result.exit_code == 0, result.output
    assert "chosen on photos; measure on other images" in result.stderr
    shares = dict(line.split(": ") for line in result.stdout.splitlines())
    assert shares.keys() == {"gradcam", "layercam"}
    seen = run("explain", photos[0], "--model", tmp_path / "run", "--json")
    assert json.loads(seen.stdout)["threshold"] == pytest.approx(float(shares["gradcam"].split()[0]))


@pytest.mark.parametrize("command", ["calibrate", "distill"])
def test_the_run_of_another_model_is_not_written_over(tmp_path, photos, command):
    other = whatwhere.load()
    with torch.no_grad():
        next(other.network.parameters()).mul_(2)
    whatwhere.save(other, tmp_path / "other")
    before = {file.name: file.read_bytes() for file in (tmp_path / "other").iterdir()}
    result = run(command, "efficientnet-lite0", photos[0].parent, "--to", tmp_path / "other")
    assert result.exit_code == 2
    assert "holds the run of another model; choose another folder" in result.stderr
    assert {file.name: file.read_bytes() for file in (tmp_path / "other").iterdir()} == before


def test_a_file_where_a_folder_goes_is_named(tmp_path, photos):
    (tmp_path / "seen").write_text("mine")
    result = run("explain", photos[0], "--out", tmp_path / "seen")
    assert result.exit_code == 1
    assert "seen: wanted a folder to write to, and this is a file" in result.stderr
    assert (tmp_path / "seen").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["--method", "gradcm"], "nearest: gradcam", 2),
        (["--protocol", "wsol"], "nearest: wsol2020", 2),
        (["--shard", "3/2"], "a shard is one of", 2),
        (["--shard", "x"], "a shard is written 2/4", 2),
        (["--shard", "1/0"], "a shard is written 2/4", 2),
        (["--layout", "cocoa"], "nearest: coco", 2),
        (["--split", "tset"], "it has val", 2),
        (["--map", "nothing.csv"], "nothing.csv: cannot be read", 1),
    ],
)
def test_wrong_words_to_evaluate(scenes_on_disk, words, message, code):
    result = run("evaluate", "efficientnet-lite0", scenes_on_disk, *words)
    assert result.exit_code == code
    assert message in result.stderr


@pytest.fixture
def two_classes(tmp_path):
    rows = [
        boxed_scene(tmp_path / "data", f"{name}/{seed}.png", seed, (60, 90)) for name in "ab" for seed in range(4)
    ]
    (tmp_path / "data" / "boxes.csv").write_text("\n".join(["path,class,x0,y0,x1,y1", *rows]))
    return tmp_path / "data"


LENET = ["--model", "lenet5", "--set", "size=[48, 64]", "--set", "epochs=2", "--set", "light_start=false"]


def test_train_makes_a_run_that_the_others_take(two_classes, tmp_path, photos):
    result = run("train", two_classes, "--out", tmp_path / "run", *LENET, "--full", "--boxes", two_classes)
    assert result.exit_code == 0, result.output
    assert "threshold of gradcam" in result.stdout
    assert f"saved to {tmp_path / 'run'}" in " ".join(result.stderr.split())
    assert run("explain", photos[0], "--model", tmp_path / "run").exit_code == 0
    assert run("evaluate", tmp_path / "run", two_classes).exit_code == 0
    again = run("train", two_classes, "--out", tmp_path / "run", *LENET)
    assert again.exit_code == 2
    assert "holds a run already" in again.stderr
    assert run("train", two_classes, "--out", tmp_path / "run", "--resume").exit_code == 0


def test_several_runs_are_one(two_classes, tmp_path, photos):
    for seed in (0, 1):
        words = ["--model", "lenet5", "--set", "head.pool=mean", "--set", "size=[48, 64]", "--set", "decay=0.001"]
        assert run("train", two_classes, "--out", tmp_path / str(seed), "--seed", seed, *words).exit_code == 0
    result = run("ensemble", tmp_path / "0", tmp_path / "1", "--out", tmp_path / "both")
    assert result.exit_code == 0, result.output
    assert run("explain", photos[0], "--model", tmp_path / "both", "--method", "cam").exit_code == 0
    assert run("ensemble", tmp_path / "0", "--out", tmp_path / "both").exit_code == 2


def test_train_says_what_it_leaves_out_and_stops_if_strict(two_classes, tmp_path):
    (two_classes / "a" / "0.png").write_text("no picture")
    (two_classes / "c").mkdir()
    words = ["train", two_classes, *LENET, "--set", "mode=full"]
    strict = run(*words, "--out", tmp_path / "strict", "--strict")
    assert strict.exit_code == 1
    assert "a/0.png" in strict.stderr
    result = run(*words, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "1 images cannot be read and are left out: a/0.png" in result.stderr
    assert "1 classes have no images" in result.stderr


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["--set", "epohcs=3"], "nearest: epochs", 2),
        (["--model", "resnet9000"], "nearest", 2),
        (["--config", "none.toml"], "none.toml", 1),
        (["--device", "abacus"], "abacus", 2),
        (["--full", "--set", "precision=vague", *LENET], "precision vague", 2),
        (["--full", "--set", "lr=1e30", *LENET], "lr", 1),
    ],
)
def test_wrong_words_to_train(two_classes, tmp_path, words, message, code):
    result = run("train", two_classes, "--out", tmp_path / "run", *words)
    assert result.exit_code == code
    assert message in result.stderr


def test_boxes_are_chosen_on_pictures_that_have_some(two_classes, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(two_classes, plain, ignore=shutil.ignore_patterns("*.csv"))
    result = run("train", two_classes, "--out", tmp_path / "run", "--boxes", plain, *LENET)
    assert result.exit_code == 2
    assert "plain: wanted a data set with boxes or masks" in result.stderr


def test_train_on_what_is_no_folder_of_pictures(tmp_path):
    result = run("train", tmp_path / "none", "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert "no such file or folder" in result.stderr
    (tmp_path / "one" / "class").mkdir(parents=True)
    Image.new("RGB", (20, 30)).save(tmp_path / "one" / "class" / "a.png")
    result = run("train", tmp_path / "one", "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert "two classes, got 1" in result.stderr
