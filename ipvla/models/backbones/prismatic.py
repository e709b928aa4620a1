"""The `prismatic` backbone: OpenVLA's model (arXiv 2406.09246), rebuilt so that published weights load exactly.

    [BOS, patches of every view, (proprioception), the rest of the prompt, (action places, </s>)]

DINOv2 and SigLIP side by side, or SigLIP alone, a projector, and transformers' Llama. The prompt ends in the token
`▁`, whose last state is the cognition. OpenVLA reads causally. OpenVLA-OFT (arXiv 2502.19645) appends places for a
whole chunk of actions, whose embeddings are 0, and every token reads every other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import nn

from ipvla.models.backbones.decoder import DecoderBackbone
from ipvla.models.backbones.hugging_face import DTYPES
from ipvla.models.backbones.openvla_files import SPACE, OpenVLAFiles, require_same
from ipvla.models.backbones.prismatic_vision import PrismaticVision, Projector
from ipvla.models.backbones.protocol import BackboneConfig, Embedded, require_prompts
from ipvla.types import NO_TOKEN, ModelInputs

_BOS, _EOS, _NEWLINE = 1, 2, 13
_PATCHES = "patches"
_NO_WORDS = (
    "model.backbone.action_places is set: such a model (OpenVLA-OFT) answers in actions and writes no words; "
    "choose another memory, and no loss on words"
)


@BackboneConfig.register_subclass("prismatic")
@dataclass(frozen=True)
class PrismaticConfig(BackboneConfig):
    """Which weights, and how they are asked.

    Attributes:
        pretrained: a directory in OpenVLA's Hugging Face layout, or what `ipvla import` has made of one.
        dtype: of the weights, "float32", "bfloat16" or "float16".
        prompt: with `{instruction}` in it.
        ends_in_space: puts `▁` behind the prompt, which OpenVLA reads before an action; ECoT's do without.
        max_prompt_tokens: longest prompt in tokens, without pictures.
        action_places: OpenVLA-OFT's, numbers in a chunk of actions; 0 for OpenVLA, which writes them one by one.
        proprio: one more token, of the proprioception (OpenVLA-OFT).
        film: the prompt modulates the vision towers (OpenVLA-OFT+).
    """

    pretrained: Path | None = None
    dtype: str = "bfloat16"
    prompt: str = "In: What action should the robot take to {instruction}?\nOut:"
    ends_in_space: bool = True
    max_prompt_tokens: int = 96
    action_places: int = 0
    proprio: bool = False
    film: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"backbone.dtype is {self.dtype!r}; choose one of {sorted(DTYPES)}")
        if "{instruction}" not in self.prompt:
            raise ValueError(f"backbone.prompt {self.prompt!r} does not contain {{instruction}}")
        for name, least in (("max_prompt_tokens", 2), ("action_places", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"backbone.{name} is {getattr(self, name)}; it must be at least {least}")

    @property
    def files(self) -> OpenVLAFiles:
        """ValueError if there are none."""
        if self.pretrained is None:
            raise ValueError(
                "backbone.pretrained is not given; name a directory in OpenVLA's Hugging Face layout, or the "
                "`backbone` directory of a policy that `ipvla import` has written"
            )
        return OpenVLAFiles.read(self.pretrained)

    def beside(self, policy: Path) -> PrismaticConfig:
        own = policy / "backbone"
        return replace(self, pretrained=own) if own.is_dir() else self

    def check(self, instructions: Sequence[str], num_views: int) -> None:
        tokenizer = self.files.tokenizer()
        lengths = {text: len(self.prompt_ids(tokenizer, text)) for text in instructions}
        require_prompts(lengths, self.max_prompt_tokens)

    def prompt_ids(self, tokenizer: Any, instruction: str) -> list[int]:
        """The prompt of an instruction."""
        return self.ending(
            cast(list[int], tokenizer.encode(self.prompt.format(instruction=instruction.lower())).ids)
        )

    def ending(self, ids: list[int]) -> list[int]:
        """The ids with `▁` at their end, where this checkpoint has it."""
        return [*ids, SPACE] if self.ends_in_space and ids[-1] != SPACE else ids

    def build(self, proprio_dim: int, num_views: int, image_size: int) -> PrismaticBackbone:
        files = self.files
        if image_size != files.image_size:
            raise ValueError(
                f"data.image_size is {image_size}, and {files.directory} takes pictures of {files.image_size} "
                f"pixels; set it to {files.image_size}"
            )
        with torch.device("meta"):
            vlm = PrismaticVLM(files, proprio_dim if self.proprio else 0, self.film).to(DTYPES[self.dtype])
        if files.has_weights:
            if self.proprio or self.film:
                raise ValueError(
                    f"backbone.proprio and backbone.film are OpenVLA-OFT's, whose weights lie beside the model; "
                    f"run `ipvla import --source {files.directory}`, and give --start_from its policy"
                )
            vlm.take(files.weights(), str(files.directory))
        vlm.settle()
        cls = ParallelPrismatic if self.action_places else PrismaticBackbone
        return cls(vlm, self, files, num_views)


class PrismaticVLM(nn.Module):
    """The network under the published names: `vision_backbone`, `projector`, `language_model`; OFT's
    `proprio_projector`."""

    def __init__(self, files: OpenVLAFiles, proprio: int, film: bool) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM  # takes seconds

        super().__init__()
        text = LlamaConfig(**files.text, attn_implementation="sdpa")
        width = text.hidden_size
        self.text_config = text
        self.vision_backbone = PrismaticVision(files.towers, files.image_size, width if film else 0)
        self.projector = Projector(self.vision_backbone.width, width, fused=len(files.towers) > 1)
        self.language_model = LlamaForCausalLM(text)
        self.proprio_projector = (
            nn.ModuleDict({"fc1": nn.Linear(proprio, width), "fc2": nn.Linear(width, width)}) if proprio else None
        )

    def take(self, weights: dict[str, torch.Tensor], where: str) -> None:
        """Takes these tensors for its own, without copies where the dtype is the same.

        Raises:
            ValueError: one is missing, unknown, or of another shape.
        """
        own = self.state_dict()
        require_same(own, weights, where)
        cast_to = {name: tensor.to(own[name].dtype) for name, tensor in weights.items()}
        frozen = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        self.load_state_dict(cast_to, assign=True)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in frozen)

    def settle(self) -> None:
        """Computes what no file holds: the frequencies of the rotary position embedding."""
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        self.language_model.model.rotary_emb = LlamaRotaryEmbedding(self.text_config)


class PrismaticBackbone(DecoderBackbone):
    """See the module's docstring."""

    layer_pattern = r"language_model\.model\.layers\.({layers})\."
    attention: ClassVar[Literal["prefix", "causal"]] = "causal"
    end = _EOS

    def __init__(self, vlm: PrismaticVLM, config: PrismaticConfig, files: OpenVLAFiles, num_views: int) -> None:
        super().__init__(vlm, vlm.text_config, config.max_prompt_tokens)
        self.config = config
        self.files = files
        self.description = files.description()  # read now: the directory may be gone when it is saved again
        self.tokenizer = files.tokenizer()
        self.perception_size = vlm.vision_backbone.width
        self.num_views = num_views

    @property
    def decoder(self) -> Any:
        return self.network.language_model.model

    @property
    def words(self) -> nn.Module:
        return cast(nn.Module, self.network.language_model.get_input_embeddings())

    @property
    def speaker(self) -> nn.Module:
        return cast(nn.Module, self.network.language_model.lm_head)

    def save_description(self, directory: Path) -> None:
        own = directory / "backbone"
        own.mkdir()
        for name, content in self.description.items():
            (own / name).write_bytes(content)

    def tokenize(self, instruction: str) -> list[int]:
        return self.config.prompt_ids(self.tokenizer, instruction)

    def tokenize_text(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        tokens = [i for i in ids if i != NO_TOKEN]
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text.strip()

    def question(self, text: str) -> list[int]:
        return [_BOS, *self.tokenize_text(text), _NEWLINE]

    def embed(self, inputs: ModelInputs) -> Embedded:
        network, lengths = self.network, inputs.attention_mask.sum(-1)
        longest = int(lengths.max())  # columns of padding alone cost time and say nothing
        ids, valid = self._with_places(inputs.input_ids[:, :longest], inputs.attention_mask[:, :longest])
        prompt = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        said = prompt | (ids == _EOS) & valid
        words = self.embed_ids(ids).masked_fill(~said[..., None], 0)  # an action's place is blank
        average = words.sum(1) / said.sum(1, keepdim=True).to(words.dtype) if self.config.film else None
        tokens, extra = self.see(inputs.images) if average is None else self._see(inputs.images, average)
        perception, seen = extra[_PATCHES], [tokens]
        if (projector := network.proprio_projector) is not None:
            state = inputs.proprio.to(words.dtype)
            seen.append(projector["fc2"](F.gelu(projector["fc1"](state)))[:, None])
        pictures = torch.cat(seen, 1)
        n = pictures.shape[1]
        instruction = prompt.clone()
        instruction[:, 0] = False
        instruction[torch.arange(len(lengths), device=lengths.device), lengths - 1] = False
        return Embedded(
            tokens=torch.cat([words[:, :1], pictures, words[:, 1:]], 1),
            valid=F.pad(valid, (n, 0), value=True),
            last=lengths - 1 + n,
            perception=perception.float(),
            proprio=inputs.proprio,
            instruction=F.pad(instruction, (n, 0), value=False),
        )

    def see(self, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """uint8 [B, V, H, W, 3] -> the image tokens [B, Np, D], and the towers' patches [B, Np, Dp]."""
        return self._see(images, None)

    def _see(
        self, images: torch.Tensor, average: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        patches = self.network.vision_backbone(images, average)
        return self.network.projector(patches), {_PATCHES: patches}

    def _with_places(self, ids: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts int64 [B, L] and which of their tokens there are, with what stands behind them."""
        return ids.masked_fill(~valid, 0), valid


class ParallelPrismatic(PrismaticBackbone):
    """OpenVLA-OFT: places for a whole chunk behind the prompt, and attention in both directions."""

    attention: ClassVar[Literal["prefix", "causal"]] = "prefix"

    def _with_places(self, ids: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        lengths, more = valid.sum(-1, keepdim=True), self.config.action_places + 1
        ids, valid = F.pad(ids.masked_fill(~valid, 0), (0, more)), F.pad(valid, (0, more))
        place = torch.arange(ids.shape[1], device=ids.device)
        behind = (place >= lengths) & (place < lengths + more)
        ids = ids.masked_fill(behind, _BOS).masked_fill(place == lengths + more - 1, _EOS)
        return ids, valid | behind

    def write_loss(self, inputs: ModelInputs, replies: torch.Tensor) -> torch.Tensor:
        raise ValueError(_NO_WORDS)

    def write(self, inputs: ModelInputs, max_new_tokens: int) -> torch.Tensor:
        raise ValueError(_NO_WORDS)
