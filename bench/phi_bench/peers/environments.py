"""Python environments of engines that cannot share ours: they want other versions of the same packages.

`phi-bench build NAME` makes one in the user's cache folder; the rows of its adapter run in it.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path

from phi_runtime.errors import BenchmarkError
from phi_runtime.files import cache_folder, write_file

# What each holds, in the order of installing: torch first, since other packages ask for any build of it.
PACKAGES = {
    "optimum": (("torch==2.13.0",), ("optimum-onnx==0.1.0", "onnxruntime==1.31.1", "transformers==4.57.6")),
    "openvino": (
        ("torch==2.13.0",),
        ("openvino-genai==2026.4.1.0", "optimum==2.3.0", "transformers==5.5.4", "nncf==3.4.0", "requests>=2.33"),
        ("--no-deps", "optimum-intel==2.2.0"),  # it wants torchvision, for models that see
    ),
}
_OURS = ("phi_bench", "phi_export", "phi_runtime", "phi_train")
_NEEDS = ("msgspec", "numpy", "psutil", "tokenizers")  # of ours, in a process that measures
_READY = "phi-edge-ready"


def python_of(name: str) -> Path:
    """The interpreter of an environment. Raises BenchmarkError where it was not built, or for other versions."""
    folder = _folder(name)
    stamp = folder / _READY
    if not stamp.is_file() or stamp.read_text() != _wanted(name):
        raise BenchmarkError(f"{name} is not installed: phi-bench build {name}")
    return folder / "bin" / "python"


def environment_of(name: str) -> dict[str, str]:
    """The variables of a process in it: our own modules are found, and nothing else of ours."""
    links = _folder(name) / "phi-edge"
    links.mkdir(exist_ok=True)
    for module in _OURS:
        source = Path(import_module(module).__file__ or "").parent
        link = links / module
        if not link.is_symlink() or link.readlink() != source:
            new = links / f"{module}.{os.getpid()}"
            new.symlink_to(source)
            os.replace(new, link)
    return {**os.environ, "PYTHONPATH": str(links), "HF_HUB_OFFLINE": "1"}


def versions_in(name: str, packages: tuple[str, ...]) -> dict[str, str]:
    """The versions of those packages that an environment holds."""
    (site,) = [*_folder(name).glob("lib/python*/site-packages")] or [_folder(name)]
    found = {d.metadata["Name"]: d.version for d in metadata.distributions(path=[str(site)])}
    return {p: found[p] for p in packages if p in found}


def build(name: str, progress: Callable[[str], None] = lambda _: None) -> Path:
    """Make an environment, unless it is there; its folder. Raises BenchmarkError where pip fails."""
    folder = _folder(name)
    try:
        return python_of(name).parent.parent
    except BenchmarkError:
        pass
    folder.parent.mkdir(parents=True, exist_ok=True)
    # An environment knows its own path, so it is made where it will stand, and is none before its stamp is there.
    shutil.rmtree(folder, ignore_errors=True)
    progress(f"creating {folder}")
    _call([sys.executable, "-m", "venv", str(folder)])
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    for packages in _wanted_packages(name):
        progress(f"installing {', '.join(packages)}")
        _call([*pip, *packages])
    write_file(folder / _READY, _wanted(name))
    return folder


def _folder(name: str) -> Path:
    return cache_folder() / f"environment-{name}"


def _wanted_packages(name: str) -> tuple[tuple[str, ...], ...]:
    ours = tuple(f"{p}=={metadata.version(p)}" if p == "msgspec" else p for p in _NEEDS)
    return (*PACKAGES[name], ours)


def _wanted(name: str) -> str:
    return "\n".join(p for packages in _wanted_packages(name) for p in packages)


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if not line.startswith("WARNING")]
        raise BenchmarkError(f"{command[-1]} cannot be installed ({(lines or ['no reason given'])[-1]})")
