"""What is said of the options in three places: one hand-written, two generated from it."""

import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import options
import pytest
from options import FIELDS, SOURCE, TABLES, THEMES, read_options

from curvadion import CurvaDion
from curvadion.consensus import CODECS, CONSENSUS
from curvadion.options import GROUP_OPTIONS, OPTIMIZER_OPTIONS
from curvadion.rules import RULES
from curvadion.signals import SIGNALS

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def only_the_librarys_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests of the same process may have registered names."""
    for table in (RULES, SIGNALS, CONSENSUS, CODECS):
        for name, value in list(table.items()):
            kind = value if isinstance(value, type) else type(value)
            if value is not None and not kind.__module__.startswith("curvadion."):
                monkeypatch.delitem(table, name)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copies of the files that the script reads and writes, which it takes for its own."""
    for name in (SOURCE, TABLES, FIELDS):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setattr(options, "ROOT", tmp_path)
    return tmp_path


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def run(*arguments: str) -> object:
    """Run the script, and return what it exits with."""
    with pytest.raises(SystemExit) as exit, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["scripts/options.py", *arguments])
        options.main()
    return exit.value.code


def test_what_is_generated_is_fresh() -> None:
    """As scripts/test.sh asks, in a process of its own."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "options.py", "--check"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        (TABLES, "| `outer_lr` | `1.0` |", "| `outer_lr` | `0.7` |"),
        (FIELDS, "outer_lr: float = 1.0", "outer_lr: float = 0.7"),
    ],
)
def test_a_stale_default_is_found_and_mended(
    tree: Path, capsys: pytest.CaptureFixture[str], file: str, old: str, new: str
) -> None:
    change(tree / file, old, new)
    assert run("--check") == 1
    assert capsys.readouterr().out.splitlines() == [f"{file} is stale; run scripts/options.py"]
    assert run() == 0
    assert (tree / file).read_text() == (ROOT / file).read_text()
    assert run("--check") == 0


def test_a_default_that_changes_makes_both_stale(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(tree / SOURCE, "outer_lr: float = 1.0", "outer_lr: float = 0.7")
    assert run("--check") == 1
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == {TABLES, FIELDS}


@pytest.mark.parametrize(
    ("old", "new", "lacks"),
    [
        ("        outer_momentum: Nesterov", "        outer_momentun: Nesterov", "an entry in the docstring"),
        ("outer_momentum: float = 0.0", "outer_speed: float = 0.0", "outer_speed"),
    ],
)
def test_an_option_that_lacks_something_is_named(tree: Path, old: str, new: str, lacks: str) -> None:
    change(tree / SOURCE, old, new)
    assert lacks in str(run("--check"))


def test_every_option_has_its_places() -> None:
    parameters = list(inspect.signature(CurvaDion).parameters)
    assert parameters[:3] == ["params", "lr", "replicate_mesh"]
    names = [name for name in parameters if name not in ("params", "replicate_mesh", "own")]
    found = read_options()
    assert [option.name for option in found] == names
    assert sorted(names) == sorted(name for theme in THEMES.values() for name in theme)
    page = (ROOT / TABLES).read_text()
    for option in found:
        table = GROUP_OPTIONS if option.of_group else OPTIMIZER_OPTIONS
        assert option.name in table, "the rule that check_options enforces"
        assert option.meaning, "an entry in the docstring"
        assert f"\n| `{option.name}` | `{option.default}` |" in page
    assert {*GROUP_OPTIONS, *OPTIMIZER_OPTIONS} == {*names, "algorithm"}


def test_defaults_keep_the_rules() -> None:
    defaults = {p.name: p.default for p in inspect.signature(CurvaDion).parameters.values()}
    for name, allowed in {**GROUP_OPTIONS, **OPTIMIZER_OPTIONS}.items():
        if name in defaults:
            assert allowed.test(defaults[name]), name
            assert allowed.choices is None or defaults[name] in allowed.choices, name
