"""A model and the set of models; pure values, no file is read here."""

import re
from collections.abc import Iterator

import msgspec
from msgspec import Struct

from server.catalog.gates import Gates
from server.errors import UnknownModel

DEFAULT_VARIANT = "q4_k_m"
DEFAULT_PARALLEL = 8
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
VARIANT = re.compile(r"[a-z0-9][a-z0-9._-]{0,95}")
NAME_RULE = "a name is letters, digits, '.', '_' and '-', 96 at most, so no ':' and no '/'"


class CatalogError(Exception):
    """`problems` holds every mistake, one line each: "file:line: text" where there is a file."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Model(Struct, frozen=True, kw_only=True):
    """One entry of models.yaml, checked."""

    id: str
    source: str  # absolute path of a folder or .gguf file, or a hub id "org/name"
    revision: str | None = None  # of a hub id
    aliases: tuple[str, ...] = ()
    variants: tuple[str, ...] = (DEFAULT_VARIANT,)  # recipe names; empty for a source that is served as it is
    default: str = DEFAULT_VARIANT  # served under the bare id; of a ready source its own type
    context: int | None = (
        None  # tokens of one request; None: Settings.default_context, or less if the model has less
    )
    parallel: int = DEFAULT_PARALLEL
    keep_alive: float | None = None  # idle seconds before it is unloaded; None: never
    preload: bool = False
    backend: str = "auto"  # a name of server.backends.registry; auto: the first that opens the format
    threads: int | None = None  # None: what the machine allows
    kv_tokens: int | None = None  # None: context x parallel
    fallback: bool = False  # where memory is short, the bare name is answered by a smaller built variant
    deterministic: bool = False  # answers do not depend on what else runs, at the price of batching
    gate: Gates = Gates()  # how far from the source a variant may be to be served

    @property
    def is_ready(self) -> bool:
        """The source is served as it is (GGUF file, quantized checkpoint): there is nothing to build."""
        return not self.variants

    @property
    def names(self) -> tuple[str, ...]:
        return (self.id, *self.aliases)


class Overrides(Struct, frozen=True, kw_only=True):
    """What the command line says of every model of a run, over what models.yaml says."""

    variant: str | None = None
    context: int | None = None
    parallel: int | None = None
    threads: int | None = None

    def apply(self, model: Model) -> Model:
        """Raises CatalogError where the model cannot be run so."""
        changes: dict[str, object] = {
            name: value
            for name in ("context", "parallel", "threads")
            if (value := getattr(self, name)) is not None
        }
        if self.variant and self.variant != model.default:
            if model.is_ready:
                what = "a GGUF file" if model.source.endswith(".gguf") else "a quantized checkpoint"
                raise CatalogError(
                    [f"{model.id}: {what} is served as it is ({model.default}), not as {self.variant}"]
                )
            changes["default"] = self.variant
            if self.variant not in model.variants:
                changes["variants"] = (self.variant, *model.variants)
        changed = msgspec.structs.replace(model, **changes)
        if changed.kv_tokens and changed.kv_tokens < (changed.context or 0):
            raise CatalogError(
                [f"{model.id}: kv_tokens ({changed.kv_tokens}) is less than the context ({changed.context})"]
            )
        return changed


class Catalog(Struct, frozen=True):
    """All models of a run. Ids and aliases are unique over all of them."""

    models: tuple[Model, ...]

    def __post_init__(self) -> None:
        if clashes := list(_clashes(self.models)):
            raise CatalogError(clashes)

    def resolve(self, name: str) -> tuple[Model, str | None]:
        """The model of "id", "alias", "id:variant" or "alias:variant", and the variant in lower case.

        Whether the variant exists is for the pool to say: it also knows those that were built later.
        Raises UnknownModel, also for what can be no variant's name.
        """
        stem, colon, variant = name.partition(":")
        variant = variant.lower()
        found = next((model for model in self.models if stem in model.names), None)
        if found is None or (colon and not VARIANT.fullmatch(variant)):
            known = ", ".join(model.id for model in self.models[:20])
            raise UnknownModel(f"no such model; this server has: {known}", param="model")
        return found, variant or None


def _clashes(models: tuple[Model, ...]) -> Iterator[str]:
    owners: dict[str, str] = {}
    for model in models:
        for name in model.names:
            if name in owners:
                yield f"two models are called {name!r}: {owners[name]} and {model.source}"
            owners.setdefault(name, model.source)
