"""Fine-tuning on one's own videos: `python training.py lora`, `full` or `distill`; also `merge` and `export`.

    python training.py lora --model models/4.5B-base --data clips/ --out my.safetensors
    torchrun --nproc_per_node 8 training.py full --model models/24B-base --data clips/ --out models/my-24B
    python sample.py --model models/4.5B-base --lora my.safetensors --prompt "..."

    clips/ --find_videos, cut--> Pieces --Cache--> latents and text --Batches--> losses --> training.fit
                                                                                                  |
    my.safetensors, and my.work/: train.pt (to go on), train.csv, train.png, samples/  <----------+

clips/ holds videos, each with a text file of its name (a.mp4, a.txt), or metadata.jsonl or metadata.csv with
`file_name` and `text`. One line (or string) is for the whole video; several lines (or a list) are for one
second each, and the last goes on.

The order is made for small machines: VAE and T5 run once and are freed before the DiT is loaded; for the
backward pass only the input of each layer is kept; with --stream two of a LoRA's frozen layers are
in memory at a time. Mistakes are told before any weight is loaded. Several processes share the forwards of
a step and, by PyTorch's FSDP, the weights; they leave what one process leaves, so that it can go on.

Measured on a CPU: CPU seconds a step and peak memory of a LoRA of rank 16, for random weights in the layout
of the 4.5B (CUDA has not been tried yet):

    one second of 64x64, all layers in memory     25 s    10.0 GiB, of which 8.5 are the mapped weights
    the same, with --stream disk                  33 s     2.6 GiB, and the same losses
    two seconds of 128x128, --stream disk        168 s     4.4 GiB

Contents: 1 A folder of videos, 2 Pieces and sizes, 3 Encoded once, 4 Batches, 5 A run, 6 Command line. Left
out on purpose: training in fp8, and streamed layers on several GPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import checkpoints
import magi
import media
import outputs
import parallel
import planner
import terminal
import training
from captions import clean_caption, load_tokenizer
from checkpoints import build, read_config, read_json, read_tensors, reading, require, weight_files
from magi import CHUNK, FRAMES_PER_LATENT, DiT, DiTConfig, SamplerConfig, VAEConfig
from terminal import Parser, number, say

FPS = 24
CHUNK_FRAMES = CHUNK * FRAMES_PER_LATENT                                     # 24: one second
SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".3gp",
            ".wmv", ".flv", ".ogv", ".gif", ".apng")


@contextlib.contextmanager
def skipping(skip_bad: bool, warn: Callable[[str], None] = say) -> Iterator[None]:
    """What is wrong with a clip ends the run; with skip_bad it only ends this block."""
    try:
        yield
    except ValueError as error:
        require(skip_bad, f"{error}; --skip_bad leaves such clips out")
        warn(f"skipped: {error}")


# ----------------------------------------------------------------------------------------------------------
# 1  A folder of videos
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Video:
    """A file that can be trained on."""

    path: Path
    captions: tuple[str, ...]            # one for all of it, or one a second, the last of which goes on
    seconds: int                         # whole ones
    height: int                          # as shown: upright, with square pixels
    width: int


def read_captions(folder: Path, skip_bad: bool = False) -> dict[Path, tuple[str, ...]]:
    """The videos of a folder and their captions. ValueError for a file that is missing, or has no caption."""
    require(not folder.is_file(), f"the data {str(folder)!r} is a file: give the folder that it is in")
    require(folder.is_dir(), f"the data folder {str(folder)!r} does not exist: give one with videos and "
            f"captions")
    jsonl, table = folder / "metadata.jsonl", folder / "metadata.csv"
    if jsonl.is_file():
        # A file has other lines than str.splitlines, which ends one at U+2028 and the like, too.
        with reading("captions", jsonl), jsonl.open(encoding="utf-8-sig") as file:
            rows = [json.loads(line) for line in file if line.strip()]
        return captions_of_rows(folder, rows, skip_bad)
    if table.is_file():
        with reading("captions", table), table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        return captions_of_rows(folder, rows, skip_bad)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    # What is hidden is no clip, and neither is a sample of a run whose work folder is among the clips.
    videos = [path for path in files if not any(u.startswith(".") for u in path.relative_to(folder).parts)
              and not (path.parent.name == "samples" and (path.parent.parent / "settings.json").is_file())]
    require(videos, f"no videos in {str(folder)!r}: give files such as a.mp4 and captions a.txt")
    found = {}
    for path in videos:
        text = path.with_suffix(".txt")
        text = text if text.is_file() else path.with_suffix(".TXT")
        with skipping(skip_bad):
            require(text.is_file(), f"clip {path.name!r} has no caption: write it to {f'{path.stem}.txt'!r} "
                    f"(an empty file for none), or list all clips in metadata.jsonl")
            with reading("caption", text):
                found[path] = as_captions(text.read_text("utf-8-sig"))
    return found


def captions_of_rows(folder: Path, rows: list[dict[str, Any]], skip_bad: bool
                     ) -> dict[Path, tuple[str, ...]]:
    found: dict[Path, tuple[str, ...]] = {}
    require(rows, f"the metadata in {str(folder)!r} has no rows: list the clips, or remove it")
    for i, row in enumerate(rows, 1):
        where = f"row {i} of the metadata in {str(folder)!r}"
        with skipping(skip_bad):
            require(isinstance(row, dict) and row.get("file_name") and row.get("text") is not None,
                    f"{where} lacks file_name or text: {row}")
            name, text = row["file_name"], row["text"]
            require(None not in row, f"{where} has too many columns: put a text with commas in quotes: {row}")
            require(isinstance(name, str), f"{where}: file_name is {name!r}, and must be a string")
            lines = text if isinstance(text, list) else [text]
            require(all(isinstance(line, str) for line in lines),
                    f"{where}: text is {text!r}, and must be a string or a list of them")
            path = folder / name
            require(path not in found, f"{where}: {name!r} is in a row above, too: take one of them out")
            require(path.is_file(), f"{where}: {name!r} does not exist: add it, or take out its row")
            found[path] = as_captions(text)
    return found


def as_captions(text: str | list[str]) -> tuple[str, ...]:
    """A caption a line. Empty lines at the end are dropped; another one is a second without a caption."""
    lines = [line.strip() for line in (text.splitlines() if isinstance(text, str) else text)]
    while lines and not lines[-1]:
        lines.pop()
    return tuple(lines) or ("",)


def find_videos(folder: Path, cache: Path, skip_bad: bool = False) -> list[Video]:
    """Every clip of a folder, each looked into (what was seen is kept in the cache). ValueError for the first
    that cannot be read or is shorter than a second; with skip_bad these are named and left out."""
    seen_file = cache / "videos.json"
    seen = read_json(seen_file, "cache") if seen_file.is_file() else {}
    captions, videos = read_captions(folder, skip_bad), []
    bar = tqdm(captions.items(), desc="look at clips", unit="clip", disable=None, leave=False)
    cache.mkdir(parents=True, exist_ok=True)
    try:
        for path, text in bar:
            with skipping(skip_bad):
                key = file_key(path)
                if key not in seen:
                    seen[key] = probe(path)
                frames, height, width = seen[key]
                require(frames >= CHUNK_FRAMES, f"clip {path.name!r} has {frames} frames at {FPS} fps: at "
                        f"least {CHUNK_FRAMES} (one second) are needed")
                videos.append(Video(path, text, frames // CHUNK_FRAMES, height, width))
    finally:
        with outputs.locked(seen_file, wait=True):
            outputs.replace(seen_file, lambda new: new.write_text(json.dumps(seen)))
    return videos


def probe(path: Path) -> tuple[int, int, int]:
    """Frames at 24 fps, height and width of a video. It is decoded, as lengths in headers may be wrong."""
    frames = media.read_video(path, FPS, start=0, size=(16, 16), fit="stretch")
    height, width = media.read_video(path, FPS, start=0, count=1).shape[1:3]
    return len(frames), height, width


def file_key(path: Path) -> str:
    """Changes when a file does."""
    stat = path.stat()
    return f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"


# ----------------------------------------------------------------------------------------------------------
# 2  Pieces and sizes
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A part of a video, 1 to n seconds at 24 fps, as it is encoded."""

    path: Path
    start: int                           # second
    captions: tuple[str, ...]            # one a chunk
    height: int
    width: int

    @property
    def chunks(self) -> int:
        return len(self.captions)

    @property
    def tokens(self) -> int:
        return self.chunks * tokens_of_chunk(self.height, self.width)


def tokens_of_chunk(height: int, width: int) -> int:
    return CHUNK * (height // 16) * (width // 16)


# Height over width of what is trained on: videos are cropped to the nearest.
_WIDE = (1, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2)
ASPECTS = tuple(sorted({*_WIDE, *(1 / aspect for aspect in _WIDE)}))


def bucket_size(height: int, width: int, area: int) -> tuple[int, int]:
    """The (height, width) at which a video is trained on: multiples of 16 of about `area` pixels, with the
    nearest of a few aspects. A smaller video is hardly enlarged: the area is halved until it fits."""
    while area > 1.5 * height * width and area > 32 * 32:
        area /= 2
    ratio = min(ASPECTS, key=lambda aspect: abs(math.log(aspect * width / height)))
    sides = math.sqrt(area * ratio), math.sqrt(area / ratio)
    return tuple(max(32, int(side / 16 + 0.5) * 16) for side in sides)


def cut(videos: Sequence[Video], area: int, most_chunks: int, most_tokens: int = sys.maxsize) -> list[Piece]:
    """Pieces of at most so many seconds and so many tokens (6 * height/16 * width/16 a second)."""
    pieces = []
    for video in videos:
        height, width = bucket_size(video.height, video.width, area)
        chunks = min(most_chunks, most_tokens // tokens_of_chunk(height, width))
        require(chunks >= 1, f"one second of {video.path.name!r} at {height}x{width} is more than "
                f"{most_tokens} tokens: raise --tokens, or choose a smaller --size")
        for start in range(0, video.seconds, chunks):
            seconds = range(start, min(start + chunks, video.seconds))
            captions = tuple(video.captions[min(second, len(video.captions) - 1)] for second in seconds)
            pieces.append(Piece(video.path, start, captions, height, width))
    return pieces


def buckets(pieces: Sequence[Piece]) -> dict[tuple[int, int, int], list[Piece]]:
    """(chunks, height, width) -> the pieces that have these."""
    found: dict[tuple[int, int, int], list[Piece]] = {}
    for piece in pieces:
        found.setdefault((piece.chunks, piece.height, piece.width), []).append(piece)
    return dict(sorted(found.items()))


# ----------------------------------------------------------------------------------------------------------
# 3  Encoded once
# ----------------------------------------------------------------------------------------------------------


@dataclass
class Cache:
    """Latents of pieces and text of captions, one file each, found again by what made them.

    The name of a file holds a hash of the video file (its path, size and time), the piece and the VAE; or of
    the caption and the T5. Models are told apart by the names, sizes and first megabytes of their files.
    Several runs may fill it at once: the file that another one is writing is waited for.
    """

    folder: Path
    vae: Path
    t5: Path
    vae_dtype: torch.dtype | None = None

    @functools.cached_property
    def vae_key(self) -> str:
        return model_key([self.vae / "config.json", *weight_files(self.vae)])

    @functools.cached_property
    def t5_key(self) -> str:
        return model_key(sorted(file for file in self.t5.glob("*") if file.is_file()))

    def latent_file(self, piece: Piece) -> Path:
        named = dataclasses.replace(piece, path=Path(file_key(piece.path)), captions=("",) * piece.chunks)
        made_by = f"{named} {self.vae_key} {self.vae_dtype}"
        return self.folder / "latents" / f"{short_hash(made_by)}.safetensors"

    def text_file(self, caption: str) -> Path:
        return self.folder / "text" / f"{short_hash(f'{caption} {self.t5_key}')}.safetensors"

    def encode_pieces(self, pieces: Sequence[Piece], device: str, skip_bad: bool,
                      warn: Callable[[str], None] = say) -> list[Piece]:
        """Encode what is missing; the pieces that could be read."""
        files = [self.latent_file(piece) for piece in pieces]
        missing = {file: piece for file, piece in zip(files, pieces, strict=True) if not file.is_file()}
        if not missing:
            return list(pieces)
        (self.folder / "latents").mkdir(parents=True, exist_ok=True)
        vae = magi.load_vae(self.vae, device, self.vae_dtype)
        for file, piece in tqdm(missing.items(), desc="encode clips", unit="piece", disable=None):
            with outputs.locked(file, wait=True), skipping(skip_bad, warn):
                if not file.is_file():
                    outputs.save(encode_piece(vae, piece), file, {"piece": str(piece)})
        return [piece for file, piece in zip(files, pieces, strict=True) if file.is_file()]

    def encode_captions(self, captions: Sequence[str], device: str, length: int) -> None:
        """Encode the captions that are missing."""
        missing = sorted({caption for caption in captions if not self.text_file(caption).is_file()})
        if not missing:
            return
        (self.folder / "text").mkdir(parents=True, exist_ok=True)
        encoded = magi.T5(self.t5, length, device).each(missing)
        for caption, text, mask in tqdm(encoded, "encode captions", len(missing), disable=None):
            kept = text[: int(mask.sum())].bfloat16()                        # without the padding
            with outputs.locked(self.text_file(caption), wait=True):
                outputs.save({"text": kept}, self.text_file(caption), {"caption": caption})

    def latents(self, piece: Piece) -> tuple[Tensor, Tensor]:
        """Scaled latents (16, T, H, W), and (16, 1, H, W) of the fourth frame alone, encoded as an image."""
        tensors = read_tensors(self.latent_file(piece), "cached latents")
        return tensors["latents"], tensors["image"]

    def text(self, caption: str, length: int) -> tuple[Tensor, Tensor]:
        """Text (L, C) float32 and mask (L,)."""
        text = read_tensors(self.text_file(caption), "cached text")["text"][:length]
        mask = (torch.arange(length) < len(text)).long()
        return F.pad(text, (0, 0, 0, length - len(text))), mask


@torch.no_grad()
def encode_piece(vae: Any, piece: Piece) -> dict[str, Tensor]:
    """What training needs of a piece, in bf16, which rounds by less than the VAE errs."""
    frames = media.read_video(piece.path, FPS, start=piece.start * FPS, count=piece.chunks * CHUNK_FRAMES,
                              size=(piece.height, piece.width))
    require(len(frames) == piece.chunks * CHUNK_FRAMES, f"clip {piece.path.name!r} ends early: {len(frames)} "
            f"frames from second {piece.start} on, not {piece.chunks * CHUNK_FRAMES}")
    video = media.fit_frames(frames, piece.height, piece.width).to(vae.encoder.pos_embed)
    latents = vae.encode(video)
    image = vae.encode(video[:, :, FRAMES_PER_LATENT - 1 : FRAMES_PER_LATENT])
    return {"latents": (latents[0].float() * magi.SCALE_FACTOR).bfloat16(),
            "image": (image[0].float() * magi.SCALE_FACTOR).bfloat16()}


def model_key(files: Sequence[Path]) -> str:
    """Tells model files from others by their names, sizes and first megabyte (headers and some weights)."""
    parts = []
    for file in files:
        with file.open("rb") as f:
            parts.append(f"{file.name} {file.stat().st_size} {hashlib.sha256(f.read(2**20)).hexdigest()}")
    return short_hash(" ".join(parts))


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


# ----------------------------------------------------------------------------------------------------------
# 4  Batches
# ----------------------------------------------------------------------------------------------------------


def chunk_texts(captions: Sequence[tuple[Tensor, Tensor]], remaining: int, sampler: SamplerConfig,
                table: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Text and mask of each chunk of a clip, as T5 gives them -> (n, L, C) and (n, L) with special tokens.

    remaining: how many chunks are left at the first one, itself included. An empty caption gets no tokens: it
    is null text.
    """
    rows = []
    for i, (text, mask) in enumerate(captions):
        names = magi.token_names(sampler.special_tokens, magi.SPECIAL_TOKENS, remaining - i)
        names = names if mask.any() else []
        rows.append(magi.prepend_tokens(text, mask, [table[name].to(text) for name in names]))
    texts, masks = zip(*rows, strict=True)
    return torch.stack(texts), torch.stack(masks)


@dataclass
class Batches:
    """The data of every forward: they depend on the seed and the forward's number alone."""

    cache: Cache
    pieces: list[Piece]
    sampler: SamplerConfig
    table: dict[str, Tensor]             # special tokens
    length: int                          # L
    most_tokens: int                     # of one forward
    seed: int

    def __call__(self, i: int, device: str) -> dict[str, Tensor]:
        """The clips of forward i, all of one size and length, as many as fit, as the losses take them.

        One piece, drawn at random, decides the size and in half of the forwards the length; in the others a
        shorter one is drawn, which is cheaper. Longer pieces are cut to it. A clip is trained as if a video
        began with it, and how much of that is left is drawn: so every duration token is trained.
        """
        rng = np.random.default_rng([self.seed, i])
        first = self.pieces[rng.integers(len(self.pieces))]
        n = first.chunks if rng.random() < 0.5 else int(rng.integers(1, first.chunks + 1))
        same = [piece for piece in self.pieces
                if (piece.height, piece.width) == (first.height, first.width) and piece.chunks >= n]
        count = max(1, self.most_tokens // (n * tokens_of_chunk(first.height, first.width)))
        latents, images, texts, masks = [], [], [], []
        for k in rng.choice(len(same), count, replace=len(same) < count):
            piece = same[k]
            latent, image = self.cache.latents(piece)
            captions = [self.cache.text(caption, self.length) for caption in piece.captions[:n]]
            text, mask = chunk_texts(captions, int(rng.integers(n, max(12, n + 1))), self.sampler, self.table)
            latents.append(latent[:, : n * CHUNK])
            images.append(image)
            texts.append(text)
            masks.append(mask)
        stacked = dict(latents=latents, images=images, text=texts, text_mask=masks)
        return {name: torch.stack(tensors).to(device) for name, tensors in stacked.items()}


def caption_check(t5: Path, length: int) -> Callable[[str, str], None]:
    """What raises ValueError for a caption (of this owner) that is longer than the model takes."""
    tokenizer = load_tokenizer(t5)

    def check(caption: str, owner: str) -> None:
        count = len(tokenizer.encode(clean_caption(caption))) + 1            # </s>
        require(count <= length, f"{owner} has {count} tokens, the model takes {length}: shorten it, or "
                f"write one line a second ({caption[:40]!r}...)")

    return check


# ----------------------------------------------------------------------------------------------------------
# 5  A run
# ----------------------------------------------------------------------------------------------------------

LORA_RATE, FULL_RATE = 2e-4, 1e-5                                            # (not in the report)


def finetune(args: argparse.Namespace) -> None:
    """From a folder of clips to the file or folder args.out. Under torchrun every process runs this; the
    first one looks at the data, speaks and writes, and all of them encode and train."""
    args.device = parallel.start(args.device)
    args.accumulate = args.accumulate or parallel.ranks()
    with contextlib.ExitStack() as stack:
        stack.enter_context(parallel.first_speaks())
        parallel.agreed(checkpoints.check_device)(args.device)
        base = parallel.agreed(check_model)(args)
        batches = parallel.from_first(look_at_data)(args, base)
        if args.plan:
            describe(args, base, batches)
            return
        parallel.from_first(claim_work)(args, batches.pieces, stack)
        describe(args, base, batches)
        prompt = encode(args, batches)
        Training(args, batches, prompt, *make_models(args)).train()


def check_model(args: argparse.Namespace) -> DiT:
    """The base model on the meta device. ValueError if it cannot be trained, or not like this, or if VAE or
    T5 are not for it."""
    cfg = read_config(args.model, "dit", DiTConfig)
    sampler = training.lora_sampler(read_config(args.model, "sampler", SamplerConfig), args.lora)
    require(not cfg.fp8, f"{args.model} has fp8 weights, too coarse for the small changes of training: "
            f"use the bf16 model; its LoRA can be used with the fp8 one")
    require(not sampler.distilled, f"{args.model} (or its --lora) is distilled: train on the base model, "
            f"then distill that, or use its LoRA with the distilled one")
    is_8bit, several = args.optimizer == "adamw8bit", parallel.ranks() > 1
    require(not is_8bit or importlib.util.find_spec("torchao"),
            "--optimizer adamw8bit needs torchao: pip install torchao, or use adamw")
    require(not is_8bit or args.rank or not several, "--optimizer adamw8bit cannot train all weights on "
            "several GPUs: use adamw, whose numbers are shared out")
    require(args.accumulate % parallel.ranks() == 0, f"--accumulate {args.accumulate}: {parallel.ranks()} "
            f"processes share the forwards of a step, so give a multiple of {parallel.ranks()}")
    require(not args.stream or args.rank, "--stream is for a LoRA, whose layers are frozen: it cannot train "
            "all weights")
    require(not (args.stream and several), "--stream is for one GPU: several share the weights, leave it out")
    require(not (args.stream and args.keep_activations), "--keep_activations would keep what --stream frees: "
            "leave one of them out")
    least, window, parts = min(training.SHORTCUT_CYCLE), sampler.window, len(sampler.kv_ranges) or 1
    require(args.command != "distill" or least % math.lcm(window, parts) == 0, f"{args.model} cannot be "
            f"distilled into {least} steps, no multiple of its window {window} and of its {parts} kv_ranges")
    require(not args.lora or not (args.stream or several), "--lora is merged into weights that one process "
            "holds: make a model of it first (training.py merge)")
    check_output(args.out, args.work, args.rank)
    magi.get_ops(args.backend, args.device)              # ValueError if it cannot be used
    base = build(lambda: DiT(cfg), args.model)
    for file in args.lora:
        training.check_lora(base, file)
    vae = read_config(args.vae, "vae", VAEConfig)
    build(lambda: magi.VAE(vae), args.vae)
    checkpoints.check_text_encoder(args.t5, cfg.text_dim)
    return base


def check_output(out: Path, work: Path, rank: int) -> None:
    """ValueError if the result cannot be written, or would replace something that this run has not made."""
    require((out.suffix == ".safetensors") == bool(rank), f"--out {str(out)!r}: a LoRA is a file whose name "
            f"ends with .safetensors, a model with all weights is a folder")
    parent = next(path for path in out.absolute().parents if path.exists())
    writable = parent.is_dir() and os.access(parent, os.W_OK)
    require(writable, f"--out {str(out)!r} cannot be made: {parent} is read-only, or no folder")
    settings = work / "settings.json"
    before = read_json(settings, "settings") if settings.is_file() else None
    is_ours = before is not None and before.get("out", setting(out)) == setting(out)     # older ones lack it
    require(not out.exists() or is_ours, f"{str(out)!r} exists and was not made by this run: choose another "
            f"--out, or remove it")


def look_at_data(args: argparse.Namespace, base: DiT) -> Batches:
    """The pieces of the data folder. ValueError for bad ones."""
    sampler = read_config(args.model, "sampler", SamplerConfig)
    table = checkpoints.read_special_tokens(args.model)
    checkpoints.check_tokens(sampler, table, base.cfg.text_dim, math.inf)
    data = Path(os.path.abspath(args.data))              # which may be given as "..", too
    folder = args.cache or data.with_name(f"{data.name}.cache")
    cache = Cache(folder, args.vae, args.t5, torch.bfloat16 if "cuda" in args.device else None)
    height, width = args.size or (sampler.height, sampler.width)
    check = caption_check(args.t5, base.cfg.text_length - len(sampler.special_tokens))
    check(args.sample_prompt or "", "--sample_prompt")
    videos = []
    for video in find_videos(args.data, folder, args.skip_bad):
        with skipping(args.skip_bad):
            for caption in video.captions[: video.seconds]:
                check(caption, f"the caption of clip {video.path.name!r}")
            videos.append(video)
    require(videos, f"no clip of {str(args.data)!r} can be used")
    pieces = cut(videos, height * width, args.seconds, args.tokens or sys.maxsize)
    asked = args.seconds * tokens_of_chunk(height, width)                    # sizes of pieces are rounded
    most_tokens = args.tokens or max(asked, *(piece.tokens for piece in pieces))
    return Batches(cache, pieces, sampler, table, base.cfg.text_length, most_tokens, args.seed)


# What decides the weights that come out. A run that goes on must have the same; other settings may change,
# `steps` among them: the rates then follow the new number.
FIXED = ("command", "model", "vae", "t5", "rank", "lora", "lr", "warmup", "size", "seconds", "tokens",
         "accumulate", "seed", "optimizer")


def setting(value: Any) -> str:
    """As it is noted: a path does not depend on how it is spelled."""
    if isinstance(value, list):
        return str([setting(item) for item in value])
    return str(value.resolve() if isinstance(value, Path) else value)


def claim_work(args: argparse.Namespace, pieces: Sequence[Piece], stack: contextlib.ExitStack) -> None:
    """Take the work folder for this run and note its settings; ValueError if another run is in it, or if it
    began with other settings."""
    for folder in (args.work, args.out.parent):
        folder.mkdir(parents=True, exist_ok=True)
    stack.enter_context(outputs.locked(args.work))
    keys = [file_key(piece.path) for piece in pieces]
    resolved = [dataclasses.replace(piece, path=piece.path.resolve()) for piece in pieces]
    data, spelled = (short_hash(str(list(zip(keys, some, strict=True)))) for some in (resolved, pieces))
    now = {name: setting(getattr(args, name)) for name in (*FIXED, "out")} | {"data": data}
    file = args.work / "settings.json"
    if file.is_file():
        before = read_json(file, "settings")             # older versions noted paths as they were spelled
        changed = [f"{name} (was {before[name]}, is {now[name]})" for name in FIXED
                   if name in before and now[name] not in (before[name], setting(Path(before[name])))]
        changed += ["clips or captions have changed"] * (before.get("data") not in (data, spelled))
        require(not changed, f"the run in {str(args.work)!r} began with other settings: "
                f"{', '.join(changed)}; choose another --out, or remove {args.work}")
    outputs.replace(file, lambda new: new.write_text(json.dumps(now, indent=1) + "\n"))


def encode(args: argparse.Namespace, batches: Batches) -> str:
    """Encode all that is not cached, and leave out pieces that cannot be read; the prompt of the samples."""
    cache, pieces = batches.cache, batches.pieces
    if parallel.ranks() > 1:             # a share each; then nothing is missing but what cannot be read
        share = pieces[parallel.rank() :: parallel.ranks()]
        parallel.agreed(cache.encode_pieces)(share, args.device, args.skip_bad, lambda text: None)
    batches.pieces = parallel.agreed(cache.encode_pieces)(pieces, args.device, args.skip_bad)
    require(batches.pieces, "no clip can be used")
    captions = [caption for piece in batches.pieces for caption in piece.captions]
    prompt = captions[0] if args.sample_prompt is None else args.sample_prompt
    parallel.from_first(cache.encode_captions)([*captions, prompt], args.device, batches.length)
    return prompt


def checkpoint_layers(dit: DiT) -> None:
    """Keep only the input of each layer for the backward pass, and compute the rest again: the memory of one
    layer in place of all, for one forward more (a third of all work, or half of a LoRA's)."""
    for layer in dit.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def make_models(args: argparse.Namespace) -> tuple[DiT, DiT]:
    """The model to train, and its teacher if it is distilled: itself without its LoRA, or a second one."""
    terminal.announce("model", args.model)
    load = partial(parallel.load_dit, args.model, args.device, backend=args.backend, stream=args.stream)
    models = [load(to_train=True) for _ in range(2 if args.command == "distill" and not args.rank else 1)]
    for dit in models:
        for file in args.lora:
            training.merge_lora(training.load_lora(dit, file))
    torch.manual_seed(args.seed)                                             # a LoRA starts at random
    dit = models[0]
    if args.rank:
        training.add_lora(dit, args.rank)
    else:
        dit.requires_grad_()
    if not args.keep_activations:
        checkpoint_layers(dit)
    return dit, models[-1]


def make_optimizer(name: str, params: list[nn.Parameter], lr: float, weight_decay: float
                   ) -> torch.optim.Optimizer:
    """AdamW with float32 averages, or torchao's with 8 bits: a quarter of the memory."""
    if name == "adamw":
        return training.AdamW(params, lr, weight_decay=weight_decay)
    from torchao.optim import AdamW8bit

    return AdamW8bit(params, lr, betas=(0.9, 0.95), weight_decay=weight_decay, bf16_stochastic_round=True)


@dataclass
class Training:
    """A run whose data are encoded and whose models are loaded."""

    args: argparse.Namespace
    batches: Batches
    prompt: str                          # of the samples
    dit: DiT
    teacher: DiT

    @property
    def sampler(self) -> SamplerConfig:
        """How the result is sampled."""
        plain = self.batches.sampler
        return training.distilled(plain) if self.args.command == "distill" else plain

    @property
    def steps_done(self) -> int:
        rows = training.read_log(self.args.work / "train.csv", before=sys.maxsize)
        return int(rows[-1][0]) + 1 if rows else 0

    def train(self) -> None:
        args = self.args
        trained = [p for p in self.dit.parameters() if p.requires_grad]
        rate = args.lr or (LORA_RATE if args.rank else FULL_RATE)
        optimizer = make_optimizer(args.optimizer, trained, rate, weight_decay=0.0 if args.rank else 0.1)
        try:
            training.fit("train", self.dit, self.loss, args.steps, [optimizer], args.work, every=args.every,
                warmup=min(args.warmup, max(1, args.steps // 5)), accumulate=args.accumulate,
                report=self.sample if args.sample_every else None, report_every=args.sample_every)
        except KeyboardInterrupt as stop:
            if str(stop):                # fit has saved a checkpoint; "": asked twice, it ended at once
                self.write()
            how = str(stop) or "stopped at once, the steps since the last checkpoint are lost"
            raise KeyboardInterrupt(f"{how}; the same command goes on") from None
        self.write()
        if report := getattr(self.dit.ops, "report", None):                  # which kernels were used
            say(report())

    def loss(self, i: int) -> tuple[Tensor, dict[str, float]]:
        """Forward number i: its loss, and what the log says of it."""
        batch, sampler = self.batches(i, self.args.device), self.batches.sampler
        numbers = {"clips": len(batch["latents"]), "chunks": batch["text"].shape[1]}
        mixed = np.random.SeedSequence([self.args.seed, i]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(mixed >> 1))
        given = batch | {"sampler": sampler, "generator": generator}
        if self.args.command != "distill":
            return training.flow_matching_loss(self.dit, **given), numbers
        steps = training.shortcut_steps(i // self.args.accumulate)
        loss = training.shortcut_loss(self.dit, self.teacher, num_steps=steps, **given)
        return loss, numbers | {"steps": steps}

    def sample(self) -> str:
        """A video of the prompt by the model as it is, from the same noise each time. The VAE is loaded for
        it and freed."""
        args, cache = self.args, self.batches.cache
        most_common = max(buckets(self.batches.pieces).values(), key=len)[0]
        cfg = dataclasses.replace(self.sampler, num_frames=FPS * args.sample_seconds, seed=args.seed,
                                  height=most_common.height, width=most_common.width)
        text, mask = cache.text(self.prompt, self.batches.length)
        vae = magi.load_vae(args.vae, args.device, cache.vae_dtype)
        pipe = magi.MAGI(self.dit, vae, cfg, self.batches.table, encode_text=None)
        seconds = pipe((text[None], mask[None]))
        if parallel.rank() > 0:                                              # it only has to take part
            return f"{len(list(seconds))} s"
        file = args.work / "samples" / f"{self.steps_done:06}.mp4"
        file.parent.mkdir(exist_ok=True)
        file.unlink(missing_ok=True)
        writer = media.Mp4Writer(file, cfg.fps)
        for frames in seconds:
            writer.write(frames)
        writer.close()
        return f"{self.prompt[:50]!r} is {file}"

    def write(self) -> None:
        """The result as it is now."""
        args = self.args
        if args.rank and parallel.rank() == 0:
            captions = dict.fromkeys(text for piece in self.batches.pieces for text in piece.captions)
            about = {"base_model": args.model.resolve().name, "command": args.command,
                     "merged_first": " ".join(file.name for file in args.lora), "steps": str(self.steps_done),
                     "prompts": json.dumps(list(captions)[:20], ensure_ascii=False)}
            about = {name: value for name, value in about.items() if value}
            training.save_lora(self.dit, args.out, about)
            say(f"wrote {args.out}")
        if not args.rank:
            weights = training.gathered(self.dit.state_dict())
            config = {"dit": asdict(self.dit.cfg), "sampler": asdict(self.sampler)}
            if parallel.rank() == 0:
                write_model(args.out, args.model, weights, config)


def describe(args: argparse.Namespace, base: DiT, batches: Batches) -> None:
    """Say what will be trained on, a line for each size, and what memory it takes."""
    pieces, text_tokens = batches.pieces, 0
    files = {piece.path for piece in pieces}
    lines = [f"{len(files)} clips, {sum(piece.chunks for piece in pieces)} s, in {len(pieces)} pieces:"]
    for (chunks, height, width), members in buckets(pieces).items():
        count = max(1, batches.most_tokens // members[0].tokens)
        text_tokens = max(text_tokens, count * chunks * batches.length)
        what = f"{len(members):5} of {chunks} s at {height}x{width}"
        lines.append(f"  {what}: {members[0].tokens} tokens each, {count} at once")
    needs = planner.training_needs(
        base, args.command, args.rank, batches.most_tokens, text_tokens, args.optimizer,
        args.keep_activations, parallel.ranks(), bool(args.stream))
    lines.append(planner.show_training(needs, planner.memory_of(args.device)))
    for name, folder in (("VAE", args.vae), ("T5", args.t5)):
        size = terminal.weight_bytes(folder)
        lines.append(f"before it, for what is not cached: {name}, {size / planner.GIB:.2f} GiB")
    print("\n".join(lines), file=sys.stderr)


def write_model(out: Path, base: Path, weights: dict[str, Tensor], config: dict, most: int = 5 * 10**9
                ) -> None:
    """A model folder: config.json, weights in files of at most 5 GB, and the special tokens of the base."""
    from huggingface_hub import split_torch_state_dict_into_shards

    files = split_torch_state_dict_into_shards(weights, max_shard_size=most)
    with outputs.new_folder(base, out, out.exists()) as folder:
        outputs.check_room(folder, sum(u.nbytes for u in weights.values()))
        for file, names in files.filename_to_tensors.items():
            outputs.save({name: weights[name].detach().cpu() for name in names}, folder / file)
        if files.is_sharded:
            index = json.dumps({"weight_map": files.tensor_to_filename}, indent=1)
            (folder / "model.safetensors.index.json").write_text(index)
        if (tokens := base / "special_tokens.safetensors").is_file():
            shutil.copyfile(tokens, folder / tokens.name)
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


# ----------------------------------------------------------------------------------------------------------
# 6  Command line
# ----------------------------------------------------------------------------------------------------------


def size_of(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or min(map(int, match.groups())) < 32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 480x832 (height x width, from 32)")
    return int(match[1]), int(match[2])


def parser() -> Parser:
    about = __doc__.split("\n\n")[0]
    top = Parser(prog="training.py", allow_abbrev=False, description=about)
    commands = top.add_subparsers(dest="command", required=True)
    kinds = {"lora": "train a low-rank addition to a base model", "full": "train all weights of a base model",
             "distill": "make a base model one of few steps and one branch"}
    folder = {"type": Path, "metavar": "DIR"}
    positive, natural = ({"type": number(int, least), "metavar": "N"} for least in (1, 0))
    default = "; default: %(default)s"
    for name, text in kinds.items():
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        flag = sub.add_argument
        flag("--model", **folder, required=True, help="folder of the base model")
        flag("--data", **folder, required=True, help="clips with captions (see finetune.py)")
        flag("--out", type=Path, required=True, help="LoRA file (.safetensors), or folder for all weights")
        flag("--vae", **folder, help="default: vae beside the model")
        flag("--t5", **folder, help="default: t5 beside the model")
        flag("--lora", type=Path, metavar="FILE", action="append", default=[],
             help="merged into the base model first; again for more")
        flag("--rank", **natural, default=16 if name == "lora" else 0,
             help="of the LoRA; 0: all weights" + default)
        flag("--steps", **positive, default=1000, help="the rates fall in the last third" + default)
        flag("--lr", type=number(float, 0), metavar="X",
             help=f"peak rate; default: {LORA_RATE:g} for a LoRA, {FULL_RATE:g} for all weights")
        flag("--warmup", **positive, default=50, help="steps; at most a fifth of all" + default)
        flag("--accumulate", **positive, help="forwards in a step, shared by all processes; default: 1 each")
        flag("--size", type=size_of, metavar="HxW", help="only its area counts; default: the model's")
        flag("--seconds", **positive, default=4, help="of the longest piece" + default)
        flag("--tokens", **positive, help="most in a forward; default: those of --seconds at --size")
        flag("--optimizer", choices=["adamw", "adamw8bit"], default="adamw",
             help="adamw8bit needs torchao" + default)
        flag("--keep_activations", action="store_true", help="of all layers: more memory, a quarter less "
             "time (for a LoRA a third)")
        flag("--stream", choices=["cpu", "disk"], help="where a LoRA's frozen layers are kept, of which the "
             "device holds two at a time; default: it holds all")
        flag("--seed", **natural, default=0, help="of data, noise and samples" + default)
        flag("--device", default="cuda" if torch.cuda.is_available() else "cpu",
             help="cpu, cuda:1, mps" + default)
        flag("--backend", choices=["auto", "torch", "triton"], default="auto", help="which kernels; auto: on "
             "a GPU the fastest correct one for each operation, forward and backward" + default)
        flag("--every", **positive, default=100, help="steps from checkpoint to checkpoint" + default)
        flag("--sample_every", **natural, default=250, help="steps; 0: no samples" + default)
        flag("--sample_prompt", metavar="TEXT", help="default: the first caption")
        flag("--sample_seconds", **positive, default=2, help="length of a sample" + default)
        flag("--cache", **folder, help="what is encoded; default: DATA.cache")
        flag("--work", **folder, help="checkpoint, log, samples; default: OUT.work")
        flag("--skip_bad", action="store_true", help="leave out clips that cannot be used")
        flag("--plan", action="store_true", help="only say what is there and what it needs")
    sub = commands.add_parser("merge", help="a model with a LoRA in its weights")
    sub.add_argument("--model", type=Path, required=True)
    sub.add_argument("--lora", type=Path, required=True, action="append")
    sub.add_argument("--out", type=Path, required=True, help="folder")
    sub = commands.add_parser("export", help="a LoRA in the names of other programs")
    sub.add_argument("--lora", type=Path, required=True)
    sub.add_argument("--out", type=Path, required=True, help="file, or folder for peft")
    sub.add_argument("--format", choices=[*training.EXPORT_NAMES], default="peft")
    return top


def run(args: argparse.Namespace) -> None:
    if args.command == "export":
        training.export_lora(args.lora, args.out, args.format)
        print(f"wrote {args.out}")
        return
    if args.command == "merge":
        merge(args)
        return
    args.vae = args.vae or checkpoints.beside(args.model, "vae")
    args.t5 = args.t5 or checkpoints.beside(args.model, "t5")
    name = args.out.name.removesuffix(".safetensors")
    args.work = args.work or args.out.with_name(f"{name}.work")
    require(args.command != "lora" or args.rank, "--rank 0 is for all weights: use the command full")
    require(args.command != "full" or not args.rank, "--rank is of a LoRA: use the command lora")
    finetune(args)


def merge(args: argparse.Namespace) -> None:
    cfg = read_config(args.model, "dit", DiTConfig)
    empty = build(lambda: DiT(cfg), args.model)
    for file in args.lora:
        training.check_lora(empty, file)
    require(not cfg.fp8, "a LoRA cannot be merged into fp8 weights: merge it into the bf16 model")
    require(not args.out.exists(), f"{str(args.out)!r} exists: choose another folder")
    dit = magi.load_dit(args.model)
    for file in args.lora:
        training.load_lora(dit, file)
    weights = training.merge_lora(dit).state_dict()
    sampler = training.lora_sampler(read_config(args.model, "sampler", SamplerConfig), args.lora)
    config = read_json(args.model / "config.json") | {"sampler": asdict(sampler)}
    write_model(args.out, args.model, weights, config)


exit_code = partial(
    terminal.exit_code, kept="the last checkpoint is kept", too_large=": training needs less with a smaller "
    "--size, --seconds or --tokens, with --stream cpu, or without samples (--sample_every 0)")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line -> its exit code."""
    args = parser().parse_args(argv)
    return exit_code(lambda: run(args))


if __name__ == "__main__":
    parallel.leave(main())
