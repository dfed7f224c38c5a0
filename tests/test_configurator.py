import dataclasses
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import model
from parts import configurator

SCRIPT = '''"""Says hello.

Usage: hello.py [config.py] [--key=value]"""
import os

# what is said
words = "hi"  # the words
times = 3  # how often
rate = 0.5  # speed
loud = False  # shout
# where it goes
steps = [1, 2]  # list
shape = (4, 5)  # tuple
backbone: str | dict = "small"  # name or table
cap: int | None = None  # no limit
table = {
    "a": 1,
}  # a dict over lines
_hidden = 1
UPPER = 2


def main(cfg):
    later = 3
    if cfg.words == "bug":
        raise KeyError("a bug")
    if cfg.words == "bad":
        raise ValueError("two\\nlines")
    if cfg.words == "open":
        open("/nowhere/file")
    if cfg.words == "stop":
        raise KeyboardInterrupt
    print(cfg)


late = 5
if __name__ == "__main__":
    import configurator

    configurator.run(main, __file__)
'''


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "hello.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A made-up trio of scripts beside a made-up configurator, so that real defaults may change freely."""
    (tmp_path / "prepare.py").write_text("vocab_size = 500  # words\nseed = 1\n")
    (tmp_path / "train.py").write_text("learning_rate = 1e-3  # peak\nseed = 7\nmax_iters = 10\n")
    (tmp_path / "sample.py").write_text('text = ""\n')
    monkeypatch.setattr(configurator, "ROOT", tmp_path)
    return tmp_path


def write(folder, name, text):
    (folder / name).write_text(text)
    return str(folder / name)


def test_defaults_are_read_without_import(script):
    cfg = configurator.configure(script, [])
    assert vars(cfg) == {
        "words": "hi", "times": 3, "rate": 0.5, "loud": False, "steps": [1, 2], "shape": (4, 5),
        "backbone": "small", "cap": None, "table": {"a": 1},
    }  # fmt: skip


@pytest.mark.parametrize(
    "argv, key, value",
    [
        (["--words=a=b"], "words", "a=b"),
        (["--words", "3.14"], "words", "3.14"),
        (["--words="], "words", ""),
        (["--times=-2"], "times", -2),
        (["--times", "-2"], "times", -2),
        (["--rate=2"], "rate", 2.0),
        (["--loud"], "loud", True),
        (["--loud", "false"], "loud", False),
        (["--loud=True"], "loud", True),
        (["--steps=7,8"], "steps", [7, 8]),
        (["--steps=(7, 8)"], "steps", [7, 8]),
        (["--shape=[7]"], "shape", (7,)),
        (["--backbone={'layers': 2}"], "backbone", {"layers": 2}),
        (["--backbone=large"], "backbone", "large"),
        (["--backbone=12"], "backbone", "12"),
        (["--cap=4"], "cap", 4),
        (["--cap", "None"], "cap", None),
        (["--times=1", "--times=2"], "times", 2),
    ],
)
def test_flags(script, argv, key, value):
    got = getattr(configurator.configure(script, argv), key)
    assert got == value and type(got) is type(value)


def test_files_in_order_then_flags(script, tmp_path):
    one = write(tmp_path, "one.py", "import math\nfrom math import sqrt\n_n = 4\ntimes = int(sqrt(_n))\nrate = 1\n")
    two = write(tmp_path, "two.py", "rate = 2\nshape = [1]\ndef f(): pass\n")
    cfg = configurator.configure(script, ["--words=x", one, two])
    assert (cfg.words, cfg.times, cfg.rate, cfg.shape) == ("x", 2, 2.0, (1,)) and type(cfg.rate) is float
    assert configurator.configure(script, ["--rate=9", two]).rate == 9.0


def test_sibling_keys_are_checked_in_a_recipe_and_refused_as_flags(house):
    recipe = write(house, "x.py", "vocab_size = 9\nseed = 3\ntext = 'hello'\n")
    cfg = configurator.configure(house / "train.py", [recipe])
    with pytest.raises(ValueError, match="--text: text is a key of sample.py and has no effect here"):
        configurator.configure(house / "train.py", [recipe, "--text", "hey"])
    assert vars(cfg) == {"learning_rate": 1e-3, "seed": 3, "max_iters": 10}
    assert vars(configurator.configure(house / "prepare.py", [recipe])) == {"vocab_size": 9, "seed": 3}
    with pytest.raises(ValueError, match=r"--vocab_size: vocab_size = 'many' is not of type int"):
        configurator.configure(house / "train.py", ["--vocab_size=many"])


def test_unknown_key_gets_the_nearest_name(house):
    with pytest.raises(ValueError, match="--learning_rat: unknown key 'learning_rat', did you mean 'learning_rate'"):
        configurator.configure(house / "train.py", ["--learning_rat=1"])
    with pytest.raises(ValueError, match="did you mean 'vocab_size'"):
        configurator.configure(house / "train.py", [write(house, "x.py", "vocabsize = 3")])
    with pytest.raises(ValueError, match="unknown key 'zzz', see --help"):
        configurator.configure(house / "train.py", ["--zzz"])
    with pytest.raises(ValueError, match="did you mean 'max_iters'"):
        configurator.configure(house / "train.py", ["--max-iters", "3"])


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--times=1.5"], "--times: times = '1.5' is not of type int"),
        (["--times=True"], "not of type int"),
        (["--rate=fast"], "--rate: rate = 'fast' is not of type float"),
        (["--rate=False"], "not of type float"),
        (["--loud=maybe"], "not of type bool"),
        (["--steps=4"], "not of type list"),
        (["--cap=many"], "cap = 'many' is not of type int or None"),
        (["--words"], "--words needs a value"),
        (["--words", "--loud"], "--words needs a value"),
        (["stray"], "'stray' is neither a config file"),
        (["missing.py"], "config file missing.py not found"),
    ],
)
def test_refusals(script, argv, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        configurator.configure(script, argv)


RANGES = '''
from typing import Literal

share: "0 < float <= 1" = 0.5  # of the whole
cap: "int | None >= 1" = None
kind: Literal["one", "two"] = "one"
ends: "0 < list[float] <= 9" = [1.0, 2.0]
names: "list[str] | None" = None
sizes: str | dict = "small"
free = 1.0
'''


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--share=0"], "--share: share = 0.0 must be > 0 and <= 1"),
        (["--share=nan"], "--share: share = 'nan' is not of type float"),
        (["--share=1e999"], "--share: share = inf must be finite"),
        (["--share=1" + "0" * 400], "share = inf must be finite"),
        (["--cap=0"], "--cap: cap = 0 must be >= 1"),
        (["--cap=9007199254740993"], "cap = 9007199254740993 is too large a number"),
        (["--cap=" + "9" * 5000], "cap = '999"),
        (["--kind=three"], "--kind: kind = 'three' must be one or two"),
        (["--kind=1"], "--kind: kind = '1' must be one or two"),
        (["--ends=[1, 10]"], r"ends = \[1, 10\] must hold numbers > 0 and <= 9"),
        (["--ends=[1, '2']"], r"ends = \[1, '2'\] must hold float only"),
        (["--ends=[1, True]"], "must hold float only"),
        (["--names=[3]"], r"names = \[3\] must hold str only"),
        (["--sizes={'n': 1e999}"], "sizes = {'n': inf} must be finite"),
        (["--sizes={'n': [99999999999999999999]}"], "is too large a number"),
        (["--sizes={3: 4}"], "sizes = {3: 4} has a key that is no text"),
        (["--free=-1e999"], "free = -inf must be finite"),
    ],
)
def test_ranges(tmp_path, argv, message):
    path = write(tmp_path, "ranges.py", RANGES)
    with pytest.raises(ValueError, match=message) as error:
        configurator.configure(path, argv)
    assert len(str(error.value)) < 150


def test_what_is_in_range(tmp_path, capsys):
    path = write(tmp_path, "ranges.py", RANGES)
    argv = ["--share=1", "--cap=None", "--kind", "two", "--ends=1,9", "--names=['a']", "--sizes={'n': [3, None]}"]
    assert vars(configurator.configure(path, argv)) == {
        "share": 1.0, "cap": None, "kind": "two", "ends": [1, 9], "names": ["a"], "sizes": {"n": [3, None]}, "free": 1.0
    }  # fmt: skip
    with pytest.raises(SystemExit):
        configurator.configure(path, ["--help"])
    out = capsys.readouterr().out
    assert "of the whole (> 0 and <= 1)" in out and "(one or two)" in out


@pytest.mark.parametrize(
    "text, message",
    [
        ("names = [len]", "names = .*may hold texts, numbers"),
        ("sizes = {'a': object()}", "may hold texts, numbers"),
        ("ends = []\nends.append(ends)", "nested too deeply"),
        ("sizes = {}\nsizes['a'] = sizes", "nested too deeply"),
        ("cap = 10**5000", "cap = <int> is too large a number"),
        ("share = float('nan')", "share = nan must be finite"),
    ],
)
def test_values_that_json_cannot_hold(tmp_path, text, message):
    path = write(tmp_path, "ranges.py", RANGES.replace('"list[str] | None"', '"list | None"'))
    with pytest.raises(ValueError, match=message):
        configurator.configure(path, [write(tmp_path, "bad.py", text)])


def test_it_knows_what_was_given(house):
    recipe = write(house, "x.py", "vocab_size = 9\nseed = 3\nlearning_rate = 1\n")
    cfg = configurator.configure(house / "train.py", [recipe, "--seed=4"])
    assert cfg.given == {"seed": "--seed", "learning_rate": f"{recipe}:3"} and cfg.flags == {"seed"}
    assert cfg.seed == 4 and cfg.recipe == {"seed": 3, "learning_rate": 1.0}
    assert "given" not in vars(cfg)
    said = []
    configurator.refuse_idle(cfg, {"learning_rate": "it is so", "max_iters": "it is so"}, said.append)
    assert said == [f"warning: {recipe}:3: learning_rate = 1.0 has no effect: it is so"]
    with pytest.raises(ValueError, match="--seed: seed = 4 has no effect: it is so"):
        configurator.refuse_idle(cfg, {"seed": "it is so"})


FAMILY = '''
@dataclass
class SmallConfig:
    size: "1 <= int <= 9"
    width: "1 <= int <= 9" = fixed(3)  # of it
    # what may change
    share: "0 <= float < 1" = free(0.5, "ar")  # another


@dataclass
class OtherConfig:
    share: "0 <= float < 1" = free(0.5)  # the same
'''


def test_fields_of_a_family_are_keys_of_train(house, capsys):
    write(house, "model.py", FAMILY)
    cfg = configurator.configure(house / "train.py", ["--width=4"])
    assert (cfg.width, cfg.share) == (4, 0.5) and not hasattr(cfg, "size")
    with pytest.raises(ValueError, match="--width: width = 10 must be >= 1 and <= 9"):
        configurator.configure(house / "train.py", ["--width=10"])
    assert not hasattr(configurator.configure(house / "sample.py", [write(house, "x.py", "width = 4")]), "width")
    with pytest.raises(SystemExit):
        configurator.configure(house / "train.py", ["--help"])
    out = capsys.readouterr().out
    assert "# SmallConfig in model.py\n  --width=3" in out and out.count("--share") == 1


def test_families_agree_on_shared_keys():
    fields = {}
    for _, config in model.ARCHS.values():
        for f in dataclasses.fields(config):
            if "key" in f.metadata:
                fields.setdefault(f.name, set()).add((str(f.type), f.default, f.metadata["key"]))
    assert len(fields) > 20 and all(len(variants) == 1 for variants in fields.values())


@pytest.mark.parametrize(
    "text, message",
    [
        ("import sys\nsys.exit(0)", "bad.py:2: SystemExit: 0"),
        ("import sys\n\nsys.exit()", "bad.py:3: SystemExit$"),
        ("def f():\n    f()\nf()", "bad.py:2: RecursionError: maximum recursion"),
        ("raise GeneratorExit", "bad.py:1: GeneratorExit$"),
        ("raise ValueError('x' * 9999)", "bad.py:1: ValueError: x+$"),
        ("globals()[''] = 1\nglobals()[3] = 1", "unknown key ''"),
        ("times = 1\x00", "bad.py:1: "),
    ],
)
def test_recipes_that_end_otherwise(script, tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as error:
        configurator.configure(script, [write(tmp_path, "bad.py", text)])
    assert len(str(error.value)) < 400


def test_recipes_that_are_no_text(script, tmp_path):
    (tmp_path / "bad.py").write_bytes(b"times = 1  # caf\xe9\n")
    with pytest.raises(ValueError, match="bad.py:1: UnicodeDecodeError: 'utf-8' codec"):
        configurator.configure(script, [str(tmp_path / "bad.py")])
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(FileNotFoundError, match="folder.py is not a file"):
        configurator.configure(script, [str(tmp_path / "folder.py")])
    with pytest.raises(KeyboardInterrupt):
        configurator.configure(script, [write(tmp_path, "bad.py", "raise KeyboardInterrupt")])


@pytest.mark.parametrize(
    "text, message",
    [
        ("rate = 2.0\n\ntimes = '3'", "bad.py:3: times = '3' is not of type int"),
        ("if True:\n    words = 3", "bad.py:2: words = 3 is not of type str"),
        ("globals()['times'] = 1.5", "bad.py: times = 1.5 is not of type int"),
        ("times = 1\nrate = (", "bad.py:2: SyntaxError"),
        ("times = 1\n\nrate = 1 / 0", "bad.py:3: ZeroDivisionError"),
        ("def f():\n    return 1 / 0\nrate = f()", "bad.py:2: ZeroDivisionError"),
    ],
)
def test_bad_config_files(script, tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        configurator.configure(script, [write(tmp_path, "bad.py", text)])


def test_default_that_is_no_literal(tmp_path):
    path = write(tmp_path, "s.py", "import os\nhome = os.getcwd()\n")
    with pytest.raises(ValueError, match=r"s.py:2: the default of 'home' must be a literal"):
        configurator.configure(path, [])


def test_positional_words(script):
    cfg = configurator.configure(script, ["hey", "5", "--loud"], positional=("words", "times"))
    assert (cfg.words, cfg.times, cfg.loud) == ("hey", 5, True)


def test_help(script, capsys):
    with pytest.raises(SystemExit) as stop:
        configurator.configure(script, ["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert out.startswith("Says hello.") and "_hidden" not in out and "late" not in out
    for want in ("--words='hi'", "the words", "--table={'a': 1}", "a dict over lines", "# where it goes"):
        assert want in out
    assert out.index("# what is said") < out.index("--words") < out.index("# where it goes") < out.index("--steps")


def run_cli(script, *argv, **env):
    env = {**os.environ, "PYTHONPATH": str(Path(configurator.__file__).parent), **env}
    return subprocess.run([sys.executable, str(script), *argv], capture_output=True, text=True, env=env)


def test_run(script):
    good = run_cli(script, "--words=hello")
    assert good.returncode == 0 and "words='hello'" in good.stdout
    bad = run_cli(script, "--words=bad")
    assert (bad.returncode, bad.stderr) == (1, "error: two lines\n")
    system = run_cli(script, "--words=open")
    assert (system.returncode, system.stderr) == (1, "error: No such file or directory: /nowhere/file\n")
    bug = run_cli(script, "--words=bug")
    assert bug.returncode == 1 and "Traceback" in bug.stderr
    long = run_cli(script, "--" + 9999 * "x" + "=1")
    assert long.returncode == 1 and len(long.stderr) <= 408 and long.stderr.count("\n") == 1
    debug = run_cli(script, "--words=bad", PARLANDO_DEBUG="1")
    assert debug.returncode == 1 and "Traceback" in debug.stderr
    assert run_cli(script, "--words=stop").returncode == 130
    assert run_cli(script, "--wrods=x").stderr == "error: --wrods: unknown key 'wrods', did you mean 'words'?\n"
    assert run_cli(script, "--help").returncode == 0


def test_no_key_is_named_as_what_the_namespace_knows():
    scripts = Path(configurator.__file__).parent.glob("*.py")
    assert not {key for path in scripts for key in configurator.read_defaults(path)} & {*configurator.Config.__slots__}


def test_streams_write_what_their_encoding_lacks_as_escapes(monkeypatch):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for encoding in ("cp1252", "ascii")]
    monkeypatch.setattr(sys, "argv", ["x"])
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])

    def main(cfg):
        print("\u1230\u120b\u121d \udcff")
        raise ValueError("\u1230")

    with pytest.raises(SystemExit):
        configurator.run(main, __file__)
    for stream, expected in zip(streams, (rb"\u1230\u120b\u121d \udcff", rb"error: \u1230"), strict=True):
        stream.flush()
        assert stream.buffer.getvalue().strip() == expected


@pytest.mark.parametrize("error, line", [
    (MemoryError(), "error: out of memory\n"),
    (RuntimeError("[at x.cpp]\ncan't allocate memory"), "error: out of memory: [at x.cpp] can't allocate memory\n"),
])  # fmt: skip
def test_a_lack_of_memory_is_one_line(monkeypatch, capsys, error, line):
    monkeypatch.setattr(sys, "argv", ["x"])

    def main(cfg):
        raise error

    with pytest.raises(SystemExit) as left:
        configurator.run(main, __file__)
    assert left.value.code == 1 and capsys.readouterr().err == line
    error = RuntimeError("a fault of the program")
    with pytest.raises(RuntimeError):
        configurator.run(main, __file__)
