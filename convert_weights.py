"""Turn an official MAGI-1 download into the folders that magi.load reads.

    official download                            command        our folder: config.json, model*.safetensors,
    ckpt/magi/<name>/inference_weight[.fp8]...   dit SRC OUT    special_tokens.safetensors
    ckpt/vae/                                    vae SRC OUT
    ckpt/t5/t5-v1_1-xxl/                         t5 SRC OUT     spiece.model
    ckpt/ with any of these                      all SRC OUT    (OUT/4.5B-base/ ..., OUT/vae/, OUT/t5/)
    a folder of ours, in bf16 or float32         quantize MODEL OUT    the same model in fp8

    python convert_weights.py all ckpt weights --special_tokens special_tokens.npz
    python convert_weights.py dit ckpt/magi/4.5B_base/inference_weight weights/4.5B-base \\
        --config 4.5B_base_config.json --special_tokens special_tokens.npz
    python convert_weights.py quantize weights/4.5B-base weights/4.5B-base-fp8 --device cuda

It keeps three promises. It writes no weight before every name, shape and dtype in the files' headers agrees,
both ways, with the model that the config describes. It streams the tensors: one input file is open at a time,
and at most one output file (5 GB) is held. OUT gets its name only when it is complete. What the program does
not understand it refuses, with one line that says why and exit code 2.

Contents: 1 Configs, 2 Names, 3 Reading, 4 Writing, 5 Command line. All that is known of the official files is
in the tables of 1 and 2. tools/quantize.py quantises. Two things are left out on purpose: downloading, and
MAGI-1.1 checkpoints, which pack q, k, v in an undocumented order.
"""

# ruff: noqa: E402
from __future__ import annotations

import terminal

if __name__ == "__main__":
    terminal.begin()                                     # before PyTorch is imported

import dataclasses
import itertools
import json
import math
import pickle
import re
import shutil
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from einops import rearrange
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

import magi
import parallel
from checkpoints import (
    compare_headers,
    load_module,
    make_config,
    read_json,
    reading,
    require,
    text_encoder_files,
    weight_files,
)
from magi import DiTConfig, SamplerConfig, VAEConfig
from outputs import check_room, new_folder, save
from terminal import Parser, exit_code

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9          # no output file is larger, unless a single tensor is
E4M3 = torch.float8_e4m3fn

# ------------------------------------------------------------------------------------------------------------
# 1  Configs
# ------------------------------------------------------------------------------------------------------------


class Keys(NamedTuple):
    """What a part of an official config may have. Any other key is an error: it might change the model."""

    ours: dict[str, str]                                 # official name -> field of ours
    fixed: dict[str, Any] = {}                           # has only this value, as our model has no other
    ignored: tuple[str, ...] = ()                        # does not matter here
    required: tuple[str, ...] = ()                       # a size, or no tensor's shape shows when it is wrong


# fmt: off
CONFIG_KEYS = {
    "model_config": Keys(
        {"num_layers": "num_layers",              "hidden_size": "hidden_size",
         "ffn_hidden_size": "ffn_size",           "num_attention_heads": "num_heads",
         "num_query_groups": "num_kv_heads",      "kv_channels": "head_dim",
         "layernorm_epsilon": "norm_eps",         "x_rescale_factor": "x_scale",
         "half_channel_vae": "half_channel_vae",  "params_dtype": "dtype",
         "patch_size": "patch_size",              "gated_linear_unit": "gated_ffn",
         "in_channels": "in_channels",            "out_channels": "out_channels",
         "caption_channels": "text_dim",          "caption_max_length": "text_length"},
        fixed={"model_name": "videodit_ardf", "apply_layernorm_1p": True, "t_patch_size": 1,
               "cond_hidden_ratio": 0.25, "xattn_cond_hidden_ratio": 1.0, "cond_gating_ratio": 1.0},
        required=("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
                  "kv_channels", "in_channels", "out_channels", "x_rescale_factor")),
    "runtime_config": Keys(
        {"cfg_number": "cfg_number",              "cfg_t_range": "cfg_t",
         "prev_chunk_scales": "prev_scales",      "text_scales": "text_scales",
         "noise2clean_kvrange": "kv_ranges",      "clean_chunk_kvrange": "clean_kv_range",
         "clean_t": "clean_t",                    "seed": "seed",
         "num_frames": "num_frames",              "fps": "fps",
         "video_size_h": "height",                "video_size_w": "width",
         "num_steps": "num_steps",                "window_size": "window"},
        fixed={"chunk_width": magi.CHUNK, "scale_factor": magi.SCALE_FACTOR,
               "temporal_downsample_factor": magi.FRAMES_PER_LATENT},
        ignored=("t5_pretrained", "t5_device", "vae_pretrained", "load")),          # magi.load takes these
    "engine_config": Keys(
        {"distill": "distilled",                  "distill_nearly_clean_chunk_threshold": "nearly_clean_t",
         "fp8_quant": "fp8",                      "shortcut_mode": "shortcut_mode"},
        ignored=("distributed_backend", "distributed_timeout_minutes", "pp_size", "cp_size", "cp_strategy",
                 "ulysses_overlap_degree", "kv_offload", "enable_cuda_graph")),     # see note_on_gpus
    "config.json": Keys(                                                            # of the VAE, with a part:
        {"ddconfig": "ddconfig"},
        ignored=("_class_name", "_diffusers_version", "model_type"), required=("ddconfig",)),
    "ddconfig": Keys(
        {field.name: field.name for field in dataclasses.fields(VAEConfig)},
        fixed={"double_z": True, "with_cls_token": True, "conv_last_layer": True, "norm_code": False,
               "use_rope": False},
        required=("video_size", "video_length", "patch_size", "patch_length", "z_chans", "embed_dim", "depth",
                  "num_heads")),
}
# fmt: on


def configs_from_upstream(config: dict) -> tuple[DiTConfig, SamplerConfig]:
    """Turn an official JSON into our two configs. Raises ValueError, naming the key, for what is unknown."""
    parts = ("model_config", "runtime_config", "engine_config")
    require(isinstance(config, dict) and config.keys() == {*parts},
            f"an official config has the parts {', '.join(parts)}; this is {str(config)[:60]!r}")
    values = {}
    for part in parts:
        values |= _translate(part, config[part])

    half = values.pop("half_channel_vae", None)
    channels = DiTConfig.latent_channels * (2 if half else 1)
    require(half is None or values["in_channels"] == values["out_channels"] == channels,
            f"half_channel_vae {half} means {channels} channels, but in_channels is {values['in_channels']} "
            f"and out_channels {values['out_channels']}")
    branches = values.pop("cfg_number", None)
    distilled = values.setdefault("distilled", branches == 1)
    require(branches in (None, 1 if distilled else 3), f"cfg_number {branches} does not go with distill "
            f"{distilled}: a base model has 3 branches, a distilled one 1")
    if "dtype" in values:
        values["dtype"] = str(values["dtype"]).removeprefix("torch.")
    values["null_length"] = min(DiTConfig.null_length, values.get("text_length", DiTConfig.text_length))

    in_dit = {field.name for field in dataclasses.fields(DiTConfig)}
    dit = {name: value for name, value in values.items() if name in in_dit}
    sampler = {name: value for name, value in values.items() if name not in in_dit}
    return _build(DiTConfig, dit), _build(SamplerConfig, sampler)


def note_on_gpus(config: dict) -> str:
    """Say how to start on several GPUs, if an official config is for that and this runs on one; else ""."""
    sizes = [config["engine_config"].get(key) for key in ("cp_size", "pp_size")]
    ranks = math.prod(size for size in sizes if type(size) is int)
    note = (f"note: the config is for {ranks} GPUs (cp_size, pp_size); here the launcher sets their number: "
            f"torchrun --nproc_per_node {ranks} sample.py ...")
    return note if ranks > 1 and parallel.ranks() == 1 else ""


def read_official(file: str | Path) -> tuple[dict, DiTConfig, SamplerConfig]:
    """An official JSON as it is, and as our two configs."""
    official = read_json(file)
    with reading("config", file):
        return official, *configs_from_upstream(official)


def official_sampler(file: str | Path, model: Path, dit: DiTConfig, sampler: SamplerConfig
                     ) -> tuple[SamplerConfig, list[str]]:
    """The sampler of an official JSON for a model of ours, whose own configs these are, and notes on what
    else in it does not fit."""
    official, their_dit, theirs = read_official(file)
    notes = []
    if theirs.distilled != sampler.distilled:
        kinds = ("a base model", "a distilled one")
        notes.append(f"note: --config_file describes {kinds[theirs.distilled]}, but "
                     f"{str(model)!r} is {kinds[sampler.distilled]} and is run as such")
    if (their_dit.num_layers, their_dit.hidden_size) != (dit.num_layers, dit.hidden_size):
        notes.append(f"note: only the sampler settings of --config_file are used, it describes another "
                     f"model ({their_dit.num_layers} layers, this one has {dit.num_layers})")
    if on_gpus := note_on_gpus(official):
        notes.append(on_gpus)
    return dataclasses.replace(theirs, distilled=sampler.distilled), notes


def vae_config_from_upstream(config: dict) -> VAEConfig:
    """Turn the VAE's config.json into a VAEConfig. Raises ValueError likewise."""
    ddconfig = _translate("config.json", config)["ddconfig"]
    return _build(VAEConfig, _translate("ddconfig", ddconfig))


def _translate(part: str, values: dict) -> dict:
    """Return the entries of one part of an official config that are fields of ours, under our names."""
    ours, fixed, ignored, required = CONFIG_KEYS[part]
    require(isinstance(values, dict), f"{part} is {values!r}, not a table of keys")
    for key, value in values.items():
        require(key in ours or key in fixed or key in ignored, f"unknown key {part}.{key} ({value!r})")
        require(key not in fixed or value == fixed[key],
                f"{part}.{key} is {value!r}: only {fixed.get(key)!r} is supported")
    for key in required:
        require(key in values, f"{part}.{key} is missing")
    return {ours[key]: value for key, value in values.items() if key in ours}


def _build(kind: type, values: dict) -> DiTConfig | SamplerConfig | VAEConfig:
    try:
        return make_config(kind, values)
    except (TypeError, ArithmeticError) as error:      # a list of numbers may hold text, for example
        raise ValueError(f"bad value in the official config: {error}") from None


# ------------------------------------------------------------------------------------------------------------
# 2  Names
# ------------------------------------------------------------------------------------------------------------
# {} stands for the number of a layer. The last column lists a module's tensors; a name without any is itself
# one. Layers that may be quantised (magi.FP8Linear, "tensor" or "channel") have scales beside their weight.

W, WB = "weight", "weight bias"
T8 = "weight weight_scale input_scale"
C8 = "weight weight_scale input_scale smooth_scale"
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
    "videodit_blocks.layers.{}.self_attention.linear_proj":           ("layers.{}.attn.proj",      C8),
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
TOKEN_ROWS = {                                   # our name -> array of special_tokens.npz, and row in it
    "caption_token":             ("caption_token", 0),    "logo_token":                 ("logo_token", 0),
    "trans_token":               ("other_tokens", 0),     "hq_token":                   ("other_tokens", 1),
    "static_first_frames_token": ("other_tokens", 2),     "dynamic_first_frames_token": ("other_tokens", 3),
    "borderness_token":          ("other_tokens", 4),     "three_d_model_token":        ("other_tokens", 15),
    "two_d_anime_token":         ("other_tokens", 16),
    **{f"duration_token_{i}":     ("other_tokens", 6 + i) for i in range(1, 9)},
}
# fmt: on


def convert_dit(sd: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn official DiT tensors, all or some, into ours: they get other names, fp8 weights lose their leading
    axis, and the columns of attn.proj get another order."""
    for name, tensor in sd.items():
        require(not re.search(r"linear_qkv[^.]*(\.weight)?$", name), f"{name} {list(tensor.shape)} packs q, "
                "k and v in an undocumented order: this is MAGI-1.1, and only MAGI-1 is supported")
    made = {}
    for name, tensor in _rename(sd, DIT_MODULES).items():
        if tensor.dtype == E4M3 and tensor.dim() == 3:
            tensor = tensor.squeeze(0)
        if name.endswith((".attn.proj.weight", ".attn.proj.smooth_scale")):
            require(tensor.dim() > 0 and tensor.shape[-1] % 16 == 0,
                    f"1 tensor(s) of a wrong shape: {name} {list(tensor.shape)} must have 16n columns")
            tensor = self_before_cross(tensor)
        made[name] = tensor
    return made


def self_before_cross(columns: Tensor) -> Tensor:
    """Put the output projection's columns (..., 2*Hq*hd) from the official order into ours.

    The official model was trained 8-way tensor parallel: the part of Wo on each rank saw the self- and the
    cross-attention of the rank's own heads side by side. In our order all of self-attention comes first.
    """
    return rearrange(columns, "... (rank two f) -> ... (two rank f)", rank=8, two=2)


def convert_vae(sd: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn official VAE tensors, all or some, into ours: they get other names."""
    return _rename(sd, VAE_MODULES)


def convert_t5(sd: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keep, of a T5 checkpoint's tensors, all or some, the encoder's, in bf16. Names stay transformers'."""
    for name, tensor in sd.items():
        part = name.split(".")[0]
        require(part in ("shared", "encoder", "decoder", "lm_head") and tensor.is_floating_point(),
                f"{name} ({tensor.dtype}) is not a tensor of a T5 model")
    tied = "encoder.embed_tokens.weight"                 # it equals shared.weight, and transformers ties it
    return {name: tensor.to(torch.bfloat16) for name, tensor in sd.items()
            if name.startswith(("shared.", "encoder.")) and name != tied}


def _rename(sd: dict[str, Tensor], modules: dict[str, tuple[str, str]]) -> dict[str, Tensor]:
    table = {}
    for old, (new, tensors) in modules.items():
        for tensor in tensors.split() or [""]:
            table[f"{old}.{tensor}".rstrip(".")] = f"{new}.{tensor}".rstrip(".")
    number = re.compile(r"(?<=layers\.|blocks\.)[0-9]+")
    unknown = [name for name in sd if number.sub("{}", name) not in table]
    require(not unknown, f"{len(unknown)} unknown tensor(s), such as {unknown[:1]}")
    renamed = {}
    for name, tensor in sd.items():
        ours = table[number.sub("{}", name)]
        renamed[ours.format(*number.findall(name))] = tensor
    return renamed


def special_tokens_from_npz(file: Path, width: int) -> dict[str, Tensor]:
    """Read the learned vectors (1, width) by name. They pass through float16, as in the official code."""
    with reading("special tokens", file), np.load(file, allow_pickle=False) as arrays:
        tokens = {name: arrays[array][row:row + 1] for name, (array, row) in TOKEN_ROWS.items()}
    for name, token in tokens.items():
        require(token.shape == (1, width), f"{file}: {name} is {token.shape}, the model needs {(1, width)}")
        tokens[name] = torch.from_numpy(token.astype(np.float16).astype(np.float32))
    return tokens


# ------------------------------------------------------------------------------------------------------------
# 3  Reading
# ------------------------------------------------------------------------------------------------------------

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
           "F8_E4M3": E4M3, "I64": torch.int64, "U8": torch.uint8}


def open_file(file: Path) -> BinaryIO:
    """Open a stream of bytes, which is decompressed on the way if the file is .zst."""
    if file.suffix != ".zst":
        return open(file, "rb")
    try:
        import zstandard
    except ImportError:
        raise ValueError(f"{file} is compressed: pip install zstandard") from None
    unpack = zstandard.ZstdDecompressor(max_window_size=2**31)               # as `zstd --long=31` needs
    return unpack.stream_reader(open(file, "rb"), read_across_frames=True)   # pzstd writes many frames


def read_header(file: Path) -> dict[str, Tensor]:
    """Read names, shapes and dtypes without the data: a file's tensors on the meta device."""
    if file.suffix == ".bin":
        return load_pickle(file, "meta")
    with open_file(file) as f, reading("weights", file):
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(min(length, 10**8)))  # a corrupt length must not ask for all memory
        header.pop("__metadata__", None)
        size = 8 + length + max(entry["data_offsets"][1] for entry in header.values())
        if file.suffix != ".zst" and file.stat().st_size != size:
            raise EOFError(f"it has {file.stat().st_size:,} bytes, its header says {size:,}")
        return {name: torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]], device="meta")
                for name, entry in header.items()}


def load_pickle(file: Path, device: str) -> dict[str, Tensor]:
    """Read a .bin file, mapped from the disk where its format allows. Nothing in it is executed."""
    with reading("weights", file), warnings.catch_warnings():
        warnings.simplefilter("ignore")                  # torch.load remarks on old pickle protocols
        try:
            mmap = device != "meta" and zipfile.is_zipfile(file)
            sd = torch.load(file, map_location=device, weights_only=True, mmap=mmap)
        except pickle.UnpicklingError:
            sd = None
    require(isinstance(sd, dict) and all(isinstance(v, Tensor) for v in sd.values()),
            f"{file} is not a pickle of plain tensors: other things in it could run code, so it is refused")
    return sd


@contextmanager
def open_weights(file: Path, scratch: Path) -> Iterator[Callable[[str], Tensor]]:
    """Yield a function that reads a tensor by name. A .zst file is unpacked into `scratch` meanwhile."""
    if file.suffix == ".bin":
        yield load_pickle(file, "cpu").__getitem__
        return
    plain = scratch / f"{file.stem}.unpacked" if file.suffix == ".zst" else file
    with reading("weights", file):
        if plain != file:
            with open_file(file) as packed, open(plain, "wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 2**24)
        weights = safe_open(plain, "pt")
    yield weights.get_tensor
    if plain != file:                                    # after an error new_folder removes all of `scratch`
        plain.unlink()


# ------------------------------------------------------------------------------------------------------------
# 4  Writing
# ------------------------------------------------------------------------------------------------------------


def make_plan(files: list[Path], convert: Callable, expected: dict[str, Tensor], folder: Path) -> tuple:
    """Read all headers, check them against `expected` (a meta state dict), and the folder's disk for room.

    Returns reads, (file, official name) file by file, and what they become, {our name: meta tensor}.
    """
    source, sd = {}, {}
    for file in files:
        for name, tensor in read_header(file).items():
            require(name not in source, f"{name} is in {source.get(name)} and again in {file}")
            source[name], sd[name] = file, tensor
    made = convert(sd)
    check(made, expected)
    check_room(folder, sum(tensor.nbytes for tensor in made.values()))
    return [(file, name) for name, file in source.items() if convert({name: sd[name]})], made


def check(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare names, shapes and dtypes both ways. Raises ValueError with the first difference."""
    show = lambda tensor: f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    wanted = {name: show(tensor) for name, tensor in expected.items()}
    have = {name: wanted[name] if name in expected and fits(name, tensor, expected[name]) else show(tensor)
            for name, tensor in found.items()}
    compare_headers(have, wanted, "the weights do not fit the config")


def fits(name: str, found: Tensor, expected: Tensor) -> bool:
    """Tell if a tensor may have this shape and dtype. It is e4m3 exactly where the model's is; else it is the
    model's, float32, or bf16 in the blocks, since official files store even their float32 norms in bf16."""
    allowed = {expected.dtype, torch.float32}
    if name.startswith(("layers.", "final_norm.")) and not name.endswith("_scale"):
        allowed.add(torch.bfloat16)
    if expected.dtype == E4M3:
        allowed = {E4M3}
    return found.shape == expected.shape and found.dtype in allowed


def write_weights(reads: list, made: dict[str, Tensor], convert: Callable, folder: Path) -> None:
    """Stream the tensors of a plan into model.safetensors, or into numbered files with the usual index."""
    from huggingface_hub import split_torch_state_dict_into_shards

    layout = split_torch_state_dict_into_shards(made, max_shard_size=SHARD_BYTES)
    held: dict[str, dict] = {name: {} for name in layout.filename_to_tensors}
    with tqdm(total=len(reads), unit="tensor", desc=folder.stem, disable=None) as bar:
        for file, group in itertools.groupby(reads, key=lambda read: read[0]):
            with open_weights(file, folder) as read:
                for _, official in group:
                    for name, tensor in convert({official: read(official).contiguous()}).items():
                        out = layout.tensor_to_filename[name]
                        held[out][name] = tensor
                        if len(held[out]) == len(layout.filename_to_tensors[out]):
                            # transformers refuses a T5 file that does not tell its format
                            save(held.pop(out), folder / out, {"format": "pt"})
                    bar.update()
    if layout.is_sharded:
        write_json({"metadata": layout.metadata, "weight_map": layout.tensor_to_filename}, folder / INDEX)


def write_json(values: dict, file: Path) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------------------
# 5  Command line
# ------------------------------------------------------------------------------------------------------------


def run_dit(src: Path, out: Path, config: str, special_tokens: Path | None, force: bool) -> None:
    notes = []
    with new_folder(src, out, force) as folder:
        if config in magi.PRESETS:
            cfg, sampler = magi.PRESETS[config]
        else:
            require(Path(config).is_file(), f"config {config!r} is neither a file nor one of "
                    f"{', '.join(magi.PRESETS)}")
            official, cfg, sampler = read_official(config)
            notes.append(note_on_gpus(official))
        tokens = special_tokens_from_npz(special_tokens, cfg.text_dim) if special_tokens else {}
        convert_files(weight_files(src), convert_dit, meta_weights(lambda: magi.DiT(cfg)), folder)
        write_json({"dit": asdict(cfg), "sampler": asdict(sampler)}, folder / "config.json")
        if tokens:
            save(tokens, folder / "special_tokens.safetensors")
        else:
            notes.append(f"note: without --special_tokens, {out} only runs with special_tokens=(), in "
                         f"sample.py --special_tokens none")
    for note in filter(None, notes):
        print(note, file=sys.stderr)


def run_vae(src: Path, out: Path, force: bool) -> None:
    with new_folder(src, out, force) as folder:
        official = read_json(src / "config.json")
        with reading("config", src / "config.json"):
            cfg = vae_config_from_upstream(official)
        files = weight_files(src, "diffusion_pytorch_model.safetensors")
        convert_files(files, convert_vae, meta_weights(lambda: magi.VAE(cfg)), folder)
        write_json({"vae": asdict(cfg)}, folder / "config.json")


def run_t5(src: Path, out: Path, force: bool) -> None:
    from transformers import T5Config, T5EncoderModel  # this takes seconds, so it stands here

    with new_folder(src, out, force) as folder:
        config = read_json(src / "config.json")
        require(isinstance(config, dict) and config.get("model_type") == "t5",
                f"{src / 'config.json'} is not of a T5 model")
        require((src / "spiece.model").is_file(), f"{src / 'spiece.model'} is missing")
        with reading("config", src / "config.json"):
            expected = meta_weights(lambda: T5EncoderModel(T5Config(**config)).to(torch.bfloat16))
        del expected["encoder.embed_tokens.weight"]
        convert_files(text_encoder_files(src), convert_t5, expected, folder)
        write_json(config, folder / "config.json")
        shutil.copyfile(src / "spiece.model", folder / "spiece.model")


def convert_files(files: list[Path], convert: Callable, expected: dict[str, Tensor], folder: Path) -> None:
    reads, made = make_plan(files, convert, expected, folder)
    write_weights(reads, made, convert, folder)


def run_all(src: Path, out: Path, special_tokens: Path | None, force: bool) -> None:
    """Convert all that a ckpt folder holds. A DiT folder's name tells the preset; the headers confirm it."""
    jobs = {}                                            # name in OUT -> official folder, what converts it
    for folder in sorted(src.glob("magi/*/inference_weight*")):
        label = f"{folder.parent.name}/{folder.name}"
        if "1.1" in label:                               # `not_converted` says so
            continue
        size = next((size for size in ("24B", "4.5B") if size in label), "unknown")
        preset = f"{size}-{'distill-fp8' if 'fp8' in label else 'distill' if 'distill' in label else 'base'}"
        require(preset in magi.PRESETS and preset not in jobs, f"which model is {folder}? Use dit")
        jobs[preset] = folder, partial(run_dit, config=preset, special_tokens=special_tokens)
    for name, run, pattern in (("vae", run_vae, "vae/config.json"), ("t5", run_t5, "t5/*/config.json")):
        for file in sorted(src.glob(pattern)):
            jobs.setdefault(name, (file.parent, run))
    skipped = not_converted(src, out, [folder for folder, _ in jobs.values()])
    require(jobs, f"{src} has no magi/*/inference_weight*, vae/config.json or t5/*/config.json to convert"
            + "".join(f"; {line}" for line in skipped))
    for line in skipped:
        print(f"note: {line}", file=sys.stderr)
    for name, (folder, run) in jobs.items():
        if (out / name).exists() and not force:
            print(f"{out / name} exists: skipped (--force converts it again)")
        else:
            run(folder, out / name, force=force)


def not_converted(src: Path, out: Path, converted: list[Path]) -> list[str]:
    """Say of each folder in a download that holds weights, but is not converted, why it is skipped."""
    weights = (".safetensors", ".safetensors.zst", ".bin")
    folders = {file.parent for file in src.rglob("*") if file.name.endswith(weights)} - {src}
    folders |= {folder for folder in src.glob("magi?*") if folder.is_dir()}              # such as magi1.1
    known, lines = [out, *converted], []
    for folder in sorted(folders):
        if any(folder.is_relative_to(other) for other in known):
            continue
        known.append(folder)                             # its subfolders need no line of their own
        why = "it is not one of magi/*/inference_weight*, vae/ and t5/*/, or has no config.json"
        if "1.1" in str(folder.relative_to(src)):
            why = "MAGI-1.1 packs q, k and v in an undocumented order, and only MAGI-1 is supported"
        lines.append(f"{folder} is skipped: {why}")
    return lines


def meta_weights(build: Callable[[], nn.Module]) -> dict[str, Tensor]:
    with torch.device("meta"):
        return build().state_dict()


def quantizer() -> Any:
    """Load tools/quantize.py by its path, since other packages are called `tools` too."""
    return load_module("magi_quantize", Path(__file__).parent / "tools" / "quantize.py")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(description="Turn an official MAGI-1 download into folders of ours.")
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
            command.add_argument("--special_tokens", type=Path, metavar="NPZ", help="special_tokens.npz")
        if name == "dit":
            command.add_argument("--config", required=True, metavar="JSON",
                                 help="the official config, whose values are kept, or a preset: "
                                 + ", ".join(magi.PRESETS))
    text = "one of our model folders to fp8, with calibration by a few sampling runs"
    command = commands.add_parser("quantize", help=text, description=f"Quantise {text}.")
    if argv[:1] == ["quantize"]:
        quantizer().add_flags(command)
    args = vars(parser.parse_args(argv))
    run = args.pop("run")
    return exit_code(lambda: run(**args), stopped="interrupted; what was there before is whole")


if __name__ == "__main__":
    sys.exit(main())
