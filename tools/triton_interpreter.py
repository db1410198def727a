"""Mends two faults of Triton 3.7's interpreter (TRITON_INTERPRET=1), which runs kernels on a CPU for tests.

It multiplies bf16 by bit patterns, and cuts off where a GPU rounds to nearest even (from float32). A third of
its time goes into what it does again and again: that is done once.
Imported once by kernels.py, in the interpreter only: compiled code does not know this file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton.language as tl
from triton.runtime import interpreter

BITS = {tl.bfloat16: (torch.bfloat16, torch.uint16), tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8)}
convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot
numpy_type_of, patch_language = interpreter._get_np_dtype, interpreter._patch_lang
numpy_type_of_scalar = functools.cache(numpy_type_of)        # which builds a table at each call
patched: set[int] = set()                                    # modules for which it is patched in this launch


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


def numpy_type(kind):
    return numpy_type_of(kind) if kind.scalar.is_ptr() else numpy_type_of_scalar(kind.scalar)


def patch_language_once(function: Callable):
    """A launch patches the language for a kernel and, in its end, restores it; so does each call of a helper,
    but for the end. Once in a launch is enough for the helpers of a module."""
    module = id(function.__globals__)
    if module in patched:
        return None
    scope = patch_language(function)
    restore = scope.restore

    def restore_and_forget():
        patched.clear()
        restore()

    patched.add(module)
    scope.restore = restore_and_forget
    return scope


interpreter._patch_lang = patch_language_once
interpreter._get_np_dtype = numpy_type
interpreter._convert_float = convert_and_round
interpreter.InterpreterBuilder.create_dot = dot_of_wide
