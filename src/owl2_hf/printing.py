"""Make untrusted text safe to print in a terminal."""


def printable(text: str, keep: str = "") -> str:
    """The text with every character that a terminal could obey, or not show, as Python escapes it.

    Such are control characters (a newline too), marks that turn the direction of writing, and bytes
    that are no text.

    Args:
        keep: Characters that stay as they are.
    """
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)
