"""convert_weights.py and outputs.py: column order of the output projection, files as people have them, and an
output folder that is whole whatever happens."""

import codecs
import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import HERE, assert_refused, assert_same, fork_python, read_folder, run_main
from test_convert import (
    EDGE,
    MODEL,
    VAE,
    official_config,
    official_folder,
    official_t5_folder,
    official_tokens,
    official_weights,
    written,
)

import convert_weights as cw
import magi
import outputs


def vae_folder(folder: Path, shift: float = 0.0, **layout) -> Path:
    """The golden VAE in the official layout; `shift` is added to one bias, to tell two conversions apart."""
    sd = dict(official_weights("vae"))
    sd["decoder.norm.bias"] = sd["decoder.norm.bias"] + shift
    official_folder(folder, sd, stem=VAE, **layout)
    written(folder / "config.json", official_config("vae"))
    return folder


def bias(folder: Path) -> torch.Tensor:
    """What `shift` was added to. Fails if the folder is not whole."""
    assert magi.read_config(folder, "vae", magi.VAEConfig)
    return read_folder(folder)["decoder.norm.bias"] - official_weights("vae")["decoder.norm.bias"]


# ------------------------------------------------------------------------------------- the output projection


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_the_output_projection_takes_self_attention_first(dtype):
    torch.manual_seed(0)
    f = 3  # features of a rank: 2 * 8 * f columns
    weight = torch.randn(5, 16 * f).to(dtype)
    official = weight[None] if dtype == torch.float8_e4m3fn else weight
    (made,) = cw.convert_dit({EDGE + "linear_proj.weight": official}).items()
    assert made[0] == "layers.0.attn.proj.weight" and made[1].dtype == dtype
    assert made[1].shape == (5, 16 * f) and made[1].is_contiguous()
    for rank in range(8):
        for kind in range(2):  # self, cross
            ours, theirs = (kind * 8 + rank) * f, (rank * 2 + kind) * f
            assert torch.equal(made[1][:, ours : ours + f].float(), weight[:, theirs : theirs + f].float())

    # So the plain product is the official one, whose features are dealt out to the ranks first.
    own, other = torch.randn(4, 8 * f), torch.randn(4, 8 * f)
    dealt = torch.stack([own.view(4, 8, f), other.view(4, 8, f)], 2).flatten(1)
    plain = torch.cat([own, other], 1) @ made[1].float().T
    torch.testing.assert_close(plain, dealt @ weight.float().T)


def test_only_the_input_axis_of_the_output_projection_is_reordered():
    smooth = torch.arange(1.0, 33.0)[None]  # f = 2: official (rank, kind, f)
    sd = {
        "linear_proj.smooth_scale": smooth,
        "linear_proj.weight_scale": torch.ones(1),
        "linear_proj.input_scale": torch.ones(1),
        "linear_qkv.q.weight": torch.randn(32, 32),
        "linear_qkv.q.input_scale": torch.randn(32),
    }
    made = cw.convert_dit({EDGE + name: tensor for name, tensor in sd.items()})
    want = [r * 4 + k * 2 + j + 1 for k in range(2) for r in range(8) for j in range(2)]
    assert made["layers.0.attn.proj.smooth_scale"].tolist() == [want]
    for name in ("q.weight", "q.input_scale"):
        assert torch.equal(made[f"layers.0.attn.{name}"], sd[f"linear_qkv.{name}"])
    mlp = "videodit_blocks.layers.0.mlp.linear_fc2.smooth_scale"
    assert torch.equal(cw.convert_dit({mlp: smooth})["layers.0.ffn.fc2.smooth_scale"], smooth)


@pytest.mark.parametrize("shape", [(), (17,), (4, 31)])
def test_an_output_projection_that_cannot_be_reordered_is_refused(shape):
    with pytest.raises(ValueError, match=r"layers.0.attn.proj.weight \["):
        cw.convert_dit({EDGE + "linear_proj.weight": torch.zeros(shape)})


# -------------------------------------------------------------------------------------------------- configs

BOMS = {
    "utf-8": (codecs.BOM_UTF8, "utf-8"),
    "utf-16": (codecs.BOM_UTF16_LE, "utf-16-le"),  # what `>` writes in PowerShell
    "utf-16 big": (codecs.BOM_UTF16_BE, "utf-16-be"),
}


@pytest.mark.parametrize("bom, encoding", BOMS.values(), ids=BOMS.keys())
def test_a_config_may_begin_with_a_byte_order_mark(bom, encoding, tmp_path):
    marked = lambda config: bom + json.dumps(config).encode(encoding)
    src = official_folder(tmp_path / "src", official_weights("base"))
    config = written(tmp_path / "c.json", marked(official_config("base")))
    code, _, err = run_main(cw.main, "dit", src, tmp_path / "dit", "--config", config)
    assert code == 0, err
    dit, sampler = cw.configs_from_upstream(official_config("base"))
    assert magi.read_config(tmp_path / "dit", "dit", magi.DiTConfig) == dit
    assert magi.read_config(tmp_path / "dit", "sampler", magi.SamplerConfig) == sampler

    vae = vae_folder(tmp_path / "official_vae")
    written(vae / "config.json", marked(official_config("vae")))
    assert run_main(cw.main, "vae", vae, tmp_path / "vae")[0] == 0
    wanted = cw.vae_config_from_upstream(official_config("vae"))
    assert magi.read_config(tmp_path / "vae", "vae", magi.VAEConfig) == wanted

    t5 = official_t5_folder(tmp_path / "official_t5")
    plain = json.loads((t5 / "config.json").read_text())
    written(t5 / "config.json", marked(plain))
    assert run_main(cw.main, "t5", t5, tmp_path / "t5")[0] == 0
    assert json.loads((tmp_path / "t5" / "config.json").read_text()) == plain  # transformers takes no mark
    assert magi.T5(tmp_path / "t5", length=8)(["a red ball"])[0].shape == (1, 8, 32)


def test_a_config_that_is_wrong_is_named(tmp_path):
    config = official_config("base")
    config["model_config"]["what"] = 1
    file = written(tmp_path / "c.json", config)
    src = official_folder(tmp_path / "src", official_weights("base"))
    why = f"cannot read config {str(file)!r}: unknown key model_config.what (1)"
    assert_refused(cw.main, ("dit", src, tmp_path / "dit", "--config", file), why, out=tmp_path / "dit")
    file = written(tmp_path / "vae" / "config.json", {"ddconfig": {}, "what": 1})
    why = f"cannot read config {str(file)!r}: "
    assert_refused(cw.main, ("vae", tmp_path / "vae", tmp_path / "v"), why, out=tmp_path / "v")


@pytest.mark.parametrize("preset", ["4.5B-base", "4.5B-distill", "24B-distill"])
def test_a_preset_brings_its_sampler_and_a_json_its_own(preset, tmp_path, monkeypatch):
    dit, _ = cw.configs_from_upstream(official_config("base"))
    named = magi.PRESETS[preset].sampler
    small = dataclasses.replace(magi.PRESETS[preset].dit, **dataclasses.asdict(dit))
    monkeypatch.setitem(magi.PRESETS, preset, magi.Preset(small, named))
    src = official_folder(tmp_path / "src", official_weights("base"))
    assert run_main(cw.main, "dit", src, tmp_path / "named", "--config", preset)[0] == 0
    assert magi.read_config(tmp_path / "named", "sampler", magi.SamplerConfig) == named
    for steps in (64, 32, 16):
        config = official_config("base", num_steps=steps, cfg_number=1, distill=True)
        config = written(tmp_path / "c.json", config)
        code, _, err = run_main(cw.main, "dit", src, tmp_path / str(steps), "--config", config)
        assert code == 0, err
        made = magi.read_config(tmp_path / str(steps), "sampler", magi.SamplerConfig)
        assert made.num_steps == steps and made.distilled


@pytest.mark.parametrize("cp, pp, gpus", [(1, 1, None), (8, 1, 8), (1, 2, 2), (4, 2, 8)])
def test_a_config_for_several_gpus_says_how_to_start_on_them(cp, pp, gpus, tmp_path):
    src = official_folder(tmp_path / "src", official_weights("base"))
    config = official_config("base", cp_size=cp, pp_size=pp, cp_strategy="cp_ulysses")
    official_tokens(tmp_path / "t.npz")
    flags = "--config", written(tmp_path / "c.json", config), "--special_tokens", tmp_path / "t.npz"
    code, _, err = run_main(cw.main, "dit", src, tmp_path / "out", *flags)
    assert code == 0
    if gpus is None:
        assert err == ""
    else:
        assert err.count("\n") == 1 and f"torchrun --nproc_per_node {gpus} sample.py" in err
    assert bool(cw.note_on_gpus(config)) == (gpus is not None)
    assert cw.note_on_gpus(official_config("base", cp_size=None, pp_size="2")) == ""


# ------------------------------------------------------------------------------------------- whole downloads


def test_all_names_the_folders_that_it_skips(tmp_path):
    ckpt, out = tmp_path / "ckpt", tmp_path / "out"
    vae_folder(ckpt / "vae")
    official_t5_folder(ckpt / "t5" / "first")
    official_t5_folder(ckpt / "t5" / "second")
    official_folder(ckpt / "magi1.1" / "24B_base" / "inference_weight", {"x": torch.zeros(1)}, shards=1)
    official_folder(ckpt / "magi" / "24B_base_1.1" / "inference_weight", {"x": torch.zeros(1)})
    (ckpt / "magi-1.1_empty").mkdir()
    official_folder(ckpt / "flux", {"x": torch.zeros(1)}, zst="z")
    written(ckpt / "assets" / "logo.png", b"")
    code, said, err = run_main(cw.main, "all", ckpt, out)
    assert code == 0 and said.count("wrote") == 2, err
    lines = err.splitlines()
    assert {Path(line.split()[1]).relative_to(ckpt).as_posix() for line in lines} == {
        *("flux", "magi-1.1_empty", "magi/24B_base_1.1/inference_weight", "magi1.1", "t5/second"),
    }
    for line in lines:
        why = "MAGI-1.1 packs q, k and v" if "1.1" in line else "it is not one of magi/*/inference_weight*"
        assert line.startswith("note: ") and " is skipped: " in line and why in line
    assert {folder.name for folder in out.iterdir()} == {"vae", "t5"}

    # Our own folders, in the download, are no news.
    code, _, err = run_main(cw.main, "all", ckpt, ckpt / "ours")
    assert code == 0 and err.splitlines() == lines
    code, said, err = run_main(cw.main, "all", ckpt, ckpt / "ours")
    assert code == 0 and said.count("skipped (--force") == 2 and err.splitlines() == lines


def test_all_on_nothing_but_magi_1_1_says_why(tmp_path):
    official_folder(tmp_path / "ckpt" / "magi1.1" / "inference_weight", {"x": torch.zeros(1)})
    command = "all", tmp_path / "ckpt", tmp_path / "out"
    assert_refused(cw.main, command, "to convert; ", "magi1.1 is skipped: MAGI-1.1", out=tmp_path / "out")


def test_all_goes_on_when_nobody_can_read_what_it_says(tmp_path):
    vae_folder(tmp_path / "ckpt" / "vae")
    command = cw.__file__, "all", tmp_path / "ckpt", tmp_path / "out"
    with open("/dev/full", "w") as full:
        process = fork_python(*command, stdout=full, stderr=subprocess.PIPE)
    _, said = process.communicate()
    assert process.returncode == 0 and bias(tmp_path / "out" / "vae").abs().max() == 0, said


# ---------------------------------------------------------------------------------------------------- modes


@pytest.mark.parametrize("umask, mode", [(0o027, 0o640), (0o022, 0o644), (0o077, 0o600)])
def test_files_get_the_mode_that_the_umask_asks_for(umask, mode, tmp_path, monkeypatch):
    src = official_folder(tmp_path / "src", official_weights("base"))
    official_tokens(tmp_path / "t.npz")
    config = written(tmp_path / "c.json", official_config("base"))
    t5 = official_t5_folder(tmp_path / "official_t5")
    for file in t5.iterdir():
        file.chmod(0o400)
    monkeypatch.setattr(cw, "SHARD_BYTES", 200_000)
    before = os.umask(umask)
    try:
        flags = "--config", config, "--special_tokens", tmp_path / "t.npz"
        assert run_main(cw.main, "dit", src, tmp_path / "dit", *flags)[0] == 0
        assert run_main(cw.main, "t5", t5, tmp_path / "t5")[0] == 0
    finally:
        os.umask(before)
    files = [*(tmp_path / "dit").iterdir(), *(tmp_path / "t5").iterdir()]
    assert len(list((tmp_path / "dit").glob("model-*"))) > 2 and len(files) > 7
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in files} == {
        file.name: oct(mode) for file in files
    }


# ------------------------------------------------------------------------------------ a folder that is whole


@pytest.mark.parametrize(
    "name", [".tmpUK4ZIZ", ".77.new", "model-00002-of-00009.safetensors", "a.unpacked", "config.json"]
)
def test_what_a_killed_run_left_makes_it_start_over(name, tmp_path):
    src, out = vae_folder(tmp_path / "src"), tmp_path / "out"
    written(tmp_path / "out.partial" / name, b"half a file")
    code, _, err = run_main(cw.main, "vae", src, out)
    assert code == 0, err
    assert {file.name for file in out.iterdir()} == {"config.json", MODEL} and bias(out).abs().max() == 0
    assert not (tmp_path / "out.partial").exists()


def test_what_is_not_ours_stays(tmp_path):
    src, out = vae_folder(tmp_path / "src"), tmp_path / "out"
    for name in ("out.partial", "out.replaced"):
        file = written(tmp_path / name / "holiday.jpg", b"precious")
        assert_refused(cw.main, ("vae", src, out), f"{name} is in the way", out=out)
        assert file.read_bytes() == b"precious"
        shutil.rmtree(file.parent)
        file.parent.symlink_to(src)  # a link to a folder of weights is not ours either
        assert_refused(cw.main, ("vae", src, out), f"{name} is in the way", out=out)
        file.parent.unlink()
        written(tmp_path / name, b"a file")
        assert_refused(cw.main, ("vae", src, out), f"{name} is in the way", out=out)
        (tmp_path / name).unlink()


class Interrupt:
    """Ctrl-C before or after the n-th call of what new_folder does to folders: rename, remove."""

    def __init__(self, n: int, after: bool, monkeypatch):
        self.n, self.after, self.calls = n, after, 0
        rename, rmtree = Path.rename, shutil.rmtree
        monkeypatch.setattr(Path, "rename", lambda a, b: self.watch(rename, a, b))
        monkeypatch.setattr(outputs.shutil, "rmtree", lambda *a, **k: self.watch(rmtree, *a, **k))

    def watch(self, call, *args, **more):
        self.calls += 1
        now = self.calls == self.n
        if now and not self.after:
            raise KeyboardInterrupt
        result = call(*args, **more)
        if now:
            raise KeyboardInterrupt
        return result


def test_ctrl_c_at_any_time_leaves_the_old_or_the_new_model(tmp_path, monkeypatch):
    old, new = vae_folder(tmp_path / "old", 1.0), vae_folder(tmp_path / "new", 2.0)
    out, seen = tmp_path / "models" / "vae", set()
    for after in (False, True):
        for n in range(1, 6):
            assert run_main(cw.main, "vae", old, out, "--force")[0] == 0
            with monkeypatch.context() as m:
                interrupt = Interrupt(n, after, m)
                code, _, err = run_main(cw.main, "vae", new, out, "--force")
            assert interrupt.calls >= n and code == 130 and "interrupted" in err
            value = bias(out).mean().round().item()
            assert value in (1, 2)
            seen.add(value)
            code, _, err = run_main(cw.main, "vae", new, out, "--force")
            assert code == 0 and bias(out).mean().round() == 2, err
            assert [folder.name for folder in out.parent.iterdir()] == ["vae"]
    assert seen == {1, 2}


def test_an_old_model_that_a_killed_run_moved_aside_comes_back(tmp_path):
    old, new = vae_folder(tmp_path / "old", 1.0), vae_folder(tmp_path / "new", 2.0)
    out, aside = tmp_path / "models" / "vae", tmp_path / "models" / "vae.replaced"
    assert run_main(cw.main, "vae", old, out)[0] == 0
    out.rename(aside)
    shutil.copytree(aside, tmp_path / "models" / "vae.partial")
    code, _, err = run_main(cw.main, "vae", new, out)
    assert code == 2 and "exists: choose another folder" in err and bias(out).mean().round() == 1
    shutil.copytree(out, aside)  # killed while it removed the old one
    assert run_main(cw.main, "vae", new, out, "--force")[0] == 0
    assert bias(out).mean().round() == 2 and [folder.name for folder in out.parent.iterdir()] == ["vae"]


def test_out_may_be_a_link_to_a_model_but_not_to_nothing(tmp_path, monkeypatch):
    old, new = vae_folder(tmp_path / "old", 1.0), vae_folder(tmp_path / "ckpt" / "vae", 2.0)
    disk, link = tmp_path / "disk" / "vae", tmp_path / "vae"
    assert run_main(cw.main, "vae", old, disk)[0] == 0
    link.symlink_to(disk)
    assert_refused(cw.main, ("vae", new, link), f"{disk} exists", out=link)
    code, said, err = run_main(cw.main, "vae", new, link, "--force")
    assert code == 0 and said.startswith(f"wrote {disk}:"), err
    assert link.is_symlink() and bias(disk).mean().round() == 2 and bias(link).mean().round() == 2
    assert [folder.name for folder in disk.parent.iterdir()] == ["vae"]

    monkeypatch.setattr(cw, "read_header", lambda file: pytest.fail("a header was read"))
    link.unlink()
    for target in (tmp_path / "gone", link):  # nothing there; a circle
        link.symlink_to(target)
        for more in ((), ("--force",)):
            command = "vae", new, link, *more
            assert_refused(cw.main, command, f"{link} is a link to", "does not exist", out=link)
        command = "all", new.parent, link  # the folders of `all` are made in OUT
        assert_refused(cw.main, command, f"{link} is a link to", "does not exist", out=link)
        assert link.is_symlink()
        link.unlink()


def test_a_second_run_on_one_output_is_refused_and_spoils_nothing(tmp_path, monkeypatch):
    src, out = vae_folder(tmp_path / "src", shards=3), tmp_path / "out"
    save, second = cw.save, []

    def save_during_another_run(tensors, file, metadata=None):
        save(tensors, file, metadata)
        if not second:
            second.append(None)
            files = {f: f.read_bytes() for f in file.parent.iterdir()}
            second[0] = run_main(cw.main, "vae", src, out, "--force")
            assert {f: f.read_bytes() for f in file.parent.iterdir()} == files

    monkeypatch.setattr(cw, "save", save_during_another_run)
    monkeypatch.setattr(cw, "SHARD_BYTES", 200_000)
    code, said, err = run_main(cw.main, "vae", src, out)
    assert code == 0 and said.startswith("wrote"), err
    ((code, said, err),) = second
    assert code == 2 and said == "" and err.count("\n") == 1 and "another run is writing" in err
    assert_same(read_folder(out), cw.convert_vae(dict(official_weights("vae"))))
    assert sorted(tmp_path.iterdir()) == [out, src]


@pytest.mark.parametrize("flags, value", [((), 1), (("--force",), 2)])
def test_a_run_that_waited_for_another_to_end_finds_its_model(flags, value, tmp_path, monkeypatch):
    """Between opening the lock and taking it, the other run ends: as if this one had come later."""
    import fcntl

    src, out = vae_folder(tmp_path / "src", 1.0), tmp_path / "out"
    flock, ended = fcntl.flock, []

    def finish_first(handle, how):
        if not ended:
            ended.append(True)
            assert run_main(cw.main, "vae", src, out)[0] == 0
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", finish_first)
    code, _, err = run_main(cw.main, "vae", vae_folder(tmp_path / "other", 2.0), out, *flags)
    assert code == (0 if flags else 2) and ("exists: choose another folder" in err) == (not flags)
    assert bias(out).mean().round() == value
    assert {path.name for path in tmp_path.iterdir()} == {"src", "other", "out"}


def test_tensors_larger_than_a_file_may_be_get_a_file_each(tmp_path, monkeypatch):
    monkeypatch.setattr(cw, "SHARD_BYTES", 1)
    src, out = vae_folder(tmp_path / "src"), tmp_path / "out"
    assert run_main(cw.main, "vae", src, out)[0] == 0
    assert len(list(out.glob("model-*.safetensors"))) == len(official_weights("vae"))
    assert_same(read_folder(out), cw.convert_vae(dict(official_weights("vae"))))


def test_a_disk_without_room_is_found_before_a_weight_is_read(tmp_path, monkeypatch):
    src, out = vae_folder(tmp_path / "src"), tmp_path / "out"
    size = sum(tensor.nbytes for tensor in official_weights("vae").values())
    usage = lambda free: shutil._ntuple_diskusage(10**12, 10**12 - free, free)
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda path: usage(size - 1))
    with monkeypatch.context() as m:
        m.setattr(cw, "open_weights", lambda *_: pytest.fail("a weight was read"))
        assert_refused(cw.main, ("vae", src, out), "needs 0.001 GB, but only 0.001 GB", out=out)
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda path: usage(size))
    assert run_main(cw.main, "vae", src, out)[0] == 0


def test_a_full_disk_is_not_blamed_on_the_download(tmp_path, monkeypatch):
    src = vae_folder(tmp_path / "src", zst="z")
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(shutil, "copyfileobj", lambda *_: (_ for _ in ()).throw(full))
    code, _, err = run_main(cw.main, "vae", src, tmp_path / "out")
    assert code == 2 and "No space left on device" in err and "damaged" not in err
    assert not list(tmp_path.glob("out*"))


# ------------------------------------------------------------------------------------------ the quantise tool


def test_quantize_is_found_beside_the_program_not_in_the_folder_where_it_runs(tmp_path, monkeypatch):
    written(tmp_path / "tools" / "__init__.py", b"")
    written(tmp_path / "tools" / "quantize.py", b"raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as `python -m` and `python -c` have it
    for name in "magi_quantize", "tools", "tools.quantize":
        monkeypatch.delitem(sys.modules, name, raising=False)
    code, said, err = run_main(cw.main, "quantize", "--help")
    assert code == 0 and "--alpha" in said, err


def test_quantize_looks_at_out_and_the_device_first(tmp_path, monkeypatch):
    monkeypatch.setattr(cw, "read_header", lambda file: pytest.fail("a header was read"))
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "gone")
    assert_refused(cw.main, ("quantize", HERE / "tiny" / "base", link), f"{link} is a link to", out=link)
    command = "quantize", HERE / "tiny" / "base", tmp_path / "out", "--device", "tpu"
    assert_refused(cw.main, command, "device 'tpu' is unknown", out=tmp_path / "out")


def test_quantize_finds_the_t5_beside_the_folder_where_it_runs(tmp_path, monkeypatch):
    def reached(*_):
        raise ValueError("t5 was found")

    monkeypatch.setattr(cw.quantizer(), "fp8_layers", reached)
    monkeypatch.chdir(HERE / "tiny" / "base")
    assert_refused(cw.main, ("quantize", ".", tmp_path / "out"), "t5 was found", out=tmp_path / "out")


def test_the_help_lists_every_command(capsys):
    with contextlib.suppress(SystemExit):
        cw.main(["--help"])
    said = capsys.readouterr().out
    assert all(f"\n    {name}" in said for name in ("all", "dit", "vae", "t5", "quantize"))
