# SPDX-License-Identifier: Apache-2.0
"""Builds the container image: Debian's Python and libbpf, the wheel, what the wheel needs; no more.

No shell, no package manager: `underpass` is the one program in it. What goes in has a version and a
checksum and is listed in a bill of materials (CycloneDX), in the image and beside it. The same
sources and packages give the same bytes.

The archive is an OCI layout that also has Docker's ``manifest.json``, as `docker save` writes it:
`ctr images import`, `docker load`, `podman load` and `skopeo` all read it.
"""

from __future__ import annotations

import argparse
import email.parser
import gzip
import hashlib
import io
import json
import os
import platform
import shutil
import stat
import subprocess
import tarfile
import tempfile
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAME = "docker.io/underpass/underpass"
SUITE, PYTHON = "bookworm", "3.11"
#: Installed whole, less what _PRUNED names. Apt wants more for them (dpkg, tar, awk), for scripts
#: that never run here.
PACKAGES = (
    *("base-files", "gcc-12-base", "libbpf1", "libbz2-1.0", "libc6", "libcrypt1", "libelf1"),
    *("libexpat1", "libffi8", "libgcc-s1", "liblzma5", "libncursesw6", "libpython3.11-minimal"),
    *("libpython3.11-stdlib", "libssl3", "libtinfo6", "libuuid1", "python3.11-minimal", "zlib1g"),
)
_PRUNED = (
    *("etc/*.d", "etc/default", "etc/issue*", "etc/motd", "usr/share/[!d]*", "usr/share/d[!o]*"),
    *("usr/share/doc/*/*[!t]", "usr/lib/*/gconv", "usr/lib/*/libmvec*", "lib/*/libmvec*"),
    # what of the standard library is for developers, or needs a library that is not there
    *(f"usr/lib/python3.11/{each}" for each in ("ensurepip", "idlelib", "lib2to3", "pydoc_data")),
    *(f"usr/lib/python3.11/{each}" for each in ("test", "tkinter", "turtledemo", "distutils")),
    *(f"usr/lib/python3.11/{each}" for each in ("sqlite3", "turtle.py", "venv")),
    *(f"usr/lib/python3.11/lib-dynload/{each}.*" for each in ("_dbm", "nis", "readline")),
    *(f"usr/lib/python3.11/lib-dynload/{each}.*" for each in ("_sqlite3", "_tkinter")),
)
_EMPTY = ("dev", "proc", "run", "sys", "tmp", "root", "etc/underpass")
_SITE = "usr/lib/python3/dist-packages"
_START = f"""#!/usr/bin/python{PYTHON} -I
from underpass.__main__ import main

main()
"""
_SBOM = "usr/share/doc/underpass/sbom.cdx.json"
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_INDEX = "application/vnd.oci.image.index.v1+json"


@dataclass(frozen=True)
class Component:
    """One thing in the image: a Debian or a Python package."""

    kind: str
    name: str
    version: str
    licence: str = ""
    sha256: str = ""
    detail: dict[str, str] = field(default_factory=dict)

    @property
    def purl(self) -> str:
        """Its package URL."""
        version = self.version.replace(":", "%3A").replace("+", "%2B").replace("~", "%7E")
        where = "deb/debian" if self.kind == "deb" else "pypi"
        tail = f"?arch={self.detail['arch']}&distro={SUITE}" if self.kind == "deb" else ""
        return f"pkg:{where}/{self.name}@{version}{tail}"


# -- what goes in ----------------------------------------------------------------------------


def debian(root: Path, debs: Path) -> list[Component]:
    """Fetch the packages by this machine's apt, which checks them; lay them out at ``root``."""
    hook = f'cp "$1"/var/cache/apt/archives/*.deb {debs}'
    subprocess.run(
        [
            *("mmdebstrap", "--quiet", "--variant=extract", f"--include={','.join(PACKAGES)}"),
            *(f"--aptopt={line}" for line in _apt_options()),
            *(f"--extract-hook={hook}", SUITE, str(debs / "unused"), *_apt_sources()),
        ],
        check=True,
    )
    shutil.rmtree(debs / "unused")
    found = []
    for deb in sorted(debs.glob("*.deb")):
        control = _output("dpkg-deb", "-f", str(deb))
        fields = email.parser.Parser().parsestr(control)
        if fields["Package"] not in PACKAGES:
            continue
        _run("dpkg-deb", "-x", str(deb), str(root))
        # where scanners look for packages in an image without dpkg
        listed = root / "var/lib/dpkg/status.d" / fields["Package"]
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text(control)
        detail = {"arch": fields["Architecture"]}
        digest = hashlib.sha256(deb.read_bytes()).hexdigest()
        found.append(
            Component("deb", fields["Package"], fields["Version"], sha256=digest, detail=detail)
        )
    if missing := set(PACKAGES) - {each.name for each in found}:
        raise SystemExit(f"underpass: apt brought no {', '.join(sorted(missing))}")
    _prune(root)
    return found


def _apt_sources() -> list[str]:
    """This machine's way to Debian's packages, if it is a machine of the same suite."""
    if f"VERSION_CODENAME={SUITE}" not in Path("/etc/os-release").read_text().split():
        return []
    files = map(Path, ("/etc/apt/sources.list", "/etc/apt/sources.list.d/debian.sources"))
    return [str(file) for file in files if file.is_file() and file.stat().st_size]


def _apt_options() -> list[str]:
    lines = _output("apt-config", "dump").splitlines()
    starts = ("Acquire::http::", "Acquire::https::", "Acquire::Check-")
    return [line for line in lines if line.startswith(starts) and not line.endswith(' "";')]


def _prune(root: Path) -> None:
    for pattern in _PRUNED:
        for path in root.glob(pattern):
            if path.name != "copyright":
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.rmtree(root / "var/cache", ignore_errors=True)
    for name in _EMPTY:
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "tmp").chmod(0o1777)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/usr/sbin/nologin\n")
    (root / "etc/group").write_text("root:x:0:\n")


def python(root: Path, wheel: Path, requirements: Path) -> list[Component]:
    """Install the locked dependencies and the wheel below ``root``."""
    site = root / _SITE
    platforms = [f"manylinux_2_{n}_{platform.machine()}" for n in range(36, 16, -1)]
    pip = [
        *(".venv/bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
        *("--no-deps", "--no-compile", "--target", str(site), "--python-version", PYTHON),
        *("--only-binary=:all:", "--implementation", "cp"),
        *(f"--platform={each}" for each in platforms),
        *(
            f"--platform=manylinux2014_{platform.machine()}",
            f"--platform=linux_{platform.machine()}",
        ),
    ]
    _run(*pip, "--require-hashes", "-r", str(requirements))
    _run(*pip, "--no-index", str(wheel))
    shutil.rmtree(site / "bin", ignore_errors=True)  # with the path of another Python in it
    for lexer in (site / "pygments/lexers").glob("[!_]*"):
        lexer.unlink()  # 10 MB of languages that nothing here prints
    start = root / "usr/bin/underpass"
    start.parent.mkdir(parents=True, exist_ok=True)
    start.write_text(_START)
    start.chmod(0o755)
    found = []
    for info in sorted(site.glob("*.dist-info")):
        # say where files came from on this machine, and when
        for name in ("direct_url.json", "REQUESTED", "INSTALLER", "RECORD"):
            (info / name).unlink(missing_ok=True)
        fields = email.parser.Parser().parsestr((info / "METADATA").read_text())
        licence = fields["License-Expression"] or fields["License"] or ""
        found.append(Component("pypi", fields["Name"], fields["Version"], licence.split("\n")[0]))
    return found


def compile_python(root: Path) -> None:
    """Compile all modules: the image is read-only, and nobody wants to wait for it each time."""
    places = [f"/usr/lib/python{PYTHON}", f"/{_SITE}"]
    command = ["chroot", str(root), f"/usr/bin/python{PYTHON}", "-I", "-m", "compileall", "-q"]
    _run(*command, "--invalidation-mode", "unchecked-hash", *places)


# -- the bill of materials ---------------------------------------------------------------------


def bill(components: Sequence[Component], version: str, created: str) -> dict[str, Any]:
    """A CycloneDX document of what is in the image."""
    listed = [_listed(each) for each in components]
    digest = hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).digest()
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{uuid.UUID(bytes=digest[:16], version=4)}",
        "version": 1,
        "metadata": {
            "timestamp": created,
            "component": {
                "type": "container",
                "bom-ref": "image",
                "name": NAME,
                "version": version,
            },
        },
        "components": listed,
        "dependencies": [{"ref": "image", "dependsOn": sorted(each["bom-ref"] for each in listed)}],
    }


def _listed(component: Component) -> dict[str, Any]:
    found: dict[str, Any] = {
        "type": "library",
        "bom-ref": component.purl,
        "name": component.name,
        "version": component.version,
        "purl": component.purl,
    }
    if component.licence:
        found["licenses"] = [{"license": {"name": component.licence}}]
    if component.sha256:
        found["hashes"] = [{"alg": "SHA-256", "content": component.sha256}]
    return found


# -- the archive -------------------------------------------------------------------------------


def layer(root: Path, epoch: int, known: frozenset[str] = frozenset()) -> tuple[bytes, str]:
    """The files below ``root`` without those of an earlier layer.

    Returns:
        The layer, compressed, and the sha256 of what it was before.
    """
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in names(root):
            if name not in known:
                archive.add(root / name, name, recursive=False, filter=lambda i: _plain(i, epoch))
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=9, mtime=0) as out:
        out.write(raw.getvalue())
    return packed.getvalue(), hashlib.sha256(raw.getvalue()).hexdigest()


def names(root: Path) -> list[str]:
    """Every file and directory below ``root``, sorted."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def _plain(info: tarfile.TarInfo, epoch: int) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = "root"
    info.mtime = epoch
    info.mode = stat.S_IMODE(info.mode) & ~stat.S_ISUID & ~stat.S_ISGID
    info.pax_headers = {}
    return info


def archive(
    target: Path, layers: Iterable[tuple[bytes, str]], version: str, epoch: int, created: str
) -> None:
    """Write the image to ``target``."""
    blobs: dict[str, bytes] = {}

    def blob(kind: str, data: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = data
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data)}

    packed = list(layers)
    config = blob(_CONFIG, _json(_configuration(packed, version, created)))
    listed = [blob(_LAYER, data) for data, _ in packed]
    manifest = {"schemaVersion": 2, "mediaType": _MANIFEST, "config": config, "layers": listed}
    described = blob(_MANIFEST, _json(manifest))
    tags = (version, "latest")
    index = [
        {
            **described,
            "annotations": {
                "io.containerd.image.name": f"{NAME}:{tag}",
                "org.opencontainers.image.ref.name": tag,
            },
        }
        for tag in tags
    ]
    docker = {
        "Config": f"blobs/sha256/{config['digest'].removeprefix('sha256:')}",
        "RepoTags": [f"{NAME}:{tag}" for tag in tags],
        "Layers": [f"blobs/sha256/{each['digest'].removeprefix('sha256:')}" for each in listed],
    }
    blobs["oci-layout"] = _json({"imageLayoutVersion": "1.0.0"})
    blobs["index.json"] = _json({"schemaVersion": 2, "mediaType": _INDEX, "manifests": index})
    blobs["manifest.json"] = _json([docker])
    with tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as out:
        for name in sorted(blobs):
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.mode = len(blobs[name]), epoch, 0o644
            out.addfile(info, io.BytesIO(blobs[name]))


def _configuration(
    layers: Sequence[tuple[bytes, str]], version: str, created: str
) -> dict[str, Any]:
    title = "org.opencontainers.image"
    return {
        "architecture": _ARCHITECTURES[platform.machine()],
        "os": "linux",
        "created": created,
        "config": {
            "Entrypoint": ["/usr/bin/underpass"],
            "Env": ["PATH=/usr/bin", "LANG=C.UTF-8"],
            "WorkingDir": "/",
            "Labels": {
                f"{title}.title": "underpass",
                f"{title}.version": version,
                f"{title}.licenses": "Apache-2.0 AND (GPL-2.0-only OR BSD-2-Clause)",
                f"{title}.created": created,
            },
        },
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}" for _, digest in layers]},
        "history": [
            {"created": created, "created_by": f"Debian {SUITE}"},
            {"created": created, "created_by": f"underpass {version}"},
        ],
    }


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"


def _run(*argv: str) -> None:
    if code := subprocess.run(argv, check=False).returncode:
        raise SystemExit(f"underpass: cannot build the image: {argv[0]} failed ({code})")


def _output(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Build; says where the archive is and how large."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--requirements", type=Path, default=Path("requirements-image.txt"))
    parser.add_argument("--output", type=Path, default=Path("dist"))
    chosen = parser.parse_args()
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH", "1580601600"))  # hatchling's, of wheels
    created = _output("date", "-u", "-d", f"@{epoch}", "+%Y-%m-%dT%H:%M:%SZ").strip()
    os.umask(0o022)
    with tempfile.TemporaryDirectory(prefix="underpass-image-") as scratch:
        root, debs = Path(scratch, "root"), Path(scratch, "debs")
        root.mkdir(mode=0o755)
        debs.mkdir()
        components = debian(root, debs)
        below = layer(root, epoch)
        known = frozenset(names(root))
        components += python(root, chosen.wheel, chosen.requirements)
        version = next(each.version for each in components if each.name == "underpass")
        listed = _json(bill(components, version, created))
        (root / _SBOM).parent.mkdir(parents=True)
        (root / _SBOM).write_bytes(listed)
        compile_python(root)
        chosen.output.mkdir(exist_ok=True)
        target = chosen.output / "underpass-image.tar"
        fresh = target.with_suffix(".tar.fresh")
        archive(fresh, [below, layer(root, epoch, known)], version, epoch, created)
        fresh.replace(target)
        (chosen.output / "underpass-image.cdx.json").write_bytes(listed)
        unpacked = sum(path.lstat().st_size for path in root.rglob("*") if path.is_file())
    size = target.stat().st_size
    print(f"{target}: {NAME}:{version}, {size / 1e6:.1f} MB, {unpacked / 1e6:.1f} MB unpacked")  # noqa: T201


if __name__ == "__main__":
    main()
