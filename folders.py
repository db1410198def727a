"""Make an output folder that is there whole or not at all, whatever ends the program.

    with new_folder(src, out, force, size) as folder:    # OUT.partial, empty, and no other run writes in it
        ...                                              # write the files
    # Here OUT is complete. After an error or Ctrl-C, OUT.partial is gone, and OUT is as it was before.

convert_weights.py and tools/quantize.py write model folders with it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from checkpoints import require

OUR_FILES = ("config.json", "spiece.model", "model.safetensors.index.json")


def output_folder(src: Path, out: Path, force: bool) -> Path:
    """Return the folder that OUT names, without links. Raises ValueError if it must not be written.

    Call it before any work. An existing OUT must be a model folder, not hold `src`, and be meant (`force`).
    """
    for path in (out, *out.parents):
        require(path.exists() or not path.is_symlink(), f"{path} is a link to something that does not exist: "
                "give the name of the folder itself, or remove the link")
    if out.is_symlink():
        out = out.resolve()
    partial, old = beside(out)
    for leftover in (partial, old):
        require(not os.path.lexists(leftover) or is_ours(leftover),
                f"{leftover} is in the way and holds files that are not ours: move it elsewhere")
    if out.exists():
        require(force, f"{out} exists: choose another folder, or add --force to replace it")
        require((out / "config.json").is_file() and not src.resolve().is_relative_to(out.resolve()),
                f"{out} is not a model folder of ours, or it holds the source: --force does not replace it")
    return out


def beside(out: Path) -> tuple[Path, Path]:
    """Name the folder where OUT is made, and the one where an old OUT waits to be removed."""
    return out.with_name(f"{out.name}.partial"), out.with_name(f"{out.name}.replaced")


def is_ours(folder: Path) -> bool:
    """Tell if a folder holds only what a run writes. Unfinished files are called .tmp* or *.part."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return all(file.name in OUR_FILES or file.suffix in (".safetensors", ".unpacked", ".part")
               or file.name.startswith(".tmp") for file in folder.iterdir())


@contextmanager
def new_folder(src: Path, out: Path, force: bool, size: int) -> Iterator[Path]:
    """Yield a folder OUT.partial that becomes OUT if the block ends well, and is removed if it does not.

    An old OUT is moved aside at the end and removed last, so the old or the new one is whole at any time.
    size: how many bytes will be written. Raises ValueError if the disk has no room for them.
    """
    partial, old = beside(out)
    partial.mkdir(parents=True, exist_ok=True)
    with only_run_in(partial):
        if old.exists() and not out.exists():            # a run was killed while it replaced OUT
            old.rename(out)
        output_folder(src, out, force)                   # another run may have ended since the first look
        shutil.rmtree(old, ignore_errors=True)
        for leftover in partial.iterdir():               # a run was killed before it ended
            leftover.unlink()
        try:
            free = shutil.disk_usage(partial).free
            require(size <= free, f"{out} needs {size / 1e9:.3f} GB, but only {free / 1e9:.3f} GB are free")
            yield partial
            if out.exists():
                out.rename(old)
            partial.rename(out)
        except BaseException:                            # Ctrl-C is one of them
            if old.exists() and not out.exists():
                old.rename(out)
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            shutil.rmtree(old, ignore_errors=True)
    sizes = [file.stat().st_size for file in out.iterdir()]
    print(f"wrote {out}: {sum(sizes) / 1e9:.3f} GB in {len(sizes)} files")


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Raise ValueError if another run writes in the folder. The system frees the lock of a killed run."""
    try:
        import fcntl
    except ImportError:                                  # Windows has no such lock
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The other run may have ended just before: then its folder has another name by now.
        free = folder.exists() and os.path.samestat(os.fstat(handle), folder.stat())
    except BlockingIOError:
        free = False
    try:
        require(free, f"{folder} is in use by another run: wait for it to end, or choose another folder")
        yield
    finally:
        os.close(handle)
