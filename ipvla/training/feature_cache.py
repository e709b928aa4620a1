"""What frozen vision towers made of a picture, held so that a later epoch need not compute it again.

A picture is known by its bytes: the same ones give the same features, whatever dataset, episode and camera they
come from, as long as nothing in the towers is trained and no text enters them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import torch
from torch import nn

from ipvla.models.backbones import Backbone

See = Callable[[torch.Tensor], tuple[torch.Tensor, dict[str, torch.Tensor]]]
_GIB = 2**30
#: What is neither tower nor language layer.
_WORDS = ("embed_tokens", "lm_head", "language_model.norm", "language_model.model.norm", "text_model.norm")


class FeatureCache:
    """In place of `see` of a backbone, so many GiB large; the picture that was asked for longest ago goes first.

    Attributes:
        hits, misses: observations that were found, and that were not.
    """

    def __init__(self, see: See, gib: float) -> None:
        self._see, self._room = see, int(gib * _GIB)
        self._held: OrderedDict[bytes, dict[str, torch.Tensor]] = OrderedDict()
        self.hits = self.misses = 0

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`see` of pictures uint8 [B, V, H, W, 3]."""
        keys = [blake2b(row.tobytes(), digest_size=16).digest() for row in images.cpu().numpy()]
        fresh = {key: row for row, key in enumerate(keys) if key not in self._held}
        self.misses += len(fresh)
        self.hits += len(keys) - len(fresh)
        if fresh:
            tokens, extra = self._see(images[list(fresh.values())])
            named = {"": tokens, **extra}
            for place, key in enumerate(fresh):
                held = {name: value[place].detach().cpu() for name, value in named.items()}
                self._room -= _size(held)
                self._held[key] = held
        rows = [self._held[key] for key in keys]
        for key in keys:
            self._held.move_to_end(key)
        while self._room < 0:
            self._room += _size(self._held.popitem(last=False)[1])
        found = {name: torch.stack([row[name] for row in rows]).to(images.device) for name in rows[0]}
        return found.pop(""), found


def hold_features(backbone: Backbone, gib: float) -> FeatureCache:
    """From now on the backbone looks at every picture once, as far as `gib` of main memory suffice.

    Raises:
        ValueError: the towers are trained, a text enters them, or the backbone has none.
    """
    see: Any = getattr(backbone, "see", None)
    reason = None
    if see is None:
        reason = "this backbone has no vision towers of its own"
    elif getattr(getattr(backbone, "config", None), "film", False):
        reason = "FiLM lets the text into the vision towers (model.backbone.film)"
    elif any(parameter.requires_grad for parameter in tower_parameters(backbone)):
        reason = "the vision towers are trained: set model.lora, with no module of the towers in model.lora.extra"
    if reason is not None:
        raise ValueError(f"training.feature_cache_gib is {gib:g}, but {reason}; set it to 0")
    cache = FeatureCache(see, gib)
    backbone.see = cache  # type: ignore[assignment]
    return cache


def tower_parameters(backbone: Backbone) -> list[nn.Parameter]:
    """Weights that run before the language layers, but for the words' embedding."""
    language = {id(p) for layer in backbone.language_layers() for p in layer.parameters()}
    named = backbone.vlm.named_parameters()
    return [p for name, p in named if id(p) not in language and not any(word in name for word in _WORDS)]


def _size(held: dict[str, torch.Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in held.values())
