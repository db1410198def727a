"""What tools/bench_kernels.py compiles ahead. Its report of times: tests/test_kernels_auto.py."""

import os
import sys

import pytest
import torch
from common import HERE, run_main, run_python

os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU, in Triton's interpreter


@pytest.fixture
def bench(kernels, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(HERE / "tools")])
    import bench_kernels

    return bench_kernels


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_kernels_points_at_compile(bench):
    code, _, err = run_main(bench.main)
    assert code == 2 and err.count("\n") == 1 and "python kernels.py --compile" in err


def assert_compiled(done, rows: int) -> None:
    """They fit into shared memory, spill no register, use the tensor core instruction of the architecture."""
    lines = [line for line in done.stdout.splitlines() if line.startswith(("sm_", "gfx"))]
    assert done.returncode == 0 and len(lines) == rows, done.stdout + done.stderr
    good = {"s": " ok", "g": " compiles, unseen"}  # AMD's have never been run
    assert all(line.endswith(good[line[0]]) for line in lines), done.stdout


ROWS = """
import sys
sys.path.append("tools")
import bench_kernels

needy = "forward", "dq", "dkv", "fp8"
others = "gated_residual", "norm_rotary", "norm", "swiglu", "quantise"
for arch, kinds in (90, needy + others), (120, needy):
    for kind in kinds:
        names = [name for name in bench_kernels.shipped(arch) if name.startswith(kind + " ")]
        name = next(name for name in names if name.endswith(("bfloat16 128", "bfloat16", "matmul")))
        print(bench_kernels.compile_row((arch, name))[1])
"""


def test_kernels_compile(kernels):
    """Every kernel for a card with much shared memory and wgmma, those that need it also for one without."""
    assert_compiled(run_python("-c", ROWS), 9 + 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, rows",
    [
        (["--quick"], 4 * (3 + 5 + 1)),  # attention, elementwise, fp8: .ci/run runs this, too
        ([], 6 * (3 * (2 * 3 + 5) + 2 * 2 * 2 + 2)),  # and other types and tiles
    ],
)
def test_kernels_compile_for_every_architecture(kernels, flags, rows):
    assert_compiled(run_python("kernels.py", "--compile", *flags), rows)


LAUNCHES = """
import sys, torch, magi
from types import SimpleNamespace
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

kernels = magi.load_kernels()
arch = int(sys.argv[1])
driver.set_active(SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", arch, 32),
                                  get_current_device=lambda: 0, get_current_stream=lambda device: 0))
kernels.arch_of = lambda device: arch

def compile_only(kernel, grid, tiles, **args):
    kernel.warmup(grid=grid, **args, num_warps=tiles.warps, num_stages=tiles.stages)
    print(kernel.__name__)

kernels.launch = compile_only
random = lambda *shape: torch.randn(*shape).bfloat16()
shapes = (200, 6), (220, 2), (220, 2)
q, k, v = (random(1, tokens, heads, 128).requires_grad_() for tokens, heads in shapes)
kernels.block_attention(q, k, v, torch.tensor([[[0, 90], [50, 220]]])).sum().backward()
kernels.norm_rotary(random(1, 30, 4, 128), magi.LayerNorm1p(128), torch.randn(30, 48))
kernels.norm_rotary(random(1, 30, 4, 128), magi.LayerNorm1p(128, dtype=torch.bfloat16), None)
kernels.swiglu(random(1, 30, 256))
kernels.gated_residual(random(1, 30, 256), random(1, 3, 256), random(1, 30, 256), magi.LayerNorm1p(256))
kernels.fp8_matmul(random(30, 256), random(64, 256).to(torch.float8_e4m3fn), torch.ones(256), torch.ones(1))
"""


@pytest.mark.slow
@pytest.mark.parametrize("arch", [89, 90])
def test_calls_as_on_a_gpu_compile_just_in_time(kernels, arch):
    """Every operation goes through Triton's own launcher, with a stand-in for the driver, but for the launch:
    arguments are bound, specialised and compiled as a GPU would have it."""
    done = run_python("-c", LAUNCHES, str(arch))
    assert done.stdout.split() == [
        *("_forward_kernel", "_dq_kernel", "_dkv_kernel", "_norm_rotary_kernel", "_norm_rotary_kernel"),
        *("_swiglu_kernel", "_gated_residual_kernel", "_quantise_kernel", "_fp8_kernel"),
    ], done.stderr


def test_the_compile_table_finds_faults(bench, monkeypatch):
    def row(spills=0, shared=90 * 1024, instruction="QMMA") -> tuple[bool, str]:
        monkeypatch.setattr(bench, "machine_code", lambda *_: (200, spills, shared, {instruction}))
        return bench.compile_row((89, "fp8 matmul"))

    assert row()[0] and row()[1].endswith(" ok")
    for changes, fault in (
        (dict(spills=4), "spills"),
        (dict(shared=100 * 1024), "does not fit"),
        (dict(instruction="HMMA"), "no QMMA"),
    ):
        good, line = row(**changes)
        assert not good and line.endswith(fault)
