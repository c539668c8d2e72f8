"""`underpass completion` and `underpass man`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from underpass import manual


@click.command(short_help="Completion of commands and options, for your shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print what SHELL has to read for completion.

    \b
    bash  underpass completion bash > /etc/bash_completion.d/underpass
    zsh   underpass completion zsh > "${fpath[1]}/_underpass"
    fish  underpass completion fish > ~/.config/fish/completions/underpass.fish
    """  # noqa: D301 - to click, a real \b says that lines stay as they are
    kind = get_completion_class(shell)
    assert kind
    click.echo(kind(ctx.find_root().command, {}, "underpass", "_UNDERPASS_COMPLETE").source())


@click.command(short_help="The manual page, to be installed as underpass.1.")
@click.pass_context
def man(ctx: click.Context) -> None:
    """Print the manual page in man's own format; `./dev build` writes it to dist/underpass.1."""
    root = ctx.find_root().command
    assert isinstance(root, click.Group)
    click.echo(manual.page(root), nl=False)
