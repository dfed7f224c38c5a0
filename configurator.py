"""
Configurator: config files and --key=value flags become one checked namespace.

- The defaults are the plain commented assignments at the top of a script: `learning_rate = 3e-4  # peak`. They are read
  from its source, never by importing it, so that `--help` costs nothing and one recipe can serve several scripts.
- The type of a key is the type of its default, or its annotation: `backbone: str | dict = "llama-250M"`.
- A config file is python, executed; every plain name it leaves behind is a key. Flags win over files, later over
  earlier.
- A key of another of prepare.py, train.py and sample.py is accepted and ignored; a key of none of them is refused
  with the nearest right name, a wrong type with the name, the value, what was wanted and where it came from.
"""

import ast
import difflib
import io
import os
import sys
import tokenize
import types
from pathlib import Path

SCRIPTS = ("prepare.py", "train.py", "sample.py")  # a recipe may hold keys of any of these
TYPES = {"bool": bool, "int": int, "float": float, "str": str, "list": list, "tuple": tuple, "dict": dict}


def configure(script, argv, positional=()):
    """The keys of `script` as a SimpleNamespace: defaults, then the config files of `argv`, then its flags.

    script: path of the script whose defaults count. argv: list of strings, without the script's name.
    positional: names of keys that bare words (not ending in .py) fill in order, as in `bench.py loss`.
    Raises ValueError or FileNotFoundError with one line; `--help` prints every key and raises SystemExit(0).
    """
    own = read_defaults(script)
    known = dict(own)
    for name in SCRIPTS:
        sibling = Path(__file__).with_name(name)
        if sibling.exists() and sibling.resolve() != Path(script).resolve():
            known = {**read_defaults(sibling), **known}  # where two scripts share a key, its own type holds
    files, flags, words = split_argv(argv, known)
    if "help" in [key for key, _, _ in flags]:
        print(help_text(script, own))
        raise SystemExit(0)
    given = [(key, value, path) for path in files for key, value in read_config(path).items()]
    given += [(key, word, f"argument {word!r}") for key, word in zip(positional, words, strict=False)] + flags
    cfg = {key: default for key, (default, _, _) in own.items()}
    for key, value, origin in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            advice = f"did you mean {near[0]!r}?" if near else "see --help"
            raise ValueError(f"{origin}: unknown key {key!r}, {advice}")
        value = checked(key, value, known[key][1], origin, parse=origin not in files)
        if key in own:
            cfg[key] = value
    if len(words) > len(positional):
        raise ValueError(f"{words[len(positional)]!r} is neither a config file (*.py) nor a --key=value")
    return types.SimpleNamespace(**cfg)


def out_of_memory(error):
    """Does an error of Python or torch, on any device, say that the memory is used up?"""
    said = str(error).lower()
    words = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "bad_alloc")
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and any(word in said for word in words)


def run(main, script, positional=()):
    """main(cfg) for the command line: ValueError, OSError and a lack of memory end as one line on stderr and exit code
    1. What stdout and stderr cannot write in their encoding, they write as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main(configure(script, sys.argv[1:], positional))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        plain = isinstance(error, ValueError | OSError) or out_of_memory(error)
        if not plain or os.environ.get("PARLANDO_DEBUG", "0") not in ("", "0"):
            raise
        text = str(error)
        if out_of_memory(error):
            text = f"out of memory: {text:.300}" if text else "out of memory"
        if isinstance(error, OSError) and error.strerror:  # the system's own errors: without their number
            text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        print("error:", " ".join(text.split()) or type(error).__name__, file=sys.stderr)
        sys.exit(1)


def key_nodes(tree):
    """The assignments that are keys: lower-case names between the imports and the first function or class."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            return
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        name = targets[0].id if isinstance(targets[0], ast.Name) else ""
        if isinstance(node, ast.Assign | ast.AnnAssign) and name and name == name.lower() and name[0] != "_":
            yield name, node


def read_defaults(script):
    """{key: (default, allowed types, source node)} of one script, in the order of its source."""
    keys = {}
    for name, node in key_nodes(ast.parse(Path(script).read_text(encoding="utf-8"))):
        try:
            default = ast.literal_eval(node.value)
        except (ValueError, TypeError):
            raise ValueError(f"{script}:{node.lineno}: the default of {name!r} must be a literal") from None
        keys[name] = (default, allowed_types(node, default), node)
    return keys


def allowed_types(node, default):
    """The types an annotation such as `str | list[int] | None` names, else the default's; () allows anything."""
    if not isinstance(node, ast.AnnAssign):
        return () if default is None else (type(default),)
    parts = [part.strip().split("[")[0] for part in ast.unparse(node.annotation).split("|")]
    return tuple(type(None) if part == "None" else TYPES[part] for part in parts)


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
        if not equals and key in known and known[key][1] == (bool,):
            text = rest.pop(0) if rest and parse_bool(rest[0]) is not None else "True"
        elif not equals and key in known:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"--{key} needs a value: --{key}=value")
            text = rest.pop(0)
        flags.append((key, text, f"--{key}"))
    return files, flags, words


def read_config(path):
    """Execute one config file; return the plain names it leaves behind."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"config file {path} not found")
    scope = {"__file__": str(path), "__name__": "config"}
    try:
        exec(compile(Path(path).read_text(encoding="utf-8"), path, "exec"), scope)
    except Exception as error:  # a config file is the user's: its mistakes get one line, as any other bad input
        line, trace = getattr(error, "lineno", None), error.__traceback__
        while trace is not None:
            line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == str(path) else line
            trace = trace.tb_next
        raise ValueError(f"{path}:{line or 1}: {type(error).__name__}: {error}") from error
    return {k: v for k, v in scope.items() if k[0] != "_" and not (callable(v) or isinstance(v, types.ModuleType))}


def parse_bool(text):
    return {"true": True, "1": True, "false": False, "0": False}.get(text.lower())


def checked(key, value, allowed, origin, parse):
    """`value` as one of the `allowed` types; with `parse` it is text from the command line."""
    if parse and allowed == (str,):
        return value  # --text="3.14" stays text
    literal = value
    if parse:
        try:
            literal = parse_bool(value) if allowed == (bool,) else ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            literal = value
    if not allowed or type(literal) in allowed:
        return literal
    if float in allowed and type(literal) is int:
        return float(literal)
    for kind, twin in ((list, tuple), (tuple, list)):
        if kind in allowed and type(literal) is twin:
            return kind(literal)
    if parse and str in allowed:
        return value
    wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in allowed)
    raise ValueError(f"{origin}: {key} = {value!r} is not of type {wanted}")


def help_text(script, own):
    """The script's docstring, then its keys with their defaults and comments, under their source's own headings."""
    source = Path(script).read_text(encoding="utf-8")
    comments = {}  # line number -> comment, and whether it has the line to itself
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = (token.string.lstrip("# "), not token.line[: token.start[1]].strip())
    lines = [(ast.get_docstring(ast.parse(source)) or "").strip(), ""]
    before = min((node.lineno for _, _, node in own.values()), default=0) - 1
    while comments.get(before, ("", False))[1]:
        before -= 1
    for key, (default, _, node) in own.items():
        lines += ["# " + comments[n][0] for n in range(before + 1, node.lineno) if n in comments and comments[n][1]]
        trailing = [comments[n][0] for n in range(node.lineno, node.end_lineno + 1) if n in comments]
        lines.append(f"  --{key}={default!r}".ljust(44) + "  " + " ".join(trailing))
        before = node.end_lineno
    return "\n".join(lines + ["", "Config files (*.py) come first, flags win over them."]).strip()
