"""The text encoder: T5 and its tokens."""

import gc
import shutil

import pytest
import torch
from common import bad
from safetensors.torch import load_file, save_file

import magi


def test_t5_pads_truncates_and_marks_empty_captions(model_folder):
    t5 = magi.T5(model_folder.parent / "t5", length=14)
    assert next(t5.model.parameters()).dtype == torch.bfloat16
    with pytest.warns(UserWarning, match="only the first 14 are used"):
        text, mask = t5(["a red ball", "", "a red ball bounces on the old tree " * 9])
    assert text.shape == (3, 14, 32) and mask.shape == (3, 14) and text.dtype == torch.float32
    assert mask[1].sum() == 0 and mask[2].sum() == 14 and 0 < mask[0].sum() < 14
    assert torch.equal(text[0][mask[0] == 0], torch.zeros(int((mask[0] == 0).sum()), 32))
    ids, _ = magi.tokenize(t5.tokenizer, ["a red ball"], 14)
    assert ids[0, mask[0].sum() - 1] == 1 and ids[0, mask[0].sum()] == 0  # </s>, then padding
    # padding changes nothing
    alone, _ = t5(["a red ball"])
    torch.testing.assert_close(alone[0], text[0], rtol=2e-2, atol=2e-2)


def test_a_truncated_caption_still_ends():
    with pytest.warns(UserWarning, match="only the first 6"):
        ids, mask = magi.tokenize(magi.SimpleNamespace(encode=lambda caption: [7] * 20), ["a"], 6)
    assert ids.tolist() == [[7, 7, 7, 7, 7, 1]] and mask.sum() == 6


def test_t5_is_freed_after_use(model_folder):
    pipe = magi.load(model_folder)
    pipe.encode_text(["a red ball"])
    gc.collect()
    assert not any(type(o) is magi.T5 for o in gc.get_objects())


def test_a_t5_without_all_its_tensors_is_refused(model_folder, tmp_path):
    shutil.copytree(model_folder.parent / "t5", tmp_path / "t5")
    sd = load_file(tmp_path / "t5" / "model.safetensors")
    del sd["encoder.final_layer_norm.weight"]
    save_file(sd, tmp_path / "t5" / "model.safetensors", {"format": "pt"})
    with bad("lacks 1 tensor.*final_layer_norm"):
        magi.T5(tmp_path / "t5")
