"""A chat of a prompt and its reply as model inputs, with labels on the reply alone.

The labels stand where their tokens stand: label i is token i. Hugging Face's models and `lm_loss` compare them
with what is predicted one token earlier; to shift them before that would train on the token after the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

#: The label of tokens that carry no loss, as PyTorch's cross-entropy and Hugging Face's models know it.
IGNORED = -100


@dataclass(frozen=True)
class ChatBatch:
    """Chats, padded at their ends.

    Attributes:
        inputs: for the model's `forward`: input_ids and attention_mask int64 [B, L], and what the processor adds.
        labels: int64 [B, L], `input_ids` on the replies and the ends of their turns, `IGNORED` elsewhere.
    """

    inputs: Mapping[str, torch.Tensor]
    labels: torch.Tensor

    def to(self, device: torch.device | str) -> ChatBatch:
        return ChatBatch({name: x.to(device) for name, x in self.inputs.items()}, self.labels.to(device))


def chat_batch(
    processor: Any, prompts: Sequence[str], replies: Sequence[str], images: Sequence[Sequence[Any]] | None = None
) -> ChatBatch:
    """Chats by the tokenizer's own template, one prompt and one reply each.

    Prompt and reply are tokenised apart: their border is where it is in generation, whatever the words. A reply of
    "" has the prompt alone and no labels.

    Args:
        processor: a Hugging Face tokenizer with a chat template; or a processor (its `tokenizer`, template and
            handling of images), for models that see.
        prompts, replies: B texts each.
        images: B lists of images, at least one each, put before the prompt's words; only with a processor.

    Raises:
        ValueError: the template rewrites the prompt once a reply follows, so that no part is the reply's alone.
    """
    if not len(prompts) == len(replies) == len(images if images is not None else prompts):
        raise ValueError(f"{len(prompts)} prompts, {len(replies)} replies: give as many replies and images")
    tokenizer = getattr(processor, "tokenizer", processor)
    rows, more = [], []
    for i, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        seen = None if images is None else list(images[i])
        asked, said = _turns(processor, tokenizer, prompt, reply, 0 if seen is None else len(seen))
        encoded = _encode(processor, tokenizer, asked, seen)
        ids = encoded.pop("input_ids")[0]
        reply_ids = torch.tensor(tokenizer(said, add_special_tokens=False)["input_ids"], dtype=torch.long)
        rows.append((ids, reply_ids))
        more.append(encoded)
    length = max(len(ids) + len(reply) for ids, reply in rows)
    pad = tokenizer.pad_token_id or 0
    inputs = {
        "input_ids": torch.stack([_padded(torch.cat(row), length, pad) for row in rows]),
        "attention_mask": torch.stack([_padded(torch.ones_like(torch.cat(row)), length, 0) for row in rows]),
    }
    labels = [_padded(torch.cat([torch.full_like(ids, IGNORED), reply]), length, IGNORED) for ids, reply in rows]
    for name in sorted(set().union(*more) - {"attention_mask"}):
        inputs[name] = torch.cat(
            [
                _reaching(each[name], len(ids), length)
                for each, (ids, _) in zip(more, rows, strict=True)
                if name in each
            ]
        )
    return ChatBatch(inputs, torch.stack(labels))


def _turns(processor: Any, tokenizer: Any, prompt: str, reply: str, images: int) -> tuple[str, str]:
    """The chat up to where the assistant's words begin, and from there to the end of its turn."""
    user: Any = prompt
    assistant: Any = reply
    if processor is not tokenizer:
        user = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": prompt}]
        assistant = [{"type": "text", "text": reply}]
    asking = [{"role": "user", "content": user}]
    asked: str = processor.apply_chat_template(asking, tokenize=False, add_generation_prompt=True)
    if not reply:
        return asked, ""
    whole: str = processor.apply_chat_template(
        [*asking, {"role": "assistant", "content": assistant}], tokenize=False
    )
    if not whole.startswith(asked):
        raise ValueError(
            f"the chat template rewrites the prompt when a reply follows: {asked!r} is not how {whole!r} begins; "
            "give the tokenizer a template that adds the reply at the end"
        )
    said = whole[len(asked) :]
    end = tokenizer.eos_token
    if end and end in said:  # Qwen writes a line break behind it, which no model is asked to generate
        said = said[: said.rindex(end) + len(end)]
    return asked, said


def _encode(processor: Any, tokenizer: Any, text: str, images: list[Any] | None) -> dict[str, torch.Tensor]:
    # the template has written the special tokens already
    if images:
        return dict(processor(text=[text], images=images, add_special_tokens=False, return_tensors="pt"))
    return {"input_ids": torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]], dtype=torch.long)}


def _reaching(value: torch.Tensor, prompt: int, length: int) -> torch.Tensor:
    """What a processor gave besides ids: values per token are 0 on the reply, pictures stay as they are."""
    return _padded(value[0], length, 0)[None] if value.shape == (1, prompt) else value


def _padded(row: torch.Tensor, length: int, value: int) -> torch.Tensor:
    return F.pad(row, (0, length - len(row)), value=value)
