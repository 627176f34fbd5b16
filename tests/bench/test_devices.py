"""Devices, phones' results and claims: what is believed, what is kept out, what is not measured yet."""

import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import msgspec
import pytest
from support import free_port, run_here

from phi_bench.collect import MOST_BYTES, take
from phi_bench.devices import devices, find_device, published, roof_tps
from phi_bench.records import read_benchmark
from phi_bench.results.claims import MINI, NOT_YET, claims
from phi_bench.results.write import write_benchmark
from phi_runtime.contract import encode
from phi_runtime.errors import BenchmarkError, OutputExistsError
from phi_runtime.planning.memory import DEVICES

GOLDEN = Path(__file__).parent / "golden"
PHONE, LAPTOP = (read_benchmark(GOLDEN / f"{name}.json") for name in ("phone", "laptop"))
replace = msgspec.structs.replace


def test_every_figure_has_a_source_and_a_date():
    for d in devices():
        for figure in (d.bandwidth, d.memory, d.app_limit, d.app_limit_increased):
            assert figure is None or (len(figure.source) > 8 and figure.date.startswith("20"))
        assert 5e9 < d.bandwidth.value < 1e12
        assert 3e9 < d.memory.value < 2e11
    names = [i for d in devices() for i in (d.name, *d.identifiers)]
    assert len(names) == len(set(names))
    assert all(p.source and p.date for p in published())


def test_the_limits_are_those_that_plan_holds_a_model_to():
    (phone,) = [d for d in devices() if d.name == "iPhone 14 Pro"]
    assert phone.app_limit.value == DEVICES["iphone-14-pro"]
    assert phone.app_limit_increased.value == DEVICES["iphone-14-pro-increased"]


def test_the_roof_is_bandwidth_over_bytes_read():
    d, model = find_device(PHONE.host), PHONE.models[0]
    assert d.name == "iPhone 14 Pro"
    assert roof_tps(d, model) == pytest.approx(51.2e9 / model.read_bytes)
    assert roof_tps(d, model, 1024) < roof_tps(d, model)


def faster(b, times):
    phases = [replace(p, token_ns=tuple(max(1, t // times) for t in p.token_ns)) for p in b.rows[0].runs[0].phases]
    run = replace(b.rows[0].runs[0], phases=tuple(phases))
    return replace(b, rows=(replace(b.rows[0], runs=(run,)),))


def test_a_result_of_a_known_phone_is_kept(tmp_path):
    taken = take(encode(PHONE).encode(), tmp_path, "x")
    assert taken.known
    assert not taken.kept_out
    assert read_benchmark(taken.path) == PHONE
    with pytest.raises(OutputExistsError):
        take(encode(PHONE).encode(), tmp_path, "x")


def test_a_figure_above_the_roof_is_kept_out_and_named(tmp_path):
    taken = take(encode(faster(PHONE, 10)).encode(), tmp_path, "x")
    ((row, why),) = taken.kept_out
    assert row == PHONE.rows[0].name
    assert "51.2 GB/s" in why
    (kept,) = read_benchmark(taken.path).rows
    assert kept.runs[0].phases == ()
    assert "above the roof" in kept.runs[0].failure.detail


def test_a_small_number_of_bytes_does_not_raise_the_roof(tmp_path):
    small = replace(PHONE.models[0], read_bytes=1)
    assert take(encode(replace(faster(PHONE, 10), models=(small,))).encode(), tmp_path, "x").kept_out


def test_an_unknown_device_stands_apart(tmp_path):
    other = replace(PHONE, host=replace(PHONE.host, device="iPhone99,9"))
    taken = take(encode(other).encode(), tmp_path, "x")
    assert not taken.known
    assert taken.path.parent.name == "unverified"


@pytest.mark.parametrize(
    "raw",
    [b"", b"{}", b"[1]", b"\xff\xfe", b'{"schema_version": 99}', b"x" * (MOST_BYTES + 1), b"[" * 100_000,
     encode(PHONE).encode().replace(b'"peak_rss": 1950000000', b'"peak_rss": 99000000000'),
     encode(PHONE).encode().replace(b'"round": 1', b'"round": -1')],
    ids=range(9),
)  # fmt: skip
def test_what_is_no_result_is_refused(raw, tmp_path):
    with pytest.raises(BenchmarkError):
        take(raw, tmp_path, "x")
    assert not list(tmp_path.rglob("*.json"))


def test_a_name_does_not_lead_out_of_the_folder(tmp_path):
    bad = replace(PHONE, host=replace(PHONE.host, device="../../etc/x"), created="../y")
    taken = take(encode(bad).encode(), tmp_path / "in", "x")
    assert taken.path.parent == tmp_path / "in" / "unverified"


def collecting(folder, port):
    command = [Path(sys.executable).parent / "phi-bench", "collect", "--out", folder, "--port", port]
    pipe = subprocess.PIPE
    return subprocess.Popen(list(map(str, command)), stdout=pipe, stderr=pipe, text=True)


def said(process):
    """What it says below its QR code: where to POST, and the code."""
    for line in process.stdout:
        if found := re.search(r"POST the result to (http://\S+) with the code (\w+): ", line):
            return found.groups()
    raise AssertionError(process.stderr.read())


def post(port, code, body):
    request = urllib.request.Request(f"http://127.0.0.1:{port}/result", body, {"Authorization": f"Bearer {code}"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as e:
        return e.code, json.load(e)


@pytest.mark.integration
def test_over_http_the_code_is_good_once(tmp_path):
    port = free_port()
    with collecting(tmp_path, port) as process:
        address, code = said(process)
        assert address == f"http://127.0.0.1:{port}/result"
        for _ in range(200):
            try:
                assert post(port, "wrong", b"{}")[0] == 401
                break
            except urllib.error.URLError:
                time.sleep(0.05)
        assert post(port, code, b"{}")[0] == 422
        assert post(port, code, b"x" * (MOST_BYTES + 1))[0] == 413
        status, answer = post(port, code, encode(PHONE).encode())
        assert (status, answer["device"], answer["known"]) == (200, "iPhone 14 Pro", True)
        assert process.wait(10) == 0
    assert len(list(tmp_path.glob("*.json"))) == 1


@pytest.mark.integration
def test_a_code_cannot_be_guessed_for_long(tmp_path):
    port = free_port()
    with collecting(tmp_path, port) as process:
        said(process)
        seen = []
        while len(seen) < 5:
            try:
                seen.append(post(port, "wrong", b"{}")[0])
            except urllib.error.URLError:
                time.sleep(0.05)
        assert set(seen) == {401}
        assert process.wait(10) == 2


def test_claims_say_what_is_not_measured():
    assert all(value == NOT_YET for c in claims([]) for _, value, _ in c.metrics)
    report, speed, ours = claims([PHONE])
    assert {m: v for m, v, _ in report.metrics}["charged to the app, iPhone 14 Pro"].startswith("0.460 GB")
    assert speed.measured
    assert not ours.measured
    laptop = claims([LAPTOP])
    assert not laptop[1].measured
    assert [v for m, v, _ in laptop[2].metrics if m == "gguf: file"] == ["1.800 GB (1.676 GiB)"]
    small = replace(LAPTOP, models=(replace(LAPTOP.models[0], parameters=MINI // 2),))
    assert not any(value != NOT_YET for c in claims([small]) for _, value, _ in c.metrics)


def test_the_commands(tmp_path):
    write_benchmark(tmp_path / "phone.json", PHONE)
    done = run_here("phi-bench", "collect", "--out", tmp_path / "kept", "--file", tmp_path / "phone.json")
    assert done.returncode == 0, done.stderr
    assert "not measured yet" in run_here("phi-bench", "claim").stdout
    assert "arXiv 2404.14219" in run_here("phi-bench", "devices").stdout
    assert run_here("phi-bench", "collect", "--out", tmp_path, "--file", tmp_path / "none").returncode == 2
    assert run_here("phi-bench", "collect", "--out", tmp_path, "--port", 99999).returncode == 2
    assert run_here("phi-bench", "collect", "--out", tmp_path / "phone.json").returncode == 2
