"""Prompts: what each chunk may be told, what the official code does to a caption, and T5, which reads it.

The rules for captions are not part of the model, but they decide which tokens T5 sees, so all of them are
kept, the odd ones too. The recorded results of the official code are in goldens/captions.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import html
import io
import itertools
import math
import queue
import re
import threading
import urllib.parse
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from checkpoints import GUIDANCE, check_text_encoder, reading, require, text_encoder_files

Encode = Callable[[Sequence[str]], tuple[Tensor, Tensor]]     # captions -> text (n, L, C), mask (n, L)
MAX_TOLD = 2_000                         # characters of a prompt that is told while the video is made


class Prompt(NamedTuple):
    """What may stand in place of a plain caption. The settings hold for this chunk and all later ones."""

    text: str
    transition: str | None = None        # "cut" or "restyle", at this chunk
    settings: dict = {}                  # only of GUIDANCE, the fields that may change within a run


# ------------------------------------------------------------------------------------ what each chunk is told


def as_prompt(item: Any) -> Prompt:
    """A caption or a Prompt -> Prompt; ValueError for what a chunk cannot be given."""
    prompt = item if isinstance(item, Prompt) else Prompt(item)
    require(isinstance(prompt.text, str), f"a prompt is of type {type(item).__name__}: give captions, "
            f"Prompts, or the (text, mask) of encode_text")
    wrong = ", ".join(map(repr, prompt.settings.keys() - set(GUIDANCE)))
    require(not wrong, f"{wrong} cannot change while a video is made, only {', '.join(GUIDANCE)}")
    return prompt


def texts_of(prompt: Any, cfg: Any, encode: Encode, transition: Callable) -> tuple[Any, Any]:
    """The prompt of magi.MAGI -> what magi.sample takes as text and text_mask.

    cfg: the run's SamplerConfig; encode: MAGI.encode_text; transition: magi.shot_transition, which is passed
    since magi.py imports this file.
    """
    if isinstance(prompt, str | Prompt):
        prompt = [prompt]
    require(isinstance(prompt, Iterable), f"the prompt {prompt!r} is neither a caption nor several")
    if isinstance(prompt, Sequence):
        require(len(prompt) > 0, "the prompt is an empty list: give at least one caption, which may be ''")
        if len(prompt) == 2 and all(isinstance(u, Tensor) for u in prompt):
            return prompt[0], prompt[1]
        if all(isinstance(caption, str) for caption in prompt):
            return encode(list(prompt))                      # all at once: T5 is read once
        prompt = [item if item is None else as_prompt(item) for item in prompt]
    return late_texts(prompt, cfg, encode, transition), None


def late_texts(prompts: Iterable, cfg: Any, encode: Encode, transition: Callable
               ) -> Iterator[tuple[Tensor, Tensor, Any] | None]:
    """Text, mask and config of each chunk, made when it asks for them."""
    # T5 is freed after each call, so the captions that come again must not need it again.
    remembered = functools.lru_cache(8)(lambda caption: encode([caption]))
    for chunk, item in enumerate(prompts):
        if item is None:
            yield None
            return
        prompt = as_prompt(item)
        cfg = dataclasses.replace(cfg, **prompt.settings)                    # from now on
        own = transition(cfg, chunk, prompt.transition) if prompt.transition else cfg
        (text,), (mask,) = remembered(prompt.text)
        yield text, mask, own


def each_chunk(text: Any, mask: Any, shape: tuple[int, ...]) -> Iterator[tuple]:
    """Text (L, C) or (chunks, L, C), and its mask, checked -> an iterator over chunks."""
    require(isinstance(text, Tensor) and isinstance(mask, Tensor),
            f"text and text_mask must be tensors, not {type(text).__name__} and {type(mask).__name__}: the "
            f"mask says which rows of the text are not padding")
    texts, masks = (text[None], mask[None]) if text.dim() == 2 else (text, mask)
    require(texts.shape[1:] == shape and masks.shape == texts.shape[:2] and len(texts) > 0,
            f"text {tuple(text.shape)} and text_mask {tuple(mask.shape)} must be {shape} and ({shape[0]},), "
            f"or that for each chunk")
    return zip(texts, masks, strict=True)


def endless(items: Iterable[tuple | None]) -> Iterator[tuple | None]:
    """The items, then the last of them for ever."""
    item: tuple | None = None
    for item in items:  # noqa: B007
        yield item
    require(item is not None, "there is no prompt: give at least one, which may be empty")
    yield from itertools.repeat(item)


def check_text(text: Any, most: float = math.inf) -> str:
    """The caption without white space around it; ValueError for what is no caption."""
    require(isinstance(text, str), f"a prompt is text, not of type {type(text).__name__}")
    require(len(text) <= most, f"a prompt is text of at most {most:,} characters")
    require(text.encode(errors="ignore").decode() == text, f"the prompt {ascii(text)} is not UTF-8: check "
            f"the encoding where it comes from")
    return text.strip()


def told_by(stream: BinaryIO, is_endless: bool, say: Callable[[str], None]) -> Iterator[str | None]:
    """The prompt of each chunk, from a stream with a prompt a line, which a thread of its own reads: the next
    line if it has come, else the prompt before again. The end of the stream ends an endless video, too.

    Reading begins when the first chunk asks. `say` warns of lines that are no prompts; empty ones are passed
    over. The stream should be unbuffered: Python cannot end while a thread waits inside a buffered one.
    """
    lines: queue.Queue[str | None] = queue.Queue(8)                          # a faster writer waits

    def read() -> None:
        try:
            for line in stream:
                try:
                    if text := check_text(line.decode(errors="surrogateescape").strip("\ufeff"), MAX_TOLD):
                        lines.put(text)
                except ValueError as error:
                    say(f"warning: {error}; this line is passed over")
        except OSError as error:
            say(f"warning: standard input cannot be read: {error}")
        finally:
            lines.put(None)

    if stream.isatty():
        say("standard input is a terminal: type a prompt and press Enter, or Ctrl-D for the end")
    threading.Thread(target=read, name="prompts", daemon=True).start()
    prompt = lines.get()                                                     # the first chunk waits for it
    require(prompt is not None, "standard input ended before there was a prompt")
    while prompt is not None:
        yield prompt
        with contextlib.suppress(queue.Empty):
            prompt = lines.get_nowait()
    if is_endless:
        yield None


# ---------------------------------------------------------------------------------- what is done to a caption


# The order of the rules is part of the definition:
#   - Lower case comes first, so most mojibake is already beyond ftfy's repair ("Ã¶" has become "ã¶").
#   - "+" and "%20" are decoded even in prose, so "a+b" is "a b"; the second pass does it again ("%2520").
#   - What step 3 drops leaves its blanks behind, and rules with ^ or $ do not match beside a blank. The
#     second pass strips before it starts, so these rules match then: "page 3 'x'" ends as "x".
# From step 2 on letters are a-zA-Z, lower case or not: entities bring capitals back ("&#65;" is "A").

# fmt: off
_LETTER      = "[a-zA-Z]"
_DOMAINS     = "com|co|ru|net|org|edu|gov|it"
_FILE_TYPES  = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DASHES      = (r"-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
                r"\ufe31\ufe32\ufe58\ufe63\uff0d")
_HYPHENATION = re.compile("[-_]")
# fmt: on


def _web_address(scheme: str) -> str:
    """A pattern for either the scheme with its slashes or a host with its path: "http://a.it/b" is two
    matches, and both go."""
    return rf"\b(?:{scheme}:(?:/{{1,3}}|[a-z0-9%])|[a-z0-9.-]+\.(?:{_DOMAINS})[\w/-]*\b/?(?!@))"


# fmt: off
# Step 1, on the markup: these need the angle brackets and the addresses whole.
_MARKUP_RULES = [(re.compile(pattern), new) for pattern, new in [
    (r"<person>",                                "person"),  # CC12M writes this for names; no HTML tag
    (_web_address("https?"),                     ""),        # query strings survive: "?x=1"
    (_web_address("www"),                        ""),        # "www:", with a colon; "www.a.it" has gone above
]]

# Step 2, on the plain text: web debris, and one spelling for each kind of punctuation.
_TEXT_RULES = [(re.compile(pattern), new) for pattern, new in [
    (r"@\w+\b",                                  ""),        # nicknames
    (r"[\u31c0-\u9fff]+",                        ""),        # CJK, seven adjoining blocks; kana, hangul stay
    (rf"[{_DASHES}]+",                           "-"),       # U+2212, the minus sign, is not among them
    (r"[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),       # ` acute, guillemets, curly pair, diaeresis
    (r"[\u2018\u2019]",                          "'"),       # curly apostrophes
    (r"&quot;?",                                 ""),        # entities that were escaped twice
    (r"&amp",                                    ""),        # leaves its semicolon behind
    (r"\d{1,3}(?:\.\d{1,3}){3}",                 " "),       # IPv4
    (r"\d:\d\d\s+$",                             ""),        # article ids; also "5:30" before a dropped @nick
    (r"\\n",                                     " "),       # a newline that was escaped: two characters
    (r"#\d{1,3}\b",                              ""),        # "#123"; four digits stay
    (r"#\d{5,}\b",                               ""),        # "#12345"
    (r"\b\d{6,}\b",                              ""),        # stock numbers
    (rf"\S+\.(?:{_FILE_TYPES})",                 ""),        # file names, with all that is glued in front
    (r"""["']{2,}""",                            '"'),       # shouting: ""sale""
    (r"\.{2,}",                                  " "),       # ellipses
    (r"[#®•©™&@·º½¾¿¡§~)(\][}{|\\/*]+",          " "),       # ***sale***, #sale
    (r"\s+\.\s+",                                " "),       # a full stop left alone
]]

# Step 3, on the repaired text: catalogue codes, shop phrases, then the ends of the string.
_FINAL_RULES = [(re.compile(pattern), new) for pattern, new in [
    (rf"\b{_LETTER}{{1,3}}\d{{3,15}}\b",         ""),        # jc6640
    (rf"\b{_LETTER}+\d+{_LETTER}+\b",            ""),        # jc6640vc
    (rf"\b\d+{_LETTER}+\d+\b",                   ""),        # 6640vc231
    (r"(?:worldwide\s+)?(?:free\s+)?shipping",   ""),
    (r"(?:free\s)?download(?:\sfree)?",          ""),
    (r"\bclick\b\s(?:for|on)\s\w+",              ""),
    (rf"\b(?:{_FILE_TYPES})(?:\simages?)?",      ""),        # no boundary behind: "pdfs" keeps its "s"
    (r"\bpage\s+\d+\b",                          ""),
    (rf"\b\d*(?:{_LETTER}+\d+){{2}}[a-zA-Z\d]*\b", " "),     # j2d1a2a
    (r"\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b",   ""),        # 1920x1080, also with Cyrillic x or a times sign
    (r"\b\s+:\s+",                               ": "),
    (r"(\D[,./])\b",                             r"\1 "),    # the blank that was forgotten; "50,000" is safe
    (r"\s+",                                     " "),
    (r"""^["']([\w\W]+)["']$""",                 r"\1"),     # enclosing quotes, which need not match
    (r"^['_,\-:;]",                              ""),
    (r"['_,\-:+]$",                              ""),
    (r"^\.\S+$",                                 ""),        # the whole caption is a file ending
]]
# fmt: on


def clean_caption(caption: str) -> str:
    """The pre-processing of captions for T5 that the official code applies, twice in a row, to each prompt.

    The rules descend from DeepFloyd IF and PixArt.  The second pass is not idle: it cleans what the first one
    laid bare (entities inside entities, ends freed of blanks).

    >>> clean_caption("A <b>RED</b> ball&mdash;as on https://www.example.com/ball, 1920x1080 ...")
    'a red ball-as on'
    """
    import ftfy
    from bs4 import BeautifulSoup
    from bs4.exceptions import ParserRejectedMarkup

    def apply(rules: list[tuple[re.Pattern, str]], text: str) -> str:
        for pattern, new in rules:
            text = pattern.sub(new, text)
        return text

    for _ in range(2):
        caption = apply(_MARKUP_RULES, urllib.parse.unquote_plus(caption).strip().lower())
        with contextlib.suppress(ParserRejectedMarkup):                      # "<![a b" is no markup
            # As a file: of a string such as "a/b" bs4 would warn that it looks like a path.
            caption = BeautifulSoup(io.StringIO(caption), features="html.parser").text
        caption = apply(_TEXT_RULES, caption)
        if len(_HYPHENATION.findall(caption)) > 3:  # "this-is-my-little-cat", but not "two-word"
            caption = _HYPHENATION.sub(" ", caption)
        caption = html.unescape(html.unescape(ftfy.fix_text(caption))).strip()
        caption = apply(_FINAL_RULES, caption).strip()
    return caption


# --------------------------------------------------------------------------------------------------------- T5


def load_tokenizer(t5: Path) -> Any:
    """The SentencePieceProcessor of a T5 folder."""
    from sentencepiece import SentencePieceProcessor

    file = t5 / "spiece.model"
    with reading("tokenizer", file):
        return SentencePieceProcessor(model_file=str(file))


def tokenize(tokenizer: Any, captions: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Captions -> T5 token ids (n, L) and 0/1 mask (n, L), truncated to L with a warning.

    tokenizer: a SentencePieceProcessor. An empty caption has no token at all: its mask is zero.
    """
    ids = torch.zeros(len(captions), length, dtype=torch.long, device="cpu")     # T5 pads with 0
    mask = torch.zeros_like(ids)
    for row, caption in enumerate(captions):
        pieces = tokenizer.encode(caption) + [1] if caption else []          # T5 ends with </s> = 1
        if len(pieces) > length:
            warnings.warn(f"the prompt has {len(pieces)} tokens; only the first {length} are used: "
                          f"{caption[:40]!r}...", stacklevel=2)
            pieces = pieces[: length - 1] + [1]
        ids[row, : len(pieces)] = ids.new_tensor(pieces)
        mask[row, : len(pieces)] = 1
    return ids, mask


def unread(t5: Path, prompts: Iterable[str], words: bool = True) -> list[str]:
    """Warnings of prompts of which T5 can read nothing and, if `words`, of single words that it cannot."""
    tokenizer = load_tokenizer(t5)
    warned = []
    for prompt in prompts:
        heard = clean_caption(prompt).split()
        unknown = [w for w in heard if tokenizer.unk_id() in tokenizer.encode(w) and re.search(r"\w", w)]
        if re.search(r"\w", prompt) and not re.search(r"\w", "".join(heard)):
            warned.append(f"warning: nothing of the prompt {prompt!r} can be read by the text encoder: "
                          f"say it in English")
        elif unknown and words:
            warned.append(f"warning: the text encoder cannot read {', '.join(map(repr, unknown))}: "
                          f"say it in English")
    return warned


def load_text(path: str, length: int, width: int) -> tuple[Tensor, Tensor]:
    """What `sample.py --save_text` wrote: text (n, length, width) and mask (n, length)."""
    with reading("text", path):
        saved = load_file(path)
        text, mask = saved["text"], saved["mask"]
    require(text.shape[1:] == (length, width) and mask.shape == text.shape[:2] and len(text),
            f"text {path!r} has shape {tuple(text.shape)}, this model needs (prompts, {length}, {width}): "
            f"save it again with this model")
    require(text.isfinite().all(), f"text {path!r} has numbers that are not finite: save it again")
    return text, mask


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """For the import of transformers: its 1,500 modules are no garbage, and to look through what they hold
    again and again would take a quarter of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class T5:
    """A T5 encoder folder (config.json, weights, spiece.model), read offline, when captions come.

    The XXL encoder has 4.7 B parameters: 9.5 GB in bfloat16, the default (19 in float32). The DiT needs that
    memory and a run needs each prompt once, so the model is freed after every call unless `keep` is set.
    """

    def __init__(self, folder: str | Path, length: int = 800, device: str | torch.device = "cpu",
                 dtype: torch.dtype = torch.bfloat16, keep: bool = False):
        self.folder, self.length = Path(folder).absolute(), length           # it is read later: see os.chdir
        self.device, self.dtype, self.keep = device, dtype, keep
        self.model: Any = None

    def make(self) -> Any:
        """A transformers.T5EncoderModel without its weights. (Its own from_pretrained would change PyTorch's
        default dtype while it works, for all threads.)"""
        check_text_encoder(self.folder)
        with no_garbage_collection():
            from transformers import T5Config, T5EncoderModel  # it takes seconds
        with torch.device("meta"):
            model: Any = T5EncoderModel(T5Config.from_pretrained(self.folder, local_files_only=True))
        model = model.to(self.dtype)
        model.encoder.embed_tokens = model.shared
        if self.dtype == torch.float16:                      # its sums would overflow
            for block in model.encoder.block:
                block.layer[-1].DenseReluDense.wo.float()
        return model

    def read(self) -> Any:
        """The model with its weights, of safetensors or, in an official download, of .bin files."""
        model = self.make()
        dtypes = {name: u.dtype for name, u in model.state_dict().items()}
        missing = set(dtypes)
        for file in text_encoder_files(self.folder):
            if file.suffix == ".bin":
                from convert_weights import load_pickle

                weights = load_pickle(file, "cpu")
            else:
                weights = load_file(file, "cpu")
            found = {k: weights[k].to(self.device, dtypes[k]) for k in dtypes.keys() & weights.keys()}
            model.load_state_dict(found, strict=False, assign=True)
            missing -= found.keys()
        self.refuse_without(missing)
        return model.eval()

    def refuse_without(self, names: Iterable[str]) -> None:
        """ValueError if the folder lacks tensors that the model needs."""
        missing = sorted(set(names) - {"encoder.embed_tokens.weight"})       # it is shared.weight again
        require(not missing, f"the text encoder in {str(self.folder)!r} lacks {len(missing)} tensor(s), such "
                f"as {missing[:1]}: convert it again")

    @torch.no_grad()
    def __call__(self, captions: Sequence[str], clean: bool = True) -> tuple[Tensor, Tensor]:
        """One caption or several -> last hidden state (n, L, C) float32 and mask (n, L), on the CPU."""
        captions = [captions] if isinstance(captions, str) else captions
        model = self.model or self.read()
        self.model = model if self.keep else None
        tokenizer = load_tokenizer(self.folder)
        captions = [clean_caption(c) if clean else c for c in captions]
        ids, mask = tokenize(tokenizer, captions, self.length)
        used = max(1, int(mask.sum(1).max()))            # the columns that are not padding everywhere
        ids, short = ids[:, :used].to(self.device), mask[:, :used].to(self.device)
        hidden = model(ids, attention_mask=short).last_hidden_state.float().cpu()
        # Padding is zeroed, so that a result does not depend on what else is in the batch.
        return F.pad(hidden * mask[:, :used, None], (0, 0, 0, self.length - used)), mask

    def each(self, captions: Iterable[str]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Each distinct caption with its text (L, C) and mask (L,). 16 are encoded at a time, and the model
        is freed after the last ones."""
        distinct = list(dict.fromkeys(captions))
        for i in range(0, len(distinct), 16):
            batch = distinct[i : i + 16]
            self.keep = i + 16 < len(distinct)
            yield from zip(batch, *self(batch), strict=True)
