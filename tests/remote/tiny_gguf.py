"""The embedded base as an F32 GGUF, tokenizer included, and llama.cpp's server for it on a free loopback port."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

NORMAL, CONTROL = 1, 3  # kinds of tokens


def convert(folder: Path, out: Path) -> Path:
    """Write a Llama checkpoint with a byte-level BPE tokenizer, in float32."""
    import gguf

    config = json.loads((folder / "config.json").read_text())
    layers, heads, groups = (config[key] for key in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads"))
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _tokenizer(writer, json.loads((folder / "tokenizer.json").read_text()), config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    for name, weight in load_file(folder / "model.safetensors").items():
        array = weight.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            array = _interleaved(array, heads if "q_proj" in name else groups)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _tokenizer(writer, described: dict, config: dict) -> None:
    tokens, kinds = [f"<unused{i}>" for i in range(config["vocab_size"])], [NORMAL] * config["vocab_size"]
    for token, i in described["model"]["vocab"].items():
        tokens[i] = token
    for added in described["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")  # GPT-2's pattern with digits one by one, as the embedded family has it
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in described["model"]["merges"]])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_add_bos_token(False)


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp rotates them: the two halves of each head in turns."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


@contextmanager
def served(path: Path, slots: int = 8) -> Generator[str]:
    """The address of a llama.cpp server with float32 keys and values, one thread."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = str(path), {"tiny"}
    params.n_parallel, params.n_ctx, params.port = slots, slots * 512, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup, params.verbosity = False, -1
    server = xllamacpp.Server(params)
    yield server.listening_address
    del server
