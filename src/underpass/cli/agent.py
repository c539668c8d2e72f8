"""`underpass agent`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from underpass import config
from underpass.agent.events import Journal
from underpass.agent.loop import Agent, Wanted
from underpass.agent.notify import Notifier
from underpass.cli import output
from underpass.daemonset import Owner
from underpass.errors import Usage
from underpass.reconcile import Reconciler


@click.command(short_help="Keep this node as it was asked to be: for systemd and Kubernetes.")
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path, readable=False),
    help="TOML file as for `up`; in [agent]: listen, cgroup, check, scan, adopt, names, drain "
    "(seconds), calibrate; in [pods]: apiserver, token, authority, node, cri; for [policy] see "
    "`underpass policy --help`.",
)
@click.option(
    "--cgroup",
    type=click.Path(path_type=Path, readable=False),
    help="Limit it to this cgroup-v2 subtree.  [default: that of the file, else the root]",
)
@click.option("--down-on-exit", is_flag=True, help="When told to end, take the data plane down.")
@click.option(
    "--daemonset",
    "owner",
    metavar="NAMESPACE/NAME",
    help="The DaemonSet that runs it: when told to end because that is deleted, or no longer wants "
    "this node, take the data plane down.",
)
@click.pass_obj
def agent(
    pins: Path, config_path: Path | None, cgroup: Path | None, down_on_exit: bool, owner: str | None
) -> int:
    """Bring underpass up, or take over what is up, and keep it so until told to end.

    It arms the listeners of namespaces that come, takes in open connections now and then, serves
    /metrics, /healthz and /readyz, and calibrates once. SIGHUP reads the configuration again.

    SIGTERM ends it and leaves the data plane at work: no connection notices. What `underpass down`
    takes down meanwhile, it brings back; `underpass pause` it leaves alone.
    """
    if config_path == config.STDIN:
        cause = "it can be read once only, and the agent reads its configuration again"
        raise Usage("read", "standard input", cause, "name a file with --config")
    journal = Journal(runnable=output.runnable_anywhere())
    of = Owner(owner) if owner else None
    wanted = Wanted(pins, config_path, cgroup, down_on_exit, of)
    work = Agent(wanted, journal, Notifier(), lambda: Reconciler(pins, config_path, journal.say))
    code = work.run()
    if work.late:
        os._exit(code)  # a thread still waits for the kernel
    return code
