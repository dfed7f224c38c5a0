"""Tensors here are tiny, and threads that spin while they wait for each other slow down whatever runs beside them."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():  # Triton reads this once, on import: its kernels then run on a CPU, line by line
    os.environ.setdefault("TRITON_INTERPRET", "1")
