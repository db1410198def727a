"""The judge of the tiny world: what a program that does not know the captions finds in a video.

    frames --judge---------> Verdict: colour, shape, motion, centres, area, camera; of the clip, of each chunk
    frames --rigidity------> does a thing keep its outline?     frames --burn------> its colour?
    frames --layout_change-> is it the same scene?              area   --emergence-> when is it back?

Made for the output of a generative model, with soft edges, noise and colours a little off. Things are the
only strong colours (and the only white) in the world, so each pixel is asked which paint it shows, and how
much of it; no knowledge of the place is needed. Decisions pool a chunk of frames.

Contents: 1 judge, 2 measures, 3 command line (how often the judge is right on true clips, spoilt or not).
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import product
from typing import NamedTuple

import numpy as np
from world import (
    CHUNK,
    COLOURS,
    GRAVITY,
    SHAPES,
    SIZE,
    VIGNETTE,
    coverage,
    fall,
    make_clip,
    slide,
)

# ---------------------------------------------------------------------------------------------------- 1 judge


class Track(NamedTuple):
    """One thing as it is found in n frames."""

    colour: str
    shape: str | None  # None if it is never seen whole
    size: float  # width in pixels
    fit: float  # overlap of its silhouette with that of the shape, 1 at best
    alpha: np.ndarray  # (n, 128, 128) how much of each pixel shows it
    area: np.ndarray  # (n,) in pixels
    centres: np.ndarray  # (n, 2) centres (x, y), NaN in frames where it is hidden, or not whole


@dataclass(frozen=True)
class Verdict:
    """What the judge sees of one thing: that which covers most pixels at first, and then keeps its colour as
    long as there is such a thing. None where there is none, or where it is unclear."""

    colour: str | None
    shape: str | None
    motion: str | None
    centres: np.ndarray  # (frames, 2) centres on the screen, NaN where the thing is hidden or not whole
    area: np.ndarray  # (frames,) pixels of it that are seen
    camera: np.ndarray  # (chunks,) speed of the camera, px / frame, to the right
    chunks: tuple[tuple[str | None, str | None, str | None], ...]  # (colour, shape, motion) of each chunk
    others: tuple[tuple[str, str | None], ...]  # (colour, shape) of what else is there, most chunks first


def _soften(images: np.ndarray) -> np.ndarray:
    """3 x 3 mean over axes 1 and 2, where edge pixels are repeated."""
    for axis in (1, 2):
        images = np.moveaxis(images, axis, 0)
        total = images.copy(order="K")  # in place: new memory for each sum takes longer than the sum
        total[1:] += images[:-1]
        total[0] += images[0]
        total[:-1] += images[1:]
        total[-1] += images[-1]
        images = np.moveaxis(total, 0, axis)
    images /= 9
    return images


def _chroma(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) in 0..255 -> (..., 2): red - green and yellow - blue, 0 for greys."""
    red, green, blue = np.moveaxis(rgb, -1, 0)
    return np.stack([red - green, (red + green) / 2 - blue], -1)


def _paints(frames: np.ndarray, colours: dict) -> dict[str, np.ndarray]:
    """Softened frames (n, 128, 128, 3) -> for each colour how much of each pixel shows it (n, 128, 128).

    A paint in light and shadow keeps its direction in the plane of chroma, near which it must lie; white is
    what is bright without chroma.
    """
    red, green, blue = np.moveaxis(frames, -1, 0).copy()
    x, y = np.moveaxis(_chroma(frames), -1, 0).copy()
    out = {}
    pure = {name: _chroma(np.array(c, float)) for name, c in colours.items() if name != "white"}
    full = {name: math.hypot(*chroma) for name, chroma in pure.items()}
    # in place, as in _soften
    for name, chroma in pure.items():
        out[name] = x * float(chroma[0])
        out[name] += y * float(chroma[1])
        out[name] /= full[name]
    # neighbours such as red and orange meet halfway between their hues
    nearest = reduce(np.maximum, out.values())
    for name, part in out.items():
        is_nearest = part == nearest
        part /= full[name]
        part -= 0.22
        part /= 0.46
        np.clip(part, 0, 1, out=part)
        part *= is_nearest
    if "white" in colours:
        darkest = np.minimum(np.minimum(red, green), blue)
        out["white"] = np.clip((darkest - 140) / 60, 0, 1) * np.clip((60 - np.hypot(x, y)) / 25, 0, 1)
    return out


WIN = 64  # side of the window in which silhouettes are compared


def _place(alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, 128, 128) -> centre of mass (n, 2), NaN where there is little, and area (n,). Stray pixels go."""
    keep, grid = np.where(alpha > 0.4, alpha, 0), np.arange(SIZE) + 0.5
    for reach in (40, 32, 32):
        area = keep.sum((1, 2))
        mass = np.where(area > 60, area, np.nan)
        centre = np.stack([keep.sum(1) @ grid, keep.sum(2) @ grid], 1) / mass[:, None]
        near = np.abs(grid - np.nan_to_num(centre, nan=-999)[:, :, None]) < reach
        keep = keep * near[:, 0, None, :] * near[:, 1, :, None]
    return centre, keep.sum((1, 2))


def _cut(alpha: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """The windows (n, 64, 64) of alpha (n, 128, 128) whose middle is at centre, to the nearest pixel."""
    padded, corner = np.pad(alpha, ((0, 0), (WIN // 2,) * 2, (WIN // 2,) * 2)), np.rint(centre).astype(int)
    return np.stack([a[y : y + WIN, x : x + WIN] for a, (x, y) in zip(padded, corner, strict=True)])


SIZES = np.arange(24, 52.1, 1)


@lru_cache
def _silhouettes_of(shape: str) -> tuple[np.ndarray, np.ndarray]:
    """A shape at each of SIZES as `_place` and `_cut` find it: (64, 64), and centre less centre of mass (2).
    Averaged over fractions of a pixel."""
    path = np.random.default_rng(0).uniform(60, 68, (12, 2))
    images, offsets = [], []
    for size in SIZES:
        full = np.zeros((12, SIZE, SIZE), np.float32)
        alpha, where = coverage(shape, size, path)
        full[where] = alpha
        full = _soften(full)
        centre, _ = _place(full)
        images.append(_cut(full, centre).mean(0))
        offsets.append((path - centre).mean(0))
    return np.array(images), np.array(offsets)


@lru_cache
def _silhouettes(shapes: tuple[str, ...]):
    """Of all shapes at all sizes: name, size, (64, 64), centre less centre of mass (2)."""
    names = [shape for shape in shapes for _ in SIZES]
    images, offsets = (np.concatenate(part) for part in zip(*map(_silhouettes_of, shapes), strict=True))
    return names, np.tile(SIZES, len(shapes)), images, offsets


HIDDEN = 0.85  # share of a thing's largest area below which part of it is taken to be hidden


def _tracks(frames: np.ndarray, colours: dict, shapes: tuple[str, ...] = SHAPES) -> list[Track]:
    """What is in softened frames (n, 128, 128, 3), the largest first."""
    found = []
    names, sizes, images, offsets = _silhouettes(shapes)
    for colour, alpha in _paints(frames, colours).items():
        if np.quantile(alpha.sum((1, 2)), 0.9) < 250:  # the smallest ring has 450
            continue
        # two softenings: rims where paints mix are thin, and vanish
        solid = np.where(_soften(_soften(alpha)) > 0.45, alpha, 0)
        centre, area = _place(solid)
        most = np.quantile(area, 0.9)
        if most < 250:
            continue
        whole = (area > HIDDEN * most) & ~np.isnan(centre[:, 0])
        _, area = _place(alpha)
        whole &= np.abs(area - np.median(area[whole])) < 0.2 * np.median(area[whole])
        centres = np.full((len(frames), 2), np.nan)
        if not whole.any():
            continue
        mean = _cut(alpha[whole], centre[whole]).mean(0)
        overlap = np.minimum(images, mean).sum((1, 2)) / np.maximum(images, mean).sum((1, 2))
        best = overlap.argmax()
        centres[whole] = centre[whole] + offsets[best]
        shape = names[best] if overlap[best] > 0.55 else None
        found.append(Track(colour, shape, float(sizes[best]), float(overlap[best]), alpha, area, centres))
    return sorted(found, key=lambda track: -np.quantile(track.area, 0.9))


def _camera(frames: np.ndarray, tracks: list[Track]) -> float:
    """Speed of the camera in px / frame, from the ground below all horizons, beside what stands on it.

    Frames are moved back by what each speed would have moved them; the right one makes them agree.
    """
    pick = np.arange(0, len(frames), 3)
    rows = (frames[pick] / VIGNETTE)[:, 100:].mean(-1).reshape(len(pick), 7, 4, SIZE).mean(2)  # (n, 7, 128)
    clear, grid = np.ones((len(pick), SIZE), bool), np.arange(SIZE)
    for track in tracks:
        for i, columns in enumerate(track.alpha[pick].max(1) > 0.3):
            if columns.any():
                low, high = np.flatnonzero(columns)[[0, -1]]
                wide = 0.2 * (high - low) + 4  # its shadow
                clear[i] &= (grid < low - wide) | (grid > high + wide)
    rows = rows - np.median(rows, 2, keepdims=True)
    rows = rows.transpose(0, 2, 1).copy()  # (n, 128, 7), so that a column lies together
    time, frame, scores = pick - pick.mean(), np.arange(len(pick))[:, None], {}
    for speed in np.arange(-2, 2.01, 0.05).round(2):
        at = grid - speed * time[:, None]  # where the ground's column `grid` is seen in each frame
        low = np.clip(np.floor(at).astype(int), 0, SIZE - 2)
        valid = (at >= 0) & (at <= SIZE - 1) & clear[frame, low] & clear[frame, low + 1]
        left, right = rows[frame, low], rows[frame, low + 1]
        moved = left + (at - low)[..., None] * (right - left)
        # neighbours in time, and frames further apart
        apart = [np.abs(moved[k:] - moved[:-k])[valid[k:] & valid[:-k]] for k in (1, 4)]
        if min(map(len, apart)) > 60:
            scores[speed] = sum(np.minimum(a, 8).mean() for a in apart)
    if not scores:
        return 0.0
    best = min(scores, key=scores.get)
    return float(best) if scores[best] < 0.9 * scores.get(0.0, np.inf) else 0.0


@lru_cache
def _courses(n: int) -> dict[str, np.ndarray]:
    """What a coordinate can do in n frames, (k, n) a motion, up to offset and scale."""
    t, turn = np.arange(n), np.arange(0, 1, 1 / 30)[:, None]
    cycle = lambda period: (t / period + turn) % 1
    flights = [2 * (2 * height / GRAVITY) ** 0.5 for height in range(28, 84, 4)]
    later = np.arange(0, 97, CHUNK)[:, None] + t + 1.0
    drops = [height - np.stack([fall(row, height) for row in later]) for height in np.arange(20.0, 100, 4)]
    slides = [slide(t + 1.0 + began, 1.0, room) for began in (0, 30) for room in range(4, n + 30, 4)]
    ends = product((0.7, 1.1, 1.6), range(0, 120, 8), range(12, 110, 8))
    brakes = [slide(t + 1.0 + began, speed, room) for speed, began, room in ends]
    slides = [s for s in (*slides, *brakes, t.astype(float)) if np.ptp(s) > 0]
    return {
        "slide": np.array([s / np.ptp(s) for s in slides]),
        "bounce": np.concatenate([GRAVITY / 2 * f**2 * (cycle(f) ** 2 - cycle(f)) for f in flights]),
        "fall": np.concatenate([d[np.ptp(d, axis=1) > 1.5] for d in drops]),
        "swing": np.concatenate([np.sin(2 * np.pi * cycle(period)) for period in range(48, 66, 4)]),
        "orbit": np.exp(2j * np.pi * t / np.arange(60, 88, 4)[:, None]),
    }


def fit_course(course: np.ndarray, path: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """Least squares of path (n,) on each course (k, n): residual and scale of the best, |scale| in bounds."""
    course = course - course.mean(1, keepdims=True)
    power = (np.abs(course) ** 2).sum(1) + 1e-9
    scale = course.conj() @ path / power
    residual = (np.abs(path) ** 2).sum() - np.abs(scale) ** 2 * power
    residual[(np.abs(scale) < low) | (np.abs(scale) > high)] = np.inf
    return residual.min(), scale[residual.argmin()]


# A motion has more freedom than rest, so it must fit better than rest by so many square px a frame. The
# numbers were chosen on 600 true paths of one second: the judge tells 98.7 % of them, and 93.7 % where the
# centres are off by 1 px, smoothly, and three in ten are unknown.
FREEDOM = {"slide": 2.0, "bounce": 1.5, "fall": 1.5, "swing": 2.4, "orbit": 6.0}


def _motion(centre: np.ndarray) -> str | None:
    """The motion that fits centres (n, 2) best. Bounds on the scale: a slide is no part of a vast orbit."""
    seen = np.flatnonzero(~np.isnan(centre[:, 0]))
    if len(seen) < 8:
        return None
    x, y = (centre[seen] - centre[seen].mean(0)).T
    course = {name: courses[:, seen] for name, courses in _courses(len(centre)).items()}
    # scaled to 1 from end to end: a slide covers at least 4 px, and goes no faster than 3 px a frame
    across, along = (fit_course(course["slide"], u, 4, 3 * len(centre)) for u in (x, y))
    jump, drop = fit_course(course["bounce"], y, 0.75, 1.35), fit_course(course["fall"], y, 0.85, 1.15)
    loss = {name: len(seen) * freedom for name, freedom in FREEDOM.items()}
    return min([
        (x @ x + y @ y, "still"),
        (across[0] + y @ y + loss["slide"], "right" if across[1] > 0 else "left"),
        (along[0] + x @ x + loss["slide"], "down" if along[1] > 0 else "up"),
        (jump[0] + x @ x + loss["bounce"], "bounce"),
        (drop[0] + x @ x + loss["fall"], "fall"),
        (fit_course(course["swing"], x, 9, 56)[0] + y @ y + loss["swing"], "swing"),
        (fit_course(course["orbit"], x + 1j * y, 10, 46)[0] + loss["orbit"], "clockwise"),
        (fit_course(course["orbit"], x - 1j * y, 10, 46)[0] + loss["orbit"], "anticlockwise"),
    ])[1]  # fmt: skip


def _forget_parts(tracks: list[Track]) -> None:
    """Centres and shape are of things that are whole: partly behind something, they are unknown."""
    most, same = Counter(), Counter()
    for track in tracks:
        seen = np.quantile(track.area, 0.9)
        most[track.colour] = max(most[track.colour], seen)
        same[track[:2]] = max(same[track[:2]], seen)
    for track in tracks:
        track.centres[track.area < HIDDEN * same[track[:2]]] = np.nan
        if track.fit < 0.85 and np.quantile(track.area, 0.9) < 0.85 * most[track.colour]:
            track.centres[:] = np.nan


def judge(frames: np.ndarray, colours: dict = COLOURS, shapes: tuple[str, ...] = SHAPES) -> Verdict:
    """Reads frames (n, 128, 128, 3), uint8 or float in [0, 1]. ValueError for another size.

    Colour and shape are those of most chunks; the motion is that of the whole path, in the world: what the
    camera does is taken off. colours, shapes: those to choose from, such as SHAPES + NEW_SHAPES.
    """
    frames = readable(frames)
    parts = [frames[i : i + CHUNK] for i in range(0, len(frames), CHUNK)]
    tracks = [_tracks(part, colours, shapes) for part in parts]
    camera = np.array([_camera(part, found) for part, found in zip(parts, tracks, strict=True)])
    camera[np.abs(camera) < 0.13] = 0
    _forget_parts(sum(tracks, []))
    centres, area, paths, chunks, others = [], [], [], [], Counter()
    moved = 0.0  # by the camera, so far
    for part, found, speed in zip(parts, tracks, camera, strict=True):
        n = len(part)
        if found:  # the same as in the chunk before, if it is there, else the largest
            first = next((track for track in found if chunks and track.colour == chunks[-1][0]), found[0])
            path = first.centres + np.stack([speed * np.arange(1, n + 1), np.zeros(n)], 1)
            shape = None if np.isnan(path[:, 0]).all() else first.shape
            chunks.append((first.colour, shape, _motion(path)))
            centres.append(first.centres)
            area.append(first.area)
            paths.append(path + [moved, 0])
            others.update((track.colour, track.shape) for track in found if track is not first)
        else:
            chunks.append((None, None, None))
            centres.append(np.full((n, 2), np.nan))
            area.append(np.zeros(n))
            paths.append(centres[-1])
        moved += speed * n
    votes = [Counter(name for name in names if name) for names in zip(*chunks, strict=True)]
    colour, shape = (max(vote, key=vote.get, default=None) for vote in votes[:2])
    for i, part in enumerate(parts):
        if colour and not tracks[i]:  # too little of it to judge, but perhaps not gone
            area[i] = _place(_paints(part, colours)[colour])[1]
    motion = _motion(np.concatenate(paths))
    others = tuple(name for name, _ in others.most_common())
    return Verdict(
        colour, shape, motion, np.concatenate(centres), np.concatenate(area), camera, tuple(chunks), others
    )


def readable(frames: np.ndarray) -> np.ndarray:
    """Frames as the judge wants them: float32 in 0..255, softened."""
    if frames.shape[1:] != (SIZE, SIZE, 3) or not len(frames):
        raise ValueError(f"frames of shape {frames.shape}; the judge reads (frames, {SIZE}, {SIZE}, 3)")
    return _soften(frames.astype(np.float32) * (1 if frames.dtype == np.uint8 else 255))


# ------------------------------------------------------------------------------------------------- 2 measures
# These measure how a video looks, and the phenomena that the report describes.


def _shifted(image: np.ndarray, dx: float, dy: float) -> np.ndarray:
    """image (h, w) moved by a fraction of a pixel, bilinear."""
    for axis, d in ((1, dx), (0, dy)):
        other = np.roll(image, 1 if d > 0 else -1, axis)
        image = image + abs(d) * (other - image)
    return image


def rigidity(frames: np.ndarray, colours: dict = COLOURS) -> tuple[float, float]:
    """(IoU, variation) of the largest thing in a clip where nothing stands in front of it.

    IoU: of the mask of one frame, shifted for the best fit, with the next; variation: deviation of the area
    over its mean. A true clip has 0.98 to 0.99, and 0.002 to 0.02. NaN, NaN where nothing is found.
    """
    frames, overlaps, areas = readable(frames), [], []
    for i in range(0, len(frames), CHUNK):
        found = _tracks(frames[i : i + CHUNK], colours)
        if not found:
            continue
        centre, area = _place(found[0].alpha)
        whole = np.flatnonzero(area > 0.6 * np.median(area))
        centre = centre[whole]
        masks = _cut(found[0].alpha[whole], centre)
        rest = centre - np.rint(centre)
        areas.append(masks.sum((1, 2)).std() / masks.sum((1, 2)).mean())
        for j in np.flatnonzero(np.diff(whole) == 1):
            a, b = masks[j], masks[j + 1]
            dx, dy = rest[j + 1] - rest[j]
            fits = []
            for ex, ey in product((-0.3, 0, 0.3), repeat=2):
                u, v = np.clip((dx + ex) / 2, -1, 1), np.clip((dy + ey) / 2, -1, 1)
                p, q = _shifted(a, u, v), _shifted(b, -u, -v)  # halfway each: both as blurred
                fits.append(np.minimum(p, q).sum() / np.maximum(p, q).sum())
            overlaps.append(max(fits))
    if not overlaps:
        return float("nan"), float("nan")
    return float(np.mean(overlaps)), float(np.mean(areas))


def burn(frames: np.ndarray, colours: dict = COLOURS) -> tuple[float, float]:
    """(saturation, clipped): what too much guidance drives up.

    saturation: chroma of a thing's pixels over that of its pure paint, 0.9 in true clips, NaN if none has
    chroma; clipped: share of the pixels away from things of which a channel is at its limit, 0 in true clips.
    """
    if frames.dtype != np.uint8:
        frames = np.rint(frames * 255).astype(np.uint8)
    at_limit = ((frames == 0) | (frames == 255)).any(-1)
    soft, ratios = readable(frames), []
    paints = _paints(soft, colours)
    away = _soften(_soften(np.max([*paints.values()], 0))) < 0.05
    for name, alpha in paints.items():
        if name == "white" or (alpha > 0.8).sum() <= 100 * len(frames):  # most colours are not there
            continue
        solid = _soften(alpha) > 0.98  # rims are softer
        if solid.sum() > 100 * len(frames):
            full = np.hypot(*_chroma(np.array(colours[name], float)))
            ratios.append(np.hypot(*_chroma(soft[solid]).T).mean() / full)
    saturation = float(np.mean(ratios)) if ratios else float("nan")
    return saturation, float(at_limit[away].mean()) if away.any() else 1.0


def emergence(area: np.ndarray) -> tuple[int, int] | None:
    """(when it has gone, when it is back): the first frame with less than half of a thing's pixels, and the
    first after it with more than half again; None if it does not vanish or does not come back."""
    half = 0.5 * np.quantile(area, 0.95)
    gone = np.flatnonzero(area < half)
    if not len(gone):
        return None
    back = np.flatnonzero(area[gone[0] :] > half)
    return (int(gone[0]), int(gone[0] + back[0])) if len(back) else None


def layout_change(before: np.ndarray, after: np.ndarray, colours: dict = COLOURS) -> float:
    """How much the scene behind things differs between two pieces of a video with a camera at rest: mean
    difference of their median frames, 0..255, where neither shows a thing. A true clip has less than 0.1,
    the same layout generated again about 1."""
    pictures, clear = [], np.ones((SIZE, SIZE), bool)
    for part in (before, after):
        part = readable(part)
        things = np.max([alpha for alpha in _paints(part, colours).values()], 0)
        clear &= ~(_soften(_soften(things)).max(0) > 0.1)
        pictures.append(np.median(part, 0))
    clear[95:] = False  # shadows
    return float(np.abs(pictures[0] - pictures[1]).mean(-1)[clear].mean())


# --------------------------------------------------------------------------------------------- 3 command line


def spoilt(frames: np.ndarray, how: str, rng: np.random.Generator) -> np.ndarray:
    """uint8 frames as a model might make them: how is "clean", or names of what is done to them."""
    frames = frames.astype(np.float32)
    if "blur" in how:
        frames = _soften(_soften(frames))  # as good as a gaussian of 1.15 px
    if "tint" in how:
        frames = frames * rng.uniform(0.95, 1.05, 3) + rng.uniform(-5, 5, 3)
    if "noise" in how:
        frames = frames + rng.normal(0, 8, frames.shape)
    return np.clip(frames, 0, 255).astype(np.uint8)


def check(clips: int) -> None:
    """Prints how often the judge is right on true clips of one thing, two seconds each, and how far off."""
    truth = [make_clip(seed, 2, events=0, heldout=None, kind="alone") for seed in range(clips)]
    print(f"{f'of {clips} clips, in %':<20}colour   shape  motion    centre off by, px: mean     max")
    for how in ("clean", "blur", "tint", "noise", "blur tint noise"):
        right, off, rng = [], [], np.random.default_rng(0)
        for clip in truth:
            verdict, thing = judge(spoilt(clip.frames, how, rng)), clip.things[0]
            seen = verdict.colour, verdict.shape, verdict.motion
            right.append(np.equal(seen, thing.triples[0]))
            off.append(np.hypot(*(verdict.centres - thing.path).T))
        rates = "".join(f"{100 * rate:8.1f}" for rate in np.mean(right, 0))
        print(f"{how:<18}{rates}{np.nanmean(off):30.2f}{np.nanmax(off):8.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="how often the judge is right on true clips")
    parser.add_argument("--clips", type=int, default=100)
    check(parser.parse_args().clips)
