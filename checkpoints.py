"""Model folders: configs, headers and weights on disk, and one clear line for whatever is wrong with them.

Used by magi.py, convert_weights.py, training.py, parallel.py and sample.py. Everything here works on headers
until `fill` is called, so a wrong file is refused before any weight is read.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["build", "check_device", "compare_headers", "fill", "headers_of", "load_module", "make_config",
           "read_config", "read_headers", "read_json", "read_tensors", "reading", "require", "save",
           "weight_files"]


Module = TypeVar("Module", bound=nn.Module)


def require(ok: Any, message: str) -> None:
    """Raise ValueError(message) unless ok: for what a user gave. An assert is for our own mistakes."""
    if not ok:
        raise ValueError(message)


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and "memory" in str(error)


@contextlib.contextmanager
def reading(what: str, path: str | Path) -> Iterator[None]:
    """Every library fails in its own way on a damaged file: make it one ValueError that names the file.

    Running out of memory passes through, and an error of the disk is not blamed on the file.
    """
    require(os.path.exists(path), f"{what} {str(path)!r} does not exist: check the path")
    try:
        if not os.path.isdir(path):
            open(path, "rb").close()                           # safetensors hides "permission denied"
        yield
    except Exception as error:
        if out_of_memory(error):
            raise
        cause = f"damaged or of another kind: {type(error).__name__}: {error}"
        if isinstance(error, OSError) and error.errno in errno.errorcode:
            cause = str(error.strerror)                           # the disk's fault
        raise ValueError(f"cannot read {what} {str(path)!r}, {cause}") from error


def read_json(path: str | Path, what: str = "config") -> Any:
    """A JSON file; json.loads finds a byte-order mark by itself when it is given bytes."""
    with reading(what, path):
        return json.loads(Path(path).read_bytes())


def read_config(folder: str | Path, part: str, kind: type) -> Any:
    """One dataclass of a folder's config.json. Raises ValueError if the file or a key is not as expected."""
    file = Path(folder) / "config.json"
    require(file.is_file(), f"no model in {str(folder)!r}: {file} does not exist; give a folder that "
            f"convert_weights.py or tiny/train.py has written (the small models are in the clone, not in an "
            f"installed copy: use pip install -e)")
    values = read_json(file)
    require(isinstance(values, dict) and isinstance(values.get(part), dict),
            f"{file} is not a config with a valid {part!r} part: convert the model again")
    try:
        return make_config(kind, values[part])
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{file} is not a config with a valid {part!r} part: {error}") from None


def make_config(kind: type, values: dict) -> Any:
    """A dataclass from JSON's types: lists become tuples, whole numbers floats where the field is one."""
    made = {}
    for name, value in values.items():
        want = type(getattr(kind, name))                 # of the default: dataclasses keep it on the class
        value = float(value) if want is float and type(value) is int else _tuples(value)
        require(type(value) is want or (name, value) == ("num_frames", None),
                f"{name} is {value!r}: it must be of type {want.__name__}")
        made[name] = value
    return kind(**made)


def _tuples(v: Any) -> Any:
    return tuple(_tuples(u) for u in v) if isinstance(v, list) else v


def weight_files(folder: str | Path, name: str = "model.safetensors") -> list[Path]:
    """The files of a checkpoint: the one of that name, or all that its index names; where only NAME.zst is
    there (official downloads), that."""
    folder = Path(folder)
    index, names = folder / f"{name}.index.json", [name]
    if index.is_file():
        values = read_json(index, "index")
        require(isinstance(values, dict) and isinstance(values.get("weight_map"), dict),
                f"{index} is no index of weights: download or convert the model again")
        names = sorted(set(values["weight_map"].values()))
    files = [folder / part for part in names]
    files = [file if file.is_file() else file.with_name(f"{file.name}.zst") for file in files]
    missing = [part for part, file in zip(names, files, strict=True) if not file.is_file()]
    require(not missing or index.is_file(), f"no weights in {str(folder)!r}: {folder / name} is missing, "
            f"download or convert the model again")
    require(not missing, f"{len(missing)} of {len(files)} files are missing in {str(folder)!r}, such as "
            f"{missing[:1]}: download or convert the model again")
    return files


def read_headers(files: Iterable[str | Path]) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Name -> shape, whether fp8, of all tensors in safetensors files. ValueError if one is corrupt."""
    from safetensors import safe_open

    found = {}
    for file in files:
        with reading("weights", file), safe_open(file, "pt") as f:
            for name in f.keys():
                part = f.get_slice(name)
                found[name] = tuple(part.get_shape()), part.get_dtype() == "F8_E4M3"
    return found


def read_tensors(file: str | Path, what: str = "weights") -> dict[str, Tensor]:
    """Name -> tensor in float32, of a small safetensors file."""
    from safetensors.torch import load_file

    with reading(what, file):
        return {name: v.float() for name, v in load_file(file).items()}


def headers_of(module: nn.Module) -> dict[str, tuple[tuple[int, ...], bool]]:
    """The same of a module's state dict."""
    return {k: (tuple(v.shape), v.dtype == torch.float8_e4m3fn) for k, v in module.state_dict().items()}


def compare_headers(found: dict, expected: dict, complaint: str) -> None:
    """ValueError, beginning with the complaint and naming the first difference, if they are not equal."""
    other = sorted(name for name in expected.keys() & found.keys() if found[name] != expected[name])
    for problem, names in (("lacks", expected.keys() - found.keys()),
                           ("has unknown", found.keys() - expected.keys()),
                           ("has other shapes or types for", other)):
        first = min(names, default="")
        values = f" ({found[first]}, not {expected[first]})" if names is other and names else ""
        require(not names, f"{complaint}: it {problem} {len(names)} tensor(s), such as {first!r}{values}")


def build(make: Callable[[], Module], folder: str | Path) -> Module:
    """A module without memory (on the meta device), after a look at the headers of a folder's files.

    ValueError, naming the first differences, if a file is corrupt or a name, shape or fp8 type differs.
    """
    with torch.device("meta"):
        module = make()
    compare_headers(read_headers(weight_files(folder)), headers_of(module),
                    f"the checkpoint in {str(folder)!r} does not fit its config (if an older version of this "
                    f"project wrote it, convert it again)")
    return module


def fill(module: Module, folder: str | Path, device: str | torch.device = "cpu",
         dtype: torch.dtype | None = None, only: Callable[[str], bool] = lambda name: True) -> Module:
    """Read a folder's weights, those whose names are wanted, straight to the device, as `dtype` or in the
    dtypes the module has: official files hold in bf16 the norms that are computed in float32."""
    from safetensors import safe_open

    dtypes = {k: dtype or v.dtype for k, v in module.state_dict().items()}
    for file in weight_files(folder):
        with safe_open(file, "pt", device=str(device)) as f:
            weights = {k: f.get_tensor(k).to(dtypes[k]) for k in f.keys() if only(k)}
        module.load_state_dict(weights, strict=False, assign=True)
    return module.eval().requires_grad_(False)


def save(tensors: dict[str, Tensor], file: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write safetensors whole or not at all, with the mode the umask asks for (save_file's own is 600)."""
    from safetensors.torch import save_file

    part = Path(file).with_name(f".{os.getpid()}.part")
    part.touch()
    mode = part.stat().st_mode & 0o777
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, part, metadata)
        part.chmod(mode)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def load_module(name: str, path: str | Path) -> Any:
    """A Python file as the module `name`, found by its path: its file name may be that of a package."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def check_device(device: str) -> None:
    """ValueError if PyTorch cannot compute on this device here."""
    require(re.fullmatch(r"cpu|mps|cuda(:\d+)?", str(device)),
            f"device {str(device)!r} is unknown: try cpu, cuda, cuda:1 or mps")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:                          # by how PyTorch was built
        reason = re.split(r"[.\n]\s|\.$", str(error))[0]
        raise ValueError(f"device {str(device)!r} is not available ({reason}): try cpu") from None
