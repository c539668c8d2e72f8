"""What `bugreport` leaves out, and where it writes."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from underpass import bugreport
from underpass.cli import cli
from underpass.errors import Usage

KEYS = (
    *("pw", "pwd", "pass", "passwd", "password", "passphrase", "secret", "token", "api_key"),
    *(
        "api-key",
        "credential",
        "credentials",
        "private_key",
        "db_pw",
        "DB_PASSWORD",
        "client-secret",
    ),
)
FORMS = (
    *('{{"{key}":"{value}"}}', '{{"{key}": "{value}", "event": "up"}}', "{{'{key}': '{value}'}}"),
    *("{key}={value} event=up", "{key}='{value}'", '{key} = "{value}"', "a=1,{key}={value},b=2"),
    *("{key}: {value}", "- {key}: {value}", '  {key}: "{value}"', "key: x\n  {key}: '{value}'\n"),
    *(r'{{"text": "{{\"{key}\": \"{value}\"}}"}}', '{{"{key}": ["{value}", "{value}"]}}'),
    '{{"{key}": "a\\"{value}"}}',
)
BLANKS = ('{{"{key}": "two {value}"}}', "{key}='two {value}'", "{key}: two {value} words")
LABEL = "PRIVATE" + " KEY"  # apart: this file holds none


@pytest.mark.parametrize("form", FORMS)
def test_what_a_word_announces(form: str) -> None:
    """Claim: what follows a key that announces a secret is left out, in JSON, YAML and k=v."""
    for key in KEYS:
        text = bugreport.reduced(form.format(key=key, value="hunter3"))
        assert "hunter3" not in text, key
        assert "[left out]" in text
        assert ("event" in form) == ("up" in text)


@pytest.mark.parametrize("form", BLANKS)
def test_secrets_of_several_words(form: str) -> None:
    """Claim: blanks inside quotes, or in a line of YAML, do not end a secret."""
    assert "hunter3" not in bugreport.reduced(form.format(key="passphrase", value="hunter3"))


def test_what_is_left_is_json() -> None:
    """Claim: a JSON document with secrets in it stays one."""
    document = {"password": "hunter3", "list": [{"pw": 'a "b" c', "port": 80}], "token": ""}
    text = bugreport.reduced(json.dumps(document, indent=1))
    assert json.loads(text)["list"][0] == {"pw": "[left out]", "port": 80}


@pytest.mark.parametrize(
    "line",
    ["event=up spw=1", "the upward way: 5", '{"event": "up", "power": 3}', "compare: whole lines"],
)
def test_what_is_no_secret(line: str) -> None:
    """Claim: other words stay."""
    assert bugreport.reduced(line) == line


@pytest.mark.parametrize("kind", ["", "RSA ", "ENCRYPTED ", "OPENSSH "])
@pytest.mark.parametrize("between", ["\n", "\\n", "\n  ", "\nNov 26 14:00:00 node agent: "])
def test_private_keys(kind: str, between: str) -> None:
    """Claim: a private key in PEM is left out whole, also if an end of it is cut off."""
    begin, end = f"-----BEGIN {kind}{LABEL}-----", f"-----END {kind}{LABEL}-----"
    body = ["MIIEvQIBADANBg/kqhkiG9w0", "BAQEFAASCBKc+wggSjAgEA"]
    for lines in ([begin, *body, end], [begin, *body], [*body, end], [begin, *body, end] * 2):
        text = bugreport.reduced(between.join(lines))
        assert not any(part in text for part in body), lines
    whole = between.join(["before", begin, *body, end, "after"])
    assert bugreport.reduced(whole) == between.join(["before", "[left out]", "after"])
    public = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
    assert bugreport.reduced(public) == public


def test_to_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: `--output -` writes the archive and no other byte, as out of a pod."""
    monkeypatch.setattr(bugreport, "collect", lambda *_: {"status.json": "{}"})
    done = CliRunner().invoke(cli, ["bugreport", "--output", "-"], standalone_mode=False)
    with tarfile.open(fileobj=io.BytesIO(done.stdout_bytes), mode="r:gz") as archive:
        assert archive.getnames() == ["underpass-bugreport/status.json"]


def _refused(to: str | Path) -> None:
    done = CliRunner().invoke(cli, ["bugreport", "--output", str(to)], standalone_mode=False)
    assert isinstance(done.exception, Usage), done
    assert "name another file" in str(done.exception)


def test_where_it_does_not_write(tmp_path: Path) -> None:
    """Claim: what is no regular file is refused and stays what it is; so is no name."""
    fifo, file, link = (tmp_path / name for name in ("fifo", "file", "link"))
    os.mkfifo(fifo)
    file.write_text("kept")
    link.symlink_to(file)
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    for each in (fifo, link, tmp_path / "nowhere", ""):
        _refused(each)
    with pytest.raises(Usage):
        bugreport.write(fifo, {"a": "b"})
    assert fifo.is_fifo()
    assert link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "file", "link", "nowhere"]
    bugreport.write(file, {"a": "b"})
    assert file.read_bytes().startswith(b"\x1f\x8b")
