"""Two hosts on one machine, to run what a cluster runs: `python tools/two_nodes.py [--ssh] COMMAND ...` (root, Linux).

Each host is a network namespace with an address of its own; nothing but the wire between them connects them. COMMAND is
started by torchrun on both, or with --ssh by DeepSpeed's launcher on the first, which reaches both by ssh and pdsh.
Kill one, or stop both and give the command again with one, to see what a run survives.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
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
    process: subprocess.Popen[str] = subprocess.Popen(
        [*inside, *command],
        env=os.environ | _environment(host),
        start_new_session=True,
        text=True,
        **options,  # type: ignore[call-overload]
    )
    return process


@contextmanager
def ssh_servers(folder: Path) -> Iterator[dict[str, str]]:
    """A server for ssh on each of the two hosts, with keys of its own in `folder`; what PATH is to say to reach them.

    What a host's login has in its environment, each server gives to who comes: its network, one thread.
    """
    folder.chmod(0o700)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "ssh").write_text(
        f"#!/bin/sh\nexec {shutil.which('ssh')} -i {folder}/user -o StrictHostKeyChecking=no -o LogLevel=ERROR "
        f'-o UserKnownHostsFile={folder}/known -o IdentitiesOnly=yes "$@"\n'
    )
    (folder / "ssh").chmod(0o700)
    Path("/run/sshd").mkdir(exist_ok=True)
    servers = []
    for host, name in enumerate(NAMES):
        given = " ".join(f"{key}={value}" for key, value in _environment(host).items())
        options = [f"HostKey={folder}/host", f"AuthorizedKeysFile={folder}/user.pub", "StrictModes=no", "UsePAM=no"]
        options += ["PermitRootLogin=yes", f"PidFile={folder}/{name}.pid", f"SetEnv={given}"]
        sshd = [shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin") or "sshd", "-D", "-f", "/dev/null"]
        inside = ["ip", "netns", "exec", name, *sshd, *(part for option in options for part in ("-o", option))]
        servers.append(subprocess.Popen(inside, stdin=subprocess.DEVNULL))
    try:
        path = {"PATH": f"{folder}:{os.environ['PATH']}", "PDSH_RCMD_TYPE": "ssh"}
        for address in ADDRESSES:
            reach = ["ip", "netns", "exec", NAMES[0], "ssh", address, "true"]
            end = time.monotonic() + 10
            while subprocess.run(reach, env=os.environ | path, stdin=subprocess.DEVNULL).returncode:
                if time.monotonic() > end:
                    raise TimeoutError(f"no ssh to {address}")
                time.sleep(0.2)
        yield path
    finally:
        for server in servers:
            server.kill()
            server.wait()


def start_by_ssh(folder: Path, path: dict[str, str], command: list[str], **options: object) -> "subprocess.Popen[str]":
    """The command by DeepSpeed's launcher on the first host, which starts it on both."""
    (folder / "hosts").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--no_local_rank", "--hostfile", f"{folder}/hosts"]
    process: subprocess.Popen[str] = subprocess.Popen(
        ["ip", "netns", "exec", NAMES[0], *launcher, "--master_addr", ADDRESSES[0], *command],
        env=os.environ | path | {"DS_ACCELERATOR": "cpu"},
        start_new_session=True,
        text=True,
        **options,  # type: ignore[call-overload]
    )
    return process


def _environment(host: int) -> dict[str, str]:
    network = {"GLOO_SOCKET_IFNAME": f"{WIRE}{host}", "TP_SOCKET_IFNAME": f"{WIRE}{host}", "OMP_NUM_THREADS": "1"}
    network["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # or a restart may hang (torch 2.13)
    return network | {"OMP_WAIT_POLICY": "PASSIVE"}


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
        if sys.argv[1] == "--ssh":
            with tempfile.TemporaryDirectory() as folder, ssh_servers(Path(folder)) as path:
                sys.exit(start_by_ssh(Path(folder), path, sys.argv[2:]).wait())
        processes = [start(host, sys.argv[1:]) for host in (0, 1)]
        codes = [p.wait() for p in processes]
    sys.exit(codes[0] or codes[1])


if __name__ == "__main__":
    main()
