"""The count of a reader's way: on a package small enough to count by hand."""

from pathlib import Path

import pytest

from tests.house import PACKAGE
from tests.reading_path import read

SOURCES = {
    "top.py": """
from small.middle import Keeper, helped
from small.bottom import look

def story(value, other):
    look(other)                  # not followed: it gets nothing of the value
    keeper = Keeper(value)       # middle
    keeper.work()                # middle, then bottom
    helped(value.part)           # middle again, looked into and not followed
    finish(lambda: value)        # top

def finish(value):
    look(value)                  # read already
""",
    "middle.py": """
from small.bottom import look

class Keeper:
    def __init__(self, value):
        self.value = value
    def work(self):
        self.idle()
        look(self.value)
    def idle(self):
        pass

def helped(part):
    look(part)
""",
    "bottom.py": """
def look(thing):
    pass
""",
}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    folder.mkdir()
    for name, text in SOURCES.items():
        (folder / name).write_text(text)
    return folder


def test_a_reader_enters_what_gets_the_value_and_nothing_else(package: Path) -> None:
    count = read(package, "top:story:value")
    assert [name for _, name in count.trail] == [
        *("story", "Keeper.__init__", "Keeper.work", "look", "helped", "finish")
    ]
    assert count.rooms == {"small.top", "small.middle", "small.bottom"}
    # from the bottom to the middle, and on to the top, each of which was left before
    assert (count.climbs, count.returns) == (2, 2)


def test_a_dataclass_keeps_what_it_is_given_in_the_field_of_that_name(package: Path) -> None:
    (package / "top.py").write_text(
        """
from dataclasses import dataclass
from small.bottom import look

@dataclass
class Record:
    first: int
    second: int
    def use(self):
        self.idle()
        look(self.second)
    def idle(self):
        look(self.first)

def story(value, other):
    Record(other, second=value).use()

def other_story(value, other):
    Record(value.part, second=value.part).use()   # parts: nothing keeps the value
"""
    )
    count = read(package, "top:story:value")
    assert [name for _, name in count.trail] == ["story", "Record.use", "look"]
    assert [name for _, name in read(package, "top:other_story:value").trail] == ["other_story"]


def test_a_function_that_is_not_there_is_an_error(package: Path) -> None:
    with pytest.raises(KeyError, match="no top:nothing"):
        read(package, "top:nothing:value")


def test_the_plan_goes_through_the_loop() -> None:
    assert len(read(PACKAGE, "train.loop:train:plan").rooms) > 5
