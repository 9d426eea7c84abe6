"""Renders conversations with chat templates as transformers does, for the Rust test `templates` to compare.

    python trainer/tests/golden/templates.py render OUT DIRECTORY...   # `cargo xtask parity` does both halves
    python trainer/tests/golden/templates.py golden [--check]          # our own templates, whose renderings are kept

DIRECTORY... hold templates (`*.jinja`), which are copied to OUT. Beside them are written: a tokenizer,
`conversations.json`, and `cases.jsonl` with a line for each template and conversation: text, the digest of its token
ids (SHA-256 of them as 32-bit little-endian numbers) and, where the template has {% generation %}, the ranges of
tokens the assistant generates; or only that transformers refuses. It is always 31 January 2026.
"""
import argparse
import datetime
import filecmp
import hashlib
import json
import re
import shutil
import struct
import sys
import tempfile
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

OWN = Path(__file__).parent / "templates"


class Day(datetime.datetime):
    """What `strftime_now` asks for the day."""

    @classmethod
    def now(cls, tz=None):
        return cls(2026, 1, 31, tzinfo=tz)


chat_template_utils.datetime = Day

SPECIAL = """<s> </s> <unk> <|im_start|> <|im_end|> <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>
<|eom_id|> <|end_of_text|> <|endoftext|> <|user|> <|assistant|> <|system|> <|end|> <bos> <eos> <start_of_turn>
<end_of_turn> <|turn> <turn|> <|channel|> <|message|> <|start|> <|return|> <|call|> [INST] [/INST] [TOOL_CALLS]
<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜User｜> <｜Assistant｜>""".split()
PLAIN = "<think> </think> <tool_call> </tool_call> <tool_response> </tool_response>".split()

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Says what the weather is in a <city> & whether it's \"fine\".",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "The city"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **rest):
    return {"role": "assistant", "content": content, **rest}


def call(name, arguments, identifier="call00001"):
    return {"id": identifier, "type": "function", "function": {"name": name, "arguments": arguments}}


SYSTEM = {"role": "system", "content": "Be brief."}
CONVERSATIONS = {
    "plain": ([user("Hello, wörld! ☂"), assistant("Hi there.")], None),
    "question": ([user("Hello")], None),
    "system": ([SYSTEM, user(" Two spaces "), assistant("if x:\n    y\n")], None),
    "turns": ([SYSTEM, user("One"), assistant("1"), user("Two"), assistant("2"), user("Three"), assistant("3")], None),
    "unanswered": ([user("One"), assistant("1"), user("Two")], None),
    "thought": ([user("Why?"), assistant("Because.", reasoning_content="Let me think.\n\nYes.")], None),
    "thoughts": (
        [
            user("Why?"),
            assistant("Because.", reasoning_content="Let me think."),
            user("Sure?"),
            assistant("Yes.", reasoning_content="I am."),
        ],
        None,
    ),
    "inline": ([user("Why?"), assistant("<think>\nHm.\n</think>\n\nBecause.")], None),
    "tools": (
        [
            SYSTEM,
            user("Weather in Rome?"),
            assistant("", tool_calls=[call("get_weather", {"city": "Rome", "days": 2})]),
            {"role": "tool", "content": '{"sky": "clear"}', "tool_call_id": "call00001", "name": "get_weather"},
            assistant("It is clear."),
        ],
        [WEATHER],
    ),
    "two calls": (
        [
            user("Rome and Oslo?"),
            assistant(
                "Let me see.",
                tool_calls=[
                    call("get_weather", {"city": "Rome"}),
                    call("get_weather", {"city": "Oslo", "deep": {"a": [1, 2.5, True, None]}}, "call00002"),
                ],
            ),
            {"role": "tool", "content": "clear", "tool_call_id": "call00001", "name": "get_weather"},
            {"role": "tool", "content": "rain", "tool_call_id": "call00002", "name": "get_weather"},
            assistant("Clear and rain."),
        ],
        [WEATHER],
    ),
    "tools unused": ([user("Hi"), assistant("Hello")], [WEATHER]),
    "assistant first": ([assistant("Welcome!"), user("Hi"), assistant("How can I help?")], None),
    "markup": ([user("</s> {{ x }} {% raw %} <b>&amp;</b> 'q' \"p\" \\n\t"), assistant("a\r\nb")], None),
}


def make_tokenizer(directory):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    fast.save_pretrained(directory)
    return PreTrainedTokenizerFast.from_pretrained(directory)


def expected(tokenizer, source, messages, tools, ask):
    marks = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None and not ask
    arguments = dict(tools=tools, chat_template=source, add_generation_prompt=ask)
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
        encoded = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=marks, **arguments
        )
    except Exception as error:  # noqa: BLE001: whatever a template refuses with, ours must refuse too
        return {"refused": f"{type(error).__name__}: {error}"}
    ids = encoded["input_ids"]
    digest = hashlib.sha256(struct.pack(f"<{len(ids)}I", *ids)).hexdigest()[:16]
    case = {"text": text, "idsSha256": digest}
    return case | {"generated": ranges(encoded["assistant_masks"])} if marks else case


def ranges(mask):
    """[0, 1, 1, 0, 1] -> [[1, 3], [4, 5]]"""
    borders = [index for index, (before, this) in enumerate(zip([0] + mask, mask + [0])) if before != this]
    return [list(pair) for pair in zip(borders[::2], borders[1::2])]


def render(out, directories):
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(out / "tokenizer")
    conversations = {name: {"messages": messages, "tools": tools} for name, (messages, tools) in CONVERSATIONS.items()}
    (out / "conversations.json").write_text(json.dumps(conversations, ensure_ascii=False, indent=1) + "\n")
    sources = sorted(path for directory in directories for path in directory.rglob("*.jinja"))
    refused = total = 0
    with open(out / "cases.jsonl", "w", encoding="utf-8") as file:
        for path in sources:
            # As transformers reads it: with the line ends the file has.
            source = path.read_bytes().decode("utf-8")
            if path.parent != out:
                shutil.copy(path, out / path.name)
            for name, (messages, tools) in CONVERSATIONS.items():
                for ask in (False, True):
                    case = expected(tokenizer, source, messages, tools, ask)
                    refused += "refused" in case
                    total += 1
                    case = {"template": path.name, "conversation": name, "ask": ask} | case
                    file.write(json.dumps(case, ensure_ascii=False) + "\n")
    print(f"{len(sources)} templates, {total} renderings, of which transformers refuses {refused}")


def check():
    """Renders our own templates again: what is kept must be what transformers makes of them."""
    with tempfile.TemporaryDirectory() as again:
        render(Path(again), [OWN])
        files = ["cases.jsonl", "conversations.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"]
        _, different, missing = filecmp.cmpfiles(OWN, again, files, shallow=False)
    if different or missing:
        sys.exit(f"{OWN} is stale in {different + missing}: run templates.py golden")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    rendering = commands.add_parser("render")
    rendering.add_argument("out", type=Path)
    rendering.add_argument("directories", type=Path, nargs="+")
    commands.add_parser("golden").add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if arguments.command == "render":
        render(arguments.out, arguments.directories)
    elif arguments.check:
        check()
    else:
        render(OWN, [OWN])


if __name__ == "__main__":
    main()
