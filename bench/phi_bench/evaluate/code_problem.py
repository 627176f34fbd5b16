"""A function to write: what a model is asked, and the program that its completion makes."""

import re
from typing import Literal

from phi_runtime.contract import Contract
from phi_train.sandbox.run import Job

Post = Literal["none", "function"]
# Where a completion has surely left its function; ends generation early.
STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\nassert ", "\n```", "\nfrom ", "\nimport ")

_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)


class Problem(Contract, frozen=True):
    """A function to write: `prompt` ends with its docstring, `test` defines `check(candidate)`."""

    task_id: str
    prompt: str
    entry_point: str
    test: str

    @property
    def stops(self) -> tuple[str, ...]:
        """Where a completion is surely over."""
        return STOPS

    def job(self, completion: str, post: Post, chat: bool) -> Job:
        """What is to be run for a completion."""
        if chat:
            # The whole function is in the answer, what it needs of the task before it.
            program = f"{self.prompt}\n\n{in_block(completion)}"
        else:
            program = self.prompt.rstrip() + "\n" + (first_function(completion) if post == "function" else completion)
        return Job(program, self.entry_point, self.test, self.prompt)

    def chat_message(self) -> str:
        """What a chat model is asked."""
        return (
            "Complete this Python function. Answer with the whole function in one block of code.\n\n"
            f"```python\n{self.prompt.strip()}\n```"
        )


def first_function(completion: str) -> str:
    """A completion up to where its function ends: the first text that is not indented."""
    lines = completion.split("\n")
    for n, line in enumerate(lines):
        if n and line.strip() and not line[0].isspace() and line[0] not in ")]}":
            return "\n".join(lines[:n])
    return completion


def in_block(answer: str) -> str:
    """The first block of code in an answer, or all of it where there is none."""
    found = _BLOCK.search(answer)
    return found[1] if found else answer
