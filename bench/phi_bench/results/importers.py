"""Other tools' results as our records, so that they stand in the same tables: llama-bench, mlx_lm.benchmark, PocketPal.

What they do not tell stays empty: no digest, no memory before and after, sums of times instead of single tokens.
"""

import datetime
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phi_bench.records import (
    Benchmark,
    Checkpoints,
    Configuration,
    Failure,
    Host,
    Memory,
    Model,
    Phase,
    Row,
    Run,
    Settings,
    Software,
    parse_benchmark,
)
from phi_runtime.contract import encode
from phi_runtime.errors import BenchmarkError
from phi_runtime.files import read_text

_DAMAGED = (
    ValueError, KeyError, TypeError, IndexError, AttributeError, ArithmeticError, RecursionError
)  # fmt: skip
# What tells rows of one file apart: all else that llama-bench varies is the test itself.
_LLAMA_BENCH_KEY = (
    "model_filename", "n_threads", "backends", "type_k", "type_v", "n_gpu_layers", "n_batch", "n_ubatch", "flash_attn",
    "devices", "no_kv_offload", "split_mode", "tensor_split",
)  # fmt: skip
_MLX_HEAD = re.compile(r"Timing with prompt_tokens=(\d+), generation_tokens=(\d+), batch_size=(\d+)")
_MLX_TRIAL = re.compile(r"Trial \d+:\s+prompt_tps=([\d.]+), generation_tps=([\d.]+), peak_memory=([\d.]+)")


def import_file(path: Path) -> Benchmark:
    """Recognise a file and read it. Raises NotFoundError, BenchmarkError for what is none of these tools'."""
    text = read_text(path, "import")
    try:
        found = _read(text, path)
        if found is not None and found.rows:
            # What cannot be is refused here as anywhere.
            return parse_benchmark(encode(found).encode(), f"{path}, read as ours")
    except _DAMAGED as e:
        raise BenchmarkError(f"{path}: is damaged ({type(e).__name__}: {e}); run that tool again") from None
    raise BenchmarkError(
        f"{path}: is of no tool that we know; give what `llama-bench -o json`, `python -m mlx_lm.benchmark` or "
        "PocketPal wrote"
    )


def _read(text: str, path: Path) -> Benchmark | None:
    if _MLX_HEAD.search(text):
        return _mlx_lm(text, path)
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return next((read(value, path) for known, read in _JSON if known(value)), None)


def _ns(tokens: int, rate: float) -> int:
    """A rate turned back into the time of all tokens. Raises ValueError for what is no rate."""
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"{rate} tokens/s")
    return max(1, round(1e9 * tokens / rate))


def _is_llama_bench(v: Any) -> bool:
    return isinstance(v, list) and bool(v) and isinstance(v[0], dict) and "samples_ns" in v[0] and "model_type" in v[0]


def _llama_bench(v: list[dict[str, Any]], path: Path) -> Benchmark:
    """One row for each model, backend and number of threads; a repetition is a round."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for test in v:
        if test["n_prompt"] and test["n_gen"]:
            continue  # -pg: one time of both
        key = tuple(str(test.get(name)) for name in _LLAMA_BENCH_KEY)
        groups.setdefault(key, []).append(test)
    first = v[0]
    differs = [name for i, name in enumerate(_LLAMA_BENCH_KEY) if i and len({key[i] for key in groups}) > 1]
    models: dict[str, Model] = {}
    rows = []
    for tests in groups.values():
        one = tests[0]
        model = Path(one["model_filename"]).stem
        if any(m.file_bytes != one["model_size"] for m in models.values() if m.name == model):
            model = str(Path(one["model_filename"]))
        bits = 8 * one["model_size"] / one["model_n_params"]
        models[model] = Model(model, "gguf", one["model_size"], "", one["model_n_params"], bits, one["model_size"])
        runs = tuple(
            Run(i + 1, one["test_time"], phases=tuple(_llama_phase(t, i) for t in tests if len(t["samples_ns"]) > i))
            for i in range(max(len(t["samples_ns"]) for t in tests))
        )
        kv = one["type_k"] if one["type_k"] == one["type_v"] else f"{one['type_k']}/{one['type_v']}"
        device = one["gpu_info"] or one["cpu_info"]
        made = {"llama.cpp": f"{one['build_commit']} (build {one['build_number']})"}
        c = Configuration(
            "llama-bench", one["backends"], device, one["n_threads"], None, kv, 1, "llama-bench -o json", made
        )
        said = "".join(f", {name} {one.get(name)}" for name in differs)
        rows.append(Row(f"{model} on llama-bench ({one['n_threads']} threads{said})", model, c, runs))
    prompts = [t["n_prompt"] for t in v if t["n_prompt"]]
    tokens = [t["n_gen"] for t in v if t["n_gen"]]
    depths = tuple(sorted({t.get("n_depth", 0) for t in v}))
    settings = Settings(
        max(len(t["samples_ns"]) for t in v), max(prompts, default=1), max(tokens, default=1), depths, 0
    )
    host = Host(first["cpu_info"] or "unknown", "unknown", None, None, "unknown")
    return Benchmark(first["test_time"], True, host, _imported(), settings, tuple(models.values()), tuple(rows))


def _llama_phase(test: dict[str, Any], i: int) -> Phase:
    ns, depth = test["samples_ns"][i], test.get("n_depth", 0)
    if test["n_gen"]:
        return Phase(depth, 0, decode_ns=ns, decode_tokens=test["n_gen"])
    return Phase(depth, test["n_prompt"], prefill_ns=ns)


def _mlx_lm(text: str, path: Path) -> Benchmark:
    """mlx_lm.benchmark prints lines; its rates are turned back into times. Memory is MLX's own peak, in 1e9 bytes."""
    head = _MLX_HEAD.search(text)
    assert head is not None
    prompt, tokens, batch = map(int, head.groups())
    if batch != 1:
        raise BenchmarkError(f"{path}: is of a batch of {batch}; give one of a single text")
    runs = []
    for i, (prefill, decode, memory) in enumerate(_MLX_TRIAL.findall(text), 1):
        phase = Phase(
            0,
            prompt,
            prefill_ns=_ns(prompt, float(prefill)),
            decode_ns=_ns(tokens, float(decode)),
            decode_tokens=tokens,
        )
        runs.append(Run(i, "", phases=(phase,), memory=Checkpoints(int(float(memory) * 1e9))))
    if not runs:
        raise BenchmarkError(f"{path}: holds no trial; let mlx_lm.benchmark come to its end")
    c = Configuration("mlx-lm", "mlx", "unknown", 1, None, None, 1, "python -m mlx_lm.benchmark")
    model = Model(path.stem, "mlx", None, "")
    settings = Settings(len(runs), prompt, tokens, (), 0)
    host = Host("unknown", "unknown", None, None, "unknown")
    row = Row(f"{path.stem} on mlx-lm", path.stem, c, tuple(runs))
    return Benchmark(_file_time(path), True, host, _imported(), settings, (model,), (row,))


def _is_pocketpal_bench(v: Any) -> bool:
    return isinstance(v, dict) and isinstance(v.get("runs"), list) and isinstance(v.get("bench"), dict)


def _pocketpal_bench(v: dict[str, Any], path: Path) -> Benchmark:
    """PocketPal's benchmark matrix: averages of prefill and decode, by model, quantisation and backend. Cells that
    failed stay, as failures.
    """
    models, rows = {}, []
    pp, tg = int(v["bench"]["pp"]), int(v["bench"]["tg"])
    for r in v["runs"]:
        model = f"{r['model_id']} {r['quant']}"
        mib = r.get("log_signals", {}).get("memory_buffers", {}).get("weights_total_mib")
        models[model] = Model(model, "gguf", round((mib or 0) * 2**20) or None, "")
        init = r.get("init_settings", {})
        backend = str(r.get("effective_backend") or r["requested_backend"])
        c = Configuration(
            adapter="pocketpal",
            engine=f"llama.rn ({backend})",
            device=str(v.get("soc") or v["device"]),
            threads=int(init.get("n_threads") or 1),
            context=None,
            kv=init.get("cache_type_k"),
            command="PocketPal's benchmark matrix",
            versions={"llama.rn": str(v.get("llama_rn_version", "unknown"))},
        )
        name = f"{model} on PocketPal ({r['requested_backend']})"
        rows.append(Row(name, model, c, (_pocketpal_run(r, pp, tg),)))
    settings = Settings(1, pp, tg, (), 0)
    return _pocketpal(v, settings, tuple(models.values()), tuple(rows), path)


def _pocketpal_run(r: dict[str, Any], pp: int, tg: int) -> Run:
    began = str(r.get("timestamp", ""))
    if r.get("status", "ok") != "ok" or not r.get("pp_avg") or not r.get("tg_avg"):
        return Run(1, began, failure=Failure("crashed", str(r.get("error") or r.get("status") or "no figures")))
    phase = Phase(
        depth=0,
        prompt_tokens=pp,
        prefill_ns=_ns(pp, r["pp_avg"]),
        decode_ns=_ns(tg, r["tg_avg"]),
        decode_tokens=tg,
    )
    peak = r.get("peak_memory_mb")
    return Run(1, began, phases=(phase,), memory=Checkpoints(int(peak * 1e6)) if peak else None)


def _is_pocketpal_memory(v: Any) -> bool:
    return isinstance(v, dict) and isinstance(v.get("checkpoints"), list) and "model" in v and "device" in v


def _pocketpal_memory(v: dict[str, Any], path: Path) -> Benchmark:
    """PocketPal's memory profile: what iOS charged at each moment."""
    by = {c["label"]: c["native"] for c in v["checkpoints"]}

    def at(label: str) -> Memory | None:
        n = by.get(label)
        return None if n is None else Memory(n["resident_size"], None, n.get("compressed"), n["phys_footprint"])

    peak = max(n["resident_size"] for n in by.values())
    memory = Checkpoints(peak, at("chat_screen"), at("model_loaded"), at("post_chat_idle"), at("model_unloaded"))
    run = Run(1, v["timestamp"], memory=memory)
    model = v["model"]
    c = Configuration("pocketpal", "llama.rn", v["device"], 1, None, None, 1, "PocketPal's memory profile")
    row = Row(f"{model} on PocketPal", model, c, (run,))
    return _pocketpal(v, Settings(1, 1, 1, (), 0), (Model(model, "gguf", None, ""),), (row,), path)


def _pocketpal(
    v: dict[str, Any], settings: Settings, models: tuple[Model, ...], rows: tuple[Row, ...], path: Path
) -> Benchmark:
    system = f"{v.get('platform', 'unknown')} {v.get('os_version', '')}".strip()
    host = Host("unknown", "unknown", None, None, system, device=v["device"])
    software = Software("unknown", {"pocketpal": str(v.get("commit", "unknown"))})
    created = str(v.get("timestamp") or _file_time(path))
    return Benchmark(created, True, host, software, settings, models, rows)


def _imported() -> Software:
    return Software("unknown")


def _file_time(path: Path) -> str:
    return datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC).isoformat(timespec="seconds")


_JSON: tuple[tuple[Callable[[Any], bool], Callable[[Any, Path], Benchmark]], ...] = (
    (_is_llama_bench, _llama_bench),
    (_is_pocketpal_bench, _pocketpal_bench),
    (_is_pocketpal_memory, _pocketpal_memory),
)
