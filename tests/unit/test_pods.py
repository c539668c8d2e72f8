"""Claims: a pod is where its own processes are, not where one is that only starts them."""

import pytest

from underpass.pods import _own_namespace

NODE, POD = 1, 2


@pytest.mark.parametrize(
    ("spaces", "host_network", "found"),
    [
        ([], False, 0),
        ([POD], False, POD),
        ([NODE], False, 0),  # its runtime prepares its first process
        ([NODE, POD], False, POD),
        ([NODE, POD], None, POD),
        ([NODE], None, NODE),
        ([NODE, POD], True, NODE),
        ([NODE], True, NODE),
    ],
)
def test_whose_namespace(spaces: list[int], host_network: bool | None, found: int) -> None:
    """Claim: the node's own is a pod's only if it is known to have no other."""
    assert _own_namespace(spaces, {NODE}, host_network) == found
