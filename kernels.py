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
In this file a *row* is one token of one head. In kernels, capitals are places in memory (Q, Out, Plan) or
known when the kernel is compiled (S, N, EDGE: `tl.constexpr`).

Contents
    1  What a kernel is       programs, tiles, memory; the parts all share
    2  Plans                  which program does what; why block-causal needs no mask
    3  Attention, forward     the online softmax
    4  Attention, backward    scores are computed again, never stored
    5  Fp8 matmul             scales, and what they lose
    6  Elementwise            where the bytes go
    7  Tile sizes             how big, for which architecture, and why
    8  Compiling ahead        --compile
    9  Timing                 on a GPU

Left out on purpose: dropout, masks of any kind, more than two sources of keys, AMD. To read first:
`_attend_tile`, ten lines that everything else surrounds. References: FlashAttention 1 and 2 (arXiv
2205.14135, 2307.08691); SmoothQuant (2211.10438); Triton's tutorials 3, 6 and 9.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
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

# ----------------------------------------------------------------------------------------------------------
# 1  What a kernel is
# ----------------------------------------------------------------------------------------------------------
# A kernel is the code of one *program*; a launch starts a grid of them, and `tl.program_id` tells a program
# which one it is. The GPU's multiprocessors (132 on an H100) take programs from the list as they get free. A
# program's variables are *tiles*, blocks of numbers spread over its threads, 32 to a *warp*.
#
# Numbers live in four places, each larger and slower than the one before. On an H100: registers (255 a
# thread), shared memory (227 KiB a multiprocessor), the L2 cache (50 MB), memory (80 GB). Its tensor cores,
# which multiply tiles, do 295 operations in the time in which one byte comes from memory. So a kernel is
# good if it fetches a tile once, does all there is to do with it, and writes only results. What must be on
# chip for that is the tile size; while one tile is worked on, the next are on their way (`stages`).


class Tiles(NamedTuple):
    """How one kernel is cut up: what a program holds on chip, in how many warps, loading how far ahead."""

    m: int                        # rows of queries; fp8: rows of the output
    n: int                        # rows of keys; fp8: columns of the output
    k: int = 0                    # fp8 only: how much of the inner axis per step
    warps: int = 4
    stages: int = 2               # tiles in flight: loads run ahead of the arithmetic by this many
    tma: bool = False             # let the copy engine fetch tiles by descriptor (sm_90 on)


class Launch(NamedTuple):
    """All there is to say about one kernel call: operations run it, section 8 compiles it for other GPUs."""

    kernel: Callable
    grid: tuple[int, ...]
    tiles: Tiles
    args: dict[str, Any]

    def run(self) -> None:
        device = next(u.device for u in self.args.values() if isinstance(u, Tensor))
        arch_of(device)                                                      # says if the device cannot
        with torch.cuda.device(device) if device.type == "cuda" else torch.device("cpu"):
            self.kernel[self.grid](**self.args, num_warps=self.tiles.warps, num_stages=self.tiles.stages)


def arch_of(device: torch.device | str) -> int:
    """Which column of section 7 fits a device: 89, 90, 100, 120; 0 for Triton's interpreter on the CPU.

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


class Sizes(NamedTuple):
    """What is known when an attention kernel is compiled: S in the kernels."""

    m: int                        # rows of queries and of keys in a tile
    n: int
    hd: int
    width: int                    # of a tile: hd rounded up to a power of two, as all of Triton's tiles are
    group: int                    # query heads that read the same kv head
    tma: bool
    precision: str                # how float32 is multiplied


@triton.jit
def _tile(X, X_tma, row, col, stride, left, ROWS: tl.constexpr, EDGE: tl.constexpr, S: tl.constexpr):
    """ROWS rows of hd columns from (row, col) on, of a matrix whose rows are `stride` numbers apart.

    A whole tile comes by descriptor X_tma if there is one. A tile at the EDGE has only `left` rows; the last
    is then loaded again for those beyond, which belong to others and might hold nan: a weight of 0 would not
    undo that.
    """
    if S.tma and not EDGE:
        x = X_tma.load([row, col])
    else:
        rows, cols = tl.arange(0, ROWS)[:, None], tl.arange(0, S.width)[None, :]
        if EDGE:
            rows = tl.minimum(rows, left - 1)
        at = X + row.to(tl.int64) * stride + col + (rows * stride + cols)
        x = tl.load(at, (cols < S.hd) & (rows >= 0), 0.0) if S.hd < S.width else tl.load(at)
    return x


@triton.jit
def _store(X, row, col, stride, left, x, S: tl.constexpr):
    """Write the first `left` rows and hd columns of a tile."""
    rows, cols = tl.arange(0, x.shape[0])[:, None], tl.arange(0, S.width)[None, :]
    at = X + row.to(tl.int64) * stride + col + (rows * stride + cols)
    tl.store(at, _cast(x, X.dtype.element_ty), (rows < left) & (cols < S.hd))


# On a GPU `_dot` and `_cast` are one instruction each. The rest of them repairs two faults of Triton 3.7's
# interpreter, there and only there: it multiplies bf16 by bit patterns, and cuts off where it should round.
INTERPRETED = tl.constexpr(not isinstance(_tile, triton.JITFunction))        # was TRITON_INTERPRET set?


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """a b + acc in float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _cast(x, TO: tl.constexpr):
    """float32 -> TO, to nearest even."""
    if INTERPRETED:
        if TO == tl.bfloat16:
            x = _round_bits(x, 16)
        elif TO == tl.float8e4nv:                                            # below 2^-6 in steps of 2^-9:
            x = tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, _round_bits(x, 20))  # 1.5 * 2^(23-9)
    return x.to(TO)


@triton.jit
def _round_bits(x, DROP: tl.constexpr):
    """float32 without its last DROP bits, to nearest even: adding half a unit, less one if even, carries."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + ((1 << (DROP - 1)) - 1) + ((bits >> DROP) & 1)) & (-1 << DROP)
    return tl.where(tl.abs(x) < float("inf"), bits.to(tl.float32, bitcast=True), x)


# ----------------------------------------------------------------------------------------------------------
# 2  Plans
# ----------------------------------------------------------------------------------------------------------
# Block-causal needs no mask. A chunk of queries reads *all* keys of one contiguous range and no others, so
# its rule is two numbers, a start and an end. A loop from start to end touches only keys that count; the one
# tile at the end that sticks out is masked, the hundreds before it are not. A mask tensor would cost a bit
# per pair to read and, worse, the arithmetic of everything it forbids.
#
# The ranges are known on the CPU before a forward starts, and all layers share them. So what each program
# shall do is written down once, as a list of integers, and copied to the GPU. Programs start in the order of
# the list: the longest work comes first, so that none trails at the end.


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
        old = max(0, min(end, cached) - start)
        first_old, first_new = b * strides[0] + start, b * strides[1] + max(start, cached) - cached
        for row in range(q0, q1, m):
            plan.append((b * N + row, min(m, q1 - row), first_old, old, first_new, end - start - old))
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
def _on_device(make: Callable, args: tuple, device: torch.device) -> list[Tensor]:
    tables = make(*args) if make is key_plan else [make(*args)]
    return [torch.tensor(table, dtype=torch.int32).to(device) for table in tables]


# ----------------------------------------------------------------------------------------------------------
# 3  Attention, forward
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
# Grouped queries: the Hq/Hkv heads that read the same keys are neighbours in the grid, so what one fetches
# from memory the others find in the L2 cache. In the same way all tiles of a kv head run before the next
# head's begin: keys and values of five chunks are 31 MB for one head, 249 MB for all, and the H100's L2 has
# 50 MB.

LOG2E = tl.constexpr(math.log2(math.e))        # the hardware has 2^x, not e^x
LN2 = tl.constexpr(math.log(2))
REST = tl.constexpr(16)                        # less than a tile is left at the end: it goes in tiles of this


class Pair(NamedTuple):
    """Two matrices to walk along together, keys and values or (in the backward) queries and do."""

    X: Any
    Y: Any
    X_tma: Any                    # descriptors of both, for whole tiles
    Y_tma: Any
    row: Any                      # `count` rows from here on,
    count: Any
    col: Any                      # hd columns from here on,
    stride: Any                   # numbers from one row to the next


@triton.jit
def _next(X, X_tma, along, j, left, ROWS: tl.constexpr, EDGE: tl.constexpr, S: tl.constexpr):
    """The tile of one of the two matrices, j rows into the walk."""
    return _tile(X, X_tma, along.row + j, along.col, along.stride, left, ROWS, EDGE, S)


@triton.jit
def _walk(STEP: tl.constexpr, held, sums, along, N: tl.constexpr, scale, S: tl.constexpr):
    """sums = STEP(held, sums, ...) for all rows of a pair: whole tiles of N, then the rest in small ones."""
    whole = along.count // N * N
    for j in tl.range(0, whole, N):
        sums = STEP(held, sums, along, j, N, scale, N, False, S)
    for j in tl.range(whole, along.count, REST, num_stages=1):
        sums = STEP(held, sums, along, j, along.count - j, scale, REST, True, S)
    return sums


@triton.jit
def _attend_tile(held, sums, keys, j, left, scale, N: tl.constexpr, EDGE: tl.constexpr, S: tl.constexpr):
    """One step of the online softmax: N keys from j on, of which in a tile at the EDGE only `left` count."""
    q, = held
    acc, m, l = sums
    k = _next(keys.X, keys.X_tma, keys, j, left, N, EDGE, S)
    s = _dot(q, k.T, None, S.precision)                                      # (m, N)
    if EDGE:
        s = tl.where(tl.arange(0, N)[None, :] < left, s, -float("inf"))
    new = tl.maximum(m, tl.max(s, 1) * scale)          # scale holds log2(e) too: e^x is 2^(x log2(e))
    p = tl.exp2(s * scale - new[:, None])
    shrink = tl.exp2(m - new)
    v = _next(keys.Y, keys.Y_tma, keys, j, left, N, EDGE, S)   # loaded with k, it makes sm_120 spill
    acc = _dot(_cast(p, v.dtype), v, acc * shrink[:, None], S.precision)
    return acc, new, l * shrink + tl.sum(p, 1)


@triton.jit
def _forward_kernel(Q, K, V, K_old, V_old, K_tma, V_tma, K_old_tma, V_old_tma, Out, Lse, Plan, tokens,
                    q_stride, k_stride, k_head, old_stride, old_head, scale, S: tl.constexpr):
    """One tile of queries of one head. Grid: (tiles * group, Hkv); Plan: see `query_plan`."""
    plan, kv = Plan + tl.program_id(0) // S.group * 6, tl.program_id(1)
    head = kv * S.group + tl.program_id(0) % S.group
    row, left, rows = tl.load(plan), tl.load(plan + 1), tl.arange(0, S.m)
    old = Pair(K_old, V_old, K_old_tma, V_old_tma, tl.load(plan + 2), tl.load(plan + 3), kv * old_head,
               old_stride)
    new = Pair(K, V, K_tma, V_tma, tl.load(plan + 4), tl.load(plan + 5), kv * k_head, k_stride)
    q = _tile(Q, Q, row, head * S.hd, q_stride, left, S.m, True, S)          # (m, width)
    sums = (tl.zeros(q.shape, tl.float32), tl.full(rows.shape, -float("inf"), tl.float32),
            tl.zeros(rows.shape, tl.float32))                                # acc, m, l
    sums = _walk(_attend_tile, (q,), sums, old, S.n, scale * LOG2E, S)
    acc, m, l = _walk(_attend_tile, (q,), sums, new, S.n, scale * LOG2E, S)
    _store(Out, row, head * S.hd, q_stride, left, acc / l[:, None], S)
    tl.store(Lse + head.to(tl.int64) * tokens + row + rows, (m + tl.log2(l)) * LN2, rows < left)


def _shared_args(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> dict[str, Any]:
    """What all attention kernels take. float32 is multiplied as the sum of two bf16 parts, in three products,
    which keeps 16 of its 24 bits. Three TF32 products keep more, but spill hundreds of registers at head
    width 128; one keeps 10. Other types take no notice."""
    hd, precision = q.shape[-1], "bf16x3" if q.dtype == torch.float32 else "tf32"
    sizes = Sizes(tiles.m, tiles.n, hd, triton.next_power_of_2(hd), q.shape[2] // k.shape[2], tiles.tma,
                  precision)
    return dict(Q=q, K=k, V=v, tokens=q.shape[0] * q.shape[1], q_stride=q.stride(1), k_stride=k.stride(1),
                scale=hd**-0.5, S=sizes)


def _descriptor(u: Tensor, rows: int, tiles: Tiles) -> Tensor | TensorDescriptor:
    """(B, N, heads, hd) as a matrix of tokens x (heads hd), for the copy engine, or itself without one."""
    if not tiles.tma:
        return u
    shape = [(u.shape[0] - 1) * u.stride(0) // u.stride(1) + u.shape[1],
             (u.shape[2] - 1) * u.stride(2) + u.shape[3]]
    return TensorDescriptor(u, shape, [u.stride(1), 1], [rows, u.shape[3]])


def query_launch(kernel: Callable, q: Tensor, k: Tensor, v: Tensor, cached: tuple[Tensor, Tensor] | None,
                 ranges: tuple, tiles: Tiles, **others: Tensor) -> Launch:
    """Of the forward or the dq kernel. Without a cache the new keys stand in for it: none of them is read."""
    k_old, v_old = cached or (k, v)
    old, strides = k_old.shape[1] if cached else 0, tuple(u.stride(0) // u.stride(1) for u in (k_old, k))
    (plan,) = _on_device(query_plan, (ranges, *q.shape[:2], k.shape[1], old, tiles.m, strides), q.device)
    sources = dict(K=k, V=v, K_old=k_old, V_old=v_old)
    args = _shared_args(q, k, v, tiles) | sources | others | dict(
        Plan=plan, k_head=k.stride(2), old_stride=k_old.stride(1), old_head=k_old.stride(2))
    args |= {f"{name}_tma": _descriptor(u, tiles.n, tiles) for name, u in sources.items()}
    return Launch(kernel, (len(plan) * args["S"].group, k.shape[2]), tiles, args)


# ----------------------------------------------------------------------------------------------------------
# 4  Attention, backward
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
def _dq_tile(held, dq, keys, j, left, scale, N: tl.constexpr, EDGE: tl.constexpr, S: tl.constexpr):
    """Add to dq what N keys give."""
    q, do, lse, delta = held
    k = _next(keys.X, keys.X_tma, keys, j, left, N, EDGE, S)
    v = _next(keys.Y, keys.Y_tma, keys, j, left, N, EDGE, S)
    p = tl.exp2(_dot(q, k.T, None, S.precision) * scale - lse[:, None])      # (m, N)
    if EDGE:
        p = tl.where(tl.arange(0, N)[None, :] < left, p, 0.0)
    ds = p * (_dot(do, v.T, None, S.precision) - delta[:, None])
    return _dot(_cast(ds, k.dtype), k, dq, S.precision)


@triton.jit
def _dq_kernel(Q, K, V, K_old, V_old, K_tma, V_tma, K_old_tma, V_old_tma, Out, dOut, Lse, Delta, dQ, Plan,
               tokens, q_stride, k_stride, k_head, old_stride, old_head, scale, S: tl.constexpr):
    """dq and delta of one tile of queries. Grid and plan as in the forward."""
    plan, kv = Plan + tl.program_id(0) // S.group * 6, tl.program_id(1)
    head = kv * S.group + tl.program_id(0) % S.group
    row, left, rows = tl.load(plan), tl.load(plan + 1), tl.arange(0, S.m)
    old = Pair(K_old, V_old, K_old_tma, V_old_tma, tl.load(plan + 2), tl.load(plan + 3), kv * old_head,
               old_stride)
    new = Pair(K, V, K_tma, V_tma, tl.load(plan + 4), tl.load(plan + 5), kv * k_head, k_stride)
    q = _tile(Q, Q, row, head * S.hd, q_stride, left, S.m, True, S)          # (m, width), like do and out
    do = _tile(dOut, dOut, row, head * S.hd, q_stride, left, S.m, True, S)
    out = _tile(Out, Out, row, head * S.hd, q_stride, left, S.m, True, S)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    at = head.to(tl.int64) * tokens + row + rows
    tl.store(Delta + at, delta, rows < left)
    held = q, do, tl.load(Lse + at, rows < left, 0.0) * LOG2E, delta
    dq = _walk(_dq_tile, held, tl.zeros(q.shape, tl.float32), old, S.n, scale * LOG2E, S)
    dq = _walk(_dq_tile, held, dq, new, S.n, scale * LOG2E, S)
    _store(dQ, row, head * S.hd, q_stride, left, dq * scale, S)


@triton.jit
def _dkv_tile(held, sums, queries, j, left, scale, M: tl.constexpr, EDGE: tl.constexpr, S: tl.constexpr):
    """Add to dk and dv what M queries of one head give. Scores are held transposed: keys x queries."""
    k, v, Lse, Delta = held
    dk, dv = sums
    q = _next(queries.X, queries.X_tma, queries, j, left, M, EDGE, S)
    do = _next(queries.Y, queries.Y_tma, queries, j, left, M, EDGE, S)
    rows = tl.arange(0, M)
    lse = tl.load(Lse + queries.row + j + rows, rows < left, float("inf"))   # beyond the edge: e^-inf = 0
    delta = tl.load(Delta + queries.row + j + rows, rows < left, 0.0)
    p = tl.exp2(_dot(k, q.T, None, S.precision) * scale - (lse * LOG2E)[None, :])                  # (n, M)
    dv = _dot(_cast(p, do.dtype), do, dv, S.precision)
    ds = p * (_dot(v, do.T, None, S.precision) - delta[None, :])
    return _dot(_cast(ds, q.dtype), q, dk, S.precision), dv


@triton.jit
def _dkv_kernel(Q, K, V, dOut, Q_tma, dOut_tma, Lse, Delta, dK, dV, Plan, Runs, tokens, q_stride, k_stride,
                scale, S: tl.constexpr):
    """dk and dv of one tile of n keys. Grid: (tiles, Hkv). Plan and Runs: see `key_plan`."""
    plan, kv = Plan + tl.program_id(0) * 4, tl.program_id(1)
    row, left = tl.load(plan), tl.load(plan + 1)
    runs, number = Runs + tl.load(plan + 2) * 2, tl.load(plan + 3)
    k = _tile(K, K, row, kv * S.hd, k_stride, left, S.n, True, S)            # (n, width), like v
    v = _tile(V, V, row, kv * S.hd, k_stride, left, S.n, True, S)
    dk, dv = tl.zeros(k.shape, tl.float32), tl.zeros(k.shape, tl.float32)
    for i in range(number * S.group):                                        # each run, each query head
        head, run = kv * S.group + i % S.group, runs + i // S.group * 2
        queries = Pair(Q, dOut, Q_tma, dOut_tma, tl.load(run), tl.load(run + 1), head * S.hd, q_stride)
        at = head.to(tl.int64) * tokens
        dk, dv = _walk(_dkv_tile, (k, v, Lse + at, Delta + at), (dk, dv), queries, S.m, scale * LOG2E, S)
    _store(dK, row, kv * S.hd, k_stride, left, dk * scale, S)
    _store(dV, row, kv * S.hd, k_stride, left, dv, S)


def key_launch(q: Tensor, k: Tensor, v: Tensor, axis: tuple[int, int, int], ranges: tuple, tiles: Tiles,
               **others: Tensor) -> Launch:
    """Of the dkv kernel, for one source of keys. axis: (new keys, cached keys, where k begins among all)."""
    new, old, first = axis
    job = ranges, *q.shape[:2], new, old, tiles.n, first, k.shape[1]
    plan, runs = _on_device(key_plan, job, q.device)
    args = _shared_args(q, k, v, tiles) | others | dict(
        Plan=plan, Runs=runs, Q_tma=_descriptor(q, tiles.m, tiles),
        dOut_tma=_descriptor(others["dOut"], tiles.m, tiles))
    return Launch(_dkv_kernel, (len(plan), k.shape[2]), tiles, args)


class _Attention(torch.autograd.Function):
    """All kernels of sections 3 and 4 as one differentiable step."""

    @staticmethod
    def forward(ctx, q, k, v, k_old, v_old, ranges, tiles):
        cached = None if k_old is None else (k_old, v_old)
        out, lse = torch.empty_like(q), q.new_empty(q.shape[2], *q.shape[:2], dtype=torch.float32)
        arch = arch_of(q.device)
        pick = lambda name: tiles or tiles_for(name, arch, q.shape[-1], q.dtype)
        query_launch(_forward_kernel, q, k, v, cached, ranges, pick("forward"), Out=out, Lse=lse).run()
        ctx.save_for_backward(q, k, v, k_old, v_old, out, lse)
        ctx.ranges, ctx.pick = ranges, pick
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, _):
        q, k, v, k_old, v_old, out, lse = ctx.saved_tensors
        cached = None if k_old is None else (k_old, v_old)
        dout, dq, delta = dout.contiguous(), torch.empty_like(q), torch.empty_like(lse)
        rows = dict(dOut=dout, Lse=lse, Delta=delta)
        query_launch(_dq_kernel, q, k, v, cached, ctx.ranges, ctx.pick("dq"), Out=out, dQ=dq, **rows).run()
        old, grads = 0 if cached is None else k_old.shape[1], [dq]
        for first, source in ((old, (k, v)), (0, cached)):
            if source is None:
                grads += [None, None]
                continue
            ks, vs = (u.contiguous() for u in source)
            dk, dv = torch.empty_like(ks), torch.empty_like(vs)
            key_launch(q, ks, vs, (k.shape[1], old, first), ctx.ranges, ctx.pick("dkv"), dK=dk, dV=dv,
                       **rows).run()
            grads += [dk, dv]
        return *grads, None, None


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
    for a, b in ((k, v), cached or (None, None)):
        same = a is None or a.stride() == b.stride() and _readable(a) and _readable(b)
        pairs += [a, b] if same else [a.contiguous(), b.contiguous()]
    spans = tuple(tuple(map(tuple, row)) for row in ranges.tolist())
    return _Attention.apply(q.contiguous(), *pairs, spans, tiles)


def block_attention(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor,
                    cached: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """magi.block_attention: chunk i of the queries reads the keys [start_i, end_i). See flash_attention."""
    return flash_attention(q, k, v, ranges, cached)[0]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """magi.attention: one chunk that reads all keys."""
    return flash_attention(q, k, v, torch.tensor([[[0, k.shape[1]]]]))[0]


# ----------------------------------------------------------------------------------------------------------
# 5  Fp8 matmul
# ----------------------------------------------------------------------------------------------------------
# e4m3 has 4 bits of exponent and 3 of mantissa: eight steps per factor of two, from 2^-9 to 448. Tensors are
# brought into that range by scales: x = input_scale * x8, w = weight_scale * w8, so x w^T = (x8 w8^T) times
# one number, applied to the float32 sum at the end. What is lost is, first, mantissa: a relative error of up
# to 1/17 per number, 2.7 % rms, which a sum over thousands of terms averages out. Second, what is smaller
# than 2^-10 becomes zero, and that is worse: one outlier sets the scale for all, and a channel 500,000 times
# smaller is gone. Hence the smoothing scales of Wo and fc2, whose inputs have such channels: x_j / s_j and
# w_j * s_j have the same product, and s_j is chosen to leave both moderate (`convert_weights.py quantize`).
#
# The rounding is that of magi.fp8_matmul exactly: float32 division, clamp, to bf16, to e4m3, so both paths
# multiply the same numbers. On the H100 the tensor cores add fp8 products with about 14 bits; every k (at
# most 128) terms their sum is therefore moved to float32 registers, which is what makes "float32
# accumulation" true.

BAND = tl.constexpr(8)


@triton.jit
def _quantise_kernel(X, Divide, X8, rows, width, T: tl.constexpr):
    """x / divide in e4m3, in one pass: 2 + 1 bytes per element where PyTorch's five passes move 31."""
    row = tl.program_id(0) * T.m + tl.arange(0, T.m)[:, None]
    col = tl.program_id(1) * T.n + tl.arange(0, T.n)[None, :]
    at, mask = row.to(tl.int64) * width + col, (row < rows) & (col < width)
    x = tl.load(X + at, mask, 0.0).to(tl.float32)
    x = tl.div_rn(x, tl.load(Divide + col, col < width, 1.0))                # `/` would be off by an ulp
    x = tl.clamp(x, -448.0, 448.0, tl.PropagateNan.ALL)
    tl.store(X8 + at, _cast(_cast(x, tl.bfloat16).to(tl.float32), tl.float8e4nv), mask)


@triton.jit
def _fp8_kernel(X8, W8, Scale, Out, rows, cols, width, T: tl.constexpr):
    """One tile of (x8 w8^T) * scale. Both operands are stored along the inner axis, as wgmma wants."""
    # Programs that run together should share operands in the L2 cache: go down in bands of BAND tiles.
    pid, down, across = tl.program_id(0), tl.cdiv(rows, T.m), tl.cdiv(cols, T.n)
    band = pid // (BAND * across) * BAND
    high = tl.minimum(down - band, BAND)
    row, col = (band + pid % (BAND * across) % high) * T.m, pid % (BAND * across) // high * T.n
    at_row, at_col = row + tl.arange(0, T.m)[:, None], col + tl.arange(0, T.n)[None, :]
    acc = tl.zeros((at_row + at_col).shape, tl.float32)
    for k in tl.range(0, width, T.k):
        if T.tma:                                                            # zeros beyond the edges
            x, w = X8.load([row, k]), W8.load([col, k]).T
        else:                                                                # beyond the edge: the last again
            inner = k + tl.arange(0, T.k)
            x_at = tl.minimum(at_row, rows - 1).to(tl.int64) * width + inner[None, :]
            w_at = tl.minimum(at_col, cols - 1).to(tl.int64) * width + inner[:, None]
            x = tl.load(X8 + x_at, (inner < width)[None, :], 0.0)
            w = tl.load(W8 + w_at, (inner < width)[:, None], 0.0)
        acc = tl.dot(x, w, acc, max_num_imprecise_acc=T.k)
    tl.store(Out + at_row.to(tl.int64) * cols + at_col, _cast(acc * tl.load(Scale), tl.bfloat16),
             (at_row < rows) & (at_col < cols))


def quantise_launch(x: Tensor, divide: Tensor, x8: Tensor, tiles: Tiles = Tiles(4, 1024)) -> Launch:
    args = dict(X=x, Divide=divide, X8=x8, rows=x.shape[0], width=x.shape[1], T=tiles)
    grid = triton.cdiv(x.shape[0], tiles.m), triton.cdiv(x.shape[1], tiles.n)
    return Launch(_quantise_kernel, grid, tiles, args)


def fp8_launch(x8: Tensor, weight: Tensor, scale: Tensor, out: Tensor, tiles: Tiles) -> Launch:
    (rows, width), cols = x8.shape, len(weight)
    tiles = tiles._replace(tma=tiles.tma and width % 16 == 0)                # rows must start at 16 bytes
    if tiles.tma:
        x8, weight = (TensorDescriptor(u, list(u.shape), [width, 1], [block, tiles.k])
                      for u, block in ((x8, tiles.m), (weight, tiles.n)))
    args = dict(X8=x8, W8=weight, Scale=scale, Out=out, rows=rows, cols=cols, width=width, T=tiles)
    return Launch(_fp8_kernel, (triton.cdiv(rows, tiles.m) * triton.cdiv(cols, tiles.n),), tiles, args)


def fp8_matmul(x: Tensor, weight: Tensor, divide: Tensor, scale: Tensor) -> Tensor:
    """magi.fp8_matmul: x (..., in) any float, weight (out, in) e4m3, divide (in,) or (1, in), scale (1,)
    -> (..., out) bf16. GPUs without fp8 arithmetic (before sm_89), and training, take the reference, which
    dequantises."""
    native = x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) >= (8, 9)
    if not native or x.requires_grad and torch.is_grad_enabled():
        return magi.fp8_matmul(x, weight, divide, scale)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    x8 = torch.empty_like(rows, dtype=torch.float8_e4m3fn)
    out = rows.new_empty(len(rows), len(weight), dtype=torch.bfloat16)
    quantise_launch(rows, divide.float().contiguous(), x8).run()
    fp8_launch(x8, weight.contiguous(), scale.float(), out, tiles_for("fp8", arch_of(x.device))).run()
    return out.unflatten(0, x.shape[:-1])


# ----------------------------------------------------------------------------------------------------------
# 6  Elementwise
# ----------------------------------------------------------------------------------------------------------
# Norms, gates and rotations do a few operations per number, and an H100 can do some 40 (outside its tensor
# cores) in the time it takes to fetch one from memory. Their cost is the bytes they move, and PyTorch moves
# every intermediate twice. Per element of the activations, bf16 in and out (r read, w written; gates, angles
# and norms are small beside x, and stay in the cache):
#
#     gated_residual   gate to all rows w4 · branch to float32 r2 w4 · product r8 w4 · norm r4 w4 ·
#                      x to float32 r2 w4 · sum r8 w4 · to bf16 r4 w2           54 bytes, in one pass  6
#     norm_rotary      to float32 r2 w4 · norm r4 w4 · on 3/4 of the width: two products r8 w8 and
#                      their sum r8 w4 · joined r4 w4 · to bf16 r4 w2           49 bytes, in one pass  4


@triton.jit
def _gated_residual_kernel(X, Gate, Branch, Weight, Bias, Out, tokens, chunk, chunks, width, eps,
                           C: tl.constexpr):
    """x + LN1(gate * branch) of one token, in 6 bytes an element instead of 54. Grid: (B tokens,)."""
    token, cols = tl.program_id(0), tl.arange(0, C)
    mask, at = cols < width, token.to(tl.int64) * width + cols
    gate = token // tokens * chunks + token % tokens // chunk
    u = tl.load(Gate + gate.to(tl.int64) * width + cols, mask, 0.0).to(tl.float32)
    u *= tl.load(Branch + at, mask, 0.0).to(tl.float32)
    u = tl.where(mask, u - tl.sum(u, 0) / width, 0.0)
    u *= tl.rsqrt(tl.sum(u * u, 0) / width + eps)
    u = u * (tl.load(Weight + cols, mask, 0.0) + 1) + tl.load(Bias + cols, mask, 0.0)
    x = tl.load(X + at, mask, 0.0).to(tl.float32)
    tl.store(Out + at, _cast(x + u, Out.dtype.element_ty), mask)


@triton.jit
def _norm_rotary_kernel(X, Weight, Bias, Angles, Out, rows, tokens, heads, eps, HD: tl.constexpr,
                        C: tl.constexpr, PAIRS: tl.constexpr, M: tl.constexpr):
    """LN1, then rotation of the pairs (j, j + PAIRS), for all heads of M tokens, in 4 bytes an element
    instead of 49. Grid: (tiles,).

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


def gated_residual_launch(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, branch: Tensor, eps: float,
                          out: Tensor) -> Launch:
    (B, N, D), n = x.shape, gate.shape[1]
    args = dict(X=x, Gate=gate, Branch=branch, Weight=weight, Bias=bias, Out=out, tokens=N, chunk=N // n,
                chunks=n, width=D, eps=eps, C=triton.next_power_of_2(D))
    return Launch(_gated_residual_kernel, (B * N,), Tiles(1, D, warps=8), args)


def norm_rotary_launch(x: Tensor, weight: Tensor, bias: Tensor, angles: Tensor, eps: float, out: Tensor
                       ) -> Launch:
    (B, N, heads, hd), tiles = x.shape, Tiles(8, x.shape[3])
    args = dict(X=x, Weight=weight, Bias=bias, Angles=angles, Out=out, rows=B * N, tokens=N, heads=heads,
                eps=eps, HD=hd, C=triton.next_power_of_2(hd), PAIRS=angles.shape[1], M=tiles.m)
    return Launch(_norm_rotary_kernel, (triton.cdiv(B * N, tiles.m),), tiles, args)


class _Fused(torch.autograd.Function):
    """Forward by a kernel; backward through the reference, computed again. Both are memory-bound steps that
    training spends little on, and one definition of their gradient is enough."""

    @staticmethod
    def forward(ctx, launch, reference, eps, *tensors):
        ctx.reference, ctx.eps = reference, eps
        ctx.save_for_backward(*tensors)
        tensors = [u.contiguous() for u in tensors]
        out = torch.empty_like(tensors[0])
        launch(*tensors, eps, out).run()
        return out

    @staticmethod
    def backward(ctx, grad):
        tensors = [u.detach().requires_grad_(need)
                   for u, need in zip(ctx.saved_tensors, ctx.needs_input_grad[3:], strict=True)]
        x, weight, bias, *others = tensors
        norm = lambda u: F.layer_norm(u.to(weight.dtype), weight.shape, weight + 1, bias, ctx.eps)
        with torch.enable_grad():
            ctx.reference(x, norm, *others).backward(grad)
        return None, None, None, *(u.grad for u in tensors)


def norm_rotary(x: Tensor, norm: magi.LayerNorm1p, angles: Tensor) -> Tensor:
    """magi.norm_rotary: x (B, N, heads, hd), angles (N, 3 hd/8) float32 -> LN1, rotated, like x."""
    return _Fused.apply(norm_rotary_launch, magi.norm_rotary, norm.eps, x, norm.weight, norm.bias, angles)


def gated_residual(x: Tensor, gate: Tensor, branch: Tensor, norm: magi.LayerNorm1p) -> Tensor:
    """magi.gated_residual: x + LN1(gate * branch); x, branch (B, N, D), gate (B, n, D), n dividing N."""
    magi._require(x.shape[1] % gate.shape[1] == 0,
                  f"{x.shape[1]} tokens do not divide into {gate.shape[1]} chunks")
    reference = lambda x, norm, gate, branch: magi.gated_residual(x, gate, branch, norm)
    return _Fused.apply(gated_residual_launch, reference, norm.eps, x, norm.weight, norm.bias, gate, branch)


TRITON_OPS = SimpleNamespace(name="triton", attention=attention, block_attention=block_attention,
                             norm_rotary=norm_rotary, gated_residual=gated_residual, fp8_matmul=fp8_matmul)

# ----------------------------------------------------------------------------------------------------------
# 7  Tile sizes
# ----------------------------------------------------------------------------------------------------------
# A tile that stays on chip is read once however many tiles stream past it, so tiles should be large; but they
# must fit into registers and into shared memory (227 KiB on sm_90 and sm_100, 99 KiB on sm_89 and sm_120).
# What does not fit into registers *spills*: it goes to memory and back. Of the sizes that spill nothing, by
# what the compiler says (--compile), these are the largest; nothing here has been timed yet.
#
#   forward  sm_90 and sm_100 multiply from shared memory (wgmma, tcgen05), so 128 x 128 leaves registers for
#            the scores; a step has 64 exponentials a thread to 16 matrix instructions of a warp group. sm_89
#            and sm_120 multiply from registers: half the keys per step, and three stages fit into 99 KiB.
#   dq       holds two tiles, q and do, and needs k twice: half the keys of the forward.
#   dkv      holds four (k, v, dk, dv), two of them in float32. At head width 128 sm_90 spills if it
#            prefetches (2 stages) with 128 keys. 64 x 128 without it takes some 2,000 cycles of matrix
#            products a step and bares some 1,000 of latency; 32 x 64 with it is held up by its 300 other
#            instructions, for a quarter of the work. sm_100 keeps its sums outside the registers, and
#            prefetches with 64 x 64.
#   float32  is split into bf16 parts (`_shared_args`), which doubles every operand: small squares. At head
#            width 256, which no model here has and --compile leaves out, its backward spills even so.
#   fp8      every 128 terms a partial sum moves on sm_90 (section 5), which takes a second set of
#            accumulators: 128 x 256 spills (50 times), 128 x 128 does not. sm_100 has memory of its own for
#            sums, so 256 columns fit. 99 KiB: inner steps of 64.
#   REST     is narrow, as loads at an edge go through registers: in full tiles they were what spilled.
#
# What streams past once (section 6, quantising) needs only enough bytes in flight: its tiles are written
# where it is launched.

# fmt: off
ATTENTION_TILES = {     # (kernel, head width at most): m, n, warps, stages
                          # sm_89             sm_90             sm_100            sm_120
    ("forward", 64):   ((128,  64, 4, 3), (128, 128, 8, 3), (128, 128, 8, 3), (128,  64, 8, 3)),
    ("forward", 128):  ((128,  64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 2), (128,  64, 8, 2)),
    ("forward", 256):  (( 32,  32, 4, 1), (128,  64, 8, 2), ( 64,  64, 8, 2), ( 32,  32, 4, 1)),
    ("dq", 64):        ((128,  64, 8, 2), (128, 128, 8, 2), (128, 128, 8, 2), ( 64,  32, 4, 2)),
    ("dq", 128):       ((128,  64, 8, 2), (128,  64, 8, 2), (128,  64, 8, 2), ( 64,  64, 8, 2)),
    ("dq", 256):       (( 32,  32, 4, 1), ( 32,  32, 4, 1), ( 64,  32, 8, 1), ( 32,  32, 4, 1)),
    ("dkv", 64):       (( 32,  64, 8, 2), ( 64, 128, 8, 3), ( 64, 128, 8, 3), ( 32,  64, 4, 1)),
    ("dkv", 128):      (( 32,  64, 4, 2), ( 64, 128, 8, 1), ( 64,  64, 8, 2), ( 32,  32, 4, 2)),
    ("dkv", 256):      (( 32,  32, 8, 1), ( 32,  32, 8, 1), ( 32,  32, 8, 1), ( 32,  32, 8, 1)),
}
FP8_TILES = {89: Tiles(128, 128, 64, 8, 3), 90: Tiles(128, 128, 128, 8, 4, True),
             100: Tiles(128, 256, 128, 8, 4, True), 120: Tiles(128, 128, 64, 8, 3, True)}
# fmt: on


def tiles_for(kernel: str, arch: int, hd: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tiles:
    """The tiles of "forward", "dq", "dkv" or "fp8"; small ones for Triton's interpreter (arch 0)."""
    if arch == 0:
        return Tiles(16, 16, 16)
    if kernel == "fp8":
        return FP8_TILES[arch]
    width = triton.next_power_of_2(hd)
    table, tma = max(64, width), arch >= 90 and hd == width
    if dtype == torch.float32:
        side, warps = {64: (32, 8), 128: (16, 8 if kernel == "dkv" else 4), 256: (16, 8)}[table]
        return Tiles(side, side, 0, warps, 1, tma)
    m, n, warps, stages = ATTENTION_TILES[kernel, table][(89, 90, 100, 120).index(arch)]
    return Tiles(m, n, 0, warps, stages, tma)


# ----------------------------------------------------------------------------------------------------------
# 8  Compiling ahead
# ----------------------------------------------------------------------------------------------------------
# Triton needs no GPU to compile for one. Tensors on the meta device have shapes, strides and types, which
# is all that code depends on. NVIDIA's assembler, in Triton's package, says how many registers a thread
# takes and what spills; the disassembler beside it shows which tensor core instructions came out. What they
# do not say is how fast it runs.

SHARED_BYTES = {89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}      # of a block, at most
# The tensor core's instructions in machine code, for 16-bit (or split float32) and for fp8 matrices.
# sm_90's are wgmma in PTX, sm_100's tcgen05.mma, the others' mma.
TENSOR_CORE = {89: ("HMMA", "QMMA"), 90: ("HGMMA", "QGMMA"), 100: ("UTCHMMA", "UTCQMMA"),
               120: ("HMMA", "QMMA")}


def machine_code(launch: Launch, arch: int) -> tuple[int, int, int, set[str]]:
    """Compile a launch for an architecture, without a GPU: registers of a thread, bytes that spill, bytes of
    shared memory, instructions of the tensor core. Its tensors are best on the meta device."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import mangle_type

    magi._require(not INTERPRETED.value, "TRITON_INTERPRET is set: kernels are interpreted, not compiled")
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.args[parameter.name]
        signature[parameter.name] = "constexpr" if parameter.is_constexpr else mangle_type(value)
        if parameter.is_constexpr:
            constants[parameter.name] = value
        elif isinstance(value, Tensor) or isinstance(value, int) and value % 16 == 0:
            attributes[i,] = [["tt.divisibility", 16]]                       # as the launcher would find out
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), redirect_stdout(io.StringIO()) as log:
        triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
        compiled = triton.compile(ASTSource(launch.kernel, signature, constants, attributes),
                                  target=GPUTarget("cuda", arch, 32),
                                  options=dict(num_warps=launch.tiles.warps, num_stages=launch.tiles.stages))
    registers = int(re.search(r"Used (\d+) registers", log.getvalue())[1])
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", log.getvalue())))
    with tempfile.TemporaryDirectory() as folder:
        (file := Path(folder) / "kernel.cubin").write_bytes(compiled.asm["cubin"])
        nvdisasm = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        code = subprocess.run([nvdisasm, "-c", file], capture_output=True, text=True, check=True).stdout
    return registers, spills, compiled.metadata.shared, set(re.findall(r"\b[A-Z]+MMA\b", code))


def shipped(arch: int) -> dict[str, Launch]:
    """Every kernel x type x head width with its shipped tiles, at the sizes of the 4.5B."""
    tokens, cached, Hq, Hkv, D, ffn = 2 * 12150, 12150, 24, 8, 3072, 12288
    ranges = (((0, cached + tokens // 2), (0, cached + tokens)),)
    make = lambda *shape, dtype=torch.float32: torch.empty(*shape, dtype=dtype, device="meta")
    out = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for hd in (64, 128):
            q, k = make(1, tokens, Hq, hd, dtype=dtype), make(1, tokens, Hkv, hd, dtype=dtype)
            old, lse = (make(1, cached, Hkv, hd, dtype=dtype),) * 2, make(Hq, 1, tokens)
            forward, dq, dkv = (tiles_for(kernel, arch, hd, dtype) for kernel in ("forward", "dq", "dkv"))
            rows = dict(dOut=q, Lse=lse, Delta=lse)
            out |= {
                f"forward {name} {hd}": query_launch(_forward_kernel, q, k, k, old, ranges, forward, Out=q,
                                                     Lse=lse),
                f"dq {name} {hd}": query_launch(_dq_kernel, q, k, k, old, ranges, dq, Out=q, dQ=q, **rows),
                f"dkv {name} {hd}": key_launch(q, k, k, (tokens, cached, cached), ranges, dkv, dK=k, dV=k,
                                               **rows),
            }
        x, gate, d, h = make(1, tokens, D, dtype=dtype), make(1, 2, D, dtype=dtype), make(D), make(128)
        x8 = make(tokens, D, dtype=torch.float8_e4m3fn)
        out |= {
            f"gated_residual {name}": gated_residual_launch(x, d, d, gate, make(1, tokens, D), 1e-6, x),
            f"norm_rotary {name}": norm_rotary_launch(q, h, h, make(tokens, 48), 1e-6, q),
            f"quantise {name}": quantise_launch(x[0], d, x8),
        }
    w8, y = make(ffn, D, dtype=torch.float8_e4m3fn), make(tokens, ffn, dtype=torch.bfloat16)
    return out | {"fp8 matmul": fp8_launch(x8, w8, make(1), y, tiles_for("fp8", arch))}


def compile_row(job: tuple[int, str]) -> tuple[bool, str]:
    """One line of the table: what the machine code says, and whether that is as it should be."""
    arch, name = job
    launch = shipped(arch)[name]
    kernel, tiles = name.split()[0], launch.tiles
    registers, spills, shared, instructions = machine_code(launch, arch)
    wanted = None
    if kernel in ("forward", "dq", "dkv", "fp8"):
        # wgmma and tcgen05 work on 64 rows; smaller tiles (float32) are multiplied by mma everywhere
        wanted = TENSOR_CORE[89 if tiles.m < 64 else arch][kernel == "fp8"]
    checks = ((shared > SHARED_BYTES[arch], "does not fit"), (spills, "spills"),
              (wanted and wanted not in instructions, f"no {wanted}"))
    faults = [text for bad, text in checks if bad]
    size = "x".join(str(u) for u in (tiles.m, tiles.n, tiles.k) if u)
    return not faults, (f"sm_{arch:<4} {name:24} {size:12} {tiles.warps:5} {tiles.stages:6} "
                        f"{registers:9} {spills:6} {shared / 1024:10.1f}  "
                        f"{wanted or '-':8} {', '.join(faults) or 'ok'}")


def compile_all(quick: bool = False) -> bool:
    """Print the table of all kernels on all architectures; True if nothing is wrong. quick: only those that
    the 4.5B runs, in bf16 and fp8 at head width 128."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    print(f"GPU     {'kernel':24} {'tile':12} warps stages registers spills shared/KiB  uses")
    used = lambda name: "fp8" in name or "bfloat16" in name and not name.endswith("64")
    jobs = [(arch, name) for arch in SHARED_BYTES for name in shipped(arch) if used(name) or not quick]
    good = []
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for ok, line in pool.map(compile_row, jobs):
            print(line, flush=True)
            good.append(ok)
    print(f"{sum(good)} of {len(good)} fit, spill nothing and use the expected instructions")
    return all(good)


# ----------------------------------------------------------------------------------------------------------
# 9  Timing
# ----------------------------------------------------------------------------------------------------------
# What a kernel achieves is useful arithmetic over time, whatever it does besides: masked pairs do not
# count. Of the elementwise steps it is bytes over time. Peaks are the makers' figures for dense matrices.

# fmt: off
PEAKS = {                                       # TFLOP/s in bf16 and fp8 (float32 sums), memory in GB/s
    "H100 PCIe": (756, 1513, 2039), "H100 NVL": (835, 1671, 3938), "H100": (989, 1979, 3352),
    "H200":      (989, 1979, 4800), "RTX 4090": (165, 330, 1008),  "B200": (2250, 4500, 8000),
}
MODELS = {                                      # tokens in a chunk, Hq, D, FFN out and in; Hkv 8, hd 128
    "4.5B 720x720": (12150, 24, 3072, 12288, 12288), "24B 720x1280": (21600, 48, 6144, 32768, 16384),
}
# fmt: on


def comparisons(device: str) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """(what, ours, the reference's, relative error allowed) of every operation on this device."""
    make = partial(torch.randn, device=device)
    ranges = torch.tensor([[[0, 500], [130, 731], [7, 1031]], [[0, 3], [400, 1031], [399, 401]]])
    for dtype, bar in ((torch.float32, 1e-4), (torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)):
        for hd in (16, 48, 64, 128, 256):
            shapes = (999, 6), (631, 2), (631, 2), (400, 2), (400, 2)
            inputs = [make(2, tokens, heads, hd).to(dtype) for tokens, heads in shapes]
            grad = make(2, 999, 6, hd).to(dtype)
            results = []
            for op, kind in ((block_attention, dtype), (magi.block_attention, torch.float64)):
                ins = [u.to(kind, copy=True).requires_grad_() for u in inputs]
                with torch.enable_grad():
                    out = op(*ins[:3], ranges, tuple(ins[3:]))
                results.append([out, *torch.autograd.grad(out, ins, grad.to(kind))])
            names = "out", "dq", "dk", "dv", "dk cached", "dv cached"
            for name, ours, exact in zip(names, *results, strict=True):
                yield f"attention {dtype} hd {hd} {name}", ours, exact, bar if name == "out" else 2 * bar
    for dtype, bar in ((torch.float32, 1e-5), (torch.bfloat16, 5e-3)):
        norm, angles = magi.LayerNorm1p(128).to(device), 20 * make(300, 48)
        args = make(2, 300, 24, 128).to(dtype), norm, angles
        yield f"norm_rotary {dtype}", norm_rotary(*args), magi.norm_rotary(*args), bar
        x, gate, branch = make(2, 300, 3072).to(dtype), make(2, 3, 3072).to(dtype), make(2, 300, 3072)
        args = x, gate, branch, magi.LayerNorm1p(3072).to(device)
        yield f"gated_residual {dtype}", gated_residual(*args), magi.gated_residual(*args), bar
    weight = make(1000, 3072).to(torch.float8_e4m3fn)
    args = make(999, 3072).bfloat16(), weight, torch.rand(1, 3072, device=device) + 0.5, make(1).abs()
    yield "fp8_matmul", fp8_matmul(*args), magi.fp8_matmul(*args), 2e-3


def flex(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, chunk: int) -> Callable[[], Tensor]:
    """PyTorch's FlexAttention with the same ranges, compiled in the first call."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    start, end = ranges[0].to(q.device).unbind(-1)
    seen = lambda b, h, i, j: (j >= start[i // chunk]) & (j < end[i // chunk])
    q, k, v = (u.transpose(1, 2) for u in (q, k, v))

    @lru_cache
    def compiled() -> Callable[[], Tensor]:
        # _compile: without it the mask of all pairs is written out first, 9 GB for the 24B
        mask = create_block_mask(seen, None, None, q.shape[2], k.shape[2], device=q.device, _compile=True)
        return partial(torch.compile(flex_attention), q, k, v, block_mask=mask, enable_gqa=True)

    return lambda: compiled()()


def cases(device: str) -> Iterator[tuple[str, str, float, Callable[[], object]]]:
    """(what, kind of peak, useful work, call) of every row, at the sizes of the models."""
    make = lambda *shape, dtype=torch.bfloat16: torch.randn(*shape, device=device).to(dtype)
    one = torch.ones(1, device=device)
    for model, (c, Hq, D, fc1, fc2) in MODELS.items():
        # four chunks in flight that see 2, 3, 4, 5 chunks, one of them clean: the pipeline in full swing
        q, k, v = (make(1, 4 * c, heads, 128) for heads in (Hq, 8, 8))
        old = make(1, c, 8, 128), make(1, c, 8, 128)
        joined = [torch.cat(pair, 1) for pair in zip(old, (k, v), strict=True)]
        ranges = torch.tensor([[[0, (i + 2) * c] for i in range(4)]])
        ours, sdpa, work = block_attention, magi.block_attention, 4 * (2 + 3 + 4 + 5) * c * c * Hq * 128
        yield f"{model} attention", "bf16", work, partial(ours, q, k, v, ranges, old)
        yield "- SDPA per chunk, joining the cache", "bf16", work, partial(sdpa, q, k, v, ranges, old)
        yield "- FlexAttention, cache joined before", "bf16", work, flex(q, *joined, ranges, c)
        ins, grad = [u.requires_grad_() for u in (q, *joined)], torch.randn_like(q)
        for label, op in ((f"{model} attention, backward", ours), ("- SDPA, backward", sdpa)):
            with torch.enable_grad():
                out = op(*ins, ranges)
            yield label, "bf16", 2.5 * work, partial(torch.autograd.grad, out, ins, grad, retain_graph=True)
        ranges, work = torch.tensor([[[i * 200, (i + 1) * 200] for i in range(4)]]), 16 * 200 * c * Hq * 128
        yield f"{model} cross-attention, 200 tokens each", "bf16", work, partial(ours, q, k, v, ranges)

        for name, width, cols in (("q", D, Hq * 128), ("fc1", D, fc1), ("fc2", fc2, D)):
            x, w8 = make(4 * c, width), make(cols, width, dtype=torch.float8_e4m3fn)
            x8, out, work = x.to(torch.float8_e4m3fn), make(4 * c, cols), 2 * 4 * c * width * cols
            whole = partial(fp8_matmul, x, w8, one.expand(width), one)
            yield f"{model} fp8 {name}, with quantising", "fp8", work, whole
            launch = fp8_launch(x8, w8, one, out, tiles_for("fp8", arch_of(device)))
            yield "- product alone", "fp8", work, launch.run
            scaled = partial(torch._scaled_mm, x8, w8.t(), one, one, out_dtype=torch.bfloat16)
            yield "- torch._scaled_mm alone", "fp8", work, scaled
            yield "- bf16 product", "bf16", work, partial(F.linear, x, w8.bfloat16())

        x, gate, branch = (make(1, rows, D) for rows in (4 * c, 4, 4 * c))
        heads, angles = make(1, 4 * c, Hq, 128), make(4 * c, 48, dtype=torch.float32)
        norm, qk = (magi.LayerNorm1p(width).to(device) for width in (D, 128))
        for who, ops in ((f"{model}", TRITON_OPS), ("- PyTorch", magi.TORCH_OPS)):
            gated = partial(ops.gated_residual, x, gate, branch, norm)
            yield f"{who} gated_residual", "memory", 6 * x.numel(), gated
            rotary = partial(ops.norm_rotary, heads, qk, angles)
            yield f"{who} norm_rotary", "memory", 4 * heads.numel(), rotary


@torch.no_grad()
def report(device: str, file: Path) -> None:
    """Check every operation, time every case; print both, write the times to a file as a markdown table.
    Raises ValueError if a result is off."""
    for label, ours, exact, bar in comparisons(device):
        error = ((ours.double() - exact.double()).norm() / exact.double().norm()).item()
        print(f"{label:48} relative error {error:.1e}  (bar {bar:.0e})")
        magi._require(error < bar, f"{label} is wrong: error {error}")
    card = torch.cuda.get_device_name(device)
    known = (peaks for name, peaks in PEAKS.items() if all(word in card for word in name.split()))
    peaks = dict(zip(("bf16", "fp8", "memory"), next(known, (math.nan,) * 3), strict=True))
    lines = [f"{card}, torch {torch.__version__}, triton {triton.__version__}", "",
             f"| {'':44} | {'ms':>9} | {'rate':>14} | of peak |",
             f"|{'-' * 46}|{'-' * 10}:|{'-' * 15}:|{'-' * 8}:|"]
    print(*lines, sep="\n")
    for label, kind, work, run in cases(device):
        unit, size = ("GB/s", 1e9) if kind == "memory" else ("TFLOP/s", 1e12)
        try:
            ms = triton.testing.do_bench(run, return_mode="median")
            rate = work / ms * 1e3 / size
            share = f"{rate / peaks[kind]:.0%}".replace("nan%", "-")
            row = f"{ms:9.3f} | {rate:6.1f} {unit:7} | {share:>7}"
        except Exception as error:              # a peer that cannot run here must not end the table
            row = f"failed: {(str(error) or type(error).__name__).splitlines()[0][:60]} | | "
        lines.append(f"| {label:44} | {row} |")
        print(lines[-1], flush=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check and time the kernels on a GPU, or compile them.")
    parser.add_argument("--compile", action="store_true", help="for all architectures; needs no GPU")
    parser.add_argument("--quick", action="store_true", help="with --compile: only what the 4.5B runs")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("kernels.md"), help="where the table of times goes")
    args = parser.parse_args(argv)
    try:
        if args.compile:
            return 0 if compile_all(args.quick) else 1
        magi._require(args.out.parent.is_dir(), f"cannot write {str(args.out)!r}: create its folder first")
        magi._require(re.fullmatch(r"cpu|cuda(:\d+)?", args.device),
                      f"device {args.device!r} is unknown: try cuda or cuda:1")
        arch_of(args.device)
        with torch.cuda.device(args.device):
            report(args.device, args.out)
    except ValueError as error:
        print(f"kernels: {error} (python kernels.py --compile needs no GPU)", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
