"""Adapters of a whole model: put in, found, taken out, merged; always in place."""

import inspect
from collections.abc import Iterable
from functools import cache

from torch import nn

from lorakern.adapters import layers
from lorakern.adapters import targets as choice
from lorakern.adapters.base import ALGOS, Adapter
from lorakern.adapters.shared import link
from lorakern.adapters.shared_text import link_text


def inject(
    model: nn.Module,
    algo: str = "lora",
    *,
    rank: int = 16,
    alpha: float | None = None,
    targets: str | Iterable[str] = "attn",
    name: str = "default",
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    **options,
) -> dict[str, Adapter]:
    """Put an adapter around each target layer, in place; freeze all that is not an adapter.

    Args:
        model: any module; adapters that are in it stay, and a second one stacks on them.
        algo: a name in `lorakern.adapters.ALGOS`.
        rank: R of each adapter.
        alpha: the update is multiplied by alpha / rank; None is each layer's rank. No unit.
        targets: "attn" (attention projections of UNets and CLIP), "attn-mlp" (feed-forward and
            proj_in, proj_out too), "full" (every Linear and Conv2d); another str is a regex on
            the whole module path; a list holds whole paths or ends of them after a dot.
        name: tells this set of adapters from others in the model.
        rank_pattern, alpha_pattern: regex -> value for the layers whose path, or an end of it
            after a dot, it matches; the first that does counts.
        options: the algorithm's own, as `rslora`, `dropout`, `dtype`.

    Returns:
        module path -> adapter.

    Raises:
        ValueError: nothing matches, a layer cannot be adapted or has an adapter of this name,
            or a number is out of range. The model is then as it was.
    """
    made = {
        path: _make(
            layer,
            path,
            algo,
            name=name,
            options=options,
            rank=choice.by_pattern(rank_pattern, path, rank),
            alpha=choice.by_pattern(alpha_pattern, path, alpha),
        )
        for path, layer in choice.select(model, targets).items()
    }
    factors = {id(p) for a in _adapters(model) for p in a.parameters(recurse=False)}
    for parameter in model.parameters():
        if id(parameter) not in factors:
            parameter.requires_grad_(False)
    _replace(model, {adapter.base: adapter for adapter in made.values()})
    _link(model, made)
    return made


def attach(
    model: nn.Module,
    path: str,
    algo: str = "lora",
    *,
    rank: int = 16,
    alpha: float | None = None,
    name: str = "default",
    **options,
) -> Adapter:
    """Put one adapter around the layer at `path`, in place, and freeze that layer.

    Args and Raises: as `inject`; also ValueError when there is no layer at `path`, or its parent
    reads the weight without calling the layer.
    """
    parent_path, _, child = path.rpartition(".")
    try:
        parent = model.get_submodule(parent_path)
        layer = parent.get_submodule(child) if child else None
    except AttributeError:
        layer = None
    if layer is None:
        raise ValueError(f"{type(model).__name__} has no layer {path!r}")
    if layers.bypassed(parent, child):
        raise ValueError(
            f"{path} cannot be adapted: {type(parent).__name__} reads its weight, not its output"
        )
    adapter = _make(layer, path, algo, name=name, options=options, rank=rank, alpha=alpha)
    for parameter in adapter.root.parameters():
        parameter.requires_grad_(False)
    _replace(model, {layer: adapter})
    link(parent)
    return adapter


def find(model: nn.Module, name: str | None = None) -> dict[str, list[Adapter]]:
    """module path -> its adapters, the first injected first; with a name only those of it."""
    found = {}
    for path, layer in choice.layers_of(model):
        if isinstance(layer, Adapter):
            stack = [a for a in reversed(layer.chain()) if name in (None, a.name)]
            if stack:
                found[path] = stack
    return found


def eject(model: nn.Module, name: str | None = None) -> None:
    """Take adapters out, all or those of one name; the layers come back bit for bit.

    A merged layer is unmerged first. The layers stay frozen.

    Raises:
        ValueError: the model has no adapter, or none of that name.
    """
    swap: dict[nn.Module, nn.Module] = {}
    paths = find(model, name)
    for outer in _outermost(model, name):
        outer._shared = outer._text = None
        outer.unmerge()
        keep = [a for a in reversed(outer.chain()) if name is not None and a.name != name]
        layer = outer.root
        for adapter in keep:
            adapter.rebase(layer)
            layer = adapter
        swap[outer] = layer
    _replace(model, swap)
    _link(model, paths)


def merge(model: nn.Module) -> None:
    """W ← W + Σ ΔW on every adapted layer, in float32 sums; each keeps a copy of its W.

    A 16-bit weight is rounded, so a small update is lost here as it is not when adapters run
    beside the layer. Layers that are merged stay as they are.

    Raises:
        ValueError: the model has no adapter.
    """
    for outer in _outermost(model):
        outer.merge()


def unmerge(model: nn.Module) -> None:
    """The weights from before `merge`, bit for bit; layers that are not merged stay as they are.

    Raises:
        ValueError: the model has no adapter.
    """
    for outer in _outermost(model):
        outer.unmerge()


def set_multiplier(model: nn.Module, value: float, name: str | None = None) -> None:
    """Set the strength of all adapters or of those of one name; 0 switches off. No unit.

    Raises:
        ValueError: the model has no such adapter, it is merged, or value is not finite.
    """
    _outermost(model, name)
    for stack in find(model, name).values():
        for adapter in stack:
            adapter.multiplier = value


@cache
def options_of(algo: str) -> tuple[str, ...]:
    """The names of the options that an algorithm takes beside rank and alpha, its own first.

    Raises:
        ValueError: there is no such algorithm.
    """
    if algo not in ALGOS:
        raise ValueError(f"no adapter {algo!r}; there are {', '.join(sorted(ALGOS))}")
    classes = [c for c in ALGOS[algo].__mro__ if issubclass(c, Adapter)]
    parameters = [p for c in classes for p in inspect.signature(c.__init__).parameters.values()]
    found = dict.fromkeys(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
    return tuple(name for name in found if name not in ("name", "rank", "alpha"))


def _make(layer, path, algo, *, name, rank, alpha, options) -> Adapter:
    known = options_of(algo)
    if unknown := [name for name in options if name not in known]:
        raise ValueError(f"{algo} has no option {', '.join(unknown)}; it has {', '.join(known)}")
    if isinstance(layer, Adapter):
        if any(a.name == name for a in layer.chain()):
            raise ValueError(f"{path} has an adapter {name!r}; give this one another name")
        if layer.merged:
            raise ValueError(f"{path} is merged; unmerge the model before adding adapters")
    try:
        return ALGOS[algo](layer, name=name, rank=rank, alpha=alpha, **options)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _link(model: nn.Module, paths: Iterable[str]) -> None:
    """Groups that share an input, anew: of siblings where layers of these paths changed."""
    # not get_submodule, which takes a layer called `to` for the method
    modules = dict(model.named_modules(remove_duplicate=False))
    for parent in {path.rpartition(".")[0] for path in paths}:
        link(modules[parent])
    link_text(model)


def _adapters(model: nn.Module) -> list[Adapter]:
    return [a for a in model.modules() if isinstance(a, Adapter)]


def _outermost(model: nn.Module, name: str | None = None) -> list[Adapter]:
    paths = find(model, name)
    if not paths:
        called = "" if name is None else f" called {name!r}"
        raise ValueError(f"{type(model).__name__} has no adapter{called}")
    return [model.get_submodule(path) for path in paths]


def _replace(model: nn.Module, swap: dict[nn.Module, nn.Module]) -> None:
    """Put new modules where the old ones are, at each place of a shared one."""
    # a walk of its own: nn.Module.modules takes ten times as long, for each layer of a file
    by_id = {id(old): new for old, new in swap.items()}
    to_visit, seen = [model._modules], {id(model)}
    while to_visit:
        children = to_visit.pop()
        for key, child in children.items():
            if (new := by_id.get(id(child))) is not None:
                children[key] = new
            elif child is not None and child._modules and id(child) not in seen:
                seen.add(id(child))
                if not isinstance(child, Adapter):
                    to_visit.append(child._modules)
