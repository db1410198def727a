"""Reports on kernels.py: check and time every kernel on a GPU, or compile all of them without one.

    python kernels.py               on a GPU: compare with magi.py, then time, beside PyTorch's own kernels
    python kernels.py --compile     anywhere: compile for six architectures; registers, memory, instructions

Nothing in a run of the model needs this file. The first report has not been run on a GPU yet. The second one
says what the machine code looks like, not how fast it is; AMD's is marked "compiles, unseen".
"""

from __future__ import annotations

import io
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import kernel_choice  # noqa: E402
import magi  # noqa: E402
from terminal import Parser, exit_code  # noqa: E402

kernels = magi.load_kernels()

# ----------------------------------------------------------------------------------------------------------
# 1  Compiling ahead
# ----------------------------------------------------------------------------------------------------------
# Triton needs no GPU to compile for one. Tensors on the meta device have shapes, strides and types, which
# is all that code depends on. NVIDIA's assembler, in Triton's package, says how many registers a thread
# takes and what spills; the disassembler beside it shows which tensor core instructions came out. AMD's
# assembly says the same of itself. What neither says is how fast it runs.

SHARED_KIB = {89: 99, 90: 227, 100: 227, 120: 99, 942: 64, 950: 160}                    # of a block, at most
# The tensor core's instructions in machine code, for 16-bit (or split float32) and for fp8 matrices. sm_90's
# are wgmma in PTX, sm_100's tcgen05.mma, the others' mma. gfx942's fp8 is another: e4m3 is widened there.
TENSOR_CORE = {89: ("HMMA", "QMMA"), 90: ("HGMMA", "QGMMA"), 100: ("UTCHMMA", "UTCQMMA"),
               120: ("HMMA", "QMMA"), 942: ("MFMA", "MFMA"), 950: ("MFMA", "MFMA")}


class Launch(NamedTuple):
    """What a kernel is called with."""

    kernel: Any
    tiles: Any
    args: dict[str, Any]


def launches(arch: int, call: Callable[[], object]) -> list[Launch]:
    """The kernels that a call would start on a card of this architecture. None is."""
    found: list[Launch] = []
    note = lambda kernel, grid, tiles, **args: found.append(Launch(kernel, tiles, args))
    with patch.object(kernels, "launch", note), patch.object(kernels, "arch_of", lambda _: arch):
        call()
    return found


def machine_code(launch: Launch, arch: int, multiplies: bool) -> tuple[int, int, int, set[str]]:
    """Compile a launch for an architecture, without a GPU: registers of a thread, bytes that spill, bytes of
    shared memory, instructions of the tensor core. Its tensors are best on the meta device. A kernel that
    multiplies no matrices has no such instructions: the disassembler, which takes a second, is left out."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import mangle_type

    magi.require(not kernels.INTERPRETED, "TRITON_INTERPRET is set: kernels are interpreted, not compiled")
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.args[parameter.name]
        constant = parameter.is_constexpr or value is None
        signature[parameter.name] = "constexpr" if constant else mangle_type(value)
        if constant:
            constants[parameter.name] = value
        elif isinstance(value, Tensor) or isinstance(value, int) and value % 16 == 0:
            attributes[i,] = [["tt.divisibility", 16]]                       # as the launcher would find out
    target = GPUTarget("hip", f"gfx{arch}", 64) if arch in (942, 950) else GPUTarget("cuda", arch, 32)
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), redirect_stdout(io.StringIO()) as log:
        triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
        compiled = triton.compile(ASTSource(launch.kernel, signature, constants, attributes), target=target,
                                  options=dict(num_warps=launch.tiles.warps, num_stages=launch.tiles.stages))
    shared = compiled.metadata.shared
    if target.backend == "hip":
        code = compiled.asm["amdgcn"]
        count = lambda name: int(re.findall(rf"\.{name}:\s+(\d+)", code)[0])
        return count("vgpr_count"), 4 * count("vgpr_spill_count"), shared, {"MFMA"} & set(
            name.upper() for name in re.findall(r"v_(mfma)_", code))
    registers = int(re.findall(r"Used (\d+) registers", log.getvalue())[0])
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", log.getvalue())))
    if not multiplies:
        return registers, spills, shared, set()
    with tempfile.TemporaryDirectory() as folder:
        (file := Path(folder) / "kernel.cubin").write_bytes(compiled.asm["cubin"])
        nvdisasm = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        code = subprocess.run([nvdisasm, "-c", file], capture_output=True, text=True, check=True).stdout
    return registers, spills, shared, set(re.findall(r"\b[A-Z]+MMA\b", code))


@torch.no_grad()
def shipped(arch: int) -> dict[str, Launch]:
    """Every kernel x type x head width with its shipped tiles, at the sizes of the 4.5B."""
    tokens, keys, Hq, Hkv, D, ffn = 2 * 12150, 3 * 12150, 24, 8, 3072, 12288
    spans = torch.tensor([[[0, keys - tokens // 2], [0, keys]]])
    make = partial(torch.empty, device="meta")
    norm = partial(magi.LayerNorm1p, device="meta")
    out = {}

    def ours(operation: str) -> dict[str, Callable]:
        found = kernel_choice.candidates(operation)
        return {name.removeprefix("triton"): found[name] for name in found if name.startswith("triton")}

    def backward() -> None:
        inputs = [u.detach().requires_grad_() for u in (q, k, k)]
        with torch.enable_grad():
            kernels.block_attention(*inputs, spans).sum().backward()

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for hd in (64, 128):
            q, k = make(1, tokens, Hq, hd, dtype=dtype), make(1, keys, Hkv, hd, dtype=dtype)
            half = make(1, tokens, 2, Hq, hd, dtype=dtype)[:, :, 0]          # the other is cross-attention's
            for label, attention in ours("block_attention").items():
                (forward,) = launches(arch, partial(attention, q, k, k, spans, half))
                if not label or forward.tiles != out[f"forward {name} {hd}"].tiles:
                    out[f"forward {name} {hd}{label}"] = forward
            _, out[f"dq {name} {hd}"], out[f"dkv {name} {hd}"] = launches(arch, backward)
        x, gate = make(1, tokens, D, dtype=dtype), make(1, 2, D, dtype=dtype)
        calls = {
            "gated_residual": partial(kernels.gated_residual, x, gate, make(1, tokens, D), norm(D)),
            "norm_rotary": partial(kernels.norm_rotary, q, norm(128), make(tokens, 48)),
            "norm": partial(kernels.norm_rotary, q, norm(128, dtype=dtype), None),
            "swiglu": partial(kernels.swiglu, make(tokens, 2 * ffn, dtype=dtype)),
            "quantise": partial(kernels.quantise, x[0], make(D)),
        }
        for what, call in calls.items():
            (out[f"{what} {name}"],) = launches(arch, call)
    w8 = make(ffn, D, dtype=torch.float8_e4m3fn)
    for label, matmul in ours("fp8_matmul").items():
        _, out[f"fp8 matmul{label}"] = launches(arch, partial(matmul, x, w8, make(D), make(1)))
    return out


def compile_row(job: tuple[int, str]) -> tuple[bool, str]:
    """One line of the table: what the machine code says, and whether that is as it should be."""
    arch, name = job
    launch = shipped(arch)[name]
    kernel, tiles = name.split()[0], launch.tiles
    wanted, broken = None, ""
    multiplies = kernel in ("forward", "dq", "dkv", "fp8")
    try:
        registers, spills, shared, instructions = machine_code(launch, arch, multiplies)
    except Exception as error:                  # the other rows are still wanted
        registers, spills, shared, instructions = 0, 0, 0, set()
        broken = f"does not compile: {str(error).strip().splitlines()[-1][:80]}"
    if multiplies:
        # wgmma and tcgen05 work on 64 rows; smaller tiles (float32) are multiplied by mma everywhere
        wanted = TENSOR_CORE[89 if tiles.m < 64 and arch < 900 else arch][kernel == "fp8"]
    checks = ((broken, broken), (shared > SHARED_KIB[arch] * 1024, "does not fit"), (spills, "spills"),
              (wanted and not broken and wanted not in instructions, f"no {wanted}"))
    faults = [text for bad, text in checks if bad]
    size = "x".join(str(u) for u in (tiles.m, tiles.n, tiles.k) if u)
    end = ", ".join(faults) or ("ok" if arch < 900 else "compiles, unseen")
    return not faults, (f"{'gfx' if arch > 900 else 'sm_'}{arch:<4} {name:32} {size:12} {tiles.warps:5} "
                        f"{tiles.stages:6} {registers:9} {spills:6} {shared / 1024:10.1f}  {wanted or '-':8} "
                        f"{end}")


def compile_all(quick: bool = False) -> bool:
    """Print the table of all kernels on all architectures; True if nothing is wrong. quick: only those that
    the 4.5B runs by default, in bf16 and fp8 at head width 128, on NVIDIA's cards."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    def wanted(arch: int, name: str) -> bool:
        used = "fp8" in name or bool(re.search(r"bfloat16( 128)?$", name))
        return not quick or arch < 900 and "," not in name and used

    print(f"GPU     {'kernel':32} {'tile':12} warps stages registers spills shared/KiB  uses")
    jobs = [(arch, name) for arch in SHARED_KIB for name in shipped(arch) if wanted(arch, name)]
    good = []
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for ok, line in pool.map(compile_row, jobs):
            print(line, flush=True)
            good.append(ok)
    print(f"{sum(good)} of {len(good)} fit, spill nothing and use the expected instructions")
    return all(good)


# ----------------------------------------------------------------------------------------------------------
# 2  Timing
# ----------------------------------------------------------------------------------------------------------
# What a kernel achieves is useful arithmetic over time, whatever it does besides: masked pairs do not
# count. Of the elementwise steps it is bytes over time. Peaks are the makers' figures for dense matrices.
#
# What a whole layer moves with these kernels, outside products and attention, in bytes per token and channel
# of D, for four chunks and one in the cache (4.5B at 720x720: 48,600 tokens of 3,072 channels; 24B at
# 720x1280: 86,400 of 6,144). These are counts, not times.
#
#                                                                             4.5B    24B
#     two layer norms r2 w2                                                    8       8
#     gated_residual: after Wo (update in float32) r6 w2, after fc2 r4 w2     14      14
#     norm_rotary of q and k, norm of qx                                       9.3     8.7
#     gelu r2 w2 on 4 D, or swiglu on 8/3 D                                   16      16
#     keys and values joined with the cache, r2 w2 on 2/3 or 1/3 D of 5/4      3.3     1.7
#     sum                                                                     50.7    48.3
#     in GB                                                                    7.6    25.7
#
# Before, 16 bytes more went into joining both attentions' results and putting them in the order of Wo's
# columns, and swiglu moved r6 w4, 26.7 on 8/3 D: 66.7 and 75.0 in all, 10.0 and 39.8 GB.

# fmt: off
PEAKS = {                                       # TFLOP/s in bf16 and fp8 (float32 sums), memory in GB/s
    "H100 PCIe": (756, 1513, 2039), "H100 NVL": (835, 1671, 3938), "H100": (989, 1979, 3352),
    "H200":      (989, 1979, 4800), "RTX 4090": (165, 330, 1008),  "B200": (2250, 4500, 8000),
}
MODELS = {                                      # tokens in a chunk, Hq, D, FFN out and in; Hkv 8, hd 128
    "4.5B 720x720": (12150, 24, 3072, 12288, 12288), "24B 720x1280": (21600, 48, 6144, 32768, 16384),
}
# fmt: on


def comparisons(device: str) -> Iterator[tuple[str, Callable[[], Sequence[list[Tensor]]], float]]:
    """(what, a call, relative error allowed) of every operation on this device. The call returns our results
    and the reference's: the output and, of attention, gradients, which may be off by twice as much."""
    make = lambda *shape: torch.randn(*shape, device=device)
    spans = torch.tensor([[[0, 500], [130, 731], [7, 1031]], [[0, 3], [400, 1031], [399, 401]]])

    def attention(dtype: torch.dtype, hd: int) -> Sequence[list[Tensor]]:
        shapes = (999, 6), (1031, 2), (1031, 2)
        inputs = [make(2, tokens, heads, hd).to(dtype) for tokens, heads in shapes]
        grad = make(2, 999, 6, hd).to(dtype)
        results = []
        for op, kind in ((kernels.block_attention, dtype), (magi.block_attention, torch.float64)):
            q, k, v = (u.to(kind, copy=True).requires_grad_() for u in inputs)
            with torch.enable_grad():
                out = op(q, k, v, spans)
            results.append([out, *torch.autograd.grad(out, (q, k, v), grad.to(kind))])
        return results

    norm = lambda width, **kind: magi.LayerNorm1p(width, **kind).to(device)
    arguments = {
        "norm_rotary": lambda dtype: (make(2, 300, 24, 128).to(dtype), norm(128), 20 * make(300, 48)),
        "norm_rotary without angles": lambda dtype: (make(2, 300, 24, 128).to(dtype), norm(128, dtype=dtype),
                                                     None),
        "gated_residual": lambda dtype: (make(2, 300, 3072).to(dtype), make(2, 3, 3072).to(dtype),
                                         make(2, 300, 3072), norm(3072)),
        "swiglu": lambda dtype: (make(2, 300, 3072).to(dtype),),
        "fp8_matmul": lambda dtype: (make(999, 3072).to(dtype), make(1000, 3072).to(torch.float8_e4m3fn),
                                     torch.rand(1, 3072, device=device) + 0.5, make(1).abs()),
    }

    def other(name: str, dtype: torch.dtype) -> Sequence[list[Tensor]]:
        args, operation = arguments[name](dtype), name.split()[0]
        return [[getattr(ops, operation)(*args)] for ops in (kernels, magi)]

    for dtype, bar in ((torch.float32, 1e-4), (torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)):
        for hd in (16, 32, 64, 128):
            yield f"attention {dtype} hd {hd}", partial(attention, dtype, hd), bar
    for dtype, bar in ((torch.float32, 1e-5), (torch.bfloat16, 5e-3)):
        for name in [name for name in arguments if name != "fp8_matmul"]:
            yield f"{name} {dtype}", partial(other, name, dtype), bar
    yield "fp8_matmul", partial(other, "fp8_matmul", torch.bfloat16), 2e-3


def failed_checks(device: str) -> dict[str, str]:
    """Check every operation and print by how much it is off. Of what fails: name -> why, in a few words."""
    failed = {}
    for what, compare, bar in comparisons(device):
        try:
            for name, ours, exact in zip(("", " dq", " dk", " dv"), *compare(), strict=False):
                allowed = 2 * bar if name else bar
                error = ((ours.double() - exact.double()).norm() / exact.double().norm()).item()
                print(f"{what + name:48} relative error {error:.1e}  (bar {allowed:.0e})")
                if not error < allowed:                                      # nan is not
                    failed[what + name] = f"off by {error:.1e}"
        except Exception as error:                  # what cannot run here must not end the table
            print(f"{what:48} {in_short(error)}")
            failed[what] = in_short(error)
    return failed


def in_short(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:60]


class Case(NamedTuple):
    """One row of the table."""

    what: str
    peak: str                     # of PEAKS
    work: float                   # operations or bytes
    prepare: Callable             # makes the tensors and returns the call to be timed; nothing of it stays


def cases(device: str) -> Iterator[Case]:
    """Every row, at the sizes of the models."""
    def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        # in pieces: random numbers are float32 first, which for fc1 of the 24B would be 11 GB
        u = torch.empty(shape, device=device, dtype=dtype)
        for piece in u.view(-1).split(2**27):
            piece.copy_(torch.randn(piece.shape, device=device))
        return u

    def attention(op: Callable, c: int, Hq: int, spans: Tensor, keys: int, backward: bool) -> Callable:
        q, k, v = make(1, 4 * c, Hq, 128), make(1, keys, 8, 128), make(1, keys, 8, 128)
        if not backward:
            return partial(op, q, k, v, spans)
        with torch.enable_grad():
            out = op(*(u.requires_grad_() for u in (q, k, v)), spans)
        return partial(torch.autograd.grad, out, (q, k, v), torch.ones_like(out), retain_graph=True)

    def fp8(how: str | Callable, rows: int, width: int, cols: int) -> Callable:
        one, w8 = torch.ones(1, device=device), make(cols, width, dtype=torch.float8_e4m3fn)
        if callable(how):
            return partial(how, make(rows, width), w8, one.expand(width), one)
        if how == "bf16 product":
            return partial(F.linear, make(rows, width), w8.bfloat16())
        x8 = make(rows, width, dtype=torch.float8_e4m3fn)
        if how == "torch._scaled_mm alone":
            return partial(torch._scaled_mm, x8, w8.t(), one, one, out_dtype=torch.bfloat16)
        return partial(kernels.product, x8, w8, one)

    def elementwise(ops: magi.Ops, name: str, c: int, Hq: int, D: int, ffn: int) -> Callable:
        norm = lambda width, **kind: magi.LayerNorm1p(width, **kind).to(device)
        if name == "gated_residual":
            return partial(ops.gated_residual, make(1, 4 * c, D), make(1, 4, D), make(1, 4 * c, D), norm(D))
        if name == "swiglu":
            return partial(ops.swiglu, make(1, 4 * c, 2 * ffn))
        heads = make(1, 4 * c, Hq, 128)
        if name == "norm":
            return partial(ops.norm_rotary, heads, norm(128, dtype=torch.bfloat16), None)
        return partial(ops.norm_rotary, heads, norm(128), make(4 * c, 48, dtype=torch.float32))

    for model, (c, Hq, D, fc1, fc2) in MODELS.items():
        # four chunks in flight that see 2, 3, 4, 5 chunks, one of them clean: the pipeline in full swing
        spans = torch.tensor([[[0, (i + 2) * c] for i in range(4)]])
        texts = torch.tensor([[[i * 200, (i + 1) * 200] for i in range(4)]])
        for what, span, keys, seen, backward in (
            (f"{model} attention", spans, 5 * c, (2 + 3 + 4 + 5) * c, False),
            (f"{model} attention, backward", spans, 5 * c, (2 + 3 + 4 + 5) * c, True),
            (f"{model} cross-attention, 200 tokens each", texts, 800, 4 * 200, False),
        ):
            work = 4 * seen * c * Hq * 128 * (2.5 if backward else 1)
            for name, op in kernel_choice.candidates("block_attention").items():
                label = what if name == "triton" else f"- {name}"
                yield Case(label, "bf16", work, partial(attention, op, c, Hq, span, keys, backward))
        for name, width, cols in (("q", D, Hq * 128), ("fc1", D, fc1), ("fc2", fc2, D)):
            ways = kernel_choice.candidates("fp8_matmul")
            ways |= {how: how for how in ("product alone", "torch._scaled_mm alone", "bf16 product")}
            for how, op in ways.items():
                label = f"{model} fp8 {name}, with quantising" if how == "triton" else f"- {how}"
                yield Case(label, "fp8", 2 * 4 * c * width * cols, partial(fp8, op, 4 * c, width, cols))
        for name, work in (("gated_residual", 6 * 4 * c * D), ("norm_rotary", 4 * 4 * c * Hq * 128),
                           ("norm", 4 * 4 * c * Hq * 128), ("swiglu", 6 * 4 * c * fc2)):
            for who, ops in ((f"{model} {name}", kernels.TRITON_OPS), ("- PyTorch", magi.TORCH_OPS)):
                yield Case(who, "memory", work, partial(elementwise, ops, name, c, Hq, D, fc2))


@torch.no_grad()
def report(device: str, file: Path) -> bool:
    """Check every operation, time every case; print both, write what fails and the times to a file as a
    markdown table, line by line, so that what is measured stays. True if all checks pass."""
    failed = failed_checks(device)
    card = torch.cuda.get_device_name(device)
    known = (peaks for name, peaks in PEAKS.items() if all(word in card for word in name.split()))
    peaks = dict(zip(("bf16", "fp8", "memory"), next(known, (math.nan,) * 3), strict=True))
    with file.open("w", encoding="utf-8") as table:
        def write(line: str) -> None:
            print(line, flush=True)
            print(line, file=table, flush=True)

        write(f"{card}, torch {torch.__version__}, triton {triton.__version__}\n")
        write(f"| {'':44} | {'ms':>9} | {'rate':>14} | of peak |")
        write(f"|{'-' * 46}|{'-' * 10}:|{'-' * 15}:|{'-' * 8}:|")
        for what, why in failed.items():
            write(f"| {what:44} | check failed: {why} | | |")
        for case in cases(device):
            unit, size = ("GB/s", 1e9) if case.peak == "memory" else ("TFLOP/s", 1e12)
            try:
                ms = kernel_choice.milliseconds(case.prepare())
                rate = case.work / ms * 1e3 / size
                share = f"{rate / peaks[case.peak]:.0%}".replace("nan%", "-")
                row = f"{ms:9.3f} | {rate:6.1f} {unit:7} | {share:>7}"
            except Exception as error:              # what cannot run here must not end the table
                row = f"failed: {in_short(error)} | | "
            write(f"| {case.what:44} | {row} |")
    return not failed


def main(argv: Sequence[str] | None = None) -> int:
    """The command line -> its exit code: 1 if a kernel is wrong or does not compile, 2 for what is wrong."""
    what = "Check and time the kernels on a GPU, or compile them."
    parser = Parser(prog="kernels.py", description=what)
    parser.add_argument("--compile", action="store_true", help="for all architectures; needs no GPU")
    parser.add_argument("--quick", action="store_true", help="with --compile: only what the 4.5B runs")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("kernels.md"), help="where the table of times goes")
    args = parser.parse_args(argv)
    if args.compile:
        return exit_code(lambda: 0 if compile_all(args.quick) else 1)
    return exit_code(lambda: 0 if check_and_time(args.device, args.out) else 1)


def check_and_time(device: str, out: Path) -> bool:
    """On a GPU: whether all kernels are right. What is wrong with the flags or the GPU is a ValueError."""
    magi.require(out.parent.is_dir(), f"cannot write {str(out)!r}: create its folder first")
    magi.require(re.fullmatch(r"cpu|cuda(:\d+)?", device),
                 f"device {device!r} is unknown: try cuda or cuda:1")
    try:
        kernels.arch_of(torch.device(device))
    except ValueError as error:
        raise ValueError(f"{error} (python kernels.py --compile needs no GPU)") from None
    with torch.cuda.device(device):
        return report(device, out)


if __name__ == "__main__":
    sys.exit(main())
