"""Descriptors against the tables they come from."""

import pytest

from llmc.errors import UsageError
from llmc.model_file import ModelShape
from llmc.models import resolve

GPT2 = [  # depth, channels, heads, parameters
    (6, 384, 6, 30_357_504),
    (12, 768, 12, 124_475_904),
    (24, 1024, 16, 354_871_296),
    (36, 1280, 20, 774_090_240),
    (48, 1600, 25, 1_557_686_400),
    (60, 1920, 30, 2_754_259_200),
    (72, 2880, 30, 7_316_887_680),
    (84, 3456, 36, 12_220_657_920),
]
GPT3 = [  # channels, layers, head size, parameters
    (384, 6, 64, 30_750_720),
    (768, 12, 64, 125_262_336),
    (1024, 24, 64, 355_919_872),
    (1536, 24, 96, 760_372_224),
    (2048, 24, 128, 1_315_819_520),
    (2560, 32, 80, 2_651_673_600),
    (4096, 32, 128, 6_658_596_864),
    (12288, 96, 128, 174_604_836_864),
]


@pytest.mark.parametrize("prefix", ["d", "gpt2:d"])
@pytest.mark.parametrize(("depth", "channels", "heads", "parameters"), GPT2)
def test_gpt2(prefix, depth, channels, heads, parameters):
    shape = resolve(f"{prefix}{depth}", None)
    assert shape == ModelShape(1024, 50257, 50304, depth, heads, channels)
    assert shape.num_parameters == parameters


@pytest.mark.parametrize(("channels", "layers", "head_size", "parameters"), GPT3)
def test_gpt3(channels, layers, head_size, parameters):
    shape = resolve(f"gpt3:c{channels}", None)
    assert shape == ModelShape(2048, 50257, 50304, layers, channels // head_size, channels)
    assert shape.num_parameters == parameters


def test_gpt3_13b_has_5120_channels():
    assert resolve("gpt3:c5120", None) == ModelShape(2048, 50257, 50304, 40, 40, 5120)


def test_chess():
    assert resolve("chess:d8", None) == ModelShape(1024, 72, 128, 8, 8, 512)
    assert resolve("chess:d8", None).num_parameters == 25_809_920
    assert resolve("chess:d12", None).num_parameters == 85_940_736
    for depth, channels, heads, _ in GPT2:
        assert resolve(f"chess:d{depth}", 50257) == ModelShape(1024, 72, 128, depth, heads, channels)


def test_custom():
    assert resolve("custom:l=4,c=128,h=4,t=64,v=65", None) == ModelShape(64, 65, 128, 4, 4, 128)
    assert resolve("custom:t=7,h=1,c=8,l=1", 129) == ModelShape(7, 129, 256, 1, 1, 8)
    assert resolve("custom:v=128,t=7,h=1,c=8,l=1", 65) == ModelShape(7, 128, 128, 1, 1, 8)


BAD = [  # descriptor, what the message must contain
    ("d12foo", "-e d12foo is no model"),
    ("d13", "-e d13"),
    ("d012", "-e d012"),
    ("d8", "-e d8"),  # chess only
    ("d", "-e d is"),
    ("D12", "-e D12"),
    ("gpt2", "-e gpt2 is"),
    ("gpt2:c768", "-e gpt2:c768"),
    ("gpt3:d12", "-e gpt3:d12"),
    ("gpt3:c5140", "5120"),
    ("chess:d7", "-e chess:d7"),
    ("llama", "-e llama"),
    ("custom:", "'' is not understood"),
    ("custom:l=4,c=128,h=4", "t= is missing"),
    ("custom:l=4,c=128,h=4,t=64", "add ,v=SIZE"),
    ("custom:l=4,c=128,h=4,t=64,v=0", "'v=0'"),
    ("custom:l=0,c=128,h=4,t=64,v=65", "'l=0'"),
    ("custom:l=-1,c=128,h=4,t=64,v=65", "'l=-1'"),
    ("custom:l=4x,c=128,h=4,t=64,v=65", "'l=4x'"),
    ("custom:l=4,l=5,c=128,h=4,t=64,v=65", "l is given twice"),
    ("custom:l=4,c=128,h=4,t=64,v=65,", "'' is not understood"),
    ("custom:l=4, c=128,h=4,t=64,v=65", "' c=128'"),
    ("custom:l=4,c=128,h=4,t=64,v=65,z=1", "'z=1'"),
    ("custom:l=4,c=128,h=4,t=9999999,v=65", "'t=9999999'"),
    ("custom:l=4,c=128,h=3,t=64,v=65", "42.6667 per head"),
    ("custom:l=4,c=100,h=5,t=64,v=65", "20 per head"),
    ("custom:l=4,c=272,h=2,t=64,v=65", "136 per head"),
]


@pytest.mark.parametrize(("descriptor", "message"), BAD, ids=[descriptor for descriptor, _ in BAD])
def test_anything_else_is_refused_in_one_line(descriptor, message):
    with pytest.raises(UsageError) as caught:
        resolve(descriptor, None)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "twice" in message or "custom:l=4,c=128" in str(caught.value) or descriptor in str(caught.value)
