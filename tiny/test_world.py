"""The small world and its judge, the stages of train.py, and its evaluation."""

import dataclasses
import hashlib
import math
import re
import shutil
from functools import cache
from types import SimpleNamespace

import judge as judging
import measure
import numpy as np
import pytest
import torch
import train
import world
from common import HERE, relative
from judge import burn, emergence, judge, layout_change, rigidity, spoilt
from PIL import Image, ImageSequence
from world import CHUNK, COLOURS, SIZE

import magi
import training

SOLO = ("alone", "wall", "pan", "follow")

# ----------------------------------------------------------------------------------------- stages of training


def settings(folder, **changes):
    """What train.main gives to a stage, small."""
    small = dict(work=folder / "work", out=folder, size=64, steps=1, batch=4, lr=1e-4, every=1)
    small |= dict(singles=4, films=2, workers=0, device="cpu", compile=False, init=None)
    return SimpleNamespace(**small | changes)


@cache
def encoded():
    """The shipped VAE for frames of 64 pixels, four films of one chunk, what `encode` makes of them."""
    vae = magi.load_vae(HERE / "tiny" / "vae")
    train.see_size(vae, 64)
    films = [train.make_film(seed, 1, 64) for seed in range(4)]
    data = train.Films.encode(SimpleNamespace(vae=vae), films)
    return vae, films, data, train.Tiny(64)


def test_training_data_is_what_the_sampler_will_see():
    vae, films, data, _ = encoded()
    video = measure.to_tensor(films[1].frames)[None]
    for name, part in (("latents", video), ("images", video[:, :, 3:4])):
        assert relative(data[name][1:2].float(), vae.encode(part) * magi.SCALE_FACTOR) < 0.03  # bf16
    assert data["captions"][1] == list(films[1].captions)


def test_drawn_clips_carry_their_captions_and_duration_tokens():
    _, films, data, model = encoded()
    told = SimpleNamespace(text=lambda captions, left: ([*captions], left), dit=model.dit)
    drawn = SimpleNamespace(draw=lambda rng, count, of: train.Films.draw(store, rng, count, of))
    store = SimpleNamespace(files=[data], per_file=4)
    batch = train.make_batch(drawn, np.random.default_rng(0), 1, 40, 4, told)
    for [caption], left, latents in zip(batch["text"], batch["text_mask"], batch["latents"], strict=True):
        i = next(i for i in range(4) if torch.equal(latents, data["latents"][i].float()))
        assert caption == films[i].captions[0] and 1 <= left < 12
    text, _ = model.text([["a red ball bounces", "a blue star rests"]], [3])
    for i, left in enumerate((3, 2)):  # duration counts down; hq stands behind it
        assert torch.equal(text[0, i, 0], model.tokens[f"duration_token_{left}"][0])
        assert torch.equal(text[0, i, 1], model.tokens["hq_token"][0])


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_attention_in_training_is_that_of_magi_with_its_gradients(compiled):
    torch.manual_seed(0)
    attend = torch.compile(train.block_attention) if compiled else train.block_attention
    for keys, spans in (
        (24, [[[0, 8], [0, 16], [8, 24]], [[0, 8], [8, 16], [0, 24]]]),  # three chunks, two clips
        (9, [[[0, 4], [4, 5], [5, 9]], [[0, 9], [2, 4], [4, 9]]]),  # texts
    ):
        ins = [
            torch.randn(2, n, heads, 16, requires_grad=True) for n, heads in ((24, 4), (keys, 2), (keys, 2))
        ]
        results = []
        for op in (attend, magi.block_attention):
            out = torch.zeros(2, 24, 2, 4, 16)
            whole = op(*ins, torch.tensor(spans), out=out[:, :, 1])
            grads = torch.autograd.grad((whole * torch.arange(16.0)).sum(), ins)
            results.append([out, *grads])
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_films_are_encoded_once_each_from_its_seed(tmp_path, monkeypatch):
    made, args = [], settings(tmp_path)
    make = lambda seed, chunks, size: made.append((seed, chunks, size)) or seed
    monkeypatch.setattr(train, "make_film", make)
    monkeypatch.setattr(train.Films, "PER_FILE", {4: 2})
    as_tensors = lambda self, films: dict.fromkeys(("latents", "images"), torch.tensor([*films]))
    encode = lambda self, films: as_tensors(self, films) | {"captions": [["a"], ["b"]]}
    monkeypatch.setattr(train.Films, "encode", encode)
    for _ in range(2):  # the second reads files
        drawn = train.Films(None, 4, args).draw(np.random.default_rng(0), 40, of=6)
        assert {film["latents"].item() for film in drawn} == {*range(6)}
        assert made == [(seed, 4, 64) for seed in range(6)]


def test_films_cut_from_one_clip_to_another():
    clip, whole = world.make_clip(6), train.make_film(6, 4, SIZE)
    n = 1 + 6 // 6 % 3
    then = world.make_clip(6 + 10**8 + 1)
    assert whole.captions == clip.captions[:n] + then.captions[: 4 - n]
    assert (whole.frames[: 24 * n] == clip.frames[: 24 * n]).all()
    assert (whole.frames[24 * n :] == then.frames[: 24 * (4 - n)]).all()
    half = train.make_film(6, 4, 64)
    assert half.frames.shape == (96, 64, 64, 3)
    assert np.abs(half.frames[0, 0, 0] - whole.frames[0, :2, :2].mean((0, 1))).max() <= 0.5


def test_late_films_begin_in_the_middle_of_a_clip_of_one_thing():
    for seed in range(4):
        late = train.make_late_film(seed, 2, SIZE)
        clip = world.make_clip(seed + 2 * 10**8, chunks=seed + 3, events=0, kind="alone")
        assert late.captions == clip.captions[seed + 1 :]
        assert (late.frames == clip.frames[24 * (seed + 1) :]).all()


def test_training_stages_run_and_write_what_load_reads(tmp_path, monkeypatch):
    for name in ("base", "vae", "t5"):
        shutil.copytree(HERE / "tiny" / name, tmp_path / name)
    monkeypatch.setattr(train.Films, "PER_FILE", {1: 4, 4: 2})
    monkeypatch.setattr(train, "UNSEEN", 1)
    monkeypatch.setattr(train, "TOGETHER", 2)
    monkeypatch.setattr(train, "judge_prompts", lambda *_, **__: {"colour": 0.0})
    monkeypatch.setattr(training, "plot_loss", lambda log: None)  # takes longer than a step
    more = dict(teach="cyan", clips=2, rank=2)
    train.train_vae(settings(tmp_path, init=tmp_path, batch=1))
    text = train.load_file(tmp_path / "t5" / "model.safetensors")
    further = dict(init=tmp_path, frozen_text=True)
    train.train_dit(settings(tmp_path, **further))
    train.train_dit(settings(tmp_path, **further, steps=2))  # goes on from the checkpoint
    after = train.load_file(tmp_path / "t5" / "model.safetensors")
    assert after.keys() == text.keys() and all(torch.equal(after[name], text[name]) for name in text)
    train.distill(settings(tmp_path))
    train.train_decoder(settings(tmp_path, size=SIZE))
    train.train_lora(settings(tmp_path, **more))
    base, distilled = (
        magi.read_config(tmp_path / f, "sampler", magi.SamplerConfig) for f in ("base", "distill")
    )
    assert base.height == 64 and distilled == dataclasses.replace(base, distilled=True, num_steps=8)
    assert len(training.read_log(tmp_path / "work" / "dit64.csv", before=9)) == 2
    pipe = magi.load(tmp_path / "distill")
    training.load_lora(pipe.dit, tmp_path / "lora" / "cyan.safetensors")
    frames = measure.sample_video(pipe, "a red ball bounces", 24, 0, num_steps=8)
    assert frames.shape == (24, 64, 64, 3)


def test_the_vae_stage_keeps_latents_if_it_begins_with_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "UNSEEN", 1)
    train.train_vae(settings(tmp_path, init=HERE / "tiny", batch=1))
    shipped, made = (magi.load_vae(folder / "vae").state_dict() for folder in (HERE / "tiny", tmp_path))
    changed = {k.split(".")[0] for k in shipped if not torch.equal(shipped[k], made[k])}
    assert changed == {"decoder"}


@pytest.mark.parametrize("new", ["cyan", "bar"])
def test_clips_that_teach_are_half_new_and_half_old(tmp_path, new):
    words = ["clips", "--teach", new, "--clips", "3", "--out", tmp_path / "c", "--work", tmp_path / "w"]
    assert train.main([*map(str, words)]) == 0
    captions = {file.stem: file.read_text().splitlines() for file in (tmp_path / "c").glob("*.txt")}
    assert captions.keys() == {file.stem for file in (tmp_path / "c").glob("*.mp4")} and len(captions) == 6
    for stem, told in captions.items():
        assert len(told) == 2 and all((f" {new} " in line) == stem.startswith(new) for line in told)
    shown, asked = train.lesson(new, heldout=False), train.lesson(new, heldout=True)
    assert all(new in triple for triple in shown + asked) and not {*shown} & {*asked}
    assert {m for *_, m in shown} == {*world.MOTIONS} and asked


def test_the_trainer_refuses_in_one_line(tmp_path, capsys):
    for words, said in (
        (["dit", "--batch", "2"], "batch 2 must be a multiple of 4"),
        (["vae", "--batch", "9"], "batch 9 is too large"),
        (["dit", "--init", "nowhere"], "nowhere is no folder"),
        (["dit", "--frozen_text"], "--frozen_text keeps the text encoder of --init"),
        (["clips", "--out", str(train.HERE)], "say with --out"),
    ):
        out = [] if "--out" in words else ["--out", str(tmp_path)]
        assert train.main([*words, *out, "--work", str(tmp_path)]) == 2
        assert said in capsys.readouterr().err
    for words, said in (("eval --prompts 0", "whole number of at least 1"), ("dit --lr 0", "above 0")):
        with pytest.raises(SystemExit, match="2"):
            train.main(words.split())
        assert said in capsys.readouterr().err


def test_a_stage_has_its_recipe_but_for_what_is_given(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setitem(train.STAGES, "dit", seen.append)
    args = train.parser().parse_args(["dit", "--work", str(tmp_path), "--lr", "0.5"])
    train.run("dit", args, size=64)
    [given] = seen
    assert (given.steps, given.lr, given.batch) == (train.RECIPES["dit 64"].steps, 0.5, 32)


def test_standardised_latents_have_mean_0_and_deviation_1():
    torch.manual_seed(0)
    vae = magi.VAE(magi.VAEConfig(video_size=16, embed_dim=32, depth=1, num_heads=2, use_final_proj=True))
    vae.encoder.last_layer.bias.data.normal_()
    video = torch.rand(3, 3, 8, 16, 16) * 2 - 1
    with torch.no_grad():
        (mean, logvar), decoded = vae.moments(video), vae.decode(vae.encode(video))
        train.standardise(vae, video)
        (new, new_logvar), again = vae.moments(video), vae.decode(vae.encode(video))
    scaled = new * magi.SCALE_FACTOR
    assert scaled.mean((0, 2, 3, 4)).abs().max() < 1e-3 and (scaled.std((0, 2, 3, 4)) - 1).abs().max() < 1e-3
    torch.testing.assert_close(again, decoded, rtol=1e-3, atol=1e-4)
    noise = lambda mean, logvar: (logvar / 2).exp() / mean.std((0, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(noise(new, new_logvar), noise(mean, logvar), rtol=1e-3, atol=1e-5)


def test_crops_are_of_their_step_and_have_the_positions_of_their_place():
    video, mask, corners = train.pieces(3, 2, 3, 48, 12)
    again = train.pieces(3, 2, 3, 48, 12)
    assert video.shape == (6, 3, 12, 48, 48) and mask.shape == (6, 1, 12, 48, 48)
    assert (video == again[0]).all() and (corners == again[2]).all()
    cfg = magi.VAEConfig(
        video_size=SIZE, video_length=12, embed_dim=16, depth=1, num_heads=2, use_final_proj=True
    )
    part = magi.VAE(cfg).encoder
    whole = part.positions((2, 16, 16))[0, 1:].unflatten(0, (2, 16, 16))
    train.see_crops(part)
    assert part.positions((2, 16, 16)).shape == (1, 513, 16)  # whole frames as before
    part.corners = torch.tensor([[0, 0], [3, 7]])
    crop = part.positions((2, 6, 6))
    assert crop.shape == (2, 73, 16)
    assert torch.equal(crop[1, 1:].unflatten(0, (2, 6, 6)), whole[:, 3:9, 7:13])
    assert torch.equal(crop[1, 0], part.pos_embed[0, 0])


# -------------------------------------------------------------------------------------------------- the world


@pytest.fixture(scope="module")
def clips():
    return {kind: world.make_clip(7, kind=kind, events=0, heldout=None) for kind in world.KINDS}


def test_a_seed_is_a_clip_and_a_piece_is_a_part_of_it():
    one, same, other = (world.make_clip(seed) for seed in (3, 3, 4))
    assert one.frames.shape == (96, SIZE, SIZE, 3) and one.frames.dtype == np.uint8
    assert (one.frames == same.frames).all() and one.captions == same.captions
    assert (one.frames != other.frames).any()
    assert (world.render(one, 30, 60) == one.frames[30:60]).all()  # over the border of two chunks
    assert (one.masks(30, 60) == one.masks()[:, 30:60]).all()
    a, b = (world.scene("red", "ball", "bounce", chunks=2, seed=3) for _ in range(2))
    assert np.array_equal(a.frames, b.frames) and len(a.captions) == 2 and "red ball" in a.captions[0]


def test_training_never_shows_a_held_out_triple():
    def held(**how):
        things = sum((world.make_clip(seed, **how).things for seed in range(12)), ())
        return [world.held_out(*triple) for thing in things for triple in thing.triples]

    assert not any(held())
    assert all(held(heldout=True, kind="alone"))


def test_world_evaluation_asks_only_for_what_was_never_shown():
    asked = [triple for _, triple in world.sample_prompts(40, seed=1)]
    assert all(world.held_out(*triple) for triple in asked) and len({*asked}) == 40
    assert not any(world.held_out(*triple) for _, triple in world.sample_prompts(40, seed=1, heldout=False))


def test_captions_use_the_words_of_the_list():
    known = {*world.vocabulary()}
    for kind in world.KINDS:
        for seed in range(5):
            for text in world.make_clip(seed, kind=kind).captions:
                assert set(text.split()) <= known, text
    clip = world.make_clip(0, kind="hit")
    assert "hits" in clip.captions[0] and "wall" in world.make_clip(0, kind="wall").captions[0]


def test_world_captions_follow_the_grammar():
    assert world.caption([("orange", "ball", "still")]) == "an orange ball stands still"
    was = [("red", "ball", "swing")]
    said = lambda now, seed: world.caption([now], was, rng=np.random.default_rng(seed))
    assert not any(said(was[0], seed).startswith("now") for seed in range(20))
    assert any(said(("blue", "ball", "swing"), seed).startswith("now") for seed in range(20))
    two = [("red", "ball", "left"), ("blue", "star", "still")]
    assert world.caption(two, kind="pass") == "a red ball slides to the left behind a blue star"
    assert world.caption(two[::-1], kind="pass") == "a red ball slides to the left in front of a blue star"
    assert world.caption(two, kind="hit") == "a red ball slides to the left and hits a blue star"
    assert world.caption(was, place="day", kind="pan", pan="left").endswith("and the camera pans left by day")


def test_scenes_to_order_refuse_what_cannot_be():
    for how, said in (
        (dict(colour="beige"), "unknown {'beige'}"),
        (dict(motion=["left"], chunks=2), "for 2 chunks"),
        (dict(kind="hit"), "no 'hit' clip of one thing"),
        (dict(motion=["left"] * 5 + ["still", "left"], chunks=7), "no room for"),
    ):
        with pytest.raises(ValueError, match=said):
            world.scene(**how)


def test_world_pairs_differ_in_colour():
    for seed in range(10):
        for kind in world.PAIRS:
            a, b = world.make_clip(seed, chunks=2, kind=kind).things
            assert all(u[0] != v[0] for u, v in zip(a.triples, b.triples, strict=True))


@pytest.mark.parametrize("kind", world.KINDS)
def test_masks_are_what_is_painted(clips, kind):
    """Where a mask is 1 the pixel shows the paint; where all are 0 it does not depend on the things."""
    clip = clips[kind]
    masks = clip.masks(40, 44)
    assert masks.sum(0).max() < 1.001
    frames = world.render(clip, 40, 44).astype(float)
    for thing, mask in zip(clip.things, masks, strict=True):
        shown = judging._paints(frames.astype(np.float32), COLOURS)[thing.triples[1][0]]
        assert not (mask > 0.999).any() or shown[mask > 0.999].mean() > 0.95
    bare = world.render(dataclasses.replace(clip, things=()), 40, 44).astype(float)
    sky = (masks.sum(0) == 0) & (np.arange(SIZE) < clip.layout.horizon)[:, None]
    assert (bare == frames)[sky].all()


def test_falls_lose_energy_and_end_on_the_ground():
    t = np.arange(0, 200, 0.25)
    height = world.fall(t, 50.0)
    assert height.min() > -1e-9 and height[0] == 50 and height[-1] == 0
    tops = [h for a, h, b in zip(height, height[1:], height[2:], strict=False) if a < h >= b and h > 0.5]
    expected = 50 * world.RESTITUTION ** (2 * np.arange(1, len(tops) + 1))
    assert np.abs(np.array(tops) - expected).max() < 0.1 and len(tops) > 2
    free = height[:60]
    assert np.allclose(np.diff(free, 2) / 0.0625, -world.GRAVITY)


@pytest.mark.parametrize("motion, way", [("clockwise", 1), ("anticlockwise", -1)])
def test_a_circle_begins_at_its_top(motion, way):
    for seed in range(5):
        x, y = world.scene("red", "ball", motion, chunks=4, seed=seed).things[0].path.T
        assert y[0] - y.min() < 0.5 and way * (x[1] - x[0]) > 0


def test_slides_brake_and_rest_where_they_should():
    way = world.slide(np.arange(0.0, 300), 1.2, 60)
    assert np.isclose(way[-1], 60) and np.isclose(way[1], 1.2) and (np.diff(way) > -1e-9).all()
    assert np.isclose(np.diff(way, 2).min(), -world.FRICTION, atol=1e-6)


def test_world_slides_end_at_the_edge():
    clip = world.scene("red", "ball", "left", chunks=6, seed=1)
    thing, verdict = clip.things[0], judge(clip.frames)
    assert np.isclose(thing.path[-1, 0], world.MARGIN + thing.size / 2)
    assert verdict.motion == "left" and verdict.chunks[0][2] == "left" and verdict.chunks[-1][2] == "still"


def test_a_hit_passes_the_speed_on(clips):
    a, b = (thing.path[:, 0] for thing in clips["hit"].things)
    va, vb = np.abs(np.diff(a)), np.abs(np.diff(b))
    moving = va[0]
    assert np.isclose(va[:3], moving).all() and vb[0] == 0 and va[-1] == 0
    assert np.isclose(vb.max(), moving, atol=0.1)  # equal masses: all of it
    assert np.ptp(np.sign(b - a)) == 0  # never through each other


# -------------------------------------------------------------------------------------------------- the judge


@pytest.mark.parametrize("how", ["clean", "blur", "noise"])
@pytest.mark.parametrize("kind", SOLO)
def test_the_judge_reads_a_thing(clips, kind, how):
    clip, n = clips[kind], 2 * CHUNK
    verdict = judge(spoilt(clip.frames[:n], how, np.random.default_rng(0)))
    thing = clip.things[0]
    assert (verdict.colour, verdict.shape, verdict.motion) == thing.triples[0]
    assert np.nanmax(np.hypot(*(verdict.centres - thing.path[:n]).T)) < 2
    assert np.abs(verdict.camera - np.diff(clip.camera[:n]).mean()).max() < 0.15


@pytest.mark.parametrize("motion", world.MOTIONS)
def test_the_judge_tells_all_motions(motion):
    clip = world.scene("green", "ring", motion, "room", chunks=2, seed=5)
    assert judge(clip.frames).motion == motion


def test_the_judge_tells_motions_of_paths_that_a_model_has_made():
    """One second, where centres are off by 1 px, smoothly in time, and a third of them are unknown."""
    rng, right, window = np.random.default_rng(0), [], np.hanning(9)[1:-1]
    for i in range(100):
        clip = world.make_clip(20**6 + i, heldout=None, kind="alone", events=0)
        off = np.stack([np.convolve(rng.normal(size=CHUNK + 6), window, "valid") for _ in range(2)], 1)
        path = clip.things[0].path[:CHUNK] + off / np.linalg.norm(window)
        path[rng.random(CHUNK) < 1 / 3] = np.nan
        right.append(judging._motion(path) == clip.things[0].triples[0][2])
    assert np.mean(right) > 0.87


@pytest.mark.parametrize("how", ["clean", "blur", "noise"])
def test_the_judge_reads_two_things(clips, how):
    part = slice(None) if how == "clean" else slice(2 * CHUNK)
    for kind in world.PAIRS:
        verdict = judge(spoilt(clips[kind].frames[part], how, np.random.default_rng(0)))
        seen = {(verdict.colour, verdict.shape), *verdict.others}
        assert {thing.triples[0][:2] for thing in clips[kind].things} <= seen, kind


def test_the_judge_sees_changes_in_their_chunk():
    plan = ["red", "red", "blue"], ["ball", "square", "square"], ["left", "right", "right"]
    verdict = judge(world.scene(*plan, chunks=3, seed=1).frames)
    assert verdict.chunks == tuple(zip(*plan, strict=True))


def test_the_readmes_picture_shows_what_its_command_asks_for():
    """It is what visitors see first. (In its first second a ball that bounces may only rise.)"""
    (command,) = re.findall(
        r"^python sample.py .*\n.* --out sheet.png$", (HERE / "README.md").read_text(), re.M
    )
    asked = [
        re.search(r"a (\w+) (\w+) (bounces|slides to the \w+)", prompt).groups()
        for prompt in re.findall(r'--prompt "(.*?)"', command)
    ]
    with Image.open(HERE / "tiny" / "examples" / "readme.gif") as gif:
        frames = np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(gif)])
    assert len(frames) == CHUNK * len(asked)
    for second, (colour, shape, motion) in zip(frames.reshape(-1, CHUNK, SIZE, SIZE, 3), asked, strict=True):
        verdict = judge(second)
        assert (verdict.colour, verdict.shape) == (colour, shape)
        assert verdict.motion in (("bounce", "up") if motion == "bounces" else motion.split()[-1:])


def test_the_judge_knows_a_new_shape_and_colour_if_asked():
    known = world.SHAPES + world.NEW_SHAPES
    asked = (("cross", "bounce"), ("cross", "left"), ("bar", "swing"), ("bar", "fall"))
    for i, (shape, motion) in enumerate(asked):
        frames = world.scene([*COLOURS][i % 8], shape, motion, [*world.PLACES][i % 4], 2, i).frames
        verdict = judge(frames, shapes=known)
        assert (verdict.shape, verdict.motion) == (shape, motion)
        assert judge(frames).shape != shape
    for shape in world.SHAPES:
        assert judge(world.scene(shape=shape, chunks=1).frames, shapes=known).shape == shape
    cyan = world.scene("cyan", chunks=1).frames
    assert judge(cyan, COLOURS | world.NEW_COLOURS).colour == "cyan" != judge(cyan).colour


def test_an_empty_scene_has_no_thing(clips):
    bare = world.render(dataclasses.replace(clips["alone"], things=()), 0, CHUNK)
    verdict = judge(bare)
    assert (verdict.colour, verdict.shape, verdict.motion) == (None, None, None)
    assert np.isnan(verdict.centres).all() and np.isnan(rigidity(bare)).all() and np.isnan(burn(bare)[0])
    with pytest.raises(ValueError, match="128"):
        judge(np.zeros((24, 64, 64, 3), np.uint8))


def test_rigidity_tells_true_things_from_jelly():
    clip = world.scene("yellow", "star", "right", "night", chunks=2, seed=3)
    iou, variation = rigidity(clip.frames)
    assert iou > 0.96 and variation < 0.012, (iou, variation)
    wobbly = clip.frames.copy()
    for i in range(0, len(wobbly), 2):  # every other frame is 8 % wider
        thing = dataclasses.replace(clip.things[0], size=clip.things[0].size * 1.08)
        wobbly[i] = world.render(dataclasses.replace(clip, things=(thing,)), i, i + 1)[0]
    worse = rigidity(wobbly)
    assert worse[0] < iou - 0.05 and worse[1] > 0.04


def stretched(frames, contrast):
    """Frames with so many times their contrast, as too much guidance makes them."""
    frames = frames.astype(float)
    return np.clip((frames - frames.mean()) * contrast + frames.mean(), 0, 255).astype(np.uint8)


def test_seams_are_seen_where_tokens_meet_and_nowhere_else():
    videos = [world.make_clip(seed).frames[:1] for seed in range(20)]
    assert 0.9 < np.mean([measure.seams(video) for video in videos]) < 1.15
    row = np.arange(128.0)
    slope = lambda row: np.broadcast_to((row + row[:, None])[None, ..., None], (1, 128, 128, 3))
    steps = slope(row + row // 16 * 16)  # each token stands a step above its neighbours
    assert measure.seams(slope(row)) == 1 and measure.seams(steps) == 17
    assert measure.seams(np.roll(steps, 8, (1, 2))) < 1


def test_burn_tells_true_colours_from_burnt_ones_and_faded_ones():
    for seed in range(3):
        frames = world.make_clip(seed, 1, kind="alone").frames
        saturation, clipped = burn(frames)
        assert 0.85 < saturation < 0.97 and clipped < 0.001
        assert np.allclose(burn(frames / 255), (saturation, clipped))
        burnt = burn(stretched(frames, 1.6))
        assert burnt[0] > saturation + 0.05 and burnt[1] > 0.02
        assert burn(stretched(frames, 0.8))[0] < saturation - 0.05


def test_what_goes_behind_the_wall_comes_out_in_time(clips):
    clip = clips["wall"]
    truth = emergence(clip.masks()[0].sum((1, 2)))
    assert truth and truth[1] - truth[0] > 10
    seen = emergence(judge(clip.frames).area)
    assert np.abs(np.subtract(seen, truth)).max() <= 2
    assert emergence(np.full(50, 700.0)) is None


def test_a_layout_is_told_from_another():
    clip, other = (world.scene("red", "ball", "left", "day", chunks=2, seed=s) for s in (1, 2))
    same = layout_change(clip.frames[:24], clip.frames[24:])
    cut = layout_change(clip.frames[:24], other.frames[24:])
    assert same < 1 and cut > 4


# ------------------------------------------------------------------------------------------------- evaluation


@cache
def once(look):
    """`judge`, `rigidity` or `burn`, which looks at equal frames once: an oracle films the same with any
    settings."""
    seen = {}

    def look_or_remember(frames):
        key = hashlib.sha256(np.ascontiguousarray(frames)).digest()
        if key not in seen:
            seen[key] = look(frames)
        return seen[key]

    return look_or_remember


class Oracle:
    """Plays the pipeline: films what a caption says, since it has overheard which things were put into it,
    and goes on as the clip whose frames it is given. Its `kind` of mistake is what a measure should see."""

    sampler = magi.SamplerConfig(height=SIZE, width=SIZE)

    def __init__(self, monkeypatch):
        self.kind, self.said, self.clips = "right", {}, []
        self.scene = world.scene
        for name in ("caption", "scene", "make_clip"):
            monkeypatch.setattr(world, name, getattr(self, f"hear_{name}")(getattr(world, name)))
        for look in (judge, rigidity, burn):
            monkeypatch.setattr(measure, look.__name__, once(look))

    def hear_caption(self, make):
        def caption(triples, *args, **kwargs):
            text = make(triples, *args, **kwargs)
            self.said[text] = triples[0]
            return text

        return caption

    def hear_scene(self, make):
        def watch(*args, **kwargs):
            self.clips.append(make(*args, **kwargs))
            return self.clips[-1]

        return watch

    hear_make_clip = hear_scene

    def continued(self, image, video, count):
        """What follows the frames given, the image itself included."""
        last = image if video is None else video[-1]
        for clip in reversed(self.clips):
            if "frames" in vars(clip):  # has been looked at
                for i in np.flatnonzero((clip.frames == last).all((1, 2, 3))):
                    start = int(i) + (video is not None)
                    frames = clip.frames[start : start + count]
                    if len(frames) == count:
                        return frames[:1].repeat(count, 0) if self.kind == "frozen" else frames
        raise AssertionError("frames of no clip")

    def told(self, prompts, chunks, seed, cuts):
        """Frames that show what the captions say, one or one a chunk."""
        pairs = [c for c in self.clips if c.kind in world.PAIRS and c.captions[0] == prompts[0]]
        if pairs:
            return pairs[-1].frames[: 24 * chunks]
        triples = [self.said[prompts[min(k, len(prompts) - 1)]] for k in range(chunks)]
        if self.kind == "late":
            triples = triples[:1] + triples[:-1]
        if self.kind == "green":
            triples[-1] = ("green", *triples[-1][1:])
        frames = self.scene(*map(list, zip(*triples, strict=True)), chunks=chunks, seed=seed).frames
        for chunk, ranges in cuts:
            kept = ranges[-1] > 1  # a cut: identities are kept, and the scene is new; a restyle: the reverse
            new = triples[0] if kept else ("green" if triples[0][0] != "green" else "red", *triples[0][1:])
            other = self.scene(*new, chunks=chunks, seed=seed + 1 if kept else seed).frames
            frames = np.concatenate([frames[: 24 * chunk], other[24 * chunk :]])
        return frames

    def __call__(self, prompt, num_frames, seed, image=None, video=None, kv_ranges_at=(), **settings):
        if image is not None or video is not None:
            yield self.continued(image, video, num_frames)
            return
        prompts = [prompt] if isinstance(prompt, str) else prompt
        frames = self.told(prompts, -(-num_frames // 24), seed, kv_ranges_at)[:num_frames]
        if self.kind == "burns" and settings["text_scales"][0] > 6:
            frames = stretched(frames, 2.0)
        if self.kind == "fades" and settings["kv_ranges"] == measure.RANGES["short"]:
            frames = np.concatenate([frames[:24], stretched(frames[24:], 0.7)])
        yield frames


@pytest.fixture
def oracle(monkeypatch):
    return Oracle(monkeypatch)


def test_evaluation_measures_what_it_says(oracle):
    prompts = world.sample_prompts(4, seed=1)
    as_asked = measure.judge_prompts(oracle, prompts, judge=measure.judge)
    assert as_asked == {"colour": 1, "shape": 1, "motion": 1}
    wrong = [(text, ("green" if c != "green" else "red", s, m)) for text, (c, s, m) in prompts]
    otherwise = measure.judge_prompts(oracle, wrong, judge=measure.judge)
    assert otherwise == {"colour": 0, "shape": 1, "motion": 1}
    first, follow = measure.judge_images(oracle, 3)
    assert first == math.inf and follow == 1
    for row in measure.judge_continuations(oracle, 2):
        assert len(row) == 4 and max(list(row.values())[1:]) < 0.7, row
    assert measure.judge_changes(oracle, 3)["all"] == 1 and measure.judge_long(oracle, 1, chunks=3) == 1
    oracle.kind = "frozen"
    assert all(row["after 48 frames"] > 4 for row in measure.judge_continuations(oracle, 2))
    oracle.kind = "late"
    assert measure.judge_changes(oracle, 3)["all"] == 0
    oracle.kind = "green"
    assert measure.judge_long(oracle, 1, chunks=3) == 0


def test_the_evaluation_prints_all_figures(oracle, monkeypatch, tmp_path, capsys):
    oracle.vae = None
    monkeypatch.setattr(measure, "load_model", lambda folder: oracle)
    monkeypatch.setattr(measure, "judge_vae", lambda vae, count: 40.0)
    measure.evaluate(SimpleNamespace(out=tmp_path, model="base", prompts=2))
    lines = capsys.readouterr().out.splitlines()
    said = "40.0 dB|colour 100%, shape 100%, motion 100%|rigid IoU 0.9|s for a second"
    said += "|inf dB (goal 34), motion 100%|px (goal 2)|px (goal 2)|100% (goal 90 %)|100% (goal 95 %)"
    assert all(part in line for part, line in zip(said.split("|"), lines, strict=True)), lines


def test_a_change_must_come_in_its_chunk_not_before(oracle):
    early = lambda prompt, **more: oracle([prompt[-1]] * len(prompt), **more)  # shows the end from the start
    assert measure.judge_changes(early, 3)["all"] == 0


def test_a_lost_thing_counts_as_far_off():
    truth = np.zeros((10, 2))
    seen = truth + [3, 4]
    assert measure.distance(seen, truth) == 5
    seen[:4] = np.nan
    assert measure.distance(seen, truth) == 5
    seen[:5] = np.nan
    assert measure.distance(seen, truth) == measure.LOST


def test_psnr():
    assert abs(measure.psnr(torch.full((9,), 0.2), torch.zeros(9)) - 20) < 1e-4  # a tenth of the range: 20 dB


def test_score_counts_all_three(monkeypatch):
    said = iter([SimpleNamespace(colour="red", shape="ball", motion=m) for m in ("left", "right")])
    monkeypatch.setattr(measure, "judge", lambda video: next(said))
    monkeypatch.setattr(measure, "rigidity", lambda video: (0.5, 0.25))
    monkeypatch.setattr(measure, "burn", lambda video: (video, 0.0))
    monkeypatch.setattr(measure, "seams", lambda video: 1.25)
    found = measure.score([1.0, np.nan], [("red", "ball", "left")] * 2)
    assert [*found.values()] == [1, 1, 0.5, 0.5, 0.5, 0.25, 1, 0, 1.25]


def test_guidance_that_burns_is_seen(oracle):
    oracle.kind = "burns"
    rows = {row["guidance"]: row for row in measure.guidance(oracle, 1, weights=(12.0,))}
    assert rows["none"]["all three"] == rows["none"]["both things"] == 1
    assert rows["none"]["burnt"] < 0.001 < 0.02 < rows["12"]["burnt"]
    assert rows["12"]["saturation"] > rows["none"]["saturation"] + 0.05


def test_what_comes_out_from_behind_the_wall_is_measured(oracle):
    ranges = {"long": (8, 8, 8, 8)}
    [row] = measure.hidden(oracle, 2, ranges)
    assert row["comes out"] == row["right side"] == 1 and row["time"] <= 1 and row["height"] < 1, row
    oracle.kind = "frozen"
    [row] = measure.hidden(oracle, 1, ranges)
    assert row["comes out"] == 0 and np.isnan(row["time"])


def test_transitions_are_told_apart(oracle):
    rows = measure.mean_rows(measure.transitions(oracle, 1), "transition")
    none, cut, restyle = rows
    assert none["layout change"] < 1.5 < 3 < cut["layout change"] and restyle["layout change"] < 1.5
    assert none["colour kept"] == cut["colour kept"] == 1 and restyle["colour kept"] == 0
    assert none["jump"] < 6, none


def test_drift_is_seen_where_it_begins(oracle):
    oracle.kind = "fades"
    rows = measure.drift(oracle, 1, seconds=2)
    paint = {(row["ranges"], row["second"]): row["saturation"] for row in rows}
    assert paint["short", 2] < paint["short", 1] - 0.05
    assert abs(paint["as trained", 2] - paint["as trained", 1]) < 0.02


def test_steps_and_their_table(oracle, tmp_path):
    made = {name: measure.step_counts(oracle, 1, (8, 4)) for name in ("base", "distill")}
    rows = [{"model": name} | row for name in made for row in made[name]]
    assert [row["steps"] for row in rows] == [8, 4, 8, 4] and all(row["all three"] == 1 for row in rows)
    table = measure.markdown([{"model": "true clips, VAE", "steps": ""} | rows[0], *rows])
    assert table.count("\n") == 7 and "| 100% |" in table and "nan" not in table
    true = {"model": "true clips, VAE", "rigid IoU": 0.98}
    measure.plot_steps([true, *rows], tmp_path / "steps.png")
    assert (tmp_path / "steps.png").stat().st_size > 1000


def test_tables_of_phenomena_take_the_place_of_older_ones(tmp_path, monkeypatch):
    pipe = SimpleNamespace(sampler=SimpleNamespace(distilled=False))
    monkeypatch.setattr(measure, "load_model", lambda folder: pipe)
    file = tmp_path / "examples" / "phenomena.md"
    assert measure.read_tables(file) == {}
    for model, time, only in (("base", 1.0, None), ("distill", 2.0, ["wait"]), ("base", 3.0, ["wait"])):
        table = {"wait": lambda pipe, n, time=time: [{"time": time}], "rest": lambda pipe, n: [{"x": 5}]}
        monkeypatch.setattr(measure, "PHENOMENA", table)
        measure.phenomena(SimpleNamespace(out=tmp_path, model=model, prompts=7, only=only))
    tables = measure.read_tables(file)
    assert [*tables] == ["rest, base", "wait, base", "wait, distill"]
    assert tables["wait, base"] == "| time |\n| --- |\n| 3.00 |\n\n--prompts 7\n"
    first, second, *_ = file.read_text().split("## ")  # what the columns mean stands once, above the tables
    assert first == measure.ABOUT + "\n" and second.startswith("rest, base\n")


def test_every_table_of_phenomena_is_explained():
    assert all(f"- **{name}**: " in measure.ABOUT for name in measure.PHENOMENA)
