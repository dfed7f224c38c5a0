"""The engine of generation: many utterances at once, in the form in which the hardware computes fast, with guards.

    model = ready(model, quantize="int8")
    engine = Engine(model, places=8, draw=dict(temperature=0.9, top_k=50))
    for i, spoken in engine.speak([Utterance(ids, cap=500, seed=1), ...]): spoken.frames (T, K), spoken.ended
    for i, utterance, frames, over in engine.run(deque([(0, Utterance(ids))])): ...   frames (n, K) as they are made

- A family's own step is in model.py. Here utterances take their places on a Stage and leave it, and others follow.
- What an utterance becomes depends on its own text, prompt and seed, whatever is spoken beside it. Products of another
  number of rows round differently; so it may change from the first code on whose choice is within that rounding.
- On a GPU a step is one CUDA graph.
- An utterance that repeats itself or does not end is spoken again with another seed.
"""

import math
from collections import deque
from dataclasses import dataclass, field, replace

import torch

from model import AudioEncoder
from parts import lora, packed

ENDED, CUT, REPEATS = "ended", "no stop", "repeats"  # how an utterance is over
REPETITION = 2.0  # seconds of the same again and again are a fault
CYCLE = 1.0  # longest part that is repeated, in seconds
DIVERGED = "the model's logits are not finite: its training run diverged, or dtype is too narrow for its weights"


@dataclass
class Utterance:
    """What is to be spoken: text ids (n,), at most `cap` frames, with these random numbers. side: what the model's
    `seat` takes beside these, such as prompt and voice. words: those of the text; owner (n,): the number of each id's
    word, -1: none."""

    text: object
    cap: int = 1125
    seed: int = 0
    side: dict = field(default_factory=dict)
    words: list = field(default_factory=list)
    owner: object = None


@dataclass
class Spoken:
    """An utterance that is complete: its codes (T, K); its frames, the same or states (T, D) for a vocoder; whether the
    model ended it by itself; what is wrong with it, a few words for each fault; the faults of every try; and what the
    caller's judge has found: the wav (N,), and the word of each frame, a Track."""

    utterance: Utterance
    codes: torch.Tensor
    frames: torch.Tensor
    ended: bool
    faults: list
    tries: list = field(default_factory=list)
    wav: torch.Tensor | None = None
    track: object = None


def ready(model, quantize="", linear="auto", say=print):
    """The same model in the form that generates fast on its device. It can no longer be trained, saved or adapted.

    An adapter is merged. On a CPU linear layers and heads are packed: linear is "plain", "packed" (float32 in the order
    that the CPU reads fastest) or "auto", which measures both; quantize = "int8" holds weights in 8 bits. say: gets a
    line about the choice. Raises ValueError for int8 on a GPU.
    """
    model.eval()
    if name := lora.active_adapter(model):
        lora.merge(model, name)
    for module in model.modules():
        if isinstance(module, AudioEncoder):
            module.tabulate()
    if model.device.type != "cpu":
        if quantize:
            raise ValueError(f"quantize = {quantize!r} is for CPUs: on {model.device} take dtype = 'bfloat16'")
        return model
    kind = quantize or linear
    if kind == "auto":
        kind = packed.fastest(model)
        say(f"linear layers: {kind} ones are the fastest here")
    if kind != "plain" and (reason := packed.missing(kind)):
        say(f"linear layers stay plain: {reason}")
        kind = "plain"
    if kind != "plain":
        heads = [packed.pack(weight, bias, kind) for weight, bias in model.head_weights()]
        model.packed_heads = torch.nn.ModuleList(heads)
        packed.pack_linears(model, kind)
    return model


class Engine:
    """Speaks utterances with a model, at most `places` at a time.

    draw: settings of sample_code. latents: yields states for a vocoder in place of frames. frame_rate: frames a second,
    for the guards. how: other arguments of Family.stage. The state behind the rows of a voice is kept, and serves all
    texts in this voice.
    """

    def __init__(self, model, places=1, draw=None, latents=False, frame_rate=12.5, **how):
        self.model = model
        self.places = places
        self.draw = draw or {}
        self.latents = latents
        self.frame_rate = frame_rate
        self.how = how
        self.kept = {}
        self.stage = None
        self.size = (0, 0, 0)
        self.graph = None
        self.codes = None  # (T, K) of the last utterance that was over

    def speak(self, utterances, judge=None, tries=3):
        """Yields (number, Spoken) of each utterance when it is complete, in any order; see `follow`."""
        return self.follow(deque(enumerate(utterances)), judge, tries)

    def follow(self, queue, judge=None, tries=3, tick=None):
        """`speak` for a queue of (number, Utterance), to which the caller may append while it runs.

        judge(number, Spoken) adds the faults that it finds. An utterance with faults is spoken again with other seeds,
        until it has none or the tries are over; then the try with the fewest faults counts. Without a temperature all
        tries would be equal, so that there is one. tick(n) is told of n more frames.
        """
        tries = 1 if self.draw.get("temperature", 1.0) == 0 else tries
        made = {}
        earlier = {}
        for number, utterance, frames, over in self.run(queue):
            made.setdefault(number, []).append(frames)
            if tick is not None:
                tick(len(frames))
            if over is None:
                continue
            frames = torch.cat(made.pop(number))
            sound = len(frames) - self.rounded(REPETITION) if over == REPEATS else len(frames)
            faults = [] if over == ENDED else [over]
            spoken = Spoken(utterance, self.codes[:sound], frames[:sound], over == ENDED, faults)
            if judge is not None:
                judge(number, spoken)
            before = earlier.pop(number, None)
            faults = [*(before.tries if before else []), spoken.faults]
            if before is not None and len(before.faults) <= len(spoken.faults):
                spoken = before
            spoken.tries = faults
            if spoken.faults and len(faults) < tries:
                earlier[number] = spoken
                queue.appendleft((number, replace(utterance, seed=utterance.seed + 1)))
            else:
                yield number, spoken

    @torch.inference_mode()
    def run(self, queue):
        """Speaks what a queue of (number, Utterance) holds. Yields (number, utterance, new frames (n, K), over), where
        over is None while the utterance goes on, then ENDED by the model, CUT at its cap, or REPEATS."""
        model = self.model
        seated = []
        while queue or seated:
            while queue and len(seated) < self.places:
                if not self.prepare(len(seated), queue):
                    break
                most, _ = self.room(queue[0])
                number, x = queue.popleft()
                frames = model.seat(self.stage, len(seated), x.text, seed=x.seed, most=most, kept=self.kept, **x.side)
                seated.append(Seat(number, x, frames))
            made, ended, sound = self.advance(len(seated))
            for place in reversed(range(len(seated))):
                seat = seated[place]
                if not sound[place]:
                    raise ValueError(DIVERGED)
                frames = self.made(place, seat.given, made[place])
                over = None
                if ended[place]:
                    over = ENDED
                elif made[place] >= seat.frames:
                    over = CUT
                elif self.repeats(place, made[place]):
                    over = REPEATS
                seat.given = made[place]
                if over:  # the last one takes the place that becomes free
                    self.codes = self.stage.codes[place, : made[place]].clone()
                    last = seated.pop()
                    if last is not seat:
                        self.stage.move(len(seated), place)
                        seated[place] = last
                if over or len(frames):
                    yield seat.number, seat.utterance, frames, over

    def room(self, item):
        """The frames and rows that a (number, Utterance) may take."""
        return self.model.room(item[1].text, item[1].side.get("prompt"), item[1].cap)

    def prepare(self, seated, queue):
        """Have a stage with a free place for the first utterance of the queue, and for as many of the others as can be;
        False where it is too small and still in use."""
        frames, rows = self.room(queue[0])
        fits = self.stage is not None and frames <= self.size[1] and rows <= self.size[2]
        if fits and (seated or self.size[0] >= min(self.places, len(queue))):
            return seated < self.size[0]
        if seated:
            return False
        frames, rows = (math.ceil(max(size) / 64) * 64 for size in zip(*map(self.room, queue), strict=True))
        places = min(self.places, len(queue))
        rows = min(rows, self.model.config.backbone.max_positions)
        self.size = places, frames, rows
        self.stage = self.model.stage(places, rows, frames, draw=self.draw, latents=self.latents, **self.how)
        self.parts = {}
        self.graph = None
        if self.model.device.type == "cuda" and self.model.causal:
            self.graph = capture(self.model, self.stage)
        return True

    def advance(self, n):
        """One step of the first n places. Returns the numbers of frames that they have, whether each has ended, and
        whether its logits are finite, three lists."""
        if self.graph is not None:
            self.graph.replay()
        else:
            if n not in self.parts:
                self.parts[n] = self.stage.part(slice(0, n))
            self.model.step(self.parts[n])
        return torch.stack([self.stage.made, self.stage.ended, self.stage.sound])[:, :n].tolist()

    def made(self, place, start, end):
        return (self.stage.states if self.latents else self.stage.codes)[place, start:end].clone()

    def rounded(self, seconds):
        return max(2, round(seconds * self.frame_rate))

    def repeats(self, place, made):
        """Whether the last frames are a cycle that goes round and round."""
        window = self.rounded(REPETITION)
        longest = self.rounded(CYCLE)
        if made < window + longest or made % max(1, window // 4):
            return False
        last = self.stage.codes[place, made - window - longest : made].cpu()
        return any(torch.equal(last[longest:], last[longest - n : -n]) for n in range(1, longest + 1))


@dataclass
class Seat:
    """An utterance at its place: it may have so many frames, and this many have been given out."""

    number: int
    utterance: Utterance
    frames: int
    given: int = 0


def capture(model, stage):
    """A step of a stage on a GPU as a CUDA graph, which the host launches at once. The stage must be empty."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is allocated at the first call must not be a part of the graph
        for _ in range(3):
            model.step(stage)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model.step(stage)
    return graph
