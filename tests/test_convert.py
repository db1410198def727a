"""Converting official weights: configs, the official zoo, T5, one file in memory at a time, refusals."""

import gc
import io
import json
import os
import shutil
import sys
import weakref
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from common import (
    GOLDENS,
    assert_refused,
    assert_same,
    official_config,
    read_folder,
    run_main,
    train_tokenizer,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor

import checkpoints
import convert_weights as cw
import magi

# -------------------------------------------------------------------------------------------- configs and DiT


MODELS = ("base", "glu", "wide", "fp8")

MODEL, VAE = "model.safetensors", "diffusion_pytorch_model.safetensors"  # official names

EDGE = "videodit_blocks.layers.0.self_attention."  # where refusals are tried


@cache
def official_weights(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDENS / f"{name}.weights.safetensors")


def official_folder(folder: Path, sd: dict, shards: int = 1, zst: str = "", stem: str = MODEL) -> Path:
    """Weights in the official layout: one file, or shards with an index; zst "z." packs every other one."""
    folder.mkdir(parents=True, exist_ok=True)
    names, base = sorted(sd), stem.split(".")[0]
    files = [f"{base}-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)] if shards > 1 else [stem]
    parts = {file: {name: sd[name] for name in names[i::shards]} for i, file in enumerate(files)}
    for i, (file, part) in enumerate(parts.items()):
        save_file(part, folder / file)
        if zst[i % max(1, len(zst)) :][:1] == "z":
            compress(folder / file)
    if shards > 1:
        weight_map = {name: file for file, part in parts.items() for name in part}
        (folder / f"{stem}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def compress(file: Path) -> None:
    """In two frames, as pzstd writes them; the first ends within the header."""
    zstandard = pytest.importorskip("zstandard")
    data, pack = file.read_bytes(), zstandard.ZstdCompressor().compress
    file.with_name(file.name + ".zst").write_bytes(pack(data[:100]) + pack(data[100:]))
    file.unlink()


def official_tokens(file: Path, width: int = 32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.normal(size=(rows, width))
        for name, rows in (("caption_token", 1), ("logo_token", 1), ("other_tokens", 100))
    }
    np.savez(file, **arrays)
    return arrays


def written(path: Path, content: dict | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def assert_unconverted(message: str, command: str, src: Path, out: Path, *more) -> None:
    """Refused in one line that says `message`, and nothing is new at or beside OUT."""
    assert_refused(cw.main, (command, src, out, *more), message, out=out)


def loaded(make, folder: Path) -> torch.nn.Module:
    return checkpoints.fill(checkpoints.build(make, folder), folder)


@pytest.mark.parametrize("name", MODELS)
def test_any_part_of_a_checkpoint_converts_like_the_whole(name):
    sd = official_weights(name)
    cfg, _ = cw.configs_from_upstream(official_config(name))
    whole = cw.convert_dit(sd)
    magi.DiT(cfg).load_state_dict(whole, strict=True)
    assert_same(whole, {k: v for old, t in sd.items() for k, v in cw.convert_dit({old: t}).items()})
    assert all(v.dim() == 2 for v in whole.values() if v.dtype == cw.E4M3)
    assert len(whole) == len(sd)


@pytest.mark.parametrize(
    "layout",
    [dict(), dict(zst="z"), dict(shards=4), dict(shards=5, zst="z."), dict(shards=3, zst="z")],
    ids=["one", "one zst", "parts", "mixed", "zst"],
)
@pytest.mark.parametrize("name", MODELS)
def test_official_dit_folder_becomes_ours(name, layout, tmp_path):
    src = official_folder(tmp_path / "inference_weight", official_weights(name), **layout)
    config = written(tmp_path / "official.json", official_config(name))
    arrays, files = official_tokens(tmp_path / "t.npz"), sorted(src.iterdir())
    out = tmp_path / "models" / name
    code, said, err = run_main(
        cw.main, "dit", src, out, "--config", config, "--special_tokens", tmp_path / "t.npz"
    )
    assert code == 0 and said.startswith(f"wrote {out}: 0.00") and said.endswith("in 3 files\n") and err == ""
    assert {f.name for f in out.iterdir()} == {"config.json", MODEL, "special_tokens.safetensors"}
    assert sorted(src.iterdir()) == files and [f.name for f in out.parent.iterdir()] == [name]

    # What comes back is the config and, bit for bit, the tensors.
    cfg, sampler = cw.configs_from_upstream(official_config(name))
    assert magi.read_config(out, "dit", magi.DiTConfig) == cfg
    assert magi.read_config(out, "sampler", magi.SamplerConfig) == sampler
    assert_same(read_folder(out), cw.convert_dit(official_weights(name)))
    loaded(lambda: magi.DiT(cfg), out)
    tokens = load_file(out / "special_tokens.safetensors")
    assert tokens.keys() == load_file(GOLDENS / f"{name}.special_tokens.safetensors").keys()
    rows = {
        "trans": 0,
        "hq": 1,
        "static_first_frames": 2,
        "dynamic_first_frames": 3,
        "borderness": 4,
        "three_d_model": 15,
        "two_d_anime": 16,
    }  # the spec's table
    rows = {f"{k}_token": i for k, i in rows.items()} | {f"duration_token_{i}": 6 + i for i in range(1, 9)}
    want = {key: arrays["other_tokens"][[i]] for key, i in rows.items()}
    want |= {key: arrays[key] for key in ("caption_token", "logo_token")}
    assert_same(tokens, {key: torch.from_numpy(v).half().float() for key, v in want.items()})


def test_config_of_each_golden():
    dit, sampler = cw.configs_from_upstream(official_config("glu"))
    assert dit == magi.DiTConfig(
        num_layers=3,
        hidden_size=64,
        num_heads=8,
        num_kv_heads=8,
        head_dim=8,
        ffn_size=96,
        gated_ffn=True,
        in_channels=32,
        out_channels=32,
        x_scale=0.1,
        text_dim=32,
        text_length=64,
        dtype="float32",
    )
    assert sampler == magi.SamplerConfig(num_steps=16, height=32, width=48, seed=1)
    dit, sampler = cw.configs_from_upstream(official_config("fp8", noise2clean_kvrange=[], window_size=2))
    assert dit.fp8 and dit.dtype == "bfloat16" and type(dit.x_scale) is float
    assert sampler.distilled and sampler.kv_ranges == () and sampler.window == 2 and sampler.num_frames == 72
    assert cw.vae_config_from_upstream(official_config("vae")) == magi.VAEConfig(
        video_size=32,
        video_length=8,
        patch_size=4,
        z_chans=4,
        embed_dim=64,
        depth=2,
        num_heads=4,
        mlp_ratio=2,
    )


def test_what_an_official_config_may_leave_out():
    config = official_config("base")
    required = cw.CONFIG_KEYS["model_config"].required
    config["model_config"] = {k: v for k, v in config["model_config"].items() if k in required}
    config["runtime_config"], config["engine_config"] = {}, {}
    dit, sampler = cw.configs_from_upstream(config)
    assert dit == magi.DiTConfig(
        num_layers=3, hidden_size=64, ffn_size=128, num_heads=8, num_kv_heads=4, head_dim=8
    )
    assert sampler == magi.SamplerConfig()
    config["runtime_config"] = {"cfg_number": 1}
    assert cw.configs_from_upstream(config)[1].distilled
    config["model_config"]["caption_max_length"] = 32  # fewer than the 50 rows of null text
    assert cw.configs_from_upstream(config)[0].null_length == 32
    ddconfig = json.loads((GOLDENS / "manifests.json").read_text())["vae"]["ddconfig"]
    assert cw.vae_config_from_upstream({"ddconfig": ddconfig}) == magi.VAEConfig()


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("base", dict(new_key=1), "unknown key model_config.new_key"),
        ("base", dict(cond_hidden_ratio=0.5), "cond_hidden_ratio is 0.5: only 0.25 is supported"),
        ("base", dict(cond_gating_ratio=0.5), "cond_gating_ratio"),
        ("base", dict(xattn_cond_hidden_ratio=2.0), "xattn_cond_hidden_ratio"),
        ("base", dict(apply_layernorm_1p=False), "apply_layernorm_1p"),
        ("base", dict(t_patch_size=2), "t_patch_size"),
        ("base", dict(model_name="videodit_ardf2"), "model_name"),
        ("base", dict(chunk_width=8), "chunk_width"),
        ("base", dict(scale_factor=0.2), "scale_factor"),
        ("base", dict(temporal_downsample_factor=8), "temporal_downsample_factor"),
        ("base", dict(cfg_number=1), "cfg_number 1 does not go with distill False"),
        ("fp8", dict(cfg_number=3), "cfg_number 3 does not go with distill True"),
        ("base", dict(cfg_number=2), "cfg_number 2"),
        (
            "base",
            dict(half_channel_vae=True),
            "half_channel_vae True means 32 channels, but in_channels is 16",
        ),
        ("glu", dict(half_channel_vae=False), "half_channel_vae False means 16 channels"),
        ("base", dict(num_layers="3"), "num_layers is '3': it must be of type int"),
        ("base", dict(noise2clean_kvrange=[5, "4", 3, 2]), "(5, '4', 3, 2) must all be whole numbers"),
        ("base", dict(text_scales=["7.5", 7.5, 7.5, 0, 0]), "bad value"),
        ("base", dict(params_dtype="torch.int8"), "dtype 'int8'"),
        ("base", dict(num_steps=15), "steps 15 must be a multiple of the window 4"),
        ("vae", dict(ddconfig=[]), "ddconfig is []"),
        ("vae", dict(norm_code=True), "ddconfig.norm_code is True: only False is supported"),
        ("vae", dict(use_rope=True), "use_rope"),
        ("vae", dict(double_z=False), "double_z"),
        ("vae", dict(with_cls_token=False), "with_cls_token"),
        ("vae", dict(conv_last_layer=False), "conv_last_layer"),
    ],
)
def test_configs_we_do_not_support_are_refused_by_name(name, change, message):
    convert = cw.vae_config_from_upstream if name == "vae" else cw.configs_from_upstream
    with pytest.raises(ValueError) as error:
        convert(official_config(name, **change))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_config_parts_and_keys_must_all_be_known_and_there():
    for part in ("model_config", "runtime_config", "engine_config"):
        config = official_config("base")
        config[part]["surprise"] = 1
        with pytest.raises(ValueError, match=f"unknown key {part}.surprise"):
            cw.configs_from_upstream(config)
        with pytest.raises(ValueError, match="has the parts"):
            cw.configs_from_upstream({k: v for k, v in config.items() if k != part})
    for name, part, convert in (
        ("base", "model_config", cw.configs_from_upstream),
        ("vae", "ddconfig", cw.vae_config_from_upstream),
    ):
        for key in cw.CONFIG_KEYS[part].required:
            config = official_config(name)
            del config[part][key]
            with pytest.raises(ValueError, match=f"{part}.{key} is missing"):
                convert(config)
    for config in ({"ddconfig": {"video_size": 32, "what": 1}}, {"ddconfig": {}, "what": 1}):
        with pytest.raises(ValueError, match="unknown key .*what"):
            cw.vae_config_from_upstream(config)


# ------------------------------------------------------------------------------------------- the official zoo


def manifest(name: str) -> dict[str, torch.Tensor]:
    """Every tensor of an official checkpoint, by official name, on the meta device."""
    m, full = json.loads((GOLDENS / "manifests.json").read_text())[name], {}
    full |= m["model"]
    for i in range(m.get("num_layers", 0)):
        kind = "first_and_last_layer" if i in (0, m["num_layers"] - 1) else "middle_layers"
        full |= {f"videodit_blocks.layers.{i}.{k}": v for k, v in m[kind].items()}
    for side in ("encoder", "decoder"):
        for i in range(m["ddconfig"]["depth"] if name == "vae" else 0):
            full |= {f"{side}.blocks.{i}.{k}": v for k, v in m["block"].items()}
    assert len(full) == m["tensors"]
    with torch.device("meta"):
        return {k: torch.empty(shape, dtype=getattr(torch, dtype)) for k, (shape, dtype) in full.items()}


def assert_official(found: dict, expected: dict, parameters: int) -> None:
    cw.check(found, expected)
    e4m3 = lambda sd: {k: (v.shape, v.dtype == torch.float8_e4m3fn) for k, v in sd.items()}
    assert e4m3(found) == e4m3(expected) and sum(v.numel() for v in found.values()) == parameters


@pytest.mark.parametrize("name", [name for name in magi.PRESETS if name != "tiny"])
def test_every_preset_has_exactly_the_official_tensors(name):
    kind = name.replace("-base", "").replace("-distill", "")
    count = {
        "4.5B": 4_459_898_128,
        "4.5B-fp8": 4_460_979_760,
        "24B": 23_899_281_936,
        "24B-fp8": 23_902_014_382,
    }
    expected = cw.meta_weights(lambda: magi.DiT(magi.PRESETS[name].dit))
    assert_official(cw.convert_dit(manifest(kind)), expected, count[kind])


def test_vae_has_exactly_the_official_tensors():
    expected = cw.meta_weights(lambda: magi.VAE(magi.VAEConfig()))
    assert_official(cw.convert_vae(manifest("vae")), expected, 613_755_239)


def test_names_are_one_to_one():
    for name, convert in (("24B-fp8", cw.convert_dit), ("vae", cw.convert_vae)):
        assert len(convert(manifest(name))) == len(manifest(name))


# ----------------------------------------------------------------------------------------------- VAE, T5, all


@pytest.mark.parametrize("layout", [dict(), dict(shards=2, zst=".z")], ids=["single", "shards"])
def test_official_vae_folder_becomes_ours(layout, tmp_path):
    src = official_folder(tmp_path / "vae", official_weights("vae"), **layout, stem=VAE)
    written(src / "config.json", official_config("vae"))
    code, said, _ = run_main(cw.main, "vae", src, tmp_path / "out")
    assert code == 0 and "in 2 files" in said
    cfg = magi.read_config(tmp_path / "out", "vae", magi.VAEConfig)
    assert cfg == cw.vae_config_from_upstream(official_config("vae"))
    assert_same(read_folder(tmp_path / "out"), cw.convert_vae(official_weights("vae")))
    vae = loaded(lambda: magi.VAE(cfg), tmp_path / "out")
    run = load_file(GOLDENS / "vae.safetensors")
    torch.testing.assert_close(vae.encode(run["0.video"], tile=None), run["0.latent"], rtol=1e-4, atol=1e-4)


def test_optional_vae_modules_have_names_too():
    sd = dict(official_weights("vae"))
    sd |= {
        "decoder.final_proj.weight": torch.zeros(256, 64),
        "decoder.final_proj.bias": torch.zeros(256),
        "decoder.final_norm.weight": torch.ones(256),
        "decoder.final_norm.bias": torch.zeros(256),
        "decoder.last_layer.weight": torch.zeros(3, 4, 3, 3, 3),
    }
    for side in ("encoder", "decoder"):
        for i in range(2):
            sd |= {f"{side}.blocks.{i}.norm1.{kind}": torch.ones(64) for kind in ("weight", "bias")}
    cfg = cw.vae_config_from_upstream(official_config("vae", use_final_proj=True, ln_in_attn=False))
    magi.VAE(cfg).load_state_dict(cw.convert_vae(sd), strict=True)


@cache
def official_t5() -> tuple[object, bytes]:
    """A tiny T5 with its decoder, and a tokenizer trained for it."""
    from transformers import T5Config, T5ForConditionalGeneration

    model = io.BytesIO()
    lines = ["a red ball rolls", "the blue cat sleeps", "a cat on the ball"] * 20
    train_tokenizer(lines, model_writer=model, vocab_size=40)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return T5ForConditionalGeneration(config).eval(), model.getvalue()


def official_t5_folder(folder: Path, shards: int = 1, legacy: bool = False, keep: tuple = ()) -> Path:
    """pytorch_model*.bin of 2020: tied tensors twice, decoder and all, or only names that begin with keep."""
    model, tokenizer = official_t5()
    sd = {k: v.clone() for k, v in model.state_dict().items() if not keep or k.startswith(keep)}
    written(folder / "spiece.model", tokenizer)
    written(folder / "config.json", model.config.to_dict())
    files = ["pytorch_model.bin"] if shards == 1 else [f"pytorch_model-{i:05}.bin" for i in range(shards)]
    for i, file in enumerate(files):
        part = {k: sd[k] for k in list(sd)[i::shards]}
        torch.save(part, folder / file, _use_new_zipfile_serialization=not legacy)
    if shards > 1:
        weight_map = {k: files[i % shards] for i, k in enumerate(sd)}
        written(folder / "pytorch_model.bin.index.json", {"weight_map": weight_map})
    return folder


@pytest.mark.parametrize(
    "layout",
    [{}, dict(shards=3), dict(legacy=True), dict(keep=("shared", "encoder"))],
    ids=["single", "shards", "legacy", "encoder"],
)
def test_official_t5_folder_becomes_ours(layout, tmp_path):
    src, out = official_t5_folder(tmp_path / "official", **layout), tmp_path / "t5"
    code, said, err = run_main(cw.main, "t5", src, out)
    assert code == 0 and "in 3 files" in said and err == "", err
    assert {f.name for f in out.iterdir()} == {"config.json", "model.safetensors", "spiece.model"}
    sd = read_folder(out)
    assert cw.safe_open(out / MODEL, "pt").metadata() == {"format": "pt"}  # transformers looks for it
    assert all(v.dtype == torch.bfloat16 for v in sd.values()) and "encoder.embed_tokens.weight" not in sd
    assert sd.keys() == {
        k for k in official_t5()[0].state_dict() if k.startswith(("shared.", "encoder."))
    } - {"encoder.embed_tokens.weight"}

    # It runs, and gives what the official weights give, to the precision of bf16.
    text, mask = magi.T5(out, length=30)(["a red ball on the cat"], clean=False)
    ids = SentencePieceProcessor(model_file=str(out / "spiece.model")).encode("a red ball on the cat") + [1]
    want = official_t5()[0].encoder(torch.tensor([ids])).last_hidden_state[0].detach()
    assert mask.sum() == len(ids) and (text[0, : len(ids)] - want).norm() < 0.02 * want.norm()


def test_safetensors_t5_and_our_own_output_convert_too(tmp_path):
    src = official_t5_folder(tmp_path / "official")
    assert run_main(cw.main, "t5", src, tmp_path / "once")[0] == 0
    assert run_main(cw.main, "t5", tmp_path / "once", tmp_path / "twice")[0] == 0
    assert_same(read_folder(tmp_path / "once"), read_folder(tmp_path / "twice"))


def test_a_whole_download_at_once(tmp_path, monkeypatch):
    # The goldens pose as presets: the real ones are too large for a test.
    for preset, name in (("4.5B-base", "base"), ("4.5B-distill", "wide"), ("4.5B-distill-fp8", "fp8")):
        dit, sampler = cw.configs_from_upstream(official_config(name))
        monkeypatch.setitem(magi.PRESETS, preset, magi.Preset(dit=dit, sampler=sampler))
    ckpt, out = tmp_path / "ckpt", tmp_path / "models"
    official_folder(ckpt / "magi/4.5B_base/inference_weight", official_weights("base"))
    official_folder(ckpt / "magi/4.5B_distill/inference_weight.distill", official_weights("wide"), 2, "z")
    official_folder(ckpt / "magi/4.5B_distill_quant/inference_weight.fp8.distill", official_weights("fp8"))
    official_folder(ckpt / "vae", official_weights("vae"), stem=VAE)
    written(ckpt / "vae/config.json", official_config("vae"))
    official_t5_folder(ckpt / "t5/t5-v1_1-xxl")
    official_tokens(tmp_path / "special_tokens.npz")
    code, said, err = run_main(cw.main, "all", ckpt, out, "--special_tokens", tmp_path / "special_tokens.npz")
    assert code == 0 and said.count("wrote") == 5 and err == "", err
    assert {f.name for f in out.iterdir()} == {"4.5B-base", "4.5B-distill", "4.5B-distill-fp8", "vae", "t5"}
    pipe = magi.load(out / "4.5B-base")
    assert pipe.encode_text and pipe.special_tokens["hq_token"].shape == (1, 32)

    shutil.rmtree(out / "vae")  # a second run does only what is missing
    code, said, _ = run_main(cw.main, "all", ckpt, out)
    assert code == 0 and said.count("skipped") == 4 and said.count("wrote") == 1
    assert_unconverted("nothing", "all", tmp_path / "nothing", tmp_path / "x")
    official_folder(ckpt / "magi/7B_base/inference_weight", official_weights("base"))
    assert_unconverted("which model is", "all", ckpt, tmp_path / "x")


def test_all_with_force_converts_again(tmp_path):
    vae = official_folder(tmp_path / "ckpt" / "vae", official_weights("vae"), stem=VAE)
    written(vae / "config.json", official_config("vae"))
    args = "all", tmp_path / "ckpt", tmp_path / "out"
    assert run_main(cw.main, *args)[0] == 0
    old = written(tmp_path / "out" / "vae" / "old", b"")
    code, said, _ = run_main(cw.main, *args, "--force")
    assert code == 0 and "wrote" in said and not old.exists()


# ------------------------------------------------------------------------------- one file in memory at a time


@pytest.mark.parametrize("zst", ["", "z"], ids=["plain", "zst"])
def test_never_more_than_an_input_and_an_output_file_in_memory(zst, tmp_path, monkeypatch):
    cfg, _ = cw.configs_from_upstream(official_config("base", num_layers=12))
    base = official_weights("base")  # twelve layers out of three
    sd = {k: v for k, v in base.items() if ".layers." not in k}
    for k, v in base.items():
        sd |= {k.replace(".1.", f".{i}."): v.clone() for i in range(12) if ".layers.1." in k}
    src = official_folder(tmp_path / "src", sd, shards=10, zst=zst)
    total, limit = sum(v.nbytes for v in sd.values()), 250_000
    monkeypatch.setattr(cw, "SHARD_BYTES", limit)
    monkeypatch.setitem(magi.PRESETS, "test", magi.Preset(dit=cfg, sampler=magi.SamplerConfig()))

    live, peak, unpacked, reads = [], [0], [], []
    convert, header = cw.convert_dit, cw.read_header

    def counting(part: dict) -> dict:
        out = convert(part)
        if not any(v.is_meta for v in part.values()):
            live[:] = [ref for ref in live if ref() is not None] + [weakref.ref(v) for v in out.values()]
            peak[0] = max(peak[0], sum(ref().nbytes for ref in live))
            unpacked.append(len(list((tmp_path / "out.partial").glob("*.unpacked"))))
            assert not (tmp_path / "out").exists()
            reads.append("data")
        return out

    monkeypatch.setattr(cw, "convert_dit", counting)
    monkeypatch.setattr(cw, "read_header", lambda file: (reads.append("header"), header(file))[1])
    code, _, err = run_main(cw.main, "dit", src, tmp_path / "out", "--config", "test")
    assert code == 0, err
    gc.collect()
    assert total > 5 * limit and limit / 2 < peak[0] <= limit, (total, peak)  # one output file, no more
    assert reads == ["header"] * 10 + ["data"] * len(sd)  # planned before data is read
    assert set(unpacked) == {1 if zst else 0}

    files = checkpoints.weight_files(tmp_path / "out")
    names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    assert 5 < len(files) <= 2 * total / limit + 1 and [f.name for f in files] == names
    assert {f.name for f in (tmp_path / "out").iterdir()} == {*names, cw.INDEX, "config.json"}
    assert all(sum(v.nbytes for v in load_file(f).values()) <= limit for f in files)
    index = json.loads((tmp_path / "out" / cw.INDEX).read_text())
    assert index["metadata"]["total_size"] == total
    assert all(index["weight_map"][k] == f.name for f in files for k in load_file(f))
    assert_same(read_folder(tmp_path / "out"), convert(sd))
    loaded(lambda: magi.DiT(cfg), tmp_path / "out")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left")], ids=["Ctrl-C", "disk"])
def test_an_interrupted_run_leaves_nothing_that_looks_finished(error, tmp_path, monkeypatch):
    src = official_folder(tmp_path / "src", official_weights("base"), shards=3, zst="z")
    out, partial = tmp_path / "models" / "base", tmp_path / "models" / "base.partial"
    args = "dit", src, out, "--config", written(tmp_path / "c.json", official_config("base"))
    written(partial / "precious", b"of somebody else")
    code, _, err = run_main(cw.main, *args)
    assert code == 2 and "not ours" in err and (partial / "precious").exists()
    (partial / "precious").rename(partial / "junk.safetensors")  # of a run that was killed
    saved = []

    def save_one(*args, **more):
        saved.append(args)
        if len(saved) == 2:
            assert partial.is_dir() and not (partial / "junk.safetensors").exists()
            raise error
        save_file(*args, **more)

    def interrupted(*more) -> None:
        saved.clear()
        with monkeypatch.context() as m:
            m.setattr(cw, "save", save_one)
            m.setattr(cw, "SHARD_BYTES", 200_000)
            code, _, err = run_main(cw.main, *args, *more)
            expected, said = (2, "No space left") if isinstance(error, OSError) else (130, "interrupted")
            assert code == expected and said in err
        assert len(saved) == 2 and not partial.exists()

    interrupted()
    assert not out.exists()
    assert run_main(cw.main, *args)[0] == 0
    before = read_folder(out)
    interrupted("--force")  # what was there stays
    assert_same(read_folder(out), before)


def test_existing_folders_are_replaced_only_when_told_and_only_models(tmp_path):
    src = official_folder(tmp_path / "src", official_weights("base"))
    config, out = written(tmp_path / "c.json", official_config("base")), tmp_path / "out"
    args = "dit", src, out, "--config", config
    assert run_main(cw.main, *args)[0] == 0
    assert_unconverted("exists: choose another folder, or add --force", *args)
    written(out / "old", b"")
    assert run_main(cw.main, *args, "--force")[0] == 0 and not (out / "old").exists()
    (tmp_path / "photos").mkdir()
    assert_unconverted("not a model folder", "dit", src, tmp_path / "photos", "--config", config, "--force")
    vae = official_folder(tmp_path / "vae", official_weights("vae"), stem=VAE)
    written(vae / "config.json", official_config("vae"))
    assert_unconverted("holds the source", "vae", vae, vae, "--force")  # it looks like a model of ours
    assert (vae / VAE).is_file()


# -------------------------------------------------------------------------------------------- what is refused


def changed(name: str, **changes) -> dict[str, torch.Tensor]:
    """Official weights with entries set, or removed (None), in the first layer's attention."""
    sd = dict(official_weights(name))
    for key, value in changes.items():
        sd[EDGE + key.replace("__", ".")] = value
    return {k: v for k, v in sd.items() if v is not None}


Q = "linear_qkv__q__weight"

REFUSED_WEIGHTS = [
    (dict(linear_qkv=torch.zeros(3, 224, 64)), "linear_qkv [3, 224, 64] packs q, k and v"),
    (dict(what=torch.ones(1), linear_qkv__weight=torch.zeros(224, 64)), "this is MAGI-1.1"),
    (dict(linear_qkv__w=torch.zeros(2)), "1 unknown tensor(s), such as ['videodit_blocks.layers.0.self"),
    (dict(linear_qkv__q__weight_scale=torch.ones(1)), "unknown 1 tensor(s), such as 'layers.0.attn.q.w"),
    (dict(linear_qkv__qx__weight=None), "lacks 1 tensor(s), such as 'layers.0.attn.qx.weight'"),
    ({Q: torch.zeros(64, 65)}, "'layers.0.attn.q.weight' (float32 [64, 65], not float32 [64, 64])"),
    ({Q: torch.zeros(1, 64, 64).to(torch.float8_e4m3fn)}, "attn.q.weight' (float8_e4m3fn [64, 64], not"),
    ({Q: torch.zeros(64, 64, dtype=torch.int64)}, "attn.q.weight' (int64 [64, 64], not float32 [64, 64])"),
    ({Q: torch.zeros(64, 64, dtype=torch.int16)}, "damaged or of another kind: KeyError: 'I16'"),
]


@pytest.mark.parametrize("changes, message", REFUSED_WEIGHTS, ids=[message for _, message in REFUSED_WEIGHTS])
def test_weights_that_are_not_understood_are_refused_in_one_line(changes, message, tmp_path):
    src = official_folder(tmp_path / "src", changed("base", **changes))
    config = written(tmp_path / "c.json", official_config("base"))
    assert_unconverted(message, "dit", src, tmp_path / "out", "--config", config)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    sd, out = official_weights("fp8"), tmp_path / "out"
    src, config = official_folder(tmp_path / "fp8", sd), written(tmp_path / "c.json", official_config("fp8"))
    plain = written(tmp_path / "plain.json", official_config("fp8", fp8_quant=False))
    assert_unconverted("do not fit the config", "dit", src, out, "--config", "4.5B-distill-fp8")
    assert_unconverted("has unknown 32 tensor(s)", "dit", src, out, "--config", plain)
    full = {k: v[0].bfloat16() if v.dtype == torch.float8_e4m3fn else v for k, v in sd.items()}
    src = official_folder(tmp_path / "full", full)
    assert_unconverted("(bfloat16 [32, 64], not float8_e4m3fn [32, 64])", "dit", src, out, "--config", config)
    low = {k: v.bfloat16() if k.endswith("weight_scale") else v for k, v in sd.items()}
    src = official_folder(tmp_path / "low", low)  # scales in bf16 would be off by up to 0.4 %
    assert_unconverted("weight_scale' (bfloat16 [1], not float32 [1])", "dit", src, out, "--config", config)


def test_norms_may_be_bf16_and_stay_so(tmp_path):
    sd = {k: v.bfloat16() if "norm" in k else v for k, v in official_weights("fp8").items()}
    src, out = official_folder(tmp_path / "src", sd), tmp_path / "out"
    config = written(tmp_path / "c.json", official_config("fp8"))
    assert run_main(cw.main, "dit", src, out, "--config", config)[0] == 0
    assert load_file(out / "model.safetensors")["layers.0.attn.q_norm.weight"].dtype == torch.bfloat16


def broken_file(how: str, src: Path) -> None:
    """Damage a folder of three shards, the second of which is compressed."""
    first, second = src / "model-00001-of-00003.safetensors", src / "model-00002-of-00003.safetensors.zst"
    index = src / "model.safetensors.index.json"
    data = first.read_bytes()
    if how == "truncated":
        first.write_bytes(data[:-100])
    elif how == "longer":
        first.write_bytes(data + b"0")
    elif how == "empty":
        first.write_bytes(b"")
    elif how == "header length":
        first.write_bytes(b"\xff" * 8 + data[8:])
    elif how == "header text":
        first.write_bytes(data[:20] + b"\x00" + data[21:])
    elif how == "header not a table":
        first.write_bytes(b"\x02" + b"\x00" * 7 + b"[]")
    elif how == "zst truncated":
        second.write_bytes(second.read_bytes()[:-100])
    elif how == "zst garbage":
        second.write_bytes(b"no zstandard at all")
    elif how == "shard missing":
        second.unlink()
    elif how == "all missing":
        shutil.rmtree(src)
    elif how == "index not json":
        index.write_text("{")
    elif how == "index empty":
        index.write_text("{}")
    elif how == "index of numbers":
        index.write_text('{"weight_map": {"x": 1}}')
    elif how == "tensor twice":
        save_file(load_file(first) | load_file(src / "model-00003-of-00003.safetensors"), first)


FIRST, SECOND = "model-00001-of-00003.safetensors'", "model-00002-of-00003.safetensors.zst'"


@pytest.mark.parametrize(
    "how, message",
    [
        ("truncated", "bytes, its header says"),
        ("longer", "bytes, its header says"),
        ("empty", FIRST),
        ("header length", FIRST),
        ("header text", FIRST),
        ("header not a table", FIRST),
        ("zst truncated", SECOND),
        ("zst garbage", SECOND),
        ("shard missing", "1 of 3 files are missing"),
        ("all missing", "no weights in"),
        ("index not json", "index.json'"),
        ("index empty", "index.json is no index of weights"),
        ("index of numbers", "1 of 1 files are missing"),
        ("tensor twice", "and again in"),
    ],
)
def test_broken_downloads_are_refused_in_one_line(how, message, tmp_path):
    src = official_folder(tmp_path / "src", official_weights("base"), shards=3, zst=".z.")
    broken_file(how, src)
    config = written(tmp_path / "c.json", official_config("base"))
    if message.endswith("'"):
        message += ", damaged or of another kind: "
    assert_unconverted(message, "dit", src, tmp_path / "out", "--config", config)


def test_an_index_may_name_the_compressed_files(tmp_path):
    src = official_folder(tmp_path / "src", official_weights("base"), shards=2, zst="z")
    index = src / cw.INDEX
    index.write_text(index.read_text().replace('.safetensors"', '.safetensors.zst"'))
    config = written(tmp_path / "c.json", official_config("base"))
    assert run_main(cw.main, "dit", src, tmp_path / "out", "--config", config)[0] == 0


def test_compressed_files_without_zstandard_name_the_package(tmp_path, monkeypatch):
    src = official_folder(tmp_path / "src", official_weights("base"), zst="z")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    config = written(tmp_path / "c.json", official_config("base"))
    assert_unconverted("pip install zstandard", "dit", src, tmp_path / "out", "--config", config)


class Malice:
    """Pickles as a call that makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("malice",)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"shared.weight": Malice()}, "not a pickle of plain tensors"),
        ({"shared.weight": 3}, "not a pickle of plain tensors"),
        ([torch.zeros(3)], "not a pickle of plain tensors"),
        ({"model": {"shared.weight": torch.zeros(3)}}, "not a pickle of plain tensors"),
        ({"shared.weight": torch.zeros(64, 32, dtype=torch.int64)}, "not a tensor of a T5 model"),
        ({"visual.weight": torch.zeros(3)}, "visual.weight (torch.float32) is not a tensor of a T5 model"),
        ({"shared.weight": torch.zeros(64, 32)}, "such as 'encoder.block.0"),
        (b"PK\x03\x04 cut", "damaged or of another kind"),
        (b"", "damaged or of another kind"),
    ],
)
def test_pickles_that_are_not_plain_tensors_of_a_t5_are_refused(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    src = official_t5_folder(tmp_path / "src")
    if isinstance(content, bytes):
        written(src / "pytorch_model.bin", content)
    else:
        torch.save(content, src / "pytorch_model.bin")
    assert_unconverted(message, "t5", src, tmp_path / "out")
    assert not Path("malice").exists()


def test_incomplete_t5_and_vae_folders_are_refused(tmp_path):
    src = official_t5_folder(tmp_path / "t5")
    written(src / "config.json", {"model_type": "umt5"})
    assert_unconverted("is not of a T5 model", "t5", src, tmp_path / "out")
    written(src / "config.json", {"model_type": "t5", "d_model": "wide"})
    assert_unconverted("config.json', damaged or of another kind", "t5", src, tmp_path / "out")
    (src / "spiece.model").unlink()
    assert_unconverted("spiece.model is missing", "t5", src, tmp_path / "out")
    (src / "config.json").unlink()
    assert_unconverted("config.json", "t5", src, tmp_path / "out")
    vae = official_folder(tmp_path / "vae", official_weights("vae"), stem=VAE)
    assert_unconverted("config.json", "vae", vae, tmp_path / "out")
    written(vae / "config.json", official_config("vae", use_rope=True))
    assert_unconverted("ddconfig.use_rope is True: only False is supported", "vae", vae, tmp_path / "out")
    written(vae / "config.json", official_config("vae", depth=3))
    assert_unconverted(
        "lacks 20 tensor(s), such as 'decoder.blocks.2.fc1.bias'", "vae", vae, tmp_path / "out"
    )


def test_special_tokens_are_checked_before_anything_is_written(tmp_path):
    src = official_folder(tmp_path / "src", official_weights("base"))
    config = written(tmp_path / "c.json", official_config("base"))
    args = "dit", src, tmp_path / "out", "--config", config, "--special_tokens", tmp_path / "t.npz"
    assert_unconverted("t.npz", *args)
    official_tokens(tmp_path / "t.npz", width=33)
    assert_unconverted("(1, 33), the model needs (1, 32)", *args)
    one = np.zeros((1, 32))
    np.savez(tmp_path / "t.npz", caption_token=one, logo_token=one, other_tokens=np.zeros((16, 32)))
    assert_unconverted("the model needs (1, 32)", *args)
    np.savez(tmp_path / "t.npz", caption_token=np.array([Malice()], dtype=object))
    assert_unconverted("Object arrays cannot be loaded", *args)
    written(tmp_path / "t.npz", b"PK")
    assert_unconverted("cannot read special tokens", *args)
    code, _, err = run_main(cw.main, *args[:5])
    assert code == 0 and "only runs with special_tokens=()" in err


@settings(max_examples=12)
@given(data=st.data())
def test_any_single_wrong_tensor_is_caught(data, tmp_path_factory):
    name = data.draw(st.sampled_from(("base", "fp8", "vae")))
    sd = dict(official_weights(name))
    victim = data.draw(st.sampled_from(sorted(sd)))
    tensor = sd.pop(victim)
    how = data.draw(st.sampled_from(("dropped", "renamed", "longer", "flatter", "retyped")))
    if how == "renamed":
        sd[data.draw(st.sampled_from((victim + "_", "x." + victim, victim[:-1])))] = tensor
    elif how == "longer":
        sd[victim] = torch.cat([tensor.view(torch.uint8)] * 2, dim=0).view(tensor.dtype)
    elif how == "flatter":
        sd[victim] = tensor[None] if tensor.dim() == 1 else tensor.flatten().clone()
    elif how == "retyped":
        sd[victim] = tensor.view(torch.uint8)
    tmp = tmp_path_factory.mktemp("wrong")
    src = official_folder(tmp / "src", sd, stem=VAE if name == "vae" else MODEL)
    config = written(src / "config.json", official_config(name))
    args = ["vae", src, tmp / "out"] if name == "vae" else ["dit", src, tmp / "out", "--config", config]
    assert_unconverted("tensor(s)", *args)
