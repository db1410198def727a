"""Pictures and videos: reading, fitting, writing."""

import io
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from common import bad, read_frames, shades
from PIL import Image

import media


def test_images_are_cropped_not_stretched():
    wide = np.zeros((1, 20, 40, 3), np.uint8)
    wide[:, 4:16, 14:26] = 255  # a square in the middle
    height_and_width = lambda x: tuple(int((x[0, 0, 0] > 0).any(d).sum()) for d in (1, 0))
    assert height_and_width(media.fit_frames(wide, 20, 20)) == (12, 12)
    assert height_and_width(media.fit_frames(wide, 20, 20, "pad")) == (6, 6)
    assert height_and_width(media.fit_frames(wide, 20, 20, "stretch")) == (12, 6)
    assert media.fit_frames(wide, 48, 64).shape == (1, 3, 1, 48, 64)
    with bad("'zoom' is not"):
        media.fit_frames(wide, 20, 20, "zoom")


def test_resized_images_neither_overshoot_nor_alias():
    edge, stripes = np.zeros((2, 1, 128, 128, 3), np.uint8)
    edge[:, :, 64:] = stripes[:, :, ::2] = 255
    assert media.fit_frames(edge, 320, 320).abs().max() <= 1
    assert media.fit_frames(stripes, 48, 48)[..., 4:-4].abs().max() < 0.2  # grey


def test_frames_are_float32_whatever_pytorchs_default_is():
    frames = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)
    expected = media.fit_frames(frames, 32, 48)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(media.fit_frames(frames, 32, 48), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_sample_loses_nothing_on_a_full_disk(tmp_path, monkeypatch):
    """The old file stays until the first chunk is written, and a chunk is written whole or not at all."""

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, data):
            self.file.write(data[: len(data) // 2])
            raise OSError(28, "No space left on device")

    opened, full = Path.open, lambda self, *a, **k: Full(opened(self, *a, **k))
    for ending in ".mp4", ".gif":
        path = tmp_path / f"a{ending}"
        path.write_bytes(b"old")
        writer = media.WRITERS[ending](path, 24)
        for made in b"old", None:  # with nothing written yet, and after a chunk
            with monkeypatch.context() as m, pytest.raises(OSError, match="No space"):
                m.setattr(Path, "open", full)
                if ending == ".gif":
                    writer.save = lambda frames, new, fps: Full(opened(new, "wb")).write(b"half")
                writer.write(shades(range(24)))
            if made:
                assert path.read_bytes() == made
                writer = media.WRITERS[ending](path, 24)
                writer.write(shades(range(24)))
            assert [f.name for f in tmp_path.glob(f"*{ending}*")] == [path.name]
        assert len(read_frames(path)) == 24


def test_ctrl_c_within_a_chunk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    """In a notebook, say; the next chunk can be written then."""

    class Interrupted(io.FileIO):
        def write(self, data):
            super().write(data[: len(data) // 2])
            raise KeyboardInterrupt

    path = tmp_path / "a.mp4"
    writer = media.Mp4Writer(path, 24)
    writer.write(shades(range(24)))
    before = path.read_bytes()
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(Path, "open", lambda self, mode: Interrupted(self, mode))
        writer.write(shades(range(24)))
    assert path.read_bytes() == before
    writer.write(shades(range(24)))
    assert len(read_frames(path)) == 48


def test_sample_reads_the_end_of_a_video_at_the_models_rate(tmp_path):
    file = tmp_path / "fast.mp4"
    writer = media.Mp4Writer(file, 48)
    for i in range(0, 200, 50):
        writer.write(shades(range(i, i + 50)))  # frame i has shade i
    frames = media.read_video(file, 24, count=32)
    assert frames.shape == (32, 32, 48, 3)
    assert np.abs(frames.mean((1, 2, 3)) - np.arange(199 - 62, 200, 2)).max() < 2
    assert len(media.read_video(file, 24, count=1000)) == 100  # all there is
    slow = media.read_video(file, 96, count=8).mean((1, 2, 3))  # each frame twice
    assert np.abs(slow - np.floor(199 - np.arange(8)[::-1] / 2)).max() < 2


def test_sample_turns_videos_upright(tmp_path):
    frames, file = np.zeros((8, 32, 48, 3), np.uint8), tmp_path / "a.mp4"
    frames[:, :, 24:] = 255  # bright on the right
    media.Mp4Writer(file, 24).write(frames)
    data = bytearray(file.read_bytes())
    at = data.index(b"tkhd") + 44  # the matrix of "rotate by 90 degrees clockwise to view"
    data[at : at + 36] = np.array([0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30], ">i4").tobytes()
    file.write_bytes(data)
    video = media.read_video(file, 24, count=8)
    assert video.shape == (8, 48, 32, 3) and video[:, :20].max() < 20 and video[:, 28:].min() > 235


def test_sample_reads_pictures_of_all_kinds(tmp_path):
    rgba = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    for name, image in {
        "rgba.png": Image.fromarray(rgba),
        "rgb.webp": Image.fromarray(rgba[..., :3]),
        "grey.png": Image.fromarray(rgba[..., 0]),
        "palette.gif": Image.fromarray(rgba[..., :3]),
        "cmyk.jpg": Image.fromarray(rgba[..., :3]).convert("CMYK"),
    }.items():
        image.save(tmp_path / name)
        pixels = media.read_image(str(tmp_path / name))
        assert pixels.shape == (20, 30, 3) and pixels.dtype == np.uint8
    rgb, alpha = rgba[..., :3].astype(float), rgba[..., 3:] / 255
    on_white = rgb * alpha + 255 * (1 - alpha)
    assert np.abs(media.read_image(str(tmp_path / "rgba.png")) - on_white).max() < 1.5
    assert (media.read_image(str(tmp_path / "grey.png")) == rgba[..., :1]).all()
    deep = np.linspace(0, 65535, 600).reshape(20, 30).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.abs(media.read_image(str(tmp_path / "deep.png"))[..., 0] - deep / 257).max() <= 1
    turned = Image.fromarray(rgba[..., :3])
    exif = turned.getexif()
    exif[274] = 6  # "rotate by 90 degrees to view"
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert media.read_image(str(tmp_path / "turned.jpg")).shape == (30, 20, 3)


@pytest.mark.parametrize("ending", [".mp4", ".gif"])
def test_sample_writers_keep_every_frame_and_time(ending, tmp_path):
    """Also frames that are all alike, which some encoders drop; whole after each chunk."""
    out = tmp_path / f"a{ending}"
    writer, count = media.WRITERS[ending](out, 24), 0
    for chunk in (shades([70] * 24), shades(range(0, 240, 10)), shades([9])):
        writer.write(chunk)
        count += len(chunk)
        with av.open(str(out)) as file:
            times = [float(frame.time) for frame in file.decode(video=0)]
        assert len(times) == count
        assert np.abs(np.array(times) - np.arange(count) / 24).max() < 0.0051
    assert np.abs(read_frames(out)[24:48].mean((1, 2, 3)) - np.arange(0, 240, 10)).max() < 3


def test_sample_mp4_says_how_it_is_coded(tmp_path):
    writer = media.Mp4Writer(tmp_path / "a.mp4", 24)
    for _ in range(3):
        writer.write(shades(range(5)))
    with av.open(str(tmp_path / "a.mp4")) as file:
        assert file.streams.video[0].codec_context.colorspace == 6
    fragments = (tmp_path / "a.mp4").read_bytes().split(b"mfhd")[1:]
    assert [int.from_bytes(part[4:8], "big") for part in fragments] == [1, 2, 3]


def test_sample_gif_shows_its_last_frame(tmp_path):
    media.WRITERS[".gif"](tmp_path / "a.gif", 5).write(shades([7]))
    assert Image.open(tmp_path / "a.gif").info["duration"] == 200


def test_sample_contact_sheet_reads_like_text(tmp_path):
    media.save_sheet(list(shades(range(0, 240, 5))), tmp_path / "a.png", 24)
    sheet = np.asarray(Image.open(tmp_path / "a.png"))  # 2 rows of 6 tiles of 96x64, gaps of 2
    tiles = [sheet[2 + 66 * (i // 6) + 30, 2 + 98 * (i % 6) + 50, 0] for i in range(12)]
    assert tiles == [*range(0, 240, 20)]


def test_pictures_opened_in_two_threads_leave_pillows_limit(monkeypatch):
    limit, began = Image.MAX_IMAGE_PIXELS, threading.Event()

    def slow_open(path):
        began.set()
        time.sleep(path)

    monkeypatch.setattr(Image, "open", slow_open)
    first, second = (threading.Thread(target=media.open_image, args=[seconds]) for seconds in (0.1, 0.2))
    first.start()
    began.wait()
    second.start()
    first.join()
    second.join()
    assert Image.MAX_IMAGE_PIXELS == limit
