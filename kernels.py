"""Fast paths for magi.py in Triton: block-causal attention, fp8 matmul, fused elementwise steps.

magi.TORCH_OPS is the specification; TRITON_OPS here has the same names, signatures and results, and magi.py
runs on either (`magi.load(..., backend="triton")`, `sample.py --backend triton`). Nothing here is needed.

    operation          signature as in magi.py section 2                    what it saves
    attention          (q, k, v)                                            scores, N x M floats, never exist
    block_attention    (q, k, v, ranges, cached)                            a mask; a joined copy of the cache
    fp8_matmul         (x, weight, divide, scale)                           half the bytes, twice the rate
    norm_rotary        (x, norm, angles)                                    45 of 49 bytes per element (bf16)
    gated_residual     (x, gate, branch, norm)                              48 of 54 bytes per element (bf16)

    python kernels.py               on a GPU: check against magi.py, then time, beside PyTorch's own kernels
    python kernels.py --compile     anywhere: compile for four architectures; registers, memory, instructions

Symbols as in magi.py: B batch, N queries, M keys, Hq Hkv query and key/value heads, hd head width, n chunks.
In this file a *row* is one token of one head, and a *tile* a block of rows that one program holds on chip.

Contents
    1  Tiles                  how big, for which architecture, and why
    2  Plans and launches     which program does what; one record for running and for compiling
    3  Small parts            loads, products, casts shared by the kernels
    4  Attention, forward     the online softmax; why block-causal needs no mask
    5  Attention, backward    scores are computed again, never stored
    6  Fp8 matmul             scales, and what they lose
    7  Elementwise            where the bytes go
    8  The operations         checks, autograd, TRITON_OPS
    9  Compiling ahead        --compile
    10 Timing                 on a GPU

Left out on purpose: dropout, masks of any kind, more than two sources of keys, AMD. To read first:
`_attend_tile`, ten lines that everything else surrounds. References: FlashAttention 1 and 2 (arXiv
2205.14135, 2307.08691); SmoothQuant (2211.10438); Triton's tutorials 3, 6 and 9.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

import magi

LOG2E = tl.constexpr(math.log2(math.e))        # the hardware has 2^x, not e^x
LN2 = tl.constexpr(math.log(2))
REST = tl.constexpr(16)                        # less than a tile is left at the end: it goes in tiles of this

# ----------------------------------------------------------------------------------------------------------
# 1  Tiles
# ----------------------------------------------------------------------------------------------------------
# A tile that stays on chip is read once however many tiles stream past it, so tiles should be large; but they
# must fit into registers (255 for each of the 32 threads of a warp) and shared memory (227 KiB on sm_90 and
# sm_100, 99 KiB on sm_89 and sm_120). The lists below were chosen by what the compiler said (--compile), for
# nothing here has been timed yet: of those that spill no register, the largest.
#
#   forward  sm_90 and sm_100 multiply from shared memory (wgmma, tcgen05), so 128 x 128 leaves registers for
#            the scores; a step has 66 exponentials to 16 matrix instructions of a warp group. sm_89 and
#            sm_120 multiply from registers: half the keys per step, and with 99 KiB three stages still fit.
#   dq       holds two tiles, q and do, and needs k twice: half the keys of the forward.
#   dkv      holds four (k, v, dk, dv), two of them in float32. At head width 128 sm_90 spills if it
#            prefetches (2 stages) with 128 keys. 64 x 128 without it takes some 2,000 cycles of matrix
#            products a step and bares some 1,000 of latency; 32 x 64 with it is held up by its 316 other
#            instructions, for a quarter of the work. sm_100 keeps its sums outside the registers, and
#            prefetches with 64 x 64.
#   float32  is split into bf16 parts (`_precision`), which doubles every operand: small tiles.
#   fp8      every 128 terms a partial sum moves on sm_90 (section 6), which takes a second set of
#            accumulators: 128 x 256 spills (50 times), 128 x 128 does not. sm_100 has memory of its own for
#            sums, so 256 columns fit. 99 KiB: inner steps of 64.
#   What streams past once (section 7) needs only enough bytes in flight.
#
# (kernel, head width at most): m, n, [k,] warps, stages; TMA is used from sm_90 on. What is left of a range,
# less than a tile, goes in narrow tiles of REST rows. In a full-width tile, those loads, which go through
# registers, were what spilled.


class Tiles(NamedTuple):
    """How one kernel is cut up: what a program holds on chip, in how many warps, loading how far ahead."""

    m: int                        # rows of queries; fp8: rows of the output
    n: int                        # rows of keys; fp8: columns of the output
    k: int = 0                    # fp8 only: how much of the inner axis per step
    warps: int = 4
    stages: int = 2               # tiles in flight: loads run ahead of the arithmetic by this many
    tma: bool = False             # let the copy engine fetch tiles by descriptor (sm_90 on)


# fmt: off
ATTENTION_TILES = {               # sm_89             sm_90             sm_100            sm_120
    ("forward", 64, 2):        ((128,  64, 4, 3), (128, 128, 8, 3), (128, 128, 8, 3), (128,  64, 8, 3)),
    ("forward", 128, 2):       ((128,  64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 2), (128,  64, 8, 2)),
    ("forward", 256, 2):       (( 32,  32, 4, 1), (128,  64, 8, 2), ( 64,  64, 8, 2), ( 32,  32, 4, 1)),
    ("dq", 64, 2):             ((128,  64, 8, 2), (128, 128, 8, 2), (128, 128, 8, 2), ( 64,  32, 4, 2)),
    ("dq", 128, 2):            ((128,  64, 8, 2), (128,  64, 8, 2), (128,  64, 8, 2), ( 64,  64, 8, 2)),
    ("dq", 256, 2):            (( 32,  32, 4, 1), ( 64,  32, 8, 1), ( 64,  32, 8, 1), ( 32,  32, 4, 1)),
    ("dkv", 64, 2):            (( 32,  64, 8, 2), ( 64, 128, 8, 3), ( 64, 128, 8, 3), ( 32,  64, 4, 1)),
    ("dkv", 128, 2):           (( 32,  64, 4, 2), ( 64, 128, 8, 1), ( 64,  64, 8, 2), ( 32,  32, 4, 2)),
    ("dkv", 256, 2):           (( 32,  32, 8, 1), ( 32,  32, 8, 1), ( 32,  32, 8, 1), ( 32,  32, 8, 1)),
    ("forward", 64, 4):        (( 64,  32, 4, 2), ( 64,  32, 4, 2), ( 64,  32, 4, 2), ( 64,  32, 4, 2)),
    ("forward", 128, 4):       (( 32,  16, 4, 1), ( 64,  16, 4, 2), ( 32,  16, 4, 1), ( 32,  16, 4, 1)),
    ("forward", 256, 4):       (( 16,  16, 8, 1), ( 16,  16, 8, 1), ( 16,  16, 8, 1), ( 16,  16, 8, 1)),
    ("dq", 64, 4):             (( 32,  32, 4, 1), ( 32,  32, 4, 1), ( 32,  32, 4, 1), ( 32,  32, 4, 1)),
    ("dq", 128, 4):            (( 16,  16, 8, 1), ( 16,  16, 4, 1), ( 16,  16, 4, 1), ( 16,  16, 4, 1)),
    ("dq", 256, 4):            (( 16,  16, 8, 1), ( 16,  16, 8, 1), ( 16,  16, 8, 1), ( 16,  16, 8, 1)),
    ("dkv", 64, 4):            (( 32,  32, 4, 1), ( 32,  32, 8, 1), ( 32,  32, 8, 1), ( 32,  32, 8, 1)),
    ("dkv", 128, 4):           (( 16,  16, 4, 1), ( 16,  16, 4, 1), ( 16,  16, 4, 1), ( 16,  16, 4, 1)),
    ("dkv", 256, 4):           (( 16,  16, 8, 1), ( 16,  16, 8, 1), ( 16,  16, 8, 1), ( 16,  16, 8, 1)),
}
FP8_TILES = {89: Tiles(128, 128, 64, 8, 3), 90: Tiles(128, 128, 128, 8, 4, True),
             100: Tiles(128, 256, 128, 8, 4, True), 120: Tiles(128, 128, 64, 8, 3, True)}
STREAM_TILES = {"quantise": Tiles(4, 1024), "gated_residual": Tiles(1, 0, warps=8),
                "norm_rotary": Tiles(8, 0)}
# fmt: on


def tiles_for(kernel: str, arch: int, hd: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tiles:
    """The shipped tiles of a kernel; small ones for Triton's interpreter (arch 0)."""
    if kernel in STREAM_TILES:
        return STREAM_TILES[kernel]
    if arch == 0:
        return Tiles(16, 16, 16)
    if kernel == "fp8":
        return FP8_TILES[arch]
    width = max(64, triton.next_power_of_2(hd))
    m, n, warps, stages = ATTENTION_TILES[kernel, width, dtype.itemsize][(89, 90, 100, 120).index(arch)]
    return Tiles(m, n, 0, warps, stages, arch >= 90 and hd == triton.next_power_of_2(hd))


# ----------------------------------------------------------------------------------------------------------
# 2  Plans and launches
# ----------------------------------------------------------------------------------------------------------
# Attention ranges are known on the CPU before a forward starts, and all layers share them. So what each
# program shall do is written down once, as a list of integers, instead of being worked out on the GPU from a
# mask. Programs start in the order of the list: the longest work comes first, so none trails at the end.


def _spans(ranges: tuple, B: int, n_queries: int, keys: int) -> list[tuple[int, int, int, int, int]]:
    """(batch, first query, end, first key, end) of every chunk, checked. Chunks are those of Tensor.chunk."""
    n = len(ranges[0])
    size = -(-n_queries // n)
    magi._require(len(ranges) in (1, B) and -(-n_queries // size) == n,
                  f"{len(ranges)} x {n} ranges do not fit {B} x {n_queries} queries")
    out = []
    for b in range(B):
        for i, (start, end) in enumerate(ranges[b % len(ranges)]):
            magi._require(0 <= start < end <= keys, f"range [{start}, {end}) of chunk {i} is empty or leaves "
                          f"the {keys} keys: every chunk must see at least one")
            out.append((b, i * size, min(n_queries, (i + 1) * size), start, end))
    return out


def query_plan(ranges: tuple, B: int, N: int, M: int, cached: int, m: int, strides: tuple[int, int]) -> list:
    """One entry per tile of m queries: (row, rows, first cached key, how many, first new key, how many).

    Keys 0 .. cached-1 are in the cache, the M others are new: a range is at most one run of each, which is
    all it takes to read both where they are. `strides`: rows from one batch entry to the next, of each.
    """
    plan = []
    for b, q0, q1, start, end in _spans(ranges, B, N, cached + M):
        old = max(0, min(end, cached) - start), max(start, cached) - cached
        for row in range(q0, q1, m):
            plan.append((b * N + row, min(m, q1 - row), b * strides[0] + start, old[0],
                         b * strides[1] + old[1], end - start - old[0]))
    return sorted(plan, key=lambda entry: -entry[3] - entry[5])


def key_plan(ranges: tuple, B: int, N: int, M: int, cached: int, n: int, first: int, count: int) -> tuple:
    """For the keys first .. first+count of the axis: tiles (row, rows, start, number) and runs (row, rows).

    The key axis is cut wherever a range starts or ends. So a tile lies wholly inside or outside any range,
    and its queries are a few runs, runs[start : start + number]; a tile that nobody reads has none.
    """
    spans, tiles, runs = _spans(ranges, B, N, cached + M), [], []
    for b in range(B):
        mine = [(q0, q1, max(0, s - first), min(count, e - first)) for a, q0, q1, s, e in spans if a == b]
        cuts = sorted({0, count, *(u for *_, s, e in mine if s < e for u in (s, e))})
        for low, high in zip(cuts, cuts[1:], strict=False):
            readers = [(b * N + q0, q1 - q0) for q0, q1, s, e in mine if s <= low and high <= e]
            for row in range(low, high, n):
                tiles.append((b * count + row, min(n, high - row), len(runs), len(readers)))
            runs += readers
    work = lambda tile: sum(rows for _, rows in runs[tile[2] : tile[2] + tile[3]])
    return sorted(tiles, key=work, reverse=True), runs or [(0, 0)]


@lru_cache(256)
def _on_device(make: Callable, args: tuple, device: torch.device) -> Tensor | tuple[Tensor, Tensor]:
    plan = make(*args)
    move = lambda table: torch.tensor(table, dtype=torch.int32).to(device)
    return tuple(map(move, plan)) if isinstance(plan, tuple) else move(plan)


class Launch(NamedTuple):
    """All there is to say about one kernel call: section 8 runs it, section 9 compiles it for other GPUs."""

    kernel: Callable
    grid: tuple[int, ...]
    tiles: Tiles
    args: dict[str, Any]

    def run(self) -> None:
        device = next(u.device for u in self.args.values() if isinstance(u, Tensor))
        magi._require(device.type == "cuda" or INTERPRETED.value,
                      f"Triton kernels need a GPU, the tensors are on {device}: use the backend 'torch'")
        with torch.cuda.device(device) if device.type == "cuda" else torch.device("cpu"):
            self.kernel[self.grid](**self.args, num_warps=self.tiles.warps, num_stages=self.tiles.stages)


def _rows(u: Tensor, block: int, width: int, tma: bool) -> Tensor | TensorDescriptor:
    """(B, N, heads, hd) as a matrix of tokens x (heads hd), for `_tile`: a descriptor of it, or itself."""
    if not tma:
        return u
    batches, tokens = (u.shape[0] - 1) * u.stride(0) // u.stride(1), u.shape[1]
    shape = [batches + tokens, (u.shape[2] - 1) * u.stride(2) + u.shape[3]]
    return TensorDescriptor(u, shape, [u.stride(1), 1], [block, width])


# ----------------------------------------------------------------------------------------------------------
# 3  Small parts
# ----------------------------------------------------------------------------------------------------------


@triton.jit
def _round_bits(x, DROP: tl.constexpr):
    """float32 without its last DROP bits, to nearest even: adding half a unit, less one if even, carries."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + ((1 << (DROP - 1)) - 1) + ((bits >> DROP) & 1)) & (-1 << DROP)
    return tl.where(tl.abs(x) < float("inf"), bits.to(tl.float32, bitcast=True), x)


@triton.jit
def _cast(x, TO: tl.constexpr):
    """float32 -> TO, to nearest even: one instruction on a GPU. The interpreter of Triton 3.7 cuts bits off
    where it should round, so there, and only there, what it cuts off is made zero first."""
    if INTERPRETED:
        if TO == tl.bfloat16:
            x = _round_bits(x, 16)
        elif TO == tl.float8e4nv:                                            # below 2^-6 in steps of 2^-9:
            x = tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, _round_bits(x, 20))  # 1.5 * 2^(23-9)
    return x.to(TO)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """a b + acc in float32. Triton 3.7's interpreter multiplies bf16 by its bit patterns: there, and only
    there, the operands are widened first."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _tile(X, X_tma, row, col, stride, left, R: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr,
          EDGE: tl.constexpr, TMA: tl.constexpr):
    """Rows row .. row+R and columns col .. col+C of a matrix, zeros beyond WIDTH columns.

    A tile at the EDGE has only `left` rows; the last is then loaded again for those beyond, which belong to
    others and might hold nan: a weight of 0 would not undo that.
    """
    if TMA and not EDGE:
        x = X_tma.load([row, col])
    else:
        rows, cols = tl.arange(0, R)[:, None], tl.arange(0, C)[None, :]
        if EDGE:
            rows = tl.minimum(rows, left - 1)
        at = X + row.to(tl.int64) * stride + col + (rows * stride + cols)
        x = tl.load(at, (cols < WIDTH) & (rows >= 0), 0.0) if WIDTH < C else tl.load(at)
    return x


@triton.jit
def _store(X, row, col, stride, left, x, R: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr):
    """Write the first `left` rows and WIDTH columns of a tile."""
    rows, cols = tl.arange(0, R)[:, None], tl.arange(0, C)[None, :]
    at = X + row.to(tl.int64) * stride + col + (rows * stride + cols)
    tl.store(at, _cast(x, X.dtype.element_ty), (rows < left) & (cols < WIDTH))


# Was TRITON_INTERPRET set when Triton was imported?
INTERPRETED = tl.constexpr(not isinstance(_tile, triton.JITFunction))

# ----------------------------------------------------------------------------------------------------------
# 4  Attention, forward
# ----------------------------------------------------------------------------------------------------------
# For one query, attention is a weighted mean of the values: o = sum_j e^(s_j) v_j / sum_j e^(s_j). A mean
# can be taken in passing. Keep the largest score so far m, the sum l of e^(s - m), the weighted values acc,
# and when a tile of keys brings a larger score, shrink l and acc to the new scale:
#
#     m' = max(m, max s),    l' = l e^(m - m') + sum e^(s - m'),    acc' = acc e^(m - m') + e^(s - m') v
#
# That is the online softmax. Nothing of size N x M is ever in memory: for one chunk of the 4.5B at 720x720
# (12,150 queries, 24 heads) against five chunks the scores would be 35 GB in bf16, written and read twice;
# what is moved instead is q, k, v and o, 0.4 GB. The forward also keeps log sum e^s of each row, one float,
# which is all that the backward needs to compute any score's weight again.
#
# Block-causal needs no mask. A chunk reads *all* keys of one contiguous range and no others, so its rule is
# a start and an end. A loop from start to end touches only keys that count; the one tile at the end that
# sticks out is masked, the hundreds before it are not. A mask tensor would cost a bit per pair to read and,
# worse, the arithmetic of everything it forbids.
#
# Grouped queries: the Hq/Hkv heads that read the same keys are neighbours in the grid, so what one fetches
# from memory the others find in the L2 cache. In the same way all tiles of a kv head run before the next
# head's begin: keys and values of five chunks are 31 MB for one head, 249 MB for all, and the H100's L2 has
# 50 MB.


@triton.jit
def _attend_tile(q, acc, m, l, keys, row, col, stride, left, scale, N: tl.constexpr, C: tl.constexpr,
                 HD: tl.constexpr, EDGE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr):
    """One step of the online softmax: N keys, of which in a tile at the EDGE only `left` count."""
    K, V, K_tma, V_tma = keys
    k = _tile(K, K_tma, row, col, stride, left, N, C, HD, EDGE, TMA)
    s = _dot(q, k.T, None, PRECISION)                                        # (m, N)
    if EDGE:
        s = tl.where(tl.arange(0, N)[None, :] < left, s, -float("inf"))
    new = tl.maximum(m, tl.max(s, 1) * scale)          # scale holds log2(e) too: e^x is 2^(x log2(e))
    p = tl.exp2(s * scale - new[:, None])
    shrink = tl.exp2(m - new)
    v = _tile(V, V_tma, row, col, stride, left, N, C, HD, EDGE, TMA)
    acc = _dot(_cast(p, v.dtype), v, acc * shrink[:, None], PRECISION)
    return acc, new, l * shrink + tl.sum(p, 1)


@triton.jit
def _attend(q, acc, m, l, keys, row, col, stride, count, scale, N: tl.constexpr, C: tl.constexpr,
            HD: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr):
    """All keys of one source, `count` from `row` on: whole tiles, then the rest."""
    whole = count // N * N
    for j in tl.range(0, whole, N):
        acc, m, l = _attend_tile(q, acc, m, l, keys, row + j, col, stride, N, scale, N, C, HD, False, TMA,
                                 PRECISION)
    for j in tl.range(whole, count, REST, num_stages=1):
        acc, m, l = _attend_tile(q, acc, m, l, keys, row + j, col, stride, count - j, scale, REST, C, HD,
                                 True, TMA, PRECISION)
    return acc, m, l


@triton.jit
def _forward_kernel(Q, K, V, K_old, V_old, K_tma, V_tma, K_old_tma, V_old_tma, Out, Lse, Plan, tokens,
                    q_stride, k_stride, k_head, old_stride, old_head, scale, GROUP: tl.constexpr,
                    HD: tl.constexpr, C: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TMA: tl.constexpr,
                    CACHE: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of queries of one head. Grid: (tiles * GROUP, Hkv)."""
    plan, kv = Plan + tl.program_id(0) // GROUP * 6, tl.program_id(1)
    head = kv * GROUP + tl.program_id(0) % GROUP
    row, left = tl.load(plan), tl.load(plan + 1)
    q = _tile(Q, Q, row, head * HD, q_stride, left, M, C, HD, True, False)   # (m, C)
    acc = tl.zeros((M, C), tl.float32)
    m = tl.full((M,), -float("inf"), tl.float32)
    l = tl.zeros((M,), tl.float32)
    if CACHE:
        acc, m, l = _attend(q, acc, m, l, (K_old, V_old, K_old_tma, V_old_tma), tl.load(plan + 2),
                            kv * old_head, old_stride, tl.load(plan + 3), scale * LOG2E, N, C, HD, TMA,
                            PRECISION)
    acc, m, l = _attend(q, acc, m, l, (K, V, K_tma, V_tma), tl.load(plan + 4), kv * k_head, k_stride,
                        tl.load(plan + 5), scale * LOG2E, N, C, HD, TMA, PRECISION)
    _store(Out, row, head * HD, q_stride, left, acc / l[:, None], M, C, HD)
    rows = tl.arange(0, M)
    tl.store(Lse + head.to(tl.int64) * tokens + row + rows, (m + tl.log2(l)) * LN2, rows < left)


def _keys(q: Tensor, k: Tensor, v: Tensor, cached: tuple | None, ranges: tuple, tiles: Tiles) -> dict:
    """Arguments of the forward and the dq kernel alike. Without a cache, the new keys stand in for it."""
    k_old, v_old = cached or (k, v)
    old, width = k_old.shape[1] if cached else 0, triton.next_power_of_2(q.shape[-1])
    batch_rows = lambda u: u.stride(0) // u.stride(1)
    job = ranges, *q.shape[:2], k.shape[1], old, tiles.m, (batch_rows(k_old), batch_rows(k))
    named = dict(K=k, V=v, K_old=k_old, V_old=v_old)
    return dict(
        Q=q, **named, **{f"{name}_tma": _rows(u, tiles.n, width, tiles.tma) for name, u in named.items()},
        Plan=_on_device(query_plan, job, q.device), tokens=q.shape[0] * q.shape[1], q_stride=q.stride(1),
        k_stride=k.stride(1), k_head=k.stride(2), old_stride=k_old.stride(1), old_head=k_old.stride(2),
        scale=q.shape[-1] ** -0.5, GROUP=q.shape[2] // k.shape[2], HD=q.shape[-1], C=width, M=tiles.m,
        N=tiles.n, TMA=tiles.tma, CACHE=old > 0, PRECISION=_precision(q),
    )  # fmt: skip


def _precision(q: Tensor) -> str:
    """How float32 is multiplied: as the sum of two bf16 parts, in three products, which keeps 16 of 24 bits.
    Three TF32 products keep more, but spill hundreds of registers at head width 128; one keeps 10. Other
    types take no notice."""
    return "bf16x3" if q.dtype == torch.float32 else "tf32"


def forward_launch(q: Tensor, k: Tensor, v: Tensor, cached: tuple | None, ranges: tuple, out: Tensor,
                   lse: Tensor, tiles: Tiles) -> Launch:
    args = _keys(q, k, v, cached, ranges, tiles) | dict(Out=out, Lse=lse)
    return Launch(_forward_kernel, (len(args["Plan"]) * args["GROUP"], k.shape[2]), tiles, args)


# ----------------------------------------------------------------------------------------------------------
# 5  Attention, backward
# ----------------------------------------------------------------------------------------------------------
# With weights p = e^(s - lse), scores s = scale q k^T and the gradient do of the output:
#
#     dv = p^T do,    dp = do v^T,    ds = p (dp - delta),    dq = scale ds k,    dk = scale ds^T q
#
# where delta = sum_j p_j dp_j = do . o is one number per row. p is computed again tile by tile from q, k
# and lse: 2.5 times the arithmetic of the forward, but N x M floats less to store. Two kernels, each the
# only writer of what it sums, so there are no atomic additions and results repeat bit for bit. The first
# walks along the keys of a tile of queries (and leaves delta behind), the second along the queries of a
# tile of keys, over all heads of the group.


@triton.jit
def _dq_tile(q, do, dq, lse, delta, keys, row, col, stride, left, scale, N: tl.constexpr, C: tl.constexpr,
             HD: tl.constexpr, EDGE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr):
    K, V, K_tma, V_tma = keys
    k = _tile(K, K_tma, row, col, stride, left, N, C, HD, EDGE, TMA)
    v = _tile(V, V_tma, row, col, stride, left, N, C, HD, EDGE, TMA)
    p = tl.exp2(_dot(q, k.T, None, PRECISION) * scale - lse[:, None])        # (m, N)
    if EDGE:
        p = tl.where(tl.arange(0, N)[None, :] < left, p, 0.0)
    ds = p * (_dot(do, v.T, None, PRECISION) - delta[:, None])
    return _dot(_cast(ds, k.dtype), k, dq, PRECISION)


@triton.jit
def _dq(q, do, dq, lse, delta, keys, row, col, stride, count, scale, N: tl.constexpr, C: tl.constexpr,
        HD: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr):
    whole = count // N * N
    for j in tl.range(0, whole, N):
        dq = _dq_tile(q, do, dq, lse, delta, keys, row + j, col, stride, N, scale, N, C, HD, False, TMA,
                      PRECISION)
    for j in tl.range(whole, count, REST, num_stages=1):
        dq = _dq_tile(q, do, dq, lse, delta, keys, row + j, col, stride, count - j, scale, REST, C, HD, True,
                      TMA, PRECISION)
    return dq


@triton.jit
def _dq_kernel(Q, K, V, K_old, V_old, K_tma, V_tma, K_old_tma, V_old_tma, Out, dOut, Lse, Delta, dQ, Plan,
               tokens, q_stride, k_stride, k_head, old_stride, old_head, scale, GROUP: tl.constexpr,
               HD: tl.constexpr, C: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TMA: tl.constexpr,
               CACHE: tl.constexpr, PRECISION: tl.constexpr):
    """dq and delta of one tile of queries. Grid and plan as in the forward."""
    plan, kv = Plan + tl.program_id(0) // GROUP * 6, tl.program_id(1)
    head = kv * GROUP + tl.program_id(0) % GROUP
    row, left = tl.load(plan), tl.load(plan + 1)
    q = _tile(Q, Q, row, head * HD, q_stride, left, M, C, HD, True, False)
    do = _tile(dOut, dOut, row, head * HD, q_stride, left, M, C, HD, True, False)
    out = _tile(Out, Out, row, head * HD, q_stride, left, M, C, HD, True, False)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    rows = tl.arange(0, M)
    at = head.to(tl.int64) * tokens + row + rows
    tl.store(Delta + at, delta, rows < left)
    lse = tl.load(Lse + at, rows < left, 0.0) * LOG2E
    dq = tl.zeros((M, C), tl.float32)
    if CACHE:
        dq = _dq(q, do, dq, lse, delta, (K_old, V_old, K_old_tma, V_old_tma), tl.load(plan + 2),
                 kv * old_head, old_stride, tl.load(plan + 3), scale * LOG2E, N, C, HD, TMA, PRECISION)
    dq = _dq(q, do, dq, lse, delta, (K, V, K_tma, V_tma), tl.load(plan + 4), kv * k_head, k_stride,
             tl.load(plan + 5), scale * LOG2E, N, C, HD, TMA, PRECISION)
    _store(dQ, row, head * HD, q_stride, left, dq * scale, M, C, HD)


@triton.jit
def _dkv_tile(k, v, dk, dv, queries, lse_at, delta_at, row, col, stride, left, scale, M: tl.constexpr,
              C: tl.constexpr, HD: tl.constexpr, EDGE: tl.constexpr, TMA: tl.constexpr,
              PRECISION: tl.constexpr):
    """Add what M queries of one head give to dk and dv. All scores are held transposed: keys x queries."""
    Q, dOut, Q_tma, dOut_tma = queries
    rows = tl.arange(0, M)
    q = _tile(Q, Q_tma, row, col, stride, left, M, C, HD, EDGE, TMA)
    do = _tile(dOut, dOut_tma, row, col, stride, left, M, C, HD, EDGE, TMA)
    lse = tl.load(lse_at + row + rows, rows < left, float("inf"))            # beyond the edge: e^-inf = 0
    delta = tl.load(delta_at + row + rows, rows < left, 0.0)
    p = tl.exp2(_dot(k, q.T, None, PRECISION) * scale - (lse * LOG2E)[None, :])                    # (n, M)
    dv = _dot(_cast(p, do.dtype), do, dv, PRECISION)
    ds = p * (_dot(v, do.T, None, PRECISION) - delta[None, :])
    return _dot(_cast(ds, q.dtype), q, dk, PRECISION), dv


@triton.jit
def _dkv_kernel(Q, K, V, dOut, Q_tma, dOut_tma, Lse, Delta, dK, dV, Plan, Runs, tokens, q_stride, k_stride,
                scale, GROUP: tl.constexpr, HD: tl.constexpr, C: tl.constexpr, M: tl.constexpr,
                N: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr):
    """dk and dv of one tile of N keys. Grid: (tiles, Hkv). Plan and Runs: see `key_plan`."""
    plan, kv = Plan + tl.program_id(0) * 4, tl.program_id(1)
    row, left = tl.load(plan), tl.load(plan + 1)
    runs, number = Runs + tl.load(plan + 2) * 2, tl.load(plan + 3)
    k = _tile(K, K, row, kv * HD, k_stride, left, N, C, HD, True, False)
    v = _tile(V, V, row, kv * HD, k_stride, left, N, C, HD, True, False)
    dk, dv = tl.zeros((N, C), tl.float32), tl.zeros((N, C), tl.float32)
    queries = (Q, dOut, Q_tma, dOut_tma)
    for i in range(number * GROUP):
        head = kv * GROUP + i % GROUP
        first, count = tl.load(runs + i // GROUP * 2), tl.load(runs + i // GROUP * 2 + 1)
        lse_at, delta_at = Lse + head.to(tl.int64) * tokens, Delta + head.to(tl.int64) * tokens
        whole = count // M * M
        for j in tl.range(0, whole, M):
            dk, dv = _dkv_tile(k, v, dk, dv, queries, lse_at, delta_at, first + j, head * HD, q_stride, M,
                               scale * LOG2E, M, C, HD, False, TMA, PRECISION)
        for j in tl.range(whole, count, REST, num_stages=1):
            dk, dv = _dkv_tile(k, v, dk, dv, queries, lse_at, delta_at, first + j, head * HD, q_stride,
                               count - j, scale * LOG2E, REST, C, HD, True, TMA, PRECISION)
    _store(dK, row, kv * HD, k_stride, left, dk * scale, N, C, HD)
    _store(dV, row, kv * HD, k_stride, left, dv, N, C, HD)


def dq_launch(q: Tensor, k: Tensor, v: Tensor, cached: tuple | None, ranges: tuple, out: Tensor, dout: Tensor,
              lse: Tensor, delta: Tensor, dq: Tensor, tiles: Tiles) -> Launch:
    args = _keys(q, k, v, cached, ranges, tiles) | dict(Out=out, dOut=dout, Lse=lse, Delta=delta, dQ=dq)
    return Launch(_dq_kernel, (len(args["Plan"]) * args["GROUP"], k.shape[2]), tiles, args)


def dkv_launch(q: Tensor, k: Tensor, v: Tensor, first: int, old: int, new: int, ranges: tuple, dout: Tensor,
               lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor, tiles: Tiles) -> Launch:
    """For one source: its keys begin at `first` on an axis of `old` cached and `new` keys."""
    width = triton.next_power_of_2(q.shape[-1])
    job = ranges, *q.shape[:2], new, old, tiles.n, first, k.shape[1]
    plan, runs = _on_device(key_plan, job, q.device)
    tile = lambda u: _rows(u, tiles.m, width, tiles.tma)
    args = dict(Q=q, K=k, V=v, dOut=dout, Q_tma=tile(q), dOut_tma=tile(dout), Lse=lse, Delta=delta, dK=dk,
                dV=dv, Plan=plan, Runs=runs, tokens=q.shape[0] * q.shape[1], q_stride=q.stride(1),
                k_stride=k.stride(1), scale=q.shape[-1] ** -0.5, GROUP=q.shape[2] // k.shape[2],
                HD=q.shape[-1], C=width, M=tiles.m, N=tiles.n, TMA=tiles.tma, PRECISION=_precision(q))
    return Launch(_dkv_kernel, (len(plan), k.shape[2]), tiles, args)


# ----------------------------------------------------------------------------------------------------------
# 6  Fp8 matmul
# ----------------------------------------------------------------------------------------------------------
# e4m3 has 4 bits of exponent and 3 of mantissa: eight steps per factor of two, from 2^-9 to 448. Tensors are
# brought into that range by scales: x = input_scale * x8, w = weight_scale * w8, so x w^T = (x8 w8^T) times
# one number, applied to the float32 sum at the end. What is lost is, first, mantissa: a relative error of up
# to 1/16 per number, 2.6 % rms, which a sum over thousands of terms averages out. Second, what is smaller
# than 2^-10 becomes zero, and that is worse: one outlier sets the scale for all, and a channel 500,000 times
# smaller is gone. Hence the smoothing scales of Wo and fc2, whose inputs have such channels: x_j / s_j and
# w_j * s_j have the same product, and s_j is chosen to leave both moderate (`convert_weights.py quantize`).
#
# The rounding is that of magi.fp8_matmul exactly: float32 division, clamp, to bf16, to e4m3, so both paths
# multiply the same numbers. On the H100 the tensor cores add fp8 products with about 14 bits; every 128
# terms (IMPRECISE) their sum is therefore moved to float32 registers, which is what makes "float32
# accumulation" true.


@triton.jit
def _quantise_kernel(X, Divide, X8, rows, width, M: tl.constexpr, N: tl.constexpr):
    """x / divide in e4m3, in one pass: 2 + 1 bytes per element where PyTorch's five passes move 31."""
    row = tl.program_id(0) * M + tl.arange(0, M)[:, None]
    col = tl.program_id(1) * N + tl.arange(0, N)[None, :]
    at, mask = row.to(tl.int64) * width + col, (row < rows) & (col < width)
    x = tl.load(X + at, mask, 0.0).to(tl.float32)
    x = tl.div_rn(x, tl.load(Divide + col, col < width, 1.0))                # `/` would be off by an ulp
    x = tl.clamp(x, -448.0, 448.0, tl.PropagateNan.ALL)
    tl.store(X8 + at, _cast(_cast(x, tl.bfloat16).to(tl.float32), tl.float8e4nv), mask)


@triton.jit
def _fp8_kernel(X8, W8, Scale, Out, rows, cols, width, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
                BAND: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr, IMPRECISE: tl.constexpr):
    """One tile (M, N) of (x8 w8^T) * scale. Both operands are stored along the inner axis, as wgmma wants."""
    # Programs that run together should share operands in the L2 cache: go down in bands of BAND tiles.
    pid, down, across = tl.program_id(0), tl.cdiv(rows, M), tl.cdiv(cols, N)
    band = pid // (BAND * across) * BAND
    high = tl.minimum(down - band, BAND)
    row, col = (band + pid % (BAND * across) % high) * M, pid % (BAND * across) // high * N
    acc = tl.zeros((M, N), tl.float32)
    for k in tl.range(0, width, K):
        if TMA:                                                              # zeros beyond the edges
            x, w = X8.load([row, k]), W8.load([col, k])
        else:                                                                # beyond the edge: the last again
            inner = k + tl.arange(0, K)[None, :]
            x_row = tl.minimum(row + tl.arange(0, M), rows - 1)[:, None].to(tl.int64)
            w_row = tl.minimum(col + tl.arange(0, N), cols - 1)[:, None].to(tl.int64)
            if EVEN:
                x, w = tl.load(X8 + x_row * width + inner), tl.load(W8 + w_row * width + inner)
            else:
                x = tl.load(X8 + x_row * width + inner, inner < width, 0.0)
                w = tl.load(W8 + w_row * width + inner, inner < width, 0.0)
        acc = tl.dot(x, w.T, acc, max_num_imprecise_acc=IMPRECISE)
    at_row, at_col = row + tl.arange(0, M)[:, None], col + tl.arange(0, N)[None, :]
    tl.store(Out + at_row.to(tl.int64) * cols + at_col, _cast(acc * tl.load(Scale), tl.bfloat16),
             (at_row < rows) & (at_col < cols))


def quantise_launch(x: Tensor, divide: Tensor, x8: Tensor, tiles: Tiles) -> Launch:
    args = dict(X=x, Divide=divide, X8=x8, rows=x.shape[0], width=x.shape[1], M=tiles.m, N=tiles.n)
    return Launch(_quantise_kernel, (triton.cdiv(len(x), tiles.m), triton.cdiv(x.shape[1], tiles.n)), tiles,
                  args)


def fp8_launch(x8: Tensor, weight: Tensor, scale: Tensor, out: Tensor, tiles: Tiles) -> Launch:
    (rows, width), cols = x8.shape, len(weight)
    tma = tiles.tma and width % 16 == 0                                      # rows must start at 16 bytes
    tile = lambda u, block: TensorDescriptor(u, list(u.shape), [width, 1], [block, tiles.k]) if tma else u
    args = dict(X8=tile(x8, tiles.m), W8=tile(weight, tiles.n), Scale=scale, Out=out, rows=rows, cols=cols,
                width=width, M=tiles.m, N=tiles.n, K=tiles.k, BAND=8, TMA=tma, EVEN=width % tiles.k == 0,
                IMPRECISE=min(128, tiles.k))
    return Launch(_fp8_kernel, (triton.cdiv(rows, tiles.m) * triton.cdiv(cols, tiles.n),), tiles, args)


# ----------------------------------------------------------------------------------------------------------
# 7  Elementwise
# ----------------------------------------------------------------------------------------------------------
# Norms, gates and rotations do a few operations per number, and a GPU can do some 300 in the time it takes
# to fetch one from memory. Their cost is the bytes they move, and PyTorch moves every intermediate twice.
# Per element of the activations, bf16 in and out:
#
#     gated_residual   gate to all rows w4 · branch to float32 r2 w4 · product r8 w4 · norm r4 w4 ·
#                      x to float32 r2 w4 · sum r8 w4 · to bf16 r4 w2           54 bytes, in one pass  6
#     norm_rotary      to float32 r2 w4 · norm r4 w4 · on 3/4 of the width: two products r8 w8 and
#                      their sum r8 w4 · joined r4 w4 · to bf16 r4 w2           49 bytes, in one pass  4
#
# (r read, w written; gates, angles and norms are small beside x, and stay in the cache.)


@triton.jit
def _gated_residual_kernel(X, Gate, Branch, Weight, Bias, Out, tokens, chunk, chunks, gate_stride, width, eps,
                           C: tl.constexpr):
    """x + LN1(gate * branch) of one token. Grid: (tokens of all batch entries,)."""
    token, cols = tl.program_id(0), tl.arange(0, C)
    mask, at = cols < width, token.to(tl.int64) * width + cols
    gate = token // tokens * chunks + token % tokens // chunk
    u = tl.load(Gate + gate.to(tl.int64) * gate_stride + cols, mask, 0.0).to(tl.float32)
    u *= tl.load(Branch + at, mask, 0.0).to(tl.float32)
    u = tl.where(mask, u - tl.sum(u, 0) / width, 0.0)
    u *= tl.rsqrt(tl.sum(u * u, 0) / width + eps)
    u = u * (tl.load(Weight + cols, mask, 0.0) + 1) + tl.load(Bias + cols, mask, 0.0)
    x = tl.load(X + at, mask, 0.0).to(tl.float32)
    tl.store(Out + at, _cast(x + u, Out.dtype.element_ty), mask)


@triton.jit
def _norm_rotary_kernel(X, Weight, Bias, Angles, Out, rows, tokens, heads, eps, HD: tl.constexpr,
                        C: tl.constexpr, PAIRS: tl.constexpr, M: tl.constexpr):
    """LN1, then rotation of the pairs (j, j + PAIRS), for all heads of M tokens. Grid: (tiles,).

    PAIRS, 48 of 128, is no power of two, so halves cannot be cut out of a tile. Instead every column also
    loads its partner, which the first load has just brought into the cache.
    """
    row, col = tl.program_id(0) * M + tl.arange(0, M)[:, None], tl.arange(0, C)[None, :]
    wide, turns = (row < rows) & (col < HD), (row < rows) & (col < 2 * PAIRS)
    partner = tl.where(col < PAIRS, col + PAIRS, tl.where(col < 2 * PAIRS, col - PAIRS, col))
    angle = tl.load(Angles + row % tokens * PAIRS + col % PAIRS, turns, 0.0)             # 0: no rotation
    cos, sin = tl.cos(angle), tl.where(col < PAIRS, -tl.sin(angle), tl.sin(angle))
    weight, bias = tl.load(Weight + col, col < HD, 0.0) + 1, tl.load(Bias + col, col < HD, 0.0)
    weight_p, bias_p = tl.load(Weight + partner, col < HD, 0.0) + 1, tl.load(Bias + partner, col < HD, 0.0)
    for head in range(heads):
        at = (row.to(tl.int64) * heads + head) * HD
        x = tl.load(X + at + col, wide, 0.0).to(tl.float32)
        x_p = tl.load(X + at + partner, wide, 0.0).to(tl.float32)
        mean = tl.sum(x, 1)[:, None] / HD
        x, x_p = tl.where(col < HD, x - mean, 0.0), x_p - mean
        scale = tl.rsqrt(tl.sum(x * x, 1)[:, None] / HD + eps)
        y = (x * scale * weight + bias) * cos + (x_p * scale * weight_p + bias_p) * sin
        tl.store(Out + at + col, _cast(y, Out.dtype.element_ty), wide)


def gated_residual_launch(x: Tensor, gate: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float,
                          out: Tensor, tiles: Tiles) -> Launch:
    (B, N, D), n = x.shape, gate.shape[1]
    gate = gate.flatten(0, 1)                                                # a view of both gates' product
    args = dict(X=x, Gate=gate, Branch=branch, Weight=weight, Bias=bias, Out=out, tokens=N, chunk=N // n,
                chunks=n, gate_stride=gate.stride(0), width=D, eps=eps, C=triton.next_power_of_2(D))
    return Launch(_gated_residual_kernel, (B * N,), tiles, args)


def norm_rotary_launch(x: Tensor, weight: Tensor, bias: Tensor, angles: Tensor, eps: float, out: Tensor,
                       tiles: Tiles) -> Launch:
    B, N, heads, hd = x.shape
    args = dict(X=x, Weight=weight, Bias=bias, Angles=angles, Out=out, rows=B * N, tokens=N, heads=heads,
                eps=eps, HD=hd, C=triton.next_power_of_2(hd), PAIRS=angles.shape[1], M=tiles.m)
    return Launch(_norm_rotary_kernel, (triton.cdiv(B * N, tiles.m),), tiles, args)


# ----------------------------------------------------------------------------------------------------------
# 8  The operations
# ----------------------------------------------------------------------------------------------------------


def arch_of(device: torch.device) -> int:
    """Which column of the tables fits a device: 89, 90, 100, 120; 0 for Triton's interpreter on the CPU.

    Raises ValueError if there is none, with what is missing.
    """
    device = torch.device(device)
    if device.type != "cuda":
        magi._require(INTERPRETED.value,
                      f"backend 'triton' needs an NVIDIA GPU, not {str(device)!r}: use 'torch'")
        return 0
    magi._require(torch.cuda.is_available() and torch.version.hip is None,
                  "backend 'triton' needs an NVIDIA GPU and a CUDA build of PyTorch: use 'torch'")
    major, minor = torch.cuda.get_device_capability(device)
    magi._require(major >= 8, f"backend 'triton' needs compute capability 8.0 (A100, RTX 30) or later, "
                  f"{torch.cuda.get_device_name(device)} has {major}.{minor}: use 'torch'")
    return {8: 89, 9: 90, 10: 100, 11: 100}.get(major, 120)


class _Attention(torch.autograd.Function):
    """All kernels of sections 4 and 5 as one differentiable step."""

    @staticmethod
    def forward(ctx, q, k, v, k_old, v_old, ranges, tiles):
        cached = None if k_old is None else (k_old, v_old)
        out, lse = torch.empty_like(q), q.new_empty(q.shape[2], *q.shape[:2], dtype=torch.float32)
        arch = arch_of(q.device)
        pick = lambda name: tiles or tiles_for(name, arch, q.shape[-1], q.dtype)
        forward_launch(q, k, v, cached, ranges, out, lse, pick("forward")).run()
        ctx.save_for_backward(q, k, v, k_old, v_old, out, lse)
        ctx.ranges, ctx.pick = ranges, pick
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, _):
        q, k, v, k_old, v_old, out, lse = ctx.saved_tensors
        dout, dq, delta = dout.contiguous(), torch.empty_like(q), torch.empty_like(lse)
        cached = None if k_old is None else (k_old, v_old)
        dq_launch(q, k, v, cached, ctx.ranges, out, dout, lse, delta, dq, ctx.pick("dq")).run()
        old, grads = 0 if cached is None else k_old.shape[1], []
        for first, source in ((old, (k, v)), (0, cached)):
            if source is None:
                grads += [None, None]
                continue
            ks, vs = (u.contiguous() for u in source)
            grads += [torch.empty_like(ks), torch.empty_like(vs)]
            dkv_launch(q, ks, vs, first, old, k.shape[1], ctx.ranges, dout, lse, delta, *grads[-2:],
                       ctx.pick("dkv")).run()
        return dq, *grads, None, None


def _readable(u: Tensor) -> bool:
    """Can `_tile` walk over it? Heads may lie apart and batches far apart, but by whole tokens."""
    return u.stride(3) == 1 and u.stride(1) >= u.shape[3] and u.stride(0) % u.stride(1) == 0 and \
        all(u.stride(i) * u.element_size() % 16 == 0 for i in (1, 2)) and u.data_ptr() % 16 == 0


def flash_attention(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor,
                    cached: tuple[Tensor, Tensor] | None = None, tiles: Tiles | None = None
                    ) -> tuple[Tensor, Tensor]:
    """Block-causal attention (see magi.block_attention) and the log of each row's sum of e^score.

    q (B, N, Hq, hd), k and v (B, M, Hkv, hd), in float32, bfloat16 or float16; ranges (1 or B, n, 2) on the
    CPU; cached: earlier (k, v), (B, M', Hkv, hd), read where they are. `tiles` replaces the table's. Returns
    (B, N, Hq, hd) and float32 (Hq, B, N); gradients flow to q, k, v and the cached ones. Raises ValueError
    for an empty range, one beyond the keys, another type or head width, or a device that cannot.
    """
    magi._require(q.dtype in (torch.float32, torch.bfloat16, torch.float16), f"attention in {q.dtype}: use "
                  f"float32, bfloat16 or float16")
    magi._require(q.shape[-1] % 16 == 0 and q.shape[-1] <= 256,
                  f"head width {q.shape[-1]} must be a multiple of 16, at most 256: use the backend 'torch'")
    for u in (k, v, *(cached or ())):
        magi._require(u.shape[0] == q.shape[0] and u.shape[3] == q.shape[3] and q.shape[2] % u.shape[2] == 0
                      and u.dtype == q.dtype and u.device == q.device,
                      f"keys and values {tuple(u.shape)} {u.dtype} do not go with queries {tuple(q.shape)} "
                      f"{q.dtype}")
    pairs = []
    for a, b in ((k, v), *([cached] if cached else ())):
        same = a.stride() == b.stride() and _readable(a) and _readable(b)
        pairs += [a, b] if same else [a.contiguous(), b.contiguous()]
    pairs += [None] * (4 - len(pairs))
    spans = tuple(tuple(map(tuple, row)) for row in ranges.tolist())
    return _Attention.apply(q.contiguous(), *pairs, spans, tiles)


def block_attention(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor,
                    cached: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """magi.block_attention: chunk i of the queries reads the keys [start_i, end_i). See flash_attention."""
    return flash_attention(q, k, v, ranges, cached)[0]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """magi.attention: one chunk that reads all keys."""
    return flash_attention(q, k, v, torch.tensor([[[0, k.shape[1]]]]))[0]


class _ByReference(torch.autograd.Function):
    """Forward by a kernel; backward through the reference, computed again. Both are memory-bound steps that
    training spends little on, and one definition of their gradient is enough."""

    @staticmethod
    def forward(ctx, run, reference, *tensors):
        ctx.reference = reference
        ctx.save_for_backward(*tensors)
        return run(*tensors)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            tensors = [u.detach().requires_grad_(need)
                       for u, need in zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True)]
            wanted = [u for u in tensors if u.requires_grad]
            grads = iter(torch.autograd.grad(ctx.reference(*tensors), wanted, grad))
        return None, None, *(next(grads) if u.requires_grad else None for u in tensors)


def _norm_of(weight: Tensor, bias: Tensor, eps: float) -> Callable[[Tensor], Tensor]:
    return lambda u: F.layer_norm(u.to(weight.dtype), weight.shape, weight + 1, bias, eps)


def norm_rotary(x: Tensor, norm: magi.LayerNorm1p, angles: Tensor) -> Tensor:
    """magi.norm_rotary: x (B, N, heads, hd), angles (N, 3 hd/8) float32 -> LN1, rotated, like x."""
    def run(x, weight, bias, angles):
        x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        norm_rotary_launch(x, weight, bias, angles.contiguous(), norm.eps, out,
                           tiles_for("norm_rotary", arch_of(x.device))).run()
        return out

    reference = lambda x, weight, bias, angles: magi.norm_rotary(x, _norm_of(weight, bias, norm.eps), angles)
    return _ByReference.apply(run, reference, x, norm.weight, norm.bias, angles)


def gated_residual(x: Tensor, gate: Tensor, branch: Tensor, norm: magi.LayerNorm1p) -> Tensor:
    """magi.gated_residual: x + LN1(gate * branch); x, branch (B, N, D), gate (B, n, D), n dividing N."""
    def run(x, gate, branch, weight, bias):
        x, branch = x.contiguous(), branch.contiguous()
        gate = gate if gate.stride(2) == 1 else gate.contiguous()
        out = torch.empty_like(x)
        gated_residual_launch(x, gate, branch, weight, bias, norm.eps, out,
                              tiles_for("gated_residual", arch_of(x.device))).run()
        return out

    magi._require(x.shape[1] % gate.shape[1] == 0,
                  f"{x.shape[1]} tokens do not divide into {gate.shape[1]} chunks")
    reference = lambda x, gate, branch, weight, bias: magi.gated_residual(x, gate, branch,
                                                                          _norm_of(weight, bias, norm.eps))
    return _ByReference.apply(run, reference, x, gate, branch, norm.weight, norm.bias)


def fp8_matmul(x: Tensor, weight: Tensor, divide: Tensor, scale: Tensor) -> Tensor:
    """magi.fp8_matmul: x (..., in) any float, weight (out, in) e4m3, divide (in,) or (1, in), scale (1,)
    -> (..., out) bf16. GPUs without fp8 arithmetic (before sm_89), and training, take the reference."""
    native = x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) >= (8, 9)
    if not native or x.requires_grad and torch.is_grad_enabled():
        return magi.fp8_matmul(x, weight, divide, scale)
    arch, rows = arch_of(x.device), x.reshape(-1, x.shape[-1]).contiguous()
    x8 = torch.empty_like(rows, dtype=torch.float8_e4m3fn)
    quantise_launch(rows, divide.float().contiguous(), x8, tiles_for("quantise", arch)).run()
    out = rows.new_empty(len(rows), len(weight), dtype=torch.bfloat16)
    fp8_launch(x8, weight.contiguous(), scale.float(), out, tiles_for("fp8", arch)).run()
    return out.unflatten(0, x.shape[:-1])


TRITON_OPS = SimpleNamespace(name="triton", attention=attention, block_attention=block_attention,
                             norm_rotary=norm_rotary, gated_residual=gated_residual, fp8_matmul=fp8_matmul)


# ----------------------------------------------------------------------------------------------------------
# 9  Compiling ahead
# ----------------------------------------------------------------------------------------------------------
# Triton needs no GPU to compile for one. Tensors on the meta device have shapes, strides and types, which
# is all that code depends on; the assembler and disassembler come in Triton's package. What the machine
# code says: registers per thread, spills (values that did not fit and go through memory), shared memory,
# and which tensor core instructions it uses. What it does not say is how fast it runs.

SHARED_BYTES = {89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}      # of a block, at most
THREADS = {89: 1536, 90: 2048, 100: 2048, 120: 1536}                                 # of a multiprocessor
# The tensor core's instructions in machine code, for 16-bit (or split float32) and for fp8 matrices.
# sm_90's are wgmma in PTX, sm_100's tcgen05.mma, the others' mma.
TENSOR_CORE = {89: ("HMMA", "QMMA"), 90: ("HGMMA", "QGMMA"), 100: ("UTCHMMA", "UTCQMMA"),
               120: ("HMMA", "QMMA")}


class Facts(NamedTuple):
    """What the machine code of one kernel says."""

    registers: int                # of a thread; 255 is the most there is
    spills: int                   # bytes of registers that did not fit, stored and loaded again
    shared: int                   # bytes of a block
    blocks: int                   # that fit on a multiprocessor at once
    loop: dict[str, int]          # instructions of the main inner loop, by kind
    opcodes: frozenset[str]


def machine_code(launch: Launch, arch: int) -> Facts:
    """Compile one launch for an architecture, without a GPU. Its tensors are best on the meta device."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    magi._require(not INTERPRETED.value, "TRITON_INTERPRET is set: kernels are interpreted, not compiled")
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.args[parameter.name]
        signature[parameter.name] = "constexpr" if parameter.is_constexpr else _type_of(value)
        if parameter.is_constexpr:
            constants[parameter.name] = value
        elif isinstance(value, Tensor) or isinstance(value, int) and value % 16 == 0:
            attributes[i,] = [["tt.divisibility", 16]]                       # as the launcher would find out
    compiled = triton.compile(ASTSource(launch.kernel, signature, constants, attributes),
                              target=GPUTarget("cuda", arch, 32),
                              options=dict(num_warps=launch.tiles.warps, num_stages=launch.tiles.stages))
    with tempfile.TemporaryDirectory() as folder:
        registers, code = _disassemble(compiled.asm["cubin"], Path(folder))
        opcodes = [op for _, op, _ in code]
        local = any(op in ("LDL", "STL") for op in opcodes)                  # sine and cosine use it as well
        spills = _spilled_bytes(compiled.asm["ptx"], arch, Path(folder)) if local else 0
    shared, threads = compiled.metadata.shared, 32 * compiled.metadata.num_warps
    blocks = min(65536 // (-(-registers // 8) * 8 * threads), THREADS[arch] // threads,
                 (SHARED_BYTES[arch] + 1024) // (shared + 1024))             # 1 KiB of each block is reserved
    return Facts(registers, spills, shared, blocks, _main_loop(code), frozenset(opcodes))


def _type_of(value: Any) -> str:
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_type_of(value.base)[1:]}{list(value.block_shape)}>"
    if isinstance(value, Tensor):
        return "*" + {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
                      torch.int32: "i32", torch.float8_e4m3fn: "fp8e4nv"}[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _tool(name: str, *args: str | Path) -> str:
    """The output of one of the programs in Triton's package."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    path = f"{folder}{os.pathsep}{os.environ['PATH']}" # cuobjdump looks for nvdisasm there
    done = subprocess.run([folder / name, *args], capture_output=True, text=True, check=True,
                          env=os.environ | {"PATH": path})
    return done.stdout + done.stderr


def _disassemble(cubin: bytes, folder: Path) -> tuple[int, list[tuple[int, str, str]]]:
    """Registers, and (address, opcode without modifiers, operands) of every instruction."""
    (file := folder / "kernel.cubin").write_bytes(cubin)
    registers = int(re.search(r"REG:(\d+)", _tool("cuobjdump", "-res-usage", file))[1])
    line = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)[\w.]*\s*(.*?);")
    found = line.findall(_tool("cuobjdump", "-sass", file))
    return registers, [(int(a, 16), op, rest) for a, op, rest in found]


def _spilled_bytes(ptx: str, arch: int, folder: Path) -> int:
    """What the assembler itself says: local memory alone does not tell spills from arrays."""
    (file := folder / "kernel.ptx").write_text(ptx)
    said = _tool("ptxas-blackwell" if arch >= 100 else "ptxas", "-v", file, "-o", folder / "again.cubin",
                 f"--gpu-name=sm_{arch}{'a' * (arch >= 90)}")
    return sum(map(int, re.findall(r"(\d+) bytes spill", said)))


def _main_loop(code: list[tuple[int, str, str]]) -> dict[str, int]:
    """The innermost loop with the most tensor core instructions: how many there are of each kind."""
    best: dict[str, int] = {}
    jumps = [(int(m[1], 16), at) for at, op, rest in code
             if op == "BRA" and (m := re.search("0x([0-9a-f]+)", rest))]
    loops = [(to, at) for to, at in jumps if to < at]
    for low, high in loops:
        if any((a, b) != (low, high) and low <= a and b <= high for a, b in loops):
            continue
        ops = [op for at, op, _ in code if low <= at <= high]
        count = lambda *names, ops=ops: sum(op in names for op in ops)
        kinds = dict(all=len(ops), tensor=sum("MMA" in op for op in ops), exp=count("MUFU"),
                     shared=count("LDS", "STS", "LDSM", "STSM"), copy=count("LDGSTS", "UTMALDG", "LDG"))
        if kinds["tensor"] > best.get("tensor", 0):
            best = kinds
    return best


def shipped(arch: int, quick: bool = False) -> dict[str, Launch]:
    """Every kernel x type x head width with its shipped tiles, at the sizes of the 4.5B; quick: what it runs,
    bf16 and fp8 at head width 128."""
    tokens, cached, Hq, Hkv, D, ffn = 2 * 12150, 12150, 24, 8, 3072, 12288
    ranges = (((0, cached + tokens // 2), (0, cached + tokens)),)
    make = lambda *shape, dtype=torch.float32: torch.empty(*shape, dtype=dtype, device="meta")
    out = {}
    for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for hd in (128,) if quick else (64, 128):
            q, k = make(1, tokens, Hq, hd, dtype=dtype), make(1, tokens, Hkv, hd, dtype=dtype)
            old, lse = (make(1, cached, Hkv, hd, dtype=dtype),) * 2, make(Hq, 1, tokens)
            forward, dq, dkv = (tiles_for(kernel, arch, hd, dtype) for kernel in ("forward", "dq", "dkv"))
            old_and_new = cached, cached, tokens
            out |= {
                f"forward {name} {hd}": forward_launch(q, k, k, old, ranges, q, lse, forward),
                f"dq {name} {hd}": dq_launch(q, k, k, old, ranges, q, q, lse, lse, q, dq),
                f"dkv {name} {hd}": dkv_launch(q, k, k, *old_and_new, ranges, q, lse, lse, k, k, dkv),
            }
        x, gate, d, h = make(1, tokens, D, dtype=dtype), make(1, 2, D, dtype=dtype), make(D), make(128)
        x8 = make(tokens, D, dtype=torch.float8_e4m3fn)
        gated, rotary, quantise = (tiles_for(k, arch) for k in ("gated_residual", "norm_rotary", "quantise"))
        args = x, gate, make(1, tokens, D), d, d, 1e-6, x, gated
        out |= {
            f"gated_residual {name}": gated_residual_launch(*args),
            f"norm_rotary {name}": norm_rotary_launch(q, h, h, make(tokens, 48), 1e-6, q, rotary),
            f"quantise {name}": quantise_launch(x[0], d, x8, quantise),
        }
    w8, y = make(ffn, D, dtype=torch.float8_e4m3fn), make(tokens, ffn, dtype=torch.bfloat16)
    return out | {"fp8 matmul": fp8_launch(x8, w8, make(1), y, tiles_for("fp8", arch))}


def compile_row(job: tuple[int, str, bool]) -> tuple[bool, str]:
    """One line of the table: what the machine code says, and whether that is as it should be."""
    arch, name, quick = job
    launch = shipped(arch, quick)[name]
    facts, kernel = machine_code(launch, arch), name.split()[0]
    wanted = None
    if kernel in ("forward", "dq", "dkv", "fp8"):
        # wgmma and tcgen05 work on 64 rows; float32 comes in smaller tiles, on which mma is used everywhere
        small = launch.tiles.m < 64 or kernel != "fp8" and launch.tiles.n < 16
        wanted = TENSOR_CORE[89 if small else arch][kernel == "fp8"]
    checks = ((facts.shared > SHARED_BYTES[arch], "does not fit"), (facts.spills, "spills"),
              (wanted and wanted not in facts.opcodes, f"no {wanted}"))
    faults = [text for bad, text in checks if bad]
    tiles = launch.tiles
    size = "x".join(str(u) for u in (tiles.m, tiles.n, tiles.k) if u)
    loop = " ".join(f"{v} {k}" for k, v in facts.loop.items())
    return not faults, (f"sm_{arch:<4} {name:24} {size:12} {tiles.warps:2} {tiles.stages:2} "
                        f"{facts.registers:4} {facts.spills:6} {facts.shared / 1024:6.1f} {facts.blocks:3}  "
                        f"{wanted or '-':8} {loop:50} {', '.join(faults) or 'ok'}")


def compile_all(quick: bool = False) -> bool:
    """Print the table of all kernels on all architectures; True if nothing is wrong."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    print(f"{'GPU':7} {'kernel':24} {'tile':12}  w  s regs spills  sh/KiB blk {'uses':9} inner loop")
    jobs = [(arch, name, quick) for arch in SHARED_BYTES for name in shipped(arch, quick)]
    good = []
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for ok, line in pool.map(compile_row, jobs):
            print(line, flush=True)
            good.append(ok)
    print(f"{sum(good)} of {len(good)} fit, spill nothing and use the expected instructions")
    return all(good)


# ----------------------------------------------------------------------------------------------------------
# 10 Timing
# ----------------------------------------------------------------------------------------------------------
# What a kernel achieves is useful arithmetic over time, whatever it does besides: masked pairs do not
# count. Peaks are the makers' figures for dense matrices.

# fmt: off
PEAKS = {                                       # TFLOP/s in bf16 and fp8 (float32 sums), memory in GB/s
    "H100 PCIe": (756, 1513, 2039), "H100 NVL": (835, 1671, 3938), "H100": (989, 1979, 3352),
    "H200":      (989, 1979, 4800), "RTX 4090": (165, 330, 1008),  "B200": (2250, 4500, 8000),
}
MODELS = {                                      # tokens in a chunk, Hq, D, FFN out and in; Hkv 8, hd 128
    "4.5B 720x720": (12150, 24, 3072, 12288, 12288), "24B 720x1280": (21600, 48, 6144, 32768, 16384),
}
# fmt: on


def median_ms(run: Callable[[], object], repeats: int = 15) -> float:
    """Median time of one call on the GPU, by CUDA events, after three calls to warm up."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2]


def check(device: str) -> None:
    """Hold every operation against the reference on this device. Raises ValueError if one is off."""
    def compare(name: str, ours: Tensor, exact: Tensor, bar: float) -> None:
        error = ((ours.double() - exact.double()).norm() / exact.double().norm()).item()
        print(f"{name:44} relative error {error:.1e}  (bar {bar:.0e})")
        magi._require(error < bar, f"{name} is wrong: error {error}")

    make = lambda *shape: torch.randn(*shape, device=device)
    ranges = torch.tensor([[[0, 500], [130, 731], [7, 1031]], [[0, 3], [400, 1031], [399, 401]]])
    for dtype, bar in ((torch.float32, 1e-4), (torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)):
        for hd in (16, 48, 64, 128, 256):
            shapes = (999, 6), (631, 2), (631, 2), (400, 2), (400, 2)
            ours = [make(2, tokens, heads, hd).to(dtype).requires_grad_() for tokens, heads in shapes]
            exact = [u.detach().double().requires_grad_() for u in ours]
            outs = [op(*u[:3], ranges, tuple(u[3:])) for op, u in ((block_attention, ours),
                                                                   (magi.block_attention, exact))]
            grad = make(*outs[0].shape).to(dtype)
            grads = [torch.autograd.grad(out, u, grad.to(out.dtype))
                     for out, u in zip(outs, (ours, exact), strict=True)]
            label = f"attention {str(dtype).removeprefix('torch.')} hd {hd}"
            compare(label, *outs, bar)
            for name, a, b in zip(("dq", "dk", "dv", "dk cached", "dv cached"), *grads, strict=True):
                compare(f"{label} {name}", a, b, 2 * bar)
    for dtype, bar in ((torch.float32, 1e-5), (torch.bfloat16, 5e-3)):
        norm = magi.LayerNorm1p(128).to(device)
        x, angles = make(2, 300, 24, 128).to(dtype), 20 * make(300, 48)
        compare(f"norm_rotary {dtype}", norm_rotary(x, norm, angles), magi.norm_rotary(x, norm, angles), bar)
        x, gate = make(2, 300, 3072).to(dtype), make(2, 3, 3072).to(dtype)
        norm = magi.LayerNorm1p(3072).to(device)
        args = x, gate, make(2, 300, 3072), norm
        compare(f"gated_residual {dtype}", gated_residual(*args), magi.gated_residual(*args), bar)
    weight = make(1000, 3072).to(torch.float8_e4m3fn)
    args = make(999, 3072).bfloat16(), weight, torch.rand(1, 3072, device=device) + 0.5, make(1).abs()
    compare("fp8_matmul", fp8_matmul(*args), magi.fp8_matmul(*args), 2e-3)


def flex(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, chunk: int) -> Callable[[], Tensor]:
    """PyTorch's FlexAttention with the same ranges, compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    start, end = ranges[0].to(q.device).unbind(-1)
    mask = create_block_mask(lambda b, h, i, j: (j >= start[i // chunk]) & (j < end[i // chunk]), None, None,
                             q.shape[1], k.shape[1], device=q.device)
    q, k, v = (u.transpose(1, 2) for u in (q, k, v))
    run = torch.compile(flex_attention)
    return lambda: run(q, k, v, block_mask=mask, enable_gqa=True)


class Bench:
    """Prints times, TFLOP/s (or GB/s) and share of the card's peak at the sizes of the models."""

    def __init__(self, device: str):
        card = torch.cuda.get_device_name(device)
        known = (peak for name, peak in PEAKS.items() if all(word in card for word in name.split()))
        self.device, (self.bf16, self.fp8, self.memory) = device, next(known, (None, None, None))
        print(f"\n{card}, torch {torch.__version__}, triton {triton.__version__}")
        print(f"{'':52} {'ms':>9} {'TFLOP/s':>9} of peak")

    def row(self, label: str, work: float, peak: float | None, run: Callable, *args, unit: float = 1e12):
        try:
            ms = median_ms(lambda: run(*args))
        except Exception as error:              # a peer that cannot run here must not end the table
            print(f"{label:52} failed: {(str(error) or type(error).__name__).splitlines()[0][:60]}")
            return
        rate = work / ms * 1e3 / unit
        print(f"{label:52} {ms:9.3f} {rate:9.1f} {f'{rate / peak:7.0%}' if peak else '      -'}", flush=True)

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device=self.device).to(dtype)

    def attention(self, model: str, c: int, Hq: int) -> None:
        """Four chunks in flight that see 2, 3, 4, 5 chunks, one of them clean: the pipeline in full swing."""
        q, k, v = (self.random(1, 4 * c, heads, 128) for heads in (Hq, 8, 8))
        old = self.random(1, c, 8, 128), self.random(1, c, 8, 128)
        joined = [torch.cat(pair, 1) for pair in zip(old, (k, v), strict=True)]
        ranges = torch.tensor([[[0, (i + 2) * c] for i in range(4)]])
        work = 4 * (2 + 3 + 4 + 5) * c * c * Hq * 128
        self.row(f"{model} attention", work, self.bf16, block_attention, q, k, v, ranges, old)
        sdpa = magi.block_attention
        self.row("    SDPA per chunk, joining the cache", work, self.bf16, sdpa, q, k, v, ranges, old)
        self.row("    FlexAttention, cache joined before", work, self.bf16, flex(q, *joined, ranges, c))
        ins, grad = [u.requires_grad_() for u in (q, *joined)], torch.randn_like(q)
        back = partial(torch.autograd.grad, retain_graph=True)
        for label, op in ((f"{model} attention, backward", block_attention), ("    SDPA, backward", sdpa)):
            with torch.enable_grad():
                out = op(*ins, ranges)
            self.row(label, 2.5 * work, self.bf16, back, out, ins, grad)
        text = torch.tensor([[[i * 200, (i + 1) * 200] for i in range(4)]])
        self.row(f"{model} cross-attention, 200 tokens each", 4 * 4 * 200 * c * Hq * 128, self.bf16,
                 block_attention, q, k, v, text)

    def products(self, model: str, rows: int, name: str, width: int, cols: int) -> None:
        x, w8 = self.random(rows, width), self.random(cols, width, dtype=torch.float8_e4m3fn)
        divide, one = torch.ones(1, width, device=self.device), torch.ones(1, device=self.device)
        x8, out, work = x.to(torch.float8_e4m3fn), self.random(rows, cols), 2 * rows * width * cols
        self.row(f"{model} fp8 {name}, with quantising", work, self.fp8, fp8_matmul, x, w8, divide, one)
        launch = fp8_launch(x8, w8, one, out, tiles_for("fp8", arch_of(self.device)))
        self.row("    product alone", work, self.fp8, launch.run)
        scaled = partial(torch._scaled_mm, out_dtype=torch.bfloat16)
        self.row("    torch._scaled_mm alone", work, self.fp8, scaled, x8, w8.t(), one, one)
        self.row("    bf16 product", work, self.bf16, F.linear, x, w8.bfloat16())

    def elementwise(self, c: int, Hq: int, D: int) -> None:
        x, gate, branch = (self.random(1, rows, D) for rows in (4 * c, 4, 4 * c))
        heads, angles = self.random(1, 4 * c, Hq, 128), self.random(4 * c, 48, dtype=torch.float32)
        norm, qk = (magi.LayerNorm1p(width).to(self.device) for width in (D, 128))
        for name, ops in (("", TRITON_OPS), ("PyTorch ", magi.TORCH_OPS)):
            self.row(f"    {name}gated_residual (GB/s)", 6 * x.numel(), self.memory, ops.gated_residual,
                     x, gate, branch, norm, unit=1e9)
            self.row(f"    {name}norm_rotary (GB/s)", 4 * heads.numel(), self.memory, ops.norm_rotary,
                     heads, qk, angles, unit=1e9)

    def run(self) -> None:
        for model, (c, Hq, D, fc1, fc2) in MODELS.items():
            self.attention(model, c, Hq)
            for name, width, cols in (("q", D, Hq * 128), ("fc1", D, fc1), ("fc2", fc2, D)):
                self.products(model, 4 * c, name, width, cols)
            self.elementwise(c, Hq, D)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check and time the kernels on a GPU, or compile them.")
    parser.add_argument("--compile", action="store_true", help="for all architectures; needs no GPU")
    parser.add_argument("--quick", action="store_true", help="with --compile: only what the 4.5B runs")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args(argv)
    try:
        if args.compile:
            return 0 if compile_all(args.quick) else 1
        arch_of(args.device)
        with torch.cuda.device(args.device):
            check(args.device)
            with torch.no_grad():
                Bench(args.device).run()
    except ValueError as error:
        print(f"kernels: {error} (python kernels.py --compile needs no GPU)", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
