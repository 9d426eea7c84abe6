"""Writes messages-*.parquet, as `datasets` would: `python make.py` with pyarrow (made with 26.0.1)."""

import pathlib

import pyarrow
import pyarrow.parquet

call = {"name": "f", "arguments": '{"x": 1}'}
rows = [
    {
        "messages": [
            {"role": "user", "content": "hello", "tool_calls": None},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "2", "tool_calls": None},
            {"role": "assistant", "content": "☂ two", "tool_calls": []},
        ],
        "id": 1,
        "score": 0.5,
        "at": "x",
    },
    {
        "messages": [
            {"role": "user", "content": "a\nb", "tool_calls": None},
            {"role": "assistant", "content": "c", "tool_calls": None},
        ],
        "id": 2,
        "score": None,
        "at": None,
    },
]
here = pathlib.Path(__file__).parent
for compression in ["snappy", "zstd", "gzip", "lz4"]:
    path = here / f"messages-{compression}.parquet"
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, path, compression=compression, row_group_size=1)
