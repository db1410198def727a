"""Tests: equality with the recorded runs of the official code (goldens/), then everything it does not cover.

    pytest              all but the long checks        pytest -m slow     those
"""

import dataclasses
import gc
import inspect
import itertools
import json
import math
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import convert_weights as cw
import magi

HERE = Path(__file__).parent
GOLDENS = HERE / "goldens"
torch.manual_seed(0)


def golden(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDENS / f"{name}.safetensors")


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@cache
def golden_dit(name: str) -> magi.DiT:
    cfg, _ = cw.configs_from_upstream(json.loads((GOLDENS / f"{name}.config.json").read_text()))
    dit = magi.DiT(cfg)
    dit.load_state_dict(cw.convert_dit(golden(f"{name}.weights")), strict=True)
    return dit.eval().requires_grad_(False)


@cache
def golden_vae() -> magi.VAE:
    vae = magi.VAE(cw.vae_config_from_upstream(json.loads((GOLDENS / "vae.config.json").read_text())))
    vae.load_state_dict(cw.convert_vae(golden("vae.weights")), strict=True)
    return vae.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------ goldens

CASES = {case["case"]: case for case in json.loads((GOLDENS / "sampler_cases.json").read_text())}
TOKEN_FLAGS = {"PAD_STATIC": "static", "PAD_DYNAMIC": "dynamic", "PAD_BORDERNESS": "borderness", "PAD_HQ": "hq",
               "PAD_THREE_D_MODEL": "3d", "PAD_TWO_D_ANIME": "2d", "PAD_DURATION": "duration"}


def golden_run(name: str, **changes) -> tuple[magi.DiT, magi.SamplerConfig, dict, dict]:
    """Model, sampler config, recorded tensors and further arguments of a recorded run."""
    case, run = CASES[name], golden(name)
    upstream = json.loads((GOLDENS / f"{case['model']}.config.json").read_text())
    _, cfg = cw.configs_from_upstream(upstream | {"runtime_config": case["runtime"], "engine_config": case["engine"]})
    flags = case["special_tokens"]
    cfg = dataclasses.replace(cfg, special_tokens=tuple(TOKEN_FLAGS[f] for f in flags if f in TOKEN_FLAGS),
                              negative_tokens=magi.NEGATIVE_TOKENS if "NEG_PROMPT" in flags else (), **changes)
    more = dict(special_tokens=golden(f"{case['model']}.special_tokens"), noise=run["noise"][0],
                prefix=run["prefix"][0] if "prefix" in run else None)
    return golden_dit(case["model"]), cfg, run, more


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
    hooks = [layer.register_forward_hook(lambda m, a, out, i=i: seen.update({f"layer.{i}": out[0]}))
             for i, layer in enumerate(dit.layers)]
    hooks.append(dit.time_embed.register_forward_hook(lambda m, a, out: seen.update(t_embed=out[0])))
    hooks.append(dit.layers[0].register_forward_pre_hook(lambda m, a: seen.update(patches=a[0][0])))
    plain_attend = dit.layers[0].attn.attend
    dit.layers[0].attn.attend = lambda *a: seen.setdefault("attend", plain_attend(*a))
    try:
        velocity = dit(g["x"], g["t"][None], g["text"][None], g["text_mask"][None],
                       first_seen=[start // c for start, _ in g["kv_range"].tolist()])
    finally:
        del dit.layers[0].attn.attend
        for hook in hooks:
            hook.remove()
    angles = magi.rotary_angles(dit.rope_bands, torch.arange(18), 2, 3)
    ours = seen | {"velocity": velocity, "rope": torch.cat([angles.sin(), angles.cos()], 1),
                   "condition": dit.condition(g["t"][None], torch.ones(1, 3, dtype=torch.bool))[0],
                   "layer.0.self_attn": seen["attend"][0][0], "layer.0.cross_attn": seen["attend"][1][0]}
    for name in ("patches", "t_embed", "condition", "rope", "layer.0.self_attn", "layer.0.cross_attn", "layer.0",
                 "layer.1", "layer.2", "velocity"):
        assert relative(ours[name], g[name]) < 1e-5, name


@pytest.mark.parametrize("case", json.loads((GOLDENS / "vae_cases.json").read_text()), ids=lambda c: str(c["case"]))
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
    torch.testing.assert_close(magi.timestep_grid(n, mode), torch.tensor(SCHEDULE["timesteps"][key]), rtol=0, atol=2e-7)
    base = 16 if n == 12 else n
    assert magi.step_sizes(n, mode) == [base / 2 / k for k in SCHEDULE["intervals"][key]]


@pytest.mark.parametrize("table", SCHEDULE["windows"], ids=lambda w: f"{w['num_chunks']}-{w['window']}-{w['prefix_chunks']}")
def test_stages_equal_table(table):
    stages = list(magi.stages(table["num_chunks"], table["prefix_chunks"], table["window"]))
    assert [s.chunks[0] for s in stages] == table["chunk_start"]
    assert [s.chunks[-1] + 1 for s in stages] == table["chunk_end"]
    assert [s.own_stage[-1] for s in stages] == table["stage_start"]
    assert [s.own_stage[0] + 1 for s in stages] == table["stage_end"]


@pytest.mark.parametrize("raw, clean", json.loads((GOLDENS / "captions.json").read_text()))
def test_captions_equal_table(raw, clean):
    assert magi.clean_caption(raw) == clean


# ------------------------------------------------------------------------------------------------ a small model of our own

SMALL = magi.DiTConfig(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=48, text_dim=12,
                       text_length=14, null_length=5, dtype="float32")
TOKENS = [*(f"duration_token_{i}" for i in range(1, 9)), "hq_token", "static_first_frames_token", "trans_token",
          "dynamic_first_frames_token", "borderness_token", "three_d_model_token", "two_d_anime_token",
          "caption_token", "logo_token"]


@cache
def small() -> tuple[magi.DiT, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """A random DiT, a caption (L, C) with its mask, special tokens."""
    generator = torch.Generator().manual_seed(7)
    dit = magi.DiT(SMALL).eval().requires_grad_(False)
    for p in dit.parameters():
        p.add_(0.1 * torch.randn(p.shape, generator=generator))
    text = torch.randn(14, 12, generator=generator)
    return dit, text, (torch.arange(14) < 4).long(), {k: torch.randn(1, 12, generator=generator) for k in TOKENS}


def run_small(cfg: magi.SamplerConfig, steps: list | None = None, **more) -> dict[int, torch.Tensor]:
    dit, text, mask, tokens = small()
    with torch.no_grad():
        return dict(magi.sample(dit, more.pop("text", text), more.pop("mask", mask), cfg,
                                special_tokens=tokens, progress=(steps if steps is not None else []).append, **more))


QUICK = magi.SamplerConfig(num_steps=4, num_frames=72, height=32, width=32)


def bad(text: str):
    return pytest.raises(ValueError, match=text)


# ------------------------------------------------------------------------------------------------ DiT and cache


def test_attention_backends_agree():
    q, k, v = torch.randn(3, 10, 6, 16), torch.randn(3, 12, 2, 16), torch.randn(3, 12, 2, 16)
    mask = torch.rand(3, 1, 12) < 0.6
    mask[..., 0] = True
    torch.testing.assert_close(magi.attention(q, k, v), magi.plain_attention(q, k, v))
    torch.testing.assert_close(magi.attention(q, k, v, mask), magi.plain_attention(q, k, v, mask))
    # grouped queries: query head 3..5 read kv head 1
    torch.testing.assert_close(magi.attention(q, k, v)[:, :, 3:], magi.attention(q[:, :, 3:], k[:, :, 1:], v[:, :, 1:]))


def test_ranges_shared_by_a_batch_or_not_are_the_same_attention():
    q, k, v = torch.randn(2, 12, 4, 8), torch.randn(2, 12, 2, 8), torch.randn(2, 12, 2, 8)
    cached = torch.randn(2, 3, 2, 8), torch.randn(2, 3, 2, 8)
    ranges = torch.tensor([[0, 6], [6, 9], [3, 12], [9, 15]])
    shared = magi.block_attention(q, k, v, ranges, cached)
    torch.testing.assert_close(magi.block_attention(q, k, v, ranges.expand(2, -1, -1), cached), shared)
    # and equal to one masked attention over everything
    k, v = torch.cat([cached[0], k], 1), torch.cat([cached[1], v], 1)
    mask = torch.zeros(1, 12, 15, dtype=torch.bool)
    for i, (start, end) in enumerate(ranges.tolist()):
        mask[:, 3 * i : 3 * i + 3, start:end] = True
    torch.testing.assert_close(magi.plain_attention(q, k, v, mask.expand(2, -1, -1)), shared)


def test_a_chunk_never_sees_later_ones_nor_what_is_out_of_range():
    dit, text, mask, _ = small()
    x, t = torch.randn(1, 16, 18, 4, 6), torch.tensor([[0.9, 0.5, 0.1]])
    texts, masks = text.expand(1, 3, -1, -1), mask.expand(1, 3, -1)
    v = dit(x, t, texts, masks, first_seen=[0, 0, 1])
    changed = x.clone()
    changed[:, :, :6] += 1
    w = dit(changed, t, texts, masks, first_seen=[0, 0, 1])
    assert not torch.allclose(v[:, :, 6:12], w[:, :, 6:12])              # chunk 1 reads chunk 0
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
    rest = dit(x[:, :, 6:], t[:, 1:], texts[:, 1:], masks[:, 1:], chunks=[1, 2], first_seen=[0, 0], cache=store)
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
    torch.testing.assert_close(dit(x, t, torch.where(mask[:, None] > 0, text, 9.0)[None, None], mask[None, None]), v)
    torch.testing.assert_close(dit(x, t, text.flip(0)[None, None], mask.flip(0)[None, None]), v)


def test_missing_history_is_an_error():
    dit, text, mask, _ = small()
    with bad("neither|only chunks"):
        dit(torch.randn(1, 16, 6, 4, 6), torch.tensor([[0.4]]), text[None, None], mask[None, None], chunks=[3], first_seen=[2])


@pytest.mark.parametrize("ranges, window, kept", [((5, 4, 3, 2), 4, 1), ((5, 4, 3, 2), 1, 4), ((2,), 2, 1), ((1,), 4, 1)])
def test_cache_does_not_grow_with_the_video(ranges, window, kept):
    peak = {}
    for chunks in (6, 64):
        steps = []
        run_small(dataclasses.replace(QUICK, kv_ranges=ranges, window=window, num_frames=24 * chunks), steps)
        peak[chunks] = max(s.cache_bytes for s in steps)
    one_chunk = (6 * 2 * 2) * 2 * (2 * 2 * 8) * 4                         # tokens, layers, k and v of 2 heads of 8, float32
    assert peak[6] == peak[64] == kept * one_chunk


# ------------------------------------------------------------------------------------------------ sampler

TABLES = st.lists(st.sampled_from([0.0, 1.0, 1.5, 3.0]), min_size=5, max_size=5).map(tuple)


@st.composite
def samplers(draw) -> tuple[magi.SamplerConfig, int]:
    """Anything the spec allows, small: a config and a number of prefix frames."""
    window = draw(st.sampled_from([1, 2, 3, 4]))
    ranges = draw(st.sampled_from([(), (1,), (3,), (5, 4, 3, 2), (2, 1), (1, 1, 2, 2), (4, 5, 1)]))
    n = math.lcm(window, len(ranges) or 1) * draw(st.sampled_from([1, 2]))
    cfg = magi.SamplerConfig(
        num_steps=n, window=window, kv_ranges=ranges, clean_kv_range=draw(st.sampled_from([1, 2, -1])),
        distilled=draw(st.booleans()), prev_scales=draw(TABLES), text_scales=draw(TABLES),
        special_tokens=tuple(draw(st.sets(st.sampled_from(magi.SPECIAL_TOKENS)))),
        negative_tokens=tuple(draw(st.sets(st.sampled_from(magi.NEGATIVE_TOKENS)))),
        num_frames=draw(st.integers(1, 100)), height=32, width=32, seed=draw(st.integers(0, 99)))
    return cfg, draw(st.sampled_from([0, 0, 1, 5, 6, 8, 13]))


@settings(max_examples=25, deadline=None)
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


@settings(max_examples=15, deadline=None)
@given(samplers())
def test_the_ring_forgets_only_what_is_never_read_again(drawn):
    cfg, frames = drawn
    prefix = torch.randn(16, frames, 4, 4) if frames else None
    out = run_small(cfg, prefix=prefix)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(magi.KVCache, "evict", lambda self, before: None)
        for i, latents in run_small(cfg, prefix=prefix).items():
            assert torch.equal(latents, out[i])


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
    refreshed = 3                                                        # 3 of the 4 chunks are computed once more
    assert some[-1].tokens == (4 * 16 + refreshed) * 6 * 2 * 2


def test_needed_follows_the_keys():
    assert magi.needed([], [3, 4, 5], [3, 3, 3]) == []
    assert magi.needed([5], [2, 3, 4, 5], [2, 2, 4, 4]) == [4, 5]
    assert magi.needed([5], [2, 3, 4, 5], [2, 2, 3, 4]) == [2, 3, 4, 5]          # 5 -> 4 -> 3 -> 2
    assert magi.needed([3], [3, 4, 5], [0, 3, 3]) == [3]                         # chunks 0..2 are cached


def test_endless_run_streams_until_stopped():
    cfg = dataclasses.replace(QUICK, num_frames=None)
    dit, text, mask, tokens = small()
    with torch.no_grad():
        stream = magi.sample(dit, text, mask, cfg, special_tokens=tokens)
        got = dict(itertools.islice(stream, 9))
    assert list(got) == list(range(9))
    # Chunks far from the end of a finite run are the same: nothing depends on its length but the duration token.
    finite = run_small(dataclasses.replace(QUICK, num_frames=24 * 20))
    assert all(torch.equal(got[i], finite[i]) for i in range(6))


def test_oldest_read_by_hand():
    cfg = magi.SamplerConfig()
    *_, stage = itertools.islice(magi.stages(None, 0, 4), 8)             # chunks 4..7, 3 is refreshed
    assert stage.chunks == (4, 5, 6, 7) and magi.oldest_read(cfg, stage) == 3
    first = next(magi.stages(None, 6, 4))                                # after 6 prefix chunks: 6 alone sees 2..6
    assert magi.oldest_read(cfg, first, 6) == 2
    assert magi.oldest_read(dataclasses.replace(cfg, kv_ranges=()), stage) == -math.inf
    far = dataclasses.replace(cfg, kv_ranges_at=((9, (9, 1)),))          # chunk 9 will look back to chunk 1
    assert magi.oldest_read(far, stage) == 1


def test_first_chunk_is_yielded_before_later_ones_are_done():
    steps = []
    dit, text, mask, tokens = small()
    with torch.no_grad():
        next(magi.sample(dit, text, mask, QUICK, special_tokens=tokens, progress=steps.append))
    assert len(steps) == QUICK.num_steps and steps[-1].total == 6


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


def test_captions_reach_their_own_chunks():
    dit, text, mask, _ = small()
    cfg = dataclasses.replace(QUICK, special_tokens=("hq",))
    one = run_small(cfg)
    two = run_small(cfg, text=torch.stack([text, text + 1]), mask=torch.stack([mask, mask]))
    assert torch.equal(one[0], two[0]) and not torch.allclose(one[1], two[1]) and not torch.allclose(one[2], two[2])
    last_goes_on = run_small(cfg, text=torch.stack([text, text + 1, text + 1]), mask=torch.stack([mask] * 3))
    assert all(torch.equal(two[i], last_goes_on[i]) for i in two)


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
        assert torch.equal(out[0], plain[0]) and not torch.allclose(out[1], plain[1])
    with bad("first chunk has no history"):
        magi.shot_transition(QUICK, 0)
    with bad("'fade' is not"):
        magi.shot_transition(QUICK, 1, "fade")


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
    assert magi.guidance_scales(cfg, 0.3 - 5e-8) == (1.0, 0.0)           # within the tolerance: already in the next
    assert magi.guidance_scales(cfg, 0.3 - 1e-6) == (1.5, 7.5)


# ------------------------------------------------------------------------------------------------ configs

GOOD = dict(num_steps=16)
BAD_SETTINGS = [
    (dict(num_steps=10), "steps 10 must be a multiple of the window 4: try 8"),
    (dict(num_steps=4, kv_ranges=(3, 2, 1)), "steps 4 must be a multiple of the number of kv_ranges .3.: try 12"),
    (dict(height=500), "height 500 must be a multiple of 16, at least 32: the nearest is 496"),
    (dict(width=8), "width 8 .* nearest is 32"), (dict(num_frames=0), "num_frames 0"), (dict(window=0), "window 0"),
    (dict(special_tokens=("hd",)), "unknown special token 'hd': choose from static"),
    (dict(negative_tokens=("hq",)), "unknown negative token 'hq'"), (dict(kv_ranges=(0,)), "at least 1"),
    (dict(text_scales=(1.0,)), "one length"), (dict(shortcut_mode="8,8"), "'8,8'"), (dict(seed=-1), "seed -1"),
    (dict(clean_kv_range=0), "clean_kv_range 0"), (dict(fps=0), "fps 0"),
]


@pytest.mark.parametrize("change, message", BAD_SETTINGS, ids=lambda v: str(v)[:40])
def test_bad_settings_are_refused_when_the_config_is_made(change, message):
    with bad(message):
        magi.SamplerConfig(**GOOD | change)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 8), st.integers(0, 6))
def test_steps_are_accepted_exactly_if_divisible_and_the_advice_is_right(n, window, r):
    ranges = tuple(range(1, r + 1))
    try:
        magi.SamplerConfig(num_steps=n, window=window, kv_ranges=ranges)
        ok = True
    except ValueError as error:
        ok = False
        advice = int(str(error).rsplit("try ", 1)[1])
        assert advice % window == 0
    assert ok == (n % window == 0 and (not r or n % r == 0))


def test_parameter_counts_of_the_zoo():
    counts = {"4.5B-base": 4_459_898_128, "24B-base": 23_899_281_936, "4.5B-distill-fp8": 4_460_979_760,
              "24B-distill-fp8": 23_902_014_382}
    with torch.device("meta"):
        for name, count in counts.items():
            assert sum(v.numel() for v in magi.DiT(magi.PRESETS[name].dit).state_dict().values()) == count, name
        assert sum(p.numel() for p in magi.VAE(magi.VAEConfig()).parameters()) == 613_755_239


def test_importing_loads_nothing_that_is_not_used():
    code = ("import sys, os; os.environ['CUDA_VISIBLE_DEVICES'] = ''; before = dict(os.environ); import magi, torch;"
            "assert not {'triton', 'transformers', 'ftfy', 'bs4', 'av', 'sentencepiece'} & set(sys.modules);"
            "assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized(); assert before == dict(os.environ)")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE)


# ------------------------------------------------------------------------------------------------ VAE


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
    blended = magi._tiled(lambda u: calls.append(u.shape[-2:]) or torch.full_like(u, len(calls)),
                          torch.zeros(1, 1, 1, 7, 7), (1, 1, 1), (1, 1, 1), (1, 4, 4), 0.25, blend_blended=False)
    assert blended.shape[-1] == 7 and calls[:3] == [(4, 4), (4, 4), (4, 1)]      # a third tile beyond the second's end
    row = blended[0, 0, 0, 0]
    torch.testing.assert_close(row, torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0]))   # the overlap starts at weight 0


def test_vae_refuses_what_it_cannot_encode():
    vae = golden_vae()
    for shape, message in (((6, 32, 32), "6 frames: give 1 or a multiple of 4"), ((4, 30, 32), "30x32")):
        with bad(message):
            vae.encode(torch.zeros(1, 3, *shape))
    with bad("tile"):
        vae.encode(torch.zeros(1, 3, 4, 32, 32), tile=(4, 30, 32))


def test_final_projection_gives_narrow_models_spare_channels():
    cfg = magi.VAEConfig(video_size=16, embed_dim=24, depth=1, num_heads=2, use_final_proj=True)
    vae = magi.VAE(cfg)
    assert vae.decoder.last_layer.in_channels == 4
    assert vae.decode(vae.encode(torch.randn(1, 3, 4, 16, 16))).shape == (1, 3, 4, 16, 16)


# ------------------------------------------------------------------------------------------------ text


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory) -> Path:
    """A T5 of a few thousand random weights with a tokenizer of its own."""
    import sentencepiece
    from transformers import T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("t5")
    words = "a red ball bounces on the green floor while two blue cats sleep near an old tree".split()
    lines = [" ".join(words[i : i + 6]) for i in range(len(words))] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "spiece"), vocab_size=60, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2)
    torch.manual_seed(0)
    T5EncoderModel(T5Config(vocab_size=64, d_model=12, d_kv=4, num_heads=2, d_ff=16, num_layers=1,
                            dropout_rate=0.0)).save_pretrained(folder)
    return folder


def test_t5_pads_truncates_and_marks_empty_captions(t5_folder):
    t5 = magi.T5(t5_folder, length=14)
    assert next(t5.model.parameters()).dtype == torch.bfloat16
    with pytest.warns(UserWarning, match="only the first 14 are used"):
        text, mask = t5(["a red ball", "", "a red ball bounces on the old tree " * 9])
    assert text.shape == (3, 14, 12) and mask.shape == (3, 14) and text.dtype == torch.float32
    assert mask[1].sum() == 0 and mask[2].sum() == 14 and 0 < mask[0].sum() < 14
    assert torch.equal(text[0][mask[0] == 0], torch.zeros(int((mask[0] == 0).sum()), 12))
    ids, _ = magi.tokenize(t5.tokenizer, ["a red ball"], 14)
    assert ids[0, mask[0].sum() - 1] == 1 and ids[0, mask[0].sum()] == 0          # </s>, then padding
    # padding changes nothing
    alone, _ = t5(["a red ball"])
    torch.testing.assert_close(alone[0], text[0], rtol=2e-2, atol=2e-2)


def test_t5_is_freed_after_use(t5_folder, tiny_folder):
    pipe = magi.load(tiny_folder / "base")
    pipe.encode_text(["a red ball"])
    gc.collect()
    assert not any(type(o) is magi.T5 for o in gc.get_objects())


# ------------------------------------------------------------------------------------------------ training


def test_timestep_law():
    t = magi.timestep_law(20000, generator=torch.Generator().manual_seed(0))
    assert 0 < t.min() and t.max() < 1
    assert abs((t < 0.3).float().mean() - 0.69) < 0.02


def test_times_never_rise_along_a_clip_and_keep_the_law():
    generator = torch.Generator().manual_seed(0)
    law_only = magi.TrainingConfig(pipeline_share=0.0)
    t, clean = magi.draw_times(4000, 4, torch.zeros(4000, dtype=torch.long), law_only, QUICK, generator)
    assert (t.diff(dim=1) <= 0).all() and not clean.any() and abs((t < 0.3).float().mean() - 0.69) < 0.02
    given_chunks = torch.randint(0, 4, (4000,), generator=generator)
    t, clean = magi.draw_times(4000, 4, given_chunks, magi.TrainingConfig(), QUICK, generator)
    assert (t.diff(dim=1) <= 0).all() and (clean.int().diff(dim=1) <= 0).all()
    assert (clean.sum(1) >= given_chunks).all() and (t[clean] == QUICK.clean_t).all() and not clean[:, -1].all()


def training_batch(n: int = 3) -> tuple[magi.DiT, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    dit = magi.DiT(SMALL)
    text, mask = torch.randn(2, n, 14, 12), (torch.arange(14) < 6).long().expand(2, n, -1)
    return dit, torch.randn(2, 16, 6 * n, 4, 4), text, mask


def test_loss_counts_noisy_chunks_only_but_gradients_reach_the_clean_ones():
    dit, latents, text, mask = training_batch()
    seen = {}
    hook = dit.register_forward_hook(lambda m, a, out: seen.update(x=a[0], v=out) or out.retain_grad())
    latents.requires_grad_()
    cfg = magi.TrainingConfig(image_share=0, video_share=1, pipeline_share=0, ranges_share=1)
    loss = magi.flow_matching_loss(dit, latents, text, mask, cfg, generator=torch.Generator().manual_seed(1))
    loss.backward()
    hook.remove()
    used = seen["v"].grad.abs().sum((1, 3, 4)) > 0                       # (B, T) frames with a loss
    frames_used = used.sum(1)
    assert (frames_used < 18).all() and (frames_used >= 6).all()
    first = (~used).int().argmin(dim=1)
    assert all(used[b, first[b]:].all() and not used[b, : first[b]].any() for b in range(2))
    assert (latents.grad[:, :, :1].abs().sum() > 0)                       # through the keys of clean chunks


def test_image_task_gives_one_clean_frame():
    dit, latents, text, mask = training_batch()
    seen = {}
    hook = dit.register_forward_hook(lambda m, a, out: seen.update(x=a[0]))
    cfg = magi.TrainingConfig(image_share=1, video_share=0, pipeline_share=0)
    magi.flow_matching_loss(dit, latents, text, mask, cfg)
    hook.remove()
    assert torch.equal(seen["x"][:, :, 0], latents[:, :, 0]) and not torch.equal(seen["x"][:, :, 1], latents[:, :, 1])


def test_loss_is_zero_for_the_true_velocity_of_a_known_batch():
    """A 'model' that answers data - noise exactly has no loss, whatever was clean or noisy."""
    dit, latents, text, mask = training_batch()

    class Oracle(torch.nn.Module):
        cfg, null_text = dit.cfg, dit.null_text

        def forward(self, x, t, *a, **k):
            level = t.repeat_interleave(6, 1)[:, None, :, None, None]
            return (latents - x) / (1 - level).clamp(min=1e-6)           # x = (1-t) noise + t data

    cfg = magi.TrainingConfig(pipeline_share=0.5)
    loss = magi.flow_matching_loss(Oracle(), latents, text, mask, cfg, generator=torch.Generator().manual_seed(5))
    assert loss < 1e-4


def test_one_batch_overfits():
    dit, latents, text, mask = training_batch(n=2)
    optimizer = torch.optim.AdamW(dit.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        generator = torch.Generator().manual_seed(0)                     # always the same noise and times
        loss = magi.flow_matching_loss(dit, latents, text, mask, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0], losses[::30]


def test_vae_loss_learns_and_weighs():
    torch.manual_seed(0)
    vae = magi.VAE(magi.VAEConfig(video_size=16, embed_dim=32, depth=1, num_heads=2, use_final_proj=True))
    video = torch.rand(2, 3, 4, 16, 16) * 2 - 1
    first, _ = magi.vae_loss(vae, video)
    assert torch.allclose(magi.vae_loss(vae, video, torch.zeros(2, 1, 4, 16, 16), kl_weight=0)[0], torch.tensor(0.0))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3)
    for _ in range(40):
        loss, recon = magi.vae_loss(vae, video)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.8 * first and recon.shape == video.shape


# ------------------------------------------------------------------------------------------------ loading and the pipeline


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, t5_folder) -> Path:
    """Model folders as `load` wants them, with random weights."""
    import shutil

    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("models")
    dit, _, _, tokens = small()
    vae_cfg = magi.VAEConfig(video_size=32, video_length=8, embed_dim=32, depth=1, num_heads=2, use_final_proj=True)
    torch.manual_seed(0)
    sampler = dataclasses.replace(QUICK, num_frames=48)
    for name, module, config in (("base", dit, {"dit": SMALL, "sampler": sampler}),
                                 ("vae", magi.VAE(vae_cfg), {"vae": vae_cfg})):
        (root / name).mkdir()
        save_file({k: v.contiguous() for k, v in module.state_dict().items()}, root / name / "model.safetensors")
        (root / name / "config.json").write_text(json.dumps({k: dataclasses.asdict(v) for k, v in config.items()}))
    save_file(tokens, root / "base" / "special_tokens.safetensors")
    shutil.copytree(t5_folder, root / "t5")
    return root


@pytest.fixture(scope="session")
def pipe(tiny_folder) -> magi.MAGI:
    return magi.load(tiny_folder / "base")


@pytest.mark.parametrize("num_frames", [1, 3, 24, 30, 97])
@pytest.mark.parametrize("mode", ["t2v", "i2v", "v2v"])
def test_exactly_as_many_frames_come_out_as_were_asked_for(pipe, mode, num_frames):
    rng = np.random.default_rng(0)
    more = {"t2v": {}, "i2v": {"image": rng.integers(0, 255, (40, 50, 3), np.uint8)},
            "v2v": {"video": rng.integers(0, 255, (37, 40, 50, 3), np.uint8)}}[mode]
    pieces = list(pipe("a red ball", num_frames=num_frames, **more))
    assert sum(map(len, pieces)) == num_frames
    assert all(p.dtype == np.uint8 and p.shape[1:] == (32, 32, 3) and 0 < len(p) <= 24 for p in pieces)


def test_a_video_goes_on_after_its_last_frames(pipe):
    video = np.random.default_rng(0).integers(0, 255, (50, 32, 32, 3), np.uint8)
    assert np.array_equal(magi.prefix_clip(None, video, 32), video[-32:])
    assert len(magi.prefix_clip(None, video[:11], 32)) == 8                # in fours
    seen = np.concatenate(list(pipe("a red ball", video=video, num_frames=8)))
    same_end = np.concatenate(list(pipe("a red ball", video=video[-32:], num_frames=8)))
    other_end = np.concatenate(list(pipe("a red ball", video=video[:-8], num_frames=8)))
    assert np.array_equal(seen, same_end) and not np.array_equal(seen, other_end)


def test_the_image_is_the_first_frame(pipe):
    """The first latent frame stays the image's own, so decoding it gives what the VAE makes of the image."""
    image = np.full((32, 32, 3), 200, np.uint8)
    first = next(iter(pipe("a red ball", image=image, num_frames=24)))
    x = magi.fit_frames(image[None], 32, 32)
    latents = dict(magi.sample(pipe.dit, *(u[0] for u in pipe.encode_text(["a red ball"])), QUICK,
                               special_tokens=pipe.special_tokens, prefix=pipe.vae.encode(x)[0] * magi.SCALE_FACTOR))
    torch.testing.assert_close(latents[0][:, :1], pipe.vae.encode(x)[0] * magi.SCALE_FACTOR)
    assert first.shape == (24, 32, 32, 3)


def test_images_are_cropped_not_stretched():
    wide = np.zeros((1, 20, 40, 3), np.uint8)
    wide[:, 4:16, 14:26] = 255                                           # a square in the middle
    height_and_width = lambda x: tuple(int((x[0, 0, 0] > 0).any(d).sum()) for d in (1, 0))
    assert height_and_width(magi.fit_frames(wide, 20, 20)) == (12, 12)
    assert height_and_width(magi.fit_frames(wide, 20, 20, "pad")) == (6, 6)
    assert height_and_width(magi.fit_frames(wide, 20, 20, "stretch")) == (12, 6)
    assert magi.fit_frames(wide, 48, 64).shape == (1, 3, 1, 48, 64)
    with bad("'zoom' is not"):
        magi.fit_frames(wide, 20, 20, "zoom")


def test_text_can_be_encoded_once_and_reused(pipe):
    text = pipe.encode_text(["a red ball"])
    again = np.concatenate(list(pipe(text, num_frames=24)))
    assert np.array_equal(again, np.concatenate(list(pipe("a red ball", num_frames=24))))


def test_bad_calls_are_refused_before_anything_is_computed(pipe):
    frames = np.zeros((3, 32, 32, 3), np.uint8)
    for more, message in ((dict(height=40), "height 40"), (dict(num_steps=5), "steps 5"),
                          (dict(video=frames), "3 frames, at least 4"), (dict(image=frames[0], video=frames), "not both"),
                          (dict(video=np.zeros((9, 32, 32, 3), np.uint8), prefix_frames=6), "prefix_frames 6"),
                          (dict(special_tokens=("best",)), "unknown special token 'best'")):
        with bad(message):
            pipe("a red ball", **more)


def test_broken_folders_are_refused(tiny_folder, tmp_path):
    import shutil

    with bad("no model in"):
        magi.load(tmp_path / "nothing")
    work = tmp_path / "models"
    shutil.copytree(tiny_folder, work)
    weights = work / "base" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with bad("truncated or corrupt"):
        magi.load(work / "base")
    weights.write_bytes(whole)
    config = json.loads((work / "base" / "config.json").read_text())
    config["dit"]["num_layers"] = 3
    (work / "base" / "config.json").write_text(json.dumps(config))
    with bad("does not fit its config: it lacks 26"):
        magi.load(work / "base")
    config["dit"]["depth"] = 3
    (work / "base" / "config.json").write_text(json.dumps(config))
    with bad("not a config with a valid 'dit' part"):
        magi.load(work / "base")
    shutil.copy(tiny_folder / "base" / "config.json", work / "base")
    (work / "t5" / "spiece.model").unlink()
    with bad("no text encoder"):
        magi.load(work / "base")
