"""`underpass up`."""

from __future__ import annotations

from pathlib import Path

import click

from underpass import config, dataplane, namespaces


@click.command()
@click.option(
    "--cgroup",
    type=click.Path(path_type=Path),
    help="Limit it to this cgroup-v2 subtree.  [default: the cgroup-v2 root]",
)
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    help="TOML file: capacity (pairs), budget_bytes, budget_messages, node_budget_bytes.",
)
@click.pass_obj
def up(pins: Path, cgroup: Path | None, config_path: Path | None) -> None:
    """Load, pin and attach; return when new connections take the shortcut.

    Listeners that already stand are armed in every network namespace; connections that were open
    before stay on plain TCP. Again is no change.
    """
    settings = config.read(config_path)
    subtree = cgroup or namespaces.find_cgroup2()
    changed = dataplane.up(pins, subtree, settings)
    click.echo(f"underpass is {'up' if changed else 'already up'} on {subtree}")
