"""Marvis TTS learns the voice of Elise, as its authors fine-tune: backbone frozen, depth decoder on all frames.

    python prepare.py config/elise.py --sources=elise/metadata.csv    # or Marvis' own shards: --sources="elise/*.tar"
    torchrun --nproc_per_node=1 train.py config/elise.py
    python sample.py config/elise.py --text "..." --reference elise/wavs/001.wav --reference_text "..."

Elise is about three hours of one English speaker (MrDragonFox/Elise on the hub). The weights and the tokenizer come
from Marvis-AI/marvis-tts-250m-v0.1, the codec from kyutai/mimi. Numbers marked "Marvis" stand in its repository's
configs/train_cuda_finetune.json or train.py.

1,000 steps hear about 131 hours of audio. The dry run counts 14 GB of memory and, for
checkpoints, 6.5 GB of disk; how long it takes, it measures on your machine. Not tried on a GPU.
"""

# prepare.py
sources = "elise/metadata.csv"
data_dir = "data/elise/tokens"
codec = "mimi"  # 32 codebooks of 2,048 at 12.5 frames/s
tokenizer = "weights/marvis-tts-250m-v0.1/tokenizer.json"  # SmolLM2's
vocab_size = 49152  # its size; only a dry run without data needs it here
text_format = "[0]{text}"  # Marvis: speaker 0 before the text, without a space
front_end = "none"  # Marvis: texts as they are written
val_fraction = 0.02

# train.py
init_from = "weights/marvis-tts-250m-v0.1"
out_dir = "out/elise"
arch = "csm"
backbone = "llama-250M"  # Marvis: backbone_flavor
decoder = "llama-60M"  # Marvis: decoder_flavor
decoder_fraction = 1.0  # Marvis: all frames of a small set; 0.125 in pre-training
decoder_chunk = 512  # frames per chunk: 2 GB of activations; take fewer on a smaller GPU
decoder_loss_weight = 1.0  # Marvis: the two losses are added
prompt_style = "joined"  # Marvis: voice_match, a reference and the text to speak are one segment
freeze = ["^backbone"]  # Marvis: freeze_backbone
max_tokens = 8000  # Marvis
max_batch = 64  # Marvis
gradient_accumulation_steps = 1  # Marvis
learning_rate = 1e-4  # Marvis: for fine-tuning; 3e-4 for pre-training
beta1, beta2 = 0.9, 0.95  # Marvis
weight_decay = 1e-2  # Marvis: on matrices only
grad_clip = 1.0  # Marvis
lr_schedule = "cosine"  # Marvis: linear warm-up, then cosine
min_lr = 1e-8  # Marvis: eta_min
warmup_iters = 100  # Marvis warms up for 5,000 of 2,000,000 steps; three hours are 20 steps an epoch
max_iters = 1000  # 40 to 50 epochs of the three hours
eval_interval = 100
dtype = "bfloat16"  # Marvis

# sample.py
temperature = 0.9  # as CSM's authors sample
top_k = 50  # likewise
