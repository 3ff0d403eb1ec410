"""Pickles read as data: an unpickler of its own that imports nothing, calls nothing and builds plain containers only.

A pickle is a program of a stack machine; most of what it can do is to name functions and classes and to call them.
Here a name stays a name (`Global`), and what would be made by a call is an `Inert` object that keeps its arguments
and state. Only the few functions that rebuild tensors and arrays are known, by name, and done by this module.
"""

import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pickletools import opcodes
from typing import Any

from ..errors import shorten


MAX_BYTES = 1 << 29  # of one pickle
MAX_STEPS = 10_000_000  # opcodes: some ten seconds
MAX_SECONDS, STEPS_A_LOOK = 60, 1 << 12  # and how often to look at the clock
MAX_CALLS = 500_000
MAX_COPIES = 8  # bytes that calls copy, for a byte of the pickle: it may hand the same value to each of them
MAX_DEPTH = 10_000  # marks that are open at once
MAX_NAME = 512
CODE_OF = {opcode.code: opcode.name for opcode in opcodes}
MAPPINGS = ("collections.OrderedDict", "collections.defaultdict", "collections.Counter", "builtins.dict")
SEQUENCES = ("builtins.list", "builtins.set", "builtins.frozenset", "builtins.tuple")
COPYING = (*MAPPINGS, *SEQUENCES, "_codecs.encode", "builtins.bytes", "builtins.bytearray")


class PickleError(ValueError):
    """A pickle that is damaged, too large, or does what a pickle of weights does not."""


@dataclass(frozen=True)
class Global:
    """A name in a pickle: `module.name`. It is never looked up."""

    name: str


@dataclass(eq=False)
class Inert:
    """An object that a pickle would make by code, which is not run.

    Attributes:
        kind: name of its class or of the function that would make it.
        args: of the call.
        state: what would be set on it; a dict where attributes are named.
        pairs, entries: what would be put into it, as into a mapping, as into a list.
    """

    kind: str
    args: tuple = ()
    state: Any = None
    pairs: dict = field(default_factory=dict)
    entries: list = field(default_factory=list)

    def set_state(self, state: Any) -> None:
        """Takes what a pickle would set on the object."""
        self.state = state

    @property
    def parts(self) -> list[Any]:
        """All that it holds."""
        return [*self.args, self.state, *self.pairs.values(), *self.entries]


@dataclass(eq=False, frozen=True)
class OddKey:
    """Stands for a key of a mapping that is no text or number; it is not hashed by what it holds (`held`)."""

    kind: str
    held: Any = field(default=None, repr=False)  # a tuple of tuples may be longer than memory as text


@dataclass(eq=False)
class Persistent:
    """What a pickle refers to outside of itself, where nobody says what that is."""

    identity: Any


Build = Callable[..., Any]


class _Mark:
    pass


_MARK = _Mark()


def read_pickle(
    data: bytes | memoryview,
    *,
    start: int = 0,
    functions: Mapping[str, Build] | None = None,
    persistent: Callable[[Any], Any] = Persistent,
) -> tuple[Any, int]:
    """Reads one pickle.

    Args:
        data: bytes that hold it.
        start: where it begins.
        functions: name of a global -> what is done where the pickle calls it, with its arguments.
        persistent: gives what a persistent id stands for.

    Returns:
        what it holds: None, bool, int, float, str, bytes, list, tuple, dict, `Global`, `Inert`, and what `functions`
        and `persistent` give; and where it ends. Sets are lists.

    Raises:
        PickleError: damaged, or beyond a limit.
    """
    return _Machine(data, start, functions or {}, persistent).run()


class _Machine:
    def __init__(
        self, data: bytes | memoryview, start: int, functions: Mapping[str, Build], persistent: Callable[[Any], Any]
    ):
        self.data, self.at = memoryview(data), start
        self.end = min(len(self.data), start + MAX_BYTES)
        self.functions, self.persistent = functions, persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.marks = self.calls = 0
        self.copies = MAX_COPIES * (self.end - start) + (1 << 16)

    def run(self) -> tuple[Any, int]:
        deadline = time.monotonic() + MAX_SECONDS
        handlers = {ord(code): getattr(self, f"_{name.lower()}", None) for code, name in CODE_OF.items()}
        try:
            for step in range(MAX_STEPS):
                if not step % STEPS_A_LOOK and time.monotonic() > deadline:
                    raise PickleError(f"it takes more than {MAX_SECONDS} seconds")
                code = self.take(1)[0]
                if code == 0x2E:  # STOP
                    return self.pop(), self.at
                handler = handlers.get(code)
                if handler is None:
                    raise PickleError(f"it has the opcode {code:#04x} at byte {self.at - 1:,}, which is unknown")
                handler()
        except (IndexError, KeyError, struct.error, UnicodeDecodeError, OverflowError, TypeError, ValueError) as error:
            if isinstance(error, PickleError):
                raise
            raise PickleError(f"it is damaged at byte {self.at:,} ({type(error).__name__})") from error
        raise PickleError(f"it has more than {MAX_STEPS:,} steps")

    # the data

    def take(self, count: int) -> memoryview:
        if count < 0 or self.at + count > self.end:
            raise PickleError(f"it ends at byte {self.end:,} inside of a value")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self, encoding: str = "utf-8") -> str:
        """Text up to the end of the line."""
        start = self.at
        limit = min(self.end, start + (1 << 20))
        while self.at < limit:
            if self.data[self.at] == 0x0A:
                self.at += 1
                errors = "surrogateescape" if encoding == "utf-8" else "strict"
                return bytes(self.data[start : self.at - 1]).decode(encoding, errors)
            self.at += 1
        raise PickleError(f"a line from byte {start:,} on does not end")

    # the stack

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise PickleError(f"it takes a mark for a value at byte {self.at:,}")
        return value

    def top(self) -> Any:
        if self.stack[-1] is _MARK:
            raise PickleError(f"it takes a mark for a value at byte {self.at:,}")
        return self.stack[-1]

    def pop_to_mark(self) -> list[Any]:
        for at in range(len(self.stack) - 1, -1, -1):
            if self.stack[at] is _MARK:
                values = self.stack[at + 1 :]
                del self.stack[at:]
                self.marks -= 1
                return values
        raise PickleError(f"it lacks a mark at byte {self.at:,}")

    def _mark(self) -> None:
        self.marks += 1
        if self.marks > MAX_DEPTH:
            raise PickleError(f"it is nested more than {MAX_DEPTH:,} deep")
        self.push(_MARK)

    def _pop(self) -> None:
        if self.stack.pop() is _MARK:
            self.marks -= 1

    def _pop_mark(self) -> None:
        self.pop_to_mark()

    def _dup(self) -> None:
        self.push(self.top())

    # values

    def _none(self) -> None:
        self.push(None)

    def _newtrue(self) -> None:
        self.push(True)

    def _newfalse(self) -> None:
        self.push(False)

    def _int(self) -> None:
        text = self.line()
        self.push({"00": False, "01": True}.get(text) if text in ("00", "01") else int(text))

    def _binint(self) -> None:
        self.push(self.number("<i"))

    def _binint1(self) -> None:
        self.push(self.number("<B"))

    def _binint2(self) -> None:
        self.push(self.number("<H"))

    def _long(self) -> None:
        self.push(int(self.line().rstrip("L")))

    def _long1(self) -> None:
        self.push(int.from_bytes(self.take(self.number("<B")), "little", signed=True))

    def _long4(self) -> None:
        self.push(int.from_bytes(self.take(self.number("<i")), "little", signed=True))

    def _float(self) -> None:
        self.push(float(self.line()))

    def _binfloat(self) -> None:
        self.push(self.number(">d"))

    def _string(self) -> None:
        self.push(self.line("unicode-escape").strip("'\""))

    def _binstring(self) -> None:
        self.push(self.text("<i", "latin-1"))

    def _short_binstring(self) -> None:
        self.push(self.text("<B", "latin-1"))

    def _unicode(self) -> None:
        self.push(self.line("raw-unicode-escape"))

    def _binunicode(self) -> None:
        self.push(self.text("<I"))

    def _short_binunicode(self) -> None:
        self.push(self.text("<B"))

    def _binunicode8(self) -> None:
        self.push(self.text("<Q"))

    def text(self, layout: str, encoding: str = "utf-8") -> str:
        return str(self.take(self.number(layout)), encoding, "surrogateescape" if encoding == "utf-8" else "strict")

    def _binbytes(self) -> None:
        self.push(bytes(self.take(self.number("<I"))))

    def _short_binbytes(self) -> None:
        self.push(bytes(self.take(self.number("<B"))))

    def _binbytes8(self) -> None:
        self.push(bytes(self.take(self.number("<Q"))))

    _bytearray8 = _binbytes8

    def _next_buffer(self) -> None:
        raise PickleError("its data lie outside of the file (buffers of protocol 5)")

    def _readonly_buffer(self) -> None:
        pass

    def _proto(self) -> None:
        self.take(1)

    def _frame(self) -> None:
        self.take(8)  # frames tell how to buffer; a pickle can be read without

    # containers

    def _empty_list(self) -> None:
        self.push([])

    def _empty_dict(self) -> None:
        self.push({})

    def _empty_tuple(self) -> None:
        self.push(())

    _empty_set = _empty_list

    def _list(self) -> None:
        self.push(self.pop_to_mark())

    _frozenset = _list

    def _tuple(self) -> None:
        self.push(tuple(self.pop_to_mark()))

    def _tuple1(self) -> None:
        self.push((self.pop(),))

    def _tuple2(self) -> None:
        second, first = self.pop(), self.pop()
        self.push((first, second))

    def _tuple3(self) -> None:
        third, second, first = self.pop(), self.pop(), self.pop()
        self.push((first, second, third))

    def _dict(self) -> None:
        values = self.pop_to_mark()
        self.push({})
        self.put(values)

    def _setitem(self) -> None:
        value, key = self.pop(), self.pop()
        self.put([key, value])

    def _setitems(self) -> None:
        self.put(self.pop_to_mark())

    def put(self, values: list[Any]) -> None:
        held = self.top()
        target = held.pairs if isinstance(held, Inert) else held
        if not isinstance(target, dict) or len(values) % 2:
            raise PickleError(f"it puts {len(values)} values into a {type(held).__name__} at byte {self.at:,}")
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[key if is_plain_key(key) else odd_key(key)] = value

    def _append(self) -> None:
        value = self.pop()
        self.extend([value])

    def _appends(self) -> None:
        self.extend(self.pop_to_mark())

    _additems = _appends

    def extend(self, values: list[Any]) -> None:
        held = self.top()
        target = held.entries if isinstance(held, Inert) else held
        if not isinstance(target, list):
            raise PickleError(f"it appends to a {type(held).__name__} at byte {self.at:,}")
        target.extend(values)

    # the memo

    def _put(self) -> None:
        self.memo[int(self.line())] = self.top()

    def _binput(self) -> None:
        self.memo[self.number("<B")] = self.top()

    def _long_binput(self) -> None:
        self.memo[self.number("<I")] = self.top()

    def _memoize(self) -> None:
        self.memo[len(self.memo)] = self.top()

    def _get(self) -> None:
        self.push(self.memo[int(self.line())])

    def _binget(self) -> None:
        self.push(self.memo[self.number("<B")])

    def _long_binget(self) -> None:
        self.push(self.memo[self.number("<I")])

    # names and calls: nothing is imported, nothing is called but what `functions` has

    def _global(self) -> None:
        module, name = self.line(), self.line()
        self.push(_named(module, name))

    def _stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.push(_named(module, name))

    def _ext1(self) -> None:
        self.push(Global(f"copyreg extension {self.number('<B')}"))

    def _ext2(self) -> None:
        self.push(Global(f"copyreg extension {self.number('<H')}"))

    def _ext4(self) -> None:
        self.push(Global(f"copyreg extension {self.number('<i')}"))

    def _reduce(self) -> None:
        args, function = self.pop(), self.pop()
        self.push(self.call(function, args))

    def _newobj(self) -> None:
        self._reduce()

    def _newobj_ex(self) -> None:
        keywords, args, function = self.pop(), self.pop(), self.pop()
        made = self.call(function, args)
        if isinstance(made, Inert) and isinstance(keywords, dict):
            made.pairs.update(keywords)
        self.push(made)

    def _inst(self) -> None:
        module, name = self.line(), self.line()
        self.push(self.call(_named(module, name), tuple(self.pop_to_mark())))

    def _obj(self) -> None:
        values = self.pop_to_mark()
        self.push(self.call(values[0], tuple(values[1:])))

    def call(self, function: Any, args: Any) -> Any:
        args = args if isinstance(args, tuple) else (args,)
        name = function.name if isinstance(function, Global) else f"a {type(function).__name__}"
        self.calls += 1
        if self.calls > MAX_CALLS:
            raise PickleError(f"it makes more than {MAX_CALLS:,} objects")
        if name in self.functions or name in COPYING:
            self.spend(args)
        if name in self.functions:
            return self.functions[name](*args)
        if name in MAPPINGS:
            return _mapping(args)
        if name in SEQUENCES:
            return list(args[0]) if args and isinstance(args[0], (list, tuple)) else []
        if name == "copyreg._reconstructor" and args and isinstance(args[0], Global):
            return Inert(args[0].name)
        if name == "_codecs.encode" and args and isinstance(args[0], str):
            return args[0].encode("latin-1")
        if name in ("builtins.bytes", "builtins.bytearray"):
            return _bytes(args)
        return Inert(name, args)

    def spend(self, values: tuple) -> None:
        """Counts what a call may copy of its arguments."""
        for value in values:
            if isinstance(value, (str, bytes)):
                self.copies -= len(value)
            elif isinstance(value, (list, tuple, dict)):
                self.copies -= 8 * len(value)
        if self.copies < 0:
            raise PickleError("it copies its own values again and again")

    def _build(self) -> None:
        state, held = self.pop(), self.top()
        if isinstance(held, Inert):
            if type(held) is not Inert and isinstance(state, tuple):
                self.spend(state)  # an array copies its bytes
            held.set_state(state)
        # attributes of plain containers (an OrderedDict's `_metadata`) say nothing about weights

    def _persid(self) -> None:
        self.push(self.persistent(self.line()))

    def _binpersid(self) -> None:
        self.push(self.persistent(self.pop()))


def is_plain_key(key: Any) -> bool:
    """Whether a mapping keeps a key as it is. Longer integers may all have one hash, which slows look-ups."""
    return isinstance(key, (str, float, bytes, type(None))) or (isinstance(key, int) and key.bit_length() < 64)


def odd_key(key: Any) -> OddKey:
    """The stand-in of a key that is a container or an object."""
    return OddKey(key.kind if isinstance(key, Inert) else type(key).__name__, key)


def _named(module: Any, name: Any) -> Global:
    if not isinstance(module, str) or not isinstance(name, str):
        raise PickleError("it names a global by something that is no text")
    if len(module) + len(name) > MAX_NAME:
        raise PickleError(f"it names a global by {len(module) + len(name):,} letters")
    aliases = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # of protocol 2 and older
    return Global(f"{aliases.get(module, module)}.{name}")


def _mapping(args: tuple) -> dict:
    """A mapping from a call's arguments: pairs, another mapping, a default's factory, or nothing."""
    content = args[-1] if args else ()
    if isinstance(content, dict):
        return dict(content)
    pairs = content if isinstance(content, (list, tuple)) else ()
    return {
        pair[0]: pair[1]
        for pair in pairs
        if isinstance(pair, (list, tuple)) and len(pair) == 2 and is_plain_key(pair[0])
    }


def _bytes(args: tuple) -> bytes:
    content = args[0] if args else b""
    if isinstance(content, str):
        return content.encode("latin-1", "replace")
    return content if isinstance(content, bytes) else b""  # never from a size, which could be any


def describe(value: Any) -> str:
    """A value of a pickle in a few words, for messages."""
    if isinstance(value, Inert):
        return shorten(value.kind, 80).strip("'\"")
    if isinstance(value, Global):
        return f"the name {shorten(value.name, 80)}"
    return type(value).__name__
