"""Turn an official MAGI-1 download into the folders that magi.load reads.

    official download                            command        our folder: config.json, model*.safetensors,
    ckpt/magi/<name>/inference_weight[.fp8]...   dit SRC OUT    special_tokens.safetensors
    ckpt/vae/                                    vae SRC OUT
    ckpt/t5/t5-v1_1-xxl/                         t5 SRC OUT     spiece.model
    ckpt/ with any of these                      all SRC OUT    (OUT/4.5B-base/ ..., OUT/vae/, OUT/t5/)
    a folder of ours, in bf16 or float32         quantize MODEL OUT    the same model in fp8

    python convert_weights.py all ckpt weights --special-tokens special_tokens.npz
    python convert_weights.py dit ckpt/magi/4.5B_base/inference_weight weights/4.5B-base \\
        --config 4.5B_base_config.json --special-tokens special_tokens.npz
    python convert_weights.py quantize weights/4.5B-base weights/4.5B-base-fp8 --device cuda

Three promises. Nothing is written before every name, shape and dtype in the files' headers agrees, both ways,
with the model that the config describes. Tensors are streamed: one input file is open at a time, and at most
one output file (5 GB) is held. OUT has its name only when it is complete. What is not understood is refused,
with one line that says why and exit code 2.

Contents: 1 Configs, 2 Names, 3 Reading, 4 Writing, 5 Quantising, 6 Command line. What is known of the
official files is in the tables of 1 and 2.
Left out on purpose: downloading, and MAGI-1.1 checkpoints (they pack q, k, v in an undocumented order).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import pickle
import re
import shutil
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

import magi
from magi import DiTConfig, SamplerConfig, VAEConfig, _require

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9          # no output file is larger, unless a single tensor is
E4M3 = torch.float8_e4m3fn

# ------------------------------------------------------------------------------------------------------------
# 1  Configs
# ------------------------------------------------------------------------------------------------------------
# Of each part of an official config: the keys that are fields of ours, those with one value because our model
# has no other, and those that do not matter here. Any other key is an error: it might change the model.

# fmt: off
CONFIG_KEYS = {
    "model_config": (
        {"num_layers": "num_layers",              "hidden_size": "hidden_size",
         "ffn_hidden_size": "ffn_size",           "num_attention_heads": "num_heads",
         "num_query_groups": "num_kv_heads",      "kv_channels": "head_dim",
         "layernorm_epsilon": "norm_eps",         "x_rescale_factor": "x_scale",
         "half_channel_vae": "half_channel_vae",  "params_dtype": "dtype",
         "patch_size": "patch_size",              "gated_linear_unit": "gated_ffn",
         "in_channels": "in_channels",            "out_channels": "out_channels",
         "caption_channels": "text_dim",          "caption_max_length": "text_length"},
        {"model_name": "videodit_ardf", "apply_layernorm_1p": True, "t_patch_size": 1,
         "cond_hidden_ratio": 0.25, "xattn_cond_hidden_ratio": 1.0, "cond_gating_ratio": 1.0},
        ()),
    "runtime_config": (
        {"cfg_number": "cfg_number",              "cfg_t_range": "cfg_t",
         "prev_chunk_scales": "prev_scales",      "text_scales": "text_scales",
         "noise2clean_kvrange": "kv_ranges",      "clean_chunk_kvrange": "clean_kv_range",
         "clean_t": "clean_t",                    "seed": "seed",
         "num_frames": "num_frames",              "fps": "fps",
         "video_size_h": "height",                "video_size_w": "width",
         "num_steps": "num_steps",                "window_size": "window"},
        {"chunk_width": magi.CHUNK, "scale_factor": magi.SCALE_FACTOR,
         "temporal_downsample_factor": magi.FRAMES_PER_LATENT},
        ("t5_pretrained", "t5_device", "vae_pretrained", "load")),                  # arguments of magi.load
    "engine_config": (
        {"distill": "distilled",                  "distill_nearly_clean_chunk_threshold": "nearly_clean_t",
         "fp8_quant": "fp8",                      "shortcut_mode": "shortcut_mode"},
        {},
        ("distributed_backend", "distributed_timeout_minutes", "pp_size", "cp_size", "cp_strategy",
         "ulysses_overlap_degree", "kv_offload", "enable_cuda_graph")),             # how, not what
}
VAE_KEYS = (
    {field.name: field.name for field in dataclasses.fields(VAEConfig)},
    {"double_z": True, "with_cls_token": True, "conv_last_layer": True,
     "norm_code": False, "use_rope": False},
    ())

# The sizes, and what no tensor's shape gives away when it is wrong. Others may be left to our defaults.
REQUIRED_KEYS = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
                 "kv_channels", "in_channels", "out_channels", "x_rescale_factor")
REQUIRED_VAE_KEYS = ("video_size", "video_length", "patch_size", "patch_length", "z_chans", "embed_dim",
                     "depth", "num_heads")
# fmt: on


def configs_from_upstream(config: dict) -> tuple[DiTConfig, SamplerConfig]:
    """An official JSON -> our two configs. Raises ValueError, naming the key, for what we do not support."""
    _require(isinstance(config, dict) and config.keys() == CONFIG_KEYS.keys(),
             f"an official config has the parts {', '.join(CONFIG_KEYS)}; this is {str(config)[:60]!r}")
    values = {}
    for part, table in CONFIG_KEYS.items():
        values |= _translate(part, config[part], table, REQUIRED_KEYS if part == "model_config" else ())

    half, branches = values.pop("half_channel_vae", None), values.pop("cfg_number", None)
    channels = DiTConfig.latent_channels * (2 if half else 1)
    _require(half is None or values["in_channels"] == values["out_channels"] == channels,
             f"half_channel_vae {half} means {channels} channels, but in_channels is {values['in_channels']} "
             f"and out_channels {values['out_channels']}")
    distilled = values.setdefault("distilled", branches == 1)
    _require(branches in (None, 1 if distilled else 3), f"cfg_number {branches} does not go with distill "
             f"{distilled}: a base model has 3 branches, a distilled one 1")
    if "dtype" in values:
        values["dtype"] = str(values["dtype"]).removeprefix("torch.")
    values["null_length"] = min(DiTConfig.null_length, values.get("text_length", DiTConfig.text_length))
    in_dit = {field.name for field in dataclasses.fields(DiTConfig)}
    return (_build(DiTConfig, {k: v for k, v in values.items() if k in in_dit}),
            _build(SamplerConfig, {k: v for k, v in values.items() if k not in in_dit}))


def vae_config_from_upstream(config: dict) -> VAEConfig:
    """The VAE's config.json -> VAEConfig. Raises ValueError likewise."""
    table = {"ddconfig": "ddconfig"}, {}, ("_class_name", "_diffusers_version", "model_type")
    ddconfig = _translate("config.json", config, table, ["ddconfig"])["ddconfig"]
    return _build(VAEConfig, _translate("ddconfig", ddconfig, VAE_KEYS, REQUIRED_VAE_KEYS))


def _translate(part: str, values: dict, table: tuple, required: Iterable[str] = ()) -> dict:
    """The entries of one part of an official config, under our names."""
    fields, fixed, ignored = table
    _require(isinstance(values, dict), f"{part} is {values!r}, not a table of keys")
    for key, value in values.items():
        _require(key in fields or key in fixed or key in ignored, f"unknown key {part}.{key} ({value!r})")
        _require(key not in fixed or value == fixed[key],
                 f"{part}.{key} is {value!r}: only {fixed.get(key)!r} is supported")
    for key in required:
        _require(key in values, f"{part}.{key} is missing")
    return {fields[key]: value for key, value in values.items() if key in fields}


def _build(kind: type, values: dict) -> DiTConfig | SamplerConfig | VAEConfig:
    try:
        return magi.make_config(kind, values)
    except (TypeError, ZeroDivisionError) as error:      # such as text in a list of numbers
        raise ValueError(f"bad value in the official config: {error}") from None


# ------------------------------------------------------------------------------------------------------------
# 2  Names
# ------------------------------------------------------------------------------------------------------------
# {} is the number of a layer. The last column lists a module's tensors; a name without any is itself one.
# Layers that may be quantised (magi.FP8Linear, "tensor" or "channel") have scales beside their weight.

W, WB, T8, C8 = "weight", "weight bias", "weight weight_scale input_scale", \
    "weight weight_scale input_scale smooth_scale"
# fmt: off
DIT_MODULES = {
    "x_embedder":                                                     ("patch_embed",              W),
    "t_embedder.mlp.0":                                               ("time_embed.0",             WB),
    "t_embedder.mlp.2":                                               ("time_embed.2",             WB),
    "y_embedder.null_caption_embedding":                              ("null_text",                ""),
    "y_embedder.y_proj_xattn.0":                                      ("text_proj",                WB),
    "y_embedder.y_proj_adaln.0":                                      ("flag_proj",                WB),
    "rope.bands":                                                     ("rope_bands",               ""),
    "videodit_blocks.layers.{}.ada_modulate_layer.proj.0":            ("layers.{}.gates",          WB),
    "videodit_blocks.layers.{}.self_attention.linear_qkv.layer_norm": ("layers.{}.attn.norm",      WB),
    "videodit_blocks.layers.{}.self_attention.linear_qkv.q":          ("layers.{}.attn.q",         T8),
    "videodit_blocks.layers.{}.self_attention.linear_qkv.k":          ("layers.{}.attn.k",         T8),
    "videodit_blocks.layers.{}.self_attention.linear_qkv.v":          ("layers.{}.attn.v",         T8),
    "videodit_blocks.layers.{}.self_attention.linear_qkv.qx":         ("layers.{}.attn.qx",        T8),
    "videodit_blocks.layers.{}.self_attention.linear_kv_xattn":       ("layers.{}.attn.kvx",       W),
    "videodit_blocks.layers.{}.self_attention.linear_proj":           ("layers.{}.attn.out",       C8),
    "videodit_blocks.layers.{}.self_attention.q_layernorm":           ("layers.{}.attn.q_norm",    WB),
    "videodit_blocks.layers.{}.self_attention.k_layernorm":           ("layers.{}.attn.k_norm",    WB),
    "videodit_blocks.layers.{}.self_attention.q_layernorm_xattn":     ("layers.{}.attn.qx_norm",   WB),
    "videodit_blocks.layers.{}.self_attention.k_layernorm_xattn":     ("layers.{}.attn.kx_norm",   WB),
    "videodit_blocks.layers.{}.self_attn_post_norm":                  ("layers.{}.attn_post_norm", WB),
    "videodit_blocks.layers.{}.mlp.layer_norm":                       ("layers.{}.ffn.norm",       WB),
    "videodit_blocks.layers.{}.mlp.linear_fc1":                       ("layers.{}.ffn.fc1",        T8),
    "videodit_blocks.layers.{}.mlp.linear_fc2":                       ("layers.{}.ffn.fc2",        C8),
    "videodit_blocks.layers.{}.mlp_post_norm":                        ("layers.{}.ffn_post_norm",  WB),
    "videodit_blocks.final_layernorm":                                ("final_norm",               WB),
    "final_linear.linear":                                            ("final_linear",             W),
}
VAE_MODULES = {f"{side}.{old}": (f"{side}.{new}", tensors) for old, new, tensors in (
    ("cls_token",           "cls_token",         ""),
    ("pos_embed",           "pos_embed",         ""),
    ("patch_embed.proj",    "patch_embed",       WB),            # encoder only
    ("proj_in",             "proj_in",           WB),            # decoder only
    ("blocks.{}.norm1",     "blocks.{}.norm1",   WB),            # where ln_in_attn is off
    ("blocks.{}.attn.qkv",  "blocks.{}.qkv",     WB),
    ("blocks.{}.attn.proj", "blocks.{}.proj",    WB),
    ("blocks.{}.norm2",     "blocks.{}.norm2",   WB),
    ("blocks.{}.mlp.fc1",   "blocks.{}.fc1",     WB),
    ("blocks.{}.mlp.fc2",   "blocks.{}.fc2",     WB),
    ("norm",                "norm",              WB),
    ("final_proj",          "final.0",           WB),            # decoder, where use_final_proj is on
    ("final_norm",          "final.1",           WB),            # likewise
    ("last_layer",          "last_layer",        WB),
) for side in ("encoder", "decoder")}
SPECIAL_TOKENS = {                                               # ours -> array and row of special_tokens.npz
    "caption_token": ("caption_token", 0),               "logo_token": ("logo_token", 0),
    "trans_token": ("other_tokens", 0),                  "hq_token": ("other_tokens", 1),
    "static_first_frames_token": ("other_tokens", 2),    "dynamic_first_frames_token": ("other_tokens", 3),
    "borderness_token": ("other_tokens", 4),             "three_d_model_token": ("other_tokens", 15),
    "two_d_anime_token": ("other_tokens", 16),
    **{f"duration_token_{i}": ("other_tokens", 6 + i) for i in range(1, 9)},
}
# fmt: on


def convert_dit(sd: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official DiT tensors, all or some -> ours. fp8 weights lose their leading axis, no more changes."""
    for name, tensor in sd.items():
        _require(not re.search(r"linear_qkv[^.]*(\.weight)?$", name), f"{name} {list(tensor.shape)} packs q, "
                 "k and v in an undocumented order: this is MAGI-1.1, and only MAGI-1 is supported")
    return {name: tensor.squeeze(0) if tensor.dtype == E4M3 and tensor.dim() == 3 else tensor
            for name, tensor in _rename(sd, DIT_MODULES).items()}


def convert_vae(sd: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official VAE tensors, all or some -> ours."""
    return _rename(sd, VAE_MODULES)


def convert_t5(sd: dict[str, Tensor]) -> dict[str, Tensor]:
    """A T5 checkpoint's tensors, all or some -> the encoder's in bf16; transformers' names stay."""
    for name, tensor in sd.items():
        part = name.split(".")[0]
        _require(part in ("shared", "encoder", "decoder", "lm_head") and tensor.is_floating_point(),
                 f"{name} ({tensor.dtype}) is not a tensor of a T5 model")
    tied = "encoder.embed_tokens.weight"                 # shared.weight again, which transformers ties itself
    return {name: tensor.to(torch.bfloat16) for name, tensor in sd.items()
            if name.startswith(("shared.", "encoder.")) and name != tied}


def _rename(sd: dict[str, Tensor], modules: dict[str, tuple[str, str]]) -> dict[str, Tensor]:
    table = {f"{old}.{t}".rstrip("."): f"{new}.{t}".rstrip(".")
             for old, (new, tensors) in modules.items() for t in tensors.split() or [""]}
    number = re.compile(r"(?<=layers\.|blocks\.)[0-9]+")
    unknown = [name for name in sd if number.sub("{}", name) not in table]
    _require(not unknown, f"{len(unknown)} unknown tensor(s), such as {unknown[:1]}")
    return {table[number.sub("{}", name)].replace("{}", "".join(number.findall(name))): tensor
            for name, tensor in sd.items()}


def special_tokens_from_npz(file: Path, width: int) -> dict[str, Tensor]:
    """The learned vectors (1, width) by name. They pass through float16, as they do in the official code."""
    with _reading(file), np.load(file, allow_pickle=False) as arrays:
        tokens = {name: arrays[array][row:row + 1] for name, (array, row) in SPECIAL_TOKENS.items()}
    for name, token in tokens.items():
        _require(token.shape == (1, width), f"{file}: {name} is {token.shape}, the model needs {(1, width)}")
        tokens[name] = torch.from_numpy(token.astype(np.float16).astype(np.float32))
    return tokens


# ------------------------------------------------------------------------------------------------------------
# 3  Reading
# ------------------------------------------------------------------------------------------------------------

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
           "F8_E4M3": E4M3, "I64": torch.int64, "U8": torch.uint8}


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """A damaged file can raise any exception of four libraries: make it one ValueError."""
    try:
        yield
    except OSError:                                      # the disk's fault, not the file's
        raise
    except Exception as error:
        raise ValueError(f"{file} is truncated or corrupt ({type(error).__name__}: {error})") from error


def read_json(file: Path) -> dict:
    with _reading(file):
        return json.loads(file.read_text())


def weight_files(folder: Path, *names: str) -> list[Path]:
    """The files of a checkpoint: those its index names, or a single one; each as it is, or compressed."""
    for name in names:
        index = folder / f"{name}.index.json"
        with _reading(index):
            parts = json.loads(index.read_text())["weight_map"].values() if index.is_file() else [name]
            parts = [folder / part for part in sorted(set(parts))]
        files = [part if part.is_file() else part.with_name(f"{part.name}.zst") for part in parts]
        missing = [file.stem for file in files if not file.is_file()]
        _require(not index.is_file() or not missing,
                 f"{len(missing)} of {len(files)} files are missing in {folder}, such as {missing[:1]}")
        if not missing:
            return files
    raise ValueError(f"no weights in {folder}: it has neither {' nor '.join(names)}, nor an index of parts")


def open_file(file: Path) -> BinaryIO:
    """A stream of bytes, decompressed on the way if the file is .zst."""
    if file.suffix != ".zst":
        return open(file, "rb")
    try:
        import zstandard
    except ImportError:
        raise ValueError(f"{file} is compressed: pip install zstandard") from None
    unpack = zstandard.ZstdDecompressor(max_window_size=2**31)               # of `zstd --long=31`
    return unpack.stream_reader(open(file, "rb"), read_across_frames=True)   # pzstd writes many frames


def read_header(file: Path) -> dict[str, Tensor]:
    """A file's tensors on the meta device: names, shapes and dtypes without the data."""
    if file.suffix == ".bin":
        return load_pickle(file, "meta")
    with open_file(file) as f, _reading(file):
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(min(size, 10**8)))    # a corrupt length must not ask for all memory
        header.pop("__metadata__", None)
        size += 8 + max(entry["data_offsets"][1] for entry in header.values())
        if file.suffix != ".zst" and file.stat().st_size != size:
            raise EOFError(f"it has {file.stat().st_size:,} bytes, its header says {size:,}")
        return {name: torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]], device="meta")
                for name, entry in header.items()}


def load_pickle(file: Path, device: str) -> dict[str, Tensor]:
    """A .bin file, mapped from the disk where its format allows. Nothing in it is executed."""
    with _reading(file), warnings.catch_warnings():
        warnings.simplefilter("ignore")                  # torch.load remarks on old pickle protocols
        try:
            mmap = device != "meta" and zipfile.is_zipfile(file)
            sd = torch.load(file, map_location=device, weights_only=True, mmap=mmap)
        except pickle.UnpicklingError:
            sd = None
    _require(isinstance(sd, dict) and all(isinstance(v, Tensor) for v in sd.values()),
             f"{file} is not a pickle of plain tensors: other things in it could run code, so it is refused")
    return sd


@contextmanager
def open_weights(file: Path, scratch: Path) -> Iterator[Callable[[str], Tensor]]:
    """A function that reads one tensor by name. A .zst file is unpacked into `scratch` while it is open."""
    if file.suffix == ".bin":
        yield load_pickle(file, "cpu").__getitem__
        return
    plain = scratch / f"{file.stem}.unpacked" if file.suffix == ".zst" else file
    try:
        with _reading(file):
            if plain != file:
                with open_file(file) as packed, open(plain, "wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked, 2**24)
            weights = safe_open(plain, "pt")
        yield weights.get_tensor
    finally:
        if plain != file:
            plain.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------
# 4  Writing
# ------------------------------------------------------------------------------------------------------------


def make_plan(files: list[Path], convert: Callable, expected: dict[str, Tensor]) -> tuple[list, list]:
    """Read all headers, check them against `expected` (a meta state dict), lay out the output.

    Returns reads, (file, official name) file by file, and shards, {our name: meta tensor}, in the same order.
    """
    source, sd = {}, {}
    for file in files:
        for name, tensor in read_header(file).items():
            _require(name not in source, f"{name} is in {source.get(name)} and again in {file}")
            source[name], sd[name] = file, tensor
    check(convert(sd), expected)
    reads, shards, size = [], [{}], 0
    for name, file in source.items():
        if made := convert({name: sd[name]}):            # none if it is not wanted; several by quantising
            bytes_made = sum(tensor.nbytes for tensor in made.values())
            size += bytes_made
            if size > SHARD_BYTES and shards[-1]:
                shards.append({})
                size = bytes_made
            shards[-1] |= made
            reads.append((file, name))
    return reads, shards


def check(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare names, shapes and dtypes both ways. Raises ValueError with the first difference of a kind."""
    show = lambda tensor: f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    wrong = [f"{name} ({show(found[name])}, not {show(expected[name])})" for name in expected
             if name in found and not fits(name, found[name], expected[name])]
    for problem, names in (("missing", sorted(expected.keys() - found.keys())),
                           ("too many", sorted(found.keys() - expected.keys())), ("of another kind", wrong)):
        _require(not names, f"the weights do not fit the config: {len(names)} tensor(s) {problem}, such as "
                 f"{''.join(names[:1])}")


def fits(name: str, found: Tensor, expected: Tensor) -> bool:
    """Same shape; e4m3 exactly where the model has it; else the model's type, float32, or bf16 in the blocks:
    official files store even those of their norms in bf16 that are computed in float32."""
    if found.shape != expected.shape or (found.dtype == E4M3) != (expected.dtype == E4M3):
        return False
    bf16 = name.startswith(("layers.", "final_norm.")) and not name.endswith("_scale")
    return found.dtype in (expected.dtype, torch.float32, torch.bfloat16 if bf16 else None)


def write_weights(reads: list, shards: list, convert: Callable, folder: Path) -> None:
    """Stream the tensors of a plan into model.safetensors, or into numbered files with the usual index."""
    n, held = len(shards), {}
    names = ["model.safetensors"] if n == 1 else [f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
    waiting = list(zip(names, shards, strict=True))
    with tqdm(total=len(reads), unit="tensor", desc=folder.stem, disable=None) as bar:
        for file, group in itertools.groupby(reads, key=lambda read: read[0]):
            with open_weights(file, folder) as read:
                for _, name in group:
                    held |= convert({name: read(name).contiguous()})
                    bar.update()
                    if len(held) == len(waiting[0][1]):
                        save_file(held, folder / waiting.pop(0)[0], metadata={"format": "pt"})
                        held = {}
    if n > 1:
        size = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        write_json({"metadata": {"total_size": size}, "weight_map": where}, folder / INDEX)


def write_json(values: dict, file: Path) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n")


@contextmanager
def new_folder(src: Path, out: Path, force: bool) -> Iterator[Path]:
    """A folder OUT.partial that becomes OUT if the block ends well, and is removed if it does not."""
    if out.exists():
        _require(force, f"{out} exists: choose another folder, or add --force to replace it")
        _require((out / "config.json").is_file() and not src.resolve().is_relative_to(out.resolve()),
                 f"{out} is not a model folder of ours, or it holds the source: --force does not replace it")
    partial = out.with_name(f"{out.name}.partial")
    if partial.exists():                                 # left by a run that was killed
        ours = ("config.json", "spiece.model", INDEX)
        _require(partial.is_dir() and all(f.name in ours or f.suffix in (".safetensors", ".unpacked")
                                          for f in partial.iterdir()),
                 f"{partial} is in the way and holds files that are not ours: move it elsewhere")
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    except BaseException:                                # Ctrl-C too
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sizes = [file.stat().st_size for file in out.iterdir()]
    print(f"wrote {out}: {sum(sizes) / 1e9:.3f} GB in {len(sizes)} files")


# ------------------------------------------------------------------------------------------------------------
# 5  Quantising
# ------------------------------------------------------------------------------------------------------------
# fp8 weights want fp8 inputs, and how large inputs get is known only by running the model: a few videos are
# sampled, and the largest |x| of every channel of every quantised layer is noted (calibration). Then
#
#   per tensor (others)     input_scale = max |x| / 448,   weight_scale = max |w| / 448
#   per channel (Wo, fc2)   s_j = max|x_j|^a / max|w_j|^(1-a), a = 0.45: x_j / s_j and w_j s_j have the same
#                           product and no outliers (SmoothQuant, arXiv 2211.10438); then as above, but with
#                           smooth_scale = s * input_scale, since the input is divided only once
#
# so that all lies within e4m3's +-448. An input larger than any that was seen is clamped.

E4M3_MAX, ALPHA = 448.0, 0.45
CALIBRATION_PROMPTS = ("a red ball bounces", "a blue star slides to the left at night",
                       "a woman walks along a beach at sunset while waves roll in",
                       "a camera flies over a city street full of cars in the rain")


def calibrate(dit: magi.DiT, layers: Iterable[str], run: Callable[[], None]) -> dict[str, Tensor]:
    """Largest |input| of every channel of the named layers while `run` uses the model: name -> (in,)."""
    peaks: dict[str, Tensor] = {}

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            peak = args[0].detach().abs().flatten(0, -2).amax(0).float()
            peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak
        return hook

    hooks = [dit.get_submodule(name).register_forward_pre_hook(watch(name)) for name in layers]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    for name, peak in peaks.items():
        _require(bool(peak.isfinite().all()), f"the input of {name} overflows: it cannot be quantised")
    return {name: peak.cpu() for name, peak in peaks.items()}


def quantise_layer(weight: Tensor, peak: Tensor, kind: str, alpha: float = ALPHA) -> dict[str, Tensor]:
    """The tensors of a magi.FP8Linear of this kind ("tensor", "channel") for weight (out, in), peak (in,)."""
    weight, peak = weight.float(), peak.to(weight.device).clamp(min=1e-6)    # a channel may never be used
    if kind == "channel":
        smooth = peak**alpha / weight.abs().amax(0).clamp(min=1e-6) ** (1 - alpha)
        weight, peak = weight * smooth, peak / smooth
    input_scale = (peak.max() / E4M3_MAX).reshape(1)
    weight_scale = (weight.abs().max().clamp(min=1e-6) / E4M3_MAX).reshape(1)
    weight8 = (weight / weight_scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    out = {"weight": weight8, "weight_scale": weight_scale,
           "input_scale": input_scale if kind == "channel" else input_scale.repeat(len(peak))}
    return out | ({"smooth_scale": (smooth * input_scale)[None]} if kind == "channel" else {})


def run_quantize(src: Path, out: Path, prompt: list[str] | None, t5: Path | None, device: str, backend: str,
                 alpha: float, force: bool, **settings) -> None:
    """Quantise every layer but the first and the last, which are too sensitive; they become bf16."""
    cfg, sampler = (magi.read_config(src, part, kind) for part, kind in (("dit", DiTConfig),
                                                                        ("sampler", SamplerConfig)))
    _require(not cfg.fp8, f"{src} is an fp8 model already")
    _require(cfg.num_layers > 2, f"{src} has {cfg.num_layers} layers: none but the first and last")
    _require(0 <= alpha <= 1, f"alpha {alpha} must be in [0, 1]")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} is not available ({str(error).splitlines()[0]}): "
                         f"try cpu") from None
    if magi.get_ops(backend) is not magi.TORCH_OPS:
        import kernels

        kernels.arch_of(device)                          # says if the GPU cannot
    sampler_run = dataclasses.replace(sampler, **{k: v for k, v in settings.items() if v is not None})
    t5, tokens = t5 or src.parent / "t5", src / "special_tokens.safetensors"
    _require((t5 / "config.json").is_file(), f"no text encoder in {t5}: give its folder with --t5")
    cfg8 = dataclasses.replace(cfg, fp8=True, dtype="bfloat16")
    with torch.device("meta"):
        kinds = {name: "tensor" if module.smooth_scale is None else "channel"
                 for name, module in magi.DiT(cfg8).named_modules() if isinstance(module, magi.FP8Linear)}
    expected = meta_weights(lambda: magi.DiT(cfg8))
    files = magi.weight_files(src)

    def convert(sd: dict[str, Tensor]) -> dict[str, Tensor]:
        made = {}
        for name, tensor in sd.items():
            layer = name.removesuffix(".weight")
            if layer in kinds:
                peak = peaks[layer].to(tensor.device)
                parts = quantise_layer(tensor, peak, kinds[layer], alpha)
                made |= {f"{layer}.{k}": v for k, v in parts.items()}
            else:
                made[name] = tensor.to(expected[name].dtype if name in expected else tensor.dtype)
        return made

    with torch.device("meta"):                           # check that it fits before the model runs for hours
        peaks = {name: torch.empty(expected[f"{name}.weight"].shape[1]) for name in kinds}
    make_plan(files, convert, expected)
    with new_folder(src, out, force) as folder:
        peaks = measure(src, sampler_run, prompt or CALIBRATION_PROMPTS, t5, device, backend, kinds)
        write_weights(*make_plan(files, convert, expected), convert, folder)
        write_json({"dit": asdict(cfg8), "sampler": asdict(sampler)}, folder / "config.json")
        if tokens.is_file():
            shutil.copy(tokens, folder)


@torch.inference_mode()
def measure(src: Path, cfg: SamplerConfig, prompts: Iterable[str], t5: Path, device: str, backend: str,
            layers: Iterable[str]) -> dict[str, Tensor]:
    """Calibrate a model folder, in bf16, by one sampling run per prompt, each with a seed of its own."""
    dit_cfg = magi.read_config(src, "dit", DiTConfig)
    from transformers.utils import logging  # takes seconds, so only here

    logging.disable_progress_bar()
    texts = magi.T5(t5, dit_cfg.text_length, device)(list(prompts))          # the encoder is freed here
    dit = magi.load_dit(src, device, dtype="bfloat16", backend=backend)
    file = src / "special_tokens.safetensors"
    table = load_file(file) if file.is_file() else {}

    def run() -> None:
        runs = zip(*texts, strict=True)
        for i, (text, mask) in enumerate(tqdm(list(runs), unit="video", desc="calibrating", disable=None)):
            for _ in magi.sample(dit, text, mask, dataclasses.replace(cfg, seed=cfg.seed + i),
                                 special_tokens=table):
                pass

    return calibrate(dit, layers, run)


# ------------------------------------------------------------------------------------------------------------
# 6  Command line
# ------------------------------------------------------------------------------------------------------------


def run_dit(src: Path, out: Path, config: str, special_tokens: Path | None, force: bool) -> None:
    preset = magi.PRESETS.get(config)
    _require(preset or Path(config).is_file(), f"config {config!r} is neither a file nor one of "
             f"{', '.join(magi.PRESETS)}")
    cfg, sampler = (preset.dit, preset.sampler) if preset else configs_from_upstream(read_json(Path(config)))
    tokens = special_tokens_from_npz(special_tokens, cfg.text_dim) if special_tokens else {}
    files = weight_files(src, "model.safetensors")
    plan = make_plan(files, convert_dit, meta_weights(lambda: magi.DiT(cfg)))
    with new_folder(src, out, force) as folder:
        write_weights(*plan, convert_dit, folder)
        write_json({"dit": asdict(cfg), "sampler": asdict(sampler)}, folder / "config.json")
        if tokens:
            save_file(tokens, folder / "special_tokens.safetensors")
    if not tokens:
        print(f"note: without --special-tokens, {out} only runs with special_tokens=(), in sample.py "
              f"--special_tokens none", file=sys.stderr)


def run_vae(src: Path, out: Path, force: bool) -> None:
    cfg = vae_config_from_upstream(read_json(src / "config.json"))
    files = weight_files(src, "diffusion_pytorch_model.safetensors")
    plan = make_plan(files, convert_vae, meta_weights(lambda: magi.VAE(cfg)))
    with new_folder(src, out, force) as folder:
        write_weights(*plan, convert_vae, folder)
        write_json({"vae": asdict(cfg)}, folder / "config.json")


def run_t5(src: Path, out: Path, force: bool) -> None:
    from transformers import T5Config, T5EncoderModel  # takes seconds, so only here

    config = read_json(src / "config.json")
    t5 = isinstance(config, dict) and config.get("model_type") == "t5"
    _require(t5, f"{src / 'config.json'} is not of a T5 model")
    _require((src / "spiece.model").is_file(), f"{src / 'spiece.model'} is missing")
    with _reading(src / "config.json"):
        expected = meta_weights(lambda: T5EncoderModel(T5Config(**config)).to(torch.bfloat16))
    del expected["encoder.embed_tokens.weight"]
    plan = make_plan(weight_files(src, "model.safetensors", "pytorch_model.bin"), convert_t5, expected)
    with new_folder(src, out, force) as folder:
        write_weights(*plan, convert_t5, folder)
        for name in ("config.json", "spiece.model"):
            shutil.copy(src / name, folder)


def run_all(src: Path, out: Path, special_tokens: Path | None, force: bool) -> None:
    """All that a ckpt folder holds. The names of its DiT folders tell the preset; the headers confirm it."""
    jobs = {}
    for folder in sorted(src.glob("magi/*/inference_weight*")):
        label = f"{folder.parent.name}/{folder.name}"
        size = next((size for size in ("24B", "4.5B") if size in label), "unknown")
        preset = f"{size}-{'distill-fp8' if 'fp8' in label else 'distill' if 'distill' in label else 'base'}"
        _require(preset in magi.PRESETS and preset not in jobs, f"which model is {folder}? Use dit")
        jobs[preset] = run_dit, folder, dict(config=preset, special_tokens=special_tokens)
    for name, run, pattern in (("vae", run_vae, "vae/config.json"), ("t5", run_t5, "t5/*/config.json")):
        for file in src.glob(pattern):
            jobs[name] = run, file.parent, {}
    _require(jobs, f"{src} has no magi/*/inference_weight*, vae/config.json or t5/*/config.json to convert")
    for name, (run, folder, options) in jobs.items():
        if (out / name).exists() and not force:
            print(f"{out / name} exists: skipped (--force converts it again)")
        else:
            run(folder, out / name, force=force, **options)


def meta_weights(build: Callable[[], nn.Module]) -> dict[str, Tensor]:
    with torch.device("meta"):
        return build().state_dict()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Turn an official MAGI-1 download into folders of ours.")
    commands = parser.add_subparsers(required=True)
    for name, run, text in (("all", run_all, "everything found in an official ckpt folder"),
                            ("dit", run_dit, "one diffusion transformer: an inference_weight* folder"),
                            ("vae", run_vae, "the video autoencoder: ckpt/vae"),
                            ("t5", run_t5, "the text encoder: ckpt/t5/t5-v1_1-xxl")):
        command = commands.add_parser(name, help=text, description=f"Convert {text}.")
        command.set_defaults(run=run)
        command.add_argument("src", type=Path, metavar="SRC", help="the official folder")
        command.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
        command.add_argument("--force", action="store_true", help="replace what is already there")
        if name in ("all", "dit"):
            command.add_argument("--special-tokens", type=Path, metavar="NPZ", help="special_tokens.npz")
        if name == "dit":
            command.add_argument("--config", required=True, metavar="JSON",
                                 help=f"the official config, or a preset: {', '.join(magi.PRESETS)}")
    text = "one of our model folders to fp8, with calibration by a few sampling runs"
    command = commands.add_parser("quantize", help=text, description=f"Quantise {text}.")
    command.set_defaults(run=run_quantize)
    command.add_argument("src", type=Path, metavar="MODEL", help="a DiT folder, with t5 beside it")
    command.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    command.add_argument("--force", action="store_true", help="replace what is already there")
    command.add_argument("--prompt", action="append", metavar="TEXT", help="for calibration, may be repeated")
    command.add_argument("--t5", type=Path, metavar="FOLDER", help="default: t5 beside the model")
    command.add_argument("--device", default="cpu", help="where the sampling runs; default: cpu")
    command.add_argument("--backend", choices=["torch", "triton"], default="torch", help="default: torch")
    command.add_argument("--alpha", type=float, default=ALPHA, help=f"smoothing strength; default: {ALPHA}")
    for flag, help in (("num-frames", "video frames of each run"), ("num-steps", "steps per chunk"),
                       ("height", "pixels"), ("width", "pixels"), ("seed", "of the first run")):
        command.add_argument(f"--{flag}", type=int, metavar="N", help=f"{help}; default: the model's")
    args = vars(parser.parse_args(argv))
    try:
        args.pop("run")(**args)
    except (ValueError, OSError, SafetensorError) as error:
        print("convert_weights:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("convert_weights: interrupted, nothing was left behind", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
