"""Writes the goldens that the Rust engine is compared with: tiny models, and what transformers and PEFT make of them.

    python trainer/tests/golden/gen.py            # writes trainer/tests/golden/data/
    python trainer/tests/golden/gen.py --check    # compares data/ with a fresh computation, writes nothing

One directory per family:
    config.json, model.safetensors   a random checkpoint, as `save_pretrained` writes it
    tokenizer.json, tokenizer_config.json   token 17 is the word "t17", so that the trainer itself can run on it
    golden.json                      rows, losses, LoRA settings (in the words of contract::LoraSettings), versions
    golden.safetensors               logits.ROW, grad.PARAMETER, rotary.{cos,sin}, full.PARAMETER (after training),
                                     CASE.start.TENSOR and CASE.end.TENSOR (adapters before and after training),
                                     CASE.logits (of the first row, after training)

Each row runs alone, without padding, in fp32 with eager attention, so that nothing here can share a mistake with
packing, masks or fused kernels. A loss is always the sum over target tokens divided by their count.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

import numpy
import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, CwmConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

DATA = Path(__file__).with_name("data")
SEED = 20261124
STEPS = 10
WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0
FULL_LEARNING_RATE = 2e-3
LORA_LEARNING_RATE = 5e-3
ROW_LENGTHS = [19, 7, 26, 12]
FAR_POSITIONS = [0, 1, 257, 4095, 15962, 131071]
PREFIX = "base_model.model."

SHAPE = dict(
    vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=512,
)  # Of a head's four wavelengths 6 stays, 167 is on the ramp, the others are stretched.
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=4096)
# Of a head's four wavelengths 6 and 63 stay, 628 is on the ramp, 6283 is stretched.
FAMILIES = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama3": LlamaConfig(**SHAPE | {"max_position_embeddings": 4096}, rope_parameters=LLAMA3),
    "llama-biases": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, head_dim=12),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "mistral-window": MistralConfig(**SHAPE, sliding_window=6),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen2-window": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "llama-yarn": LlamaConfig(**SHAPE | {"max_position_embeddings": 16384}, rope_parameters=YARN),
    "qwen2-dynamic": Qwen2Config(**SHAPE, rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0)),
    "cwm": CwmConfig(**SHAPE | {"max_position_embeddings": 16384}, head_dim=16, sliding_window=6),
}
# Full-parameter training is the same code in every family: one tied, one with every kind of parameter each.
FULL_TRAINED = ["llama", "llama-biases", "qwen3"]
LORA_TRAINED = ["llama", "llama3"]  # tied, untied


def lora(targets, saved=(), rslora=False, exclude=None, layers=()):
    """LoRA settings as the contract spells them."""
    spell = lambda names: {"pattern": names} if isinstance(names, str) else {"list": names}
    target_modules = "allLinear" if targets == "all-linear" else spell(targets)
    settings = dict(r=4, loraAlpha=16.0, loraDropout=0.0, targetModules=target_modules, modulesToSave=list(saved), useRslora=rslora)
    if exclude:
        settings["excludeModules"] = spell(exclude)
    if layers:
        settings["layersToTransform"] = list(layers)
    return settings


NINE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"]


LORA_CASES = {
    "all-linear": lora("all-linear"),
    "rslora": lora(["q_proj", "down_proj"], rslora=True),
    "embed_tokens": lora(["embed_tokens"]),
    "lm_head": lora(["lm_head"]),
    "embed_tokens-lm_head": lora(["embed_tokens", "lm_head"]),
    "saved-lm_head": lora(["v_proj"], saved=["lm_head"]),
    "saved-embed_tokens-lm_head": lora(["v_proj"], saved=["embed_tokens", "lm_head"]),
    "lm_head-saved-embed_tokens": lora(["lm_head"], saved=["embed_tokens"]),
    "embed_tokens-saved-lm_head": lora(["embed_tokens"], saved=["lm_head"]),
    "embed_tokens-lm_head-saved-norm": lora(["embed_tokens", "lm_head"], saved=["model.norm"]),
    "nine": lora(NINE),
    "nine-saved-embed_tokens-lm_head": lora(NINE, saved=["embed_tokens", "lm_head"]),
    "pattern": lora(r".*\.1\..*\.(q|v)_proj", exclude=["v_proj"]),
    "layers": lora(["self_attn.q_proj", "down_proj"], exclude="model.layers.1.mlp.*", layers=[1]),
}

# Settings whose targets are compared with those that PEFT finds; None where PEFT refuses them.
TARGET_CASES = [
    lora("all-linear"),
    lora("all-linear", exclude=["down_proj"]),
    lora("all-linear", saved=["lm_head"]),
    lora(NINE),
    lora(NINE, saved=["lm_head"]),
    lora(["self_attn.q_proj"]),
    lora(["layers.1.mlp.up_proj", "model.layers.0.self_attn.o_proj"]),
    lora(["proj"]),
    lora(["q_proj", "W_pack"]),
    lora(["q_proj", "mlp"]),
    lora(["input_layernorm"]),
    lora(["q_proj", "v_proj"], exclude=["self_attn.v_proj"]),
    lora(["q_proj", "v_proj"], exclude=r"model\.layers\.0\..*"),
    lora(["q_proj"], exclude=["q_proj"]),
    lora(["q_proj", "v_proj"], saved=["q_proj"]),
    lora(["q_proj", "lm_head"], layers=[1]),
    lora(["q_proj", "model.layers.0.mlp.up_proj"], layers=[1]),
    lora(r".*_proj"),
    lora(r".*_proj", exclude=r".*mlp.*"),
    lora(r"model\.layers\.(?!0\.)\d+\.self_attn\.[qk]_proj"),
    lora(r"lm_head|model\.embed_tokens"),
    lora(r"q_proj"),
    lora(r".*self_attn.*"),
    lora(r".*norm"),
    lora(r".*q_proj", layers=[1]),
]


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--check", action="store_true", help="compare with the committed goldens instead of writing")
    options = arguments.parse_args()
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.disable_progress_bar()
    if not options.check:
        for name in FAMILIES:
            generate(name, DATA / name)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        problems = []
        for name in FAMILIES:
            generate(name, Path(scratch) / name)
            problems += differences(DATA / name, Path(scratch) / name)
    print("\n".join(problems) or f"{len(FAMILIES)} families agree with {DATA}")
    return 1 if problems else 0


def generate(name: str, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(SEED + list(FAMILIES).index(name))
    make_checkpoint(FAMILIES[name], directory, random)
    rows = make_rows(random)

    facts = {
        "generator": "python trainer/tests/golden/gen.py",
        "versions": {"transformers": transformers.__version__, "peft": peft.__version__, "torch": torch.__version__.split("+")[0]},
        "seed": SEED,
        "rows": rows,
        "farPositions": FAR_POSITIONS,
        "training": {
            "steps": STEPS, "rowsOfStep": [rows_of_step(step) for step in range(STEPS)],
            "weightDecay": WEIGHT_DECAY, "maxGradNorm": MAX_GRAD_NORM,
        },
    }
    tensors = {}

    model = load(directory)
    with torch.no_grad():
        tensors |= {f"logits.{index}": logits(model, row) for index, row in enumerate(rows)}
    loss = mean_loss(model, rows)
    loss.backward()
    facts["loss"] = loss.item()
    tensors |= {f"grad.{key}": parameter.grad for key, parameter in model.named_parameters()}
    cos, sin = rotary(model)
    tensors |= {"rotary.cos": cos, "rotary.sin": sin}

    if name in FULL_TRAINED:
        model = load(directory)
        facts["full"] = train(model, rows, FULL_LEARNING_RATE)
        tensors |= {f"full.{key}": parameter.detach() for key, parameter in model.named_parameters()}
    if name in LORA_TRAINED:
        facts["lora"] = {}
        for case, settings in LORA_CASES.items():
            facts["lora"][case], adapters = train_lora(directory, settings, rows, random)
            tensors |= {f"{case}.{key}": tensor for key, tensor in adapters.items()}
        facts["targets"] = [{"settings": settings, "modules": targets_of(directory, settings)} for settings in TARGET_CASES]

    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, directory / "golden.safetensors")
    (directory / "golden.json").write_text(json.dumps(facts) + "\n")


def make_checkpoint(config, directory: Path, random: torch.Generator) -> None:
    """Saves a model none of whose parameters sits at a degenerate start: no unit norm, no zero bias."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=random)
        if name.endswith("bias"):
            value = 0.2 * noise
        elif parameter.ndim == 1:
            value = 1 + 0.2 * noise
        else:
            value = 1.2 * noise / math.sqrt(parameter.shape[1])
        parameter.data.copy_(value)
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink()

    words = {f"t{token}": token for token in range(SHAPE["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "t1", "eos_token": "t2", "unk_token": "t0"}
    (directory / "tokenizer_config.json").write_text(json.dumps(special) + "\n")


def load(directory: Path):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")


def make_rows(random: torch.Generator) -> list[dict]:
    """Rows of random tokens whose targets have gaps, as turns of a conversation make them."""
    rows = []
    for length in ROW_LENGTHS:
        tokens = torch.randint(0, SHAPE["vocab_size"], (length,), generator=random)
        targets = torch.rand(length, generator=random) < 0.6
        targets[0], targets[-1] = False, True
        rows.append({"tokens": tokens.tolist(), "targets": targets.tolist()})
    return rows


def rows_of_step(step: int) -> list[int]:
    """Two rows of changing length: the divisor differs from step to step."""
    return [step % len(ROW_LENGTHS), (step + 1) % len(ROW_LENGTHS)]


def logits(model, row: dict) -> torch.Tensor:
    return model(input_ids=torch.tensor([row["tokens"]]), use_cache=False).logits[0]


def mean_loss(model, rows: list[dict]) -> torch.Tensor:
    total, count = 0.0, 0
    for row in rows:
        targets = torch.tensor(row["targets"])[1:]
        labels = torch.tensor(row["tokens"])[1:][targets]
        total = total + cross_entropy(logits(model, row)[:-1][targets], labels, reduction="sum")
        count += len(labels)
    return total / count


def train(model, rows: list[dict], learning_rate: float) -> dict:
    """Trains with torch's AdamW; as in the engine, only matrices decay.

    The norms before clipping are kept because Adam hides a gradient's scale.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": WEIGHT_DECAY},
            {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
        ],
        lr=learning_rate,
    )
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = mean_loss(model, [rows[index] for index in rows_of_step(step)])
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM).item())
        optimizer.step()
        losses.append(loss.item())
    return {"learningRate": learning_rate, "losses": losses, "gradNorms": norms}


def lora_config(settings: dict) -> LoraConfig:
    """The settings in PEFT's words."""
    spell = lambda names: names if names is None else names.get("pattern", names.get("list"))
    targets = settings["targetModules"]
    return LoraConfig(
        task_type="CAUSAL_LM", r=settings["r"], lora_alpha=settings["loraAlpha"], lora_dropout=settings["loraDropout"],
        target_modules="all-linear" if targets == "allLinear" else spell(targets),
        exclude_modules=spell(settings.get("excludeModules")), layers_to_transform=settings.get("layersToTransform"),
        modules_to_save=settings["modulesToSave"] or None, use_rslora=settings["useRslora"],
    )


def targets_of(directory: Path, settings: dict) -> list[str] | None:
    """The modules on which PEFT puts an adapter, or nothing if it refuses."""
    try:
        model = get_peft_model(load(directory), lora_config(settings))
    except ValueError:
        return None
    return sorted(name.removeprefix(PREFIX) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def train_lora(directory: Path, settings: dict, rows: list[dict], random: torch.Generator):
    """Trains an adapter with PEFT; returns the facts, and its tensors before and after by checkpoint name."""
    model = get_peft_model(load(directory), lora_config(settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            # Half of an adapter starts at zero, which would hide mistakes in the other half's gradient.
            width = parameter.shape[0 if "lora_embedding_B" in name else 1]
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=random) / math.sqrt(width))

    def adapter():
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
        return {key.removeprefix(PREFIX): tensor.detach().clone() for key, tensor in state.items()}

    start = {f"start.{key}": tensor for key, tensor in adapter().items() if "lora_" in key}
    trajectory = train(model, rows, LORA_LEARNING_RATE)
    end = {f"end.{key}": tensor for key, tensor in adapter().items()}
    with torch.no_grad():
        after = {"logits": logits(model, rows[0])}
    return {"settings": settings, "adapterConfig": adapter_config(model)} | trajectory, start | end | after


def adapter_config(model) -> dict:
    """The file PEFT would write, with its sets in a stable order and no path of this machine."""
    with tempfile.TemporaryDirectory() as scratch:
        model.peft_config["default"].save_pretrained(scratch)
        written = json.loads((Path(scratch) / "adapter_config.json").read_text())
    written["base_model_name_or_path"] = "golden"
    return {key: sorted(value) if isinstance(value, list) else value for key, value in written.items()}


def rotary(model) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin at far positions in f64, from the textbook formula; checked against transformers' fp32 frequencies."""
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    frequencies = rope["rope_theta"] ** -(numpy.arange(0, width, 2, dtype=numpy.float64) / width)
    if rope["rope_type"] == "llama3":
        original, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
        # How far a wavelength is from "long" (0) to "short" (1).
        ramp = numpy.clip((original * frequencies / (2 * math.pi) - low) / (high - low), 0, 1)
        frequencies = ((1 - ramp) / rope["factor"] + ramp) * frequencies
    scale = 1.0
    if rope["rope_type"] == "yarn":
        # Of arXiv 2309.00071: the pair that turns so often within the original context.
        pair = lambda turns: width * math.log(rope["original_max_position_embeddings"] / (2 * math.pi * turns)) / (2 * math.log(rope["rope_theta"]))
        low, high = max(math.floor(pair(32)), 0), min(math.ceil(pair(1)), width - 1)
        ramp = numpy.clip((numpy.arange(width // 2) - low) / (high - low), 0, 1)
        frequencies = (ramp / rope["factor"] + 1 - ramp) * frequencies
        scale = 0.1 * math.log(rope["factor"]) + 1
    assert math.isclose(model.model.rotary_emb.attention_scaling, scale), scale
    theirs = model.model.rotary_emb.inv_freq.double().numpy()
    assert numpy.allclose(frequencies, theirs, rtol=1e-6), (frequencies, theirs)
    angles = torch.from_numpy(numpy.outer(numpy.array(FAR_POSITIONS, dtype=numpy.float64), frequencies))
    return angles.cos() * scale, angles.sin() * scale


def differences(committed: Path, fresh: Path) -> list[str]:
    """What of a fresh computation is not in the committed files, up to rounding between machines."""
    problems = []
    old, new = (json.loads((directory / "golden.json").read_text()) for directory in (committed, fresh))
    measured = []
    for facts in (old, new):
        numbers = [facts.pop("loss")]
        for trajectory in [facts.get("full", {}), *facts.get("lora", {}).values()]:
            numbers += trajectory.pop("losses", []) + trajectory.pop("gradNorms", [])
        measured.append(numbers)
    if not numpy.allclose(*measured, rtol=1e-4):
        problems.append(f"{committed.name}: losses or norms differ")
    if old != new:
        problems.append(f"{committed.name}: golden.json differs")
    for file in ("model.safetensors", "golden.safetensors"):
        old, new = load_file(committed / file), load_file(fresh / file)
        if old.keys() != new.keys():
            problems.append(f"{committed.name}/{file}: names differ: {old.keys() ^ new.keys()}")
            continue
        for key in old:
            scale = new[key].abs().max().clamp(min=1e-6)
            if old[key].shape != new[key].shape or (old[key] - new[key]).abs().max() > 1e-4 * scale:
                problems.append(f"{committed.name}/{file}: {key} differs")
    return problems


if __name__ == "__main__":
    sys.exit(main())
