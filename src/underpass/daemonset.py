"""Is the DaemonSet that runs this agent going for good? Asked when the agent is told to end.

A restart, a rolling upgrade and a reboot must leave the data plane at work, a deletion must not:
to the container they look the same. The API server knows the difference.
"""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from underpass import apiserver
from underpass.apiserver import Access
from underpass.errors import Usage

#: Bytes of an answer: a longer one is none.
_MOST = 4 << 20
#: Seconds that one question may take, and seconds for all of them.
_ONE, _ALL = 2.0, 8.0
_REFUSED = (401, 403)


@dataclass(frozen=True)
class Reply:
    """What the API server said of one object; ``status`` 0: it was not reached."""

    status: int
    body: Mapping[str, Any]

    @property
    def told(self) -> bool:
        """Is it an answer, rather than trouble of the moment?"""
        return self.status in (200, 404, *_REFUSED)


@dataclass(frozen=True)
class Verdict:
    """Whether the node is to be left, and why, for the journal."""

    going: bool
    why: str


def judge(namespace: Reply, daemonset: Reply, node: Reply, *, known: bool) -> Verdict:
    """Is this node to be left? In doubt it is not: no traffic needs the agent. Pure.

    Args:
        namespace: the DaemonSet's.
        daemonset: itself.
        node: this one.
        known: the DaemonSet could be read before, so a refusal means that its rights were removed.
    """
    if gone := _deleted("namespace", namespace) or _deleted("DaemonSet", daemonset):
        return Verdict(True, gone)
    if daemonset.status in _REFUSED and known:
        return Verdict(True, "the rights of the DaemonSet have been removed")
    if daemonset.status != 200:
        away = "the DaemonSet may not be read" if daemonset.told else "the API server is away"
        return Verdict(False, away)
    if node.status == 200 and (label := _unmatched(daemonset.body, node.body)):
        return Verdict(True, f"the DaemonSet no longer wants this node ({label})")
    return Verdict(False, "the DaemonSet goes on")


def _deleted(name: str, reply: Reply) -> str:
    if reply.status == 404:
        return f"the {name} has been deleted"
    going = reply.body.get("metadata", {}).get("deletionTimestamp")
    return f"the {name} is being deleted" if going else ""


def _unmatched(daemonset: Mapping[str, Any], node: Mapping[str, Any]) -> str:
    """The label of the DaemonSet's selector that the node does not have; empty if it has all."""
    wanted = daemonset["spec"]["template"]["spec"].get("nodeSelector") or {}
    labels = node["metadata"].get("labels") or {}
    return next((f"{key}={value}" for key, value in wanted.items() if labels.get(key) != value), "")


class Owner:
    """The DaemonSet that runs this agent.

    Args:
        name: ``NAMESPACE/NAME``.
        access: the API server; None: the cluster's own, as every pod is told.

    Raises:
        Usage: the name is none.
    """

    def __init__(self, name: str, access: Access | None = None) -> None:
        self._namespace, slash, self._name = name.partition("/")
        if not (self._namespace and slash and self._name) or "/" in self._name:
            raise Usage("use", f"--daemonset {name}", "it is no name", "say NAMESPACE/NAME")
        self._access = access or apiserver.in_cluster(os.environ.get("NODE_NAME", ""))
        self._known = False

    def look(self) -> bool:
        """Read the DaemonSet once; True if that has worked, which :meth:`verdict` relies on.

        Takes 2 s at most where the API server is away.
        """
        self._known = self._known or self._get(self._path()).status == 200
        return self._known

    def verdict(self) -> Verdict:
        """Is this node to be left? Takes 8 s at most."""
        until = time.monotonic() + _ALL
        while True:
            found = self._ask()
            if found[1].told or time.monotonic() + _ONE > until:
                return judge(*found, known=self._known)
            time.sleep(0.5)

    def _ask(self) -> tuple[Reply, Reply, Reply]:
        namespace = self._get(f"/api/v1/namespaces/{self._namespace}")
        daemonset = self._get(self._path())
        name = self._access.node if self._access else ""
        node = self._get(f"/api/v1/nodes/{name}") if name else Reply(0, {})
        return namespace, daemonset, node

    def _path(self) -> str:
        return f"/apis/apps/v1/namespaces/{self._namespace}/daemonsets/{self._name}"

    def _get(self, path: str) -> Reply:
        if not self._access:
            return Reply(0, {})
        try:
            with self._access.connected(_ONE) as connection:
                answer = self._access.ask(connection, path)
                return Reply(answer.status, json.loads(answer.read(_MOST)))
        except (OSError, ValueError, http.client.HTTPException):
            return Reply(0, {})
