"""The container image: what is in it, and which rights it takes to do what in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from tests.kernel.kernel_objects import attach_foreign_sock_ops
from tests.kubernetes.conftest import ROOT
from tests.kubernetes.container import ALL, ASKED, Container
from underpass import __version__
from underpass.namespaces import find_cgroup2

_SBOM = "usr/share/doc/underpass/sbom.cdx.json"


@pytest.fixture
def foreign() -> Iterator[subprocess.Popen[bytes]]:
    """A process of another user."""
    with subprocess.Popen(["sleep", "100"], user=65534) as process:
        yield process
        process.kill()


@pytest.fixture
def neighbour() -> Iterator[str]:
    """Another product's sock_ops on a cgroup, as `doctor` names it without SYS_ADMIN."""
    cgroup = find_cgroup2() / f"underpass-test-neighbour-{os.getpid()}"
    cgroup.mkdir()
    try:
        yield f"id {attach_foreign_sock_ops(cgroup, shared=True)} on {cgroup}"
    finally:
        cgroup.rmdir()


def test_skopeo_reads_both_names(image: Path) -> None:
    """The version and `latest` name the same image, in either format of the archive."""
    digests = set()
    for tag in (__version__, "latest"):
        for source in (f"docker-archive:{image}:docker.io/underpass/underpass:{tag}",
                       f"oci-archive:{image}:{tag}"):  # fmt: skip
            run = ["skopeo", "inspect", "--config", source]
            digests.add(subprocess.run(run, check=True, capture_output=True).stdout)
    assert len(digests) == 1
    config = json.loads(digests.pop())["config"]
    assert config["Entrypoint"] == ["/usr/bin/underpass"]
    assert config["Labels"]["org.opencontainers.image.version"] == __version__


def test_it_is_small_and_has_no_shell(image: Path, container: Container) -> None:
    """One program and what that needs: whoever breaks in finds no tools."""
    programs = {p.name for d in ("bin", "sbin", "usr/bin", "usr/sbin")
                for p in (container.bundle / "rootfs" / d).glob("*")}  # fmt: skip
    assert programs == {"python3.11", "underpass"}
    assert image.stat().st_size < 25e6
    modes = [p.lstat().st_mode for p in (container.bundle / "rootfs").rglob("*")]
    assert not any(mode & 0o6000 for mode in modes)


def test_the_same_sources_give_the_same_bytes(image: Path, tmp_path: Path) -> None:
    """Built again, elsewhere, at another time: not a byte differs."""
    wheel = next((ROOT / "build/wheel").glob("*.whl"))
    again = [sys.executable, "image_build.py", str(wheel), "--output", str(tmp_path)]
    subprocess.run(again, check=True, cwd=ROOT, capture_output=True)
    assert (tmp_path / image.name).read_bytes() == image.read_bytes()


def test_the_bill_of_materials_is_valid_and_whole(container: Container) -> None:
    """It follows CycloneDX' schema and names every Debian and every Python package in the image."""
    text = (container.bundle / "rootfs" / _SBOM).read_text()
    assert JsonStrictValidator(SchemaVersion.V1_5).validate_str(text) is None
    assert (ROOT / "dist/underpass-image.cdx.json").read_text() == text
    listed = {(each["name"].lower(), each["version"]) for each in json.loads(text)["components"]}
    root = container.bundle / "rootfs"
    for place in (root / "usr/lib/python3/dist-packages").glob("*.dist-info"):
        name, _, version = place.name.removesuffix(".dist-info").rpartition("-")
        assert (name.replace("_", "-").lower(), version) in {
            (n.replace("_", "-"), v) for n, v in listed
        }
    for place in (root / "var/lib/dpkg/status.d").iterdir():
        assert place.name in {name for name, _ in listed}
        assert (root / "usr/share/doc" / place.name).is_dir() or place.name == "libgcc-s1"


def test_every_module_that_is_there_can_be_imported(container: Container) -> None:
    """Nothing was left out that something else in the image needs."""
    code = (
        "import importlib, pathlib, pkgutil, sys, underpass\n"
        "for path in pathlib.Path('/usr/lib/python3.11/lib-dynload').glob('*.so'):\n"
        "    importlib.import_module(path.name.partition('.')[0])\n"
        "for found in pkgutil.walk_packages(underpass.__path__, 'underpass.'):\n"
        "    if found.name not in ('underpass.bench.chart',): importlib.import_module(found.name)\n"
        "print('all of them')\n"
    )
    done = container.run("/usr/bin/python3.11", "-I", "-c", code, capabilities=())
    assert done.stdout == "all of them\n", done.stderr


def test_three_capabilities_load_every_program(container: Container, neighbour: str) -> None:
    """BPF, NET_ADMIN and PERFMON do; SYS_ADMIN is missed by name, for the pods' namespaces.

    Without that, another product's program has no name either.
    """
    said = container.run("/usr/bin/underpass", "--version", capabilities=())
    assert said.stdout == f"underpass, version {__version__}\n", said.stderr
    done = container.run("/usr/bin/underpass", "doctor", "--json", capabilities=ASKED)
    checks = json.loads(done.stdout)["checks"]
    failed = {c["name"]: c["detail"] for c in checks if c["status"] == "failed"}
    assert failed.keys() == {"capabilities", "test bed"}, checks
    assert failed["capabilities"] == "missing CAP_SYS_ADMIN"
    assert sum(c["group"] == "programs" for c in checks) >= 12
    [others] = (c["detail"] for c in checks if c["name"] == "other sock_ops programs")
    assert neighbour in others or " more" in others, checks


@pytest.mark.parametrize("own_cgroups", [False, True])
def test_doctor_is_content_with_the_manifests_rights(
    container: Container, own_cgroups: bool
) -> None:
    """The whole self-test runs, also from a cgroup namespace, as containers have on most nodes."""
    done = container.run("/usr/bin/underpass", "doctor", "--json", own_cgroups=own_cgroups)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["ok"]


def test_it_calibrates(container: Container) -> None:
    """Without a shell or `ip`: two pods on a bridge, streams on each road, by these rights.

    What it made is gone; it takes SYS_ADMIN, and says so.
    """
    run = ("/usr/bin/underpass", "calibrate", "--quick", "--dry-run", "--json")
    done = container.run(*run, own_cgroups=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {point["road"] for point in found["points"]} == {
        *("virtual", "virtual_nodelay", "loopback", "loopback_nodelay"),
    }
    assert all(point["shortcut"] > 0 for point in found["points"])
    less = [each for each in ALL if each != "CAP_SYS_ADMIN"]
    assert "CAP_SYS_ADMIN" in container.run(*run, capabilities=less).stderr


def test_commands_see_cgroups_as_the_node_does(container: Container) -> None:
    """A command leaves the container's cgroup namespace.

    Under ``nsdelegate``, as systemd mounts cgroups, the self-test could not move its child else.
    """
    code = (
        "from underpass import namespaces\n"
        "def path(): return open('/proc/self/cgroup').read().splitlines()[-1].split(':')[2]\n"
        "print(path())\n"
        "namespaces.join_host_cgroups()\n"
        "print(path())\n"
    )
    done = container.run("/usr/bin/python3.11", "-I", "-c", code, own_cgroups=True)
    assert done.stdout.split() == ["/", container.cgroup], done.stderr


@pytest.mark.parametrize(
    ("without", "said"),
    [("CAP_SYS_ADMIN", "missing CAP_SYS_ADMIN"), ("CAP_DAC_OVERRIDE", "Permission denied")],
)
def test_each_right_is_needed(container: Container, without: str, said: str) -> None:
    """Other namespaces' listeners take SYS_ADMIN, the self-test's cgroup takes DAC_OVERRIDE."""
    rights = [each for each in ALL if each != without]
    done = container.run("/usr/bin/underpass", "doctor", "--json", capabilities=rights)
    assert done.returncode == 1
    bed = next(c for c in json.loads(done.stdout)["checks"] if c["name"] == "test bed")
    assert said in bed["detail"]


def test_looking_at_other_users_processes_takes_ptrace(
    container: Container, foreign: subprocess.Popen[bytes]
) -> None:
    """Who holds a socket, and which program that is, is in /proc of other users' processes."""
    process = f"/proc/{foreign.pid}"
    code = f"import os; print(os.readlink('{process}/exe'), os.listdir('{process}/fd'))"
    argv = ("/usr/bin/python3.11", "-I", "-c", code)
    assert "sleep" in container.run(*argv).stdout
    less = [each for each in ALL if each != "CAP_SYS_PTRACE"]
    assert "PermissionError" in container.run(*argv, capabilities=less).stderr
    less = [each for each in ALL if each != "CAP_DAC_OVERRIDE"]
    assert "PermissionError" in container.run(*argv, capabilities=less).stderr
