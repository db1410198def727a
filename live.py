"""Speak to a video while it is made: one page on 127.0.0.1, or lines on standard input.

    python live.py                                      the small model; open the address that it prints
    python live.py --model models/4.5B-distill --device cuda --window 1
    python live.py --fit_preview "a red ball bounces" "a blue star swings"      once for every new VAE

    visitor --WebSocket--> Prompts --each chunk asks--> magi.MAGI --a second of frames--> Live --> visitors

One thread computes (Live.work); aiohttp serves and never waits for it. The first visitor speaks, others
watch. A second is begun when the player is about to need it, so that little lies between a prompt and its
first frame, and nothing is computed while nobody watches. The film lies in a temporary file; only its last
fragments are in memory. Nothing that a browser sends becomes a path or is run: see `read_upload`, `check`.

Contents: 1 Prompts, 2 Preview, 3 The film, 4 Uploads, 5 Server, 6 Page, 7 Command line.
"""

from __future__ import annotations

if __name__ == "__main__":
    from threads import share_the_machine

    share_the_machine()                                                      # before PyTorch is imported

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import hmac
import io
import itertools
import json
import re
import secrets
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import numpy as np

from checkpoints import read_json, reading, require

# Functions import torch, magi, media and aiohttp: sample.py only needs section 1.

MAX_PROMPT, MAX_WAITING = 2_000, 8                     # characters; prompts that no chunk has asked for yet
MAX_UPLOAD, MAX_VISITORS = 32 * 2**20, 20              # bytes
KEPT = 8                                               # seconds of film in memory, for who comes late

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
    """An iterator of prompts that another thread tells. Each is given once, to the next chunk that asks; then
    the last one goes on. Who asks before the first is told waits for it. At the end of the prompts an endless
    video ends, too (None); another goes on with the last one.
    """

    def __init__(self, endless: bool = False):
        self.endless, self.ended, self.last = endless, False, None
        self.waiting: deque[Any] = deque()
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
                require(self.last is not None, "standard input ended before there was a prompt")
                if self.endless:
                    return None
                raise StopIteration
            return self.last


def told_by(stream: BinaryIO, endless: bool, say: Callable[[str], None]) -> Prompts:
    """For `--prompt -`: a prompt a line, read by a thread of its own while the video is made. Empty lines are
    passed over, and with a warning by `say` those that are no prompts.

    The stream should be unbuffered: Python cannot end while a thread waits inside a buffered one.
    """
    prompts, limit = Prompts(endless), 4 * MAX_PROMPT + 2

    def read() -> None:
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
    """Fit the matrix to two seconds of the model's own video for each prompt; returns the error, of 255."""
    latents, colours = [], []

    def watch(p: Any) -> None:
        if p.now.done is not None:
            latents.append(p.latents[p.now.done][0].flatten(1).T.float().cpu().numpy())   # (6 H W, 16)

    for seed, prompt in enumerate(prompts):
        for frames in pipe(prompt, num_frames=48, seed=seed, progress=watch):
            n, h, w, _ = frames.shape                                        # (24, 8 H, 8 W, 3)
            colours.append(frames.reshape(n // 4, 4, h // 8, 8, w // 8, 8, 3).mean((1, 3, 5)).reshape(-1, 3))
    y = np.concatenate(colours)
    x = np.concatenate([np.concatenate(latents), np.ones((len(y), 1))], axis=1)
    matrix = np.linalg.lstsq(x, y, rcond=None)[0]                            # (17, 3)
    file.write_text(json.dumps({"latent_to_rgb": matrix.round(2).tolist()}) + "\n")
    return float(np.sqrt(np.mean((x @ matrix - y) ** 2)))


def load_preview(file: Path) -> np.ndarray | None:
    """The matrix beside a VAE, None if there is none: then the strip has no pictures of what is in flight."""
    if not file.exists():
        return None
    with reading("preview", file):
        matrix = np.array(read_json(file)["latent_to_rgb"], np.float32)
        require(matrix.ndim == 2 and matrix.shape[1] == 3, f"its shape is {matrix.shape}, not (17, 3)")
        return matrix


def preview(latent: Any, matrix: np.ndarray) -> np.ndarray:
    """Latents (16, T, H, W) -> uint8 (H, W, 3): the frame in their middle."""
    x = latent[:, latent.shape[1] // 2].float().cpu().numpy()
    return (np.tensordot(x, matrix[:-1], axes=(0, 0)) + matrix[-1]).clip(0, 255).astype(np.uint8)


def data_uri(pixels: np.ndarray) -> str:
    from PIL import Image

    image, file = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((96, 96))
    image.save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


# ------------------------------------------------------------------------------------------------------------
# 3  The film
# ------------------------------------------------------------------------------------------------------------


class NewTake(Exception):
    """What is being made is given up: another seed or beginning was asked for."""


class Live:
    """One film, made of takes: a new seed or an upload begins another take at the film's end.

    The thread of `work` computes; whoever else reads or writes here holds `changed`.
    """

    def __init__(self, pipe: Any, matrix: np.ndarray | None = None):
        import media

        self.pipe, self.matrix, self.cfg = pipe, matrix, pipe.sampler
        self.changed, self.version = threading.Condition(), 0
        self.file, self.size, self.made = tempfile.TemporaryFile(buffering=0), 0, 0.0    # bytes, seconds
        self.fragments = media.Fragments(self.cfg.fps)
        self.recent: deque[tuple[int, bytes]] = deque(maxlen=KEPT)           # chunk, fragment
        self.cards: dict[int, dict] = {}                                     # chunk -> what the strip shows
        self.prompts, self.number, self.prompt = Prompts(), 0, ""
        self.take, self.start, self.error = 0, None, ""
        self.running = self.paused = self.closed = False
        self.position, self.pace = 0.0, 0.0                                  # pace: computing per second
        self.busy, self.mark, self.counted = 0.0, 0.0, 0.0                   # see `busy_for`
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def update(self, **what: Any) -> None:
        with self.changed:
            self.__dict__.update(what)
            self.version += 1
            self.changed.notify_all()

    # -------------------------------------------------------------------------------- what visitors ask for

    def say(self, text: str, kind: str | None = None) -> int:
        """The next prompt, "" for the one that holds now; returns its number, which its chunks will have."""
        import magi

        text = check_prompt(text) or self.prompt
        require(text, "say what to show, for example: a red ball bounces")
        if kind:
            magi.shot_transition(self.cfg, 1, kind)                          # ValueError where it cannot
        require(len(self.prompts.waiting) < MAX_WAITING, f"{MAX_WAITING} prompts are waiting already")
        self.prompts.tell((magi.Prompt(text, kind), self.number + 1))
        self.update(prompt=text, error="", number=self.number + 1)
        if not self.running:
            self.begin()
        return self.number

    def begin(self, **start: Any) -> None:
        """A new take: seed=, and image= or video= to go on from."""
        self.update(take=self.take + 1, start=start, running=True, paused=False, error="")

    def played(self, seconds: float) -> None:
        """How far a player is."""
        with self.changed:
            self.position = max(self.position, min(seconds, self.made))
            self.changed.notify_all()

    def close(self) -> None:
        self.update(take=self.take + 1, start=None, closed=True)
        self.prompts.end()
        self.thread.join(10)

    # ------------------------------------------------------------------------------------------ the thread

    def work(self) -> None:
        while True:
            with self.changed:
                self.cards = {n: card for n, card in self.cards.items() if card["done"]}
                self.changed.wait_for(lambda: self.start is not None or self.closed)
                take, start, self.start = self.take, self.start, None
            if start is None:
                return
            try:
                self.shoot(take, max(self.cards, default=-1) + 1, start)
            except NewTake:
                pass
            except Exception as error:                                       # the page lives on
                ours = isinstance(error, ValueError | FloatingPointError)
                line = " ".join(f"{'' if ours else type(error).__name__ + ': '}{error}".split())[:300]
                self.update(running=False, error=line)
                print(f"error: {line}", file=sys.stderr)

    def shoot(self, take: int, first: int, start: dict) -> None:
        """Make chunk after chunk of the film, from `first` on, for ever."""
        self.mark, self.counted = time.perf_counter(), self.busy
        made = self.pipe(self.asked(first), num_frames=None, **start,
                         progress=lambda p: self.step(take, first, p))
        for chunk, frames in enumerate(made, first):
            self.add(chunk, frames, stages=self.cfg.window if chunk == first else 1)
            self.wait(take, lambda: not self.paused and self.made - self.position < 0.6 + 1.5 * self.pace)

    def asked(self, first: int) -> Iterator[Any]:
        """The prompts of a take; a card is laid onto the strip when its chunk asks."""
        before = None
        for chunk in itertools.count(first):
            prompt, number = told = next(self.prompts)
            kind = None if told is before or chunk == first else prompt.transition
            before = told
            self.cards[chunk] = dict(n=chunk, text=prompt.text, kind=kind, number=number, t=0.0, picture="",
                                     done=False, start=None, least=self.busy_for())
            yield prompt._replace(transition=kind)

    def step(self, take: int, first: int, p: Any) -> None:
        """After every step: note the noise levels, guess at the pictures, wait while paused."""
        for c in p.now.noisy:
            card = self.cards[first + p.chunk + c.chunk - p.now.noisy[0].chunk]
            card["t"] = min(1.0, c.t + c.dt)
            if self.matrix is not None:
                card["picture"] = data_uri(preview(p.guess(c.chunk)[0], self.matrix))
        self.update()
        self.wait(take, lambda: not self.paused)

    def wait(self, take: int, ready: Callable[[], bool]) -> None:
        """Wait without computing; NewTake if this one is not wanted any more."""
        with self.changed:
            self.busy = self.busy_for()
            self.changed.wait_for(lambda: take != self.take or ready())
            self.mark = time.perf_counter()
            if take != self.take:
                raise NewTake

    def busy_for(self) -> float:
        """How long this thread has computed in all, without waiting."""
        return self.busy + time.perf_counter() - self.mark

    def add(self, chunk: int, frames: np.ndarray, stages: int) -> None:
        seconds, fragment = len(frames) / self.cfg.fps, self.fragments.add(frames)
        with self.changed:
            self.file.seek(self.size)
            self.size += self.file.write(fragment if self.size else self.fragments.init + fragment)
            self.recent.append((chunk, fragment))
            # A prompt shows after the chunks in flight have been shown, and after all steps of its own chunk.
            busy, card = self.busy_for(), self.cards[chunk]
            least = max((self.cfg.window - 1) * 24 / self.cfg.fps, busy - card["least"])
            card |= dict(done=True, start=self.made, picture=data_uri(frames[len(frames) // 2]), least=least)
            self.cards.pop(chunk - KEPT, None)
            self.made += seconds
            pace = (busy - self.counted) / stages / seconds
            self.pace, self.counted = 0.7 * (self.pace or pace) + 0.3 * pace, busy
        self.update()

    # ------------------------------------------------------------------------------- what visitors are told

    def state(self) -> dict:
        with self.changed:
            newest = self.recent[-1][0] if self.recent else 0
            return dict(codec=self.fragments.codec if self.recent else "", made=self.made, pace=self.pace,
                        cards=[card for n, card in self.cards.items() if n > newest - 4],
                        waiting=[prompt.text for prompt, _ in self.prompts.waiting], prompt=self.prompt,
                        running=self.running, paused=self.paused, error=self.error,
                        flying=self.cfg.window - 1, width=self.cfg.width, height=self.cfg.height)

    def after(self, chunk: int | None) -> tuple[int | None, list[bytes]]:
        """The fragments after this chunk that are still kept; for who has none the header, and those from
        where the others are."""
        with self.changed:
            if not self.recent:
                return None, []
            data = []
            if chunk is None:
                seen = [n for n, _ in self.recent if self.cards[n]["start"] <= self.position]
                chunk, data = max(seen, default=self.recent[0][0]) - 1, [self.fragments.init]
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
# Only formats that hold their pictures themselves, known by their first bytes: a playlist or an SVG could
# name other files, and an EPS would be run.

PICTURES = rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8|RIFF....WEBP"
CLIPS = rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI "


def read_upload(data: bytes, cfg: Any) -> dict:
    """image= or video= of Live.begin, from the bytes of a file. ValueError if it is neither."""
    import media

    picture, clip = (re.match(kind, data, re.DOTALL) for kind in (PICTURES, CLIPS))
    require(picture or clip, "this is neither a picture (PNG, JPEG, GIF, WebP) nor a clip (MP4, MOV, WebM, "
            "MKV, AVI)")
    with tempfile.TemporaryDirectory() as folder:
        file, size = Path(folder, "upload"), (cfg.height, cfg.width)
        file.write_bytes(data)
        try:
            if picture:
                return {"image": media.read_image(file, size)}
            return {"video": media.read_video(file, cfg.fps, count=32, size=size)}
        except ValueError as error:
            raise ValueError(str(error).replace(repr(str(file)), "that you chose")) from None


# ------------------------------------------------------------------------------------------------------------
# 5  Server
# ------------------------------------------------------------------------------------------------------------


class Server:
    """Three addresses: the page, its WebSocket, and the film so far."""

    def __init__(self, live: Live, token: str = ""):
        from aiohttp import web

        @web.middleware
        async def guarded(request: web.Request, handler: Callable) -> web.StreamResponse:
            self.check(request)
            return await handler(request)

        self.live, self.token, self.web = live, token, web
        self.visitors: dict[str, Any] = {}                                   # by name, the speaker first
        self.app = web.Application(middlewares=[guarded])
        self.app.add_routes([web.get("/", self.page), web.get("/live", self.talk),
                             web.get("/film.mp4", self.film)])
        self.app.on_shutdown.append(self.leave)

    def check(self, request: Any) -> None:
        """Without a token, only pages of this machine may ask: another site's name that was made to lead here
        (DNS rebinding) shows in Host, another site's page that talks to us in Origin."""
        host, origin = request.headers.get("Host", ""), request.headers.get("Origin")
        if self.token:
            allowed = hmac.compare_digest(request.query.get("token", "").encode(), self.token.encode())
        else:
            allowed = urlsplit(f"//{host}").hostname in ("127.0.0.1", "localhost", "::1")
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
        """One visitor: tell what happens, and do what is asked."""
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
                    if answer := await self.obey(name, message):
                        await socket.send_json(answer)
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
        """State and fragments, when there is news, twenty times a second at most. Who reads slowly gets the
        newest state, and of the fragments those that are still kept."""
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

    async def obey(self, name: str, message: Any) -> dict | None:
        live, is_file = self.live, message.type == self.web.WSMsgType.BINARY
        asked = {} if is_file else json.loads(message.data)
        if "at" in asked:
            live.played(float(asked["at"]))
            return None
        require(next(iter(self.visitors)) == name, "someone else speaks to this film: you are watching")
        if "say" in asked:
            return {"told": live.say(asked["say"], asked.get("kind"))}
        if "pause" in asked:
            live.update(paused=bool(asked["pause"]))
            return None
        require(is_file or "seed" in asked, "this page does not fit the server: reload it")
        require(live.prompt, "say what to show, for example: a red ball bounces")
        new = await asyncio.to_thread(read_upload, message.data, live.cfg) if is_file else {}
        live.begin(**(new or {"seed": secrets.randbelow(2**31)}))
        return None


# ------------------------------------------------------------------------------------------------------------
# 6  Page
# ------------------------------------------------------------------------------------------------------------
# Texts are only ever set as textContent: nothing that a visitor says becomes part of the page's code.

PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>MAGI-1, live</title><link rel="icon" href="data:,">
<style>
  :root { color-scheme: light dark; --ink: light-dark(#1d2326, #e4e8e6); --soft: light-dark(#66717a, #98a3a6);
    --page: light-dark(#f5f4f0, #14181a); --card: light-dark(#fff, #1e2427);
    --line: light-dark(#dcdbd5, #363f43); --accent: light-dark(#0f766e, #5ec4b6);
    --bad: light-dark(#b3372f, #f08a80) }
  * { box-sizing: border-box; font: inherit; color: inherit }
  body { margin: 0 auto; max-width: 60rem; padding: 1.5rem; background: var(--page); color: var(--ink);
    font: 15px/1.5 system-ui, sans-serif }
  header, main, .row, ol { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center }
  header { justify-content: space-between; margin-bottom: 1rem }
  h1 { font-size: 1.1rem; font-weight: 650; margin: 0 }
  h2 { font-size: .85rem; margin: 1.5rem 0 .5rem } p { margin: 0 }
  #status, h2, small, #latency { color: var(--soft) } #problem { color: var(--bad); min-height: 1.5em }
  main { gap: 1.5rem; align-items: start }
  video { flex: 1 1 20rem; min-width: 0; max-height: 26rem; background: #000; border-radius: .6rem }
  .small { image-rendering: pixelated }
  form, fieldset { display: flex; flex: 1 1 20rem; flex-direction: column; gap: .75rem }
  fieldset { flex: none; border: 0; padding: 0; margin: 0 } fieldset:disabled { opacity: .5 }
  textarea, button, a, li { background: var(--card); border: 1px solid var(--line); border-radius: .5rem }
  textarea { padding: .6rem .75rem; resize: vertical; min-height: 4.5rem }
  button, a { padding: .35rem .8rem; text-decoration: none; cursor: pointer }
  button:hover, a:hover { border-color: var(--accent) } :focus-visible { outline: 2px solid var(--accent) }
  #say { background: var(--accent); border-color: var(--accent); color: var(--page); font-weight: 600 }
  ol { list-style: none; flex-wrap: nowrap; align-items: stretch; margin: 0; padding: .2rem; overflow-x: auto;
    min-height: 12rem }
  li { flex: 0 0 6rem; padding: .4rem } li p { font-size: .8rem; line-height: 1.3; overflow-wrap: anywhere }
  .flying { border-style: dashed } .shown { outline: 2px solid var(--accent) } .waits { opacity: .6 }
  li img { display: block; width: 100%; aspect-ratio: var(--shape); border-radius: .3rem;
    background: var(--line); image-rendering: pixelated }
  li img:not([src]) { visibility: hidden } small { font-size: .75rem }
  .bar { height: 4px; margin: .4rem 0 .2rem; border-radius: 2px; background: var(--line) }
  .bar i { display: block; height: 100%; border-radius: 2px; background: var(--accent) }
</style>
<header><h1>MAGI-1, live</h1><span id="status" role="status">connecting</span></header>
<main>
  <video id="video" muted playsinline></video>
  <form id="form">
    <fieldset id="controls">
      <textarea id="prompt" maxlength="2000" aria-label="the next prompt" autofocus></textarea>
      <div class="row"><button id="say" title="From the next chunk on">Say it</button>
        <button type="button" id="cut" title="A new scene, laid out without the past">Cut</button>
        <button type="button" id="restyle" title="The layout stays, details change">Restyle</button></div>
      <div class="row"><button type="button" id="pause">Pause</button>
        <button type="button" id="seed" title="The same prompt from other noise">New seed</button>
        <button type="button" id="pick" title="A picture or a clip">Go on from a file</button>
        <input type="file" id="file" accept="image/*,video/*" hidden></div>
    </fieldset>
    <div class="row"><a id="download" download="film.mp4">Download the film</a></div>
    <p id="latency"></p><p id="problem" role="alert"></p>
  </form>
</main>
<h2>Seconds of film: made, and on their way from noise</h2>
<ol id="strip"></ol>
<script>
const $ = id => document.getElementById(id), video = $("video"), LARGEST = 32 * 2 ** 20;
const query = new URLSearchParams(location.search);
query.set("visitor", sessionStorage.visitor ||= Math.random().toString(36).slice(2));
$("download").href = "film.mp4" + location.search;
let socket, source, buffer, queue, state = null, asked = null, told = null, kept = 20;
const send = what => socket.readyState == 1 && socket.send(JSON.stringify(what));
const problem = line => $("problem").textContent = line;

function connect() {                        // with a new player: the server may be a new one, too
  queue = []; buffer = null; state = null; source = new MediaSource();
  source.onsourceopen = pump;
  video.src = URL.createObjectURL(source);
  socket = new WebSocket(location.origin.replace("http", "ws") + "/live?" + query);
  socket.binaryType = "arraybuffer";
  socket.onmessage = ({data}) => {
    if (typeof data == "string") return hear(JSON.parse(data));
    queue.push(data); pump();
  };
  socket.onclose = () => {
    state = null; $("controls").disabled = true; $("status").textContent = "no server: trying again";
    setTimeout(connect, 1000);
  };
}

function hear(message) {
  if ("problem" in message) { asked = null; return problem(message.problem); }
  if ("told" in message) return told = message.told;
  state = message;
  $("controls").disabled = !state.speaks;
  $("pause").textContent = state.paused ? "Go on" : "Pause";
  $("prompt").placeholder = state.prompt || "a red ball bounces";
  $("strip").style.setProperty("--shape", state.width / state.height);
  video.classList.toggle("small", state.width < 200);
  if (state.error) problem(state.error);
  draw(); pump();
}

function pump() {                           // feed the player, and drop what it has played
  if (!buffer && state?.codec && source.readyState == "open") {
    buffer = source.addSourceBuffer(`video/mp4; codecs="${state.codec}"`);
    buffer.onupdateend = pump;
  }
  if (!buffer || buffer.updating) return;
  const there = video.buffered, now = video.currentTime;
  if (there.length && now - there.start(0) > kept) buffer.remove(0, now - kept / 4);
  else if (queue.length) buffer.appendBuffer(queue.shift());
}

function follow() {                         // ten times a second
  if (!state) return;
  const there = video.buffered, n = there.length, now = video.currentTime;
  if (n) {                                  // jump over a gap, and what is far behind
    let i = 0;
    while (i < n - 1 && now >= there.end(i) - .05) i++;
    if (now < there.start(i)) video.currentTime = there.start(i);
    else if (there.end(n - 1) - now > 10) video.currentTime = there.end(n - 1) - 1;
  }
  if (state.paused) video.pause(); else if (video.paused && n) video.play().catch(() => {});
  send({at: video.currentTime});
  if (asked) {
    const obeys = told && state.cards.find(c => c.number >= told && c.done && video.currentTime >= c.start);
    const seconds = (performance.now() - asked) / 1000;
    $("latency").textContent = !obeys ? "Your prompt is on its way" : "From your prompt to its first frame: "
      + `${seconds.toFixed(1)} s. The schedule needs ${obeys.least.toFixed(1)} s at least: `
      + (obeys.least > state.flying + .05 ? "all steps of a chunk." : `${state.flying} chunks come first.`);
    if (obeys) asked = told = null;
  }
  const pace = state.pace ? ` · ${state.pace.toFixed(2)} s of computing per second of film` : "";
  $("status").textContent = (!state.running ? state.prompt ? "stopped: say something" : "say what to show"
    : state.paused ? "paused: nothing is computed" : !state.made ? "the first second is being made"
    : (video.readyState < 3 ? "buffering" : "playing") + pace)
    + (state.speaks ? "" : " · someone else speaks, you are watching");
}

function draw() {
  const strip = $("strip"), cards = [...state.cards, ...state.waiting.map(text => ({text, waits: true}))];
  let end = state.made;
  while (strip.children.length > cards.length) strip.lastChild.remove();
  cards.forEach((card, i) => {
    const li = strip.children[i] ?? strip.appendChild(document.createElement("li"));
    if (!li.firstChild) li.innerHTML = "<img alt=''><div class=bar><i></i></div><p></p><small></small>";
    const [img, bar, text, note] = li.children, at = Math.floor(card.start ?? end++), now = video.currentTime;
    const shown = card.done && now >= card.start && now < (cards[i + 1]?.start ?? state.made);
    li.className = card.waits ? "waits" : !card.done ? "flying" : shown ? "shown" : "";
    if (card.picture) img.src = card.picture; else img.removeAttribute("src");
    bar.firstChild.style.width = 100 * (card.t ?? 0) + "%";
    text.textContent = card.text;
    note.textContent = card.waits ? "waits" : `${Math.floor(at / 60)}:${String(at % 60).padStart(2, 0)}`
      + (card.kind ? ` · ${card.kind}` : "") + (card.done ? "" : ` · ${Math.round(100 * card.t)} %`);
  });
}

function say(kind) {
  problem(""); asked = performance.now(); told = null;
  send({say: $("prompt").value, kind});
  $("prompt").value = "";
}
$("form").onsubmit = event => { event.preventDefault(); say(null); };
$("prompt").onkeydown = e => { if (e.key == "Enter" && !e.shiftKey) { e.preventDefault(); say(null); } };
$("cut").onclick = () => say("cut");
$("restyle").onclick = () => say("restyle");
$("seed").onclick = () => { problem(""); send({seed: true}); };
$("pause").onclick = () => send({pause: !state.paused});
$("pick").onclick = () => $("file").click();
$("file").onchange = () => {
  const file = $("file").files[0], fits = file?.size <= LARGEST;
  problem(fits ? "" : "the file is too large: 32 MB at most");
  if (fits) socket.send(file);
  $("file").value = "";
};
if (window.MediaSource) { connect(); setInterval(follow, 100); }
else problem("this browser has no MediaSource: try another, or download the film");
</script></html>
"""


# ------------------------------------------------------------------------------------------------------------
# 7  Command line
# ------------------------------------------------------------------------------------------------------------


async def serve(live: Live, host: str, port: int, token: str) -> None:
    from aiohttp import web

    runner = web.AppRunner(Server(live, token).app, access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        address, port = runner.addresses[0][:2]
        address = f"[{address}]" if ":" in address else address
        print(f"http://{address}:{port}/" + (f"?token={token}" if token else ""), flush=True)
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()
        live.close()


def main(argv: list[str] | None = None) -> int:
    import sample

    parser = argparse.ArgumentParser(prog="live.py", description=(__doc__ or "").split("\n")[0])
    flag = parser.add_argument
    flag("--model", type=sample.model_folder, default=sample.model_folder(sample.DEFAULT_MODEL),
         help="as for sample.py")
    flag("--vae", type=Path, help="default: vae beside the model")
    flag("--t5", type=Path, help="default: t5 beside the model; it stays loaded")
    flag("--device", default="cpu", help="default: cpu")
    flag("--backend", default="torch", choices=["torch", "triton", "auto"], help="default: torch")
    for name in ("num_steps", "window", "height", "width", "seed"):
        flag(f"--{name.removeprefix('num_')}", dest=name, type=int, help="as for sample.py")
    flag("--host", default="127.0.0.1", help="to be seen by other machines, with the token that is printed")
    flag("--port", type=int, default=8765, help="default: 8765")
    flag("--fit_preview", nargs="+", metavar="PROMPT", help="fit the previews to these videos, and leave")
    args = parser.parse_args(argv)
    token = "" if args.host in ("127.0.0.1", "localhost", "::1") else secrets.token_urlsafe(16)
    file = (args.vae or args.model.parent / "vae") / "preview.json"
    try:
        import aiohttp  # noqa: F401
        from transformers.utils import logging

        import magi
        from checkpoints import check_device, read_config

        logging.disable_progress_bar()
        check_device(args.device)
        cfg = read_config(args.model, "sampler", magi.SamplerConfig)
        given = {name: getattr(args, name) for name in ("num_steps", "window", "height", "width", "seed")}
        given = {name: value for name, value in given.items() if value is not None}
        cfg = dataclasses.replace(cfg, num_frames=None, **given)             # checked before a weight is read
        matrix = load_preview(file)
        pipe = magi.load(args.model, vae=args.vae, t5=args.t5, device=args.device, backend=args.backend,
                         keep_t5=True)
        pipe.sampler = cfg
        pipe.encode_text([""])                                               # T5 is read now, and kept
        if args.fit_preview:
            print(f"{file}: off by {fit_preview(pipe, args.fit_preview, file):.1f} of 255")
        else:
            asyncio.run(serve(Live(pipe, matrix), args.host, args.port, token))
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError) as error:
        missing = "the page needs aiohttp: pip install aiohttp (" if "aiohttp" in str(error) else ""
        print(f"error: {missing}{' '.join(str(error).split())}{')' if missing else ''}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
