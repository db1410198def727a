"""Fast paths for magi.py in Triton: block-causal attention, fp8 matmul, fused elementwise steps.

magi.TORCH_OPS is the specification; TRITON_OPS here has the same names, signatures and results, and magi.py
runs on either, or without this file. **No kernel here has been timed on a GPU yet, or run on one**: they are
checked in Triton's interpreter and by compiling for six architectures. So `--backend auto` checks every
kernel on the user's own card, and uses it only where it is right and faster than PyTorch (kernel_choice.py).

    operation          signature as in magi.py section 2                    what it saves
    attention          (q, k, v)                                            the N x M scores of each head
    block_attention    (q, k, v, spans, out)                                n - 1 of n launches, and a copy
    fp8_matmul         (x, weight, divide, scale)                           half the bytes, twice the rate
    norm_rotary        (x, norm, angles or None)                            45 of 49 bytes per element (bf16)
    gated_residual     (x, gate, update, norm)                              40 of 46 bytes per element (bf16)
    swiglu             (u)                                                  4 of 10 bytes per element (bf16)
    matmul_float32     (x, weight)                                          nothing: it is magi.py's own

    python kernels.py               on a GPU: check against magi.py, then time, beside PyTorch's own kernels
    python kernels.py --compile     anywhere: compile for six architectures; registers, memory, instructions
                                    (both are in tools/bench_kernels.py)

Symbols as in magi.py: B batch, N queries, M keys, Hq Hkv query and key/value heads, hd head width, n chunks.
A *row* is a token, counted through the whole batch; in attention it is one token of one head. In kernels,
capitals are places in memory (Q, Out, Plan) or known when the kernel is compiled (T, ROWS, EDGE:
`tl.constexpr`). Names in small letters are numbers and tiles on chip.

Contents
    1  What a kernel is       programs, tiles, memory; how a kernel is started
    2  Elementwise            what PyTorch moves through memory, and what one pass moves
    3  Fp8 matmul             scales, and what they lose
    4  Plans                  which program works on which tile; why block-causal needs no mask
    5  Attention, forward     the online softmax
    6  Attention, backward    scores are computed again, never stored; the function that a user calls
    7  Tile sizes             how large they are on which architecture, and why

Each of 2, 3 and 6 has the reasons first, then the kernels, then the function that checks its arguments and
starts them (for section 5 it stands in 6). The simplest kernel is `_swiglu_kernel`; the heart of attention is
`_attend_tile`, a dozen lines.
Left out on purpose: dropout, masks of any kind, head widths other than 16, 32, 64 and 128. References:
FlashAttention 1 and 2 (arXiv 2205.14135, 2307.08691); SmoothQuant (2211.10438); Triton's tutorials 3, 6, 9.
"""

# ruff: noqa: E402
from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import MagicMock

if __name__ == "__main__":
    import terminal

    sys.excepthook = terminal.name_what_is_missing       # PyTorch, or Triton

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

import magi
from checkpoints import load_installed, load_module, require

# Hugging Face has a package of this name. Where it is installed, `import kernels` means that package:
# transformers imports it, and Python finds this file if it was started in this folder. (magi.py loads this
# file by its path, as `magi_kernels`.)
if not (__name__ == "kernels" and load_installed("kernels", __file__)):
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
else:     # the import is answered, but Python still runs this file to its end: with stand-ins for Triton
    triton = tl = TensorDescriptor = MagicMock()

__all__ = ["TRITON_OPS", "Tiles", "arch_of", "attention", "block_attention", "flash_attention", "fp8_matmul",
           "gated_residual", "get_ops", "launch", "norm_rotary", "plan_keys", "plan_queries", "product",
           "quantise", "swiglu", "tiles_for"]

INTERPRETED = triton.knobs.runtime.interpret is True          # was TRITON_INTERPRET=1 set?
if INTERPRETED:               # mend two faults of the interpreter, so that no kernel has to work around them
    load_module("triton_interpreter", Path(__file__).with_name("tools") / "triton_interpreter.py")

# ----------------------------------------------------------------------------------------------------------
# 1  What a kernel is
# ----------------------------------------------------------------------------------------------------------
# A kernel is the code of one *program*; a launch starts a grid of them, and `tl.program_id` tells a program
# which one it is. The GPU's multiprocessors (132 on an H100) take programs from the grid as they get free. A
# program's variables are *tiles*, blocks of numbers spread over its threads, 32 to a *warp*.
#
# Numbers live in four places, each larger and slower than the one before. On an H100: registers (255 a
# thread), shared memory (227 KiB a multiprocessor), the L2 cache (50 MB), memory (80 GB). Its tensor cores,
# which multiply tiles, do 295 operations in the time in which one byte comes from memory. So a kernel is
# good if it fetches a tile once, does all there is to do with it, and writes only results. The tile size says
# how much is on chip at once; while one tile is worked on, the next ones are being loaded (`stages`). From
# the H100 on, a copy engine (TMA) loads whole tiles by itself; a *descriptor* tells it a tensor's address,
# shape and strides.


class Tiles(NamedTuple):
    """The tile sizes of a kernel, and what else the compiler must know of it; T in the kernels. The names m,
    n, k are those of matrix products (BLOCK_M, ... elsewhere), not the legend's."""

    m: int                        # queries per tile; elsewhere rows
    n: int                        # keys per tile; elsewhere columns
    k: int = 0                    # fp8 only: how much of the inner axis per step
    warps: int = 4
    stages: int = 2               # tiles in flight: loads run ahead of the arithmetic by this many
    tma: bool = False             # let the copy engine load whole tiles
    # The others are for attention alone, and are filled in at the launch.
    rest: int = 16                # after the whole tiles of a span, the remainder goes in tiles of this size
    hd: int = 0
    group: int = 1                # query heads that read the same key/value head
    precision: str = "ieee"       # how float32 is multiplied


def launch(kernel: Any, grid: tuple[int, ...], tiles: Tiles, **args: Any) -> None:
    """Start a kernel on its tensors' device. (For --compile, tools/bench_kernels.py puts a function here that
    keeps the arguments and starts nothing.)"""
    tensor = next(u for u in args.values() if isinstance(u, Tensor))
    arch_of(tensor.device)                               # raises ValueError if the device cannot run Triton
    if 0 not in grid:
        with torch.cuda.device_of(tensor):
            kernel[grid](**args, num_warps=tiles.warps, num_stages=tiles.stages)


@lru_cache
def arch_of(device: torch.device | str) -> int:
    """The architecture whose tiles in section 7 fit a device: 89, 90, 100, 120 (from the A100's 80 on, the
    nearest), 942 or 950; 0 for Triton's interpreter. Raises ValueError if there is none, with the reason."""
    device = torch.device(device)
    if INTERPRETED and device.type != "cuda":
        return 0
    require(device.type == "cuda" and torch.cuda.is_available(), f"backend 'triton' needs an NVIDIA GPU and "
            f"a CUDA build of PyTorch (device {str(device)!r}): use 'torch'")
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        require(name in ("gfx942", "gfx950"),
                f"backend 'triton' needs an NVIDIA GPU, gfx942 or gfx950, not {name}: use 'torch'")
        return int(name.removeprefix("gfx"))
    major, minor = torch.cuda.get_device_capability(device)
    require(major >= 8, f"backend 'triton' needs compute capability 8.0 (A100, RTX 30) or later, "
            f"{torch.cuda.get_device_name(device)} has {major}.{minor}: use 'torch'")
    return {8: 89, 9: 90, 10: 100, 11: 100}.get(major, 120)


def _dense(u: Tensor) -> Tensor:
    """Contiguous, and at a multiple of 16 bytes, as the copy engine needs it: a view may begin elsewhere."""
    u = u.contiguous()
    return u if u.data_ptr() % 16 == 0 else u.clone()


def _kind(u: Tensor) -> str:
    """Shape, type and device of a tensor, for comparing and for messages."""
    return f"{tuple(u.shape)} {u.dtype} on {u.device}"


def _require_head_width(hd: int) -> None:
    """Raises ValueError for other head widths: Triton's tiles are powers of two, tl.dot takes 16 or more."""
    require(hd in (16, 32, 64, 128), f"head width {hd} must be 16, 32, 64 or 128: use the backend 'torch'")


# ----------------------------------------------------------------------------------------------------------
# 2  Elementwise
# ----------------------------------------------------------------------------------------------------------
# Norms, gates and rotations do a few operations per number, and an H100 can do some 40 (outside its tensor
# cores) in the time it takes to fetch one from memory. Their cost is the bytes they move, and PyTorch moves
# every intermediate twice. Per element, bf16 in and out (r read, w written; gates, angles and norms are small
# beside x, and stay in the cache):
#
#     gated_residual   update to float32 r2 w4 · product r4 w4 · norm r4 w4 ·
#                      x to float32 r2 w4 · sum r8 w4 · to bf16 r4 w2           46 bytes, in one pass  6
#     norm_rotary      to float32 r2 w4 · norm r4 w4 · on 3/4 of the width: two products r8 w8 and
#                      their sum r8 w4 · joined r4 w4 · to bf16 r4 w2           49 bytes, in one pass  4
#     swiglu           silu r2 w2 · product r4 w2                               10 bytes, in one pass  6
#
# What that makes of a whole layer is counted in tools/bench_kernels.py.


class _ReferenceGradient(torch.autograd.Function):
    """Forward: what a kernel wrote to `out`. Backward: the reference is computed again and differentiated.
    Training spends little time on these memory-bound steps, so they need no backward kernels of their own."""

    @staticmethod
    def forward(ctx, reference, out, *tensors):
        ctx.reference = reference
        ctx.save_for_backward(*tensors)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        tensors = [u.detach().requires_grad_(need)
                   for u, need in zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True)]
        with torch.enable_grad():
            ctx.reference(*tensors).backward(grad)
        return None, None, *(u.grad for u in tensors)


@triton.jit
def _swiglu_kernel(U, Out, width, T: tl.constexpr):
    """silu(first half) * second half of a row. Grid: (rows, tiles of T.n columns)."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * T.n + tl.arange(0, T.n)
    mask = cols < width
    a = tl.load(U + row * 2 * width + cols, mask, 0.0).to(tl.float32)
    b = tl.load(U + row * 2 * width + width + cols, mask, 0.0).to(tl.float32)
    a = (a * tl.sigmoid(a)).to(U.dtype.element_ty).to(tl.float32)            # PyTorch rounds here too
    tl.store(Out + row * width + cols, (a * b).to(Out.dtype.element_ty), mask)


@torch.compiler.disable                # here and below: torch.compile cannot trace a launch
def swiglu(u: Tensor) -> Tensor:
    """magi.swiglu: silu(first half) * second half of the last axis, (..., 2 FFN) -> (..., FFN)."""
    require(u.shape[-1] % 2 == 0, f"u {tuple(u.shape)} must have two halves")
    width, tiles = u.shape[-1] // 2, Tiles(1, 1024)
    out = u.new_empty(*u.shape[:-1], width)
    launch(_swiglu_kernel, (out.numel() // max(1, width), triton.cdiv(width, tiles.n)), tiles,
           U=u.contiguous(), Out=out, width=width, T=tiles)
    return _ReferenceGradient.apply(magi.swiglu, out, u)


def _norm(weight: Tensor, bias: Tensor, eps: float) -> Callable[[Tensor], Tensor]:
    """magi.LayerNorm1p as a function of x with these weights, so that they too get their gradients."""
    return lambda x: F.layer_norm(x.to(weight.dtype), weight.shape, weight + 1, bias, eps)


@triton.jit
def _gated_residual_kernel(X, Gate, Update, Weight, Bias, Out, chunk, width, eps, T: tl.constexpr):
    """x + LN1(gate * update) of one token. Grid: (B N,). chunk: tokens of a chunk, N / n; T.n: the width,
    rounded up to a power of two."""
    token, cols = tl.program_id(0), tl.arange(0, T.n)
    mask, offsets = cols < width, token.to(tl.int64) * width + cols
    gate = (token // chunk).to(tl.int64)                                     # the token's row of (B n, width)
    u = tl.load(Gate + gate * width + cols, mask, 0.0).to(tl.float32)
    u *= tl.load(Update + offsets, mask, 0.0).to(tl.float32)
    u = tl.where(mask, u - tl.sum(u, 0) / width, 0.0)                        # LN1: mean 0, ...
    u *= tl.rsqrt(tl.sum(u * u, 0) / width + eps)                            # ... variance 1
    u = u * (tl.load(Weight + cols, mask, 0.0) + 1) + tl.load(Bias + cols, mask, 0.0)
    x = tl.load(X + offsets, mask, 0.0).to(tl.float32)
    tl.store(Out + offsets, (x + u).to(Out.dtype.element_ty), mask)


@torch.compiler.disable
def gated_residual(x: Tensor, gate: Tensor, update: Tensor, norm: magi.LayerNorm1p) -> Tensor:
    """magi.gated_residual: x + LN1(gate * update); x, update (B, N, D), gate (B, n, D), n dividing N."""
    (B, N, D), n = x.shape, gate.shape[1]
    require(update.shape == x.shape and norm.weight.shape == (D,) and gate.shape == (B, n, D),
            f"gate {tuple(gate.shape)}, update {tuple(update.shape)} and norm {tuple(norm.weight.shape)} "
            f"do not go with x {tuple(x.shape)}")
    require(n > 0 and N % n == 0, f"{N} tokens do not divide into {n} chunks")
    out, tiles = x.new_empty(x.shape), Tiles(1, triton.next_power_of_2(D), warps=8)
    launch(_gated_residual_kernel, (B * N,), tiles, X=x.contiguous(), Gate=gate.contiguous(),
           Update=update.contiguous(), Weight=norm.weight, Bias=norm.bias, Out=out, chunk=N // n, width=D,
           eps=norm.eps, T=tiles)

    def reference(x, gate, update, weight, bias):
        return magi.gated_residual(x, gate, update, _norm(weight, bias, norm.eps))

    return _ReferenceGradient.apply(reference, out, x, gate, update, norm.weight, norm.bias)


@triton.jit
def _norm_rotary_kernel(X, Weight, Bias, Angles, Out, rows, tokens, heads, eps, PAIRS: tl.constexpr,
                        T: tl.constexpr):
    """LN1, then rotation of the pairs (j, j + PAIRS), for all heads of T.m tokens; T.n is hd. If PAIRS is 0,
    LN1 alone. Grid: (tiles of tokens,).

    PAIRS is 48 at head width 128, no power of two, so the two halves that rotate cannot be cut out of a tile.
    Instead every column also loads its partner (names in _p), which the first load has just brought into the
    cache. The norms of qx and kx have bf16 weights (and no angles): what PyTorch rounds to that type,
    1 + weight and the result, is rounded here too.
    """
    row, col = tl.program_id(0) * T.m + tl.arange(0, T.m)[:, None], tl.arange(0, T.n)[None, :]
    TYPE: tl.constexpr = Weight.dtype.element_ty
    weight = (tl.load(Weight + col).to(tl.float32) + 1).to(TYPE).to(tl.float32)
    bias = tl.load(Bias + col).to(tl.float32)
    if PAIRS > 0:
        rotates = (row < rows) & (col < 2 * PAIRS)             # the others have angle 0, and any partner
        partner = tl.where(col < PAIRS, col + PAIRS, col - PAIRS)
        angle = tl.load(Angles + row % tokens * PAIRS + col % PAIRS, rotates, 0.0)
        cos, sin = tl.cos(angle), tl.where(col < PAIRS, -tl.sin(angle), tl.sin(angle))
        weight_p, bias_p = tl.load(Weight + partner) + 1, tl.load(Bias + partner)
    for head in range(heads):
        offset = (row.to(tl.int64) * heads + head) * T.n
        x = tl.load(X + offset + col, row < rows, 0.0).to(TYPE).to(tl.float32)
        mean = tl.sum(x, 1)[:, None] / T.n
        x -= mean
        rstd = tl.rsqrt(tl.sum(x * x, 1)[:, None] / T.n + eps)               # 1 / standard deviation
        y = (x * rstd * weight + bias).to(TYPE)
        if PAIRS > 0:
            x_p = tl.load(X + offset + partner, row < rows, 0.0).to(tl.float32) - mean
            y = y * cos + (x_p * rstd * weight_p + bias_p).to(TYPE) * sin
        tl.store(Out + offset + col, y.to(Out.dtype.element_ty), row < rows)


@torch.compiler.disable
def norm_rotary(x: Tensor, norm: magi.LayerNorm1p, angles: Tensor | None) -> Tensor:
    """magi.norm_rotary: x (B, N, heads, hd), angles (N, 3 hd/8) float32 -> LN1, rotated, like x. Without
    angles, LN1 alone."""
    B, N, heads, hd = x.shape
    _require_head_width(hd)
    angle_rows, pairs = (N, 0) if angles is None else angles.shape
    require(norm.weight.shape == (hd,) and angle_rows == N and 2 * pairs <= hd,
            f"norm {tuple(norm.weight.shape)} and angles {(angle_rows, pairs)} do not go with x "
            f"{tuple(x.shape)}: angles need a row per token")
    out, tiles = x.new_empty(x.shape), Tiles(8, hd)
    launch(_norm_rotary_kernel, (triton.cdiv(B * N, tiles.m),), tiles, X=x.contiguous(), Weight=norm.weight,
           Bias=norm.bias, Angles=None if angles is None else angles.contiguous(), Out=out, rows=B * N,
           tokens=N, heads=heads, eps=norm.eps, PAIRS=pairs, T=tiles)

    def reference(x, weight, bias, angles=None):
        return magi.norm_rotary(x, _norm(weight, bias, norm.eps), angles)

    others = [] if angles is None else [angles]
    return _ReferenceGradient.apply(reference, out, x, norm.weight, norm.bias, *others)


# ----------------------------------------------------------------------------------------------------------
# 3  Fp8 matmul
# ----------------------------------------------------------------------------------------------------------
# e4m3 has 4 bits of exponent and 3 of mantissa: eight steps per factor of two from 2^-6 to 448, and equal
# steps of 2^-9 below. Scales bring tensors into that range: x = input_scale * x8, w = weight_scale * w8, so
# x w^T = (x8 w8^T) times one number, `scale`, applied to the float32 sum at the end. Two things are lost.
# First, mantissa: a relative error of up to 1/17 per number, 2.7 % rms, and about 4 % in a product of two
# such matrices (notebook 6). Second, what is smaller than 2^-10 becomes zero, and that is worse: one outlier
# sets the scale for all, and a channel 500,000 times smaller is gone. Hence the smoothing scales s of Wo and
# fc2, whose inputs have such channels: x_j / s_j and w_j * s_j have the same product, and s_j is chosen to
# leave both moderate (`convert_weights.py quantize`). `divide` is input_scale, or s in Wo and fc2.
#
# The rounding is that of magi.fp8_matmul exactly: float32 division, clamp, to bf16, to e4m3, so both paths
# multiply the same numbers. On the H100 the tensor cores add fp8 products with about 14 bits. So after every
# step of T.k terms (at most 128) their sum is added to one in float32 registers, without which "float32
# accumulation" would not be true.


@triton.jit
def _quantise_kernel(X, Divide, X8, rows, width, T: tl.constexpr):
    """x / divide in e4m3, in one pass: 3 bytes per element (bf16) where PyTorch's four passes move 23.
    Grid: (tiles down, tiles across)."""
    row = tl.program_id(0) * T.m + tl.arange(0, T.m)[:, None]
    col = tl.program_id(1) * T.n + tl.arange(0, T.n)[None, :]
    offsets, mask = row.to(tl.int64) * width + col, (row < rows) & (col < width)
    x = tl.load(X + offsets, mask, 0.0).to(tl.float32)
    x = tl.div_rn(x, tl.load(Divide + col, col < width, 1.0))                # `/` would be off by an ulp
    x = tl.clamp(x, -448.0, 448.0, tl.PropagateNan.ALL)
    tl.store(X8 + offsets, x.to(tl.bfloat16).to(tl.float32).to(tl.float8e4nv), mask)


@triton.jit
def _fp8_kernel(X8, W8, Scale, Out, rows, cols, width, T: tl.constexpr):
    """One tile of (x8 w8^T) * scale: x8 (rows, width), w8 (cols, width), contiguous along the inner axis, as
    tensor cores want it. Grid: (tiles across, tiles down)."""
    # Programs that run together should share operands in the L2 cache: go down in bands of 8 tiles, as in
    # Triton's tutorial 3.
    down, across = tl.swizzle2d(tl.program_id(1), tl.program_id(0), tl.num_programs(1), tl.num_programs(0), 8)
    row, col = down * T.m, across * T.n
    tile_rows, tile_cols = row + tl.arange(0, T.m)[:, None], col + tl.arange(0, T.n)[None, :]
    acc = tl.zeros((tile_rows + tile_cols).shape, tl.float32)        # Triton 3.7 does not compile (T.m, T.n)
    for k in tl.range(0, width, T.k):
        if T.tma:                                          # the copy engine puts zeros beyond the edges
            x, w = X8.load([row, k]), W8.load([col, k]).T
        else:                                              # beyond the edge the last row is loaded again
            inner = k + tl.arange(0, T.k)
            x_offsets = tl.minimum(tile_rows, rows - 1).to(tl.int64) * width + inner[None, :]
            w_offsets = tl.minimum(tile_cols, cols - 1).to(tl.int64) * width + inner[:, None]
            x = tl.load(X8 + x_offsets, (inner < width)[None, :], 0.0)
            w = tl.load(W8 + w_offsets, (inner < width)[:, None], 0.0)
        acc = tl.dot(x, w, acc, max_num_imprecise_acc=T.k)
    result = (acc * tl.load(Scale)).to(tl.bfloat16)
    tl.store(Out + tile_rows.to(tl.int64) * cols + tile_cols, result, (tile_rows < rows) & (tile_cols < cols))


def quantise(x: Tensor, divide: Tensor, tiles: Tiles = Tiles(4, 1024)) -> Tensor:
    """x / divide in e4m3: x (rows, width) contiguous, divide of width numbers in float32."""
    rows, width = x.shape
    x8 = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    launch(_quantise_kernel, (triton.cdiv(rows, tiles.m), triton.cdiv(width, tiles.n)), tiles,
           X=x, Divide=divide, X8=x8, rows=rows, width=width, T=tiles)
    return x8


def product(x8: Tensor, weight: Tensor, scale: Tensor, tiles: Callable[..., Tiles] | None = None) -> Tensor:
    """(x8 weight^T) * scale in bf16, of e4m3 matrices. tiles: a function to use in place of `tiles_for`."""
    (rows, width), cols = x8.shape, len(weight)
    out = x8.new_empty(rows, cols, dtype=torch.bfloat16)
    tile = (tiles or tiles_for)("fp8", arch_of(x8.device))
    tile = tile._replace(tma=tile.tma and width % 16 == 0)                   # rows must start at 16 bytes
    weight = _dense(weight)
    if tile.tma:
        x8 = TensorDescriptor.from_tensor(x8, [tile.m, tile.k])
        weight = TensorDescriptor.from_tensor(weight, [tile.n, tile.k])
    launch(_fp8_kernel, (triton.cdiv(cols, tile.n), triton.cdiv(rows, tile.m)), tile,
           X8=x8, W8=weight, Scale=scale.float(), Out=out, rows=rows, cols=cols, width=width, T=tile)
    return out


@torch.compiler.disable
def fp8_matmul(x: Tensor, weight: Tensor, divide: Tensor, scale: Tensor, multiply: Callable = product
               ) -> Tensor:
    """magi.fp8_matmul: x (..., in) any float, weight (out, in) e4m3, divide (in,) or (1, in), scale (1,)
    -> (..., out) bf16. GPUs without fp8 arithmetic (before sm_89), and training, take the reference, which
    widens the e4m3 numbers. multiply: the product of the quantised x with the weight, `product` or one that
    kernel_choice.py tries in its place."""
    width = x.shape[-1]
    require(weight.dtype == torch.float8_e4m3fn and weight.shape[1:] == (width,),
            f"weight {tuple(weight.shape)} {weight.dtype} must be (out, {width}) in e4m3, as x is "
            f"{tuple(x.shape)}")
    require(divide.shape in ((width,), (1, width)) and scale.numel() == 1,
            f"divide {tuple(divide.shape)} must be ({width},), scale {tuple(scale.shape)} one number")
    no_fp8 = x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device) < (8, 9)
    if no_fp8 or x.numel() == 0 or x.requires_grad and torch.is_grad_enabled():
        return magi.fp8_matmul(x, weight, divide, scale)
    x8 = quantise(x.reshape(-1, width).contiguous(), divide.float().contiguous())
    return multiply(x8, weight, scale).view(*x.shape[:-1], len(weight))


# ----------------------------------------------------------------------------------------------------------
# 4  Plans
# ----------------------------------------------------------------------------------------------------------
# Block-causal needs no mask. A chunk of queries reads *all* keys of one contiguous span and no others, so
# its rule is two numbers, a start and an end. A loop from start to end touches only keys that count; the one
# tile at the end that sticks out is masked, the hundreds before it are not. A mask tensor would cost a byte
# to read per pair of query and key and, worse, the arithmetic of every pair that it forbids.
#
# The spans are known on the CPU before a forward starts, and all layers share them. So a *plan* is made once
# and copied to the GPU: four integers for each tile say where it lies and over which keys its program goes.
# Programs start in the order of the plan. Those with the longest loops come first, so that none of them
# is still running when all others have ended.


def _chunks(spans: tuple, B: int, N: int, M: int) -> list[tuple[int, int, int, int]]:
    """(first query, end, first key, end) of every chunk, checked; counted through the whole batch."""
    n = len(spans[0])
    require(len(spans) in (1, B) and N % n == 0,
            f"{len(spans)} x {n} spans do not fit {B} x {N} queries: one per chunk, all of a size")
    out = []
    for b in range(B):
        for i, (start, end) in enumerate(spans[b % len(spans)]):
            require(0 <= start < end <= M, f"span [{start}, {end}) of chunk {i} is empty or leaves the {M} "
                    f"keys: every chunk must see at least one")
            query = b * N + N // n * i
            out.append((query, query + N // n, b * M + start, b * M + end))
    return out


def plan_queries(spans: tuple, B: int, N: int, M: int, size: int) -> list[tuple[int, int, int, int]]:
    """Tiles of at most `size` queries of a chunk, and its span of keys: (row, rows, first key, keys)."""
    tiles = [(row, min(size, query_end - row), key, key_end - key)
             for query, query_end, key, key_end in _chunks(spans, B, N, M)
             for row in range(query, query_end, size)]
    return sorted(tiles, key=lambda tile: tile[3], reverse=True)


def plan_keys(spans: tuple, B: int, N: int, M: int, size: int) -> tuple[list, list]:
    """Tiles of at most `size` keys, (row, rows, first, number), and the runs of queries, (row, rows), that
    read them: runs[first : first + number], one run for each chunk that reads the tile. Keys are cut wherever
    a span starts or ends, so all keys of a tile have the same readers."""
    chunks = _chunks(spans, B, N, M)
    edges = {0, B * M}
    for _, _, key, key_end in chunks:
        edges |= {key, key_end}
    tiles: list[tuple[int, int, int, int]] = []
    runs: list[tuple[int, int]] = []
    for low, high in itertools.pairwise(sorted(edges)):
        readers = [(query, query_end - query) for query, query_end, key, key_end in chunks
                   if key <= low and high <= key_end]
        tiles += [(row, min(size, high - row), len(runs), len(readers)) for row in range(low, high, size)]
        runs += readers
    return sorted(tiles, key=lambda tile: tile[3], reverse=True), runs


@lru_cache(256)
def _plan_on(device: torch.device, held: str, *args: Any) -> dict[str, Tensor]:
    """The plan for programs that hold a tile of "queries" or "keys", as arguments of a kernel. The last 256
    plans stay on the device: every layer and step asks for the same few."""
    if held == "queries":
        tables = {"Plan": plan_queries(*args)}
    else:
        tables = dict(zip(("Plan", "Runs"), plan_keys(*args), strict=True))
    return {name: torch.tensor(table, dtype=torch.int32).to(device) for name, table in tables.items()}


# ----------------------------------------------------------------------------------------------------------
# 5  Attention, forward
# ----------------------------------------------------------------------------------------------------------
# For one query, attention is a weighted mean of the values: o = sum_j e^(s_j) v_j / sum_j e^(s_j). A mean
# can be taken in one pass. Keep the largest score so far m, the sum l of e^(s - m), and the weighted sum acc
# of e^(s - m) v; when a tile of keys brings a larger score, shrink l and acc to the new scale:
#
#     m' = max(m, max s),    l' = l e^(m - m') + sum e^(s - m'),    acc' = acc e^(m - m') + e^(s - m') v
#
# That is the online softmax; at the end o = acc / l. Nothing of size N x M is ever in memory: for one chunk
# of the 4.5B at 720x720 (12,150 queries, 24 heads) against five chunks the scores would be 35 GB in bf16,
# written and read twice; what is moved instead is q, k, v and o, 0.4 GB. The forward also keeps the logsumexp
# of each row, lse = log sum_j e^(s_j) = m + log l: with it the backward can compute any weight again.
#
# Grouped queries: the Hq/Hkv heads that read the same keys are neighbours in the grid, so what one fetches
# from memory the others find in the L2 cache. In the same way all tiles of a key/value head run before the
# next head's begin: keys and values of five chunks are 31 MB for one head, 249 MB for all, and the H100's L2
# has 50 MB.
#
# Self- and cross-attention of a layer write side by side into one buffer (B, N, 2 Hq hd), which the output
# projection reads as it is. That is why the kernel takes `out`, and a stride for it: to join two results and
# put them in the projection's order would move 16 bytes per token and channel of the layer.

LOG2E = tl.constexpr(math.log2(math.e))        # the hardware has 2^x, not e^x
LN2 = tl.constexpr(math.log(2))


class Matrix(NamedTuple):
    """One head of a tensor (B, N, heads, hd), in a kernel: a matrix of B N rows and hd columns."""

    ptr: Any                      # to the tensor's first number
    col: Any                      # the head's first column
    stride: Any                   # numbers from one row to the next
    tma: Any = None               # the tensor's descriptor, where the copy engine loads whole tiles


@triton.jit
def _tile(X, row, left, ROWS: tl.constexpr, EDGE: tl.constexpr, T: tl.constexpr):
    """Load ROWS rows of a Matrix from `row` on: (ROWS, hd). At an EDGE only `left` of them count, and the
    last of these stands in for the rest, which belong to other chunks and might hold nan: a weight of 0
    would not help, since 0 * nan is nan."""
    if T.tma and not EDGE:
        x = X.tma.load([row, X.col])
    else:
        rows, cols = tl.arange(0, ROWS)[:, None], tl.arange(0, T.hd)[None, :]
        if EDGE:
            rows = tl.minimum(rows, left - 1)
        # 64 bits for where the tile begins; inside it 32 are enough
        x = tl.load(X.ptr + row.to(tl.int64) * X.stride + X.col + (rows * X.stride + cols))
    return x


@triton.jit
def _store(X, row, left, x, T: tl.constexpr):
    """Write the first `left` rows of a tile to a Matrix."""
    rows, cols = tl.arange(0, x.shape[0])[:, None], tl.arange(0, T.hd)[None, :]
    ptrs = X.ptr + row.to(tl.int64) * X.stride + X.col + (rows * X.stride + cols)
    tl.store(ptrs, x.to(X.ptr.dtype.element_ty), rows < left)


@triton.jit
def _attend_tile(q, acc, m, l, keys, values, row, left, scale, EDGE: tl.constexpr, T: tl.constexpr):
    """One step of the online softmax: the keys from `row` on, of which at an EDGE only `left` count."""
    ROWS: tl.constexpr = T.rest if EDGE else T.n
    k = _tile(keys, row, left, ROWS, EDGE, T)
    s = tl.dot(q, k.T, input_precision=T.precision)                          # (T.m, ROWS)
    if EDGE:
        s = tl.where(tl.arange(0, ROWS)[None, :] < left, s, -float("inf"))
    scale *= LOG2E                                     # e^x is 2^(x log2(e))
    new = tl.maximum(m, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - new[:, None])
    shrink = tl.exp2(m - new)
    v = _tile(values, row, left, ROWS, EDGE, T)        # not beside k: loaded earlier, it makes sm_120 spill
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=T.precision)
    return acc, new, l * shrink + tl.sum(p, 1)


@triton.jit
def _entry(Plan, tile):
    """The four integers that a plan has for a tile."""
    ptr = Plan + tile * 4
    return tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2), tl.load(ptr + 3)


@triton.jit
def _forward_kernel(Q, K, V, K_tma, V_tma, Out, Lse, Plan, tokens, q_stride, k_stride, out_stride, scale,
                    T: tl.constexpr):
    """Attention of one tile of queries of one head to the `count` keys from `key` on; Lse (Hq, B N) gets the
    logsumexp of its rows. Grid: (tiles * group, Hkv)."""
    kv, head = tl.program_id(1), tl.program_id(1) * T.group + tl.program_id(0) % T.group
    row, left, key, count = _entry(Plan, tl.program_id(0) // T.group)
    keys = Matrix(K, kv * T.hd, k_stride, K_tma)
    values = Matrix(V, kv * T.hd, k_stride, V_tma)
    q = _tile(Matrix(Q, head * T.hd, q_stride), row, left, T.m, True, T)              # (T.m, hd)
    rows = tl.arange(0, T.m)
    acc, l = tl.zeros(q.shape, tl.float32), tl.zeros(rows.shape, tl.float32)
    m = tl.full(rows.shape, -float("inf"), tl.float32)
    whole = count // T.n * T.n                         # whole tiles of keys, then the rest in smaller ones
    for j in tl.range(0, whole, T.n):
        acc, m, l = _attend_tile(q, acc, m, l, keys, values, key + j, T.n, scale, False, T)
    for j in tl.range(whole, count, T.rest, num_stages=1):
        acc, m, l = _attend_tile(q, acc, m, l, keys, values, key + j, count - j, scale, True, T)
    _store(Matrix(Out, head * T.hd, out_stride), row, left, acc / l[:, None], T)
    tl.store(Lse + head.to(tl.int64) * tokens + row + rows, (m + tl.log2(l)) * LN2, rows < left)


# ----------------------------------------------------------------------------------------------------------
# 6  Attention, backward
# ----------------------------------------------------------------------------------------------------------
# With weights p = e^(s - lse), scores s = scale q k^T and the gradient do of the output:
#
#     dv = p^T do,    dp = do v^T,    ds = p (dp - delta),    dq = scale ds k,    dk = scale ds^T q
#
# where delta = sum_j p_j dp_j = do . o is one number per row. Nothing of size N x M is kept: p is computed
# again, tile by tile, from q, k and lse. There are two kernels. The first (dq) goes along the keys of a tile
# of queries, and stores delta; the second (dkv) along the queries of a tile of keys, in all heads of the
# group. Each sum is then written by one program alone, so there are no atomic additions and results repeat
# bit for bit. The price is that both compute p and dp: three products and four, 3.5 times the forward's two,
# where one kernel with atomic additions would need five.


@triton.jit
def _dq_tile(q, do, lse, delta, dq, keys, values, row, left, scale, EDGE: tl.constexpr, T: tl.constexpr):
    """Add to dq what a tile of keys gives."""
    ROWS: tl.constexpr = T.rest if EDGE else T.n
    k, v = _tile(keys, row, left, ROWS, EDGE, T), _tile(values, row, left, ROWS, EDGE, T)
    s = tl.dot(q, k.T, input_precision=T.precision) * (scale * LOG2E)                        # (T.m, ROWS)
    p = tl.exp2(s - (lse * LOG2E)[:, None])
    if EDGE:
        p = tl.where(tl.arange(0, ROWS)[None, :] < left, p, 0.0)
    ds = p * (tl.dot(do, v.T, input_precision=T.precision) - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=T.precision)


@triton.jit
def _dq_kernel(Q, K, V, K_tma, V_tma, Out, dOut, Lse, Delta, dQ, Plan, tokens, q_stride, k_stride, scale,
               T: tl.constexpr):
    """dq and delta of one tile of queries. Grid as in the forward."""
    kv, head = tl.program_id(1), tl.program_id(1) * T.group + tl.program_id(0) % T.group
    row, left, key, count = _entry(Plan, tl.program_id(0) // T.group)
    keys = Matrix(K, kv * T.hd, k_stride, K_tma)
    values = Matrix(V, kv * T.hd, k_stride, V_tma)
    q = _tile(Matrix(Q, head * T.hd, q_stride), row, left, T.m, True, T)           # these are (T.m, hd)
    do = _tile(Matrix(dOut, head * T.hd, q_stride), row, left, T.m, True, T)
    out = _tile(Matrix(Out, head * T.hd, q_stride), row, left, T.m, True, T)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    rows = tl.arange(0, T.m)
    offsets = head.to(tl.int64) * tokens + row + rows
    tl.store(Delta + offsets, delta, rows < left)
    lse = tl.load(Lse + offsets, rows < left, float("inf"))              # beyond the edge p is e^-inf, 0
    dq = tl.zeros(q.shape, tl.float32)
    whole = count // T.n * T.n
    for j in tl.range(0, whole, T.n):
        dq = _dq_tile(q, do, lse, delta, dq, keys, values, key + j, T.n, scale, False, T)
    for j in tl.range(whole, count, T.rest, num_stages=1):
        dq = _dq_tile(q, do, lse, delta, dq, keys, values, key + j, count - j, scale, True, T)
    _store(Matrix(dQ, head * T.hd, q_stride), row, left, dq * scale, T)


@triton.jit
def _dkv_tile(k, v, dk, dv, queries, douts, Lse, Delta, row, left, scale, EDGE: tl.constexpr,
              T: tl.constexpr):
    """Add to dk and dv what a tile of queries of one head gives. Scores are transposed: keys x queries."""
    ROWS: tl.constexpr = T.rest if EDGE else T.m
    q, do = _tile(queries, row, left, ROWS, EDGE, T), _tile(douts, row, left, ROWS, EDGE, T)
    rows = tl.arange(0, ROWS)
    lse = tl.load(Lse + row + rows, rows < left, float("inf"))               # beyond the edge p is e^-inf, 0
    delta = tl.load(Delta + row + rows, rows < left, 0.0)
    s = tl.dot(k, q.T, input_precision=T.precision) * (scale * LOG2E)                        # (T.n, ROWS)
    p = tl.exp2(s - (lse * LOG2E)[None, :])
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=T.precision)
    ds = p * (tl.dot(v, do.T, input_precision=T.precision) - delta[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision=T.precision), dv


@triton.jit
def _dkv_kernel(Q, K, V, dOut, Q_tma, dOut_tma, Lse, Delta, dK, dV, Plan, Runs, tokens, q_stride, k_stride,
                scale, T: tl.constexpr):
    """dk and dv of one tile of keys. Grid: (tiles, Hkv)."""
    kv = tl.program_id(1)
    row, left, first, number = _entry(Plan, tl.program_id(0))
    k = _tile(Matrix(K, kv * T.hd, k_stride), row, left, T.n, True, T)             # these are (T.n, hd)
    v = _tile(Matrix(V, kv * T.hd, k_stride), row, left, T.n, True, T)
    dk, dv = tl.zeros(k.shape, tl.float32), tl.zeros(k.shape, tl.float32)
    for i in range(number * T.group):                  # every run of queries, in every head of the group
        head, run = kv * T.group + i % T.group, Runs + (first + i // T.group) * 2
        query, count = tl.load(run), tl.load(run + 1)
        queries = Matrix(Q, head * T.hd, q_stride, Q_tma)
        douts = Matrix(dOut, head * T.hd, q_stride, dOut_tma)
        lse, delta = Lse + head.to(tl.int64) * tokens, Delta + head.to(tl.int64) * tokens
        whole = count // T.m * T.m
        for j in tl.range(0, whole, T.m):
            dk, dv = _dkv_tile(k, v, dk, dv, queries, douts, lse, delta, query + j, T.m, scale, False, T)
        for j in tl.range(whole, count, T.rest, num_stages=1):
            dk, dv = _dkv_tile(k, v, dk, dv, queries, douts, lse, delta, query + j, count - j, scale, True, T)
    _store(Matrix(dK, kv * T.hd, k_stride), row, left, dk * scale, T)
    _store(Matrix(dV, kv * T.hd, k_stride), row, left, dv, T)


def _launch_attention(name: str, q: Tensor, k: Tensor, v: Tensor, spans: tuple, tiles_of: Callable,
                      **others: Tensor | int) -> None:
    """Start "forward", "dq" or "dkv". dkv holds keys and goes along queries, the others the other way round.

    A float32 number is split into two bf16 parts, a product into three ("bf16x3"), which keeps 16 of 24 bits.
    Three TF32 products would keep more, but spill hundreds of registers at head width 128; one keeps 11.
    Other types are multiplied as they are ("ieee"); so is float32 in the interpreter, which has no bf16x3.
    """
    (B, N, Hq, hd), (M, Hkv) = q.shape, k.shape[1:3]
    tiles = tiles_of(name, arch_of(q.device), hd, q.dtype)
    precision = "bf16x3" if q.dtype == torch.float32 and not INTERPRETED else "ieee"
    rest = 16 if name == "dkv" else max(16, tiles.n // 2)
    tiles = tiles._replace(rest=rest, hd=hd, group=Hq // Hkv, precision=precision)
    args = dict(Q=q, K=k, V=v, tokens=B * N, q_stride=q.stride(1), k_stride=k.stride(1), scale=hd**-0.5,
                T=tiles, **others)
    if name == "dkv":
        args |= _plan_on(q.device, "keys", spans, B, N, M, tiles.n)
        programs, streamed, step = len(args["Plan"]), ("Q", "dOut"), tiles.m
    else:
        args |= _plan_on(q.device, "queries", spans, B, N, M, tiles.m)
        programs, streamed, step = len(args["Plan"]) * tiles.group, ("K", "V"), tiles.n
    for u in streamed:                                   # tensors whose tiles a program goes along
        matrix = args[u].flatten(2).flatten(0, 1)                            # tokens x (heads hd)
        args[f"{u}_tma"] = TensorDescriptor.from_tensor(matrix, [step, hd]) if tiles.tma else None
    kernel = {"forward": _forward_kernel, "dq": _dq_kernel, "dkv": _dkv_kernel}[name]
    launch(kernel, (programs, Hkv), tiles, **args)


class _Attention(torch.autograd.Function):
    """The kernels of sections 5 and 6 as one differentiable step, which writes its result to `out`."""

    @staticmethod
    def forward(ctx, q, k, v, out, spans, tiles_of):
        lse = q.new_empty(q.shape[2], *q.shape[:2], dtype=torch.float32)
        _launch_attention("forward", q, k, v, spans, tiles_of, Out=out, Lse=lse, out_stride=out.stride(1))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.spans, ctx.tiles_of = spans, tiles_of
        ctx.mark_dirty(out)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _):
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv, delta = (torch.empty_like(u) for u in (q, k, v, lse))
        given, rows = (q, k, v, ctx.spans, ctx.tiles_of), dict(dOut=_dense(dout), Lse=lse, Delta=delta)
        _launch_attention("dq", *given, Out=out, dQ=dq, **rows)
        _launch_attention("dkv", *given, dK=dk, dV=dv, **rows)
        return dq, dk, dv, None, None, None


@torch.compiler.disable
def flash_attention(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, out: Tensor | None = None,
                    tiles: Callable[..., Tiles] | None = None) -> tuple[Tensor, Tensor]:
    """Block-causal attention (see magi.block_attention) and the logsumexp of each row's scores.

    q (B, N, Hq, hd), k and v (B, M, Hkv, hd), in float32, bfloat16 or float16; spans (1 or B, n, 2) on the
    CPU; out: where to write, any view (B, N, Hq, hd); tiles: a function to use in place of `tiles_for`.
    Returns (B, N, Hq, hd) and float32 (Hq, B, N); gradients flow to q, k and v. Raises ValueError for a span
    that is empty or goes beyond the keys, for tensors that do not fit together, for another type or head
    width, and for a device that cannot run Triton.
    """
    require(q.ndim == k.ndim == 4,
            f"queries {tuple(q.shape)} and keys {tuple(k.shape)} must be (batch, tokens, heads, width)")
    (B, N, Hq, hd), Hkv = q.shape, k.shape[2]
    require(q.dtype in (torch.float32, torch.bfloat16, torch.float16),
            f"attention in {q.dtype}: use float32, bfloat16 or float16")
    _require_head_width(hd)
    require(_kind(k) == _kind(v), f"keys {_kind(k)} and values {_kind(v)} must be alike")
    require(k.shape[::3] == (B, hd) and Hkv > 0 and Hq % Hkv == 0 and k.dtype == q.dtype
            and k.device == q.device, f"keys and values {_kind(k)} do not go with queries {_kind(q)}")
    if out is not None:
        require(_kind(out) == _kind(q), f"out {_kind(out)} must be as queries {_kind(q)}")
    if q.numel() == 0:
        return magi.block_attention(q, k, v, spans, out), q.new_empty(Hq, B, N, dtype=torch.float32)
    span_tuples = tuple(tuple(map(tuple, row)) for row in spans.tolist())    # `_plan_on` remembers by them
    q, k, v = map(_dense, (q, k, v))
    # The kernel can write to `out` if a token's heads lie side by side in it and all tokens are equally far
    # apart. If not, or if autograd must see what is written into `out`, the result is copied there.
    direct = (out is not None and out.stride()[2:] == (hd, 1) and out.stride(1) >= Hq * hd
              and (B == 1 or out.stride(0) == N * out.stride(1))
              and not (torch.is_grad_enabled() and any(u.requires_grad for u in (q, k, v, out))))
    result, lse = _Attention.apply(q, k, v, out if direct else torch.empty_like(q), span_tuples,
                                   tiles or tiles_for)
    return (result if out is None or direct else out.copy_(result)), lse


def block_attention(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, out: Tensor | None = None,
                    tiles: Callable[..., Tiles] | None = None) -> Tensor:
    """magi.block_attention: chunk i of the queries reads the keys [start_i, end_i). See flash_attention."""
    return flash_attention(q, k, v, spans, out, tiles)[0]


def attention(q: Tensor, k: Tensor, v: Tensor, tiles: Callable[..., Tiles] | None = None) -> Tensor:
    """magi.attention: one chunk that reads all keys."""
    return flash_attention(q, k, v, torch.tensor([[[0, k.shape[1]]]]), tiles=tiles)[0]


TRITON_OPS = magi.Ops(name="triton", attention=attention, block_attention=block_attention,
                      norm_rotary=norm_rotary, gated_residual=gated_residual, swiglu=swiglu,
                      matmul_float32=magi.matmul_float32, fp8_matmul=fp8_matmul)

# ----------------------------------------------------------------------------------------------------------
# 7  Tile sizes
# ----------------------------------------------------------------------------------------------------------
# A tile that stays on chip is read once however many tiles stream past it, so tiles should be large; but they
# must fit into registers and into shared memory (227 KiB on sm_90 and sm_100, 99 KiB on sm_89 and sm_120,
# 64 KiB on gfx942, 160 KiB on gfx950). What does not fit into registers *spills*: it goes to memory and back.
# Of the sizes that spill nothing, by what the compiler says (--compile), these are the largest. None has been
# timed yet. (sm_89 is the RTX 4090, sm_90 the H100, sm_100 the B200, sm_120 the RTX 5090, gfx942 the MI300,
# gfx950 the MI350.)
#
#   forward  sm_90 and sm_100 multiply from shared memory (wgmma, tcgen05), so 128 x 128 leaves registers for
#            the scores. sm_89 and sm_120 multiply from registers: half the keys per step.
#   dq       holds two tiles, q and do, and needs k twice: at head width 128 half the keys of the forward on
#            sm_90 and sm_100, half the queries on sm_120.
#   dkv      holds four (k, v, dk, dv), two of them in float32. At head width 128 sm_90 spills if it loads
#            ahead with 128 keys, so it does not (1 stage). sm_100 keeps its sums outside the registers.
#   stages   are 3 with the copy engine if they fit: with 2 there is one buffer each for k and v, and no load
#            overlaps with arithmetic.
#   rest     (set at the launch) is half a tile in the forward and dq: with 16, the 118 keys that a chunk of
#            12,150 leaves after whole tiles of 128 would take 8 steps. Loads at an edge go through registers,
#            and in dkv larger ones spill, as full tiles would in the others.
#   float32  is split into bf16 parts, which doubles every operand: the tiles are small squares.
#   fp8      on sm_90 partial sums are added up in float32 (section 3), which takes a second set of
#            accumulators: 128 x 256 spills, 128 x 128 does not. sm_100 has memory of its own for sums, so 256
#            columns fit. With 99 KiB of shared memory, or 64, the inner steps are 64.
#
# Kernels that read each number once (section 2, and quantising) need only enough loads in flight; their tile
# sizes stand where they are launched.

# fmt: off
ATTENTION_TILES = {    # kernel and largest head width -> (m, n, warps, stages) for each architecture
    #              sm_89             sm_90             sm_100            sm_120            gfx942, gfx950
    "forward 64":  ((128,  64, 4, 3), (128, 128, 8, 3), (128, 128, 8, 3), (128,  64, 8, 3), (128,  64, 8, 2)),
    "forward 128": ((128,  64, 8, 3), (128, 128, 8, 3), (128, 128, 8, 3), (128,  64, 8, 3), (128,  64, 8, 2)),
    "dq 64":       ((128,  64, 8, 2), (128, 128, 8, 3), (128, 128, 8, 3), ( 64,  32, 4, 3), ( 64,  32, 4, 2)),
    "dq 128":      ((128,  64, 8, 2), (128,  64, 8, 3), (128,  64, 8, 3), ( 64,  64, 8, 2), ( 64,  32, 8, 2)),
    "dkv 64":      (( 32,  64, 8, 3), ( 64, 128, 8, 3), ( 64, 128, 8, 3), ( 32,  64, 4, 1), ( 32,  64, 4, 1)),
    "dkv 128":     (( 32,  64, 4, 3), ( 64, 128, 8, 1), ( 64,  64, 8, 3), ( 32,  32, 4, 3), ( 32,  64, 4, 1)),
}
# m, n, k, warps, stages, tma, in the same columns
FP8_TILES = (Tiles(128, 128, 64, 8, 4), Tiles(128, 128, 128, 8, 4, True), Tiles(128, 256, 128, 8, 4, True),
             Tiles(128, 128, 64, 8, 4, True), Tiles(128, 128, 64, 8, 2))
COLUMN = {89: 0, 90: 1, 100: 2, 120: 3, 942: 4, 950: 4}
# fmt: on


def tiles_for(kernel: str, arch: int, hd: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tiles:
    """The tiles of "forward", "dq", "dkv" or "fp8"; small ones for Triton's interpreter (arch 0)."""
    if arch == 0:
        return Tiles(16, 16, 16)
    if kernel == "fp8":
        return FP8_TILES[COLUMN[arch]]
    width, tma = max(64, hd), arch in (90, 100, 120)
    if dtype == torch.float32:
        side = 2048 // width
        warps = 8 if kernel == "dkv" and arch < 900 else 4       # dkv spills with 4, on gfx942 with 8
        return Tiles(side, side, warps=warps, stages=1, tma=tma)
    m, n, warps, stages = ATTENTION_TILES[f"{kernel} {width}"][COLUMN[arch]]
    return Tiles(m, n, 0, warps, stages, tma)


def get_ops(backend: str, device: torch.device | str) -> magi.Ops:
    """What magi.get_ops returns for "triton" and, on a GPU, for "auto": see kernel_choice.py, which checks
    every kernel on the card and, for "auto", times it."""
    import kernel_choice

    return kernel_choice.get_ops(backend, device)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))
    import bench_kernels

    sys.exit(bench_kernels.main())
