"""Weights as bytes: every storage once, however many tensors and graphs share it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from svg2_compile.export.errors import ExportError, FileDamaged

__all__ = ["StoredTensors", "restore_tensors"]


class StoredTensors:
    """The layout of named tensors in storages.

    Of a storage the part is kept that its tensors reach: a weight may be a slice of something much larger.

    Args:
        groups: group name -> tensor name -> tensor. Tensors on one storage, in whatever group, share its bytes.

    Attributes:
        index: plain data that :func:`restore_tensors` reads.

    Raises:
        ExportError: a tensor has no bytes of its own (fake, meta, sparse, quantised, a subclass).
    """

    def __init__(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._parts: dict[tuple[Any, int], _Part] = {}
        for tensors in groups.values():
            for name, tensor in tensors.items():
                _check_plain(name, tensor)
                key = _storage_key(tensor)
                part = self._parts.setdefault(key, _Part(f"weights/{len(self._parts):05d}", tensor))
                part.include(tensor)
        self.index = {
            group: {name: self._parts[_storage_key(tensor)].describe(tensor) for name, tensor in tensors.items()}
            for group, tensors in groups.items()
        }

    def entries(self) -> Iterator[tuple[str, memoryview]]:
        """Entry name and bytes of every storage. Bytes of an accelerator are copied one storage at a time."""
        for part in self._parts.values():
            flat = torch.empty(0, dtype=torch.uint8, device=part.owner.device)
            flat.set_(part.owner.untyped_storage(), part.start, (part.end - part.start,), (1,))
            on_host = flat.cpu()
            yield part.entry, _bytes_of(on_host)


class _Part:
    """The bytes [start, end) of a storage that go into one entry."""

    def __init__(self, entry: str, owner: Tensor) -> None:
        self.entry = entry
        self.owner = owner.detach()
        self.start, self.end = owner.untyped_storage().nbytes(), 0

    def include(self, tensor: Tensor) -> None:
        if tensor.numel():
            size = tensor.element_size()
            first = int(tensor.storage_offset()) * size
            last: int = (
                first + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) * size
            )
            # Whatever else lies in the storage has no wider elements than 16 bytes.
            self.start, self.end = min(self.start, first // 16 * 16), max(self.end, last + size)
        self.start = min(self.start, self.end)

    def describe(self, tensor: Tensor) -> dict[str, Any]:
        size = tensor.element_size()
        return {
            "entry": self.entry,
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "stride": list(tensor.stride()),
            "offset": (tensor.storage_offset() * size - self.start) // size if tensor.numel() else 0,
            "device": str(tensor.device),
            "parameter": isinstance(tensor, nn.Parameter),
            "requires_grad": tensor.requires_grad,
        }


def restore_tensors(
    index: Mapping[str, Mapping[str, Mapping[str, Any]]],
    size_of: Callable[[str], int],
    read_into: Callable[[str, memoryview], None],
) -> dict[str, dict[str, Tensor]]:
    """The tensors of :class:`StoredTensors`, on the devices that they came from, sharing storages as they did.

    Args:
        index: of StoredTensors.
        size_of: bytes of an entry.
        read_into: fills a buffer with the content of an entry.

    Raises:
        ExportError: a device is not there.
        FileDamaged: a tensor reaches beyond its entry.
    """
    storages: dict[tuple[str, str], torch.UntypedStorage] = {}

    def restore(name: str, meta: Mapping[str, Any]) -> Tensor:
        key = (meta["entry"], meta["device"])
        if key not in storages:
            flat = torch.empty(size_of(meta["entry"]), dtype=torch.uint8)
            read_into(meta["entry"], _bytes_of(flat))
            storages[key] = flat.to(_device(meta["device"])).untyped_storage()
        return _view(name, meta, storages[key])

    return {group: {name: restore(name, meta) for name, meta in metas.items()} for group, metas in index.items()}


def _view(name: str, meta: Mapping[str, Any], storage: torch.UntypedStorage) -> Tensor:
    dtype = getattr(torch, meta["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        raise ExportError(f"file: {name} has the dtype {meta['dtype']}, which PyTorch {torch.__version__} has not.")
    shape, stride, offset = meta["shape"], meta["stride"], meta["offset"]
    last = offset + sum((extent - 1) * step for extent, step in zip(shape, stride, strict=True))
    if all(shape) and (min([offset, *shape, *stride]) < 0 or (last + 1) * dtype.itemsize > storage.nbytes()):
        raise FileDamaged(f"file: {name} of shape {shape} reaches beyond the {storage.nbytes()} bytes of its entry.")
    tensor = torch.empty(0, dtype=dtype, device=storage.device).set_(storage, offset, shape, stride)
    if meta["parameter"]:
        return nn.Parameter(tensor, requires_grad=meta["requires_grad"])
    return tensor.requires_grad_(meta["requires_grad"])


def _check_plain(name: str, tensor: Any) -> None:
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or tensor.is_quantized:
        raise ExportError(f"program: {name} is a {type(tensor).__name__}. Valid: plain tensors can be saved.")
    if tensor.device.type == "meta" or tensor.layout != torch.strided:
        raise ExportError(
            f"program: {name} is on {tensor.device} with layout {tensor.layout}. Valid: strided tensors with values."
        )


def _storage_key(tensor: Tensor) -> tuple[Any, int]:
    storage = tensor.untyped_storage()
    # Empty storages have no address of their own.
    return (tensor.device, storage.data_ptr() or -id(tensor))


def _device(text: str) -> torch.device:
    device = torch.device(text)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ExportError(
            f"file: its program runs on {device}, which is not available here. Valid: load it on a machine with such a "
            "device, or move the exported program before the transform (torch.export.passes.move_to_device_pass)."
        ) from error
    return device


def _bytes_of(flat: Tensor) -> memoryview:
    """The memory of a host tensor of bytes, which the view keeps alive."""
    if not flat.numel():
        return memoryview(b"")
    array = (ctypes.c_ubyte * flat.numel()).from_address(flat.data_ptr())
    array._owner = flat  # type: ignore[attr-defined]
    return memoryview(array).cast("B")
