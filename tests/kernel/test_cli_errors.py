"""The command line on its bad days: one line, the right exit code, nothing left behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.kernel.bed import BPFFS, SERVER4, Bed, cgroup2
from tests.kernel.commands import command, finish, start, underpass, underpass_where
from tests.kernel.kernel_objects import attach_foreign_sock_ops, sock_ops_on
from tests.kernel.remote import couple, exchange
from underpass import features

FAILED, USAGE, UNSUPPORTED = 1, 2, 4


def _check_nothing_left(bed: Bed) -> None:
    assert list(BPFFS.glob(f"{bed.name}*")) == []
    assert sock_ops_on(bed.cgroup) == []


@pytest.mark.parametrize("words", [("fly",), ("up", "--fast"), ("down", "--timeout", "soon")])
def test_wrong_words(bed: Bed, words: tuple[str, ...]) -> None:
    """Claim: an unknown command, option or value is a usage error."""
    underpass(bed.pins, *words).failed(USAGE)
    _check_nothing_left(bed)


def test_wrong_cgroups(bed: Bed, tmp_path: Path) -> None:
    """Claim: a cgroup that is missing, or is none of cgroup v2, is a usage error that names it."""
    for wrong in (bed.cgroup / "missing", tmp_path, bed.cgroup / "cgroup.procs"):
        underpass(bed.pins, "up", "--admit-unknown", "--cgroup", wrong).failed(USAGE, str(wrong))
        _check_nothing_left(bed)


def test_another_cgroup_than_that_which_is_up(bed: Bed) -> None:
    """Claim: `up` for another cgroup than the one that is served fails and changes nothing."""
    underpass(bed.pins, "up", "--admit-unknown", "--cgroup", bed.cgroup).ok()
    underpass(bed.pins, "up", "--admit-unknown", "--cgroup", bed.outside).failed(
        FAILED, str(bed.cgroup)
    )
    assert len(sock_ops_on(bed.cgroup)) == 1
    assert sock_ops_on(bed.outside) == []


def test_pins_that_are_not_in_bpffs(bed: Bed, tmp_path: Path) -> None:
    """Claim: a pin directory outside bpffs is a usage error; nothing is attached."""
    for pins in (tmp_path / "pins", tmp_path / "no" / "pins", Path("/proc/underpass")):
        underpass(pins, "up", "--admit-unknown", "--cgroup", bed.cgroup).failed(USAGE, str(pins))
        assert not pins.exists()
    _check_nothing_left(bed)


def test_a_bpffs_that_cannot_be_written(bed: Bed) -> None:
    """Claim: a read-only bpffs fails in one line and attaches nothing."""
    read_only = f"mount --bind {BPFFS} {BPFFS}; mount -o remount,bind,ro {BPFFS}"
    up = underpass_where(bed.pins, read_only, "up", "--admit-unknown", "--cgroup", bed.cgroup)
    up.failed(FAILED, str(bed.name))
    _check_nothing_left(bed)


def test_a_bpffs_that_is_not_mounted(bed: Bed) -> None:
    """Claim: `up` mounts bpffs where it is missing."""
    script = f'umount -l {BPFFS}; "$@"; grep -q " {BPFFS} bpf " /proc/mounts'
    shell = ["unshare", "--mount", "sh", "-e", "-c", script, "sh"]
    finish(
        start([*shell, *command(bed.pins, "up", "--admit-unknown", "--cgroup", bed.cgroup)])
    ).ok()
    # the mount, and with it the pins, went with the mount namespace
    _check_nothing_left(bed)


@pytest.mark.parametrize("word", ["up", "down", "status", "connections", "pause", "doctor"])
def test_without_root(bed: Bed, word: str) -> None:
    """Claim: without root every command fails in one line that says so."""
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv (util-linux) is not installed")
    underpass(bed.pins, "up", "--admit-unknown", "--cgroup", bed.cgroup).ok()
    # may read the interpreter and the package wherever they are, and nothing more
    reading = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
    nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", *reading]
    words = [word, "--cgroup", bed.cgroup] if word == "up" else [word]
    done = finish(start([*nobody, *command(bed.pins, *words)]))
    assert done.code in {FAILED, UNSUPPORTED}
    if word != "doctor":
        done.failed(FAILED, "root")
    assert len(sock_ops_on(bed.cgroup)) == 1


def test_without_a_capability(bed: Bed) -> None:
    """Claim: `up` names the right that it misses before it has done anything."""
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv (util-linux) is not installed")
    up = command(bed.pins, "up", "--admit-unknown", "--cgroup", bed.cgroup)
    done = finish(start(["setpriv", "--bounding-set", "-sys_admin", *up]))
    done.failed(FAILED, "missing CAP_SYS_ADMIN;")
    _check_nothing_left(bed)


@pytest.mark.parametrize("word", ["up", "doctor"])
def test_a_kernel_that_is_too_old(bed: Bed, word: str) -> None:
    """Claim: below the stated floor `up` and `doctor` refuse, and tell which kernel will do."""
    words = [word, "--cgroup", bed.cgroup] if word == "up" else [word]
    done = finish(start(["setarch", "--uname-2.6", *command(bed.pins, *words)]))
    done.failed(UNSUPPORTED, "kernel")
    assert "underpass needs 6.1" in done.out + done.err
    _check_nothing_left(bed)


def test_without_type_information(bed: Bed) -> None:
    """Claim: a kernel without BTF is told to be unsupported."""
    hide = "mount -t tmpfs tmpfs /sys/kernel/btf"
    up = underpass_where(bed.pins, hide, "up", "--admit-unknown", "--cgroup", bed.cgroup)
    up.failed(UNSUPPORTED, "/sys/kernel/btf/vmlinux")
    _check_nothing_left(bed)


def test_without_cgroup_v2(bed: Bed) -> None:
    """Claim: a node without cgroup v2 is told to be unsupported."""
    hide = f"umount -l {cgroup2()}"
    for words in (("up",), ("up", "--admit-unknown", "--cgroup", str(bed.cgroup))):
        underpass_where(bed.pins, hide, *words).failed(UNSUPPORTED, "cgroup")
        _check_nothing_left(bed)


def test_a_foreign_sock_ops_that_shares(bed: Bed) -> None:
    """Claim: beside another product's program that allows others, all works; it stays behind."""
    foreign = attach_foreign_sock_ops(bed.cgroup, shared=True)
    underpass(bed.pins, "up", "--admit-unknown", "--cgroup", bed.cgroup).ok()
    assert len(sock_ops_on(bed.cgroup)) == 2
    named = [check.detail for check in features.neighbours(bed.pins, bed.cgroup)]
    assert named == [f"foreign_ops (id {foreign}) on {bed.cgroup}"]
    near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, 8080))
    exchange(near, far, 1)
    assert underpass(bed.pins, "status", "--json").document()["counters"]["pairs_total"] == 1
    underpass(bed.pins, "down").ok()
    assert sock_ops_on(bed.cgroup) == [foreign]


def test_a_foreign_sock_ops_that_does_not_share(bed: Bed) -> None:
    """Claim: where another product holds the cgroup alone, `up` names it and leaves nothing."""
    foreign = attach_foreign_sock_ops(bed.cgroup, shared=False)
    up = underpass(bed.pins, "up", "--admit-unknown", "--cgroup", bed.cgroup)
    up.failed(FAILED, str(bed.cgroup), "foreign_ops", str(foreign))
    assert list(BPFFS.glob(f"{bed.name}*")) == []
    assert sock_ops_on(bed.cgroup) == [foreign]


def test_sockets_that_another_map_holds(bed: Bed) -> None:
    """Claim: sockets of another product's sockmap stay with it; the refusal is counted."""
    underpass(bed.pins, "up", "--admit-unknown", "--cgroup", bed.cgroup).ok()
    other = bed.pins.with_name(f"{bed.name}-other")
    try:
        underpass(other, "up", "--admit-unknown", "--cgroup", bed.cgroup).ok()
        near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, 8080))
        exchange(near, far, 1)
        counters = [
            underpass(pins, "status", "--json").document()["counters"] for pins in (bed.pins, other)
        ]
        assert sum(counted["pairs_total"] for counted in counters) == 1
        busy = sum(counted["refused_total"]["socket-busy"] for counted in counters)
        assert busy > 0
    finally:
        underpass(other, "down").ok()


@pytest.mark.parametrize("word", ["pause", "resume"])
def test_nothing_to_pause(bed: Bed, word: str) -> None:
    """Claim: `pause` and `resume` with nothing up fail in one line that tells what to do."""
    underpass(bed.pins, word).failed(FAILED, f"run `underpass --pins {bed.pins} up`")


@pytest.mark.parametrize("text", ["capacity = 0", "speed = 1", "budget_bytes = 1e9", "]"])
def test_wrong_configuration(bed: Bed, tmp_path: Path, text: str) -> None:
    """Claim: a configuration file with a wrong or unknown field is a usage error."""
    config = tmp_path / "underpass.toml"
    config.write_text(text)
    up = underpass(bed.pins, "up", "--admit-unknown", "--cgroup", bed.cgroup, "--config", config)
    up.failed(USAGE, str(config))
    _check_nothing_left(bed)


@pytest.mark.parametrize("target", ["pod-1", "10.0.0.1:http", "10.0.0.1:99999"])
def test_explain_of_no_address(bed: Bed, target: str) -> None:
    """Claim: `explain` of what is no address is a usage error."""
    underpass(bed.pins, "explain", "10.0.0.1", target).failed(USAGE, target)
