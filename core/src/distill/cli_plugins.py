"""Commands on what plugins bring: ``plugins``, and presets with ``ls``, ``cat`` and ``cp``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click

from distill.cli_options import plugin_option
from distill.cli_quick import quick
from distill.registry import SINGULAR


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@plugin_option
@quick()
def plugins(as_json: bool, plugin_files: Sequence[Path]) -> None:
    """List installed plugins, what they bring, and what is wrong with the broken ones.

    Long lists are cut; --json has every name.
    """
    from distill.plugins import plugins as load_plugins

    registry = load_plugins(plugin_files)
    if as_json:
        records = [vars(record) for record in registry.records]
        click.echo(json.dumps(records, indent=2))
        return
    for record in registry.records:
        state = "BROKEN" if record.error else ""
        click.echo(f"{record.provider} ({record.name}) {state}".rstrip())
        if record.error:
            click.echo(f"  {record.error}")
        for kind, names in record.components.items():
            click.echo(f"  {kind.replace('_', ' ')}: {_shortened(names)}")
    for entries in registry.duplicates():
        providers = " and ".join(entry.provider for entry in entries)
        click.echo(f"offered twice: {SINGULAR[entries[0].kind]} {entries[0].name}, by {providers}")


@click.command()
@click.argument("text", default="")
@plugin_option
@quick()
def ls(text: str, plugin_files: Sequence[Path]) -> None:
    """List presets: ready experiment files that plugins bring.

    With TEXT, only those that have it in their name, description or package, e.g. `distill ls
    cifar`. Next: `distill cat NAME`, `distill cp NAME`.
    """
    from distill.plugins import plugins as load_plugins
    from distill.presets import listed

    presets = listed(load_plugins(plugin_files), text)
    widths = [max(map(len, column)) for column in zip(*presets, strict=True)]
    for preset in presets:
        cells = zip(preset, widths, strict=True)
        click.echo("  ".join(cell.ljust(width) for cell, width in cells).rstrip())
    if not presets:
        click.echo("no installed plugin brings presets; distill-kd does: pip install distill-kd")


@click.command()
@click.argument("name")
@plugin_option
@quick()
def cat(name: str, plugin_files: Sequence[Path]) -> None:
    """Print the preset NAME; its comments say what it needs and what is to be expected of it."""
    from distill.plugins import plugins as load_plugins
    from distill.presets import preset_text

    click.echo(preset_text(load_plugins(plugin_files), name), nl=False)


@click.command()
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path), default=Path())
@click.option("--force", is_flag=True, help="Overwrite the file if it exists.")
@plugin_option
@quick()
def cp(name: str, file: Path, force: bool, plugin_files: Sequence[Path]) -> None:
    """Copy the preset NAME to FILE, a file or an existing folder.  [default: ./NAME.yaml]

    Then change it at will and run it: `distill run NAME.yaml`.
    """
    from distill.plugins import plugins as load_plugins
    from distill.presets import copy_preset

    registry = load_plugins(plugin_files)
    click.echo(f"wrote {copy_preset(registry, name, file, overwrite=force)}")


def _shortened(names: Sequence[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(sorted(names)[:limit]) + more
