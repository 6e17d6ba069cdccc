"""What the tables that people read look like, to the character: one file a table."""

import re
from pathlib import Path

_FOLDER = Path(__file__).parent / "golden" / "tables"


def same_as_golden(text: str, folder: Path, name: str, *measured: str) -> None:
    """Compare `text` with tests/golden/tables/NAME: read a change of that as a user would.

    Args:
        folder: the test's own, FOLDER in the file.
        measured: patterns of what is another each time, "#" in the file, as wide as it is.
    """
    for pattern in measured:
        text = re.sub(pattern, lambda found: "#" * len(found[0]), text)
    assert text.replace(str(folder), "FOLDER") == (_FOLDER / name).read_text("utf-8")
