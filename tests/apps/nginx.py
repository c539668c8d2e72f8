"""nginx, started for a test in a directory of its own."""

from __future__ import annotations

from pathlib import Path

from tests.apps.programs import find, serve
from tests.kernel.bed import Bed

_CONFIG = """
user root;
daemon off;
worker_processes 2;
pid {name}.pid;
error_log {name}.error;
events {{ worker_connections 512; }}
http {{
  access_log off;
  sendfile {sendfile};
  tcp_nopush on;
  keepalive_requests 100000;
  client_max_body_size 200m;
  client_body_temp_path {name}.body;
  proxy_temp_path {name}.proxy;
  fastcgi_temp_path {name}.fastcgi;
  uwsgi_temp_path {name}.uwsgi;
  scgi_temp_path {name}.scgi;
  {http}
}}
"""

DAV = """
server {
  listen 8080;
  location / { root files; dav_methods PUT; create_full_put_path on; }
}
"""
"""A server on port 8080 that takes uploads."""


def start(
    bed: Bed,
    where: str,
    directory: Path,
    http: str,
    port: int,
    sendfile: str = "on",
    *,
    outside: bool = False,
) -> None:
    """Start nginx with `http` in its http block; returns when `port` answers.

    Relative paths are below `directory`. Skips the test when nginx is not installed.
    """
    nginx = find("nginx", "nginx-light")
    name = f"nginx-{where}-{port}"
    directory.chmod(0o755)
    config = directory / f"{name}.conf"
    config.write_text(_CONFIG.format(name=name, sendfile=sendfile, http=http))
    words = [nginx, "-c", str(config), "-p", str(directory), "-e", str(directory / "nginx.error")]
    serve(bed, where, port, words, directory / f"{name}.log", outside=outside)
