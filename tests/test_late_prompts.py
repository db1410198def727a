"""Prompts that come while the video is made: an iterator that each chunk asks when it enters the pipeline."""

import dataclasses
import functools
import gc
import itertools
import threading
import tracemalloc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

import magi

QUICK = {"num_steps": 4, "num_frames": 120, "height": 32, "width": 32}
TINY = Path(__file__).parent.parent / "tiny"
RED, BLUE = "a red ball bounces", "a blue square slides to the left at night"
FIVE = [RED, RED, BLUE, "", RED]  # an empty caption is a prompt, too


@functools.cache
def pipe(name: str) -> magi.MAGI:
    """A DiT of random weights, so that each prompt counts; it hands over its latents in place of frames."""
    small = dict(num_layers=2, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, ffn_size=64)
    cfg = dataclasses.replace(magi.PRESETS["tiny"].dit, **small)
    dit, generator = magi.DiT(cfg).eval().requires_grad_(False), torch.Generator().manual_seed(7)
    for p in dit.parameters():
        p.add_(0.1 * torch.randn(p.shape, generator=generator))
    loaded = magi.load(TINY / name)
    made = magi.MAGI(
        dit,
        loaded.vae,
        dataclasses.replace(loaded.sampler, **QUICK),
        loaded.special_tokens,
        magi.T5(TINY / "t5", 64, keep=True),
    )
    made.decode = lambda latent: np.repeat(latent.permute(1, 2, 3, 0).numpy(), 4, axis=0)
    return made


def video(prompt, name: str = "distill", **settings) -> list[np.ndarray]:
    return list(pipe(name)(prompt, **settings))


def assert_equal(a: list[np.ndarray], b: list[np.ndarray]) -> None:
    assert [x.shape for x in a] == [x.shape for x in b]
    for x, y in zip(a, b, strict=True):
        assert not differ(x, y)


def differ(a: np.ndarray, b: np.ndarray) -> bool:
    """By more than the order in which a busy machine may sum floats."""
    return not np.allclose(a, b, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------- equal results


PREFIXES = {
    "none": {},
    "image": {"image": np.full((32, 32, 3), 90, np.uint8)},
    "8 frames": {"video": np.arange(8 * 32 * 32 * 3, dtype=np.uint8).reshape(8, 32, 32, 3)},
    "28 frames": {"video": np.full((28, 32, 32, 3), 90, np.uint8)},
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name, window", [("base", 4), ("distill", 1)])
def test_prompts_that_come_late_give_what_a_list_gives(name, window, prefix):
    more = dict(window=window, num_frames=96) | PREFIXES[prefix]
    expected = video(FIVE, name, **more)
    assert sum(map(len, expected)) == 96
    assert_equal(video(iter(FIVE), name, **more), expected)
    assert_equal(video([magi.Prompt(p) for p in FIVE], name, **more), expected)
    assert any(map(differ, video([RED], name, **more), expected))  # the prompts do matter

    said = []
    late = (said.append(p) or magi.Prompt(p) for p in FIVE)
    stream, frames = pipe(name)(late, **more), []
    for chunk in stream:
        frames.append(chunk)
        assert len(said) < 5 or len(frames) >= 5 - window
    assert_equal(frames, expected)


def test_the_last_prompt_goes_on():
    assert_equal(video(iter([RED, BLUE])), video([RED, BLUE]))
    assert_equal(video(iter([RED, BLUE])), video([RED, BLUE, BLUE, BLUE, BLUE]))
    with pytest.raises(ValueError, match="no prompt"):
        video(iter([]))


@pytest.mark.parametrize("window", [1, 2, 4])
def test_how_long_before_it_is_seen_a_chunk_asks(window):
    """When chunk c asks, exactly the chunks before c - window + 1 have come out."""
    seen, asked = [], []
    prompts = (asked.append(len(seen)) or RED for _ in itertools.count())
    for frames in pipe("distill")(prompts, window=window):
        seen.append(frames)
    assert asked == [max(0, c - window + 1) for c in range(5)]


def test_prefix_chunks_ask_for_nothing():
    asked = []
    prompts = (asked.append(c) or RED for c in itertools.count())
    frames = video(prompts, num_frames=48, **PREFIXES["28 frames"])
    assert len(asked) == len(frames) == 3 and [len(f) for f in frames] == [20, 24, 4]


# ----------------------------------------------------------------------------------- from now on, here


@pytest.mark.parametrize("kind", ["cut", "restyle"])
@pytest.mark.parametrize("window", [1, 4])
def test_a_transition_said_late_is_the_one_planned(kind, window):
    planned = magi.shot_transition(dataclasses.replace(pipe("distill").sampler, window=window), 2, kind)
    expected = video([RED, RED, BLUE], sampler=planned)
    late = iter([RED, RED, magi.Prompt(BLUE, kind), BLUE])
    assert_equal(video(late, window=window), expected)
    assert differ(video([RED, RED, BLUE], window=window)[2], expected[2])


def test_guidance_holds_from_now_on():
    strong = {"text_scales": (9.0, 9.0, 9.0, 1.0, 1.0)}
    expected = video(RED, "base", window=1)
    late = video(iter([RED, RED, magi.Prompt(RED, settings=strong), RED]), "base", window=1)
    assert_equal(late[:2], expected[:2])
    assert differ(late[2], expected[2])
    always = [magi.Prompt(RED, settings=strong)]
    assert_equal(video(always, "base", window=1), video(RED, "base", window=1, **strong))
    assert_equal(video(iter([magi.Prompt(RED, settings=strong), RED]), "base"), video(RED, "base", **strong))


@pytest.mark.parametrize(
    "item, message",
    [
        (3, "a prompt is of type int"),
        (b"red", "a prompt is of type bytes"),
        (magi.Prompt(RED, "fade"), "transition 'fade' is not"),
        (
            magi.Prompt(RED, settings={"num_steps": 8}),
            "'num_steps' cannot change .*, only cfg_t, prev_scales",
        ),
        (magi.Prompt(RED, settings={"kv_ranges": (9,)}), "'kv_ranges' cannot change"),
        (magi.Prompt(RED, settings={"colour": 1}), "'colour' cannot change"),
        (magi.Prompt(RED, settings={"text_scales": (1.0,)}), "text_scales"),
    ],
)
def test_what_a_chunk_cannot_be_given_is_refused_by_name(item, message):
    with pytest.raises(ValueError, match=message):
        video(iter([RED, item]), "base")


def test_an_error_of_the_iterator_reaches_the_caller_after_the_frames_before_it():
    def prompts():
        yield from [RED] * 4
        raise ConnectionError("the line is dead")

    stream = pipe("distill")(prompts(), num_frames=None)
    next(stream)
    with pytest.raises(ConnectionError, match="the line is dead"):
        next(stream)


# --------------------------------------------------------------------------------------------- encoding


def counting(monkeypatch) -> list[list[str]]:
    calls, made = [], pipe("distill")
    encode = made.encode_text
    monkeypatch.setattr(made, "encode_text", lambda captions: calls.append(captions) or encode(captions))
    return calls


def test_encoded_text_is_used_again(monkeypatch):
    calls = counting(monkeypatch)
    video(iter([RED, BLUE, RED, BLUE, RED]))
    assert calls == [[RED], [BLUE]]


def test_a_few_encoded_texts_are_kept_but_not_all(monkeypatch):
    calls = counting(monkeypatch)
    many = [str(i) for i in range(9)]
    video(iter([*many, "8", "0"]), num_frames=11 * 24)
    assert calls == [[caption] for caption in [*many, "0"]]  # "8" is still there, "0" is not


@pytest.mark.parametrize("keep", [True, False])
def test_t5_is_kept_only_if_asked_for(keep):
    made = magi.load(TINY / "distill", keep_t5=keep)
    list(made(iter([RED, BLUE]), **QUICK | {"num_frames": 24}))
    assert (made.encode_text.model is not None) == keep


# ----------------------------------------------------------------------------------------- endless runs


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("count", [1, 2, 6])
def test_none_ends_an_endless_video_with_the_chunks_in_flight(window, count):
    frames = video(iter([*[RED] * count, None]), num_frames=None, window=window)
    assert [len(f) for f in frames] == [24] * count
    endless = pipe("distill")(RED, num_frames=None, window=window)
    assert_equal(frames, list(itertools.islice(endless, count)))


def test_none_ends_a_finite_video_early_and_at_once_where_it_is_first():
    assert len(video(iter([RED, BLUE, None]))) == 2
    assert video(iter([None])) == []
    assert_equal(video([RED, None]), video(iter([RED, None])))  # in a list it means the same
    with_clip = video(iter([RED, None]), num_frames=None, **PREFIXES["28 frames"])
    assert [len(f) for f in with_clip] == [20]


def test_nothing_is_asked_after_the_end():
    def prompts():
        yield RED
        yield None
        raise AssertionError("asked once too often")

    assert len(video(prompts(), num_frames=None)) == 1


def test_an_endless_video_goes_on_after_the_last_prompt():
    stream = pipe("distill")(iter([RED, BLUE]), num_frames=None)
    frames = list(itertools.islice(stream, 8))
    assert_equal(frames, list(itertools.islice(pipe("distill")([RED, BLUE], num_frames=None), 8)))


def test_the_plan_ends_where_there_is_no_config():
    cfg = magi.SamplerConfig(num_steps=8)
    for K, P in itertools.product(range(1, 7), (0, 2)):
        ended = list(magi.plan(cfg, None, P, lambda c, K=K, P=P: cfg if c < K + P else None))
        known = list(magi.plan(cfg, K + P, P))
        assert [s._replace(forget=0) for s in ended] == [s._replace(forget=0) for s in known]
        assert all(a.forget <= b.forget for a, b in zip(ended, known, strict=True))


def test_memory_of_an_endless_run_does_not_grow():
    """A new prompt and a transition for each chunk: as many latents and Python bytes after 36 as after 12."""
    words = ["red", "blue", "green"]
    again = {"cfg_t": pipe("distill").sampler.cfg_t}
    prompts = (
        magi.Prompt(f"a {words[i % 3]} ball number {i}", "cut" if i else None, again)
        for i in itertools.count()
    )
    progress, sizes, alive = [], [], weakref.WeakSet()

    def watch(p: magi.Progress) -> None:
        progress[:] = [(p.cache_bytes, len(p.latents), len(p.velocity))]
        for x in p.latents.values():
            alive.add(x)

    stream = pipe("distill")(prompts, num_frames=None, progress=watch)
    tracemalloc.start()
    try:
        for i, _ in enumerate(stream):
            if i in (12, 36):
                gc.collect()
                sizes.append((tracemalloc.get_traced_memory()[0], len(alive), progress[0]))
            if i == 36:
                break
    finally:
        tracemalloc.stop()
    (before, alive_before, held_before), (after, alive_after, held_after) = sizes
    assert after - before < 60_000 and alive_after <= alive_before and held_after == held_before


# ------------------------------------------------------------------------------------------------ preview


@pytest.mark.parametrize("name", ["base", "distill"])
def test_a_guess_at_the_clean_chunk_comes_true(name):
    """x0 = x + (1 - t) v is the chunk itself at the end, and gets nearer to it on the way."""
    guesses, ends = {}, {}

    def watch(p: magi.Progress) -> None:
        for c in p.now.noisy:
            guesses.setdefault(c.chunk, []).append(p.guess(c.chunk))
            if c.t + c.dt > 1 - 1e-6:
                ends[c.chunk] = p.latents[c.chunk]

    list(magi.load(TINY / name)(RED, num_frames=72, num_steps=8, height=64, width=64, progress=watch))
    for chunk, end in ends.items():
        errors = [((g - end).norm() / end.norm()).item() for g in guesses[chunk]]
        assert len(errors) == 8 and errors[-1] < 1e-4 and errors[4] < 0.6 and errors[4] < errors[0]
    assert len(ends) == 3


def test_a_prompt_may_come_from_another_thread():
    """The chunk waits for it, which is how a person speaks: nothing is computed meanwhile."""
    told, steps = threading.Event(), []

    def prompts():
        yield RED
        told.wait(20)
        yield BLUE

    stream = pipe("distill")(prompts(), num_frames=48, window=1, progress=steps.append)
    frames = [next(stream)]
    assert len(steps) == 4
    threading.Timer(0.05, told.set).start()
    frames += stream
    assert_equal(frames, video([RED, BLUE], num_frames=48, window=1))


def test_duration_is_not_counted_down_in_a_video_that_may_go_on():
    """An endless run says duration 8 all along, as it cannot know: its end changes nothing before it."""
    two = video(iter([RED, RED, None]), num_frames=None)
    more = video(iter([RED, RED, BLUE, None]), num_frames=None)
    assert_equal(two, more[:2])
