"""The tiny backbone's tokenizer: whole words of Recall's and LIBERO's instructions, pieces of every other word."""

from __future__ import annotations

import re
import string
import unicodedata
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_WORDS = """
a after again an and are arm at ball before begin beginning begins block blue bottom bowl bowls box button buttons
by changed color colour count cube cubes cup did do does down drop each end finally first five flashed four
from front go gray green grey gripper hand has hidden how in inside into is it item lamp last later left light
lights lit many more move moved moves near no not object objects of off on once one open orange order other
over pick place plan press pressed purple push put red remember right robot said same second see sequence
shown six square start still stop subtask table task that the them then there thing third three time times tip to
together touch twice two under until up wait was were what when where which while white with yellow yes you
zero 10 11 12 13 14 15
""".split()  # noqa: SIM905 (a list of 150 quoted words does not read)
_LATER_WORDS = ("any", "middle", "or", "side")
_LIBERO_WORDS = Path(__file__).with_name("libero_words.txt")
_SPECIAL = ("<pad>", "<unk>", "<act>", "<eos>", "<sep>")
#: Bytes of UTF-8 beyond ASCII: the 64 that continue a character, and the 51 that begin one.
_BYTES = (*range(0x80, 0xC0), *range(0xC2, 0xF5))
#: A byte beyond ASCII is the character of Unicode's private use area at this distance.
_PRIVATE = 0xE000
_ESCAPED = f"[{chr(_PRIVATE + _BYTES[0])}-{chr(_PRIVATE + _BYTES[-1])}]"


def tokens_of(text: str) -> list[int]:
    """Ids of plain text, nothing added. No character is unknown but control characters."""
    return list(_tokenizer().encode(escaped(text)).ids)


def escaped(text: str) -> str:
    """Lower case; each byte of a character beyond ASCII is a character that the vocabulary has."""
    lower = unicodedata.normalize("NFC", text).lower()
    return "".join(c if c.isascii() else "".join(chr(_PRIVATE + byte) for byte in c.encode()) for c in lower)


def unescaped(text: str) -> str:
    """The inverse of `escaped` for decoded tokens; bytes that make no character become U+FFFD."""

    def characters(match: re.Match[str]) -> str:
        return bytes(ord(c) - _PRIVATE for c in match[0].replace(" ", "")).decode(errors="replace")

    return re.sub(f"{_ESCAPED}(?: ?{_ESCAPED})*", characters, text)


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """As transformers has it; texts go in `escaped`. Id 0 pads."""
    from transformers import PreTrainedTokenizerFast  # takes seconds

    return PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(),
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        additional_special_tokens=["<act>", "<sep>"],
    )


def vocabulary() -> dict[str, int]:
    """Entry -> id. What came later stands last: all other ids stay, and checkpoints keep their meaning."""
    letters = string.ascii_lowercase + string.digits + string.punctuation
    first = [*_SPECIAL, *letters, *(f"##{c}" for c in letters), *sorted(set(_WORDS)), *_LATER_WORDS]
    entries = [*first, *_LIBERO_WORDS.read_text().split(), *(chr(_PRIVATE + byte) for byte in _BYTES)]
    return {entry: i for i, entry in enumerate(dict.fromkeys(entries))}


@cache
def _tokenizer() -> Tokenizer:
    """WordPiece over 457 entries."""
    tokenizer = Tokenizer(models.WordPiece(vocabulary(), unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_ESCAPED), "isolated"), pre_tokenizers.BertPreTokenizer()]
    )
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer
