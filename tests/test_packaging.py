"""What a user installs: the wheel holds our packages and nothing else, and imports far from this tree."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import curvadion
from curvadion import rooms

ROOT = Path(__file__).resolve().parent.parent
# What may lie in a checkout and is not the project's.
JUNK = shutil.ignore_patterns(
    ".git", ".venv*", "runs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache"
)
JUNK_PATH = re.compile(
    r"^(\.git|\.venv[^/]*|runs|build|dist|outputs|assets|data)(/|$)|(^|/)(__pycache__|\.\w+_cache)/|\.egg-info/"
)


def run(*command: str, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, built from a copy, because setuptools writes beside the sources."""
    missing = [name for name in ("pip", "setuptools") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(
            f"building the wheel needs {' and '.join(missing)}: python -m pip install '.[dev]' brings them"
        )
    copy = tmp_path_factory.mktemp("source") / "curvadion"
    shutil.copytree(ROOT, copy, ignore=JUNK)
    build = "import setuptools.build_meta as b, sys; print(b.build_sdist(sys.argv[1]))"
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-c", build, str(out), cwd=copy)
    (built,) = out.glob("*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution."""
    out = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index")
    run(*pip, "--wheel-dir", str(out), str(source), cwd=out)
    (built,) = out.glob("*.whl")
    return built


def test_the_source_distribution_holds_everything(source: Path) -> None:
    """So that its tests, its two commands and its documentation work: as a checkout does."""
    with tarfile.open(source) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    ours = {
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*")
        if path.is_file() and not JUNK_PATH.search(str(path.relative_to(ROOT)))
    }
    assert len(ours) > 200 and not ours - held, sorted(ours - held)


def test_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert wheel.name == f"curvadion-{curvadion.__version__}-py3-none-any.whl"
    assert {name.partition("/")[0] for name in names} == {
        "curvadion",
        "curvadion_configs",
        "curvadion_kernels",
        f"curvadion-{curvadion.__version__}.dist-info",
    }
    assert {
        "curvadion/py.typed",
        "curvadion_kernels/py.typed",
        "curvadion_kernels/reference.py",
        "curvadion_configs/models.py",
    } <= set(names)
    assert any(name.endswith("/LICENSE") for name in names)
    assert "curvadion/report/page.py" in names


def test_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = archive.read(path).decode().splitlines()
    base = [line for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert len(base) == 1, "torch alone is the base dependency"
    assert re.fullmatch(r"Requires-Dist: torch\b.*", base[0])
    assert f"Version: {curvadion.__version__}" in lines
    assert "License-Expression: BSD-3-Clause" in lines
    assert {f"Provides-Extra: {extra}" for extra in ("report", "kernels", "torchtitan", "dev")} <= set(lines)


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked far from this tree."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_imports_outside_the_tree(site: Path, tmp_path: Path) -> None:
    """And the configs too, where torchtitan is."""
    program = """
import importlib.util
import curvadion, curvadion_kernels, torch
print(curvadion.__file__, curvadion_kernels.__file__, curvadion.__version__, sep="\\n")
model = torch.nn.Linear(6, 4)
optimizer = curvadion.CurvaDion(curvadion.param_groups_for(model), lr=0.02)
before = model.weight.detach().clone()
model(torch.ones(2, 6)).sum().backward()
optimizer.step()
print(bool(torch.equal(before, model.weight)))
if importlib.util.find_spec("torchtitan"):
    import curvadion_configs
    print(curvadion_configs.__file__, curvadion_configs.gpt_160m().optimizer.local_update, sep="\\n")
"""
    lines = run(
        sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(site), OMP_NUM_THREADS="1"
    ).splitlines()
    configs = [str(site / "curvadion_configs" / "__init__.py"), "muon"]
    assert lines == [
        str(site / "curvadion" / "__init__.py"),
        str(site / "curvadion_kernels" / "__init__.py"),
        curvadion.__version__,
        "False",
        *(configs if importlib.util.find_spec("torchtitan") else []),
    ]


def test_the_command_outside_the_tree(site: Path, tmp_path: Path) -> None:
    """Its help needs no extra."""
    (scripts,) = site.glob("*.dist-info/entry_points.txt")
    assert "curvadion = curvadion.cli:main" in scripts.read_text()
    program = """
import sys
sys.modules.update(rich=None, matplotlib=None)  # what is None there cannot be imported
from curvadion.cli import main
try:
    main(["--help"])
except SystemExit as done:
    assert not done.code
main(["report", "run"])
"""
    refused = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert "report" in refused.stdout, refused.stderr
    assert refused.returncode == 1
    assert "pip install 'curvadion[report]'" in refused.stderr


def test_a_torch_that_nobody_has_tested_is_named(caplog: pytest.LogCaptureFixture) -> None:
    rooms.untested.cache_clear()
    assert rooms.untested("2.11.0") == rooms.untested("2.15.3+cu130") == "" and not caplog.records
    for _ in range(2):
        assert "2.16.0.dev20270101 is newer than 2.15" in rooms.untested("2.16.0.dev20270101")
    assert len(caplog.records) == 1, "said once"
