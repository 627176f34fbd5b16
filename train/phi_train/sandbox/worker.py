"""A process that forks two confined children for each program: one runs it, the other its tests. Standard library only.

Reads a job per line of stdin and writes an outcome per line of stdout, both JSON. The tests' child alone can write the
verdict; the program's child has pipes for the values of calls and for what it prints.
"""

import json
import os
import resource
import select
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any

from phi_train.sandbox.confine import confine, readable
from phi_train.sandbox.values import decode, encode

_LINE = 16 << 20  # bytes of a value
_TAIL = 2000  # characters of a message
_HOME = str(Path(__file__).resolve().parents[2])  # where phi_train lies, which is no business of programs


class _Gone(BaseException):
    """The program's child has ended."""


class _UnloadableError(BaseException):
    """The program does not define its function."""


def main() -> None:
    """Until stdin ends. With the argument `bare` nothing but what programs may read is there: see `in_namespaces`."""
    paths = None if sys.argv[1:] == ["bare"] else readable()
    for line in sys.stdin.buffer:
        outcome = _run(json.loads(line), paths)
        sys.stdout.buffer.write(json.dumps(outcome).encode() + b"\n")
        sys.stdout.buffer.flush()


def _run(job: dict[str, Any], paths: list[str] | None) -> dict[str, Any]:
    began = time.monotonic()
    calls, answers, printed, verdict = os.pipe(), os.pipe(), os.pipe(), os.pipe()
    program = os.fork()
    if program == 0:
        _child(lambda: _run_program(job), [calls[0], answers[1]], printed[1], job, paths)
    tests = os.fork()
    if tests == 0:
        _child(lambda: _run_tests(job), [calls[1], answers[0], verdict[1]], None, job, paths)
    for fd in (*calls, *answers, printed[1], verdict[1]):
        os.close(fd)
    said, why = _watch(job, program, printed[0], verdict[0], began)
    for pid in (program, tests):
        os.kill(pid, signal.SIGKILL)
    (_, ended), _ = os.waitpid(program, 0), os.waitpid(tests, 0)
    os.close(printed[0])
    os.close(verdict[0])
    return {**_judge(said, why, ended), "seconds": time.monotonic() - began}


def _watch(job: dict[str, Any], program: int, printed: int, verdict: int, began: float) -> tuple[bytes, str]:
    """The verdict's line; and why it was not waited for, "" where it was."""
    said, output, open_fds = b"", 0, [printed, verdict]
    while verdict in open_fds:
        left = began + job["seconds"] - time.monotonic()
        if left <= 0:
            return b"", "timeout"
        for fd in select.select(open_fds, [], [], left)[0]:
            piece = os.read(fd, 1 << 16)
            if not piece:
                open_fds.remove(fd)
            elif fd == verdict:
                said += piece
            else:
                output += len(piece)
                if output > job["output"]:
                    return b"", "output"
    return said, ""


def _judge(said: bytes, why: str, ended: int) -> dict[str, Any]:
    if why:
        return {"kind": why, "message": {"timeout": "ran too long", "output": "printed too much"}[why]}
    if not said:
        return {"kind": "error", "message": "the tests ended without a verdict"}
    try:  # tests that a model wrote may write anything
        found: dict[str, Any] = json.loads(said)
        found = {"kind": str(found["kind"]), "message": str(found["message"])}
    except (ValueError, TypeError, KeyError, RecursionError):
        found = {"kind": "", "message": ""}
    if found["kind"] not in ("passed", "failed", "error", "memory", "gone"):
        return {"kind": "error", "message": "the tests wrote no verdict"}
    if found["kind"] == "gone":  # the tests' child saw the program's end; how it ended is known here
        found = {"kind": "error", "message": f"the program ended ({_ending(ended)})"}
        if os.WIFSIGNALED(ended) and os.WTERMSIG(ended) == signal.SIGXCPU:
            found["kind"] = "timeout"
    return found


def _ending(status: int) -> str:
    return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"code {os.WEXITSTATUS(status)}"


def _child(work: Any, pipes: list[int], printed: int | None, job: dict[str, Any], paths: list[str] | None) -> None:
    """Never returns. The pipes become 3, 4 and so on; nothing else of the worker stays open."""
    try:
        nothing = os.open("/dev/null", os.O_RDWR)
        out = nothing if printed is None else printed
        moved = [os.dup2(fd, 100 + n) for n, fd in enumerate((nothing, out, out, *pipes))]  # out of each other's way
        for n, fd in enumerate(moved):
            os.dup2(fd, n)
        os.closerange(len(moved), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        os.chdir("/")
        os.environ.clear()
        sys.path.remove(_HOME)
        confine(paths, job["memory"], int(job["seconds"]) + 1)
        work()
    except BaseException:
        os._exit(3)
    os._exit(0)


def _run_program(job: dict[str, Any]) -> None:
    """Load the program and answer calls of its function: `[args, kwargs]` in, what came of them out."""
    calls, answers = os.fdopen(3, "rb"), os.fdopen(4, "wb", buffering=0)
    space = _module("__main__")

    def reply(kind: str, value: Any) -> None:
        try:
            line = encode([kind, value])
        except (ValueError, RecursionError) as e:
            line = encode(["raised", ("ValueError", f"what it returned {e}")])
        answers.write(line + b"\n")

    try:
        exec(compile(job["program"], "<program>", "exec"), space)  # noqa: S102, what this process is for
        function = space[job["entry"]]
        if not callable(function):
            raise TypeError(f"{job['entry']} is no function")
    except BaseException as e:
        return reply("unloadable", _described(e))
    reply("loaded", None)
    for line in calls:
        args, kwargs = decode(line)
        try:
            found = function(*args, **kwargs)
        except BaseException as e:
            reply("raised", _described(e))
        else:
            reply("returned", found)


def _described(e: BaseException) -> tuple[str, str]:
    return type(e).__name__, str(e)[:_TAIL]


def _run_tests(job: dict[str, Any]) -> None:
    """Run `check(candidate)` with a function that asks the program's child; write the verdict."""
    calls, answers, verdict = os.fdopen(3, "wb", buffering=0), os.fdopen(4, "rb"), os.fdopen(5, "wb", buffering=0)

    def answer() -> tuple[str, Any]:
        line = answers.readline(_LINE)
        if not line.endswith(b"\n"):
            raise _Gone
        kind, value = decode(line)
        return kind, value

    def candidate(*args: Any, **kwargs: Any) -> Any:
        try:
            calls.write(encode([list(args), kwargs]) + b"\n")
        except BrokenPipeError:
            raise _Gone from None
        kind, value = answer()
        if kind == "returned":
            return value
        name, message = value
        raised = getattr(__import__("builtins"), str(name), None)
        if not (isinstance(raised, type) and issubclass(raised, Exception)):
            raised = RuntimeError
        try:
            error = raised(message)
        except Exception:  # such as UnicodeDecodeError, which wants more
            error = RuntimeError(f"{name}: {message}")
        error.__dict__["from_program"] = name
        raise error

    try:
        kind, value = answer()
        if kind != "loaded":
            raise _UnloadableError(f"{value[0]}: {value[1]}")
        space = _module("tests")
        # The prompt's other functions are the tests' to use; its own one is the program's.
        check: Any = None
        for source in (job["prompt"], job["tests"]):
            exec(compile(source, "<tests>", "exec"), space)  # noqa: S102
            check = space.get("check")  # which may be the name of the program's function too
            space[job["entry"]] = candidate
        check(candidate)
        found = {"kind": "passed", "message": ""}
    except _Gone:
        found = {"kind": "gone", "message": ""}
    except _UnloadableError as e:
        found = {"kind": "memory" if str(e).startswith("MemoryError") else "error", "message": str(e)[:_TAIL]}
    except BaseException as e:
        from_program = e.__dict__.get("from_program") if hasattr(e, "__dict__") else None
        kind = "memory" if from_program == "MemoryError" else "error" if from_program else "failed"
        found = {"kind": kind, "message": f"{from_program or type(e).__name__}: {e}"[:_TAIL]}
    verdict.write(json.dumps(found).encode())


def _module(name: str) -> dict[str, Any]:
    """The names of a new module, which is to be found by its name as a program may expect."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    return module.__dict__


if __name__ == "__main__":
    main()
