"""Small real models: TinyVLM, and a PaliGemma with random weights saved to disk as `save_pretrained` does."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PaliGemmaConfig as HFPaliGemmaConfig
from transformers import PaliGemmaForConditionalGeneration, PreTrainedTokenizerFast

from ipvla.models.backbones import Backbone, PaliGemmaConfig, TinyConfig
from ipvla.types import ModelInputs


@pytest.fixture(scope="session")
def paligemma_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest PaliGemma: 6 + 2 layers, 4 image tokens per 28-pixel view."""
    directory = tmp_path_factory.mktemp("paligemma")
    words = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "<image>",
        "\n",
        "what",
        "action",
        "should",
        "the",
        "robot",
        "take",
    ]
    words += ["to", "press", "red", "blue", "button", "?", "which", "is", "lit"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
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
    torch.manual_seed(0)
    config = HFPaliGemmaConfig(
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14, "projection_dim": 48,
        },
        text_config={
            "model_type": "gemma", "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 6,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 24, "vocab_size": len(words),
        },
        projection_dim=48,
        image_token_id=4,
        image_token_index=4,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )  # fmt: skip
    PaliGemmaForConditionalGeneration(config).save_pretrained(directory)
    return directory


@pytest.fixture(params=["tiny", "paligemma"])
def backbone(request: pytest.FixtureRequest, paligemma_directory: Path) -> Backbone:
    torch.manual_seed(0)
    if request.param == "tiny":
        return TinyConfig(width=32, heads=2, mlp=48, trunk_channels=8).build(5, 1, 28).eval()
    config = PaliGemmaConfig(str(paligemma_directory), dtype="float32", max_prompt_tokens=24)
    return config.build(5, 1, 28).eval()


def inputs_for(backbone: Backbone, instructions: list[str], seed: int = 0) -> ModelInputs:
    """Random 28-pixel views and proprioception with these prompts."""
    random = torch.Generator().manual_seed(seed)
    batch = len(instructions)
    ids = torch.zeros(batch, backbone.max_prompt_tokens, dtype=torch.long)
    for row, instruction in enumerate(instructions):
        tokens = backbone.tokenize(instruction)
        ids[row, : len(tokens)] = torch.tensor(tokens)
    return ModelInputs(
        images=torch.randint(0, 256, (batch, 1, 28, 28, 3), generator=random, dtype=torch.uint8),
        proprio=torch.rand(batch, 5, generator=random) * 2 - 1,
        input_ids=ids,
        attention_mask=ids != 0,
    )
