"""How a command behaves: it shares the machine, says what is wrong in one line, and ends well on Ctrl-C.

    begin                          before PyTorch is imported: threads, Ctrl-C, what is not installed
    Parser, whole_number, number   a bad flag is one line, at once
    say, announce, progress_bar    what is printed while it runs
    uninterrupted, exit_code       how it ends, and with which exit code

Importing this file imports nothing slow, and not PyTorch, which reads what `share_the_machine` sets.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

# -------------------------------------------------------------------------------------------------- it begins


def begin() -> None:
    """The first thing that a command does, since its other imports take seconds."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:        # not where a shell ignores it
        signal.signal(signal.SIGINT, leave)
    sys.excepthook = name_what_is_missing
    share_the_machine()
    sys.stdout, sys.stderr = Quiet(sys.stdout), Quiet(sys.stderr)
    if sys.flags.optimize > 1:           # python -OO drops docstrings, which transformers needs: start again
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"PYTHONOPTIMIZE": ""})


def leave(*_: Any) -> None:
    """On Ctrl-C during imports, which may swallow an exception: nothing has begun, so just go."""
    os.write(1, b"interrupted before anything was written\n")
    os._exit(130)


def name_what_is_missing(kind: Any, error: Any, trace: Any) -> None:
    """Of an import that fails since a package is not installed: in one line, with the cure."""
    if not issubclass(kind, ModuleNotFoundError):
        sys.__excepthook__(kind, error, trace)
        return
    print(f"error: this Python has no package {error.name!r}: pip install -r requirements.txt, or start "
          f"the Python that has it", file=sys.stderr, flush=True)
    os._exit(2)


def share_the_machine() -> None:
    """Set what OpenMP reads when PyTorch is imported; what the user has set stays.

    Threads that wait for each other spin for a moment and then sleep. If they only spun, then on a busy
    machine they would keep the very thread they wait for from running. Where every core is busy already, half
    as many threads as cores lose less time in waiting. (tools/busy.py measures what both are worth.) Another
    number of threads adds in another order: the same seed may then give a pixel that differs by a level of
    255. Runs are equal if the user sets the number.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "4000")
    cores = os.cpu_count() or 1
    try:
        with open("/proc/loadavg") as file:
            others = int(file.read().split()[3].split("/")[0]) - 1           # that run or want to, without us
    except (OSError, ValueError, IndexError):                                # not Linux
        others = 0
    if others >= cores:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // 2)))


# ------------------------------------------------------------------------------------------------------ flags


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, without the usage, and guess at what was meant.

    In the names of flags hyphens and underscores are the same. A flag is given once, unless it collects its
    values: a second value would silently replace the first.
    """

    other_names: dict[str, str] = {}     # names that flags have elsewhere: these are taken
    suggested: dict[str, str] = {}       # these are not, since the meaning differs a little

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        def canonical(match: re.Match) -> str:
            name = match[1].replace("-", "_")
            return "--" + self.other_names.get(name, name)

        words = [re.sub(r"^--([\w-]+)", canonical, word) for word in (sys.argv[1:] if args is None else args)]
        parsed = super().parse_known_args(words, namespace)
        names = [word.partition("=")[0] for word in words]
        for name, flag in self._option_string_actions.items():
            may_repeat = isinstance(flag, argparse._AppendAction)
            if names.count(name) > 1 and name.startswith("--") and not may_repeat:
                self.error(f"{name} is given twice: leave one out")
        return parsed

    def error(self, message: str):
        if message.startswith("unrecognized arguments: "):
            word = message.split()[2].partition("=")[0]
            known = self.flags()
            flags = {name: name for name in known}
            flags |= {f"--{name}": f"--{new}" for name, new in (self.other_names | self.suggested).items()}
            near = get_close_matches(word, flags, 1, 0.75)
            if near:
                message += f" (did you mean {flags[near[0]]}?)"
            elif not word.startswith("-") and "--prompt" in known:
                message += " (a prompt of several words needs quotes)"
        if "not allowed with" in message:
            message += ": leave one of them out"
        say(f"error: {message}; see --help")
        sys.exit(2)

    def flags(self) -> set[str]:
        """The names of its flags, and those of its commands."""
        subparsers = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        commands = [command for action in subparsers for command in action.choices.values()]
        return set(self._option_string_actions).union(*(command.flags() for command in commands))


def whole_number(text: str, otherwise: str | None = None) -> int | str:
    """A whole number, or the word `otherwise`."""
    if text == otherwise:
        return text
    try:
        return int(text)
    except ValueError:
        also = f" or {otherwise!r}" if otherwise else ""
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number{also}") from None


def number(kind: type, least: float) -> Callable[[str], Any]:
    """A type for argparse: whole or real numbers, finite and not below the least (a real one: above it)."""
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (least <= value < math.inf) or kind is float and value == least:
            what = f"a number above {least}" if kind is float else f"a whole number of at least {least}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return parse


# -------------------------------------------------------------------------------------------- what is printed


def say(message: object) -> None:
    """One line on stderr whatever the message looked like, above the progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(" ".join(str(message).split()), file=sys.stderr)


LARGE = 10**9                        # bytes: it takes more than a moment to read them


def weight_bytes(folder: Path) -> int:
    """The size of all files of weights in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*") if file.suffix in (".safetensors", ".bin"))


def announce(what: str, folder: Path) -> None:
    """A line before large weights are read, which may take minutes."""
    size = weight_bytes(folder)
    if size > LARGE:
        say(f"reading the {what} {str(folder)!r}, {size / 2**30:.1f} GiB")


class Quiet:
    """stdout or stderr, whose reader may leave (`| head`): then it falls silent, and the video goes on."""

    def __init__(self, stream: Any):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def now_and_then() -> Callable[[], bool]:
    """When to write a line into a log, where nobody watches a bar: at once, after a second, then after twice
    as long, up to a minute. What this returns says whether it is time for one."""
    pause, next_line = 1, 0.0

    def is_time() -> bool:
        nonlocal pause, next_line
        if time.monotonic() < next_line:
            return False
        next_line, pause = time.monotonic() + pause, min(2 * pause, 60)
        return True

    return is_time


def progress_bar(chunks: float) -> tuple[Any, Callable]:
    """The bar of a video, and what to call with a magi.Progress after every pass through the model, in which
    all chunks in flight take a step. In a log, a line now and then."""
    from tqdm import tqdm

    bar = tqdm(unit=" passes", desc="starting", dynamic_ncols=True, disable=not sys.stderr.isatty())
    is_time = now_and_then()

    def progress(p: Any) -> None:
        where, done = f"chunk {p.chunk + 1}", f"pass {p.step}"
        if p.total is not None:
            where, done = f"{where}/{chunks}", f"{done} of {p.total}"
        if not bar.disable:
            bar.total = p.total
            bar.set_description_str(where, refresh=False)
            bar.update(p.step - bar.n)
        elif is_time() or p.step == p.total:
            say(f"{where}: {done}")

    return bar, progress


def peak_memory(device: str) -> str:
    """The most that this process has used at one time, in words."""
    import torch

    if torch.device(device).type == "cuda":
        return f"peak GPU memory {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB"
    try:
        import resource
    except ImportError:                                                      # Windows
        return "peak memory unknown"
    unit = 1 if sys.platform == "darwin" else 1024                           # a Mac counts in bytes
    return f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB"


# ---------------------------------------------------------------------------------------------------- it ends


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the block, so that a chunk is written whole or not at all."""
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def exit_code(action: Callable[[], Any], *, stopped: str = "stopped", kept: str = "", too_large: str = ""
              ) -> int:
    """Do the action -> the exit code of the command: 2 for a fault in what was given or in a file, 1 for a
    later failure, 130 for Ctrl-C. One line says what went wrong, as "error: ..." in every command; Ctrl-C is
    no error, and a warning is one line, too. A fault in the code shows its traceback. Of several processes
    the first one that fails says it.

    stopped: what is said of Ctrl-C; kept: what is left when another process is gone; too_large: what takes
    less memory.
    """
    import checkpoints
    import parallel

    if signal.getsignal(signal.SIGINT) is leave:         # from here on there may be files
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):              # a name that a terminal cannot show is no error
        with contextlib.suppress(AttributeError):        # a notebook's stream has no such method
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        with checkpoints.short_warnings(say):
            return action() or 0
    except KeyboardInterrupt as stop:
        line, code = str(stop) or stopped, 130
    except (ValueError, FloatingPointError, OSError, ImportError) as error:
        line, code = f"error: {error}", 2
    except (MemoryError, RuntimeError) as error:
        code = 1
        if parallel.lost_another(error):
            line = f"error: another process has stopped, and all with it; {kept}"
        elif isinstance(error, checkpoints.KernelError):
            line = f"error: {error}"
        elif checkpoints.out_of_memory(error):
            line = f"error: out of memory{too_large} ({error})"
        else:
            raise
    if code != 1 and parallel.rank() > 0:
        time.sleep(1)                    # what all have found, the first rank says
    if parallel.first_to_tell():
        say(line)
    return code
