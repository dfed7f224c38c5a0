"""Tensors here are tiny, and threads that spin while they wait for each other slow down whatever runs beside them."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
