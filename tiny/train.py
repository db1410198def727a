"""Train the tiny MAGI on the tiny world: `python tiny/train.py all` makes all of tiny/ but the tokenizer.

    vae    the video autoencoder, on 12-frame pieces                      -> tiny/vae/
    dit    latents of many clips, then text encoder + DiT together        -> tiny/t5/, tiny/base/
    eval   what the judge says of prompts that were never trained on

Each stage keeps checkpoints in --work and goes on from the last one when it is started again, after a kill
too: the data of a step depend on its number alone. bf16 autocast, AdamW, warm-up then cosine, EMA of the
weights; the loss is written to --work/STAGE.csv and drawn in STAGE.png.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import world  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

import magi  # noqa: E402

# ------------------------------------------------------------------------------------ attention on a CPU
# PyTorch's fused attention is made for few long sequences. Many short ones in bf16 on a CPU are more than
# twice as fast as a plain formula over a padded batch. Signatures as in magi.py, section 2.


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(hd)) v: q (B, N, Hq, hd), k, v (B, M, Hkv, hd), mask (B, M) True where to read."""
    k, v = (u.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for u in (k, v))
    scores = torch.einsum("bnhd, bmhd -> bhnm", q * q.shape[-1] ** -0.5, k)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -math.inf)
    return torch.einsum("bhnm, bmhd -> bnhd", scores.softmax(dim=-1), v)


def block_attention(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor) -> Tensor:
    """magi.block_attention for all chunks at once: each gathers its keys, padded to the longest range."""
    (B, M), n = k.shape[:2], ranges.shape[1]
    start, end = ranges.expand(B, -1, -1).reshape(-1, 2, 1).unbind(1)  # (B*n, 1)
    index = start + torch.arange(int((end - start).max()))  # (B*n, longest)
    row = torch.arange(B).repeat_interleave(n)[:, None] * M
    where = (row + index.clamp(max=M - 1)).flatten()
    k, v = (u.flatten(0, 1).index_select(0, where).unflatten(0, index.shape) for u in (k, v))
    return attention(q.unflatten(1, (n, -1)).flatten(0, 1), k, v, index < end).reshape(q.shape)


CPU_OPS = SimpleNamespace(**vars(magi.TORCH_OPS) | {"attention": attention})
CPU_OPS.block_attention = lambda q, k, v, ranges, cached=None: (
    block_attention(q, k, v, ranges) if cached is None else magi.block_attention(q, k, v, ranges, cached)
)


def fit(
    name: str,
    model: nn.Module,
    loss_of_step,
    steps: int,
    lr: float,
    work: Path,
    every: int = 500,
    ema_decay: float = 0.999,
    warmup: int = 300,
    weight_decay: float = 0.1,
    report=None,
) -> nn.Module:
    """Train `model` by loss_of_step(step) -> (loss, numbers to log) and leave its EMA weights in it.

    Goes on from work/name.pt if that is there. Only matrices decay; the learning rate warms up, then follows
    a cosine.
    """
    work.mkdir(parents=True, exist_ok=True)
    file = work / f"{name}.pt"
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
    first = 0
    if file.exists():
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema, first = state["ema"], state["step"]

    log, lines = work / f"{name}.csv", []
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=name, mininterval=5, dynamic_ncols=True)
    model.train()
    for step in bar:
        rate = lr * min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, numbers = loss_of_step(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(ema_decay, (step + 1) / (step + 10))  # a young average must not remember the start
        with torch.no_grad():
            for k, v in model.state_dict().items():
                ema[k].lerp_(v.to(ema[k]), 1 - decay) if v.is_floating_point() else ema[k].copy_(v)
        lines.append([step, float(loss.detach()), *numbers.values()])
        if step % 20 == 0:
            bar.set_postfix(
                {
                    "loss": f"{np.mean([row[1] for row in lines[-100:]]):.4f}",
                    **{k: f"{v:.3g}" for k, v in numbers.items()},
                }
            )
        if (step + 1) % every == 0 or step + 1 == steps:
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "ema": ema,
                    "step": step + 1,
                },
                file.with_suffix(".tmp"),
            )
            os.replace(file.with_suffix(".tmp"), file)  # a kill in the middle of writing loses nothing
            with log.open("a", newline="") as f:
                csv.writer(f).writerows(lines)
            lines = []
            if report:
                kept = {k: v.clone() for k, v in model.state_dict().items()}
                model.load_state_dict(ema)
                model.eval()
                bar.write(f"{name} {step + 1}: {report()}")
                model.load_state_dict(kept)
                model.train()
    model.load_state_dict(ema)
    if log.exists():
        plot(log)
    return model.eval()


def plot(log: Path) -> None:
    """Draw the smoothed loss of a CSV beside it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = np.loadtxt(log, delimiter=",", ndmin=2)
    width = max(1, len(rows) // 200)
    smooth = rows[: len(rows) // width * width, :2].reshape(-1, width, 2).mean(1)
    plt.figure(figsize=(6, 3.5))
    plt.semilogy(smooth[:, 0], smooth[:, 1])
    plt.xlabel("step"), plt.ylabel("loss"), plt.title(log.stem), plt.grid(alpha=0.3)
    plt.savefig(log.with_suffix(".png"), dpi=100, bbox_inches="tight")
    plt.close()


def to_video(frames: np.ndarray) -> Tensor:
    """uint8 (..., frames, h, w, 3) -> float (..., 3, frames, h, w) in [-1, 1]."""
    return torch.from_numpy(frames).movedim(-1, -4).float() / 127.5 - 1


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two videos in [-1, 1]."""
    return (10 * torch.log10(4 / ((a.clamp(-1, 1) - b) ** 2).mean())).item()


# ------------------------------------------------------------------------------------------------ VAE


def train_vae(args) -> None:
    torch.manual_seed(0)
    vae = magi.VAE(magi.VAE_PRESETS["tiny"], CPU_OPS)
    for conv in (vae.encoder.patch_embed, vae.decoder.last_layer):
        no_autocast(conv)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        """Pieces as long as the pipeline's: mostly 12 frames (the temporal tile), some 8, 4 and images."""
        rng = np.random.default_rng([step, 7])
        length = int(rng.choice([12, 12, 12, 12, 8, 4, 1]))
        pieces, masks = [], []
        for k in range(6):
            clip = world.make_clip(step * 6 + k, chunks=2)
            for _ in range(2):
                start = rng.integers(0, len(clip.frames) - length + 1)
                pieces.append(clip.frames[start : start + length])
                masks.append(clip.mask()[start : start + length])
        # The objects fill a tenth of the picture: without a weight the VAE is content with the background.
        weight = F.max_pool2d(torch.from_numpy(np.stack(masks)).float(), 5, 1, 2)[:, None]
        return to_video(np.stack(pieces)), 1 + 4 * weight

    def loss_of_step(step: int):
        video, weight = batch(step)
        with torch.autocast("cpu", torch.bfloat16):
            loss, recon = magi.vae_loss(vae, video, weight)
        recon = recon.float()
        with torch.no_grad():
            error = ((recon.clamp(-1, 1) - video) ** 2).mean()
        return loss + 2 * (weight * (recon - video) ** 2).mean(), {
            "psnr": (10 * torch.log10(4 / error)).item()
        }

    test = to_video(np.stack([world.make_clip(10**6 + i, chunks=1).frames for i in range(16)]))
    mask = torch.from_numpy(np.stack([world.make_clip(10**6 + i, chunks=1).mask() for i in range(16)]))[
        :, None
    ]

    @torch.no_grad()
    def report() -> str:
        out = torch.cat([vae.decode(vae.encode(v[None])) for v in test]).clamp(-1, 1)
        inside = (((out - test) ** 2) * mask).sum() / (3 * mask.sum())
        return f"PSNR {psnr(out, test):.2f} dB, objects {10 * math.log10(4 / inside):.2f} dB"

    fit("vae", vae, loss_of_step, args.vae_steps, 1e-3, args.work, report=report, weight_decay=0.01)
    standardise(vae, test)
    save_model(args.out / "vae", vae, {"vae": asdict(vae.cfg)})


def no_autocast(conv: nn.Module) -> None:
    """conv3d in float32, channels last: on a CPU its bf16 backward is very slow, its default one slow."""
    plain = conv.forward

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return plain(x.float().contiguous(memory_format=torch.channels_last_3d))

    conv.forward = forward


@torch.no_grad()
def standardise(vae: magi.VAE, video: Tensor) -> None:
    """Fold a shift and scale per latent channel into the weights, so that SCALE_FACTOR * latent has mean 0
    and deviation 1: noise is then as large as data in every channel. Decoding is unchanged."""
    latent = vae.encode(video)
    mean, std = latent.mean((0, 2, 3, 4)), latent.std((0, 2, 3, 4)) * magi.SCALE_FACTOR
    z = vae.cfg.z_chans
    into, back = vae.encoder.last_layer, vae.decoder.proj_in
    into.weight[:z] /= std[:, None]
    into.bias[:z] = (into.bias[:z] - mean) / std
    into.bias[z:] -= 2 * std.log()  # the log-variance of the scaled latent
    back.bias += back.weight @ mean
    back.weight *= std


def save_model(folder: Path, model: nn.Module, config: dict, **extra: dict[str, Tensor]) -> None:
    """config.json + model.safetensors, in bf16: half the size, and the judge sees no difference."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    for name, sd in {"model": model.state_dict(), **extra}.items():
        save_file(
            {k: v.to(torch.bfloat16).contiguous() for k, v in sd.items()}, folder / f"{name}.safetensors"
        )
    print(f"wrote {folder}")


# ------------------------------------------------------------------------------------------------ text + DiT


class Tiny(nn.Module):
    """What is trained together: the DiT, the T5 encoder that feeds it, and the special tokens."""

    def __init__(self):
        super().__init__()
        from transformers import T5Config, T5EncoderModel

        preset = magi.PRESETS["tiny"]
        self.sampler = dataclasses.replace(preset.sampler, text_scales=(3.0, 3.0, 3.0, 0.0, 0.0))
        self.dit = magi.DiT(preset.dit, CPU_OPS)
        width = preset.dit.text_dim
        self.t5 = T5EncoderModel(
            T5Config(
                vocab_size=tokenizer().vocab_size(),
                d_model=width,
                d_kv=32,
                num_heads=4,
                d_ff=2 * width,
                num_layers=2,
                dropout_rate=0.0,
                tie_word_embeddings=False,
                feed_forward_proj="gated-gelu",
                is_encoder_decoder=False,
            )
        )
        names = ["hq_token", *(f"duration_token_{i}" for i in range(1, 9))]
        self.tokens = nn.ParameterDict({name: nn.Parameter(torch.randn(1, width)) for name in names})

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Captions -> text (n, L, C) and mask (n, L), as magi.T5 gives them."""
        ids, mask = magi.tokenize(tokenizer(), captions, self.dit.cfg.text_length)
        used = max(1, int(mask.sum(1).max()))
        hidden = self.t5(ids[:, :used], attention_mask=mask[:, :used]).last_hidden_state.float()
        return F.pad(hidden, (0, 0, 0, mask.shape[1] - used)), mask

    def text(self, captions: list[list[str]], remaining: list[int]) -> tuple[Tensor, Tensor]:
        """Captions of each chunk of each clip -> text (B, n, L, C) with special tokens, mask (B, n, L).

        remaining: how many chunks are left at the first chunk of each clip, for its duration token.
        """
        unique = sorted({c for clip in captions for c in clip})
        hidden, mask = self.encode(unique)
        rows = []
        for clip, left in zip(captions, remaining, strict=True):
            for i, c in enumerate(clip):
                tokens = magi.token_vectors(
                    self.sampler.special_tokens, magi.SPECIAL_TOKENS, self.tokens, left - i
                )
                rows.append(magi.prepend_tokens(hidden[unique.index(c)], mask[unique.index(c)], tokens))
        return tuple(torch.stack(u).unflatten(0, (len(captions), -1)) for u in zip(*rows, strict=True))

    @torch.no_grad()
    def pipeline(self, vae: magi.VAE) -> magi.MAGI:
        """The user's view of the model in training."""
        return magi.MAGI(
            self.dit, vae, self.sampler, {k: v.detach() for k, v in self.tokens.items()}, self.encode
        )


@functools.cache
def tokenizer():
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(HERE / "t5" / "spiece.model"))


@torch.no_grad()
def encode_clips(
    vae: magi.VAE, clips: int, work: Path, per_file: int = 500
) -> tuple[Tensor, list[list[str]]]:
    """Latents (clips, 16, 24, 8, 8) bf16 and captions, encoded once and kept in files of --work."""
    latents, captions = [], []
    for start in tqdm(range(0, clips, per_file), desc="encode clips", unit_scale=per_file):
        file = work / f"latents.{start:06d}.pt"
        if not file.exists():
            made = [world.make_clip(seed) for seed in range(start, start + per_file)]
            with torch.autocast("cpu", torch.bfloat16):
                z = [
                    vae.encode(to_video(np.stack([c.frames for c in made[i : i + 10]]))) * magi.SCALE_FACTOR
                    for i in range(0, per_file, 10)
                ]
            torch.save(
                (torch.cat(z).to(torch.bfloat16), [list(c.captions) for c in made]), file.with_suffix(".tmp")
            )
            os.replace(file.with_suffix(".tmp"), file)
        z, c = torch.load(file, weights_only=True)
        latents.append(z)
        captions += c
    return torch.cat(latents), captions


def train_dit(args) -> None:
    torch.manual_seed(1)
    vae = magi.load_vae(args.out / "vae")
    latents, captions = encode_clips(vae, args.clips, args.work)
    model, n = Tiny(), latents.shape[2] // magi.CHUNK
    training = magi.TrainingConfig()

    def loss_of_step(step: int):
        rng = np.random.default_rng([step, 11])
        pick = rng.integers(0, len(latents), args.batch)
        # The clips have no end of their own, so how much is left is drawn: every duration token gets trained.
        remaining = rng.integers(n, 12, args.batch).tolist()
        with torch.autocast("cpu", torch.bfloat16):
            text, mask = model.text([captions[i] for i in pick], remaining)
            loss = magi.flow_matching_loss(
                model.dit,
                latents[pick].float(),
                text,
                mask,
                training,
                model.sampler,
                torch.Generator().manual_seed(step),
            )
        return loss, {}

    def report() -> str:
        scores = judge_prompts(
            model.pipeline(vae), world.sample_prompts(16, seed=5, heldout=None), num_steps=16
        )
        return ", ".join(f"{k} {v:.0%}" for k, v in scores.items())

    fit(
        "dit",
        model,
        loss_of_step,
        args.dit_steps,
        args.lr,
        args.work,
        every=1000,
        report=report,
        weight_decay=0.02,
    )
    save_model(
        args.out / "base",
        model.dit,
        {"dit": asdict(model.dit.cfg), "sampler": asdict(model.sampler)},
        special_tokens={k: v.detach() for k, v in model.tokens.items()},
    )
    model.t5.to(torch.bfloat16).save_pretrained(args.out / "t5")


# ------------------------------------------------------------------------------------------------ evaluation


def judge_prompts(pipe: magi.MAGI, prompts: list, **settings) -> dict[str, float]:
    """Share of prompts whose video shows the right colour, shape and motion, as the judge reads them."""
    right = {"colour": 0, "shape": 0, "motion": 0}
    for i, (text, wanted) in enumerate(prompts):
        verdict = world.judge(np.concatenate(list(pipe(text, **{"num_frames": 48, "seed": i} | settings))))
        for name, word in zip(right, wanted, strict=True):
            right[name] += getattr(verdict, name) == word
    return {name: count / len(prompts) for name, count in right.items()}


def evaluate(args) -> None:
    """Print what the README states: reconstruction, and how prompts of combinations never trained on fare."""
    pipe = magi.load(args.out / "base")
    test = np.stack([world.make_clip(10**6 + i, chunks=1).frames for i in range(32)])
    video = to_video(test)
    with torch.inference_mode():
        out = torch.cat([pipe.vae.decode(pipe.vae.encode(v[None])) for v in video])
    print(f"VAE reconstruction: {psnr(out, video):.1f} dB")
    prompts = world.sample_prompts(args.prompts, seed=1)
    text, mask = pipe.encode_text([text for text, _ in prompts])
    row = {text: i for i, (text, _) in enumerate(prompts)}
    pipe.encode_text = lambda captions: (text[[row[c] for c in captions]], mask[[row[c] for c in captions]])
    for name, settings in (
        ("as configured", {}),
        ("without text guidance", {"text_scales": (1.0, 1.0, 1.0, 0.0, 0.0)}),
    ):
        scores = judge_prompts(pipe, prompts, **settings)
        print(f"{len(prompts)} prompts, {name}: " + ", ".join(f"{k} {v:.0%}" for k, v in scores.items()))


def examples(args) -> None:
    """Write the inputs that the README's i2v and v2v commands use."""
    import imageio.v3 as iio

    from sample import Mp4Writer

    folder = args.out / "examples"
    folder.mkdir(parents=True, exist_ok=True)
    iio.imwrite(folder / "image.png", world.scene("yellow", "square", "right", "night", seed=2).frames[0])
    (folder / "video.mp4").unlink(missing_ok=True)
    Mp4Writer(folder / "video.mp4", world.FPS).write(
        world.scene("green", "ball", "bounce", "room", 2, 5).frames
    )
    print(f"wrote {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=["vae", "dit", "all", "eval", "examples"])
    parser.add_argument("--work", type=Path, default=HERE / "work", help="checkpoints, latents, loss curves")
    parser.add_argument("--out", type=Path, default=HERE, help="where the finished models go")
    parser.add_argument("--vae-steps", type=int, default=5000)
    parser.add_argument("--clips", type=int, default=10000, help="how many clips to encode for the DiT")
    parser.add_argument("--dit-steps", type=int, default=10000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--prompts", type=int, default=42, help="eval: how many held-out prompts")
    args = parser.parse_args()
    started = time.time()
    if args.stage in ("vae", "all"):
        train_vae(args)
    if args.stage in ("dit", "all"):
        train_dit(args)
    if args.stage == "eval":
        evaluate(args)
    if args.stage == "examples":
        examples(args)
    print(f"{(time.time() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
