"""Train a generator of handwritten digits against a discriminator: two networks and two optimizers in one module.

gan_raw.py is a plain PyTorch loop for one device, gan_lite.py the same loop with Lite. Here the Trainer has it, and the
module steps its optimizers by hand:

    torchrun --nproc-per-node=2 examples/gan_trainer.py
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lite.trainer import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader

from digits_model import load_data
from gan_model import NOISE, Discriminator, Generator, as_text
from run_options import parse_arguments, record


class GAN(LightningModule):
    """Both networks, their losses, and how they take turns."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = Generator(), Discriminator()
        self.seed = seed
        self.losses: list[Tensor] = []

    def on_fit_start(self) -> None:
        self.noise_source = torch.Generator(self.device).manual_seed(self.seed)

    def draw_noise(self, size: int) -> Tensor:
        """All ranks draw the noise of the whole batch, and each takes its part: as one process would have it."""
        sizes = self.all_gather(torch.tensor([size])).flatten().tolist()
        noise = torch.randn(sum(sizes), NOISE, generator=self.noise_source, device=self.device)
        return noise.split(sizes)[self.global_rank].to(self.dtype)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real = batch[0].to(self.dtype)
        g_optimizer, d_optimizer = self.optimizers()
        fake = self.generator(self.draw_noise(len(real)))

        # One forward and one backward over both halves: gradients are averaged over ranks once.
        self.toggle_optimizer(d_optimizer)
        logits = self.discriminator(torch.cat([real, fake.detach()]))
        is_real = torch.cat([torch.ones_like(logits[: len(real)]), torch.zeros_like(logits[len(real) :])])
        d_loss = F.binary_cross_entropy_with_logits(logits, is_real)
        d_optimizer.zero_grad()
        self.manual_backward(d_loss)
        d_optimizer.step()
        self.untoggle_optimizer(d_optimizer)

        self.toggle_optimizer(g_optimizer)
        logits = self.discriminator(fake)
        g_loss = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))
        g_optimizer.zero_grad()
        self.manual_backward(g_loss)
        g_optimizer.step()
        self.untoggle_optimizer(g_optimizer)
        self.losses += [d_loss.detach(), g_loss.detach()]

    def on_train_epoch_end(self) -> None:
        epoch = self.current_epoch + 1
        if epoch % 10 == 0 or epoch == self.trainer.max_epochs:
            d_loss, g_loss = self.losses[-2:]
            self.print(f"epoch {epoch}: discriminator loss {d_loss.item():.3f}, generator loss {g_loss.item():.3f}")

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        networks = (self.generator, self.discriminator)
        return [torch.optim.Adam(network.parameters(), lr=1e-3, betas=(0.5, 0.999)) for network in networks]


def main() -> None:
    args = parse_arguments(__doc__, epochs=40, batch_size=32)
    seed_everything(args.seed)

    loader = DataLoader(load_data()[0], batch_size=args.batch_size, shuffle=True)
    module = GAN(args.seed)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=args.epochs, enable_checkpointing=False, **quiet, **args.settings)
    trainer.fit(module, loader)

    with torch.no_grad():
        noise = torch.randn(5, NOISE, generator=module.noise_source, device=module.device)
        trainer.print(as_text(module.generator(noise.to(module.dtype))))
    record(args.losses, module.losses, module.generator, module.discriminator)


if __name__ == "__main__":
    main()
