"""What several test files share: recorded runs, small random models, model folders, runs of command lines."""

import contextlib
import copy
import dataclasses
import gc
import io
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoints
import convert_weights as cw
import magi
import training

HERE = Path(__file__).parent.parent
GOLDENS = HERE / "goldens"


def bad(text: str):
    """The call is refused, and the message matches `text`. For command lines: assert_refused."""
    return pytest.raises(ValueError, match=text)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def same(a, b) -> bool:
    """Equal but for the order in which a busy machine may sum floats: latents, or frames of 0..255."""
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    return torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1 if a.dtype == torch.uint8 else 1e-4)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """The same tensors, bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


# ------------------------------------------------------------------------------------------- recorded runs


def golden(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDENS / f"{name}.safetensors")


@cache
def golden_dit(name: str) -> magi.DiT:
    cfg, _ = cw.configs_from_upstream(json.loads((GOLDENS / f"{name}.config.json").read_text()))
    dit = magi.DiT(cfg)
    dit.load_state_dict(cw.convert_dit(golden(f"{name}.weights")), strict=True)
    return dit.eval().requires_grad_(False)


@cache
def golden_vae() -> magi.VAE:
    vae = magi.VAE(cw.vae_config_from_upstream(json.loads((GOLDENS / "vae.config.json").read_text())))
    vae.load_state_dict(cw.convert_vae(golden("vae.weights")), strict=True)
    return vae.eval().requires_grad_(False)


def official_config(name: str, **changes) -> dict:
    """A golden's config; changes name keys of any part, or new ones of the first."""
    config = json.loads((GOLDENS / f"{name}.config.json").read_text())
    for key, value in changes.items():
        parts = [config, *(part for part in config.values() if isinstance(part, dict))]
        next((part for part in parts if key in part), parts[1])[key] = value
    return config


CASES = {case["case"]: case for case in json.loads((GOLDENS / "sampler_cases.json").read_text())}
TOKEN_FLAGS = {
    "PAD_STATIC": "static",
    "PAD_DYNAMIC": "dynamic",
    "PAD_BORDERNESS": "borderness",
    "PAD_HQ": "hq",
    "PAD_THREE_D_MODEL": "3d",
    "PAD_TWO_D_ANIME": "2d",
    "PAD_DURATION": "duration",
}


def golden_run(name: str, **changes) -> tuple[magi.DiT, magi.SamplerConfig, dict, dict]:
    """Model, sampler config, recorded tensors and further arguments of a recorded run."""
    case, run = CASES[name], golden(name)
    upstream = json.loads((GOLDENS / f"{case['model']}.config.json").read_text())
    _, cfg = cw.configs_from_upstream(
        upstream | {"runtime_config": case["runtime"], "engine_config": case["engine"]}
    )
    flags = case["special_tokens"]
    cfg = dataclasses.replace(
        cfg,
        special_tokens=tuple(TOKEN_FLAGS[f] for f in flags if f in TOKEN_FLAGS),
        negative_tokens=tuple(magi.NEGATIVE_TOKENS) if "NEG_PROMPT" in flags else (),
        **changes,
    )
    more = dict(
        special_tokens=golden(f"{case['model']}.special_tokens"),
        noise=run["noise"][0],
        prefix=run["prefix"][0] if "prefix" in run else None,
    )
    return golden_dit(case["model"]), cfg, run, more


# ---------------------------------------------------------------------------------- a small model in memory

SMALL = magi.DiTConfig(
    num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=48,
    text_dim=12, text_length=14, null_length=5, dtype="float32",
)  # fmt: skip
QUICK = magi.SamplerConfig(num_steps=4, num_frames=72, height=32, width=32)
TOKENS = [
    *(f"duration_token_{i}" for i in range(1, 9)),
    *("hq_token", "static_first_frames_token", "trans_token", "dynamic_first_frames_token"),
    *("borderness_token", "three_d_model_token", "two_d_anime_token", "caption_token", "logo_token"),
]


@cache
def small() -> tuple[magi.DiT, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """A random DiT, a caption (L, C) with its mask, special tokens."""
    generator = torch.Generator().manual_seed(7)
    torch.manual_seed(0)
    dit = magi.DiT(SMALL).eval().requires_grad_(False)
    for p in dit.parameters():
        p.add_(0.1 * torch.randn(p.shape, generator=generator))
    text = torch.randn(14, 12, generator=generator)
    tokens = {k: torch.randn(1, 12, generator=generator) for k in TOKENS}
    return dit, text, (torch.arange(14) < 4).long(), tokens


def run_small(cfg: magi.SamplerConfig, steps: list | None = None, **more) -> dict[int, torch.Tensor]:
    """All chunks of a run of the small model; what progress is told goes into `steps`."""
    dit, text, mask, tokens = small()
    text, mask = more.pop("text", text), more.pop("mask", mask)
    progress = (steps if steps is not None else []).append
    with torch.no_grad():
        return dict(magi.sample(dit, text, mask, cfg, special_tokens=tokens, progress=progress, **more))


def training_batch(n: int = 3) -> tuple[magi.DiT, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A fresh small DiT and two random clips of n chunks: latents, captions, masks."""
    torch.manual_seed(3)
    dit = magi.DiT(SMALL)
    text, mask = torch.randn(2, n, 14, 12), (torch.arange(14) < 6).long().expand(2, n, -1)
    return dit, torch.randn(2, 16, 6 * n, 4, 4), text, mask


def distillation(n: int = 3, **cfg):
    """A random student and another random DiT as its teacher, and shortcut_loss of a seed for them."""
    student, latents, text, mask = training_batch(n)
    teacher = copy.deepcopy(small()[0])
    cfg = training.TrainingConfig(**cfg)

    def loss(num_steps: int, seed: int = 0, **more) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        more = {"teacher": teacher, "cfg": cfg} | more
        return training.shortcut_loss(
            student, more.pop("teacher"), latents, text, mask, num_steps, generator=generator, **more
        )

    return student, teacher, loss


@contextlib.contextmanager
def counted_tokens(dit: torch.nn.Module) -> Iterator[list[int]]:
    """Within the block, the list gets the number of tokens of each forward of a DiT."""
    tokens, area = [], dit.cfg.patch_size**2
    handle = dit.register_forward_hook(lambda m, a, out: tokens.append(a[0][0, 0].numel() // area))
    try:
        yield tokens
    finally:
        handle.remove()


def calls_of(dit: torch.nn.Module) -> list[dict]:
    """Filled with x, t, text, mask, keywords and result v of each forward of a DiT."""
    calls = []
    dit.register_forward_hook(
        lambda m, a, k, out: calls.append(dict(zip(("x", "t", "text", "mask"), a, strict=True), v=out, **k)),
        with_kwargs=True,
    )
    return calls


# ------------------------------------------------------------------------------------ folders, files, frames

FOLDER_DIT = magi.DiTConfig(
    num_layers=3, hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=16, ffn_size=64,
    text_dim=32, text_length=16, null_length=4, dtype="float32",
)  # fmt: skip
FOLDER_VAE = magi.VAEConfig(video_size=32, embed_dim=32, depth=1, num_heads=2, use_final_proj=True)
FOLDER_RUN = magi.SamplerConfig(num_steps=4, height=32, width=48, num_frames=30, special_tokens=("hq",))


def write_folder(folder: Path, module: torch.nn.Module, **configs) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({part: asdict(cfg) for part, cfg in configs.items()}))
    save_file(module.state_dict(), folder / "model.safetensors")
    return folder


def write_model(folder: Path, cfg: magi.DiTConfig = FOLDER_DIT, **sampler) -> Path:
    """A DiT of random weights with its special tokens, as `load` wants them."""
    write_folder(folder, magi.DiT(cfg), dit=cfg, sampler=dataclasses.replace(FOLDER_RUN, **sampler))
    tokens = {name: torch.randn(1, cfg.text_dim) for name in TOKENS}
    save_file(tokens, folder / "special_tokens.safetensors")
    return folder


def write_t5(folder: Path, width: int) -> Path:
    """A T5 encoder of random weights with a tokenizer of its own."""
    from transformers import T5Config, T5EncoderModel

    cfg = T5Config(vocab_size=40, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5EncoderModel(cfg).save_pretrained(folder)
    lines = ["a red ball bounces", "a blue square slides"] * 20
    train_tokenizer(lines, vocab_size=40, model_prefix=str(folder / "spiece"))
    (folder / "spiece.vocab").unlink()
    return folder


def train_tokenizer(lines: list[str], vocab_size: int, **where) -> None:
    """A sentencepiece model with T5's ids; `where` says where it goes (model_prefix or model_writer)."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), vocab_size=vocab_size, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        hard_vocab_limit=False, minloglevel=2, num_threads=1, **where,
    )  # fmt: skip


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in checkpoints.weight_files(folder) for k, v in load_file(file).items()}


def shades(values) -> np.ndarray:
    """Grey frames (n, 32, 48, 3), one for each value."""
    return np.stack([np.full((32, 48, 3), v, np.uint8) for v in values])


def read_frames(path: Path) -> np.ndarray:
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


# -------------------------------------------------------------------------------------------- command lines


def run_main(main, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line, in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse refuses in this way
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def assert_one_line(result: tuple[int, str, str], *words: str) -> str:
    """A result of run_main is exit code 2 and one line on stderr, "error: ...", that has all `words`: this
    line."""
    code, _, err = result
    assert code == 2 and len(err.splitlines()) == 1 and err.endswith("\n"), (code, err)
    assert err.startswith("error: "), err
    for word in words:
        assert word in err, (word, err)
    return err


def assert_refused(main, arguments, *words: str, out: Path | None = None) -> str:
    """The command line is refused in one line, which is returned, and nothing is new at or beside `out`."""
    before = sorted(out.parent.rglob("*")) if out else None
    line = assert_one_line(run_main(main, *arguments), *words)
    assert out is None or sorted(out.parent.rglob("*")) == before
    return line


def environment() -> dict[str, str]:
    """For the processes that tests start: one thread, and Triton compiles, as a user has it."""
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}


def run_python(*arguments) -> subprocess.CompletedProcess:
    """python with these arguments, in a process of its own."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=HERE)


def fork_python(script: Path, *arguments, more: dict[str, str] | None = None, **streams) -> subprocess.Popen:
    """As Popen([python, script, ...]): a process with streams, signals and memory of its own. It is a fork of
    this one, which has imported what takes seconds, so it begins at once. more: for its environment."""

    def run() -> None:
        gc.freeze()  # what the parent has left may not be closed here, when its number is another file's
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # Popen returns when the pipe to it is closed
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", errors="backslashreplace")
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a run in the background may ignore it
        os.environ.pop("TRITON_INTERPRET", None)
        os.environ.update(more or {})
        sys.argv = [str(script), *map(str, arguments)]
        code = 1
        try:
            runpy.run_path(str(script), run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        try:
            sys.stdout.flush()
        except OSError:
            code = 120  # as Python ends whose last words nobody can read
        os._exit(code)

    # Popen resets SIGPIPE, which Python ignores
    return subprocess.Popen([sys.executable], preexec_fn=run, restore_signals=False, **streams)
