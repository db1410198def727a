"""Settings and fixtures of test_magi.py, tests/ and tiny/test_world.py; helpers are in tests/common.py."""

import os

import numpy as np
import pytest
import torch
from common import FOLDER_DIT, FOLDER_VAE, shades, write_folder, write_model, write_t5
from hypothesis import settings
from PIL import Image
from safetensors.torch import save_file

import magi
import media

# The models are small: threads would only wait for each other on a busy machine. Commands that tests start
# read the variable. Without it each counts the idle cores, and another number of threads rounds differently.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("repeatable", derandomize=True, deadline=None)  # the same examples in every clone
settings.load_profile("repeatable")


def pytest_runtest_setup(item):
    torch.manual_seed(0)  # a test draws the same numbers alone and among others


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A model of random weights; beside it are vae, t5 and inputs: image.png, clip.mp4 (40 frames),
    text.safetensors (a caption of random numbers, so that nobody waits for T5)."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    write_folder(root / "vae", magi.VAE(FOLDER_VAE), vae=FOLDER_VAE)
    write_t5(root / "t5", width=FOLDER_DIT.text_dim)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "image.png")
    text = {"text": torch.randn(1, 16, 32), "mask": (torch.arange(16) < 4).long()[None]}
    save_file(text, root / "text.safetensors")
    media.Mp4Writer(root / "clip.mp4", 24).write(shades(range(0, 200, 5)))
    return write_model(root / "base")


@pytest.fixture(scope="session")
def kernels():
    """kernels.py in Triton's interpreter. Triton decides at its own import, so a test file that asks for this
    sets TRITON_INTERPRET at its top. What is compiled ahead is checked in other processes (run_python)."""
    pytest.importorskip("triton")
    module = magi.load_kernels()
    assert module.INTERPRETED, "Triton was imported before TRITON_INTERPRET was set"
    return module
