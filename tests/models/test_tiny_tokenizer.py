"""The tiny backbone's vocabulary: what was known stays, and LIBERO's instructions fit."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ipvla.models.backbones import TinyConfig
from ipvla.models.backbones.tiny_tokenizer import escaped, tiny_tokenizer, tokens_of, unescaped, vocabulary
from ipvla.types import ModelInputs

INSTRUCTIONS = (Path(__file__).parent / "libero_instructions.txt").read_text().splitlines()


def test_ids_that_saved_policies_know_stay() -> None:
    entries = list(vocabulary())
    assert entries[:5] == ["<pad>", "<unk>", "<act>", "<eos>", "<sep>"]
    saved = hashlib.sha256(json.dumps(entries[:294]).encode()).hexdigest()
    assert saved == "adb797ba34b8da13758984a9df0094b964dd18fec5b5420377a0b2de1c4d44e3"
    # New words go behind the last ones, and their hash here.
    later = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    assert later == "4288bfde4255af521a6c804733bd9db886b119d392472ad6aec2c8bfbaaa0193", (
        "new words go behind the last ones, and their hash goes here"
    )
    assert len(entries) <= TinyConfig().build(8, 1, 16).vocabulary


def test_every_instruction_of_libero_is_whole_words_within_the_default_limit() -> None:
    assert len(set(INSTRUCTIONS)) > 100
    lengths = [len(tokens_of(text)) + 1 for text in INSTRUCTIONS]
    assert lengths == [len(text.split()) + 1 for text in INSTRUCTIONS]
    TinyConfig().check(INSTRUCTIONS, 1)
    with pytest.raises(ValueError, match=r"model\.backbone\.max_prompt_tokens 16, up to 20.*set --model\.b.* 20"):
        TinyConfig(max_prompt_tokens=16).check(INSTRUCTIONS, 1)


@given(st.text(st.characters(exclude_categories=("Cs", "Cc"))))
def test_no_word_is_unknown_and_beyond_ascii_every_byte_counts(text: str) -> None:
    assert 1 not in tokens_of(text)
    joined = text.replace(" ", "")
    assert unescaped(escaped(joined)) == unicodedata.normalize("NFC", joined).lower()


def test_other_scripts_come_back() -> None:
    backbone = TinyConfig().build(8, 1, 16)
    for text in ("打开抽屉", "открой", "é"):
        assert backbone.detokenize(backbone.tokenize_text(text)) == text
    assert backbone.tokenize("打开") != backbone.tokenize("关上")
    assert backbone.tokenize_text("É") == backbone.tokenize_text("e\u0301"), "one letter, however it is typed"
    assert backbone.tokenize("open the drawer") == [*tokens_of("open the drawer"), 2]
    assert tiny_tokenizer().encode("red cube <act>") == backbone.tokenize("Red cube")


def test_a_longer_limit_costs_nothing() -> None:
    torch.manual_seed(0)
    backbone = TinyConfig(width=32, heads=2, mlp=32, trunk_channels=8).build(8, 1, 16).eval()
    ids = backbone.tokenize("press the red button")

    def inputs(limit: int) -> ModelInputs:
        padded = torch.tensor([ids + [0] * (limit - len(ids))])
        images = torch.zeros(1, 1, 16, 16, 3, dtype=torch.uint8)
        mask = torch.arange(limit)[None] < len(ids)
        return ModelInputs(images=images, proprio=torch.zeros(1, 8), input_ids=padded, attention_mask=mask)

    short, long = backbone.embed(inputs(16)), backbone.embed(inputs(32))
    assert short.tokens.shape == long.tokens.shape
    assert torch.equal(backbone.encode(short).features.cognition, backbone.encode(long).features.cognition)
