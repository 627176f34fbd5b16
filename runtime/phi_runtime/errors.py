"""Every error a user of phi-edge can meet, on one page.

A message is one line: what was wrong, where, and the next thing to do. The commands print
it and leave with `exit_code`: 2 where the user can mend it, 1 where a check failed.
"""


class PhiError(Exception):
    """Base of every error that phi-edge raises on purpose."""

    exit_code = 2


class UsageError(PhiError):
    """An argument or a combination of arguments that makes no sense.

    Remedy: Give the argument as the message says; `--help` lists the values.
    """


class MissingExtraError(PhiError):
    """A feature was asked for whose packages are not installed.

    Remedy: Install the extra that the message names: `pip install 'phi-edge[EXTRA]'`.
    """

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} is not installed: pip install 'phi-edge[{extra}]'")


def missing_extra(e: ImportError, extra: str) -> ImportError | MissingExtraError:
    """What to raise for a failed import: our error for a package of the extra, the failure itself for our own code."""
    return e if (e.name or "phi_").startswith("phi_") else MissingExtraError(str(e.name), extra)


class NotFoundError(PhiError):
    """A path that does not exist.

    Remedy: Check the path or the model's name.
    """


class DownloadError(PhiError):
    """A download that broke off; what arrived is kept, and the same command goes on from there.

    Remedy: Run the same command again; check the network if it happens twice.
    """


class OutputExistsError(PhiError):
    """An output that exists already and was not to be replaced.

    Remedy: Choose another `--out`, or replace it with `--force`.
    """


class DiskFullError(PhiError):
    """The disk filled up while something was being written; the part written is gone again.

    Remedy: Free some space and run the same command again.
    """


class CheckpointError(PhiError):
    """A Hugging Face model folder that is missing something, damaged or inconsistent.

    Remedy: Fetch or save the checkpoint again; the message names the file and the tensor.
    """


class UnsupportedError(PhiError):
    """A well-formed model that this version cannot carry.

    Remedy: Choose another format, or the checkpoint that the message asks for.
    """


class BundleError(PhiError):
    """A bundle, or a file of one, that is damaged, inconsistent or from a newer version.

    Remedy: Export the bundle again, or fetch it again if it was downloaded.
    """


class ChatError(PhiError):
    """A conversation that cannot be written in the model's chat format, or a model without a known one.

    Remedy: Name the chat format with `chat=` or `--chat-format`, or mend the message that is named.
    """


class TokenError(PhiError):
    """Tokens outside the vocabulary, or an empty prompt.

    Remedy: Give text, or token ids of the model's own tokenizer.
    """


class ContextError(PhiError):
    """More tokens than the context holds.

    Remedy: Shorten the prompt, reserve a longer context, or choose another context policy.
    """


class MemoryPlanError(PhiError):
    """A model that does not fit into the memory that it may take.

    Remedy: Give more memory, a shorter context or a smaller type of KV cache; the message has the arithmetic.
    """


class BenchmarkError(PhiError):
    """A benchmark that cannot be run here and now, or a file of one that is damaged, of another version or impossible.

    Remedy: Do what the message says; a run that was broken off goes on when the same command is given again.
    """


class RegressionError(PhiError):
    """A comparison that found a model slower, larger or less exact than before.

    Remedy: Look at the rows that the message names.
    """

    exit_code = 1


class VerificationError(PhiError):
    """A bundle that does not agree with its checkpoint.

    Remedy: Keep more bytes or calibrate on other text; the message names the check that failed.
    """

    exit_code = 1
