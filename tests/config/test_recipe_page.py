"""The page of all recipe keys is the sections', and leaves nothing unsaid."""

from stacking_ds.config.run import RunConfig
from tests.recipe_page import PAGE, keys, page, sections


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m tests.recipe_page`"


def test_every_section_and_key_says_what_it_means() -> None:
    everything = [("", RunConfig), *sections()]
    silent = [
        f"{name}.{key}"
        for name, section in everything
        for key, _, _, meaning in keys(section)
        if not meaning
    ]
    assert silent == []
    assert [name for name, section in everything if "__doc__" not in vars(section)] == []


def test_every_key_of_a_resolved_recipe_is_on_it() -> None:
    text = page()
    for key in ("name", "optimizer.lamb.kernel", "schedule.at_boundary", "stages.N.tokens"):
        assert f"| `{key}` |" in text
