"""The richer world: its clips are what their captions say, and the judge reads them back."""

import dataclasses

import numpy as np
import pytest
import scenes
from scenes import CHUNK, COLOURS, SIZE

SOLO = ("alone", "wall", "pan", "follow")


def spoilt(frames, how):
    frames = frames.astype(np.float32)
    if how == "blur":
        frames = scenes._soften(scenes._soften(frames))
    if how == "noise":
        frames = frames + np.random.default_rng(0).normal(0, 8, frames.shape)
    return np.clip(frames, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def clips():
    return {kind: scenes.make_clip(7, kind=kind, events=0, heldout=None) for kind in scenes.KINDS}


def test_a_seed_is_a_clip_and_a_piece_is_a_part_of_it():
    one, same, other = (scenes.make_clip(seed) for seed in (3, 3, 4))
    assert one.frames.shape == (96, SIZE, SIZE, 3) and one.frames.dtype == np.uint8
    assert (one.frames == same.frames).all() and one.captions == same.captions
    assert (one.frames != other.frames).any()
    assert (scenes.render(one, 30, 60) == one.frames[30:60]).all()  # over the border of two chunks
    assert (one.masks(30, 60) == one.masks()[:, 30:60]).all()


def test_training_never_shows_a_held_out_triple():
    def held(**how):
        things = sum((scenes.make_clip(seed, **how).things for seed in range(12)), ())
        return [scenes.world.held_out(*triple) for thing in things for triple in thing.triples]

    assert not any(held())
    assert all(held(heldout=True, kind="alone"))


def test_captions_use_the_words_of_the_list():
    known = {word for phrases in scenes.words().values() for phrase in phrases for word in phrase.split()}
    for kind in scenes.KINDS:
        for seed in range(5):
            for text in scenes.make_clip(seed, kind=kind).captions:
                assert set(text.split()) <= known, text
    clip = scenes.make_clip(0, kind="hit")
    assert "hits" in clip.captions[0] and "wall" in scenes.make_clip(0, kind="wall").captions[0]


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_masks_are_what_is_painted(clips, kind):
    """Where a mask is 1 the pixel has the paint's hue; where all are 0 it does not depend on the things."""
    clip = clips[kind]
    masks = clip.masks(40, 44)
    assert masks.sum(0).max() < 1.001
    frames = scenes.render(clip, 40, 44).astype(float)
    for thing, mask in zip(clip.things, masks, strict=True):
        paint = np.array(COLOURS[thing.triples[1][0]], float)
        for pixel in frames[mask > 0.999][::50]:
            assert np.abs(scenes._chroma(pixel) - scenes._chroma(paint)).max() < 110, (pixel, paint)
    bare = scenes.render(dataclasses.replace(clip, things=()), 40, 44).astype(float)
    sky = (masks.sum(0) == 0) & (np.arange(SIZE) < clip.layout.horizon)[:, None]
    assert (bare == frames)[sky].all()


@pytest.mark.parametrize("how", ["clean", "blur", "noise"])
@pytest.mark.parametrize("kind", SOLO)
def test_the_judge_reads_a_thing(clips, kind, how):
    clip, n = clips[kind], 2 * CHUNK
    verdict, thing = scenes.judge(spoilt(clip.frames[:n], how)), clip.things[0]
    assert (verdict.colour, verdict.shape, verdict.motion) == thing.triples[0]
    assert np.nanmax(np.hypot(*(verdict.centres - thing.path[:n]).T)) < 2
    assert np.abs(verdict.camera - np.diff(clip.camera[:n]).mean()).max() < 0.15


@pytest.mark.parametrize("motion", scenes.MOTIONS)
def test_the_judge_tells_all_motions(motion):
    clip = scenes.scene("green", "ring", motion, "room", chunks=2, seed=5)
    assert scenes.judge(clip.frames).motion == motion


def test_the_judge_tells_motions_of_paths_that_a_model_has_made():
    """One second, where centres are off by 1 px, smoothly in time, and a third of them are unknown."""
    rng, right, window = np.random.default_rng(0), [], np.hanning(9)[1:-1]
    for i in range(100):
        clip = scenes.make_clip(20**6 + i, heldout=None, kind="alone", events=0)
        off = np.stack([np.convolve(rng.normal(size=CHUNK + 6), window, "valid") for _ in range(2)], 1)
        path = clip.things[0].path[:CHUNK] + off / np.linalg.norm(window)
        path[rng.random(CHUNK) < 1 / 3] = np.nan
        right.append(scenes._motion(path) == clip.things[0].triples[0][2])
    assert np.mean(right) > 0.87


@pytest.mark.parametrize("how", ["clean", "blur", "noise"])
def test_the_judge_reads_two_things(clips, how):
    part = slice(None) if how == "clean" else slice(2 * CHUNK)
    for kind in scenes.PAIRS:
        verdict = scenes.judge(spoilt(clips[kind].frames[part], how))
        seen = {(verdict.colour, verdict.shape), *verdict.others}
        assert {thing.triples[0][:2] for thing in clips[kind].things} <= seen, kind


def test_the_judge_sees_changes_in_their_chunk():
    plan = ["red", "red", "blue"], ["ball", "square", "square"], ["left", "right", "right"]
    verdict = scenes.judge(scenes.scene(*plan, chunks=3, seed=1).frames)
    assert verdict.chunks == tuple(zip(*plan, strict=True))


def test_an_empty_scene_has_no_thing(clips):
    bare = dataclasses.replace(clips["alone"], things=())
    verdict = scenes.judge(scenes.render(bare, 0, CHUNK))
    assert (verdict.colour, verdict.shape, verdict.motion) == (None, None, None)
    assert np.isnan(verdict.centres).all() and np.isnan(scenes.rigidity(scenes.render(bare, 0, 24))).all()
    with pytest.raises(ValueError, match="128"):
        scenes.judge(np.zeros((24, 64, 64, 3), np.uint8))


def test_rigidity_tells_true_things_from_jelly():
    clip = scenes.scene("yellow", "star", "right", "night", chunks=2, seed=3)
    iou, variation = scenes.rigidity(clip.frames)
    assert iou > 0.96 and variation < 0.012, (iou, variation)
    wobbly = clip.frames.copy()
    for i in range(0, len(wobbly), 2):  # every other frame is 8 % wider
        thing = dataclasses.replace(clip.things[0], size=clip.things[0].size * 1.08)
        wobbly[i] = scenes.render(dataclasses.replace(clip, things=(thing,)), i, i + 1)[0]
    worse = scenes.rigidity(wobbly)
    assert worse[0] < iou - 0.05 and worse[1] > 0.04


def test_what_goes_behind_the_wall_comes_out_in_time(clips):
    clip = clips["wall"]
    truth = scenes.emergence(clip.masks()[0].sum((1, 2)))
    assert truth and truth[1] - truth[0] > 10
    seen = scenes.emergence(scenes.judge(clip.frames).area)
    assert np.abs(np.subtract(seen, truth)).max() <= 2
    assert scenes.emergence(np.full(50, 700.0)) is None


def test_a_layout_is_told_from_another():
    clip, other = (scenes.scene("red", "ball", "left", "day", chunks=2, seed=s) for s in (1, 2))
    same = scenes.layout_change(clip.frames[:24], clip.frames[24:])
    cut = scenes.layout_change(clip.frames[:24], other.frames[24:])
    assert same < 1 and cut > 4


def test_falls_lose_energy_and_end_on_the_ground():
    t = np.arange(0, 200, 0.25)
    height = scenes.fall(t, 50.0)
    assert height.min() > -1e-9 and height[0] == 50 and height[-1] == 0
    tops = [h for a, h, b in zip(height, height[1:], height[2:], strict=False) if a < h >= b and h > 0.5]
    expected = 50 * scenes.RESTITUTION ** (2 * np.arange(1, len(tops) + 1))
    assert np.abs(np.array(tops) - expected).max() < 0.1 and len(tops) > 2
    free = height[:60]
    assert np.allclose(np.diff(free, 2) / 0.0625, -scenes.GRAVITY)


def test_slides_brake_and_rest_where_they_should():
    way = scenes.slide(np.arange(0.0, 300), 1.2, 60)
    assert np.isclose(way[-1], 60) and np.isclose(way[1], 1.2) and (np.diff(way) > -1e-9).all()
    assert np.isclose(np.diff(way, 2).min(), -scenes.FRICTION, atol=1e-6)


def test_a_hit_passes_the_speed_on(clips):
    a, b = (thing.path[:, 0] for thing in clips["hit"].things)
    va, vb = np.abs(np.diff(a)), np.abs(np.diff(b))
    moving = va[0]
    assert np.isclose(va[:3], moving).all() and vb[0] == 0 and va[-1] == 0
    assert np.isclose(vb.max(), moving, atol=0.1)  # equal masses: all of it
    assert np.ptp(np.sign(b - a)) == 0  # never through each other


def test_crops_are_of_their_step_and_have_the_positions_of_their_place():
    import torch
    import train_scenes

    import magi

    video, mask, corners = train_scenes.pieces(3, 2, 3, 48, 12)
    again = train_scenes.pieces(3, 2, 3, 48, 12)
    assert video.shape == (6, 3, 12, 48, 48) and mask.shape == (6, 1, 12, 48, 48)
    assert (video == again[0]).all() and (corners == again[2]).all()
    cfg = magi.VAEConfig(
        video_size=SIZE, video_length=12, embed_dim=16, depth=1, num_heads=2, use_final_proj=True
    )
    part = magi.VAE(cfg).encoder
    whole = part.positions((2, 16, 16))[0, 1:].unflatten(0, (2, 16, 16))
    train_scenes.see_crops(part)
    assert part.positions((2, 16, 16)).shape == (1, 513, 16)  # whole frames as before
    part.corners = torch.tensor([[0, 0], [3, 7]])
    crop = part.positions((2, 6, 6))
    assert crop.shape == (2, 73, 16)
    assert torch.equal(crop[1, 1:].unflatten(0, (2, 6, 6)), whole[:, 3:9, 7:13])
    assert torch.equal(crop[1, 0], part.pos_embed[0, 0])
