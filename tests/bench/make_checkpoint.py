"""Write a random Mixture-of-Experts checkpoint of a named shape, in little memory.

    python tests/bench/make_checkpoint.py olmoe-1b-7b --out build/olmoe [--layers 16] [--seed 0]

The folder looks like a Hugging Face checkpoint: sharded safetensors with the key names of the
published models, an index, config.json, generation_config.json and the tokenizer of
tests/assets/tiny-moe (4,096 tokens, all of them inside every shape's vocabulary).

Weights are bfloat16. A matrix is cut from one pool of normal numbers at an offset of its own and
every row is multiplied by a gain of its own (random sign, 0.75 to 1.25), so no two experts are
alike and making them costs little more than writing them.

Shape letters: H hidden size, I expert width, E experts, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

TOKENIZER = Path(__file__).resolve().parents[1] / "assets" / "tiny-moe"
POOL_ELEMENTS = 1 << 24  # 32 MiB
CHUNK_ELEMENTS = 1 << 21  # 4 MiB are made and written at a time
SHARD_BYTES = 4_900_000_000
BF16_BYTES = 2
EMBEDDING_STD = 8.0
"""Attention adds to every token nearly the same average of the context, in every layer. Under an
embedding of unit variance it outgrows what tells the tokens apart, and they all go to the same
experts: 31 of 64 serve 40 random tokens in the last layer, all 64 with this."""


@dataclass(frozen=True)
class Shape:
    """What the named models differ in; the rest of config.json is the same for both families."""

    family: str  # "olmoe" or "mixtral"
    hidden: int
    layers: int
    experts: int
    top_k: int
    intermediate: int
    vocab: int
    heads: int
    kv_heads: int
    context: int
    rope_theta: float
    bos: int | None
    eos: int
    pad: int | None


SHAPES = {
    "tiny": Shape(
        family="mixtral",
        hidden=64,
        layers=2,
        experts=4,
        top_k=2,
        intermediate=96,
        vocab=4096,
        heads=4,
        kv_heads=2,
        context=512,
        rope_theta=1e4,
        bos=0,
        eos=0,
        pad=None,
    ),
    "olmoe-1b-7b": Shape(
        family="olmoe",
        hidden=2048,
        layers=16,
        experts=64,
        top_k=8,
        intermediate=1024,
        vocab=50304,
        heads=16,
        kv_heads=16,
        context=4096,
        rope_theta=1e4,
        bos=None,
        eos=50279,
        pad=1,
    ),
    "mixtral-8x7b": Shape(
        family="mixtral",
        hidden=4096,
        layers=32,
        experts=8,
        top_k=2,
        intermediate=14336,
        vocab=32000,
        heads=32,
        kv_heads=8,
        context=32768,
        rope_theta=1e6,
        bos=1,
        eos=2,
        pad=None,
    ),
}


@dataclass(frozen=True)
class Tensor:
    """One tensor to write: a matrix [out, in], or a norm's weight [size]."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of values."""
        return self.shape[0] * (self.shape[1] if len(self.shape) == 2 else 1)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.numel * BF16_BYTES


def config(shape: Shape) -> dict[str, object]:
    """The config.json of a shape, as the published model of its family words it."""
    common: dict[str, object] = {
        "attention_dropout": 0.0,
        "bos_token_id": shape.bos,
        "eos_token_id": shape.eos,
        "pad_token_id": shape.pad,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.context,
        "num_attention_heads": shape.heads,
        "num_experts_per_tok": shape.top_k,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "output_router_logits": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocab,
    }
    if shape.family == "olmoe":
        own: dict[str, object] = {
            "architectures": ["OlmoeForCausalLM"],
            "model_type": "olmoe",
            "attention_bias": False,
            "clip_qkv": None,
            "norm_topk_prob": False,
            "num_experts": shape.experts,
            "router_aux_loss_coef": 0.01,
        }
    else:
        own = {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_local_experts": shape.experts,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
        }
    return {**own, **common}


def tensors(shape: Shape) -> Iterator[Tensor]:
    """All tensors of a shape in file order, under the published models' names."""
    hidden, width = shape.hidden, shape.intermediate  # H, I
    kv = hidden // shape.heads * shape.kv_heads
    yield Tensor("model.embed_tokens.weight", (shape.vocab, hidden))
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        yield Tensor(f"{prefix}.input_layernorm.weight", (hidden,))
        for name, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            yield Tensor(f"{prefix}.self_attn.{name}_proj.weight", (rows, hidden))
        if shape.family == "olmoe":
            yield Tensor(f"{prefix}.self_attn.q_norm.weight", (hidden,))
            yield Tensor(f"{prefix}.self_attn.k_norm.weight", (kv,))
            block, names = f"{prefix}.mlp", ("gate_proj", "up_proj", "down_proj")
        else:
            block, names = f"{prefix}.block_sparse_moe", ("w1", "w3", "w2")
        yield Tensor(f"{prefix}.post_attention_layernorm.weight", (hidden,))
        yield Tensor(f"{block}.gate.weight", (shape.experts, hidden))  # the router, [E, H]
        gate, up, down = names
        for expert in range(shape.experts):
            yield Tensor(f"{block}.experts.{expert}.{gate}.weight", (width, hidden))
            yield Tensor(f"{block}.experts.{expert}.{up}.weight", (width, hidden))
            yield Tensor(f"{block}.experts.{expert}.{down}.weight", (hidden, width))
    yield Tensor("model.norm.weight", (hidden,))
    yield Tensor("lm_head.weight", (shape.vocab, hidden))


def split(all_tensors: list[Tensor], shard_bytes: int) -> list[list[Tensor]]:
    """Group tensors, in order, into shards of at most `shard_bytes` (one tensor at least)."""
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in all_tensors:
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


class Weights:
    """Makes the values of one tensor after the other, a few rows at a time."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.pool = torch.randn(POOL_ELEMENTS, generator=self.random, dtype=torch.bfloat16)

    def chunks(self, tensor: Tensor) -> Iterator[bytes]:
        """Yield the little-endian bytes of a tensor in order, CHUNK_ELEMENTS values or fewer each.

        Matrices have a standard deviation of about 1 / sqrt(in), so that activations keep their
        size through the layers; norms are near 1; the embedding is EMBEDDING_STD times larger.
        """
        if len(tensor.shape) == 1:
            values = 1 + 0.1 * torch.randn(tensor.shape[0], generator=self.random)
            yield little_endian(values.to(torch.bfloat16))
            return
        rows, cols = tensor.shape
        std = EMBEDDING_STD if "embed_tokens" in tensor.name else cols**-0.5
        step = max(1, CHUNK_ELEMENTS // cols)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            offset = int(
                torch.randint(POOL_ELEMENTS - count * cols, (1,), generator=self.random).item()
            )
            gain = 0.75 + 0.5 * torch.rand(count, 1, generator=self.random)
            sign = 1 - 2 * torch.randint(2, (count, 1), generator=self.random)
            block = self.pool[offset : offset + count * cols].view(count, cols)
            yield little_endian(block * (std * gain * sign).to(torch.bfloat16))


def little_endian(values: torch.Tensor) -> bytes:
    """The bytes of a bfloat16 tensor as safetensors wants them."""
    return values.view(torch.int16).numpy().astype("<i2", copy=False).tobytes()


def write_shard(path: Path, shard: list[Tensor], weights: Weights) -> None:
    """Write one safetensors file: header length, JSON header, then the tensors one by one."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        begin, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts 8-byte aligned, as the format asks
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in shard:
            for chunk in weights.chunks(tensor):
                file.write(chunk)


def make_checkpoint(
    name: str,
    out: Path,
    *,
    layers: int | None = None,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write the checkpoint and return its number of parameters.

    Args:
        name: one of SHAPES.
        out: the folder, made if absent; files of an earlier run are replaced.
        layers: number of layers, the shape's own if None.
        seed: the same seed gives the same bytes (for one torch version).
        shard_bytes: the most bytes of tensors in one file.
    """
    shape = SHAPES[name]
    if layers is not None:
        shape = replace(shape, layers=layers)
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("model*.safetensors*"):
        old.unlink()
    everything = list(tensors(shape))
    shards = split(everything, shard_bytes)
    weights = Weights(seed)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        write_shard(out / file_name, shard, weights)
        weight_map.update({tensor.name: file_name for tensor in shard})
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in everything)
        write_json(
            out / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )
    ids = {"bos_token_id": shape.bos, "eos_token_id": shape.eos, "pad_token_id": shape.pad}
    write_json(out / "config.json", config(shape))
    write_json(out / "generation_config.json", {"_from_model_config": True, **ids})
    for file_name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / file_name, out / file_name)
    return sum(tensor.numel for tensor in everything)


def write_json(path: Path, content: dict[str, object]) -> None:
    """Write an indented JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Read the command line and write one checkpoint."""
    parser = argparse.ArgumentParser(description="write a random checkpoint of a named shape")
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--layers", type=int, help="fewer (or more) layers than the model has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES)
    arguments = parser.parse_args()
    if arguments.layers is not None and arguments.layers < 1:
        parser.error("--layers must be at least 1")
    started = time.perf_counter()
    parameters = make_checkpoint(
        arguments.shape,
        arguments.out,
        layers=arguments.layers,
        seed=arguments.seed,
        shard_bytes=arguments.shard_bytes,
    )
    seconds = time.perf_counter() - started
    print(
        f"{arguments.out}: {parameters / 1e6:,.1f} M parameters, "
        f"{parameters * BF16_BYTES / 1e9:.2f} GB in {seconds:.1f} s",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
