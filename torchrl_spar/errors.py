"""The one error a user's own mistake ends in."""


class InputError(ValueError):
    """Bad input: data, option, file or key. The message names the culprit and what to do.

    Recipes print it as one line and exit; everything else that is raised is a bug and
    keeps its traceback.

    Source: ours.

    Examples:
        >>> from torchrl_spar import InputError
        >>> raise InputError("data.npz: no array 'actions'")
        Traceback (most recent call last):
            ...
        torchrl_spar.errors.InputError: data.npz: no array 'actions'
    """


def first_line(err: BaseException) -> str:
    """The first line of an error's text, for a message of one line.

    Examples:
        >>> first_line(KeyError("a")), first_line(EOFError())
        ("'a'", 'EOFError')
    """
    return next(iter(str(err).splitlines()), type(err).__name__)
