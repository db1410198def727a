"""Notes on what a small model, whose text encoder lists its words in words.json, cannot do: for sample.py."""

from __future__ import annotations

import re
from pathlib import Path

from checkpoints import read_json

TINY = Path(__file__).resolve().parent


def notes_on_run(args, cfg, native) -> list[str]:
    """args: the flags; cfg: the sampler config of the run, native: that of the model."""
    found = []
    if (cfg.height, cfg.width) != (native.height, native.width):
        found.append(
            f"note: this small model has only seen {native.height}x{native.width} pixels: "
            f"at {cfg.height}x{cfg.width} expect fragments"
        )
    given = args.image or args.video
    if given and not Path(given).resolve().is_relative_to(TINY):
        found.append(
            f"note: this small model only knows pictures of its own world, such as "
            f"{TINY.name}/examples/image.png: of others expect little"
        )
    return found


def notes_on_prompts(args, prompts) -> list[str]:
    """Words that it has never seen. With a LoRA there is no note: it may have taught another."""
    if args.lora:
        return []
    known = read_json(args.t5 / "words.json", "words")  # {"colours": ["red", ...], ...}
    words = {word for phrases in known.values() for phrase in phrases for word in phrase.split()}
    said = {prompt: re.findall(r"\w+", prompt.lower()) for prompt in prompts}
    strange = dict.fromkeys(word for prompt in said.values() for word in prompt if word not in words)
    if strange:
        kinds = {kind: ", ".join(phrases) for kind, phrases in known.items() if kind != "other"}
        lists = "; ".join(f"{kind}: {phrases}" for kind, phrases in kinds.items())
        return [
            f"note: this small model has never seen {', '.join(map(repr, strange))}. "
            f"It knows {lists}. Say for example: a red ball bounces"
        ]
    shapeless = [prompt for prompt, heard in said.items() if not {*heard} & {*known["shapes"]}]
    if shapeless and args.mode == "t2v":
        return [
            f"note: the prompt {shapeless[0]!r} names no shape that this small model knows: "
            f"{', '.join(known['shapes'])}. Say for example: a red ball bounces"
        ]
    return []
