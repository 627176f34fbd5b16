"""Create `.venv` with everything the project needs, or say that it is ready. Standard library only.

    python3 tools/environment.py

`.venv` gets this project with its `dev` extra, under constraints.txt. A second call installs nothing.
"""

import hashlib
import os
import platform
import re
import subprocess
import sys
import time
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAMP = "phi-edge-ready"


def main() -> None:
    """Make the environment that was asked for."""
    if sys.version_info < (3, 11):  # noqa: UP036, an older Python may well be what calls this
        sys.exit(
            f"phi-edge needs Python 3.11 or newer; this is {platform.python_version()}. Try make PYTHON=python3.12"
        )
    folder, constraints = ROOT / ".venv", ROOT / "constraints.txt"
    wanted = ["--editable", f"{ROOT}[dev]"]
    key = fingerprint(constraints, wanted)
    stamp = folder / STAMP
    if stamp.is_file() and stamp.read_text() == key:
        say(f"environment {folder.name}: ready, nothing to install")
        return
    began = time.monotonic()
    if not made_by_this_python(folder):
        say(f"environment {folder.name}: creating it")
        try:
            venv.create(folder, with_pip=True, clear=folder.exists())
        except subprocess.CalledProcessError:
            sys.exit("this Python cannot make environments; install its venv module (Debian: apt install python3-venv)")
    pip = Pip(folder / "bin" / "python", constraints)
    # torch goes first: other packages ask for it without a version.
    say("installing torch: some hundred MB, or some GB where pip takes the build for GPUs")
    pip("install", f"torch=={pinned(constraints, 'torch')}")
    install_llama_cpp(pip)
    say("installing the other packages, a minute or two")
    pip("install", *wanted)
    stamp.write_text(key)
    say(f"environment {folder.name}: ready after {time.monotonic() - began:.0f} s")


def made_by_this_python(folder: Path) -> bool:
    """Whether there is an environment, and of this very version of Python."""
    settings = folder / "pyvenv.cfg"
    return settings.is_file() and f"version = {platform.python_version()}" in settings.read_text()


def fingerprint(constraints: Path, wanted: list[str]) -> str:
    """What the environment depends on; another value means installing again."""
    parts = [platform.python_version(), *wanted, (ROOT / "pyproject.toml").read_text()]
    parts.append(constraints.read_text())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def pinned(constraints: Path, name: str) -> str:
    """The tested version of a package."""
    match = re.search(rf"^{re.escape(name)}==(\S+)", constraints.read_text(), re.MULTILINE)
    assert match, f"{name} is not pinned in {constraints.name}"
    return match[1]


def install_llama_cpp(pip: "Pip") -> None:
    """Compile llama-cpp-python for this processor once, and keep the wheel for the next environment.

    pip's own cache will not do: it knows neither the processor nor the compiler flags.
    """
    version = pinned(pip.constraints, "llama-cpp-python")
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
        pip("wheel", "--no-cache-dir", "--no-deps", "--wheel-dir", str(cache), requirement, env=environment)
        wheels = sorted(cache.glob("*.whl"))
    else:
        say("llama.cpp: compiled for this processor before, taking that")
    pip("install", str(wheels[-1]))


def compiler_flags() -> list[str]:
    """GCC before 13 drops stores that ggml's AMX kernels need (ggml-org/llama.cpp#20824): go without them."""
    compiler = os.environ.get("CC", "cc")
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        sys.exit(f"the C compiler {compiler!r} does not run; install one (on Debian: apt install build-essential)")
    major = subprocess.run([compiler, "-dumpversion"], capture_output=True, text=True, check=False).stdout.split(".")[0]
    is_gcc = "clang" not in version.lower()
    if platform.machine() == "x86_64" and is_gcc and major.strip().isdigit() and int(major) < 13:
        return ["-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16"]
    return []


def cpu() -> str:
    """What the processor can do."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor()
    lines = info.read_text().splitlines()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.machine())


@dataclass(frozen=True)
class Pip:
    """pip of one environment, under its constraints; what it says of its sources is noise here."""

    python: Path
    constraints: Path

    def __call__(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        """Run pip; its failure ends the program."""
        command = [str(self.python), "-m", "pip", "--disable-pip-version-check", *arguments]
        command += ["--constraint", str(self.constraints)]
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
