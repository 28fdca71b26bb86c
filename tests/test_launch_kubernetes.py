"""Manifests against the published schemas, and what is in them."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from epplan.errors import InputError
from epplan.planner.plan import Plan
from tests.launch_modules.jobs import files_of, make_rendering
from tests.launch_modules.plans import uneven_plan


def manifest(target: str, plan: Plan | None = None, **fields: Any) -> list[dict[str, Any]]:
    [file] = make_rendering(plan or uneven_plan(), target, **fields).files
    return list(yaml.safe_load_all(file.text))


def unknown_fields(given_value: Any, known: Any, path: str = "") -> Iterator[str]:
    """Yield what a published schema did not take: its models drop fields they do not have."""
    if isinstance(given_value, dict):
        for key, value in given_value.items():
            if not isinstance(known, dict) or key not in known:
                yield f"{path}.{key}"
            else:
                yield from unknown_fields(value, known[key], f"{path}.{key}")
    elif isinstance(given_value, list):
        for index, value in enumerate(given_value):
            yield from unknown_fields(value, known[index], f"{path}[{index}]")


def check_schema(model: Any, document: dict[str, Any]) -> None:
    read = model.from_dict(document)
    assert list(unknown_fields(document, read.to_dict())) == []


def test_the_job_set_is_one_by_the_published_schema() -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models")
    config_map, job_set = manifest("kubernetes")
    assert config_map["kind"] == "ConfigMap"
    check_schema(models.JobsetV1alpha2JobSet, job_set)
    wrong = {**job_set, "spec": {**job_set["spec"], "replicas": 1}}
    with pytest.raises(AssertionError):  # or the check could not fail
        check_schema(models.JobsetV1alpha2JobSet, wrong)


def test_the_train_job_is_one_by_the_published_schema() -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models")
    _, runtime, train_job = manifest("kubeflow")
    check_schema(models.TrainerV1alpha1TrainingRuntime, runtime)
    check_schema(models.TrainerV1alpha1TrainJob, train_job)
    assert train_job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    [_, job_set] = manifest("kubernetes")
    assert runtime["spec"]["template"]["spec"] == job_set["spec"]


def test_every_pod_is_on_its_planned_node_with_its_gpus() -> None:
    _, job_set = manifest("kubernetes")
    pods = [
        job["template"]["spec"]["template"]["spec"] for job in job_set["spec"]["replicatedJobs"]
    ]
    affinity = [
        pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        for pod in pods
    ]
    assert [x["nodeSelectorTerms"][0]["matchFields"][0]["values"] for x in affinity] == [
        ["node10"],
        ["node2"],
    ]
    gpus = [pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] for pod in pods]
    assert gpus == [3, 4]  # GPU 3 of node2 is among four


def test_the_config_map_holds_the_plan_and_what_the_pods_run() -> None:
    config_map, job_set = manifest("kubernetes", name="my-job")
    data = config_map["data"]
    assert json.loads(data["plan.json"])["sha256"] == uneven_plan().sha256()
    commands = [
        job["template"]["spec"]["template"]["spec"]["containers"][0]["command"]
        for job in job_set["spec"]["replicatedJobs"]
    ]
    assert commands == [["bash", "/epplan/host-0.sh"], ["bash", "/epplan/host-1.sh"]]
    assert {"host-0.sh", "host-1.sh"} < data.keys()
    assert "--master-addr=my-job-host-0-0-0.my-job" in data["host-1.sh"]
    assert "--result" not in data["host-0.sh"]


def test_ranks_on_cpus_ask_for_no_gpus() -> None:
    _, job_set = manifest("kubernetes", options=["--backend=gloo"])
    assert "nvidia" not in json.dumps(job_set)
    batch = files_of(uneven_plan(), "slurm", options=["--backend=gloo"])["job.sbatch"].text
    assert "gpu" not in batch


def test_what_kubernetes_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no image is given"):
        make_rendering(uneven_plan(), "kubernetes", image=None)
    monkeypatch.setattr("epplan.launcher.targets.kubernetes.MAX_CONFIG_MAP", 1000)
    with pytest.raises(InputError, match=r"plan and scripts have \d+ bytes"):
        make_rendering(uneven_plan(), "kubeflow")
