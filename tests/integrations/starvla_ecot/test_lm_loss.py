"""Loss on the assistant's words alone, none of them shifted, beside the actions' loss or without it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import Qwen2Config, Qwen2ForCausalLM

from integrations.starvla_ecot.chat_labels import IGNORED, ChatBatch, chat_batch
from integrations.starvla_ecot.lm_loss import LossScale, lm_loss, reasoning_loss
from ipvla.models.backbones import Backbone
from ipvla.models.backbones.protocol import padded
from tests.integrations.starvla_ecot.chat import TEMPLATE, chat_processor, chat_tokenizer
from tests.models.conftest import inputs_for

PROMPTS = ["Your task is to grasp it.", "th", "re\n<end> assistant"]
REPLIES = ["TASK: grasp @home — für 杯子 PLAN: 1. reach", "real", "three words re"]
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


@pytest.fixture(scope="module")
def batch() -> ChatBatch:
    return chat_batch(chat_tokenizer(), PROMPTS, REPLIES)


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, eos_token_id=2, bos_token_id=None,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def test_every_token_is_labelled_if_and_only_if_the_assistant_says_it(batch: ChatBatch) -> None:
    tokenizer = chat_tokenizer()
    for prompt, reply, ids, labels, mask in zip(
        PROMPTS, REPLIES, batch.inputs["input_ids"], batch.labels, batch.inputs["attention_mask"], strict=True
    ):
        before = tokenizer(f"{SYSTEM}<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        said = [*tokenizer(reply)["input_ids"], tokenizer.eos_token_id]
        padding = len(ids) - len(before) - len(said)
        assert ids.tolist() == [*before, *said, *[tokenizer.pad_token_id] * padding]
        assert labels.tolist() == [*[IGNORED] * len(before), *said, *[IGNORED] * padding]
        assert mask.tolist() == [1] * (len(before) + len(said)) + [0] * padding


def test_labels_stand_where_their_tokens_stand(batch: ChatBatch) -> None:
    counts = batch.labels != IGNORED
    torch.testing.assert_close(batch.labels[counts], batch.inputs["input_ids"][counts])
    tokenizer = chat_tokenizer()
    for labels, reply in zip(batch.labels, REPLIES, strict=True):
        assert tokenizer.decode(labels[labels != IGNORED]) == f"{reply}<|im_end|>"


def test_the_words_are_those_that_the_template_writes(batch: ChatBatch) -> None:
    tokenizer = chat_tokenizer()
    for i, (prompt, reply) in enumerate(zip(PROMPTS, REPLIES, strict=True)):
        chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
        written = tokenizer.apply_chat_template(chat, tokenize=False)
        ids = batch.inputs["input_ids"][i][batch.inputs["attention_mask"][i].bool()]
        assert tokenizer.decode(ids) + "\n" == written, "but for the line break behind the end of the turn"


def test_the_loss_is_what_hugging_face_makes_of_the_same_labels(batch: ChatBatch, model: Qwen2ForCausalLM) -> None:
    ours = lm_loss(model, batch)
    theirs = model(**batch.inputs, labels=batch.labels).loss
    torch.testing.assert_close(ours, theirs)
    shifted = batch.labels.roll(-1, 1)
    assert abs(float(model(**batch.inputs, labels=shifted).loss - ours)) > 1e-4, "a shift would be seen"


def test_the_loss_is_the_mean_over_tokens_one_by_one(batch: ChatBatch, model: Qwen2ForCausalLM) -> None:
    """Each labelled token is predicted by the model that has read exactly what stands before it."""
    losses = []
    for ids, labels in zip(batch.inputs["input_ids"], batch.labels, strict=True):
        for place in np.flatnonzero((labels != IGNORED).numpy()).tolist():
            with torch.no_grad():
                read = model(input_ids=ids[None, :place]).logits[0, -1]
            losses.append(F.cross_entropy(read, ids[place]))
    torch.testing.assert_close(lm_loss(model, batch), torch.stack(losses).mean(), atol=1e-5, rtol=1e-4)


def test_prompt_and_padding_do_not_reach_the_loss_as_targets(batch: ChatBatch, model: Qwen2ForCausalLM) -> None:
    logits = model(**batch.inputs).logits.detach().requires_grad_()

    class Fixed:
        def __call__(self, **_: Any) -> Any:
            return type("Output", (), {"logits": logits})

    lm_loss(Fixed(), batch).backward()
    assert logits.grad is not None
    predicts = F.pad(batch.labels[:, 1:] != IGNORED, (0, 1), value=False)
    assert ((logits.grad != 0).any(-1) == predicts).all()


def test_a_chat_without_reasoning_is_a_prompt_without_labels(model: Qwen2ForCausalLM) -> None:
    tokenizer = chat_tokenizer()
    mixed = chat_batch(tokenizer, PROMPTS[:2], [REPLIES[0], ""])
    assert (mixed.labels[1] == IGNORED).all()
    alone = chat_batch(tokenizer, PROMPTS[:1], REPLIES[:1])
    torch.testing.assert_close(lm_loss(model, mixed), lm_loss(model, alone))
    assert lm_loss(model, chat_batch(tokenizer, PROMPTS[:1], [""])) == 0


def test_images_are_put_before_the_words_and_labels_stay_on_the_reply() -> None:
    processor = chat_processor()
    images = [
        [Image.new("RGB", (28, 28), colour) for colour in pair] for pair in (("red", "blue"), ("green", "white"))
    ]
    batch = chat_batch(processor, PROMPTS[:2], REPLIES[:2], images)
    pad = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert (batch.inputs["input_ids"] == pad).sum(1).tolist() == [2 * 4] * 2
    assert batch.inputs["pixel_values"].shape == (4, 3, 28, 28)
    single = processor.image_processor(images[1][0], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(batch.inputs["pixel_values"][2], single)
    for labels, reply in zip(batch.labels, REPLIES, strict=False):
        assert processor.tokenizer.decode(labels[labels != IGNORED]) == f"{reply}<|im_end|>"


def test_what_a_processor_says_of_each_token_reaches_to_the_end_of_the_reply() -> None:
    """Qwen's newer processors mark the tokens of pictures, and the reply has none."""
    inner = chat_processor()
    pad = inner.tokenizer.convert_tokens_to_ids("<|image_pad|>")

    class Marking:
        tokenizer = inner.tokenizer
        apply_chat_template = inner.apply_chat_template

        def __call__(self, **given: Any) -> dict[str, torch.Tensor]:
            encoded = inner(**given)
            return {**encoded, "mm_token_type_ids": (encoded["input_ids"] == pad).long()}

    batch = chat_batch(Marking(), PROMPTS[:2], REPLIES[:2], [[Image.new("RGB", (28, 28))]] * 2)
    torch.testing.assert_close(batch.inputs["mm_token_type_ids"], (batch.inputs["input_ids"] == pad).long())


def test_a_template_that_rewrites_the_prompt_is_refused() -> None:
    rewriting = TEMPLATE.replace("You are", "{{ messages | length }} turns, you are")
    with pytest.raises(ValueError, match="rewrites the prompt when a reply follows"):
        chat_batch(chat_tokenizer(rewriting), ["a"], ["b"])


def test_numbers_of_prompts_and_replies_must_agree() -> None:
    with pytest.raises(ValueError, match="2 prompts, 1 replies"):
        chat_batch(chat_tokenizer(), ["a", "b"], ["c"])


def test_the_total_is_the_weighted_sum() -> None:
    action, words = torch.tensor(2.0), torch.tensor(3.0)
    total, told = LossScale(0.5, 0.1).total(action, lambda: words)
    torch.testing.assert_close(total, torch.tensor(0.5 * 2 + 0.1 * 3))
    assert told == {"action_loss": action, "lm_loss": words, "loss_scale.vlm_cot": 0.1}


def test_with_weight_0_the_words_are_not_computed() -> None:
    total, told = LossScale().total(torch.tensor(2.0), lambda: pytest.fail("computed"))
    assert float(total) == 2.0
    assert "lm_loss" not in told


@pytest.mark.parametrize("name", ["vla", "vlm_cot"])
def test_a_negative_weight_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"loss_scale\.{name} is -1"):
        LossScale(**{name: -1.0})


def test_the_projects_backbones_learn_the_words_alike(backbone: Backbone) -> None:
    inputs = inputs_for(backbone, ["press the red button", "press", "press the blue button"])
    texts = ["the red button", "", "blue"]
    spoken = inputs.map(lambda x: x[[0, 2]])
    replies = padded([backbone.tokenize_text(text) for text in texts if text])
    torch.testing.assert_close(reasoning_loss(backbone, inputs, texts), backbone.write_loss(spoken, replies))
    assert reasoning_loss(backbone, inputs, ["", "", ""]) == 0
