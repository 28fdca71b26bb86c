"""What is rendered from a plan before anything starts."""

from pathlib import Path
from typing import Any

from epplan.launcher.ranks import machine_environment, rank_environments
from epplan.launcher.request import LaunchRequest
from tests.launch_modules.plans import make_plan


def test_environment_of_every_rank_on_one_machine() -> None:
    shared = {
        "LOCAL_WORLD_SIZE": "3",
        "GROUP_RANK": "0",
        "WORLD_SIZE": "3",
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }
    assert rank_environments([3], master_address="127.0.0.1", master_port=29500) == [
        {"RANK": "0", "LOCAL_RANK": "0", **shared},
        {"RANK": "1", "LOCAL_RANK": "1", **shared},
        {"RANK": "2", "LOCAL_RANK": "2", **shared},
    ]


def test_local_ranks_and_groups_of_several_machines() -> None:
    environments = rank_environments([2, 1], master_address="a", master_port=1)
    names = ("RANK", "GROUP_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
    assert [[environment[name] for name in names] for environment in environments] == [
        ["0", "0", "0", "2", "3"],
        ["1", "0", "1", "2", "3"],
        ["2", "1", "0", "1", "3"],
    ]


def request(hosts: dict[str, list[int]], **fields: Any) -> LaunchRequest:
    return LaunchRequest(plan=make_plan(hosts), plan_path=Path("p"), **fields)


GPU_VARIABLES = {"PYTHONUNBUFFERED": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "NCCL_DEBUG": "WARN"}


def test_local_rank_i_sees_the_gpu_the_plan_gives_it() -> None:
    assert machine_environment({"HOME": "/"}, request({"a": [5, 4, 7]}), num_cpus=8) == {
        "HOME": "/",
        **GPU_VARIABLES,
        "OMP_NUM_THREADS": "2",
        "CUDA_VISIBLE_DEVICES": "5,4,7",
    }


def test_what_the_user_set_is_kept_and_an_outer_agent_is_not() -> None:
    inherited = {
        "OMP_NUM_THREADS": "7",
        "CUDA_VISIBLE_DEVICES": "GPU-1,GPU-2",
        "NCCL_DEBUG": "INFO",
        "PYTHONUNBUFFERED": "",
    }
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "none"}
    assert machine_environment(inherited | agent, request({"a": [0, 1]}), num_cpus=64) == inherited


def test_gpus_of_several_planned_hosts_are_not_selected_on_this_machine() -> None:
    variables = machine_environment({}, request({"a": [0], "b": [0]}), num_cpus=1)
    assert variables == {**GPU_VARIABLES, "OMP_NUM_THREADS": "1"}


def test_ranks_on_cpus_need_no_variables_for_gpus() -> None:
    variables = machine_environment(
        {}, request({"a": [0]}, options=("--backend=gloo",)), num_cpus=4
    )
    assert variables == {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "4"}


def test_variables_the_user_gives_replace_inherited_ones() -> None:
    given = (("NCCL_DEBUG", "TRACE"), ("EMPTY", ""))
    variables = machine_environment(
        {"EMPTY": "no"}, request({"a": [0]}, environment=given), num_cpus=1
    )
    assert (variables["NCCL_DEBUG"], variables["EMPTY"]) == ("TRACE", "")


def test_request_names_plan_ranks_and_hosts() -> None:
    plan = make_plan({"a": [0, 3], "b": [1]})
    request = LaunchRequest(plan=plan, plan_path=Path("--json"), options=("--steps=1",))
    title = f"plan --json ({plan.sha256()[:12]}): 3 ranks on 2 hosts a, b"
    assert request.title() == title
    assert request.place(1) == "host a, GPU 3"
    assert request.worker_arguments() == ["--steps=1", str(Path.cwd() / "--json")]


def test_request_shortens_many_hosts() -> None:
    plan = make_plan({f"n{number}": [0] for number in range(5)})
    title = LaunchRequest(plan=plan, plan_path=Path("p")).title()
    assert title.endswith("5 ranks on 5 hosts n0 ... n4")
