"""MAGI-1 in one file: autoregressive video generation, chunk by chunk.

This is the whole system of "MAGI-1: Autoregressive Video Generation at Scale" (Sand AI, arXiv 2505.13211):
a transformer VAE, a T5 text hook, a diffusion transformer with block-causal attention, the sampler that keeps
up to four one-second chunks in flight at different noise levels, and the training objectives. It loads the
official checkpoints (through convert_weights.py) and equals the official code on every recorded run.

    prompt --T5--> text (L, 4096) ----------------------------+
                                                              v
    image, video --VAE.encode--> prefix latents --> [ chunk pipeline: DiT, guidance, Euler step ]*
    noise (seed, chunk) ------------------------------^       |
                                                              +--> latents --VAE.decode--> a second of frames

Time runs from t = 0 (pure noise) to t = 1 (clean): x_t = (1-t) noise + t data, the network predicts the
velocity v = data - noise, and an Euler step is x += v dt. A **chunk** is 24 frames = 6 latent frames. A chunk
sees itself and earlier chunks, never later ones; when it is a quarter done the next one starts, so a video
streams out while its later chunks are still noise. Text, image and video to video are one model: they differ
only in how many clean frames stand before the noise.

Symbols, the same everywhere:
    B batch   T latent frames   H W latent height, width   N tokens   D model width   L text length, C width
    Hq Hkv query, key/value heads   hd head width   n chunks in a forward   c a chunk's index in the video
    K chunks in the video   P of them given from outside   d how fine the steps of a distilled model are
    A chunk's range counts chunks, itself included; the `ranges` that attention takes count key tokens.
    Video is (B, 3, frames, height, width) in [-1, 1], latents (B, 16, T, H, W); tokens are ordered t, h, w.

Contents
    1  Configs and presets      the model zoo as one literal table
    2  Shared parts             norms, timestep features, rotary positions, attention: the readable reference
    3  VAE                      ViT encoder and decoder, tiling
    4  Text                     caption cleaning, T5, special tokens, null text
    5  DiT                      fp8 linear, parallel self- and cross-attention, layer, model
    6  KV cache                 clean chunks that can still be read, and what a chunk reads
    7  Schedule                 time grid, stages, attention ranges: pure functions
    8  Guidance                 three branches and their weights; what need not be computed
    9  Sampler                  the generator that ties 5-8 together
    10 Training objectives      flow matching over chunks, the VAE loss, shortcut distillation, LoRA
    11 Loading and the pipeline folders on disk; the one object a user holds

Left out on purpose: multi-GPU parallelism, CPU offload of the cache (a few chunks need none), CUDA graphs,
media files (sample.py reads and writes them). Fast kernels have the signatures of section 2 (`get_ops`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import itertools
import json
import math
import re
import urllib.parse
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

# ----------------------------------------------------------------------------------------------------------
# 1  Configs and presets
# ----------------------------------------------------------------------------------------------------------
# Three frozen dataclasses say everything about a model and a run. They check themselves when they are made,
# so a bad number is refused in milliseconds, not after an hour of sampling.

SCALE_FACTOR = 0.18215     # brings latents to unit variance, as in latent diffusion
CHUNK = 6                  # latent frames in a chunk: 24 video frames, one second
FRAMES_PER_LATENT = 4      # the VAE's temporal compression
SPECIAL_TOKENS = ("static", "dynamic", "borderness", "hq", "3d", "2d", "duration")  # in order of prepending
NEGATIVE_TOKENS = ("caption", "logo", "trans", "borderness")                  # likewise


@dataclass(frozen=True)
class VAEConfig:
    """The ViT-VAE (report section 2.1). Defaults are the released model: 613.76 M parameters."""

    video_size: int = 256         # native height and width in pixels: sets the position table
    video_length: int = 16        # native number of frames, likewise
    patch_size: int = 8           # pixels per latent in height and width
    patch_length: int = 4         # frames per latent frame
    in_chans: int = 3
    z_chans: int = 16             # latent channels
    embed_dim: int = 1024
    depth: int = 24               # blocks in the encoder, and again in the decoder
    num_heads: int = 16
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    ln_in_attn: bool = True       # normalise q, k and v per head instead of the block's input
    use_final_proj: bool = False  # for narrow models: spare channels per pixel, through Linear + LayerNorm
                                  # before the shuffle

    def __post_init__(self):
        _require(self.video_size % self.patch_size == 0 and self.video_length % self.patch_length == 0,
                 f"video_size {self.video_size} and video_length {self.video_length} must be multiples of "
                 f"the patch ({self.patch_length} frames, {self.patch_size} px)")
        _require(self.embed_dim % self.num_heads == 0,
                 f"embed_dim {self.embed_dim} must be a multiple of num_heads {self.num_heads}")
        _require(self.use_final_proj or self.embed_dim % self.patch_volume == 0,
                 f"embed_dim {self.embed_dim} must be a multiple of {self.patch_volume}, "
                 f"or set use_final_proj")

    @property
    def patch_volume(self) -> int:
        return self.patch_length * self.patch_size**2

    @property
    def out_features(self) -> int:
        """Channels of a token before the pixel shuffle: a whole number for each pixel of its patch."""
        return 4 * self.patch_volume if self.use_final_proj else self.embed_dim


@dataclass(frozen=True)
class DiTConfig:
    """The diffusion transformer (report section 2.2). Defaults are the 4.5B model."""

    num_layers: int = 34
    hidden_size: int = 3072       # D
    num_heads: int = 24           # Hq
    num_kv_heads: int = 8         # Hkv: grouped-query attention
    head_dim: int = 128           # hd
    ffn_size: int = 12288
    gated_ffn: bool = False       # SwiGLU instead of GELU
    in_channels: int = 16         # the 24B was built with 32: its latent is fed in twice, and of what comes
    out_channels: int = 16        # out only the first latent_channels are kept (why, the report does not say)
    latent_channels: int = 16
    x_scale: float = 1.0          # input times this, output divided by it: 0.1 in the 24B
    patch_size: int = 2           # latent pixels per token side
    text_dim: int = 4096          # width of the T5 embeddings
    text_length: int = 800        # L, padded and truncated
    null_length: int = 50         # how many rows of the null table are unmasked
    norm_eps: float = 1e-6
    dtype: str = "bfloat16"       # of the blocks; embedders, head and half of the norms stay float32
    fp8: bool = False             # e4m3 weights in every layer but the first and last

    def __post_init__(self):
        _require(self.dtype in ("float32", "bfloat16", "float16"),
                 f"dtype {self.dtype!r} is not one of float32, bfloat16, float16")
        _require(self.num_heads % self.num_kv_heads == 0,
                 f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        _require(self.head_dim % 8 == 0, f"head_dim {self.head_dim} must be a multiple of 8 (rotary bands)")
        _require(self.num_heads * self.head_dim % 8 == 0 and self.hidden_size % 4 == 0,
                 f"num_heads * head_dim must be a multiple of 8 (see ParallelAttention.forward) and "
                 f"hidden_size ({self.hidden_size}) of 4")
        for name in ("in_channels", "out_channels"):
            _require(getattr(self, name) in (self.latent_channels, 2 * self.latent_channels),
                     f"{name} {getattr(self, name)} must be latent_channels ({self.latent_channels}) "
                     f"or twice that")
        _require(2 <= self.null_length <= self.text_length, f"null_length {self.null_length} must be in [2, "
                 f"{self.text_length}]")

    @property
    def cond_size(self) -> int:
        return self.hidden_size // 4

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class SamplerConfig:
    """One run: schedule, attention ranges, guidance, tokens, size (report sections 2.4 and 3).

    Raises ValueError, naming the value and the fix, for anything that cannot run.
    """

    num_steps: int = 64                                       # Euler steps per chunk
    window: int = 4                                           # chunks in flight at most
    kv_ranges: tuple[int, ...] = (5, 4, 3, 2)                 # chunks a chunk sees, itself included, in each
                                                              # part of its way from noise to clean; (): all
    clean_kv_range: int = 1                                   # once it is clean; -1: the last of kv_ranges
    kv_ranges_at: tuple[tuple[int, tuple[int, ...]], ...] = ()  # shot transitions: (generated chunk, ranges)
    clean_t: float = 0.9999                                   # the t that clean chunks are shown with
    distilled: bool = False                                   # one branch, guidance distilled in
    cfg_t: tuple[float, ...] = (0.0, 0.0217, 0.1, 0.3, 0.999)   # guidance buckets by t ...
    prev_scales: tuple[float, ...] = (1.5, 1.5, 1.5, 1.0, 1.0)  # ... w_prev of each: towards the history
    text_scales: tuple[float, ...] = (7.5, 7.5, 7.5, 0.0, 0.0)  # ... w_text of each: towards the caption
    nearly_clean_t: float = 0.3                               # distilled: from this t, the oldest is blended
    nearly_clean_blend: float = 0.7                           # ... this much with history, the rest run alone
    shortcut_mode: str = "8,16,16"                            # or "16,16,8": how 12 steps are ordered
    special_tokens: tuple[str, ...] = ("hq", "duration")      # put in front of every caption
    negative_tokens: tuple[str, ...] = ()                     # put in front of the null text
    num_frames: int | None = 96                               # video frames to generate; None: until stopped
    height: int = 720
    width: int = 720
    fps: int = 24
    seed: int = 1234

    def __post_init__(self):
        for name in ("num_steps", "window", "clean_kv_range", "num_frames", "height", "width", "fps", "seed"):
            v = getattr(self, name)
            _require(hasattr(v, "__index__") or (name, v) == ("num_frames", None),
                     f"{name} {v!r} must be a whole number")
        for name in ("clean_t", "nearly_clean_t", "nearly_clean_blend"):
            _require(not math.isnan(getattr(self, name)), f"{name} {getattr(self, name)} must be a number")
        n, w = self.num_steps, self.window
        _require(w >= 1, f"window {w} must be at least 1")
        _require(n <= 10_000, f"steps {n} are too many: at most 10000")
        _require(n >= 1 and n % w == 0, f"steps {n} must be a multiple of the window {w}: "
                 f"try {max(w, round(n / w) * w)}")
        for ranges in (self.kv_ranges, *(ranges for _, ranges in self.kv_ranges_at)):
            unit = math.lcm(w, len(ranges) or 1)
            _require(all(v >= 1 and hasattr(v, "__index__") for v in ranges),
                     f"kv_ranges {ranges} must all be whole numbers of at least 1")
            _require(n % unit == 0,
                     f"steps {n} must be a multiple of the number of kv_ranges ({len(ranges)}) "
                     f"and of the window {w}: try {unit * max(1, round(n / unit))}")
        _require(self.clean_kv_range >= 1 or self.clean_kv_range == -1,
                 f"clean_kv_range {self.clean_kv_range} must be at least 1, or -1")
        _require(len(self.cfg_t) == len(self.prev_scales) == len(self.text_scales) >= 1
                 and self.cfg_t[0] <= 0 and all(a <= b for a, b in itertools.pairwise(self.cfg_t))
                 and all(map(math.isfinite, (*self.prev_scales, *self.text_scales))),
                 f"guidance tables must have one length, rise from t = 0 and be finite: cfg_t {self.cfg_t}, "
                 f"prev_scales {self.prev_scales}, text_scales {self.text_scales}")
        _require(self.shortcut_mode in ("8,16,16", "16,16,8"),
                 f"shortcut_mode {self.shortcut_mode!r} is not '8,16,16' or '16,16,8'")
        _require(n != 12 or not self.distilled or w in (1, 2, 4), f"12 steps of a distilled model come in "
                 f"threes, of two sizes (see shortcut_d): window {w} must be 1, 2 or 4")
        for kind, known in (("special_tokens", SPECIAL_TOKENS), ("negative_tokens", NEGATIVE_TOKENS)):
            for name in getattr(self, kind):
                _require(name in known, f"unknown {kind[:-1].replace('_', ' ')} {name!r}: choose from "
                         f"{', '.join(known)}")
        _require(self.num_frames is None or self.num_frames >= 1,
                 f"num_frames {self.num_frames} must be at least 1")
        for name in ("height", "width"):
            v = getattr(self, name)
            _require(32 <= v <= 16384 and v % 16 == 0, f"{name} {v} must be a multiple of 16, 32 to 16384: "
                     f"the nearest is {min(max(32, round(v / 16) * 16), 16384)}")
        _require(self.fps > 0, f"fps {self.fps} must be positive")
        _require(0 <= self.seed < 2**63, f"seed {self.seed} must be in [0, 2**63)")


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _zoo(dit: dict, **sampler) -> SimpleNamespace:
    return SimpleNamespace(dit=DiTConfig(**dit), sampler=SamplerConfig(**sampler))


_24B = dict(num_layers=48, hidden_size=6144, num_heads=48, ffn_size=16384, gated_ffn=True, in_channels=32,
            out_channels=32, x_scale=0.1)
_TINY = dict(num_layers=6, hidden_size=192, num_heads=6, num_kv_heads=2, head_dim=32, ffn_size=768,
             text_dim=128, text_length=64, null_length=8, dtype="float32")
_HD = dict(height=720, width=1280)
# fmt: off
PRESETS = {                                                      # the model zoo (model card)
    "4.5B-base":        _zoo({},                   num_steps=64),
    "4.5B-distill":     _zoo({},                   num_steps=16, distilled=True),
    "4.5B-distill-fp8": _zoo(dict(fp8=True),       num_steps=16, distilled=True),
    "24B-base":         _zoo(_24B,                 num_steps=32, **_HD),
    "24B-distill":      _zoo(_24B,                 num_steps=16, distilled=True, **_HD),
    "24B-distill-fp8":  _zoo(_24B | dict(fp8=True), num_steps=16, distilled=True, **_HD),
    "tiny":             _zoo(_TINY,                num_steps=16, height=64, width=64),
}
VAE_PRESETS = {
    "magi": VAEConfig(),
    "tiny": VAEConfig(video_size=64, embed_dim=256, depth=2, num_heads=4, use_final_proj=True),
}
# fmt: on


# ----------------------------------------------------------------------------------------------------------
# 2  Shared parts
# ----------------------------------------------------------------------------------------------------------
# What both transformers are made of. The functions gathered in TORCH_OPS are the specification: they run
# anywhere, and kernels.py offers the same names with the same signatures in Triton.


class LayerNorm1p(nn.LayerNorm):
    """LayerNorm whose weight is stored as its distance from one: weight decay pulls towards identity."""

    def reset_parameters(self):
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis in the dtype of the weights (float32 for most norms of the DiT)."""
        return F.layer_norm(x.to(self.weight.dtype), self.normalized_shape, self.weight + 1, self.bias,
                            self.eps)


def timestep_features(t: Tensor, dim: int = 256) -> Tensor:
    """Sinusoidal features of t in [0, 1]: (...) -> (..., dim), [cos | sin], float32 (Vaswani et al. 2017)."""
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device, dtype=torch.float32)
                      / (dim // 2))
    angles = t.float()[..., None] * freqs * 1000             # the scale of diffusion's thousand steps
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotary_angles(bands: Tensor, frames: Tensor, height: int, width: int) -> Tensor:
    """Angles of the 3D rotary embedding (RoFormer, on three axes).

    bands (hd/8,) are learned frequencies shared by the axes; frames (T,) are absolute latent frame indices;
    height and width are counted in patches. Returns (T*height*width, 3*hd/8), axes in the order t, h, w.
    """
    def centred(size: int) -> Tensor:
        # Centre the axis, then stretch it so that every resolution and aspect ratio is measured against the
        # same 16x16 grid: a model trained at one size then sees familiar angles at another. Its ends land
        # at +-(size/r - 1)/2, where r = sqrt(height width)/16.
        i = torch.arange(size, device=bands.device, dtype=torch.float32) - (size - 1) / 2
        return i * (size / math.sqrt(height * width / 256) - 1) / (size - 1)

    grid = torch.meshgrid(frames.to(bands), centred(height), centred(width), indexing="ij")
    positions = torch.stack(grid, dim=-1).reshape(-1, 3, 1)                  # (N, 3, 1)
    return (positions * bands).flatten(1)                                    # (N, 3 * hd/8)


def apply_rotary(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the pairs (j, j + m) of the first 2m = 3/4 hd head dimensions; the rest carries no position.

    x (B, N, heads, hd) float32, angles (N, m) -> same shape as x.
    """
    m = angles.shape[-1]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]                  # (N, 1, m)
    a, b, rest = x.split([m, m, x.shape[-1] - 2 * m], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(hd)) v with grouped-query heads: query head i reads kv head i // (Hq / Hkv).

    q (B, N, Hq, hd), k and v (B, M, Hkv, hd) -> (B, N, Hq, hd). The N x M scores are never held.
    """
    q, k, v = (u.transpose(1, 2) for u in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def block_attention(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor,
                    cached: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Block-causal attention: chunk i of the queries reads the key tokens [start_i, end_i) and no others.

    q (B, N, Hq, hd), k and v (B, M, Hkv, hd), ranges (1, n, 2) or, where they differ within a training batch,
    (B, n, 2), on the CPU; cached: earlier (k, v) that stand in front on the key axis. A range is contiguous
    and everything in it may be read, so there is no mask: just one dense attention per chunk.
    """
    if cached is not None:
        k, v = torch.cat([cached[0], k], dim=1), torch.cat([cached[1], v], dim=1)
    n, B = ranges.shape[1], len(q) // len(ranges)
    rows = [torch.cat([attention(chunk, ks[:, start:end], vs[:, start:end])
                       for chunk, (start, end) in zip(qs.chunk(n, dim=1), spans, strict=True)], dim=1)
            for qs, ks, vs, spans in zip(q.split(B), k.split(B), v.split(B), ranges.tolist(), strict=True)]
    return torch.cat(rows)


def norm_rotary(x: Tensor, norm: LayerNorm1p, angles: Tensor) -> Tensor:
    """QK-norm then rotary, in float32: (B, N, heads, hd) -> same, in x's dtype."""
    return apply_rotary(norm(x), angles).to(x.dtype)


def gated_residual(x: Tensor, gate: Tensor, branch: Tensor, norm: LayerNorm1p) -> Tensor:
    """x + LN1(gate * branch), in float32: x and branch (B, N, D), gate (B, n, D) with one row per chunk."""
    gate = gate.float().repeat_interleave(x.shape[1] // gate.shape[1], dim=1)
    return (x.float() + norm(gate * branch.float())).to(x.dtype)


def matmul_float32(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T in float32: (..., in), (out, in) -> (..., out).

    The product of two bf16 (or e4m3) numbers is exact in float32, so on a GPU the tensor cores take the bf16
    operands as they are and sum in float32: the same result at several times the speed.
    """
    if x.is_cuda and x.dtype == weight.dtype == torch.bfloat16 and not torch.is_grad_enabled():
        return torch.mm(x.flatten(0, -2), weight.t(), out_dtype=torch.float32).unflatten(0, x.shape[:-1])
    return F.linear(x.float(), weight.float())


def fp8_matmul(x: Tensor, weight: Tensor, divide: Tensor, scale: Tensor) -> Tensor:
    """Quantise x / divide to e4m3, multiply by the e4m3 weight (out, in), scale: (..., in) -> (..., out).

    Runs anywhere, on e4m3 numbers held in wider types, and returns bf16: the reference for the fp8 kernels.
    """
    x8 = (x / divide.float()).clamp_(-448, 448).to(torch.bfloat16).to(torch.float8_e4m3fn)  # 448: e4m3's max
    return (matmul_float32(x8.bfloat16(), weight.bfloat16()) * scale).to(torch.bfloat16)


TORCH_OPS = SimpleNamespace(name="torch", attention=attention, block_attention=block_attention,
                            norm_rotary=norm_rotary, gated_residual=gated_residual, fp8_matmul=fp8_matmul)


def get_ops(backend: str) -> SimpleNamespace:
    """The operations of a backend: "torch" (anywhere) or "triton" (kernels.py, on a GPU)."""
    _require(backend in ("torch", "triton"), f"backend {backend!r} is not 'torch' or 'triton'")
    if backend == "torch":
        return TORCH_OPS
    try:
        import kernels  # Triton is imported only when it is asked for
    except ImportError as error:
        raise ValueError(f"backend 'triton' is not available here ({error}): use 'torch'") from None
    return kernels.TRITON_OPS


# ----------------------------------------------------------------------------------------------------------
# 3  VAE
# ----------------------------------------------------------------------------------------------------------
# A plain ViT on both sides (report section 2.1): 4 frames x 8 x 8 pixels become one token, `depth` blocks of
# full attention, 16 latent channels. There are no convolutions to stream through, so it is fast, and anything
# larger than its native size is cut into overlapping tiles.


class VAEBlock(nn.Module):
    """Pre-norm transformer block; with ln_in_attn q, k and v are normalised per head instead of the input."""

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        d, hidden = cfg.embed_dim, int(cfg.embed_dim * cfg.mlp_ratio)
        self.num_heads = cfg.num_heads
        self.norm1 = nn.Identity() if cfg.ln_in_attn else nn.LayerNorm(d)
        self.ln_in_attn = cfg.ln_in_attn
        self.qkv = nn.Linear(d, 3 * d, bias=cfg.qkv_bias)
        self.proj = nn.Linear(d, d)
        self.norm2 = nn.LayerNorm(d)
        self.fc1 = nn.Linear(d, hidden)
        self.fc2 = nn.Linear(hidden, d)

    def forward(self, x: Tensor, ops: SimpleNamespace) -> Tensor:            # (B, N, D)
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b n (three h d) -> three b n h d",
                            three=3, h=self.num_heads)
        if self.ln_in_attn:
            # eps is added to the standard deviation, not to the variance: F.layer_norm would differ
            q, k, v = ((u - u.mean(-1, keepdim=True)) / (u.std(-1, correction=0, keepdim=True) + 1e-5)
                       for u in (q, k, v))
        x = x + self.proj(ops.attention(q, k, v).flatten(2))                     # (B, N, D)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class VAETransformer(nn.Module):
    """What encoder and decoder share: class token, learned positions, blocks, final LayerNorm."""

    def __init__(self, cfg: VAEConfig, ops: SimpleNamespace):
        super().__init__()
        self.ops = ops
        self.grid = (cfg.video_length // cfg.patch_length,                   # native (T, H, W)
                     *[cfg.video_size // cfg.patch_size] * 2)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.embed_dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + math.prod(self.grid), cfg.embed_dim) * 0.02)
        self.blocks = nn.ModuleList(VAEBlock(cfg) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.embed_dim)

    def positions(self, size: tuple[int, int, int]) -> Tensor:
        """The position table resampled to another (T, H, W); the class token has no place to resample."""
        if size == self.grid:
            return self.pos_embed
        table = self.pos_embed[:, 1:].reshape(1, *self.grid, -1).permute(0, 4, 1, 2, 3)
        table = F.interpolate(table.float(), size, mode="trilinear",
                              align_corners=False).to(self.pos_embed.dtype)
        return torch.cat([self.pos_embed[:, :1], table.flatten(2).transpose(1, 2)], dim=1)

    def transform(self, x: Tensor) -> Tensor:                                # (B, D, T, H, W)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        tokens = tokens + self.positions(tuple(x.shape[2:]))                 # (B, 1 + T*H*W, D)
        for block in self.blocks:
            tokens = block(tokens, self.ops)
        return self.norm(tokens)[:, 1:]                                      # (B, T*H*W, D)


class VAEEncoder(VAETransformer):
    def __init__(self, cfg: VAEConfig, ops: SimpleNamespace):
        super().__init__(cfg, ops)
        patch = (cfg.patch_length, cfg.patch_size, cfg.patch_size)
        self.patch_embed = nn.Conv3d(cfg.in_chans, cfg.embed_dim, patch, patch)
        self.last_layer = nn.Linear(cfg.embed_dim, 2 * cfg.z_chans)

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor]:               # (B, 3, frames, height, width)
        x = self.patch_embed(video)                                          # (B, D, T, H, W)
        T, H, W = x.shape[2:]
        moments = rearrange(self.last_layer(self.transform(x)), "b (t h w) c -> b c t h w", t=T, h=H, w=W)
        mean, logvar = moments.chunk(2, dim=1)                               # each (B, 16, T, H, W)
        return mean, logvar.clamp(-30, 20)


class VAEDecoder(VAETransformer):
    def __init__(self, cfg: VAEConfig, ops: SimpleNamespace):
        super().__init__(cfg, ops)
        self.patch = dict(pt=cfg.patch_length, ph=cfg.patch_size, pw=cfg.patch_size)
        self.proj_in = nn.Linear(cfg.z_chans, cfg.embed_dim)
        width = cfg.out_features
        self.final = nn.Sequential(nn.Linear(cfg.embed_dim, width), nn.LayerNorm(width)) \
            if cfg.use_final_proj else nn.Identity()
        # The shuffle leaves each pixel a few channels; a 3x3x3 convolution over them hides the seams of the
        # patches.
        self.last_layer = nn.Conv3d(width // cfg.patch_volume, cfg.in_chans, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:                             # (B, 16, T, H, W)
        T, H, W = latent.shape[2:]
        x = self.proj_in(latent.movedim(1, -1)).movedim(-1, 1)               # (B, D, T, H, W)
        x = self.final(self.transform(x))                                    # (B, T*H*W, 4*4*8*8)
        x = rearrange(x, "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)", t=T, h=H, w=W, **self.patch)
        return self.last_layer(x)                                            # (B, 3, frames, height, width)


class VAE(nn.Module):
    """Video autoencoder, 8x8x4. Latents are unscaled here: multiply by SCALE_FACTOR before the DiT.

    `tile` is (frames, height, width) in pixels, None for no tiling; `overlap` is the share of a tile's height
    and width that it has in common with its neighbour (frames never overlap).
    """

    def __init__(self, cfg: VAEConfig, ops: SimpleNamespace = TORCH_OPS):
        super().__init__()
        self.cfg = cfg
        self.patch = (cfg.patch_length, cfg.patch_size, cfg.patch_size)
        self.encoder = VAEEncoder(cfg, ops)
        self.decoder = VAEDecoder(cfg, ops)

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.pos_embed.dtype

    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, frames, height, width) -> mean and log-variance (B, 16, T, H, W), without tiling."""
        return self.encoder(self._checked(video))

    def _checked(self, video: Tensor) -> Tensor:
        (frames, height, width), (pt, p, _) = video.shape[2:], self.patch
        _require(frames == 1 or frames % pt == 0,
                 f"cannot encode {frames} frames: give 1 or a multiple of {pt}")
        _require(height % p == 0 and width % p == 0, f"cannot encode {height}x{width}: give multiples of {p}")
        # an image is a still clip; its one latent frame says it all
        return repeat(video, "b c 1 h w -> b c t h w", t=pt) if frames == 1 else video

    def encode(self, video: Tensor, tile: tuple[int, int, int] | None = (12, 256, 256),
               overlap: float = 0.25) -> Tensor:
        """(B, 3, frames, height, width) in [-1, 1], 1 or 4T frames -> mean latent (B, 16, T, H, W)."""
        return _tiled(lambda x: self.encoder(x)[0], self._checked(video), self.patch, (1, 1, 1), tile,
                      overlap, blend_blended=True)

    def decode(self, latent: Tensor, tile: tuple[int, int, int] | None = (12, 256, 256),
               overlap: float = 0.25) -> Tensor:
        """(B, 16, T, H, W) -> video (B, 3, 4T, 8H, 8W). 4 frames for each latent frame: cut an image to 1."""
        return _tiled(self.decoder, latent, (1, 1, 1), self.patch, tile, overlap, blend_blended=False)


def _tiled(fn: Callable, x: Tensor, unit_in: tuple, unit_out: tuple, tile: tuple | None, overlap: float,
           blend_blended: bool) -> Tensor:
    """Apply fn tile by tile and blend the seams; without a tile, at once. Sizes are counted in latent pixels,
    so encoding (unit_in = patch) and decoding (unit_out = patch) are one piece of code.

    Faithful to the official code in two ways one would not guess: tiles start at every stride even where the
    one before already reaches the edge, and a tile is blended against its neighbour as that was before
    (decoding) or after (encoding) its own blending.
    """
    if tile is None:
        return fn(x)
    patch = [max(a, b) for a, b in zip(unit_in, unit_out, strict=True)]
    _require(all(t > 0 and t % p == 0 for t, p in zip(tile, patch, strict=True)) and 0 <= overlap < 1,
             f"tile {tuple(tile)} must be positive multiples of {tuple(patch)} "
             f"and overlap {overlap} in [0, 1)")
    tile = [t // p for t, p in zip(tile, patch, strict=True)]
    stride = [tile[0], *(max(1, int(s * (1 - overlap) + 1e-6)) for s in tile[1:])]
    size = [s // u for s, u in zip(x.shape[2:], unit_in, strict=True)]
    if all(s <= t for s, t in zip(size, tile, strict=True)):
        return fn(x)

    def cut(start: Sequence[int]) -> Tensor:
        return x[(..., *(slice(a * u, (a + n) * u) for a, n, u in zip(start, tile, unit_in, strict=True)))]

    overlap_h, overlap_w = ((tile[i] - stride[i]) * unit_out[i] for i in (1, 2))
    pieces = []
    for t in range(0, size[0], stride[0]):
        seen, rows = {}, []                  # (h, w) -> the tile as its neighbours will blend with it
        for h in range(0, size[1], stride[1]):
            row = []
            for w in range(0, size[2], stride[2]):
                seen[h, w] = out = fn(cut((t, h, w)))
                if h:
                    out = _blend(seen[h - stride[1], w], out, overlap_h, dim=-2)
                if w:
                    out = _blend(seen[h, w - stride[2]], out, overlap_w, dim=-1)
                if blend_blended:
                    seen[h, w] = out
                row.append(out[..., : stride[1] * unit_out[1], : stride[2] * unit_out[2]])
            rows.append(torch.cat(row, dim=-1))
        pieces.append(torch.cat(rows, dim=-2))
    return torch.cat(pieces, dim=2)


def _blend(old: Tensor, new: Tensor, width: int, dim: int) -> Tensor:
    """Fade the end of `old` into the start of `new` over `width` pixels along dim; returns the new tile."""
    width = min(width, old.shape[dim], new.shape[dim])
    if width == 0:
        return new
    ramp = torch.arange(width, device=new.device, dtype=new.dtype) / width
    ramp = ramp.reshape(-1, *[1] * (-1 - dim))
    head = new.narrow(dim, 0, width)
    tail = old.narrow(dim, old.shape[dim] - width, width)
    return torch.cat([tail * (1 - ramp) + head * ramp,
                      new.narrow(dim, width, new.shape[dim] - width)], dim=dim)


# ----------------------------------------------------------------------------------------------------------
# 4  Text
# ----------------------------------------------------------------------------------------------------------
# First the caption is cleaned, by rules made for web alt texts. The odd ones are kept too: a different
# spelling is a different token sequence. Their order is part of the definition:
#   - lower case comes first, so most mojibake is already beyond ftfy's repair ("Ã¶" has become "ã¶");
#   - "+" and "%20" are decoded even in prose, so "a+b" is "a b"; the second pass does it again ("%2520");
#   - what step 3 drops leaves its blanks behind, and a blank at either end disarms the rules anchored there.
#     The second pass strips before it starts, so they bite then: "page 3 'x'" ends as "x".
# From step 2 on letters are a-zA-Z, lower case or not: entities bring capitals back ("&#65;" is "A").

# fmt: off
_LETTER      = "[a-zA-Z]"
_DOMAINS     = "com|co|ru|net|org|edu|gov|it"
_FILE_TYPES  = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DASHES      = (r"-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
                r"\ufe31\ufe32\ufe58\ufe63\uff0d")
_HYPHENATION = re.compile("[-_]")
# fmt: on


def _web_address(scheme: str) -> str:
    """A pattern for either the scheme with its slashes or a host with its path: "http://a.it/b" is two
    matches, and both go."""
    return rf"\b(?:{scheme}:(?:/{{1,3}}|[a-z0-9%])|[a-z0-9.-]+\.(?:{_DOMAINS})[\w/-]*\b/?(?!@))"


# fmt: off
# Step 1, on the markup: these need the angle brackets and the addresses whole.
_MARKUP_RULES = [(re.compile(pattern), new) for pattern, new in [
    (r"<person>",                                "person"),  # CC12M writes this for names; no HTML tag
    (_web_address("https?"),                     ""),        # query strings survive: "?x=1"
    (_web_address("www"),                        ""),        # "www:", with a colon; "www.a.it" has gone above
]]

# Step 2, on the plain text: web debris, and one spelling for each kind of punctuation.
_TEXT_RULES = [(re.compile(pattern), new) for pattern, new in [
    (r"@\w+\b",                                  ""),        # nicknames
    (r"[\u31c0-\u9fff]+",                        ""),        # CJK, seven adjoining blocks; kana, hangul stay
    (rf"[{_DASHES}]+",                           "-"),       # U+2212, the minus sign, is not among them
    (r"[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),       # ` acute, guillemets, curly pair, diaeresis
    (r"[\u2018\u2019]",                          "'"),       # curly apostrophes
    (r"&quot;?",                                 ""),        # entities that were escaped twice
    (r"&amp",                                    ""),        # leaves its semicolon behind
    (r"\d{1,3}(?:\.\d{1,3}){3}",                 " "),       # IPv4
    (r"\d:\d\d\s+$",                             ""),        # article ids; also "5:30" before a dropped @nick
    (r"\\n",                                     " "),       # a newline that was escaped: two characters
    (r"#\d{1,3}\b",                              ""),        # "#123"; four digits stay
    (r"#\d{5,}\b",                               ""),        # "#12345"
    (r"\b\d{6,}\b",                              ""),        # stock numbers
    (rf"\S+\.(?:{_FILE_TYPES})",                 ""),        # file names, with all that is glued in front
    (r"""["']{2,}""",                            '"'),       # shouting: ""sale""
    (r"\.{2,}",                                  " "),       # ellipses
    (r"[#®•©™&@·º½¾¿¡§~)(\][}{|\\/*]+",          " "),       # ***sale***, #sale
    (r"\s+\.\s+",                                " "),       # a full stop left alone
]]

# Step 3, on the repaired text: catalogue codes, shop phrases, then the ends of the string.
_FINAL_RULES = [(re.compile(pattern), new) for pattern, new in [
    (rf"\b{_LETTER}{{1,3}}\d{{3,15}}\b",         ""),        # jc6640
    (rf"\b{_LETTER}+\d+{_LETTER}+\b",            ""),        # jc6640vc
    (rf"\b\d+{_LETTER}+\d+\b",                   ""),        # 6640vc231
    (r"(?:worldwide\s+)?(?:free\s+)?shipping",   ""),
    (r"(?:free\s)?download(?:\sfree)?",          ""),
    (r"\bclick\b\s(?:for|on)\s\w+",              ""),
    (rf"\b(?:{_FILE_TYPES})(?:\simages?)?",      ""),        # no boundary behind: "pdfs" keeps its "s"
    (r"\bpage\s+\d+\b",                          ""),
    (rf"\b\d*(?:{_LETTER}+\d+){{2}}[a-zA-Z\d]*\b", " "),     # j2d1a2a
    (r"\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b",   ""),        # 1920x1080, also with Cyrillic x or a times sign
    (r"\b\s+:\s+",                               ": "),
    (r"(\D[,./])\b",                             r"\1 "),    # the blank that was forgotten; "50,000" is safe
    (r"\s+",                                     " "),
    (r"""^["']([\w\W]+)["']$""",                 r"\1"),     # enclosing quotes, which need not match
    (r"^['_,\-:;]",                              ""),
    (r"['_,\-:+]$",                              ""),
    (r"^\.\S+$",                                 ""),        # the whole caption is a file ending
]]
# fmt: on


def clean_caption(caption: str) -> str:
    """The pre-processing of captions for T5 that the official code applies, twice in a row, to each prompt.

    The rules descend from DeepFloyd IF and PixArt.  The second pass is not idle: it cleans what the first one
    laid bare (entities inside entities, ends freed of blanks).

    >>> clean_caption("A <b>RED</b> ball&mdash;as on https://www.example.com/ball, 1920x1080 ...")
    'a red ball-as on'
    """
    import ftfy
    from bs4 import BeautifulSoup

    def apply(rules: list[tuple[re.Pattern, str]], text: str) -> str:
        for pattern, new in rules:
            text = pattern.sub(new, text)
        return text

    for _ in range(2):
        caption = apply(_MARKUP_RULES, urllib.parse.unquote_plus(caption).strip().lower())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # bs4 takes a caption such as "a/b" for a path, and says so
            caption = BeautifulSoup(caption, features="html.parser").text
        caption = apply(_TEXT_RULES, caption)
        if len(_HYPHENATION.findall(caption)) > 3:  # "this-is-my-little-cat", but not "two-word"
            caption = _HYPHENATION.sub(" ", caption)
        caption = html.unescape(html.unescape(ftfy.fix_text(caption))).strip()
        caption = apply(_FINAL_RULES, caption).strip()
    return caption


def tokenize(tokenizer, captions: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Captions -> T5 token ids (n, L) and 0/1 mask (n, L), truncated to L with a warning.

    tokenizer: a SentencePieceProcessor. An empty caption has no token at all: its mask is zero.
    """
    ids = torch.zeros(len(captions), length, dtype=torch.long)               # T5 pads with 0
    mask = torch.zeros_like(ids)
    for row, caption in enumerate(captions):
        pieces = tokenizer.encode(caption) + [1] if caption else []          # T5 ends with </s> = 1
        if len(pieces) > length:
            warnings.warn(f"the prompt has {len(pieces)} tokens; only the first {length} are used: "
                          f"{caption[:40]!r}...", stacklevel=2)
            pieces = pieces[: length - 1] + [1]
        ids[row, : len(pieces)] = torch.tensor(pieces, dtype=torch.long)
        mask[row, : len(pieces)] = 1
    return ids, mask


class T5:
    """A T5 encoder folder (config.json, weights, spiece.model), read offline.

    The XXL encoder has 4.7 B parameters and is needed once per prompt, so the pipeline calls it, keeps the
    output (13 MB a prompt) and frees the model. In bfloat16, the default, it takes 9.5 GB, not 19.
    """

    def __init__(self, folder: str | Path, length: int = 800, device="cpu",
                 dtype: torch.dtype = torch.bfloat16):
        for name in ("config.json", "spiece.model"):
            _require((Path(folder) / name).is_file(),
                     f"no text encoder in {str(folder)!r}: {Path(folder) / name} does not exist")
        from sentencepiece import SentencePieceProcessor
        from transformers import T5EncoderModel

        self.length = length
        self.tokenizer = SentencePieceProcessor(model_file=str(Path(folder) / "spiece.model"))
        model, info = T5EncoderModel.from_pretrained(folder, dtype=dtype, local_files_only=True,
                                                     output_loading_info=True)
        missing = sorted(set(info["missing_keys"]) - {"encoder.embed_tokens.weight"})  # it is shared.weight
        _require(not missing, f"the text encoder in {str(folder)!r} lacks {len(missing)} tensor(s), such as "
                 f"{missing[:1]}: convert it again")                         # they would be random
        self.model = model.to(device).eval()

    @torch.no_grad()
    def __call__(self, captions: Sequence[str], clean: bool = True) -> tuple[Tensor, Tensor]:
        """Captions -> last hidden state (n, L, text_dim) float32 and mask (n, L), on the CPU."""
        ids, mask = tokenize(self.tokenizer, [clean_caption(c) if clean else c for c in captions],
                             self.length)
        used = max(1, int(mask.sum(1).max()))            # filled columns only: masked padding changes nothing
        ids, short = ids[:, :used].to(self.model.device), mask[:, :used].to(self.model.device)
        hidden = self.model(ids, attention_mask=short).last_hidden_state.float().cpu()
        # What stands where the mask is zero is never read; zeros there make a result the same in any batch.
        return F.pad(hidden * mask[:, :used, None], (0, 0, 0, self.length - used)), mask


# Learned vectors in the width of the text steer what captions cannot: quality, how long the video goes on, a
# still or lively start. They stand in front of the caption. Name in the config -> name in the file:
_TOKEN_FILE_NAMES = {
    "static": "static_first_frames_token", "dynamic": "dynamic_first_frames_token",
    "borderness": "borderness_token", "hq": "hq_token",
    "3d": "three_d_model_token", "2d": "two_d_anime_token",
    "caption": "caption_token", "logo": "logo_token", "trans": "trans_token",
}


def prepend_tokens(text: Tensor, mask: Tensor, tokens: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Put each (1, C) token in front in turn, so the last comes first; cut to the length text (L, C) had."""
    L = len(text)
    return (torch.cat([*reversed(tokens), text])[:L],
            torch.cat([mask.new_ones(len(tokens)), mask])[:L])


def token_vectors(names: Sequence[str], order: Sequence[str], table: dict[str, Tensor], remaining: float = 1
                  ) -> list[Tensor]:
    """The vectors of the named tokens, in the official order of prepending (SPECIAL_ or NEGATIVE_TOKENS).

    remaining: how many chunks are left, this one included. It picks the duration token, clamped to 8:
    duration_token_1 says "this is the last second".
    """
    out = []
    for name in order:
        if name in names:
            key = f"duration_token_{int(min(remaining, 8))}" if name == "duration" \
                else _TOKEN_FILE_NAMES[name]
            _require(key in table, f"special token {name!r} needs {key!r}, but this model's table has only "
                     f"{', '.join(sorted(table)) or 'nothing'}: choose among them, or none")
            out.append(table[key])
    return out


def check_tokens(cfg: SamplerConfig, table: dict[str, Tensor], width: int, num_chunks: float) -> None:
    """Raise ValueError if a run of so many generated chunks needs a token that the table lacks, or has in
    another shape than (1, width)."""
    for remaining in range(1, int(min(8, num_chunks)) + 1):
        for v in (*token_vectors(cfg.special_tokens, SPECIAL_TOKENS, table, remaining),
                  *token_vectors(cfg.negative_tokens, NEGATIVE_TOKENS, table)):
            _require(v.shape == (1, width), f"a special token has shape {tuple(v.shape)}, not {(1, width)}: "
                     f"the table is for another model")


# ----------------------------------------------------------------------------------------------------------
# 5  DiT
# ----------------------------------------------------------------------------------------------------------
# Report section 2.2. What sets it apart from a plain DiT: self- and cross-attention run in parallel on one
# normalised input and share one output projection; q and k are normalised; the timestep acts only through two
# tanh gates per layer, each followed by a norm (no shift, no input modulation):
#
#     h = LN(x);   a = Wo [self-attention(h), cross-attention(h, text)];   g1, g2 = tanh(Linear(SiLU(cond)))
#     x = x + LN1(g1 * a)
#     x = x + LN1(g2 * FFN(LN(x)))


class FP8Linear(nn.Module):
    """A linear layer with e4m3 weights, in the official checkpoint's two kinds.

    "tensor" (q, k, v, qx, fc1): one input scale, in a vector of equal numbers. "channel" (Wo, fc2): the
    input is divided by a smoothing scale per channel, which moves outliers from activations to weights.
    """

    def __init__(self, in_features: int, out_features: int, kind: str, ops: SimpleNamespace = TORCH_OPS):
        super().__init__()
        assert kind in ("tensor", "channel"), kind
        self.ops = ops
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.float8_e4m3fn))
        self.register_buffer("weight_scale", torch.ones(1))
        self.register_buffer("input_scale", torch.ones(in_features if kind == "tensor" else 1))
        self.register_buffer("smooth_scale", torch.ones(1, in_features) if kind == "channel" else None)

    def forward(self, x: Tensor) -> Tensor:                                  # (..., in) -> (..., out), bf16
        divide = self.input_scale if self.smooth_scale is None else self.smooth_scale
        return self.ops.fp8_matmul(x, self.weight, divide, self.input_scale[0] * self.weight_scale)


class Float32Linear(nn.Linear):
    """A linear without bias that sums and answers in float32, whatever the type of its input and weight."""

    def forward(self, x: Tensor) -> Tensor:
        return matmul_float32(x, self.weight)


def _linear(cfg: DiTConfig, index: int, n_in: int, n_out: int, kind: str, ops: SimpleNamespace,
            plain: type[nn.Linear] = nn.Linear) -> nn.Module:
    """A bias-free linear of layer `index`; the first and last layer are too sensitive for fp8."""
    if cfg.fp8 and 0 < index < cfg.num_layers - 1:
        return FP8Linear(n_in, n_out, kind, ops)
    return plain(n_in, n_out, bias=False, dtype=cfg.torch_dtype)


@dataclass
class Context:
    """What every layer of one forward shares; made by DiT.forward."""

    cond: Tensor                   # (B, n, D/4) time and flag of each chunk
    angles: Tensor                 # (N, 3 hd/8) rotary angles
    ranges: Tensor                 # (1 or B, n, 2) key tokens each chunk reads, cached ones first
    text: Tensor                   # (all texts end to end, D)
    text_ranges: Tensor            # (1, B*n, 2) which of them are each chunk's own
    chunks: Sequence[int]          # absolute index of each chunk
    cache: KVCache | None          # read: keys of chunks before chunks[0]
    write: Sequence[int]           # chunks whose keys go to the cache


class ParallelAttention(nn.Module):
    """Self-attention over the chunk's range and cross-attention to the chunk's own text, side by side."""

    def __init__(self, cfg: DiTConfig, index: int, ops: SimpleNamespace):
        super().__init__()
        D, hd, Hq, Hkv = cfg.hidden_size, cfg.head_dim, cfg.num_heads, cfg.num_kv_heads
        self.index, self.head_dim, self.ops = index, hd, ops
        self.norm = nn.LayerNorm(D, cfg.norm_eps, dtype=cfg.torch_dtype)
        self.q = _linear(cfg, index, D, Hq * hd, "tensor", ops)
        self.k = _linear(cfg, index, D, Hkv * hd, "tensor", ops)
        self.v = _linear(cfg, index, D, Hkv * hd, "tensor", ops)
        self.qx = _linear(cfg, index, D, Hq * hd, "tensor", ops)
        self.kvx = nn.Linear(D, 2 * Hkv * hd, bias=False, dtype=cfg.torch_dtype)
        self.out = _linear(cfg, index, 2 * Hq * hd, D, "channel", ops, Float32Linear)
        self.q_norm, self.k_norm = (LayerNorm1p(hd, cfg.norm_eps) for _ in range(2))        # float32
        self.qx_norm, self.kx_norm = (LayerNorm1p(hd, cfg.norm_eps, dtype=cfg.torch_dtype) for _ in range(2))

    def forward(self, x: Tensor, ctx: Context) -> Tensor:                    # (B, N, D)
        attn = torch.cat(self.attend(x, ctx), dim=-1)                        # (B, N, 2*Hq*hd)
        # The checkpoints were trained 8-way tensor parallel: each rank's slice of Wo saw its own heads' self-
        # and cross-attention side by side, so the features must be dealt out in that order.
        attn = rearrange(attn, "b n (two rank f) -> b n (rank two f)", two=2, rank=8)
        return self.out(attn)

    def attend(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Self- and cross-attention before the projection, each (B, N, Hq*hd)."""
        h, ops = self.norm(x), self.ops
        q, k, v, qx = (layer(h).unflatten(-1, (-1, self.head_dim))           # (B, N, heads, hd)
                       for layer in (self.q, self.k, self.v, self.qx))
        q, k = ops.norm_rotary(q, self.q_norm, ctx.angles), ops.norm_rotary(k, self.k_norm, ctx.angles)
        cached = ctx.cache.read(self.index, before=ctx.chunks[0]) if ctx.cache is not None else None
        self_out = ops.block_attention(q, k, v, ctx.ranges, cached)          # (B, N, Hq, hd)
        for i, chunk in enumerate(ctx.chunks):
            if chunk in ctx.write:
                ctx.cache.write(self.index, chunk, *(u.chunk(len(ctx.chunks), dim=1)[i] for u in (k, v)))

        # Cross-attention is block attention too: over all texts end to end, each chunk reading its own.
        kx, vx = rearrange(self.kvx(ctx.text), "l (h two d) -> two 1 l h d", two=2, d=self.head_dim)
        qx, kx = self.qx_norm(qx).to(x.dtype), self.kx_norm(kx).to(x.dtype)
        cross_out = ops.block_attention(qx.flatten(0, 1)[None], kx, vx, ctx.text_ranges)
        return self_out.flatten(2), cross_out.reshape(*x.shape[:2], -1)


class FeedForward(nn.Module):
    """LayerNorm, then GELU or SwiGLU."""

    def __init__(self, cfg: DiTConfig, index: int, ops: SimpleNamespace):
        super().__init__()
        self.gated = cfg.gated_ffn
        self.norm = nn.LayerNorm(cfg.hidden_size, cfg.norm_eps, dtype=cfg.torch_dtype)
        self.fc1 = _linear(cfg, index, cfg.hidden_size, cfg.ffn_size * (1 + cfg.gated_ffn), "tensor", ops)
        self.fc2 = _linear(cfg, index, cfg.ffn_size, cfg.hidden_size, "channel", ops)

    def forward(self, x: Tensor) -> Tensor:                                  # (B, N, D)
        if self.gated:
            gate, value = self.fc1(self.norm(x)).chunk(2, dim=-1)            # (B, N, FFN) each
            return self.fc2(F.silu(gate) * value)
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class DiTLayer(nn.Module):
    """Attention, then feed-forward; each gated by time, normalised and added in float32."""

    def __init__(self, cfg: DiTConfig, index: int, ops: SimpleNamespace):
        super().__init__()
        self.ops = ops
        self.gates = nn.Linear(cfg.cond_size, 2 * cfg.hidden_size, dtype=cfg.torch_dtype)
        self.attn = ParallelAttention(cfg, index, ops)
        self.attn_post_norm = LayerNorm1p(cfg.hidden_size, cfg.norm_eps)
        self.ffn = FeedForward(cfg, index, ops)
        self.ffn_post_norm = LayerNorm1p(cfg.hidden_size, cfg.norm_eps)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:                    # (B, N, D)
        # tanh caps every gate at 1, whatever the timestep
        gate1, gate2 = self.gates(F.silu(ctx.cond)).tanh().chunk(2, dim=-1)  # each (B, n, D)
        x = self.ops.gated_residual(x, gate1, self.attn(x, ctx), self.attn_post_norm)
        return self.ops.gated_residual(x, gate2, self.ffn(x), self.ffn_post_norm)


class DiT(nn.Module):
    """Velocity of the noisy chunks given the clean ones (report section 2.2).

    Embedders, head, q, k, post- and final norms are float32, the rest is cfg.dtype. Build it under
    torch.device("meta") to look at shapes without memory.

    >>> dit = DiT(PRESETS["tiny"].dit)
    >>> x, t = torch.randn(1, 16, 12, 8, 8), torch.tensor([[0.9, 0.2]])      # two chunks, the second noisier
    >>> text, mask = torch.randn(1, 2, 64, 128), torch.ones(1, 2, 64)
    >>> dit(x, t, text, mask).shape
    torch.Size([1, 16, 12, 8, 8])
    """

    def __init__(self, cfg: DiTConfig, ops: SimpleNamespace = TORCH_OPS):
        super().__init__()
        self.cfg = cfg
        D, cond, p = cfg.hidden_size, cfg.cond_size, cfg.patch_size
        self.patch_embed = nn.Conv3d(cfg.in_channels, D, (1, p, p), (1, p, p), bias=False)
        self.time_embed = nn.Sequential(nn.Linear(256, cond), nn.SiLU(), nn.Linear(cond, cond))
        self.null_text = nn.Parameter(torch.randn(cfg.text_length, cfg.text_dim) * 0.02)
        self.text_proj = nn.Linear(cfg.text_dim, D)
        self.flag_proj = nn.Linear(cfg.text_dim, cond)
        bands = cfg.head_dim // 8                            # of each axis; 3 axes turn 3/4 of a head's width
        self.rope_bands = nn.Parameter(10000.0 ** (-torch.arange(bands) / bands))
        self.layers = nn.ModuleList(DiTLayer(cfg, i, ops) for i in range(cfg.num_layers))
        self.final_norm = LayerNorm1p(D, cfg.norm_eps)
        self.final_linear = nn.Linear(D, p * p * cfg.out_channels, bias=False)

    def condition(self, t: Tensor, conditional: Tensor, d: float | None = None) -> Tensor:
        """What the gates see of each chunk: its time, and one bit that says whether it has a caption. (The
        official model keeps the vectors for that bit in two masked, otherwise unused, rows of the null text.)

        t (B, n), conditional (B, n) bool, d of a distilled model (see `shortcut_d`) -> (B, n, D/4) float32.
        """
        embed = lambda u: self.time_embed(timestep_features(u).to(self.cfg.torch_dtype).float())
        flags = self.flag_proj(self.null_text[-2:])          # row -2: conditional, row -1: unconditional
        cond = embed(t) + torch.where(conditional[..., None], flags[0], flags[1])
        return cond if d is None else cond + embed(torch.full_like(t, d))

    def forward(self, x: Tensor, t: Tensor, text: Tensor, text_mask: Tensor, *,
                chunks: Sequence[int] | None = None, first_seen: Sequence[int] | Tensor | None = None,
                conditional: bool | Tensor = True, d: float | None = None, cache: KVCache | None = None,
                write: Sequence[int] = ()) -> Tensor:
        """One evaluation of the velocity for n chunks at once.

        x            (B, 16, T, H, W)  noisy latents, T a multiple of n
        t            (B, n)            time of each chunk
        text         (B, n, L, C)      text of each chunk; text_mask (B, n, L), nonzero where valid
        chunks       (n,)              absolute index of each chunk, rising; default 0 .. n-1
        first_seen   (n,) or (B, n)    the first chunk each attends to (itself: no history); default: all
        conditional  bool or (B, n)    has it a caption?
        d            number            for distilled models only
        cache        clean chunks to read; those of this forward named in `write` are stored there

        Returns the velocity (B, 16, T, H, W), float32. Raises ValueError if sizes do not divide, or if a
        chunk attends to one that is neither in this forward nor in the cache.
        """
        cfg, (B, n) = self.cfg, t.shape
        _, _, T, H, W = x.shape
        p = cfg.patch_size
        _require(T % n == 0 and H % p == 0 and W % p == 0 and min(H, W) >= 2 * p,
                 f"latent (T, H, W) = {(T, H, W)} does not divide into {n} chunks of {p}x{p} patches, "
                 f"at least 2x2")
        chunks = list(range(n)) if chunks is None else list(chunks)
        have = sorted({*(cache.chunks(chunks[0]) if cache is not None else ()), *chunks})
        first_seen = [have[0]] * n if first_seen is None else first_seen
        ranges = token_ranges(chunks, first_seen, have, (T // n) * (H // p) * (W // p))
        conditional = torch.as_tensor(conditional, device=x.device).expand(B, n)

        if cfg.in_channels == 2 * cfg.latent_channels:
            x = torch.cat([x, x], dim=1)                                     # (B, 32, T, H, W)
        # A convolution whose stride is its kernel is a linear layer on patches, and faster as one.
        patches = rearrange(x.float() * cfg.x_scale, "b c t (h p) (w q) -> b (t h w) (c p q)", p=p, q=p)
        tokens = F.linear(patches, self.patch_embed.weight.flatten(1)).to(cfg.torch_dtype)  # (B, N, D)

        # All texts end to end without their padding; chunk i's own ends where the next one's begins.
        valid = text_mask.bool()
        ends = valid.sum(-1).flatten().cumsum(0).cpu()
        packed = F.silu(self.text_proj(text[valid].float())).to(cfg.torch_dtype)             # (all L', D)

        frames = torch.cat([torch.arange(i * (T // n), (i + 1) * (T // n), device=x.device) for i in chunks])
        ctx = Context(self.condition(t, conditional, d).to(cfg.torch_dtype),
                      rotary_angles(self.rope_bands, frames, H // p, W // p), ranges, packed,
                      F.pad(ends, (1, 0)).unfold(0, 2, 1)[None], chunks, cache, write)
        for layer in self.layers:
            tokens = layer(tokens, ctx)

        out = self.final_linear(self.final_norm(tokens))                     # (B, N, 1*2*2*C)
        out = rearrange(out, "b (t h w) (ph pw c) -> b c t (h ph) (w pw)", t=T, h=H // p, ph=p, pw=p)
        return out[:, : cfg.latent_channels].float() / cfg.x_scale


# ----------------------------------------------------------------------------------------------------------
# 6  KV cache
# ----------------------------------------------------------------------------------------------------------
# A clean chunk never changes again, so its keys and values are computed once and kept for as long as a later
# chunk can read them. That is a chunk or a few: memory does not grow with the video.


def token_ranges(chunks: Sequence[int], first_seen: Sequence[int] | Tensor, have: Sequence[int],
                 size: int) -> Tensor:
    """Key tokens [start, end) that each chunk reads, on the axis [cached chunks, chunks of this forward].

    first_seen (n,), or (B, n) in training; have: the chunks on that axis, rising, `size` tokens each ->
    (1 or B, n, 2). Raises ValueError if a chunk would read one that is not there.
    """
    have, own = torch.tensor(have), torch.tensor(chunks)
    first = torch.atleast_2d(torch.as_tensor(first_seen).cpu())
    start, end = torch.searchsorted(have, first), torch.searchsorted(have, own) + 1
    complete = (end - start == own - first + 1) & (first <= own)       # one place for each chunk of the range
    _require(bool(complete.all()), f"chunks {chunks} attend back to chunks {first.tolist()}, but only chunks "
             f"{have.tolist()} are in this forward or in the cache")
    return torch.stack([start * size, (end * size).expand_as(start)], dim=-1)


class KVCache:
    """Keys and values of clean chunks. Which can be forgotten is the schedule's business (`oldest_read`).

    Chunks stand joined, in order: they are written once and read in every step, so the copying is done when
    one comes or goes, and reading is a view.
    """

    def __init__(self):
        self.layers: dict[int, tuple[list[int], Tensor, Tensor]] = {}       # layer -> chunks, k and v

    def write(self, layer: int, chunk: int, k: Tensor, v: Tensor) -> None:
        """Append a chunk's k and v, (B, tokens, Hkv, hd), copied: a view keeps the whole forward's alive."""
        chunks, *old = self.layers.get(layer, ([], k[:, :0], v[:, :0]))
        assert not chunks or chunk > chunks[-1], (chunk, chunks)
        self.layers[layer] = [*chunks, chunk], *(torch.cat(u, dim=1) for u in zip(old, (k, v), strict=True))

    def chunks(self, before: int) -> list[int]:
        """Stored chunks older than `before`."""
        return [c for c in next(iter(self.layers.values()), ([],))[0] if c < before]

    def read(self, layer: int, before: int) -> tuple[Tensor, Tensor] | None:
        """k and v of the stored chunks older than `before`, joined, (B, tokens, Hkv, hd); None if none."""
        chunks, k, v = self.layers.get(layer, ([], None, None))
        old = sum(c < before for c in chunks)
        end = old * (k.shape[1] // len(chunks)) if chunks else 0
        return (k[:, :end], v[:, :end]) if old else None

    def evict(self, before: float) -> None:
        """Drop the chunks older than `before`."""
        for layer, (chunks, *kv) in list(self.layers.items()):
            old = sum(c < before for c in chunks)
            end = old * (kv[0].shape[1] // len(chunks))
            if old == len(chunks):
                del self.layers[layer]
            elif old:
                self.layers[layer] = chunks[old:], *(u[:, end:].clone() for u in kv)

    @property
    def bytes(self) -> int:
        return sum(u.numel() * u.element_size() for _, *kv in self.layers.values() for u in kv)


# ----------------------------------------------------------------------------------------------------------
# 7  Schedule
# ----------------------------------------------------------------------------------------------------------
# Report section 2.4. Everything here is a pure function of the config: print it, plot it, test it alone.
#
#     window 4, 3 chunks      stage   0     1     2     3     4     5
#     (a row is a chunk,      chunk 0 .00   .02   .10   .30   out
#     a number the t it       chunk 1       .00   .02   .10   .30   out
#     starts the stage with)  chunk 2             .00   .02   .10   .30


def timestep_grid(num_steps: int, shortcut_mode: str = "8,16,16") -> Tensor:
    """The n + 1 times of a chunk from 0 (noise) to 1 (clean), float32: half of them lie below t = 0.1.

    s = i/n, u = s^2, t = u w / (1 - (1-w) u) with w = 1/3. n = 12 thins a 16-step grid (see `shortcut_d`).
    """
    s = torch.linspace(0, 1, num_steps + 1)
    if num_steps == 12:                      # a step with d covers 1/(2d) of the way
        s = F.pad((0.5 / torch.tensor(shortcut_d(12, shortcut_mode))).cumsum(0), (1, 0))
    return shift_time(s**2)


def shift_time(u: Tensor, w: float = 1 / 3) -> Tensor:
    """Push times in [0, 1] towards the noise, where the layout of a video is decided: u w / (1 - (1-w) u)."""
    return u * w / (1 - (1 - w) * u)


def shortcut_d(num_steps: int, shortcut_mode: str = "8,16,16") -> list[float]:
    """d of each step, which tells a distilled model how fine its steps are: n/2, so 32 for 64, 4 for 8 steps.

    The 12-step grid takes one double step (d 4) and two single ones (d 8) of a 16-step grid in each quarter.
    """
    if num_steps == 12:
        return [4.0, 8.0, 8.0] * 4 if shortcut_mode == "8,16,16" else [8.0, 8.0, 4.0] * 4
    return [num_steps / 2] * num_steps


@dataclass(frozen=True)
class Stage:
    """Between two entries to the pipeline: which chunks are in flight, and how far each has come."""

    index: int
    chunks: tuple[int, ...]              # absolute indices, oldest (cleanest) first
    own_stage: tuple[int, ...]           # of each chunk: 0 .. window-1
    refresh: int | None                  # the chunk that has just left; its clean keys are computed in step 0


def stages(num_chunks: int | None, prefix_chunks: int = 0, window: int = 4) -> Iterator[Stage]:
    """The stages of a run of `num_chunks` chunks (prefix included; None: for ever). One enters in each."""
    K, P = math.inf if num_chunks is None else num_chunks, prefix_chunks
    if K <= P:
        return
    for s in itertools.count() if num_chunks is None else range(K - P + window - 1):
        chunks = tuple(range(max(P, P + s - window + 1), int(min(K, P + s + 1))))
        yield Stage(s, chunks, tuple(s - (c - P) for c in chunks), chunks[0] - 1 if s >= window else None)


def kv_range(cfg: SamplerConfig, grid_index: int, chunk: int | None = None) -> float:
    """How many chunks a noisy chunk sees, itself included, at a step of its own time grid; inf: all.

    `chunk` counts generated chunks: it selects an exception of cfg.kv_ranges_at.
    """
    ranges = dict(cfg.kv_ranges_at).get(chunk, cfg.kv_ranges)
    return ranges[grid_index * len(ranges) // cfg.num_steps] if ranges else math.inf


def clean_range(cfg: SamplerConfig, prefix: bool) -> float:
    """How many chunks a clean chunk sees: one being refreshed, or (prefix) one given from outside."""
    if not cfg.kv_ranges and not prefix:
        return math.inf                      # "all history" holds for refreshed chunks whatever is set
    if cfg.clean_kv_range == -1:
        return cfg.kv_ranges[-1] if cfg.kv_ranges else 8         # 8: the official default for prefix chunks
    return cfg.clean_kv_range


def oldest_read(cfg: SamplerConfig, stage: Stage, prefix_chunks: int = 0, num_chunks: int | None = None
                ) -> float:
    """The oldest chunk that this stage or a later one can still read: the cache may forget what came before.

    With ranges 5, 4, 3, 2 each stage costs a chunk one chunk of its view, and in a window of 4 each follower
    stands one chunk later: all look back to the same one, and one clean chunk is kept. In a window of 1, or
    just after a prefix, it is four.
    """
    P, exceptions = prefix_chunks, dict(cfg.kv_ranges_at)
    end = math.inf if num_chunks is None else num_chunks
    plain = next(c for c in itertools.count(stage.chunks[-1] + 1) if c - P not in exceptions)
    later = [c for c in (plain, *(P + k for k in exceptions)) if stage.chunks[-1] < c < end]
    reads = [stage.refresh - clean_range(cfg, prefix=False) + 1] if stage.refresh is not None else []
    for chunk, m in [*zip(stage.chunks, stage.own_stage, strict=True), *((c, 0) for c in later)]:
        ranges = exceptions.get(chunk - P, cfg.kv_ranges)
        left = ranges[m * len(ranges) // cfg.window :] or (math.inf,)       # what it has yet to go through
        reads.append(chunk + 1 - max(*left, clean_range(cfg, prefix=False)))
    return min(reads)


def shot_transition(cfg: SamplerConfig, chunk: int, kind: str = "cut") -> SamplerConfig:
    """Let generated chunk `chunk` look away from its past for part of its life (report section 3.3).

    "cut": no history while it is noisy, so the scene is laid out anew, but identities come back later.
    "restyle": history while noisy but none when clean, so the layout stays and details change.
    """
    _require(kind in ("cut", "restyle"), f"transition {kind!r} is not 'cut' or 'restyle'")
    _require(chunk >= 1, f"transition at chunk {chunk}: the first chunk has no history, choose 1 or later")
    _require(chunk not in dict(cfg.kv_ranges_at), f"chunk {chunk} has a transition already: choose one kind")
    _require(len(cfg.kv_ranges) >= 2, f"a transition needs at least two kv_ranges, not {cfg.kv_ranges}")
    half = len(cfg.kv_ranges) // 2
    blind = (1,) * half
    ranges = blind + cfg.kv_ranges[half:] if kind == "cut" else cfg.kv_ranges[: -half] + blind
    return dataclasses.replace(cfg, kv_ranges_at=(*cfg.kv_ranges_at, (chunk, ranges)))


# ----------------------------------------------------------------------------------------------------------
# 8  Guidance
# ----------------------------------------------------------------------------------------------------------
# Report section 2.4. A base model is evaluated in three ways and the velocities are combined:
#
#     v = (1 - w_prev) v(x | nothing) + (w_prev - w_text) v(x | previous) + w_text v(x | previous, text)
#
# w_prev pulls towards the history, w_text towards the caption; both depend on the chunk's own t. A branch
# whose weight is zero is skipped where no other chunk reads it: a tenth of the work, more in short videos.


def guidance_scales(cfg: SamplerConfig, t: float) -> tuple[float, float]:
    """(w_prev, w_text) at time t: the last bucket that starts at or before t, edges within 1e-7."""
    bucket = max((i for i, edge in enumerate(cfg.cfg_t) if t >= edge - 1e-7), default=0)
    return cfg.prev_scales[bucket], cfg.text_scales[bucket]


class Seat(NamedTuple):
    """One chunk's place in a forward."""

    chunk: int                           # absolute index
    t: float                             # the time it is shown with
    first: int                           # the oldest chunk it sees
    clean: bool = False                  # refreshed or prefix: carries null text, its velocity is not used


def needed(wanted: Sequence[int], seats: Sequence[Seat]) -> list[Seat]:
    """What must be computed for the `wanted` chunks to be right: also every chunk whose keys they read,
    directly or through another (layer after layer, a chunk depends on all it can reach)."""
    low, high = min(wanted, default=0), max(wanted, default=-1)
    for seat in reversed(seats):
        if low <= seat.chunk <= high:
            low = min(low, seat.first)
    return [seat for seat in seats if low <= seat.chunk <= high]


# ----------------------------------------------------------------------------------------------------------
# 9  Sampler
# ----------------------------------------------------------------------------------------------------------
# The chunk pipeline (report section 2.4). A clean chunk must be seen clean: when it has left the pipeline,
# the next forward carries it once more in front, at t = 0.9999 and with null text, only to compute the keys
# and values that later chunks will read from the cache.


@dataclass(frozen=True)
class Progress:
    """Reported after every step: for progress bars."""

    step: int                            # steps done
    total: int | None                    # steps in all, None: endless
    chunk: int                           # generated chunk that will be finished next
    cache_bytes: int
    tokens: int                          # DiT tokens computed so far, over all branches


def chunk_noise(seed: int, chunk: int, shape: Sequence[int]) -> Tensor:
    """Gaussian noise of one chunk, from (seed, chunk index) alone: a longer video begins like a shorter one.

    SeedSequence mixes the two numbers so that neighbouring seeds and chunks share nothing; drawn on the CPU,
    so the same seed gives the same video on every device.
    """
    mixed = np.random.SeedSequence([seed, chunk]).generate_state(1, np.uint64)[0]
    return torch.randn(*shape, generator=torch.Generator().manual_seed(int(mixed >> 1)))


class TextConditions:
    """The text each chunk is shown in each branch."""

    def __init__(self, dit: DiT, text: Tensor, mask: Tensor, cfg: SamplerConfig, table: dict[str, Tensor],
                 num_chunks: int | None, prefix_chunks: int):
        null, (L, C) = dit.null_text.float(), dit.null_text.shape
        self.cfg, self.P, self.K = cfg, prefix_chunks, math.inf if num_chunks is None else num_chunks
        self.table = {name: v.to(null) for name, v in table.items()}
        texts, masks = (text[None], mask[None]) if text.dim() == 2 else (text, mask)
        _require(texts.shape[1:] == (L, C) and masks.shape == texts.shape[:2] and len(texts) > 0,
                 f"text {tuple(text.shape)} and text_mask {tuple(mask.shape)} must be ({L}, {C}) and ({L},), "
                 f"or that for each chunk")
        self.text, self.mask = texts.to(null), masks.to(null.device)
        check_tokens(cfg, self.table, C, self.K - self.P)
        negative = token_vectors(cfg.negative_tokens, NEGATIVE_TOKENS, self.table)
        rows, _ = prepend_tokens(null, self.mask[0], negative)
        self.null = rows, (torch.arange(L, device=null.device) < dit.cfg.null_length).to(self.mask)

    def caption(self, chunk: int) -> tuple[Tensor, Tensor]:
        """Special tokens and caption of a noisy chunk; null text where the caption is empty."""
        i = min(chunk - self.P, len(self.text) - 1)                     # the last caption goes on
        if not self.mask[i].any():
            return self.null
        tokens = token_vectors(self.cfg.special_tokens, SPECIAL_TOKENS, self.table, remaining=self.K - chunk)
        return prepend_tokens(self.text[i], self.mask[i], tokens)


def sample(dit: DiT, text: Tensor, text_mask: Tensor, sampler: SamplerConfig, *,
           special_tokens: dict[str, Tensor] | None = None, prefix: Tensor | None = None,
           noise: Tensor | None = None, skip: bool = True,
           progress: Callable[[Progress], None] | None = None) -> Iterator[tuple[int, Tensor]]:
    """Generate a video chunk by chunk; yields (generated chunk's index, its latents) as each becomes clean.

    text            (L, C) with text_mask (L,), or (chunks, L, C) with (chunks, L): the last caption goes on
    special_tokens  name -> (1, C)
    prefix          (16, T, H, W), clean latents that come first
    noise           (16, 6 K, H, W), in place of the seeded noise; prefix chunks count. H and W of the video
                    are those of prefix or noise, the sampler's height and width only without both
    skip            False: compute what is multiplied by zero, too

    Yields float32 latents (16, 6, H, W), less the frames that were given; only an image run (a prefix of one
    frame) keeps that frame. Raises ValueError for inputs that do not fit, before anything is computed.
    """
    cfg, channels = sampler, dit.cfg.latent_channels
    for name, u in (("prefix", prefix), ("noise", noise)):
        _require(u is None or u.dim() == 4 and len(u) == channels and u.shape[1] >= 1,
                 f"{name} must be ({channels}, T, H, W), not {None if u is None else tuple(u.shape)}")
    if prefix is None:
        size = (cfg.height // 8, cfg.width // 8) if noise is None else noise.shape[2:]
        prefix = torch.zeros(channels, 0, *size)
    frames, P = prefix.shape[1], prefix.shape[1] // CHUNK
    K = None if cfg.num_frames is None else math.ceil((cfg.num_frames // FRAMES_PER_LATENT + frames) / CHUNK)
    _require(K is None or K > P, f"num_frames {cfg.num_frames} leaves nothing to generate: give at least 4")
    if noise is not None:
        _require(K is not None, "noise needs num_frames: an endless run draws its own")
        shape = channels, K * CHUNK, *prefix.shape[2:]
        _require(noise.shape == shape,
                 f"noise must be {shape} for a run of {K} chunks, not {tuple(noise.shape)}")
    texts = TextConditions(dit, text, text_mask, cfg, special_tokens or {}, K, P)
    return _Run(dit, cfg, texts, prefix, noise, skip).stream(K, P, progress or (lambda _: None))


class _Run:
    """One sampling run, and what lasts from forward to forward: latents in flight, cached keys and values."""

    def __init__(self, dit: DiT, cfg: SamplerConfig, texts: TextConditions, prefix: Tensor,
                 noise: Tensor | None, skip: bool):
        self.dit, self.cfg, self.texts, self.noise, self.skip = dit, cfg, texts, noise, skip
        self.prefix = prefix[None].to(dit.null_text.device, torch.float32)   # (1, 16, T, H, W)
        self.x: dict[int, Tensor] = {}                   # latents of the chunks in flight, (1, 16, 6, H, W)
        self.cache, self.tokens = KVCache(), 0

    @torch.no_grad()
    def stream(self, K: int | None, P: int, progress: Callable[[Progress], None]
               ) -> Iterator[tuple[int, Tensor]]:
        """The pipeline: K chunks of which P are given."""
        cfg, x = self.cfg, self.x
        grid = timestep_grid(cfg.num_steps, cfg.shortcut_mode).tolist()
        d = shortcut_d(cfg.num_steps, cfg.shortcut_mode)
        per_stage = cfg.num_steps // cfg.window
        total = None if K is None else (K - P + cfg.window - 1) * per_stage
        self.prefill(P, oldest_read(cfg, next(stages(K, P, cfg.window)), P, K), d[0])
        for stage in stages(K, P, cfg.window):
            self.cache.evict(oldest_read(cfg, stage, P, K))
            newest = stage.chunks[-1]
            if newest not in x:                          # none enters while the last ones drain
                x[newest] = self.paste(newest, self.fresh(newest))
            for j in range(per_stage):
                at = {c: m * per_stage + j for c, m in zip(stage.chunks, stage.own_stage, strict=True)}
                seats = [Seat(c, grid[i], int(max(0, c + 1 - kv_range(cfg, i, c - P))))
                         for c, i in at.items()]
                if j == 0 and stage.refresh is not None:
                    seats.insert(0, self.clean_seat(stage.refresh, prefix=False))
                velocity = self.velocity(seats, d[j])    # one d serves all: each quarter of d repeats
                for c, i in at.items():
                    x[c] = self.paste(c, x[c] + velocity[c] * (grid[i + 1] - grid[i]))
                x.pop(stage.refresh, None)               # its keys are in the cache now
                progress(Progress(stage.index * per_stage + j + 1, total, stage.chunks[0] - P,
                                  self.cache.bytes, self.tokens))
            if stage.own_stage[0] == cfg.window - 1:     # the oldest chunk is clean
                c, frames = stage.chunks[0], self.prefix.shape[2]
                given = 0 if frames == 1 else max(0, frames - c * CHUNK)
                yield c - P, x[c][0, :, given:].clone()  # a copy: the caller may scale it in place

    def fresh(self, chunk: int) -> Tensor:
        """The noise a chunk starts from."""
        if self.noise is not None:
            noise = self.noise[:, chunk * CHUNK : (chunk + 1) * CHUNK]
        else:
            _, channels, _, H, W = self.prefix.shape
            noise = chunk_noise(self.cfg.seed, chunk - self.texts.P, (channels, CHUNK, H, W))
        return noise[None].to(self.prefix)

    def paste(self, chunk: int, latents: Tensor) -> Tensor:
        """Given frames that fill only part of a chunk stand over its latents at all times."""
        given = self.prefix[:, :, chunk * CHUNK : (chunk + 1) * CHUNK]
        return torch.cat([given, latents[:, :, given.shape[2] :]], dim=2)

    def clean_seat(self, chunk: int, prefix: bool) -> Seat:
        first = int(max(0, chunk + 1 - clean_range(self.cfg, prefix)))
        return Seat(chunk, self.cfg.clean_t, first, clean=True)

    def prefill(self, P: int, oldest: float, d: float) -> None:
        """Run the given chunks that will be read once, together, to fill the cache (`forward` takes x)."""
        wanted = [c for c in range(P) if c >= oldest]
        self.x |= {c: self.prefix[:, :, c * CHUNK : (c + 1) * CHUNK] for c in range(P)}
        self.forward(needed(wanted, [self.clean_seat(c, prefix=True) for c in range(P)]), captioned=False,
                     conditional=self.cfg.distilled, d=d, write=wanted)
        self.x.clear()

    def forward(self, seats: Sequence[Seat], captioned: bool, conditional: bool, d: float,
                alone: bool = False, write: Sequence[int] = ()) -> dict[int, Tensor]:
        """One DiT forward -> velocity of each chunk; alone: each sees only itself."""
        if not seats:
            return {}
        chunks = [s.chunk for s in seats]
        text, mask = zip(*(self.texts.caption(s.chunk) if captioned and not s.clean else self.texts.null
                           for s in seats), strict=True)
        x = torch.cat([self.x[c] for c in chunks], dim=2)                    # (1, 16, 6 n, H, W)
        self.tokens += x[0, 0].numel() // self.dit.cfg.patch_size**2
        v = self.dit(x, torch.tensor([[s.t for s in seats]], device=x.device), torch.stack(text)[None],
                     torch.stack(mask)[None], chunks=chunks,
                     first_seen=chunks if alone else [s.first for s in seats], conditional=conditional,
                     d=d if self.cfg.distilled else None, cache=self.cache, write=write)
        return dict(zip(chunks, v.chunk(len(chunks), dim=2), strict=True))

    def velocity(self, seats: list[Seat], d: float) -> dict[int, Tensor]:
        """Guided velocity of every noisy chunk; a leading clean one has its keys written to the cache."""
        cfg = self.cfg
        write, noisy = [s.chunk for s in seats if s.clean], [s for s in seats if not s.clean]
        if cfg.distilled:
            v = self.forward(seats, captioned=True, conditional=True, d=d, write=write)
            oldest = noisy[0]
            if oldest.t >= cfg.nearly_clean_t - 1e-7 and (oldest.first < oldest.chunk or not self.skip):
                # Part of its velocity is computed without history: else the errors there are carried on.
                alone = self.forward([oldest], captioned=True, conditional=True, d=d, alone=True)
                v[oldest.chunk] = cfg.nearly_clean_blend * v[oldest.chunk] \
                    + (1 - cfg.nearly_clean_blend) * alone[oldest.chunk]
            return v

        w = {s.chunk: guidance_scales(cfg, s.t) for s in noisy}              # chunk -> (w_prev, w_text)
        if self.skip:       # with nothing before it, a chunk's first two branches are one: take w_prev = 1
            w |= {s.chunk: (1.0, w[s.chunk][1]) for s in noisy if s.first == s.chunk}
        use = lambda weight: weight != 0 or not self.skip
        with_text = needed([c for c, (_, w_text) in w.items() if use(w_text)], seats)
        with_past = needed([*write, *(c for c, (w_prev, w_text) in w.items() if use(w_prev - w_text))], seats)
        alone = [s for s in noisy if use(1 - w[s.chunk][0])]
        texted = self.forward(with_text, captioned=True, conditional=True, d=d)
        # This branch writes the cache; in that one step the texted branch uses its own fresh keys instead.
        previous = self.forward(with_past, captioned=False, conditional=False, d=d, write=write)
        nothing = self.forward(alone, captioned=False, conditional=False, d=d, alone=True)
        return {c: sum(weight * v[c] for weight, v in ((1 - w_prev, nothing), (w_prev - w_text, previous),
                                                       (w_text, texted)) if weight != 0)
                for c, (w_prev, w_text) in w.items()}


# ----------------------------------------------------------------------------------------------------------
# 10  Training objectives
# ----------------------------------------------------------------------------------------------------------
# Report sections 2.3 and 2.1. The official project ships none of this. What the report leaves open is ours
# and is named so in TrainingConfig.


@dataclass(frozen=True)
class TrainingConfig:
    """How a clip is corrupted for the flow-matching objective: our choices, but for the 5 % noise.

    Clips at a moment of the pipeline spend half their time below t = 0.1; the others follow `timestep_law`.
    """

    image_share: float = 0.15         # clips that begin with one clean frame (image to video)
    video_share: float = 0.35         # clips that begin with more: part of a chunk, or whole ones and part
    pipeline_share: float = 0.5       # clips timed as a moment of the sampler's pipeline; the rest: the law
    null_share: float = 0.15          # clips that lose their captions, for the branches without text
    clean_noise: float = 0.05         # most noise a clean chunk carries: generated history is not perfect
    ranges_share: float = 0.9         # clips under the sampler's kv_ranges; the rest see only themselves


def timestep_law(*shape: int, generator: torch.Generator | None = None) -> Tensor:
    """Training times: logit-normal (m 0, s 0.5), shifted towards the noise; about 70 % lie below t = 0.3."""
    return shift_time(torch.sigmoid(0.5 * torch.randn(*shape, generator=generator)))


def draw_times(batch: int, n: int, clean: Tensor, cfg: TrainingConfig, sampler: SamplerConfig,
               generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Times (B, n), non-increasing along each clip, and which chunks are clean (B, n) bool.

    clean (B,) whole chunks are given. A share of the clips take a moment of the pipeline, a random one: there
    the chunks are exactly one stage apart, and those that have left it are clean as well. The others sort
    draws from the law over the noisy chunks of a clip, which leaves their distribution as a whole unchanged.
    """
    later = torch.arange(n) - clean[:, None]                             # (B, n) 0 = first noisy chunk
    law = timestep_law(batch, n, generator=generator).masked_fill(later < 0, 1)
    law = law.sort(dim=1, descending=True).values
    head = torch.rand(batch, 1, generator=generator) * (sampler.window - 1 + n - clean[:, None])
    stage = head - later                                                 # stages a chunk has gone through
    moment = shift_time((stage / sampler.window).clamp(0, 1) ** 2)
    # A chunk that would not have started yet still gets some time, or its place in the batch would be wasted.
    moment = torch.where(stage < 0, law, moment).cummin(dim=1).values
    use = torch.rand(batch, 1, generator=generator) < cfg.pipeline_share
    is_clean = (later < 0) | use & (stage >= sampler.window)
    return torch.where(is_clean, sampler.clean_t, torch.where(use, moment, law)), is_clean


def _per_frame(u: Tensor, x: Tensor) -> Tensor:
    """One number a chunk (B, n) -> one a frame, to multiply x: (B, 1, T, 1, 1)."""
    return u.repeat_interleave(CHUNK, dim=1).to(x)[:, None, :, None, None]


def _clips(dit: DiT, latents: Tensor, text: Tensor, text_mask: Tensor, images: Tensor | None,
           cfg: TrainingConfig, rand: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A training batch, checked and on one device, and how many frames of each clip are given, (B,): none,
    one (an image, which takes the place of the clip's own first latent) or many (a video)."""
    (B, _, T, _, _), n = latents.shape, latents.shape[2] // CHUNK
    fits = text.shape == (B, n, *dit.null_text.shape) and text_mask.shape == text.shape[:3]
    _require(T % CHUNK == 0 and fits,
             f"latents {tuple(latents.shape)} need {CHUNK} frames per chunk and text "
             f"{(B, n, *dit.null_text.shape)} with its mask; text is {tuple(text.shape)}, text_mask "
             f"{tuple(text_mask.shape)}")
    task, most = rand(B), max(CHUNK - 1, T - CHUNK)                      # something is left to predict
    given = (2 + rand(B) * (most - 1)).long().clamp(max=most)
    given = torch.where(task < cfg.image_share, 1, given * (task < cfg.image_share + cfg.video_share))
    if images is not None:
        _require(images.shape == latents[:, :, :1].shape, f"images {tuple(images.shape)} are not one latent "
                 f"frame for each of latents {tuple(latents.shape)}")
        first = torch.where((given == 1).to(images.device).view(-1, 1, 1, 1, 1), images, latents[:, :, :1])
        latents = torch.cat([first, latents[:, :, 1:]], dim=2)
    return latents, text.to(latents.device), text_mask.to(latents.device), given


def _corrupt(latents: Tensor, t: Tensor, is_clean: Tensor, given: Tensor, cfg: TrainingConfig,
             generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """Noise each chunk to its t (B, n); clean chunks a little, whatever t the model is told; given frames of
    a noisy chunk not at all. Returns x, the noise, and where those frames are (B, 1, T, 1, 1) bool."""
    level = torch.where(is_clean, 1 - cfg.clean_noise * torch.rand(t.shape, generator=generator), t)
    level = _per_frame(level, latents)                                   # share of data in x
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    pasted = torch.arange(latents.shape[2]) < given[:, None]             # (B, T)
    pasted = (pasted & ~is_clean.repeat_interleave(CHUNK, 1)).to(latents.device)[:, None, :, None, None]
    return torch.where(pasted, latents, (1 - level) * noise + level * latents), noise, pasted


def _with_null_text(dit: DiT, text: Tensor, mask: Tensor, nulled: Tensor) -> tuple[Tensor, Tensor]:
    """Text (B, n, L, C) and mask (B, n, L), null text where nulled (B, n) or where the caption is empty."""
    nulled = (nulled.to(mask.device) | ~mask.bool().any(-1))[..., None]  # (B, n, 1)
    null_mask = (torch.arange(mask.shape[-1], device=mask.device) < dit.cfg.null_length).to(mask)
    return (torch.where(nulled[..., None], dit.null_text.to(text), text),
            torch.where(nulled, null_mask, mask))


def _first_seen(reach: Tensor, is_clean: Tensor, from_outside: Tensor, cfg: TrainingConfig,
                sampler: SamplerConfig, rand: Callable[..., Tensor]) -> Tensor:
    """The first chunk each chunk attends to, (B, n), from the ranges of the noisy ones; clean ones have their
    own (`clean_range`), and some clips see no history, for the branch without."""
    B, n = is_clean.shape
    for which, prefix in ((is_clean, False), (from_outside, True)):
        reach = torch.where(which, int(min(n, clean_range(sampler, prefix))), reach)
    reach = torch.where(rand(B, 1) >= cfg.ranges_share, 1, reach)
    return (torch.arange(n) - reach + 1).clamp(min=0)


def _mean_square(error: Tensor, is_clean: Tensor, pasted: Tensor, weight: Tensor | None) -> Tensor:
    """Weighted mean of error^2 over what counts: the frames of noisy chunks that were not given."""
    counts = (_per_frame(~is_clean, error) * ~pasted * (1 if weight is None else weight)).expand_as(error)
    return (counts * error**2).sum() / counts.sum().clamp(min=1)


def flow_matching_loss(dit: DiT, latents: Tensor, text: Tensor, text_mask: Tensor,
                       cfg: TrainingConfig = TrainingConfig(), sampler: SamplerConfig = SamplerConfig(),
                       images: Tensor | None = None, weight: Tensor | None = None,
                       generator: torch.Generator | None = None) -> Tensor:
    """E || v_theta(x_i^{t_i} | t_i, text, {x_j, j < i}) - (data_i - noise_i) ||^2 over noisy chunks.

    latents (B, 16, T, H, W), scaled, T = 6 n; text (B, n, L, C) with its special tokens, text_mask (B, n, L):
    one caption per chunk. Text, image and video to video are one objective (report 2.3): they differ in how
    many clean frames lead. Gradients flow through the clean chunks too (stopping them hurts much, says the
    report). Draws come from `generator` (on the CPU). The scalar loss is a mean over the elements that count,
    weighted by weight (B, 1, T, H, W) if that is given (ours: small objects deserve more than their size).

    images (B, 16, 1, H, W): a frame of each clip encoded alone, as the sampler encodes the image of image to
    video; best the fourth, the last that a first latent stands for. Without it the clip's own first latent
    takes that place, which tells more than an image can: its four frames move.
    """
    rand = lambda *shape: torch.rand(*shape, generator=generator)
    latents, text, text_mask, given = _clips(dit, latents, text, text_mask, images, cfg, rand)
    B, n = text.shape[:2]
    t, is_clean = draw_times(B, n, given // CHUNK, cfg, sampler, generator)
    x, noise, pasted = _corrupt(latents, t, is_clean, given, cfg, generator)

    # Text: clean chunks are always shown null text, as the cache's are; some clips lose theirs altogether.
    # An empty caption is null text too, but keeps the flag of a caption, as in the sampler.
    nulled = is_clean | (rand(B, 1) < cfg.null_share)
    text, text_mask = _with_null_text(dit, text, text_mask, nulled)

    # Attention ranges as in the sampler, by each chunk's own t; some clips see no history (third branch).
    ranges = sampler.kv_ranges or (n,)
    edges = shift_time((torch.arange(1, len(ranges)) / len(ranges)) ** 2)
    reach = torch.tensor(ranges)[torch.bucketize(t, edges, right=True)]
    from_outside = torch.arange(n) < (given // CHUNK)[:, None]
    first_seen = _first_seen(reach, is_clean, from_outside, cfg, sampler, rand)

    v = dit(x, t.to(latents.device), text, text_mask, first_seen=first_seen,
            conditional=~nulled.to(latents.device))
    return _mean_square(v - (latents - noise), is_clean, pasted, weight)


def vae_loss(vae: VAE, video: Tensor, weight: Tensor | None = None, kl_weight: float = 1e-6,
             latent_noise: Tensor | None = None, generator: torch.Generator | None = None
             ) -> tuple[Tensor, Tensor]:
    """L1 + KL (report 2.1, without LPIPS and GAN terms): video (B, 3, frames, h, w) -> loss, reconstruction.

    weight (B, 1, frames, h, w) makes some pixels count more; the mean of |error| * weight is taken as it is.
    latent_noise (B,) adds noise of that size, in deviations of a channel, to what is decoded: ours, for small
    models. Latents then say coarsely what matters most, and the DiT's own errors do less harm.
    """
    mean, logvar = vae.moments(video)
    spread = (0.5 * logvar).exp()
    if latent_noise is not None:
        deviation = mean.detach().std(dim=(0, 2, 3, 4), keepdim=True)
        spread = (spread**2 + (latent_noise.to(mean).view(-1, 1, 1, 1, 1) * deviation) ** 2).sqrt()
    recon = vae.decoder(mean + spread * torch.randn(mean.shape, generator=generator).to(mean))
    if video.shape[2] == 1:
        recon = recon[:, :, :1]
    error = (recon.float() - video).abs()
    kl = 0.5 * (mean.float() ** 2 + logvar.float().exp() - 1 - logvar.float())
    return (error if weight is None else error * weight).mean() + kl_weight * kl.mean(), recon


# Shortcut distillation (report section 2.5, after Frans et al. 2024). The student is also told its step size
# s, as d = 1/(2s) (`shortcut_d`), and learns to go in one step as far as it went in two of half the size:
#
#     x' = x + dt1 v(x, t, s)
#     v(x, t, 2s) := [dt1 v(x, t, s) + dt2 v(x', t + dt1, s)] / (dt1 + dt2)
#
# dt1 and dt2 differ, as the time grid is not uniform. At the smallest step the target is the teacher's guided
# velocity, so three branches become one as well. Ours, where the report is silent: the corruption of a clip
# (TrainingConfig, as for the base model) and that all chunks of a clip are at a moment of the pipeline.

SHORTCUT_CYCLE = (64,) * 8 + (32, 16, 8)   # 1/s of one training step after the other, over and over


def shortcut_steps(step: int, cycle: Sequence[int] = SHORTCUT_CYCLE) -> int:
    """How many steps from noise to clean the student learns in training step `step`: 64, 32, 16 or 8."""
    return cycle[step % len(cycle)]


def two_half_steps(velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, times: Sequence[Tensor],
                   paste: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """Mean velocity of two Euler steps: the right side of the formula above, (B, 16, T, H, W).

    velocity(x, t) is asked twice; times: start, middle and end, each (B, n). Where they do not move (a clean
    chunk) the answer is 0. paste(x') restores given frames, as the sampler does after each step.
    """
    dt1, dt2 = (_per_frame(b - a, x) for a, b in itertools.pairwise(times))
    first = velocity(x, times[0])
    second = velocity(paste(x + dt1 * first), times[1])
    return (dt1 * first + dt2 * second) / (dt1 + dt2).clamp(min=1e-9)


def guided_velocity(dit: DiT, x: Tensor, t: Tensor, text: Tensor, text_mask: Tensor, is_clean: Tensor,
                    first_seen: Tensor, sampler: SamplerConfig) -> Tensor:
    """What the sampler makes of a base model's three branches (section 8), here for a batch of clips.

    x (B, 16, T, H, W), t, is_clean and first_seen (B, n), text (B, n, L, C) -> (B, 16, T, H, W). Clean chunks
    have the unconditional flag in every branch: the sampler's cache holds their keys from such a branch.
    """
    all_null, alone = torch.ones_like(is_clean), torch.arange(t.shape[1]).expand(t.shape)
    texts, masks = zip(*(_with_null_text(dit, text, text_mask, nulled)
                         for nulled in (is_clean, all_null, all_null)), strict=True)
    v = dit(torch.cat([x] * 3), t.repeat(3, 1), torch.cat(texts), torch.cat(masks),
            first_seen=torch.cat([first_seen, first_seen, alone]),
            conditional=torch.cat([~is_clean, ~all_null, ~all_null]).to(x.device))
    texted, previous, nothing = v.chunk(3)
    scales = torch.tensor([[guidance_scales(sampler, u) for u in clip] for clip in t.tolist()])  # (B, n, 2)
    w_prev, w_text = (_per_frame(w, x) for w in scales.unbind(-1))
    return (1 - w_prev) * nothing + (w_prev - w_text) * previous + w_text * texted


def shortcut_loss(student: DiT, teacher: DiT, latents: Tensor, text: Tensor, text_mask: Tensor,
                  num_steps: int, cfg: TrainingConfig = TrainingConfig(),
                  sampler: SamplerConfig = SamplerConfig(), average: DiT | None = None,
                  images: Tensor | None = None, weight: Tensor | None = None,
                  generator: torch.Generator | None = None) -> Tensor:
    """|| v_student(x, t, s) - target ||^2 over noisy chunks, for s = 1/num_steps (see `shortcut_steps`).

    latents, text, text_mask, images, weight, generator: as in flow_matching_loss. teacher: the base model,
    sampled as `sampler` says (its guidance and ranges); it may be the student itself if that is a base model
    with a LoRA (`add_lora`), which is then taken off while it teaches: one copy in memory. average: whose
    half steps are the target, such as a moving average of the student; default: the student's own. No
    gradient reaches any target. Not used: pipeline_share and null_share of `cfg`, negative tokens and shot
    transitions of `sampler`.

    Every clip is at a moment of the pipeline at which its last chunk is in flight. Earlier moments are those
    of shorter clips, so train on clips of 1, 2, ... chunks. The student sees what it will see in the sampler:
    null text for clean chunks only, its conditional flag and one d for all; clips of one chunk and those that
    see no history (cfg.ranges_share) teach it the run "alone" of the oldest chunk.
    """
    halvings = [max(SHORTCUT_CYCLE) >> i for i in range(7)]
    _require(num_steps in halvings, f"num_steps {num_steps} is not one of {halvings}")
    sampler = dataclasses.replace(sampler, num_steps=num_steps)
    rand = lambda *shape: torch.rand(*shape, generator=generator)

    # A moment of the pipeline: how many steps of its own each chunk has done; num_steps or more: it has left.
    latents, text, text_mask, given = _clips(student, latents, text, text_mask, images, cfg, rand)
    B, n = text.shape[:2]
    last_stage, j = (torch.randint(m, (B, 1), generator=generator)
                     for m in (sampler.window, num_steps // sampler.window))
    chunk = torch.arange(n)
    done = (last_stage + n - 1 - chunk) * (num_steps // sampler.window) + j                    # (B, n)
    from_outside = chunk < (given // CHUNK)[:, None]
    is_clean = from_outside | (done >= num_steps)
    grid = lambda N, i: torch.where(is_clean, sampler.clean_t, timestep_grid(N)[i.clamp(max=N)])
    t = grid(num_steps, done)
    x, _, pasted = _corrupt(latents, t, is_clean, given, cfg, generator)
    paste = lambda x: torch.where(pasted, latents, x)

    # What each chunk sees, as in the sampler; some clips see no history.
    reach = torch.tensor([int(min(n, kv_range(sampler, i))) for i in range(num_steps)])
    reach = reach[done.clamp(max=num_steps - 1)]                                               # (B, n)
    first_seen = _first_seen(reach, is_clean, from_outside, cfg, sampler, rand)

    def velocity(dit: DiT, N: int) -> Callable[[Tensor, Tensor], Tensor]:
        """v(x, t, 1/N) of a distilled model, as a function of x and t."""
        shown = _with_null_text(dit, text, text_mask, is_clean)
        return lambda x, t: dit(x, t.to(x.device), *shown, first_seen=first_seen, d=shortcut_d(N)[0])

    with torch.no_grad():
        if num_steps == max(SHORTCUT_CYCLE):
            with lora_off(teacher) if teacher is student else contextlib.nullcontext():
                target = guided_velocity(teacher, x, t.to(x.device), text, text_mask, is_clean, first_seen,
                                         sampler)
        else:
            times = [grid(2 * num_steps, 2 * done + k) for k in range(3)]
            target = two_half_steps(velocity(average or student, 2 * num_steps), x, times, paste)
    return _mean_square(velocity(student, num_steps)(x, t) - target, is_clean, pasted, weight)


# A low-rank part (Hu et al. 2021) is the affordable way in for a real checkpoint: once it is there, both
# objectives above train it alone. It hangs on every linear layer of the blocks as a child named "lora", and
# its file holds these children by name; the weights of the model keep their names.


class LoRA(nn.Module):
    """What is added to a linear layer's output: scale * up(down(x)), nothing until it is trained.

    Float32 whatever the layer's type: small updates would be lost in bf16. A hook rather than a wrapper, so
    that names stay as they are and layers with fp8 weights can have one too.
    """

    def __init__(self, linear: nn.Module, rank: int):
        super().__init__()
        (n_out, n_in), device = linear.weight.shape, linear.weight.device
        self.down = nn.Parameter(torch.randn(rank, n_in, device=device) * n_in**-0.5)
        self.up = nn.Parameter(torch.zeros(n_out, rank, device=device))
        self.scale = 1.0
        self.handle = linear.register_forward_hook(
            lambda linear, args, out: (out + linear.lora(args[0])).to(out.dtype))

    def forward(self, x: Tensor) -> Tensor:                                  # (..., in) -> (..., out)
        return self.scale * F.linear(F.linear(x.float(), self.down), self.up)


def lora_targets(dit: DiT) -> dict[str, nn.Module]:
    """The layers that get one: every linear of the blocks, by name."""
    return {name: m for name, m in dit.named_modules()
            if name.startswith("layers.") and isinstance(m, nn.Linear | FP8Linear)}


def loras(dit: DiT) -> list[LoRA]:
    return [m for m in dit.modules() if isinstance(m, LoRA)]


def add_lora(dit: DiT, rank: int) -> DiT:
    """Freeze a DiT and give it a LoRA, the only part left to train: `[p for p in dit.parameters() if
    p.requires_grad]`. Changes the model in place; ValueError if it has one already."""
    _require(rank >= 1, f"LoRA rank {rank} must be at least 1")
    _require(not loras(dit), "the model has a LoRA already: merge_lora it first")
    dit.requires_grad_(False)
    for linear in lora_targets(dit).values():
        linear.lora = LoRA(linear, rank)
    return dit


def scale_lora(dit: DiT, scale: float) -> None:
    """How strongly the LoRA acts: 1 as it was trained, 0 not at all."""
    for lora in loras(dit):
        lora.scale = scale


@contextlib.contextmanager
def lora_off(dit: DiT) -> Iterator[None]:
    """The model without its LoRA, for the length of a `with` block."""
    before = [lora.scale for lora in loras(dit)]
    scale_lora(dit, 0.0)
    try:
        yield
    finally:
        for lora, scale in zip(loras(dit), before, strict=True):
            lora.scale = scale


@torch.no_grad()
def merge_lora(dit: DiT) -> DiT:
    """Add the LoRA to the weights and take it off: the same velocities, at the speed of the plain model.

    ValueError for fp8 layers, whose e4m3 steps are coarser than what a LoRA adds: use it unmerged there.
    """
    targets = [linear for linear in lora_targets(dit).values() if hasattr(linear, "lora")]
    _require(not any(isinstance(linear, FP8Linear) for linear in targets),
             "a LoRA cannot be merged into fp8 weights: use it unmerged, or merge it into the bf16 model")
    for linear in targets:
        lora = linear.lora
        linear.weight.copy_(linear.weight.float() + lora.scale * lora.up @ lora.down)
        lora.handle.remove()
        del linear.lora
    return dit


def save_lora(dit: DiT, file: str | Path) -> None:
    """Write the LoRA alone: LAYER.lora.down (rank, in) and LAYER.lora.up (out, rank), in safetensors."""
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in dit.state_dict().items() if ".lora." in k}, file)


def check_lora(dit: DiT, file: str | Path) -> int:
    """The rank of a LoRA file, from its header. ValueError if it does not fit the model (meta will do)."""
    found = read_headers([file])
    ranks = {shape[0] for name, (shape, _) in found.items() if name.endswith(".lora.down") and shape}
    _require(len(ranks) == 1, f"{str(file)!r} is no LoRA of one rank: it has {len(found)} tensor(s), such as "
             f"{min(found, default=None)!r}")
    (rank,) = ranks
    expected = {f"{name}.lora.{part}": (shape, False) for name, linear in lora_targets(dit).items()
                for part, shape in (("down", (rank, linear.weight.shape[1])),
                                    ("up", (linear.weight.shape[0], rank)))}
    compare_headers(found, expected, f"the LoRA {str(file)!r} is for another model")
    return rank


def load_lora(dit: DiT, file: str | Path, scale: float = 1.0) -> DiT:
    """Add a saved LoRA to a model, in place; scale: how strongly it acts. ValueError if it does not fit."""
    from safetensors.torch import load_file

    add_lora(dit, check_lora(dit, file))
    dit.load_state_dict(load_file(file, device=str(dit.null_text.device)), strict=False)
    scale_lora(dit, scale)
    return dit.requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------
# 11  Loading and the pipeline
# ----------------------------------------------------------------------------------------------------------
# One folder per model: config.json and model.safetensors (or numbered shards with the usual index). A DiT
# folder also holds special_tokens.safetensors; the VAE and T5 folders stand beside it unless said otherwise:
#
#     tiny/base/  config.json {"dit": ..., "sampler": ...}  model.safetensors  special_tokens.safetensors
#     tiny/vae/   config.json {"vae": ...}                  model.safetensors
#     tiny/t5/    config.json (transformers)                model.safetensors  spiece.model


def read_config(folder: str | Path, part: str, kind: type) -> VAEConfig | DiTConfig | SamplerConfig:
    """One dataclass of a folder's config.json. Raises ValueError if the file or a key is not as expected."""
    file = Path(folder) / "config.json"
    _require(file.is_file(), f"no model in {str(folder)!r}: {file} does not exist; give a folder that "
             f"convert_weights.py or tiny/train.py has written")
    try:
        return make_config(kind, json.loads(file.read_text(encoding="utf-8"))[part])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError,
            ZeroDivisionError) as error:
        raise ValueError(f"{file} is not a config with a valid {part!r} part: {error}") from None


def make_config(kind: type, values: dict) -> VAEConfig | DiTConfig | SamplerConfig:
    """A dataclass from JSON's types: lists become tuples, whole numbers floats where the field is one."""
    made = {}
    for name, value in values.items():
        want = type(getattr(kind, name))                 # of the default: dataclasses keep it on the class
        made[name] = value = float(value) if want is float and type(value) is int else _tuples(value)
        _require(type(value) is want or (name, value) == ("num_frames", None),
                 f"{name} is {value!r}: it must be of type {want.__name__}")
    return kind(**made)


def _tuples(v):
    return tuple(_tuples(u) for u in v) if isinstance(v, list) else v


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a folder: model.safetensors, or all that its index names."""
    files, index = ["model.safetensors"], Path(folder) / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is no index of safetensors ({error}): convert it again") from None
    paths = [Path(folder) / name for name in files]
    for path in paths:
        _require(path.is_file(), f"{path} is missing: convert or download the model again")
    return paths


def read_headers(files: Sequence[str | Path]) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Name -> shape, whether fp8, of all tensors in safetensors files. ValueError if one is corrupt."""
    from safetensors import SafetensorError, safe_open

    found = {}
    for file in files:
        Path(file).open("rb").close()                    # says, unlike safetensors, if it may not be read
        try:
            with safe_open(file, "pt") as f:
                for name in f.keys():
                    part = f.get_slice(name)
                    found[name] = tuple(part.get_shape()), part.get_dtype() == "F8_E4M3"
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is truncated or corrupt ({error}): "
                             f"download or convert it again") from None
    return found


def compare_headers(found: dict, expected: dict, complaint: str) -> None:
    """ValueError, beginning with the complaint and naming the first differences, if they are not equal."""
    for problem, names in (("lacks", expected.keys() - found.keys()),
                           ("has unknown", found.keys() - expected.keys()),
                           ("has other shapes or types for", [k for k in expected if k in found
                                                              and found[k] != expected[k]])):
        _require(not names, f"{complaint}: it {problem} {len(names)} tensor(s), such as "
                 f"{min(names, default=None)!r}")


def build(make: Callable[[], nn.Module], folder: str | Path) -> nn.Module:
    """A module without memory (on the meta device), after a look at the headers of a folder's files.

    ValueError, naming the first differences, if a file is corrupt or a name, shape or fp8 type differs.
    """
    with torch.device("meta"):
        module = make()
    expected = {k: (tuple(v.shape), v.dtype == torch.float8_e4m3fn) for k, v in module.state_dict().items()}
    compare_headers(read_headers(weight_files(folder)), expected,
                    f"the checkpoint in {str(folder)!r} does not fit its config")
    return module


def fill(module: nn.Module, folder: str | Path, device="cpu", dtype: torch.dtype | None = None) -> nn.Module:
    """Read a folder's weights straight to the device, as `dtype` or in the dtypes the module has: official
    files hold in bf16 the norms that are computed in float32."""
    from safetensors.torch import load_file

    dtypes = {k: dtype or v.dtype for k, v in module.state_dict().items()}
    for file in weight_files(folder):
        weights = {k: v.to(dtypes[k]) for k, v in load_file(file, device=str(device)).items()}
        module.load_state_dict(weights, strict=False, assign=True)
    return module.eval().requires_grad_(False)


def load_dit(folder: str | Path, device="cpu", dtype: str | None = None, backend: str = "torch") -> DiT:
    """A DiT alone; dtype overrides that of its blocks."""
    cfg = read_config(folder, "dit", DiTConfig)
    cfg = dataclasses.replace(cfg, dtype=dtype or cfg.dtype)
    return fill(build(lambda: DiT(cfg, get_ops(backend)), folder), folder, device)


def load_vae(folder: str | Path, device="cpu", dtype: torch.dtype | None = None, backend: str = "torch"
             ) -> VAE:
    """A VAE alone, in float32 or `dtype`."""
    cfg = read_config(folder, "vae", VAEConfig)
    return fill(build(lambda: VAE(cfg, get_ops(backend)), folder), folder, device, dtype)


def fit_frames(frames: np.ndarray, height: int, width: int, how: str = "crop") -> Tensor:
    """uint8 (frames, h, w, 3) -> (1, 3, frames, height, width) in [-1, 1].

    "crop" keeps the aspect ratio and cuts the sides, "pad" keeps it and adds black, "stretch" (the official
    code's way) does not keep it.
    """
    _require(how in ("crop", "pad", "stretch"), f"fit {how!r} is not 'crop', 'pad' or 'stretch'")
    x = torch.from_numpy(np.ascontiguousarray(frames)).movedim(-1, 1).float()  # (frames, 3, h, w)
    h, w = x.shape[-2:]
    scales = height / h, width / w
    if how != "stretch":
        scales = [max(scales) if how == "crop" else min(scales)] * 2
    size = tuple(max(1, round(s * scale)) for s, scale in zip((h, w), scales, strict=True))
    if size != (h, w):
        x = F.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2              # negative: cut instead of add
    x = F.pad(x, (left, width - size[1] - left, top, height - size[0] - top))
    return rearrange(x / 127.5 - 1, "t c h w -> 1 c t h w")


class MAGI:
    """The one object a user holds: text, image and video to video, streamed chunk by chunk.

    >>> pipe = load("tiny/base")                                             # doctest: +SKIP
    >>> for frames in pipe("a red ball bounces", num_frames=96):             # doctest: +SKIP
    ...     show(frames)                 # uint8 (<= 24, height, width, 3), as soon as each second is clean
    """

    def __init__(self, dit: DiT, vae: VAE, sampler: SamplerConfig, special_tokens: dict[str, Tensor],
                 encode_text: Callable[[Sequence[str]], tuple[Tensor, Tensor]]):
        self.dit, self.vae, self.sampler, self.special_tokens = dit, vae, sampler, special_tokens
        self.encode_text = encode_text                   # captions -> text (n, L, C), mask (n, L)

    @property
    def device(self) -> torch.device:
        return self.dit.null_text.device

    def __call__(self, prompt: str | Sequence[str] | tuple[Tensor, Tensor], *,
                 image: np.ndarray | None = None, video: np.ndarray | None = None, prefix_frames: int = 32,
                 fit: str = "crop", progress: Callable[[Progress], None] | None = None,
                 **settings) -> Iterator[np.ndarray]:
        """Yield uint8 frames (<= 24, height, width, 3), exactly num_frames in all, one chunk at a time.

        prompt is one caption, a list with one per chunk (the last goes on), or the (text, mask) that
        encode_text gave. image uint8 (h, w, 3): the video starts with it. video uint8 (frames, h, w, 3): the
        result goes on after its last frames, of which `prefix_frames` are shown to the model. settings
        replace fields of the sampler's config, such as num_frames, seed, num_steps, height, width. Raises
        ValueError for bad ones, and later FloatingPointError if the model gives what is not finite.
        """
        known = [field.name for field in dataclasses.fields(SamplerConfig)]
        unknown = ", ".join(settings.keys() - set(known))
        _require(not unknown, f"unknown setting {unknown}: choose from {', '.join(known)}")
        cfg = dataclasses.replace(self.sampler, **settings)
        given = prefix_clip(image, video, prefix_frames)
        prompt = [prompt] if isinstance(prompt, str) else prompt
        _require(len(prompt) > 0, "the prompt is an empty list: give at least one caption, which may be ''")
        text, mask = self.encode_text(prompt) if isinstance(prompt[0], str) else prompt
        return self._frames(cfg, text, mask, given, fit, image is not None, progress)

    @torch.inference_mode()
    def _frames(self, cfg: SamplerConfig, text: Tensor, mask: Tensor, given: np.ndarray | None, fit: str,
                is_image: bool, progress: Callable | None) -> Iterator[np.ndarray]:
        prefix = None
        if given is not None:
            pixels = fit_frames(given, cfg.height, cfg.width, fit).to(self.device)
            prefix = self.vae.encode(pixels.to(self.vae.dtype))[0].float() * SCALE_FACTOR
        left = cfg.num_frames if cfg.num_frames is not None else math.inf
        if cfg.num_frames is not None:       # whole latent frames; an image's own is among those emitted
            latents = math.ceil(cfg.num_frames / FRAMES_PER_LATENT) - is_image
            cfg = dataclasses.replace(cfg, num_frames=max(1, latents * FRAMES_PER_LATENT))
        for i, latent in sample(self.dit, text, mask, cfg, special_tokens=self.special_tokens, prefix=prefix,
                                progress=progress):
            if i == 0 and prefix is not None and prefix.shape[1] == 1 and not is_image:
                latent = latent[:, 1:]       # `sample` takes four frames of video for an image and keeps them
            frames = self.vae.decode((latent[None] / SCALE_FACTOR).to(self.vae.dtype))[0].float()
            if not frames.isfinite().all():
                raise FloatingPointError("the model gives numbers that are not finite: its weights are "
                                         "damaged, or a guidance scale, LoRA scale or dtype is too extreme")
            frames = ((frames.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
            frames = frames[:, : int(min(left, frames.shape[1]))].permute(1, 2, 3, 0).cpu().numpy()
            left -= len(frames)
            yield frames


def prefix_clip(image: np.ndarray | None, video: np.ndarray | None, prefix_frames: int) -> np.ndarray | None:
    """The frames the model is shown: an image as a one-frame clip, or the last of a video, in fours."""
    _require(image is None or video is None, "give an image or a video, not both")
    if image is not None:
        return image[None]
    if video is None:
        return None
    _require(prefix_frames >= FRAMES_PER_LATENT and prefix_frames % FRAMES_PER_LATENT == 0,
             f"prefix_frames {prefix_frames} must be a positive multiple of {FRAMES_PER_LATENT}: try "
             f"{max(1, round(prefix_frames / FRAMES_PER_LATENT)) * FRAMES_PER_LATENT}")
    _require(len(video) >= FRAMES_PER_LATENT,
             f"the video has {len(video)} frames, at least {FRAMES_PER_LATENT} are needed")
    return video[-min(prefix_frames, len(video) // FRAMES_PER_LATENT * FRAMES_PER_LATENT):]


def load(folder: str | Path, *, vae: str | Path | None = None, t5: str | Path | None = None, device="cpu",
         dtype: str | None = None, vae_dtype: torch.dtype | None = None, backend: str = "torch") -> MAGI:
    """Load a model folder; vae and t5 default to its neighbours. dtype overrides that of the DiT's blocks.

    Files are checked against their configs before any weight is read. T5 is read when a prompt comes, used
    once and freed, so a model without it can be used with encoded text. ValueError for what does not fit.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    vae, t5 = Path(vae or folder.parent / "vae"), Path(t5 or folder.parent / "t5")
    cfg, sampler = read_config(folder, "dit", DiTConfig), read_config(folder, "sampler", SamplerConfig)
    vae_cfg = read_config(vae, "vae", VAEConfig)
    build(lambda: VAE(vae_cfg), vae)                     # only to check it before the large DiT is read
    tokens, special_tokens = folder / "special_tokens.safetensors", {}
    if tokens.is_file():
        read_headers([tokens])                           # says if it is corrupt
        special_tokens = {k: v.float() for k, v in load_file(tokens).items()}

    def encode_text(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        return T5(t5, cfg.text_length, device)(captions)                     # the encoder dies with this line

    return MAGI(load_dit(folder, device, dtype, backend), load_vae(vae, device, vae_dtype, backend), sampler,
                special_tokens, encode_text)
