"""bench.py: the benches of loss, training step and codecs, at sizes that take a moment. No time is asserted."""

from types import SimpleNamespace

import pytest
import soundfile
import torch
import transformers
from test_codec_networks import TINY as TINY_CODECS
from test_codec_networks import mimi, noise
from test_train import run, write_tokens

import bench

STACK = dict(n_layer=1, n_head=2, n_kv_head=1, d_model=32, d_ff=48, rope_scaling=bench.LLAMA3_ROPE)
TINY = dict(text_vocab_size=50, n_codebooks=4, codebook_size=16, backbone=STACK, decoder={**STACK, "d_model": 16})


@pytest.fixture
def here(monkeypatch):
    """Measure in this process, not each time in a fresh one."""
    monkeypatch.setattr(bench, "apart", lambda work, *args: work(*args))


@pytest.mark.parametrize("shared", [False, True])
def test_all_losses_are_one_number(shared):
    hidden, weight, target = bench.loss_inputs((3, 19, 8, 40, shared), torch.float32, "cpu")
    results = []
    for way in ("ours", "eager", "torch chunked"):
        loss = bench.loss_way(way, "cpu")(hidden, weight, target)
        results.append((loss.detach(), *torch.autograd.grad(loss, hidden)))
    for loss, grad in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        torch.testing.assert_close(grad, results[0][1])


def test_what_cannot_run_here_says_so():
    with pytest.raises(ValueError, match="GPU"):
        bench.loss_way("liger", "cpu")
    with pytest.raises(ValueError, match="10000.0 GB"):
        bench.check_room(1e13, "cpu")


def test_memory_is_that_of_the_logits():
    """In a fresh process: eager holds them about three times, less the gradients, which come later; ours does not."""
    size = (8, 2051, 32, 1024, False)
    logits = 4 * 8 * 2051 * 1024
    extra = bench.apart(bench.loss_memory, "eager", size, torch.float32, "cpu")
    if extra is None:
        pytest.skip("this system does not tell a process's peak")
    assert 1.5 * logits < extra < 4 * logits
    assert bench.loss_memory("ours", size, torch.float32, "cpu") < logits / 8


def test_the_table_of_losses(here, capsys):
    ways = ("ours", "eager", "torch chunked", "liger")
    bench.compare_losses({"tiny": (3, 19, 8, 40, True)}, bench.DTYPES, 1, ways)
    out = capsys.readouterr().out
    assert "without liger: its kernels need a GPU" in out
    rows = [line.split() for line in out.splitlines() if line.split()[0] == "tiny"]
    assert [row[2] for row in rows[:4]] == ["ours", "eager", "torch", "floor"]
    assert len(rows) == 2 * 4 + 2
    assert max(float(x) for x in rows[-2][2:]) < 1e-5 and max(float(x) for x in rows[-1][2:]) < 2e-2


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_ours_equals_transformers(fraction):
    """At a fraction too: so that both are timed on the same frames."""
    loss, gradient = bench.csm_differences(TINY, fraction)
    assert loss < 1e-6 and gradient < 1e-5


def test_the_table_of_steps(here, capsys, monkeypatch):
    monkeypatch.delenv("MARVIS", raising=False)
    ways = [("ours", "own"), ("transformers", "default"), ("transformers", "fused"), ("marvis", "default")]
    bench.compare_steps({"tiny": TINY}, ["float32", "bfloat16"], 1, ways, (0.25,))
    captured = capsys.readouterr()
    assert captured.out.count("without marvis default (tiny, float32, 0.25): the environment variable MARVIS") == 1
    rows = [line.split() for line in captured.out.splitlines() if line.startswith("tiny")]
    assert [row[4] for row in rows] == ["ours", "transformers", "transformers"] * 2
    assert all(0 < int(row[-1].rstrip("%")) < 100 for row in rows)


def test_operations_of_a_step():
    """By hand: one block of attention (q, o: D D, k, v: D D / 2) and feed-forward (3 D F), heads of 19 classes."""
    backbone, decoder = 3 * 32 * 32 + 3 * 32 * 48, 3 * 16 * 16 + 3 * 16 * 48
    rows, frames = 2 * 192, 2 * 152
    expected = rows * backbone + frames * 19 * 32 + frames / 4 * (4 * (decoder + 32 * 16) + 3 * 19 * 16)
    assert bench.csm_operations(TINY, 1 / 4, 2) == 6 * expected


@pytest.mark.parametrize("name, key, value, message", [
    ("loss", "sizes", "huge", "sizes = 'huge': there is csm-512"),
    ("loss", "dtypes", "int8", "dtypes = 'int8': there is float32"),
    ("loss", "ways", "ours,theirs", "ways = 'theirs': there is ours, eager"),
    ("train", "sizes", "huge", "sizes = 'huge': there is small, marvis"),
    ("train", "dtypes", "int8", "dtypes = 'int8': there is float32"),
    ("train", "ways", "ours,eager", "ways = 'eager': there is ours, ours sparse, ours in backward, transformers def"),
    ("train", "fractions", "1/3", "fractions = '1/3': there is 1/16, 1"),
])  # fmt: skip
def test_what_is_chosen_has_to_be_there(name, key, value, message):
    keys = dict(sizes="", dtypes="", ways="", fractions="", repeats=1)
    with pytest.raises(ValueError, match=message):
        bench.main(SimpleNamespace(**{**keys, "name": name, key: value}))


# ---------------------------------------------------------------------------------------------------------------------
# families


def test_what_is_missing_of_a_run_is_made(monkeypatch, tmp_path):
    ran = []
    done = SimpleNamespace(returncode=0)
    monkeypatch.setattr(bench.subprocess, "run", lambda command, cwd: ran.append(command[1:]) or done)
    monkeypatch.chdir(tmp_path)
    assert bench.trained("digits", 7, "data/digits") == "out/digits_7"
    run = ["train.py", "config/digits.py", "--seed=7", "--out_dir=out/digits_7"]
    assert ran == [["data/digits/prepare.py"], ["prepare.py", "config/digits.py"], run]
    there = {"data/digits/metadata.csv": "", "data/digits/tokens/meta.json": "", "out/digits_7/last.pt": "",
             "out/digits_7/metrics.jsonl": '{"iter": 500}\n'}  # fmt: skip
    for name, text in there.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    ran.clear()
    bench.trained("digits", 7, "data/digits")
    assert ran == [[*run, "--init_from=resume"]]
    (tmp_path / "out/digits_7/metrics.jsonl").write_text('{"iter": 500}\n{"iter": 2900}\n')
    ran.clear()
    bench.trained("digits", 7, "data/digits")
    assert ran == []
    monkeypatch.setattr(bench.subprocess, "run", lambda command, cwd: SimpleNamespace(returncode=1))
    with pytest.raises(ValueError, match="python train.py config/digits.py .* failed"):
        bench.trained("digits", 8, "data/digits")


def test_new_strings_are_in_no_recording_of_their_voice():
    rows = [("", " ".join(bench.WORDS[int(d)] for d in f"{n:03d}"), "a") for n in range(990)]
    strings = bench.new_strings(rows, "a", 12, seed=1)
    assert [len(text.split()) for text in strings] == [3, 4, 5, 6] * 3 and len(set(strings)) == 12
    assert all(text.startswith("nine nine") for text in strings[::4])  # the three digits that nobody reads
    assert bench.new_strings(rows, "a", 12, seed=1) == strings != bench.new_strings(rows, "b", 12, seed=1)


def test_table_of_families(monkeypatch, tmp_path, capsys):
    tokens = write_tokens(tmp_path / "tokens")
    run(tokens, tmp_path / "out", "--max_iters=4")
    monkeypatch.setattr(bench, "trained", lambda recipe, seed, raw: str(tmp_path / "out"))
    rows = [("", "one two", "a"), ("", "three", "b"), ("", "two", "a")]
    monkeypatch.setattr(bench, "read_raw", lambda raw, every: rows)
    monkeypatch.setattr(bench, "recognise", lambda wav, rate: "one two")
    how = dict(speaker="a", temperature=None, strings=0, seed=1, show_errors=False)
    bench.bench_families(SimpleNamespace(recipes="digits", seeds="1,2", raw="", **how))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[-2:]] == [["digits", "1"], ["digits", "2"]]
    row = lines[-1].split()
    assert row[3:7] == ["3", "x", "16", "x"]
    assert "33.3% a" in lines[-1]  # "two" heard as "one two": an error in three words


# ---------------------------------------------------------------------------------------------------------------------
# codecs

OPTIONS = {"channels": 4, "width": 16}


def tiny_encodec(folder):
    model = transformers.EncodecModel(transformers.EncodecConfig(num_filters=4, hidden_size=16, codebook_dim=16))
    bench.codes_of_one_length(model).save_pretrained(folder)
    encode = lambda wav: model.encode(wav[:, None], bandwidth=6.0).audio_codes[0]  # noqa: E731
    return folder, model, encode, lambda codes: model.decode(codes[None], [None]).audio_values[:, 0]


def absent(folder):
    raise ImportError("it is not here")


@pytest.fixture
def small(monkeypatch):
    ways = {"absent": absent, "transformers": tiny_encodec}
    dac = {"channels": 4, "decoder_channels": 32, "n_codebooks": 2}
    sizes = {"one": ("encodec", OPTIONS, 1, ways), "alone": ("dac", dac, 1, {})}
    monkeypatch.setattr(bench, "CODEC_SIZES", sizes)
    monkeypatch.setattr(bench, "STREAMED", 0.4)


def test_the_table_of_codecs(small, here, capsys):
    with torch.no_grad():
        bench.compare_codecs(["one", "alone"], 1, 0.1)
    captured = capsys.readouterr()
    assert "one without absent: it is not here" in captured.out + captured.err
    rows = [line.split() for line in captured.out.splitlines() if line.split()[:1] in (["one"], ["alone"])]
    rows = [row for row in rows if row[1] != "without"]
    assert [row[:2] for row in rows[:4]] == [["one", "ours"], ["one", "transformers"], ["alone", "ours"],
                                             ["one", "transformers"]]  # fmt: skip
    assert [row.count("x") for row in rows[:3]] == [6, 4, 4]  # no peer here streams, nor does DAC
    assert rows[3][2] == "100.00%" and float(rows[3][3]) < 1e-5
    assert [row[0] for row in rows[4:]] == ["one", "alone"] and all(float(row[2]) > 0.001 for row in rows[4:])


@torch.no_grad()
def test_codecs_that_do_other_work_are_not_compared(small, tmp_path):
    path, _, encode, decode = tiny_encodec(tmp_path)
    ours, wav = bench.open_network("encodec", OPTIONS, path, "cpu"), 0.1 * noise(1, 9600)
    assert bench.check_codecs(ours, encode, decode, wav)[0] == 1
    with pytest.raises(ValueError, match=r"% of the codes agree, the waveforms differ by 0"):
        bench.check_codecs(ours, lambda wav: encode(wav).roll(1, 2), ours.decode, wav)
    with pytest.raises(ValueError, match=r"100.0% of the codes agree, the waveforms differ by .*e-0"):
        bench.check_codecs(ours, encode, lambda codes: decode(codes) + 0.01, wav)


def test_unknown_codecs():
    with pytest.raises(ValueError, match="sizes = 'dac': there is mel, mimi, .*, xtts, prepare"):
        bench.main(SimpleNamespace(name="codec", sizes="mimi,dac"))


def test_random_codebooks_are_in_use():
    codec = bench.open_network("encodec", OPTIONS, "", "cpu")
    assert len(codec.encode(0.1 * noise(1, 24000)).unique()) > 8
    torch.testing.assert_close(codec.quantizer.lengths, codec.quantizer.codebooks.square().sum(2))


def test_what_prepare_reaches(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "transformers_mimi", lambda folder: mimi(folder, **TINY_CODECS["mimi"]))
    (tmp_path / "wavs").mkdir()
    for i in range(3):
        soundfile.write(tmp_path / "wavs" / f"{i}.wav", 0.1 * noise(8000 + 4000 * i).numpy(), 24000)
    (tmp_path / "metadata.csv").write_text("2|two\n0|zero\n1|one\n")
    bench.compare_prepare(str(tmp_path), 1)
    assert "3 recordings, 2 s, to Mimi's codes: the codec alone" in capsys.readouterr().out
    bench.compare_prepare("", 1)
    assert "no real speech" in capsys.readouterr().out
