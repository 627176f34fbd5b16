"""Every error a user of phi-edge can meet, on one page.

A message is one line: what was wrong, where, and the next thing to do. The commands print
it and leave with `exit_code`: 2 where the user can mend it, 1 where a check failed.
"""


class PhiError(Exception):
    """Base of every error that phi-edge raises on purpose."""

    exit_code = 2


class UsageError(PhiError):
    """An argument or a combination of arguments that makes no sense."""


class MissingExtraError(PhiError):
    """A feature was asked for whose packages are not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} is not installed: pip install 'phi-edge[{extra}]'")


def missing_extra(e: ImportError, extra: str) -> ImportError | MissingExtraError:
    """What to raise for a failed import: our error for a package of the extra, the failure itself for our own code."""
    return e if (e.name or "phi_").startswith("phi_") else MissingExtraError(str(e.name), extra)


class NotFoundError(PhiError):
    """A path that does not exist."""


class OutputExistsError(PhiError):
    """An output that exists already and was not to be replaced."""


class DiskFullError(PhiError):
    """The disk filled up while something was being written; the part written is gone again."""


class CheckpointError(PhiError):
    """A Hugging Face model folder that is missing something, damaged or inconsistent."""


class UnsupportedError(PhiError):
    """A well-formed model that this version cannot carry."""


class BundleError(PhiError):
    """A bundle, or a file of one, that is damaged, inconsistent or from a newer version."""


class ChatError(PhiError):
    """A conversation that cannot be written in the model's chat format, or a model without a known one."""


class TokenError(PhiError):
    """Tokens outside the vocabulary, or an empty prompt."""


class ContextError(PhiError):
    """More tokens than the context holds."""


class MemoryPlanError(PhiError):
    """A model that does not fit into the memory that it may take."""


class VerificationError(PhiError):
    """A bundle that does not agree with its checkpoint."""

    exit_code = 1
