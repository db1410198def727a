"""Which kernel a run uses: each is checked on the user's card and timed; the fastest right one is remembered.

kernels.py has never run on a GPU, and cards differ. So no kernel is trusted before it is checked. The first
time a run calls an operation with sizes of some class (`size_class`), every candidate

    1  must give what magi.TORCH_OPS gives on a small random input, with gradients where they are asked for;
    2  is compared again on the tensors of the run itself, and timed on those (CUDA events, a median).

The fastest that passes is used from then on. TORCH_OPS is a candidate too, so a kernel that is wrong, slow or
broken costs a second at most, and the video is made. The choice is kept in a file in the user's cache folder;
it holds for this card, driver, torch, Triton and version of these two files.

    --backend auto      as above; the default on a GPU
    --backend triton    strict: the kernels of kernels.py with their own tiles; a failed check is an error

    operation                    candidates
    attention                    ours (also with a stage less, or narrow tiles), SDPA with cuDNN first
    block_attention              the same, and FlexAttention
    fp8_matmul                   ours (also with 3 stages), our quantising with torch._scaled_mm
    norm_rotary, gated_residual, swiglu              ours
    all of these                 and "torch", the operation of magi.TORCH_OPS

One fault no check can undo: a kernel that reads outside its tensors ends all work of the process on the GPU.
So its name is written to the file before it is tried, and the next run avoids it. This file has not run on a
GPU yet either: the tests put a stand-in in its place (`Card`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
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
from triton.errors import TritonError

import magi
import outputs
from checkpoints import KernelError

kernels = magi.load_kernels()
OPERATIONS = ("attention", "block_attention", "norm_rotary", "gated_residual", "swiglu", "fp8_matmul")
# The largest relative error of a result that rounding explains; for a gradient it is twice as much.
BARS = {torch.float32: 2e-4, torch.float16: 4e-3, torch.bfloat16: 1.5e-2}
LONG = 5.0                        # ms: for shorter calls FlexAttention is not worth the time it compiles
TRIED = "the process ended while it was tried"   # is noted before a trial, and taken back if it ends well


# ----------------------------------------------------------------------------------------------------------
# 1  The card
# ----------------------------------------------------------------------------------------------------------


def milliseconds(run: Callable[[], object], enough: float = math.inf) -> float:
    """Median time of a call on the GPU, after a first one that compiles. At least three calls are timed
    (fewer if these last 200 ms, one if it lasts longer than `enough`), then more, up to 20, until all have
    lasted 50 ms. Small inputs may still lie in the L2 cache from the call before."""
    run()
    times: list[float] = []
    while len(times) < 20 and sum(times) < (50 if len(times) >= 3 else 200):
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
    versions: str                                     # of driver and code: choices hold for these only
    milliseconds: Callable[..., float] = milliseconds
    synchronize: Callable[[], None] = lambda: None    # raises if a kernel has ended the process' work there
    tokens: int = 300                                 # in a small input: more than two tiles, and a rest


@lru_cache
def card_of(device: torch.device) -> Card:
    files = b"".join(Path(file).read_bytes() for file in (__file__, kernels.__file__))
    versions = [torch.__version__, triton.__version__, hashlib.sha256(files).hexdigest()[:12]]
    if device.type != "cuda":
        return Card("Triton's interpreter", " ".join(versions), lambda *_: 0.0, tokens=40)
    driver = torch.version.hip or torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    return Card(torch.cuda.get_device_name(device), f"driver {driver} " + " ".join(versions),
                synchronize=partial(torch.cuda.synchronize, device))


# ----------------------------------------------------------------------------------------------------------
# 2  Candidates
# ----------------------------------------------------------------------------------------------------------


def cudnn_first(op: Callable) -> Callable:
    """magi.py's attention, where PyTorch takes cuDNN's kernel, if it can, before its own. Others measured it
    nearly twice as fast on an H100 (631 against 329 TFLOP/s at (1, 24, 4608, 128); pytorch issue 142132)."""
    from torch.nn.attention import SDPBackend as SDP
    from torch.nn.attention import sdpa_kernel

    order = [SDP.CUDNN_ATTENTION, SDP.FLASH_ATTENTION, SDP.EFFICIENT_ATTENTION, SDP.MATH]
    return sdpa_kernel(order, set_priority=True)(op)             # in force during each call of op


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

    # uncompiled, it would hold all scores
    return torch.compile(flex_attention, fullgraph=True, dynamic=True)


@lru_cache(64)
def _flex_mask(spans: tuple, B: int, N: int, M: int, device: torch.device) -> object:
    from torch.nn.attention.flex_attention import create_block_mask

    start, end = torch.tensor(spans, device=device).expand(B, -1, -1).unbind(-1)
    size = N // start.shape[1]                                   # tokens of a chunk
    seen = lambda b, h, i, j: (j >= start[b, i // size]) & (j < end[b, i // size])
    # Without _compile the mask of all pairs is written to memory first, 9 GB for the 24B.
    return create_block_mask(seen, B, None, N, M, device=device, _compile=device.type == "cuda")


def other_tiles(changed: str, change: Callable) -> Callable:
    """A function like kernels.tiles_for, with other tiles for one kernel. (Those of one stage, as float32 has
    them, are as small as they can be.)"""
    def tiles_for(kernel: str, *others: Any) -> Any:
        tiles = kernels.tiles_for(kernel, *others)
        return change(tiles) if kernel == changed and tiles.stages > 1 else tiles

    return tiles_for


OTHER_STAGES = other_tiles("forward", lambda tiles: tiles._replace(stages=tiles.stages - 1))
# for cross-attention: the tokens of a caption are only a tile or two
NARROW = other_tiles("forward", lambda tiles: tiles._replace(n=tiles.n // 2))
THREE_STAGES = other_tiles("fp8", lambda tiles: tiles._replace(stages=3))


def _scaled_mm(x8: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    scale = scale.float().reshape(1)
    return torch._scaled_mm(x8, weight.t(), torch.ones_like(scale), scale, out_dtype=torch.bfloat16)


def candidates(operation: str) -> dict[str, Callable]:
    """Name -> a function with the operation's signature; ours first, that of magi.py ("torch") last."""
    ours, plain = getattr(kernels, operation), getattr(magi.TORCH_OPS, operation)
    found = {"triton": ours}
    if operation in ("attention", "block_attention"):
        found["triton, other stages"] = partial(ours, tiles=OTHER_STAGES)
        found["triton, narrow"] = partial(ours, tiles=NARROW)
        found["cudnn"] = cudnn_first(plain)
    if operation == "block_attention":
        found["flex"] = flex_attention
    if operation == "fp8_matmul":
        found["triton, 3 stages"] = partial(ours, multiply=partial(kernels.product, tiles=THREE_STAGES))
        found["torch._scaled_mm"] = partial(ours, multiply=_scaled_mm)
    return found | {"torch": plain}


# ----------------------------------------------------------------------------------------------------------
# 3  The check
# ----------------------------------------------------------------------------------------------------------


def small_input(operation: str, args: tuple, tokens: int) -> tuple:
    """Random arguments with the types, widths and weights of these, but few tokens, in numbers that
    do not divide into tiles."""
    x, *others = args
    generator = torch.Generator(x.device).manual_seed(0)         # the run's own random numbers stay

    def random(like: Tensor, *shape: int) -> Tensor:
        return torch.randn(shape, device=like.device, generator=generator).to(like.dtype)

    if operation in ("attention", "block_attention"):
        group, hd = x.shape[2] // others[0].shape[2], x.shape[3]
        q, k, v = random(x, 1, tokens, 2 * group, hd), *(random(x, 1, tokens + 11, 2, hd) for _ in range(2))
        spans = torch.tensor([[[0, tokens + 11], [tokens // 9, tokens // 2]]])
        return (q, k, v, spans) if operation == "block_attention" else (q, k, v)
    if operation == "norm_rotary":
        norm, angles = others
        turns = None if angles is None else 20 * random(angles, 42, angles.shape[1])
        return random(x, 1, 42, *x.shape[2:]), norm, turns
    if operation == "gated_residual":
        (gate, update, norm), D = others, x.shape[2]
        return random(x, 2, 42, D), random(gate, 2, 3, D), random(update, 2, 42, D), norm
    if operation == "swiglu":
        return (random(x, 42, x.shape[-1]),)
    weight, divide, scale = others
    spread = 50 * divide.float().reshape(1, -1)                  # over all of e4m3's steps, up to 448
    return (random(x, tokens, x.shape[-1]) * spread).to(x.dtype), weight[:tokens], divide, scale


def outcome(function: Callable, args: tuple, backward: bool, **options: Any) -> list[Tensor]:
    """The result and, if `backward`, the gradients of all floating-point arguments and parameters (not of
    e4m3 weights)."""
    if not backward:
        with torch.no_grad():
            return [function(*args, **options)]
    keep = lambda u: u              # hooks that do nothing, instead of those of gradient checkpointing around
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, keep):
        floats = lambda u: isinstance(u, Tensor) and u.dtype in BARS
        args = tuple(u.detach().requires_grad_() if floats(u) else u for u in args)
        leaves = [u for u in args if floats(u)]
        leaves += [p for u in args if isinstance(u, nn.Module) for p in u.parameters() if p.requires_grad]
        result = function(*args)
        grad = torch.linspace(-1, 1, result.shape[-1], device=result.device).to(result.dtype)
        grads = torch.autograd.grad(result, leaves, grad.expand_as(result), allow_unused=True)
    given = [torch.zeros_like(u) if g is None else g for u, g in zip(leaves, grads, strict=True)]
    return [result.detach(), *given]


def sampled(results: list[Tensor]) -> list[Tensor]:
    """At most 256 entries along each axis but the last. It is a copy, since the next candidate may write to
    the same `out`; the type stays, as the bar goes by it."""
    steps = lambda u: tuple(slice(None, None, -(-n // 256)) for n in u.shape[:-1])
    return [u[steps(u)].clone() for u in results]


def require_close(results: list[Tensor], expected: list[Tensor]) -> None:
    """Raises ArithmeticError if a result is further from that of magi.py than rounding explains."""
    for i, (ours, exact) in enumerate(zip(results, expected, strict=True)):
        what, bar = f"gradient {i}" if i else "result", BARS.get(results[0].dtype, 0.0) * (2 if i else 1)
        if ours.shape != exact.shape:
            raise ArithmeticError(f"{what} is {tuple(ours.shape)}, not {tuple(exact.shape)}")
        error = ((ours.float() - exact.float()).norm() / exact.float().norm().clamp_min(1e-30)).item()
        if not error <= bar:                         # not `error > bar`, which is false for nan
            raise ArithmeticError(f"{what} is off by {error:.1e}")


# ----------------------------------------------------------------------------------------------------------
# 4  The choice
# ----------------------------------------------------------------------------------------------------------


def size_class(operation: str, args: tuple, backward: bool) -> str:
    """The key of a choice. Calls share it if they have the same types and widths, and numbers of tokens (and
    mean lengths of a span) within a factor of four."""
    log4 = lambda n: (int(n).bit_length() + 1) // 2

    def kind(u: Any) -> str:
        if isinstance(u, nn.Module):
            return str(next(u.parameters()).dtype).removeprefix("torch.")
        if not isinstance(u, Tensor):
            return str(u)
        if not u.is_floating_point():
            return f"spans~{log4((u[..., 1] - u[..., 0]).float().mean())}"
        widths = "x".join(map(str, u.shape[2:] if u.ndim > 2 else u.shape[-1:]))
        return f"{str(u.dtype).removeprefix('torch.')}[{log4(u.numel() // max(1, u.shape[-1]))}]x{widths}"

    return " ".join([operation, *map(kind, args), *["backward"] * backward])


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "magi"


def process_name(pid: int | str) -> str:
    """A living process by its number and, as numbers are used again, when it started; "" if it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state == "Z" else f"process {pid}, started at {fields[18]}"


def in_trial(why: str) -> bool:
    """Whether a reason of failure is only the mark of another process that is trying the kernel right now."""
    mark = re.fullmatch(rf"{TRIED} \((process (\d+), .*)\)", why)
    return mark is not None and process_name(mark[2]) == mark[1]


class BrokenGPU(KernelError):
    """A kernel has ended all work of this process on the GPU."""


class Chooser:
    """The choices made on one card, in this process and, through a file, in earlier ones."""

    def __init__(self, card: Card, strict: bool):
        self.card, self.strict = card, strict
        self.about = f"{card.name}, {card.versions}, {'triton' if strict else 'auto'}"
        digest = hashlib.sha256(self.about.encode()).hexdigest()
        self.file = cache_folder() / f"kernels-{digest[:16]}.json"
        # key of `size_class` -> {"use": name, "ms": {name: time}, "failed": {name: why}}
        self.choices = {key: choice for key, choice in self.remembered().items()
                        if not any(map(in_trial, choice["failed"].values()))}
        self.ready: dict[str, Callable] = {}         # key -> the chosen function, once it is called
        self.said: set[str] = set()                  # warnings that were given

    def remembered(self) -> dict[str, dict]:
        """The choices in the file; none if it does not exist or is damaged."""
        try:
            choices = json.loads(self.file.read_text(encoding="utf-8"))["choices"]
            for key, choice in choices.items():
                names = candidates(key.split()[0]) if not self.strict else ["triton"]
                magi.require(choice["use"] in names, "unknown")
                assert all(ms >= 0 for ms in choice["ms"].values())
                assert all(isinstance(error, str) for error in choice["failed"].values())
            return choices
        except Exception:
            return {}

    def save(self, key: str) -> None:
        """Put what is known of this key into the file; other keys may be another process's by now."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with outputs.locked(self.file, wait=True):
                choices = self.remembered() | {key: self.choices.get(key)}
                known = {"about": self.about, "choices": {k: v for k, v in choices.items() if v}}
                outputs.replace(self.file, lambda new: new.write_text(json.dumps(known, indent=1)))
        except (OSError, ValueError):
            pass                                     # the folder cannot be written: choose again next time

    @torch.compiler.disable
    def call(self, operation: str, *args: Any, **options: Any) -> Tensor:
        """The operation by its fastest right candidate, chosen now if it has not been."""
        tensors = [u for u in args if isinstance(u, Tensor)]
        tensors += [p for u in args if isinstance(u, nn.Module) for p in u.parameters()]
        plain = getattr(magi.TORCH_OPS, operation)
        if any(u.numel() == 0 for u in tensors):
            return plain(*args, **options)           # nothing to choose by
        backward = torch.is_grad_enabled() and any(u.requires_grad for u in tensors)
        key = size_class(operation, args, backward)
        if key not in self.ready:
            if key not in self.choices:
                with torch.cuda.device_of(args[0]):
                    self.choose(key, operation, args, backward, options)
            self.ready[key] = candidates(operation)[self.choices[key]["use"]]
        try:
            return self.ready[key](*args, **options)
        except (RuntimeError, AssertionError, TritonError) as error:         # not those of checkpointing
            choice = self.choices[key]
            if isinstance(error, torch.OutOfMemoryError) or choice["use"] == "torch":
                raise
            self.fail(key, error, choice["use"])     # it was right when chosen, and fails at these sizes
            self.ready[key] = plain
            return plain(*args, **options)

    def choose(self, key: str, operation: str, args: tuple, backward: bool, options: dict) -> None:
        """Check the candidates, time those that are right, and remember the fastest."""
        choice = self.choices[key] = {"use": "torch", "ms": {}, "failed": {}}
        functions = candidates(operation)
        try:
            small = small_input(operation, args, self.card.tokens)
            exact = outcome(functions["torch"], small, backward)

            def check(name: str) -> None:
                require_close(outcome(functions[name], small, backward), exact)
                self.card.synchronize()

            if self.strict:
                self.check_ours(key, check)
            else:
                runs = {name: partial(outcome, function, args, backward, **options)
                        for name, function in functions.items()}
                self.time_all(key, check, runs)
                choice["use"] = min(choice["ms"], key=choice["ms"].get, default="torch")
        except BrokenGPU:
            raise                                    # `fail` has saved which kernel it was
        except BaseException:                        # Ctrl-C, no memory: nothing was found out
            del self.choices[key]
            self.save(key)
            raise
        self.save(key)

    def check_ours(self, key: str, check: Callable[[str], None]) -> None:
        try:
            check("triton")
        except torch.OutOfMemoryError:               # this says nothing about the kernel
            raise
        except Exception as error:
            self.fail(key, error, "triton")
        self.choices[key]["use"] = "triton"

    def time_all(self, key: str, check: Callable[[str], None], runs: dict[str, Callable]) -> None:
        """Check every candidate and note its time, or why it failed. runs: name -> a call to be timed."""
        choice, plain = self.choices[key], runs.pop("torch")
        best, expected = math.inf, None
        try:
            expected = sampled(plain())
            best = choice["ms"]["torch"] = self.card.milliseconds(plain)
        except torch.OutOfMemoryError:               # PyTorch's takes the most memory: try the others
            torch.cuda.empty_cache()
        for name, run in runs.items():
            if name == "flex" and best < LONG:
                continue
            choice["failed"][name] = f"{TRIED} ({process_name(os.getpid())})"
            self.save(key)                           # if this process ends here, the next one reads it
            try:
                check(name)
                # without an expected result, at least twice the same, and no nan
                require_close(sampled(run()), expected or sampled(run()))
                ms = self.card.milliseconds(run, 1.5 * best)
            except torch.OutOfMemoryError:           # there may be room next time: it is not noted as failed
                torch.cuda.empty_cache()
                del choice["failed"][name]
            except Exception as error:
                self.fail(key, error, name)
            else:
                del choice["failed"][name]
                choice["ms"][name] = ms
                best = min(best, ms)

    def fail(self, key: str, error: Exception, name: str) -> None:
        """Note, and warn once, that a candidate failed; "torch" takes its place. Raises KernelError if the
        chooser is strict, BrokenGPU if the GPU takes no more work."""
        choice, operation = self.choices[key], key.split()[0]
        reason = (str(error) or type(error).__name__).strip().splitlines()[0][:160]
        what = f"{self.card.name}: {operation} by {name} fails: {reason}"
        if self.strict:
            raise KernelError(f"{what} (use the backend 'auto' or 'torch')") from error
        choice["failed"][name], choice["use"] = reason, "torch"
        choice["ms"].pop(name, None)
        self.save(key)
        try:
            self.card.synchronize()
        except Exception:
            raise BrokenGPU(f"{what}, and the GPU takes no more work of this process. Run it again: this is "
                            f"remembered, and PyTorch takes its place") from error
        if name.startswith("triton") and what not in self.said:
            warnings.warn(f"{what}; something else takes its place", RuntimeWarning, stacklevel=2)
            self.said.add(what)

    def report(self) -> str:
        """One line: which candidates this process has used, how much faster than PyTorch, and what failed."""
        parts: list[str] = []
        failed: dict[str, str] = {}
        for operation in OPERATIONS:
            used = [self.choices[key] for key in self.ready if key.split()[0] == operation]
            names = " or ".join(dict.fromkeys(choice["use"] for choice in used))
            plain = sum(choice["ms"].get("torch", 0) for choice in used)
            ours = sum(choice["ms"].get(choice["use"], 0) for choice in used)
            faster = plain and ours and names != "torch"
            gain = f" ({plain / ours:.2f} times as fast as torch)" if faster else ""
            failed |= {f"{operation} by {name}": why for choice in used
                       for name, why in choice["failed"].items() if name.startswith("triton")}
            parts += [f"{operation} {names}{gain}"] if used else []
        parts += [f"{what} fails: {why}" for what, why in failed.items()]
        parts += [f"to try again, delete {self.file}"] if failed else []
        return f"kernels on {self.card.name}: " + ("; ".join(parts) or "none used yet")


@dataclass(frozen=True)
class ChosenOps(magi.Ops):
    """Operations that call what a Chooser has chosen; `report()` says in a line what that was."""

    report: Callable[[], str] = str


@lru_cache
def get_ops(backend: str, device: torch.device | str) -> magi.Ops:
    """The operations of "auto" or "triton" on a device. With "auto", a device that kernels.py cannot use gets
    PyTorch's, and a line that says why. Raises ValueError there with "triton"."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    try:
        kernels.arch_of(device)
    except ValueError as error:
        if backend == "triton":
            raise
        warnings.warn(str(error), RuntimeWarning, stacklevel=2)
        return magi.TORCH_OPS
    return chosen_ops(Chooser(card_of(device), strict=backend == "triton"))


def chosen_ops(chooser: Chooser) -> ChosenOps:
    # Functions, not methods: a copy of a model (for an average of its weights) would copy a method's chooser.
    def call(operation: str) -> Callable:
        return lambda *args, **options: chooser.call(operation, *args, **options)

    def block_attention(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, out: Tensor | None = None) -> Tensor:
        options = {} if out is None else {"out": out}            # where to write, not what to compute
        return chooser.call("block_attention", q, k, v, spans, **options)

    functions = {operation: call(operation) for operation in OPERATIONS}
    functions["block_attention"] = block_attention
    return ChosenOps("triton" if chooser.strict else "auto", **functions, matmul_float32=magi.matmul_float32,
                     report=lambda: chooser.report())
