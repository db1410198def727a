"""Make videos with MAGI-1 from the command line.

    python sample.py --prompt "a red ball bounces"                        text to video, out.mp4
    python sample.py --mode i2v --image ball.png --prompt "it bounces"    a picture comes to life
    python sample.py --mode v2v --video clip.mp4 --num_frames inf         goes on after a video until Ctrl-C
    python sample.py --prompt "a red ball" --prompt "a blue ball"         one prompt per second of video
    python sample.py --prompt - --num_frames inf --out - | ffplay -       speak to it while it plays

magi.py makes the frames, media.py reads and writes files; here are flags, checks and a progress bar. Each
second of video is written as soon as it is clean: the output plays while it grows and outlives kill -9.
Bad input gets one line on stderr and exit code 2 before a weight is read; 1 is a later failure, 130 Ctrl-C.

Contents: 1 Flags, 2 Checks, 3 Running.
"""

# ruff: noqa: E402
from __future__ import annotations

import os
import signal
import sys

from threads import share_the_machine


def leave(*_) -> None:
    """On Ctrl-C during imports, which may swallow an exception: nothing has begun, so just go."""
    os.write(1, b"interrupted before anything was written\n")
    os._exit(130)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:        # not where a shell ignores it
        signal.signal(signal.SIGINT, leave)
    share_the_machine()
    if sys.flags.optimize > 1:                                               # transformers needs docstrings
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"PYTHONOPTIMIZE": ""})

import argparse
import contextlib
import dataclasses
import io
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------------
# 1  Flags
# ------------------------------------------------------------------------------------------------------------
# A sampling flag that is left out is None: its value comes from --config_file or the model's own config.json.
# Hyphens and underscores are the same. Other names for flags, most of them the official code's:

OTHER_NAMES = {
    "image_path": "image", "prefix_video_path": "video", "output_path": "out", "output": "out",
    "num_steps": "steps", "window_size": "window", "frames": "num_frames", "text_scales": "text_scale",
    "prev_scales": "prev_scale", "kv_ranges": "kv_range", "clean_chunk_kvrange": "clean_kv_range",
}  # fmt: skip
# Names in other programs: suggested, not taken, since the meaning differs a little.
SUGGESTED = {
    "guidance": "text_scale", "guidance_scale": "text_scale", "cfg": "text_scale", "cfg_scale": "text_scale",
    "negative_prompt": "negative_tokens", "num_inference_steps": "steps", "duration": "num_frames",
}  # fmt: skip
REPEATED = ("--prompt", "--transition", "--lora", "--lora_scale")            # others are given once

TINY = Path(__file__).resolve().parent / "tiny"                              # the bundled models
SHIPPED = {"tiny": TINY / "distill", "tiny-distill": TINY / "distill", "tiny-base": TINY / "base"}
DEFAULT_MODEL = "tiny"


def model_folder(text: str) -> Path:
    return SHIPPED.get(text, Path(text))


def say(message: object, file: Any = None) -> None:
    """One line on stderr whatever the message looked like, above the progress bar if there is one."""
    tqdm.write(" ".join(str(message).split()), file=file or sys.stderr)


class Parser(argparse.ArgumentParser):
    """argparse with one line where it would print its usage, too, and a guess at what was meant."""

    def error(self, message: str):
        if message.startswith("unrecognized arguments: "):
            word = message.split()[2].partition("=")[0]
            name = SUGGESTED.get(word.strip("-").replace("-", "_"))
            near = [f"--{name}"] if name else get_close_matches(word, self._option_string_actions, 1, 0.75)
            if near:
                message += f" (did you mean {near[0]}?)"
            elif not word.startswith("-"):
                message += " (a prompt of several words needs quotes)"
        if "not allowed with" in message:
            message += ": leave one of them out"
        say(f"error: {message}; see --help")
        sys.exit(2)


def whole_number(text: str, otherwise: str | None = None) -> int | str:
    """A whole number, or the word `otherwise`."""
    if text == otherwise:
        return text
    try:
        return int(text)
    except ValueError:
        also = f" or {otherwise!r}" if otherwise else ""
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number{also}") from None


def chunk_and_kind(text: str) -> tuple[int, str]:
    found = re.fullmatch(r"(-?\d+)(?::(\w+))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a chunk, such as 2, or 2:restyle")
    return int(found[1]), found[2] or "cut"


def number_and_card(text: str) -> tuple[list[int], list[float]]:
    found = re.fullmatch(r"(?:(\d+)x)?(\d+(?:\.\d+)?)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not the GB of a card, such as 48, or 4x48 for four")
    return [int(found[1] or 1)], [float(found[2])]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, under the names of SamplerConfig's fields where there is one."""
    parser = Parser(prog="sample.py", allow_abbrev=False, usage="python sample.py --prompt TEXT [more flags]",
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                    description="\n".join((__doc__ or "").splitlines()[:8]),  # none with python -OO
                    epilog="The official --image_path, --prefix_video_path and --output_path work too.")
    many = dict(nargs="+", metavar="X")
    # fmt: off
    group = parser.add_argument_group("what to make")
    flag, prompts = group.add_argument, group.add_mutually_exclusive_group().add_argument
    flag("--mode", choices=["t2v", "i2v", "v2v"], help="text, image, video to video; default: by the input")
    prompts("--prompt", action="append", metavar="TEXT", default=[],
            help="again for the next second; the last one goes on; or -: lines of standard input, each from "
                 "the next chunk on, whose end ends an endless video")
    prompts("--prompt_file", type=Path, metavar="FILE",
            help="a video a line, its seconds divided by |; --out is their folder, the seed counts up")
    prompts("--text", metavar="FILE", help="prompts that --save_text has encoded: T5 is not needed")
    flag("--save_text", type=Path, metavar="FILE", help="save the encoded prompts (.safetensors)")
    flag("--image", metavar="FILE", help="i2v: the first frame")
    flag("--video", metavar="FILE", help="v2v: the result goes on where this ends")
    flag("--out", type=Path, default=Path("out.mp4"), metavar="FILE",
         help=".mp4, .gif, or .png for a contact sheet; default: out.mp4; an old one is replaced; or - for "
              "an mp4 on standard output")
    flag("--fit", choices=["crop", "stretch", "pad"], help="of the input; default: crop")
    flag("--prefix_frames", type=whole_number, metavar="N",
         help="v2v: how many of its last frames the model sees; default: 32")

    flag = parser.add_argument_group("the video (default: as the model's config says)").add_argument
    flag("--num_frames", type=partial(whole_number, otherwise="inf"), metavar="N",
         help="24 are a second; inf: until Ctrl-C")
    flag("--height", type=whole_number, metavar="PX", help="a multiple of 16")
    flag("--width", type=whole_number, metavar="PX", help="a multiple of 16")
    flag("--fps", type=whole_number, metavar="N", help="frames per second")
    flag("--seed", type=whole_number, metavar="N", help="another seed, another video")

    flag = parser.add_argument_group("sampling (likewise)").add_argument
    flag("--steps", dest="num_steps", type=whole_number, metavar="N",
         help="per chunk; a chunk is one second of video")
    flag("--window", type=whole_number, metavar="N", help="chunks in flight at once")
    flag("--kv_range", dest="kv_ranges", type=partial(whole_number, otherwise="all"), **many,
         help="chunks seen, itself included, while a chunk gets cleaner, like 5 4 3 2; or: all")
    flag("--clean_kv_range", type=whole_number, metavar="N",
         help="for clean chunks; -1: the last of --kv_range")
    flag("--transition", action="append", type=chunk_and_kind, metavar="CHUNK[:KIND]", default=[],
         help="change the scene at this chunk, 1 is the second one; KIND: cut (default) or restyle")
    flag("--text_scale", dest="text_scales", type=float, help="pull of the prompt: number or table", **many)
    flag("--prev_scale", dest="prev_scales", type=float, help="pull of the chunks before", **many)
    flag("--cfg_t", type=float, help="where the entries of such tables begin, from 0 to 1", **many)
    flag("--special_tokens", help="hq duration static dynamic borderness 3d 2d; or: none", **many)
    flag("--negative_tokens", help="caption logo trans borderness; or: none", **many)

    flag = parser.add_argument_group("the model").add_argument
    flag("--model", type=model_folder, default=SHIPPED[DEFAULT_MODEL], metavar="FOLDER",
         help=f"or one that is bundled: {', '.join(SHIPPED)}; default: {DEFAULT_MODEL}, which is "
              f"tiny/{SHIPPED[DEFAULT_MODEL].name}")
    flag("--lora", action="append", type=Path, metavar="FILE", default=[],
         help="low-rank weights added to it, as tiny/train.py lora makes; again for more, which add up")
    flag("--lora_scale", action="append", type=float, metavar="X", default=[],
         help="how strongly it acts, once for all or once for each; default: 1")
    flag("--vae", type=Path, metavar="FOLDER", help="default: vae beside the model")
    flag("--t5", type=Path, metavar="FOLDER", help="default: t5 beside the model")
    flag("--config_file", metavar="JSON", help="an official config: its runtime_config replaces the model's")
    flag("--device", help="cuda, cuda:1, cpu, mps; default: cuda if there is one")
    flag("--dtype", choices=["float32", "bfloat16", "float16"],
         help="of the transformer's blocks; default: the model's, or bfloat16 for blocks and VAE on a CPU "
         "with instructions for it")
    flag("--stream", choices=["cpu", "disk"], help="weights come layer by layer: for a GPU that is too small")
    flag("--plan", type=number_and_card, nargs="?", const=([1, 8], [12, 24, 80]), metavar="[N x]GB",
         help="say what this run needs on which GPUs, or on one of 48 GB (48), four (4x48): compute nothing")
    flag("--backend", choices=["auto", "torch", "triton"], default="auto",
         help="default: auto, on a GPU the fastest that is right for each operation")
    # fmt: on

    def canonical(match: re.Match) -> str:
        name = match[1].replace("-", "_")
        return "--" + OTHER_NAMES.get(name, name)

    argv = sys.argv[1:] if argv is None else argv
    argv = [re.sub(r"^--([\w-]+)", canonical, word) for word in argv]
    args = parser.parse_args(argv)
    names = [word.partition("=")[0] for word in argv if word.startswith("--")]
    for name in names:                                   # a second value would silently replace the first
        if names.count(name) > 1 and name not in REPEATED:
            parser.error(f"{name} is given twice: leave one out")
    args.vae = args.vae or args.model.parent / "vae"
    args.t5 = args.t5 or args.model.parent / "t5"
    return args


if __name__ == "__main__":
    parse_arguments()                # --help and a mistyped flag answer at once: what follows takes seconds

import sentencepiece
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import checkpoints
import convert_weights
import magi
import media
import outputs
import parallel
import planner
import training
from captions import check_text, told_by
from checkpoints import build, check_device, read_config, read_headers, read_json, reading, require

if signal.getsignal(signal.SIGINT) is leave:                                 # from here on there may be files
    signal.signal(signal.SIGINT, signal.default_int_handler)

# ------------------------------------------------------------------------------------------------------------
# 2  Checks
# ------------------------------------------------------------------------------------------------------------
# All of it runs before a weight is read, and raises ValueError with what is wrong and what to do about it.


def check_flags(args: argparse.Namespace) -> None:
    """What can be told from the flags alone; fills in those that follow from others."""
    args.mode = args.mode or ("i2v" if args.image else "v2v" if args.video else "t2v")
    for mode, name in (("i2v", "image"), ("v2v", "video")):
        file = getattr(args, name)
        require(file or args.mode != mode, f"--mode {mode} needs an input: add --{name} FILE")
        require(not file or args.mode == mode,
                f"--{name} {file!r} does not go with --mode {args.mode}: use --mode {mode} or leave it out")
    require(args.prefix_frames is None or args.video,
            "--prefix_frames is for --video: leave it out, or add one")
    require(args.fit is None or args.mode != "t2v",
            "--fit is for --image and --video: leave it out, or add one of them")
    check_prompts(args)
    require(args.num_frames != "inf" or args.out.suffix.lower() == ".mp4" or str(args.out) == "-",
            f"--num_frames inf needs an .mp4 file, not {str(args.out)!r}, which is rewritten every second")
    scales = args.lora_scale
    require(args.lora or not scales, "--lora_scale needs a LoRA: add --lora FILE")
    require(len(scales) in (0, 1, len(args.lora)), f"{len(scales)} --lora_scale for {len(args.lora)} --lora: "
            f"give one for all, or one for each")
    require(all(map(math.isfinite, scales)), f"--lora_scale {scales} must be finite numbers")
    args.lora_scale = scales if len(scales) > 1 else (scales or [1.0]) * len(args.lora)
    args.prefix_frames = 32 if args.prefix_frames is None else args.prefix_frames
    args.fit = args.fit or "crop"


def check_prompts(args: argparse.Namespace) -> None:
    """Find the prompts of each video (args.videos), and if they are told line by line while it runs."""
    args.told = args.prompt == ["-"]
    require(args.told or "-" not in args.prompt, "--prompt - stands alone: it reads all prompts")
    require(not args.save_text or not (args.told or args.text or args.prompt_file),
            "--save_text needs its prompts at once, by --prompt TEXT")
    args.videos = [[] if args.told else args.prompt]
    if args.prompt_file:
        require(args.num_frames != "inf",
                "--prompt_file makes many videos, so none is endless: leave --num_frames inf out")
        require(str(args.out) != "-", "--out - is one video, --prompt_file makes many: give --out a folder")
        with reading("prompt file", args.prompt_file):
            lines = args.prompt_file.read_text("utf-8-sig").splitlines()
        args.videos = [[prompt.strip() for prompt in line.split("|")] for line in lines if line.strip()]
        require(args.videos, f"the prompt file {str(args.prompt_file)!r} is empty: write a prompt a line")
    args.prompt = sum(args.videos, [])
    require(args.prompt or args.text or args.told or args.mode != "t2v",
            'no --prompt: say what to show, for example --prompt "a red ball bounces"')
    try:
        for prompt in args.prompt:
            check_text(prompt)
    except ValueError as error:
        raise ValueError(f"{error}: check the encoding of the terminal or script") from None


def claim_outputs(args: argparse.Namespace, locks: contextlib.ExitStack) -> list:
    """Where each video goes, locked so that nobody else writes it; None in a process that does not write."""
    if parallel.rank() > 0:
        return [None] * len(args.videos)
    inputs = [f for f in (args.image, args.video, args.text, args.config_file, *args.lora) if f]
    inputs += [file for folder in (args.model, args.vae, args.t5) for file in folder.glob("*")]

    def claimed(path: Path) -> Path:
        return locks.enter_context(outputs.claimed(path, inputs))

    if args.save_text:
        require(args.save_text.suffix == ".safetensors",
                f"--save_text {str(args.save_text)!r} must end in .safetensors")
        args.save_text = claimed(args.save_text)
    if args.prompt_file:
        folder = Path("out") if args.out == Path("out.mp4") else args.out
        require(folder.is_dir() or not folder.exists() and not folder.suffix,
                f"--out {str(args.out)!r} must be a folder, for the videos of --prompt_file")
        folder.mkdir(exist_ok=True)
        names = [re.sub(r"[^a-z0-9]+", "-", prompts[0].lower())[:40].strip("-") for prompts in args.videos]
        files = [folder / f"{i:03d}{'-' * bool(name)}{name}.mp4" for i, name in enumerate(names)]
        locks.enter_context(outputs.locked(folder / "*.mp4"))                # one for all: it is an open file
        return [outputs.check_output(file, inputs) for file in files]
    if str(args.out) == "-":
        return [take_stdout(locks)]
    require(args.out.suffix.lower() in media.WRITERS,
            f"--out {str(args.out)!r} must end in .mp4, .gif or .png")
    return [claimed(args.out)]


def take_stdout(locks: contextlib.ExitStack):
    """Standard output, for the video alone: whatever else is printed goes to standard error."""
    require(not sys.stdout.isatty(), "--out - writes an mp4: send it to a player, such as | ffplay -")
    sys.stdout.flush()
    stdout = locks.enter_context(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)
    locks.callback(os.dup2, stdout.fileno(), 1)
    return stdout


def settings(args: argparse.Namespace, dit, cfg, notes: list[str]):
    """The SamplerConfig of the run: the model's, or that of --config_file, with the given flags on top."""
    cfg = training.lora_sampler(cfg, args.lora)
    if args.config_file:
        cfg = official_settings(args, dit, cfg, notes)
    given = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(cfg)}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if isinstance(value, list):
            nothing = "all" if name == "kv_ranges" else "none"               # an empty range list: all chunks
            given[name] = () if value == [nothing] else tuple(value)
    if args.num_frames == "inf":
        given["num_frames"] = None
    for name, neutral in (("text_scales", 0), ("prev_scales", 1)):
        if len(given.get(name, ())) == 1:    # one number replaces those entries of the table that do anything
            given[name] = tuple(v if v == neutral else given[name][0] for v in getattr(cfg, name))
    if cfg.distilled and given.keys() & {"text_scales", "prev_scales"}:
        notes.append("note: the guidance of a distilled model is built in, the flags for it do nothing")
    cfg = dataclasses.replace(cfg, **given)
    for chunk, kind in args.transition:
        cfg = magi.shot_transition(cfg, chunk, kind)
    return cfg


def official_settings(args: argparse.Namespace, dit, cfg, notes: list[str]):
    """The SamplerConfig of --config_file, for this model."""
    found = read_json(args.config_file)
    with reading("config", args.config_file):
        theirs, official = convert_weights.configs_from_upstream(found)
    if official.distilled != cfg.distilled:
        kinds = ("a base model", "a distilled one")
        notes.append(f"note: --config_file describes {kinds[official.distilled]}, but "
                     f"{str(args.model)!r} is {kinds[cfg.distilled]} and is run as such")
    if (theirs.num_layers, theirs.hidden_size) != (dit.num_layers, dit.hidden_size):
        notes.append(f"note: only the sampler settings of --config_file are used, it describes another "
                     f"model ({theirs.num_layers} layers, this one has {dit.num_layers})")
    on_gpus = convert_weights.note_on_gpus(found)
    if on_gpus and parallel.ranks() == 1:
        notes.append(on_gpus)
    return dataclasses.replace(official, distilled=cfg.distilled)


def choose_device(args: argparse.Namespace, fp8: bool, notes: list[str]) -> str:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    gpu = device.startswith("cuda")
    require(gpu or args.backend != "triton", f"backend 'triton' needs a GPU, not {device!r}: use 'torch'")
    magi.get_ops(args.backend, device)                                       # says if it cannot be used
    if fp8 and not (gpu and torch.cuda.get_device_capability(device) >= (8, 9)):
        notes.append(f"note: {device} has no fp8 arithmetic: fp8 weights are dequantised, which is slower")
    return device


def bf16_is_fast(device: str) -> bool:
    """Whether this CPU has instructions for products in bf16 (AVX512-BF16, AMX)."""
    return device == "cpu" and torch.cpu._is_avx512_bf16_supported()


def arithmetic(device: str, dtype: str) -> torch.autocast:
    """What to compute under: bf16 for everything where a CPU is fast at it. A video of the small model takes
    three quarters of the CPU time of float32 and has a PSNR of 52 dB to it: the eye sees no difference."""
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16" and bf16_is_fast(device))


def check_model(args: argparse.Namespace, dit, cfg, chunks: float) -> None:
    """Compare the files of the model with its configs and with what the run needs, by their headers."""
    vae = read_config(args.vae, "vae", magi.VAEConfig)
    empty = build(lambda: magi.DiT(dit), args.model)
    build(lambda: magi.VAE(vae), args.vae)
    for file in args.lora:
        training.check_lora(empty, file)
    file = args.model / "special_tokens.safetensors"
    shapes = read_headers([file] if file.is_file() else [])
    table = {name: torch.empty(shape, device="meta") for name, (shape, _) in shapes.items()}
    checkpoints.check_tokens(cfg, table, dit.text_dim, chunks)
    if not args.text:
        checkpoints.check_text_encoder(args.t5, dit.text_dim)


def notes_on_prompts(args: argparse.Namespace, cfg, native, chunks: float) -> list[str]:
    """What the model will make of the prompts, where that may surprise."""
    notes = []
    most = max(map(len, args.videos))
    if most > chunks:
        notes.append(f"warning: {most} prompts for {chunks} chunk{'s' * (chunks > 1)}: the last "
                     f"{'ones are' if most - chunks > 1 else 'one is'} not used")
    if args.text:
        return notes
    if not args.prompt and not args.told:
        notes.append(f"note: no --prompt, the {'image' if args.image else 'video'} alone says what happens")
    with reading("tokenizer", args.t5 / "spiece.model"):
        t5 = sentencepiece.SentencePieceProcessor(model_file=str(args.t5 / "spiece.model"))
    small = (args.t5 / "words.json").is_file()           # it says itself which words it knows
    for prompt in args.prompt:
        words = magi.clean_caption(prompt).split()
        unknown = [w for w in words if t5.unk_id() in t5.encode(w) and re.search(r"\w", w)]
        if re.search(r"\w", prompt) and not re.search(r"\w", "".join(words)):
            notes.append(f"warning: nothing of the prompt {prompt!r} can be read by the text encoder: "
                         f"say it in English")
        elif unknown and not small:
            notes.append(f"warning: the text encoder cannot read {', '.join(map(repr, unknown))}: "
                         f"say it in English")
    if small:
        notes += checkpoints.load_module("tiny_words", TINY / "words.py").notes(args, cfg, native)
    return notes


def notes_on_late_prompt(args: argparse.Namespace, cfg, prompt: str) -> list[str]:
    """The same for one that is told while the video is made."""
    alone = dict(prompt=[prompt], videos=[[prompt]], image=None, video=None)
    return notes_on_prompts(argparse.Namespace(**vars(args) | alone), cfg, cfg, 1)


def noted(prompts: Iterable[str | None], args: argparse.Namespace, cfg) -> Iterator[str | None]:
    """The prompts of told_by, with the notes on each new one."""
    before = None
    for prompt in prompts:
        if prompt and prompt != before:
            for note in notes_on_late_prompt(args, cfg, prompt):
                say(note)
        before = prompt
        yield prompt


def load_text(path: str, dit) -> tuple:
    """What --save_text wrote: text (n, L, C) and mask (n, L)."""
    with reading("text", path):
        saved = load_file(path)
        text, mask = saved["text"], saved["mask"]
    require(text.shape[1:] == (dit.text_length, dit.text_dim) and mask.shape == text.shape[:2] and len(text),
            f"text {path!r} has shape {tuple(text.shape)}, this model needs (prompts, {dit.text_length}, "
            f"{dit.text_dim}): save it again with this model")
    require(text.isfinite().all(), f"text {path!r} has numbers that are not finite: save it again")
    return text, mask


def read_configs(model: Path) -> tuple[magi.DiTConfig, magi.SamplerConfig]:
    return read_config(model, "dit", magi.DiTConfig), read_config(model, "sampler", magi.SamplerConfig)


def check(args: argparse.Namespace) -> SimpleNamespace:
    """All checks but those of the flags alone and of the outputs, and what they had to find out."""
    notes: list[str] = []
    require(not args.told or parallel.ranks() == 1, "--prompt - is read by one process: leave torchrun out")
    dit, native = read_configs(args.model)
    parallel.check_heads(dit)
    cfg = settings(args, dit, native, notes)
    fastest = 50 if args.out.suffix.lower() == ".gif" else 1000
    require(cfg.fps <= fastest, f"fps {cfg.fps} is too fast: {str(args.out)!r} can play {fastest} at most")
    device = choose_device(args, dit.fp8, notes)
    args.dtype = args.dtype or ("bfloat16" if bf16_is_fast(device) else dit.dtype)
    dit = dataclasses.replace(dit, dtype=args.dtype)
    size, image, video = (cfg.height, cfg.width), None, None
    if args.image:
        image = media.read_image(args.image, size, args.fit)
    if args.video:
        video = media.read_video(args.video, cfg.fps, None, max(4, args.prefix_frames), size, args.fit)
    clip = media.prefix_clip(image, video, args.prefix_frames)
    given = 0 if video is None else len(clip)
    total, filled = magi.count_chunks(magi.round_frames(cfg.num_frames), given // magi.FRAMES_PER_LATENT)
    chunks = math.inf if total is None else total - filled                   # that are generated
    check_model(args, dit, cfg, chunks)
    for chunk, _ in args.transition:
        require(chunk < chunks, f"transition at chunk {chunk}: the video has {chunks} chunks, counted from 0")
    notes += notes_on_prompts(args, cfg, native, chunks)
    text = load_text(args.text, dit) if args.text else None
    return SimpleNamespace(cfg=cfg, chunks=chunks, device=device, image=image, video=video, text=text,
                           text_length=dit.text_length, notes=notes)


# ------------------------------------------------------------------------------------------------------------
# 3  Running
# ------------------------------------------------------------------------------------------------------------


class Quiet:
    """stdout or stderr, whose reader may leave (`| head`): then it falls silent, and the video goes on."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def plan(args: argparse.Namespace) -> str:
    """What this run needs where; --model may also name a released model that is not here yet."""
    dit, native = magi.PRESETS.get(str(args.model)) or read_configs(args.model)
    beside = {}                                                              # if left out: the released ones
    if (args.vae / "config.json").is_file():
        beside["vae"] = read_config(args.vae, "vae", magi.VAEConfig)
    if (args.t5 / "config.json").is_file():
        beside["t5"] = read_json(args.t5 / "config.json")
    dit, told = dataclasses.replace(dit, dtype=args.dtype or dit.dtype), args.prompt == ["-"]
    return planner.plan(dit, settings(args, dit, native, []), *args.plan, keep_t5=told, **beside)


def prepare(argv: list[str] | None, locks: contextlib.ExitStack) -> list[dict]:
    """From the command line to the arguments of `generate`, for each video: checks, text encoder, model."""
    args = parse_arguments(argv)
    if args.plan:
        print(plan(args))
        return []
    check_flags(args)
    args.device = parallel.start(args.device)
    locks.enter_context(parallel.first_speaks())
    outs = parallel.agreed(claim_outputs)(args, locks)
    run = parallel.agreed(check)(args)
    for note in run.notes:
        say(note)
    if args.text:
        texts = [run.text]
    elif args.told:
        lines = io.FileIO(0, closefd=False)
        texts = [noted(told_by(lines, run.cfg.num_frames is None, say), args, run.cfg)]
    else:
        texts = parallel.agreed(encode_text)(args, run.text_length, run.device)
    pipe = parallel.agreed(load)(args, run.device)
    locks.enter_context(arithmetic(run.device, args.dtype))
    runs = []
    for i, (text, out) in enumerate(zip(texts, outs, strict=True)):
        cfg = dataclasses.replace(run.cfg, seed=run.cfg.seed + i)
        frames = partial(pipe, text, sampler=cfg, image=run.image, video=run.video, fit=args.fit,
                         prefix_frames=args.prefix_frames)
        runs.append(dict(frames=frames, cfg=cfg, chunks=run.chunks, out=out, device=run.device,
                         report=getattr(pipe.dit.ops, "report", None)))
    return runs


def encode_text(args: argparse.Namespace, length: int, device: str) -> list[tuple]:
    """The prompts of each video as the model reads them: text (n, L, C) and mask (n, L). T5 is gone when this
    returns, before the model itself is read."""
    captions = list(dict.fromkeys(args.prompt or [""]))                      # equal ones are encoded once
    batches = [captions[i : i + 16] for i in range(0, len(captions), 16)]
    encoded: dict[str, tuple] = {}
    with reading("text encoder", args.t5):
        t5 = parallel.T5(args.t5, length, device, stream=args.stream)
        for batch in batches:
            t5.keep = batch is not batches[-1]                               # it is gone after the last ones
            encoded |= zip(batch, zip(*t5(batch), strict=True), strict=True)
    rows = [[encoded[caption] for caption in prompts or [""]] for prompts in args.videos]
    texts = [tuple(map(torch.stack, zip(*row, strict=True))) for row in rows]
    if args.save_text and parallel.rank() == 0:
        about = {"prompts": json.dumps(args.prompt)}
        try:
            outputs.save(dict(zip(("text", "mask"), texts[0], strict=True)), args.save_text, about)
        except SafetensorError as error:
            raise OSError(f"cannot write {str(args.save_text)!r}: {error}") from None
    return texts


def load(args: argparse.Namespace, device: str) -> magi.MAGI:
    """The model with its LoRAs, and with T5 if prompts are told while it runs."""
    pipe = magi.load(args.model, vae=args.vae, t5=args.t5, device=device, dtype=args.dtype,
                     backend=args.backend, keep_t5=args.told, parts=parallel.parts(args.stream))
    for file, scale in zip(args.lora, args.lora_scale, strict=True):
        training.load_lora(pipe.dit, file, scale)
    if args.told:
        with reading("text encoder", args.t5):                               # now, not at the first prompt
            pipe.encode_text([""])
    return pipe


@contextlib.contextmanager
def uninterrupted():
    """Ctrl-C waits for the end of the block, so that a chunk is written whole or not at all."""
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def progress_bar(chunks: float) -> tuple[tqdm, Callable]:
    """The bar, and what to call after every step. Where nobody watches (a log), a line now and then instead:
    at once, after a second, then after twice as long, up to a minute."""
    bar = tqdm(unit=" steps", desc="starting", dynamic_ncols=True, disable=not sys.stderr.isatty())
    pause, next_line = 1, 0.0

    def progress(p: magi.Progress) -> None:
        nonlocal pause, next_line
        where, step = f"chunk {p.chunk + 1}", f"step {p.step}"
        if p.total is not None:
            where, step = f"{where}/{chunks}", f"{step} of {p.total}"
        if not bar.disable:
            bar.total = p.total
            bar.set_description_str(where, refresh=False)
            bar.update(p.step - bar.n)
        elif p.step == p.total or time.monotonic() >= next_line:
            say(f"{where}: {step}")
            next_line, pause = time.monotonic() + pause, min(2 * pause, 60)

    return bar, progress


def generate(frames, cfg, chunks: float, out: Any, device: str, report: Callable[[], str] | None = None
             ) -> int:
    """Make the video and write it chunk by chunk, then say how it went. Returns the exit code.

    out: a file, a stream for an mp4, or None where another process writes. report: which kernels were used.
    """
    bar, progress = progress_bar(chunks)
    name, suffix = (out, out.suffix.lower()) if isinstance(out, Path) else ("-", ".mp4")
    writer = media.WRITERS[suffix](out, cfg.fps) if out else None
    is_stream = out and not isinstance(out, Path)        # a write may wait for its reader, even for ever
    code, made, first, last = 0, 0, 0.0, 0.0
    start = time.perf_counter()
    try:
        for chunk in frames(progress=progress):
            with contextlib.nullcontext() if is_stream else uninterrupted():
                if writer:
                    writer.write(chunk)
                made, last = made + len(chunk), time.perf_counter() - start
                first = first or last
    except (KeyboardInterrupt, BrokenPipeError) as error:                    # or the player was closed
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_IGN)                     # once is enough
            code = 130
        if is_stream:                                                        # whose rest nobody reads
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
    except (OSError, ValueError, FloatingPointError) as error:
        where = f"cannot write {str(name)!r}: " if isinstance(error, OSError) else ""
        say(f"error: {where}{error}")
        code = 1
    finally:
        bar.close()
    if writer:
        with contextlib.suppress(KeyboardInterrupt), uninterrupted():        # what is made will be finished
            writer.close()
    how = {0: "", 1: "stopped: ", 130: "interrupted: "}[code]
    if not made:
        print(f"{how}no chunk could be written, {name} is as it was")
        return code
    pace = last / made * cfg.fps
    word = "faster" if pace < 1 else "slower"
    print(f"{how}first chunk after {first:.2f} s, {pace:.2f} s of computing per second of video ({word} than "
          f"it plays), {peak_memory(device)}, {made} frames -> {name}")
    if report:
        print(report())
    return code


def peak_memory(device: str) -> str:
    if torch.device(device).type == "cuda":
        return f"peak GPU memory {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB"
    try:
        import resource
    except ImportError:                                                      # Windows
        return "peak memory unknown"
    unit = 1 if sys.platform == "darwin" else 1024                           # a Mac counts in bytes
    return f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB"


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code: see the top of the file. A flag that argparse refuses
    leaves by SystemExit(2)."""
    on_ctrl_c = signal.getsignal(signal.SIGINT)
    with checkpoints.short_warnings(say), contextlib.redirect_stdout(Quiet(sys.stdout)), \
            contextlib.redirect_stderr(Quiet(sys.stderr)) as stderr, contextlib.ExitStack() as locks:
        try:
            code = 0
            for run in prepare(argv, locks):
                code = max(code, generate(**run))
                if code == 130:
                    break
            return code
        except (ValueError, OSError, ImportError) as error:
            say(f"error: {error}")
            return 2
        except KeyboardInterrupt:
            print("interrupted before anything was written")
            return 130
        except checkpoints.KernelError as error:
            say(f"error: {error}", stderr)
            return 1
        except (MemoryError, RuntimeError) as error:
            if parallel.lost_another(error):
                if parallel.first_to_tell():
                    say("error: another process has stopped, and all with it; what was written stays", stderr)
                return 1
            if not checkpoints.out_of_memory(error):
                raise                                                       # a fault in the code: show it all
            say(f"error: out of memory, see --plan, or try --stream cpu, a smaller --height and --width, "
                f"or --window 1 --kv_range 2 ({error})", stderr)
            return 1
        finally:
            signal.signal(signal.SIGINT, on_ctrl_c)


if __name__ == "__main__":
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)                             # no traceback while Python ends
    parallel.leave(code)
