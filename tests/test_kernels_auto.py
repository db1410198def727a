"""kernels.py on the edges, and kernel_choice.py: what is refused, checked, timed, remembered.

No GPU is needed: kernels run in Triton's interpreter, and a stand-in takes the card's place.
"""

import contextlib
import copy
import dataclasses
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import pytest  # noqa: E402
import torch  # noqa: E402
from common import run_main, run_python, shades  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import magi  # noqa: E402

pytest.importorskip("triton")
kernels = magi.load_kernels()
import bench_kernels  # noqa: E402

import checkpoints  # noqa: E402
import finetune  # noqa: E402
import kernel_choice  # noqa: E402
import live  # noqa: E402
import media  # noqa: E402
import sample  # noqa: E402

E4M3 = torch.float8_e4m3fn


def tensors(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def fp8_arguments(rows=5, width=32, cols=16):
    x, weight = tensors((rows, width), (cols, width))
    return dict(x=x.bfloat16(), weight=weight.to(E4M3), divide=torch.ones(width), scale=torch.tensor([0.5]))


# ------------------------------------------------------------------------------------ shapes that do not fit


ATTENTION = dict(q=(1, 4, 4, 16), k=(1, 6, 2, 16), v=(1, 6, 2, 16), spans=[[[0, 6], [2, 5]]])


@pytest.mark.parametrize(
    "change, named",
    [
        (
            dict(v=(1, 3, 2, 16)),
            r"values \(1, 3, 2, 16\)",
        ),  # of these the kernel would read what is not there
        (dict(v=(1, 6, 1, 16)), r"values \(1, 6, 1, 16\)"),
        (dict(k=(1, 6, 3, 16), v=(1, 6, 3, 16)), r"\(1, 6, 3, 16\).*queries \(1, 4, 4, 16\)"),
        (dict(k=(2, 6, 2, 16), v=(2, 6, 2, 16)), r"\(2, 6, 2, 16\)"),
        (dict(k=(1, 6, 2, 32), v=(1, 6, 2, 32)), r"\(1, 6, 2, 32\)"),
        (dict(k=(1, 6, 0, 16), v=(1, 6, 0, 16)), r"\(1, 6, 0, 16\)"),
        (dict(q=(4, 4, 16)), r"queries \(4, 4, 16\) and keys \(1, 6, 2, 16\) must be \(batch, tokens, heads"),
        (dict(k=(6, 2, 16), v=(6, 2, 16)), r"keys \(6, 2, 16\)"),
        (dict(q=(1, 5, 4, 16)), "2 spans do not fit 1 x 5 queries"),
        (dict(spans=[[[0, 6], [2, 5]]] * 3), "3 x 2 spans do not fit 1 x 4"),
        (dict(spans=[[[0, 7], [2, 5]]]), r"span \[0, 7\) of chunk 0"),
        (dict(spans=[[[0, 6], [5, 5]]]), r"span \[5, 5\) of chunk 1 is empty"),
        (dict(q=(1, 4, 4, 24), k=(1, 6, 2, 24), v=(1, 6, 2, 24)), "head width 24 must be 16, 32, 64 or 128"),
        (dict(q=(1, 4, 4, 144), k=(1, 6, 2, 144), v=(1, 6, 2, 144)), "head width 144 .*use .*'torch'"),
        (dict(out=(1, 4, 2, 16)), r"out \(1, 4, 2, 16\).*queries \(1, 4, 4, 16\)"),
    ],
)
def test_attention_refuses_shapes_by_name_before_a_launch(monkeypatch, change, named):
    monkeypatch.setattr(kernels, "launch", lambda *_, **__: pytest.fail("launched"))
    made = {name: u if name == "spans" else torch.zeros(u) for name, u in (ATTENTION | change).items()}
    with pytest.raises(ValueError, match=named):
        kernels.block_attention(**made | dict(spans=torch.tensor(made["spans"])))


def test_attention_refuses_types(monkeypatch):
    monkeypatch.setattr(kernels, "launch", lambda *_, **__: pytest.fail("launched"))
    q, k = tensors((1, 4, 1, 16), (1, 4, 1, 16))
    with pytest.raises(ValueError, match="float64: use float32"):
        kernels.attention(q.double(), k.double(), k.double())
    with pytest.raises(ValueError, match="bfloat16 on cpu do not go with queries"):
        kernels.attention(q, k.bfloat16(), k.bfloat16())
    with pytest.raises(ValueError, match="out .*bfloat16.* must be as queries"):
        kernels.block_attention(q, k, k, torch.tensor([[[0, 4]]]), torch.zeros(1, 4, 1, 16).bfloat16())


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(x=torch.zeros(5, 16).bfloat16()), r"weight \(16, 32\).*\(out, 16\) in e4m3, as x is \(5, 16\)"),
        (dict(weight=torch.zeros(16, 48).to(E4M3)), r"weight \(16, 48\)"),
        (dict(weight=torch.zeros(16, 32).bfloat16()), "weight .*bfloat16 must be"),
        (dict(divide=torch.ones(1)), r"divide \(1,\) must be \(32,\)"),
        (dict(divide=torch.ones(32, 1)), r"divide \(32, 1\)"),
        (dict(scale=torch.ones(16)), r"scale \(16,\) one number"),
    ],
)
def test_fp8_matmul_refuses_shapes_by_name_before_a_launch(monkeypatch, change, named):
    monkeypatch.setattr(kernels, "launch", lambda *_, **__: pytest.fail("launched"))
    with pytest.raises(ValueError, match=named):
        kernels.fp8_matmul(**fp8_arguments() | change)


def test_fused_steps_refuse_shapes_by_name_before_a_launch(monkeypatch):
    monkeypatch.setattr(kernels, "launch", lambda *_, **__: pytest.fail("launched"))
    x, heads, norm = torch.zeros(1, 6, 32), torch.zeros(1, 5, 2, 16), magi.LayerNorm1p
    for call, named in (
        (
            lambda: kernels.norm_rotary(heads, norm(16), torch.zeros(3, 6)),
            r"angles \(3, 6\).*x \(1, 5, 2, 16\)",
        ),
        (lambda: kernels.norm_rotary(heads, norm(16), torch.zeros(5, 9)), r"angles \(5, 9\)"),
        (lambda: kernels.norm_rotary(heads, norm(32), None), r"norm \(32,\)"),
        (lambda: kernels.norm_rotary(torch.zeros(1, 5, 2, 48), norm(48), None), "head width 48 must be 16"),
        (
            lambda: kernels.gated_residual(x, torch.zeros(1, 4, 32), x, norm(32)),
            "6 tokens do not divide into 4",
        ),
        (lambda: kernels.gated_residual(x, torch.zeros(1, 0, 32), x, norm(32)), "into 0 chunks"),
        (lambda: kernels.gated_residual(x, torch.zeros(2, 3, 32), x, norm(32)), r"gate \(2, 3, 32\)"),
        (lambda: kernels.gated_residual(x, torch.zeros(1, 3, 16), x, norm(32)), r"gate \(1, 3, 16\)"),
        (
            lambda: kernels.gated_residual(x, torch.zeros(1, 3, 32), x[:, :3], norm(32)),
            r"update \(1, 3, 32\)",
        ),
        (lambda: kernels.gated_residual(x, torch.zeros(1, 3, 32), x, norm(16)), r"norm \(16,\)"),
        (lambda: kernels.swiglu(torch.zeros(2, 7)), r"\(2, 7\) must have two halves"),
    ):
        with pytest.raises(ValueError, match=named):
            call()


# ------------------------------------------------------------------- odd addresses, empty inputs, one axis


def odd(u: torch.Tensor) -> torch.Tensor:
    """The same numbers, contiguous, from an address on that the copy engine refuses."""
    u = torch.cat([u.new_zeros(1), u.flatten()])[1:].view(u.shape)
    assert u.is_contiguous() and u.data_ptr() % 16
    return u


def test_odd_addresses_are_copied_where_the_copy_engine_reads():
    q, k, v = tensors((1, 20, 2, 16), (1, 40, 1, 16), (1, 40, 1, 16))
    spans = torch.tensor([[[0, 40], [3, 37]]])
    for engine in (True, False):
        ins = [odd(u).requires_grad_() for u in (q, k, v)]
        out, _ = kernels.flash_attention(
            *ins, spans, tiles=lambda *_, tma=engine: kernels.Tiles(16, 16, tma=tma)
        )
        torch.testing.assert_close(out, magi.block_attention(*ins, spans), rtol=1e-5, atol=1e-6)
        grads = torch.autograd.grad(out, ins, odd(torch.ones_like(out)))
        expected = torch.autograd.grad(magi.block_attention(*ins, spans).sum(), ins)
        for ours, exact in zip(grads, expected, strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


def test_fp8_weights_and_inputs_at_odd_addresses(monkeypatch):
    monkeypatch.setattr(kernels, "tiles_for", lambda *_: kernels.Tiles(16, 16, 32, tma=True))
    args = fp8_arguments()
    expected = magi.fp8_matmul(**args)
    bits = odd(args["weight"].view(torch.uint8)).view(E4M3)
    ours = kernels.fp8_matmul(**args | dict(x=odd(args["x"]), weight=bits, divide=odd(args["divide"])))
    torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("q, k", [((1, 0, 2, 16), (1, 6, 1, 16)), ((0, 4, 2, 16), (0, 6, 1, 16))])
def test_attention_of_nothing_is_the_references(monkeypatch, q, k):
    monkeypatch.setattr(kernels, "launch", lambda *_, **__: pytest.fail("launched"))
    q, k, spans = torch.zeros(q, requires_grad=True), torch.zeros(k), torch.tensor([[[0, 6]]])
    ours, expected = (op(q, k, k, spans) for op in (kernels.block_attention, magi.block_attention))
    assert ours.shape == expected.shape == q.shape and ours.requires_grad == expected.requires_grad
    assert kernels.attention(q, k, k).shape == magi.attention(q, k, k).shape
    buffer = torch.zeros(q.shape)
    with torch.no_grad():
        assert kernels.block_attention(q, k, k, spans, buffer) is buffer


def test_other_steps_of_nothing_are_the_references(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: pytest.fail("started a kernel"))
    args, norm, small = fp8_arguments(), magi.LayerNorm1p(32), magi.LayerNorm1p(16)
    for operation, inputs in (
        ("fp8_matmul", list((args | dict(x=torch.zeros(0, 32).bfloat16())).values())),
        ("fp8_matmul", list((args | dict(x=torch.zeros(2, 0, 32).bfloat16())).values())),
        ("norm_rotary", [torch.zeros(1, 0, 2, 16), small, torch.zeros(0, 6)]),
        ("norm_rotary", [torch.zeros(0, 3, 2, 16), small, None]),
        ("gated_residual", [torch.zeros(1, 0, 32), torch.zeros(1, 2, 32), torch.zeros(1, 0, 32), norm]),
        ("swiglu", [torch.zeros(3, 0, 8)]),
    ):
        try:
            expected = getattr(magi, operation)(*inputs)
        except RuntimeError:  # the reference cannot either
            continue
        ours = getattr(kernels, operation)(*inputs)
        assert ours.shape == expected.shape and ours.dtype == expected.dtype, operation


def test_fp8_matmul_of_one_row_without_an_axis():
    args = fp8_arguments()
    args["x"] = args["x"][0]
    ours, expected = kernels.fp8_matmul(**args), magi.fp8_matmul(**args)
    assert ours.shape == expected.shape == (16,)
    torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-2)


# ----------------------------------------------------------------------------------------- out, norm, swiglu


def test_two_attentions_share_a_buffer(monkeypatch):
    q, k = tensors((2, 10, 2, 16), (2, 12, 1, 16))
    spans, both = torch.tensor([[[0, 12], [3, 9]]]), torch.full((2, 10, 2, 2, 16), 7.0)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", lambda *_: pytest.fail("the result was copied"))
        returned = kernels.block_attention(q, k, k, spans, out=both[:, :, 1])
    assert returned.data_ptr() == both[:, :, 1].data_ptr() and (both[:, :, 0] == 7).all()
    torch.testing.assert_close(both[:, :, 1], magi.block_attention(q, k, k, spans), rtol=1e-5, atol=1e-6)
    row = both[:, :, 0].flatten(0, 1)[None]  # cross-attention: all batch entries in one row
    kernels.block_attention(q.flatten(0, 1)[None], k[:1], k[:1], torch.tensor([[[0, 4]] * 4]), out=row)
    expected = magi.block_attention(
        q, k[:1].expand(2, -1, -1, -1), k[:1].expand(2, -1, -1, -1), torch.tensor([[[0, 4]]])
    )
    torch.testing.assert_close(both[:, :, 0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["heads first", "every second token", "batches apart"])
def test_out_may_lie_in_any_way(layout):
    q, k = tensors((2, 8, 2, 16), (2, 9, 1, 16))
    spans = torch.tensor([[[0, 9], [2, 5]]])
    out = {
        "heads first": torch.zeros(2, 2, 8, 16).transpose(1, 2),
        "every second token": torch.zeros(2, 16, 2, 16)[:, ::2],
        "batches apart": torch.zeros(2, 11, 2, 16)[:, 1:9],
    }[layout]
    assert kernels.block_attention(q, k, k, spans, out) is out
    torch.testing.assert_close(out, magi.block_attention(q, k, k, spans), rtol=1e-5, atol=1e-6)


def test_gradients_pass_through_a_shared_buffer():
    q, k = (u.requires_grad_() for u in tensors((1, 6, 2, 16), (1, 7, 1, 16)))
    spans, grads = torch.tensor([[[0, 7], [3, 5]]]), []
    for op in (kernels.block_attention, magi.block_attention):
        both = torch.zeros(1, 6, 2, 2, 16)
        op(q, k, k, spans, out=both[:, :, 0])
        op(q * 2, k, k, spans, out=both[:, :, 1])
        grads.append(torch.autograd.grad(both.pow(2).sum(), (q, k)))
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first, second", [(True, False), (False, True)])
def test_gradients_of_one_of_two_that_share_a_buffer(first, second):
    """As where a LoRA is on one of a layer's attentions, and nothing before it is trained."""
    q, k = tensors((1, 6, 2, 16), (1, 7, 1, 16))
    spans, results = torch.tensor([[[0, 7], [3, 5]]]), []
    for op in (kernels.block_attention, magi.block_attention):
        both, trained = torch.zeros(1, 6, 2, 2, 16), q.clone().requires_grad_()
        op(trained if first else q, k, k, spans, out=both[:, :, 0])
        op(trained if second else q, k, k, spans, out=both[:, :, 1])
        (grad,) = torch.autograd.grad(both.pow(2).sum(), trained)
        results.append((both.detach(), grad))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_without_angles_rounds_as_the_reference(dtype):
    norm = magi.LayerNorm1p(64, dtype=dtype)
    for p in norm.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = tensors((2, 5, 3, 128), dtype=torch.bfloat16)[0][..., :64]  # interleaved, as keys of the text are
    ours, expected = kernels.norm_rotary(x, norm, None), magi.norm_rotary(x, norm, None)
    assert ours.dtype == expected.dtype == torch.bfloat16
    assert (ours != expected).float().mean() < 0.01  # where two float32 sums fall on two sides of a tie
    torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_and_its_gradient_are_the_references(dtype):
    u = (8 * tensors((2, 3, 2 * 37), dtype=dtype)[0]).requires_grad_()
    ours, expected = kernels.swiglu(u), magi.swiglu(u)
    assert ours.dtype == expected.dtype
    torch.testing.assert_close(ours, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    assert (ours != expected).float().mean() < (0.01 if dtype == torch.bfloat16 else 1)
    weight = torch.randn(ours.shape)
    grads = [torch.autograd.grad((out * weight).sum(), u)[0] for out in (ours, expected)]
    torch.testing.assert_close(*grads)


def test_gradients_of_gradients_are_refused_not_wrong():
    u, q = torch.randn(2, 8, requires_grad=True), torch.randn(1, 4, 1, 16, requires_grad=True)
    for out in (kernels.swiglu(u), kernels.attention(q, q, q)):
        (grad,) = torch.autograd.grad(out.pow(2).sum(), u if out.ndim == 2 else q, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def test_dynamo_passes_the_kernels_by():
    u = torch.randn(2, 8)
    compiled = torch.compile(lambda u: kernels.swiglu(u * 2) + 1, backend="eager")
    torch.testing.assert_close(compiled(u), magi.swiglu(u * 2) + 1)


# --------------------------------------------------------------------------------- choosing, with a stand-in


class Stand:
    """A card that takes as long for a candidate as it is told."""

    def __init__(self, name="Stand-in 9000", versions="driver 1 torch 2 triton 3", broken=False, **ms):
        self.ms, self.broken = ms, broken
        self.card = kernel_choice.Card(name, versions, self.milliseconds, self.synchronize, tokens=40)

    def milliseconds(self, run, enough=float("inf")):
        run()
        return self.ms.get(run.args[0].label, 9.0)

    def synchronize(self):
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


def candidate(label, function):
    def run(*args, **options):
        run.calls += 1
        return function(*args, **options)

    run.label, run.calls = label, 0
    return run


@pytest.fixture
def choosing(monkeypatch, tmp_path):
    """choosing(stand, name=function, ...) -> ops on a stand-in card; "torch" is added. The cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def start(stand=None, strict=False, operation="swiglu", **functions):
        made = {name: candidate(name, function) for name, function in functions.items()}
        made["torch"] = candidate("torch", getattr(magi, operation))
        monkeypatch.setattr(kernel_choice, "candidates", lambda _: dict(made))
        ops = kernel_choice.chosen_ops(kernel_choice.Chooser((stand or Stand()).card, strict))
        return ops, made

    start.folder = tmp_path / "magi"
    return start


def quiet(call):
    """What a call returns, and the lines it warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [str(warning.message) for warning in caught]


def wrong(u):
    return magi.swiglu(u) * 1.01


def crash(u):
    raise RuntimeError("Triton Error [CUDA]: an illegal instruction\nwith a long story")


def too_big(u):
    from triton.runtime.errors import OutOfResources

    raise OutOfResources(required=231424, limit=101376, name="shared memory")


def not_a_number(u):
    return magi.swiglu(u) * float("nan")


def in_another_shape(u):
    return magi.swiglu(u)[None]


BAD = {
    "off by 1.0e-02": wrong,
    r"Triton Error \[CUDA\]: an illegal instruction": crash,
    "out of resource: shared memory, Required: 231424": too_big,
    "off by nan": not_a_number,
    r"result is \(1, 42, 10\), not \(42, 10\)": in_another_shape,
}


@pytest.mark.parametrize("reason", BAD)
def test_a_kernel_that_fails_is_replaced_and_named_once(choosing, reason):
    (u,), stand = tensors((6, 20)), Stand(triton=0.1)
    ops, made = choosing(stand, triton=BAD[reason])
    result, lines = quiet(lambda: [ops.swiglu(u) for _ in range(3)])
    assert all(torch.equal(out, magi.swiglu(u)) for out in result)
    assert (
        len(lines) == 1
        and "\n" not in lines[0]
        and lines[0].startswith("Stand-in 9000: swiglu by triton fails: ")
    )
    assert made["triton"].calls == 1
    assert re.search(reason, lines[0]) and re.search(reason, ops.report())
    # the next process on this card knows, and does not try again
    ops, made = choosing(stand, triton=BAD[reason])
    result, lines = quiet(lambda: ops.swiglu(u))
    assert torch.equal(result, magi.swiglu(u)) and not lines and made["triton"].calls == 0
    assert "swiglu by triton fails" in ops.report()


def test_another_card_driver_or_version_tries_again(choosing):
    (u,) = tensors((6, 20))
    quiet(lambda: choosing(triton=wrong)[0].swiglu(u))
    for stand in (Stand(name="Stand-in 9001"), Stand(versions="driver 2 torch 2 triton 3")):
        ops, made = choosing(stand, triton=wrong)
        assert len(quiet(lambda ops=ops: ops.swiglu(u))[1]) == 1 and made["triton"].calls == 1
    assert len(list(choosing.folder.iterdir())) == 3


def test_versions_name_driver_torch_triton_and_the_files(monkeypatch):
    import triton

    versions = kernel_choice.card_of.__wrapped__(torch.device("cpu")).versions
    assert torch.__version__ in versions and triton.__version__ in versions
    monkeypatch.setattr(kernel_choice, "__file__", str(ROOT / "magi.py"))
    assert kernel_choice.card_of.__wrapped__(torch.device("cpu")).versions != versions
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12080, raising=False)
    card = kernel_choice.card_of.__wrapped__(torch.device("cuda", 0))
    assert card.name == "NVIDIA H100" and "driver 12080 " in card.versions


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return magi.swiglu(u)

    @staticmethod
    def backward(ctx, grad):
        (u,) = ctx.saved_tensors
        with torch.enable_grad():
            (u := u.detach().requires_grad_())
            return torch.autograd.grad(magi.swiglu(u), u, grad)[0] * 1.01


def test_gradients_are_checked_where_they_are_asked_for(choosing):
    (u,), stand = tensors((6, 20)), Stand(triton=0.1)
    ops, made = choosing(stand, triton=WrongBackward.apply)
    assert quiet(lambda: ops.swiglu(u))[1] == [] and "swiglu triton" in ops.report()
    u.requires_grad_()
    out, lines = quiet(lambda: ops.swiglu(u))
    assert len(lines) == 1 and "gradient 1 is off by 1.0e-02" in lines[0]
    expected = torch.autograd.grad(magi.swiglu(u).sum(), u)[0]
    assert torch.equal(torch.autograd.grad(out.sum(), u)[0], expected)
    with torch.no_grad():  # without gradients the kernel is still the one
        assert quiet(lambda: ops.swiglu(u))[1] == []
    assert "triton or torch" in ops.report()


@pytest.mark.parametrize("reason", BAD)
def test_triton_is_strict(choosing, reason):
    (u,) = tensors((6, 20))
    for _ in range(2):  # a failure is not remembered: the next run tries again
        ops, _ = choosing(strict=True, triton=BAD[reason])
        with pytest.raises(
            RuntimeError, match=rf"^Stand-in 9000: swiglu by triton fails: .*{reason}.*'auto' or 'torch'"
        ):
            ops.swiglu(u)


def test_triton_is_not_taken_for_right_where_memory_ran_out(choosing):
    def no_room(u):
        raise torch.OutOfMemoryError("CUDA out of memory")

    (u,) = tensors((6, 20))
    with pytest.raises(torch.OutOfMemoryError):
        choosing(strict=True, triton=no_room)[0].swiglu(u)
    with pytest.raises(checkpoints.KernelError, match="off by 1.0e-02"):  # the next run checks again
        choosing(strict=True, triton=wrong)[0].swiglu(u)


def test_triton_that_is_right_is_checked_once_and_never_timed(choosing, monkeypatch):
    (u,) = tensors((6, 20))
    for calls in (3, 2):  # one check and two calls; then the file says that it was checked
        ops, made = choosing(strict=True, triton=magi.swiglu, other=magi.swiglu)
        monkeypatch.setattr(Stand, "milliseconds", lambda *_: pytest.fail("timed"))
        assert ops.name == "triton" and all(torch.equal(ops.swiglu(u), magi.swiglu(u)) for _ in range(2))
        assert made["triton"].calls == calls and made["other"].calls == 0


@pytest.mark.parametrize("fastest", ["triton", "other", "torch"])
def test_the_fastest_is_used_remembered_and_reported(choosing, fastest):
    (u,), stand = tensors((6, 20)), Stand(**{fastest: 1.0})
    ops, made = choosing(stand, triton=magi.swiglu, other=magi.swiglu)
    ops.swiglu(u)
    before = {name: function.calls for name, function in made.items()}
    ops.swiglu(u)
    after = {name: function.calls for name, function in made.items()}
    assert {name for name in made if after[name] > before[name]} == {fastest}
    gain = "" if fastest == "torch" else " (9.00 times as fast as torch)"
    assert ops.report() == f"kernels on Stand-in 9000: swiglu {fastest}{gain}" and ops.name == "auto"
    ops, made = choosing(stand, triton=magi.swiglu, other=magi.swiglu)
    assert ops.report().endswith("none used yet")
    ops.swiglu(u)
    assert {name: function.calls for name, function in made.items()} == dict.fromkeys(made, 0) | {fastest: 1}


def test_size_classes_are_chosen_for_apart(choosing):
    ops, made = choosing(Stand(triton=1.0), triton=magi.swiglu)
    few, some, many, wide = tensors((40, 20), (50, 20), (4000, 20), (40, 40))
    tried = []
    for u in (few, some, many, wide, few.bfloat16(), few, many):
        before = made["torch"].calls
        ops.swiglu(u)
        tried.append(made["torch"].calls > before)
    assert tried == [True, False, True, True, True, False, False]
    assert copy.deepcopy(ops).report() == ops.report()  # a copy of a model, as for an average of its weights,
    before = made["torch"].calls
    copy.deepcopy(ops).swiglu(few)  # does not choose again
    assert made["torch"].calls == before
    q, k, norm = torch.zeros(1, 64, 2, 16), torch.zeros(1, 64, 1, 16), magi.LayerNorm1p(16)
    line = lambda *spans: kernel_choice.size_class("block_attention", (q, k, k, torch.tensor([spans])), False)
    assert line([0, 60], [0, 64]) == line([1, 60], [9, 64]) != line([0, 4], [60, 64])
    line = lambda angles: kernel_choice.size_class("norm_rotary", (q, norm, angles), False)
    assert line(None) != line(torch.zeros(64, 6))


def test_what_is_wrong_only_at_the_sizes_of_the_run_is_not_used(choosing):
    def wrong_when_large(u):
        return magi.swiglu(u) * (1 if len(u) < 100 else 1.1)

    (u,) = tensors((500, 20))
    ops, _ = choosing(Stand(triton=0.1), triton=wrong_when_large)
    result, lines = quiet(lambda: ops.swiglu(u))
    assert torch.equal(result, magi.swiglu(u)) and len(lines) == 1 and "off by 1.0e-01" in lines[0]


def test_what_fails_later_is_replaced_in_the_middle_of_a_run(choosing):
    (u,), stand = tensors((6, 20)), Stand(triton=0.1)
    ops, made = choosing(stand, triton=lambda u: magi.swiglu(u) if made["triton"].calls < 5 else crash(u))
    results, lines = quiet(lambda: [ops.swiglu(u) for _ in range(6)])
    assert all(torch.equal(out, magi.swiglu(u)) for out in results) and len(lines) == 1
    ops, made = choosing(stand, triton=magi.swiglu)
    ops.swiglu(u)
    assert made["triton"].calls == 0


def test_a_broken_gpu_ends_the_run_and_is_avoided_by_the_next(choosing):
    (u,), stand = tensors((6, 20)), Stand(broken=True, triton=0.1)
    ops, _ = choosing(stand, triton=crash)
    with pytest.raises(
        RuntimeError, match="swiglu by triton fails: .*Run it again: this is remembered"
    ) as error:
        ops.swiglu(u)
    assert "\n" not in str(error.value)
    ops, made = choosing(Stand(triton=0.1), triton=magi.swiglu)
    assert torch.equal(ops.swiglu(u), magi.swiglu(u)) and made["triton"].calls == 0


def test_a_kernel_that_takes_the_process_with_it_is_avoided_by_the_next(choosing):
    (u,), left = tensors((6, 20)), []

    def dies(u):
        left.extend(file.read_bytes() for file in choosing.folder.iterdir())  # what a dead process leaves
        return magi.swiglu(u)

    choosing(triton=dies)[0].swiglu(u)
    (file,) = choosing.folder.iterdir()
    living, dead = (f"(process {pid}, ".encode() for pid in (os.getpid(), 2**30))
    assert living in left[0]
    file.write_bytes(left[0].replace(living, dead))
    ops, made = choosing(triton=magi.swiglu)
    assert torch.equal(ops.swiglu(u), magi.swiglu(u)) and made["triton"].calls == 0
    assert "swiglu by triton fails: the process ended while it was tried" in ops.report()


def test_two_that_choose_at_once_take_nothing_from_each_other(choosing):
    """The second starts while the first tries a kernel, and ends before it, with one more size."""
    (u, wide), stand, second = tensors((6, 20), (6, 40)), Stand(triton=0.1), []

    def tried(small):
        if not second:
            second.append(choosing(stand, triton=magi.swiglu)[0])
            second[0].swiglu(u)
            second[0].swiglu(wide)
        return magi.swiglu(small)

    choosing(stand, triton=tried)[0].swiglu(u)
    ops, made = choosing(stand, triton=magi.swiglu)
    for known in second[0], ops:
        known.swiglu(u)
        known.swiglu(wide)
        assert "swiglu triton" in known.report() and "fails" not in known.report()
    assert made["triton"].calls == 2 and len(list(choosing.folder.iterdir())) == 1


def test_the_mark_of_a_process_holds_when_it_is_dead_or_its_number_has_another(choosing):
    with subprocess.Popen(["sleep", "60"]) as other:
        name = kernel_choice.process_name(other.pid)
        assert kernel_choice.in_trial(f"{kernel_choice.TRIED} ({name})")
        assert not kernel_choice.in_trial(f"{kernel_choice.TRIED} ({name}0)")  # began at another time
        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # nobody has asked how it ended
        assert not kernel_choice.in_trial(f"{kernel_choice.TRIED} ({name})")
    assert not kernel_choice.in_trial(f"{kernel_choice.TRIED} ({name})")
    assert not kernel_choice.in_trial("result is off by 1.0e-02")


def test_all_that_write_at_once_are_in_the_file(choosing):
    def save(i):
        chooser = kernel_choice.Chooser(Stand().card, strict=False)
        chooser.choices[f"swiglu {i}"] = {"use": "torch", "ms": {}, "failed": {}}
        chooser.save(f"swiglu {i}")

    choosing(triton=magi.swiglu)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(save, range(40)))
    choices = kernel_choice.Chooser(Stand().card, strict=False).choices
    assert choices.keys() == {f"swiglu {i}" for i in range(40)}


def test_an_interrupted_check_leaves_nothing_behind(choosing):
    def interrupted(u):
        raise KeyboardInterrupt

    (u,) = tensors((6, 20))
    with pytest.raises(KeyboardInterrupt):
        choosing(triton=interrupted)[0].swiglu(u)
    ops, made = choosing(Stand(triton=0.1), triton=magi.swiglu)
    ops.swiglu(u)
    assert "swiglu triton" in ops.report()


def test_too_little_memory_to_try_is_not_held_against_a_kernel(choosing):
    def no_room(u):
        raise torch.OutOfMemoryError("CUDA out of memory")

    (u,) = tensors((600, 20))
    ops, _ = choosing(Stand(triton=0.1), triton=no_room)
    assert quiet(lambda: ops.swiglu(u))[1] == [] and ops.report().endswith("swiglu torch")
    hungry = lambda u: magi.swiglu(u) if len(u) < 100 else no_room(u)  # as PyTorch's path may be
    ops, made = choosing(Stand(name="small", triton=0.1), triton=magi.swiglu)
    made["torch"] = candidate("torch", hungry)
    assert torch.equal(ops.swiglu(u), magi.swiglu(u)) and ops.report().endswith("swiglu triton")


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"\xff\xfe", b"{", b"[]", b'{"choices": 3}', b'{"choices": {"swiglu x": {"use": "torch"}}}'),
        b'{"choices": {"swiglu x": {"use": "gone", "ms": {}, "failed": {}}}}',
        b'{"choices": {"": {"use": "torch", "ms": {}, "failed": {}}}}',
        b'{"choices": {"swiglu x": {"use": "torch", "ms": {"torch": "a"}, "failed": {}}}}',
    ],
)
def test_a_cache_that_cannot_be_read_is_ignored_and_replaced(choosing, text):
    (u,), stand = tensors((6, 20)), Stand(triton=0.1)
    choosing(stand, triton=magi.swiglu)[0].swiglu(u)
    (file,) = choosing.folder.iterdir()
    good = json.loads(file.read_text())
    file.write_bytes(text)
    ops, made = choosing(stand, triton=magi.swiglu)
    ops.swiglu(u)
    assert (
        made["triton"].calls > 1
        and json.loads(file.read_text()) == good
        and len(list(choosing.folder.iterdir())) == 1
    )


def test_a_home_that_cannot_be_written_costs_only_memory(choosing, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    (u,) = tensors((6, 20))
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        ops, _ = choosing(Stand(triton=0.1), triton=magi.swiglu)
        ops.swiglu(u)
        assert "swiglu triton" in ops.report()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert kernel_choice.cache_folder() == tmp_path / ".cache" / "magi"


def test_flex_attention_is_tried_only_where_calls_are_long(choosing):
    q, k = tensors((1, 20, 2, 16), (1, 30, 1, 16))
    for ms, tried in ((4.0, False), (6.0, True)):
        ops, made = choosing(
            Stand(name=f"{ms}", triton=ms, flex=1.0), operation="block_attention",
            triton=magi.block_attention, flex=magi.block_attention,
        )  # fmt: skip
        ops.block_attention(q, k, k, torch.tensor([[[0, 30]]]))
        assert (
            made["flex"].calls > 0
        ) == tried and f"block_attention {'flex' if tried else 'triton'}" in ops.report()


def test_trying_leaves_random_numbers_inputs_and_out_as_they_should_be(choosing):
    q, k = tensors((1, 20, 2, 16), (1, 30, 1, 16))
    spans, both = torch.tensor([[[0, 30], [4, 9]]]), torch.zeros(1, 20, 2, 2, 16)

    def wrong_in_out(q, k, v, spans, out=None):
        result = magi.block_attention(q, k, v, spans)
        return result if out is None else out.copy_(result * 1.1)

    stand, right = Stand(other=0.1), magi.block_attention
    ops, _ = choosing(stand, operation="block_attention", triton=right, other=wrong_in_out)
    state, before = torch.get_rng_state(), [u.clone() for u in (q, k)]
    (out, lines) = quiet(lambda: ops.block_attention(q, k, k, spans, both[:, :, 1]))
    assert (
        torch.equal(torch.get_rng_state(), state) and torch.equal(q, before[0]) and torch.equal(k, before[1])
    )
    assert out.data_ptr() == both[:, :, 1].data_ptr() and not both[:, :, 0].any()
    torch.testing.assert_close(out, magi.block_attention(q, k, k, spans))
    assert "other" not in ops.report()  # wrong by a tenth in `out`, and only there


def test_choosing_inside_activation_checkpointing_and_inference_mode(choosing):
    (u,) = tensors((6, 20))
    ops, _ = choosing(Stand(triton=0.1), triton=kernels.swiglu)
    with torch.inference_mode():
        torch.testing.assert_close(ops.swiglu(u), magi.swiglu(u))
    u.requires_grad_()
    checkpoint(lambda u: ops.swiglu(u).sum(), u, use_reentrant=False).backward()
    torch.testing.assert_close(u.grad, torch.autograd.grad(magi.swiglu(u).sum(), u)[0])
    assert ops.report().startswith("kernels on Stand-in 9000: swiglu triton")


def test_milliseconds_is_a_median_and_gives_up_on_the_slow(monkeypatch):
    class Event:
        clock = 0.0

        def __init__(self, **_):
            pass

        def record(self):
            self.at = Event.clock

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)

    def measured(*durations, **options):
        """The median, and the number of calls. The first, which compiles, takes long and does not count."""
        left = iter((900, *durations))

        def run():
            Event.clock += next(left)

        return kernel_choice.milliseconds(run, **options), len(durations) - sum(1 for _ in left)

    assert measured(10, 14, 12, 13, 11, 1) == (12, 5)  # until there are 50 ms
    assert measured(60, 80, 70, 1) == (70, 3)  # at least three
    assert measured(*[1] * 40) == (1, 20)
    assert measured(250, 1) == (250, 1) and measured(150, 60, 1) == (105, 2)
    assert measured(40, 1, enough=20) == (40, 1)  # too slow to be of use
    assert measured(10, 30, 11, enough=20) == (11, 3)


# ------------------------------------------------------------------------- what the command lines say of it


def right(plain, *args, **options):
    return plain(*args, **options)


def off(plain, *args, **options):
    return plain(*args, **options) * 1.1


def without_room(plain, *args, **options):
    return too_big(None)


def breaking(plain, *args, **options):
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nwith a long story")


@pytest.fixture
def command_lines(monkeypatch, tmp_path):
    """command_lines(kernel, ...) -> programs have a stand-in card, and this kernel for every operation."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def functions(operation, kernel):
        plain = getattr(magi.TORCH_OPS, operation)
        return {"triton": candidate("triton", partial(kernel, plain)), "torch": candidate("torch", plain)}

    def start(kernel, stand=None, strict=False):
        monkeypatch.setattr(kernel_choice, "candidates", partial(functions, kernel=kernel))
        ops = kernel_choice.chosen_ops(kernel_choice.Chooser((stand or Stand(triton=1.0)).card, strict))
        monkeypatch.setattr(magi, "get_ops", lambda *_: ops)

    return start


FAILURES = {
    "too little shared memory": (without_room, True, "out of resource: shared memory.*'auto' or 'torch'"),
    "wrong numbers": (off, True, "result is off by 1.0e-01.*'auto' or 'torch'"),
    "a broken GPU": (breaking, False, "illegal memory access was encountered, and .* Run it again"),
}


@pytest.fixture(params=FAILURES)
def failure(request, command_lines):
    """What stderr says of a kernel that fails and has no one to take its place."""
    kernel, strict, says = FAILURES[request.param]
    command_lines(kernel, Stand(broken=not strict), strict)
    return f"Stand-in 9000: [a-z_]+ by triton fails: .*{says}.*"


def sample_flags(model_folder, tmp_path) -> tuple:
    given = ("--model", model_folder, "--text", model_folder.parent / "text.safetensors")
    return *given, "--num_frames", 1, "--device", "cpu", "--out", tmp_path / "out.mp4"


def test_sample_says_in_one_line_which_kernel_failed(failure, model_folder, tmp_path):
    code, _, err = run_main(sample.main, *sample_flags(model_folder, tmp_path))
    assert code == 1 and re.fullmatch(f"error: {failure}\n", err), err


def test_training_says_in_one_line_which_kernel_failed(failure, capsys):
    swiglu = lambda: magi.get_ops("auto", "cpu").swiglu(tensors((6, 20))[0])
    assert finetune.exit_code(swiglu) == 1
    assert re.fullmatch(f"error: {failure}\n", capsys.readouterr().err)


def test_the_page_says_in_one_line_which_kernel_failed(failure):
    with pytest.raises(checkpoints.KernelError) as error:
        magi.get_ops("auto", "cpu").swiglu(tensors((6, 20))[0])
    assert re.fullmatch(failure, live.one_line(error.value))


def assert_told(out: str, err: str) -> None:
    """A line for each operation that is wrong, without Python's line of source; the report is last."""
    fails = [line for line in err.splitlines() if "fails: " in line]
    assert fails and len(set(fails)) == len(fails), err
    for line in fails:
        assert re.fullmatch("warning: Stand-in 9000: [a-z_]+ by triton fails: .* something else .*", line)
    assert "RuntimeWarning" not in err and "self.fail" not in err
    assert out.count("kernels on Stand-in 9000: ") == 1 and "gated_residual torch" in out


def test_training_tells_of_its_kernels(command_lines, model_folder, tmp_path):
    (tmp_path / "data").mkdir()
    media.Mp4Writer(tmp_path / "data" / "a.mp4", 24).write(shades(range(24)))
    (tmp_path / "data" / "a.txt").write_text("a red")
    command_lines(off)
    flags = ("--model", model_folder, "--data", tmp_path / "data", "--out", tmp_path / "a.safetensors")
    quick = ("--device", "cpu", "--rank", 2, "--steps", 1, "--sample_every", 0, "--backend", "auto")
    code, _, err = run_main(finetune.main, "lora", *flags, *quick, "--seconds", 1)
    assert code == 0, err
    told, _, report = err.rpartition("kernels on ")
    assert_told(f"kernels on {report}", told)


def test_the_page_tells_of_its_kernels(command_lines, model_folder, monkeypatch):
    def run_app(film, **_):
        film.say("a red ball bounces")
        end = time.monotonic() + 60
        while not film.made and time.monotonic() < end:
            time.sleep(0.01)
        assert film.made and not film.error

    monkeypatch.setattr(live, "web", SimpleNamespace(run_app=run_app))
    monkeypatch.setattr(live, "Server", lambda film, token: SimpleNamespace(app=film))
    command_lines(off)
    code, out, err = run_main(live.main, "--model", model_folder, "--device", "cpu", "--port", 0)
    assert code == 130, err
    assert_told(out, err)


def test_a_strict_kernel_that_fails_later_is_named_too(choosing):
    (u,) = tensors((6, 20))
    later = lambda u: magi.swiglu(u) if made["triton"].calls < 3 else crash(u)
    ops, made = choosing(strict=True, triton=later)
    ops.swiglu(u)
    with pytest.raises(checkpoints.KernelError, match="swiglu by triton fails: .*illegal instruction"):
        ops.swiglu(u)


# ------------------------------------------------------------------------------ the true candidates, on a CPU


def test_every_operations_small_input_and_candidates(monkeypatch, tmp_path):
    """Ours in the interpreter, PyTorch's as they are on a CPU: all are right, forward and backward."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(kernel_choice, "_flex", lambda: flex_attention)
    q, k = tensors((1, 12, 2, 16), (1, 14, 1, 16), dtype=torch.float16)
    x, gate, angles = tensors((1, 12, 32), (1, 3, 32), (12, 6))
    norm, small = magi.LayerNorm1p(32), magi.LayerNorm1p(16)
    for operation, args in (
        ("attention", (q, k, k)),
        ("block_attention", (q, k, k, torch.tensor([[[0, 14], [3, 5]]]))),
        ("norm_rotary", (q, small, angles)),
        ("norm_rotary", (q, small, None)),
        ("gated_residual", (x, gate, x, norm)),
        ("swiglu", (x,)),
        ("fp8_matmul", tuple(fp8_arguments().values())),
    ):
        functions = kernel_choice.candidates(operation)
        assert list(functions)[0] == "triton" and list(functions)[-1] == "torch"
        for backward in (False, True):
            given = kernel_choice.small_input(operation, args, 18)
            expected = kernel_choice.outcome(functions["torch"], given, backward)
            assert all(u.abs().sum() > 0 for u in expected)
            for name in [name for name in functions if name != "torch" and not (backward and "," in name)]:
                if backward and name == "flex":
                    continue  # not on a CPU
                kernel_choice.require_close(kernel_choice.outcome(functions[name], given, backward), expected)


@pytest.mark.parametrize("dtype", kernel_choice.BARS)
def test_what_rounds_as_its_type_does_is_right_at_the_sizes_of_the_run_too(choosing, dtype):
    """The copies of results that are compared there were float32, so bf16 was held to the bar of float32."""
    q, k = tensors((1, 50, 2, 16), (1, 60, 1, 16), dtype=dtype)
    ops, _ = choosing(Stand(ours=0.1), operation="attention", ours=kernels.attention)
    result, lines = quiet(lambda: ops.attention(q, k, k))
    assert not lines and "attention ours" in ops.report() and torch.equal(result, kernels.attention(q, k, k))


def test_every_candidate_of_block_attention_writes_where_it_is_told(monkeypatch):
    """As both attentions of a layer ask for; cuDNN's refused `out`, and so was never used in a run."""
    from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(kernel_choice, "_flex", lambda: flex_attention)
    q, k = tensors((1, 12, 2, 16), (1, 14, 1, 16))
    spans = torch.tensor([[[0, 14], [3, 5]]])
    expected = magi.block_attention(q, k, k, spans)
    for name, function in kernel_choice.candidates("block_attention").items():
        both = torch.zeros(1, 12, 2, 2, 16)
        with torch.no_grad():
            out = function(q, k, k, spans, out=both[:, :, 1])
        assert out.data_ptr() == both[:, :, 1].data_ptr() and not both[:, :, 0].any(), name
        torch.testing.assert_close(both[:, :, 1], expected, rtol=1e-5, atol=1e-6)
    first = kernel_choice.cudnn_first(lambda: _cur_sdpa_kernel_backends(with_priority=True)[0])
    assert [first(), first()] == [SDPBackend.CUDNN_ATTENTION] * 2
    assert _cur_sdpa_kernel_backends(with_priority=True)[0] != SDPBackend.CUDNN_ATTENTION


def test_a_whole_dit_chooses_and_the_next_one_knows(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cfg = dataclasses.replace(
        magi.PRESETS["tiny"].dit, num_layers=1, hidden_size=32, num_heads=1, num_kv_heads=1, head_dim=16,
        ffn_size=64, text_dim=12, text_length=14, gated_ffn=True,
    )  # fmt: skip
    torch.manual_seed(0)
    dit = magi.DiT(cfg).requires_grad_(False)
    x, t = torch.randn(1, 16, 6, 4, 4), torch.tensor([[0.9]])
    text, mask = torch.randn(1, 1, 14, 12), torch.ones(1, 1, 14)
    expected = dit(x, t, text, mask)
    for seen in (0, 1):
        dit.ops = kernel_choice.get_ops.__wrapped__("triton", "cpu")
        with monkeypatch.context() as patch:
            if seen:
                patch.setattr(kernel_choice, "small_input", lambda *_: pytest.fail("checked again"))
            torch.testing.assert_close(dit(x, t, text, mask), expected, rtol=1e-4, atol=1e-4)
    for operation in ("block_attention", "norm_rotary", "gated_residual", "swiglu"):
        assert f"{operation} triton" in dit.ops.report()


def test_get_ops_says_why_a_card_cannot(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    monkeypatch.setattr(torch.version, "hip", None)
    kernels.arch_of.cache_clear()
    kernel_choice.get_ops.cache_clear()
    ops, lines = quiet(lambda: kernels.get_ops("auto", "cuda"))
    assert ops is magi.TORCH_OPS and len(lines) == 1 and "Tesla T4 has 7.5" in lines[0]
    with pytest.raises(ValueError, match="Tesla T4 has 7.5"):
        kernels.get_ops("triton", "cuda")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for name, arch in (("gfx942:sramecc+:xnack-", 942), ("gfx950", 950), ("gfx1100", None)):
        properties = type("Properties", (), dict(gcnArchName=name))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, p=properties: p)
        kernels.arch_of.cache_clear()
        if arch:
            assert kernels.arch_of(torch.device("cuda", 0)) == arch
        else:
            with pytest.raises(ValueError, match="not gfx1100: use 'torch'"):
                kernels.arch_of(torch.device("cuda", 0))
    kernels.arch_of.cache_clear()
    kernel_choice.get_ops.cache_clear()


# ------------------------------------------------------------ Hugging Face's package has the name of our file


@pytest.fixture
def namesake(tmp_path, monkeypatch):
    """A package `kernels` that is installed elsewhere, while Python was started in our folder."""
    package = tmp_path / "site" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "from .layer import CUDAProperties\nimport kernels\nassert kernels.layer\n"
    )
    (package / "layer.py").write_text("CUDAProperties = 'theirs'\n")
    info = tmp_path / "site" / "kernels-0.18.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    for name in ("kernels", "kernels.layer"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path, str(tmp_path / "site")])
    importlib.invalidate_caches()
    yield tmp_path / "site"
    for name in ("kernels", "kernels.layer"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("triton_is_here", [True, False])
def test_import_kernels_hands_over_to_the_installed_package(namesake, monkeypatch, triton_is_here):
    if not triton_is_here:
        for name in ("triton", "triton.language", "triton.tools.tensor_descriptor"):
            monkeypatch.setitem(sys.modules, name, None)
    import kernels as theirs
    from kernels import CUDAProperties  # as transformers does

    assert CUDAProperties == "theirs" and Path(theirs.__file__).parent == namesake / "kernels"
    assert importlib.import_module("kernels.layer").CUDAProperties == "theirs"
    assert magi.load_kernels() is kernels and kernels.Tiles  # and ours is where it was


@pytest.mark.parametrize("left", ["nothing", "files of no distribution", "a distribution without files"])
def test_without_that_package_import_kernels_is_our_file(namesake, left):
    if left != "files of no distribution":
        shutil.rmtree(namesake / "kernels")
    if left != "a distribution without files":
        shutil.rmtree(namesake / "kernels-0.18.2.dist-info")
    importlib.invalidate_caches()
    module = importlib.import_module("kernels")
    assert Path(module.__file__) == ROOT / "kernels.py" and module.TRITON_OPS.name == "triton"


def test_python_in_our_folder_finds_both(namesake, monkeypatch):
    """As `python -c` has it: what is first in its path is "", the folder where it was started."""
    monkeypatch.chdir(ROOT)
    others = [place for place in sys.path if place not in (str(ROOT), str(namesake))]
    monkeypatch.setattr(sys, "path", ["", str(namesake), *others])  # and then PYTHONPATH
    monkeypatch.delitem(sys.modules, "magi_kernels")
    from kernels import CUDAProperties

    ours = magi.load_kernels()
    assert CUDAProperties == "theirs" and ours.__name__ == "magi_kernels" and ours is not kernels


# ------------------------------------------------------------------------------------------------ the reports


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(bench_kernels, "MODELS", {"tiny": (32, 8, 32, 48, 64)})
    monkeypatch.setattr(kernels, "launch", lambda *_, **__: None)
    monkeypatch.setattr(kernel_choice, "flex_attention", lambda *_: torch.zeros(1) @ torch.zeros(2))
    right = [torch.ones(2)], [torch.ones(2)]
    monkeypatch.setattr(bench_kernels, "comparisons", lambda _: [("sum", lambda: right, 0.1)])
    monkeypatch.setattr(kernel_choice, "milliseconds", lambda run, **_: run() is None or 2.0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")


def test_the_report_checks_times_and_writes_a_table(bench, monkeypatch, tmp_path):
    """On the CPU, with launches left out: every row is there; a peer that fails ends nothing."""
    assert bench_kernels.report("cpu", tmp_path / "kernels.md")
    lines = (tmp_path / "kernels.md").read_text().splitlines()
    assert lines[0].startswith("NVIDIA H100") and len(lines) == 4 + 3 * 6 + 3 * 7 + 4 * 2
    assert {line.count("|") for line in lines[2:]} == {5}
    failed = [line for line in lines if "failed" in line]
    assert len(failed) == 3 and all("- flex" in line for line in failed)
    rows, names = (
        [line.split("|")[1].strip() for line in lines[4:]],
        [*kernel_choice.candidates("fp8_matmul")],
    )
    start = rows.index("tiny fp8 q, with quantising")  # ours, then what else a run may choose
    assert rows[start + 1 : start + len(names)] == [f"- {name}" for name in names[1:]]


def test_a_check_that_fails_is_a_row_and_code_1(bench, monkeypatch, tmp_path):
    def fails():
        too_big(None)

    ones, halves, nan = (torch.full((2,), value) for value in (1.0, 0.5, math.nan))
    checks = {
        "sum": lambda: ([halves], [ones]),
        "root": lambda: ([ones, nan], [ones, ones]),
        "large": fails,
        "right": lambda: ([ones, ones], [ones, ones]),
    }
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(
        bench_kernels, "comparisons", lambda _: [(k, call, 0.1) for k, call in checks.items()]
    )
    assert bench_kernels.main(["--device", "cpu", "--out", str(tmp_path / "kernels.md")]) == 1
    lines = (tmp_path / "kernels.md").read_text().splitlines()
    assert len(lines) == 51 + 3 and {line.count("|") for line in lines[2:]} == {5}
    for line, expected in zip(
        lines[4:7],
        (
            "sum | check failed: off by 5.0e-01 ",
            "root dq | check failed: off by nan ",
            "large | check failed: out of resource: shared memory, ",
        ),
        strict=True,
    ):
        assert re.sub(" +", " ", line).startswith(f"| {expected}")
    del checks["sum"], checks["root"], checks["large"]
    assert bench_kernels.main(["--device", "cpu", "--out", str(tmp_path / "kernels.md")]) == 0
    assert len((tmp_path / "kernels.md").read_text().splitlines()) == 51


def test_what_the_report_compares_is_what_the_operations_take(monkeypatch):
    """The readable path in our place gives the same; attention once, in the smallest of its sizes."""
    for operation in kernel_choice.OPERATIONS:
        monkeypatch.setattr(kernels, operation, getattr(magi, operation))
    found = list(bench_kernels.comparisons("cpu"))
    attention = [row for row in found if row[0].startswith("attention")]
    others = [row for row in found if row not in attention]
    assert len(attention) == 12 and len(others) == 9
    monkeypatch.setattr(bench_kernels, "comparisons", lambda _: [attention[0], *others])
    assert bench_kernels.failed_checks("cpu") == {}
    monkeypatch.setattr(kernels, "swiglu", wrong)
    assert list(bench_kernels.failed_checks("cpu")) == ["swiglu torch.float32", "swiglu torch.bfloat16"]


def test_the_table_keeps_what_was_measured_whatever_comes_after(bench, monkeypatch, tmp_path):
    seen = []

    def stop_after_two(run, **_):
        seen.append((tmp_path / "kernels.md").read_text().count("\n"))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return 2.0

    monkeypatch.setattr(kernel_choice, "milliseconds", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        bench_kernels.report("cpu", tmp_path / "kernels.md")
    assert seen == [4, 5, 6] and (tmp_path / "kernels.md").read_text().count("\n") == 6


def test_a_row_whose_tensors_do_not_fit_is_a_row(bench, monkeypatch, tmp_path):
    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 11.00 GiB")

    monkeypatch.setattr(torch, "randn", no_memory)
    bench_kernels.report("cpu", tmp_path / "kernels.md")
    lines = (tmp_path / "kernels.md").read_text().splitlines()
    assert len(lines) == 51 and sum("failed: CUDA out of memory" in line for line in lines) == 47


class Meter(TorchDispatchMode):
    """Bytes of live tensors, and the most there were. On the meta device nothing is really held."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for u in result if isinstance(result, tuple | list) else [result]:
            if isinstance(u, torch.Tensor) and u.device.type == "meta":
                self.add(u.untyped_storage())
        return result

    def add(self, storage):
        if storage not in self.known:
            self.known.add(storage)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.drop, storage.nbytes())

    def drop(self, size):
        self.now -= size


@torch.no_grad()
def test_every_row_of_our_own_fits_a_card_of_24_gb(monkeypatch):
    """Those of the 24B were too large for a 4090, whose table then had no end."""
    monkeypatch.setattr(kernels, "launch", lambda *_, **__: None)
    monkeypatch.setattr(kernels, "arch_of", lambda _: 89)
    # on this device PyTorch would take the one that holds all scores
    sdpa = lambda q, k, v, **_: q + (k.mean() + v.mean())
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", sdpa)
    peaks = {}
    for case in bench_kernels.cases("meta"):
        if "flex" in case.what or case.peak == "fp8" and case.what == "- torch":
            continue  # the readable product is float32, and too large there: its row says so
        with Meter() as meter:
            case.prepare()()
        peaks[case.what, len(peaks)] = meter.most / 1e9
    largest = max(peaks, key=peaks.get)
    assert 5 < peaks[largest] < 20, (largest, peaks[largest])  # of 25.7, less what the driver takes


# --------------------------------------------------------------------------------- what is compiled ahead


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_kernels_points_at_compile():
    code, _, err = run_main(bench_kernels.main)
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

others = "gated_residual", "norm_rotary", "norm", "swiglu", "quantise"
for arch, kinds in (90, ("forward", "dkv", "fp8", *others)), (120, ("dq", "fp8")):
    for kind in kinds:
        names = [name for name in bench_kernels.shipped(arch) if name.startswith(kind + " ")]
        name = next(name for name in names if name.endswith(("bfloat16 128", "bfloat16", "matmul")))
        print(bench_kernels.compile_row((arch, name))[1])
"""


def test_kernels_compile():
    """Every kernel, for a card with much shared memory and wgmma or for one without: products in bf16 and in
    fp8 for both. (.ci/run compiles all of them for these two cards and two more.)"""
    assert_compiled(run_python("-c", ROWS), 8 + 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, rows",
    [
        (["--quick"], 4 * (3 + 5 + 1)),  # attention, elementwise, fp8: .ci/run runs this, too
        ([], 6 * (3 * (2 * 3 + 5) + 2 * 2 * 2 + 2)),  # and other types and tiles
    ],
)
def test_kernels_compile_for_every_architecture(flags, rows):
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
def test_calls_as_on_a_gpu_compile_just_in_time(arch):
    """Every operation goes through Triton's own launcher, with a stand-in for the driver, but for the launch:
    arguments are bound, specialised and compiled as a GPU would have it."""
    done = run_python("-c", LAUNCHES, str(arch))
    assert done.stdout.split() == [
        *("_forward_kernel", "_dq_kernel", "_dkv_kernel", "_norm_rotary_kernel", "_norm_rotary_kernel"),
        *("_swiglu_kernel", "_gated_residual_kernel", "_quantise_kernel", "_fp8_kernel"),
    ], done.stderr


def test_the_compile_table_finds_faults(monkeypatch):
    def row(spills=0, shared=90 * 1024, instruction="QMMA") -> tuple[bool, str]:
        monkeypatch.setattr(bench_kernels, "machine_code", lambda *_: (200, spills, shared, {instruction}))
        return bench_kernels.compile_row((89, "fp8 matmul"))

    assert row()[0] and row()[1].endswith(" ok")
    for changes, fault in (
        (dict(spills=4), "spills"),
        (dict(shared=100 * 1024), "does not fit"),
        (dict(instruction="HMMA"), "no QMMA"),
    ):
        good, line = row(**changes)
        assert not good and line.endswith(fault)
