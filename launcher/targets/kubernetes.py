"""Kubernetes: a JobSet with one pod per host, or the same as a Kubeflow TrainJob.

Pods of one replicated job are alike, and the plan's hosts are not: every host is a replicated job
of its own, whose pod may run on that node alone. Files come as a ConfigMap. A pod's host name is
made of the job's, so that the identity check takes the node's name, which Kubernetes tells it.

A TrainJob runs a TrainingRuntime; no built-in one can tell nodes apart, and so the runtime is part
of the manifest. It names no `mlPolicy`: Kubeflow's would number the nodes itself.
"""

from pathlib import Path
from typing import Any

import yaml

from epplan.errors import InputError
from epplan.launcher.identity import HOST_VARIABLE
from epplan.launcher.job import Command, File, Job, JobHost, Rendering
from epplan.launcher.quoting import check_label
from epplan.launcher.scripts import host_script, host_script_name

FOLDER = Path("/epplan")  # in the container, read-only
# A pod's name is NAME-host-NUMBER-0-0-SUFFIX, and may have 63 characters.
MAX_NAME = 40
MAX_CONFIG_MAP = 1 << 20  # bytes, a limit of Kubernetes
_CONTAINER = "node"  # Kubeflow's name for the one that trains
_Object = dict[str, Any]


class _Dumper(yaml.SafeDumper):
    """Writes files as they are, line by line: a person has to be able to read what will run."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def master_address(name: str) -> str:
    """Return the DNS name of the pod that runs rank 0, in a job of this name."""
    return f"{name}-host-0-0-0.{name}"


def render_jobset(job: Job) -> Rendering:
    """Return the manifest of a ConfigMap and a JobSet."""
    job_set = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": job.name},
        "spec": _job_set_spec(job),
    }
    return _manifest(job, "jobset.yaml", "Runs the plan as a JobSet.", [job_set])


def render_trainjob(job: Job) -> Rendering:
    """Return the manifest of a ConfigMap, a TrainingRuntime and a TrainJob."""
    api = "trainer.kubeflow.org/v1alpha1"
    runtime = {
        "apiVersion": api,
        "kind": "TrainingRuntime",
        "metadata": {
            "name": job.name,
            "labels": {"trainer.kubeflow.org/framework": "torch"},
        },
        "spec": {"template": {"spec": _job_set_spec(job)}},
    }
    train_job = {
        "apiVersion": api,
        "kind": "TrainJob",
        "metadata": {"name": job.name},
        "spec": {
            "runtimeRef": {
                "apiGroup": "trainer.kubeflow.org",
                "kind": "TrainingRuntime",
                "name": job.name,
            }
        },
    }
    return _manifest(job, "trainjob.yaml", "Runs the plan as a TrainJob.", [runtime, train_job])


def _manifest(job: Job, name: str, what: str, objects: list[_Object]) -> Rendering:
    check_label(job.name, MAX_NAME)
    if job.image is None:
        raise InputError(
            "Kubernetes runs containers, and no image is given",
            hints=["give one that has epplan and torch with --image"],
        )
    text = job.head(what)
    for document in (_config_map(job), *objects):
        text += "---\n" + yaml.dump(document, Dumper=_Dumper, sort_keys=False)
    command = ("kubectl", "apply", "-f", str(job.output / name))
    return Rendering(files=(File(name=name, text=text),), commands=(Command(arguments=command),))


def _config_map(job: Job) -> _Object:
    data = {file.name: file.text for file in (*job.files, *_scripts(job))}
    size = sum(len(name) + len(text.encode()) for name, text in data.items())
    if size > MAX_CONFIG_MAP:
        raise InputError(
            f"plan and scripts have {size} bytes; a Kubernetes ConfigMap holds {MAX_CONFIG_MAP}",
            hints=["start torchrun's scripts (--to torchrun) from a volume that the pods share"],
        )
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{job.name}-files"},
        "data": data,
    }


def _scripts(job: Job) -> list[File]:
    # Not torchrun's restarts: a JobSet's, which come also when a pod or its node is lost.
    return [host_script(job, host, max_restarts=0) for host in job.hosts]


def _job_set_spec(job: Job) -> _Object:
    return {
        # Pods meet before they are ready, by names that do not depend on nodes.
        "network": {
            "enableDNSHostnames": True,
            "publishNotReadyAddresses": True,
            "subdomain": job.name,
        },
        "failurePolicy": {"maxRestarts": job.max_restarts},
        "replicatedJobs": [
            {
                "name": f"host-{host.index}",
                "replicas": 1,
                "template": {
                    "spec": {
                        "parallelism": 1,
                        "completions": 1,
                        "completionMode": "Indexed",
                        "backoffLimit": 0,
                        "template": {"spec": _pod(job, host)},
                    }
                },
            }
            for host in job.hosts
        ],
    }


def _pod(job: Job, host: JobHost) -> _Object:
    by_name = {"key": "metadata.name", "operator": "In", "values": [host.name]}
    return {
        "restartPolicy": "Never",
        "affinity": {
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {
                    "nodeSelectorTerms": [{"matchFields": [by_name]}]
                }
            }
        },
        "containers": [_container(job, host)],
        "volumes": [
            {"name": "files", "configMap": {"name": f"{job.name}-files"}},
            # A container's own /dev/shm has 64 MiB; NCCL and gloo need more.
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }


def _container(job: Job, host: JobHost) -> _Object:
    container: _Object = {
        "name": _CONTAINER,
        "image": job.image,
        "command": ["bash", job.path(host_script_name(host))],
        "env": [{"name": HOST_VARIABLE, "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}],
        "ports": [{"containerPort": job.master_port}],
        "volumeMounts": [
            {"name": "files", "mountPath": str(job.folder), "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    if job.request.uses_gpus:
        container["resources"] = {"limits": {"nvidia.com/gpu": host.num_gpus}}
        # RDMA registers memory, which is locked then.
        container["securityContext"] = {"capabilities": {"add": ["IPC_LOCK"]}}
    return container
