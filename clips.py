"""A folder of videos with captions -> pieces of whole seconds, encoded once, for training.py.

    clips/  a.mp4 a.txt ...  --find_videos-->  Video    what is there, and what is wrong with it
                             --cut---------->  Piece    1 to n seconds at 24 fps, of one of a few sizes
                             --Cache-------->  latents and text; VAE and T5 run once and are freed

Captions: a text file of the video's name (a.mp4, a.txt), or metadata.jsonl or metadata.csv with `file_name`
and `text`. One line (or string) is for the whole video; several lines (or a list) are for one second each,
and the last goes on.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import media
from checkpoints import reading, require, save, weight_files
from magi import CHUNK, FRAMES_PER_LATENT, SCALE_FACTOR, T5, load_vae

FPS = 24
CHUNK_FRAMES = CHUNK * FRAMES_PER_LATENT                                     # 24: one second
SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".gif", ".ts")

# ----------------------------------------------------------------------------------------------------------
# 1  What is there
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Video:
    """A file that can be trained on."""

    path: Path
    captions: tuple[str, ...]            # one for all of it, or one a second, the last of which goes on
    seconds: int                         # whole ones
    height: int                          # as shown: upright, with square pixels
    width: int


@dataclass(frozen=True)
class Piece:
    """A part of a video, as it is encoded."""

    path: Path
    start: int                           # second
    captions: tuple[str, ...]            # one a chunk
    height: int
    width: int

    @property
    def chunks(self) -> int:
        return len(self.captions)

    @property
    def tokens_per_chunk(self) -> int:
        return CHUNK * (self.height // 16) * (self.width // 16)


def read_captions(folder: Path) -> dict[Path, tuple[str, ...]]:
    """The videos of a folder and their captions. ValueError for a file that is missing, or has no caption."""
    require(folder.is_dir(), f"the data folder {str(folder)!r} does not exist: give one with videos and "
            f"captions")
    rows: list[dict[str, Any]] | None = None
    if (jsonl := folder / "metadata.jsonl").is_file():
        with reading("captions", jsonl):
            rows = [json.loads(line) for line in jsonl.read_text("utf-8-sig").splitlines() if line.strip()]
    elif (table := folder / "metadata.csv").is_file():
        with reading("captions", table), table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    if rows is not None:
        for i, row in enumerate(rows, 1):
            require(isinstance(row, dict) and row.get("file_name") and row.get("text") is not None,
                    f"row {i} of the metadata in {str(folder)!r} lacks file_name or text: {row}")
        found = {folder / row["file_name"]: row["text"] for row in rows}
        for path in found:
            require(path.is_file(), f"{path.name!r} of the metadata is not in {str(folder)!r}: add it, or "
                    f"take out its row")
        return {path: as_captions(text) for path, text in found.items()}
    videos = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    require(videos, f"no videos in {str(folder)!r}: give files such as a.mp4 and captions a.txt")
    texts = {}
    for path in videos:
        text = path.with_suffix(".txt")
        require(text.is_file(), f"clip {path.name!r} has no caption: write it to {text.name!r} (an empty "
                f"file for none), or list all clips in metadata.jsonl")
        with reading("caption", text):
            texts[path] = as_captions(text.read_text("utf-8-sig"))
    return texts


def as_captions(text: str | list) -> tuple[str, ...]:
    lines = text.splitlines() if isinstance(text, str) else [str(line) for line in text]
    return tuple(line.strip() for line in lines if line.strip()) or ("",)


def find_videos(folder: Path, cache: Path, skip_bad: bool, warn: Callable[[str], None]) -> list[Video]:
    """Every clip of a folder, each looked into (what was seen is kept in the cache). ValueError for the first
    that cannot be read or is shorter than a second; with skip_bad these are named and left out."""
    seen_file = cache / "videos.json"
    seen = json.loads(seen_file.read_text()) if seen_file.is_file() else {}
    captions, videos = read_captions(folder), []
    bar = tqdm(captions.items(), desc="look at clips", unit="clip", disable=None, leave=False)
    for path, text in bar:
        key = file_key(path)
        try:
            if key not in seen:
                seen[key] = probe(path)
            frames, height, width = seen[key]
            require(frames >= CHUNK_FRAMES, f"clip {path.name!r} has {frames} frames at {FPS} fps: at least "
                    f"{CHUNK_FRAMES} (one second) are needed")
        except ValueError as error:
            require(skip_bad, f"{error}; --skip-bad leaves such clips out")
            warn(f"skipped: {error}")
            continue
        videos.append(Video(path, text, frames // CHUNK_FRAMES, height, width))
    bar.close()
    require(videos, f"no clip of {str(folder)!r} can be used")
    cache.mkdir(parents=True, exist_ok=True)
    write_whole(seen_file, lambda new: new.write_text(json.dumps(seen)))
    return videos


def probe(path: Path) -> tuple[int, int, int]:
    """Frames at 24 fps, height and width of a video. It is decoded, as lengths in headers may be wrong."""
    frames = media.read_video(path, FPS, start=0, count=10**9, size=(16, 16), fit="stretch")
    height, width = media.read_video(path, FPS, start=0, count=1).shape[1:3]
    return len(frames), height, width


def file_key(path: Path) -> str:
    """Changes when a file does."""
    stat = path.stat()
    return f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """A file that is there whole or not at all."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(new)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------
# 2  Pieces and buckets
# ----------------------------------------------------------------------------------------------------------

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


def cut(videos: Sequence[Video], area: int, most_chunks: int, most_tokens: int | None = None) -> list[Piece]:
    """Pieces of at most so many seconds and so many tokens (6 * height/16 * width/16 a second)."""
    pieces = []
    for video in videos:
        height, width = bucket_size(video.height, video.width, area)
        chunks = most_chunks
        if most_tokens is not None:
            chunks = min(chunks, most_tokens // Piece(video.path, 0, ("",), height, width).tokens_per_chunk)
            require(chunks >= 1, f"one second of {video.path.name!r} at {height}x{width} is more than "
                    f"{most_tokens} tokens: raise --tokens, or choose a smaller --size")
        for start in range(0, video.seconds, chunks):
            seconds = range(start, min(start + chunks, video.seconds))
            captions = tuple(video.captions[min(second, len(video.captions) - 1)] for second in seconds)
            pieces.append(Piece(video.path, start, captions, height, width))
    return pieces


def buckets(pieces: Sequence[Piece]) -> dict[tuple[int, int, int], list[int]]:
    """(chunks, height, width) -> which pieces have these."""
    found: dict[tuple[int, int, int], list[int]] = {}
    for i, piece in enumerate(pieces):
        found.setdefault((piece.chunks, piece.height, piece.width), []).append(i)
    return dict(sorted(found.items()))


# ----------------------------------------------------------------------------------------------------------
# 3  Encoded once
# ----------------------------------------------------------------------------------------------------------


@dataclass
class Cache:
    """Latents of pieces and text of captions, one file each, found again by what made them.

    The name of a file holds a hash of the video file (its path, size and time), the piece and the VAE; or of
    the caption and the T5. So nothing is ever read that other weights have made.
    """

    folder: Path
    vae: Path
    t5: Path
    device: str = "cpu"
    vae_dtype: torch.dtype | None = None

    @functools.cached_property
    def vae_key(self) -> str:
        return model_key([self.vae / "config.json", *weight_files(self.vae)])

    @functools.cached_property
    def t5_key(self) -> str:
        return model_key(sorted(self.t5.glob("*")))

    def latent_file(self, piece: Piece) -> Path:
        named = dataclasses.replace(piece, path=Path(file_key(piece.path)), captions=("",) * piece.chunks)
        made_by = f"{named} {self.vae_key} {self.vae_dtype}"
        return self.folder / "latents" / f"{short_hash(made_by)}.safetensors"

    def text_file(self, caption: str) -> Path:
        return self.folder / "text" / f"{short_hash(f'{caption} {self.t5_key}')}.safetensors"

    def encode_pieces(self, pieces: Sequence[Piece], skip_bad: bool, warn: Callable[[str], None]
                      ) -> list[Piece]:
        """Encode what is missing; the pieces that could be read."""
        missing = [piece for piece in pieces if not self.latent_file(piece).is_file()]
        if not missing:
            return list(pieces)
        (self.folder / "latents").mkdir(parents=True, exist_ok=True)
        vae, bad = load_vae(self.vae, self.device, self.vae_dtype), set()
        for piece in tqdm(missing, desc="encode clips", unit="piece", disable=None):
            try:
                save(encode_piece(vae, piece), self.latent_file(piece), {"piece": str(piece)})
            except ValueError as error:
                require(skip_bad, f"{error}; --skip-bad leaves such clips out")
                warn(f"skipped: {error}")
                bad.add(piece)
        left = [piece for piece in pieces if piece not in bad]
        require(left, "no clip can be used")
        return left

    def encode_captions(self, captions: Sequence[str], length: int) -> None:
        """Encode the captions that are missing."""
        missing = sorted({caption for caption in captions if not self.text_file(caption).is_file()})
        if not missing:
            return
        (self.folder / "text").mkdir(parents=True, exist_ok=True)
        t5 = T5(self.t5, length, self.device, keep=True)
        for i in tqdm(range(0, len(missing), 8), desc="encode captions", unit_scale=8, disable=None):
            for caption, text, mask in zip(missing[i : i + 8], *t5(missing[i : i + 8]), strict=True):
                kept = text[: int(mask.sum())].bfloat16()                    # without the padding
                save({"text": kept}, self.text_file(caption), {"caption": caption})

    def latents(self, piece: Piece) -> tuple[Tensor, Tensor]:
        """Scaled latents (16, T, H, W), and (16, 1, H, W) of the fourth frame alone, encoded as an image."""
        tensors = load(self.latent_file(piece))
        return tensors["latents"].float(), tensors["image"].float()

    def text(self, caption: str, length: int) -> tuple[Tensor, Tensor]:
        """Text (L, C) float32 and mask (L,)."""
        text = load(self.text_file(caption))["text"].float()[:length]
        mask = (torch.arange(length) < len(text)).long()
        return F.pad(text, (0, 0, 0, length - len(text))), mask


def load(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    with reading("cached file", file):
        return load_file(file)


@torch.no_grad()
def encode_piece(vae: Any, piece: Piece) -> dict[str, Tensor]:
    """What training needs of a piece, in bf16: that is finer than the VAE is right."""
    frames = media.read_video(piece.path, FPS, start=piece.start * FPS, count=piece.chunks * CHUNK_FRAMES,
                              size=(piece.height, piece.width))
    require(len(frames) == piece.chunks * CHUNK_FRAMES, f"clip {piece.path.name!r} ends early: {len(frames)} "
            f"frames from second {piece.start} on, not {piece.chunks * CHUNK_FRAMES}")
    video = media.fit_frames(frames, piece.height, piece.width).to(vae.encoder.pos_embed)
    latents = torch.cat([vae.encode(part) for part in video.split(CHUNK_FRAMES, dim=2)], dim=2)
    image = vae.encode(video[:, :, FRAMES_PER_LATENT - 1 : FRAMES_PER_LATENT])
    return {"latents": (latents[0].float() * SCALE_FACTOR).bfloat16(),
            "image": (image[0].float() * SCALE_FACTOR).bfloat16()}


def model_key(files: Sequence[Path]) -> str:
    """Tells model files from others by their names, sizes and first megabyte (headers and some weights)."""
    parts = []
    for file in files:
        with file.open("rb") as f:
            parts.append(f"{file.name} {file.stat().st_size} {hashlib.sha256(f.read(2**20)).hexdigest()}")
    return short_hash(" ".join(parts))


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
