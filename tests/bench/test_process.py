"""A measuring process and what can become of it: each real, each named."""

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from phi_bench.measure import host, process
from phi_bench.measure.job import Job
from phi_bench.measure.process import measure
from phi_bench.measure.worker import BadOutputError, _phase

pytestmark = pytest.mark.integration
JOB = Job("speed", "none", "phi-run", "llama.cpp", 1, 64, prompt_tokens=8, decode_tokens=2)


def program(tmp_path, body):
    """A worker that speaks the protocol as badly as `body` does."""
    path = tmp_path / "worker.py"
    head = "import json, os, signal, sys, time\nout = os.fdopen(int(sys.argv[1]), 'w')\n"
    says = "def say(**e):\n    print(json.dumps(e), file=out, flush=True)\njob = sys.stdin.readline()\n"
    path.write_text(head + says + textwrap.dedent(body))
    return (sys.executable, str(path))


@pytest.mark.parametrize(
    ("body", "reason", "status", "signal", "detail"),
    [
        ("time.sleep(60)", "timed out", None, "SIGKILL", "after 1 s"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "crashed", None, "SIGSEGV", "SIGSEGV"),
        ("print('no such operator'); sys.exit(3)", "crashed", 3, None, "no such operator"),
        ("raise MemoryError", "out of memory", 1, None, "MemoryError"),
        ("sys.exit(0)", "crashed", 0, None, "it said nothing"),
        ("x = b'x' * 300_000_000; time.sleep(60)", "out of memory", None, "SIGKILL", "limit of 200,000,000"),
        ("say(kind='failure', reason='unsupported', detail='is damaged')", "unsupported", None, None, "is damaged"),
    ],
)  # fmt: skip
def test_a_failure_has_its_reason(body, reason, status, signal, detail, tmp_path):
    found = measure(JOB, 1 if body.startswith("time") else 20, 200_000_000, program(tmp_path, body))
    assert found.result is None
    f = found.failure
    assert (f.reason, f.exit_status, f.signal) == (reason, status, signal), f
    assert detail in f.detail


def test_children_count_and_are_ended(tmp_path):
    body = """
        import subprocess
        child = subprocess.Popen([sys.executable, "-c", "import time; x = b'x' * 150_000_000; time.sleep(60)"])
        print(child.pid, flush=True)
        open(sys.argv[0] + ".pid", "w").write(str(child.pid))
        time.sleep(2)
        say(kind="generated"); sys.stdin.readline()
        say(kind="result")
    """
    found = measure(JOB, 30, None, program(tmp_path, body))
    assert found.failure is None
    assert found.memory.generated.rss > 160_000_000
    assert found.memory.peak_rss > 160_000_000
    pid = int((tmp_path / "worker.py.pid").read_text())
    time.sleep(0.2)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_the_moments_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(process._Watch, "sample", lambda self: None)
    body = """
        say(kind="before"); sys.stdin.readline()
        x = b"x" * 100_000_000
        say(kind="loaded"); sys.stdin.readline()
        y = b"y" * 200_000_000
        del y
        say(kind="generated"); sys.stdin.readline()
        del x
        say(kind="unloaded"); sys.stdin.readline()
        say(kind="result", load_ns=5)
    """
    found = measure(JOB, 30, None, program(tmp_path, body))
    m = found.memory
    assert found.result.load_ns == 5
    assert m.before.rss < 50e6 < 100e6 < m.loaded.rss
    assert 0 < m.before.pss <= m.before.rss
    assert m.unloaded.rss < m.loaded.rss
    assert m.peak_rss > 300e6  # by the system's mark: no sample was taken in between


def test_peak_memory_is_the_programs_own(tmp_path):
    """Linux hands a new program its parent's peak; a fat parent must not show in the figure."""
    program(tmp_path, "say(kind='generated'); sys.stdin.readline(); say(kind='result')")
    script = f"""
        import sys
        from phi_bench.measure.job import Job
        from phi_bench.measure.process import measure
        ballast = bytearray(b"x") * 600_000_000
        job = Job("speed", "none", "phi-run", "llama.cpp", 1, 64)
        print(measure(job, 30, None, (sys.executable, {str(tmp_path / "worker.py")!r})).memory.peak_rss)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100e6


class Fake:
    vocab_size, context = 100, 64

    def __init__(self, tokens):
        self.tokens = tokens

    def generate(self, tokens, count):
        yield from self.tokens[:count]


@pytest.mark.parametrize("tokens", [[1, 2, 100], [1, -1, 2], [1, 2]])
def test_garbage_is_named(tokens):
    with pytest.raises(BadOutputError):
        _phase(Fake(tokens), 0, [1], 2)


def test_as_many_times_as_tokens():
    phase = _phase(Fake([1, 2, 3, 4]), 5, [1, 2], 3)
    assert (phase.depth, phase.prompt_tokens, len(phase.token_ns)) == (5, 2, 3)


@pytest.mark.skipif(sys.platform != "linux", reason="mincore is asked on Linux only")
def test_a_load_is_called_cold_only_if_the_pages_are_gone(tmp_path):
    path = Path(tmp_path) / "model.bin"
    path.write_bytes(b"x" * 20_000_000)
    assert host.residency([path]) > 0.99
    assert host.drop_cached([path]) == (host.residency([path]) < 0.01)
    path.read_bytes()
    assert host.residency([path]) > 0.99


def test_the_machine():
    h = host.host()
    assert h.read_bandwidth > 1e9
    assert h.cores >= 1
    watch = host.Watch(1)
    c = watch.conditions(0.0)
    assert 0 <= c.others <= 1
    assert c.swapped >= 0
