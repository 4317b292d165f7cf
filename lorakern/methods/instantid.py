"""method = "instantid": an image adapter for faces, and an IdentityNet.

InstantID, Wang et al. 2024, arXiv:2401.07519: a Resampler and K' and V' of every cross-attention,
as in an IP-Adapter, and a ControlNet that sees the face's tokens in the place of the text and a
drawing of five points train, on plain noise prediction and with nothing dropped.
"""

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lorakern import conditioning, data, models
from lorakern.cache import Latent
from lorakern.conditioning import faces
from lorakern.config import Config
from lorakern.data import Example
from lorakern.devices import checkpoint_gradients
from lorakern.methods.base import Method

# of a ControlNet's layers for the drawing, which halve it between each two
CHANNELS = (16, 32, 96, 256)


class Identity(Method):
    """Trains on the face beside each image: same stem, .safetensors or .json."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.chosen = config.instantid
        self.faces: dict[Path, faces.Face] = {}
        # a drawing and an embedding a picture of the samples
        self.shown: list[tuple[Image.Image, Tensor]] = []

    def check(self, index: dict[str, Any], examples: Sequence[Example]) -> None:
        if index["_class_name"] != "StableDiffusionXLPipeline":
            raise ValueError(
                f'method = "instantid" is for SDXL; model {self.config.model} is a'
                f" {index['_class_name']}"
            )
        net = self.chosen.controlnet
        if net != "from_unet" and not (Path(net) / "config.json").is_file():
            raise ValueError(
                f'instantid.controlnet {net}: want "from_unet", or a folder with a config.json'
            )
        if self.chosen.adapter is not None and not self.chosen.adapter.is_file():
            raise ValueError(f"instantid.adapter: no file {self.chosen.adapter}")
        self.faces = {example.path: _face(example.path) for example in examples}
        size = (self.config.resolution, self.config.resolution)
        if self.config.sample.every:
            self.shown = [_shown(Path(path), size) for path in self.config.sample.images]

    def encode(
        self, base: models.Base, latents: Sequence[Latent], folder: Path, device: torch.device,
        *, bar: bool,
    ) -> None:  # fmt: skip
        seen = hashlib.sha256()
        for face in (self.faces[latent.path] for latent in latents):
            for tensor in (face.embedding, face.keypoints):
                seen.update(tensor.numpy().tobytes())
        self.fingerprint = seen.hexdigest()

    def inject(self, base: models.Base) -> None:
        from lorakern.conditioning import ip_train

        unet = base.unet
        # a copy of the UNet before it has an image adapter
        net = self._net(base)
        if self.chosen.adapter is None:
            conditioning.new_ip_adapter(
                unet, faces.WIDTH, variant="plus", tokens=self.chosen.tokens
            )
        else:
            made = conditioning.load_ip_adapter(unet, self.chosen.adapter)
            if made.variant != "instantid":
                raise ValueError(
                    f"instantid.adapter {self.chosen.adapter} is a {made.variant}; want InstantID's"
                )
        self.base, self.net = base, net
        self.trained = {"unet": unet, "controlnet": net}
        self.parameters = ip_train.parameters(unet)
        self.to_bf16(unet, self.parameters.values())
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        net.requires_grad_(True)
        for module in self.trained.values():
            module.train()
            if self.config.gradient_checkpointing:
                checkpoint_gradients(module)

    def keeps_caption(self, chance: Tensor) -> Tensor:
        return torch.ones_like(chance, dtype=torch.bool)

    def inputs(self, latents: Sequence[Latent], chance: Tensor) -> dict[str, Tensor]:
        drawn, found = [], []
        for latent in latents:
            face, (height, width) = self.faces[latent.path], latent.time_ids[:2]
            points = faces.fit(face.keypoints, (width, height), latent.bucket)
            drawn.append(_pixels(faces.draw(points, latent.bucket)))
            found.append(face.embedding.view(1, 1, -1))
        return {"face": torch.stack(found), "drawing": torch.stack(drawn)}

    def blank(self, batch: int, size: tuple[int, int]) -> dict[str, Tensor]:
        width, height = size
        return {
            "face": torch.zeros(batch, 1, 1, faces.WIDTH),
            "drawing": torch.zeros(batch, 3, height, width),
        }

    def predict(
        self, noisy: Tensor, t: Tensor, context: Tensor, condition: dict[str, Any],
        inputs: dict[str, Tensor],
    ) -> Tensor:  # fmt: skip
        unet, added = self.base.unet, condition["added_cond_kwargs"]
        tokens = unet.encoder_hid_proj.tokens(0, inputs["face"]).flatten(1, 2)
        down, middle = self.net(
            noisy, t, tokens, inputs["drawing"], added_cond_kwargs=added, return_dict=False
        )
        return unet(
            noisy, t, context, added_cond_kwargs={**added, "image_embeds": [inputs["face"]]},
            down_block_additional_residuals=down, mid_block_additional_residual=middle,
        ).sample  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        own = {f"adapter.{name}": p.detach() for name, p in self.parameters.items()}
        return own | {f"controlnet.{name}": p.detach() for name, p in self.net.named_parameters()}

    def settings(self) -> dict[str, Any]:
        return {"faces": self.fingerprint[:16]}

    def about(self) -> str:
        layers = sum(name.endswith("to_k_ip.weight") for name in self.parameters)
        return f"InstantID on {layers} cross-attentions, and its IdentityNet"

    def paths(self) -> list[Path]:
        return [self.config.output / self.config.name]

    def export(self, metadata: dict[str, str]) -> list[Path]:
        from lorakern.conditioning import instantid

        (folder,) = self.paths()
        instantid.save_net(self.net, folder / instantid.NET)
        conditioning.save_ip_adapter(
            self.base.unet, folder / instantid.ADAPTERS[0], metadata=metadata
        )
        return [folder]

    def draw(self, **options) -> list[Image.Image]:
        from diffusers import StableDiffusionXLControlNetPipeline

        from lorakern.conditioning.instantid import InstantID

        prompts, base = self.config.sample.prompts, copy.copy(self.base)
        shown = self.shown * (len(prompts) if len(self.shown) == 1 else 1)
        with models.quiet_libraries():
            base.pipe = StableDiffusionXLControlNetPipeline(
                **self.base.pipe.components, controlnet=self.net, add_watermarker=False,
                force_zeros_for_empty_prompt=base.zero_empty,
            )  # fmt: skip
        base.pipe.set_progress_bar_config(disable=True)
        identity = InstantID(base.pipe, self.net, 0, None)
        try:
            return models.draw(
                base, prompts, **options,
                more=lambda i: {
                    "image": shown[i][0],
                    "ip_adapter_image_embeds":
                        [identity.embeds(shown[i][1], guidance=options["guidance"] > 1)],
                },
            )  # fmt: skip
        finally:
            identity.remove()

    def _net(self, base: models.Base) -> nn.Module:
        from diffusers import ControlNetModel

        unet, path, strides = base.unet, self.chosen.controlnet, base.latent_factor.bit_length() - 1
        shapes_only = unet.device.type == "meta"
        with models.quiet_libraries(), torch.device(unet.device):
            if path == "from_unet":
                if strides >= len(CHANNELS):
                    raise ValueError(
                        f"a latent pixel is {base.latent_factor} pixels; want at most"
                        f" {2 ** (len(CHANNELS) - 1)} for a new IdentityNet"
                    )
                return ControlNetModel.from_unet(
                    unet, conditioning_embedding_out_channels=CHANNELS[: strides + 1],
                    load_weights_from_unet=not shapes_only,
                )  # fmt: skip
            try:
                if shapes_only:
                    net = ControlNetModel.from_config(ControlNetModel.load_config(path))
                else:
                    net = ControlNetModel.from_pretrained(path, use_safetensors=True).float()
            except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
                raise ValueError(
                    f"instantid.controlnet {path} cannot be loaded: {error}"
                ) from error
        for what, have, want in (
            ("takes tokens of", net.config.cross_attention_dim, unet.config.cross_attention_dim),
            ("has blocks of", [*net.config.block_out_channels], [*unet.config.block_out_channels]),
            ("halves drawings times", len(net.config.conditioning_embedding_out_channels) - 1,
             strides),
        ):  # fmt: skip
            if have != want:
                raise ValueError(f"instantid.controlnet {path} {what} {have}, the model {want}")
        return net


def _face(image: Path) -> faces.Face:
    path = faces.beside(image)
    if path is None:
        raise ValueError(
            f"data: no face beside {image}; want {image.stem}.safetensors or .json with embedding"
            f" [{faces.WIDTH}] and keypoints [{faces.POINTS}, 2] in pixels"
        )
    return faces.read(path)


def _shown(path: Path, size: tuple[int, int]) -> tuple[Image.Image, Tensor]:
    try:
        source = data.read_image(path.read_bytes()).size
    except (OSError, data.BadImage) as error:
        raise ValueError(f"sample.images: {path}: {error}") from None
    face = _face(path)
    return faces.draw(faces.fit(face.keypoints, source, size), size), face.embedding


def _pixels(image: Image.Image) -> Tensor:
    """[3, height, width] float32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
