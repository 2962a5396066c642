"""What OpenAI's models reach: lines to compare a run with."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reference:
    """What OpenAI's model of some size reaches."""

    label: str
    hellaswag: float  # acc_norm; of GPT-3 as in its paper
    val_loss: float | None = None  # only measured for GPT-2, on FineWeb, of 1558M on FineWeb-Edu
    dataset: str = ""


REFERENCES = {
    "gpt2_124M": Reference("GPT-2 124M", 0.294463, 3.424958, "FineWeb"),
    "gpt2_350M": Reference("GPT-2 350M", 0.375224, 3.083089, "FineWeb"),
    "gpt2_774M": Reference("GPT-2 774M", 0.431986, 3.000580, "FineWeb"),
    "gpt2_1558M": Reference("GPT-2 1558M", 0.488946, 2.831273, "FineWeb-Edu"),
    "gpt3_125M": Reference("GPT-3 125M", 0.337),
    "gpt3_350M": Reference("GPT-3 350M", 0.436),
    "gpt3_760M": Reference("GPT-3 760M", 0.510),
    "gpt3_1300M": Reference("GPT-3 1.3B", 0.547),
}
OF_SIZE = {  # (layers, channels): the references of that size
    (12, 768): ("gpt2_124M", "gpt3_125M"),
    (24, 1024): ("gpt2_350M", "gpt3_350M"),
    (36, 1280): ("gpt2_774M", "gpt3_760M"),
    (24, 1536): ("gpt2_774M", "gpt3_760M"),
    (48, 1600): ("gpt2_1558M", "gpt3_1300M"),
    (24, 2048): ("gpt2_1558M", "gpt3_1300M"),
}
