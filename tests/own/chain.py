"""A family of one's own, which tests/test_family.py inserts into model.py, without this docstring and the imports."""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn as nn

from model import (
    AUDIO,
    TEXT,
    CSMConfig,
    Family,
    FamilyConfig,
    Transformer,
    free,
    init_weights,
    multi_codebook_cross_entropy,
)

# ---------------------------------------------------------------------------------------------------------------------
# Chain


@dataclass(kw_only=True)
class ChainConfig(FamilyConfig):
    """Sizes of a Chain and how it trains."""

    loss_decay: "0 < float <= 1" = free(1.0)  # weight of each codebook's loss, relative to the codebook before it
    arch: str = field(default="chain", init=False)

    def stop_frame(self):
        """Class `codebook_size` in every codebook."""
        return np.full(self.n_codebooks, self.codebook_size)

    layout = CSMConfig.layout  # text, then frames, then the stop frame
    length = CSMConfig.length


class Chain(Family):
    """The state that predicts codebook k is the backbone's plus the embeddings of codebooks 0 .. k - 1.

    VALL-E without such a sum draws the codebooks independently; CSM has a transformer in the place of the sum.
    """

    transcript = True

    def __init__(self, config):
        super().__init__(config)
        K, V, D = config.n_codebooks, config.codebook_size + 1, config.backbone.d_model
        self.text_embedding = nn.Embedding(config.text_vocab_size, D)
        self.code_embedding = nn.Embedding(K * V, D)  # code v of codebook k is its row k * V + v
        self.backbone = Transformer(config.backbone)
        self.heads = nn.Parameter(torch.empty(K, V, D))
        self.register_buffer("offset", torch.arange(K) * V, persistent=False)
        init_weights(self)

    def embed(self, tokens, segment):
        """Rows -> (B, S, D)."""
        frames = self.code_embedding(tokens[..., :-1] + self.offset).sum(2)
        return torch.where((segment == TEXT)[..., None], self.text_embedding(tokens[..., -1]), frames)

    def chain(self, state, codes):
        """state (N, D), codes (N, k) of codebooks 0 .. k - 1 -> states (N, k + 1, D) of codebooks 0 .. k."""
        sums = self.code_embedding(codes + self.offset[: codes.shape[1]]).cumsum(1)
        return torch.cat([state[:, None], state[:, None] + sums], 1)

    def states(self, tokens, segment):
        """The states (N, K, D) that predict the N frames of a batch, and these frames (N, K)."""
        spoken = segment == AUDIO
        rows = spoken[:, 1:].flatten().nonzero()[:, 0]  # row s predicts row s + 1
        frame = self.to_device(tokens[:, 1:, :-1].flatten(0, 1)[rows])
        x = self.embed(self.to_device(tokens), self.to_device(segment))
        hidden = self.backbone(self.blanked(x, spoken))[:, :-1].flatten(0, 1)
        return self.chain(hidden[self.to_device(rows)], frame[:, :-1]), frame

    def forward(self, tokens, segment):
        state, frame = self.states(tokens, segment)
        losses, correct = multi_codebook_cross_entropy(state, self.heads, frame)
        loss = (losses * self.config.loss_decay ** torch.arange(len(losses), device=losses.device)).mean()
        counts = torch.full_like(correct, len(frame))
        stats = self.stats(loss, len(frame), losses * len(frame), correct, counts)
        if not self.training:
            ends = state[frame[:, 0] == self.config.codebook_size, 0]
            stats["stop_missed"] = (((ends @ self.heads[0].T).argmax(-1) != self.config.codebook_size).sum(), len(ends))
        return loss, stats

    def teacher_forced_logits(self, text, codes):
        return torch.einsum("nkd,kvd->nkv", self.states(*self.rows(text, codes))[0], self.heads)

    def head_weights(self):
        V = self.config.codebook_size
        return [(head[: V + (k == 0)], None) for k, head in enumerate(self.heads)]  # only codebook 0 may end it

    @torch.no_grad()
    def opening(self, text, prompt=None, codes=None):
        return self.embed(*self.begun(text, prompt, codes)), None, 0

    @torch.no_grad()
    def step(self, stage):
        stage.begin()
        state = self.backbone(stage.x, stage.cache)[:, -1]
        frame = stage.made.new_zeros(len(state), 0)
        for k, score in enumerate(stage.scorers):
            code = stage.choose(score(self.chain(state, frame)[:, -1]), k)
            frame = torch.cat([frame, code[:, None]], 1)
        stage.x.copy_(self.code_embedding(frame + self.offset).sum(1, keepdim=True))
        stage.commit(frame, frame[:, 0] == self.config.codebook_size)
