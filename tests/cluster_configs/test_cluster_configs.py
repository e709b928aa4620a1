"""Every cluster configuration against what would read it: Ray, KubeRay, Kubernetes, a shell."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from ipvla.storage import SOURCE_TREE
from tests.ray_jobs.head import posted, ray_head

CONFIGS = SOURCE_TREE / "cluster_configs"
RAY_UP = ("local", "workstation_8gpu", "on_premises", "aws", "gcp")
CLOUDS = ("aws", "gcp")
SCHEMA = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())

#: Fields of KubeRay's ray.io/v1 (its API reference, 1.4).
CLUSTER = {
    *("authOptions", "suspend", "managedBy", "autoscalerOptions", "headServiceAnnotations", "rayVersion"),
    *("enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec", "workerGroupSpecs"),
}
HEAD = {"template", "headService", "enableIngress", "resources", "labels", "rayStartParams", "serviceType"}
WORKERS = {
    *("suspend", "groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds", "resources"),
    *("labels", "rayStartParams", "template", "scaleStrategy", "numOfHosts"),
}
AUTOSCALER = {
    *("resources", "image", "imagePullPolicy", "securityContext", "idleTimeoutSeconds", "upscalingMode"),
    *("version", "env", "envFrom", "volumeMounts"),
}
JOB = {
    *("activeDeadlineSeconds", "waitingTTLSeconds", "backoffLimit", "rayClusterSpec", "submitterPodTemplate"),
    *("metadata", "clusterSelector", "submitterConfig", "managedBy", "deletionStrategy", "entrypoint"),
    *("runtimeEnvYAML", "jobId", "submissionMode", "entrypointResources", "entrypointNumCpus"),
    *("entrypointNumGpus", "ttlSecondsAfterFinished", "shutdownAfterJobFinishes", "suspend"),
}


def load(name: str) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    return read


def unknown_fields(resource: dict[str, Any]) -> Iterator[str]:
    """Of a RayCluster or RayJob, whatever KubeRay and Kubernetes would not know, or not take."""
    spec = resource["spec"]
    if resource["kind"] == "RayJob":
        yield from _beyond("RayJob", spec, JOB)
        spec = spec["rayClusterSpec"]
    yield from _beyond("RayCluster", spec, CLUSTER)
    yield from _beyond("autoscalerOptions", spec.get("autoscalerOptions", {}), AUTOSCALER)
    yield from _beyond("headGroupSpec", spec["headGroupSpec"], HEAD)
    groups = spec["workerGroupSpecs"]
    for group in groups:
        yield from _beyond(f"worker group {group['groupName']}", group, WORKERS)
    templates = [group["template"] for group in (spec["headGroupSpec"], *groups)]
    if submitter := resource["spec"].get("submitterPodTemplate"):
        templates.append(submitter)
    for template in templates:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **template}
        try:
            kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"pod: {error.message}"


def _beyond(what: str, given: dict[str, Any], known: set[str]) -> Iterator[str]:
    yield from (f"{what}: {name}" for name in given.keys() - known)


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_takes_it(name: str) -> None:
    config = load(name)
    jsonschema.validate(config, SCHEMA)
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    assert prepared["head_node_type"] in prepared["available_node_types"]


@pytest.mark.parametrize("name", RAY_UP)
def test_a_key_that_is_misspelt_is_found(name: str) -> None:
    config = load(name) | {"max_wrokers": 3}
    with pytest.raises(jsonschema.ValidationError, match="max_wrokers"):
        jsonschema.validate(config, SCHEMA)


@pytest.mark.parametrize("name", CLOUDS)
def test_simulators_come_and_go_on_spot_machines_without_a_gpu(name: str) -> None:
    nodes = load(name)["available_node_types"]
    assert set(nodes) == {"head", "gpu", "simulators"}
    assert nodes["simulators"]["min_workers"] == 0
    assert "spot" in json.dumps(nodes["simulators"]["node_config"]).lower()
    assert "spot" not in json.dumps(nodes["gpu"]["node_config"]).lower()
    assert sum(node.get("max_workers", 0) for node in nodes.values()) == load(name)["max_workers"]


@pytest.mark.parametrize("name", ["kuberay_cluster", "kuberay_job"])
def test_kuberay_takes_it(name: str) -> None:
    resource = load(name)
    assert resource["apiVersion"] == "ray.io/v1"
    assert list(unknown_fields(resource)) == []
    spec = resource["spec"]
    cluster = spec if resource["kind"] == "RayCluster" else spec["rayClusterSpec"]
    assert cluster["rayVersion"] == ray.__version__
    scaled = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "ipvla", "namespace": "default"}, "spec": cluster}
    )
    jsonschema.validate(scaled, SCHEMA)
    types = scaled["available_node_types"]
    assert types["gpu"]["resources"]["GPU"] == 1
    assert "GPU" not in types.get("simulators", {}).get("resources", {})
    assert types["headgroup"]["resources"]["CPU"] == 2, "the driver's: no simulator gets in its way"


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ((), "RayCluster: enableAutoscaling"),
        (("headGroupSpec",), "headGroupSpec: enableAutoscaling"),
        (("workerGroupSpecs", 0), "worker group gpu: enableAutoscaling"),
        (("headGroupSpec", "template", "spec"), "pod: "),
        (("headGroupSpec", "template", "spec", "containers", 0, "resources"), "pod: "),
    ],
)
def test_a_field_that_is_misspelt_is_found(path: tuple[str | int, ...], found: str) -> None:
    resource = load("kuberay_cluster")
    place = resource["spec"]
    for step in path:
        place = place[step]
    place["enableAutoscaling"] = True
    assert any(one.startswith(found) for one in unknown_fields(resource))


def test_a_job_on_kubernetes_is_one_of_ours() -> None:
    from ray_jobs.submit import SubmitConfig

    words = load("kuberay_job")["spec"]["entrypoint"].split()
    assert words[:2] == ["python", "-m"]
    job = (words[2].removeprefix("ray_jobs."), *words[3:])
    assert SubmitConfig(job=job).entrypoint == " ".join(words), "with settings that it takes"


def test_the_pod_that_submits_a_job_on_kubernetes_sees_what_it_ships() -> None:
    spec = load("kuberay_job")["spec"]
    shipped = yaml.safe_load(spec["runtimeEnvYAML"])
    pod = spec["submitterPodTemplate"]["spec"]
    (container,) = pod["containers"]
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert "command" not in container, "KubeRay gives its own only where there is none"
    assert container["image"] == head["image"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volume = next(name for path, name in mounts.items() if Path(shipped["working_dir"]).is_relative_to(path))
    assert {volume} <= {one["name"] for one in pod["volumes"]}
    assert pod["restartPolicy"] == "Never"
    assert {".git", ".venv"} <= set(shipped["excludes"])


@pytest.mark.parametrize("name", CLOUDS)
def test_jobs_log_to_the_server_that_the_head_starts(name: str) -> None:
    config = load(name)
    (server,) = [command for command in config["head_start_ray_commands"] if "mlflow server" in command]
    port = server.split("--port ")[1].split()[0]
    starts = [config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]]
    for start in starts:
        assert "MLFLOW_TRACKING_URI=http://" in start.partition("ray start")[0]
        assert f":{port} " in start.partition("ray start")[0]


@pytest.mark.parametrize("name", RAY_UP)
def test_nobody_commands_it_without_its_token(name: str) -> None:
    config = load(name)
    commands = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    starts = [command for command in commands if "ray start" in command]
    assert starts
    assert all("RAY_AUTH_MODE=token ray start" in command for command in starts)
    assert not any("--dashboard-host=0.0.0.0" in command for command in starts) or name == "on_premises"
    if config["worker_start_ray_commands"]:
        assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}


def test_nobody_commands_a_cluster_on_kubernetes_or_slurm_without_its_token() -> None:
    assert load("kuberay_cluster")["spec"]["authOptions"] == {"mode": "token"}
    assert load("kuberay_job")["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    script = (CONFIGS / "slurm.sbatch").read_text()
    assert script.index("export RAY_AUTH_MODE=token RAY_AUTH_TOKEN") < script.index("--head --node-ip-address")
    assert "0.0.0.0" not in script


@pytest.mark.slow
def test_a_job_without_the_token_is_refused() -> None:
    with ray_head(token="secret" * 8) as address:
        assert posted(address, None) == 401
        assert posted(address, "guess" * 8) in (401, 403)
        assert posted(address, "secret" * 8) == 200


def test_the_image_has_what_the_jobs_need() -> None:
    subprocess.run([_tool("hadolint"), CONFIGS / "Dockerfile"], check=True)
    text = (CONFIGS / "Dockerfile").read_text()
    for needed in ("requirements.txt", "requirements-libero.txt", "requirements-cluster.txt", "libosmesa6"):
        assert needed in text


def test_slurms_script_is_sound() -> None:
    subprocess.run([_tool("shellcheck"), CONFIGS / "slurm.sbatch"], check=True)


def test_images_and_versions_agree() -> None:
    pinned = next(line for line in (SOURCE_TREE / "requirements.txt").read_text().splitlines() if "ray[" in line)
    assert pinned.endswith(f"=={ray.__version__}")
    images = {
        line.split("image:")[1].split("#")[0].strip().rpartition("/")[2]
        for path in CONFIGS.glob("*.yaml")
        for line in path.read_text().splitlines()
        if " image:" in line
    }
    assert images == {"ipvla:0.1.0"}


def _tool(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    assert found, f"{name} is in requirements-dev.txt"
    return found
