"""What kernels.py compiles ahead and reports: tables for every architecture, and times."""

import os

import pytest
import torch
from common import bad, run_python

os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU, in Triton's interpreter


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_kernels_points_at_compile():
    done = run_python("kernels.py")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--compile" in done.stderr


@pytest.mark.parametrize(
    "flags, rows",
    [(["--quick"], 4 * (3 + 3 + 1)), pytest.param([], 4 * (3 * (2 * 3 + 3) + 1), marks=pytest.mark.slow)],
)
def test_kernels_compile_for_every_architecture(kernels, flags, rows):
    """They fit into shared memory, spill no register, use the tensor core instruction of the architecture."""
    done = run_python("kernels.py", "--compile", *flags)
    lines = [line for line in done.stdout.splitlines() if line.startswith("sm_")]
    assert done.returncode == 0 and len(lines) == rows, done.stdout + done.stderr
    assert all(line.endswith(" ok") for line in lines), done.stdout


LAUNCHES = """
import sys, torch, kernels, magi
from types import SimpleNamespace
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

arch = int(sys.argv[1])
driver.set_active(SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", arch, 32),
                                  get_current_device=lambda: 0, get_current_stream=lambda device: 0))
kernels.arch_of = lambda device: arch

def compile_only(launch):
    options = dict(num_warps=launch.tiles.warps, num_stages=launch.tiles.stages)
    launch.kernel.warmup(grid=launch.grid, **launch.args, **options)
    print(launch.kernel.__name__)

kernels.Launch.run = compile_only
random = lambda *shape: torch.randn(*shape).bfloat16()
shapes = (200, 6), (120, 2), (120, 2), (100, 2), (100, 2)
q, k, v, *old = (random(1, tokens, heads, 128).requires_grad_() for tokens, heads in shapes)
kernels.block_attention(q, k, v, torch.tensor([[[0, 90], [50, 220]]]), tuple(old)).sum().backward()
kernels.norm_rotary(random(1, 30, 4, 128), magi.LayerNorm1p(128), torch.randn(30, 48))
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
        *("_forward_kernel", "_dq_kernel", "_dkv_kernel", "_dkv_kernel", "_norm_rotary_kernel"),
        *("_gated_residual_kernel", "_quantise_kernel", "_fp8_kernel"),
    ], done.stderr


def test_the_compile_table_finds_faults(kernels, monkeypatch):
    def row(spills=0, shared=90 * 1024, instruction="QMMA") -> tuple[bool, str]:
        monkeypatch.setattr(kernels, "machine_code", lambda *_: (200, spills, shared, {instruction}))
        return kernels.compile_row((89, "fp8 matmul"))

    assert row()[0] and row()[1].endswith(" ok")
    for changes, fault in (
        (dict(spills=4), "spills"),
        (dict(shared=100 * 1024), "does not fit"),
        (dict(instruction="HMMA"), "no QMMA"),
    ):
        good, line = row(**changes)
        assert not good and line.endswith(fault)


def test_the_report_checks_times_and_writes_a_table(kernels, monkeypatch, tmp_path):
    """On the CPU, with launches left out: every row is there; a peer that fails ends nothing."""
    monkeypatch.setattr(kernels, "MODELS", {"tiny": (256, 8, 32, 48, 64)})
    monkeypatch.setattr(kernels.Launch, "run", lambda launch: None)
    monkeypatch.setattr(kernels, "flex", lambda *_: lambda: torch.zeros(1) @ torch.zeros(2))
    monkeypatch.setattr(kernels, "comparisons", lambda _: [("sum", torch.ones(2), torch.ones(2), 0.1)])
    monkeypatch.setattr(kernels.triton.testing, "do_bench", lambda run, **_: run() is None or 2.0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    kernels.report("cpu", tmp_path / "kernels.md")
    lines = (tmp_path / "kernels.md").read_text().splitlines()
    assert lines[0].startswith("NVIDIA H100") and len(lines) == 4 + 6 + 3 * 4 + 4
    assert {line.count("|") for line in lines[2:]} == {5}
    assert [line for line in lines if "failed" in line] == [line for line in lines if "Flex" in line]
    monkeypatch.setattr(kernels, "comparisons", lambda _: [("sum", torch.ones(2), torch.zeros(2) + 2, 0.1)])
    with bad("sum is wrong: error 0.5"):
        kernels.report("cpu", tmp_path / "none.md")
