"""FAST (Pertsch et al., arXiv 2501.09747): a chunk's frequencies, rounded, compressed by byte-pair encoding.

    c = DCT-II(chunk) over time, orthonormal          float64 [C, A]
    k = round(scale * c)                              half to even
    text = chr(k - min_token), all dimensions of the lowest frequency first
    tokens = byte-level BPE(text)

Files are those of physical-intelligence/fast: `tokenizer.json` (Hugging Face tokenizers), `processor_config.json`
(scale, vocab_size, min_token, and time_horizon and action_dim or null). Its published class loses a coefficient
that its vocabulary has no bytes for, and reads undecodable tokens as zeros. Here such a coefficient becomes the
nearest that there is, and such tokens are an `ActionTokenError`. A round trip errs by at most 1 / (2 scale) in
root mean square over time, if no coefficient lies outside the range that the tokenizer was fitted on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer, trainers

from ipvla.files import foreign_file, nearby, one_line, read_record
from ipvla.models.action_tokens.protocol import (
    ActionTokenError,
    ActionTokenizer,
    ActionTokenizerConfig,
    refuse_outside,
)
from ipvla.models.backbones.protocol import padded
from ipvla.types import NO_TOKEN

#: Characters beyond have three bytes of UTF-8.
_MOST_VALUES = 0x800


@ActionTokenizerConfig.register_subclass("fast")
@dataclass(frozen=True)
class FastTokensConfig(ActionTokenizerConfig):
    """file: directory of a tokenizer, from `ray_jobs.fit_tokens` or published as physical-intelligence/fast."""

    file: Path | None = None

    def build(self) -> FastTokens:
        if self.file is None:
            raise ValueError(
                "head.tokenizer.file is not given; fit a tokenizer with python -m ray_jobs.fit_tokens, or give "
                "the directory of a published one"
            )
        return FastTokens.load(self.file)

    def beside(self, directory: Path) -> FastTokensConfig:
        return replace(self, file=directory)


@dataclass(frozen=True)
class FastSettings:
    """`processor_config.json`.

    Attributes:
        scale: coefficients are multiplied by it before they are rounded; > 0.
        vocab_size: most tokens.
        min_token: the smallest coefficient, which character 0 stands for.
        time_horizon, action_dim: C and A that it was fitted on; None for any.
    """

    scale: float = 10
    vocab_size: int = 1024
    min_token: int = 0
    time_horizon: int | None = None
    action_dim: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf or self.vocab_size < 2:
            raise ValueError(f"scale {self.scale} must be above 0, and vocab_size {self.vocab_size} at least 2")


class FastTokens(ActionTokenizer):
    """See the module's docstring. Chunks have different numbers of tokens, at most one or two per coefficient.

    `legal` lets tokens through that leave no coefficient half written and none too many, and the end where none is
    missing; so what is written under it always decodes.
    """

    fixed = False
    starts: torch.Tensor
    leads: torch.Tensor
    opens: torch.Tensor
    usable: torch.Tensor

    def __init__(self, bpe: Tokenizer, settings: FastSettings) -> None:
        super().__init__()
        self.bpe, self.settings = bpe, settings
        self.vocabulary = bpe.get_vocab_size()
        if self.vocabulary > settings.vocab_size:
            raise ValueError(
                f"the FAST file has {self.vocabulary} tokens, and its processor_config.json vocab_size "
                f"{settings.vocab_size}: they belong to different tokenizers; copy both files from the same one"
            )
        self.pieces = [_piece(bpe.id_to_token(token) or "") for token in range(self.vocabulary)]
        shapes = [_shape(piece) for piece in self.pieces]
        for i, name in enumerate(("starts", "leads", "opens")):
            values = torch.tensor([shape[i] if shape else -1 for shape in shapes])
            self.register_buffer(name, values, persistent=False)
        closes = bool(((self.leads == 1) & (self.starts == 0)).any())
        usable = (self.starts >= 0) & (closes | (self.opens == 0))
        self.register_buffer("usable", usable, persistent=False)
        self.bytes_per_value = 2 if (self.usable & (self.opens == 1)).any() else 1
        if not (self.usable & (self.starts == 1) & (self.leads == 0)).any():
            raise ValueError("the FAST file has no token of a single coefficient; give a byte-level BPE's files")
        known = {piece[i : i + 1] for piece in self.pieces for i in range(len(piece))}
        spelled = [v for v in range(_MOST_VALUES) if all(bytes([b]) in known for b in chr(v).encode())]
        self.values = np.array(spelled) + settings.min_token

    @property
    def identity(self) -> str:
        digest = hashlib.sha256(self.bpe.to_str().encode()).hexdigest()[:12]
        return (
            f"FAST of {self.vocabulary} tokens, scale {self.settings.scale}, {self.settings.min_token}, {digest}"
        )

    def check(self, chunk: int, action_dim: int | None) -> None:
        fitted = self.settings
        if fitted.time_horizon not in (None, chunk) or (
            action_dim and fitted.action_dim not in (None, action_dim)
        ):
            now = f"{chunk} actions" + (f" with {action_dim} dimensions that vary" if action_dim else "")
            raise ValueError(
                f"the FAST tokenizer was fitted on chunks of {fitted.time_horizon} actions with "
                f"{fitted.action_dim} dimensions, and model.chunk has {now}; fit another, or change model.chunk"
            )

    def longest(self, chunk: int, action_dim: int) -> int:
        return chunk * action_dim * self.bytes_per_value

    def encode(self, chunks: torch.Tensor) -> torch.Tensor:
        found = coefficients(chunks.detach().cpu().numpy(), self.settings.scale).reshape(len(chunks), -1)
        place = np.searchsorted(self.values, found).clip(1, len(self.values) - 1)
        below, above = self.values[place - 1], self.values[place]
        nearest = np.where(found - below <= above - found, below, above) - self.settings.min_token
        encoded = self.bpe.encode_batch(["".join(map(chr, row)) for row in nearest], add_special_tokens=False)
        return padded([one.ids for one in encoded]).to(chunks.device)

    def decode(self, tokens: torch.Tensor, chunk: int, action_dim: int) -> torch.Tensor:
        from scipy.fft import idct  # type: ignore[import-untyped]  # takes a while

        ends = (tokens == NO_TOKEN).cumsum(1) > 0
        refuse_outside(tokens.masked_fill(ends, 0), self.vocabulary)
        rows = zip(tokens.tolist(), (~ends).sum(1).tolist(), strict=True)
        found = [self._values(i, row[:n], chunk * action_dim) for i, (row, n) in enumerate(rows)]
        decoded = idct(np.array(found).reshape(-1, chunk, action_dim) / self.settings.scale, axis=1, norm="ortho")
        return torch.from_numpy(decoded.astype(np.float32)).to(tokens.device)

    def _values(self, row: int, tokens: Sequence[int], expected: int) -> list[int]:
        try:
            text = b"".join(self.pieces[token] for token in tokens).decode()
        except UnicodeDecodeError:
            raise ActionTokenError(
                f"row {row}: its {len(tokens)} FAST tokens spell no whole coefficients"
            ) from None
        if len(text) != expected:
            raise ActionTokenError(
                f"row {row}: its {len(tokens)} FAST tokens spell {len(text)} coefficients, and a chunk has "
                f"{expected}"
            )
        return [ord(character) + self.settings.min_token for character in text]

    def legal(self, tokens: torch.Tensor, chunk: int, action_dim: int) -> torch.Tensor:
        known = tokens.clamp(min=0)
        left = chunk * action_dim - (self.starts[known] * (tokens != NO_TOKEN)).sum(1)
        pending = self.opens[known[:, -1]] if tokens.shape[1] else torch.zeros_like(left)
        fits = self.usable & (self.leads == pending[:, None]) & (self.starts <= left[:, None])
        ends = (left == 0) & (pending == 0)
        return torch.cat([fits, ends[:, None]], 1)

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.bpe.save(str(directory / "tokenizer.json"))
        described = {"processor_class": "UniversalActionProcessor", **vars(self.settings)}
        (directory / "processor_config.json").write_text(json.dumps(described, indent=1))
        wrapped = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        (directory / "tokenizer_config.json").write_text(json.dumps(wrapped, indent=1))

    @classmethod
    def load(cls, directory: Path) -> Self:
        """What `save` wrote, or a published directory. ValueError if it is missing, damaged, or does not fit."""
        try:
            described = read_record(path := directory / "processor_config.json")
            names = FastSettings.__dataclass_fields__
            settings = FastSettings(**{name: value for name, value in described.items() if name in names})
            bpe = Tokenizer.from_file(str(path := directory / "tokenizer.json"))
            return cls(bpe, settings)
        except Exception as error:  # tokenizers raises plain Exception
            found = nearby(directory, "tokenizer.json", "processor_config.json")
            reason = foreign_file(path) or one_line(error)
            meant = f"did you mean {found}? Otherwise " if found else ""
            raise ValueError(
                f"no FAST tokenizer in {directory} ({path.name}: {reason}); {meant}give a "
                "directory with tokenizer.json and processor_config.json"
            ) from None

    @classmethod
    def fit(cls, chunks: npt.NDArray[np.float32], vocab_size: int = 1024, scale: float = 10) -> Self:
        """A tokenizer of float32 [N, C, A] chunks, as the published class fits it: seconds to minutes on a CPU.

        Raises:
            ValueError: the coefficients take more values than `vocab_size` allows.
        """
        settings = FastSettings(scale, vocab_size, 0, *chunks.shape[1:])
        found = coefficients(chunks, scale).reshape(len(chunks), -1)
        smallest, values = int(found.min()), int(np.ptp(found)) + 1
        if values >= min(vocab_size, _MOST_VALUES):
            raise ValueError(
                f"vocab_size is {vocab_size}, and the chunks' coefficients take {values} values at scale {scale}; "
                "raise vocab_size or lower the scale"
            )
        bpe = ByteLevelBPETokenizer()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            show_progress=False,
            special_tokens=[],
            initial_alphabet=[chr(value) for value in range(values)],
            max_token_length=10_000,
        )
        texts = ("".join(map(chr, row)) for row in found - smallest)
        bpe._tokenizer.train_from_iterator(texts, trainer=trainer)
        return cls(bpe._tokenizer, replace(settings, min_token=smallest))


def coefficients(chunks: npt.NDArray[np.floating[Any]], scale: float) -> npt.NDArray[np.int64]:
    """int64 [N, C, A] of chunks [N, C, A]: their orthonormal DCT-II over time, scaled and rounded."""
    from scipy.fft import dct

    found: npt.NDArray[np.float64] = dct(chunks.astype(np.float64), axis=1, norm="ortho")
    return np.rint(found * scale).astype(np.int64)


def _printable() -> dict[str, int]:
    """The characters that stand for bytes in a byte-level BPE (GPT-2): printable ones for themselves."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _printable()


def _piece(token: str) -> bytes:
    """The bytes of a token; one with a character that stands for none is its own text."""
    known = [_BYTES.get(character) for character in token]
    return token.encode() if None in known else bytes(byte for byte in known if byte is not None)


def _shape(piece: bytes) -> tuple[int, int, int] | None:
    """Characters that it starts, bytes in front that end one, does it leave one open; None if it spells none."""
    leads = 0
    while leads < len(piece) and 0x80 <= piece[leads] < 0xC0:
        leads += 1
    opens = int(bool(piece) and 0xC2 <= piece[-1] < 0xE0)
    try:
        inside = piece[leads : len(piece) - opens].decode()
    except UnicodeDecodeError:
        return None
    if not piece or leads > 1 or any(ord(character) >= _MOST_VALUES for character in inside):
        return None
    return len(inside) + opens, leads, opens
