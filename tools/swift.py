"""Run a command where Swift 6 is: `python tools/swift.py swift test`. Linux, with the environment's own Python.

Where Swift 6 is not installed, root gets a Debian 13 of its own in the cache folder (debootstrap, 2 minutes, 2.6 GB,
once), and the command runs in there with the repository mounted at /mnt/repo. Others get exit code 3 and a line that
says so. llama.cpp's libraries are those of the installed llama-cpp-python, its headers those of the very same source
package: other packages install headers of the same name beside them.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from phi_bench.peers.llama_tools import PACKAGE, sources
from phi_runtime.backends.waiting import LLAMA_CPP
from phi_runtime.files import cache_folder

REPOSITORY = Path(__file__).resolve().parent.parent
DEBIAN = cache_folder() / "swift-root"
SUITE, PACKAGES = "trixie", "swiftlang libc6-dev libstdc++-14-dev"
_GGML = ("ggml", "ggml-cpu", "ggml-backend", "ggml-alloc", "ggml-opt", "gguf")
HEADERS = ("include/llama.h", *(f"ggml/include/{name}.h" for name in _GGML))
MISSING = 3


def main() -> None:
    """Run the command; exit with its code."""
    command = _linkable(sys.argv[1:] or ["swift", "--version"])
    if installed():
        llama = llama_folder(cache_folder() / "swift-llama")
        sys.exit(
            subprocess.run(command, cwd=REPOSITORY, env={**os.environ, **variables(llama)}, check=False).returncode
        )
    if sys.platform != "linux" or os.geteuid() != 0:
        say("Swift 6 is not installed, and only root on Linux can make a system with it: nothing was run")
        sys.exit(MISSING)
    if not (DEBIAN / "phi-edge-ready").is_file():
        make_debian()
    llama_folder(DEBIAN / "opt/llama")
    settings = {"HOME": "/", "PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", **variables(Path("/opt/llama"))}
    kept = {k: v for k, v in os.environ.items() if k.startswith("PHI_") or k == "OMP_NUM_THREADS"}
    given = [f"{k}={v}" for k, v in {**settings, **kept}.items()]
    sys.exit(subprocess.run(inside("/usr/bin/env", "-i", "-C", "/mnt/repo", *given, *command), check=False).returncode)


def _linkable(command: list[str]) -> list[str]:
    """On Linux, Swift 6.0's Observation lacks a symbol that only fatal errors want (swiftlang/swift#75670)."""
    if sys.platform == "linux" and command[:2] in (["swift", "build"], ["swift", "test"]):
        return [*command[:2], "-Xlinker", "--allow-shlib-undefined", *command[2:]]
    return command


def inside(*command: str) -> list[str]:
    """A command in the Debian, with /proc, which Swift needs, and the repository; both are mounted for it alone. Exit
    code 3 where this root may not mount.
    """
    (DEBIAN / "mnt/repo").mkdir(parents=True, exist_ok=True)
    script = (
        'mount -t proc proc "$1/proc" && mount --bind "$2" "$1/mnt/repo" || { echo "==> may not mount" >&2; exit 3; }; '
    )
    script += 'root=$1; shift 2; exec chroot "$root" "$@"'
    return ["unshare", "--mount", "sh", "-c", script, "sh", str(DEBIAN), str(REPOSITORY), *command]


def installed() -> bool:
    """Whether a Swift 6 is on the PATH."""
    if shutil.which("swift") is None:
        return False
    said = subprocess.run(["swift", "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"Swift version (\d+)", said)
    return found is not None and int(found[1]) >= 6


def variables(llama: Path) -> dict[str, str]:
    """How SwiftPM finds llama.cpp, and how its threads wait beside others."""
    return {
        "PKG_CONFIG_PATH": str(llama),
        "LD_LIBRARY_PATH": str(llama / "lib"),
        "GOMP_SPINCOUNT": LLAMA_CPP,
    }


def make_debian() -> None:
    """A minimal Debian with Swift in the cache folder; nothing half-made stays."""
    if shutil.which("debootstrap") is None:
        say("installing debootstrap")
        call("apt-get", "install", "-y", "-q", "--no-install-recommends", "debootstrap")
    say(f"making a Debian with Swift in {DEBIAN}: about 2 minutes, once")
    shutil.rmtree(DEBIAN, ignore_errors=True)
    DEBIAN.mkdir(parents=True)
    call("debootstrap", "--variant=minbase", "--include=ca-certificates", SUITE, DEBIAN, mirror())
    shutil.copy("/etc/resolv.conf", DEBIAN / "etc/resolv.conf")
    for settings in Path("/etc/apt/apt.conf.d").glob("*proxy*"):
        shutil.copy(settings, DEBIAN / "etc/apt/apt.conf.d" / settings.name)
    install = f"apt-get update -q && apt-get install -y -q --no-install-recommends {PACKAGES} && apt-get clean"
    call(*inside("sh", "-c", f"export DEBIAN_FRONTEND=noninteractive LC_ALL=C; {install}"))
    (DEBIAN / "phi-edge-ready").touch()


def mirror() -> str:
    """Where this system's own packages come from."""
    for path in [Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")]:
        text = path.read_text(errors="replace") if path.is_file() else ""
        if found := re.search(r"^(?:URIs:|deb(?: \[[^\]]*\])?)\s+(https?://\S+/debian/?)(?:\s|$)", text, re.MULTILINE):
            return found[1]
    sys.exit("no Debian mirror in /etc/apt; install Swift 6 yourself (swift.org)")


def llama_folder(folder: Path) -> Path:
    """llama.cpp's headers, libraries and a file for pkg-config, of the installed llama-cpp-python."""
    stamp, version = folder / "version", metadata.version(PACKAGE)
    if stamp.is_file() and stamp.read_text() == version:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "include").mkdir(parents=True)
    say(f"taking llama.cpp's headers from the sources of {PACKAGE} {version}")
    with tempfile.TemporaryDirectory() as scratch:
        tree = sources(Path(scratch))
        for name in HEADERS:
            shutil.copy(tree / name, folder / "include")
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None and spec.origin is not None
    shutil.copytree(Path(spec.origin).parent / "lib", folder / "lib", symlinks=True)
    prefix = "${pcfiledir}"
    lines = ["Name: llama", "Description: llama.cpp as llama-cpp-python ships it", f"Version: {version}"]
    lines += [f"Libs: -L{prefix}/lib -lllama -lggml -lggml-base", f"Cflags: -I{prefix}/include"]
    (folder / "llama.pc").write_text("\n".join(lines) + "\n")
    stamp.write_text(version)
    return folder


def call(*command: object) -> None:
    """Run a program; its failure ends this one."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: failed ({(done.stderr or done.stdout).strip()[-400:]})")


def say(text: str) -> None:
    """One line about what is going on, beside the output: that is the command's alone."""
    print(f"==> {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
