"""Digits with a family of one's own, see chain.py."""

data_dir = "tokens"
out_dir = "out"
arch = "chain"
backbone = dict(n_layer=2, n_head=2, n_kv_head=2, d_model=64, d_ff=128, rope_theta=10_000.0)
loss_decay = 0.8
frame_dropout = 0.3
max_tokens = 1000
max_iters = 20
learning_rate = 1e-2
warmup_iters = 5
eval_interval = 10
eval_samples = 1
log_interval = 1
temperature = 0.0
device = "cpu"
