"""Train the tiny MAGI on the tiny world: `python tiny/train.py all` makes all of tiny/ but the tokenizer.

    vae    the video autoencoder, on 12-frame pieces                      -> tiny/vae/
    dit    latents of many clips, then text encoder + DiT together        -> tiny/t5/, tiny/base/
    distill  three branches and many steps into one branch and few        -> tiny/distill/
    lora   a colour that the finished model has never seen                -> tiny/lora/cyan.safetensors
    eval   what the judge says of prompts that were never trained on
    steps  base and distilled at 64 to 4 steps: a table and a plot        -> tiny/examples/steps.*

Each stage keeps checkpoints in --work and goes on from the last one when it is started again, after a kill
too: the data of a step depend on its number alone. bf16 autocast where that is faster, EMA of the weights;
the loss is written to --work/STAGE.csv and drawn in STAGE.png. Ours, as it suits so small a model, where the
report has AdamW at 1e-4: Muon for the matrices, AdamW for the rest, at higher rates.
"""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import functools
import json
import math
import os
import shutil
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
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

import magi  # noqa: E402

# ------------------------------------------------------------------------------------ attention on a CPU
# magi.block_attention is one call per chunk, which suits few long chunks. For many short ones in a batch
# there are two faster ways, both with the signature of magi.py, section 2.


def block_attention(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, cached=None) -> Tensor:
    """magi.block_attention for all chunks at once. Where most keys are read by most chunks, as in self-
    attention, one call with a mask; where each reads a few, as in cross-attention, these are gathered."""
    if cached is not None:
        return magi.block_attention(q, k, v, ranges, cached)
    (B, N), M, n = q.shape[:2], k.shape[1], ranges.shape[1]
    start, end = ranges[..., :1], ranges[..., 1:]  # (B or 1, n, 1)
    longest = int((end - start).max())
    index = torch.arange(M)
    if 2 * longest < M:  # (B, n * longest) keys; every chunk becomes a row of the batch
        index = start + torch.arange(longest)
        valid = (index < end).expand(B, -1, -1).reshape(B * n, 1, 1, longest)
        index = (index.clamp(max=M - 1) + torch.arange(B)[:, None, None] * M).flatten()
        k, v = (u.flatten(0, 1).index_select(0, index).unflatten(0, (B * n, longest)) for u in (k, v))
        rows = q.unflatten(1, (n, N // n)).flatten(0, 1)
    else:
        valid = ((index >= start) & (index < end)).repeat_interleave(N // n, dim=1)[:, None]  # (B, 1, N, M)
        rows = q
    # Written out: at these sizes PyTorch's fused CPU attention takes longer, its backward ten times so.
    kv, group = k.shape[2], q.shape[2] // k.shape[2]
    rows = rows.unflatten(2, (kv, group)).permute(0, 2, 3, 1, 4)  # (b, kv, group, rows, d)
    scores = rows.flatten(2, 3) * q.shape[-1] ** -0.5 @ k.permute(0, 2, 3, 1)  # (b, kv, group * rows, keys)
    scores = scores.unflatten(2, (group, -1))
    if not valid.all():
        scores = scores.masked_fill(~valid[:, None], float("-inf"))
    out = scores.softmax(-1).to(v).flatten(2, 3) @ v.transpose(1, 2)
    return out.unflatten(2, (group, -1)).permute(0, 3, 1, 2, 4).reshape(q.shape)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """magi.attention: one chunk that sees all keys."""
    return block_attention(q, k, v, torch.tensor([[[0, k.shape[1]]]]))


CPU_OPS = SimpleNamespace(**vars(magi.TORCH_OPS) | dict(attention=attention, block_attention=block_attention))


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each matrix is made orthogonal (Jordan et al. 2024): all directions of a layer
    learn at one pace, which took half the steps of AdamW here. torch.optim.Muon does the iteration in bf16,
    which many CPUs only emulate: this does it in what is faster.

    The update of an (out, in) matrix has the root mean square 0.2 lr, as AdamW's has, so rates carry over.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(average, group["momentum"]))  # Nesterov
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-0.2 * group["lr"] * max(p.shape) ** 0.5)


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """About U V^T of matrix = U S V^T, by a quintic Newton-Schulz iteration that drives S towards 1."""
    x = (matrix / (matrix.norm() + 1e-7)).to(torch.bfloat16 if autocast_is_faster() else torch.float32)
    x = x.T if matrix.shape[0] > matrix.shape[1] else x  # the small side makes the Gram matrix
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).to(matrix)


def fit(
    name: str,
    model: nn.Module,
    loss_of_step,
    steps: int,
    lr: float,
    work: Path,
    every: int = 500,
    ema_decay: float = 0.999,
    warmup: int = 100,
    weight_decay: float = 0.02,
    report=None,
) -> nn.Module:
    """Train `model` by loss_of_step(step) -> (loss, numbers to log) and leave its EMA weights in it.

    Goes on from work/name.pt if that is there. The matrices of the blocks learn by Muon at rate lr and decay,
    all else by AdamW at lr, but at most 1e-3. Rates warm up, stay, and fall to zero in the last third: to
    train a finished model further, give more steps.
    """
    work.mkdir(parents=True, exist_ok=True)
    file = work / f"{name}.pt"
    named = [(k, p) for k, p in model.named_parameters() if p.requires_grad]
    inner = {k for k, p in named if p.ndim == 2 and ("layers." in k or "block" in k) and "bias" not in k}
    matrices, others = ([p for k, p in named if (k in inner) == which] for which in (True, False))
    optimizers = [
        Muon(matrices, lr, weight_decay=weight_decay),
        torch.optim.AdamW(others, min(lr, 1e-3), (0.9, 0.95), weight_decay=0),
    ]
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
    first = 0
    if file.exists():
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        ema, first = state["ema"], state["step"]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    log, lines = work / f"{name}.csv", []
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=name, mininterval=5, dynamic_ncols=True)
    model.train()
    for step in bar:
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * min((step + 1) / warmup, 1, 3 * (1 - step / steps))
        loss, numbers = loss_of_step(step)
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        decay = min(ema_decay, (step + 1) / (step + 10))  # a young average must not remember the start
        with torch.no_grad():
            for k, v in model.state_dict().items():
                ema[k].lerp_(v.to(ema[k]), 1 - decay) if v.is_floating_point() else ema[k].copy_(v)
        lines.append([step, float(loss.detach()), *numbers.values()])
        if step % 20 == 0:
            averages = {k: np.mean([row[i] for row in lines[-100:]]) for i, k in enumerate(numbers, 2)}
            bar.set_postfix({"loss": f"{np.mean([row[1] for row in lines[-100:]]):.4f}"}
                            | {k: f"{v:.3g}" for k, v in averages.items()})  # fmt: skip
        if (step + 1) % every == 0 or step + 1 == steps:
            state = {"model": model.state_dict(), "ema": ema, "step": step + 1,
                     "optimizers": [optimizer.state_dict() for optimizer in optimizers]}  # fmt: skip
            torch.save(state, file.with_suffix(".tmp"))
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


@functools.cache
def autocast_is_faster() -> bool:
    """Whether this CPU multiplies bf16 faster than float32: by a factor of 5 or so where it has instructions
    for it (AMX, AVX512-BF16), and a hundred times slower where PyTorch has to emulate them."""

    def seconds(dtype: torch.dtype) -> float:
        a = torch.randn(256, 256, dtype=dtype)
        start = time.perf_counter()
        for _ in range(4):
            a @ a
        return time.perf_counter() - start

    return min(seconds(torch.bfloat16) for _ in range(3)) < min(seconds(torch.float32) for _ in range(3))


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=autocast_is_faster())


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
    if args.init:
        vae.load_state_dict(magi.load_vae(args.init / "vae").state_dict())
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

    encoder_steps = 0 if args.init else args.vae_steps * 3 / 4

    def loss_of_step(step: int):
        video, weight = batch(step)
        with autocast():
            if step < encoder_steps:
                noise = 0.5 * torch.rand(len(video)) ** 2
                loss, recon = magi.vae_loss(vae, video, weight, latent_noise=noise)
            else:  # the latents are final; the decoder learns to make the most of them
                with torch.no_grad():
                    latent, _ = vae.moments(video)
                loss, recon = 0, vae.decode(latent, tile=None)[:, :, : video.shape[2]]
        square = (recon.float() - video) ** 2
        loss = loss + 2 * (weight * square).mean()
        return loss, {"psnr": (10 * torch.log10(4 / square.detach().mean())).item()}

    test = to_video(np.stack([world.make_clip(10**6 + i, chunks=1).frames for i in range(16)]))
    mask = torch.from_numpy(np.stack([world.make_clip(10**6 + i, chunks=1).mask() for i in range(16)]))[
        :, None
    ]

    @torch.no_grad()
    def report() -> str:
        out = torch.cat([vae.decode(vae.encode(v[None])) for v in test]).clamp(-1, 1)
        inside = (((out - test) ** 2) * mask).sum() / (3 * mask.sum())
        return f"PSNR {psnr(out, test):.2f} dB, objects {10 * math.log10(4 / inside):.2f} dB"

    lr = 5e-4 if args.init else 2e-3
    fit("vae", vae, loss_of_step, args.vae_steps, lr, args.work, every=100, report=report)
    if not args.init:
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
        self.sampler = dataclasses.replace(preset.sampler, text_scales=(2.5, 2.5, 2.5, 1.0, 1.0))
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
        # A branch is normalised after its gate, so however small its weights are, it starts as loud as the
        # tokens themselves. Turned down, and with time turned up, the first hundred steps do twice the work.
        with torch.no_grad():
            for layer in self.dit.layers:
                layer.attn_post_norm.weight.fill_(-0.75)  # a factor of 0.25: LN1 adds one
                layer.ffn_post_norm.weight.fill_(-0.75)
            self.dit.time_embed[2].weight.mul_(4)

    def load(self, folder: Path) -> None:
        """Start from finished weights."""
        self.dit.load_state_dict(magi.load_dit(folder / "base").state_dict())
        t5 = type(self.t5).from_pretrained(folder / "t5", dtype=torch.float32)
        self.t5.load_state_dict(t5.state_dict())
        self.tokens.load_state_dict(load_file(folder / "base" / "special_tokens.safetensors"))

    def save(self, folder: Path) -> None:
        config = {"dit": asdict(self.dit.cfg), "sampler": asdict(self.sampler)}
        tokens = {k: v.detach() for k, v in self.tokens.items()}
        save_model(folder / "base", self.dit, config, special_tokens=tokens)
        copy.deepcopy(self.t5).to(torch.bfloat16).save_pretrained(folder / "t5")
        if not (folder / "t5" / "spiece.model").exists():
            shutil.copy(HERE / "t5" / "spiece.model", folder / "t5")
        (folder / "t5" / "words.json").write_text(json.dumps(world.words(), indent=1) + "\n")

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
def encode(vae: magi.VAE, clips: list[world.Clip]) -> dict:
    """What training needs of clips of n chunks: latents (clips, 16, 6 n, 8, 8), and images, the fourth frame
    alone as an image is encoded (clips, 16, 1, 8, 8), bf16; captions of each chunk; where objects are; in
    which chunks something circles."""
    latents, images = [], []
    for i in range(0, len(clips), 10):
        video = to_video(np.stack([c.frames for c in clips[i : i + 10]]))
        with autocast():
            latents.append(vae.encode(video) * magi.SCALE_FACTOR)
            images.append(vae.encode(video[:, :, 3:4]) * magi.SCALE_FACTOR)
    masks = torch.from_numpy(np.stack([c.mask() for c in clips])[:, None]).float()
    return {
        "latents": torch.cat(latents).bfloat16(),
        "images": torch.cat(images).bfloat16(),
        "captions": [list(c.captions) for c in clips],
        "objects": F.max_pool3d(masks, (4, 8, 8)).bool(),  # (clips, 1, 6 n, 8, 8)
        "circles": torch.tensor([c.circles() for c in clips]),  # (clips, n)
    }


def encode_clips(vae: magi.VAE, clips: int, work: Path, per_file: int = 500) -> dict:
    """`encode` of the training clips 0, 1, 2, ..., done once and kept in files of --work."""
    parts = []
    work.mkdir(parents=True, exist_ok=True)
    for start in tqdm(range(0, clips, per_file), desc="encode clips", unit_scale=per_file):
        file = work / f"clips.{start:06d}.pt"
        if not file.exists():
            made = [world.make_clip(seed) for seed in range(start, start + per_file)]
            torch.save(encode(vae, made), file.with_suffix(".tmp"))
            os.replace(file.with_suffix(".tmp"), file)
        parts.append(torch.load(file, weights_only=True))
    join = lambda lists: sum(lists, []) if isinstance(lists[0], list) else torch.cat(lists)
    return {k: join([part[k] for part in parts]) for k in parts[0]}


def draw_clips(rng: np.random.Generator, n: int, count: int, model: Tiny, data: dict) -> dict[str, Tensor]:
    """The first n chunks of `count` encoded clips, as the losses of magi.py take them.

    The first: later on a slide may rest at the wall, and without its past that caption would be a lie. Clips
    with a circle come three times as often as others: it is the last motion to be learned, since the two
    directions pass through the same places and only one word and the order of frames tell them apart.
    """
    odds = 1 + 2 * data["circles"][:, :n].any(1).double().numpy()
    pick, part = rng.choice(len(odds), count, p=odds / odds.sum()), slice(n * magi.CHUNK)
    # The clips have no end of their own, so how much is left is drawn: every duration token gets trained.
    captions = [data["captions"][i][:n] for i in pick]
    text, mask = model.text(captions, rng.integers(n, 12, count).tolist())
    return {
        "latents": data["latents"][pick][:, :, part].float(),
        "text": text,
        "text_mask": mask,
        "images": data["images"][pick].float(),
        "weight": 1 + 2 * data["objects"][pick][:, :, part].float(),
    }


def train_dit(args) -> None:
    torch.manual_seed(1)
    vae = magi.load_vae(args.out / "vae")
    data, model = encode_clips(vae, args.clips, args.work), Tiny()
    if args.init:
        model.load(args.init)
    alone, together = magi.TrainingConfig(video_share=0.0), magi.TrainingConfig()

    def loss_of_step(step: int):
        """Early on mostly single chunks: with a history to copy from, captions are learned four times slower.
        Later mostly four in a row, which teach the rest: histories, continuations, changes at a boundary."""
        rng = np.random.default_rng([step, 11])
        n = 1 if rng.random() < (0.75 if step < args.dit_steps / 2 else 0.5) else 4
        with autocast():
            loss = magi.flow_matching_loss(
                model.dit,
                **draw_clips(rng, n, args.batch // n, model, data),
                cfg=alone if n == 1 else together,
                sampler=model.sampler,
                generator=torch.Generator().manual_seed(step),
            )
        return loss, {"chunks": n}

    prompts = world.sample_prompts(16, seed=5, heldout=None)

    def report() -> str:
        scores = judge_prompts(model.pipeline(vae), prompts, num_steps=16, num_frames=24)
        return ", ".join(f"{k} {v:.0%}" for k, v in scores.items())

    fit("dit", model, loss_of_step, args.dit_steps, args.lr, args.work, every=250, report=report)
    model.save(args.out)


# ----------------------------------------------------------------------------------- distillation, LoRA


def distill(args) -> None:
    """The base model teaches a copy of itself: one branch for three, one step for two, four, eight, sixteen.

    The last, 4 steps from noise to clean, goes beyond the report: the tiny world is so simple that at 8 steps
    even the base model is good.

    Text encoder, special tokens and VAE stay as they are. Clips of 1 to 4 chunks are the moments of a video's
    first seconds and of all later ones; the short ones cost less, and there are more of them in a batch.
    """
    torch.manual_seed(2)
    vae, model = magi.load_vae(args.out / "vae"), Tiny()
    data = encode_clips(vae, args.clips, args.work)
    model.load(args.out)
    model.requires_grad_(False)
    model.sampler = magi.read_config(args.out / "base", "sampler", magi.SamplerConfig)
    student = copy.deepcopy(model.dit).requires_grad_()
    sampler = dataclasses.replace(model.sampler, distilled=True, num_steps=8)
    cycle = (*magi.SHORTCUT_CYCLE, 4)

    def loss_of_step(step: int):
        rng, num_steps = np.random.default_rng([step, 13]), magi.shortcut_steps(step, cycle)
        n = int(rng.choice([1, 2, 3, 4], p=[0.3, 0.15, 0.15, 0.4]))
        with autocast():
            loss = magi.shortcut_loss(
                student,
                model.dit,
                **draw_clips(rng, n, args.batch // n, model, data),
                num_steps=num_steps,
                sampler=model.sampler,
                generator=torch.Generator().manual_seed(step),
            )
        return loss, {"steps": num_steps}

    prompts = world.sample_prompts(16, seed=5, heldout=None)
    pipe = magi.MAGI(student, vae, sampler, dict(model.tokens.items()), model.encode)

    def report() -> str:
        scores = judge_prompts(pipe, prompts, num_frames=24)
        return "at 8 steps " + ", ".join(f"{k} {v:.0%}" for k, v in scores.items())

    fit("distill", student, loss_of_step, args.distill_steps, args.distill_lr, args.work, every=250,
        report=report)  # fmt: skip
    config = {"dit": asdict(student.cfg), "sampler": asdict(sampler)}
    save_model(args.out / "distill", student, config, special_tokens=dict(model.tokens.items()))


def train_lora(args) -> None:
    """A LoRA teaches the base model a colour that none of its clips had, in minutes on a CPU."""
    torch.manual_seed(3)
    (colour,) = world.NEW_COLOURS
    vae, model = magi.load_vae(args.out / "vae"), Tiny()
    model.load(args.out)
    model.requires_grad_(False)
    model.sampler = magi.read_config(args.out / "base", "sampler", magi.SamplerConfig)
    magi.add_lora(model.dit, args.rank)

    names = [(s, m) for s in world.SHAPES for m in world.MOTIONS]
    taught, asked = ([n for n in names if world.held_out(colour, *n) == held] for held in (False, True))
    clips = [world.scene(colour, *n, p, chunks=2, seed=i) for i, n in enumerate(taught) for p in world.PLACES]
    new = encode(vae, clips)
    old = encode_clips(vae, 500, args.work)  # half of every batch: what is not shown again is forgotten

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-3, weight_decay=0)
    bar = tqdm(range(args.lora_steps), desc="lora", mininterval=5)
    for step in bar:
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 20, 3 * (1 - step / args.lora_steps))
        rng, n = np.random.default_rng([step, 17]), 1 + step % 2
        with autocast():
            halves = [draw_clips(rng, n, args.batch // 4 // n, model, data) for data in (new, old)]
            batch = {k: torch.cat([half[k] for half in halves]) for k in halves[0]}
            loss = magi.flow_matching_loss(model.dit, **batch, sampler=model.sampler,
                                           generator=torch.Generator().manual_seed(step))  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix({"loss": f"{loss.item():.3f}"}, refresh=False)
    file = args.out / "lora" / f"{colour}.safetensors"
    file.parent.mkdir(exist_ok=True)
    magi.save_lora(model.dit, file)
    print(f"wrote {file}, {file.stat().st_size / 1e6:.1f} MB")

    prompts = [(world.caption([(colour, *n)]), (colour, *n)) for n in asked]
    others = world.sample_prompts(len(prompts), seed=1)
    for folder in ("base", "distill"):
        if not (args.out / folder).is_dir():
            continue
        for scale in (0.0, 1.0):
            pipe = magi.load(args.out / folder)
            encode_once(pipe, args.out / "t5")
            magi.load_lora(pipe.dit, file, scale)
            for kind, wanted in ((f"{colour}, held out", prompts), ("old colours", others)):
                scores = judge_prompts(pipe, wanted, 24, world.COLOURS | world.NEW_COLOURS)
                scores = ", ".join(f"{k} {v:.0%}" for k, v in scores.items())
                print(f"{folder}, LoRA x {scale:g}, {kind} ({len(wanted)} prompts): {scores}", flush=True)


# ------------------------------------------------------------------------------------------------ evaluation


# Everything here is asked of captions and clips that training never shows: the judge in world.py reads
# colour, shape, motion and position back from the frames. Shares are of the videos made.


def film(pipe: magi.MAGI, prompt, frames: int, seed: int, **settings) -> np.ndarray:
    """A whole video, uint8 (frames, 64, 64, 3)."""
    return np.concatenate(list(pipe(prompt, num_frames=frames, seed=seed, **settings)))


def right(verdict, wanted: world.Triple) -> list[bool]:
    return [getattr(verdict, name) == word for name, word in zip(NAMES, wanted, strict=True)]


NAMES = ("colour", "shape", "motion")


def judge_prompts(
    pipe: magi.MAGI, prompts: list, num_frames: int = 48, colours: dict = world.COLOURS, **settings
) -> dict[str, float]:
    """Share of prompts whose video shows the right colour, shape and motion, as the judge reads them."""
    hits = [
        right(world.judge(film(pipe, text, num_frames, seed, **settings), colours), wanted)
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
    encoder = functools.cache(magi.T5(t5, pipe.dit.cfg.text_length, dtype=torch.float32).__call__)
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
            rows.append(("true clips, VAE", None, *measure(videos, wanted), None))
        film(pipe, prompts[0][0], 24, 0)  # the first run is slower
        for n in counts:
            start = time.perf_counter()
            videos = [film(pipe, text, 48, seed, num_steps=n) for seed, (text, _) in enumerate(prompts)]
            seconds = (time.perf_counter() - start) / (2 * len(prompts))
            rows.append((folder, n, *measure(videos, [wanted for _, wanted in prompts]), seconds))
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


def measure(videos: list[np.ndarray], wanted: list) -> tuple[float, ...]:
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


STAGES = {"vae": train_vae, "dit": train_dit, "distill": distill, "lora": train_lora, "eval": evaluate,
          "steps": step_counts, "examples": examples}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=[*STAGES, "all"], help="all: vae, dit, distill")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="checkpoints, latents, loss curves")
    parser.add_argument("--out", type=Path, default=HERE, help="where the finished models go")

    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
        return int(text)

    parser.add_argument("--vae-steps", type=count, default=5000)
    parser.add_argument("--clips", type=count, default=10000, help="clips for the DiT, in files of 500")
    parser.add_argument("--dit-steps", type=count, default=10000)
    parser.add_argument("--distill-steps", type=count, default=3000)
    parser.add_argument("--distill-lr", type=float, default=1e-3)
    parser.add_argument("--lora-steps", type=count, default=600)
    parser.add_argument("--rank", type=count, default=4, help="of the LoRA")
    parser.add_argument("--batch", type=count, default=32, help="in chunks, at least 16")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--model", type=Path, help="eval: the model's folder, if not base in --out")
    parser.add_argument(
        "--init",
        type=Path,
        help="vae, dit: go on from this folder, such as tiny; "
        "vae: with the decoder alone, so that latents stay as they are",
    )
    parser.add_argument("--prompts", type=count, default=100, help="eval, steps: how many held-out prompts")
    args = parser.parse_args()
    started = time.time()
    try:
        if args.batch < 16:
            raise ValueError(f"batch {args.batch} is too small: at least 16 chunks")
        for folder in (args.init, args.model):
            if folder and not folder.is_dir():
                raise ValueError(f"{folder} is no folder: check the path")
        for stage in ("vae", "dit", "distill") if args.stage == "all" else (args.stage,):
            STAGES[stage](args)
    except (ValueError, OSError) as error:
        print("train:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    print(f"{(time.time() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
