"""Writes a Llama checkpoint with its vocabulary as a GGUF file, for llama.cpp. Runs in its environment, without torch.

Weights keep their number format; norms are float32, which llama.cpp asks for. Rows of query and key projections
change places within each head: llama.cpp rotates neighbouring elements where Hugging Face rotates halves.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peer_engines.peer_engine import EngineSetup


def gguf_path(setup: EngineSetup) -> Path:
    """Where the file for this checkpoint lies, beside what other engines made of it."""
    return setup.converted / "model-with-vocabulary.gguf"


def write_gguf(checkpoint: Path, file: Path) -> None:
    """From a checkpoint of one safetensors file in bfloat16 or float32."""
    import gguf  # type: ignore[import-not-found]

    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    _add_vocabulary(writer, checkpoint)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, weight in _tensors(checkpoint / "model.safetensors"):
        short = name.removesuffix(".weight")
        if short.endswith(("q_proj", "k_proj")):
            halves = weight.reshape(-1, 2, config["head_dim"] // 2, weight.shape[-1])
            weight = halves.swapaxes(1, 2).reshape(weight.shape)
        if weight.dtype == "uint16" and weight.ndim > 1:
            data, kind = weight.view("uint8"), gguf.GGMLQuantizationType.BF16
        else:
            data, kind = _as_float32(weight), gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{names.get_name(short)}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: Any, checkpoint: Path) -> None:
    """Of a byte-level tokenizer. A server needs it to write text; prompts are token ids, which it does not touch."""
    import gguf

    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    tokens = {token_id: token for token, token_id in tokenizer["model"]["vocab"].items()} | special
    end = next(iter(special))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokens[token_id] for token_id in range(len(tokens))])
    kinds = gguf.TokenType
    writer.add_token_types([kinds.CONTROL if token_id in special else kinds.NORMAL for token_id in range(len(tokens))])
    # llama.cpp refuses a list of no merges; this one never applies, for no text is split into special tokens.
    writer.add_token_merges(merges or [f"{special[end]} {special[end]}"])
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(False)


def _tensors(file: Path) -> Iterator[tuple[str, Any]]:
    """Names and arrays of a safetensors file; bfloat16, which numpy does not know, as uint16."""
    import numpy as np

    dtypes: dict[str, Any] = {"F32": np.float32, "BF16": np.uint16}
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    for name, entry in header.items():
        if name != "__metadata__":
            begin, stop = (end + offset for offset in entry["data_offsets"])
            yield name, np.frombuffer(content[begin:stop], dtypes[entry["dtype"]]).reshape(entry["shape"])


def _as_float32(weight: Any) -> Any:
    import numpy as np

    return (weight.astype(np.uint32) << 16).view(np.float32) if weight.dtype == np.uint16 else weight
