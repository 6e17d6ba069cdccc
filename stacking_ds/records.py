"""Record: the strict, frozen base of all that is read as text and checked: recipes, manifests."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError


class Record(BaseModel):
    """Named values of exact types: no key too many, nothing infinite, nothing that changes. Raises
    `ValidationError`: what does not fit, value by value."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    def changed(self, **values: Any) -> Self:
        """A copy with other values, checked like the first."""
        return type(self)(
            **{**{name: getattr(self, name) for name in self.model_fields_set}, **values}
        )


def first_problem(error: ValidationError) -> str:
    """The place of the first thing that does not fit, and what is wrong there, printable."""
    first = error.errors()[0]
    place = ".".join(ascii(part).strip("'") for part in first["loc"])[:100] or "the file"
    return f"{place}: {first['msg'].removeprefix('Value error, ')}"
