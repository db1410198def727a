"""One video on several GPUs, or on a GPU that is too small for its model. magi.py knows nothing of it: all of
this hangs on its modules from outside, and the results are the same.

    torchrun --nproc_per_node 8 sample.py --model models/24B-base ...       the same flags as without torchrun
    python sample.py --model models/24B-base --stream cpu ...               or: --stream disk
    python sample.py --model models/24B-base --plan                         what fits where, without computing

Who holds what, with R ranks (a rank is a process with a GPU of its own; here R = 4 and a chunk is a row):

                       tokens           heads, and their cache     weights of a layer      tiles of the VAE
                     r0 r1 r2 r3
        chunk 0      -- -- -- --        rank r: Hq/R of q,         1/R each; a layer       0 4 8 ..  rank 0
        chunk 1      -- -- -- --        Hkv/R of k and v,          is put together for     1 5 9 ..  rank 1
        chunk 2      -- -- -- --        over all tokens            its turn, then freed    2 6 10 .. rank 2

    latents --> its tokens --> [ norms, q k v, text, feed-forward:   its tokens, all heads ]* --> gather
                               [ all-to-all, self-attention:         all tokens, its heads ]      64 numbers
                               [ all-to-all back                                           ]      a token

Every rank walks the same plan and draws the same noise from (seed, chunk), so nothing else is said between
them. T5 runs on rank 0, which sends the text; rank 0 writes. For more than one machine torchrun's own flags
do (--nnodes, --rdzv-endpoint).

Streaming: one layer computes while a thread brings the next; two are held. Each forward reads all layers, so
a base model reads them up to three times a step.

Measured on CPUs, with random weights of the released sizes, one chunk of 64x64 (CUDA has not been tried yet):

    4.5B base, 2 processes     4.21 of 8.35 GiB of weights each, peak 6.5 GiB; in a step (2 forwards) each
                               takes 39 s of a core and sends 27 MB of tokens and heads, 8.9 GB of weights
    24B fp8, from disk         peak 3.5 GiB with the VAE; a step reads the 24.7 GiB of weights, more than that
                               machine's memory, and takes 265 s of a core: a CPU widens fp8 numbers

Contents: 1 Ranks, 2 Tokens and heads, 3 Weights, 4 Slices, 5 Loading, 6 Planning. Left out on purpose:
training on several GPUs, and running the branches of a step layer by layer together.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import magi
from checkpoints import build, fill, read_config, read_headers, require, weight_files

# ------------------------------------------------------------------------------------------------------------
# 1  Ranks
# ------------------------------------------------------------------------------------------------------------


def start(device: str | None = None) -> str | None:
    """Join the other processes if torchrun started this one, which its environment tells. device: what was
    asked for, or None; returns this process's own."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return device
    if device == "cuda" or device is None and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        require(int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count(),
                f"there are {torch.cuda.device_count()} GPUs here: start that many processes at most")
        torch.cuda.set_device(device)
    gpu = str(device).startswith("cuda")
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    return device


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def from_first(make: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, but rank 0 alone runs it and sends the result, or its ValueError, to the others."""
    def run(*args: Any, **kwargs: Any) -> Any:
        if ranks() == 1:
            return make(*args, **kwargs)
        made: list[Any] = [None]
        if rank() == 0:
            try:
                made = [make(*args, **kwargs)]
            except (ValueError, OSError) as error:
                made = [error]
        dist.broadcast_object_list(made)
        if isinstance(made[0], Exception):
            raise made[0]
        return made[0]

    return run


def agreed(make: Callable[..., Any]) -> Callable[..., Any]:
    """The same function on every rank; where it fails on one, it fails on all, with the same error."""
    def run(*args: Any, **kwargs: Any) -> Any:
        made = error = None
        try:
            made = make(*args, **kwargs)
        except (ValueError, OSError, ImportError) as e:
            error = e
        errors: list = [error]
        if ranks() > 1:
            errors = [None] * ranks()
            dist.all_gather_object(errors, error)
        for i, e in enumerate(errors):
            if e is not None:
                raise e if i == 0 else ValueError(f"process {i} of {ranks()}: {e}")
        return made

    return run


def lost_another(error: BaseException) -> bool:
    """Did this fail because another process is gone?"""
    return ranks() > 1 and (isinstance(error, dist.DistError) or "peer" in str(error))


# ------------------------------------------------------------------------------------------------------------
# 2  Tokens and heads
# ------------------------------------------------------------------------------------------------------------
# DeepSpeed-Ulysses (Jacobs et al. 2023), with one turn: a rank has its share of every chunk, not of the
# sequence. So gates, texts, norms and linears, which know chunks but no neighbours, run on a share unchanged,
# and each chunk is equal work for all. Where the tokens do not divide, the last ranks' shares end in zeros.


class Share:
    """Shares a DiT's tokens among the ranks. sent: bytes that this rank has sent so far."""

    def __init__(self, dit: magi.DiT):
        Hkv, R = dit.cfg.num_kv_heads, ranks()
        counts = [str(r) for r in range(1, Hkv + 1) if Hkv % r == 0]
        require(str(R) in counts, f"{R} processes cannot share {Hkv} key/value heads: start "
                f"{', '.join(counts[:-1])} or {counts[-1]}")
        self.n, self.size, self.sent = 0, 0, 0               # chunks in this forward, tokens of one, bytes
        self.dit, self.patchify = dit, dit.patchify
        dit.patchify = self.first_tokens
        dit.register_forward_pre_hook(self.begin)
        dit.layers[0].register_forward_pre_hook(self.cut_angles)
        for layer in dit.layers:
            layer.attn.core = SharedAttention(layer.attn.core, self)
        dit.final_linear.register_forward_hook(lambda linear, args, out: self.gather(out))

    def begin(self, dit: nn.Module, args: tuple) -> None:
        x, t = args[:2]
        self.n = t.shape[1]
        self.size = math.prod(x.shape[2:]) // (self.n * dit.cfg.patch_size**2)

    def first_tokens(self, x: Tensor) -> Tensor:
        """In the place of DiT.patchify: this rank's tokens. All of them, in float32, are never there."""
        chunks = x.chunk(self.n, dim=2)
        return torch.cat([self.cut(self.patchify(chunk), 1) for chunk in chunks], dim=1)

    def cut_angles(self, layer: nn.Module, args: tuple) -> None:
        ctx = args[1]
        ctx.angles = self.cut(ctx.angles[None], self.n)[0]

    def cut(self, u: Tensor, n: int) -> Tensor:
        """All (B, n s, ...) -> this rank's (B, n s/R, ...)."""
        return self.padded(u, n)[:, :, rank()].flatten(1, 2)

    def padded(self, u: Tensor, n: int) -> Tensor:
        """(B, n s, ...) -> (B, n, R, s/R, ...), zeros where s does not divide."""
        u, missing = u.unflatten(1, (n, -1)), -self.size % ranks()
        if missing:
            u = F.pad(u, (*[0, 0] * (u.dim() - 3), 0, missing))
        return u.unflatten(2, (ranks(), -1))

    def whole(self, every: Tensor) -> Tensor:
        """All ranks' (R, B, n s/R, ...) -> (B, n s, ...), without the padding."""
        every = rearrange(every, "r b (n s) ... -> b n (r s) ...", n=self.n)
        return every[:, :, : self.size].flatten(1, 2)

    def gather(self, u: Tensor) -> Tensor:
        """This rank's (B, n s/R, ...) -> all (B, n s, ...)."""
        every = u.new_empty(ranks(), *u.shape)
        dist.all_gather_single(every.flatten(0, 1), u.contiguous())
        self.sent += u.nbytes * (ranks() - 1)
        return self.whole(every)

    def exchange(self, u: Tensor) -> Tensor:
        """(R, ...), of which part r is for rank r -> (R, ...), of which part r is from rank r."""
        got = torch.empty_like(u)
        dist.all_to_all_single(got, u)
        self.sent += u.nbytes // ranks() * (ranks() - 1)
        return got


class SharedAttention(nn.Module):
    """In the place of a layer's CachedAttention, to which it gives all tokens of this rank's heads."""

    def __init__(self, core: nn.Module, share: Share):
        super().__init__()
        self.core, self.share = core, share

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: magi.Context, out: Tensor) -> Tensor:
        R, share = ranks(), self.share                                       # q (B, n s/R, Hq, hd)
        for_each = [rearrange(u, "b n (r h) d -> r b n h d", r=R) for u in (q, k, v)]
        mine = share.whole(share.exchange(torch.cat(for_each, dim=3)))       # (B, n s, heads/R, hd)
        del for_each
        qh, kh, vh = mine.split([u.shape[2] // R for u in (q, k, v)], dim=2)
        result = self.core(qh, kh, vh, ctx)                                  # (B, n s, Hq/R, hd)
        del mine, qh, kh, vh
        result = rearrange(share.padded(result, share.n), "b n r s h d -> r b (n s) h d").contiguous()
        result = share.exchange(result)                                      # (R, B, n s/R, Hq/R, hd)
        out.unflatten(2, (R, -1)).copy_(rearrange(result, "r b n h d -> b n r h d"))
        return out                                                           # (B, n s/R, Hq, hd)


def share_tiles(vae: magi.VAE) -> magi.VAE:
    """Deal the tiles of the VAE out to the ranks, in rounds; each gets every tile in the end."""
    def deal(fn: Callable, windows: Sequence) -> Iterator[Tensor]:
        for first in range(0, len(windows), ranks()):
            here = windows[first : first + ranks()]
            tile = fn(here[rank()]).contiguous() if rank() < len(here) else None
            shapes: list = [None] * ranks()                  # tiles at the edges are smaller
            dist.all_gather_object(shapes, None if tile is None else tuple(tile.shape))
            for i in range(len(here)):
                got = tile if i == rank() else torch.empty(shapes[i], dtype=vae.dtype, device=vae_device)
                dist.broadcast(got, i)
                yield got

    vae_device = vae.encoder.pos_embed.device
    if ranks() > 1:
        vae.map_tiles = deal
    return vae


# ------------------------------------------------------------------------------------------------------------
# 3  Weights
# ------------------------------------------------------------------------------------------------------------


def shard_layers(dit: magi.DiT, load: Callable[[int], None], device: str) -> None:
    """Load a layer, keep 1/R of each of its weights, load the next: no rank ever holds all of them.

    PyTorch's FSDP puts a layer together before its turn and frees it after. The rest of the model is left
    whole: it is small, and the sampler reads null_text outside of forward. The DiT itself is registered with
    none of its own weights, since a common root lets the next layer come while one computes.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(torch.device(device).type, (ranks(),))
    for i, layer in enumerate(dit.layers):
        load(i)
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    rest = {p for name, p in dit.named_parameters() if not name.startswith("layers.")}
    fully_shard(dit, mesh=mesh, reshard_after_forward=True, ignored_params=rest)


def layer_reader(module: nn.Module, folder: str | Path, prefix: str) -> Callable[[int], dict[str, Tensor]]:
    """-> read(i): the weights of layer i, in memory of their own, by their names within the layer."""
    from safetensors import safe_open

    dtypes = {name: u.dtype for name, u in module.state_dict().items()}
    files = weight_files(folder)
    held = [safe_open(file, "pt").keys() for file in files]

    def read(i: int) -> dict[str, Tensor]:
        start, weights = f"{prefix}{i}.", {}
        for file, names in zip(files, held, strict=True):
            here = [name for name in names if name.startswith(start)]
            if here:
                with safe_open(file, "pt") as f:             # opened anew: its pages are let go after
                    for name in here:
                        u = f.get_tensor(name).to(dtypes[name], copy=True)
                        weights[name.removeprefix(start)] = u
        return weights

    return read


class Streamed:
    """Hooks on layers without weights that bring those of a layer when it is entered, and drop them after.

    fetch(i) gives the weights of layer i in CPU memory. A thread calls it for the next layer while one
    computes; on a GPU it copies on a stream of its own, once the layer before has been computed, so that
    there are never more than two.
    """

    def __init__(self, layers: Sequence[nn.Module], fetch: Callable[[int], dict[str, Tensor]], device: str):
        self.fetch, self.device, self.count = fetch, device, len(layers)
        self.thread, self.coming = ThreadPoolExecutor(1), {}
        self.held: set[int] = set()                          # layers that take memory now
        gpu = torch.device(device).type == "cuda"
        self.stream = torch.cuda.Stream(device) if gpu else None
        self.computed: torch.cuda.Event | None = None        # the layer before
        for i, layer in enumerate(layers):
            # What stands for a weight that is not there has its shape, type and device, and no memory: a
            # LoRA that is added later finds what it needs to know.
            empty = {name: torch.zeros(1, dtype=u.dtype, device=device).expand(u.shape)
                     for name, u in layer.state_dict().items()}
            layer.load_state_dict(empty, assign=True)
            layer.register_forward_pre_hook(partial(self.enter, i))
            layer.register_forward_hook(partial(self.leave, i, empty))

    def bring(self, i: int, after: torch.cuda.Event | None = None) -> dict[str, Tensor]:
        self.held.add(i)
        weights = self.fetch(i)
        if self.stream is None:
            return weights
        if after is not None:
            after.synchronize()
        with torch.cuda.stream(self.stream):
            weights = {name: u.to(self.device, non_blocking=True) for name, u in weights.items()}
            self.stream.synchronize()
        return weights

    def enter(self, i: int, layer: nn.Module, args: tuple) -> None:
        coming: Future | None = self.coming.pop(i, None)
        weights = self.bring(i) if coming is None else coming.result()
        layer.load_state_dict(weights, strict=False, assign=True)            # not strict: it may have a LoRA
        following = (i + 1) % self.count
        self.coming = {following: self.thread.submit(self.bring, following, self.computed)}

    def leave(self, i: int, empty: dict[str, Tensor], layer: nn.Module, args: tuple, out: Any) -> None:
        if self.stream is not None:
            self.computed = torch.cuda.current_stream(self.device).record_event()
        layer.load_state_dict(empty, strict=False, assign=True)
        self.held.discard(i)


def stream_layers(module: nn.Module, layers: Sequence[nn.Module], folder: str | Path, prefix: str,
                  device: str, source: str) -> Streamed:
    """Stream layers from "disk", the files of a folder, or from "cpu": they are read once and kept there,
    pinned for a GPU. (PyTorch rounds what it pins up to a power of two: 71 GB for the 24B in bf16.)"""
    require(source in ("cpu", "disk"), f"stream {source!r} is not 'cpu' or 'disk'")
    fetch = layer_reader(module, folder, prefix)
    if source == "cpu":
        pin = (lambda u: u.pin_memory()) if torch.device(device).type == "cuda" else (lambda u: u)
        kept = [{name: pin(u) for name, u in fetch(i).items()} for i in range(len(layers))]
        fetch = kept.__getitem__
    return Streamed(layers, fetch, device)


# ------------------------------------------------------------------------------------------------------------
# 4  Slices
# ------------------------------------------------------------------------------------------------------------
# The widest tensors of a layer live within one operation: the feed-forward's middle, and float32 copies in
# the torch backend. Each token is on its own there, so they are computed for a slice of tokens at a time.

SLICE = 4096                     # tokens: enough to keep a GPU busy


def in_slices(fn: Callable, x: Tensor, dim: int, n: int = 1) -> Tensor:
    """fn(slice of x, where, i) for slices of at most SLICE along dim that do not cross its n equal parts."""
    size, out = x.shape[dim] // n, None
    if size <= SLICE and n == 1:
        return fn(x, slice(None), 0)
    for start in range(0, n * size, size):
        for first in range(start, start + size, SLICE):
            where = slice(first, min(first + SLICE, start + size))
            part = fn(x.narrow(dim, first, where.stop - first), where, start // size)
            if out is None:
                shape = list(part.shape)
                shape[dim] = n * size
                out = part.new_empty(shape)
            out.narrow(dim, first, where.stop - first).copy_(part)
    return out


def slice_ops(ops: magi.Ops) -> magi.Ops:
    """The torch backend's operations, in slices. Those of kernels.py make no wide copies."""
    if ops.name != "torch":
        return ops

    def norm_rotary(x, norm, angles):
        of = lambda where: None if angles is None else angles[where]
        return in_slices(lambda u, where, i: ops.norm_rotary(u, norm, of(where)), x, dim=1)

    def gated_residual(x, gate, update, norm):
        def part(u, where, i):
            return ops.gated_residual(u, gate[:, i : i + 1], update[:, where], norm)
        return in_slices(part, x, dim=1, n=gate.shape[1])

    def of_tokens(fn):
        return lambda x, *rest: in_slices(lambda u, where, i: fn(u, *rest), x, dim=x.dim() - 2)

    return dataclasses.replace(ops, norm_rotary=norm_rotary, gated_residual=gated_residual,
                               matmul_float32=of_tokens(ops.matmul_float32),
                               fp8_matmul=of_tokens(ops.fp8_matmul))


def slice_widest(dit: magi.DiT) -> magi.DiT:
    """Compute what is widest in slices of tokens."""
    dit.ops = slice_ops(dit.ops)
    for layer in dit.layers:
        whole = layer.ffn.forward
        layer.ffn.forward = lambda x, ctx, whole=whole: in_slices(lambda u, *_: whole(u, ctx), x, dim=1)
    return dit


# ------------------------------------------------------------------------------------------------------------
# 5  Loading
# ------------------------------------------------------------------------------------------------------------


def load_dit(folder: str | Path, device: str = "cpu", dtype: str | None = None, backend: str = "torch",
             stream: str | None = None) -> magi.DiT:
    """magi.load_dit for this rank: with its share of the weights, or with none of them (stream)."""
    cfg = read_config(folder, "dit", magi.DiTConfig)
    cfg = dataclasses.replace(cfg, dtype=dtype or cfg.dtype)
    dit = build(lambda: magi.DiT(cfg), folder)

    def load(start: str, others: bool = False) -> None:
        fill(dit, folder, device, only=lambda name: name.startswith(start) != others)

    load("layers.", others=True)
    if stream:
        dit.streamed = stream_layers(dit, dit.layers, folder, "layers.", device, stream)
    elif ranks() > 1:
        shard_layers(dit, lambda i: load(f"layers.{i}."), device)
    else:
        load("layers.")
    if ranks() > 1:
        Share(dit)
    dit.ops = magi.get_ops(backend, device)
    return slice_widest(dit)


def load_vae(*args: Any, **kwargs: Any) -> magi.VAE:
    """magi.load_vae, whose tiles are dealt out to the ranks."""
    return share_tiles(magi.load_vae(*args, **kwargs))


class T5(magi.T5):
    """T5 on rank 0, which encodes for all; stream: its blocks come one by one from its files."""

    def __init__(self, *args: Any, stream: str | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.stream = stream

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return from_first(super().__call__)(*args, **kwargs)

    def read(self) -> Any:
        if self.stream is None:
            return super().read()
        from transformers import T5Config, T5EncoderModel

        with torch.device("meta"):
            model: Any = T5EncoderModel(T5Config.from_pretrained(self.folder, local_files_only=True))
        model = model.to(self.dtype)
        tied = "encoder.embed_tokens.weight"                 # shared.weight again
        missing = sorted(model.state_dict().keys() - read_headers(weight_files(self.folder)).keys() - {tied})
        require(not missing, f"the text encoder in {str(self.folder)!r} lacks {len(missing)} tensor(s), such "
                f"as {missing[:1]}: convert it again")
        fill(model, self.folder, self.device, only=lambda name: ".block." not in name)
        model.encoder.embed_tokens = model.shared
        stream_layers(model, model.encoder.block, self.folder, "encoder.block.", self.device, "disk")
        return model


def parts(stream: str | None = None) -> tuple[Callable, Callable, Callable]:
    """What magi.load is given to load a model for this rank; stream: None, "cpu" or "disk"."""
    return partial(load_dit, stream=stream), load_vae, partial(T5, stream=stream)


# ------------------------------------------------------------------------------------------------------------
# 6  Planning
# ------------------------------------------------------------------------------------------------------------
# What a rank needs, from the shapes alone. tests/test_parallel.py holds it against what is really allocated.

GIB = 2**30
T5_XXL = (4096, 24, 32128, 10240)            # width, blocks, words, feed-forward


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: int                 # of the DiT, kept all the time
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


def needs(dit: magi.DiTConfig, run: magi.SamplerConfig, vae: magi.VAEConfig = magi.VAE_PRESETS["magi"], *,
          R: int = 1, stream: bool = False, vae_bytes: int = 4, text: int | None = None, cpu: bool = False,
          t5: tuple[int, int, int, int] = T5_XXL) -> Memory:
    """Memory of a run on each of R ranks, with the torch backend. text: tokens of a caption, default: as many
    as there can be. cpu: with the copies that only the CPU needs."""
    size_of = lambda module: sum(u.numel() * u.element_size() for u in module.state_dict().values())
    with torch.device("meta"):
        model, tiler = magi.DiT(dit), magi.VAE(vae)
    layers = [size_of(layer) for layer in model.layers]
    rest = size_of(model) - sum(layers)
    pairs = [a + b for a, b in itertools.pairwise([*layers, layers[0]] if stream else layers)]
    weights = rest + (0 if stream else sum(layers) // R)
    passing = max(pairs) if stream or R > 1 else 0

    # How many chunks the plan keeps in the cache, and how many a forward holds, once the video is long.
    long = dataclasses.replace(run, num_frames=None)
    steps = list(itertools.takewhile(lambda step: step.chunks[0].chunk < 24, magi.plan(long, 40)))
    kept, cached, n = 0, set(), max(len(step.chunks) for step in steps)
    for step in steps:
        cached = {chunk for chunk in cached if chunk >= step.forget}
        cached |= {c.chunk for c in step.chunks if c.clean}
        kept = max(kept, len(cached))

    b, D, F, T = dit.torch_dtype.itemsize, dit.hidden_size, dit.ffn_size, text or dit.text_length
    A, G = dit.num_heads * dit.head_dim, dit.num_kv_heads * dit.head_dim
    H = F * (1 + dit.gated_ffn)
    s = magi.CHUNK * (run.height // 16) * (run.width // 16)                  # tokens of a chunk
    N = n * math.ceil(s / R)                                                 # of a forward on this rank
    S = min(N, SLICE)
    cache = kept * s * dit.num_layers * 2 * (G // R) * b

    joined = 2 * G * (1 + kept / n)                                          # keys and values with the cached
    talk = max(2 * (A + 2 * G), A + 2 * G + joined + A, 2 * A) if R > 1 else joined + A / n
    slices = [S * b * (D + H), S * b * (4 if dit.gated_ffn else 2) * F, S * b * (F + D)]  # of feed-forward
    small = 0
    if dit.fp8:                                                              # rounded numbers in wider types
        wide = 2 + 4 * cpu
        slices += [S * (b * D + wide * D + 4 * H) + wide * D * H, S * (b * D + 2 * D + 8 * H) + 2 * D * H,
                   S * (b * F + wide * F + 4 * D) + wide * D * F]
        small = passing and max(pairs) - max(pairs[1:-1])                    # fp8 layers: less passes
    moments = [                                                              # bytes beside x
        N * b * (D + 3 * A + 2 * G + max(2 * A, talk)) + S * 8 * A,          # attention to chunks or to text
        N * (b * 2 * A + 4 * D) + cpu * (b < 4) * (S * 8 * A + 8 * A * D),   # Wo
        N * (4 + b) * D + S * 16 * D,                                        # gated residual
        N * b * 2 * D + max(slices) - small,                                 # feed-forward
    ]
    latents = 4 * 16 * magi.CHUNK * (run.height // 8) * (run.width // 8)     # of a chunk
    others = 4 * n * latents + N * dit.head_dim * 3 // 2 + n * T * (8 * dit.text_dim + b * (D + 4 * G))
    activations = int(N * b * D + max(moments)) + others

    tile = (12, 256, 256)
    t, h, w = (min(a, of) for a, of in zip(tile, (24, run.height, run.width), strict=True))
    tokens = 1 + t // 4 * (h // 8) * (w // 8)
    block = tokens * vae_bytes * max(11 * vae.embed_dim, 4 * vae.out_features)
    second = 3 * 24 * run.height * run.width * vae_bytes                     # a chunk in pixels
    decoding = block + 3 * second
    vae_size = size_of(tiler) * vae_bytes // 4
    return Memory(weights, passing, vae_size, cache, activations, decoding, t5_bytes(t5, stream))


def t5_bytes(t5: tuple[int, int, int, int], stream: bool) -> int:
    width, blocks, words, hidden = t5
    block = 2 * (4 * width * width + 3 * width * hidden)                     # bfloat16
    return 2 * words * width + block * (2 if stream else blocks)


def fits(memory: Memory, card: float) -> bool:
    """On a card of so many GB, as cards are called; a tenth is left for CUDA and fragmentation."""
    return memory.total < 0.9 * card * GIB


CHANGES = {                      # what takes less memory, the gentlest first
    "as it is": {},
    "--stream cpu": dict(stream=True),
    "--window 1 --kv_range 2": dict(window=1, kv_ranges=(2,)),
    "--stream cpu --window 1 --kv_range 2": dict(stream=True, window=1, kv_ranges=(2,)),
    "--stream cpu --height 480 --width 832": dict(stream=True, height=480, width=832),
}


def smallest_change(dit: magi.DiTConfig, run: magi.SamplerConfig, card: float, R: int = 1
                    ) -> tuple[str, Memory]:
    """The first of CHANGES with which R cards of so many GB will do, or "nothing here", and what it takes."""
    for name, change in CHANGES.items():
        settings = {k: v for k, v in change.items() if k != "stream"}
        memory = needs(dit, dataclasses.replace(run, **settings), R=R, stream="stream" in change)
        if fits(memory, card):
            return name, memory
    return "nothing here", memory


def plan(dit: magi.DiTConfig, run: magi.SamplerConfig, cards: Sequence[float] = (12, 24, 80)) -> str:
    """What a run takes, in ways to run it, and what makes it fit: the text of sample.py --plan."""
    parts = [field.name for field in dataclasses.fields(Memory)]
    lines = [f"GiB on each GPU, {run.height}x{run.width}, window {run.window} (T5 comes first and goes):",
             " ".join(["processes  stream", *(f"{part:>11}" for part in [*parts, "total"])])]
    counts = [r for r in (1, 2, 4, 8) if dit.num_kv_heads % r == 0]
    for R, stream in [(1, False), (1, True), *((r, False) for r in counts[1:])]:
        memory = needs(dit, run, R=R, stream=stream)
        values = [getattr(memory, part) / GIB for part in parts] + [memory.total / GIB]
        lines.append(" ".join([f"{R:9}  {'cpu' if stream else '-':>6}", *(f"{v:11.2f}" for v in values)]))
    lines.append(f"\nA card of    {'one':40}eight (torchrun --nproc_per_node 8 sample.py ...)")
    for card in cards:
        ways = [smallest_change(dit, run, card, R)[0] for R in (1, 8) if R in counts]
        lines.append(f"{card:6} GB    " + "".join(f"{way:40}" for way in ways).rstrip())
    return "\n".join(lines)
