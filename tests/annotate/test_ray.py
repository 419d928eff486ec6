"""Ray Data does what the local engine does, row for row."""

import numpy as np
import pytest
from PIL import Image
from scenes import plain, red_net, scene

import whatwhere
from whatwhere.annotate.cluster import shares
from whatwhere.annotate.run import annotate

pytest.importorskip("pyarrow")


@pytest.mark.parametrize(
    ("processors", "workers", "expected"),
    [(8, None, (7, 1)), (2, None, (1, 1)), (8, 3, (3, 1)), (4, 9, (3, 1)), (1, None, (1, 0.5)), (1, 2, (2, 0.25))],
)
def test_a_processor_is_always_left_for_reading(processors, workers, expected):
    actors, share = shares(processors, workers)
    assert (actors, share) == expected
    assert actors * share < processors


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own
def test_the_same_rows_as_the_local_engine(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="needs ray[data]")
    pytest.importorskip("ray.data", reason="needs ray[data]")
    for name, value in (("RAY_USAGE_STATS_ENABLED", "0"), ("RAY_AUTH_MODE", "disabled")):
        monkeypatch.setenv(name, value)
    root = tmp_path / "root"
    root.mkdir()
    for i in range(20):
        Image.fromarray(scene(i, (30 + i % 3, 44))[0]).save(root / f"{i:02}.png")
    (root / "07.png").write_bytes(np.random.default_rng(0).bytes(99))
    net = whatwhere.load(red_net(), preprocess=plain((24, 40)), labels=["blue", "red"])
    options = {"batch": 2, "part": 6}
    local = annotate(net, str(root), tmp_path / "local", workers=1, **options)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
    try:
        spread = annotate(net, str(root), tmp_path / "ray", engine="ray", **options)
    finally:
        ray.shutdown()
    assert list(spread.rows()) == list(local.rows())
