"""Reconstruction losses of the autoencoder: waveform, and spectra at several resolutions."""

from __future__ import annotations

import torch

RESOLUTIONS = (4096, 1024, 256)  # samples of a window; hops are a quarter
FLOOR = 1e-5
WAVEFORM_WEIGHT = 4.0


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the losses of audio (B, 2, N): "spectrum", "waveform" and their weighted sum "total".

    Spectrum: the mean over resolutions of spectral convergence and mean absolute log-magnitude difference (Yamamoto et
    al. 2020, Parallel WaveGAN, equations 4 and 5), on left, right, middle and side. Waveform: the mean squared error
    over the target's power.
    """
    output_channels, target_channels = with_middle_and_side(output), with_middle_and_side(target)
    spectrum = torch.stack([_spectral(output_channels, target_channels, size) for size in RESOLUTIONS]).mean()
    waveform = (output - target).square().mean() / target.square().mean().clamp_min(FLOOR)
    return {"spectrum": spectrum, "waveform": waveform, "total": spectrum + WAVEFORM_WEIGHT * waveform}


def with_middle_and_side(audio: torch.Tensor) -> torch.Tensor:
    """Return left, right, middle and side of stereo audio: (B, 2, N) -> (B * 4, N)."""
    left, right = audio[:, 0], audio[:, 1]
    return torch.stack([left, right, (left + right) / 2, (left - right) / 2], dim=1).flatten(0, 1)


def _spectral(output: torch.Tensor, target: torch.Tensor, size: int) -> torch.Tensor:
    window = torch.hann_window(size, device=output.device)

    def magnitude(audio: torch.Tensor) -> torch.Tensor:
        spectrum = torch.stft(audio, size, size // 4, window=window, return_complex=True)
        return (torch.view_as_real(spectrum).square().sum(-1) / size + FLOOR**2).sqrt()

    output_magnitude, target_magnitude = magnitude(output), magnitude(target)
    convergence = (output_magnitude - target_magnitude).norm() / target_magnitude.norm().clamp_min(FLOOR)
    return (
        convergence
        + (torch.log(output_magnitude + FLOOR * 100) - torch.log(target_magnitude + FLOOR * 100)).abs().mean()
    )
