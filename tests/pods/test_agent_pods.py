"""The agent on a real Kubernetes node: pods into the kernel's table, and into commands' hands."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.agent.agents import Agent
from tests.agent.conftest import (
    StartAgent,
    agent,  # noqa: F401 - a fixture
)
from tests.kernel.bed import Bed, cgroup2
from tests.kernel.commands import underpass
from tests.kernel.waiting import wait_until
from tests.pods import faults
from tests.pods.relay import Relay
from tests.pods.testbed import Kubernetes
from underpass import abi, cgroups, kept, libbpf
from underpass.apiserver import Access
from underpass.dataplane import Dataplane
from underpass.pinning import LINK
from underpass.pod import MARK, Pod

OUT = 1
"""The bit of the built-in rule for pods with the mark "off"."""


def _options(access: Access, policy: str = "", cri: str = "") -> str:
    return f"""
[pods]
apiserver = "https://{access.host}:{access.port}"
token = "{access.token}"
authority = "{access.authority}"
node = "{access.node}"
cri = "{cri}"
[policy]
{policy}
"""


def _groups(pins: Path) -> dict[int, int]:
    """Cgroup -> mask of the rules that may hold, as the kernel has it."""
    with Dataplane.open(pins) as plane:
        bank = (plane.policy - 1) & 1
        items = libbpf.items(plane.fd("groups"), abi.Group, abi.u64)
        return {at.cgroup: mask.value for at, mask in items if at.bank == bank}


def _known(pins: Path, cluster: Kubernetes, name: str) -> Pod | None:
    found = kept.read_pods(pins)
    every = found.pods if found else ()
    return next((p for p in every if (p.namespace, p.name) == (cluster.namespace, name)), None)


def _wait(pins: Path, cluster: Kubernetes, name: str, mask: Callable[[int], bool]) -> Pod:
    """Wait until the kernel knows a pod, with the right rules."""

    def there() -> Pod | None:
        pod = _known(pins, cluster, name)
        groups = _groups(pins)
        return pod if pod and pod.cgroup_id in groups and mask(groups[pod.cgroup_id]) else None

    found = wait_until(there, f"{name} is in the kernel's table", 30)
    assert found is not None
    return found


def _in(mask: int) -> bool:
    return not mask & OUT


def _out(mask: int) -> bool:
    return bool(mask & OUT)


def _ready(running: Agent) -> Agent:
    running.wait_ready()
    return running


def test_rights_that_are_missing_are_told(
    bed: Bed,
    agent: StartAgent,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Claim: an agent that may not list pods says so, in its log and by `policy show`."""
    with faults.serving(tmp_path) as server:
        server.lists = [faults.Answer([b'{"message": "it cannot list pods"}'], status=403)]
        running = _ready(agent(top=_options(server.access)))

        def told() -> bool:
            shown = underpass(bed.pins, "policy", "show").ok().out
            return "does not know all pods: apiserver does not tell" in shown and "403" in shown

        wait_until(told, "`policy show` says so")
        [line] = [line for line in running.lines if '"error"' in line]
        assert '"job": "pods"' in line
        assert "403" in line


def test_pods_reach_the_kernel(
    bed: Bed,
    agent: StartAgent,  # noqa: F811
    kubernetes: Kubernetes,
    measured: Callable[[str], None],
) -> None:
    """Claim: pods that come, change and go do so in the kernel's table, and a reload counts."""
    pins, own = bed.pins, ("-n", kubernetes.namespace)
    kubernetes.run("first")
    running = _ready(agent(top=_options(kubernetes.access, cri=str(kubernetes.socket))))
    first = _wait(pins, kubernetes, "first", _in)
    kubernetes.kubectl(*own, "annotate", "pod", "first", f"{MARK}=off")
    _wait(pins, kubernetes, "first", _out)
    shown = underpass(pins, "policy", "show", "--json").document()
    assert shown["agent"] == running.process.pid
    standings = {each["pod"]: each["standing"] for each in shown["pods"]}
    assert standings[f"{kubernetes.namespace}/first"] == "off"
    kubernetes.run("second")
    second = _wait(pins, kubernetes, "second", _in)
    kubernetes.kubectl("label", "namespace", kubernetes.namespace, f"{MARK}=off")
    _wait(pins, kubernetes, "second", _out)
    kubernetes.kubectl("label", "namespace", kubernetes.namespace, f"{MARK}-")
    _wait(pins, kubernetes, "second", _in)
    assert [line for line in running.lines if '"error"' in line] == []

    running.write(_options(kubernetes.access, 'mode = "opt-in"\n[[policy.rule]]\naction = "maybe"'))
    running.tell(signal.SIGHUP)
    refused = running.wait("error")["error"]
    assert "policy.rule[0].action" in refused
    assert "line " in refused
    _wait(pins, kubernetes, "second", _in)
    rule = f'[[policy.rule]]\naction = "deny"\nnamespaces = ["{kubernetes.namespace}"]'
    running.write(_options(kubernetes.access, rule))
    running.tell(signal.SIGHUP)
    _wait(pins, kubernetes, "second", lambda mask: mask == 0b10)
    _wait(pins, kubernetes, "first", lambda mask: mask == 0b11)

    kubernetes.kubectl(*own, "delete", "pod", "second")
    wait_until(lambda: second.cgroup_id not in _groups(pins), "it is out of the table")
    assert first.cgroup_id in _groups(pins)
    size = _status(running.process.pid, "VmRSS") / 1024
    peak = _status(running.process.pid, "VmHWM") / 1024
    measured(f"agent with pods of both sources: {size:.0f} MiB, at most {peak:.0f} MiB")
    assert peak < 64


def _status(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise AssertionError(field)


@pytest.mark.timeout(180)
def test_an_agent_that_starts_while_the_api_server_is_away(
    bed: Bed,
    agent: StartAgent,  # noqa: F811
    kubernetes: Kubernetes,
    relay: Relay,
) -> None:
    """Claim: what is in force stays, names too, and it is caught up once the server is back."""
    pins = bed.pins
    kubernetes.run("first")
    running = _ready(agent(top=_options(kubernetes.access)))
    first = _wait(pins, kubernetes, "first", _in)
    running.end()
    assert kept.read_pods(pins) is None
    relay.go_away()
    before = relay.refused
    running = _ready(agent(top=_options(kubernetes.access)))
    wait_until(lambda: relay.refused > before, "it asks the server")
    still = _wait(pins, kubernetes, "first", _in)
    assert (still.name, still.stale) == (first.name, True)
    kubernetes.run("second")
    relay.away = False
    _wait(pins, kubernetes, "second", _in)
    assert not _wait(pins, kubernetes, "first", _in).stale


def test_a_policy_is_there_before_the_first_connection(
    bed: Bed,
    agent: StartAgent,  # noqa: F811
) -> None:
    """Claim: a generation that the agent brings up has its policy when it is attached."""
    running = agent(top='[pods]\napiserver = ""\ncri = ""\n[policy]\nmode = "opt-in"\n')
    wait_until((bed.pins / LINK).exists, "it is attached")
    with Dataplane.open(bed.pins) as plane:
        assert plane.policy
    running.wait_ready()
    assert running.wait("policy")["mode"] == "opt-in"
    running.write('[pods]\napiserver = ""\ncri = ""\n')
    running.tell(signal.SIGHUP)
    running.wait("policy", 2)
    with Dataplane.open(bed.pins) as plane:
        assert bool(plane.policy) == bool(cgroups.find(cgroup2()).keeping)
