"""Outputs that are there whole or not at all, whatever ends the program, and that one run writes at a time.

    with claimed(path, inputs) as path:                  # a file: links resolved, nobody else writes it
        replace(path, write)                             # the old file stays until the new one is whole
        save(tensors, path)                              # the same for safetensors
    with claimed_folder(folder, names, inputs) as paths: # several files in a folder
        ...
    with new_folder(src, out, force) as folder:          # a model folder: OUT.partial, empty
        check_room(folder, size)
        ...                                              # write the files
    # Here OUT is complete. After an error or Ctrl-C, OUT.partial is gone, and OUT is as it was before.

A place where nothing can or should be written is a ValueError before anything is written there; only the
folders above a new folder are made first.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from checkpoints import require

LONGEST_NAME = 255 - len("..lock")                       # in bytes: see `locked`
OUR_FILES = ("config.json", "spiece.model", "model.safetensors.index.json", "preview.json")


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Within this block nobody else writes this file or folder. If another run writes it now, ValueError, or
    with `wait` this run waits. The lock is a file beside it, which the system frees even after kill -9."""
    try:
        import fcntl
    except ImportError:                                  # Windows
        yield
        return
    path = path.absolute()
    lock = path.with_name(f".{path.name}.lock".replace("*", "all"))          # some systems allow no *
    while True:
        try:
            file = os.open(lock, os.O_CREAT | os.O_RDWR, 0o666)
        except OSError as error:
            raise ValueError(f"cannot write in folder {str(path.parent)!r}: {error.strerror}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(file)
            raise ValueError(f"another run is writing {str(path)!r}: wait for its end, or give this one "
                             f"another name") from None
        except OSError:                                  # a file system without locks
            break
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(lock), os.fstat(file)):
                break
        os.close(file)                                   # its owner was just leaving
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(file)


def resolved(path: Path) -> Path:
    """The path without links. ValueError if one leads to nothing."""
    for part in (path, *path.parents):
        require(part.exists() or not part.is_symlink(),
                f"{part} is a link to something that does not exist: remove it, or give another name")
    return Path(os.path.realpath(path))


# ---------------------------------------------------------------------------------------------------- a file


@contextmanager
def claimed(path: Path, inputs: Iterable[str | Path] = ()) -> Iterator[Path]:
    """An output for us alone: where to write, links resolved. ValueError if nothing can be written there, if
    it is one of the inputs, or if another run writes it."""
    path = check_output(path, inputs)
    with locked(path):
        yield path


@contextmanager
def claimed_folder(folder: Path, names: Iterable[str], inputs: Iterable[str | Path] = ()
                   ) -> Iterator[list[Path]]:
    """The same for several files in a folder, which is made, and removed again if nothing is written."""
    name = str(folder)
    is_video = folder.suffix.lower() in (".mp4", ".gif", ".png")
    require(folder.is_dir() or not folder.exists() and not is_video,
            f"--out {name!r} must be a folder, for the videos of --prompt_file")
    require(folder.parent.is_dir(), f"cannot make the folder {name!r}: create {str(folder.parent)!r} first")
    is_new = not folder.exists()
    folder.mkdir(exist_ok=True)
    try:
        with locked(folder / "*.mp4"):                   # one lock: each is an open file
            yield [check_output(folder / name, inputs) for name in names]
    finally:
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


@contextmanager
def standard_output() -> Iterator[BinaryIO]:
    """Standard output, for a video alone: whatever else is printed meanwhile goes to standard error."""
    require(not sys.stdout.isatty(), "--out - writes an mp4: send it to a player, such as | ffplay -")
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "wb") as stdout:
        os.dup2(2, 1)
        try:
            yield stdout
        finally:
            sys.stdout.flush()                           # while 1 is still standard error
            os.dup2(stdout.fileno(), 1)


def check_output(path: Path, inputs: Iterable[str | Path] = ()) -> Path:
    """Where to write, links resolved. ValueError if nothing can be written there, or if it is an input."""
    require(not path.exists() or not any(os.path.exists(file) and path.samefile(file) for file in inputs),
            f"{str(path)!r} is an input: give the output another name")
    name, folder, path = str(path), path.parent, resolved(path)
    require(not path.is_dir(), f"cannot write {name!r}: it is a folder, add a file name")
    require(not path.exists() or path.is_file(), f"cannot write {name!r}: it is no ordinary file")
    require(not path.exists() or os.access(path, os.W_OK), f"cannot write {name!r}: it is protected")
    require(path.parent.is_dir(), f"cannot write {name!r}: create the folder {str(folder)!r} first")
    require(len(os.fsencode(path.name)) <= LONGEST_NAME,
            f"the name of {name!r} is too long: at most {LONGEST_NAME} bytes")
    return path


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """write(file), then put that in the place of `path`; if it fails, on a full disk, the old one stays.
    A new file has the mode that the umask asks for."""
    new = path.with_name(f".{path.name}.new")
    try:
        new.touch()
        like = path if path.exists() else new
        mode = like.stat().st_mode & 0o777
        write(new)                                       # safetensors gives its files a mode of its own
        new.chmod(mode)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def save(tensors: dict[str, Tensor], file: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write safetensors, whole or not at all."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        replace(Path(file), lambda new: save_file(tensors, new, metadata))
    except SafetensorError as error:                     # what a full disk raises there
        raise OSError(f"cannot write {str(file)!r}: {error}") from None


# ------------------------------------------------------------------------------------------------- a folder


@contextmanager
def new_folder(src: Path, out: Path, force: bool) -> Iterator[Path]:
    """Yield a folder OUT.partial that becomes OUT if the block ends well, and is removed if it does not.

    An existing OUT must be a model folder, not hold `src`, and be meant (`force`). It is moved aside at the
    end and removed last, so the old or the new one is whole at any time.
    """
    out = resolved(out)
    partial, old = (out.with_name(f"{out.name}.{word}") for word in ("partial", "replaced"))
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out):
        for leftover in (partial, old):
            require(not os.path.lexists(leftover) or is_ours(leftover),
                    f"{leftover} is in the way and holds files that are not ours: move it elsewhere")
        if old.exists() and not out.exists():            # a run was killed while it replaced OUT
            old.rename(out)
        if out.exists():
            require(force, f"{out} exists: choose another folder, or add --force to replace it")
            require((out / "config.json").is_file() and not src.resolve().is_relative_to(out),
                    f"{out} is not a model folder of ours, or holds the source: --force does not replace it")
        for leftover in (partial, old):                  # a run was killed before it ended
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            if out.exists():
                out.rename(old)
            partial.rename(out)
        except BaseException:                            # Ctrl-C is one of them
            if old.exists() and not out.exists():
                old.rename(out)
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(old, ignore_errors=True)
    sizes = [file.stat().st_size for file in out.iterdir()]
    print(f"wrote {out}: {sum(sizes) / 1e9:.3f} GB in {len(sizes)} files")


def is_ours(folder: Path) -> bool:
    """Tell if a folder holds only what a run writes. Unfinished files are called .tmp* or *.new."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return all(file.name in OUR_FILES or file.suffix in (".safetensors", ".unpacked", ".new")
               or file.name.startswith(".tmp") for file in folder.iterdir())


def check_room(folder: Path, size: int) -> None:
    """ValueError if the disk has no room for so many bytes."""
    free = shutil.disk_usage(folder).free
    require(size <= free, f"this needs {size / 1e9:.3f} GB, but only {free / 1e9:.3f} GB are free in "
            f"{str(folder.parent)!r}")
