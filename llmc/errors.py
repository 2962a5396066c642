"""The two ways a command can fail; `llmc.cli.run` turns them into one line and an exit status."""


class UsageError(Exception):
    """The command line or configuration is wrong (exit status 2). Names the flag, the value and the fix."""


class RunError(Exception):
    """The run cannot go on: a bad file, a full disk, a NaN (exit status 1). Names the file or value and the fix."""
