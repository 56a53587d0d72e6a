"""The wheel holds what the tree holds, and importing the package imports nothing heavy."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import kfac_triton

ROOT = Path(__file__).resolve().parents[1]


def _version() -> str:
    line = next(x for x in (ROOT / "pyproject.toml").read_text().splitlines() if x.startswith("version = "))
    return line.split('"')[1]


def _sources() -> dict[str, bytes]:
    """Path in the wheel -> content, from the tree: kernels/ stands at the top and installs inside the package."""
    package = {
        str(path.relative_to(ROOT)): path.read_bytes()
        for path in (ROOT / "kfac_triton").rglob("*")
        if path.is_file() and path.suffix in (".py", ".typed") and "kernels" not in path.relative_to(ROOT).parts
    }
    kernels = {f"kfac_triton/kernels/{path.name}": path.read_bytes() for path in (ROOT / "kernels").glob("*.py")}
    return package | kernels


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, through the sdist, as an index would get it: nothing is left in the checkout."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE", "kfac_triton", "kernels"):
        # -a keeps the symlink kfac_triton/kernels a symlink
        subprocess.run(["cp", "-a", str(ROOT / name), str(copy)], check=True)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_wheel_holds_the_tree(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = _sources()
    assert names == expected.keys()
    assert all(wheel.read(name) == content for name, content in expected.items())


def test_wheel_installs_no_top_level_package_but_ours(wheel: zipfile.ZipFile) -> None:
    """A top-level `kernels` would shadow the PyPI package of that name."""
    assert {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" not in name} == {"kfac_triton"}


def test_wheel_has_the_command_and_the_license(wheel: zipfile.ZipFile) -> None:
    info = f"kfac_triton-{_version()}.dist-info"
    assert "kfac-triton = kfac_triton.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert "License-Expression: MIT" in wheel.read(f"{info}/METADATA").decode()


def test_kernels_folder_is_linked_and_is_no_package_of_its_own() -> None:
    link = ROOT / "kfac_triton" / "kernels"
    assert link.is_symlink()
    assert str(link.readlink()) == "../kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_version_is_stated_once() -> None:
    assert kfac_triton.__version__ == _version()


def test_kernels_import_nothing_from_the_package() -> None:
    for path in (ROOT / "kernels").glob("*.py"):
        lines = [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
        assert not any("kfac_triton" in line or line.startswith("from ..") for line in lines), path


def test_import_is_light_and_silent() -> None:
    code = (
        "import sys, kfac_triton; heavy = {'matplotlib', 'mlxtend', 'triton', 'sklearn'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def test_runs_as_a_module_from_anywhere() -> None:
    command = [sys.executable, "-m", "kfac_triton", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent)
    assert result.returncode == 0, result.stderr
    assert _version() in result.stdout
