"""The layout: what may import what, how files are named, and that every way of installing works."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNEL_FILES = sorted((ROOT / "kernels").glob("*.py"))
ROOMS = ("posattn", "kernels", "bench", "tests", "examples")
OUR_FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
DRAWERS = {"utils", "util", "helpers", "helper", "common", "base", "core", "misc", "manager"}


def imported(path: Path) -> set[str]:
    """Top-level names of the absolute imports in a file, those inside functions included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(str(node.module).split(".")[0])
    return names


def test_kernels_is_a_relative_link_without_init():
    link = ROOT / "posattn" / "kernels"
    if not link.is_symlink():
        pytest.skip("an unpacked sdist holds the files themselves")
    assert link.readlink() == Path("../kernels")
    assert KERNEL_FILES
    # With it, the folder hides the distribution named `kernels` wherever that one is installed.
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda p: p.name)
def test_kernels_import_only_torch_triton_and_siblings(path):
    assert imported(path) <= set(sys.stdlib_module_names) | {"torch", "triton"}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"line {node.lineno} reaches outside kernels/"


@pytest.mark.parametrize("path", OUR_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_go_one_way(path):
    room = path.relative_to(ROOT).parts[0]
    outside = {"bench", "tests", "examples"}
    forbidden = {"posattn": outside, "kernels": {*outside, "posattn"}, "tests": set()}.get(room, outside - {room})
    assert not imported(path) & forbidden
    if room == "posattn" and "kernels" not in path.parts:
        assert "triton" not in imported(path), "Triton is needed only in kernels/"


def test_no_drawers():
    assert not [p for p in OUR_FILES if p.stem.strip("_") in DRAWERS]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what a build reads, because a build writes into the folder it runs in."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    leave = shutil.ignore_patterns("__pycache__")
    for name in ("kernels", "posattn"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=leave)
    return copy


@pytest.fixture
def fresh_python(tmp_path):
    """The interpreter of a new environment that sees torch and pip, but no posattn installed before."""
    venv.create(tmp_path / "env", symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    site = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path).strip())
    # A folder named in a .pth file is searched, the .pth files inside it (editable installs) are not read.
    (site / "outer.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    return python


def run(*command, cwd) -> str:
    done = subprocess.run([str(word) for word in command], cwd=cwd, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def shipped_files() -> set[str]:
    posattn = {p.relative_to(ROOT).as_posix() for p in (ROOT / "posattn").rglob("*.py")}
    return posattn | {f"posattn/kernels/{p.name}" for p in KERNEL_FILES} | {"posattn/py.typed"}


def files_in(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def assert_imports_from(folder: Path, python, cwd):
    names = ["posattn", "posattn.biases"]
    if find_spec("triton"):
        names += [f"posattn.kernels.{p.stem}" for p in KERNEL_FILES]
    code = "; ".join(f"import {name}; print({name}.__file__)" for name in names)
    for file in run(python, "-c", code, cwd=cwd).split():
        assert Path(file).resolve().is_relative_to(folder.resolve()), file


OFFLINE = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")


def test_wheel(checkout, fresh_python, tmp_path):
    run(fresh_python, "-m", "pip", "wheel", *OFFLINE, "-w", tmp_path, ".", cwd=checkout)
    (wheel,) = tmp_path.glob("posattn-*-py3-none-any.whl")
    assert files_in(wheel) == shipped_files()
    run(fresh_python, "-m", "pip", "install", *OFFLINE, wheel, cwd=tmp_path)
    assert_imports_from(tmp_path / "env", fresh_python, tmp_path)


def test_sdist_makes_the_same_wheel(checkout, tmp_path):
    def build(kind, folder):
        code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(tmp_path)!r}))"
        return tmp_path / run(sys.executable, "-c", code, cwd=folder).split()[-1]

    sdist = build("sdist", checkout)
    shutil.unpack_archive(sdist, tmp_path)
    assert files_in(build("wheel", tmp_path / sdist.name.removesuffix(".tar.gz"))) == shipped_files()


@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_editable(checkout, fresh_python, tmp_path, mode):
    settings = f"--config-settings=editable_mode={mode}"
    run(fresh_python, "-m", "pip", "install", *OFFLINE, settings, "--editable", ".", cwd=checkout)
    assert_imports_from(checkout, fresh_python, tmp_path)


def test_uninstalled_from_the_root(fresh_python):
    assert_imports_from(ROOT, fresh_python, ROOT)


def test_importing_is_light():
    """The compiler and scipy (by way of torchdiffeq) are imported when they are needed."""
    heavy = "torch._dynamo", "torch.distributed.tensor", "torchdiffeq", "scipy", "transformers", "matplotlib"
    code = f"import posattn, sys; print([name for name in {heavy} if name in sys.modules])"
    made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert made.stdout.strip() == "[]", made.stdout
