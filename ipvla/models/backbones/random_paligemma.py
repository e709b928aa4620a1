"""A PaliGemma of any size with random weights, as `from_pretrained` reads it: time depends on sizes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration, PreTrainedTokenizerFast

#: In this order: PaliGemma's special tokens and those that its tokenizer must know.
_SPECIAL: Final = ("<pad>", "<eos>", "<bos>", "<unk>", "<image>", "\n")
#: google/paligemma-3b-pt-224 (Beyer et al., arXiv 2407.07726), but for its 257,152 words.
PALIGEMMA_3B: Final[Mapping[str, Mapping[str, Any]]] = {
    "vision": {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
        "image_size": 224, "patch_size": 14, "projection_dim": 2048,
    },
    "text": {
        "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "num_attention_heads": 8,
        "num_key_value_heads": 1, "head_dim": 256,
    },
}  # fmt: skip
#: 6 + 2 layers, 4 image tokens per 28-pixel view.
SMALLEST: Final[Mapping[str, Mapping[str, Any]]] = {
    "vision": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14, "projection_dim": 48,
    },
    "text": {
        "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 24,
    },
}  # fmt: skip


def save_random_paligemma(
    directory: Path,
    sizes: Mapping[str, Mapping[str, Any]],
    words: Sequence[str],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> None:
    """Writes model and tokenizer, always the same ones on a device.

    Args:
        sizes: of `vision` and `text`, by the names of their Hugging Face configs.
        words: the tokenizer's vocabulary.
        device: where the weights are drawn; a GPU is faster.
    """
    vocabulary = [*_SPECIAL, *words]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Punctuation(),
        ]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    ).save_pretrained(directory)
    image_token = vocabulary.index("<image>")
    config = PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **sizes["vision"]},
        text_config={"model_type": "gemma", "vocab_size": len(vocabulary), **sizes["text"]},
        projection_dim=sizes["vision"]["projection_dim"],
        image_token_id=image_token,
        image_token_index=image_token,
        pad_token_id=vocabulary.index("<pad>"),
        eos_token_id=vocabulary.index("<eos>"),
        bos_token_id=vocabulary.index("<bos>"),
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = PaliGemmaForConditionalGeneration(config)
    model.to(dtype).save_pretrained(directory)
