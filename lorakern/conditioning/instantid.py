"""InstantID in a pipeline: a face's tokens for the UNet's image attention and for the IdentityNet.

InstantID, Wang et al. 2024, arXiv:2401.07519. The pipeline stays diffusers' own; what is put on it
can be taken off. Imports diffusers: `conditioning` imports it on use, and documents its functions.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from PIL import Image
from torch import Tensor, nn

from lorakern.conditioning import faces, ip_files, ip_model
from lorakern.conditioning.cache import Cache
from lorakern.conditioning.ip_adapter import attend, text_kv
from lorakern.conditioning.ip_scales import Scale
from lorakern.formats import storage

Encoder = Callable[[Image.Image], tuple[Any, Any]]

# the names of the released files
ADAPTERS = ("ip-adapter.safetensors", "ip-adapter.bin")
NET = "ControlNetModel"
_PREPARE = "prepare_ip_adapter_image_embeds"


class FaceProcessor(AttnProcessor2_0):
    """What diffusers' processor computes; K and V of the face are kept from step to step.

    Args:
        stock: the processor whose place it takes.
    """

    def __init__(self, stock: AttnProcessor2_0):
        super().__init__()
        self.stock, self.face = stock, Cache()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """As diffusers calls it."""
        if encoder_hidden_states is None or attention_mask is not None or attn.norm_q is not None:
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, temb)

        def mix(q: Tensor) -> Tensor:
            k, v = text_kv(attn, encoder_hidden_states, self.face)
            q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).to(q.dtype)

        return attend(attn, hidden_states, temb, mix)


class InstantID:
    """InstantID in a pipeline, as `load_instantid` gives it.

    Attributes:
        index: of its image adapter among the UNet's IP-Adapters: its place in
            `ip_adapter_image_embeds` and in `set_ip_adapter_scale`.
        net: the IdentityNet, a ControlNetModel.
        image_embeds: [B, images, 1, 512], what the pipeline was last given, which the IdentityNet
            gets the tokens of; set it to call the IdentityNet without the pipeline.
        encoder: the user's, or None.
    """

    def __init__(self, pipe, net: ControlNetModel, index: int, encoder: Encoder | None):
        self.unet, self.net, self.index, self.encoder = pipe.unet, net, index, encoder
        self.loaded: ip_model.Loaded = pipe.unet.encoder_hid_proj
        self.image_embeds: Tensor | None = None
        # what the IdentityNet ran on in this step
        self._ran: Tensor | None = None
        self._tokens = Cache()
        self._pipes: list = []
        self._hooks = [
            net.register_forward_pre_hook(self._feed, with_kwargs=True),
            pipe.unet.register_forward_pre_hook(self._check_same, with_kwargs=True),
        ]
        self._layers = [m for m in _crossing(net) if type(m.processor) is AttnProcessor2_0]
        for attn in self._layers:
            attn.set_processor(FaceProcessor(attn.processor))
        self.watch(pipe)

    @property
    def caches(self) -> list[Cache]:
        """All that is kept here."""
        mine = (attn.processor for attn in self._layers)
        return [self._tokens, *(p.face for p in mine if isinstance(p, FaceProcessor))]

    def watch(self, pipe) -> None:
        """Let another pipeline of the same UNet and IdentityNet use it, one of `from_pipe` say.

        Raises:
            ValueError: it has another UNet, or takes no images of IP-Adapters.
        """
        if pipe.unet is not self.unet:
            raise ValueError(f"{type(pipe).__name__} has another UNet than the face was put into")
        _check_pipe(pipe)
        theirs = getattr(pipe, _PREPARE)

        def prepare_ip_adapter_image_embeds(
            ip_adapter_image, ip_adapter_image_embeds, device, num_images_per_prompt,
            do_classifier_free_guidance,
        ):  # fmt: skip
            made = theirs(
                ip_adapter_image, ip_adapter_image_embeds, device, num_images_per_prompt,
                do_classifier_free_guidance,
            )  # fmt: skip
            if len(made) <= self.index:
                raise ValueError(
                    f"image embeddings of {len(made)} IP-Adapters; InstantID's is number"
                    f" {self.index}, counted from 0"
                )
            self.image_embeds = made[self.index]
            return made

        setattr(pipe, _PREPARE, prepare_ip_adapter_image_embeds)
        self._pipes.append(pipe)

    def embeds(self, embeddings, *, guidance: bool = True) -> Tensor:
        """One entry of the pipeline's `ip_adapter_image_embeds`.

        Args:
            embeddings: [512], or [N, 512] of one person, which are averaged; not normalised.
            guidance: whether the pipeline runs classifier-free guidance (guidance_scale > 1).

        Returns:
            [2, 1, 1, 512], zeros and then the face, without guidance [1, 1, 1, 512]; on the UNet's
            device and in its dtype.

        Raises:
            ValueError: another width, no face, a value that is not finite.
        """
        face = faces.embedding(embeddings).to(self.unet.device, self.unet.dtype)
        rows = [torch.zeros_like(face), face] if guidance else [face]
        return torch.stack(rows)[:, None, None]

    def inputs(
        self, embeddings, keypoints, size: tuple[int, int], *, guidance: bool = True
    ) -> dict[str, Any]:
        """The pipeline's `image` and `ip_adapter_image_embeds` for a face.

        Args:
            embeddings, guidance: as `embeds`.
            keypoints: [5, 2], x and y in pixels of `size`: where the face is to be.
            size: (width, height) in pixels.

        Raises:
            ValueError: as `embeds`, and for keypoints of another shape.
        """
        return {
            "image": faces.draw(keypoints, size),
            "ip_adapter_image_embeds": [self.embeds(embeddings, guidance=guidance)],
        }

    def inputs_of(
        self, picture: Image.Image, size: tuple[int, int] | None = None, *, guidance: bool = True
    ) -> dict[str, Any]:
        """As `inputs`, of the face that the user's encoder finds in a picture.

        Args:
            size: (width, height) in pixels that the picture is scaled to cover, its middle
                counts; the picture's own by default.

        Raises:
            ValueError: no encoder, or it finds no face or not what `Face` describes.
        """
        if self.encoder is None:
            raise ValueError("no encoder; give load_instantid one, or call inputs()")
        found = self.encoder(picture)
        if found is None or len(found) != 2:
            got = "nothing" if found is None else f"{len(found)} things"
            raise ValueError(
                f"the encoder gave {got}; want an embedding [512] and keypoints [5, 2]"
            )
        points = faces.keypoints(found[1], "the encoder's face")
        size = size or picture.size
        face = faces.embedding(found[0], "the encoder's face")
        return self.inputs(face, faces.fit(points, picture.size, size), size, guidance=guidance)

    def remove(self) -> None:
        """Take off what is on pipelines and IdentityNet; the image adapter stays in the UNet."""
        for hook in self._hooks:
            hook.remove()
        for attn in self._layers:
            # something else may have taken its place since
            if isinstance(attn.processor, FaceProcessor):
                attn.set_processor(attn.processor.stock)
        for pipe in self._pipes:
            vars(pipe).pop(_PREPARE, None)
        self._layers, self._pipes, self.image_embeds, self._ran = [], [], None, None
        if self in self.loaded.guests:
            self.loaded.guests.remove(self)

    def _feed(self, _, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Forward pre-hook of the IdentityNet: the face's tokens in the place of the text's."""
        text = args[2] if len(args) > 2 else kwargs["encoder_hidden_states"]
        sample = args[0] if args else kwargs["sample"]
        tokens = self._face(len(sample), kwargs.get("guess_mode", False), text)
        if len(args) > 2:
            return (*args[:2], tokens, *args[3:]), kwargs
        return args, kwargs | {"encoder_hidden_states": tokens}

    def _face(self, rows: int, guess: bool, text: Tensor) -> Tensor:
        """[rows, images·16, C] on the text's device and in its dtype."""
        x = self._ran = self.image_embeds
        if self.unet.encoder_hid_proj is not self.loaded:
            raise ValueError(
                "InstantID's image adapter was taken out of the UNet; call remove() to have the"
                " ControlNet back"
            )
        if x is None:
            raise ValueError(
                "the IdentityNet has no face: give the pipeline ip_adapter_image_embeds; a pipeline"
                " made after load_instantid needs watch()"
            )
        # guess mode runs on the second half alone, the one that is not the negative
        half = guess and len(x) == 2 * rows
        if len(x) != rows and not half:
            raise ValueError(f"{len(x)} rows of faces, but {rows} of latents at the IdentityNet")
        tokens = self.loaded.tokens(self.index, x)

        def make():
            return tokens[rows if half else 0 :].flatten(1, 2).to(text.device, text.dtype)

        return self._tokens.get(make, [tokens], (), half, text.device, text.dtype)

    def _check_same(self, _, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the UNet: it is of the face that the IdentityNet was of."""
        ran, self._ran = self._ran, None
        given = (kwargs.get("added_cond_kwargs") or {}).get("image_embeds")
        if ran is None or not isinstance(given, (list, tuple)) or len(given) <= self.index:
            return
        if given[self.index] is not ran and not torch.equal(given[self.index], ran):
            raise ValueError(
                "UNet and IdentityNet got different faces; a pipeline made after load_instantid"
                " needs watch()"
            )


def load_instantid(
    pipe,
    adapter: str | Path | Mapping,
    *,
    scale: Scale = 0.8,
    controlnet: int = 0,
    encoder: Encoder | None = None,
) -> InstantID:
    """See lorakern.conditioning.load_instantid."""
    _check_pipe(pipe)
    net = _identity_net(pipe, controlnet)
    found = ip_files.read(adapter if isinstance(adapter, Mapping) else adapter_file(Path(adapter)))
    if found.variant != "instantid":
        raise ValueError(
            f"{found.source} is a {found.variant}; want InstantID's image adapter, a Resampler of"
            f" embeddings of {faces.WIDTH}"
        )
    widths = {m.to_k.in_features for m in _crossing(net)}
    if widths != {found.width}:
        have = " and ".join(map(str, sorted(widths))) or "no"
        raise ValueError(
            f"{found.source} makes tokens of {found.width} channels, the ControlNet takes {have}"
        )
    index = ip_model.load_ip_adapter(pipe, found, scale=scale).index
    made = InstantID(pipe, net, index, encoder)
    made.loaded.guests.append(made)
    return made


def save_instantid(identity: InstantID, folder: str | Path, *, bin: bool = False) -> Path:
    """See lorakern.conditioning.save_instantid."""
    folder = Path(folder)
    save_net(identity.net, folder / NET)
    ip_model.save_ip_adapter(identity.unet, folder / ADAPTERS[bin], identity.index)
    return folder


def save_net(net: ControlNetModel, folder: Path) -> None:
    """Write a ControlNet's folder as diffusers does; it appears whole, or what was there stays."""
    with storage.whole_folder(folder) as made:
        net.save_pretrained(made)


def adapter_file(path: Path) -> Path:
    """The image adapter of a release's folder; a file is itself."""
    if not path.is_dir():
        return path
    found = [path / name for name in ADAPTERS if (path / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{path} has no {' or '.join(ADAPTERS)}")
    return found[0]


def _check_pipe(pipe) -> None:
    if not hasattr(pipe, _PREPARE) or getattr(pipe, "controlnet", None) is None:
        raise ValueError(
            f"want a pipeline with a ControlNet that takes images of IP-Adapters, such as"
            f" StableDiffusionXLControlNetPipeline, got {type(pipe).__name__}"
        )
    if _PREPARE in vars(pipe):
        raise ValueError("the pipeline has an InstantID already; unload_ip_adapter takes it out")


def _identity_net(pipe, number: int) -> ControlNetModel:
    net = getattr(pipe.controlnet, "_orig_mod", pipe.controlnet)
    nets = net.nets if isinstance(net, MultiControlNetModel) else [net]
    if not 0 <= number < len(nets):
        raise ValueError(f"controlnet {number}: the pipeline has {len(nets)}, counted from 0")
    if not isinstance(nets[number], ControlNetModel):
        raise ValueError(f"want a ControlNetModel, got {type(nets[number]).__name__}")
    return nets[number]


def _crossing(net: nn.Module) -> list[Attention]:
    """Layers whose keys are of the text."""
    return [m for m in net.modules() if isinstance(m, Attention) and m.is_cross_attention]
