"""Tensors here are tiny, and threads that spin while they wait for each other slow down whatever runs beside them."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():  # Triton reads this once, on import: its kernels then run on a CPU, line by line
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.register_assert_rewrite("helpers")

settings.register_profile("quick", max_examples=15, deadline=None, derandomize=True)
settings.register_profile("full", max_examples=100, deadline=None)
settings.load_profile("quick")  # --hypothesis-profile=full loads the other


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)  # in whatever order and process the tests run
    torch.set_num_threads(1)  # more threads add in another order, which changes codes near a border


@pytest.fixture(scope="session")
def tokens(tmp_path_factory):
    """A token folder of 30 and 5 small utterances, which no test changes."""
    from helpers import write_tokens

    return write_tokens(tmp_path_factory.mktemp("data") / "tokens")


@pytest.fixture
def espeak():
    """phonemizer's espeak-ng, which this machine may lack."""
    espeak = pytest.importorskip("phonemizer.backend").EspeakBackend
    if not espeak.is_available():
        pytest.skip("espeak-ng is not installed")
    return espeak
