"""Node's HTTP server and client through the shortcut: all bodies are right."""

from __future__ import annotations

from pathlib import Path

from tests.apps.programs import STREAMS, Checked, Compare, ask, find, serve
from tests.kernel.bed import SERVER4, Bed

PORT = 8090


def test_node_bodies_are_right(bed: Bed, compare: Compare, tmp_path: Path) -> None:
    """Claim: uploads and downloads of Node's streams, 20 at once, are right, kept alive or not."""
    node = find("node", "nodejs")
    server = str(Path(__file__).with_name("node_server.mjs"))
    serve(bed, "server", PORT, [node, server, "0.0.0.0", str(PORT)], tmp_path / "node.log")
    client = str(Path(__file__).with_name("node_client.mjs"))
    compare("Node", _use, [node, client, SERVER4, str(PORT)], floor=STREAMS)


def _use(words: list[str]) -> Checked:
    """In a worker: run the client."""
    right, milliseconds = ask(words).split()
    return Checked(int(right), seconds=float(milliseconds) / 1000)
