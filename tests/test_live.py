"""The page: its film, its server, and what a visitor sees of them in a real browser (Debian's chromium)."""

import asyncio
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import urllib.request
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import live
import magi
import sample

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tiny"
sys.path.append(str(TINY))
RED, BLUE = "a red ball bounces", "a blue square slides to the left"


@functools.cache
def small() -> magi.MAGI:
    pipe = magi.load(TINY / "distill", keep_t5=True)
    pipe.sampler = dataclasses.replace(pipe.sampler, num_frames=None, num_steps=4, height=32, width=32)
    return pipe


@pytest.fixture
def film():
    made = live.Live(small(), live.load_preview(TINY / "vae" / "preview.json"))
    yield made
    made.close()
    assert not made.thread.is_alive()


def until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "this did not come about"
        time.sleep(0.01)


def play(film: live.Live, seconds: float) -> None:
    """What a player does: it reports how far it is, so that more is made."""

    def on() -> bool:
        film.played(film.made)
        return film.made >= seconds or bool(film.error)

    until(on)


def still(film: live.Live, seconds: float = 0.3) -> bool:
    """Nothing is computed for so long."""
    before = film.version
    time.sleep(seconds)
    return film.version == before


def frames_of(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


# ---------------------------------------------------------------------------------------------- prompts


def test_each_prompt_is_given_once_and_the_last_goes_on():
    prompts = live.Prompts()
    for text in "abc":
        prompts.tell(text)
    assert [next(prompts) for _ in range(5)] == list("abccc")
    prompts.tell("d")
    assert [next(prompts) for _ in range(2)] == list("dd")


@pytest.mark.parametrize("endless, end", [(True, [None]), (False, [])])
def test_the_end_of_prompts_ends_an_endless_video_only(endless, end):
    prompts = live.Prompts(endless)
    prompts.tell("a")
    prompts.end()
    assert list(itertools.islice(prompts, 1)) == ["a"]
    assert list(itertools.islice(prompts, len(end))) == end
    if not endless:
        with pytest.raises(StopIteration):
            next(prompts)


def test_who_asks_before_the_first_prompt_waits_for_it():
    prompts = live.Prompts()
    threading.Timer(0.1, prompts.tell, ["a"]).start()
    start = time.monotonic()
    assert next(prompts) == "a" and time.monotonic() - start > 0.05


def test_lines_of_a_stream_are_prompts():
    said = []
    long = b"x" * 9000
    stream = io.BytesIO(b"\xef\xbb\xbfone\r\n\n  \n two \xc3\xa9\n\xff\xfe\nthree\n" + long + b"\nfour")
    prompts = live.told_by(stream, True, said.append)
    assert list(itertools.takewhile(lambda p: p is not None, prompts)) == ["one", "two é", "three", "four"]
    assert "not UTF-8" in said[0] and "at most 2,000 characters" in said[1] and len(said) == 2


@pytest.mark.parametrize("frames", [None, 72])
def test_lines_make_the_video_that_a_list_makes(frames):
    prompts = live.told_by(io.BytesIO(f"{RED}\n{BLUE}\n".encode()), frames is None, print)
    until(lambda: prompts.ended)
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
    return subprocess.Popen([sys.executable, ROOT / "sample.py", *flags], **pipes | more)


def assert_close(a: np.ndarray, b: np.ndarray) -> None:
    """As far as H.264 is exact."""
    assert a.shape == b.shape and np.abs(a.astype(int) - b).mean() < 3


def test_lines_that_come_while_it_runs_go_to_the_next_chunks():
    """The second is written when the first second of video is there, the end with it."""
    import world

    process = command("--prompt", "-", "--num_frames", "inf", "--out", "-")
    process.stdin.write(RED.encode() + b"\n")
    process.stdin.flush()
    data = os.read(process.stdout.fileno(), 65536)
    while data.count(b"moof") < 1:
        data += os.read(process.stdout.fileno(), 65536)
    rest, messages = process.communicate(BLUE.encode() + b"\n", timeout=120)
    assert process.returncode == 0 and b"frames -> -" in messages and b"Traceback" not in messages
    frames = frames_of(data + rest)
    colours = [colour for colour, _, _ in world.judge(frames).chunks]
    assert colours[:3] == ["red"] * 3 and colours[-1] == "blue" and 5 <= len(colours) <= 7


def test_an_mp4_on_standard_output_is_the_one_in_a_file(tmp_path):
    process = command("--prompt", RED, "--num_frames", "40", "--out", "-")
    data, messages = process.communicate(timeout=120)
    assert process.returncode == 0 and data[4:8] == b"ftyp" and b"40 frames" in messages
    assert command("--prompt", RED, "--num_frames", "40", "--out", tmp_path / "a.mp4").wait(120) == 0
    assert np.array_equal(frames_of(data), frames_of((tmp_path / "a.mp4").read_bytes()))


def test_a_player_that_is_closed_ends_an_endless_video_quietly():
    process = command("--prompt", RED, "--num_frames", "inf", "--out", "-")
    assert len(process.stdout.read(2000)) == 2000
    process.stdout.close()
    messages = process.stderr.read().decode()
    assert process.wait(120) == 0 and not re.search("rror|Traceback|roken", messages)


def test_a_file_of_prompts_makes_a_video_a_line(tmp_path):
    (tmp_path / "p.txt").write_text(f"\ufeff{RED}\n\n  {RED} | {BLUE}\r\n", encoding="utf-8")
    process = command(
        "--prompt_file", tmp_path / "p.txt", "--out", tmp_path / "made", "--num_frames", "48", "--seed", "7"
    )
    assert b"warning" not in process.communicate(timeout=120)[1] and process.returncode == 0
    assert sorted(os.listdir(tmp_path / "made")) == [
        "000-a-red-ball-bounces.mp4",
        "001-a-red-ball-bounces.mp4",
    ]
    pipe = magi.load(TINY / "distill")
    for name, prompts, seed in (("000", [RED], 7), ("001", [RED, BLUE], 8)):
        expected = np.concatenate(list(pipe(prompts, num_frames=48, seed=seed)))
        assert_close(frames_of((tmp_path / "made" / f"{name}-a-red-ball-bounces.mp4").read_bytes()), expected)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--prompt", "-", "--prompt", "x"], "--prompt - stands alone"),
        (["--prompt", "-", "--save_text", "t.safetensors"], "--save_text needs its prompts at once"),
        (["--prompt_file", "nix"], "prompt file 'nix' does not exist"),
        (["--prompt_file", os.devnull], "is empty: write a prompt a line"),
        (["--prompt_file", "p", "--prompt", "x"], "--prompt_file has the prompts"),
        (["--prompt_file", "LICENSE", "--num_frames", "inf"], "none is endless"),
        (["--prompt_file", "LICENSE", "--out", "README.md"], "'README.md' must be a folder"),
    ],
)
def test_what_does_not_go_together_is_one_line(flags, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert sample.main(flags) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize("frames", ["inf", "24"])
def test_no_prompt_at_all_is_one_line(frames):
    process = command("--prompt", "-", "--num_frames", frames, "--out", "-", stdin=subprocess.DEVNULL)
    out, messages = process.communicate(timeout=120)
    assert process.returncode == 1 and b"standard input ended before there was a prompt" in messages
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
    truth = frames[12:16].reshape(4, 8, 8, 8, 8, 3).mean((0, 2, 4))
    assert shown.shape == truth.shape == (8, 8, 3)
    assert np.sqrt(np.mean((shown - truth) ** 2)) < 0.6 * truth.reshape(-1, 3).std(0).mean()


def test_a_preview_is_fitted_by_a_command_and_read_again(tmp_path):
    file = tmp_path / "preview.json"
    assert live.load_preview(file) is None
    error = live.fit_preview(small(), [RED, BLUE], file)
    matrix = live.load_preview(file)
    assert matrix.shape == (17, 3) and 0 < error < 60
    file.write_text('{"latent_to_rgb": [1, 2]}')
    with pytest.raises(ValueError, match=r"cannot read preview .* its shape is \(2,\)"):
        live.load_preview(file)


# --------------------------------------------------------------------------------------------- the film


def test_a_film_is_made_as_it_is_played_and_no_faster(film):
    assert still(film) and film.made == 0  # nobody has said anything
    film.say(RED)
    until(lambda: film.made)
    until(lambda: still(film))
    lead = 0.6 + 1.5 * film.pace
    assert film.made - film.position >= lead or film.made > 3
    made = film.made
    film.played(made)
    until(lambda: film.made > made)


def test_the_strip_shows_every_chunk_from_noise_to_clean(film):
    film.say(RED)
    seen = {}

    def watch() -> bool:
        film.played(film.made)
        for card in film.state()["cards"]:
            seen.setdefault(card["n"], []).append(dict(card))
        return film.made >= 4

    until(watch)
    for n in range(3):
        times = [card["t"] for card in seen[n]]
        assert times == sorted(times) and times[-1] == 1.0 and len(set(times)) > 2
        assert seen[n][-1]["done"] and seen[n][-1]["start"] == n and seen[n][-1]["text"] == RED
        assert seen[n][-1]["picture"].startswith("data:image/png;base64,")
        assert any(card["picture"] and not card["done"] for card in seen[n])  # a guess while it is noise
    assert sum(not card["done"] for card in film.state()["cards"]) <= 4


def test_a_prompt_reaches_the_next_chunk_that_enters(film):
    first = film.say(RED)
    play(film, 2)
    until(lambda: still(film))
    number = film.say(BLUE, "cut")
    play(film, 7)
    cards = {card["n"]: card for card in film.state()["cards"]} | film.cards
    obeys = min(n for n, card in cards.items() if card["number"] == number)
    assert cards[obeys]["kind"] == "cut" and cards[obeys]["text"] == BLUE
    assert cards[obeys + 1]["kind"] is None and cards[obeys + 1]["number"] == number
    assert cards[obeys - 1]["number"] == first


def test_the_film_is_what_the_command_line_would_make(film):
    film.say(RED)
    play(film, 3)
    made = frames_of(b"".join(film.film()))
    expected = np.concatenate(list(itertools.islice(small()(RED), 3)))
    assert len(made) >= 72 and np.abs(made[:72].astype(int) - expected).mean() < 4  # H.264 is not exact


def test_pause_stops_computing(film):
    film.say(RED)
    play(film, 1)
    film.update(paused=True)
    time.sleep(0.5)  # the step that was being computed
    film.played(film.made)
    assert still(film)
    made = film.made
    film.update(paused=False)
    until(lambda: film.made > made)


def test_a_new_seed_goes_on_in_the_same_film_with_other_frames(film):
    film.say(RED)
    play(film, 2)
    film.begin(seed=99)
    play(film, film.made + 3)
    cards = film.state()["cards"]
    assert [card["n"] for card in cards] == list(range(cards[0]["n"], cards[0]["n"] + len(cards)))
    frames = frames_of(b"".join(film.film()))
    chunk = [frames[i : i + 24] for i in range(0, len(frames) - 23, 24)]
    expected = next(small()(RED, seed=99))
    assert any(np.abs(c.astype(int) - expected).mean() < 4 for c in chunk[1:])


@pytest.mark.parametrize("name, frames", [("image", None), ("video", 40), ("video", 8)])
def test_a_film_goes_on_from_a_picture_or_a_clip(film, name, frames):
    film.say(RED)
    play(film, 1)
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[:, ::2, 1] = 200
    given = {name: picture if frames is None else np.stack([np.roll(picture, i, 0) for i in range(frames)])}
    film.begin(**given)
    begins = max(film.cards) + 1 - sum(not card["done"] for card in film.cards.values())
    play(film, film.made + 2)
    card = film.cards[begins]
    expected = next(small()(RED, **given))
    first = round(24 * card["start"])
    made = frames_of(b"".join(film.film()))[first : first + len(expected)]
    assert np.abs(made.astype(int) - expected).mean() < 6  # H.264 is not exact
    assert film.cards[begins + 1]["start"] == pytest.approx(card["start"] + len(expected) / 24)


def test_a_crash_leaves_the_page_alive_and_the_film_whole(film, monkeypatch, capfd):
    film.say(RED)
    play(film, 2)

    def crash(latent):
        raise RuntimeError("CUDA error:\nthe device fell off")

    with monkeypatch.context() as patch:
        patch.setattr(small(), "decode", crash)
        film.played(film.made)
        until(lambda: film.error)
    assert film.error == "RuntimeError: CUDA error: the device fell off" and not film.running
    assert film.state()["error"] == film.error and capfd.readouterr().err.count("\n") == 1
    made = film.made
    assert len(frames_of(b"".join(film.film()))) == made * 24
    film.say(BLUE)  # and it goes on
    assert film.error == ""
    play(film, made + 1)
    assert film.made > made and len(frames_of(b"".join(film.film()))) == film.made * 24


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
    assert not film.running and not film.prompts.waiting
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
        for seconds in (20, 60):
            play(film, seconds)
            until(lambda: still(film, 0.1))
            sizes.append(tracemalloc.get_traced_memory()[0])
            assert len(film.cards) <= live.KEPT + 4 and len(film.recent) == live.KEPT
    finally:
        tracemalloc.stop()
    assert sizes[1] - sizes[0] < 200_000
    assert sum(map(len, film.film())) == film.size


def test_a_late_visitor_gets_a_video_that_starts_where_the_others_are(film):
    film.say(RED)
    play(film, 12)
    until(lambda: still(film))
    chunk, data = film.after(None)
    assert film.after(chunk) == (chunk, [])
    frames = frames_of(b"".join(data))
    assert 24 <= len(frames) <= live.KEPT * 24
    whole = frames_of(b"".join(film.film()))
    assert np.array_equal(frames, whole[-len(frames) :])


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
def test_uploads_are_read_as_the_command_line_reads_files(kind):
    given = live.read_upload(encoded(kind), small().sampler)
    ((name, pixels),) = given.items()
    assert name == ("image" if kind in ("png", "jpeg", "gif", "webp") else "video")
    assert pixels.shape[-3:] == (32, 32, 3) and pixels.ndim == (3 if name == "image" else 4)
    assert np.abs(pixels.reshape(-1, 3).mean(0) - (200, 30, 40)).max() < 12
    next(small()(RED, **given))


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


def test_one_speaks_and_another_watches(film):
    async def talk(client):
        async with client.ws_connect("/live?visitor=a") as first:
            assert (await heard(first, lambda m: True))["speaks"]
            second = await client.ws_connect("/live?visitor=b")
            state = await heard(second, lambda m: True)
            assert not state["speaks"] and state["visitors"] == 2
            for ask in ({"say": RED}, {"pause": True}, {"seed": True}):
                await second.send_json(ask)
                assert "you are watching" in (await heard(second, lambda m: "problem" in m))["problem"]
            await second.send_bytes(encoded("png"))
            assert "you are watching" in (await heard(second, lambda m: "problem" in m))["problem"]
            assert not film.running
            await first.send_json({"say": RED})
            assert (await heard(first, lambda m: "told" in m))["told"] == 1
            assert (await heard(second, lambda m: m.get("made")))["cards"][0]["text"] == RED
            again = await client.ws_connect("/live?visitor=a")  # a reload keeps the place
            assert (await heard(again, lambda m: True))["speaks"]
            await again.close()
        assert (await heard(second, lambda m: m.get("speaks")))["visitors"] == 1  # then the next one speaks
        await second.send_json({"pause": True})
        assert await heard(second, lambda m: m.get("paused"))
        await second.close()

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
                '{"say": 5}',
                '{"say": "x", "kind": [1]}',
                '{"say": "x", "kind": "../../etc"}',
                '{"say": "' + "x" * 3000 + '"}',
                '{"seed": 1}',
                '{"say": "\\ud800"}',
            ):
                await socket.send_str(text)
                problem = (await heard(socket, lambda m: "problem" in m))["problem"]
                assert problem and "\n" not in problem and len(problem) <= 300, text
            for text in ('{"at": NaN}', '{"at": Infinity}', '{"at": -1e300}'):
                await socket.send_str(text)
            await socket.send_bytes(b"no picture at all")
            assert "say what to show" in (await heard(socket, lambda m: "problem" in m))["problem"]
            await socket.send_json({"say": RED})
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
        for socket in sockets:
            await socket.close()

    serving(film, talk)


def test_the_fragments_a_visitor_gets_are_the_film(film):
    async def talk(client):
        got = b""
        async with client.ws_connect("/live?visitor=a") as socket:
            await socket.send_json({"say": RED})
            made = 0
            while made < 3:
                message = await socket.receive(timeout=20)
                if message.type.name == "BINARY":
                    got += message.data
                else:
                    made = max(made, json.loads(message.data).get("made", 0))
                    await socket.send_json({"at": made})
            async with client.get("/film.mp4") as response:
                whole = await response.read()
                assert "attachment" in response.headers["Content-Disposition"]
        assert len(got) > 1000 and whole.startswith(got)
        assert len(frames_of(whole)) % 24 == 0

    serving(film, talk)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model", "nowhere"], "no model in 'nowhere'"),
        (["--steps", "7"], "steps 7 must be"),
        (["--device", "tpu"], "device 'tpu'"),
        (["--height", "30"], "30"),
        (["--port", "1", "--host", "203.0.113.9"], "203.0.113.9"),
    ],
)
def test_a_bad_flag_is_one_line_and_code_2(flags, message, capsys):
    assert live.main(flags) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("error: ")


# ---------------------------------------------------------------------------------------------- browser


CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --disable-dev-shm-usage --window-size=940,960""".split()
browser_test = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium and chromedriver: apt-get install chromium-driver"
)


class Running:
    """`python live.py` with the small model, as a visitor starts it."""

    def __init__(self, port: int = 0, *flags: str):
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "live.py", "--port", str(port), *flags],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http://127.0.0.1:")

    def film(self) -> np.ndarray:
        with urllib.request.urlopen(self.url + "film.mp4", timeout=20) as response:
            return frames_of(response.read())

    def kill(self, how: int = signal.SIGKILL) -> None:
        self.process.send_signal(how)
        self.process.wait(20)


@pytest.fixture(scope="module")
def server():
    running = Running()
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


class Page:
    def __init__(self, driver, server):
        self.driver = driver
        driver.get(server.url)
        until(lambda: self.js("state !== null"))

    def js(self, expression: str):
        return self.driver.execute_script(f"return {expression}")

    def text(self, name: str) -> str:
        return self.driver.find_element("id", name).text

    def click(self, name: str) -> None:
        self.driver.find_element("id", name).click()

    def say(self, text: str) -> int:
        """Type it; returns the number of the chunk that obeys, once it has entered."""
        self.driver.find_element("id", "prompt").send_keys(text + "\n")
        until(lambda: self.js("told"))
        number = self.js("told")
        until(lambda: self.chunks(number))
        return self.chunks(number)[0]

    def chunks(self, number: int) -> list[int]:
        return self.js(f"state.cards.filter(c => c.number >= {number}).map(c => c.n)")

    def plays(self, seconds: float = 0.4) -> None:
        """The video is shown, and its time goes on."""
        until(lambda: self.js("video.readyState >= 2 && video.videoWidth == 64"))
        start = self.js("video.currentTime")
        until(lambda: self.js("video.currentTime") > start + seconds)

    def made(self, chunk: int) -> None:
        until(
            lambda: self.js(f"state.cards.some(c => c.n == {chunk} && c.done) || state.cards[0].n > {chunk}"),
            60,
        )

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
    import world

    page.say(RED)
    page.plays()
    chunk = page.say(BLUE)
    page.made(chunk)
    until(lambda: "From your prompt to its first frame" in page.text("latency"))
    took, least = map(float, re.findall(r"(\d+\.\d) s", page.text("latency")))
    assert took >= least >= 3.0  # three chunks were in flight
    colours = [colour for colour, _, _ in world.judge(server.film()).chunks]
    assert colours[chunk - 1] == "red" and colours[chunk] == "blue", (chunk, colours)
    assert page.js("document.querySelectorAll('#strip .flying').length") >= 3
    assert page.js("document.querySelectorAll('#strip .shown').length") == 1
    page.no_errors()


@browser_test
def test_browser_pause_and_go_on(page, server):
    page.plays()
    page.click("pause")
    until(lambda: "paused" in page.text("status") and page.js("video.paused"))
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
    until(lambda: page.js("state.made") >= made + 1)
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    off = [np.abs(frame - pixels).mean() for frame in server.film()]
    assert min(off) < 8 < np.median(off)  # the film goes through it
    (tmp_path / "words.txt").write_text("just words, no picture at all")
    page.driver.find_element("id", "file").send_keys(str(tmp_path / "words.txt"))
    until(lambda: "neither a picture" in page.text("problem"))
    page.plays()


@browser_test
def test_browser_a_reload_goes_on_and_a_second_tab_watches(page, server):
    page.plays()
    page.driver.refresh()
    until(lambda: page.js("state !== null"))
    page.plays()
    assert page.js("state.speaks")
    first = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    page.driver.get(server.url)
    until(lambda: page.js("state !== null"))
    assert not page.js("state.speaks") and "you are watching" in page.text("status")
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
    for _ in range(2):
        start = page.js("video.buffered.start(0)")
        until(lambda start=start: page.js("video.buffered.start(0)") > start + 1)
        assert page.js("video.currentTime - video.buffered.start(0)") < 4.5
    page.plays()
    page.no_errors()


@browser_test
def test_browser_a_slow_model_plays_in_pieces(browser):
    """It says so, with its pace, and the player is well."""
    slow = Running(0, "--steps", "96", "--window", "1")
    try:
        page = Page(browser, slow)
        page.say(RED)
        until(lambda: re.match(r"buffering · [1-9]\d*\.\d\d s of computing", page.text("status")), 90)
        before = page.js("video.currentTime")
        until(lambda: page.js("video.currentTime") > before + 0.5, 60)
        page.no_errors()
    finally:
        slow.kill()


@browser_test
def test_browser_a_server_that_is_killed_and_started_again_is_found(page, server):
    page.plays()
    port = int(server.url.split(":")[2].strip("/"))
    server.kill()
    until(lambda: "no server" in page.text("status"))
    server.__init__(port)
    until(lambda: page.js("state !== null && state.made == 0"))
    until(lambda: page.text("status") == "say what to show")
    page.say(RED)
    page.plays()
    server.kill(signal.SIGINT)
    assert server.process.returncode == 130
