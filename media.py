"""Pictures and video, in and out: what sample.py, magi.MAGI, training.py and live.py share.

    to_image, to_video      whatever people hold (arrays, tensors, PIL images, paths) to uint8 arrays
    read_image, read_video  files as a viewer shows them: upright, in sRGB, on white, with square pixels
    Fragments               frames to the bytes of an mp4 that plays while it grows
    WRITERS                 .mp4, .gif and .png files that are whole after every second of video

A picture is uint8 (h, w, 3), a video uint8 (frames, h, w, 3). A `size` is (height, width). Pillow and PyAV
decode; here is what they leave to their caller: orientation, colour, time and memory. Nothing is kept that is
larger than `size` needs, however large or long the file is. What is odd but readable is a Python warning.

Contents: 1 From memory, 2 Size, 3 Pictures, 4 Video, 5 Writing.
"""

from __future__ import annotations

import contextlib
import io
import math
import mimetypes
import os
import struct
import threading
import warnings
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median_high
from typing import Any, BinaryIO

import av
import av.filter
import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageCms, UnidentifiedImageError

from checkpoints import reading, require
from magi import FRAMES_PER_LATENT
from outputs import replace

# ------------------------------------------------------------------------------------------------------------
# 1  From memory
# ------------------------------------------------------------------------------------------------------------
# Only what is clear is taken: values are uint8, or floats from 0 to 1. Floats below 0 are refused: if they
# were taken as -1 to 1, a picture that happens to have none would silently be read in the wrong scale.
# Channels (1, 2, 3 or 4: grey, grey and alpha, RGB, RGBA) come last, as in NumPy, or first, as in PyTorch.
# Where the shape fits both, the order of NumPy counts for arrays, and a tensor is refused.

TAKEN = "take uint8 from 0 to 255, or floats from 0 to 1 (from -1 to 1: give (x + 1) / 2)"
CHANNELS = (1, 2, 3, 4)


def to_image(x: Any) -> np.ndarray:
    """A path, PIL image, array or tensor to uint8 (h, w, 3). ValueError for what is unclear."""
    if isinstance(x, str | os.PathLike):
        return read_image(x)
    if isinstance(x, Image.Image):
        require(x.width and x.height, f"the image has {x.width}x{x.height} pixels: give one that has some")
        return np.asarray(as_rgb(x))
    given, is_tensor = as_array(x, "image")
    array = given[0] if given.ndim == 4 and len(given) == 1 else given       # a batch of one
    complaint = f"the image has shape {given.shape}: take (h, w), (h, w, channels) or (channels, h, w)"
    require(array.size and array.ndim in (2, 3), complaint)
    array = array[..., None] if array.ndim == 2 else channels_last(array, (-1, 0), is_tensor, complaint)
    return flatten(array, "image")


def to_video(x: Any, count: int | None = None, fps: int = 24) -> np.ndarray:
    """A path, an array or tensor, or a list of images to uint8 (frames, h, w, 3). ValueError if unclear.

    Of a file only the last `count` frames are read, at `fps`; the rest is taken as it is.
    """
    if isinstance(x, str | os.PathLike):
        return read_video(x, fps, count=count)
    if isinstance(x, list | tuple) or not hasattr(x, "ndim") and hasattr(x, "__iter__"):
        frames = [to_image(frame) for frame in x]
        require(frames, "the video is an empty list: give its frames")
        sizes = sorted({frame.shape[:2] for frame in frames})
        require(len(sizes) == 1, f"the video's frames have sizes {sizes}: give them one size")
        return np.stack(frames)
    given, is_tensor = as_array(x, "video")
    array = given[0] if given.ndim == 5 and len(given) == 1 else given       # a batch of one
    complaint = (f"the video has shape {given.shape}: take (frames, h, w), (frames, h, w, channels), "
                 f"(frames, channels, h, w) or (channels, frames, h, w)")
    require(array.size and array.ndim in (3, 4), complaint)
    if array.ndim == 3:
        require(array.shape[-1] not in CHANNELS and array.shape[0] not in CHANNELS,
                f"{complaint}; this looks like one image")
        return flatten(array[..., None], "video")
    return flatten(channels_last(array, (-1, 1, 0), is_tensor, complaint), "video")


def channels_last(x: np.ndarray, axes: tuple[int, ...], is_tensor: bool, complaint: str) -> np.ndarray:
    """Find the channels at one of the axes, and move them to the end."""
    found = [axis for axis in axes if x.shape[axis] in CHANNELS]
    if found[:1] == [-1] and not is_tensor:
        found = [-1]
    if found == [1, 0] and x.shape[1] == 3:                                  # a few frames of RGB
        found = [1]
    require(found, complaint)
    require(len(found) == 1, f"{complaint}; here it may be several of these")
    return np.moveaxis(x, found[0], -1)


def as_array(x: Any, what: str) -> tuple[np.ndarray, bool]:
    """The array of what may be a tensor (on any device, of any dtype), and whether it is one."""
    is_tensor = hasattr(x, "detach")
    if is_tensor:
        x = x.detach().cpu()
        x = (x.float() if x.is_floating_point() else x).numpy()
    require(isinstance(x, np.ndarray), f"the {what} is of type {type(x).__name__}: take a path, PIL image, "
            f"array or tensor")
    return x, is_tensor


def flatten(x: np.ndarray, what: str) -> np.ndarray:
    """(..., channels), uint8 or float from 0 to 1, to uint8 RGB; what is transparent becomes white."""
    if np.issubdtype(x.dtype, np.floating):
        low, high = x.min(), x.max()
        require(low >= -1e-3 and high <= 1.001,
                f"the {what} has values from {low:.3g} to {high:.3g}: {TAKEN}")
        x = (x.clip(0, 1) * 255).round().astype(np.uint8)
    require(x.dtype == np.uint8, f"the {what} is of type {x.dtype}: {TAKEN}")
    if x.shape[-1] in (2, 4):
        alpha = x[..., -1:] / np.float32(255)
        x = (x[..., :-1] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(x, (*x.shape[:-1], 3)))


# ------------------------------------------------------------------------------------------------------------
# 2  Size
# ------------------------------------------------------------------------------------------------------------


def fitted(image: Image.Image, size: tuple[int, int], fit: str, shown: tuple[float, float] | None = None
           ) -> np.ndarray:
    """An RGB image at a size: uint8 (*size, 3).

    "crop" keeps the aspect ratio and cuts the sides, "pad" keeps it and adds black, "stretch" (the official
    code's way) does not keep it. shown: the (height, width) a viewer gives it, if its pixels are not square.
    """
    require(fit in ("crop", "pad", "stretch"), f"fit {fit!r} is not 'crop', 'pad' or 'stretch'")
    (height, width), (w, h) = size, image.size
    shown_h, shown_w = shown or (h, w)
    scale_y, scale_x = scales((shown_h, shown_w), size, fit)
    seen_w, seen_h = min(1, width / (shown_w * scale_x)) * w, min(1, height / (shown_h * scale_y)) * h
    left, top = (w - seen_w) / 2, (h - seen_h) / 2                           # of the part that stays
    to_w, to_h = (max(1, min(full, round(length * scale))) for full, length, scale in
                  ((width, shown_w, scale_x), (height, shown_h, scale_y)))
    box = left, top, min(w, left + seen_w), min(h, top + seen_h)
    if (to_w, to_h) != image.size or box != (0, 0, w, h):
        image = image.resize((to_w, to_h), Image.Resampling.BICUBIC, box, reducing_gap=3)
    if (to_w, to_h) != (width, height):
        around = Image.new("RGB", (width, height))
        around.paste(image, ((width - to_w) // 2, (height - to_h) // 2))
        image = around
    return np.asarray(image)


def fit_frames(frames: np.ndarray, height: int, width: int, fit: str = "crop") -> torch.Tensor:
    """uint8 (frames, h, w, 3) -> (1, 3, frames, height, width) in [-1, 1]."""
    small = np.stack([fitted(Image.fromarray(frame), (height, width), fit) for frame in frames])
    return torch.from_numpy(small).movedim(-1, 0)[None].float() / 127.5 - 1


def prefix_clip(image: np.ndarray | None, video: np.ndarray | None, prefix_frames: int) -> np.ndarray | None:
    """The frames the model is shown: an image as a one-frame clip, or the last of a video, in fours."""
    require(image is None or video is None, "give an image or a video, not both")
    if image is not None:
        return image[None]
    if video is None:
        return None
    fours = max(1, round(prefix_frames / FRAMES_PER_LATENT)) * FRAMES_PER_LATENT
    require(prefix_frames == fours, f"prefix_frames {prefix_frames} must be a positive multiple of "
            f"{FRAMES_PER_LATENT}: try {fours}")
    require(len(video) >= FRAMES_PER_LATENT,
            f"the video has {len(video)} frame(s), at least {FRAMES_PER_LATENT} are needed")
    return video[-min(prefix_frames, len(video) // FRAMES_PER_LATENT * FRAMES_PER_LATENT):]


def prefix_pixels(image: Any, video: Any, prefix_frames: int, size: tuple[int, int], fit: str, fps: int
                  ) -> torch.Tensor:
    """The frames the model is shown, of an image or a video in any form: (1, 3, frames, *size) in [-1, 1]."""
    require(hasattr(prefix_frames, "__index__"), f"prefix_frames {prefix_frames!r} must be a whole number")
    image = None if image is None else to_image(image)
    video = None if video is None else to_video(video, max(FRAMES_PER_LATENT, prefix_frames), fps)
    clip: Any = prefix_clip(image, video, prefix_frames)
    return fit_frames(clip, *size, fit)


def scales(shape: tuple[float, float], size: tuple[int, int], fit: str) -> tuple[float, float]:
    """By how much height and width grow."""
    down, across = size[0] / shape[0], size[1] / shape[1]
    if fit == "stretch":
        return down, across
    return (max(down, across),) * 2 if fit == "crop" else (min(down, across),) * 2


def blocks(shape: tuple[float, float], size: tuple[int, int], fit: str) -> tuple[int, int]:
    """How many pixels (down, across) may be averaged before resizing, which leaves twice what is needed."""
    down, across = scales(shape, size, fit)
    return max(1, int(0.5 / down)), max(1, int(0.5 / across))


# ------------------------------------------------------------------------------------------------------------
# 3  Pictures
# ------------------------------------------------------------------------------------------------------------


MOST_PIXELS = 2**27                                                          # 400 MB once it is decoded
UPRIGHT = {value: Image.Transpose[name] for value, name in {                 # of EXIF's orientations
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
    7: "TRANSVERSE", 8: "ROTATE_90"}.items()}  # fmt: skip
HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def read_image(path: str | os.PathLike, size: tuple[int, int] | None = None, fit: str = "crop"
               ) -> np.ndarray:
    """uint8 (h, w, 3), upright as the camera noted, in sRGB, on white; size None: its own."""
    with reading("image", path), open_image(path) as image:
        if image.format not in ("JPEG", "MPO"):                              # these are decoded as needed
            check_pixels(image)
            image.load()                                                     # Pillow turns a TIFF itself
        turned = exif_orientation(image) >= 5                                # rows become columns
        size = size or (image.size if turned else image.size[::-1])
        image = averaged(image, size[::-1] if turned else size, fit)
        return fitted(as_rgb(image), size, fit)


def exif_orientation(image: Image.Image) -> int:
    """How the camera was held, from 1 (upright) to 8; an EXIF that is damaged does not say it."""
    with contextlib.suppress(SyntaxError, struct.error):                     # what Pillow raises then
        noted = image.getexif().get(0x0112)
        return noted if noted in UPRIGHT else 1
    return 1


def check_pixels(image: Image.Image) -> None:
    w, h = image.size
    require(w * h <= MOST_PIXELS, f"it has {w}x{h} pixels: make it smaller first")


def averaged(image: Image.Image, size: tuple[int, int], fit: str) -> Image.Image:
    """The image at a fraction of its size, still twice what is needed or more, before much memory is used."""
    down, across = blocks(image.size[::-1], size, fit)
    image.draft(None, (-(-image.width // across), -(-image.height // down)))     # a JPEG in less detail
    check_pixels(image)
    if image.mode not in ("L", "RGB", "CMYK") or image.has_transparency_data:
        return image
    down, across = blocks(image.size[::-1], size, fit)                       # what the draft has left
    return image.reduce((across, down))


_pillow = threading.Lock()


@contextlib.contextmanager
def without_limit() -> Iterator[None]:
    """Let Pillow open pictures of any size. Its limit is that of the whole process, so threads take turns."""
    with _pillow:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


@without_limit()
def open_image(path: str | os.PathLike) -> Image.Image:
    """Image.open, with our own limit of pixels, and HEIC if pillow-heif is there."""
    try:
        return Image.open(path)
    except UnidentifiedImageError:
        with open(path, "rb") as file:
            head = file.read(12)
        if head[4:8] != b"ftyp" or head[8:] not in HEIC:
            kind = mimetypes.guess_type(str(path))[0] or "of no known kind"
            require(not kind.startswith("video/"), f"it is a video: use --mode v2v --video {str(path)!r}")
            raise
        try:
            from pillow_heif import register_heif_opener
        except ImportError:
            raise ValueError("it is HEIC: pip install pillow-heif, or save it as JPEG") from None
        register_heif_opener()
        return Image.open(path)


def as_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as 8-bit sRGB: upright, by its colour profile, grey as RGB, transparency on white."""
    image.load()                                                             # before EXIF is read: see above
    turn, profile = UPRIGHT.get(exif_orientation(image)), image.info.get("icc_profile")
    if image.mode == "P":
        image = image.convert()                                              # to RGB or RGBA
    if image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PPM", "PNG"):
        image = eight_bits(image)
    require(image.mode not in ("I", "F"), f"its pixels are of Pillow's mode {image.mode!r}, which does not "
            f"say what white is: save it with 8 or 16 bits")
    rgb = in_srgb(image, profile)
    if image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)
    return rgb if turn is None else rgb.transpose(turn)


def eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey, which Pillow would clip, or what a TIFF says has 9 to 15 bits, in 8 bits."""
    tags, deep = getattr(image, "tag_v2", {}), np.asarray(image)
    white = 2 ** tags.get(258, (16,))[0] - 1                                 # BitsPerSample
    grey = np.rint(deep * (255 / white)).clip(0, 255).astype(np.uint8)
    made = Image.fromarray(255 - grey if tags.get(262) == 0 else grey)       # WhiteIsZero
    if "transparency" in image.info:                                         # one value of 16 bits
        made.putalpha(Image.fromarray(deep != image.info["transparency"]).convert("L"))
    return made


def in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB by its ICC profile, or plainly if it has none, or one for another kind of colour."""
    if image.mode == "LAB":
        return ImageCms.profileToProfile(image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"),
                                         outputMode="RGB")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            kind = source.profile.xcolor_space.strip()
            own = {"1": "GRAY", "L": "GRAY", "LA": "GRAY", "CMYK": "CMYK"}.get(image.mode, "RGB")
            if kind == own or (kind, own) == ("RGB", "GRAY"):
                image = image.convert(kind.replace("GRAY", "L"))
                return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"),
                                                 outputMode="RGB")
        except (ImageCms.PyCMSError, OSError) as error:
            warnings.warn(f"the colour profile of the image cannot be used ({error})", stacklevel=2)
    return image if image.mode == "RGB" else image.convert("RGB")


# ------------------------------------------------------------------------------------------------------------
# 4  Video
# ------------------------------------------------------------------------------------------------------------
# A frame is made small as soon as it is decoded, then turned upright. Without tags, HD (from 720 lines on) is
# BT.709, as in players. HDR (HLG, PQ) and wide colours (BT.2020, P3) go through linear light to sRGB. There
# 203 nits, the white of graphics in HDR (ITU-R BT.2408), are 1, and light is compressed from 0.9 on.

PQ, HLG, UNSPECIFIED, BT709 = 16, 18, 2, 1                                   # as H.273 numbers them
BT2020_TO_709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])
P3_TO_709 = np.array([[1.2249, -0.2247, 0], [-0.0420, 1.0419, 0], [-0.0197, -0.0786, 1.0979]])
WIDE = {9: BT2020_TO_709, 11: P3_TO_709, 12: P3_TO_709}                      # colour primaries, likewise
NITS_OF_WHITE = 203
KNEE = 0.9
SEEK_MARGIN = 5                                                             # seconds: an index may be wrong


def read_video(path: str | os.PathLike, fps: int = 24, start: int | None = None, count: int | None = None,
               size: tuple[int, int] | None = None, fit: str = "crop") -> np.ndarray:
    """Frames of a video at `fps`, as a player shows them: uint8 (frames, h, w, 3).

    start None: its last `count` frames (None: all), counted back from the last one, where a result goes on.
    start N: `count` frames (None: all) from frame N on, counted at `fps` too. Fewer if the video is shorter.
    Each is the frame on show at its time, so 12 frames per second read at 24 come twice each. `size` and
    `fit` are those of `fitted`; memory is what the chosen frames need at that size, so give one for large
    videos.
    """
    with reading("video", path), av.open(os.path.abspath(path)) as file:     # "12:30.mov" is no URL
        require(file.format.name != "tty", "it is a text, not a video")
        if file.format.name == "webp_pipe":
            with Image.open(path) as image:
                require(not image.is_animated, "FFmpeg cannot read animated WebP: save it as a GIF or mp4")
        stream = best_stream(file)
        begin = None if start is None else (stream.start_time or 0) * stream.time_base + Fraction(start, fps)
        length = math.inf if count is None else Fraction(count, fps)
        if begin is not None and begin > SEEK_MARGIN:
            file.seek(int((begin - SEEK_MARGIN) / stream.time_base), stream=stream)
        player = Player(stream, size, fit)
        recent: deque[tuple[Fraction, np.ndarray]] = deque()                 # what can still be chosen
        frames_read = 0
        for now, frame in timed(deinterlaced(decoded(file, stream)), stream):
            frames_read += 1
            recent.append((now, player.picture(frame)))
            oldest = now - length if begin is None else begin
            while len(recent) > 1 and recent[1][0] <= oldest:
                recent.popleft()
            if begin is not None and now > begin + length:
                break
        require(recent, "no frame of it can be decoded")
        require(frames_read > 1 or start is not None, one_frame(path))
        return chosen(recent, fps, begin, count)


def chosen(recent: deque, fps: int, begin: Fraction | None, count: int | None) -> np.ndarray:
    """The pictures on show at the wanted times, which end with the last one or start at `begin`."""
    times, pictures = zip(*recent, strict=True)
    sizes = list(dict.fromkeys(f"{p.shape[1]}x{p.shape[0]}" for p in pictures))
    require(len(sizes) == 1, f"its frames change size, {', then '.join(sizes)}: bring them to one size first")
    tick = Fraction(1, fps)
    gaps = [b - a for a, b in pairwise(times)]                               # between frames of the file
    gap = median_high(gaps) if gaps else tick
    end = times[-1] + max(0, gap - tick)                                     # the last one is shown so long
    noise = min(gap, tick) * Fraction(2, 5)                                  # times may be rounded to 1 ms
    available = max(0, math.floor((end + noise - (times[0] if begin is None else begin)) / tick) + 1)
    n = available if count is None else min(count, available)
    if begin is None:
        begin = end - (n - 1) * tick
    shown = [max(0, bisect_right(times, begin + k * tick + noise) - 1) for k in range(n)]
    return np.stack([pictures[i] for i in shown]) if n else np.empty((0, *pictures[0].shape), np.uint8)


def one_frame(path: str | os.PathLike) -> str:
    with contextlib.suppress(Exception), open_image(path):
        return f"it is a single picture: use --mode i2v --image {str(path)!r}"
    return (f"it has only one frame: save that as a picture (ffmpeg -i {str(path)!r} frame.png), then use "
            f"--mode i2v --image frame.png")


def best_stream(file: av.container.InputContainer) -> av.VideoStream:
    """The largest picture that moves; of equal ones the default, then the first."""
    kinds = av.stream.Disposition
    streams = [s for s in file.streams.video if s.codec_context is not None]
    require(streams, "it has no pictures")
    stream = max(streams, key=lambda s: (not s.disposition & (kinds.attached_pic | kinds.timed_thumbnails),
                                         s.width * s.height, bool(s.disposition & kinds.default), -s.index))
    stream.thread_type = "AUTO"
    stream.codec_context.thread_count = min(4, os.cpu_count() or 1)          # each one holds a frame
    return stream


def decoded(file: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """All frames, without what is damaged."""
    packets, damaged = file.demux(stream), 0
    while True:
        try:
            packet = next(packets, None)
            if packet is None:
                break
            yield from packet.decode()
        except av.error.FFmpegError:
            damaged += 1
    with contextlib.suppress(av.error.FFmpegError):                          # what the decoder still holds
        yield from stream.decode(None)
    if damaged:
        warnings.warn(f"{file.name!r} is damaged in {damaged} place(s), which are left out", stacklevel=2)


def deinterlaced(frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """Frames whose lines were taken at two times become what they were at the first of them."""
    graph, size = None, None
    for frame in frames:
        if frame.interlaced_frame and (frame.width, frame.height) != size:
            if graph is None:
                warnings.warn("the video is interlaced: every second line is computed anew", stacklevel=2)
            yield from pulled(graph, None)
            graph, size = bwdif(frame), (frame.width, frame.height)
        if graph is None or (frame.width, frame.height) != size:
            yield frame
        else:
            yield from pulled(graph, frame)
    yield from pulled(graph, None)


def bwdif(frame: av.VideoFrame) -> av.filter.Graph:
    graph = av.filter.Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format,
                              time_base=frame.time_base)
    middle = graph.add("bwdif", "mode=send_frame:deint=interlaced")
    graph.link_nodes(source, middle, graph.add("buffersink")).configure()
    return graph


def pulled(graph: av.filter.Graph | None, frame: av.VideoFrame | None) -> Iterator[av.VideoFrame]:
    """What the filter gives for a frame, or at the end (None)."""
    if graph is None:
        return
    graph.push(frame)
    with contextlib.suppress(BlockingIOError, EOFError):
        while True:
            yield graph.pull()


def timed(frames: Iterator[av.VideoFrame], stream: av.VideoStream
          ) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """(time in seconds, frame), times always growing."""
    step = 1 / Fraction(stream.average_rate or stream.guessed_rate or 24)
    now = (stream.start_time or 0) * stream.time_base - step
    for i, frame in enumerate(frames):
        stamp = now + step if frame.pts is None else frame.pts * frame.time_base
        now = stamp if i == 0 or stamp > now else now + step                 # else the clock was set back
        yield now, frame


class Player:
    """Frames as a player shows them, at one size."""

    def __init__(self, stream: av.VideoStream, size: tuple[int, int] | None, fit: str):
        self.aspect = float(stream.sample_aspect_ratio or 1)                 # a pixel's width over its height
        self.size, self.fit = size, fit
        self.orientation: tuple[bool, list[int]] | None = None
        self.reformatter = av.video.reformatter.VideoReformatter()

    def picture(self, frame: av.VideoFrame) -> np.ndarray:
        """uint8 (h, w, 3): made small first, then turned upright."""
        # Asked once: looking at side data makes a cycle of references, which keeps the frame in memory.
        self.orientation = self.orientation or orientation(frame)
        turned, flips = self.orientation
        shown = frame.height / min(1, self.aspect), frame.width * max(1, self.aspect)
        size, fit = (self.size, self.fit) if self.size else (tuple(map(round, shown)), "stretch")
        size = size[::-1] if turned and self.size else size
        down, across = blocks(shown, size, fit)
        rgb = self.rgb(frame, -(-frame.width // across), -(-frame.height // down))
        rgb = fitted(Image.fromarray(rgb), size, fit, shown)
        return np.flip(rgb.swapaxes(0, 1) if turned else rgb, flips)

    def rgb(self, frame: av.VideoFrame, width: int, height: int) -> np.ndarray:
        """In sRGB, on white, uint8 (height, width, 3)."""
        hdr, wide = frame.color_trc in (PQ, HLG), WIDE.get(frame.color_primaries)
        hd = frame.height >= 720 or frame.width >= 1280
        smaller = (width, height) != (frame.width, frame.height)
        has_alpha = any(component.is_alpha for component in frame.format.components)
        plain = "rgba" if has_alpha else "rgb24"
        rgb = self.reformatter.reformat(
            frame, width, height, "rgb48le" if hdr or wide is not None else plain,
            src_colorspace=BT709 if hd and frame.colorspace == UNSPECIFIED else None,
            interpolation="AREA" if smaller else "BILINEAR",
        ).to_ndarray()
        return flatten(rgb, "video") if rgb.dtype == np.uint8 else to_srgb(rgb, frame.color_trc, wide)


def orientation(frame: av.VideoFrame) -> tuple[bool, list[int]]:
    """Whether rows become columns, and which axes are flipped then, by the display matrix of a frame."""
    for data in frame.side_data:
        if data.type == av.sidedata.sidedata.Type.DISPLAYMATRIX:
            a, b, _, c, d = np.frombuffer(data, np.int32)[:5].tolist()       # x' = a x + c y, y' = b x + d y
            turned = abs(b) + abs(c) > abs(a) + abs(d)
            x, y = (c, b) if turned else (a, d)
            return turned, [axis for axis, sign in ((0, y), (1, x)) if sign < 0]
    return False, []


def to_srgb(rgb: np.ndarray, transfer: int, to_709: np.ndarray | None) -> np.ndarray:
    """uint16 RGB with an HDR transfer function or wide primaries to uint8 sRGB, by way of linear light."""
    signal = np.arange(65536) / 65535
    if transfer == PQ:                                                       # SMPTE ST 2084
        root = signal ** (1 / 78.84375)
        light = (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (1 / 0.1593017578125)
        light *= 10_000 / NITS_OF_WHITE
    elif transfer == HLG:                                                    # ARIB STD-B67, on 1,000 nits
        bright = (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12
        light = np.where(signal <= 0.5, signal**2 / 3, bright)
    else:
        light = np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)
    x = light.astype(np.float32)[rgb]                                        # (h, w, 3)
    if transfer == HLG:
        x *= (x @ np.float32([0.2627, 0.6780, 0.0593]))[..., None] ** 0.2 * (1000 / NITS_OF_WHITE)
    hdr = transfer in (PQ, HLG)
    matrix = BT2020_TO_709 if to_709 is None and hdr else to_709
    x = (x @ matrix.T.astype(np.float32)).clip(0)
    if hdr:
        top = x.max(-1, keepdims=True)
        over = (top - KNEE).clip(0)
        x *= np.where(over > 0, (KNEE + (1 - KNEE) * over / (over + 1 - KNEE)) / top.clip(KNEE), 1)
    x = np.where(x <= 0.0031308, x * 12.92, 1.055 * x.clip(0.0031308, 1) ** (1 / 2.4) - 0.055)
    return (x.clip(0, 1) * 255).round().astype(np.uint8)


# ------------------------------------------------------------------------------------------------------------
# 5  Writing
# ------------------------------------------------------------------------------------------------------------
# A writer takes chunk after chunk, uint8 (frames, height, width, 3). When write() returns, they are in the
# file and the file is whole: a crash loses nothing. close() only makes an mp4 more convenient.


class Fragments:
    """H.264 in a fragmented mp4: `init` first, then what each `add` returns, is a video that can be played.

    For live.py: `codec` is its name for MediaSource (after the first chunk), and every fragment starts with a
    key frame, so a late viewer may begin with any of them after `init`.

    A muxer keeps the newest frame until it sees the next, to know how long it lasts: with one muxer for all,
    a crash would cost a frame. So each chunk has its own, and its fragment is appended.
    """

    # frag_discont: a fragment starts when its frames do; avoid_negative_ts would move that to zero
    OPTIONS = {"movflags": "empty_moov+frag_custom+frag_discont+default_base_moof+skip_trailer",
               "avoid_negative_ts": "disabled"}

    def __init__(self, fps: int):
        self.fps, self.chunks, self.frames, self.init = fps, 0, 0, b""

    @property
    def codec(self) -> str:
        """Such as avc1.640014: profile, constraints and level."""
        at = self.init.index(b"avcC") + 5
        return f"avc1.{self.init[at : at + 3].hex()}"

    def add(self, frames: np.ndarray) -> bytes:
        """One fragment for some frames (n, height, width, 3)."""
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
        start = data.index(b"moof") - 4
        self.init = self.init or data[:start]
        self.chunks, self.frames = self.chunks + 1, self.frames + len(frames)
        return data[start:]


class Mp4Writer:
    """Fragments appended to a file, or written to an open one (binary, such as sys.stdout.buffer)."""

    def __init__(self, out: Path | BinaryIO, fps: int):
        self.out, self.fragments, self.stat = out, Fragments(fps), None

    def write(self, frames: np.ndarray) -> None:
        data = self.fragments.add(frames)
        data = self.fragments.init + data if self.fragments.chunks == 1 else data
        if not isinstance(self.out, Path):
            self.out.write(data)
            self.out.flush()
        elif self.fragments.chunks == 1:
            replace(self.out, lambda new: new.write_bytes(data))
            self.stat = self.out.stat()
        else:
            self.append(data)

    def append(self, data: bytes) -> None:
        """All of the data or nothing, and only to the file as it was left."""
        if not self.out.exists():
            self.stat = None                                                 # there is nothing to close
            raise OSError("it was moved or deleted while it grew, with all that was in it")
        before = self.out.stat()
        if not os.path.samestat(before, self.stat) or before.st_size != self.stat.st_size:
            raise OSError("another program has changed it")
        try:
            with self.out.open("ab") as file:
                file.write(data)
        except BaseException:                                                # Ctrl-C is one of them
            os.truncate(self.out, before.st_size)
            raise
        self.stat = self.out.stat()

    def close(self) -> None:
        """Make it a plain mp4: index first, duration known. Without room for that it stays as it is."""
        if self.stat is None:
            return
        try:
            replace(self.out, self.plain)
        except (OSError, av.error.FFmpegError) as error:
            warnings.warn(f"{str(self.out)!r} stays in fragments, which play as well: {error}", stacklevel=2)

    def plain(self, new: Path) -> None:
        options = {"movflags": "faststart"}
        with av.open(os.path.abspath(self.out)) as old, \
                av.open(os.path.abspath(new), "w", format="mp4", options=options) as file:
            stream = file.add_stream_from_template(old.streams.video[0])
            for packet in old.demux(old.streams.video[0]):
                if packet.dts is not None:                                   # the last one is empty
                    packet.stream = stream
                    file.mux(packet)


class RewritingWriter:
    """For formats that cannot grow: each chunk, all is written anew and put in the old file's place."""

    def __init__(self, save: Callable, path: Path, fps: int):
        self.save, self.path, self.fps, self.frames = save, path, fps, []

    def write(self, frames: np.ndarray) -> None:
        self.frames.extend(frames)
        replace(self.path, lambda new: self.save(self.frames, new, self.fps))

    def close(self) -> None:
        pass


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
    tiles = np.stack([np.asarray(Image.fromarray(frame).reduce(shrink)) for frame in frames[::4]])
    tiles = tiles.repeat(grow, 1).repeat(grow, 2)
    columns = min(6, len(tiles))
    missing = -len(tiles) % columns                                          # in the last row
    tiles = np.pad(tiles, ((0, missing), (0, gap), (0, gap), (0, 0)), constant_values=255)
    sheet = rearrange(tiles, "(row column) h w rgb -> (row h) (column w) rgb", column=columns)
    sheet = np.pad(sheet, ((gap, 0), (gap, 0), (0, 0)), constant_values=255)
    Image.fromarray(sheet).save(path, format="png")


WRITERS = {".mp4": Mp4Writer, ".gif": partial(RewritingWriter, save_gif),
           ".png": partial(RewritingWriter, save_sheet)}
