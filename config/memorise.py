"""The first thing to try on recordings of one's own: can a small model learn them by heart?

    python prepare.py config/memorise.py --sources=my/metadata.csv
    python train.py config/memorise.py

If codebook 0 does not come above 0.95 accuracy on the training data, something is wrong with data or code, and no
amount of training will help. Held-out loss goes the other way meanwhile, and train.py says so.

Some minutes on two CPU cores, not measured. The dry run counts 0.08 GB of memory beside Python
and torch, and 0.02 GB of disk for checkpoints.
"""

# prepare.py
data_dir = "data/memorise/tokens"
codec = "mel"
codec_args = {"n_codebooks": 8, "codebook_size": 256, "sample_rate": 24000, "frame_rate": 20}
vocab_size = 512
val_fraction = 0.1

# train.py
out_dir = "out/memorise"
arch = "csm"
backbone = dict(n_layer=4, n_head=4, n_kv_head=4, d_model=128, d_ff=384, rope_theta=10_000.0)
decoder = dict(n_layer=2, n_head=4, n_kv_head=4, d_model=96, d_ff=256, rope_theta=10_000.0)
decoder_fraction = 0.25
max_tokens = 1000
max_iters = 500
learning_rate = 3e-3
weight_decay = 0.0  # nothing that works against memorising
lr_schedule = "constant"
warmup_iters = 50
eval_interval = 100
