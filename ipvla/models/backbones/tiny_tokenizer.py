"""The tiny backbone's tokenizer: whole words of the Recall suite, letters for every other word."""

from __future__ import annotations

import string
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
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
#: Came later, and stand last: so the ids of all others stay, and checkpoints keep their meaning.
_LATER_WORDS = ("any", "middle", "or", "side")
_SPECIAL = ("<pad>", "<unk>", "<act>", "<eos>", "<sep>")


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece over about 250 entries; never unknown on lower-case ASCII. Id 0 pads."""
    letters = string.ascii_lowercase + string.digits + string.punctuation
    entries = [*_SPECIAL, *letters, *(f"##{c}" for c in letters), *sorted(set(_WORDS)), *_LATER_WORDS]
    vocabulary = {entry: i for i, entry in enumerate(dict.fromkeys(entries))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        additional_special_tokens=["<act>", "<sep>"],
    )
