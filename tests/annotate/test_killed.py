"""A run that is killed at any moment ends as it would have."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from scenes import scene

pytest.importorskip("pyarrow")
ZYGOTE = Path(__file__).parent / "zygote.py"


def table_of(out):
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pa.concat_tables([pq.read_table(file) for file in sorted((out / "parts").glob("*.parquet"))])


def test_killed_at_twenty_random_moments(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for i in range(100):
        Image.fromarray(scene(i % 7, (40 + i % 5, 60))[0]).save(source / f"{i:03}.png")
    (source / "077.png").write_bytes(b"broken")
    words = [sys.executable, ZYGOTE, source, tmp_path / "whole", tmp_path / "cut", 20, 0]
    result = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False, timeout=500)
    assert result.returncode == 0, result.stderr
    killed, places, code = (int(word) for word in result.stdout.split())
    assert (killed, code) == (20, 0)
    assert places >= 4, "at different moments"
    whole, cut = table_of(tmp_path / "whole"), table_of(tmp_path / "cut")
    assert cut.equals(whole)
    assert sorted(set(whole["image"].to_pylist())) == list(range(100))
    assert len(list((tmp_path / "cut" / "parts").iterdir())) == 13, "nothing half written is left"
    assert not list((tmp_path / "cut").glob(".whatwhere-*"))
