"""The two models of the GAN examples, for images of 8 x 8 pixels, and a way to show such an image as text."""

from __future__ import annotations

from torch import Tensor, nn

NOISE = 16


class Generator(nn.Module):
    """Turns noise of shape (batch, NOISE) into images of shape (batch, 1, 8, 8) in 0..1."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(NOISE, 128),
            nn.LeakyReLU(0.2),
            nn.Linear(128, 128),
            nn.LeakyReLU(0.2),
            nn.Linear(128, 64),
            nn.Sigmoid(),
        )

    def forward(self, noise: Tensor) -> Tensor:
        return self.layers(noise).view(-1, 1, 8, 8)


class Discriminator(nn.Module):
    """Says how real images of shape (batch, 1, 8, 8) look: logits of shape (batch,), positive for real."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 128),
            nn.LeakyReLU(0.2),
            nn.Linear(128, 128),
            nn.LeakyReLU(0.2),
            nn.Linear(128, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).squeeze(1)


def as_text(images: Tensor) -> str:
    """Images of shape (n, 1, 8, 8) side by side, darker characters for more ink."""
    levels = (images.squeeze(1).clamp(0, 0.999) * 5).long().tolist()
    rows = zip(*levels, strict=True)  # the first rows of all images, the second rows, ...
    return "\n".join("   ".join("".join(" .+#@"[level] * 2 for level in row) for row in parts) for parts in rows)
