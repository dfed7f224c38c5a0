"""Strings of digits, as config/digits.py has them, read aloud by an XTTS: one code a frame, the voice off a recording.

    python data/digits/prepare.py && python prepare.py config/digits_xtts.py && python train.py config/digits_xtts.py
    python sample.py config/digits_xtts.py --text "three one four"

About ten minutes on two CPU cores. The dry run counts 0.11 GB of memory beside Python
and torch, and 0.02 GB of disk for checkpoints.
"""

# prepare.py
sources = "data/digits"
heldout = "data/digits/heldout.txt"
data_dir = "data/digits/tokens_xtts"
text_format = "[{speaker}] {text}"  # the space makes each word the same token, the first one too
vocab_size = 400
codec = "mel"
codec_args = {"n_codebooks": 1, "codebook_size": 1024, "sample_rate": 16000, "frame_rate": 20, "n_mels": 40}
fit_seconds = 1200.0
references = True  # 200 bytes a frame

# train.py: a GPT-2 of 0.8M parameters, conditioning layers of 0.3M
out_dir = "out/digits_xtts"
arch = "xtts"
backbone = dict(
    n_layer=4, n_head=4, n_kv_head=4, d_model=128, d_ff=512, rope_theta=0.0, feed_forward="gelu", bias=True
)
n_latents = 4
conditioning_layers = 1
perceiver_layers = 1
perceiver_heads = 2
text_positions = 64
code_positions = 256
reference_seconds = [0.5, 1.0]
voice_prompt = 1.0  # reference: another recording of the speaker, so that all frames of short ones are targets
frame_dropout = 0.6  # hides most input frames, so that the next word must come from the text
max_tokens = 3000
max_batch = 64
max_iters = 2000
learning_rate = 3e-3
muon = True
min_lr = 1.5e-4
warmup_iters = 100
eval_interval = 500

# sample.py, and the samples spoken at each evaluation
temperature = 0.0  # the likeliest code: so small a model speaks most clearly without sampling
repetition_penalty = 1.0
