"""Python's mirror of the ABI agrees with bpf/underpass.h."""

from __future__ import annotations

import ctypes
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from underpass import abi
from underpass.model import REFUSALS, TCP_REASONS, Fault, Reason

HEADER = Path(__file__).parents[2] / "bpf" / "underpass.h"
MIRRORS = {
    "up_knobs": abi.Knobs,
    "up_about": abi.About,
    "up_control": abi.Control,
    "up_counters": abi.Counters,
    "up_order": abi.Order,
    "up_policy": abi.Policy,
    "up_group": abi.Group,
    "up_port": abi.Port,
    "up_network": abi.Network,
    "up_program": abi.Program,
}


def _header() -> str:
    if not HEADER.exists():
        pytest.skip("the header is only in a checkout")
    return HEADER.read_text()


def _check(asserted: list[str]) -> None:
    """Let the compiler that builds the programs check C expressions about the header."""
    _header()
    clang = shutil.which("clang")
    if clang is None:
        pytest.skip("clang is not installed")
    lines = [f"_Static_assert({text}, {text!r});".replace("'", '"') for text in asserted]
    source = "\n".join(
        ["#include <stddef.h>", "#include <linux/types.h>", HEADER.read_text(), *lines]
    )
    done = subprocess.run(
        [clang, "-fsyntax-only", "-x", "c", "-"],
        check=False,
        input=source,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr


def test_structures_have_the_headers_layout() -> None:
    """Claim: every mirrored structure has the size and the field offsets of the header's."""
    asserted = []
    for name, mirror in MIRRORS.items():
        asserted.append(f"sizeof(struct {name}) == {ctypes.sizeof(mirror)}")
        for field, *_ in mirror._fields_:
            if not field.startswith("pad"):
                offset = getattr(mirror, field).offset
                asserted.append(f"offsetof(struct {name}, {field}) == {offset}")
    _check(asserted)


@pytest.mark.parametrize(
    ("name", "packed", "record"),
    [("up_record", abi.RECORD, abi.Record), ("up_standing", abi.STANDING, abi.Standing)],
)
def test_records_have_the_headers_layout(
    name: str, packed: struct.Struct, record: type[abi.Record | abi.Standing]
) -> None:
    """Claim: the records that iterators write are unpacked at the header's offsets."""
    counted = re.findall(r"(\d*)([QIsBx])", packed.format.removeprefix("="))
    kinds = []
    for number, kind in counted:
        kinds += [number + kind] if kind == "s" else [kind] * int(number or 1)
    asserted = [f"sizeof(struct {name}) == {packed.size}"]
    for index, field in enumerate(record._fields):
        offset = struct.calcsize("=" + "".join(kinds[:index]))
        member = re.sub(r"^(local|remote)_", r"\1.", field)
        asserted.append(f"offsetof(struct {name}, {member}) == {offset}")
    _check(asserted)


def test_reasons_are_the_headers() -> None:
    """Claim: reasons have the header's names, words and numbers; each has a meaning."""
    listed = re.findall(r'^\tX\((\w+), "([\w-]+)"\)', _header(), re.MULTILINE)
    assert [(reason.name, reason.word) for reason in Reason] == listed
    assert [int(reason) for reason in Reason] == list(range(len(listed)))
    assert all(reason.meaning for reason in Reason)
    _check([f"UP_{reason.name} == {int(reason)}" for reason in Reason])


def test_every_reason_is_counted_once() -> None:
    """Claim: but for the policy, no reason is both of a message that took TCP and of a socket."""
    assert set(TCP_REASONS) & set(REFUSALS) == {Reason.POLICY}
    assert set(Reason) - {*TCP_REASONS, *REFUSALS} == {Reason.SHORTCUT, Reason.NO_MESSAGE}


def test_faults_and_roles_are_the_headers() -> None:
    """Claim: the switches of known-bad twins and the roles have the header's values."""
    faults = [f"UP_FAULT_{fault.name} == {int(fault)}" for fault in Fault]
    assert len(re.findall(r"\tUP_FAULT_\w+ = ", _header())) == len(faults)
    _check([*faults, f"UP_CLIENT == {abi.CLIENT}", f"UP_SERVER == {abi.SERVER}"])
    _check([f"UP_ABI == {abi.ABI}"])


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (bytes(10) + b"\xff\xff\x0a\x4d\x00\x01", "10.77.0.1"),
        (bytes(15) + b"\x01", "::1"),
        (bytes.fromhex("fd770000000000000000000000000002"), "fd77::2"),
    ],
)
def test_addresses(raw: bytes, text: str) -> None:
    """Claim: addresses of the map read as people write them, IPv4-mapped ones as IPv4."""
    assert abi.address(raw) == text
