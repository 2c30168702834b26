"""The `quantserve` command. Each command imports what it needs when it runs, so that starting is quick."""

import sys

import typer

from server.cli import chat, doctor, measure, promote, pull, quantize, recommend, serve, variants

app = typer.Typer(
    name="quantserve",
    help="Quantize language models on first use and serve them under OpenAI's API.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich would cost its import on every start
)
app.command()(serve.serve)
app.command()(quantize.quantize)
app.command()(measure.measure)
app.command()(measure.report)
app.command()(promote.promote)
app.command()(promote.rollback)
app.command()(recommend.recommend)
app.command()(chat.chat)
app.command()(pull.pull)
app.command()(doctor.doctor)
app.add_typer(variants.app, name="variants")


def main() -> None:
    """Errors that we raise on purpose become lines on stderr: exit 2 for what the user wrote, else 1."""
    from quant.errors import BadRecipe, QuantError
    from server.errors import ServerError
    from server.settings import SettingsError

    try:
        app()
    except SettingsError as error:
        _end(error.problems, 2)
    except BadRecipe as error:
        _end([str(error)], 2)
    except (QuantError, ServerError) as error:
        _end([f"quantserve: {error}"], 1)


def _end(lines: list[str], code: int) -> None:
    sys.stderr.write("".join(f"{line}\n" for line in lines))
    sys.exit(code)
