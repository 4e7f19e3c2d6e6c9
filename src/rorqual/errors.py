"""What Rorqual says to a person who gave it something it cannot use.

Every error that a user can cause derives from `RorqualError`; the command line prints it as one line and
exits with 2. A message names the field, its value and the cure. Our own mistakes are assertions and keep
their traceback.
"""

from __future__ import annotations


class RorqualError(Exception):
    """A fault that the user can mend: the command line prints it without a traceback and exits with 2."""


class ConfigError(RorqualError):
    """A configuration key is unknown, contradictory or out of range."""


class CheckpointError(RorqualError):
    """A model folder or file is missing, damaged or not what it says it is."""


class TokenizerError(RorqualError):
    """A tokenizer or chat template is missing, does not fit the model or misbehaves."""


class DataError(RorqualError):
    """Training or evaluation text cannot be read or does not fit the tokenizer or shards."""


class CapacityError(RorqualError):
    """The work does not fit this machine; the message says what is needed, what is there and what would
    fit."""


class NumericsError(RorqualError):
    """A value that must be finite is not, or two definitions of one op disagree beyond their bound."""


class RunError(RorqualError):
    """A run folder is in use, damaged, or does not match the configuration that wants to resume it."""


class SandboxError(RorqualError):
    """Code that is not trusted cannot be run here: the machine cannot confine it, or the sandbox itself failed."""


class RequestError(RorqualError):
    """A generation request is invalid. `param` is the dotted field; `code` a short machine-readable cause.

    >>> raise RequestError("temperature=-1: must be 0 (greedy) to 2", param="temperature",
    code="invalid_value")
    """

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code
