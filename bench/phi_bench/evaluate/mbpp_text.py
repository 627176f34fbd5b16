"""MBPP as its paper puts it (arXiv:2108.07732): a task in words, three assertions, three solved tasks before it.

The prompt's words are the paper's (figure 1 and section 2.1), as lm-eval's task has them; problems 2, 3 and 4 are the
examples, 11 to 510 the test set. The file is google-research's `mbpp.jsonl`, or its array `sanitized-mbpp.json`.
"""

import ast
import re
import textwrap

import msgspec

from phi_bench.evaluate.code_problem import Post, Problem, in_block
from phi_runtime.contract import Contract
from phi_runtime.errors import BenchmarkError
from phi_train.sandbox.run import Job

_EXAMPLES = (2, 3, 4)
_TESTED = range(11, 511)
_END = "[DONE]"


class _Row(Contract, frozen=True):
    task_id: int
    code: str
    test_list: tuple[str, ...]
    text: str = ""
    prompt: str = ""  # `text` of the sanitized file
    test_setup_code: str = ""
    test_imports: tuple[str, ...] = ()

    def asked(self) -> str:
        tests = "\n".join(self.test_list)
        task = (self.text or self.prompt).strip()
        return (
            f"You are an expert Python programmer, and here is your task: {task} "
            f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
        )


class TextProblem(Problem, frozen=True):
    """`prompt` holds the examples too, and is no program. question: the task and its assertions alone."""

    question: str

    @property
    def stops(self) -> tuple[str, ...]:
        """The form itself says where a program ends."""
        return (_END,)

    def job(self, completion: str, post: Post, chat: bool) -> Job:
        """The program is all that was written, up to `[DONE]`."""
        program = in_block(completion) if chat else completion
        return Job(program.split(_END)[0] if post == "function" else program, self.entry_point, self.test)

    def chat_message(self) -> str:
        """What a chat model is asked."""
        return f"{self.question}\nAnswer with the whole program in one block of code."


def read_mbpp_text(lines: list[bytes], where: str) -> list[Problem]:
    """The test set's problems, of the file's lines. Raises BenchmarkError naming the line, or what is missing."""
    if lines and lines[0].strip().startswith(b"["):  # the sanitized file, an array over many lines
        try:
            parts = [bytes(raw) for raw in msgspec.json.decode(b"\n".join(lines), type=list[msgspec.Raw])]
        except ValueError as e:
            raise BenchmarkError(f"{where}: {e}; give mbpp.jsonl or sanitized-mbpp.json") from None
        name = "problem"
    else:
        parts, name = lines, "line"
    rows: dict[int, _Row] = {}
    for n, part in enumerate(parts, 1):
        if part.strip():
            row = _row(part, f"{where}: {name} {n}")
            if row.task_id in rows:
                raise BenchmarkError(f"{where}: {name} {n}: holds task_id {row.task_id} a second time")
            rows[row.task_id] = row
    if missing := [str(n) for n in _EXAMPLES if n not in rows]:
        raise BenchmarkError(f"{where}: lacks the examples (task_id {', '.join(missing)}); give the whole file")
    shots = "".join(f"{rows[n].asked()}{rows[n].code.strip()}\n{_END}\n\n" for n in _EXAMPLES)
    return [_problem(row, shots, where) for number, row in sorted(rows.items()) if number in _TESTED]


def _row(part: bytes, where: str) -> _Row:
    try:
        row = msgspec.json.decode(part, type=_Row)
    except ValueError as e:
        raise BenchmarkError(f"{where}: {e}; a problem has task_id, text, code and test_list") from None
    if not (row.text or row.prompt).strip() or not row.test_list:
        raise BenchmarkError(f"{where}: has no text or no tests; give mbpp.jsonl or sanitized-mbpp.json")
    return row


def _problem(row: _Row, shots: str, where: str) -> Problem:
    body = "\n".join(row.test_list)
    first = "\n".join((row.test_setup_code, *row.test_imports))
    return TextProblem(
        task_id=f"MBPP/{row.task_id}",
        prompt=shots + row.asked(),
        entry_point=_tested(row, where),
        test=f"{first}\ndef check(candidate):\n{textwrap.indent(body, '    ')}\n",
        question=row.asked().removesuffix("\n[BEGIN]\n"),
    )


def _tested(row: _Row, where: str) -> str:
    """The function that the assertions call and the solution defines; a program is asked for its values alone."""
    defined = set(re.findall(r"^def\s+(\w+)", row.code, re.MULTILINE))
    try:
        called = [n for n in ast.walk(ast.parse("\n".join(row.test_list))) if isinstance(n, ast.Call)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise BenchmarkError(f"{where}: task_id {row.task_id}: its tests are no Python; fetch it again") from None
    names = {n.func.id for n in called if isinstance(n.func, ast.Name)} & defined
    if len(names) != 1:
        raise BenchmarkError(
            f"{where}: task_id {row.task_id}: its tests call {len(names)} of its functions; 1 can be run"
        )
    return names.pop()
