"""Conversations as text: the formats that Phis were tuned on, compiled. No template engine runs here.

A checkpoint says its format as a Jinja template, which is a program from outside. The published ones are known by
their digests and stand below as data; any other is refused, and the caller may name the format that it means.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from phi_runtime.errors import ChatError, UsageError

Messages = Sequence[Mapping[str, str]]

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class ChatFormat:
    """How one revision writes a conversation.

    break_: what stands after a role's token and after the end of a turn. bos: whether the text begins with the
    tokenizer's first token. opens_reply: the user's turn opens the assistant's (April 2024), so that a reply has no
    role token of its own. roles: those that are written; others vanish in the original, and are refused here.
    empty_system: whether a system turn without content is written.
    """

    name: str
    break_: str = "\n"
    bos: bool = False
    opens_reply: bool = False
    roles: tuple[str, ...] = ROLES
    empty_system: bool = True

    def render(self, messages: Messages, bos_token: str = "") -> str:
        """The prompt for the next reply.

        Raises ChatError for a message that is malformed, or of a role that this format has no place for.
        """
        reply = "" if self.opens_reply else f"<|assistant|>{self.break_}"
        return self.conversation(messages, bos_token) + reply

    def conversation(self, messages: Messages, bos_token: str = "") -> str:
        """The messages alone, as they are learnt from. Raises ChatError as `render`."""
        turns = [self._turn(role, content) for role, content in map(_parts, messages)]
        if not turns:
            raise ChatError("the conversation is empty; give at least one message")
        return (bos_token if self.bos else "") + "".join(turns)

    def _turn(self, role: str, content: str) -> str:
        if role not in self.roles:
            raise ChatError(
                f"the chat format {self.name} has no place for the role {role!r}, only for {', '.join(self.roles)}; "
                "put it into a user's message"
            )
        if role == "system" and not content and not self.empty_system:
            return ""
        end = f"<|end|>{self.break_}"
        if not self.opens_reply:
            return f"<|{role}|>{self.break_}{content}{end}"
        if role == "user":
            return f"<|user|>{self.break_}{content}{end}<|assistant|>{self.break_}"
        return f"{content}{end}"


def _parts(message: Mapping[str, str]) -> tuple[str, str]:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise ChatError('a message is {"role": ..., "content": ...}, both of them text')
    return role, content


FORMATS = {
    f.name: f
    for f in (
        ChatFormat("phi3"),  # mini, July 2024; and the checkpoints that phi-train writes
        ChatFormat("phi3.5", empty_system=False),
        ChatFormat("phi3-april", bos=True, opens_reply=True, roles=("user", "assistant")),
        ChatFormat("phi3-medium", opens_reply=True, roles=("user", "assistant")),
        ChatFormat("phi3-small", bos=True),
        ChatFormat("phi4-mini", break_=""),
    )
}
# The first 16 hexadecimal digits of the SHA-256 of each template as published; the second is phi-train's own.
_TEMPLATES = {
    "dcaee66df77bfbb7": "phi3",
    "55cc5853f8b08be3": "phi3",
    "78d976a442bcde2f": "phi3.5",
    "268b6082ceb7176d": "phi3-april",
    "605841622bcb6572": "phi3-medium",
    "b0e53f5e7bae6fdb": "phi3-small",
    "febf589225c9728a": "phi4-mini",
}


def get_format(name: str) -> ChatFormat:
    """A format by name. Raises UsageError, naming them all."""
    if name not in FORMATS:
        raise UsageError(f"no chat format {name!r}; choose from {', '.join(FORMATS)}")
    return FORMATS[name]


def recognise(template: str) -> ChatFormat | None:
    """The format of a Jinja template as published, None for one that we do not know."""
    text = template.replace("\\n", "\n")  # either way to write a line break in Jinja's strings
    name = _TEMPLATES.get(hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16])
    return None if name is None else FORMATS[name]


def chat_name(folder: Path) -> str | None:
    """The name of the format that a model's folder asks for, None where it asks for none that we know."""
    template = read_template(folder)
    found = None if template is None else recognise(template)
    return None if found is None else found.name


def read_template(folder: Path) -> str | None:
    """The Jinja template in a model's folder, None where it has none; of several, the one called "default"."""
    try:
        raw = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        found = raw.get("chat_template")
    except (OSError, ValueError, AttributeError, RecursionError):
        found = None
    if isinstance(found, list):
        found = next((t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), None)
    alone = folder / "chat_template.jinja"  # where transformers 5 puts it
    if found is None and alone.is_file():
        found = alone.read_text(encoding="utf-8", errors="replace")
    return found if isinstance(found, str) else None
