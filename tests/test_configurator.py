import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import configurator

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
    monkeypatch.setattr(configurator, "__file__", str(tmp_path / "configurator.py"))
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


def test_sibling_keys_are_accepted_ignored_and_checked(house):
    recipe = write(house, "x.py", "vocab_size = 9\nseed = 3\ntext = 'hello'\n")
    cfg = configurator.configure(house / "train.py", [recipe, "--text", "hey"])
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


@pytest.mark.parametrize(
    "text, message",
    [
        ("times = '3'", "bad.py: times = '3' is not of type int"),
        ("words = 3", "bad.py: words = 3 is not of type str"),
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
    debug = run_cli(script, "--words=bad", PARLANDO_DEBUG="1")
    assert debug.returncode == 1 and "Traceback" in debug.stderr
    assert run_cli(script, "--words=stop").returncode == 130
    assert run_cli(script, "--wrods=x").stderr == "error: --wrods: unknown key 'wrods', did you mean 'words'?\n"
    assert run_cli(script, "--help").returncode == 0


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
