"""Fine-tuning on one's own videos: `python training.py lora`, `full` or `distill`; also `merge` and `export`.

    python training.py lora --model models/4.5B-base --data clips/ --out my.safetensors
    python sample.py --model models/4.5B-base --lora my.safetensors --prompt "..."

    clips/ --clips.py--> latents and text, cached --> Batches --> the losses of training.py --> training.fit
                                                                                                     |
    my.safetensors, and my.work/: train.pt (to go on), train.csv, train.png, samples/  <-------------+

The order is made for small machines: VAE and T5 run once and are freed before the DiT is loaded; of all
layers but one only the inputs are kept for the backward pass. Mistakes are told before any weight is loaded.

Left out on purpose: weights shared out over several GPUs (fully_shard), streamed weights, training in fp8.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import importlib.util
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import clips
import media
from captions import clean_caption
from checkpoints import build, check_device, read_config, read_json, read_tensors, require, save
from folders import new_folder, only_run_in
from magi import (
    CHUNK,
    MAGI,
    SPECIAL_TOKENS,
    DiT,
    DiTConfig,
    SamplerConfig,
    check_tokens,
    load_dit,
    load_vae,
    prepend_tokens,
    token_names,
)
from training import (
    EXPORT_NAMES,
    AdamW,
    add_lora,
    check_lora,
    export_lora,
    fit,
    flow_matching_loss,
    load_lora,
    lora_targets,
    merge_lora,
    read_log,
    save_lora,
    shortcut_loss,
    shortcut_steps,
)

# ----------------------------------------------------------------------------------------------------------
# 1  Memory
# ----------------------------------------------------------------------------------------------------------


def checkpoint_layers(dit: DiT) -> None:
    """Keep only the input of each layer for the backward pass, and compute the rest again: a third more work,
    and the memory of one layer in place of all."""
    from torch.utils.checkpoint import checkpoint

    for layer in dit.layers:
        plain = layer.forward
        layer.forward = functools.partial(checkpoint, plain, use_reentrant=False)


def memory_plan(dit: DiT, command: str, rank: int, tokens: int, text_tokens: int, optimizer: str = "adamw",
                keep_activations: bool = False) -> dict[str, float]:
    """Bytes of a training step of a DiT (on the meta device), by what they are for.

    tokens and text_tokens: of one forward. Activations are the inputs of all layers and what the matrices and
    norms of one layer save (`checkpoint_layers`), or of all. It is an estimate: allocators take some more.
    """
    cfg = dit.cfg
    weights = sum(p.nbytes for p in dit.parameters())
    plan: dict[str, float] = {"weights": weights}
    if rank:
        lora = sum(rank * sum(linear.weight.shape) for linear in lora_targets(dit).values())
        plan |= {"LoRA": 4 * lora, "gradients": 4 * lora, "optimiser": 8 * lora}
    else:
        rounded = sum(2 * p.numel() for p in dit.parameters() if p.element_size() == 2)  # what bf16 has lost
        states = 8 * sum(p.numel() for p in dit.parameters()) + rounded
        plan |= {"gradients": weights, "optimiser": states if optimizer == "adamw" else states / 4}
        if command == "distill":
            plan["teacher"] = weights

    D, FFN, width = cfg.hidden_size, cfg.ffn_size, cfg.torch_dtype.itemsize
    q, kv = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    in_blocks = 3 * D + 6 * q + 4 * kv + (5 if cfg.gated_ffn else 3) * FFN   # numbers a token, as the weights
    in_float32 = 6 * D + 2 * q
    if rank and width < 4:               # what a linear takes is kept in float32, for the LoRA, and only so
        in_blocks -= 2 * D + 2 * q + FFN
        in_float32 += 5 * D + FFN
    one_layer = tokens * (width * in_blocks + 4 * in_float32)
    one_layer += text_tokens * (4 * cfg.text_dim + 8 * D + 4 * width * kv)
    branches = 3 if command == "distill" else 1                              # of a teacher, without gradients
    inputs = width * tokens * D * cfg.num_layers
    layers = one_layer * cfg.num_layers if keep_activations else one_layer + inputs
    plan["activations"] = layers + one_layer * (branches - 1) / 2
    return plan


def show_plan(plan: dict[str, float], here: float | None) -> str:
    """The plan in GB (10^9 bytes), what it adds up to, and on which cards that fits."""
    total = sum(plan.values())
    fits = lambda memory: "yes" if total < 0.92 * memory else "no"           # some is not counted
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in plan.items())
    cards = ", ".join(f"{gb} GB: {fits(gb * 1e9)}" for gb in (12, 24, 48, 80))
    machine = "" if here is None else f"; this machine, {here / 1e9:.1f} GB: {fits(here)}"
    return f"a step needs about {total / 1e9:.2f} GB: {parts}\nfits on a card of {cards}{machine}"


# ----------------------------------------------------------------------------------------------------------
# 2  Batches
# ----------------------------------------------------------------------------------------------------------


def chunk_texts(captions: Sequence[tuple[Tensor, Tensor]], remaining: int, sampler: SamplerConfig,
                table: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Text and mask of each chunk of a clip, as T5 gives them -> (n, L, C) and (n, L) with special tokens.

    remaining: how many chunks are left at the first one, itself included. An empty caption gets no tokens: it
    is null text.
    """
    rows = []
    for i, (text, mask) in enumerate(captions):
        names = token_names(sampler.special_tokens, SPECIAL_TOKENS, remaining - i) if mask.any() else []
        rows.append(prepend_tokens(text, mask, [table[name].to(text) for name in names]))
    texts, masks = zip(*rows, strict=True)
    return torch.stack(texts), torch.stack(masks)


@dataclass
class Batches:
    """The data of every training step: they depend on the seed and the number of the step alone."""

    cache: clips.Cache
    pieces: list[clips.Piece]
    sampler: SamplerConfig
    table: dict[str, Tensor]             # special tokens
    length: int                          # L
    most_tokens: int                     # of one forward
    seed: int

    def __call__(self, step: int, device: str) -> dict[str, Tensor]:
        """Clips of one size, as many as fit, as the losses take them.

        Half of the steps take pieces at their full length and half their first seconds only: a video's first
        moments, and cheaper. Nothing says where a video ends, so how much is left is drawn: every duration
        token is trained.
        """
        rng = np.random.default_rng([self.seed, step])
        first = self.pieces[rng.integers(len(self.pieces))]
        n = first.chunks if rng.random() < 0.5 else int(rng.integers(1, first.chunks + 1))
        same = [piece for piece in self.pieces
                if (piece.height, piece.width) == (first.height, first.width) and piece.chunks >= n]
        count = max(1, self.most_tokens // (n * first.tokens_per_chunk))
        chosen = [same[i] for i in rng.choice(len(same), count, replace=len(same) < count)]
        latents, images, texts, masks = [], [], [], []
        for piece in chosen:
            latent, image = self.cache.latents(piece)
            captions = [self.cache.text(caption, self.length) for caption in piece.captions[:n]]
            text, mask = chunk_texts(captions, int(rng.integers(n, max(12, n + 1))), self.sampler, self.table)
            latents.append(latent[:, : n * CHUNK])
            images.append(image)
            texts.append(text)
            masks.append(mask)
        stacked = dict(latents=latents, images=images, text=texts, text_mask=masks)
        return {name: torch.stack(tensors).to(device) for name, tensors in stacked.items()}


def check_captions(captions: dict[str, str], t5: Path, length: int) -> None:
    """ValueError for a caption (-> what it belongs to) that is longer than the model takes. Only the
    tokenizer is read."""
    from sentencepiece import SentencePieceProcessor

    file = t5 / "spiece.model"
    require(file.is_file(), f"no text encoder in {str(t5)!r}: {file} does not exist; give one with --t5")
    tokenizer = SentencePieceProcessor(model_file=str(file))
    for caption, owner in captions.items():
        count = len(tokenizer.encode(clean_caption(caption))) + 1            # </s>
        require(count <= length, f"{owner} has {count} tokens, the model takes {length}: shorten it, or "
                f"write one line a second ({caption[:40]!r}...)")


# ----------------------------------------------------------------------------------------------------------
# 3  A run
# ----------------------------------------------------------------------------------------------------------

LEARNING_RATES = {"lora": 2e-4, "full": 1e-5, "distill": 1e-5}               # (not in the report)


def say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


def finetune(args: argparse.Namespace) -> None:
    """From a folder of clips to the file or folder args.out."""
    base = check_model(args)
    work = args.work or args.out.with_name(f"{args.out.stem}.work")
    check_output(args.out, work, args.rank)
    batches = look_at_data(args, base)
    if args.plan:
        describe(args, base, batches)
        return
    work.mkdir(parents=True, exist_ok=True)
    with only_run_in(work):
        check_settings(work, args, batches.pieces)
        describe(args, base, batches)
        cache = batches.cache
        batches.pieces = cache.encode_pieces(batches.pieces, args.skip_bad, say)
        captions = [caption for piece in batches.pieces for caption in piece.captions]
        prompt = captions[0] if args.sample_prompt is None else args.sample_prompt
        cache.encode_captions([*captions, prompt], base.cfg.text_length)
        run = Training(args, work, batches, prompt, *make_models(args))
        run.train()


def check_model(args: argparse.Namespace) -> DiT:
    """The base model on the meta device. ValueError if it cannot be trained."""
    cfg = read_config(args.model, "dit", DiTConfig)
    sampler = read_config(args.model, "sampler", SamplerConfig)
    require(not cfg.fp8, f"{args.model} has fp8 weights, too coarse for the small changes of training: "
            f"use the bf16 model; its LoRA can be used with the fp8 one")
    require(not sampler.distilled, f"{args.model} is a distilled model: train on the base model, then "
            f"distill that, or use its LoRA with the distilled one")
    require(args.optimizer == "adamw" or importlib.util.find_spec("torchao"),
            "--optimizer adamw8bit needs torchao: pip install torchao, or use adamw")
    base = build(lambda: DiT(cfg), args.model)
    for file in args.lora:
        check_lora(base, file)
    return base


def look_at_data(args: argparse.Namespace, base: DiT) -> Batches:
    """The pieces of the data folder. ValueError for bad ones."""
    sampler = read_config(args.model, "sampler", SamplerConfig)
    tokens = args.model / "special_tokens.safetensors"
    table = read_tensors(tokens, "special tokens") if tokens.is_file() else {}
    check_tokens(sampler, table, base.cfg.text_dim, math.inf)
    folder = args.cache or args.data.absolute().with_name(f"{args.data.absolute().name}.cache")
    dtype = torch.bfloat16 if "cuda" in args.device else None
    cache = clips.Cache(folder, args.vae, args.t5, args.device, dtype)
    height, width = args.size or (sampler.height, sampler.width)
    most_tokens = args.tokens or args.seconds * CHUNK * (height // 16) * (width // 16)
    videos = clips.find_videos(args.data, folder, args.skip_bad, say)
    pieces = clips.cut(videos, height * width, args.seconds, most_tokens)
    captions = {text: f"the caption of clip {p.path.name!r}" for p in pieces for text in p.captions}
    if args.sample_prompt:
        captions[args.sample_prompt] = "--sample-prompt"
    check_captions(captions, args.t5, base.cfg.text_length - len(sampler.special_tokens))
    return Batches(cache, pieces, sampler, table, base.cfg.text_length, most_tokens, args.seed)


def make_models(args: argparse.Namespace) -> tuple[DiT, DiT]:
    """The model to train, and its teacher if it is distilled: itself without its LoRA, or a second one."""
    dit = load_dit(args.model, args.device, backend=args.backend)
    for file in args.lora:
        merge_lora(load_lora(dit, file))
    torch.manual_seed(args.seed)                                             # a LoRA starts at random
    teacher = copy.deepcopy(dit) if args.command == "distill" and not args.rank else dit
    if args.rank:
        add_lora(dit, args.rank)
    else:
        dit.requires_grad_()
    if not args.keep_activations:
        checkpoint_layers(dit)
    return dit, teacher


@dataclass
class Training:
    """A run whose data are encoded and whose models are loaded."""

    args: argparse.Namespace
    work: Path
    batches: Batches
    prompt: str                          # of the samples
    dit: DiT
    teacher: DiT

    @property
    def sampler(self) -> SamplerConfig:
        """How the result is sampled."""
        plain = self.batches.sampler
        return dataclasses.replace(plain, distilled=True, num_steps=16) if self.is_distillation else plain

    @property
    def is_distillation(self) -> bool:
        return self.args.command == "distill"

    @property
    def steps_done(self) -> int:
        rows = read_log(self.work / "train.csv", before=sys.maxsize)
        return int(rows[-1][0]) + 1 if rows else 0

    def train(self) -> None:
        args = self.args
        trained = [p for p in self.dit.parameters() if p.requires_grad]
        rate = args.lr or LEARNING_RATES[args.command]
        optimizer = make_optimizer(args.optimizer, trained, rate, weight_decay=0.0 if args.rank else 0.1)
        try:
            fit("train", self.dit, self.loss, args.steps, [optimizer], self.work, every=args.every,
                warmup=min(args.warmup, max(1, args.steps // 5)), accumulate=args.accumulate,
                report=self.sample if args.sample_every else None, report_every=args.sample_every)
        except KeyboardInterrupt as stop:
            if (self.work / "train.pt").is_file():
                self.write()
            raise KeyboardInterrupt(f"{stop}; the same command goes on") from None
        self.write()

    def loss(self, i: int) -> tuple[Tensor, dict[str, float]]:
        """Forward number i: its loss, and what the log says of it."""
        batch, sampler = self.batches(i, self.args.device), self.batches.sampler
        numbers = {"clips": len(batch["latents"]), "chunks": batch["text"].shape[1]}
        mixed = np.random.SeedSequence([self.args.seed, i]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(mixed >> 1))
        if not self.is_distillation:
            return flow_matching_loss(self.dit, **batch, sampler=sampler, generator=generator), numbers
        steps = shortcut_steps(i // self.args.accumulate)
        loss = shortcut_loss(self.dit, self.teacher, **batch, num_steps=steps, sampler=sampler,
                             generator=generator)
        return loss, numbers | {"steps": steps}

    def sample(self) -> str:
        """A video of the prompt by the model as it is, from the same noise each time. The VAE is loaded for
        it and freed."""
        args, cache = self.args, self.batches.cache
        piece = most_common(self.batches.pieces)
        cfg = dataclasses.replace(self.sampler, num_frames=clips.FPS * args.sample_seconds, seed=args.seed,
                                  height=piece.height, width=piece.width)
        text, mask = cache.text(self.prompt, self.batches.length)
        pipe = MAGI(self.dit, load_vae(args.vae, args.device), cfg, self.batches.table, encode_text=None)
        file = self.work / "samples" / f"{self.steps_done:06}.mp4"
        file.parent.mkdir(exist_ok=True)
        file.unlink(missing_ok=True)
        writer = media.Mp4Writer(file, cfg.fps)
        for frames in pipe((text[None], mask[None])):
            writer.write(frames)
        writer.close()
        return f"{self.prompt[:50]!r} is {file}"

    def write(self) -> None:
        """The result as it is now."""
        if self.args.rank:
            captions = dict.fromkeys(text for piece in self.batches.pieces for text in piece.captions)
            about = {"base_model": self.args.model.resolve().name, "command": self.args.command,
                     "merged_first": " ".join(file.name for file in self.args.lora), "steps": self.steps_done,
                     "prompts": json.dumps(list(captions)[:20], ensure_ascii=False)}
            save_lora(self.dit, self.args.out, {name: str(value) for name, value in about.items() if value})
        else:
            config = {"dit": asdict(self.dit.cfg), "sampler": asdict(self.sampler)}
            write_model(self.args.out, self.args.model, self.dit, config)
        say(f"wrote {self.args.out}")


def describe(args: argparse.Namespace, base: DiT, batches: Batches) -> None:
    """Say what will be trained on, a line for each size, and what memory it takes."""
    pieces, text_tokens = batches.pieces, 0
    files = {piece.path for piece in pieces}
    say(f"{len(files)} clips, {sum(piece.chunks for piece in pieces)} s, in {len(pieces)} pieces:")
    for (chunks, height, width), members in clips.buckets(pieces).items():
        tokens = chunks * pieces[members[0]].tokens_per_chunk
        count = max(1, batches.most_tokens // tokens)
        text_tokens = max(text_tokens, count * chunks * batches.length)
        say(f"  {len(members):5} of {chunks} s at {height}x{width}: {tokens} tokens each, {count} at once")
    plan = memory_plan(base, args.command, args.rank, batches.most_tokens, text_tokens, args.optimizer,
                       args.keep_activations)
    say(show_plan(plan, memory_of(args.device)))
    for name, folder in (("VAE", args.vae), ("T5", args.t5)):
        weights = [file for file in folder.glob("*") if file.suffix in (".safetensors", ".bin")]
        size = sum(file.stat().st_size for file in weights)
        say(f"before it, for what is not cached: {name}, {size / 1e9:.2f} GB")


def most_common(pieces: Sequence[clips.Piece]) -> clips.Piece:
    """A piece of the size that most pieces have."""
    return pieces[max(clips.buckets(pieces).values(), key=len)[0]]


def memory_of(device: str) -> float | None:
    """Bytes of memory of a device, if it can be told."""
    if "cuda" in device:
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None


def make_optimizer(name: str, params: list[nn.Parameter], lr: float, weight_decay: float
                   ) -> torch.optim.Optimizer:
    """AdamW with float32 averages, or torchao's with 8 bits: a quarter of the memory."""
    if name == "adamw":
        return AdamW(params, lr, weight_decay=weight_decay)
    from torchao.optim import AdamW8bit

    return AdamW8bit(params, lr, betas=(0.9, 0.95), weight_decay=weight_decay, bf16_stochastic_round=True)


def check_output(out: Path, work: Path, rank: int) -> None:
    """ValueError if the result cannot be written, or would replace something that this run has not made."""
    require((out.suffix == ".safetensors") == bool(rank), f"--out {str(out)!r}: a LoRA is a file whose name "
            f"ends with .safetensors, a model with all weights is a folder")
    parent = next(path for path in out.absolute().parents if path.exists())
    writable = parent.is_dir() and os.access(parent, os.W_OK)
    require(writable, f"--out {str(out)!r} cannot be made: {parent} is read-only, or no folder")
    require(not out.exists() or (work / "settings.json").is_file(), f"{str(out)!r} exists and was not made "
            f"by this run: choose another --out, or remove it")


# What decides the weights that come out. A run that goes on must have the same; other settings may change,
# `steps` among them: the rates then follow the new number.
FIXED = ("command", "model", "rank", "lora", "lr", "warmup", "size", "seconds", "tokens", "accumulate",
         "seed", "optimizer")


def check_settings(work: Path, args: argparse.Namespace, pieces: Sequence[clips.Piece]) -> None:
    """Note the settings of a new run; ValueError if those of one that goes on have changed."""
    data = clips.short_hash(str([(clips.file_key(piece.path), piece) for piece in pieces]))
    now = {name: str(getattr(args, name)) for name in FIXED} | {"data": data}
    file = work / "settings.json"
    if file.is_file():
        before = read_json(file, "settings")
        changed = [f"{name} (was {before.get(name)}, is {value})" for name, value in now.items()
                   if before.get(name) != value]
        require(not changed, f"the run in {str(work)!r} began with other settings: {', '.join(changed)}; "
                f"choose another --out, or remove {work}")
    clips.write_whole(file, lambda new: new.write_text(json.dumps(now, indent=1) + "\n"))


def write_model(out: Path, base: Path, dit: DiT, config: dict, most: int = 5 * 10**9) -> None:
    """A model folder: config.json, weights in files of at most 5 GB, and the special tokens of the base."""
    sd, shards, size = dit.state_dict(), [{}], 0
    for name, tensor in sd.items():
        if shards[-1] and size + tensor.nbytes > most:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    n = len(shards)
    names = [f"model-{i + 1:05}-of-{n:05}.safetensors" if n > 1 else "model.safetensors" for i in range(n)]
    with new_folder(base, out, out.exists(), sum(tensor.nbytes for tensor in sd.values())) as folder:
        for name, shard in zip(names, shards, strict=True):
            save({k: v.detach().cpu() for k, v in shard.items()}, folder / name)
        if n > 1:
            where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}, indent=1))
        if (tokens := Path(base) / "special_tokens.safetensors").is_file():
            shutil.copyfile(tokens, folder / tokens.name)
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


# ----------------------------------------------------------------------------------------------------------
# 4  Command line
# ----------------------------------------------------------------------------------------------------------


def whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def size_of(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or min(map(int, match.groups())) < 32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 480x832 (height x width, from 32)")
    return int(match[1]), int(match[2])


class Help(argparse.HelpFormatter):
    """Says what a flag's default is, where that is a number or a word."""

    def _get_help_string(self, action: argparse.Action) -> str:
        said = action.help or ""
        has_one = isinstance(action.default, str | int | float) and not isinstance(action.default, bool)
        return f"{said} (default: %(default)s)" if has_one and action.default != "==SUPPRESS==" else said


def parser() -> argparse.ArgumentParser:
    about = __doc__.split("\n\n")[0]
    top = argparse.ArgumentParser(prog="training.py", allow_abbrev=False, description=about)
    folder, number = {"type": Path, "metavar": "DIR"}, {"type": whole, "metavar": "N"}
    commands = top.add_subparsers(dest="command", required=True)
    kinds = {"lora": "train a low-rank addition to a base model", "full": "train all weights of a base model",
             "distill": "make a base model one of few steps and one branch"}
    for name, text in kinds.items():
        sub = commands.add_parser(name, help=text, description=text, formatter_class=Help, allow_abbrev=False)
        flag = sub.add_argument
        flag("--model", **folder, required=True, help="folder of the base model")
        flag("--data", **folder, required=True, help="clips with captions (see clips.py)")
        flag("--out", type=Path, required=True, help="LoRA file (.safetensors), or folder for all weights")
        flag("--vae", **folder, help="default: vae beside the model")
        flag("--t5", **folder, help="default: t5 beside the model")
        flag("--lora", type=Path, metavar="FILE", action="append", default=[], help="merged into it first")
        flag("--rank", type=natural, metavar="N", default={"lora": 16}.get(name, 0),
             help="of the LoRA; 0: all weights")
        flag("--steps", **number, default=1000, help="the rates fall in the last third")
        flag("--lr", type=positive, metavar="X", help=f"peak rate (default: {LEARNING_RATES[name]:g})")
        flag("--warmup", **number, default=50, help="steps; at most a fifth of all")
        flag("--accumulate", **number, default=1, help="forwards in a step")
        flag("--size", type=size_of, metavar="HxW", help="only its area counts; default: the model's")
        flag("--seconds", **number, default=4, help="of the longest piece")
        flag("--tokens", **number, help="most in a forward; default: those of the longest piece")
        flag("--optimizer", choices=["adamw", "adamw8bit"], default="adamw", help="adamw8bit needs torchao")
        flag("--keep-activations", action="store_true", help="of all layers: more memory, a third less time")
        flag("--seed", type=natural, metavar="N", default=0, help="of data, noise and samples")
        flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda:1, mps")
        flag("--backend", choices=["torch", "triton", "auto"], default="torch", help="of the DiT")
        flag("--every", **number, default=100, help="steps from checkpoint to checkpoint")
        flag("--sample-every", type=natural, metavar="N", default=250, help="steps; 0: no samples")
        flag("--sample-prompt", metavar="TEXT", help="default: the first caption")
        flag("--sample-seconds", **number, default=2, help="length of a sample")
        flag("--cache", **folder, help="what is encoded; default: DATA.cache")
        flag("--work", **folder, help="checkpoint, log, samples; default: OUT.work")
        flag("--skip-bad", action="store_true", help="leave out clips that cannot be used")
        flag("--plan", action="store_true", help="only say what is there and what it needs")
    sub = commands.add_parser("merge", help="a model with a LoRA in its weights")
    sub.add_argument("--model", type=Path, required=True)
    sub.add_argument("--lora", type=Path, required=True, action="append")
    sub.add_argument("--out", type=Path, required=True, help="folder")
    sub = commands.add_parser("export", help="a LoRA in the names of other programs")
    sub.add_argument("--lora", type=Path, required=True)
    sub.add_argument("--out", type=Path, required=True, help="file, or folder for peft")
    sub.add_argument("--format", choices=[*EXPORT_NAMES], default="peft")
    return top


def run(args: argparse.Namespace) -> None:
    if args.command == "export":
        export_lora(args.lora, args.out, args.format)
        return
    if args.command == "merge":
        cfg = read_config(args.model, "dit", DiTConfig)
        empty = build(lambda: DiT(cfg), args.model)
        for file in args.lora:
            check_lora(empty, file)
        require(not cfg.fp8, "a LoRA cannot be merged into fp8 weights: merge it into the bf16 model")
        require(not args.out.exists(), f"{str(args.out)!r} exists: choose another folder")
        dit = load_dit(args.model)
        for file in args.lora:
            load_lora(dit, file)
        write_model(args.out, args.model, merge_lora(dit), read_json(args.model / "config.json"))
        return
    args.vae = args.vae or args.model.parent / "vae"
    args.t5 = args.t5 or args.model.parent / "t5"
    check_device(args.device)
    require(args.command != "lora" or args.rank, "--rank 0 is for all weights: use the command full")
    require(args.command != "full" or not args.rank, "--rank is of a LoRA: use the command lora")
    finetune(args)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line -> its exit code."""
    args = parser().parse_args(argv)
    try:
        run(args)
    except KeyboardInterrupt as stop:
        print("training:", str(stop) or "stopped", file=sys.stderr)
        return 130
    except (ValueError, FloatingPointError, OSError) as error:
        print("training:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
