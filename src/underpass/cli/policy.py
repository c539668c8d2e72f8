"""`underpass policy`: who may take the shortcut."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from underpass import config, dataplane, kept, naming, reconcile
from underpass import policy as rulebook
from underpass.cli import output
from underpass.errors import UnderpassError
from underpass.model import Pair, many
from underpass.policy import Policy, Standing

_FILE = click.argument("file", type=click.Path(path_type=Path, readable=False, allow_dash=True))
#: Its rules were kept nowhere, or what was kept is damaged.
_UNKNOWN = kept.InForce(Policy(), "?")
_WORDS = {
    Standing.ON: "may take the shortcut",
    Standing.OFF: "stays on TCP",
    Standing.PARTLY: "depends on port or address",
    Standing.UNKNOWN: "stays on TCP: its namespace's labels are not known",
}


@click.group("policy", short_help="Who may take the shortcut: rules by pod, port, address, cgroup.")
def policy() -> None:
    """Who may take the shortcut, by the table [policy] of a configuration FILE.

    \b
      [policy]
      mode = "default-on"             # or "opt-out", the same; or "opt-in"
      namespace_marks = true          # a namespace's label counts for its pods
      [[policy.rule]]                 # the first rule that holds decides
      action = "deny"                 # or "allow"
      name = "databases"              # for people
      namespaces = ["db"]             # of the pod
      namespace_labels = { team = ["a", "b"], audited = "*" }
      pod_labels = { app = "postgres" }
      annotations = { "example.com/x" = "y" }
      ports = [5432, "6000-6010"]     # of the server
      cidrs = ["10.0.0.0/8"]          # one end's address
      cgroups = ["system.slice"]      # below the cgroup-v2 root

    What a rule does not name may be anything; what it names must all hold. Both ends of a
    connection must be allowed. Before all rules, a pod's annotation or label
    `underpass.io/shortcut` with "off" keeps it on TCP; "on" lets it in with opt-in, and overrules
    its namespace's label of the same name. A pod that is not known yet stays on TCP.
    """  # noqa: D301 - to click, a real \b says that lines stay as they are


def _table(rules: Policy) -> list[str]:
    lines = [f"mode {rules.mode.value}"]
    lines += [f"{n}. {rulebook.describe(rule)}" for n, rule in enumerate(rules.rules)]
    return lines


def _in_force(pins: Path) -> kept.InForce | None:
    """The policy that is in force, as far as anybody has kept its rules.

    Raises:
        NotLoaded: nothing is live.
    """
    with dataplane.Dataplane.open(pins) as plane:
        number = plane.policy
    return (kept.read_policy(pins) or _UNKNOWN) if number else None


@policy.command()
@output.json_option
@click.pass_obj
def show(pins: Path, as_json: bool) -> None:
    """The policy in force, and what it says of each pod."""
    found, seen = _in_force(pins), kept.read_pods(pins)
    pods = seen.pods if seen else ()
    rules = found.policy if found and found is not _UNKNOWN else None
    lacking = Standing.UNKNOWN if found else Standing.ON
    standings = [rulebook.standing(rules, pod) if rules else lacking for pod in pods]
    if as_json:
        output.print_json(
            {
                "in_force": found is not None,
                "agent": seen.pid if seen else None,
                "trouble": seen.trouble if seen else "",
                "source": found.source if found else None,
                "mode": rules.mode.value if rules else None,
                "rules": rules.rules if rules else [],
                "pods": [
                    {"pod": str(pod), "standing": standing.value}
                    | {"mark": pod.mark(), "stale": pod.stale}
                    for pod, standing in zip(pods, standings, strict=True)
                ],
            }
        )
        return
    if seen and seen.trouble:
        output.say(f"the agent does not know all pods: {seen.trouble}")
    if not found:
        output.say("no policy is in force: all may take the shortcut")
        return
    if not rules:
        if seen and seen.trouble:
            output.say("until it does, what it does not know stays on TCP")
            return
        output.say("a policy is in force whose rules were not kept: apply it again to see them")
        return
    for line in _table(rules):
        output.say(line)
    rows = [
        (str(pod), _WORDS[standing] + (" (stale)" if pod.stale else ""))
        for pod, standing in zip(pods, standings, strict=True)
    ]
    if rows:
        click.echo(output.columns([("POD", "STANDING"), *rows]))
    elif not seen:
        output.say("no agent is at work here, so nobody follows pods as they come and go")


@policy.command()
@_FILE
def check(file: Path) -> None:
    """Is FILE right? Prints what its policy says."""
    rules, _ = config.read_policy(file)
    rulebook.compile(rules, None, {})
    for line in _table(rules):
        output.say(line)


@policy.command()
@_FILE
@click.pass_obj
def apply(pins: Path, file: Path) -> None:
    """Put FILE's policy in force where no agent is at work.

    For new connections at once, for open ones with their next message. Pods that come later are
    not known and stay on TCP, until it is run again; an agent follows them.
    """
    rules, options = config.read_policy(file)
    agent = kept.read_pods(pins)
    if agent:
        cause = f"an agent (process {agent.pid}) keeps its own in force"
        raise UnderpassError("apply", file, cause, "change its configuration and send it SIGHUP")
    with dataplane.Dataplane.open(pins):
        pass  # nothing is asked of anybody if nothing is up
    seen = reconcile.enforce_once(pins, rules, options, file)
    pods = f", {many(len(seen.pods), 'pod')}" if seen.told else ""
    count = many(len(rules.rules), "rule")
    output.say(f"the policy of {file} is in force ({count}{pods})")


@dataclass(frozen=True)
class _Change:
    """A connection that would change its path; ``shortcut`` is what it may take then."""

    pair: Pair
    shortcut: bool
    rule: str


@policy.command("dry-run", short_help="What FILE's policy would change.")
@_FILE
@output.json_option
@click.pass_obj
def dry_run(pins: Path, file: Path, as_json: bool) -> None:
    """What would change if FILE's policy were put in force: pods, and open connections."""
    rules, options = config.read_policy(file)
    found = _in_force(pins)
    old = found.policy if found else Policy(namespace_marks=False)
    seen = reconcile.look(pins, options)
    rules = reconcile.fitting(rules, seen)
    new = reconcile.of_kept(rules, seen)
    before = reconcile.of_kept(old, seen) if found else None
    with dataplane.opened(pins) as planes:
        judged = naming.judged(planes, seen.pods)
    changes = [
        _Change(change.connection, change.allowed, _why(rules, change.rule))
        for change in rulebook.difference(before, new, [(j.pair, j.ends) for j in judged])
    ]
    pods = [
        {"pod": str(pod)}
        | {"before": rulebook.standing(old, pod).value if found else "on"}
        | {"after": rulebook.standing(rules, pod).value}
        for pod in (rulebook.changed_pods(old, rules, seen.pods))
    ]
    if as_json:
        output.print_json({"pods": pods, "connections": changes, "open": len(judged)})
        return
    for pod in pods:
        output.say(f"pod {pod['pod']}: {pod['before']} -> {pod['after']}")
    for change in changes:
        output.say(f"{_name(change.pair)}: {_path(change)} ({change.rule})")
    pairs = f"{len(changes)} of {many(len(judged), 'open pair')}"
    output.say(f"{many(len(pods), 'pod')} and {pairs} would change")


def _path(change: _Change) -> str:
    return "would go back to the shortcut" if change.shortcut else "would go by TCP"


def _name(pair: Pair) -> str:
    ends = (f"{end.pod} {end}" if end.pod else str(end) for end in (pair.client, pair.server))
    return " -> ".join(ends)


def _why(rules: Policy, bit: int | None) -> str:
    if bit is None:
        return f"mode {rules.mode.value}, or a pod that is not known"
    rule = rules.clauses[bit]
    return rulebook.describe(rule)
