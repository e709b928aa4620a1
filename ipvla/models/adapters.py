"""What PEFT puts on a backbone's weights: LoRA, by itself or begun by CorDA, and orthogonal subspaces (OSF)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ipvla.models.backbones.protocol import Backbone
from ipvla.models.nf4 import dequantise

#: What PEFT puts before the names of the modules inside.
_WRAPPED = "base_model.model."


@dataclass(frozen=True)
class AdaptedModules:
    """Weights by their modules' names.

    Attributes:
        setting: what errors call these settings.
        last_layers: how many of the last language layers; 0 means all of them.
        modules: names of linear modules inside a language layer. The default is what layers of every backbone
            have: `gate_proj`, which Gemma's have besides, is adapted only if it is named.
        extra: full names of modules outside the language layers, e.g. `trunk.conv1` or `trunk.mix`.
        freeze_rest: memory and head are frozen too, so that adapters alone are trained.
    """

    setting: ClassVar[str]

    last_layers: int = 0
    modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    extra: tuple[str, ...] = ()
    freeze_rest: bool = False

    def __post_init__(self) -> None:
        if not self.modules and not self.extra:
            raise ValueError(
                f"{self.setting}.modules and {self.setting}.extra are both empty; name at least one module"
            )

    def targets(self, backbone: Backbone) -> dict[str, nn.Linear]:
        """The linear modules of a backbone without adapters that would get one, by name inside `backbone.vlm`."""
        return {name: m for name, m in self._matching(backbone).items() if isinstance(m, nn.Linear)}

    def weights(self, backbone: Backbone) -> dict[str, nn.Parameter]:
        """What adapters would be added to, convolutions too, by name inside `backbone.vlm` without adapters."""
        return {f"{name}.weight": module.weight for name, module in self._matching(backbone).items()}

    def pattern(self, backbone: Backbone) -> str:
        """Regular expression over module names, as PEFT's `target_modules` takes it."""
        count = backbone.num_layers
        if self.last_layers > count:
            raise ValueError(
                f"{self.setting}.last_layers is {self.last_layers}, but the backbone has {count} language layers"
            )
        layers = range(count - (self.last_layers or count), count)
        inside = backbone.layer_pattern.replace("{layers}", "|".join(map(str, layers)))
        choices = [rf"{inside}(.*\.)?({'|'.join(map(re.escape, self.modules))})"] if self.modules else []
        choices += [re.escape(name) for name in self.extra]
        return rf"(.*\.)?({'|'.join(choices)})"

    def require_existing(self, backbone: Backbone) -> None:
        """ValueError if the backbone lacks a module of one of the names."""
        ends = {f".{name}" for name, _ in backbone.vlm.named_modules()}
        wanted = (*self.modules, *self.extra)
        missing = [name for name in wanted if not any(end.endswith(f".{name}") for end in ends)]
        if missing:
            raise ValueError(f"{self.setting} names {missing}, which {type(backbone.vlm).__name__} does not have")

    def _matching(self, backbone: Backbone) -> dict[str, Any]:
        pattern = re.compile(self.pattern(backbone))
        return {name: module for name, module in backbone.vlm.named_modules() if pattern.fullmatch(name)}


@dataclass(frozen=True)
class LoRAConfig(AdaptedModules):
    """How large the adapters are.

    Attributes:
        rank, alpha: the update is (alpha / rank) B A.
        dropout: on the adapter's input, in [0, 1).
    """

    setting: ClassVar[str] = "lora"

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"lora.rank is {self.rank}; it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is {self.dropout}; it must be in [0, 1)")

    def apply(self, backbone: Backbone) -> None:
        """Wraps `backbone.vlm` by PEFT and freezes what is not an adapter.

        Raises:
            ValueError: no module of the backbone has such a name.
        """
        import peft  # takes seconds

        self.require_existing(backbone)
        config = peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.pattern(backbone),
        )
        backbone.vlm = peft.get_peft_model(backbone.vlm, config)


@dataclass(frozen=True)
class OSFConfig(AdaptedModules):
    """W = U S V' is split at a rank: the larger singular values keep their directions, the others are trained.

    PEFT makes gradients orthogonal to the frozen directions, but not AdamW's steps: the directions are preserved
    only approximately. A trained module is as large as its weight: far larger than LoRA.

    Attributes:
        effective_rank: share of a weight's singular directions that is frozen, in (0, 1).
    """

    setting: ClassVar[str] = "osf"

    effective_rank: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.effective_rank < 1:
            raise ValueError(f"osf.effective_rank is {self.effective_rank}; it must be between 0 and 1")

    def apply(self, backbone: Backbone) -> None:
        """Wraps `backbone.vlm` by PEFT and freezes what is not trained under OSF; the function stays as it is.

        Raises:
            ValueError: the backbone has no module of such a name, or one that is not linear or too small to split.
        """
        self.require_existing(backbone)
        linear = self.targets(backbone)
        if other := sorted(self._matching(backbone).keys() - linear.keys()):
            raise ValueError(f"osf names {other}, which are not linear; OSF splits matrices only")
        smallest = min(min(module.weight.shape) for module in linear.values())
        if smallest * self.effective_rank < 1:
            raise ValueError(
                f"osf.effective_rank is {self.effective_rank}, which freezes nothing of a weight with {smallest} "
                f"singular directions; make it at least {math.ceil(1000 / smallest) / 1000}"
            )
        import peft  # takes seconds
        from peft.tuners._buffer_dict import BufferDict

        config = peft.OSFConfig(effective_rank=self.effective_rank, target_modules=self.pattern(backbone))
        backbone.vlm = peft.get_peft_model(backbone.vlm, config)
        # PEFT would split the weights again, but a policy is loaded onto others than those that were split.
        for buffers in backbone.vlm.modules():
            if isinstance(buffers, BufferDict):
                for name, tensor in list(buffers.items()):
                    buffers.register_buffer(name, tensor, persistent=True)


def merge_adapters(backbone: Backbone) -> None:
    """Adds what LoRA adapters have learned to the weights and takes the adapters away; the function stays.

    Weights in 4 bits become ordinary ones: their sum with an adapter has no 4 bits.

    Raises:
        ValueError: the backbone has adapters of another kind.
    """
    if adapters(backbone):
        dequantise(backbone)
        backbone.vlm = backbone.vlm.merge_and_unload()


def save_adapters(backbone: Backbone, directory: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Writes a backbone's adapters as `PeftModel.from_pretrained(base, directory)` reads them.

    `weights`: those of `backbone.vlm`, whole, where they were gathered already.
    """
    backbone.vlm.save_pretrained(str(directory), state_dict=weights)


@dataclass(frozen=True)
class Adapter:
    """What a module has learned is scale * B A.

    Attributes:
        a: [r, in], of a convolution [r, in, kernel ...].
        b: [out, r], of a convolution [out, r, 1 ...].
        scale: alpha / r.
    """

    a: nn.Parameter
    b: nn.Parameter
    scale: float


def adapters(backbone: Backbone) -> dict[str, Adapter]:
    """Every LoRA adapter under its module's name inside the backbone without adapters; none where there are none.

    Raises:
        ValueError: the backbone has adapters of another kind.
    """
    if not hasattr(backbone.vlm, "peft_config"):
        return {}
    from peft.tuners.lora import LoraLayer

    modules = {
        name.removeprefix(_WRAPPED): Adapter(
            module.lora_A["default"].weight, module.lora_B["default"].weight, module.scaling["default"]
        )
        for name, module in backbone.vlm.named_modules()
        if isinstance(module, LoraLayer)
    }
    if not modules:
        kind = backbone.vlm.peft_config["default"].peft_type.value
        raise ValueError(
            f"the backbone's adapters are {kind}, not LoRA; set model.lora, or train without adapters"
        )
    return modules


def factors(backbone: Backbone) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """A [r, in] and B [out, r] of every adapter on a linear module, under the name that `targets` gives it."""
    return {name: (one.a, one.b) for name, one in adapters(backbone).items() if one.a.ndim == 2}


def layer_of(backbone: Backbone, module: str) -> int | None:
    """The language layer that a module of `backbone.vlm` belongs to; None outside of them."""
    match = re.search(backbone.layer_pattern.replace("{layers}", r"\d+"), module)
    return int(match[1]) if match else None


def begin_by_corda(backbone: Backbone, covariances: Mapping[str, Tensor]) -> None:
    """Splits each adapted weight W, in the knowledge-preserved mode, into a frozen part and (alpha / r) B A.

    Of W = (U S V') C^-1, where U S V' is the singular value decomposition of W C, the last r terms go into B A and
    the rest stays in W. The function stays as it is, up to rounding; the base weights do not.

    Args:
        backbone: with LoRA adapters on linear modules.
        covariances: by module name, second moment C [in, in] of the teacher's inputs; their scale is of no matter.

    Raises:
        ValueError: a module has no covariance, one of another size, or fewer than r singular values.
    """
    import peft  # takes seconds
    from peft.tuners.lora.corda import CordaEigens, collect_eigens_for_layer

    for path, layer in backbone.vlm.named_modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            name, rank = path.removeprefix(_WRAPPED), layer.r["default"]
            linear = layer.get_base_layer()
            width, least = linear.weight.shape[1], min(linear.weight.shape)
            if name not in covariances or covariances[name].shape != (width, width):
                shape = list(covariances[name].shape) if name in covariances else "absent"
                raise ValueError(
                    f"the covariance of {name} is {shape}, its weight needs [{width}, {width}]; "
                    "collect the module statistics of this model with --adapters as model.lora"
                )
            if rank > least:
                raise ValueError(f"lora.rank is {rank}, but {name} has {least} singular values; lower it")
            linear.covariance_matrix = covariances[name].to(linear.weight.device, torch.float32)
            all_of_it = collect_eigens_for_layer(linear, None)
            del linear.covariance_matrix
            linear.eigens = CordaEigens(
                S_WC=all_of_it.S_WC[-rank:].clone(),
                U_WC=all_of_it.U_WC[:, -rank:].to(linear.weight.device),
                V_WC=all_of_it.V_WC[:, -rank:].to(linear.weight.device),
            )
            with torch.no_grad():
                layer.corda_init("default", "corda")
