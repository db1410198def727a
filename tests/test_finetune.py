"""Fine-tuning on a folder of clips (finetune.py), the loop, LoRA files of other programs."""

import concurrent.futures
import dataclasses
import importlib
import json
import math
import os
import shutil
import signal
import sys
import types
from pathlib import Path

import numpy as np
import parallel_worker as worker
import pytest
import torch
from common import (
    FOLDER_DIT,
    HERE,
    assert_one_line,
    assert_refused,
    bad,
    read_frames,
    relative,
    run_main,
    run_python,
    shades,
    write_model,
    write_t5,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import finetune
import magi
import media
import parallel
import planner
import sample
import training
from checkpoints import build

CAPTIONS = {"one.mp4": "a red", "two.mp4": "a blue\na red"}


def write_clip(file, frames: int, first: int = 0) -> None:
    writer = media.Mp4Writer(file, 24)
    writer.write(shades((first + 3 * i) % 256 for i in range(frames)))
    writer.close()


plot_loss = training.plot_loss


@pytest.fixture(scope="module", autouse=True)
def no_drawing():
    """It takes longer than these runs. That of `finished` draws its loss."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "plot_loss", lambda log: None)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two clips of one and two seconds, and a bit, with captions; the second has one a second."""
    folder = tmp_path_factory.mktemp("data")
    for i, (name, caption) in enumerate(CAPTIONS.items()):
        write_clip(folder / name, 30 + 24 * i, 60 * i)
        (folder / name).with_suffix(".txt").write_text(caption + "\n")
    return folder


@pytest.fixture(scope="module")
def cached(data, model_folder):
    """The same after a run: everything is in the cache."""
    assert train(model_folder, data, data.parent / "first.safetensors", "--steps", 1)[0] == 0
    return data


def command_line(model, data, out, *flags, command: str = "lora") -> list[str]:
    """The flags replace those of the same name here."""
    cache = data.parent / f"{data.name}.cache"
    usual = {"--model": model, "--data": data, "--out": out, "--cache": cache}
    usual |= {"--steps": 4, "--every": 2, "--sample_every": 0, "--seconds": 2}
    usual |= {"--rank": 2} if command == "lora" else {}
    kept = [word for name, value in usual.items() if name not in flags for word in (name, value)]
    return [str(word) for word in (command, *kept, *flags)]


def train(*args, **kwargs) -> tuple[int, str, str]:
    return run_main(finetune.main, *command_line(*args, **kwargs))


refused = assert_one_line


# ------------------------------------------------------------------------------------------------ the data


def test_videos_are_cut_into_seconds_with_their_captions(data, tmp_path):
    videos = finetune.find_videos(data, tmp_path)
    assert [(v.path.name, v.seconds, v.height, v.width) for v in videos] == [
        ("one.mp4", 1, 32, 48), ("two.mp4", 2, 32, 48)]  # fmt: skip
    pieces = finetune.cut(videos, 32 * 48, most_chunks=2)
    assert [(p.start, p.captions, p.height, p.width) for p in pieces] == [
        (0, ("a red",), 32, 48), (0, ("a blue", "a red"), 32, 48)]  # fmt: skip
    assert [p.start for p in finetune.cut(videos, 32 * 48, most_chunks=1)] == [0, 0, 1]
    long = finetune.Video(data / "one.mp4", ("a", "b"), seconds=7, height=720, width=1280)
    pieces = finetune.cut([long], 256 * 256, most_chunks=4, most_tokens=3 * 6 * 12 * 21)
    assert [p.chunks for p in pieces] == [3, 3, 1] and pieces[0].tokens == 3 * 6 * 12 * 21
    assert [p.captions for p in pieces] == [("a", "b", "b"), ("b", "b", "b"), ("b",)]  # the last one goes on
    with bad("more than 100 tokens: raise --tokens"):
        finetune.cut([long], 256 * 256, 4, most_tokens=100)


def test_pieces_are_as_long_as_asked_also_where_sizes_are_rounded_up(cached, model_folder, monkeypatch):
    """544x960 has more tokens than 720x720, whose area it stands for."""
    clip = finetune.Video(cached / "one.mp4", ("a red",), seconds=4, height=720, width=1280)
    monkeypatch.setattr(finetune, "find_videos", lambda *_: [clip])
    for seconds, flags in ((1, []), (2, []), (2, ["--tokens", 3 * 12240])):
        flags = command_line(
            model_folder, cached, "a.safetensors", "--size", "720x720", "--seconds", seconds, *flags
        )
        args = finetune.parser().parse_args(flags)
        args.vae, args.t5 = model_folder.parent / "vae", model_folder.parent / "t5"
        batches = finetune.look_at_data(args, build(lambda: magi.DiT(FOLDER_DIT), model_folder))
        assert [(p.chunks, p.height, p.width) for p in batches.pieces] == [(seconds, 544, 960)] * (
            4 // seconds
        )
        assert batches.most_tokens == (args.tokens or seconds * 12240)


@pytest.mark.parametrize(
    ("shown", "size"),
    [((720, 1280), (192, 336)), ((1280, 720), (336, 192)), ((480, 640), (224, 288)), ((700, 720), (256, 256)),
     ((100, 180), (96, 176)), ((10, 500), (48, 96))],
)  # fmt: skip
def test_sizes_keep_the_aspect_and_the_area_and_enlarge_little(shown, size):
    assert finetune.bucket_size(*shown, 256 * 256) == size


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_captions_may_stand_in_one_file(data, tmp_path, kind):
    rows = [{"file_name": name, "text": text.split("\n")} for name, text in CAPTIONS.items()]
    for name in CAPTIONS:
        (tmp_path / name).symlink_to(data / name)
    if kind == "jsonl":
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        lines = [f'{row["file_name"]},"{CAPTIONS[row["file_name"]]}"' for row in rows]
        (tmp_path / "metadata.csv").write_text("\ufefffile_name,text\n" + "\n".join(lines))
    found = finetune.read_captions(tmp_path)
    assert found == {tmp_path / name: tuple(text.split("\n")) for name, text in CAPTIONS.items()}
    (tmp_path / "one.mp4").unlink()
    with bad("row 1 of the metadata in .*: 'one.mp4' does not exist"):
        finetune.read_captions(tmp_path)


def test_an_empty_line_is_a_second_without_a_caption():
    assert (
        finetune.as_captions("a\n\n b\n\n \n") == finetune.as_captions(["a", " ", "b", ""]) == ("a", "", "b")
    )
    assert finetune.as_captions("\na") == ("", "a") and finetune.as_captions("\n\n") == ("",)
    assert finetune.as_captions([]) == finetune.as_captions("") == ("",)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"file_name": "b.mp4", "text": 3}', "row 2 .*: text is 3, and must be a string or a list"),
        ('{"file_name": "b.mp4", "text": ["a", null]}', "row 2 .*: text is .'a', None., and must be"),
        ('{"file_name": ["b.mp4"], "text": "a"}', "row 2 .*: file_name is .'b.mp4'., and must be a string"),
        ('{"file_name": "./a.mp4", "text": "a"}', "row 2 .*: './a.mp4' is in a row above"),
        ('{"file_name": "b.mp4"}', "row 2 .* lacks file_name or text"),
        ('"b.mp4"', "row 2 .* lacks file_name or text"),
    ],
)
def test_a_bad_row_is_named(tmp_path, capsys, row, words):
    for name in ("a", "b"):
        (tmp_path / f"{name}.mp4").touch()
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.mp4", "text": "a"}\n' + row)
    with bad(words):
        finetune.read_captions(tmp_path)
    assert finetune.read_captions(tmp_path, skip_bad=True) == {tmp_path / "a.mp4": ("a",)}
    assert capsys.readouterr().err.startswith("skipped: row 2")


def test_a_caption_may_have_any_character_that_json_allows(tmp_path):
    """Python's splitlines ends a line at some of them, where JSON does not."""
    (tmp_path / "a.mp4").touch()
    captions = ["a red\u2028ball", "a\u0085\u2029blue one"]
    row = json.dumps({"file_name": "a.mp4", "text": captions}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(f"\ufeff{row}\r\n\n", encoding="utf-8")
    assert finetune.read_captions(tmp_path) == {tmp_path / "a.mp4": tuple(captions)}


def test_tables_with_a_surplus_column_or_without_rows(tmp_path):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "metadata.csv").write_text("file_name,text\na.mp4,red, and blue\n")
    with bad("row 1 .* too many columns: put a text with commas in quotes"):
        finetune.read_captions(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    with bad("has no rows"):
        finetune.read_captions(tmp_path)


def test_which_files_of_a_folder_are_clips(tmp_path, capsys):
    """Those that cameras and the web have; what is hidden and what a run has made is not."""
    for folder in ("data/sub", "data/.cache", "data/my.work/samples", "data/samples"):
        (tmp_path / folder).mkdir(parents=True)
    data = tmp_path / "data"
    names = ["a.3gp", "b.mts", "c.M2TS", "d.wmv", "e.flv", "f.apng", "g.ogv", "samples/h.mp4", "sub/i.mp4"]
    for name in names:
        (data / name).touch()
        (data / name).with_suffix(".TXT" if name == "sub/i.mp4" else ".txt").write_text(name)
    for name in ("._a.mp4", ".cache/a.mp4", "my.work/samples/000250.mp4", "my.work/settings.json"):
        (data / name).touch()
    assert finetune.read_captions(data) == {data / name: (name,) for name in names}
    (data / "a.txt").unlink()
    with bad("'a.3gp' has no caption: write it to 'a.txt' .* --skip_bad leaves such clips out"):
        finetune.read_captions(data)
    assert list(finetune.read_captions(data, skip_bad=True)) == [data / name for name in names[1:]]
    assert capsys.readouterr().err.startswith("skipped: clip 'a.3gp' has no caption")
    with bad("is a file: give the folder"):
        finetune.read_captions(data / "b.txt")


def test_what_was_seen_of_good_clips_is_kept_when_one_is_bad(data, tmp_path, monkeypatch):
    for name in (*CAPTIONS, "z.mp4"):
        source = data / min(name, "two.mp4")
        (tmp_path / name).symlink_to(source)
        (tmp_path / name).with_suffix(".txt").write_text("a")
    (tmp_path / "z.mp4").unlink()
    (tmp_path / "z.mp4").write_bytes(b"no video")
    with bad("z.mp4"):
        finetune.find_videos(tmp_path, tmp_path / "cache")
    write_clip(tmp_path / "z.mp4", 30)
    looked_at, probe = [], finetune.probe
    monkeypatch.setattr(finetune, "probe", lambda path: looked_at.append(path.name) or probe(path))
    assert len(finetune.find_videos(tmp_path, tmp_path / "cache")) == 3 and looked_at == ["z.mp4"]


def test_a_t5_folder_may_hold_folders(tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"t5")
    before = finetune.Cache(tmp_path, None, tmp_path).t5_key
    (tmp_path / ".cache").mkdir()
    assert finetune.Cache(tmp_path, None, tmp_path).t5_key == before


def test_what_is_cached_is_what_the_sampler_would_encode(cached, model_folder):
    vae, t5 = magi.load_vae(model_folder.parent / "vae"), magi.T5(model_folder.parent / "t5", 16)
    cache = finetune.Cache(
        cached.parent / f"{cached.name}.cache", model_folder.parent / "vae", model_folder.parent / "t5"
    )
    piece = finetune.cut(finetune.find_videos(cached, cache.folder), 32 * 48, 2)[1]
    latents, image = cache.latents(piece)
    video = media.fit_frames(read_frames(cached / "two.mp4")[:48], 32, 48)
    with torch.no_grad():
        whole, fourth = vae.encode(video)[0], vae.encode(video[:, :, 3:4])[0]
    assert relative(latents, whole * magi.SCALE_FACTOR) < 0.01  # bf16
    assert relative(image, fourth * magi.SCALE_FACTOR) < 0.01 and latents.shape == (16, 12, 4, 6)
    text, mask = cache.text(piece.captions[0], 16)
    expected, expected_mask = t5([piece.captions[0]])
    assert torch.equal(mask, expected_mask[0]) and relative(text, expected[0]) < 0.01


def test_a_second_run_encodes_nothing(cached, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(magi, "load_vae", lambda *_: pytest.fail("the VAE is not needed"))
    monkeypatch.setattr(magi, "T5", lambda *_, **__: pytest.fail("T5 is not needed"))
    assert train(model_folder, cached, tmp_path / "a.safetensors", "--steps", 1)[0] == 0


def test_two_runs_fill_a_cache_together(cached, model_folder, tmp_path, monkeypatch):
    """One met the other's unfinished files, and failed. Now it waits, and encodes what is left."""
    pieces = finetune.cut(finetune.find_videos(cached, tmp_path), 32 * 48, 1)
    encode, encoded, runs = finetune.encode_piece, [], []

    def fill() -> list[finetune.Piece]:
        cache = finetune.Cache(tmp_path, model_folder.parent / "vae", model_folder.parent / "t5")
        made = cache.encode_pieces(pieces, "cpu", skip_bad=False)
        cache.encode_captions(["a red"], "cpu", 16)
        return made

    def encode_while_another_run_begins(vae, piece):
        encoded.append(piece)
        if not runs:
            runs.append(others.submit(fill))
            concurrent.futures.wait(runs, timeout=0.5)  # it cannot end before this piece is there
        return encode(vae, piece)

    monkeypatch.setattr(finetune, "encode_piece", encode_while_another_run_begins)
    with concurrent.futures.ThreadPoolExecutor() as others:
        assert fill() == pieces == runs[0].result(timeout=60)
    assert sorted(encoded, key=pieces.index) == pieces and len(pieces) == 3
    assert not [file for file in tmp_path.rglob(".*") if file.is_file()]


def test_the_cache_lies_beside_the_clips_however_they_are_given(cached, model_folder, tmp_path, monkeypatch):
    (tmp_path / "data" / "sub").mkdir(parents=True)
    for file in cached.iterdir():
        (tmp_path / "data" / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path / "data" / "sub")
    flags = ["--model", model_folder, "--data", "..", "--out", tmp_path / "a.safetensors", "--plan"]
    code, _, err = run_main(finetune.main, "lora", *map(str, flags))
    assert code == 0 and (tmp_path / "data.cache" / "videos.json").is_file(), err
    assert not [*(tmp_path / "data" / "sub").iterdir()]


def test_a_changed_clip_is_encoded_again(tmp_path):
    cache, file = finetune.Cache(tmp_path, None, None), tmp_path / "a.mp4"
    cache.vae_key = "vae"
    file.touch()
    piece = finetune.Piece(file, 0, ("a",), 32, 48)
    before = cache.latent_file(piece)
    assert cache.latent_file(finetune.Piece(file, 0, ("other",), 32, 48)) == before
    assert cache.latent_file(finetune.Piece(file, 1, ("a",), 32, 48)) != before
    os.utime(file, (1, 1))
    assert cache.latent_file(piece) != before


def batches(cached, model_folder, **more) -> finetune.Batches:
    parent = model_folder.parent
    cache = finetune.Cache(cached.parent / f"{cached.name}.cache", parent / "vae", parent / "t5")
    pieces = finetune.cut(finetune.find_videos(cached, cache.folder), 32 * 48, 2)
    table = load_file(model_folder / "special_tokens.safetensors")
    sampler = magi.SamplerConfig(height=32, width=48)
    return finetune.Batches(
        cache, pieces, sampler, table, **{"length": 16, "most_tokens": 144, "seed": 0} | more
    )


def test_batches_depend_on_their_number_alone(cached, model_folder):
    made = batches(cached, model_folder)
    first, other, again = made(3, "cpu"), made(4, "cpu"), made(3, "cpu")
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert first["latents"].shape != other["latents"].shape or not torch.equal(
        first["latents"], other["latents"]
    )
    sizes = set()
    for i in range(30):
        batch = made(i, "cpu")
        B, n = batch["text"].shape[:2]
        assert batch["latents"].shape == (B, 16, 6 * n, 4, 6) and B * n * 36 <= 144
        sizes.add((B, n))
    assert sizes == {(4, 1), (2, 2)}


def test_texts_carry_their_special_tokens(model_folder):
    table = load_file(model_folder / "special_tokens.safetensors")
    caption = torch.randn(16, 32), (torch.arange(16) < 3).long()
    empty = torch.zeros(16, 32), torch.zeros(16).long()
    text, mask = finetune.chunk_texts([caption, caption, empty], 9, magi.SamplerConfig(), table)
    for i, left in enumerate((8, 8)):  # 9 and 8 chunks are left; the tokens end at 8
        assert torch.equal(text[i, 0], table[f"duration_token_{left}"][0]) and torch.equal(
            text[i, 1], table["hq_token"][0]
        )
        assert torch.equal(text[i, 2:5], caption[0][:3]) and mask[i].sum() == 5
    assert not mask[2].any()  # an empty caption is null text


# ------------------------------------------------------------------------------------------------ refusals


@pytest.fixture
def no_weights(monkeypatch):
    for module, name in ((parallel, "load_dit"), (magi, "load_vae"), (magi, "T5")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("weights are loaded"))


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--sample-evry", 3], "did you mean --sample_every?"),
        (["clips2"], "unrecognized arguments: clips2; see --help"),
        (["--seed", 1, "--seed", 2], "--seed is given twice"),
        (["--steps", 0], "'0' is not a whole number of at least 1"),
    ],
)
def test_flags_are_checked_as_those_of_sample(flags, words, tmp_path):
    line = command_line(tmp_path, tmp_path, tmp_path / "a", *flags)
    assert_one_line(run_main(finetune.main, *line), words)


def test_bad_clips_are_named_before_anything_is_loaded(model_folder, tmp_path, no_weights):
    data, out = tmp_path / "data", tmp_path / "a.safetensors"
    refused(train(model_folder, data, out), "data' does not exist")
    data.mkdir()
    refused(train(model_folder, data, out), "no videos in", "a.mp4")
    write_clip(data / "short.mp4", 20)
    refused(train(model_folder, data, out), "'short.mp4' has no caption", "short.txt")
    (data / "short.txt").write_text("a red")
    refused(train(model_folder, data, out), "'short.mp4' has 20 frames", "24", "--skip_bad")
    code, _, err = train(model_folder, data, out, "--skip_bad")
    assert code == 2 and "skipped: clip 'short.mp4'" in err and "error: no clip of" in err
    (data / "short.mp4").write_bytes(b"no video")
    refused(train(model_folder, data, out), "short.mp4", "--skip_bad")
    write_clip(data / "short.mp4", 30)
    (data / "short.txt").write_text("a red ball bounces and bounces and bounces")
    refused(train(model_folder, data, out), "caption of clip 'short.mp4' has", "the model takes 15")
    long = (data / "short.txt").read_text()
    (data / "short.txt").write_text("a red")
    refused(train(model_folder, data, out, "--sample_prompt", long), "--sample_prompt has", "takes 15")


def test_bad_clips_are_skipped_if_asked(cached, model_folder, tmp_path, no_weights):
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.mp4").write_bytes(b"no video")
    for name in ("one", "long", "silent"):
        (data / f"{name}.mp4").symlink_to(cached / "one.mp4")
    for name in ("a", "one"):
        (data / f"{name}.txt").write_text("a red")
    (data / "long.txt").write_text("a red ball bounces and bounces and bounces")
    code, _, err = train(model_folder, data, tmp_path / "a.safetensors", "--skip_bad", "--plan")
    assert code == 0 and "skipped: cannot read video" in err and "a.mp4" in err and "1 clips, 1 s" in err
    assert "skipped: the caption of clip 'long.mp4' has" in err and "skipped: clip 'silent.mp4' has no" in err


def test_models_and_outputs_that_cannot_be(cached, model_folder, tmp_path, no_weights, monkeypatch):
    out = tmp_path / "a.safetensors"
    refused(train(model_folder, cached, tmp_path / "a"), "a LoRA is a file")
    refused(train(model_folder, cached, out, command="full"), "all weights is a folder")
    refused(train(tmp_path / "none", cached, out), "no model in")
    refused(train(model_folder, cached, out, "--rank", 0), "use the command full")
    with monkeypatch.context() as patch:
        patch.setattr(finetune.importlib.util, "find_spec", lambda name: None)
        refused(train(model_folder, cached, out, "--optimizer", "adamw8bit"), "pip install torchao")
    refused(train(model_folder, cached, out, "--t5", tmp_path), "spiece.model", "--t5")
    refused(train(model_folder, cached, out, "--vae", tmp_path), "no VAE in", "--vae")
    assert not (tmp_path / "a.work").exists()
    wide = write_t5(tmp_path / "t5", width=2 * FOLDER_DIT.text_dim)
    words = f"has width {2 * FOLDER_DIT.text_dim}, this model needs {FOLDER_DIT.text_dim}"
    refused(train(model_folder, cached, out, "--t5", wide, "--plan"), words)
    other_vae = shutil.copytree(model_folder.parent / "vae", tmp_path / "vae")
    config = json.loads((other_vae / "config.json").read_text())
    config["vae"]["embed_dim"] *= 2
    (other_vae / "config.json").write_text(json.dumps(config))
    refused(train(model_folder, cached, out, "--vae", other_vae, "--plan"), str(other_vae))
    broken = shutil.copytree(model_folder.parent / "t5", tmp_path / "broken")
    (broken / "spiece.model").write_bytes(b"no tokenizer")
    refused(train(model_folder, cached, out, "--t5", broken, "--plan"), "cannot read tokenizer", "damaged")
    out.write_bytes(b"mine")
    refused(train(model_folder, cached, out), "exists and was not made by this run")
    assert out.read_bytes() == b"mine"
    training.save_lora(
        training.add_lora(magi.load_dit(model_folder), 2), tmp_path / "d.safetensors", {"command": "distill"}
    )
    wide = write_model(tmp_path / "wide", window=16, num_steps=64)  # it failed at the first of 8 steps
    beside = ("--vae", model_folder.parent / "vae", "--t5", model_folder.parent / "t5")
    run = train(wide, cached, tmp_path / "e", *beside, command="distill")
    refused(run, "cannot be distilled into 8 steps, no multiple of its window 16 and of its 4 kv_")
    merged_first = ("--lora", tmp_path / "d.safetensors")
    refused(train(model_folder, cached, tmp_path / "b.safetensors", *merged_first), "--lora) is distilled")
    for part, change, words in (
        ("dit", {"fp8": True}, "fp8 weights"),
        ("sampler", {"distilled": True}, "is distilled"),
    ):
        config = json.loads((model_folder / "config.json").read_text())
        config[part] |= change
        (tmp_path / "config.json").write_text(json.dumps(config))
        refused(train(tmp_path, cached, tmp_path / "b.safetensors"), words)


def test_ways_to_save_memory_that_do_not_go_together(
    cached, model_folder, trained_lora, tmp_path, no_weights, monkeypatch
):
    out, folder = tmp_path / "a.safetensors", tmp_path / "a"
    disk = ("--stream", "disk")
    refused(train(model_folder, cached, folder, *disk, command="full"), "--stream is for a LoRA")
    refused(train(model_folder, cached, out, *disk, "--keep_activations"), "leave one of them out")
    refused(train(model_folder, cached, out, *disk, "--lora", trained_lora), "training.py merge")
    monkeypatch.setattr(parallel, "ranks", lambda: 2)
    monkeypatch.setattr(parallel, "agreed", lambda make: make)
    refused(train(model_folder, cached, out, "--accumulate", 3), "--accumulate 3", "a multiple of 2")
    refused(train(model_folder, cached, out, *disk), "--stream is for one GPU")
    refused(train(model_folder, cached, out, "--lora", trained_lora), "training.py merge")
    monkeypatch.setattr(finetune.importlib.util, "find_spec", lambda name: True)
    several = ("--optimizer", "adamw8bit")
    refused(train(model_folder, cached, folder, *several, command="full"), "adamw8bit cannot train all")


# ------------------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def finished(cached, model_folder):
    """A run of four steps."""
    out = cached.parent / "whole.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "plot_loss", plot_loss)
        code, _, err = train(model_folder, cached, out, "--sample_every", 3, "--sample_seconds", 1)
    assert code == 0, err
    return out


def test_a_run_leaves_a_lora_with_its_story_a_log_and_samples(finished, model_folder):
    about = training.lora_metadata(finished)
    assert about["base_model"] == model_folder.name and about["rank"] == about["alpha"] == "2"
    assert about["steps"] == "4" and json.loads(about["prompts"]) == ["a red", "a blue"]
    dit = training.load_lora(magi.load_dit(model_folder), finished)
    assert sum(lora.up.abs().sum() for lora in training.loras(dit)) > 0
    work = finished.parent / "whole.work"
    header, *rows = [line.split(",") for line in (work / "train.csv").read_text().splitlines()]
    assert header == ["step", "loss", "clips", "chunks", "s/step"]
    assert [row[0] for row in rows] == list("0123") and all(0 < float(row[1]) < 10 for row in rows)
    assert (work / "train.png").stat().st_size > 1000
    samples = sorted((work / "samples").iterdir())
    assert [sample.name for sample in samples] == ["000003.mp4", "000004.mp4"]
    assert read_frames(samples[0]).shape == (24, 32, 48, 3)


class Killed(BaseException):
    pass


def losses(out) -> list[str]:
    rows = training.read_log(out.parent / f"{out.stem}.work" / "train.csv", before=9)
    return [loss for _, loss, *_ in rows]


@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_a_run_that_ended_early_goes_on_to_the_same_result(
    finished, cached, model_folder, tmp_path, monkeypatch, how
):
    """Killed in its fourth step, it goes on from the second; after Ctrl-C in the third, nothing is computed
    again, and what was trained so far can be used."""
    out, step = tmp_path / "a.safetensors", training.AdamW.step
    calls = []

    def stop(self):
        calls.append(1)
        if how == "killed" and len(calls) == 4:
            raise Killed
        step(self)
        if how == "interrupted" and len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(training.AdamW, "step", stop)
        if how == "killed":
            with pytest.raises(Killed):
                train(model_folder, cached, out)
            assert not out.exists() and len(losses(out)) == 3
        else:
            code, _, err = train(model_folder, cached, out)
            assert code == 130 and "stopped after step 3 of 4" in err and "the same command goes on" in err
            assert training.lora_metadata(out)["steps"] == "3"
            training.load_lora(magi.load_dit(model_folder), out)
        refused(
            train(model_folder, cached, out, "--lr", 1), "began with other settings: lr (was None, is 1.0)"
        )
        monkeypatch.chdir(model_folder)
        model_folder, cached = Path("../base"), Path(os.path.relpath(cached))  # the same, spelled otherwise
        calls[:] = [0] * 10
        assert train(model_folder, cached, out)[0] == 0
    assert len(calls) == 10 + (2 if how == "killed" else 1)
    whole, parts = load_file(finished), load_file(out)
    assert all(torch.equal(whole[name], parts[name]) for name in whole) and losses(out) == losses(finished)


def test_two_runs_do_not_share_a_folder(cached, model_folder, tmp_path):
    (tmp_path / "a.work").mkdir()
    with finetune.outputs.locked(tmp_path / "a.work"):
        refused(train(model_folder, cached, tmp_path / "a.safetensors"), "another run is writing")


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_what_was_there(
    cached, model_folder, tmp_path, monkeypatch
):
    out, loss, calls = tmp_path / "a.safetensors", training.flow_matching_loss, []

    def broken(*args, **kwargs):
        calls.append(1)
        return loss(*args, **kwargs) * (math.nan if len(calls) == 4 else 1)

    monkeypatch.setattr(training, "flow_matching_loss", broken)
    advice = "a lower --lr with a new --work, or end with --steps 2: so many are in"
    for before in (0, 2):  # the second time it goes on, and meets the same
        calls[:] = [1] * before
        code, _, err = train(model_folder, cached, out)
        assert code == 2 and "the loss of step 3 is nan" in err and advice in err and "train.pt" in err
    assert torch.load(tmp_path / "a.work" / "train.pt")["step"] == 2 and not out.exists()
    assert train(model_folder, cached, out, "--steps", 2)[0] == 0
    assert training.lora_metadata(out)["steps"] == "2" and len(losses(out)) == 2
    calls[:] = [0] * 3
    code, _, err = train(model_folder, cached, tmp_path / "b.safetensors")
    assert code == 2 and "the loss of step 0 is nan" in err and "new --work\n" in err


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate 2 GiB"), "Tried to allocate 2 GiB"),
        (MemoryError(), "--stream cpu"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] . can't allocate memory"), "alloc_cpu"),
    ],
)
def test_out_of_memory_is_one_line(cached, model_folder, tmp_path, monkeypatch, error, words):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(training, "flow_matching_loss", full)
    code, _, err = train(model_folder, cached, tmp_path / "a.safetensors")
    last = err.splitlines()[-1]
    assert code == 1 and last.startswith("error: out of memory") and words in last, err
    assert all(flag in last for flag in ("--size", "--seconds", "--tokens", "--stream"))
    with pytest.raises(RuntimeError, match="a mistake"):
        error = RuntimeError("a mistake")
        train(model_folder, cached, tmp_path / "a.safetensors")


def test_a_full_disk_is_one_line(cached, model_folder, tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    def full_too(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    out = tmp_path / "a.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        code, _, err = train(model_folder, cached, out)
        assert code == 2 and "train.pt', is the disk full? What was saved before is kept" in err
        assert err.splitlines()[-1].startswith("error: cannot write")
    with monkeypatch.context() as patch:
        patch.setattr(finetune.outputs, "save_file", full_too)
        code, _, err = train(model_folder, cached, out)
        assert code == 2 and err.splitlines()[-1].startswith(
            f"error: cannot write {str(out)!r}: Error while"
        ), err
    assert train(model_folder, cached, out)[0] == 0


def test_ctrl_c_twice_stops_within_a_step(cached, model_folder, tmp_path, monkeypatch):
    def twice(self):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        types.SimpleNamespace()  # the handler has run by now

    monkeypatch.setattr(training.AdamW, "step", twice)
    code, _, err = train(model_folder, cached, tmp_path / "a.safetensors")
    assert code == 130 and err.splitlines()[-1].startswith("stopped at once, the steps since"), err


def test_a_backend_that_cannot_be_used_is_refused_before_weights(
    cached, model_folder, tmp_path, no_weights, monkeypatch
):
    def refuse(backend, device):
        raise ValueError(f"backend {backend!r} needs an NVIDIA GPU")

    monkeypatch.setattr(magi, "get_ops", refuse)
    refused(train(model_folder, cached, tmp_path / "a.safetensors", "--backend", "triton"), "'triton' needs")


@pytest.mark.parametrize("command, rank, rate", [("lora", 2, 2e-4), ("full", 0, 1e-5), ("distill", 2, 2e-4)])
def test_a_lora_learns_at_its_own_rate_whatever_it_learns(
    cached, model_folder, tmp_path, monkeypatch, command, rank, rate
):
    def caught(name, params, lr, weight_decay):
        raise ValueError(f"the rate is {lr}")

    monkeypatch.setattr(finetune, "make_optimizer", caught)
    out = tmp_path / ("a.safetensors" if rank else "a")
    flags = ["--rank", rank] if rank else []
    code, _, err = train(model_folder, cached, out, *flags, command=command)
    assert code == 2 and err.endswith(f"error: the rate is {rate}\n")


def test_a_run_with_a_folder_of_its_own_replaces_no_other_file(cached, model_folder, tmp_path, no_weights):
    """A work folder allows its own --out alone, whose folder is made before anything is trained."""
    out, mine, work = tmp_path / "new" / "z.safetensors", tmp_path / "mine.safetensors", tmp_path / "w"
    with pytest.raises(pytest.fail.Exception, match="weights are loaded"):
        train(model_folder, cached, out, "--work", work)
    assert out.parent.is_dir() and (work / "settings.json").is_file()
    mine.write_bytes(b"mine")
    refused(train(model_folder, cached, mine, "--work", work), "mine.safetensors", "was not made by this run")
    assert mine.read_bytes() == b"mine"
    out.write_bytes(b"its own")
    with pytest.raises(pytest.fail.Exception, match="weights are loaded"):
        train(model_folder, cached, out, "--work", work)


def test_a_run_whose_clips_or_encoders_changed_is_refused(
    cached, model_folder, tmp_path, no_weights, monkeypatch
):
    out, data = tmp_path / "a.safetensors", tmp_path / "data"
    data.mkdir()
    (data / "one.mp4").symlink_to(cached / "one.mp4")
    (data / "one.txt").write_text("a red")
    with pytest.raises(pytest.fail.Exception, match="weights are loaded"):
        train(model_folder, data, out)
    (tmp_path / "t5").symlink_to(model_folder.parent / "t5")  # the same by another name
    shutil.copytree(model_folder.parent / "t5", tmp_path / "other")
    with pytest.raises(pytest.fail.Exception, match="weights are loaded"):
        train(model_folder, data, out, "--t5", tmp_path / "t5")
    refused(train(model_folder, data, out, "--t5", tmp_path / "other"), "other settings: t5 (was", "other)")
    (data / "one.txt").write_text("a blue")
    refused(train(model_folder, data, out), "other settings: clips or captions have changed; choose another")


def test_a_run_of_an_older_version_goes_on(cached, model_folder, tmp_path, no_weights, monkeypatch):
    """It noted paths as they were spelled, and neither the output nor the encoders."""
    monkeypatch.chdir(cached.parent)
    line, out = (Path(os.path.relpath(model_folder)), Path(cached.name)), tmp_path / "a.safetensors"
    with pytest.raises(pytest.fail.Exception, match="weights are loaded"):
        train(*line, out)
    settings = json.loads((tmp_path / "a.work" / "settings.json").read_text())
    pieces = finetune.cut(finetune.find_videos(line[1], tmp_path), 32 * 48, 2)
    spelled = [(finetune.file_key(piece.path), piece) for piece in pieces]
    for name in ("out", "vae", "t5"):
        del settings[name]
    settings |= {"model": str(line[0]), "data": finetune.short_hash(str(spelled))}
    (tmp_path / "a.work" / "settings.json").write_text(json.dumps(settings))
    out.touch()
    with pytest.raises(pytest.fail.Exception, match="weights are loaded"):
        train(*line, out)


def test_a_run_may_write_among_its_clips(cached, model_folder, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for file in cached.iterdir():
        (data / file.name).symlink_to(file)
    flags = ("--sample_every", 1, "--sample_seconds", 1, "--cache", data / "cache")
    for steps in (1, 2):
        code, _, err = train(model_folder, data, data / "o.safetensors", *flags, "--steps", steps)
        assert code == 0 and "2 clips, 3 s" in err, err
    assert len(list((data / "o.work" / "samples").iterdir())) == 2


def test_all_weights_and_distillation_make_model_folders(cached, model_folder, tmp_path):
    for name in ("vae", "t5"):
        (tmp_path / name).symlink_to(model_folder.parent / name)
    base = magi.load_dit(model_folder).state_dict()
    for command in ("full", "distill"):
        assert train(model_folder, cached, tmp_path / command, "--steps", 2, command=command)[0] == 0
        pipe = magi.load(tmp_path / command)
        assert pipe.sampler.distilled == (command == "distill")
        moved = {k for k, v in pipe.dit.state_dict().items() if not torch.equal(v, base[k])}
        assert len(moved) > 0.9 * len(base)
        pipe = magi.load(tmp_path / command)
        frames = np.concatenate(list(pipe("a red ball", num_frames=24, num_steps=4)))
        assert frames.shape == (24, 32, 48, 3)
    lora, merged = tmp_path / "a.safetensors", tmp_path / "merged"
    assert train(model_folder, cached, lora, "--rank", 2, command="distill")[0] == 0
    training.load_lora(pipe.dit, lora)
    assert run_main(finetune.main, "merge", "--model", model_folder, "--lora", lora, "--out", merged)[0] == 0
    made = magi.read_config(merged, "sampler", magi.SamplerConfig)
    assert made == magi.read_config(tmp_path / "distill", "sampler", magi.SamplerConfig) and made.distilled


# ------------------------------------------------------------- layers one at a time, several processes


def assert_same_run(out, other) -> None:
    """The same LoRA and the same losses, bit for bit."""
    a, b = load_file(out), load_file(other)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert losses(out) == losses(other)


def test_streamed_layers_train_the_same_lora_to_the_last_bit(cached, model_folder, tmp_path, monkeypatch):
    """Layers that are there lie in a mapped file, streamed ones in memory of their own: a product of few rows
    rounds by how its numbers are aligned, so here both have memory of their own."""
    load = parallel.load_dit

    def load_copied(*args, stream, **more):
        dit = load(*args, stream=stream, **more)
        if not stream:
            copies = {k: u.clone() for k, u in dit.layers.state_dict().items()}
            dit.layers.load_state_dict(copies, assign=True)
        return dit

    monkeypatch.setattr(parallel, "load_dit", load_copied)
    outs = {source: tmp_path / f"{source}.safetensors" for source in ("none", "cpu", "disk")}
    for source, out in outs.items():
        flags = () if source == "none" else ("--stream", source, "--sample_every", 2, "--sample_seconds", 1)
        code, _, err = train(model_folder, cached, out, *flags)
        assert code == 0, err
    assert_same_run(outs["none"], outs["cpu"])
    assert_same_run(outs["none"], outs["disk"])


def test_streamed_training_holds_two_layers_and_reads_each_once_a_way(model_folder, monkeypatch):
    """Up and down: the last layer is still there when the backward begins with it, and the first one when the
    next forward does. All that is read is used, so every layer but the first was foreseen."""
    seen = worker.watch_layers(monkeypatch)
    dit = magi.load_dit(model_folder)
    streamed = parallel.Streamed(dit, "layers", model_folder, "cpu", "disk")
    training.add_lora(dit, 2)
    finetune.checkpoint_layers(dit)
    clip = torch.randn(1, 16, 6, 4, 4), torch.randn(1, 1, 16, 32), torch.ones(1, 1, 16).long()
    for _ in range(2):
        training.flow_matching_loss(dit, *clip).backward()
    streamed.thread.shutdown()
    assert [i for i, _ in seen] == [0, 1, 2, 1, 0] + [1, 2, 1, 0] + [1]
    assert {held for _, held in seen} == {1, 2}
    assert all(
        u.untyped_storage().nbytes() <= 4
        for name, u in dit.layers[1:].state_dict().items()
        if "lora" not in name
    )


@pytest.fixture(scope="module")
def alone(cached, model_folder, tmp_path_factory):
    """Command -> what one process makes of four steps of two forwards; "mixed": of a model in bfloat16."""
    root = tmp_path_factory.mktemp("alone")
    for name in ("vae", "t5"):
        (root / name).symlink_to(model_folder.parent / name)
    mixed = write_model(root / "bf16", dataclasses.replace(FOLDER_DIT, dtype="bfloat16"))
    runs = {
        "lora": (model_folder, "lora", root / "lora.safetensors"),
        "full": (model_folder, "full", root / "full"),
        "mixed": (mixed, "full", root / "mixed"),
    }
    for model, command, out in runs.values():
        code, _, err = train(model, cached, out, *SHARED, "--accumulate", 2, command=command)
        assert code == 0, err
    return runs


SHARED = ("--lr", 1e-3)


def run_commands(rank: int, size: int, folder: Path) -> None:
    """One of several processes: its exit codes and what it said -> FOLDER/commands.RANK."""
    worker.join(rank, size, folder)
    ended = [run_main(finetune.main, *words) for words in json.loads((folder / "commands.json").read_text())]
    (folder / f"commands.{rank}").write_text(json.dumps(ended))


@pytest.fixture(scope="module")
def together(alone, cached, tmp_path_factory):
    """The same by two processes, but for the ends of what one process takes part in; and what they said."""
    root = tmp_path_factory.mktemp("together")
    outs = {name: root / out.name for name, (_, _, out) in alone.items()}

    def line(name: str, *flags, accumulate: int = 2) -> list[str]:
        model, command, _ = alone[name]
        flags = (*flags, *SHARED, "--accumulate", accumulate)
        return command_line(model, cached, outs[name], *flags, command=command)

    assert run_main(finetune.main, *line("full", "--steps", 2))[0] == 0  # two processes go on with it
    commands = [
        line("lora", "--steps", 2, "--sample_every", 1, "--sample_seconds", 1),
        line("full"),
        line("mixed"),
        line("lora", accumulate=3),
    ]
    (root / "commands.json").write_text(json.dumps(commands))
    processes = worker.fork(run_commands, 2, root)
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0, 0]
    assert run_main(finetune.main, *line("lora"))[0] == 0  # one process goes on with it
    return outs, [json.loads((root / f"commands.{rank}").read_text()) for rank in range(2)]


def test_two_processes_and_one_go_on_with_each_others_runs_to_the_same_result(alone, together, model_folder):
    outs, said = together
    assert [code for code, _, _ in said[0]] == [0, 0, 0, 2] == [code for code, _, _ in said[1]]
    assert_same_run(outs["lora"], alone["lora"][2])
    for name, most in (("full", 1e-3), ("mixed", 0.5)):
        model, _, out = alone[name]
        before, a, b = (magi.load_dit(folder).state_dict() for folder in (model, out, outs[name]))
        for key in before:
            moved = a[key].float() - before[key].float()
            if moved.abs().max() > 1e-4:
                assert relative(b[key].float() - before[key].float(), moved) < most, key
        for loss, other in zip(losses(outs[name]), losses(out), strict=True):
            assert float(loss) == pytest.approx(float(other), rel=most / 50)


def test_the_first_process_speaks_and_writes_for_all(together):
    outs, (first, second) = together
    assert all(out == err == "" for _, out, err in second)
    assert "2 clips, 3 s" in first[0][2] and "wrote" in first[0][2]
    assert "--accumulate 3: 2 processes share the forwards of a step, so give a multiple of 2" in first[3][2]
    samples = sorted((outs["lora"].parent / "lora.work" / "samples").iterdir())
    assert [sample.name for sample in samples] == ["000001.mp4", "000002.mp4"]


def test_what_is_wrong_is_said_once_by_several_processes(model_folder, tmp_path):
    flags = ("--model", model_folder, "--data", "nowhere", "--out", tmp_path / "a.safetensors")
    run = run_python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2,
                     HERE / "training.py", "lora", *flags, "--device", "cpu")  # fmt: skip
    (line,) = (line for line in run.stderr.splitlines() if line.startswith("error:"))
    assert "the data folder 'nowhere' does not exist" in line


def test_large_models_are_written_in_files_with_an_index(model_folder, tmp_path):
    config = json.loads((model_folder / "config.json").read_text())
    finetune.write_model(
        tmp_path / "a", model_folder, magi.load_dit(model_folder).state_dict(), config, 50_000
    )
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 2
    a, b = magi.load_dit(tmp_path / "a").state_dict(), magi.load_dit(model_folder).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_merge_and_export_from_the_command_line(finished, model_folder, tmp_path):
    out = tmp_path / "merged"
    assert run_main(finetune.main, "merge", "--model", model_folder, "--lora", finished, "--out", out)[0] == 0
    merged = training.merge_lora(training.load_lora(magi.load_dit(model_folder), finished)).state_dict()
    assert all(torch.equal(v, merged[k]) for k, v in magi.load_dit(out).state_dict().items())
    code, said, _ = run_main(finetune.main, "export", "--lora", finished, "--out", tmp_path / "peft")
    assert (code, said) == (0, f"wrote {tmp_path / 'peft'}\n")
    assert_refused(
        sample.main,
        ["--prompt", "a", "--model", model_folder, "--lora", tmp_path / "peft"],
        "is a folder: name the file in it",
        "peft/adapter_model.safetensors'",
    )
    assert_refused(
        finetune.main,
        ["merge", "--model", model_folder, "--lora", tmp_path / "peft", "--out", tmp_path / "m"],
        "is a folder: name the file in it",
    )
    assert_refused(sample.main, ["--prompt", "a", "--model", out], "no VAE in", "(--vae)")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 2 and "layers.0.attn.q" in config["target_modules"]
    kept = magi.read_config(model_folder, "sampler", magi.SamplerConfig)
    assert magi.read_config(out, "sampler", magi.SamplerConfig) == kept


def test_an_export_replaces_nothing(trained_lora, tmp_path):
    lora, config = tmp_path / "a.safetensors", tmp_path / "adapter_config.json"
    lora.write_bytes(trained_lora.read_bytes())
    export = lambda out, style: run_main(
        finetune.main, "export", "--lora", lora, "--out", out, "--format", style
    )
    refused(export(lora, "kohya"), "a.safetensors' exists: choose another --out")
    assert lora.read_bytes() == trained_lora.read_bytes()
    config.write_text("theirs")
    refused(export(tmp_path / "b.safetensors", "peft"), "adapter_config.json' exists")
    refused(export(tmp_path, "peft"), "adapter_config.json' exists")
    assert config.read_text() == "theirs" and sorted(tmp_path.iterdir()) == [lora, config]
    assert export(tmp_path / "b.safetensors", "kohya")[0] == 0


def test_a_lora_merged_into_a_bf16_model_gives_its_videos(model_folder, tmp_path):
    """But for the rounding of its weights to bf16. sample.py runs it like any other model."""
    for name in ("vae", "t5"):
        (tmp_path / name).symlink_to(model_folder.parent / name)
    cfg = dataclasses.replace(FOLDER_DIT, dtype="bfloat16")
    model, lora, merged = (
        write_model(tmp_path / "model", cfg),
        tmp_path / "a.safetensors",
        tmp_path / "merged",
    )
    dit = training.add_lora(magi.load_dit(model), rank=2)
    for added in training.loras(dit):
        added.up.data.normal_(0, 0.1)
    training.save_lora(dit, lora)
    run = run_main(finetune.main, "merge", "--model", model, "--lora", lora, "--out", merged)
    assert run[0] == 0, run[2]
    pipe = magi.load(merged)
    kept = {name: tensor.dtype for name, tensor in load_file(model / "model.safetensors").items()}
    assert {name: tensor.dtype for name, tensor in load_file(merged / "model.safetensors").items()} == kept
    assert pipe.dit.cfg == cfg and pipe.sampler == magi.load(model).sampler
    clip = torch.randn(1, 16, 6, 4, 6), torch.full((1, 1), 0.3), torch.randn(1, 1, 16, 32)
    velocity = lambda dit: dit(*clip, torch.ones(1, 1, 16).long())
    with torch.no_grad():
        plain, loaded, made = map(velocity, (magi.load_dit(model), dit, pipe.dit))
    assert relative(made, loaded) < 0.03 and relative(plain, loaded) > 0.3
    videos = []
    for flags in (("--model", merged), ("--model", model, "--lora", lora), ("--model", model)):
        fixed = ("--prompt", "a red", "--num_frames", 4, "--out", tmp_path / "out.mp4", "--device", "cpu")
        run = run_main(sample.main, *flags, *fixed)
        assert run[0] == 0, run[2]
        videos.append(read_frames(tmp_path / "out.mp4").astype(float))
    from_merged, from_loaded, without = videos
    near, far = (np.abs(frames - from_loaded).mean() for frames in (from_merged, without))
    assert near < far / 4, (near, far)  # guidance enlarges what was rounded


def test_a_lora_is_not_merged_into_an_fp8_model(model_folder, tmp_path, no_weights, monkeypatch):
    cfg = dataclasses.replace(FOLDER_DIT, dtype="bfloat16", fp8=True)
    model, lora = write_model(tmp_path / "fp8", cfg), tmp_path / "a.safetensors"
    training.save_lora(training.add_lora(magi.DiT(cfg), rank=2), lora)
    monkeypatch.setattr(magi, "load_dit", lambda *_: pytest.fail("weights are loaded"))
    run = run_main(finetune.main, "merge", "--model", model, "--lora", lora, "--out", tmp_path / "merged")
    refused(run, "a LoRA cannot be merged into fp8 weights: merge it into the bf16 model")
    assert sorted(tmp_path.iterdir()) == [lora, model]


# ------------------------------------------------------------------------------------------ memory, optimiser


def test_checkpointed_layers_have_the_same_gradients(model_folder):
    torch.manual_seed(0)
    clip = torch.randn(2, 16, 12, 4, 4), torch.randn(2, 2, 16, 32), torch.ones(2, 2, 16).long()
    grads = []
    for prepare in (lambda dit: None, finetune.checkpoint_layers):
        dit = training.add_lora(magi.load_dit(model_folder), 2)
        torch.manual_seed(1)
        for lora in training.loras(dit):
            lora.up.data.normal_(), lora.down.data.normal_()
        prepare(dit)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda u, saved=saved: saved.append(u.nbytes) or u, lambda u: u
        ):
            loss = training.flow_matching_loss(dit, *clip, generator=torch.Generator().manual_seed(0))
        loss.backward()
        grads.append((sum(saved), [p.grad for p in dit.parameters() if p.requires_grad]))
    (plain, first), (less, second) = grads
    assert less < plain / 3 and len(first) == len(second) > 50
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(first, second, strict=True))


def test_plans_of_real_models():
    with torch.device("meta"):
        dit = magi.DiT(magi.PRESETS["4.5B-base"].dit)
    plan = lambda command, rank, tokens: planner.training_needs(dit, command, rank, tokens, 800)
    small, large = plan("lora", 16, 6 * 16 * 16), plan("lora", 16, 4 * 6 * 45 * 45)
    exact = sum(p.numel() * (4 if p.dtype == torch.float32 else 2) for p in dit.parameters())
    assert small["weights"] == exact and 8.9e9 < exact < 9e9
    assert small["activations"] < large["activations"] / 20
    assert sum(small.values()) < 14e9 and sum(plan("full", 0, 1536).values()) > 60e9
    assert plan("distill", 0, 1536)["teacher"] == exact and "teacher" not in plan("distill", 16, 1536)
    with_stream = planner.training_needs(dit, "lora", 16, 1536, 800, stream=True)
    layers = sum(p.nbytes for p in dit.layers.parameters())
    assert with_stream["weights"] == exact - layers and with_stream["layers that pass"] < layers / 10
    assert sum(with_stream.values()) < sum(small.values()) - 8e9
    alone, together = (planner.training_needs(dit, "full", 0, 1536, 800, processes=n) for n in (1, 8))
    assert alone["optimiser"] > 7 * together["optimiser"] and alone["gradients"] > 7 * together["gradients"]
    assert (
        together["activations"] == alone["activations"] == large["activations"] or together["weights"] < 2e9
    )
    said = planner.show_training({"weights": 20e9, "activations": 4e9}, 30e9)
    assert "24 GB: no, 48 GB: yes" in said and "27.9 GiB: yes" in said


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_planned_activations_are_what_autograd_keeps(rank, dtype):
    cfg = dataclasses.replace(
        FOLDER_DIT, hidden_size=128, num_heads=8, num_kv_heads=4, ffn_size=512, dtype=dtype
    )
    dit = magi.DiT(cfg)
    training.add_lora(dit, rank) if rank else dit.requires_grad_()
    weights = {p.untyped_storage().data_ptr() for p in dit.parameters()}
    kept, sizes = [], {}  # all are held, so that no two share an address

    def keep(u):
        kept.append(u)
        if (storage := u.untyped_storage()).data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return u

    clip = torch.randn(2, 16, 12, 16, 16), torch.randn(2, 2, 16, 32), torch.ones(2, 2, 16).long()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda u: u):
        training.flow_matching_loss(dit, *clip)
    command, tokens, text = "lora" if rank else "full", 2 * 2 * 6 * 64, 2 * 2 * 16
    plan = planner.training_needs(magi.DiT(cfg), command, rank, tokens, text, keep_activations=True)
    assert 0.9 < plan["activations"] / sum(sizes.values()) < 1.3


def test_adamw_is_pytorchs_in_float32():
    torch.manual_seed(0)
    made = []
    for kind in (training.AdamW, torch.optim.AdamW):
        generator = torch.Generator().manual_seed(1)
        weight = torch.nn.Parameter(torch.ones(4, 3))
        optimizer = kind([weight], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
        for _ in range(5):
            weight.grad = torch.randn(4, 3, generator=generator)
            optimizer.step()
        made.append(weight.detach())
    torch.testing.assert_close(*made)


def test_small_updates_of_bf16_weights_add_up_and_a_checkpoint_keeps_them():
    def start():
        weight = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
        return weight, training.AdamW([weight], lr=1e-4, weight_decay=0)

    def walk(weight, optimizer, steps):
        for _ in range(steps):
            weight.grad = torch.ones_like(weight)
            optimizer.step()

    weight, optimizer = start()
    walk(weight, optimizer, 200)
    assert abs(weight.float().mean() - 0.98) < 0.003  # by itself bf16 would stay at 1: its step is 0.004
    again, other = start()
    walk(again, other, 77)
    state = {"weight": again.data.clone(), "optimizer": other.state_dict()}
    again, other = start()
    again.data = state["weight"]
    other.load_state_dict(state["optimizer"])
    assert other.state[again]["mean"].dtype == torch.float32
    walk(again, other, 123)
    assert torch.equal(again, weight) and torch.equal(
        other.state[again]["lost"], optimizer.state[weight]["lost"]
    )


def test_accumulation_is_one_large_step(tmp_path):
    def run(name, accumulate, loss):
        model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 1)})
        with torch.no_grad():
            model["a"].weight.fill_(1), model["a"].bias.fill_(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        training.fit(
            name, model, lambda i: (loss(model, i), {}), 2, [optimizer], tmp_path, accumulate=accumulate
        )
        return model["a"].weight.detach()

    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    half = lambda model, i: model["a"](x[2 * i : 2 * i + 2]).square().mean()
    whole = lambda model, i: model["a"](x[4 * i : 4 * i + 4]).square().mean()
    torch.testing.assert_close(run("half", 2, half), run("whole", 1, whole))


STAND_IN = '''
"""What finetune.py uses of torchao.optim, whose AdamW8bit takes a rate in a tensor alone."""

import torch


class AdamW8bit(torch.optim.AdamW):
    made = []

    def __init__(self, params, lr, betas, weight_decay, bf16_stochastic_round):
        super().__init__(params, lr, betas, weight_decay=weight_decay)
        self.made.append((len(params), lr, betas, weight_decay, bf16_stochastic_round))

    def add_param_group(self, group):
        super().add_param_group(group)
        self.param_groups[-1]["lr"] = torch.tensor(self.param_groups[-1]["lr"])

    def step(self):
        assert all(torch.is_tensor(group["lr"]) for group in self.param_groups)
        super().step()
'''


@pytest.fixture
def torchao(tmp_path, monkeypatch):
    """A stand-in for torchao.optim: the package is not installed here, and compiles for minutes on a CPU."""
    (tmp_path / "packages" / "torchao").mkdir(parents=True)
    (tmp_path / "packages" / "torchao" / "optim.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    names = [name for name in sys.modules if name.partition(".")[0] == "torchao"]
    installed = {name: sys.modules.pop(name) for name in names}
    yield importlib.import_module("torchao.optim")
    for name in ("torchao", "torchao.optim"):
        del sys.modules[name]
    sys.modules.update(installed)


def test_adamw_of_8_bits_trains_and_goes_on(torchao, cached, model_folder, tmp_path, monkeypatch):
    """Killed in its fourth step, a run goes on from the second to the same LoRA. (With torchao 0.18 itself,
    on a CPU, it did so too, for a LoRA and for all weights in bf16.)"""
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    flags = ("--optimizer", "adamw8bit", "--lr", 1e-3)
    assert train(model_folder, cached, whole, *flags)[0] == 0
    step, calls = torchao.AdamW8bit.step, []

    def stop(self):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        step(self)

    monkeypatch.setattr(torchao.AdamW8bit, "step", stop)
    with pytest.raises(Killed):
        train(model_folder, cached, parts, *flags)
    assert train(model_folder, cached, parts, *flags)[0] == 0 and len(calls) == 4 + 2
    assert_same_run(whole, parts)
    factors = len(load_file(whole))
    assert torchao.AdamW8bit.made == 3 * [(factors, 1e-3, (0.9, 0.95), 0.0, True)]
    assert any(up.any() for name, up in load_file(whole).items() if name.endswith(".up"))


def test_adamw_of_8_bits_needs_torchao(cached, model_folder, tmp_path, no_weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)  # as if it were not installed
    run = train(model_folder, cached, tmp_path / "a.safetensors", "--optimizer", "adamw8bit")
    refused(run, "--optimizer adamw8bit needs torchao: pip install torchao, or use adamw")
    assert not [*tmp_path.iterdir()]


# ------------------------------------------------------------------------------------ LoRAs of other programs


@pytest.fixture(scope="module")
def trained_lora(tmp_path_factory, model_folder):
    torch.manual_seed(0)
    dit = training.add_lora(magi.load_dit(model_folder), rank=3)
    for lora in training.loras(dit):
        lora.up.data.normal_()
    file = tmp_path_factory.mktemp("lora") / "ours.safetensors"
    training.save_lora(dit, file, {"base_model": "me"})
    return file


def weights(dit: magi.DiT) -> dict[str, torch.Tensor]:
    """What each layer adds to its output, as one matrix."""
    layers = training.lora_targets(dit).items()
    return {
        name: layer.lora.scale * layer.lora.up @ layer.lora.down
        for name, layer in layers
        if hasattr(layer, "lora")
    }


def added(model_folder, *files_and_scales) -> dict[str, torch.Tensor]:
    dit = magi.load_dit(model_folder)
    for file, scale in files_and_scales:
        training.load_lora(dit, file, scale)
    return weights(dit)


@pytest.mark.parametrize("style", [*training.EXPORT_NAMES])
def test_an_exported_lora_is_the_same_lora(trained_lora, model_folder, tmp_path, style):
    training.export_lora(trained_lora, tmp_path / "out.safetensors", style)
    assert not any(".lora.down" in name for name in load_file(tmp_path / "out.safetensors"))
    a, b = added(model_folder, (trained_lora, 1)), added(model_folder, (tmp_path / "out.safetensors", 1))
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k]) for k in a)
    assert training.lora_metadata(tmp_path / "out.safetensors")["base_model"] == "me"


def test_alpha_scales_wherever_it_stands(model_folder, tmp_path):
    layer, (n_out, n_in) = "layers.1.attn.q", (64, 32)
    down, up = torch.randn(4, n_in), torch.randn(n_out, 4)
    pair = lambda name, a, b: {name.format(a): down, name.format(b): up}
    peft = pair("base_model.model.layers.1.attn.q.lora_{}.weight", "A", "B")
    config = tmp_path / "adapter_config.json"
    cases = {
        "nothing": (peft, {}, 1),
        "config": (peft, {"r": 4, "lora_alpha": 8}, 2),
        "square root": (peft, {"r": 4, "lora_alpha": 8, "use_rslora": True}, 4),
        "pattern": (peft, {"r": 4, "lora_alpha": 8, "alpha_pattern": {"attn.q": 2}}, 0.5),
        "two patterns": (peft, {"r": 4, "alpha_pattern": {"attn.q": 2, "q": 16}}, 0.5),
        "another's pattern": (peft, {"r": 4, "lora_alpha": 8, "alpha_pattern": {"attn.k": 2}}, 2),
        "tensor": (pair("lora_unet_layers_1_attn_q.lora_{}.weight", "down", "up")
                   | {"lora_unet_layers_1_attn_q.alpha": torch.tensor(2.0)}, {}, 0.5),
        "diffusers": (pair("transformer.layers.1.attn.q.lora.{}.weight", "down", "up"), {}, 1),
        "comfy": (pair("diffusion_model.layers.1.attn.q.lora_{}.weight", "A", "B"), {}, 1),
    }  # fmt: skip
    for name, (tensors, about, factor) in cases.items():
        file = tmp_path / "adapter_model.safetensors"
        save_file(tensors, file)
        config.unlink(missing_ok=True)
        if about:
            config.write_text(json.dumps(about))
        found = added(model_folder, (file, 1))
        assert found.keys() == {layer}, name
        assert torch.allclose(found[layer], factor * up @ down, atol=1e-4), name
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 12})}
    save_file(peft, tmp_path / "b.safetensors", header)
    assert torch.allclose(
        added(model_folder, (tmp_path / "b.safetensors", 1))[layer], 3 * up @ down, atol=1e-4
    )


def test_loras_add_up_each_with_its_scale(trained_lora, model_folder, tmp_path):
    layer = "layers.0.ffn.fc1"
    tensors = {f"{layer}.lora_A.weight": torch.randn(5, 32), f"{layer}.lora_B.weight": torch.randn(64, 5)}
    save_file(tensors, tmp_path / "b.safetensors")
    a, b = added(model_folder, (trained_lora, 1)), added(model_folder, (tmp_path / "b.safetensors", 1))
    for order in (1, -1):
        both = added(model_folder, *[(trained_lora, 0.5), (tmp_path / "b.safetensors", -2)][::order])
        for name in a:
            assert torch.allclose(both[name], 0.5 * a[name] - 2 * b.get(name, 0), atol=1e-5), name


def test_files_of_other_methods_and_models_are_named(model_folder, tmp_path):
    with torch.device("meta"):
        dit = magi.DiT(FOLDER_DIT)
    down, up = torch.zeros(2, 32), torch.zeros(64, 2)
    cases = {
        "LoHa": {"layers.0.attn.q.hada_w1_a": down},
        "DoRA": {"layers.0.attn.q.lora_A.weight": down, "layers.0.attn.q.lora_B.weight": up,
                 "layers.0.attn.q.lora_magnitude_vector": torch.ones(64)},
        "another model: this one has no layer 'blocks.0.self_attn.q'":
            {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": down},
        "another model: it lacks 1 tensor": {"layers.0.attn.q.lora_A.weight": down},
        "other shapes": {"layers.0.attn.q.lora_A.weight": torch.zeros(2, 33),
                         "layers.0.attn.q.lora_B.weight": up},
        "is no LoRA": {"layers.0.attn.q.weight": up},
        "is no LoRA: it has 1": {"model.diffusion_model.layers.0.attn.q.weight": up},
        "kind is whole differences": {"diffusion_model.layers.0.attn.q.diff_b": up},
    }  # fmt: skip
    for words, tensors in cases.items():
        save_file(tensors, tmp_path / "a.safetensors")
        with bad(words):
            training.check_lora(dit, tmp_path / "a.safetensors")


def test_an_export_needs_a_lora_of_ours(trained_lora, tmp_path):
    with bad("format 'zip' is not one of peft, diffusers, kohya"):
        training.export_lora(trained_lora, tmp_path / "a.safetensors", "zip")
    training.export_lora(trained_lora, tmp_path / "a.safetensors", "kohya")
    with bad("is no LoRA in our names"):
        training.export_lora(tmp_path / "a.safetensors", tmp_path / "b.safetensors")


def test_signals_wait_for_the_end_of_a_step_and_are_given_back():
    before = signal.getsignal(signal.SIGINT)
    with training.stop_between_steps() as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked == ["SIGTERM"]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            types.SimpleNamespace()  # the handler has run by now
    assert signal.getsignal(signal.SIGINT) is before
