"""Pictures and tables for the notebooks; nothing here belongs to MAGI-1.

    film({"name": frames, ...})     rows of still frames, one row per clip
    play({"name": frames, ...})     clips side by side, moving: an animated PNG, small enough to commit
    table(rows, header)             a markdown table
"""

import io
import warnings

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image as Picture
from IPython.display import Markdown
from PIL import Image, ImageDraw, ImageFont

warnings.filterwarnings("ignore", message="IProgress")  # tqdm's advice on widgets that we do not need
from transformers.utils import logging  # noqa: E402

logging.disable_progress_bar()  # T5 is read within a moment
plt.rcParams.update({
    "figure.dpi": 90, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 10, "image.interpolation": "nearest", "figure.constrained_layout.use": True,
})  # fmt: skip


def to_uint8(frames) -> np.ndarray:
    """uint8 (frames, h, w, 3), or a tensor (1, 3, frames, h, w) in [-1, 1] -> uint8 (frames, h, w, 3)."""
    if isinstance(frames, np.ndarray):
        return frames
    return ((frames[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()


def _text(canvas: Image.Image, where: tuple[int, int], words: str, anchor: str = "la") -> None:
    ImageDraw.Draw(canvas).text(where, words, fill="black", font=ImageFont.load_default(12), anchor=anchor)


def _enlarge(frame: np.ndarray, scale: int) -> Image.Image:
    return Image.fromarray(frame.repeat(scale, 0).repeat(scale, 1))


def _png(image: Image.Image, **options) -> Picture:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return Picture(file.getvalue(), format="png")


def film(clips: dict, every: int = 8, scale: int = 1, label: int = 150) -> Picture:
    """One row per clip, one frame in `every`; its name, which may have several lines, stands on the left."""
    rows = {name: to_uint8(frames)[::every] for name, frames in clips.items()}
    h, w = (side * scale + 3 for side in next(iter(rows.values())).shape[1:3])
    canvas = Image.new("RGB", (label + w * max(map(len, rows.values())), h * len(rows)), "white")
    for y, (name, frames) in enumerate(rows.items()):
        _text(canvas, (label - 8, y * h + h // 2), name, anchor="rm")
        for x, frame in enumerate(frames):
            canvas.paste(_enlarge(frame, scale), (label + x * w, y * h))
    few = canvas.quantize(256, kmeans=1, dither=Image.Dither.NONE)  # kmeans: rare colours keep their own
    return _png(few, optimize=True)


def play(clips: dict, every: int = 2, scale: int = 2, columns: int = 4, fps: int = 24) -> Picture:
    """Clips side by side, moving, in a loop. All frames share 64 colours, which keeps the file small."""
    clips = {name: to_uint8(frames)[::every] for name, frames in clips.items()}
    length, columns = max(map(len, clips.values())), min(columns, len(clips))
    h, w = (side * scale for side in next(iter(clips.values())).shape[1:3])
    lines = 1 + max(name.count("\n") for name in clips)
    tall, wide, rows = h + 6 + 15 * lines, max(w + 6, 134), -(-len(clips) // columns)
    pictures = []
    for i in range(length):
        canvas = Image.new("RGB", (columns * wide, rows * tall), "white")
        for k, (name, frames) in enumerate(clips.items()):
            x, y = k % columns * wide, k // columns * tall
            _text(canvas, (x, y), name)
            canvas.paste(_enlarge(frames[min(i, len(frames) - 1)], scale), (x, y + 15 * lines))
        pictures.append(canvas)
    some = np.concatenate([np.asarray(p) for p in pictures[:: max(1, length // 8)]])
    palette = Image.fromarray(some).quantize(64, kmeans=1, dither=Image.Dither.NONE)
    first, *rest = [p.quantize(palette=palette, dither=Image.Dither.NONE) for p in pictures]
    return _png(first, save_all=True, append_images=rest, duration=1000 * every / fps, loop=0)


def table(rows: list, header: list) -> Markdown:
    """Rows of anything printable, under a header."""
    lines = [header, ["---"] * len(header), *rows]
    return Markdown("\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines))
