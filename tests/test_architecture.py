"""The arrows of the design, read off the sources: who may import whom, and who may talk to other ranks."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Top to bottom: a module imports from the rows below its own, never from its own row or from above.
ROWS = [
    {"curvadion.__main__", "curvadion.titan.__main__"},
    {"curvadion.cli"},
    {"curvadion.report"},
    {"curvadion.report.page"},
    {"curvadion.report.display", "curvadion.report.figures"},
    {"curvadion.report.studies"},
    {"curvadion.report.runs"},
    {"curvadion.titan"},
    {"curvadion.titan.components", "curvadion.titan.parallelize"},
    {"curvadion.titan.optimizer"},
    {"curvadion.titan.compat"},
    {"curvadion", "curvadion.project"},
    {"curvadion.optimizer", "curvadion.param_groups", "curvadion.cost"},
    {"curvadion.outer"},
    {"curvadion.collectives", "curvadion.state"},
    {"curvadion.layout", "curvadion.muon", "curvadion.scalar"},
    {"curvadion.dion", "curvadion.gate", "curvadion.options", "curvadion.payload", "curvadion_kernels.library"},
    {"curvadion_kernels"},
    {"curvadion_kernels.triton_ops"},
    {"curvadion_kernels.reference"},
]
DEPTH = {module: depth for depth, row in enumerate(ROWS) for module in row}

# Names under which torch.distributed and its submodules issue collectives or point-to-point messages.
COMMUNICATION = frozenset(
    "all_reduce all_reduce_coalesced all_gather all_gather_coalesced all_gather_into_tensor all_gather_object "
    "all_gather_single all_to_all all_to_all_single barrier batch_isend_irecv broadcast broadcast_object_list gather "
    "gather_object irecv isend monitored_barrier recv recv_object_list reduce reduce_scatter reduce_scatter_tensor "
    "scatter scatter_object_list send send_object_list "
    "all_gather_tensor all_reduce_coalesced_ all_gather_into_tensor_coalesced reduce_scatter_tensor_coalesced "
    "distribute_tensor distribute_module".split()
)
# The same as methods: of a ProcessGroup, which spells them without underscores, and of a DTensor.
METHODS = frozenset(
    "allreduce allreduce_coalesced allgather allgather_coalesced alltoall alltoall_base "
    "_allgather_base _reduce_scatter_base full_tensor redistribute".split()
)

# Outside step(): a state saved on another mesh is resharded by DTensor itself, while it is loaded.
STATE_BOUNDARY = {("curvadion.state", "assign")}


def sources() -> dict[str, str]:
    """Every module of the two packages by its dotted name."""
    found = {}
    for base in (ROOT, ROOT / "kernels"):
        for path in sorted(base.glob("curvadion*/**/*.py")):
            words = path.relative_to(base).with_suffix("").parts
            found[".".join(words[:-1] if words[-1] == "__init__" else words)] = path.read_text()
    return found


def imports(module: str, source: str) -> Iterator[tuple[str, str]]:
    """Every import, also inside functions, as (name it is bound to, full dotted name of what it is)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (alias.asname or alias.name.partition(".")[0]), alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import; the tables here are of absolute ones"
            for alias in node.names:
                yield (alias.asname or alias.name), f"{node.module}.{alias.name}"


def imports_from(module: str, source: str, package: str) -> list[str]:
    """What a module takes from a package, by import or as an attribute (`torch.distributed.barrier`)."""
    names = [name for _, name in imports(module, source)]
    names += [dotted(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    return sorted({name for name in names if f"{name}.".startswith(f"{package}.")})


def own_modules(module: str, source: str) -> set[str]:
    """The modules of this project that a module imports."""
    found = set()
    for _, name in imports(module, source):
        if name.partition(".")[0] in ("curvadion", "curvadion_kernels"):
            # `from curvadion.layout import canonical_name` is of curvadion.layout, `from curvadion import layout` too.
            known = [name, name.rpartition(".")[0]]
            found.add(next((candidate for candidate in known if candidate in DEPTH), name))
    return found


def upward(module: str, source: str) -> list[str]:
    return sorted(name for name in own_modules(module, source) if DEPTH.get(name, -1) <= DEPTH[module])


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def messages(module: str, source: str) -> list[str]:
    """The collectives that a module issues, as `line: name`, without those at the state boundary."""
    bound = dict(imports(module, source))
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if (module, getattr(node, "name", "")) not in STATE_BOUNDARY]
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute | ast.Name):
            continue
        first, _, rest = dotted(node).partition(".")
        full = f"{bound.get(first, first)}.{rest}".rstrip(".")
        last = full.rpartition(".")[2]
        torchs = full.startswith(("torch.distributed.", "torch.ops.c10d", "torch.ops._c10d_functional"))
        if (torchs and last in COMMUNICATION) or (isinstance(node, ast.Attribute) and node.attr in METHODS):
            found.append(f"line {node.lineno}: {full}")
    return found


def test_every_module_has_a_row() -> None:
    missing = sorted(set(sources()) - set(DEPTH))
    assert not missing, f"give {missing} a row in ROWS"
    assert {"curvadion", "curvadion.optimizer", "curvadion.dion", "curvadion_kernels"} <= set(sources())


@pytest.mark.parametrize("module", sorted(sources()))
def test_arrows_point_down(module: str) -> None:
    assert upward(module, sources()[module]) == []


def test_only_titan_imports_torchtitan() -> None:
    guilty = {module for module, source in sources().items() if imports_from(module, source, "torchtitan")}
    assert guilty
    assert all(f"{module}.".startswith("curvadion.titan.") for module in guilty), guilty


def test_mathematics_knows_no_ranks() -> None:
    below = [m for m in sources() if m in ("curvadion.dion", "curvadion.gate") or m.startswith("curvadion_kernels")]
    assert {module: imports_from(module, sources()[module], "torch.distributed") for module in below} == {module: [] for module in below}


def test_one_module_issues_every_collective() -> None:
    issued = {module: messages(module, source) for module, source in sources().items()}
    assert issued.pop("curvadion.collectives"), "the search finds nothing even where collectives are issued"
    assert not any(issued.values()), {module: lines for module, lines in issued.items() if lines}


def test_nothing_imports_what_stands_outside_the_packages() -> None:
    outside = {"configs", "curvadion_configs", "scripts", "benchmarks", "tests", "kernels"}
    for module, source in sources().items():
        assert not outside & {name.partition(".")[0] for _, name in imports(module, source)}, module


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist\ndist.all_reduce(x)",
        "import torch.distributed\ntorch.distributed.broadcast(x, 0)",
        "import torch\nwork = torch.distributed.all_gather_into_tensor",
        "from torch import distributed\ndistributed.barrier()",
        "from torch.distributed import reduce_scatter_tensor as rs\nrs(x, y)",
        "def f():\n    from torch.distributed import _functional_collectives as c\n    c.all_reduce(x, 'sum', g)",
        "import torch\ntorch.ops._c10d_functional.all_reduce(x, 'sum', 'g')",
        "group.allreduce(x)",
        "p.full_tensor()",
        "from torch.distributed.tensor import distribute_tensor\ndistribute_tensor(x, mesh)",
    ],
)
def test_the_search_finds_collectives(source: str) -> None:
    assert messages("m", source)


@pytest.mark.parametrize(
    "source",
    [
        "self.collectives.all_reduce(x)",
        "import torch.distributed as dist\ndist.get_rank()",
        "from functools import reduce\nreduce(f, x)",
        "import torch\ntorch.broadcast_tensors(x, y)\nx.scatter(0, i, y)\ntorch.gather(x, 0, i)",
    ],
)
def test_the_search_leaves_the_rest_alone(source: str) -> None:
    assert not messages("m", source)


@pytest.mark.parametrize(
    "source",
    [
        "import curvadion",
        "from curvadion import CurvaDion",
        "from curvadion import optimizer",
        "from curvadion.optimizer import CurvaDion",
        "import curvadion.collectives as c",
        "from curvadion.scalar import adamw_",
        "def f():\n    from curvadion.titan import Config",
        "from curvadion.unknown import x",
    ],
)
def test_the_search_finds_upward_imports(source: str) -> None:
    assert upward("curvadion.layout", source)


def test_the_search_finds_torch_distributed() -> None:
    for source in (
        "import torch\ntorch.distributed.get_rank()",
        "from torch import distributed",
        "import torch.distributed",
    ):
        assert imports_from("m", source, "torch.distributed")
    assert not imports_from("m", "import torch\ntorch.distributions", "torch.distributed")
