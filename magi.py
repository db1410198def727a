"""MAGI-1 in one file: autoregressive video generation, chunk by chunk.

This is the whole system of "MAGI-1: Autoregressive Video Generation at Scale" (Sand AI, arXiv 2505.13211):
a transformer VAE, the text of T5, a diffusion transformer (DiT) with block-causal attention, and the sampler
that keeps up to four one-second chunks in flight at different noise levels. It loads the official checkpoints
(through convert_weights.py) and equals the official code on every recorded run (within 2e-4, fp8 within
3e-2), but for the first frame of an image run, which here stays the image.

    prompt --T5--> text (L, 4096) ----------------------------+
                                                              v
    image, video --VAE.encode--> prefix latents --> [ chunk pipeline: DiT, guidance, Euler step ]*
    noise (seed, chunk) ------------------------------^       |
                                                              +--> latents --VAE.decode--> a second of frames

Time runs from t = 0 (pure noise) to t = 1 (clean): x_t = (1-t) noise + t data, the network predicts the
velocity v = data - noise, and an Euler step is x += v dt. A **chunk** is 24 frames = 6 latent frames. A chunk
sees itself and earlier chunks, never later ones; when it is a quarter done the next one starts, so a video
streams out while its later chunks are still noise. Text, image and video to video are one model: they differ
only in the **prefix**, the clean frames that stand before the noise.

What is notable in this model:
    - Self- and cross-attention run in parallel on one normalised input and share one output projection.
    - Time acts only through two tanh gates a layer, each followed by a norm: there is no shift and no scale.
    - Queries and keys are normalised (QK-norm), and rotary positions with learned bands turn 3/4 of a head.
    - Every chunk of a forward has its own time, its own text and its own range of keys (block-causal).
    - Texts are packed end to end without padding, so cross-attention is block attention too.

Symbols, the same everywhere:
    B batch   T latent frames   H W latent height, width   N tokens   M key tokens   D model width
    Hq Hkv query, key/value heads   hd head width   L text length, C width   n chunks in a forward
    K chunks in the video   P whole prefix chunks   d half the number of steps: a distilled model is told it
    kv_range: how many chunks a chunk sees, itself included.   first_seen: the oldest of them.
    spans: their key tokens, [start, end).   stage: num_steps / window steps.
    clean: a chunk that is finished, or given.   branch: one of the forwards that guidance combines.
    null text: the learned text that stands for no caption.   LN1: LayerNorm with weight + 1 (LayerNorm1p).
    Video is (B, 3, frames, height, width) in [-1, 1], latents (B, 16, T, H, W); tokens are ordered t, h, w.

Contents
    1  Configs and presets      the model zoo as one literal table
    2  Shared parts             norms, timestep features, rotary positions, attention: the readable reference
    3  VAE                      ViT encoder and decoder, tiling
    4  Text                     what T5 gives, and learned tokens in front of it
    5  KV cache                 keys and values of clean chunks, and which of them a chunk reads
    6  DiT                      fp8 linear, parallel self- and cross-attention, layer, model
    7  Plan                     time grid, attention ranges, and what each forward holds: pure functions
    8  Guidance                 the branches and their shares; what need not be computed
    9  Sampler                  the loop over the plan
    10 Loading and the pipeline folders on disk; the one object that a user needs

What lies beside it: captions.py (prompts, T5), checkpoints.py (files on disk, checks of configs),
training.py (objectives, LoRA), parallel.py (several GPUs, streamed weights), kernels.py (Triton versions of
section 2), media.py (pictures and video files); README.md lists all files. Left out: CPU offload of the
cache, which holds only a few chunks, and CUDA graphs.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

import captions
import checkpoints
from captions import T5, Prompt, clean_caption, tokenize
from checkpoints import NEGATIVE_TOKENS, SPECIAL_TOKENS, build, fill, read_config, require, token_names

__all__ = ["DiT", "DiTConfig", "KVCache", "MAGI", "PRESETS", "Prompt", "SamplerConfig", "T5", "VAE",
           "VAEConfig", "clean_caption", "load", "load_dit", "load_vae", "plan", "sample", "shot_transition",
           "tokenize"]

Device = str | torch.device

# ----------------------------------------------------------------------------------------------------------
# 1  Configs and presets
# ----------------------------------------------------------------------------------------------------------
# Three frozen dataclasses describe a model and a run. They check themselves when they are made
# (checkpoints.py), so a bad number is refused at once, not after an hour of sampling; `require(ok, message)`
# raises ValueError throughout. `cfg` is a config; only in `cfg_t` it stands for classifier-free guidance.

SCALE_FACTOR = 0.18215     # brings latents to unit variance, as in latent diffusion
CHUNK = 6                  # latent frames in a chunk: 24 video frames, one second
FRAMES_PER_LATENT = 4      # the VAE's temporal compression


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
    use_final_proj: bool = False  # extra Linear + LayerNorm before the pixel shuffle: narrow models need it

    def __post_init__(self):
        checkpoints.check_vae_config(self)

    @property
    def patch(self) -> tuple[int, int, int]:
        """Frames, rows and columns that one token stands for."""
        return self.patch_length, self.patch_size, self.patch_size

    @property
    def out_features(self) -> int:
        """Channels of a token before the pixel shuffle, which deals them out to the pixels of its patch."""
        return 4 * math.prod(self.patch) if self.use_final_proj else self.embed_dim


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
    in_channels: int = 16         # 32 in the 24B: it is given its latent twice (the report does not say why)
    out_channels: int = 16        # 32 in the 24B: only the first latent_channels are used
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
        checkpoints.check_dit_config(self)

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

    num_steps: int = 64           # Euler steps per chunk
    window: int = 4               # chunks in flight at most
    # How many chunks a chunk sees, itself included, in each part of its way from noise to clean; (): all.
    kv_ranges: tuple[int, ...] = (5, 4, 3, 2)
    clean_kv_range: int = 1       # the same once it is clean; -1: the last of kv_ranges
    kv_ranges_at: tuple[tuple[int, tuple[int, ...]], ...] = ()  # shot transitions: (generated chunk, ranges)
    clean_t: float = 0.9999       # the t of clean chunks: in training they carry a little noise
    distilled: bool = False       # one branch, guidance distilled in
    # Guidance by t: each number of cfg_t begins a bucket. The first four are where the quarters of the steps
    # begin (`timestep_grid`); the last is kept from the official configs, no step begins in it.
    cfg_t: tuple[float, ...] = (0.0, 0.0217, 0.1, 0.3, 0.999)
    prev_scales: tuple[float, ...] = (1.5, 1.5, 1.5, 1.0, 1.0)  # w_prev of each bucket: towards the history
    text_scales: tuple[float, ...] = (7.5, 7.5, 7.5, 0.0, 0.0)  # w_text of each bucket: towards the caption
    # Distilled models: beyond this t, the velocity of the oldest chunk is 0.7 * with history + 0.3 * without.
    nearly_clean_t: float = 0.3
    nearly_clean_blend: float = 0.7
    shortcut_mode: str = "8,16,16"       # 12 steps: the long one of each quarter comes first; "16,16,8": last
    special_tokens: tuple[str, ...] = ("hq", "duration")  # put in front of every caption
    negative_tokens: tuple[str, ...] = ()                 # put in front of the null text
    num_frames: int | None = 96   # video frames to generate; None: until stopped
    height: int = 720
    width: int = 720
    fps: int = 24
    seed: int = 1234

    def __post_init__(self):
        checkpoints.check_sampler_config(self)


class Preset(NamedTuple):
    dit: DiTConfig
    sampler: SamplerConfig


_24B = DiTConfig(
    num_layers=48, hidden_size=6144, num_heads=48, ffn_size=16384, gated_ffn=True, in_channels=32,
    out_channels=32, x_scale=0.1)
_TINY = DiTConfig(
    num_layers=6, hidden_size=256, num_heads=4, num_kv_heads=2, head_dim=64, ffn_size=1024,
    text_dim=128, text_length=64, null_length=8, dtype="float32")
# Official configs say 16 steps for the distilled 24B and 64 for the distilled 4.5B. Here it is 16 for
# both: 64, 32, 16 and 8 steps are all trained budgets, and 16 take a quarter of the time.
_DISTILL = SamplerConfig(num_steps=16, distilled=True)
_DISTILL_24B = dataclasses.replace(_DISTILL, width=1280)
PRESETS = {                      # the model zoo (model card)
    "4.5B-base":        Preset(DiTConfig(), SamplerConfig(num_steps=64)),
    "4.5B-distill":     Preset(DiTConfig(), _DISTILL),
    "4.5B-distill-fp8": Preset(DiTConfig(fp8=True), _DISTILL),
    "24B-base":         Preset(_24B, SamplerConfig(num_steps=32, width=1280)),
    "24B-distill":      Preset(_24B, _DISTILL_24B),
    "24B-distill-fp8":  Preset(dataclasses.replace(_24B, fp8=True), _DISTILL_24B),
    "tiny":             Preset(_TINY, SamplerConfig(num_steps=16, height=128, width=128)),
}
VAE_PRESETS = {
    "magi": VAEConfig(),
    "tiny": VAEConfig(video_size=128, video_length=12, embed_dim=256, depth=3, num_heads=4,
                      use_final_proj=True),
}


# ----------------------------------------------------------------------------------------------------------
# 2  Shared parts
# ----------------------------------------------------------------------------------------------------------
# Small parts; most are the DiT's, the VAE uses `attention` and `small_normal`. The functions gathered in
# TORCH_OPS are the specification: they run anywhere, and kernels.py offers the same names with the same
# signatures in Triton.


class LayerNorm1p(nn.LayerNorm):
    """LayerNorm whose weight is stored as its distance from one: weight decay pulls towards identity."""

    def reset_parameters(self):
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis in the dtype of the weights (float32 for most norms of the DiT)."""
        x = x.to(self.weight.dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


def small_normal(*shape: int) -> nn.Parameter:
    """A learned table with a deviation of 0.02. (Other ways, such as 0.02 * torch.randn, import
    torch._dynamo on the meta device, which takes a second.)"""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))


def timestep_features(t: Tensor) -> Tensor:
    """Sinusoidal features of t in [0, 1]: (...) -> (..., 256), [cos | sin], float32 (Vaswani et al. 2017)."""
    i = torch.arange(128, device=t.device, dtype=torch.float32)
    freqs = torch.exp(-math.log(10000) * i / 128)            # from 1 down to almost 1/10000
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

    q (B, N, Hq, hd), k and v (B, M, Hkv, hd) -> (B, N, Hq, hd). The N x M scores are not
    held where PyTorch has a fused kernel for these inputs.
    """
    q, k, v = (u.transpose(1, 2) for u in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def block_attention(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, out: Tensor | None = None) -> Tensor:
    """Block-causal attention: chunk i of the queries reads the key tokens [start_i, end_i) and no others.

    q (B, N, Hq, hd), N a multiple of n; k and v (B, M, Hkv, hd); spans (1, n, 2) or, where they differ within
    a training batch, (B, n, 2), on the CPU. out: where to write the result (B, N, Hq, hd), which is returned.
    A span is contiguous and everything in it may be read, so there is no mask: one dense attention per chunk.
    """
    out = torch.empty_like(q) if out is None else out
    size = q.shape[1] // spans.shape[1]                           # tokens of a chunk
    for row, row_spans in enumerate(spans.tolist()):
        batch = slice(None) if len(spans) == 1 else slice(row, row + 1)
        for i, (start, end) in enumerate(row_spans):
            chunk = slice(i * size, (i + 1) * size)
            out[batch, chunk] = attention(q[batch, chunk], k[batch, start:end], v[batch, start:end])
    return out


def norm_rotary(x: Tensor, norm: LayerNorm1p, angles: Tensor | None) -> Tensor:
    """QK-norm, then rotary if there are angles: (B, N, heads, hd) -> same, in x's dtype."""
    normed = norm(x)
    return (normed if angles is None else apply_rotary(normed, angles)).to(x.dtype)


def gated_residual(x: Tensor, gate: Tensor, update: Tensor, norm: LayerNorm1p) -> Tensor:
    """x + LN1(gate * update), in float32: x and update (B, N, D), gate (B, n, D) with one row per chunk."""
    update = update.float().unflatten(1, (gate.shape[1], -1))                # (B, n, N/n, D)
    update = norm(gate.float()[:, :, None] * update).flatten(1, 2)
    return (x.float() + update).to(x.dtype)


def swiglu(u: Tensor) -> Tensor:
    """silu(first half) * second half of the last axis: (..., 2 FFN) -> (..., FFN)."""
    gate, value = u.chunk(2, dim=-1)
    return F.silu(gate) * value


def matmul_float32(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T, returned in float32: (..., in), (out, in) -> (..., out).

    The product of two bf16 (or e4m3) numbers is exact in float32, so bf16 instructions that sum in float32
    give the same result at several times the speed. A GPU returns that sum in float32; a CPU rounds it to
    bf16, as after every other linear layer. Neither way is taken where gradients are wanted.
    """
    if x.dtype == weight.dtype == torch.bfloat16 and not torch.is_grad_enabled():
        if x.is_cuda:
            rows = x.flatten(0, -2)
            return torch.mm(rows, weight.t(), out_dtype=torch.float32).unflatten(0, x.shape[:-1])
        if x.device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
            return F.linear(x, weight).float()
    return F.linear(x.float(), weight.float())


def fp8_matmul(x: Tensor, weight: Tensor, divide: Tensor, scale: Tensor) -> Tensor:
    """Quantise x / divide to e4m3, multiply by the e4m3 weight (out, in), scale: (..., in) -> (..., out).

    Runs anywhere, on e4m3 numbers held in wider types, and returns bf16: the reference for the fp8 kernels.
    """
    x8 = (x / divide.float()).clamp_(-448, 448).to(torch.bfloat16).to(torch.float8_e4m3fn)  # 448: e4m3's max
    if x.is_cuda:
        product = matmul_float32(x8.bfloat16(), weight.bfloat16())
    else:
        product = F.linear(x8.float(), weight.float())       # nothing is rounded before it is scaled
    return (product * scale).to(torch.bfloat16)


@dataclass(frozen=True)
class Ops:
    """The operations of a backend: everything that kernels.py may do faster."""

    name: str
    attention: Callable[..., Tensor]
    block_attention: Callable[..., Tensor]
    norm_rotary: Callable[..., Tensor]
    gated_residual: Callable[..., Tensor]
    swiglu: Callable[..., Tensor]
    matmul_float32: Callable[..., Tensor]
    fp8_matmul: Callable[..., Tensor]


TORCH_OPS = Ops("torch", attention, block_attention, norm_rotary, gated_residual, swiglu, matmul_float32,
                fp8_matmul)


def get_ops(backend: str = "torch", device: Device = "cuda") -> Ops:
    """The operations of a backend: "torch" runs anywhere; "triton" is kernels.py on a GPU, and a kernel that
    fails is an error; "auto" chooses for each operation the fastest correct one on a GPU, elsewhere torch."""
    require(backend in ("torch", "triton", "auto"), f"backend {backend!r} is not 'auto', 'torch' or 'triton'")
    if backend == "torch" or backend == "auto" and torch.device(device).type != "cuda":
        return TORCH_OPS
    try:
        return load_kernels().get_ops(backend, device)
    except ImportError as error:                               # Triton is imported only when it is asked for
        require(backend == "auto", f"backend 'triton' is not available here ({error}): use 'torch'")
        return TORCH_OPS


def load_kernels() -> Any:
    """The file kernels.py, under another module name: Hugging Face has a package called `kernels`."""
    return checkpoints.load_module("magi_kernels", Path(__file__).with_name("kernels.py"))


# ----------------------------------------------------------------------------------------------------------
# 3  VAE
# ----------------------------------------------------------------------------------------------------------
# A plain ViT on both sides (report section 2.1): 4 frames x 8 x 8 pixels become one token, `depth` blocks of
# full attention, 16 latent channels. Attention over all tokens is for the native size; a larger video is cut
# into overlapping tiles.


class VAEBlock(nn.Module):
    """Pre-norm transformer block; with ln_in_attn q, k and v are normalised per head instead of the input."""

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        D, hidden = cfg.embed_dim, int(cfg.embed_dim * cfg.mlp_ratio)
        self.num_heads = cfg.num_heads
        self.ln_in_attn = cfg.ln_in_attn
        self.norm1 = nn.Identity() if cfg.ln_in_attn else nn.LayerNorm(D)
        self.qkv = nn.Linear(D, 3 * D, bias=cfg.qkv_bias)
        self.proj = nn.Linear(D, D)
        self.norm2 = nn.LayerNorm(D)
        self.fc1 = nn.Linear(D, hidden)
        self.fc2 = nn.Linear(hidden, D)

    def forward(self, x: Tensor, ops: Ops) -> Tensor:                        # (B, N, D)
        qkv = self.qkv(self.norm1(x))
        q, k, v = rearrange(qkv, "b n (three heads hd) -> three b n heads hd", three=3, heads=self.num_heads)
        if self.ln_in_attn:
            q, k, v = self.normalise(q), self.normalise(k), self.normalise(v)
        x = x + self.proj(ops.attention(q, k, v).flatten(2))                 # (B, N, D)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))

    @staticmethod
    def normalise(u: Tensor) -> Tensor:
        """To mean 0 and deviation 1 per head. 1e-5 is added to the deviation; F.layer_norm adds it to the
        variance. (torch.std_mean gives the same, and takes nine times as long on a CPU.)"""
        centred = u - u.mean(dim=-1, keepdim=True)
        deviation = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / u.shape[-1] ** 0.5
        return centred / (deviation + 1e-5)


class VAETransformer(nn.Module):
    """What encoder and decoder share: class token, learned positions, blocks, final LayerNorm."""

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        side = cfg.video_size // cfg.patch_size
        self.grid = (cfg.video_length // cfg.patch_length, side, side)       # native (T, H, W)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.embed_dim))
        self.pos_embed = small_normal(1, 1 + math.prod(self.grid), cfg.embed_dim)
        self.blocks = nn.ModuleList(VAEBlock(cfg) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.embed_dim)

    def positions(self, size: tuple[int, ...]) -> Tensor:
        """The position table resampled to (T, H, W); the class token has no place to resample."""
        table = self.pos_embed[:, 1:].reshape(1, *self.grid, -1).permute(0, 4, 1, 2, 3)
        table = F.interpolate(table.float(), size, mode="trilinear", align_corners=False)
        table = table.to(self.pos_embed.dtype).flatten(2).transpose(1, 2)
        return torch.cat([self.pos_embed[:, :1], table], dim=1)

    def transform(self, x: Tensor, ops: Ops) -> Tensor:                      # (B, D, T, H, W)
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], dim=1)
        tokens = tokens + self.positions(tuple(x.shape[2:]))                 # (B, 1 + T*H*W, D)
        for block in self.blocks:
            tokens = block(tokens, ops)
        return self.norm(tokens)[:, 1:]                                      # (B, T*H*W, D)


class VAEEncoder(VAETransformer):
    def __init__(self, cfg: VAEConfig):
        super().__init__(cfg)
        self.patch_embed = nn.Conv3d(cfg.in_chans, cfg.embed_dim, cfg.patch, cfg.patch)
        self.last_layer = nn.Linear(cfg.embed_dim, 2 * cfg.z_chans)

    def forward(self, video: Tensor, ops: Ops = TORCH_OPS) -> tuple[Tensor, Tensor]:
        """(B, 3, frames, height, width) -> mean and log-variance, each (B, 16, T, H, W)."""
        x = self.patch_embed(video)                                          # (B, D, T, H, W)
        T, H, W = x.shape[2:]
        moments = self.last_layer(self.transform(x, ops))                    # (B, T*H*W, 32)
        moments = rearrange(moments, "b (t h w) c -> b c t h w", t=T, h=H, w=W)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)


def pixel_conv(x: Tensor, conv: nn.Conv3d) -> Tensor:
    """conv(x), of 3x3x3. Of one video in float32 PyTorch would run a loop on one core of a CPU, which takes
    ten times as long as oneDNN's convolution."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return conv(x)
    one = (1, 1, 1)
    return torch.mkldnn_convolution(x, conv.weight, conv.bias, one, one, one, groups=1)


class VAEDecoder(VAETransformer):
    def __init__(self, cfg: VAEConfig):
        super().__init__(cfg)
        self.patch = dict(pt=cfg.patch_length, ph=cfg.patch_size, pw=cfg.patch_size)
        self.proj_in = nn.Linear(cfg.z_chans, cfg.embed_dim)
        width = cfg.out_features
        self.final: nn.Module = nn.Identity()
        if cfg.use_final_proj:
            self.final = nn.Sequential(nn.Linear(cfg.embed_dim, width), nn.LayerNorm(width))
        # The shuffle leaves each pixel a few channels; a convolution over them hides the patches' seams.
        self.last_layer = nn.Conv3d(width // math.prod(cfg.patch), cfg.in_chans, 3, padding=1)

    def forward(self, latent: Tensor, ops: Ops = TORCH_OPS) -> Tensor:       # (B, 16, T, H, W)
        T, H, W = latent.shape[2:]
        x = self.proj_in(latent.movedim(1, -1)).movedim(-1, 1)               # (B, D, T, H, W)
        x = self.final(self.transform(x, ops))                               # (B, T*H*W, 4*4*8*8)
        x = rearrange(x, "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)", t=T, h=H, w=W, **self.patch)
        return pixel_conv(x, self.last_layer)                                # (B, 3, frames, height, width)


class VAE(nn.Module):
    """Video autoencoder, 8x8x4. Latents are unscaled here: multiply by SCALE_FACTOR before the DiT.

    `tile` is (frames, height, width) in pixels, None for no tiling; `overlap` is the share of a tile's height
    and width that it has in common with its neighbour (frames never overlap).
    """

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        self.cfg, self.patch = cfg, cfg.patch
        self.ops: Ops = TORCH_OPS
        self.encoder = VAEEncoder(cfg)
        self.decoder = VAEDecoder(cfg)
        self.map_tiles: Callable = map           # parallel.py deals the tiles out to several GPUs here

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.pos_embed.dtype

    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, frames, height, width) -> mean and log-variance (B, 16, T, H, W), without tiling."""
        return self.encoder(self._checked(video), self.ops)

    def _checked(self, video: Tensor) -> Tensor:
        """The video, if it can be encoded; an image as 4 equal frames, which make one latent frame."""
        require(video.dim() == 5 and video.shape[1] == self.cfg.in_chans, f"cannot encode "
                f"{tuple(video.shape)}: give (B, {self.cfg.in_chans}, frames, height, width)")
        (frames, height, width), (pt, p, _) = video.shape[2:], self.patch
        require(frames == 1 or frames % pt == 0,
                f"cannot encode {frames} frames: give 1 or a multiple of {pt}")
        require(height % p == 0 and width % p == 0, f"cannot encode {height}x{width}: give multiples of {p}")
        return repeat(video, "b c 1 h w -> b c t h w", t=pt) if frames == 1 else video

    def encode(self, video: Tensor, tile: tuple[int, int, int] | None = (12, 256, 256),
               overlap: float = 0.25) -> Tensor:
        """(B, 3, frames, height, width) in [-1, 1], 1 or 4T frames -> mean latent (B, 16, T, H, W)."""
        video = self._checked(video)
        if tile is None:
            return self.encoder(video, self.ops)[0]

        def encode_tile(place: Sequence[slice]) -> Tensor:
            pixels = [slice(s.start * p, s.stop * p) for s, p in zip(place, self.patch, strict=True)]
            return self.encoder(video[..., *pixels], self.ops)[0]

        size = [s // p for s, p in zip(video.shape[2:], self.patch, strict=True)]
        return self._tiled(encode_tile, size, tile, overlap, scale=1, neighbour="blended")

    def decode(self, latent: Tensor, tile: tuple[int, int, int] | None = (12, 256, 256),
               overlap: float = 0.25) -> Tensor:
        """(B, 16, T, H, W) -> video (B, 3, 4T, 8H, 8W). Of an image the caller keeps the first frame."""
        require(latent.dim() == 5 and latent.shape[1] == self.cfg.z_chans, f"cannot decode "
                f"{tuple(latent.shape)}: give (B, {self.cfg.z_chans}, T, H, W)")
        if tile is None:
            return self.decoder(latent, self.ops)
        decode_tile = lambda place: self.decoder(latent[..., *place], self.ops)
        return self._tiled(decode_tile, latent.shape[2:], tile, overlap, scale=self.patch[1], neighbour="raw")

    def _tiled(self, fn: Callable, size: Sequence[int], tile: Sequence[int], overlap: float, scale: int,
               neighbour: str) -> Tensor:
        """Apply fn tile by tile and blend the seams. `size` counts latents, and so do the (t, h, w) slices
        that fn gets, the place of a tile; the result is `scale` times as high and wide.

        Two rules of the official code are unexpected: a tile starts at every stride, even where the one
        before already reaches the edge, and a tile is blended with its neighbour as that was before
        (decoding: "raw") or after (encoding: "blended") its own blending.
        """
        whole = all(t > 0 and t % p == 0 for t, p in zip(tile, self.patch, strict=True))
        require(whole and 0 <= overlap < 1, f"tile {tuple(tile)} must be positive multiples of {self.patch} "
                f"and overlap {overlap} in [0, 1)")
        tile = [t // p for t, p in zip(tile, self.patch, strict=True)]
        # 1e-6: in floats 10 * (1 - 0.9) is just below 1.
        stride = [tile[0], *(max(1, int(s * (1 - overlap) + 1e-6)) for s in tile[1:])]
        frames, rows, columns = map(_places, size, tile, stride)
        keep_h, keep_w = stride[1] * scale, stride[2] * scale                # what each tile contributes
        overlap_h, overlap_w = (tile[1] - stride[1]) * scale, (tile[2] - stride[2]) * scale
        pieces = []
        for frame in frames:
            outs = iter(self.map_tiles(fn, [(frame, row, column) for row in rows for column in columns]))
            strips = []
            above = None                                                     # the row of tiles before
            for _ in rows:
                raw = [next(outs) for _ in columns]
                blended: list[Tensor] = []
                seen = blended if neighbour == "blended" else raw            # what a neighbour blends with
                for i, out in enumerate(raw):
                    if above:
                        out = _blend(above[i], out, overlap_h, dim=-2)
                    if i > 0:
                        out = _blend(seen[i - 1], out, overlap_w, dim=-1)
                    blended.append(out)
                strips.append(torch.cat([out[..., :keep_h, :keep_w] for out in blended], dim=-1))
                above = seen
            pieces.append(torch.cat(strips, dim=-2))
        return torch.cat(pieces, dim=2)


def _places(length: int, tile: int, stride: int) -> list[slice]:
    """Where the tiles lie along one axis."""
    return [slice(start, min(start + tile, length)) for start in range(0, length, stride)]


def _blend(old: Tensor, new: Tensor, width: int, dim: int) -> Tensor:
    """Fade the end of `old` into the start of `new` over `width` pixels along dim; returns the new tile."""
    width = min(width, old.shape[dim], new.shape[dim])
    ramp = torch.arange(width, device=new.device, dtype=new.dtype) / width
    ramp = ramp[:, None] if dim == -2 else ramp                              # along the height or the width
    tail = old.narrow(dim, old.shape[dim] - width, width)
    head, rest = new.split([width, new.shape[dim] - width], dim)
    return torch.cat([tail * (1 - ramp) + head * ramp, rest], dim=dim)


# ----------------------------------------------------------------------------------------------------------
# 4  Text
# ----------------------------------------------------------------------------------------------------------
# T5 (captions.py) reads each caption once. Its last hidden state is the text of a chunk, (L, C), in which a
# mask (L,) marks what is not padding. Learned vectors, the special tokens, are put in front of it.


def prepend_tokens(text: Tensor, mask: Tensor, tokens: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Put each (1, C) token in front in turn, so the last comes first; cut to the length text (L, C) had."""
    L = len(text)
    return torch.cat([*reversed(tokens), text])[:L], torch.cat([mask.new_ones(len(tokens)), mask])[:L]


# ----------------------------------------------------------------------------------------------------------
# 5  KV cache
# ----------------------------------------------------------------------------------------------------------
# A clean chunk never changes again, so its keys and values are computed once and kept for as long as a later
# chunk can read them. That is a chunk or a few: memory does not grow with the video.


class KVCache:
    """Keys and values of clean chunks. Each layer writes and reads its own; the plan says what to forget."""

    def __init__(self):
        self.kv: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}    # chunk -> layer -> k and v

    @property
    def chunks(self) -> list[int]:
        """What is stored, in the order of the video."""
        return sorted(self.kv)

    def read(self, layer: int, chunks: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """k and v of these chunks, each (B, tokens of a chunk, Hkv, hd)."""
        return [self.kv[chunk][layer] for chunk in chunks]

    def write(self, layer: int, chunk: int, k: Tensor, v: Tensor) -> None:
        """Store a copy: a view would keep the keys of the whole forward in memory."""
        self.kv.setdefault(chunk, {})[layer] = k.clone(), v.clone()

    def evict(self, before: int) -> None:
        """Drop the chunks older than `before`."""
        self.kv = {chunk: layers for chunk, layers in self.kv.items() if chunk >= before}

    @property
    def bytes(self) -> int:
        return sum(u.nbytes for layers in self.kv.values() for kv in layers.values() for u in kv)


def key_spans(chunks: Sequence[int], first_seen: Sequence[int] | Tensor, axis: Sequence[int], size: int
              ) -> Tensor:
    """Key tokens [start, end) that each chunk reads, from the oldest chunk it sees to itself.

    chunks (n,) of this forward; first_seen (n,), or (B, n) in training; axis: the chunks whose keys lie end
    to end, cached ones first, rising, `size` tokens each. Returns (1 or B, n, 2) on the CPU. Raises
    ValueError if a chunk would read one that is not there.
    """
    def span(first: int, own: int) -> tuple[int, int]:
        require(first <= own and set(range(first, own + 1)) <= set(axis),
                f"chunk {own} attends back to chunk {first}, but only chunks {list(axis)} are in this "
                f"forward or in the cache")
        return axis.index(first) * size, (axis.index(own) + 1) * size

    rows = torch.atleast_2d(torch.as_tensor(first_seen, device="cpu")).tolist()
    spans = [[span(first, own) for first, own in zip(row, chunks, strict=True)] for row in rows]
    return torch.tensor(spans, device="cpu")


# ----------------------------------------------------------------------------------------------------------
# 6  DiT
# ----------------------------------------------------------------------------------------------------------
# Report section 2.2. What sets it apart from a plain DiT stands at the top of this file. One layer:
#
#     h = LN(x);   a = Wo [self-attention(h), cross-attention(h, text)];   g1, g2 = tanh(Linear(SiLU(cond)))
#     x = x + LN1(g1 * a)
#     x = x + LN1(g2 * FFN(LN(x)))


@dataclass
class Context:
    """What every layer of one forward shares; made by DiT.begin."""

    ops: Ops                       # the backend
    cond: Tensor                   # (B, n, D/4) time and flag of each chunk
    angles: Tensor                 # (N, 3 hd/8) rotary angles
    spans: Tensor                  # (1 or B, n, 2) key tokens each chunk reads, cached ones first
    text: Tensor                   # (all texts end to end, D)
    text_spans: Tensor             # (1, B*n, 2) which of them are each chunk's own
    chunks: list[int]              # absolute index of each chunk
    cache: KVCache | None
    cached: list[int]              # the chunks that are read from it
    store: int                     # how many leading chunks are clean: their keys are written to it


class Linear(nn.Linear):
    """A linear layer of the blocks: no bias, called like FP8Linear."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype):
        super().__init__(in_features, out_features, bias=False, dtype=dtype)

    def forward(self, x: Tensor, ops: Ops = TORCH_OPS) -> Tensor:            # (..., in) -> (..., out)
        return F.linear(x, self.weight)


class Float32Linear(Linear):
    """Returns float32, whatever the type of its input and weight; see `matmul_float32`."""

    def forward(self, x: Tensor, ops: Ops = TORCH_OPS) -> Tensor:
        return ops.matmul_float32(x, self.weight)


class FP8Linear(nn.Module):
    """A linear layer with e4m3 weights, in the official checkpoint's two kinds.

    "tensor" (q, k, v, qx, fc1): one input scale, in a vector of equal numbers. "channel" (Wo, fc2): the
    input is divided by a smoothing scale per channel, which moves outliers from activations to weights.
    """

    def __init__(self, in_features: int, out_features: int, kind: str):
        super().__init__()
        assert kind in ("tensor", "channel"), kind
        weight = torch.zeros(out_features, in_features, dtype=torch.float8_e4m3fn)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("weight_scale", torch.ones(1))
        self.register_buffer("input_scale", torch.ones(in_features if kind == "tensor" else 1))
        self.register_buffer("smooth_scale", torch.ones(1, in_features) if kind == "channel" else None)

    def forward(self, x: Tensor, ops: Ops = TORCH_OPS) -> Tensor:            # (..., in) -> (..., out), bf16
        divide = self.input_scale if self.smooth_scale is None else self.smooth_scale
        return ops.fp8_matmul(x, self.weight, divide, self.input_scale[:1] * self.weight_scale)


def _linear(cfg: DiTConfig, index: int, n_in: int, n_out: int, kind: str, otherwise: type[Linear] = Linear
            ) -> nn.Module:
    """A linear of layer `index`: FP8Linear in an fp8 model, except in the first and last layer, which
    would lose too much accuracy. There, and in other models, it is an `otherwise`."""
    if cfg.fp8 and 0 < index < cfg.num_layers - 1:
        return FP8Linear(n_in, n_out, kind)
    return otherwise(n_in, n_out, cfg.torch_dtype)


class CachedAttention(nn.Module):
    """Self-attention over the chunks of this forward and the cached ones before them. It has no weights; it
    is a module so that parallel.py can exchange heads between GPUs before and after it."""

    def __init__(self, index: int):
        super().__init__()
        self.index = index

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, out: Tensor | None = None) -> Tensor:
        """q (B, N, Hq, hd), k and v (B, N, Hkv, hd) -> (B, N, Hq, hd), written to `out` if that is given."""
        size = k.shape[1] // len(ctx.chunks)                                 # tokens of a chunk
        for i in range(ctx.store):
            clean = slice(i * size, (i + 1) * size)
            ctx.cache.write(self.index, ctx.chunks[i], k[:, clean], v[:, clean])
        if ctx.cached:
            cached_k, cached_v = zip(*ctx.cache.read(self.index, ctx.cached), strict=True)
            k, v = torch.cat([*cached_k, k], dim=1), torch.cat([*cached_v, v], dim=1)
        return ctx.ops.block_attention(q, k, v, ctx.spans, out)


class ParallelAttention(nn.Module):
    """Self-attention over the chunk's history and cross-attention to the chunk's own text, side by side.
    q, k, v are those of self-attention, qx, kx, vx those of cross-attention."""

    def __init__(self, cfg: DiTConfig, index: int):
        super().__init__()
        D, hd, Hq, Hkv = cfg.hidden_size, cfg.head_dim, cfg.num_heads, cfg.num_kv_heads
        dtype = cfg.torch_dtype
        self.head_dim = hd
        self.norm = nn.LayerNorm(D, cfg.norm_eps, dtype=dtype)
        self.q = _linear(cfg, index, D, Hq * hd, "tensor")
        self.k = _linear(cfg, index, D, Hkv * hd, "tensor")
        self.v = _linear(cfg, index, D, Hkv * hd, "tensor")
        self.qx = _linear(cfg, index, D, Hq * hd, "tensor")
        self.kvx = Linear(D, 2 * Hkv * hd, dtype)
        # Wo. Official checkpoints have its columns in another order: convert_weights.py permutes them.
        self.proj = _linear(cfg, index, 2 * Hq * hd, D, "channel", Float32Linear)
        self.q_norm = LayerNorm1p(hd, cfg.norm_eps)                          # float32
        self.k_norm = LayerNorm1p(hd, cfg.norm_eps)
        self.qx_norm = LayerNorm1p(hd, cfg.norm_eps, dtype=dtype)
        self.kx_norm = LayerNorm1p(hd, cfg.norm_eps, dtype=dtype)
        self.core = CachedAttention(index)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:                    # (B, N, D)
        return self.proj(self.attend(x, ctx), ctx.ops)

    def attend(self, x: Tensor, ctx: Context) -> Tensor:
        """Self- and cross-attention before the projection: (B, N, D) -> (B, N, 2*Hq*hd)."""
        ops = ctx.ops
        h = self.norm(x)
        heads = lambda linear: linear(h, ops).unflatten(-1, (-1, self.head_dim))         # (B, N, heads, hd)
        q = ops.norm_rotary(heads(self.q), self.q_norm, ctx.angles)
        k = ops.norm_rotary(heads(self.k), self.k_norm, ctx.angles)
        v = heads(self.v)
        # Both attentions write their results into views of one tensor.
        both = q.new_empty(*q.shape[:2], 2, *q.shape[2:])                    # (B, N, 2, Hq, hd)
        self.core(q, k, v, ctx, out=both[:, :, 0])

        # Cross-attention is block attention too: each chunk reads its own part of all texts end to end.
        qx = ops.norm_rotary(heads(self.qx), self.qx_norm, None)
        kvx = self.kvx(ctx.text, ops)
        kx, vx = rearrange(kvx, "l (heads two hd) -> two 1 l heads hd", two=2, hd=self.head_dim)
        kx = ops.norm_rotary(kx, self.kx_norm, None)
        one_row = lambda u: u.flatten(0, 1)[None]                            # (1, B*N, Hq, hd)
        ops.block_attention(one_row(qx), kx, vx, ctx.text_spans, out=one_row(both[:, :, 1]))
        return both.flatten(2)


class FeedForward(nn.Module):
    """LayerNorm, then GELU or SwiGLU."""

    def __init__(self, cfg: DiTConfig, index: int):
        super().__init__()
        self.gated = cfg.gated_ffn
        hidden = 2 * cfg.ffn_size if cfg.gated_ffn else cfg.ffn_size
        self.norm = nn.LayerNorm(cfg.hidden_size, cfg.norm_eps, dtype=cfg.torch_dtype)
        self.fc1 = _linear(cfg, index, cfg.hidden_size, hidden, "tensor")
        self.fc2 = _linear(cfg, index, cfg.ffn_size, cfg.hidden_size, "channel")

    def forward(self, x: Tensor, ctx: Context) -> Tensor:                    # (B, N, D)
        hidden = self.fc1(self.norm(x), ctx.ops)
        hidden = ctx.ops.swiglu(hidden) if self.gated else F.gelu(hidden)    # (B, N, FFN)
        return self.fc2(hidden, ctx.ops)


class DiTLayer(nn.Module):
    """Attention, then feed-forward; each gated by time, normalised and added in float32."""

    def __init__(self, cfg: DiTConfig, index: int):
        super().__init__()
        self.gates = nn.Linear(cfg.cond_size, 2 * cfg.hidden_size, dtype=cfg.torch_dtype)
        self.attn = ParallelAttention(cfg, index)
        self.attn_post_norm = LayerNorm1p(cfg.hidden_size, cfg.norm_eps)
        self.ffn = FeedForward(cfg, index)
        self.ffn_post_norm = LayerNorm1p(cfg.hidden_size, cfg.norm_eps)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:                    # (B, N, D)
        gates = self.gates(F.silu(ctx.cond)).tanh()          # each in (-1, 1)
        gate1, gate2 = gates.chunk(2, dim=-1)                                # each (B, n, D)
        x = ctx.ops.gated_residual(x, gate1, self.attn(x, ctx), self.attn_post_norm)
        return ctx.ops.gated_residual(x, gate2, self.ffn(x, ctx), self.ffn_post_norm)


def pack(text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """All texts end to end without their padding: text (B, n, L, C), mask (B, n, L) -> (all L', C), and the
    span of each chunk's own text in it, (1, B*n, 2) on the CPU."""
    valid = mask.bool()
    ends = valid.sum(-1).flatten().cumsum(0).cpu()
    starts = F.pad(ends, (1, 0))[:-1]
    return text[valid], torch.stack([starts, ends], dim=-1)[None]


class DiT(nn.Module):
    """Velocity of the noisy chunks given the clean ones (report section 2.2).

    Float32 whatever cfg.dtype is: the embedders, rotary bands, q and k norms, post-norms, final norm and
    head. All else is cfg.dtype; choose it there, as dit.to(dtype) would change the former too. Built under
    torch.device("meta"), it has shapes and takes no memory.

    >>> dit = DiT(PRESETS["tiny"].dit)
    >>> x, t = torch.randn(1, 16, 12, 8, 8), torch.tensor([[0.9, 0.2]])      # two chunks, the second noisier
    >>> text, mask = torch.randn(1, 2, 64, 128), torch.ones(1, 2, 64)
    >>> dit(x, t, text, mask).shape
    torch.Size([1, 16, 12, 8, 8])
    """

    def __init__(self, cfg: DiTConfig):
        super().__init__()
        self.cfg = cfg
        self.ops: Ops = TORCH_OPS                            # set it to get_ops("triton") for fast kernels
        D, cond, p = cfg.hidden_size, cfg.cond_size, cfg.patch_size
        self.patch_embed = nn.Conv3d(cfg.in_channels, D, (1, p, p), (1, p, p), bias=False)
        self.time_embed = nn.Sequential(nn.Linear(256, cond), nn.SiLU(), nn.Linear(cond, cond))
        self.null_text = small_normal(cfg.text_length, cfg.text_dim)
        self.text_proj = nn.Linear(cfg.text_dim, D)
        self.flag_proj = nn.Linear(cfg.text_dim, cond)
        bands = cfg.head_dim // 8                            # of each axis; 3 axes turn 3/4 of a head's width
        self.rope_bands = nn.Parameter(torch.tensor([10000.0 ** (-i / bands) for i in range(bands)]))
        self.layers = nn.ModuleList(DiTLayer(cfg, i) for i in range(cfg.num_layers))
        self.final_norm = LayerNorm1p(D, cfg.norm_eps)
        self.final_linear = nn.Linear(D, p * p * cfg.out_channels, bias=False)

    def condition(self, t: Tensor, conditional: Tensor, d: float | None = None) -> Tensor:
        """The input of the gates for each chunk: its time, and a flag that says whether it has a caption.
        (The flag is one of two rows of the null text, which the released models mask in cross-attention.)

        t (B, n), conditional (B, n) bool, d of a distilled model (see `shortcut_d`) -> (B, n, D/4) float32.
        """
        def embed(u: Tensor) -> Tensor:
            features = timestep_features(u).to(self.cfg.torch_dtype)         # rounded, as officially
            return self.time_embed(features.float())

        flags = self.flag_proj(self.null_text[-2:])          # row -2: conditional, row -1: unconditional
        cond = embed(t) + torch.where(conditional[..., None], flags[0], flags[1])
        return cond if d is None else cond + embed(torch.full_like(t, d))

    def patchify(self, x: Tensor) -> Tensor:
        """Latents (B, 16, T, H, W) -> tokens (B, N, D)."""
        cfg, p = self.cfg, self.cfg.patch_size
        if cfg.in_channels == 2 * cfg.latent_channels:
            x = torch.cat([x, x], dim=1)                                     # (B, 32, T, H, W)
        # A convolution whose stride is its kernel is a linear layer on patches, and faster as one.
        patches = rearrange(x.float() * cfg.x_scale, "b c t (h ph) (w pw) -> b (t h w) (c ph pw)", ph=p, pw=p)
        return F.linear(patches, self.patch_embed.weight.flatten(1)).to(cfg.torch_dtype)

    def unpatchify(self, tokens: Tensor, T: int, H: int) -> Tensor:
        """Tokens (B, N, D) -> velocity (B, 16, T, H, W), float32."""
        cfg, p = self.cfg, self.cfg.patch_size
        out = self.final_linear(self.final_norm(tokens))                     # (B, N, 2*2*out_channels)
        out = rearrange(out, "b (t h w) (ph pw c) -> b c t (h ph) (w pw)", t=T, h=H // p, ph=p, pw=p)
        return out[:, : cfg.latent_channels].float() / cfg.x_scale

    def forward(self, x: Tensor, t: Tensor, text: Tensor, text_mask: Tensor, *,
                chunks: Sequence[int] | None = None, first_seen: Sequence[int] | Tensor | None = None,
                conditional: bool | Tensor = True, d: float | None = None, cache: KVCache | None = None,
                store: int = 0) -> Tensor:
        """One evaluation of the velocity for n chunks at once.

        x            (B, 16, T, H, W)  noisy latents, T a multiple of n
        t            (B, n)            time of each chunk
        text         (B, n, L, C)      text of each chunk; text_mask (B, n, L), nonzero where valid
        chunks       (n,)              absolute index of each chunk, rising; default 0 .. n-1
        first_seen   (n,) or (B, n)    the oldest chunk each attends to (itself: no history); default: all
        conditional  bool or (B, n)    has it a caption?
        d            number            for distilled models only
        cache        clean chunks to read; the first `store` chunks of this forward are added to it

        Returns the velocity (B, 16, T, H, W), float32. Raises ValueError if sizes do not divide, or if a
        chunk attends to one that is neither in this forward nor in the cache.
        """
        tokens, ctx = self.begin(x, t, text, text_mask, chunks, first_seen, conditional, d, cache, store)
        for layer in self.layers:
            tokens = layer(tokens, ctx)
        return self.unpatchify(tokens, *x.shape[2:4])

    def forward_all(self, calls: Sequence[tuple[tuple, dict]]) -> list[Tensor]:
        """Several forwards, given by their arguments, one after another. Where weights are streamed,
        parallel.py takes all of them through a layer while it is there."""
        return [self(*inputs, **settings) for inputs, settings in calls]

    def begin(self, x: Tensor, t: Tensor, text: Tensor, text_mask: Tensor, chunks: Sequence[int] | None,
              first_seen: Sequence[int] | Tensor | None, conditional: bool | Tensor, d: float | None,
              cache: KVCache | None, store: int) -> tuple[Tensor, Context]:
        """The arguments of `forward` -> tokens (B, N, D), and what all layers share."""
        checkpoints.check_forward(x, t, text, text_mask, chunks, first_seen, conditional)
        require(cache is not None or not store, f"store {store} needs a cache: give a KVCache")
        B, n = t.shape
        T, H, W = x.shape[2:]
        p = self.cfg.patch_size
        require(T % n == 0 and H % p == 0 and W % p == 0 and min(H, W) >= 2 * p,
                f"latent (T, H, W) = {(T, H, W)} does not divide into {n} chunks of {p}x{p} patches, "
                f"at least 2x2")
        chunks = list(range(n)) if chunks is None else [int(chunk) for chunk in chunks]
        stored = [] if cache is None else [chunk for chunk in cache.chunks if chunk < chunks[0]]
        if first_seen is None:
            first_seen = [min(stored + chunks)] * n
        first = int(torch.as_tensor(first_seen, device="cpu").min())
        cached = [chunk for chunk in stored if chunk >= first]
        length = T // n                                                      # latent frames of a chunk
        size = length * (H // p) * (W // p)                                  # tokens of a chunk
        sizes = {tuple(k.shape[:2]) for k, _ in cache.read(0, cached)} if cached else set()
        require(sizes <= {(B, size)}, f"the cache holds chunks of (clips, tokens) {sizes}, those of this "
                f"forward have {(B, size)}: they must be equal")
        frames = [chunk * length + i for chunk in chunks for i in range(length)]         # of the whole video
        packed, text_spans = pack(text, text_mask)
        conditional = torch.as_tensor(conditional, device=x.device).expand(B, n)
        dtype = self.cfg.torch_dtype
        ctx = Context(
            ops=self.ops,
            cond=self.condition(t, conditional, d).to(dtype),
            angles=rotary_angles(self.rope_bands, torch.tensor(frames, device=x.device), H // p, W // p),
            spans=key_spans(chunks, first_seen, cached + chunks, size),
            text=F.silu(self.text_proj(packed.float())).to(dtype),
            text_spans=text_spans,
            chunks=chunks, cache=cache, cached=cached, store=store,
        )
        return self.patchify(x), ctx


# ----------------------------------------------------------------------------------------------------------
# 7  Plan
# ----------------------------------------------------------------------------------------------------------
# Report section 2.4. `plan` lists the chunks of every forward of a run. It needs no tensors, so it can be
# printed, plotted and tested alone. A stage is num_steps / window steps; in a window of 4 it takes a chunk
# through a quarter of its time grid.


def shift_time(u: Tensor, shift: float = 1 / 3) -> Tensor:
    """Move times in [0, 1] towards the noise, where the layout of a video is decided."""
    return u * shift / (1 - (1 - shift) * u)


def shortcut_d(num_steps: int, shortcut_mode: str = "8,16,16") -> list[float]:
    """d of each step: half the number of steps of its length that a whole run would have.

    12 steps are those of a 16-step grid (d 8) with a pair joined to a double step (d 4) in each quarter.
    """
    if num_steps == 12:
        return [4.0, 8.0, 8.0] * 4 if shortcut_mode == "8,16,16" else [8.0, 8.0, 4.0] * 4
    return [num_steps / 2] * num_steps


def timestep_grid(num_steps: int, shortcut_mode: str = "8,16,16") -> Tensor:
    """The num_steps + 1 times of a chunk from 0 (noise) to 1 (clean), float32; half of them are below 0.1.

    t = shift_time(s^2), with s evenly spaced but for 12 steps (see `shortcut_d`).
    """
    s = torch.linspace(0, 1, num_steps + 1, dtype=torch.float32, device="cpu")
    if num_steps == 12:                  # a step with d covers 1/(2d) of the way
        steps = 0.5 / s.new_tensor(shortcut_d(12, shortcut_mode))
        s = F.pad(steps.cumsum(0), (1, 0))
    return shift_time(s**2)


def kv_range(cfg: SamplerConfig, grid_index: int, chunk: int = -1) -> float:
    """How many chunks a noisy chunk sees, itself included, at a step of its own time grid; inf: all.

    `chunk` counts generated chunks: it selects an exception of cfg.kv_ranges_at; -1 selects none.
    """
    ranges = dict(cfg.kv_ranges_at).get(chunk, cfg.kv_ranges)
    return ranges[grid_index * len(ranges) // cfg.num_steps] if ranges else math.inf


def clean_kv_range(cfg: SamplerConfig, prefix: bool = False) -> float:
    """How many chunks a clean chunk sees: one that was generated, or one of the prefix.

    The rules are those of the official code; they differ from cfg.clean_kv_range only for -1 and for empty
    kv_ranges, which no released config has.
    """
    if not cfg.kv_ranges and not prefix:
        return math.inf                      # (): generated chunks see all, whatever clean_kv_range is
    if cfg.clean_kv_range == -1:
        return cfg.kv_ranges[-1] if cfg.kv_ranges else 8
    return cfg.clean_kv_range


def shot_transition(cfg: SamplerConfig, chunk: int, kind: str = "cut") -> SamplerConfig:
    """Generated chunk `chunk` sees no history in half of its steps (report section 3.3).

    "cut": not in the first, noisy half, so the layout is new, but identities are kept.
    "restyle": not in the second half, so the layout is kept and details change.
    """
    require(kind in ("cut", "restyle"), f"transition {kind!r} is not 'cut' or 'restyle'")
    require(chunk >= 1, f"transition at chunk {chunk}: the first chunk has no history, choose 1 or later")
    require(chunk not in dict(cfg.kv_ranges_at), f"chunk {chunk} has a transition already: choose one kind")
    require(len(cfg.kv_ranges) >= 2, f"a transition needs at least two kv_ranges, not {cfg.kv_ranges}")
    half = len(cfg.kv_ranges) // 2
    blind = (1,) * half
    ranges = (*blind, *cfg.kv_ranges[half:]) if kind == "cut" else (*cfg.kv_ranges[:-half], *blind)
    return dataclasses.replace(cfg, kv_ranges_at=(*cfg.kv_ranges_at, (chunk, ranges)))


def round_frames(num_frames: int | None, image: bool = False) -> int | None:
    """The num_frames to ask of `sample` so that at least this many video frames come out: rounded up to
    latent frames, less the image's own, which `sample` yields on top of those asked for."""
    if num_frames is None:
        return None
    latents = -(-num_frames // FRAMES_PER_LATENT) - int(image)               # rounded up
    return max(1, latents * FRAMES_PER_LATENT)           # a config has at least 1


def count_chunks(num_frames: int | None, prefix_latents: int) -> tuple[int | None, int]:
    """K chunks in all (None: endless) and P whole prefix chunks of a run that generates num_frames (rounded
    down to a multiple of 4) after so many latent frames of prefix."""
    P = prefix_latents // CHUNK
    if num_frames is None:
        return None, P
    return math.ceil((num_frames // FRAMES_PER_LATENT + prefix_latents) / CHUNK), P


class ChunkInput(NamedTuple):
    """One chunk of a forward."""

    chunk: int                           # absolute index in the video
    t: float                             # its time
    dt: float                            # the length of its Euler step
    first_seen: int                      # the oldest chunk it attends to
    clean: bool = False                  # it has null text and its keys are stored; its velocity is not used


class Step(NamedTuple):
    """What one step of a run does."""

    chunks: tuple[ChunkInput, ...]       # what its forwards hold, oldest first; clean ones lead
    d: float                             # of a distilled model: every stage has the same, so all chunks do
    enters: int | None                   # the chunk that is made from noise before this step
    forget: int                          # chunks before this one are never read again
    done: int | None                     # the chunk that is clean after this step

    @property
    def noisy(self) -> list[ChunkInput]:
        return [c for c in self.chunks if not c.clean]


def clean_input(cfg: SamplerConfig, chunk: int, prefix: bool = False) -> ChunkInput:
    """A clean chunk in the forward that stores its keys."""
    first_seen = max(0, chunk + 1 - clean_kv_range(cfg, prefix))
    return ChunkInput(chunk, cfg.clean_t, 0.0, int(first_seen), clean=True)


def life(cfg: SamplerConfig, chunk: int, prefix_chunks: int) -> list[ChunkInput]:
    """The inputs of a generated chunk, one a step: num_steps times noisy, then once clean."""
    inputs = []
    grid = timestep_grid(cfg.num_steps, cfg.shortcut_mode).tolist()
    for i, (t, after) in enumerate(itertools.pairwise(grid)):
        first_seen = max(0, chunk + 1 - kv_range(cfg, i, chunk - prefix_chunks))
        inputs.append(ChunkInput(chunk, t, after - t, int(first_seen)))
    return [*inputs, clean_input(cfg, chunk)]


def needed(wanted: Sequence[int], inputs: Sequence[ChunkInput]) -> list[ChunkInput]:
    """The inputs on which the `wanted` chunks depend: themselves, the chunks whose keys they read, the chunks
    whose keys those read in the layer before, and so on, and what lies between all these."""
    if not wanted:
        return []
    low, high = min(wanted), max(wanted)
    for c in reversed(inputs):                               # from the newest chunk to the oldest
        if low <= c.chunk <= high:
            low = min(low, c.first_seen)
    return [c for c in inputs if low <= c.chunk <= high]


def plan(cfg: SamplerConfig, chunks: int | None, prefix_chunks: int = 0,
         config_of: Callable[[int], SamplerConfig | None] | None = None) -> Iterator[Step]:
    """The steps of a run of `chunks` chunks, of which the first `prefix_chunks` are given; None: for ever.

    A chunk enters at every stage, until all have. When one has done its steps, it is in one more forward, in
    front and at t = 0.9999, to store its clean keys and values; prefix chunks are stored by a step of their
    own before all others. config_of(chunk): the config of a generated chunk, whose ranges may be its own,
    asked when it enters; default: cfg for all. If it returns None there is no such chunk, and the video ends
    with those in flight.

    >>> for step in plan(SamplerConfig(num_steps=4), chunks=3):              # a stage is one step here
    ...     print("   ".join(f"chunk {c.chunk} t {c.t:.2f}" for c in step.chunks))
    chunk 0 t 0.00
    chunk 0 t 0.02   chunk 1 t 0.00
    chunk 0 t 0.10   chunk 1 t 0.02   chunk 2 t 0.00
    chunk 0 t 0.30   chunk 1 t 0.10   chunk 2 t 0.02
    chunk 0 t 1.00   chunk 1 t 0.30   chunk 2 t 0.10
    chunk 1 t 1.00   chunk 2 t 0.30
    """
    P, per_stage = prefix_chunks, cfg.num_steps // cfg.window
    K: float = math.inf if chunks is None else chunks
    config_of = config_of or (lambda chunk: cfg)
    d = shortcut_d(cfg.num_steps, cfg.shortcut_mode)
    exceptions = [P + chunk for chunk, _ in cfg.kv_ranges_at]    # chunks whose ranges are not cfg.kv_ranges
    ahead: dict[int, list[ChunkInput]] = {}              # chunk -> what is left of its life
    for newest in itertools.count(P):                        # a stage, at which this chunk enters
        config = config_of(newest) if newest < K else None
        if config is None:
            K = min(K, newest)
        else:
            ahead[newest] = life(config, newest, P)
        if all(len(inputs) == 1 for inputs in ahead.values()):
            return                                       # all are done, and nobody will read the last keys

        # Forget what neither the chunks in flight nor those to come will read. Of those to come it is enough
        # to look at the exceptions and at the next plain one: the plain ones after it see no further back.
        # (Nor does a chunk's own config: `check_own_config` refuses one that does.)
        plain = next(chunk for chunk in itertools.count(newest + 1) if chunk not in exceptions)
        to_come = [life(cfg, chunk, P) for chunk in (plain, *exceptions) if newest < chunk < K]
        forget = min(c.first_seen for inputs in (*ahead.values(), *to_come) for c in inputs)

        if newest == P:
            prefix = needed(range(forget, P), [clean_input(cfg, chunk, prefix=True) for chunk in range(P)])
            if prefix:
                yield Step(tuple(prefix), d[0], None, forget, None)
        for j in range(per_stage):
            now = tuple(inputs.pop(0) for inputs in ahead.values())
            ahead = {chunk: inputs for chunk, inputs in ahead.items() if inputs}
            # A chunk is done when only its clean input is left.
            done = next((chunk for chunk, inputs in ahead.items() if len(inputs) == 1), None)
            enters = newest if config is not None and j == 0 else None
            yield Step(now, d[j], enters, forget, done)


# ----------------------------------------------------------------------------------------------------------
# 8  Guidance
# ----------------------------------------------------------------------------------------------------------
# Report section 2.4. A base model is evaluated in three ways, its branches, and the velocities are combined:
#
#     v = (1 - w_prev) v(x | nothing) + (w_prev - w_text) v(x | previous) + w_text v(x | previous, text)
#
# w_prev pulls towards the history, w_text towards the caption; both depend on the chunk's own t. A distilled
# model needs one branch; only for its oldest chunk, when nearly clean, a second one without history is mixed
# in, because errors that come from the history would accumulate. A chunk whose velocity takes nothing from a
# branch is left out of it, unless another chunk there reads its keys: this saves a tenth of the work, more in
# short videos.


class Branch(NamedTuple):
    conditional: bool                    # noisy chunks have captions, and the flag says so; else null text
    alone: bool = False                  # each chunk sees only itself
    stores: bool = False                 # this branch's keys of clean chunks go to the cache


# One branch stores the keys of a clean chunk. In that step the others see keys that they compute themselves.
BASE_BRANCHES = {
    "text": Branch(conditional=True),
    "previous": Branch(conditional=False, stores=True),
    "nothing": Branch(conditional=False, alone=True),
}
DISTILLED_BRANCHES = {
    "text": Branch(conditional=True, stores=True),
    "alone": Branch(conditional=True, alone=True),
}


def guidance_scales(cfg: SamplerConfig, t: float) -> tuple[float, float]:
    """(w_prev, w_text) at time t: those of the last bucket that begins at t or before, within 1e-7."""
    bucket = max(i for i, edge in enumerate(cfg.cfg_t) if t >= edge - 1e-7)
    return cfg.prev_scales[bucket], cfg.text_scales[bucket]


def branch_shares(cfg: SamplerConfig, c: ChunkInput, is_oldest: bool) -> dict[str, float]:
    """How much of each branch goes into the velocity of a chunk: the formula above."""
    has_past = c.first_seen < c.chunk
    if cfg.distilled:
        # The last quarter begins at 0.3 in float32, which is just beyond 0.3: its first step is blended too.
        blended = is_oldest and c.t > cfg.nearly_clean_t and has_past
        alone = 1 - cfg.nearly_clean_blend if blended else 0.0
        return {"text": 1 - alone, "alone": alone}
    w_prev, w_text = guidance_scales(cfg, c.t)
    if not has_past:                     # "previous" and "nothing" are the same
        return {"text": w_text, "previous": 1 - w_text, "nothing": 0.0}
    return {"text": w_text, "previous": w_prev - w_text, "nothing": 1 - w_prev}


# ----------------------------------------------------------------------------------------------------------
# 9  Sampler
# ----------------------------------------------------------------------------------------------------------
# The chunk pipeline (report section 2.4): a loop over the plan. `_Run.stream` is the algorithm.


@dataclass(frozen=True)
class Progress:
    """Reported after every step but that of the prefix: for progress bars and previews."""

    step: int                            # steps done
    total: int | None                    # steps in all, None: endless
    chunk: int                           # generated chunk that will be finished next
    now: Step                            # what was just computed
    cache_bytes: int
    latents: dict[int, Tensor]           # chunks in flight by absolute index, (1, 16, 6, H, W); read only
    velocity: dict[int, Tensor]          # what moved them

    def guess(self, chunk: int) -> Tensor:
        """The clean latents of a chunk in flight, if its velocity were right to the end: x + (1 - t) v."""
        t = next(c.t + c.dt for c in self.now.noisy if c.chunk == chunk)
        return self.latents[chunk] + (1 - t) * self.velocity[chunk]


def chunk_noise(seed: int, chunk: int, shape: Sequence[int]) -> Tensor:
    """Gaussian noise of one chunk, from (seed, chunk index) alone: a longer video begins like a shorter one.

    SeedSequence mixes the two numbers so that neighbouring seeds and chunks share nothing; drawn on the CPU
    in float32, so the same seed gives the same video on every device, whatever PyTorch's defaults are.
    """
    mixed = np.random.SeedSequence([seed, chunk]).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(mixed >> 1))               # >> 1: an int64 is not negative
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")


def sample(dit: DiT, text: Tensor | Iterator[tuple], text_mask: Tensor | None, sampler: SamplerConfig, *,
           special_tokens: dict[str, Tensor] | None = None, prefix: Tensor | None = None,
           noise: Tensor | None = None, skip: bool = True,
           progress: Callable[[Progress], None] | None = None) -> Iterator[tuple[int, Tensor]]:
    """Generate a video chunk by chunk; yields (generated chunk's index, its latents) as each becomes clean.

    text            (L, C) with text_mask (L,), or one for each chunk, (chunks, L, C) with (chunks, L). Or,
                    with text_mask None, an iterator, from which a chunk takes (text, mask) or (text, mask,
                    SamplerConfig) when it enters, that is when the chunk `window` before it has been yielded
                    and the next is asked for; the config is for its own ranges and guidance. The last text
                    is used for all further chunks. The item None ends the video with the chunks in flight
    special_tokens  name -> (1, C)
    prefix          (16, T, H, W), clean latents that come first
    noise           (16, 6 K, H, W), in place of the seeded noise; K counts prefix chunks too. H and W are
                    taken from prefix or noise; without both, from the sampler's height and width
    skip            False: compute also what is multiplied by zero

    Yields float32 latents (16, 6, H, W), less the frames that were given; only an image run (a prefix of one
    frame) keeps that frame. Raises ValueError for inputs that do not fit, before anything is computed.
    """
    cfg = sampler
    channels = dit.cfg.latent_channels
    for name, u in (("prefix", prefix), ("noise", noise)):
        if u is not None:
            require(u.dim() == 4 and len(u) == channels and u.shape[1] >= 1,
                    f"{name} must be ({channels}, T, H, W), not {tuple(u.shape)}")
    if prefix is None:
        # 8: the VAE's patch_size
        H, W = (cfg.height // 8, cfg.width // 8) if noise is None else noise.shape[2:]
        prefix = torch.zeros(channels, 0, H, W, device="cpu")
    K, P = count_chunks(cfg.num_frames, prefix.shape[1])
    require(K is None or K > P, f"num_frames {cfg.num_frames} leaves nothing to generate: give at least 4")
    if noise is not None:
        require(K is not None, "noise needs num_frames: an endless run draws its own")
        shape = (channels, K * CHUNK, *prefix.shape[2:])
        require(noise.shape == shape,
                f"noise must be {shape} for a run of {K} chunks, not {tuple(noise.shape)}")
    table = special_tokens or {}
    checkpoints.check_tokens(cfg, table, dit.cfg.text_dim, math.inf if K is None else K - P)
    if isinstance(text, Tensor) or text_mask is not None:
        text = captions.each_chunk(text, text_mask, tuple(dit.null_text.shape))      # checked, one by one
    return _Run(dit, cfg, K, P, text, table, prefix, noise, skip).stream(progress or (lambda _: None))


class Entry(NamedTuple):
    """Text and config of one chunk."""

    text: Tensor                         # (L, C) special tokens and caption, or null text
    mask: Tensor                         # (L,)
    cfg: SamplerConfig                   # its own ranges and guidance


class _Run:
    """One run of the sampler: its inputs, and the state that it keeps from step to step."""

    def __init__(self, dit: DiT, cfg: SamplerConfig, K: int | None, P: int, texts: Iterator,
                 table: dict[str, Tensor], prefix: Tensor, noise: Tensor | None, skip: bool):
        self.dit, self.cfg, self.K, self.P, self.noise, self.skip = dit, cfg, K, P, noise, skip
        self.texts = captions.endless(texts)                                 # the last one goes on for ever
        null = dit.null_text.detach().float()                                # (L, C)
        self.table = {name: v.to(null) for name, v in table.items()}
        self.prefix = prefix[None].to(null.device, torch.float32)            # (1, 16, T, H, W)
        self.branches = DISTILLED_BRANCHES if cfg.distilled else BASE_BRANCHES
        self.cache = KVCache()
        self.entries: dict[int, Entry] = {}                                  # of the chunks in flight
        # Negative tokens are among the unmasked rows of the null text.
        mask = (torch.arange(len(null), device=null.device) < dit.cfg.null_length).long()
        names = token_names(cfg.negative_tokens, NEGATIVE_TOKENS)
        text, _ = prepend_tokens(null, mask, [self.table[name] for name in names])
        self.null = Entry(text, mask, cfg)

    @torch.no_grad()
    def stream(self, progress: Callable[[Progress], None]) -> Iterator[tuple[int, Tensor]]:
        """The pipeline: a chunk enters as noise, moves by the guided velocity, leaves when it is clean."""
        per_stage = self.cfg.num_steps // self.cfg.window
        total = None if self.K is None else (self.K - self.P + self.cfg.window - 1) * per_stage
        number = itertools.count(1)                                          # of a step; the prefix has none
        x = {chunk: self.given(chunk) for chunk in range(self.P)}            # chunk -> (1, 16, 6, H, W)
        for step in plan(self.cfg, self.K, self.P, self.enter):
            self.cache.evict(step.forget)
            if step.enters is not None:
                x[step.enters] = self.paste(step.enters, self.fresh(step.enters))
            v = self.velocity(step, x)
            for c in step.noisy:
                x[c.chunk] = self.paste(c.chunk, x[c.chunk] + v[c.chunk] * c.dt)
            x = {c.chunk: x[c.chunk] for c in step.noisy}                    # clean ones are in the cache now
            if step.noisy:
                chunk = step.noisy[0].chunk - self.P
                progress(Progress(next(number), total, chunk, step, self.cache.bytes, dict(x), v))
            if step.done is not None:
                del self.entries[step.done]
                yield step.done - self.P, self.emit(step.done, x[step.done])

    def velocity(self, step: Step, x: dict[int, Tensor]) -> dict[int, Tensor]:
        """Guided velocity of every noisy chunk; the keys of clean ones are stored on the way."""
        noisy = step.noisy
        shares = {c.chunk: branch_shares(self.entries[c.chunk].cfg, c, c == noisy[0]) for c in noisy}
        held: dict[str, list[ChunkInput]] = {}           # the chunks of each branch that is needed
        for name, branch in self.branches.items():
            wanted = [chunk for chunk, share in shares.items() if share[name] != 0 or not self.skip]
            if branch.stores:
                wanted += [c.chunk for c in step.chunks if c.clean]
            if wanted and branch.alone:
                held[name] = [c._replace(first_seen=c.chunk) for c in noisy if c.chunk in wanted]
            elif wanted:
                held[name] = needed(wanted, step.chunks)
        outs = self.dit.forward_all([self.call(inputs, self.branches[name], step.d, x)
                                     for name, inputs in held.items()])
        guided: dict[int, Tensor] = {}
        for (name, inputs), out in zip(held.items(), outs, strict=True):
            for c, v in zip(inputs, out.chunk(len(inputs), dim=2), strict=True):
                if not c.clean:
                    guided[c.chunk] = guided.get(c.chunk, 0) + shares[c.chunk][name] * v
        return guided

    def call(self, inputs: Sequence[ChunkInput], branch: Branch, d: float, x: dict[int, Tensor]
             ) -> tuple[tuple, dict[str, Any]]:
        """The arguments of the DiT for one branch."""
        chunks = [c.chunk for c in inputs]
        shown = [self.null if c.clean or not branch.conditional else self.entries[c.chunk] for c in inputs]
        text = torch.stack([entry.text for entry in shown])[None]            # (1, n, L, C)
        mask = torch.stack([entry.mask for entry in shown])[None]
        latents = torch.cat([x[chunk] for chunk in chunks], dim=2)           # (1, 16, 6 n, H, W)
        t = latents.new_tensor([[c.t for c in inputs]])                      # (1, n)
        return (latents, t, text, mask), dict(
            chunks=chunks, first_seen=[c.first_seen for c in inputs],
            conditional=branch.conditional, d=d if self.cfg.distilled else None,
            cache=self.cache, store=sum(c.clean for c in inputs) if branch.stores else 0)

    def enter(self, chunk: int) -> SamplerConfig | None:
        """Take the next of the texts for a generated chunk (after the last one, that one again) and give the
        chunk's config; None if the video ends before it."""
        item = next(self.texts)
        if item is None:
            return None
        text, mask, *own = item              # own: [SamplerConfig] or []
        require(text.shape == self.null.text.shape and mask.shape == self.null.mask.shape,
                f"text {tuple(text.shape)} and text_mask {tuple(mask.shape)} of chunk {chunk - self.P} "
                f"must be {tuple(self.null.text.shape)} and {tuple(self.null.mask.shape)}")
        cfg = own[0] if own else self.cfg
        checkpoints.check_own_config(cfg, self.cfg)      # it may differ only in ranges and guidance
        if mask.any():
            remaining = math.inf if self.K is None else self.K - chunk
            names = token_names(self.cfg.special_tokens, SPECIAL_TOKENS, remaining)
            text, mask = text.to(self.null.text), mask.bool().to(self.null.mask)
            text, mask = prepend_tokens(text, mask, [self.table[name] for name in names])
        else:                                # an empty caption is null text in every branch
            text, mask = self.null.text, self.null.mask
        self.entries[chunk] = Entry(text, mask, cfg)
        return cfg

    def given(self, chunk: int) -> Tensor:
        """The prefix frames that fall into a chunk: (1, 16, 0 to 6, H, W)."""
        return self.prefix[:, :, chunk * CHUNK : (chunk + 1) * CHUNK]

    def fresh(self, chunk: int) -> Tensor:
        """The noise a chunk starts from."""
        if self.noise is not None:
            noise = self.noise[:, chunk * CHUNK : (chunk + 1) * CHUNK]
        else:
            _, channels, _, H, W = self.prefix.shape
            noise = chunk_noise(self.cfg.seed, chunk - self.P, (channels, CHUNK, H, W))
        return noise[None].to(self.prefix)

    def paste(self, chunk: int, latents: Tensor) -> Tensor:
        """A chunk's latents, those of its frames that the prefix gives replaced by the prefix."""
        given = self.given(chunk)
        return torch.cat([given, latents[:, :, given.shape[2] :]], dim=2)

    def emit(self, chunk: int, latents: Tensor) -> Tensor:
        """What is yielded: without prefix frames, except an image, which is the video's first frame."""
        is_image = self.prefix.shape[2] == 1
        start = 0 if is_image else self.given(chunk).shape[2]
        return latents[0, :, start:].clone()               # a copy: the caller may change it in place


# ----------------------------------------------------------------------------------------------------------
# 10  Loading and the pipeline
# ----------------------------------------------------------------------------------------------------------
# One folder per model: config.json and model.safetensors (or numbered shards with the usual index). A DiT
# folder also holds special_tokens.safetensors; the VAE and T5 folders stand beside it unless said otherwise:
#
#     tiny/base/  config.json {"dit": ..., "sampler": ...}  model.safetensors  special_tokens.safetensors
#     tiny/vae/   config.json {"vae": ...}                  model.safetensors
#     tiny/t5/    config.json (transformers)                model.safetensors  spiece.model
#
# `build` makes a module without memory and compares it with the headers of the files; `fill` reads them.


def load_dit(folder: str | Path, device: Device = "cpu", dtype: str | None = None,
             backend: str = "torch", read: Callable | None = None) -> DiT:
    """A DiT alone; dtype overrides that of its blocks. To train it, ask for gradients: requires_grad_().
    read(dit, folder, device) gives it its weights; None: checkpoints.fill."""
    cfg = read_config(folder, "dit", DiTConfig)
    cfg = dataclasses.replace(cfg, dtype=dtype or cfg.dtype)
    require(cfg.dtype == "bfloat16" or not cfg.fp8,
            f"dtype {cfg.dtype!r} is not that of an fp8 model, which computes in 'bfloat16'")
    dit = build(lambda: DiT(cfg), folder)
    (read or fill)(dit, folder, device)
    dit.ops = get_ops(backend, device)
    return dit


def load_vae(folder: str | Path, device: Device = "cpu", dtype: torch.dtype | None = None,
             backend: str = "torch") -> VAE:
    """A VAE alone, in float32 or `dtype`."""
    require(dtype is None or isinstance(dtype, torch.dtype),
            f"vae_dtype {dtype!r} is not a dtype: give torch.float32, torch.bfloat16 or torch.float16")
    cfg = read_config(folder, "vae", VAEConfig)
    vae = fill(build(lambda: VAE(cfg), folder), folder, device, dtype)
    vae.ops = get_ops(backend, device)
    return vae


def load(folder: str | Path, *, vae: str | Path | None = None, t5: str | Path | None = None,
         device: Device = "cpu", dtype: str | None = None, vae_dtype: torch.dtype | None = None,
         backend: str = "torch", keep_t5: bool = False,
         parts: Sequence[Callable] = (load_dit, load_vae, T5)) -> MAGI:
    """Load a model folder; vae and t5 default to its neighbours. dtype overrides that of the DiT's blocks.

    The files of DiT and VAE are checked against their configs before any weight is read. T5 is read when a
    prompt comes and then freed unless keep_t5 is set, so a model without T5 can be used with encoded text.
    parts: what loads the three of them; parallel.parts() shares them among GPUs or streams their weights.
    ValueError for what does not fit.
    """
    checkpoints.check_device(device)
    vae = Path(vae or checkpoints.beside(folder, "vae"))
    t5 = Path(t5 or checkpoints.beside(folder, "t5"))
    sampler = read_config(folder, "sampler", SamplerConfig)
    vae_cfg = read_config(vae, "vae", VAEConfig)
    build(lambda: VAE(vae_cfg), vae)                     # only to check it before the large DiT is read
    table = checkpoints.read_special_tokens(folder)
    read_dit, read_vae, encoder = parts
    dit = read_dit(folder, device, dtype, backend)
    return MAGI(dit, read_vae(vae, device, vae_dtype, backend), sampler, table,
                encoder(t5, dit.cfg.text_length, device, keep=keep_t5))


class MAGI:
    """Text, image and video to video, chunk by chunk: the one object that a user needs.

    >>> pipe = load("tiny/base")                                             # doctest: +SKIP
    >>> for frames in pipe("a red ball bounces", num_frames=96):             # doctest: +SKIP
    ...     show(frames)                 # uint8 (<= 24, height, width, 3), as soon as each second is clean
    """

    def __init__(self, dit: DiT, vae: VAE, sampler: SamplerConfig, special_tokens: dict[str, Tensor],
                 encode_text: Callable[[Sequence[str]], tuple[Tensor, Tensor]]):
        self.dit, self.vae, self.sampler, self.special_tokens = dit, vae, sampler, special_tokens
        self.encode_text = encode_text                   # captions -> text (n, L, C), mask (n, L)

    def __call__(self, prompt: str | Iterable[str | Prompt] | tuple[Tensor, Tensor], *, image: Any = None,
                 video: Any = None, prefix_frames: int = 32, fit: str = "crop",
                 sampler: SamplerConfig | None = None, progress: Callable[[Progress], None] | None = None,
                 **settings: Any) -> Iterator[np.ndarray]:
        """Yield uint8 frames (<= 24, height, width, 3), exactly num_frames in all, one chunk at a time.

        prompt: one caption; a list with one for each chunk (the last is used for all further ones); an
        iterator, from which a chunk takes a caption or a Prompt when it enters, window - 1 chunks before it
        is yielded (None ends the video with the chunks in flight); or the (text, mask) of encode_text.
        image: the video starts with it. video: the result continues it, and its last `prefix_frames` are the
        prefix. Both may be arrays, tensors, PIL images or paths (media.to_image, media.to_video).
        sampler replaces the model's config; settings replace fields of it, such as num_frames, seed,
        num_steps, height, width. The call checks all of them and encodes captions and prefix; frames are
        computed when they are asked for. Raises ValueError for what does not fit, and FloatingPointError if
        frames are not finite.
        """
        cfg = checkpoints.with_settings(sampler or self.sampler, settings)
        wanted = math.inf if cfg.num_frames is None else cfg.num_frames
        cfg = dataclasses.replace(cfg, num_frames=round_frames(cfg.num_frames, image is not None))
        pixels = None
        if image is not None or video is not None:
            import media

            pixels = media.prefix_pixels(image, video, prefix_frames, (cfg.height, cfg.width), fit, cfg.fps)
        # Captions in a list are encoded here; those of an iterator, and Prompts, when their chunk enters.
        text, mask = captions.texts_of(prompt, cfg, self.encode_text, shot_transition)
        prefix = None if pixels is None else self.encode(pixels)
        chunks = sample(self.dit, text, mask, cfg, special_tokens=self.special_tokens, prefix=prefix,
                        progress=progress)
        # Of a video: what its prefix gives of the first chunk.
        given = None if video is None else prefix[:, prefix.shape[1] // CHUNK * CHUNK :]
        return self._frames(chunks, wanted, given)

    def _frames(self, chunks: Iterator[tuple[int, Tensor]], wanted: float, given: Tensor | None
                ) -> Iterator[np.ndarray]:
        """Decode chunks, to `wanted` video frames in all. The first one is decoded together with the `given`
        latent frames of a video, since a VAE is at its best on whole chunks; these are not shown again."""
        for i, latent in chunks:
            skip = 0
            if i == 0 and given is not None:
                # [-CHUNK:]: a prefix of one latent frame is in `latent` already.
                latent = torch.cat([given.to(latent), latent], dim=1)[:, -CHUNK:]
                skip = FRAMES_PER_LATENT * given.shape[1]
            frames = self.decode(latent)[skip:]
            frames = frames[: int(min(wanted, len(frames)))]
            wanted -= len(frames)
            yield frames

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Video (1, 3, frames, height, width) in [-1, 1] -> scaled latents (16, T, H, W)."""
        pixels = pixels.to(self.dit.null_text.device, self.vae.dtype)
        return self.vae.encode(pixels)[0].float() * SCALE_FACTOR

    @torch.no_grad()
    def decode(self, latent: Tensor) -> np.ndarray:
        """Scaled latents (16, T, H, W) -> uint8 (4T, height, width, 3)."""
        frames = self.vae.decode((latent[None] / SCALE_FACTOR).to(self.vae.dtype))[0].float()
        if not frames.isfinite().all():
            raise FloatingPointError("the model gives numbers that are not finite: its weights are damaged, "
                                     "or a guidance scale, LoRA scale or dtype is too extreme")
        frames = ((frames.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return frames.permute(1, 2, 3, 0).cpu().numpy()
