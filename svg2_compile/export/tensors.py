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

    Args:
        groups: group name -> tensor name -> tensor. Tensors on one storage, in whatever group, share its bytes.

    Attributes:
        index: plain data that :func:`restore_tensors` reads.

    Raises:
        ExportError: a tensor has no bytes of its own (fake, meta, sparse, quantised, a subclass).
    """

    def __init__(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._storages: dict[tuple[Any, int], Tensor] = {}
        self._names: dict[tuple[Any, int], str] = {}
        shared = _storages_of_several(tensor for group in groups.values() for tensor in group.values())
        self.index: dict[str, dict[str, dict[str, Any]]] = {
            group: {name: self._add(name, tensor, shared) for name, tensor in tensors.items()}
            for group, tensors in groups.items()
        }

    def entries(self) -> Iterator[tuple[str, memoryview]]:
        """Entry name and bytes of every storage. Bytes of an accelerator are copied one storage at a time."""
        for key, tensor in self._storages.items():
            on_host = tensor.detach().cpu()
            yield self._names[key], _bytes_of(on_host.untyped_storage(), on_host)

    def _add(self, name: str, tensor: Tensor, shared: set[tuple[Any, int]]) -> dict[str, Any]:
        _check_plain(name, tensor)
        key = _storage_key(tensor)
        kept = self._storages.get(key, tensor)
        if key not in self._storages:
            if key in shared:
                whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
                kept = whole.set_(tensor.untyped_storage())
            elif tensor.numel() * tensor.element_size() < tensor.untyped_storage().nbytes():
                kept = tensor.detach().clone(memory_format=torch.contiguous_format)  # a part of something larger
            self._storages[key] = kept
            self._names[key] = f"weights/{len(self._names):05d}"
        layout = tensor if key in shared else kept
        return {
            "entry": self._names[key],
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(layout.shape),
            "stride": list(layout.stride()),
            "offset": layout.storage_offset(),
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
            read_into(meta["entry"], _bytes_of(flat.untyped_storage(), flat))
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


def _check_plain(name: str, tensor: Tensor) -> None:
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


def _storages_of_several(tensors: Iterator[Tensor]) -> set[tuple[Any, int]]:
    counts: dict[tuple[Any, int], int] = {}
    for tensor in tensors:
        if tensor.layout == torch.strided and tensor.device.type != "meta":
            key = _storage_key(tensor)
            counts[key] = counts.get(key, 0) + 1
    return {key for key, count in counts.items() if count > 1}


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


def _bytes_of(storage: torch.UntypedStorage, owner: Tensor) -> memoryview:
    """The memory of a host storage. Valid as long as ``owner``, which the view keeps alive."""
    if not storage.nbytes():
        return memoryview(b"")
    array = (ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())
    array._owner = owner  # type: ignore[attr-defined]
    return memoryview(array).cast("B")
