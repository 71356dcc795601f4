"""No file of the project runs what a file or a user says: read off the sources."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from curvadion.report.files import replace_file

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("curvadion", "kernels", "configs", "scripts", "benchmarks")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
SHELL = sorted(path for path in (ROOT / "scripts").iterdir() if path.suffix in (".sh", ".slurm"))
# Results that a benchmark's own processes left in a temporary folder of its own.
UNPICKLES = {"benchmarks/gpu_ranks.py"}
RUNS = ("eval", "exec", "compile", "__import__")
CALLS = re.compile(
    r"(pickle|cPickle|dill|marshal|shelve|joblib|cloudpickle)\.(load|loads|open|Unpickler)|os\.(system|popen)"
    r"|yaml\.(load|unsafe_load|full_load)|tempfile\.mktemp|(np|numpy)\.load|subprocess\.get(status)?output"
)


def unsafe(source: str) -> Iterator[str]:
    """Say of each call in a source that may run what it is given."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        where = f"line {node.lineno}: {name}"
        if name in RUNS or CALLS.fullmatch(name):
            yield where
        if re.fullmatch(r"torch\.(load|jit\.load|hub\.load)", name) and options.get("weights_only") != "True":
            yield f"{where} without weights_only=True"
        if options.get("shell", "False") != "False":
            yield f"{where} in a shell"
        if (
            name.startswith("subprocess.")
            and node.args
            and isinstance(node.args[0], ast.JoinedStr | ast.BinOp)
        ):
            yield f"{where} of a string"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_what_it_reads(path: Path) -> None:
    found = list(unsafe(path.read_text()))
    if str(path.relative_to(ROOT)) in UNPICKLES:
        assert len(found) == 1 and "pickle.loads" in found[0]
    else:
        assert not found


@pytest.mark.parametrize(
    "source",
    [
        "eval(x)",
        "exec(compile(x, y, 'exec'))",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "pickle.load(f)",
        "os.system(x)",
        "subprocess.run(f'rm {x}', shell=True)",
        "subprocess.Popen('a' + x)",
        "yaml.load(f)",
        "tempfile.mktemp()",
    ],
)
def test_the_search_finds_such_calls(source: str) -> None:
    assert list(unsafe(source))
    assert not list(unsafe("torch.load(f, weights_only=True); subprocess.run(['a', x]); model.eval()"))


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_no_shell_script_evaluates_what_it_is_given(path: Path) -> None:
    """No eval, no text for another shell, no variable inside a program's text; bash agrees that it parses."""
    text = path.read_text()
    words = re.sub(r"(?m)(^|\s)#.*$", "", text)
    assert not re.search(r"(^|[;&|\s])eval\s", words)
    assert not re.search(r"\b(ba)?sh\s+-c\b|`", words)
    for program in re.findall(r'-c\s+"([^"]*)"', words):
        assert "$" not in program, f"a variable becomes part of a program: {program}"
    subprocess.run(["bash", "-n", path], check=True)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "summary.json"
    replace_file(file, "old")

    def fail(descriptor: int) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="no space"):
            replace_file(file, "new, and longer")
    assert file.read_text() == "old"
    replace_file(file, b"\x89")
    assert file.read_bytes() == b"\x89"
    assert list(tmp_path.iterdir()) == [file], "nothing is left beside it"
