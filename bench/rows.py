"""Reading and tokenising chat rows with datasets and transformers: the peer of `finetune data check`.

    python3 bench/rows.py write FILE --rows N --text ROWS     # N chat rows of about 1 KB each
    python3 bench/rows.py read FILE --model DIRECTORY --processes N

`read` prints {"rows", "tokens", "seconds", "peakBytes"}: anonymous memory of all its processes together.
"""

import argparse
import json
import os
import random
import tempfile
import time

from memory import PeakMemory, anonymous_bytes


def write(path: str, rows: int, text: str) -> None:
    """Makes conversations of the sentences of real ones; no two are equal."""
    with open(text) as lines:
        sentences = [turn["content"] for line in lines for turn in json.loads(line)["messages"]]
    numbers = random.Random(0)
    with open(path, "w") as out:
        for row in range(rows):
            messages = []
            for turn in range(4):
                words = [f"Number {row}-{turn}."] + numbers.choices(sentences, k=6)
                messages.append({"role": "assistant" if turn % 2 else "user", "content": " ".join(words)})
            out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def processes() -> list[int]:
    """This process and its children, to any depth."""
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as stat:
                parents[int(name)] = int(stat.read().rpartition(")")[2].split()[1])
        except OSError:
            pass
    found = {os.getpid()}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return list(found)


def anonymous_bytes_of_all() -> int:
    return sum(map(anonymous_bytes, processes()))


def read(path: str, model: str, processes: int) -> None:
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    memory = PeakMemory(anonymous_bytes_of_all, seconds=0.05)
    started = time.monotonic()

    def tokenize(batch):
        return {"tokens": tokenizer.apply_chat_template(batch["messages"], tokenize=True, return_dict=False)}

    with tempfile.TemporaryDirectory() as cache:
        rows = load_dataset("json", data_files=path, split="train", cache_dir=cache)
        tokens = rows.map(tokenize, batched=True, num_proc=processes, remove_columns=rows.column_names)
        seconds = time.monotonic() - started
        count = sum(len(row) for batch in tokens.iter(10_000) for row in batch["tokens"])
        print(json.dumps({"rows": len(tokens), "tokens": count, "seconds": seconds, "peakBytes": memory.peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write")
    writing.add_argument("file")
    writing.add_argument("--rows", type=int, required=True)
    writing.add_argument("--text", required=True)
    reading = commands.add_parser("read")
    reading.add_argument("file")
    reading.add_argument("--model", required=True)
    reading.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    if arguments.command == "write":
        write(arguments.file, arguments.rows, arguments.text)
    else:
        read(arguments.file, arguments.model, arguments.processes)


if __name__ == "__main__":
    main()
