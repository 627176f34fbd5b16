"""Two hosts on one machine, to run what a cluster runs: `python tools/two_nodes.py COMMAND ...` (root, Linux).

Each host is a network namespace with an address of its own; nothing but the wire between them connects them. COMMAND is
started by torchrun on both; kill one, or stop both and give the command again with one, to see what a run survives.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAMES = ("phi-host-a", "phi-host-b")
ADDRESSES = ("10.213.7.1", "10.213.7.2")
WIRE = "phiwire"
_PORT = 29517


@contextmanager
def two_hosts() -> Iterator[None]:
    """Both namespaces, joined; removed at the end. Raises CalledProcessError where the system does not let us."""
    _remove()
    try:
        for name in NAMES:
            _ip("netns", "add", name)
        _ip("link", "add", f"{WIRE}0", "type", "veth", "peer", "name", f"{WIRE}1")
        for n, (name, address) in enumerate(zip(NAMES, ADDRESSES, strict=True)):
            _ip("link", "set", f"{WIRE}{n}", "netns", name)
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", f"{WIRE}{n}")
            _ip("-n", name, "link", "set", f"{WIRE}{n}", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        _remove()


def start(host: int, command: list[str], elastic: bool = False, **options: object) -> "subprocess.Popen[str]":
    """The command by torchrun on a host, in a session of its own. elastic: it goes on with the hosts that are left."""
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    if elastic:
        meet = ["--nnodes", "1:2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:{_PORT}"]
        meet += ["--rdzv-id", "phi", "--max-restarts", "3", "--rdzv-conf", f"is_host={1 - host},last_call_timeout=5"]
    else:
        meet = ["--nnodes", "2", "--node-rank", str(host), "--master-addr", ADDRESSES[0], "--master-port", str(_PORT)]
    meet += ["--local-addr", ADDRESSES[host], "--nproc-per-node", "1"]  # hosts have no names here
    inside = ["ip", "netns", "exec", NAMES[host], torchrun, *meet, "--no-python"]
    network = {"GLOO_SOCKET_IFNAME": f"{WIRE}{host}", "TP_SOCKET_IFNAME": f"{WIRE}{host}", "OMP_NUM_THREADS": "1"}
    network["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # or a restart may hang (torch 2.13)
    process: subprocess.Popen[str] = subprocess.Popen(
        [*inside, *command],
        env=os.environ | network | {"OMP_WAIT_POLICY": "PASSIVE"},
        start_new_session=True,
        text=True,
        **options,  # type: ignore[call-overload]
    )
    return process


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def _remove() -> None:
    for name in NAMES:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
    subprocess.run(["ip", "link", "del", f"{WIRE}0"], capture_output=True)


def main() -> None:
    """Run a command on both hosts and leave with the first one's code."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    with two_hosts():
        processes = [start(host, sys.argv[1:]) for host in (0, 1)]
        codes = [p.wait() for p in processes]
    sys.exit(codes[0] or codes[1])


if __name__ == "__main__":
    main()
