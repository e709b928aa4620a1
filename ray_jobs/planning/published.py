"""Models at their published sizes, or a saved policy's, without any weight: all of it is on the device `meta`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import draccus
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from ipvla.choices import did_you_mean
from ipvla.data.conventions import Conventions
from ipvla.files import read_record
from ipvla.models.adapters import LoRAConfig
from ipvla.models.backbones import (
    PaliGemmaConfig,
    PaliGemmaSizes,
    Pi0BackboneConfig,
    PrismaticConfig,
    QwenVLConfig,
    SmolVLABackboneConfig,
    SmolVLMConfig,
    SmolVLMSizes,
)
from ipvla.models.backbones.qwen_vl import QwenVLBackbone
from ipvla.models.backbones.random_prismatic import OPENVLA_7B, save_random_prismatic
from ipvla.models.heads import OFTConfig, OpenVLATokensConfig, Pi0HeadConfig
from ipvla.models.memory import NoMemoryConfig
from ipvla.models.vla import IPVLA, IPVLAConfig
from ray_jobs.planning.footprint import Frame, prompt_tokens


@dataclass(frozen=True)
class Planned:
    """A model of these settings for data of these sizes.

    Attributes:
        answers: passes of its last part per answer: words, or steps of a flow; 0 for none.
        views: cameras; image_size: pixels of a side, before the backbone resizes them.
        proprio, actions: numbers per state and per action.
    """

    config: IPVLAConfig
    answers: int = 0
    views: int = 1
    image_size: int = 224
    proprio: int = 8
    actions: int = 7

    def build(self, lora: LoRAConfig | None) -> IPVLA:
        """With these adapters, or without. ValueError if the weights would be looked for elsewhere."""
        config = replace(self.config, lora=lora, nf4=None, osf=None)
        varies = torch.ones(self.actions, dtype=torch.bool)
        with torch.device("meta"):
            model = config.build(varies, self.proprio, self.views, self.image_size)
        return model.to("meta")

    def frame(self, model: IPVLA) -> Frame:
        """One frame, whose action OpenVLA learns as words behind the prompt."""
        tokens = prompt_tokens(model.backbone, self.views)
        words = self.actions if isinstance(self.config.head, OpenVLATokensConfig) else 0
        return Frame(tokens + words, self.views, self.image_size, self.config.chunk, self.actions)


def planned(name: str, directory: Path) -> Planned:
    """A published model, or the policy in a directory.

    Args:
        directory: where descriptions are written; must outlive what is built.

    Raises:
        ValueError: there is neither.
    """
    if name in PUBLISHED:
        return PUBLISHED[name](directory)
    path = Path(name).expanduser() / "policy.json"
    if path.is_file():
        return _saved(path)
    raise ValueError(
        f"plan is {name!r}; give a policy's directory (`ipvla import` makes one of a checkpoint), or a published "
        f"model: {did_you_mean(name, PUBLISHED)}"
    )


def _saved(path: Path) -> Planned:
    described = read_record(path)
    config: IPVLAConfig = draccus.decode(IPVLAConfig, described["model"])
    config = replace(config, backbone=config.backbone.beside(path.parent), head=config.head.beside(path.parent))
    conventions = Conventions.from_dict(described["transforms"])
    return Planned(
        config,
        _passes(config, conventions.statistics.action.dim),
        len(conventions.cameras),
        conventions.image_size,
        conventions.proprio_dim,
        conventions.statistics.action.dim,
    )


def _passes(config: IPVLAConfig, actions: int) -> int:
    if isinstance(config.head, OpenVLATokensConfig):
        return actions
    return int(getattr(config.head, "steps", 0))


def _openvla(directory: Path) -> Planned:
    backbone = _prismatic(directory)
    return Planned(IPVLAConfig(backbone, NoMemoryConfig(), OpenVLATokensConfig(), chunk=1), 7)


def _openvla_oft(directory: Path) -> Planned:
    """Of LIBERO: two pictures, the proprioception, 8 actions at once."""
    backbone = replace(_prismatic(directory), action_places=56, proprio=True)
    return Planned(IPVLAConfig(backbone, NoMemoryConfig(), OFTConfig(), chunk=8), views=2)


def _prismatic(directory: Path) -> PrismaticConfig:
    save_random_prismatic(directory, OPENVLA_7B, ["a"], torch.bfloat16, weights=False)
    return PrismaticConfig(directory)


def _pi(variant: Any) -> Callable[[Path], Planned]:
    def of(directory: Path) -> Planned:
        backbone = Pi0BackboneConfig(pretrained=_tokenizer(directory))
        head = Pi0HeadConfig(variant=variant)
        return Planned(
            IPVLAConfig(backbone, NoMemoryConfig(), head, chunk=50), head.steps, 3, proprio=32, actions=32
        )

    return of


def _smolvla(directory: Path) -> Planned:
    backbone = SmolVLABackboneConfig(pretrained=_tokenizer(directory))
    head = Pi0HeadConfig(variant="smolvla", width=720, layers=16, mlp=2048, heads=15, key_heads=5, head_size=64)
    return Planned(IPVLAConfig(backbone, NoMemoryConfig(), head, chunk=50), head.steps, 3, 256, 6, 6)


def _paligemma(directory: Path) -> Planned:
    sizes = replace(PaliGemmaSizes(), vocabulary=257216).hugging_face()
    return Planned(IPVLAConfig(_PaliGemma(_tokenizer(directory, sizes)), NoMemoryConfig()))


def _qwen(directory: Path) -> Planned:
    from transformers import Qwen2_5_VLConfig, Qwen2VLImageProcessorPil  # takes seconds

    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        text_config={
            "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
            "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        image_token_id=4, vision_start_token_id=6, vision_end_token_id=7, video_token_id=5,
        tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2VLImageProcessorPil().save_pretrained(directory)
    return Planned(IPVLAConfig(_QwenVL(_tokenizer(directory, config)), NoMemoryConfig()))


def _smolvlm(directory: Path) -> Planned:
    sizes = SmolVLMSizes(layers=32).hugging_face()
    return Planned(IPVLAConfig(_SmolVLM(_tokenizer(directory, sizes)), NoMemoryConfig()), image_size=512)


class _Weightless:
    """In place of `HuggingFaceConfig.weights`: the model of `config.json`, without its weights."""

    pretrained: str

    def weights(self) -> Any:
        from transformers import AutoConfig, AutoModelForImageTextToText

        with torch.device("meta"):
            vlm = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(self.pretrained))
        return vlm.bfloat16()


class _PaliGemma(_Weightless, PaliGemmaConfig): ...


class _QwenVL(_Weightless, QwenVLConfig):
    def build(self, proprio_dim: int, num_views: int, image_size: int) -> QwenVLBackbone:
        with torch.device("cpu"):  # positions are computed
            return super().build(proprio_dim, num_views, image_size)


class _SmolVLM(_Weightless, SmolVLMConfig): ...


def _tokenizer(directory: Path, config: Any = None) -> str:
    """A tokenizer of a few words, and `config.json` beside it; the directory's name."""
    from transformers import PreTrainedTokenizerFast  # takes seconds

    words = ("<pad>", "<eos>", "<bos>", "<unk>", "<image>", "<video>", "<start>", "<end>", "\n")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
    wrapped.chat_template = (
        "{% for part in messages[0].content %}{% if part.type == 'image' %}<start> <image> <end> {% else %}"
        "{{ part.text }} {% endif %}{% endfor %}"
    )
    wrapped.save_pretrained(directory)
    if config is not None:
        config.save_pretrained(directory)
    return str(directory)


#: By the name that `ipvla doctor --plan` takes.
PUBLISHED: Final[Mapping[str, Callable[[Path], Planned]]] = {
    "openvla": _openvla,
    "openvla-oft": _openvla_oft,
    "pi0": _pi("pi0"),
    "pi05": _pi("pi05"),
    "smolvla": _smolvla,
    "paligemma": _paligemma,
    "qwen2.5-vl-3b": _qwen,
    "smolvlm2-500m": _smolvlm,
}
