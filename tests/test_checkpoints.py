"""Files on disk: what cannot be read or does not fit is one ValueError that names the file."""

import builtins
import errno
import json
import os
import re
import sys

import pytest
import torch
from common import FOLDER_DIT, SMALL, assert_same, bad
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import checkpoints
import magi
import outputs


def linear(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of torch.nn.Linear(3, 2), and others."""
    return {"weight": torch.randn(2, 3), "bias": torch.randn(2)} | more


# --------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    "error, message",
    [
        (KeyError("I16"), "cannot read weights '.*f', damaged or of another kind: KeyError: 'I16'"),
        (RuntimeError("odd"), "damaged or of another kind: RuntimeError: odd"),
        (OSError("no errno"), "damaged or of another kind: OSError: no errno"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "cannot read weights '.*f', No space left on device",
        ),
    ],
)
def test_whatever_goes_wrong_is_one_error_that_names_the_file(error, message, tmp_path):
    (tmp_path / "f").write_bytes(b"")
    with (
        pytest.raises(ValueError, match=message + "$") as info,
        checkpoints.reading("weights", tmp_path / "f"),
    ):
        raise error
    assert info.value.__cause__ is error


def test_what_git_leaves_in_place_of_a_large_file_is_told_apart(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with bad("cannot read weights '.*': it is what git leaves in place of a large file: run git lfs pull"):
        checkpoints.read_headers([file])


def test_the_neighbour_of_a_folder_however_it_is_spelled(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    for folder, neighbour in ((".", "a/vae"), ("..", "vae"), ("../b", "a/vae"), (tmp_path / "a", "vae")):
        assert checkpoints.beside(folder, "vae").resolve() == tmp_path / neighbour


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")],
)
def test_running_out_of_memory_is_not_the_files_fault(error, tmp_path):
    with pytest.raises(type(error)) as info, checkpoints.reading("weights", tmp_path):
        raise error
    assert info.value is error


@pytest.mark.parametrize(
    "error, is_it",
    [
        (
            RuntimeError("[enforce fail] CPUAllocator: can't allocate memory: you tried to allocate 9"),
            True,
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."), True),
        (RuntimeError("unable to mmap 9 bytes from file <f>: Cannot allocate memory (12)"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("out of resource: shared memory, Required: 231424, Hardware limit: 101376"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_not_every_error_that_speaks_of_memory_is_too_little_of_it(error, is_it):
    assert checkpoints.out_of_memory(error) is is_it


def test_ctrl_c_passes_through(tmp_path):
    with pytest.raises(KeyboardInterrupt), checkpoints.reading("weights", tmp_path):
        raise KeyboardInterrupt


def test_missing_and_forbidden_files_are_named(tmp_path, monkeypatch):
    with (
        bad("weights '.*gone' does not exist: check the path"),
        checkpoints.reading("weights", tmp_path / "gone"),
    ):
        pytest.fail("it is read")
    (tmp_path / "mine").write_bytes(b"")

    def forbid(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(builtins, "open", forbid)  # tests may run as root, who may read everything
    with (
        bad("cannot read weights '.*mine', Permission denied"),
        checkpoints.reading("weights", tmp_path / "mine"),
    ):
        pytest.fail("it is read")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_json_may_begin_with_a_byte_order_mark(encoding, tmp_path):
    file = tmp_path / "c.json"
    file.write_bytes('{"a": "\u00e4"}'.encode(encoding))
    assert checkpoints.read_json(file) == {"a": "\u00e4"}
    file.write_bytes(file.read_bytes()[:-2])
    with bad("cannot read config '.*c.json', damaged"):
        checkpoints.read_json(file)


# --------------------------------------------------------------------------------------------------- configs


def test_configs_are_made_from_the_types_of_json():
    cfg = checkpoints.make_config(
        magi.SamplerConfig,
        {"kv_ranges": [5, 4], "clean_t": 1, "kv_ranges_at": [[1, [1, 4]]], "num_frames": None},
    )
    assert cfg.kv_ranges == (5, 4) and cfg.kv_ranges_at == ((1, (1, 4)),) and cfg.num_frames is None
    assert type(cfg.clean_t) is float
    for values in ({"height": 32.0}, {"height": "32"}, {"height": True}, {"distilled": 1}, {"kv_ranges": 3}):
        name, value = next(iter(values.items()))
        with bad(f"{name} is {value!r}: it must be of type "):
            checkpoints.make_config(magi.SamplerConfig, values)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[]", "is not a config with a valid 'dit' part: convert the model again"),
        ("{}", "is not a config with a valid 'dit' part"),
        ('{"dit": [1]}', "is not a config with a valid 'dit' part"),
        ('{"dit": {"depth": 3}}', "with a valid 'dit' part: .*'depth'"),
        ('{"dit": {"torch_dtype": 3}}', "with a valid 'dit' part"),
        ('{"dit": {"num_kv_heads": 0}}', "with a valid 'dit' part"),
        ('{"dit": {"head_dim": 12}}', "with a valid 'dit' part: head_dim 12 must be a multiple of 8"),
        ('{"dit": ', "cannot read config '.*config.json', damaged"),
    ],
)
def test_configs_that_say_nothing_useful_are_refused(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with bad(message):
        checkpoints.read_config(tmp_path, "dit", magi.DiTConfig)


# --------------------------------------------------------------------------------------------------- weights


def test_files_of_a_checkpoint(tmp_path):
    with bad("no weights in '.*': .*model.safetensors is missing, download or convert the model again"):
        checkpoints.weight_files(tmp_path)
    names = lambda *more: [file.name for file in checkpoints.weight_files(tmp_path, *more)]
    (tmp_path / "model.safetensors.zst").touch()
    assert names() == ["model.safetensors.zst"]
    (tmp_path / "model.safetensors").touch()
    assert names() == ["model.safetensors"]
    (tmp_path / "other.bin").touch()
    assert names("other.bin") == ["other.bin"]
    index = tmp_path / "model.safetensors.index.json"  # it goes before a single file
    index.write_text(json.dumps({"weight_map": {"u": "b", "v": "a", "w": "b"}}))
    (tmp_path / "b.zst").touch()
    with bad("1 of 2 files are missing in '.*', such as ..a..: download or convert the model again"):
        names()
    (tmp_path / "a").touch()
    assert names() == ["a", "b.zst"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "cannot read index '.*index.json', damaged"),
        ("[]", "index.json is no index of weights"),
        ('{"weight_map": ["a"]}', "index.json is no index of weights"),
        ('{"weight_map": {"u": 1}}', "1 of 1 files are missing"),
        ('{"weight_map": {"u": ["a"]}}', "1 of 1 files are missing"),
    ],
)
def test_broken_indices_are_refused(text, message, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with bad(message):
        checkpoints.weight_files(tmp_path)


def test_headers_tell_shapes_and_fp8(tmp_path):
    layer = magi.FP8Linear(16, 32, "channel")
    save_file(layer.state_dict(), tmp_path / "a")
    found = checkpoints.read_headers([tmp_path / "a"])
    assert found == checkpoints.headers_of(layer) and found["weight"] == ((32, 16), True)
    assert found["smooth_scale"] == ((1, 16), False)
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-1])
    with bad("cannot read weights '.*a', damaged or of another kind"):
        checkpoints.read_headers([tmp_path / "a"])


def test_the_first_difference_is_named_with_both_values():
    expected = {"a": ((1,), False), "b": ((2,), False), "c": ((3,), True)}
    checkpoints.compare_headers(dict(expected), expected, "it is odd")
    for change, message in (
        ({"b": None, "a": None}, "it lacks 2 tensor(s), such as 'a'"),
        ({"d": ((1,), False)}, "it has unknown 1 tensor(s), such as 'd'"),
        (
            {"b": ((4,), False), "c": ((3,), False)},
            "it has other shapes or types for 2 tensor(s), such as 'b' (((4,), False), not ((2,), False))",
        ),
        (
            {"c": ((3,), False)},
            "it has other shapes or types for 1 tensor(s), such as 'c' (((3,), False), not ((3,), True))",
        ),
    ):
        found = {name: value for name, value in (expected | change).items() if value is not None}
        with bad("^" + re.escape(f"it is odd: {message}") + "$"):
            checkpoints.compare_headers(found, expected, "it is odd")


def test_a_module_is_built_without_memory_and_filled_in_its_own_types(tmp_path):
    make = lambda: torch.nn.Linear(3, 2, dtype=torch.float32)
    whole = linear()
    save_file({name: tensor.bfloat16() for name, tensor in whole.items()}, tmp_path / "model.safetensors")
    empty = checkpoints.build(make, tmp_path)
    assert all(p.is_meta for p in empty.parameters())
    filled = checkpoints.fill(empty, tmp_path)
    assert_same(dict(filled.state_dict()), {k: v.bfloat16().float() for k, v in whole.items()})
    assert not any(p.requires_grad for p in filled.parameters()) and not filled.training
    half = checkpoints.fill(checkpoints.build(make, tmp_path), tmp_path, dtype=torch.float16)
    assert half.weight.dtype == torch.float16
    part = checkpoints.fill(checkpoints.build(make, tmp_path), tmp_path, only=lambda name: name == "bias")
    assert part.weight.is_meta and not part.bias.is_meta


def test_a_file_of_an_older_version_says_what_to_do(tmp_path):
    """Wo was called attn.out, and its columns were in another order."""
    dit = magi.DiT(SMALL)
    old = {k.replace("attn.proj", "attn.out"): v for k, v in dit.state_dict().items()}
    save_file(old, tmp_path / "model.safetensors")
    with bad("older version of this project .*convert it again.: it lacks 2 .*'layers.0.attn.proj.weight'"):
        checkpoints.build(lambda: magi.DiT(SMALL), tmp_path)


def test_what_is_saved_is_whole_or_not_there(tmp_path, monkeypatch):
    file, first = tmp_path / "a.safetensors", linear()
    outputs.save(first, file, {"format": "pt"})
    assert_same(load_file(file), first)
    outputs.save({"t": torch.randn(4, 3).T}, file)  # not contiguous
    assert load_file(file)["t"].shape == (3, 4)
    outputs.save(first, file)

    errors = {
        "No space left on device": OSError(errno.ENOSPC, "No space left on device"),
        f"cannot write '{file}': .*No space left": SafetensorError("I/O error: No space left (os error 28)"),
    }
    for words, error in errors.items():

        def fill_the_disk(tensors, part, metadata, error=error):
            part.write_bytes(b"half")
            raise error

        monkeypatch.setattr(outputs, "save_file", fill_the_disk)
        with pytest.raises(OSError, match=words):
            outputs.save(linear(), file)
    assert_same(load_file(file), first)
    assert [*tmp_path.iterdir()] == [file]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_mode_that_the_umask_asks_for(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        outputs.save(linear(), tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == mode


# ------------------------------------------------------------------------------------------ modules, devices


def test_modules_are_found_by_their_path_once_and_not_kept_if_they_fail(tmp_path, monkeypatch):
    file = tmp_path / "json.py"  # as a module of the standard library is called
    file.write_text("count = 0")
    monkeypatch.setitem(sys.modules, "magi_test_module", None)
    del sys.modules["magi_test_module"]
    module = checkpoints.load_module("magi_test_module", file)
    assert module.count == 0 and sys.modules["json"] is json
    module.count += 1
    assert checkpoints.load_module("magi_test_module", file).count == 1
    del sys.modules["magi_test_module"]
    file.write_text("raise ImportError('no triton')")
    with pytest.raises(ImportError, match="no triton"):
        checkpoints.load_module("magi_test_module", file)
    assert "magi_test_module" not in sys.modules


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cpu:0", "", "meta", "CUDA"])
def test_unknown_devices_are_refused(device):
    with bad(f"device {device!r} is unknown: try cpu, cuda, cuda:1 or mps"):
        checkpoints.check_device(device)


def test_devices_that_are_not_here_are_refused(monkeypatch):
    checkpoints.check_device("cpu")

    def fail(*_, device):
        raise RuntimeError("CUDA error: invalid device ordinal\nCompile with `TORCH_USE_CUDA_DSA`.")

    monkeypatch.setattr(torch, "empty", fail)
    with bad("^device 'cuda:7' is not available .CUDA error: invalid device ordinal.: try cpu$"):
        checkpoints.check_device("cuda:7")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said_in_one_line():
    with bad("device 'cuda' is not available .*: try cpu$") as info:
        checkpoints.check_device("cuda")
    assert "\n" not in str(info.value)


def test_a_model_is_checked_against_its_config_before_weights_are_read(tmp_path):
    save_file(magi.DiT(FOLDER_DIT).state_dict(), tmp_path / "model.safetensors")
    with bad("it has unknown 26 tensor.s., such as 'layers.2.attn.k.weight'"):
        checkpoints.build(lambda: magi.DiT(SMALL), tmp_path)
