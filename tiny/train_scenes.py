"""Train the small model on the richer world of scenes.py, stage by stage, as train.py does on world.py.

    vae    the video autoencoder, on crops first, then on whole frames  -> OUT/vae/
    dit    text encoder and DiT together, on the latents of many clips  -> OUT/t5/, OUT/base/
    distill  three branches and many steps into one branch and few       -> OUT/distill/
    eval   what the judge says of OUT/base, of prompts never trained on

A stage can be killed and goes on from --work; the data of a step depend on its number alone, and on how many
processes share it: `torchrun --nproc_per_node 2 tiny/train_scenes.py dit ...` takes 0.82 of the time of one
process with two threads. To export a checkpoint as it is, give the number of its step as --steps.

So far: 4,600 steps of the VAE reach 38.1 dB on 60 unseen clips and 36.4 dB on the 24 harder ones of its
report; fast rings show a faint fringe. After 9,420 steps of the DiT at half size and 10,000 of 16 chunks at
full size, all of 40 videos have the right colour, 35 the shape, 31 the motion, so no weights are kept yet.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import MethodType
from typing import NamedTuple

import numpy as np
import scenes
import torch
import torch.nn.functional as F
import train
from measure import encode_once, judge_prompts, psnr, right, to_video
from torch import Tensor, nn

import magi
import outputs
import parallel
import training

GRID = scenes.SIZE // 8  # latents in a row of the frame


# ------------------------------------------------------------------------------------------------ data


def pieces(step: int, clips: int, crops: int, size: int, length: int):
    """`crops` squares of `size` pixels out of `length` frames of each of the step's own clips.

    Returns (clips * crops, 3, length, size, size) in [-1, 1], the things' masks (..., 1, ...) and where each
    square starts (clips * crops, 2), y and x, in latents. All but one square a clip are at a thing: there a
    square of 48 pixels has rims in half of its patches, the whole frame in a tenth.
    """
    video, masks, corners = [], [], []
    rng = np.random.default_rng([step, 7])
    for k in range(clips):
        clip = scenes.make_clip(step * 8 + k)
        start = int(rng.integers(0, len(clip.camera) - length + 1))
        frames = scenes.render(clip, start, start + length)
        mask = clip.masks(start, start + length).max(0)
        for i in range(crops):
            corner = rng.integers(0, GRID - size // 8 + 1, 2)
            if i:
                path = clip.things[rng.integers(len(clip.things))].path[start + length // 2, ::-1]
                corner = np.rint((path + rng.uniform(-14, 14, 2) - size / 2) / 8).astype(int)
                corner = np.clip(corner, 0, GRID - size // 8)
            y, x = corner * 8
            video.append(frames[:, y : y + size, x : x + size])
            masks.append(mask[:, y : y + size, x : x + size])
            corners.append(corner)
    return to_video(np.stack(video)), torch.from_numpy(np.stack(masks))[:, None], np.stack(corners)


def near(mask: Tensor) -> Tensor:
    """The masks (B, 1, frames, h, w), two pixels wider."""
    return F.max_pool3d(mask, (1, 5, 5), 1, (0, 2, 2))


# ------------------------------------------------------------------------------------------------ VAE


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """magi.attention written out: at these sizes a CPU takes less time for it, for its backward above all."""
    q, k, v = (u.transpose(1, 2) for u in (q, k, v))
    return ((q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).softmax(-1).to(v) @ v).transpose(1, 2)


def see_crops(part: nn.Module) -> None:
    """Let encoder or decoder take crops: part.corners (B, 2) says where each lies, so that it has the
    positions of that place. None: whole frames."""
    whole = part.positions

    def positions(self, size):
        if self.corners is None:
            return whole(size)
        T, H, W = size
        y = self.corners[:, :1] + torch.arange(H)  # (B, H)
        x = self.corners[:, 1:] + torch.arange(W)
        index = (torch.arange(T)[:, None, None] * GRID + y[:, None, :, None]) * GRID + x[:, None, None, :]
        index = F.pad(1 + index.flatten(1), (1, 0))  # the class token first
        return whole((T, GRID, GRID))[0][index]

    part.corners = None
    part.positions = MethodType(positions, part)


def reconstruction(vae: magi.VAE, video: Tensor, weight: Tensor, noise: Tensor, edge: float):
    """The VAE's loss and its mean square error. noise (B,): on latents, in deviations of a channel."""
    mean, logvar = (u.float() for u in vae.moments(video))
    deviation = mean.detach().std(dim=(0, 2, 3, 4), keepdim=True)
    spread = (logvar.exp() + (noise.view(-1, 1, 1, 1, 1) * deviation) ** 2).sqrt()
    recon = vae.decoder(mean + spread * torch.randn_like(mean))[:, :, : video.shape[2]]
    error = recon.float() - video
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    across = (weight[..., 1:] * error.diff(dim=-1).abs()).mean()  # ringing and soft rims are slopes that
    down = (weight[..., 1:, :] * error.diff(dim=-2).abs()).mean()  # the original does not have
    square = error**2
    loss = (weight * (error.abs() + 2 * square)).mean() + edge * (across + down) + 1e-6 * kl
    return loss, square.detach().mean()


def train_vae(args) -> None:
    torch.manual_seed(0)
    cfg = magi.VAEConfig(
        video_size=scenes.SIZE, video_length=12, embed_dim=args.dim, depth=args.depth, num_heads=4,
        use_final_proj=True,
    )  # fmt: skip
    vae = magi.VAE(cfg)
    vae.ops = replace(train.CPU_OPS, name="few tokens", attention=attention)
    for conv in (vae.encoder.patch_embed, vae.decoder.last_layer):
        train.no_autocast(conv)
    see_crops(vae.encoder)
    see_crops(vae.decoder)
    fast = torch.compile(reconstruction, dynamic=False) if args.compile else reconstruction
    whole_from = args.whole * args.steps

    def loss_of_step(i: int):
        step = i // parallel.ranks()
        rng = np.random.default_rng([step, 8])  # alike in all processes, so that none waits for another
        if step < whole_from:
            length, loss = 12, fast  # one shape, compiled once
            video, mask, corners = pieces(i, args.clips, 3, args.crop, length)
            vae.encoder.corners = vae.decoder.corners = torch.from_numpy(corners)
        else:
            length, loss = int(rng.choice([12] * 6 + [8, 1])), reconstruction
            video, mask, _ = pieces(i, max(1, args.clips // 2), 1, scenes.SIZE, length)
            vae.encoder.corners = vae.decoder.corners = None
        generator = torch.Generator().manual_seed(i)
        noise = (args.noise if step < whole_from else 0.4 * args.noise) * torch.rand(
            len(video), generator=generator
        ) ** 2
        with train.autocast():
            value, square = loss(vae, video, 1 + 3 * near(mask), noise, args.edge)
        return value, {"psnr": (10 * torch.log10(4 / square)).item()}

    test = [scenes.make_clip(10**6 + i, heldout=None) for i in range(24)]
    video = to_video(np.stack([scenes.render(clip, 36, 48) for clip in test]))
    mask = near(torch.from_numpy(np.stack([clip.masks(36, 48).max(0) for clip in test]))[:, None])

    @torch.no_grad()
    def report() -> str:
        vae.encoder.corners = vae.decoder.corners = None
        with train.autocast():
            out = torch.cat([vae.decode(vae.encode(v[None])).float() for v in video]).clamp(-1, 1)
        square = (out - video) ** 2
        each = 10 * torch.log10(4 / square.mean((1, 2, 3, 4)))
        inside = 10 * torch.log10(4 * 3 * mask.sum() / (square * mask).sum())
        text = f"{time.strftime('%H:%M')} PSNR {psnr(out, video):.2f} dB, "
        text += f"mean of clips {each.mean():.2f}, worst {each.min():.2f}, on things {inside:.2f}"
        if parallel.rank() == 0:
            with (args.work / "psnr.txt").open("a") as file:
                file.write(text + "\n")
        return text

    train.fit("vae", vae, loss_of_step, args.steps, args.lr, args.work, every=args.every, report=report)
    vae.encoder.corners = vae.decoder.corners = None
    train.standardise(vae, video)
    if parallel.rank() == 0:
        train.save_model(args.out / "vae", vae, {"vae": asdict(vae.cfg)})


# ------------------------------------------------------------------------------------------------ text + DiT


def preset(size: int) -> magi.Preset:
    tiny = magi.PRESETS["tiny"]
    shape = dict(num_layers=6, hidden_size=256, num_heads=4, num_kv_heads=2, head_dim=64, ffn_size=1024)
    return magi.Preset(replace(tiny.dit, **shape), replace(tiny.sampler, height=size, width=size))


def tokenizer(folder: Path) -> Path:
    """The tokenizer's file, made if it is not there."""
    file = folder / "t5" / "spiece.model"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        captions = sum((scenes.make_clip(seed, heldout=None).captions for seed in range(1000)), ())
        train.world.train_tokenizer(str(file), 288, train.world.vocabulary(scenes.words()), captions)
    return file


class Film(NamedTuple):
    frames: np.ndarray  # (24 n, size, size, 3) uint8
    things: np.ndarray  # (24 n, size, size), how much of each pixel shows a thing
    captions: tuple[str, ...]  # n


def film(seed: int, chunks: int, size: int) -> Film:
    """The first chunks of a clip; of one clip in six they are followed, after a cut, by those of another.
    Of clips of one chunk three in five show one thing alone, since nothing but these shows all motions."""
    more = chunks == 1 and seed % 5 < 2
    clip, n = scenes.make_clip(seed, kind="alone" if more else ""), chunks
    if chunks > 1 and seed % 6 == 0:
        n = 1 + seed // 6 % (chunks - 1)
    frames, things = scenes.render(clip, 0, 24 * n), clip.masks(0, 24 * n).max(0)
    if size < scenes.SIZE:
        frames = np.rint(halved(frames)).astype(np.uint8)
        things = halved(things)
    first = Film(frames, things, clip.captions[:n])
    if n == chunks:
        return first
    then = film(seed + 10**8 + 1, chunks - n, size)
    both = [np.concatenate(pair) for pair in zip(first[:2], then[:2], strict=True)]
    return Film(*both, first.captions + then.captions)


def halved(images: np.ndarray) -> np.ndarray:
    """(n, 2 h, 2 w, ...) -> (n, h, w, ...): the mean of two by two pixels, float."""
    n, h, w = images.shape[:3]
    return images.reshape(n, h // 2, 2, w // 2, 2, *images.shape[3:]).mean((2, 4), dtype=np.float32)


def see_size(vae: magi.VAE, size: int) -> None:
    """Let the VAE take frames of this size: smaller ones have the positions of the frame's middle."""
    middle = (scenes.SIZE - size) // 16
    for part in (vae.encoder, vae.decoder):
        see_crops(part)
        part.corners = torch.full((1, 2), middle) if middle else None


class Films:
    """Latents of the films 0, 1, 2, ..., made as they are first needed and kept in files of --work.
    Of n processes each makes and draws every n-th file."""

    def __init__(self, vae: magi.VAE, chunks: int, per_file: int, args):
        self.vae, self.per_file, self.work = vae, per_file, args.work / f"films{args.size}_{chunks}"
        self.make, workers = partial(film, chunks=chunks, size=args.size), args.workers
        self.pool = ProcessPoolExecutor(workers) if workers else None
        self.files: list[dict] = []
        self.work.mkdir(parents=True, exist_ok=True)

    def draw(self, rng: np.random.Generator, count: int, of: int) -> dict:
        """`count` of this process's first `of` films: latents (count, 16, 6 n, h, w); images, the fourth
        frame alone as an image is encoded (count, 16, 1, h, w); where things are (count, 1, 6 n, h, w);
        captions."""
        while len(self.files) * self.per_file < of:
            self.files.append(self.read(parallel.rank() + len(self.files) * parallel.ranks()))
        picks = [divmod(i, self.per_file) for i in rng.integers(0, len(self.files) * self.per_file, count)]
        pick = lambda name: [self.files[i][name][k] for i, k in picks]
        stack = lambda name: torch.stack(pick(name)).float()
        names = ("latents", "images", "things")
        return {name: stack(name) for name in names} | {"captions": pick("captions")}

    def read(self, index: int) -> dict:
        file = self.work / f"{index:04d}.pt"
        if not file.exists():
            seeds = range(index * self.per_file, (index + 1) * self.per_file)
            films = (self.pool.map if self.pool else map)(self.make, seeds)
            outputs.replace(file, partial(torch.save, self.encode(films)))
        return torch.load(file, weights_only=True)

    @torch.no_grad()
    def encode(self, films: Iterable[Film]) -> dict:
        latents, images, things, captions = [], [], [], []
        device = next(self.vae.parameters()).device
        for some in batched(films, 8):
            video = to_video(np.stack([f.frames for f in some])).to(device)
            with train.autocast(device.type):
                latents.append((self.vae.encode(video) * magi.SCALE_FACTOR).bfloat16().cpu())
                images.append((self.vae.encode(video[:, :, 3:4]) * magi.SCALE_FACTOR).bfloat16().cpu())
            masks = torch.from_numpy(np.stack([f.things for f in some])).float()
            things.append(F.max_pool3d(masks[:, None], (4, 8, 8)) > 0.5)
            captions += [list(f.captions) for f in some]
        latents, images, things = (torch.cat(u) for u in (latents, images, things))
        return {"latents": latents, "images": images, "things": things, "captions": captions}


def batched(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while some := list(islice(items, size)):
        yield some


def draw(films: Films, rng: np.random.Generator, n: int, count: int, of: int, model: train.Tiny) -> dict:
    """The first n chunks of `count` films, as the losses of training.py take them."""
    data, part = films.draw(rng, count, of), slice(n * magi.CHUNK)
    device = model.dit.null_text.device
    # The films have no end of their own, so how much is left is drawn: every duration token gets trained.
    text, mask = model.text([c[:n] for c in data["captions"]], rng.integers(n, 12, count).tolist())
    return {
        "latents": data["latents"][:, :, part].to(device),
        "text": text,
        "text_mask": mask,
        "images": data["images"].to(device),
        "weight": 1 + 2 * data["things"][:, :, part].to(device),
    }


def train_dit(args) -> None:
    """Half the size first (--size 64), where a step shows four times as many clips, then the whole (--init).

    Chunks alone first: with a history to copy from, captions are learned four times slower. Later more and
    more often two or four in a row, which teach histories, continuations and changes at a boundary.
    """
    torch.manual_seed(1)
    vae = magi.load_vae(args.out / "vae").to(args.device)
    see_size(vae, args.size)
    pieces = parallel.from_first(tokenizer)(args.out)
    model = train.Tiny(preset(args.size), scenes, pieces).to(args.device)
    if args.init:
        model.load(args.init)
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # a shape for each number of chunks
        for layer in model.dit.layers:
            layer.compile()
    singles, films = Films(vae, 1, 256, args), Films(vae, 4, 64, args)
    batch_size = args.batch // parallel.ranks()
    # What moves how is decided below t = 0.1, where the report's law puts 1 draw in 70: most clips take the
    # sampler's own times instead.
    together = training.TrainingConfig(pipeline_share=0.8)
    alone = replace(together, video_share=0.0)

    def loss_of_step(i: int):
        step = i // parallel.ranks()
        rng, done = np.random.default_rng([step, 10]), step / args.steps  # alike in all processes
        several = 0.35 if args.init else np.clip(2 * done - 0.2, 0, 0.6)
        n = int(rng.choice([2, 4])) if rng.random() < several else 1
        rng = np.random.default_rng([i, 11])
        shown = batch_size * step  # chunks so far, each about sixteen times
        if n > 1:
            batch = draw(films, rng, n, batch_size // n, min(args.films, 128 + shown // 64), model)
        else:
            batch = draw(singles, rng, 1, batch_size, min(args.singles, 512 + shown // 16), model)
        generator = torch.Generator().manual_seed(i)
        cfg = alone if n == 1 else together
        with train.autocast(args.device):
            loss = training.flow_matching_loss(
                model.dit, **batch, cfg=cfg, sampler=model.sampler, generator=generator
            )
        return loss, {"chunks": n}

    prompts, scale = scenes.sample_prompts(24, seed=5, heldout=None), scenes.SIZE // args.size
    judge = lambda frames, colours: scenes.judge(frames.repeat(scale, 1).repeat(scale, 2), colours)

    def report() -> str:
        with torch.compiler.set_stance("force_eager"):  # each new shape would be compiled
            scores = judge_prompts(model.pipeline(vae), prompts, 24, judge=judge)
        return f"{time.strftime('%H:%M')} " + ", ".join(f"{k} {v:.0%}" for k, v in scores.items())

    train.fit(
        f"dit{args.size}",
        model,
        loss_of_step,
        args.steps,
        args.lr,
        args.work,
        every=args.every,
        report=report,
    )
    if parallel.rank() == 0:
        model.save(args.out)


def distill(args) -> None:
    """The base model teaches a copy of itself, as in train.py: one branch, few steps instead of many.
    Text encoder, special tokens and VAE stay as they are."""
    torch.manual_seed(2)
    vae = magi.load_vae(args.out / "vae").to(args.device)
    see_size(vae, args.size)
    model = train.Tiny(preset(args.size), scenes, tokenizer(args.out))
    model.load(args.out)
    model.requires_grad_(False).to(args.device)
    student = copy.deepcopy(model.dit).requires_grad_()
    sampler = replace(model.sampler, distilled=True, num_steps=8)
    films = Films(vae, 4, 64, args)

    def loss_of_step(i: int):
        step = i // parallel.ranks()
        num_steps = training.shortcut_steps(step)
        n = int(np.random.default_rng([step, 12]).choice([1, 2, 3, 4], p=[0.3, 0.15, 0.15, 0.4]))
        rng = np.random.default_rng([i, 13])
        batch = draw(films, rng, n, args.batch // parallel.ranks() // n, args.films, model)
        generator = torch.Generator().manual_seed(i)
        with train.autocast(args.device):
            loss = training.shortcut_loss(
                student, model.dit, **batch, num_steps=num_steps, sampler=model.sampler, generator=generator
            )
        return loss, {"steps": num_steps}

    train.fit("distill", student, loss_of_step, args.steps, args.lr, args.work, every=args.every)
    config = {"dit": asdict(student.cfg), "sampler": asdict(sampler)}
    tokens = {name: token.detach() for name, token in model.tokens.items()}
    if parallel.rank() == 0:
        train.save_model(args.out / "distill", student, config, special_tokens=tokens)


def evaluate(args) -> None:
    """What the judge says of a model in OUT: captions followed, and how rigid the things are."""
    pipe = magi.load(args.out / args.model)
    encode_once(pipe, args.out / "t5")
    rows = []
    for seed, (text, wanted) in enumerate(scenes.sample_prompts(args.prompts, seed=1)):
        video = np.concatenate(list(pipe(text, num_frames=48, seed=seed)))
        rows.append([*right(scenes.judge(video), wanted), *scenes.rigidity(video)])
    shares = np.nanmean(np.array(rows, float), 0)
    print("colour {:.0%}, shape {:.0%}, motion {:.0%}; rigid IoU {:.3f}, area {:.1%}".format(*shares))


STAGES = {"vae": train_vae, "dit": train_dit, "distill": distill, "eval": evaluate}


def main() -> None:
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("stage", choices=[*STAGES])
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and loss curves")
    parser.add_argument("--out", type=Path, required=True, help="where the finished model goes")
    parser.add_argument("--steps", type=int, default=20000, help="rates fall in the last third of them")
    parser.add_argument("--every", type=int, default=100, help="steps from checkpoint to checkpoint")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--clips", type=int, default=7, help="clips a step, at most 8, each with three crops")
    parser.add_argument("--crop", type=int, default=48, help="side of the crops in pixels")
    parser.add_argument("--noise", type=float, default=0.1, help="on latents, at most, in deviations")
    parser.add_argument("--edge", type=float, default=0.5, help="weight of errors in neighbours' differences")
    parser.add_argument("--whole", type=float, default=0.9, help="share of the steps that see crops only")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32, help="of the DiT: chunks of all processes")
    parser.add_argument("--size", type=int, default=scenes.SIZE, choices=[64, 128], help="of frames, for dit")
    parser.add_argument("--init", type=Path, help="dit: go on from the weights in this folder")
    parser.add_argument("--singles", type=int, default=40000, help="clips of one chunk, of each process")
    parser.add_argument("--films", type=int, default=4000, help="clips of four chunks, of each process")
    parser.add_argument("--prompts", type=int, default=100, help="of eval")
    parser.add_argument("--model", default="base", help="of eval: base or distill")
    parser.add_argument("--device", default="cpu", help="of the DiT's training")
    parser.add_argument("--workers", type=int, default=0, help="processes that paint clips; 0: this one")
    parser.add_argument("--compile", action="store_true", help="a quarter faster; takes a minute and g++")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    parallel.start(args.device)
    least = 4 * parallel.ranks()  # a clip of four chunks for each process
    magi.require(args.batch % least == 0, f"--batch {args.batch} must be a multiple of {least}")
    with parallel.first_speaks():
        STAGES[args.stage](args)


if __name__ == "__main__":
    main()
    parallel.leave(0)
