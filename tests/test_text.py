"""The text encoder: T5 and its tokens."""

import contextlib
import gc
import shutil
import threading
import warnings
from types import SimpleNamespace

import bs4
import pytest
import torch
from common import bad
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor

import captions
import magi


def test_t5_pads_truncates_and_marks_empty_captions(model_folder):
    t5 = magi.T5(model_folder.parent / "t5", length=14, keep=True)
    with pytest.warns(UserWarning, match="only the first 14 are used"):
        text, mask = t5(["a red ball", "", "a red ball bounces on the old tree " * 9])
    assert text.shape == (3, 14, 32) and mask.shape == (3, 14) and text.dtype == torch.float32
    assert next(t5.model.parameters()).dtype == torch.bfloat16
    assert mask[1].sum() == 0 and mask[2].sum() == 14 and 0 < mask[0].sum() < 14
    assert torch.equal(text[0][mask[0] == 0], torch.zeros(int((mask[0] == 0).sum()), 32))
    tokenizer = SentencePieceProcessor(model_file=str(model_folder.parent / "t5" / "spiece.model"))
    ids, _ = magi.tokenize(tokenizer, ["a red ball"], 14)
    assert ids[0, mask[0].sum() - 1] == 1 and ids[0, mask[0].sum()] == 0  # </s>, then padding
    # padding changes nothing
    alone, _ = t5(["a red ball"])
    torch.testing.assert_close(alone[0], text[0], rtol=2e-2, atol=2e-2)


def test_a_truncated_caption_still_ends():
    with pytest.warns(UserWarning, match="only the first 6"):
        ids, mask = magi.tokenize(SimpleNamespace(encode=lambda caption: [7] * 20), ["a"], 6)
    assert ids.tolist() == [[7, 7, 7, 7, 7, 1]] and mask.sum() == 6


@pytest.mark.parametrize("keep", [False, True])
def test_t5_is_freed_after_use_unless_it_is_kept(model_folder, monkeypatch, keep):
    from transformers import T5EncoderModel

    encoders = lambda: {id(o) for o in gc.get_objects() if type(o) is T5EncoderModel}
    before = encoders()  # pipelines of other tests may keep theirs
    reads, read = [], magi.T5.read
    monkeypatch.setattr(magi.T5, "read", lambda self: reads.append(1) or read(self))
    pipe = magi.load(model_folder, keep_t5=keep)
    assert not reads  # nothing is read before a prompt comes
    first, again = pipe.encode_text(["a red ball"])[0], pipe.encode_text(["a red ball"])[0]
    assert torch.equal(first, again) and len(reads) == (1 if keep else 2)
    gc.collect()
    assert len(encoders() - before) == keep
    assert (pipe.encode_text.model is not None) == keep


def test_words_of_the_longest_caption_are_all_that_is_computed(model_folder):
    """Columns that are padding everywhere are not run, and come out as zeros."""
    t5, shapes = magi.T5(model_folder.parent / "t5", length=200, keep=True), []
    _, mask = t5(["a red ball", "a"])
    t5.model.register_forward_hook(lambda m, a, out: shapes.append(a[0].shape))
    text, _ = t5(["a red ball", "a"])
    assert shapes == [(2, mask[0].sum())] and mask[1].sum() < mask[0].sum()
    assert text.shape == (2, 200, 32) and not text[mask == 0].any()


def test_a_t5_without_all_its_tensors_is_refused(model_folder, tmp_path):
    shutil.copytree(model_folder.parent / "t5", tmp_path / "t5")
    sd = load_file(tmp_path / "t5" / "model.safetensors")
    del sd["encoder.final_layer_norm.weight"]
    save_file(sd, tmp_path / "t5" / "model.safetensors", {"format": "pt"})
    with bad("lacks 1 tensor.*final_layer_norm"):
        magi.T5(tmp_path / "t5")(["a red ball"])


def test_a_t5_of_bin_files_is_read(model_folder, tmp_path):
    """An official download, which is not converted: tensors of the decoder are passed over."""
    shutil.copytree(model_folder.parent / "t5", tmp_path / "t5")
    sd = load_file(tmp_path / "t5" / "model.safetensors")
    sd |= {"encoder.embed_tokens.weight": sd["shared.weight"].clone(), "decoder.a.weight": torch.zeros(2)}
    (tmp_path / "t5" / "model.safetensors").unlink()
    torch.save(sd, tmp_path / "t5" / "pytorch_model.bin")
    of_bin, plain = (magi.T5(folder / "t5")(["a red ball"])[0] for folder in (tmp_path, model_folder.parent))
    assert torch.equal(of_bin, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_t5_is_what_transformers_reads(model_folder, dtype):
    """But for PyTorch's default dtype, which transformers changes meanwhile, for other threads too."""
    from transformers import T5EncoderModel

    folder, changed = model_folder.parent / "t5", []
    theirs = T5EncoderModel.from_pretrained(folder, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "set_default_dtype", changed.append)
        ours = magi.T5(folder, dtype=dtype).read()
    assert not changed and not ours.training
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[k].dtype == theirs[k].dtype and torch.equal(ours[k], theirs[k]) for k in ours)


def test_one_caption_is_not_taken_for_its_letters(model_folder):
    t5 = magi.T5(model_folder.parent / "t5", length=14)
    text, mask = t5("a red ball")
    assert text.shape == (1, 14, 32) and torch.equal(text, t5(["a red ball"])[0]) and mask.shape == (1, 14)


def test_threads_read_t5_at_once(model_folder):
    """Of a model that is made by transformers' own from_pretrained, two at once would leave its dtype."""
    pipe, start, read = magi.load(model_folder), threading.Barrier(4), []

    def encode():
        start.wait()
        read.append(pipe.encode_text(["a red ball"])[0])

    threads = [threading.Thread(target=encode) for _ in range(4)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(read) == 4 and all(torch.equal(text, read[0]) for text in read)
        assert torch.get_default_dtype() == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_t5_is_found_after_a_change_of_folder(model_folder, tmp_path, monkeypatch):
    """It is read when a prompt comes; a relative path holds for the folder in which the model was loaded."""
    monkeypatch.chdir(model_folder.parent)
    pipe = magi.load(model_folder.name)
    monkeypatch.chdir(tmp_path)
    assert pipe.encode_text(["a red ball"])[0].any()


def test_garbage_is_collected_again_after_an_import_but_not_where_a_user_does_not_want_it():
    with contextlib.suppress(ImportError), captions.no_garbage_collection():
        assert not gc.isenabled()
        raise ImportError("no transformers")
    assert gc.isenabled()
    gc.disable()
    try:
        with captions.no_garbage_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_caption_is_cleaned_without_a_filter_of_warnings(monkeypatch):
    """All threads share it: each put back what it found, which may have been the one that hides all."""
    parse, filters = bs4.BeautifulSoup, []
    noting = lambda *args, **kwargs: filters.append(list(warnings.filters)) or parse(*args, **kwargs)
    monkeypatch.setattr(bs4, "BeautifulSoup", noting)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert magi.clean_caption("a/b") == "a b"
        assert all(filters_then == warnings.filters for filters_then in filters)


def test_what_the_html_parser_refuses_is_read_as_it_is():
    assert magi.clean_caption("a red ball <![foo bar").startswith("a red ball")
