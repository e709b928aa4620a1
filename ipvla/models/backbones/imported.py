"""What backbones share whose weights come with an imported policy, and whose experts are heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from ipvla.models.backbones.hugging_face import DTYPES, Frame, HuggingFaceBackbone, loaded_tokenizer
from ipvla.models.backbones.protocol import BackboneConfig

#: Inside a policy: the tokenizer, and the files that lay beside the published weights.
_OWN, _PUBLISHED = "backbone", "published"


@dataclass(frozen=True)
class ImportedConfig(BackboneConfig):
    """The weights are a saved policy's, which `ray_jobs.import_policy` writes.

    Attributes:
        tokenizer: a hub name, or a directory with the tokenizer, which a saved policy has.
        cache_dir: directory of downloads; None follows HF_HOME.
        dtype: "float32" or "bfloat16".
        max_prompt_tokens: longest prompt in tokens, image tokens included.
    """

    layers_write_cache: ClassVar[bool] = True

    tokenizer: str = ""
    cache_dir: Path | None = None
    dtype: str = "bfloat16"
    max_prompt_tokens: int = 816

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"backbone.dtype is {self.dtype!r}; choose one of {sorted(DTYPES)}")

    def beside(self, policy: Path) -> Self:
        own = policy / _OWN
        return replace(self, tokenizer=str(own)) if own.is_dir() else self

    def loaded_tokenizer(self) -> Any:
        """ValueError if there is none."""
        return loaded_tokenizer(self.tokenizer, self.cache_dir, "backbone.tokenizer")

    def without_weights(self, model: type[Any], sizes: Any) -> Any:
        """A model of transformers whose parameters are on the device `meta`, in this dtype."""
        from accelerate import init_empty_weights  # takes seconds

        with init_empty_weights(include_buffers=False):
            vlm = model(sizes)
        vlm.tie_weights()
        for parameter in vlm.parameters():  # buffers, such as the rotation's frequencies, stay in float32
            parameter.data = parameter.data.to(DTYPES[self.dtype])
        return vlm


class ImportedBackbone(HuggingFaceBackbone):
    """Positions count from 0.

    Attributes:
        published: the files that lay beside the published weights, by name; none if they are not known.
    """

    published: Mapping[str, bytes]

    def __init__(self, vlm: Any, tokenizer: Any, frame: Frame, config: ImportedConfig, prompt: str) -> None:
        super().__init__(vlm, tokenizer, frame, prompt, config.max_prompt_tokens)
        files = Path(config.tokenizer) / _PUBLISHED
        self.published = {path.name: path.read_bytes() for path in files.glob("*")}
        # weights that are taken over as they are no longer share the words' embedding with the last layer
        self.register_load_state_dict_post_hook(lambda *_: self.network.tie_weights())

    def save_description(self, directory: Path) -> None:
        own = directory / _OWN
        self.tokenizer.save_pretrained(own)
        for name, content in self.published.items():
            (own / _PUBLISHED).mkdir(exist_ok=True)
            (own / _PUBLISHED / name).write_bytes(content)
