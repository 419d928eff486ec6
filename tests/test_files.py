"""Files that belong together are found together, whenever the process that writes them ends."""

import errno
import subprocess
import sys
from contextlib import nullcontext

import pytest

from whatwhere.errors import InputError
from whatwhere.files import held, together

NAMES = ("weights", "sidecar", "graph")
DYING = """
import os, sys
from pathlib import Path
from whatwhere.files import together

left = int(sys.argv[1])

def dying(step):
    def taken(*given, **more):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return step(*given, **more)
    return taken

Path.replace, Path.unlink = dying(Path.replace), dying(Path.unlink)
with together(*map(Path, sys.argv[2:])) as files:
    for file in files:
        file.write_text("new")
os._exit(0)
"""


@pytest.mark.parametrize("before", [True, False])
def test_a_set_is_of_one_writing_wherever_the_process_dies(before, tmp_path):
    died = []
    for steps in range(5):
        folder = tmp_path / str(steps)
        folder.mkdir()
        if before:
            for name in NAMES:
                (folder / name).write_text("old")
        done = subprocess.run([sys.executable, "-c", DYING, str(steps), *NAMES], cwd=folder, check=False)
        died.append(done.returncode)
        if (folder / "graph").exists():
            assert len({(folder / name).read_text() for name in NAMES}) == 1
    assert died == [9, 9, 9, 9, 0]
    assert (folder / "graph").read_text() == "new"


def test_what_fails_leaves_what_was_there(tmp_path):
    (tmp_path / "graph").write_text("old")
    with pytest.raises(ZeroDivisionError), together(tmp_path / "sidecar", tmp_path / "graph") as files:
        files[1].write_text(str(1 / 0))
    assert [file.name for file in tmp_path.iterdir()] == ["graph"]
    assert (tmp_path / "graph").read_text() == "old"


@pytest.mark.parametrize("why", [errno.EWOULDBLOCK, errno.ENOLCK, errno.ENOSYS])
def test_a_file_is_held_or_there_are_no_locks(tmp_path, monkeypatch, why):
    def locked(*_):
        raise OSError(why, "")

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", locked)
    is_held = why == errno.EWOULDBLOCK
    with pytest.raises(InputError, match="another process") if is_held else nullcontext(), held(tmp_path / "lock"):
        assert not is_held
