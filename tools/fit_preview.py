"""Fit the previews of a VAE, with which live.py shows what a chunk will be while it still is noise.

    python tools/fit_preview.py --model tiny/distill --prompt "a red ball bounces" --prompt "a star swings"

To be done once for a new VAE; sample.py's flags for size, sampling and model work, too.
A matrix turns the 16 channels of a latent and a one into the mean colour of the 4 x 8 x 8 pixels that it
stands for. It is fitted by least squares to two seconds of the model's own video for each prompt, and written
to preview.json in the folder of the VAE.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))

import magi  # noqa: E402
import outputs  # noqa: E402
import sample  # noqa: E402
from terminal import exit_code  # noqa: E402


def fit_preview(pipe: magi.MAGI, prompts: Sequence[str], file: Path,
                sampler: magi.SamplerConfig | None = None) -> float:
    """Write the matrix of a model's VAE to the file; returns the error, of 255."""
    latents, colours = [], []

    def watch(p: magi.Progress) -> None:
        if p.now.done is not None:
            latents.append(p.latents[p.now.done][0].flatten(1).T.float().cpu().numpy())   # (6 H W, 16)

    for seed, prompt in enumerate(prompts):
        for frames in pipe(prompt, sampler=sampler, num_frames=48, seed=seed, progress=watch):
            n, h, w, _ = frames.shape                                        # (24, 8 H, 8 W, 3)
            colours.append(frames.reshape(n // 4, 4, h // 8, 8, w // 8, 8, 3).mean((1, 3, 5)).reshape(-1, 3))
    y = np.concatenate(colours)
    x = np.concatenate([np.concatenate(latents), np.ones((len(y), 1))], axis=1)
    matrix = np.linalg.lstsq(x, y, rcond=None)[0]                            # (17, 3)
    text = json.dumps({"latent_to_rgb": matrix.round(2).tolist()}) + "\n"
    outputs.replace(file, lambda new: new.write_text(text))
    return float(np.sqrt(np.mean((x @ matrix - y) ** 2)))


def main(argv: list[str] | None = None) -> int:
    args = sample.parse_arguments(argv)
    return exit_code(lambda: fit(args))


def fit(args: argparse.Namespace) -> None:
    sample.check_flags(args)
    run = sample.check(args)
    with outputs.claimed(args.vae / "preview.json") as file:
        pipe = sample.load(args, run.device)
        print(f"{file}: off by {fit_preview(pipe, args.prompt, file, run.cfg):.1f} of 255")


if __name__ == "__main__":
    sys.exit(main())
