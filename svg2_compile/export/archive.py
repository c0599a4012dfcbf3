"""The container of a saved program: a zip whose entries are all listed, with their SHA-256, in one JSON manifest.

Written to a temporary file that takes the final name only when it is complete and on the disk. Read with every
checksum verified: a byte that matters cannot be wrong without notice (the manifest itself is under the zip's CRC-32).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from svg2_compile.export.errors import ExportError, FileDamaged

__all__ = ["ArchiveReader", "ArchiveWriter", "is_archive"]

MANIFEST = "svg2/manifest.json"
_CHUNK = 4 << 20
_LARGEST_MANIFEST = 1 << 28
# What zipfile raises over a damaged file. RuntimeError: an entry that claims to be encrypted.
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, EOFError, struct.error, NotImplementedError, RuntimeError),
    *(ValueError, KeyError, IndexError, OverflowError, OSError, MemoryError),
)


def is_archive(path: Path) -> bool:
    """Whether a file looks like one of ours; damaged ones may not."""
    try:
        with zipfile.ZipFile(path) as archive:
            return MANIFEST in archive.namelist()
    except _DAMAGE:
        return False


class ArchiveWriter:
    """Writes entries, then the manifest. As a context manager: nothing appears under ``path`` unless all went well.

    Args:
        path: the final name.

    Raises:
        ExportError: its folder does not exist, or it is a folder itself.
    """

    def __init__(self, path: Path) -> None:
        if not path.parent.is_dir() or path.is_dir():
            raise ExportError(f"path: {path} is no file name in an existing folder.")
        self.path = path
        self._entries: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> ArchiveWriter:
        self._temporary = self.path.parent / f".{self.path.name}.{secrets.token_hex(6)}.part"
        self._file = self._temporary.open("x+b")
        self._zip = zipfile.ZipFile(self._file, "w", allowZip64=True)
        return self

    def add(self, name: str, data: bytes | memoryview, compress: bool = True) -> None:
        """Write one entry."""
        digest = hashlib.sha256()
        with self._zip.open(_info(name, compress), "w", force_zip64=len(data) >= 1 << 31) as entry:
            for start in range(0, len(data), _CHUNK):
                chunk = data[start : start + _CHUNK]
                digest.update(chunk)
                entry.write(chunk)
        self._entries[name] = {"size": len(data), "sha256": digest.hexdigest()}

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest; no entry may follow."""
        text = json.dumps({**manifest, "entries": self._entries}, indent=1, allow_nan=False)
        self._zip.writestr(_info(MANIFEST, True), text.encode())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self._zip.close()
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self._temporary, self.path)
                _sync_folder(self.path.parent)
        finally:
            self._file.close()
            self._temporary.unlink(missing_ok=True)  # it is missing where it has its final name


def _info(name: str, compress: bool) -> zipfile.ZipInfo:
    # A fixed date: the same program gives the same bytes.
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    info.compress_type = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    info.external_attr = 0o644 << 16
    return info


def _sync_folder(folder: Path) -> None:
    """Make the new name durable, where the system lets a folder be opened."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class ArchiveReader:
    """Reads entries, each verified against the manifest.

    Raises:
        ExportError: there is no such file, or it is none of ours.
        FileDamaged: it is, and not as it was written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: IO[bytes] = path.open("rb")
        except OSError as error:
            raise ExportError(f"path: {path} cannot be read: {error.strerror}.") from error
        try:
            with self._refusing("its directory"):
                self._zip = zipfile.ZipFile(self._file)
                names = self._zip.namelist()
            if MANIFEST not in names:
                raise ExportError(
                    f"path: {path} was not written by svg2_compile.save. Valid: a file that was; a file of "
                    "torch.export.save goes through torch.export.load and svg2_compile.transform first."
                )
            self.manifest = self._read_manifest()
            self._check_names(names)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> ArchiveReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, name: str) -> bytes:
        """The content of an entry."""
        buffer = bytearray(self.size(name))
        self.read_into(name, memoryview(buffer))
        return bytes(buffer)

    def size(self, name: str) -> int:
        """The size of an entry in bytes."""
        entry = self.manifest["entries"].get(name)
        if entry is None:
            raise FileDamaged(f"path: {self.path} has no entry {name}.")
        return int(entry["size"])

    def read_into(self, name: str, buffer: memoryview) -> None:
        """Fill ``buffer``, of exactly the size of the entry."""
        expected = self.manifest["entries"][name]["sha256"]
        digest = hashlib.sha256()
        position = 0
        with self._refusing(name), self._zip.open(name) as entry:
            while position < len(buffer):
                count = entry.readinto(buffer[position : position + _CHUNK])  # type: ignore[attr-defined]
                if not count:
                    raise EOFError(f"{position} of {len(buffer)} bytes")
                digest.update(buffer[position : position + count])
                position += count
        if digest.hexdigest() != expected:
            raise FileDamaged(f"path: {self.path} is damaged: {name} does not have its checksum.")

    def _read_manifest(self) -> dict[str, Any]:
        with self._refusing(MANIFEST):
            if self._zip.getinfo(MANIFEST).file_size > _LARGEST_MANIFEST:
                raise ValueError("implausibly large")
            manifest = json.loads(self._zip.read(MANIFEST))
            entries = manifest["entries"]
            for name, entry in entries.items():
                if not isinstance(entry["sha256"], str) or self._zip.getinfo(name).file_size != entry["size"]:
                    raise ValueError(f"{name} is not as listed")
        assert isinstance(manifest, dict)
        return manifest

    def _check_names(self, names: list[str]) -> None:
        expected = {MANIFEST, *self.manifest["entries"]}
        if set(names) != expected or len(names) != len(expected):
            wrong = sorted(set(names) ^ expected) or sorted(name for name in names if names.count(name) > 1)
            raise FileDamaged(f"path: {self.path} is damaged: entries {wrong} are missing, doubled or not listed.")

    @contextlib.contextmanager
    def _refusing(self, what: str) -> Iterator[None]:
        try:
            yield
        except _DAMAGE as error:
            raise FileDamaged(
                f"path: {self.path} is no archive, truncated or damaged, at {what} ({type(error).__name__}: {error}). "
                "Valid: a file as svg2_compile.save wrote it."
            ) from error
