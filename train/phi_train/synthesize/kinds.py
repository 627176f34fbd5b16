"""What the kinds of synthetic documents have in common."""

from typing import Any, Protocol

from phi_runtime.contract import Contract
from phi_train.sandbox.run import Job
from phi_train.teacher.endpoint import Request


class Draft(Contract, frozen=True):
    """A document that a reply holds. fields: of its line beside `id` and `text`. job: to be passed, before it is kept.

    must_fail: a job that is not to be passed. topic: what documents are counted by.
    """

    text: str
    fields: dict[str, Any]
    topic: str
    job: Job | None = None
    must_fail: Job | None = None


class RejectedError(ValueError):
    """A reply that holds no document; its message is a reason, which replies are counted by."""


class Kind(Protocol):
    """Of documents; all it draws is a pure function of the seed and the document's number.

    instructs: whether its documents are written as instructions as well, see `stories.instruction`.
    """

    name: str
    instructs: bool

    def request(self, number: int) -> Request:
        """What to ask a teacher for."""
        ...

    def simulated(self, number: int) -> str:
        """What a teacher might have replied."""
        ...

    def draft(self, number: int, reply: str) -> Draft:
        """The document that a reply holds. Raises RejectedError."""
        ...


def code_blocks(reply: str) -> list[str]:
    """The fenced blocks of Python in a text."""
    blocks: list[str] = []
    lines: list[str] = []
    inside = False
    for line in reply.splitlines():
        fence = line.strip()
        if fence.startswith("```"):
            if inside:
                blocks.append("\n".join(lines) + "\n")
                inside, lines = False, []
            else:
                inside = fence[3:].strip().lower() in ("python", "py", "python3", "")
            continue
        if inside:
            lines.append(line)
    return blocks
