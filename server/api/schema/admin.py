"""POST /quantize and POST /admin/pull: the requests."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from server.api.schema.base import Body


class QuantizeRequest(Body):
    UNSUPPORTED: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "calibration": (),
        "gate": (),
        "dry_run": (False,),
    }

    model: Annotated[str, Field(min_length=1, max_length=512)]
    recipe: Annotated[str, Field(min_length=1, max_length=256)] | dict[str, Any] | None = None
    preset: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] = 0

    @model_validator(mode="after")
    def _one_recipe(self) -> "QuantizeRequest":
        if (self.recipe is None) == (self.preset is None):
            raise ValueError("recipe: give either recipe or preset")
        return self


class PullRequest(Body):
    model: Annotated[str, Field(min_length=1, max_length=512)]
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
