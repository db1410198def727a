"""Speak to a video while it is made: one page on 127.0.0.1, or lines on standard input.

    python live.py                                     the small model; open the address that it prints
    python live.py --model models/4.5B-distill --device cuda --window 1
    python live.py --fit_preview "a red ball bounces" "a blue star swings at night"    (once for a new VAE)

    visitor --WebSocket--> Prompts --each chunk asks--> magi.MAGI --a second of frames--> Film --> visitors
            <--state, twenty times a second, and the same mp4 fragments that a file would get --

One thread computes (Live.work); aiohttp serves, and never waits for it. The first visitor speaks, others watch.
A second is begun when the player is about to need it, so little lies between a prompt and its first frame, and
nothing is computed while nobody watches. Memory is constant: the film lies in a temporary file, and only its
last fragments are kept. Nothing that a browser sends becomes a path or is run: see `check` and `read_upload`.

Contents: 1 Prompts, 2 Preview, 3 The film, 4 Uploads, 5 Server, 6 Page, 7 Command line.
Needs aiohttp: pip install -r requirements.txt, or pip install aiohttp.
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")                      # see sample.py

import argparse
import asyncio
import base64
import contextlib
import hmac
import io
import itertools
import json
import queue
import secrets
import sys
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from checkpoints import read_json, reading, require

# torch, magi and media take seconds to import, so functions import them: sample.py only needs section 1.

MAX_PROMPT = 2_000                 # characters
MAX_WAITING = 8                    # prompts that no chunk has asked for yet
MAX_UPLOAD = 32 * 2**20            # bytes
MAX_VISITORS = 20
KEPT = 8                           # chunks that are done: fragments for who comes late, cards on the strip

# ------------------------------------------------------------------------------------------------------------
# 1  Prompts
# ------------------------------------------------------------------------------------------------------------


def check_prompt(text: Any) -> str:
    """The caption without white space around it. ValueError for what is none."""
    require(isinstance(text, str) and len(text) <= MAX_PROMPT,
            f"a prompt is text of at most {MAX_PROMPT:,} characters")
    require(text.encode(errors="ignore").decode() == text, f"the prompt {ascii(text)} is not UTF-8")
    return text.strip()


class Prompts:
    """An iterator of prompts that another thread tells. Each is given once, to the next chunk that asks, then
    the last one goes on. Whoever asks before the first is told waits for it.

    endless: at the end of the prompts the video ends, too. Else the last one goes on.
    """

    def __init__(self, endless: bool = False):
        self.endless, self.ended, self.last = endless, False, None
        self.waiting: deque = deque()
        self.changed = threading.Condition()

    def tell(self, prompt: Any) -> None:
        with self.changed:
            self.waiting.append(prompt)
            self.changed.notify_all()

    def end(self) -> None:
        with self.changed:
            self.ended = True
            self.changed.notify_all()

    def __iter__(self) -> Prompts:
        return self

    def __next__(self) -> Any:
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.ended or self.last is not None)
            if self.waiting:
                self.last = self.waiting.popleft()
            elif self.ended:
                if not self.endless:
                    raise StopIteration
                return None                                                  # the item that ends a video
            return self.last


def told_by(stream: BinaryIO, endless: bool, say: Callable[[str], None]) -> Prompts:
    """For `--prompt -`: a prompt a line, read by a thread of its own while the video is made. Lines without
    text are passed over, and so are those that are no prompts, with a warning by `say`.

    The stream should be unbuffered: Python cannot end while a thread waits inside a buffered one.
    """
    prompts = Prompts(endless)

    def read() -> None:
        limit = 4 * MAX_PROMPT + 2
        while rest := (line := stream.readline(limit)):
            while rest and not rest.endswith(b"\n"):                         # of a line that is too long
                rest = stream.readline(limit)
            try:
                if text := check_prompt(line.decode(errors="surrogateescape").strip("\ufeff")):
                    prompts.tell(text)
            except ValueError as error:
                say(f"warning: {error}; this line is passed over")
        prompts.end()

    threading.Thread(target=read, daemon=True).start()
    return prompts


# ------------------------------------------------------------------------------------------------------------
# 2  Preview
# ------------------------------------------------------------------------------------------------------------
# One matrix turns the 16 channels of a latent and a one into the mean colour of the 4 x 8 x 8 pixels that it
# stands for: good enough to see what a chunk will be while it still is noise, and free of cost.


def fit_preview(pipe: Any, prompts: Sequence[str], file: Path) -> float:
    """Fit the matrix to videos that the model makes, one for each prompt; returns the error, in 0 to 255."""
    latents, colours = [], []

    def watch(p: Any) -> None:
        if p.now.done is not None:
            x = p.latents[p.now.done][0].float().cpu().numpy()               # (16, 6, H, W)
            latents.append(x.reshape(len(x), -1).T)

    for seed, prompt in enumerate(prompts):
        for frames in pipe(prompt, num_frames=48, seed=seed, progress=watch):
            n, h, w, _ = frames.shape                                        # (24, 8 H, 8 W, 3)
            colours.append(frames.reshape(n // 4, 4, h // 8, 8, w // 8, 8, 3).mean((1, 3, 5)).reshape(-1, 3))
    x, y = np.concatenate(latents), np.concatenate(colours)
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)                    # (latents, 17)
    matrix = np.linalg.lstsq(x, y, rcond=None)[0]                            # (17, 3)
    file.write_text(json.dumps({"latent_to_rgb": matrix.round(2).tolist()}) + "\n")
    return float(np.sqrt(np.mean((x @ matrix - y) ** 2)))


def load_preview(file: Path) -> np.ndarray | None:
    """The matrix beside a VAE, None if there is none: then there are no previews."""
    if not file.exists():
        return None
    with reading("preview", file):
        matrix = np.array(read_json(file)["latent_to_rgb"], np.float32)
        require(matrix.ndim == 2 and matrix.shape[1] == 3, f"it has shape {matrix.shape}, not (channels + 1, 3)")
        return matrix


def preview(latent: Any, matrix: np.ndarray) -> np.ndarray:
    """Latents (16, T, H, W) -> a small uint8 picture (H, W, 3) of the frame in their middle."""
    x = latent[:, latent.shape[1] // 2].float().cpu().numpy()                # (16, H, W)
    rgb = np.tensordot(x, matrix[:-1], axes=(0, 0)) + matrix[-1]
    return rgb.clip(0, 255).astype(np.uint8)


def data_uri(picture: np.ndarray, largest: int = 96) -> str:
    from PIL import Image

    image, file = Image.fromarray(picture), io.BytesIO()
    image.thumbnail((largest, largest))
    image.save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


# ------------------------------------------------------------------------------------------------------------
# 3  The film
# ------------------------------------------------------------------------------------------------------------


class Told(NamedTuple):
    """A prompt, and which one it was, so that a page finds the chunk that obeys."""

    prompt: Any                    # magi.Prompt
    number: int


class NewTake(Exception):
    """What is being made is given up: another seed or beginning was asked for."""


class Live:
    """One film, made of takes: a new seed or an upload begins another take at the film's end.

    The thread of `work` computes; whoever else reads or writes here holds `changed`.
    """

    def __init__(self, pipe: Any, matrix: np.ndarray | None = None):
        import media

        self.pipe, self.matrix, self.cfg = pipe, matrix, pipe.sampler
        self.id, self.changed, self.version = secrets.token_hex(4), threading.Condition(), 0
        self.file, self.size, self.made = tempfile.TemporaryFile(buffering=0), 0, 0.0    # bytes, seconds
        self.fragments, self.recent = media.Fragments(self.cfg.fps), deque(maxlen=KEPT)
        self.cards: dict[int, dict] = {}                                     # chunk of the film -> on the strip
        self.prompts, self.numbers, self.prompt = Prompts(), itertools.count(1), ""
        self.takes, self.take, self.running = queue.SimpleQueue(), 0, False
        self.paused, self.error, self.position = False, "", 0.0
        self.pace, self.busy, self.mark = None, 0.0, 0.0                     # seconds of computing per second
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def update(self, **what: Any) -> None:
        with self.changed:
            for name, value in what.items():
                setattr(self, name, value)
            self.version += 1
            self.changed.notify_all()

    # -------------------------------------------------------------------------------- what visitors ask for

    def say(self, text: str, kind: str | None = None) -> int:
        """The next prompt, which may be "" for the one that holds now; returns its number."""
        import magi

        text = check_prompt(text) or self.prompt
        require(text, "say what to show, for example: a red ball bounces")
        if kind:
            magi.shot_transition(self.cfg, 1, kind)                          # ValueError if this model has none
        require(len(self.prompts.waiting) < MAX_WAITING, f"{MAX_WAITING} prompts are waiting: wait for them")
        told = Told(magi.Prompt(text, kind), next(self.numbers))
        self.prompts.tell(told)
        self.update(prompt=text, error="")
        if not self.running:
            self.begin(seed=self.cfg.seed)
        return told.number

    def played(self, seconds: float) -> None:
        """How far a player is."""
        with self.changed:
            self.position = max(self.position, min(seconds, self.made))
            self.changed.notify_all()

    def begin(self, **start: Any) -> None:
        """A new take: seed=, and image= or video= to go on from."""
        with self.changed:
            self.take += 1
            self.takes.put((self.take, start))
            self.update(running=True, paused=False, error="")

    # ------------------------------------------------------------------------------------------ the thread

    def close(self) -> None:
        """Give up what is being made, and let the thread end."""
        with self.changed:
            self.take += 1
            self.takes.put((0, None))
            self.prompts.end()
            self.update(running=False)
        self.thread.join(10)

    def work(self) -> None:
        while True:
            take, start = self.takes.get()
            if start is None:
                return
            try:
                self.shoot(take, start)
            except NewTake:
                continue
            except Exception as error:                                       # the page lives on
                line = " ".join(f"{error}".split()) or type(error).__name__
                kind = "" if isinstance(error, ValueError | FloatingPointError) else f"{type(error).__name__}: "
                self.update(running=False, error=f"{kind}{line}"[:300])
                print(f"error: {kind}{line}", file=sys.stderr)

    def shoot(self, take: int, start: dict) -> None:
        first = max((n for n, card in self.cards.items() if card["done"]), default=-1) + 1
        with self.changed:
            self.cards = {n: card for n, card in self.cards.items() if n < first}
        self.mark = time.perf_counter()
        frames_of = self.pipe(self.asked(take, first), num_frames=None, progress=lambda p: self.step(take, first, p),
                              **start)
        for chunk, frames in enumerate(frames_of, first):
            self.add(chunk, frames, is_first=chunk == first)
            self.wait(take, lambda: not self.paused and self.made - self.position < 0.6 + 1.5 * self.pace)

    def asked(self, take: int, first: int) -> Iterator[Any]:
        """The prompts of a take; a card goes onto the strip when its chunk asks."""
        before = None
        for chunk in itertools.count(first):
            told = next(self.prompts)
            kind = None if told is before or chunk == first else told.prompt.transition
            before = told
            self.cards[chunk] = dict(n=chunk, text=told.prompt.text, kind=kind, number=told.number, t=0.0,
                                     picture="", done=False, start=None)
            yield told.prompt._replace(transition=kind)

    def step(self, take: int, first: int, p: Any) -> None:
        """After every step: note the noise levels, guess at the pictures, wait while paused."""
        prefix = p.now.noisy[0].chunk - p.chunk
        for c in p.now.noisy:
            card = self.cards[first + c.chunk - prefix]
            card["t"] = min(1.0, c.t + c.dt)
            if self.matrix is not None:
                card["picture"] = data_uri(preview(p.guess(c.chunk)[0], self.matrix))
        self.update()
        self.wait(take, lambda: not self.paused)

    def wait(self, take: int, ready: Callable[[], bool]) -> None:
        """Wait without computing; NewTake if this one is not wanted any more."""
        with self.changed:
            self.busy += time.perf_counter() - self.mark
            self.changed.wait_for(lambda: take != self.take or ready())
            self.mark = time.perf_counter()
            if take != self.take:
                raise NewTake

    def add(self, chunk: int, frames: np.ndarray, is_first: bool) -> None:
        start, n = self.made, len(frames)
        fragment = self.fragments.add(frames)
        with self.changed:
            self.file.seek(self.size)
            self.size += self.file.write(fragment if self.size else self.fragments.init + fragment)
            self.made += n / self.cfg.fps
            self.recent.append((chunk, fragment))
            self.cards[chunk] |= dict(done=True, t=1.0, start=start, picture=data_uri(frames[n // 2]))
            for old in [n for n in self.cards if n <= chunk - KEPT]:
                del self.cards[old]
            now = time.perf_counter()
            busy, self.busy, self.mark = self.busy + now - self.mark, 0.0, now
            pace = busy / (self.cfg.window if is_first else 1) / (n / self.cfg.fps)
            self.pace = pace if self.pace is None else 0.7 * self.pace + 0.3 * pace
        self.update()

    # --------------------------------------------------------------------------------- what visitors are told

    def state(self) -> dict:
        with self.changed:
            newest = max((n for n, card in self.cards.items() if card["done"]), default=0)
            second, window = 24 / self.cfg.fps, self.cfg.window
            codec = self.fragments.codec if self.fragments.init else ""
            return dict(film=self.id, codec=codec, made=self.made,
                        cards=[card for n, card in self.cards.items() if n > newest - 4], waiting=[t.prompt.text for t in self.prompts.waiting],
                        running=self.running, paused=self.paused, pace=self.pace, error=self.error,
                        prompt=self.prompt, flying=window - 1,
                        least=max((window - 1) * second, window * second * (self.pace or 0)))

    def after(self, chunk: int | None) -> tuple[int | None, list[bytes]]:
        """The fragments after this chunk that are still kept, the header first for who has none."""
        with self.changed:
            if not self.recent:
                return chunk, []
            data = []
            if chunk is None:                                                # begin where the others are
                seen = [n for n, _ in self.recent if self.cards[n]["start"] <= self.position]
                chunk = max(seen, default=self.recent[0][0]) - 1
                data = [self.fragments.init]
            return self.recent[-1][0], data + [fragment for n, fragment in self.recent if n > chunk]

    def film(self) -> Iterator[bytes]:
        """All that was made so far."""
        at, size = 0, self.size
        while at < size:
            with self.changed:
                self.file.seek(at)
                piece = self.file.read(min(2**20, size - at))
            at += len(piece)
            yield piece


# ------------------------------------------------------------------------------------------------------------
# 4  Uploads
# ------------------------------------------------------------------------------------------------------------
# Only formats that hold their pictures themselves: a playlist or an SVG could name other files, and an EPS
# would be run.

PICTURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"RIFF....WEBP")
CLIPS = (b"....ftyp", b"\x1aE\xdf\xa3", b"RIFF....AVI ")


def read_upload(data: bytes, cfg: Any) -> dict:
    """image= or video= of `begin`, from the bytes of a file. ValueError if it is neither."""
    import media

    def is_one_of(kinds: Sequence[bytes]) -> bool:
        return any(all(b in (a, ord(".")) for a, b in zip(data, kind, strict=False)) for kind in kinds)

    size = (cfg.height, cfg.width)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "upload")                                        # the name that it came with is not used
        file.write_bytes(data)
        try:
            if len(data) > 12 and is_one_of(PICTURES):
                return {"image": media.read_image(file, size)}
            if len(data) > 12 and is_one_of(CLIPS):
                return {"video": media.read_video(file, cfg.fps, count=32, size=size)}
        except ValueError as error:
            raise ValueError(str(error).replace(repr(str(file)), "that you chose")) from None
    raise ValueError("this is neither a picture (PNG, JPEG, GIF, WebP) nor a clip (MP4, MOV, WebM, MKV, AVI)")


# ------------------------------------------------------------------------------------------------------------
# 5  Server
# ------------------------------------------------------------------------------------------------------------


class Server:
    """Three addresses: the page, its WebSocket, and the film so far."""

    def __init__(self, live: Live, token: str = ""):
        from aiohttp import web

        self.live, self.token, self.web = live, token, web
        self.visitors: dict[str, Any] = {}                                   # id -> WebSocket; the first one speaks

        @web.middleware
        async def guarded(request: web.Request, handler: Callable) -> web.StreamResponse:
            self.check(request)
            return await handler(request)

        self.app = web.Application(middlewares=[guarded])
        self.app.add_routes([web.get("/", self.page), web.get("/live", self.talk), web.get("/film.mp4", self.film)])
        self.app.on_shutdown.append(self.leave)

    def check(self, request: Any) -> None:
        """Without a token, only pages of this machine may ask: another site's name that was made to lead here
        (DNS rebinding) shows in Host, another site's page that talks to us in Origin."""
        host, origin = request.headers.get("Host", ""), request.headers.get("Origin")
        given = request.query.get("token", "")
        allowed = hmac.compare_digest(given.encode(), self.token.encode()) if self.token else \
            urlsplit(f"//{host}").hostname in ("127.0.0.1", "localhost", "::1")
        if not allowed or origin not in (None, f"http://{host}", f"https://{host}"):
            raise self.web.HTTPForbidden(text="open the address that live.py printed")

    async def page(self, request: Any) -> Any:
        policy = ("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
                  "media-src blob:; connect-src 'self'; frame-ancestors 'none'")
        return self.web.Response(text=PAGE, content_type="text/html", headers={
            "Content-Security-Policy": policy, "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"})

    async def film(self, request: Any) -> Any:
        response = self.web.StreamResponse(headers={
            "Content-Type": "video/mp4", "Content-Disposition": 'attachment; filename="film.mp4"'})
        response.content_length = self.live.size
        await response.prepare(request)
        for piece in self.live.film():
            await response.write(piece)
        return response

    async def leave(self, app: Any) -> None:
        for socket in list(self.visitors.values()):
            await socket.close(code=1001)

    async def talk(self, request: Any) -> Any:
        """One visitor: tell state and fragments, twenty times a second at most, and do what is asked."""
        if len(self.visitors) >= MAX_VISITORS:
            raise self.web.HTTPServiceUnavailable(text="too many are watching")
        socket = self.web.WebSocketResponse(max_msg_size=MAX_UPLOAD, heartbeat=20, compress=False)
        await socket.prepare(request)
        name = request.query.get("visitor", "")[:40] or secrets.token_hex(8)
        self.visitors[name] = socket                                         # who reloads keeps the place
        feeding = asyncio.ensure_future(self.feed(name, socket))
        try:
            async for message in socket:
                try:
                    await self.obey(name, message, socket)
                except Exception as error:                                   # one line on the page
                    line = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
                    await socket.send_json({"problem": " ".join(line.split())[:300]})
        finally:
            feeding.cancel()
            asyncio.get_running_loop().call_later(3, self.forget, name, socket)
        return socket

    def forget(self, name: str, socket: Any) -> None:
        if self.visitors.get(name) is socket:
            del self.visitors[name]

    async def feed(self, name: str, socket: Any) -> None:
        chunk, seen = None, None
        with contextlib.suppress(ConnectionError):
            while not socket.closed:
                now = (self.live.version, next(iter(self.visitors)) == name, len(self.visitors))
                if now != seen:
                    chunk, fragments = self.live.after(chunk)
                    await socket.send_json(self.live.state() | {"speaks": now[1], "visitors": now[2]})
                    for fragment in fragments:
                        await socket.send_bytes(fragment)
                    seen = now
                await asyncio.sleep(0.05)

    async def obey(self, name: str, message: Any, socket: Any) -> None:
        live, is_file = self.live, message.type == self.web.WSMsgType.BINARY
        asked = {} if is_file else json.loads(message.data)
        if "at" in asked:
            return live.played(float(asked["at"]))
        require(next(iter(self.visitors)) == name, "someone else speaks to this film: you are watching")
        if is_file:
            require(live.prompt or live.running, "say first what should happen, then choose the file")
            start = await asyncio.to_thread(read_upload, message.data, live.cfg)
            live.begin(seed=live.cfg.seed, **start)
        elif "say" in asked:
            number = live.say(asked["say"], asked.get("kind"))
            await socket.send_json({"told": number})
        elif "pause" in asked:
            live.update(paused=bool(asked["pause"]))
        elif "seed" in asked:
            require(live.prompt, "say what to show, for example: a red ball bounces")
            live.begin(seed=secrets.randbelow(2**31))
        else:
            raise ValueError("this page does not fit the server: reload it")


# ------------------------------------------------------------------------------------------------------------
# 6  Page
# ------------------------------------------------------------------------------------------------------------
# Texts are only ever set as textContent, so nothing that a visitor says becomes part of the page's code.

PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>MAGI-1, live</title><link rel="icon" href="data:,">
<style>
  :root { color-scheme: light dark; --ink: light-dark(#1d2326, #e4e8e6); --soft: light-dark(#66717a, #98a3a6);
    --page: light-dark(#f5f4f0, #14181a); --card: light-dark(#ffffff, #1e2427); --line: light-dark(#dcdbd5, #323a3e);
    --accent: light-dark(#0f766e, #5ec4b6); --bad: light-dark(#b3372f, #f08a80) }
  * { box-sizing: border-box }
  body { margin: 0 auto; max-width: 60rem; padding: 1.5rem; background: var(--page); color: var(--ink);
    font: 15px/1.5 system-ui, sans-serif }
  header { display: flex; justify-content: space-between; align-items: baseline; gap: 1rem; margin-bottom: 1rem }
  h1 { font-size: 1.1rem; margin: 0 } h2 { font-size: .85rem; font-weight: 500; color: var(--soft); margin: 1.5rem 0 .5rem }
  header span, small, #latency { color: var(--soft) } small { font-size: .75rem }
  main { display: flex; flex-wrap: wrap; gap: 1.5rem }
  video { flex: 1 1 20rem; min-width: 0; max-height: 26rem; background: #000; border-radius: .6rem; object-fit: contain }
  video.small { image-rendering: pixelated }
  form { flex: 1 1 20rem; display: flex; flex-direction: column; gap: .75rem }
  textarea { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
    padding: .6rem .75rem; resize: vertical; min-height: 4.5rem }
  .row { display: flex; flex-wrap: wrap; gap: .5rem }
  button, .button { font: inherit; color: inherit; text-decoration: none; background: var(--card); cursor: pointer;
    border: 1px solid var(--line); border-radius: .5rem; padding: .35rem .8rem }
  button:hover, .button:hover { border-color: var(--accent) }
  button.main { background: var(--accent); border-color: var(--accent); color: var(--page); font-weight: 600 }
  :focus-visible { outline: 2px solid var(--accent); outline-offset: 2px }
  fieldset { border: 0; padding: 0; margin: 0; display: contents } fieldset:disabled * { opacity: .6; cursor: default }
  #problem { color: var(--bad); min-height: 1.5em } p { margin: 0 }
  ol { list-style: none; display: flex; gap: .6rem; margin: 0; padding: .2rem; overflow-x: auto; min-height: 11.5rem }
  li { flex: 0 0 6.2rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .4rem }
  li.flying { border-style: dashed } li.shown { outline: 2px solid var(--accent) } li.next { opacity: .6 }
  li img { display: block; width: 100%; aspect-ratio: var(--shape, 1); background: var(--line); border-radius: .3rem;
    image-rendering: pixelated }
  li img:not([src]) { visibility: hidden }
  .bar { height: 4px; margin: .4rem 0 .2rem; border-radius: 2px; background: var(--line); overflow: hidden }
  .bar i { display: block; height: 100%; background: var(--accent) }
  li p { font-size: .8rem; line-height: 1.3; display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3;
    overflow: hidden }
</style>
<header><h1>MAGI-1, live</h1><span id="status" role="status">connecting</span></header>
<main>
  <video id="video" muted playsinline></video>
  <form id="form"><fieldset id="controls">
    <textarea id="prompt" maxlength="2000" aria-label="the next prompt" placeholder="a red ball bounces" autofocus></textarea>
    <div class="row"><button class="main" id="say" title="From the next chunk on">Say it</button>
      <button type="button" id="cut" title="A new scene: the next chunk is laid out without its past">Cut</button>
      <button type="button" id="restyle" title="The layout stays, details change">Restyle</button></div>
    <div class="row"><button type="button" id="pause">Pause</button>
      <button type="button" id="seed" title="The same prompt, from other noise">New seed</button>
      <button type="button" id="pick" title="Go on from a picture or clip">Go on from a file</button>
      <input type="file" id="file" accept="image/*,video/*" hidden></div></fieldset>
    <div class="row"><a class="button" id="download" download="film.mp4">Download the film</a></div>
    <p id="latency"></p><p id="problem" role="alert"></p>
  </form>
</main>
<h2>Seconds of film: made, and on their way from noise</h2>
<ol id="strip"></ol>
<script>
const $ = id => document.getElementById(id), video = $("video"), LARGEST = 32 * 2 ** 20;
const query = new URLSearchParams(location.search);
query.set("visitor", sessionStorage.visitor ||= Math.random().toString(36).slice(2));
let socket, source, buffer, queue, state = null, pending = null, told = null, kept = 20;
$("download").href = "film.mp4" + location.search;

function connect() {                                   // a new player each time: the server may be a new one
  queue = []; buffer = null; state = null;
  source = new MediaSource();
  source.onsourceopen = pump;
  video.src = URL.createObjectURL(source);
  socket = new WebSocket(location.origin.replace("http", "ws") + "/live?" + query);
  socket.binaryType = "arraybuffer";
  socket.onmessage = ({data}) => typeof data == "string" ? hear(JSON.parse(data)) : (queue.push(data), pump());
  socket.onclose = ({code}) => {
    $("controls").disabled = true;
    $("status").textContent = "no server: trying again";
    if (code == 1009) problem("the file is too large: 32 MB at most");
    setTimeout(connect, 1000);
  };
}
const send = what => socket.readyState == 1 && socket.send(JSON.stringify(what));
const problem = line => $("problem").textContent = line;

function hear(message) {
  if ("problem" in message) { pending = null; return problem(message.problem); }
  if ("told" in message) return told = message.told;
  state = message;
  $("controls").disabled = !state.speaks;
  $("pause").textContent = state.paused ? "Go on" : "Pause";
  $("prompt").placeholder = state.prompt || "a red ball bounces";
  if (state.error) problem(state.error);
  draw(); pump();
}

function pump() {                                      // feed the player, and drop what it has played
  if (!buffer && state?.codec && source.readyState == "open") {
    buffer = source.addSourceBuffer(`video/mp4; codecs="${state.codec}"`);
    buffer.onupdateend = pump;
  }
  if (!buffer || buffer.updating) return;
  const played = video.buffered;
  if (played.length && video.currentTime - played.start(0) > kept) buffer.remove(0, video.currentTime - kept / 4);
  else if (queue.length) buffer.appendBuffer(queue.shift());
}

function follow() {                                    // ten times a second
  if (!state) return;
  const ranges = video.buffered, now = video.currentTime;
  if (ranges.length) {
    let i = 0;
    while (i < ranges.length - 1 && now >= ranges.end(i) - .05) i++;
    if (now < ranges.start(i)) video.currentTime = ranges.start(i);
    else if (ranges.end(ranges.length - 1) - now > 10) video.currentTime = ranges.end(ranges.length - 1) - 1;
  }
  if (state.paused) video.pause(); else if (video.paused && ranges.length) video.play().catch(() => {});
  video.classList.toggle("small", video.videoWidth > 0 && video.videoWidth < 200);
  send({at: video.currentTime});
  const card = pending && told && state.cards.find(c => c.number >= told && c.done && video.currentTime >= c.start);
  if (card) {
    const before = state.flying == 1 ? "the chunk" : `the ${state.flying} chunks`;
    $("latency").textContent = `From your prompt to its first frame: ${((performance.now() - pending) / 1000).toFixed(1)} s; `
      + `at least ${state.least.toFixed(1)} s, ` + (state.flying ? `as ${before} in flight must be shown first.` : "to make a chunk.");
    pending = told = null;
  } else if (pending) $("latency").textContent = "Your prompt is on its way";
  const pace = state.pace ? `${state.pace.toFixed(2)} s of computing per second of film` : "";
  const doing = !state.running ? (state.prompt ? "stopped: say something to go on" : "say what to show")
    : state.paused ? "paused: nothing is computed" : !state.made ? "the first second is being made"
    : video.readyState < 3 ? `buffering · ${pace}` : `playing · ${pace}`;
  $("status").textContent = doing + (state.speaks ? "" : " · someone else speaks, you are watching");
}

function draw() {
  const strip = $("strip"), coming = state.waiting.map(text => ({text, waits: true}));
  const cards = [...state.cards, ...coming];
  let start = state.made;
  while (strip.children.length > cards.length) strip.lastChild.remove();
  cards.forEach((card, i) => {
    const li = strip.children[i] ?? strip.appendChild(Object.assign(document.createElement("li"),
      {innerHTML: "<img alt=''><div class=bar><i></i></div><p></p><small></small>"}));
    const [img, bar, text, note] = li.children, at = card.start ?? start;
    if (!card.done) start += 1;
    const shown = card.done && video.currentTime >= card.start && video.currentTime < (cards[i + 1]?.start ?? state.made);
    li.className = card.waits ? "next" : card.done ? (shown ? "shown" : "") : "flying";
    if (card.picture) img.src = card.picture; else img.removeAttribute("src");
    bar.firstChild.style.width = 100 * (card.t ?? 0) + "%";
    text.textContent = text.title = card.text;
    note.textContent = card.waits ? "waits for a chunk" : `${Math.floor(at / 60)}:${String(Math.floor(at % 60)).padStart(2, 0)}`
      + (card.kind ? ` · ${card.kind}` : "") + (card.done ? "" : ` · ${Math.round(100 * card.t)} % clean`);
  });
}

function say(kind) {
  problem(""); pending = performance.now(); told = null;
  send({say: $("prompt").value, kind});
  $("prompt").value = "";
}
$("form").onsubmit = event => { event.preventDefault(); say(null); };
$("prompt").onkeydown = event => { if (event.key == "Enter" && !event.shiftKey) { event.preventDefault(); say(null); } };
$("cut").onclick = () => say("cut");
$("restyle").onclick = () => say("restyle");
$("seed").onclick = () => { problem(""); send({seed: true}); };
$("pause").onclick = () => send({pause: !state.paused});
$("pick").onclick = () => $("file").click();
$("file").onchange = () => {
  const file = $("file").files[0];
  problem(file?.size > LARGEST ? "the file is too large: 32 MB at most" : "");
  if (file && file.size <= LARGEST) socket.send(file);
  $("file").value = "";
};
if (window.MediaSource) { connect(); setInterval(follow, 100); }
else problem("this browser has no MediaSource: use another, or download the film");
</script></html>
"""


# ------------------------------------------------------------------------------------------------------------
# 7  Command line
# ------------------------------------------------------------------------------------------------------------


async def serve(live: Live, host: str, port: int, token: str = "") -> None:
    from aiohttp import web

    runner = web.AppRunner(Server(live, token).app, access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        address, port = runner.addresses[0][:2]
        address = f"[{address}]" if ":" in address else address
        print(f"http://{address}:{port}/{'?token=' + token if token else ''}", flush=True)
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()
        live.close()


def main(argv: list[str] | None = None) -> int:
    import sample

    parser = argparse.ArgumentParser(prog="live.py", description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--model", type=sample.model_folder, default=sample.DEFAULT_MODEL, help="as for sample.py")
    flag("--vae", type=Path, help="default: vae beside the model")
    flag("--t5", type=Path, help="default: t5 beside the model; it stays loaded")
    flag("--device", default="cpu", help="default: cpu")
    flag("--backend", default="torch", choices=["torch", "triton", "auto"], help="default: torch")
    for name in ("steps", "window", "height", "width", "seed"):
        flag(f"--{name}", type=int, help="as for sample.py")
    flag("--host", default="127.0.0.1", help="serve others than this machine, who need the printed token")
    flag("--port", type=int, default=8765, help="default: 8765")
    flag("--fit_preview", nargs="+", metavar="PROMPT", help="make videos, fit the previews, and leave")
    args = parser.parse_args(argv)
    try:
        import magi
        from checkpoints import check_device

        check_device(args.device)
        given = {"num_steps": args.steps, "window": args.window, "height": args.height, "width": args.width,
                 "seed": args.seed}
        pipe = magi.load(args.model, vae=args.vae, t5=args.t5, device=args.device, backend=args.backend,
                         keep_t5=True)
        changes = {name: value for name, value in given.items() if value is not None}
        pipe.sampler = magi.dataclasses.replace(pipe.sampler, num_frames=None, **changes)
        file = (args.vae or Path(args.model).parent / "vae") / "preview.json"
        if args.fit_preview:
            print(f"{file}: off by {fit_preview(pipe, args.fit_preview, file):.1f} of 255")
            return 0
        token = "" if args.host in ("127.0.0.1", "localhost", "::1") else secrets.token_urlsafe(16)
        asyncio.run(serve(Live(pipe, load_preview(file)), args.host, args.port, token))
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
