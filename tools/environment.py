"""Create `.venv` with everything the project needs, or say that it is ready. Standard library only.

    python3 tools/environment.py [FOLDER REQUIREMENT ...]

With no arguments: `.venv`, this project with its `dev` extra. A second call installs nothing.
"""

import hashlib
import os
import platform
import re
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
STAMP = "phi-edge-ready"


def main() -> None:
    """Make the environment that was asked for."""
    if sys.version_info < (3, 11):
        sys.exit(f"phi-edge needs Python 3.11 or newer; this is {platform.python_version()}. Try make PYTHON=python3.12")
    folder = ROOT / (sys.argv[1] if len(sys.argv) > 1 else ".venv")
    wanted = sys.argv[2:] or ["--editable", f"{ROOT}[dev]"]
    key = fingerprint(wanted)
    stamp = folder / STAMP
    if stamp.is_file() and stamp.read_text() == key:
        say(f"environment {folder.name}: ready, nothing to install")
        return
    began = time.monotonic()
    if not (folder / "bin" / "python").exists():
        say(f"environment {folder.name}: creating it")
        venv.create(folder, with_pip=True, clear=folder.exists())
    python = folder / "bin" / "python"
    # torch goes first: other packages ask for it without a version.
    say("installing torch (a few hundred MB)")
    pip(python, "install", f"torch=={pinned('torch')}")
    if sys.argv[2:] == []:
        install_llama_cpp(python)
    say("installing the other packages; deepspeed builds a wheel, about a minute")
    pip(python, "install", *wanted)
    stamp.write_text(key)
    say(f"environment {folder.name}: ready after {time.monotonic() - began:.0f} s")


def fingerprint(wanted: list[str]) -> str:
    """What the environment depends on; another value means installing again."""
    parts = [platform.python_version(), *wanted, (ROOT / "pyproject.toml").read_text(), CONSTRAINTS.read_text()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def pinned(name: str) -> str:
    """The tested version of a package."""
    match = re.search(rf"^{re.escape(name)}==(\S+)", CONSTRAINTS.read_text(), re.MULTILINE)
    assert match, f"{name} is not pinned in constraints.txt"
    return match[1]


def install_llama_cpp(python: Path) -> None:
    """Compile llama-cpp-python for this processor once, and keep the wheel for the next environment.

    pip's own cache will not do: it knows neither the processor nor the compiler flags.
    """
    version = pinned("llama-cpp-python")
    flags = compiler_flags()
    key = hashlib.sha256("\n".join([version, *flags, cpu(), platform.python_version()]).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "phi-edge" / f"llama-cpp-{key}"
    wheels = sorted(cache.glob("*.whl"))
    if not wheels:
        say("compiling llama.cpp for this processor: about 5 minutes on two cores, once on this machine")
        environment = dict(os.environ)
        for name in ("CFLAGS", "CXXFLAGS"):
            environment[name] = " ".join([environment.get(name, ""), *flags]).strip()
        requirement = f"llama-cpp-python=={version}"
        pip(python, "wheel", "--no-cache-dir", "--no-deps", "--wheel-dir", str(cache), requirement, env=environment)
        wheels = sorted(cache.glob("*.whl"))
    else:
        say("llama.cpp: compiled for this processor before, taking that")
    pip(python, "install", str(wheels[-1]))


def compiler_flags() -> list[str]:
    """GCC before 13 drops stores that ggml's AMX kernels need (ggml-org/llama.cpp#20824): go without them."""
    if platform.machine() != "x86_64":
        return []
    compiler = os.environ.get("CC", "cc")
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        sys.exit(f"the C compiler {compiler!r} does not run; install one (on Debian: apt install build-essential)")
    major = subprocess.run([compiler, "-dumpversion"], capture_output=True, text=True, check=False).stdout.split(".")[0]
    is_gcc = "clang" not in version.lower()
    if is_gcc and major.strip().isdigit() and int(major) < 13:
        return ["-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16"]
    return []


def cpu() -> str:
    """What the processor can do."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor()
    lines = info.read_text().splitlines()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.machine())


def pip(python: Path, *arguments: str, env: dict[str, str] | None = None) -> None:
    """Run pip under the constraints; its warnings about sources are noise here."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments, "--constraint", str(CONSTRAINTS)]
    quiet = re.compile(r"^(WARNING: Location|Looking in|Requirement already satisfied|\s+Preparing metadata)")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as process:
        assert process.stdout
        for line in process.stdout:
            if not quiet.match(line):
                print("   ", line.rstrip()[:160], flush=True)
    if process.returncode:
        sys.exit(f"pip failed ({process.returncode}); the lines above say why. The same command tries again")


def say(text: str) -> None:
    """One line about what is going on."""
    print(f"==> {text}", flush=True)


if __name__ == "__main__":
    main()
