"""The small world and its judge, the stages of train.py, and its evaluation."""

import dataclasses
import math
import shutil
from functools import cache
from types import SimpleNamespace

import measure
import numpy as np
import pytest
import torch
import train
import world
from common import HERE, relative

import magi
import training

# ----------------------------------------------------------------------------------------- stages of training


@cache
def encoded():
    """The shipped VAE, four clips of two chunks, what `encode` makes of them, and a fresh model."""
    vae, clips = magi.load_vae(HERE / "tiny" / "vae"), [world.make_clip(i, chunks=2) for i in range(4)]
    return vae, clips, train.encode(vae, clips), train.Tiny()


def test_training_data_is_what_the_sampler_will_see():
    vae, clips, data, _ = encoded()
    video = train.to_video(clips[1].frames)[None]
    for name, part in (("latents", video), ("images", video[:, :, 3:4])):
        assert relative(data[name][1:2].float(), vae.encode(part) * magi.SCALE_FACTOR) < 0.03  # bf16
    assert data["captions"][1] == list(clips[1].captions) and data["objects"].shape == (4, 1, 12, 8, 8)


def test_drawn_clips_carry_their_captions_and_duration_tokens():
    _, clips, data, model = encoded()
    told = SimpleNamespace(text=lambda captions, left: ([*captions], left))
    batch = train.draw_clips(np.random.default_rng(0), 1, 40, told, data)
    for [caption], left, latents in zip(batch["text"], batch["text_mask"], batch["latents"], strict=True):
        i = next(i for i in range(4) if torch.equal(latents, data["latents"][i, :, :6].float()))
        assert caption == clips[i].captions[0] and 1 <= left < 12
    text, _ = model.text([["a red ball bounces", "a blue star rests"]], [3])
    for i, left in enumerate((3, 2)):  # duration counts down; hq stands behind it
        assert torch.equal(text[0, i, 0], model.tokens[f"duration_token_{left}"][0])
        assert torch.equal(text[0, i, 1], model.tokens["hq_token"][0])


def test_clips_are_encoded_once_each_from_its_seed(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(world, "make_clip", lambda seed: made.append(seed) or seed)
    monkeypatch.setattr(train, "encode", lambda _, clips: {"latents": torch.tensor(clips), "captions": clips})
    for _ in range(2):
        data = train.encode_clips(None, 6, tmp_path, per_file=2)
        assert data["latents"].tolist() == data["captions"] == made == [*range(6)]


def test_training_stages_run_and_write_what_load_reads(tmp_path, monkeypatch):
    for name in ("base", "vae", "t5"):
        shutil.copytree(HERE / "tiny" / name, tmp_path / name)
    data = train.encode(encoded()[0], [world.make_clip(i) for i in range(4)])
    encode = train.encode
    monkeypatch.setattr(train, "encode", lambda vae, clips: encode(vae, clips[:8]))
    monkeypatch.setattr(train, "encode_clips", lambda *_: data)
    monkeypatch.setattr(train, "judge_prompts", lambda *_, **__: {"colour": 0.0})
    once = {f"{stage}_steps": 1 for stage in ("vae", "dit", "distill", "lora")}
    small_run = dict(clips=4, batch=4, rank=2, lr=1e-4, distill_lr=1e-4)
    args = SimpleNamespace(
        out=tmp_path, work=tmp_path / "work", init=tmp_path, teach="cyan", **small_run, **once
    )
    for stage in ("vae", "dit", "distill", "lora"):
        train.STAGES[stage](args)
    base, distilled = (
        magi.read_config(tmp_path / f, "sampler", magi.SamplerConfig) for f in ("base", "distill")
    )
    assert distilled == dataclasses.replace(base, distilled=True, num_steps=8)
    pipe = magi.load(tmp_path / "distill")
    training.load_lora(pipe.dit, tmp_path / "lora" / "cyan.safetensors")
    frames = np.concatenate(list(pipe("a red ball bounces", num_frames=24)))
    assert world.judge(frames).colour == "red"  # one small step has not spoilt it


@pytest.mark.parametrize("new", ["cyan", "cross"])
def test_clips_that_teach_are_half_new_and_half_old(tmp_path, new, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["train.py", "clips", "--teach", new, "--clips", "3", "--out", str(tmp_path)]
    )
    train.main()
    captions = {file.stem: file.read_text().splitlines() for file in tmp_path.glob("*.txt")}
    assert captions.keys() == {file.stem for file in tmp_path.glob("*.mp4")} and len(captions) == 6
    for stem, told in captions.items():
        assert len(told) == 2 and all((f" {new} " in line) == stem.startswith(new) for line in told)
    shown, asked = train.lesson(new, heldout=False), train.lesson(new, heldout=True)
    assert all(new in triple for triple in shown + asked) and not {*shown} & {*asked}
    assert {m for *_, m in shown} == {*world.MOTIONS} and asked


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


# ------------------------------------------------------------------------------------ the world and its judge


def test_world_is_deterministic_and_its_judge_reads_it_back():
    clip = world.scene("red", "ball", "bounce", chunks=2, seed=3)
    assert np.array_equal(clip.frames, world.scene("red", "ball", "bounce", chunks=2, seed=3).frames)
    assert len(clip.captions) == 2 and "red ball" in clip.captions[0] and clip.frames.shape == (48, 64, 64, 3)
    for colour, shape, motion in [
        ("red", "ball", "bounce"),
        ("blue", "star", "left"),
        ("white", "ring", "swing"),
    ]:
        verdict = world.judge(world.scene(colour, shape, motion, chunks=2, seed=1).frames)
        assert (verdict.colour, verdict.shape, verdict.motion) == (colour, shape, motion)
    assert world.judge(np.zeros((24, 64, 64, 3), np.uint8)).colour is None
    change = world.scene(["red", "blue"], "square", "swing", chunks=2, seed=0)
    assert [c for c, _, _ in world.judge(change.frames).chunks] == ["red", "blue"]
    for seed in range(30):  # training never shows a held-out combination
        assert not any(
            world.held_out(*t) for thing in world.make_clip(seed, chunks=2).things for t in thing.triples
        )


def test_world_judge_knows_a_new_shape_if_asked():
    known = world.SHAPES + world.NEW_SHAPES
    for i, motion in enumerate(world.MOTIONS):
        frames = world.scene([*world.COLOURS][i % 8], "cross", motion, [*world.PLACES][i % 4], 1, i).frames
        verdict = world.judge(frames, shapes=known)
        assert (verdict.shape, verdict.motion) == ("cross", motion)
        assert world.judge(frames).shape != "cross"
    for shape in world.SHAPES:
        assert world.judge(world.scene(shape=shape, chunks=1).frames, shapes=known).shape == shape


def test_world_captions_follow_the_grammar():
    assert world.caption([("orange", "ball", "still")]) == "an orange ball stands still"
    was = [("red", "ball", "swing")]
    said = lambda now, seed: world.caption([now], was, rng=np.random.default_rng(seed))
    assert not any(said(was[0], seed).startswith("now") for seed in range(20))
    assert any(said(("blue", "ball", "swing"), seed).startswith("now") for seed in range(20))


def test_world_slides_end_at_the_wall():
    clip = world.scene("red", "ball", "left", chunks=6, seed=1)
    seen = [motion for _, _, motion in clip.things[0].seen()]
    assert seen[0] == "left" and seen[-1] == "still"
    verdict = world.judge(clip.frames)
    assert verdict.motion == "left" and [m for *_, m in verdict.chunks] == seen


def test_world_pairs_differ_in_colour():
    for seed in range(30):
        a, b = world.make_clip(seed, chunks=2, pairs=1.0).things
        assert all(u[0] != v[0] for u, v in zip(a.triples, b.triples, strict=True))


def test_world_flaws_tell_colour_from_edge():
    frames = world.scene("red", "ball", "bounce", chunks=1, seed=3).frames / 255
    colour, edge = world.flaws(frames)
    assert colour < 10 and edge < 0.1
    red = ((frames[..., 0] > 0.7) & (frames[..., 1] < 0.3))[..., None]
    faded = np.where(red, 0.7 * frames + 0.2, frames)
    bitten = np.where(red & (np.arange(64) % 6 < 2)[:, None], (0.6, 0.7, 0.75), frames)
    assert world.flaws(faded)[0] > colour + 10 and world.flaws(faded)[1] < edge + 0.05
    assert world.flaws(bitten)[1] > edge + 0.1


# ------------------------------------------------------------------------------------------------- evaluation


def test_world_evaluation_asks_only_for_what_was_never_shown():
    asked = [triple for _, triple in world.sample_prompts(40, seed=1)]
    assert all(world.held_out(*triple) for triple in asked) and len({*asked}) == 40
    assert not any(world.held_out(*triple) for _, triple in world.sample_prompts(40, seed=1, heldout=False))


@pytest.fixture
def oracle(monkeypatch):
    """Plays the pipeline: films what a caption says, since it has overheard which words were put into it. Its
    `kind` of mistake is what an evaluation should notice."""
    said, filmed = {}, []
    caption, scene = world.caption, world.scene

    def listen(triples, *args, **kwargs):
        said[words := caption(triples, *args, **kwargs)] = triples[0]
        return words

    def watch(*args, **kwargs):
        filmed.append(scene(*args, **kwargs))
        return filmed[-1]

    monkeypatch.setattr(world, "caption", listen)
    monkeypatch.setattr(world, "scene", watch)

    def pipe(prompt, num_frames, seed, image=None, video=None, **_):
        prompts, chunks = [prompt] if isinstance(prompt, str) else prompt, -(-num_frames // 24)
        if video is not None or image is not None:  # it goes on as what was filmed last
            start = 0 if num_frames == 48 else 48 if video is not None else 47
            frames = filmed[-1].frames[start : start + num_frames]
            yield frames[:1].repeat(num_frames, 0) if pipe.kind == "frozen" else frames
            return
        for k in range(chunks):
            colour, shape, motion = said[prompts[max(0, min(k, len(prompts) - 1) - (pipe.kind == "late"))]]
            colour = "green" if pipe.kind == "green" and k == chunks - 1 else colour
            alone = len(prompts) > 1
            frames = scene(colour, shape, motion, chunks=1 if alone else chunks, seed=seed).frames
            yield frames if alone else frames[24 * k : 24 * k + 24]

    pipe.kind = "right"
    return pipe


def test_evaluation_measures_what_it_says(oracle):
    prompts = world.sample_prompts(6, seed=1)
    assert measure.judge_prompts(oracle, prompts) == {"colour": 1, "shape": 1, "motion": 1}
    wrong = [(text, ("green" if c != "green" else "red", s, m)) for text, (c, s, m) in prompts]
    assert measure.judge_prompts(oracle, wrong) == {"colour": 0, "shape": 1, "motion": 1}
    first, follow = measure.judge_images(oracle, 4)
    assert first == math.inf and follow == 1
    assert max(measure.judge_continuations(oracle, 4)) < 0.5
    assert measure.judge_changes(oracle, 6) == 1 and measure.judge_long(oracle, 1) == 1
    oracle.kind = "frozen"
    assert min(measure.judge_continuations(oracle, 4)) > 3
    oracle.kind = "late"
    assert measure.judge_changes(oracle, 6) == 0
    oracle.kind = "green"
    assert measure.judge_long(oracle, 2) == 0


def test_psnr():
    assert abs(train.psnr(torch.full((9,), 0.2), torch.zeros(9)) - 20) < 1e-4  # a tenth of the range: 20 dB


def test_measure_counts_all_three(monkeypatch):
    said = iter([SimpleNamespace(colour="red", shape="ball", motion=m) for m in ("left", "right")])
    monkeypatch.setattr(world, "judge", lambda video: next(said))
    monkeypatch.setattr(world, "flaws", lambda video: (3.0, 0.5))
    assert measure.shares([0, 0], [("red", "ball", "left")] * 2) == (1, 1, 0.5, 0.5, 3, 0.5)


def test_a_change_must_come_in_its_chunk_not_before(oracle):
    oracle.kind = "right"
    early = lambda prompt, **more: oracle([prompt[-1]] * len(prompt), **more)  # shows the end from the start
    assert measure.judge_changes(early, 6) == 0
