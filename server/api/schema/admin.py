"""POST /quantize and POST /admin/pull: the requests."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field, model_validator

from server.api.schema.base import Body

# What no name in models.yaml looks like: an absolute or relative path, a way up, a URL.
_PLACE = re.compile(r"^[/.~]|\\|\.\./|://")


def _no_place(model: str) -> str:
    if _PLACE.search(model):
        raise ValueError("a model is a name of models.yaml, never a path or URL")
    return model


ModelName = Annotated[str, Field(min_length=1, max_length=512), AfterValidator(_no_place)]


class QuantizeRequest(Body):
    UNSUPPORTED: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "calibration": (),
        "gate": (),
        "dry_run": (False,),
    }

    model: ModelName
    recipe: Annotated[str, Field(min_length=1, max_length=256)] | dict[str, Any] | None = None
    preset: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    target: dict[str, Any] | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] = 0

    @model_validator(mode="after")
    def _one_recipe(self) -> "QuantizeRequest":
        if [self.recipe, self.preset, self.target].count(None) != 2:
            raise ValueError("recipe: give one of recipe, preset and target")
        return self


class PullRequest(Body):
    model: ModelName
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
