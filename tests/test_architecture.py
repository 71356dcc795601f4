"""The arrows of the design, read off the sources: who may import whom, and who may talk to other ranks."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Top to bottom: a module imports from the rows below its own and from its own package, never from above. A
# package that is named has one row for all its modules; within it, imports must not go round in a circle.
ROWS = [
    {"curvadion.__main__", "curvadion.titan.__main__"},
    {"curvadion.cli"},
    {
        *("curvadion.report", "curvadion.titan", "curvadion.doctor"),
        *("curvadion.rendezvous", "curvadion.hosts"),
    },
    {"curvadion.projection"},
    {"curvadion"},
    {"curvadion.optimizer", "curvadion.param_groups"},
    {"curvadion.elastic"},
    {"curvadion.stateful"},
    {"curvadion.view"},
    {"curvadion.explain"},
    {"curvadion.rooms"},
    {"curvadion.metrics", "curvadion.placement", "curvadion.state.intake", "curvadion.state.checkpoint"},
    {"curvadion.state.loadable"},
    {"curvadion.options", "curvadion.fused"},
    {"curvadion.gate.ask"},
    {"curvadion.consensus"},
    {"curvadion.signals"},
    {"curvadion.rules"},
    {"curvadion.state", "curvadion.costs"},
    {"curvadion.sharding", "curvadion.algebra", "curvadion.gate"},
    {"curvadion.allowed", "curvadion.formats", "curvadion.version", "curvadion_kernels"},
]
PACKAGE_ROOTS = {"curvadion"}  # one module each, whatever else begins with their names
DEPTH = {name: depth for depth, row in enumerate(ROWS) for name in row}


def row_of(module: str) -> str | None:
    """The name of a module's row: its own or its nearest package's."""
    while module:
        if module in DEPTH:
            return module
        module = module.rpartition(".")[0]
        if module in PACKAGE_ROOTS:
            return None
    return None


# Names under which torch.distributed and its submodules issue collectives or point-to-point messages.
COMMUNICATION = frozenset(
    "all_reduce all_reduce_coalesced all_gather all_gather_coalesced all_gather_into_tensor "
    "all_gather_object all_gather_single all_to_all all_to_all_single barrier batch_isend_irecv broadcast "
    "broadcast_object_list gather gather_object irecv isend monitored_barrier recv recv_object_list reduce "
    "reduce_scatter reduce_scatter_tensor scatter scatter_object_list send send_object_list "
    "all_gather_tensor all_reduce_coalesced_ all_gather_into_tensor_coalesced "
    "reduce_scatter_tensor_coalesced "
    "distribute_tensor distribute_module".split()
)
# The same as methods: of a ProcessGroup, which spells them without underscores, and of a DTensor.
METHODS = frozenset(
    "allreduce allreduce_coalesced allgather allgather_coalesced alltoall alltoall_base "
    "_allgather_base _reduce_scatter_base full_tensor redistribute".split()
)

# Outside step(): a state saved on another mesh is resharded by DTensor itself, while it is loaded.
STATE_BOUNDARY = {("curvadion.state.store", "assign")}


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
    found, modules = set(), set(sources())
    for _, name in imports(module, source):
        if name.partition(".")[0] in ("curvadion", "curvadion_kernels"):
            # `from curvadion.options import Options` is of curvadion.options, `from curvadion import options`
            # too.
            known = [name, name.rpartition(".")[0]]
            found.add(next((candidate for candidate in known if candidate in modules), name))
    return found


def upward(module: str, source: str) -> list[str]:
    mine = row_of(module)
    assert mine is not None
    found = []
    for name in own_modules(module, source):
        theirs = row_of(name)
        if theirs != mine and (theirs is None or DEPTH[theirs] <= DEPTH[mine]):
            found.append(name)
    return sorted(found)


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
    missing = sorted(module for module in sources() if row_of(module) is None)
    assert not missing, f"give {missing} or their package a row in ROWS"
    empty = sorted(row for row in DEPTH if row not in {row_of(module) for module in sources()})
    assert not empty, f"{empty} in ROWS stand for no module"


def test_imports_do_not_go_round_in_a_circle() -> None:
    # A package's own file names what its modules define; they do not import it.
    packages = {m for m in sources() if any(other.startswith(f"{m}.") for other in sources())}
    graph = {m: own_modules(m, source) - {m} for m, source in sources().items() if m not in packages}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) >= len(graph)


@pytest.mark.parametrize("module", sorted(sources()))
def test_arrows_point_down(module: str) -> None:
    assert upward(module, sources()[module]) == []


def test_only_titan_imports_torchtitan() -> None:
    guilty = {module for module, source in sources().items() if imports_from(module, source, "torchtitan")}
    assert guilty
    assert all(f"{module}.".startswith("curvadion.titan.") for module in guilty), guilty


def test_mathematics_knows_no_ranks() -> None:
    pure = (
        "curvadion.algebra",
        "curvadion.gate.key",
        "curvadion.gate.schedule",
        "curvadion.gate.trouble",
        "curvadion_kernels",
    )
    below = [m for m in sources() if m.startswith(pure)]
    assert len(below) > 8
    assert {module: imports_from(module, sources()[module], "torch.distributed") for module in below} == {
        module: [] for module in below
    }


def test_one_package_issues_every_collective() -> None:
    issued = {module: messages(module, source) for module, source in sources().items()}
    assert issued.pop("curvadion.sharding.group"), (
        "the search finds nothing even where collectives are issued"
    )
    assert not any(issued.values()), {module: lines for module, lines in issued.items() if lines}


def test_kinds_are_asked_for_in_their_own_rooms_only() -> None:
    """No condition anywhere else on which rule, signal, consensus or codec it is."""
    from curvadion.consensus import CODECS, CONSENSUS
    from curvadion.rules import RULES
    from curvadion.signals import SIGNALS

    names = {*RULES, *SIGNALS, *CONSENSUS, *CODECS} - {"none"}  # which is a word of report/ too
    rooms = ("curvadion.rules", "curvadion.signals", "curvadion.consensus")
    for module, source in sources().items():
        if module.startswith(rooms) or not module.startswith("curvadion."):
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Compare):
                sides = [s.value for s in [node.left, *node.comparators] if isinstance(s, ast.Constant)]
                about = [s for s in [node.left, *node.comparators] if not isinstance(s, ast.Constant)]
                words = " ".join(ast.unparse(s) for s in about)
                asked = [v for v in sides if isinstance(v, str) and v in names]
                kind = any(word in words for word in ("local_update", "consensus", "gate", "rule"))
                assert not (asked and kind), f"{module} line {node.lineno}: {ast.unparse(node)}"


def test_files_and_classes_stay_small() -> None:
    for module, source in sources().items():
        if module.startswith("curvadion."):
            assert source.count("\n") <= 550, f"{module} has {source.count(chr(10))} lines"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                own = {
                    t.attr
                    for n in ast.walk(node)
                    if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)
                    for t in [n]
                    if isinstance(t.value, ast.Name) and t.value.id == "self"
                }
                assert len(own) <= 16, (
                    f"{module}.{node.name} writes {len(own)} attributes of its own: {sorted(own)}"
                )


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
        "def f():\n    from torch.distributed import _functional_collectives as c\n    c.all_reduce(x, "
        "'sum', g)",
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
        "import curvadion.state.table as t",
        "from curvadion.rules.scalar import scalar_step",
        "def f():\n    from curvadion.titan import Config",
        "from curvadion.unknown import x",
    ],
)
def test_the_search_finds_upward_imports(source: str) -> None:
    assert upward("curvadion.sharding.layout", source)


def test_the_search_finds_torch_distributed() -> None:
    for source in (
        "import torch\ntorch.distributed.get_rank()",
        "from torch import distributed",
        "import torch.distributed",
    ):
        assert imports_from("m", source, "torch.distributed")
    assert not imports_from("m", "import torch\ntorch.distributions", "torch.distributed")
