"""Imports point down: no chapter imports one above it, nothing goes in circles, and kernels/ stands alone."""

from __future__ import annotations

import ast
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the bottom up. A room is a file or a folder of kfac_triton/; it may import rooms of lower floors alone.
FLOORS = (
    ("kernels",),
    ("autocast", "progress", "scalars", "validation", "warning"),
    ("presets", "settings"),
    ("fisher", "layers"),
    ("capture",),
    ("curvature",),
    ("cuda_graphs", "preconditioned_gradients"),
    ("engine",),
    ("diagnostics", "steps", "summary"),
    ("base", "state"),
    ("stateful",),
    ("optimizer", "preconditioner"),
    ("adam", "training_graph"),
    ("__init__",),
    ("cli", "integrations"),
    ("__main__",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
GROUND = {"settings", "validation", "warning"}


def modules(root: Path) -> dict[str, Path]:
    """Module -> its file; kernels/ from where it really is, a package under its own name."""
    files = {}
    for folder, prefix in ((root / "kfac_triton", ("kfac_triton",)), (root / "kernels", ("kfac_triton", "kernels"))):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if prefix[-1] == "kfac_triton" and parts[0] == "kernels":
                continue
            files[".".join((*prefix, *parts)).removesuffix(".__init__")] = path
    return files


def arrows(root: Path) -> set[tuple[str, str]]:
    """(module, module that it imports), wherever in the file the import stands; those for type checkers alone count, too."""
    files = modules(root)
    folders = {name.rpartition(".")[0] for name in files}
    found = set()
    for name, path in files.items():
        package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                start = package[: len(package) + 1 - node.level] if node.level else []
                base = ".".join([*start, *([node.module] if node.module else [])])
                inner = [f"{base}.{alias.name}" for alias in node.names]
                targets = [x if x in files or x in folders else base for x in inner]
            else:
                continue
            found |= {(name, target) for target in targets if target.split(".")[0] == "kfac_triton" and target != name}
    return found


def room_of(module: str) -> str:
    """The file or folder of kfac_triton/ that a module is in."""
    return module.split(".")[1] if "." in module else "__init__"


def room_arrows(root: Path) -> set[tuple[str, str]]:
    pairs = {(room_of(source), room_of(target)) for source, target in arrows(root)}
    return {(source, target) for source, target in pairs if source != target}


def upward(root: Path) -> list[str]:
    """Rooms without a floor, and imports that do not lead down."""
    unknown = sorted({room_of(name) for name in modules(root)} - FLOOR.keys())
    wrong = [
        f"{source} imports {target}"
        for source, target in sorted(room_arrows(root))
        if source in FLOOR and FLOOR.get(target, -1) >= FLOOR[source]
    ]
    return [f"{room} has no floor" for room in unknown] + wrong


def circle(pairs: set[tuple[str, str]]) -> list[str]:
    """Some that import each other in a circle; empty where there is none."""
    graph: dict[str, set[str]] = defaultdict(set)
    for source, target in pairs:
        graph[source].add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_imports_lead_down() -> None:
    assert upward(ROOT) == []


def test_nothing_goes_in_circles() -> None:
    """Neither files and folders of the package, nor single modules."""
    assert circle(room_arrows(ROOT)) == []
    assert circle(arrows(ROOT)) == []


def test_kernels_import_nothing_of_the_package() -> None:
    sources = {source for source, _ in arrows(ROOT) if room_of(source) == "kernels"}
    assert "kfac_triton.kernels.covariance.launch" in sources  # that they are read at all
    assert {target for source, target in room_arrows(ROOT) if source == "kernels"} == set()


def test_the_ground_floor_imports_no_chapter() -> None:
    chapters = {room_of(name) for name in modules(ROOT) if (ROOT / "kfac_triton" / room_of(name)).is_dir()} - {"kernels"}
    assert {"capture", "curvature", "fisher", "layers", "state", "steps"} <= chapters
    assert [(source, target) for source, target in room_arrows(ROOT) if source in GROUND and target in chapters] == []


def test_every_chapter_says_what_it_is() -> None:
    folders = [ROOT / "kernels", *(path for path in (ROOT / "kfac_triton").iterdir() if (path / "__init__.py").is_file())]
    assert len(folders) >= 9
    assert [folder.name for folder in folders if not (folder / "README.md").is_file()] == []


SOUND = {
    "kernels/ops.py": "import torch\nfrom .covariance.reference import f",
    "kernels/covariance/reference.py": "import math",
    "kfac_triton/__init__.py": "from .engine import Engine",
    "kfac_triton/settings.py": "from .kernels import ops",
    "kfac_triton/engine.py": "from .curvature import Curvature\nfrom .capture import hooks",
    "kfac_triton/capture/__init__.py": "",
    "kfac_triton/capture/hooks.py": "from ..settings import Settings",
    "kfac_triton/curvature/__init__.py": "from kfac_triton.capture.hooks import g",
}


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("kfac_triton/capture/hooks.py", "from ..curvature import Curvature", "capture imports curvature"),
        ("kfac_triton/capture/hooks.py", "def f():\n    from .. import engine", "capture imports engine"),
        ("kfac_triton/capture/hooks.py", "if TYPE_CHECKING:\n    import kfac_triton.engine", "capture imports engine"),
        ("kfac_triton/settings.py", "from .capture.hooks import g", "settings imports capture"),
        ("kfac_triton/curvature/__init__.py", "from kfac_triton import Engine", "curvature imports __init__"),
        ("kfac_triton/layers/base.py", "from ..fisher import scales", "layers imports fisher"),
        ("kernels/covariance/reference.py", "from ...settings import Settings", "kernels imports settings"),
        ("kernels/ops.py", "from kfac_triton import settings", "kernels imports settings"),
        ("kfac_triton/attic/box.py", "import torch", "attic has no floor"),
    ],
)
def test_the_check_complains(file: str, line: str, complaint: str, tmp_path: Path) -> None:
    for name, text in SOUND.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert upward(tmp_path) == []
    assert circle(arrows(tmp_path)) == []
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(f"{SOUND.get(file, '')}\n{line}\n")
    assert upward(tmp_path) == [complaint]


def test_the_check_finds_circles(tmp_path: Path) -> None:
    """Between modules of one folder, which floors do not see."""
    folder = tmp_path / "kfac_triton" / "capture"
    folder.mkdir(parents=True)
    for name, other in (("gate", "tied"), ("tied", "hooks"), ("hooks", "gate")):
        (folder / f"{name}.py").write_text(f"from .{other} import x\n")
    assert upward(tmp_path) == []
    found = {module.rpartition(".")[2] for module in circle(arrows(tmp_path))}
    assert found == {"gate", "tied", "hooks"}
