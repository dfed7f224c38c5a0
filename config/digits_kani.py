"""Digits with Kani: the codes of two codebooks in a row with the text, one small LFM2 that predicts them all.

    python data/digits/prepare.py && python prepare.py config/digits_kani.py && python train.py config/digits_kani.py
    python sample.py config/digits_kani.py --text "three one four"

About ten minutes on two CPU cores. The dry run counts 0.18 GB of memory beside Python
and torch, and 0.02 GB of disk for checkpoints.
"""

# prepare.py
sources = "data/digits"
heldout = "data/digits/heldout.txt"
data_dir = "data/digits/tokens_2x2048"
text_format = "{speaker}: {text}"  # as in KaniTTS
vocab_size = 400
codec = "mel"
codec_args = {"n_codebooks": 2, "codebook_size": 2048, "sample_rate": 16000, "frame_rate": 12.5}  # 25 tokens a second
fit_seconds = 1200.0

# train.py: a backbone of 1.1M parameters, an embedding of 0.6M
out_dir = "out/digits_kani"
arch = "kani"
backbone = dict(
    n_layer=5, layers="cacaa", n_head=4, n_kv_head=4, d_model=128, d_ff=384, rope_theta=1_000_000.0, qk_norm=True
)
loss_on = "codebook"
frame_dropout = 0.6  # hides most input frames, so that the next word must come from the text
max_tokens = 3000
max_batch = 32
max_iters = 2500
learning_rate = 3e-3
muon = True
min_lr = 1.5e-4
warmup_iters = 100
eval_interval = 500

# sample.py, and the samples spoken at each evaluation
temperature = 0.0  # the likeliest code: so small a model speaks most clearly without sampling
