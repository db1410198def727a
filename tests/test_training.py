"""Training: times, the flow-matching loss, the VAE's loss, Muon and the training loop of tiny/train.py."""

import contextlib
import dataclasses
import json
import math
import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import train
from common import (
    FOLDER_DIT,
    FOLDER_VAE,
    HERE,
    QUICK,
    bad,
    calls_of,
    run_main,
    small,
    training_batch,
    write_folder,
    write_model,
)

import magi
import training


def test_timestep_law():
    t = training.timestep_law(20000, generator=torch.Generator().manual_seed(0))
    assert 0 < t.min() and t.max() < 1
    assert abs((t < 0.3).float().mean() - 0.69) < 0.02


def test_times_never_rise_along_a_clip_and_keep_the_law():
    generator = torch.Generator().manual_seed(0)
    law_only = training.TrainingConfig(pipeline_share=0.0)
    t, clean = training.draw_times(4000, 4, torch.zeros(4000, dtype=torch.long), law_only, QUICK, generator)
    assert (t.diff(dim=1) <= 0).all() and not clean.any() and abs((t < 0.3).float().mean() - 0.69) < 0.02
    given_chunks = torch.randint(0, 4, (4000,), generator=generator)
    t, clean = training.draw_times(4000, 4, given_chunks, law_only, QUICK, generator)
    for given_here in range(4):  # the law holds however many are given
        noisy = t[given_chunks == given_here][:, given_here:]
        assert abs((noisy < 0.3).float().mean() - 0.69) < 0.04
    t, clean = training.draw_times(4000, 4, given_chunks, training.TrainingConfig(), QUICK, generator)
    assert (t.diff(dim=1) <= 0).all() and (clean.int().diff(dim=1) <= 0).all()
    assert (
        (clean.sum(1) >= given_chunks).all() and (t[clean] == QUICK.clean_t).all() and not clean[:, -1].any()
    )


def test_pipeline_times_are_a_stage_apart_and_the_last_chunk_is_in_flight():
    generator, given_chunks = torch.Generator().manual_seed(0), torch.arange(4).repeat(500)
    cfg = training.TrainingConfig(pipeline_share=1.0)
    t, clean = training.draw_times(2000, 4, given_chunks, cfg, QUICK, generator)
    assert not clean[:, -1].any()  # a clip without a noisy chunk teaches nothing
    stage = QUICK.window * (3 * t / (1 + 2 * t)).sqrt()  # shift_time and the square undone
    both = ~clean[:, :-1] & (stage[:, :-1] > 1)  # the next one has started
    assert both.sum() > 500 and ((stage[:, :-1] - stage[:, 1:])[both] - 1).abs().max() < 1e-3

    cfg = training.TrainingConfig(pipeline_share=1.0, entering_share=1.0)
    t, clean = training.draw_times(2000, 4, given_chunks, cfg, QUICK, generator)
    stage = QUICK.window * (3 * t / (1 + 2 * t)).sqrt()
    assert (stage[:, -1] < 1).all() and abs(stage[:, -1].mean() - 0.5) < 0.05  # all have just entered
    assert torch.equal(clean.sum(1), torch.maximum(given_chunks, torch.tensor(4 - QUICK.window)))


def test_given_videos_end_with_a_chunk_if_asked():
    dit, latents, text, mask = training_batch()
    many = [u.repeat(500, *[1] * (u.ndim - 1)) for u in (latents, text, mask)]
    generator = torch.Generator().manual_seed(0)

    def given(**shares) -> list[int]:
        cfg = training.TrainingConfig(image_share=0, **shares)
        return training.draw_prefix(dit, *many, None, cfg, generator).prefix_frames.unique().tolist()

    assert given(video_share=1, whole_share=1) == [6, 12]  # of 18 frames: something is left to predict
    assert given(video_share=1) == [*range(2, 18)]
    assert given(video_share=0, whole_share=1) == [0]


def test_loss_counts_noisy_chunks_only_but_gradients_reach_the_clean_ones():
    dit, latents, text, mask = training_batch()
    seen = {}
    hook = dit.register_forward_hook(lambda m, a, out: seen.update(x=a[0], v=out) or out.retain_grad())
    latents.requires_grad_()
    cfg = training.TrainingConfig(image_share=0, video_share=1, pipeline_share=0, ranges_share=1)
    loss = training.flow_matching_loss(
        dit, latents, text, mask, cfg, generator=torch.Generator().manual_seed(1)
    )
    loss.backward()
    hook.remove()
    used = seen["v"].grad.abs().sum((1, 3, 4)) > 0  # (B, T) frames with a loss
    frames_used = used.sum(1)
    assert (frames_used < 18).all() and (frames_used >= 1).all()
    first = (~used).int().argmin(dim=1)
    assert all(used[b, first[b] :].all() and not used[b, : first[b]].any() for b in range(2))
    assert latents.grad[:, :, :1].abs().sum() > 0  # through the keys of clean chunks


def test_muon_makes_updates_orthogonal():
    torch.manual_seed(0)
    for shape in (8, 8), (12, 5), (5, 12):
        singular = torch.linalg.svdvals(train.orthogonal(torch.randn(shape) * 100))
        assert (singular > 0.4).all() and (singular < 1.4).all(), singular
    weight = torch.nn.Parameter(torch.zeros(6, 4))
    optimizer = train.Muon([weight], lr=0.5)
    (weight * torch.randn(6, 4)).sum().backward()
    optimizer.step()
    assert 0.05 < weight.square().mean().sqrt() < 0.15  # 0.2 lr, give or take what the iteration leaves


def test_muon_has_momentum_and_decay():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.ones(6, 4))
    optimizer = train.Muon([weight], lr=0.5, weight_decay=0.1)
    weight.grad = torch.zeros(6, 4)
    optimizer.step()
    assert torch.allclose(weight, torch.tensor(0.95))
    weight.grad = torch.randn(6, 4)
    optimizer.step()
    weight.grad, before = torch.zeros(6, 4), weight.detach().clone()
    optimizer.step()  # goes on without a gradient
    assert (weight - 0.95 * before).abs().max() > 0.02


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_image_task_gives_one_clean_frame_that_of_a_still_if_there_is_one(share):
    dit, latents, text, mask = training_batch()
    calls = calls_of(dit)
    cfg = training.TrainingConfig(image_share=share, video_share=1 - share, pipeline_share=0)
    stills = torch.randn(2, 16, 1, 4, 4)
    for images, first in ((None, latents[:, :, 0]), (stills, stills[:, :, 0])):
        training.flow_matching_loss(dit, latents, text, mask, cfg, images=images)
        x = calls.pop()["x"]
        assert torch.equal(x[:, :, 0], first) == (share == 1)  # an image; in a video, clean chunks are noisy
        assert not torch.equal(x[:, :, 1], latents[:, :, 1])
        one = latents[:, :, :6], text[:, :1], mask[:, :1]  # of more chunks the first may have left, noised
        training.shortcut_loss(dit, dit, *one, 8, cfg, images=images)
        x = calls[0]["x"]  # a video before a single chunk: two to five of its frames, and no still
        assert torch.equal(x[:, :, 0], first if share == 1 else latents[:, :, 0])
        assert torch.equal(x[:, :, 1], latents[:, :, 1]) == (share == 0)
        assert not torch.equal(x[:, :, 5], latents[:, :, 5])
        calls.clear()
    with bad("are not one latent frame for each of latents"):
        training.flow_matching_loss(dit, latents, text, mask, cfg, images=latents[:, :, :2])


def test_shares_of_tasks():
    generator = torch.Generator().manual_seed(0)
    cfg, batch = training.TrainingConfig(image_share=0.3, video_share=0.2), 2000
    clips = torch.zeros(batch, 1, 18, 1, 1), torch.zeros(batch, 3, 14, 12), torch.zeros(batch, 3, 14)
    *_, frames = training.draw_prefix(small()[0], *clips, None, cfg, generator)
    assert abs((frames == 1).float().mean() - 0.3) < 0.04 and abs((frames > 1).float().mean() - 0.2) < 0.04
    assert frames.max() == 17 and (frames == 2).any()  # something is left to predict


def test_an_empty_caption_is_null_text_under_the_flag_of_a_caption():
    """As the sampler shows it; clips that lose their caption, and clean chunks, have the other flag."""
    dit, latents, text, mask = training_batch()
    calls, mask = calls_of(dit), mask.clone()
    mask[0] = 0
    for null_share in 0.0, 1.0:
        cfg = training.TrainingConfig(image_share=0, video_share=0, pipeline_share=0, null_share=null_share)
        training.flow_matching_loss(dit, latents, text, mask, cfg)
        call = calls.pop()
        assert torch.equal(call["text"][0, 0], dit.null_text)
        assert torch.equal(call["text"][1], text[1]) == (null_share == 0) == call["conditional"].all()


def shown_in_training(**shares) -> tuple[magi.DiT, torch.Tensor, list[dict]]:
    """The model, the captions and the forwards of flow_matching_loss on clips of six chunks."""
    dit, latents, text, mask = training_batch(6)
    calls, cfg = calls_of(dit), training.TrainingConfig(image_share=0, video_share=0.5, **shares)
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        training.flow_matching_loss(dit, latents, text, mask, cfg, generator=generator)
    return dit, text, calls


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_captions_are_lost_as_often_as_they_should_be(share):
    dit, text, calls = shown_in_training(null_share=share)
    for call in calls:
        captioned = (call["t"] < 0.9998) & (share == 0)  # clean chunks never have one
        assert torch.equal(torch.as_tensor(call["conditional"]).expand(2, 6), captioned)
        assert torch.equal(call["text"], torch.where(captioned[..., None, None], text, dit.null_text))


def test_training_has_the_samplers_ranges():
    quarters = magi.timestep_grid(4)[1:4]
    for call in shown_in_training(ranges_share=1.0)[2]:
        reach = torch.tensor([5, 4, 3, 2])[(call["t"][..., None] >= quarters).sum(-1)]
        reach = torch.where(call["t"] > 0.9998, 1, reach)
        assert torch.equal(call["first_seen"], (torch.arange(6) - reach + 1).clamp(min=0))
    for call in shown_in_training(ranges_share=0.0)[2]:
        assert (call["first_seen"] == torch.arange(6)).all()


def test_loss_is_zero_for_the_true_velocity_of_a_known_batch():
    """A 'model' that answers data - noise exactly has no loss, whatever was clean or noisy."""
    dit, latents, text, mask = training_batch()

    class Oracle(torch.nn.Module):
        cfg, null_text = dit.cfg, dit.null_text

        def forward(self, x, t, *a, **k):
            level = t.repeat_interleave(6, 1)[:, None, :, None, None]
            return (latents - x) / (1 - level).clamp(min=1e-6)  # x = (1-t) noise + t data

    cfg = training.TrainingConfig(pipeline_share=0.5)
    loss = training.flow_matching_loss(
        Oracle(), latents, text, mask, cfg, generator=torch.Generator().manual_seed(5)
    )
    assert loss < 1e-4


def test_one_batch_overfits():
    dit, latents, text, mask = training_batch(n=2)
    optimizer = torch.optim.AdamW(dit.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        generator = torch.Generator().manual_seed(0)  # always the same noise and times
        loss = training.flow_matching_loss(dit, latents, text, mask, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0], losses[::30]


def test_training_goes_on_where_it_was_killed(tmp_path):
    """Two steps, a kill, two more steps are the same as four steps."""
    video = torch.randn(1, 4)

    def learn(work: Path, stops: list[int]) -> torch.Tensor:
        for stop in stops:
            torch.manual_seed(0)
            model = torch.nn.ModuleDict({"layers": torch.nn.Linear(4, 1)})  # Muon's weight, AdamW's bias

            def loss_of_step(step: int, model=model, stop=stop):
                if step == stop:
                    raise KeyboardInterrupt
                return ((model["layers"](video) - step) ** 2).mean(), {}

            with contextlib.suppress(KeyboardInterrupt):
                train.fit("toy", model, loss_of_step, steps=4, lr=0.1, work=work, every=2, warmup=1)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(learn(tmp_path / "a", [99]), learn(tmp_path / "b", [3, 99]))


def test_fit_slows_down_and_leaves_the_average(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, path, rates, step = (
        torch.nn.ModuleDict({"layers": torch.nn.Linear(4, 1)}),
        [],
        [],
        torch.optim.AdamW.step,
    )

    def loss_of_step(i: int):
        path.append(model["layers"].weight.detach().clone())
        return ((model["layers"](torch.ones(1, 4)) - 10) ** 2).mean(), {}

    def watch(self):
        rates.append(self.param_groups[0]["lr"])
        return step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    train.fit("toy", model, loss_of_step, steps=30, lr=1e-3, work=tmp_path, warmup=5)
    assert (rates[0], rates[10], rates[29]) == pytest.approx((2e-4, 1e-3, 1e-4))
    last = torch.load(tmp_path / "toy.pt")["model"]["layers.weight"]
    average = path[0]
    for i, now in enumerate([*path[1:], last]):
        average = average.lerp(now, 1 - min(0.999, (i + 1) / (i + 10)))
    torch.testing.assert_close(model["layers"].weight.detach(), average)
    assert not torch.allclose(average, last)


def test_training_goes_on_with_the_log_of_an_older_version(tmp_path, monkeypatch):
    """Its rows have other columns: they stay in the file, and the means shown are of the new ones."""
    shown = []
    monkeypatch.setattr(training.tqdm, "set_postfix", lambda bar, values, refresh: shown.append(values))
    model = torch.nn.Linear(4, 1)
    loss = lambda step: (((model(torch.ones(1, 4)) - 10) ** 2).mean(), {"error": step})
    fit = lambda steps: training.fit(
        "toy", model, loss, steps, [torch.optim.AdamW(model.parameters())], tmp_path
    )
    fit(2)
    log, old = tmp_path / "toy.csv", "0,0.5,0.1\n1,0.5,0.1\n"
    log.write_text(old)
    fit(4)
    header, *rows = log.read_text().splitlines()
    assert header == "step,loss,error,s/step" and rows[:2] == old.split() and len(rows) == 4
    assert [values["error"] for values in shown] == ["0", "0.5", "2", "2.5"]


def test_a_finished_run_keeps_its_log_as_it_is(tmp_path):
    """The line that names the columns was lost when a run that was done was started again."""
    model = torch.nn.Linear(4, 1)
    loss = lambda step: (model(torch.ones(1, 4)).square().mean(), {"error": step})
    fit = lambda: training.fit("toy", model, loss, 2, [torch.optim.AdamW(model.parameters())], tmp_path)
    fit()
    before = (tmp_path / "toy.csv").read_bytes()
    fit()
    assert before.startswith(b"step,loss,error,s/step") and (tmp_path / "toy.csv").read_bytes() == before


def test_gradients_that_are_not_finite_reach_no_checkpoint(tmp_path):
    """A root at zero: its loss is finite, its gradient is not. The weights became nan, and were saved."""
    model = torch.nn.ParameterDict({"w": torch.ones(2)})

    def loss_of_step(i: int):
        w = model["w"]
        return ((w - w.detach()).sum().abs().sqrt() if i == 3 else w.sum()), {}

    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(FloatingPointError, match="the gradient norm of step 3 is .*, or end with --steps 2"):
        training.fit("toy", model, loss_of_step, 8, [optimizer], tmp_path, every=2)
    saved = torch.load(tmp_path / "toy.pt", weights_only=True)
    assert saved["step"] == 2 and saved["model"]["w"].isfinite().all() and model["w"].isfinite().all()


def test_the_loss_is_drawn_when_the_state_is_saved_and_may_fail(tmp_path, monkeypatch):
    model, drawn = torch.nn.Linear(4, 1), []

    def draw(log: Path) -> None:
        saved = torch.load(tmp_path / "toy.pt")["step"]
        drawn.append((saved, len(training.read_log(log, before=99))))
        raise OSError("no font")

    monkeypatch.setattr(training, "plot_loss", draw)
    loss = lambda step: (model(torch.ones(1, 4)).square().mean(), {})
    training.fit("toy", model, loss, 5, [torch.optim.AdamW(model.parameters())], tmp_path, every=2)
    assert drawn == [(2, 2), (4, 4), (5, 5)]


def test_rows_that_were_cut_off_are_left_out(tmp_path):
    log = tmp_path / "toy.csv"
    for end in ("2", "2\n", "2,0.", "2,0.5,0.1,"):
        log.write_text("0,0.7,0.1\r\n1,0.6,0.1\n" + end)
        assert training.read_log(log, before=9) == [["0", "0.7", "0.1"], ["1", "0.6", "0.1"]], end
    training.plot_loss(log)
    assert (tmp_path / "toy.png").stat().st_size > 1000


def test_drawing_the_loss_leaves_the_backend_of_a_notebook(tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    before = plt.get_backend()
    (tmp_path / "toy.csv").write_text("0,0.7,0.1\r\n1,0.6,0.1\n")
    try:
        plt.switch_backend("svg")
        training.plot_loss(tmp_path / "toy.csv")
        assert plt.get_backend() == "svg" and not plt.get_fignums()
    finally:
        plt.switch_backend(before)
    assert (tmp_path / "toy.png").stat().st_size > 1000


def test_a_report_changes_nothing(tmp_path):
    ends = []
    for report in (None, lambda: "fine"):
        torch.manual_seed(0)
        model = torch.nn.ModuleDict({"layers": torch.nn.Linear(4, 1)})
        loss = lambda step, model=model: (((model["layers"](torch.ones(1, 4)) - step) ** 2).mean(), {})
        train.fit(
            "toy", model, loss, 6, 0.1, tmp_path / str(report is None), every=2, warmup=1, report=report
        )
        ends.append(model["layers"].weight.detach().clone())
    assert torch.equal(*ends)


def test_vae_loss_learns_and_weighs():
    torch.manual_seed(0)
    vae = magi.VAE(magi.VAEConfig(video_size=16, embed_dim=32, depth=1, num_heads=2, use_final_proj=True))
    video = torch.rand(2, 3, 4, 16, 16) * 2 - 1
    first, _ = training.vae_loss(vae, video)
    assert torch.allclose(
        training.vae_loss(vae, video, torch.zeros(2, 1, 4, 16, 16), kl_weight=0)[0], torch.tensor(0.0)
    )
    seeded = lambda size: training.vae_loss(
        vae, video, latent_noise=size * torch.ones(2), generator=torch.Generator().manual_seed(0)
    )
    assert not torch.allclose(seeded(0.0)[1], seeded(0.5)[1])
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3)
    for _ in range(40):
        loss, recon = training.vae_loss(vae, video)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.8 * first and recon.shape == video.shape


def test_vae_loss_is_its_formula():
    torch.manual_seed(0)
    mean, logvar = torch.zeros(2, 4, 10, 20, 20), torch.full((2, 4, 10, 20, 20), math.log(0.09))
    mean[:, :, 5:] = 2  # the deviation of a channel is 1
    vae = SimpleNamespace(moments=lambda video: (mean, logvar), decoder=lambda z: z)
    video = torch.zeros_like(mean)
    assert abs((training.vae_loss(vae, video)[1] - mean).std() - 0.3) < 0.01
    noisy = training.vae_loss(vae, video, latent_noise=torch.tensor([0.4, 0.4]))[1]
    assert abs((noisy - mean).std() - 0.5) < 0.01  # sqrt(0.3^2 + 0.4^2)
    loss, _ = training.vae_loss(vae, video, weight=torch.zeros(()), kl_weight=1)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean, (logvar / 2).exp()), normal(0, 1)).mean()
    assert torch.allclose(loss, kl)


def learn_toy(folder: Path, ranks: int) -> torch.nn.Module:
    """Three steps of two losses each, of which one takes no part of some weights."""
    torch.manual_seed(0)
    layers = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in ("a", "b", "odd")})
    model = torch.nn.ModuleDict({"layers": layers})
    video = torch.randn(6, 4)

    def loss_of(i: int):
        x = layers["b"](layers["a"](video[i]).relu())
        return ((layers["odd"](x) if i % 2 else x) ** 2).mean()

    def loss_of_step(i: int):
        return (loss_of(i) if ranks == 2 else (loss_of(2 * i) + loss_of(2 * i + 1)) / 2), {}

    with mock.patch.object(train, "autocast_is_faster", lambda: False):  # else timed, by each for itself
        return train.fit("toy", model, loss_of_step, steps=3, lr=0.1, work=folder, warmup=1)


def learn_as_one_of_two(rank: int, folder: Path) -> None:
    join(rank, folder)
    model = learn_toy(folder / "two", 2)
    torch.save(model.state_dict(), folder / f"rank{rank}.pt")


def join(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)


def start_two(make, folder: Path) -> None:
    """make(rank, folder) in two processes."""
    multiprocessing.set_forkserver_preload(["torch._dynamo"])  # once for all of them
    torch.multiprocessing.start_processes(make, (folder,), nprocs=2, start_method="forkserver")


def test_two_processes_learn_what_one_does(tmp_path):
    """Each has half of the losses and makes half of Muon's updates."""
    start_two(learn_as_one_of_two, tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    for name, wanted in learn_toy(tmp_path / "one", 1).state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], wanted, rtol=1e-3, atol=1e-4)


def teach_as_one_of_two(rank: int, folder: Path) -> None:
    """`torchrun tiny/train.py lora`. The judge sees no videos, but its models and LoRA are loaded. What this
    process wrote and judged -> did.RANK"""
    join(rank, folder)
    did, writer = [], train.media.Mp4Writer
    train.media.Mp4Writer = lambda file, fps: did.append(file.name) or writer(file, fps)
    train.judge_prompts = lambda pipe, prompts, *_: did.append("judged") or {"colour": 0.0}
    training.plot_loss = lambda log: None  # takes longer than a step
    words = ["lora", "--out", folder, "--work", folder / "work", "--clips", 1, "--steps", 1, "--batch", 1]
    code, out, err = run_main(train.main, *words)
    (folder / f"did.{rank}").write_text(json.dumps([code, did, out, err]))


def test_of_two_processes_the_first_writes_the_clips_and_judges_the_lora(tmp_path):
    """Two writers met in one file, and the second process judged a LoRA that was not there yet."""
    write_model(tmp_path / "base", dataclasses.replace(FOLDER_DIT, text_dim=128, text_length=64))
    write_folder(tmp_path / "vae", magi.VAE(FOLDER_VAE), vae=FOLDER_VAE)
    (tmp_path / "t5").symlink_to(HERE / "tiny" / "t5")
    start_two(teach_as_one_of_two, tmp_path)
    first, second = (json.loads((tmp_path / f"did.{rank}").read_text()) for rank in range(2))
    code, did, out, err = first
    assert code == 0, err
    assert did == ["cyan000.mp4", "old000.mp4", *4 * ["judged"]]  # two kinds of prompts, without and with it
    assert "base, LoRA x 1, cyan, held out (7 prompts): colour 0%" in out
    assert second == [0, [], "", ""]
    dit = training.load_lora(magi.load_dit(tmp_path / "base"), tmp_path / "lora" / "cyan.safetensors")
    assert any(lora.up.any() for lora in training.loras(dit))


def test_a_report_that_fails_loses_no_step(tmp_path):
    model = torch.nn.Linear(2, 1)

    def report():
        raise MemoryError

    def loss_of_step(i: int):
        return model(torch.ones(2)).square().sum(), {}

    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(MemoryError):
        training.fit(
            "a", model, loss_of_step, 9, [optimizer], tmp_path, every=5, report=report, report_every=3
        )
    assert torch.load(tmp_path / "a.pt", weights_only=True)["step"] == 3


def test_a_log_gets_lines_where_a_terminal_gets_a_bar(tmp_path, capfd):
    model = torch.nn.Linear(2, 2)
    loss_of_step = lambda i: (model(torch.ones(2)).square().sum(), {"psnr": 30.0})
    training.fit("my", model, loss_of_step, 3, [torch.optim.SGD(model.parameters())], tmp_path)
    err = capfd.readouterr().err
    lines = err.splitlines()
    assert lines[0].startswith("my: step 1 of 3, loss ") and lines[-1].startswith("my: step 3 of 3, loss ")
    assert all(", psnr 30, s/step " in line for line in lines) and "\r" not in err
