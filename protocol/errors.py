"""Every error that rlsys raises on purpose. Each message names what was found, what was expected, and where."""

from __future__ import annotations


class RlsysError(Exception):
    """Base of all errors below."""


class UserError(RlsysError):
    """Something the user can mend: configuration, data, a directory. The command line prints it as one line and exits with 2."""


class ConfigError(UserError):
    """A configuration that cannot run."""


class DataError(UserError):
    """A dataset, model or weights directory that cannot be read."""


class UnknownName(UserError):
    """A name that a table does not hold; the message lists the known ones."""


class WireError(RlsysError):
    """A message that does not follow the protocol: wrong version, tag, run, field or length."""


class WeightsError(RlsysError):
    """A published weights version that is incomplete or does not match its manifest."""


class JournalError(RlsysError):
    """A journal record that is torn or does not match its checksum."""


class DeadlineExceeded(RlsysError):
    """A wait that passed its deadline. The message names who waited for whom, for what, since when."""


class StalenessViolation(RlsysError):
    """A token outside the staleness bound reached the trainer. Always a bug; it ends the run."""


class Diverged(UserError):
    """Batch after batch held nothing finite to train on. It ends the run; the message names samples and what was not finite."""


class InfrastructureFault(RlsysError):
    """Our machinery broke (a sandbox, an engine), so nothing is known about the sample. Never a reward of 0: retried, then `failed`."""


class Fenced(RlsysError):
    """This process has been replaced: what it would write no longer counts. It ends without a trace."""


class RunEnded(RlsysError):
    """The supervisor asked this process to stop. Raised out of waits so that every loop ends at once."""
