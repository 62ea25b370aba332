"""What the autoencoder is trained to keep: the waveform, and its spectra at several resolutions."""

from __future__ import annotations

import torch

RESOLUTIONS = (4096, 1024, 256)  # samples of a window; hops are a quarter
FLOOR = 1e-5
WAVEFORM_WEIGHT = 4.0


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """Losses of audio (B, 2, N): "spectrum", "waveform" and their weighted sum "total".

    Spectrum: the mean over resolutions of the spectral convergence and of the mean absolute log-magnitude difference
    (Yamamoto et al. 2020, Parallel WaveGAN, equations 4 and 5), on left, right, middle and side. Waveform: the mean
    squared error over the target's power.
    """
    out, wanted = with_middle_and_side(output), with_middle_and_side(target)
    spectrum = torch.stack([_spectral(out, wanted, size) for size in RESOLUTIONS]).mean()
    waveform = (output - target).square().mean() / target.square().mean().clamp_min(FLOOR)
    return {"spectrum": spectrum, "waveform": waveform, "total": spectrum + WAVEFORM_WEIGHT * waveform}


def with_middle_and_side(audio: torch.Tensor) -> torch.Tensor:
    """(B, 2, N) -> (B * 4, N): left, right, middle, side."""
    left, right = audio[:, 0], audio[:, 1]
    return torch.stack([left, right, (left + right) / 2, (left - right) / 2], dim=1).flatten(0, 1)


def _spectral(out: torch.Tensor, wanted: torch.Tensor, size: int) -> torch.Tensor:
    window = torch.hann_window(size, device=out.device)

    def magnitude(audio: torch.Tensor) -> torch.Tensor:
        spectrum = torch.stft(audio, size, size // 4, window=window, return_complex=True)
        return (torch.view_as_real(spectrum).square().sum(-1) / size + FLOOR**2).sqrt()

    ours, theirs = magnitude(out), magnitude(wanted)
    convergence = (ours - theirs).norm() / theirs.norm().clamp_min(FLOOR)
    return convergence + (torch.log(ours + FLOOR * 100) - torch.log(theirs + FLOOR * 100)).abs().mean()
