"""The code of the documentation: what can run is run, the rest is compiled, and what it links to is there."""

import re
from pathlib import Path

import pytest
from support.ranks import run_program, run_ranks

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


@pytest.mark.parametrize("page", ["README.md", "docs/coming_from.md", "docs/models.md"])
def test_the_code_of_a_page_runs(page: str) -> None:
    assert blocks(page)
    for block in blocks(page):
        run_program(block)


# Trains with the functions of docs/own_model.md, as its reader would put them together.
OWN_MODEL = """
import torch.distributed as dist


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x).tanh()
        return x


torch.manual_seed(0)
mesh = make_mesh("cpu", replicas=2, ranks=dist.get_world_size())
model = Model()
opt = make_optimizer(model, mesh)
look(opt)
data = torch.Generator().manual_seed(dist.get_rank())
batches, lines = [torch.randn(8, 16, generator=data) for _ in range(9)], []
loss_of = lambda model, batch: (model(batch) - batch.flip(1)).square().mean()
before = evaluate(model, opt, loss_of, batches)
train(model, opt, 4 * batches, loss_of, lines.append)
assert evaluate(model, opt, loss_of, batches) < 0.9 * before
assert [bool(line["curvadion/synchronized"]) for line in lines] == [i % 8 == 0 for i in range(36)]
finish(opt)
assert not opt.diverged
dist.destroy_process_group()
"""


def own_model() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    code = "\n".join(blocks("docs/own_model.md")) + OWN_MODEL
    exec(compile(code, "docs/own_model.md", "exec"), {"__name__": "own_model"})


def test_the_loop_of_own_model_trains_on_four_ranks() -> None:
    run_ranks(4, own_model, group=False)


def test_the_playbooks_tables_are_what_the_formulas_say(monkeypatch: pytest.MonkeyPatch) -> None:
    import playbook

    monkeypatch.setattr("sys.argv", ["playbook.py", "--check"])
    playbook.main()


def test_changes_of_a_preset_that_pages_name_can_be_made() -> None:
    """Calls of presets on all pages, and what the README's table of settings has a preset called with."""
    import torch

    import curvadion

    text = "\n".join((ROOT / page).read_text() for page in PAGES)
    calls = re.findall(r"LOW\w*_COMMUNICATION\w*\([^()]+\)", text)
    [table] = re.findall(
        r"^\| what you want \|.*?\n\n", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    calls += [f"LOW_COMMUNICATION({changes})" for changes in re.findall(r"`(\w+=[^`]+)`", table)]
    assert len(calls) > 7
    for call in calls:
        preset = eval(call, {**{name: getattr(curvadion, name) for name in curvadion.__all__}, "n": 4})
        opt = curvadion.CurvaDion([torch.nn.Parameter(torch.eye(4))], **preset)
        assert isinstance(opt, curvadion.CurvaDion), call


def test_every_page_is_in_the_menu_and_on_the_start_page_and_no_others_are() -> None:
    menu = re.findall(r"^ .*?: (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(menu) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    # Who reads the files without the site has no menu.
    linked = re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs" / "index.md").read_text())
    assert {*linked} == {*menu} - {"index.md"}


def test_pages_link_to_nothing_outside_the_site() -> None:
    for page in PAGES[1:]:
        assert not re.findall(r"\]\(\.\./", (ROOT / page).read_text()), page


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
