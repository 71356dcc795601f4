"""Generate what is said of CurvaDion's options: the tables of docs/options.md, the fields of the plug-in.

    python scripts/options.py            # rewrites what is stale
    python scripts/options.py --check    # names it, and exits 1

Names, types and defaults are read from the constructor's signature, meanings from its docstring, where [g]
marks what a parameter group may set, and what an option may be from curvadion/options.py. Run it after these
changed, or after a rule, a signal, a consensus or a codec was added. The plug-in is torchtitan's.
"""

import argparse
import ast
import inspect
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [
    str(ROOT),
    str(ROOT / "kernels"),
]  # the packages of this checkout, also where they are not installed

from curvadion.options import GROUP_OPTIONS, OPTIMIZER_OPTIONS, Allowed  # noqa: E402

SOURCE = "curvadion/optimizer.py"
FIELDS = "curvadion/titan/optimizer.py"
TABLES = "docs/options.md"
ARGUMENTS = ("params", "replicate_mesh")  # of the constructor; no options

THEMES = {
    "The update": """
        lr momentum weight_decay rank_fraction rank_multiple_of local_update local_lr_scale update_scale
        weight_layout batch_dims splits split_along nesterov
        error_feedback right_factor orthogonalization owners replica_gbit owner_dtype betas eps
    """.split(),
    "The gate": """
        gate tau warmup_steps min_local_steps max_local_steps target_sync_rate gate_every gate_lag
    """.split(),
    "Consensus and the outer step": """
        consensus outer_lr outer_momentum outer_bits outer_fragments outer_delay outer_on_host
        outer_residual_kept
    """.split(),
    "Numbers and checks": """
        newton_schulz newton_schulz_steps newton_schulz_dtype newton_schulz_method momentum_dtype
        payload_dtype on_nonfinite on_equal_gradients check_every kernels
    """.split(),
}

# Types of a config, which is text, where they are not the constructor's.
WRITTEN = {"float | Tensor": "float", "torch.dtype | None": 'Literal["float32", "bfloat16"] | None'}


@dataclass(frozen=True)
class Option:
    """What the constructor says of an option.

    Attributes:
        name, annotation, default: as its signature has them.
        meaning: what its docstring says.
        of_group: whether a parameter group may set it.
    """

    name: str
    annotation: str
    default: str
    meaning: str
    of_group: bool

    @property
    def allowed(self) -> Allowed:
        """What it may be."""
        return (GROUP_OPTIONS if self.of_group else OPTIMIZER_OPTIONS)[self.name]

    @property
    def sentence(self) -> str:
        """The meaning, as a sentence of its own."""
        return f"{self.meaning[0].upper()}{self.meaning[1:]}".rstrip(".") + "."

    def row(self) -> str:
        """Return its row of a table."""
        meaning, words = (text.replace("|", "\\|") for text in (self.sentence, self.allowed.words))
        return (
            f"| `{self.name}` | `{self.default}` | {'yes' if self.of_group else ''} | {meaning} | {words} |"
        )

    def field(self) -> str:
        """Return its field of the plug-in's config, in the lines of a class inside a class."""
        kind = WRITTEN.get(self.annotation, self.annotation)
        if self.allowed.choices is not None:
            known = f"Literal[{', '.join(sorted(map(_literal, self.allowed.choices), key=_by_number))}]"
            kind = f"{known} | str" if self.allowed.grows else known  # what is registered is a name too
        text = textwrap.wrap(f'"""{self.sentence}"""', 102, break_on_hyphens=False, break_long_words=False)
        return textwrap.indent("\n".join([f"{self.name}: {kind} = {self.default}", *text]), " " * 8)


def _literal(name: object) -> str:
    return f'"{name}"' if isinstance(name, str) else repr(name)


def _by_number(name: str) -> int:
    return int(name) if name.isdigit() else 0


def read_options() -> list[Option]:
    """Return all options in the constructor's order. Raises SystemExit if its parts do not fit together."""
    module = ast.parse((ROOT / SOURCE).read_text())
    owner = next(node for node in module.body if isinstance(node, ast.ClassDef) and node.name == "CurvaDion")
    init = next(node for node in owner.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    meanings = _entries(inspect.cleandoc(ast.get_docstring(owner) or ""))
    positional = init.args.args[1:]
    defaults = [None] * (len(positional) - len(init.args.defaults)) + init.args.defaults
    signature = [
        *zip(positional, defaults, strict=True),
        *zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True),
    ]
    source = (ROOT / SOURCE).read_text()
    options = []
    for argument, default in signature:
        name = argument.arg
        if name in ARGUMENTS:
            continue
        meaning, of_group = meanings.get(name, ("", False))
        texts = [
            ast.get_source_segment(source, node) if node else "" for node in (argument.annotation, default)
        ]
        options.append(Option(name, texts[0] or "", texts[1] or "", meaning, of_group))
    _check(options)
    return options


def _entries(docstring: str) -> dict[str, tuple[str, bool]]:
    """Return the entries under "Args:", and whether they are marked [g]."""
    under = docstring.partition("\nArgs:\n")[2].partition("\n\n")[0]
    found = re.finditer(r"^    (\w+)( \[g\])?: (.+(?:\n {8}.+)*)", under, re.MULTILINE)
    return {match[1]: (" ".join(match[3].split()), bool(match[2])) for match in found}


def _check(options: list[Option]) -> None:
    """Raise SystemExit if an option lacks what belongs to it."""
    placed = [name for names in THEMES.values() for name in names]
    for option in options:
        table = GROUP_OPTIONS if option.of_group else OPTIMIZER_OPTIONS
        lacks = {
            "an entry in the docstring": not option.meaning,
            f"a row in {'GROUP' if option.of_group else 'OPTIMIZER'}_OPTIONS": option.name not in table,
            "a theme in scripts/options.py": placed.count(option.name) != 1,
        }
        for what, missing in lacks.items():
            if missing:
                raise SystemExit(f"an option needs {what}; got none, or two, for {option.name!r}; add it")
    gone = sorted(
        {*placed, *GROUP_OPTIONS, *OPTIMIZER_OPTIONS} - {option.name for option in options} - {"algorithm"}
    )
    if gone:
        raise SystemExit(f"what has a theme or a row must be in the constructor; got {gone}; remove them")


def tables(options: list[Option]) -> str:
    """Return the tables of docs/options.md."""
    of = {option.name: option for option in options}
    head = "| option | default | group? | meaning | may be |\n|---|---|---|---|---|\n"
    parts = [
        f"### {theme}\n\n{head}" + "\n".join(of[name].row() for name in names)
        for theme, names in THEMES.items()
    ]
    return "\n" + "\n\n".join(parts) + "\n\n"


def fields(options: list[Option]) -> str:
    """Return the fields of the plug-in's config."""
    return "\n".join(option.field() for option in options) + "\n"


def between(text: str, first: str, last: str, generated: str) -> str:
    """Return the text with what stands between two lines replaced. Raises SystemExit without these lines."""
    lines = text.splitlines(keepends=True)
    at = [k for k, line in enumerate(lines) if line.strip() in (first, last)]
    if [lines[k].strip() for k in at] != [first, last]:
        raise SystemExit(
            f"generated text stands between lines {first!r} and {last!r}; got {len(at)}; put them back"
        )
    return "".join([*lines[: at[0] + 1], generated, *lines[at[1] :]])


def generate() -> dict[Path, tuple[str, str]]:
    """Return each file's text as it is and as it should be."""
    options = read_options()
    begin, end = "generated by scripts/options.py: begin", "generated by scripts/options.py: end"
    wanted = {
        TABLES: (f"<!-- {begin} -->", f"<!-- {end} -->", tables(options)),
        FIELDS: (f"# {begin}", f"# {end}", fields(options)),
    }
    texts = {name: (ROOT / name).read_text() for name in wanted}
    return {ROOT / name: (text, between(text, *wanted[name])) for name, text in texts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 and name what is stale")
    args = parser.parse_args()
    stale = {path: new for path, (old, new) in generate().items() if old != new}
    for path, new in stale.items():
        if not args.check:
            path.write_text(new)
        print(f"{path.relative_to(ROOT)} {'is stale; run scripts/options.py' if args.check else 'rewritten'}")
    sys.exit(bool(stale and args.check))


if __name__ == "__main__":
    main()
