"""KaniTTS-2 learns a language or an accent: all its weights, as its authors train it.

    python prepare.py config/kani2.py --sources="nano/*.parquet"       # the authors' codes; or recordings of one's own
    python train.py config/kani2.py
    python sample.py config/kani2.py --text "..." --reference me.npy   # or --speaker, one of the training data

A speaker's vector comes from the column speaker_emb or from the folder speaker_vectors; without any the model trains
and speaks without. The authors make them with the encoder nineninesix/speaker-emb-tbr, which is not here: its package
kani-tts-2 saves them by torch.save. The weights and the tokenizer come from nineninesix/kani-tts-2-pt, the codec from
nvidia/nemo-nano-codec-22khz-0.6kbps-12.5fps. Numbers marked "configs" stand in configs/ of the authors' repository
kani-tts-2-pretrain, those marked "README" in the README of their KaniTTS-Finetune-pipeline. From LFM2 they train with
9e-4 and 2,000 steps of warm-up, the rotation speeds with 1.5 times that; here all parameters have one rate.

It passes over the data as often as `epochs` says. The dry run counts 9.2 GB of memory and, for
checkpoints, 5.5 GB of disk; how long it takes, it measures on your machine. Not tried on a GPU.
"""

# prepare.py
data_dir = "data/kani2/tokens"
codec = "nanocodec"  # 4 codebooks of 4,032 at 12.5 frames/s
tokenizer = "weights/kani-tts-2-pt/tokenizer.json"  # LFM2's
vocab_size = 64400  # its size; only a dry run without data needs it here
text_format = "{language}: {text}"  # dataset_processor.py: language_tag, in lower case; without tags "{text}"
front_end = "none"  # dataset_processor.py: texts as they are written
language = "en"
max_seconds = 40.0  # configs: max_duration_sec

# train.py
init_from = "weights/kani-tts-2-pt"
out_dir = "out/kani2"
arch = "kani"
backbone = "lfm2-kani2"  # the released one: LFM2-350M, rotation speeds from 0.1 to 2
audio_step = 1.0  # configs
loss_on = "all"  # dataset_processor.py: the labels are the whole sequence
drop_repeats = True  # dataset_processor.py removes consecutive duplicate frames
max_batch = 6  # configs
max_tokens = 14000  # six of 40 s with 300 text ids each
gradient_accumulation_steps = 6  # configs
epochs = 5.0  # configs
learning_rate = 5e-5  # README, for trained weights
lr_schedule = "cosine"  # configs
min_lr = 0.0  # transformers' cosine
warmup_share = 0.1  # README: warmup_ratio
beta1, beta2 = 0.9, 0.999  # configs: adamw_torch_fused, with its own
weight_decay = 0.0  # transformers' default
grad_clip = 3.0  # configs
eval_interval = 250
dtype = "bfloat16"  # configs: bf16; the weights stay float32

# sample.py: the defaults of the authors' package
temperature = 1.0
top_k = 50  # transformers' default
top_p = 0.95
repetition_penalty = 1.1
