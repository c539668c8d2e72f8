"""The table [policy]: what it comes to, and errors that name line and field."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st

from tests.unit.fuzz import FUZZED
from underpass import config, positions
from underpass.cli import cli
from underpass.errors import Usage
from underpass.policy import Mode, Policy, Rule

WHOLE = """
capacity = 4096

[policy]
mode = "opt-in"

[[policy.rule]]
name = "databases stay on TCP"
action = "deny"
namespaces = ["db", "db-2"]
ports = [5432, "6379-6380"]
cidrs = [
  "10.0.0.0/8",   # the pods'
  "fd00::/8",
]

[[policy.rule]]
action = "allow"
pod_labels = { app = ["web", "api"], tier = "*" }
namespace_labels = { team = "edge" }
annotations.kind = "x"
cgroups = ["/system.slice/nginx.service"]
"""


DENY = '[[policy.rule]]\naction="deny"\n'


def _file(path: Path, text: str) -> Path:
    file = path / "underpass.toml"
    file.write_text(text, errors="surrogatepass")
    return file


def test_a_whole_policy(tmp_path: Path) -> None:
    """Claim: every field of a file arrives as the rule that it means, in order."""
    file = _file(tmp_path, WHOLE)
    assert config.read_policy(file)[0] == Policy(
        Mode.OPT_IN,
        (
            Rule(
                allow=False,
                name="databases stay on TCP",
                namespaces=("db", "db-2"),
                ports=((5432, 5432), (6379, 6380)),
                cidrs=("10.0.0.0/8", "fd00::/8"),
            ),
            Rule(
                allow=True,
                pod_labels={"app": ("web", "api"), "tier": ("*",)},
                namespace_labels={"team": ("edge",)},
                annotations={"kind": ("x",)},
                cgroups=("system.slice/nginx.service",),
            ),
        ),
    )
    assert config.read(file).capacity == 4096


def test_none(tmp_path: Path) -> None:
    """Claim: without a file, or a table in it, all is on."""
    for file in (None, _file(tmp_path, "capacity = 1")):
        assert config.read_policy(file) == (Policy(), config.Pods())


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (
            'mode = "off"',
            "line 2: policy.mode: 'off' is none of default-on, opt-out, opt-in;",
        ),
        ("mode = 1", "line 2: policy.mode: "),
        ("mood = 1", "line 2: policy.mood: there is no such field"),
        ('[[policy.rule]]\naction = "drop"', "[0].action: 'drop' is none of allow, deny;"),
        ('[[policy.rule]]\nname = "x"', "line 2: policy.rule[0]: "),
        ('[[policy.rule]]\naction="deny"\nport = [1]', "line 4: policy.rule[0].port: "),
        (
            f"{DENY}\n{DENY}ports=[\n 80,\n 0\n]",
            "line 9: policy.rule[1].ports[1]: 0 ",
        ),
        ('rule = [{action="deny", ports=["a"]}]', "line 2: policy.rule[0].ports[0]: 'a' "),
        ('rule = [{action="deny", ports=["90-80"]}]', "policy.rule[0].ports[0]: 90-80 "),
        ('rule = [{action="deny", ports=[true]}]', "line 2: policy.rule[0].ports[0]: "),
        ('rule = [{action="deny", ports=[1, 1]}]', "policy.rule[0].ports: it names"),
        ('rule = [{action="deny", ports=["1-65535"]}]', "policy.rule: the rules name 65535 ports"),
        (
            'rule = [{action="deny", cidrs=["10.0.0.1/8"]}]',
            "policy.rule[0].cidrs[0]: '10.0.0.1/8' has bits beyond its length; 10.0.0.0/8 ",
        ),
        ('rule = [{action="deny", cidrs=["ten"]}]', "policy.rule[0].cidrs[0]: 'ten' is no"),
        ('rule = [{action="deny", cidrs=["::ffff:10.0.0.0/104"]}]', "policy.rule[0].cidrs[0]: "),
        ('rule = [{action="deny", cidrs=["fe80::1%eth0"]}]', "policy.rule[0].cidrs[0]: "),
        ('rule = [{action="deny", cgroups=["a/../b"]}]', "policy.rule[0].cgroups[0]: "),
        ('rule = [{action="deny", namespaces=["A B"]}]', "policy.rule[0].namespaces[0]: "),
        (
            'rule = [{action="deny", pod_labels={"a b"=1}}]',
            "line 2: policy.rule[0].pod_labels: ",
        ),
        ("[pods]\ncri = 1", "line 3: pods.cri: "),
        ('[pods]\napiserver = "10.0.0.1"', "line 3: pods.apiserver: '10.0.0.1': write"),
        ('[pods]\napiserver = "https://[::1]:6443"', "line 3: pods.apiserver: it needs"),
        ('[[policy.rule]]\naction="deny"\n' * 63, "line 2: policy.rule: "),
    ],
)
def test_where_it_is_wrong(tmp_path: Path, text: str, where: str) -> None:
    """Claim: the error names line and field, whoever reads the file and for what."""
    file = _file(tmp_path, f"[policy]\n{text}\n")
    for read in (config.read_policy, config.read):
        with pytest.raises(Usage) as raised:
            read(file)
        line = str(raised.value)
        assert where in line
        assert line.isprintable()


_VALUES = st.sampled_from(
    ['"deny"', '"allow"', "[]", "{}", "[80]", '["a"]', '["10.0.0.0/8"]', "0", "true", '""',
     '{a="b"}', '["80-90"]', '{"\\u0000"=[]}', "1979-05-27", "nan", '["::/0", "0.0.0.0/0"]']
)  # fmt: skip
_FIELDS = st.sampled_from(
    ["action", "name", "namespaces", "namespace_labels", "pod_labels", "annotations", "ports",
     "cidrs", "cgroups", "other"]
)  # fmt: skip
_RULES = st.lists(st.dictionaries(_FIELDS, _VALUES, max_size=4), max_size=4)


@FUZZED
@given(_RULES)
def test_any_rules(tmp_path: Path, rules: list[dict[str, str]]) -> None:
    """Claim: any rules are a policy, or one error that names an existing line."""
    text = "[policy]\n"
    for rule in rules:
        text += "[[policy.rule]]\n" + "".join(f"{key} = {v}\n" for key, v in rule.items())
    said = "line 1:"
    try:
        assert isinstance(config.read_policy(_file(tmp_path, text))[0], Policy)
    except Usage as error:
        said = str(error)
    assert 1 <= int(said.partition("line ")[2].partition(":")[0]) <= len(text.splitlines())


@FUZZED
@given(st.binary(max_size=200))
@example(b"[policy]\nrule = [" + b"\n" * 30_000 + b"1]")
@example(b"[policy]\nrule = [" + b"{},\n" * 12_000 + b"]")
@example(b'[policy]\nmode = """' + b"\n" * 30_000 + b'"""')
@example(b"[policy]\nrule = " + b"[" * 900 + b"]" * 900)
@example("[policy]\nmode = '\u2028'\u0085".encode())
def test_any_bytes(tmp_path: Path, data: bytes) -> None:
    """Claim: any bytes as a file are a policy or one usage error that names the file."""
    file = tmp_path / "underpass.toml"
    file.write_bytes(data)
    said = str(file)
    try:
        assert isinstance(config.read_policy(file)[0], Policy)
    except Usage as error:
        said = str(error)
    assert str(file) in said
    assert said.isprintable()


@FUZZED
@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.data())
def test_lines(gaps: list[int], data: st.DataObject) -> None:
    """Claim: the line of an element is found wherever it stands in an array, a table or a file."""
    lines, at = ["[a]", "b = ["], []
    for number, gap in enumerate(gaps):
        lines += ["# ]"] * gap
        lines.append(f"  {{ c = [{number}] }},")
        at.append(len(lines))
    lines += ["]", "[z]", "y = 1"]
    which = data.draw(st.integers(0, len(gaps) - 1))
    text = "\n".join(lines)
    assert positions.line(text, ("a", "b", which, "c", 0)) == at[which]
    assert positions.line(text, ("z", "y")) == len(lines)
    assert positions.line(text, ("a", "b", len(gaps))) == 0
    assert positions.line(text, ()) == 1


def test_paths_as_text() -> None:
    """Claim: a path is read as it is written, as far as it has numbers."""
    path: positions.Path = ("policy", "rule", 1, "ports", 0)
    assert positions.words(path) == "policy.rule[1].ports[0]"
    assert positions.parse("policy.rule[1].ports[0]") == path
    assert positions.parse("policy.rule[0].pod_labels[...]") == (*path[:2], 0, "pod_labels")


def test_standard_input() -> None:
    """Claim: `policy check -` reads what is piped in, and names it so when it is wrong."""
    text = b'[[policy.rule]]\naction = "deny"\nports = [1]\n'
    done = CliRunner().invoke(cli, ["policy", "check", "-"], input=text, standalone_mode=False)
    assert "deny port 1" in done.output
    wrong = text.replace(b"1", b"0")
    done = CliRunner().invoke(cli, ["policy", "check", "-"], input=wrong, standalone_mode=False)
    assert isinstance(done.exception, Usage)
    assert "-: line 3" in str(done.exception)


def test_an_agent_needs_a_file() -> None:
    """Claim: what can be read once only is no configuration of an agent, which reads it again."""
    done = CliRunner().invoke(cli, ["agent", "--config", "-"], input=b"", standalone_mode=False)
    assert isinstance(done.exception, Usage)
    assert "read once only" in str(done.exception)
