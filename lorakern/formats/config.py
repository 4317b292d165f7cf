"""PEFT's configs as JSON: where alpha, rslora and per-layer ranks live in PEFT and diffusers."""

import collections
import dataclasses
import math
import re
from collections.abc import Collection

from lorakern.formats import algorithms
from lorakern.formats.base import Layer
from lorakern.formats.peft_lokr import decomposition

# PEFT type -> the algorithm here, and what the type calls alpha
KINDS = {"LORA": ("lora", "lora_alpha"), "LOHA": ("loha", "alpha"), "LOKR": ("lokr", "alpha")}
# settings that change what the factors mean; a file with one of them is not known LoRA
_UNKNOWN = {
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "layer_replication": "layer replication",
}
# these initialisations take the first factors off the base weight, which the file does not hold
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _kind(config: dict) -> str:
    return config.get("peft_type") or "LORA"


def check(config: dict, where: str) -> None:
    """Raises ValueError unless the config is sane and of an algorithm that is read."""
    kind = _kind(config)
    if kind not in KINDS:
        raise ValueError(f"{where} is of PEFT type {kind}; this version loads {', '.join(KINDS)}")
    for field, meaning in _UNKNOWN.items():
        if config.get(field):
            raise ValueError(f"{where} has {field}: {meaning}, which this version does not load")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise ValueError(
            f"{where} has init_lora_weights {start!r}, which also changed the base weights; convert"
            " it to plain LoRA with PEFT (path_initial_model_for_weight_conversion) and save again"
        )
    for field in ("r", KINDS[kind][1]):
        if not _is_number(config.get(field)):
            raise ValueError(f"{where}: {field} is not a number: {config.get(field)!r}")
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(field) or {}
        if not isinstance(patterns, dict):
            raise ValueError(f"{where}: {field} is not an object: {patterns!r}")
        for key, value in patterns.items():
            _check_pattern(key, f"{where}: {field}")
            if not _is_number(value):
                raise ValueError(f"{where}: {field} of {key!r} is not a number: {value!r}")


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_pattern(key: str, where: str) -> None:
    # a few plain repeats end in time on any path; repeated groups need not
    if re.search(r"\)[*+{]", key) or len(re.findall(r"[*+{]", key)) > 3:
        raise ValueError(f"{where}: {key!r} repeats groups, or more than 3 times; it could run on")
    try:
        re.compile(key)
    except re.error as error:
        raise ValueError(f"{where}: {key!r} is no regex: {error}") from error


def scale_of(config: dict, path: str, rank: int | None, where: str) -> tuple[float, bool, int]:
    """(alpha, rslora, rank) of one layer; ValueError when the config's rank is not the tensors'."""
    want = _look_up(config.get("rank_pattern") or {}, path, config["r"])
    if rank is None and isinstance(want, int) and want > 0:
        rank = want
    if want != rank:
        raise ValueError(f"{where}: rank {want} for {path} in the config, {rank} in its tensors")
    alpha = _look_up(config.get("alpha_pattern") or {}, path, config[KINDS[_kind(config)][1]])
    return float(alpha), bool(config.get("use_rslora")), rank


def check_layers(config: dict, layers: list[Layer], where: str) -> None:
    """Raises ValueError when a layer's tensors are not of the config's kind."""
    algo, dora = KINDS[_kind(config)][0], bool(config.get("use_dora"))
    for layer in layers:
        if layer.algo != algo:
            raise ValueError(f"{where} is of {_kind(config)}, and {layer.path} holds {layer.algo}")
        if layer.dora != dora:
            has = "has" if layer.dora else "has no"
            raise ValueError(f"{where}: use_dora is {dora}, and {layer.path} {has} magnitude")


def _look_up(patterns: dict, path: str, default: float) -> float:
    # PEFT's rule: the first key that is the path or an end of it, as a regex
    for spelled in (path, path.removeprefix("text_model.")):
        for key, value in patterns.items():
            if re.match(rf"(.*\.)?({key})$", spelled):
                return value
    return default


def adapted(layers: list[Layer]) -> list[Layer]:
    """The layers in the forms that one config of PEFT can describe.

    Raises:
        ValueError: there is none: two algorithms, or DoRA that PEFT has not.
    """
    kinds = {(layer.algo, layer.dora): layer for layer in layers}
    if len(kinds) > 1:
        both = " and ".join(f"{layer.kind} at {layer.path}" for layer in kinds.values())
        raise ValueError(
            f"PEFT has one algorithm in an adapter, and this has {both}; save as kohya"
        )
    for layer in layers:
        if layer.dora and (layer.algo != "lora" or not layer.on_output or layer.groups > 1):
            raise ValueError(
                f"{layer.path} is {layer.kind}{' in groups' if layer.groups > 1 else ''}; PEFT has"
                " DoRA on the output of lora without groups only: save as kohya"
            )
    if layers[0].algo == "lora" or not all(map(_has_core, layers)):
        return [
            dataclasses.replace(layer, tensors=algorithms.untuck(layer.tensors)) for layer in layers
        ]
    return layers


def _has_core(layer: Layer) -> bool:
    """Whether PEFT's one setting for all cores may be on: a core, or no place for one."""
    pointwise = layer.weight is not None and layer.window == 1
    return pointwise or algorithms.is_tucker(layer.tensors) or "d" in layer.tensors


def make(layers: list[Layer], paths: list[str], all_paths: Collection[str], either: bool) -> dict:
    """The config fields that rebuild these layers in PEFT 0.17 and later.

    Args:
        layers: as `adapted` gave them.
        paths: what the model calls each layer.
        all_paths: every module path of the model, so that no other layer is hit.
        either: the paths may also stand behind `text_model.`.
    """
    algo = layers[0].algo
    kind = next(kind for kind, (name, _) in KINDS.items() if name == algo)
    extra: dict = {}
    if algo == "lokr":
        layers, extra = decomposition(layers)
    if algo != "lora":
        extra["use_effective_conv2d"] = any(algorithms.is_tucker(la.tensors) for la in layers)
    rslora = algo == "lora" and all(layer.rslora for layer in layers)
    alphas = [layer.alpha if rslora else layer.plain_alpha for layer in layers]
    ranks = [layer.rank for layer in layers]
    usual_rank, usual_alpha = (collections.Counter(v).most_common(1)[0][0] for v in (ranks, alphas))
    optional = r"(text_model\.)?" if either else ""
    regexes = [f"^{optional}{re.escape(path)}" for path in paths]

    targets: list[str] | str = sorted(paths)
    others = {path.removeprefix("text_model.") if either else path for path in all_paths}
    if any(other.endswith("." + path) for path in paths for other in others):
        # as a list, PEFT would also take every path that ends like one of these
        targets = "|".join(f"({regex})" for regex in regexes)
    common = {
        "peft_type": kind,
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": usual_rank,
        KINDS[kind][1]: _number(usual_alpha),
        "rank_pattern": {k: r for k, r in zip(regexes, ranks, strict=True) if r != usual_rank},
        "alpha_pattern": {
            k: _number(a) for k, a in zip(regexes, alphas, strict=True) if a != usual_alpha
        },
        "target_modules": targets,
        "modules_to_save": None,
    }
    if algo != "lora":
        return common | {"rank_dropout": 0.0, "module_dropout": 0.0, "init_weights": True} | extra
    return common | {
        "use_rslora": rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_dora": layers[0].dora,
    }


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value
