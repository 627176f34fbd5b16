"""llama.cpp's own llama-bench, linked to the libraries of the installed llama-cpp-python: `phi-bench build`."""

import json
import subprocess
from pathlib import Path

from phi_bench.adapters import Adapter, Options, Work
from phi_bench.adapters.phi_run import kv_type
from phi_bench.peers.llama_tools import find_tool
from phi_bench.records import Phase
from phi_runtime.errors import BenchmarkError, PhiError
from phi_runtime.package.open import open_package


def _measure(path: Path, options: Options, work: Work) -> list[Phase]:
    """Sums of times: llama-bench keeps none of single tokens."""
    program = find_tool("llama-bench")
    common = [str(program), "-m", str(_file(path)), "-t", str(options.threads), "-ngl", "0", "-r", "1", "-o", "json"]
    if options.kv is not None:
        common += ["-ctk", options.kv, "-ctv", options.kv]
    depths = ",".join(map(str, sorted({1, work.prompt_tokens, *work.depths} - {0})))
    return [
        *_run([*common, "-p", str(work.prompt_tokens), "-n", "0"]),
        *_run([*common, "-p", "0", "-n", str(work.decode_tokens), "-d", depths]),
    ]


def _file(path: Path) -> Path | None:
    """The GGUF file that a path is, or that the bundle there holds."""
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    try:
        package = open_package(path)
    except PhiError:
        return None
    return package.path if package.format == "gguf" else None


def _run(command: list[str]) -> list[Phase]:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"llama-bench ended with exit code {done.returncode}")
    return phases(done.stdout)


def phases(said: str) -> list[Phase]:
    """The phases of llama-bench's JSON, one repetition each. Raises BenchmarkError for what is none."""
    try:
        found = []
        for test in json.loads(said):
            (ns,) = test["samples_ns"]
            depth = int(test["n_depth"])
            if test["n_gen"]:
                found.append(Phase(depth, 0, decode_ns=ns, decode_tokens=test["n_gen"]))
            else:
                found.append(Phase(depth, test["n_prompt"], prefill_ns=ns))
    except (ValueError, KeyError, TypeError) as e:
        raise BenchmarkError(f"llama-bench wrote no such JSON as is known ({type(e).__name__}: {e})") from None
    return found


ADAPTER = Adapter(
    name="llama-bench",
    packages=("llama_cpp_python",),
    install="phi-bench build llama.cpp",
    says="llama-bench -p P -n 0, then -p 0 -n N -d DEPTHS; -ngl 0 -r 1",
    engines=lambda path: ("llama.cpp",) if _file(path) else (),
    measure=_measure,
    judge=lambda _: ("phi-run", "llama.cpp"),
    kv=lambda path, engine, wanted: kv_type(path, engine, wanted) or wanted or "f16",
)
