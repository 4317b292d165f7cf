"""A small random SDXL with ControlNets, and a face, for the tests of InstantID."""

import ip_adapters as ip
import numpy as np
import tiny
import torch

# left eye, right eye, nose, left and right corner of the mouth
POINTS = [[60.7, 70.2], [138.4, 64.9], [104.1, 110.6], [72.3, 150.8], [133.9, 146.5]]
# the same for pictures of 16 x 16
SMALL = [[5, 5], [10, 5], [8, 8], [6, 11], [10, 11]]


def controlnet(unet, seed: int = 5):
    """A ControlNet of the UNet's shape whose last layers are not zero."""
    from diffusers import ControlNetModel

    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1)
    return net.requires_grad_(False)


def pipeline(folder, nets: int = 1, plain: bool = False):
    """A StableDiffusionXLControlNetPipeline of 16 x 16 pixels; without ControlNets when plain."""
    from diffusers import StableDiffusionXLControlNetPipeline

    pipe = tiny.pipeline_xl(folder)
    pipe.unet.eval().requires_grad_(False)
    if not plain:
        made = [controlnet(pipe.unet, seed=5 + i) for i in range(nets)]
        pipe = StableDiffusionXLControlNetPipeline(
            **pipe.components, controlnet=made if nets > 1 else made[0], add_watermarker=False
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def adapter(unet, seed: int = 0) -> dict:
    """An image adapter in the authors' layout."""
    return ip.checkpoint(unet, "instantid", seed=seed)


def face(seed: int = 11) -> torch.Tensor:
    """An embedding as long as the encoder makes them, about 20."""
    return torch.randn(512, generator=torch.Generator().manual_seed(seed))


def run(pipe, **inputs):
    """Latents of two steps, always of the same noise."""
    options = {"num_inference_steps": 2, "guidance_scale": 5.0, "height": 16, "width": 16}
    return pipe(
        "red", output_type="latent", generator=torch.Generator().manual_seed(0),
        **options | inputs,
    ).images  # fmt: skip


def array(image) -> np.ndarray:
    return np.asarray(image).astype(int)
