"""A tokenizer fitted to a dataset: what training normalises, what varies, and how well it comes back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ipvla.experiment import DataConfig
from ipvla.models.action_tokens import FastTokensConfig, RVQTokensConfig
from ipvla.models.action_tokens.fast import FastTokens
from ipvla.models.action_tokens.rvq import RVQTokens
from ray_jobs.command_line.settings import parse
from ray_jobs.fit_tokens import FastFitConfig, FitTokensConfig, RVQFitConfig, fit, main
from tests.synthetic import SIZE


@pytest.fixture
def config(storage_root: Path, tmp_path: Path) -> FitTokensConfig:
    return FitTokensConfig(
        storage_root=storage_root, artifact_dir=tmp_path, data=DataConfig(dataset="cue", image_size=SIZE)
    )


def test_fast_is_fitted_to_what_varies_and_training_can_read_it(config: FitTokensConfig) -> None:
    fitted = fit(config)
    assert (fitted.bins, fitted.rms < 0.05, fitted.tokens < 8) == (8, True, True)
    loaded = FastTokensConfig(config.artifacts / "tokens_fast_cue").build()
    assert isinstance(fitted.tokenizer, FastTokens)
    assert loaded.identity == fitted.tokenizer.identity
    assert (loaded.settings.time_horizon, loaded.settings.action_dim) == (8, 1)


def test_rvq_is_trained_and_training_can_read_it(config: FitTokensConfig) -> None:
    rvq = RVQFitConfig(depth=2, codes=8, code_dim=2, latent=4, channels=4, steps=12, batch=32, lr=1e-2)
    fitted = fit(replace(config, tokenizer=rvq, name="small"))
    loaded = RVQTokensConfig(config.artifacts / "small").build()
    assert isinstance(fitted.tokenizer, RVQTokens)
    assert loaded.settings == fitted.tokenizer.settings
    assert fitted.tokens == 2
    chunk = torch.full((1, 8, 1), 0.5)
    assert torch.equal(loaded.encode(chunk), fitted.tokenizer.encode(chunk))


def test_it_says_what_the_tokenizer_is_worth(config: FitTokensConfig, capsys: pytest.CaptureFixture[str]) -> None:
    main(config)
    told = capsys.readouterr().out
    assert f"--model.head.tokenizer.file {config.directory}" in told
    assert "tokens per chunk" in told


def test_settings_come_from_the_command_line() -> None:
    words = ["--tokenizer.type", "rvq", "--tokenizer.parts", "[[0, 1], [2]]", "--chunk", "16"]
    assert parse(FitTokensConfig, words).tokenizer == RVQFitConfig(parts=[[0, 1], [2]])


class TestBadInput:
    def test_a_chunk_that_rvq_cannot_take(self) -> None:
        with pytest.raises(ValueError, match=r"model\.chunk is 12, and RVQ with 3 levels takes multiples of 8"):
            FitTokensConfig(chunk=12, tokenizer=RVQFitConfig())

    def test_parts_that_the_dataset_lacks(self, config: FitTokensConfig) -> None:
        with pytest.raises(ValueError, match=r"tokenizer\.parts have 2 dimensions, and 1 vary"):
            fit(replace(config, tokenizer=RVQFitConfig(parts=[[0], [1]])))

    def test_one_that_is_there(self, config: FitTokensConfig) -> None:
        config.directory.mkdir(parents=True)
        with pytest.raises(ValueError, match="is there already; give another --name"):
            fit(config)

    @pytest.mark.parametrize("settings", [{"every": 0}, {"chunk": 0}])
    def test_numbers(self, settings: dict[str, int]) -> None:
        with pytest.raises(ValueError, match="must be at least 1"):
            FitTokensConfig(**settings)  # type: ignore[arg-type]

    def test_a_vocabulary_of_one(self) -> None:
        with pytest.raises(ValueError, match="vocab_size 1 at least 2"):
            FastFitConfig(vocab_size=1)
