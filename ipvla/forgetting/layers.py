"""Which layers share a subspace, and how a layer's hidden state is read or changed from outside.

Layers are counted from 0 over the language layers; the hidden state of layer l is that layer's output [B, N, D].
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class LayerGroup:
    """Layers that share the subspaces of one representative layer.

    Attributes:
        name: "a" or "b".
        layers: ascending.
        representative: the last of `layers`, unless that one carries nothing of the instruction (see `icsm`).
    """

    name: str
    layers: tuple[int, ...]
    representative: int


def layer_groups(num_layers: int, last: int = 4) -> tuple[LayerGroup, LayerGroup]:
    """The last `last` of `num_layers` layers in two halves; of 18 layers (14, 15) -> 15 and (16, 17) -> 17.

    Raises:
        ValueError: `last` is odd or below 2, or there are fewer layers than that.
    """
    if last < 2 or last % 2:
        raise ValueError(f"last is {last}; two groups of equal size need an even number of layers, at least 2")
    if num_layers < last:
        raise ValueError(f"last is {last}, but there are only {num_layers} layers; lower last")
    middle = num_layers - last // 2
    first, second = tuple(range(num_layers - last, middle)), tuple(range(middle, num_layers))
    return LayerGroup("a", first, first[-1]), LayerGroup("b", second, second[-1])


def edit_output(module: nn.Module, edit: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Applies `edit` to the output of `module`, a tensor or a tuple's first element until `remove`."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    return module.register_forward_hook(hook)


@contextmanager
def edited(module: nn.Module, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """`edit_output` for the duration of the block."""
    handle = edit_output(module, edit)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def outputs(modules: Mapping[Key, nn.Module]) -> Iterator[dict[Key, Tensor]]:
    """In the block, a forward pass leaves here what each module puts out (of a tuple the first element)."""
    collected: dict[Key, Tensor] = {}

    def collect(key: Key) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            collected[key] = output[0] if isinstance(output, tuple) else output

        return hook

    with ExitStack() as stack:
        for key, module in modules.items():
            stack.callback(module.register_forward_hook(collect(key)).remove)
        yield collected


@contextmanager
def inputs(modules: Mapping[Key, nn.Module]) -> Iterator[dict[Key, Tensor]]:
    """In the block, a forward pass leaves here each module's first argument, detached."""
    collected: dict[Key, Tensor] = {}

    def collect(key: Key) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            collected[key] = arguments[0].detach()

        return hook

    with ExitStack() as stack:
        for key, module in modules.items():
            stack.callback(module.register_forward_pre_hook(collect(key)).remove)
        yield collected


@contextmanager
def tapped(modules: Mapping[Key, nn.Module]) -> Iterator[dict[Key, Tensor]]:
    """In the block, a forward pass adds to each module's output a leaf of zeros, given here under its key.

    The leaf's gradient is the output's, also where all weights are frozen. The next pass replaces the leaves.
    """
    leaves: dict[Key, Tensor] = {}

    def tap(key: Key) -> Callable[[Tensor], Tensor]:
        def edit(output: Tensor) -> Tensor:
            leaves[key] = output.new_zeros(output.shape, requires_grad=True)
            return output + leaves[key]

        return edit

    with ExitStack() as stack:
        for key, module in modules.items():
            stack.enter_context(edited(module, tap(key)))
        yield leaves
