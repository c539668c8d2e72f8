"""`underpass up`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from underpass import calibration, config, dataplane, namespaces, selftest
from underpass.cli import output
from underpass.errors import UnderpassError, Unsupported

admit_unknown = click.option(
    "--admit-unknown",
    "admit",
    is_flag=True,
    help="Do not watch programs before they may take the shortcut (for benchmarks and labs).",
)


@click.command()
@click.option(
    "--cgroup",
    type=click.Path(path_type=Path, readable=False),
    help="Limit it to this cgroup-v2 subtree.  [default: the cgroup-v2 root]",
)
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path, readable=False),
    help="TOML file: capacity (pairs), budget_bytes, budget_messages, node_budget_bytes; "
    "in [guard]: observe (seconds), admit_unknown, allow, deny (names of programs).",
)
@admit_unknown
@click.pass_obj
def up(pins: Path, cgroup: Path | None, config_path: Path | None, admit: bool) -> None:
    """Load, pin and attach; return when it is live.

    Programs are watched for 10 s of running, on plain TCP, before their new connections take the
    shortcut: see `underpass guard`. Listeners that already stand are armed in every network
    namespace; connections that were open before stay on plain TCP. Again is no change.
    """
    settings = replace(config.read(config_path), small=calibration.bounds())
    if admit:
        settings = replace(settings, admit_unknown=True)
    subtree = namespaces.check_cgroup(cgroup or namespaces.find_cgroup2())
    broken = pins.exists() or fionread_broken()
    changed = dataplane.up(pins, subtree, settings, fionread_broken=broken)
    output.say(f"underpass is {'up' if changed else 'already up'} on {subtree}")


def fionread_broken() -> bool:
    """Try this kernel before traffic does; tells whether the safe mode for FIONREAD is needed.

    Raises:
        Unsupported: it lacks a behaviour that underpass depends on.
    """
    namespaces.check_node()
    try:
        outcomes = selftest.run(quick=True)
    except Unsupported:
        raise
    except UnderpassError:
        return True  # no test bed here, as in a read-only cgroup file system: the safe mode
    for outcome in outcomes:
        if outcome.vital and not outcome.ok:
            cause = f"{outcome.name}: {outcome.detail}"
            raise Unsupported("trust", "this kernel", cause, "run `underpass doctor`")
    return selftest.fionread_broken(outcomes)
