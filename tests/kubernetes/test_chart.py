"""The manifest and the chart: valid for old and new Kubernetes, and the same."""

from __future__ import annotations

import json
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml

from tests.kubernetes.conftest import ROOT
from underpass import __version__, config

MANIFEST = ROOT / "deploy/underpass.yaml"
CHART = ROOT / "deploy/helm/underpass"
#: All that the chart can be asked for, each other than by default.
_EVERYTHING: dict[str, Any] = {
    "image": {"repository": "mirror/up", "tag": "9", "pullPolicy": "Always",
              "pullSecrets": [{"name": "key"}]},
    "cgroup": "/sys/fs/cgroup/kubepods.slice",
    "config": "capacity = 1000\n[guard]\nobserve = 5\ndeny = ['nginx']",
    "agent": {"adopt": 30},
    "drainSeconds": 5,
    "terminationGracePeriodSeconds": 20,
    "metrics": {"port": 9999, "annotations": False},
    "serviceMonitor": {"enabled": True, "interval": "10s", "labels": {"release": "prometheus"}},
    "resources": {"limits": {"memory": "1Gi"}},
    "nodeSelector": {"edge": "yes"},
    "tolerations": [],
    "affinity": {"nodeAffinity": {}},
    "priorityClassName": "",
    "maxUnavailable": 1,
    "podAnnotations": {"a": "b"},
    "podLabels": {"c": "d"},
    "seLinuxOptions": {"type": "spc_t"},
}  # fmt: skip


def _objects(text: str) -> list[dict[str, Any]]:
    found = [each for each in yaml.safe_load_all(text) if each]
    return sorted(found, key=lambda each: (each["kind"], each["metadata"]["name"]))


def _rendered(helm: str, *arguments: str) -> list[dict[str, Any]]:
    run = [helm, "template", "underpass", str(CHART), "--namespace", "underpass", *arguments]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return _objects(done.stdout)


def _check(objects: list[dict[str, Any]]) -> None:
    for each in objects:
        if "monitoring.coreos.com" not in each["apiVersion"]:
            for version in ("1.25.0", "1.31.0", "1.37.0"):
                kubernetes_validate.validate(each, version, strict=True)


def _configured(objects: list[dict[str, Any]]) -> dict[str, Any]:
    text = next(each for each in objects if each["kind"] == "ConfigMap")["data"]["config.toml"]
    return tomllib.loads(text)


def test_the_manifest_is_valid() -> None:
    """By the schemas of old and new versions, no field that they do not know."""
    _check(_objects(MANIFEST.read_text()))


def test_the_schemas_find_a_mistake() -> None:
    """A field of that name there is none of."""
    wrong = _objects(MANIFEST.read_text().replace("hostPID", "hostPid"))
    with pytest.raises(kubernetes_validate.ValidationError):
        _check(wrong)


def test_manifest_and_chart_name_this_version() -> None:
    """Whoever releases has to change both."""
    assert f"image: docker.io/underpass/underpass:{__version__}\n" in MANIFEST.read_text()
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (__version__, __version__)


def test_it_asks_for_no_more_than_it_needs() -> None:
    """Not privileged, read-only, named capabilities; no right to change anything in the cluster."""
    objects = _objects(MANIFEST.read_text())
    daemonset = next(each for each in objects if each["kind"] == "DaemonSet")
    (container,) = daemonset["spec"]["template"]["spec"]["containers"]
    security = container["securityContext"]
    assert not security["privileged"]
    assert not security["allowPrivilegeEscalation"]
    assert security["readOnlyRootFilesystem"]
    assert security["capabilities"]["drop"] == ["ALL"]
    for role in objects:
        if "rules" in role:
            assert {verb for rule in role["rules"] for verb in rule["verbs"]} <= {
                *("get", "list", "watch"),
            }


def test_the_chart_has_nothing_to_say_against(helm: str) -> None:
    """`helm lint` warns of nothing."""
    done = subprocess.run(
        [helm, "lint", "--strict", str(CHART)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "[WARNING]" not in done.stdout + done.stderr


def test_the_chart_makes_what_the_manifest_says(helm: str) -> None:
    """With its default values, object by object; the namespace is helm's own affair."""
    plain = [each for each in _objects(MANIFEST.read_text()) if each["kind"] != "Namespace"]
    chart = _rendered(helm)
    assert _configured(plain) == _configured(chart)
    for each in (*plain, *chart):
        if each["kind"] == "ConfigMap":
            del each["data"]
    assert chart == plain


def test_every_value_does_something_and_stays_valid(helm: str, tmp_path: Path) -> None:
    """Every value is changed at once; what comes out is valid, and no default is left of them."""
    assert set(_EVERYTHING) == set(yaml.safe_load((CHART / "values.yaml").read_text()))
    values = tmp_path / "values.yaml"
    values.write_text(json.dumps(_EVERYTHING))
    objects = _rendered(helm, "--values", str(values))
    _check(objects)
    assert {"Service", "ServiceMonitor"} <= {each["kind"] for each in objects}
    toml = tmp_path / "config.toml"
    toml.write_text(next(o for o in objects if o["kind"] == "ConfigMap")["data"]["config.toml"])
    settings, agent = config.read_all(toml)
    assert (settings.capacity, settings.deny) == (1000, ("nginx",))
    assert (agent.listen, agent.adopt, agent.drain) == (":9999", 30, 5)
    default = _rendered(helm)
    for name, value in _EVERYTHING.items():
        alone = tmp_path / "alone.yaml"
        alone.write_text(json.dumps({name: value}))
        assert _rendered(helm, "--values", str(alone)) != default, name


@pytest.mark.parametrize(
    "wrong", ["metrics.port=0", "cgroup=kubepods.slice", "colour=red", "drainSeconds=-1"]
)
def test_wrong_values_are_refused(helm: str, wrong: str) -> None:
    """Before anything reaches a cluster."""
    run = [helm, "template", str(CHART), "--set", wrong]
    assert subprocess.run(run, capture_output=True, check=False).returncode != 0


def test_the_manifests_configuration_is_the_agents(tmp_path: Path) -> None:
    """The agent reads it; it attaches to the pods' subtree."""
    file = tmp_path / "config.toml"
    objects = _objects(MANIFEST.read_text())
    file.write_text(next(o for o in objects if o["kind"] == "ConfigMap")["data"]["config.toml"])
    _, agent = config.read_all(file)
    assert (agent.cgroup, agent.listen) == ("kubepods", ":9464")
