"""Generate from text to int16 samples in host memory, by our engines and by diffusers' pipeline, on random weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sa3_bench import random_dit, random_same
from sa3_trt_core import shapes
from sa3_trt_core.audio import autoencoder
from sa3_trt_core.sampling import schedule
from sa3_trt_core.sampling.sampler import Conditioning, ping_pong
from sa3_trt_core.sampling.upload import UploadedNoise
from sa3_trt_core.targets import DITS, find_dit
from sa3_trt_core.torch_models.dit import weights as dit_weights
from sa3_trt_core.torch_models.dit.model import Dit
from sa3_trt_core.torch_models.dit.runner import Runner
from sa3_trt_core.torch_models.same import weights as same_weights
from sa3_trt_core.torch_models.same.runner import DecoderRunner
from sa3_trt_core.torch_models.t5gemma import weights as text_weights
from sa3_trt_core.torch_models.t5gemma.model import Encoder

STEPS = 8
USED_TOKENS = 40
Mark = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """One random model of medium's (or a tiny) size on a device, as diffusers modules."""

    dit: Any
    autoencoder: Any
    device: torch.device
    tiny: bool

    @classmethod
    def make(cls, device: torch.device, tiny: bool) -> Subject:
        """Return random weights from fixed seeds."""
        sizes = (random_dit.SMALL, random_same.SMALL) if tiny else (random_dit.MEDIUM, random_same.MEDIUM)
        dit = random_dit.random_module(sizes[0], device)
        return cls(dit, random_same.random_autoencoder(sizes[1], device), device, tiny)

    @property
    def bytes(self) -> int:
        """Return the size of the modules on the device, in bytes; memory peaks exclude it."""
        return sum(value.nbytes for part in (self.dit, self.autoencoder) for value in part.state_dict().values())

    def packed_dit(self, precision: str) -> dit_weights.Packed:
        """Return the DiT as a packed network on the device."""
        packed = random_dit.packed_of(self.dit.float(), precision)
        return dit_weights.Packed(packed.sizes, _copied(packed.tensors))

    def packed_decoder(self, precision: str) -> same_weights.Packed:
        """Return the decoder as a packed network on the device."""
        packed = random_same.packed_decoder(self.autoencoder.float(), precision)
        return same_weights.Packed(packed.sizes, _copied(packed.tensors))

    def packed_text(self) -> text_weights.Packed:
        """Return a text encoder as a packed network on the device."""
        return random_same.random_text_encoder(1 if self.tiny else 12, self.device, 100 if self.tiny else 256_000)


def frames_of(seconds: float) -> tuple[int, int]:
    """Return the latent frames of the noise, and those that the DiT and the decoder run on."""
    frames = shapes.latent_frames(seconds)
    return frames, shapes.valid_frames(seconds, frames)


class Ours:
    """Our engines in one precision of the DiT (fp8 or fp16mixed) and one of the decoder (fp16 or fp8)."""

    def __init__(self, subject: Subject, precision: str, decoder_precision: str, tune: bool = True) -> None:
        """`tune`: measure the kernels' tile sizes on this GPU instead of using those of an H100."""
        self.device = subject.device
        packed, decoder = subject.packed_dit(precision), subject.packed_decoder(decoder_precision)
        tables, text = (packed.tensor("cosine"), packed.tensor("sine")), subject.packed_text()
        if self.device.type == "cuda":
            from sa3_trt_core.torch_models.dit import autotune as dit_tiles
            from sa3_trt_core.torch_models.dit.triton_ops import FusedOps
            from sa3_trt_core.torch_models.same import autotune as same_tiles
            from sa3_trt_core.torch_models.same.triton_ops import TritonOps
            from sa3_trt_core.torch_models.t5gemma.triton_ops import TritonOps as TextTritonOps

            self._runner = Runner(
                Dit(packed, FusedOps(*tables, dit_tiles.tuned(packed.sizes, self.device))), self.device
            )
            self.tiles = same_tiles.tuned(decoder) if tune else None
            self.decoder = DecoderRunner(decoder, TritonOps(decoder.rates, self.tiles), self.device)
            self._text = Encoder(text, TextTritonOps(text), self.device)
        else:
            from sa3_trt_core.torch_models.dit.reference_ops import PlainOps
            from sa3_trt_core.torch_models.same.reference_ops import ReferenceOps
            from sa3_trt_core.torch_models.t5gemma.reference_ops import ReferenceOps as TextReferenceOps

            self._runner = Runner(Dit(packed, PlainOps(*tables)), self.device)
            self.decoder = DecoderRunner(decoder, ReferenceOps(decoder.rates), self.device)
            self._text = Encoder(text, TextReferenceOps(text), self.device)

    def velocity(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Return the velocity of a batch, as an engine does."""
        conditioning = {"t5_hidden": cond.t5_hidden, "t5_mask": cond.t5_mask, "seconds_total": cond.seconds_total,
                "local_add_cond": cond.local_add_cond}  # fmt: skip
        return self._runner.velocity(x, t, conditioning).clone()

    def generate(self, seconds: float, seed: int, mark: Mark | None = None) -> Tensor:
        """Return int16 samples (N, 2) in host memory; `mark(stage)` is called after each stage."""
        mark = mark or _unmarked
        frames, valid = frames_of(seconds)
        noise = UploadedNoise([seed], shapes.LATENT_CHANNELS, frames, valid, self.device.type)
        ids, mask = token_ids(seed)
        hidden = self._text.hidden_states(ids, mask).cpu()
        mark("text")
        cond = Conditioning(hidden, mask.float(), torch.tensor([seconds]), torch.zeros(1, shapes.LOCAL_CHANNELS, valid))
        latents = ping_pong(self, noise, schedule.sigmas(STEPS), cond)
        mark("sample")
        required = autoencoder.required_frames(seconds, valid, find_dit(DITS[0]).reach)
        samples = self.decoder.pcm(latents[..., :required].contiguous())[0, : shapes.output_samples(seconds)]
        mark("decode")
        return samples

    def release(self) -> None:
        """Free graphs and cached conditioning; the next call rebuilds them."""
        self._runner.close()
        self.decoder.close()
        self._text.close()

    def close(self) -> None:
        """Free the same as `release`; the weights are freed with the object."""
        self.release()


class Pipeline:
    """diffusers' StableAudio3Pipeline in fp16, eager or with compiled transformer and decoder blocks."""

    def __init__(self, subject: Subject, compiled: bool) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler, StableAudio3Pipeline
        from diffusers.pipelines.stable_audio_3.modeling_stable_audio_3 import StableAudio3DurationEmbedder
        from transformers import T5GemmaConfig, T5GemmaEncoderModel

        self.device = subject.device
        part = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 12,
                "head_dim": 64, "num_hidden_layers": 1 if subject.tiny else 12, "vocab_size": 1000}  # fmt: skip
        config = T5GemmaConfig(encoder=part, decoder={**part, "cross_attention_hidden_size": 768}, vocab_size=1000)
        config.is_encoder_decoder = False
        with torch.device(self.device):
            self._text = T5GemmaEncoderModel(config).half().eval()
            duration = StableAudio3DurationEmbedder(output_dim=768, min_val=0, max_val=384).half()
        self._pipe = StableAudio3Pipeline(
            vae=subject.autoencoder.half(), transformer=subject.dit.half(),
            text_encoder=self._text, tokenizer=None, duration_embedder=duration,
            scheduler=FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        )  # fmt: skip
        self._pipe.set_progress_bar_config(disable=True)
        if compiled:
            for block in (*self._pipe.transformer.transformer_blocks, *self._pipe.vae.decoder.blocks[0].transformers):
                block.compile(dynamic=False)

    def generate(self, seconds: float, seed: int, mark: Mark | None = None) -> Tensor:
        """Return int16 samples (N, 2) in host memory, of the same number of latent frames as ours."""
        mark = mark or _unmarked
        _, valid = frames_of(seconds)
        ids, mask = (value.to(self.device) for value in token_ids(seed))
        hidden = self._text(input_ids=ids, attention_mask=mask).last_hidden_state
        mark("text")
        beyond = valid * shapes.SAMPLES_PER_FRAME / shapes.SAMPLE_RATE - seconds
        latents = self._pipe(
            prompt_embeds=hidden, encoder_attention_mask=mask, duration=seconds, num_inference_steps=STEPS,
            silence_padding_duration=math.nextafter(beyond, 0.0), output_type="latent", return_dict=False,
            generator=torch.Generator(self.device).manual_seed(seed),
        )[0]  # fmt: skip
        mark("sample")
        audio = self._pipe.vae.decode(latents).sample[0, :, : shapes.output_samples(seconds)].clamp(-1.0, 1.0)
        samples: Tensor = torch.round(audio.float() * 32767.0).to(torch.int16).t().contiguous().cpu()
        mark("decode")
        return samples

    def release(self) -> None:
        """Do nothing: the code compiled for a length is kept."""

    def close(self) -> None:
        """Free the compiled code."""
        torch.compiler.reset()


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies, so that a module that changes its precision does not change them."""
    return {name: value.detach().clone() for name, value in tensors.items()}


def token_ids(seed: int) -> tuple[Tensor, Tensor]:
    """Return token ids and mask (1, 256) of an artificial prompt."""
    ids = torch.randint(1, 100, (1, shapes.TEXT_TOKENS), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(shapes.TEXT_TOKENS) < USED_TOKENS).long()[None]
    return ids * mask, mask


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the libraries' deprecation warnings, in inference mode."""
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        yield


def decoder_snr(subject: Subject, ours: Ours, frames: int) -> float:
    """Return the SNR in dB of our decoder's 16-bit samples against diffusers' module in fp32 on random latents."""
    latents = torch.randn(1, shapes.LATENT_CHANNELS, frames, generator=torch.Generator().manual_seed(4))
    with quiet():
        module = subject.autoencoder.float()
        reference = module.decode(latents.to(subject.device)).sample[0].t().clamp(-1.0, 1.0).double().cpu()
        samples = ours.decoder.pcm(latents)[0].double().cpu() / 32767.0
    return float(10 * torch.log10(reference.square().sum() / (reference - samples).square().sum()))


def _unmarked(stage: str) -> None:
    pass
