"""The one exception tree. Every message says where, what, and how to fix it."""


class VLMTuneError(Exception):
    """A mistake in what the user gave; the command line prints it without a traceback.

    Args:
        where: File, record, id and field, or the config key.
        what: What is wrong there.
        fix: What to write or do instead.
        code: Of a finding in data (`data.findings.CODES`); it is no part of the message.

    With one argument, that is the traceback text from which torch rebuilds a loader worker's
    exception; the message is its end.
    """

    def __init__(self, where: str, what: str | None = None, fix: str | None = None, code: str = ""):
        self.code = code
        if what is None or fix is None:
            super().__init__(where.rpartition(f"{type(self).__name__}: ")[2].strip())
            self.where, _, rest = str(self).partition(":\n  ")
            self.what, _, self.fix = rest.partition("\n  Fix: ")
            return
        ended = [text if text.endswith((".", "?")) else f"{text}." for text in (what, fix)]
        super().__init__(f"{where}:\n  {ended[0]}\n  Fix: {ended[1]}")
        self.where, self.what, self.fix = where, what, fix

    def __reduce__(self):
        # Exception's own __reduce__ would call __init__ with the one formatted string.
        return type(self), (self.where, self.what, self.fix, self.code)


class ConfigError(VLMTuneError, ValueError):
    """A configuration key or value."""


class DataError(VLMTuneError, ValueError):
    """A data file, record, image or video."""


class TrainingError(VLMTuneError, RuntimeError):
    """What stops a run on its way: memory, a silent process, a full disk."""


class ModelError(VLMTuneError, ValueError):
    """A checkpoint, or inputs that do not fit the model."""
