"""Each figure's definition, on samples whose answer is known."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from phi_bench import figures, stats
from phi_bench.records import Phase, Run, read_benchmark

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def laptop():
    return read_benchmark(GOLDEN / "laptop.json")


def run(*phases, number=1, **fields):
    return Run(number, "", phases=phases, **fields)


def row_of(b, *runs):
    return msgspec.structs.replace(b.rows[0], runs=runs)


def test_decode_leaves_the_first_token_out():
    phase = Phase(0, 256, first_token_ns=9_000_000_000, token_ns=(100_000_000,) * 10)
    assert figures.decode_rate(phase) == pytest.approx(10)


def test_decode_of_a_sum_of_times():
    assert figures.decode_rate(Phase(256, 0, decode_ns=2_000_000_000, decode_tokens=64)) == pytest.approx(32)


def test_prefill_takes_off_what_one_token_takes():
    one = Phase(0, 1, first_token_ns=100_000_000, token_ns=(1,))
    prompt = Phase(0, 101, first_token_ns=600_000_000, token_ns=(1,))
    assert figures.prefill_rate(prompt, run(one, prompt)) == pytest.approx(200)
    assert figures.prefill_rate(prompt, run(prompt)) is None  # nothing to take off
    assert figures.prefill_rate(Phase(0, 100, prefill_ns=500_000_000), run()) == pytest.approx(200)


def test_depth_counts_the_prompt():
    assert figures.decode_depth(Phase(1000, 24)) == 1024


def test_failed_runs_do_not_count(laptop):
    assert figures.decode(laptop.rows[1]) is None
    assert len(figures.good_runs(laptop.rows[0])) == 5


def test_cold_and_warm_loads_are_apart(laptop):
    row = laptop.rows[0]
    assert len(figures.load(row, True).rounds) == 1
    assert len(figures.load(row, False).rounds) == 4


def test_a_token_reads_weights_and_cache(laptop):
    row, model = laptop.rows[0], laptop.models[0]
    assert figures.read_per_token(row, model, 0) == model.read_bytes
    assert figures.read_per_token(row, model, 512) == model.read_bytes + 512 * model.kv_numbers * 2
    assert figures.roof_share(row, laptop) == pytest.approx(
        figures.decode(row).value * figures.read_per_token(row, model, 256) / 40e9
    )


def test_percentiles_are_over_all_rounds(laptop):
    times = [t / 1e6 for r in laptop.rows[0].runs for t in r.phases[1].token_ns]
    assert figures.latencies(laptop.rows[0]) == pytest.approx(tuple(np.quantile(times, [0.5, 0.95, 0.99])))


def test_an_unknown_cache_leaves_the_share_open(laptop):
    row = laptop.rows[0]
    other = msgspec.structs.replace(row, configuration=msgspec.structs.replace(row.configuration, kv=None))
    assert figures.read_per_token(other, laptop.models[0], 256) is None
    assert figures.roof_share(other, laptop) is None


def test_a_program_that_tells_sums_is_read_at_the_depth_of_the_prompt():
    bench = run(
        Phase(0, 400, prefill_ns=1_000_000_000),
        Phase(1, 0, decode_ns=1_000_000_000, decode_tokens=50),
        Phase(400, 0, decode_ns=1_000_000_000, decode_tokens=40),
    )
    assert figures.decode_rate(figures.at(bench, None)) == pytest.approx(40)


def test_a_depth_that_is_missing_is_said(laptop):
    assert figures.doubts(laptop.rows[0], (256,)) == ()
    assert "after 4096 tokens" in figures.doubts(laptop.rows[0], (256, 4096))[0]


def test_a_ratio_is_of_rounds_that_both_have(laptop):
    slow = lambda n, ns: run(Phase(0, 8, first_token_ns=1, token_ns=(ns,)), number=n)  # noqa: E731
    a, b = row_of(laptop, slow(1, 10), slow(2, 40)), row_of(laptop, slow(1, 20), slow(2, 80), slow(3, 5))
    found = figures.ratio(a, b)
    assert found.rounds == (2.0, 2.0)
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)


def test_what_disturbed_a_row_is_said(laptop):
    row = laptop.rows[0]
    assert figures.doubts(row) == ()
    busy = msgspec.structs.replace(row.runs[0].conditions, others=0.4, steal=0.05)
    noisy = row_of(laptop, msgspec.structs.replace(row.runs[0], conditions=busy), *row.runs[1:])
    assert len(figures.doubts(noisy)) == 2
    apart = [run(Phase(0, 8, first_token_ns=1, token_ns=(t,)), number=i) for i, t in enumerate((10, 20, 30, 40), 1)]
    assert "apart" in figures.doubts(row_of(laptop, *apart))[0]
    assert figures.doubts(row_of(laptop, row.runs[0])) == ("measured once",)


def test_an_interval_holds_the_truth():
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(300):
        low, high = stats.interval(rng.normal(10, 1, 8))
        held += low <= 10 <= high
    assert held >= 270


def test_equal_sides_are_rarely_told_apart():
    """Five rounds against five: what a gate in CI may cry wolf at."""
    rng = np.random.default_rng(2)
    cried = 0
    for _ in range(300):
        low, high = stats.interval(rng.normal(10, 0.3, 5), rng.normal(10, 0.3, 5))
        cried += not low <= 1 <= high
    assert cried <= 9


def test_a_planted_tenth_is_seen():
    rng = np.random.default_rng(3)
    for _ in range(50):
        low, high = stats.interval(rng.normal(9, 0.2, 5), rng.normal(10, 0.2, 5))
        assert high < 1
        assert low > 0.75


def test_an_interval_is_the_same_every_time():
    assert stats.interval([1, 2, 3, 9], [2, 2, 4, 5]) == stats.interval([1, 2, 3, 9], [2, 2, 4, 5])
    assert stats.interval([5.0]) == (5.0, 5.0)


def test_ranks_are_judged_as_the_tables_of_mann_and_whitney_have_it():
    from phi_bench.stats import _critical, change

    expected = {(3, 3): None, (4, 4): 0, (5, 5): 2, (5, 8): 6, (8, 8): 13, (10, 10): 23, (20, 20): 127}
    assert {pair: _critical(*pair) for pair in expected} == expected
    middle, low, high = change([10, 11, 12, 13, 14], [20, 22, 24, 26, 28])
    assert low < middle < high and middle == pytest.approx(2, abs=0.1)
    assert change([1, 2, 3], [1, 2, 3]) is None


def test_a_tenth_is_seen_in_24_noisy_rounds_and_nothing_where_nothing_is():
    from phi_bench.stats import change

    seen = wrong = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        before, same, slower = (rng.normal(1, 0.1, 24) * speed for speed in (1, 1, 0.9))
        seen += change(before, slower)[2] < 1
        _, low, high = change(before, same)
        wrong += not low < 1 < high
    assert seen >= 16
    assert wrong <= 2
