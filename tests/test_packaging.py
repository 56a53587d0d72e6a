"""The wheel holds what the tree holds, and importing the package asks for nothing but torch."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import kfac_triton

ROOT = Path(__file__).parents[1]
SOURCES = {"kfac_triton": ROOT / "kfac_triton", "kfac_triton/kernels": ROOT / "kernels"}


def tree() -> dict[str, bytes]:
    """Modules, type marker and kernel configurations by their place in the package; kernels/ from where it really is."""
    files = {}
    for place, folder in SOURCES.items():
        for path in sorted([*folder.rglob("*.py"), *folder.rglob("py.typed"), *folder.rglob("configs/*.json")]):
            relative = path.relative_to(folder)
            if place == "kfac_triton" and relative.parts[0] == "kernels":
                continue
            files[f"{place}/{relative.as_posix()}"] = path.read_bytes()
    return files


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, so that nothing is left in the checkout and nothing left in the checkout gets in."""
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("kernels", "kfac_triton"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)]
    result = subprocess.run(command, cwd=out, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def metadata(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = (n for n in wheel.namelist() if n.endswith(f".dist-info/{name}"))
    return wheel.read(path).decode()


def test_the_wheel_is_the_tree_byte_for_byte(wheel: zipfile.ZipFile) -> None:
    """All sub-packages, the kernels in their place, py.typed; and no file that the tree does not have."""
    installed = {n: wheel.read(n) for n in wheel.namelist() if ".dist-info/" not in n}
    expected = tree()
    assert installed.keys() == expected.keys()
    assert [name for name in expected if installed[name] != expected[name]] == []
    assert "kfac_triton/py.typed" in installed
    assert "kfac_triton/kernels/ops.py" in installed
    assert "kfac_triton/layers/conv.py" in installed


def test_the_wheel_says_the_same_version(wheel: zipfile.ZipFile) -> None:
    """It is written once, in the package: a machine that only has the sources on its path knows it too."""
    assert re.search(r"^Version: (.+)$", metadata(wheel, "METADATA"), re.MULTILINE).group(1) == kfac_triton.__version__
    assert re.search(r"^version\b.*\d", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE) is None


def test_the_version_is_read_without_torch() -> None:
    """A literal: the build would otherwise import the package, and with it PyTorch."""
    tree = ast.parse((ROOT / "kfac_triton" / "__init__.py").read_text(encoding="utf-8"))
    (value,) = (
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    )
    assert ast.literal_eval(value) == kfac_triton.__version__


def test_the_changelog_has_the_version() -> None:
    """Its newest release is the one of the package."""
    text = (ROOT / "docs" / "changelog.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[?(\d+\.\d+\.\d+)\]? - \d{4}-\d{2}-\d{2}$", text, re.MULTILINE)
    assert released[0] == kfac_triton.__version__
    assert released == sorted(released, key=lambda x: tuple(map(int, x.split("."))), reverse=True)


def test_releases_of_the_workflow_are_known() -> None:
    """Its first pair is that of constraints.txt, and every Triton has a golden table, which `make codegen` checks."""
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    pairs = re.findall(r"\{ torch: ([\d.]+), triton: ([\d.]+) \}", workflow)
    pins = re.findall(r"^\w+==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(pairs) == 2
    assert list(pairs[0]) == pins
    tables = {path.stem.removeprefix("triton-") for path in (ROOT / "tests" / "codegen" / "golden").glob("*.json")}
    assert {triton for _, triton in pairs} <= tables
    listed = re.search(
        r"^CODEGEN := \$\(patsubst %,codegen-%,(.*)\)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert listed is not None
    assert set(listed[1].split()) == tables


def test_the_wheel_is_pure_and_brings_the_command(wheel: zipfile.ZipFile) -> None:
    assert "Root-Is-Purelib: true" in metadata(wheel, "WHEEL")
    assert "Tag: py3-none-any" in metadata(wheel, "WHEEL")
    assert "kfac-triton = kfac_triton.cli:main" in metadata(wheel, "entry_points.txt")
    assert metadata(wheel, "top_level.txt").split() == ["kfac_triton"]  # nothing named "kernels" at the top


def test_the_unpacked_wheel_imports(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """On its own, without the checkout in sight: the operators register once."""
    wheel.extractall(tmp_path)
    code = (
        "import kfac_triton, kfac_triton.cli, kfac_triton.kernels.ops as ops; print(kfac_triton.__file__); print(ops.__file__)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [
        str(tmp_path / "kfac_triton" / "__init__.py"),
        str(tmp_path / "kfac_triton" / "kernels" / "ops.py"),
    ]


def test_kernels_is_a_plain_folder_behind_a_symlink() -> None:
    """No __init__.py: a package `kernels` at the top would shadow that of PyPI."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    link = ROOT / "kfac_triton" / "kernels"
    assert link.is_symlink()
    assert link.readlink() == Path("../kernels")
    assert link.resolve() == (ROOT / "kernels").resolve()


@pytest.mark.parametrize("blocked", ["", "triton"])
def test_import_needs_torch_alone_and_warns_of_nothing(blocked: str) -> None:
    """Triton is a dependency where it exists; where it does not, the torch backend works."""
    code = (
        f"import sys\nif {blocked!r}: sys.modules[{blocked!r}] = None\n"
        "import torch, kfac_triton\n"
        "print(*(m for m in ('matplotlib', 'mlxtend', 'kfac_triton.cli') if m in sys.modules))\n"
        "model = torch.nn.Linear(3, 2)\n"
        "optimizer = kfac_triton.KFAC(model)\n"
        "model(torch.ones(4, 3)).sum().backward()\n"
        "optimizer.step()"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []
    assert result.stderr == ""
