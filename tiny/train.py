"""Train the tiny MAGI on the tiny world: `python tiny/train.py all` makes all models of tiny/ but the LoRA.

    vae    the video autoencoder, on crops first, then on whole frames      -> tiny/vae/
    dit    text encoder and DiT together, on the latents of many clips: at half size (--size 64), where a
           step shows four times as many, then at the whole (--init)        -> tiny/t5/, tiny/base/
    distill  three branches and many steps into one branch and few          -> tiny/distill/
    decoder  the VAE's decoder goes on, on latents as the distilled model leaves them  -> tiny/vae/
    clips  mp4 files with captions that teach a new colour or shape (--teach cyan, bar)  -> --out
    lora   the same, by `training.py lora`, and what the judge says         -> tiny/lora/cyan.safetensors
    eval   what the judge says of prompts that were never trained on
    steps  base and distilled at 64 to 4 steps: a table and a plot          -> tiny/examples/steps.*
    phenomena  what the report describes, measured: tables                  -> tiny/examples/phenomena.md
    examples   the picture and the video that the README goes on from       -> tiny/examples/

Each stage keeps checkpoints in --work and goes on from the last one when it is started again, after a kill
too: the data of a step depend on its number alone, and on how many processes share it (`torchrun
--nproc_per_node 2 tiny/train.py dit` takes two thirds of the time of one with two threads). To export a
checkpoint as it is, give the number of its step as --steps. bf16 autocast where that is faster, EMA of the
weights; the loss is written to --work/STAGE.csv and drawn in STAGE.png. Our choice for so small a model is
Muon for the matrices and AdamW for the rest, at higher rates; the report has AdamW at 1e-4.

Contents: 1 attention on a CPU, 2 optimizer and loop, 3 VAE, 4 text and DiT, 5 clips as latents, 6 training
the DiT, 7 distillation and LoRA, 8 command line.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
SPIECE = HERE / "t5" / "spiece.model"
sys.path[:0] = [str(HERE.parent), str(HERE)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import world  # noqa: E402
from judge import judge  # noqa: E402
from measure import (  # noqa: E402
    PHENOMENA,
    evaluate,
    judge_prompts,
    load_model,
    phenomena,
    psnr,
    seams,
    to_frames,
    to_tensor,
    write_steps,
)
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

import checkpoints  # noqa: E402
import finetune  # noqa: E402
import magi  # noqa: E402
import media  # noqa: E402
import outputs  # noqa: E402
import parallel  # noqa: E402
import terminal  # noqa: E402
import training  # noqa: E402
from captions import load_tokenizer  # noqa: E402

SIZE, GRID = world.SIZE, world.SIZE // 8  # side of the frame in pixels and in latents

# ---------------------------------------------------------------------------------- 1 attention on a CPU
# magi.block_attention is one call per chunk, which suits few long chunks. For many short ones in a batch
# there are two faster ways, both with the signature of magi.py, section 2.


LONGEST = 64  # tokens of a caption, with its special tokens: DiTConfig.text_length of the small models


def block_attention(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, out: Tensor | None = None) -> Tensor:
    """magi.block_attention, by dense products with a mask.

    In self-attention a chunk is compared with all keys up to its own, which are those of the last chunks. In
    cross-attention, where keys are fewer than queries, each chunk reads a few: its own are gathered, at most
    LONGEST. No shape depends on the numbers in spans, so torch.compile can take it.
    """
    (B, N), M, n, kv = q.shape[:2], k.shape[1], spans.shape[1], k.shape[2]
    size, group = N // n, q.shape[2] // kv
    start, end = spans.to(q.device).split(1, dim=-1)  # (B or 1, n, 1)
    rows = q.unflatten(2, (kv, group)).unflatten(1, (n, size)).permute(0, 1, 3, 4, 2, 5)
    rows = rows.flatten(3, 4) * q.shape[-1] ** -0.5  # (B, n, kv, group * size, d)
    if M < N:
        index = start + torch.arange(LONGEST, device=q.device)
        valid = (index < end).expand(B, -1, -1).reshape(B * n, 1, 1, LONGEST)
        index = index.clamp(max=M - 1) + torch.arange(B, device=q.device)[:, None, None] * M
        k, v = (u.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, (-1, LONGEST)) for u in (k, v))
        parts = [weighted_mean(rows.flatten(0, 1), k, v, valid).unflatten(0, (B, n))]
    else:
        parts = []
        for i in range(n):
            keys = M - N + (i + 1) * size
            index = torch.arange(keys, device=q.device)
            valid = ((index >= start[:, i]) & (index < end[:, i]))[:, None, None]  # (B or 1, 1, 1, keys)
            parts.append(weighted_mean(rows[:, i], k[:, :keys], v[:, :keys], valid)[:, None])
    result = torch.cat(parts, 1).unflatten(3, (group, size)).permute(0, 1, 4, 2, 3, 5).reshape(q.shape)
    return result if out is None else out.copy_(result)


def weighted_mean(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> Tensor:
    """Attention written out: at these sizes PyTorch's fused CPU attention takes longer, its backward ten
    times so. q (b, kv, rows, d), scaled; k and v (b, keys, kv, d); valid (b or 1, 1, 1, keys), default: all
    -> q's shape."""
    scores = q @ k.permute(0, 2, 3, 1)
    if valid is not None:
        scores = scores.masked_fill(~valid, float("-inf"))
    return scores.softmax(-1).to(v) @ v.transpose(1, 2)


def few_tokens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """magi.attention written out, for the VAE."""
    scale = q.shape[-1] ** -0.5
    return weighted_mean(scale * q.transpose(1, 2), k, v).transpose(1, 2)


CPU_OPS = dataclasses.replace(
    magi.TORCH_OPS, name="many short chunks", attention=few_tokens, block_attention=block_attention
)


# ---------------------------------------------------------------------------------- 2 optimizer and loop


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each matrix is made orthogonal (Jordan et al. 2024): all directions of a layer
    learn at one pace, which took half the steps of AdamW here. torch.optim.Muon does the iteration in bf16,
    which many CPUs only emulate: this does it in what is faster.

    The update of an (out, in) matrix has the root mean square 0.2 lr, as AdamW's has, so rates carry over.
    Of n processes each makes every n-th update and sends the weights to the others.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        changed = []
        for group in self.param_groups:
            for i, p in enumerate(p for p in group["params"] if p.grad is not None):
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                maker = i % parallel.ranks()
                if maker == parallel.rank():
                    update = orthogonal(p.grad.lerp(average, group["momentum"]))  # Nesterov
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-0.2 * group["lr"] * max(p.shape) ** 0.5)
                changed.append((p, maker))
        if parallel.ranks() > 1:  # sent after all are made, so that none waits for the next one's update
            for p, maker in changed:
                dist.broadcast(p, maker)


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """About U V^T of matrix = U S V^T, by a quintic Newton-Schulz iteration that drives S towards 1."""
    x = (matrix / (matrix.norm() + 1e-7)).to(
        torch.bfloat16 if matrix.is_cuda or autocast_is_faster() else torch.float32
    )
    x = x.T if matrix.shape[0] > matrix.shape[1] else x  # the small side makes the Gram matrix
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).to(matrix)


def fit(name: str, model: nn.Module, loss_of_step, steps: int, lr: float, work: Path, every: int = 500,
        warmup: int = 100, report=None, ema_decay: float = 0.999) -> nn.Module:  # fmt: skip
    """`training.fit` with Muon at rate lr and decay for the matrices of the blocks, AdamW at lr, but at most
    1e-3, for all else, and the moving average of the weights as its result. Of n processes each computes one
    of every n losses: loss_of_step gets step * n + the number of the process."""
    named = [(k, p) for k, p in model.named_parameters() if p.requires_grad]
    inner = {k for k, p in named if p.ndim == 2 and ("layers." in k or "block" in k) and "bias" not in k}
    matrices, others = ([p for k, p in named if (k in inner) == which] for which in (True, False))
    optimizers = [
        Muon(matrices, lr, weight_decay=0.02),
        torch.optim.AdamW(others, min(lr, 1e-3), (0.9, 0.95), weight_decay=0),
    ]
    return training.fit(name, model, loss_of_step, steps, optimizers, work, every=every, warmup=warmup,
                        accumulate=parallel.ranks(), ema_decay=ema_decay, report=report)  # fmt: skip


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


def autocast(device: str = "cpu") -> torch.autocast:
    return torch.autocast(device, torch.bfloat16, enabled=device != "cpu" or autocast_is_faster())


# ------------------------------------------------------------------------------------------------- 3 VAE


def pieces(index: int, clips: int, crops: int, size: int, length: int):
    """`crops` squares of `size` pixels out of `length` frames of each of the clips of this loss.

    Returns (clips * crops, 3, length, size, size) in [-1, 1], the things' masks (..., 1, ...) and where each
    square starts (clips * crops, 2), y and x, in latents. All but one square a clip are at a thing: there a
    square of 48 pixels has rims in half of its patches, the whole frame in a tenth.
    """
    video, masks, corners = [], [], []
    rng = np.random.default_rng([index, 7])
    for k in range(clips):
        clip = world.make_clip(index * 8 + k)
        start = int(rng.integers(0, len(clip.camera) - length + 1))
        frames = world.render(clip, start, start + length)
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
    return to_tensor(np.stack(video)), torch.from_numpy(np.stack(masks))[:, None], np.stack(corners)


def near(mask: Tensor) -> Tensor:
    """The masks (B, 1, frames, h, w), two pixels wider."""
    return F.max_pool3d(mask, (1, 5, 5), 1, (0, 2, 2))


def see_crops(part: nn.Module) -> None:
    """Let encoder or decoder take crops: part.corners (B, 2) says where each lies, so that it has the
    positions of that place. None: whole frames."""
    whole = part.positions

    def positions(size):
        if part.corners is None:
            return whole(size)
        T, H, W = size
        y = part.corners[:, :1] + torch.arange(H)  # (B, H)
        x = part.corners[:, 1:] + torch.arange(W)
        index = (torch.arange(T)[:, None, None] * GRID + y[:, None, :, None]) * GRID + x[:, None, None, :]
        index = F.pad(1 + index.flatten(1), (1, 0))  # the class token first
        return whole((T, GRID, GRID))[0][index]

    part.corners = None
    part.positions = positions


CROP, NOISE, EDGE = 48, 0.1, 0.5  # side of crops in pixels; noise on latents at most, in deviations; weight
UNSEEN = 24  # clips that each checkpoint of the VAE is measured on


def reconstruction(vae: magi.VAE, video: Tensor, weight: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The VAE's loss and its mean square error. noise (B,): on latents, in deviations of a channel."""
    loss, recon = training.vae_loss(vae, video, weight, latent_noise=noise)
    error = recon.float() - video
    return loss + sharpness(error, weight), (error.detach() ** 2).mean()


def sharpness(error: Tensor, weight: Tensor, squares: float = 2) -> Tensor:
    """What the loss of a picture has beside L1: squares, and slopes that the original does not have, such as
    ringing and soft rims."""
    across = (weight[..., 1:] * error.diff(dim=-1).abs()).mean()
    down = (weight[..., 1:, :] * error.diff(dim=-2).abs()).mean()
    return squares * (weight * error**2).mean() + EDGE * (across + down)


def train_vae(args) -> None:
    """On crops for nine tenths of the steps, then on whole frames. --init: the decoder alone goes on from the
    weights in this folder, so that latents stay as they are."""
    torch.manual_seed(0)
    vae = vae_to_train(args.init)
    see_crops(vae.encoder)
    see_crops(vae.decoder)
    fast = torch.compile(reconstruction, dynamic=False) if args.compile else reconstruction
    whole_from = 0.9 * args.steps

    def loss_of_step(i: int):
        step = i // parallel.ranks()
        rng = np.random.default_rng([step, 8])  # alike in all processes, so that none waits for another
        if step < whole_from:
            length, loss, most = 12, fast, NOISE  # one shape, compiled once
            video, mask, corners = pieces(i, args.batch, 3, CROP, length)
            vae.encoder.corners = vae.decoder.corners = torch.from_numpy(corners)
        else:
            length, loss, most = int(rng.choice([12] * 6 + [8, 1])), reconstruction, 0.4 * NOISE
            video, mask, _ = pieces(i, max(1, args.batch // 2), 1, SIZE, length)
            vae.encoder.corners = vae.decoder.corners = None
        noise = most * torch.rand(len(video), generator=torch.Generator().manual_seed(i)) ** 2
        with autocast():
            value, square = loss(vae, video, 1 + 3 * near(mask), noise)
        return value, {"psnr": (10 * torch.log10(4 / square)).item()}

    test = [world.make_clip(10**6 + i, heldout=None) for i in range(UNSEEN)]
    video = to_tensor(np.stack([world.render(clip, 36, 48) for clip in test]))
    mask = near(torch.from_numpy(np.stack([clip.masks(36, 48).max(0) for clip in test]))[:, None])

    @torch.no_grad()
    def report() -> str:
        vae.encoder.corners = vae.decoder.corners = None
        with autocast():
            out = torch.cat([vae.decode(vae.encode(v[None])).float() for v in video]).clamp(-1, 1)
        square = (out - video) ** 2
        each = 10 * torch.log10(4 / square.mean((1, 2, 3, 4)))
        inside = 10 * torch.log10(4 * 3 * mask.sum() / (square * mask).sum())
        return (
            f"PSNR {psnr(out, video):.2f} dB, mean of clips {each.mean():.2f}, worst {each.min():.2f}, "
            f"on things {inside:.2f}"
        )

    fit("vae", vae, loss_of_step, args.steps, args.lr, args.work, every=args.every, report=report)
    vae.encoder.corners = vae.decoder.corners = None
    if not args.init:
        standardise(vae, video)
    if parallel.rank() == 0:
        save_model(args.out / "vae", vae, {"vae": asdict(vae.cfg)})


def vae_to_train(init: Path | None) -> magi.VAE:
    """A new VAE, or that in folder `init`, of which only the decoder learns."""
    vae = magi.VAE(magi.VAE_PRESETS["tiny"])
    vae.ops = CPU_OPS
    if init:
        vae.load_state_dict(magi.load_vae(init / "vae").state_dict())
        vae.encoder.requires_grad_(False)
    for conv in (vae.encoder.patch_embed, vae.decoder.last_layer):
        no_autocast(conv)
    return vae


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
        outputs.save({k: v.to(torch.bfloat16) for k, v in sd.items()}, folder / f"{name}.safetensors")
    print(f"wrote {folder}")


# ---------------------------------------------------------------------------------------- 4 text and DiT


class Tiny(nn.Module):
    """What is trained together: the DiT, the T5 encoder that feeds it, and the special tokens."""

    def __init__(self, size: int = SIZE, spiece: Path = SPIECE):
        """size: of frames in pixels; spiece: the file of the tokenizer."""
        super().__init__()
        from transformers import T5Config, T5EncoderModel

        self.spiece, preset = spiece, magi.PRESETS["tiny"]
        self.sampler = dataclasses.replace(
            preset.sampler, height=size, width=size, text_scales=(2.5, 2.5, 2.5, 1.0, 1.0)
        )
        self.dit = magi.DiT(preset.dit)
        assert preset.dit.text_length <= LONGEST
        self.dit.ops = CPU_OPS
        width = preset.dit.text_dim
        self.t5 = T5EncoderModel(
            T5Config(
                vocab_size=tokenizer(spiece).vocab_size(),
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
            shutil.copy(self.spiece, folder / "t5" / "spiece.model")
        (folder / "t5" / "words.json").write_text(json.dumps(world.words(), indent=1) + "\n")

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Captions -> text (n, L, C) and mask (n, L), as magi.T5 gives them."""
        ids, mask = magi.tokenize(tokenizer(self.spiece), captions, self.dit.cfg.text_length)
        used = max(1, int(mask.sum(1).max()))
        ids, mask = ids.to(self.t5.device), mask.to(self.t5.device)
        hidden = self.t5(ids[:, :used], attention_mask=mask[:, :used]).last_hidden_state.float()
        return F.pad(hidden, (0, 0, 0, mask.shape[1] - used)), mask

    def text(self, captions: list[list[str]], remaining: list[int]) -> tuple[Tensor, Tensor]:
        """Captions of each chunk of each clip -> text (B, n, L, C) with special tokens, mask (B, n, L).

        remaining: how many chunks are left at the first chunk of each clip, for its duration token.
        """
        unique = sorted({c for clip in captions for c in clip})
        texts, masks = self.encode(unique)
        encoded = {c: (texts[i], masks[i]) for i, c in enumerate(unique)}
        clips = [
            finetune.chunk_texts([encoded[c] for c in clip], left, self.sampler, self.tokens)
            for clip, left in zip(captions, remaining, strict=True)
        ]
        return tuple(map(torch.stack, zip(*clips, strict=True)))

    @torch.no_grad()
    def pipeline(self, vae: magi.VAE) -> magi.MAGI:
        """The user's view of the model in training."""
        return magi.MAGI(
            self.dit, vae, self.sampler, {k: v.detach() for k, v in self.tokens.items()}, self.encode
        )


def made_tokenizer(out: Path) -> Path:
    """The tokenizer's file, made if it is not there."""
    file = out / "t5" / "spiece.model"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        world.train_tokenizer(str(file))
    return file


@functools.cache
def tokenizer(spiece: Path):
    return load_tokenizer(spiece.parent)


# ------------------------------------------------------------------------------------- 5 clips as latents


LATE = 384  # late films of each process


class Film(NamedTuple):
    """What is shown in training."""

    frames: np.ndarray  # (24 n, size, size, 3) uint8
    captions: tuple[str, ...]  # n


def make_film(seed: int, chunks: int, size: int) -> Film:
    """The first chunks of a clip; of one clip in six they are followed, after a cut, by those of another.
    Of clips of one chunk three in five show one thing alone, since nothing but these shows all motions."""
    more = chunks == 1 and seed % 5 < 2
    clip, n = world.make_clip(seed, kind="alone" if more else ""), chunks
    if chunks > 1 and seed % 6 == 0:
        n = 1 + seed // 6 % (chunks - 1)
    first = filmed(clip, range(n), size)
    if n == chunks:
        return first
    then = make_film(seed + 10**8 + 1, chunks - n, size)
    return Film(np.concatenate([first.frames, then.frames]), first.captions + then.captions)


def make_late_film(seed: int, chunks: int, size: int) -> Film:
    """Chunks of a clip from its second, or a later one up to its seventh, on: one thing, whose caption stays.
    In half of these it slid or fell, and rests by then, which the first chunks of a clip do not show."""
    start = 1 + seed % 6
    clip = world.make_clip(seed + 2 * 10**8, chunks=start + chunks, events=0, kind="alone")
    return filmed(clip, range(start, start + chunks), size)


def filmed(clip: world.Clip, chunks: range, size: int) -> Film:
    """These chunks of a clip."""
    frames = world.render(clip, 24 * chunks.start, 24 * chunks.stop)
    if size < SIZE:
        frames = np.rint(halved(frames)).astype(np.uint8)
    return Film(frames, clip.captions[chunks.start : chunks.stop])


def halved(images: np.ndarray) -> np.ndarray:
    """(n, 2 h, 2 w, ...) -> (n, h, w, ...): the mean of two by two pixels, float."""
    n, h, w = images.shape[:3]
    return images.reshape(n, h // 2, 2, w // 2, 2, *images.shape[3:]).mean((2, 4), dtype=np.float32)


def see_size(vae: magi.VAE, size: int) -> None:
    """Let the VAE take frames of this size: smaller ones have the positions of the frame's middle."""
    middle = (SIZE - size) // 16
    for part in (vae.encoder, vae.decoder):
        see_crops(part)
        part.corners = torch.full((1, 2), middle) if middle else None


class Stored:
    """The items 0, 1, 2, ... of a training set, made as they are first needed and kept in files. Of n
    processes each makes and draws every n-th file."""

    def __init__(self, folder: Path, per_file: int, make: Callable[[range], dict]):
        """make: numbers of items -> name -> a value for each item, a tensor or a list."""
        self.folder, self.per_file, self.make = folder, per_file, make
        self.files: list[dict] = []
        folder.mkdir(parents=True, exist_ok=True)

    def draw(self, rng: np.random.Generator, count: int, of: int) -> list[dict]:
        """`count` of this process's first `of` items."""
        while len(self.files) * self.per_file < of:
            self.files.append(self.read(parallel.rank() + len(self.files) * parallel.ranks()))
        picks = [divmod(i, self.per_file) for i in rng.integers(0, len(self.files) * self.per_file, count)]
        return [{name: values[k] for name, values in self.files[i].items()} for i, k in picks]

    def read(self, index: int) -> dict:
        file = self.folder / f"{index:04d}.pt"
        if not file.exists():
            items = self.make(range(index * self.per_file, (index + 1) * self.per_file))
            outputs.replace(file, functools.partial(torch.save, items))
        return torch.load(file, weights_only=True)


class Films(Stored):
    """Films as latents (16, 6 n, h, w); images, the fourth frame alone as an image is encoded (16, 1, h, w);
    and captions."""

    PER_FILE = {1: 256, 4: 64}  # films, by their chunks

    def __init__(self, vae: magi.VAE, chunks: int, args, late: bool = False):
        folder = args.work / f"films{args.size}_{chunks}{'late' if late else ''}"
        super().__init__(folder, self.PER_FILE[chunks], self.make_all)
        make = make_late_film if late else make_film
        self.vae, self.paint = vae, functools.partial(make, chunks=chunks, size=args.size)
        self.pool = ProcessPoolExecutor(args.workers) if args.workers else None

    def make_all(self, seeds: range) -> dict:
        return self.encode((self.pool.map if self.pool else map)(self.paint, seeds))

    @torch.no_grad()
    def encode(self, films: Iterable[Film]) -> dict:
        latents, images, captions = [], [], []
        device = next(self.vae.parameters()).device
        for some in batched(films, 8):
            video = to_tensor(np.stack([f.frames for f in some])).to(device)
            with autocast(device.type):
                latents.append((self.vae.encode(video) * magi.SCALE_FACTOR).bfloat16().cpu())
                images.append((self.vae.encode(video[:, :, 3:4]) * magi.SCALE_FACTOR).bfloat16().cpu())
            captions += [list(f.captions) for f in some]
        return {"latents": torch.cat(latents), "images": torch.cat(images), "captions": captions}


def batched(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while some := list(islice(items, size)):
        yield some


def make_batch(films: Films, rng: np.random.Generator, n: int, count: int, of: int, model: Tiny) -> dict:
    """The first n chunks of `count` films, as the losses of training.py take them."""
    drawn, device = films.draw(rng, count, of), model.dit.null_text.device
    stack = lambda name: torch.stack([film[name] for film in drawn]).float().to(device)
    # The films have no end of their own, so how much is left is drawn: every duration token gets trained.
    text, mask = model.text([film["captions"][:n] for film in drawn], rng.integers(n, 12, count).tolist())
    return {
        "latents": stack("latents")[:, :, : n * magi.CHUNK],
        "text": text,
        "text_mask": mask,
        "images": stack("images"),
    }


# ------------------------------------------------------------------------------------ 6 training the DiT


def train_dit(args) -> None:
    """Half the size first (--size 64), where a step shows four times as many clips, then the whole (--init).

    Chunks alone first: with a history to copy from, captions are learned four times slower. Later more and
    more often two or four in a row, which teach histories, continuations and changes at a boundary. At the
    whole size most of these show the moment at which a chunk enters after clean ones: then it has to read
    from them where things are and how fast they move, which left to chance it learns but slowly. Some show
    late films, without which things that rest lose their shape in long videos.
    """
    torch.manual_seed(1)
    vae = magi.load_vae(args.out / "vae").to(args.device)
    see_size(vae, args.size)
    model = Tiny(args.size, parallel.from_first(made_tokenizer)(args.out)).to(args.device)
    if args.init:
        model.load(args.init)
    if args.frozen_text:
        model.t5.requires_grad_(False)
        model.tokens.requires_grad_(False)
    if args.compile:
        compile_layers(model.dit)
    singles, films = Films(vae, 1, args), Films(vae, 4, args)
    late = Films(vae, 4, args, late=True)
    batch_size = args.batch // parallel.ranks()
    # What moves how is decided below t = 0.1, where the report's law puts 1 draw in 70: most clips take the
    # sampler's own times instead.
    mixed = training.TrainingConfig(pipeline_share=0.8)
    cfgs = {
        "alone": dataclasses.replace(mixed, video_share=0.0),
        "mixed": mixed,
        "enters": training.TrainingConfig(
            image_share=0.05,
            video_share=0.85,
            whole_share=0.8,
            pipeline_share=1.0,
            entering_share=1.0,
            null_share=0.1,
        ),
    }
    cfgs["late"] = dataclasses.replace(cfgs["enters"], image_share=0.0, video_share=1.0)

    def loss_of_step(i: int):
        step = i // parallel.ranks()
        rng, done = np.random.default_rng([step, 10]), step / args.steps  # alike in all processes
        if args.init:
            shares = [0.45, 0.2, 0.2, 0.15]
        else:
            several = np.clip(2 * done - 0.2, 0, 0.6)
            shares = [1 - several, several, 0, 0]
        kind = str(rng.choice([*cfgs], p=shares))
        n = 1 if kind == "alone" else int(rng.choice([2, 4], p=[0.6, 0.4]))
        rng = np.random.default_rng([i, 11])
        shown = batch_size * step  # chunks so far, each about sixteen times
        if kind == "late":
            batch = make_batch(late, rng, n, batch_size // n, LATE, model)
        elif n > 1:
            batch = make_batch(films, rng, n, batch_size // n, min(args.films, 128 + shown // 64), model)
        else:
            batch = make_batch(singles, rng, 1, batch_size, min(args.singles, 512 + shown // 16), model)
        generator = torch.Generator().manual_seed(i)
        with autocast(args.device):
            loss = training.flow_matching_loss(
                model.dit, **batch, cfg=cfgs[kind], sampler=model.sampler, generator=generator
            )
        return loss, {"chunks": n}

    report = lambda: followed(model.pipeline(vae), args.size)
    name = f"dit{args.size}"
    fit(name, model, loss_of_step, args.steps, args.lr, args.work, every=args.every, report=report)
    if parallel.rank() == 0:
        model.save(args.out)


def compile_layers(dit: magi.DiT) -> None:
    torch._dynamo.config.recompile_limit = 64  # a shape for each number of chunks
    for layer in dit.layers:
        layer.compile()


def followed(pipe: magi.MAGI, size: int) -> str:
    """How many of 24 captions a model in training follows, for its log."""
    scale = SIZE // size
    enlarged = lambda frames: judge(frames.repeat(scale, 1).repeat(scale, 2))
    prompts = world.sample_prompts(24, seed=5, heldout=None)
    with torch.compiler.set_stance("force_eager"):  # each new shape would be compiled
        scores = judge_prompts(pipe, prompts, 24, judge=enlarged)
    return ", ".join(f"{name} {share:.0%}" for name, share in scores.items())


# ------------------------------------------------------------------------------ 7 distillation and LoRA


def distill(args) -> None:
    """The base model teaches a copy of itself: one branch for three, one step for two, four, eight.

    Text encoder, special tokens and VAE stay as they are. Clips of 1 to 4 chunks are the moments of a video's
    first seconds and of all later ones; the short ones cost less, and there are more of them in a batch.
    """
    torch.manual_seed(2)
    vae = magi.load_vae(args.out / "vae").to(args.device)
    see_size(vae, args.size)
    model = Tiny(args.size, args.out / "t5" / "spiece.model")
    model.load(args.out)
    model.requires_grad_(False).to(args.device)
    model.sampler = checkpoints.read_config(args.out / "base", "sampler", magi.SamplerConfig)
    student = copy.deepcopy(model.dit).requires_grad_()
    if args.init:
        student.load_state_dict(magi.load_dit(args.init / "distill").state_dict())
    if args.compile:
        compile_layers(model.dit)
        compile_layers(student)
    sampler = dataclasses.replace(model.sampler, distilled=True, num_steps=8)
    films, late = Films(vae, 4, args), Films(vae, 4, args, late=True)
    cfg = training.TrainingConfig(video_share=0.5, whole_share=0.8)

    def loss_of_step(i: int):
        step = i // parallel.ranks()
        num_steps = training.shortcut_steps(step)
        n = int(np.random.default_rng([step, 12]).choice([1, 2, 3, 4], p=[0.3, 0.15, 0.15, 0.4]))
        rng = np.random.default_rng([i, 13])
        some, of = (late, LATE) if rng.random() < 0.25 else (films, args.films)
        batch = make_batch(some, rng, n, args.batch // parallel.ranks() // n, of, model)
        generator = torch.Generator().manual_seed(i)
        with autocast(args.device):
            loss = training.shortcut_loss(
                student,
                model.dit,
                **batch,
                num_steps=num_steps,
                cfg=cfg,
                sampler=model.sampler,
                generator=generator,
            )
        return loss, {"steps": num_steps}

    tokens = {name: token.detach() for name, token in model.tokens.items()}
    pipe = magi.MAGI(student, vae, sampler, tokens, model.encode)
    report = lambda: "at 8 steps " + followed(pipe, args.size)
    fit("distill", student, loss_of_step, args.steps, args.lr, args.work, every=args.every, report=report)
    config = {"dit": asdict(student.cfg), "sampler": asdict(sampler)}
    if parallel.rank() == 0:
        save_model(args.out / "distill", student, config, special_tokens=tokens)


TOGETHER = 64  # clips that are made at once for the decoder, and kept in a file
OFFSET, SEAM = 0.08, 1.0  # of tokens, at most, in deviations; weight of steps where tokens meet
RIM = 8.0  # weight of the outermost pixels, where the last convolution sees zeros


@torch.no_grad()
def finish(dit: magi.DiT, latents: Tensor, text: Tensor, mask: Tensor, seed: int) -> Tensor:
    """Latents of chunks (B, 16, 6, h, w) after noise and the last of a distilled model's 8 steps: from t =
    0.3 on, where the layout is settled, for two of three clips, else from t = 0.52."""
    generator = torch.Generator().manual_seed(seed)
    grid, d = magi.timestep_grid(8).tolist(), magi.shortcut_d(8)[0]
    first = torch.tensor([6, 6, 7]).repeat(len(latents))[: len(latents)]
    noise = torch.randn(latents.shape, generator=generator)
    t = torch.tensor(grid)[first].view(-1, 1, 1, 1, 1)
    x = (1 - t) * noise + t * latents
    for i in (6, 7):
        moves = first <= i
        at = torch.full((int(moves.sum()), 1), grid[i])
        with autocast():
            v = dit(x[moves], at, text[moves], mask[moves], d=d)
        x[moves] += (grid[i + 1] - grid[i]) * v
    return x


def apart(shape: tuple[int, ...], seed: int) -> Tensor:
    """An offset for each token of latents (B, 16, T, H, W), the same at all times, and none for every second
    clip."""
    B, channels, _, H, W = shape
    generator = torch.Generator().manual_seed(seed)
    offset = torch.randn(B, channels, 1, H // 2, W // 2, generator=generator)
    much = OFFSET * torch.rand(B, generator=generator) * (torch.arange(B) % 2)
    return much.view(-1, 1, 1, 1, 1) * offset.repeat_interleave(2, -1).repeat_interleave(2, -2)


def decoding(vae: magi.VAE, latents: Tensor, video: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The decoder's loss and its mean square error."""
    error = vae.decoder(latents / magi.SCALE_FACTOR).float() - video
    across, down = error.diff(dim=-1)[..., 15::16], error.diff(dim=-2)[..., 15::16, :]
    seams_loss = SEAM * (across.abs().mean() + down.abs().mean())
    loss = (weight * error.abs()).mean() + sharpness(error, weight, squares=6) + seams_loss
    return loss, (error.detach() ** 2).mean()


def train_decoder(args) -> None:
    """The decoder learns to decode what the distilled model makes. Its tokens, 16 pixels wide, do not quite
    agree where they meet. A decoder that knows only latents of clips shows that as steps, which are too low
    to count in a mean error, but not for the eye: so they are given a loss of their own. Half of what is
    decoded are clips' latents as they are. The encoder stays, and so do all latents."""
    torch.manual_seed(3)
    vae = vae_to_train(args.out)
    model = Tiny(SIZE, args.out / "t5" / "spiece.model")
    model.load(args.out)
    model.dit.load_state_dict(magi.load_dit(args.out / "distill").state_dict())

    @torch.no_grad()
    def make(seeds: range) -> dict:
        """Seconds of clips: frames, where things are, latents, and these after noise and the last steps."""
        clips = [world.make_clip(seed, kind="alone" if seed % 5 < 2 else "") for seed in seeds]
        frames = np.stack([world.render(clip, 0, 24) for clip in clips])
        masks = torch.from_numpy(np.stack([clip.masks(0, 24).max(0) for clip in clips]))
        left = np.random.default_rng([seeds[0], 14]).integers(1, 12, len(clips)).tolist()
        with autocast():
            latents = torch.cat([vae.encode(video) for video in to_tensor(frames).split(8)]).float()
            latents *= magi.SCALE_FACTOR
            text, mask = model.text([clip.captions[:1] for clip in clips], left)
            finished = finish(model.dit, latents, text, mask, seeds[0])
        return {"frames": torch.from_numpy(frames), "masks": near(masks[:, None])[:, 0] > 0,
                "latents": latents, "finished": finished}  # fmt: skip

    seconds, batch_size = Stored(args.work / "finished", TOGETHER, make), args.batch // parallel.ranks()

    fast = torch.compile(decoding, dynamic=False) if args.compile else decoding

    def loss_of_step(i: int):
        rng, seen = np.random.default_rng([i, 15]), batch_size * i // parallel.ranks()
        drawn = seconds.draw(rng, batch_size, min(args.films, 128 + seen // 4))
        start = int(rng.integers(2)) * magi.CHUNK // 2  # half a second is what the VAE takes at once
        shown, frames = slice(start, start + 3), slice(4 * start, 4 * start + 12)
        mixed = [one["finished" if k % 2 else "latents"][:, shown] for k, one in enumerate(drawn)]
        latents = torch.stack(mixed)
        latents = latents + apart(latents.shape, seed=i)
        video = to_tensor(torch.stack([one["frames"][frames] for one in drawn]).numpy())
        weight = 1 + 3 * torch.stack([one["masks"][frames] for one in drawn])[:, None].float()
        weight[..., [0, -1]] += RIM
        weight[..., [0, -1], :] += RIM
        with autocast():
            loss, square = fast(vae, latents, video, weight)
        return loss, {"psnr": (10 * torch.log10(4 / square)).item()}

    test = make(range(10**6, 10**6 + UNSEEN))

    @torch.no_grad()
    def report() -> str:
        said = []
        for name in ("latents", "finished"):
            with autocast():
                out = torch.cat([vae.decode(some[None] / magi.SCALE_FACTOR) for some in test[name]]).float()
            steps = np.mean([seams(to_frames(video)) for video in out])
            said.append(f"{name}: {psnr(out, to_tensor(test['frames'].numpy())):.2f} dB, seams {steps:.2f}")
        return ", ".join(said)

    fit("decoder", vae, loss_of_step, args.steps, args.lr, args.work, every=args.every, report=report,
        warmup=20, ema_decay=0.99)  # fmt: skip
    if parallel.rank() == 0:
        save_model(args.out / "vae", vae, {"vae": asdict(vae.cfg)})


def lesson(new: str, heldout: bool) -> list[world.Triple]:
    """All combinations with a new colour or shape: those to ask for afterwards, or those to teach it with."""
    if new in world.NEW_COLOURS:
        triples = [(new, shape, motion) for shape in world.SHAPES for motion in world.MOTIONS]
    else:  # the first few have all motions and colours too
        colours = [*world.COLOURS]
        triples = [
            (colours[(i + k) % len(colours)], new, motion)
            for i in range(len(colours))
            for k, motion in enumerate(world.MOTIONS)
        ]
    return [triple for triple in triples if world.held_out(*triple) == heldout]


def write_clips(args) -> None:
    """A folder for `training.py lora`: mp4 files, each with a caption a second, half of them in a colour or
    shape that no training clip had, half in the old ones. Without these the model would forget what it is not
    shown. Clips that are there already are left alone."""
    triples = lesson(args.teach, heldout=False)
    shown = [(*triple, [*world.PLACES][(i + k) % 4]) for i, triple in enumerate(triples) for k in range(2)]
    shown = shown[: args.clips]
    args.out.mkdir(parents=True, exist_ok=True)
    for i, names in enumerate(tqdm(shown, desc="write clips", unit_scale=2)):
        new = world.scene(*names, chunks=2, seed=i // 2)
        for kind, clip in ((args.teach, new), ("old", world.make_clip(i, chunks=2))):
            video, captions = (args.out / f"{kind}{i:03}.{suffix}" for suffix in ("mp4", "txt"))
            if not captions.exists():
                video.unlink(missing_ok=True)
                writer = media.Mp4Writer(video, world.FPS)
                writer.write(clip.frames)
                writer.close()
                captions.write_text("\n".join(clip.captions) + "\n")


TOKENS = magi.CHUNK * (GRID // 2) ** 2  # of a chunk


def train_lora(args) -> None:
    """A LoRA teaches the base model a colour or shape that none of its clips had, in minutes on a CPU: from a
    folder of clips, by the program that trains on anybody's clips."""
    work, file = args.work / f"lora_{args.teach}", args.out / "lora" / f"{args.teach}.safetensors"
    clips = args.work / f"clips_{args.teach}"
    parallel.from_first(write_clips)(SimpleNamespace(out=clips, clips=args.clips, teach=args.teach))
    file.parent.mkdir(exist_ok=True)
    if not (work / "settings.json").exists():  # a new run replaces the shipped file
        file.unlink(missing_ok=True)
    flags = {"model": args.out / "base", "data": clips, "out": file, "work": work, "rank": args.rank,
             "steps": args.steps, "lr": args.lr, "seconds": 2, "tokens": TOKENS * args.batch,
             "sample_every": 0}  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    finetune.run(finetune.parser().parse_args(["lora", "--keep_activations", *words]))
    if parallel.rank() == 0:
        judge_lora(args, file)


def judge_lora(args, file: Path) -> None:
    """Prompts with the new colour or shape, in combinations that the LoRA was not shown, and with the old
    ones; without the LoRA and with it."""
    prompts = [(world.caption([triple]), triple) for triple in lesson(args.teach, heldout=True)]
    others = world.sample_prompts(len(prompts), seed=1)
    known = dict(colours=world.COLOURS | world.NEW_COLOURS, shapes=world.SHAPES + world.NEW_SHAPES)
    for folder in ("base", "distill"):
        if not (args.out / folder).is_dir():
            continue
        for scale in (0.0, 1.0):
            pipe = load_model(args.out / folder)
            training.load_lora(pipe.dit, file, scale)
            for kind, wanted in ((f"{args.teach}, held out", prompts), ("old", others)):
                scores = judge_prompts(pipe, wanted, 24, functools.partial(judge, **known))
                scores = ", ".join(f"{k} {v:.0%}" for k, v in scores.items())
                print(f"{folder}, LoRA x {scale:g}, {kind} ({len(wanted)} prompts): {scores}", flush=True)


def examples(args) -> None:
    """Write the inputs that the README's i2v and v2v commands use."""
    import imageio.v3 as iio

    folder = args.out / "examples"
    folder.mkdir(parents=True, exist_ok=True)
    iio.imwrite(folder / "image.png", world.scene("yellow", "square", "right", "night", seed=2).frames[0])
    (folder / "video.mp4").unlink(missing_ok=True)
    writer = media.Mp4Writer(folder / "video.mp4", world.FPS)
    writer.write(world.scene("green", "ball", "bounce", "room", 2, 5).frames)
    writer.close()
    print(f"wrote {folder}")


# ---------------------------------------------------------------------------------------- 8 command line

STAGES = {"vae": train_vae, "dit": train_dit, "distill": distill, "decoder": train_decoder,
          "lora": train_lora, "clips": write_clips, "examples": examples, "eval": evaluate,
          "steps": write_steps, "phenomena": phenomena}  # fmt: skip


class Recipe(NamedTuple):
    """What made the shipped weights, but for repairs on the way. Until step 14,000 of "dit 128" the loss
    counted cells with a thing three times (notebook 5 tells why that was wrong). Until step 18,000 orbits
    began anywhere (world.py, head); after that most batches had two to four times as many clips of orbits.
    The given frames of a clip ended before its last chunk; now they may be all frames but the last. In these
    22,100 steps two batches of three were clips of one chunk, and none was of the kind "enters". That came
    after, with a frozen text encoder: 1,400 steps of 32 chunks at 1.5e-3, of which half the way was kept, and
    4,800 at 5e-4, from step 1,780 on at 1e-3, with late films from step 2,785 on. The distilled weights moved
    as the base's did, and then learned 640 steps more at 5e-4, five of eight at 1/64. Shipped is the mean
    with those before: without it circles were lost in long videos. In the first 300 steps of "decoder" one
    clip in four kept its latents, and all offsets were as large as they may; RIM came after 750. Until step
    1,800 OFFSET was 0.12 and SEAM 2, in the last 550 steps 0.06 and 0.5. Squares weighed 2 in the first 930
    and 12 in the last 550.
    """

    steps: int
    lr: float
    batch: int  # clips of the VAE, each with three crops, at most 8; else chunks


RECIPES = {
    "vae": Recipe(4600, 3e-3, 7),
    "dit 64": Recipe(9400, 3e-3, 32),
    "dit 128": Recipe(22100, 1.5e-3, 16),
    "distill": Recipe(1500, 1e-3, 16),
    "decoder": Recipe(3380, 1.5e-3, 16),
    "lora": Recipe(120, 2e-3, 16),
}


def parser() -> terminal.Parser:
    how = argparse.RawDescriptionHelpFormatter
    options = terminal.Parser(description=__doc__, formatter_class=how)
    flag, count = options.add_argument, terminal.number(int, 1)
    flag("stage", choices=[*STAGES, "all"], help="all: vae, dit at half and at full size, distill, decoder")
    flag("--work", type=Path, default=HERE / "work", help="checkpoints, latents, loss curves")
    flag("--out", type=Path, default=HERE, help="where the finished models go")
    flag("--steps", type=count, help="if not as many as in RECIPES; rates fall in the last third")
    flag("--lr", type=terminal.number(float, 0), help="highest rate, if not that in RECIPES")
    flag("--batch", type=count, help="vae: clips, at most 8; else chunks of all processes")
    flag("--every", type=count, default=250, help="steps from checkpoint to checkpoint")
    flag("--size", type=int, choices=[64, 128], default=SIZE, help="dit, distill: of frames, in pixels")
    flag("--init", type=Path, help="vae, dit, distill: go on from the weights in this folder, as in tiny")
    flag("--singles", type=count, default=40000, help="dit: clips of one chunk, of each process")
    flag("--films", type=count, default=4000, help="dit, distill: clips of four chunks, of each process; "
         "decoder: of one")  # fmt: skip
    flag("--workers", type=terminal.number(int, 0), default=0, help="dit, distill: to paint clips")
    flag("--frozen_text", action="store_true", help="dit: text encoder and special tokens stay as in --init")
    flag("--device", default="cpu", help="dit, distill: where to train")
    flag("--compile", action="store_true", help="a quarter faster (not for lora); takes a minute and g++")
    new = [*world.NEW_COLOURS, *world.NEW_SHAPES]
    flag("--teach", choices=new, default=new[0], help="clips, lora: what is new")
    flag("--clips", type=count, default=10000, help="clips, lora: videos of each kind, at most")
    flag("--rank", type=count, default=4, help="of the LoRA")
    flag("--model", default="base", help="eval, phenomena: base or distill, in --out")
    flag("--prompts", type=count, default=100, help="eval, steps, phenomena: how many videos")
    flag("--only", nargs="+", choices=[*PHENOMENA], help="phenomena: these alone")
    return options


def run(stage: str, args: argparse.Namespace, **changes) -> None:
    """One stage, with what is not given as in RECIPES."""
    args = argparse.Namespace(**vars(args) | changes)
    recipe = RECIPES.get(f"dit {args.size}" if stage == "dit" else stage)
    if recipe:
        given = {name: getattr(args, name) for name in recipe._fields if getattr(args, name)}
        args = argparse.Namespace(**vars(args) | recipe._asdict() | given)
        if stage == "vae" and args.batch > 8:
            raise ValueError(f"batch {args.batch} is too large: at most 8 clips")
        least = 4 * parallel.ranks()  # a clip of four chunks for each process
        if stage in ("dit", "distill") and args.batch % least:
            raise ValueError(f"batch {args.batch} must be a multiple of {least}")
    if stage == "clips" and args.out == HERE:
        raise ValueError("clips: say with --out which folder to write them to")
    STAGES[stage](args)
    if parallel.ranks() > 1:
        dist.barrier()  # what one has written the next stage reads


def run_all(args: argparse.Namespace) -> None:
    started = time.time()
    if args.init and not args.init.is_dir():
        raise ValueError(f"{args.init} is no folder: check the path")
    if args.frozen_text and not args.init:
        raise ValueError("--frozen_text keeps the text encoder of --init: give its folder")
    parallel.start(args.device)
    with parallel.first_speaks():
        if args.stage == "all":
            run("vae", args)
            run("dit", args, size=64)
            run("dit", args, size=128, init=args.out)
            run("distill", args)
            run("decoder", args)
        else:
            run(args.stage, args)
        print(f"{(time.time() - started) / 60:.1f} minutes")


def main(argv: list[str] | None = None) -> int:
    """The command line -> its exit code."""
    args = parser().parse_args(argv)
    return finetune.exit_code(lambda: run_all(args))


if __name__ == "__main__":
    parallel.leave(main())
