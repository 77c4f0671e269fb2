"""Every error a user can meet, each with its exit code. Layer 0: imports nothing of the project."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

EXIT_OK = 0
EXIT_PREEMPTED = 143

EXIT_CODES: dict[int, str] = {
    0: "done",
    1: "unexpected error (a bug; `--debug` shows the traceback); `doctor`: a check failed",
    2: "configuration: the YAML, an override or an option is wrong",
    3: "data: a file is missing, empty, malformed, or not the one the run started with",
    4: "checkpoint: missing, damaged, or of another model or run",
    5: "non-finite: the loss or gradient stayed NaN or infinite",
    6: "run directory: in use, used before, not writable, or the disk is full",
    7: "out of memory",
    143: "preempted: SIGTERM or Ctrl-C; of a run that had begun, the step was finished and saved",
}
"""What each exit code of the command line means; the reference pages are generated from it."""


class Interrupted(KeyboardInterrupt):
    """An interrupt that leaves the exit code to whoever catches it.

    A plain KeyboardInterrupt that leaves a text given to `exec`, such as dataclasses and named tuples are made of while
    modules are imported, is noted by Python, which under `python -m` then ends as if nobody had caught it.
    """


class TruthGPTError(Exception):
    """Base of all expected errors: one message that says what, where, what is allowed and how to fix it."""

    exit_code = 1


@dataclass(frozen=True)
class Problem:
    """One mistake in a configuration.

    `file` is None for a value that stands in no file (the command line, Python); `line` counts from 1.
    """

    key: str
    message: str
    file: str | None = None
    line: int | None = None
    suggestion: str | None = None

    def __str__(self) -> str:
        place = "" if self.file is None else f"{self.file}: " if self.line is None else f"{self.file}:{self.line}: "
        key = f"{self.key}: " if self.key else ""
        hint = f" ({self.suggestion})" if self.suggestion else ""
        return f"{place}{key}{self.message}{hint}"

    def to_json(self) -> dict[str, str | int | None]:
        """The problem as `validate --json` prints it."""
        return asdict(self)


class ConfigError(TruthGPTError):
    """The configuration is wrong. Lists every problem found, not only the first."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem] | str) -> None:
        self.problems = [Problem(key="", message=problems)] if isinstance(problems, str) else list(problems)
        self._plain = problems if isinstance(problems, str) else None
        super().__init__(str(self))

    def __str__(self) -> str:
        return self._plain if self._plain is not None else "\n".join(str(problem) for problem in self.problems)


class DataError(TruthGPTError):
    """The data cannot be used: missing, empty, malformed or changed."""

    exit_code = 3


class CheckpointError(TruthGPTError):
    """A checkpoint is missing, damaged, or does not fit this run."""

    exit_code = 4


class NonFiniteError(TruthGPTError):
    """Loss or gradient stayed non-finite for more steps than `guards.max_consecutive_skips` allows, or logits are not
    finite."""

    exit_code = 5


class RunDirectoryError(TruthGPTError):
    """The run directory is in use, already used, not writable, or its disk is full."""

    exit_code = 6


class OutOfMemoryError(TruthGPTError):
    """The device ran out of memory."""

    exit_code = 7


class Preempted(TruthGPTError):
    """The run was asked to stop, finished its step and saved a checkpoint."""

    exit_code = EXIT_PREEMPTED
