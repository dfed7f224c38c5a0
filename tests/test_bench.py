"""bench.py: the protocol of its peers, equality before speed, the rows and their report, at sizes that take a moment.
No time is asserted."""

import json
import math
import os
import sys

import pytest
import torch
from helpers import ROOT, noise, run, write_tokens
from scipy import stats

import bench
from parts import configurator

STACK = dict(n_layer=1, n_head=2, n_kv_head=1, d_model=32, d_ff=48, rope_scaling=bench.LLAMA3_ROPE)
TINY = dict(arch="csm", stop="zeros", lora=None, text_vocab_size=50, n_codebooks=4, codebook_size=16, backbone=STACK,
            decoder={**STACK, "d_model": 16})  # fmt: skip
HEADS = dict(K=3, V=19, D=8, N=40, shared=False)

PEER = '''"""A peer that knows nothing but bench.py's docstring: the loss in numpy."""
import json, os, sys
import numpy as np

job, kind = json.load(sys.stdin), sys.argv[1]
with open(sys.argv[2], "a") as log:
    log.write(json.dumps({**job, "pid": os.getpid()}) + "\\n")
if kind == "fails":
    sys.exit("it cannot do this")
if kind == "mute":
    sys.exit(print("Done."))
K, V, D, N = (job[key] for key in "KVDN")
rng = np.random.default_rng(0)
hidden = rng.standard_normal((N, K, D), np.float32)
weight = rng.standard_normal((K, V, D), np.float32) * np.float32(D**-0.5)
target = rng.integers(V, size=(N, K))
logits = np.einsum("nkd,kvd->nkv", hidden, weight).astype(float)
logits -= np.log(np.exp(logits).sum(2, keepdims=True))
dlogits = (np.exp(logits) - np.eye(V)[target]) / N
loss = -np.take_along_axis(logits, target[..., None], 2).sum() / N + (kind == "wrong")
flat = [np.einsum(f, dlogits, x).ravel() for f, x in (("nkv,kvd->nkd", weight), ("nkv,nkd->kvd", hidden))]
spread = [x[:: max(1, len(x) // 1000)].tolist() for x in flat]
answer = {"way": "numpy", "versions": {"numpy": np.__version__}, "seconds": [0.5] * job["repeats"], "peak": None,
          "numbers": {"loss": [float(loss)], "hidden": spread[0], "weight": spread[1]}}
if kind == "silent":
    del answer["numbers"]
print("a line that is not the answer")
print(json.dumps(answer))
'''


@pytest.fixture
def here(monkeypatch):
    """Do our own jobs in this process, not each in a fresh one."""
    ask = bench.ask
    monkeypatch.setattr(bench, "ask", lambda command, job:
                        bench.JOBS[job["benchmark"]](job) if command == bench.WORK else ask(command, job))  # fmt: skip
    bench.tell.cache_clear()


@pytest.fixture
def measure(tmp_path):
    """Run a benchmark with flags: the rows that it adds."""
    def rows(*argv):
        path = tmp_path / "rows.jsonl"
        path.unlink(missing_ok=True)
        bench.main(configurator.configure(bench.__file__, [*argv, f"--results={path}"], ["name"]))
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    return rows


# ---------------------------------------------------------------------------------------------------------------------
# peers


@pytest.fixture
def peer(tmp_path, monkeypatch):
    """kind -> (--peer=..., the jobs that the peer got so far)."""
    monkeypatch.setattr(bench, "LOSS_SIZES", {"tiny": HEADS})
    (tmp_path / "peer.py").write_text(PEER)
    log = tmp_path / "log"

    def make(kind):
        return f"--peer={sys.executable} {tmp_path / 'peer.py'} {kind} {log}", lambda: [
            json.loads(line) for line in log.read_text().splitlines()]  # fmt: skip

    return make


def test_a_peer_is_compared_and_timed_in_processes_of_its_own(here, measure, peer):
    flag, jobs = peer("right")
    rows = measure("loss", "--ways=ours", "--dtypes=float32", "--repeats=2", flag)
    numbers, times = jobs()
    assert (numbers["repeats"], times["repeats"]) == (0, 2) and len({numbers["pid"], times["pid"], os.getpid()}) == 3
    assert {key: times[key] for key in HEADS} == HEADS and times["dtype"] == "float32" and times["threads"] == 1
    values = {row["values"]["way"]: row["values"] for row in rows}
    assert set(values) == {"ours", "floor", "numpy"}
    assert values["numpy"]["seconds"] == 0.5 and values["numpy"]["extra MB"] == "not known"
    assert values["numpy"]["of floor"] == 0.5 / values["floor"]["seconds"]
    assert [word for word in values["numpy"]["differs by"].split() if word.isalpha()] == ["loss", "hidden", "weight"]
    row = next(row for row in rows if row["values"]["way"] == "numpy")
    assert row["benchmark"] == "loss" and {"torch", "numpy"} == set(row["versions"])
    assert set(row["machine"]) == {"cpu", "cores", "instructions"} and row["command"].startswith("python bench.py loss")


def test_equality_comes_before_speed(here, measure, peer):
    flag, jobs = peer("wrong")
    rows = measure("loss", "--ways=ours", "--dtypes=float32", flag)
    assert [job["repeats"] for job in jobs()] == [0]  # it was never timed
    (values,) = [row["values"] for row in rows if row["values"]["way"] == "numpy"]
    assert set(values) == {"case", "way", "not timed, its numbers differ by"}


@pytest.mark.parametrize("kind, line", [
    ("fails", "tiny, float32 without peer: exit code 1: it cannot do this"),
    ("mute", "tiny, float32 without peer: it printed no JSON object, but 'Done.'"),
])  # fmt: skip
def test_a_peer_that_fails_is_one_line(here, measure, peer, capsys, kind, line):
    flag, _ = peer(kind)
    rows = measure("loss", "--ways=ours", "--dtypes=float32", "--repeats=1", flag)
    assert {row["values"]["way"] for row in rows} == {"ours", "floor"}
    assert [out for out in capsys.readouterr().out.splitlines() if "without" in out] == [line]


def test_a_peer_without_numbers_is_not_compared(here, measure, peer):
    rows = measure("loss", "--ways=ours", "--dtypes=float32", "--repeats=1", peer("silent")[0])
    assert [row["values"]["differs by"] for row in rows if row["values"]["way"] == "numpy"] == ["not compared"]


def test_a_command_that_does_not_exist():
    with pytest.raises(ValueError, match="/no/such/program: No such file"):
        bench.ask(["/no/such/program"], {"threads": 1, "repeats": 0})


def test_our_own_ways_answer_as_peers_do():
    job = bench.new_job("loss", "tiny", "float32", 1, **HEADS, way="ours")
    answer = bench.ask(bench.WORK, job)
    assert len(answer["seconds"]) == 1 and set(answer["numbers"]) == {"loss", "hidden", "weight"}
    with pytest.raises(ValueError, match="exit code 1: its kernels need a GPU"):
        bench.ask(bench.WORK, {**job, "way": "liger"})


def test_what_is_not_installed_is_one_line(measure, monkeypatch, capsys):
    def absent(command, job):
        raise ValueError("exit code 1: ModuleNotFoundError: No module named 'x'")

    bench.tell.cache_clear()
    monkeypatch.setattr(bench, "ask", absent)
    assert measure("loss", "--ways=eager", "--sizes=csm-512,valle") == []
    lines = [f"without {way}: exit code 1: ModuleNotFoundError: No module named 'x'" for way in ("eager", "floor")]
    assert sorted(capsys.readouterr().out.splitlines()) == lines


def test_the_order_of_the_ways_is_drawn(here, measure, monkeypatch):
    monkeypatch.setattr(bench, "LOSS_SIZES", {"tiny": HEADS})
    monkeypatch.setattr(bench.random, "sample", lambda ways, n: sorted(ways))
    rows = measure("loss", "--ways=ours,eager", "--dtypes=float32", "--repeats=1")
    assert [row["values"]["way"] for row in rows] == ["eager", "floor", "ours"]


@pytest.mark.parametrize("wrong", [{"a": [1.0, 2.0, 3.001]}, {"a": [1.0, 2.0]}, {"a": [1.0, 2.0, float("nan")]}, {}])
def test_numbers_that_differ(wrong):
    right = {"a": [1.0, 2.0, 3.0]}
    assert bench.differences(right, right, "float32") == {"a": (0.0, False)}
    assert bench.differences(wrong, right, "float32")["a"][1]


# ---------------------------------------------------------------------------------------------------------------------
# rows and their report


def row(**more):
    values = {"case": "a", "way": "ours", "seconds": 1.234567, **more.pop("values", {})}
    machine = {"cpu": "Slow", "cores": 2, "instructions": "AVX2"}
    return {"benchmark": "loss", "date": "2026-01-02", "machine": machine, "commit": "abc", "versions": {"torch": "2"},
            "command": "python bench.py loss", "values": values, "note": "", **more}  # fmt: skip


@pytest.fixture
def report(tmp_path, capsys):
    def text(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        bench.main(configurator.configure(bench.__file__, ["report", f"--results={path}"], ["name"]))
        return capsys.readouterr().out

    return text


def test_the_report(report):
    last = row(values={"way": "c", "differs by": "x"}, note="N.")
    text = report(row(), row(values={"way": "b", "seconds": 4321}), last)
    assert text == """# Benchmarks

`python bench.py report > BENCHMARKS.md` prints this page from `benchmarks.jsonl`.
Nothing is measured on a GPU yet.

## loss, 2026-01-02, Slow, 2 cores, AVX2

    python bench.py loss

Measured with commit abc, torch 2.

| case | way | seconds |
| --- | --- | --- |
| a | ours | 1.23 |
| a | b | 4,321 |

| case | way | seconds | differs by |
| --- | --- | --- | --- |
| a | c | 1.23 | x |

N.
"""


def test_machines_and_days_have_tables_of_their_own_and_a_later_row_counts(report):
    gpu = {**row()["machine"], "gpu": "Fast"}
    text = report(row(), row(date="2026-01-03"), row(machine=gpu), row(values={"seconds": 9.0}))
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["## loss, 2026-01-02, Slow, 2 cores, AVX2", "## loss, 2026-01-03, Slow, 2 cores, AVX2",
                        "## loss, 2026-01-02, Fast, 2 cores, AVX2"]  # fmt: skip
    assert "on a GPU" not in text and text.count("| a | ours | 9 |") == 1 and text.count("| a | ours |") == 3


def test_a_file_that_holds_no_rows(report):
    with pytest.raises(ValueError, match="line 2, is not a row of results"):
        report(row(), {"values": {}})


def test_the_page_is_the_report_and_has_no_empty_cell(report):
    rows = [json.loads(line) for line in (ROOT / "benchmarks.jsonl").read_text(encoding="utf-8").splitlines()]
    text = report(*rows)
    assert (ROOT / "BENCHMARKS.md").read_text(encoding="utf-8") == text
    assert not [line for line in text.splitlines() if line.startswith("|") and "|  |" in line]


# ---------------------------------------------------------------------------------------------------------------------
# what can be chosen


@pytest.mark.parametrize("argv, message", [
    (["loss", "--sizes=huge"], "sizes = 'huge': choose from csm-512"),
    (["loss", "--dtypes=int8"], "dtypes = 'int8': choose from float32"),
    (["loss", "--ways=ours,theirs"], "ways = 'theirs': choose from ours, eager"),
    (["train", "--sizes=huge"], "sizes = 'huge': choose from small, marvis"),
    (["train", "--ways=ours,eager"], "ways = 'eager': choose from ours, ours sparse, ours in backward"),
    (["train", "--fractions=1/3"], "fractions = '1/3': choose from 1/16, 1"),
    (["codec", "--sizes=dac"], "sizes = 'dac': choose from mel, mimi, .*, xtts"),
    (["speak", "--sizes=huge"], "sizes = 'huge': choose from csm, kani, xtts, valle, valle nar"),
    (["speak", "--ways=ours"], "ways = 'ours': choose from ours plain, ours packed"),
    (["families"], "data, sample, judge, codec, loss, train, memory, speak, gpu, report, .*not 'families'"),
])  # fmt: skip
def test_what_is_chosen_has_to_exist(measure, argv, message):
    with pytest.raises(ValueError, match=message):
        measure(*argv)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_is_needed(measure):
    with pytest.raises(ValueError, match="needs a GPU"):
        measure("gpu")


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="10000.0 GB"):
        bench.check_room(1e13, "cpu")


# ---------------------------------------------------------------------------------------------------------------------
# loss and step


@pytest.mark.parametrize("shared", [False, True])
def test_all_losses_are_one_number(shared):
    job = bench.new_job("loss", "tiny", "float32", 0, **{**HEADS, "shared": shared})
    right = bench.loss_job({**job, "way": "reference"})["numbers"]
    for way in ("ours", "eager", "torch chunked"):
        off = bench.differences(bench.loss_job({**job, "way": way})["numbers"], right, "float32")
        assert not any(far for _, far in off.values()), (way, off)


@pytest.mark.slow
def test_memory_is_that_of_the_logits():
    """In a fresh process: eager holds them about three times, less the gradients, which come later; ours does not."""
    job = bench.new_job("loss", "some", "float32", 1, K=8, V=2051, D=32, N=1024, shared=False)
    logits = 4 * 8 * 2051 * 1024
    eager, ours = (bench.ask(bench.WORK, {**job, "way": way})["peak"] for way in ("eager", "ours"))
    if eager is None:
        pytest.skip("this system does not tell a process's peak")
    assert 1.5 * logits < eager < 4 * logits
    assert ours < logits / 8


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_ours_equals_transformers(fraction):
    """At a fraction too: so that both are timed on the same frames."""
    equal_steps({**TINY, "decoder_fraction": fraction})


@pytest.mark.parametrize("size", ["kani-lora", "xtts", "valle"])
def test_other_families_equal_transformers(size):
    sizes = {"lora": None, **bench.TRAIN_SIZES[size]}
    sizes |= bench.REDUCED[sizes["arch"]]
    equal_steps({**sizes, "backbone": {**sizes["backbone"], "d_model": 64, "n_head": 4, "d_ff": 96,
                                       "n_kv_head": min(4, sizes["backbone"]["n_kv_head"])}})  # fmt: skip


def equal_steps(sizes):
    job = bench.new_job("train", "tiny", "float32", 0, **sizes, utterances=2, text_rows=9, frames=20)
    ours, theirs = (bench.train_job({**job, "way": way})["numbers"] for way in ("ours", "transformers"))
    off = bench.differences(theirs, ours, "float32")
    assert ours["gradient"][0] > 0 and off["loss"][0] < 1e-6 and off["gradient"][0] < 1e-5


def test_rows_of_steps(here, measure, monkeypatch):
    monkeypatch.setattr(bench, "TRAIN_SIZES", {"small": TINY})
    rows = measure("train", "--fractions=1", "--dtypes=float32", "--repeats=1")
    assert {row["values"]["way"] for row in rows} == {"ours", "ours sparse", "ours in backward", "transformers"}
    assert all(row["values"]["seconds"] > 0 and row["values"]["peak GB"] > 0 for row in rows)


def test_rows_of_memory(here, measure, monkeypatch):
    """Of so small a model nearly all is Python and torch; each kind is counted all the same."""
    monkeypatch.setattr(bench, "MEMORY_SIZES", {"csm small": (TINY, 2)})
    rows = [row["values"] for row in measure("memory")]
    assert [row["case"] for row in rows] == ["csm small, 1 of 2 utterances", "csm small, 2 of 2 utterances"]
    assert all(row["weights"] > 0 and row["activations"] + row["temporaries"] > 0 for row in rows)
    assert all(abs(row["off by %"]) < 30 and row["taken GB"] > 0 for row in rows)


# ---------------------------------------------------------------------------------------------------------------------
# speech


@pytest.mark.parametrize("size", ["csm", "kani", "xtts", *[pytest.param(size, marks=pytest.mark.slow)
                                                           for size in ("valle", "valle nar")]])  # fmt: skip
def test_rows_of_models_that_speak(here, measure, monkeypatch, size):
    """All ways give the same codes, but for weights in 8 bits, which are not compared."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(bench, "BLOCK", 2**13)
    monkeypatch.setattr(bench, "FRAMES", 4)
    arch, _, small, *rest = bench.SPEAKERS[size]
    monkeypatch.setattr(bench, "SPEAKERS", {size: (arch, small, small, *rest)})
    rows = [row["values"] for row in measure("speak", "--repeats=1")]
    one = {row["way"]: row for row in rows if "eight" not in row["case"]}
    eight = {row["way"]: row for row in rows if "eight" in row["case"]}
    expected = {*bench.OURS, *(bench.GUESSING if size == "csm" else ()), rest[-1]}
    assert expected - one.keys() <= {"2126be8"} and set(eight) == {"ours packed", "ours int8"}
    differs = {way: row["differs by"] for way, row in one.items() if way != "floor"}
    assert differs.pop("ours plain") == "the reference"
    assert all((way.find("int8") > 0) == (x == "not compared") for way, x in differs.items()), differs
    assert all(x in ("not compared", "codes 0.0e+00") for x in differs.values()), differs
    assert eight["ours packed"]["differs by"] == "codes 0.0e+00" and eight["ours packed"]["ratio"] > 0
    if rest[-1] in one:
        other = one[rest[-1]]
        per_second = f"{rest[0]}/s"
        ratio = one["ours int8"][per_second] / other[per_second]
        assert other[f"x {rest[-1]}"] == 1 and one["ours int8"][f"x {rest[-1]}"] == pytest.approx(ratio)
    if size != "valle nar":
        assert one["floor"]["% of the floor's speed"] == pytest.approx(100)
    if size == "csm":
        assert one["ours int8"]["passes/frame"] == small["n_codebooks"] - 1 > one["ours packed ahead"]["passes/frame"]


@pytest.mark.parametrize("size", ["csm", "kani", "xtts", "valle"])
def test_the_weights_of_a_frame(size):
    """Those of the linear layers of a step, each as often as it multiplies, those of the heads, and a few others."""
    arch, _, small, *_ = bench.SPEAKERS[size]
    job = {"arch": arch, "way": "ours plain", "repeats": 1, "weights": "", "sizes": small, "together": 1,
           "text_rows": 5, "frames": 4}  # fmt: skip
    model = bench.speaker_of(job)
    bench.ready(model, linear="plain")
    (line,) = bench.texts_of(job, model)
    stage = model.stage(1, 64, 4)
    model.seat(stage, 0, line.text, **line.side)
    read = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda m, *_: read.append(m.weight.numel()))
    model.step(stage)
    read.extend(weight.numel() for weight, _ in model.head_weights())
    assert sum(read) == pytest.approx(bench.weights_of_a_frame(model), rel=0.05)


def test_acceptance_can_be_imposed():
    """Of guesses of random weights so many are right, and the codes are those of no other way."""
    job = {"arch": "csm", "way": "imposed", "repeats": 1, "weights": "", "sizes": bench.SPEAKERS["csm"][2] |
           {"n_codebooks": 32}, "together": 1, "text_rows": 5, "frames": 60}  # fmt: skip
    model = bench.speaker_of(job)
    passes = []
    model.decoder.register_forward_hook(lambda *_: passes.append(1))
    engine = bench.engine_of({**job, "way": "ours packed ahead"}, model)
    bench.pace(engine, bench.texts_of(job, model))
    right = [math.prod(bench.ACCEPTED[:i]) for i in range(bench.CSM.AHEAD + 1)]  # all of the first i guesses
    assert 31 / sum(right) == pytest.approx(len(passes) / 60, rel=0.05)


def test_streams_of_a_csm():
    """What a GPU is asked for, on a CPU."""
    codec = dict(n_codebooks=6, codebook_size=32, dims=8, width=16, channels=2, layers=1)
    job = bench.new_job("streams", "", "float32", 2, arch="csm", sizes=bench.SPEAKERS["csm"][2], codec=codec,
                        text_rows=5, frames=6, streams=3, way="ours", weights="")  # fmt: skip
    answer = bench.streams_job({**job, "device": "cpu"})
    values = bench.streams_columns(3, 12.5, answer, {})
    assert [len(x) for x in answer["seconds"].values()] == [2, 2, 2] and all(x > 0 for x in values.values())
    assert values["times real time"] == pytest.approx(3 / values["real-time factor"])


@pytest.mark.parametrize("sound", [True, False])
def test_a_gpu_s_ten_minutes(measure, monkeypatch, capsys, sound):
    """Each way that fails is one line; without a sound kernel what needs it is left out."""
    def ask(command, job):
        if job["benchmark"] == "streams" and job["streams"] == 8:
            return {"seconds": {"first": [0.05], "frame": [0.01], "with codec": [0.02]}, "peak": 1e9}
        raise ValueError(f"exit code 1: {job['benchmark']}")

    bench.tell.cache_clear()
    monkeypatch.setattr(bench, "ask", ask)
    monkeypatch.setattr(bench, "END", {})
    monkeypatch.setattr(bench, "pick_device", lambda _: "cuda")
    monkeypatch.setattr(bench, "kernel_is_sound", lambda: sound)
    monkeypatch.setattr(bench.torch.cuda, "get_device_name", lambda: "Fast")
    (row,) = measure("gpu")
    assert row["values"] == {
        "case": "csm and mimi, bfloat16, 8 at once", "way": "ours", "first audio, ms": 50.0, "frames/s": 800.0,
        "real-time factor": 0.25, "times real time": 32.0, "peak GB": 1.0, "differs by": "the reference",
    }  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert sum("without ours: exit code 1: streams" in line for line in lines) == 3
    assert any("exit code 1: train" in line for line in lines) == sound
    assert sum("a test of the loss fails" in line for line in lines) == 2 * (not sound)
    with pytest.raises(ValueError, match="no time is left"):
        monkeypatch.undo()
        monkeypatch.setattr(bench, "END", {"at": 0.0})
        bench.ask(bench.WORK, {"threads": 1, "repeats": 0})


# ---------------------------------------------------------------------------------------------------------------------
# digits


@pytest.mark.parametrize("a, b", [
    ([1, 2, 3, 4], [10, 20, 40, 30]), ([1, 1, 2, 3, 3], [5, 4, 4, 4, 1]), ([0.1, 0.2, 0.2], [3, 2, 1]),
])  # fmt: skip
def test_rank_correlation(a, b):
    assert bench.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert bench.ranks(a).tolist() == (stats.rankdata(a) - 1).tolist() and bench.spearman(a, [1] * len(a)) == 0


def test_numbers_are_compared_with_word_errors(tmp_path, monkeypatch):
    """The model with the lower loss judges both; the last row has the correlations."""
    tokens = write_tokens(tmp_path / "tokens")
    for steps in (1, 4, 8):
        run(tokens, tmp_path / f"{steps}", f"--max_iters={steps}", "--warmup_iters=1", "--learning_rate=1e-2")
    (tmp_path / "metadata.csv").write_text("audio,text,speaker\n1.wav,one two,a\n2.wav,three,b\n")
    results = tmp_path / "rows.jsonl"
    heard = iter(["one two", "three", "one two", "", "", ""])
    monkeypatch.setattr(bench, "recogniser", lambda asr: lambda wav, rate: next(heard))
    bench.main(configurator.configure(bench.__file__, [
        "judge", f"--ckpt={tmp_path}/[148]/best.pt", f"--raw={tmp_path}", "--strings=0", f"--results={results}",
        "--temperature=0"], ["name"]))  # fmt: skip
    *rows, last = (json.loads(line)["values"] for line in results.read_text().splitlines())
    assert [(row["steps"], round(row["wer"], 3)) for row in rows] == [(1, 0.0), (4, 0.333), (8, 1.0)]
    assert last["case"].endswith("over 3 models") and last["val_loss"] == pytest.approx(-1)
    assert {"text_margin", "cer", "missed"} <= set(last) and not {"wer", "rtf"} & set(last)


def test_new_strings_are_in_no_recording_of_their_voice():
    rows = [("", " ".join(bench.WORDS[int(d)] for d in f"{n:03d}"), "a") for n in range(990)]
    strings = bench.new_strings(rows, "a", 12, seed=1)
    assert [len(text.split()) for text in strings] == [3, 4, 5, 6] * 3 and len(set(strings)) == 12
    assert all(text.startswith("nine nine") for text in strings[::4])  # the three digits that nobody reads
    assert bench.new_strings(rows, "a", 12, seed=1) == strings != bench.new_strings(rows, "b", 12, seed=1)


def test_models_speak_in_several_processes_as_in_one(tmp_path, measure, monkeypatch):
    run(write_tokens(tmp_path / "tokens"), tmp_path / "out", "--max_iters=4")
    (tmp_path / "metadata.csv").write_text("audio,text,speaker\n1.wav,one two,a\n2.wav,three,b\n3.wav,two,a\n")
    ckpt = str(tmp_path / "out" / "best.pt")
    flags = [f"--raw={tmp_path}", f"--ckpt={ckpt}", "--strings=0"]
    cfg = configurator.configure(bench.__file__, ["sample", *flags], ["name"])
    results, stopped, *_ = zip(*[bench.speak_and_listen(cfg, ckpt, text) for text in bench.texts_to_speak(cfg)],
                               strict=True)  # fmt: skip
    rates = bench.error_percent(results)
    monkeypatch.setattr(bench.os, "cpu_count", lambda: 2)
    (row,) = measure("sample", *flags)
    assert row["values"].pop("real-time factor") > 0
    assert row["values"] == {
        "case": ckpt, "steps": 4, "a, word errors %": rates["a"], "b, word errors %": rates["b"],
        "mean %": (rates["a"] + rates["b"]) / 2, "ended": f"{sum(stopped)} of 3",
    }  # fmt: skip
    (row,) = measure("sample", *flags, "--quantize=int8")
    values = row["values"]
    assert values["held-out loss"] > 0 and 0 < abs(values["int8, % more"]) < 1
    with pytest.raises(ValueError, match="voices = 'c': choose from a, b"):
        measure("sample", *flags, "--voices=c")


# ---------------------------------------------------------------------------------------------------------------------
# codecs

OPTIONS = {"channels": 4, "width": 16}


@pytest.fixture
def small(monkeypatch):
    theirs = dict(num_filters=4, hidden_size=16, codebook_dim=16)
    dac = {"channels": 4, "decoder_channels": 32, "n_codebooks": 2}
    sizes = {"one": ("encodec", OPTIONS, 1, "Encodec", theirs, ["transformers"]), "alone": ("dac", dac, 1, "", {}, [])}
    monkeypatch.setattr(bench, "CODECS", sizes)
    monkeypatch.setattr(bench, "STREAMED", 0.4)


def test_rows_of_codecs(small, here, measure):
    rows = [row["values"] for row in measure("codec", "--sizes=one,alone", "--repeats=1")]
    found = {(row["case"].split(",")[0], row["way"]): row for row in rows}
    assert set(found) == {("one", "ours"), ("one", "transformers"), ("alone", "ours")}
    able = [sum(value != "none" for key, value in row.items() if "real time" in key)
            for row in (found["one", "ours"], found["one", "transformers"], found["alone", "ours"])]  # fmt: skip
    assert able == [4, 2, 2]  # transformers has no stream, nor does DAC
    assert found["one", "transformers"]["differs by"].startswith("codes ")


def test_codecs_that_do_other_work_are_not_timed(small, here, measure, monkeypatch):
    right = bench.transformers_codec

    def wrong(job):
        model, encode, decode, *rest = right(job)
        return model, encode, lambda codes: decode(codes) + 0.01, *rest

    monkeypatch.setattr(bench, "transformers_codec", wrong)
    rows = [row["values"] for row in measure("codec", "--sizes=one", "--repeats=1")]
    assert ["waveform" in row["not timed, its numbers differ by"] for row in rows if len(row) == 3] == [True]


@torch.no_grad()
def test_random_codebooks_are_in_use():
    codec, encode, *_ = bench.our_codec({"codec": "encodec", "options": OPTIONS, "weights": ""})
    codes = encode(wav := 0.1 * noise(1, 24000))
    codec.load_state_dict(codec.state_dict())
    assert len(codes.unique()) > 8 and torch.equal(encode(wav), codes)
