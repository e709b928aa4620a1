import json
import math

import numpy as np
import pytest

from evaluators.forgetting import SequenceRun, joined_sequences, sequence_figures

CHANCE = {"ground_red": 1 / 3, "recall": 1 / 3, "place": 0.0}
R = np.array([[0.8, 0.2, 0.1], [0.6, 0.9, 0.3], [0.7, 0.5, 1.0]])
CURVES = np.array([[0.2, 0.8], [0.5, 0.9], [0.5, 1.0]])


def runs(*seeds: int) -> dict[str, dict[int, SequenceRun]]:
    return {
        "lora": {seed: SequenceRun(R - 0.01 * seed, CURVES - 0.01 * seed) for seed in seeds},
        "ours": {seed: SequenceRun(np.tile(R.max(0), (3, 1)), CURVES) for seed in seeds},
    }


def test_every_measure_has_a_value_and_an_interval_over_seeds() -> None:
    told = sequence_figures(CHANCE, runs(0, 1, 2), draws=200)
    lora, ours = (told["methods"][name]["measures"] for name in ("lora", "ours"))
    assert set(lora) == {"bwt", "forgetting", "fwt", "libero_fwt", "libero_nbt", "libero_auc"}
    assert lora["bwt"]["value"] == pytest.approx(((0.7 - 0.8) + (0.5 - 0.9)) / 2)
    assert lora["fwt"]["value"] == pytest.approx((0.2 + 0.3) / 2 - 0.01 - 1 / 6, abs=1e-6)
    assert lora["fwt"]["low"] < lora["fwt"]["value"] < lora["fwt"]["high"]
    assert ours["forgetting"]["value"] == ours["bwt"]["value"] == 0


def test_what_was_not_measured_is_null_and_without_curves_a_task_is_evaluated_once_at_its_end() -> None:
    scores = R.copy()
    scores[0, 2] = math.nan
    told = sequence_figures(CHANCE, {"lora": {4: SequenceRun(scores)}}, draws=20)
    told = json.loads(json.dumps(told, allow_nan=False))
    assert told["methods"]["lora"]["seeds"]["4"] == {"scores": [[0.8, 0.2, None], *R[1:].tolist()], "curves": None}
    nbt = ((0.8 - 0.6) + (0.8 - 0.7)) / 2, 0.9 - 0.5
    assert told["methods"]["lora"]["measures"]["libero_nbt"]["value"] == pytest.approx(np.mean(nbt))
    assert told["methods"]["lora"]["measures"]["bwt"]["low"] is None


def test_joined_sessions_give_the_figures_of_one_session_with_all_their_seeds() -> None:
    earlier, later = (sequence_figures(CHANCE, runs(*seeds), draws=50) for seeds in ((0, 1), (1, 2)))
    assert joined_sequences(earlier, later, draws=50) == sequence_figures(CHANCE, runs(0, 1, 2), draws=50)


def test_sequences_that_do_not_fit_are_refused() -> None:
    told = sequence_figures(CHANCE, runs(0), draws=20)
    with pytest.raises(ValueError, match="only sequences of the same tasks"):
        joined_sequences(told, {**told, "tasks": {"place": 0.0}})
    some = {"lora": {0: SequenceRun(R, CURVES), 1: SequenceRun(R)}}
    with pytest.raises(ValueError, match=r"curves of \[2, 1\] evaluations; make it as many in all"):
        sequence_figures(CHANCE, some)
    with pytest.raises(ValueError, match="one value for each of the 2 tasks"):
        sequence_figures(CHANCE, {"lora": {0: SequenceRun(R[:2, :2])}})
