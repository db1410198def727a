"""Quantising to fp8: layers, calibration, and the shipped model."""

import dataclasses
import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from common import (
    HERE,
    QUICK,
    SMALL,
    assert_refused,
    assert_same,
    bad,
    read_folder,
    relative,
    run_main,
    small,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import convert_weights as cw
import magi

quantize = cw.quantizer()


@given(st.sampled_from(["tensor", "channel"]), st.floats(0, 1), st.integers(0, 1000))
@settings(max_examples=40)
def test_a_quantised_layer_multiplies_like_its_weight(kind, alpha, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(24, 64, generator=generator)
    x = torch.randn(200, 64, generator=generator)
    if kind == "channel":  # outliers a thousand times larger than the rest, in inputs
        x[:, :2] *= 1000 if 0.3 < alpha < 0.7 else 30
    parts = quantize.quantise_layer(weight, x.abs().amax(0), kind, alpha)
    layer = magi.FP8Linear(64, 24, kind)
    assert {k: v.shape for k, v in parts.items()} == {k: v.shape for k, v in layer.state_dict().items()}
    layer.load_state_dict(parts)
    assert relative(layer(x), x @ weight.T) < 0.06
    divide = parts.get("smooth_scale", parts["input_scale"])
    assert 440 < (x / divide).abs().max() <= 448.01 and parts["weight"].float().abs().max() == 448


def test_smoothing_saves_what_an_outlier_would_crush():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(24, 64, generator=generator), torch.randn(200, 64, generator=generator)
    x[:, 0] *= 1e6
    weight[:, 0] *= 1e-6  # a channel with a huge input and a tiny weight matters no more than others
    errors = []
    for kind in ("tensor", "channel"):
        layer = magi.FP8Linear(64, 24, kind)
        layer.load_state_dict(quantize.quantise_layer(weight, x.abs().amax(0), kind))
        errors.append(relative(layer(x), x @ weight.T))
    assert errors[1] < 0.06 < 0.5 < errors[0]


def test_alpha_moves_outliers_into_the_weights():
    torch.manual_seed(0)
    weight, peak = torch.randn(24, 64), 1 + torch.rand(64)
    all_in_weight = quantize.quantise_layer(weight, peak, "channel", 1.0)  # inputs become x / max|x|
    torch.testing.assert_close(all_in_weight["smooth_scale"][0], peak / 448)
    none = quantize.quantise_layer(weight, peak, "channel", 0.0)  # weights become w / max|w|
    assert (none["weight"].float().abs().amax(0) == 448).all()


@pytest.mark.parametrize("kind", ["tensor", "channel"])
def test_channels_that_are_never_used_give_no_nan(kind):
    torch.manual_seed(0)
    weight, x = torch.randn(24, 64), torch.randn(10, 64)
    weight[:, 3] = x[:, 5] = 0
    for w, u in ((weight, x), (weight, 0 * x), (0 * weight, x)):
        layer = magi.FP8Linear(64, 24, kind)
        layer.load_state_dict(quantize.quantise_layer(w, u.abs().amax(0), kind))
        assert layer(u).isfinite().all() and (layer(u) - u @ w.T).norm() <= 0.06 * (u @ w.T).norm()


def test_calibration_finds_the_largest_input_of_every_channel():
    dit, text, mask, _ = small()
    seen = {}
    layers = ["layers.0.attn.q", "layers.0.attn.proj", "layers.1.ffn.fc2"]
    hooks = [
        dit.get_submodule(name).register_forward_pre_hook(
            lambda m, a, name=name: seen.setdefault(name, []).append(a[0])
        )
        for name in layers
    ]

    def run() -> None:
        for size in (1, 3, 2):
            x, t = size * torch.randn(1, 16, 6, 4, 4), torch.tensor([[size / 4]])
            dit(x, t, text[None, None], mask[None, None])

    peaks = quantize.calibrate(dit, layers, run)
    for hook in hooks:
        hook.remove()
    assert peaks.keys() == seen.keys() and not dit.layers[0].attn.q._forward_pre_hooks
    for name, inputs in seen.items():
        assert len(inputs) == 3 and torch.equal(peaks[name], torch.cat(inputs, 1).abs().amax((0, 1)))


def test_calibration_gives_every_prompt_a_seed_and_the_special_tokens(monkeypatch):
    runs, tiny = [], HERE / "tiny"
    listen = lambda dit, text, mask, cfg, special_tokens: (
        runs.append((cfg.seed, text, special_tokens)) or iter(())
    )
    monkeypatch.setattr(magi, "sample", listen)
    cfg = dataclasses.replace(magi.read_config(tiny / "base", "sampler", magi.SamplerConfig), seed=3)
    prompts = ["a red ball", "a blue star"]
    assert quantize.measure(tiny / "base", cfg, prompts, tiny / "t5", "cpu", "torch", []) == {}
    assert [seed for seed, *_ in runs] == [3, 4] and not torch.equal(runs[0][1], runs[1][1])
    tokens = load_file(tiny / "base" / "special_tokens.safetensors")
    assert_same(runs[0][2], {name: token.float() for name, token in tokens.items()})


def test_calibration_refuses_inputs_that_overflow():
    dit = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2)})
    with bad("input of a overflows"):
        quantize.calibrate(dit, ["a"], lambda: dit["a"](torch.tensor([[1.0, math.inf]])))


@pytest.fixture(scope="module")
def quantised_tiny(tmp_path_factory) -> Path:
    """The shipped model in fp8, beside links to its neighbours."""
    root = tmp_path_factory.mktemp("quantised")
    for name in ("t5", "vae"):
        (root / name).symlink_to(HERE / "tiny" / name)
    flags = ["--num-frames", 24, "--num-steps", 8, "--height", 64, "--width", 64]
    flags += ["--prompt", "a red ball bounces", "--prompt", "a blue star"]
    code, out, err = run_main(cw.main, "quantize", HERE / "tiny" / "base", root / "fp8", *flags)
    assert code == 0 and out.startswith("wrote"), err
    return root / "fp8"


def test_a_quantised_model_stays_close_to_the_bf16_one(quantised_tiny):
    """Within 15 % of the bf16 model's latents, with a prompt and a seed it was not calibrated with
    (measured: 1 to 6 %); another seed is some 70 % away."""
    text, mask = magi.T5(HERE / "tiny" / "t5", 64)(["a green square slides up"])
    models = [magi.load_dit(HERE / "tiny" / "base", dtype="bfloat16"), magi.load_dit(quantised_tiny)]
    cfg = magi.read_config(quantised_tiny, "sampler", magi.SamplerConfig)
    tokens = {k: v.float() for k, v in load_file(quantised_tiny / "special_tokens.safetensors").items()}
    with torch.inference_mode():
        exact, fp8, other = (
            torch.cat([u for _, u in magi.sample(dit, text[0], mask[0], run, special_tokens=tokens)], 1)
            for dit, seed in ((models[0], 5), (models[1], 5), (models[0], 6))
            for run in [dataclasses.replace(cfg, num_frames=48, num_steps=8, seed=seed, height=64, width=64)]
        )
    assert 1e-4 < relative(fp8, exact) < 0.15 < 0.3 < relative(other, exact)


def test_quantize_keeps_the_first_and_last_layer_and_the_rest_of_the_folder(quantised_tiny):
    source, made = read_folder(HERE / "tiny" / "base"), read_folder(quantised_tiny)
    quantised = {k.removesuffix(".weight_scale") for k in made if k.endswith("weight_scale")}
    names = {"attn.q", "attn.k", "attn.v", "attn.qx", "attn.proj", "ffn.fc1", "ffn.fc2"}
    assert quantised == {f"layers.{i}.{name}" for i in range(1, 5) for name in names}
    for name, tensor in source.items():
        if name.removesuffix(".weight") not in quantised:
            assert torch.equal(made[name].float(), tensor.to(made[name].dtype).float()), name
    cfg = magi.read_config(quantised_tiny, "dit", magi.DiTConfig)
    assert cfg.fp8 and cfg.dtype == "bfloat16"
    tiny = HERE / "tiny" / "base"
    assert magi.read_config(quantised_tiny, "sampler", magi.SamplerConfig) == magi.read_config(
        tiny, "sampler", magi.SamplerConfig
    )
    assert_same(*(load_file(folder / "special_tokens.safetensors") for folder in (quantised_tiny, tiny)))


def test_quantize_refuses_in_one_line(quantised_tiny, tmp_path):
    tiny, out = HERE / "tiny" / "base", tmp_path / "out"
    assert_refused(cw.main, ("quantize", quantised_tiny, out), "is an fp8 model already", out=out)
    assert_refused(cw.main, ("quantize", tmp_path / "nothing", out), "does not exist", out=out)
    assert_refused(cw.main, ("quantize", tiny, out, "--alpha", "2"), "alpha 2.0 must be in [0, 1]", out=out)
    assert_refused(cw.main, ("quantize", tiny, out, "--t5", tmp_path), "no text encoder", out=out)
    assert_refused(cw.main, ("quantize", tiny, out, "--num-steps", "7"), "must be a multiple of", out=out)
    (shallow := tmp_path / "shallow").mkdir()
    (shallow / "config.json").write_text(json.dumps({"dit": asdict(SMALL), "sampler": asdict(QUICK)}))
    assert_refused(cw.main, ("quantize", shallow, out), "has 2 layers", out=out)
