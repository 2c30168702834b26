"""`quantserve serve`: settings and models checked first, in well under a second, then everything heavy."""

import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.loading import Loading
from server.cli.terminal import stop

if TYPE_CHECKING:
    from server.catalog import Catalog, Model, Overrides
    from server.settings import Settings

CHOSEN = "instead of what models.yaml says"
NO_BUNDLE = "there is no bundled model here: name one (quantserve serve FOLDER) or write a models.yaml"


def serve(  # noqa: PLR0913, PLR0917  one an option
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE",
            help="Folders, GGUF files or hub ids, served under their base names without a models.yaml.",
        ),
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="models.yaml [./models.yaml, else the bundled model]"),
    ] = None,
    host: Annotated[str | None, typer.Option(metavar="HOST", help="[127.0.0.1]")] = None,
    port: Annotated[str | None, typer.Option(metavar="PORT", help="[8000]")] = None,
    variant: Annotated[
        str | None, typer.Option(metavar="RECIPE", help=f"Serve this variant, {CHOSEN}.")
    ] = None,
    ctx: Annotated[
        int | None,
        typer.Option(metavar="TOKENS", min=16, max=16_777_216, help=f"Most tokens of a request, {CHOSEN}."),
    ] = None,
    parallel: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=256, help=f"Requests answered at once, {CHOSEN}.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=1024, help=f"Threads of an engine, {CHOSEN}.")
    ] = None,
    api_keys_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Keys that clients must give, one a line.")
    ] = None,
    admin_keys_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Keys for /quantize and /admin, one a line.")
    ] = None,
    allow_no_key: Annotated[
        bool, typer.Option("--allow-no-key", help="Listen beyond this machine without API keys.")
    ] = False,
    cache: Annotated[
        str | None, typer.Option(metavar="DIR", help="Built variants [~/.cache/quantserve]")
    ] = None,
    log: Annotated[
        str | None, typer.Option(metavar="LEVEL", help="debug, info, warning or error [info]")
    ] = None,
) -> None:
    """Serve models over HTTP, building their variants on first use.

    Most can also be set as variables: QUANTSERVE_MODELS, _HOST, _PORT, _CACHE, _LOG, _API_KEYS_FILE,
    _ADMIN_KEYS_FILE, _ALLOW_NO_KEY.
    """
    from server.catalog import CatalogError, Overrides
    from server.settings import misspelt, read_settings, refuse_open_bind

    for line in misspelt(os.environ):
        sys.stderr.write(f"quantserve: {line}\n")
    settings = read_settings(
        os.environ,
        models=models,
        host=host,
        port=port,
        api_keys_file=api_keys_file,
        admin_keys_file=admin_keys_file,
        allow_no_key="1" if allow_no_key else None,
        cache=cache,
        log_level=log,
    )
    if refusal := refuse_open_bind(settings):
        stop(refusal, code=2)
    overrides = Overrides(variant=_recipe_name(variant), context=ctx, parallel=parallel, threads=threads)

    def read_catalog() -> "Catalog":
        return chosen_models(settings, sources or [], models is not None, overrides)

    try:
        catalog = read_catalog()
    except CatalogError as error:
        stop(*error.problems, code=2)
    if reason := (
        cannot_encrypt(settings) or cannot_bind(settings.host, settings.port) or cannot_cache(settings.cache)
    ):
        stop(reason)
    if reasons := cannot_open(catalog):
        stop(*reasons)
    from server.app import run

    run(settings, catalog, follow=Loading(settings).follow, read_catalog=read_catalog)


def _recipe_name(variant: str | None) -> str | None:
    """Raises BadRecipe."""
    from quant.recipe import parse_recipe

    return None if variant is None else parse_recipe(variant).name


def chosen_models(
    settings: "Settings", sources: list[str], file_too: bool, overrides: "Overrides"
) -> "Catalog":
    """The sources and, with `file_too` or without any source, models.yaml's models. Raises CatalogError."""
    from server.backends import registry
    from server.catalog import Catalog, CatalogError, load_catalog, model_from_source
    from server.settings import PACKAGED_MODELS

    found: list[Model] = []
    problems: list[str] = []
    for source in sources:
        try:
            found.append(model_from_source(source))
        except CatalogError as error:
            problems += error.problems
    if file_too or not sources:
        try:
            listed = load_catalog(settings.models, backends=registry.names(), label=_label(settings.models))
            found += listed.models
        except CatalogError as error:
            problems += error.problems
            if settings.models == PACKAGED_MODELS:
                problems.append(NO_BUNDLE)
    if problems:
        raise CatalogError(problems)
    return Catalog(tuple(overrides.apply(model) for model in found))


def _label(path: Path) -> str:
    """Short where the file is below the working folder."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def cannot_open(catalog: "Catalog") -> list[str]:
    """A line for each model that nothing here can open: a library is missing, or a GPU. Imports none."""
    from quant.recipe import parse_recipe
    from server.backends import registry
    from server.errors import RequestError

    reasons = []
    for model in catalog.models:
        try:
            if (
                model.default not in model.variants
            ):  # as it is: its files, which may not be here, say what it needs
                reason = None if model.backend == "auto" else registry.load(model.backend).probe()
            elif model.backend == "auto":
                reason = registry.for_format(parse_recipe(model.default).format).probe()
            else:
                reason = registry.require(model.backend, parse_recipe(model.default).format).probe()
        except RequestError as error:
            reason = str(error)
        if reason:
            reasons.append(f"{model.id} cannot be served here: {reason}")
    return reasons


def cannot_bind(host: str, port: int) -> str | None:
    """Why nobody can listen there, or None. Asked first: a build may come before listening."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return f"cannot listen on {host} port {port}: {(error.strerror or str(error)).lower()}"
    return None


def cannot_encrypt(settings: "Settings") -> str | None:
    """Why the certificate and its key cannot be used, or None. A pass phrase is asked of nobody."""
    if settings.tls_certificate is None:
        return None
    import ssl

    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(settings.tls_certificate, settings.tls_key, password=lambda: "")
    except (OSError, ValueError) as error:  # of ssl's, too
        what = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
        return (
            "QUANTSERVE_TLS_CERTIFICATE and QUANTSERVE_TLS_KEY are no PEM files of a certificate and its key "
            f"without a pass phrase ({str(what).replace('_', ' ').lower()})"
        )
    return None


def cannot_cache(cache: Path) -> str | None:
    """Why no variant could be kept there, or None."""
    try:
        (cache / "variants").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return None
    except OSError as error:
        return f"cannot write to the cache {cache}: {(error.strerror or str(error)).lower()}"
