"""Whose a cgroup is: paths as kubelet and containerd make them, with both drivers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.fuzz import FUZZED
from underpass import pod
from underpass.pod import MARK, Place, Pod

UID = "0f7a1a2b-3c4d-5e6f-8a9b-0c1d2e3f4a5b"
UNDER = UID.replace("-", "_")
BOX = "ab" * 32
SLICES = "kubepods.slice/kubepods-burstable.slice"
NESTED = "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice"


@pytest.mark.parametrize(
    ("path", "whose"),
    [
        (f"kubepods/pod{UID}", Place(UID)),
        (f"kubepods/burstable/pod{UID}/{BOX}", Place(UID, BOX)),
        (f"kubepods/besteffort/pod{UID}/{BOX}/init.scope", Place(UID, BOX)),
        (f"kubepods.slice/kubepods-pod{UNDER}.slice", Place(UID)),
        (
            f"{SLICES}/kubepods-burstable-pod{UNDER}.slice/cri-containerd-{BOX}.scope",
            Place(UID, BOX),
        ),
        (
            f"{NESTED}/kubelet-kubepods-besteffort-pod{UNDER}.slice/crio-{BOX}.scope",
            Place(UID, BOX),
        ),
        # a static pod is named after the hash of its file
        (f"kubepods/burstable/pod{'0af' * 10}12", Place(f"{'0af' * 10}12")),
        ("system.slice/kubelet.service", Place()),
        (f"system.slice/docker-{BOX}.scope", Place()),
        ("kubepods/burstable", Place()),
        (f"user.slice/podman-{UID}", Place()),
        ("", Place()),
    ],
)
def test_whose(path: str, whose: Place) -> None:
    """Claim: a pod's cgroups are told by their paths, with either driver; others are nobody's."""
    assert pod.place(path) == whose


@pytest.mark.parametrize(
    "path",
    [
        "kubepods",
        "kubepods/burstable",
        "kubepods/besteffort",
        "kubepods.slice",
        SLICES,
        "kubelet/kubepods",
        NESTED,
    ],
)
def test_where_pods_are_made(path: str) -> None:
    """Claim: the cgroups that the kubelet makes pods in are known, and those of pods are not."""
    assert pod.keeps_pods(path)
    for other in (f"{path}/pod{UID}", "system.slice", "burstable", f"{path}x", ""):
        assert not pod.keeps_pods(other)


@FUZZED
@given(st.text(max_size=300))
def test_any_path(path: str) -> None:
    """Claim: any text is a path of somebody's or nobody's, without an error."""
    assert isinstance(pod.place(path), Place)
    assert pod.keeps_pods(path) in (True, False)


def test_within() -> None:
    """Claim: a cgroup holds itself and what is below it, and not one whose name begins alike."""
    assert pod.within("a/b", "a")
    assert pod.within("a", "a")
    assert pod.within("a", "")
    assert not pod.within("ab", "a")
    assert not pod.within("a", "a/b")


@pytest.mark.parametrize(
    ("annotation", "label", "of_namespace", "mark"),
    [
        (None, None, None, ""),
        ("off", None, None, "off"),
        (None, "off", None, "off"),
        (None, None, "off", "off"),
        ("on", "off", "off", "on"),
        (None, "on", "off", "on"),
        ("false", None, "on", "off"),
        (" ON ", None, None, "on"),
        ("", None, None, "off"),
    ],
)
def test_marks(
    annotation: str | None, label: str | None, of_namespace: str | None, mark: str
) -> None:
    """Claim: what a pod says of itself comes before its namespace; a word unknown is "off"."""

    def marked(word: str | None) -> dict[str, str]:
        return {} if word is None else {MARK: word}

    found = Pod(
        "default",
        "a",
        UID,
        annotations=marked(annotation),
        labels=marked(label),
        namespace_labels=marked(of_namespace),
    )
    assert found.mark() == mark
    kinds = {"annotation": annotation, "label": label, "namespace's label": of_namespace}
    words = [f"{whose} {MARK}: {said}" for whose, said in kinds.items() if said is not None]
    assert found.mark_in_words() == (words or [""])[0]
    own = annotation is not None or label is not None
    assert found.mark(of_namespace=False) == (mark if own else "")
    assert Pod("default", "a", UID, namespace_labels=None).mark() == ""
