# SPDX-License-Identifier: Apache-2.0
"""How the benchmark's command line is written: options in groups, and lists of values."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from tvmdcn.bench.sweep import parse_size

if TYPE_CHECKING:
    AnyType = click.ParamType[Any]
else:
    AnyType = click.ParamType

__all__ = ["AnyType", "ListCommand", "Listed", "Size", "option"]


class _GroupedOption(click.Option):
    """An option that the help shows under a heading."""

    def __init__(self, *arguments: Any, group: str, **fields: Any) -> None:
        super().__init__(*arguments, **fields)
        self.group = group


def option(group: str, *names: str, **fields: Any) -> Callable[[Any], Any]:
    """Return ``click.option`` of an option that the help shows under a heading."""
    return click.option(*names, cls=_GroupedOption, group=group, **fields)


class Listed(AnyType):
    """Values with commas between them: ``--threads 1,2``; with `multiple`, all of an option's values in one tuple.

    Parameters
    ----------
    of : click.ParamType
        What each value is.
    metavar : str, optional
        What the help shows as a value.
    """

    def __init__(self, of: AnyType, metavar: str | None = None) -> None:
        self.of, self.name, self._metavar = of, of.name, metavar

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the values of a text as a tuple."""
        if not isinstance(value, str):
            return value if isinstance(value, tuple) else (value,)
        return tuple(self.of.convert(part.strip(), param, ctx) for part in value.split(","))

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str | None:
        """Return what the help shows as the value."""
        return f"{self._metavar},..." if self._metavar else self.of.get_metavar(param, ctx)

    @staticmethod
    def flat(ctx: click.Context, param: click.Parameter, values: tuple[tuple[Any, ...], ...]) -> tuple[Any, ...]:
        """Return all values in their order, each once: the option's callback."""
        return tuple(dict.fromkeys(value for part in values for value in part))


class Size(AnyType):
    """A height and a width: ``64`` or ``48x64``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Return the height and the width."""
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class ListCommand(click.Command):
    """Lets options take several values after one name, ``--threads 1 2``, and groups them in the help."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Spread lists: ``--threads 1 2`` is ``--threads 1 --threads 2``."""
        lists = {
            name
            for parameter in self.params
            if isinstance(parameter, click.Option) and parameter.multiple
            for name in parameter.opts
        }
        spread: list[str] = []
        name, values = None, 0
        for arg in args:
            if arg.startswith("-"):
                name, values = (arg if arg in lists else None), 0
                spread.append(arg)
            elif name is None:
                spread.append(arg)
            else:
                spread += [name, arg] if values else [arg]
                values += 1
        return super().parse_args(ctx, spread)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, group by group in the order of their first ones."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(parameter, "group", "Other"), []).append(record)
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records)
