"""The policy in the kernel: it decides as the rules say, at once and for what stands already."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.kernel import bed as beds
from tests.kernel.bed import ADMITTING, CLIENT4, CLIENT6, SERVER4, SERVER6, Bed
from tests.kernel.commands import underpass
from tests.kernel.fixtures import MakePlane
from tests.kernel.remote import Remote, couple, exchange
from underpass import adoption, cgroups, config, dataplane, kept, naming, policy, reconcile
from underpass.dataplane import Dataplane
from underpass.errors import UnderpassError
from underpass.model import Fault, Reason
from underpass.pod import MARK, Pod
from underpass.policy import Compiled, End, Mode, Policy, Rule
from underpass.torture.worker import Place, Worker

PORT = 8080
UID = "00000000-0000-4000-8000-00000000000"


@dataclass
class Node:
    """The bed as a node with two pods: one of clients, one of servers."""

    bed: Bed
    client: Pod
    server: Pod
    workers: dict[str, Worker] = field(default_factory=dict)

    @property
    def pods(self) -> list[Pod]:
        return [self.client, self.server]

    def worker(self, pod: Pod, where: str) -> Worker:
        """A process in a container of the pod."""
        if pod.uid not in self.workers:
            at = Place(self.bed.netns[where], beds.cgroup2() / pod.cgroup / "container")
            worker = Worker(at, pod.name)
            self.bed.undo.callback(worker.kill)
            self.bed.workers.append(worker)
            self.workers[pod.uid] = worker
        return self.workers[pod.uid]

    def couple(self, address: str = SERVER4, port: int = PORT) -> tuple[Remote, Remote]:
        """A connection between the two."""
        client = self.worker(self.client, "client")
        return couple(client, self.worker(self.server, "server"), (address, port))

    def compiled(self, rules: Policy, pods: list[Pod] | None = None) -> Compiled:
        """A policy for the node; `pods` are those that are known."""
        return policy.compile(rules, self.pods if pods is None else pods, {})

    def enforce(self, rules: Policy, pods: list[Pod] | None = None) -> Compiled:
        """Put it in force."""
        found = self.compiled(rules, pods)
        dataplane.set_policy(self.bed.pins, found)
        return found


@pytest.fixture
def node(bed: Bed) -> Iterator[Node]:
    """Two pods' cgroups below the bed's own, as a kubelet makes them."""
    root = bed.cgroup / "kubepods"
    pods = []
    made = [root]
    for number, name in enumerate(("client", "server"), 1):
        path = root / f"pod{UID}{number}"
        made += [path, path / "container"]
        relative = str(path.relative_to(beds.cgroup2()))
        pods.append(Pod("default", name, f"{UID}{number}", {"app": name}, namespace_labels={},
                        cgroup=relative))  # fmt: skip
    for path in made:
        path.mkdir()
        bed.undo.callback(beds.remove_cgroup, path)
    numbers = [cgroups.number(beds.cgroup2(), pod.cgroup) for pod in pods]
    client, server = (replace(p, cgroup_id=n) for p, n in zip(pods, numbers, strict=True))
    yield Node(bed, client, server)
    kept.remove(bed.pins)


def _refused(plane: Dataplane) -> int:
    return plane.counters().refused_total["policy"]


def _paths(plane: Dataplane) -> set[tuple[str, str]]:
    [pair] = plane.pairs()
    return {(d.path, d.reason) for d in (pair.client_to_server, pair.server_to_client)}


@pytest.mark.parametrize("denied", ["client", "server"])
@pytest.mark.parametrize("fault", [Fault(0), Fault.ONE_END], ids=["sound", "twin"])
def test_a_pod_that_opts_out(node: Node, plane: MakePlane, denied: str, fault: Fault) -> None:
    """Claim: a pod with the mark never takes the shortcut, whichever end it is; it works by TCP.

    Known-bad: a data plane that asks for the client's end alone lets the server's pod in.
    """
    live = plane(ADMITTING, fault)
    out = replace(getattr(node, denied), annotations={MARK: "off"})
    setattr(node, denied, out)
    node.enforce(Policy())
    near, far = node.couple()
    exchange(near, far, 1)
    slips = fault is Fault.ONE_END and denied == "server"
    assert len(live.pairs()) == slips
    assert (live.counters().shortcut_messages_total > 0) == slips
    assert (_refused(live) > 0) == (not slips)


def test_a_change_pauses_and_resumes(node: Node, plane: MakePlane) -> None:
    """Claim: an open pair goes by TCP while it does not qualify, and comes back when it does."""
    live = plane(ADMITTING)
    node.enforce(Policy())
    near, far = node.couple()
    exchange(near, far, 1)
    assert _paths(live) == {("shortcut", "shortcut")}
    every = Rule(allow=False, pod_labels={"app": ("*",)})
    for rules in (Policy(Mode.OPT_IN), Policy(rules=(every,))):
        node.enforce(rules)
        before = live.counters().shortcut_messages_total
        exchange(near, far, 1)
        assert _paths(live) == {("tcp", Reason.POLICY.word)}
        assert live.counters().shortcut_messages_total == before
        dataplane.set_policy(node.bed.pins, None)
        exchange(near, far, 1)
        assert _paths(live) == {("shortcut", "shortcut")}


def test_pods_come_and_go(node: Node, plane: MakePlane) -> None:
    """Claim: a pod stays on TCP until it is known, and then all of it may take the shortcut.

    What it had opened before is taken in by `adopt`.
    """
    live = plane(ADMITTING)
    node.enforce(Policy(), [node.client])
    early = node.couple()
    exchange(*early, 1)
    assert live.pairs() == []
    assert _refused(live) > 0
    dataplane.set_groups(node.bed.pins, node.compiled(Policy()).groups)
    late = node.couple(port=PORT + 1)
    exchange(*late, 3)
    assert _paths(live) == {("shortcut", "shortcut")}
    adoption.adopt(node.bed.pins, first_wait=0)
    exchange(*early, 1)
    assert len(live.pairs()) == 1 + adoption.possible()  # Linux 6.12
    dataplane.set_groups(node.bed.pins, node.compiled(Policy(), [node.server]).groups)
    exchange(*late, 3)
    assert {d.reason for p in live.pairs() for d in (p.client_to_server,)} >= {"policy"}


@pytest.mark.parametrize(
    ("rule", "address", "port", "shortcut"),
    [
        (Rule(allow=False, ports=((PORT, PORT),)), SERVER4, PORT, False),
        (Rule(allow=False, ports=((PORT, PORT),)), SERVER4, PORT + 1, True),
        (Rule(allow=False, ports=((PORT, PORT),)), SERVER6, PORT, False),
        (Rule(allow=False, cidrs=(f"{CLIENT4}/32",)), SERVER4, PORT, False),
        (Rule(allow=False, cidrs=(f"{SERVER4}/32",)), SERVER4, PORT, False),
        (Rule(allow=False, cidrs=("10.77.0.0/16",)), SERVER4, PORT, False),
        (Rule(allow=False, cidrs=("10.78.0.0/16",)), SERVER4, PORT, True),
        (Rule(allow=False, cidrs=("0.0.0.0/0",)), SERVER6, PORT, True),
        (Rule(allow=False, cidrs=("::/0",)), SERVER4, PORT, True),
        (Rule(allow=False, cidrs=("fd77::/64",)), SERVER6, PORT, False),
        (Rule(allow=False, cidrs=(f"{CLIENT6}/128",)), SERVER6, PORT, False),
        (Rule(allow=False, namespaces=("kube-system",)), SERVER4, PORT, True),
    ],
)
def test_ports_and_prefixes(
    node: Node, plane: MakePlane, rule: Rule, address: str, port: int, shortcut: bool
) -> None:
    """Claim: rules about ports and prefixes hold for the connections that they name alone."""
    live = plane(ADMITTING)
    node.enforce(Policy(rules=(rule,)))
    exchange(*node.couple(address, port), 1)
    assert (live.counters().shortcut_messages_total > 0) == shortcut


def test_a_server_of_both_families(node: Node, plane: MakePlane) -> None:
    """Claim: an IPv4 prefix holds a connection of IPv4 at a socket of IPv6."""
    live = plane(ADMITTING)
    node.enforce(Policy(rules=(Rule(allow=False, cidrs=(f"{CLIENT4}/32",)),)))
    client, server = node.worker(node.client, "client"), node.worker(node.server, "server")
    exchange(*couple(client, server, (SERVER4, PORT), listen_on=("::", PORT)), 1)
    assert live.counters().shortcut_messages_total == 0
    exchange(*couple(client, server, (SERVER6, PORT), listen_on=("::", PORT)), 3)
    assert live.counters().shortcut_messages_total > 0


_CIDRS = ("10.0.0.0/8", "10.77.0.0/24", f"{CLIENT4}/32", f"{SERVER4}/32", "0.0.0.0/0", "fd77::/64",
          f"{SERVER6}/128", "::/0")  # fmt: skip
_RULE = st.builds(
    Rule,
    allow=st.booleans(),
    pod_labels=st.sampled_from([{}, {}, {"app": ("client",)}, {"app": ("server",)}]),
    ports=st.sampled_from([(), (), ((PORT, PORT),), ((PORT + 1, PORT + 3),)]),
    cidrs=st.one_of(st.just(()), st.lists(st.sampled_from(_CIDRS), max_size=2).map(tuple)),
)
_POLICIES = st.builds(
    Policy, mode=st.sampled_from(Mode), rules=st.lists(_RULE, max_size=8).map(tuple)
)


def test_the_kernel_decides_as_the_rules_say(node: Node, plane: MakePlane, long_run: bool) -> None:
    """Claim: for any rules, those connections take the shortcut that `decide` allows."""
    live = plane(ADMITTING)
    ends = {at: node.couple(*at) for at in ((SERVER4, PORT), (SERVER4, PORT + 1), (SERVER6, PORT))}
    for number, (near, far) in enumerate(ends.values()):
        exchange(near, far, 2 * number + 1)

    @settings(
        max_examples=400 if long_run else 60,
        derandomize=not long_run,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(_POLICIES)
    def check(rules: Policy) -> None:
        compiled = node.enforce(rules)
        expected = set()
        for number, ((address, port), (near, far)) in enumerate(ends.items()):
            local = near.names()[0][0]
            both = (
                End((node.client.cgroup_id,), local, address, port),
                End((node.server.cgroup_id,), address, local, port),
            )
            if policy.both(compiled, both)[0]:
                expected.add((address, port))
            exchange(near, far, 2 * number + 1, 1)
            exchange(near, far, 2 * number + 1, 1)
        taken = {
            (pair.server.address, pair.server.port)
            for pair in live.pairs()
            if pair.client_to_server.path == "shortcut"
        }
        assert taken == expected, rules

    check()


def test_rules_for_a_cgroup_within_a_pod(node: Node, plane: MakePlane) -> None:
    """Claim: the nearest cgroup that has rules counts, so a container may differ from its pod."""
    live = plane(ADMITTING)
    inner = f"{node.server.cgroup}/container"
    rules = Policy(rules=(Rule(allow=False, cgroups=(inner,)),))
    known = {inner: cgroups.number(beds.cgroup2(), inner)}
    dataplane.set_policy(node.bed.pins, policy.compile(rules, node.pods, known))
    exchange(*node.couple(), 1)
    assert live.counters().shortcut_messages_total == 0
    dataplane.set_policy(node.bed.pins, policy.compile(Policy(), node.pods, known))
    exchange(*node.couple(port=PORT + 1), 3)
    assert live.counters().shortcut_messages_total > 0


def test_an_upgrade_keeps_the_policy(node: Node, plane: MakePlane) -> None:
    """Claim: the generation that takes over denies what the one before denied."""
    plane(ADMITTING)
    node.enforce(Policy(rules=(Rule(allow=False, ports=((PORT, PORT),)),)))
    dataplane.upgrade(node.bed.pins)
    exchange(*node.couple(), 1)
    exchange(*node.couple(port=PORT + 1), 3)
    with Dataplane.open(node.bed.pins) as heir:
        [pair] = heir.pairs()
        assert pair.server.port == PORT + 1
        assert _refused(heir) > 0


# -- the command -----------------------------------------------------------------------------

DENY = '[[policy.rule]]\naction = "deny"\n'
_OPTIONS = '[pods]\napiserver = ""\ncri = ""\n'


def _file(path: Path, text: str) -> Path:
    file = path / "policy.toml"
    file.write_text(_OPTIONS + text)
    return file


def _keep(node: Node, *, pid: int = 1, old: bool = False) -> None:
    written = 0.0 if old else kept.now()
    kept.write_pods(node.bed.pins, kept.Pods(written, pid, True, {}, tuple(node.pods)))


def test_the_command_without_an_agent(node: Node, plane: MakePlane, tmp_path: Path) -> None:
    """Claim: `policy apply` puts rules in force, `show` prints them, `dry-run` foretells."""
    live = plane(ADMITTING)
    pins = node.bed.pins
    near, far = node.couple()
    exchange(near, far, 1)
    file = _file(tmp_path, f'{DENY}ports = [{PORT}]\nname = "no 8080"\n')
    assert "no policy is in force" in underpass(pins, "policy", "show").ok().out
    assert f"deny port {PORT} (no 8080)" in underpass(pins, "policy", "check", file).ok().out
    host = _file(tmp_path, '[policy]\nmode = "opt-in"\n')
    [change] = underpass(pins, "policy", "dry-run", host, "--json").document()["connections"]
    assert change["shortcut"] is False
    assert change["pair"]["server"]["port"] == PORT
    exchange(near, far, 1)
    assert _paths(live) == {("shortcut", "shortcut")}
    underpass(pins, "policy", "apply", host).ok()
    exchange(near, far, 1)
    assert _paths(live) == {("tcp", "policy")}
    shown = underpass(pins, "policy", "show", "--json").document()
    assert (shown["in_force"], shown["mode"], shown["agent"]) == (True, "opt-in", None)
    explained = underpass(pins, "explain", CLIENT4, f"{SERVER4}:{PORT}").ok().out
    assert "the policy keeps one end on TCP" in explained
    assert "policy show" in explained


def test_the_command_beside_an_agent(node: Node, plane: MakePlane, tmp_path: Path) -> None:
    """Claim: pods that an agent keeps are named and judged; its policy is not replaced under it."""
    plane(ADMITTING)
    pins = node.bed.pins
    near, far = node.couple()
    exchange(near, far, 1)
    inodes = {w: Path("/run/netns", node.bed.netns[w]).stat().st_ino for w in ("client", "server")}
    node.client = replace(node.client, netns=inodes["client"], containers={"ab" * 32: "web"})
    node.server = replace(node.server, netns=inodes["server"])
    _keep(node)
    [pair] = underpass(pins, "connections", "--json").document()
    assert pair["client"]["pod"] == "default/client/web"
    assert pair["server"]["pod"] == "default/server"
    assert "default/client/web" in underpass(pins, "connections").ok().out
    explained = underpass(pins, "explain", CLIENT4, SERVER4).ok().out
    assert f"(default/client/web) -> {SERVER4}:{PORT} (default/server)" in explained
    file = _file(tmp_path, f'{DENY}pod_labels = {{ app = "server" }}\n')
    found = underpass(pins, "policy", "dry-run", file, "--json").document()
    assert found["pods"] == [{"pod": "default/server", "before": "on", "after": "off"}]
    [change] = found["connections"]
    assert change["pair"]["client"]["pod"] == "default/client/web"
    assert "deny pod labelled app=server" in change["rule"]
    underpass(pins, "policy", "apply", file).failed(1, "an agent", "SIGHUP")
    node.enforce(Policy())
    kept.write_policy(pins, kept.InForce(config.read_policy(file)[0], "policy.toml"))
    shown = underpass(pins, "policy", "show", "--json").document()
    assert (shown["agent"], shown["source"]) == (1, "policy.toml")
    assert shown["rules"][0]["pod_labels"] == {"app": ["server"]}
    standings = {each["pod"]: each["standing"] for each in shown["pods"]}
    assert standings == {"default/client": "on", "default/server": "off"}
    text = underpass(pins, "policy", "show").ok().out
    assert "deny pod labelled app=server" in text
    assert re.search(r"default/server +stays on TCP", text)
    node.enforce(config.read_policy(file)[0])
    exchange(near, far, 1)
    explained = underpass(pins, "explain", CLIENT4, SERVER4).ok().out
    assert (
        "The server's pod default/server is denied by: deny pod labelled app=server." in explained
    )
    _keep(node, old=True)
    [pair] = underpass(pins, "connections", "--json").document()
    assert pair["client"]["pod"] is None


@pytest.mark.parametrize("host", [False, True], ids=["sidecar", "host network"])
def test_names_by_process(node: Node, plane: MakePlane, host: bool) -> None:
    """Claim: where a network namespace does not tell pod or container, the process does."""
    live = plane(ADMITTING)
    boxes = {"aa" * 32: "app", "bb" * 32: "sidecar"}
    inode = Path("/run/netns", node.bed.netns["server"]).stat().st_ino
    server = replace(node.server, containers=boxes, netns=inode, host_network=host)
    other = replace(node.client, netns=inode, host_network=True)  # there, too, in the second case
    workers = {}
    for box, name in boxes.items():
        path = beds.cgroup2() / server.cgroup / box
        path.mkdir()
        node.bed.undo.callback(beds.remove_cgroup, path)
        workers[name] = Worker(Place(node.bed.netns["server"], path), name)
        node.bed.undo.callback(workers[name].kill)
        node.bed.workers.append(workers[name])
    client = node.worker(node.client, "client")
    for port, worker in enumerate(workers.values(), PORT):
        exchange(*couple(client, worker, (SERVER4, port)), 1)
    pods = [server, other] if host else [server]
    found = {p.server.port: p.server.pod for p in naming.pairs([live], pods)}
    assert found == {PORT: "default/server/app", PORT + 1: "default/server/sidecar"}
    assert {p.client.pod for p in naming.pairs([live], pods)} == {None}
    whole = naming.judged([live], pods)
    assert {each.ends[1].groups[1] for each in whole} == {node.server.cgroup_id}
    assert {each.ends[0].groups[1] for each in whole} == {node.client.cgroup_id}


def test_up_puts_a_policy_in_force(node: Node, tmp_path: Path) -> None:
    """Claim: `up --config` with a policy is `up` and `policy apply`."""
    pins = node.bed.pins
    file = _file(tmp_path, '[policy]\nmode = "opt-in"\n')
    up = underpass(pins, "up", "--admit-unknown", "--cgroup", node.bed.cgroup, "--config", file)
    up.ok()
    near, far = node.couple()
    exchange(near, far, 1)
    assert json.loads(underpass(pins, "connections", "--json").ok().out) == []
    underpass(pins, "policy", "apply", _file(tmp_path, "")).ok()
    underpass(pins, "down").ok()


def test_a_policy_whose_rules_cannot_be_kept(
    node: Node, plane: MakePlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: it is not put in force; one that is, and that nobody has kept, is not called empty."""
    live = plane(ADMITTING)
    pins, file = node.bed.pins, _file(tmp_path, '[policy]\nmode = "opt-in"\n')
    rules, options = config.read_policy(file)
    with monkeypatch.context() as patch:
        patch.setattr(kept, "DIRECTORY", Path("/proc/none"))
        with pytest.raises(UnderpassError, match="cannot write"):
            reconcile.enforce_once(pins, rules, options, file)
    assert not live.policy
    underpass(pins, "policy", "apply", file).ok()
    (kept.DIRECTORY / f"policy-{pins.name}.json").unlink()
    shown = underpass(pins, "policy", "show", "--json").document()
    assert (shown["in_force"], shown["mode"]) == (True, None)
    assert "were not kept" in underpass(pins, "policy", "show").ok().out


def test_hostile_kept_files(node: Node, plane: MakePlane) -> None:
    """Claim: a file in the place of the agent's that is none of ours, or no file, is left aside."""
    plane(ADMITTING)
    at = kept.DIRECTORY / f"pods-{node.bed.pins.name}.json"
    kept.DIRECTORY.mkdir(exist_ok=True)
    for data in (b"", b"{}", b"[", b"\xff", b'{"written": 1e999, "pods": [1]}'):
        at.write_bytes(data)
        assert underpass(node.bed.pins, "connections", "--json").document() == []
    at.unlink()
    at.symlink_to("/dev/zero")
    assert underpass(node.bed.pins, "connections", "--json").document() == []
    at.unlink()
    _keep(node)
    assert at.stat().st_mode & 0o777 == 0o600
    assert underpass(node.bed.pins, "connections", "--json").document() == []
