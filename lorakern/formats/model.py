"""Between a model's adapters and files: save and load, which change all or nothing."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from lorakern import adapters
from lorakern.adapters import Adapter
from lorakern.adapters.shared_text import link_text
from lorakern.adapters.targets import layers_of
from lorakern.formats import algorithms, names, storage
from lorakern.formats.base import (
    FORMATS,
    Context,
    Layer,
    UnmatchedKeys,
    check_values,
    shorten,
)
from lorakern.formats.files import read_layers

# what LyCORIS adds to DoRA's norm
_LYCORIS_EPS = torch.finfo(torch.float32).eps
# (component, the module's own path)
Place = tuple[str, str]


def save(
    model,
    path: str | Path,
    format: str = "kohya",
    *,
    name: str | None = None,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a model's adapters to a file that stock tools read; the multiplier is not baked in.

    Args:
        model: an nn.Module (a UNet, a CLIP text encoder; for peft any module), a diffusers
            pipeline, or a dict of modules by component: "unet", "text_encoder", "text_encoder_2".
        path: kohya: a .safetensors file; diffusers: the same, or a folder, which gets
            pytorch_lora_weights.safetensors; peft: a folder, or for several components one
            folder in it for each. What is there is replaced in one step, or stays.
        format: "kohya", "diffusers" or "peft".
        name: which adapter, when the model has several.
        metadata: more entries for the safetensors header, text to text.
        dtype: of the factors in the file; theirs when None. Alpha is float32 always.

    Returns:
        path as a Path.

    Raises:
        ValueError: an unknown format or name, no adapter, factors that are not finite (also after
            the cast to dtype), or a layer that the format cannot hold. Nothing is written then.
    """
    storage.write(_files(model, path, format, name, metadata or {}, dtype))
    return Path(path)


def check(model, path: str | Path, format: str) -> None:
    """Raises what `save` with these would, and writes nothing: for before a long training."""
    _files(model, path, format, None, {}, None)


def _files(model, path, format: str, name, metadata, dtype) -> dict[Path, bytes]:
    if format not in FORMATS:
        raise ValueError(f"no format {format!r}; there are {', '.join(sorted(FORMATS))}")
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ValueError(f"metadata is text to text, got {key!r}: {value!r}")
    modules = names.components(model)
    layers = [
        _layer_of(component, path_in, adapter, dtype)
        for component, path_in, adapter in _adapters_called(modules, name)
    ]
    return FORMATS[format].write(layers, Path(path), context_of(modules, metadata))


def load(
    model,
    path: str | Path,
    multiplier: float = 1.0,
    name: str = "default",
    *,
    components: Iterable[str] | None = None,
) -> dict[str, Adapter]:
    """Put a file's adapters into a model; the format is found out.

    Each layer gets an adapter called `name`. When the model has adapters of that name already,
    the file must hold the same layers at the same ranks, and their factors are overwritten.

    Args:
        model: as `save` takes it.
        path: a .safetensors file or a folder: kohya, diffusers or PEFT.
        multiplier: strength of the update; 1 is as trained. No unit.
        components: load only these of the file, such as ["unet"]; all when None.

    Returns:
        module path -> adapter; in a pipeline or dict the path begins with its component.

    Raises:
        FileNotFoundError: no such path.
        UnmatchedKeys: keys that fit no layer of the model, listed in the message and in `keys`.
        ValueError: a broken file, an algorithm that is not read, shapes that do not fit.
            The model is then as it was.
    """
    if not math.isfinite(multiplier):
        raise ValueError(f"multiplier must be a finite number, got {multiplier!r}")
    modules = names.components(model)
    layers = read_layers(storage.read(path))
    if components is not None:
        layers = _only(layers, components, path)
    placed = place(layers, modules, path)
    found = {
        (component, at): stack[0]
        for component, module in modules.items()
        for at, stack in adapters.find(module, name).items()
    }
    if found:
        _check_same(found, placed, name, path)
        made = found
    else:
        made = _attach(modules, placed, name)
    with torch.no_grad():
        for where, layer in placed.items():
            adapter = made[where]
            for factor, tensor in layer.tensors.items():
                own = getattr(adapter, factor)
                own.copy_(tensor.reshape(own.shape))
            if "scalar" in adapter.factors:
                # a file has it in a factor
                adapter.scalar.fill_(1)
            if layer.algo == "lokr":
                adapter.style = _style(layer)
            adapter.rank, adapter.rslora = layer.rank, layer.rslora
            adapter.alpha, adapter.multiplier = layer.alpha, multiplier
    bare = isinstance(model, nn.Module)
    return {at if bare else f"{component}.{at}": made[component, at] for component, at in placed}


def context_of(modules: Mapping[str, nn.Module], metadata: Mapping[str, str]) -> Context:
    """What a writer is told about a model."""
    unet = modules.get("unet")
    sdxl = "text_encoder_2" in modules or hasattr(unet, "add_embedding")
    ldm = names.ldm_paths(*names.blocks_of(unet)) if sdxl and unet is not None else {}
    paths = {c: frozenset(at for at, _ in m.named_modules()) for c, m in modules.items()}
    return Context(metadata, sdxl, ldm, paths)


def _adapters_called(
    modules: Mapping[str, nn.Module], name: str | None
) -> list[tuple[str, str, Adapter]]:
    found = [
        (component, at, adapter)
        for component, module in modules.items()
        for at, stack in adapters.find(module, name).items()
        for adapter in stack
    ]
    called = sorted({adapter.name for *_, adapter in found})
    if not found:
        raise ValueError(f"the model has no adapter{f' called {name!r}' if name else ''} to save")
    if len(called) > 1:
        raise ValueError(f"the model has adapters {', '.join(called)}; say which as name=")
    return found


def _layer_of(component: str, at: str, adapter: Adapter, dtype) -> Layer:
    algo, weight = _algo(adapter), adapter.root.weight
    if algo is None:
        raise ValueError(f"{at} is {adapter.algo}; files hold {', '.join(algorithms.WHOLE)}")
    tensors, rank, alpha = adapter.exported()
    if "magnitude" in tensors:
        axis = 0 if adapter.dora.on_output else 1
        shape = [-1 if dim == axis else 1 for dim in range(weight.ndim)]
        tensors["magnitude"] = tensors["magnitude"].view(shape)
    for factor, tensor in tensors.items():
        tensors[factor] = tensor.to(dtype) if dtype is not None else tensor
        check_values(f"{at}.{factor}", tensors[factor])
    # LyCORIS has no scale here, whatever alpha says
    whole = {"c", "d"} <= tensors.keys() and adapter.style == "lycoris"
    return Layer(
        component, names.canonical(component, at), tensors,
        rank=rank, alpha=float(rank if whole else alpha), rslora=adapter.rslora and not whole,
        embedding=adapter.kind == "embedding", algo=algo, weight=weight.shape,
        groups=getattr(adapter.root, "groups", 1),
    )  # fmt: skip


def _algo(adapter: Adapter) -> str | None:
    """What files call it, None where they have no name: "dora" is "lora" with a magnitude."""
    return algorithms.algo_of(set(adapter.factors) - {"magnitude", "scalar"})


def _only(layers: list[Layer], components: Iterable[str], path: str | Path) -> list[Layer]:
    wanted = {components} if isinstance(components, str) else set(components)
    missing = wanted - {layer.component for layer in layers}
    if missing:
        raise ValueError(f"{path} holds nothing for {', '.join(sorted(missing))}")
    return [layer for layer in layers if layer.component in wanted]


def place(
    layers: list[Layer], modules: Mapping[str, nn.Module], path: str | Path
) -> dict[Place, Layer]:
    """Each layer at the module it belongs to, its factors in that module's shapes."""
    trees = {component: dict(layers_of(module)) for component, module in modules.items()}
    spelled = {c: names.spellings(c, modules[c], trees[c]) for c in modules}
    placed: dict[Place, Layer] = {}
    unmatched: list[Layer] = []
    misfits: list[str] = []
    for layer, component in zip(layers, _components_of(layers, spelled), strict=True):
        hits = spelled.get(component, {}).get(names.canonical(component, layer.path), set())
        if not hits:
            unmatched.append(layer)
            continue
        if len(hits) > 1:
            raise ValueError(f"{path}: {_a_key(layer)} may be any of {', '.join(sorted(hits))}")
        (at,) = hits
        if (component, at) in placed:
            twice = (_a_key(placed[component, at]), _a_key(layer))
            raise ValueError(f"{path} defines {at} twice: {' and '.join(twice)}")
        placed[component, at] = layer
        try:
            placed[component, at] = _fit(layer, at, trees[component][at])
        except ValueError as error:
            misfits.append(str(error))
    if unmatched:
        raise _unmatched(unmatched, len(layers), modules, path)
    if misfits:
        raise ValueError(
            f"{path}: {len(misfits)} of {len(layers)} layers do not fit: {shorten(misfits)}"
        )
    return placed


def _components_of(layers: list[Layer], spelled: Mapping[str, dict]) -> list[str]:
    """Each layer's component; one that the file leaves open is where most such layers fit."""
    fits = {
        component: sum(
            names.canonical(component, la.path) in known for la in layers if la.component is None
        )
        for component, known in spelled.items()
    }
    best = max(fits, key=fits.get)
    return [best if layer.component is None else layer.component for layer in layers]


def _unmatched(layers: list[Layer], total: int, modules, path) -> UnmatchedKeys:
    absent = Counter(la.component for la in layers if la.component not in (None, *modules))
    hint = "".join(f"; {n} are for {c}, which was not given" for c, n in absent.items())
    given = ", ".join(component or "the module" for component in modules)
    return UnmatchedKeys(
        f"{path}: {len(layers)} of {total} layers fit none of {given}{hint}, nothing was loaded",
        [key for layer in layers for key in layer.keys.values()],
    )


def _fit(layer: Layer, at: str, module: nn.Module) -> Layer:
    """The layer with factors in the module's shapes, or ValueError."""
    root = module.root if isinstance(module, Adapter) else module
    if layer.embedding != isinstance(root, nn.Embedding):
        raise ValueError(f"{at} is a {type(root).__name__}, {_a_key(layer)} is not for one")
    if layer.embedding and layer.dora:
        raise ValueError(f"{at} is an Embedding, and DoRA on one is not read")
    weight, groups = root.weight.shape, getattr(root, "groups", 1)
    if layer.groups not in (1, groups):
        raise ValueError(f"{at} has {groups} groups, {_a_key(layer)} is for {layer.groups}")
    called = {factor: f"{at}.{factor}" for factor in layer.tensors} | dict(layer.keys)
    tensors = algorithms.fit(layer.tensors, layer.rank, weight, layer.embedding, called)
    return dataclasses.replace(layer, tensors=tensors, weight=weight, groups=groups)


def _a_key(layer: Layer) -> str:
    return next(iter(layer.keys.values()))


def _check_same(
    found: Mapping[Place, Adapter], placed: Mapping[Place, Layer], name: str, path
) -> None:
    if found.keys() != placed.keys():
        only_model = [at for _, at in found.keys() - placed.keys()]
        only_file = [at for _, at in placed.keys() - found.keys()]
        raise ValueError(
            f"the model has adapters {name!r} that do not cover the same layers as {path}:"
            f" only in the model: {shorten(sorted(only_model), 5) or 'none'};"
            f" only in the file: {shorten(sorted(only_file), 5) or 'none'}"
        )
    for (_, at), adapter in found.items():
        layer = placed[_, at]
        if _algo(adapter) != layer.algo or _shapes(adapter) != _flat_shapes(layer):
            raise ValueError(
                f"{at} has {adapter.algo} {name!r} of rank {adapter.rank},"
                f" {path} {layer.kind} of rank {layer.rank}; give another name"
            )
        if adapter.merged:
            raise ValueError(f"{at} is merged; unmerge the model before loading into it")


def _shapes(adapter: Adapter) -> dict[str, object]:
    shapes = {f: getattr(adapter, f).shape for f in adapter.factors if f != "scalar"}
    return shapes | {"on output": adapter.dora.on_output} if "magnitude" in shapes else shapes


def _flat_shapes(layer: Layer) -> dict[str, object]:
    """As `_shapes` has them of an adapter made for this layer."""
    shapes: dict[str, object] = {f: t.shape for f, t in layer.tensors.items()}
    if layer.dora:
        numbers = torch.Size([layer.tensors["magnitude"].numel()])
        shapes |= {"magnitude": numbers, "on output": layer.on_output}
    return shapes


def _options(layer: Layer) -> dict[str, object]:
    """What an adapter of these factors is made with, beside rank and alpha."""
    options: dict[str, object] = {}
    if layer.algo == "lokr":
        options["shapes"] = {f: t.shape for f, t in layer.tensors.items() if f != "magnitude"}
        options["style"] = _style(layer)
    elif algorithms.is_tucker(layer.tensors):
        options["tucker"] = True
    if layer.dora:
        options |= {
            "dora": True, "wd_on_output": layer.on_output,
            "detach_norm": layer.peft, "norm_eps": 0.0 if layer.peft else _LYCORIS_EPS,
        }  # fmt: skip
    return options


def _style(layer: Layer) -> str:
    return "peft" if layer.peft else "lycoris"


def _attach(
    modules: Mapping[str, nn.Module], placed: Mapping[Place, Layer], name: str
) -> dict[Place, Adapter]:
    made: dict[Place, Adapter] = {}
    before = [(p, p.requires_grad) for module in modules.values() for p in module.parameters()]
    try:
        for (component, at), layer in placed.items():
            made[component, at] = adapters.attach(
                modules[component], at, layer.algo,
                rank=layer.rank, alpha=layer.alpha, name=name, rslora=layer.rslora,
                **_options(layer),
            )  # fmt: skip
    except BaseException:
        for component in {component for component, _ in made}:
            adapters.eject(modules[component], name)
        for parameter, trained in before:
            parameter.requires_grad_(trained)
        raise
    for component in {component for component, _ in made}:
        link_text(modules[component])
    return made
