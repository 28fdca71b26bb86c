"""Hostile input: only InputError comes out of a reader, soon, whatever goes in."""

import contextlib
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epplan.errors import InputError
from epplan.topologies.graph import Nic
from epplan.topologies.routes import find_routes
from epplan.topologies.show import summary
from epplan.topologies.sources import MAX_BYTES, load_cluster, parse_cluster
from epplan.topologies.synthetic import Group, Synthetic, is_synthetic, parse_synthetic

DATA = Path(__file__).parent / "data"
CLUSTER_FILE = """
schema_version: 1
name: two
host_types:
  hgx: {gpu: h100-sxm, gpus: 2, numa_nodes: 2, nic: connectx-7, nics: 2}
hosts:
  - {names: "a[1-2]", type: hgx, leafs: [leaf1]}
switches: [{names: leaf1}]
"""
SEEDS = [
    *((DATA / name).read_text() for name in ("nccl-2gpu.xml", "smi-hgx.txt", "hwloc-2gpu.xml")),
    (DATA / "ib-rails.txt").read_text(),
    "CA 1 1 0x7cfe90 4x EDR - SW 2 10 0x7cfe91 ( 'n1 HCA-1' - 'leaf' )\n",
    'CA: n1 HCA-1:\n 0x1 4 1[ ] ==( 4X 25.78125 Gbps Active/ LinkUp)==> 2 17[ ] "x;y:z" ( )\n',
    'Switch 8 "S1"\n[1] "H1"[1]\n\nHca 2 "H1"\n[1] "S1"[1]\n',
    "VM_hostname a\n0ff08c4321664e96\n",
    "SwitchName=s Switches=leaf\nSwitchName=leaf Nodes=n[1-4]\n",
    "BlockName=b1 Nodes=n[1-4]\nBlockSizes=4\n",
    '- topology: t\n  tree: {switches: [{switch: s, nodes: "n[1-4]"}]}\n',
    "- topology: t\n  torus3d: {toruses: [{name: t, dims: {x: 1, y: 1, z: 1}, nodes: n}]}\n",
    'switches: {spine: {switches: [leaf]}}\nblocks: [{switch: leaf, nodes: ["n[1-2]"]}]\n',
    '{"Instances": [{"InstanceId": "i", "NetworkNodes": ["a", "b", "c"]}]}',
    '[{"name": "v", "resourceStatus": {"physicalHostTopology": {"block": "b"}}}]',
    '[{"displayName": "h", "rdmaTopologyData": {"customerLocalBlock": "l"}}]',
    '[{"nodes": [{"compounded_nodes": [{"id": "n", "name": "m"}]}], "links": []}]',
    '{"kind": "Node", "metadata": {"name": "n", "labels": {"nvidia.com/gpu.clique": "1"}}}',
    "a: 5e797fc6-0f46-421a-8724-0e102c0f723c\n",
    CLUSTER_FILE,
]


def swallow(data: bytes, gpu: str | None = None) -> None:
    with contextlib.suppress(InputError):
        summary(parse_cluster(data, "test", gpu))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_seeds_are_valid(seed: str) -> None:
    parse_cluster(seed.encode(), "test")


@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    swallow(data)


@given(st.text(max_size=300))
def test_any_text(text: str) -> None:
    swallow(text.encode("utf-8", "surrogatepass"))


KEYS = [
    "hosts",
    "host_types",
    "kind",
    "items",
    "metadata",
    "name",
    "labels",
    "topology",
    "tree",
    "block",
    "flat",
    "switches",
    "blocks",
    "nodes",
    "links",
    "Instances",
    "NetworkNodes",
    "InstanceId",
    "resourceStatus",
    "physicalHostTopology",
    "id",
    "rdmaTopologyData",
    "customerLocalBlock",
    "compounded_nodes",
    "annotations",
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(JSON)
def test_any_document(document: object) -> None:
    swallow(json.dumps(document).encode())


@settings(max_examples=400)
@given(st.data())
def test_mutated_valid_files(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from(SEEDS))
    pieces = st.text(max_size=4) | st.sampled_from(
        [
            "-1",
            "0",
            "99999999999999999999",
            "1e999",
            "nan",
            "[",
            "]",
            '"',
            "<",
            "&",
            ":",
            "\n",
            "\u00b2",
        ]
    )
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.integers(0, 12)))
        text = text[:start] + data.draw(pieces) + text[end:]
    swallow(text.encode("utf-8", "surrogatepass"), data.draw(st.sampled_from([None, "h100-sxm"])))


NESTED = "is nested deeper than 100"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><system><cpu/></system>',
            "test declares a DOCTYPE or entities; no topology needs them",
        ),
        ('<!DOCTYPE topology SYSTEM "file:///etc/passwd"><topology/>', "declares a DOCTYPE"),
        ('<!DOCTYPE topology SYSTEM "hwloc2.dtd" [<!ENTITY a "b">]><topology/>', "declares"),
        ("<a>" * 200 + "</a>" * 200, NESTED),
        ("<graphs version='1'><graph/></graphs>", "test is a NCCL graph"),
        ("<topology><x/></topology>", "is XML, but no NCCL topology"),
        ("[" * 100_000, NESTED),
        ('{"a":' * 100_000, NESTED),
        ("- " * 100_000, NESTED),
        ("a: &a [*a]", "a YAML alias contains itself"),
        (
            "a0: &a0 [x, x, x, x, x, x, x, x]\n"
            + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]\n" for n in range(1, 9)),
            "its YAML aliases expand to over 1000000 values",
        ),
        ("a: !!python/object:os.system x", "has the YAML tag"),
        ("a: 0x_", "is not valid YAML"),
        ("a: 2001-99-99", "is not valid YAML: month must be in 1..12"),
        ("x: " + "y" * (5 * 2**20), "YAML is read up to"),
        ("[" + "9" * 5000 + "]", "is not valid YAML"),
        ("GIF89a\0", "test is not text: byte 6 is NUL"),
    ],
)
def test_bombs_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        parse_cluster(text.encode(), "test")


def test_no_text_is_refused() -> None:
    with pytest.raises(InputError, match="test is not text: byte 1 is not UTF-8"):
        parse_cluster(b"a\xff", "test")


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    file = tmp_path / "huge"
    with file.open("wb") as sparse:
        sparse.truncate(2**30)
    with pytest.raises(InputError, match="is larger than 64 MiB: no topology is"):
        load_cluster(str(file))
    assert MAX_BYTES == 64 * 2**20


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        load_cluster(str(tmp_path))
    with pytest.raises(InputError, match="unknown topology"):
        load_cluster("x" * 5000)


# --- clusters in a line -------------------------------------------------------------------------


@st.composite
def lines(draw: st.DrawFn) -> Synthetic:
    counts = st.integers(1, 8)
    groups = tuple(
        Group(
            hosts=draw(counts),
            gpus=draw(counts),
            model=draw(st.sampled_from(["h100-sxm", "a100-sxm-80gb", "b200"])),
            nics=draw(counts),
            rate=draw(st.sampled_from(["400Gb/s", "25GB/s", "3.2Tb/s"])),
            numa=draw(counts),
            links=draw(st.none() | st.integers(1, 12)),
        )
        for _ in range(draw(st.integers(1, 3)))
    )
    hosts = sum(group.hosts for group in groups)
    leafs = draw(st.integers(1, hosts))
    rails = draw(st.integers(0, max(group.nics for group in groups))) if leafs == 1 else 0
    domain = draw(st.sampled_from([n for n in range(1, hosts + 1) if hosts % n == 0]))
    over = draw(st.sampled_from([1.0, 2.0, 1.5]))
    return Synthetic(groups=groups, domain=domain, leafs=leafs, rails=rails, over=over)


@settings(max_examples=50, deadline=None)
@given(lines())
def test_a_line_round_trips(spec: Synthetic) -> None:
    line = str(spec)
    assert is_synthetic(line)
    assert parse_synthetic(line) == spec
    cluster = load_cluster(line)
    counts = summary(cluster)["counts"]
    assert cluster.name == line
    assert counts["hosts"] == sum(group.hosts for group in spec.groups)
    assert counts["gpus"] == sum(group.hosts * group.gpus for group in spec.groups)
    assert counts["nics"] == sum(group.hosts * group.nics for group in spec.groups)
    number = spec.rails or spec.leafs
    assert counts["switches"] == number + (number > 1)


def test_a_domain_over_hosts_and_oversubscription() -> None:
    cluster = load_cluster("4x4:gb200,nic=4x400Gb/s,domain=2,leafs=2,over=2:1")
    assert cluster.graph.has_edge("host2/gpu0", "domain1")
    assert cluster.link("leaf1", "spine1").rated_bytes_per_s == 8 * 50e9 / 2
    assert cluster.graph.has_edge(cluster.nodes(Nic)[0].id, "leaf1")
    find_routes(cluster)


def test_short_names_and_mixed_hosts() -> None:
    cluster = load_cluster("1x8:h100,nic=8x400Gb/s+1x8:h200,nic=8x400Gb/s,rails=8")
    assert [gpu.profile.name for gpu in cluster.gpus() if gpu.profile][7:9] == [
        "h100-sxm",
        "h200-sxm",
    ]
    assert "h100 is taken as h100-sxm" in cluster.assumed
    assert cluster.graph.has_edge("host2/nic3", "leaf4")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2x8:h100,foo=3", "unknown option 'foo'"),
        ("2x8:h101", "unknown GPU model: h101"),
        ("0x8:h100", "0 hosts of 8 GPUs; both are at least 1"),
        ("2x8:h100,nic=8x400", "'400' is no bandwidth: write 400Gb/s (bits)"),
        ("2x8:h100,nic=8x0Gb/s", "is no bandwidth above zero"),
        ("2x8:h100,nic=8x400Gb/s,nic=8x400Gb/s", "nic is given twice"),
        ("3x8:h100,domain=2", "3 hosts do not fill domains of 2"),
        ("2x8:mi300x,domain=2", "mi300x has no NVSwitches for domains of 2"),
        ("2x8:h100,leafs=3", "3 leafs for 2 hosts"),
        ("2x8:h100,rails=2", "2 rails, and no host has that many NICs"),
        ("2x8:h100,nic=2x1Gb/s,leafs=2,rails=2", "leafs and rails exclude each other"),
        ("2x8:h100,links=19", "links=19 is no number from 0 to 18"),
        ("2x8:h100,over=0.5", "over=0.5 is no ratio from 1"),
        ("99999x256:h100", "25599744 GPUs; 16384 are the most"),
        ("2x8:h100+", "'' is no HOSTSxGPUS:MODEL[,option...]"),
    ],
)
def test_bad_lines(line: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        load_cluster(line)


@given(st.from_regex(r"[0-9]{1,3}x[0-9]{1,3}:[a-z0-9,=+:x./-]{0,30}", fullmatch=True))
@settings(deadline=None)
def test_any_line(line: str) -> None:
    with contextlib.suppress(InputError):
        parse_synthetic(line)
