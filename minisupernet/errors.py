"""Every error that the package raises on purpose: one sentence that says what is wrong
and what to do.
"""

__all__ = [
    "CourseError",
    "DataError",
    "EpisodeError",
    "ExplorerError",
    "FileError",
    "FitError",
    "GeneratorError",
    "GrowthError",
    "LabelledError",
    "PudNetError",
    "RecurrentError",
    "ResultError",
    "RunError",
    "SetupError",
    "StaticError",
    "StudyError",
    "TargetError",
    "TaskError",
    "TextError",
    "TrainingError",
]


class CourseError(Exception):
    """The base of all of them; a command prints its sentence, without a traceback."""


class DataError(CourseError, ValueError):
    """Images that cannot be had or cannot be used; the message is one sentence that
    says what to do.
    """


class EpisodeError(CourseError, ValueError):
    """An episode that cannot be drawn; the message says how many classes or images
    there are.
    """


class ExplorerError(CourseError, ValueError):
    """An explorer that cannot be drawn as asked; the message says what to change."""


class FileError(CourseError, OSError):
    """A file or folder that cannot be written; the message says which and what to
    do.
    """


class FitError(CourseError, ValueError):
    """A fit that cannot be done as asked; the message says what can."""


class GeneratorError(CourseError, ValueError):
    """A task vector or setting that does not fit the generator; the message says what
    does.
    """


class GrowthError(CourseError, ValueError):
    """A network, layer or setting that cannot be grown; the message says why, or what
    to do.
    """


class LabelledError(CourseError, ValueError):
    """Labelled examples or a setting that do not fit the generator; the message says
    what does.
    """


class PudNetError(CourseError, ValueError):
    """A dataset or setting that does not fit the generator; the message says what
    does.
    """


class RecurrentError(CourseError, ValueError):
    """Sizes, inputs or states that a recurrent network cannot use; the message says
    what to give.
    """


class ResultError(CourseError, ValueError):
    """A result file that is missing, damaged or of another form; the message says which
    and what to do.
    """


class RunError(CourseError, ValueError):
    """A run that cannot start or that failed; the message says which and what to do."""


class SetupError(CourseError, ValueError):
    """A set-up, profile or experiment that does not exist; the message says which there
    are.
    """


class StaticError(CourseError, ValueError):
    """Settings, or a network, for which no kernels can be generated; the message says
    what to change.
    """


class StudyError(CourseError, ValueError):
    """A study or profile that does not exist; the message says which do."""


class TargetError(CourseError, ValueError):
    """A target network, or weights for it, that cannot be used; the message says what
    to change.
    """


class TaskError(CourseError, ValueError):
    """A task, fold or split that does not exist; the message says which there are."""


class TextError(CourseError, ValueError):
    """A text that is too short for what is asked; the message says what to change."""


class TrainingError(CourseError, RuntimeError):
    """A training run that cannot go on; the message says at which step, the likely
    cause and what to do.
    """
