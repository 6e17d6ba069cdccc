"""What may pass the shells of other hosts: plain words; a command that is more becomes one.

DeepSpeed hands its command lines to the hosts' shells unquoted, and pdsh puts host names and
numbers in the place of %h, %n and %u.
"""

import base64
import json
import re
from collections.abc import Sequence

from stacking_ds.errors import ConfigError, UserError

__all__ = ["ENCODED", "decode_arguments", "encode_arguments", "passable", "require_plain"]

ENCODED = "--encoded"

_PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./-]+", re.ASCII)


def passable(arguments: Sequence[str]) -> list[str]:
    """`arguments` as they may stand behind `python -m stacking_ds` on any host."""
    if all(_PLAIN.fullmatch(argument) for argument in arguments):
        return list(arguments)
    return [ENCODED, encode_arguments(arguments)]


def encode_arguments(arguments: Sequence[str]) -> str:
    """One word of letters, digits, - and _ that stands for all of `arguments`."""
    # as ASCII: also what is not UTF-8 in a file's name survives
    text = json.dumps(list(arguments)).encode("ascii")
    return base64.urlsafe_b64encode(text).decode("ascii").rstrip("=")


def decode_arguments(word: str) -> list[str]:
    """The arguments that `encode_arguments` made `word` of.

    Raises:
        UserError: it made no such word.
    """
    try:
        text = base64.b64decode(word + "=" * (-len(word) % 4), altchars=b"-_", validate=True)
        arguments = json.loads(text)
    except ValueError:
        arguments = None
    if not isinstance(arguments, list) or not all(isinstance(each, str) for each in arguments):
        raise UserError(
            f"{ENCODED} {word[:40]!r} is no command that `stacking-ds launch` made; write the "
            f"command itself"
        )
    return arguments


def require_plain(word: str, what: str, remedy: str) -> None:
    """Raises:
    ConfigError: a shell on another host could read `word` as something else than it is.
    """
    if not _PLAIN.fullmatch(word):
        raise ConfigError(
            f"{what} {word!r} has characters that the shells of other hosts may read as something "
            f"else (letters, digits and _@+=:,./- are safe); {remedy}"
        )
