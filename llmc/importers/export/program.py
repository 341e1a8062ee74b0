"""The program in an archive: its nodes, inputs and outputs, checked as far as the lowering relies on them.

The serialized form is torch/_export/serde/schema.py, major version 8: an argument is an object with one key that says
its kind (`as_tensor`, `as_ints`, ...).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmc.importers.export.archive import ExportFailure

SCHEMA = 8
MAX_NODES = 1 << 18

_PLACE = re.compile(r"[A-Za-z_]\w*(\.\w+)*", re.ASCII)
_SYMBOL = re.compile(r"Symbol\('(\w+)'", re.ASCII)
_UNBOUNDED = 1 << 40
"""Ranges that end here or beyond have no end (torch writes several kinds of infinity)."""


@dataclass(frozen=True)
class Reference:
    """A tensor, symbolic size or flag by the name that an input or node gave it."""

    name: str


@dataclass(frozen=True)
class Call:
    """One node: an operator applied to named arguments. Values are Python's, or `Reference`, or lists of both."""

    name: str
    target: str
    arguments: Mapping[str, Any]
    positional: tuple[Any, ...]
    outputs: tuple[str, ...]
    place: str


@dataclass(frozen=True)
class Given:
    """An input of the program: `kind` is parameter, buffer, tensor_constant, user_input or constant_input. `label` is
    the qualified name of a stored tensor. `sizes` are integers, or a symbol's name."""

    kind: str
    name: str
    label: str
    sizes: tuple[int | str, ...] | None
    dtype: int


@dataclass(frozen=True)
class Program:
    """What is exported: `inputs` to `outputs` by `calls`. `ranges` gives each symbol's largest value, None if it has
    none; `root` is the class of the module."""

    inputs: tuple[Given, ...]
    calls: tuple[Call, ...]
    outputs: tuple[str, ...]
    ranges: Mapping[str, int | None]
    root: str


def read_program(data: Mapping[str, Any], source: str) -> Program:
    """The program of an archive's JSON. Raises `ExportFailure` for another version, or what does not fit the schema."""
    version = data.get("schema_version")
    major = version.get("major") if isinstance(version, dict) else None
    if major != SCHEMA:
        raise ExportFailure(f"{source}: schema version {major!r:.40} of torch.export is not supported; known: {SCHEMA}")
    try:
        return _program(data, source)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise ExportFailure(
            f"{source}: the program does not fit its schema ({type(error).__name__}: {error})"
        ) from None


def _program(data: Mapping[str, Any], source: str) -> Program:
    module = data["graph_module"]
    graph, signature = module["graph"], module["signature"]
    if len(graph["nodes"]) > MAX_NODES:
        raise ExportFailure(f"{source}: {len(graph['nodes'])} nodes are absurd; at most {MAX_NODES} are read")
    inputs = tuple(_given(spec, graph["tensor_values"], source) for spec in signature["input_specs"])
    outputs = []
    for spec in signature["output_specs"]:
        ((kind, value),) = spec.items()
        if kind != "user_output":
            raise ExportFailure(
                f"{source}: the program has an output of kind {kind!r:.40}; a model must change no state"
            )
        argument = _argument(value["arg"])
        if isinstance(argument, Reference):
            outputs.append(argument.name)
    ranges = {str(name): _largest(entry) for name, entry in data["range_constraints"].items()}
    calls = tuple(_call(node) for node in graph["nodes"])
    return Program(inputs, calls, tuple(outputs), ranges, _root(graph["nodes"]))


def _given(spec: Mapping[str, Any], tensors: Mapping[str, Any], source: str) -> Given:
    ((kind, value),) = spec.items()
    labels = {"parameter": "parameter_name", "buffer": "buffer_name", "tensor_constant": "tensor_constant_name"}
    if kind not in (*labels, "user_input", "constant_input"):
        raise ExportFailure(f"{source}: an input of kind {kind!r:.40} is not supported")
    if kind == "constant_input":
        return Given(kind, _text(value["name"]), "", None, 0)
    argument = value["arg"] if kind == "user_input" else {"as_tensor": value["arg"]}
    if "as_tensor" not in argument:
        return Given("constant_input", str(argument)[:80], "", None, 0)
    name = _text(argument["as_tensor"]["name"])
    meta = tensors[name]
    sizes = tuple(_size(size) for size in meta["sizes"])
    return Given(kind, name, _text(value[labels[kind]]) if kind in labels else "", sizes, int(meta["dtype"]))


def _size(size: Mapping[str, Any]) -> int | str:
    if "as_int" in size:
        return int(size["as_int"])
    found = _SYMBOL.match(size["as_expr"]["expr_str"])
    return found[1] if found else str(size["as_expr"]["expr_str"])


def _largest(entry: Mapping[str, Any]) -> int | None:
    largest = entry.get("max_val")
    return largest if type(largest) is int and 0 < largest < _UNBOUNDED else None


def _call(node: Mapping[str, Any]) -> Call:
    values = [(str(i["name"]), _argument(i["arg"])) for i in node["inputs"]]
    outputs: list[str] = []
    for output in node["outputs"]:
        argument = _argument(output)
        outputs += [a.name for a in (argument if isinstance(argument, list) else [argument]) if a is not None]
    name = str(node.get("name") or (outputs[0] if outputs else ""))
    positional = tuple(v for _, v in values)
    return Call(name, str(node["target"]), dict(values), positional, tuple(outputs), _place(node["metadata"]))


def _argument(argument: Mapping[str, Any]) -> Any:
    """An argument as a Python value. Sizes and flags that are known stand for themselves."""
    ((kind, value),) = argument.items()
    match kind:
        case "as_none":
            return None
        case "as_tensor":
            return Reference(_text(value["name"]))
        case "as_tensors":
            return [Reference(_text(v["name"])) for v in value]
        case "as_optional_tensors":
            return [_argument(v) for v in value]
        case "as_optional_tensor" | "as_sym_int" | "as_sym_bool" | "as_sym_float":
            ((inner, content),) = value.items()
            if inner == "as_name":
                return Reference(_text(content))
            return (
                Reference(_text(content["name"])) if inner == "as_tensor" else None if inner == "as_none" else content
            )
        case "as_sym_ints" | "as_sym_bools" | "as_sym_floats":
            return [_argument({"as_sym_int": v}) for v in value]
        case "as_float":
            return float(value)  # infinities are texts
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a name must be text, given {str(value)[:80]}")
    return value


def _place(metadata: Mapping[str, str]) -> str:
    """The module that a node comes from: the last entry `key,path,class` of its stack."""
    path = [*metadata.get("nn_module_stack", "").split(";")[-1].split(","), ""][1]
    return path if _PLACE.fullmatch(path) else ""


def _root(nodes: list[Mapping[str, Any]]) -> str:
    """The class of the exported module, as the first node says whose stack begins there, at no path."""
    for node in nodes:
        parts = node["metadata"].get("nn_module_stack", "").split(";")[0].split(",")
        if len(parts) == 3 and not parts[1] and parts[2].rpartition(".")[2].isidentifier():
            return str(parts[2].rpartition(".")[2])
    return "exported"
