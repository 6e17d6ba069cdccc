"""Bundled files are found by name in a checkout and in a wheel; a path is used as it is."""

from pathlib import Path

import pytest

import stacking_ds
from stacking_ds.config.recipe import ds_config_path, recipe_path
from stacking_ds.errors import ConfigError


def _lay_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> Path:
    monkeypatch.setattr(stacking_ds, "__file__", str(tmp_path / "stacking_ds" / "__init__.py"))
    recipes = tmp_path / folder / "recipes"
    recipes.mkdir(parents=True)
    (recipes / "small.yaml").touch()
    (tmp_path / folder / "zero7.json").touch()
    return tmp_path / folder


@pytest.mark.parametrize("folder", ["ds_configs", "stacking_ds/ds_configs"])
def test_names_lead_to_bundled_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    found = _lay_out(tmp_path, monkeypatch, folder)
    assert ds_config_path("zero7") == ds_config_path("zero7.json") == found / "zero7.json"
    assert recipe_path("small") == found / "recipes" / "small.yaml"


def test_a_path_is_used_as_it_is(tmp_path: Path) -> None:
    mine = tmp_path / "zero1.json"
    mine.touch()
    assert ds_config_path(str(mine)) == mine


def test_an_unknown_name_lists_the_bundled_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _lay_out(tmp_path, monkeypatch, "ds_configs")
    with pytest.raises(ConfigError, match=r"no recipe 'large'.*\.yaml file, or one of small"):
        recipe_path("large")
