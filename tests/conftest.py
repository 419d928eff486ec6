"""Annotations are executed: every shape in a signature is checked while the tests run."""

import os
from pathlib import Path

# one thread a process: tensors are tiny here, and the suite runs in several processes
os.environ["OMP_NUM_THREADS"] = os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

from jaxtyping import install_import_hook

install_import_hook("whatwhere", "executed.check")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import whatwhere  # noqa: E402
from whatwhere.apps.memory import keep_freed_memory  # noqa: E402

keep_freed_memory()
hypothesis.settings.register_profile("unhurried", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("unhurried")
torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("WHATWHERE_DATA", ROOT.parent / "shared" / "data"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """The whole suite goes to several processes; what is named on the command line runs in this one."""
    return min(4, os.cpu_count() or 1) if config.args_source is config.ArgsSource.TESTPATHS else 0


@pytest.fixture(scope="session")
def net():
    """The embedded classifier."""
    return whatwhere.load()


@pytest.fixture(scope="session")
def photos():
    """The photographs that come with the package."""
    return sorted((ROOT / "src" / "whatwhere" / "photos").glob("*.jpg"))


@pytest.fixture(scope="session")
def imagenet_boxes():
    folder = DATA / "imagenet-boxes"
    if not folder.is_dir():
        pytest.skip(f"needs the boxed ImageNet pictures in {folder}")
    return folder
