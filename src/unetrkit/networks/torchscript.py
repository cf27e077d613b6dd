"""The tensors of a TorchScript archive, read without running anything that is in it.

`torch.jit.load` compiles the archive's code, so it is for files that one trusts. The weights need none of
it: they lie beside the code, and `data.pkl` says which is which. That pickle is walked here operation by
operation; what it names is never looked up, and it can make containers, numbers and tensors only.
"""

import pickletools
import re
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
LARGEST_PICKLE = 64 * 2**20  # bytes; the names of a thousand tensors take 100 KB
VISITS = 100_000  # a network has a few thousand modules and values; a pickle can name one a million times
LONGEST_NAME = 1000  # letters; each of many modules could repeat a long one
VALUES = {"BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
CONSTANTS: dict[str, object] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


@dataclass(frozen=True)
class Named:
    """What the pickle calls by name: a class or a function, which stays a name here."""

    name: str


class Module(dict[str, Any]):
    """The attributes of a module of the archive."""


def read_torchscript(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    """Names and tensors of the archive's module. Raises ValueError for what is not such an archive."""
    pickle = next(name for name in archive.namelist() if re.fullmatch(r"([^/]+/)?data\.pkl", name))
    folder = pickle.removesuffix("data.pkl")
    if archive.getinfo(pickle).file_size > LARGEST_PICKLE:
        raise ValueError(f"its `data.pkl` is larger than {LARGEST_PICKLE // 2**20} MB")
    order = f"{folder}byteorder"
    if order in archive.namelist() and archive.read(order) != sys.byteorder.encode():
        raise ValueError("its numbers are in another computer's byte order")
    storages: dict[str, Tensor] = {}

    def storage(place: tuple[str, Named, str, str, int]) -> Tensor:
        _, kind, key, _, _ = place
        if key not in storages:
            dtype = STORAGES[kind.name.removeprefix("torch ").removesuffix("Storage")]
            content = bytearray(archive.read(f"{folder}data/{key}"))
            storages[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return storages[key]

    root = walk(archive.read(pickle), storage)
    found: dict[str, Tensor] = {}
    waiting: list[tuple[str, object]] = [("", root)]
    for _ in range(VISITS):
        if not waiting:
            return found
        name, value = waiting.pop()
        if len(name) > LONGEST_NAME:
            break
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, Module):
            prefix = f"{name}." if name else ""
            waiting += [(f"{prefix}{key}", inner) for key, inner in value.items()]
    raise ValueError("its modules are nested without end")


def walk(content: bytes, storage: Callable[[Any], Tensor]) -> object:
    """What a TorchScript pickle describes. Raises ValueError for what such a pickle does not need."""
    stack: list[Any] = []
    outer: list[list[Any]] = []  # the stacks below each mark
    memo: dict[int, Any] = {}
    for opcode, argument, _ in pickletools.genops(content):
        operation = opcode.name
        if operation in VALUES:
            stack.append(argument)
        elif operation in CONSTANTS:
            stack.append(CONSTANTS[operation])
        elif operation == "GLOBAL":
            stack.append(Named(str(argument)))
        elif operation in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]  # type: ignore[index]
        elif operation in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])  # type: ignore[index]
        elif operation in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if operation == "EMPTY_DICT" else [])
        elif operation == "MARK":
            outer.append(stack)
            stack = []
        elif operation in ("TUPLE", "APPENDS", "SETITEMS"):
            items, stack = stack, outer.pop()
            if operation == "TUPLE":
                stack.append(tuple(items))
            elif operation == "APPENDS":
                stack[-1].extend(items)
            else:
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif operation in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(operation[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif operation == "APPEND":
            item = stack.pop()
            stack[-1].append(item)
        elif operation == "SETITEM":
            key, value = stack[-2:]
            del stack[-2:]
            stack[-1][key] = value
        elif operation == "NEWOBJ":
            stack[-2:] = [Module()]
        elif operation == "BUILD":
            state = stack.pop()
            if isinstance(state, dict):
                stack[-1].update(state)
        elif operation == "BINPERSID":
            stack.append(storage(stack.pop()))
        elif operation == "REDUCE":
            function, arguments = stack[-2:]
            stack[-2:] = [_made(function, arguments)]
        elif operation == "STOP":
            return stack.pop()
        elif operation != "PROTO":
            raise ValueError(f"it has the operation {operation}")
    raise ValueError("it has no end")


def _made(function: Named, arguments: tuple[Any, ...]) -> object:
    """What the few functions that TorchScript's pickles call make."""
    match function.name.split(" "):
        case ["torch._utils", "_rebuild_tensor_v2"]:
            storage, offset, size, stride = arguments[:4]
            return storage.as_strided(size, stride, offset)  # refuses to reach beyond the storage
        case ["collections", "OrderedDict"]:
            return {}
        case ["torch._utils", "_rebuild_parameter"]:
            return arguments[0]
        case ["torch.jit._pickle", name] if re.fullmatch(r"restore_type_tag|build_\w+list", name):
            return arguments[0]
    raise ValueError(f"it calls `{function.name.replace(' ', '.')}`")
