"""The README does what it says, top to bottom."""

import re
import shutil
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def test_python_blocks_run(tmp_path, monkeypatch, photos, capsys):
    (tmp_path / "whatwhere-demo").mkdir()
    shutil.copytree(photos[0].parent, tmp_path / "whatwhere-demo" / "photos")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert capsys.readouterr().out.startswith("Egyptian cat")
    assert (tmp_path / "chelsea-where.png").is_file()


def test_shell_blocks_are_there_for_the_continuous_integration_to_run():
    text = "\n".join(blocks("sh"))
    for command in ("pip install .", "whatwhere demo", "pip install '.[dev]'", "pytest", "whatwhere explain"):
        assert command in text
