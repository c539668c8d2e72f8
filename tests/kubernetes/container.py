"""The image as a container on this machine, by runc, with just the rights that a test names."""

from __future__ import annotations

import json
import subprocess
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: What the issue asks for, and what the manifest adds to it.
ASKED = ("CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON")
ALL = (*ASKED, "CAP_DAC_OVERRIDE", "CAP_SYS_ADMIN", "CAP_SYS_PTRACE")


def unpack(archive: Path, into: Path) -> dict[str, Any]:
    """Check the archive with skopeo and lay its files out; returns the image's configuration."""
    layout = into / "layout"
    source = f"docker-archive:{archive}:docker.io/underpass/underpass:latest"
    subprocess.run(["skopeo", "copy", "--quiet", source, f"oci:{layout}:x"], check=True)
    (into / "rootfs").mkdir()

    def blob(digest: str) -> Path:
        return layout / "blobs" / digest.replace(":", "/")

    index = json.loads((layout / "index.json").read_text())
    manifest = json.loads(blob(index["manifests"][0]["digest"]).read_text())
    for layer in manifest["layers"]:
        tar = ["tar", "-C", str(into / "rootfs"), "-xzpf", str(blob(layer["digest"]))]
        subprocess.run(tar, check=True)
    return dict(json.loads(blob(manifest["config"]["digest"]).read_text()))


@dataclass(frozen=True)
class Container:
    """Runs commands in the unpacked image, one container each.

    Attributes:
        bundle: directory with ``rootfs``.
        cgroup: cgroups path of the container.
    """

    bundle: Path
    cgroup: str

    def run(
        self, *argv: str, capabilities: Sequence[str] = ALL, own_cgroups: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end, with a read-only root and the node's processes and network."""
        spec = _spec(argv, capabilities, self.cgroup, own_cgroups=own_cgroups)
        (self.bundle / "config.json").write_text(json.dumps(spec))
        name = f"underpass-test-{uuid.uuid4().hex[:12]}"
        command = ["runc", "--root", str(self.bundle / "state"), "run"]
        try:
            return subprocess.run(
                [*command, "--bundle", str(self.bundle), name],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=180,
                check=False,
            )
        finally:
            gone = ["runc", "--root", str(self.bundle / "state"), "delete", "--force", name]
            subprocess.run(gone, capture_output=True, check=False)


def _spec(
    argv: Sequence[str], capabilities: Sequence[str], cgroup: str, *, own_cgroups: bool
) -> dict[str, Any]:
    held = list(capabilities)
    kinds = ["mount", "ipc", "uts", *(["cgroup"] if own_cgroups else [])]
    binds = [
        {"destination": place, "type": "bind", "source": place, "options": ["rbind", "rw"]}
        for place in ("/sys/fs/bpf", "/sys/fs/cgroup")
    ]
    return {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": list(argv),
            "env": ["PATH=/usr/bin", "LANG=C.UTF-8"],
            "cwd": "/",
            "noNewPrivileges": True,
            "capabilities": {"bounding": held, "effective": held, "permitted": held},
        },
        "root": {"path": "rootfs", "readonly": True},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"},
            *binds,
        ],
        "linux": {"namespaces": [{"type": kind} for kind in kinds], "cgroupsPath": cgroup},
    }
