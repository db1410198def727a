"""What the judge says of the small models: `python tiny/train.py eval` and `steps`.

Everything here is asked of captions and clips that training never shows: the judge in world.py reads colour,
shape, motion and position back from the frames. Shares are of the videos made.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path

import numpy as np
import torch
import world
from torch import Tensor

import magi

NAMES = ("colour", "shape", "motion")


def to_video(frames: np.ndarray) -> Tensor:
    """uint8 (..., frames, h, w, 3) -> float (..., 3, frames, h, w) in [-1, 1]."""
    return torch.from_numpy(frames).movedim(-1, -4).float() / 127.5 - 1


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two videos in [-1, 1]."""
    return (10 * torch.log10(4 / ((a.clamp(-1, 1) - b) ** 2).mean())).item()


def film(pipe: magi.MAGI, prompt, frames: int, seed: int, **settings) -> np.ndarray:
    """A whole video, uint8 (frames, height, width, 3)."""
    return np.concatenate(list(pipe(prompt, num_frames=frames, seed=seed, **settings)))


def right(verdict, wanted: world.Triple) -> list[bool]:
    return [getattr(verdict, name) == word for name, word in zip(NAMES, wanted, strict=True)]


def judge_prompts(
    pipe: magi.MAGI,
    prompts: list,
    num_frames: int = 48,
    colours: dict = world.COLOURS,
    judge=world.judge,
    **settings,
) -> dict[str, float]:
    """Share of prompts whose video shows the right colour, shape and motion, as the judge reads them."""
    hits = [
        right(judge(film(pipe, text, num_frames, seed, **settings), colours), wanted)
        for seed, (text, wanted) in enumerate(prompts)
    ]
    return dict(zip(NAMES, np.mean(hits, axis=0).tolist(), strict=True))


def judge_images(pipe: magi.MAGI, count: int) -> tuple[float, float]:
    """First frame against the input in dB; share of videos that move as the caption says. 48 frames each."""
    moving = [t for t in world.TRIPLES if world.held_out(*t) and t[2] != "still"]
    first, follow = [], []
    for i in range(count):
        triple = moving[i * 7 % len(moving)]
        clip = world.scene(*triple, [*world.PLACES][i % 4], 2, 1000 + i)
        video = film(pipe, clip.captions[0], 48, i, image=clip.frames[0])
        first.append(psnr(to_video(video[:1]), to_video(clip.frames[:1])))
        follow.append(world.judge(video).motion == triple[2])
    return float(np.mean(first)), float(np.mean(follow))


def judge_continuations(pipe: magi.MAGI, count: int) -> tuple[float, float]:
    """Mean distance in px of the object from where it truly goes in the next second, when the model has seen
    32 frames of it, and when it has seen only the last one. Slides and bounces; lost objects count 32 px."""
    off = {"video": [], "image": []}
    for i in range(count):
        motion = ("bounce", "left", "bounce", "right", "up", "down")[i % 6]
        colour, shape = [*world.COLOURS][i % 8], world.SHAPES[i % 5]
        clip = world.scene(colour, shape, motion, [*world.PLACES][i % 4], 3, 2000 + i)
        given, truth = clip.frames[:48], clip.things[0].path[48:72]
        for kind in off:
            seen = {"video": given} if kind == "video" else {"image": given[-1]}
            video = film(pipe, clip.captions[2], 24 + (kind == "image"), i, **seen)[-24:]
            distance = np.hypot(*(world.judge(video).centres - truth).T)
            off[kind].append(np.nan_to_num(distance, nan=32.0).mean())
    return float(np.mean(off["video"])), float(np.mean(off["image"]))


def judge_changes(pipe: magi.MAGI, count: int) -> float:
    """Share of videos whose caption changes at the second or third chunk and which change in that very chunk:
    the word that changes is read before it as it was, and in it as it has become."""
    rng, hits = np.random.default_rng(9), []
    while len(hits) < count:
        i, at = len(hits), int(rng.integers(1, 3))
        before = world.TRIPLES[rng.integers(len(world.TRIPLES))]
        which = int(rng.integers(3))
        new = rng.choice([*world.COLOURS]) if which == 0 else rng.choice(world.SHAPES) if which == 1 else (
            world.OPPOSITE.get(before[2], "still"))  # fmt: skip
        after = tuple(str(new) if k == which else word for k, word in enumerate(before))
        if after == before:
            continue
        captions = [world.caption([before])] * at + [world.caption([after], [before])]
        chunks = world.judge(film(pipe, captions, 24 * (at + 1), i)).chunks
        hits.append(chunks[at - 1][which] == before[which] and chunks[at][which] == after[which])
    return float(np.mean(hits))


def judge_long(pipe: magi.MAGI, count: int) -> float:
    """Share of 16-chunk videos whose colour and shape in the last chunk are those the caption names."""
    hits = []
    for i, (text, wanted) in enumerate(world.sample_prompts(count, seed=6)):
        hits.append(world.judge(film(pipe, text, 16 * 24, i)).chunks[-1][:2] == wanted[:2])
    return float(np.mean(hits))


def encode_once(pipe: magi.MAGI, t5: Path) -> None:
    """Keep the text encoder in memory, so that each of many short videos does not read it again."""
    encoder = functools.cache(magi.T5(t5, pipe.dit.cfg.text_length, dtype=torch.float32, keep=True).__call__)
    pipe.encode_text = lambda captions: encoder(tuple(captions))


def evaluate(args) -> None:
    """Print what the README states of the model in --model, with what it is held to."""
    say = lambda name, result: print(f"{name:<36}{result}", flush=True)
    pipe, n = magi.load(args.model or args.out / "base"), args.prompts
    encode_once(pipe, args.out / "t5")
    video = to_video(np.stack([world.make_clip(10**6 + i, chunks=1).frames for i in range(32)]))
    with torch.inference_mode():
        out = torch.cat([pipe.vae.decode(pipe.vae.encode(v[None])) for v in video])
    say("VAE reconstruction", f"{psnr(out, video):.1f} dB (goal 32)")
    prompts, unguided = world.sample_prompts(n, seed=1), dict(text_scales=(1.0,) * 5, prev_scales=(1.0,) * 5)
    runs = [("t2v", {}), ("t2v without guidance", unguided)]
    for name, settings in runs[: 1 if pipe.sampler.distilled else 2]:
        scores = judge_prompts(pipe, prompts, **settings)
        say(name, ", ".join(f"{k} {v:.0%}" for k, v in scores.items()) + " (goal 90 % each)")
    first, follow = judge_images(pipe, n)
    say("i2v", f"first frame {first:.1f} dB (goal 30), motion {follow:.0%} (goal 85 %)")
    video, image = judge_continuations(pipe, n // 2)
    say("v2v, path over the next second", f"off by {video:.1f} px (goal 2); from one image {image:.1f} px")
    say("change in the right chunk", f"{judge_changes(pipe, n):.0%} (goal 80 %)")
    say("16 chunks, as asked in the last one", f"{judge_long(pipe, max(1, n // 5)):.0%} (goal 80 %)")


def step_counts(args) -> None:
    """What fewer steps cost, in quality, and save, in time: a table (markdown) and a plot (PNG).

    Every row films the same held-out prompts from the same noise, 48 frames each. Time is that of the whole
    pipeline for a second of video, on this machine; `flaws` is of the shape that is there, right or wrong.
    """
    prompts, rows = world.sample_prompts(args.prompts, seed=1), []
    clips = [world.make_clip(10**6 + i, chunks=2, events=0, pairs=0) for i in range(len(prompts))]
    for folder, counts in (("base", (64, 32, 16, 8, 4)), ("distill", (64, 32, 16, 12, 8, 4))):
        if not (args.out / folder).is_dir():
            continue
        pipe = magi.load(args.out / folder)
        encode_once(pipe, args.out / "t5")
        if not rows:  # what the VAE alone does to true clips: no model behind it can do better
            with torch.inference_mode():
                decoded = [pipe.vae.decode(pipe.vae.encode(to_video(c.frames)[None]))[0] for c in clips]
            videos = [((v.clamp(-1, 1) + 1) * 127.5).byte().movedim(0, -1).numpy() for v in decoded]
            wanted = [c.things[0].seen()[0] for c in clips]
            rows.append(("true clips, VAE", None, *shares(videos, wanted), None))
        film(pipe, prompts[0][0], 24, 0)  # the first run is slower
        for n in counts:
            start = time.perf_counter()
            videos = [film(pipe, text, 48, seed, num_steps=n) for seed, (text, _) in enumerate(prompts)]
            seconds = (time.perf_counter() - start) / (2 * len(prompts))
            rows.append((folder, n, *shares(videos, [wanted for _, wanted in prompts]), seconds))
            print(*rows[-1], flush=True)
    if not rows:
        raise ValueError(f"no models in {args.out}: train them first, or give their folder with --out")
    show = lambda v, how: "" if v is None else format(v, how)
    cells = lambda row: [show(v, how) for v, how in zip(row, formats, strict=True)]
    formats = ("", "", ".0%", ".0%", ".0%", ".0%", ".1f", ".3f", ".2f")
    head = ("model", "steps", *NAMES, "all three", "colour error", "edge error", "s per s of video")
    lines = [head, ["---"] * len(head), *map(cells, rows)]
    table = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    kinds = len({triple for _, triple in prompts})
    table += f"\n{len(prompts)} prompts ({kinds} held-out combinations), two seconds each.\n"
    (args.out / "examples").mkdir(parents=True, exist_ok=True)
    (args.out / "examples" / "steps.md").write_text(table)
    print(table)
    plot_steps(rows, args.out / "examples" / "steps.png")


def shares(videos: list[np.ndarray], wanted: list) -> tuple[float, ...]:
    """Shares of videos with the right colour, shape, motion, all of them; mean colour and edge error."""
    hits = np.array([right(world.judge(v), w) for v, w in zip(videos, wanted, strict=True)])
    flaws = np.nanmean([world.flaws(v) for v in videos], axis=0)
    return (*hits.mean(0).tolist(), hits.all(1).mean().item(), *flaws.tolist())


def plot_steps(rows: list[tuple], file: Path) -> None:
    """Left: share of prompts followed in all three, over time per second of video. Right: edge error."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(1, 2, figsize=(9, 3.5))
    for folder, colour, where in (("base", "tab:grey", 6), ("distill", "tab:red", -14)):
        mine = [r for r in rows if r[0] == folder]
        for axis, value in zip(axes, (lambda r: 100 * r[5], lambda r: r[7]), strict=True):
            axis.plot([r[-1] for r in mine], [value(r) for r in mine], "o-", color=colour, label=folder)
            for r in mine:
                at = dict(xytext=(0, where), textcoords="offset points", ha="center")
                axis.annotate(r[1], (r[-1], value(r)), **at, color=colour)
    axes[1].axhline(rows[0][7], color="tab:blue", ls=":", label="true clips through the VAE")
    labels = ("colour, shape and motion all right, % of videos", "edge error of the shape")
    for axis, label in zip(axes, labels, strict=True):
        axis.set(xscale="log", xlabel="seconds per second of video; numbers: steps", title=label)
        axis.set_xticks(ticks := [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10], ticks)
        times = [r[-1] for r in rows[1:]]
        axis.set_xlim(0.8 * min(times), 1.3 * max(times)), axis.minorticks_off()
        axis.grid(alpha=0.3), axis.legend(loc="lower right")
    axes[0].set_ylim(min(50, 95 * min(r[5] for r in rows)), 103)
    axes[1].set_ylim(0, 1.15 * max(r[7] for r in rows))
    plt.savefig(file, dpi=100, bbox_inches="tight")
    plt.close()
