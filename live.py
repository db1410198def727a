"""Speak to a video while it is made: one page on 127.0.0.1 (sample.py --prompt - takes lines instead).

    python live.py                                      the small model; open the address that it prints
    python live.py --model models/4.5B-distill --window 1

    visitor --WebSocket--> Live --prompts--> magi.MAGI --a second of frames--> Live --fragments--> visitors

One thread computes (Live.work); aiohttp serves and never waits for it. The first visitor speaks, others
watch. A second is begun when the player is about to need it, so that little lies between a prompt and its
first frame, and nothing is computed while nobody watches. The film lies in a temporary file. Nothing that a
browser sends becomes a path or is run: see `guarded` and `read_upload`.

Contents: 1 Previews, 2 The film, 3 Server, 4 Page, 5 Command line. tools/fit_preview.py fits the previews.
"""

# ruff: noqa: E402
from __future__ import annotations

import terminal

if __name__ == "__main__":
    terminal.begin()                                                         # before PyTorch is imported

import argparse
import asyncio
import base64
import contextlib
import copy
import dataclasses
import io
import itertools
import json
import re
import secrets
import socket
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
from aiohttp import web
from PIL import Image

import magi
import media
import parallel
import sample
from captions import MAX_TOLD, check_text
from checkpoints import KernelError, reading, require, short_warnings
from terminal import Parser, exit_code, say, whole_number

MAX_WAITING = 8                                        # prompts that no chunk has asked for yet
MAX_UPLOAD, MAX_CLIP, MAX_VISITORS = 32 * 2**20, 180, 20                     # bytes, seconds
RELOAD = 3                                             # seconds in which who reloads keeps the place
SHOWN = 4                                              # seconds of film on the strip, before those in flight

# ------------------------------------------------------------------------------------------------------------
# 1  Previews
# ------------------------------------------------------------------------------------------------------------
# One matrix makes a small picture of a chunk that still is noise, free of cost: see tools/fit_preview.py.


def load_preview(file: Path) -> np.ndarray | None:
    """The matrix beside a VAE, None if there is none: then the strip has no pictures of what is in flight."""
    if not file.exists():
        return None
    with reading("preview", file):
        matrix = np.array(json.loads(file.read_text())["latent_to_rgb"], np.float32)
        require(matrix.shape == (17, 3), f"its shape is {matrix.shape}, not (17, 3): fit it again")
        return matrix


def preview(latent: Any, matrix: np.ndarray) -> np.ndarray:
    """Latents (16, T, H, W) -> uint8 (H, W, 3): the frame in their middle."""
    x = latent[:, latent.shape[1] // 2].float().cpu().numpy()
    return (np.tensordot(x, matrix[:-1], axes=(0, 0)) + matrix[-1]).clip(0, 255).astype(np.uint8)


def data_uri(pixels: np.ndarray) -> str:
    image, file = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((96, 96))
    image.save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


# ------------------------------------------------------------------------------------------------------------
# 2  The film
# ------------------------------------------------------------------------------------------------------------


class NewTake(Exception):
    """What is being made is given up: another seed or beginning was asked for."""


@dataclasses.dataclass
class Card:
    """A second of film on the strip."""

    text: str
    kind: str | None = None              # "cut", "restyle" or None: only the prompt changes
    said: float = 0.0                    # when; 0 for a prompt that goes on, or has been seen
    state: str = "waiting"               # then "flying": a chunk has asked for the prompt, then "made"
    t: float = 0.0                       # from noise, 0, to clean, 1
    picture: str = ""                    # a data URI
    asked: float = 0.0                   # when its chunk asked for the prompt, without waits since then
    least: float = 0.0                   # seconds that the schedule needs from prompt to first frame
    start: float = 0.0                   # where it begins in the film, in seconds
    offset: int = 0                      # ... and in its file


class Live:
    """One film, made of takes: a new seed or an upload begins another take at the film's end.

    The thread of `work` computes. Cards come, go and change their state under `changed`, on which it waits.
    """

    def __init__(self, pipe: magi.MAGI, matrix: np.ndarray | None = None,
                 arithmetic: contextlib.AbstractContextManager = contextlib.nullcontext(),
                 cfg: magi.SamplerConfig | None = None, notes: Callable[[str], list[str]] = lambda text: []):
        """notes: what the speaker is told about a prompt."""
        self.pipe, self.matrix, self.arithmetic, self.notes = pipe, matrix, arithmetic, notes
        self.cfg = cfg or pipe.sampler
        self.folder = tempfile.TemporaryDirectory()
        self.file, self.size = Path(self.folder.name, "film.mp4"), 0
        self.file.touch()
        self.writer = media.Mp4Writer(self.file, self.cfg.fps)
        self.cards: list[Card] = []                              # made, in flight, waiting
        self.prompt = ""                                         # the newest
        self.made, self.position = 0.0, 0.0                      # seconds of film: in all, and played
        self.pace = 0.0                                          # seconds of computing per second of film
        self.running, self.paused, self.error, self.note, self.latency = False, False, "", "", ""
        self.given: dict = {}                                    # the image= or video= of the newest take
        self.takes: deque[dict | None] = deque(maxlen=1)         # what to begin next; None: nothing any more
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def update(self, **what: Any) -> None:
        with self.changed:
            vars(self).update(what)
            self.changed.notify_all()

    def find(self, state: str) -> list[Card]:
        return [card for card in self.cards if card.state == state]

    # -------------------------------------------------------------------------------- what visitors ask for

    def say(self, text: str, kind: str | None = None) -> None:
        """The next prompt; "" for the one that holds now."""
        text = check_text(text, MAX_TOLD) or self.prompt
        require(text, "say what to show, for example: a red ball bounces")
        require(len(self.find("waiting")) < MAX_WAITING, f"{MAX_WAITING} prompts are waiting already")
        if kind:
            magi.shot_transition(self.cfg, 1, kind)                          # ValueError where it cannot
        with self.changed:
            self.prompt, self.latency = text, "Your prompt is on its way."
            self.note = " ".join(self.notes(text))
            self.cards.append(Card(text, kind, time.monotonic()))
        if not self.running:
            self.begin()

    def begin(self, seed: int | None = None, **given: Any) -> None:
        """A new take, with another seed, or an image= or video= to go on from. What is left out stays."""
        self.cfg = self.cfg if seed is None else dataclasses.replace(self.cfg, seed=seed)
        self.given = given or self.given
        require(self.prompt, "say what to show, for example: a red ball bounces; then this is used")
        self.takes.append({"sampler": self.cfg} | self.given)
        self.update(running=True, paused=False, error="")

    def played(self, seconds: float) -> None:
        """How far a player is. It may show the first frame that obeys a prompt."""
        self.update(position=max(self.position, min(seconds, self.made)))
        for card in self.find("made"):
            if card.said and card.start <= self.position:
                took = time.monotonic() - card.said
                self.latency = (f"From your prompt to its first frame: {took:.1f} s. The schedule needs at "
                                f"least {card.least:.1f} s.")
                card.said = 0.0

    def close(self) -> None:
        self.takes.append(None)
        self.update()
        self.thread.join(10)

    # ------------------------------------------------------------------------------------------ the thread

    def work(self) -> None:
        while True:
            with self.changed:
                self.cards = self.find("made") + self.find("waiting")
                if not self.find("waiting"):
                    self.latency = ""                    # the prompts that were in flight will not be seen
                self.changed.wait_for(lambda: self.takes)
                start = self.takes.pop()
            if start is None:
                return
            try:
                with self.arithmetic, contextlib.suppress(NewTake):
                    for frames in self.pipe(self.prompts(), progress=self.step, **start):
                        self.add(frames)
                        # Late, since a prompt may come; but the next second may take half as long again.
                        self.wait(lambda: self.made - self.position < 0.6 + 1.5 * self.pace)
            except Exception as error:                   # the page lives on; what was given may be at fault
                say(f"error: {one_line(error)}")
                self.update(running=False, error=one_line(error), given={})

    def prompts(self) -> Iterator[magi.Prompt]:
        """For each chunk that asks: the next one that waits, or else the last one goes on."""
        for chunk in itertools.count():
            with self.changed:
                if not self.find("waiting"):
                    self.cards.append(Card(self.prompt))
                card = self.find("waiting")[0]
                card.least = len(self.find("flying")) * 24 / self.cfg.fps    # they are shown before it
                card.state, card.asked = "flying", time.monotonic()
                card.kind = card.kind if chunk else None                     # the first has no past to cut
            yield magi.Prompt(card.text, card.kind)

    def step(self, p: magi.Progress) -> None:
        """After every step: note the noise levels, guess at the pictures, wait while paused."""
        for card, c in zip(self.find("flying"), p.now.noisy, strict=True):
            card.t = min(1.0, c.t + c.dt)
            if self.matrix is not None:
                card.picture = data_uri(preview(p.guess(c.chunk)[0], self.matrix))
        self.wait()

    def add(self, frames: np.ndarray) -> None:
        """Frames become film, all of them or (on a full disk) none."""
        seconds, picture = len(frames) / self.cfg.fps, data_uri(frames[len(frames) // 2])
        writer = copy.deepcopy(self.writer)              # the old one is kept where the file does not grow
        writer.write(frames)
        with self.changed:
            card = self.find("flying")[0]
            card.state, card.picture, card.start = "made", picture, self.made
            card.offset = self.size or len(writer.fragments.init)
            life = time.monotonic() - card.asked                             # seconds of computing
            card.least = max(card.least, life)
            self.pace = life / self.cfg.window * self.cfg.fps / 24           # so many chunks share it
            self.writer, self.size = writer, writer.stat.st_size
            self.made += seconds
            if len(self.find("made")) > SHOWN:
                del self.cards[0]

    def wait(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Compute nothing while paused or not `ready`; NewTake if another take is wanted."""
        begun = time.monotonic()
        with self.changed:
            self.changed.wait_for(lambda: self.takes or not self.paused and ready())
            for card in self.find("flying"):
                card.asked += time.monotonic() - begun                       # only computing counts
            if self.takes:
                raise NewTake

    # ------------------------------------------------------------------------------- what visitors are told

    def state(self) -> dict:
        with self.changed:
            return dict(made=self.made, pace=self.pace, running=self.running, paused=self.paused,
                        prompt=self.prompt, latency=self.latency, error=self.error, note=self.note,
                        cards=[vars(card) for card in self.cards],
                        codec=self.writer.fragments.codec if self.size else "")

    def after(self, sent: int) -> tuple[int, bytes]:
        """The film's size, and its bytes after `sent`; for who comes (0) the header and the last seconds."""
        with self.changed, self.file.open("rb") as file:
            begin = file.seek(sent or self.cards[0].offset)
            return self.size, (b"" if sent else self.writer.fragments.init) + file.read(self.size - begin)


def one_line(error: Exception) -> str:
    """For people: errors of ours speak for themselves, others say what they are."""
    ours = isinstance(error, ValueError | FloatingPointError | KernelError)
    kind = "" if ours else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())[:300]


# ------------------------------------------------------------------------------------------------------------
# 3  Server
# ------------------------------------------------------------------------------------------------------------
# Of uploads only formats that hold their pictures themselves, known by their first bytes: a playlist or an
# SVG could name other files, and an EPS would be run.

PICTURES = rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8|RIFF....WEBP"
CLIPS = rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI "
LOCAL = ("127.0.0.1", "localhost", "::1")                                    # names of this machine to itself
POLICY = ("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
          "media-src blob:; connect-src 'self'; frame-ancestors 'none'")


def read_upload(data: bytes, cfg: magi.SamplerConfig) -> dict:
    """image= or video= of Live.begin, from the bytes of a file. ValueError if it is neither."""
    is_picture = re.match(PICTURES, data, re.DOTALL)
    is_clip = re.match(CLIPS, data, re.DOTALL)
    require(is_picture or is_clip, "this is neither a picture (PNG, JPEG, GIF, WebP) nor a clip (MP4, MOV, "
            "WebM, MKV, AVI)")
    with tempfile.TemporaryDirectory() as folder:
        file, size = Path(folder, "upload"), (cfg.height, cfg.width)
        file.write_bytes(data)
        try:
            if is_picture:
                return {"image": media.read_image(file, size)}
            with reading("video", file), av.open(str(file)) as clip:
                seconds = (clip.duration or 0) / av.time_base
            require(seconds <= MAX_CLIP, f"the clip lasts {seconds:.0f} s, {MAX_CLIP} at most: give its end")
            return {"video": media.read_video(file, cfg.fps, count=32, size=size)}
        except ValueError as error:
            raise ValueError(str(error).replace(repr(str(file)), "that you chose")) from None


class Server:
    """Three addresses: the page, its WebSocket, and the film so far."""

    def __init__(self, live: Live, token: str = ""):
        self.live, self.token = live, token
        self.visitors: dict[str, web.WebSocketResponse] = {}                 # by name, the speaker first
        self.reading = asyncio.Lock()                                        # one upload at a time
        self.app = web.Application(middlewares=[self.guarded])
        self.app.add_routes([web.get("/", self.page), web.get("/live", self.talk),
                             web.get("/film.mp4", self.film)])

    @web.middleware
    async def guarded(self, request: web.Request, handler: Callable) -> web.StreamResponse:
        """Without a token, only pages of this machine may ask: another site's name that was made to lead here
        (DNS rebinding) shows in Host, another site's page that talks to us in Origin."""
        allowed = False
        if self.token:
            allowed = secrets.compare_digest(request.query.get("token", "").encode(), self.token.encode())
        else:
            with contextlib.suppress(ValueError):                            # a Host that is no address
                allowed = request.url.host in LOCAL
        ours = (None, f"http://{request.host}", f"https://{request.host}")
        if not allowed or request.headers.get("Origin") not in ours:
            raise web.HTTPForbidden(text="open the address that live.py printed")
        return await handler(request)

    async def page(self, request: web.Request) -> web.Response:
        headers = {"Cache-Control": "no-store", "Content-Security-Policy": POLICY}
        return web.Response(text=PAGE, content_type="text/html", headers=headers)

    async def film(self, request: web.Request) -> web.FileResponse:
        headers = {"Cache-Control": "no-store", "Content-Disposition": "attachment"}
        return web.FileResponse(self.live.file, headers=headers)

    async def talk(self, request: web.Request) -> web.WebSocketResponse:
        """One visitor: do what is asked, and tell the news, twenty times a second at most."""
        name = request.query.get("visitor", "")[:40] or secrets.token_hex(8)
        if len(self.visitors.keys() - {name}) >= MAX_VISITORS:               # who reloads is no new one
            raise web.HTTPServiceUnavailable(text="too many are watching")
        visitor = web.WebSocketResponse(max_msg_size=MAX_UPLOAD + 1, heartbeat=20, compress=False)
        await visitor.prepare(request)
        self.visitors[name] = visitor
        sent, told = 0, ""
        try:
            async with asyncio.TaskGroup() as tasks:     # the film goes on while a file is read
                while not visitor.closed and self.visitors.get(name) is visitor:
                    state = json.dumps(self.live.state() | {"speaks": self.speaks(name)})
                    if state != told:
                        await visitor.send_str(state)
                        told = state
                    if sent < self.live.size:
                        sent, film = self.live.after(sent)
                        await visitor.send_bytes(film)
                    with contextlib.suppress(TimeoutError):
                        message = await visitor.receive(timeout=0.05)
                        if message.type in (web.WSMsgType.TEXT, web.WSMsgType.BINARY):
                            tasks.create_task(self.obey(name, visitor, message.data))
            # Unless it is closed already:
            await visitor.close(message=b"this page is open in another tab: reload it to go on here")
        except* ConnectionError:
            pass                                                             # the visitor has left
        finally:
            asyncio.get_running_loop().call_later(RELOAD, self.forget, name, visitor)
        return visitor

    def forget(self, name: str, visitor: web.WebSocketResponse) -> None:
        if self.visitors.get(name) is visitor:
            del self.visitors[name]

    def speaks(self, name: str) -> bool:
        return next(iter(self.visitors), None) == name

    async def obey(self, name: str, visitor: web.WebSocketResponse, data: str | bytes) -> None:
        """{"at": seconds} of any player; of the one who speaks {"say": text, "kind": ...}, {"pause": ...},
        {"seed": ...}, or the bytes of a picture or clip. What is wrong is answered by one line."""
        live = self.live
        try:
            match json.loads(data) if isinstance(data, str) else data:
                case {"at": seconds}:
                    live.played(float(seconds))
                case _ if not self.speaks(name):
                    raise ValueError("someone else speaks to this film: you are watching")
                case {"say": text, "kind": kind}:
                    live.say(text, kind or None)
                    await visitor.send_json({"said": text})
                case {"pause": _}:
                    live.update(paused=not live.paused)
                case {"seed": _}:
                    live.begin(seed=secrets.randbelow(2**31))
                case bytes():
                    require(not self.reading.locked(), "another file is being read: wait for it")
                    async with self.reading:
                        live.begin(**await asyncio.to_thread(read_upload, data, live.cfg))
                case _:
                    raise ValueError("this page does not fit the server: reload it")
        except Exception as error:
            await visitor.send_json({"problem": one_line(error)})


# ------------------------------------------------------------------------------------------------------------
# 4  Page
# ------------------------------------------------------------------------------------------------------------
# Texts are only ever set as textContent: nothing that a visitor says becomes part of the page's code.

PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>MAGI-1, live</title><link rel="icon" href="data:,">
<style>
  :root { color-scheme: light dark; accent-color: var(--accent);
    --accent: light-dark(#0f766e, #5ec4b6); --page: light-dark(#f5f4f0, #14181a) }
  * { box-sizing: border-box; font: inherit; margin: 0 }
  body { max-width: 60rem; margin: auto; padding: 1.5rem; background: var(--page);
    font: 15px/1.5 system-ui, sans-serif }
  header, main, ol { display: flex; gap: .5rem 1.5rem }
  header, main { flex-wrap: wrap; justify-content: space-between; margin-bottom: 1rem }
  main > * { flex: 1 1 20rem; min-width: 0 }
  h1 { font-weight: 650 }
  header span, h2, form p, small, a { color: light-dark(#66717a, #98a3a6) }
  video { max-height: 26rem; background: #000; border-radius: .6rem }
  fieldset { display: grid; grid-template-columns: 1fr 1fr 1fr; gap: .6rem; border: 0; padding: 0 }
  fieldset:disabled { opacity: .5 }
  textarea, button, label, li { padding: .4rem .6rem; background: light-dark(#fff, #1e2427); color: inherit;
    border: 1px solid light-dark(#dcdbd5, #363f43); border-radius: .5rem }
  textarea { grid-column: 1 / -1; min-height: 4.5rem; resize: vertical }
  button, label { text-align: center; cursor: pointer }
  button:hover, label:hover { border-color: var(--accent) }
  :focus-visible, label:focus-within, .shown { outline: 2px solid var(--accent) }
  #say { background: var(--accent); color: var(--page) }
  [type=file] { position: absolute; width: 0; opacity: 0 }
  form p { margin-top: .6rem }
  #problem { color: light-dark(#b3372f, #f08a80) }
  ol { gap: .6rem; overflow-x: auto; padding: .2rem }
  li { flex: 0 0 6rem; list-style: none; font-size: .8rem; line-height: 1.3; overflow-wrap: anywhere }
  li img, progress { display: block; width: 100% }
  li img { aspect-ratio: auto 1; border-radius: .3rem }
  progress { height: .4rem; margin: .3rem 0 }
  .flying { border-style: dashed }
  .waiting { opacity: .6 }
  .pixels { image-rendering: pixelated }
  [src="data:,"] { visibility: hidden }
</style>
<header><h1>MAGI-1, live</h1><span id="status" role="status"></span></header>
<main>
  <video id="video" muted playsinline></video>
  <form id="form">
    <fieldset id="controls">
      <textarea id="prompt" aria-label="the next prompt" autofocus></textarea>
      <button id="say" name="say" title="From the next chunk on">Say it</button>
      <button name="say" value="cut" title="A new scene, laid out without the past">Cut</button>
      <button name="say" value="restyle" title="The layout stays, details change">Restyle</button>
      <button name="pause" id="pause">Pause</button>
      <button name="seed" title="The same prompt from other noise">New seed</button>
      <label title="A picture or a clip">From a file
        <input type="file" id="file" accept="image/*,video/*"></label>
    </fieldset>
    <p id="latency"></p><p id="problem" role="alert"></p>
    <p><a id="download" download="film.mp4">Download what was made so far</a></p>
  </form>
</main>
<h2>Seconds of film: made, and on their way from noise</h2>
<ol id="strip" class="pixels"></ol>
<template id="card"><li><img alt=""><progress value="0"></progress><p></p><small></small></li></template>
<script>
const $ = id => document.getElementById(id);
const [video, form, prompt, strip] = ["video", "form", "prompt", "strip"].map($);
const set = (node, key, value) => { if (node[key] !== value) node[key] = value; };
const send = what => socket.readyState == 1 && socket.send(JSON.stringify(what));
const query = new URLSearchParams(location.search);
query.set("visitor", sessionStorage.visitor ||= Math.random().toString(36).slice(2));
$("download").href = "film.mp4" + location.search;
let socket, source, buffer, queue, state, problem = "", away = "";
let kept = 20;                              // seconds of film behind the player

function connect() {                        // with a new player: the server may be a new one, too
  source = new MediaSource();
  buffer = state = null;
  queue = [];
  URL.revokeObjectURL(video.src);
  video.src = URL.createObjectURL(source);
  socket = new WebSocket(location.origin.replace("http", "ws") + "/live?" + query);
  socket.binaryType = "arraybuffer";
  socket.onmessage = ({data}) => {
    if (typeof data != "string") return queue.push(data);                    // a fragment
    const news = JSON.parse(data);
    if (news.problem) problem = news.problem;
    if (news.said === prompt.value) prompt.value = "";
    if (news.cards) state = news;
  };
  socket.onclose = async ({reason, wasClean}) => {
    state = null;
    away = reason;
    if (reason) return;
    setTimeout(connect, 1000);
    if (wasClean) return;
    const answer = await fetch("live?" + query).catch(() => null);           // does a server say no?
    away = [403, 503].includes(answer?.status) ? await answer.text() : "";
  };
}

function play() {                           // feed the player, and drop what it has played
  const now = video.currentTime, there = video.buffered;
  const [start, end] = there.length ? [there.start(0), there.end(there.length - 1)] : [0, 0];
  send({at: now});
  if (video.error) throw video.error;
  if (now < start || end - now > 10) video.currentTime = Math.max(start, end - 1);   // who came late, or lags
  if (state.paused) video.pause();
  else if (video.paused) video.play().catch(() => {});
  if (!buffer && state.codec && source.readyState == "open")
    buffer = source.addSourceBuffer(`video/mp4; codecs="${state.codec}"`);
  if (!buffer || buffer.updating) return;
  if (now - start > kept) buffer.remove(0, now - kept / 2);
  else if (queue.length) {
    buffer.appendBuffer(queue[0]);
    queue.shift();
  }
}

function tick() {
  try {
    if (state) play();
  } catch (error) {
    if (error.name == "QuotaExceededError") kept /= 2;                       // the fragment is tried again
    else problem = `this browser cannot play the film: ${error.message}`;
    if (video.error) socket.close();                                         // then with a new player
  }
  show();
}

function show() {
  const words = [!state ? away || "no server: trying again"
    : !state.running ? (state.prompt ? "stopped: say something" : "say what to show")
    : state.paused ? "paused: nothing is computed"
    : !state.made ? "the first second is being made"
    : video.readyState < 3 ? "buffering" : "playing"];
  if (state?.pace) words.push(state.pace.toFixed(2) + " s of computing per second of film");
  if (state && !state.speaks) words.push("someone else speaks, you are watching");
  set($("status"), "textContent", words.join(" · "));
  set($("problem"), "textContent", problem || state?.error || state?.note || "");
  set($("controls"), "disabled", !state?.speaks);
  set($("download"), "hidden", !state?.codec);
  if (!state) return;
  set($("pause"), "textContent", state.paused ? "Go on" : "Pause");
  set($("latency"), "textContent", state.latency);
  set(prompt, "placeholder", state.prompt || "a red ball bounces");
  set(video, "className", video.videoWidth < 200 ? "pixels" : "");
  const shown = state.cards.findLast(card => card.state == "made" && card.start <= video.currentTime);
  while (strip.children.length > state.cards.length) strip.lastChild.remove();
  state.cards.forEach((card, i) => {
    const li = strip.children[i] ?? strip.appendChild($("card").content.firstChild.cloneNode(true));
    const [img, bar, text, note] = li.children;
    const percent = Math.round(100 * card.t) + " %", second = Math.floor(card.start) + " s";
    const word = {waiting: "waiting", flying: percent, made: second}[card.state];
    set(li, "className", card == shown ? "shown" : card.state);
    set(img, "src", card.picture || "data:,");
    set(bar, "value", card.t);
    set(text, "textContent", card.text);
    set(note, "textContent", card.kind ? `${word} · ${card.kind}` : word);
  });
}

form.onsubmit = event => {                  // every button says its name: say, pause, seed
  event.preventDefault();
  problem = "";
  send({[event.submitter.name]: prompt.value, kind: event.submitter.value});
};
prompt.onkeydown = event => {
  if (event.key != "Enter" || event.shiftKey) return;
  event.preventDefault();
  form.requestSubmit($("say"));
};
$("file").onchange = () => {
  const [file] = $("file").files;
  problem = file.size > 2 ** 25 ? "the file is too large: 32 MB at most" : "";
  if (!problem) socket.send(file);
  $("file").value = "";
};
if (window.MediaSource) {
  connect();
  setInterval(tick, 100);
} else $("problem").textContent = "this browser has no MediaSource: try another, or download the film";
</script></html>
"""


# ------------------------------------------------------------------------------------------------------------
# 5  Command line
# ------------------------------------------------------------------------------------------------------------

ON_PAGE = ("mode", "prompt", "prompt_file", "text", "save_text", "image", "video", "out", "fit",
           "prefix_frames", "transition", "num_frames")                      # flags that are not for the page


def main(argv: list[str] | None = None) -> int:
    """The command line -> its exit code: 2 for what is wrong, 130 when Ctrl-C ends it."""
    parser = Parser(prog="live.py", allow_abbrev=False, description=(__doc__ or "").split("\n")[0],
                    epilog="sample.py's flags for size, sampling and model work, too.")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1; with another one other "
                        "machines see the page too, with the token that is printed")
    parser.add_argument("--port", type=whole_number, default=8765, help="default: 8765")
    page, others = parser.parse_known_args(argv)
    args = sample.parse_arguments(others)
    return exit_code(lambda: show(page.host, page.port, args))


def show(host: str, port: int, args: argparse.Namespace) -> int:
    """Check all, load the model and serve the page until Ctrl-C; or print what --plan asks for."""
    unwanted = " and ".join(f"--{name}" for name in ON_PAGE if getattr(args, name))
    require(not unwanted, f"prompts, pictures, clips and cuts are given on the page, whose film has no end "
            f"and is downloaded from the page: leave {unwanted} out")
    require(not parallel.has_company(),
            "the page is served by one process: leave torchrun out (--stream cpu is for a model too large)")
    args.prompt, args.num_frames, args.out = ["-"], "inf", Path("-")
    if args.plan:
        print(sample.memory_table(args))
        return 0
    sample.check_flags(args)
    run = sample.check(args)
    matrix = load_preview(args.vae / "preview.json")
    door = listen(host, port)
    for note in run.notes:
        say(note)
    film = Live(sample.load(args, run.device), matrix, sample.arithmetic(run.device, args.dtype), run.cfg,
                lambda text: sample.notes_on_prompts(args, [text]))

    def told(warning: str) -> None:
        """It goes to the terminal and to the page."""
        say(warning)
        film.update(note=warning)

    with short_warnings(told):
        serve(film, door, host)
    return 130


def listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen on --host {host} --port {port}: {error}") from None


def serve(live: Live, door: socket.socket, asked: str) -> None:
    """Until Ctrl-C."""
    token = "" if asked in LOCAL else secrets.token_urlsafe(16)
    host, port = door.getsockname()[:2]
    if host in ("0.0.0.0", "::"):                                            # which no browser could open
        host = socket.gethostname()
    elif ":" in host:
        host = f"[{host}]"
    print(f"http://{host}:{port}/" + (f"?token={token}" if token else ""), flush=True)
    web.run_app(Server(live, token).app, sock=door, print=None, access_log=None, shutdown_timeout=1)
    live.close()
    if report := getattr(live.pipe.dit.ops, "report", None):                 # which kernels were used
        print(report())


if __name__ == "__main__":
    sys.exit(main())
