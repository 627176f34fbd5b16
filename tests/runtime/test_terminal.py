"""`phi-run chat` and `phi-run plan`, as processes."""

import os
import pty
import select
import signal
import subprocess
import time

from support import SCRIPTS, run

import phi_runtime


def test_a_conversation_from_a_pipe(bundles):
    done = run("phi-run", "chat", bundles / "gguf", "--max-tokens", 8, input="Hi\n\n/new\nHi\n/exit\n")
    assert done.returncode == 0, done.stderr
    half = len(done.stdout) // 2
    assert done.stdout[:half] == done.stdout[half:] and half > 4


def test_what_cannot_be_said_is_said_at_once(bundles):
    done = run("phi-run", "chat", bundles / "gguf", "--chat-format", "phi3-april", "--system", "be brief", input="Hi\n")
    assert done.returncode == 2 and "no place for the role 'system'" in done.stderr
    done = run("phi-run", "chat", bundles / "gguf", "--chat-format", "mistral")
    assert done.returncode == 2 and "choose from phi3" in done.stderr


def test_a_long_conversation_forgets_its_beginning(bundles):
    lines = "".join(f"this is line number {i} of a long talk about nothing\n" for i in range(12))
    done = run("phi-run", "chat", bundles / "gguf", "--max-tokens", 6, "--context", 90, input=lines)
    assert done.returncode == 0, done.stderr
    assert "no longer fit and are forgotten" in done.stderr


def test_ctrl_c_stops_the_answer_and_not_the_program(bundles):
    slow = bundles / "coreml"
    with phi_runtime.load(slow) as phi:  # something that it answers at length
        asked = next(t for t in ("def f(x):", "Hi", "import", "class A:", "a") if len(phi.chat(t).tokens) > 60)
    main, side = pty.openpty()
    process = subprocess.Popen(
        [SCRIPTS / "phi-run", "chat", slow], stdin=side, stdout=side, stderr=side, start_new_session=True
    )
    os.close(side)
    seen = b""

    def until(enough, seconds=60):
        nonlocal seen
        end = time.monotonic() + seconds
        while not enough():
            assert time.monotonic() < end, seen
            if select.select([main], [], [], 0.2)[0]:
                seen += os.read(main, 4096)

    echo = f"> {asked}\r\n".encode()
    until(lambda: seen.endswith(b"> "))
    os.write(main, asked.encode() + b"\n")
    until(lambda: echo in seen and len(seen.split(echo)[1]) > 2)
    process.send_signal(signal.SIGINT)
    until(lambda: b"[stopped]" in seen and seen.endswith(b"> "))
    assert process.poll() is None
    time.sleep(0.5)  # readline misses a signal between showing the prompt and waiting for keys
    process.send_signal(signal.SIGINT)  # at the prompt it leaves
    assert process.wait(20) == 130
    os.close(main)


def test_plan(bundles):
    done = run("phi-run", "plan", bundles / "gguf")
    assert done.returncode == 0 and "(weights)" in done.stdout and "GB allowed" in done.stdout
    done = run("phi-run", "plan", bundles / "gguf", "--device", "iphone-14-pro")
    assert done.returncode == 0 and "2.867 GB allowed" in done.stdout
    done = run("phi-run", "plan", bundles / "gguf", "--memory", "20MB")
    assert done.returncode == 2 and "does not fit" in done.stderr and "(weights)" in done.stderr
    done = run("phi-run", "plan", bundles / "gguf", "--device", "toaster")
    assert done.returncode == 2 and "iphone-14-pro" in done.stderr
    done = run("phi-run", "generate", bundles / "gguf", "--prompt", "x", "--memory", "20MB")
    assert done.returncode == 2 and "does not fit" in done.stderr
