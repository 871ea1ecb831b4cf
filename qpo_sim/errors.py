"""The one exception that bad user input raises, and the check that several borders share."""


class InputError(ValueError):
    """User input that breaks a rule; the message is one sentence for a person.

    It names the field, the value, the rule, the place (row and column for files) and how to mend it.
    The command line prints it without a traceback and exits with code 2.
    """


def check_level(level: float) -> float:
    """The confidence level itself.

    Raises:
      InputError: not inside (0, 1).
    """
    if not 0.0 < level < 1.0:
        raise InputError(f"confidence level is {level}; it must lie strictly between 0 and 1, e.g. 0.99.")
    return level
