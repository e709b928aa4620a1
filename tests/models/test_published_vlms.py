"""Backbones on transformers' classes act as transformers' own models, from picture and words to every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

from ipvla.models.backbones import BackboneConfig, PaliGemmaConfig, QwenVLConfig
from ipvla.models.backbones.hugging_face import HuggingFaceBackbone, resized
from ipvla.types import NO_TOKEN
from tests.models.conftest import inputs_for

CHATTING = ("qwen2_5_vl", "qwen3_vl", "smolvlm")
SIDE = {"qwen2_5_vl": 56, "qwen3_vl": 64, "smolvlm": 56}


def built(configs: Mapping[str, BackboneConfig], name: str, num_views: int) -> HuggingFaceBackbone:
    backbone = configs[name].build(5, num_views, SIDE[name]).eval()
    assert isinstance(backbone, HuggingFaceBackbone)
    return backbone


def published(backbone: HuggingFaceBackbone, pictures: np.ndarray, words: str) -> dict[str, torch.Tensor]:
    """What a model's own tokenizer and image processor make of pictures uint8 [V, S, S, 3] and an instruction."""
    directory = backbone.config.pretrained
    said = {"type": "text", "text": backbone.config.worded(words)}
    messages = [{"role": "user", "content": [*({"type": "image"} for _ in pictures), said]}]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if backbone.network.config.model_type == "smolvlm":
        pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2)[None].float() / 127.5 - 1
        text = text.replace(
            "<image>", "<fake_token_around_image><global-img>" + "<image>" * 4 + "<fake_token_around_image>"
        )
        found: dict[str, Any] = {"pixel_values": pixels}
    else:
        processor = AutoImageProcessor.from_pretrained(directory)
        found = dict(processor([Image.fromarray(p) for p in pictures], return_tensors="pt"))
        text = text.replace("<|image_pad|>", "<|image_pad|>" * 4)
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    found |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if backbone.network.config.model_type != "smolvlm":
        found["mm_token_type_ids"] = (ids == backbone.image_token).int()
    return found


@pytest.mark.parametrize("num_views", [1, 2])
@pytest.mark.parametrize("name", CHATTING)
def test_every_layer_is_the_published_models(
    backbone_configs: Mapping[str, BackboneConfig], name: str, num_views: int
) -> None:
    backbone = built(backbone_configs, name, num_views)
    backbone.max_prompt_tokens = 64
    words, side = ["press", "press the red button"], SIDE[name]
    inputs = inputs_for(backbone, words)
    pictures = np.random.default_rng(0).integers(0, 256, (2, num_views, side, side, 3), dtype=np.uint8)
    inputs = replace(inputs, images=torch.from_numpy(pictures))
    with torch.no_grad():
        output = backbone(inputs)
    for row, said in enumerate(words):
        given = published(backbone, pictures[row], said)
        n = given["input_ids"].shape[1]
        assert backbone.tokenize(said) == given["input_ids"][0].tolist()
        with torch.no_grad():
            theirs = backbone.network(**given, output_hidden_states=True)
        for own, layer in zip(output.hidden_states, theirs.hidden_states, strict=True):
            torch.testing.assert_close(own[row : row + 1, :n], layer, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(
            backbone.logits(output.features.cognition[row]), theirs.logits[0, -1], atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("name", CHATTING)
def test_replies_are_those_that_the_published_model_generates(
    backbone_configs: Mapping[str, BackboneConfig], name: str
) -> None:
    backbone = built(backbone_configs, name, 1)
    side = SIDE[name]
    pictures = np.random.default_rng(1).integers(0, 256, (1, 1, side, side, 3), dtype=np.uint8)
    inputs = replace(inputs_for(backbone, ["press the red button"]), images=torch.from_numpy(pictures))
    given = published(backbone, pictures[0], "press the red button")
    theirs = backbone.network.generate(**given, max_new_tokens=6, do_sample=False)[
        0, given["input_ids"].shape[1] :
    ]
    own = backbone.write(inputs, 6)[0]
    ends = theirs == backbone.tokenizer.eos_token_id
    assert own[own != NO_TOKEN].tolist() == theirs[~ends].tolist()


@pytest.mark.parametrize(("mode", "resample"), [("bilinear", Image.BILINEAR), ("bicubic", Image.BICUBIC)])
def test_pictures_are_resized_as_pil_does(mode: str, resample: int) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(picture).resize((56, 56), resample), np.int64)
    own = resized(torch.from_numpy(picture)[None, None], 56, mode)[0].permute(1, 2, 0).numpy()
    assert np.abs(own - expected).max() <= 1, "a rounding apart"
    assert (own == expected).mean() > 0.97


def test_weights_of_another_family_and_pictures_that_do_not_fit_are_refused(
    backbone_configs: Mapping[str, BackboneConfig], paligemma_directory: Path
) -> None:
    with pytest.raises(ValueError, match=r"holds a paligemma model, and backbone\.type qwen_vl runs"):
        QwenVLConfig(str(paligemma_directory)).check(["press"], 1)
    qwen = backbone_configs["qwen3_vl"]
    assert isinstance(qwen, QwenVLConfig)
    with pytest.raises(ValueError, match=r"holds a qwen3_vl model, and backbone\.type paligemma runs"):
        PaliGemmaConfig(qwen.pretrained).build(5, 1, 28)
    with pytest.raises(ValueError, match="picture_px is 56; this model takes multiples of 32"):
        replace(qwen, picture_px=56).check(["press"], 1)
    with pytest.raises(ValueError, match=r"max_prompt_tokens 8, up to 2\d"):
        replace(qwen, max_prompt_tokens=8).check(["press the red button"], 1)
