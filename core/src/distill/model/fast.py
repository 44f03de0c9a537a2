"""A frozen model in a faster form: BatchNorm folded away, channels last, fewer bits, elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from distill.data.batch import IMAGES, Batch, map_tensors
from distill.model.capture import Capture, find_module
from distill.model.wiring import Address, Values

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

Pair = tuple[nn.Module, nn.Module]
"""A convolution or linear layer, and the BatchNorm behind it."""


@dataclass(frozen=True)
class FastTeacher:
    """A model that runs in another's place, and what its inputs and values are brought into.

    Attributes:
        model: a copy of the other one, with modules of the same names.
        special: what is put around it, ``None`` if it is called by itself.
        device: where it runs.
        home: where its values are needed.
        dtype: that its weights have been brought into and its inputs are; values of it come back
            as float32.
        channels_last: whether images are given to it with their channels last.
        batchnorms: how many there are in the model, less those that did not run.
        folded: how many of them are part of the layer before them.
        refused: why none is, though there are some that could be.
    """

    model: nn.Module
    special: nn.Module | None
    device: torch.device
    home: torch.device
    dtype: torch.dtype | None = None
    channels_last: bool = False
    batchnorms: int = 0
    folded: int = 0
    refused: str = ""

    def __call__(self, batch: Batch, pruned: nn.Module | None = None) -> Any:
        """Call it, or what is left of it without side branches, on a batch of the other's."""
        if torch.is_autocast_enabled(self.device.type):
            with torch.autocast(self.device.type, enabled=False):
                return self._call(batch, pruned)
        return self._call(batch, pruned)

    def back(self, value: Any) -> Any:
        """Return what it gave where it is needed, in float32."""
        return map_tensors(self._back, value)

    def _call(self, batch: Batch, pruned: nn.Module | None) -> Any:
        inputs = map_tensors(self._given, batch.inputs)
        if self.special is None:
            return (self.model if pruned is None else pruned)(inputs)
        given = replace(batch, inputs=inputs, extras=map_tensors(self._given, batch.extras))
        return self.special(self._there(given))

    def _there(self, batch: Batch) -> Batch:
        if self.device == self.home:
            return batch
        return batch.to(self.device, non_blocking=self.device.type != "cpu")

    def _given(self, tensor: torch.Tensor) -> torch.Tensor:
        dtype = (self.dtype if tensor.is_floating_point() else None) or tensor.dtype
        is_image = self.channels_last and tensor.dim() == IMAGES
        form = torch.channels_last if is_image else torch.preserve_format
        return _moved(tensor, self.device, dtype, form)

    def _back(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype in (torch.bfloat16, torch.float16):
            tensor = tensor.float()
        return _moved(tensor, self.home, tensor.dtype)


def _moved(
    tensor: torch.Tensor,
    device: torch.device,
    dtype: torch.dtype,
    form: torch.memory_format = torch.preserve_format,
) -> torch.Tensor:
    # Of a copy to the CPU nothing tells when it is there.
    return tensor.to(device, dtype, non_blocking=device.type != "cpu", memory_format=form)


def values_read(
    model: nn.Module, call: Callable[[], Any], role: str, addresses: Iterable[Address]
) -> dict[str, Any]:
    """Return what a step reads of a model, by reference.

    Args:
        model: the model.
        call: calls it and returns its output.
        role: its name; what is captured in it is addressed by ``<role>.<path>``.
        addresses: what is read.
    """
    addresses = list(addresses)
    paths = {a.value: _path(role, a.value) for a in addresses if a.value != role}
    with torch.no_grad(), Capture(model, paths.values(), clone=True) as capture:
        values: Values = {role: call()}
        captured = capture.pop()
    values |= {name: captured[path] for name, path in paths.items()}
    return {address.text: address.read(values) for address in addresses}


def relative_error(plain: Any, other: Any) -> float:
    """Return the largest difference over the largest magnitude, over all tensors in two values.

    Infinite if something is not finite in ``other`` alone.
    """
    pairs = zip(_floats(plain), _floats(other), strict=True)
    errors = [_relative_error(a.cpu().double(), b.cpu().double()) for a, b in pairs]
    return max(errors, default=0.0)


def is_finite(value: Any) -> bool:
    """Whether all floating-point tensors in a value are."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in _floats(value))


def foldable(
    model: nn.Module, call: Callable[[], Any], tapped: Iterable[str]
) -> tuple[list[Pair], int]:
    """Find each BatchNorm that takes the very tensor that a convolution or linear layer gave.

    Each of the two must run once, be of torch's own class and have no hooks; what the model gives
    at its end, or is captured, is never the tensor between them.

    Args:
        model: in eval mode.
        call: calls it on samples and returns its output.
        tapped: paths of what is captured in it.

    Returns:
        The pairs, and how many BatchNorms ran.
    """
    traffic = _Traffic(model, tapped)
    with torch.no_grad(), traffic.watched():
        output = call()
    traffic.kept += _floats(output)
    return list(traffic.pairs()), len(traffic.read)


def fold(model: nn.Module, pairs: Iterable[Pair]) -> Callable[[], None]:
    """Let layers do what the BatchNorm behind each of them does; that passes its input on then.

    Returns:
        What undoes it.
    """
    before: list[Callable[[], None]] = []
    for layer, norm in pairs:
        weight, bias = layer.weight, layer.bias
        before.append(lambda m=layer, w=weight, b=bias: _set(m, w, b))  # type: ignore[misc]
        _set(layer, *_fused(layer, norm))
        before += _replace(model, norm, nn.Identity().eval())

    def undo() -> None:
        for step in before:
            step()

    return undo


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring a model's weights into another precision, but for BatchNorm, which takes its inputs in
    any and whose statistics would lose most.
    """
    norms = [module for module in model.modules() if type(module) in BATCHNORMS]
    kept = [{name: t.clone() for name, t in norm.state_dict().items()} for norm in norms]
    model.to(dtype)
    for norm, state in zip(norms, kept, strict=True):
        norm.float().load_state_dict(state)


class _Traffic:
    """Which module gave and took which tensor, over one forward.

    Attributes:
        gave: a layer's outputs, with how often each had been overwritten by then.
        read: a BatchNorm's inputs, likewise.
        kept: tensors that are read from elsewhere.
    """

    def __init__(self, model: nn.Module, tapped: Iterable[str]):
        self.gave: dict[nn.Module, list[tuple[Any, int]]] = {}
        self.read: dict[nn.Module, list[tuple[Any, int]]] = {}
        self.kept: list[torch.Tensor] = []
        self._layers = [m for m in model.modules() if _is_plain_layer(m)]
        self._norms = [m for m in model.modules() if type(m) in BATCHNORMS]
        self._tapped = {path: find_module(model, _module(path)) for path in tapped}

    @contextmanager
    def watched(self) -> Iterator[None]:
        handles = [m.register_forward_hook(self._after) for m in self._layers]
        handles += [
            m.register_forward_pre_hook(self._before, with_kwargs=True) for m in self._norms
        ]
        for path, module in self._tapped.items():
            if path.endswith(":input"):
                hook = module.register_forward_pre_hook(self._take, with_kwargs=True)
            else:
                hook = module.register_forward_hook(lambda _m, _a, out: self._keep(out))
            handles.append(hook)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def pairs(self) -> Iterator[Pair]:
        kept = {id(tensor) for tensor in self.kept}
        readers = [id(tensor) for seen in self.read.values() for tensor, _ in seen]
        by_output = {id(seen[0][0]): (m, seen) for m, seen in self.gave.items() if len(seen) == 1}
        for norm, taken in self.read.items():
            tensor, version = taken[0]
            layer, given = by_output.get(id(tensor), (None, []))
            is_alone = len(taken) == 1 and readers.count(id(tensor)) == 1
            if layer is None or not is_alone or id(tensor) in kept or given[0][1] != version:
                continue
            if _can_be_folded(layer, norm, tensor):
                yield layer, norm

    def _after(self, module: nn.Module, _args: Any, output: Any) -> None:
        version = output._version if isinstance(output, torch.Tensor) else 0
        self.gave.setdefault(module, []).append((output, version))

    def _before(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = [*args, *named.values()]
        tensor = given[0] if given else None
        version = tensor._version if isinstance(tensor, torch.Tensor) else 0
        self.read.setdefault(module, []).append((tensor, version))

    def _take(self, _module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._keep([*args, *named.values()][:1])

    def _keep(self, value: Any) -> None:
        self.kept += _floats(value)


def _is_plain_layer(module: nn.Module) -> bool:
    # Of a subclass, of a parametrized or a hooked layer nobody knows what its weight goes through.
    has_hooks = module._forward_hooks or module._forward_pre_hooks
    return type(module) in (*CONVOLUTIONS, *TRANSPOSED, nn.Linear) and not has_hooks


def _can_be_folded(layer: nn.Module, norm: nn.Module, between: torch.Tensor) -> bool:
    has_statistics = norm.running_mean is not None and norm.running_var is not None
    if norm.training or not has_statistics or norm._forward_hooks or norm._forward_pre_hooks:
        return False
    if isinstance(layer, nn.Linear):
        return between.dim() == 2  # in more dimensions it normalizes another one than the last
    return not isinstance(layer, TRANSPOSED) or layer.groups == 1


def _fused(layer: Any, norm: Any) -> tuple[nn.Parameter, nn.Parameter]:
    # The function for linear layers takes no BatchNorm without a weight; the sum is the same.
    statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    is_transposed = isinstance(layer, TRANSPOSED)
    return fuse_conv_bn_weights(layer.weight, layer.bias, *statistics, is_transposed)


def _set(layer: nn.Module, weight: Any, bias: Any) -> None:
    layer._parameters["weight"], layer._parameters["bias"] = weight, bias


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> list[Callable[[], None]]:
    """Put a module in another's place wherever that stands; return what undoes it."""
    undo: list[Callable[[], None]] = []
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
                undo.append(lambda p=parent, n=name: p._modules.__setitem__(n, old))  # type: ignore[misc]
    return undo


def _module(path: str) -> str:
    return path.partition("@")[0].partition(":")[0]


def _path(role: str, value: str) -> str:
    return value[len(role) :].removeprefix(".")


def _floats(value: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    map_tensors(lambda t: found.append(t) or t if t.is_floating_point() else t, value)  # type: ignore[func-returns-value]
    return found


def _relative_error(plain: torch.Tensor, other: torch.Tensor) -> float:
    if plain.numel() == 0:
        return 0.0
    is_told = torch.isfinite(plain)
    if not torch.isfinite(other[is_told]).all():
        return float("inf")
    difference = (other - plain)[is_told].abs()
    scale = plain[is_told].abs().max() if is_told.any() else plain.new_zeros(())
    largest = difference.max() if is_told.any() else plain.new_zeros(())
    return float(largest / scale) if scale else float(largest)
