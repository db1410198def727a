"""What people feed it: files of phones and cameras, arrays of other libraries, busy machines, odd outputs.

Every row of the list of public bug reports that the program was tried on has its tests here, on small files
that the tests make themselves."""

import copy
import ctypes
import http.server
import io
import math
import multiprocessing
import os
import queue
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import types
import warnings
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from common import HERE, assert_refused, bad, environment, fork_python, run_main, run_python, same, small
from PIL import Image, ImageCms
from safetensors.torch import load_file, save_file

import convert_weights as cw
import magi
import media
import outputs
import sample
import terminal
import training

RED, GREEN, BLUE, WHITE = (220, 30, 30), (30, 200, 30), (30, 30, 220), (255, 255, 255)


def corners(height: int = 64, width: int = 96) -> np.ndarray:
    """Four colours, so that every turn and mirror is another picture."""
    x = np.empty((height, width, 3), np.uint8)
    x[: height // 2, : width // 2], x[: height // 2, width // 2 :] = RED, GREEN
    x[height // 2 :, : width // 2], x[height // 2 :, width // 2 :] = BLUE, WHITE
    return x


def greys(values, height: int = 32, width: int = 48) -> np.ndarray:
    return np.stack([np.full((height, width, 3), v, np.uint8) for v in values])


def write_video(
    path: Path,
    frames,
    fps=24,
    pix_fmt="yuv420p",
    codec="libx264",
    pts=None,
    matrix=None,
    sar=None,
    hflip=False,
    degrees=None,
    options=None,
    tags=None,
    source="rgb24",
    dst_colorspace=None,
) -> Path:
    """A video through PyAV, with the properties that cameras give theirs."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pix_fmt
        if sar:
            stream.codec_context.sample_aspect_ratio = sar
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        if matrix is not None:
            stream.set_display_matrix(matrix)
        elif degrees is not None or hflip:
            stream.set_display_rotation(degrees or 0, hflip=hflip)
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=source)
            if dst_colorspace:
                frame = frame.reformat(format=pix_fmt, dst_colorspace=dst_colorspace)
            frame.pts, frame.time_base = pts[i] if pts else i, Fraction(1, fps)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def close(a, b, within: float = 6) -> bool:
    """Equal but for what a codec loses, away from edges."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    return a.shape == b.shape and np.median(np.abs(a - b)) <= within and np.abs(a - b).mean() <= 2 * within


# --------------------------------------------------------------------------------------------------- pictures


def pgm(path: Path, values: np.ndarray, white: int) -> Path:
    header = f"P5 {values.shape[1]} {values.shape[0]} {white}\n".encode()
    path.write_bytes(header + values.astype(">u2").tobytes())
    return path


def test_pictures_of_other_depths(tmp_path):
    deep = np.linspace(0, 65535, 48).round().astype(np.uint16).reshape(6, 8)
    grey = np.rint(deep / 257)[..., None].repeat(3, 2)
    assert np.abs(media.read_image(pgm(tmp_path / "a.pgm", deep, 65535)) - grey).max() <= 1
    assert np.abs(media.read_image(pgm(tmp_path / "b.pgm", deep // 64, 1023)) - grey).max() <= 1  # 10 bits
    for name in "a.png", "a.tif":
        Image.fromarray(deep).save(tmp_path / name)
        assert np.abs(media.read_image(tmp_path / name) - grey).max() <= 1
    Image.fromarray(deep // 16).save(tmp_path / "b.tif", tiffinfo={258: 12})
    for name, array in ("i.tif", deep.astype(np.int32)), ("f.tif", deep.astype(np.float32)):
        Image.fromarray(array).save(tmp_path / name)
        with pytest.raises(ValueError, match="does not say what white is: save it with 8 or 16 bits"):
            media.read_image(tmp_path / name)
    Image.fromarray(deep).save(tmp_path / "inverted.tif", tiffinfo={262: 0})
    assert np.abs(media.read_image(tmp_path / "inverted.tif") - (255 - grey)).max() <= 1


def icc(primaries: list, gamma: float) -> bytes:
    """An RGB profile of three primaries (X, Y, Z for D50) and a gamma: what cameras embed, smaller."""
    s15 = lambda *v: b"".join(struct.pack(">i", round(x * 65536)) for x in v)
    xyz = lambda v: b"XYZ \0\0\0\0" + s15(*v)
    tags = {
        b"rXYZ": xyz(primaries[0]),
        b"gXYZ": xyz(primaries[1]),
        b"bXYZ": xyz(primaries[2]),
        b"wtpt": xyz((0.9642, 1, 0.8249)),
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"a\0" + bytes(80),
    }
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    tags |= {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve, b"cprt": b"text\0\0\0\0none\0\0\0\0"}
    table, data, at = b"", b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        value += bytes(-len(value) % 4)
        table += name + struct.pack(">II", at + len(data), len(value))
        data += value
    size = at + len(data)
    head = (
        struct.pack(">I4sI4s4s4s", size, b"lcms", 0x02100000, b"mntr", b"RGB ", b"XYZ ") + bytes(12) + b"acsp"
    )
    head += bytes(28) + s15(0.9642, 1, 0.8249)
    return head + bytes(128 - len(head)) + struct.pack(">I", len(tags)) + table + data


P3 = icc([(0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)], 2.2)


def srgb_encoded(x):
    return 255 * np.where(x <= 0.0031308, 12.92 * x, 1.055 * np.clip(x, 0.0031308, 1) ** (1 / 2.4) - 0.055)


def p3_to_srgb(rgb: np.ndarray) -> np.ndarray:
    light = (rgb / 255.0) ** 2.2 @ np.array(
        [[1.2249, -0.0420, -0.0197], [-0.2247, 1.0419, -0.0786], [0, 0, 1.0979]]
    )
    return srgb_encoded(light.clip(0, 1))


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "alpha.png", "palette.png"])
def test_colour_profiles_of_phones(name, tmp_path):
    colour = np.array([200, 120, 90])
    image = Image.new("RGB", (32, 32), tuple(colour.tolist()))
    image = image.convert("RGBA") if "alpha" in name else image.quantize(4) if "palette" in name else image
    more = {"lossless": True} if name.endswith("webp") else {"quality": 95} if name.endswith("jpg") else {}
    image.save(tmp_path / name, icc_profile=P3, **more)
    read = media.read_image(tmp_path / name)[16, 16]
    assert np.abs(read - p3_to_srgb(colour)).max() < 3, read
    assert np.abs(p3_to_srgb(colour) - colour).max() > 10  # the profile matters


def test_other_colour_profiles(tmp_path):
    """A grey one; one that belongs to another kind of picture; one that is damaged; Lab."""
    image = Image.new("L", (8, 8), 128)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.save(tmp_path / "grey in sRGB.png", icc_profile=srgb)
    assert np.abs(media.read_image(tmp_path / "grey in sRGB.png") - 128.0).max() <= 1
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", icc_profile=srgb)
    plain = np.asarray(image.convert("CMYK").convert("RGB"), float)
    assert np.abs(media.read_image(tmp_path / "cmyk.jpg") - plain).max() <= 2
    image.convert("RGB").save(tmp_path / "damaged.png", icc_profile=P3[:200])
    with pytest.warns(UserWarning, match="colour profile of the image cannot be used"):
        assert (media.read_image(tmp_path / "damaged.png") == 128).all()
    lab = Image.merge("LAB", [Image.new("L", (8, 8), v) for v in (136, 128, 128)])  # L 53 %, no colour
    lab.save(tmp_path / "lab.tif")
    assert np.abs(media.read_image(tmp_path / "lab.tif") - 127.0).max() <= 2


def cmyk_icc(inks: dict[str, tuple[float, float, float]]) -> bytes:
    """A CMYK profile as a table of Lab colours: of the paper, and of what is named; all else is black."""
    table = np.zeros((2, 2, 2, 2, 3))  # c, m, y, k
    table[0, 0, 0, 0] = 100, 0, 0
    for ink, colour in inks.items():
        table[tuple(int(letter in ink) for letter in "cmyk")] = colour
    lab = np.rint(table * [2.55, 1, 1] + [0, 128, 128]).astype(np.uint8)
    ramp = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + 4 * ramp + lab.tobytes() + 3 * ramp
    white = b"XYZ " + bytes(4) + struct.pack(">3i", *(round(65536 * v) for v in (0.9642, 1, 0.8249)))
    tags, at, entries, data = {b"A2B0": lut, b"wtpt": white}, 128 + 4 + 24, b"", b""
    for name, value in tags.items():
        entries += name + struct.pack(">II", at + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    head = struct.pack(">I4sI4s4s4s", at + len(data), b"lcms", 0x02100000, b"prtr", b"CMYK", b"Lab ")
    head += bytes(12) + b"acsp" + bytes(28) + white[8:]
    return head + bytes(128 - len(head)) + struct.pack(">I", len(tags)) + entries + data


def test_printers_pictures_with_their_profile(tmp_path):
    """The cyan of this printer is Lab (60, -30, -40): sRGB (0, 161, 215)."""
    profile = cmyk_icc({"c": (60, -30, -40)})
    for name in "a.jpg", "a.tif":
        for ink, right in ((255, 0, 0, 0), (0, 161, 215)), ((0, 0, 0, 0), WHITE), ((0, 0, 0, 255), (0, 0, 0)):
            Image.new("CMYK", (16, 16), ink).save(tmp_path / name, icc_profile=profile)
            assert np.abs(media.read_image(tmp_path / name)[8, 8] - np.array(right)).max() <= 6, (name, ink)


def test_pictures_are_upright_and_on_white_at_any_size(tmp_path):
    stored = np.zeros((600, 900, 4), np.uint8)
    stored[..., :3], stored[:, 450:, 3] = corners(600, 900), 255  # the left half is transparent
    stored[300:, :450, 3] = 128
    image = Image.fromarray(stored)
    for orientation, turn in [
        (1, lambda x: x),
        (6, lambda x: np.rot90(x, -1)),
        (7, lambda x: np.rot90(x, 2).swapaxes(0, 1)),
        (2, np.fliplr),
    ]:
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(tmp_path / "a.png", exif=exif)
        alpha = stored[..., 3:] / 255
        right = turn(stored[..., :3] * alpha + 255 * (1 - alpha))
        assert close(media.read_image(tmp_path / "a.png"), right, 1)
        small = Image.fromarray(right.round().astype(np.uint8))
        for size in (30, 30), (40, 20), (20, 64):
            scale = max(size[0] / small.height, size[1] / small.width)
            w, h = size[1] / scale, size[0] / scale
            box = (
                (small.width - w) / 2,
                (small.height - h) / 2,
                (small.width + w) / 2,
                (small.height + h) / 2,
            )
            reference = small.resize(size[::-1], Image.Resampling.BICUBIC, box)
            assert close(media.read_image(tmp_path / "a.png", size), reference, 3), (orientation, size)
        image.convert("RGB").save(tmp_path / "a.jpg", exif=exif, quality=95)
        for fit in "crop", "pad", "stretch":
            read = media.read_image(tmp_path / "a.jpg", (32, 64), fit)
            assert read.shape == (32, 64, 3)
        assert close(
            read, Image.fromarray(turn(stored[..., :3])).resize((64, 32), Image.Resampling.BICUBIC), 3
        )
    assert (media.read_image(tmp_path / "a.jpg", (32, 640), "pad")[:, :200] == 0).all()


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_tiffs_are_turned_once(compression, tmp_path):
    """Pillow itself turns a TIFF when it decodes it, and no other kind of file."""
    turns = [
        lambda x: x,
        np.fliplr,
        lambda x: np.rot90(x, 2),
        np.flipud,
        lambda x: x.swapaxes(0, 1),
        lambda x: np.rot90(x, -1),
        lambda x: np.rot90(x, 2).swapaxes(0, 1),
        np.rot90,
    ]
    for orientation, turn in enumerate(turns, 1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(corners()).save(tmp_path / "a.tif", exif=exif, compression=compression)
        right = np.ascontiguousarray(turn(corners()))
        assert (media.read_image(tmp_path / "a.tif") == right).all()
        small = media.fitted(Image.fromarray(right), (32, 64), "crop")
        assert close(media.read_image(tmp_path / "a.tif", (32, 64)), small)
        with Image.open(tmp_path / "a.tif") as image:
            assert (media.to_image(image) == right).all()


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg"])
def test_a_damaged_exif_says_nothing(name, tmp_path):
    """A viewer shows such pictures; so does a browser."""
    exif = Image.Exif()
    exif[0x0112] = 6
    whole, image = exif.tobytes(), Image.fromarray(corners())
    as_text = whole.replace(b"\x01\x12\0\3\0\0\0\1\0\6", b"\x01\x12\0\2\0\0\0\26\0", 1)
    assert as_text != whole
    for damaged in (b"Exif\0\0no exif", whole[:9], whole[:16], as_text):
        image.save(tmp_path / name, exif=damaged, **({"lossless": True} if name == "a.webp" else {}))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow mentions some of them
            for size in None, (64, 96):
                assert close(media.read_image(tmp_path / name, size), corners())


@pytest.mark.filterwarnings("error")
def test_one_colour_may_be_transparent(tmp_path):
    """Of a palette (all of it), of grey, of grey with 16 bits: white, and no reason for a warning."""
    palette = Image.fromarray(corners(8, 8)).quantize(4)
    palette.save(tmp_path / "a.png", transparency=bytes(4))
    Image.new("L", (8, 8), 7).save(tmp_path / "b.png", transparency=7)
    deep = Image.fromarray(np.full((8, 8), 7 * 257, np.uint16))
    deep.putpixel((0, 0), 7 * 257 + 1)  # the same in 8 bits, and yet opaque
    deep.save(tmp_path / "c.png", transparency=7 * 257)
    for name in "a.png", "b.png", "c.png":
        assert (media.read_image(tmp_path / name)[4, 4] == 255).all(), name
    assert (media.read_image(tmp_path / "c.png")[0, 0] == 7).all()


def peak_memory() -> int:
    """The most bytes that this process has held since the last reset."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def peak(work: Callable[[], None]) -> int:
    """Bytes by which the peak memory of a process grows while it does the work. It is a fork of this one, so
    that it imports nothing again."""

    def measured() -> None:
        ctypes.CDLL(None).malloc_trim(0)  # else the work would begin with memory that lies idle
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
        before = peak_memory()
        work()
        grown.send(peak_memory() - before)

    result, grown = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=measured)
    process.start()
    process.join()
    assert process.exitcode == 0
    return result.recv()


def test_memory_of_pictures_is_near_what_the_size_needs(tmp_path):
    for name, shape in ("tall.png", (2, 60000)), ("wide.png", (60000, 2)), ("a.jpg", (8000, 6000)):
        Image.new("RGB", shape, RED).save(tmp_path / name)
    for name in "tall.png", "wide.png":
        assert (media.read_image(tmp_path / name, (64, 64)) == RED).all()
    read = lambda *names: peak(lambda: [media.read_image(tmp_path / name, (64, 64)) for name in names])
    assert read("tall.png", "wide.png") < 30e6
    assert read("a.jpg") < 60e6
    (tmp_path / "a.jpg").unlink()
    data = io.BytesIO()
    Image.new("1", (8, 8)).save(data, "PNG")
    huge = data.getvalue().replace(struct.pack(">II", 8, 8), struct.pack(">II", 200_000, 200_000), 1)

    huge = huge[:29] + struct.pack(">I", zlib.crc32(huge[12:29])) + huge[33:]
    (tmp_path / "huge.png").write_bytes(huge)
    with pytest.raises(ValueError, match="200000x200000 pixels: make it smaller first"):
        media.read_image(tmp_path / "huge.png")


def test_heic_is_read_or_named(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    try:
        import pillow_heif
    except ImportError:
        with pytest.raises(ValueError, match="it is HEIC: pip install pillow-heif, or save it as JPEG"):
            media.read_image(tmp_path / "a.heic")
        return
    pillow_heif.from_pillow(Image.fromarray(corners())).save(tmp_path / "a.heic", quality=95)
    assert close(media.read_image(tmp_path / "a.heic"), corners())


# ------------------------------------------------------------------------------------------------------ video


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [False, True])
def test_videos_are_turned_and_mirrored_as_a_player_does(degrees, mirrored, tmp_path):
    """PyAV turns counter-clockwise, then mirrors."""
    video = write_video(tmp_path / "a.mp4", [corners()] * 5, degrees=degrees, hflip=mirrored)
    right = np.rot90(corners(), degrees // 90)
    right = np.fliplr(right) if mirrored else right
    assert close(media.read_video(video), [right] * 5)
    assert close(
        media.read_video(video, size=(32, 32), fit="stretch")[0], Image.fromarray(right).resize((32, 32))
    )


def test_videos_upside_down(tmp_path):
    flipped = (65536, 0, 0, 0, -65536, 0, 0, 0, 1 << 30)
    video = write_video(tmp_path / "a.mp4", [corners()] * 5, matrix=flipped)
    assert close(media.read_video(video)[0], np.flipud(corners()))


@pytest.mark.parametrize("ratio", [Fraction(2), Fraction(1, 2), Fraction(4, 3)])
@pytest.mark.parametrize("degrees", [0, 90])
def test_pixels_that_are_not_square(ratio, degrees, tmp_path):
    video = write_video(tmp_path / "a.mp4", [corners()] * 5, sar=ratio, degrees=degrees)
    w, h = (round(96 * ratio), 64) if ratio > 1 else (96, round(64 / ratio))
    right = Image.fromarray(corners()).resize((w, h))
    right = np.rot90(np.asarray(right), degrees // 90)
    assert close(media.read_video(video)[0], right)
    for fit in "crop", "pad":
        small = media.fitted(Image.fromarray(np.ascontiguousarray(right)), (48, 64), fit)
        assert close(media.read_video(video, size=(48, 64), fit=fit)[0], small)


@pytest.mark.parametrize(
    "lines, width, matrix", [(720, 1280, "itu709"), (480, 640, "itu601"), (1280, 720, "itu709")]
)
def test_videos_without_colour_tags(lines, width, matrix, tmp_path):
    frame = np.full((lines, width, 3), (200, 60, 60), np.uint8)
    video = write_video(tmp_path / "a.mp4", [frame] * 4, dst_colorspace=matrix)
    for size in None, (32, 32):
        assert close(media.read_video(video, size=size)[0, 5, 5], (200, 60, 60), 3)


def hlg(light):
    """Light of the scene, 1 is white on the screen (203 of 1,000 nits), grey alone."""
    scene = (light * 0.203) ** (1 / 1.2)
    return np.where(
        scene <= 1 / 12,
        np.sqrt(3 * scene),
        0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073,
    )


def pq(light):
    y = (light * 0.0203) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


@pytest.mark.parametrize("curve, tag", [(hlg, 18), (pq, 16)])
def test_hdr_becomes_what_a_screen_shows(curve, tag, tmp_path):
    """Greys below nine tenths of white keep their light; what is brighter is compressed, in order."""
    light = np.array([0.01, 0.05, 0.18, 0.4, 0.7, 0.9, 1.0, 2.0, 4.9])
    code = np.rint(64 + 876 * curve(light)).astype(np.uint16)  # 10 bits, limited range
    tags = dict(color_trc=tag, color_primaries=9, colorspace=9, color_range=1)
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=24, options={"crf": "4"})
        stream.height, stream.width, stream.pix_fmt = 64, 16 * len(code), "yuv420p10le"
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for i in range(4):
            frame = av.VideoFrame(16 * len(code), 64, "yuv420p10le")
            for plane, values in zip(
                frame.planes,
                (code.repeat(16), np.full(8 * len(code), 512), np.full(8 * len(code), 512)),
                strict=True,
            ):
                row = np.zeros(plane.line_size // 2, np.uint16)
                row[: len(values)] = values
                plane.update(np.tile(row, plane.height).tobytes())
            for name, value in tags.items():
                setattr(frame, name, value)
            frame.pts = i
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    shown = media.read_video(tmp_path / "a.mp4")[0, 32, 8::16].astype(float)
    assert np.abs(shown[:6] - srgb_encoded(light[:6])[:, None]).max() < 4, (shown, srgb_encoded(light))
    assert (np.diff(shown[:, 1]) > 0).all() and shown[6:].min() > 240
    assert np.ptp(shown, axis=1).max() <= 2  # grey stays grey


def test_wide_colours_become_srgb(tmp_path):
    tags = dict(color_primaries=12, colorspace=1, color_range=1, color_trc=1)
    colour = np.array([200, 120, 90])
    video = write_video(
        tmp_path / "a.mp4", [np.full((64, 64, 3), colour, np.uint8)] * 4, tags=tags, dst_colorspace="itu709"
    )
    light = np.where(colour / 255 <= 0.04045, colour / 255 / 12.92, ((colour / 255 + 0.055) / 1.055) ** 2.4)
    right = srgb_encoded(
        light @ np.array([[1.2249, -0.0420, -0.0197], [-0.2247, 1.0419, -0.0786], [0, 0, 1.0979]])
    )
    assert np.abs(media.read_video(video)[0, 32, 32] - right).max() < 5


@pytest.mark.parametrize("name, codec, pix_fmt", [("a.mov", "qtrle", "argb"), ("a.apng", "apng", "rgba")])
def test_what_is_transparent_in_a_video_is_white(name, codec, pix_fmt, tmp_path):
    """As in a picture. A sticker's hidden colours are mostly black."""
    frame = np.zeros((32, 48, 4), np.uint8)
    frame[:16] = *RED, 255
    frame[16:24, :, 3] = 51  # a fifth of black
    video = write_video(tmp_path / name, [frame] * 4, codec=codec, pix_fmt=pix_fmt, source="rgba")
    right = np.full((32, 48, 3), 255, np.uint8)
    right[:16], right[16:24] = RED, 204
    assert np.abs(media.read_video(video)[0] - right.astype(float)).max() <= 1
    assert np.abs(media.read_video(video, size=(16, 24))[0, 14] - 255.0).max() <= 1


def test_the_best_of_several_streams(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as file:
        streams = [(file.add_stream("libx264", rate=24), size) for size in (32, 64, 64)]
        for stream, size in streams:
            stream.width, stream.height, stream.pix_fmt = size, size, "yuv420p"
        for _ in range(8):
            for k, (stream, size) in enumerate(streams):
                file.mux(stream.encode(av.VideoFrame.from_ndarray(greys([50 * k], size, size)[0])))
        for stream, _ in streams:
            file.mux(stream.encode())
    video = media.read_video(path)
    assert video.shape == (8, 64, 64, 3) and close(video, greys([50] * 8, 64, 64), 3)


def test_interlaced_videos_are_not_combed(tmp_path):
    """A bright square moves 8 pixels between the two fields of a frame."""
    fields = np.zeros((16, 128, 192, 3), np.uint8)
    for i, field in enumerate(fields):
        field[40:88, 8 * i : 8 * i + 48] = 255
    frames = fields[::2].copy()
    frames[:, 1::2] = fields[1::2, 1::2]
    combed = lambda x: np.abs(x[:, 1:-1].astype(float) - (x[:, :-2].astype(float) + x[:, 2:]) / 2).max(
        (1, 2, 3)
    )
    assert combed(frames).min() > 200
    interlaced = {"x264-params": "tff=1:crf=5"}
    path = write_video(tmp_path / "a.mp4", frames, options=interlaced)
    with pytest.warns(UserWarning, match="interlaced"):
        video = media.read_video(path)
    assert video.shape == frames.shape
    inner = slice(2, -2)
    assert np.abs(video[inner, 40:88].mean((2, 3))[:, 4:-4].mean(1) - 255 * 48 / 192).max() < 12
    steps = np.abs(np.diff(video[inner, 64, :, 0].astype(float), axis=0)).sum(1)
    rows = np.abs(video[inner, 45:83:2].astype(float) - video[inner, 46:84:2]).mean()
    before = np.abs(frames[inner, 45:83:2].astype(float) - frames[inner, 46:84:2]).mean()
    assert rows < before / 4 and steps.min() > 0


def test_videos_that_change_size(tmp_path):
    """With a size for the result they are read; without one the cause is named."""
    raw = io.BytesIO()
    for size in 64, 32:
        with av.open(raw2 := io.BytesIO(), "w", format="h264") as file:
            stream = file.add_stream("libx264", rate=24)
            stream.width, stream.height, stream.pix_fmt = size, size, "yuv420p"
            for v in range(12):
                file.mux(stream.encode(av.VideoFrame.from_ndarray(greys([10 * v + size], size, size)[0])))
            file.mux(stream.encode())
        raw.write(raw2.getvalue())
    (tmp_path / "a.h264").write_bytes(raw.getvalue())
    with pytest.raises(ValueError, match="its frames change size, 64x64, then 32x32"):
        media.read_video(tmp_path / "a.h264")
    video = media.read_video(tmp_path / "a.h264", fps=25, size=(16, 16))
    assert close(video.mean((1, 2, 3)), [10 * v + size for size in (64, 32) for v in range(12)], 3)


def test_advice_for_videos_of_one_frame_works(tmp_path):
    video = write_video(tmp_path / "a.mp4", [corners()])
    with pytest.raises(
        ValueError,
        match="cannot read video '.*a.mp4': it has only one frame: save that .*--image frame.png",
    ):
        media.read_video(video)
    Image.fromarray(corners()).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="single picture: use --mode i2v --image '.*a.png'"):
        media.read_video(tmp_path / "a.png")
    assert (media.read_image(tmp_path / "a.png") == corners()).all()


@pytest.mark.parametrize("name, codec, keep", [("a.mp4", "libx264", 0), ("a.mkv", "mpeg4", 12)])
def test_a_video_whose_first_packet_is_broken(name, codec, keep, tmp_path):
    """What can be decoded is read, with a note; the rest of a file that was cut off as well."""
    options = {"g": "12", "bf": "0"}
    path = write_video(tmp_path / name, greys(range(0, 240, 5)), options=options, codec=codec)
    with av.open(str(path)) as file:
        packet = next(file.demux(video=0))
        at, size = packet.pos, packet.size
    data = bytearray(path.read_bytes())
    noise = (
        np.random.default_rng(0).integers(1, 255, size - keep, dtype=np.uint8)
        if keep
        else np.zeros(size, np.uint8)
    )
    data[at + keep : at + size] = noise.tobytes()
    path.write_bytes(data)
    with pytest.warns(UserWarning, match=f"{name}' is damaged in 1 place"):
        video = media.read_video(path)
    assert len(video) >= 36 and close(video[-12:], greys(range(180, 240, 5)), 3)
    path.write_bytes(bytes(1000))
    with pytest.raises(ValueError, match=f"cannot read video .*{name}"):
        media.read_video(path)


def numbered(n: int) -> np.ndarray:
    """Frames that say which they are: bits of the number as eight bars."""
    bits = np.arange(n)[:, None] >> np.arange(8) & 1
    return np.repeat(255 * bits, 8, 1)[:, None, :, None].repeat(32, 1).repeat(3, 3).astype(np.uint8)


def numbers(video: np.ndarray) -> list[int]:
    return ((video[:, 16, 4::8, 1] > 128) << np.arange(8)).sum(1).tolist()


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("fps", [12, 8, 6, 24, 48, 96, 30])
def test_the_rhythm_of_other_frame_rates(fps, suffix, tmp_path):
    """Matroska rounds times to milliseconds. 12 per second come twice each, and so does the last one."""
    n = 2 * fps
    path = write_video(tmp_path / f"a{suffix}", numbered(n), fps=fps)
    shown = np.array(numbers(media.read_video(path)))
    if 24 % fps == 0:
        right = np.arange(n).repeat(24 // fps)
    elif fps % 24 == 0:
        right = np.arange(n)[::-1][:: fps // 24][::-1]
    else:
        right = None
        assert len(shown) == 48 and set(np.diff(shown)) == {1, 2} and shown[-1] == n - 1
    assert right is None or shown.tolist() == right.tolist()
    assert (media.read_video(path, count=7) == media.read_video(path)[-7:]).all()


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_a_piece_of_a_video_for_training(suffix, tmp_path):
    """Found by the index, also where the times of a file do not begin with zero (.ts)."""
    path = write_video(tmp_path / f"a{suffix}", numbered(250), options={"g": "48"})
    assert numbers(media.read_video(path, start=0, count=24)) == [*range(24)]
    assert numbers(media.read_video(path, start=200, count=24)) == [*range(200, 224)]
    assert numbers(media.read_video(path, start=240, count=24)) == [*range(240, 250)]
    assert len(media.read_video(path, start=270, count=24)) == 0
    assert numbers(media.read_video(path, start=225)) == [*range(225, 250)]
    assert numbers(media.read_video(path, fps=12, start=10, count=4)) == [20, 22, 24, 26]
    assert numbers(media.read_video(path)) == [*range(250)]


def test_memory_of_videos_is_a_few_frames(tmp_path):
    """24 frames of 4K, as they are decoded, take 300 MB."""
    frame = np.zeros((2160, 3840, 3), np.uint8)
    frame[:, 1920:] = 200
    path = write_video(tmp_path / "a.mp4", [frame] * 24, fps=30, options={"preset": "ultrafast"})

    def read() -> None:
        video = media.read_video(path, count=32, size=(64, 64))
        assert video.shape == (19, 64, 64, 3) and abs(video[0, 32, 48] - 200.0).max() < 3, video

    assert peak(read) < 150e6


def test_what_ffmpeg_takes_for_a_video_or_cannot_read(tmp_path):
    (tmp_path / "notes.txt").write_text("a red ball\nbounces\n" * 400)
    with bad("notes.txt': it is a text, not a video"):
        media.read_video(tmp_path / "notes.txt")
    first, *others = map(Image.fromarray, greys(range(0, 120, 20)))
    first.save(tmp_path / "a.webp", save_all=True, append_images=others)
    with bad("a.webp': FFmpeg cannot read animated WebP: save it as a GIF or mp4"):
        media.read_video(tmp_path / "a.webp")


# ------------------------------------------------------------------------------------------------------- LoRA


def lora_of(dit, rank: int = 2, seed: int = 0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator) * 0.1
    return {
        name: (draw(rank, linear.weight.shape[1]), draw(linear.weight.shape[0], rank))
        for name, linear in training.lora_targets(dit).items()
    }


def updates(dit) -> dict[str, torch.Tensor]:
    """What the LoRAs of a model add to its weights."""
    return {
        name: linear.lora.scale * linear.lora.up @ linear.lora.down
        for name, linear in training.lora_targets(dit).items()
        if hasattr(linear, "lora")
    }


LORA_FORMATS = {
    "PEFT": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
    "PEFT adapter": (
        "base_model.model.{}.lora_A.default.weight",
        "base_model.model.{}.lora_B.default.weight",
    ),
    "diffusers": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight"),
    "old diffusers": ("transformer.{}.lora.down.weight", "transformer.{}.lora.up.weight"),
    "Comfy": ("diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight"),
    "kohya": ("lora_unet_{_}.lora_down.weight", "lora_unet_{_}.lora_up.weight"),
}


@pytest.mark.parametrize("form", LORA_FORMATS)
def test_loras_of_other_programs(form, tmp_path):
    """Some layers only, with alpha, as most of them write."""
    dit = copy.deepcopy(small()[0])
    lora = {name: pair for name, pair in lora_of(dit).items() if ".attn." in name}
    tensors, about = {}, None
    for name, pair in lora.items():
        for template, part in zip(LORA_FORMATS[form], pair, strict=True):
            tensors[template.replace("{_}", name.replace(".", "_")).replace("{}", name)] = part
        if form in ("kohya", "Comfy"):
            alpha = LORA_FORMATS[form][0].split(".lora")[0]
            tensors[alpha.replace("{_}", name.replace(".", "_")).replace("{}", name) + ".alpha"] = (
                torch.tensor(1.0)
            )
    file = tmp_path / "adapter_model.safetensors"
    if form == "PEFT adapter":
        (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 1, "r": 2}')
    if form == "diffusers":
        about = {"lora_adapter_metadata": '{"transformer.lora_alpha": 1, "transformer.r": 2}'}
    save_file(tensors, file, about)
    assert training.check_lora(dit, file) == 2
    training.load_lora(dit, file, scale=3)
    strength = 3.0 if form in ("PEFT", "old diffusers") else 1.5
    made = updates(dit)
    assert made.keys() == lora.keys()
    for name, (down, up) in lora.items():
        assert torch.allclose(made[name], strength * up @ down), name


def test_loras_in_official_names(tmp_path):
    """They act on the official model as on ours, in which the inputs of one layer stand in another order."""
    dit = copy.deepcopy(small()[0])
    targets = training.lora_targets(dit)
    official = training.official_layers(targets)
    tensors = {}
    for name, (down, up) in lora_of(dit).items():
        tensors |= {f"{official[name]}.lora_A.weight": down, f"{official[name]}.lora_B.weight": up}
    save_file(tensors, tmp_path / "a.safetensors")
    training.load_lora(dit, tmp_path / "a.safetensors")
    for name, made in updates(dit).items():
        down, up = tensors[f"{official[name]}.lora_A.weight"], tensors[f"{official[name]}.lora_B.weight"]
        (right,) = cw.convert_dit({f"{official[name]}.weight": up @ down}).values()
        assert torch.allclose(made, right, atol=1e-6), name


def test_loras_add_up(tmp_path):
    dit, files = copy.deepcopy(small()[0]), []
    loras = [lora_of(dit, rank, seed=rank) for rank in (2, 3)]
    for i, lora in enumerate(loras):
        files.append(tmp_path / f"{i}.safetensors")
        save_file(
            {
                f"{name}.lora.{part}": v
                for name, pair in lora.items()
                for part, v in zip(("down", "up"), pair, strict=True)
            },
            files[-1],
        )
    training.load_lora(training.load_lora(dit, files[0], 0.5), files[1], 2.0)
    for name, made in updates(dit).items():
        (down, up), (down2, up2) = (lora[name] for lora in loras)
        assert torch.allclose(made, 0.5 * up @ down + 2 * up2 @ down2, atol=1e-5)
    with training.lora_off(dit):
        assert all(not v.any() for v in updates(dit).values())


@pytest.mark.parametrize(
    "name, words",
    [
        ("layers.0.attn.q.hada_w1_a", "LoHa"),
        ("layers.0.attn.q.lora_magnitude_vector", "DoRA"),
        (
            "transformer.blocks.7.to_q.lora_A.weight",
            "for another model: this one has no layer 'blocks.7.to_q'",
        ),
        ("layers.0.attn.q.lora_B.weight", "for another model"),
    ],
)
def test_loras_that_cannot_be_loaded_are_named(name, words, tmp_path):
    tensors = {
        "layers.0.attn.q.lora_A.weight": torch.zeros(2, 32),
        "layers.0.attn.q.lora_B.weight": torch.zeros(32, 2),
    }
    save_file(tensors | {name: torch.zeros(3, 32)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=words):
        training.check_lora(small()[0], tmp_path / "a.safetensors")


# --------------------------------------------------------------------------------------------- finished files

PAGE = """<video id=v muted src=a.mp4></video><script>
const told = [], tell = x => told.push(x)
v.onloadedmetadata = () => { tell(v.duration); tell(v.seekable.end(0)); v.currentTime = 1.5 }
v.onerror = () => fetch('/told?error')
v.onseeked = () => { v.onseeked = null; tell(v.currentTime); look(200) }
const c = document.createElement('canvas').getContext('2d')
function look(times) {  // on a busy machine the first, black frame may still be shown
  c.drawImage(v, 0, 0)
  const red = c.getImageData(8, 8, 1, 1).data[0]
  if (red < 20 && times) return setTimeout(look, 20, times - 1)
  tell(red); v.play() }
v.onended = () => { tell(v.currentTime); fetch('/told?' + told.join(',')) }
</script>"""


class Site(http.server.BaseHTTPRequestHandler):
    """A page with a video, served in ranges as seeking needs, and an ear for what the page tells."""

    def do_GET(self):
        path = self.path.partition("?")
        body = {"/": PAGE.encode(), "/a.mp4": self.server.video}.get(path[0], b"")
        if path[0] == "/told":
            self.server.told.put(path[2])
        first, length = 0, len(body)
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first = int(asked[1])
            body = body[first : int(asked[2] or length) + 1]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Type", "video/mp4" if path[0] == "/a.mp4" else "text/html")
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{length}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def in_chromium(video: Path, folder: Path) -> list[float]:
    """Duration, end of what can be sought, time and red of a frame when 1.5 s was sought, time at the end."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.video, server.told = video.read_bytes(), queue.Queue()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --autoplay-policy=no-user-gesture-required"
    )
    browser = subprocess.Popen(
        [
            shutil.which("chromium"),
            *flags.split(),
            f"--user-data-dir={folder}/profile",
            "--remote-debugging-port=0",
            f"http://127.0.0.1:{server.server_port}/",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        told = server.told.get(timeout=90)
    finally:
        browser.terminate()
        browser.wait()
        server.shutdown()
    return [float(x) for x in told.split(",")]


def grow(path: Path, chunks: int = 3, close: bool = True) -> media.Mp4Writer:
    """A file of so many seconds; each frame is a little brighter than the one before."""
    writer = media.Mp4Writer(path, 24)
    for i in range(chunks):
        writer.write(greys(range(3 * 24 * i, 3 * 24 * (i + 1), 3), 64, 64))
    if close:
        writer.close()
    return writer


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Debian's chromium")
@pytest.mark.parametrize("finished", [True, False])
def test_chromium_plays_and_seeks(finished, tmp_path):
    """A finished file; the fragments of one that was killed play as well."""
    grow(tmp_path / "a.mp4", close=finished)
    duration, seekable, sought, red, end = in_chromium(tmp_path / "a.mp4", tmp_path)
    assert abs(end - 3) < 0.1 and abs(sought - 1.5) < 0.01 and abs(red - 3 * 36) < 8
    assert not finished or abs(duration - 3) < 0.01 and seekable == duration


def test_a_finished_mp4_is_a_plain_one(tmp_path):
    """Index first, duration known, the same frames at the same times."""
    path = tmp_path / "a.mp4"
    writer = grow(path, close=False)
    fragments, before = path.read_bytes(), media.read_video(path)
    assert b"moof" in fragments
    writer.close()
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat") and b"moof" not in data and b"mfra" not in data
    assert (media.read_video(path) == before).all() and len(before) == 72
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        assert file.duration == 3_000_000 and stream.frames == 72 and stream.average_rate == 24
        assert [frame.time for frame in file.decode(stream)] == pytest.approx(np.arange(72) / 24)
        assert stream.codec_context.colorspace == 6
    assert [f.name for f in tmp_path.iterdir()] == ["a.mp4"]


def killed(work) -> None:
    """Run it in another process, where it must end by kill -9."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    "moment", ["while it is rewritten", "before it takes the place", "after it took the place"]
)
def test_kill_9_at_the_end_leaves_a_whole_file(moment, tmp_path):
    path, replace = tmp_path / "a.mp4", os.replace
    die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

    def work():
        writer = grow(path, close=False)
        if "while" in moment:
            plain = writer.plain
            writer.plain = lambda new: (plain(new), os.truncate(new, 3000), die())
        os.replace = lambda *a: (die() if "before" in moment else replace(*a), die())
        writer.close()

    killed(work)
    assert np.abs(media.read_video(path).mean((1, 2, 3)) - np.arange(0, 216, 3)).max() < 3
    assert (b"moof" in path.read_bytes()) == ("after" not in moment)
    grow(path)  # and the next run is not disturbed by what it left
    assert [f.name for f in tmp_path.iterdir()] == ["a.mp4"]


def test_without_room_for_rewriting_the_fragments_stay(tmp_path, monkeypatch):
    writer = grow(tmp_path / "a.mp4", close=False)

    def full(new):
        new.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "plain", full)
    with pytest.warns(UserWarning, match="stays in fragments, which play as well.*No space"):
        writer.close()
    assert len(media.read_video(tmp_path / "a.mp4")) == 72 and len([*tmp_path.iterdir()]) == 1


def test_fragments_for_a_player():
    """What goes to a pipe or a page: a header, then fragments; who comes late starts at any of them."""
    out, fragments = io.BytesIO(), media.Fragments(24)
    writer = media.Mp4Writer(out, 24)
    pieces = []
    for i in range(3):
        chunk = greys(range(72 * i, 72 * i + 72, 3), 64, 64)
        pieces.append(fragments.add(chunk))
        writer.write(chunk)
    writer.close()
    assert out.getvalue() == fragments.init + b"".join(pieces)
    assert re.fullmatch(r"avc1\.[0-9a-f]{6}", fragments.codec)
    for first in range(3):
        with av.open(io.BytesIO(fragments.init + b"".join(pieces[first:]))) as file:
            frames = [
                (f.pts * f.time_base, f.to_ndarray(format="rgb24").mean()) for f in file.decode(video=0)
            ]
        assert len(frames) == 72 - 24 * first and abs(frames[0][1] - 72 * first) < 3
        assert frames[-1][0] == Fraction(71, 24)


def test_a_file_that_another_program_changed_is_left_alone(tmp_path):
    writer = grow(tmp_path / "a.mp4", chunks=1, close=False)
    (tmp_path / "a.mp4").write_bytes(b"somebody else's")
    with pytest.raises(OSError, match="another program has changed it"):
        writer.write(greys(range(24), 64, 64))
    assert (tmp_path / "a.mp4").read_bytes() == b"somebody else's"


# ---------------------------------------------------------------------------------------------------- outputs


def command(model: Path, *flags) -> list[str]:
    """A quick run, whose text is encoded already."""
    text = model.parent / "text.safetensors"
    given = [] if {"--prompt", "--text"} & {*map(str, flags)} else ["--text", text]
    return [sys.executable, str(HERE / "sample.py"), *map(str, ("--model", model, *given, *flags))]


def refused(model: Path, *flags) -> str:
    """The one line that says why, in this process."""
    return assert_refused(
        sample.main, ["--model", model, "--text", model.parent / "text.safetensors", *flags]
    )


def test_a_name_that_the_terminal_cannot_show_is_no_error(model_folder, tmp_path, monkeypatch):
    flags = command(model_folder, "--num_frames", 24, "--out", tmp_path / "мяч.mp4")[2:]
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "cp1252"))
    assert sample.main(flags) == 0 and (tmp_path / "мяч.mp4").is_file()
    sys.stdout.flush()
    assert rb"\u043c\u044f\u0447.mp4" in written.getvalue()


def test_a_link_to_another_kind_of_file_is_refused(model_folder, tmp_path):
    (tmp_path / "abc").touch()
    (tmp_path / "a.mp4").symlink_to(tmp_path / "abc")
    assert "which ends otherwise" in refused(model_folder, "--out", tmp_path / "a.mp4")
    assert (tmp_path / "abc").read_bytes() == b""


def test_the_folder_of_many_videos_may_have_a_point_in_its_name(tmp_path):
    with outputs.claimed_folder(tmp_path / "run_1.5", ["a.mp4"]) as files:
        assert files == [tmp_path / "run_1.5" / "a.mp4"]
    assert not (tmp_path / "run_1.5").exists()  # as nothing was written


def test_a_video_that_is_moved_while_it_grows(tmp_path, capsys):
    out, moved = tmp_path / "a.mp4", tmp_path / "b.mp4"

    def frames(progress):
        yield greys([0] * 24)
        out.rename(moved)
        yield greys([9] * 24)

    code = sample.generate(frames, magi.SamplerConfig(), 2, out, "cpu")
    said, err = capsys.readouterr()
    assert code == 1 and "24 frames -> where it was moved to" in said
    assert "it was moved or deleted while it grew" in err and "fragments" not in err
    assert len(media.read_video(moved)) == 24 and not out.exists()


def test_a_disk_that_fails_while_weights_are_read_is_not_blamed_on_the_output(tmp_path, capsys):
    def frames(progress):
        raise OSError(5, "Input/output error", "model.safetensors")
        yield

    assert sample.generate(frames, magi.SamplerConfig(), 2, tmp_path / "a.mp4", "cpu") == 1
    assert capsys.readouterr().err.startswith("error: [Errno 5] Input/output error: 'model.safetensors'")


@pytest.mark.parametrize("ending", [".mp4", ".gif", ".png"])
def test_two_runs_on_one_output(ending, model_folder, tmp_path):
    """The second to come leaves with one line, by whatever path it comes; the first one's file is whole."""
    out = tmp_path / f"a{ending}"
    out.write_bytes(b"old")
    (tmp_path / "folder").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / f"link{ending}").symlink_to(out)
    with outputs.locked(outputs.check_output(out)):
        for path in (
            out,
            tmp_path / "folder" / out.name,
            tmp_path / f"link{ending}",
            Path(os.path.relpath(out)),
        ):
            assert "another run is writing" in refused(model_folder, "--out", path)
    assert out.read_bytes() == b"old"
    if ending != ".mp4":
        return  # they differ in how they are written, not in who may write
    flags = ("--num_frames", 96, "--out", out)
    pipes = dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    runs = [fork_python(*command(model_folder, *flags, "--seed", i)[1:], **pipes) for i in range(2)]
    said = [run.communicate() for run in runs]
    codes = sorted(run.returncode for run in runs)
    assert codes in ([0, 2], [0, 0])  # [0, 0]: one after the other
    for run, (_, err) in zip(runs, said, strict=True):
        if run.returncode:
            (line,) = err.splitlines()
            assert "another run is writing" in line
    with av.open(str(out)) as file:
        times = [frame.time for frame in file.decode(video=0)]
    assert times == sorted(times) and len(times) == 96
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]


def test_two_runs_that_save_one_text(model_folder, tmp_path):
    path = tmp_path / "a.safetensors"
    with outputs.locked(path):
        code, _, err = run_main(
            sample.main,
            "--model",
            model_folder,
            "--prompt",
            "a",
            "--save_text",
            path,
            "--out",
            tmp_path / "a.mp4",
        )
    assert code == 2 and "another run is writing" in err and not [*tmp_path.iterdir()]


def test_a_lock_of_a_killed_run_does_not_hold(tmp_path):
    path = tmp_path / "a.mp4"

    def work():
        with outputs.locked(path):
            os.kill(os.getpid(), signal.SIGKILL)

    killed(work)
    assert (tmp_path / ".a.mp4.lock").exists()
    with outputs.locked(path):
        pass
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("ending", [".mp4", ".gif"])
def test_links_are_written_through_and_modes_kept(ending, model_folder, tmp_path):
    (tmp_path / "real").mkdir()
    real, link = tmp_path / "real" / f"a{ending}", tmp_path / f"link{ending}"
    real.write_bytes(b"old")
    real.chmod(0o664)
    link.symlink_to(f"real/a{ending}")
    code, *_ = run_main(
        sample.main,
        "--model",
        model_folder,
        "--text",
        model_folder.parent / "text.safetensors",
        "--num_frames",
        48,
        "--out",
        link,
    )
    assert code == 0 and link.is_symlink() and len(media.read_video(real)) == 48
    assert real.stat().st_mode & 0o777 == 0o664
    plain = media.WRITERS[ending](tmp_path / f"new{ending}", 24)
    plain.write(greys([9, 9]))
    plain.close()
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / f"new{ending}").stat().st_mode & 0o777 == 0o666 & ~umask


def test_outputs_that_are_refused_before_anything_is_computed(model_folder, tmp_path):
    os.mkfifo(tmp_path / "fifo.mp4")
    assert "it is no ordinary file" in refused(model_folder, "--out", tmp_path / "fifo.mp4")
    for length, ok in (251, False), (250, False), (249, True):
        name = tmp_path / ("a" * (length - 4) + ".mp4")
        if ok:
            assert outputs.check_output(name) == name
            grow(name, chunks=2)
            with outputs.locked(name):
                pass
        else:
            assert "too long: at most 249 bytes" in refused(model_folder, "--out", name)
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    assert "is a link to something" in refused(model_folder, "--out", tmp_path / "loop.mp4")
    assert (tmp_path / "fifo.mp4").is_fifo()


# ------------------------------------------------------------------------------------------------------ flags


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--guidance", "7"], "did you mean --text_scale?"),
        (["--cfg=7"], "did you mean --text_scale?"),
        (["--gudance", "7"], "did you mean --text_scale?"),
        (["--output-pth", "a.mp4"], "did you mean --out?"),
        (["--sede", "7"], "did you mean --seed?"),
        (["--colour", "red"], "unrecognized arguments: --colour red; see --help"),
        (["--seed", "1", "--seed", "2"], "--seed is given twice"),
        (["--image_path", "a.png", "--image", "b.png"], "--image is given twice"),
        (["--kv_range", "5", "--kv-range", "4"], "--kv_range is given twice"),
        (["--out", "out.mp4", "--output", "out.mp4"], "--out is given twice"),
        (["--prefix_frames", "32"], "--prefix_frames is for --video"),
        (["--fit", "pad"], "--fit is for --image and --video"),
        (
            ["--lora", "a", "--lora", "b", "--lora", "c", "--lora_scale", "1", "--lora_scale", "2"],
            "2 --lora_scale for 3 --lora",
        ),
    ],
)
def test_flags_that_would_be_lost(flags, words, model_folder):
    err = assert_refused(sample.main, ["--model", model_folder, "--prompt", "x", *flags], words)
    assert "did you mean" in words or "did you mean" not in err


def test_counts_in_words(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "generate", lambda **run: 0)
    for prompts, frames, words in (
        (3, 24, "3 prompts for 1 chunk: the last ones are"),
        (3, 48, "3 prompts for 2 chunks: the last one is"),
    ):
        flags = ["--prompt", "a"] * prompts + ["--num_frames", frames, "--out", tmp_path / "a.mp4"]
        assert words in run_main(sample.main, "--model", model_folder, *flags)[2]


def test_several_loras_and_their_scales(model_folder, tmp_path, monkeypatch):
    dit = magi.load_dit(model_folder)
    files, plans = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"], []
    for i, file in enumerate(files):
        save_file(
            {
                f"{name}.lora.{part}": v
                for name, pair in lora_of(dit, seed=i).items()
                for part, v in zip(("down", "up"), pair, strict=True)
            },
            file,
        )
    monkeypatch.setattr(sample, "generate", lambda **run: plans.append(run) or 0)
    text = model_folder.parent / "text.safetensors"
    for scales in [], ["--lora_scale", 2], ["--lora_scale", 2, "--lora_scale", 0.5]:
        flags = ["--lora", files[0], "--lora", files[1], *scales, "--out", tmp_path / "a.mp4"]
        assert run_main(sample.main, "--model", model_folder, "--text", text, *flags)[0] == 0
    a, b = (lora_of(dit, seed=i) for i in range(2))
    for plan, (one, two) in zip(plans, [(1, 1), (2, 2), (2, 0.5)], strict=True):
        for name, made in updates(plan["frames"].func.dit).items():
            right = one * a[name][1] @ a[name][0] + two * b[name][1] @ b[name][0]
            assert torch.allclose(made, right, atol=1e-5)


def test_prompts_that_the_text_encoder_cannot_read(model_folder, tmp_path, monkeypatch):
    """One warning; none for a prompt it can read, an empty one, or one without letters on purpose."""
    monkeypatch.setattr(sample, "generate", lambda **run: 0)
    said = lambda *flags: run_main(sample.main, "--model", model_folder, "--out", tmp_path / "a.mp4", *flags)[
        2
    ].splitlines()
    (line,) = said("--prompt", "一个红球弹跳")
    assert line.startswith("warning: nothing of the prompt '一个红球弹跳' can be read")
    (line,) = said("--prompt", "a красный ball")
    assert line.startswith("warning: the text encoder cannot read 'красный'")
    assert said("--prompt", "a red ball") == [] and said("--prompt", "") == []
    (line,) = said("--prompt", "a red ball", "--prompt", "شبكة")
    assert "'شبكة'" in line


@pytest.mark.parametrize("name", ["image", "video", "config_file"])
def test_an_empty_name_is_no_file(name):
    """As a variable of the shell that is not set gives it."""
    flags = [f"--{name}", "", "--prompt", "a red ball"]
    assert_refused(sample.main, flags, f"--{name} '' names no file: give one, or leave it out")


def test_a_number_for_guidance_with_a_table_of_ones_own(model_folder):
    flags = "--cfg_t 0 --text_scale 3 --prev_scale 1".split()
    args = sample.parse_arguments(["--model", str(model_folder), *flags])
    sample.check_lora_scales(args)
    cfg, _ = sample.settings(args, *sample.read_configs(model_folder))
    assert (cfg.cfg_t, cfg.text_scales, cfg.prev_scales) == ((0.0,), (3.0,), (1.0,))


# ---------------------------------------------------------------------------------------------- how it is run


def test_python_without_docstrings(monkeypatch, capsys):
    """Ours are there for --help alone, but transformers needs its own: the command starts again with all."""
    done = run_python("-OO", sample.__file__, "--help")
    assert done.returncode == 0 and "Make videos with MAGI-1" in done.stdout, done.stderr
    monkeypatch.setattr(sample, "__doc__", None)
    with pytest.raises(SystemExit):
        sample.main(["--help"])
    assert "--prompt" in capsys.readouterr().out


def test_a_warning_of_any_command_is_one_line(capsys):
    assert terminal.exit_code(lambda: warnings.warn("a\nb", stacklevel=1)) == 0
    assert capsys.readouterr().err == "warning: a b\n"


@pytest.mark.parametrize("after", [0.1, 0.4, 1.0])
def test_ctrl_c_while_python_imports(after, model_folder, tmp_path):
    """Slow imports (a module that takes ten seconds), so that the moment is hit on any machine."""
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "einops.py").write_text("import time\nfor _ in range(1000):\n    time.sleep(0.01)")
    env = environment() | {"PYTHONPATH": str(tmp_path / "slow")}
    run = subprocess.Popen(
        command(model_folder, "--out", tmp_path / "a.mp4"),
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while (
        "tqdm" not in Path(f"/proc/{run.pid}/maps").read_text()
        and "_json" not in Path(f"/proc/{run.pid}/maps").read_text()
    ):
        time.sleep(0.01)
    time.sleep(after)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=20)
    assert (run.returncode, out, err) == (130, "interrupted before anything was written\n", "")
    assert [f.name for f in tmp_path.iterdir()] == ["slow"]


def test_ctrl_c_works_again_after_a_run_that_it_ended(model_folder, tmp_path, monkeypatch):
    """In a notebook, for example: generate ignores it while it ends."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(magi, "sample", interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert sample.main(command(model_folder, "--out", tmp_path / "a.mp4")[2:]) == 130
    assert signal.getsignal(signal.SIGINT) is before


def test_a_log_gets_a_line_now_and_then(model_folder, tmp_path):
    """Lines after 1, 2, 4 ... 60 s, no carriage returns."""
    flags = ["--num_frames", 120, "--steps", 8, "--out", tmp_path / "a.mp4"]
    text = model_folder.parent / "text.safetensors"
    code, _, err = run_main(sample.main, "--model", model_folder, "--text", text, *flags)
    assert code == 0 and "\r" not in err
    lines = err.splitlines()
    assert 1 <= len(lines) < 10 and lines[-1] == "chunk 5/5: pass 16 of 16"


def test_large_weights_are_announced_before_they_are_read(model_folder, tmp_path, monkeypatch):
    text = model_folder.parent / "text.safetensors"
    flags = "--model", model_folder, "--text", text, "--num_frames", 24, "--out", tmp_path / "a.mp4"
    assert "reading" not in run_main(sample.main, *flags)[2]
    monkeypatch.setattr(terminal, "LARGE", 1000)
    code, _, err = run_main(sample.main, *flags)
    assert code == 0 and err.startswith(f"reading the model '{model_folder}', 0.0 GiB\n")


def test_log_lines_over_an_hour(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(terminal, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    _, progress = terminal.progress_bar(math.inf)
    for step in range(36000):
        now[0] = step / 10
        progress(types.SimpleNamespace(chunk=step // 4, step=step, total=None))
    lines = capsys.readouterr().err.splitlines()
    assert 60 < len(lines) < 75 and lines[0].startswith("chunk 1: pass 0")


def test_waiting_threads_sleep():
    """OpenMP reads this when PyTorch is imported; a choice of the user's own stays."""
    code = (
        "import os, runpy, sys\nsys.argv[1:] = ['--help']\n"
        "try:\n    runpy.run_path('sample.py', run_name='__main__')\n"
        "except SystemExit:\n    print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    )
    for given, right in (None, "PASSIVE"), ("ACTIVE", "ACTIVE"):
        env = {k: v for k, v in environment().items() if k != "OMP_WAIT_POLICY"} | (
            {"OMP_WAIT_POLICY": given} if given else {}
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=HERE, env=env, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == f"{right} False", done


@pytest.mark.parametrize("runnable, count", [("1/80", None), ("4/80", None), ("5/80", "2"), ("x", None)])
def test_a_busy_machine_gets_half_as_many_threads(monkeypatch, runnable, count):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("builtins.open", lambda *a: io.StringIO(f"0.2 0.1 0.1 {runnable} 77"))
    with monkeypatch.context() as patch:
        patch.setattr("os.environ", {})
        terminal.share_the_machine()
        assert os.environ.get("OMP_NUM_THREADS") == count and os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
        patch.setattr("os.environ", {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "ACTIVE"})
        terminal.share_the_machine()
        assert os.environ == {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "ACTIVE"}


# ----------------------------------------------------------------------------------------------------- Python


def held(x: np.ndarray) -> dict:
    """One picture (h, w, 3) in the ways people hold it."""
    tensor = torch.from_numpy(x.copy())
    return {
        "array": x,
        "PIL": Image.fromarray(x),
        "channels first": x.transpose(2, 0, 1),
        "floats": x / 255.0,
        "float32": (x / 255).astype(np.float32),
        "tensor": tensor.permute(2, 0, 1),
        "tensor, channels last": tensor,
        "float tensor": tensor.permute(2, 0, 1) / 255,
        "batch of one": tensor.permute(2, 0, 1)[None] / 255,
        "RGBA": np.dstack([x, np.full(x.shape[:2], 255, np.uint8)]),
        "PIL RGBA": Image.fromarray(x).convert("RGBA"),
        "not contiguous": np.asfortranarray(x),
        "gradients": (tensor / 255).requires_grad_(),
    }


def test_images_that_people_hold(tmp_path):
    x = corners()
    for name, image in held(x).items():
        assert (media.to_image(image) == x).all(), name
    Image.fromarray(x).save(tmp_path / "a.png")
    assert (media.to_image(tmp_path / "a.png") == x).all() and (
        media.to_image(str(tmp_path / "a.png")) == x
    ).all()
    grey = x[..., 0]
    for image in (
        grey,
        grey[..., None],
        torch.from_numpy(grey),
        torch.from_numpy(grey)[None],
        Image.fromarray(grey),
    ):
        assert (media.to_image(image) == grey[..., None]).all()
    glass = np.dstack([x, np.full(x.shape[:2], 51, np.uint8)])  # a fifth
    for image in glass, Image.fromarray(glass), glass / 255:
        assert np.abs(media.to_image(image) - (0.2 * x + 0.8 * 255)).max() <= 1
    bf16 = torch.from_numpy(x / 255).bfloat16()
    assert np.abs(media.to_image(bf16) - x.astype(float)).max() <= 1
    assert (media.to_image(np.full((2, 1, 3), 1.0005)) == 255).all()  # what resizing leaves


def test_what_is_no_picture_and_no_number_of_frames(model_folder):
    with bad("the image has 0x0 pixels"):
        media.to_image(Image.new("RGB", (0, 0)))
    for wrong in (8.0, None):
        with bad(f"prefix_frames {wrong} must be a whole number"):
            media.prefix_pixels(None, greys(range(40)), wrong, (32, 48), "crop", 24)


def test_videos_that_people_hold(tmp_path):
    x = np.stack([np.roll(corners(), i, 1) for i in range(6)])
    tensor = torch.from_numpy(x)
    ways = [
        x,
        tensor.permute(0, 3, 1, 2),
        tensor.permute(3, 0, 1, 2)[None] / 255,
        x / 255.0,
        [*x],
        tuple(x),
        iter(x),
        [Image.fromarray(f) for f in x],
        [torch.from_numpy(f).permute(2, 0, 1) / 255 for f in x],
        tensor,
    ]
    for video in ways:
        assert (media.to_video(video) == x).all()
    assert (media.to_video(x[..., 0]) == x[..., :1]).all()
    path = write_video(tmp_path / "a.mp4", x)
    assert close(media.to_video(path), x) and close(media.to_video(path, count=4), x[-4:])


@pytest.mark.parametrize(
    "x, words",
    [
        (
            np.zeros((8, 8, 3)) - 1,
            "values from -1 to -1: take uint8 from 0 to 255, or floats from 0 to 1 .from -1 to 1",
        ),
        (np.full((8, 8, 3), 128.0), "values from 128 to 128"),
        (np.full((8, 8, 3), np.nan), "values from nan"),
        (np.zeros((8, 8, 3), np.int64), "of type int64: take uint8"),
        (np.zeros((8, 8, 3), np.uint16), "of type uint16"),
        (np.zeros((8, 8, 3), bool), "of type bool"),
        (np.zeros((8, 8, 5), np.uint8), r"shape \(8, 8, 5\): take \(h, w\), \(h, w, channels\)"),
        (np.zeros((0, 8, 3), np.uint8), r"shape \(0, 8, 3\)"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"shape \(2, 8, 8, 3\)"),
        (torch.zeros(3, 8, 3), "several of these"),
        (np.zeros(8), r"shape \(8,\)"),
        (None, "of type NoneType: take a path, PIL image, array or tensor"),
        ([[1, 2], [3, 4]], "of type list"),
        ("nowhere.png", "'nowhere.png' does not exist"),
    ],
)
def test_images_that_are_not_clear(x, words):
    with pytest.raises(ValueError, match=words):
        media.to_image(x)


@pytest.mark.parametrize(
    "x, words",
    [
        (np.zeros((8, 8, 3), np.uint8), "looks like one image"),
        (np.zeros((3, 8, 8), np.uint8), "looks like one image"),
        (np.zeros((5, 8, 8, 5), np.uint8), r"shape \(5, 8, 8, 5\): take \(frames, h, w\)"),
        (torch.zeros(3, 1, 8, 8), "several of these"),
        (torch.zeros(8, 3, 8, 3), "several of these"),
        ([], "empty list"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)], r"sizes \[\(8, 8\), \(8, 9\)\]"),
        ([np.zeros((8, 8, 3)) - 1], "values from -1"),
        (7, "of type int"),
        (np.zeros((0, 8, 8, 3), np.uint8), "shape"),
    ],
)
def test_videos_that_are_not_clear(x, words):
    with pytest.raises(ValueError, match=words):
        media.to_video(x)


@pytest.mark.parametrize(
    "words", ["sample.py --prompt a", "sample.py --promt a", "live.py", "training.py lora"]
)
def test_a_package_that_is_not_installed_is_named_in_one_line(words):
    done = run_python("-S", *words.split())  # -S: without the folder of packages
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert re.match(r"error: this Python has no package '\w+': pip install -r requirements.txt", done.stderr)


@pytest.mark.parametrize("file", ["convert_weights.py", "kernels.py"])
def test_a_tool_names_it_as_well(file):
    test_a_package_that_is_not_installed_is_named_in_one_line(file)


def test_the_pipeline_takes_what_people_hold(model_folder, tmp_path):
    pipe = magi.load(model_folder)
    text = tuple(load_file(model_folder.parent / "text.safetensors").values())
    text = text if text[0].dim() == 3 else text[::-1]
    frames = lambda **given: next(pipe(text, num_frames=8, **given))
    first = frames(image=corners())
    for image in corners() / 255.0, Image.fromarray(corners()), torch.from_numpy(corners()).permute(2, 0, 1):
        assert same(frames(image=image), first)
    Image.fromarray(corners()).save(tmp_path / "a.png")
    assert same(frames(image=tmp_path / "a.png"), first)
    for wrong in np.zeros((0, 4, 3), np.uint8), "nowhere.png", np.zeros((5, 5, 7)):
        with pytest.raises(ValueError):
            frames(image=wrong)
