"""Training MAGI-1: the objectives of the report (sections 2.1, 2.3 and 2.5), low-rank adaptation, the loop.

    python training.py lora --model models/4.5B-base --data clips/ --out my.safetensors    (see finetune.py)

Contents
    1  Clips under noise            draw_prefix, draw_times, corrupt: what both objectives of the DiT share
    2  Flow matching over chunks    flow_matching_loss: one objective for text, image and video to video
    3  The VAE                      vae_loss: L1 + KL
    4  Shortcut distillation        shortcut_loss: many steps, three branches into few steps, one branch
    5  LoRA                         add_lora, save_lora, load_lora, merge_lora; files of other programs
    6  The training loop            fit: rates, checkpoints, log; a killed run goes on to the same result

Both objectives for the DiT have the same shape. `draw_prefix` decides how many leading frames of each clip
are given, then each chunk gets a time, then `corrupt` makes a `Corrupted` batch of them (noise, text, what
each chunk sees), and the loss is the mean square of the model's answer minus its target:

    clip --draw_prefix--> Clips --times--> --corrupt--> Corrupted --DiT--> v    loss = mean |v - target|^2

The official project ships no training code. What the report leaves open is our choice; such choices are
marked "(not in the report)"; those that say how a clip is corrupted are fields of TrainingConfig.

Symbols as in magi.py: B clips in a batch, n chunks of a clip, T = 6 n latent frames; t is 0 for noise and 1
for clean. kv_range counts the chunks that a chunk sees, itself included; first_seen is the oldest of them.
"""

# ruff: noqa: E402
from __future__ import annotations

import terminal

if __name__ == "__main__":
    terminal.begin()                                                         # before PyTorch is imported

import contextlib
import csv
import dataclasses
import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import outputs
import parallel
from checkpoints import compare_headers, read_headers, read_json, reading, require
from magi import (
    CHUNK,
    VAE,
    DiT,
    FP8Linear,
    SamplerConfig,
    clean_kv_range,
    guidance_scales,
    kv_range,
    shift_time,
    shortcut_d,
    timestep_grid,
)

__all__ = ["AdamW", "EXPORT_NAMES", "LoRA", "TrainingConfig", "add_lora", "check_lora", "distilled",
           "draw_times", "export_lora", "finish_gradients", "fit", "flow_matching_loss", "gathered",
           "guided_velocity", "load_lora", "lora_metadata", "lora_off", "lora_sampler", "lora_targets",
           "loras", "merge_lora", "plot_loss", "read_log", "save_lora", "scale_lora", "shortcut_loss",
           "shortcut_steps", "timestep_law", "two_half_steps", "vae_loss"]

# ----------------------------------------------------------------------------------------------------------
# 1  Clips under noise
# ----------------------------------------------------------------------------------------------------------
# What both objectives share. Every random number comes from one generator on the CPU, so a training step is
# the same on every device.


@dataclass(frozen=True)
class TrainingConfig:
    """How a clip is corrupted. Our choices (not in the report), but for the 5 % noise.

    Clips at a moment of the pipeline spend half their time below t = 0.1; the others follow `timestep_law`.
    """

    image_share: float = 0.15         # clips that begin with one given frame (image to video)
    video_share: float = 0.35         # clips that begin with more: part of a chunk, or whole ones and part
    whole_share: float = 0.0          # of these, the ones that begin with whole chunks
    pipeline_share: float = 0.5       # clips timed as a moment of the sampler's pipeline; the rest: the law
    entering_share: float = 0.0       # of these, the ones whose last chunk is in its first stage
    null_share: float = 0.15          # clips that lose their captions, for the branches without text
    clean_noise: float = 0.05         # most noise a clean chunk carries: generated history is not perfect
    ranges_share: float = 0.9         # clips under the sampler's kv_ranges; the rest see only themselves


class Clips(NamedTuple):
    """A batch of clips on one device, and how much of each is given."""

    latents: Tensor                   # (B, 16, T, H, W), scaled
    text: Tensor                      # (B, n, L, C), with its special tokens
    mask: Tensor                      # (B, n, L)
    prefix_frames: Tensor             # (B,) leading latent frames that are given, on the CPU

    @property
    def prefix_chunks(self) -> Tensor:                                       # (B,)
        return self.prefix_frames // CHUNK

    @property
    def in_prefix(self) -> Tensor:                                           # (B, n) bool, whole chunks
        return torch.arange(self.text.shape[1]) < self.prefix_chunks[:, None]


@dataclass
class Corrupted:
    """A batch as the model is shown it, made by `corrupt`, and what its velocity is compared with."""

    x: Tensor                         # (B, 16, T, H, W) clips with noise
    t: Tensor                         # (B, n) time of each chunk
    first_seen: Tensor                # (B, n) the oldest chunk that each attends to
    conditional: Tensor               # (B, n) bool: is it shown its caption, or null text?
    captions: tuple[Tensor, Tensor]   # text (B, n, L, C), mask (B, n, L), as given; see text_for
    is_clean: Tensor                  # (B, n) bool, on the CPU
    pasted: Tensor                    # (B, 1, T, 1, 1) bool: given frames that stand in a noisy chunk
    v: Tensor                         # (B, 16, T, H, W) data - noise

    def text_for(self, dit: DiT) -> tuple[Tensor, Tensor]:
        """Text and mask as this model is shown them: its own null text where there is no caption."""
        return with_null_text(dit, *self.captions, ~self.conditional)

    def mean_square(self, error: Tensor) -> Tensor:
        """Mean of error^2 over the frames of noisy chunks that were not given. All places count alike: if the
        objects of the data counted more, the network would see one wherever one may be, and where there
        are two likely places for one ball two would appear."""
        counts = (_per_frame(~self.is_clean, error) * ~self.pasted).expand_as(error)
        return (counts * error**2).sum() / counts.sum().clamp(min=1)


def draw_prefix(dit: DiT, latents: Tensor, text: Tensor, text_mask: Tensor, images: Tensor | None,
                cfg: TrainingConfig, generator: torch.Generator | None) -> Clips:
    """A batch, checked and on one device. No frame of a clip is given (text to video), or one (an image,
    which takes the place of the clip's own first latent), or many (a video)."""
    (B, _, T, _, _), n = latents.shape, latents.shape[2] // CHUNK
    fits = text.shape == (B, n, *dit.null_text.shape) and text_mask.shape == text.shape[:3]
    require(T % CHUNK == 0 and fits,
            f"latents {tuple(latents.shape)} need {CHUNK} frames per chunk and text "
            f"{(B, n, *dit.null_text.shape)} with its mask; text is {tuple(text.shape)}, text_mask "
            f"{tuple(text_mask.shape)}")
    task = torch.rand(B, generator=generator)
    length = torch.rand(B, generator=generator)
    most = T - 1                                                             # something is left to predict
    video = (2 + length * (most - 1)).long().clamp(max=most)
    if cfg.whole_share and n > 1:
        is_whole = torch.rand(B, generator=generator) < cfg.whole_share
        video = torch.where(is_whole, CHUNK * (1 + (length * (n - 1)).long().clamp(max=n - 2)), video)
    is_image = task < cfg.image_share
    is_video = ~is_image & (task < cfg.image_share + cfg.video_share)
    prefix_frames = torch.where(is_image, 1, video * is_video)
    if images is not None:
        require(images.shape == latents[:, :, :1].shape, f"images {tuple(images.shape)} are not one latent "
                f"frame for each of latents {tuple(latents.shape)}")
        has_image = (prefix_frames == 1).to(images.device).view(-1, 1, 1, 1, 1)
        first = torch.where(has_image, images, latents[:, :, :1])
        latents = torch.cat([first, latents[:, :, 1:]], dim=2)
    return Clips(latents, text.to(latents.device), text_mask.to(latents.device), prefix_frames)


def timestep_law(*shape: int, generator: torch.Generator | None = None) -> Tensor:
    """Training times: logit-normal (m 0, s 0.5), shifted towards the noise; about 70 % lie below t = 0.3."""
    return shift_time(torch.sigmoid(0.5 * torch.randn(*shape, generator=generator)))


def pipeline_stages(batch: int, n: int, prefix_chunks: Tensor, window: int, entering_share: float = 0.0,
                    generator: torch.Generator | None = None) -> Tensor:
    """A random moment of the pipeline: how many stages (a real number) each chunk has gone through, (B, n).

    Below 0: it has not entered. From `window` on: it is clean. The chunks are exactly one stage apart, and
    the last one is still in flight; with a window of 4 a clip of four chunks may be at 3.5, 2.5, 1.5, 0.5.

    `entering_share` of the clips are at a moment at which the last chunk has just entered. Before its first
    stage is over it has to find out from those before it where things are and how fast they move; left to
    chance, few clips with a clean history show that moment, and a small model never learns to.
    """
    later = torch.arange(n) - prefix_chunks[:, None]                         # (B, n) 0: first noisy chunk
    moment = torch.rand(batch, 1, generator=generator)
    first = moment * (window - 1 + n - prefix_chunks[:, None])
    if entering_share:
        enters = torch.rand(batch, 1, generator=generator) < entering_share
        first = torch.where(enters, later[:, -1:] + moment, first)
    return first - later


def draw_times(batch: int, n: int, prefix_chunks: Tensor, cfg: TrainingConfig, sampler: SamplerConfig,
               generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Times (B, n), non-increasing along each clip, and which chunks are clean (B, n) bool.

    prefix_chunks (B,) whole chunks are given. A share of the clips take a moment of the pipeline, the others
    draws of the law, for example

        no prefix, the law                         .31   .12   .05
        no prefix, 3.5, 2.5 and 1.5 stages done    .52   .18   .05
        no prefix, 4.5, 3.5 and 2.5 stages done    clean .52   .18
        one prefix chunk, the law                  clean .12   .05
    """
    in_prefix = torch.arange(n) < prefix_chunks[:, None]
    # Earlier chunks are cleaner. Sorting leaves the distribution of all times as it is.
    law = timestep_law(batch, n, generator=generator).masked_fill(in_prefix, 1)
    law = law.sort(dim=1, descending=True).values
    stages = pipeline_stages(batch, n, prefix_chunks, sampler.window, cfg.entering_share, generator)
    moment = shift_time((stages / sampler.window).clamp(0, 1) ** 2)
    # A chunk that would not have entered yet still gets some time, or its place in the batch would be wasted.
    moment = torch.where(stages < 0, law, moment).cummin(dim=1).values
    at_moment = torch.rand(batch, 1, generator=generator) < cfg.pipeline_share
    is_clean = in_prefix | at_moment & (stages >= sampler.window)
    t = torch.where(at_moment, moment, law)
    return t.masked_fill(is_clean, sampler.clean_t), is_clean


def corrupt(clips: Clips, t: Tensor, is_clean: Tensor, kv_ranges: Tensor, cfg: TrainingConfig,
            sampler: SamplerConfig, generator: torch.Generator | None, null_share: float | None = None
            ) -> Corrupted:
    """Noise, text and attention ranges of a batch.

    t, is_clean and kv_ranges (how many chunks each sees while it is noisy) are (B, n), on the CPU.
    null_share: how many of the clips lose all captions; None: none, and nothing is drawn for it.
    """
    latents, (B, n) = clips.latents, t.shape
    device = latents.device

    # Each chunk is noised to its t; a clean one a little, whatever t the model is told; given frames of a
    # noisy chunk not at all.
    level = 1 - cfg.clean_noise * torch.rand(B, n, generator=generator)
    level = _per_frame(torch.where(is_clean, level, t), latents)             # share of data in x
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    pasted = torch.arange(n * CHUNK) < clips.prefix_frames[:, None]          # (B, T)
    pasted = (pasted & ~is_clean.repeat_interleave(CHUNK, 1)).to(device)[:, None, :, None, None]
    x = torch.where(pasted, latents, (1 - level) * noise + level * latents)

    # Clean chunks carry null text, as in the sampler, where it keeps their keys free of any caption.
    conditional = ~is_clean
    if null_share is not None:
        conditional = conditional & (torch.rand(B, 1, generator=generator) >= null_share)

    # Clean chunks have ranges of their own; some clips see no history, for the branch without.
    for which, prefix in ((is_clean, False), (clips.in_prefix, True)):
        kv_ranges = torch.where(which, int(min(n, clean_kv_range(sampler, prefix))), kv_ranges)
    alone = torch.rand(B, 1, generator=generator) >= cfg.ranges_share
    kv_ranges = torch.where(alone, 1, kv_ranges)
    first_seen = (torch.arange(n) - kv_ranges + 1).clamp(min=0)
    return Corrupted(x, t.to(device), first_seen, conditional.to(device), (clips.text, clips.mask), is_clean,
                     pasted, latents - noise)


def _per_frame(u: Tensor, x: Tensor) -> Tensor:
    """One number a chunk (B, n) -> one a frame, to multiply x: (B, 1, T, 1, 1)."""
    return u.repeat_interleave(CHUNK, dim=1).to(x)[:, None, :, None, None]


def with_null_text(dit: DiT, text: Tensor, mask: Tensor, without: Tensor) -> tuple[Tensor, Tensor]:
    """Text (B, n, L, C) and mask (B, n, L): null text where `without` (B, n) or where a caption is empty."""
    without = (without.to(mask.device) | ~mask.bool().any(-1))[..., None]    # (B, n, 1)
    null_mask = (torch.arange(mask.shape[-1], device=mask.device) < dit.cfg.null_length).to(mask)
    text = torch.where(without[..., None], dit.null_text.to(text), text)
    return text, torch.where(without, null_mask, mask)


# ----------------------------------------------------------------------------------------------------------
# 2  Flow matching over chunks
# ----------------------------------------------------------------------------------------------------------


def kv_ranges_of_times(t: Tensor, sampler: SamplerConfig) -> Tensor:
    """How many chunks a noisy chunk sees at its t, as in the sampler: (B, n) -> (B, n)."""
    ranges = sampler.kv_ranges or (t.shape[1],)
    edges = shift_time((torch.arange(1, len(ranges)) / len(ranges)) ** 2)    # the t where each part begins
    return torch.tensor(ranges)[torch.bucketize(t, edges, right=True)]


def flow_matching_loss(dit: DiT, latents: Tensor, text: Tensor, text_mask: Tensor,
                       cfg: TrainingConfig = TrainingConfig(), sampler: SamplerConfig = SamplerConfig(),
                       images: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
    """E || v_theta(x_i^{t_i} | t_i, text, {x_j, j < i}) - (data_i - noise_i) ||^2 over noisy chunks.

    latents (B, 16, T, H, W), scaled, T = 6 n; text (B, n, L, C) with its special tokens, text_mask (B, n, L):
    one caption per chunk. Text, image and video to video are one objective (report 2.3): they differ in how
    many clean frames lead. Gradients flow through the clean chunks too (stopping them hurts much, says the
    report). Draws come from `generator` (on the CPU). The scalar loss is a mean over the elements that count.

    images (B, 16, 1, H, W): a frame of each clip encoded alone, as the sampler encodes the image of image to
    video; best the fourth, the last that a first latent stands for. Without it the clip's own first latent
    takes that place, which tells more than an image can: its four frames move.
    """
    clips = draw_prefix(dit, latents, text, text_mask, images, cfg, generator)
    B, n = clips.text.shape[:2]
    t, is_clean = draw_times(B, n, clips.prefix_chunks, cfg, sampler, generator)
    kv_ranges = kv_ranges_of_times(t, sampler)
    batch = corrupt(clips, t, is_clean, kv_ranges, cfg, sampler, generator, cfg.null_share)
    # An empty caption is null text too, but keeps the flag of a caption, as in the sampler.
    v = dit(batch.x, batch.t, *batch.text_for(dit), first_seen=batch.first_seen,
            conditional=batch.conditional)
    return batch.mean_square(v - batch.v)


# ----------------------------------------------------------------------------------------------------------
# 3  The VAE
# ----------------------------------------------------------------------------------------------------------


def vae_loss(vae: VAE, video: Tensor, weight: Tensor | None = None, kl_weight: float = 1e-6,
             latent_noise: Tensor | None = None, generator: torch.Generator | None = None
             ) -> tuple[Tensor, Tensor]:
    """L1 + KL (report 2.1, without LPIPS and GAN terms): video (B, 3, frames, h, w) -> loss, reconstruction.

    weight (B, 1, frames, h, w) makes some pixels count more; the mean of |error| * weight is taken as it is.
    latent_noise (B,) adds noise of that size, in deviations of a channel, to what is decoded: ours, for small
    models. Latents then say coarsely what matters most, and the DiT's own errors do less harm.
    """
    mean, logvar = vae.moments(video)
    spread = (0.5 * logvar).exp()
    if latent_noise is not None:
        deviation = mean.detach().std(dim=(0, 2, 3, 4), keepdim=True)
        spread = (spread**2 + (latent_noise.to(mean).view(-1, 1, 1, 1, 1) * deviation) ** 2).sqrt()
    recon = vae.decoder(mean + spread * torch.randn(mean.shape, generator=generator).to(mean))
    if video.shape[2] == 1:
        recon = recon[:, :, :1]
    error = (recon.float() - video).abs()
    kl = 0.5 * (mean.float() ** 2 + logvar.float().exp() - 1 - logvar.float())
    return (error if weight is None else error * weight).mean() + kl_weight * kl.mean(), recon


# ----------------------------------------------------------------------------------------------------------
# 4  Shortcut distillation
# ----------------------------------------------------------------------------------------------------------
# Report section 2.5, after Frans et al. 2024. The student is also told its step size s, as d = 1/(2s)
# (`shortcut_d`), and learns to go in one step as far as it went in two of half the size:
#
#     x' = x + dt1 v(x, t, s)
#     v(x, t, 2s) := [dt1 v(x, t, s) + dt2 v(x', t + dt1, s)] / (dt1 + dt2)
#
# dt1 and dt2 differ, as the time grid is not uniform. At the smallest step the target is the teacher's guided
# velocity, so three branches become one as well. Ours (not in the report): the corruption of a clip
# (TrainingConfig, as for the base model) and that all chunks of a clip are at a moment of the pipeline.

SHORTCUT_CYCLE = (64,) * 8 + (32, 16, 8)   # 1/s of one training step after the other, over and over


def shortcut_steps(step: int, cycle: Sequence[int] = SHORTCUT_CYCLE) -> int:
    """How many steps from noise to clean the student learns in training step `step`: 64, 32, 16 or 8."""
    return cycle[step % len(cycle)]


def two_half_steps(velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, times: Sequence[Tensor],
                   paste: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """Mean velocity of two Euler steps: the right side of the formula above, (B, 16, T, H, W).

    velocity(x, t) is asked twice; times: start, middle and end, each (B, n). Where they do not move (a clean
    chunk) the answer is 0. paste(x') restores given frames, as the sampler does after each step.
    """
    start, middle, end = times
    dt1, dt2 = _per_frame(middle - start, x), _per_frame(end - middle, x)
    first = velocity(x, start)
    second = velocity(paste(x + dt1 * first), middle)
    return (dt1 * first + dt2 * second) / (dt1 + dt2).clamp(min=1e-9)


def guided_velocity(dit: DiT, x: Tensor, t: Tensor, text: Tensor, text_mask: Tensor, is_clean: Tensor,
                    first_seen: Tensor, sampler: SamplerConfig) -> Tensor:
    """What the sampler makes of a base model's three branches (magi.py, section 8), for a batch of clips.

    x (B, 16, T, H, W), t, is_clean and first_seen (B, n), text (B, n, L, C) -> (B, 16, T, H, W). Clean chunks
    have the unconditional flag in every branch: the sampler's cache holds their keys from such a branch.
    """
    conditional, never = ~is_clean, torch.zeros_like(is_clean)
    alone = torch.arange(t.shape[1]).expand(t.shape)
    branches = ((conditional, first_seen), (never, first_seen), (never, alone))  # text, previous, nothing
    texts, masks = zip(*(with_null_text(dit, text, text_mask, ~which) for which, _ in branches), strict=True)
    v = dit(torch.cat([x] * 3), t.repeat(3, 1), torch.cat(texts), torch.cat(masks),
            first_seen=torch.cat([seen for _, seen in branches]),
            conditional=torch.cat([which for which, _ in branches]).to(x.device))
    with_text, previous, nothing = v.chunk(3)
    scales = torch.tensor([[guidance_scales(sampler, u) for u in clip] for clip in t.tolist()])  # (B, n, 2)
    w_prev, w_text = (_per_frame(w, x) for w in scales.unbind(-1))
    return (1 - w_prev) * nothing + (w_prev - w_text) * previous + w_text * with_text


def draw_moment(batch: int, n: int, sampler: SamplerConfig, generator: torch.Generator | None) -> Tensor:
    """A random step of the pipeline at which the last chunk of a clip is in flight: how many steps of its own
    each chunk has done, (B, n). From num_steps on it is clean; neighbours are one stage apart."""
    per_stage = sampler.num_steps // sampler.window
    stage_of_last = torch.randint(sampler.window, (batch, 1), generator=generator)
    step_of_stage = torch.randint(per_stage, (batch, 1), generator=generator)
    stages = stage_of_last + torch.arange(n - 1, -1, -1)                     # (B, n)
    return stages * per_stage + step_of_stage


def shortcut_loss(student: DiT, teacher: DiT, latents: Tensor, text: Tensor, text_mask: Tensor,
                  num_steps: int, cfg: TrainingConfig = TrainingConfig(),
                  sampler: SamplerConfig = SamplerConfig(), average: DiT | None = None,
                  images: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
    """|| v_student(x, t, s) - target ||^2 over noisy chunks, for s = 1/num_steps (see `shortcut_steps`).

    latents, text, text_mask, images, generator: as in flow_matching_loss. teacher: the base model,
    sampled as `sampler` says (its guidance and ranges); it may be the student itself if that is a base model
    with a LoRA (`add_lora`), which is then taken off while it teaches: one copy in memory. average: whose
    half steps are the target, such as a moving average of the student; default: the student's own. No
    gradient reaches any target. Not used: pipeline_share and null_share of `cfg`, negative tokens and shot
    transitions of `sampler`.

    Every clip is at a moment of the pipeline at which its last chunk is in flight. Earlier moments are those
    of shorter clips, so train on clips of 1, 2, ... chunks. The student sees what it will see in the sampler:
    null text for clean chunks only, its conditional flag and one d for all; clips of one chunk and those that
    see no history (cfg.ranges_share) teach it the run "alone" of the oldest chunk.
    """
    halvings = [max(SHORTCUT_CYCLE) >> i for i in range(7)]
    require(num_steps in halvings, f"num_steps {num_steps} is not one of {halvings}")
    sampler = dataclasses.replace(sampler, num_steps=num_steps)
    clips = draw_prefix(student, latents, text, text_mask, images, cfg, generator)
    B, n = clips.text.shape[:2]
    done = draw_moment(B, n, sampler, generator)
    is_clean = clips.in_prefix | (done >= num_steps)

    def times(steps: int, i: Tensor) -> Tensor:
        """Entry i (B, n) of the grid of so many steps, on the CPU."""
        return torch.where(is_clean, sampler.clean_t, timestep_grid(steps)[i.clamp(max=steps)])

    ranges = torch.tensor([int(min(n, kv_range(sampler, i))) for i in range(num_steps)])
    kv_ranges = ranges[done.clamp(max=num_steps - 1)]                        # (B, n)
    batch = corrupt(clips, times(num_steps, done), is_clean, kv_ranges, cfg, sampler, generator)

    def velocity(dit: DiT, steps: int) -> Callable[[Tensor, Tensor], Tensor]:
        """v(x, t, 1/steps) of a distilled model, as a function of x and t."""
        shown = batch.text_for(dit)
        d = shortcut_d(steps)[0]
        return lambda x, t: dit(x, t.to(x.device), *shown, first_seen=batch.first_seen, d=d)

    with torch.no_grad():
        if num_steps == max(SHORTCUT_CYCLE):
            with lora_off(teacher) if teacher is student else contextlib.nullcontext():
                target = guided_velocity(teacher, batch.x, batch.t, clips.text, clips.mask, is_clean,
                                         batch.first_seen, sampler)
        else:
            halves = [times(2 * num_steps, 2 * done + k) for k in range(3)]
            paste = lambda x: torch.where(batch.pasted, clips.latents, x)
            target = two_half_steps(velocity(average or student, 2 * num_steps), batch.x, halves, paste)
    v = velocity(student, num_steps)(batch.x, batch.t)
    return batch.mean_square(v - target)


# ----------------------------------------------------------------------------------------------------------
# 5  LoRA
# ----------------------------------------------------------------------------------------------------------
# A low-rank part (Hu et al. 2021) is the affordable way in for a real checkpoint: once it is there, both
# objectives above train it alone. It hangs on every linear layer of the blocks as a child named "lora", so
# the weights of the model keep their names.


class LoRA(nn.Module):
    """What is added to a linear layer's output: scale * up(down(x)), nothing until it is trained.

    Float32 whatever the layer's type: small updates would be lost in bf16. It is a hook rather than a
    wrapper, so that names stay as they are and layers with fp8 weights can have one too.
    """

    def __init__(self, linear: nn.Module, rank: int):
        super().__init__()
        weight: Any = linear.weight
        (n_out, n_in), device = weight.shape, weight.device
        self.down = nn.Parameter(torch.randn(rank, n_in, device=device) * n_in**-0.5)
        self.up = nn.Parameter(torch.zeros(n_out, rank, device=device))
        self.scale = 1.0
        self.handle = linear.register_forward_hook(_add_lora_output)

    def forward(self, x: Tensor) -> Tensor:                                  # (..., in) -> (..., out)
        return self.scale * F.linear(F.linear(x.float(), self.down), self.up)


def _add_lora_output(linear: nn.Module, args: tuple, out: Tensor) -> Tensor:
    """A forward hook; the layer is called with (x, ops)."""
    return (out + linear.lora(args[0])).to(out.dtype)


def lora_targets(dit: DiT) -> dict[str, nn.Module]:
    """The layers that get one: every linear of the blocks, by name."""
    return {name: m for name, m in dit.named_modules()
            if name.startswith("layers.") and isinstance(m, nn.Linear | FP8Linear)}


def loras(dit: DiT) -> list[LoRA]:
    return [m for m in dit.modules() if isinstance(m, LoRA)]


def add_lora(dit: DiT, rank: int) -> DiT:
    """Freeze a DiT and give it a LoRA, the only part left to train: `[p for p in dit.parameters() if
    p.requires_grad]`. Changes the model in place; ValueError if it has one already."""
    require(rank >= 1, f"LoRA rank {rank} must be at least 1")
    require(not loras(dit), "the model has a LoRA already: merge_lora it first")
    dit.requires_grad_(False)
    for linear in lora_targets(dit).values():
        linear.lora = LoRA(linear, rank)
    return dit


def scale_lora(dit: DiT, scale: float) -> None:
    """How strongly what was added acts: 1 as it was loaded or trained, 0 not at all."""
    for lora in loras(dit):
        lora.scale = scale


@contextlib.contextmanager
def lora_off(dit: DiT) -> Iterator[None]:
    """The model without its LoRA, for the length of a `with` block."""
    before = [lora.scale for lora in loras(dit)]
    scale_lora(dit, 0.0)
    try:
        yield
    finally:
        for lora, scale in zip(loras(dit), before, strict=True):
            lora.scale = scale


@torch.no_grad()
def merge_lora(dit: DiT) -> DiT:
    """Add the LoRA to the weights and take it off: the same velocities, at the speed of the plain model.

    ValueError for fp8 layers, whose e4m3 steps are coarser than what a LoRA adds: use it unmerged there.
    """
    targets = [linear for linear in lora_targets(dit).values() if hasattr(linear, "lora")]
    require(not any(isinstance(linear, FP8Linear) for linear in targets),
            "a LoRA cannot be merged into fp8 weights, whose steps are coarser than what it adds: use it "
            "unmerged, or merge it into the bf16 model")
    for linear in targets:
        lora = linear.lora
        linear.weight.copy_(linear.weight.float() + lora.scale * lora.up @ lora.down)
        lora.handle.remove()
        del linear.lora
    return dit


def save_lora(dit: DiT, file: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write the LoRA alone: LAYER.lora.down (rank, in) and LAYER.lora.up (out, rank), in safetensors.

    The header says the rank and alpha (they are equal: nothing is rescaled) besides `metadata`, such as the
    base model and prompts. The scale at which a LoRA acts goes into `up`.
    """
    require(loras(dit), "the model has no LoRA to save: save it before it is merged")
    rank = str(max(len(lora.down) for lora in loras(dit)))
    tensors: dict[str, Tensor] = {}
    for name, linear in lora_targets(dit).items():
        if hasattr(linear, "lora"):
            lora: Any = linear.lora
            down, up = lora.down.detach(), lora.up.detach() * lora.scale
        else:                            # a file of ours has all layers: nothing is added to this one
            weight: Any = linear.weight
            down, up = torch.zeros(1, weight.shape[1]), torch.zeros(weight.shape[0], 1)
        tensors |= {f"{name}.lora.down": down, f"{name}.lora.up": up}
    outputs.save(tensors, file, {"format": "pt", "rank": rank, "alpha": rank} | (metadata or {}))


# Files of other programs are read where their names mean layers of this model. A name is a prefix, a layer
# (layers.I.attn.q, .k, .v, .qx, .kvx, .proj, layers.I.ffn.fc1, .fc2, layers.I.gates, or the official name)
# and a part:
#
#                     prefix                               layer                part
#     ours            none                                 layers.0.attn.q      .lora.down   .lora.up
#     PEFT            base_model.model.                    the same             .lora_A.weight, .lora_B.weight
#     diffusers       transformer.                         the same             the same, or .lora.down.weight
#     ComfyUI         diffusion_model.                     the same             any of these
#     kohya           lora_unet_ or lora_transformer_      layers_0_attn_q      .lora_down.weight ..., .alpha
#
# What is added is alpha / rank * up(down(x)). Alpha is the tensor LAYER.alpha, or lora_alpha (with use_rslora
# and alpha_pattern) of the adapter_config.json beside a PEFT file, or the same in the header of a diffusers
# file; where nobody says it, it equals the rank. A file of ours must have all layers, another may have some.

LORA_NAMES = re.compile(
    r"(?:(?:base_model\.model|transformer|diffusion_model|model|dit|module)\.|lora_unet_|lora_transformer_)*"
    r"(?P<layer>.+?)\.(?:"
    r"(?P<down>lora\.down|lora_A(?:\.default)?\.weight|(?:lora_|lora\.|lora_linear_layer\.)down\.weight)|"
    r"(?P<up>lora\.up|lora_B(?:\.default)?\.weight|(?:lora_|lora\.|lora_linear_layer\.)up\.weight)|"
    r"(?P<alpha>alpha))")
OTHER_KINDS = {"hada_": "LoHa", "lokr_": "LoKr", "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA",
               "lora_mid": "LoCon", "oft_": "OFT", r"\.diff(_b)?$": "whole differences of weights"}


def lora_layers(dit: DiT, file: str | Path) -> dict[str, dict[str, str]]:
    """Layer of ours -> {"down": name in the file, "up": ..., perhaps "alpha": ...}, from the header alone.

    Layers may have our names or the official ones (those from "videodit_blocks" on). ValueError if one is of
    no layer here, if a factor is missing or has another shape, or if the file is no LoRA of this kind.
    """
    refuse_folder(file)
    found, targets = read_headers([file]), lora_targets(dit)
    matches = {name: LORA_NAMES.fullmatch(name) for name in found}
    for name in sorted(name for name, m in matches.items() if m is None):
        kind = next((kind for part, kind in OTHER_KINDS.items() if re.search(part, name)), "unknown")
        require(kind == "unknown" and not any(matches.values()),
                f"the LoRA {str(file)!r} has {name!r}, whose kind is {kind}: only pairs of low-rank factors "
                f"can be loaded (PEFT, diffusers, kohya and Comfy write such files)")
    require(any(m and not m["alpha"] for m in matches.values()),
            f"{str(file)!r} is no LoRA: it has {len(found)} tensor(s), such as "
            f"{min(found, default=None)!r}")
    ours = {name.replace(".", "_"): name for name in targets}
    if any("videodit_blocks" in name for name in found):
        ours |= {name.replace(".", "_"): our for our, name in official_layers(targets).items()}
    layers: dict[str, dict[str, str]] = {}
    for name, m in matches.items():
        assert m is not None and m.lastgroup is not None
        layer = ours.get(m["layer"].replace(".", "_"))
        require(layer, f"the LoRA {str(file)!r} is for another model: this one has no layer {m['layer']!r}")
        layers.setdefault(str(layer), {})[m.lastgroup] = name
    own = all(name.endswith((".lora.down", ".lora.up")) for name in found)   # it must have all layers
    expected: dict[str, tuple] = {}
    for layer in targets if own else layers:
        names, weight = layers.get(layer, {}), targets[layer].weight
        down, up = (names.get(part, f"{layer}.lora.{part}") for part in ("down", "up"))
        rank = (found.get(down, ((1,), False))[0] or (1,))[0]
        expected |= {down: ((rank, weight.shape[1]), False), up: ((weight.shape[0], rank), False)}
    factors = {name: header for name, header in found.items() if not matches[name]["alpha"]}
    for name in sorted(found.keys() - factors.keys()):
        shape = found[name][0]
        require(math.prod(shape) == 1,
                f"the LoRA {str(file)!r} has {name!r} of shape {shape}, but alpha is one number")
    compare_headers(factors, expected, f"the LoRA {str(file)!r} is for another model")
    return layers


def official_layers(targets: Iterable[str]) -> dict[str, str]:
    """Our name of a layer -> the official one."""
    from convert_weights import DIT_MODULES

    official = {ours: theirs for theirs, (ours, *_) in DIT_MODULES.items()}
    names = {}
    for target in targets:
        _, index, rest = target.split(".", 2)
        names[target] = official[f"layers.{{}}.{rest}"].format(index)
    return names


def refuse_folder(file: str | Path) -> None:
    require(not Path(file).is_dir(), f"LoRA {str(file)!r} is a folder: name the file in it, of PEFT "
            f"{str(Path(file) / 'adapter_model.safetensors')!r}")


def lora_metadata(file: str | Path) -> dict[str, str]:
    """What the header of a LoRA file says of it: base_model, rank, alpha and prompts, if we wrote it."""
    from safetensors import safe_open

    refuse_folder(file)
    with reading("LoRA", file), safe_open(file, "pt") as f:
        return f.metadata() or {}


def distilled(sampler: SamplerConfig) -> SamplerConfig:
    """How a base model is sampled once `training.py distill` has made it one of few steps and one branch."""
    return sampler if sampler.distilled else dataclasses.replace(sampler, distilled=True, num_steps=16)


def lora_sampler(sampler: SamplerConfig, files: Iterable[str | Path]) -> SamplerConfig:
    """How a model is sampled with these LoRAs: one that was distilled distils the model, too."""
    is_distillation = any(lora_metadata(file).get("command") == "distill" for file in files)
    return distilled(sampler) if is_distillation else sampler


def lora_config(file: str | Path) -> dict:
    """Where alpha is no tensor: PEFT keeps it in a JSON beside the file, diffusers in the file's header."""
    header = json.loads(lora_metadata(file).get("lora_adapter_metadata", "{}"))
    if header:
        return {key.removeprefix("transformer."): value for key, value in header.items()}
    beside = Path(file).with_name("adapter_config.json")
    is_peft = Path(file).name.startswith("adapter_model") and beside.is_file()
    return read_json(beside, "LoRA config") if is_peft else {}


def lora_strength(config: dict, layer: str, rank: int) -> float:
    """What alpha multiplies a layer's LoRA by: 1 if nothing is said."""
    patterns = (config.get("alpha_pattern") or {}).items()
    matching = [value for pattern, value in patterns if re.fullmatch(rf"(.*\.)?({pattern})", layer)]
    alpha = matching[0] if matching else config.get("lora_alpha") or rank    # the first one, as in PEFT
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def check_lora(dit: DiT, file: str | Path) -> int:
    """The largest rank in a LoRA file, from its header. ValueError if it does not fit (meta will do)."""
    layers = lora_layers(dit, file)
    found = read_headers([file])
    return max(found[names["down"]][0][0] for names in layers.values())


def load_lora(dit: DiT, file: str | Path, scale: float = 1.0) -> DiT:
    """Add a saved LoRA to a model, in place; scale: how strongly it acts. One that is there already stays,
    and both act. Nothing of the model has gradients then; `lora.requires_grad_()` of all `loras(dit)` trains
    on. ValueError if it does not fit."""
    from safetensors.torch import load_file

    layers, targets = lora_layers(dit, file), lora_targets(dit)
    config = lora_config(file)
    tensors = load_file(file, device=str(dit.null_text.device))
    for layer, names in layers.items():
        down, up = tensors[names["down"]].float(), tensors[names["up"]].float()
        strength = lora_strength(config, layer, len(down))
        if "alpha" in names:
            strength = tensors[names["alpha"]].item() / len(down)
        if "videodit_blocks" in names["down"]:           # of the output projection we have another order
            from convert_weights import convert_dit

            name = f"{official_layers([layer])[layer]}.weight"
            (down,) = convert_dit({name: down}).values()
        extend_lora(targets[layer], down, up * strength, scale)
    return dit.requires_grad_(False)


def extend_lora(linear: nn.Module, down: Tensor, up: Tensor, scale: float) -> None:
    """Give a layer these factors, beside those that it has: two LoRAs are one whose rank is the sum."""
    if hasattr(linear, "lora"):
        old: Any = linear.lora
        down, up = torch.cat([old.down, down]), torch.cat([old.up * old.scale, up * scale], 1)
        scale = 1.0
    else:
        linear.lora = LoRA(linear, len(down))
    linear.lora.down, linear.lora.up = nn.Parameter(down), nn.Parameter(up)
    linear.lora.scale = scale


EXPORT_NAMES = {                     # format -> how it names a layer's "down" (or A) and "up" (or B)
    "peft": ("base_model.model.{layer}.lora_A.weight", "base_model.model.{layer}.lora_B.weight"),
    "diffusers": ("transformer.{layer}.lora_A.weight", "transformer.{layer}.lora_B.weight"),
    "kohya": ("lora_unet_{layer}.lora_down.weight", "lora_unet_{layer}.lora_up.weight"),
}


def export_lora(file: str | Path, out: str | Path, style: str = "peft") -> None:
    """A LoRA of ours in the names of another program: "peft", "diffusers" or "kohya".

    out: a .safetensors file; or for "peft" a folder that `PeftModel.from_pretrained` can load. Its
    adapter_config.json says rank, alpha and layers.
    """
    from safetensors.torch import load_file

    require(style in EXPORT_NAMES, f"LoRA format {style!r} is not one of {', '.join(EXPORT_NAMES)}")
    out = Path(out)
    if style == "peft" and out.suffix != ".safetensors":
        out = out / "adapter_model.safetensors"
    config_file = out.with_name("adapter_config.json")                       # for peft alone
    for path in (out, config_file) if style == "peft" else (out,):
        require(not path.exists(), f"{str(path)!r} exists: choose another --out")
    about, tensors = lora_metadata(file), load_file(file)
    require(tensors and all(name.endswith((".lora.down", ".lora.up")) for name in tensors),
            f"{str(file)!r} is no LoRA in our names, and only those can be exported")
    layers = sorted({name.split(".lora.")[0] for name in tensors})
    named: dict[str, Tensor] = {}
    for layer in layers:
        down, up = tensors[f"{layer}.lora.down"], tensors[f"{layer}.lora.up"]
        key = layer.replace(".", "_") if style == "kohya" else layer
        down_name, up_name = (name.format(layer=key) for name in EXPORT_NAMES[style])
        named |= {down_name: down, up_name: up}
        if style == "kohya":
            named[f"lora_unet_{key}.alpha"] = torch.tensor(float(len(down)))
    out.parent.mkdir(parents=True, exist_ok=True)
    outputs.save(named, out, about)
    if style == "peft":
        ranks = {layer: len(tensors[f"{layer}.lora.down"]) for layer in layers}
        rank = max(ranks.values())
        others = {layer: r for layer, r in ranks.items() if r != rank}
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "rank_pattern": others,
                  "alpha_pattern": others, "target_modules": layers, "bias": "none", "inference_mode": True,
                  "base_model_name_or_path": about.get("base_model")}
        config_file.write_text(json.dumps(config, indent=1) + "\n")


# ----------------------------------------------------------------------------------------------------------
# 6  The training loop
# ----------------------------------------------------------------------------------------------------------
# One loop for every stage of tiny/train.py and for fine-tuning. What a step computes depends on its number
# alone, so a run that was killed goes on from its last checkpoint to the same result.
#
# Several processes (torchrun) share the forwards of a step. What they train is of two kinds: sharded weights,
# of which each process has a part (DTensor, made by PyTorch's fully_shard, which averages their gradients
# too), and weights that each has whole, whose gradients are averaged here. Log and checkpoint are those of
# one process.


def is_sharded(tensor: Any) -> bool:
    """Is it a DTensor, of which this process has a shard?"""
    return hasattr(tensor, "to_local")


def sum_of_all(value: float) -> float:
    """The sum of what each process gives."""
    if parallel.ranks() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item()


def finish_gradients(params: Sequence[nn.Parameter]) -> float:
    """Average the gradients over all processes, and shorten them to a norm of at most 1 together; the norm
    that they had."""
    if parallel.ranks() == 1:
        return nn.utils.clip_grad_norm_(params, 1.0).item()
    used = torch.tensor([float(p.grad is not None) for p in params])
    dist.all_reduce(used)                                # what is unused here may have been used elsewhere
    for p, anywhere in zip(params, used.tolist(), strict=True):
        if anywhere and p.grad is None:
            p.grad = torch.zeros_like(p)
    grads: list[Any] = [p.grad for p in params if p.grad is not None]
    shards = [grad.to_local() for grad in grads if is_sharded(grad)]
    whole = [grad for grad in grads if not is_sharded(grad)]
    mean = torch.cat([grad.flatten().float() for grad in whole])             # one message for all of them
    dist.all_reduce(mean)
    mean /= parallel.ranks()
    for grad, values in zip(whole, mean.split([grad.numel() for grad in whole]), strict=True):
        grad.copy_(values.view_as(grad))
    of_shards = sum_of_all(float(sum(shard.float().square().sum() for shard in shards)))
    norm = math.sqrt(of_shards + mean.square().sum().item())
    for grad in shards + whole:
        grad.mul_(min(1.0, 1 / (norm + 1e-6)))
    return norm


def gathered(tree: Any) -> Any:
    """Dicts and lists of tensors, where sharded ones are put together. Only the first process gets them, on
    its CPU; all must call this."""
    if isinstance(tree, dict):
        return {key: gathered(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(gathered(value) for value in tree)
    if not is_sharded(tree):
        return tree
    whole = tree.full_tensor()
    return whole.cpu() if parallel.rank() == 0 else None


def like(tensor: Tensor, p: Any) -> Tensor:
    """A tensor on the device of a weight; this process's shard of it, if the weight is sharded."""
    tensor = tensor.to(p.device)
    if not is_sharded(p) or tensor.shape != p.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) whose averages are float32 whatever the weights are.

    bf16 has 8 bits: an update below 1/256 of a weight would be rounded away. So what a bf16 weight has lost
    is kept beside it, in bf16 too; the two together hold the weight to 16 bits, and small updates add up.
    """

    def __init__(self, params, lr: float, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
                 weight_decay: float = 0.1):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:        # type: ignore[override]
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros(())
                    state["mean"] = torch.zeros_like(p, dtype=torch.float32)
                    state["square"] = torch.zeros_like(p, dtype=torch.float32)
                    if p.dtype != torch.float32:
                        state["lost"] = torch.zeros_like(p)
                grad = p.grad.float()
                state["step"] += 1
                state["mean"].lerp_(grad, 1 - beta1)
                state["square"].lerp_(grad.square(), 1 - beta2)
                unbias1, unbias2 = (1 - beta ** state["step"].item() for beta in (beta1, beta2))
                update = state["mean"] / unbias1 / ((state["square"] / unbias2).sqrt() + group["eps"])
                exact = p.float() + state["lost"].float() if "lost" in state else p
                exact = exact * (1 - lr * group["weight_decay"]) - lr * update
                p.copy_(exact)
                if "lost" in state:
                    state["lost"].copy_(exact - p.float())

    def load_state_dict(self, state: dict) -> None:
        """PyTorch's own would turn the averages of bf16 weights into bf16, and take them whole."""
        super().load_state_dict(state | {"state": {}})
        params = [p for group in self.param_groups for p in group["params"]]
        for i, saved in state["state"].items():
            self.state[params[i]] = {name: like(u, params[i]) for name, u in saved.items()}


@contextlib.contextmanager
def stop_between_steps() -> Iterator[list[str]]:
    """Ctrl-C and SIGTERM within this block end no step in its middle: their names come into the list."""
    asked: list[str] = []

    def ask(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt                      # asked twice: at once
        asked.append(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield asked                                      # only the main thread may handle signals
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Checkpoint:
    """All that a run needs to go on, and the file that it is written to."""

    file: Path
    trained: dict[str, nn.Parameter]
    ema: dict[str, Tensor]               # their moving average; empty where none is kept
    optimizers: Sequence[torch.optim.Optimizer]
    step: int = 0                        # so many steps are in the file

    def read(self) -> None:
        """Go on from the file, if it is there."""
        if not self.file.exists():
            return
        with reading("checkpoint", self.file):
            several = parallel.ranks() > 1               # which take a part each
            state = torch.load(self.file, weights_only=True, map_location="cpu", mmap=several)
        require(state["model"].keys() == self.trained.keys(), f"{str(self.file)!r} is the checkpoint of "
                f"another run: choose another folder, or remove it")
        with torch.no_grad():
            for k, p in self.trained.items():
                p.copy_(like(state["model"][k], p))
        self.ema = {k: like(v, self.trained[k]) for k, v in state["ema"].items()}
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = state["step"]

    def save(self, step: int) -> None:
        """Write what is there after so many steps. All processes must call this; the first one writes."""
        state = {"model": {k: p.detach() for k, p in self.trained.items()}, "ema": self.ema, "step": step,
                 "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}
        state = gathered(state)
        if parallel.rank() == 0:
            try:
                outputs.replace(self.file, lambda new: torch.save(state, new))
            except RuntimeError as error:                # so PyTorch calls a full disk
                raise OSError(f"cannot write {str(self.file)!r}, is the disk full? What was saved before is "
                              f"kept, and the same command goes on ({error})") from None
        self.step = step

    def check_finite(self, what: str, value: float, step: int) -> None:
        """FloatingPointError, which says what is left, if this number says that training has failed."""
        if not math.isfinite(value):
            end = f", or end with --steps {self.step}: so many are in {self.file}" if self.step else ""
            raise FloatingPointError(f"the {what} of step {step} is {value}, and will be again: try a lower "
                                     f"--lr with a new --work{end}")


class Log:
    """A CSV with a row a step, whose first line names the columns. An older version of this project may have
    begun it, with other columns and no names: these rows stay as they are."""

    def __init__(self, file: Path, before: int):
        """Go on after the steps before this one: what came later is computed again."""
        rows = read_rows(file)
        names = [row for row in rows if row[:1] == ["step"]]
        self.file, self.rows = file, steps_of(rows, before)
        self.columns = names[0] if names else []
        self.write("w", names[:1] + self.rows)

    def write(self, mode: str, rows: list[list[str]]) -> None:
        with self.file.open(mode, newline="") as table:
            csv.writer(table).writerows(rows)

    def add(self, row: dict[str, float]) -> None:
        self.rows.append([str(value) for value in row.values()])
        if self.columns == [*row]:
            self.write("a", self.rows[-1:])
        else:
            self.columns = [*row]
            self.write("w", [self.columns, *self.rows])

    def recent_means(self) -> dict[str, float]:
        """The mean of each column but the first over the last 100 rows, of those with these columns."""
        alike = [row for row in self.rows[-100:] if len(row) == len(self.columns)]
        means = [sum(map(float, column)) / len(column) for column in zip(*alike, strict=True)]
        return dict(zip(self.columns[1:], means[1:], strict=True))


def fit(name: str, model: nn.Module, loss_of_step: Callable[[int], tuple[Tensor, dict[str, float]]],
        steps: int, optimizers: Sequence[torch.optim.Optimizer], folder: Path, *, every: int = 500,
        warmup: int = 100, accumulate: int = 1, ema_decay: float | None = None,
        report: Callable[[], str] | None = None, report_every: int | None = None) -> nn.Module:
    """Train what in `model` has gradients, by loss_of_step(i) -> (loss, numbers to log).

    Step s takes the mean of the losses i = s * accumulate, s * accumulate + 1, ...: so many, of which each
    process computes an equal share. Rates warm up, stay, and fall to zero in the last third: to train a
    finished model further, give more steps. With ema_decay a moving average of the weights is kept; `report`
    sees it, and it is what is left in the model.

    Every `every` steps, before a report, at the end and at Ctrl-C all that is needed to go on is written to
    folder/name.pt, which is read if it is there. folder/name.csv has a row a step: its number, the loss, the
    numbers (of the last forward) and seconds, as its first line says. name.png draws the loss.
    """
    folder.mkdir(parents=True, exist_ok=True)
    is_first = parallel.rank() == 0                      # it alone writes
    forwards = range(parallel.rank(), accumulate, parallel.ranks())          # of a step, in this process
    assert accumulate % parallel.ranks() == 0, "an equal share for each process"
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    groups = lambda: [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups()]          # the highest, which a checkpoint does not hold
    ema = {k: p.detach().clone() for k, p in trained.items()} if ema_decay else {}
    checkpoint = Checkpoint(folder / f"{name}.pt", trained, ema, optimizers)
    checkpoint.read()
    first, ema = checkpoint.step, checkpoint.ema
    log = Log(folder / f"{name}.csv" if is_first else Path(os.devnull), before=first)
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=name, mininterval=1, dynamic_ncols=True,
               disable=not sys.stderr.isatty())
    is_time = terminal.now_and_then()
    model.train()
    with stop_between_steps() as asked:
        for step in bar:
            start = time.perf_counter()
            share = min((step + 1) / warmup, 1, 3 * (1 - step / steps))
            for group, rate in zip(groups(), rates, strict=True):
                group["lr"] = rate * share
            model.zero_grad(set_to_none=True)
            losses = []
            for i in forwards:
                torch.manual_seed(step * accumulate + i)                     # for what takes no generator
                loss, numbers = loss_of_step(step * accumulate + i)
                (loss / len(forwards)).backward()
                losses.append(float(loss.detach()))
            mean_loss = sum_of_all(sum(losses)) / accumulate
            checkpoint.check_finite("loss", mean_loss, step)
            norm = finish_gradients([*trained.values()])
            checkpoint.check_finite("gradient norm", norm, step)             # or no weight would be finite
            for optimizer in optimizers:
                optimizer.step()
            with torch.no_grad():
                for k in ema:
                    decay = min(ema_decay, (step + 1) / (step + 10))         # the start is soon forgotten
                    ema[k].lerp_(trained[k].to(ema[k]), 1 - decay)
            seconds = round(time.perf_counter() - start, 3)
            log.add({"step": step, "loss": mean_loss, **numbers, "s/step": seconds})
            shown = {key: f"{value:.3g}" for key, value in log.recent_means().items()}
            bar.set_postfix(shown, refresh=False)
            is_last, stops = step + 1 == steps, sum_of_all(len(asked)) > 0   # all end at the same step
            if bar.disable and (is_time() or is_last):                       # a log: a line now and then
                figures = ", ".join(f"{key} {value}" for key, value in shown.items())
                terminal.say(f"{name}: step {step + 1} of {steps}, {figures}")
            is_due = (step + 1) % (report_every or every) == 0 or is_last
            if (step + 1) % every == 0 or is_last or stops or report and is_due:         # a report may fail
                checkpoint.save(step + 1)
                if is_first:
                    try:
                        plot_loss(log.file)
                    except Exception as error:
                        bar.write(f"{name}: the loss cannot be drawn: {error}")
            if stops:
                bar.close()
                raise KeyboardInterrupt(f"stopped after step {step + 1} of {steps}, all of which are saved")
            if report and is_due:
                with exchanged(model, ema):
                    bar.write(f"{name} {step + 1}: {report()}")
    model.load_state_dict(ema, strict=False)
    return model.eval()


@contextlib.contextmanager
def exchanged(model: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """The model with other weights and in evaluation, for the length of a `with` block."""
    kept = {k: v.clone() for k, v in model.state_dict().items() if k in weights}
    model.load_state_dict(weights, strict=False)
    model.eval()
    try:
        yield
    finally:
        model.load_state_dict(kept, strict=False)
        model.train()


def read_rows(log: Path) -> list[list[str]]:
    """The lines of a CSV, if it is there. One that was cut off is left out."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [*csv.reader(line for line in lines if line.endswith("\n"))]


def steps_of(rows: list[list[str]], before: int) -> list[list[str]]:
    """Those of the rows that are for steps before this one."""
    return [row for row in rows if len(row) > 1 and row[0].isdecimal() and int(row[0]) < before]


def read_log(log: Path, before: int) -> list[list[str]]:
    """The rows of a CSV for steps before this one."""
    return steps_of(read_rows(log), before)


def plot_loss(log: Path) -> None:
    """Draw the smoothed loss of a CSV beside it, if matplotlib is there. pyplot is left alone: in a notebook
    it has to go on drawing into the page."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    rows = [(float(row[0]), float(row[1])) for row in read_log(log, before=2**63)]
    width = max(1, len(rows) // 200)
    parts = [rows[i : i + width] for i in range(0, len(rows) - width + 1, width)]
    figure = Figure(figsize=(6, 3.5))
    axes = figure.subplots()
    axes.semilogy([sum(step for step, _ in part) / width for part in parts],
                  [sum(loss for _, loss in part) / width for part in parts])
    axes.set(xlabel="step", ylabel="loss", title=log.stem)
    axes.grid(alpha=0.3)
    figure.savefig(log.with_suffix(".png"), dpi=100, bbox_inches="tight")


if __name__ == "__main__":
    from finetune import main

    parallel.leave(main())
