"""Tuning results as files: one JSON table per device and engine version, the user's own and those that are shipped.

A file that cannot be read is reported once and ignored: a bad cache must not stop a model. Writing merges into what is
there under a lock and replaces the file in one step, so that two tuners at once lose nothing and a crash leaves the old
file.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import platformdirs
import torch
from filelock import FileLock

__all__ = [
    "FORMAT",
    "Measurement",
    "Table",
    "TuningKey",
    "cache_dir",
    "engine_of",
    "load_tables",
    "merge",
    "read_table",
]

_log = logging.getLogger("svg2_compile.kernels")

FORMAT = 1
DENSITY_BUCKETS = (10, 25, 50)  # percent
SHIPPED = Path(__file__).resolve().parent / "configs"


@dataclass(frozen=True)
class TuningKey:
    """What a configuration was measured for, besides the device and the engine, which the table names.

    kernel: a key of ``search_space.SPACES``. dtype: without "torch.". head_dim: as padded. tokens: the power of two at
    or below the number of tokens. density: percent, one of DENSITY_BUCKETS.
    """

    kernel: str
    dtype: str
    head_dim: int
    tokens: int
    density: int

    @classmethod
    def of(cls, kernel: str, dtype: torch.dtype, head_dim: int, num_tokens: int, density: float) -> TuningKey:
        """The key for one shape; density: a fraction."""
        percent = min(DENSITY_BUCKETS, key=lambda bucket: abs(bucket - 100 * density))
        width = max(16, 1 << (head_dim - 1).bit_length())
        tokens = 1 << (max(num_tokens, 1).bit_length() - 1)
        return cls(kernel, str(dtype).removeprefix("torch."), width, tokens, percent)


@dataclass(frozen=True)
class Measurement:
    """The best configuration found for a key. Times are medians in milliseconds; tried: configurations timed."""

    config: Mapping[str, int]
    best_ms: float
    default_ms: float
    tried: int


@dataclass
class Table:
    """All measurements of one device with one engine ("triton 3.6", or "torch 2.13" for the CPU kernels)."""

    device: str
    engine: str
    measurements: dict[TuningKey, Measurement] = field(default_factory=dict)

    @property
    def configs(self) -> dict[TuningKey, Mapping[str, int]]:
        return {key: found.config for key, found in self.measurements.items()}

    def to_json(self) -> dict[str, Any]:
        entries = [{**asdict(key), **asdict(found)} for key, found in self.measurements.items()]
        entries.sort(
            key=lambda entry: [str(entry[name]) for name in ("kernel", "dtype", "head_dim", "tokens", "density")]
        )
        return {"format": FORMAT, "device": self.device, "engine": self.engine, "entries": entries}

    @classmethod
    def from_json(cls, document: Any) -> Table:
        """Raises ValueError with what is wrong."""
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            found = document.get("format") if isinstance(document, dict) else type(document).__name__
            raise ValueError(f"format is {found!r}; valid: {FORMAT}")
        try:
            table = cls(_typed(document["device"], str), _typed(document["engine"], str))
            for entry in _typed(document["entries"], list):
                numbers = [_typed(entry[name], int) for name in ("head_dim", "tokens", "density")]
                key = TuningKey(_typed(entry["kernel"], str), _typed(entry["dtype"], str), *numbers)
                config = {str(name): _typed(value, int) for name, value in _typed(entry["config"], dict).items()}
                times = [float(entry["best_ms"]), float(entry["default_ms"])]
                table.measurements[key] = Measurement(config, *times, _typed(entry["tried"], int))
        except (KeyError, TypeError) as problem:
            raise ValueError(f"an entry is incomplete or has a wrong type: {problem}") from None
        return table


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def engine_of(device_name: str) -> str:
    """What compiles the kernels of a device, with the version that decides how fast a configuration is."""
    package = "torch" if device_name.startswith("cpu") else "triton"
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"{package} not installed"
    return f"{package} {'.'.join(version.split('.')[:2])}"


def cache_dir() -> Path:
    """Where the user's tables lie; SVG2_CACHE_DIR moves it."""
    given = os.environ.get("SVG2_CACHE_DIR")
    return (Path(given) if given else platformdirs.user_cache_path("svg2-compile")) / "tuning"


def table_name(device_name: str, engine: str) -> str:
    """File name of a table."""
    return re.sub(r"[^a-z0-9.]+", "-", f"{device_name} {engine}".lower()).strip("-") + ".json"


def read_table(path: Path) -> Table:
    """Raises OSError or ValueError (with what is wrong) for a file that is no table."""
    try:
        return Table.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise ValueError(f"not valid JSON: {problem}") from None


def load_tables(device_name: str) -> tuple[Table, ...]:
    """The tables for a device and the installed engine, the user's first. Unreadable files are reported and ignored."""
    engine = engine_of(device_name)
    tables = []
    for folder in (cache_dir(), SHIPPED):
        path = folder / table_name(device_name, engine)
        table = _read_or_report(path)
        if table is not None and (table.device, table.engine) == (device_name, engine):
            tables.append(table)
        elif table is not None:
            _log.warning("%s is ignored: it is for %s with %s", path, table.device, table.engine)
    return tuple(tables)


def _read_or_report(path: Path) -> Table | None:
    if not path.exists():
        return None
    try:
        return read_table(path)
    except (OSError, ValueError) as problem:
        _log.warning("the tuning table %s is ignored (%s); `svg2 tune` writes a new one", path, problem)
        return None


def merge(table: Table, folder: Path | None = None) -> Path:
    """Add a table's measurements to the user's file for its device, newer ones replacing older; returns the file."""
    path = (folder or cache_dir()) / table_name(table.device, table.engine)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        known = _read_or_report(path)
        measurements = {**(known.measurements if known else {}), **table.measurements}
        with _replacing(path) as file:
            json.dump(Table(table.device, table.engine, measurements).to_json(), file, indent=1)
            file.write("\n")
    return path


@contextmanager
def _replacing(path: Path) -> Iterator[Any]:
    """A text file that takes the place of ``path`` when it is complete, and leaves no trace otherwise."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
