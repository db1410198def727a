"""LoRA: training, saving, merging, and what is refused."""

import copy
import dataclasses

import torch
from common import QUICK, SMALL, bad, distillation, relative, small, training_batch
from safetensors.torch import load_file, save_file

import magi
import training


def with_lora(trained: bool = True) -> magi.DiT:
    """The small model with a LoRA of rank 3."""
    dit = training.add_lora(copy.deepcopy(small()[0]), rank=3)
    generator = torch.Generator().manual_seed(1)
    for lora in training.loras(dit) if trained else ():
        lora.up.data.normal_(0, 0.1, generator=generator)
    return dit


def video_of(dit: magi.DiT) -> torch.Tensor:
    _, text, mask, tokens = small()
    return torch.cat([v for _, v in magi.sample(dit, text, mask, QUICK, special_tokens=tokens)], dim=1)


def test_an_untrained_lora_changes_nothing_and_a_merged_one_gives_the_same_video(tmp_path):
    plain = video_of(small()[0])
    assert torch.equal(video_of(with_lora(trained=False)), plain)
    dit = with_lora()
    adapted = video_of(dit)
    assert relative(adapted, plain) > 0.05
    training.save_lora(dit, tmp_path / "a.safetensors")
    again = training.load_lora(copy.deepcopy(small()[0]), tmp_path / "a.safetensors")
    assert torch.equal(video_of(again), adapted) and not any(p.requires_grad for p in again.parameters())
    with training.lora_off(again):
        assert torch.equal(video_of(again), plain)
    half = training.load_lora(copy.deepcopy(small()[0]), tmp_path / "a.safetensors", scale=0.5)
    between = video_of(half)
    training.save_lora(half, tmp_path / "half.safetensors")
    saved = training.load_lora(copy.deepcopy(small()[0]), tmp_path / "half.safetensors")
    assert relative(video_of(saved), between) < 1e-5
    for unmerged, video in ((again, adapted), (half, between)):
        merged = training.merge_lora(copy.deepcopy(unmerged))
        assert merged.state_dict().keys() == small()[0].state_dict().keys() and not training.loras(merged)
        assert relative(video_of(merged), video) < 1e-4
    assert 0.01 < relative(between, plain) < relative(adapted, plain)


def test_loras_add_up(tmp_path):
    file = tmp_path / "a.safetensors"
    training.save_lora(with_lora(), file)
    whole, halves = copy.deepcopy(small()[0]), copy.deepcopy(small()[0])
    training.load_lora(whole, file)
    for scale in (0.75, 0.25):
        training.load_lora(halves, file, scale)
    assert relative(video_of(halves), video_of(whole)) < 1e-4


def test_a_lora_of_some_layers_is_saved_and_loaded(tmp_path):
    """One of another program may have some. What was saved of it lacked the others, and was refused."""
    dit, layer = copy.deepcopy(small()[0]), "layers.1.ffn.fc2"
    n_out, n_in = training.lora_targets(dit)[layer].weight.shape
    factors = {
        f"{layer}.lora_A.weight": torch.randn(2, n_in),
        f"{layer}.lora_B.weight": torch.randn(n_out, 2),
    }
    save_file(factors, tmp_path / "a.safetensors")
    training.load_lora(dit, tmp_path / "a.safetensors", scale=0.5)
    training.save_lora(dit, tmp_path / "b.safetensors")
    again = training.load_lora(copy.deepcopy(small()[0]), tmp_path / "b.safetensors")
    assert training.lora_metadata(tmp_path / "b.safetensors")["rank"] == "2"
    assert torch.equal(video_of(again), video_of(dit)) and len(training.loras(dit)) == 1


def test_a_new_lora_keeps_the_size_of_its_input():
    torch.manual_seed(0)
    lora = training.LoRA(torch.nn.Linear(400, 8), rank=50)
    assert abs(lora.down.std() - 400**-0.5) < 0.005 and not lora.up.any()


def test_lora_is_on_every_linear_of_the_blocks_and_trains_alone_by_both_objectives():
    student, _, _ = distillation()
    frozen = {k: v.clone() for k, v in student.state_dict().items()}
    training.add_lora(student, rank=2)
    names = {k for k, p in student.named_parameters() if p.requires_grad}
    linears = [k for k in frozen if k.startswith("layers.") and k.endswith("weight") and "norm" not in k]
    assert names == {k.replace("weight", f"lora.{part}") for k in linears for part in ("down", "up")}
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.1)
    clips = training_batch()[1:]
    losses = [
        lambda: training.flow_matching_loss(student, *clips, generator=torch.Generator().manual_seed(0)),
        lambda: distillation_of_itself(student, clips, 64),
        lambda: distillation_of_itself(student, clips, 8),
    ]
    for loss in losses:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    after = student.state_dict()
    assert all(torch.equal(after[k], v) for k, v in frozen.items())
    assert all(lora.up.abs().sum() > 0 for lora in training.loras(student)[:-3])


def distillation_of_itself(dit: magi.DiT, clips, num_steps: int) -> torch.Tensor:
    """One model in memory: without its LoRA it is the teacher of itself with it."""
    return training.shortcut_loss(dit, dit, *clips, num_steps, generator=torch.Generator().manual_seed(0))


def test_a_lora_is_off_while_its_own_model_teaches():
    dit, plain = with_lora(), small()[0]
    clips = training_batch()[1:]
    of_itself = distillation_of_itself(dit, clips, 64)
    generator = torch.Generator().manual_seed(0)
    assert torch.allclose(of_itself, training.shortcut_loss(dit, plain, *clips, 64, generator=generator))
    assert all(lora.scale == 1 for lora in training.loras(dit))


def test_lora_works_on_fp8_layers_but_is_not_merged_into_them():
    torch.manual_seed(0)
    cfg = dataclasses.replace(SMALL, num_layers=3, fp8=True, dtype="bfloat16")
    dit = training.add_lora(magi.DiT(cfg), rank=2).eval()
    x, t, text = torch.randn(1, 16, 6, 4, 4), torch.full((1, 1), 0.3), torch.randn(1, 1, 14, 12)
    forward = lambda: dit(x, t, text, torch.ones(1, 1, 14))
    before = forward()
    assert isinstance(dit.layers[1].attn.v, magi.FP8Linear)
    for lora in training.loras(dit.layers[1]):
        lora.up.data.normal_()
    assert torch.isfinite(forward()).all() and not torch.equal(forward(), before)
    with bad("cannot be merged into fp8"):
        training.merge_lora(dit)
    assert len(training.loras(dit)) == 27  # nothing was merged by halves


def test_loras_that_do_not_fit_are_refused(tmp_path):
    file = tmp_path / "a.safetensors"
    with torch.device("meta"):
        other = magi.DiT(dataclasses.replace(SMALL, ffn_size=40))
        deeper = magi.DiT(dataclasses.replace(SMALL, num_layers=3))
    training.save_lora(with_lora(), file)
    with bad("is for another model: it has other shapes"):
        training.check_lora(other, file)
    with bad("is for another model: it lacks 18"):
        training.check_lora(deeper, file)
    with bad("has a LoRA already"):
        training.add_lora(with_lora(), 2)
    with bad("rank 0 must"):
        training.add_lora(deeper, 0)
    with bad("no LoRA to save: save it before it is merged"):
        training.save_lora(training.merge_lora(with_lora()), tmp_path / "merged.safetensors")
    save_file(load_file(file) | {"layers.0.attn.q.alpha": torch.ones(2)}, file)
    with bad("alpha' of shape .2,., but alpha is one number"):
        training.check_lora(small()[0], file)
    save_file(small()[0].state_dict(), file)
    with bad("is no LoRA"):
        training.check_lora(deeper, file)
    file.write_bytes(b"no weights")
    with bad("cannot read weights .*a.safetensors., damaged or of another kind"):
        training.check_lora(deeper, file)
    with bad("is a folder: name the file in it"):
        training.load_lora(deeper, tmp_path)
