"""The errors a user can meet. Each message says what was wrong, what is allowed and what to do."""


class RwkvEsError(Exception):
    """Base of every error that is the user's to mend; the command line prints it in one line and exits with 2."""


class ConfigError(RwkvEsError):
    """An option is unknown, out of range, or does not fit another one."""


class CheckpointError(RwkvEsError):
    """A file is not an RWKV-7 (x070) checkpoint that can be used, or cannot be written."""


class TaskError(RwkvEsError):
    """A task or its data cannot be loaded."""


class RewardError(RwkvEsError):
    """A reward function failed in a way that makes training meaningless."""


class ClusterError(RwkvEsError):
    """Processes that train together have lost one of them, or differ."""


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM): what it is at is abandoned, what is on the disk stays good."""
