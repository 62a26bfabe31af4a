"""Write a GGUF of random weights at the OLMoE-1B-7B shape, for comparing speed with llama.cpp.

Which tensor gets which k-quant is llama.cpp's own choice: a narrow model of the same names and
layer count goes through ``llama_model_quantize``, and the wide one takes its types. The quantized
bytes are random with sane scales, so only speed can be measured, not text.

``python tests/bench/make_gguf.py Q2_K --out olmoe-q2_k.gguf`` (needs the extra ``bench``).
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

FILE_TYPES = {"Q2_K": 10, "Q3_K_S": 11, "Q4_K_M": 15}
"""llama.cpp's numbers of the file types (enum llama_ftype)."""

# Byte offsets of a block's float16 scales, and the value they get: weights of about 0.02.
_SCALES = {
    "Q2_K": ((80, 0.0015), (82, 0.002)),
    "Q3_K": ((108, 0.0003),),
    "Q4_K": ((0, 0.00008), (2, 0.0006)),
    "Q5_K": ((0, 0.00004), (2, 0.0006)),
    "Q6_K": ((208, 0.000012),),
}


EMBEDDING_GAIN = 1000
"""How much larger the token embedding is than other weights, whose products have about unit
variance. Without it attention's average of the context, which all tokens share, is nearly all
there is, and every token goes to the same experts."""


@dataclass(frozen=True)
class Shape:
    """Sizes of an OLMoE model."""

    hidden: int = 2048
    intermediate: int = 1024
    layers: int = 16
    experts: int = 64
    top_k: int = 8
    heads: int = 16
    vocabulary: int = 50304


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and numpy shapes (outputs first) of all tensors."""
    wide, narrow = shape.hidden, shape.intermediate
    yield "token_embd.weight", (shape.vocabulary, wide)
    for i in range(shape.layers):
        for name in ("attn_norm", "attn_q_norm", "attn_k_norm", "ffn_norm"):
            yield f"blk.{i}.{name}.weight", (wide,)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            yield f"blk.{i}.{name}.weight", (wide, wide)
        yield f"blk.{i}.ffn_gate_inp.weight", (shape.experts, wide)
        yield f"blk.{i}.ffn_gate_exps.weight", (shape.experts, narrow, wide)
        yield f"blk.{i}.ffn_up_exps.weight", (shape.experts, narrow, wide)
        yield f"blk.{i}.ffn_down_exps.weight", (shape.experts, wide, narrow)
    yield "output_norm.weight", (wide,)
    yield "output.weight", (shape.vocabulary, wide)


def writer_for(path: Path, shape: Shape) -> gguf.GGUFWriter:
    """A writer with the model's facts and a vocabulary of made-up tokens."""
    writer = gguf.GGUFWriter(path, "olmoe")
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.top_k)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("olmo")
    writer.add_token_list([f"t{i}" for i in range(shape.vocabulary)])
    writer.add_token_types([gguf.TokenType.NORMAL] * shape.vocabulary)
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    return writer


def types_chosen_by_llama(file_type: str, shape: Shape) -> dict[str, gguf.GGMLQuantizationType]:
    """The type of each tensor after llama.cpp has quantized a narrow model of the same names."""
    import llama_cpp

    narrow = Shape(
        hidden=256,
        intermediate=256,
        layers=shape.layers,
        experts=shape.experts,
        top_k=shape.top_k,
        heads=2,
        vocabulary=512,
    )
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "f16.gguf"), Path(folder, "quantized.gguf")
        writer = writer_for(source, narrow)
        rng = np.random.default_rng(0)
        for name, dimensions in tensors(narrow):
            dtype = np.float32 if len(dimensions) == 1 else np.float16
            values = rng.normal(scale=0.02, size=dimensions).astype(dtype)
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = FILE_TYPES[file_type]
        parameters.nthread = 2
        status = llama_cpp.llama_model_quantize(
            str(source).encode(), str(target).encode(), ctypes.byref(parameters)
        )
        if status != 0:
            raise SystemExit("llama_model_quantize failed")
        chosen = {t.name: t.tensor_type for t in gguf.GGUFReader(target).tensors}
    # What llama.cpp leaves alone (norms, routers) is float32 in published files.
    plain = gguf.GGMLQuantizationType.F32
    return {name: kind if kind.name in _SCALES else plain for name, kind in chosen.items()}


def random_blocks(
    count: int, kind: gguf.GGMLQuantizationType, rng: np.random.Generator, gain: float
) -> np.ndarray:
    """``[count, block bytes]`` of random codes under sane scales, times ``gain``."""
    _, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (count, nbytes), dtype=np.uint8)
    for offset, value in _SCALES[kind.name]:
        blocks[:, offset : offset + 2] = np.frombuffer(np.float16(gain * value).tobytes(), np.uint8)
    return blocks


def write(path: Path, file_type: str, shape: Shape, seed: int) -> None:
    """Write the file, one tensor's bytes in memory at a time."""
    kinds = types_chosen_by_llama(file_type, shape)
    rng = np.random.default_rng(seed)
    writer = writer_for(path, shape)
    for name, dimensions in tensors(shape):
        kind = kinds[name]
        if kind == gguf.GGMLQuantizationType.F32:
            nbytes = int(np.prod(dimensions)) * 4
            writer.add_tensor_info(name, dimensions, np.dtype(np.float32), nbytes)
            continue
        per_block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        row = dimensions[-1] // per_block * nbytes
        stored = (*dimensions[:-1], row)
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), int(np.prod(stored)), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, dimensions in tensors(shape):
        kind = kinds[name]
        if kind == gguf.GGMLQuantizationType.F32:
            values = np.ones(dimensions, np.float32)
            if len(dimensions) > 1:
                values = rng.normal(scale=0.02, size=dimensions).astype(np.float32)
            writer.write_tensor_data(values)
            continue
        per_block, _ = gguf.GGML_QUANT_SIZES[kind]
        count = int(np.prod(dimensions)) // per_block
        # One block of rows, repeated: making fresh random bytes for gigabytes takes minutes.
        gain = EMBEDDING_GAIN if name == "token_embd.weight" else 1
        part = random_blocks(min(count, 1 << 16), kind, rng, gain)
        repeats = -(-count // len(part))
        writer.write_tensor_data(np.tile(part, (repeats, 1))[:count].reshape(-1))
    writer.close()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("type", choices=sorted(FILE_TYPES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write(options.out, options.type, Shape(layers=options.layers), options.seed)
    print(f"{options.out}: {options.out.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
