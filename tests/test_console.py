"""Lists and values of any length are told in a line."""

from stacking_ds.console import first_of, shortened


def test_of_many_names_a_few_are_told_and_the_others_counted() -> None:
    assert first_of([]) == ""
    assert first_of(["a", "b"]) == "a, b"
    assert first_of(range(1_005)) == "0, 1, 2, 3, 4 and 1,000 more"
    assert first_of(["x: 1", "y: 2", "z: 3"], 2, "; ") == "x: 1; y: 2 and 1 more"


def test_a_long_value_is_cut_off() -> None:
    assert shortened("x" * 80) == "x" * 80
    assert shortened("x" * 81) == f"{'x' * 77}..."
    assert shortened("x" * 81, 100) == "x" * 81
    assert shortened("é\n\x1b[2J") == r"é\n\x1b[2J"
