"""Quantise a model folder of ours to fp8. The command is `python convert_weights.py quantize MODEL OUT`.

fp8 weights want fp8 inputs, and how large inputs get is known only by running the model. So a few videos are
sampled, and the largest |x| of every channel of every quantised layer is noted (calibration). Then

    per tensor (others)     input_scale = max |x| / 448,   weight_scale = max |w| / 448
    per channel (Wo, fc2)   s_j = max|x_j|^a / max|w_j|^(1-a), a = 0.45: x_j / s_j and w_j s_j have the same
                            product and no outliers (SmoothQuant, arXiv 2211.10438); then as above, but with
                            smooth_scale = s * input_scale, since the input is divided only once

so that all values lie within e4m3's +-448. An input larger than any that was seen is clamped.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import checkpoints
import convert_weights
import magi
from checkpoints import check_device, check_text_encoder, read_config, require, weight_files
from magi import DiTConfig, SamplerConfig
from outputs import new_folder

E4M3_MAX, ALPHA = 448.0, 0.45
SMALLEST = 1e-6                  # a channel that is never used, or whose weights are all zero, counts as this
CALIBRATION_PROMPTS = ("a red ball bounces", "a blue star slides to the left at night",
                       "a woman walks along a beach at sunset while waves roll in",
                       "a camera flies over a city street full of cars in the rain")


def quantise_layer(weight: Tensor, peak: Tensor, kind: str, alpha: float = ALPHA) -> dict[str, Tensor]:
    """Make the tensors of a magi.FP8Linear ("tensor" or "channel") from weight (out, in) and peak (in,)."""
    weight = weight.float()
    peak = peak.to(weight.device).clamp(min=SMALLEST)
    if kind == "channel":
        smooth = peak**alpha / weight.abs().amax(0).clamp(min=SMALLEST) ** (1 - alpha)
        weight, peak = weight * smooth, peak / smooth
    input_scale = (peak.max() / E4M3_MAX).reshape(1)
    weight_scale = (weight.abs().max().clamp(min=SMALLEST) / E4M3_MAX).reshape(1)
    weight8 = (weight / weight_scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    made = {"weight": weight8, "weight_scale": weight_scale}
    if kind == "channel":
        return made | {"input_scale": input_scale, "smooth_scale": (smooth * input_scale)[None]}
    return made | {"input_scale": input_scale.repeat(len(peak))}


def calibrate(dit: magi.DiT, layers: Iterable[str], run: Callable[[], None]) -> dict[str, Tensor]:
    """Note the largest |input| of every channel of the named layers while `run` uses the model -> (in,)."""
    peaks: dict[str, Tensor] = {}

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            peak = args[0].detach().abs().flatten(0, -2).amax(0).float()
            peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak
        return hook

    hooks = [dit.get_submodule(name).register_forward_pre_hook(watch(name)) for name in layers]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    for name, peak in peaks.items():
        require(bool(peak.isfinite().all()), f"the input of {name} overflows: it cannot be quantised")
    return {name: peak.cpu() for name, peak in peaks.items()}


@torch.inference_mode()
def measure(src: Path, cfg: SamplerConfig, prompts: Iterable[str], t5: Path, device: str, backend: str,
            layers: Iterable[str]) -> dict[str, Tensor]:
    """Calibrate a model folder, in bf16, by one sampling run per prompt, each with a seed of its own."""
    text_length = read_config(src, "dit", DiTConfig).text_length
    texts, masks = magi.T5(t5, text_length, device)(list(prompts))           # frees the encoder
    dit = magi.load_dit(src, device, dtype="bfloat16", backend=backend)
    table = checkpoints.read_special_tokens(src)

    def run() -> None:
        bar = tqdm(range(len(texts)), unit="video", desc="calibrating", disable=None)
        for i in bar:
            seeded = dataclasses.replace(cfg, seed=cfg.seed + i)
            for _ in magi.sample(dit, texts[i], masks[i], seeded, special_tokens=table):
                pass

    return calibrate(dit, layers, run)


def fp8_layers(cfg: DiTConfig) -> dict[str, str]:
    """Name the layers of an fp8 model that are quantised, and how: name -> "tensor" or "channel"."""
    with torch.device("meta"):
        modules = magi.DiT(cfg).named_modules()
    return {name: "tensor" if module.smooth_scale is None else "channel"
            for name, module in modules if isinstance(module, magi.FP8Linear)}


def run_quantize(src: Path, out: Path, force: bool, **options) -> None:
    with new_folder(src, out, force) as folder:
        quantize(src, folder, **options)


def quantize(src: Path, folder: Path, prompt: list[str] | None, t5: Path | None, device: str, backend: str,
             alpha: float, **settings) -> None:
    """Quantise every layer but the first and the last, which are too sensitive; they become bf16."""
    cfg = read_config(src, "dit", DiTConfig)
    sampler = read_config(src, "sampler", SamplerConfig)
    require(not cfg.fp8, f"{src} is an fp8 model already")
    require(cfg.num_layers > 2, f"{src} has {cfg.num_layers} layers: all of them are first or last")
    require(0 <= alpha <= 1, f"alpha {alpha} must be in [0, 1]")
    check_device(device)
    magi.get_ops(backend, device)                                            # says if the device cannot
    given = {name: value for name, value in settings.items() if value is not None}
    sampler_run = dataclasses.replace(sampler, **given)
    t5 = t5 or checkpoints.beside(src, "t5")
    check_text_encoder(t5, cfg.text_dim)

    cfg8 = dataclasses.replace(cfg, fp8=True, dtype="bfloat16")
    kinds = fp8_layers(cfg8)
    expected = convert_weights.meta_weights(lambda: magi.DiT(cfg8))
    files = weight_files(src)

    def convert(sd: dict[str, Tensor]) -> dict[str, Tensor]:
        made = {}
        for name, tensor in sd.items():
            layer = name.removesuffix(".weight")
            if layer in kinds:
                parts = quantise_layer(tensor, peaks[layer].to(tensor.device), kinds[layer], alpha)
                made |= {f"{layer}.{part}": value for part, value in parts.items()}
            else:
                made[name] = tensor.to(expected[name].dtype if name in expected else tensor.dtype)
        return made

    with torch.device("meta"):                           # a misfit is found before the model runs
        peaks = {name: torch.empty(expected[f"{name}.weight"].shape[1]) for name in kinds}
    reads, made = convert_weights.make_plan(files, convert, expected, folder)
    peaks = measure(src, sampler_run, prompt or CALIBRATION_PROMPTS, t5, device, backend, kinds)
    convert_weights.write_weights(reads, made, convert, folder)
    convert_weights.write_json({"dit": asdict(cfg8), "sampler": asdict(sampler)}, folder / "config.json")
    tokens = src / "special_tokens.safetensors"
    if tokens.is_file():
        shutil.copyfile(tokens, folder / tokens.name)


def add_flags(command: argparse.ArgumentParser) -> None:
    """Add the flags of convert_weights.py quantize, and what it runs."""
    command.set_defaults(run=run_quantize)
    command.add_argument("src", type=Path, metavar="MODEL", help="a DiT folder, with t5 beside it")
    command.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    command.add_argument("--force", action="store_true", help="replace what is already there")
    command.add_argument("--prompt", action="append", metavar="TEXT", help="for calibration, may be repeated")
    command.add_argument("--t5", type=Path, metavar="FOLDER", help="default: t5 beside the model")
    command.add_argument("--device", default="cpu", help="where the sampling runs; default: cpu")
    command.add_argument("--backend", choices=["torch", "triton"], default="torch", help="default: torch")
    command.add_argument("--alpha", type=float, default=ALPHA, help=f"smoothing strength; default: {ALPHA}")
    for flag, help in (("num_frames", "video frames of each run"), ("num_steps", "steps per chunk"),
                       ("height", "pixels"), ("width", "pixels"), ("seed", "of the first run")):
        command.add_argument(f"--{flag}", type=int, metavar="N", help=f"{help}; default: the model's")
