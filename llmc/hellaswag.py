"""HellaSwag while a model trains: how often does it find the right one of four completions the likeliest?"""

from collections.abc import Sequence

from llmc import multiple_choice
from llmc.data.eval_file import Example
from llmc.multiple_choice import Model, Source, score
from llmc.ranks import Ranks

NAME = "HellaSwag"
MAKER = "llmc-data hellaswag"


def load_examples(path: str, seq_len: int, context: int, vocab_size: int) -> list[Example]:
    """As `multiple_choice.load_examples`; errors name the trainer's flags."""
    source = Source("-h 1", "--hellaswag-data", MAKER, ", or use -h 0")
    return multiple_choice.load_examples(path, seq_len, context, vocab_size, source)


def count_correct(model: Model, examples: Sequence[Example], batch_size: int, ranks: Ranks) -> int:
    """How many examples the model gets right by the mean loss (acc_norm), over all ranks; see `score`."""
    return score(model, examples, batch_size, ranks, NAME).by_mean
