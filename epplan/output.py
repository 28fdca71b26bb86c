"""How epplan talks: data on stdout, talk on stderr, one console for each."""

import json
import sys
from typing import Any

import click
from rich.console import Console, RenderableType

_PIPE_WIDTH = 160  # of tables when nobody's terminal sets it


def print_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    click.echo(json.dumps(value, indent=2))


def print_tables(renderable: RenderableType) -> None:
    """Print tables on stdout, as wide as the terminal."""
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    Console(width=width, highlight=False, emoji=False, markup=False).print(renderable)


def talk(message: str) -> None:
    """Print a line of talk on stderr."""
    click.echo(message, err=True)
