"""Settings and fixtures of test_magi.py, tests/ and tiny/test_world.py; helpers are in tests/common.py."""

import contextlib
import functools
import gc
import os
import sys

import pytest
from hypothesis import settings

# What takes seconds to import is imported below: the process that only deals out the tests needs none of it.
# The models are small: threads would only wait for each other on a busy machine. Commands that tests start
# read the variable. Without it each counts the idle cores, and another number of threads rounds differently.
os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("repeatable", derandomize=True, deadline=None)  # the same examples in every clone
settings.load_profile("repeatable")


@functools.cache
def keep_imports(transformers: bool) -> None:
    """A run that drops T5 collects garbage. To look at all that is imported would take a third of a second,
    each time: from here on that is left out. Called once the tests are imported, and once transformers is.
    """
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item):
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)  # a test draws the same numbers alone and among others
    keep_imports("transformers" in sys.modules)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A model of random weights; beside it are vae, t5 and inputs: image.png, clip.mp4 (40 frames),
    text.safetensors (a caption of random numbers, so that nobody waits for T5)."""
    import numpy as np
    import torch
    from common import FOLDER_DIT, FOLDER_VAE, shades, write_folder, write_model, write_t5
    from PIL import Image
    from safetensors.torch import save_file

    import magi
    import media

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
    import magi

    pytest.importorskip("triton")
    module = magi.load_kernels()
    assert module.INTERPRETED, "Triton was imported before TRITON_INTERPRET was set"
    return module


@pytest.fixture
def no_interpreter(monkeypatch):
    """Without a GPU kernels.py works in Triton's interpreter alone, which other tests in this process may
    have asked for. Here it is as a user finds it."""
    import magi

    with contextlib.suppress(ImportError):
        kernels = magi.load_kernels()
        import kernel_choice

        monkeypatch.setattr(kernels, "INTERPRETED", False)
        monkeypatch.setattr(kernels, "arch_of", kernels.arch_of.__wrapped__)  # it remembers what it found
        kernel_choice.get_ops.cache_clear()
