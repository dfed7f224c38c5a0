"""The main road: a model that reads strings of digits aloud, trained in minutes on a laptop's CPU.

    python data/digits/prepare.py && python prepare.py config/digits.py && python train.py config/digits.py
    python sample.py config/digits.py --text "three one four"

About eleven minutes on two CPU cores. The dry run counts 0.15 GB of memory beside Python
and torch, and 0.02 GB of disk for checkpoints.
"""

# prepare.py
sources = "data/digits"
heldout = "data/digits/heldout.txt"
data_dir = "data/digits/tokens"
text_format = "[{speaker}] {text}"  # the space makes each word the same token, the first one too
vocab_size = 400
codec = "mel"
codec_args = {"n_codebooks": 4, "codebook_size": 512, "sample_rate": 16000, "frame_rate": 12.5}
fit_seconds = 600.0

# train.py: a backbone of 0.9M parameters, a depth decoder of 0.2M
out_dir = "out/digits"
arch = "csm"
backbone = dict(n_layer=4, n_head=4, n_kv_head=4, d_model=128, d_ff=384, rope_theta=10_000.0)
decoder = dict(n_layer=2, n_head=4, n_kv_head=4, d_model=96, d_ff=256, rope_theta=10_000.0)
decoder_fraction = 0.5  # 0.25 gives a quarter more word errors: all codebooks must be clear
decoder_chunk = 0  # all at once: so small a model needs no chunks
frame_dropout = 0.6  # hides most input frames, so that the next word must come from the text
max_tokens = 2000
max_batch = 64
max_iters = 2250
learning_rate = 6e-3  # 3e-3 with a cosine schedule to 1.5e-4 gives half as many word errors again
lr_schedule = "linear"  # to 0
muon = True
warmup_iters = 100
eval_interval = 750

# sample.py, and the samples spoken at each evaluation
temperature = 0.0  # the likeliest code: so small a model speaks most clearly without sampling
