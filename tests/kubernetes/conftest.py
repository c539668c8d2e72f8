"""The image, built once; what needs what this machine does not have is skipped, with a reason."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kubernetes.cluster import PINS, Cluster
from tests.kubernetes.container import Container, unpack
from tests.pods.testbed import script

ROOT = Path(__file__).parents[2]
HELM = ROOT / ".venv/bin/helm"


@pytest.fixture(scope="session")
def image() -> Path:
    """The image of what lies here; UNDERPASS_IMAGE names one that was built before."""
    if built := os.environ.get("UNDERPASS_IMAGE"):
        return Path(built)
    if os.geteuid() != 0:
        pytest.skip("building the image takes root")
    subprocess.run([ROOT / "dev", "image"], check=True, stdout=subprocess.DEVNULL)
    return ROOT / "dist/underpass-image.tar"


@pytest.fixture(scope="session")
def container(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """The image, ready to run."""
    if not (shutil.which("runc") and shutil.which("skopeo")):
        pytest.skip("runc and skopeo are not installed; `./dev test` installs them")
    bundle = tmp_path_factory.mktemp("image")
    unpack(image, bundle)
    yield Container(bundle, f"/underpass-test-image-{os.getpid()}")
    shutil.rmtree(bundle)


@pytest.fixture(scope="session")
def cluster(node: None, image: Path) -> Cluster:  # noqa: ARG001 - it is up
    """A real Kubernetes node that has the image; underpass is not on it."""
    if PINS.exists():
        pytest.skip(f"underpass is up on this node: {PINS}")
    place = script()
    assert place
    found = Cluster(place)
    found.run("image", str(image))
    return found


@pytest.fixture(scope="session")
def helm() -> str:
    """The real one."""
    if not HELM.exists():
        pytest.skip("helm is not here; `./dev test` fetches it for x86_64")
    return str(HELM)
