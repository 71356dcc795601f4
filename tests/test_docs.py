"""The code of the documentation: what can run is run, the rest is compiled, and what it links to is there."""

import re
from pathlib import Path

import pytest
from support.ranks import run_program

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]

# What every example of docs/extending.md has to leave behind.
FINISHED = """
assert [opt.metrics()["curvadion/step"] for opt in optimizers] == [12, 12]
synchronized = [round(12 * opt.metrics()["curvadion/sync_rate"]) for opt in optimizers]
assert synchronized[0] == synchronized[1] and 0 < synchronized[0] < 12, "both branches of the gate"
trained = [opt.param_groups[0]["params"] for opt in optimizers]
for p, q, first in zip(*trained, start.parameters(), strict=True):
    assert torch.equal(p, q) and p.isfinite().all() and not torch.equal(p, first)
"""


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


# Each example runs in a process of its own: it registers what other tests must not see.
EXTENDING = blocks("docs/extending.md")


@pytest.mark.parametrize("number", range(1, len(EXTENDING)))
def test_examples_of_extending_train(number: int) -> None:
    """Each after the first block, which trains, and without the others."""
    run_program(f"{EXTENDING[0]}\n{EXTENDING[number]}\n{FINISHED}")


def test_there_is_a_short_example_for_everything_that_can_be_registered() -> None:
    registering = [re.findall(r"^register_(\w+)\(", block, re.MULTILINE) for block in EXTENDING[1:]]
    assert sorted(registering) == [["codec"], ["consensus"], ["rule"], ["signal"]]
    for block in EXTENDING[1:]:
        assert sum(bool(line.strip()) for line in block.splitlines()) <= 20


def test_the_readmes_code_runs() -> None:
    assert blocks("README.md")
    for block in blocks("README.md"):
        run_program(block)


@pytest.mark.parametrize("page", PAGES)
def test_code_compiles(page: str) -> None:
    for block in blocks(page):
        compile(block, page, "exec")


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_are_there(page: str) -> None:
    text = (ROOT / page).read_text()
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        path = ((ROOT / page).parent / target) if target else ROOT / page
        assert path.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", head).lower().replace(" ", "-") for head in heads}, (
                anchor
            )
    folders = "benchmarks|configs|curvadion|docs|kernels|scripts|tests"
    named = set(re.findall(rf"(?<![\w./-])((?:{folders})/[\w/]+\.\w+)", text))
    missing = {name for name in named if not (ROOT / name).exists() and "/NAME" not in name}
    assert not missing, missing
