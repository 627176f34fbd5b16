"""llama.cpp's own programs, built from the sources of the installed llama-cpp-python against its libraries.

The wheel ships the libraries and no programs; its source package has both. Only the few files that the programs call
are compiled: seconds instead of minutes.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

from phi_runtime.backends import cores
from phi_runtime.errors import BenchmarkError, MissingExtraError
from phi_runtime.files import cache_folder, folder_beside

PACKAGE = "llama_cpp_python"
_PROGRAMS = {
    "llama-bench": ("tools/llama-bench/llama-bench.cpp", "tools/llama-bench/main.cpp"),
    "llama-quantize": ("tools/quantize/quantize.cpp", "tools/quantize/main.cpp"),
}
# Of `common/`, what they call. The rest (downloads, chat templates, grammars) is left out: a function of it that nobody
# calls is never looked for, because the library below is bound lazily.
_COMMON = ("common", "log", "fit", "arg", "imatrix-loader", "json", "unicode")
_INCLUDES = ("include", "ggml/include", "common", "vendor", "tools/llama-bench")
_LIBRARIES = ("libllama.so.0", "libggml.so.0", "libggml-base.so.0")


def find_tool(name: str) -> Path:
    """A program: what `build` made for the installed version, or one on the PATH. Raises MissingExtraError."""
    built = _folder() / name
    if built.is_file():
        return built
    if found := shutil.which(name):
        return Path(found)
    raise BenchmarkError(f"{name} is not installed: phi-bench build llama.cpp")


def build(progress: Callable[[str], None] = lambda _: None) -> Path:
    """Build all programs; their folder. Raises MissingExtraError, BenchmarkError where the sources cannot be had or the
    compiler fails.
    """
    if sys.platform != "linux":
        raise BenchmarkError("phi-bench build works on Linux only; put llama-bench and llama-quantize on the PATH")
    folder = _folder()
    if all((folder / name).is_file() for name in _PROGRAMS):
        return folder
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise BenchmarkError("no C++ compiler: install g++ or clang, then run this again")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="phi-edge-") as scratch, folder_beside(folder) as out:
        progress(f"downloading the sources of {PACKAGE} {_version()}")
        _compile(compiler, sources(Path(scratch)), Path(scratch), out, progress)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(out, folder)
        out.mkdir()  # what `folder_beside` takes away
    return folder


def _version() -> str:
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        raise MissingExtraError("llama-cpp-python", "gguf") from None


def _folder() -> Path:
    return cache_folder() / f"llama.cpp-{_version()}"


def sources(scratch: Path) -> Path:
    """llama.cpp's tree out of the source package, in a folder that is empty. Raises BenchmarkError."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", PACKAGE, f"{PACKAGE}=={_version()}", "--dest", str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = list(scratch.glob("*.tar.gz"))
    if not archives:
        why = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise BenchmarkError(f"the sources of {PACKAGE} {_version()} cannot be had ({why}); check the network")
    with tarfile.open(archives[0]) as archive:
        archive.extractall(scratch, filter="data")
    (tree,) = scratch.glob("*/vendor/llama.cpp")
    return tree


def _compile(compiler: str, tree: Path, scratch: Path, out: Path, progress: Callable[[str], None]) -> None:
    import llama_cpp

    libraries = Path(llama_cpp.__file__).parent / "lib"
    said = (tree / "common/build-info.cpp.in").read_text()
    for name, value in {
        "@LLAMA_BUILD_NUMBER@": "0",
        "@LLAMA_BUILD_COMMIT@": f"{PACKAGE}-{_version()}",
        "@BUILD_COMPILER@": Path(compiler).name,
        "@BUILD_TARGET@": os.uname().machine,
    }.items():
        said = said.replace(name, value)
    (scratch / "build-info.cpp").write_text(said)
    common = [tree / "common" / f"{name}.cpp" for name in _COMMON] + [scratch / "build-info.cpp"]
    sources = common + [tree / source for pair in _PROGRAMS.values() for source in pair]
    objects = {source: scratch / f"{i}.o" for i, source in enumerate(sources)}
    include = [f"-I{tree / folder}" for folder in _INCLUDES]
    flags = ["-std=c++17", "-O1", "-fPIC", "-DNDEBUG", *include]

    def compile_one(source: Path) -> None:
        progress(f"compiling {source.name}")
        _call([compiler, *flags, "-c", source, "-o", objects[source]])

    with ThreadPoolExecutor(cores()) as pool:
        list(pool.map(compile_one, sources))
    link = [f"-L{libraries}", *(f"-l:{name}" for name in _LIBRARIES), f"-Wl,-rpath,{libraries}", "-Wl,-z,lazy"]
    shared = out / "libcommon.so"
    _call([compiler, "-shared", f"-Wl,-soname,{shared.name}", *(objects[s] for s in common), *link, "-o", shared])
    for name, pair in _PROGRAMS.items():
        parts = [objects[tree / source] for source in pair]
        own = [shared, "-Wl,-rpath,$ORIGIN", "-Wl,--allow-shlib-undefined"]
        _call([compiler, *parts, *own, *link, "-o", out / name])


def _call(command: list[object]) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        why = next((line for line in done.stderr.splitlines() if "error" in line), "no reason given")
        raise BenchmarkError(f"the compiler failed ({why.strip()}); install llama-bench and put it on the PATH")
