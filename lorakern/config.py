"""What a training run is told: a TOML file, with single keys from the command line on top.

Every key has a type, a default and a range; a key that does not exist is an error that names the
nearest one that does.
"""

import difflib
import sys
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# keys that may differ between a run and its resumption: they do not change what a step computes
FREE_ON_RESUME = {
    *("steps", "output", "name", "formats", "device", "graphs", "cache", "resume", "sample"),
    "checkpoint",
}

# keys and sections that are read with some methods only, and these
READ_BY = {
    "adapter": {"adapter"},
    "ip_adapter": {"ip_adapter"},
    "instantid": {"instantid"},
    "sample.images": {"ip_adapter", "instantid"},
    "formats": {"adapter"},
    "caption_dropout": {"adapter"},
    "optimizer.text_encoder_lr": {"adapter"},
    "optimizer.loraplus_ratio": {"adapter"},
    "optimizer.max_norm": {"adapter"},
}

Names = Annotated[list[str], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())


class AdapterConfig(Section):
    """[adapter]: what is trained by method = "adapter"."""

    algo: str = Field("lora", description="which adapter")
    rank: int = Field(16, ge=1, description="inner dimension")
    alpha: float | None = Field(None, gt=0, description="scale is alpha / rank; default: rank")
    targets: str | list[str] = Field("attn", description="attn, attn-mlp, full, a regex or a list")
    text_encoder: bool = Field(False, description="adapt and train the text encoder too")
    options: dict[str, Any] = Field({}, description="further options of the adapter")


class IPAdapterConfig(Section):
    """[ip_adapter]: what is trained by method = "ip_adapter"."""

    variant: Literal["base", "plus"] = Field(
        "base", description="base sees an image embedding, plus an encoder's tokens"
    )
    tokens: int | None = Field(None, ge=1, description="made of an image by plus; default: 16")
    image_encoder: Path | None = Field(
        None, description="folder of a CLIPVisionModelWithProjection; default: the model's own"
    )
    embeddings: Path | None = Field(
        None, description="safetensors of an embedding an image, in place of an encoder"
    )
    image_dropout: float = Field(0.05, ge=0, le=1, description="chance of no image, text stays")
    text_dropout: float = Field(0.05, ge=0, le=1, description="chance of no text, image stays")
    both_dropout: float = Field(0.05, ge=0, le=1, description="chance of neither")

    @model_validator(mode="after")
    def _adds_up(self) -> "IPAdapterConfig":
        if self.embeddings is not None and self.image_encoder is not None:
            raise ValueError(
                f"image_encoder is {self.image_encoder} and embeddings is {self.embeddings}; want"
                " one of them"
            )
        if self.variant == "base" and self.tokens not in (None, 4):
            raise ValueError(
                f"tokens is {self.tokens}; a base has 4, for diffusers reads a file of it so"
            )
        chances = self.image_dropout, self.text_dropout, self.both_dropout
        if sum(chances) > 1:
            raise ValueError(
                "image_dropout, text_dropout and both_dropout are chances that exclude each other;"
                f" they add up to {sum(chances):g}, over 1"
            )
        return self


class InstantIDConfig(Section):
    """[instantid]: what is trained by method = "instantid"."""

    controlnet: str = Field(
        "from_unet", description="the IdentityNet to begin with: a folder, or a copy of the UNet"
    )
    adapter: Path | None = Field(
        None, description="the image adapter to begin with: a file; default: a new one"
    )
    tokens: int | None = Field(
        None, ge=1, description="made of a face by a new image adapter; default: 16"
    )

    @model_validator(mode="after")
    def _one_adapter(self) -> "InstantIDConfig":
        if self.adapter is not None and self.tokens is not None:
            raise ValueError(
                f"tokens is {self.tokens}, but those of {self.adapter} are what it has; want one"
                " of them"
            )
        return self


class OptimizerConfig(Section):
    """[optimizer]: how it is trained."""

    name: str = Field("adamw", description='adamw (fused), or any "module:Class"')
    lr: float = Field(1e-4, gt=0, description="learning rate")
    text_encoder_lr: float | None = Field(None, gt=0, description="default: lr")
    loraplus_ratio: float | None = Field(None, gt=0, description="LoRA+: up factors' rate over lr")
    max_norm: float | None = Field(None, gt=0, description="of an adapter's update; default: none")
    weight_decay: float | None = Field(None, ge=0, description="default: the optimizer's own")
    options: dict[str, Any] = Field({}, description="further options of the optimizer")
    schedule: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = Field("constant", description="of the learning rate")
    warmup: int = Field(0, ge=0, description="steps of warm-up; not for the constant schedule")
    clip: float = Field(1.0, ge=0, description="largest gradient norm; 0 does not clip")
    average: float = Field(
        0.0, ge=0, lt=1, description="export a moving average of this memory (0.999); 0: none"
    )


class LossConfig(Section):
    """[loss]: what is learned."""

    predicts: Literal["auto", "noise", "velocity"] = Field(
        "auto", description="what the UNet outputs; auto reads the model's scheduler"
    )
    min_snr: float | None = Field(None, gt=0, description="gamma of min-SNR weights; 5 is usual")


class SampleConfig(Section):
    """[sample]: pictures drawn on the way."""

    every: int = Field(0, ge=0, description="steps between grids; 0 draws none")
    prompts: Names = Field([], description="one column each")
    images: Names = Field(
        [], description="image prompts, one for all or one a prompt: files, or names in embeddings"
    )
    rows: int = Field(1, ge=1, description="seeds per prompt")
    steps: int = Field(20, ge=1, description="denoising steps")
    guidance: float = Field(5.0, ge=0, description="classifier-free guidance")
    seed: int = Field(0, ge=0, description="of the first row")


class CheckpointConfig(Section):
    """[checkpoint]: what a resumption starts from."""

    every: int = Field(500, ge=0, description="steps between them; 0 writes the last one only")
    keep: int = Field(2, ge=1, description="how many stay")


class Config(Section):
    """A training run."""

    method: Literal["adapter", "ip_adapter", "instantid"] = Field(
        "adapter",
        description="what trains: adapter (of weights), ip_adapter (image prompts), instantid",
    )
    model: str = Field(description="a diffusers folder, or a name on the Hugging Face hub")
    data: Path = Field(description="folder of images with same-stem .txt, or with metadata.jsonl")
    output: Path = Field(description="folder for adapter, checkpoints, log and samples")
    name: str = Field("adapter", pattern=r"^[^/\\]+$", description="of the adapter file")
    formats: Annotated[Names, Field(min_length=1)] = Field(
        ["kohya"], description="of the adapter file: kohya, diffusers, peft"
    )
    steps: int = Field(1000, ge=1, description="updates of the weights")
    batch_size: int = Field(1, ge=1, description="images a batch")
    accumulate: int = Field(1, ge=1, description="batches an update")
    resolution: int = Field(512, ge=8, description="pixels; buckets have about this area, squared")
    buckets: bool = Field(True, description="keep aspect ratios; off crops squares")
    caption: str | None = Field(None, description="of images that have none; default: an error")
    caption_dropout: float = Field(0.0, ge=0, le=1, description="chance of an empty caption")
    seed: int = Field(0, ge=0, description="decides order, noise and factors")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    precision: Literal["auto", "float32", "bf16"] = Field(
        "auto", description="bf16 autocasts, factors stay float32; auto: bf16 on a GPU"
    )
    gradient_checkpointing: bool = Field(False, description="less memory, more time")
    graphs: Literal["auto", "on", "off"] = Field(
        "off", description="CUDA graphs, one a bucket; auto: where a step is faster so"
    )
    cache: Path | None = Field(None, description="of latents and texts; default: output/cache")
    resume: bool = Field(False, description="go on from the newest checkpoint in output")
    adapter: AdapterConfig = AdapterConfig()
    ip_adapter: IPAdapterConfig = IPAdapterConfig()
    instantid: InstantIDConfig = InstantIDConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    sample: SampleConfig = SampleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _prompts_for_samples(self) -> "Config":
        if self.sample.every and not self.sample.prompts:
            raise ValueError(f"sample.every is {self.sample.every}, but sample.prompts is empty")
        images, prompts = len(self.sample.images), len(self.sample.prompts)
        if self._reads("sample.images") and self.sample.every and images not in (1, prompts):
            raise ValueError(
                f"sample.images has {images} image prompts for {prompts} prompts; want 1 or as many"
            )
        return self

    @model_validator(mode="after")
    def _nothing_in_vain(self) -> "Config":
        whole, known = dict(_flat(self.model_dump())), fields()
        for key, value in whole.items():
            if not self._reads(key) and value != known[key].default:
                said = value if isinstance(value, (Path, str)) else repr(value)
                raise ValueError(f'{key} is {said}, which method = "{self.method}" does not read')
        return self

    def _reads(self, key: str) -> bool:
        section = key.partition(".")[0]
        return self.method in READ_BY.get(key, READ_BY.get(section, {self.method}))

    def fixed(self) -> dict[str, Any]:
        """The part that decides what a step computes, as JSON types, by dotted key."""
        whole = _flat(self.model_dump(mode="json"))
        free = FREE_ON_RESUME
        return {k: v for k, v in whole if self._reads(k) and k.split(".")[0] not in free}


def fields(section: type[Section] = Config, prefix: str = "") -> dict[str, Any]:
    """Every key by its dotted name, with its pydantic field (type, default, description)."""
    found = {}
    for name, field in section.model_fields.items():
        if field.annotation in Section.__subclasses__():
            found |= fields(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


def load(path: str | Path | None, overrides: list[str] = ()) -> Config:
    """A checked Config from a TOML file and command-line words.

    Args:
        path: the file, or None for an empty one.
        overrides: ["--adapter.rank", "8", "--steps=100", "--resume"]; a value is read as TOML,
            and as plain text where the key takes text.

    Raises:
        ValueError: no such file, not TOML, an unknown key (with a suggestion), or a value out of
            type or range; one line for each, naming key and value.
    """
    table = _read(Path(path)) if path is not None else {}
    for key, text in _pairs(list(overrides)):
        _set(table, key, _value(key, text))
    return from_dict(table, "config" if path is None else str(path))


def from_dict(table: dict[str, Any], where: str = "config") -> Config:
    """A checked Config from nested dictionaries; `where` opens the message of a ValueError."""
    try:
        return Config.model_validate(table)
    except ValidationError as errors:
        lines = "\n  ".join(_explain(e) for e in errors.errors())
        raise ValueError(f"{where}: {lines}") from None


def suggest(key: str, known: typing.Iterable[str]) -> str:
    """ "; did you mean adapter.rank?" when a known name is near, else ""."""
    known = list(known)
    last = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
    near = last or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:
        by_last = {k.rpartition(".")[2]: k for k in known}
        close = difflib.get_close_matches(key.rpartition(".")[2], by_last, n=1, cutoff=0.7)
        near = [by_last[c] for c in close]
    return f"; did you mean {near[0]}?" if near else ""


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no config file {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path}: {error}") from None


def _pairs(words: list[str]) -> list[tuple[str, str]]:
    pairs = []
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"want --key value, got {word!r}")
        key, equals, text = word[2:].partition("=")
        key = key.replace("-", "_")
        if key not in fields():
            raise ValueError(f"unknown key --{key}{suggest(key, fields())}")
        if not equals:
            flag = not words or words[0].startswith("--")
            if flag and fields()[key].annotation is not bool:
                raise ValueError(f"--{key} wants a value")
            text = "true" if flag else words.pop(0)
        pairs.append((key, text))
    return pairs


def _value(key: str, text: str) -> Any:
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text
    kinds = _kinds(fields()[key].annotation)
    return text if {str, Path} & kinds and not isinstance(value, (str, *kinds)) else value


def _kinds(annotation: Any) -> set[type]:
    """The plain types that an annotation allows: {int, NoneType} of int | None."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return {kind for a in typing.get_args(annotation) for kind in _kinds(a)}
    return {typing.get_origin(annotation) or annotation}


def _set(table: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for name in sections:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ValueError(f"{key}: {name} is a section, got {table!r} for it")
    table[last] = value


def _flat(table: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    known = fields()
    flat = []
    for name, value in table.items():
        whole = prefix + name
        flat += [(whole, value)] if whole in known else _flat(value, f"{whole}.")
    return flat


def _explain(error: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in error["loc"] if isinstance(part, str))
    if error["type"] == "extra_forbidden":
        sections = {known.partition(".")[0] for known in fields()}
        return f"unknown key {key}{suggest(key, [*fields(), *sorted(sections)])}"
    if error["type"] == "missing":
        return f"{key} is required: {fields()[key].description}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}: {message}, got {error['input']!r}" if key else message
