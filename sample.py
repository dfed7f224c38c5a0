"""A checkpoint or published weights speak: text in, wav files out.

    python sample.py --ckpt out/digits/best.pt --text "three one four"
    python sample.py --ckpt out/digits/best.pt --file lines.txt --out_dir spoken   spoken/000.wav, 001.wav, ...
    python sample.py config/digits.py --text "three one four"                      the recipe's out_dir/best.pt speaks
    python sample.py config/digits.py --text "three one four" --out_dir said       likewise, into said/
    python sample.py --ckpt out/x/best.pt --reference me.wav --reference_text "its transcript" --text "my clone"
    python sample.py --ckpt out/x/best.pt --reference me.wav --reference_text "its transcript" --save_voice me
    python sample.py --ckpt out/x/best.pt --voice me --text "my clone"             the voice that was saved
    python sample.py --ckpt weights/csm-1b --text "..."                            as published, before any training
    python sample.py --ckpt "weights/csm-1b,out/*" --file lines.txt --out_dir all  all/index.html: side by side
    python sample.py --ckpt out/x/best.pt --text "..." --out_dir - | aplay -f S16_LE -r 16000

- Published weights lack codec, tokenizer and the form of a text. Those of their authors are taken (released.py) unless
  `codec`, `codec_path`, `tokenizer` and `text_format` name others.
- The same seed and text give the same audio, whatever other lines are spoken beside it.
- Whatever can be refused is refused before the first line is spoken.
- voice.py has the model that speaks, `Voice`; here are files, lines and messages.
"""

import contextlib
import os
import signal
import sys
import time
import wave
from dataclasses import fields
from functools import partial
from glob import glob
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from layouts import is_published
from parts import configurator, lora, peft
from parts.align import CLEAR
from parts.audio import write_audio
from parts.captions import write_json, write_srt
from parts.frontend import needs_language
from parts.metrics import lowest_loss, read_metrics
from parts.page import curves, write_page
from parts.voices import save_voice as write_voice
from speak import CUT, REPEATS
from voice import DRAWS, SILENT, SKIPPED, TWICE, Voice, as_texts, need_stretch
from weights import peft_base

# a checkpoint, a folder with best.pt, published weights (a file or folder), a pattern such as "out/*", or several of
# these separated by commas; empty: best.pt in out_dir or, without one there, in the recipe's own out_dir
ckpt = ""
text = ""  # the text to speak
file = ""  # or a text file, one utterance per line
out_dir = "samples"  # folder for 000.wav, ..., with one folder per checkpoint; "-": raw 16-bit mono samples to stdout
speaker = ""  # one of the speakers in the training data, or that published weights know; empty: the main one
# recording of a voice to clone, several with commas between them, or a pattern such as "me/*.wav"; KaniTTS-2: a speaker
# vector, .npy or .pt, in place of each
reference = ""
# its transcript, word for word; those of several with | between them; XTTS, VALL-E and KaniTTS-2 need none
reference_text = ""
voice = ""  # a saved voice in place of a reference: its file, or its name in voices/
save_voice = ""  # save the voice of the reference, or of the speaker, to speak with as `voice`; needs no text
voice_note = ""  # licence or origin of that voice; it is shown wherever the voice speaks
seed: "0 <= int <= 4294967295" = 1337
batch: "1 <= int <= 1024" = 8  # lines that are spoken at the same time
tries: "1 <= int <= 20" = 3  # of a line with a fault, such as no end or skipped text, each with another seed
n_codebooks: "0 <= int <= 1000" = 0  # CSM: speak in so many of the first codebooks, faster and coarser; 0: in all
stream = False  # write audio while it is generated, line after line
timestamps: Literal["", "json", "srt"] = ""  # also write when each word is spoken: 000.json, or captions, 000.srt
quantize: Literal["", "int8"] = ""  # int8: weights in 8 bits, on a CPU: several times as fast, nearly the same
linear: Literal["auto", "plain", "packed"] = "auto"  # order of the weights on a CPU; auto: measure which is faster
device = "auto"  # cpu, cuda, cuda:1, mps, ...; auto: a GPU if available
adapter = ""  # another LoRA checkpoint, or folder of peft's, on the same base, to speak with instead of ckpt's

SHARED = {
    "voice.py": ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "repetition_decay", "speed",
                 "cap_seconds", "dtype"],
    "prepare.py": ["codec", "codec_path", "tokenizer", "text_format", "front_end", "language"],
    "weights.py": ["base"],
    "train.py": ["reference_seconds"],
    "model.py": ["speaks", "rounds", "guidance", "top_sigma", "whole_frames", "prompt_style", "loose_stop",
                 "recording_seconds", "heard_seconds", "chunk_seconds"],
}  # fmt: skip
HOW = ("speaker", "language", *DRAWS, "seed", "speed", "cap_seconds")  # keys that say how a line is spoken
MEANING = {CUT: "cut off at the cap, it did not stop by itself", REPEATS: "it repeated itself, and is cut there",
           SILENT: "there is a long silence in it", SKIPPED: "a part of the text was skipped",
           TWICE: "a part of the text was spoken twice"}  # fmt: skip
# of the page that compares several checkpoints
COLUMNS = [
    {"name": "step", "better": "", "meaning": "steps of training"},
    {"name": "val_loss", "better": "low", "meaning": "lowest held-out loss of the run"},
    {"name": "missed", "better": "low", "meaning": "lines that did not end by themselves, per hundred"},
    {"name": "retries", "better": "low", "meaning": "more tries of lines with a fault, per hundred lines"},
    {"name": "rtf", "better": "low", "meaning": "real-time factor: seconds of work for a second of audio"},
]
# keys that name what a checkpoint holds, and published weights do not
PARTS = ("codec", "tokenizer", "text_format", "front_end")


def slow_type(device, dtype):
    """A warning where a CPU emulates products in `dtype`, a name such as "bfloat16"; "" elsewhere.

    The cost of a product is measured, in a few milliseconds, because the name of a CPU does not tell it.
    """
    if torch.device(device).type != "cpu" or dtype == "float32":
        return ""

    def seconds(kind):
        x = torch.ones(256, 1024, dtype=kind)
        took = []
        for _ in range(3):
            start = time.perf_counter()
            torch.nn.functional.linear(x, x)
            took.append(time.perf_counter() - start)
        return min(took)

    factor = seconds(getattr(torch, dtype)) / seconds(torch.float32)
    if factor < 1.2:
        return ""
    return f"warning: dtype = {dtype!r}: on this CPU a product takes {factor:.1f} times as long as in float32"


def read_lines(text, file):
    """The utterances to speak. Raises ValueError for none, or an empty one."""
    if bool(text) == bool(file):
        raise ValueError('give either --text="what to say" or --file=lines.txt')
    if text:
        return [text]
    try:
        with open(file, encoding="utf-8-sig") as f:  # \n, \r\n and \r end a line; str.splitlines would split at more
            lines = f.read().rstrip().split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not text in UTF-8") from None
    if lines == [""]:
        raise ValueError(f"{file} is empty")
    if "" in (stripped := [line.strip() for line in lines]):
        raise ValueError(f"{file}: line {stripped.index('') + 1} is empty")
    return lines


@contextlib.contextmanager
def growing_wav(path, rate):
    """Yields a function that appends a piece (n,) to a 16-bit wav file, which can be played after each piece and is
    removed on an error. "-": standard output, without a header."""
    if path == "-":
        yield lambda piece: (sys.stdout.buffer.write(pcm(piece)), sys.stdout.buffer.flush())
        return
    try:
        with open(path, "wb") as raw, wave.open(raw) as out:
            out.setparams((1, 2, rate, 0, "NONE", "not compressed"))
            yield lambda piece: (out.writeframes(pcm(piece)), raw.flush())  # the first corrects the header's length
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(path)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


def pcm(wav):
    return (wav.clamp(-1, 1) * 32767).round().numpy().astype("<i2").tobytes()


def stream_line(voice, line, path, **how):
    """Speak one line into `path` while it is made. Returns a message about it and its seconds of audio."""
    samples = 0
    first = 0.0
    start = time.perf_counter()
    with growing_wav(path, voice.sample_rate) as write:
        for piece in voice.stream(line, **how):
            first = first or time.perf_counter() - start
            samples += len(piece)
            write(piece)
    seconds = samples / voice.sample_rate
    factor = (time.perf_counter() - start) / max(seconds, 1e-9)
    faults = [] if voice.stopped else [CUT]
    about = f"real-time factor {factor:.2f}, first audio after {first:.2f} s"
    return f"{path}  {short(line)!r}: {seconds:.2f} s of audio, {about}{warning(samples, faults, 0)}", seconds


def short(line):
    return line if len(line) <= 100 else f"{line[:80]} ... {line[-15:]}"


def warning(samples, faults, again):
    """What was wrong with an utterance, for the terminal. again: how often it, or a piece of it, was spoken again."""
    if not samples:
        return "; warning: the model stopped at once"
    again = f", spoken again {again} time{'s' * (again > 1)}" if again else ""
    return f"; warning: {', '.join(map(MEANING.get, faults))}{again}" if faults else again


def open_voice(cfg, path):
    """The voice of a checkpoint, of published weights, or of an adapter of peft's on either. Raises ValueError or
    OSError."""
    how = cfg.device, cfg.codec_path, cfg.dtype
    if peft.is_adapter(path):
        voice = open_voice(cfg, peft_base(path, cfg.base))
        voice.adapt(path)
        return voice
    if not is_published(path):
        return Voice.from_checkpoint(path, *how, base=cfg.base)
    # a recipe may say where codec and tokenizer are, but how it reads texts is that of its own model
    given = {key: getattr(cfg, key) for key in PARTS if key in (cfg.given if key in PARTS[:2] else cfg.flags)}
    return Voice.from_published(path, *how, speaker=cfg.speaker, language=cfg.language, **given)


def get_ready(cfg, path, lines, out_dir):
    """The voice of the checkpoint `path`, what the model heard of the voice to clone, the texts of that, and the
    prompt. All errors that can be found before the first line is spoken are raised here: ValueError or OSError."""
    voice = open_voice(cfg, path)
    messages = sys.stderr if out_dir == "-" else sys.stdout
    if warning := slow_type(voice.device, cfg.dtype):
        print(warning, file=messages)
    if cfg.adapter:
        voice.adapt(cfg.adapter)
    for key in {*SHARED["model.py"]} & cfg.given.keys() & vars(voice.model.config).keys():
        setattr(voice.model.config, key, getattr(cfg, key))
    configurator.refuse_idle(cfg, idle_keys(cfg, voice), partial(print, file=messages))
    if "reference_seconds" in cfg.given:
        need_stretch(cfg.reference_seconds)
        voice.reference_seconds = cfg.reference_seconds
    voice.use_codebooks(cfg.n_codebooks)
    reference, texts = heard_voice(cfg, voice, partial(print, file=messages))
    prompt = voice.prompt(reference, texts, cfg.speaker, cfg.language)
    for i, line in enumerate(lines, 1):
        try:
            voice.pieces(line, speaker=cfg.speaker, reference=reference, reference_text=texts, language=cfg.language,
                         cap_seconds=cfg.cap_seconds)  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{cfg.file}: line {i}: {error}" if cfg.file else str(error)) from None
    if out_dir != "-" and lines:
        os.makedirs(out_dir, exist_ok=True)
        if not os.access(out_dir, os.W_OK):
            raise OSError(f"{out_dir}: no permission to write")
    return voice, reference, texts, prompt


def heard_voice(cfg, voice, say):
    """What the model hears of the voice that `voice`, `reference` or `speaker` names, and its texts; None and [] where
    it needs none. Raises ValueError or OSError."""
    if cfg.voice:
        heard, texts, note = voice.recall(cfg.voice)
        if note:
            say(f"voice {cfg.voice}: {note}")
        return heard, texts
    texts = as_texts(cfg.reference_text) if cfg.reference_text else []
    if cfg.reference:
        return voice.listen([path for _, path in named(cfg.reference, "recording")]), texts
    if cfg.save_voice and not voice.model.reference:
        raise ValueError(f"save_voice = {cfg.save_voice!r:.60}: give the reference whose voice is to be saved")
    # latents of a recording are computed once, not for every line
    own = cfg.save_voice or voice.model.reference == "recording"
    return voice.own_voice(cfg.speaker) if own else None, texts


def read_out(cfg, path, lines, out_dir):
    """Speak all lines with the checkpoint `path` into out_dir. Returns, for the page that compares several, the keys of
    its run, its numbers {name: number or None}, and the wav files."""
    piped = out_dir == "-"
    messages = sys.stderr if piped else sys.stdout
    voice, reference, texts, prompt = get_ready(cfg, path, lines, out_dir)
    how = {key: getattr(cfg, key) for key in HOW}
    how.update(reference=reference, reference_text=texts)
    difference = voice.report["max_difference"]
    ln_v = voice.report["ln_v"]
    step = voice.report["iter"]
    shifts = ", ".join(f"{loss:.2f}" for loss in voice.report["loss_at_shift"])
    shifts = "" if step is None else f"; cross-entropy at shifts 0, 1, 2: {shifts}, ln V {ln_v:.2f}"
    print(f"{path}: the contract holds, cached and teacher-forced logits differ by {difference:.1e}{shifts}",
          file=messages)  # fmt: skip
    voice.ready(cfg.quantize, cfg.linear, partial(print, file=messages))
    if cfg.save_voice:
        saved = write_voice(cfg.save_voice, reference, texts, voice.made_for(), cfg.voice_note)
        print(f"{saved}: the voice is saved", file=messages)
    if "prompt" in prompt and not voice.prompted and voice.model.config.prompt_style == "segments":
        print(f"{path}: trained without voice prompts (voice_prompt = 0), it may not follow the reference",
              file=messages)  # fmt: skip
    report = {"ended": 0, "tries": 0, "seconds": 0.0}
    start = time.perf_counter()
    paths = ["-" if piped else os.path.join(out_dir, f"{i:03d}.wav") for i in range(len(lines))]
    speaking = in_turn if cfg.stream or piped else at_once
    bar = dict(total=len(lines), unit=" lines") if len(lines) > 1 else dict(unit=" frames", delay=2, leave=False)
    with tqdm(desc="speaking", disable=piped, **bar) as bar:
        tick = bar.update if len(lines) == 1 else None
        for message, ended, tries, seconds in speaking(cfg, voice, lines, paths, how, tick):
            tqdm.write(message, file=messages)
            bar.update(len(lines) > 1)
            report["ended"] += ended
            report["tries"] += tries
            report["seconds"] += seconds
    took = time.perf_counter() - start
    missed = len(lines) - report["ended"]
    again = report["tries"] - len(lines)
    hundred = 100 / max(1, len(lines))
    numbers = {"step": step, "missed": missed * hundred, "retries": again * hundred,
               "rtf": took / report["seconds"] if report["seconds"] else None}  # fmt: skip
    if len(lines) > 1:
        factor = f"{numbers['rtf']:.2f}" if report["seconds"] else ""
        print(f"{path}: {report['seconds']:.1f} s of audio in {took:.1f} s, real-time factor {factor}; {missed} of "
              f"{len(lines)} lines did not end by themselves ({numbers['missed']:.1f} per hundred), "
              f"{again} more tries", file=messages)  # fmt: skip
    return voice.trained_with, numbers, paths


def in_turn(cfg, voice, lines, paths, how, tick):
    """Speak line after line, each while it is made. Yields of each a message, whether it ended, tries, seconds."""
    for line, target in zip(lines, paths, strict=True):
        message, seconds = stream_line(voice, line, target, **how)
        yield message, bool(voice.stopped), 1, seconds


def at_once(cfg, voice, lines, paths, how, tick):
    """Speak several lines at a time. Yields the same as `in_turn`, of each line when it is complete."""
    start = time.perf_counter()
    for i, said in voice.speak(lines, cfg.batch, cfg.tries, tick=tick, **how):
        write_audio(paths[i], said.wav, voice.sample_rate)
        if cfg.timestamps:
            write = {"json": write_json, "srt": write_srt}[cfg.timestamps]
            write(Path(paths[i]).with_suffix(f".{cfg.timestamps}"), said.words)
        seconds = len(said.wav) / voice.sample_rate
        again = len(said.tries) - len(said.pieces)
        message = f"{paths[i]}  {short(lines[i])!r}: {seconds:.2f} s of audio, {said.frames} frames"
        if len(lines) == 1 and seconds:
            took = time.perf_counter() - start
            message += f", real-time factor {took / seconds:.2f}, {said.frames / took:.1f} frames a second"
        if cfg.timestamps and not all(x.track and x.track.clarity >= CLEAR for x in said.spoken):
            message += "; the times of its words are a guess, the model's attention does not tell them"
        yield message + warning(len(said.wav), said.faults, again), said.ended, 1 + again, seconds


def find_checkpoints(ckpt, *folders):
    """The paths that `ckpt` names, separated by commas; if it is empty, the first best.pt in these folders. A pattern
    stands for what it matches, and a run's folder for its best.pt, or last.pt. Raises ValueError if no folder has a
    best.pt, and FileNotFoundError for any other path that does not exist."""
    if not ckpt:
        usual = list(dict.fromkeys(os.path.join(folder, "best.pt") for folder in folders))
        if not (there := list(filter(os.path.isfile, usual))):
            raise ValueError(f"no checkpoint given (--ckpt=out/x/best.pt), and no {' or '.join(usual)} exists")
        return there[:1]
    paths = []
    for name, path in named(ckpt, "checkpoint"):
        inside = [os.path.join(path, kept) for kept in ("best.pt", "last.pt")]
        path = next(filter(os.path.isfile, inside), path)
        if path == name or path not in paths:  # a pattern may match what was named before
            paths.append(path)
    return paths


def named(names, what):
    """Yields (name, path) for the paths that exist of names or patterns, separated by commas. Raises FileNotFoundError
    for a name without one."""
    names = [names] if os.path.exists(names) else names.split(",")  # a path may have a comma in it
    for name in names:
        found = [name] if os.path.exists(name) else sorted(glob(name))
        if not found:
            among = f", one of {len(names)} separated by commas" if len(names) > 1 else ""
            raise FileNotFoundError(f"{name or repr(name)}: no such {what}{among}")
        yield from ((name, path) for path in found)


def folder_of(path):
    """The folder of a checkpoint or of published weights, which may themselves be a folder."""
    return Path(path) if os.path.isdir(path) else Path(path).parent


def column_names(paths):
    """Names for these paths, each another: those of their folders, or as many parts of the paths as that takes. Raises
    ValueError where one path is there twice."""
    places = [Path(path).resolve() for path in paths]  # "a/../best.pt" is not in a folder named ".."
    names = [folder_of(place).name for place in places]
    parts = [place.parts[1:] if place.is_dir() else place.with_suffix("").parts[1:] for place in places]
    for n in range(2, 2 + max(map(len, parts))):
        if len({*names, ""}) == len(names) + 1:
            return names
        names = ["_".join(part[-n:]) for part in parts]
    raise ValueError(f"ckpt = {','.join(paths)}: several checkpoints need folders of their own, and files to write to")


def idle_keys(cfg, voice):
    """{key: why} of the keys that have no effect on this voice."""
    c, idle = voice.model.config, {}
    known = {f.name: f.metadata.get("mode") for f in fields(c)}
    mode = voice.model.mode
    which = f"mode = {mode!r}" if mode else f"arch = {c.arch!r}"
    idle.update({key: f"{which} does not use it" for key in DRAWS if key not in voice.draw})
    for key in SHARED["model.py"]:
        if key not in known:
            idle[key] = f"arch = {c.arch!r} has no such key"
        elif known[key] not in (None, c.mode, mode):
            idle[key] = f"{which} does not use it"
    if not voice.model.fits_prompts:
        idle["reference_seconds"] = f"arch = {c.arch!r} takes a reference as long as it is"
    if not voice.vocoder:
        idle["speed"] = "only the vocoder of XTTS-v2 changes it"
    idle.update(c.idle())
    if not lora.adapters(voice.model):
        idle["base"] = "the model is no adapter"
    if not cfg.reference:
        idle["reference_text"] = "no reference is given"
    if not cfg.save_voice:
        idle["voice_note"] = "no voice is saved (save_voice)"
    if not needs_language(voice.meta["front_end"], voice.meta["text_format"]) and c.language_ids([""]) is None:
        idle["language"] = "the model reads all languages alike"
    nameless = voice.references is None and not voice.voices
    if "{speaker}" not in voice.meta["text_format"] and (cfg.reference or cfg.voice or nameless):
        idle["speaker"] = f"text_format = {voice.meta['text_format']!r} does not name one"
    return idle


def refuse_parts(cfg, paths):
    """Raise ValueError for flags that name the parts of published weights, where all paths are checkpoints."""
    flags = [key for key in PARTS if key in cfg.flags]
    if flags and not any(map(is_published, paths)):
        raise ValueError(f"--{flags[0]} is for published weights, {paths[0]:.200} holds its own")


def main(cfg):
    if cfg.timestamps and (cfg.stream or cfg.n_codebooks or cfg.out_dir == "-"):
        raise ValueError(f"timestamps = {cfg.timestamps!r}: they need whole lines in all codebooks and an out_dir: "
                         "leave out stream, n_codebooks and --out_dir=-")  # fmt: skip
    if cfg.voice and (cfg.reference or cfg.save_voice):
        raise ValueError(f"voice = {cfg.voice!r:.60}: it is saved already, leave out reference and save_voice")
    lines = [] if cfg.save_voice and not cfg.text and not cfg.file else read_lines(cfg.text, cfg.file)
    paths = find_checkpoints(cfg.ckpt, cfg.out_dir, cfg.recipe.get("out_dir", cfg.out_dir))  # a flag moves the output
    refuse_parts(cfg, paths)
    if len(paths) == 1:
        read_out(cfg, paths[0], lines, cfg.out_dir)
        return
    if cfg.save_voice:
        raise ValueError(f"save_voice = {cfg.save_voice!r:.60}: name one checkpoint, whose voice it becomes")
    if cfg.out_dir == "-":
        raise ValueError(f"ckpt = {cfg.ckpt}: several checkpoints need folders of their own, and files to write to")
    names = column_names(paths)
    logs = [read_metrics(folder_of(path) / "metrics.jsonl") for path in paths]
    for path, name in zip(paths, names, strict=True):  # twice, so that the last one is not refused after hours
        get_ready(cfg, path, lines, Path(cfg.out_dir) / name)
    models = []
    sentences = [{"id": f"{i:03d}", "text": line, "audio": {}} for i, line in enumerate(lines)]
    for path, name, log in zip(paths, names, logs, strict=True):
        config, numbers, spoken = read_out(cfg, path, lines, Path(cfg.out_dir) / name)
        numbers["val_loss"] = lowest_loss(log)
        models.append({"name": name, "config": config, "numbers": numbers, "curves": curves(log)})
        for sentence, wav in zip(sentences, spoken, strict=True):
            sentence["audio"][name] = Path(wav).relative_to(cfg.out_dir)
    page = os.path.join(cfg.out_dir, "index.html")
    write_page(page, {"title": "Side by side", "columns": COLUMNS, "models": models, "sentences": sentences})
    print(f"{page}: to listen to them")


def command(cfg):
    """main for the command line. A closed pipe (`| head`) ends it quietly; SIGTERM ends it as an error does, so that no
    half-written file stays."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        main(cfg)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more at exit
        sys.exit(1)


if __name__ == "__main__":
    configurator.run(command, __file__)
