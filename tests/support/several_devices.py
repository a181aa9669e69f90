"""Simulated devices on a CPU: operations that need a ``.to`` between devices fail without it."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from harness_rect.models.architecture import locate

#: Kinds of devices that torch can name everywhere: one of which no code here knows anything, and Apple's,
#: which has no float64.
KINDS = {"xpu", "mps"}
#: Operations whose tensors may lie on different devices; the first one's counts.
_MAY_MIX = {"copy_", "__getitem__", "__setitem__", "index_put_", "index_put"}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def place(tensor: Tensor, device: torch.device | None) -> None:
    """Say that a tensor lies on this device; None: on the CPU."""
    tensor.lies_on = device  # type: ignore[attr-defined]
    for counted in Counted.entered:
        counted.put(tensor, device)


def device_of(tensor: Tensor) -> torch.device | None:
    found = getattr(tensor, "lies_on", None)
    if found is None and tensor._base is not None:  # a view made where python did not see it
        return getattr(tensor._base, "lies_on", None)
    return found


def _pretended(device: Any) -> torch.device | None:
    if isinstance(device, str | torch.device) and torch.device(device).type in KINDS:
        return torch.device(device)
    return None


class SeveralDevices(TorchFunctionMode):
    """While it is entered, tensors that were placed say so and refuse to meet others.

    All of them lie on the CPU and are computed there. Tensors of one element without dimensions may go
    anywhere, and so may indices on the CPU, as with real devices.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if getattr(func, "__self__", None) is Tensor.device and name == "__get__":
            return device_of(args[0]) or func(*args, **kwargs)
        if name in {"to", "cpu", "cuda", "type_as"} and isinstance(args[0], Tensor):
            return _moved(name, func, args, kwargs)
        if name == "__set__" and func.__self__ is Tensor.data:  # as module.to does it
            place(args[0], device_of(args[1]))
            return func(*args, **kwargs)
        if name in {"grad", "backward"}:
            return _gradients(func, args, kwargs)
        inputs = list(_tensors(args)) + list(_tensors(kwargs))
        if name in {"numpy", "__array__"} and device_of(inputs[0]):
            raise TypeError(f"can't convert {device_of(inputs[0])} tensor to numpy")
        asked = _pretended(kwargs.get("device"))
        if asked is not None:
            kwargs = {**kwargs, "device": "cpu"}
        where = asked or _common(name, args, inputs)
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            if asked is not None or device_of(tensor) is None:
                place(tensor, where)
            _check_dtype(tensor)
        return result


def _gradients(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``torch.autograd.grad(outputs, inputs, grad_outputs)`` or ``backward``."""
    named = dict(zip(("outputs", "inputs", "grad_outputs"), args, strict=False)) | kwargs
    for tensor, gradient in zip(
        _tensors(named.get("outputs")), _tensors(named.get("grad_outputs")), strict=False
    ):
        if device_of(tensor) != device_of(gradient):
            raise RuntimeError(f"gradient on {device_of(gradient)} of a tensor on {device_of(tensor)}")
    result = func(*args, **kwargs)
    if isinstance(result, tuple):
        for gradient, tensor in zip(result, _tensors(named["inputs"]), strict=True):
            if gradient is not None:
                place(gradient, device_of(tensor))
    return result


def _common(name: str, args: tuple[Any, ...], inputs: list[Tensor]) -> torch.device | None:
    if name in _MAY_MIX:
        here = device_of(inputs[0])
        if name != "copy_" and {device_of(x) for x in inputs[1:]} - {None, here}:
            raise RuntimeError(f"{name}: indices or values elsewhere, tensor on {here}")
        by_index = len(args) > 2 and any(True for _ in _tensors(args[1]))
        if by_index and any(x.dim() and device_of(x) != here for x in _tensors(args[2])):
            raise RuntimeError(f"{name}: values elsewhere, tensor on {here}")
        return here
    devices = {device_of(x) for x in inputs if x.dim() or device_of(x)}
    # Those of an optimiser over many tensors at once, and a question about two.
    if len(devices) > 1 and not name.startswith(("_foreach", "_has_compatible")):
        raise RuntimeError(f"{name}: expected all tensors on one device, found {devices}")
    return next(iter(devices), None)


def _moved(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    tensor = args[0]
    target = device_of(tensor)
    rest = []
    for value in [*args[1:], *kwargs.values()]:
        if isinstance(value, Tensor):
            target = device_of(value)
        elif isinstance(value, torch.device) or (isinstance(value, str) and name == "to"):
            target = _pretended(value)
    if name in {"cpu", "cuda"}:
        target = None
    for value in args[1:]:
        rest.append(torch.device("cpu") if _pretended(value) else value)
    kwargs = {key: "cpu" if _pretended(value) else value for key, value in kwargs.items()}
    result = func(tensor, *rest, **kwargs)
    if target != device_of(tensor):
        result = result.clone() if result is tensor else result
    if result is not tensor:
        place(result, target)
    _check_dtype(result)
    return result


def _check_dtype(tensor: Tensor) -> None:
    device = device_of(tensor)
    if device is not None and device.type == "mps" and tensor.dtype == torch.float64:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")


class _Moves(AlignDevicesHook):
    """Moves what a module is given to its device, without asking whether there is such a device."""

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module


def spread(
    model: nn.Module, blocks: list[nn.Module], last: list[nn.Module], devices: int, kind: str = "xpu"
) -> None:
    """Place a model as a device map would, its blocks in equal parts, with accelerate's hooks on the way; on
    one device without, as ``model.to``.

    last: modules that go with the last block; all others are on the first device.
    """
    every = [torch.device(kind, i) for i in range(devices)]
    parts = [(model, every[0]), *((module, every[-1]) for module in last)]
    parts += [(block, every[i * devices // len(blocks)]) for i, block in enumerate(blocks)]
    where = {inner: device for part, device in parts for inner in part.modules()}
    for module, device in where.items():
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            place(tensor, device)
        if devices > 1 and (module is model or module in blocks or list(module.parameters(recurse=False))):
            add_hook_to_module(module, _Moves(device, io_same_device=module is model))


def over_devices(model: Any, count: int = 3, kind: str = "xpu") -> dict[str, torch.device]:
    """As device maps do: norm and head with the last block, a tied head with the embeddings; the map."""
    parts = locate(model)
    names = [name for name in (parts.norm, None if model.config.tie_word_embeddings else parts.head) if name]
    blocks, last = ([model.get_submodule(name) for name in group] for group in (parts.blocks, names))
    spread(model, blocks, last, count, kind)
    every = [torch.device(kind, i) for i in range(count)]
    places = {name: every[i * count // len(blocks)] for i, name in enumerate(parts.blocks)}
    return {"": every[0]} | dict.fromkeys(names, every[-1]) | places


class Counted(TorchDispatchMode):
    """While it is entered, the bytes on each simulated device are counted, from a model's weights on.

    Attributes:
        most: device -> the largest number so far.
    """

    entered: ClassVar[list[Counted]] = []

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now: Counter[torch.device | None] = Counter()
        self.most: Counter[torch.device | None] = Counter()
        self._where = WeakIdKeyDictionary()
        for tensor in model.parameters():
            self.put(tensor, device_of(tensor))

    def __enter__(self) -> Counted:
        self.entered.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.entered.remove(self)
        super().__exit__(*error)

    def put(self, tensor: Tensor, device: torch.device | None) -> None:
        """Count the memory of a tensor on this device and no longer on another."""
        storage = tensor.untyped_storage()
        if storage in self._where:
            self.now[self._where[storage][0]] -= storage.nbytes()
            self._where[storage][0] = device
        else:
            self._where[storage] = place = [device]
            weakref.finalize(storage, self._freed, place, storage.nbytes())
        self.now[device] += storage.nbytes()
        self.most[device] = max(self.most[device], self.now[device])

    def _freed(self, place: list[torch.device | None], size: int) -> None:
        self.now[place[0]] -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        known = (self._where.get(tensor.untyped_storage()) for tensor in _tensors(args) if tensor.dim())
        device = next((place[0] for place in known if place and place[0]), None)
        for tensor in _tensors(result):
            if tensor.untyped_storage() not in self._where:
                self.put(tensor, device)
        return result
