"""Hosts as network namespaces, switches as bridges, cables as veth pairs with a token bucket.

    host namespace            namespace of the network
    eth0 (tbf, out) ========= a (tbf, in) - bridge leaf1 - up (tbf) ===== leaf1 (tbf) - bridge spine

Both ends of a pair shape what they send, so that each direction of a cable has a rate of its own.

What the links carry shall set the time, not the habits of TCP in long queues:
- Nothing is ever dropped, as on networks with credits (InfiniBand): queues take more than all
  connections may have under way, and no timer or probe sends a frame again that waits in one.
- No sender waits for receipts, which would queue behind the data of the other direction: windows
  hold a whole message from the start. With windows of 128 kB links loaded in both directions lost
  up to 15 %.
- Connections of a host take turns frame by frame. With the kernel's default a whole message goes
  into the queue at once, so that links far away run dry: up to 20 % lost where all are loaded.
"""

import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import FrameType

from .fabric import Fabric

NETWORK = "net"  # the namespace with all switches
INTERFACE = "eth0"
MTU = 9000  # jumbo frames: 0.8 % of the rate goes into headers
BURST_BYTES = 4 * MTU  # at 100 Mb/s a link may be 3 ms late or ahead, no more
QUEUE_BYTES = 64 * 2**20
WINDOW_BYTES = 8 * 2**20
# Reno, allowed everywhere, never slows down without a loss; the default may pace at its own rate.
_SETTINGS = {
    "net.ipv4.tcp_congestion_control": "reno",
    "net.ipv4.tcp_rmem": f"4096 {WINDOW_BYTES} {WINDOW_BYTES}",
    "net.ipv4.tcp_wmem": f"4096 {WINDOW_BYTES} {WINDOW_BYTES}",
    "net.ipv4.tcp_limit_output_bytes": f"{2 * MTU}",
    "net.ipv4.tcp_early_retrans": "0",
    "net.ipv4.tcp_slow_start_after_idle": "0",
    "net.ipv4.tcp_no_metrics_save": "1",
    "net.ipv6.conf.all.disable_ipv6": "1",
    "net.ipv6.conf.default.disable_ipv6": "1",
}
_ROUTE = f"rto_min 30s initcwnd {WINDOW_BYTES // 2 // MTU} initrwnd {WINDOW_BYTES // 2 // MTU}"
_PREFIX = "epplan-test"
_CLONE_NEWUTS, _CLONE_NEWNET = 0x04000000, 0x40000000
_NAMESPACES = Path("/run/netns")
_numbers = count()  # of the clusters this process has made
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Emulation:
    """A running emulated cluster; small enough to be sent to every rank."""

    prefix: str
    hosts: tuple[str, ...]
    host_of_rank: tuple[str, ...]

    def address(self, host: str) -> str:
        """Return the IP address of a host."""
        return f"10.77.0.{self.hosts.index(host) + 1}"

    def namespace(self, host: str) -> str:
        """Return the name of a host's network namespace."""
        return f"{self.prefix}-{host}"


def why_not() -> str | None:
    """Return why this machine cannot emulate a cluster, or None."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"needs {' and '.join(missing)} (package iproute2)"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    probe = f"{_PREFIX}{os.getpid()}-probe"
    try:
        _run("ip", "netns", "add", probe)
        _batch("ip", probe, ["link add x type veth peer name y"])
        _batch("tc", probe, ["qdisc add dev x root tbf rate 100mbit burst 32kb limit 1mb"])
    except CommandError as error:
        return f"this kernel cannot shape links between namespaces: {error}"
    finally:
        _delete([probe])
    return None


class CommandError(Exception):
    """`ip` or `tc` failed."""


@contextmanager
def emulate(fabric: Fabric) -> Iterator[Emulation]:
    """Build the fabric, and take it away again however the block ends."""
    prefix = f"{_PREFIX}{os.getpid()}-{next(_numbers)}"
    hosts = tuple(host.name for host in fabric.hosts)
    emulation = Emulation(prefix=prefix, hosts=hosts, host_of_rank=tuple(fabric.host_of_rank))
    names = [emulation.namespace(name) for name in (NETWORK, *hosts)]
    _delete(left_over())
    terminated = signal.signal(signal.SIGTERM, _interrupt)
    try:
        for name in names:
            _run("ip", "netns", "add", name)
            _settle(name)
        _add_switches(fabric, emulation)
        for host in fabric.hosts:
            _add_host(emulation, host.name, host.leaf, host.mbit_per_s)
        yield emulation
    finally:
        _delete(names)
        signal.signal(signal.SIGTERM, terminated)


def cut_cable(emulation: Emulation, host: str) -> None:
    """Let nothing through between a host and its switch any more, without telling either end.

    The switch forgets the port; the host's own end stays up.
    """
    _batch("ip", emulation.namespace(NETWORK), [f"link set to-{host} nomaster"])


def _interrupt(signum: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(signum).name)


def enter(emulation: Emulation, host: str) -> None:
    """Move this process, which must have one thread, onto a host: its network and its name."""
    with (_NAMESPACES / emulation.namespace(host)).open() as namespace:
        _check(_libc.setns(namespace.fileno(), _CLONE_NEWNET), "setns")
    _check(_libc.unshare(_CLONE_NEWUTS), "unshare")
    socket.sethostname(host)
    os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def _settle(namespace: str) -> None:
    settings = [f"{name}={value}" for name, value in _SETTINGS.items()]
    _run("ip", "netns", "exec", namespace, "sysctl", "-q", "-w", *settings)


def _add_switches(fabric: Fabric, emulation: Emulation) -> None:
    network = emulation.namespace(NETWORK)
    switches = [*fabric.leafs, *(["spine"] if fabric.uplinks else [])]
    _batch(
        "ip",
        network,
        [
            line
            for name in switches
            for line in (f"link add br-{name} type bridge", f"link set br-{name} up")
        ],
    )
    for leaf, rate in fabric.uplinks.items():
        _batch("ip", network, [f"link add up-{leaf} type veth peer name down-{leaf}"])
        _attach(network, f"up-{leaf}", f"br-{leaf}", rate)
        _attach(network, f"down-{leaf}", "br-spine", rate)


def _add_host(emulation: Emulation, host: str, leaf: str, rate: int) -> None:
    network, own = emulation.namespace(NETWORK), emulation.namespace(host)
    _batch("ip", network, [f"link add to-{host} type veth peer name {INTERFACE} netns {own}"])
    _attach(network, f"to-{host}", f"br-{leaf}", rate)
    _batch(
        "ip",
        own,
        [
            f"link set {INTERFACE} mtu {MTU} gso_max_segs 1",
            f"address add {emulation.address(host)}/24 dev {INTERFACE}",
            f"link set {INTERFACE} up",
            "link set lo up",
            f"route change 10.77.0.0/24 dev {INTERFACE} src {emulation.address(host)} {_ROUTE}",
        ],
    )
    _shape(own, INTERFACE, rate)


def _attach(namespace: str, port: str, bridge: str, rate: int) -> None:
    """Put one end of a cable into a switch."""
    _batch("ip", namespace, [f"link set {port} mtu {MTU} master {bridge} up"])
    _shape(namespace, port, rate)


def _shape(namespace: str, device: str, rate: int) -> None:
    bucket = f"tbf rate {rate}mbit burst {BURST_BYTES} limit {QUEUE_BYTES}"
    _batch("tc", namespace, [f"qdisc add dev {device} root {bucket}"])


def namespaces(process: int) -> list[str]:
    """Return the namespaces that a process has made."""
    found = _NAMESPACES.iterdir() if _NAMESPACES.is_dir() else ()
    return [entry.name for entry in found if entry.name.startswith(f"{_PREFIX}{process}-")]


def left_over() -> list[str]:
    """Return the namespaces of processes that were killed."""
    found = [entry.name for entry in _NAMESPACES.iterdir()] if _NAMESPACES.is_dir() else []
    owners = {name: re.match(rf"{_PREFIX}(\d+)-", name) for name in found}
    return [
        name for name, owner in owners.items() if owner and not Path(f"/proc/{owner[1]}").exists()
    ]


def _delete(names: Sequence[str]) -> None:
    for name in names:
        if (_NAMESPACES / name).exists():
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _batch(tool: str, namespace: str, lines: Sequence[str]) -> None:
    _run(tool, "-n", namespace, "-batch", "-", stdin="\n".join(lines))


def _run(*command: str, stdin: str = "") -> None:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CommandError(f"{' '.join(command)}: {done.stderr.strip()}\n{stdin}".strip())
