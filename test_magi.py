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

import pytest
import torch
import train
from common import (
    CASES,
    GOLDENS,
    QUICK,
    SMALL,
    bad,
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
    ours = seen | {
        "velocity": velocity,
        "rope": torch.cat([angles.sin(), angles.cos()], 1),
        "condition": dit.condition(g["t"][None], torch.ones(1, 3, dtype=torch.bool))[0],
        "layer.0.self_attn": seen["attend"][0][0],
        "layer.0.cross_attn": seen["attend"][1][0],
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
def test_stages_equal_table(table):
    stages = list(magi.stages(table["num_chunks"], table["prefix_chunks"], table["window"]))
    assert [s.chunks[0] for s in stages] == table["chunk_start"]
    assert [s.chunks[-1] + 1 for s in stages] == table["chunk_end"]
    assert [s.own_stage[-1] for s in stages] == table["stage_start"]
    assert [s.own_stage[0] + 1 for s in stages] == table["stage_end"]


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
    ranges = torch.tensor([[0, 6], [6, 9], [3, 12], [9, 15]])
    out = magi.block_attention(q, k, v, ranges[None], cached)
    torch.testing.assert_close(magi.block_attention(q, k, v, ranges.expand(2, -1, -1), cached), out)
    k, v = torch.cat([cached[0], k], 1), torch.cat([cached[1], v], 1)
    mask = torch.full((12, 15), -math.inf)
    for i, (start, end) in enumerate(ranges.tolist()):
        mask[3 * i : 3 * i + 3, start:end] = 0
    scores = torch.einsum("bnhd, bmhd -> bhnm", q, k) / 8**0.5 + mask
    torch.testing.assert_close(torch.einsum("bhnm, bmhd -> bnhd", scores.softmax(-1), v), out)
    # ranges of their own for each clip of a batch, and the way tiny/train.py computes it
    other = torch.tensor([[0, 3], [0, 3], [6, 9], [0, 15]])
    both = magi.block_attention(q, k, v, torch.stack([ranges, other]))
    torch.testing.assert_close(both[:1], out[:1])
    torch.testing.assert_close(both[1:], magi.block_attention(q, k, v, other[None])[1:])
    torch.testing.assert_close(train.block_attention(q, k, v, torch.stack([ranges, other])), both)
    short = torch.tensor([[[0, 3], [4, 9], [9, 12], [9, 15]]]).expand(2, -1, -1)  # few keys each: gathered
    expected = magi.block_attention(q, k, v, short)
    torch.testing.assert_close(train.block_attention(q, k, v, short), expected)


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
    dit(x[:, :, :6], t[:, :1], texts[:, :1], masks[:, :1], chunks=[0], cache=store, write=[0])
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


def test_missing_history_is_an_error():
    dit, text, mask, _ = small()
    x, t = torch.randn(1, 16, 6, 4, 6), torch.tensor([[0.4]])
    with bad("neither|only chunks"):
        dit(x, t, text[None, None], mask[None, None], chunks=[3], first_seen=[2])


def test_latents_one_patch_wide_are_refused():
    dit, text, mask, _ = small()
    with bad("at least 2x2"):
        dit(torch.randn(1, 16, 6, 4, 2), torch.tensor([[0.4]]), text[None, None], mask[None, None])


@pytest.mark.parametrize(
    "ranges, window, kept", [((5, 4, 3, 2), 4, 1), ((5, 4, 3, 2), 1, 4), ((2,), 2, 1), ((1,), 4, 1)]
)
def test_cache_does_not_grow_with_the_video(ranges, window, kept):
    peak = {}
    for chunks in (6, 24):
        steps = []
        run_small(dataclasses.replace(QUICK, kv_ranges=ranges, window=window, num_frames=24 * chunks), steps)
        peak[chunks] = max(s.cache_bytes for s in steps)
    one_chunk = (6 * 2 * 2) * 2 * (2 * 2 * 8) * 4  # tokens, layers, k and v of 2 heads of 8, float32
    assert peak[6] == peak[24] == kept * one_chunk


def test_evicted_chunks_are_freed():
    cache = magi.KVCache()
    for i in range(3):
        cache.write(0, i, torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8))
    cache.evict(2)
    assert sum(u.untyped_storage().nbytes() for u in cache.layers[0][1:]) == cache.bytes


def test_the_cache_gives_views():
    torch.manual_seed(5)
    cache, chunks = magi.KVCache(), torch.randn(4, 2, 3, 1, 8)
    for i, u in enumerate(chunks):
        cache.write(0, i, u, -u)
    k, v = cache.read(0, before=3)
    assert torch.equal(k, torch.cat([*chunks[:3]], 1)) and torch.equal(v, -k)
    assert k.data_ptr() == cache.layers[0][1].data_ptr() and cache.chunks(before=3) == [0, 1, 2]
    cache.evict(2)
    assert cache.chunks(before=9) == [2, 3] and cache.bytes == 2 * 4 * chunks[2:].numel()
    assert torch.equal(cache.read(0, before=3)[0], chunks[2]) and cache.read(0, before=2) is None
    cache.evict(9)
    assert cache.chunks(before=9) == [] and cache.bytes == 0 and cache.read(0, before=9) is None


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
        special_tokens=tuple(draw(st.sets(st.sampled_from(magi.SPECIAL_TOKENS)))),
        negative_tokens=tuple(draw(st.sets(st.sampled_from(magi.NEGATIVE_TOKENS)))),
        num_frames=draw(st.integers(4, 100)),
        height=32,
        width=32,
        seed=draw(st.integers(0, 99)),
    )
    return cfg, draw(st.sampled_from([0, 0, 1, 5, 6, 8, 13]))


@settings(max_examples=25)
@given(samplers())
def test_any_run_emits_what_it_should_and_skipping_changes_nothing(drawn):
    cfg, frames = drawn
    prefix = torch.randn(16, frames, 4, 4) if frames else None
    fast, slow = [], []
    out = run_small(cfg, fast, prefix=prefix)
    full = run_small(cfg, slow, prefix=prefix, skip=False)
    K = math.ceil((cfg.num_frames // 4 + frames) / 6)
    assert list(out) == list(full) == list(range(K - frames // 6))
    for i in out:
        given_here = 0 if frames == 1 else max(0, frames - 6 * (i + frames // 6))
        assert out[i].shape == (16, 6 - given_here, 4, 4)
        torch.testing.assert_close(out[i], full[i], rtol=1e-3, atol=1e-3)
    if out:
        assert fast[-1].tokens <= slow[-1].tokens and fast[-1].step == fast[-1].total == len(fast)


@settings(max_examples=15)
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
    fast, slow = [], []
    cfg = dataclasses.replace(QUICK, num_steps=16, num_frames=96)
    out, full = run_small(cfg, fast), run_small(cfg, slow, skip=False)
    assert fast[-1].tokens < 0.85 * slow[-1].tokens
    for i in out:
        torch.testing.assert_close(out[i], full[i], rtol=1e-4, atol=1e-4)
    # Without any guidance only the branch that writes the cache is left.
    alone = dataclasses.replace(cfg, prev_scales=(1.0,) * 5, text_scales=(0.0,) * 5)
    some = []
    run_small(alone, some)
    refreshed = 3  # 3 of the 4 chunks are computed once more
    assert some[-1].tokens == (4 * 16 + refreshed) * 6 * 2 * 2


def test_needed_follows_the_keys():
    def chunks(wanted, first):
        return [s.chunk for s in magi.needed(wanted, [magi.Seat(c, 0.5, f) for c, f in first.items()])]

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


def test_oldest_read_by_hand():
    cfg = magi.SamplerConfig()
    *_, stage = itertools.islice(magi.stages(None, 0, 4), 8)  # chunks 4..7, 3 is refreshed
    assert stage.chunks == (4, 5, 6, 7) and magi.oldest_read(cfg, stage) == 3
    first = next(magi.stages(None, 6, 4))  # after 6 prefix chunks: 6 alone sees 2..6
    assert magi.oldest_read(cfg, first, 6) == 2
    assert magi.oldest_read(dataclasses.replace(cfg, kv_ranges=()), stage) == -math.inf
    cuts = dataclasses.replace(
        cfg, kv_ranges=(8, 4, 3, 2), kv_ranges_at=((7, (1, 1, 3, 2)), (8, (1, 1, 3, 2)))
    )
    assert magi.oldest_read(cuts, stage) == 2  # chunk 9, behind two cuts, will look back to 2
    far = dataclasses.replace(cfg, kv_ranges_at=((9, (9, 1)),))  # chunk 9 will look back to chunk 1
    assert magi.oldest_read(far, stage) == 1


def test_bad_tensors_are_refused_at_the_call():
    dit, text, mask, tokens = small()
    for more, message in (
        (dict(prefix=torch.zeros(8, 1, 4, 4)), "prefix must be .16, T, H, W."),
        (dict(noise=torch.zeros(16, 6, 4, 4)), "noise must be .16, 18, 4, 4. for a run of 3"),
        (dict(special_tokens={}), "special token 'hq' needs 'hq_token'"),
        (dict(special_tokens=tokens | {"duration_token_1": torch.zeros(12)}), "shape .12,., not .1, 12."),
    ):
        with bad(message):
            magi.sample(dit, text, mask, QUICK, **dict(special_tokens=tokens) | more)
    with bad("text .0, 14, 12."):
        magi.sample(dit, text.new_zeros(0, 14, 12), mask.new_zeros(0, 14), QUICK, special_tokens=tokens)
    with bad("text .13, 12. .* must be .14, 12."):
        magi.sample(dit, text[1:], mask[1:], QUICK, special_tokens=tokens)
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
    monkeypatch.setattr(magi._Run, "velocity", lambda run, *a: held.append(len(run.x)) or velocity(run, *a))
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


def test_special_tokens_are_fields_and_on_by_default():
    assert magi.SamplerConfig().special_tokens == ("hq", "duration")
    default = run_small(QUICK)
    for names in ((), ("hq",), ("duration",), ("hq", "duration", "3d")):
        assert not torch.allclose(run_small(dataclasses.replace(QUICK, special_tokens=names))[0], default[0])
    # the last chunk carries duration_1, the one before duration_2
    _, text, mask, tokens = small()
    conditions = magi.TextConditions(small()[0], text, mask, QUICK, tokens, num_chunks=3, prefix_chunks=0)
    assert torch.equal(conditions.caption(2)[0][0], tokens["duration_token_1"][0])
    assert torch.equal(conditions.caption(1)[0][0], tokens["duration_token_2"][0])
    assert torch.equal(conditions.caption(2)[0][1], tokens["hq_token"][0])
    assert conditions.caption(2)[1].sum() == mask.sum() + 2


def test_special_tokens_stand_in_the_official_order():
    names = ["static_first_frames_token", "dynamic_first_frames_token", "borderness_token", "hq_token"]
    names += ["three_d_model_token", "two_d_anime_token", "duration_token_3"]
    table = small()[3]
    vectors = magi.token_vectors({*magi.SPECIAL_TOKENS}, magi.SPECIAL_TOKENS, table, remaining=3)
    assert all(u is table[name] for u, name in zip(vectors, names, strict=True))


def test_negative_tokens_stand_in_front_of_the_null_text():
    dit, text, mask, tokens = small()
    cfg = dataclasses.replace(QUICK, negative_tokens=("logo", "caption"))
    rows, valid = magi.TextConditions(dit, text, mask, cfg, tokens, 3, 0).null
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


def test_nearly_clean_blend_is_a_field():
    cfg = dataclasses.replace(QUICK, distilled=True)
    assert cfg.nearly_clean_blend == 0.7
    a, b = run_small(cfg), run_small(dataclasses.replace(cfg, nearly_clean_blend=1.0))
    assert not torch.allclose(a[1], b[1])


def test_kv_ranges_by_quarter_and_for_clean_chunks():
    cfg = magi.SamplerConfig()
    assert [magi.kv_range(cfg, i) for i in (0, 15, 16, 31, 32, 47, 48, 63)] == [5, 5, 4, 4, 3, 3, 2, 2]
    assert magi.clean_range(cfg, False) == magi.clean_range(cfg, True) == 1
    last = dataclasses.replace(cfg, clean_kv_range=-1)
    assert magi.clean_range(last, False) == magi.clean_range(last, True) == 2
    empty = dataclasses.replace(last, kv_ranges=())
    assert magi.clean_range(empty, False) == math.inf and magi.clean_range(empty, True) == 8


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
    calls, one = [], (1, 1, 1)
    number = lambda u: calls.append(u.shape[-2:]) or torch.full_like(u, len(calls))
    blended = magi._tiled(number, torch.zeros(1, 1, 1, 7, 7), one, one, (1, 4, 4), 0.25, blend_blended=False)
    assert blended.shape[-1] == 7
    assert calls[:3] == [(4, 4), (4, 4), (4, 1)]  # a third tile beyond the second's end
    row = torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0])  # the overlap starts at weight 0
    torch.testing.assert_close(blended[0, 0, 0, 0], row)


def test_tile_strides_are_rounded_down():
    starts, one = [], (1, 1, 1)
    note = lambda u: starts.append(u.flatten()[0].item()) or u
    row = torch.arange(8.0).expand(1, 1, 1, 1, 8)
    magi._tiled(note, row, one, one, (1, 5, 5), 0.25, blend_blended=False)
    assert starts == [0, 3, 6]  # int(5 * 0.75) = 3


def test_vae_refuses_what_it_cannot_encode():
    vae = golden_vae()
    for shape, message in (((6, 32, 32), "6 frames: give 1 or a multiple of 4"), ((4, 30, 32), "30x32")):
        with bad(message):
            vae.encode(torch.zeros(1, 3, *shape))
    with bad("tile"):
        vae.encode(torch.zeros(1, 3, 4, 32, 32), tile=(4, 30, 32))


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


# ---------------------------------------------------------------------------------------------------- kernels


# The interpreter is slow: few examples, each with all there is to check.
# Without shrinking: in the interpreter it would take minutes until a failure is shown.
kernel_settings = settings(
    max_examples=12, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
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
    """Ragged chunks, each with some non-empty range of its own, over cached and new keys."""
    batch, chunks, c = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 21))
    heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    hd = draw(st.sampled_from([16, 32, 48, 64, 128]))
    old, new = draw(st.integers(0, 20)), draw(st.integers(1, 30))
    spans = []
    for _ in range(draw(st.sampled_from([1, batch])) * chunks):
        start = draw(st.integers(0, old + new - 1))
        spans.append([start, draw(st.integers(start + 1, old + new))])
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    size = draw(st.sampled_from([1e-3, 1.0, 8.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    make = lambda n, h: (size * torch.randn(batch, n, h, hd, generator=generator)).to(dtype)
    q, k, v = make(chunks * c, heads * group), make(new, heads), make(new, heads)
    cached = (make(old, heads), make(old, heads)) if old else None
    return q, k, v, torch.tensor(spans).reshape(-1, chunks, 2), cached


@kernel_settings
@given(attention_problem())
def test_flash_attention_and_its_gradients_are_those_of_the_formula(kernels, problem):
    q, k, v, ranges, cached = problem
    results = []
    for attend, dtype in (
        (kernels.block_attention, q.dtype),
        (magi.block_attention, q.dtype),
        (magi.block_attention, torch.float64),
    ):
        inputs = [u.detach().to(dtype).requires_grad_() for u in (q, k, v, *(cached or ()))]
        out = attend(*inputs[:3], ranges, tuple(inputs[3:]) or None)
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
        (dict(ranges=[[2, 2]]), "empty|at least one key|range"),
        (dict(ranges=[[0, 99]]), "range|keys"),
        (dict(hd=24), "multiple of 16"),
        (dict(dtype=torch.float64), "float64"),
    ],
)
def test_flash_attention_refuses(kernels, change, message):
    hd, dtype = change.get("hd", 16), change.get("dtype", torch.float32)
    q, k, v = (torch.zeros(1, n, 1, hd, dtype=dtype) for n in (4, 6, 6))
    with pytest.raises(ValueError, match=message):
        kernels.block_attention(q, k, v, torch.tensor([change.get("ranges", [[0, 6]])]))


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
    x, branch = (size * torch.randn(2, 2, n * c, width)).to(dtype).requires_grad_().unbind()
    gate, angles = torch.randn(2, n, width).tanh().to(dtype), torch.randn(n * c, 3 * hd // 8)
    heads = (size * torch.randn(2, n * c, 3, hd)).to(dtype).requires_grad_()
    for name, inputs, wrt in (
        ("gated_residual", (x, gate, branch, norm), (x, branch, *norm.parameters())),
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
    plain = magi.DiT(dataclasses.replace(SMALL, num_layers=1, head_dim=16))
    for name, p in plain.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(p, std=0.1)
    fast = magi.DiT(plain.cfg, kernels.TRITON_OPS)
    fast.load_state_dict(plain.state_dict())
    latents, text, mask = torch.randn(2, 16, 12, 4, 4), torch.randn(2, 2, 14, 12), torch.ones(2, 2, 14)
    losses, grads = [], []
    for dit in (plain, fast):
        loss = magi.flow_matching_loss(dit, latents, text, mask, generator=torch.Generator().manual_seed(3))
        loss.backward()
        losses.append(loss.item())
        grads.append(torch.cat([p.grad.flatten() for p in dit.parameters() if p.grad is not None]))
    assert abs(losses[0] - losses[1]) < 1e-4 * losses[0]
    assert (grads[0] - grads[1]).norm() < 1e-3 * grads[0].norm()
    cfg = magi.SamplerConfig(
        num_steps=2, window=2, kv_ranges=(2, 1), special_tokens=(), num_frames=48, height=32, width=32
    )
    runs = [list(magi.sample(dit, text[0, 0], mask[0, 0], cfg)) for dit in (plain, fast)]
    for (_, a), (_, b) in zip(*runs, strict=True):
        assert (a - b).norm() < 1e-3 * a.norm()


@pytest.mark.parametrize("tma", [False, True])
def test_attention_reads_nothing_outside_a_range(kernels, tma):
    torch.manual_seed(3)
    q, k, v = torch.randn(3, 1, 40, 1, 16)
    ranges, tiles = torch.tensor([[[3, 24], [3, 24]]]), kernels.Tiles(32, 16, tma=tma)
    clean, _ = kernels.flash_attention(q, k, v, ranges, None, tiles)
    torch.testing.assert_close(clean, magi.block_attention(q, k, v, ranges))
    k, v = k.clone(), v.clone()
    for u in (k, v):
        u[:, :3] = u[:, 24:] = math.nan
    inputs = [u.requires_grad_() for u in (q.clone(), k, v)]
    poisoned, _ = kernels.flash_attention(*inputs, ranges, None, tiles)
    assert torch.equal(poisoned, clean)
    dq, dk, dv = torch.autograd.grad(poisoned.sum(), inputs)
    assert dq.isfinite().all() and dk.isfinite().all() and dv.isfinite().all()
    assert not dk[:, :3].any() and not dv[:, 24:].any() and dv[:, 3:24].abs().min() > 0


@pytest.mark.parametrize("size", [1e-15, 200.0])
def test_attention_bears_tiny_and_huge_numbers(kernels, size):
    # at 200 scores are some 10^5 apart: e^s would overflow, and all weights but one are zero
    torch.manual_seed(2)
    q, k, v = size * torch.randn(3, 1, 20, 2, 16)
    ranges = torch.tensor([[[0, 20], [3, 17]]])
    out, lse = kernels.flash_attention(q, k, v, ranges)
    assert relative(out, magi.block_attention(*(u.double() for u in (q, k, v)), ranges)) < 1e-5
    assert lse.isfinite().all()


@pytest.mark.slow
@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(attention_problem(), st.sampled_from([16, 32, 64]), st.sampled_from([16, 32, 64]), st.booleans())
def test_attention_is_right_with_any_tiles(kernels, problem, m, n, tma):
    q, k, v, ranges, cached = problem
    tiles = kernels.Tiles(m, n, tma=tma and q.shape[-1] != 48)
    results = []
    for dtype, attend in (
        (q.dtype, lambda *a: kernels.flash_attention(*a, tiles)[0]),
        (q.dtype, magi.block_attention),
        (torch.float64, magi.block_attention),
    ):
        inputs = [u.detach().to(dtype).requires_grad_() for u in (q, k, v, *(cached or ()))]
        out = attend(*inputs[:3], ranges, tuple(inputs[3:]) or None)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        results.append([out.detach(), *torch.autograd.grad((out.double() * weight).sum(), inputs)])
    summed = 0.1 * (weight.abs().max() * max(u.abs().max() for u in (q, k)) * v.abs().max()).item()
    for ours, reference, exact in zip(*results, strict=True):
        close(ours, reference, exact, summed)


def test_keys_are_read_where_they_are(kernels, monkeypatch):
    # cached ones in a longer buffer, as the cache's views are; new ones interleaved, as those of the text are
    torch.manual_seed(4)
    q, buffer, kv = torch.randn(2, 8, 2, 16), torch.randn(2, 30, 1, 16), torch.randn(2, 9, 1, 32)
    k, v, old = kv[..., :16], kv[..., 16:], (buffer[:, :11], buffer[:, :11])
    ranges = torch.tensor([[[0, 20], [7, 15]]])
    expected, plain = magi.block_attention(q, k, v, ranges, old), torch.Tensor.contiguous
    with monkeypatch.context() as patch:
        patch.setattr(torch, "cat", lambda *_, **__: pytest.fail("keys were joined"))
        keep = lambda u, **_: plain(u) if u.is_contiguous() else pytest.fail("keys were copied")
        patch.setattr(torch.Tensor, "contiguous", keep)
        out = kernels.block_attention(q, k, v, ranges, old)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_keys_may_lie_apart_each_in_its_own_way(kernels):
    torch.manual_seed(4)
    q, kv, old = torch.randn(1, 8, 4, 16), torch.randn(1, 9, 2, 32), torch.randn(2, 1, 11, 2, 16)
    (k, v), ranges = kv.chunk(2, dim=-1), torch.tensor([[[0, 20], [7, 15]]])
    for keys in ((k, v), (k, v.contiguous()), (k.contiguous(), v)):
        expected = magi.block_attention(q, *keys, ranges, tuple(old))
        ours = kernels.block_attention(q, *keys, ranges, tuple(old))
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_batches_not_whole_tokens_apart_are_copied(kernels):
    torch.manual_seed(4)
    k = torch.randn(2 * 9 * 32 + 16).as_strided((2, 9, 1, 16), (9 * 32 + 16, 32, 16, 1))
    q, ranges = torch.randn(2, 8, 1, 16), torch.tensor([[[0, 9], [2, 5]]])
    expected = magi.block_attention(q, k, k, ranges)
    torch.testing.assert_close(kernels.block_attention(q, k, k, ranges), expected, rtol=1e-5, atol=1e-6)


def test_plans_cover_every_query_and_key_once_longest_first(kernels):
    ranges = (((0, 50), (17, 30), (30, 90)), ((5, 6), (0, 90), (40, 41)))
    plan = kernels.query_plan(ranges, 2, 100, 70, 20, 16, (20, 70))
    assert sorted(row + i for row, count, *_ in plan for i in range(count)) == list(range(200))
    lengths = [old + new for *_, old, _, new in plan]
    assert lengths == sorted(lengths, reverse=True) and min(lengths) >= 1
    tiles, runs = kernels.key_plan(ranges, 2, 100, 70, 20, 16, 20, 70)
    assert sorted(row + i for row, count, *_ in tiles for i in range(count)) == list(range(140))
    for row, count, first, number in tiles:
        b, key = divmod(row, 70)
        queries = [(b * 100 + start, min(34, 100 - start)) for start in (0, 34, 68)]
        for i in range(count):  # every key of a tile has the same readers
            readers = [u for u, (s, e) in zip(queries, ranges[b], strict=True) if s <= key + 20 + i < e]
            assert runs[first : first + number] == readers


def test_every_e4m3_rounding_is_the_references(kernels):
    # all bf16 numbers: ties, those below the smallest e4m3, those beyond the largest
    x = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    x = x[x.isfinite()].reshape(-1, 64)
    x8 = torch.empty(x.shape, dtype=torch.float8_e4m3fn)
    kernels.quantise_launch(x, torch.ones(64), x8, kernels.Tiles(256, 64)).run()
    assert torch.equal(x8.float(), x.float().clamp(-448, 448).to(torch.float8_e4m3fn).float())


def test_fp8_matmul_by_descriptor_equals_by_pointer(kernels):
    torch.manual_seed(6)
    x8, weight = torch.randn(37, 48).to(torch.float8_e4m3fn), torch.randn(19, 48).to(torch.float8_e4m3fn)
    outs = torch.zeros(2, 37, 19, dtype=torch.bfloat16)
    for out, tma in zip(outs, (False, True), strict=True):
        kernels.fp8_launch(x8, weight, torch.tensor([0.5]), out, kernels.Tiles(16, 16, 32, tma=tma)).run()
    assert torch.equal(*outs) and relative(outs[0], x8.double() @ weight.double().T / 2) < 3e-3


def test_fp8_matmul_of_many_tiles(kernels):
    torch.manual_seed(6)
    x8, weight = (torch.randn(n, 32).to(torch.float8_e4m3fn) for n in (8 * 16 + 40, 40))
    out = torch.zeros(len(x8), 40, dtype=torch.bfloat16)  # 11 tiles down: more than a band
    kernels.fp8_launch(x8, weight, torch.tensor([1.0]), out, kernels.Tiles(16, 16, 32)).run()
    assert relative(out, x8.double() @ weight.double().T) < 3e-3


def test_fp8_matmul_passes_gradients_on(kernels):
    x, weight = torch.randn(3, 16, requires_grad=True), torch.randn(16, 16).to(torch.float8_e4m3fn)
    grads = [torch.autograd.grad(ops.fp8_matmul(x, weight, torch.ones(16), torch.ones(1)).float().sum(), x)[0]
             for ops in (kernels, magi)]  # fmt: skip
    assert torch.equal(*grads) and grads[0].any()


def test_an_fp8_model_and_a_vae_through_the_kernels_equal_the_torch_path(kernels):
    torch.manual_seed(0)
    cfg = dataclasses.replace(SMALL, num_layers=3, head_dim=16, dtype="bfloat16", fp8=True)
    plain = magi.DiT(cfg).requires_grad_(False)
    for name, b in plain.named_buffers():
        values = torch.randn(b.shape) if name.endswith("weight") else 0.01 + 0.02 * torch.rand(b.shape)
        b.copy_(values.to(b.dtype))
    fast = magi.DiT(cfg, kernels.TRITON_OPS).requires_grad_(False)
    fast.load_state_dict(plain.state_dict())
    x, t = torch.randn(1, 16, 12, 4, 4), torch.tensor([[0.9, 0.2]])
    text, mask = torch.randn(1, 2, 14, 12), (torch.arange(14) < torch.tensor([[[3], [14]]])).long()
    a, b = (dit(x, t, text, mask) for dit in (fast, plain))
    assert relative(a, b) < 3e-2 and b.std() > 0  # bf16 in another order: the recorded fp8 run's bar

    vae_cfg = magi.VAEConfig(
        video_size=32, video_length=4, embed_dim=32, depth=1, num_heads=2, use_final_proj=True
    )
    plain, fast = magi.VAE(vae_cfg), magi.VAE(vae_cfg, kernels.TRITON_OPS)
    fast.load_state_dict(plain.state_dict())
    with torch.no_grad():
        video = torch.rand(1, 3, 4, 16, 32)
        assert relative(fast.encode(video), plain.encode(video)) < 1e-5


def test_triton_backend_says_what_is_missing(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", magi.SimpleNamespace(value=False))
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
    monkeypatch.setitem(sys.modules, "kernels", None)  # as if Triton could not be imported
    with bad("backend 'triton' is not available here.*use 'torch'"):
        magi.get_ops("triton")
