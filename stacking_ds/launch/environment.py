"""The environment variables that ranks on other hosts are given, in DeepSpeed's file of them.

A rank on another host inherits nothing from the shell that started the job. Its variables are
those of `.deepspeed_env` (in ~ and in the working directory), of `--env`, and a few that are
always right. DeepSpeed writes each into a command line for the hosts' shells, so a value that a
shell would read as something else is refused.
"""

import base64
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from stacking_ds.errors import ConfigError, UserError

ENCODED = "--encoded"

_PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./-]+", re.ASCII)


def passable(arguments: Sequence[str]) -> list[str]:
    """`arguments` as they may stand behind `python -m stacking_ds` on any host."""
    plain = all(_PLAIN.fullmatch(argument) for argument in arguments)
    return list(arguments) if plain else [ENCODED, encode_arguments(arguments)]


def encode_arguments(arguments: Sequence[str]) -> str:
    """One word of letters, digits, - and _ that stands for all of `arguments`."""
    # as ASCII: also what is not UTF-8 in a file's name survives
    text = json.dumps(list(arguments)).encode("ascii")
    return base64.urlsafe_b64encode(text).decode("ascii").rstrip("=")


def decode_arguments(word: str) -> list[str]:
    """The arguments that `encode_arguments` made `word` of; a UserError if it made no such word."""
    arguments = None
    with suppress(ValueError):
        text = base64.b64decode(word + "=" * (-len(word) % 4), altchars=b"-_", validate=True)
        arguments = json.loads(text)
    if not isinstance(arguments, list) or not all(isinstance(each, str) for each in arguments):
        raise UserError(
            f"{ENCODED} {word[:40]!r} is no command that `stacking-ds launch` made; write the "
            f"command itself"
        )
    return arguments


def require_plain(word: str, what: str, remedy: str) -> None:
    """Raise a ConfigError, whose `remedy` says what to do, unless the shells of other hosts read
    `word` as it is."""
    if not _PLAIN.fullmatch(word):
        raise ConfigError(
            f"{what} {word!r} has characters that the shells of other hosts may read as something "
            f"else (letters, digits and _@+=:,./- are safe); {remedy}"
        )


_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_SECRET = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|PASS|PASSWORD|PASSWD|CREDENTIALS?|[A-Z]*KEY)(?:$|_)", re.IGNORECASE
)
# DeepSpeed puts values with other characters between double quotes
_UNQUOTED = re.compile(r"[\w@%+=:,./-]*", re.ASCII)
_READ_BY_SHELLS = re.compile(r'["$`\\\x00-\x08\x0a-\x1f]')
_REPLACED_BY_PDSH = re.compile(r"%[hnu%]")
# what DeepSpeed sends from its own environment, beside the file
_SENT_ANYWAY = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")


def hosts_environment(
    given: Mapping[str, str], *, python: str, own: Mapping[str, str], launcher: str
) -> dict[str, str]:
    """The variables of the ranks: those `given` by a person, over those of `.deepspeed_env`, over
    the defaults. `own` is this process's environment, `launcher` pdsh or openmpi.

    Raises:
        ConfigError: a file has a line that sets no variable, or a value cannot reach the ranks.
    """
    defaults = {name: own[name] for name in ("DS_ACCELERATOR",) if name in own}
    variables = {"PATH": search_path(python, own), **defaults, **_of_files(own), **given}
    for name, value in {**_sent_anyway(own), **variables}.items():
        require_exportable(name, value, launcher)
    return variables


def search_path(python: str, own: Mapping[str, str]) -> str:
    """PATH with the programs of this interpreter first: those of another version built elsewhere
    would have every host compile again what it finds."""
    folders = [os.path.dirname(python), *own.get("PATH", os.defpath).split(os.pathsep)]
    return os.pathsep.join(dict.fromkeys(folders))


def secret_names(given: Mapping[str, str], own: Mapping[str, str]) -> list[str]:
    """The variables that hosts are given and whose names are those of secrets, as of tokens and
    passwords: on every host, command lines show their values to all of its users."""
    return sorted(filter(_SECRET.search, {**_sent_anyway(own), **_of_files(own), **given}))


def _sent_anyway(own: Mapping[str, str]) -> dict[str, str]:
    return {name: own[name] for name in own if name.startswith(_SENT_ANYWAY)}


def _of_files(own: Mapping[str, str]) -> dict[str, str]:
    """What DeepSpeed would read, where it would read it; comments and blank lines are fine here."""
    name = own.get("DS_ENV_FILE", ".deepspeed_env")
    found: dict[str, str] = {}
    for path in dict.fromkeys([Path.home() / name, Path(name).absolute()]):
        if not path.is_file():
            continue
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {path} ({error}); mend it or take it away") from None
        for number, line in enumerate(lines, start=1):
            if line.strip() and not line.lstrip().startswith("#"):
                found |= parse_assignments([line], f"{path}:{number}")
    return found


def parse_assignments(texts: Sequence[str], where: str = "--env") -> dict[str, str]:
    """The variables of `--env NAME=VALUE` options, or of lines of a file; a ConfigError for what
    sets no variable."""
    found: dict[str, str] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not _NAME.fullmatch(name.strip()):
            raise ConfigError(f"{where}: {text.strip()!r} sets no variable; write NAME=VALUE")
        found[name.strip()] = value.strip()
    return found


def require_exportable(name: str, value: str, launcher: str) -> None:
    """Raise a ConfigError unless the variable reaches the ranks of other hosts as it is."""
    if _READ_BY_SHELLS.search(value):
        trouble = 'has one of " $ ` \\ or a line break, which the shells of the hosts would read'
    elif launcher == "pdsh" and _REPLACED_BY_PDSH.search(value):
        trouble = "has %h, %n, %u or %%, which pdsh would replace"
    elif launcher == "openmpi" and not _UNQUOTED.fullmatch(value):
        trouble = "would arrive between quotes, which DeepSpeed adds to it for mpirun"
    else:
        return
    shown = "" if _SECRET.search(name) else f" ({value!r})"
    raise ConfigError(
        f"the environment variable {name}{shown} cannot be given to other hosts: it {trouble}; "
        f"give a plain value with --env {name}=VALUE, or unset it"
    )


def draw_environment(variables: Mapping[str, str]) -> str:
    """The text of a file of variables, as DeepSpeed's parser reads it."""
    return "".join(f"{name}={value}\n" for name, value in variables.items())
