"""Conversations as text: the formats that Phis were tuned on, compiled. No template engine runs here.

A checkpoint says its format as a Jinja template, which is a program from outside. The published ones are known by
their digests and stand below as data; any other is refused, and the caller may name the format that it means.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from phi_runtime.errors import ChatError, UsageError

Messages = Sequence[Mapping[str, str]]

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class ChatFormat:
    """How one revision writes a conversation.

    turn: opens a turn, with `{role}` in it. break_: stands after it and after the end of a turn, where end_break
    does not say otherwise. end: the token that ends a turn, and so an answer. bos: whether the text begins with the
    tokenizer's first token. opens_reply: the user's turn opens the assistant's (April 2024), so that a reply has no
    role token of its own. roles: those that are written; others vanish in the original, and are refused here.
    empty_system: whether a system turn without content is written. default_system: what a conversation that does not
    begin with a system turn is given as one.
    """

    name: str
    turn: str = "<|{role}|>"
    break_: str = "\n"
    end: str = "<|end|>"
    end_break: str | None = None
    bos: bool = False
    opens_reply: bool = False
    roles: tuple[str, ...] = ROLES
    empty_system: bool = True
    default_system: str | None = None

    def opening(self, role: str) -> str:
        """What stands before a turn's content."""
        return self.turn.format(role=role) + self.break_

    def render(self, messages: Messages, bos_token: str = "") -> str:
        """The prompt for the next reply.

        Raises ChatError for a message that is malformed, or of a role that this format has no place for.
        """
        return self.conversation(messages, bos_token) + ("" if self.opens_reply else self.opening("assistant"))

    def conversation(self, messages: Messages, bos_token: str = "") -> str:
        """The messages alone, as they are learnt from. Raises ChatError as `render`."""
        parts = [_parts(m) for m in messages]
        if not parts:
            raise ChatError("the conversation is empty; give at least one message")
        if self.default_system is not None and parts[0][0] != "system":
            parts.insert(0, ("system", self.default_system))
        return (bos_token if self.bos else "") + "".join(self._turn(role, content) for role, content in parts)

    def _turn(self, role: str, content: str) -> str:
        if role not in self.roles:
            raise ChatError(
                f"the chat format {self.name} has no place for the role {role!r}, only for {', '.join(self.roles)}; "
                "put it into a user's message"
            )
        if role == "system" and not content and not self.empty_system:
            return ""
        text = content + self.end + (self.break_ if self.end_break is None else self.end_break)
        if self.opens_reply and role == "assistant":
            return text
        reply = self.opening("assistant") if self.opens_reply and role == "user" else ""
        return self.opening(role) + text + reply


def _parts(message: Mapping[str, str]) -> tuple[str, str]:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise ChatError('a message is {"role": ..., "content": ...}, both of them text')
    return role, content


_CHATML = ChatFormat("chatml", turn="<|im_start|>{role}", end="<|im_end|>")
_PHI4 = replace(_CHATML, name="phi4", break_="<|im_sep|>", end_break="")

FORMATS = {
    f.name: f
    for f in (
        ChatFormat("phi3"),  # mini, July 2024; and the checkpoints that phi-train writes
        ChatFormat("phi3.5", empty_system=False),
        ChatFormat("phi3-april", bos=True, opens_reply=True, roles=("user", "assistant")),
        ChatFormat("phi3-medium", opens_reply=True, roles=("user", "assistant")),
        ChatFormat("phi3-small", bos=True),
        ChatFormat("phi4-mini", break_="", roles=(*ROLES, "tool")),
        _PHI4,
        replace(_PHI4, name="phi4-december", opens_reply=True),  # as first published
        _CHATML,
        replace(
            _CHATML,
            name="smollm2",
            default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
        ),
    )
}
# The first 16 hexadecimal digits of the SHA-256 of each template as published, without a line break at its end; the
# second is phi-train's own.
_TEMPLATES = {
    "dcaee66df77bfbb7": "phi3",
    "55cc5853f8b08be3": "phi3",
    "78d976a442bcde2f": "phi3.5",
    "268b6082ceb7176d": "phi3-april",
    "605841622bcb6572": "phi3-medium",
    "b0e53f5e7bae6fdb": "phi3-small",
    "febf589225c9728a": "phi4-mini",
    "a41fb8727c4f1e72": "phi4-december",
    "fe4120415a3858b8": "phi4",
    "153280e3ff55d19d": "chatml",
    "872be49dbb638044": "smollm2",
}


def get_format(name: str) -> ChatFormat:
    """A format by name. Raises UsageError, naming them all."""
    if name not in FORMATS:
        raise UsageError(f"no chat format {name!r}; choose from {', '.join(FORMATS)}")
    return FORMATS[name]


def recognise(template: str) -> ChatFormat | None:
    """The format of a Jinja template as published, None for one that we do not know."""
    # Either way to write a line break in Jinja's strings, any system's line breaks; Jinja drops one at the end.
    text = template.replace("\r\n", "\n").replace("\\n", "\n").removesuffix("\n")
    name = _TEMPLATES.get(hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16])
    return None if name is None else FORMATS[name]


def chat_name(folder: Path) -> str | None:
    """The name of the format that a model's folder asks for, None where it asks for none that we know."""
    template = read_template(folder)
    found = None if template is None else recognise(template)
    return None if found is None else found.name


def read_template(folder: Path) -> str | None:
    """The Jinja template in a model's folder, None where it has none: chat_template.jinja, which transformers
    believes, or the one in tokenizer_config.json; of several there, the one called "default".
    """
    alone = folder / "chat_template.jinja"
    if alone.is_file():
        return alone.read_text(encoding="utf-8", errors="replace")
    try:
        raw = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        found = raw.get("chat_template")
    except (OSError, ValueError, AttributeError, RecursionError):
        found = None
    if isinstance(found, list):
        found = next((t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), None)
    return found if isinstance(found, str) else None
