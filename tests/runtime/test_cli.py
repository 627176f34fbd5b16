"""The commands' common frame."""

import signal
import subprocess
import sys

import pytest

_COMMAND = """
import os
from phi_runtime.cli import run
from phi_runtime.errors import BundleError

def main(argv):
    try:
        os.kill(os.getpid(), {number})
    except BaseException as e:
        raise {raised} from e

run(main)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("raised", ["BundleError('no')", "SystemError('returned a result with an exception set')", "e"])
def test_a_signal_stays_one_whatever_a_library_makes_of_it(number, raised):
    command = _COMMAND.format(number=int(number), raised=raised)
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 128 + number
    assert done.stderr == "interrupted; nothing half-written was left behind\n"


_IMPORTED = """
import os, time
try:
    time.sleep({seconds})
except BaseException:
    os.abort()  # as a library does whose initialisation an exception passes through
"""


@pytest.mark.parametrize(("seconds", "code"), [(0.5, 143), (60, -signal.SIGABRT)])
def test_a_signal_waits_for_an_import_but_not_for_ever(seconds, code, tmp_path):
    (tmp_path / "library.py").write_text(_IMPORTED.format(seconds=seconds))
    (tmp_path / "command.py").write_text(
        "import os, signal, threading, time\n"
        "from phi_runtime import cli\n"
        "cli._IMPORT_PATIENCE = 40\n"
        "threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "def main(argv):\n    import library\n    time.sleep(60)\n"
        "cli.run(main)\n"
    )
    done = subprocess.run([sys.executable, tmp_path / "command.py"], capture_output=True, timeout=30, check=False)
    assert done.returncode == code, done.stderr


def test_an_error_of_our_own_making_keeps_its_traceback():
    command = "from phi_runtime.cli import run\nrun(lambda argv: 1 / 0)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr
