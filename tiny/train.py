"""Train the tiny MAGI on the tiny world: `python tiny/train.py all` makes all of tiny/ but the tokenizer.

    vae    the video autoencoder, on 12-frame pieces                      -> tiny/vae/
    dit    latents of many clips, then text encoder + DiT together        -> tiny/t5/, tiny/base/
    distill  three branches and many steps into one branch and few        -> tiny/distill/
    clips  mp4 files with captions that teach a new colour or shape (--teach cyan, cross)  -> --out
    lora   the same, by `training.py lora`, and what the judge says       -> tiny/lora/cyan.safetensors
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
import dataclasses
import functools
import json
import math
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace

HERE = Path(__file__).resolve().parent
SPIECE = HERE / "t5" / "spiece.model"
sys.path[:0] = [str(HERE.parent), str(HERE)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import world  # noqa: E402
from measure import encode_once, evaluate, judge_prompts, psnr, step_counts, to_video  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

import checkpoints  # noqa: E402
import finetune  # noqa: E402
import magi  # noqa: E402
import media  # noqa: E402
import outputs  # noqa: E402
import parallel  # noqa: E402
import training  # noqa: E402

# ------------------------------------------------------------------------------------ attention on a CPU
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


def weighted_mean(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    """Attention written out: at these sizes PyTorch's fused CPU attention takes longer, its backward ten
    times so. q (b, kv, rows, d), k and v (b, keys, kv, d), valid (b or 1, 1, 1, keys) -> q's shape."""
    scores = (q @ k.permute(0, 2, 3, 1)).masked_fill(~valid, float("-inf"))
    return scores.softmax(-1).to(v) @ v.transpose(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """magi.attention: one chunk that sees all keys."""
    return block_attention(q, k, v, torch.tensor([[[0, k.shape[1]]]]))


CPU_OPS = dataclasses.replace(
    magi.TORCH_OPS, name="many short chunks", attention=attention, block_attention=block_attention
)


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
        ema_decay: float = 0.999, warmup: int = 100, weight_decay: float = 0.02, report=None
        ) -> nn.Module:  # fmt: skip
    """`training.fit` with Muon at rate lr and decay for the matrices of the blocks, AdamW at lr, but at most
    1e-3, for all else, and the moving average of the weights as its result. Of n processes each computes one
    of every n losses: loss_of_step gets step * n + the number of the process."""
    named = [(k, p) for k, p in model.named_parameters() if p.requires_grad]
    inner = {k for k, p in named if p.ndim == 2 and ("layers." in k or "block" in k) and "bias" not in k}
    matrices, others = ([p for k, p in named if (k in inner) == which] for which in (True, False))
    optimizers = [
        Muon(matrices, lr, weight_decay=weight_decay),
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


# ------------------------------------------------------------------------------------------------ VAE


def train_vae(args) -> None:
    torch.manual_seed(0)
    vae = magi.VAE(magi.VAE_PRESETS["tiny"])
    vae.ops = CPU_OPS
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
                loss, recon = training.vae_loss(vae, video, weight, latent_noise=noise)
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

    def __init__(self, preset: magi.Preset = magi.PRESETS["tiny"], of: ModuleType = world, pieces=SPIECE):
        """of: the world whose words it learns; pieces: the file of its tokenizer."""
        super().__init__()
        from transformers import T5Config, T5EncoderModel

        self.words, self.pieces = of.words(), pieces
        self.sampler = dataclasses.replace(preset.sampler, text_scales=(2.5, 2.5, 2.5, 1.0, 1.0))
        self.dit = magi.DiT(preset.dit)
        self.dit.ops = CPU_OPS
        width = preset.dit.text_dim
        self.t5 = T5EncoderModel(
            T5Config(
                vocab_size=tokenizer(pieces).vocab_size(),
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
            shutil.copy(self.pieces, folder / "t5" / "spiece.model")
        (folder / "t5" / "words.json").write_text(json.dumps(self.words, indent=1) + "\n")

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Captions -> text (n, L, C) and mask (n, L), as magi.T5 gives them."""
        ids, mask = magi.tokenize(tokenizer(self.pieces), captions, self.dit.cfg.text_length)
        used = max(1, int(mask.sum(1).max()))
        ids, mask = ids.to(self.t5.device), mask.to(self.t5.device)
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
                names = magi.token_names(self.sampler.special_tokens, magi.SPECIAL_TOKENS, left - i)
                tokens = [self.tokens[name] for name in names]
                rows.append(magi.prepend_tokens(hidden[unique.index(c)], mask[unique.index(c)], tokens))
        return tuple(torch.stack(u).unflatten(0, (len(captions), -1)) for u in zip(*rows, strict=True))

    @torch.no_grad()
    def pipeline(self, vae: magi.VAE) -> magi.MAGI:
        """The user's view of the model in training."""
        return magi.MAGI(
            self.dit, vae, self.sampler, {k: v.detach() for k, v in self.tokens.items()}, self.encode
        )


@functools.cache
def tokenizer(pieces: Path):
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(pieces))


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
            encoded = encode(vae, made)
            outputs.replace(file, functools.partial(torch.save, encoded))
        parts.append(torch.load(file, weights_only=True))
    join = lambda lists: sum(lists, []) if isinstance(lists[0], list) else torch.cat(lists)
    return {k: join([part[k] for part in parts]) for k in parts[0]}


def draw_clips(rng: np.random.Generator, n: int, count: int, model: Tiny, data: dict) -> dict[str, Tensor]:
    """The first n chunks of `count` encoded clips, as the losses of training.py take them.

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
    alone, together = training.TrainingConfig(video_share=0.0), training.TrainingConfig()

    def loss_of_step(step: int):
        """Early on mostly single chunks: with a history to copy from, captions are learned four times slower.
        Later mostly four in a row, which teach the rest: histories, continuations, changes at a boundary."""
        rng = np.random.default_rng([step, 11])
        n = 1 if rng.random() < (0.75 if step < args.dit_steps / 2 else 0.5) else 4
        with autocast():
            loss = training.flow_matching_loss(
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
    model.sampler = checkpoints.read_config(args.out / "base", "sampler", magi.SamplerConfig)
    student = copy.deepcopy(model.dit).requires_grad_()
    sampler = dataclasses.replace(model.sampler, distilled=True, num_steps=8)
    cycle = (*training.SHORTCUT_CYCLE, 4)

    def loss_of_step(step: int):
        rng, num_steps = np.random.default_rng([step, 13]), training.shortcut_steps(step, cycle)
        n = int(rng.choice([1, 2, 3, 4], p=[0.3, 0.15, 0.15, 0.4]))
        with autocast():
            loss = training.shortcut_loss(
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
    shown = [(*triple, [*world.PLACES][(i + k) % 4]) for i, triple in enumerate(triples) for k in range(2)][
        : args.clips
    ]
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


def train_lora(args) -> None:
    """A LoRA teaches the base model a colour or shape that none of its clips had, in minutes on a CPU: from a
    folder of clips, by the program that trains on anybody's clips."""
    work, file = args.work / f"lora_{args.teach}", args.out / "lora" / f"{args.teach}.safetensors"
    clips = args.work / f"clips_{args.teach}"
    write_clips(SimpleNamespace(out=clips, clips=args.clips, teach=args.teach))
    file.parent.mkdir(exist_ok=True)
    if not (work / "settings.json").exists():  # a new run replaces the shipped file
        file.unlink(missing_ok=True)
    flags = {"model": args.out / "base", "data": clips, "out": file, "work": work,
             "rank": args.rank, "steps": args.lora_steps, "lr": 2e-3, "seconds": 2, "tokens": 96 * args.batch,
             "sample-every": 0}  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    finetune.run(finetune.parser().parse_args(["lora", "--keep-activations", *words]))
    judge_lora(args, file)


def judge_lora(args, file: Path) -> None:
    """Prompts with the new colour or shape, in combinations that the LoRA was not shown, and with the old
    ones; without the LoRA and with it."""
    prompts = [(world.caption([triple]), triple) for triple in lesson(args.teach, heldout=True)]
    others = world.sample_prompts(len(prompts), seed=1)
    judge = functools.partial(world.judge, shapes=world.SHAPES + world.NEW_SHAPES)
    for folder in ("base", "distill"):
        if not (args.out / folder).is_dir():
            continue
        for scale in (0.0, 1.0):
            pipe = magi.load(args.out / folder)
            encode_once(pipe, args.out / "t5")
            training.load_lora(pipe.dit, file, scale)
            for kind, wanted in ((f"{args.teach}, held out", prompts), ("old", others)):
                scores = judge_prompts(pipe, wanted, 24, world.COLOURS | world.NEW_COLOURS, judge)
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


STAGES = {"vae": train_vae, "dit": train_dit, "distill": distill, "lora": train_lora, "eval": evaluate,
          "steps": step_counts, "examples": examples,
          "clips": write_clips}  # fmt: skip


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
    parser.add_argument("--clips", type=count, default=10000, help="for the DiT, in files of 500; of a LoRA")
    parser.add_argument("--dit-steps", type=count, default=10000)
    parser.add_argument("--distill-steps", type=count, default=3000)
    parser.add_argument("--distill-lr", type=float, default=1e-3)
    new = [*world.NEW_COLOURS, *world.NEW_SHAPES]
    parser.add_argument("--teach", choices=new, default=new[0], help="clips, lora: what is new")
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
