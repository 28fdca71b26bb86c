"""Fabrics as ibnetdiscover writes them, for hosts of tests/nvml_replies.py."""

from collections.abc import Iterator


def guid(host: int, nic: int) -> str:
    """Return a port's GUID as `nvml_replies.hgx` gives it."""
    return f"b8cef603{host:04x}000{nic}"


def ibnetdiscover(cables: dict[tuple[int, int], int], *, spine: bool = True) -> str:
    """Return the text of a fabric.

    Args:
        cables: leaf number by host and NIC.
        spine: whether leafs are joined.
    """
    return "\n".join(_lines(cables, spine)) + "\n"


def rails(hosts: int, nics: int = 8) -> dict[tuple[int, int], int]:
    """Return cables: NIC i of every host on leaf i."""
    return {(host, nic): nic for host in range(hosts) for nic in range(nics)}


def _lines(cables: dict[tuple[int, int], int], spine: bool) -> Iterator[str]:
    leafs = sorted(set(cables.values()))
    yield "# Topology file: generated on Mon Jan  1 00:00:00 2026"
    for leaf in leafs:
        name = _switch(leaf)
        yield f"\nvendid=0x2c9\ndevid=0xd2f2\nswitchguid=0x{name}({name})"
        yield f'Switch\t65 "S-{name}"\t# "MF0;leaf{leaf}:MQM9700/U1" enhanced port 0 lid 7 lmc 0'
        below = [end for end, other in cables.items() if other == leaf]
        for port, (host, nic) in enumerate(below, 1):
            own = guid(host, nic)
            yield f'[{port}]\t"H-{own}"[1]({own})\t# "n{host} mlx5_{nic}" lid 21 4xNDR'
        if spine:
            yield f'[64]\t"S-{_switch(99)}"[{leaf + 1}]\t# "MF0;spine0:MQM9700/U1" lid 3 4xNDR'
    if spine:
        name = _switch(99)
        yield f"\nvendid=0x2c9\ndevid=0xd2f2\nswitchguid=0x{name}({name})"
        yield f'Switch\t65 "S-{name}"\t# "MF0;spine0:MQM9700/U1" enhanced port 0 lid 3 lmc 0'
        for leaf in leafs:
            there = f'"S-{_switch(leaf)}"[64]'
            yield f'[{leaf + 1}]\t{there}\t# "MF0;leaf{leaf}:MQM9700/U1" lid 7 4xNDR'
    for (host, nic), leaf in cables.items():
        own = guid(host, nic)
        port = [end for end, other in cables.items() if other == leaf].index((host, nic)) + 1
        yield f"\nvendid=0x2c9\ndevid=0x1021\ncaguid=0x{own}"
        yield f'Ca\t1 "H-{own}"\t# "n{host} mlx5_{nic}"'
        there = f'"S-{_switch(leaf)}"[{port}]'
        yield f'[1]({own})\t{there}\t# lid 21 lmc 0 "MF0;leaf{leaf}:MQM9700/U1" lid 7 4xNDR'


def _switch(number: int) -> str:
    return f"b8ce00000000{number:04x}"
