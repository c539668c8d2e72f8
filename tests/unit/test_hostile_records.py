"""Words and records from anywhere: an error of ours or an answer, never anything else."""

from __future__ import annotations

import json
from itertools import starmap

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.unit.fuzz import FUZZED
from underpass import abi, records
from underpass.bench.programs import _iperf_measures
from underpass.bench.way import Reach
from underpass.errors import UnderpassError, Usage
from underpass.explain import Target, View, explain, merged, parse
from underpass.model import Reason, plain


def _bytes(count: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=count, max_size=count)


#: Few cookies, so that they repeat and refer to each other.
_COOKIES = st.integers(0, 3)
_RECORDS = st.builds(
    abi.Record,
    *[_COOKIES] * 2,
    *[st.integers(0, (1 << 64) - 1)] * 6,
    _bytes(16),
    st.integers(0, (1 << 32) - 1),
    _bytes(16),
    *[st.integers(0, (1 << 32) - 1)] * 3,
    *[st.one_of(st.integers(0, 3), st.integers(0, 255))] * 6,
)


@FUZZED
@given(st.binary(max_size=abi.RECORD.size * 3))
@example(b"\xff" * abi.RECORD.size * 2)
def test_any_bytes_as_records(data: bytes) -> None:
    """Claim: any bytes are read as records, and a fragment at the end is dropped."""
    found = list(abi.records(data))
    assert len(found) == len(data) // abi.RECORD.size
    _use(found)


@FUZZED
@given(st.lists(_RECORDS, max_size=6))
def test_any_records(found: list[abi.Record]) -> None:
    """Claim: wrong reasons, equal cookies and unknown roles give an answer that JSON can hold."""
    _use(found)


def _use(found: list[abi.Record]) -> None:
    ends = records.matched(found)
    for client, server in ends:
        assert (client.role, server.role) == (abi.CLIENT, abi.SERVER)
        assert server.peer == client.cookie
    pairs = list(starmap(lambda one, other: records.pair(one, other, {}), ends))
    sockets = [records.socket_of(record, {}, {1, 2}) for record in found]
    targets = [Target(sock.endpoint.address, None) for sock in sockets] or [Target("::", 1)]
    findings = explain(
        targets[0], targets[-1], View("active", pairs, merged([sockets, sockets]), {})
    )
    assert findings
    json.dumps(plain([pairs, findings]))


@pytest.mark.parametrize("number", [len(Reason), 255])
def test_a_reason_of_another_version(number: int) -> None:
    """Claim: a reason that this version does not know is told as a state that cannot be read."""
    raw = bytes(abi.RECORD.size)
    [record] = abi.records(raw)
    record = record._replace(reason=number)
    assert records.socket_of(record, {}, set()).reason is Reason.NO_STATE
    assert records.pair(record, record, {}).client_to_server.path == "tcp"


@FUZZED
@given(st.one_of(st.text(max_size=20), st.text(alphabet="0123456789abf:.[]%/", max_size=20)))
@example("[::1")
@example("[::1]80")
@example("10.0.0.1:٣")
@example("10.0.0.1:" + "9" * 5000)
@example("::1%\x1b")
def test_any_word_as_a_target(text: str) -> None:
    """Claim: any word is a target that reads back the same, or a usage error of one line."""
    try:
        target = parse(text)
    except Usage as error:
        line = str(error)
    else:
        line = str(target)
        assert parse(line) == target
    assert line.isprintable()


@pytest.mark.parametrize("text", ["[::1", "[::1]80", "::1]", "[::1]]:80", "10.0.0.1:٣"])
def test_words_that_only_look_like_targets(text: str) -> None:
    """Claim: brackets that do not close, a port without colon and foreign digits are refused."""
    with pytest.raises(Usage):
        parse(text)


def test_a_scope_is_not_part_of_an_address() -> None:
    """Claim: a link-local address with its interface finds sockets, which are listed without."""
    assert parse("[fe80::1%eth0]:80") == Target("fe80::1", 80)


_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["end", "sum_received", "bytes", "bits_per_second"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@FUZZED
@given(st.one_of(st.text(max_size=50), _JSON.map(json.dumps)))
def test_any_output_of_iperf3(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    """Claim: whatever iperf3 prints is a reading or an error that quotes it."""
    measure = _iperf_measures(Reach(tmp_path_factory.getbasetemp()), 1)[0]
    try:
        reading = measure.parse(text)
    except UnderpassError as error:
        line = str(error)
    else:
        line = str(reading.figure)
    assert line.isprintable()
