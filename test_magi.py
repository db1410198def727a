"""Recorded runs of the official code, then DiT, cache, sampler, VAE, and kernels against the naive paths.

Other topics: tests/, tiny/test_world.py. pytest: all but the long checks; pytest -m slow: those.
"""

import copy
import dataclasses
import inspect
import itertools
import json
import math
import os
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
import train
from common import (
    CASES,
    GOLDENS,
    QUICK,
    SMALL,
    bad,
    counted_tokens,
    golden,
    golden_dit,
    golden_run,
    golden_vae,
    relative,
    run_small,
    same,
    small,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import magi
import training

os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU, in Triton's interpreter

# ---------------------------------------------------------------------------------------------------- goldens


@pytest.mark.parametrize("name", CASES)
def test_sampler_equals_recorded_run(name):
    dit, cfg, run, more = golden_run(name)
    out = dict(magi.sample(dit, run["text"], run["text_mask"], cfg, **more))
    assert list(out) == CASES[name]["chunk_index"]
    for i, latents in out.items():
        expected = run[f"chunk.{i}"][0]
        assert latents.shape == expected.shape and latents.dtype == torch.float32
        if i == 0 and CASES[name]["prefix_frames"] == 1:
            # The official code lets Euler steps move the image; here it stays what was given.
            assert torch.equal(latents[:, :1], more["prefix"])
            latents, expected = latents[:, 1:], expected[:, 1:]
        assert relative(latents, expected) < (3e-2 if dit.cfg.fp8 else 2e-4)


def test_forward_equals_recorded_intermediates():
    dit, g = golden_dit("base"), golden("base.forward")
    seen, c = {}, 36
    hooks = [
        layer.register_forward_hook(lambda m, a, out, i=i: seen.update({f"layer.{i}": out[0]}))
        for i, layer in enumerate(dit.layers)
    ]
    hooks.append(dit.time_embed.register_forward_hook(lambda m, a, out: seen.update(t_embed=out[0])))
    hooks.append(dit.layers[0].register_forward_pre_hook(lambda m, a: seen.update(patches=a[0][0])))
    plain_attend = dit.layers[0].attn.attend
    dit.layers[0].attn.attend = lambda *a: seen.setdefault("attend", plain_attend(*a))
    try:
        velocity = dit(
            g["x"],
            g["t"][None],
            g["text"][None],
            g["text_mask"][None],
            first_seen=[start // c for start, _ in g["kv_range"].tolist()],
        )
    finally:
        del dit.layers[0].attn.attend
        for hook in hooks:
            hook.remove()
    angles = magi.rotary_angles(dit.rope_bands, torch.arange(18), 2, 3)
    self_attention, cross_attention = seen["attend"].chunk(2, dim=-1)
    ours = seen | {
        "velocity": velocity,
        "rope": torch.cat([angles.sin(), angles.cos()], 1),
        "condition": dit.condition(g["t"][None], torch.ones(1, 3, dtype=torch.bool))[0],
        "layer.0.self_attn": self_attention[0],
        "layer.0.cross_attn": cross_attention[0],
    }
    parts = "patches t_embed condition rope layer.0.self_attn layer.0.cross_attn".split()
    for name in [*parts, "layer.0", "layer.1", "layer.2", "velocity"]:
        assert relative(ours[name], g[name]) < 1e-5, name


@pytest.mark.parametrize(
    "case", json.loads((GOLDENS / "vae_cases.json").read_text()), ids=lambda c: str(c["case"])
)
def test_vae_equals_recorded_run(case):
    vae, all_tensors, name = golden_vae(), golden("vae"), case["case"]
    g = {k.split(".")[1]: v for k, v in all_tensors.items() if k.startswith(f"{name}.")}
    tile = (case["tile_frames"], case["tile_h"], case["tile_w"]) if case["kind"] == "tiled" else None
    assert relative(vae.encode(g["video"], tile, case.get("overlap", 0.25)), g["latent"]) < 2e-4
    out = vae.decode(g["latent"], tile, case.get("overlap", 0.25))
    assert out.shape[2] == 4 * g["latent"].shape[2]
    assert relative(out[:, :, : g["recon"].shape[2]], g["recon"]) < 2e-4
    if "moments" in g:
        assert relative(torch.cat(vae.moments(g["video"]), 1), g["moments"]) < 2e-4


@pytest.mark.parametrize("kind", ["tensor", "channel"])
def test_fp8_linear_equals_recorded_layer(kind):
    g = {k.split(".")[1]: v for k, v in golden("fp8_linear").items() if k.startswith(f"per_{kind}.")}
    layer = magi.FP8Linear(96, 80, kind)
    layer.load_state_dict({k: v.squeeze(0) if k == "weight" else v for k, v in g.items() if k not in "xy"})
    assert relative(layer(g["x"]).float(), g["y"].float()) < 2e-3


SCHEDULE = json.loads((GOLDENS / "schedule.json").read_text())


@pytest.mark.parametrize("key", SCHEDULE["timesteps"])
def test_time_grid_equals_table(key):
    n, mode = int(key.split("/")[0]), key.split("/")[1]
    torch.testing.assert_close(
        magi.timestep_grid(n, mode), torch.tensor(SCHEDULE["timesteps"][key]), rtol=0, atol=2e-7
    )
    base = 16 if n == 12 else n
    assert magi.shortcut_d(n, mode) == [base / 2 / k for k in SCHEDULE["intervals"][key]]


@pytest.mark.parametrize(
    "table", SCHEDULE["windows"], ids=lambda w: f"{w['num_chunks']}-{w['window']}-{w['prefix_chunks']}"
)
def test_plan_equals_table(table):
    """The chunks of every stage and how far each has come; a stage has two steps here."""
    K, P, window = table["num_chunks"], table["prefix_chunks"], table["window"]
    cfg = magi.SamplerConfig(num_steps=2 * window, window=window, kv_ranges=())
    grid, steps = magi.timestep_grid(2 * window).tolist(), list(magi.plan(cfg, K, P))
    if P > 0:  # all given chunks are stored before anything else
        assert [c.chunk for c in steps[0].chunks if c.clean] == [*range(P)] and not steps[0].noisy
        steps = steps[1:]
    assert len(steps) == 2 * len(table["chunk_start"])
    for half, part in enumerate((steps[::2], steps[1::2])):
        assert [s.noisy[0].chunk for s in part] == table["chunk_start"]
        assert [s.noisy[-1].chunk + 1 for s in part] == table["chunk_end"]
        assert [grid.index(s.noisy[-1].t) for s in part] == [2 * m + half for m in table["stage_start"]]
        assert [grid.index(s.noisy[0].t) + 2 for s in part] == [2 * m + half for m in table["stage_end"]]
        for step in part:
            assert [c.chunk for c in step.noisy] == [*range(step.noisy[0].chunk, step.noisy[-1].chunk + 1)]
            at = [grid.index(c.t) for c in step.noisy]
            assert all(a - b == 2 for a, b in itertools.pairwise(at))
            assert [c.dt for c in step.noisy] == [grid[i + 1] - grid[i] for i in at]


@pytest.mark.parametrize("raw, clean", json.loads((GOLDENS / "captions.json").read_text()))
def test_captions_equal_table(raw, clean):
    assert magi.clean_caption(raw) == clean


# ---------------------------------------------------------------------------------------------- DiT and cache


def test_attention_is_the_formula():
    q, k, v = torch.randn(3, 10, 6, 16), torch.randn(3, 12, 2, 16), torch.randn(3, 12, 2, 16)
    out = magi.attention(q, k, v)
    scores = torch.einsum("bnhd, bmhd -> bhnm", q, k.repeat_interleave(3, dim=2)) / 4
    torch.testing.assert_close(
        out, torch.einsum("bhnm, bmhd -> bnhd", scores.softmax(-1), v.repeat_interleave(3, 2))
    )
    # grouped queries: query heads 3..5 read kv head 1
    torch.testing.assert_close(out[:, :, 3:], magi.attention(q[:, :, 3:], k[:, :, 1:], v[:, :, 1:]))


def test_block_attention_is_masked_attention():
    q, k, v = torch.randn(2, 12, 4, 8), torch.randn(2, 12, 4, 8), torch.randn(2, 12, 4, 8)
    cached = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 8)
    spans = torch.tensor([[0, 6], [6, 9], [3, 12], [9, 15]])
    cache = magi.KVCache()
    cache.write(0, 1, *cached)  # three tokens, of the chunk before 2..5
    ctx = SimpleNamespace(ops=magi.TORCH_OPS, spans=spans[None], cache=cache)
    ctx.chunks, ctx.cached, ctx.store = [2, 3, 4, 5], [1], 0
    out = magi.CachedAttention(0)(q, k, v, ctx)
    ctx.spans = spans.expand(2, -1, -1)
    torch.testing.assert_close(magi.CachedAttention(0)(q, k, v, ctx), out)
    k, v = torch.cat([cached[0], k], 1), torch.cat([cached[1], v], 1)
    torch.testing.assert_close(magi.block_attention(q, k, v, spans[None]), out)
    into = torch.zeros(2, 12, 2, 4, 8)  # a place with strides, as both attentions of a layer have one
    assert magi.block_attention(q, k, v, spans[None], into[:, :, 1]).data_ptr() == into[:, :, 1].data_ptr()
    torch.testing.assert_close(into[:, :, 1], out)
    assert not into[:, :, 0].any()
    mask = torch.full((12, 15), -math.inf)
    for i, (start, end) in enumerate(spans.tolist()):
        mask[3 * i : 3 * i + 3, start:end] = 0
    scores = torch.einsum("bnhd, bmhd -> bhnm", q, k) / 8**0.5 + mask
    torch.testing.assert_close(torch.einsum("bhnm, bmhd -> bnhd", scores.softmax(-1), v), out)
    # spans of their own for each clip of a batch, and the way tiny/train.py computes it
    other = torch.tensor([[0, 3], [0, 3], [6, 9], [0, 15]])
    both = magi.block_attention(q, k, v, torch.stack([spans, other]))
    torch.testing.assert_close(both[:1], out[:1])
    torch.testing.assert_close(both[1:], magi.block_attention(q, k, v, other[None])[1:])
    torch.testing.assert_close(train.block_attention(q, k, v, torch.stack([spans, other])), both)
    short = torch.tensor([[[0, 3], [4, 9], [9, 11], [9, 11]]]).expand(2, -1, -1)
    few = k[:, :11], v[:, :11]  # fewer keys than queries: gathered
    expected = magi.block_attention(q, *few, short)
    torch.testing.assert_close(train.block_attention(q, *few, short), expected)


def test_a_chunk_never_sees_later_ones_nor_what_is_out_of_range():
    dit, text, mask, _ = small()
    x, t = torch.randn(1, 16, 18, 4, 6), torch.tensor([[0.9, 0.5, 0.1]])
    texts, masks = text.expand(1, 3, -1, -1), mask.expand(1, 3, -1)
    v = dit(x, t, texts, masks, first_seen=[0, 0, 1])
    changed = x.clone()
    changed[:, :, :6] += 1
    w = dit(changed, t, texts, masks, first_seen=[0, 0, 1])
    assert not torch.allclose(v[:, :, 6:12], w[:, :, 6:12])  # chunk 1 reads chunk 0
    changed = x.clone()
    changed[:, :, 12:] += 1
    torch.testing.assert_close(dit(changed, t, texts, masks, first_seen=[0, 0, 1])[:, :, :12], v[:, :, :12])


def test_cached_equals_uncached():
    dit, text, mask, _ = small()
    x, t = torch.randn(1, 16, 18, 4, 6), torch.tensor([[0.9999, 0.5, 0.1]])
    texts, masks = torch.randn(1, 3, 14, 12), mask.expand(1, 3, -1)
    whole = dit(x, t, texts, masks, first_seen=[0, 0, 0])
    store = magi.KVCache()
    dit(x[:, :, :6], t[:, :1], texts[:, :1], masks[:, :1], chunks=[0], cache=store, store=1)
    assert store.chunks == [0] and store.kv[0].keys() == {0, 1}
    rest = dit(
        x[:, :, 6:], t[:, 1:], texts[:, 1:], masks[:, 1:], chunks=[1, 2], first_seen=[0, 0], cache=store
    )
    torch.testing.assert_close(rest, whole[:, :, 6:])


def test_history_only_counts_by_distance():
    """Rotary positions: a chunk alone looks the same anywhere in the video."""
    dit, text, mask, _ = small()
    x, t = torch.randn(1, 16, 6, 4, 6), torch.tensor([[0.4]])
    at = lambda chunk: dit(x, t, text[None, None], mask[None, None], chunks=[chunk])
    torch.testing.assert_close(at(0), at(9), rtol=1e-4, atol=1e-4)


def test_masked_text_does_not_count_wherever_it_stands():
    dit, text, mask, _ = small()
    x, t = torch.randn(1, 16, 6, 4, 6), torch.tensor([[0.4]])
    v = dit(x, t, text[None, None], mask[None, None])
    torch.testing.assert_close(
        dit(x, t, torch.where(mask[:, None] > 0, text, 9.0)[None, None], mask[None, None]), v
    )
    torch.testing.assert_close(dit(x, t, text.flip(0)[None, None], mask.flip(0)[None, None]), v)


def test_arguments_that_do_not_go_together_are_refused():
    """Texts were dealt out to other chunks than their own, and rows without spans were left unwritten."""
    dit, text, mask, _ = small()
    x, t = torch.randn(3, 16, 12, 4, 4), torch.rand(3, 2)
    texts, masks = text.expand(3, 2, -1, -1), mask.expand(3, 2, -1)
    for change, message in (
        (dict(text=texts[:1], text_mask=masks[:1]), r"text \(1, 2, 14, 12\) .* must be .* \(B, n, L, C\)"),
        (dict(text=texts[:, :1], text_mask=masks[:, :1]), r"text \(3, 1, 14, 12\)"),
        (dict(text_mask=masks[..., 1:]), r"text_mask \(3, 2, 13\) must be"),
        (dict(t=t[:1], text=texts[:1], text_mask=masks[:1]), r"x \(3, 16, 12, 4, 4\), t \(1, 2\)"),
        (dict(t=t[:, 0]), r"t \(3,\)"),
        (dict(x=x[0]), r"x \(16, 12, 4, 4\)"),
        (dict(first_seen=torch.zeros(2, 2)), r"first_seen \(2, 2\) must be \(2,\) or \(3, 2\)"),
        (dict(first_seen=[0]), r"first_seen \(1,\)"),
        (dict(chunks=[0, 1, 2]), r"chunks \[0, 1, 2\] must be 2 rising numbers"),
        (dict(chunks=[1, 0]), r"chunks \[1, 0\] must be"),
        (dict(conditional=torch.tensor([True, False])), r"conditional \(2,\) must be a bool or \(3, 2\)"),
        (dict(x=x[:0], t=t[:0], text=texts[:0], text_mask=masks[:0]), r"t \(0, 2\) is empty"),
        (dict(store=1), "store 1 needs a cache: give a KVCache"),
    ):
        with bad(message):
            dit(**dict(x=x, t=t, text=texts, text_mask=masks) | change)
    assert torch.equal(dit(x, t, texts, masks, chunks=torch.arange(2)), dit(x, t, texts, masks))


def test_cached_chunks_are_read_in_the_order_of_the_video():
    dit, text, mask, _ = small()
    x, t = torch.randn(1, 16, 18, 4, 4), torch.tensor([[0.9, 0.8, 0.1]])
    texts, masks = text.expand(1, 3, -1, -1), mask.expand(1, 3, -1)
    one = lambda i, **more: dit(
        x[:, :, 6 * i : 6 * i + 6], t[:, i : i + 1], texts[:, :1], masks[:, :1], chunks=[i], **more
    )
    cache = magi.KVCache()
    for i in 1, 0:  # history that is computed anew may come in any order
        one(i, first_seen=[i], cache=cache, store=1)
    whole = dit(x, t, texts, masks, first_seen=[0, 1, 0])
    assert cache.chunks == [0, 1] and same(one(2, cache=cache), whole[:, :, 12:])


def test_cached_chunks_of_another_size_are_refused():
    dit, text, mask, _ = small()
    forward = lambda x, chunk, **more: dit(
        x, torch.full((len(x), 1), 0.5), text.expand(len(x), 1, -1, -1), mask.expand(len(x), 1, -1),
        chunks=[chunk], **more,
    )  # fmt: skip
    x, cache = torch.randn(1, 16, 6, 4, 4), magi.KVCache()
    forward(x[:, :, :1], 0, cache=cache, store=1)  # an image alone
    with bad(r"chunks of \(clips, tokens\) \{\(1, 4\)\}, those of this forward have \(1, 24\)"):
        forward(x, 1, cache=cache)
    with bad(r"those of this forward have \(2, 4\)"):
        forward(x[:, :, :1].expand(2, -1, -1, -1, -1), 1, cache=cache)


def test_missing_history_is_an_error():
    dit, text, mask, _ = small()
    x, t = torch.randn(1, 16, 6, 4, 6), torch.tensor([[0.4]])
    with bad("neither|only chunks"):
        dit(x, t, text[None, None], mask[None, None], chunks=[3], first_seen=[2])


@pytest.mark.parametrize("dtype, bar", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_float32_products_are_float32(dtype, bar):
    """Wo of a bf16 model. Without gradients a CPU may round the sum to bf16, as after every other layer."""
    torch.manual_seed(0)
    layer, x = magi.Float32Linear(64, 24, dtype), torch.randn(5, 64).to(dtype)
    exact = x.double() @ layer.weight.double().T
    assert layer(x).dtype == torch.float32 and relative(layer(x), exact) < 1e-6
    with torch.no_grad():
        assert layer(x).dtype == torch.float32 and relative(layer(x), exact) < bar


def test_a_backend_is_set_on_a_model_and_reaches_every_layer():
    called = set()

    def counting(name):
        return lambda *a, **k: called.add(name) or getattr(magi.TORCH_OPS, name)(*a, **k)

    names = [field.name for field in dataclasses.fields(magi.Ops) if field.name != "name"]
    ops = magi.Ops("counting", **{name: counting(name) for name in names})
    torch.manual_seed(0)
    dit = magi.DiT(dataclasses.replace(SMALL, num_layers=3, gated_ffn=True, fp8=True, dtype="bfloat16"))
    x, t, text = torch.randn(1, 16, 6, 4, 4), torch.full((1, 1), 0.3), torch.randn(1, 1, 14, 12)
    expected = dit(x, t, text, torch.ones(1, 1, 14))
    assert dit.ops is magi.TORCH_OPS and not called
    dit.ops = ops
    assert torch.equal(dit(x, t, text, torch.ones(1, 1, 14)), expected)
    vae = magi.VAE(magi.VAEConfig(video_size=16, embed_dim=16, depth=1, num_heads=2, use_final_proj=True))
    assert called == {*names} - {"attention"} and vae.ops is magi.TORCH_OPS
    vae.ops = ops
    vae.encode(torch.randn(1, 3, 4, 16, 16))
    assert called == {*names}
    called.clear()
    vae.decode(torch.randn(1, 16, 1, 2, 2))
    assert called == {"attention"}


def test_latents_one_patch_wide_are_refused():
    dit, text, mask, _ = small()
    with bad("at least 2x2"):
        dit(torch.randn(1, 16, 6, 4, 2), torch.tensor([[0.4]]), text[None, None], mask[None, None])


@pytest.mark.parametrize(
    "ranges, window, kept", [((5, 4, 3, 2), 4, 1), ((5, 4, 3, 2), 1, 4), ((2,), 2, 1), ((1,), 4, 1)]
)
def test_cache_does_not_grow_with_the_video(ranges, window, kept):
    peak = {}
    for chunks in (6, 12):
        steps = []
        run_small(dataclasses.replace(QUICK, kv_ranges=ranges, window=window, num_frames=24 * chunks), steps)
        peak[chunks] = max(s.cache_bytes for s in steps)
    one_chunk = (6 * 2 * 2) * 2 * (2 * 2 * 8) * 4  # tokens, layers, k and v of 2 heads of 8, float32
    assert peak[6] == peak[12] == kept * one_chunk


def storage(cache: magi.KVCache) -> int:
    """Bytes that the cache keeps in memory, whatever its tensors are views of."""
    tensors = [u for layers in cache.kv.values() for kv in layers.values() for u in kv]
    return sum({u.untyped_storage().data_ptr(): u.untyped_storage().nbytes() for u in tensors}.values())


def test_evicted_chunks_are_freed():
    cache = magi.KVCache()
    for i in range(3):
        cache.write(0, i, torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8))
    cache.evict(2)
    assert storage(cache) == cache.bytes == 2 * 5 * 2 * 8 * 4


def test_the_cache_gives_back_what_was_written_without_a_copy():
    torch.manual_seed(5)
    cache, chunks = magi.KVCache(), torch.randn(4, 2, 3, 1, 8)
    for i, u in enumerate(chunks):
        for layer in range(2):
            cache.write(layer, i, u + layer, -u)
    assert cache.chunks == [0, 1, 2, 3] and cache.bytes == 2 * 2 * 4 * chunks.numel()
    kv = cache.read(1, [1, 2])
    assert len(kv) == 2 and all(k is cache.kv[i][1][0] for i, (k, _) in enumerate(kv, start=1))
    assert all(torch.equal(k, chunks[i] + 1) and torch.equal(v, -chunks[i]) for i, (k, v) in enumerate(kv, 1))
    cache.evict(2)
    assert cache.chunks == [2, 3] and cache.bytes == 2 * 2 * 4 * chunks[2:].numel()
    assert torch.equal(cache.read(0, [2])[0][0], chunks[2])
    cache.evict(9)
    assert cache.chunks == [] and cache.bytes == 0 and cache.read(0, []) == []


def test_what_is_written_does_not_keep_the_forward_in_memory():
    cache, whole = magi.KVCache(), torch.randn(1, 60, 2, 8)
    cache.write(0, 0, whole[:, :5], whole[:, :5])
    assert storage(cache) == 2 * 5 * 2 * 8 * 4


# ---------------------------------------------------------------------------------------------------- sampler


TABLES = st.lists(st.sampled_from([0.0, 1.0, 1.5, 3.0]), min_size=5, max_size=5).map(tuple)


@st.composite
def samplers(draw) -> tuple[magi.SamplerConfig, int]:
    """Anything the spec allows, small: a config and a number of prefix frames."""
    window = draw(st.sampled_from([1, 2, 3, 4]))
    ranges = draw(st.sampled_from([(), (1,), (3,), (5, 4, 3, 2), (2, 1), (1, 1, 2, 2), (4, 5, 1)]))
    n = math.lcm(window, len(ranges) or 1) * draw(st.sampled_from([1, 2]))
    own = st.lists(st.integers(1, 8), min_size=len(ranges), max_size=len(ranges)).map(tuple)
    exceptions = draw(st.dictionaries(st.integers(0, 5), own, max_size=3))
    cfg = magi.SamplerConfig(
        kv_ranges_at=tuple(exceptions.items()),
        num_steps=n,
        window=window,
        kv_ranges=ranges,
        clean_kv_range=draw(st.sampled_from([1, 2, -1])),
        distilled=draw(st.booleans()) and (n != 12 or window in (1, 2, 4)),
        prev_scales=draw(TABLES),
        text_scales=draw(TABLES),
        special_tokens=tuple(draw(st.sets(st.sampled_from([*magi.SPECIAL_TOKENS])))),
        negative_tokens=tuple(draw(st.sets(st.sampled_from([*magi.NEGATIVE_TOKENS])))),
        num_frames=draw(st.integers(4, 100)),
        height=32,
        width=32,
        seed=draw(st.integers(0, 99)),
    )
    return cfg, draw(st.sampled_from([0, 0, 1, 5, 6, 8, 13]))


@settings(max_examples=12)
@given(samplers())
def test_any_run_emits_what_it_should_and_skipping_changes_nothing(drawn):
    cfg, frames = drawn
    prefix = torch.randn(16, frames, 4, 4) if frames else None
    steps = []
    with counted_tokens(small()[0]) as fast:
        out = run_small(cfg, steps, prefix=prefix)
    with counted_tokens(small()[0]) as slow:
        full = run_small(cfg, prefix=prefix, skip=False)
    K = math.ceil((cfg.num_frames // 4 + frames) / 6)
    assert list(out) == list(full) == list(range(K - frames // 6))
    for i in out:
        given_here = 0 if frames == 1 else max(0, frames - 6 * (i + frames // 6))
        assert out[i].shape == (16, 6 - given_here, 4, 4)
        torch.testing.assert_close(out[i], full[i], rtol=1e-3, atol=1e-3)
    if out:
        assert sum(fast) <= sum(slow) and steps[-1].step == steps[-1].total == len(steps)


@settings(max_examples=8)
@given(samplers())
def test_the_ring_forgets_only_what_is_never_read_again(drawn):
    cfg, frames = drawn
    prefix = torch.randn(16, frames, 4, 4) if frames else None
    out = run_small(cfg, prefix=prefix)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(magi.KVCache, "evict", lambda self, before: None)
        for i, latents in run_small(cfg, prefix=prefix).items():
            assert same(latents, out[i])


def test_zero_branches_are_skipped_and_counted():
    cfg = dataclasses.replace(QUICK, num_steps=16, num_frames=96)
    with counted_tokens(small()[0]) as fast:
        out = run_small(cfg)
    with counted_tokens(small()[0]) as slow:
        full = run_small(cfg, skip=False)
    assert sum(fast) < 0.85 * sum(slow)
    for i in out:
        torch.testing.assert_close(out[i], full[i], rtol=1e-4, atol=1e-4)
    # Without any guidance only the branch that writes the cache is left.
    alone = dataclasses.replace(cfg, prev_scales=(1.0,) * 5, text_scales=(0.0,) * 5)
    with counted_tokens(small()[0]) as some:
        run_small(alone)
    refreshed = 3  # 3 of the 4 chunks are computed once more
    assert sum(some) == (4 * 16 + refreshed) * 6 * 2 * 2


def test_needed_follows_the_keys():
    def chunks(wanted, first):
        inputs = [magi.ChunkInput(c, 0.5, 0.1, first_seen) for c, first_seen in first.items()]
        return [c.chunk for c in magi.needed(wanted, inputs)]

    assert chunks([], {3: 3, 4: 3, 5: 3}) == []
    assert chunks([5], {2: 2, 3: 2, 4: 4, 5: 4}) == [4, 5]
    assert chunks([5], {2: 2, 3: 2, 4: 3, 5: 4}) == [2, 3, 4, 5]  # 5 -> 4 -> 3 -> 2
    assert chunks([3], {3: 0, 4: 3, 5: 3}) == [3]  # chunks 0..2 are cached


def test_only_given_chunks_that_are_read_are_computed():
    dit, seen = copy.deepcopy(small()[0]), []
    dit.register_forward_hook(lambda m, a, k, out: seen.append(k["chunks"]), with_kwargs=True)
    cfg = dataclasses.replace(QUICK, kv_ranges=(3, 2))
    next(magi.sample(dit, *small()[1:3], cfg, special_tokens=small()[3], prefix=torch.randn(16, 36, 4, 4)))
    assert seen[0] == [4, 5]  # chunk 6 sees 4, 5 and itself


def test_endless_run_streams_until_stopped():
    cfg = dataclasses.replace(QUICK, num_frames=None)
    dit, text, mask, tokens = small()
    with torch.no_grad():
        stream = magi.sample(dit, text, mask, cfg, special_tokens=tokens)
        got = dict(itertools.islice(stream, 9))
    assert list(got) == list(range(9))
    # Chunks far from the end of a finite run are the same: nothing depends on its length but the duration
    # token.
    finite = run_small(dataclasses.replace(QUICK, num_frames=24 * 20))
    assert all(same(got[i], finite[i]) for i in range(6))


@settings(max_examples=60)
@given(samplers())
def test_plan_holds_together(drawn):
    """Pure; every chunk runs once over its grid, in order; what is read is there; nothing is read again once
    it is forgotten."""
    cfg, frames = drawn
    K, P = magi.count_chunks(cfg.num_frames, frames)
    steps = list(magi.plan(cfg, K, P))
    assert steps == list(magi.plan(cfg, K, P))
    grid, d = (f(cfg.num_steps, cfg.shortcut_mode) for f in (magi.timestep_grid, magi.shortcut_d))
    assert [s.enters for s in steps if s.enters is not None] == [*range(P, K)]
    assert [s.done for s in steps if s.done is not None] == [*range(P, K)]
    for chunk in range(P, K):
        shown = [(s, c) for s in steps for c in s.noisy if c.chunk == chunk]
        assert [c.t for _, c in shown] == grid[:-1].tolist() and shown[0][0].enters == chunk
        assert sum(c.dt for _, c in shown) == pytest.approx(1) and shown[-1][0].done == chunk
        assert [s.d for s, _ in shown] == d  # the same in every stage
    stored, forgotten = [], -math.inf
    for step in steps:
        forgotten = max(forgotten, step.forget)
        stored = [c for c in stored if c >= forgotten]
        here = [c.chunk for c in step.chunks]
        clean = [c.chunk for c in step.chunks if c.clean]
        assert here == sorted(set(here)) and here[: len(clean)] == clean
        assert all(c.t == cfg.clean_t and c.dt == 0 for c in step.chunks if c.clean)
        for c in step.chunks:
            assert 0 <= c.first_seen <= c.chunk and {*range(c.first_seen, c.chunk)} <= {*stored, *here}
        stored += clean


def test_chunks_look_back_as_their_own_configs_say_asked_when_they_enter():
    cfg, asked = magi.SamplerConfig(num_steps=4), []
    cut = magi.shot_transition(cfg, 3)

    def config_of(chunk: int) -> magi.SamplerConfig:
        asked.append(chunk)
        return cut if chunk == 3 else cfg

    expected = magi.plan(cut, 6, 0)
    for step in magi.plan(cfg, 6, 0, config_of):
        same_step = next(expected)
        assert step._replace(forget=0) == same_step._replace(forget=0)
        newest = max(c.chunk for c in step.chunks)
        assert step.enters is None or max(asked) == newest  # no earlier, so that a late prompt is in time
    assert next(expected, None) is None and [*magi.plan(cfg, 6, 0)] != [*magi.plan(cut, 6, 0)]


def test_an_endless_plan_begins_like_a_finite_one():
    cfg = magi.SamplerConfig(num_steps=8)
    endless = itertools.islice(magi.plan(cfg, None, 2), 33)
    assert [s.chunks for s in endless] == [s.chunks for s in itertools.islice(magi.plan(cfg, 40, 2), 33)]


def test_shares_of_the_branches_are_the_formula():
    cfg = magi.SamplerConfig()
    at = lambda t, first_seen=3: magi.ChunkInput(4, t, 0.01, first_seen)
    assert magi.branch_shares(cfg, at(0.05), True) == {"text": 7.5, "previous": 1.5 - 7.5, "nothing": 1 - 1.5}
    assert magi.branch_shares(cfg, at(0.5), False) == {"text": 0.0, "previous": 1.0, "nothing": 0.0}
    alone = magi.branch_shares(cfg, at(0.05, first_seen=4), True)  # "previous" and "nothing" are one
    assert alone == {"text": 7.5, "previous": 1 - 7.5, "nothing": 0.0}


@pytest.mark.parametrize("num_steps", [8, 12, 16, 32, 64])
def test_the_oldest_chunk_is_run_alone_too_in_all_of_its_last_quarter(num_steps):
    cfg = magi.SamplerConfig(num_steps=num_steps, distilled=True)
    grid = magi.timestep_grid(num_steps).tolist()
    for i, t in enumerate(grid[:-1]):
        c = magi.ChunkInput(4, t, 0.01, first_seen=3)
        shares = magi.branch_shares(cfg, c, is_oldest=True)
        assert shares["alone"] == pytest.approx(0.3 if i >= 3 * num_steps // 4 else 0)
        assert shares["text"] + shares["alone"] == 1
        assert magi.branch_shares(cfg, c, is_oldest=False) == {"text": 1, "alone": 0}
        without_past = c._replace(first_seen=4)
        assert magi.branch_shares(cfg, without_past, is_oldest=True) == {"text": 1, "alone": 0}


def test_what_may_be_forgotten_by_hand():
    def stage_8(cfg: magi.SamplerConfig) -> magi.Step:
        """Of an endless run, the step in which chunks 4..7 are in flight and 3 is computed once more."""
        step = next(itertools.islice(magi.plan(cfg, None), 7 * cfg.num_steps // 4, None))
        assert [c.chunk for c in step.chunks] == [3, 4, 5, 6, 7] and step.chunks[0].clean
        return step

    cfg = magi.SamplerConfig()
    assert stage_8(cfg).forget == 3
    first = next(magi.plan(cfg, None, 6))  # after 6 prefix chunks: 6 alone sees 2..6
    assert first.forget == 2 and [c.chunk for c in first.chunks] == [2, 3, 4, 5]
    assert stage_8(dataclasses.replace(cfg, kv_ranges=())).forget == 0
    cuts = dataclasses.replace(
        cfg, kv_ranges=(8, 4, 3, 2), kv_ranges_at=((7, (1, 1, 3, 2)), (8, (1, 1, 3, 2)))
    )
    assert stage_8(cuts).forget == 2  # chunk 9, behind two cuts, will look back to 2
    far = dataclasses.replace(cfg, kv_ranges_at=((9, (9, 1)),))  # chunk 9 will look back to chunk 1
    assert stage_8(far).forget == 1


def test_bad_tensors_are_refused_at_the_call():
    dit, text, mask, tokens = small()
    for more, message in (
        (dict(prefix=torch.zeros(8, 1, 4, 4)), "prefix must be .16, T, H, W."),
        (dict(noise=torch.zeros(16, 6, 4, 4)), "noise must be .16, 18, 4, 4. for a run of 3"),
        (dict(special_tokens={}), "needs the special token 'hq_token', .* has only nothing"),
        (dict(special_tokens={"hq_token": tokens["hq_token"]}), "'duration_token_1', .* has only hq_token:"),
        (dict(special_tokens=tokens | {"duration_token_1": torch.zeros(12)}), "shape .12,., not .1, 12."),
    ):
        with bad(message):
            magi.sample(dit, text, mask, QUICK, **dict(special_tokens=tokens) | more)
    with bad("text .0, 14, 12."):
        magi.sample(dit, text.new_zeros(0, 14, 12), mask.new_zeros(0, 14), QUICK, special_tokens=tokens)
    with bad("text .13, 12. .* must be .14, 12."):
        magi.sample(dit, text[1:], mask[1:], QUICK, special_tokens=tokens)
    for others, message in (
        ((text, None), "must be tensors, not Tensor and NoneType: the mask says which rows"),
        ((text.numpy(), mask.numpy()), "not ndarray and ndarray"),  # "text () of chunk 0" was not the reason
        (([text] * 3, [mask] * 3), "not list and list"),
    ):
        with bad(message):
            magi.sample(dit, *others, QUICK, special_tokens=tokens)
    with bad("leaves nothing to generate"):
        magi.sample(dit, text, mask, dataclasses.replace(QUICK, num_frames=3), special_tokens=tokens)


def test_endless_runs_take_no_noise():
    dit, text, mask, tokens = small()
    endless = dataclasses.replace(QUICK, num_frames=None)
    with bad("noise needs num_frames"):
        magi.sample(dit, text, mask, endless, special_tokens=tokens, noise=torch.randn(16, 18, 4, 4))


def test_what_is_yielded_belongs_to_the_caller():
    dit, text, mask, tokens = small()
    plain = run_small(QUICK)
    for i, latents in magi.sample(dit, text, mask, QUICK, special_tokens=tokens):
        assert same(latents, plain[i]) and not latents.requires_grad
        latents.zero_()


def test_first_chunk_is_yielded_before_later_ones_are_done():
    steps = []
    dit, text, mask, tokens = small()
    with torch.no_grad():
        next(magi.sample(dit, text, mask, QUICK, special_tokens=tokens, progress=steps.append))
    assert len(steps) == QUICK.num_steps and steps[-1].total == 6


def test_no_more_latents_are_held_than_are_in_flight(monkeypatch):
    held, velocity = [], magi._Run.velocity
    keep = lambda run, step, x: held.append(len(x)) or velocity(run, step, x)
    monkeypatch.setattr(magi._Run, "velocity", keep)
    run_small(dataclasses.replace(QUICK, num_frames=240))
    assert max(held) == QUICK.window + 1


def test_noise_depends_on_seed_and_chunk_alone():
    shape = (16, 6, 4, 4)
    a = magi.chunk_noise(1, 2, shape)
    assert torch.equal(a, magi.chunk_noise(1, 2, shape))
    assert abs(a.mean()) < 0.1 and abs(a.std() - 1) < 0.1
    others = [magi.chunk_noise(s, c, shape) for s, c in ((1, 3), (2, 2), (2, 1), (0, 2))]
    assert all(abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.1 for b in others)
    # A longer video begins like a shorter one (without the duration token, which tells them apart).
    cfg = dataclasses.replace(QUICK, special_tokens=("hq",))
    short, long = run_small(cfg), run_small(dataclasses.replace(cfg, num_frames=144))
    for i in short:
        torch.testing.assert_close(short[i], long[i], rtol=1e-4, atol=1e-4)
    assert not torch.equal(short[0], run_small(dataclasses.replace(cfg, seed=1))[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_run_does_not_depend_on_pytorchs_defaults(dtype):
    """The noise was another, and in bfloat16 the times were rounded. Of devices, a GPU was an error."""
    cfg = dataclasses.replace(QUICK, num_steps=12)
    plain = run_small(cfg)
    torch.set_default_dtype(dtype)
    try:
        out = run_small(cfg)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(out[i], plain[i]) for i in plain)
    with torch.device("meta"):  # in the place of a GPU
        out = run_small(cfg)
    assert all(torch.equal(out[i], plain[i]) for i in plain)


def test_noise_counts_generated_chunks(monkeypatch):
    seen, noise = [], magi.chunk_noise
    monkeypatch.setattr(magi, "chunk_noise", lambda s, c, shape: seen.append(c) or noise(s, c, shape))
    run_small(QUICK, prefix=torch.randn(16, 12, 4, 4))
    assert seen == [0, 1, 2]


def test_captions_reach_their_own_chunks():
    dit, text, mask, _ = small()
    cfg = dataclasses.replace(QUICK, special_tokens=("hq",))
    one = run_small(cfg)
    two = run_small(cfg, text=torch.stack([text, text + 1]), mask=torch.stack([mask, mask]))
    assert same(one[0], two[0]) and not torch.allclose(one[1], two[1]) and not torch.allclose(one[2], two[2])
    last_goes_on = run_small(cfg, text=torch.stack([text, text + 1, text + 1]), mask=torch.stack([mask] * 3))
    assert all(same(two[i], last_goes_on[i]) for i in two)


def run_of_three(cfg: magi.SamplerConfig, prefix_chunks: int = 0) -> magi._Run:
    """A run of the small model over three chunks, before its first step."""
    dit, text, mask, tokens = small()
    prefix = torch.zeros(16, 6 * prefix_chunks, 4, 4)
    return magi._Run(dit, cfg, 3, prefix_chunks, iter([(text, mask)]), tokens, prefix, None, skip=True)


def entries(cfg: magi.SamplerConfig, chunks, prefix_chunks: int = 0) -> dict:
    """What these chunks of that run bring."""
    run = run_of_three(cfg, prefix_chunks)
    for chunk in chunks:
        run.enter(chunk)
    return run.entries


def test_late_prompts_equal_a_list():
    """An iterator is asked by each chunk when it enters; its last item goes on."""
    _, text, mask, _ = small()
    cfg = dataclasses.replace(QUICK, num_frames=120)
    texts, masks = torch.stack([text, text + 1, text - 1]), torch.stack([mask, mask, torch.zeros_like(mask)])
    expected, events = run_small(cfg, text=texts, mask=masks), []

    def late():
        for i, item in enumerate(zip(texts, masks, strict=True)):
            events.append(f"asked by {i}")
            yield item

    dit, *_, tokens = small()
    for i, latents in magi.sample(dit, late(), None, cfg, special_tokens=tokens):
        events.append(f"{i} is done")
        assert same(latents, expected[i])
    assert events == [*(f"asked by {i}" for i in range(3)), *(f"{i} is done" for i in range(5))]
    one_by_one = dataclasses.replace(cfg, window=1, kv_ranges=(2,))
    events.clear()
    for i, _ in magi.sample(dit, late(), None, one_by_one, special_tokens=tokens):
        events.append(f"{i} is done")
    assert events[:4] == ["asked by 0", "0 is done", "asked by 1", "1 is done"]


def test_a_late_chunk_may_have_its_own_guidance_and_ranges():
    dit, text, mask, tokens = small()
    own = lambda *configs: dict(
        magi.sample(dit, iter([(text, mask, c) for c in configs]), None, QUICK, special_tokens=tokens)
    )
    cut = magi.shot_transition(QUICK, 1)
    expected, out = run_small(cut), own(QUICK, cut)
    assert all(same(out[i], expected[i]) for i in expected)
    plain, out = run_small(QUICK), own(QUICK, QUICK, dataclasses.replace(QUICK, text_scales=(0.0,) * 5))
    assert same(out[0], plain[0]) and not torch.allclose(out[2], plain[2])
    for change, message in (
        (dict(num_steps=8), "num_steps 8 of one chunk is not its run's 4"),
        (dict(special_tokens=()), "special_tokens"),
        (dict(kv_ranges=()), "look further back"),
        (dict(kv_ranges_at=((2, (1, 6, 1, 1)),)), "kv_ranges .1, 6, 1, 1. of one chunk look further back"),
    ):
        with bad(message):
            own(QUICK, dataclasses.replace(QUICK, **change))


def test_texts_of_finished_chunks_are_let_go():
    dit, text, mask, tokens = small()
    alive = []

    def late():
        while True:
            fresh = text.clone()
            alive.append(weakref.ref(fresh))
            yield fresh, mask

    endless = dataclasses.replace(QUICK, num_frames=None)
    for i, _ in magi.sample(dit, late(), None, endless, special_tokens=tokens):
        assert sum(ref() is not None for ref in alive) <= QUICK.window + 1
        if i == 9:
            break
    assert len(alive) > 10


def test_late_prompts_that_do_not_fit_are_refused():
    dit, text, mask, tokens = small()
    for items, message in (
        ([], "there is no prompt"),
        (
            [(text, mask), (text[1:], mask[1:])],
            "text .13, 12. and .* of chunk 1 must be .14, 12.",
        ),
        ([(text, mask[1:])], "text_mask .13,. of chunk 0"),
    ):
        with bad(message):
            dict(magi.sample(dit, iter(items), None, QUICK, special_tokens=tokens))


def test_progress_shows_the_chunks_in_flight():
    dit, text, mask, tokens = small()
    steps = []
    more = dict(special_tokens=tokens, prefix=torch.randn(16, 6, 4, 4))  # chunk 0 is given
    out = dict(magi.sample(dit, text, mask, QUICK, progress=steps.append, **more))
    assert [p.step for p in steps] == [*range(1, len(steps) + 1)]
    assert [p.now for p in steps] == [step for step in magi.plan(QUICK, 4, 1) if step.noisy]
    for p in steps:
        assert [*p.latents] == [c.chunk for c in p.now.noisy] and p.chunk == p.now.noisy[0].chunk - 1
        if p.now.done is not None:
            assert torch.equal(p.latents[p.now.done][0], out[p.now.done - 1])


def test_special_tokens_are_fields_and_on_by_default():
    assert magi.SamplerConfig().special_tokens == ("hq", "duration")
    default = run_small(QUICK)
    for names in ((), ("hq",), ("duration",), ("hq", "duration", "3d")):
        assert not torch.allclose(run_small(dataclasses.replace(QUICK, special_tokens=names))[0], default[0])
    # the last chunk carries duration_1, the one before duration_2
    text, mask, tokens = small()[1:]
    shown = entries(QUICK, (1, 2))
    assert torch.equal(shown[2].text[0], tokens["duration_token_1"][0])
    assert torch.equal(shown[1].text[0], tokens["duration_token_2"][0])
    assert torch.equal(shown[2].text[1], tokens["hq_token"][0])
    assert torch.equal(shown[2].text[2:], text[:-2]) and shown[2].mask.sum() == mask.sum() + 2
    after_prefix = entries(QUICK, (2,), prefix_chunks=1)[2]
    assert torch.equal(after_prefix.text[0], tokens["duration_token_1"][0])


def test_special_tokens_stand_in_the_official_order():
    names = ["static_first_frames_token", "dynamic_first_frames_token", "borderness_token", "hq_token"]
    names += ["three_d_model_token", "two_d_anime_token", "duration_token_3"]
    assert magi.token_names({*magi.SPECIAL_TOKENS}, magi.SPECIAL_TOKENS, remaining=3) == names
    assert magi.token_names(["duration"], magi.SPECIAL_TOKENS, remaining=math.inf) == ["duration_token_8"]
    table = small()[3]
    rows = entries(dataclasses.replace(QUICK, special_tokens=(*magi.SPECIAL_TOKENS,)), (0,))[0].text
    assert torch.equal(rows[:7], torch.cat([table[name] for name in reversed(names)]))


def test_negative_tokens_stand_in_front_of_the_null_text():
    dit, *_, tokens = small()
    cfg = dataclasses.replace(QUICK, negative_tokens=("logo", "caption"))
    rows, valid, _ = run_of_three(cfg).null
    assert torch.equal(rows, torch.cat([tokens["logo_token"], tokens["caption_token"], dit.null_text[:12]]))
    assert valid.sum() == SMALL.null_length
    assert not torch.allclose(run_small(cfg)[0], run_small(QUICK)[0])


def test_shot_transition_changes_only_from_its_chunk_on():
    plain = run_small(QUICK)
    for kind, ranges in (("cut", (1, 1, 3, 2)), ("restyle", (5, 4, 1, 1))):
        cfg = magi.shot_transition(QUICK, 1, kind)
        assert cfg.kv_ranges_at == ((1, ranges),)
        out = run_small(cfg)
        assert same(out[0], plain[0]) and not torch.allclose(out[1], plain[1])
    with bad("first chunk has no history"):
        magi.shot_transition(QUICK, 0)
    with bad("'fade' is not"):
        magi.shot_transition(QUICK, 1, "fade")
    with bad("chunk 1 has a transition already"):
        magi.shot_transition(cfg, 1)
    ranges_in_a_list = dataclasses.replace(QUICK, kv_ranges=[5, 4, 3, 2])
    assert magi.shot_transition(ranges_in_a_list, 1, kind).kv_ranges_at == cfg.kv_ranges_at


def test_nearly_clean_blend_is_a_field():
    cfg = dataclasses.replace(QUICK, distilled=True)
    assert cfg.nearly_clean_blend == 0.7
    a, b = run_small(cfg), run_small(dataclasses.replace(cfg, nearly_clean_blend=1.0))
    assert not torch.allclose(a[1], b[1])


def test_kv_ranges_by_quarter_and_for_clean_chunks():
    cfg = magi.SamplerConfig()
    assert [magi.kv_range(cfg, i) for i in (0, 15, 16, 31, 32, 47, 48, 63)] == [5, 5, 4, 4, 3, 3, 2, 2]
    assert magi.clean_kv_range(cfg) == magi.clean_kv_range(cfg, prefix=True) == 1
    last = dataclasses.replace(cfg, clean_kv_range=-1)
    assert magi.clean_kv_range(last) == magi.clean_kv_range(last, prefix=True) == 2
    empty = dataclasses.replace(last, kv_ranges=())
    assert magi.clean_kv_range(empty) == math.inf and magi.clean_kv_range(empty, prefix=True) == 8


def test_guidance_buckets_begin_at_their_edges():
    cfg = magi.SamplerConfig()
    assert magi.guidance_scales(cfg, 0.0) == (1.5, 7.5)
    assert magi.guidance_scales(cfg, 0.3 - 5e-8) == (1.0, 0.0)  # within the tolerance: already in the next
    assert magi.guidance_scales(cfg, 0.3 - 1e-6) == (1.5, 7.5)


# -------------------------------------------------------------------------------------------------------- VAE


def test_all_frames_of_a_continuation_are_kept():
    """4 latent frames are cut 3 + 1 by the temporal tile; a lone latent frame still decodes to 4 frames."""
    vae = golden_vae()
    assert vae.decode(torch.randn(1, 4, 4, 8, 8), tile=(12, 32, 32)).shape[2] == 16


def test_temporal_tile_is_12_frames_whatever_the_fps():
    vae = golden_vae()
    x = torch.randn(1, 3, 24, 16, 16)
    assert torch.equal(vae.encode(x), vae.encode(x, tile=(12, 256, 256)))
    assert torch.equal(vae.encode(x)[:, :, :3], vae.encode(x[:, :, :12]))
    assert inspect.signature(vae.encode).parameters["tile"].default == (12, 256, 256)


def test_odd_tiles_cover_everything_and_blend():
    vae = golden_vae()
    x = torch.randn(1, 3, 4, 28, 40)
    for tile in ((4, 16, 16), (4, 16, 32), (8, 32, 16)):
        z = vae.encode(x, tile)
        assert z.shape == (1, 4, 1, 7, 10) and vae.decode(z, tile).shape == x.shape
    calls = []

    def number(window: tuple[slice, ...]) -> torch.Tensor:
        calls.append(shape_of(window))
        return torch.full((1, 1, *shape_of(window)), float(len(calls)))

    blended = vae._tiled(number, (1, 7, 7), (4, 16, 16), 0.25, scale=1, neighbour="raw")
    assert blended.shape[-1] == 7
    assert calls[:3] == [(1, 4, 4), (1, 4, 4), (1, 4, 1)]  # a third tile beyond the second's end
    row = torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0])  # the overlap starts at weight 0
    torch.testing.assert_close(blended[0, 0, 0, 0], row)


def shape_of(window: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in window)


def test_tile_strides_are_rounded_down():
    starts = []
    note = lambda window: starts.append(window[2].start) or torch.zeros(1, 1, *shape_of(window))
    golden_vae()._tiled(note, (1, 1, 8), (4, 20, 20), 0.25, scale=1, neighbour="raw")
    assert starts == [0, 3, 6]  # int(5 * 0.75) = 3


def tiled_by_hand(
    net, x: torch.Tensor, tile: list[int], stride: list[int], unit: list[int], out: int, blended: bool
) -> torch.Tensor:
    """Section 3 of the specification, in its own words: row by row, tile and stride in latents.

    unit: entries of x for each latent, per axis; out: rows of the result for each latent.
    """
    size = [n // u for n, u in zip(x.shape[2:], unit, strict=True)]
    cut = lambda axis, start: slice(start * unit[axis], (start + tile[axis]) * unit[axis])
    times = []
    for t in range(0, size[0], tile[0]):
        raw, done, rows = {}, {}, []
        places = [(i, j) for i in range(0, size[1], stride[1]) for j in range(0, size[2], stride[2])]
        for i, j in places:
            raw[i, j] = net(x[:, :, cut(0, t), cut(1, i), cut(2, j)])
            done[i, j] = raw[i, j].clone()
        neighbour = done if blended else raw
        for i, j in places:
            new = done[i, j]
            for axis, before in ((-2, (i - stride[1], j)), (-1, (i, j - stride[2]))):
                if before in raw:
                    old = neighbour[before].movedim(axis, 0)
                    now, overlap = new.movedim(axis, 0), (tile[axis] - stride[axis]) * out
                    width = min(overlap, len(old), len(now))
                    for k in range(width):  # the new tile has weight k / width
                        now[k] = (1 - k / width) * old[len(old) - width + k] + k / width * now[k]
        for i in range(0, size[1], stride[1]):
            row = [done[i, j] for j in range(0, size[2], stride[2])]
            rows.append(torch.cat([u[..., : stride[1] * out, : stride[2] * out] for u in row], -1))
        times.append(torch.cat(rows, -2))
    return torch.cat(times, 2)


def assert_tiled_by_hand(vae: magi.VAE, size: list[int], tile: list[int], overlap: float, *tiling) -> None:
    """Encoding and decoding (T, H, W) latents equals the tiler above; `tiling` is what the VAE is told."""
    stride = [tile[0], *(int(n * (1 - overlap) + 1e-9) for n in tile[1:])]
    video = torch.randn(1, 3, *(n * p for n, p in zip(size, vae.patch, strict=True)))
    latent = torch.randn(1, vae.cfg.z_chans, *size)
    with torch.no_grad():
        mean = lambda x: vae.moments(x)[0]
        encoded = tiled_by_hand(mean, video, tile, stride, [*vae.patch], 1, blended=True)
        assert relative(vae.encode(video, *tiling), encoded) < 1e-5, size
        decoded = tiled_by_hand(vae.decoder, latent, tile, stride, [1, 1, 1], vae.patch[1], blended=False)
        assert relative(vae.decode(latent, *tiling), decoded) < 1e-5, size


def tiny_vae() -> magi.VAE:
    """A VAE of random weights whose patch is the released one's."""
    torch.manual_seed(1)
    cfg = magi.VAEConfig(
        video_size=32, embed_dim=16, depth=1, num_heads=2, use_final_proj=True, mlp_ratio=1.0
    )
    return magi.VAE(cfg).eval().requires_grad_(False)


@pytest.mark.parametrize(
    "height, width",
    [(184, 184), (192, 192), (184, 200), (200, 192), (248, 184), (184, 256), (256, 256), (264, 200)],
)
def test_sizes_on_both_sides_of_stride_and_tile(height, width):
    """Tiles of 256 start at 0, 192, ...: beyond 192 there is a second one, though the first holds it all."""
    vae = tiny_vae()
    assert_tiled_by_hand(vae, [1, height // 8, width // 8], [3, 32, 32], 0.25)
    video, latent = torch.randn(1, 3, 4, height, width), torch.randn(1, 16, 1, height // 8, width // 8)
    size = max(height, width)
    off = relative(vae.decode(latent), vae.decode(latent, tile=None))
    assert off < 1e-6 if size <= 192 else off > 1e-4
    # At 200 the second tile is one latent long, and that one latent has weight 0.
    off = relative(vae.encode(video), vae.encode(video, tile=None))
    assert off < 1e-6 if size <= 200 else off > 1e-4


@settings(max_examples=20)
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 13), st.integers(1, 13)),
    st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 4, 5, 8]), st.sampled_from([1, 3, 4, 8])),
    st.sampled_from([0.0, 0.2, 0.25, 0.5, 0.75]),
)
def test_any_tiling_is_the_specifications(size, tile, overlap):
    vae = golden_vae()
    if all(int(n * (1 - overlap) + 1e-9) >= 1 for n in tile[1:]):
        in_pixels = tuple(n * p for n, p in zip(tile, vae.patch, strict=True))
        assert_tiled_by_hand(vae, [*size], [*tile], overlap, in_pixels, overlap)


def test_tiles_can_be_dealt_out():
    """parallel.py puts another `map` here: it gets all tiles of a time slice at once."""
    vae, video, calls = golden_vae(), torch.randn(1, 3, 12, 40, 40), []
    expected = vae.encode(video, (8, 32, 32))

    def backwards(fn, windows):
        calls.append(len(windows))
        return [*map(fn, windows[::-1])][::-1]

    vae.map_tiles = backwards
    try:
        assert torch.equal(vae.encode(video, (8, 32, 32)), expected) and calls == [4, 4]
    finally:
        vae.map_tiles = map


def test_vae_refuses_what_it_cannot_encode():
    vae = golden_vae()
    for shape, message in (((6, 32, 32), "6 frames: give 1 or a multiple of 4"), ((4, 30, 32), "30x32")):
        with bad(message):
            vae.encode(torch.zeros(1, 3, *shape))
    with bad("tile"):
        vae.encode(torch.zeros(1, 3, 4, 32, 32), tile=(4, 30, 32))
    for call, shape, message in (
        (vae.encode, (3, 4, 32, 32), r"encode \(3, 4, 32, 32\): give \(B, 3, frames, height, width\)"),
        (vae.encode, (1, 4, 4, 32, 32), r"encode \(1, 4, 4, 32, 32\)"),
        (vae.decode, (4, 2, 8, 8), r"decode \(4, 2, 8, 8\): give \(B, 4, T, H, W\)"),  # as sample yields them
        (vae.decode, (1, 16, 2, 8, 8), r"decode \(1, 16, 2, 8, 8\)"),
    ):
        with bad(message):
            call(torch.zeros(*shape))


def test_heads_are_normalised_by_their_deviation():
    heads = 3 + 2 * torch.randn(2, 5, 4, 16, dtype=torch.float64, requires_grad=True)
    deviation, mean = torch.std_mean(heads, dim=-1, correction=0, keepdim=True)
    expected, made = (heads - mean) / (deviation + 1e-5), magi.VAEBlock.normalise(heads)
    assert relative(made, expected) < 1e-12
    weight = torch.randn_like(heads)
    grads = [torch.autograd.grad((out * weight).sum(), heads)[0] for out in (made, expected)]
    assert relative(*grads) < 1e-12


def test_vae_bears_constant_heads():
    vae = magi.VAE(magi.VAEConfig(video_size=16, embed_dim=32, depth=1, num_heads=2, use_final_proj=True))
    torch.nn.init.zeros_(vae.encoder.blocks[0].qkv.weight)  # the deviation within every head is 0
    torch.nn.init.zeros_(vae.encoder.blocks[0].qkv.bias)
    assert vae.encode(torch.randn(1, 3, 4, 16, 16)).isfinite().all()


def test_final_projection_gives_narrow_models_spare_channels():
    cfg = magi.VAEConfig(video_size=16, embed_dim=24, depth=1, num_heads=2, use_final_proj=True)
    vae = magi.VAE(cfg)
    assert vae.decoder.last_layer.in_channels == 4
    assert vae.decode(vae.encode(torch.randn(1, 3, 4, 16, 16))).shape == (1, 3, 4, 16, 16)


def test_the_last_convolution_is_pytorchs_with_its_gradients():
    conv = torch.nn.Conv3d(4, 3, 3, padding=1)
    video = torch.randn(1, 4, 5, 16, 24, requires_grad=True)
    results = []
    for op in (lambda x: magi.pixel_conv(x, conv), conv):
        out = op(video)
        grads = torch.autograd.grad(out.square().sum(), (video, conv.weight, conv.bias))
        results.append([out, *grads])
    for ours, expected in zip(*results, strict=True):
        assert relative(ours, expected) < 1e-5


# ---------------------------------------------------------------------------------------------------- kernels


# The interpreter is slow: few examples, each with all there is to check.
# Without shrinking: in the interpreter it would take minutes until a failure is shown.
kernel_settings = settings(
    max_examples=8, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
)


def close(ours: torch.Tensor, reference: torch.Tensor, exact: torch.Tensor, least: float = 0) -> None:
    """Ours is no further from the result in float64 than the reference in the same type (and a little).

    `least`: the size of what was summed, where a sum may cancel.
    """
    size = max(exact.abs().max().item(), least) + 1e-30
    off, allowed = ((u.double() - exact).abs().max() / size for u in (ours, reference))
    rounding = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[ours.dtype]
    assert torch.isfinite(ours).all() and off <= 3 * allowed + rounding, (float(off), float(allowed))


@st.composite
def attention_problem(draw):
    """Chunks with some non-empty span of their own, over cached and new keys, joined."""
    batch, chunks, c = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 21))
    heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    hd = draw(st.sampled_from([16, 32, 64, 128]))
    old, new = draw(st.integers(0, 20)), draw(st.integers(1, 30))
    spans = []
    for _ in range(draw(st.sampled_from([1, batch])) * chunks):
        start = draw(st.integers(0, old + new - 1))
        spans.append([start, draw(st.integers(start + 1, old + new))])
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    size = draw(st.sampled_from([1e-3, 1.0, 8.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    make = lambda n, h: (size * torch.randn(batch, n, h, hd, generator=generator)).to(dtype)
    q, k, v = make(chunks * c, heads * group), make(old + new, heads), make(old + new, heads)
    return q, k, v, torch.tensor(spans).reshape(-1, chunks, 2)


@kernel_settings
@given(attention_problem())
def test_flash_attention_and_its_gradients_are_those_of_the_formula(kernels, problem):
    *tensors, spans = problem
    q, k, v = tensors
    results = []
    for attend, dtype in (
        (kernels.block_attention, q.dtype),
        (magi.block_attention, q.dtype),
        (magi.block_attention, torch.float64),
    ):
        inputs = [u.detach().to(dtype).requires_grad_() for u in tensors]
        out = attend(*inputs, spans)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        grads = torch.autograd.grad((out.double() * weight).sum(), inputs)
        results.append([out.detach(), *grads])
    # a chunk with one key has weights that cannot change: dq and dk are differences of equal products
    summed = 0.1 * (weight.abs().max() * max(u.abs().max() for u in (q, k)) * v.abs().max()).item()
    for ours, reference, exact in zip(*results, strict=True):
        close(ours, reference, exact, summed)


def test_flash_attention_returns_log_sum_exp(kernels):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 9, 4, 16), torch.randn(1, 13, 2, 16), torch.randn(1, 13, 2, 16)
    _, lse = kernels.flash_attention(q, k, v, torch.tensor([[[0, 13], [2, 7], [12, 13]]]))
    scores = torch.einsum("bnhd, bmhd -> hbnm", q, k.repeat_interleave(2, dim=2)) / 4
    for i, (start, end) in enumerate([(0, 13), (2, 7), (12, 13)]):
        rows = slice(3 * i, 3 * i + 3)
        assert torch.allclose(lse[:, :, rows], scores[:, :, rows, start:end].logsumexp(-1), atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(spans=[[2, 2]]), "span .2, 2. of chunk 0 is empty .*at least one"),
        (dict(spans=[[0, 99]]), "span .0, 99. of chunk 0 .*leaves the 6 keys"),
        (dict(hd=48), "head width 48 must be 16, 32, 64 or 128: use the backend 'torch'"),
        (dict(dtype=torch.float64), "float64"),
    ],
)
def test_flash_attention_refuses(kernels, change, message):
    hd, dtype = change.get("hd", 16), change.get("dtype", torch.float32)
    q, k, v = (torch.zeros(1, n, 1, hd, dtype=dtype) for n in (4, 6, 6))
    with pytest.raises(ValueError, match=message):
        kernels.block_attention(q, k, v, torch.tensor([change.get("spans", [[0, 6]])]))


@kernel_settings
@given(
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([1e-3, 1.0, 1e3]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_fp8_matmul_rounds_as_the_reference(kernels, rows, n_in, n_out, size, smooth, seed):
    torch.manual_seed(seed)
    n_in, n_out = 16 * n_in, 16 * n_out
    x = (size * torch.randn(rows, n_in)).bfloat16()
    weight = torch.randn(n_out, n_in).to(torch.float8_e4m3fn)
    divide = (size * (0.01 + torch.rand(1, n_in))) if smooth else torch.full((n_in,), size / 50)
    scale = torch.tensor([0.37])
    ours, reference = kernels.fp8_matmul(x, weight, divide, scale), magi.fp8_matmul(x, weight, divide, scale)
    assert ours.dtype == reference.dtype == torch.bfloat16
    # the sums are taken in another order, which can turn over the last bit of a bf16
    assert (ours.float() - reference.float()).norm() <= 2e-3 * reference.float().norm()


@kernel_settings
@given(
    st.sampled_from([(1, 1), (2, 3), (5, 2)]),
    st.sampled_from([16, 40, 192]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([1e-3, 1.0, 100.0]),
    st.integers(0, 1000),
)
def test_fused_steps_and_their_gradients_are_the_references(kernels, shape, width, dtype, size, seed):
    torch.manual_seed(seed)
    (n, c), hd = shape, 16
    norm, head_norm = magi.LayerNorm1p(width, 1e-6), magi.LayerNorm1p(hd, 1e-6)
    for p in (*norm.parameters(), *head_norm.parameters()):
        torch.nn.init.normal_(p, std=0.3)
    x, update = (size * torch.randn(2, 2, n * c, width)).to(dtype).requires_grad_().unbind()
    gate, angles = torch.randn(2, n, width).tanh().to(dtype), torch.randn(n * c, 3 * hd // 8)
    heads = (size * torch.randn(2, n * c, 3, hd)).to(dtype).requires_grad_()
    for name, inputs, wrt in (
        ("gated_residual", (x, gate, update, norm), (x, update, *norm.parameters())),
        ("norm_rotary", (heads, head_norm, angles), (heads, *head_norm.parameters())),
    ):
        outs = [getattr(ops, name)(*inputs) for ops in (kernels, magi)]
        # of a fixed weighting, as a bf16 output may be rounded the other way, and its square with it
        weight = torch.randn(outs[0].shape)
        grads = [torch.autograd.grad((out * weight).sum(), wrt, retain_graph=True) for out in outs]
        for ours, reference in zip((outs[0], *grads[0]), (outs[1], *grads[1]), strict=True):
            assert ours.dtype == reference.dtype
            close(ours, reference, reference.double())


def test_a_whole_dit_and_a_run_through_the_kernels_equal_the_torch_path(kernels):
    torch.manual_seed(0)
    plain = magi.DiT(dataclasses.replace(SMALL, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16))
    for name, p in plain.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(p, std=0.1)
    fast = magi.DiT(plain.cfg)
    fast.load_state_dict(plain.state_dict())
    fast.ops = kernels.TRITON_OPS
    latents, text, mask = torch.randn(2, 16, 12, 4, 4), torch.randn(2, 2, 14, 12), torch.ones(2, 2, 14)
    losses, grads = [], []
    for dit in (plain, fast):
        loss = training.flow_matching_loss(
            dit, latents, text, mask, generator=torch.Generator().manual_seed(3)
        )
        loss.backward()
        losses.append(loss.item())
        grads.append(torch.cat([p.grad.flatten() for p in dit.parameters() if p.grad is not None]))
    assert abs(losses[0] - losses[1]) < 1e-4 * losses[0]
    assert (grads[0] - grads[1]).norm() < 1e-3 * grads[0].norm()
    cfg = magi.SamplerConfig(
        num_steps=2, window=2, kv_ranges=(2, 1), special_tokens=(), num_frames=48, height=32, width=32,
        distilled=True,
    )  # fmt: skip
    runs = [list(magi.sample(dit, text[0, 0], mask[0, 0], cfg)) for dit in (plain, fast)]
    for (_, a), (_, b) in zip(*runs, strict=True):
        assert (a - b).norm() < 1e-3 * a.norm()


@pytest.mark.parametrize("tma", [False, True])
def test_attention_reads_nothing_outside_a_span(kernels, tma):
    torch.manual_seed(3)
    q, k, v = torch.randn(3, 1, 40, 1, 16)
    spans, tiles = torch.tensor([[[3, 24], [3, 24]]]), lambda *_: kernels.Tiles(32, 16, tma=tma)
    clean, _ = kernels.flash_attention(q, k, v, spans, tiles=tiles)
    torch.testing.assert_close(clean, magi.block_attention(q, k, v, spans))
    k, v = k.clone(), v.clone()
    for u in (k, v):
        u[:, :3] = u[:, 24:] = math.nan
    inputs = [u.requires_grad_() for u in (q.clone(), k, v)]
    poisoned, _ = kernels.flash_attention(*inputs, spans, tiles=tiles)
    assert torch.equal(poisoned, clean)
    dq, dk, dv = torch.autograd.grad(poisoned.sum(), inputs)
    assert dq.isfinite().all() and dk.isfinite().all() and dv.isfinite().all()
    assert not dk[:, :3].any() and not dv[:, 24:].any() and dv[:, 3:24].abs().min() > 0


@pytest.mark.parametrize("size", [1e-15, 200.0])
def test_attention_bears_tiny_and_huge_numbers(kernels, size):
    # at 200 scores are some 10^5 apart: e^s would overflow, and all weights but one are zero
    torch.manual_seed(2)
    q, k, v = size * torch.randn(3, 1, 20, 2, 16)
    spans = torch.tensor([[[0, 20], [3, 17]]])
    out, lse = kernels.flash_attention(q, k, v, spans)
    assert relative(out, magi.block_attention(*(u.double() for u in (q, k, v)), spans)) < 1e-5
    assert lse.isfinite().all()


@pytest.mark.slow
@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(attention_problem(), st.sampled_from([16, 32, 64]), st.sampled_from([16, 32, 64]), st.booleans())
def test_attention_is_right_with_any_tiles(kernels, problem, m, n, tma):
    *tensors, spans = problem
    q, k, v = tensors
    tiles = lambda *_: kernels.Tiles(m, n, tma=tma)
    results = []
    for dtype, attend in (
        (q.dtype, lambda *a: kernels.flash_attention(*a, tiles=tiles)[0]),
        (q.dtype, magi.block_attention),
        (torch.float64, magi.block_attention),
    ):
        inputs = [u.detach().to(dtype).requires_grad_() for u in tensors]
        out = attend(*inputs, spans)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        results.append([out.detach(), *torch.autograd.grad((out.double() * weight).sum(), inputs)])
    summed = 0.1 * (weight.abs().max() * max(u.abs().max() for u in (q, k)) * v.abs().max()).item()
    for ours, reference, exact in zip(*results, strict=True):
        close(ours, reference, exact, summed)


def test_keys_that_are_whole_are_read_where_they_are(kernels, monkeypatch):
    # in a longer buffer, as what is joined of the cache and of this forward may lie
    torch.manual_seed(4)
    q, buffer = torch.randn(1, 8, 2, 16), torch.randn(2, 1, 40, 1, 16)
    k, v = buffer[:, :, 8:28]
    spans = torch.tensor([[[0, 20], [7, 15]]])
    expected, plain = magi.block_attention(q, k, v, spans), torch.Tensor.contiguous
    with monkeypatch.context() as patch:
        patch.setattr(torch, "cat", lambda *_, **__: pytest.fail("keys were joined"))
        patch.setattr(torch.Tensor, "clone", lambda *_, **__: pytest.fail("keys were copied"))
        keep = lambda u, **_: plain(u) if u.is_contiguous() else pytest.fail("keys were copied")
        patch.setattr(torch.Tensor, "contiguous", keep)
        out = kernels.block_attention(q, k, v, spans)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_the_cache_is_joined_in_front_of_new_keys(kernels):
    # new ones are interleaved, as those of the text are
    torch.manual_seed(4)
    q, old, kv = torch.randn(2, 8, 2, 16), torch.randn(2, 33, 1, 16), torch.randn(2, 8, 1, 32)
    k, v = kv[..., :16], kv[..., 16:]
    cache = magi.KVCache()
    for chunk in range(3):  # of 11 tokens each, of which the first two chunks are read
        cache.write(0, chunk, *(u[:, 11 * chunk : 11 * chunk + 11] for u in (old, -old)))
    spans = torch.tensor([[[0, 30], [7, 15]]])
    joined = torch.cat([old[:, :22], k], 1), torch.cat([-old[:, :22], v], 1)
    expected = magi.block_attention(q, *joined, spans)
    for ops in (kernels.TRITON_OPS, magi.TORCH_OPS):
        ctx = SimpleNamespace(ops=ops, spans=spans, chunks=[2], cached=[0, 1], cache=cache, store=0)
        ours = magi.CachedAttention(0)(q, k, v, ctx)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_keys_may_lie_apart_each_in_its_own_way(kernels):
    torch.manual_seed(4)
    q, kv = torch.randn(1, 8, 4, 16), torch.randn(1, 20, 2, 32)
    (k, v), spans = kv.chunk(2, dim=-1), torch.tensor([[[0, 20], [7, 15]]])
    for keys in ((k, v), (k, v.contiguous()), (k.contiguous(), v)):
        expected = magi.block_attention(q, *keys, spans)
        ours = kernels.block_attention(q, *keys, spans)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_batches_not_whole_tokens_apart_are_copied(kernels):
    torch.manual_seed(4)
    k = torch.randn(2 * 9 * 32 + 16).as_strided((2, 9, 1, 16), (9 * 32 + 16, 32, 16, 1))
    q, spans = torch.randn(2, 8, 1, 16), torch.tensor([[[0, 9], [2, 5]]])
    expected = magi.block_attention(q, k, k, spans)
    torch.testing.assert_close(kernels.block_attention(q, k, k, spans), expected, rtol=1e-5, atol=1e-6)


def test_plans_cover_every_query_and_key_once_longest_first(kernels):
    spans = (((0, 50), (17, 30), (30, 90)), ((5, 6), (0, 90), (40, 41)))
    tiles = kernels.plan_queries(spans, 2, 99, 90, 16)
    assert sorted(row + i for row, count, *_ in tiles for i in range(count)) == list(range(198))
    for row, count, key, keys in tiles:
        b, query = divmod(row, 99)
        start, end = spans[b][query // 33]
        assert (query + count - 1) // 33 == query // 33
        assert (key, keys) == (b * 90 + start, end - start)
    lengths = [keys for *_, keys in tiles]
    assert lengths == sorted(lengths, reverse=True) and min(lengths) >= 1
    tiles, runs = kernels.plan_keys(spans, 2, 99, 90, 16)
    assert sorted(row + i for row, count, *_ in tiles for i in range(count)) == list(range(180))
    for row, count, first, number in tiles:
        b, key = divmod(row, 90)
        queries = [(b * 99 + start, 33) for start in (0, 33, 66)]
        for i in range(count):  # every key of a tile has the same readers
            readers = [u for u, (s, e) in zip(queries, spans[b], strict=True) if s <= key + i < e]
            assert runs[first : first + number] == readers
    work = [sum(rows for _, rows in runs[first : first + number]) for _, _, first, number in tiles]
    assert work == sorted(work, reverse=True)
    with bad("100 queries: one per chunk, all of a size"):
        kernels.plan_queries(spans, 2, 100, 90, 16)


def test_every_e4m3_rounding_is_the_references(kernels):
    # all bf16 numbers: ties, those below the smallest e4m3, those beyond the largest
    x = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    x = x[x.isfinite()].reshape(-1, 64)
    x8 = kernels.quantise(x, torch.ones(64), kernels.Tiles(256, 64))
    assert torch.equal(x8.float(), x.float().clamp(-448, 448).to(torch.float8_e4m3fn).float())


def test_fp8_matmul_by_descriptor_equals_by_pointer(kernels):
    torch.manual_seed(6)
    x8, weight = torch.randn(37, 48).to(torch.float8_e4m3fn), torch.randn(19, 48).to(torch.float8_e4m3fn)
    tiles = [lambda *_, tma=tma: kernels.Tiles(16, 16, 32, tma=tma) for tma in (False, True)]
    outs = [kernels.product(x8, weight, torch.tensor([0.5]), found) for found in tiles]
    assert torch.equal(*outs) and relative(outs[0], x8.double() @ weight.double().T / 2) < 3e-3


def test_fp8_matmul_of_many_tiles(kernels):
    torch.manual_seed(6)
    x8, weight = (torch.randn(n, 32).to(torch.float8_e4m3fn) for n in (8 * 16 + 40, 40))
    tiles = lambda *_: kernels.Tiles(16, 16, 32)  # 11 tiles down: more than a band
    out = kernels.product(x8, weight, torch.tensor([1.0]), tiles)
    assert relative(out, x8.double() @ weight.double().T) < 3e-3


def test_fp8_matmul_passes_gradients_on(kernels):
    x, weight = torch.randn(3, 16, requires_grad=True), torch.randn(16, 16).to(torch.float8_e4m3fn)
    grads = [torch.autograd.grad(ops.fp8_matmul(x, weight, torch.ones(16), torch.ones(1)).float().sum(), x)[0]
             for ops in (kernels, magi)]  # fmt: skip
    assert torch.equal(*grads) and grads[0].any()


def test_an_fp8_model_and_a_vae_through_the_kernels_equal_the_torch_path(kernels):
    torch.manual_seed(0)
    cfg = dataclasses.replace(
        SMALL, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=16, dtype="bfloat16", fp8=True
    )
    plain = magi.DiT(cfg).requires_grad_(False)
    fp8 = [(name, p) for name, p in plain.named_parameters() if p.dtype == torch.float8_e4m3fn]
    assert len(fp8) == 7  # q, k, v, qx, proj, fc1 and fc2 of the middle layer
    for name, b in (*plain.named_buffers(), *fp8):
        values = torch.randn(b.shape) if name.endswith("weight") else 0.01 + 0.02 * torch.rand(b.shape)
        b.copy_(values.to(b.dtype))
    fast = magi.DiT(cfg).requires_grad_(False)
    fast.load_state_dict(plain.state_dict())
    fast.ops = kernels.TRITON_OPS
    x, t = torch.randn(1, 16, 12, 4, 4), torch.tensor([[0.9, 0.2]])
    text, mask = torch.randn(1, 2, 14, 12), (torch.arange(14) < torch.tensor([[[3], [14]]])).long()
    a, b = (dit(x, t, text, mask) for dit in (fast, plain))
    assert relative(a, b) < 3e-2 and b.std() > 0  # bf16 in another order: the recorded fp8 run's bar

    vae_cfg = magi.VAEConfig(
        video_size=32, video_length=4, embed_dim=32, depth=1, num_heads=2, use_final_proj=True
    )
    plain, fast = magi.VAE(vae_cfg), magi.VAE(vae_cfg)
    fast.load_state_dict(plain.state_dict())
    fast.ops = kernels.TRITON_OPS
    with torch.no_grad():
        video = torch.rand(1, 3, 4, 16, 24)
        assert relative(fast.encode(video), plain.encode(video)) < 1e-5


def test_triton_backend_says_what_is_missing(kernels, no_interpreter, monkeypatch):
    q = torch.randn(1, 4, 1, 16)
    for call in (lambda: kernels.attention(q, q, q), lambda: kernels.arch_of("cpu")):
        with bad("needs an NVIDIA GPU.*use 'torch'"):
            call()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    known = {(8, 0): 89, (8, 9): 89, (9, 0): 90, (10, 0): 100, (11, 0): 100, (12, 0): 120, (7, 5): None}
    for capability, arch in known.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        if arch:
            assert kernels.arch_of("cuda") == arch
        else:
            with bad("Tesla T4 has 7.5"):
                kernels.arch_of("cuda")
    monkeypatch.setitem(sys.modules, "triton", None)  # as if Triton could not be imported
    monkeypatch.delitem(sys.modules, "magi_kernels")
    with bad("backend 'triton' is not available here.*use 'torch'"):
        magi.get_ops("triton")
    assert magi.get_ops("auto") is magi.TORCH_OPS and magi.get_ops("auto", "cpu") is magi.TORCH_OPS
    with bad("backend 'cuda' is not 'auto', 'torch' or 'triton'"):
        magi.get_ops("cuda")
