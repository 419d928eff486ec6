"""The plan of the house holds: rooms import only from rooms above them; names are what they say."""

import ast
import subprocess
import sys
from pathlib import Path

import whatwhere

HOUSE = Path(whatwhere.__path__[0])
ROOMS = [
    "errors",
    "files",
    "types",
    "geometry",
    "images",
    "classic",
    "classifiers",
    "scores",
    "maps",
    "regions",
    "presets",
    "datasets",
    "explanation",
    "inspection",
    "curation",
    "evaluation",
    "annotate",
    "reports",
    "server",
    "training",
    "apps",
    "__main__",
]


def imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return {name.split(".")[1] for name in names if name.startswith("whatwhere.")}


def test_every_file_is_in_a_room():
    found = {path.stem for path in HOUSE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert found - {"__init__"} == set(ROOMS)


def test_no_room_reaches_back():
    for file in HOUSE.rglob("*.py"):
        room = file.relative_to(HOUSE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        below = {name for name in imports(file) if ROOMS.index(name) > ROOMS.index(room)}
        assert not below, f"{file.relative_to(HOUSE)} imports from {below}"


def test_architecture_names_the_rooms_in_this_order():
    text = (Path(__file__).parents[1] / "ARCHITECTURE.md").read_text()
    drawn = text[text.index("## The rooms") :]
    places = [drawn.index(f"\n    {room}") for room in ROOMS[:-1]]
    assert places == sorted(places)


def test_the_public_names_are_there():
    for name in whatwhere.__all__:
        assert getattr(whatwhere, name) is not None
        assert name in dir(whatwhere)


def test_the_package_imports_without_torch():
    subprocess.run([sys.executable, "-c", "import sys, whatwhere; assert 'torch' not in sys.modules"], check=True)
