"""Which kernel a run uses: each is checked on the user's card, timed, and the fastest right one is remembered.

kernels.py has never run on a GPU, and cards differ. So nothing is believed: the first time a run calls an
operation with sizes of some class, every candidate for it

    1  must give what magi.TORCH_OPS gives on a small random input, gradients included where they are asked for;
    2  is timed on the tensors of the run itself (CUDA events, a median), and its result there compared again.

The fastest that passes is used from then on. TORCH_OPS is itself a candidate: a kernel that is wrong, fails or
is slow costs no more than a second, and the video is made. What was found is kept in the user's cache folder, for
this card, driver, torch, Triton and these two files.

    --backend auto      as above; the default on a GPU
    --backend triton    strict: the kernels of kernels.py with their own tiles, and an error if a check fails

    operation                    candidates
    attention, block_attention   ours (two or three stages, narrow tiles), SDPA with cuDNN first, FlexAttention
    fp8_matmul                   ours (two numbers of stages), our quantising with torch._scaled_mm
    all others                   ours
    each                         and "torch", magi.TORCH_OPS

What no check can undo: a kernel that reads outside its tensors ends all work on the GPU in this process. Its name is
written down before it is tried, so that the next run avoids it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor, nn

import magi

kernels = magi.load_kernels()
OPERATIONS = ("attention", "block_attention", "norm_rotary", "gated_residual", "swiglu", "fp8_matmul")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BARS = {torch.float32: 2e-4, torch.float16: 4e-3, torch.bfloat16: 1.5e-2}     # relative error of a result; twice
                                                                              # that of a gradient
LONG = 5.0                        # ms: where no call takes this long, FlexAttention is not worth its compiling


# ----------------------------------------------------------------------------------------------------------
# 1  The card
# ----------------------------------------------------------------------------------------------------------


def milliseconds(run: Callable[[], object], enough: float = math.inf) -> float:
    """Median time of a call on the GPU, after a first one that compiles. A few calls, 50 ms of them in all; only one
    if that takes longer than `enough`. Small inputs may still lie in the L2 cache from the call before."""
    run()
    times: list[float] = []
    while len(times) < 3 or len(times) < 20 and sum(times) < 50:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
        if times[0] > enough:
            break
    return median(times)


class Card(NamedTuple):
    """All that choosing needs to know of a GPU. Tests put a stand-in here."""

    name: str                                         # "NVIDIA H100 80GB HBM3"
    versions: str                                     # what was found holds for these only
    milliseconds: Callable[..., float] = milliseconds
    synchronize: Callable[[], None] = lambda: None    # raises if a kernel has broken the process' work
    tokens: int = 300                                 # in a small input: more than two tiles, and a rest


@lru_cache
def card_of(device: torch.device) -> Card:
    files = b"".join(Path(file).read_bytes() for file in (__file__, kernels.__file__))
    versions = [torch.__version__, triton.__version__, hashlib.sha256(files).hexdigest()[:12]]
    if device.type != "cuda":
        return Card("Triton's interpreter", " ".join(versions), lambda *_: 0.0, tokens=40)
    driver = torch.version.hip or torch._C._cuda_getDriverVersion()
    return Card(torch.cuda.get_device_name(device), f"driver {driver} " + " ".join(versions),
                synchronize=partial(torch.cuda.synchronize, device))


# ----------------------------------------------------------------------------------------------------------
# 2  Candidates
# ----------------------------------------------------------------------------------------------------------


def cudnn_first(op: Callable) -> Callable:
    """The readable path, with cuDNN's attention before PyTorch's own where it can be had: on an H100 it is nearly
    twice as fast (631 against 329 TFLOP/s at (1, 24, 4608, 128), measured by others: pytorch issue 142132)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

    def run(*args: Any) -> Tensor:
        with sdpa_kernel(order, set_priority=True):
            return op(*args)

    return run


def flex_attention(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, out: Tensor | None = None) -> Tensor:
    """PyTorch's FlexAttention with the same spans. It compiles for seconds in its first call."""
    rows = tuple(tuple(map(tuple, row)) for row in spans.tolist())
    mask = _flex_mask(rows, len(q), q.shape[1], k.shape[1], q.device)
    q, k, v = (u.transpose(1, 2) for u in (q, k, v))
    result = _flex()(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)
    return result if out is None else out.copy_(result)


@lru_cache
def _flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True, dynamic=True)      # uncompiled it would hold all scores


@lru_cache(64)
def _flex_mask(spans: tuple, B: int, N: int, M: int, device: torch.device) -> object:
    from torch.nn.attention.flex_attention import create_block_mask

    start, end = torch.tensor(spans, device=device).expand(B, -1, -1).unbind(-1)
    size = -(-N // start.shape[1])
    seen = lambda b, h, i, j: (j >= start[b, i // size]) & (j < end[b, i // size])
    # _compile: without it the mask of all pairs is written out first, 9 GB for the 24B
    return create_block_mask(seen, B, None, N, M, device=device, _compile=device.type == "cuda")


def _scaled_mm(x8: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    scale = scale.float().reshape(1)
    return torch._scaled_mm(x8, weight.t(), torch.ones_like(scale), scale, out_dtype=torch.bfloat16)


def candidates(operation: str, device: torch.device) -> dict[str, Callable]:
    """Name -> a function with the operation's signature; ours first, the readable path last."""
    plain, arch = getattr(magi.TORCH_OPS, operation), kernels.arch_of(device)
    found = {"triton": getattr(kernels, operation)}
    if operation.endswith("attention"):
        def with_tiles(change: str) -> Callable:
            def pick(kernel: str, **what: Any) -> kernels.Tiles:
                return kernels.variants(tiles_for(kernel, **what)).get(change) or tiles_for(kernel, **what)
            return partial(getattr(kernels, operation), tiles=pick)
        tiles_for = kernels.tiles_for
        table = kernels.variants(tiles_for("forward", arch, 128))
        found |= {f"triton{change}": with_tiles(change) for change in table if change}
        found["cudnn"] = cudnn_first(plain)
        if operation == "block_attention":
            found["flex"] = flex_attention
    if operation == "fp8_matmul":
        pass
    return found | {"torch": plain}
