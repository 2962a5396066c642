"""Makes a directory in which `llmc-train -e tiny.bin`, with no other flag, is a run of a few seconds.

Usage: python tests/make_tiny_run.py DIR
"""

import sys
from pathlib import Path

import numpy as np

from llmc import _C
from llmc.data.shards import write_shard
from llmc.model_file import ModelShape, save_model

SHAPE = ModelShape(
    max_seq_len=1024, vocab_size=72, padded_vocab_size=128, num_layers=1, num_heads=1, channels=16
)  # fmt: skip


def main(directory: Path) -> None:
    data = directory / "dev/data/201506"  # the trainer's default data, which is chess
    data.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for split, batches in (("train", 3), ("val", 1)):
        tokens = generator.integers(4, 68, 4 * 1024 * batches + 1, dtype=np.uint16)
        write_shard(data / f"201506_{split}_000000.bin", tokens)
    model = _C.GPT2(_C.GPT2Config(**vars(SHAPE)), _C.Options(batch_size=1, seq_len=1))
    model.init_random()
    save_model(directory / "tiny.bin", SHAPE, "bf16", model.parameters())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
