"""Make videos with MAGI-1 from the command line.

    python sample.py --prompt "a red ball bounces"                        text to video, out.mp4
    python sample.py --mode i2v --image ball.png --prompt "it bounces"    a picture comes to life
    python sample.py --mode v2v --video clip.mp4 --num_frames inf         goes on after a video until Ctrl-C
    python sample.py --prompt "a red ball" --prompt "a blue ball"         one prompt per second of video

magi.py makes the frames; here is what surrounds them: flags, media files, checks, a progress bar. Each second
of video is written as soon as it is clean, so the output plays while it grows and outlives Ctrl-C or kill -9.
Bad input gets one line on stderr and exit code 2 before a weight is read; 1 is a later failure, 130 Ctrl-C.

Contents: 1 Flags, 2 Reading, 3 Writing, 4 Checking, 5 Running.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
import warnings
from collections import deque
from difflib import get_close_matches
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

# torch and magi take seconds to import, so functions import them: --help and a mistyped flag answer at once.

# ------------------------------------------------------------------------------------------------------------
# 1  Flags
# ------------------------------------------------------------------------------------------------------------
# A flag that is left out is None, and its value comes from --config_file or from the model's own config.json.
# Hyphens and underscores are the same. Other names for flags, most of them the official code's:

OTHER_NAMES = {
    "image_path": "image", "prefix_video_path": "video", "output_path": "out", "output": "out",
    "num_steps": "steps", "window_size": "window", "frames": "num_frames", "text_scales": "text_scale",
    "prev_scales": "prev_scale", "kv_ranges": "kv_range", "clean_chunk_kvrange": "clean_kv_range",
}  # fmt: skip


# The small models that come along. "tiny" is the distilled one, or the base one where that has not been made.
TINY = Path(__file__).resolve().parent / "tiny"
SHIPPED = {"tiny-distill": TINY / "distill", "tiny-base": TINY / "base"}
SHIPPED["tiny"] = SHIPPED["tiny-distill" if (TINY / "distill").is_dir() else "tiny-base"]
DEFAULT_MODEL = "tiny"


def model_folder(text: str) -> Path:
    return SHIPPED.get(text, Path(text))


class Parser(argparse.ArgumentParser):
    """argparse that raises ValueError, where it would print its usage and leave."""

    def error(self, message: str):
        if message.startswith("unrecognized arguments: "):
            word = message.split()[2]
            known = get_close_matches(word, self._option_string_actions, 1)
            message += f" (did you mean {known[0]}?)" if known and word.startswith("-") \
                else " (a prompt of several words needs quotes)"
        raise ValueError(f"{message}; see --help")


def number(text: str) -> float:
    with contextlib.suppress(ValueError):
        if math.isfinite(value := float(text)):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")


def whole_number(text: str, complaint: str) -> int:
    if not re.fullmatch(r"-?\d+", text):
        raise argparse.ArgumentTypeError(complaint)
    return int(text)


def frame_count(text: str) -> float:
    return math.inf if text == "inf" else whole_number(text, f"{text!r} is neither a whole number nor inf")


def chunks_seen(text: str) -> str | int:
    return text if text == "all" else whole_number(text, f"{text!r} is neither a whole number nor all")


def chunk_and_kind(text: str) -> tuple[int, str]:
    chunk, _, kind = text.partition(":")
    return whole_number(chunk, f"{text!r} is not a chunk, such as 2, or 2:restyle"), kind or "cut"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The flags, under the names of SamplerConfig's fields where there is one."""
    parser = Parser(prog="sample.py", allow_abbrev=False, usage="python sample.py --prompt TEXT [more flags]",
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                    description="\n".join(__doc__.splitlines()[:7]),
                    epilog="The official --image_path, --prefix_video_path and --output_path work too.")
    many = dict(nargs="+", metavar="X")
    # fmt: off
    flag = parser.add_argument_group("what to make").add_argument
    flag("--mode", choices=["t2v", "i2v", "v2v"], help="text, image, video to video; default: by the input")
    flag("--prompt", action="append", metavar="TEXT", help="again for the next second; the last one goes on")
    flag("--image", metavar="FILE", help="i2v: the first frame")
    flag("--video", metavar="FILE", help="v2v: the result goes on where this ends")
    flag("--out", type=Path, default="out.mp4", metavar="FILE",
         help=".mp4, .gif, or .png for a contact sheet; default: out.mp4; an old one is replaced")
    flag("--fit", choices=["crop", "stretch", "pad"], default="crop", help="of the input; default: crop")
    flag("--prefix_frames", type=int, default=32, metavar="N",
         help="v2v: how many of its last frames the model sees; default: 32")

    flag = parser.add_argument_group("the video (default: as the model's config says)").add_argument
    flag("--num_frames", type=frame_count, metavar="N", help="24 are a second; inf: until Ctrl-C")
    flag("--height", type=int, metavar="PX", help="a multiple of 16")
    flag("--width", type=int, metavar="PX", help="a multiple of 16")
    flag("--fps", type=int, metavar="N", help="frames per second")
    flag("--seed", type=int, metavar="N", help="another seed, another video")

    flag = parser.add_argument_group("sampling (likewise)").add_argument
    flag("--steps", dest="num_steps", type=int, metavar="N", help="per chunk; a chunk is one second of video")
    flag("--window", type=int, metavar="N", help="chunks in flight at once")
    flag("--kv_range", dest="kv_ranges", type=chunks_seen, **many,
         help="chunks seen, itself included, while a chunk gets cleaner, like 5 4 3 2; or: all")
    flag("--clean_kv_range", type=int, metavar="N", help="for clean chunks; -1: the last of --kv_range")
    flag("--transition", action="append", type=chunk_and_kind, metavar="CHUNK[:KIND]", default=[],
         help="change the scene at this chunk, 1 is the second one; KIND: cut (default) or restyle")
    flag("--text_scale", dest="text_scales", type=number, help="pull of the prompt: number or table", **many)
    flag("--prev_scale", dest="prev_scales", type=number, help="pull of the chunks before", **many)
    flag("--cfg_t", type=number, help="where the entries of such tables begin, from 0 to 1", **many)
    flag("--special_tokens", help="hq duration static dynamic borderness 3d 2d; or: none", **many)
    flag("--negative_tokens", help="caption logo trans borderness; or: none", **many)

    flag = parser.add_argument_group("the model").add_argument
    flag("--model", type=model_folder, default=DEFAULT_MODEL, metavar="FOLDER",
         help=f"or one that comes along: {', '.join(SHIPPED)}; default: {DEFAULT_MODEL}, which is "
              f"tiny/{SHIPPED[DEFAULT_MODEL].name}")
    flag("--lora", type=Path, metavar="FILE", help="a low-rank addition to it, as tiny/train.py lora makes")
    flag("--lora_scale", type=number, metavar="X", help="how strongly it acts; default: 1")
    flag("--vae", type=Path, metavar="FOLDER", help="default: vae beside the model")
    flag("--t5", type=Path, metavar="FOLDER", help="default: t5 beside the model")
    flag("--config_file", metavar="JSON", help="an official config: its runtime_config replaces the model's")
    flag("--save_text", type=Path, metavar="FILE", help="save the encoded prompt (.safetensors) ...")
    flag("--text", metavar="FILE", help="... and use it instead of --prompt; needs no T5")
    flag("--device", help="cuda, cuda:1, cpu, mps; default: cuda if there is one")
    flag("--dtype", choices=["float32", "bfloat16", "float16"], help="of the transformer's blocks")
    flag("--backend", choices=["torch", "triton"], default="torch", help="default: torch")
    # fmt: on

    def canonical(match: re.Match) -> str:
        name = match[1].replace("-", "_")
        return "--" + OTHER_NAMES.get(name, name)

    argv = sys.argv[1:] if argv is None else argv
    return parser.parse_args([re.sub(r"^--([\w-]+)", canonical, word) for word in argv])


# ------------------------------------------------------------------------------------------------------------
# 2  Reading
# ------------------------------------------------------------------------------------------------------------


def require(ok: object, message: str) -> None:
    if not ok:
        raise ValueError(message)


def out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and "memory" in str(error)


@contextlib.contextmanager
def reading(what: str, path: str | Path):
    """Every library fails in its own way: turn that into one ValueError that names the file."""
    require(Path(path).exists(), f"{what} {str(path)!r} does not exist: check the path")
    try:
        yield
    except Exception as error:
        if out_of_memory(error):
            raise
        raise ValueError(f"cannot read {what} {str(path)!r}, damaged or of another kind: {error}") from None


def read_image(path: str) -> np.ndarray:
    """uint8 (h, w, 3), upright as the camera noted; grey becomes RGB, what is transparent white."""
    with reading("image", path):
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode.startswith("I;16"):                                    # Pillow would clip it to 8 bits
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.array(image.convert("RGB"))


def read_video(path: str, fps: int, count: int) -> np.ndarray:
    """The last `count` frames at `fps`, fewer if it is shorter: uint8 (frames, h, w, 3).

    Times are counted back from the last frame, where the result goes on; each takes the frame nearest to it.
    Only frames that can still be chosen are kept, however long the video is.
    """
    recent: deque[tuple[float, av.VideoFrame]] = deque()
    with reading("video", path), av.open(os.path.abspath(path)) as file:   # "12:30.mov" is no URL
        require(file.streams.video, "it has no pictures")
        stream = file.streams.video[0]
        stream.thread_type = "AUTO"
        for i, frame in enumerate(file.decode(stream)):
            now = float(i / (stream.average_rate or fps)) if frame.time is None else frame.time
            recent.append((now, frame))
            while len(recent) > 1 and recent[1][0] <= now - (count - 1) / fps:
                recent.popleft()
        require(recent, "it has no frames")
        require(i, "it is a single picture (--mode i2v --image shows one)")
        times = np.array([t for t, _ in recent])
        n = min(count, int((times[-1] - times[0]) * fps + 1e-3) + 1)
        nearest = [np.abs(times - (times[-1] - k / fps)).argmin() for k in reversed(range(n))]
        chosen = [recent[i][1] for i in nearest]
        return np.stack([np.rot90(f.to_ndarray(format="rgb24"), round(f.rotation / 90)) for f in chosen])


# ------------------------------------------------------------------------------------------------------------
# 3  Writing
# ------------------------------------------------------------------------------------------------------------
# A writer takes chunk after chunk, uint8 (frames, height, width, 3). When write() returns, they are in the
# file and the file is whole. Nothing is left to finish, so there is nothing that a crash could lose.


def replace(path: Path, save) -> None:
    """save(file), then put that in the place of `path`; if it fails, on a full disk, the old one stays."""
    new = path.with_name(f".{path.name}.new")
    try:
        save(new)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def append(path: Path, data: bytes) -> None:
    """All of the data or nothing."""
    size = path.stat().st_size
    try:
        with path.open("ab") as file:
            file.write(data)
    except OSError:
        os.truncate(path, size)
        raise


class Mp4Writer:
    """H.264 in a fragmented mp4, one fragment per chunk.

    A muxer keeps the newest frame until it sees the next, to know how long it lasts: with one muxer for all,
    a crash would cost a frame. So each chunk has its own, and its fragment is appended.
    """

    # frag_discont: a fragment starts when its frames do; avoid_negative_ts would move that to zero
    OPTIONS = {"movflags": "empty_moov+frag_custom+frag_discont+default_base_moof+skip_trailer",
               "avoid_negative_ts": "disabled"}

    def __init__(self, path: Path, fps: int):
        self.path, self.fps, self.chunks, self.frames = path, fps, 0, 0

    def write(self, frames: np.ndarray) -> None:
        piece = io.BytesIO()
        index = {"fragment_index": str(self.chunks + 1)}
        with av.open(piece, "w", format="mp4", options=self.OPTIONS | index) as file:
            stream = file.add_stream("libx264", rate=self.fps, options={"crf": "16", "bf": "0"})
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
            stream.codec_context.colorspace = 6           # BT.601, as PyAV converts: players expect 709 in HD
            for i, pixels in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts = self.frames + i
                file.mux(stream.encode(frame))
            file.mux(stream.encode())
        data = piece.getvalue()
        if self.chunks:
            append(self.path, data[data.index(b"moof") - 4:])                # the header is there already
        else:
            replace(self.path, lambda new: new.write_bytes(data))
        self.chunks, self.frames = self.chunks + 1, self.frames + len(frames)


class RewritingWriter:
    """For formats that cannot grow: each chunk, all is written anew and put in the old file's place."""

    def __init__(self, save, path: Path, fps: int):
        self.save, self.path, self.fps, self.frames = save, path, fps, []

    def write(self, frames: np.ndarray) -> None:
        self.frames.extend(frames)
        replace(self.path, lambda new: self.save(self.frames, new, self.fps))


def save_gif(frames: list[np.ndarray], path: Path, fps: int) -> None:
    """256 colours per frame. Through PyAV, because Pillow drops a frame that equals the one before."""
    options = {"final_delay": str(round(100 / fps))}
    with av.open(os.path.abspath(path), "w", format="gif", options=options) as file:
        # gifflags 0: the encoder compares frames by colour index, though each frame has its own palette
        stream = file.add_stream("gif", rate=100, options={"gifflags": "0"})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "pal8"
        for i, pixels in enumerate(frames):
            image = Image.fromarray(pixels).quantize(256)
            palette = np.full((256, 4), 255, np.uint8)                       # alpha, red, green, blue
            colours = np.frombuffer(image.palette.getdata()[1], np.uint8).reshape(-1, 3)
            palette[: len(colours), 1:] = colours
            frame = av.VideoFrame.from_ndarray((np.asarray(image), palette), format="pal8")
            # gif counts in hundredths of a second: rounding times, not durations, keeps 24 fps in step
            frame.pts, frame.time_base = round(i * 100 / fps), Fraction(1, 100)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def save_sheet(frames: list[np.ndarray], path: Path, fps: int) -> None:
    """A contact sheet: one row per 24 frames, one frame in four, tiles of 128 to 320 pixels."""
    width = frames[0].shape[1]
    shrink, grow, gap = -(-width // 320), max(1, 128 // width), 2
    tiles = [np.asarray(Image.fromarray(f).reduce(shrink)).repeat(grow, 0).repeat(grow, 1)
             for f in frames[::4]]
    h, w = tiles[0].shape[0] + gap, tiles[0].shape[1] + gap
    sheet = np.full((-(-len(tiles) // 6) * h + gap, min(6, len(tiles)) * w + gap, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // 6 * h + gap, i % 6 * w + gap
        sheet[top : top + h - gap, left : left + w - gap] = tile
    Image.fromarray(sheet).save(path, format="png")


WRITERS = {".mp4": Mp4Writer, ".gif": partial(RewritingWriter, save_gif),
           ".png": partial(RewritingWriter, save_sheet)}


# ------------------------------------------------------------------------------------------------------------
# 4  Checking
# ------------------------------------------------------------------------------------------------------------
# All of it runs before a weight is read, and raises ValueError with what is wrong and what to do about it.


def check_flags(args: argparse.Namespace) -> None:
    """What can be told from the flags alone, without PyTorch."""
    args.mode = args.mode or ("i2v" if args.image else "v2v" if args.video else "t2v")
    for mode, name in (("i2v", "image"), ("v2v", "video")):
        file = getattr(args, name)
        require(file or args.mode != mode, f"--mode {mode} needs an input: add --{name} FILE")
        require(not file or args.mode == mode,
                f"--{name} {file!r} does not go with --mode {args.mode}: use --mode {mode} or leave it out")
    require(args.prompt or args.text or args.mode != "t2v",
            'no --prompt: say what to show, for example --prompt "a red ball bounces"')
    for prompt in args.prompt or ():
        require(prompt.encode(errors="ignore").decode() == prompt,
                f"the prompt {ascii(prompt)} is not UTF-8: check the encoding of the terminal or script")
    require(not args.text or not (args.prompt or args.save_text),
            f"--text {args.text!r} is an encoded prompt already: leave --prompt and --save_text out")
    require(args.out.suffix.lower() in WRITERS, f"--out {str(args.out)!r} must end in .mp4, .gif or .png")
    require(args.num_frames != math.inf or args.out.suffix.lower() == ".mp4",
            f"--num_frames inf needs an .mp4 file, not {str(args.out)!r}, which is rewritten every second")
    require(args.lora or args.lora_scale is None, "--lora_scale needs a LoRA: add --lora FILE")
    require(args.save_text is None or args.save_text.suffix == ".safetensors",
            f"--save_text {str(args.save_text)!r} must end in .safetensors")
    inputs = [f for f in (args.image, args.video, args.text, args.config_file, args.lora) if f]
    inputs += [file for folder in (args.model, args.vae, args.t5) for file in folder.glob("*")]
    for path in (args.out, args.save_text or args.out):
        require(not path.exists() or not any(os.path.exists(f) and path.samefile(f) for f in inputs),
                f"{str(path)!r} is an input: give the output another name")
        require(path.exists() or not path.is_symlink(),
                f"cannot write {str(path)!r}: it is a link to what does not exist")
        require(not path.is_dir(), f"cannot write {str(path)!r}: it is a folder, add a file name")
        require(not path.exists() or os.access(path, os.W_OK), f"cannot write {str(path)!r}: it is protected")
        require(path.parent.is_dir(),
                f"cannot write {str(path)!r}: create the folder {str(path.parent)!r} first")
        try:
            tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            raise ValueError(f"cannot write in folder {str(path.parent)!r}: {error.strerror}") from None


def settings(args: argparse.Namespace, dit, notes: list[str]):
    """The SamplerConfig of the run: the model's, or that of --config_file, with the given flags on top."""
    import magi

    cfg = magi.read_config(args.model, "sampler", magi.SamplerConfig)
    if args.config_file:
        import convert_weights

        with reading("config", args.config_file):
            found = json.loads(Path(args.config_file).read_text())
            theirs, official = convert_weights.configs_from_upstream(found)
        if official.distilled != cfg.distilled:
            kinds = ("a base model", "a distilled one")
            notes.append(f"note: --config_file describes {kinds[official.distilled]}, but "
                         f"{str(args.model)!r} is {kinds[cfg.distilled]} and is run as such")
        cfg = dataclasses.replace(official, distilled=cfg.distilled)
        if (theirs.num_layers, theirs.hidden_size) != (dit.num_layers, dit.hidden_size):
            notes.append(f"note: only the sampler settings of --config_file are used, it describes another "
                         f"model ({theirs.num_layers} layers, this one has {dit.num_layers})")
    given = {f.name: getattr(args, f.name, None) for f in dataclasses.fields(cfg)}
    given = {name: v for name, v in given.items() if v is not None}
    for name, v in given.items():
        if isinstance(v, list):
            word = next((u for u in v if u in ("all", "none")), None)
            require(word is None or len(v) == 1, f"{name} {' '.join(map(str, v))!r}: {word!r} stands alone")
            given[name] = () if word else tuple(v)
    if args.num_frames == math.inf:
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


def choose_device(args: argparse.Namespace, fp8: bool, notes: list[str]) -> str:
    import torch

    import magi

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    require(re.fullmatch(r"cpu|mps|cuda(:\d+)?", device),
            f"device {device!r} is unknown: try --device cpu, or cuda, cuda:1, mps")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:                          # by how PyTorch was built
        reason = re.split(r"[.\n]\s|\.$", str(error))[0]
        raise ValueError(f"device {device!r} is not available ({reason}): try --device cpu") from None
    gpu = device.startswith("cuda")
    require(gpu or args.backend != "triton", f"backend 'triton' needs a GPU, not {device!r}: use 'torch'")
    magi.get_ops(args.backend)                                               # says if Triton is missing
    if args.backend == "triton":
        import kernels

        kernels.arch_of(device)                                              # says if the GPU cannot
    if fp8 and not (gpu and torch.cuda.get_device_capability(device) >= (8, 9)):
        notes.append(f"note: {device} has no fp8 arithmetic: fp8 weights are dequantised, which is slower")
    return device


def check_model(args: argparse.Namespace, dit, cfg, chunks: float) -> None:
    """Compare the files of the model with its configs and with what the run needs, by their headers."""
    import torch

    import magi

    vae_cfg = magi.read_config(args.vae, "vae", magi.VAEConfig)
    empty = magi.build(lambda: magi.DiT(dit), args.model)
    if args.lora:
        require(args.lora.is_file(), f"LoRA {str(args.lora)!r} is no file: check the path")
        magi.check_lora(empty, args.lora)
    magi.build(lambda: magi.VAE(vae_cfg), args.vae)
    file = args.model / "special_tokens.safetensors"
    shapes = magi.read_headers([file] if file.is_file() else [])
    table = {name: torch.empty(shape, device="meta") for name, (shape, _) in shapes.items()}
    magi.check_tokens(cfg, table, dit.text_dim, chunks)
    if not args.text:
        config, weights = args.t5 / "config.json", [*args.t5.glob("*.safetensors"), *args.t5.glob("*.bin")]
        require(weights and config.is_file() and (args.t5 / "spiece.model").is_file(),
                f"no text encoder in {str(args.t5)!r}: it needs config.json, spiece.model and weights")
        with reading("config", config):
            width = json.loads(config.read_text())["d_model"]
        require(width == dit.text_dim, f"the text encoder in {str(args.t5)!r} has width {width}, this "
                f"model needs {dit.text_dim}: give the right one with --t5")
        magi.read_headers([*args.t5.glob("*.safetensors")])                  # finds a file that was cut short


def beyond_small_model(args: argparse.Namespace, cfg) -> list[str]:
    """Notes on what a small model, whose text encoder lists its words in words.json, cannot do.

    With a LoRA there is none on words: it may have taught another."""
    import magi

    file, notes = args.t5 / "words.json", []
    if not file.is_file():
        return []
    native = magi.read_config(args.model, "sampler", magi.SamplerConfig)
    if (cfg.height, cfg.width) != (native.height, native.width):
        notes.append(f"note: this small model has only seen {native.height}x{native.width} pixels: "
                     f"at {cfg.height}x{cfg.width} expect fragments")
    given = args.image or args.video
    if given and not Path(given).resolve().is_relative_to(TINY):
        notes.append(f"note: this small model only knows pictures of its own world, such as "
                     f"{TINY.name}/examples/image.png: of others expect little")
    if args.lora:
        return notes
    with reading("words", file):
        known = json.loads(file.read_text())                                 # {"colours": ["red", ...], ...}
        words = {word for phrases in known.values() for phrase in phrases for word in phrase.split()}
    said = [re.findall(r"\w+", prompt.lower()) for prompt in args.prompt or ()]
    strange = dict.fromkeys(w for prompt in said for w in prompt if w not in words)
    shapeless = [p for p, ws in zip(args.prompt or (), said, strict=True) if not {*ws} & {*known["shapes"]}]
    lists = "; ".join(f"{kind}: {', '.join(phrases)}" for kind, phrases in known.items() if kind != "other")
    if strange:
        notes.append(f"note: this small model has never seen {', '.join(map(repr, strange))}. "
                     f"It knows {lists}. Say for example: a red ball bounces")
    elif shapeless and args.mode == "t2v":
        notes.append(f"note: the prompt {shapeless[0]!r} names no shape that this small model knows: "
                     f"{', '.join(known['shapes'])}. Say for example: a red ball bounces")
    return notes


def count_chunks(num_frames: int | None, prefix_frames: int) -> float:
    """How many chunks a run generates after so many frames of video; those they fill are not generated."""
    if num_frames is None:
        return math.inf
    given = prefix_frames // 4                                               # latent frames: 6 are a chunk
    return -(-(-(-num_frames // 4) + given) // 6) - given // 6


# ------------------------------------------------------------------------------------------------------------
# 5  Running
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


def say(message: object) -> None:
    """One line on stderr whatever the message looked like, above the progress bar if there is one."""
    tqdm.write(" ".join(str(message).split()), file=sys.stderr)


def prepare(argv: list[str] | None) -> dict:
    """From the command line to the arguments of `generate`: checks, then text encoder, then model."""
    args, notes = parse_arguments(argv), []
    args.vae, args.t5 = args.vae or args.model.parent / "vae", args.t5 or args.model.parent / "t5"
    check_flags(args)
    import magi

    dit = magi.read_config(args.model, "dit", magi.DiTConfig)
    dit = dataclasses.replace(dit, dtype=args.dtype or dit.dtype)
    cfg = settings(args, dit, notes)
    device = choose_device(args, dit.fp8, notes)
    image = read_image(args.image) if args.image else None
    video = read_video(args.video, cfg.fps, max(4, args.prefix_frames)) if args.video else None
    clip = magi.prefix_clip(image, video, args.prefix_frames)
    chunks = count_chunks(cfg.num_frames, 0 if video is None else len(clip))
    check_model(args, dit, cfg, chunks)
    fastest = 50 if args.out.suffix.lower() == ".gif" else 1000
    require(cfg.fps <= fastest, f"fps {cfg.fps} is too fast: {str(args.out)!r} can play {fastest} at most")
    for chunk, _ in args.transition:
        require(chunk < chunks, f"transition at chunk {chunk}: the video has {chunks} chunks, counted from 0")
    if len(args.prompt or ()) > chunks:
        notes.append(f"warning: {len(args.prompt)} prompts for {chunks} chunks, the last ones are not used")
    if not args.prompt and not args.text:
        notes.append(f"note: no --prompt, the {'image' if args.image else 'video'} alone says what happens")
    notes += beyond_small_model(args, cfg)
    text = load_text(args.text, dit) if args.text else None
    for note in notes:
        say(note)

    text = text or encode_text(args, dit, device)
    pipe = magi.load(args.model, vae=args.vae, t5=args.t5, device=device, dtype=args.dtype,
                     backend=args.backend)
    pipe.sampler = cfg
    if args.lora:
        magi.load_lora(pipe.dit, args.lora, 1.0 if args.lora_scale is None else args.lora_scale)
    frames = partial(pipe, text, image=image, video=video, prefix_frames=args.prefix_frames, fit=args.fit)
    return dict(frames=frames, cfg=cfg, chunks=chunks, out=args.out, device=device)


def encode_text(args: argparse.Namespace, dit, device: str) -> tuple:
    """The prompts as the model reads them. T5 is gone when this returns, before the model itself is read."""
    import magi

    with reading("text encoder", args.t5):
        from transformers.utils import logging

        logging.disable_progress_bar()
        text, mask = magi.T5(args.t5, dit.text_length, device)(args.prompt or [""])
    if args.save_text:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        made, about = {"text": text, "mask": mask}, {"prompts": json.dumps(args.prompt)}
        try:
            replace(args.save_text, lambda new: save_file(made, new, about))
        except SafetensorError as error:
            raise OSError(f"cannot write {str(args.save_text)!r}: {error}") from None
    return text, mask


def load_text(path: str, dit) -> tuple:
    """What --save_text wrote: text (n, L, C) and mask (n, L)."""
    from safetensors.torch import load_file

    with reading("text", path):
        saved = load_file(path)
        text, mask = saved["text"], saved["mask"]
    require(text.shape[1:] == (dit.text_length, dit.text_dim) and mask.shape == text.shape[:2] and len(text),
            f"text {path!r} has shape {tuple(text.shape)}, this model needs (prompts, {dit.text_length}, "
            f"{dit.text_dim}): save it again with this model")
    return text, mask


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


def generate(frames, cfg, chunks: float, out: Path, device: str) -> int:
    """Make the video and write it chunk by chunk, then say how it went. Returns the exit code."""
    endless, per_stage = chunks == math.inf, cfg.num_steps // cfg.window
    total = None if endless else (chunks + cfg.window - 1) * per_stage
    bar = tqdm(total=total, unit=" steps", desc="starting", dynamic_ncols=True)

    def progress(p) -> None:
        bar.set_description_str(f"chunk {p.chunk + 1}" + ("" if endless else f"/{chunks}"), refresh=False)
        bar.update(p.step - bar.n)

    writer, code, made, first, last = WRITERS[out.suffix.lower()](out, cfg.fps), 0, 0, 0.0, 0.0
    start = time.perf_counter()
    try:
        for chunk in frames(progress=progress):
            with uninterrupted():
                writer.write(chunk)
                made, last = made + len(chunk), time.perf_counter() - start
                first = first or last
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)                         # once is enough
        code = 130
    except OSError as error:
        say(f"error: cannot write {str(out)!r}: {error}")
        code = 1
    except FloatingPointError as error:
        say(f"error: {error}")
        code = 1
    finally:
        bar.close()
    how = {0: "", 1: "stopped: ", 130: "interrupted: "}[code]
    pace = last / max(1, made) * cfg.fps
    word = "faster" if pace < 1 else "slower"
    speed = f"{pace:.2f} s of computing per second of video ({word} than it plays)"
    print(f"{how}first chunk after {first:.2f} s, {speed}, {peak_memory(device)}, {made} frames -> {out}"
          if made else f"{how}no chunk could be written, {out} is as it was")
    return code


def peak_memory(device: str) -> str:
    import torch

    if torch.device(device).type == "cuda":
        return f"peak GPU memory {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB"
    try:
        import resource
    except ImportError:                                                      # Windows
        return "peak memory unknown"
    unit = 1 if sys.platform == "darwin" else 1024                           # a Mac counts in bytes
    return f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB"


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code: see the top of the file."""
    on_ctrl_c = signal.getsignal(signal.SIGINT)
    with warnings.catch_warnings(), contextlib.redirect_stdout(Quiet(sys.stdout)), \
            contextlib.redirect_stderr(Quiet(sys.stderr)):
        warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
        try:
            try:
                run = prepare(argv)
            except (ValueError, OSError, ImportError) as error:
                say(f"error: {error}")
                return 2
            return generate(**run)
        except KeyboardInterrupt:
            print("interrupted before anything was written")
            return 130
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise                                                       # a fault in the code: show it all
            say(f"error: out of memory, try a smaller --height and --width, "
                f"or --window 1 --kv_range 2 ({error})")
            return 1
        finally:
            signal.signal(signal.SIGINT, on_ctrl_c)


if __name__ == "__main__":
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)                             # no traceback while Python ends
    sys.exit(code)
