"""Train the small model on the richer world of scenes.py, stage by stage, as train.py does on world.py.

    vae    the video autoencoder, on crops first, then on whole frames -> OUT/scenes_vae/

A stage can be killed and goes on from --work; the data of a step depend on its number alone. To export a
checkpoint as it is, give the number of its step as --steps.

So far: 1,700 steps (4.6 million latents) on 2 EPYC cores that had much else to do; idle ones do 7,000 latents
a second. 34.8 dB on the 24 clips of the report (mean of clips 36.1), 36.4 dB on 24 others; rims still show a
faint fringe at 4x zoom. The goal is 38, so no weights are kept.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import MethodType

import numpy as np
import scenes
import torch
import torch.nn.functional as F
import train
from measure import psnr, to_video
from torch import Tensor, nn

import magi

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

    def loss_of_step(step: int):
        rng = np.random.default_rng([step, 8])
        if step < whole_from:
            length, loss = 12, fast  # one shape, compiled once
            video, mask, corners = pieces(step, args.clips, 3, args.crop, length)
            vae.encoder.corners = vae.decoder.corners = torch.from_numpy(corners)
        else:
            length, loss = int(rng.choice([12] * 6 + [8, 1])), reconstruction
            video, mask, _ = pieces(step, max(1, args.clips // 2), 1, scenes.SIZE, length)
            vae.encoder.corners = vae.decoder.corners = None
        generator = torch.Generator().manual_seed(step)
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
        with (args.work / "psnr.txt").open("a") as file:
            file.write(text + "\n")
        return text

    train.fit("vae", vae, loss_of_step, args.steps, args.lr, args.work, every=args.every, report=report)
    vae.encoder.corners = vae.decoder.corners = None
    train.standardise(vae, video)
    train.save_model(args.out / "scenes_vae", vae, {"vae": asdict(vae.cfg)})


def main() -> None:
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("stage", choices=["vae"])
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
    parser.add_argument("--compile", action="store_true", help="a quarter faster; takes a minute and g++")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    train_vae(args)


if __name__ == "__main__":
    main()
