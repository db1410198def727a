"""Configs: what is refused when one is made, and the sizes of the presets."""

import json
import math

import numpy as np
import pytest
import torch
from common import bad
from hypothesis import given, settings
from hypothesis import strategies as st

import magi

GOOD = dict(num_steps=16)

BAD_SETTINGS = [
    (dict(num_steps=10), "steps 10 must be a multiple of the window 4: try 8"),
    (
        dict(num_steps=4, kv_ranges=(3, 2, 1)),
        "steps 4 must be a multiple of the number of kv_ranges .3. and of the window 4: try 12",
    ),
    (dict(height=500), "height 500 must be a multiple of 16, 32 to 16384: the nearest is 496"),
    (dict(width=8), "width 8 .* nearest is 32"),
    (dict(width=10**10), "width 10000000000 .* nearest is 16384"),
    (dict(num_steps=400_000_000), "steps 400000000 are too many"),
    (dict(num_frames=0), "num_frames 0"),
    (dict(num_frames=10**400), "must be at least 1, and below 2..63"),
    (dict(height=10**400), "a multiple of 16, 32 to 16384: the nearest is 16384"),
    (dict(window=0), "window 0"),
    (dict(special_tokens=("hd",)), "unknown special token 'hd': choose from static"),
    (dict(negative_tokens=("hq",)), "unknown negative token 'hq'"),
    (dict(kv_ranges=(0,)), "at least 1"),
    (dict(text_scales=(1.0,)), "one length"),
    (dict(shortcut_mode="8,8"), "'8,8'"),
    (dict(seed=-1), "seed -1"),
    (dict(clean_kv_range=0), "clean_kv_range 0"),
    (dict(fps=0), "fps 0"),
    (dict(num_steps=16.0), "num_steps 16.0 must be a whole number"),
    (dict(seed=None), "seed None must be a whole number"),
    (dict(num_frames=50.5), "num_frames 50.5"),
    (dict(kv_ranges=(2.5,)), "kv_ranges .2.5,. must all be whole"),
    (dict(clean_t=math.nan), "clean_t nan"),
    (dict(cfg_t=(0.0, math.nan), prev_scales=(1.0, 1.0), text_scales=(1.0, 1.0)), "rise from t = 0"),
    (dict(text_scales=(7.5, 7.5, math.inf, 0.0, 0.0)), "be finite"),
    (dict(text_scales=7.5), "text_scales 7.5 must be a tuple, such as .7.5, 7.5"),
    (dict(kv_ranges=5), "kv_ranges 5 must be a tuple"),
    (dict(special_tokens="hq"), "special_tokens 'hq' must be a tuple"),
    (dict(special_tokens=None), "special_tokens None must be a tuple"),
    (dict(nearly_clean_t="0.3"), "nearly_clean_t '0.3' must be a number"),
    (dict(num_steps=12, window=3, kv_ranges=(2,), distilled=True), "window 3 must be 1, 2 or 4"),
]


@pytest.mark.parametrize("change, message", BAD_SETTINGS, ids=lambda v: str(v)[:40])
def test_bad_settings_are_refused_when_the_config_is_made(change, message):
    with bad(message):
        magi.SamplerConfig(**GOOD | change)


@pytest.mark.parametrize("kind", [np.int64, np.array, torch.tensor])
def test_whole_numbers_of_numpy_and_pytorch_are_pythons(kind):
    """A run with such a seed failed where the noise was drawn, a config with such num_steps where it was
    checked."""
    plain = magi.SamplerConfig(num_steps=16)
    for name in ("num_steps", "window", "clean_kv_range", "num_frames", "height", "width", "fps", "seed"):
        cfg = magi.SamplerConfig(**GOOD | {name: kind(getattr(plain, name))})
        assert cfg == plain and type(getattr(cfg, name)) is int, name
        with bad(f"{name} .*0.5.* must be a whole number"):
            magi.SamplerConfig(**GOOD | {name: kind(0.5) if kind is not np.int64 else np.float64(0.5)})
    magi.chunk_noise(magi.SamplerConfig(seed=kind(5)).seed, 0, (1,))


@settings(max_examples=60)
@given(st.integers(1, 70), st.integers(1, 8), st.integers(0, 6))
def test_steps_are_accepted_exactly_if_divisible_and_the_advice_is_right(n, window, r):
    ranges = tuple(range(1, r + 1))
    try:
        magi.SamplerConfig(num_steps=n, window=window, kv_ranges=ranges)
        ok = True
    except ValueError as error:
        ok = False
        advice = int(str(error).rsplit("try ", 1)[1])
        assert advice % window == 0
    assert ok == (n % window == 0 and (not r or n % r == 0))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_fp8_model_computes_in_bfloat16(tmp_path, dtype):
    """Another dtype was an error within PyTorch at the first forward."""
    (tmp_path / "config.json").write_text(json.dumps({"dit": {"fp8": True}}))
    with bad(f"dtype '{dtype}' is not that of an fp8 model, which computes in 'bfloat16'"):
        magi.load_dit(tmp_path, dtype=dtype)


def test_parameter_counts_of_the_zoo():
    counts = {
        "4.5B-base": 4_459_898_128,
        "24B-base": 23_899_281_936,
        "4.5B-distill-fp8": 4_460_979_760,
        "24B-distill-fp8": 23_902_014_382,
    }
    with torch.device("meta"):
        for name, count in counts.items():
            assert sum(v.numel() for v in magi.DiT(magi.PRESETS[name].dit).state_dict().values()) == count, (
                name
            )
        assert sum(p.numel() for p in magi.VAE(magi.VAEConfig()).parameters()) == 613_755_239
