"""Mends two faults of Triton 3.7's interpreter (TRITON_INTERPRET=1), which runs kernels on a CPU for tests.

It multiplies bf16 by bit patterns, and cuts off where a GPU rounds to nearest even (from float32).
Imported once by kernels.py, in the interpreter only: compiled code does not know this file.
"""

from __future__ import annotations

import torch
import triton.language as tl
from triton.runtime import interpreter

BITS = {tl.bfloat16: (torch.bfloat16, torch.uint16), tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8)}
convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot


def convert_and_round(x, source, target, mode):
    if source != tl.float32 or target not in BITS:
        return convert(x, source, target, mode)
    kind, bits = BITS[target]
    return torch.tensor(x).to(kind).view(bits).numpy()


def widen(u):
    """bf16, which the interpreter holds as integers, in float32."""
    if u.dtype.scalar != tl.bfloat16:
        return u
    x = convert(u.data, tl.bfloat16, tl.float32, None).view("float32")
    return interpreter.TensorHandle(x, tl.float32)


def dot_of_wide(self, a, b, *others):
    return dot(self, widen(a), widen(b), *others)


interpreter._convert_float = convert_and_round
interpreter.InterpreterBuilder.create_dot = dot_of_wide
