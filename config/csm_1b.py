"""Sesame CSM-1B learns a voice or a language from recordings of one's own.

    python prepare.py config/csm_1b.py --sources=my/metadata.csv
    python train.py config/csm_1b.py
    python sample.py config/csm_1b.py --text "..."

The weights and the tokenizer come from sesame/csm-1b, the codec from kyutai/mimi. Numbers marked "sesame-finetune"
stand in configs/finetune_param_defaults.yaml or train.py of knottwill/sesame-finetune, which trains all weights; those
marked "Sesame" in the model's own code.

20,000 steps hear about 444 hours of audio. The dry run counts 25 GB of memory and, for
checkpoints, 23 GB of disk; how long it takes, it measures on your machine. Not tried on a GPU.
"""

# prepare.py
data_dir = "data/csm_1b/tokens"
codec = "mimi"  # 32 codebooks of 2,048 at 12.5 frames/s
tokenizer = "weights/csm-1b/tokenizer.json"  # Llama 3.2's
vocab_size = 128256  # its size; only a dry run without data needs it here
text_format = "[{speaker}]{text}"  # Sesame: speakers are numbers in brackets; a new voice may have any name
front_end = "none"  # Sesame: texts as they are written

# train.py
init_from = "weights/csm-1b"
out_dir = "out/csm_1b"
arch = "csm"
backbone = "llama-1B"  # Sesame
decoder = "llama-100M"  # Sesame
decoder_fraction = 0.0625  # Sesame: compute amortisation, 1/16 of the frames
decoder_loss_weight = 1.0  # sesame-finetune: 0.5 of each loss, and twice the sum
max_tokens = 2048  # one utterance of 90 s, or eight of 12 s as sesame-finetune's batch of 8
max_batch = 8  # sesame-finetune
gradient_accumulation_steps = 1  # sesame-finetune
learning_rate = 3e-5  # sesame-finetune
beta1, beta2 = 0.9, 0.999  # sesame-finetune: AdamW's own
weight_decay = 0.002  # sesame-finetune
grad_clip = 1.3  # sesame-finetune
lr_schedule = "linear"  # sesame-finetune
warmup_iters = 1000  # sesame-finetune
max_iters = 20000  # sesame-finetune: 25 to 50 epochs, of some thousand utterances
eval_interval = 500
dtype = "bfloat16"  # of the arithmetic; the weights stay float32
sparse_embeddings = True  # the two tables are 400M of the 1,630M parameters, and a step touches a few thousand rows
recompute = True  # weights, gradients and moments alone are 25 GB

# sample.py
temperature = 0.9  # Sesame
top_k = 50  # Sesame
