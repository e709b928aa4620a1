"""What MLflow's registry knows of a finished policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from mlflow import MlflowClient

from evaluators.success import SuccessConfig
from ipvla.experiment import ExperimentConfig
from ipvla.models.adapters import LoRAConfig
from ipvla.policy import Policy
from ipvla.rollout.policy_actor import PolicySource
from ipvla.tracking import TrackingConfig
from ipvla.training.parallel import World
from ray_jobs.running.policy_run import placed, policy_demand, policy_run, publish, warn_of_waiting

Make = Callable[..., ExperimentConfig]


def published(config: ExperimentConfig) -> str:
    """The policy's hash."""
    directory = config.run_directory
    config.build(World()).policy.save(directory / "policy")
    (directory / "experiment.json").write_text("{}")
    (directory / "adapters").mkdir()
    (directory / "adapters" / "adapter_config.json").write_text("{}")
    sink = policy_run(config, config.study, config.name)
    publish(sink, config, register=True)
    sink.close()
    return PolicySource(Policy.load, directory / "policy").sha256()


@pytest.mark.slow
def test_a_policy_is_registered_with_what_it_came_from(make_experiment: Make) -> None:
    base = make_experiment(name="base")
    tuned = make_experiment(
        name="tuned",
        model=replace(base.model, lora=LoRAConfig(rank=2)),
        start_from=base.run_directory / "policy",
        tracking=TrackingConfig(policy_mib=0, model="robot"),
    )
    hashes = [published(config) for config in (base, tuned)]
    client = MlflowClient(base.mlflow_uri)
    first, second = (client.get_model_version_by_alias(name, "newest") for name in ("recall.base", "robot"))
    assert (first.tags["policy_sha256"], second.tags["policy_sha256"]) == tuple(hashes)
    assert (first.tags.get("base_sha256"), second.tags["base_sha256"]) == (None, hashes[0])
    assert "fingerprint.torch" in first.tags
    for version, artifact in ((first, "policy"), (second, "adapters")):
        assert version.tags["artifact"] == artifact
        assert version.source.endswith(f"/artifacts/{artifact}")
    logged = [{file.path for file in client.list_artifacts(version.run_id)} for version in (first, second)]
    assert logged == [{"experiment.json", "policy"}, {"experiment.json", "adapters"}]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"policy_mib": -1}, "policy_mib is -1"),
        ({"model": "a/b"}, "names without / and :"),
        ({"system_every_s": 0.5}, "at least 2, or 0"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        TrackingConfig(**settings)  # type: ignore[arg-type]


def test_what_a_policys_actors_ask_for() -> None:
    on_gpu = placed(SuccessConfig(policy_replicas=2), True)[1]
    asked = policy_demand(on_gpu)
    assert (asked.what, asked.each, asked.count) == ("2 policy actors", {"CPU": 0.0, "GPU": 1.0}, 2)
    assert policy_demand(SuccessConfig()).each == {"CPU": 0.0, "GPU": 0.0}


def test_a_job_says_at_its_end_what_mlflow_has_not_got(
    make_experiment: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    config = make_experiment()
    warn_of_waiting(config)
    assert caplog.messages == []
    sink = policy_run(config, "study", "gone")
    sink.log({"loss": 1.0}, 1)
    sink.close()
    caplog.clear()
    warn_of_waiting(config)
    (line,) = caplog.messages
    assert line.startswith("MLflow: 3 records wait for http://127.0.0.1:9; once it answers: ipvla mlflow_sync")
    assert str(config.runs) in line
