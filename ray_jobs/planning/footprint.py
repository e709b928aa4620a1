"""What a model takes in bytes and operations, by running it on the device `meta`: shapes without numbers.

Weights, gradients, moments, keys and values are exact. Activations are what autograd saves of a forward pass in the
format of the weights, as autocast has it: each storage once, weights left out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ipvla.models.backbones import Backbone, Embedded
from ipvla.models.backbones.prismatic import PrismaticBackbone
from ipvla.models.features import Features
from ipvla.models.heads.protocol import Head
from ipvla.models.nf4 import NF4Config
from ipvla.models.nf4_linear import BLOCK, NESTED_BLOCK
from ipvla.models.vla import IPVLA

_logger = logging.getLogger(__name__)
#: Tokens of a prompt beside its pictures; an instruction of LIBERO's in OpenVLA's frame has 20 to 35.
PROMPT: Final = 32
#: AdamW's two moments.
_MOMENTS: Final = 2


@dataclass(frozen=True)
class Saved:
    """Bytes that a forward pass of one frame leaves for the backward pass.

    Attributes:
        layers: of all language layers; largest: of the one with the most; inputs: of what they begin with.
        rest: of all else.
        unknown: parts that could not be run without numbers, and are not in `rest`.
    """

    layers: int
    largest: int
    inputs: int
    rest: int
    unknown: tuple[str, ...] = ()

    @property
    def whole(self) -> int:
        return self.layers + self.rest

    @property
    def checkpointed(self) -> int:
        """With language layers that run again in the backward pass, one at a time."""
        return self.inputs + self.largest + self.rest


@dataclass(frozen=True)
class Operations:
    """Multiplications and additions of a forward pass of one frame: towers, language layers, one pass of the head."""

    seeing: int
    reading: int
    head: int


def tensor_bytes(tensors: Iterator[torch.Tensor] | list[torch.Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def weight_bytes(model: nn.Module) -> int:
    """Of parameters and buffers, a shared one once."""
    return tensor_bytes([*model.parameters(), *model.buffers()])


def nf4_bytes(numbers: int, double: bool = True) -> int:
    """Of one weight of so many numbers, with its scales."""
    blocks = math.ceil(numbers / BLOCK)
    scales = blocks + 4 * math.ceil(blocks / NESTED_BLOCK) + 4 if double else 4 * blocks
    return math.ceil(numbers / 2) + scales


def saved_by_nf4(backbone: Backbone, config: NF4Config) -> int:
    """Bytes that a backbone's weights are smaller by in 4 bits."""
    layers = config.chosen(backbone).values()
    return sum(tensor_bytes([x.weight]) - nf4_bytes(x.weight.numel(), config.double) for x in layers)


def optimizer_bytes(model: nn.Module) -> int:
    """AdamW's moments, in the format of each trained parameter, and its count of steps."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return _MOMENTS * tensor_bytes(trained) + 4 * len(trained)


def gradient_bytes(model: nn.Module) -> int:
    return tensor_bytes([p for p in model.parameters() if p.requires_grad])


def keys_values_bytes(backbone: Backbone, tokens: int, size: int) -> int:
    """Of one frame's tokens in all language layers, in numbers of `size` bytes."""
    return 2 * backbone.num_layers * tokens * backbone.cache_size * size


def prompt_tokens(backbone: Backbone, views: int) -> int:
    """A frame's tokens: pictures, the prompt, places of actions, the state."""
    pictures = _picture_tokens(backbone) * views
    config: Any = getattr(backbone, "config", None)
    places = getattr(config, "action_places", 0)
    state = bool(getattr(config, "proprio", False)) or hasattr(backbone, "state_proj")
    return pictures + PROMPT + (places + 1 if places else 0) + int(state)


def _picture_tokens(backbone: Backbone) -> int:
    if isinstance(backbone, PrismaticBackbone):
        return int(backbone.network.vision_backbone.featurizer.pos_embed.shape[1])
    if (count := getattr(getattr(backbone, "config", None), "image_tokens", None)) is not None:
        return int(count)
    before = getattr(getattr(backbone, "frame", None), "before", ())
    return sum(token == getattr(backbone, "image_token", None) for token in before) // _views(backbone)


def _views(backbone: Backbone) -> int:
    return 1  # backbones whose frame is counted are planned with one picture


class _Counter:
    """Bytes that autograd saves meanwhile: each storage once, none of the model's own."""

    def __init__(self, model: nn.Module) -> None:
        self._own = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
        self._seen: dict[int, torch.Tensor] = {}
        self.total = 0

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in self._own and storage._cdata not in self._seen:
            self._seen[storage._cdata] = x  # held, or another could get its place
            self.total += storage.nbytes()
        return x

    @contextmanager
    def counting(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda x: x):
            yield


def embedded(backbone: Backbone, frames: int, tokens: int, requires_grad: bool = False) -> Embedded:
    """So many frames of so many tokens, without numbers."""
    dtype = getattr(backbone, "dtype", torch.float32)
    with torch.device("meta"):
        return Embedded(
            tokens=torch.empty(frames, tokens, backbone.width, dtype=dtype, requires_grad=requires_grad),
            valid=torch.ones(frames, tokens, dtype=torch.bool),
            last=torch.full((frames,), tokens - 1),
            perception=torch.empty(frames, 1, backbone.perception_size),
            proprio=torch.empty(frames, 8),
            instruction=torch.ones(frames, tokens, dtype=torch.bool),
        )


def activations(model: IPVLA, views: int, image_size: int, actions: int, chunk: int, frames: int = 1) -> Saved:
    """Of training what is trained in `model`, all of which is on `meta`."""
    backbone = model.backbone
    counter, unknown = _Counter(model), []
    model.train()
    tokens, inputs, largest, layers = prompt_tokens(backbone, views), 0, 0, 0
    trains_towers = any(p.requires_grad for p in _towers(backbone))
    with torch.device("meta"), counter.counting():
        if trains_towers and not _tried(lambda: see(backbone, frames, views, image_size)):
            unknown.append("vision towers")
        read = embedded(backbone, frames, tokens, requires_grad=trains_towers)
        with _layer_by_layer(backbone, counter) as by_layer:
            features = backbone.encode(read).features
        if not _tried(lambda: learn(model.head, features, frames, chunk, actions, backbone)):
            unknown.append("head")
    layers, largest = sum(by_layer), max(by_layer)
    inputs = len(by_layer) * tensor_bytes([read.tokens])
    return Saved(layers, largest, inputs, counter.total - layers, tuple(unknown))


def operations(model: IPVLA, views: int, image_size: int, actions: int, chunk: int) -> Operations:
    """Of answering one frame."""
    backbone = model.backbone
    model.eval()
    with torch.device("meta"), torch.no_grad():
        counts = []
        features: list[Features] = []
        tokens = prompt_tokens(backbone, views)
        parts: list[Callable[[], Any]] = [
            lambda: see(backbone, 1, views, image_size),
            lambda: features.append(backbone.encode(embedded(backbone, 1, tokens)).features),
            lambda: learn(model.head, features[0], 1, chunk, actions, backbone),
        ]
        for part in parts:
            with FlopCounterMode(display=False) as counted:
                done = _tried(part)
            counts.append(int(counted.get_total_flops()) if done else 0)
        if counts[0] == 0:
            seen = sum(p.numel() for p in _towers(backbone))
            counts[0] = 2 * seen * _picture_tokens(backbone) * views * 4  # four patches become a token
    return Operations(*counts)


def see(backbone: Backbone, frames: int, views: int, side: int) -> Any:
    """Pictures to tokens; without the graph of what is not trained."""
    images = torch.empty(frames, views, side or 224, side or 224, 3, dtype=torch.uint8)
    if isinstance(backbone, PrismaticBackbone):
        return backbone.network.projector(backbone.network.vision_backbone(images, None))
    return backbone.see(images)  # type: ignore[attr-defined]


def learn(head: Head, features: Features, frames: int, chunk: int, actions: int, backbone: Backbone) -> Any:
    """The head's loss."""
    from dataclasses import replace

    noise = None if head.loss_noise_shape is None else torch.empty(frames, *head.loss_noise_shape)
    features = replace(features, language=backbone) if backbone.reads.language else features
    weight = torch.ones(frames, chunk, actions, dtype=torch.bool)
    return head.loss(features, torch.empty(frames, chunk, actions), weight, noise)


def _towers(backbone: Backbone) -> list[nn.Parameter]:
    """What runs before the language layers, without the words' embedding."""
    language = {id(p) for layer in backbone.language_layers() for p in layer.parameters()}
    words = ("embed_tokens", "lm_head", "language_model.norm", "language_model.model.norm", "text_model.norm")
    named = backbone.vlm.named_parameters()
    return [p for n, p in named if id(p) not in language and not any(word in n for word in words)]


@contextmanager
def _layer_by_layer(backbone: Backbone, counter: _Counter) -> Iterator[list[int]]:
    sizes: list[int] = []
    begun: list[int] = []
    hooks = []
    for layer in backbone.language_layers():
        hooks.append(layer.register_forward_pre_hook(lambda *_: begun.append(counter.total)))
        hooks.append(layer.register_forward_hook(lambda *_: sizes.append(counter.total - begun[-1])))
    try:
        yield sizes
    finally:
        for hook in hooks:
            hook.remove()


def _tried(part: Callable[[], Any]) -> bool:
    """Some parts ask for numbers, of which there are none."""
    try:
        part()
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        _logger.debug("not run without numbers: %s", error)
        return False
    return True
