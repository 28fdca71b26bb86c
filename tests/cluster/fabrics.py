"""The fabrics of the proof: 16 ranks in 2 to 4 hosts, even and not.

Rates are low enough that the shaped links set the time and not the two CPU cores the test machine
has: 50 MB/s in all, where loopback carries 100 times that.
"""

from .fabric import EmulatedHost, Fabric


def _host(name: str, ranks: int, mbit_per_s: int, leaf: str = "leaf1") -> EmulatedHost:
    return EmulatedHost(name=name, ranks=ranks, mbit_per_s=mbit_per_s, leaf=leaf)


UNEVEN = Fabric(
    name="uneven",
    description="4 hosts; b has a quarter of the others' rate, c and d share 50 Mb/s uplinks",
    hosts=(
        _host("a", 4, 100),
        _host("b", 4, 25),
        _host("c", 4, 100, "leaf2"),
        _host("d", 4, 100, "leaf2"),
    ),
    uplinks={"leaf1": 200, "leaf2": 50},
)

FABRICS = (
    UNEVEN,
    Fabric(
        name="slow-host",
        description="4 hosts on one leaf; d has a quarter of the others' rate",
        hosts=(_host("a", 4, 100), _host("b", 4, 100), _host("c", 4, 100), _host("d", 4, 25)),
        uplinks={},
    ),
    Fabric(
        name="shared-uplink",
        description="4 equal hosts; c and d share 50 Mb/s uplinks",
        hosts=(
            _host("a", 4, 100),
            _host("b", 4, 100),
            _host("c", 4, 100, "leaf2"),
            _host("d", 4, 100, "leaf2"),
        ),
        uplinks={"leaf1": 200, "leaf2": 50},
    ),
    Fabric(
        name="three-hosts",
        description="hosts of 8, 4 and 4 ranks with 100, 50 and 50 Mb/s",
        hosts=(_host("a", 8, 100), _host("b", 4, 50), _host("c", 4, 50)),
        uplinks={},
    ),
    Fabric(
        name="even",
        description="4 equal hosts on one leaf",
        hosts=tuple(_host(name, 4, 100) for name in "abcd"),
        uplinks={},
    ),
    Fabric(
        name="two-hosts",
        description="2 equal hosts of 8 ranks",
        hosts=(_host("a", 8, 100), _host("b", 8, 100)),
        uplinks={},
    ),
)
