"""all-MiniLM-L6-v2, a sentence-embedding transformer, on bare arrays: 6 BERT layers of width 384.

The model is Wang et al., "MiniLM", 2020, fine-tuned by sentence-transformers; the layers are those of Devlin et al.,
"BERT", 2018. How a linear layer multiplies is the caller's choice: that is what the demo compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from arrays import Array, Arrays
from safetensors.numpy import load_file
from tokenizers import Tokenizer

LAYERS = 6
HEADS = 12
MAX_TOKENS = 256
LAYER_NORM_EPS = 1e-12

# x [rows, K], the layer's name -> x @ weight.T [rows, N]
Multiply = Callable[[Array, str], Array]


class MiniLM:
    """Weights and tokenizer from a folder in the format of sentence-transformers."""

    def __init__(self, folder: Path, arrays: Arrays) -> None:
        self.arrays = arrays
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(MAX_TOKENS)
        self.tokenizer.enable_padding()
        weights = load_file(folder / "model.safetensors")
        self.vectors = {name: arrays.put(w) for name, w in weights.items() if not name.endswith("dense.weight")}
        self.linears: dict[str, Array] = {}  # weights [N, K] by the names that `multiply` gets
        for i in range(LAYERS):
            layer = f"encoder.layer.{i}"
            # One product makes queries, keys and values.
            for kind in ("weight", "bias"):
                parts = [weights[f"{layer}.attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
                (self.linears if kind == "weight" else self.vectors)[f"{layer}.qkv" + ".bias" * (kind == "bias")] = (
                    arrays.put(np.concatenate(parts))
                )
            for short, long in (("out", "attention.output"), ("up", "intermediate"), ("down", "output")):
                self.linears[f"{layer}.{short}"] = arrays.put(weights[f"{layer}.{long}.dense.weight"])
                self.vectors[f"{layer}.{short}.bias"] = self.vectors[f"{layer}.{long}.dense.bias"]

    def tokenize(self, sentences: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and mask, [sentences, tokens] each."""
        encodings = self.tokenizer.encode_batch(list(sentences))
        return np.array([e.ids for e in encodings]), np.array([e.attention_mask for e in encodings], np.float32)

    def embed(self, sentences: Iterable[str], multiply: Multiply) -> tuple[np.ndarray, list[np.ndarray]]:
        """Unit vectors [sentences, 384], and the hidden states of real tokens [tokens, 384] after every layer."""
        xp = self.arrays.xp
        ids, token_mask = self.tokenize(sentences)
        mask = self.arrays.put(token_mask)
        real = token_mask.reshape(-1) > 0

        x = self.vectors["embeddings.word_embeddings.weight"][self.arrays.put(ids)]
        x = x + self.vectors["embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = x + self.vectors["embeddings.token_type_embeddings.weight"][0]
        x = self._layer_norm(x.reshape(-1, x.shape[-1]), "embeddings.LayerNorm")

        hidden = []
        for i in range(LAYERS):
            x = self._layer(x, mask, f"encoder.layer.{i}", multiply)
            hidden.append(self.arrays.get(x)[real])

        x = x.reshape(*ids.shape, -1) * mask[:, :, None]
        mean = x.sum(axis=1) / mask.sum(axis=1)[:, None]
        norm = xp.sqrt((mean * mean).sum(axis=-1))
        return self.arrays.get(mean / norm[:, None]), hidden

    def _layer(self, x: Array, mask: Array, layer: str, multiply: Multiply) -> Array:
        def linear(y: Array, name: str) -> Array:
            return multiply(y, f"{layer}.{name}") + self.vectors[f"{layer}.{name}.bias"]

        attended = self._attention(linear(x, "qkv"), mask)
        x = self._layer_norm(x + linear(attended, "out"), f"{layer}.attention.output.LayerNorm")
        return self._layer_norm(x + linear(self._gelu(linear(x, "up")), "down"), f"{layer}.output.LayerNorm")

    def _attention(self, qkv: Array, mask: Array) -> Array:
        xp = self.arrays.xp
        sentences, tokens = mask.shape
        # [sentences, heads, tokens, width] each
        q, k, v = (xp.swapaxes(qkv.reshape(sentences, tokens, 3, HEADS, -1)[:, :, i], 1, 2) for i in range(3))
        scores = q @ xp.swapaxes(k, 2, 3) / q.shape[-1] ** 0.5 + (mask[:, None, None, :] - 1) * 1e9
        weights = xp.exp(scores - xp.amax(scores, axis=-1, keepdims=True))
        weights = weights / weights.sum(axis=-1, keepdims=True)
        return xp.swapaxes(weights @ v, 1, 2).reshape(sentences * tokens, -1)

    def _layer_norm(self, x: Array, name: str) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = (centred * centred).mean(axis=-1, keepdims=True)
        scale, shift = self.vectors[f"{name}.weight"], self.vectors[f"{name}.bias"]
        return centred / self.arrays.xp.sqrt(variance + LAYER_NORM_EPS) * scale + shift

    def _gelu(self, x: Array) -> Array:
        """x * Phi(x). NumPy has no erf: Abramowitz and Stegun 7.1.26, within 1.5e-7 of it."""
        xp = self.arrays.xp
        z = xp.abs(x) * 0.5**0.5
        t = 1 / (1 + 0.3275911 * z)
        series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
        half_tail = 0.5 * series * xp.exp(-z * z)  # 1 - Phi(|x|)
        return x * xp.where(x < 0, half_tail, 1 - half_tail)
