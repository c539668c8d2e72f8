"""A thin binding over ``libbpf.so.1`` (1.1 or newer): one C call a function, checked, no policy.

Descriptors are wrapped in :class:`Fd`, which closes them. Errors are :class:`KernelError`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import signal
import struct
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar, Union, cast

from underpass.errors import KernelError, Unsupported

BPF_CGROUP_INET_INGRESS, BPF_CGROUP_SOCK_OPS = 0, 3
BPF_MAP_TYPE_ARRAY = 2
BPF_SK_MSG_VERDICT = 7
BPF_TRACE_ITER = 28
_LOG_LINES = 12
_RAISING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
_MOST_KEYS = 1 << 20  # a map that changes under the walk may show keys again

_Value = Union[ctypes.Structure, "ctypes._SimpleCData[int]"]  # noqa: SLF001 (its public name)
Key = TypeVar("Key", bound=_Value)
Element = TypeVar("Element", bound=_Value)

_PRINT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class _LinkOpts(ctypes.Structure):
    """``struct bpf_link_create_opts`` up to what iterators need, padded to its size in 1.1."""

    _fields_ = [
        ("sz", ctypes.c_size_t),
        ("flags", ctypes.c_uint32),
        ("iter_info", ctypes.c_void_p),
        ("iter_info_len", ctypes.c_uint32),
        ("target_btf_id", ctypes.c_uint32),
        ("rest", ctypes.c_uint64 * 5),
    ]


class Fd:
    """An owned file descriptor; closes at the end of a ``with`` block or when collected."""

    def __init__(self, number: int) -> None:
        self.number = number

    def close(self) -> None:
        """Close it; again is no error."""
        number, self.number = self.number, -1
        if number >= 0:
            os.close(number)

    def __enter__(self) -> Fd:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class _Log:
    """libbpf's messages of the last load; the verifier's last lines go into the error."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        libc = ctypes.CDLL(None)
        libc.vsnprintf.argtypes = [
            ctypes.c_char_p,
            ctypes.c_size_t,
            ctypes.c_char_p,
            ctypes.c_void_p,
        ]

        def keep(_level: int, form: bytes, args: int) -> int:
            text = ctypes.create_string_buffer(1 << 16)
            libc.vsnprintf(text, len(text), form, args)
            self.lines += text.value.decode(errors="replace").splitlines()
            del self.lines[: -_LOG_LINES * 10]
            return 0

        self.callback = _PRINT(keep)

    def tail(self) -> str:
        """The last telling line: what the verifier or libbpf refused."""
        noise = ("-- ", "processed ", "libbpf: failed to load object", "verification time", "stack")
        told = [line for line in self.lines if line.strip() and not line.startswith(noise)]
        return told[-2] if len(told) > 1 else "".join(told)


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Signals take effect after a call that may log: what a handler raises in there is dropped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    over = False
    handlers = {n: do for n in _RAISING if callable(do := signal.getsignal(n))}

    def hold(number: int, frame: FrameType | None) -> None:
        if over:
            handlers[signal.Signals(number)](number, frame)
        else:
            came.append(number)

    for number in handlers:
        signal.signal(number, hold)
    try:
        yield
    finally:
        over = True
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for late in came:
            handlers[signal.Signals(late)](late, None)


@functools.cache
def _library() -> tuple[Any, _Log]:
    try:
        lib = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise Unsupported(
            "load", "libbpf.so.1", str(error), "install libbpf 1.1 or newer (Debian: libbpf1)"
        ) from None
    major, minor = lib.libbpf_major_version(), lib.libbpf_minor_version()
    if (major, minor) < (1, 1):
        raise Unsupported("use", f"libbpf {major}.{minor}", "it is too old", "install 1.1 or newer")
    pointer = ctypes.c_void_p
    for name, result, args in (
        ("bpf_object__open_file", pointer, [ctypes.c_char_p, pointer]),
        ("bpf_object__load", ctypes.c_int, [pointer]),
        ("bpf_object__close", None, [pointer]),
        ("bpf_object__find_map_by_name", pointer, [pointer, ctypes.c_char_p]),
        ("bpf_object__find_program_by_name", pointer, [pointer, ctypes.c_char_p]),
        ("bpf_map__fd", ctypes.c_int, [pointer]),
        ("bpf_program__fd", ctypes.c_int, [pointer]),
        ("bpf_program__set_autoload", ctypes.c_int, [pointer, ctypes.c_bool]),
        (
            "bpf_program__set_attach_target",
            ctypes.c_int,
            [pointer, ctypes.c_int, ctypes.c_char_p],
        ),
        ("bpf_map__set_max_entries", ctypes.c_int, [pointer, ctypes.c_uint32]),
        ("bpf_map__set_initial_value", ctypes.c_int, [pointer, pointer, ctypes.c_size_t]),
        ("libbpf_set_print", pointer, [_PRINT]),
        ("libbpf_num_possible_cpus", ctypes.c_int, []),
        ("bpf_map_lookup_elem", ctypes.c_int, [ctypes.c_int, pointer, pointer]),
        (
            "bpf_map_update_elem",
            ctypes.c_int,
            [ctypes.c_int, pointer, pointer, ctypes.c_uint64],
        ),
        (
            "bpf_map_create",
            ctypes.c_int,
            [ctypes.c_int, ctypes.c_char_p, *[ctypes.c_uint32] * 3, pointer],
        ),
        ("bpf_map_get_next_key", ctypes.c_int, [ctypes.c_int, pointer, pointer]),
        ("bpf_obj_pin", ctypes.c_int, [ctypes.c_int, ctypes.c_char_p]),
        ("bpf_obj_get", ctypes.c_int, [ctypes.c_char_p]),
        (
            "bpf_link_create",
            ctypes.c_int,
            [ctypes.c_int, ctypes.c_int, ctypes.c_int, pointer],
        ),
        ("bpf_link_detach", ctypes.c_int, [ctypes.c_int]),
        ("bpf_raw_tracepoint_open", ctypes.c_int, [ctypes.c_char_p, ctypes.c_int]),
        ("bpf_map_delete_elem", ctypes.c_int, [ctypes.c_int, pointer]),
        ("bpf_iter_create", ctypes.c_int, [ctypes.c_int]),
        (
            "bpf_prog_attach",
            ctypes.c_int,
            [ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_uint],
        ),
        (
            "bpf_prog_query",
            ctypes.c_int,
            [ctypes.c_int, ctypes.c_int, ctypes.c_uint32, pointer, pointer, pointer],
        ),
        ("bpf_prog_get_fd_by_id", ctypes.c_int, [ctypes.c_uint32]),
        ("bpf_obj_get_info_by_fd", ctypes.c_int, [ctypes.c_int, pointer, pointer]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, args
    log = _Log()
    lib.libbpf_set_print(log.callback)
    return lib, log


def _check(result: int, act: str, obj: object, next_step: str, detail: str = "") -> int:
    if result < 0:
        raise KernelError(act, obj, -result, next_step, detail)
    return result


class Object:
    """An opened, not yet loaded or loaded ``.bpf.o``. Use as a context manager.

    Raises:
        KernelError: the file does not open, or the kernel refuses it.
    """

    def __init__(self, path: Path) -> None:
        lib, log = _library()
        log.lines.clear()
        self._lib, self._log, self.path = lib, log, path
        with _signals_wait():
            self._object = lib.bpf_object__open_file(os.fsencode(path), None)
        if not self._object:
            code = ctypes.get_errno() or errno.ENOENT
            raise KernelError("open", path, code, "reinstall underpass", log.tail())

    def __enter__(self) -> Object:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lib.bpf_object__close(self._object)

    def _find(self, kind: str, name: str) -> int:
        found = getattr(self._lib, f"bpf_object__find_{kind}_by_name")(self._object, name.encode())
        if not found:
            raise KernelError(f"find {kind}", name, errno.ENOENT, "reinstall underpass")
        return int(found)

    def set_entries(self, name: str, entries: int) -> None:
        """Size map ``name`` before load."""
        result = self._lib.bpf_map__set_max_entries(self._find("map", name), entries)
        _check(result, "size map", name, "choose a smaller capacity")

    def set_constants(self, name: str, value: ctypes.Structure) -> None:
        """Fill a ``.rodata`` map before load."""
        found = self._find("map", name)
        size = ctypes.sizeof(value)
        result = self._lib.bpf_map__set_initial_value(found, ctypes.byref(value), size)
        _check(result, "set", name, "reinstall underpass")

    def select(self, wanted: set[str], known: tuple[str, ...]) -> None:
        """Load only the programs ``wanted`` of those ``known``."""
        for name in known:
            self._lib.bpf_program__set_autoload(self._find("program", name), name in wanted)

    def aim(self, name: str, tracepoints: Iterable[str]) -> bool:
        """Choose the first of these that the kernel has for a ``tp_btf`` program before load.

        Returns:
            False if it has none: the program is left out.
        """
        program, aim = self._find("program", name), self._lib.bpf_program__set_attach_target
        with _signals_wait():
            found = any(aim(program, 0, point.encode()) == 0 for point in tracepoints)
        if not found:
            self._lib.bpf_program__set_autoload(program, False)
        self._log.lines.clear()  # of what was not found
        return found

    def load(self) -> None:
        """Create the maps and load the programs."""
        with _signals_wait():
            result = self._lib.bpf_object__load(self._object)
        _check(result, "load", self.path.name, "run `underpass doctor`", self._log.tail())

    def program(self, name: str) -> int:
        """Descriptor of a loaded program; borrowed, valid while the object is open."""
        return int(self._lib.bpf_program__fd(self._find("program", name)))

    def map(self, name: str) -> int:
        """Descriptor of a created map; borrowed, valid while the object is open."""
        return int(self._lib.bpf_map__fd(self._find("map", name)))


def create_array(name: str, value: _Value) -> Fd:
    """A new array map whose one element is ``value``."""
    lib, _ = _library()
    size = ctypes.sizeof(value)
    result = lib.bpf_map_create(BPF_MAP_TYPE_ARRAY, name.encode(), 4, size, 1, None)
    made = Fd(_check(result, "create map", name, "run `underpass doctor`"))
    update(made.number, ctypes.c_uint32(0), value)
    return made


def pin(fd: int, path: Path) -> None:
    """Pin a map, program or link at ``path`` in a bpffs."""
    lib, _ = _library()
    result = lib.bpf_obj_pin(fd, os.fsencode(path))
    _check(result, "pin", path, "check that it is on a writable bpffs")


def get(path: Path) -> Fd:
    """Open what is pinned at ``path``."""
    lib, _ = _library()
    result = lib.bpf_obj_get(os.fsencode(path))
    denied = -result in (errno.EPERM, errno.EACCES)
    step = "run as root" if denied else "run `underpass status`"
    return Fd(_check(result, "open pin", path, step))


def map_sizes(fd: int) -> tuple[int, int, int]:
    """Type (``enum bpf_map_type``), key size and value size in bytes of an open map."""
    lib, _ = _library()
    info = ctypes.create_string_buffer(256)
    size = ctypes.c_uint32(len(info))
    result = lib.bpf_obj_get_info_by_fd(fd, info, ctypes.byref(size))
    _check(result, "ask about map", f"fd {fd}", "run `underpass doctor`")
    kind, _, key, value = struct.unpack_from("=4I", info.raw)
    return kind, key, value


def lookup(fd: int, key: _Value, value: _Value | ctypes.Array[Any]) -> bool:
    """Read one element into ``value``; False if there is none."""
    lib, _ = _library()
    result = lib.bpf_map_lookup_elem(fd, ctypes.byref(key), ctypes.byref(value))
    if result == -errno.ENOENT:
        return False
    _check(result, "read map", f"fd {fd}", "run `underpass doctor`")
    return True


def update(
    fd: int, key: _Value, value: _Value | ctypes.Array[Any], *, only_new: bool = False
) -> bool:
    """Write one element; ``only_new``: unless it is there already, then False."""
    lib, _ = _library()
    result = lib.bpf_map_update_elem(fd, ctypes.byref(key), ctypes.byref(value), int(only_new))
    if only_new and result == -errno.EEXIST:
        return False
    _check(result, "write map", f"fd {fd}", "run `underpass doctor`")
    return True


def delete(fd: int, key: _Value) -> bool:
    """Delete one element; False if there was none."""
    lib, _ = _library()
    result = lib.bpf_map_delete_elem(fd, ctypes.byref(key))
    if result == -errno.ENOENT:
        return False
    _check(result, "delete from map", f"fd {fd}", "run `underpass doctor`")
    return True


def keys(fd: int, key_size: int) -> list[bytes]:
    """The keys of a hash map (a moment's view)."""
    lib, _ = _library()
    found: list[bytes] = []
    key, following = None, ctypes.create_string_buffer(key_size)
    while lib.bpf_map_get_next_key(fd, key, following) == 0 and len(found) < _MOST_KEYS:
        key = ctypes.create_string_buffer(following.raw, key_size)
        found.append(following.raw)
    return found


def items(fd: int, key: type[Key], value: type[Element]) -> Iterator[tuple[Key, Element]]:
    """Keys and values of a hash map; elements that go meanwhile are left out."""
    for raw in keys(fd, ctypes.sizeof(key)):
        at = key.from_buffer_copy(raw)
        found = value()
        if lookup(fd, at, found):
            yield cast(Key, at), found


def version() -> str:
    """Version of the loaded libbpf, as ``1.1``."""
    lib, _ = _library()
    return f"{lib.libbpf_major_version()}.{lib.libbpf_minor_version()}"


def possible_cpus() -> int:
    """Number of CPUs that a per-CPU map has values for."""
    lib, _ = _library()
    return int(lib.libbpf_num_possible_cpus())


def attach_cgroup(program: int, cgroup: int, hook: int) -> Fd:
    """Attach to a cgroup (``bpf_link``, multi) at a hook of its; lives as long as the link."""
    lib, _ = _library()
    result = lib.bpf_link_create(program, cgroup, hook, None)
    return Fd(_check(result, "attach to", "the cgroup", "run `underpass doctor`"))


def attach_map(program: int, sockets: int) -> Fd | None:
    """Attach sk_msg to a sockhash; a link since 6.10, else attached for the map's life (None)."""
    lib, _ = _library()
    result = lib.bpf_link_create(program, sockets, BPF_SK_MSG_VERDICT, None)
    if result >= 0:
        return Fd(result)
    result = lib.bpf_prog_attach(program, sockets, BPF_SK_MSG_VERDICT, 0)
    _check(result, "attach sk_msg to", "the sockhash", "run `underpass doctor`")
    return None


def attach_tracepoint(program: int) -> Fd:
    """Attach a ``tp_btf`` program to its tracepoint (``bpf_link``); lives as long as the link."""
    lib, _ = _library()
    result = lib.bpf_raw_tracepoint_open(None, program)
    return Fd(_check(result, "watch", "programs", "run `underpass doctor`"))


def detach(link: int) -> None:
    """Detach a link at once, whoever else holds it."""
    lib, _ = _library()
    _check(lib.bpf_link_detach(link), "detach", "the link", "run `underpass down` again")


def iterate(program: int, sockets: int | None = None) -> bytes:
    """Run an iterator to its end and return what it wrote."""
    lib, _ = _library()
    info = (ctypes.c_uint32 * 4)(sockets or 0)
    opts = _LinkOpts(sz=ctypes.sizeof(_LinkOpts))
    if sockets is not None:
        opts.iter_info = ctypes.addressof(info)
        opts.iter_info_len = ctypes.sizeof(info)
    result = lib.bpf_link_create(program, 0, BPF_TRACE_ITER, ctypes.byref(opts))
    with Fd(_check(result, "start", "an iterator", "run `underpass doctor`")) as link:
        result = lib.bpf_iter_create(link.number)
        with Fd(_check(result, "run", "an iterator", "run `underpass doctor`")) as run:
            parts = []
            while part := _read(run.number):
                parts.append(part)
            return b"".join(parts)


def _read(fd: int) -> bytes:
    while True:
        try:
            return os.read(fd, 1 << 16)
        except BlockingIOError:  # the kernel stopped after many sockets without output
            continue


def attached(cgroup: int) -> list[int]:
    """Ids of the sock_ops programs attached right at a cgroup (descriptor)."""
    lib, _ = _library()
    ids, count, flags = (ctypes.c_uint32 * 64)(), ctypes.c_uint32(64), ctypes.c_uint32()
    result = lib.bpf_prog_query(
        cgroup, BPF_CGROUP_SOCK_OPS, 0, ctypes.byref(flags), ids, ctypes.byref(count)
    )
    _check(result, "query sock_ops of", "the cgroup", "run `underpass doctor`")
    return list(ids[: count.value])


def _program_info(fd: int) -> bytes:
    """The head of ``struct bpf_prog_info``."""
    lib, _ = _library()
    info = ctypes.create_string_buffer(256)
    size = ctypes.c_uint32(len(info))
    result = lib.bpf_obj_get_info_by_fd(fd, info, ctypes.byref(size))
    _check(result, "ask about program", f"fd {fd}", "run `underpass doctor`")
    return info.raw


def program_id(fd: int) -> int:
    """Id of a loaded program."""
    return int.from_bytes(_program_info(fd)[4:8], sys.byteorder)


def program_label(number: int) -> str:
    """What to call a loaded program by: its name (15 characters at most) and id.

    The id alone where the program has gone, or CAP_SYS_ADMIN is missing, without which
    BPF_PROG_GET_FD_BY_ID opens none.
    """
    lib, _ = _library()
    result = lib.bpf_prog_get_fd_by_id(number)
    if result < 0:
        return f"id {number}"
    with Fd(result) as fd:
        name = _program_info(fd.number)[64:80].split(b"\0")[0].decode()
    return f"{name} (id {number})"


def program_runs(fd: int) -> tuple[int, int]:
    """Nanoseconds that a program has run, and how often, while ``kernel.bpf_stats_enabled``."""
    nanoseconds, count = struct.unpack_from("=2Q", _program_info(fd), 192)
    return nanoseconds, count
