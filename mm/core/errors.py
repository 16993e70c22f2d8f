"""The one error type that is shown to a user without a traceback.

Its message says what was wrong, with the value, and what to do about it. The command line turns it into one line on
stderr and exit code 1; a script sees an ordinary ValueError.
"""

from __future__ import annotations


class UserError(ValueError):
    """Something the caller can put right: a missing file, a bad option, a prompt the model cannot read."""
