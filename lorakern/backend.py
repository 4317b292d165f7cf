"""The one table (op, backend) -> kernel: define, pick, why, use.

An op is a schema, its spec and its kernels. In eager, an op call goes straight to the picked
kernel; under torch.compile it is one opaque torch op, `lorakern::<name>`, whose fake is the spec.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

OPS: dict[str, "Op"] = {}
_library = torch.library.Library("lorakern", "FRAGMENT")
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Kernel:
    """One way to compute an op.

    where: "native:<name>" in the compiled extension, or "<module>:<function>", imported on
        first use. Either takes the op's arguments in order, with scalars as Python numbers.
    refuses: takes the op's arguments; a reason not to run on them, or None. It may read dtypes,
        devices and shapes, never values.
    cost: takes the op's arguments; a modelled time in µs. Without it the order of definition
        decides: a kernel that is written first is the faster one.
    """

    where: str
    refuses: Callable[..., str | None] | None = None
    cost: Callable[..., float] | None = None


class Op:
    """Callable: the picked kernel on the given tensors."""

    def __init__(self, name: str, schema: str, reference: Callable, kernels: dict[str, Kernel]):
        self.name, self.reference, self.kernels = name, reference, kernels
        self._loaded: dict[str, Callable] = {"reference": _in_float32(reference, _like(schema))}
        self._picked: dict[tuple, Callable] = {}
        _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, self._run_with_numbers, "CompositeExplicitAutograd")
        fake = lambda *args: reference(*on_tensors(Tensor.contiguous, args))  # noqa: E731
        torch.library.register_fake(f"lorakern::{name}", fake, lib=_library)
        self.torch_op = getattr(torch.ops.lorakern, name).default

    def __call__(self, *args):
        if torch.compiler.is_compiling():
            return self.torch_op(*args)
        key = _key(args)
        run = self._picked.get(key)
        if run is None:
            run = self._picked[key] = self.load(pick(self, *args))
        return run(*args)

    def _run_with_numbers(self, *args):
        # a scale travels as a 0-dim tensor under compile, so that changing it recompiles nothing
        args = on_tensors(Tensor.contiguous, args)
        return self(*on_tensors(lambda t: t if t.dim() else t.item(), args))

    def load(self, backend: str) -> Callable:
        """The function behind a backend's name; ImportError says what is missing."""
        if backend not in self._loaded:
            module, _, function = self.kernels[backend].where.partition(":")
            if module == "native":
                if not hasattr(torch.ops.lorakern_native, function):
                    raise ImportError(f"lorakern._native is not built or lacks {function}")
                self._loaded[backend] = getattr(torch.ops.lorakern_native, function).default
            else:
                self._loaded[backend] = getattr(importlib.import_module(module), function)
        return self._loaded[backend]

    def refusal(self, backend: str, *args) -> str | None:
        """Why this backend cannot run on these arguments; None when it can."""
        if backend == "reference":
            return None
        refuses = self.kernels[backend].refuses
        # asked first: what refuses these arguments need not be imported
        if refuses and (reason := refuses(*args)):
            return reason
        try:
            self.load(backend)
        except ImportError as missing:
            return str(missing)
        return None


def define(name: str, schema: str, reference: Callable, **kernels: Kernel) -> Op:
    """Enter an op. `kernels` are named by backend, the preferred one first.

    Args:
        schema: torch schema without the name, "(Tensor x, Tensor scale) -> Tensor"; a number that
            changes between calls is declared a Tensor (0-dim), and kernels get it as a float;
            so are the elements of a Tensor[].
        reference: the spec; also the fallback (run in float32 on 16-bit tensors) and the fake.

    Raises:
        ValueError: the op is there already, or a backend is called "reference".
    """
    if name in OPS or "reference" in kernels:
        raise ValueError(f"op {name} is already defined, or names a kernel 'reference'")
    OPS[name] = Op(name, schema, reference, kernels)
    return OPS[name]


def why(op: str | Op, *args) -> dict[str, str]:
    """Each backend of an op with 'ok' or the reason it refuses these arguments."""
    op = _find(op)
    return {b: op.refusal(b, *args) or "ok" for b in (*op.kernels, "reference")}


def pick(op: str | Op, *args) -> str:
    """The backend that runs: a forced one, else the cheapest that does not refuse.

    Raises:
        ValueError: the backend forced by `use` refuses; the message is its reason.
    """
    op = _find(op)
    if (name := forced(op)) is not None:
        if name != "reference" and name not in op.kernels:
            raise ValueError(f"{op.name} has no backend {name!r}: {', '.join(why(op, *args))}")
        if reason := op.refusal(name, *args):
            raise ValueError(f"{op.name}: {name} cannot run: {reason}")
        return name
    able = [b for b in op.kernels if op.refusal(b, *args) is None]
    costs = [op.kernels[b].cost for b in able]
    if able and all(costs):
        return min(able, key=lambda b: op.kernels[b].cost(*args))
    return able[0] if able else "reference"


def forced(op: str | Op) -> str | None:
    """The backend that `use` forces for an op, or None."""
    return _forced.get(_find(op).name, _forced.get("*"))


def whole(fwd: str | Op, bwd: str | Op, function: str, *args, kind: str = "cpp") -> Callable | None:
    """The native function that is both directions of a kind, where forward's arguments pick it."""
    if pick(fwd, *args) == kind and forced(bwd) in (None, kind):
        # as a function of the module where it is one, which costs less than torch.ops
        found = getattr(importlib.import_module("lorakern._native"), function, None)
        return found or getattr(torch.ops.lorakern_native, function).default
    return None


def memory_of_picks() -> dict:
    """A dictionary for what follows from picks; it is emptied when `use` begins or ends."""
    _memories.append({})
    return _memories[-1]


_forced: dict[str, str] = {}
_memories: list[dict] = []


@contextmanager
def use(backend: str | None = None, **by_op: str) -> Iterator[None]:
    """Force a backend within a block: use("reference") or use(lora_linear_fwd="triton").

    Raises:
        ValueError: no such op.
    """
    for name in by_op:
        _find(name)
    before = dict(_forced)
    _forced.update({"*": backend} if backend else {}, **by_op)
    _forget_picks()
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)
        _forget_picks()


def _forget_picks() -> None:
    for op in OPS.values():
        op._picked.clear()
    for memory in _memories:
        memory.clear()


def _find(op: str | Op) -> Op:
    if isinstance(op, Op):
        return op
    if op not in OPS:
        raise ValueError(f"no op {op!r}; there are {', '.join(sorted(OPS))}")
    return OPS[op]


def _key(args: tuple) -> tuple:
    first = args[0]
    return (
        first.dtype,
        first.device,
        *[a.shape if isinstance(a, Tensor) else _shape_like(a) for a in args],
    )


def _shape_like(a) -> object:
    # strides, paddings and flags count, as shapes do; numbers such as a scale do not
    if isinstance(a, list):
        return tuple(_of_list(b) for b in a)
    return a is None


def _of_list(a) -> object:
    if isinstance(a, Tensor):
        return a.shape
    return None if isinstance(a, float) else a


def on_tensors(function: Callable, args: tuple) -> tuple:
    """The arguments of an op with function(t) for each tensor t, also in lists of tensors."""

    def one(a):
        return function(a) if isinstance(a, Tensor) else a

    return tuple([one(b) for b in a] if isinstance(a, list) else one(a) for a in args)


def _like(schema: str) -> list[int]:
    """Per result the argument whose dtype it has: `x` for `dx`, else the first."""
    parsed = torch._C.parse_schema(f"op{schema}")
    names = [f"d{a.name}" for a in parsed.arguments]
    return [names.index(r.name) if r.name in names else 0 for r in parsed.returns]


def _in_float32(reference: Callable, like: list[int]) -> Callable:
    """The spec as a kernel: 16-bit tensors are widened, and each result is rounded once.

    like: per result the place of the argument whose dtype it has.
    """

    def run(*args):
        dtype, device = args[0].dtype, args[0].device.type
        # a backward that is called inside autocast must not round what is widened here
        with torch.autocast(device, enabled=False):
            if dtype not in _HALF:
                return reference(*args)
            results = reference(*on_tensors(lambda t: t.float() if t.dtype in _HALF else t, args))
        if isinstance(results, Tensor):
            return results.to(dtype)
        # of an argument that is None: an empty result
        to = (dtype if args[i] is None else args[i].dtype for i in like)
        return tuple(r.to(d) for r, d in zip(results, to, strict=True))

    return run
