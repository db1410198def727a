"""Model folders, and the object a user holds: magi.load and magi.MAGI."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from common import QUICK, bad, run_python, same

import magi
import media


def test_importing_loads_nothing_that_is_not_used():
    code = (
        "import sys, os; os.environ['CUDA_VISIBLE_DEVICES'] = ''; before = dict(os.environ);"
        "import magi, torch;"
        "assert not {'triton', 'transformers', 'ftfy', 'bs4', 'av', 'sentencepiece'} & set(sys.modules);"
        "assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized();"
        "assert before == dict(os.environ)"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def pipe(model_folder) -> magi.MAGI:
    return magi.load(model_folder)


@pytest.mark.parametrize("num_frames", [1, 3, 24, 30, 97])
@pytest.mark.parametrize("mode", ["t2v", "i2v", "v2v"])
def test_exactly_as_many_frames_come_out_as_were_asked_for(pipe, mode, num_frames):
    rng = np.random.default_rng(0)
    more = {
        "t2v": {},
        "i2v": {"image": rng.integers(0, 255, (40, 50, 3), np.uint8)},
        "v2v": {"video": rng.integers(0, 255, (37, 40, 50, 3), np.uint8)},
    }[mode]
    pieces = list(pipe("a red ball", num_frames=num_frames, **more))
    assert sum(map(len, pieces)) == num_frames
    assert all(p.dtype == np.uint8 and p.shape[1:] == (32, 48, 3) and 0 < len(p) <= 24 for p in pieces)


def test_pixels_are_rounded(pipe, monkeypatch):
    monkeypatch.setattr(pipe.vae, "decode", lambda z: torch.full((1, 3, 24, 32, 48), 0.4039))  # 178.997
    assert (next(iter(pipe("a red ball", num_frames=24))) == 179).all()


def test_a_video_goes_on_after_its_last_frames(pipe):
    video = np.random.default_rng(0).integers(0, 255, (50, 32, 48, 3), np.uint8)
    assert np.array_equal(media.prefix_clip(None, video, 32), video[-32:])
    assert len(media.prefix_clip(None, video[:11], 32)) == 8  # in fours
    seen = np.concatenate(list(pipe("a red ball", video=video, num_frames=8)))
    same_end = np.concatenate(list(pipe("a red ball", video=video[-32:], num_frames=8)))
    other_end = np.concatenate(list(pipe("a red ball", video=video[:-8], num_frames=8)))
    assert same(seen, same_end) and not same(seen, other_end)


@pytest.mark.parametrize("given", [4, 8, 24, 32])
def test_a_continuation_is_decoded_with_the_frames_that_begin_its_chunk(pipe, given):
    """They are not shown again. (Four frames are one latent frame, as an image is, and yet no image.)"""
    video = np.random.default_rng(0).integers(0, 255, (given, 32, 48, 3), np.uint8)
    x = pipe.vae.encode(media.fit_frames(video, 32, 48))[0] * magi.SCALE_FACTOR
    text, mask = pipe.encode_text(["a red ball"])
    cfg = dataclasses.replace(pipe.sampler, num_frames=20)
    latents = dict(magi.sample(pipe.dit, text, mask, cfg, special_tokens=pipe.special_tokens, prefix=x))[0]
    begun = x.shape[1] % 6
    new = latents[:, -(6 - begun) :]
    whole = torch.cat([x[:, x.shape[1] - begun :], new], dim=1)[None]
    expected = pipe.vae.decode(whole / magi.SCALE_FACTOR)[0, :, 4 * begun :].clamp(-1, 1)
    frames = next(iter(pipe((text, mask), video=video, num_frames=20)))
    assert len(frames) == min(20, expected.shape[1])
    pixels = (expected[:, : len(frames)].numpy() + 1) * 127.5
    assert np.abs(frames.transpose(3, 0, 1, 2) - pixels).max() < 1


def test_the_image_is_the_first_frame(pipe):
    """The first latent frame stays the image's own, so decoding it gives what the VAE makes of the image."""
    image = np.full((32, 48, 3), 200, np.uint8)
    first = next(iter(pipe("a red ball", image=image, num_frames=24)))
    x = media.fit_frames(image[None], 32, 48)
    latents = dict(
        magi.sample(
            pipe.dit,
            *(u[0] for u in pipe.encode_text(["a red ball"])),
            dataclasses.replace(QUICK, width=48),
            special_tokens=pipe.special_tokens,
            prefix=pipe.vae.encode(x)[0] * magi.SCALE_FACTOR,
        )
    )
    torch.testing.assert_close(latents[0][:, :1], pipe.vae.encode(x)[0] * magi.SCALE_FACTOR)
    assert first.shape == (24, 32, 48, 3)


def test_the_pipeline_does_not_depend_on_pytorchs_defaults(pipe):
    image = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)
    film = lambda: np.concatenate(list(pipe("a red ball", image=image, num_frames=48)))
    expected = film()
    with torch.device("meta"):  # in the place of a GPU
        found = film()
    assert same(found, expected)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = film()
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(found, expected)


def test_text_can_be_encoded_once_and_reused(pipe):
    text = pipe.encode_text(["a red ball"])
    again = np.concatenate(list(pipe(text, num_frames=24)))
    assert same(again, np.concatenate(list(pipe("a red ball", num_frames=24))))


def test_late_prompts_equal_a_list_and_bring_cuts_and_settings(pipe):
    captions = ["a red ball", "a blue square", "a blue square"]
    film = lambda prompt, **more: np.concatenate(list(pipe(prompt, num_frames=72, **more)))
    expected = film(captions)
    assert same(film(iter(captions[:2])), expected)  # the last one goes on
    assert same(film([magi.Prompt("a red ball"), "a blue square"]), expected)
    cut = film(captions, sampler=magi.shot_transition(pipe.sampler, 1))
    late = film(iter(["a red ball", magi.Prompt("a blue square", "cut")]))
    assert same(late, cut) and not same(late, expected)
    free = dict(text_scales=(0.0,) * 5)
    changed = film(iter(["a red ball", magi.Prompt("a blue square", settings=free)]))
    assert same(changed[:24], expected[:24]) and not same(changed[48:], expected[48:])


def test_late_prompts_are_asked_for_and_encoded_only_when_a_chunk_enters(pipe, monkeypatch):
    events, encode = [], pipe.encode_text
    monkeypatch.setattr(pipe, "encode_text", lambda captions: events.extend(captions) or encode(captions))

    def told():
        for caption in ("a red ball", "a blue square", "a blue square", "a red ball"):
            events.append("asked")
            yield caption

    frames = pipe(told(), num_frames=96, window=1)
    assert not events
    for second in frames:
        events.append(len(second))
    said = ["asked", "a red ball", 24, "asked", "a blue square", 24, "asked", 24, "asked", 24]
    assert events == said


def test_prompts_of_other_types_are_refused(pipe):
    for prompt, message in (
        (5, "the prompt 5 is neither a caption nor several"),
        (None, "the prompt None is neither"),
        (["a red ball", 5], "a prompt is of type int: give captions, Prompts, or"),
        (("a red ball", torch.zeros(3)), "a prompt is of type Tensor"),
        ([magi.Prompt(None)], "a prompt is of type Prompt"),
    ):
        with bad(message):
            pipe(prompt)
    late = lambda *items: list(pipe(iter(items), num_frames=48))
    for item, message in (
        (5, "a prompt is of type int"),
        (magi.Prompt("a", "fade"), "transition 'fade' is not"),
        (magi.Prompt("a", None, {"steps": 8}), "'steps' cannot change while a video is made, only cfg_t"),
        (magi.Prompt("a", None, {"num_steps": 8}), "'num_steps' cannot change while a video is made"),
        (magi.Prompt("a", None, {"text_scales": (1.0,)}), "one length"),
    ):
        with bad(message):
            late("a red ball", item)
    with bad("transition at chunk 0"):
        late(magi.Prompt("a", "cut"))
    with bad("there is no prompt"):
        late()


def test_bad_calls_are_refused_before_anything_is_computed(pipe):
    frames = np.zeros((3, 32, 48, 3), np.uint8)
    for more, message in (
        (dict(height=40), "height 40"),
        (dict(num_steps=5), "steps 5"),
        (dict(video=frames), "the video has 3 frame.s., at least 4 are needed"),
        (dict(image=frames[0], video=frames), "not both"),
        (dict(video=np.zeros((9, 32, 48, 3), np.uint8), prefix_frames=6), "prefix_frames 6"),
        (dict(special_tokens=("best",)), "unknown special token 'best'"),
    ):
        with bad(message):
            pipe("a red ball", **more)


def test_unknown_settings_and_no_prompt_are_refused(pipe):
    with bad("unknown setting steps: choose from num_steps"):
        pipe("a red ball", steps=8)
    with bad("empty list"):
        pipe([])


def test_broken_folders_are_refused(model_folder, tmp_path):
    with bad("no model in"):
        magi.load(tmp_path / "nothing")
    work = tmp_path / "models"
    shutil.copytree(model_folder.parent, work)
    weights = work / "base" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with bad("cannot read weights .*model.safetensors., damaged or of another kind"):
        magi.load(work / "base")
    weights.write_bytes(whole)
    config = json.loads((work / "base" / "config.json").read_text())
    tokens = work / "base" / "special_tokens.safetensors"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-9])
    with bad("cannot read special tokens .*special_tokens.safetensors., damaged or of another kind"):
        magi.load(work / "base")
    tokens.write_bytes(whole)
    config["dit"]["num_layers"] = 4
    (work / "base" / "config.json").write_text(json.dumps(config))
    with bad("does not fit its config .*convert it again.: it lacks 26 tensor.s., such as 'layers.3.attn"):
        magi.load(work / "base")
    config["dit"]["depth"] = 3
    (work / "base" / "config.json").write_text(json.dumps(config))
    with bad("not a config with a valid 'dit' part"):
        magi.load(work / "base")
    del config["dit"]["depth"]
    config["dit"]["norm_eps"] = 10**400
    (work / "base" / "config.json").write_text(json.dumps(config))
    with bad("not a config with a valid 'dit' part: int too large to convert to float"):
        magi.load(work / "base")
    shutil.copy(model_folder / "config.json", work / "base")
    (work / "t5" / "spiece.model").unlink()
    pipe = magi.load(work / "base")  # encoded text would do
    with bad("no text encoder"):
        pipe("a red ball")


def test_a_dtype_of_the_wrong_kind_is_refused(model_folder):
    with bad("vae_dtype 'bfloat16' is not a dtype: give torch.float32, torch.bfloat16"):
        magi.load(model_folder, vae_dtype="bfloat16")
    with bad("dtype torch.bfloat16 is not one of 'float32', 'bfloat16', 'float16'"):
        magi.load(model_folder, dtype=torch.bfloat16)


def test_dtypes_of_load(model_folder):
    pipe = magi.load(model_folder, dtype="bfloat16", vae_dtype=torch.float16)
    assert pipe.dit.layers[0].attn.q.weight.dtype == torch.bfloat16 and pipe.vae.dtype == torch.float16
    assert pipe.dit.final_linear.weight.dtype == torch.float32


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_before_weights_are_read(model_folder, monkeypatch, device):
    monkeypatch.setattr(magi, "fill", lambda *_: pytest.fail("weights are read"))
    with bad(f"device '{device}' is"):
        magi.load(model_folder, device=device)


def test_a_model_may_be_the_folder_that_one_is_in(model_folder, monkeypatch):
    monkeypatch.chdir(model_folder)
    assert magi.load(".").dit.cfg == magi.load(model_folder).dit.cfg
