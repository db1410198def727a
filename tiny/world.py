"""The tiny world, 128 pixels wide: shapes in light and shadow, places with layouts, a camera, a wall.

    seed  --make_clip--> Clip: captions, one a chunk; things, layout, camera; frames (24 n, 128, 128, 3) uint8
    names --scene------> the same, for a kind, colour, shape and motion to order (one of each, or one a chunk)

judge.py reads colours, shapes, motions and places back from frames. One chunk is 24 frames, one second;
whatever changes does so on the first frame of a chunk. The grammar ([ ] optional, | choice, lower case):

    caption = ["now"] clause ["and" clause] [how] [place]     "now" only where something has just changed
    clause  = thing verb                                      verb from MOTIONS, place from PLACES
    thing   = ("a" | "an") COLOUR SHAPE
    verb    = phrase | "stops" | "turns and" phrase           the last two only where the motion has changed
    how     = ("in front of" | "behind" | "and hits") thing | "behind a wall" | "and the camera follows"
            | "and the camera pans" ("left" | "right")

    "a red ball bounces"    "now a blue square turns and slides to the right at night"    "a white ring stops"

What happens in a clip is its kind. Where a chunk begins a colour may change in all kinds, a shape in all but
pass and hit, a motion in alone and apart:

    alone   one thing
    apart   two things, in the left and the right half
    pass    one thing goes by "in front of" or "behind" another, which rests
    hit     one thing slides along the ground "and hits" another: equal masses, it stops, the other goes on
    wall    one thing slides "behind a wall" and comes out on the other side
    pan     one thing does something "and the camera pans left" or right, slowly, over a world without end
    follow  one thing slides "and the camera follows": it keeps its place in the frame, the world goes by

Physics: free fall with GRAVITY; "bounces" loses nothing, "falls" keeps RESTITUTION of the speed at each
impact; slides are free until FRICTION brings them to rest MARGIN before the frame's edge, or 1 px after a
wall; a swing is a sine and an orbit a circle, both of fixed period. A clip that begins with an orbit begins
at the top of its circle: from a random start both directions have the same average video, and a model that
learned the average first never told them apart. No caption tells speed, size, height or layout: a few frames
do.
The camera moves the ground by its whole way and what stands above the horizon by half of it. Positions are
pixels from the frame's top-left corner, x to the right, y down; inside `trajectory` x + iy.

Contents: 1 words, 2 motion, 3 layouts, 4 pixels, 5 clips, 6 tokenizer, 7 command line.
Left out on purpose: rotation, perspective, more than two things, changing light.
"""

from __future__ import annotations

import argparse
import time
import zlib
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, product

import numpy as np

SIZE, CHUNK, FPS = 128, 24, 24  # frame side in pixels, frames a chunk, frames a second
MARGIN = 4  # what rests at an edge of the frame keeps this distance, in pixels

# ---------------------------------------------------------------------------------------------------- 1 words

# fmt: off
COLOURS = {
    "red":    (225,  30,  35), "orange": (255, 130,  10), "yellow": (255, 230,  40), "green": ( 35, 185,  60),
    "blue":   ( 35,  90, 245), "purple": (145,  40, 205), "pink":   (255, 125, 200), "white": (250, 250, 250),
}
NEW_COLOURS = {"cyan": (30, 225, 235)}  # never drawn by make_clip: for a LoRA to learn, by `scene`
SHAPES = ("ball", "square", "triangle", "star", "ring")
NEW_SHAPES = ("bar", "cross")  # never drawn by make_clip either
MOTIONS = {
    "bounce":        ("bounces", "bounces on the floor", "keeps bouncing"),
    "left":          ("slides to the left", "slides left", "moves to the left"),
    "right":         ("slides to the right", "slides right", "moves to the right"),
    "up":            ("slides up", "moves up", "slides to the top"),
    "down":          ("slides down", "moves down", "slides to the bottom"),
    "swing":         ("swings from side to side", "swings", "swings back and forth"),
    "clockwise":     ("circles clockwise", "goes round clockwise", "moves in a circle clockwise"),
    "anticlockwise": ("circles anticlockwise", "goes round anticlockwise", "moves in a circle anticlockwise"),
    "still":         ("stands still", "rests", "does not move"),
    "fall":          ("falls", "falls to the ground", "drops to the ground"),
}
PLACES = {  # words, colours of the sky or wall (top and bottom) and the ground; all duller than any thing
    "day":    ("by day",         (120, 165, 190), (165, 195, 205), ( 95, 115,  85)),
    "night":  ("at night",       ( 12,  14,  34), ( 38,  42,  70), ( 60,  58,  66)),
    "room":   ("in a grey room", (112, 112, 114), ( 86,  86,  88), ( 62,  56,  52)),
    "desert": ("in the desert",  (186, 160, 128), (150, 122,  96), (112,  86,  62)),
}
KINDS = {  # their shares of the clips
    "alone": 0.34, "apart": 0.1, "pass": 0.12, "hit": 0.1, "wall": 0.14, "pan": 0.1, "follow": 0.1,
}
# fmt: on
ADDS = {"wall": "behind a wall", "follow": "and the camera follows", "pan": "and the camera pans"}
SLIDES = {"left": -1, "right": 1, "up": -1j, "down": 1j}
ORBITS = {"clockwise": 1, "anticlockwise": -1}
OPPOSITE = {"left": "right", "up": "down", "clockwise": "anticlockwise"}
OPPOSITE |= {b: a for a, b in OPPOSITE.items()}
Triple = tuple[str, str, str]  # (colour, shape, motion)
TRIPLES: tuple[Triple, ...] = tuple(product(COLOURS, SHAPES, MOTIONS))


def held_out(colour: str, shape: str, motion: str) -> bool:
    """True for one triple in eight, never shown in training. crc32, since `hash` differs from run to run."""
    return zlib.crc32(f"{colour} {shape} {motion}".encode()) % 8 == 0


def caption(triples, before=None, place: str | None = None, rng: np.random.Generator | None = None,
            kind: str = "alone", pan: str = "") -> str:  # fmt: skip
    """The caption of one chunk with the given (colour, shape, motion) of each thing.

    before: their triples in the previous chunk, if any. rng draws the wording; without it, the plainest.
    kind: of KINDS; pan: "left" or "right", of the kind "pan".
    """
    pick = rng.integers if rng else lambda n: 0
    things = [f"{'an' if colour == 'orange' else 'a'} {colour} {shape}" for colour, shape, _ in triples]
    clauses = []
    for thing, (_, _, motion), (_, _, last) in zip(things, triples, before or triples, strict=True):
        verb = MOTIONS[motion][pick(3)]
        if motion == "still" != last and pick(2):
            verb = "stops"
        elif OPPOSITE.get(motion) == last and pick(2):
            verb = f"turns and {verb}"
        clauses.append(f"{thing} {verb}")
    if kind == "pass":  # far thing first: the other goes by in front of it, or behind
        still, mover = (0, 1) if triples[0][2] == "still" else (1, 0)
        text = f"{clauses[mover]} {'in front of' if mover else 'behind'} {things[still]}"
    elif kind == "hit":
        text = f"{clauses[0]} and hits {things[1]}"
    else:
        text = " and ".join(clauses)
    if kind in ADDS:
        text += f" {ADDS[kind]}" + (f" {pan}" if kind == "pan" else "")
    now = "now " if before not in (None, triples) and pick(2) else ""
    return now + text + (f" {PLACES[place][0]}" if place else "")


def words() -> dict[str, list[str]]:
    """What the model is taught to understand, by kind: `sample.py` tells who asks for something else."""
    plain, *others = zip(*MOTIONS.values(), strict=True)
    places = [words for words, *_ in PLACES.values()]
    other = [*sum(others, ()), "a", "an", "and", "now", "stops", "turns", "in front of", "behind a wall"]
    other += ["hits", "the camera follows", "the camera pans left", "pans right"]
    return {"colours": [*COLOURS], "shapes": [*SHAPES], "motions": [*plain], "places": places, "other": other}


def vocabulary() -> list[str]:
    """Every word a caption can hold, sorted."""
    return sorted({word for phrases in words().values() for phrase in phrases for word in phrase.split()})


def sample_prompts(n: int, seed: int = 0, heldout: bool | None = True) -> list[tuple[str, Triple]]:
    """n evaluation prompts of one thing, each with the (colour, shape, motion) to expect; no triple twice
    while they last.

    heldout: True for triples that training never shows, False for those it does, None for any.
    """
    rng = np.random.default_rng([seed, 2])
    triples = [t for t in TRIPLES if heldout in (None, held_out(*t))]
    order = np.concatenate([rng.permutation(len(triples)) for _ in range(-(-n // len(triples)))])[:n]
    return [(caption([triples[i]], rng=rng), triples[i]) for i in order]


# --------------------------------------------------------------------------------------------------- 2 motion

GRAVITY, RESTITUTION, FRICTION = 0.2, 0.6, 0.05  # px / frame^2; share of speed kept; px / frame^2
SWING, ORBIT = 56, 72  # periods in frames


def slide(t: np.ndarray, speed: float, room: float) -> np.ndarray:
    """Distance after t frames of a slide that friction brings to rest after `room` pixels."""
    brake = min(speed**2 / (2 * FRICTION), room)  # the length of the braking
    friction = speed**2 / (2 * brake) if brake > 0 else 1.0
    free = np.minimum(t, (room - brake) / speed)
    late = np.clip(t - free, 0, speed / friction)
    return speed * free + speed * late - friction / 2 * late**2


def fall(t: np.ndarray, height: float) -> np.ndarray:
    """Height above the ground t frames after it was let go: each bounce keeps RESTITUTION of the speed."""
    out = np.zeros_like(t, float)
    start = (2 * height / GRAVITY) ** 0.5  # of the first bounce: the end of the first leg, from the top
    speed = GRAVITY * start
    first = t < start
    out[first] = height - GRAVITY / 2 * t[first] ** 2
    for _ in range(7):
        speed *= RESTITUTION
        length = 2 * speed / GRAVITY
        now = (t >= start) & (t < start + length)
        u = t[now] - start
        out[now] = speed * u - GRAVITY / 2 * u**2
        start += length
    return out


def trajectory(motions, size: float, floor: float, rng: np.random.Generator):
    """One drawn path through a list of motions, one a chunk.

    Returns the centres (24 len(motions),), complex, and whether they show what the motions say.
    """
    left, right = MARGIN + size / 2, SIZE - MARGIN - size / 2
    top, ground = MARGIN + size / 2, floor - size / 2
    inside = lambda z: np.clip(z.real, left, right) + 1j * np.clip(z.imag, top, ground)
    mid = complex(left + right, top + ground) / 2
    speed, height = rng.uniform(0.7, 1.7), rng.uniform(30, ground - top)
    reach, radius = rng.uniform(18, right - mid.real), rng.uniform(16, ground - mid.imag)
    start, later_half = complex(rng.uniform(left, right), rng.uniform(top, ground)), rng.random() < 0.5
    if motions[0] in ("left", "right", "still") and rng.random() < 0.6:
        start = complex(start.real, ground)  # most things stand on the ground
    if motions[0] in SLIDES:  # from the far side, to have somewhere to go
        start = inside(start - SIZE * SLIDES[motions[0]]) + rng.uniform(0, 12) * SLIDES[motions[0]]
    elif motions[0] in ORBITS:  # see the head
        start = mid - 1j * radius
    elif motions[0] == "fall":
        start = complex(start.real, rng.uniform(top, mid.imag))
    at = start  # where the thing is
    pieces, legible = [], True
    for motion, run in groupby(motions):
        t = np.arange(1.0, CHUNK * len(list(run)) + 1)  # from 1: the first frame of a run has moved already
        above = ground - at.imag
        if motion == "bounce":  # jump or fall from here, such that every bounce is as high
            launch = (2 * GRAVITY * max(height, above)) ** 0.5
            period = 2 * launch / GRAVITY
            phase = period / 2 - abs(launch**2 - 2 * GRAVITY * above) ** 0.5 / GRAVITY  # rising through here
            t = (t + (period - phase if later_half and not pieces else phase)) % period
            path = at.real + 1j * (ground - launch * t + GRAVITY / 2 * t**2)
        elif motion == "fall":
            legible &= above > 24
            path = at.real + 1j * (ground - fall(t, above))
        elif motion == "swing":  # about the middle; towards it first, unless it is the clip's first motion
            wide = max(reach, abs(at.real - mid.real))
            phase = np.arcsin((at.real - mid.real) / wide)
            phase = np.pi - phase if (at.real > mid.real if pieces else later_half) else phase
            path = mid.real + wide * np.sin(phase + 2 * np.pi * t / SWING) + 1j * at.imag
        elif motion in ORBITS:  # through here, round a point on the way to the middle
            arm = radius * (at - mid) / max(abs(at - mid), 1e-6)
            path = at - arm + arm * np.exp(2j * np.pi * ORBITS[motion] * t / ORBIT)
        elif motion in SLIDES:
            way = SLIDES[motion]
            room = abs(inside(at + 2 * SIZE * way) - at)
            path = at + way * slide(t, speed, room)
            travel = np.abs(np.diff(path, prepend=at)).reshape(-1, CHUNK).sum(1)
            legible &= travel[0] > 12 and not any((travel > 0.8) & (travel < 8))  # moves or rests, clearly
        else:
            path = at + 0 * t
        piece = inside(path)
        legible &= np.abs(piece - path).max() < 0.6
        at = piece[-1]
        pieces.append(piece)
    return np.concatenate(pieces), bool(legible)


# ------------------------------------------------------------------------------------------------- 3 layouts


@dataclass(frozen=True)
class Layout:
    """Where things are in a place: two clips at one place differ in it, the frames of one do not."""

    place: str
    horizon: int  # y where the ground begins
    floor: int  # y on which things stand
    numbers: tuple[float, ...]  # 24 uniform numbers for what varies: hills, bushes, pattern, sun


def draw_layout(place: str, rng: np.random.Generator) -> Layout:
    horizon = int(rng.integers(72, 97))
    floor = int(rng.integers(max(horizon + 12, 100), 117))
    return Layout(place, horizon, floor, tuple(rng.random(24)))


SKIES = {  # far hills, near hills, bushes or furniture, the sun or moon
    "day": ((128, 158, 150), (104, 138, 112), (78, 112, 84), (218, 204, 140)),
    "night": ((34, 38, 66), (26, 30, 52), (18, 24, 40), (150, 154, 170)),
    "room": ((104, 104, 108), (70, 66, 66), (88, 80, 74), (134, 140, 150)),
    "desert": ((170, 136, 106), (150, 114, 86), (122, 98, 68), (226, 200, 160)),
}


def _sky(layout: Layout, x: np.ndarray) -> np.ndarray:
    """What stands above the horizon at the columns x: (horizon, len(x), 3) float."""
    u, h = layout.numbers, layout.horizon
    y = (np.arange(h, dtype=np.float32) + 0.5)[:, None]
    x = x.astype(np.float32)[None]
    top, bottom = (np.array(c, np.float32) for c in PLACES[layout.place][1:3])
    far, near, bush, sun = (np.array(c, np.float32) for c in SKIES[layout.place])
    image = np.empty((h, x.shape[1], 3), np.float32)
    image[:] = top + (bottom - top) * (y / h)[..., None]

    def paint(alpha, colour):
        image[:] += alpha[..., None] * (colour - image)

    def wave(*parts):
        return sum(a * np.sin(2 * np.pi * (x / length + phase)) for a, length, phase in parts)

    def slope(edge):  # coverage below a curve, with the slope's antialiasing
        step = np.gradient(edge[0]) / np.gradient(x[0])
        return np.clip((y - edge) / np.sqrt(1 + step**2) + 0.5, 0, 1)

    if layout.place == "room":
        panel = 5 * np.tanh(3 * np.sin(2 * np.pi * (x / (34 + 16 * u[0]) + u[1])))
        image += panel[..., None]
        x0, w = 20 + 60 * u[2], 16 + 10 * u[3]  # a window, one every 150 px
        y0, high = h * (0.28 + 0.16 * u[4]), h * (0.16 + 0.06 * u[5])
        dx = (x - x0 + 75) % 150 - 75
        box = np.maximum(np.abs(dx) - w, np.abs(y - y0) - high)
        paint(np.clip(0.5 - (box - 3) / 1.5, 0, 1), bush)
        paint(np.clip(0.5 - box / 1.5, 0, 1), sun + (y - y0)[..., None] * 0.5)
        paint(np.clip((y - (h - 5)) / 1.5 + 0.5, 0, 1) + 0 * x, near)
        return image
    x0, y0 = 12 + 104 * u[0], h * (0.18 + 0.25 * u[1])
    away = np.hypot((x - x0 + 150) % 300 - 150, y - y0)
    image += (0.35 * np.exp(-((away / 26) ** 2)))[..., None] * (sun - image)
    paint(np.clip((9 - away) / 1.5 + 0.5, 0, 1), sun)
    edge = h - (14 + 14 * u[2]) + wave((9, 110 + 60 * u[3], u[4]), (4, 47 + 20 * u[5], u[6]))
    paint(slope(edge), far)
    edge = h - (4 + 8 * u[7]) + wave((5, 80 + 50 * u[8], u[9]), (2.5, 36 + 12 * u[10], u[11]))
    paint(slope(edge), near)
    for k in range(3):
        x0, wide, high = 200 * (k + u[12 + k]) / 3, 8 + 8 * u[15 + k], 7 + 9 * u[18 + k]
        dx = ((x - x0 + 100) % 200 - 100) / wide
        d = np.sqrt(dx**2 + ((y - h) / high) ** 2)
        paint(np.clip((1 - d) * min(wide, high) / 1.4 + 0.5, 0, 1), bush + 14 * ((h - y) / high)[..., None])
    return image


def _ground(layout: Layout, x: np.ndarray) -> np.ndarray:
    """What lies below the horizon at the columns x: (128 - horizon, len(x), 3) float."""
    u, h = layout.numbers, layout.horizon
    y = (np.arange(SIZE - h, dtype=np.float32) + 0.5)[:, None]
    x = x.astype(np.float32)[None]
    depth = np.sqrt(y / (SIZE - h))  # pattern rows grow towards the viewer
    floor = np.array(PLACES[layout.place][3], np.float32)
    shade = 1.12 - 0.25 * y / (SIZE - h)
    if layout.place == "room":
        tiles = lambda turns: np.tanh(2.5 * np.sin(2 * np.pi * turns))
        pattern = 7 * tiles(x / 44 + u[21]) * tiles(1.6 * depth + u[22])
    elif layout.place == "desert":
        bend = 0.35 * np.sin(2 * np.pi * (x / (60 + 20 * u[20]) + u[21]))
        pattern = 6 * np.sin(2 * np.pi * (2.6 * depth + bend + u[22]))
    else:
        across = np.sin(2 * np.pi * (x / (30 + 14 * u[20]) + depth + u[21]))
        pattern = 5 * across * np.sin(2 * np.pi * (1.7 * depth - x / 90 + u[22]))
    return shade[..., None] * (floor + pattern[..., None])


def _vignette() -> np.ndarray:
    """(128, 128, 1): the picture darkens towards its edges, which also tells the model where they are."""
    p = (np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE * 2 - 1
    return (1 - 0.16 * (p[:, None] ** 4 + p**4))[..., None].astype(np.float32)


VIGNETTE = _vignette()
PARALLAX, SUB = 0.5, 4  # the sky moves half as fast as the ground; positions are quarters of a pixel


def backdrop(layout: Layout, camera: np.ndarray) -> np.ndarray:
    """The empty scene, float32 (1 or frames, 128, 128, 3): one frame if the camera stays where it is."""
    h = layout.horizon
    if np.ptp(camera) == 0:
        column = np.arange(SIZE) + 0.5 + camera[0]
        image = np.concatenate([_sky(layout, column - (1 - PARALLAX) * camera[0]), _ground(layout, column)])
        return (image * VIGNETTE)[None]
    frames = np.empty((len(camera), SIZE, SIZE, 3), np.float32)
    for part, where, rate in ((_sky, slice(0, h), PARALLAX), (_ground, slice(h, SIZE), 1.0)):
        shift = np.rint(camera * rate * SUB).astype(int)
        first = shift.min()
        column = (np.arange(SIZE * SUB + shift.max() - first) + first) / SUB + 0.5
        wide = part(layout, column)
        for i, s in enumerate(shift - first):
            np.multiply(wide[:, s : s + SIZE * SUB : SUB], VIGNETTE[where], out=frames[i, where])
    return frames


# --------------------------------------------------------------------------------------------------- 4 pixels


def _star(x, y, r):
    """A fat five-pointed star. Folded into a tenth of the plane, its outline is a line from point to dent."""
    outer, inner, tenth = 1.05 * r, 0.55 * r, np.pi / 5  # a sharp star would lose its points in the latent
    y = y - 0.15 * r  # on the floor, as the others stand
    angle = np.abs((np.arctan2(x, -y) + tenth) % (2 * tenth) - tenth)
    edge = np.array([inner * np.cos(tenth) - outer, inner * np.sin(tenth)])
    edge, rho = edge / np.hypot(*edge), np.hypot(x, y)
    return edge[1] * (rho * np.cos(angle) - outer) - edge[0] * rho * np.sin(angle)


OUTLINE = {  # signed distance of (x, y) from the centre to the outline, negative inside; r is half the size
    "ball": lambda x, y, r: np.hypot(x, y) - r,
    "square": lambda x, y, r: np.maximum(np.abs(x), np.abs(y)) - r,
    "triangle": lambda x, y, r: np.maximum(y - r, (2 * np.abs(x) - y - r) / 5**0.5),
    "star": _star,
    "ring": lambda x, y, r: np.abs(np.hypot(x, y) - 0.7 * r) - 0.3 * r,
    "bar": lambda x, y, r: np.maximum(np.abs(x) - r, np.abs(y - 0.5 * r) - 0.5 * r),  # on the floor, too
    "cross": lambda x, y, r: np.maximum(
        np.maximum(np.abs(x), np.abs(y)) - r, np.minimum(np.abs(x), np.abs(y)) - 0.35 * r
    ),
}
PATCH = 60  # side of the window that is drawn: an object of 48 px with its antialiased rim


def window(path: np.ndarray):
    """Coordinates of a window that goes along path (n, 2): x (n, 1, P), y (n, P, 1) relative to the centre,
    and the window's index in an array (n, 128, 128, ...)."""
    corner = np.clip(np.floor(path).astype(int) - PATCH // 2, 0, SIZE - PATCH)
    cols, rows = (corner[:, :, None] + np.arange(PATCH)).transpose(1, 0, 2)
    x, y = np.float32(cols + 0.5 - path[:, :1]), np.float32(rows + 0.5 - path[:, 1:])
    frame = np.arange(len(path))[:, None, None]
    return x[:, None, :], y[:, :, None], (frame, rows[:, :, None], cols[:, None, :])


def coverage(shape: str, size: float, path: np.ndarray):
    """How much of each pixel a shape covers along path (n, 2): (n, P, P) float32 in [0, 1], and its index."""
    x, y, where = window(path)
    return np.clip(0.5 - OUTLINE[shape](x, y, np.float32(size / 2)), 0, 1), where


def _lit(shape: str, size: float, x: np.ndarray, y: np.ndarray, colour) -> tuple[np.ndarray, np.ndarray]:
    """Coverage and shaded colour of an object at offsets x, y from its centre; light from the upper left."""
    r = np.float32(size / 2)
    distance = OUTLINE[shape](x, y, r)
    alpha = np.clip(0.5 - distance, 0, 1)
    toward = -(0.55 * x + 0.83 * y) / r  # 1 at the side that faces the light
    round_ = np.clip(-distance / (0.45 * r), 0, 1)  # 0 at the rim, 1 inside
    light = 0.86 + 0.13 * toward + 0.12 * round_ * (2 - round_)
    shine = 0.30 * np.exp(-((x + 0.32 * r) ** 2 + (y + 0.38 * r) ** 2) / (0.10 * r * r))
    if shape in ("ring", "star"):
        shine = shine * 0.4
    paint = np.minimum(light, 1.06)[..., None] * np.float32(colour)
    return alpha, paint + shine[..., None] * (255 - paint)


@dataclass(frozen=True)
class Thing:
    """One object: what it is in each chunk and where it is in each frame."""

    triples: tuple[Triple, ...]  # (colour, shape, motion) a chunk, as the caption says
    size: float  # width and height in pixels
    path: np.ndarray  # (frames, 2) centres (x, y) on the screen
    floor: float  # y of the ground below it


@dataclass(frozen=True)
class Wall:
    """A wall that stands in front of everything."""

    x: float  # of its middle
    width: float
    top: float
    bottom: float


def _draw_shadow(frames: np.ndarray, thing: Thing, path: np.ndarray) -> None:
    """Darkens the ground below a thing, the less the higher it is; frames (n, 128, 128, 3)."""
    rise = np.clip((thing.floor - path[:, 1] - thing.size / 2) / 70, 0, 1)[:, None, None]
    rows = slice(int(thing.floor) - 8, min(SIZE, int(thing.floor) + 9))
    y = (np.arange(rows.start, rows.stop, dtype=np.float32) + 0.5 - thing.floor)[None, :, None]
    x = np.arange(SIZE, dtype=np.float32) + 0.5 - np.float32(path[:, :1, None])
    wide = thing.size * (0.46 + 0.1 * rise)
    dark = (0.42 - 0.27 * rise) * np.exp(-(np.square(x / wide) ** 2)) * np.exp(-np.square(y / 4.5))
    frames[:, rows] *= (1 - dark.astype(np.float32))[..., None]


def _draw_wall(frames: np.ndarray, wall: Wall, layout: Layout) -> None:
    x0, x1 = int(wall.x - wall.width / 2) - 2, int(wall.x + wall.width / 2) + 3
    cols, rows = slice(max(x0, 0), x1), slice(int(wall.top) - 2, int(wall.bottom) + 3)
    x = np.arange(SIZE, dtype=np.float32)[cols] + 0.5 - wall.x
    y = (np.arange(SIZE, dtype=np.float32)[rows] + 0.5)[:, None]
    box = np.maximum(np.abs(x) - wall.width / 2, np.maximum(wall.top - y, y - wall.bottom))
    alpha = np.clip(0.5 - box, 0, 1)[..., None]
    base = np.array(WALLS[layout.place], np.float32)
    row = np.sin(np.pi * (y - wall.top) / 14)
    brick = np.tanh(4 * row) * np.tanh(4 * np.sin(2 * np.pi * (x / 34 + 0.25 * np.sign(row))))
    light = 1.06 - 0.16 * (x + wall.width / 2) / wall.width + 0.10 * np.exp(-(((y - wall.top) / 3) ** 2))
    paint = (light + 0.025 * brick)[..., None] * base
    frames[:, rows, cols] += alpha * (paint - frames[:, rows, cols])


WALLS = {"day": (150, 128, 116), "night": (74, 72, 86), "room": (136, 120, 104), "desert": (128, 92, 70)}


@dataclass(frozen=True)
class Clip:
    """A clip with its captions and ground truth; its frames are painted when they are asked for."""

    captions: tuple[str, ...]  # one a chunk
    kind: str  # of KINDS
    layout: Layout
    things: tuple[Thing, ...]  # from far to near
    camera: np.ndarray  # (frames,) x of the left edge of the frame
    wall: Wall | None = None

    @cached_property
    def frames(self) -> np.ndarray:
        """(frames, 128, 128, 3) uint8."""
        return render(self)

    def masks(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """(things, frames, 128, 128) float32: how much of each pixel shows each thing."""
        stop = len(self.camera) if stop is None else stop
        out = np.zeros((len(self.things), stop - start, SIZE, SIZE), np.float32)
        for i, thing in enumerate(self.things):
            for k, span in spans(start, stop):
                alpha, where = coverage(thing.triples[k][1], thing.size, thing.path[span])
                here = slice(span.start - start, span.stop - start)
                for before in out[:i]:
                    before[here][where] *= 1 - alpha
                out[i][here][where] = alpha
        if self.wall:
            x = np.arange(SIZE) + 0.5 - self.wall.x
            hidden = np.clip(0.5 + self.wall.width / 2 - np.abs(x), 0, 1)
            out *= (1 - hidden).astype(np.float32)
        return out


def spans(start: int, stop: int):
    """The frames [start, stop) cut at chunks: yields (chunk, slice)."""
    while start < stop:
        k = start // CHUNK
        end = min(stop, (k + 1) * CHUNK)
        yield k, slice(start, end)
        start = end


def render(clip: Clip, start: int = 0, stop: int | None = None) -> np.ndarray:
    """The frames [start, stop) of a clip, (frames, 128, 128, 3) uint8."""
    stop, wall = len(clip.camera) if stop is None else stop, clip.wall
    empty = backdrop(clip.layout, clip.camera[start:stop])
    if wall:  # its shadow on the ground
        x, y = np.arange(SIZE) + 0.5 - wall.x - 5, np.arange(SIZE)[:, None] + 0.5 - wall.bottom
        dark = 0.3 * np.exp(-((x / (wall.width / 2 + 6)) ** 8)) * np.exp(-((y / 6) ** 2))
        empty = empty * np.float32(1 - dark)[..., None]
    out = np.empty((stop - start, SIZE, SIZE, 3), np.uint8)
    for k, span in spans(start, stop):  # a chunk at a time stays in the processor's cache
        here = slice(span.start - start, span.stop - start)
        frames = empty[here].copy() if len(empty) > 1 else empty.repeat(span.stop - span.start, 0)
        for thing in clip.things:
            _draw_shadow(frames, thing, thing.path[span])
        for thing in clip.things:
            colour, shape, _ = thing.triples[k]
            x, y, where = window(thing.path[span])
            alpha, paint = _lit(shape, thing.size, x, y, (COLOURS | NEW_COLOURS)[colour])
            under = frames[where]
            frames[where] = under + alpha[..., None] * (paint - under)
        if wall:
            _draw_wall(frames, wall, clip.layout)
        frames += 0.5
        out[here] = np.clip(frames, 0, 255, out=frames)
    return out


# ---------------------------------------------------------------------------------------------------- 5 clips


def _xy(path: np.ndarray) -> np.ndarray:
    return np.stack([path.real, path.imag], 1)


def _draw_clip(kind, plans, layout, rng, patience) -> Clip | None:
    """The clip of a list of triples an object; None if `patience` draws give no legible path."""
    chunks = len(plans[0])
    n, camera, wall, pan = chunks * CHUNK, np.zeros(chunks * CHUNK), None, ""
    t = np.arange(1.0, n + 1)
    motions = [[m for _, _, m in plan] for plan in plans]
    for _ in range(patience):
        size = rng.uniform(32, 46)
        sizes, floors, legible = [size, rng.uniform(32, 46)], [layout.floor] * 2, True
        if kind == "alone":
            path, legible = trajectory(motions[0], size, layout.floor, rng)
            paths = [path]
        elif kind == "apart":
            sizes = rng.uniform(32, 42, 2)
            tries = [trajectory(m, s, layout.floor, rng) for m, s in zip(motions, sizes, strict=True)]
            legible = all(ok for _, ok in tries)
            paths = [path - path.real + lane for (path, _), lane in zip(tries, (33, 95), strict=True)]
        elif kind == "pass":
            floors = [layout.floor - 5, layout.floor + 3]
            paths = []
            for m, s, f in zip(motions, sizes, floors, strict=True):
                ground = f - s / 2
                if m[0] == "still":
                    paths.append(np.full(n, complex(rng.uniform(48, 80), ground)))
                else:
                    path, ok = trajectory(m, s, f, rng)
                    legible &= ok
                    paths.append(path if rng.random() < 0.4 else path.real + 1j * ground)
        elif kind == "hit":  # equal masses: the one that comes stops, the other takes its speed
            way = SLIDES[motions[0][0]]
            speed = rng.uniform(0.8, 1.8)
            first = (MARGIN + sizes[0] / 2) if way == 1 else SIZE - MARGIN - sizes[0] / 2
            first += way * rng.uniform(0, 6)
            reach = _half_width(plans[0][0][1], sizes[0]) + _half_width(plans[1][0][1], sizes[1])
            second = first + way * (reach + rng.uniform(14, 34))
            gap = abs(second - first) - reach
            when = gap / speed
            end = SIZE - MARGIN - sizes[1] / 2 if way == 1 else MARGIN + sizes[1] / 2
            room = (end - second) * way
            legible = room > 16
            a = first + way * np.minimum(speed * t, gap)
            b = second + way * slide(np.maximum(t - when, 0), speed, max(room, 1))
            paths = [a + 1j * (layout.floor - sizes[0] / 2), b + 1j * (layout.floor - sizes[1] / 2)]
        elif kind == "wall":
            size = sizes[0] = rng.uniform(26, 28.5)
            way = SLIDES[motions[0][0]]
            where = SIZE / 2 + way * rng.uniform(10, 13)  # more room before it than behind
            wall = Wall(where, rng.uniform(54, 61), rng.uniform(14, 34), layout.floor + rng.uniform(4, 8))
            low, ground = wall.top + size / 2 + 4, layout.floor - size / 2
            y = ground if rng.random() < 0.6 else rng.uniform(low, ground)
            first = 2 + size / 2 if way == 1 else SIZE - 2 - size / 2
            slowest = min(96 / n, 1.4)  # comes out before the clip ends
            path = first + way * slide(t, rng.uniform(slowest, 1.5), SIZE - size - 3) + 1j * y
            paths = [path]
        elif kind == "pan":
            speed = rng.uniform(0.25, 0.55) * rng.choice([-1, 1])
            camera, pan = speed * t, "left" if speed < 0 else "right"
            path, legible = trajectory(motions[0], size, layout.floor, rng)
            path = path - camera + rng.uniform(0, 1) * speed * n
            legible &= path.real.min() > size / 2 and path.real.max() < SIZE - size / 2
            paths = [path]
        else:  # follow
            way = SLIDES[motions[0][0]]
            speed = rng.uniform(0.6, 1.6)
            camera = way * speed * t
            y = layout.floor - size / 2 if rng.random() < 0.7 else rng.uniform(30, layout.floor - size / 2)
            paths = [np.full(n, complex(64 - way * rng.uniform(0, 20), y))]
        if legible:
            break
    else:
        return None
    things = [
        Thing(tuple(plan), float(size), _xy(path), float(floor))
        for plan, size, path, floor in zip(plans, sizes, paths, floors, strict=False)
    ]
    told, rows = layout.place if rng.random() < 0.5 else None, [*zip(*plans, strict=True)]
    captions = [caption(row, rows[k - 1] if k else None, told, rng, kind, pan) for k, row in enumerate(rows)]
    return Clip(tuple(captions), kind, layout, tuple(things), camera, wall)


def _half_width(shape: str, size: float) -> float:
    """Half the width of a shape where it could touch another that stands beside it."""
    return size / 2 * (0.95 if shape == "star" else 1.0)


CAN = {  # the motions of the first thing, or of both; a half of the frame or a pan has no room for the others
    "alone": tuple(MOTIONS), "pan": tuple(MOTIONS), "apart": ("bounce", "up", "down", "still", "fall"),
} | dict.fromkeys(("pass", "hit", "wall", "follow"), ("left", "right"))  # fmt: skip
PAIRS = ("apart", "pass", "hit")


def make_clip(seed: int, chunks: int = 4, events=0.4, heldout: bool | None = False, kind: str = "") -> Clip:
    """The clip of a seed, of any kind or of the one given. events: chance of a change where a chunk starts
    in "alone"; other kinds change less.

    heldout: False for clips without any held-out triple (training), True for held-out triples only (without
    events), None for any.
    """
    rng = np.random.default_rng([seed, 128])
    draw = lambda names: tuple(names)[rng.integers(len(names))]
    drawn = str(rng.choice([*KINDS], p=[*KINDS.values()]))
    kind = kind or drawn
    while True:
        plans = [[(draw(COLOURS), draw(SHAPES), draw(CAN[kind]))] for _ in range(1 + (kind in PAIRS))]
        if kind in ("pass", "hit"):
            rests = 1 if kind == "hit" else int(rng.integers(2))
            plans[rests][0] = (*plans[rests][0][:2], "still")
        for plan in plans:
            while len(plan) < chunks:
                colour, shape, motion = plan[-1]
                roll = rng.random() / max(events, 1e-9) if heldout is not True else 1
                if roll < 0.6 and kind in ("alone", "apart"):
                    motion = draw((OPPOSITE.get(motion, "still"), draw(CAN[kind]), draw(CAN[kind])))
                elif 0.6 <= roll < 0.85:
                    colour = draw(COLOURS)
                elif 0.85 <= roll < 1 and kind not in ("pass", "hit"):
                    shape = draw(SHAPES)
                plan.append((colour, shape, motion))
        fits = heldout is None or all(held_out(*t) == heldout for plan in plans for t in plan)
        twins = len(plans) > 1 and any(a[0] == b[0] for a, b in zip(*plans, strict=True))
        if fits and not twins:
            layout = draw_layout(draw(PLACES), rng)
            if clip := _draw_clip(kind, plans, layout, rng, patience=12):
                return clip


def scene(colour="red", shape="ball", motion="bounce", place="day", chunks: int = 4, seed: int = 0,
          kind: str = "alone") -> Clip:  # fmt: skip
    """A clip of one thing to order; colour, shape and motion are names, or lists of names with one a chunk.

    The seed draws size, speed, start, layout and wording. ValueError: an unknown name, a kind that takes two
    things or cannot do the motion, a list not `chunks` long, motions without room.
    """
    plan = [[names] * chunks if isinstance(names, str) else names for names in (colour, shape, motion)]
    choices = (COLOURS | NEW_COLOURS, SHAPES + NEW_SHAPES, MOTIONS, PLACES, KINDS)
    for names, known in zip([*plan, [place], [kind]], choices, strict=True):
        if unknown := set(names) - set(known):
            raise ValueError(f"unknown {unknown}; choose from {', '.join(known)}")
    if any(len(names) != chunks for names in plan):
        raise ValueError(f"lists of {[*map(len, plan)]} names for {chunks} chunks; give one name a chunk")
    if kind in PAIRS or set(plan[2]) - set(CAN[kind]):
        raise ValueError(f"no {kind!r} clip of one thing that does {plan[2]}; its motions: {CAN[kind]}")
    rng = np.random.default_rng([seed, 129])
    clip = _draw_clip(kind, [[*zip(*plan, strict=True)]], draw_layout(place, rng), rng, patience=2000)
    if clip is None:
        raise ValueError(f"no room for {plan[2]}; after a slide to an edge, slide away from it")
    return clip


# ------------------------------------------------------------------------------------------------ 6 tokenizer

ENGLISH = """
the quick brown fox jumps over the lazy dog. a good picture of the sea, with small waves and a bright sun.
she walks into the house and looks at the old clock on the wall. what is it? it is a video of two people.
an object turns, then it falls and rolls away. there are many things to see here, so we will be quick!
the camera follows a car along the road through the forest. snow, rain and wind; the light is very soft.
he would have come with us, but his work was not yet done. can you make this one bigger or a little smaller?
a circle, a cross, a heart, a box, a cube, a line: each shape changes its colour and size as time goes on.
slowly, quickly, near, far, behind, under, between, before, after, again, never, always, every, only, also.
the video shows a large white cat sleeping on a red chair; its tail hangs down and moves from left to right.
jump, spin, shake, roll, drop, rise, fall, grow, shrink, start, stop, turn, fade, appear, vanish, wait.
"""


def train_tokenizer(file: str, size: int = 288) -> None:
    """Writes a sentencepiece unigram model with T5's ids: pad 0, eos 1, unk 2, no bos. Always the same bytes.

    Captions outnumber the English, so that their words become single pieces; all of ascii is in, so that no
    English prompt meets unk.
    """
    import sentencepiece  # here, since the world itself needs numpy alone

    # a piece must occur in two different words, and "red," is another word than "red"
    text = [*ENGLISH.strip().splitlines(), ", ".join(vocabulary()) + ","] * 4
    text += sum((make_clip(seed, heldout=None).captions for seed in range(1000)), ())
    with open(file, "wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_writer=out, model_type="unigram", vocab_size=size,
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, character_coverage=1.0,
            required_chars="".join(map(chr, range(33, 127))), num_threads=1, minloglevel=2,
        )  # fmt: skip


# --------------------------------------------------------------------------------------------- 7 command line


def sheet(file: str, kind: str = "") -> None:
    """Writes a PNG: a clip a row, every twelfth frame, a gap between chunks. Prints the captions."""
    import imageio.v3 as imageio

    rows = []
    for seed in range(8):
        clip = make_clip(seed, kind=kind)
        frames = clip.frames[::12]
        gap = [((2, 2), (2 if i % 2 else 10, 2), (0, 0)) for i in range(len(frames))]
        rows.append(np.concatenate([*map(np.pad, frames, gap)], 1))
        print(seed, clip.kind, *clip.captions, sep=" | ")
    imageio.imwrite(file, np.concatenate(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description="the tiny world: clips, captions, tokenizer")
    parser.add_argument("--speed", action="store_true", help="measure how fast clips are painted")
    parser.add_argument("--sheet", metavar="FILE", help="write a contact sheet (PNG)")
    parser.add_argument("--kind", choices=[*KINDS], default="", help="of the sheet's clips; else any")
    parser.add_argument("--tokenizer", metavar="FILE", help="train the tokenizer")
    args = parser.parse_args()
    if args.sheet:
        sheet(args.sheet, kind=args.kind)
    if args.tokenizer:
        train_tokenizer(args.tokenizer)
    if args.speed:
        start = time.perf_counter()
        for seed in range(30):
            render(make_clip(seed))
        print(f"{(time.perf_counter() - start) / 120 * 1000:.1f} ms a second of video")


if __name__ == "__main__":
    main()
