"""What the judge says of the small models: `python tiny/train.py eval`, `steps` and `phenomena`.

Clips have seeds that training never draws. Captions of text to video, long videos, steps, transitions and
drift are held-out combinations; the others may be any. What is called with a pipe makes videos with it and
returns figures: shares of the videos made, pixels, decibels, or rows of a table. A row is
a dict with the same names as the others.

Contents: 1 helpers, 2 the numbers of the README, 3 steps and time, 4 the phenomena of the report.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import world
from judge import burn, emergence, judge, layout_change, rigidity
from torch import Tensor

import magi
import outputs
import sample

NAMES = ("colour", "shape", "motion")
LOST = 64.0  # how far off a thing counts that is not there, in pixels

# -------------------------------------------------------------------------------------------------- 1 helpers


def to_tensor(frames: np.ndarray) -> Tensor:
    """uint8 (..., frames, h, w, 3) -> float (..., 3, frames, h, w) in [-1, 1]."""
    return torch.from_numpy(frames).movedim(-1, -4).float() / 127.5 - 1


def to_frames(video: Tensor) -> np.ndarray:
    """float (3, frames, h, w) in [-1, 1] -> uint8 (frames, h, w, 3)."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(0, -1).numpy()


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two videos in [-1, 1]."""
    return (10 * torch.log10(4 / ((a.clamp(-1, 1) - b) ** 2).mean())).item()


def load_model(folder: Path) -> magi.MAGI:
    """A small model as sample.py runs it: in bf16 where this CPU is fast at it. Its text encoder stays in
    memory, so that each of many short videos does not read it again."""
    pipe = magi.load(folder, dtype="bfloat16" if sample.bf16_is_fast("cpu") else None)
    t5 = magi.T5(folder.parent / "t5", pipe.dit.cfg.text_length, dtype=torch.float32, keep=True)
    encoder = functools.cache(t5.__call__)
    pipe.encode_text = lambda captions: encoder(tuple(captions))
    return pipe


def sample_video(pipe: magi.MAGI, prompt, frames: int, seed: int, **settings) -> np.ndarray:
    """A whole video, uint8 (frames, height, width, 3), computed as in sample.py."""
    with sample.arithmetic("cpu", "bfloat16"):
        return np.concatenate(list(pipe(prompt, num_frames=frames, seed=seed, **settings)))


def right(verdict, wanted: world.Triple) -> list[bool]:
    return [getattr(verdict, name) == word for name, word in zip(NAMES, wanted, strict=True)]


def mean(values) -> float:
    """Mean of the values that are known, NaN if none is."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def judge_prompts(
    pipe: magi.MAGI, prompts: list, num_frames: int = 48, judge=judge, **settings
) -> dict[str, float]:
    """Share of prompts whose video shows the right colour, shape and motion, as the judge reads them."""
    hits = [
        right(judge(sample_video(pipe, text, num_frames, seed, **settings)), wanted)
        for seed, (text, wanted) in enumerate(prompts)
    ]
    return dict(zip(NAMES, np.mean(hits, axis=0).tolist(), strict=True))


def seams(video: np.ndarray) -> float:
    """How much steeper frames are where the DiT's tokens meet, every 16 pixels, than within these: uint8
    (frames, height, width, 3) -> about 1 if that cannot be seen."""
    video = video.astype(np.float32)
    across, down = (np.abs(np.diff(video, axis=axis)).mean((0, 3)) for axis in (2, 1))
    slopes = np.stack([across.mean(0), down.mean(1)])  # (2, 127): square frames
    at = np.arange(1, video.shape[1]) % 16
    return float(slopes[:, at == 0].mean() / slopes[:, (at >= 4) & (at <= 12)].mean())


def score(videos: Sequence[np.ndarray], wanted: Sequence[world.Triple]) -> dict[str, float]:
    """Shares of videos with the right colour, shape, motion, and with all of them; their mean looks: IoU of
    a thing's mask from frame to frame, variation of its area, saturation of its paint, share of burnt pixels,
    seams of tokens.
    """
    hits = np.array([right(judge(v), w) for v, w in zip(videos, wanted, strict=True)])
    looks = [(*rigidity(v), *burn(v), seams(v)) for v in videos]
    found = dict(zip(NAMES, hits.mean(0).tolist(), strict=True)) | {"all three": hits.all(1).mean().item()}
    names = ("rigid IoU", "area variation", "saturation", "burnt", "seams")
    return found | {name: mean(column) for name, column in zip(names, zip(*looks, strict=True), strict=True)}


def distance(centres: np.ndarray, truth: np.ndarray) -> float:
    """Mean distance in px of two paths (n, 2) where the first is known; LOST unless more than half is."""
    off = np.hypot(*(centres - truth).T)
    return float(np.nanmean(off)) if np.isnan(off).mean() < 0.5 else LOST


# -------------------------------------------------------------------------------- 2 the numbers of the README


def judge_vae(vae: magi.VAE, count: int) -> float:
    """Peak signal-to-noise ratio over pieces of 12 frames of unseen clips."""
    clips = [world.make_clip(3 * 10**6 + i, heldout=None) for i in range(count)]
    video = to_tensor(np.stack([world.render(clip, 24, 36) for clip in clips]))
    with torch.inference_mode():
        return psnr(torch.cat([vae.decode(vae.encode(v[None])) for v in video]), video)


def judge_images(pipe: magi.MAGI, count: int) -> tuple[float, float]:
    """First frame against the input in dB; share of videos that move as the caption says. 48 frames each."""
    moving = [t for t in world.TRIPLES if world.held_out(*t) and t[2] != "still"]
    first, follow = [], []
    for i in range(count):
        triple = moving[i * 7 % len(moving)]
        clip = world.scene(*triple, [*world.PLACES][i % 4], 2, 1000 + i)
        video = sample_video(pipe, clip.captions[0], 48, i, image=clip.frames[0])
        first.append(psnr(to_tensor(video[:1]), to_tensor(clip.frames[:1])))
        follow.append(judge(video).motion == triple[2])
    return float(np.mean(first)), float(np.mean(follow))


def going_clip(i: int, motion: str) -> world.Clip:
    """A clip of three seconds in which something still moves in the last one."""
    colour, shape, place = [*world.COLOURS][i % 8], world.SHAPES[i % 5], [*world.PLACES][i % 4]
    for seed in range(2000 + i, 10**6, 1000):
        clip = world.scene(colour, shape, motion, place, 3, seed)
        if np.ptp(clip.things[0].path[48:], axis=0).max() > 12:
            return clip
    raise ValueError(f"no clip of motion {motion!r} goes on for three seconds")


def judge_continuations(pipe: magi.MAGI, count: int) -> list[dict]:
    """Distance in px of a thing from where it truly goes in the next second, when the model is given two
    seconds, or 32 frames as by default, which end within a chunk, or the last one alone: a row for slides and
    one for bounces."""
    off = {"slides": [], "bounces": []}
    for i in range(count):
        motion = ("bounce", "left", "bounce", "right", "bounce", "up", "bounce", "down")[i % 8]
        clip = going_clip(i, motion)
        before, truth = clip.frames[:48], clip.things[0].path[48:]
        given = {
            "after 48 frames": {"video": before, "prefix_frames": 48},
            "after 32 frames": {"video": before, "prefix_frames": 32},
            "after an image": {"image": before[-1]},
        }
        found = {}
        for name, how in given.items():
            video = sample_video(pipe, clip.captions[2], 24 + ("image" in how), i, **how)[-24:]
            found[name] = distance(judge(video).centres, truth)
        off["bounces" if motion == "bounce" else "slides"].append(found)
    return [{"motion": kind} | {name: mean(row[name] for row in rows) for name in rows[0]}
            for kind, rows in off.items()]  # fmt: skip


def judge_changes(pipe: magi.MAGI, count: int) -> dict[str, float]:
    """Of videos whose caption changes at the second or third chunk, the share that changes in that very
    chunk: the word that changes is read before it as it was, and in it as it has become. All, and by word."""
    rng, hits = np.random.default_rng(9), {name: [] for name in NAMES}
    while sum(map(len, hits.values())) < count:
        i, at = sum(map(len, hits.values())), int(rng.integers(1, 3))
        before = world.TRIPLES[rng.integers(len(world.TRIPLES))]
        which = int(rng.integers(3))
        turned = world.OPPOSITE.get(before[2], "still")
        new = str((rng.choice([*world.COLOURS]), rng.choice(world.SHAPES), turned)[which])
        after = tuple(new if k == which else word for k, word in enumerate(before))
        if after == before:
            continue
        captions = [world.caption([before])] * at + [world.caption([after], [before])]
        video = sample_video(pipe, captions, 24 * (at + 1), i)
        was, now = judge(video[: 24 * at]), judge(video[24 * at :])
        # a second alone may not tell a motion: the last bounces of a fall, a rise
        seen = (was.motion, now.motion) if which == 2 else (was.chunks[-1][which], now.chunks[-1][which])
        hits[NAMES[which]].append(seen == (before[which], after[which]))
    return {"all": mean(sum(hits.values(), []))} | {name: mean(found) for name, found in hits.items()}


def judge_long(pipe: magi.MAGI, count: int, chunks: int = 16) -> float:
    """Share of long videos whose colour and shape in the last chunk are those the caption names."""
    hits = []
    for i, (text, wanted) in enumerate(world.sample_prompts(count, seed=6)):
        hits.append(judge(sample_video(pipe, text, 24 * chunks, i)).chunks[-1][:2] == wanted[:2])
    return float(np.mean(hits))


def evaluate(args) -> None:
    """Print what the README states of the model --model, with what it is held to."""
    say = lambda name, result: print(f"{name:<36}{result}", flush=True)
    pipe, n = load_model(args.out / args.model), args.prompts
    say("VAE, unseen clips", f"{judge_vae(pipe.vae, min(n, 60)):.1f} dB (goal 38)")
    [found] = step_counts(pipe, n, [pipe.sampler.num_steps])
    say("t2v", ", ".join(f"{name} {found[name]:.0%}" for name in NAMES) + " (goal 95 % each)")
    rigid, area = found["rigid IoU"], found["area variation"]
    say("looks", f"rigid IoU {rigid:.3f} (goal 0.94), area varies by {area:.1%} (goal 3 %), slopes where "
        f"tokens meet {found['seams']:.2f} of those within (true clips: 1.02)")  # fmt: skip
    say("time", f"{found['s per s of video']:.2f} s for a second of video")
    first, follow = judge_images(pipe, n)
    say("i2v", f"first frame {first:.1f} dB (goal 34), motion {follow:.0%} (goal 90 %)")
    for row in judge_continuations(pipe, n):
        found = ", ".join(f"{name} {off:.1f} px" for name, off in row.items() if name != "motion")
        say(f"v2v, off in a second, {row['motion']}", f"{found} (goal 2)")
    say("change in the right chunk", f"{judge_changes(pipe, n)['all']:.0%} (goal 90 %)")
    say("16 chunks, as asked in the last one", f"{judge_long(pipe, max(1, n // 5)):.0%} (goal 95 %)")


# ------------------------------------------------------------------------------------------ 3 steps and time


COLUMNS = """\
Colour, shape and motion are the shares of videos in which the judge finds what the caption asks for, and "all
three" is the share in which it finds all of that. "Rigid IoU" says how well the outline of a thing fits that
of the next frame (1: exactly), "area variation" how much its size changes, "saturation" how strong its paint
is (0.9 in true clips), and "burnt" which share of the pixels beside things is at a limit, 0 or 255. "Seams"
says how much steeper frames are where the DiT's tokens meet (1.02 in true clips).
"""


def step_counts(pipe: magi.MAGI, count: int, steps: Sequence[int] = (64, 32, 16, 8, 4)) -> list[dict]:
    """What fewer steps cost, in quality, and save, in time: a row for each number of steps. All film the same
    held-out prompts from the same noise, 48 frames each; time is that of the whole pipeline, here."""
    prompts, rows = world.sample_prompts(count, seed=1), []
    sample_video(pipe, prompts[0][0], 24, 0)  # the first run is slower
    for n in steps:
        start = time.perf_counter()
        videos = [sample_video(pipe, text, 48, seed, num_steps=n) for seed, (text, _) in enumerate(prompts)]
        seconds = (time.perf_counter() - start) / (2 * count)
        found = score(videos, [wanted for _, wanted in prompts])
        rows.append({"steps": n} | found | {"s per s of video": seconds})
    return rows


def through_vae(vae: magi.VAE, count: int) -> dict[str, float]:
    """`score` of true clips, encoded and decoded: no model behind this VAE can do better."""
    clips = [world.make_clip(10**6 + i, 2, events=0, kind="alone") for i in range(count)]
    with torch.inference_mode():
        videos = [to_frames(vae.decode(vae.encode(to_tensor(c.frames)[None]))[0]) for c in clips]
    return score(videos, [c.things[0].triples[0] for c in clips])


def write_steps(args) -> None:
    """`step_counts` of base and distilled: a table (markdown) and a plot (PNG) in examples/."""
    rows = []
    for folder, steps in (("base", (64, 32, 16, 8, 4)), ("distill", (64, 32, 16, 12, 8, 4))):
        if (args.out / folder).is_dir():
            pipe = load_model(args.out / folder)
            rows = rows or [{"model": "true clips, VAE", "steps": ""} | through_vae(pipe.vae, args.prompts)]
            rows += [{"model": folder} | row for row in step_counts(pipe, args.prompts, steps)]
            print(*rows[-len(steps) :], sep="\n", flush=True)
    if not rows:
        raise ValueError(f"no models in {args.out}: train them first, or give their folder with --out")
    table = markdown(rows) + f"\n{args.prompts} held-out prompts, two seconds each. {COLUMNS}"
    (args.out / "examples").mkdir(parents=True, exist_ok=True)
    (args.out / "examples" / "steps.md").write_text(table)
    print(table)
    plot_steps(rows, args.out / "examples" / "steps.png")


def markdown(rows: list[dict]) -> str:
    """A table of rows, whose header is the longest row's names. Shares stand in per cent, NaN as nothing."""
    head = [*max(rows, key=len)]
    lines = [head, ["---"] * len(head), *([shown(name, row.get(name, "")) for name in head] for row in rows)]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


SHARES = (*NAMES, "all", "all three", "both things", "area variation", "burnt", "comes out", "right side",
          "colour kept", "shape kept")  # fmt: skip


def shown(name: str, value) -> str:
    """A cell of a table."""
    if not isinstance(value, float):
        return str(value)
    if np.isnan(value):
        return ""
    if name in SHARES:
        return f"{value:.1%}" if name in ("area variation", "burnt") else f"{value:.0%}"
    return f"{value:.3f}" if name in ("rigid IoU", "saturation") else f"{value:.2f}"


def plot_steps(rows: list[dict], file: Path) -> None:
    """Over the time for a second of video, left: share of prompts followed in all three; right: rigid IoU."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(1, 2, figsize=(9, 3.5))
    for folder, colour, where in (("base", "tab:grey", 6), ("distill", "tab:red", -14)):
        mine = [row for row in rows if row["model"] == folder]
        times = [row["s per s of video"] for row in mine]
        for axis, name in zip(axes, ("all three", "rigid IoU"), strict=True):
            values = [row[name] for row in mine]
            axis.plot(times, values, "o-", color=colour, label=folder)
            for row, x, y in zip(mine, times, values, strict=True):
                at = dict(xytext=(0, where), textcoords="offset points", ha="center")
                axis.annotate(row["steps"], (x, y), **at, color=colour)
    axes[1].axhline(rows[0]["rigid IoU"], color="tab:blue", ls=":", label="true clips through the VAE")
    titles = ("share of videos that are as asked", "rigid IoU")
    ticks = [0.25, 0.5, 1, 2, 4, 8, 16, 32]
    for axis, title in zip(axes, titles, strict=True):
        axis.set(xscale="log", xlabel="seconds per second of video; numbers: steps", title=title)
        axis.margins(0.08, 0.12)
        lowest, highest = axis.get_xlim()
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_xticks([], minor=True)
        axis.set_xlim(lowest, highest)
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right")
    plt.savefig(file, dpi=100, bbox_inches="tight")
    plt.close()


# ---------------------------------------------------------------------------- 4 the phenomena of the report

RANGES = {"none": (1, 1, 1, 1), "short": (2, 2, 2, 2), "as trained": (5, 4, 3, 2), "long": (8, 8, 8, 8)}


def guidance(pipe: magi.MAGI, count: int, weights: Sequence[float] = (1.0, 2.5, 5.0, 12.0)) -> list[dict]:
    """Captions are followed better with guidance, and too much of it burns: a row for each weight of the
    text, none first. "both things": of videos of two things, the share that shows both as asked."""
    prompts, pairs, rows = world.sample_prompts(count, seed=1), pair_prompts(count), []
    plain = dict(prev_scales=(1.0,) * 5, text_scales=(1.0,) * 5)
    later = pipe.sampler.text_scales[3:]
    runs = {"none": plain} | {f"{w:g}": dict(text_scales=(w,) * 3 + later) for w in weights}
    for name, settings in runs.items():
        videos = [sample_video(pipe, text, 48, seed, **settings) for seed, (text, _) in enumerate(prompts)]
        both = [
            wanted <= seen_things(sample_video(pipe, text, 48, seed, **settings))
            for seed, (text, wanted) in enumerate(pairs)
        ]
        found = score(videos, [wanted for _, wanted in prompts])
        rows.append({"guidance": name} | found | {"both things": float(np.mean(both))})
    return rows


def pair_prompts(count: int) -> list[tuple[str, set]]:
    """Captions of two things, each with the (colour, shape) of both."""
    clips = [
        world.make_clip(10**6 + i, 2, events=0, heldout=None, kind=world.PAIRS[i % 3]) for i in range(count)
    ]
    return [(clip.captions[0], {thing.triples[0][:2] for thing in clip.things}) for clip in clips]


def seen_things(video: np.ndarray) -> set:
    verdict = judge(video)
    return {(verdict.colour, verdict.shape), *verdict.others}


def hidden_clips(count: int) -> list[tuple[world.Clip, int, int]]:
    """Clips of something that passes behind a wall as fast as in training and is hidden for a whole chunk,
    with where that chunk ends (`given` frames) and the frame in which half of it is back."""
    found, seed, chunks = [], 4 * 10**6, 5
    while len(found) < count:
        clip = world.make_clip(seed, chunks, events=0, heldout=None, kind="wall")
        seed += 1
        thing, wall = clip.things[0], clip.wall
        away = np.abs(thing.path[:, 0] - wall.x)
        blank = np.flatnonzero(away.reshape(chunks, -1).max(1) < (wall.width - thing.size) / 2)
        is_out = away[-1] > (wall.width + 0.85 * thing.size) / 2  # all but its edge
        if len(blank) and is_out and abs(away[1] - away[0]) > 1:
            back = emergence(clip.masks()[0].sum((1, 2)))[1]
            found.append((clip, int(blank[-1] + 1) * world.CHUNK, back))
    return found


def hidden(pipe: magi.MAGI, count: int, ranges: dict[str, tuple[int, ...]] = RANGES) -> list[dict]:
    """What goes behind a wall comes out where and when it should only if the range reaches back to where
    it was seen, two chunks ago: a row for each range. "time": frames too early or late, "height": px too high
    or low, both medians over those that come out; "right side": where it was going, not whence it came."""
    rows, clips = [], hidden_clips(count)
    for name, kv_ranges in ranges.items():
        late, high, side = [], [], []
        for i, (clip, given, back) in enumerate(clips):
            before, path = clip.frames[:given], clip.things[0].path
            how = dict(video=before, prefix_frames=given, kv_ranges=kv_ranges)
            made = sample_video(pipe, clip.captions[-1], len(clip.camera) - given, i, **how)
            verdict = judge(np.concatenate([before, made]))
            when = emergence(verdict.area)
            if when is None or when[1] < given:
                continue
            late.append(abs(when[1] - back))
            out = verdict.centres[when[1] :]
            if not np.isnan(out).all():
                x, y = np.nanmean(out, axis=0)
                high.append(abs(y - path[back:, 1].mean()))
                side.append((x > clip.wall.x) == (path[-1, 0] > clip.wall.x))
        median = lambda values: float(np.median(values)) if values else float("nan")
        rows.append({"ranges": name, "comes out": len(late) / count, "right side": mean(side),
                     "time": median(late), "height": median(high)})  # fmt: skip
    return rows


def transitions(pipe: magi.MAGI, count: int) -> list[dict]:
    """A row for each video with a transition at its third second, and without: how much the layout
    changes there (0..255), how far the thing jumps in px (NaN: not seen), are colour and shape kept."""
    prompts = [p for p in world.sample_prompts(4 * count, seed=3) if p[1][2] not in ("fall", "still")]
    rows = []
    for i, (text, _) in enumerate(prompts[:count]):
        for kind in ("none", "cut", "restyle"):
            run = pipe.sampler if kind == "none" else magi.shot_transition(pipe.sampler, 2, kind)
            video = sample_video(pipe, text, 72, i, kv_ranges_at=run.kv_ranges_at)
            verdict = judge(video)
            _, (colour, shape, _), (new_colour, new_shape, _) = verdict.chunks
            rows.append({
                "transition": kind, "layout change": layout_change(video[24:48], video[48:]),
                "jump": float(np.hypot(*(verdict.centres[48] - verdict.centres[47]))),
                "colour kept": float(new_colour == colour is not None),
                "shape kept": float(new_shape == shape is not None),
            })  # fmt: skip
    return rows


def drift(pipe: magi.MAGI, count: int, seconds: int = 16,
          ranges: Sequence[str] = ("short", "as trained")) -> list[dict]:  # fmt: skip
    """What a long video keeps, by range: a row for each second, the mean over videos. "layout change" is
    from the first second, where the camera rests."""
    rows = []
    goes_on = ("bounce", "swing", "clockwise", "anticlockwise", "still")
    prompts = [(text, t) for text, t in world.sample_prompts(8 * count, seed=6) if t[2] in goes_on][:count]
    for name in ranges:
        found = []
        for i, (text, wanted) in enumerate(prompts):
            parts = np.split(sample_video(pipe, text, 24 * seconds, i, kv_ranges=RANGES[name]), seconds)
            hits = [right(judge(part), wanted)[:2] for part in parts]
            looks = [(*rigidity(part), burn(part)[0], layout_change(parts[0], part)) for part in parts]
            found.append(np.concatenate([hits, looks], axis=1))
        means = np.apply_along_axis(mean, 0, np.array(found))
        names = ("colour", "shape", "rigid IoU", "area variation", "saturation", "layout change")
        rows += [{"ranges": name, "second": second + 1} | dict(zip(names, values.tolist(), strict=True))
                 for second, values in enumerate(means)]  # fmt: skip
    return rows


def mean_rows(rows: list[dict], by: str) -> list[dict]:
    """One row for each value of `by`, with the means of the others."""
    means = []
    for value in dict.fromkeys(row[by] for row in rows):
        group = [row for row in rows if row[by] == value]
        others = {name: mean(row[name] for row in group) for name in group[0] if name != by}
        means.append({by: value} | others)
    return means


ABOUT = f"""\
What the report describes, measured with the small models by `python tiny/train.py phenomena`. Under each
table stands the number of its videos.

{COLUMNS}
- **changes**: the caption changes one word. Shares of the videos in which the judge sees that in the very
  chunk to which the new caption belongs.
- **drift**: long videos with K/V ranges of 2 ("short") and of 5, 4, 3, 2 ("as trained"). "Layout change"
  is the mean difference from the first second, in grey levels of 255, where neither second shows a thing.
- **guidance**: "none" has both weights 1, and a number is the weight of the text. "Both things" is the
  share of videos of two things that show both as asked.
- **hidden**: a thing is behind a wall for a whole second. "Comes out" is the share of videos in which it
  comes back, "right side" the share of those in which it does so where it was going. "Time" and "height"
  are how many frames too early or late and how many pixels too high or low that is (medians). The K/V
  ranges are 1 ("none"), 2 ("short"), 5, 4, 3, 2 ("as trained") and 8 ("long").
- **history**: how many pixels a thing is off, in the next second, from where it truly goes.
- **transitions**: one comes at the third second. "Layout change" is that from the second before, as in
  drift, and "jump" how many pixels the thing moves from the last frame to the next.
"""

PHENOMENA = {
    "guidance": guidance,
    "history": judge_continuations,
    "hidden": hidden,
    "transitions": lambda pipe, count: mean_rows(transitions(pipe, count), "transition"),
    "drift": drift,
    "changes": lambda pipe, count: [judge_changes(pipe, count)],
}


def phenomena(args) -> None:
    """The tables of the phenomena, all or --only some, for the model --model: printed, and kept in
    examples/phenomena.md, where a table takes the place of the last one of that name and model."""
    pipe = load_model(args.out / args.model)
    file = args.out / "examples" / "phenomena.md"
    file.parent.mkdir(parents=True, exist_ok=True)
    for name in args.only or [n for n in PHENOMENA if n != "guidance" or not pipe.sampler.distilled]:
        found = markdown(PHENOMENA[name](pipe, args.prompts)) + f"\n--prompts {args.prompts}\n"
        tables = read_tables(file) | {f"{name}, {args.model}": found}
        text = "".join(f"\n## {title}\n\n{table}" for title, table in sorted(tables.items()))
        outputs.replace(file, lambda new, text=text: new.write_text(ABOUT + text))
        print(f"\n{name}, {args.model}\n\n{found}", flush=True)


def read_tables(file: Path) -> dict[str, str]:
    """The tables of phenomena.md by title, such as "drift, base"; none if there is no file."""
    if not file.exists():
        return {}
    parts = (part.partition("\n\n") for part in file.read_text().split("## ")[1:])
    return {title: table.rstrip() + "\n" for title, _, table in parts}
