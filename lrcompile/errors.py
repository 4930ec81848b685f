"""Everything that can go wrong and that a user can mend.

    LrcompileError            exit code
    ├── UsageError                2     options, configuration, OUT exists or is being written by another
    ├── ModelError                3     the model cannot be read or is not legal
    ├── PluginError               4     a factorization, runtime or package is missing or broke its contract
    ├── BuildError                4     a build or run crashed or ran out of time, memory or disk
    ├── BudgetError               1     no plan keeps the budget
    └── VerificationError         1     outputs moved too far, or a published folder is damaged

A message says what happened, where (node, weight, shape), and what to do about it, in one line.
A broken invariant of ours is none of these: it is a traceback and exit code 70.
"""

from __future__ import annotations


class LrcompileError(Exception):
    """Base of all errors that a user can act upon; the message is one line."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class UsageError(LrcompileError):
    """An option, a configuration or a path is not usable as given."""

    exit_code = 2


class ModelError(LrcompileError):
    """The model file, its external data or its graph is not legal or not supported."""

    exit_code = 3


class PluginError(LrcompileError):
    """A plugin or an optional package is missing, or broke its contract."""

    exit_code = 4


class BuildError(LrcompileError):
    """A build or a run failed, crashed, or went beyond its time, memory or disk."""

    exit_code = 4


class BudgetError(LrcompileError):
    """No plan keeps the budget; the message names the best that was reached."""

    exit_code = 1


class VerificationError(LrcompileError):
    """The compiled model is not what it claims to be, or a published folder is damaged."""

    exit_code = 1
