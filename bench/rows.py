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
import threading
import time


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


class PeakMemory:
    """Samples the anonymous memory of this process and its children."""

    def __init__(self):
        self.peak = 0
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self):
        while True:
            self.peak = max(self.peak, sum(map(anonymous_bytes, processes())))
            time.sleep(0.05)


def processes() -> list[int]:
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


def anonymous_bytes(process: int) -> int:
    try:
        with open(f"/proc/{process}/status") as status:
            return sum(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))
    except OSError:
        return 0


def read(path: str, model: str, processes: int) -> None:
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    memory = PeakMemory()
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
