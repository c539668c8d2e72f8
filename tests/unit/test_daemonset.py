"""When an agent that is told to end takes the data plane with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from underpass import daemonset
from underpass.apiserver import Access
from underpass.daemonset import Reply
from underpass.errors import Usage

_THERE: dict[str, Any] = {"metadata": {}, "spec": {"template": {"spec": {}}}}
_LINUX = {"spec": {"template": {"spec": {"nodeSelector": {"os": "linux", "fast": "yes"}}}}}
_GOING = {"metadata": {"deletionTimestamp": "2026-11-26T03:00:00Z"}, "spec": _THERE["spec"]}
_OK, _AWAY = Reply(200, _THERE), Reply(0, {})


def _node(**labels: str) -> Reply:
    return Reply(200, {"metadata": {"labels": labels}})


@pytest.mark.parametrize(
    ("namespace", "of_it", "node", "known"),
    [
        pytest.param(_OK, Reply(404, {}), _AWAY, True, id="deleted"),
        pytest.param(_OK, Reply(200, _GOING), _AWAY, True, id="deleted in the foreground"),
        pytest.param(Reply(200, _GOING), _OK, _node(), True, id="its namespace goes, pods first"),
        pytest.param(Reply(404, {}), Reply(403, {}), _AWAY, True, id="its namespace has gone"),
        pytest.param(Reply(403, {}), Reply(403, {}), _AWAY, True, id="its rights went first"),
        pytest.param(Reply(401, {}), Reply(401, {}), _AWAY, True, id="its account went first"),
        pytest.param(_OK, Reply(200, _LINUX), _node(os="linux"), True, id="label taken away"),
    ],
)
def test_what_goes_for_good_is_drained(
    namespace: Reply, of_it: Reply, node: Reply, known: bool
) -> None:
    """Deletion, however kubectl and the controllers order it, leaves nothing behind."""
    assert daemonset.judge(namespace, of_it, node, known=known).going


@pytest.mark.parametrize(
    ("namespace", "of_it", "node", "known"),
    [
        pytest.param(_OK, _OK, _node(), True, id="restart or rolling upgrade"),
        pytest.param(_OK, Reply(200, _LINUX), _node(os="linux", fast="yes"), True, id="matches"),
        pytest.param(_OK, Reply(200, _LINUX), _AWAY, True, id="the node cannot be read"),
        pytest.param(_AWAY, _AWAY, _AWAY, True, id="the API server is away"),
        pytest.param(_OK, Reply(503, {}), _node(), True, id="the API server is in trouble"),
        pytest.param(Reply(403, {}), Reply(403, {}), _AWAY, False, id="it never had the rights"),
    ],
)
def test_what_comes_back_keeps_the_data_plane(
    namespace: Reply, of_it: Reply, node: Reply, known: bool
) -> None:
    """A restart costs no acceleration; in doubt nothing is drained."""
    assert not daemonset.judge(namespace, of_it, node, known=known).going


@pytest.mark.parametrize("name", ["", "underpass", "/underpass", "underpass/", "a/b/c"])
def test_a_wrong_name_is_refused(name: str) -> None:
    """The name says where to ask."""
    with pytest.raises(Usage, match="say NAMESPACE/NAME"):
        daemonset.Owner(name)


def test_an_api_server_that_is_away_is_no_deletion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens there, and no account is mounted: the verdict comes, and it is to stay."""
    monkeypatch.setattr(daemonset, "_ALL", 0.0)
    nowhere = Access("127.0.0.1", 1, None, Path("/nonexistent"), "node1")
    for access in (nowhere, None):
        owner = daemonset.Owner("underpass/underpass", access)
        assert not owner.look()
        assert owner.verdict() == daemonset.Verdict(False, "the API server is away")
