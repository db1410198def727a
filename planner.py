"""What a run takes in memory, worked out from the shapes alone: no weight is read, nothing is computed.

    python sample.py --model models/24B-base --plan                         a video: what fits where
    python training.py lora --model models/4.5B-base --data clips/ --out my.safetensors --plan

tests/test_parallel.py compares it with what a video really allocates, and tests/test_finetune.py with what
autograd keeps of a step.

Contents: 1 A video, 2 A step of training.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

import magi
import parallel
import training
from checkpoints import read_config, read_json, require

# ------------------------------------------------------------------------------------------------------------
# 1  A video
# ------------------------------------------------------------------------------------------------------------

GIB = 2**30
LONG = 24                        # chunks, after which a cache that forgets takes no more
T5_XXL = dict(d_model=4096, num_layers=24, vocab_size=32128, d_ff=10240)     # of its config.json


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: int                 # of the DiT, and of a T5 that stays: kept all the time
    passing: int                 # layers that are put together, or streamed: one computes, the next comes
    vae: int
    cache: int                   # keys and values of clean chunks
    activations: int             # the worst moment of a layer
    decoding: int                # that of the VAE, while it decodes a chunk: in turn with the DiT
    t5: int                      # before all others are loaded

    @property
    def total(self) -> int:
        both = self.weights + self.passing + self.vae + self.cache
        return max(self.t5, both + max(self.activations, self.decoding))


class Sizes(NamedTuple):
    """Bytes of the weights."""

    layers: tuple[int, ...]      # of each layer of the DiT
    others: int                  # of all else in the DiT
    vae: int
    pinned: int                  # of all layers in pinned host memory: PyTorch takes powers of two


@lru_cache(16)                   # a plan asks some thirty times, and the 24B takes its time to build
def sizes(dit: magi.DiTConfig, vae: magi.VAEConfig) -> Sizes:
    bytes_of = lambda module: [u.nbytes for u in module.state_dict().values()]
    with torch.device("meta"):
        transformer, codec = magi.DiT(dit), magi.VAE(vae)
    layers = tuple(sum(bytes_of(layer)) for layer in transformer.layers)
    pinned = sum(1 << (size - 1).bit_length() for size in bytes_of(transformer.layers))
    return Sizes(layers, sum(bytes_of(transformer)) - sum(layers), sum(bytes_of(codec)), pinned)


def needs(dit: magi.DiTConfig, run: magi.SamplerConfig, vae: magi.VAEConfig = magi.VAE_PRESETS["magi"],
          t5: dict = T5_XXL, *, R: int = 1, stream: bool = False, keep_t5: bool = False) -> Memory:
    """Memory of a long run on each of R ranks, with the torch backend. keep_t5: as of magi.load."""
    size = sizes(dit, vae)
    layers = size.layers
    weights = size.others + (0 if stream else sum(layers) // R)

    steps = list(magi.plan(run, LONG + max(run.kv_ranges, default=0)))
    n = max(len(step.chunks) for step in steps)                              # chunks in a forward
    cached = max(int(step.noisy[0].chunk - max(0, step.forget)) for step in steps)
    s = magi.CHUNK * (run.height // 16) * (run.width // 16)                  # tokens of a chunk
    N = n * math.ceil(s / R)                                                 # of a forward on this rank
    S = min(N, parallel.SLICE)
    texts = n * dit.text_length
    b, D, F = dit.torch_dtype.itemsize, dit.hidden_size, dit.ffn_size
    A, G = dit.num_heads * dit.head_dim, dit.num_kv_heads * dit.head_dim     # widths of q, and of k or v
    H = F * (1 + dit.gated_ffn)

    # What attention holds at one time: h, q, k, v and the results of self- and cross-attention. In
    # self-attention (`first`) come keys and values joined with the cached ones, a chunk's result and, on
    # several ranks, q, k, v and the result of this rank's heads. In cross-attention comes qx, twice, the
    # second time in slices in float32.
    first = 2 * G * (1 + cached / n) + A / n + (R > 1) * (2 * A + 2 * G)
    attention = N * b * (D + 3 * A + 2 * G) + max(N * b * first, N * b * 2 * A + S * 8 * A)
    middle = S * b * 2 * H                                                   # before and after GELU, SwiGLU
    middle8 = S * (4 * D + 8 * H) + 2 * D * H                                # fp8: the sums, weight in bf16
    tokens = N * (b * D + dit.head_dim * 3 // 2) + texts * b * D             # x, angles, texts of a branch
    branches = 3 if stream and not run.distilled else 1                      # that wait for each other
    latents = 4 * 16 * magi.CHUNK * (run.height // 8) * (run.width // 8)     # of a chunk
    shared = branches * tokens + 4 * n * latents + texts * (8 * dit.text_dim + b * 4 * G)

    def activations(i: int) -> int:
        fp8 = dit.fp8 and 0 < i < dit.num_layers - 1
        return int(shared + max(attention, N * b * 2 * D + (middle8 if fp8 else middle)))

    coming = [*layers[1:], layers[0]] if stream else layers                  # FSDP gathers, then copies
    passing = [sum(pair) if stream or R > 1 else 0 for pair in zip(layers, coming, strict=True)]
    worst = max(range(dit.num_layers), key=lambda i: passing[i] + activations(i))

    patches = 3 * (min(256, run.height) // 8) * (min(256, run.width) // 8)   # of a tile of the VAE
    tile = 4 * (1 + patches) * max(11 * vae.embed_dim, 4 * vae.out_features)
    second = 4 * 3 * 24 * run.height * run.width                             # a chunk in pixels
    words = 2 * t5["vocab_size"] * t5["d_model"]                             # of T5, in bfloat16
    block = 2 * (4 * t5["d_model"] ** 2 + 3 * t5["d_model"] * t5["d_ff"])
    encoder = words + block * (2 if stream else t5["num_layers"])
    return Memory(
        weights=weights + keep_t5 * encoder,
        passing=passing[worst],
        vae=size.vae,
        cache=cached * s * dit.num_layers * 2 * (G // R) * b,
        activations=activations(worst),
        decoding=2 * second + max(second, tile),
        t5=encoder,
    )


def fits(size: float, card: float) -> bool:
    """Whether so many bytes fit on a card of so many GB, as cards are called. A tenth is left for CUDA and
    for fragmentation."""
    return size < 0.9 * card * GIB


NARROW = dict(window=1, kv_ranges=(2,))
SMALL = dict(height=480, width=832)
CHANGES = {                      # what takes less memory, the gentlest first -> (streamed?, other settings)
    # (Several processes stream from the disk, whose pages they share; each would keep all layers on its CPU.)
    "as it is": (False, {}),
    "--stream cpu": (True, {}),
    "--window 1 --kv_range 2": (False, NARROW),
    "--stream cpu --window 1 --kv_range 2": (True, NARROW),
    "--stream cpu --height 480 --width 832": (True, SMALL),
    "--stream cpu --window 1 --kv_range 2 --height 480 --width 832": (True, NARROW | SMALL),
}


def smallest_change(dit: magi.DiTConfig, run: magi.SamplerConfig, card: float, R: int = 1, **more: Any
                    ) -> str:
    """The first of CHANGES with which R cards of so many GB will do, or "nothing here"."""
    for name, (stream, settings) in CHANGES.items():
        memory = needs(dit, dataclasses.replace(run, **settings), R=R, stream=stream, **more)
        if fits(memory.total, card):
            return name.replace("cpu", "disk") if R > 1 else name
    return "nothing here"


def memory_table(dit: magi.DiTConfig, run: magi.SamplerConfig, vae: Path, t5: Path, keep_t5: bool,
                 numbers: Sequence[int], cards: Sequence[float]) -> str:
    """What a run takes, in ways to run it, and what makes it fit so many cards of so many GB: the text of
    sample.py --plan. VAE and T5 are the released ones if there are none in these folders."""
    is_here = (vae / "config.json").is_file()
    codec = read_config(vae, "vae", magi.VAEConfig) if is_here else magi.VAE_PRESETS["magi"]
    more: dict[str, Any] = {"vae": codec, "keep_t5": keep_t5}
    if (t5 / "config.json").is_file():
        more["t5"] = config = read_json(t5 / "config.json")
        require(isinstance(config, dict) and all(isinstance(config.get(name), int) for name in T5_XXL),
                f"{str(t5 / 'config.json')!r} is not of a T5 model: give the right folder (--t5)")
    most = 1 if keep_t5 else dit.num_kv_heads            # one process reads the prompts
    counts = [r for r in range(1, most + 1) if dit.num_kv_heads % r == 0]
    ways = " or ".join(f"--plan {R}x{cards[0]:g}" for R in counts)
    require(set(numbers) & set(counts), f"{numbers[0]} GPUs cannot share this run: give {ways}")
    numbers = [R for R in numbers if R in counts]
    parts = [field.name for field in dataclasses.fields(Memory)] + ["total"]
    its_t5 = "stays, and is among the weights" if keep_t5 else "comes first and goes"
    lines = [f"GiB on each GPU, {run.height}x{run.width}, window {run.window} (T5 {its_t5}):",
             "processes  stream " + " ".join(f"{part:>11}" for part in parts)]
    for R, stream in [(1, False), (1, True), *((r, False) for r in counts[1:])]:
        memory = needs(dit, run, R=R, stream=stream, **more)
        columns = " ".join(f"{getattr(memory, part) / GIB:11.2f}" for part in parts)
        lines.append(f"{R:9}  {'cpu' if stream else '-':>6} {columns}")
    if not run.kv_ranges:
        lines.append(f"--kv_range all forgets nothing: this is the cache after {LONG} s, "
                     f"it grows with each chunk")
    pinned = sizes(dit, codec).pinned
    lines.append(f"--stream cpu keeps {pinned / GIB:.2f} GiB of layers in host memory, disk keeps none")
    names = {R: f"{R} (torchrun --nproc_per_node {R} sample.py ...)" for R in numbers} | {1: "one"}
    lines.append("\nA card of    " + "".join(f"{names[R]:63}" for R in numbers).rstrip())
    for card in cards:
        changes = [smallest_change(dit, run, card, R, **more) for R in numbers]
        lines.append(f"{card:6g} GB    " + "".join(f"{change:63}" for change in changes).rstrip())
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------
# 2  A step of training
# ------------------------------------------------------------------------------------------------------------


def training_needs(dit: magi.DiT, command: str, rank: int, tokens: int, text_tokens: int,
                   optimizer: str = "adamw", keep_activations: bool = False, processes: int = 1,
                   stream: bool = False) -> dict[str, float]:
    """Bytes of a training step of a DiT (on the meta device) in each process, by what they are for.

    tokens and text_tokens: of one forward. Activations are the inputs of all layers and what the matrices and
    norms of one layer save (finetune.checkpoint_layers), or of all. Allocators take some more than this.
    """
    cfg, shared = dit.cfg, dit.cfg.torch_dtype
    layer = sum(p.nbytes for p in dit.layers[0].parameters())
    counts = []                          # of each weight: how many numbers are kept here, and bytes of one
    for name, p in dit.named_parameters():
        in_layer = name.startswith("layers.")
        parts = processes if in_layer and p.dtype == shared else 1
        counts.append((0 if stream and in_layer else p.numel() / parts, p.element_size()))
    weights = sum(n * size for n, size in counts)
    needed: dict[str, float] = {"weights": weights}
    if stream or processes > 1:          # a layer that is trained brings gradients, in float32 too
        needed["layers that pass"] = (2 if rank else 5) * layer
    if rank:
        lora = sum(rank * sum(linear.weight.shape) for linear in training.lora_targets(dit).values())
        needed |= {"LoRA": 4 * lora, "gradients": 4 * lora, "optimiser": 8 * lora}
    else:
        rounded = sum(2 * n for n, size in counts if size == 2)              # what bf16 has lost
        states = 8 * sum(n for n, _ in counts) + rounded
        needed |= {"gradients": weights, "optimiser": states if optimizer == "adamw" else states / 4}
        if command == "distill":
            needed["teacher"] = weights

    b, D, F = cfg.torch_dtype.itemsize, cfg.hidden_size, cfg.ffn_size
    A, G = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim     # widths of q, and of k or v
    in_blocks = 3 * D + 6 * A + 4 * G + (5 if cfg.gated_ffn else 3) * F      # numbers a token, as the weights
    in_float32 = 6 * D + 2 * A
    if rank and b < 4:                   # what a linear takes is kept in float32, for the LoRA, and only so
        in_blocks -= 2 * D + 2 * A + F
        in_float32 += 5 * D + F
    one_layer = tokens * (b * in_blocks + 4 * in_float32)
    one_layer += text_tokens * (4 * cfg.text_dim + 8 * D + 4 * b * G)
    branches = 3 if command == "distill" else 1                              # of a teacher, without gradients
    inputs = b * tokens * D * cfg.num_layers
    layers = one_layer * cfg.num_layers if keep_activations else one_layer + inputs
    needed["activations"] = layers + one_layer * (branches - 1) / 2
    return needed


def show_training(needed: dict[str, float], here: float | None) -> str:
    """What training_needs gives in GiB, the sum, and on which cards that fits."""
    total = sum(needed.values())
    answer = lambda card: "yes" if fits(total, card) else "no"
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in needed.items())
    cards = ", ".join(f"{gb} GB: {answer(gb)}" for gb in (12, 24, 48, 80))
    machine = "" if here is None else f"; this machine, {here / GIB:.1f} GiB: {answer(here / GIB)}"
    return f"a step needs about {total / GIB:.2f} GiB: {parts}\nfits on a card of {cards}{machine}"


def memory_of(device: str) -> float | None:
    """Bytes of memory of a device, if it can be told."""
    if "cuda" in device:
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
