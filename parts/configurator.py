"""Configurator: config files and --key=value flags become one checked namespace.

- Defaults are the plain commented assignments at the top of a script: `learning_rate = 3e-4  # peak`. They are read
  from its source without importing it, so `--help` is fast and one recipe can serve several scripts.
- A key has the type of its default, or of its annotation, which may add a range or choices:
  `top_p: "0 < float <= 1" = 1.0`, `cap: "int | None >= 1" = None`, `mode: Literal["ar", "nar"] = "nar"`.
- A key is declared in one script. Another script that has it too names it: `SHARED = {"sample.py": ["seed"]}`.
- The keys of a family of models are the fields of its config class in model.py with a default `fixed(...)` or
  `free(...)`. They are keys of train.py.
- A config file is a Python program and is executed; every plain name that it defines is a key. Flags win over files,
  later ones over earlier ones.
- A config file may hold keys of prepare.py, train.py and sample.py. A flag of another script is refused. So is an
  unknown key, with the nearest known name, and a wrong value, with its origin and what is allowed.
"""

import ast
import difflib
import inspect
import io
import math
import operator
import os
import sys
import tokenize
import types
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("prepare.py", "train.py", "sample.py", "sweep.py")  # a recipe may hold keys of these
TRAINING, MODELS = "train.py", "model.py"  # the config classes in MODELS hold further keys of TRAINING
TYPES = {"bool": bool, "int": int, "float": float, "str": str, "list": list, "tuple": tuple, "dict": dict}
COMPARISONS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
SIGNS = {ast.GtE: ">=", ast.Gt: ">", ast.LtE: "<=", ast.Lt: "<"}
MIRRORED = {">=": "<=", ">": "<", "<=": ">=", "<": ">"}
LARGEST = 2**53  # of an int: a float holds all integers up to it
LONGEST_LINE = 393  # characters of an error


class Kind(NamedTuple):
    """What a value may be: its types (none: any), the types of a list's items, choices for a text, and bounds (sign,
    number) of the value or of the items."""

    types: tuple = ()
    items: tuple = ()
    choices: tuple = ()
    bounds: tuple = ()

    def __str__(self):
        words = [f"{sign} {number:g}" if number < 1e5 else f"{sign} {number:,}" for sign, number in self.bounds]
        return " or ".join(filter(None, [" and ".join(words), listed(self.choices)]))


class Key(NamedTuple):
    """One key in its source: default, kind, the comment lines above it, and the comment beside it."""

    default: object
    kind: Kind
    above: list
    comment: str


class Config(types.SimpleNamespace):
    """The keys as attributes. Besides: `given`, {key: origin} of the keys that the user set; `flags`, those of
    them that the command line set; `files`, the config files; `recipe`, {key: value} as these have it; `passed`,
    [(key, text)] of the flags for another script."""

    __slots__ = ("given", "flags", "files", "recipe", "passed")


def configure(script, argv, positional=(), passes=""):
    """The keys of `script` as a Config: defaults, then the config files of `argv`, then its flags.

    script: path of the script. argv: list of strings, without the script's name. positional: names of keys that bare
    words (not ending in .py) set in this order, as in `bench.py loss`. passes: another script, whose flags are taken as
    text, unchecked.
    Raises ValueError or FileNotFoundError with one line; `--help` prints every key and raises SystemExit(0).
    """
    own = read_defaults(script)
    known, home = dict(own), {}
    for name in SCRIPTS:
        sibling = ROOT / name
        if sibling.exists() and sibling.resolve() != Path(script).resolve():
            known = {**(others := read_defaults(sibling)), **known}  # the script's own keys win
            declared, _ = own_keys(sibling, read_text(sibling))
            home |= {key: name for key in others if key in declared or key not in home}
    files, flags, words = split_argv(argv, known)
    if "help" in [key for key, _, _ in flags]:
        print(help_text(script, own))
        raise SystemExit(0)
    given = [(key, value, place, False) for path in files for key, (value, place) in read_config(path).items()
             if key in known or not callable(value)]  # functions and classes of a recipe are no keys
    bare = [(key, word, f"argument {word!r:.60}") for key, word in zip(positional, words, strict=False)]
    cfg = Config(**{key: of.default for key, of in own.items()})
    cfg.given = {}
    cfg.flags = set()
    cfg.files = files
    cfg.recipe = {}
    cfg.passed = []
    others = read_defaults(ROOT / passes) if passes else {}
    for key, value, origin, typed in [*given, *((*flag, True) for flag in bare + flags)]:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            advice = f"did you mean {near[0]!r}?" if near else "see --help"
            raise ValueError(f"{origin:.120}: unknown key {key!r:.60}, {advice}")
        if typed and key in others and key not in own:
            cfg.passed.append((key, value))
            continue
        value = checked(key, value, known[key].kind, origin, parse=typed)
        if key in own:
            setattr(cfg, key, value)
            cfg.given[key] = origin
            if typed:
                cfg.flags.add(key)
            else:
                cfg.recipe[key] = value
        elif typed:
            raise ValueError(f"{origin}: {key} is a key of {home[key]} and has no effect here")
    if len(words) > len(positional):
        raise ValueError(f"{words[len(positional)]!r:.60} is neither a config file (*.py) nor a --key=value")
    return cfg


def refuse_idle(cfg, idle, say=print):
    """Refuse flags that have no effect, and warn of such keys in a config file. idle: {key: why it has no effect}.
    Raises ValueError with one line."""
    for key, origin in cfg.given.items():
        if key in idle:
            line = f"{origin}: {key} = {show(getattr(cfg, key))} has no effect: {idle[key]}"
            if key in cfg.flags:
                raise ValueError(line)
            say(f"warning: {line}")


def out_of_memory(error):
    """Whether an error of Python or torch, on any device, means that memory is used up."""
    message = str(error).lower()
    words = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "bad_alloc")
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and any(word in message for word in words)


def run(main, script, positional=(), passes=""):
    """main(cfg) for the command line, as `configure` reads it. ValueError, OSError and used-up memory end with one line
    on stderr and exit code 1; PARLANDO_DEBUG=1 shows the traceback. Streams escape characters that their encoding
    lacks."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main(configure(script, sys.argv[1:], positional, passes))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        plain = isinstance(error, ValueError | OSError) or out_of_memory(error)
        if not plain or os.environ.get("PARLANDO_DEBUG", "0") not in ("", "0"):
            raise
        print(f"error: {in_a_line(error)}", file=sys.stderr)
        sys.exit(1)


def in_a_line(error):
    """An error in words for the screen: one line of at most LONGEST_LINE characters."""
    text = str(error)
    if out_of_memory(error):
        text = f"out of memory: {text:.300}" if text else "out of memory"
    if isinstance(error, OSError) and error.strerror:  # the system's errors, without their number
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= LONGEST_LINE else f"{text[: LONGEST_LINE - 3]}..."


def key_nodes(tree):
    """Yields the assignments that are keys: lower-case names before the first function or class."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            return
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        name = targets[0].id if isinstance(targets[0], ast.Name) else ""
        if isinstance(node, ast.Assign | ast.AnnAssign) and name and name == name.lower() and name[0] != "_":
            yield name, node


def read_defaults(script):
    """{key: Key} of one script: its own keys in the order of its source, those that it shares with other scripts, and
    for train.py those of the families."""
    script = Path(script)
    own, shared = own_keys(script, read_text(script))
    keys = dict(own)
    for sibling, names in shared.items():
        path = script.with_name(sibling)
        theirs = family_keys(path, read_text(path)) if sibling == MODELS else own_keys(path, read_text(path))[0]
        keys |= {name: theirs[name] for name in names}
    models = script.with_name(MODELS)
    if script.name != TRAINING or not models.is_file():
        return keys
    return keys | {name: key for name, key in family_keys(models, read_text(models)).items() if name not in keys}


def read_text(path):
    return path.read_text(encoding="utf-8")


@cache  # several scripts ask for the keys of one source, and parsing takes most of the start-up time
def own_keys(script, source):
    """{key: Key} of the assignments at the top of a script, and {script: names} of the keys that it shares."""
    tree = ast.parse(source)
    return read_keys(script, source, list(key_nodes(tree))), shared_keys(tree)


@cache
def family_keys(models, source):
    """{key: Key} of the fields of the config classes in model.py that are keys."""
    keys = {}
    for family in [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]:
        nodes = [(node.target.id, node) for node in family.body if isinstance(node, ast.AnnAssign)]
        nodes = [(name, node) for name, node in nodes if is_field(node.value) and name not in keys]
        new = read_keys(models, source, nodes, family.lineno)
        for name in list(new)[:1]:
            new[name] = new[name]._replace(above=[f"{family.name} in {models.name}"])
        keys |= new
    return keys


def shared_keys(tree):
    """{script: names} of the keys that a script takes from others, by its assignment SHARED = {...}."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "SHARED":
            return ast.literal_eval(node.value)
    return {}


def read_keys(script, source, nodes, first_line=1):
    """{key: Key} of the assignments (name, node) in a source; comments before `first_line` belong to something else.
    Raises ValueError for a default that is no literal."""
    if not nodes:
        return {}
    keys, before, comments = {}, None, find_comments(source, first_line, nodes[-1][1].end_lineno)
    for name, node in nodes:
        first = before or node.lineno
        while not before and comments.get(first - 1, ("", False))[1]:
            first -= 1
        before = node.end_lineno + 1
        above = [comments[n][0] for n in range(first, node.lineno) if n in comments and comments[n][1]]
        beside = [comments[n][0] for n in range(node.lineno, before) if n in comments]
        value = node.value.args[0] if is_field(node.value) else node.value
        try:
            default = ast.literal_eval(value)
        except (ValueError, TypeError):
            raise ValueError(f"{script}:{node.lineno}: the default of {name!r} must be a literal") from None
        kind = Kind(() if default is None else (type(default),))
        if isinstance(node, ast.AnnAssign):
            kind = read_kind(node.annotation)
        keys[name] = Key(default, kind, above, " ".join(beside))
    return keys


def find_comments(source, first, last):
    """{line number: (comment, whether it stands alone on its line)} of these lines."""
    lines, comments = source.splitlines(keepends=True)[first - 1 : last], {}
    for token in tokenize.generate_tokens(io.StringIO("".join(lines)).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            comments[first - 1 + token.start[0]] = (token.string.lstrip("# "), alone)
    return comments


def is_field(node):
    """Whether a default marks a key of a config class: `fixed(32)` or `free(32)`."""
    return isinstance(node, ast.Call) and bool(node.args) and getattr(node.func, "id", "") in ("fixed", "free")


def read_kind(node):
    """The Kind of an annotation such as `str | None`, "0 < float <= 1", "list[int] >= 1", Literal["a"]."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        node = ast.parse(node.value, mode="eval").body
    terms, signs = [node], []
    if isinstance(node, ast.Compare):
        terms, signs = [node.left, *node.comparators], [SIGNS[type(sign)] for sign in node.ops]
    at = next(i for i, term in enumerate(terms) if not isinstance(term, ast.Constant | ast.UnaryOp))
    bounds = [(MIRRORED[signs[i]], ast.literal_eval(terms[i])) for i in range(at)]
    bounds += [(signs[i], ast.literal_eval(terms[i + 1])) for i in range(at, len(signs))]
    parts, of_value, items, choices = [terms[at]], [], (), ()
    while parts:
        part = parts.pop(0)
        if isinstance(part, ast.BinOp):  # a | b
            parts = [part.left, part.right, *parts]
        elif not isinstance(part, ast.Subscript):
            name = getattr(part, "id", "")
            of_value.append(type(None) if isinstance(part, ast.Constant) else TYPES.get(name, object))
        elif part.value.id == "Literal":
            of_value.append(str)
            choices = tuple(choice.value for choice in getattr(part.slice, "elts", [part.slice]))
        else:
            of_value.append(TYPES[part.value.id])
            items = (TYPES[part.slice.id],)
    return Kind(tuple(of_value), items, choices, tuple(bounds))


@cache
def kind_of(annotation):
    """The Kind of an annotation as Python holds it: a string, a type or a union."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return read_kind(ast.parse(text, mode="eval").body)


def check_value(name, value, annotation):
    """Check a value against an annotation, like the value of a key. Raises ValueError with one line."""
    kind = kind_of(annotation)
    if wrong := fault(converted(value, kind), kind):
        raise ValueError(f"{name} = {show(value)} {wrong}")


def check_recorded(script, values, where):
    """Check the keys {key: value} that a run recorded; keys that the script does not have are ignored. Raises
    ValueError with one line that begins with `where`."""
    for name, key in read_defaults(ROOT / script).items():
        if name in values and (wrong := fault(converted(values[name], key.kind), key.kind)):
            raise ValueError(f"{where}: {name} = {show(values[name])} {wrong}")


def check_fields(config):
    """Check the fields of a dataclass against their annotations, like keys. Types that no key has are not checked.
    Raises ValueError, one line that names the first wrong field."""
    for f in fields(config):
        check_value(f.name, getattr(config, f.name), f.type)


def split_argv(argv, known):
    """argv -> config files, flags [(key, text, origin)], bare words."""
    files, flags, words = [], [], []
    rest = list(argv)
    while rest:
        arg = rest.pop(0)
        if arg == "-h":
            arg = "--help"
        if not arg.startswith("--"):
            (files if arg.endswith(".py") else words).append(arg)
            continue
        key, equals, text = arg[2:].partition("=")
        if not equals and key in known and known[key].kind.types == (bool,):
            text = rest.pop(0) if rest and parse_bool(rest[0]) is not None else "True"
        elif not equals and key in known:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"--{key} needs a value: --{key}=value")
            text = rest.pop(0)
        flags.append((key, text, f"--{key}"))
    return files, flags, words


def read_config(path):
    """Execute one config file; return {name: (value, place)} of the plain names that it defines. A place is the file
    and the line of the last assignment to the name."""
    if not Path(path).is_file():
        why = "is not a file" if Path(path).exists() else "not found"
        raise FileNotFoundError(f"config file {path} {why}")
    scope = {"__file__": str(path), "__name__": "config"}
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"), path)
        exec(compile(tree, path, "exec"), scope)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # mistakes in a user's file, and its sys.exit(), get one line
        line = getattr(error, "lineno", None)
        trace = error.__traceback__
        while trace is not None:
            line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == str(path) else line
            trace = trace.tb_next
        message = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise ValueError(f"{path}:{line or 1}: {message:.200}") from error
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    lines = {node.id: node.lineno for node in sorted(names, key=lambda node: node.lineno)}
    return {
        name: (value, f"{path}:{lines[name]}" if name in lines else str(path)) for name, value in scope.items()
        if isinstance(name, str) and name[:1] != "_" and not isinstance(value, types.ModuleType)
    }  # fmt: skip


def parse_bool(text):
    return {"true": True, "1": True, "false": False, "0": False}.get(text.lower())


def checked(key, value, kind, origin, parse):
    """The value, converted to its kind. parse: it is text from the command line. Raises ValueError."""
    if parse and kind.types == (str,) and not kind.choices:
        return value  # --text="3.14" stays text
    literal = value
    if parse:
        try:
            literal = parse_bool(value) if kind.types == (bool,) else ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            literal = value
    literal = converted(literal, kind)
    if parse and kind.types and type(literal) not in kind.types:
        literal = value  # perhaps text is allowed
    if wrong := fault(literal, kind):
        raise ValueError(f"{origin:.120}: {key} = {show(literal)} {wrong}")
    return literal


def converted(value, kind):
    """A whole number as a float, a list as a tuple or a tuple as a list, where the kind asks for it."""
    if float in kind.types and type(value) is int and int not in kind.types:
        return float(value) if abs(value) < 10**300 else math.inf
    for wanted, twin in ((list, tuple), (tuple, list)):
        if wanted in kind.types and type(value) is twin and twin not in kind.types:
            return wanted(value)
    return value


def fault(value, kind):
    """What is wrong with a value, as the end of a sentence that begins with it; "" if nothing."""
    if kind.types and object not in kind.types and type(value) not in kind.types:
        return f"is not of type {' or '.join('None' if t is type(None) else t.__name__ for t in kind.types)}"
    if wrong := "" if object in kind.types else no_data(value):
        return wrong
    if type(value) is str and kind.choices and value not in kind.choices:
        return f"must be {kind}"
    several = isinstance(value, list | tuple)
    inside = value if several else [value]
    if several and kind.items and not all(type(converted(x, Kind(kind.items))) in kind.items for x in inside):
        return f"must hold {kind.items[0].__name__} only"
    numbers = [x for x in inside if type(x) in (int, float)]
    if not all(COMPARISONS[sign](x, bound) for x in numbers for sign, bound in kind.bounds):
        return f"must {'hold numbers' if several else 'be'} {kind}"
    return ""


def no_data(value, depth=0):
    """Why a value cannot be recorded as JSON, in the form of `fault`; "" if it can."""
    if type(value) is float:
        return "" if math.isfinite(value) else "must be finite"
    if type(value) is int:
        return "" if abs(value) <= LARGEST else "is too large a number"
    if value is None or type(value) in (bool, str):
        return ""
    if depth > 10:
        return "is nested too deeply"
    if type(value) not in (list, tuple, dict):
        return "may hold texts, numbers, True, False, None, lists and dicts only"
    if type(value) is dict and not all(type(key) is str for key in value):
        return "has a key that is no text"
    inside = value.values() if type(value) is dict else value
    return next(filter(None, (no_data(x, depth + 1) for x in inside)), "")


def show(value):
    """A value for a message: at most 60 characters."""
    try:
        text = repr(value)
    except Exception:  # numbers of too many digits, and whatever else a config file makes
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 60 else f"{text[:57]}..."


def listed(names):
    """Names as "a, b or c"."""
    return " or ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def help_text(script, own):
    """The script's docstring, then its keys with their defaults and comments, under their source's own headings."""
    source = Path(script).read_text(encoding="utf-8")
    lines = [(ast.get_docstring(ast.parse(source)) or "").strip(), ""]
    for name, key in own.items():
        lines += ["# " + heading for heading in key.above]
        may_be = f"({key.kind})" if str(key.kind) else ""
        lines.append(f"  --{name}={key.default!r}".ljust(44) + "  " + " ".join(filter(None, [key.comment, may_be])))
    return "\n".join(lines + ["", "Config files (*.py) come first, flags win over them."]).strip()
