"""The schema: golden results are read, and what is damaged, of another version or impossible is refused by name."""

import json
from pathlib import Path

import jsonschema
import pytest
from support import ROOT

from phi_bench.records import read_benchmark
from phi_bench.results.write import write_benchmark
from phi_runtime.contract import encode
from phi_runtime.errors import BenchmarkError, NotFoundError

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.json"))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_a_golden_result_is_read_and_follows_the_published_schema(path, tmp_path):
    schema = json.loads((ROOT / "docs" / "schemas" / "benchmark.schema.json").read_text())
    jsonschema.validate(json.loads(path.read_text()), schema, jsonschema.Draft202012Validator)
    b = read_benchmark(path)
    write_benchmark(tmp_path / "again.json", b)
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads(path.read_text()) == json.loads(encode(b))
    assert max(map(len, (tmp_path / "again.json").read_text().splitlines())) > 60  # lists of numbers on one line


def changed(tmp_path, path, *keys, to):
    raw = json.loads((Path(__file__).parent / "golden" / "laptop.json").read_text())
    at = raw
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = to
    out = tmp_path / path
    out.write_text(json.dumps(raw))
    return out


RUN = ("rows", 0, "runs", 0)


@pytest.mark.parametrize(
    ("keys", "to", "says"),
    [
        (("schema_version",), 2, "schema version 2"),
        (("schema_version",), "one", "schema_version"),
        (("rows", 0, "model"), "another", "not listed"),
        ((*RUN, "round"), 2, "round twice"),
        ((*RUN, "phases", 0, "token_ns"), [10**400], "token_ns"),
        (("models", 0, "file_bytes"), 10**400, "file_bytes"),
        (("rows", 0, "quality", "kld_mean"), -5, "negative KL"),
        (("rows", 0, "quality", "checkpoint_perplexity"), 0, "checkpoint_perplexity"),
        (("rows", 1, "name"), "mini/gguf on phi-run (llama.cpp)", "same name"),
        ((*RUN, "memory", "peak_rss"), 30_000_000_000, "resident in"),
        ((*RUN, "memory", "peak_rss"), 1_000, "peak below"),
        ((*RUN, "ready_ns"), 5, "ready before"),
        ((*RUN, "phases", 0, "token_ns"), [0], "rows[0].runs[0].phases[0].token_ns[0]"),
        ((*RUN, "phases", 0, "token_ns"), [-5], "token_ns"),
        ((*RUN, "phases", 0, "decode_ns"), 5, "without the number"),
        (("rows", 0, "quality", "top1_agreement"), 1.5, "top1_agreement"),
        (("host", "read_bandwidth"), -1.0, "read_bandwidth"),
        (("settings", "round"), 5, "rounds"),
    ],
)
def test_what_cannot_be_is_refused_by_name(keys, to, says, tmp_path):
    with pytest.raises(BenchmarkError, match=r"bad.json: .*; run the benchmark again") as e:
        read_benchmark(changed(tmp_path, "bad.json", *keys, to=to))
    assert says in str(e.value)


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(NotFoundError):
        read_benchmark(tmp_path / "none.json")
    with pytest.raises(BenchmarkError, match="cannot be read"):
        read_benchmark(tmp_path)
    (tmp_path / "half.json").write_text(GOLDEN[0].read_text()[:500])
    with pytest.raises(BenchmarkError, match="not valid JSON"):
        read_benchmark(tmp_path / "half.json")
