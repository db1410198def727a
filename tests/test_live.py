"""The page: its film, its server, and what a visitor sees of them in a real browser (Debian's chromium)."""

import asyncio
import contextlib
import copy
import dataclasses
import functools
import io
import itertools
import json
import os
import queue
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import types
import urllib.request
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from common import FOLDER_DIT, assert_refused, fork_python, run_main, write_model
from PIL import Image
from safetensors.torch import save_file

import captions
import live
import magi
import sample
from checkpoints import load_module

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tiny"
sys.path.append(str(TINY))
fit_preview = load_module("fit_preview", ROOT / "tools" / "fit_preview.py")
RED, BLUE = "a red ball bounces", "a blue square slides to the left"
# Where it does not matter what is shown. Below 64 pixels x264 does not give the same file twice.
QUICK = ("--height", "64", "--width", "64")


@functools.cache
def small() -> magi.MAGI:
    pipe = magi.load(TINY / "distill", keep_t5=True)
    pipe.sampler = dataclasses.replace(pipe.sampler, num_frames=None, num_steps=4, height=64, width=64)
    return pipe


@pytest.fixture(scope="module")
def random(model_folder, tmp_path_factory) -> magi.MAGI:
    """A model of random weights, which is faster: for what happens whatever the film shows."""
    cfg = dataclasses.replace(FOLDER_DIT, text_dim=small().dit.cfg.text_dim, text_length=64)
    folder = write_model(tmp_path_factory.mktemp("random") / "model", cfg)
    pipe = magi.load(folder, vae=model_folder.parent / "vae", t5=TINY / "t5", keep_t5=True)
    pipe.sampler = small().sampler
    return pipe


@contextlib.contextmanager
def filming(pipe: magi.MAGI):
    made = live.Live(pipe, live.load_preview(TINY / "vae" / "preview.json"))
    yield made
    made.close()
    assert not made.thread.is_alive()


@pytest.fixture
def film(random):
    with filming(random) as made:
        yield made


@pytest.fixture
def shown():
    """The film of a model that shows what it is told."""
    with filming(small()) as made:
        yield made


def until(condition, seconds: float = 90, pause: float = 0.01) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "this did not come about"
        time.sleep(pause)


def play(film: live.Live, seconds: float) -> set[float]:
    """What a player does: it reports how far it is, so that more is made. Returns where chunks began."""
    starts = set()

    def on() -> bool:
        film.played(film.made)
        starts.update(card.start for card in film.find("made"))
        return film.made >= seconds or bool(film.error)

    until(on)
    return starts


def still(film: live.Live) -> bool:
    """Nothing is computed for a moment: the film's thread waits to be told of a change. (That nothing changes
    is not enough: on a busy machine a step takes longer.)"""
    before = json.dumps(film.state())
    time.sleep(0.1)
    return bool(film.changed._waiters) and json.dumps(film.state()) == before


def whole(film: live.Live) -> np.ndarray:
    """All that was made so far."""
    return frames_of(film.file.read_bytes())


def frames_of(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


# ---------------------------------------------------------------------------------------------- prompts


class Lines(io.RawIOBase):
    """What a person types: readable as it is told, until it is closed with ""."""

    def __init__(self, *lines: str):
        self.lines = queue.SimpleQueue()
        self.tell(*lines)

    def tell(self, *lines: str) -> None:
        for line in lines:
            self.lines.put(line.encode() + b"\n" * bool(line))

    def readline(self, size: int = -1) -> bytes:
        return self.lines.get()


def read_all() -> bool:
    """The end of the stream has been read."""
    return not any(thread.name == "prompts" for thread in threading.enumerate())


def told(stream, endless: bool = True, say=print):
    """All lines are read before the second prompt is asked for; the first one starts the reading."""
    prompts = captions.told_by(stream, endless, say)
    first = next(prompts)
    until(read_all)
    return itertools.chain([first], prompts)


def test_each_prompt_is_given_once_and_the_last_goes_on():
    assert list(told(Lines("a", "b", "c", ""))) == ["a", "b", "c", None]

    lines = Lines("a")
    prompts = captions.told_by(lines, True, print)
    assert [next(prompts) for _ in range(3)] == ["a"] * 3
    lines.tell("d")
    until(lambda: next(prompts) == "d")
    assert [next(prompts) for _ in range(2)] == ["d"] * 2
    lines.tell("")


@pytest.mark.parametrize("endless, end", [(True, [None]), (False, [])])
def test_the_end_of_prompts_ends_an_endless_video_only(endless, end):
    assert list(told(Lines("a", ""), endless)) == ["a", *end]


def test_who_asks_before_the_first_prompt_waits_for_it():
    lines = Lines()
    prompts = captions.told_by(lines, True, print)
    threading.Timer(0.1, lines.tell, ["a", ""]).start()
    start = time.monotonic()
    assert next(prompts) == "a" and time.monotonic() - start > 0.05


def test_lines_of_a_stream_are_prompts():
    said = []
    long = b"x" * 9000
    stream = io.BytesIO(b"\xef\xbb\xbfone\r\n\n  \n two \xc3\xa9\n\xff\xfe\nthree\n" + long + b"\nfour")
    assert list(told(stream, say=said.append)) == ["one", "two é", "three", "four", None]
    assert "not UTF-8" in said[0] and "at most 2,000 characters" in said[1] and len(said) == 2


class Endless(io.RawIOBase):
    """`yes`, until it is `over`."""

    read, over = 0, False

    def readline(self, size: int = -1) -> bytes:
        self.read += 1
        return b"" if self.over else b"y\n"

    def isatty(self) -> bool:
        return True


def test_lines_are_read_no_faster_than_they_are_used():
    stream, said = Endless(), []
    prompts = captions.told_by(stream, True, said.append)
    assert next(prompts) == "y"
    until(lambda: stream.read >= 9)
    time.sleep(0.1)
    assert stream.read <= 11
    stream.over = True
    assert list(prompts)[-1] is None
    assert said == ["standard input is a terminal: type a prompt and press Enter, or Ctrl-D for the end"]


class Broken(io.RawIOBase):
    """What `0>/dev/null` makes of standard input."""

    def readline(self, size: int = -1) -> bytes:
        raise OSError("Bad file descriptor")


def test_a_stream_that_cannot_be_read_is_its_end():
    said = []

    def first() -> None:
        try:
            next(captions.told_by(Broken(), True, said.append))
        except ValueError as error:
            said.append(str(error))

    threading.Thread(target=first, daemon=True).start()
    until(lambda: len(said) == 2, 10)
    assert said == [
        "warning: standard input cannot be read: Bad file descriptor",
        "standard input ended before there was a prompt",
    ]


def test_late_prompts_get_the_notes_of_early_ones(tmp_path, monkeypatch):
    lines = ["a purple dog dances", "a purple dog dances", "\u72d7", RED, RED]
    monkeypatch.setattr(sample.captions, "told_by", lambda *_: iter(lines))
    flags = ("--num_frames", "96", "--steps", "4", "--out", tmp_path / "a.mp4")
    code, _, err = run_main(sample.main, "--prompt", "-", *flags, *QUICK)
    assert code == 0 and err.count("note: this small model has never seen 'dog', 'dances'") == 1
    assert err.count("nothing of the prompt '\u72d7' can be read by the text encoder: say it in English") == 1
    assert err.count("note: ") == 3  # that on the size is not repeated, and there is none on what is known


@pytest.mark.parametrize("frames", [None, 72])
def test_lines_make_the_video_that_a_list_makes(frames):
    prompts = told(io.BytesIO(f"{RED}\n{BLUE}\n".encode()), frames is None)
    made = list(small()(prompts, num_frames=frames))
    if frames is None:
        assert len(made) == 2
        expected = list(itertools.islice(small()([RED, BLUE], num_frames=None), 2))
    else:
        expected = list(small()([RED, BLUE], num_frames=frames))
    assert len(made) == len(expected)
    assert np.abs(np.concatenate(made).astype(int) - np.concatenate(expected)).max() <= 1


# ---------------------------------------------------------------------- --prompt -, --prompt_file, --out -


def command(*flags: str, **more) -> subprocess.Popen:
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return fork_python(ROOT / "sample.py", *flags, **pipes | more)


@pytest.fixture(scope="module")
def red(tmp_path_factory) -> tuple:
    """RED as --text takes it: a process that need not import transformers starts in a third of the time."""
    file = tmp_path_factory.mktemp("text") / "red.safetensors"
    text, mask = small().encode_text([RED])
    save_file({"text": text, "mask": mask}, file)
    return "--text", file


def assert_close(a: np.ndarray, b: np.ndarray) -> None:
    """As far as H.264 is exact."""
    assert a.shape == b.shape and np.abs(a.astype(int) - b).mean() < 3


def test_lines_that_come_while_it_runs_go_to_the_next_chunks(red):
    """The second is written when the first second of video is there, the end with it. (After `red` this
    process has imported transformers, and its forks need not.)"""
    from judge import judge

    process = command("--prompt", "-", "--num_frames", "inf", "--steps", "4", "--out", "-")
    process.stdin.write(RED.encode() + b"\n")
    process.stdin.flush()
    data = os.read(process.stdout.fileno(), 65536)
    while data.count(b"moof") < 1:
        data += os.read(process.stdout.fileno(), 65536)
    rest, messages = process.communicate(BLUE.encode() + b"\n", timeout=120)
    assert process.returncode == 0 and b"frames -> -" in messages and b"Traceback" not in messages
    frames = frames_of(data + rest)
    colours = [colour for colour, _, _ in judge(frames).chunks]
    assert colours[:3] == ["red"] * 3 and colours[-1] == "blue" and 5 <= len(colours) <= 7


def test_an_mp4_on_standard_output_is_the_one_in_a_file(red, tmp_path):
    flags = (*red, "--num_frames", "40", *QUICK)
    process = command(*flags, "--out", "-")
    data, messages = process.communicate(timeout=120)
    assert process.returncode == 0 and data[4:8] == b"ftyp" and b"40 frames" in messages
    assert run_main(sample.main, *flags, "--out", tmp_path / "a.mp4")[0] == 0
    assert np.array_equal(frames_of(data), frames_of((tmp_path / "a.mp4").read_bytes()))


def test_a_player_that_is_closed_ends_an_endless_video_quietly(red):
    process = command(*red, "--num_frames", "inf", "--out", "-", *QUICK)
    assert len(process.stdout.read(2000)) == 2000
    process.stdout.close()
    messages = process.stderr.read().decode()
    assert process.wait(120) == 0 and not re.search("rror|Traceback|roken", messages)


def test_a_file_of_prompts_makes_a_video_a_line(tmp_path):
    (tmp_path / "p.txt").write_text(f"\ufeff{RED}\n\n  {RED} | {BLUE}\r\n", encoding="utf-8")
    flags = ("--prompt_file", tmp_path / "p.txt", "--out", tmp_path / "made", "--num_frames", "48")
    code, _, messages = run_main(sample.main, *flags, "--seed", "7", *QUICK)
    assert code == 0 and "warning" not in messages
    assert sorted(os.listdir(tmp_path / "made")) == [
        "000-a-red-ball-bounces.mp4",
        "001-a-red-ball-bounces.mp4",
    ]
    pipe, expected = small(), []
    for name, prompts, seed in (("000", [RED], 7), ("001", [RED, BLUE], 8)):
        expected.append(np.concatenate(list(pipe(prompts, num_frames=48, seed=seed, num_steps=8))))
        file = tmp_path / "made" / f"{name}-a-red-ball-bounces.mp4"
        assert_close(frames_of(file.read_bytes()), expected[-1])
    with pytest.raises(AssertionError):
        assert_close(*expected)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--prompt", "-", "--prompt", "x"], "--prompt - stands alone"),
        (["--prompt", "-", "--save_text", "t"], "--save_text needs its prompts at once"),
        (["--prompt_file", "nix"], "prompt file 'nix' does not exist"),
        (["--prompt_file", os.devnull], "is empty: write a prompt a line"),
        (
            ["--prompt_file", "LICENSE", "--save_text", "t.safetensors"],
            "--save_text needs its prompts at once",
        ),
        (["--prompt_file", "LICENSE", "--num_frames", "inf"], "none is endless"),
        (["--prompt_file", "LICENSE", "--out", "README.md"], "'README.md' must be a folder"),
        (["--prompt_file", "LICENSE", "--out", "nix/a/b"], "the folder 'nix/a/b': create 'nix/a' first"),
    ],
)
def test_what_does_not_go_together_is_one_line(flags, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert sample.main(flags) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize("existed", [False, True])
def test_the_last_seed_of_a_file_of_prompts_is_checked_before_the_first_video(tmp_path, existed):
    """What is refused leaves no empty folder behind, but one that was there."""
    (tmp_path / "p.txt").write_text(f"{RED}\n{BLUE}\n")
    made = tmp_path / "made"
    if existed:
        made.mkdir()
    flags = ("--prompt_file", tmp_path / "p.txt", "--out", made, "--seed", 2**63 - 1)
    assert_refused(sample.main, [*flags, *QUICK], f"seed {2**63} must be in")
    assert made.exists() == existed and not (existed and os.listdir(made))


@pytest.mark.parametrize("frames", ["inf", "24"])
def test_no_prompt_at_all_is_one_line(frames, monkeypatch, capfdbinary):
    monkeypatch.setattr(sys, "stdout", open(1, "w", closefd=False))  # as in a process of its own
    stdin = os.dup(0)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    try:
        assert sample.main(["--prompt", "-", "--num_frames", frames, "--out", "-"]) == 1
    finally:
        os.dup2(stdin, 0)
        os.close(stdin)
    sys.stdout.flush()
    out, messages = capfdbinary.readouterr()
    assert b"standard input ended before there was a prompt" in messages
    assert out == b"" and b"Traceback" not in messages


# ---------------------------------------------------------------------------------------------- preview


def test_the_preview_shows_the_colours_that_the_decoder_makes():
    """The matrix beside the VAE is no worse than one fitted to this very video, within a fifth."""
    pipe, matrix = magi.load(TINY / "distill"), live.load_preview(TINY / "vae" / "preview.json")
    latents = []
    frames = next(
        pipe(
            "a yellow ball bounces in the desert",
            num_frames=24,
            progress=lambda p: latents.append(p.latents[0][0]),
        )
    )
    shown = live.preview(latents[-1], matrix).astype(float)
    truth = frames[12:16].reshape(4, 16, 8, 16, 8, 3).mean((0, 2, 4))
    assert shown.shape == truth.shape == (16, 16, 3)
    assert np.sqrt(np.mean((shown - truth) ** 2)) < 0.6 * truth.reshape(-1, 3).std(0).mean()


def test_a_preview_is_fitted_by_a_command_and_read_again(tmp_path):
    file = tmp_path / "preview.json"
    assert live.load_preview(file) is None
    error = fit_preview.fit_preview(small(), [RED, BLUE], file)
    matrix = live.load_preview(file)
    assert matrix.shape == (17, 3) and 0 < error < 60
    file.write_text('{"latent_to_rgb": [1, 2]}')
    with pytest.raises(ValueError, match=r"cannot read preview .* its shape is \(2,\)"):
        live.load_preview(file)


# --------------------------------------------------------------------------------------------- the film


def test_a_film_is_made_as_it_is_played_and_no_faster(film):
    assert still(film) and film.made == 0  # nobody has said anything
    film.say(RED)
    until(lambda: film.made and still(film))
    made = film.made
    film.played(made)
    until(lambda: film.made > made)


def test_the_strip_shows_every_chunk_from_noise_to_clean(film):
    film.say(RED)
    seen = {}

    def watch() -> bool:
        film.played(film.made)
        state = film.state()
        first = round(state["made"]) - sum(card["state"] == "made" for card in state["cards"])
        for n, card in enumerate(state["cards"], first):
            seen.setdefault(n, []).append(dict(card))
        return film.made >= 4

    until(watch)
    for n in range(3):
        times = [card["t"] for card in seen[n]]
        assert times == sorted(times) and times[-1] == 1.0 and len(set(times)) > 2
        assert seen[n][-1]["state"] == "made" and seen[n][-1]["start"] == n and seen[n][-1]["text"] == RED
        assert seen[n][-1]["picture"].startswith("data:image/png;base64,")
        assert any(card["picture"] and card["state"] == "flying" for card in seen[n])  # a guess at noise
    assert len(film.find("flying")) <= 4


def test_a_prompt_reaches_the_next_chunk_that_enters(film, monkeypatch):
    # By this clock a film takes as long to play as it lasts, so nobody need wait, however fast it is made.
    clock = types.SimpleNamespace(monotonic=lambda: time.monotonic() + film.position)
    monkeypatch.setattr(live, "time", clock)
    seen = {}

    def made(seconds: float) -> bool:
        film.played(film.made)
        seen.update({card.start: (card.text, card.kind) for card in film.find("made")})
        return film.made >= seconds

    film.say(RED)
    until(lambda: made(2))
    until(lambda: still(film))
    film.say(BLUE, "cut")
    end = round(film.made) + 6
    until(lambda: made(end))
    kinds = [seen[second] for second in range(end)]
    first = kinds.index((BLUE, "cut"))
    assert kinds[:first] == [(RED, None)] * first and kinds[first + 1 :] == [(BLUE, None)] * (end - 1 - first)
    assert end - 3 <= first <= end - 1  # after the chunks that were in flight
    said = r"From your prompt to its first frame: (\d+\.\d) s. The schedule needs at least (\d+\.\d) s."
    latency = re.fullmatch(said, film.latency)
    shown, least = map(float, latency.groups())
    assert shown >= least >= 3  # three seconds were in flight; who computes more slowly needs more


def test_the_film_is_what_the_command_line_would_make(shown):
    shown.say(RED)
    play(shown, 3)
    made = whole(shown)
    expected = np.concatenate(list(itertools.islice(small()(RED), 3)))
    assert len(made) >= 72 and np.abs(made[:72].astype(int) - expected).mean() < 4  # H.264 is not exact


def test_pause_stops_computing(film):
    film.say(RED)
    play(film, 1)
    film.update(paused=True)
    until(lambda: still(film))  # the step that was being computed ends first
    film.played(film.made)
    assert still(film)
    made = film.made
    film.update(paused=False)
    until(lambda: film.made > made)


def test_a_new_seed_goes_on_in_the_same_film_with_other_frames(shown):
    shown.say(RED)
    play(shown, 2)
    shown.begin(seed=99)
    play(shown, shown.made + 3)
    starts = [card.start for card in shown.find("made")]
    assert starts == list(range(round(shown.made) - len(starts), round(shown.made)))
    frames = whole(shown)
    chunk = [frames[i : i + 24] for i in range(0, len(frames) - 23, 24)]
    expected = next(small()(RED, seed=99))
    assert any(np.abs(c.astype(int) - expected).mean() < 4 for c in chunk[1:])


@pytest.mark.parametrize("name, frames", [("image", None), ("video", 40), ("video", 8)])
def test_a_film_goes_on_from_a_picture_or_a_clip(shown, name, frames):
    shown.say(RED)
    play(shown, 1)
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[:, ::2, 1] = 200
    given = {name: picture if frames is None else np.stack([np.roll(picture, i, 0) for i in range(frames)])}
    begins = round(24 * shown.made)
    shown.begin(**given)
    expected = next(small()(RED, **given))
    starts = play(shown, shown.made + 3)
    made = whole(shown).astype(int)
    # A second more may have been made before the new take began.
    off = {i: np.abs(made[i : i + len(expected)] - expected).mean() for i in (begins, begins + 24)}
    first = min(off, key=off.get)
    assert off[first] < 6  # H.264 is not exact
    end = (first + len(expected)) / 24
    assert any(start == pytest.approx(end) for start in starts)


def test_a_crash_leaves_the_page_alive_and_the_film_whole(film, monkeypatch, capfd):
    film.say(RED)
    play(film, 2)

    def crash(latent):
        raise RuntimeError("CUDA error:\nthe device fell off")

    with monkeypatch.context() as patch:
        patch.setattr(film.pipe, "decode", crash)
        film.played(film.made)
        until(lambda: film.error)
    assert film.error == "RuntimeError: CUDA error: the device fell off" and not film.running
    assert film.state()["error"] == film.error and capfd.readouterr().err.count("error: Runtime") == 1
    made = film.made
    assert len(whole(film)) == made * 24
    film.say(BLUE)  # and it goes on
    assert film.error == ""
    play(film, made + 1)
    with film.changed:  # the next second must not come between the two
        now, frames = film.made, whole(film)
    assert now > made and len(frames) == now * 24


@contextlib.contextmanager
def full_disk(room: int):
    """No file may grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("seconds", [0, 2])
def test_a_full_disk_leaves_the_film_as_it_was(film, seconds):
    if seconds:
        film.say(RED)
        play(film, seconds)
        until(lambda: still(film))
    made = film.made
    with full_disk(film.size + 400):
        film.say(RED)
        film.played(made)
        until(lambda: film.error)
    assert "too large" in film.error and film.made == made
    assert film.file.stat().st_size == film.size and bool(film.size) == bool(seconds)
    film.say(BLUE)
    starts = play(film, made + 3)
    until(lambda: still(film))
    assert {made, made + 1} <= starts
    with av.open(io.BytesIO(film.file.read_bytes())) as file:
        times = [frame.time for frame in file.decode(video=0)]
    assert times == pytest.approx([i / 24 for i in range(round(24 * film.made))])


def takes_of(film: live.Live) -> list[dict]:
    """What each take of the film is begun with."""
    takes, pipe = [], film.pipe

    def begin(prompts, progress, **start):
        takes.append(start)
        return pipe(prompts, progress=progress, **start)

    film.pipe = begin
    return takes


def test_a_picture_waits_for_the_first_prompt_and_goes_with_the_next_seeds(film):
    takes, picture = takes_of(film), np.full((64, 64, 3), 90, np.uint8)
    with pytest.raises(ValueError, match="say what to show.* then this is used"):
        film.begin(image=picture)
    assert not film.running
    film.say(RED)
    until(lambda: len(takes) == 1)
    film.begin(seed=99)
    until(lambda: len(takes) == 2)
    film.begin(video=picture[None].repeat(8, 0))
    until(lambda: len(takes) == 3)
    assert [take["sampler"].seed for take in takes] == [small().sampler.seed, 99, 99]
    assert takes[0]["image"] is takes[1]["image"] is picture and "image" not in takes[2]


def test_after_an_error_the_seed_stays_and_the_picture_goes(film):
    """It may be what was wrong."""
    takes = takes_of(film)
    film.say(RED)
    film.begin(seed=99, image=np.zeros(5, np.uint8))
    until(lambda: film.error)
    film.say(RED)
    play(film, 1)
    assert takes[-1]["sampler"].seed == 99 and "image" not in takes[-1]


def test_a_prompt_is_followed_by_its_notes(film):
    film.notes = lambda text: [f"note: what is {word!r}?" for word in text.split() if word != "ball"]
    film.say("dog cat")
    assert film.state()["note"] == "note: what is 'dog'? note: what is 'cat'?"
    film.say("ball")
    assert film.state()["note"] == ""


def test_an_error_before_the_first_second_is_one_line_too(film):
    film.pipe.special_tokens, kept = {}, film.pipe.special_tokens
    try:
        film.say(RED)
        until(lambda: film.error)
    finally:
        film.pipe.special_tokens = kept
    assert film.error.startswith("this run needs the special token") and "\n" not in film.error


def test_bad_prompts_are_refused_and_change_nothing(film):
    for text, message in [
        ("", "say what to show"),
        ("x" * 2001, "at most 2,000"),
        ("\ud800", "not UTF-8"),
        (3, "is text"),
        (None, "is text"),
    ]:
        with pytest.raises(ValueError, match=message):
            film.say(text)
    with pytest.raises(ValueError, match="transition 'fade'"):
        film.say(RED, "fade")
    assert not film.running and not film.cards
    film.update(paused=True, running=True)
    for _ in range(live.MAX_WAITING):
        film.say(RED)
    with pytest.raises(ValueError, match="8 prompts are waiting"):
        film.say(RED)


def test_memory_does_not_grow_with_the_film(film):
    film.say(RED)
    sizes = []
    tracemalloc.start()
    try:
        for seconds in (8, 24):
            play(film, seconds)
            until(lambda: still(film))
            sizes.append(tracemalloc.get_traced_memory()[0])
            assert len(film.find("made")) == live.SHOWN and len(film.find("flying")) <= 4
    finally:
        tracemalloc.stop()
    assert sizes[1] - sizes[0] < 80_000
    assert film.file.stat().st_size == film.size


def test_a_late_visitor_gets_a_video_that_starts_where_the_others_are(film):
    film.say(RED)
    play(film, 8)
    until(lambda: still(film))
    sent, data = film.after(0)
    assert sent == film.size and film.after(sent) == (sent, b"")
    frames = frames_of(data)
    assert len(frames) == live.SHOWN * 24
    assert np.array_equal(frames, whole(film)[-len(frames) :])


# ---------------------------------------------------------------------------------------------- uploads


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    pixels = np.full((30, 50, 3), (200, 30, 40), np.uint8)
    if kind in ("mp4", "matroska", "webm", "avi", "mov"):
        with av.open(file, "w", format=kind) as out:
            stream = out.add_stream({"webm": "libvpx-vp9", "avi": "mpeg4"}.get(kind, "libx264"), rate=24)
            stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
            for _ in range(12):
                out.mux(
                    stream.encode(
                        av.VideoFrame.from_ndarray(pixels[:, :48].repeat(2, 0)[:32], format="rgb24")
                    )
                )
            out.mux(stream.encode())
    else:
        Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "mp4", "matroska", "webm", "avi", "mov"])
def test_uploads_are_read_as_the_command_line_reads_files(kind, random):
    given = live.read_upload(encoded(kind), random.sampler)
    ((name, pixels),) = given.items()
    assert name == ("image" if kind in ("png", "jpeg", "gif", "webp") else "video")
    assert pixels.shape[-3:] == (64, 64, 3) and pixels.ndim == (3 if name == "image" else 4)
    assert np.abs(pixels.reshape(-1, 3).mean(0) - (200, 30, 40)).max() < 12
    next(random(RED, **given))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='/etc/passwd'/></svg>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"RIFF....WAVEfmt ",
        b"P6 1 1 255 abc",
        b"%PDF-1.7 and more bytes",
        os.urandom(5000),
    ],
)
def test_what_is_no_picture_or_clip_is_refused_unread(data):
    with pytest.raises(ValueError, match="neither a picture"):
        live.read_upload(data, small().sampler)


@pytest.mark.parametrize("kind", ["png", "jpeg", "mp4"])
def test_a_damaged_upload_is_one_line_without_a_path(kind):
    with pytest.raises(ValueError) as error:
        live.read_upload(encoded(kind)[:40], small().sampler)
    assert "/" not in str(error.value).replace("and/or", "") and str(error.value).startswith("cannot read")


def test_a_picture_of_very_many_pixels_is_refused():
    file = io.BytesIO()
    Image.new("1", (1, 1)).save(file, "png")
    data = bytearray(file.getvalue())
    data[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height, in its header
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    with pytest.raises(ValueError, match="60000x60000"):
        live.read_upload(bytes(data), small().sampler)


def test_a_long_clip_is_refused_before_it_is_decoded(monkeypatch):
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=Fraction(1, 100))
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for _ in range(3):
            out.mux(stream.encode(av.VideoFrame(48, 32, "yuv420p")))
        out.mux(stream.encode())
    monkeypatch.setattr(live.media, "read_video", None)
    with pytest.raises(ValueError, match="the clip lasts 300 s, 180 at most: give its end"):
        live.read_upload(file.getvalue(), small().sampler)


# ----------------------------------------------------------------------------------------------- server


def serving(film: live.Live, talk, token: str = "") -> None:
    """Run `await talk(client)` against the real server, on a port of its own."""
    from aiohttp.test_utils import TestClient, TestServer

    async def run() -> None:
        async with TestClient(TestServer(live.Server(film, token).app)) as client:
            await asyncio.wait_for(talk(client), 60)

    asyncio.run(run())


async def heard(socket, wanted) -> dict:
    """The next message of which wanted(message) is true; fragments are passed over."""
    while True:
        message = await socket.receive(timeout=20)
        assert message.type.name in ("TEXT", "BINARY"), message
        if message.type.name == "TEXT" and wanted(said := json.loads(message.data)):
            return said


def test_only_this_machine_may_ask(film):
    async def talk(client):
        at = f"{client.host}:{client.port}"
        for host, origin, ok in [
            (at, None, True),
            (at, f"http://{at}", True),
            ("localhost:9", "http://localhost:9", True),
            ("[::1]:9", None, True),
            ("evil.example", None, False),
            ("evil.example", "http://evil.example", False),
            (f"{client.host}.evil.example", None, False),
            (at, "http://evil.example", False),
            (at, "null", False),
            (at, f"http://{client.host}:1", False),
            ("127.0.0.1.", None, False),
            ("127.0.0.1:99999999", None, False),
            ("\u00ff", None, False),
        ]:
            headers = {"Host": host} | ({"Origin": origin} if origin else {})
            for path in ("/", "/film.mp4", "/live"):
                upgrade = (
                    {
                        "Upgrade": "websocket",
                        "Connection": "Upgrade",
                        "Sec-WebSocket-Version": "13",
                        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
                    }
                    if path == "/live"
                    else {}
                )
                async with client.get(path, headers=headers | upgrade) as response:
                    assert response.status == ((101 if upgrade else 200) if ok else 403), (host, origin, path)

    serving(film, talk)


def test_other_machines_need_the_token(film):
    async def talk(client):
        headers = {"Host": "render.lan:8765"}
        for query, status in [
            ("", 403),
            ("?token=", 403),
            ("?token=sesam", 403),
            ("?token=s%C3%A9same", 403),
            ("?token=open", 200),
        ]:
            async with client.get("/" + query, headers=headers) as response:
                assert response.status == status, query
        async with client.get(
            "/?token=open", headers=headers | {"Origin": "http://evil.example"}
        ) as response:
            assert response.status == 403

    serving(film, talk, token="open")


def test_the_page_is_one_file_that_asks_for_nothing_from_outside(film):
    async def talk(client):
        async with client.get("/") as response:
            text = await response.text()
            assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        assert "<video" in text and not re.search(r"(src|href)=\"?(https?:)?//", text)
        for path in ("/../live.py", "/film.mp4/..%2f..%2fetc/passwd", "/live.py", "/static"):
            async with client.get(path) as response:
                assert response.status == 404

    serving(film, talk)


def test_one_speaks_and_another_watches(film, monkeypatch):
    monkeypatch.setattr(live, "RELOAD", 0.3)

    async def talk(client):
        async with client.ws_connect("/live?visitor=a") as first:
            assert (await heard(first, lambda m: True))["speaks"]
            second = await client.ws_connect("/live?visitor=b")
            state = await heard(second, lambda m: True)
            assert not state["speaks"]
            for ask in ({"say": RED, "kind": ""}, {"pause": ""}, {"seed": ""}):
                await second.send_json(ask)
                assert "you are watching" in (await heard(second, lambda m: "problem" in m))["problem"]
            await second.send_bytes(encoded("png"))
            assert "you are watching" in (await heard(second, lambda m: "problem" in m))["problem"]
            assert not film.running
            await first.send_json({"say": RED, "kind": ""})
            assert (await heard(second, lambda m: m.get("made")))["cards"][0]["text"] == RED
            again = await client.ws_connect("/live?visitor=a")  # a reload keeps the place
            assert (await heard(again, lambda m: True))["speaks"]
            await again.close()
        assert await heard(second, lambda m: m.get("speaks"))  # then the next one speaks
        await second.send_json({"pause": ""})
        assert await heard(second, lambda m: m.get("paused"))
        await second.close()

    serving(film, talk)


def test_of_two_tabs_with_one_name_the_newer_goes_on(film):
    """A browser that duplicates a tab copies its name."""

    async def talk(client):
        first = await client.ws_connect("/live?visitor=a")
        await heard(first, lambda m: m["speaks"])
        second = await client.ws_connect("/live?visitor=a")
        while (message := await first.receive(timeout=20)).type.name == "TEXT":
            pass
        assert message.type.name == "CLOSE" and "open in another tab" in message.extra
        await heard(second, lambda m: m["speaks"])
        await second.send_json({"say": RED, "kind": ""})
        await heard(second, lambda m: m.get("running"))
        await second.close()

    serving(film, talk)
    assert not live.Server(film).speaks("a")  # nor does anybody, where nobody is


def test_an_upload_is_read_while_the_film_goes_on(film, monkeypatch):
    read = threading.Event()
    monkeypatch.setattr(live, "read_upload", lambda *_: {} if read.wait(20) else None)
    film.prompt = RED

    async def talk(client):
        async with client.ws_connect("/live?visitor=a") as socket:
            await socket.send_bytes(b"a file")
            await socket.send_json({"pause": ""})
            assert not (await heard(socket, lambda m: m.get("paused")))["running"]
            await socket.send_bytes(b"another")
            assert "another file is being" in (await heard(socket, lambda m: "problem" in m))["problem"]
            read.set()
            await heard(socket, lambda m: m.get("running"))

    serving(film, talk)


def test_a_prompt_that_was_taken_is_said_back(film):
    async def talk(client):
        async with client.ws_connect("/live?visitor=a") as socket:
            for text in ("x" * 2001, RED):
                await socket.send_json({"say": text, "kind": ""})
            answers = [await heard(socket, lambda m: m.keys() & {"said", "problem"}) for _ in range(2)]
            assert "at most 2,000" in answers[0]["problem"] and answers[1] == {"said": RED}

    serving(film, talk)


def test_nonsense_is_answered_by_one_line(film):
    async def talk(client):
        async with client.ws_connect("/live?visitor=a") as socket:
            for text in (
                "",
                "{",
                "[]",
                "{}",
                "3",
                "null",
                '"at"',
                '{"at": "x"}',
                '{"at": null}',
                '{"say": "x"}',
                '{"say": 5, "kind": ""}',
                '{"say": "x", "kind": [1]}',
                '{"say": "x", "kind": "../../etc"}',
                '{"say": "' + "x" * 3000 + '", "kind": ""}',
                '{"seed": 1}',
                '{"say": "\\ud800", "kind": ""}',
            ):
                await socket.send_str(text)
                problem = (await heard(socket, lambda m: "problem" in m))["problem"]
                assert problem and "\n" not in problem and len(problem) <= 300, text
            for text in ('{"at": NaN}', '{"at": Infinity}', '{"at": -1e300}'):
                await socket.send_str(text)
            await socket.send_bytes(encoded("png"))
            assert "say what to show" in (await heard(socket, lambda m: "problem" in m))["problem"]
            await socket.send_json({"say": RED, "kind": ""})
            await heard(socket, lambda m: m.get("made"))
            await socket.send_bytes(b"no picture at all")
            assert "neither a picture" in (await heard(socket, lambda m: "problem" in m))["problem"]
            assert film.running and film.position <= film.made

    serving(film, talk)


def test_an_upload_that_is_too_large_is_not_read(film, monkeypatch):
    monkeypatch.setattr(live, "MAX_UPLOAD", 10_000)

    async def talk(client):
        async with client.ws_connect("/live?visitor=a") as socket:
            await socket.send_bytes(bytes(20_000))
            while (message := await socket.receive(timeout=20)).type.name == "TEXT":
                pass
            assert socket.close_code == 1009 or message.data == 1009
        async with client.ws_connect("/live?visitor=a") as socket:  # the server is well
            await heard(socket, lambda m: True)

    serving(film, talk)


def test_too_many_visitors_are_turned_away(film):
    async def talk(client):
        sockets = [await client.ws_connect(f"/live?visitor={i}") for i in range(live.MAX_VISITORS)]
        async with client.get("/live?visitor=more") as response:
            assert response.status == 503
        sockets.append(await client.ws_connect("/live?visitor=0"))  # a reload is none more, and still speaks
        assert (await heard(sockets[-1], lambda m: True))["speaks"]
        for each in sockets:
            await each.close()

    serving(film, talk)


def test_the_fragments_a_visitor_gets_are_the_film(film):
    async def talk(client):
        got = b""
        async with client.ws_connect("/live?visitor=a") as socket:
            await socket.send_json({"say": RED, "kind": ""})
            made = 0
            while made < 3:
                message = await socket.receive(timeout=20)
                if message.type.name == "BINARY":
                    got += message.data
                else:
                    made = max(made, json.loads(message.data).get("made", 0))
                    await socket.send_json({"at": made})
            async with client.get("/film.mp4") as response:
                data = await response.read()
                assert "attachment" in response.headers["Content-Disposition"]
        assert len(got) > 1000 and data.startswith(got)
        assert len(frames_of(data)) % 24 == 0

    serving(film, talk)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model", "nowhere"], "no model in 'nowhere'"),
        (["--steps", "7"], "steps 7 must be"),
        (["--device", "tpu"], "device 'tpu'"),
        (["--height", "30"], "30"),
        (["--port", "1", "--host", "203.0.113.9"], "203.0.113.9"),
        (["--port", "70000"], "--port 70000"),
        (["--prompt", "a red ball"], "leave --prompt"),
        (["--image", "ball.png"], "leave --image out"),
        (["--num_frames", "48", "--fit", "pad"], "leave --fit and --num_frames out"),
        (["--prompt_file", "lines.txt"], "--prompt_file"),
        (["--out", "out.mp4"], "downloaded from the page: leave --out out"),
        (["--output-path=film.mp4"], "downloaded from the page: leave --out out"),
        (["--colour", "red"], "--colour"),
    ],
)
def test_a_bad_flag_is_one_line_and_code_2(flags, message):
    assert_refused(live.main, flags, message)


def test_the_page_is_not_for_torchrun(monkeypatch):
    """The second process was told that the port is in use."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(live, "serve", lambda *_: None)
    assert_refused(live.main, ["--port", "0"], "the page is served by one process: leave torchrun out")


@pytest.mark.parametrize("there", [[], ["chromedriver"], ["chromium", "chromedriver"]])
def test_ci_says_that_it_has_no_browser(tmp_path, there):
    """Whoever may not install one: only root was told before."""
    begin = (ROOT / ".ci" / "run").read_text().partition("python3 -m venv")[0]
    (tmp_path / "run").write_text(begin)
    (tmp_path / "id").write_text("#!/bin/sh\necho 1000\n")
    for name in there:
        (tmp_path / name).write_text("#!/bin/sh\n")
    for file in tmp_path.iterdir():
        file.chmod(0o755)
    for name in ("dirname", "mktemp", "rm"):
        (tmp_path / name).symlink_to(shutil.which(name))
    command, environment = [shutil.which("bash"), tmp_path / "run"], {"PATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert ("tests in a browser are skipped" in done.stdout) == (len(there) < 2) and not done.stderr


def test_the_flags_and_notes_of_the_command_line_reach_the_film(monkeypatch):
    takes = []

    def serve(film, door, host):
        door.close()
        takes.append(takes_of(film))
        film.say("a dog" + 70 * " ball")
        assert "never seen 'dog'" in film.note
        until(lambda: "tokens; only the first 64 are used" in film.note)
        film.close()

    monkeypatch.setattr(live, "serve", serve)
    run_main(live.main, "--port", "0", "--seed", "5", "--steps", "4")
    cfg = takes[0][0]["sampler"]
    assert (cfg.seed, cfg.num_steps, cfg.num_frames) == (5, 4, None)


def test_the_address_is_one_that_other_machines_can_open(film, monkeypatch, capsys):
    monkeypatch.setattr(live.web, "run_app", lambda *_, **__: None)
    with live.listen("0.0.0.0", 0) as door:
        live.serve(film, door, "0.0.0.0")
    assert capsys.readouterr().out.startswith(f"http://{socket.gethostname()}:")


def test_ctrl_c_ends_the_page_quietly(capfd):
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
    ended = threading.Event()

    def press() -> None:
        with contextlib.suppress(AssertionError):
            until(lambda: ended.is_set() or not socket.socket().connect_ex(("127.0.0.1", port)), 60, 0.1)
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60).close()
        if not ended.is_set():
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    code = live.main(["--port", str(port)])
    ended.set()
    assert code == 130
    out, err = capfd.readouterr()
    assert out == f"http://127.0.0.1:{port}/\n" and "Traceback" not in err and "rror" not in err


# ---------------------------------------------------------------------------------------------- browser


CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --disable-dev-shm-usage --window-size=940,960""".split()
browser_test = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium and chromedriver: apt-get install chromium-driver"
)


class Running:
    """`python live.py` with the small model, as a visitor starts it; small frames cost it a fourth."""

    def __init__(self, folder: Path):
        self.process = fork_python(
            *(ROOT / "live.py", "--port", "0", "--steps", "4", *QUICK),
            more={"TMPDIR": str(folder)},  # where the film is left when it is killed
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http://127.0.0.1:")

    def film(self) -> np.ndarray:
        with urllib.request.urlopen(self.url + "film.mp4", timeout=20) as response:
            return frames_of(response.read())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)


@contextlib.contextmanager
def serving_in_a_thread(film: live.Live, port: int):
    """Another server, without the price of another process."""
    from aiohttp import web

    loop, stop = asyncio.new_event_loop(), asyncio.Event()

    async def run() -> None:
        runner = web.AppRunner(live.Server(film).app, shutdown_timeout=1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    yield
    loop.call_soon_threadsafe(stop.set)
    thread.join(20)
    loop.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = Running(tmp_path_factory.mktemp("film"))
    yield running
    running.kill()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: pip install selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    with contextlib.suppress(Exception):
        driver.quit()


def look(condition, seconds: float = 90) -> None:
    """`until`, for what is seen through the browser: each look costs it some time."""
    until(condition, seconds, 0.1)


class Page:
    def __init__(self, driver, server):
        self.driver = driver
        driver.get(server.url)
        look(lambda: self.js("state !== null"))

    def js(self, expression: str):
        return self.driver.execute_script(f"return {expression}")

    def text(self, name: str) -> str:
        return self.driver.find_element("id", name).text

    def click(self, name: str) -> None:
        self.driver.find_element("id", name).click()

    def say(self, text: str) -> None:
        self.driver.find_element("id", "prompt").send_keys(text + "\n")
        look(lambda: self.js(f"state.prompt == '{text}'"))

    def count(self, state: str) -> int:
        return self.js(f"document.querySelectorAll('#strip .{state}').length")

    def plays(self, seconds: float = 0.4) -> None:
        """The video is shown, and its time goes on."""
        look(lambda: self.js("video.readyState >= 2 && video.videoWidth == 64"))
        start = self.js("video.currentTime")
        look(lambda: self.js("video.currentTime") > start + seconds)

    def no_errors(self) -> None:
        assert [e for e in self.driver.get_log("browser") if e["level"] == "SEVERE"] == []
        assert self.js("video.error") is None and self.text("problem") == ""


@pytest.fixture
def page(browser, server):
    page = Page(browser, server)
    if not page.js("state.running"):
        page.say(RED)
    return page


@browser_test
def test_browser_a_typed_prompt_is_obeyed_in_the_chunk_it_should(page, server):
    from judge import judge

    page.plays()
    made = page.js("state.made")
    page.say(BLUE)
    look(lambda: page.text("latency") == "Your prompt is on its way.")
    look(lambda: "From your prompt to its first frame" in page.text("latency"))
    took, least = map(float, re.findall(r"(\d+\.\d) s", page.text("latency")))
    assert took >= least >= 3.0  # three chunks were in flight
    chunk = round(page.js(f"state.cards.find(c => c.text == '{BLUE}').start"))
    assert made + 3 <= chunk <= made + 5
    film = server.film().repeat(2, axis=1).repeat(2, axis=2)  # as large as the judge wants it
    colours = [colour for colour, _, _ in judge(film).chunks]
    assert colours[chunk - 1] == "red" and colours[chunk] == "blue", (chunk, colours)
    assert page.count("flying") >= 3 and page.count("shown") == 1
    page.no_errors()


@browser_test
def test_browser_pause_and_go_on(page, server):
    page.plays()
    page.click("pause")
    look(lambda: "paused" in page.text("status") and page.js("video.paused"))
    time.sleep(0.5)
    before = page.js("JSON.stringify([state.made, state.cards.map(c => c.t), video.currentTime])")
    time.sleep(0.7)
    assert page.js("JSON.stringify([state.made, state.cards.map(c => c.t), video.currentTime])") == before
    page.click("pause")
    page.plays()
    page.no_errors()


@browser_test
def test_browser_an_upload_is_gone_on_from(page, server, tmp_path):
    page.plays()
    picture = TINY / "examples" / "image.png"
    page.driver.find_element("id", "file").send_keys(str(picture))
    made = page.js("state.made")
    look(lambda: page.js("state.made") >= made + 2)  # one may still be of the old take
    pixels = np.asarray(Image.open(picture).convert("RGB").resize((64, 64))).astype(int)
    off = [np.abs(frame - pixels).mean() for frame in server.film()]
    assert min(off) < 8 < np.median(off)  # the film goes through it
    (tmp_path / "words.txt").write_text("just words, no picture at all")
    page.driver.find_element("id", "file").send_keys(str(tmp_path / "words.txt"))
    look(lambda: "neither a picture" in page.text("problem"))
    page.plays()


@browser_test
def test_browser_a_reload_goes_on_and_a_second_tab_watches(page, server):
    page.plays()
    page.driver.refresh()
    look(lambda: page.js("state !== null"))
    page.plays()
    assert page.js("state.speaks")
    first = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    page.driver.get(server.url)
    look(lambda: "you are watching" in page.text("status"))
    assert not page.js("state.speaks")
    assert page.js("document.querySelector('#say').matches(':disabled')")
    page.plays()
    page.driver.close()
    page.driver.switch_to.window(first)
    page.plays()
    page.no_errors()


@browser_test
def test_browser_old_buffer_is_dropped(page, server):
    """What has been played is taken out of the browser's memory, so an hour costs no more than a minute."""
    page.plays()
    assert page.js("kept") == 20  # seconds; here less, for a quick test
    page.js("kept = 2")
    start = page.js("video.buffered.start(0)")
    look(lambda: page.js("video.buffered.start(0)") > start + 1)
    assert page.js("video.currentTime - video.buffered.start(0)") < 4.5
    page.plays()
    page.no_errors()


@browser_test
def test_browser_a_player_that_fails_says_so_and_is_replaced(page):
    """By a fragment that is none, then by a browser without H.264."""
    page.plays()
    page.js("queue.unshift(new Uint8Array([0, 0, 0, 8, 77, 77, 77, 77]))")
    look(lambda: "this browser cannot play the film: " in page.text("problem"))
    page.plays()
    page.js("window.add = source.addSourceBuffer, problem = ''")
    page.js("MediaSource.prototype.addSourceBuffer = () => { throw Error('no H.264') }, socket.close()")
    look(lambda: page.text("problem") == "this browser cannot play the film: no H.264")
    page.js("MediaSource.prototype.addSourceBuffer = window.add")
    page.plays()


@browser_test
def test_browser_a_full_buffer_costs_no_film(page):
    """The fragment for which there is no room is given to the player later."""
    page.plays()
    page.js("window.append = buffer.appendBuffer, window.full = 0")
    page.js(
        "SourceBuffer.prototype.appendBuffer = function (data) { if (++window.full % 2)"
        " throw new DOMException('full', 'QuotaExceededError'); window.append.call(this, data) }"
    )
    made = page.js("state.made")
    look(lambda: page.js("video.currentTime") > made)
    assert page.js("window.full > 1 && video.buffered.length == 1 && kept < 20")
    page.no_errors()


@browser_test
def test_browser_a_prompt_that_is_refused_stays_in_its_box(page):
    page.js("prompt.value = 'x'.repeat(2001)")
    page.click("say")
    look(lambda: "at most 2,000 characters" in page.text("problem"))
    assert page.js("prompt.value.length") == 2001
    page.js("prompt.value = ''")
    page.say(BLUE)
    look(lambda: page.js("prompt.value") == "")
    page.no_errors()


@browser_test
def test_browser_a_tab_that_is_duplicated_goes_on_instead(page):
    page.plays()
    first = page.driver.current_window_handle
    page.js("window.open(location.href) && 0")
    look(lambda: "open in another tab: reload it" in page.text("status"))
    (second,) = set(page.driver.window_handles) - {first}
    page.driver.switch_to.window(second)
    look(lambda: page.js("state?.speaks"))
    page.plays()
    page.driver.close()
    page.driver.switch_to.window(first)
    page.driver.refresh()
    look(lambda: page.js("state?.speaks"))


@browser_test
def test_browser_who_is_turned_away_reads_why(browser, film, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
    monkeypatch.setattr(live, "MAX_VISITORS", 0)
    with serving_in_a_thread(film, port):
        look(lambda: not socket.socket().connect_ex(("127.0.0.1", port)))
        browser.get(f"http://127.0.0.1:{port}/")
        status = browser.find_element("id", "status")
        look(lambda: status.text == "too many are watching")
        monkeypatch.setattr(live, "MAX_VISITORS", 1)
        look(lambda: status.text == "say what to show")
        assert not browser.find_element("id", "download").is_displayed()  # nothing is made
        browser.get("about:blank")


@browser_test
@pytest.mark.slow
def test_browser_a_minute_of_film_plays_to_its_end(page):
    """Prints how long it took: on two cores that do nothing else, no longer than it plays."""
    page.plays()
    begin, start, buffering = page.js("video.currentTime"), time.monotonic(), 0
    while (played := page.js("video.currentTime") - begin) < 60:
        buffering += "buffering" in page.text("status")
        time.sleep(0.5)
        assert time.monotonic() - start < 600, f"only {played:.1f} s were played"
    took = time.monotonic() - start
    print(f"\n{played:.1f} s played in {took:.1f} s, buffering at {buffering} looks, {page.text('status')}")
    page.no_errors()


@browser_test
def test_browser_a_server_that_is_killed_and_started_again_is_found(page, server, random):
    """The next one has a slow model: the page says so, with its pace, and the film plays in pieces."""
    page.plays()
    server.kill()
    look(lambda: "no server" in page.text("status"))
    slow = copy.copy(random)
    slow.decode = lambda latent: time.sleep(1.2) or random.decode(latent)
    film = live.Live(slow)
    with serving_in_a_thread(film, int(server.url.split(":")[2].strip("/"))):
        look(lambda: page.text("status") == "say what to show")
        page.driver.get_log("browser")  # of the time without a server
        page.say(RED)
        page.plays()
        look(lambda: re.match(r"buffering · [1-9]\d*\.\d\d s of computing", page.text("status")))
        page.plays(0.7)
        page.no_errors()
        page.driver.get("about:blank")
    film.close()
