"""Model folders, and one clear line for whatever is wrong: faults, configs, special tokens, weights, machine.

Everything here works on headers until `fill` is called, so a wrong file is refused before any weight is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib.metadata
import importlib.util
import itertools
import json
import math
import operator
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


# ----------------------------------------------------------------------------------------------------- faults


class Refused(ValueError):
    """A ValueError of ours: it says what is wrong and what to do, which those of libraries may not."""


def require(ok: Any, message: str) -> None:
    """Raise Refused(message) unless ok: for what a user gave. An assert is for our own mistakes."""
    if not ok:
        raise Refused(message)


class KernelError(RuntimeError):
    """A kernel is wrong or fails, and no other may take its place: it says which, and what to do."""


@contextlib.contextmanager
def short_warnings(say: Callable[[str], Any]) -> Iterator[None]:
    """In a command line, a warning is one line, without the line of source that Python adds."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: say(" ".join(f"warning: {message}".split()))
        yield


def out_of_memory(error: BaseException) -> bool:
    """Too little memory, by whatever names the libraries have for it; "illegal memory access" is none."""
    says_so = re.search("out of memory|not enough memory|(can't|cannot) allocate memory", str(error), re.I)
    return (isinstance(error, MemoryError | torch.OutOfMemoryError)
            or isinstance(error, RuntimeError) and bool(says_so))


@contextlib.contextmanager
def reading(what: str, path: str | Path) -> Iterator[None]:
    """Every library fails in its own way on a damaged file: make it one ValueError that names the file.

    Running out of memory passes through, and an error of the disk is not blamed on the file.
    """
    require(os.path.exists(path), f"{what} {str(path)!r} does not exist: check the path")
    try:
        if os.path.isfile(path):
            with open(path, "rb") as file:                     # safetensors hides "permission denied"
                start = file.read(24)
            require(start != b"version https://git-lfs.", "it is what git leaves in place of a large file: "
                    "run git lfs pull")
        yield
    except Exception as error:
        if out_of_memory(error):
            raise
        cause = f", damaged or of another kind: {type(error).__name__}: {error}"
        if isinstance(error, OSError) and error.errno in errno.errorcode:
            cause = f", {error.strerror}"                          # the disk's fault
        if isinstance(error, Refused):
            cause = f": {error}"
        raise Refused(f"cannot read {what} {str(path)!r}{cause}") from error


def beside(folder: str | Path, name: str) -> Path:
    """The neighbour of that name of a folder, which may be "." or end with ".."."""
    folder = Path(folder)
    if folder.name in ("", ".."):
        folder = Path(os.path.abspath(folder))
    return folder.parent / name


def read_json(path: str | Path, what: str = "config") -> Any:
    """A JSON file; json.loads finds a byte-order mark by itself when it is given bytes."""
    with reading(what, path):
        return json.loads(Path(path).read_bytes())


# ---------------------------------------------------------------------------------------------------- configs


def read_config(folder: str | Path, part: str, kind: type) -> Any:
    """One dataclass of a folder's config.json. Raises ValueError if the file or a key is not as expected."""
    file = Path(folder) / "config.json"
    require(file.is_file() or part != "vae",
            f"no VAE in {str(folder)!r}: {file} does not exist; give the right folder (--vae)")
    require(file.is_file(), f"no model in {str(folder)!r}: {file} does not exist; give a folder that "
            f"convert_weights.py or tiny/train.py has written (the small models are in the clone, not in an "
            f"installed copy: use pip install -e)")
    values = read_json(file)
    require(isinstance(values, dict) and isinstance(values.get(part), dict),
            f"{file} is not a config with a valid {part!r} part: convert the model again")
    try:
        return make_config(kind, values[part])
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{file} is not a config with a valid {part!r} part: {error}") from None


def make_config(kind: type, values: dict) -> Any:
    """A dataclass from JSON's types: lists become tuples, whole numbers floats where the field is one."""
    made = {}
    for name, value in values.items():
        want = type(getattr(kind, name))                 # of the default: dataclasses keep it on the class
        value = float(value) if want is float and type(value) is int else _tuples(value)
        require(type(value) is want or (name, value) == ("num_frames", None),
                f"{name} is {value!r}: it must be of type {want.__name__}")
        made[name] = value
    return kind(**made)


def _tuples(v: Any) -> Any:
    return tuple(_tuples(u) for u in v) if isinstance(v, list) else v


# What a config must fulfil: magi.VAEConfig, DiTConfig and SamplerConfig check themselves when they are made.


def check_vae_config(cfg: Any) -> None:
    require(cfg.video_size % cfg.patch_size == 0 and cfg.video_length % cfg.patch_length == 0,
            f"video_size {cfg.video_size} and video_length {cfg.video_length} must be multiples of "
            f"the patch ({cfg.patch_length} frames, {cfg.patch_size} px)")
    require(cfg.embed_dim % cfg.num_heads == 0,
            f"embed_dim {cfg.embed_dim} must be a multiple of num_heads {cfg.num_heads}")
    require(cfg.use_final_proj or cfg.embed_dim % math.prod(cfg.patch) == 0,
            f"embed_dim {cfg.embed_dim} must be a multiple of {math.prod(cfg.patch)}, "
            f"or set use_final_proj")


def check_dit_config(cfg: Any) -> None:
    require(cfg.dtype in ("float32", "bfloat16", "float16"),
            f"dtype {cfg.dtype!r} is not one of 'float32', 'bfloat16', 'float16'")
    require(cfg.num_heads % cfg.num_kv_heads == 0,
            f"num_heads {cfg.num_heads} must be a multiple of num_kv_heads {cfg.num_kv_heads}")
    require(cfg.head_dim % 8 == 0, f"head_dim {cfg.head_dim} must be a multiple of 8 (rotary bands)")
    require(cfg.num_heads * cfg.head_dim % 8 == 0 and cfg.hidden_size % 4 == 0,
            f"num_heads * head_dim must be a multiple of 8 (convert_weights.py permutes Wo in eighths) "
            f"and hidden_size ({cfg.hidden_size}) of 4")
    for name in ("in_channels", "out_channels"):
        require(getattr(cfg, name) in (cfg.latent_channels, 2 * cfg.latent_channels),
                f"{name} {getattr(cfg, name)} must be latent_channels ({cfg.latent_channels}) "
                f"or twice that")
    require(2 <= cfg.null_length <= cfg.text_length,
            f"null_length {cfg.null_length} must be in [2, {cfg.text_length}]")


def check_sampler_config(cfg: Any) -> None:
    for name in ("num_steps", "window", "clean_kv_range", "num_frames", "height", "width", "fps", "seed"):
        value, number = getattr(cfg, name), None
        with contextlib.suppress(TypeError):
            number = operator.index(value)
        require(number is not None or (name, value) == ("num_frames", None),
                f"{name} {value!r} must be a whole number")
        object.__setattr__(cfg, name, number)            # one of NumPy or PyTorch as Python's
    for name in ("clean_t", "nearly_clean_t", "nearly_clean_blend"):
        value = getattr(cfg, name)
        require(hasattr(value, "__float__") and not math.isnan(value), f"{name} {value!r} must be a number")
    for name in ("kv_ranges", "cfg_t", "prev_scales", "text_scales", "special_tokens", "negative_tokens"):
        value = getattr(cfg, name)
        require(isinstance(value, list | tuple),
                f"{name} {value!r} must be a tuple, such as {getattr(type(cfg), name)}")
    _check_schedule(cfg)
    _check_guidance(cfg)
    require(cfg.num_frames is None or 1 <= cfg.num_frames < 2**63,
            f"num_frames {cfg.num_frames} must be at least 1, and below 2**63")
    for name in ("height", "width"):
        value = getattr(cfg, name)
        nearest = round(min(max(32, value), 16384) / 16) * 16
        require(value == nearest,
                f"{name} {value} must be a multiple of 16, 32 to 16384: the nearest is {nearest}")
    require(cfg.fps > 0, f"fps {cfg.fps} must be positive")
    require(0 <= cfg.seed < 2**63, f"seed {cfg.seed} must be in [0, 2**63)")
    for kind, known in (("special", SPECIAL_TOKENS), ("negative", NEGATIVE_TOKENS)):
        for name in getattr(cfg, f"{kind}_tokens"):
            require(name in known, f"unknown {kind} token {name!r}: choose from {', '.join(known)}")


def _check_schedule(cfg: Any) -> None:
    steps, window = cfg.num_steps, cfg.window
    require(window >= 1, f"window {window} must be at least 1")
    require(steps <= 10_000, f"steps {steps} are too many: at most 10000")
    require(steps >= 1 and steps % window == 0,
            f"steps {steps} must be a multiple of the window {window}: "
            f"try {max(window, round(steps / window) * window)}")
    for ranges in (cfg.kv_ranges, *(ranges for _, ranges in cfg.kv_ranges_at)):
        require(all(hasattr(v, "__index__") and v >= 1 for v in ranges),
                f"kv_ranges {ranges} must all be whole numbers of at least 1")
        unit = math.lcm(window, len(ranges) or 1)
        require(steps % unit == 0,
                f"steps {steps} must be a multiple of the number of kv_ranges ({len(ranges)}) "
                f"and of the window {window}: try {unit * max(1, round(steps / unit))}")
    require(cfg.clean_kv_range >= 1 or cfg.clean_kv_range == -1,
            f"clean_kv_range {cfg.clean_kv_range} must be at least 1, or -1")
    require(cfg.shortcut_mode in ("8,16,16", "16,16,8"),
            f"shortcut_mode {cfg.shortcut_mode!r} is not '8,16,16' or '16,16,8'")
    require(steps != 12 or not cfg.distilled or window in (1, 2, 4),
            f"12 steps of a distilled model come in threes, of two sizes (see shortcut_d): "
            f"window {window} must be 1, 2 or 4")


def _check_guidance(cfg: Any) -> None:
    one_length = len(cfg.cfg_t) == len(cfg.prev_scales) == len(cfg.text_scales) >= 1
    rising = all(a <= b for a, b in itertools.pairwise(cfg.cfg_t))
    finite = all(map(math.isfinite, (*cfg.prev_scales, *cfg.text_scales)))
    require(one_length and cfg.cfg_t[0] <= 0 and rising and finite,
            f"guidance tables must have one length, rise from t = 0 and be finite: cfg_t {cfg.cfg_t}, "
            f"prev_scales {cfg.prev_scales}, text_scales {cfg.text_scales}")


GUIDANCE = ("cfg_t", "prev_scales", "text_scales", "nearly_clean_t", "nearly_clean_blend")
OWN = (*GUIDANCE, "kv_ranges", "kv_ranges_at")           # what a chunk's config may differ in from its run's


def check_own_config(own: Any, run: Any) -> None:
    """ValueError if the config of one chunk differs from its run's in more than guidance and ranges, or looks
    further back: the cache has forgotten what came before."""
    for name in (field.name for field in dataclasses.fields(own) if field.name not in OWN):
        require(getattr(own, name) == getattr(run, name),
                f"{name} {getattr(own, name)!r} of one chunk is not its run's {getattr(run, name)!r}: a chunk"
                f" may only have its own {', '.join(OWN)}")
    new = [ranges for at, ranges in own.kv_ranges_at if (at, ranges) not in run.kv_ranges_at]
    for ranges in (own.kv_ranges, *new):
        require(not run.kv_ranges or ranges and max(ranges) <= max(run.kv_ranges),
                f"kv_ranges {ranges} of one chunk look further back than its run's {run.kv_ranges}, but the "
                f"cache has forgotten what came before")


def with_settings(cfg: Any, settings: dict[str, Any]) -> Any:
    """The config with some fields replaced; ValueError for a field that it does not have."""
    known = [field.name for field in dataclasses.fields(cfg)]
    unknown = ", ".join(settings.keys() - set(known))
    require(not unknown, f"unknown setting {unknown}: choose from {', '.join(known)}")
    return dataclasses.replace(cfg, **settings)


def check_forward(x: Tensor, t: Tensor, text: Tensor, text_mask: Tensor, chunks: Sequence[int] | None,
                  first_seen: Sequence[int] | Tensor | None, conditional: bool | Tensor) -> None:
    """ValueError if these arguments of DiT.forward differ in batch or chunks. Attention would then deal out
    texts and keys to other chunks than their own, and leave some of its result unwritten."""
    require(text.shape[:2] == t.shape and text_mask.shape == text.shape[:3]
            and x.dim() == 5 and len(x) == len(t),
            f"x {tuple(x.shape)}, t {tuple(t.shape)}, text {tuple(text.shape)} and text_mask "
            f"{tuple(text_mask.shape)} must be (B, 16, T, H, W), (B, n), (B, n, L, C) and (B, n, L)")
    B, n = t.shape
    require(B > 0 and n > 0, f"t {(B, n)} is empty: give at least one clip of at least one chunk")
    require(chunks is None or len(chunks) == n and all(a < b for a, b in itertools.pairwise(chunks)),
            f"chunks {chunks} must be {n} rising numbers, one for each chunk")
    if first_seen is not None:
        seen = tuple(torch.as_tensor(first_seen).shape)
        require(seen in ((n,), (1, n), (B, n)), f"first_seen {seen} must be {(n,)} or {(B, n)}")
    flags = tuple(torch.as_tensor(conditional).shape)
    require(flags in ((), (B, n)), f"conditional {flags} must be a bool or {(B, n)}")


# --------------------------------------------------------------------------------------------- special tokens


# Learned vectors in the width of the text, put in front of it, control what captions cannot: quality, a still
# or lively start, how much of the video is left. The name in a config -> the name of the tensor in
# special_tokens.safetensors, in the order of prepending. (No source describes them: the comments give the
# plain sense of their names.)
SPECIAL_TOKENS = {
    "static": "static_first_frames_token",                   # the first frames stand still
    "dynamic": "dynamic_first_frames_token",                 # they move
    "borderness": "borderness_token",                        # bars or a frame around the picture
    "hq": "hq_token",                                        # high quality
    "3d": "three_d_model_token",                             # the look of a 3D model
    "2d": "two_d_anime_token",                               # the look of an animated cartoon
    "duration": "duration_token_{}",                         # 1 to 8: chunks left, this one included
}
NEGATIVE_TOKENS = {
    "caption": "caption_token",                              # writing in the picture
    "logo": "logo_token",
    "trans": "trans_token",                                  # a transition from scene to scene
    "borderness": "borderness_token",
}


def token_names(names: Iterable[str], order: dict[str, str], remaining: float = 1) -> list[str]:
    """The tensors of the named tokens, in the order of prepending (SPECIAL_TOKENS or NEGATIVE_TOKENS).

    remaining: how many chunks are left, this one included; at most 8 are counted. It selects the duration
    token: duration_token_1 marks the last chunk.
    """
    return [tensor.format(int(min(remaining, 8))) for name, tensor in order.items() if name in set(names)]


def check_tokens(cfg: Any, table: dict[str, Tensor], width: int, num_chunks: float) -> None:
    """Raise ValueError if a run of so many generated chunks needs a token that the table lacks, or has in
    another shape than (1, width)."""
    needed_names = token_names(cfg.negative_tokens, NEGATIVE_TOKENS)
    for remaining in range(1, int(min(8, num_chunks)) + 1):
        needed_names += token_names(cfg.special_tokens, SPECIAL_TOKENS, remaining)
    for name in needed_names:
        require(name in table, f"this run needs the special token {name!r}, but this model's table has only "
                f"{', '.join(sorted(table)) or 'nothing'}: choose among them, or none")
        shape = tuple(table[name].shape)
        require(shape == (1, width),
                f"a special token has shape {shape}, not {(1, width)}: the table is for another model")


# ---------------------------------------------------------------------------------------------------- weights


def weight_files(folder: str | Path, name: str = "model.safetensors") -> list[Path]:
    """The files of a checkpoint: the one of that name, or all that its index names; where only NAME.zst is
    there (official downloads), that."""
    folder = Path(folder)
    index, names = folder / f"{name}.index.json", [name]
    if index.is_file():
        values = read_json(index, "index")
        require(isinstance(values, dict) and isinstance(values.get("weight_map"), dict),
                f"{index} is no index of weights: download or convert the model again")
        names = sorted({str(part) for part in values["weight_map"].values()})
    files = [folder / part for part in names]
    files = [file if file.is_file() else file.with_name(f"{file.name}.zst") for file in files]
    missing = [part for part, file in zip(names, files, strict=True) if not file.is_file()]
    require(not missing or index.is_file(), f"no weights in {str(folder)!r}: {folder / name} is missing, "
            f"download or convert the model again")
    require(not missing, f"{len(missing)} of {len(files)} files are missing in {str(folder)!r}, such as "
            f"{missing[:1]}: download or convert the model again")
    return files


def text_encoder_files(folder: str | Path) -> list[Path]:
    """The weights of a T5 folder: safetensors or, in an official download, .bin files."""
    names = ("model.safetensors", "model.safetensors.index.json")
    has_safetensors = any((Path(folder) / name).is_file() for name in names)
    return weight_files(folder, "model.safetensors" if has_safetensors else "pytorch_model.bin")


def read_headers(files: Iterable[str | Path]) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Name -> shape, whether fp8, of all tensors in safetensors files. ValueError if one is corrupt."""
    found = {}
    for file in files:
        with reading("weights", file), safe_open(file, "pt") as f:
            for name in f.keys():
                part = f.get_slice(name)
                found[name] = tuple(part.get_shape()), part.get_dtype() == "F8_E4M3"
    return found


def check_text_encoder(folder: str | Path, width: int | None = None) -> None:
    """ValueError if a T5 folder lacks files, one is cut short, or it is not of this width."""
    folder = Path(folder)
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    require(weights and (folder / "config.json").is_file() and (folder / "spiece.model").is_file(),
            f"no text encoder in {str(folder)!r}: it needs config.json, spiece.model and weights; give the "
            f"right folder (--t5)")
    read_headers(file for file in weights if file.suffix == ".safetensors")
    config = read_json(folder / "config.json")
    found = config.get("d_model") if isinstance(config, dict) else None
    require(width is None or found == width, f"the text encoder in {str(folder)!r} has width {found}, this "
            f"model needs {width}: give the right one (--t5)")


def read_tensors(file: str | Path, what: str = "weights") -> dict[str, Tensor]:
    """Name -> tensor in float32, of a small safetensors file."""
    with reading(what, file):
        return {name: v.float() for name, v in load_file(file).items()}


def read_special_tokens(folder: str | Path) -> dict[str, Tensor]:
    """Name -> (1, C), the learned tokens of a model folder; empty if it has none."""
    file = Path(folder) / "special_tokens.safetensors"
    return read_tensors(file, "special tokens") if file.is_file() else {}


def headers_of(module: nn.Module) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Of a module's state dict what read_headers gives of files."""
    return {k: (tuple(v.shape), v.dtype == torch.float8_e4m3fn) for k, v in module.state_dict().items()}


def compare_headers(found: dict, expected: dict, complaint: str) -> None:
    """ValueError, beginning with the complaint and naming the first difference, if they are not equal."""
    other = sorted(name for name in expected.keys() & found.keys() if found[name] != expected[name])
    for problem, names in (("lacks", expected.keys() - found.keys()),
                           ("has unknown", found.keys() - expected.keys()),
                           ("has other shapes or types for", other)):
        first = min(names, default="")
        values = f" ({found[first]}, not {expected[first]})" if names is other and names else ""
        require(not names, f"{complaint}: it {problem} {len(names)} tensor(s), such as {first!r}{values}")


def build(make: Callable[[], Module], folder: str | Path) -> Module:
    """A module without memory (on the meta device), after a look at the headers of a folder's files.

    ValueError, naming the first differences, if a file is corrupt or a name, shape or fp8 type differs.
    """
    with torch.device("meta"):
        module = make()
    compare_headers(read_headers(weight_files(folder)), headers_of(module),
                    f"the checkpoint in {str(folder)!r} does not fit its config (if an older version of this "
                    f"project wrote it, convert it again)")
    return module


def fill(module: Module, folder: str | Path, device: str | torch.device = "cpu",
         dtype: torch.dtype | None = None, only: Callable[[str], bool] = lambda name: True) -> Module:
    """Read a folder's weights, those that the module has and whose names are wanted, straight to the device,
    as `dtype` or in the dtypes the module has: official files hold in bf16 the norms that are computed in
    float32."""
    dtypes = {k: dtype or v.dtype for k, v in module.state_dict().items()}
    for file in weight_files(folder):
        with safe_open(file, "pt", device=str(device)) as f:
            weights = {k: f.get_tensor(k).to(dtypes[k]) for k in f.keys() if k in dtypes and only(k)}
        module.load_state_dict(weights, strict=False, assign=True)
    return module.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------ the machine


def load_module(name: str, path: str | Path) -> Any:
    """A Python file as the module `name`, found by its path: its file name may be that of a package."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def load_installed(name: str, file: str | Path) -> bool:
    """Load an installed package in place of our file of the same name, which Python found first: True if
    there is one. Our file asks for it; who imports it gets what then stands in sys.modules."""
    here = Path(file).resolve().parent
    try:
        places = [str(importlib.metadata.distribution(name).locate_file("")), *sys.path]
    except importlib.metadata.PackageNotFoundError:
        return False
    spec = PathFinder.find_spec(name, [p for p in places if Path(p or ".").resolve() != here])
    if spec is None or spec.loader is None:
        return False
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return True


def check_device(device: str | torch.device) -> None:
    """ValueError if PyTorch cannot compute on this device here."""
    require(re.fullmatch(r"cpu|mps|cuda(:\d+)?", str(device)),
            f"device {str(device)!r} is unknown: try cpu, cuda, cuda:1 or mps")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:                          # by how PyTorch was built
        reason = re.split(r"\.\s|\n|\.$", str(error))[0]
        raise ValueError(f"device {str(device)!r} is not available ({reason}): try cpu") from None
