"""Distillation: shortcut_loss against the sampler, the recorded runs and formulas by hand."""

import copy
import dataclasses
import itertools

import pytest
import torch
from common import CASES, QUICK, SMALL, bad, calls_of, distillation, golden_run, training_batch

import magi
import training


def test_shortcut_step_sizes_are_cyclic():
    cycle = [training.shortcut_steps(step) for step in range(22)]
    assert cycle[:11] == [64] * 8 + [32, 16, 8] and cycle[11:] == cycle[:11]
    with bad("num_steps 12 is not one of"):
        distillation()[2](12)


def test_two_half_steps_on_a_linear_field_by_hand():
    """v(x, t) = a x + b t + c: the mean of two Euler steps of unequal length, written out."""
    a, b, c = 0.7, -1.3, 0.2
    grid = magi.timestep_grid(16).double()
    x = torch.randn(2, 16, 12, 4, 4, dtype=torch.float64)
    i = torch.tensor([[6, 2], [14, 10]])  # two clips of two chunks, each at its own place of the grid
    out = training.two_half_steps(
        lambda x, t: a * x + training._per_frame(b * t + c, x), x, [grid[i + k] for k in range(3)]
    )
    for clip, chunk in itertools.product(range(2), range(2)):
        t0, t1, t2 = grid[i[clip, chunk] : i[clip, chunk] + 3].tolist()
        assert abs((t1 - t0) / (t2 - t1) - 1) > 0.01  # the grid is not uniform
        part = x[clip, :, 6 * chunk : 6 * chunk + 6]
        end = part + (t1 - t0) * (a * part + b * t0 + c)
        end = end + (t2 - t1) * (a * end + b * t1 + c)
        assert torch.allclose(out[clip, :, 6 * chunk : 6 * chunk + 6], (end - part) / (t2 - t0), atol=1e-12)


@pytest.mark.parametrize("num_steps", [32, 16, 8, 4])
def test_shortcut_target_is_two_steps_of_the_half_size(num_steps):
    """The student's three forwards are what the sampler would do: two half steps, given frames pasted in
    between, clean chunks as they are; and the loss is the distance from there."""
    student, _, loss = distillation(image_share=0.5, video_share=0.5)
    for seed in range(4):
        calls = calls_of(student)
        value = loss(num_steps, seed)
        first, second, one = calls
        fine = magi.timestep_grid(2 * num_steps)
        noisy = one["t"] < 0.9998
        assert [call["d"] for call in calls] == [num_steps, num_steps, num_steps / 2]
        assert torch.equal(first["x"], one["x"]) and torch.equal(first["t"], one["t"])
        index = (fine[:, None, None] == one["t"]).int().argmax(0)  # exact: the times are on both grids
        assert torch.equal(fine[index][noisy], one["t"][noisy]) and (index[noisy] % 2 == 0).all()
        middle = fine[(index + 1).clamp(max=2 * num_steps)]
        assert torch.equal(second["t"], torch.where(noisy, middle, one["t"]))
        end = fine[(index + 2).clamp(max=2 * num_steps)]
        times = [first["t"], second["t"], torch.where(noisy, end, one["t"])]
        dt1, dt2 = (training._per_frame(b - a, one["x"]) for a, b in itertools.pairwise(times))
        moved = first["x"] + dt1 * first["v"]
        given_frame = (second["x"] != moved).any(1).any(-1).any(-1) & noisy.repeat_interleave(6, 1)  # pasted
        target = (dt1 * first["v"] + dt2 * second["v"]) / (dt1 + dt2)
        counts = (noisy.repeat_interleave(6, 1) & ~given_frame)[:, None, :, None, None].expand_as(target)
        assert torch.allclose(value, (one["v"] - target)[counts].square().mean(), rtol=1e-4)
        student._forward_hooks.clear()


def test_pasted_frames_stay_between_the_half_steps():
    student, _, loss = distillation(n=1, image_share=1.0)
    calls = calls_of(student)
    loss(8)
    first, second, one = calls
    assert torch.equal(first["x"][:, :, 0], second["x"][:, :, 0])
    assert not torch.equal(first["x"][:, :, 1], second["x"][:, :, 1])


def test_chunks_stand_where_the_pipeline_has_them():
    """One stage apart, the last one in flight, on the grid of the step size, with the sampler's ranges."""
    student, _, loss = distillation(n=4, image_share=0.0, video_share=0.3, ranges_share=1.0)
    calls, seen = calls_of(student), set()
    for seed in range(40):
        loss(8, seed)
        t, first_seen = calls[-1]["t"], calls[-1]["first_seen"]
        grid = magi.timestep_grid(8)
        for clip in range(2):
            noisy = [c for c in range(4) if t[clip, c] < 0.9998]
            index = [int((grid == t[clip, c]).nonzero()) for c in noisy]
            assert noisy[-1] == 3 and all(a - b == 2 for a, b in itertools.pairwise(index)), index
            for c, i in zip(noisy, index, strict=True):
                assert first_seen[clip, c] == max(0, c + 1 - (5, 4, 3, 2)[i // 2])
            assert all(first_seen[clip, c] == c for c in range(noisy[0]))  # a clean chunk sees itself
            seen.add((noisy[0], index[-1]))
    assert {first for first, _ in seen} == {0, 1, 2, 3} and {last for _, last in seen} == set(range(8))


def test_no_null_text_for_noisy_chunks_of_the_student():
    student, teacher, loss = distillation(image_share=0.0, video_share=0.6, null_share=1.0)
    text, mask = training_batch()[2:]
    calls, teaching = calls_of(student), calls_of(teacher)
    for seed, num_steps in itertools.product(range(8), (64, 8)):
        loss(num_steps, seed)
    null_mask = torch.arange(14) < SMALL.null_length
    for call in calls:
        assert call.get("conditional", True) is True  # the flag of all its chunks, clean ones too
        noisy = call["t"] < 0.9998
        assert torch.equal(call["text"][noisy], text[noisy]) and torch.equal(call["mask"][noisy], mask[noisy])
        assert (call["text"][~noisy] == student.null_text).all()
        assert (call["mask"][~noisy].bool() == null_mask).all()
    assert any((call["t"] > 0.9998).any() for call in calls)
    for call in teaching:  # its branches: text and history, history, nothing
        flags = call["conditional"].chunk(3)
        assert torch.equal(flags[0], call["t"][:2] < 0.9998) and not flags[1].any() and not flags[2].any()
        assert "d" not in call and torch.equal(call["first_seen"].chunk(3)[2], torch.arange(3).expand(2, -1))


def test_an_empty_caption_is_distilled_as_null_text():
    student = distillation()[0]
    calls, (latents, text, mask) = calls_of(student), training_batch()[1:]
    training.shortcut_loss(student, student, latents, text, torch.zeros_like(mask), 8)
    assert all((c["text"] == student.null_text).all() and (c["mask"].sum(-1) == 5).all() for c in calls)


def in_the_sampler(dit, cfg: magi.SamplerConfig, text, mask, x, t, d) -> dict[int, torch.Tensor]:
    """The velocity of each noisy chunk of one clip (1, 16, T, H, W) as the sampler itself computes it; chunks
    that are clean by their t are taken for a prefix."""
    n, P = t.shape[1], int((t > 0.9998).sum())
    texts, prefix = zip(text, mask, strict=True), x[0, :, : 6 * P]
    run = magi._Run(dit, cfg, n, P, texts, {}, prefix, None, skip=False)
    grid = magi.timestep_grid(cfg.num_steps)
    noisy, at = [], {c: x[:, :, 6 * c : 6 * c + 6] for c in range(n)}
    for c in range(P, n):
        i = int((grid == t[0, c]).nonzero())
        first_seen = int(max(0, c + 1 - magi.kv_range(cfg, i)))
        run.enter(c)
        noisy.append(magi.ChunkInput(c, grid[i].item(), grid[i + 1].item() - grid[i].item(), first_seen))
    # this very moment is in the plan of a run whose prefix are the clean chunks
    assert noisy in [step.noisy for step in magi.plan(cfg, n, P)]
    clean = [magi.ChunkInput(c, cfg.clean_t, 0.0, c, clean=True) for c in range(P)]
    step = magi.Step(tuple(clean), d, enters=None, forget=0, done=None)
    with torch.no_grad():
        run.velocity(step, at)  # all given chunks are stored
        assert run.cache.chunks == [*range(P)]
        return run.velocity(step._replace(chunks=tuple(noisy)), at)


def test_teacher_and_student_see_what_the_sampler_shows_them():
    """On the same noisy clips the guided velocity and the student's are those of a run of the sampler."""
    student, teacher, loss = distillation(n=4, image_share=0.0, video_share=0.5, ranges_share=1.0)
    text, mask = training_batch(4)[2:]
    plain = dataclasses.replace(QUICK, special_tokens=(), num_steps=64, nearly_clean_blend=1.0)
    calls, teaching, clean = calls_of(student), calls_of(teacher), set()
    for seed in range(12):
        loss(64, seed, sampler=plain)
        shown, taught = calls[-1], teaching[-1]
        t, P = shown["t"], (shown["t"] > 0.9998).sum(1).tolist()
        guided = training.guided_velocity(
            teacher, shown["x"], t, text, mask, t > 0.9998, shown["first_seen"], plain
        )
        assert torch.equal(taught["x"][:2], shown["x"])
        for clip in range(2):
            one = slice(clip, clip + 1)
            own = (text[clip, P[clip] :], mask[clip, P[clip] :])
            for dit, velocity, d in ((teacher, guided, None), (student, shown["v"], 32.0)):
                cfg = dataclasses.replace(plain, distilled=d is not None)
                expected = in_the_sampler(dit, cfg, *own, shown["x"][one], t[one], d)
                for c, v in expected.items():
                    assert torch.allclose(velocity[one, :, 6 * c : 6 * c + 6], v, atol=2e-4), (seed, clip, c)
            clean.add(P[clip])
    assert clean == {0, 1, 2, 3}


def test_step_size_is_embedded_as_in_the_distilled_goldens():
    """The d that training tells the student for steps of 1/N is the d of a recorded run at N steps, and the
    sampler's d of the 12-step grid is the one trained for steps of that length."""
    for num_steps in (64, 32, 16, 8):
        student, _, loss = distillation()
        calls = calls_of(student)
        loss(num_steps)
        assert calls[-1]["d"] == num_steps / 2 == magi.shortcut_d(num_steps)[0]
    for mode in ("8,16,16", "16,16,8"):
        grid, fine = magi.timestep_grid(12, mode), magi.timestep_grid(16).tolist()
        for i, d in enumerate(magi.shortcut_d(12, mode)):
            a, b = (fine.index(u) for u in grid[i : i + 2].tolist())
            assert d == 8 / (b - a) and (b - a == 1 or a % 2 == 0)  # a double step is one of 8 steps
    recorded = set()
    for name in (name for name in CASES if CASES[name]["engine"]["distill"] and "fp8" not in name):
        dit, cfg, tensors, more = golden_run(name)
        seen, per_stage = [], cfg.num_steps // cfg.window
        hook = dit.register_forward_hook(
            lambda m, a, k, out, seen=seen: seen.append((a[1], k["d"])), with_kwargs=True
        )
        dict(magi.sample(dit, tensors["text"], tensors["text_mask"], cfg, **more))
        hook.remove()
        grid, d = magi.timestep_grid(cfg.num_steps, cfg.shortcut_mode), magi.shortcut_d(cfg.num_steps)
        for t, used in seen:
            for i in (grid[:, None] == t[t < 0.9998]).nonzero()[:, 0].tolist():
                assert used == d[i] == d[i % per_stage], (name, i)
        recorded.add(cfg.num_steps)
    assert recorded == {8, 12, 16, 32}


def test_distillation_has_gradients_in_the_student_only():
    student, teacher, loss = distillation()
    teacher.requires_grad_()
    average = copy.deepcopy(student)
    for num_steps in (64, 32, 8):
        student.zero_grad()
        calls = calls_of(student)
        loss(num_steps, average=average).backward()
        assert sum(p.grad.abs().sum() for p in student.parameters() if p.grad is not None) > 0
        assert len(calls) == 1  # the half steps were the average's
        assert all(p.grad is None for dit in (teacher, average) for p in dit.parameters())
        student._forward_hooks.clear()
    student.zero_grad()
    calls = calls_of(student)
    loss(8).backward()  # its own half steps
    assert [call["v"].requires_grad for call in calls] == [False, False, True]


def test_distillation_overfits_a_batch():
    """Guided velocities of a teacher, and consistency on top, learned for one batch."""
    student, teacher, loss = distillation(n=2)
    student.load_state_dict(teacher.state_dict())
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3)
    before = {n: loss(n).item() for n in (64, 8)}
    learned = lambda: all(loss(n).item() < 0.2 * before[n] for n in before)
    for step in range(240):
        if step % 40 == 39 and learned():
            break
        optimizer.zero_grad()
        loss(64 if step % 4 else 8).backward()
        optimizer.step()
    assert learned(), (before, [loss(n).item() for n in before])
