"""The demonstration model as one trainable module: text encoder, duration embedder and DiT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from sa3_build.export import load_modules as native
from sa3_build.export.model_config import Geometry, load_geometry
from sa3_demo.checkpoint import model_config
from sa3_demo.text_encoder import DemoSize, text_config, write_tokenizer
from sa3_trt_core.artifacts import files
from sa3_trt_core.shapes import TEXT_TOKENS

# Byte-level BPE writes a space as a dotted G. Other bytes become <unk>, which saves 161 rows of the embedding.
PRINTABLE = tuple("\u0120" + "".join(map(chr, range(33, 127))))


class DemoModel(nn.Module):
    """Velocity (B, 256, L) from noisy latents and token ids; its parts are those of the native checkpoint."""

    def __init__(self, geometry: Geometry, size: DemoSize, vocabulary: int) -> None:
        from diffusers import StableAudio3DiTModel
        from transformers import T5GemmaEncoderModel

        super().__init__()
        sizes = geometry.dit
        self.dit: Any = StableAudio3DiTModel(
            io_channels=sizes.io_channels, embed_dim=sizes.embed_dim, depth=sizes.depth, num_heads=sizes.num_heads,
            cond_token_dim=sizes.cond_token_dim, global_cond_dim=sizes.global_cond_dim,
            local_add_cond_dim=sizes.local_add_cond_dim, ff_mult=sizes.ff_mult,
            num_memory_tokens=sizes.num_memory_tokens, use_differential_attention=sizes.differential,
        )  # fmt: skip
        native.use_native_numerics(self.dit)
        self.duration = native.build_duration_embedder(geometry.conditioner)
        config = text_config(size, vocabulary)
        config.is_encoder_decoder = False
        config._attn_implementation = config.encoder._attn_implementation = "eager"
        self.text: Any = T5GemmaEncoderModel(config)

    def context(
        self, ids: torch.Tensor, mask: torch.Tensor, seconds: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens (B, 257, 768) for cross-attention and the duration vector (B, 768).

        ids, mask (B, T) with T of at most 256; missing positions are padding, which the model replaces.
        """
        hidden = self.text(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        padding = self.dit.prompt_padding_embedding
        text = torch.where(mask.unsqueeze(-1) > 0, hidden, padding)
        padding_tokens = padding.expand(len(ids), TEXT_TOKENS - ids.shape[1], -1)
        duration = self.duration(seconds).float()
        return torch.cat([text, padding_tokens, duration.unsqueeze(1)], dim=1), duration

    def velocity(
        self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor, duration: torch.Tensor, local: torch.Tensor
    ) -> torch.Tensor:
        """Return the DiT's velocity (B, 256, L), fp32; `local` is local_add_cond (B, 257, L)."""
        output: torch.Tensor = self.dit(
            x, t, encoder_hidden_states=context, global_hidden_states=duration, local_add_cond=local, return_dict=False
        )[0]
        return output.float()

    def guided(
        self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor, duration: torch.Tensor, local: torch.Tensor,
        guidance: float,
    ) -> torch.Tensor:  # fmt: skip
        """Return the classifier-free guided velocity, in one forward of 2B rows.

        The cross-attention tokens of the unconditional rows are zero.
        """
        both = self.velocity(
            torch.cat([x, x]), torch.cat([t, t]), torch.cat([context, torch.zeros_like(context)]),
            torch.cat([duration, duration]), torch.cat([local, local]),
        )  # fmt: skip
        with_text, without = both.chunk(2)
        return without + guidance * (with_text - without)


def geometry_of(size: DemoSize, folder: Path) -> Geometry:
    """Return the geometry of a demo size, read from the config file of such a checkpoint."""
    import json

    path = folder / native.CONFIG_FILE
    files.write_atomic_text(path, json.dumps(model_config(size), indent=2) + "\n")
    return load_geometry(path)


def tokenizer_of(folder: Path, texts: list[str], vocabulary: int) -> Any:
    """Return the tokenizer in `folder`, a `tokenizers.Tokenizer`; trains one on `texts` if the folder has none."""
    import tempfile

    from tokenizers import Tokenizer

    kept = folder / "tokenizer.json"
    if not kept.is_file():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            write_tokenizer(Path(scratch) / "t", texts, vocabulary, PRINTABLE)
            files.write_atomic_bytes(kept, (Path(scratch) / "t" / kept.name).read_bytes())
    return Tokenizer.from_file(str(kept))


def token_batch(tokenizer: Any, texts: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask (N, length) int64, right-padded; longer texts are truncated."""
    rows = [row.ids[:length] for row in tokenizer.encode_batch(texts)]
    ids = torch.stack([functional.pad(torch.tensor(row), (0, length - len(row))) for row in rows])
    mask = torch.stack([torch.arange(length) < len(row) for row in rows]).long()
    return ids, mask
