"""Digits with VALL-E, one frame after the other: all codebooks of a frame at once.

    python prepare.py config/digits_valle_ar.py && python train.py config/digits_valle_ar.py
    python sample.py config/digits_valle_ar.py --text "three one four"

About ten minutes on two CPU cores. The dry run counts 0.13 GB of memory beside Python
and torch, and 0.04 GB of disk for checkpoints.
"""

# prepare.py, as in config/digits_kani.py: the two share their tokens
sources = "data/digits"
heldout = "data/digits/heldout.txt"
data_dir = "data/digits/tokens_2x2048"
text_format = "{speaker}: {text}"
vocab_size = 400
codec = "mel"
codec_args = {"n_codebooks": 2, "codebook_size": 2048, "sample_rate": 16000, "frame_rate": 12.5}
fit_seconds = 1200.0

# train.py
out_dir = "out/digits_valle_ar"
arch = "valle"
mode = "ar"
backbone = dict(
    n_layer=4, n_head=4, n_kv_head=4, d_model=128, d_ff=384,
    rope_theta=10_000.0, feed_forward="geglu", final_norm=False, norm_eps=1e-6,
)  # fmt: skip
shared_heads = True
frame_dropout = 0.6
level_weights = "decreasing"  # the first codebooks say which word it is
max_tokens = 2000
max_batch = 64
max_iters = 2000
learning_rate = 3e-3
muon = True
min_lr = 1.5e-4
warmup_iters = 100
eval_interval = 500

# sample.py, and the samples spoken at each evaluation
temperature = 0.0
