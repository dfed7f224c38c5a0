"""KaniTTS learns a voice or a language by LoRA, as its authors fine-tune it.

    python prepare.py config/kani_lora.py --sources=my/metadata.csv    # or the authors' codes: "nano/*.parquet", .jsonl
    python train.py config/kani_lora.py
    python sample.py config/kani_lora.py --text "..."

The weights and the tokenizer come from nineninesix/kani-tts-450m-0.2-pt, the codec from
nvidia/nemo-nano-codec-22khz-0.6kbps-12.5fps. Numbers marked "README" stand in the README of the authors'
KaniTTS-Finetune-pipeline, as "recommended" or in its first example, those marked "experiments" in its
config/experiments.yaml. Their heavier variant there: rank and alpha 32, all linear layers ("all-linear"), 2e-5, one
epoch.

It passes over the data as often as `epochs` says. The dry run counts 3.8 GB of memory and, for
checkpoints, 0.07 GB of disk; how long it takes, it measures on your machine. Not tried on a GPU.
"""

# prepare.py
data_dir = "data/kani_lora/tokens"
codec = "nanocodec"  # 4 codebooks of 4,032 at 12.5 frames/s
tokenizer = "weights/kani-tts-450m-0.2-pt/tokenizer.json"  # LFM2's
vocab_size = 64400  # its size; only a dry run without data needs it here
text_format = "{speaker}: {text}"  # README: for several speakers; "{text}" is enough for one
front_end = "none"  # dataset_processor.py: texts as they are written
max_seconds = 12.0  # README: max_duration_sec

# train.py
init_from = "weights/kani-tts-450m-0.2-pt"
out_dir = "out/kani_lora"
arch = "kani"
backbone = "lfm2-350M"  # the released one
loss_on = "all"  # dataset_processor.py: the labels are the whole sequence
drop_repeats = True  # README: removes consecutive duplicate frames; as the base was trained
lora_rank = 16  # README: start with 16
lora_alpha = 16.0  # README: the same value as the rank
lora_dropout = 0.1  # README
lora_rs = True  # README: use_rslora
lora_targets = ["[qv]_proj", "gate_proj", "up_proj", "down_proj"]  # README: q_proj, v_proj, w1, w3, w2, "balanced"
max_batch = 4  # README: one utterance at a time, gradients of four
max_tokens = 3200  # four of 12 s with 190 text ids each
gradient_accumulation_steps = 1
epochs = 2  # README; of 2,000 utterances, about three hours, these are 1,000 steps
learning_rate = 5e-5  # README
lr_schedule = "cosine"  # README
min_lr = 0.0  # transformers' cosine
warmup_share = 0.1  # README: warmup_ratio
beta1, beta2 = 0.9, 0.999  # README: adamw_torch, with its own
weight_decay = 0.02  # experiments
grad_clip = 1.0  # experiments
eval_interval = 100
dtype = "bfloat16"  # README: bf16; the weights stay float32

# sample.py
temperature = 0.6  # config/inference_config.yaml
top_k = 50  # transformers' default
top_p = 0.95  # config/inference_config.yaml
repetition_penalty = 1.1  # config/inference_config.yaml
