"""What the layers of a model keep for the backward pass, traced on tensors that hold nothing.

A layer runs forward and backward on fake CPU tensors (torch's `FakeTensorMode`) while the bytes of
every storage it makes are counted. So adapters, frozen weights, autocast and what is recomputed
count as they are. Attention is fused, as on a GPU.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of a call."""


class LiveMemory(TorchDispatchMode):
    """Bytes of all storages made inside it: `live` now, and the `peak` since `reset`.

    Args:
        weights: Made before; they and their views are not counted.
    """

    def __init__(self, weights: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._weights = {tensor.untyped_storage()._cdata for tensor in weights}
        self._sizes: dict[int, int] = {}

    def reset(self) -> None:
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                self.count(tensor.untyped_storage())
        return made

    def count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._weights:
            return
        if key not in self._sizes:
            weakref.finalize(storage, self._freed, key)
        self.live += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak = max(self.peak, self.live)

    def _freed(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


class End(torch.autograd.Function):
    """A scalar in the place of a layer's output, to go back from with a gradient of its size."""

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        ctx.like = output.shape, output.dtype
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        shape, dtype = ctx.like
        return grads[0].new_empty(shape, dtype=dtype)


class Packed(torch.autograd.Function):
    """A linear layer of 4 or 8 bits: its weight exists while it is multiplied with. One of 8 bits
    keeps its input all the same (bitsandbytes 0.50, MatMul8bitLt)."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: Any) -> Tensor:
        ctx.shape = layer.out_features, layer.in_features
        ctx.kept = inputs if packed_bits(layer) == 8 else None
        # No product, whose result `recompute: selective` would keep.
        weight = inputs.new_empty(ctx.shape)
        return weight.new_empty((*inputs.shape[:-1], layer.out_features))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ grads[0].new_empty(ctx.shape), None


@dataclass(frozen=True)
class LayerBytes:
    """What a layer costs while it is trained.

    Attributes:
        kept: Bytes that it keeps for backward.
        working: What comes on top while it is gone back through: what it computes again, and
            gradients in between.
        cached: Casts of its weights that autocast holds until the forward pass ends, beside `kept`.
    """

    kept: int
    working: int
    cached: int


def trace_layers(
    layers: list[nn.Module],
    inputs: Inputs,
    reached: bool,
    dtype: torch.dtype | None,
    autocast: torch.dtype | None,
) -> list[LayerBytes]:
    """Every layer in the order that a pass takes them. Layers that no gradient goes back through
    keep nothing.

    Args:
        inputs: Of the first layer, meta tensors; the hidden states come first.
        reached: Whether gradients go back to its hidden states.
        dtype: Of all weights; None leaves them in their own.
    """
    found: dict[Any, LayerBytes] = {}
    result = []
    for layer in layers:
        trained = any(p.requires_grad for p in layer.parameters())
        key = _kind(layer), reached
        if key not in found:
            found[key] = LayerBytes(0, 0, 0)
            if reached or trained:
                found[key] = _trace(layer, inputs, reached, dtype, autocast)
        result.append(found[key])
        reached = reached or trained
    return result


def first_inputs(layer: nn.Module, run: Callable[[], Any]) -> Inputs:
    """What `run` calls the layer with; it is not run further."""
    found: list[Inputs] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise _Reached

    handle = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run()
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0]


class _Reached(Exception):
    pass


def _trace(
    layer: nn.Module,
    inputs: Inputs,
    reached: bool,
    dtype: torch.dtype | None,
    autocast: torch.dtype | None,
) -> LayerBytes:
    with FakeTensorMode(), _fake_weights(layer, dtype) as weights, _as_on_a_gpu(autocast):
        (leaf, *rest), named = tree_map(_fake, inputs)
        leaf.requires_grad_(reached)
        given = [x for x in tree_leaves((rest, named)) if isinstance(x, Tensor)]
        with LiveMemory([*weights, *given]) as memory:
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                # A copy, which is gone unless the layer keeps it.
                output = layer(leaf.clone(), *rest, **named)
                end = End.apply(output[0] if isinstance(output, tuple) else output)
                del output
                with_casts = memory.live
            kept = memory.live
            memory.reset()
            end.backward()
    return LayerBytes(kept, memory.peak - kept, with_casts - kept)


@contextmanager
def _as_on_a_gpu(autocast: torch.dtype | None) -> Iterator[None]:
    """PEFT (0.21) asks for the autocast of a GPU before it casts the inputs of adapters on layers
    of 4 or 8 bits."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", autocast is not None)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before)


def _fake(value: Any, dtype: torch.dtype | None = None) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty(value.shape, dtype=dtype or value.dtype, device="cpu")


@contextmanager
def _fake_weights(layer: nn.Module, dtype: torch.dtype | None) -> Iterator[list[Tensor]]:
    """Fake parameters in the place of those of the layer, which lose each gradient they get."""
    own = [
        (module, name, p)
        for module in layer.modules()
        for name, p in module._parameters.items()
        if p is not None and not (packed_bits(module) and name == "weight")
    ]
    packed: list[Any] = [module for module in layer.modules() if packed_bits(module)]
    fakes = {p: nn.Parameter(_fake(p, dtype), requires_grad=p.requires_grad) for _, _, p in own}
    for fake in fakes.values():
        if fake.requires_grad:
            fake.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    for module, name, p in own:
        module._parameters[name] = fakes[p]
    for module in packed:
        module.forward = partial(_packed_forward, module)
    try:
        yield list(fakes.values())
    finally:
        for module in packed:
            del module.forward
        for module, name, p in own:
            module._parameters[name] = p


def _packed_forward(layer: Any, inputs: Tensor) -> Tensor:
    dtype = getattr(layer, "compute_dtype", None) or inputs.dtype
    output = Packed.apply(inputs.to(dtype), layer)
    if layer.bias is not None:
        output = output + layer.bias.to(dtype)
    return output.to(inputs.dtype)


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """Equal for layers that keep the same."""
    own = [(name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters()]
    return type(layer), *own


def packed_bits(module: nn.Module) -> int | None:
    """4 or 8 for a layer of bitsandbytes, which may have no weights yet."""
    kind = type(module)
    if not kind.__module__.startswith("bitsandbytes."):
        return None
    return {"Linear4bit": 4, "Linear8bitLt": 8}.get(kind.__name__)
