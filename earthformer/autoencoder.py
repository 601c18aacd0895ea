"""The frame-wise autoencoder of PreDiff (Gao et al., 2023, Sec. 3.1) and the losses that train it.

The network is diffusers' `AutoencoderKL`. Fields are (B, T, H, W, C); networks see each frame as
(N, C, H, W) in channels-last memory, which is the field itself, seen through a permutation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from earthformer.config import need
from earthformer.prediff_config import AutoencoderConfig

LOGVAR_RANGE = (-30.0, 20.0)
CHUNK_NUMBERS = {"cpu": 2**22, "cuda": 2**28}
"""Without gradients, frames go through a few at a time: so many numbers in a map of the widest level."""
_HIGHEST_WEIGHT = 1e4


class Autoencoder(nn.Module):
    """Frames to latents and back, each frame by itself; neither output is clipped."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        # Importing diffusers takes seconds, which only those who need it should spend.
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        self.config = config
        levels = len(config.widths)
        self.network = AutoencoderKL(
            in_channels=config.frame[2],
            out_channels=config.frame[2],
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=config.widths,
            layers_per_block=config.layers,
            latent_channels=config.latent_channels,
            norm_num_groups=config.groups,
            scaling_factor=1.0,
        )
        _settle_strides(self)

    def encode(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (B, T, h, w, c) of the latents of `frames` (B, T, H, W, C).

        Frames of any size whose latents are whole pixels, such as parts of the configured frame.

        Raises:
            ValueError: `frames` is of another number of channels, or of such a size.
        """
        _need_fields("frames", frames, self.config.frame[2], self.config.reduction)
        network = self.network
        moments = self._frame_wise(lambda x: network.quant_conv(network.encoder(x)), frames)
        mean, logvar = moments.chunk(2, dim=-1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def decode(self, latents: Tensor) -> Tensor:
        """Frames (B, T, H, W, C) of `latents` (B, T, h, w, c).

        Raises:
            ValueError: `latents` is of another number of channels.
        """
        _need_fields("latents", latents, self.config.latent_channels, 1)
        network = self.network
        return self._frame_wise(lambda z: network.decoder(network.post_quant_conv(z)), latents)

    def _frame_wise(self, function: Callable[[Tensor], Tensor], fields: Tensor) -> Tensor:
        h, w, _ = self.config.frame
        images = _images(fields)
        limit = CHUNK_NUMBERS.get(images.device.type, CHUNK_NUMBERS["cuda"])
        count = max(1, limit // (h * w * self.config.widths[0]))
        if torch.is_grad_enabled() or len(images) <= count:
            made = function(images)
        else:
            made = torch.cat([function(part) for part in torch.split(images, count)])
        return _fields(made, fields.shape[0])


def posterior_sample(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """Latents drawn from their posterior with the given standard normal noise; the shape kept."""
    return mean + torch.exp(0.5 * logvar) * noise


def posterior_kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """Divergence of each frame's posterior (B, T, h, w, c) from the standard normal: (B, T)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((2, 3, 4))


class Discriminator(nn.Module):
    """PatchGAN: for each patch of a frame, above 0 where it looks real and below where it does not."""

    def __init__(self, channels: int, width: int, layers: int) -> None:
        """`layers` beside the first halve H and W, the last of them excepted."""
        super().__init__()
        stack: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, padding=1), nn.LeakyReLU(0.2, True)]
        before = width
        for layer in range(1, layers + 1):
            after = width * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            stack += [
                nn.Conv2d(before, after, 4, stride, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.LeakyReLU(0.2, True),
            ]
            before = after
        self.main = nn.Sequential(*stack, nn.Conv2d(before, 1, 4, 1, padding=1))
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)
                nn.init.zeros_(module.bias)
        _settle_strides(self)

    def forward(self, frames: Tensor) -> Tensor:
        """Logits (B, T, h, w, 1) of `frames` (B, T, H, W, C)."""
        return _fields(self.main(_images(frames)), frames.shape[0])


@dataclass(frozen=True)
class Losses:
    """The terms of one step, all scalars; those of the discriminator are 0 before it counts.

    Sums over the pixels of a frame are averaged over the frames.
    """

    rec: Tensor
    """Mean absolute error of a pixel."""
    nll: Tensor
    """Sum of the absolute (and perceptual) errors."""
    kl: Tensor
    g_loss: Tensor
    """Minus the mean logit of the reconstruction."""
    d_weight: Tensor
    """What makes `g_loss` weigh on the last layer as `nll` does."""
    generator: Tensor
    """The autoencoder's loss: no gradient of it reaches the discriminator."""
    discriminator: Tensor
    """The discriminator's hinge loss: no gradient of it reaches the autoencoder."""
    logits_real: Tensor
    logits_fake: Tensor

    @property
    def total(self) -> Tensor:
        """Both losses: one backward pass gives every parameter the gradient of its own."""
        return self.generator + self.discriminator


Perceptual = Callable[[Tensor, Tensor], Tensor]


def losses(
    frames: Tensor,
    reconstruction: Tensor,
    mean: Tensor,
    logvar: Tensor,
    config: AutoencoderConfig,
    discriminator: nn.Module | None,
    last_layer: Tensor,
    perceptual: Perceptual | None = None,
) -> Losses:
    """The terms of a reconstruction (B, T, H, W, C) from a sample of the posterior (B, T, h, w, c).

    Args:
        discriminator: None before it counts; it then is not run.
        last_layer: the weight that made `reconstruction`; the adversarial weight is 0 without its gradient.
        perceptual: distance (B, T, 1, 1, 1) of frames, for a `config.perceptual_weight` above 0.
    """
    count = frames.shape[0] * frames.shape[1]
    reconstruction = reconstruction.float()
    error = (frames - reconstruction).abs()
    rec = error.mean()
    if perceptual is not None:
        error = error + config.perceptual_weight * perceptual(frames, reconstruction)
    nll = error.sum() / count
    kl = posterior_kl(mean.float(), logvar.float()).mean()
    generator = nll + config.kl_weight * kl
    zero = torch.zeros_like(rec)
    if discriminator is None:
        return Losses(rec, nll, kl, zero, zero, generator, zero, zero, zero)
    held = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    g_loss = -functional_call(discriminator, held, (reconstruction,)).float().mean()
    d_weight = config.adversarial_weight * _balance(nll, g_loss, last_layer)
    real = discriminator(frames).float()
    fake = discriminator(reconstruction.detach()).float()
    hinge = 0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())
    generator = generator + d_weight * g_loss
    return Losses(rec, nll, kl, g_loss, d_weight, generator, hinge, real.mean(), fake.mean())


def _balance(nll: Tensor, g_loss: Tensor, last_layer: Tensor) -> Tensor:
    if not g_loss.requires_grad:
        return torch.zeros_like(g_loss)
    (wanted,), (found,) = (torch.autograd.grad(x, last_layer, retain_graph=True) for x in (nll, g_loss))
    balance: Tensor = torch.linalg.vector_norm(wanted) / (torch.linalg.vector_norm(found) + 1e-4)
    return balance.clamp(0, _HIGHEST_WEIGHT).detach()


class AutoencoderTraining(nn.Module):
    """The autoencoder and its discriminator, trained together by one optimiser."""

    def __init__(self, config: AutoencoderConfig) -> None:
        """Both start from random weights.

        Raises:
            ValueError: frames too small for the discriminator; perceptual loss without what it needs.
        """
        super().__init__()
        self.config = config
        smallest = 3 * 2**config.discriminator_layers
        needed = f"H and W from {smallest} for a discriminator of {config.discriminator_layers} layers"
        seen = config.frame[:2] if config.crop is None else (config.crop, config.crop)
        need(min(seen) >= smallest, "frame" if config.crop is None else "crop", seen, needed)
        self.autoencoder = Autoencoder(config)
        self.discriminator = Discriminator(
            config.frame[2], config.discriminator_width, config.discriminator_layers
        )
        self._perceptual = lpips(config.frame[2]) if config.perceptual_weight > 0 else None

    def parts(self) -> tuple[nn.Module, ...]:
        """The modules whose gradients are clipped each by itself."""
        return self.autoencoder, self.discriminator

    def forward(self, batch: dict[str, Tensor], step: int) -> Tensor:
        """The loss: data parallelism wraps a module's `forward`."""
        return self.loss(batch, step)

    def loss(self, batch: dict[str, Tensor], step: int) -> Tensor:
        """Scalar loss of `frames` (B, T, H, W, C), about 0-1 and nowhere missing, after `step` steps."""
        return self.losses(batch["frames"], step).total

    def losses(self, frames: Tensor, step: int) -> Losses:
        """The terms of the loss, of one sample of the posterior.

        Raises:
            ValueError: `frames` is not of the configured shape.
        """
        mean, logvar = self.autoencoder.encode(frames)
        latents = posterior_sample(mean, logvar, torch.randn_like(mean))
        counts = self.config.adversarial_weight > 0 and step >= self.config.adversarial_start
        return losses(
            frames,
            self.autoencoder.decode(latents),
            mean,
            logvar,
            self.config,
            self.discriminator if counts else None,
            self.autoencoder.network.decoder.conv_out.weight,
            self._perceptual,
        )


def lpips(channels: int) -> Perceptual:
    """The learned perceptual distance (Zhang et al., 2018) of frames of so many channels, by VGG-16.

    Raises:
        ValueError: neither 1 nor 3 channels; its package or its weights are not installed.
    """
    need(channels in (1, 3), "frame channels", channels, "1 or 3 for a perceptual_weight above 0")
    try:
        from lpips import LPIPS

        network: Any = LPIPS(net="vgg", verbose=False)
    except (ImportError, OSError) as error:
        raise ValueError(
            f"perceptual_weight above 0 needs LPIPS ({error}): needed the packages lpips and torchvision, "
            "and torchvision's weights of VGG-16"
        ) from error
    network.requires_grad_(False).eval()

    def distance(frames: Tensor, reconstruction: Tensor) -> Tensor:
        pair = [_images(2 * x - 1).expand(-1, 3, -1, -1) for x in (frames, reconstruction)]
        return _fields(network.to(frames.device)(*pair), frames.shape[0])

    return distance


def _settle_strides(module: nn.Module) -> None:
    """Where a weight is channels-last either way, take the strides that its gradient has.

    Data parallelism warns of others. All other weights stay as they are: convolutions follow their input.
    """
    for parameter in module.parameters():
        if parameter.ndim == 4 and parameter.is_contiguous(memory_format=torch.channels_last):
            parameter.data = parameter.data.to(memory_format=torch.channels_last)


def _images(fields: Tensor) -> Tensor:
    return fields.flatten(0, 1).permute(0, 3, 1, 2)


def _fields(images: Tensor, batch: int) -> Tensor:
    return torch.unflatten(images.permute(0, 2, 3, 1), 0, (batch, -1))


def _need_fields(name: str, fields: Tensor, channels: int, multiple: int) -> None:
    whole = fields.ndim == 5 and all(n % multiple == 0 for n in fields.shape[2:4])
    if not whole or fields.shape[-1] != channels:
        size = f", H and W multiples of {multiple}" if multiple > 1 else ""
        raise ValueError(f"{name} has shape {tuple(fields.shape)}: needed (B, T, H, W, {channels}){size}")
