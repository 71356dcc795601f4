"""The scripts tell what they do before they do anything, and say it in whole sentences."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHELL = sorted({path.name for path in (ROOT / "scripts").glob("*.sh")} - {"setup_env.sh"})
PROGRAMS = sorted(
    path
    for folder in ("benchmarks", "scripts", "tests")
    for path in (ROOT / folder).glob("*.py")
    if "argparse.ArgumentParser(" in path.read_text() and not path.name.startswith("test_")
)


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("name", SHELL)
def test_a_script_answers_before_it_installs_anything(name: str, flag: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    command = ["bash", str(tmp_path / "scripts" / name), flag]
    environment = os.environ | {"PYTHON": "false"}  # which makes no environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"scripts/{name}" in done.stdout and "#!" not in done.stdout and "set -" not in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"scripts"}


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("scripts/train.py", ["mu (default: the preset's)", "(default: 0.02)"]),
        (
            "benchmarks/convergence.py",
            ["library's own source) --", "(default: 64)"],
        ),
    ],
)
def test_help_says_no_default_where_there_is_none(program: str, said: list[str]) -> None:
    """But what happens then."""
    words = [sys.executable, str(ROOT / program), "--help"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    told = " ".join(done.stdout.split())
    assert "default: None" not in told and "default: )" not in told and "default: False" not in told
    assert "none: " not in told
    assert all(part in told for part in said)


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_a_program_is_described_by_whole_sentences_and_so_is_every_option(path: Path) -> None:
    """Its docstring, or the first line of that, is the description that --help shows."""
    tree = ast.parse(path.read_text())
    assert (ast.get_docstring(tree) or "").split("\n\n")[0].endswith(".")
    if "__doc__.splitlines()[0]" in path.read_text():
        assert (ast.get_docstring(tree) or "").splitlines()[0].endswith(".")
    for node in ast.walk(tree):
        called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr
        if called == "add_argument":
            assert "help" in {keyword.arg for keyword in node.keywords}, ast.unparse(node)
