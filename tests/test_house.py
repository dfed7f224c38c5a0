"""The rules of the house: which file imports which, how long a function may be, where an option is declared.

The sources are parsed, not imported.
"""

import ast
import re
import sys
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP = sorted(ROOT.glob("*.py"))
PARTS = sorted(ROOT.glob("parts/*.py"))
SOURCES = [*TOP, *PARTS, *sorted(ROOT.glob("data/*/*.py"))]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in [*SOURCES, *sorted(ROOT.glob("config/*.py"))]}
# which top-level files a top-level file may import, all of parts/ aside; parts/ itself imports none of them
BELOW = {
    "codec": set(),
    "data": set(),
    "model": set(),
    "layouts": {"model"},
    "export": {"layouts", "model", "codec"},
    "released": {"layouts", "codec", "model"},
    "weights": {"released", "export", "layouts", "model", "codec"},
    "prepare": {"codec", "data"},
    "speak": {"weights", "codec", "data", "model"},
    "voice": {"speak", "released", "weights", "codec", "data", "model"},
    "sample": {"voice", "speak", "released", "weights", "layouts", "codec", "data", "model"},
    "plan": {"weights", "layouts", "codec", "data", "model"},
    "evaluate": {"plan", "sample", "voice", "speak", "weights", "codec", "data", "model"},
    "train": {"plan", "evaluate", "sample", "voice", "speak", "weights", "codec", "data", "model"},
    "sweep": {"train", "plan", "evaluate", "prepare", "codec", "data", "model"},
    "bench": {"train", "plan", "evaluate", "sample", "voice", "speak", "prepare", "weights", "export", "layouts",
              "codec", "data", "model"},
}
LONGEST_FUNCTION = 80  # lines
MOST_PAIRS = 0.02  # share of the statements of a file that may be `a, b = x, y`
# options that stand in two places on purpose: {name: why}
DECLARED_TWICE = {
    "dtype": "voice.py's is that of the arithmetic, weights.py's that of an exported file",
    "out_dir": "train.py's holds a run, sample.py's recordings, evaluate.py's a page, weights.py's an export",
    "ckpt": "bench.py measures several, sample.py speaks with several, weights.py exports one",
    "overwrite": "prepare.py replaces a token folder unless told otherwise, train.py never a run",
}
OPTIONAL = {"torch.utils.tensorboard"}  # of required packages, what needs another package


def name_of(path):
    """A source as other sources import it: "train", "parts.files"."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


OURS = {name_of(path) for path in [*TOP, *PARTS]}


def place(path, node):
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def imports(tree):
    """(node, module) of every import in a tree; `from parts import lora` imports parts.lora."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((node, name if name in OURS else node.module) for name in inner)


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def ours(path):
    """The files of the repository that a source imports, by name."""
    return {module for _, module in imports(TREES[path]) if module in OURS}


def test_imports_have_no_circle():
    graph = {name_of(path): ours(path) for path in [*TOP, *PARTS]}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize("path", [*TOP, *PARTS], ids=name_of)
def test_imports_go_one_way(path):
    allowed = set() if path.parent.name == "parts" else BELOW.get(name_of(path))
    assert allowed is not None, "a new file: name in BELOW what it may import"
    wrong = [f"{place(path, node)} imports {module}" for node, module in imports(TREES[path])
             if module in OURS and not module.startswith("parts.") and module not in allowed]  # fmt: skip
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_only_optional_packages_are_imported_inside_functions(path):
    required = {re.match(r"[\w-]+", line)[0].lower() for line in (ROOT / "requirements.txt").read_text().split("\n")
                if re.match(r"\w", line)}  # fmt: skip
    known = required | sys.stdlib_module_names | {name.split(".")[0] for name in OURS}
    inside = {(node, module) for function in functions(TREES[path]) for node, module in imports(function)}
    wrong = sorted(f"{place(path, node)} imports {module}" for node, module in inside
                   if module.split(".")[0] in known and module not in OPTIONAL)  # fmt: skip
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_functions_fit_on_a_screen(path):
    lengths = {node: node.end_lineno - node.lineno + 1 for node in functions(TREES[path])}
    wrong = [f"{place(path, node)} {node.name}: {n} lines" for node, n in lengths.items() if n > LONGEST_FUNCTION]
    assert not wrong, "\n".join(wrong)


def top_keys(tree):
    """The keys of a script: assignments to lower-case names before its first function or class."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            return
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(targets[0], ast.Name) and re.fullmatch("[a-z][a-z0-9_]*", targets[0].id):
            yield targets[0].id, node


def family_keys(tree):
    """The keys of a family: fields of a dataclass whose default is `fixed(...)` or `free(...)`, and the class."""
    for family in [node for node in tree.body if isinstance(node, ast.ClassDef)]:
        for node in family.body:
            value = getattr(node, "value", None)
            if isinstance(node, ast.AnnAssign) and getattr(getattr(value, "func", None), "id", "") in ("fixed", "free"):
                yield node.target.id, node


def test_an_option_stands_in_one_place():
    """A script that has a key of another names it in SHARED; families that share a field inherit it."""
    declared = defaultdict(list)
    for path in TOP:
        for key, node in [*top_keys(TREES[path]), *family_keys(TREES[path])]:
            declared[key].append(place(path, node))
    twice = {key: places for key, places in declared.items() if len(places) > 1}
    wrong = [f"{key}: {', '.join(places)}" for key, places in sorted(twice.items()) if key not in DECLARED_TWICE]
    assert not wrong, "\n".join(wrong)
    assert not DECLARED_TWICE.keys() - twice.keys()


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name != "model.py"], ids=name_of)
def test_a_model_is_not_asked_what_it_has(path):
    """What differs between families is an attribute or method of all of them, in model.py."""
    wrong = [f"{place(path, node)} {ast.unparse(node)}" for node in ast.walk(TREES[path])
             if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("hasattr", "getattr")
             and re.search(r"\b(model|averaged|family|ARCHS)\b", ast.unparse(node.args[0]))]  # fmt: skip
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", TOP, ids=name_of)
def test_a_line_makes_one_statement(path):
    """`a, b = x, y` is for pairs that are one thought."""
    statements = [node for node in ast.walk(TREES[path]) if isinstance(node, ast.stmt)]
    pairs = [node for node in statements if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
             and isinstance(node.targets[0], ast.Tuple)]  # fmt: skip
    share = len(pairs) / len(statements)
    assert share <= MOST_PAIRS, f"{share:.1%} of {len(statements)}: " + ", ".join(place(path, node) for node in pairs)
