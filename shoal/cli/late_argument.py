"""`--late` of the command line: discard, discount:FACTOR:VERSIONS or patch:VERSIONS."""

from shoal.policy import Late


def parse_late(text: str) -> Late:
    """What late updates are worth.

    >>> parse_late("discount:0.9:5")
    Late(kind='discount', factor=0.9, max_staleness=5)

    Raises:
        ValueError: it is none of the three.
    """
    kind, *numbers = text.split(":")
    try:
        if kind == "discard" and not numbers:
            return Late()
        if kind == "discount" and len(numbers) == 2:
            return Late.discount(float(numbers[0]), max_staleness=int(numbers[1]))
        if kind == "patch" and len(numbers) == 1:
            return Late.patch(max_staleness=int(numbers[0]))
    except ValueError as error:
        raise ValueError(f"--late {text}: {error}") from error
    raise ValueError(f"Expected --late discard, discount:FACTOR:VERSIONS or patch:VERSIONS, got {text!r}.")
