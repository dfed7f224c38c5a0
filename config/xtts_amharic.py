"""XTTS-v2 learns Amharic, a language and a script it does not know, from recordings of one's own.

    python prepare.py config/xtts_amharic.py --sources=my/metadata.csv
    python train.py config/xtts_amharic.py
    python sample.py config/xtts_amharic.py --text "..." --reference me.wav

Text goes in as it is written, in pieces learnt from it (BPE), without a step from letters to sounds. The weights, the
vocabulary and the codec come from coqui/XTTS-v2 on the hub: model.pth, config.json, vocab.json, dvae.pth,
mel_stats.pth. Numbers marked "XTTS" stand in its training recipe (TTS/recipes/ljspeech/xtts_v2 and the data set beside
its trainer), those marked "XTTS_V2" in train.py of gokhaneraslan/XTTS_V2, those marked "Amharic" in the analysis of
BPE training and utils/ of Diakonrobel/Amharic_XTTS-V2_TTS, those marked "new languages" in the guide of
nguyenhoanganh2002/XTTSv2-Finetuning-for-New-Languages.

It passes over the data as often as `epochs` says. The dry run counts 9 GB of memory and, for
checkpoints, 6.6 GB of disk; how long it takes, it measures on your machine. Not tried on a GPU.
"""

# prepare.py
sources = "amharic/metadata.csv"
data_dir = "data/amharic/tokens"
codec = "xtts"  # one codebook of 1,024 at 21.5 frames/s
codec_path = "weights/xtts-v2"
fit_epochs = 0  # new languages: 5, as an option, and not needed with 20 hours; the codec then is 0.2 GB of a checkpoint
references = True  # XTTS reads the voice from a recording
tokenizer = "weights/xtts-v2/vocab.json"
extend_vocab = 2000  # pieces for the new language; the characters of its script are about 500 of them
vocab_size = 8681  # 6,681 of XTTS and those; only a dry run without data needs it here
text_format = "[{language}]{text}"  # XTTS: the language in brackets
language = "am"
front_end = "xtts"  # XTTS: lower case, single spaces; it has no words for the numbers of Amharic, so write them out
min_seconds = 0.5  # XTTS: leaves out shorter recordings
max_seconds = 11.6  # XTTS: max_wav_length, 255,995 samples at 22,050 Hz
max_text_tokens = 200  # XTTS: max_text_length
val_fraction = 0.1  # XTTS_V2: eval_split_size

# train.py
init_from = "weights/xtts-v2"
out_dir = "out/xtts_amharic"
arch = "xtts"
backbone = "gpt2-xtts"  # XTTS
dropout = 0.1  # XTTS: GPT-2's own
freeze = None  # Amharic: below 3,000 utterances only the last two layers and the text's tables are trained
text_loss_weight = 0.01  # XTTS: gpt_loss_text_ce_weight
reference_seconds = [3.0, 6.0]  # XTTS: min_conditioning_length and max_conditioning_length
voice_prompt = 0.0  # XTTS: the reference is a stretch of the utterance itself, whose codes are no targets
max_batch = 4  # XTTS_V2, Amharic
max_tokens = 2048  # room for four of the longest: 250 codes, 200 text ids and marks
gradient_accumulation_steps = 128  # XTTS_V2, Amharic; XTTS advises 252 utterances a step or more
learning_rate = 5e-6  # XTTS
beta1, beta2 = 0.9, 0.96  # XTTS
weight_decay = 1e-2  # XTTS: on matrices only
grad_clip = 0.0  # XTTS: its trainer's default
lr_schedule = "multistep"  # XTTS: MultiStepLR
milestones = [50000, 150000, 300000]  # Amharic; XTTS has 18 times as many, one for each batch of its 18 in a step
milestones_in = "batches"  # steps 391, 1,172 and 2,344 of 128 batches each
gamma = 0.5  # XTTS
warmup_iters = 0  # XTTS: none
epochs = 100  # XTTS_V2; of 3,000 utterances 586 steps; best.pt is that of the lowest held-out loss
eval_interval = 25  # four epochs of as many
dtype = "float32"  # XTTS: mixed_precision is off

# sample.py: XTTS, the defaults in its config.json
temperature = 0.75
top_k = 50
top_p = 0.85
repetition_penalty = 5.0
