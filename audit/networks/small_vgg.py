"""A VGG-16 in miniature: thirteen 3x3 convolutions in five blocks, for the demo and the tests.

The layers carry their Keras names (`block1_conv1` .. `block5_conv3`), so that everything said
about a VGG can be tried on a network that trains in minutes on a laptop. Two departures from the
original: the last block is not pooled (64-pixel images leave it with 4x4 maps), and one linear
layer on globally averaged features stands where VGG-16 has three on flattened ones.

Architecture name in model cards: `layermend:vgg`.

Source: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition"
(2015), configuration D.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

ARCHITECTURE = "layermend:vgg"


class SmallVGG(nn.Module):
    """A network of VGG's shape at any width; images (B, 3, H, W) in, logits (B, classes) out.

    Args:
        classes: Number of outputs.
        widths: Channels of each block.
        convolutions: Number of 3x3 convolutions in each block.
    """

    def __init__(
        self,
        *,
        classes: int,
        widths: Sequence[int] = (8, 16, 32, 48, 64),
        convolutions: Sequence[int] = (2, 2, 3, 3, 3),
    ) -> None:
        super().__init__()
        if classes < 1 or not widths or len(widths) != len(convolutions):
            raise ValueError(
                f"expected classes >= 1 and as many widths as convolutions, "
                f"got classes={classes}, widths={tuple(widths)}, convolutions={tuple(convolutions)}"
            )
        channels = 3
        for block, (width, count) in enumerate(zip(widths, convolutions, strict=True), start=1):
            for position in range(1, count + 1):
                convolution = nn.Conv2d(channels, width, kernel_size=3, padding=1)
                self.add_module(f"block{block}_conv{position}", convolution)
                self.add_module(f"block{block}_relu{position}", nn.ReLU(inplace=True))
                channels = width
            if block < len(widths):
                self.add_module(f"block{block}_pool", nn.MaxPool2d(kernel_size=2))
        self.average = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.predictions = nn.Linear(channels, classes)
        self._initialize()

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, (B, 3, H, W) -> (B, classes); every child runs once, in order."""
        activations = images
        for layer in self.children():
            activations = layer(activations)
        return activations

    def _initialize(self) -> None:
        # He et al. 2015: without it a plain network of this depth hardly starts to learn.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
