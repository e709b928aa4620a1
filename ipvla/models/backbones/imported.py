"""What backbones share whose weights come with an imported policy, and whose experts are heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from ipvla.models.backbones.hugging_face import DTYPES, Frame, HuggingFaceBackbone, HuggingFaceConfig
from ipvla.models.backbones.protocol import require_prompts

#: Inside a policy: the tokenizer, and the files that lay beside the published weights.
_OWN, _PUBLISHED = "backbone", "published"


def require_vision_heads(heads: int, width: int) -> None:
    """ValueError if a vision tower of this width cannot be divided into so many heads."""
    if heads < 1 or width % heads:
        raise ValueError(
            f"vision_heads is {heads}, and the vision tower is {width} wide; give a divisor of that (ipvla "
            "import: --pi.vision_heads)"
        )


@dataclass(frozen=True)
class ImportedConfig(HuggingFaceConfig):
    """The weights are a saved policy's, which `ray_jobs.import_policy` writes.

    Attributes:
        pretrained: of the tokenizer alone: a hub name, or a directory, as a saved policy has one.
    """

    prompt: str = "{instruction}\n"

    def beside(self, policy: Path) -> Self:
        own = policy / _OWN
        return replace(self, pretrained=str(own)) if own.is_dir() else self

    def check(self, instructions: Sequence[str], num_views: int) -> None:
        if not instructions or not Path(self.pretrained).is_dir():
            return
        tokenizer, pictures = self.tokenizer(), self.image_tokens * num_views
        lengths = {text: pictures + len(tokenizer.encode(self.worded(text))) for text in instructions}
        require_prompts(lengths, self.max_prompt_tokens)

    @property
    def image_tokens(self) -> int:
        """Of one picture."""
        raise NotImplementedError

    def worded(self, instruction: str) -> str:
        return self.prompt.format(instruction=instruction.removesuffix("\n"))

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

    def __init__(self, vlm: Any, config: ImportedConfig, frame: Frame, tokenizer: Any) -> None:
        super().__init__(vlm, tokenizer, frame, config)
        files = Path(config.pretrained) / _PUBLISHED
        self.published = {path.name: path.read_bytes() for path in files.glob("*")}
        # weights that are taken over as they are no longer share the words' embedding with the last layer
        self.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]
            lambda *_: self.network.tie_weights()
        )

    def save_description(self, directory: Path) -> None:
        own = directory / _OWN
        self.tokenizer.save_pretrained(own)
        for name, content in self.published.items():
            (own / _PUBLISHED).mkdir(exist_ok=True)
            (own / _PUBLISHED / name).write_bytes(content)
