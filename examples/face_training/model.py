"""A small mobile network: an image in, an embedding and the feature map that it is made from out.

Early stages are plain 3x3 convolutions, later ones inverted residuals, as in EfficientNetV2 (Tan, Le 2021, arXiv
2104.00298): where maps are large, a convolution within each channel costs more time than it saves. The last step is
that of MobileFaceNet (Chen, Liu, Gao, Han 2018, arXiv 1804.07573): a weighted mean over the cells of the map, with
weights of its own for each channel. A stride of 16 turns 112x112 pixels into a 7x7 map, a stride of 8 turns 64x64
pixels into 8x8.
"""

from __future__ import annotations

from torch import Tensor, nn

STRIDES = (8, 16)
EXPANSION = 2


class Mobile(nn.Module):
    """``forward(images)``: (N, 3, size, size), values in [-1, 1] -> embeddings (N, d), feature map (N, C, H, H)."""

    def __init__(self, size: int, stride: int, embedding_size: int, width: float = 1.0) -> None:
        super().__init__()
        c1, c2, c3, c4 = (max(8, round(channels * width / 8) * 8) for channels in (32, 64, 128, 256))
        self.features = nn.Sequential(
            convolution(3, c1, 3, 2),
            convolution(c1, c2, 3, 2),
            convolution(c2, c2, 3),
            convolution(c2, c3, 3, 2),
            *(InvertedResidual(c3) for _ in range(3)),
            *([convolution(c3, c3, 3, 2)] if stride == 16 else []),
            *(InvertedResidual(c3) for _ in range(2)),
            convolution(c3, c4, 1, activate=False),
        )
        self.pool = convolution(c4, c4, size // stride, groups=c4, padding=0, activate=False)
        # Without a scale of its own: only the direction of an embedding matters.
        self.embed = nn.Sequential(
            nn.Linear(c4, embedding_size, bias=False), nn.BatchNorm1d(embedding_size, affine=False)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        feature_map = self.features(images)
        return self.embed(self.pool(feature_map).flatten(1)), feature_map


class InvertedResidual(nn.Module):
    """1x1 to more channels, 3x3 within each channel, 1x1 back, plus the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = EXPANSION * channels
        self.layers = nn.Sequential(
            convolution(channels, inner, 1),
            convolution(inner, inner, 3, groups=inner),
            convolution(inner, channels, 1, activate=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.layers(x)
        return result


def convolution(
    channels: int,
    out: int,
    kernel: int,
    stride: int = 1,
    *,
    groups: int = 1,
    padding: int | None = None,
    activate: bool = True,
) -> nn.Sequential:
    """A convolution, batch normalisation, ReLU."""
    if padding is None:
        padding = kernel // 2
    layers = [nn.Conv2d(channels, out, kernel, stride, padding, groups=groups, bias=False), nn.BatchNorm2d(out)]
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if activate else []))
