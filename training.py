"""Training objectives of MAGI-1 and low-rank adaptation (report sections 2.1, 2.3 and 2.5).

    flow_matching_loss   one objective for text, image and video to video, over chunks at their own times
    vae_loss             L1 + KL
    shortcut_loss        shortcut distillation: many steps and three branches into few steps and one branch
    LoRA                 low-rank weights beside a frozen model: add_lora, save_lora, load_lora, merge_lora

The official project ships no training code. What the report leaves open is our choice; such choices are
marked "(not in the report)" and are fields of TrainingConfig where they are numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoints import compare_headers, read_headers, read_json, require, save
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

# ----------------------------------------------------------------------------------------------------------
# 1  Flow matching over chunks
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingConfig:
    """How a clip is corrupted for the flow-matching objective: our choices, but for the 5 % noise.

    Clips at a moment of the pipeline spend half their time below t = 0.1; the others follow `timestep_law`.
    """

    image_share: float = 0.15         # clips that begin with one clean frame (image to video)
    video_share: float = 0.35         # clips that begin with more: part of a chunk, or whole ones and part
    pipeline_share: float = 0.5       # clips timed as a moment of the sampler's pipeline; the rest: the law
    null_share: float = 0.15          # clips that lose their captions, for the branches without text
    clean_noise: float = 0.05         # most noise a clean chunk carries: generated history is not perfect
    ranges_share: float = 0.9         # clips under the sampler's kv_ranges; the rest see only themselves


def timestep_law(*shape: int, generator: torch.Generator | None = None) -> Tensor:
    """Training times: logit-normal (m 0, s 0.5), shifted towards the noise; about 70 % lie below t = 0.3."""
    return shift_time(torch.sigmoid(0.5 * torch.randn(*shape, generator=generator)))


def draw_times(batch: int, n: int, clean: Tensor, cfg: TrainingConfig, sampler: SamplerConfig,
               generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Times (B, n), non-increasing along each clip, and which chunks are clean (B, n) bool.

    clean (B,) whole chunks are given. A share of the clips take a moment of the pipeline, a random one: there
    the chunks are exactly one stage apart, and those that have left it are clean as well. The others sort
    draws from the law over the noisy chunks of a clip, which leaves their distribution as a whole unchanged.
    """
    later = torch.arange(n) - clean[:, None]                             # (B, n) 0 = first noisy chunk
    law = timestep_law(batch, n, generator=generator).masked_fill(later < 0, 1)
    law = law.sort(dim=1, descending=True).values
    head = torch.rand(batch, 1, generator=generator) * (sampler.window - 1 + n - clean[:, None])
    stage = head - later                                                 # stages a chunk has gone through
    moment = shift_time((stage / sampler.window).clamp(0, 1) ** 2)
    # A chunk that would not have started yet still gets some time, or its place in the batch would be wasted.
    moment = torch.where(stage < 0, law, moment).cummin(dim=1).values
    use = torch.rand(batch, 1, generator=generator) < cfg.pipeline_share
    is_clean = (later < 0) | use & (stage >= sampler.window)
    return torch.where(is_clean, sampler.clean_t, torch.where(use, moment, law)), is_clean


def _per_frame(u: Tensor, x: Tensor) -> Tensor:
    """One number a chunk (B, n) -> one a frame, to multiply x: (B, 1, T, 1, 1)."""
    return u.repeat_interleave(CHUNK, dim=1).to(x)[:, None, :, None, None]


def _clips(dit: DiT, latents: Tensor, text: Tensor, text_mask: Tensor, images: Tensor | None,
           cfg: TrainingConfig, rand: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A training batch, checked and on one device, and how many frames of each clip are given, (B,): none,
    one (an image, which takes the place of the clip's own first latent) or many (a video)."""
    (B, _, T, _, _), n = latents.shape, latents.shape[2] // CHUNK
    fits = text.shape == (B, n, *dit.null_text.shape) and text_mask.shape == text.shape[:3]
    require(T % CHUNK == 0 and fits,
             f"latents {tuple(latents.shape)} need {CHUNK} frames per chunk and text "
             f"{(B, n, *dit.null_text.shape)} with its mask; text is {tuple(text.shape)}, text_mask "
             f"{tuple(text_mask.shape)}")
    task, most = rand(B), max(CHUNK - 1, T - CHUNK)                      # something is left to predict
    given = (2 + rand(B) * (most - 1)).long().clamp(max=most)
    given = torch.where(task < cfg.image_share, 1, given * (task < cfg.image_share + cfg.video_share))
    if images is not None:
        require(images.shape == latents[:, :, :1].shape, f"images {tuple(images.shape)} are not one latent "
                 f"frame for each of latents {tuple(latents.shape)}")
        first = torch.where((given == 1).to(images.device).view(-1, 1, 1, 1, 1), images, latents[:, :, :1])
        latents = torch.cat([first, latents[:, :, 1:]], dim=2)
    return latents, text.to(latents.device), text_mask.to(latents.device), given


def _corrupt(latents: Tensor, t: Tensor, is_clean: Tensor, given: Tensor, cfg: TrainingConfig,
             generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """Noise each chunk to its t (B, n); clean chunks a little, whatever t the model is told; given frames of
    a noisy chunk not at all. Returns x, the noise, and where those frames are (B, 1, T, 1, 1) bool."""
    level = torch.where(is_clean, 1 - cfg.clean_noise * torch.rand(t.shape, generator=generator), t)
    level = _per_frame(level, latents)                                   # share of data in x
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    pasted = torch.arange(latents.shape[2]) < given[:, None]             # (B, T)
    pasted = (pasted & ~is_clean.repeat_interleave(CHUNK, 1)).to(latents.device)[:, None, :, None, None]
    return torch.where(pasted, latents, (1 - level) * noise + level * latents), noise, pasted


def _with_null_text(dit: DiT, text: Tensor, mask: Tensor, nulled: Tensor) -> tuple[Tensor, Tensor]:
    """Text (B, n, L, C) and mask (B, n, L), null text where nulled (B, n) or where the caption is empty."""
    nulled = (nulled.to(mask.device) | ~mask.bool().any(-1))[..., None]  # (B, n, 1)
    null_mask = (torch.arange(mask.shape[-1], device=mask.device) < dit.cfg.null_length).to(mask)
    return (torch.where(nulled[..., None], dit.null_text.to(text), text),
            torch.where(nulled, null_mask, mask))


def _first_seen(reach: Tensor, is_clean: Tensor, from_outside: Tensor, cfg: TrainingConfig,
                sampler: SamplerConfig, rand: Callable[..., Tensor]) -> Tensor:
    """The first chunk each chunk attends to, (B, n), from the ranges of the noisy ones; clean ones have their
    own (`clean_range`), and some clips see no history, for the branch without."""
    B, n = is_clean.shape
    for which, prefix in ((is_clean, False), (from_outside, True)):
        reach = torch.where(which, int(min(n, clean_kv_range(sampler, prefix))), reach)
    reach = torch.where(rand(B, 1) >= cfg.ranges_share, 1, reach)
    return (torch.arange(n) - reach + 1).clamp(min=0)


def _mean_square(error: Tensor, is_clean: Tensor, pasted: Tensor, weight: Tensor | None) -> Tensor:
    """Weighted mean of error^2 over what counts: the frames of noisy chunks that were not given."""
    counts = (_per_frame(~is_clean, error) * ~pasted * (1 if weight is None else weight)).expand_as(error)
    return (counts * error**2).sum() / counts.sum().clamp(min=1)


def flow_matching_loss(dit: DiT, latents: Tensor, text: Tensor, text_mask: Tensor,
                       cfg: TrainingConfig = TrainingConfig(), sampler: SamplerConfig = SamplerConfig(),
                       images: Tensor | None = None, weight: Tensor | None = None,
                       generator: torch.Generator | None = None) -> Tensor:
    """E || v_theta(x_i^{t_i} | t_i, text, {x_j, j < i}) - (data_i - noise_i) ||^2 over noisy chunks.

    latents (B, 16, T, H, W), scaled, T = 6 n; text (B, n, L, C) with its special tokens, text_mask (B, n, L):
    one caption per chunk. Text, image and video to video are one objective (report 2.3): they differ in how
    many clean frames lead. Gradients flow through the clean chunks too (stopping them hurts much, says the
    report). Draws come from `generator` (on the CPU). The scalar loss is a mean over the elements that count,
    weighted by weight (B, 1, T, H, W) if that is given (ours: small objects deserve more than their size).

    images (B, 16, 1, H, W): a frame of each clip encoded alone, as the sampler encodes the image of image to
    video; best the fourth, the last that a first latent stands for. Without it the clip's own first latent
    takes that place, which tells more than an image can: its four frames move.
    """
    rand = lambda *shape: torch.rand(*shape, generator=generator)
    latents, text, text_mask, given = _clips(dit, latents, text, text_mask, images, cfg, rand)
    B, n = text.shape[:2]
    t, is_clean = draw_times(B, n, given // CHUNK, cfg, sampler, generator)
    x, noise, pasted = _corrupt(latents, t, is_clean, given, cfg, generator)

    # Text: clean chunks are always shown null text, as the cache's are; some clips lose theirs altogether.
    # An empty caption is null text too, but keeps the flag of a caption, as in the sampler.
    nulled = is_clean | (rand(B, 1) < cfg.null_share)
    text, text_mask = _with_null_text(dit, text, text_mask, nulled)

    # Attention ranges as in the sampler, by each chunk's own t; some clips see no history (third branch).
    ranges = sampler.kv_ranges or (n,)
    edges = shift_time((torch.arange(1, len(ranges)) / len(ranges)) ** 2)
    reach = torch.tensor(ranges)[torch.bucketize(t, edges, right=True)]
    from_outside = torch.arange(n) < (given // CHUNK)[:, None]
    first_seen = _first_seen(reach, is_clean, from_outside, cfg, sampler, rand)

    v = dit(x, t.to(latents.device), text, text_mask, first_seen=first_seen,
            conditional=~nulled.to(latents.device))
    return _mean_square(v - (latents - noise), is_clean, pasted, weight)


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


# Shortcut distillation (report section 2.5, after Frans et al. 2024). The student is also told its step size
# s, as d = 1/(2s) (`shortcut_d`), and learns to go in one step as far as it went in two of half the size:
#
#     x' = x + dt1 v(x, t, s)
#     v(x, t, 2s) := [dt1 v(x, t, s) + dt2 v(x', t + dt1, s)] / (dt1 + dt2)
#
# dt1 and dt2 differ, as the time grid is not uniform. At the smallest step the target is the teacher's guided
# velocity, so three branches become one as well. Ours, where the report is silent: the corruption of a clip
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
    dt1, dt2 = (_per_frame(b - a, x) for a, b in itertools.pairwise(times))
    first = velocity(x, times[0])
    second = velocity(paste(x + dt1 * first), times[1])
    return (dt1 * first + dt2 * second) / (dt1 + dt2).clamp(min=1e-9)


def guided_velocity(dit: DiT, x: Tensor, t: Tensor, text: Tensor, text_mask: Tensor, is_clean: Tensor,
                    first_seen: Tensor, sampler: SamplerConfig) -> Tensor:
    """What the sampler makes of a base model's three branches (section 8), here for a batch of clips.

    x (B, 16, T, H, W), t, is_clean and first_seen (B, n), text (B, n, L, C) -> (B, 16, T, H, W). Clean chunks
    have the unconditional flag in every branch: the sampler's cache holds their keys from such a branch.
    """
    all_null, alone = torch.ones_like(is_clean), torch.arange(t.shape[1]).expand(t.shape)
    texts, masks = zip(*(_with_null_text(dit, text, text_mask, nulled)
                         for nulled in (is_clean, all_null, all_null)), strict=True)
    v = dit(torch.cat([x] * 3), t.repeat(3, 1), torch.cat(texts), torch.cat(masks),
            first_seen=torch.cat([first_seen, first_seen, alone]),
            conditional=torch.cat([~is_clean, ~all_null, ~all_null]).to(x.device))
    texted, previous, nothing = v.chunk(3)
    scales = torch.tensor([[guidance_scales(sampler, u) for u in clip] for clip in t.tolist()])  # (B, n, 2)
    w_prev, w_text = (_per_frame(w, x) for w in scales.unbind(-1))
    return (1 - w_prev) * nothing + (w_prev - w_text) * previous + w_text * texted


def shortcut_loss(student: DiT, teacher: DiT, latents: Tensor, text: Tensor, text_mask: Tensor,
                  num_steps: int, cfg: TrainingConfig = TrainingConfig(),
                  sampler: SamplerConfig = SamplerConfig(), average: DiT | None = None,
                  images: Tensor | None = None, weight: Tensor | None = None,
                  generator: torch.Generator | None = None) -> Tensor:
    """|| v_student(x, t, s) - target ||^2 over noisy chunks, for s = 1/num_steps (see `shortcut_steps`).

    latents, text, text_mask, images, weight, generator: as in flow_matching_loss. teacher: the base model,
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
    rand = lambda *shape: torch.rand(*shape, generator=generator)

    # A moment of the pipeline: how many steps of its own each chunk has done; num_steps or more: it has left.
    latents, text, text_mask, given = _clips(student, latents, text, text_mask, images, cfg, rand)
    B, n = text.shape[:2]
    last_stage, j = (torch.randint(m, (B, 1), generator=generator)
                     for m in (sampler.window, num_steps // sampler.window))
    chunk = torch.arange(n)
    done = (last_stage + n - 1 - chunk) * (num_steps // sampler.window) + j                    # (B, n)
    from_outside = chunk < (given // CHUNK)[:, None]
    is_clean = from_outside | (done >= num_steps)
    grid = lambda N, i: torch.where(is_clean, sampler.clean_t, timestep_grid(N)[i.clamp(max=N)])
    t = grid(num_steps, done)
    x, _, pasted = _corrupt(latents, t, is_clean, given, cfg, generator)
    paste = lambda x: torch.where(pasted, latents, x)

    # What each chunk sees, as in the sampler; some clips see no history.
    reach = torch.tensor([int(min(n, kv_range(sampler, i))) for i in range(num_steps)])
    reach = reach[done.clamp(max=num_steps - 1)]                                               # (B, n)
    first_seen = _first_seen(reach, is_clean, from_outside, cfg, sampler, rand)

    def velocity(dit: DiT, N: int) -> Callable[[Tensor, Tensor], Tensor]:
        """v(x, t, 1/N) of a distilled model, as a function of x and t."""
        shown = _with_null_text(dit, text, text_mask, is_clean)
        return lambda x, t: dit(x, t.to(x.device), *shown, first_seen=first_seen, d=shortcut_d(N)[0])

    with torch.no_grad():
        if num_steps == max(SHORTCUT_CYCLE):
            with lora_off(teacher) if teacher is student else contextlib.nullcontext():
                target = guided_velocity(teacher, x, t.to(x.device), text, text_mask, is_clean, first_seen,
                                         sampler)
        else:
            times = [grid(2 * num_steps, 2 * done + k) for k in range(3)]
            target = two_half_steps(velocity(average or student, 2 * num_steps), x, times, paste)
    return _mean_square(velocity(student, num_steps)(x, t) - target, is_clean, pasted, weight)


# A low-rank part (Hu et al. 2021) is the affordable way in for a real checkpoint: once it is there, both
# objectives above train it alone. It hangs on every linear layer of the blocks as a child named "lora", and
# its file holds these children by name; the weights of the model keep their names.


class LoRA(nn.Module):
    """What is added to a linear layer's output: scale * up(down(x)), nothing until it is trained.

    Float32 whatever the layer's type: small updates would be lost in bf16. A hook rather than a wrapper, so
    that names stay as they are and layers with fp8 weights can have one too.
    """

    def __init__(self, linear: nn.Module, rank: int):
        super().__init__()
        (n_out, n_in), device = linear.weight.shape, linear.weight.device
        self.down = nn.Parameter(torch.randn(rank, n_in, device=device) * n_in**-0.5)
        self.up = nn.Parameter(torch.zeros(n_out, rank, device=device))
        self.scale = 1.0
        self.handle = linear.register_forward_hook(
            lambda linear, args, out: (out + linear.lora(args[0])).to(out.dtype))

    def forward(self, x: Tensor) -> Tensor:                                  # (..., in) -> (..., out)
        return self.scale * F.linear(F.linear(x.float(), self.down), self.up)


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
    """How strongly the LoRA acts: 1 as it was trained, 0 not at all."""
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
             "a LoRA cannot be merged into fp8 weights: use it unmerged, or merge it into the bf16 model")
    for linear in targets:
        lora = linear.lora
        linear.weight.copy_(linear.weight.float() + lora.scale * lora.up @ lora.down)
        lora.handle.remove()
        del linear.lora
    return dit


def save_lora(dit: DiT, file: str | Path) -> None:
    """Write the LoRA alone: LAYER.lora.down (rank, in) and LAYER.lora.up (out, rank), in safetensors."""
    save({k: v for k, v in dit.state_dict().items() if ".lora." in k}, file)


# Files of others: how they end the names of the two factors (down, up), and what they put before that of a
# layer. PEFT and Comfy keep the dots of the name, kohya writes underscores; "alpha" scales by alpha / rank.
LORA_NAMES = re.compile(
    r"(?:(?:base_model\.model|transformer|diffusion_model|model|dit|module)\.|lora_unet_|lora_transformer_)*"
    r"(?P<layer>.+?)\.(?:"
    r"(?P<down>lora\.down|lora_A(?:\.default)?\.weight|(?:lora_|lora\.|lora_linear_layer\.)down\.weight)|"
    r"(?P<up>lora\.up|lora_B(?:\.default)?\.weight|(?:lora_|lora\.|lora_linear_layer\.)up\.weight)|(?P<alpha>alpha))")
OTHER_KINDS = {"hada_": "LoHa", "lokr_": "LoKr", "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA",
               "lora_mid": "LoCon", "oft_": "OFT", "diff": "whole differences of weights"}


def lora_layers(dit: DiT, file: str | Path) -> dict[str, dict[str, str]]:
    """Layer of ours -> {"down": name in the file, "up": ..., perhaps "alpha": ...}, from the header alone.

    Layers may have our names or the official ones (those from "videodit_blocks" on). ValueError if one is of
    no layer here, if a factor is missing or has another shape, or if the file is no LoRA of this kind.
    """
    found, targets = read_headers([file]), lora_targets(dit)
    matches = {name: LORA_NAMES.fullmatch(name) for name in found}
    require(any(m and not m["alpha"] for m in matches.values()),
            f"{str(file)!r} is no LoRA: it has {len(found)} tensor(s), such as "
            f"{min(found, default=None)!r}")
    for name in (name for name, m in matches.items() if m is None):
        kind = next((kind for word, kind in OTHER_KINDS.items() if word in name), "unknown")
        raise ValueError(f"the LoRA {str(file)!r} has {name!r}, whose kind is {kind}: only pairs of low-rank "
                         f"factors can be loaded (PEFT, diffusers, kohya and Comfy write such files)")
    ours = {name.replace(".", "_"): name for name in targets}
    if any("videodit_blocks" in name for name in found):
        ours |= {name.replace(".", "_"): our for our, name in official_layers(targets).items()}
    layers: dict[str, dict[str, str]] = {}
    for name, m in matches.items():
        layer = ours.get(m["layer"].replace(".", "_"))
        require(layer, f"the LoRA {str(file)!r} is for another model: this one has no layer {m['layer']!r}")
        layers.setdefault(layer, {})[m.lastgroup] = name
    own = all(name.endswith((".lora.down", ".lora.up")) for name in found)   # ours has all layers
    expected = {}
    for layer in targets if own else layers:
        names, weight = layers.get(layer, {}), targets[layer].weight
        down, up = (names.get(part, f"{layer}.lora.{part}") for part in ("down", "up"))
        rank = (found.get(down, ((1,), False))[0] or (1,))[0]
        expected |= {down: ((rank, weight.shape[1]), False), up: ((weight.shape[0], rank), False)}
    factors = {name: header for name, header in found.items() if not matches[name]["alpha"]}
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


def lora_strengths(file: str | Path, layers: dict[str, dict[str, str]]) -> dict[str, float]:
    """What alpha multiplies each layer's LoRA by, where it is not in a tensor: PEFT keeps it in a JSON beside
    the file, diffusers in the file's header."""
    from safetensors import safe_open

    config = Path(file).with_name("adapter_config.json")
    with safe_open(file, "pt") as f:
        about = json.loads((f.metadata() or {}).get("lora_adapter_metadata", "{}"))
    about = {key.removeprefix("transformer."): value for key, value in about.items()}
    if not about and config.is_file() and Path(file).name.startswith("adapter_model"):
        about = read_json(config, "LoRA config")
    if not about.get("lora_alpha"):
        return dict.fromkeys(layers, 1.0)
    rank = about["r"] ** (0.5 if about.get("use_rslora") else 1)
    return dict.fromkeys(layers, about["lora_alpha"] / rank)


def check_lora(dit: DiT, file: str | Path) -> int:
    """The largest rank in a LoRA file, from its header. ValueError if it does not fit (meta will do)."""
    found = read_headers([file])
    return max(found[names["down"]][0][0] for names in lora_layers(dit, file).values())


def load_lora(dit: DiT, file: str | Path, scale: float = 1.0) -> DiT:
    """Add a saved LoRA to a model, in place; scale: how strongly it acts. One that is there already stays,
    and both act. ValueError if it does not fit."""
    from safetensors.torch import load_file

    layers, targets = lora_layers(dit, file), lora_targets(dit)
    strengths = lora_strengths(file, layers)
    tensors = load_file(file, device=str(dit.null_text.device))
    for layer, names in layers.items():
        down, up = tensors[names["down"]].float(), tensors[names["up"]].float()
        strength = tensors[names["alpha"]].item() / len(down) if "alpha" in names else strengths[layer]
        if "videodit_blocks" in names["down"]:                               # its inputs may change places
            from convert_weights import convert_dit

            name = f"{official_layers([layer])[layer]}.weight"
            (down,) = convert_dit({name: down}).values()
        extend_lora(targets[layer], down, up * strength, scale)
    return dit.requires_grad_(False)


def extend_lora(linear: nn.Module, down: Tensor, up: Tensor, scale: float) -> None:
    """Give a layer these factors, beside those that it has: two LoRAs are one whose rank is the sum."""
    if hasattr(linear, "lora"):
        old = linear.lora
        down, up = torch.cat([old.down, down]), torch.cat([old.up * old.scale, up * scale], 1)
        scale = 1.0
    else:
        linear.lora = LoRA(linear, len(down))
    linear.lora.down, linear.lora.up = nn.Parameter(down), nn.Parameter(up)
    linear.lora.scale = scale
