"""diffusers: `unet.<path>.lora_A.weight`, `text_encoder.<path>.lora_linear_layer.down.weight`.

Alpha is in the header, `lora_adapter_metadata`: a LoraConfig as JSON with its fields prefixed by
component. Without it alpha = rank, the convention of `load_lora_weights`. Also read: attention
processors' old names, and a file without prefixes (`save_lora_adapter`).

LoRA alone is written, for `load_lora_weights` takes nothing else; DoRA under PEFT's names in full,
`lora_magnitude_vector.weight`, of which it drops no part as it does of `dora_scale`.
"""

import json
from pathlib import Path

from lorakern.formats import config as peft_config
from lorakern.formats import kohya, storage
from lorakern.formats.base import Context, Layer, Stored, collect, define, shorten
from lorakern.formats.names import COMPONENTS, canonical
from lorakern.formats.peft import ROOT, as_peft_magnitude, split_peft

HEADER = "lora_adapter_metadata"
# as written; stock reads a text encoder's layers by these endings whatever their mix
UNET_ENDINGS = ("lora_A", "lora_B")
TEXT_ENDINGS = ("lora_linear_layer.down", "lora_linear_layer.up")
ENDINGS = {
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
}
OLD_ENDINGS = {"_lora.down.weight": "down", "_lora.up.weight": "up"}
OLD_NAMES = {
    "unet": {"to_out": "to_out.0"},
    "text_encoder": {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"},
}


def matches(stored: Stored) -> bool:
    return stored.config is None and any(
        _split(key) and not key.startswith((ROOT, *kohya.PREFIXES)) for key in stored.tensors
    )


def _split(key: str) -> tuple[str | None, str, str] | None:
    component = next((name for name in COMPONENTS if key.startswith(name + ".")), None)
    rest = key[len(component) + 1 :] if component else key
    parts = split_peft(rest)
    for ending, factor in ENDINGS.items():
        if rest.endswith(ending):
            parts = rest.removesuffix(ending), factor
    for ending, factor in OLD_ENDINGS.items():
        if rest.endswith(ending):
            parent, _, last = rest.removesuffix(ending).rpartition(".")
            old = OLD_NAMES["unet" if component in (None, "unet") else "text_encoder"]
            parts = f"{parent}.{old.get(last, last)}", factor
    if parts is None:
        return None
    path, factor = parts
    return component, canonical(component, path.replace(".processor.", ".")), factor


def read(stored: Stored) -> list[Layer]:
    configs = _configs(stored)

    def scale(component, path, rank):
        if not configs:
            return float(rank or 1), False, rank or 1
        if component not in configs:
            raise ValueError(
                f"{stored.path}: {HEADER} has settings for {shorten(map(str, configs))},"
                f" and none for {component or 'keys without a prefix'}"
            )
        return peft_config.scale_of(configs[component], path, rank, str(stored.path))

    layers = collect(stored, _split, scale, peft=True)
    for component, config in configs.items():
        own = [layer for layer in layers if layer.component == component]
        peft_config.check_layers(config, own, str(stored.path))
    return layers


def _configs(stored: Stored) -> dict[str | None, dict]:
    """Component, or None for fields without a prefix -> its LoraConfig."""
    if HEADER not in stored.metadata:
        return {}
    try:
        fields = json.loads(stored.metadata[HEADER])
    except ValueError as error:
        raise ValueError(f"{stored.path}: {HEADER} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{stored.path}: {HEADER} is no JSON object")
    configs: dict[str | None, dict] = {}
    for name, value in fields.items():
        component, dot, field = name.partition(".")
        key = component if dot and component in COMPONENTS else None
        configs.setdefault(key, {})[field if key else name] = value
    for component, config in configs.items():
        peft_config.check(config, f"{stored.path} ({component or 'header'})")
    return configs


def write(layers: list[Layer], path: Path, context: Context) -> dict[Path, bytes]:
    if path.suffix != ".safetensors":
        path = path / storage.DIFFUSERS_WEIGHTS
    _refuse_rest(layers)
    tensors, header = {}, {}
    for component in COMPONENTS:
        group = [layer for layer in layers if layer.component == component]
        text = component != "unet"
        down, up = TEXT_ENDINGS if text else UNET_ENDINGS
        endings = {"down": down, "up": up, "magnitude": "lora_magnitude_vector"}
        if group:
            group = peft_config.adapted(group)
        for layer in group:
            for factor, tensor in layer.tensors.items():
                if factor == "magnitude":
                    tensor = as_peft_magnitude(tensor)
                tensors[f"{component}.{layer.path}.{endings[factor]}.weight"] = tensor
        if group:
            own = [la.path.removeprefix("text_model.") if text else la.path for la in group]
            made = peft_config.make(group, own, context.paths.get(component, ()), either=text)
            header |= {f"{component}.{field}": value for field, value in made.items()}
    metadata = {"format": "pt"} | dict(context.metadata)
    metadata[HEADER] = json.dumps(header, indent=2, sort_keys=True)
    return {path: storage.to_bytes(tensors, metadata)}


def _refuse_rest(layers: list[Layer]) -> None:
    for layer in layers:
        if layer.component not in COMPONENTS:
            of = layer.component or "none"
            raise ValueError(
                f"diffusers files hold {', '.join(COMPONENTS)}, and {layer.path} is of {of}:"
                " pass a dict such as {'unet': module}, or save as peft"
            )
        if layer.embedding:
            raise ValueError(
                f"{layer.path} is an embedding layer, which diffusers does not load; save as peft"
            )
        if layer.algo != "lora":
            raise ValueError(
                f"{layer.path} is {layer.algo}, which diffusers' load_lora_weights does not load;"
                " save as kohya or peft"
            )
        if layer.groups > 1:
            raise ValueError(
                f"{layer.path} has {layer.groups} groups, which diffusers does not load; save as"
                " kohya or peft"
            )


define("diffusers", matches=matches, read=read, write=write)
