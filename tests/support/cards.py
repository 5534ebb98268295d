"""What a test of the GPU needs, and where it runs."""

from __future__ import annotations

import importlib.util

import pytest
import torch

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="there is no CUDA device")]
"""A file's `pytestmark`."""
NEEDS_TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device, and this takes two")
NEEDS_BITSANDBYTES = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is missing"
)
