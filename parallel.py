"""One video on several GPUs, or on a GPU that is too small for its model. magi.py knows nothing of it: all of
this hangs on its modules from outside, and the results are the same.

    torchrun --nproc_per_node 8 sample.py --model models/24B-base ...       the same flags as without torchrun
    python sample.py --model models/24B-base --stream cpu ...               or: --stream disk

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

Streaming: one layer computes while a thread brings the next; two are held. All branches of a step (text,
previous, nothing) go through a layer while it is there, so a step reads the weights once.

Measured on CPUs, with random weights of the released sizes, one chunk (CUDA has not been tried yet):

    4.5B base, 2 processes     64x64: 4.21 of 8.35 GiB of weights each, peak 6.5 GiB; in a step (2 forwards)
                               39 CPU s on each, which sends 27 MB of tokens and heads, and 8.9 GB of weights
    24B fp8, from disk         32x32: peak 3.5 GiB with the VAE; a step (1 forward) reads 24.5 GiB of layers,
                               more than that machine's memory, and takes 172 CPU s: fp8 numbers are widened

Contents: 1 Ranks, 2 Tokens and heads, 3 Weights, 4 Slices, 5 Loading. planner.py says what fits where, and
finetune.py trains with the ranks and weights of sections 1 and 3. Left out on purpose: where weights are
shared among ranks, one gathering for all branches of a step, since FSDP's hooks gather and free a layer at
each of its calls.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from einops import rearrange
from safetensors import safe_open
from torch import Tensor, nn

import magi
from checkpoints import fill, read_headers, require, weight_files

# ------------------------------------------------------------------------------------------------------------
# 1  Ranks
# ------------------------------------------------------------------------------------------------------------


def has_company() -> bool:
    """Has torchrun started this process beside others? Its environment tells."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")


def start(device: str | None = None) -> str | None:
    """Join the other processes, if torchrun has started some. device: what was asked for, or None; returns
    this process's own. ValueError if it has none."""
    if not has_company() or dist.is_initialized():
        return device
    names = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = ", ".join(name for name in names if name not in os.environ)
    require(not missing, f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but not set: {missing}; start with "
            f"torchrun, or unset WORLD_SIZE to run one process")
    require(device in (None, "cpu", "cuda"), f"device {device!r}: each process takes a GPU of its own, "
            f"so say cuda")
    if device == "cuda" or device is None and torch.cuda.is_available():
        gpu = int(os.environ["LOCAL_RANK"])
        require(gpu < torch.cuda.device_count(),
                f"there are {torch.cuda.device_count()} GPUs here: start that many processes at most")
        torch.cuda.set_device(gpu)
        device = f"cuda:{gpu}"
    # gloo for CPUs, and NCCL for GPUs; the first process may look at clips for hours while the others wait
    dist.init_process_group(timeout=timedelta(days=1))
    return device


def leave(code: int) -> NoReturn:
    """End this process, as sys.exit does; one of several ends at once, since the threads of its process group
    may still free tensors, which is fatal (SIGABRT) while the interpreter shuts down."""
    if ranks() > 1:
        if code and rank() > 0:
            time.sleep(1)                                    # torchrun ends all with one: rank 0 must speak
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def agreed(make: Callable[..., Any]) -> Callable[..., Any]:
    """The same function on every rank; where it fails on one, it fails on all, with the same error."""
    def run(*args: Any, **kwargs: Any) -> Any:
        made = error = None
        try:
            made = make(*args, **kwargs)
        except (ValueError, OSError, ImportError) as e:
            error = e
        errors: list = [error] * ranks()
        if ranks() > 1:
            dist.all_gather_object(errors, error)
        for i, e in enumerate(errors):
            if e is not None:
                raise e if i == 0 else ValueError(f"process {i} of {ranks()}: {e}")
        return made

    return run


def from_first(make: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, but the first rank alone runs it, and sends what it made, or its error."""
    def run(*args: Any, **kwargs: Any) -> Any:
        made = [agreed(lambda: make(*args, **kwargs) if rank() == 0 else None)()]
        if ranks() > 1:
            dist.broadcast_object_list(made)
        return made[0]

    return run


@contextlib.contextmanager
def first_speaks() -> Iterator[None]:
    """What other ranks than the first print within this block goes nowhere."""
    if rank() == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), \
            contextlib.redirect_stderr(nowhere):
        yield


def lost_another(error: BaseException) -> bool:
    """Did this fail because another process is gone?"""
    return ranks() > 1 and (isinstance(error, dist.DistError) or "peer" in str(error))


def first_to_tell() -> bool:
    """Is this the first process to ask? It says for all what went wrong: that another is gone, for example,
    which may be rank 0."""
    if not dist.is_initialized():
        return True
    try:
        return dist.distributed_c10d._get_default_store().add("told", 1) == 1
    except dist.DistError:                                   # what they share was in that other process
        return True


# ------------------------------------------------------------------------------------------------------------
# 2  Tokens and heads
# ------------------------------------------------------------------------------------------------------------
# DeepSpeed-Ulysses (Jacobs et al. 2023), with one turn: a rank has its share of every chunk, not of the
# sequence. So gates, texts, norms and linears, which know chunks but no neighbours, run on a share unchanged,
# and each chunk is equal work for all. Where the tokens do not divide, the last ranks' shares end in zeros.


def exchange(u: Tensor, split: int, join: int) -> Tensor:
    """Split along one axis, a part for each rank; what comes from each of them is joined along another."""
    parts = torch.stack(u.chunk(ranks(), split))
    got = torch.empty_like(parts)
    dist.all_to_all_single(got, parts)
    del parts                                                # here a layer holds the most
    return torch.cat(list(got), join)


def check_heads(cfg: magi.DiTConfig) -> None:
    """ValueError if the ranks cannot share the heads."""
    Hkv, R = cfg.num_kv_heads, ranks()
    counts = " or ".join(str(r) for r in range(1, Hkv + 1) if Hkv % r == 0)
    require(Hkv % R == 0, f"{R} processes cannot share {Hkv} key/value heads: start {counts}")


class Share:
    """Shares a DiT's tokens among the ranks. s: tokens of a chunk, of which a forward has n; s': these and as
    many zeros as it takes for R to divide them."""

    def __init__(self, dit: magi.DiT):
        check_heads(dit.cfg)
        self.patchify, self.patch, self.s = dit.patchify, dit.cfg.patch_size, 0
        dit.patchify = self.first_tokens
        dit.layers[0].register_forward_pre_hook(self.first_angles)
        for layer in dit.layers:
            layer.attn.core.forward = partial(self.attend, layer.attn.core.forward)
        dit.final_linear.register_forward_hook(self.gather)

    def filled(self, u: Tensor) -> Tensor:
        """All tokens (B, n s, ...) -> (B, n, s', ...)."""
        u = u.unflatten(1, (-1, self.s))
        zeros = u.new_zeros(*u.shape[:2], -self.s % ranks(), *u.shape[3:])
        return torch.cat([u, zeros], dim=2)

    def whole(self, u: Tensor) -> Tensor:
        """The way back."""
        return u[:, :, : self.s].flatten(1, 2)

    def mine(self, u: Tensor) -> Tensor:
        """All tokens (B, n s, ...) -> this rank's (B, n s'/R, ...)."""
        return self.filled(u).chunk(ranks(), dim=2)[rank()].flatten(1, 2)

    def first_tokens(self, x: Tensor) -> Tensor:
        """In the place of DiT.patchify, which is given this rank's patches alone, as frames of one patch."""
        patches = rearrange(x, "b c t (h p) (w q) -> b (t h w) c p q", p=self.patch, q=self.patch)
        self.s = patches.shape[1] * magi.CHUNK // x.shape[2]
        return self.patchify(self.mine(patches).transpose(1, 2))

    def first_angles(self, layer: nn.Module, args: tuple) -> None:
        ctx = args[1]
        ctx.angles = self.mine(ctx.angles[None])[0]

    def attend(self, core: Callable, q: Tensor, k: Tensor, v: Tensor, ctx: magi.Context, out: Tensor) -> None:
        """In the place of CachedAttention.forward, which gets all tokens of this rank's heads."""
        n, R = len(ctx.chunks), ranks()
        # What goes to one rank lies side by side, so that q, k and v take one exchange.
        parts = [u.unflatten(1, (n, -1)).unflatten(3, (R, -1)) for u in (q, k, v)]
        heads = torch.cat(parts, dim=4).flatten(3, 4)                        # (B, n, s'/R, Hq + 2 Hkv, hd)
        heads = self.whole(exchange(heads, split=3, join=2))                 # (B, n s, Hq/R + 2 Hkv/R, hd)
        qkv = heads.split([u.shape[2] // R for u in (q, k, v)], dim=2)
        result = self.filled(core(*qkv, ctx))                                # (B, n, s', Hq/R, hd)
        del heads, qkv
        out.copy_(exchange(result, split=2, join=3).flatten(1, 2))

    def gather(self, linear: nn.Module, args: tuple, share: Tensor) -> Tensor:
        """This rank's velocities (B, n s'/R, ...) -> all (B, n s, ...)."""
        share = share.unflatten(1, (-1, math.ceil(self.s / ranks())))
        return self.whole(exchange(share.repeat(ranks(), 1, 1, 1), split=0, join=2))


def deal(device: str, fn: Callable, windows: Sequence) -> Iterator[Tensor]:
    """In the place of `map` for the tiles of a VAE: dealt out in rounds; each rank gets all of them."""
    for first in range(0, len(windows), ranks()):
        mine = first + rank()
        tiles: list = [None] * ranks()
        dist.all_gather_object(tiles, fn(windows[mine]).cpu() if mine < len(windows) else None)
        yield from (tile.to(device) for tile in tiles if tile is not None)


# ------------------------------------------------------------------------------------------------------------
# 3  Weights
# ------------------------------------------------------------------------------------------------------------


def shard_layers(dit: magi.DiT, folder: str | Path, device: str) -> None:
    """Load a layer, keep 1/R of each of its weights, load the next: no rank ever holds all of them.

    PyTorch's FSDP puts a layer together before its turn and frees it after; in training it averages the
    gradients. It trains one type of weights in a layer, so the few in float32 of a layer in bf16 stay whole,
    like a LoRA, which is added later: the gradients of these are averaged by training.finish_gradients.
    The DiT itself is registered with none of its own weights (the sampler reads null_text outside of its
    forward), since a common root lets the next layer come while one computes.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor

    mesh = dist.init_device_mesh(torch.device(device).type, (ranks(),))
    shard = partial(fully_shard, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    is_mixed = dit.cfg.torch_dtype != torch.float32
    fill(dit, folder, device, only=lambda name: not name.startswith("layers."))
    for i, layer in enumerate(dit.layers):
        fill(dit, folder, device, only=methodcaller("startswith", f"layers.{i}."))
        shard(layer, ignored_params={p for p in layer.parameters() if is_mixed and p.dtype == torch.float32})
    shard(dit, ignored_params={p for p in dit.parameters() if not isinstance(p, DTensor)})


class Streamed:
    """Layers whose weights come for their turn. `name` is their list in the model, of which all else is
    loaded and stays.

    source: "disk", the files of the folder, or "cpu": they are read once and kept there, pinned for a GPU.
    (PyTorch rounds what it pins up to a power of two: 71 GB for the 24B in bf16.) A layer keeps its weights
    until the turn of another one: so all branches of a step can pass through it (`side_by_side`), and a
    backward finds the last layer still there.
    """

    def __init__(self, model: nn.Module, name: str, folder: str | Path, device: str, source: str):
        require(source in ("cpu", "disk"), f"stream {source!r} is not 'cpu' or 'disk'")
        self.layers: Any = model.get_submodule(name)
        self.prefix, self.device = f"{name}.", device
        fill(model, folder, device, only=lambda key: not key.startswith(self.prefix))
        # What stands for a weight that is not there has its shape, type and device, and no memory: a LoRA
        # that is added later finds what it needs to know.
        self.nothing = [{key: torch.zeros(1, dtype=u.dtype, device=device).expand(u.shape)
                         for key, u in layer.state_dict().items()} for layer in self.layers]
        self.files = {key: file for file in weight_files(folder) for key in safe_open(file, "pt").keys()}
        self.here = -1                                       # the layer that has its weights; -1: none
        self.thread = ThreadPoolExecutor(1)
        self.coming: dict[int, Future] = {}                  # the weights of the layer that is foreseen next
        gpu = torch.device(device).type == "cuda"
        self.copying = torch.cuda.Stream(device) if gpu else None            # beside the one that computes
        if source == "cpu":
            keep = Tensor.pin_memory if gpu else Tensor.contiguous
            kept = [{key: keep(u) for key, u in self.read(i).items()} for i in range(len(self.layers))]
            self.read = kept.__getitem__
        for i, layer in enumerate(self.layers):
            self.put(i, self.nothing[i])
            layer.forward = partial(self.turn, i, layer.forward)

    def read(self, i: int) -> dict[str, Tensor]:
        """The weights of layer i by their names within it, in memory of their own."""
        weights = {}
        for key, like in self.nothing[i].items():
            name = f"{self.prefix}{i}.{key}"
            with safe_open(self.files[name], "pt") as f:     # opened anew: its pages are let go after
                weights[key] = f.get_tensor(name).to(like.dtype, copy=True)
        return weights

    def bring(self, i: int) -> dict[str, Tensor]:
        with torch.cuda.stream(self.copying):
            return {key: u.to(self.device) for key, u in self.read(i).items()}

    def put(self, i: int, weights: dict[str, Tensor]) -> None:
        self.layers[i].load_state_dict(weights, strict=False, assign=True)   # not strict: it may have a LoRA

    def turn(self, i: int, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        """In the place of a layer's forward. (A hook would not be called when a checkpointed layer is
        computed again.)"""
        if i == self.here:                                   # another branch has just been here
            return forward(*args, **kwargs)
        if i not in self.coming:
            self.coming = {i: self.thread.submit(self.bring, i)}
        weights = self.coming.pop(i).result()
        before, self.here = self.here, -1                    # interrupted from here on, none counts as there
        if self.copying is not None:                         # the thread will use the layer's memory again
            torch.cuda.current_stream(self.device).synchronize()             # so it must be computed by now
        if before >= 0:
            self.put(before, self.nothing[before])
        self.put(i, weights)
        following = self.after(before, i)
        self.coming = {following: self.thread.submit(self.bring, following)}
        self.here = i
        return forward(*args, **kwargs)

    def after(self, before: int, i: int) -> int:
        """The layer whose turn comes after those of layers `before` and i. A forward goes up and the next one
        begins with layer 0; the backward, where checkpointed layers are computed again, goes down from the
        last one."""
        is_last = i == len(self.layers) - 1
        goes_down = 0 < i < before or is_last and torch.is_grad_enabled()
        return (i - 1 if goes_down else i + 1) % len(self.layers)


def side_by_side(dit: magi.DiT, calls: Sequence[tuple[tuple, dict]]) -> list[Tensor]:
    """In the place of DiT.forward_all: all calls go through one layer, then all through the next, so that
    each layer is brought once. (Within a layer they keep their order: keys are read before they are added
    to.)"""
    tokens, contexts = zip(*(dit.begin(*inputs, **settings) for inputs, settings in calls), strict=True)
    for layer in dit.layers:
        tokens = [layer(one, ctx) for one, ctx in zip(tokens, contexts, strict=True)]
    sizes = [inputs[0].shape[2:4] for inputs, _ in calls]                    # T, H
    return [dit.unpatchify(one, *size) for one, size in zip(tokens, sizes, strict=True)]


# ------------------------------------------------------------------------------------------------------------
# 4  Slices
# ------------------------------------------------------------------------------------------------------------
# The widest tensors of a layer live within one operation: the feed-forward's middle, and float32 copies in
# the torch backend. Each token is on its own there, so they are computed for a slice of tokens at a time.

SLICE = 4096                     # tokens: enough to keep a GPU busy


def in_slices(fn: Callable, *tensors: Tensor) -> Tensor:
    """fn of tensors (rows, tokens, ...), at most SLICE of their tokens at a time. Each result goes to its
    place at once: joined in the end, all would be there twice."""
    rows, tokens = tensors[0].shape[:2]
    size = max(1, SLICE // rows)
    if tokens <= size:
        return fn(*tensors)
    out: Any = None
    for first in range(0, tokens, size):
        part = slice(first, first + size)
        result = fn(*(u[:, part] for u in tensors))
        if out is None:
            out = result.new_empty(rows, tokens, *result.shape[2:])
        out[:, part] = result
    return out


def sliced(fn: Callable) -> Callable:
    """A function of tokens, and of more that is the same for all of them."""
    return lambda x, *rest: in_slices(lambda some: fn(some, *rest), x)


def slice_widest(dit: magi.DiT) -> magi.DiT:
    """Compute what is widest in slices of tokens. (The operations of kernels.py make no wide copies.)"""
    ops = dit.ops

    def norm_rotary(x, norm, angles):
        if angles is None:
            return in_slices(lambda x: ops.norm_rotary(x, norm, None), x)
        return in_slices(lambda x, angles: ops.norm_rotary(x, norm, angles[0]), x, angles[None])

    def gated_residual(x, gate, update, norm):
        chunks = lambda u: u.unflatten(1, (gate.shape[1], -1)).flatten(0, 1)             # (B n, s, D)
        gates = chunks(gate)                                                             # (B n, 1, D)
        add = lambda x, update: ops.gated_residual(x, gates, update, norm)
        return in_slices(add, chunks(x), chunks(update)).view_as(x)

    if ops.name == "torch":
        dit.ops = dataclasses.replace(
            ops, norm_rotary=norm_rotary, gated_residual=gated_residual,
            matmul_float32=sliced(ops.matmul_float32), fp8_matmul=sliced(ops.fp8_matmul))
    for layer in dit.layers:
        layer.ffn.forward = sliced(layer.ffn.forward)
    return dit


# ------------------------------------------------------------------------------------------------------------
# 5  Loading
# ------------------------------------------------------------------------------------------------------------


def load_dit(folder: str | Path, device: str = "cpu", dtype: str | None = None, backend: str = "torch",
             stream: str | None = None, to_train: bool = False) -> magi.DiT:
    """magi.load_dit with this rank's share of the weights, or with none of the layers' (stream). What is not
    in a layer is small, and every rank has all of it. Unless the model is to be trained, the rank has a share
    of the tokens, too, and takes them in slices."""
    def read(dit: magi.DiT, *where: Any) -> None:
        if ranks() > 1 and not to_train:
            Share(dit)
        if stream:
            dit.streamed = Streamed(dit, "layers", *where, stream)
            dit.forward_all = partial(side_by_side, dit)
        elif ranks() > 1:
            shard_layers(dit, *where)
        else:
            fill(dit, *where)

    dit = magi.load_dit(folder, device, dtype, backend, read)
    return dit if to_train else slice_widest(dit)


def load_vae(folder: str | Path, device: str = "cpu", *args: Any, **kwargs: Any) -> magi.VAE:
    """magi.load_vae, whose tiles are dealt out to the ranks."""
    vae = magi.load_vae(folder, device, *args, **kwargs)
    if ranks() > 1:
        vae.map_tiles = partial(deal, device)
    return vae


class T5(magi.T5):
    """T5 on rank 0, which encodes for all; stream: its blocks come one by one from its files."""

    def __init__(self, *args: Any, stream: str | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.stream = stream

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        text = from_first(super().__call__)(*args, **kwargs)
        if not self.keep:                                    # else each prompt told later waits for this
            gc.collect()                                     # streamed blocks and Streamed hold each other
        return text

    def read(self) -> Any:
        if self.stream is None:
            return super().read()
        model = self.make()
        self.refuse_without(model.state_dict().keys() - read_headers(weight_files(self.folder)).keys())
        Streamed(model, "encoder.block", self.folder, str(self.device), "disk")
        return model


def parts(stream: str | None = None) -> tuple[Callable, Callable, Callable]:
    """What magi.load is given to load a model for this rank; stream: None, "cpu" or "disk"."""
    return partial(load_dit, stream=stream), load_vae, partial(T5, stream=stream)
