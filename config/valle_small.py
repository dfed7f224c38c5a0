"""VALL-E v2 at the size of nemo-smaller-44khz-llama-8, and as its author trained it.

    python prepare.py config/valle_small.py --sources=my/metadata.csv
    torchrun --nproc_per_node=4 train.py config/valle_small.py
    python sample.py config/valle_small.py --text "..." --reference me.wav --reference_text "what I say in it"

What is not said otherwise is the author's: docs/models_v2.md and data/config.yaml of e-c-k-e-r/vall-e. The model reads
phonemes: `pip install phonemizer==3.3.0` and espeak-ng make them, data/tokenizer.json of the author's repository reads
them. `--init_from=weights/vall-e/models/ckpt/NAME` goes on from his weights; stretched_text does not count then, as
these were trained without.

400,000 steps hear about 35,542 hours of audio. The dry run counts 1.9 GB of memory and, for
checkpoints, 1.1 GB of disk; how long it takes, it measures on your machine. Not tried on a GPU.
"""

# prepare.py
data_dir = "data/valle/tokens"
codec = "audiocodec44k"  # 8 codebooks of 1,000 (FSQ), 86 frames a second
tokenizer = "weights/vall-e/tokenizer.json"  # data/tokenizer.json of his repository
vocab_size = 256  # its size; only a dry run without data needs it here
text_format = "{text}"  # the voice comes from the prompt
front_end = "phonemes"
language = "en"  # of rows that name none
min_seconds = 2.0  # his first stage: utterances of 2 to 8 seconds, then up to 12
max_seconds = 8.0

# train.py: 12 layers, width 512, 8 heads
out_dir = "out/valle_small"
arch = "valle"
mode = "nar"
backbone = "valle-60M"
mask_ratio = 0.8  # "fixed mask ratio proves to be better"
text_dropout = 0.02  # cfg_cond_dropout_p
level_weights = "normal"  # audio_level_loss_factors; "equal" once it speaks
random_level = False  # resp_parallel_training; his smaller model began with one level at a time
length_loss_weight = 0.1  # ours: he trains the length as a task of its own
voice_prompt = 0.99  # 1 - cfg_prom_dropout_p
reference_seconds = [3.0, 6.0]  # prompt_duration_range; he adds further utterances to a short one, here it is repeated
dropout = 0.1  # his is in the attention, ours on the residual of each layer
recompute = True  # gradient_checkpointing
max_batch = 8  # utterances of each of 4 GPUs
max_tokens = 16000  # 8 utterances of 8 s, with prompts as long, at 86 frames a second
gradient_accumulation_steps = 4  # a GPU each
max_iters = 400000  # afterwards he trains on durations and longer utterances
learning_rate = 1e-4
beta1 = 0.8
beta2 = 0.95
weight_decay = 0.01
grad_clip = 1.0  # gradient_clipping
lr_schedule = "constant"  # "linear warmup to 5K steps before holding"
warmup_iters = 5000
eval_interval = 5000  # evaluation.frequency
dtype = "float16"  # with loss scaling, on V100s; "training under bfloat16 will cause the gradient norm to slowly grow"

# sample.py
rounds = 25  # max_steps
guidance = 2.5  # minimum_cfg_strength
whole_frames = False  # each level by itself
temperature = 0.0  # "greedy sampling is very, very much preferred"
