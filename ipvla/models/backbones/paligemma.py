"""The `paligemma` backbone: transformers' PaliGemma classes, the route for real weights (arXiv 2407.07726)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoTokenizer, PaliGemmaForConditionalGeneration

from ipvla.models.backbones.protocol import Backbone, BackboneConfig, BackboneOutput
from ipvla.models.features import Features
from ipvla.types import ModelInputs

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@BackboneConfig.register_subclass("paligemma")
@dataclass(frozen=True)
class PaliGemmaConfig(BackboneConfig):
    """Which weights, and how they are asked.

    Attributes:
        pretrained: a hub name such as `google/paligemma-3b-pt-224`, or a directory written by `save_pretrained`
            (model and tokenizer).
        cache_dir: where downloads are kept; None follows HF_HOME.
        dtype: "float32" or "bfloat16".
        prompt: with `{instruction}` in it.
        max_prompt_tokens: longest prompt in tokens, image tokens included.
    """

    pretrained: str = "google/paligemma-3b-pt-224"
    cache_dir: Path | None = None
    dtype: str = "bfloat16"
    prompt: str = "What action should the robot take to {instruction}?"
    max_prompt_tokens: int = 320

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"backbone.dtype is {self.dtype!r}; choose one of {sorted(_DTYPES)}")
        if "{instruction}" not in self.prompt:
            raise ValueError(f"backbone.prompt {self.prompt!r} does not contain {{instruction}}")

    def build(self, proprio_dim: int, num_views: int, image_size: int) -> PaliGemmaBackbone:
        loading: dict[str, Any] = {"cache_dir": self.cache_dir}
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.pretrained, **loading)
            vlm, report = PaliGemmaForConditionalGeneration.from_pretrained(
                self.pretrained, dtype=_DTYPES[self.dtype], output_loading_info=True, **loading
            )
        except OSError as error:
            raise ValueError(
                f"backbone.pretrained {self.pretrained!r} cannot be loaded ({str(error).splitlines()[0]}); "
                "give a directory written by save_pretrained, or allow the download"
            ) from None
        if report["missing_keys"]:
            raise ValueError(
                f"{self.pretrained} lacks weights for {sorted(report['missing_keys'])[:3]}...; "
                "was it saved after PEFT wrapped it? Save the base model first"
            )
        return PaliGemmaBackbone(vlm, tokenizer, self, num_views)


class PaliGemmaBackbone(Backbone):
    """Prompt: image tokens, BOS, the filled template, newline; cognition is the newline's last hidden state."""

    layer_pattern = r"language_model\.layers\.({layers})\."

    def __init__(self, vlm: Any, tokenizer: Any, config: PaliGemmaConfig, num_views: int) -> None:
        super().__init__()
        self.vlm = vlm
        self.tokenizer = tokenizer
        self.template = config.prompt
        self.max_prompt_tokens = config.max_prompt_tokens
        self.num_views = num_views
        text, vision = vlm.config.text_config, vlm.config.vision_config
        self.width = text.hidden_size
        self.perception_size = text.hidden_size
        self.num_layers = text.num_hidden_layers
        self.image_token = vlm.config.image_token_id
        self.image_size = vision.image_size
        self.image_tokens = (vision.image_size // vision.patch_size) ** 2

    @property
    def network(self) -> Any:
        """The Hugging Face model, also when PEFT has wrapped it."""
        return self.vlm.get_base_model() if hasattr(self.vlm, "get_base_model") else self.vlm

    def tokenize(self, instruction: str) -> list[int]:
        return self._prompt(self.template.format(instruction=instruction.lower()))

    def language_layers(self) -> list[nn.Module]:
        return list(self.network.model.language_model.layers)

    def forward(self, inputs: ModelInputs) -> BackboneOutput:
        output = self._run(inputs, inputs.input_ids, inputs.attention_mask)
        last = inputs.attention_mask.sum(-1) - 1
        rows = torch.arange(len(last), device=last.device)
        hidden = output.hidden_states
        cognition = hidden[-1][rows, last]
        words = inputs.attention_mask & (inputs.input_ids != self.image_token)
        words[:, self.image_tokens * self.num_views] = False  # BOS
        words[rows, last] = False  # the newline
        seen = output.image_hidden_states.reshape(len(last), -1, self.perception_size)
        features = Features(cognition.float(), seen.float(), inputs.proprio)
        return BackboneOutput(features, hidden, words)

    def answer_loss(self, inputs: ModelInputs, questions: list[str], answers: list[str]) -> torch.Tensor:
        rows = [(self._prompt(q), self._encode(a)) for q, a in zip(questions, answers, strict=True)]
        length = max(len(prompt) + len(reply) + 1 for prompt, reply in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        kinds, labels, mask = torch.zeros_like(ids), torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, (prompt, reply) in enumerate(rows):
            asked = slice(len(prompt), len(prompt) + len(reply) + 1)
            ids[row, : asked.stop] = torch.tensor([*prompt, *reply, self.tokenizer.eos_token_id])
            kinds[row, asked] = 1
            mask[row, : asked.stop] = 1
            labels[row, asked] = ids[row, asked]
        device = inputs.images.device
        output = self._run(inputs, ids.to(device), mask.to(device), kinds.to(device))
        return F.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(device))

    @torch.no_grad()
    def answer(self, inputs: ModelInputs, questions: list[str], max_new_tokens: int = 8) -> list[str]:
        replies = []
        for row, question in enumerate(questions):  # one by one: a batch would need padding on the left
            ids = torch.tensor([self._prompt(question)], device=inputs.images.device)
            pixels = self._pixels(inputs.images[row : row + 1])
            out = self.network.generate(
                input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens, do_sample=False,
            )  # fmt: skip
            replies.append(
                cast(str, self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()
            )
        return replies

    def _encode(self, text: str) -> list[int]:
        return cast(list[int], self.tokenizer.encode(text, add_special_tokens=False))

    def _prompt(self, text: str) -> list[int]:
        images = [self.image_token] * (self.image_tokens * self.num_views)
        return [*images, self.tokenizer.bos_token_id, *self._encode(text), *self._newline]

    @property
    def _newline(self) -> list[int]:
        return self._encode("\n") or [self.tokenizer.eos_token_id]

    def _run(
        self, inputs: ModelInputs, ids: torch.Tensor, mask: torch.Tensor, kinds: torch.Tensor | None = None
    ) -> Any:
        return self.vlm(
            input_ids=ids,
            pixel_values=self._pixels(inputs.images),
            attention_mask=mask.long(),
            token_type_ids=torch.zeros_like(ids) if kinds is None else kinds,
            output_hidden_states=True,
        )

    def _pixels(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, V, H, W, 3] -> [B * V, 3, S, S] in [-1, 1], S the vision tower's size."""
        x = images.flatten(0, 1).permute(0, 3, 1, 2).to(self.network.dtype) / 127.5 - 1
        if x.shape[-1] == self.image_size:
            return x
        return F.interpolate(x.float(), (self.image_size,) * 2, mode="bilinear", antialias=True).to(x.dtype)
