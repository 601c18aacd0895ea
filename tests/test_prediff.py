"""PreDiff as a whole: what trains and what does not, and that a member follows from its seed alone."""

import dataclasses

import pytest
import torch

from earthformer.config import Attention, FeedForward, Scaling
from earthformer.constraint import Constraint
from earthformer.diffusion import Diffusion
from earthformer.forecasters import members_of
from earthformer.latents import FrameAutoencoder, matched
from earthformer.prediff import Guide, PreDiff, Sampling
from earthformer.prediff_config import (
    AlignmentConfig,
    AutoencoderConfig,
    DenoiserConfig,
    Functional,
    PreDiffConfig,
)

VIL = Scaling(scale=1 / 255)
RAIN = Scaling(kind="log", r0=1.0)
AUTOENCODER = AutoencoderConfig(
    frame=(16, 16, 1),
    widths=(8, 16),
    layers=1,
    latent_channels=4,
    groups=4,
    discriminator_layers=1,
    discriminator_width=8,
)
STEADY = {
    "attention": Attention(dropout=0.0, projection_dropout=0.0),
    "feed_forward": FeedForward(dropout=0.0),
    "dropout": 0.0,
}
DENOISER = DenoiserConfig(
    context=(3, 8, 8, 4), target=(2, 8, 8, 4), widths=(64,), depth=(1,), scale_shift=True, **STEADY
)
ALIGNMENT = AlignmentConfig(
    target=(2, 8, 8, 4), widths=(64,), depth=(1,), scale_shift=True, context_frames=3, **STEADY
)
SEEDS = torch.tensor([[3, 1, 4, 15, 9]])


def storms(count: int, frames: int, seed: int = 0) -> torch.Tensor:
    """Blobs that move to the right, encoded VIL, (B, T, 16, 16, 1)."""
    draw = torch.Generator().manual_seed(seed)
    x0, y0 = 16 * torch.rand(2, count, 1, 1, 1, generator=draw)
    t = torch.arange(frames)[None, :, None, None]
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    distance = (x - x0 - t).square() + (y - y0).square()
    return (250 * torch.exp(-distance / 8)).round().to(torch.uint8)[..., None]


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    fields = storms(4, 5)
    return {"context": fields[:, :3], "target": fields[:, 3:]}


def made(config: DenoiserConfig = DENOISER, seed: int = 0, **options) -> PreDiff:
    """A denoiser whose output is not the zero that it starts from."""
    torch.manual_seed(seed)
    prediff = PreDiff(PreDiffConfig(config, **options), AUTOENCODER, VIL)
    for network in (prediff.denoiser, prediff.ema.module):
        torch.manual_seed(seed + 1)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    prediff.sampling = Sampling("dpm++", 5)
    return prediff.eval()


def test_training_lowers_the_loss_and_leaves_the_autoencoder(batch):
    torch.manual_seed(0)
    prediff = PreDiff(PreDiffConfig(DENOISER, ema_decay=0.5), AUTOENCODER, VIL).train()
    encoder = [p.clone() for p in prediff.latents.parameters()]
    seeds = torch.arange(4)
    before = prediff.validation_loss(batch, seeds).mean()
    optimiser = torch.optim.AdamW([p for p in prediff.parameters() if p.requires_grad], lr=2e-3)
    for step in range(30):
        torch.manual_seed(step)
        prediff(batch, step).backward()
        optimiser.step()
        optimiser.zero_grad()
        prediff.after_step()
    assert prediff.validation_loss(batch, seeds).mean() < 0.8 * before
    assert int(prediff.ema.updates) == 30
    assert prediff.logvar.any()
    for now, then in zip(prediff.latents.parameters(), encoder, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("channels", [0, 4])
def test_latents_encoded_before_give_the_same_loss(batch, channels):
    prediff = made(dataclasses.replace(DENOISER, aligned_channels=channels))
    latents = prediff.encode(batch, torch.arange(4))
    assert ("aligned" in latents) == (channels > 0)
    losses = []
    for given in (batch, latents):
        torch.manual_seed(5)
        losses.append(prediff.loss(given))
    torch.testing.assert_close(*losses)


def test_a_validation_loss_is_the_windows_own(batch):
    prediff = made()
    seeds = torch.tensor([7, 8, 9, 10])
    whole = prediff.validation_loss(batch, seeds)
    alone = prediff.validation_loss({name: field[2:3] for name, field in batch.items()}, seeds[2:3])
    torch.testing.assert_close(alone[0], whole[2])
    assert len(set(whole.tolist())) == 4


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "unipc"])
def test_a_member_follows_from_its_seed(batch, sampler):
    prediff = made(normalise=True)
    prediff.sampling = Sampling(sampler, 5)
    context = batch["context"][:1]
    whole = prediff.forecast(context, SEEDS)
    assert whole.shape == (1, 5, 2, 16, 16, 1)
    assert whole.dtype == torch.float32
    order = [4, 2, 0, 1, 3]
    assert torch.equal(prediff.forecast(context, SEEDS[:, order]), whole[:, order])
    pairs = [part.fields for part in members_of(prediff, context, SEEDS, 2)]
    assert [part.shape[1] for part in pairs] == [2, 2, 1]
    torch.testing.assert_close(torch.cat(pairs, 1), whole, rtol=1e-3, atol=1e-2)
    spread = whole.std(1)
    assert (spread.mean() > 0.1).all()


def test_windows_are_forecast_alike_together_and_alone(batch):
    prediff = made()
    seeds = torch.tensor([[1, 2], [3, 4]])
    both = prediff.forecast(batch["context"][:2], seeds)
    assert torch.equal(prediff.forecast(batch["context"][1:2], seeds[1:])[0], both[1])


def test_the_context_is_encoded_once_a_forecast(batch, monkeypatch):
    prediff, calls = made(dataclasses.replace(DENOISER, aligned_channels=4)), []
    encode = prediff.latents.autoencoder.encode
    monkeypatch.setattr(
        prediff.latents.autoencoder, "encode", lambda frames: calls.append(frames.shape[1]) or encode(frames)
    )
    list(members_of(prediff, batch["context"][:1], SEEDS, 2))
    assert calls == [3, 2]  # the context, and what its motion makes of the target


def test_detail_of_the_moved_context_comes_back_as_far_as_it_lasts(batch):
    aligned = dataclasses.replace(DENOISER, aligned_channels=4)
    prediff, plain = made(aligned, detail=True), made(aligned)
    assert not prediff.detail_power.any()
    context = batch["context"][:1]
    torch.testing.assert_close(prediff.forecast(context, SEEDS), plain.forecast(context, SEEDS))
    prediff.validation_loss(batch, torch.arange(4))
    # Blobs that keep their shape: what is lost of them is where their motion takes it.
    weight = prediff.detail_cross / prediff.detail_power
    assert (weight > 0.5).all()
    latents = prediff.latents
    moved = latents.moved(context, 2, torch.zeros(1, 2))
    found = prediff.forecast(context, SEEDS) - plain.forecast(context, SEEDS)
    lost = moved - latents.autoencoder.decode(latents.autoencoder.encode(moved)[0])
    expected = 255 * weight.float().clamp(0, 1)[:, None, None, None] * lost
    torch.testing.assert_close(found, expected[:, None].expand_as(found), rtol=1e-3, atol=2e-2)
    with pytest.raises(ValueError, match=r"detail is True: needed denoiser.aligned_channels"):
        PreDiffConfig(DENOISER, detail=True)


def test_what_is_missing_counts_as_nothing_there_unless_all_is(batch):
    prediff = made()
    context = batch["context"][:1].clone()
    context[:, :, :4], filled = 255, context.clone()
    filled[:, :, :4] = 0
    assert torch.equal(prediff.forecast(context, SEEDS), prediff.forecast(filled, SEEDS))
    assert torch.isnan(prediff.forecast(torch.full_like(context, 255), SEEDS)).all()


def test_a_member_that_diverges_is_missing_and_the_others_are_not(batch):
    prediff = made(normalise=True)
    calm = prediff.forecast(batch["context"][:1], SEEDS)
    network = prediff.ema.module
    blown = network.forward

    def forward(z, t, context_latents, aligned=None):
        made_of = blown(z, t, context_latents, aligned)
        made_of[1] = 1e6
        return made_of

    network.forward = forward
    found = prediff.forecast(batch["context"][:1], SEEDS)
    assert torch.isnan(found[:, 1]).all()
    others = [0, 2, 3, 4]
    assert torch.equal(found[:, others], calm[:, others])


def test_guided_members_say_what_was_asked_and_what_they_made_of_it(batch):
    prediff, context = made(normalise=True), batch["context"][:1]
    torch.manual_seed(1)
    constraint = Constraint(dataclasses.replace(ALIGNMENT, normalise=True), AUTOENCODER, VIL).eval()
    plain = prediff.forecast(context, SEEDS)
    prediff.guide = Guide(constraint, deviations=4.0, strength=50.0)
    (found,) = members_of(prediff, context, SEEDS, 5)
    seen = context.float().mean((2, 3, 4)) / 255
    torch.testing.assert_close(found.requested, constraint.gaussian.level(seen, 4.0))
    torch.testing.assert_close(found.achieved, found.fields.mean((2, 3, 4, 5)) / 255)
    assert not torch.equal(found.fields, plain)
    prediff.guide = Guide(constraint, deviations=4.0, strength=0.0)
    (idle,) = members_of(prediff, context, SEEDS, 5)
    torch.testing.assert_close(idle.fields, plain)
    nothing = list(members_of(prediff, torch.full_like(context, 255), SEEDS, 2))
    assert [part.fields.shape[1] for part in nothing] == [2, 2, 1]
    assert all(torch.isnan(each).all() for part in nothing for each in (part.achieved, part.requested))


class Level(torch.nn.Module):
    """Reads the mean off latents, and keeps what it was shown."""

    def forward(self, z, t):
        self.seen = z.detach(), t
        return z.mean((1, 2, 3, 4))[:, None]


def test_residuals_are_guided_by_the_latents_that_they_stand_for(batch):
    prediff = made(dataclasses.replace(DENOISER, aligned_channels=4), residual=True)
    constraint = Constraint(ALIGNMENT, AUTOENCODER, VIL).eval()
    constraint.network = Level()
    prediff.guide = Guide(constraint, deviations=4.0, strength=2.0)
    latents = prediff.encode({name: field[:2] for name, field in batch.items()}, torch.arange(2))
    aligned, noise, wanted = latents["aligned"], torch.randn_like(latents["aligned"]), torch.full((2,), 9.0)
    bars = prediff.diffusion.alphas_cumprod
    for spread in (1.0, 0.3):
        prediff.residual_std.fill_(spread)
        for t in (100, 700):
            step = torch.full((2,), t)
            z = prediff.diffusion.q_sample(torch.zeros_like(noise), step, noise)
            gradient = prediff._guidance(aligned, wanted, z, step)
            seen, earlier = constraint.network.seen
            # Noise in the ratio to the signal that it has in what the residual is added to.
            ratio = spread * ((1 - bars[t]) / bars[t]).sqrt()
            torch.testing.assert_close(seen, bars[earlier].sqrt() * (aligned + ratio * noise))
            found = ((1 - bars[earlier]) / bars[earlier]).sqrt()
            torch.testing.assert_close(found[0], ratio, rtol=0.02, atol=0)
            assert int(earlier) == t if spread == 1.0 else int(earlier) < t
            slope = -2.0 * spread * (bars[earlier] / bars[t]).sqrt() / noise[0].numel()
            torch.testing.assert_close(gradient, slope.expand_as(gradient))


@pytest.mark.parametrize("residual", [False, True])
def test_guidance_goes_no_further_than_to_what_is_requested(batch, residual):
    prediff = made(dataclasses.replace(DENOISER, aligned_channels=4), residual=residual)
    prediff.residual_std.fill_(0.4)
    constraint = Constraint(ALIGNMENT, AUTOENCODER, VIL).eval()
    network = constraint.network = Level()
    prediff.guide = Guide(constraint, deviations=4.0, strength=1e9)
    latents = prediff.encode({name: field[:2] for name, field in batch.items()}, torch.arange(2))
    aligned, z, step = latents["aligned"], torch.randn_like(latents["aligned"]), torch.full((2,), 600)
    wanted = torch.tensor([0.3, -0.2])
    diffusion = prediff.diffusion
    shift = diffusion.guidance_coef[600] * prediff._guidance(aligned, wanted, z, step)
    # Clean latents that are shifted by so much shift those of the step by their share of signal.
    prediff._guidance(aligned, wanted, z - diffusion.alphas_cumprod[600].sqrt() * shift, step)
    torch.testing.assert_close(network(*network.seen)[:, 0], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["mean", "area", "maximum"])
def test_the_constraint_learns_any_functional(batch, kind):
    torch.manual_seed(0)
    config = dataclasses.replace(ALIGNMENT, functional=Functional(kind, threshold=0.5))
    constraint = Constraint(config, AUTOENCODER, VIL).train()
    seeds = torch.arange(4)
    before = constraint.validation_loss(batch, seeds).mean()
    optimiser = torch.optim.AdamW([p for p in constraint.parameters() if p.requires_grad], lr=3e-3)
    for step in range(30):
        torch.manual_seed(step)
        constraint(batch, step).backward()
        optimiser.step()
        optimiser.zero_grad()
    assert constraint.validation_loss(batch, seeds).mean() < before
    assert not any(p.grad is not None for p in constraint.latents.parameters())


def test_the_autoencoder_learns_frames_and_the_spread_of_its_latents(batch):
    torch.manual_seed(0)
    trainable = FrameAutoencoder(dataclasses.replace(AUTOENCODER, adversarial_start=3), VIL).train()
    assert len(trainable.parts()) == 2
    before = trainable.validation_loss(batch, torch.arange(4))
    assert before.shape == (4,)
    optimiser = torch.optim.AdamW(trainable.parameters(), lr=3e-3)
    for step in range(25):
        trainable(batch, step).backward()
        optimiser.step()
        optimiser.zero_grad()
    (sums,) = trainable.validation_sums()
    sums.zero_()
    assert trainable.validation_loss(batch, torch.arange(4)).mean() < 0.7 * before.mean()
    trainable.after_validation()
    mean, _ = trainable.autoencoder.encode(torch.cat([batch["context"], batch["target"]], 1) / 255)
    found, needed = trainable.latent_std, mean.flatten(0, 3).std(0, correction=0)
    torch.testing.assert_close(found, needed, rtol=1e-4, atol=1e-5)


def test_latents_that_do_not_fit_are_named():
    wide = dataclasses.replace(AUTOENCODER, latent_channels=8)
    with pytest.raises(ValueError, match=r"denoiser.target .* \(8, 8, 4\): needed \(8, 8, 8\)"):
        PreDiff(PreDiffConfig(DENOISER), wide, VIL)
    with pytest.raises(ValueError, match=r"target .* \(8, 8, 4\): needed \(8, 8, 8\)"):
        Constraint(ALIGNMENT, wide, VIL)
    with pytest.raises(ValueError, match="aligned_channels is 3: needed 0 or 4"):
        PreDiff(PreDiffConfig(dataclasses.replace(DENOISER, aligned_channels=3)), AUTOENCODER, VIL)


def test_rain_rates_are_never_negative(batch):
    torch.manual_seed(0)
    prediff = PreDiff(PreDiffConfig(DENOISER), AUTOENCODER, RAIN).eval()
    prediff.sampling = Sampling("ddim", 3)
    assert (prediff.forecast(batch["context"][:1].float() / 10, SEEDS) >= 0).all()


def test_each_member_drifts_by_its_own_seed_however_it_is_batched(batch):
    aligned = dataclasses.replace(DENOISER, aligned_channels=4)
    prediff = made(aligned, residual=True, drift=0.5)
    prediff.sampling = Sampling("ddim", 3)
    drift = prediff.drift(torch.arange(4000))
    assert drift.std().item() == pytest.approx(0.5, rel=0.05)
    assert drift.mean().abs() < 0.03
    noise = torch.stack([torch.randn(2, generator=torch.Generator().manual_seed(s)) for s in range(4000)])
    assert (drift.T @ noise / 4000).abs().max() < 0.05
    # Without any residual a member is the context along its motion and its drift.
    prediff.residual_std.zero_()
    context = batch["context"][:1]
    whole = prediff.forecast(context, SEEDS)
    latents = prediff.latents
    moved = latents.moved(context.expand(5, *context.shape[1:]), 2, prediff.drift(SEEDS[0]))
    expected = latents.decode(latents.autoencoder.encode(moved)[0])
    torch.testing.assert_close(whole[0], expected, rtol=1e-4, atol=1e-2)
    assert (whole.std(1).mean((0, 2, 3, 4)).diff() > 0).all()
    singly = [part.fields for part in members_of(prediff, context, SEEDS.flip(1), 1)]
    torch.testing.assert_close(torch.cat(singly, 1).flip(1), whole, rtol=1e-4, atol=1e-2)
    with pytest.raises(ValueError, match=r"drift is 0.5: needed denoiser.aligned_channels"):
        PreDiffConfig(DENOISER, drift=0.5)


def test_matched_fields_have_the_values_of_one_and_the_order_of_the_other():
    fields, like = torch.randn(2, 3, 5, 4, 2), torch.rand(2, 3, 5, 4, 2)
    found = matched(fields, like)
    for b, t, c in ((0, 0, 0), (1, 2, 1)):
        order, given, made = (x[b, t, ..., c].flatten() for x in (fields, like, found))
        assert torch.equal(made.sort().values, given.sort().values)
        assert torch.equal(made.argsort(), order.argsort())
    assert torch.equal(matched(like, like), like)


def test_matched_members_have_the_values_of_their_moved_context(batch):
    aligned = dataclasses.replace(DENOISER, aligned_channels=4)
    prediff = made(aligned, drift=0.5, match=True)
    prediff.sampling = Sampling("ddim", 3)
    context = batch["context"][:1]
    found = prediff.forecast(context, SEEDS)[0]
    moved = prediff.latents.moved(context.expand(5, *context.shape[1:]), 2, prediff.drift(SEEDS[0]))
    values = (255 * moved).flatten(2).sort().values
    torch.testing.assert_close(found.flatten(2).sort().values, values, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(found, 255 * moved, atol=1)


def test_residuals_of_the_moved_context_start_with_the_right_spread(batch):
    prediff = made(dataclasses.replace(DENOISER, aligned_channels=4), residual=True)
    prediff.calibrate([{name: field[i : i + 2] for name, field in batch.items()} for i in (0, 2)])
    latents = prediff.encode(batch, torch.arange(4))
    residual = latents["target_mean"] - latents["aligned"]
    expected = residual.square().mean((0, 2, 3)).sqrt()
    torch.testing.assert_close(prediff.residual_std[:, 0, 0], expected)
    # A denoiser that knows nothing predicts latents of 0: the moved context itself.
    for parameter in prediff.ema.module.parameters():
        torch.nn.init.zeros_(parameter)
    still = dataclasses.replace(prediff.config.diffusion, prediction="sample")
    prediff.diffusion = Diffusion(still)
    found = prediff.forecast(batch["context"][:1], SEEDS)
    moved = prediff.latents.decode(latents["aligned"][:1])
    torch.testing.assert_close(found, moved[:, None].expand_as(found), rtol=1e-4, atol=1e-2)
    with pytest.raises(ValueError, match=r"residual is True: needed denoiser.aligned_channels"):
        PreDiffConfig(DENOISER, residual=True)
