"""Training steps with transformers and PEFT, timed: the peer of `finetune-trainer bench`.

The same model directory, rows, optimizer and settings; prints the same JSON. Anonymous memory is
sampled as ours is, so that mapped weights count on neither side.
"""

import argparse
import json
import time

import torch
from memory import PeakMemory
from transformers import AutoModelForCausalLM


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--narrow-adapters", action="store_true", help="adapters in the weights' type, not PEFT's fp32")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    memory = PeakMemory()
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype, attn_implementation="sdpa")
    model.config.use_cache = False
    if arguments.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    if not arguments.full:
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        config = LoraConfig(r=8, lora_alpha=16, lora_dropout=arguments.dropout, target_modules=targets, task_type="CAUSAL_LM")
        model = get_peft_model(model, config, autocast_adapter_dtype=not arguments.narrow_adapters)
    model.train()
    if arguments.compile:
        # Rows of other lengths must not each compile the model again.
        torch._dynamo.config.cache_size_limit = 64
        model = torch.compile(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.learning_rate, weight_decay=0.0, fused=True)

    rows = json.load(open(arguments.rows))
    step_seconds, step_tokens, losses = [], [], []
    for step in range(arguments.warmup + arguments.steps):
        chosen = [rows[(step * arguments.batch + index) % len(rows)] for index in range(arguments.batch)]
        inputs = padded(chosen)
        started = time.perf_counter()
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step >= arguments.warmup:
            step_seconds.append(time.perf_counter() - started)
            step_tokens.append(sum(len(row["input_ids"]) for row in chosen))
    print(json.dumps({
        "step_seconds": step_seconds,
        "step_tokens": step_tokens,
        "losses": losses,
        "peak_anonymous_bytes": memory.peak,
    }))


def padded(rows):
    """A batch as the usual collator makes it: filled up to its longest row, on the right."""
    longest = max(len(row["input_ids"]) for row in rows)
    fill = lambda name, value: torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])
    inputs = {"input_ids": fill("input_ids", 0), "labels": fill("labels", -100)}
    if any(len(row["input_ids"]) != longest for row in rows):
        ones = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
        inputs["attention_mask"] = torch.tensor(ones)
    return inputs


if __name__ == "__main__":
    main()
