"""Other tools' files: read into our records, or refused by name."""

import json

import pytest
from support import run_here

from phi_bench import figures
from phi_bench.records import read_benchmark
from phi_bench.results.importers import import_file
from phi_bench.results.write import write_benchmark
from phi_runtime.errors import BenchmarkError

BENCH = {
    "build_commit": "0c1e5709", "build_number": 1, "cpu_info": "AMD EPYC", "gpu_info": "", "backends": "CPU",
    "model_filename": "/models/mini-Q4_K_M.gguf", "model_type": "phi3 3B Q4_K - Medium", "model_size": 2_390_000_000,
    "model_n_params": 3_821_079_552, "n_threads": 2, "type_k": "f16", "type_v": "f16", "n_depth": 0,
    "test_time": "2026-11-29T09:31:36Z",
}  # fmt: skip
LLAMA_BENCH = [
    BENCH | {"n_prompt": 512, "n_gen": 0, "samples_ns": [10_240_000_000, 10_000_000_000]},
    BENCH | {"n_prompt": 0, "n_gen": 128, "samples_ns": [8_000_000_000, 8_100_000_000]},
    BENCH | {"n_prompt": 0, "n_gen": 128, "n_depth": 1024, "samples_ns": [9_000_000_000, 9_100_000_000]},
]
MLX = """Running warmup..
Timing with prompt_tokens=512, generation_tokens=128, batch_size=1.
Trial 1:  prompt_tps=253.100, generation_tps=108.200, peak_memory=2.310, total_time=3.205
Trial 2:  prompt_tps=250.000, generation_tps=107.000, peak_memory=2.310, total_time=3.244
Averages: prompt_tps=251.550, generation_tps=107.600, peak_memory=2.310
"""
POCKETPAL = {
    "version": "1.1", "device": "a-phone", "soc": "A system", "commit": "5f0f929d", "platform": "android",
    "os_version": None, "timestamp": "2026-05-11T17:13:00Z", "llama_rn_version": "0.12",
    "bench": {"pp": 256, "tg": 64, "pl": 1, "nr": 3},
    "runs": [
        {"model_id": "phi", "quant": "q4_0", "requested_backend": "cpu", "effective_backend": "cpu",
         "pp_avg": 13.5, "tg_avg": 7.8, "peak_memory_mb": 3706.35, "init_settings": {"n_threads": 6}, "status": "ok",
         "log_signals": {"memory_buffers": {"weights_total_mib": 663.17}}},
        {"model_id": "phi", "quant": "q4_0", "requested_backend": "gpu", "status": "failed", "error": "no device"},
    ],
}  # fmt: skip
NATIVE = {"resident_size": 1_705_541_632, "compressed": 62_930_944, "phys_footprint": 439_322_936}
MEMORY = {
    "version": "1.0", "commit": "37cc55b", "device": "iPhone 13 Pro", "os_version": "26.3", "platform": "ios",
    "timestamp": "2026-03-23T17:39:34.504Z", "model": "qwen3-1.7b",
    "checkpoints": [{"label": "model_loaded", "native": NATIVE}],
}  # fmt: skip


def imported(tmp_path, content):
    path = tmp_path / "theirs"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    b = import_file(path)
    write_benchmark(tmp_path / "ours.json", b)
    assert read_benchmark(tmp_path / "ours.json") == b
    return b


def test_llama_bench(tmp_path):
    (row,) = imported(tmp_path, LLAMA_BENCH).rows
    assert figures.prefill(row).rounds == pytest.approx((50, 51.2))
    assert figures.decode(row, 0).rounds == pytest.approx((16, 128 / 8.1))
    assert figures.decode(row, 1024).rounds == pytest.approx((128 / 9, 128 / 9.1))
    assert row.configuration.threads == 2


def test_what_llama_bench_varied_makes_rows_of_their_own(tmp_path):
    fast = [t | {"n_gpu_layers": 99, "samples_ns": [ns // 100 for ns in t["samples_ns"]]} for t in LLAMA_BENCH]
    both = BENCH | {"n_prompt": 512, "n_gen": 128, "samples_ns": [10_000_000_000]}
    slow = [t | {"n_gpu_layers": 0} for t in LLAMA_BENCH]
    rows = imported(tmp_path, [*slow, *fast, both | {"n_gpu_layers": 0}]).rows
    assert [figures.decode(r, 0).value for r in rows] == pytest.approx([15.9, 1590], rel=0.01)
    assert "n_gpu_layers 99" in rows[1].name


def test_mlx_lm(tmp_path):
    (row,) = imported(tmp_path, MLX).rows
    assert figures.decode(row).rounds == pytest.approx((108.2, 107.0))
    assert figures.prefill(row).rounds == pytest.approx((253.1, 250.0))
    assert figures.peak(row).value == pytest.approx(2.31e9)


def test_pocketpal(tmp_path):
    b = imported(tmp_path, POCKETPAL)
    good, bad = b.rows
    assert figures.decode(good).value == pytest.approx(7.8)
    assert figures.prefill(good).value == pytest.approx(13.5)
    assert bad.runs[0].failure.detail == "no device"
    (row,) = imported(tmp_path, MEMORY).rows
    assert row.runs[0].memory.loaded.charged == 439_322_936


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[]", "[1]", "nonsense", json.dumps([BENCH | {"samples_ns": "x"}]), MLX.split("Trial")[0],
     json.dumps(POCKETPAL | {"bench": {"pp": 0}}), json.dumps(MEMORY | {"checkpoints": []}),
     json.dumps([LLAMA_BENCH[0] | {"samples_ns": [-5]}]), json.dumps([LLAMA_BENCH[0] | {"samples_ns": ["abc"]}]),
     json.dumps([LLAMA_BENCH[0] | {"model_size": 0}]), json.dumps([LLAMA_BENCH[0] | {"n_gen": 128}]),
     MLX.replace("253.100", "0.000"), MLX.replace("2.310", "9" * 400),
     json.dumps(POCKETPAL).replace("7.8,", "-5,"), json.dumps(POCKETPAL).replace("7.8,", "1e999,"),
     json.dumps(POCKETPAL).replace("3706.35", "1e999"), json.dumps(POCKETPAL | {"runs": []}),
     json.dumps(POCKETPAL | {"runs": POCKETPAL["runs"][:1] * 2}),
     json.dumps([BENCH | {"n_prompt": 1, "n_gen": 0, "samples_ns": [0], "model_n_params": 0}])],
)  # fmt: skip
def test_what_is_none_is_refused(content, tmp_path):
    path = tmp_path / "theirs"
    path.write_text(content)
    with pytest.raises(BenchmarkError):
        import_file(path)


def test_the_command(tmp_path):
    (tmp_path / "theirs.json").write_text(json.dumps(LLAMA_BENCH))
    done = run_here("phi-bench", "import", tmp_path / "theirs.json", "--out", tmp_path / "ours.json")
    assert done.returncode == 0, done.stderr
    assert read_benchmark(tmp_path / "ours.json").rows
    again = run_here("phi-bench", "import", tmp_path / "theirs.json", "--out", tmp_path / "ours.json")
    assert again.returncode == 2
    assert "--force" in again.stderr
    own = run_here("phi-bench", "import", tmp_path / "theirs.json", "--out", tmp_path / "theirs.json", "--force")
    assert own.returncode == 2
    assert json.loads((tmp_path / "theirs.json").read_text()) == LLAMA_BENCH
    shown = run_here(
        "phi-bench", "report", tmp_path / "ours.json", "--markdown", tmp_path / "t.md", "--csv", tmp_path / "t.csv"
    )
    assert shown.returncode == 0, shown.stderr
    assert "mini-Q4_K_M on llama-bench" in (tmp_path / "t.md").read_text()
    assert len((tmp_path / "t.csv").read_text().splitlines()) == 2
