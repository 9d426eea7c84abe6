"""Loads what our trainer exported with transformers and PEFT, and compares logits with those of our engine.

    python trainer/tests/golden/parity.py CASES        # `cargo xtask parity` does both halves

The Rust test `exports` leaves one directory per run of our trainer in CASES (target/tmp/parity):
    case.json             "base": its directory, "addedTokens": special tokens that it was given, "tokens": the
                          probe, "tolerance", and the published directories: "adapter" and "merged" of a LoRA
                          run, "full" of a full-parameter run
    logits.safetensors    our engine's: `trained`, and `base` before training
Every reader is strict: an unexpected, missing or newly initialised tensor fails, and so does any warning.
"""

import json
import logging
import sys
import warnings
from pathlib import Path

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

# PEFT's advice on tied models is about its own merge, while ours is what is tested here; PEFT calls
# something that this transformers deprecates; and one base model has a head of its own though its config
# says that it is the embedding. None is about our files.
EXPECTED_WARNINGS = ["tie_word_embeddings=True", "is_gradient_checkpointing", "model specifies to tie"]


def main(cases: Path) -> int:
    transformers.utils.logging.disable_progress_bar()
    complaints = collect_complaints()
    failures = 0
    directories = sorted(path.parent for path in cases.glob("*/case.json"))
    for directory in directories:
        complaints.clear()
        try:
            findings = check(directory)
        except Exception as error:  # A reader that refuses the files is a finding, too.
            findings = [f"{type(error).__name__}: {error}"]
        findings += [f"warning: {text}" for text in complaints if not any(known in text for known in EXPECTED_WARNINGS)]
        failures += bool(findings)
        print(f"{'FAILED' if findings else 'ok':6} {directory.name}", *findings, sep="\n       " if findings else "")
    print(f"{len(directories) - failures} of {len(directories)} cases equal in transformers {transformers.__version__}")
    return 1 if failures or not directories else 0


def collect_complaints() -> list[str]:
    """Collects every warning, whether it is logged or raised through `warnings`."""
    complaints = []

    class Collector(logging.Handler):
        def emit(self, record):
            complaints.append(record.getMessage())

    for library in ("transformers", "peft"):
        logger = logging.getLogger(library)
        logger.handlers = [Collector(level=logging.WARNING)]
        logger.propagate = False
    warnings.simplefilter("always")
    warnings.showwarning = lambda message, *_, **__: complaints.append(str(message))
    return complaints


def check(directory: Path) -> list[str]:
    case = json.loads((directory / "case.json").read_text())
    ours = load_file(directory / "logits.safetensors")
    base = lambda: load_base(Path(case["base"]), case["addedTokens"])
    published = {kind: Path(case[kind]) for kind in ("full", "merged", "adapter") if case.get(kind)}
    tolerance = case["tolerance"]
    findings, found = [], {}
    if (ours["trained"] - ours["base"]).abs().max() < 1e-2:
        findings.append("training did not move the logits: the case shows nothing")
    with torch.no_grad():
        findings += compare("base", logits(base(), case), ours["base"], tolerance)
        for kind, path in published.items():
            model = load_adapter(base(), path) if kind == "adapter" else load(path)
            found[kind] = logits(model, case)
            findings += compare(kind, found[kind], ours["trained"], tolerance)
            findings += check_header(path)
            findings += check_use(model, path, case)
    if "adapter" in published:
        findings += compare("adapter and merged", found["merged"], found["adapter"], tolerance)
        findings += check_names(base(), published["adapter"])
    return findings


def load(directory: Path):
    """Loads a model; what transformers would fill in or leave out by itself is an error."""
    model, report = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    wrong = {kind: found for kind, found in report.items() if found}
    if wrong:
        raise ValueError(f"{directory.name} loads with {wrong}")
    return model.eval()


def load_base(directory: Path, added_tokens: list[str]):
    """Loads a base model and adds special tokens, as people do before they load an adapter that has them."""
    model = load(directory)
    if added_tokens:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        tokenizer.add_special_tokens({"extra_special_tokens": added_tokens})
        before = model.get_input_embeddings().weight.shape[0]
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():  # The mean without the noise that transformers adds to it.
            for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
                weight[before:] = weight[:before].double().mean(0).to(weight.dtype)
    return model


def load_adapter(base, directory: Path) -> PeftModel:
    """Loads an adapter; every tensor it should have must be in the file, and no other."""
    model = PeftModel(base, PeftConfig.from_pretrained(directory))
    report = model.load_adapter(directory, adapter_name="default")
    missing = [name for name in report.missing_keys if "lora_" in name or "modules_to_save" in name]
    if missing or report.unexpected_keys:
        raise ValueError(f"adapter loads with missing {missing}, unexpected {report.unexpected_keys}")
    return model.eval()


def check_names(base, directory: Path) -> list[str]:
    """Compares names, shapes and dtypes with what PEFT itself would save for the same settings."""
    settings = PeftConfig.from_pretrained(directory)
    settings.inference_mode = False
    theirs = get_peft_model_state_dict(get_peft_model(base, settings), save_embedding_layers=False)
    ours = load_file(directory / "adapter_model.safetensors")
    describe = lambda tensors: {(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    return [f"only one of ours and PEFT has {item}" for item in sorted(describe(theirs) ^ describe(ours), key=str)]


def check_use(model, directory: Path, case: dict) -> list[str]:
    """Uses a result as people do: its tokenizer, a few generated tokens, a copy in bf16."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = tokenizer.decode(case["tokens"])
    tokenizer(text)
    findings = []
    for index, token in enumerate(reversed(case["addedTokens"])):
        expected = len(tokenizer) - 1 - index
        if tokenizer(token, add_special_tokens=False)["input_ids"] != [expected]:
            findings.append(f"{token} is not token {expected}")
        if token in tokenizer.decode([expected], skip_special_tokens=True):
            findings.append(f"{token} is no special token")
    mask = torch.ones((1, len(case["tokens"])), dtype=torch.long)
    model.generate(
        input_ids=torch.tensor([case["tokens"]]), attention_mask=mask, max_new_tokens=2, do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    if (directory / "config.json").exists():
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    return findings


def check_header(directory: Path) -> list[str]:
    """Old readers refuse a file that does not say which framework wrote it."""
    findings = []
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            if file.metadata() != {"format": "pt"}:
                findings.append(f"{path.name} has metadata {file.metadata()}")
    return findings


def logits(model, case: dict) -> torch.Tensor:
    return model(input_ids=torch.tensor([case["tokens"]]), use_cache=False).logits[0]


def compare(what: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> list[str]:
    """The largest absolute difference over the largest absolute value; all is fp32."""
    distance = ((found - expected).abs().max() / expected.abs().max()).item()
    return [] if distance <= tolerance else [f"{what}: logits differ by {distance:.1e}"]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
