"""Pages of the documentation that follow from the code, for MkDocs: the four commands, and the errors."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from phi_runtime import errors

COMMANDS = ("phi-export", "phi-run", "phi-train", "phi-bench")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {f"reference/{name}.md": command_page(name) for name in COMMANDS}
    pages["reference/errors.md"] = errors_page()
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    return files


def command_page(name: str) -> str:
    """What `--help` of a command and of each of its subcommands says."""
    first = _help(name)
    parts = [f"# {name}", f"```text\n{first}\n```"]
    for command in subcommands(name, first):
        parts += [f"## {name} {command}", f"```text\n{_help(name, command)}\n```"]
    return "\n\n".join(parts) + "\n"


def subcommands(name: str, said: str) -> list[str]:
    """The subcommands that a command's help names: in its usage, or in a list of them."""
    found = re.findall(rf"^(?:usage:| )\s*{name} ([a-z][a-z-]+)\b", said, re.MULTILINE)
    listed = re.search(r"^  COMMAND\n((?:    .*\n)+)", said, re.MULTILINE)
    found += re.findall(r"^    ([a-z][a-z-]+)", listed[1], re.MULTILINE) if listed else []
    return list(dict.fromkeys(found))


def errors_page() -> str:
    """Every error, when it is raised and what to do."""
    rows = []
    for kind in vars(errors).values():
        if inspect.isclass(kind) and issubclass(kind, errors.PhiError) and kind is not errors.PhiError:
            when, _, remedy = " ".join((kind.__doc__ or "").split()).partition(" Remedy: ")
            rows.append(f"| `{kind.__name__}` | {when} | {remedy} | {kind.exit_code} |")
    return (
        "# Errors\n\n"
        "Every error that phi-edge raises on purpose is a `phi_runtime.PhiError`. Its message is one line: what was "
        "wrong, where, and what to do next. The commands print it and exit with the code below: 2 where you can mend "
        "it, 1 where a check failed. A traceback is a bug of ours.\n\n"
        "| error | when | what to do | exit code |\n| --- | --- | --- | ---: |\n" + "\n".join(rows) + "\n"
    )


def _help(*command: str) -> str:
    program = Path(sys.executable).parent / command[0]
    environment = os.environ | {"COLUMNS": "76"}
    done = subprocess.run(
        [program, *command[1:], "--help"], capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout.rstrip()
