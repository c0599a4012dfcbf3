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
    "PROFILE_FIGURES",
    "Measurement",
    "Table",
    "TuningKey",
    "cache_dir",
    "engine_of",
    "load_table",
    "load_tables",
    "merge",
    "read_table",
    "write_table",
]

_log = logging.getLogger("svg2_compile.kernels")

FORMAT = 1
PROFILE_FIGURES = (
    "dense_flops",
    "sparse_flops",
    "kmeans_flops",
    "bandwidth",
    "cluster_overhead",
    "head_overhead",
    "call_overhead",
)
DENSITY_BUCKETS = (10, 25, 50)  # percent
# Tables of devices that were measured, shipped with the package.
SHIPPED = Path(__file__).resolve().parent / "configs"


@dataclass(frozen=True)
class TuningKey:
    """What a configuration was measured for, besides the device and the engine, which the table names.

    kernel: a key of ``space.SPACES``. dtype: without "torch.". head_dim: as padded. tokens: the power of two at
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
    """The best configuration found for a key. Times are medians in milliseconds.

    trials: what became of every configuration that was looked at: its time, or None where it was sorted out. complete:
    whether that was the whole search space.
    """

    config: Mapping[str, int]
    best_ms: float
    default_ms: float
    trials: Mapping[str, float | None]
    complete: bool


@dataclass
class Table:
    """All measurements of one device with one engine ("triton 3.6", or "torch 2.13" for the CPU kernels)."""

    device: str
    engine: str
    measurements: dict[TuningKey, Measurement] = field(default_factory=dict)
    # Throughputs and overheads for the cost model, by the names of its DeviceProfile; None: not measured.
    profile: Mapping[str, float] | None = None

    @property
    def configs(self) -> dict[TuningKey, Mapping[str, int]]:
        return {key: found.config for key, found in self.measurements.items()}

    def to_json(self) -> dict[str, Any]:
        entries = [{**asdict(key), **asdict(found)} for key, found in self.measurements.items()]
        entries.sort(
            key=lambda entry: [str(entry[name]) for name in ("kernel", "dtype", "head_dim", "tokens", "density")]
        )
        document = {"format": FORMAT, "device": self.device, "engine": self.engine, "entries": entries}
        return document if self.profile is None else {**document, "profile": dict(self.profile)}

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
                trials = {str(name): ms and float(ms) for name, ms in _typed(entry["trials"], dict).items()}
                best, default, complete = float(entry["best_ms"]), float(entry["default_ms"]), entry["complete"] is True
                table.measurements[key] = Measurement(config, best, default, trials, complete)
            if document.get("profile") is not None:
                table.profile = {name: _figure(name, document["profile"][name]) for name in PROFILE_FIGURES}
        except (KeyError, TypeError, ValueError) as problem:
            raise ValueError(f"an entry is incomplete or has a wrong type: {problem}") from None
        return table


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def _figure(name: str, value: Any) -> float:
    """A figure of a profile: an overhead may be nothing, a rate may not."""
    number = float(value)
    if not 0 <= number < float("inf") or (number == 0 and not name.endswith("_overhead")):
        raise ValueError(f"{name} is {value!r}; valid: a positive number")
    return number


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
    """The tables for a device and the installed engine, the user's first."""
    tables = (load_table(device_name, folder) for folder in (cache_dir(), SHIPPED))
    return tuple(table for table in tables if table is not None)


def load_table(device_name: str, folder: Path) -> Table | None:
    """The table in ``folder`` for a device and the installed engine; an unreadable one is reported and ignored."""
    engine = engine_of(device_name)
    path = folder / table_name(device_name, engine)
    if not path.exists():
        return None
    try:
        table = read_table(path)
    except (OSError, ValueError) as problem:
        _log.warning("the tuning table %s is ignored (%s); `svg2 tune` writes a new one", path, problem)
        return None
    if (table.device, table.engine) != (device_name, engine):
        _log.warning("the tuning table %s is ignored: it is for %s with %s", path, table.device, table.engine)
        return None
    return table


def merge(table: Table, folder: Path | None = None) -> Path:
    """Add a table's measurements to the user's file for its device, newer ones replacing older; returns the file."""
    folder = folder or cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / table_name(table.device, table.engine)
    with FileLock(path.with_suffix(".lock")):
        known = _stored(path)
        measurements = {**(known.measurements if known else {}), **table.measurements}
        profile = table.profile or (known.profile if known else None)
        write_table(path, Table(table.device, table.engine, measurements, profile))
    return path


def write_table(path: Path, table: Table) -> None:
    """Write a table in one step: whoever reads ``path`` sees the old file or the new one, whole."""
    with _replacing(path) as file:
        json.dump(table.to_json(), file, indent=1)
        file.write("\n")


def _stored(path: Path) -> Table | None:
    """What a merge adds to. A damaged file is set aside, not overwritten."""
    if not path.exists():
        return None
    try:
        return read_table(path)
    except (OSError, ValueError) as problem:
        aside = path.with_suffix(".damaged")
        os.replace(path, aside)
        _log.warning("the tuning table %s could not be read (%s); it is kept as %s", path, problem, aside)
        return None


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
