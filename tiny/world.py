"""The tiny world: moving shapes with captions, and a judge that reads them back from frames.

    seed   --make_clip--> Clip: frames (24 n, 64, 64, 3) uint8, one caption a chunk, ground truth
    names  --scene------> the same, for a colour, shape and motion to order (one of each, or one a chunk)
    frames --judge------> Verdict: colour, shape, motion, centres; of the whole clip and of each chunk

One chunk is 24 frames, one second. Whatever changes does so on the first frame of a chunk. The grammar ([ ]
optional, | choice, all lower case):

    caption = ["now"] thing ["and" thing] [place]     "now" only where something has just changed
    thing   = ("a" | "an") COLOUR SHAPE verb          verb from MOTIONS, place from PLACES
    verb    = phrase | "stops" | "turns and" phrase   the last two only where the motion has just changed

    "a red ball bounces"    "now a blue square turns and slides to the right at night"    "a white ring stops"

Physics: the frame is a walled box with a floor. A slide keeps its speed and rests at the wall it meets; a
swing is a sine and an orbit a circle, both of fixed period; a bounce is free fall on an elastic floor, each
as high as the last. So a few frames determine the rest. Positions are pixels from the frame's top-left
corner, x to the right, y down; inside `trajectory` x + iy.

Contents: 1 words, 2 motion, 3 pixels, 4 clips, 5 judge, 6 tokenizer, 7 command line.
Left out on purpose: occlusion, rotation, camera motion, texture; the judge reads one object, not two.
"""

import argparse
import time
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, product
from typing import NamedTuple

import numpy as np

SIZE, CHUNK, FPS = 64, 24, 24  # frame side in pixels, frames a chunk, frames a second
BORDER, FLOOR = 2, 56  # thickness of the walls; y of the floor

# ---------------------------------------------------------------------------------------------------- 1 words

# fmt: off
COLOURS = {
    "red":    (225,  30,  35), "orange": (255, 130,  10), "yellow": (255, 230,  40), "green": ( 35, 185,  60),
    "blue":   ( 35,  90, 245), "purple": (145,  40, 205), "pink":   (255, 125, 200), "white": (250, 250, 250),
}
NEW_COLOURS = {"cyan": (30, 225, 235)}  # never drawn by make_clip: for a LoRA to learn, by `scene`
SHAPES = ("ball", "square", "triangle", "star", "ring")
NEW_SHAPES = ("cross",)  # never drawn by make_clip either
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
}
PLACES = {  # words, colours of the wall's top and bottom, the floor, the border; all duller than any object
    "day":    ("by day",         (120, 165, 190), (165, 195, 205), ( 95, 115,  85), ( 60,  80,  95)),
    "night":  ("at night",       ( 12,  14,  34), ( 38,  42,  70), ( 60,  58,  66), (  4,   4,  12)),
    "room":   ("in a grey room", (112, 112, 114), ( 86,  86,  88), ( 62,  56,  52), ( 36,  36,  38)),
    "desert": ("in the desert",  (186, 160, 128), (150, 122,  96), (112,  86,  62), ( 74,  54,  42)),
}
# fmt: on
SLIDES = {"left": -1, "right": 1, "up": -1j, "down": 1j}
ORBITS = {"clockwise": 1, "anticlockwise": -1}
OPPOSITE = {"left": "right", "up": "down", "clockwise": "anticlockwise"}
OPPOSITE |= {b: a for a, b in OPPOSITE.items()}
Triple = tuple[str, str, str]  # (colour, shape, motion)
TRIPLES: tuple[Triple, ...] = tuple(product(COLOURS, SHAPES, MOTIONS))


def held_out(colour: str, shape: str, motion: str) -> bool:
    """True for one triple in eight, never shown in training. crc32, since `hash` differs from run to run."""
    return zlib.crc32(f"{colour} {shape} {motion}".encode()) % 8 == 0


def caption(triples, before=None, place: str | None = None, rng: np.random.Generator | None = None) -> str:
    """The caption of one chunk with the given (colour, shape, motion) of each object.

    before: their triples in the previous chunk, if any. rng draws the wording; without it, the plainest.
    """
    pick = rng.integers if rng else lambda n: 0
    clauses = []
    for (colour, shape, motion), (_, _, last) in zip(triples, before or triples, strict=True):
        verb = MOTIONS[motion][pick(3)]
        if motion == "still" != last and pick(2):
            verb = "stops"
        elif OPPOSITE.get(motion) == last and pick(2):
            verb = f"turns and {verb}"
        clauses.append(f"{'an' if colour == 'orange' else 'a'} {colour} {shape} {verb}")
    now = "now " if before not in (None, triples) and pick(2) else ""
    return now + " and ".join(clauses) + (f" {PLACES[place][0]}" if place else "")


def words() -> dict[str, list[str]]:
    """What the model is taught to understand, by kind: `sample.py` tells who asks for something else."""
    plain, *others = zip(*MOTIONS.values(), strict=True)
    places = [words for words, *_ in PLACES.values()]
    other = [*sum(others, ()), "a", "an", "and", "now", "stops", "turns"]
    return {"colours": [*COLOURS], "shapes": [*SHAPES], "motions": [*plain], "places": places, "other": other}


def vocabulary(known: dict[str, list[str]] | None = None) -> list[str]:
    """Every word a caption can hold, sorted; known: the `words` of another world."""
    known = known or words()
    return sorted({word for phrases in known.values() for phrase in phrases for word in phrase.split()})


def sample_prompts(n: int, seed: int = 0, heldout: bool | None = True) -> list[tuple[str, Triple]]:
    """n evaluation prompts, each with the (colour, shape, motion) to expect; no triple twice while they last.

    heldout: True for triples that training never shows, False for those it does, None for any.
    """
    rng = np.random.default_rng([seed, 2])
    return [(caption([triple], rng=rng), triple) for triple in draw_triples(TRIPLES, n, rng, heldout)]


def draw_triples(triples, n: int, rng: np.random.Generator, heldout: bool | None) -> list[Triple]:
    """n of the triples, held out or not (None: any), in a random order; none twice while they last."""
    triples = [t for t in triples if heldout in (None, held_out(*t))]
    order = np.concatenate([rng.permutation(len(triples)) for _ in range(-(-n // len(triples)))])[:n]
    return [triples[i] for i in order]


# --------------------------------------------------------------------------------------------------- 2 motion

GRAVITY = 0.16  # px / frame^2: a bounce of 16 to 34 px takes 28 to 41 frames, so every chunk shows a turn
SWING, ORBIT = 36, 48  # periods in frames


def trajectory(motions, size: float, rng: np.random.Generator, lane: float | None = None):
    """One drawn path through a list of motions, one a chunk; lane is the x to start from, if not any.

    Returns the centres (24 len(motions), 2) and whether they show what the motions say: a wall may cut an
    orbit, a slide may have no room.
    """
    left, right, top, floor = BORDER + size / 2, SIZE - BORDER - size / 2, BORDER + size / 2, FLOOR - size / 2
    inside = lambda z: np.clip(z.real, left, right) + 1j * np.clip(z.imag, top, floor)
    mid = complex(left + right, top + floor) / 2
    speed, height = rng.uniform(0.6, 1.0), rng.uniform(16, floor - top)
    reach, radius = rng.uniform(10, right - mid.real), rng.uniform(8, floor - mid.imag)
    at, later_half = complex(rng.uniform(left, right), rng.uniform(top, floor)), rng.random() < 0.5
    if motions[0] in SLIDES:  # from the far side, to have somewhere to go
        at = inside(at - SIZE * SLIDES[motions[0]]) + rng.uniform(0, 5) * SLIDES[motions[0]]
    elif motions[0] in ORBITS:
        at = mid + radius * np.exp(2j * np.pi * rng.random())
    at = at if lane is None else complex(lane, at.imag)
    pieces, legible = [], True
    for motion, run in groupby(motions):
        t = np.arange(1, CHUNK * len(list(run)) + 1)  # from 1: the first frame of a run has moved already
        if motion == "bounce":  # jump or fall from here, such that every bounce is as high
            above = floor - at.imag
            launch = (2 * GRAVITY * max(height, above)) ** 0.5
            period = 2 * launch / GRAVITY
            phase = period / 2 - abs(launch**2 - 2 * GRAVITY * above) ** 0.5 / GRAVITY  # rising through here
            t = (t + (period - phase if later_half and not pieces else phase)) % period
            path = at.real + 1j * (floor - launch * t + GRAVITY / 2 * t**2)
        elif motion == "swing":  # about the middle; towards it first, unless it is the clip's first motion
            wide = max(reach, abs(at.real - mid.real))
            phase = np.arcsin((at.real - mid.real) / wide)
            phase = np.pi - phase if (at.real > mid.real if pieces else later_half) else phase
            path = mid.real + wide * np.sin(phase + 2 * np.pi * t / SWING) + 1j * at.imag
        elif motion in ORBITS:  # through here, round a point on the way to the middle
            arm = radius * (at - mid) / abs(at - mid)
            path = at - arm + arm * np.exp(2j * np.pi * ORBITS[motion] * t / ORBIT)
        else:
            path = at + speed * SLIDES.get(motion, 0) * t
        piece = inside(path)
        if motion in SLIDES:
            travel = np.abs(np.diff(piece, prepend=at)).reshape(-1, CHUNK).sum(1)
            legible &= travel[0] > 6 and not any((travel > 0.5) & (travel < 5))  # moves or rests, clearly
        else:
            legible &= np.abs(piece - path).max() < 0.5
        at = piece[-1]
        pieces.append(piece)
    path = np.concatenate(pieces)
    return np.stack([path.real, path.imag], 1), bool(legible)


# --------------------------------------------------------------------------------------------------- 3 pixels


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
    "cross": lambda x, y, r: np.maximum(
        np.maximum(np.abs(x), np.abs(y)) - r, np.minimum(np.abs(x), np.abs(y)) - 0.35 * r
    ),
}
PATCH = 32  # side of the window that is drawn: an object of 29 px with its antialiased rim


def coverage(shape: str, size: float, path: np.ndarray):
    """How much of each pixel a shape covers along path (n, 2), in a window that goes with it.

    Returns (n, PATCH, PATCH) float32 in [0, 1] and the index of the windows in an array (n, 64, 64, ...).
    """
    corner = np.clip(np.floor(path).astype(int) - PATCH // 2, 0, SIZE - PATCH)
    cols, rows = (corner[:, :, None] + np.arange(PATCH)).transpose(1, 0, 2)
    x, y = np.float32(cols + 0.5 - path[:, :1]), np.float32(rows + 0.5 - path[:, 1:])
    alpha = np.clip(0.5 - OUTLINE[shape](x[:, None, :], y[:, :, None], np.float32(size / 2)), 0, 1)
    return alpha, (np.arange(len(path))[:, None, None], rows[:, :, None], cols[:, None, :])


@lru_cache
def background(place: str) -> np.ndarray:
    """(64, 64, 3) uint8. Floor and border show where the frame ends: rotary positions alone do not say."""
    top, bottom, floor, border = (np.array(colour) for colour in PLACES[place][1:])
    image = np.empty((SIZE, SIZE, 3))
    image[:] = (top + (bottom - top) * np.linspace(0, 1, SIZE)[:, None])[:, None]
    image[FLOOR:] = floor
    image[:BORDER] = image[-BORDER:] = image[:, :BORDER] = image[:, -BORDER:] = border
    return image.astype(np.uint8)


# ---------------------------------------------------------------------------------------------------- 4 clips


@dataclass(frozen=True)
class Thing:
    """One object: what it is in each chunk and where it is in each frame."""

    triples: tuple[Triple, ...]  # (colour, shape, motion) a chunk, as the caption says
    size: float  # width and height, 20 to 26 pixels
    path: np.ndarray  # (frames, 2) centres (x, y)

    def seen(self) -> list[Triple]:
        """The triples as they look: a slide that spends its chunk at the wall is "still"."""
        moves = np.ptp(self.path.reshape(-1, CHUNK, 2), 1).max(1) > 0.5
        return [(c, s, m if moves[k] else "still") for k, (c, s, m) in enumerate(self.triples)]

    def windows(self):
        """Where to paint: yields (chunk, coverage, index into the chunk's frames)."""
        for k, (_, shape, _) in enumerate(self.triples):
            yield k, *coverage(shape, self.size, self.path[k * CHUNK : (k + 1) * CHUNK])


@dataclass(frozen=True)
class Clip:
    """A rendered clip with its captions and ground truth."""

    frames: np.ndarray  # (frames, 64, 64, 3) uint8
    captions: tuple[str, ...]  # one a chunk
    place: str
    things: tuple[Thing, ...]  # one, or two that keep to the left and the right half

    def circles(self) -> list[bool]:
        """Whether anything circles, for each chunk."""
        return [
            any(m in ORBITS for _, _, m in chunk)
            for chunk in zip(*(thing.triples for thing in self.things), strict=True)
        ]

    def mask(self) -> np.ndarray:
        """(frames, 64, 64) bool, true on the objects, to weight them in a loss."""
        mask = np.zeros((len(self.captions), CHUNK, SIZE, SIZE), bool)
        for thing in self.things:
            for k, alpha, where in thing.windows():
                mask[k][where] |= alpha > 0.5
        return mask.reshape(-1, SIZE, SIZE)


def render(things, place: str) -> np.ndarray:
    """Objects over a background: (frames, 64, 64, 3) uint8. Paints only the windows round the objects."""
    frames = np.broadcast_to(background(place), (len(things[0].triples), CHUNK, SIZE, SIZE, 3)).copy()
    for thing in things:
        for k, alpha, where in thing.windows():
            under, paint = frames[k][where], np.float32((COLOURS | NEW_COLOURS)[thing.triples[k][0]])
            frames[k][where] = under + alpha[..., None] * (paint - under) + 0.5
    return frames.reshape(-1, SIZE, SIZE, 3)


def _film(plans, place: str, rng: np.random.Generator, patience: int) -> Clip | None:
    """The clip of a list of triples an object; None if `patience` draws give no legible path."""
    things = []
    for plan, lane in zip(plans, [None] if len(plans) == 1 else [17, 47], strict=True):
        size = rng.uniform(20, 26)
        paths = (trajectory([m for _, _, m in plan], size, rng, lane) for _ in range(patience))
        path = next((path for path, legible in paths if legible), None)
        if path is None:
            return None
        things.append(Thing(tuple(plan), size, path))
    told, chunks = place if rng.random() < 0.5 else None, [*zip(*plans, strict=True)]
    captions = [caption(now, chunks[k - 1] if k else None, told, rng) for k, now in enumerate(chunks)]
    return Clip(render(things, place), tuple(captions), place, tuple(things))


def scene(colour="red", shape="ball", motion="bounce", place="day", chunks: int = 4, seed: int = 0) -> Clip:
    """A clip of one object to order; colour, shape and motion are names, or lists of names with one a chunk.

    The seed draws size, speed, start and wording. Frame 0 serves i2v; the first chunks are a prefix for v2v,
    the others what must follow. ValueError: an unknown name, a list not `chunks` long, motions without room.
    """
    plan = [[names] * chunks if isinstance(names, str) else names for names in (colour, shape, motion)]
    choices = (COLOURS | NEW_COLOURS, SHAPES + NEW_SHAPES, MOTIONS, PLACES)
    for names, known in zip([*plan, [place]], choices, strict=True):
        if unknown := set(names) - set(known):
            raise ValueError(f"unknown {unknown}; choose from {', '.join(known)}")
    if any(len(names) != chunks for names in plan):
        raise ValueError(f"lists of {[*map(len, plan)]} names for {chunks} chunks; give one name a chunk")
    clip = _film([[*zip(*plan, strict=True)]], place, np.random.default_rng([seed, 1]), patience=2000)
    if clip is None:
        raise ValueError(f"no room for {plan[2]}; after a slide to a wall, slide away from it")
    return clip


def make_clip(seed: int, chunks: int = 4, events=0.4, pairs=0.15, heldout: bool | None = False) -> Clip:
    """The clip of a seed. events: chance of a change where a chunk starts; pairs: share of two-object clips.

    heldout: False for clips without any held-out triple (training), True for held-out triples only (without
    events, as two held-out triples are seldom one change apart), None for any.
    """
    rng = np.random.default_rng([seed, 0])
    draw = lambda names: tuple(names)[rng.integers(len(names))]
    pair = rng.random() < pairs
    motions = ("bounce", "up", "down", "still") if pair else MOTIONS  # a half has no room for the others
    while True:
        plans = [[(draw(COLOURS), draw(SHAPES), draw(motions))] for _ in range(1 + pair)]
        for plan in plans:
            while len(plan) < chunks:
                colour, shape, motion = plan[-1]
                kind = rng.random() / max(events, 1e-9) if heldout is not True else 1
                if kind < 0.6:
                    motion = draw((OPPOSITE.get(motion, "still"), draw(motions), draw(motions)))
                elif kind < 0.85:
                    colour = draw(COLOURS)
                elif kind < 1:
                    shape = draw(SHAPES)
                plan.append((colour, shape, motion))
        wanted = heldout is None or all(held_out(*triple) == heldout for plan in plans for triple in plan)
        twins = any(len({colour for colour, _, _ in chunk}) <= pair for chunk in zip(*plans, strict=True))
        if wanted and not twins and (clip := _film(plans, draw(PLACES), rng, patience=12)):
            return clip


# ---------------------------------------------------------------------------------------------------- 5 judge
# Made for the output of a generative model, with soft edges, noise and colours a little off: a contour is
# taken halfway between background and object, where blur does not move it; decisions pool a chunk of frames.


@dataclass(frozen=True)
class Verdict:
    """What the judge sees: None where no object, or fewer than 8 frames of one to tell a motion by."""

    colour: str | None
    shape: str | None
    motion: str | None
    centres: np.ndarray  # (frames, 2) centres (x, y), NaN where there is no object
    chunks: tuple[tuple[str | None, str | None, str | None], ...]  # (colour, shape, motion) of each chunk


def _soften(images: np.ndarray) -> np.ndarray:
    """3 x 3 mean over axes 1 and 2. It wraps round, from border to border, which are alike."""
    for axis in (1, 2):
        images = (np.roll(images, -1, axis) + images + np.roll(images, 1, axis)) / 3
    return images


def _locate(alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, 64, 64) -> the object's centre of mass (n, 2), NaN where there is none, and its mean silhouette
    (36, 36). Stray pixels far from the object are dropped."""
    keep, grid = np.where(alpha > 0.5, alpha, 0), np.arange(SIZE) + 0.5
    for reach in (24, 18, 18):
        mass = keep.sum((1, 2))
        mass = np.where(mass > 60, mass, np.nan)  # the smallest star has 130
        centre = np.stack([keep.sum(1) @ grid, keep.sum(2) @ grid], 1) / mass[:, None]
        near = np.abs(grid - centre[:, :, None]) < reach
        keep = keep * near[:, 0, None, :] * near[:, 1, :, None]
    seen = ~np.isnan(mass)
    alpha, corner = np.pad(alpha[seen], ((0, 0), (18, 18), (18, 18))), centre[seen].astype(int)
    cuts = [a[y : y + 36, x : x + 36] for a, (x, y) in zip(alpha, corner, strict=True)]
    return centre, np.mean(cuts, 0) if cuts else np.zeros((36, 36))


@lru_cache
def _silhouettes(shapes: tuple[str, ...]):
    """Each shape at each size as `_locate` finds it: name, size, (36, 36), centre less centre of mass (2)."""
    path = np.random.default_rng(0).uniform(28, 36, (16, 2))  # to average over fractions of a pixel
    names, sizes, images, offsets = [], [], [], []
    for shape, size in product(shapes, np.arange(17, 29.1, 0.5)):
        alpha, (window, where) = np.zeros((16, SIZE, SIZE)), coverage(shape, size, path)
        alpha[where] = window
        centre, image = _locate(_soften(alpha))
        names.append(shape)
        sizes.append(size)
        images.append(image)
        offsets.append((path - centre).mean(0))
    return names, sizes, np.array(images), np.array(offsets)


@lru_cache
def _courses(n: int) -> dict[str, np.ndarray]:
    """What a coordinate can do in n frames, (k, n) a motion, up to offset and scale."""
    t, turn = np.arange(n), np.arange(0, 1, 1 / 24)[:, None]
    cycle = lambda period: (t / period + turn) % 1
    flights = [2 * (2 * height / GRAVITY) ** 0.5 for height in range(14, 35, 2)]
    return {
        "slide": np.minimum(t, np.arange(4, max(n, 5))[:, None]),  # goes, then rests
        "bounce": np.concatenate([GRAVITY / 2 * f**2 * (cycle(f) ** 2 - cycle(f)) for f in flights]),
        "swing": np.concatenate([np.sin(2 * np.pi * cycle(period)) for period in range(30, 43, 3)]),
        "orbit": np.exp(2j * np.pi * t / np.arange(36, 61, 4)[:, None]),
    }


def fit_course(course: np.ndarray, path: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """Least squares of path (n,) on each course (k, n): residual and scale of the best, |scale| in bounds."""
    course = course - course.mean(1, keepdims=True)
    power = (np.abs(course) ** 2).sum(1) + 1e-9
    scale = course.conj() @ path / power
    residual = (np.abs(path) ** 2).sum() - np.abs(scale) ** 2 * power
    residual[(np.abs(scale) < low) | (np.abs(scale) > high)] = np.inf
    return residual.min(), scale[residual.argmin()]


def _motion(centre: np.ndarray) -> str | None:
    """The motion that fits centres (n, 2) best. Bounds on the scale: a slide is no part of a vast orbit."""
    seen = np.flatnonzero(~np.isnan(centre[:, 0]))
    if len(seen) < 8:
        return None
    x, y = (centre[seen] - centre[seen].mean(0)).T
    if np.ptp(np.quantile(centre[seen], (0.05, 0.95), axis=0), axis=0).max() < 1.5:
        return "still"
    course = {name: courses[:, seen] for name, courses in _courses(len(centre)).items()}
    across, along = fit_course(course["slide"], x, 0.2, 3), fit_course(course["slide"], y, 0.2, 3)
    drop = fit_course(course["bounce"], y, 0.5, 2)
    return min([
        (across[0] + y @ y, "right" if across[1] > 0 else "left"),
        (along[0] + x @ x, "down" if along[1] > 0 else "up"),
        (drop[0] + x @ x if drop[1] > 0 else np.inf, "bounce"),
        (fit_course(course["swing"], x, 4, 22)[0] + y @ y, "swing"),
        (fit_course(course["orbit"], x + 1j * y, 4, 20)[0], "clockwise"),
        (fit_course(course["orbit"], x - 1j * y, 4, 20)[0], "anticlockwise"),
    ])[1]  # fmt: skip


class Sight(NamedTuple):
    """The object as it is found in a chunk of n frames."""

    paint: np.ndarray  # (3,) its colour
    alpha: np.ndarray  # (n, 64, 64) how much of each pixel it covers
    centres: np.ndarray  # (n, 2)
    best: int  # which of `_silhouettes` it looks like


def _find(frames: np.ndarray, shapes: tuple[str, ...] = SHAPES) -> Sight | None:
    """Softened frames (n, 64, 64, 3) in 0..255 -> the object in them, None if there is none."""
    known = [_soften(background(place)[None].astype(np.float32))[0] for place in PLACES]
    wall = min(known, key=lambda b: np.minimum(np.abs(frames - b), 60).mean())
    excess = frames - wall
    excess -= np.median(excess, (1, 2), keepdims=True)  # a model's light may drift from frame to frame
    distance = (excess**2).sum(-1) ** 0.5
    peak = np.percentile(distance, 98.5)  # even a small star fills 3 % of the frame
    paint = np.median(frames[distance >= 0.75 * peak], 0)
    alpha = (excess * (paint - wall)).sum(-1) / ((paint - wall) ** 2).sum(-1)
    alpha = np.clip(alpha, 0, 1)
    centre, image = _locate(alpha)
    if peak < 40 or np.isnan(centre[:, 0]).mean() > 0.5:
        return None
    _, _, images, offsets = _silhouettes(shapes)
    overlap = np.minimum(images, image).sum((1, 2)) / np.maximum(images, image).sum((1, 2))
    best = overlap.argmax()
    if overlap[best] < 0.5:  # noise alone reaches 0.4, a shape under strong blur still 0.7
        return None
    return Sight(paint, alpha, centre + offsets[best], best)


def _judge_chunk(frames: np.ndarray, colours: dict, shapes: tuple[str, ...]):
    """Softened frames (n, 64, 64, 3) in 0..255 -> (colour, shape, motion) and centres (n, 2)."""
    if (sight := _find(frames, shapes)) is None:
        return (None, None, None), np.full((len(frames), 2), np.nan)
    # brightness, red - green, yellow - blue; brightness counts little, as generated colours fade
    opponent = np.array([[0.2, 0.7, 0.4], [0.2, -0.7, 0.4], [0.2, 0, -0.8]])
    colour = min(colours, key=lambda name: np.linalg.norm((sight.paint - colours[name]) @ opponent))
    return (colour, _silhouettes(shapes)[0][sight.best], _motion(sight.centres)), sight.centres


def judge(frames: np.ndarray, colours: dict = COLOURS, shapes: tuple[str, ...] = SHAPES) -> Verdict:
    """Reads the one object in frames (n, 64, 64, 3), uint8 or float in [0, 1]. ValueError for another size.

    Each 24 frames are judged alone, then they vote; a clip is "still" only if all chunks are, as slides end.
    colours, shapes: those to choose from, such as COLOURS | NEW_COLOURS and SHAPES + NEW_SHAPES.
    """
    frames = _readable(frames)
    parts = [_judge_chunk(frames[i : i + CHUNK], colours, shapes) for i in range(0, len(frames), CHUNK)]
    chunks, centres = zip(*parts, strict=True)
    votes = [Counter(name for name in names if name) for names in zip(*chunks, strict=True)]
    if len(votes[2]) > 1:
        del votes[2]["still"]
    first = [max(vote, key=vote.get, default=None) for vote in votes]
    return Verdict(*first, np.concatenate(centres), chunks)


def _readable(frames: np.ndarray) -> np.ndarray:
    """Frames as the judge wants them: float in 0..255, softened."""
    if frames.shape[1:] != (SIZE, SIZE, 3) or not len(frames):
        raise ValueError(f"frames of shape {frames.shape}; the judge reads (frames, {SIZE}, {SIZE}, 3)")
    return _soften(frames.astype(np.float32) * (1 if frames.dtype == np.uint8 else 255))


def flaws(frames: np.ndarray) -> tuple[float, float]:
    """How badly the object is drawn, whatever was asked for: (colour error, edge error), each a mean over the
    chunks that show one, NaN if none does.

    Colour error: distance of its paint from the nearest colour of the world, 0..255 per channel (rms). Edge
    error: its coverage against that of the ideal shape (the best of the judge's, at the judged place and
    size), the sum of differences over the ideal's area: 0 is perfect, a wrong or ragged outline adds to it.
    """
    frames, errors = _readable(frames), []
    for sight in filter(None, (_find(frames[i : i + CHUNK]) for i in range(0, len(frames), CHUNK))):
        shapes, sizes, _, _ = _silhouettes(SHAPES)
        seen = ~np.isnan(sight.centres[:, 0])
        ideal = np.zeros((seen.sum(), SIZE, SIZE))
        window, where = coverage(shapes[sight.best], sizes[sight.best], sight.centres[seen])
        ideal[where] = window
        ideal = _soften(ideal)
        near = ideal > 0
        near = _soften(_soften(near.astype(float))) > 0  # two pixels around it: stray spots are not its edge
        off = (np.abs(sight.alpha[seen] - ideal) * near).sum() / ideal.sum()
        paint = min(np.mean((sight.paint - np.array(c)) ** 2) ** 0.5 for c in COLOURS.values())
        errors.append((paint, off))
    return tuple(np.mean(errors, 0).tolist()) if errors else (float("nan"), float("nan"))


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


def sample_captions() -> list[str]:
    """Captions with every combination of words, for the tokenizer."""
    rng, texts = np.random.default_rng(0), []
    for triple in TRIPLES * 2:
        other = TRIPLES[rng.integers(len(TRIPLES))]
        texts.append(caption([triple], [other], [*PLACES][rng.integers(4)], rng))
        texts.append(caption([triple, other], rng=rng))
    return texts


def train_tokenizer(file: str, size: int = 256, words: list[str] | None = None, captions=None) -> None:
    """Writes a sentencepiece unigram model with T5's ids: pad 0, eos 1, unk 2, no bos. Always the same bytes.

    Captions outnumber the English, so that their words become single pieces; all of ascii is in, so that no
    English prompt meets unk. words and captions: of another world.
    """
    import sentencepiece  # here, since the world itself needs numpy alone

    # a piece must occur in two different words, and "red," is another word than "red"
    text = [*ENGLISH.strip().splitlines(), ", ".join(words or vocabulary()) + ","] * 4
    text += captions or sample_captions()
    with open(file, "wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_writer=out, model_type="unigram", vocab_size=size,
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, character_coverage=1.0,
            required_chars="".join(map(chr, range(33, 127))), num_threads=1, minloglevel=2,
        )  # fmt: skip


# --------------------------------------------------------------------------------------------- 7 command line


def check(clips: int = 200) -> None:
    """Prints how fast clips are made and how often the judge is right, on clean frames and spoilt ones."""
    start = time.perf_counter()
    truth = [make_clip(seed, pairs=0, heldout=None) for seed in range(clips)]
    seconds, rng = time.perf_counter() - start, np.random.default_rng(0)
    blur = lambda frames: _soften(_soften(frames))  # as good as a gaussian
    noise = lambda frames: frames + rng.normal(0, 10, frames.shape)
    tint = lambda frames: frames * rng.uniform(0.9, 1.1, 3) + rng.uniform(-10, 10, 3)
    spoilers = {
        "clean": lambda frames: frames,
        "blur, sigma 1.15 px": blur,
        "noise, sigma 10/255": noise,
        "tint, 10 % and 10/255": tint,
        "all three": lambda frames: noise(tint(blur(frames))),
    }
    print(f"{clips / seconds:.0f} clips of 96 frames a second; chunks that the judge gets right, in %:")
    print(f"{f'of {4 * clips}':<24}colour   shape  motion     all    centre off by, px: mean     max")
    for name, spoil in spoilers.items():
        right, off = [], []
        for clip in truth:
            verdict = judge(np.clip(spoil(clip.frames.astype(np.float32)), 0, 255).astype(np.uint8))
            right += [np.equal(*pair) for pair in zip(clip.things[0].seen(), verdict.chunks, strict=True)]
            off.append(np.hypot(*(verdict.centres - clip.things[0].path).T))
        rates = "".join(f"{100 * rate:8.2f}" for rate in [*np.mean(right, 0), np.all(right, 1).mean()])
        print(f"{name:<22}{rates}{np.mean(off):27.2f}{np.max(off):8.2f}")


def sheet(file: str, seeds=range(10), step: int = 8) -> None:
    """Writes a PNG: a clip a row, every `step`th frame at twice its size, a gap between chunks."""
    import imageio.v3 as imageio

    rows = []
    for seed in seeds:
        frames = make_clip(seed).frames[::step].repeat(2, 1).repeat(2, 2)
        gap = [((2, 2), (2 if i % (CHUNK // step) else 10, 2), (0, 0)) for i in range(len(frames))]
        rows.append(np.concatenate([*map(np.pad, frames, gap)], 1))
    imageio.imwrite(file, np.concatenate(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description="the tiny world: clips, captions, judge, tokenizer")
    parser.add_argument("--check", action="store_true", help="measure the speed and the judge")
    parser.add_argument("--sheet", metavar="FILE", help="write a contact sheet (PNG)")
    parser.add_argument("--tokenizer", metavar="FILE", help="train the tokenizer")
    args = parser.parse_args()
    if args.sheet:
        sheet(args.sheet)
    if args.tokenizer:
        train_tokenizer(args.tokenizer)
    if args.check:
        check()


if __name__ == "__main__":
    main()
