"""What the processes of tests/test_parallel.py do.

cases    groups of 2 and of 4 processes: every run of CASES and more; what came out and what it took ->
         FOLDER/cases.RANKS.RANK.pt
forever  processes of sample.py that make FOLDER/forever.mp4 without end; what they say -> FOLDER/said.RANK

They are forks of the process that runs the tests, which has imported what takes seconds.
"""

import dataclasses
import multiprocessing
import sys
import unittest.mock
import weakref
from collections.abc import Callable
from pathlib import Path

import common
import torch
import torch.distributed as dist
from common import write_folder
from torch.utils._python_dispatch import TorchDispatchMode

import magi
import parallel
import planner
import sample
import training

SMALL = dataclasses.replace(common.SMALL, num_layers=3, num_heads=8, num_kv_heads=4)
WIDE = dict(gated_ffn=True, in_channels=32, out_channels=32, x_scale=0.1)
MIDDLE = dataclasses.replace(
    SMALL, hidden_size=384, num_heads=6, num_kv_heads=2, head_dim=64, ffn_size=1536, text_dim=64,
    text_length=40, null_length=8,
)  # fmt: skip
MODELS = {
    "base": SMALL,
    "three": dataclasses.replace(SMALL, num_heads=3, num_kv_heads=3),
    "wide": dataclasses.replace(SMALL, **WIDE),
    "fp8": dataclasses.replace(SMALL, num_layers=4, dtype="bfloat16", fp8=True),
    "middle": MIDDLE,
    "middle_fp8": dataclasses.replace(MIDDLE, dtype="bfloat16", fp8=True, gated_ffn=True),
}  # fmt: skip
MEASURED = ("base", "middle", "middle_fp8")
BY_TWO = ("base", "middle_fp8")  # what one process shows of "middle" needs no second look
VAE = magi.VAEConfig(video_size=32, video_length=8, embed_dim=64, depth=1, num_heads=2, use_final_proj=True)

RUN = magi.SamplerConfig(num_steps=4, num_frames=48, height=32, width=32, special_tokens=())
UNEVEN = dict(height=48, width=80)  # 15 patches a frame, 90 tokens a chunk: 22.5 a rank of 4
ALONE = dict(window=1, num_steps=2, kv_ranges=(5, 4))  # one chunk in flight, clean after two steps
CASES = {                                     # name: model, frames of prefix in the latents, settings
    "t2v": ("base", 0, {}),
    "t2v, window 1, uneven": ("base", 0, ALONE | UNEVEN),
    "i2v": ("base", 1, {}),
    "v2v": ("wide", 9, UNEVEN),
    "v2v, window 1": ("base", 13, ALONE),
    "distilled": ("wide", 0, dict(distilled=True) | UNEVEN),
    "distilled, window 1": ("base", 0, ALONE | dict(distilled=True)),
    "fp8": ("fp8", 0, dict(distilled=True) | UNEVEN),
    "LoRA": ("base", 0, {}),
    "fp8, LoRA": ("fp8", 0, {}),
}  # fmt: skip
# enough for 4 ranks: each kind of model, prefix and LoRA
OF_FOUR = ["i2v", "LoRA"] + [name for name, (_, _, settings) in CASES.items() if "height" in settings]
BIG = magi.SamplerConfig(
    num_steps=2, window=2, kv_ranges=(3,), num_frames=96, height=96, width=128, special_tokens=(),
    distilled=True,
)  # fmt: skip


def write_models(folder: Path) -> None:
    for name, cfg in MODELS.items():
        torch.manual_seed(1)
        dit = magi.DiT(cfg)
        for u in dit.state_dict().values():
            if u.dtype == torch.float8_e4m3fn:
                u.copy_((torch.randn(u.shape) * 60).to(u.dtype))
            elif u.is_floating_point() and u.dim() > 0:
                u.add_(0.05 * torch.rand(u.shape).to(u.dtype))
        write_folder(folder / name, dit, dit=cfg, sampler=RUN)
        training.add_lora(dit, 2)
        for lora in training.loras(dit):
            torch.nn.init.normal_(lora.up, std=0.1)
        training.save_lora(dit, folder / f"{name}.lora.safetensors")
    torch.manual_seed(2)
    write_folder(folder / "vae", magi.VAE(VAE), vae=VAE)


def drawn(cfg: magi.DiTConfig, prefix: int, run: magi.SamplerConfig) -> dict:
    generator = torch.Generator().manual_seed(3)
    text = torch.randn(cfg.text_length, cfg.text_dim, generator=generator)
    given = torch.randn(16, prefix, run.height // 8, run.width // 8, generator=generator)
    return dict(text=text, text_mask=(torch.arange(len(text)) < 7).long(), sampler=run,
                prefix=given if prefix else None)  # fmt: skip


def run_case(folder: Path, name: str, stream: str | None = None, copied: bool = False) -> torch.Tensor:
    """copied: the layers' weights lie in memory of their own, as streamed ones do, not in a mapped file,
    whose alignment is another: a product of few rows rounds by it."""
    model, prefix, settings = CASES[name]
    dit = parallel.load_dit(folder / model, stream=stream)
    if copied:
        dit.layers.load_state_dict({k: u.clone() for k, u in dit.layers.state_dict().items()}, assign=True)
    if "LoRA" in name:
        training.load_lora(dit, folder / f"{model}.lora.safetensors", 0.7)
    run = dataclasses.replace(RUN, **settings)
    with torch.inference_mode():
        chunks = [u for _, u in magi.sample(dit, **drawn(dit.cfg, prefix, run))]
    return torch.cat(chunks, dim=1).clone()


def tiles(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """A video encoded and decoded in 12 tiles a piece, those at the edges smaller."""
    vae = parallel.load_vae(folder / "vae")
    video = torch.randn(1, 3, 8, 72, 88, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        latent = vae.encode(video, tile=(4, 32, 32))
        return latent.clone(), vae.decode(latent, tile=(4, 32, 32)).clone()


class Allocations(TorchDispatchMode):
    """The most bytes of tensors that lived at one time: those made in a `with` block, and given ones."""

    def __init__(self):
        super().__init__()
        self.live, self.sizes, self.peak = {}, {}, 0

    def watch(self, tensor: torch.Tensor) -> bool:
        """Is it new?"""
        storage = tensor.untyped_storage()
        key = storage._cdata  # its address: used again when it is gone
        if key in self.live:
            return False

        def gone(_: weakref.ref) -> None:
            self.live.pop(key, None)
            self.sizes.pop(key, None)

        self.live[key], self.sizes[key] = weakref.ref(storage, gone), storage.nbytes()
        return True

    def resize(self, storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        """In the place of UntypedStorage.resize_, by which FSDP lets its buffers grow and shrink."""
        resized = torch._C.StorageBase.resize_(storage, size)
        if storage._cdata in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
        return resized

    def now(self) -> int:
        return sum(self.sizes.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, list | tuple) else [out]
        new = [self.watch(u) for u in tensors if isinstance(u, torch.Tensor) and u.device.type != "meta"]
        if any(new):
            self.peak = max(self.peak, self.now())
        return out


def watched_reader(see: Callable[[int, dict], None]) -> Callable:
    """What can stand for Streamed.read: it calls see(i, weights) after each layer, too."""
    read = parallel.Streamed.read

    def watched(self, i):
        weights = read(self, i)
        see(i, weights)
        return weights

    return watched


def watch_layers(monkeypatch) -> list[tuple[int, int]]:
    """-> for each layer that is read from now on: its index, and how many are held with it."""
    seen, storages = [], []

    def see(i: int, weights: dict) -> None:
        storages.append(weakref.ref(weights["attn.q.weight"].untyped_storage()))
        seen.append((i, sum(ref() is not None for ref in storages)))

    monkeypatch.setattr(parallel.Streamed, "read", watched_reader(see))
    return seen


def measure(folder: Path, model: str, stream: str | None = None) -> dict:
    """What a long run takes, and what was foretold."""
    parallel.SLICE = 512
    seen = Allocations()

    def see(i: int, weights: dict) -> None:  # a thread has read them, whose operations nobody watches
        for u in weights.values():
            seen.watch(u)

    reads = unittest.mock.patch.object(parallel.Streamed, "read", watched_reader(see))
    # a function, since a class binds no method of another object
    resizes = unittest.mock.patch.object(torch.UntypedStorage, "resize_", lambda *args: seen.resize(*args))
    with reads, resizes, torch.no_grad():
        dit = parallel.load_dit(folder / model, stream=stream)
        for u in (*dit.parameters(), *dit.buffers()):
            seen.watch(u.detach().to_local() if hasattr(u, "to_local") else u.detach())
        weights, cache = seen.now(), []
        given = drawn(dit.cfg, 0, BIG) | dict(text_mask=torch.ones(dit.cfg.text_length, dtype=torch.long))
        with seen:
            run = magi.sample(dit, **given, progress=lambda p: cache.append(p.cache_bytes))
            for _ in range(3):  # then a forward has been as large as they get
                next(run)
    plan = planner.needs(dit.cfg, BIG, R=parallel.ranks(), stream=bool(stream))
    return dict(weights=weights, cache=max(cache), all=seen.peak, plan=dataclasses.asdict(plan))


def fails_on_last(rank: int, size: int) -> None:
    if rank == size - 1:
        raise ValueError("no such device")


def refusal(call) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "not refused"


class FirstEncodes(parallel.T5):
    """T5 is not read: what it is asked for is kept."""

    def __init__(self):
        self.asked, self.keep = [], False


def encode(self, captions) -> torch.Tensor:
    self.asked.append(captions)
    return torch.ones(3)


def cases(rank: int, size: int, folder: Path) -> None:
    join(rank, size, folder)
    out = {name: run_case(folder, name) for name in (CASES if size == 2 else OF_FOUR)}
    out["tiles"] = tiles(folder)
    magi.T5.__call__ = encode
    t5 = FirstEncodes()
    out["text"], out["asked"] = t5("a ball"), t5.asked
    if size == 2:
        out["memory"] = {name: measure(folder, name) for name in BY_TWO}
    out["streamed"] = run_case(folder, "v2v", "disk")
    out["errors"] = [refusal(lambda: parallel.load_dit(folder / "three"))]
    out["errors"] += [refusal(lambda: parallel.agreed(fails_on_last)(rank, size))]
    torch.save(out, folder / f"cases.{size}.{rank}.pt")
    dist.destroy_process_group()


def forever(rank: int, size: int, folder: Path) -> None:
    sys.stderr = (folder / f"said.{rank}").open("w")
    join(rank, size, folder)
    flags = f"--num_frames inf --device cpu --model {folder}/base --text {folder}/text.safetensors"
    sys.exit(sample.main([*flags.split(), "--out", f"{folder}/forever.mp4"]))


def join(rank: int, size: int, folder: Path) -> None:
    """The processes of a group meet at a file, which each of them takes from `fork`."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)


def fork(job, size: int, folder: Path) -> list[multiprocessing.Process]:
    import torch._dynamo  # noqa: F401  (this and the next take each process a second otherwise)
    import torch.distributed.fsdp  # noqa: F401

    (folder / "store").unlink(missing_ok=True)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=job, args=(rank, size, folder), daemon=True) for rank in range(size)]
    for process in processes:
        process.start()
    return processes
