"""The choice of the EP group against trying every group, and a bound that holds for all of them."""

import re
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epplan.errors import InfeasibleError, InputError
from epplan.planner.groups.choice_bound import choice_bound
from epplan.planner.groups.group import choose_groups, group_size
from epplan.planner.groups.pool import make_pool
from epplan.planner.groups.sharing import share_links, sharing_in_words, solve_groups
from epplan.planner.problem import make_problem
from epplan.planner.solve import solve_placement
from epplan.planner.traffic import Floats, make_traffic
from epplan.topologies.cluster_file import read_cluster_file
from epplan.topologies.graph import Cluster, Gpu
from epplan.topologies.routes import find_routes
from epplan.topologies.sources import load_cluster
from tests.tiny import brute_force, random_counts, tiny_cluster, tiny_model, tiny_traffic

NVLINK_DOMAINS = "4x2:gb200,nic=2x400Gb/s,domain=2,leafs=2"
CLUSTERS: dict[str, Cluster] = {
    "two hosts": tiny_cluster((3, 3)),
    "hosts of one GPU": tiny_cluster((1,) * 6, leafs=3),
    "shared NIC, slow network": tiny_cluster((3, 2, 2), nic_rate="25Gb/s"),
    "a NIC a GPU, slow network": tiny_cluster((2, 2, 2), nics=2, nic_rate="25Gb/s"),
    "two leafs, thin uplink": tiny_cluster((2, 1, 1, 2), leafs=2, nic_rate="800Gb/s"),
    "mixed GPUs": tiny_cluster((2, 2, 2), models=("h100-sxm", "l40s", "h20")),
    "degraded NVLink": tiny_cluster((2, 2), links=1),
    "PCIe only": tiny_cluster((4, 2), models=("l40s",), nics=2),
    "NVLink domains of two hosts": load_cluster(NVLINK_DOMAINS),
    "rails": load_cluster("3x2:h100,nic=2x100Gb/s,rails=2,over=4"),
}
SOME_SLOW = [
    pytest.param(name, marks=pytest.mark.slow) if number % 2 else name
    for number, name in enumerate(CLUSTERS)
]


def best_of_all_groups(
    cluster: Cluster, counts: Floats, experts_per_gpu: int, ffn: int
) -> dict[tuple[str, ...], float]:
    """Return the least cost of every group of as many GPUs as counts has ranks."""
    layers, size, experts = counts.shape
    model, traffic = tiny_model(experts, layers=layers, ffn=ffn), tiny_traffic(counts)
    costs = {}
    for gpus in combinations(cluster.gpus(), size):
        problem = make_problem(cluster, gpus, model, traffic, experts_per_gpu)
        costs[tuple(gpu.id for gpu in gpus)] = sum(brute_force(problem, x) for x in range(layers))
    return costs


@settings(max_examples=15, deadline=None)
@given(
    name=st.sampled_from(sorted(CLUSTERS)),
    seed=st.integers(0, 10_000),
    shape=st.sampled_from([(1, 2, 2, 1), (1, 3, 3, 1), (2, 2, 3, 2), (1, 3, 4, 2), (1, 4, 4, 1)]),
    skew=st.sampled_from([0.0, 0.3, 1.5]),
    ffn=st.sampled_from([64, 4096]),
)
def test_no_group_and_no_placement_goes_below_the_bound(
    name: str, seed: int, shape: tuple[int, int, int, int], skew: float, ffn: int
) -> None:
    layers, size, experts, experts_per_gpu = shape
    counts = random_counts(seed, layers, size, experts, skew)
    best = min(best_of_all_groups(CLUSTERS[name], counts, experts_per_gpu, ffn).values())
    model = tiny_model(experts, layers=layers, ffn=ffn)
    bound = choice_bound(make_pool(CLUSTERS[name]), model, counts, experts_per_gpu)
    assert 0 < bound <= best * (1 + 1e-9)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    hosts=st.sampled_from(
        [
            "2x15:h100,nic=15x100Gb/s+2x18:h100,nic=2x25Gb/s",
            "3x8:h100,nic=4x100Gb/s+2x8:h20,nic=8x25Gb/s,leafs=2,over=4",
            "6x4:h100,nic=1x100Gb/s,leafs=3,over=8",
            "4x4:h100,nic=4x100Gb/s+2x16:h200,nic=16x100Gb/s,rails=4,over=2",
        ]
    ),
    experts_per_gpu=st.integers(1, 2),
    skew=st.sampled_from([0.1, 0.5, 1.5]),
)
def test_the_bound_stays_below_any_plan_of_larger_groups(
    seed: int, hosts: str, experts_per_gpu: int, skew: float
) -> None:
    """Where not all can be tried: windows and steps of sizes play no part in tiny clusters."""
    cluster, size = load_cluster(hosts), 17
    counts = random_counts(seed, 1, size, size, skew) / 10
    model, gpus = tiny_model(size), cluster.gpus()
    bound = choice_bound(make_pool(cluster), model, counts, experts_per_gpu)
    assert bound > 0
    random = np.random.default_rng(seed)
    for chosen in (range(size), range(len(gpus) - size, len(gpus)), random.permutation(len(gpus))):
        group = tuple(gpus[number] for number in sorted(chosen[:size]))
        problem = make_problem(cluster, group, model, tiny_traffic(counts), experts_per_gpu)
        solution = solve_placement(
            problem, gap=1, time_limit_s=60, seed=0, progress=lambda line: None
        )
        assert bound <= solution.objective_s * (1 + 1e-9)


def test_the_bound_sees_regions_between_two_steps_of_sizes() -> None:
    """15 ranks fit a fast host exactly; hosts of 16 are slow; sizes 15 and 16 are one step."""
    cluster = load_cluster("2x15:h100,nic=15x400Gb/s+1x16:h100,nic=1x25Gb/s")
    counts = np.zeros((1, 17, 17))
    counts[0, [0, 14], 0] = 10_000  # expert 0 is asked for by the first and last rank beside it,
    counts[0, [0, 16], 1:] = 200  # all others by a rank on either host
    model, group = tiny_model(17), tuple(cluster.gpus()[:17])
    problem = make_problem(cluster, group, model, tiny_traffic(counts), 1)
    solution = solve_placement(problem, gap=1, time_limit_s=60, seed=0, progress=lambda line: None)
    bound = choice_bound(make_pool(cluster), model, counts, 1)
    assert bound <= solution.objective_s * (1 + 1e-9)


@pytest.mark.parametrize("name", SOME_SLOW)
def test_the_best_of_all_groups_is_found_where_few_can_be_tried(name: str) -> None:
    for seed, size, skew in ((0, 3, 0.3), (1, 4, 1.5)):
        counts = random_counts(seed, 1, size, size, skew)
        costs = best_of_all_groups(CLUSTERS[name], counts, 1, 64)
        groups = choose_groups(CLUSTERS[name], tiny_model(size), tiny_traffic(counts), 1)
        chosen = costs[tuple(gpu.id for gpu in groups.gpus[0])]
        assert chosen <= min(costs.values()) * 1.1
        assert (groups.bound_s is None) == (len(costs) == 1)
        assert (groups.bound_s or 0) <= min(costs.values()) * (1 + 1e-9)


@pytest.mark.parametrize("name", CLUSTERS)
def test_routes_of_a_group_are_those_of_all_gpus_with_the_others_silent(name: str) -> None:
    """What price and bound rest on."""
    cluster = CLUSTERS[name]
    everyone = find_routes(cluster)
    number = {gpu: place for place, gpu in enumerate(everyone.gpus)}
    random = np.random.default_rng(0)
    for _ in range(5):
        size = int(random.integers(2, len(number)))
        members = sorted(random.permutation(len(number))[:size].tolist())
        alone = find_routes(cluster, [everyone.gpus[member] for member in members])
        traffic = random.random((size, size))
        among_all = np.zeros((len(number), len(number)))
        among_all[np.ix_(members, members)] = traffic
        expected = {
            resource.name: amount
            for resource, amount in zip(
                everyone.resources, everyone.bytes_per_resource(among_all), strict=True
            )
            if amount > 1e-9
        }
        found = {
            resource.name: amount
            for resource, amount in zip(
                alone.resources, alone.bytes_per_resource(traffic), strict=True
            )
            if amount > 1e-9
        }
        assert found == pytest.approx(expected)


def choose(source: str, size: int, num_groups: int = 1) -> list[dict[str, int]]:
    """Return how many GPUs of which host are in every group; sources skewed, an expert a GPU."""
    model = tiny_model(size, top_k=min(8, size))
    traffic = make_traffic("lognormal:1,0.5", model, size, None, 0)
    groups = choose_groups(load_cluster(source), model, traffic, 1, num_groups=num_groups)
    return [dict(Counter(gpu.host for gpu in group)) for group in groups.gpus]


def test_gpus_that_share_a_nic_are_spread() -> None:
    assert choose("4x4:h100,nic=1x400Gb/s", 4) == [dict.fromkeys(["host1"], 4)]  # NVLink alone
    spread = choose("4x4:h100,nic=1x400Gb/s", 8)
    assert spread == [dict.fromkeys(["host1", "host2", "host3", "host4"], 2)]


def test_thin_uplinks_are_spread_too() -> None:
    source = "8x4:h100,nic=4x400Gb/s,leafs=4,over=8:1"
    (group,) = choose(source, 8)
    assert sorted(group.values()) == [4, 4]  # two hosts of one leaf need no uplink
    assert {(int(host[4:]) - 1) // 2 for host in group} == {0}
    (group,) = choose(source, 16)
    leafs = Counter(
        (int(host[4:]) - 1) // 2 for host, number in group.items() for _ in range(number)
    )
    assert set(leafs.values()) == {4}


def test_slow_hosts_are_left_out() -> None:
    """Between fast hosts, in the order of the cluster: an L40S host, and one of half the NICs."""
    source = "1x4:l40s,nic=4x400Gb/s+1x4:h100,nic=4x400Gb/s+1x4:h100,nic=2x400Gb/s"
    source += "+1x4:h100,nic=4x400Gb/s"
    assert choose(source, 8) == [{"host2": 4, "host4": 4}]


def test_an_nvlink_domain_is_taken_whole() -> None:
    source = "2x4:h100,nic=4x400Gb/s,domain=2+2x4:h100,nic=4x400Gb/s"
    assert choose(source, 8) == [{"host1": 4, "host2": 4}]


def test_the_same_groups_every_time() -> None:
    source = "3x4:h100,nic=2x400Gb/s+3x4:h200,nic=4x400Gb/s,leafs=3,over=2"
    assert choose(source, 8) == choose(source, 8)


def test_hosts_without_a_path_are_left_out() -> None:
    """Two of four hosts hang on a leaf of their own, without a spine: a group is on either side."""
    document = {
        "schema_version": 1,
        "name": "split",
        "host_types": {"t": {"gpu": "h100-sxm", "gpus": 2, "nic": "connectx-7", "nics": 2}},
        "hosts": [
            {"names": "a", "type": "t", "leafs": ["leaf1"]},
            {"names": "b[1-2]", "type": "t", "leafs": ["leaf2"]},
        ],
        "switches": [{"names": "leaf[1-2]"}],
    }
    cluster = read_cluster_file(document, "split").build("")
    model = tiny_model(4)
    traffic = make_traffic("uniform", model, 4, None, 0)
    groups = choose_groups(cluster, model, traffic, 1)
    assert [gpu.host for gpu in groups.gpus[0]] == ["b1", "b1", "b2", "b2"]


def test_gpus_without_room_are_left_out() -> None:
    cluster = tiny_cluster((2, 2), models=("l40s", "h200-sxm"), nics=2)
    model = tiny_model(2, layers=2, ffn=5_000_000)  # 31 GB an expert: one and four on a GPU
    traffic = make_traffic("uniform", model, 2, 1, 0)
    groups = choose_groups(cluster, model, traffic, 1)
    assert [gpu.host for gpu in groups.gpus[0]] == ["h1", "h1"]


def test_all_gpus_is_no_choice() -> None:
    model = tiny_model(16)
    cluster = load_cluster("dgx-h100-2")
    assert group_size(cluster, model, None, 1) == 16
    groups = choose_groups(cluster, model, make_traffic("uniform", model, 16, None, 0), 1)
    assert groups.gpus == (tuple(cluster.gpus()),)
    assert (groups.reason, groups.bound_s) == ("EP=16: all GPUs of the cluster", None)


def test_the_reason_says_what_was_taken_and_gained() -> None:
    model = tiny_model(8, top_k=8)
    traffic = make_traffic("uniform", model, 8, None, 0)
    groups = choose_groups(load_cluster("4x4:h100,nic=1x400Gb/s"), model, traffic, 1)
    assert re.fullmatch(
        r"EP=8: 8 of 16 GPUs, 2 on each of 4 of 4 hosts \(cluster order\), for .* a step under "
        r"even traffic, 1\.\d\dx faster than the first GPUs in cluster order",
        groups.reason,
    )


def all_partitions(gpus: list[Gpu], size: int) -> list[tuple[tuple[Gpu, ...], tuple[Gpu, ...]]]:
    """Return every two groups of that size."""
    return [
        (first, second)
        for first in combinations(gpus, size)
        for second in combinations([gpu for gpu in gpus if gpu not in first], size)
        if gpus.index(first[0]) < gpus.index(second[0])
    ]


@pytest.mark.parametrize("name", SOME_SLOW)
def test_two_groups_are_the_best_two_where_few_can_be_tried(name: str) -> None:
    cluster, counts = CLUSTERS[name], random_counts(1, 1, 2, 2, 0.5)
    model, traffic = tiny_model(2), tiny_traffic(counts)

    def slowest(groups: tuple[tuple[Gpu, ...], ...]) -> float:
        problems = [make_problem(cluster, gpus, model, traffic, 1) for gpus in groups]
        return max(brute_force(problem) for problem in share_links(problems))

    best = min(map(slowest, all_partitions(cluster.gpus(), 2)))
    groups = choose_groups(cluster, model, traffic, 1, num_groups=2)
    assert len({gpu.id for group in groups.gpus for gpu in group}) == 4
    assert slowest(groups.gpus) <= best * 1.1
    assert groups.bound_s is not None
    assert groups.bound_s <= best * (1 + 1e-9)


def test_groups_stay_under_their_leafs_and_leave_slow_hosts_out() -> None:
    source = "2x4:h100,nic=4x400Gb/s+1x4:l40s,nic=4x400Gb/s+3x4:h100,nic=4x400Gb/s"
    first, second = choose(f"{source},leafs=2,over=4:1", 8, num_groups=2)
    assert first == {"host1": 4, "host2": 4}  # host3, with slow GPUs, shares their leaf
    assert len(second) == 2
    assert second.keys() < {"host4", "host5", "host6"}


def test_shared_links_are_divided_among_the_groups_that_use_them() -> None:
    """Two groups over both leafs share the uplinks; NICs and NVLink are each group's own."""
    cluster = load_cluster("4x2:h100,nic=2x400Gb/s,leafs=2,over=2:1")
    model = tiny_model(4)
    traffic = make_traffic("uniform", model, 4, None, 0)
    gpus = cluster.gpus()  # hosts 1 and 2 under leaf 1, 3 and 4 under leaf 2
    groups = (tuple(gpus[0:2] + gpus[4:6]), tuple(gpus[2:4] + gpus[6:8]))
    alone = [make_problem(cluster, group, model, traffic, 1) for group in groups]
    for before, after in zip(alone, share_links(alone), strict=True):
        for resource, whole, share in zip(
            before.routes.resources, before.routes.capacity, after.routes.capacity, strict=True
        ):
            assert share == whole / (2 if "spine1" in (resource.tail, resource.head) else 1)
    assert sharing_in_words(alone) == [
        "all 2 groups have the same traffic at the same time",
        "each group has an equal share of the 4 links that several groups use",
    ]
    assert sharing_in_words(alone[:1]) == []
    apart = [make_problem(cluster, tuple(part), model, traffic, 1) for part in (gpus[:4], gpus[4:])]
    assert sharing_in_words(apart)[1] == "no link is used by more than one group"


def test_equal_groups_are_solved_once_and_named_apart() -> None:
    cluster = load_cluster("4x4:h100,nic=4x400Gb/s")
    model = tiny_model(8, top_k=2)
    traffic = make_traffic("lognormal:1,1", model, 8, None, 0)
    groups = choose_groups(cluster, model, traffic, 1, num_groups=2)
    problems = share_links([make_problem(cluster, x, model, traffic, 1) for x in groups.gpus])
    first, second = solve_groups(
        problems, gap=0.01, time_limit_s=30, seed=0, progress=lambda line: None
    )
    assert (first.layers[0].shares == second.layers[0].shares).all()
    assert first.objective_s == pytest.approx(second.objective_s)
    names = [solution.layers[0].evaluation.worst.dispatch.worst for solution in (first, second)]
    assert "host1" in names[0] or "host2" in names[0]
    assert "host3" in names[1] or "host4" in names[1]


def test_fewer_slots_than_experts() -> None:
    with pytest.raises(InfeasibleError) as caught:
        group_size(load_cluster("dgx-h100-2"), tiny_model(32), None, 1)
    assert str(caught.value) == (
        "32 experts a layer do not fit on 16 GPUs with at most 1 expert of a layer on a GPU: "
        "16 slots\n"
        "remedies:\n"
        "  1. allow --experts-per-gpu 2\n"
        "  2. use 32 GPUs or more (16 are there)\n"
        "  3. plan for 16 experts or fewer (--experts)"
    )


def test_more_ranks_than_gpus() -> None:
    with pytest.raises(InputError, match="EP=17 needs 17 GPUs, dgx-h100-2 has 16"):
        group_size(load_cluster("dgx-h100-2"), tiny_model(16), 17, 1)
    with pytest.raises(InputError, match="3 groups of EP=8 need 24 GPUs, dgx-h100-2 has 16"):
        group_size(load_cluster("dgx-h100-2"), tiny_model(8), 8, 1, num_groups=3)
