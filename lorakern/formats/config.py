"""PEFT's LoraConfig as JSON: where alpha, rslora and per-layer ranks live in PEFT and diffusers."""

import collections
import math
import re
from collections.abc import Collection

from lorakern.formats.base import Layer

# settings that change what the factors mean; a file with one of them is not plain LoRA
_NOT_PLAIN = {
    "use_dora": "DoRA",
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


def check(config: dict, where: str) -> None:
    """Raises ValueError unless the config is of plain LoRA."""
    kind = config.get("peft_type") or "LORA"
    if kind != "LORA":
        raise ValueError(f"{where} is of PEFT type {kind}; this version loads plain LoRA only")
    for field, meaning in _NOT_PLAIN.items():
        if config.get(field):
            raise ValueError(f"{where} has {field}: {meaning}; this version loads plain LoRA only")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise ValueError(
            f"{where} has init_lora_weights {start!r}, which also changed the base weights; convert"
            " it to plain LoRA with PEFT (path_initial_model_for_weight_conversion) and save again"
        )
    for field in ("r", "lora_alpha"):
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


def scale_of(config: dict, path: str, rank: int, where: str) -> tuple[float, bool]:
    """(alpha, rslora) of one layer; ValueError when the config's rank is not the tensors'."""
    want = _look_up(config.get("rank_pattern") or {}, path, config["r"])
    if want != rank:
        raise ValueError(f"{where}: rank {want} for {path} in the config, {rank} in its tensors")
    alpha = _look_up(config.get("alpha_pattern") or {}, path, config["lora_alpha"])
    return float(alpha), bool(config.get("use_rslora"))


def _look_up(patterns: dict, path: str, default: float) -> float:
    # PEFT's rule: the first key that is the path or an end of it, as a regex
    for spelled in (path, path.removeprefix("text_model.")):
        for key, value in patterns.items():
            if re.match(rf"(.*\.)?({key})$", spelled):
                return value
    return default


def make(layers: list[Layer], paths: list[str], all_paths: Collection[str], either: bool) -> dict:
    """The LoraConfig fields that rebuild these layers in PEFT 0.17 and later.

    Args:
        paths: what the model calls each layer.
        all_paths: every module path of the model, so that no other layer is hit.
        either: the paths may also stand behind `text_model.`.
    """
    rslora = all(layer.rslora for layer in layers)
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
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": usual_rank,
        "lora_alpha": _number(usual_alpha),
        "use_rslora": rslora,
        "rank_pattern": {k: r for k, r in zip(regexes, ranks, strict=True) if r != usual_rank},
        "alpha_pattern": {
            k: _number(a) for k, a in zip(regexes, alphas, strict=True) if a != usual_alpha
        },
        "target_modules": targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value
