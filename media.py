"""Pictures and videos: what people hold -> arrays and tensors. (Reading and writing files follows.)"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from checkpoints import require

FRAMES_PER_LATENT = 4


def to_image(x: Any) -> np.ndarray:
    return np.asarray(x)


def to_video(x: Any) -> np.ndarray:
    return np.asarray(x)


def fit_frames(frames: np.ndarray, height: int, width: int, how: str = "crop") -> Tensor:
    """uint8 (frames, h, w, 3) -> (1, 3, frames, height, width) in [-1, 1].

    "crop" keeps the aspect ratio and cuts the sides, "pad" keeps it and adds black, "stretch" (the official
    code's way) does not keep it.
    """
    require(how in ("crop", "pad", "stretch"), f"fit {how!r} is not 'crop', 'pad' or 'stretch'")
    x = torch.from_numpy(np.ascontiguousarray(frames)).movedim(-1, 1).float()            # (frames, 3, h, w)
    h, w = x.shape[-2:]
    scales = height / h, width / w
    if how != "stretch":
        scales = [max(scales) if how == "crop" else min(scales)] * 2
    size = (max(1, round(h * scales[0])), max(1, round(w * scales[1])))
    if size != (h, w):
        x = F.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2              # negative: cut instead of add
    x = F.pad(x, (left, width - size[1] - left, top, height - size[0] - top))
    return rearrange(x / 127.5 - 1, "t c h w -> 1 c t h w")


def prefix_clip(image: np.ndarray | None, video: np.ndarray | None, prefix_frames: int) -> np.ndarray | None:
    """The frames the model is shown: an image as a one-frame clip, or the last of a video, in fours."""
    require(image is None or video is None, "give an image or a video, not both")
    if image is not None:
        return image[None]
    if video is None:
        return None
    fours = max(1, round(prefix_frames / FRAMES_PER_LATENT)) * FRAMES_PER_LATENT
    require(prefix_frames == fours, f"prefix_frames {prefix_frames} must be a positive multiple of 4: try {fours}")
    require(len(video) >= FRAMES_PER_LATENT,
            f"the video has {len(video)} frames, at least {FRAMES_PER_LATENT} are needed")
    return video[-min(prefix_frames, len(video) // FRAMES_PER_LATENT * FRAMES_PER_LATENT) :]


