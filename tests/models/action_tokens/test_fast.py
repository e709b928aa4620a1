"""FAST: the published arithmetic and files, bounds of a round trip, and no action from broken tokens."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import idct

from ipvla.models.action_tokens import ActionTokenError, FastTokensConfig
from ipvla.models.action_tokens.fast import FastSettings, FastTokens
from ipvla.models.action_tokens.protocol import vocabulary_ids
from ipvla.types import NO_TOKEN

GOLDEN = Path(__file__).with_name("golden")
CHUNK, ACTIONS = 8, 7


@pytest.fixture(scope="module")
def fast() -> FastTokens:
    return FastTokens.load(GOLDEN / "fast")


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    return json.loads((GOLDEN / "fast_published" / "ids.json").read_text())


def recorded(name: str) -> dict[str, npt.NDArray[Any]]:
    return dict(np.load(GOLDEN / name / "io.npz"))


def smooth(seed: int, chunk: int = CHUNK, actions: int = ACTIONS, batch: int = 200) -> npt.NDArray[np.float32]:
    """Chunks of low frequencies within [-1, 1], the last dimension a gripper's."""
    rng = np.random.default_rng(seed)
    time = np.linspace(0, 1, chunk)[None, :, None]
    offset, slope, wave = rng.uniform(-0.3, 0.3, (3, batch, 1, actions))
    chunks = offset + slope * time + wave * np.sin(2 * time)
    chunks[..., -1] = np.sign(chunks[..., -1])
    return chunks.astype(np.float32)


def row(tokens: list[int]) -> torch.Tensor:
    return torch.tensor(tokens, dtype=torch.long)[None]


class TestParity:
    def test_tokens_and_decoded_chunks_are_the_public_ones(self, fast: FastTokens) -> None:
        io = recorded("fast")
        tokens = fast.encode(torch.from_numpy(io["chunks"]))
        assert torch.equal(tokens, torch.from_numpy(io["ids"].astype(np.int64))[:, : tokens.shape[1]])
        assert (io["ids"][:, tokens.shape[1] :] == NO_TOKEN).all()
        np.testing.assert_allclose(fast.decode(tokens, CHUNK, ACTIONS), io["decoded"], atol=1e-6)

    def test_a_fit_makes_the_public_vocabulary(self, fast: FastTokens) -> None:
        coefficients = recorded("fast")["train_coefficients"]
        fitted = FastTokens.fit(idct(coefficients / 10, axis=1, norm="ortho"))
        assert json.loads(fitted.bpe.to_str())["model"] == json.loads(fast.bpe.to_str())["model"]
        assert fitted.settings == FastSettings(10, 1024, -28, CHUNK, ACTIONS)
        assert fitted.identity == fast.identity

    def test_a_published_directory_is_read(self, published: dict[str, Any]) -> None:
        fast, io = FastTokensConfig(GOLDEN / "fast_published").build(), recorded("fast_published")
        tokens = fast.encode(torch.from_numpy(io["chunks"]))
        for i, (ids, decodes) in enumerate(zip(published["ids"], published["decode_ok"], strict=True)):
            if decodes:
                ours = tokens[i][tokens[i] != NO_TOKEN]
                assert ours.tolist() == ids
                np.testing.assert_allclose(fast.decode(row(ids), 10, 7)[0], io["decoded"][i], atol=1e-6)
                in_paligemma = vocabulary_ids(ours, published["paligemma_vocab_size"], published["skip"])
                assert in_paligemma.tolist() == published["ids_in_paligemma_vocabulary"][i]

    def test_what_the_public_class_reads_as_zeros_is_refused(self, published: dict[str, Any]) -> None:
        """Too large a coefficient, which the public class drops, stands as the largest that there is."""
        fast, chunks = FastTokensConfig(GOLDEN / "fast_published").build(), recorded("fast_published")["chunks"]
        broken = [i for i, decodes in enumerate(published["decode_ok"]) if not decodes]
        assert broken
        for i in broken:
            with pytest.raises(ActionTokenError, match=r"row 0: its \d+ FAST tokens spell 63 coefficients"):
                fast.decode(row(published["ids"][i]), 10, 7)
            assert fast.decode(fast.encode(torch.from_numpy(chunks[i : i + 1])), 10, 7).shape == (1, 10, 7)
        for ids in published["wrong_length"].values():
            with pytest.raises(ActionTokenError, match="and a chunk has 70"):
                fast.decode(row(ids), 10, 7)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([5.0, 10.0, 30.0]))
def test_a_round_trip_errs_by_half_a_step_in_root_mean_square(seed: int, scale: float) -> None:
    chunks = smooth(seed, batch=20)
    fast = FastTokens.fit(chunks, 400, scale)
    decoded = fast.decode(fast.encode(torch.from_numpy(chunks)), CHUNK, ACTIONS).numpy()
    assert np.sqrt(((decoded - chunks) ** 2).mean(1)).max() <= 0.5 / scale + 1e-6
    assert fast.encode(torch.from_numpy(chunks)).shape[1] < CHUNK * ACTIONS, "it compresses"


def test_rows_do_not_depend_on_their_neighbours(fast: FastTokens) -> None:
    chunks = torch.from_numpy(smooth(1, batch=6))
    together = fast.encode(chunks)
    for i in range(6):
        alone = fast.encode(chunks[i : i + 1])[0]
        assert together[i][together[i] != NO_TOKEN].tolist() == alone.tolist()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 3))
def test_whatever_is_written_under_the_mask_decodes(seed: int, chunk: int, actions: int) -> None:
    fast = FastTokens.load(GOLDEN / "fast_published")
    _written_at_random(fast, seed, chunk, actions)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_and_so_do_coefficients_of_two_bytes(seed: int) -> None:
    wide = FastTokens.fit(smooth(0) * 4, 800, 10)
    assert wide.bytes_per_value == 2
    _written_at_random(wide, seed, 3, 2)


def _written_at_random(fast: FastTokens, seed: int, chunk: int, actions: int) -> None:
    random = torch.Generator().manual_seed(seed)
    tokens = torch.empty(1, 0, dtype=torch.long)
    for _ in range(fast.longest(chunk, actions) + 1):
        legal = fast.legal(tokens, chunk, actions)
        assert legal[0].any(), "it never gets stuck"
        token = torch.multinomial(legal.double(), 1, generator=random)
        if int(token) == fast.vocabulary:
            break
        tokens = torch.cat([tokens, token], 1)
    assert int(token) == fast.vocabulary, "it ends in time"
    assert fast.decode(tokens, chunk, actions).shape == (1, chunk, actions)


def test_encoded_chunks_are_legal_and_so_is_their_end(fast: FastTokens) -> None:
    tokens = fast.encode(torch.from_numpy(smooth(2, batch=10)))
    lengths = (tokens != NO_TOKEN).sum(1)
    for i in range(tokens.shape[1]):
        legal = fast.legal(tokens[:, :i], CHUNK, ACTIONS)
        following = torch.where(lengths == i, fast.vocabulary, tokens[:, i].clamp(min=0))
        assert legal.gather(1, following[:, None])[lengths >= i].all()


def test_a_saved_tokenizer_is_the_same(fast: FastTokens, tmp_path: Path) -> None:
    fast.save(tmp_path)
    for loaded in (FastTokens.load(tmp_path), copy.deepcopy(fast)):
        assert loaded.identity == fast.identity
        chunks = torch.from_numpy(smooth(3))
        assert torch.equal(loaded.encode(chunks), fast.encode(chunks))


class TestBadInput:
    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"head\.tokenizer\.file is not given; fit a tokenizer"):
            FastTokensConfig().build()
        with pytest.raises(ValueError, match=r"no FAST tokenizer in .*processor_config\.json"):
            FastTokensConfig(tmp_path).build()

    def test_a_file_of_another_vocabulary(self, tmp_path: Path) -> None:
        FastTokens.load(GOLDEN / "fast").save(tmp_path)
        other = GOLDEN / "fast_published" / "processor_config.json"
        (tmp_path / "processor_config.json").write_text(other.read_text())
        with pytest.raises(ValueError, match=r"has 1024 tokens, and its processor_config\.json vocab_size 256"):
            FastTokensConfig(tmp_path).build()

    def test_a_chunk_that_it_was_not_fitted_on(self, fast: FastTokens) -> None:
        fast.check(CHUNK, ACTIONS)
        fast.check(CHUNK, None)
        with pytest.raises(ValueError, match=r"fitted on chunks of 8 actions with 7 dimensions.*has 16 actions"):
            fast.check(16, None)
        with pytest.raises(ValueError, match=r"8 actions with 6 dimensions that vary; fit another"):
            fast.check(CHUNK, 6)

    def test_too_small_a_vocabulary(self) -> None:
        with pytest.raises(ValueError, match=r"vocab_size is 16, and the chunks' coefficients take \d+ values"):
            FastTokens.fit(smooth(0), 16)

    def test_tokens_outside(self, fast: FastTokens) -> None:
        with pytest.raises(ActionTokenError, match=r"row 0 has token 1024, and action tokens are 0\.\.1023"):
            fast.decode(row([3, 1024]), CHUNK, ACTIONS)
