"""`underpass up`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from underpass import adoption, calibration, config, dataplane, kept, namespaces, reconcile
from underpass.bringup import differs, fionread_broken
from underpass.cli import output
from underpass.errors import UnderpassError
from underpass.policy import Policy

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
    help="TOML file: capacity (pairs), budget_bytes, budget_messages, node_budget_bytes, "
    "reproof (seconds, 0 = never); "
    "in [guard]: observe (seconds), admit_unknown, allow, deny (names of programs); "
    "[policy]: see `underpass policy --help`.",
)
@admit_unknown
@click.pass_obj
def up(pins: Path, cgroup: Path | None, config_path: Path | None, admit: bool) -> None:
    """Load, pin and attach; return when it is live.

    Programs are watched for 10 s of running, on plain TCP, before their new connections take the
    shortcut: see `underpass guard`. Listeners that already stand are armed in every network
    namespace, and open connections taken in where that is safe: see `underpass adopt`. Again is
    no change.
    """
    rules, options = config.read_policy(config_path)
    settings = replace(config.read(config_path), small=calibration.bounds())
    if admit:
        settings = replace(settings, admit_unknown=True)
    subtree = namespaces.check_cgroup(cgroup or namespaces.find_cgroup2())
    broken = pins.exists() or fionread_broken()
    policy = None
    if rules != Policy():
        seen = reconcile.look(pins, options)
        rules = reconcile.fitting(rules, seen)
        policy = reconcile.of_kept(rules, seen)
    changed = dataplane.up(pins, subtree, settings, fionread_broken=broken, policy=policy)
    output.say(f"underpass is {'up' if changed else 'already up'} on {subtree}")
    if not changed:
        with dataplane.Dataplane.open(pins) as plane:
            if (config_path or admit) and differs(plane.settings, settings):
                output.warn("it goes on with its own settings; `underpass upgrade` takes these")
        return
    if policy:
        try:
            kept.write_policy(pins, kept.InForce(rules, str(config_path)))
        except UnderpassError as error:  # it is in force all the same
            output.warn(str(error))
    try:
        outcomes = adoption.adopt(pins)
    except UnderpassError as error:  # it is live all the same
        output.warn(f"{error}; `underpass adopt` tries again")
        return
    if outcomes:
        output.say(adoption.told(outcomes))
