"""The command line, sample.py: videos, flags, interruptions, bad input."""

import contextlib
import copy
import dataclasses
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import (
    FOLDER_DIT,
    HERE,
    assert_refused,
    environment,
    fork_python,
    official_config,
    read_frames,
    run_python,
    same,
    shades,
    small,
    write_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from judge import judge
from PIL import Image
from safetensors.torch import load_file, save_file

import magi
import media
import sample
import terminal
import training


def run_sample(model: Path, *flags) -> int:
    return sample.main([str(f) for f in ("--model", model, *flags)])


@pytest.fixture
def no_weights(monkeypatch):
    """Reading a weight fails the test."""

    def refuse(*_, **__):
        pytest.fail("a weight was read")

    for name in ("fill", "T5"):
        monkeypatch.setattr(magi, name, refuse)


@pytest.fixture
def planned(monkeypatch) -> dict:
    """Runs stop where sampling would begin; the dict then holds what generate() was given."""
    calls = {}
    monkeypatch.setattr(sample, "generate", lambda **run: calls.update(run) or 0)
    return calls


# ------------------------------------------------------------------------------------------------- end to end


def test_the_shipped_model_makes_a_video(tmp_path, capsys):
    """What the README's first command does, shorter; red is what the least trained model gets right."""
    out = tmp_path / "out.mp4"
    flags = ["--prompt", "a red ball bounces", "--num_frames", "24", "--out", str(out), "--device", "cpu"]
    assert sample.main(flags) == 0
    frames = read_frames(out)
    assert frames.shape == (24, 128, 128, 3) and judge(frames).colour == "red"


@pytest.mark.parametrize("ending", [".mp4", ".gif", ".png"])
@pytest.mark.parametrize("mode", ["t2v", "i2v", "v2v"])
def test_sample_modes_and_formats(mode, ending, model_folder, tmp_path, capsys):
    given_input = {
        "t2v": [],
        "i2v": ["--image", model_folder.parent / "image.png"],
        "v2v": ["--video", model_folder.parent / "clip.mp4"],
    }[mode]
    out = tmp_path / f"video{ending}"
    flags = ["--mode", mode, "--prompt", "a red ball bounces", "--out", out, "--device", "cpu"]
    assert run_sample(model_folder, *flags, *given_input) == 0
    if ending == ".png":
        assert Image.open(out).size == (6 * 98 + 2, 2 * 66 + 2)  # 8 tiles of 48x32, doubled
    else:
        frames = read_frames(out)
        assert frames.shape == (30, 32, 48, 3)
        assert frames.std() > 1
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 1 and "30 frames" in shown.out and str(out) in shown.out
    assert "first chunk after" in shown.out and "per second of video" in shown.out and "memory" in shown.out
    assert "chunk 2/2" in shown.err
    assert sorted(tmp_path.iterdir()) == [out]  # no temporary file stays behind


@pytest.mark.parametrize("frames", [1, 4, 25, 48])
def test_sample_makes_exactly_num_frames(frames, model_folder, tmp_path):
    for name, flags in {
        "t.mp4": [],
        "i.mp4": ["--image", model_folder.parent / "image.png"],
        "v.mp4": ["--video", model_folder.parent / "clip.mp4", "--prefix_frames", 8],
    }.items():
        flags = ["--prompt", "a", "--num_frames", frames, "--out", tmp_path / name, *flags]
        assert run_sample(model_folder, *flags) == 0
        assert len(read_frames(tmp_path / name)) == frames


def test_sample_plans_as_many_chunks_as_the_sampler_makes(model_folder, tmp_path, planned):
    video = ["--video", model_folder.parent / "clip.mp4", "--prefix_frames"]
    for given_frames, n in itertools.product((0, 4, 28), (1, 25, 48)):
        prefix = given_frames // 4
        total = math.ceil((math.ceil(n / 4) + prefix) / magi.CHUNK)  # as magi.sample has it
        flags = [*video, given_frames] if given_frames else ["--prompt", "a"]
        flags += ["--text", model_folder.parent / "text.safetensors"] if given_frames else []
        assert run_sample(model_folder, *flags, "--num_frames", n, "--out", tmp_path / "a.mp4") == 0
        assert planned["chunks"] == total - prefix // magi.CHUNK


def test_sample_is_reproducible(model_folder, tmp_path):
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        out = tmp_path / f"{name}.png"
        assert run_sample(model_folder, "--prompt", "a red ball", "--out", out, "--seed", seed) == 0
    # Nearly always equal to the byte; a busy machine may sum floats in another order and move a rounding,
    # which a lossless file leaves where it is.
    a, b, c = (read_frames(tmp_path / f"{name}.png").astype(float) for name in "abc")
    assert np.abs(a - b).mean() < 0.05 < 1 < np.abs(a - c).mean()


def test_sample_says_how_fast_it_was(tmp_path, monkeypatch, capsys):
    clock = iter([100.0, 102.0, 112.0])
    monkeypatch.setattr(sample, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    chunks, cfg = [shades([0] * 24), shades([1] * 24)], SimpleNamespace(num_steps=4, window=4, fps=12)
    assert sample.generate(lambda progress: iter(chunks), cfg, 2, tmp_path / "a.mp4", "cpu") == 0
    said = capsys.readouterr().out
    assert said.startswith("first chunk after 2.00 s, 3.00 s of computing per second of video (slower than")


def test_sample_takes_one_prompt_per_chunk(model_folder, tmp_path):
    red, blue = "a red ball bounces", "a blue square slides"
    videos = []
    for i, prompts in enumerate([[red], [red, blue], [red, red]]):
        flags = [f for prompt in prompts for f in ("--prompt", prompt)]
        flags += ["--num-frames", 48, "--text_scale", 20, "--out", tmp_path / f"{i}.gif"]
        assert run_sample(model_folder, *flags) == 0
        videos.append(read_frames(tmp_path / f"{i}.gif"))
    assert (videos[0] == videos[2]).all()
    assert (videos[0][:24] == videos[1][:24]).all() and (videos[0][24:] != videos[1][24:]).any()


def test_sample_fits_images(model_folder, tmp_path, planned):
    image = model_folder.parent / "image.png"
    pixels, made = Image.open(image), []
    for fit in ("crop", "stretch", "pad"):
        assert run_sample(model_folder, "--image", image, "--fit", fit, "--out", tmp_path / "a.png") == 0
        keywords = planned["frames"].keywords
        assert (keywords["image"] == media.fitted(pixels, (32, 48), fit)).all()  # is read at the video's size
        made.append(next(iter(planned["frames"]())))
    crop, stretch, pad = made
    assert (crop != stretch).any() and (stretch != pad).any() and (pad != crop).any()


# ------------------------------------------------------------------------------------------------------ flags


def test_sample_takes_the_official_flags(model_folder, tmp_path, planned, capsys):
    config = tmp_path / "official.json"
    heads = dict(num_attention_heads=4, num_query_groups=2, kv_channels=16)
    model = dict(hidden_size=32, ffn_hidden_size=64, **heads)
    run = dict(seed=5, num_steps=8, num_frames=26, video_size_h=48, video_size_w=32)
    official = official_config("base", **model, **run)
    config.write_text(json.dumps(official))
    data = model_folder.parent
    common = [model_folder, "--config_file", config, "--output_path", tmp_path / "o.mp4"]
    assert run_sample(*common, "--mode", "t2v", "--prompt", "a ball") == 0
    cfg = planned["cfg"]
    assert (cfg.seed, cfg.num_frames, cfg.height, cfg.width, cfg.num_steps) == (5, 26, 48, 32, 8)
    assert planned["out"] == tmp_path / "o.mp4" and planned["chunks"] == 2
    assert sum(len(f) for f in planned["frames"]()) == 26
    assert run_sample(*common, "--mode", "i2v", "--prompt", "a", "--image_path", data / "image.png") == 0
    assert planned["frames"].keywords["image"].shape == (48, 32, 3)
    video = ["--mode", "v2v", "--prompt", "a", "--prefix_video_path", data / "clip.mp4"]
    assert run_sample(*common, *video, "--height", 64) == 0
    assert planned["frames"].keywords["video"].shape == (32, 64, 32, 3)
    assert (planned["cfg"].height, planned["cfg"].width) == (64, 32)  # a flag beats the file
    assert capsys.readouterr().err == ""
    official["engine_config"]["distill"] = True
    official["runtime_config"]["cfg_number"] = 1
    config.write_text(json.dumps(official))
    assert run_sample(*common, "--prompt", "a") == 0
    assert not planned["cfg"].distilled and "describes a distilled one" in capsys.readouterr().err


def test_sample_flags_reach_the_sampler(model_folder, tmp_path, planned):
    flags = [model_folder, "--prompt", "a", "--out", tmp_path / "a.mp4"]
    some = "--num-frames inf --fps 12 --steps 12 --window 2 --kv-range 4 3 2 --clean_kv_range -1"
    some += " --text_scale 3 --prev-scale 1.25 --transition 2 --transition 3:restyle"
    some += " --special_tokens 2d duration --negative_tokens logo"
    run_sample(*flags, *some.split())
    cfg = planned["cfg"]
    assert cfg.num_frames is None and planned["chunks"] == math.inf and cfg.fps == 12
    assert (cfg.num_steps, cfg.window, cfg.kv_ranges, cfg.clean_kv_range) == (12, 2, (4, 3, 2), -1)
    assert cfg.text_scales == (3, 3, 3, 0, 0) and cfg.prev_scales == (1.25, 1.25, 1.25, 1, 1)
    assert cfg.special_tokens == ("2d", "duration") and cfg.negative_tokens == ("logo",)
    assert dict(cfg.kv_ranges_at) == {2: (1, 3, 2), 3: (4, 3, 1)}
    some = "--kv_range all --special_tokens none --cfg_t 0 0.5 --text_scale 2 0 --prev_scale 1 1"
    run_sample(*flags, *some.split())
    cfg = planned["cfg"]
    assert (cfg.kv_ranges, cfg.special_tokens, cfg.cfg_t) == ((), (), (0, 0.5))
    assert (cfg.text_scales, cfg.prev_scales) == ((2, 0), (1, 1))


def test_sample_dtype_reaches_the_model(model_folder, tmp_path, planned):
    run_sample(model_folder, "--prompt", "a", "--dtype", "bfloat16", "--out", tmp_path / "a.mp4")
    assert planned["frames"].func.dit.layers[0].attn.q.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "fast, flags, weights, rest",
    [
        (True, [], torch.bfloat16, True),
        (True, ["--dtype", "float32"], torch.float32, False),
        (False, [], torch.float32, False),
        (False, ["--dtype", "bfloat16"], torch.bfloat16, False),  # as the large models are
    ],
)
def test_a_cpu_that_is_fast_at_bf16_uses_it(fast, flags, weights, rest, model_folder, tmp_path, monkeypatch):
    seen = []

    def generate(frames, **_):
        weight = frames.func.dit.layers[0].attn.q.weight
        seen.append((weight.dtype, torch.is_autocast_enabled("cpu")))
        return 0

    monkeypatch.setattr(sample, "bf16_is_fast", lambda device: fast)
    monkeypatch.setattr(sample, "generate", generate)
    common = [model_folder, "--prompt", "a", "--device", "cpu", "--out", tmp_path / "a.mp4"]
    assert run_sample(*common, *flags) == 0
    assert seen == [(weights, rest)] and not torch.is_autocast_enabled("cpu")


def test_in_bf16_the_picture_is_the_same_to_the_eye(tmp_path, monkeypatch):
    films = []
    for fast in (True, False):
        monkeypatch.setattr(sample, "bf16_is_fast", lambda device, fast=fast: fast)
        out = tmp_path / f"{fast}.png"
        flags = ["--prompt", "a red ball bounces", "--num_frames", "24", "--steps", "4", "--device", "cpu"]
        assert sample.main([*flags, "--out", str(out)]) == 0
        films.append(read_frames(out).astype(float))
    a, b = films
    assert (a != b).any() and 10 * np.log10(255**2 / ((a - b) ** 2).mean()) > 40


def test_sample_help_is_quick_and_complete():
    start = time.perf_counter()
    shown = run_python(sample.__file__, "--help")
    assert shown.returncode == 0 and time.perf_counter() - start < 5
    for flag in ("--prompt", "--image", "--video", "--out", "--transition", "--text_scale", "--config_file"):
        assert flag in shown.stdout
    refused = run_python("-X", "importtime", sample.__file__, "--stpes", "3")  # lists what is imported
    assert refused.returncode == 2 and "did you mean --steps?" in refused.stderr
    assert "argparse" in refused.stderr and "torch" not in refused.stderr


def test_sample_saves_and_reuses_text(model_folder, tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.safetensors"
    flags = [model_folder, "--num_frames", 5, "--out"]
    prompts = ["--prompt", "a red ball", "--prompt", "a blue ball"]
    assert run_sample(*flags, tmp_path / "a.gif", *prompts, "--save_text", text) == 0
    assert load_file(text)["text"].shape == (2, 16, 32)
    monkeypatch.setattr(magi.T5, "read", None)  # not even touched
    assert run_sample(*flags, tmp_path / "b.gif", "--text", text) == 0
    assert (read_frames(tmp_path / "a.gif") == read_frames(tmp_path / "b.gif")).all()
    save_file({"text": torch.zeros(1, 9, 32), "mask": torch.ones(1, 9)}, text)
    capsys.readouterr()
    assert run_sample(*flags, tmp_path / "b.gif", "--text", text) == 2
    assert "(1, 9, 32)" in capsys.readouterr().err


def test_sample_notes_and_warnings_are_one_clean_line(model_folder, tmp_path, capsys, planned):
    flags = [model_folder, "--out", tmp_path / "a.mp4"]
    assert run_sample(*flags, "--prompt", "red ball " * 40) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the prompt has") and "only the first 16" in line
    assert run_sample(*flags, *["--prompt", "a"] * 3, "--num_frames", 24) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: 3 prompts for 1 chunk:")
    assert run_sample(*flags, "--image", model_folder.parent / "image.png") == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: no --prompt")


def test_sample_says_what_a_small_model_knows(tmp_path, planned, capsys):
    prompts = ["--prompt", "A red DRAGON bounces", "--prompt", "an orange ring rests, by day"]
    sample.main([*prompts, "--out", str(tmp_path / "o.mp4")])
    said = capsys.readouterr().err
    assert "'dragon'" in said and "colours: red, orange" in said and "'red'" not in said, said
    sample.main(["--prompt", "now a white ring turns and slides up", "--out", str(tmp_path / "o.mp4")])
    assert "note" not in capsys.readouterr().err
    sample.main(["--prompt", "a red circle rests", "--height", "64", "--out", str(tmp_path / "o.mp4")])
    size, shape = (line for line in capsys.readouterr().err.splitlines() if line.startswith("note"))
    assert "128x128" in size and "64x128" in size
    assert "'a red circle rests' names no shape" in shape and "ball, square" in shape


def test_sample_says_that_fp8_is_dequantised(model_folder, tmp_path, capsys):
    model = write_model(tmp_path / "fp8", dataclasses.replace(FOLDER_DIT, fp8=True, dtype="bfloat16"))
    beside = ["--vae", model_folder.parent / "vae", "--t5", model_folder.parent / "t5"]
    flags = ["--prompt", "a", "--num_frames", 3, "--device", "cpu", "--out", tmp_path / "a.mp4"]
    assert run_sample(model, *beside, *flags) == 0
    assert capsys.readouterr().err.startswith("note: cpu has no fp8 arithmetic")
    assert len(read_frames(tmp_path / "a.mp4")) == 3


def test_sample_notes_flags_that_do_nothing(model_folder, tmp_path, planned, capsys):
    model = write_model(tmp_path / "distill", distilled=True)
    beside = ["--vae", model_folder.parent / "vae", "--t5", model_folder.parent / "t5"]
    flags = ["--prompt", "a", "--out", tmp_path / "a.mp4", "--text_scale", 5]
    assert run_sample(model, *flags, *beside) == 0
    assert "guidance of a distilled model is built in" in capsys.readouterr().err
    assert run_sample(model_folder, *flags) == 0 and capsys.readouterr().err == ""


# --------------------------------------------------------------------------------------------- many videos


def many(tmp_path: Path, *lines: str):
    """The checked flags of --prompt_file."""
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    flags = ["--prompt_file", tmp_path / "lines.txt", "--out", tmp_path / "made"]
    args = sample.parse_arguments([str(flag) for flag in flags])
    sample.check_flags(args)
    return args


def test_many_videos_are_claimed_by_one_lock(tmp_path):
    args = many(tmp_path, *["a red ball"] * 100)
    before = len(os.listdir("/proc/self/fd"))
    with contextlib.ExitStack() as locks:
        assert len(set(sample.claim_outputs(args, locks))) == 100
        assert len(os.listdir("/proc/self/fd")) <= before + 1
        with pytest.raises(ValueError, match="another run is writing"):
            sample.claim_outputs(args, locks)
    args.video = tmp_path / "made" / "007-a-red-ball.mp4"
    args.video.parent.mkdir()  # the empty one has gone with its locks
    args.video.touch()
    with pytest.raises(ValueError, match="007-a-red-ball.mp4' is an input"), contextlib.ExitStack() as locks:
        sample.claim_outputs(args, locks)


def test_many_captions_are_encoded_in_batches_and_equal_ones_once(tmp_path, monkeypatch):
    asked = []

    class Numbers(sample.parallel.T5):
        """What stands for T5: the number in a caption is its text."""

        def __call__(self, captions):
            asked.append((len(captions), self.keep))
            return torch.tensor([[[float(caption)]] for caption in captions]), torch.ones(len(captions), 1)

    monkeypatch.setattr(sample.parallel, "T5", Numbers)
    numbers = [*range(20), *range(20), 3]
    args = many(tmp_path, *map(str, numbers), "5 | 4 | 5")
    args.t5 = HERE / "tiny" / "t5"
    texts = sample.encode_text(args, 1, "cpu")
    assert asked == [(16, True), (4, False)]
    assert [text.flatten().tolist() for text, _ in texts] == [*([n] for n in numbers), [5, 4, 5]]
    assert [mask.shape for _, mask in texts[-2:]] == [(1, 1), (3, 1)]


def test_many_videos_are_not_for_a_pipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("lines.txt").write_text("a red ball\n")
    flags = ["--prompt_file", "lines.txt", "--out", "-"]
    assert_refused(sample.main, flags, "--out - is one video", out=tmp_path / "-")


# ---------------------------------------------------------------------------------------------- interruptions


def started(model_folder: Path, out: Path, chunk: int) -> tuple[subprocess.Popen, int]:
    """An endless run that works on `chunk` or a later one, and how many chunks it has surely finished."""
    log = out.with_suffix(".log")
    flags = ["--model", model_folder, "--text", model_folder.parent / "text.safetensors"]  # starts sooner
    flags += ["--num_frames", "inf", "--dtype", "float32", "--out", out]  # bf16 differs with the threads
    with log.open("w") as stderr:
        process = fork_python(sample.__file__, *flags, stdout=subprocess.PIPE, stderr=stderr, text=True)
    deadline = time.time() + 60
    while max([0, *map(int, re.findall(r"chunk (\d+):", log.read_text()))]) < chunk:
        assert process.poll() is None and time.time() < deadline, log.read_text()
        time.sleep(0.05)
    return process, chunk - 1


def test_sample_survives_kill_9(model_folder, tmp_path):
    out = tmp_path / "killed.mp4"
    process, finished = started(model_folder, out, chunk=4)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL
    frames = read_frames(out)
    assert len(frames) >= 24 * finished and len(frames) % 24 == 0
    whole = tmp_path / "whole.mp4"  # the same seconds of a run that ended by itself
    text = model_folder.parent / "text.safetensors"
    flags = ["--text", text, "--num_frames", 168, "--dtype", "float32", "--out", whole]
    assert run_sample(model_folder, *flags) == 0
    assert np.abs(read_frames(whole)[:72].astype(int) - frames[:72]).mean() < 0.1


@pytest.mark.parametrize("ending", [".mp4", ".gif"])
def test_sample_ends_well_on_ctrl_c(ending, model_folder, tmp_path):
    out = tmp_path / f"interrupted{ending}"
    if ending == ".gif":  # too fast to be hit from outside
        writer = media.WRITERS[ending](out, 24)
        with pytest.raises(KeyboardInterrupt), terminal.uninterrupted():
            signal.raise_signal(signal.SIGINT)  # comes before the chunk is written
            writer.write(shades(range(24)))
        assert len(read_frames(out)) == 24
        return
    process, finished = started(model_folder, out, chunk=3)
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    frames = len(read_frames(out))
    assert frames >= 24 * finished
    assert stdout.startswith("interrupted: first chunk after") and f"{frames} frames" in stdout
    assert "Traceback" not in out.with_suffix(".log").read_text()


def test_sample_ctrl_c_before_the_first_chunk_keeps_the_old_file(model_folder, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    out = tmp_path / "old.mp4"
    out.write_text("an older video")
    monkeypatch.setattr(magi, "sample", interrupted)
    assert run_sample(model_folder, "--prompt", "a", "--out", out) == 130
    assert out.read_text() == "an older video" and capsys.readouterr().out.startswith("interrupted")


def test_ctrl_c_ends_a_video_whose_player_has_paused():
    """The pipe is full, so the write waits; if Ctrl-C does not end that, the player goes on after a while."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    played = []
    ctrl_c = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    player = threading.Timer(5, lambda: played.append(os.read(reader, 2**20)))
    waiting = [ctrl_c, player]

    class Pipe(io.FileIO):
        def write(self, data):
            while waiting:
                waiting.pop().start()
            return super().write(data)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with io.BufferedWriter(Pipe(writer, "wb")) as out:
            run = SimpleNamespace(fps=24)
            assert sample.generate(lambda progress: [shades(range(24))], run, 1, out, "cpu") == 130
        assert not played
    finally:
        player.cancel()
        signal.signal(signal.SIGINT, before)
        os.close(reader)


def test_sample_ctrl_c_while_loading(monkeypatch, capsys):
    def interrupted(argv, locks):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "prepare", interrupted)
    assert sample.main([]) == 130 and capsys.readouterr().out.startswith("interrupted")


def test_sample_reports_what_it_cannot_write(model_folder, tmp_path, monkeypatch, capsys):
    def full(self, frames):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(media.Mp4Writer, "write", full)
    assert run_sample(model_folder, "--prompt", "a", "--out", tmp_path / "a.mp4") == 1
    out, err = capsys.readouterr()
    assert "No space left on device" in err and "no chunk could be written" in out


def test_sample_goes_on_when_nobody_listens(model_folder, tmp_path):
    flags = ["--model", model_folder, "--text", model_folder.parent / "text.safetensors"]
    flags += ["--num_frames", "24", "--out"]

    def closed(*command) -> subprocess.Popen:
        """Python begins without a standard error, so this one is no fork."""
        shell = f"{shlex.join(map(str, (sys.executable, *command)))} >/dev/full 2>&-"
        return subprocess.Popen(["bash", "-c", shell], env=environment())

    def left(*command) -> subprocess.Popen:
        """As `| head -c 5` does."""
        process = fork_python(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert len(os.read(process.stdout.fileno(), 5)) == 5
        process.stdout.close()
        return process

    for start in closed, left:
        out = tmp_path / f"{start.__name__}.mp4"
        process = start(sample.__file__, *flags, out)
        assert process.wait() == 0 and len(read_frames(out)) == 24, start


def test_sample_stops_at_numbers_that_are_not_finite(model_folder, tmp_path, capsys):
    """Instead of a black video; the seconds before it are kept."""
    out = tmp_path / "a.mp4"
    assert run_sample(model_folder, "--prompt", "a", "--text_scale", "1e300", "--out", out) == 1
    assert "not finite" in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory")], ids=["host", "device"])
def test_sample_says_what_to_do_when_memory_runs_out(error, monkeypatch, capsys):
    def full(**run):
        raise error

    monkeypatch.setattr(sample, "prepare", lambda argv, locks: [{}])
    monkeypatch.setattr(sample, "generate", full)
    assert sample.main([]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory, see --plan, or try --stream cpu, a smaller --height")
    monkeypatch.setattr(sample, "generate", lambda **run: (_ for _ in ()).throw(RuntimeError("a fault")))
    with pytest.raises(RuntimeError, match="a fault"):
        sample.main([])


# -------------------------------------------------------------------------------------------------- bad input


BAD_FLAGS = {
    "no prompt": ([], "--prompt"),
    "mistyped flag": (["--promt", "a"], "--promt", "did you mean --prompt?"),
    "unquoted prompt": (["--prompt", "a", "red", "ball"], "red ball", "quotes"),
    "unknown flag": (["--stpes", "3"], "--stpes"),
    "not a number": (["--height", "tall"], "--height", "tall"),
    "nan": (["--prompt", "a", "--text_scale", "nan"], "text_scales (nan", "finite"),
    "mode": (["--mode", "t2i"], "t2i", "i2v"),
    "height": (["--prompt", "a", "--height", "100"], "100", "96"),
    "width": (["--prompt", "a", "--width", "71"], "71", "64"),
    "steps": (["--prompt", "a", "--steps", "10"], "10", "8"),
    "window": (["--prompt", "a", "--window", "0"], "window 0"),
    "kv range": (["--prompt", "a", "--kv_range", "5", "4", "3"], "kv_ranges", "3"),
    "kv range 0": (["--prompt", "a", "--kv_range", "0"], "0"),
    "kv range and all": (["--prompt", "a", "--kv_range", "5", "all"], "(5, 'all')", "whole numbers"),
    "special token": (["--prompt", "a", "--special_tokens", "4k"], "4k", "hq"),
    "token and none": (["--prompt", "a", "--special_tokens", "hq", "none"], "'none'", "hq"),
    "negative token": (["--prompt", "a", "--negative_tokens", "blur"], "blur", "logo"),
    "no frames": (["--prompt", "a", "--num_frames", "0"], "0", "at least 1"),
    "negative frames": (["--prompt", "a", "--num_frames", "-3"], "-3"),
    "fps": (["--prompt", "a", "--fps", "0"], "fps 0"),
    "fast gif": (["--prompt", "a", "--fps", "60", "--out", "a.gif"], "fps 60", "50"),
    "fast mp4": (["--prompt", "a", "--fps", "10000000000"], "10000000000", "1000"),
    "seed": (["--prompt", "a", "--seed", "-1"], "-1"),
    "guidance table": (["--prompt", "a", "--text_scale", "7", "1"], "7.0, 1.0"),
    "transition late": (["--prompt", "a", "--transition", "2"], "2", "chunk"),
    "transition in one": (["--prompt", "a", "--num_frames", "24", "--transition", "1"], "has 1 chunk,"),
    "transition first": (["--prompt", "a", "--transition", "0"], "chunk 0"),
    "transition kind": (["--prompt", "a", "--transition", "1:fade"], "fade", "restyle"),
    "i2v without image": (["--mode", "i2v", "--prompt", "a"], "--image"),
    "v2v without video": (["--mode", "v2v", "--prompt", "a"], "--video"),
    "image with t2v": (["--mode", "t2v", "--prompt", "a", "--image", "image.png"], "image.png", "i2v"),
    "image and video": (["--image", "image.png", "--video", "clip.mp4"], "--video", "--image", "leave one"),
    "no such image": (["--image", "nowhere.png"], "nowhere.png", "does not exist"),
    "no such video": (["--video", "nowhere.mp4"], "nowhere.mp4", "does not exist"),
    "bad image": (["--image", "broken.mp4"], "broken.mp4", "cannot read"),
    "video as image": (["--image", "clip.mp4"], "it is a video: use --mode v2v --video 'clip.mp4'"),
    "bad video": (["--video", "broken.mp4"], "broken.mp4", "cannot read"),
    "image as video": (["--video", "image.png"], "single picture", "--mode i2v"),
    "prefix frames": (["--video", "clip.mp4", "--prefix_frames", "6"], "6", "multiple of 4"),
    "no prefix frames": (["--video", "clip.mp4", "--prefix_frames", "0"], "0"),
    "ending": (["--prompt", "a", "--out", "a.avi"], "a.avi", ".mp4"),
    "endless gif": (["--prompt", "a", "--num_frames", "inf", "--out", "a.gif"], "inf", ".mp4"),
    "no such folder": (["--prompt", "a", "--out", "no/where/a.mp4"], "no/where", "create the folder"),
    "no access": (["--prompt", "a", "--out", "/proc/a.mp4"], "/proc"),
    "over an input by another name": (["--video", "clip.mp4", "--out", "link.mp4"], "link.mp4", "input"),
    "text over weights": (["--prompt", "a", "--save_text", "link.safetensors"], "link.safetensors", "input"),
    "dangling link": (["--prompt", "a", "--out", "dangling.mp4"], "dangling.mp4", "does not exist"),
    "scale without LoRA": (["--prompt", "a", "--lora_scale", "2"], "--lora FILE"),
    "a folder": (["--prompt", "a", "--out", "folder.mp4"], "folder.mp4", "it is a folder"),
    "text nowhere": (["--prompt", "a", "--save_text", "no/where.safetensors"], "'no'", "create the folder"),
    "text without ending": (["--prompt", "a", "--save_text", "a.txt"], "a.txt", ".safetensors"),
    "not unicode": (["--prompt", "caf\udce9"], "UTF-8"),
    "kv range text": (["--prompt", "a", "--kv_range", "x"], "'x'", "whole number"),
    "transition text": (["--prompt", "a", "--transition", "1.5"], "'1.5'", "2:restyle"),
    "over the input": (["--video", "clip.mp4", "--out", "clip.mp4"], "clip.mp4", "input"),
    "no such model": (["--prompt", "a", "--model", "nowhere"], "nowhere", "does not exist"),
    "no vae": (["--prompt", "a", "--vae", "nowhere"], "nowhere"),
    "no t5": (["--prompt", "a", "--t5", "nowhere"], "nowhere"),
    "no config": (["--prompt", "a", "--config_file", "nowhere.json"], "nowhere.json"),
    "bad config": (["--prompt", "a", "--config_file", "broken.mp4"], "broken.mp4", "cannot read"),
    "no text": (["--text", "nowhere.safetensors"], "nowhere.safetensors"),
    "bad text": (["--text", "broken.mp4"], "broken.mp4"),
    "text and prompt": (["--text", "a.safetensors", "--prompt", "a"], "--prompt", "--text"),
    "file and prompt": (["--prompt_file", "a.txt", "--prompt", "a"], "--prompt_file", "--prompt"),
    "LoRA scale nan": (["--prompt", "a", "--lora", "a", "--lora_scale", "nan"], "nan", "finite"),
    "device": (["--prompt", "a", "--device", "tpu"], "tpu", "try cpu"),
    "device number": (["--prompt", "a", "--device", "cuda:99"], "cuda:99", "try cpu"),
    "backend on a cpu": (["--prompt", "a", "--backend", "triton", "--device", "cpu"], "triton", "torch"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_sample_refuses(case, model_folder, tmp_path, monkeypatch, no_weights, request):
    for name in ("image.png", "clip.mp4"):
        shutil.copy(model_folder.parent / name, tmp_path)
    (tmp_path / "broken.mp4").write_bytes(b"not a video" * 100)
    os.link(tmp_path / "clip.mp4", tmp_path / "link.mp4")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (tmp_path / "link.safetensors").symlink_to(model_folder / "special_tokens.safetensors")
    monkeypatch.chdir(tmp_path)
    flags, *words = BAD_FLAGS[case]
    if "triton" in flags:
        request.getfixturevalue("no_interpreter")
    model = [] if "--model" in flags else ["--model", model_folder]
    assert_refused(sample.main, [*model, *flags], *words)
    assert not (tmp_path / "out.mp4").exists()


def test_one_frame_is_one_frame(model_folder, tmp_path, capsys):
    out = tmp_path / "a.png"
    assert run_sample(model_folder, "--prompt", "a", "--num_frames", "1", "--out", out) == 0
    assert f", 1 frame -> {out}" in capsys.readouterr().out


def test_sample_takes_a_lora(model_folder, tmp_path, capsys):
    torch.manual_seed(0)
    dit = training.add_lora(magi.load_dit(model_folder), rank=2)
    for lora in training.loras(dit):
        lora.up.data.normal_()
    training.save_lora(dit, tmp_path / "a.safetensors")
    frames = {}
    for name, flags in (
        ("plain", []),
        ("off", ["--lora", tmp_path / "a.safetensors", "--lora_scale", "0"]),
        ("on", ["--lora", tmp_path / "a.safetensors"]),
    ):
        out = tmp_path / f"{name}.mp4"
        assert run_sample(model_folder, "--prompt", "a", "--num_frames", "8", "--out", out, *flags) == 0
        frames[name] = read_frames(out).astype(float)
    assert same(frames["plain"], frames["off"]) and not same(frames["plain"], frames["on"])


def test_a_distilled_lora_makes_the_model_a_distilled_one(model_folder, tmp_path, planned, capsys):
    dit = training.add_lora(magi.load_dit(model_folder), rank=2)
    for command in ("lora", "distill"):
        training.save_lora(dit, tmp_path / f"{command}.safetensors", {"command": command})
    flags = ("--prompt", "a", "--out", tmp_path / "a.mp4")
    for loras, more, expected in (
        (["lora"], [], (False, 4)),
        (["distill"], [], (True, 16)),
        (["lora", "distill"], ["--num_steps", 8], (True, 8)),
        (["lora", "distill"], ["--lora_scale", 1, "--lora_scale", 0.5], (True, 16)),
        (["lora", "distill"], ["--lora_scale", 1, "--lora_scale", 0], (False, 4)),  # it does not act
        (["distill"], ["--lora_scale", 0], (False, 4)),
    ):
        more = more + [word for name in loras for word in ("--lora", tmp_path / f"{name}.safetensors")]
        assert run_sample(model_folder, *flags, *more) == 0
        assert (planned["cfg"].distilled, planned["cfg"].num_steps) == expected
        assert planned["frames"].keywords["sampler"] == planned["cfg"]
    loras = [word for name in ("lora", "distill") for word in ("--lora", tmp_path / f"{name}.safetensors")]
    assert run_sample(model_folder, "--plan", *loras, "--lora_scale", "0") == 0
    assert_refused(sample.main, ["--plan", *loras, *["--lora_scale", "1"] * 3], "3 --lora_scale for 2 --lora")
    already = write_model(tmp_path / "distilled", distilled=True, num_steps=8)
    beside = ("--vae", model_folder.parent / "vae", "--t5", model_folder.parent / "t5")
    assert run_sample(already, *flags, *beside, "--lora", tmp_path / "distill.safetensors") == 0
    assert planned["cfg"].num_steps == 8


def test_sample_refuses_loras_that_do_not_fit(model_folder, tmp_path, no_weights):
    flags = ["--model", model_folder, "--prompt", "a", "--out", tmp_path / "a.mp4", "--lora"]
    training.save_lora(training.add_lora(copy.deepcopy(small()[0]), 2), tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    assert_refused(
        sample.main, [*flags, tmp_path / "other.safetensors"], "other.safetensors", "for another model"
    )
    assert_refused(sample.main, [*flags, tmp_path / "broken.safetensors"], "broken.safetensors", "damaged")
    assert_refused(
        sample.main, [*flags, tmp_path / "nowhere.safetensors"], "nowhere.safetensors", "does not exist"
    )
    assert_refused(sample.main, [*flags, model_folder / "model.safetensors"], "is no LoRA")


def test_sample_knows_the_models_that_come_along(planned, tmp_path):
    for name, folder in sample.SHIPPED.items():
        assert sample.model_folder(name) == folder and magi.read_config(folder, "dit", magi.DiTConfig)
    assert sample.SHIPPED["tiny-base"] == HERE / "tiny" / "base" and sample.DEFAULT_MODEL in sample.SHIPPED
    assert sample.model_folder("some/where") == Path("some/where")


def test_sample_refuses_bad_models(model_folder, tmp_path, no_weights):
    def copy(name: str) -> Path:
        shutil.copytree(model_folder.parent, tmp_path / name)
        return tmp_path / name

    flags = ["--prompt", "a", "--out", tmp_path / "a.mp4", "--model"]
    for part, name in (("base", "model"), ("vae", "model"), ("t5", "model"), ("base", "special_tokens")):
        root = copy(f"cut {part} {name}")
        file = root / part / f"{name}.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        assert_refused(sample.main, [*flags, root / "base"], str(file))
    root = copy("other size")
    config = json.loads((root / "base" / "config.json").read_text())
    config["dit"]["ffn_size"] = 128
    (root / "base" / "config.json").write_text(json.dumps(config))
    assert_refused(sample.main, [*flags, root / "base"], "does not fit its config")
    root = copy("bad config")
    for part, where, value in (
        ("vae", "vae", {"num_heads": 3}),
        ("vae", "vae", {"patch_size": 0}),
        ("vae", "vae", {"depth": "2"}),
        ("base", "dit", {"num_layers": 2.0}),
        ("base", "dit", {"num_kv_heads": 0}),
        ("base", "dit", {"x_scale": "1"}),
        ("base", "sampler", {"num_steps": 8.0}),
        ("base", "sampler", {"distilled": "yes"}),
    ):
        file = root / part / "config.json"
        text, config = file.read_text(), json.loads(file.read_text())
        config[where] |= value
        file.write_text(json.dumps(config))
        assert_refused(sample.main, [*flags, root / "base"], "zero" if 0 in value.values() else [*value][0])
        file.write_text(text)
    for content in b"{", b"\xff":
        (root / "vae" / "config.json").write_bytes(content)
        assert_refused(sample.main, [*flags, root / "base"], "config.json")
    root = copy("no token")
    save_file({"hq_token": torch.zeros(1, 32)}, root / "base" / "special_tokens.safetensors")
    assert_refused(sample.main, [*flags, root / "base", "--special_tokens", "2d"], "two_d_anime_token")
    tokens = {f"duration_token_{i}": torch.zeros(1, 32) for i in range(2, 9)}
    save_file(tokens, root / "base" / "special_tokens.safetensors")
    assert_refused(sample.main, [*flags, root / "base", "--special_tokens", "duration"], "duration_token_1")
    save_file({"hq_token": torch.zeros(1, 16)}, root / "base" / "special_tokens.safetensors")
    assert_refused(sample.main, [*flags, root / "base", "--special_tokens", "hq"], "(1, 16), not (1, 32)")
    root = copy("other t5")
    config = json.loads((root / "t5" / "config.json").read_text())
    (root / "t5" / "config.json").write_text(json.dumps(config | {"d_model": 64}))
    assert_refused(sample.main, [*flags, root / "base"], "width 64", "32")
    (root / "t5" / "model.safetensors").unlink()
    assert_refused(sample.main, [*flags, root / "base"], "no text encoder")


bad_values = st.one_of(
    st.tuples(
        st.sampled_from(["--height", "--width"]), st.integers(-100, 5000).filter(lambda v: v % 16 or v < 32)
    ),
    st.tuples(st.just("--steps"), st.integers(-5, 300).filter(lambda v: v < 1 or v % 4)),
    st.tuples(st.just("--num_frames"), st.integers(-1000, 0)),
    st.tuples(st.sampled_from(["--fps", "--window", "--kv_range"]), st.integers(-9, 0)),
    st.tuples(st.just("--clean_kv_range"), st.integers(-9, 0).filter(lambda v: v != -1)),
    st.tuples(st.just("--seed"), st.integers(-(2**70), -1) | st.integers(2**63, 2**70)),
    st.tuples(st.just("--transition"), st.integers(2, 99) | st.integers(-9, 0)),
    st.tuples(
        st.sampled_from(["--special_tokens", "--negative_tokens"]), st.sampled_from(["HQ", "x", "caption,"])
    ),
    st.tuples(
        st.sampled_from(["--height", "--steps", "--text_scale", "--num_frames", "--transition"]),
        st.sampled_from(["", "x", "1e400", "٣x", "None"]),
    ),
    st.tuples(st.just("--out"), st.sampled_from(["a", "a.mkv", ".mp4", "a.mp4/b.mp4", "a\0.mp4"])),
)


@settings(max_examples=60)
@given(bad=st.lists(bad_values, min_size=1, max_size=3), data=st.data())
def test_sample_refuses_any_bad_combination(model_folder, bad, data):
    """Whatever comes together, it is one line and exit code 2, and no weight is read."""
    good = [("--model", model_folder), ("--prompt", "a"), ("--device", "cpu")]
    flags = data.draw(st.permutations([f"{name}={value}" for name, value in (*good, *bad)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(magi, "fill", None)
        patch.setattr(magi, "T5", None)
        assert_refused(sample.main, flags)
