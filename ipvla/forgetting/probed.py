"""A policy as the forgetting room sees it: its layers can be read, and its output is a distribution.

Of a layer's hidden states one vector per record is compared: the mean over the instruction's own tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Key = TypeVar("Key", bound=Hashable)


@dataclass
class Reading:
    """One forward pass.

    Attributes:
        hidden: per language layer its output [B, N, D] as it leaves the layer. Beware: the last of Hugging Face's
            `hidden_states` has been through the final norm, and the first is the embedding.
        mask: bool [B, N], True on the instruction's own positions.
        output: [B, ...], parameters of the output distribution.
    """

    hidden: tuple[Tensor, ...]
    mask: Tensor
    output: Tensor


def instruction_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """float64 [B, D]: mean of hidden [B, N, D] where mask bool [B, N] is True; zero rows where it is empty.

    Positions that are not masked in are never read.

    Raises:
        ValueError: the shapes do not fit, or the mask is not bool.
    """
    if mask.dtype != torch.bool or hidden.ndim != 3 or hidden.shape[:2] != mask.shape:
        raise ValueError(
            f"hidden states {list(hidden.shape)} and mask {mask.dtype} {list(mask.shape)} do not fit; "
            "give [B, N, D] and bool [B, N]"
        )
    total = hidden.double().masked_fill(~mask[..., None], 0).sum(1)
    mean: Tensor = total / mask.sum(1).clamp(min=1)[:, None]
    return mean


class ProbedModel(Protocol):
    """A policy that can be probed; batches are opaque to this room, and a batch is read alike every time.

    Attributes:
        name: of the backbone; goes into artifacts.
        width: D.
        layers: the language layers, first to last; each puts out [B, N, D], or a tuple that begins with it.
    """

    @property
    def name(self) -> str: ...

    @property
    def width(self) -> int: ...

    @property
    def layers(self) -> Sequence[nn.Module]: ...

    def read(self, batch: Any) -> Reading:
        """One forward pass without dropout, through each layer once; in the graph if grad mode is on."""

    def divergence(self, output: Tensor, reference: Tensor) -> Tensor:
        """KL(reference || output) of each record, float64 [B], >= 0."""

    def sampled_loss(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """Sum over the records of -log p(y), with y ~ p(. | output) drawn by a CPU generator and detached."""


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

    def collect(key: Key, _module: nn.Module, _inputs: Any, output: Any) -> None:
        collected[key] = output[0] if isinstance(output, tuple) else output

    with ExitStack() as stack:
        for key, module in modules.items():
            stack.callback(module.register_forward_hook(partial(collect, key)).remove)
        yield collected


@contextmanager
def inputs(modules: Mapping[Key, nn.Module], first: bool = False) -> Iterator[dict[Key, Tensor]]:
    """In the block, a forward pass leaves here each module's first argument, detached.

    Of a module that runs again it is that of the last run; of the first one with `first`.
    """
    collected: dict[Key, Tensor] = {}

    def collect(key: Key, _module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if not (first and key in collected):
            collected[key] = arguments[0].detach()

    with ExitStack() as stack:
        for key, module in modules.items():
            stack.callback(module.register_forward_pre_hook(partial(collect, key)).remove)
        yield collected


@contextmanager
def tapped(modules: Mapping[Key, nn.Module]) -> Iterator[dict[Key, Tensor]]:
    """In the block, a forward pass adds to each module's output a leaf of zeros, given here under its key.

    The leaf's gradient is the output's, also where all weights are frozen. A module that runs again, as a head
    writes on behind the observation, is left alone.
    """
    leaves: dict[Key, Tensor] = {}

    def tap(key: Key, output: Tensor) -> Tensor:
        if key in leaves:
            return output
        leaves[key] = output.new_zeros(output.shape, requires_grad=True)
        return output + leaves[key]

    with ExitStack() as stack:
        for key, module in modules.items():
            stack.enter_context(edited(module, partial(tap, key)))
        yield leaves


def sampled_gradients(
    model: ProbedModel, batch: Any, modules: Mapping[Key, nn.Module], labels: int, generator: torch.Generator
) -> tuple[Reading, Iterator[dict[Key, Tensor]]]:
    """One forward pass, and for each of `labels` sampled labels the gradients of its loss at the modules' outputs.

    Each module runs once in a pass; gradients have its output's shape, zeros where nothing depends on it.

    Raises:
        ValueError: a module did not run, or the output is not finite.
    """
    with torch.enable_grad(), tapped(modules) as leaves:
        reading = model.read(batch)
        if not reading.output.isfinite().all():
            raise ValueError("the model's output is not finite; check its weights and precision")
        losses = [model.sampled_loss(reading.output, generator) for _ in range(labels)]
    if idle := [key for key in modules if key not in leaves]:
        raise ValueError(f"{idle} did not run in the model's forward pass; name modules of the model that is read")
    outputs = [leaves[key] for key in modules]

    def backward(loss: Tensor) -> dict[Key, Tensor]:
        gradients = torch.autograd.grad(
            loss, outputs, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return dict(zip(modules, gradients, strict=True))

    return reading, map(backward, losses)
