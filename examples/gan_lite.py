"""Train a generator of handwritten digits against a discriminator: two models, two optimizers, one loop.

gan_raw.py is a plain PyTorch loop for one device. gan_lite.py is the same loop with Lite:

    torchrun --nproc-per-node=2 examples/gan_lite.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lite import Lite
from torch.utils.data import DataLoader

from digits_model import load_data
from gan_model import NOISE, Discriminator, Generator, as_text
from run_options import parse_arguments, record


def main() -> None:
    args = parse_arguments(__doc__, epochs=40, batch_size=32)
    lite = Lite(**args.settings)
    lite.seed_everything(args.seed)
    noise_source = torch.Generator(lite.device).manual_seed(args.seed)

    loader = DataLoader(load_data()[0], batch_size=args.batch_size, shuffle=True)
    loader = lite.setup_dataloaders(loader)
    generator, discriminator = Generator(), Discriminator()
    g_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    d_optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    generator, g_optimizer = lite.setup(generator, g_optimizer)
    discriminator, d_optimizer = lite.setup(discriminator, d_optimizer)

    losses = []
    for epoch in range(args.epochs):
        for real, _ in loader:
            # All ranks draw the noise of the whole batch, and each takes its part: as one process would have it.
            sizes = lite.all_gather(torch.tensor([len(real)]), cat=True).tolist()
            noise = torch.randn(sum(sizes), NOISE, generator=noise_source, device=lite.device)
            fake = generator(noise.split(sizes)[lite.global_rank])

            # One forward and one backward over both halves: gradients are averaged over ranks once.
            logits = discriminator(torch.cat([real, fake.detach()]))
            is_real = torch.cat([torch.ones_like(logits[: len(real)]), torch.zeros_like(logits[len(real) :])])
            d_loss = F.binary_cross_entropy_with_logits(logits, is_real)
            d_optimizer.zero_grad()
            lite.backward(d_loss)
            d_optimizer.step()

            logits = discriminator(fake)
            g_loss = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))
            g_optimizer.zero_grad()
            lite.backward(g_loss)
            g_optimizer.step()
            losses += [d_loss.detach(), g_loss.detach()]

        if (epoch + 1) % 10 == 0 or epoch + 1 == args.epochs:
            lite.print(f"epoch {epoch + 1}: discriminator loss {d_loss.item():.3f}, generator loss {g_loss.item():.3f}")

    with torch.no_grad():
        noise = torch.randn(5, NOISE, generator=noise_source, device=lite.device)
        lite.print(as_text(generator(noise)))
    record(args.losses, losses, generator, discriminator)


if __name__ == "__main__":
    main()
