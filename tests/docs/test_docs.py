"""The pages do what they say, top to bottom; the site is built without a broken link; the notebook runs."""

import contextlib
import doctest
import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import warm

from whatwhere.maps import METHODS

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
RUN = {"sh", "python"}
SHOWN = {"console", "text", "toml"}
"""Languages of what is only shown: needs a network, a cluster, another program. A text right after what runs is what
that printed, with ... for anything."""
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\n(\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
SAME = doctest.OutputChecker()


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """The environment in which ``whatwhere`` is this package's, without its start."""
    if not hasattr(os, "fork"):
        pytest.skip("the pages' commands are for a Unix shell")
    folder = tmp_path_factory.mktemp("bin")
    address, client = folder / "socket", folder / "whatwhere"
    client.write_text(warm.CLIENT.format(python=sys.executable, address=str(address)))
    client.chmod(0o755)
    env = os.environ | {
        "PATH": f"{folder}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
        "COLUMNS": "120",
    }
    process = subprocess.Popen([sys.executable, warm.__file__, str(address)], env=env)
    while not address.exists():
        assert process.poll() is None, "the process that runs the commands has ended"
        time.sleep(0.1)
    yield env
    process.kill()
    process.wait()


def run(language: str, code: str, names: dict, env: dict[str, str], where: str) -> str:
    if language == "python":
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, where, "exec"), names)
        return printed.getvalue()
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{where}:\n{code}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def registry():
    """The methods; what a page registers is forgotten."""
    with mock.patch.dict(METHODS):
        yield


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_runs(page, commands, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    text = page.read_text()
    for block in BLOCK.finditer(text):
        language, code, _, wanted = block.groups()
        assert language in RUN | SHOWN, f"{page.name}: {language or 'no language'} at {code[:60]!r}"
        if language in RUN:
            where = f"{page.name}, line {text[: block.start()].count(chr(10)) + 1}"
            got = run(language, code, names, commands, where)
            flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            assert wanted is None or SAME.check_output(wanted, got, flags), f"{where} printed:\n{got}"


def test_the_site_is_built_without_a_broken_link(tmp_path):
    pytest.importorskip("material", reason="needs pip install 'whatwhere[docs]'")
    told = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path / "site")]
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(told, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in PAGES:
        place = tmp_path / "site" / ("" if page.stem == "index" else page.stem)
        assert (place / "index.html").is_file(), page.name
    assert (tmp_path / "site" / "llms.txt").is_file()


def test_the_notebook_runs_and_is_small(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="needs pip install 'whatwhere[docs]'")
    file = ROOT / "docs" / "tour.ipynb"
    assert file.stat().st_size < 1.5e6
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "tour"}
    cells = [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"]
    for number, cell in enumerate(cells, 1):
        assert cell.outputs or cell.execution_count, f"cell {number} was never run"
        exec(compile(cell.source, f"tour.ipynb, cell {number}", "exec"), names)


def test_what_machines_read_names_every_page():
    listed = (ROOT / "docs" / "llms.txt").read_text()
    for page in [*PAGES, ROOT / "docs" / "tour.ipynb"]:
        assert f"/whatwhere/{'' if page.stem == 'index' else page.stem + '/'})" in listed, page.name
