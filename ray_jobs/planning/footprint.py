"""What a model takes in bytes and operations, by running it on the device `meta`: shapes without numbers.

Weights, gradients, moments, keys and values are exact. Activations are what autograd saves of a forward pass in
the format of the weights, as autocast has it: each storage once, weights left out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ipvla.models.backbones import Backbone, Embedded
from ipvla.models.backbones.hugging_face import HuggingFaceBackbone
from ipvla.models.backbones.prismatic import PrismaticBackbone
from ipvla.models.backbones.qwen_vl import QwenVLBackbone
from ipvla.models.features import Features
from ipvla.models.heads.openvla_tokens import OpenVLATokensHead
from ipvla.models.nf4 import NF4Config
from ipvla.models.nf4_linear import BLOCK, NESTED_BLOCK
from ipvla.models.vla import IPVLA
from ipvla.training.feature_cache import tower_parameters

_logger = logging.getLogger(__name__)
#: Tokens of a prompt beside its pictures; an instruction of LIBERO's in OpenVLA's frame has 20 to 35.
PROMPT: Final = 32
#: AdamW's two moments.
_MOMENTS: Final = 2
#: In pixels, of pictures that a backbone takes as they come.
_ANY_SIDE: Final = 224


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
    """Multiplications and additions of a forward pass of one frame.

    Attributes:
        seeing, reading, head: of towers, of language layers, and of one pass of the head.
    """

    seeing: int
    reading: int
    head: int


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of all of them."""
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
    """In the format of each trained parameter."""
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
    """Tokens of one picture."""
    if isinstance(backbone, PrismaticBackbone):
        return int(backbone.network.vision_backbone.featurizer.pos_embed.shape[1])
    if isinstance(backbone, QwenVLBackbone):
        return _patches(backbone) // int(backbone.network.config.vision_config.spatial_merge_size) ** 2
    if isinstance(backbone, HuggingFaceBackbone):
        return _patches(backbone) // int(getattr(backbone.network.config, "scale_factor", 1)) ** 2
    return int(getattr(getattr(backbone, "config", None), "visual_tokens", 0))  # tiny


def _patches(backbone: HuggingFaceBackbone) -> int:
    """Of one picture, before any of them become one token."""
    vision = backbone.network.config.vision_config
    side = getattr(backbone.config, "picture_px", None) or vision.image_size
    along = int(side) // int(vision.patch_size)
    return along * along


class SavedBytes:
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


def embedded(backbone: Backbone, tokens: int, requires_grad: bool = False) -> Embedded:
    """A frame of so many tokens, without numbers."""
    dtype = getattr(backbone, "dtype", torch.float32)
    with torch.device("meta"):
        return Embedded(
            tokens=torch.empty(1, tokens, backbone.width, dtype=dtype, requires_grad=requires_grad),
            valid=torch.ones(1, tokens, dtype=torch.bool),
            last=torch.full((1,), tokens - 1),
            perception=torch.empty(1, 1, backbone.perception_size),
            proprio=torch.empty(1, 8),
            instruction=torch.ones(1, tokens, dtype=torch.bool),
        )


@dataclass(frozen=True)
class Frame:
    """What one frame shows and asks for.

    Attributes:
        tokens: of the language layers, with words that are learned behind the prompt.
        views, image_size: cameras, and pixels of a side.
        chunk, actions: how many actions, of how many numbers.
    """

    tokens: int
    views: int
    image_size: int
    chunk: int
    actions: int


def activations(model: IPVLA, frame: Frame) -> Saved:
    """Of training what is trained in `model`, all of which is on `meta`, with one frame."""
    backbone, unknown = model.backbone, []
    counter = SavedBytes(model)
    model.train()
    logits = 0
    trains_towers = any(p.requires_grad for p in tower_parameters(backbone))
    with torch.device("meta"), counter.counting():
        if trains_towers and not _tried(lambda: see(backbone, frame)):
            unknown.append("vision towers")
        read = embedded(backbone, frame.tokens, requires_grad=trains_towers)
        with _layer_by_layer(backbone, counter) as by_layer:
            features = backbone.encode(read).features
        if isinstance(model.head, OpenVLATokensHead):
            logits = 4 * frame.actions * backbone.vocabulary  # its words ask for numbers
        elif not _tried(lambda: learn(model, features, frame)):
            unknown.append("head")
    layers, largest = sum(by_layer), max(by_layer)
    inputs = len(by_layer) * tensor_bytes([read.tokens])
    return Saved(layers, largest, inputs, counter.total - layers + logits, tuple(unknown))


def operations(model: IPVLA, frame: Frame) -> Operations:
    """Of reading one frame."""
    backbone = model.backbone
    model.eval()
    with torch.device("meta"), torch.no_grad():
        counts = []
        features: list[Features] = []
        parts: list[Callable[[], Any]] = [
            lambda: see(backbone, frame),
            lambda: features.append(backbone.encode(embedded(backbone, frame.tokens)).features),
            lambda: learn(model, features[0], frame),
        ]
        for part in parts:
            with FlopCounterMode(display=False) as counted:
                done = _tried(part)
            counts.append(int(counted.get_total_flops()) if done else 0)
        if counts[0] == 0:
            patches = _patches(backbone) if isinstance(backbone, HuggingFaceBackbone) else 1
            counts[0] = 2 * sum(p.numel() for p in tower_parameters(backbone)) * patches * frame.views
    return Operations(*counts)


def see(backbone: Backbone, frame: Frame) -> Any:
    """Pictures to tokens."""
    side = frame.image_size or _ANY_SIDE
    images = torch.empty(1, frame.views, side, side, 3, dtype=torch.uint8)
    if isinstance(backbone, PrismaticBackbone):
        return backbone.network.projector(backbone.network.vision_backbone(images, None))
    return backbone.see(images)  # type: ignore[operator]


def learn(model: IPVLA, features: Features, frame: Frame) -> Any:
    """The head's loss."""
    head, backbone, shape = model.head, model.backbone, (1, frame.chunk, frame.actions)
    noise = None if head.loss_noise_shape is None else torch.empty(1, *head.loss_noise_shape)
    features = replace(features, language=backbone) if backbone.reads.language else features
    return head.loss(features, torch.empty(shape), torch.ones(shape, dtype=torch.bool), noise)


@contextmanager
def _layer_by_layer(backbone: Backbone, counter: SavedBytes) -> Iterator[list[int]]:
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
