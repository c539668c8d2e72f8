"""Every workload by its name, and those that can be sized."""

from __future__ import annotations

from collections.abc import Callable

from underpass.bench import idle, meshed, mixed, parallel
from underpass.bench.programs import PROGRAMS, Workload
from underpass.errors import Usage

WORKLOADS = {
    each.name: each
    for each in (
        *PROGRAMS,
        parallel.workload(parallel.SIZE),
        mixed.WORKLOAD,
        idle.workload(idle.PAIRS),
        meshed.WORKLOAD,
    )
}

#: Makers by the one setting each takes, which is an option of the command line too.
_SIZED: dict[str, tuple[str, Callable[[int], Workload]]] = {
    "size": ("parallel", parallel.workload),
    "pairs": ("idle", idle.workload),
}


def choose(name: str, **settings: int | None) -> Workload:
    """The workload of a name, sized as asked; None leaves a setting as it is.

    Raises:
        Usage: it does not take the setting.
    """
    chosen = WORKLOADS[name]
    for setting, value in settings.items():
        if value is None:
            continue
        owner, make = _SIZED[setting]
        if name != owner:
            cause = f"workload {name} has no {setting}"
            raise Usage("use", f"--{setting} {value}", cause, f"say --workload {owner} with it")
        chosen = make(value)
    return chosen
