"""Writes the goldens of the GGUF importer: small files, and what transformers and gguf make of them.

    python trainer/src/gguf/golden/gen.py       # in the environment of trainer/tests/golden/make_venv.py

    blocks.json     for each storage type random blocks, and the fp32 numbers `gguf` unpacks from them, as bits
    NAME.gguf       a random model of one block, with the tokenizer of one family
    NAME.json       what transformers reads from that file: config, SHA-256 of each weight rounded to bf16, and
                    tokens of texts by the family's own tokenizer (transformers' class where it has one)

The files are written with the package `gguf`, whose table translates the tensor names.
"""

import hashlib
import json
import logging
from pathlib import Path

import gguf
import gguf.quants
import numpy
import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen2Tokenizer, Qwen3Config
from transformers.integrations.gguf.gguf_tokenizer_mapping import _LLAMA3_SPLIT

HERE = Path(__file__).parent
SEED = 20261124
Type = gguf.GGMLQuantizationType

# Where a block keeps its fp16 scales: they must be sane numbers, every other byte may be anything.
SCALES = {
    Type.F32: None, Type.F16: None, Type.BF16: None, Type.Q4_0: [0], Type.Q4_1: [0, 2], Type.Q5_0: [0], Type.Q5_1: [0, 2],
    Type.Q8_0: [0], Type.Q4_K: [0, 2], Type.Q5_K: [0, 2], Type.Q6_K: [208],
}

TEXTS = [
    "",
    "Hello world, the other one.",
    "  two  spaces, a\ttab\r\n\n and lines\n",
    "in 2026 there were 12345678 of them, ½ or ⅷ or ٣٤٥",
    "I'll say it's THEY'RE not we'd",
    "cafe\u0301 or café, naïve, 你好 мир שלום हिन्दी",
    "👩‍👩‍👧‍👦 and \u200b\ufeff",
    "def f(x):\n    return x**2  # other\n",
    "<|start|>user\nhello<|end|>\n<|start|>",
    "<think>the</think> <tool>",
]
CORPUS = ["the other one said that there were others in the house and then they went to the other house"] * 8 + TEXTS
CONTROL = ["<|text|>", "<|start|>", "<|end|>"]
USER_DEFINED = ["<think>", "</think>"]
TEMPLATE = "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"

SHAPE = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, rms_norm_eps=1e-5,
)
WIDE_HEADS = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=128)
# name: config, storage type of the matrices, `tokenizer.ggml.pre`
MODELS = {
    "llama-smollm": (LlamaConfig(**SHAPE, rope_theta=1e5, tie_word_embeddings=True), Type.Q4_1, "smollm"),
    "llama-llama3": (LlamaConfig(**SHAPE, rope_theta=5e5), Type.Q8_0, "llama-bpe"),
    "qwen2": (Qwen2Config(**SHAPE), Type.Q5_0, "qwen2"),
    # Heads of 128: transformers does not read the width of heads from the file.
    "qwen3": (Qwen3Config(**SHAPE | WIDE_HEADS, tie_word_embeddings=True), Type.Q4_0, "qwen2"),
}


def main():
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    versions = {library.__name__: library.__version__ for library in (torch, transformers, numpy)}
    (HERE / "blocks.json").write_text(dumps({"gguf": "0.19.0", **versions, "types": blocks()}))
    for name, (config, storage, pre) in MODELS.items():
        tokenizer = learn(pre)
        write(HERE / f"{name}.gguf", config, storage, pre, tokenizer)
        (HERE / f"{name}.json").write_text(dumps({**versions, **read(f"{name}.gguf", tokenizer)}))


def dumps(value) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def blocks() -> list[dict]:
    random = numpy.random.default_rng(SEED)
    found = []
    for storage, scales in SCALES.items():
        elements, size = gguf.GGML_QUANT_SIZES[storage]
        if scales is None:
            values = random.standard_normal(8).astype(numpy.float32)
            data = gguf.quants.quantize(values, storage).view(numpy.uint8)
        else:
            data = random.integers(0, 256, (4, size), dtype=numpy.uint8)
            for at in scales:
                data[:, at : at + 2] = random.standard_normal((4, 1)).astype(numpy.float16).view(numpy.uint8)
            data = data.reshape(-1)
        values = gguf.quants.dequantize(data if scales else data.view(native(storage)), storage)
        bits = numpy.ascontiguousarray(values, dtype=numpy.float32).view(numpy.uint32).reshape(-1)
        found.append({
            "number": storage.value, "name": storage.name, "elements": elements, "bytes": size,
            "data": data.tobytes().hex(), "bits": bits.astype("<u4").tobytes().hex(),
        })
    return found


def native(storage):
    return {Type.F32: numpy.float32, Type.F16: numpy.float16}.get(storage, numpy.uint8)


def learn(pre: str) -> Tokenizer:
    """Learns merges with the family's splitting and returns the family's tokenizer with them."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    if pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    elif pre == "llama-bpe":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])
    else:
        empty = Qwen2Tokenizer().backend_tokenizer
        tokenizer.normalizer, tokenizer.pre_tokenizer = empty.normalizer, empty.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    if pre == "qwen2":
        learned = json.loads(tokenizer.to_str())["model"]
        merges = [tuple(merge) for merge in learned["merges"]]
        tokenizer = Qwen2Tokenizer(vocab=learned["vocab"], merges=merges, unk_token=None, eos_token=None, pad_token=None).backend_tokenizer
    tokenizer.add_special_tokens(CONTROL)
    tokenizer.add_tokens(USER_DEFINED)
    if pre == "llama-bpe":
        bos = CONTROL[0]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def write(path: Path, config, storage, pre: str, tokenizer: Tokenizer):
    torch.manual_seed(SEED)
    config.vocab_size = tokenizer.get_vocab_size()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    architecture = config.model_type
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if architecture == "qwen3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])]
    kinds = {token: gguf.TokenType.CONTROL for token in CONTROL} | {token: gguf.TokenType.USER_DEFINED for token in USER_DEFINED}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([kinds.get(token, gguf.TokenType.NORMAL) for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]])
    writer.add_bos_token_id(tokens.index(CONTROL[0]))
    writer.add_eos_token_id(tokens.index(CONTROL[2]))
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map({"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}[architecture], 1)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = value.numpy()
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        kind = storage if value.ndim == 2 else Type.F32
        value = numpy.ascontiguousarray(value)
        stored = value if kind == Type.F32 else gguf.quants.quantize(value, kind)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(file: str, tokenizer: Tokenizer) -> dict:
    config = AutoConfig.from_pretrained(HERE, gguf_file=file).to_dict()
    model = AutoModelForCausalLM.from_pretrained(HERE, gguf_file=file, dtype=torch.float32)
    weights = {
        name: hashlib.sha256(value.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()).hexdigest()
        for name, value in model.state_dict().items()
        if not (name == "lm_head.weight" and config["tie_word_embeddings"])
    }
    keys = [*SHAPE, "model_type", "vocab_size", "tie_word_embeddings"]
    return {
        "config": {key: config[key] for key in keys} | {"rope_theta": config["rope_parameters"]["rope_theta"]},
        "weights": weights,
        "texts": [{"text": text, "tokens": tokenizer.encode(text).ids} for text in TEXTS],
    }


if __name__ == "__main__":
    main()
