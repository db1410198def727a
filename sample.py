"""Make videos with MAGI-1 from the command line.

    python sample.py --prompt "a red ball bounces"                        text to video, out.mp4
    python sample.py --mode i2v --image ball.png --prompt "it bounces"    a picture comes to life
    python sample.py --mode v2v --video clip.mp4 --num_frames inf         goes on after a video until Ctrl-C
    python sample.py --prompt "a red ball" --prompt "a blue ball"         one prompt per second of video
    python sample.py --prompt - --num_frames inf --out - | ffplay -       speak to it while it plays

magi.py makes the frames, media.py reads and writes files; here are flags, checks and the order of a run. Each
second of video is written as soon as it is clean: the output plays while it grows and outlives kill -9. The
exit code is 2, after one line on stderr, for bad input; 1 for a later failure; 130 after Ctrl-C.

Contents: 1 Flags, 2 Checks, 3 Running.
"""

# ruff: noqa: E402
from __future__ import annotations

import terminal

if __name__ == "__main__":
    terminal.begin()                                                         # before PyTorch is imported

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from terminal import Parser, exit_code, peak_memory, progress_bar, say, uninterrupted, whole_number

# ------------------------------------------------------------------------------------------------------------
# 1  Flags
# ------------------------------------------------------------------------------------------------------------
# A sampling flag that is left out is None: its value comes from --config_file or the model's own config.json.

# Other names that are taken for these flags, most of them the official code's:
OTHER_NAMES = {
    "image_path": "image", "prefix_video_path": "video", "output_path": "out", "output": "out",
    "num_steps": "steps", "window_size": "window", "frames": "num_frames", "text_scales": "text_scale",
    "prev_scales": "prev_scale", "kv_ranges": "kv_range", "clean_chunk_kvrange": "clean_kv_range",
}  # fmt: skip
# Names in other programs are suggested, not taken, since the meaning differs a little:
SUGGESTED = {
    "guidance": "text_scale", "guidance_scale": "text_scale", "cfg": "text_scale", "cfg_scale": "text_scale",
    "negative_prompt": "negative_tokens", "num_inference_steps": "steps", "duration": "num_frames",
}  # fmt: skip

TINY = Path(__file__).resolve().parent / "tiny"                              # the bundled models
SHIPPED = {"tiny": TINY / "distill", "tiny-distill": TINY / "distill", "tiny-base": TINY / "base"}
DEFAULT_MODEL = "tiny"


def model_folder(text: str) -> Path:
    return SHIPPED.get(text, Path(text))


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
    parser.other_names, parser.suggested = OTHER_NAMES, SUGGESTED
    many = dict(nargs="+", metavar="X")
    # fmt: off
    group = parser.add_argument_group("what to make")
    flag = group.add_argument
    one_prompt = group.add_mutually_exclusive_group().add_argument
    one_input = group.add_mutually_exclusive_group().add_argument
    flag("--mode", choices=["t2v", "i2v", "v2v"], help="text, image, video to video; default: by the input")
    one_prompt("--prompt", action="append", metavar="TEXT", default=[],
               help="what to show; given again: in the next second; the last one stays. -: each line of "
                    "standard input is the prompt from the next chunk on, its end ends an endless video")
    one_prompt("--prompt_file", type=Path, metavar="FILE",
               help="a line is a video, with | between its seconds; --out is a folder, the seed counts up")
    one_prompt("--text", metavar="FILE", help="prompts that --save_text has encoded: T5 is not needed")
    flag("--save_text", type=Path, metavar="FILE", help="save the encoded prompts (.safetensors)")
    one_input("--image", metavar="FILE", help="i2v: the first frame")
    one_input("--video", metavar="FILE", help="v2v: the result goes on where this ends")
    flag("--out", type=Path, metavar="FILE",
         help=".mp4, .gif, or .png for a contact sheet; default: out.mp4; an old file is replaced. -: an mp4 "
              "on standard output")
    flag("--fit", choices=["crop", "stretch", "pad"], help="how the input is brought to size; default: crop")
    flag("--prefix_frames", type=whole_number, metavar="N",
         help="v2v: how many of the last frames of --video the model sees; default: 32")

    flag = parser.add_argument_group("the video (default: as the model's config says)").add_argument
    flag("--num_frames", type=partial(whole_number, otherwise="inf"), metavar="N",
         help="24 are a second; inf: until Ctrl-C")
    flag("--height", type=whole_number, metavar="PX", help="a multiple of 16")
    flag("--width", type=whole_number, metavar="PX", help="a multiple of 16")
    flag("--fps", type=whole_number, metavar="N", help="frames per second")
    flag("--seed", type=whole_number, metavar="N", help="another seed, another video")

    flag = parser.add_argument_group("sampling (likewise)").add_argument
    flag("--steps", dest="num_steps", type=whole_number, metavar="N", help="denoising steps of each chunk")
    flag("--window", type=whole_number, metavar="N", help="chunks in flight at once")
    flag("--kv_range", dest="kv_ranges", type=partial(whole_number, otherwise="all"), **many,
         help="how many chunks a chunk sees, itself included, stage by stage, like 5 4 3 2; or: all")
    flag("--clean_kv_range", type=whole_number, metavar="N",
         help="the same for clean chunks; -1: the last of --kv_range")
    flag("--transition", action="append", type=chunk_and_kind, metavar="CHUNK[:KIND]", default=[],
         help="change the scene at this chunk, 1 is the second one; KIND: cut (default) or restyle")
    flag("--text_scale", dest="text_scales", type=float, help="guidance by prompt: a number or table", **many)
    flag("--prev_scale", dest="prev_scales", type=float, help="guidance by the chunks before", **many)
    flag("--cfg_t", type=float, help="at which t, from 0 to 1, each entry of these tables begins", **many)
    flag("--special_tokens", help="hq duration static dynamic borderness 3d 2d; or: none", **many)
    flag("--negative_tokens", help="caption logo trans borderness; or: none", **many)

    flag = parser.add_argument_group("the model").add_argument
    flag("--model", type=model_folder, default=SHIPPED[DEFAULT_MODEL], metavar="FOLDER",
         help=f"or one that is bundled: {', '.join(SHIPPED)}; default: {DEFAULT_MODEL} (tiny-distill)")
    flag("--lora", action="append", type=Path, metavar="FILE", default=[],
         help="low-rank weights added to it, as training.py lora makes; again for more, which add up")
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
    flag("--plan", type=number_and_card, nargs="?", const=([1, 8], [12, 24, 80]), metavar="CARD",
         help="print how much memory this run needs, and make no video; CARD: 48 for a GPU of 48 GB, 4x48 "
              "for four; --model may be one that is not here yet, like 24B-base")
    flag("--backend", choices=["auto", "torch", "triton"], default="auto",
         help="which kernels; default: auto, on a GPU the fastest correct one for each operation")
    # fmt: on

    args = parser.parse_args(argv)
    from checkpoints import beside  # with PyTorch, which takes seconds

    args.vae = args.vae or beside(args.model, "vae")
    args.t5 = args.t5 or beside(args.model, "t5")
    return args


if __name__ == "__main__":
    parse_arguments()                # --help and a mistyped flag answer at once: what follows takes seconds

import torch

import captions
import checkpoints
import convert_weights
import magi
import media
import outputs
import parallel
import planner
import training
from checkpoints import build, check_device, read_config, reading, require

# ------------------------------------------------------------------------------------------------------------
# 2  Checks
# ------------------------------------------------------------------------------------------------------------
# All of it runs before a weight is read, and raises ValueError with what is wrong and what to do about it.


def check_flags(args: argparse.Namespace) -> None:
    """Check the flags alone, reading no file but --prompt_file, and fill in those that follow from others."""
    for name in ("image", "video", "text", "config_file"):
        require(getattr(args, name) != "", f"--{name} '' names no file: give one, or leave it out (is it a "
                f"variable that is not set?)")
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
    args.prefix_frames = 32 if args.prefix_frames is None else args.prefix_frames
    args.fit = args.fit or "crop"
    args.out = args.out or Path("out" if args.prompt_file else "out.mp4")
    check_prompts(args)
    out, ending = str(args.out), args.out.suffix.lower()
    require(args.num_frames != "inf" or ending == ".mp4" or out == "-",
            f"--num_frames inf needs an .mp4 file, not {out!r}, which is rewritten every second")
    require(args.prompt_file or ending in media.WRITERS or out == "-",
            f"--out {out!r} must end in .mp4, .gif or .png")
    require(args.save_text is None or args.save_text.suffix == ".safetensors",
            f"--save_text {str(args.save_text)!r} must end in .safetensors")
    check_lora_scales(args)


def check_lora_scales(args: argparse.Namespace) -> None:
    """Set args.lora_scale to one number for each LoRA."""
    scales = args.lora_scale
    require(args.lora or not scales, "--lora_scale needs a LoRA: add --lora FILE")
    require(len(scales) in (0, 1, len(args.lora)), f"{len(scales)} --lora_scale for {len(args.lora)} --lora: "
            f"give one for all, or one for each")
    require(all(map(math.isfinite, scales)), f"--lora_scale {scales} must be finite numbers")
    args.lora_scale = scales if len(scales) > 1 else (scales or [1.0]) * len(args.lora)


def check_prompts(args: argparse.Namespace) -> None:
    """Set args.videos, the prompts of each video, and args.told: they come line by line while it runs."""
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
    for prompt in args.prompt:
        captions.check_text(prompt)


def claim_outputs(args: argparse.Namespace, locks: contextlib.ExitStack) -> list:
    """Where each video goes, locked so that nobody else writes it; None in a process that does not write."""
    if parallel.rank() > 0:
        return [None] * len(args.videos)
    inputs = [f for f in (args.image, args.video, args.text, args.config_file, *args.lora) if f]
    inputs += [file for folder in (args.model, args.vae, args.t5) for file in folder.glob("*")]
    if args.save_text:
        args.save_text = locks.enter_context(outputs.claimed(args.save_text, inputs))
    if args.prompt_file:
        names = [re.sub(r"[^a-z0-9]+", "-", prompts[0].lower())[:40].strip("-") for prompts in args.videos]
        names = [f"{i:03d}{'-' * bool(name)}{name}.mp4" for i, name in enumerate(names)]
        return locks.enter_context(outputs.claimed_folder(args.out, names, inputs))
    if str(args.out) == "-":
        return [locks.enter_context(outputs.standard_output())]
    out = locks.enter_context(outputs.claimed(args.out, inputs))
    require(out.suffix.lower() == args.out.suffix.lower(), f"--out {str(args.out)!r} is a link to "
            f"{str(out)!r}, which ends otherwise: remove it, or give another name")
    return [out]


def settings(args: argparse.Namespace, dit, cfg) -> tuple[magi.SamplerConfig, list[str]]:
    """The SamplerConfig of the run, which is the model's or that of --config_file with the given flags on
    top, and notes on it."""
    notes: list[str] = []
    acting = [file for file, scale in zip(args.lora, args.lora_scale, strict=True) if scale != 0]
    cfg = training.lora_sampler(cfg, acting)
    if args.config_file:
        cfg, notes = convert_weights.official_sampler(args.config_file, args.model, dit, cfg)
    given = {name: value for name, value in vars(args).items() if name in vars(cfg) and value is not None}
    for name, value in given.items():
        if isinstance(value, list):
            empty = "all" if name == "kv_ranges" else "none"                 # no ranges: no chunk is left out
            given[name] = () if value == [empty] else tuple(value)
    if args.num_frames == "inf":
        given["num_frames"] = None
    for name, neutral in (("text_scales", 0), ("prev_scales", 1)):
        # One number replaces the entries of the table that guide at all.
        if len(given.get(name, ())) == 1 and "cfg_t" not in given:
            given[name] = tuple(v if v == neutral else given[name][0] for v in getattr(cfg, name))
    if cfg.distilled and given.keys() & {"text_scales", "prev_scales"}:
        notes.append("note: the guidance of a distilled model is built in, the flags for it do nothing")
    cfg = dataclasses.replace(cfg, **given)
    for chunk, kind in args.transition:
        cfg = magi.shot_transition(cfg, chunk, kind)
    return cfg, notes


def choose_device(args: argparse.Namespace) -> str:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    magi.get_ops(args.backend, device)                                       # raises if it cannot be used
    return device


def bf16_is_fast(device: str) -> bool:
    """Whether this CPU has instructions for products in bf16 (AVX512-BF16, AMX)."""
    return device == "cpu" and torch.cpu._is_avx512_bf16_supported()


def arithmetic(device: str, dtype: str) -> torch.autocast:
    """What to compute under: bf16 for everything where a CPU is fast at it. A video of the small model takes
    half the CPU time of float32 and has a PSNR of 52 dB to it: the eye sees no difference.
    fp8 layers then round their products before they scale them, too: 3e-3 off from the recorded ones.
    """
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16" and bf16_is_fast(device))


def check_model(args: argparse.Namespace, dit, cfg, chunks: float) -> None:
    """Compare the headers of the model's files with its configs and with what the run needs."""
    vae = read_config(args.vae, "vae", magi.VAEConfig)
    empty = build(lambda: magi.DiT(dit), args.model)
    build(lambda: magi.VAE(vae), args.vae)
    for file in args.lora:
        training.check_lora(empty, file)
    checkpoints.check_tokens(cfg, checkpoints.read_special_tokens(args.model), dit.text_dim, chunks)
    if not args.text:
        checkpoints.check_text_encoder(args.t5, dit.text_dim)


def small_model(t5: Path) -> Any:
    """What tiny/words.py knows of a model whose text encoder lists its words; None for the large ones."""
    is_small = (t5 / "words.json").is_file()
    return checkpoints.load_module("tiny_words", TINY / "words.py") if is_small else None


def notes_on_run(args: argparse.Namespace, cfg, native, chunks: float) -> list[str]:
    """What the model will make of prompts, size and input, where that may surprise."""
    notes = []
    most = max(map(len, args.videos))
    if most > chunks:
        notes.append(f"warning: {most} prompts for {chunks} chunk{'s' * (chunks > 1)}: the last "
                     f"{'ones are' if most - chunks > 1 else 'one is'} not used")
    if args.text:
        return notes
    if not args.prompt and not args.told:
        notes.append(f"note: no --prompt, the {'image' if args.image else 'video'} alone says what happens")
    if small := small_model(args.t5):
        notes += small.notes_on_run(args, cfg, native)
    return notes + notes_on_prompts(args, args.prompt)


def notes_on_prompts(args: argparse.Namespace, prompts: Sequence[str]) -> list[str]:
    """What the model does not understand in these prompts, which may come while the video is made."""
    small = small_model(args.t5)
    notes = captions.unread(args.t5, prompts, words=not small)
    return notes + (small.notes_on_prompts(args, prompts) if small else [])


def read_configs(model: Path) -> tuple[magi.DiTConfig, magi.SamplerConfig]:
    return read_config(model, "dit", magi.DiTConfig), read_config(model, "sampler", magi.SamplerConfig)


def check(args: argparse.Namespace) -> SimpleNamespace:
    """All checks that read files, of the inputs and the model -> what they have found out about the run."""
    require(not args.told or parallel.ranks() == 1, "--prompt - is read by one process: leave torchrun out")
    dit, native = read_configs(args.model)
    parallel.check_heads(dit)
    cfg, notes = settings(args, dit, native)
    dataclasses.replace(cfg, seed=cfg.seed + len(args.videos) - 1)           # the last seed is checked, too
    fastest = 50 if args.out.suffix.lower() == ".gif" else 1000
    require(cfg.fps <= fastest, f"fps {cfg.fps} is too fast: {str(args.out)!r} can play {fastest} at most")
    device = choose_device(args)
    if dit.fp8 and not (device.startswith("cuda") and torch.cuda.get_device_capability(device) >= (8, 9)):
        notes.append(f"note: {device} has no fp8 arithmetic: fp8 weights are dequantised, which is slower")
    args.dtype = args.dtype or ("bfloat16" if bf16_is_fast(device) else dit.dtype)
    dit = dataclasses.replace(dit, dtype=args.dtype)
    size = (cfg.height, cfg.width)
    count = max(magi.FRAMES_PER_LATENT, args.prefix_frames)                  # prefix_clip says what is wrong
    image = media.read_image(args.image, size, args.fit) if args.image else None
    video = media.read_video(args.video, cfg.fps, None, count, size, args.fit) if args.video else None
    given = media.prefix_clip(image, video, args.prefix_frames)
    latents = 0 if given is None else len(given) // magi.FRAMES_PER_LATENT   # an image is no whole latent
    total, filled = magi.count_chunks(magi.round_frames(cfg.num_frames), latents)
    chunks = math.inf if total is None else total - filled                   # that will be generated
    check_model(args, dit, cfg, chunks)
    for chunk, _ in args.transition:
        require(chunk < chunks, f"transition at chunk {chunk}: the video has {chunks} "
                f"chunk{'s' * (chunks > 1)}, counted from 0")
    notes += notes_on_run(args, cfg, native, chunks)
    text = captions.load_text(args.text, dit.text_length, dit.text_dim) if args.text else None
    return SimpleNamespace(cfg=cfg, chunks=chunks, device=device, image=image, video=video, text=text,
                           text_length=dit.text_length, notes=notes)


# ------------------------------------------------------------------------------------------------------------
# 3  Running
# ------------------------------------------------------------------------------------------------------------


def memory_table(args: argparse.Namespace) -> str:
    """The text of --plan; --model may also name a released model that is not here yet."""
    check_lora_scales(args)
    is_absent = args.model.name in magi.PRESETS and not args.model.exists()
    dit, native = magi.PRESETS[args.model.name] if is_absent else read_configs(args.model)
    dit = dataclasses.replace(dit, dtype=args.dtype or dit.dtype)
    run, _ = settings(args, dit, native)
    return planner.memory_table(dit, run, args.vae, args.t5, args.prompt == ["-"], *args.plan)


def prepare(argv: list[str] | None, locks: contextlib.ExitStack) -> Iterator[dict]:
    """From the command line to the arguments of `generate`, for each video: checks, text encoder, model."""
    args = parse_arguments(argv)
    if args.plan:
        print(memory_table(args))
        return
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
        texts = [noted(captions.told_by(io.FileIO(0, closefd=False), run.cfg.num_frames is None, say), args)]
    else:
        texts = parallel.agreed(encode_text)(args, run.text_length, run.device)
    pipe = parallel.agreed(load)(args, run.device)
    locks.enter_context(arithmetic(run.device, args.dtype))
    for i, (text, out) in enumerate(zip(texts, outs, strict=True)):
        cfg = dataclasses.replace(run.cfg, seed=run.cfg.seed + i)
        frames = partial(pipe, text, sampler=cfg, image=run.image, video=run.video,
                         prefix_frames=args.prefix_frames)
        yield dict(frames=frames, cfg=cfg, chunks=run.chunks, out=out, device=run.device,
                   report=getattr(pipe.dit.ops, "report", None))


def noted(prompts: Iterable[str | None], args: argparse.Namespace) -> Iterator[str | None]:
    """The prompts of told_by, which repeats one until the next comes; say the notes on each new one."""
    for prompt, again in itertools.groupby(prompts):
        for note in notes_on_prompts(args, [prompt]) if prompt else []:
            say(note)
        yield from again


def encode_text(args: argparse.Namespace, length: int, device: str) -> list[tuple]:
    """The prompts of each video as the model reads them: text (n, L, C) and mask (n, L). T5 is freed before
    this returns, so the model itself finds its memory free."""
    terminal.announce("text encoder", args.t5)
    with reading("text encoder", args.t5):
        t5 = parallel.T5(args.t5, length, device, stream=args.stream)
        encoded = {prompt: row for prompt, *row in t5.each(args.prompt or [""])}
    rows = [[encoded[prompt] for prompt in prompts or [""]] for prompts in args.videos]
    texts = [tuple(map(torch.stack, zip(*row, strict=True))) for row in rows]
    if args.save_text and parallel.rank() == 0:
        text, mask = texts[0]
        outputs.save({"text": text, "mask": mask}, args.save_text, {"prompts": json.dumps(args.prompt)})
    return texts


def load(args: argparse.Namespace, device: str) -> magi.MAGI:
    """The model with its LoRAs, and with T5 if prompts are told while it runs."""
    if args.stream != "disk":                                                # which reads layer by layer
        terminal.announce("model", args.model)
    pipe = magi.load(args.model, vae=args.vae, t5=args.t5, device=device, dtype=args.dtype,
                     backend=args.backend, keep_t5=args.told, parts=parallel.parts(args.stream))
    for file, scale in zip(args.lora, args.lora_scale, strict=True):
        training.load_lora(pipe.dit, file, scale)
    if args.told:
        terminal.announce("text encoder", args.t5)
        with reading("text encoder", args.t5):                               # now, not at the first prompt
            pipe.encode_text([""])
    return pipe


def generate(frames, cfg, chunks: float, out: Any, device: str, report: Callable[[], str] | None = None
             ) -> int:
    """Make the video and write it chunk by chunk, then say how it went. Returns the exit code.

    frames: called with progress=, gives chunk after chunk. out: a file, a stream for an mp4, or None where
    another process writes. report: says which kernels were used.
    """
    bar, progress = progress_bar(chunks)
    name, suffix = (out, out.suffix.lower()) if isinstance(out, Path) else ("-", ".mp4")
    writer = media.WRITERS[suffix](out, cfg.fps) if out else None
    is_stream = out and not isinstance(out, Path)        # a write may wait for its reader, even for ever
    code, made, first, is_writing = 0, 0, 0.0, False
    start = last = time.perf_counter()
    try:
        for chunk in frames(progress=progress):
            with contextlib.nullcontext() if is_stream else uninterrupted():
                if writer:
                    is_writing = True
                    writer.write(chunk)
                    is_writing = False
                made, last = made + len(chunk), time.perf_counter()
                first = first or last
    except (KeyboardInterrupt, BrokenPipeError) as error:                    # or the player was closed
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_IGN)                     # once is enough
            code = 130
        if is_stream:                                                        # nobody reads its rest
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
    except (OSError, ValueError, FloatingPointError) as error:
        where = f"cannot write {str(name)!r}: " if is_writing and isinstance(error, OSError) else ""
        say(f"error: {where}{error}")
        code = 1
    finally:
        bar.close()
    if writer:
        with contextlib.suppress(KeyboardInterrupt), uninterrupted():        # what is made will be finished
            writer.close()
    if isinstance(out, Path) and made and not out.exists():
        name = "where it was moved to"
    ended = {0: "", 1: "stopped: ", 130: "interrupted: "}[code]
    if made:
        pace = (last - start) / made * cfg.fps
        print(f"{ended}first chunk after {first - start:.2f} s, {pace:.2f} s of computing per second of "
              f"video ({'faster' if pace < 1 else 'slower'} than it plays), {peak_memory(device)}, "
              f"{made} frame{'s' * (made > 1)} -> {name}")
        if report:
            print(report())
    else:
        print(f"{ended}no chunk could be written, {name} is as it was")
    return code


def make_videos(argv: list[str] | None) -> int:
    """Make all videos that are asked for, one after the other -> the exit code."""
    code = 0
    with contextlib.ExitStack() as locks:
        locks.callback(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT))    # see generate
        try:
            for run in prepare(argv, locks):
                code = max(code, generate(**run))
                if code == 130:
                    break
        except KeyboardInterrupt:
            print("interrupted before anything was written")
            code = 130
    return code


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code: see the top of the file. A flag that argparse refuses
    leaves by SystemExit(2)."""
    return exit_code(
        lambda: make_videos(argv), kept="what was written stays", too_large=", see --plan, or try "
        "--stream cpu, a smaller --height and --width, or --window 1 --kv_range 2")


if __name__ == "__main__":
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)                             # no traceback while Python ends
    parallel.leave(code)
