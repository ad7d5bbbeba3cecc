"""What can go wrong, as types.

Every error a user can cause is a `HyperfadeError` with two lines: what happened (what was given, what was expected,
where) and what to try. The command line prints those two lines; a library user can catch the type. Anything else that
escapes is a bug of ours.
"""


class HyperfadeError(Exception):
    """An error with a remedy: `message` says what happened and where, `hint` says what to try."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}"


class RecipeError(HyperfadeError):
    """The recipe cannot be read: unknown key, wrong type, impossible value."""


class AlgebraError(HyperfadeError):
    """An algebra that does not exist, or that does not fit the features of a layer."""


class FitError(HyperfadeError):
    """The closed-form fit got numbers it cannot use (NaN or infinite weights or second moments)."""


class PlanError(HyperfadeError):
    """The recipe and the model do not meet: see the subclasses for how."""


class NothingMatchedError(PlanError):
    """No layer of the model matches what the recipe asks for."""


class AllExcludedError(PlanError):
    """Layers matched, but every one of them was excluded again."""


class DataError(HyperfadeError):
    """A sample cannot be used; the message names its file and line."""


class CheckpointError(HyperfadeError):
    """A checkpoint is damaged, incomplete, or written by a newer version."""


class OutputError(HyperfadeError):
    """The output folder cannot be written, or holds something that is not ours."""


class MissingLibraryError(HyperfadeError):
    """What was asked for needs an optional library; the hint is the command that installs it."""


class ServingError(HyperfadeError):
    """An inference engine cannot run the checkpoint in this way; it is intact and may run in another."""


class TrainingError(HyperfadeError):
    """The distillation cannot go on (a loss that is not finite, say); the last checkpoint is intact."""


class ProcessError(HyperfadeError):
    """A process that works on the same run has gone."""
