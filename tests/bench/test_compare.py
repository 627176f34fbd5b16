"""`phi-bench compare`: planted changes are seen, noise and a drifting machine are not."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
from support import run_here

from phi_bench.records import read_benchmark
from phi_bench.results.compare import compare
from phi_bench.results.write import write_benchmark
from phi_runtime.errors import BenchmarkError

LAPTOP = read_benchmark(Path(__file__).parent / "golden" / "laptop.json")
replace = msgspec.structs.replace


def measured(seed, speed=1.0, drift=1.0, kld=1.0, peak=0, failed=False):
    """The golden result with noise of 2 %; `drift` slows program and memory alike."""
    rng = np.random.default_rng(seed)
    row, runs = LAPTOP.rows[0], []
    for r in row.runs:
        noise = rng.normal(1, 0.02)
        phases = tuple(
            replace(
                p,
                first_token_ns=int(p.first_token_ns * noise * drift / speed),
                token_ns=tuple(int(t * noise * drift / speed) for t in p.token_ns),
            )
            for p in r.phases
        )
        c = replace(r.conditions, bandwidth=r.conditions.bandwidth / drift * rng.normal(1, 0.01))
        runs.append(
            replace(r, phases=phases, conditions=c, memory=replace(r.memory, peak_rss=r.memory.peak_rss + peak))
        )
    if failed:
        runs = [replace(runs[0], failure=LAPTOP.rows[1].runs[0].failure)]
    q = replace(row.quality, kld_mean=row.quality.kld_mean * kld)
    return replace(LAPTOP, rows=(replace(row, runs=tuple(runs), quality=q), LAPTOP.rows[1]))


def verdicts(a, b):
    return {c.what: c.verdict for c in compare(a, b) if c.row == LAPTOP.rows[0].name}


def test_a_tenth_slower_is_seen():
    found = verdicts(measured(1), measured(2, speed=0.9))
    assert found["decode, tokens/s"] == "worse"
    assert verdicts(measured(1), measured(2, speed=1.1))["decode, tokens/s"] == "better"


def test_the_same_twice_is_the_same_in_twenty_tries():
    for i in range(20):
        assert "worse" not in verdicts(measured(10 + i), measured(40 + i)).values()


def test_a_slower_machine_is_no_regression():
    found = compare(measured(1), measured(2, drift=1.5))
    speeds = [c for c in found if "tokens/s" in c.what and c.row == LAPTOP.rows[0].name]
    assert {c.verdict for c in speeds} == {"undecided"}
    assert all("the machine changed" in c.note for c in speeds)


def test_quality_counts_beyond_its_error():
    assert verdicts(measured(1), measured(2, kld=1.2))["KL divergence, nats"] == "worse"
    assert verdicts(measured(1), measured(2, kld=1.05))["KL divergence, nats"] == "same"
    assert verdicts(measured(1), measured(2, kld=0.8))["KL divergence, nats"] == "better"


@pytest.mark.parametrize(("more", "verdict"), [(150_000_000, "same"), (205_000_000, "same"), (300_000_000, "worse")])
def test_memory_counts_when_both_share_and_bytes_rise(more, verdict):
    assert verdicts(measured(1), measured(2, peak=more))["peak memory"] == verdict


def test_a_row_that_fails_now_is_worse():
    assert verdicts(measured(1), measured(2, failed=True)) == {"runs": "worse"}
    assert verdicts(measured(2, failed=True), measured(1)) == {"runs": "better"}


def test_few_rounds_decide_nothing():
    one, other = measured(1), measured(2, speed=0.5)
    few = [replace(x, rows=(replace(x.rows[0], runs=x.rows[0].runs[:3]),)) for x in (one, other)]
    assert verdicts(*few)["decode, tokens/s"] == "undecided"


def test_other_texts_are_not_compared():
    b = measured(2, kld=3)
    b = replace(b, rows=(replace(b.rows[0], quality=replace(b.rows[0].quality, tokens=99)), b.rows[1]))
    assert verdicts(measured(1), b)["KL divergence, nats"] == "undecided"


def test_the_command_is_a_gate(tmp_path):
    for name, b in (("a", measured(1)), ("same", measured(2)), ("slow", measured(2, speed=0.9))):
        write_benchmark(tmp_path / f"{name}.json", b)
    good = run_here("phi-bench", "compare", tmp_path / "a.json", tmp_path / "same.json")
    assert good.returncode == 0, good.stderr
    bad = run_here("phi-bench", "compare", tmp_path / "a.json", tmp_path / "slow.json")
    assert bad.returncode == 1
    assert "decode, tokens/s" in bad.stderr.splitlines()[-1]
    other = run_here("phi-bench", "compare", tmp_path / "a.json", tmp_path / "none.json")
    assert other.returncode == 2


def changed(b, **fields):
    return replace(b, rows=(replace(b.rows[0], **fields), *b.rows[1:]))


def test_one_noisy_probe_hides_no_regression():
    b = measured(2, speed=0.5)
    runs = b.rows[0].runs
    low = replace(runs[4], conditions=replace(runs[4].conditions, bandwidth=5e9))
    assert verdicts(measured(1), changed(b, runs=(*runs[:4], low)))["decode, tokens/s"] == "worse"


def test_another_way_of_measuring_is_not_compared():
    b = measured(2, speed=0.5, peak=900_000_000)
    for other in (
        changed(b, configuration=replace(b.rows[0].configuration, threads=4)),
        changed(b, configuration=replace(b.rows[0].configuration, kv="q8_0")),
        replace(b, settings=replace(b.settings, prompt_tokens=99)),
        replace(b, host=replace(b.host, cpu="another")),
    ):
        found = verdicts(measured(1), other)
        assert found["decode, tokens/s"] == found["peak memory"] == "undecided"


def test_quality_is_of_one_text_and_checkpoint():
    b = replace(measured(2, kld=2), settings=replace(LAPTOP.settings, text_sha256="b" * 64))
    assert verdicts(measured(1), b)["KL divergence, nats"] == "undecided"
    assert verdicts(measured(1), changed(measured(2), quality=None))["quality"] == "worse"


def test_what_is_not_measured_any_more_is_worse():
    b = measured(2)
    runs = tuple(replace(r, phases=()) for r in b.rows[0].runs)
    assert verdicts(measured(1), changed(b, runs=runs))["decode, tokens/s"] == "worse"
    late = (*b.rows[0].runs[:4], replace(b.rows[0].runs[4], failure=LAPTOP.rows[1].runs[0].failure))
    assert verdicts(measured(1), changed(b, runs=late)) == {"runs": "worse"}
    assert [c.verdict for c in compare(measured(1), replace(b, rows=()))] == ["worse", "worse"]


def test_a_slower_row_on_a_busy_machine_is_undecided():
    b = measured(2, speed=0.5)
    runs = tuple(replace(r, conditions=replace(r.conditions, others=0.5)) for r in b.rows[0].runs)
    (decode,) = [c for c in compare(measured(1), changed(b, runs=runs)) if c.what == "decode, tokens/s"]
    assert decode.verdict == "undecided"
    assert "other programs" in decode.note


def test_an_incomplete_result_is_refused():
    with pytest.raises(BenchmarkError, match="the second result is not complete"):
        compare(measured(1), replace(measured(2), complete=False))


def beside(result, seed, machine=1.0):
    """With a row of llama-bench, which a slow machine meets as the others."""
    rng = np.random.default_rng(seed)
    row = result.rows[0]
    runs = tuple(
        replace(
            r,
            phases=tuple(
                replace(p, first_token_ns=None, token_ns=(), decode_tokens=8, decode_ns=int(1e8 * machine * noise))
                for p in r.phases
            ),
        )
        for r in row.runs
        for noise in [rng.normal(1, 0.02)]
    )
    configuration = replace(row.configuration, adapter="llama-bench", engine="llama-bench")
    control = replace(row, name="control", configuration=configuration, runs=runs, quality=None)
    return replace(result, rows=(*result.rows, control))


def test_a_row_of_another_engine_tells_the_machine_from_the_program():
    found = compare(beside(measured(1), 3), beside(measured(2, drift=1.5), 4, 1.5))
    (speed,) = [c for c in found if c.what == "decode, tokens/s" and c.row == LAPTOP.rows[0].name]
    assert speed.verdict == "same" and "beside control" in speed.note
    found = compare(beside(measured(1), 3), beside(measured(2, drift=1.5, speed=0.9), 4, 1.5))
    (speed,) = [c for c in found if c.what == "decode, tokens/s" and c.row == LAPTOP.rows[0].name]
    assert speed.verdict == "worse" and speed.ratio == pytest.approx(0.9, abs=0.03)


def test_a_control_of_another_version_is_none():
    after = beside(measured(2, drift=1.5), 4, 1.5)
    control = after.rows[-1]
    changed = replace(control, configuration=replace(control.configuration, versions={"llama.cpp": "other"}))
    found = compare(beside(measured(1), 3), replace(after, rows=(*after.rows[:-1], changed)))
    assert not any("beside" in c.note for c in found)
