"""Hugging Face's directories of a GPT-2: config.json, and model.safetensors in one file or in shards with an index.

transformers' names are "transformer.h.0.attn.c_attn.weight" for our "h0.qkvw". Its matrices are (inputs, outputs), the
transpose of ours, and its embedding has no rows of padding.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc import json_text, models
from llmc.build import core_config
from llmc.errors import RunError
from llmc.model_file import FileDtype, ModelShape
from llmc.text_file import read_text

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ARCHITECTURE = "GPT2LMHeadModel"
# What a silent config.json means.
SIZES = {"n_positions": 1024, "vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768}
# What a model file has no room for: the first value is the same, the others mean the same.
FIXED: dict[str, tuple[object, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
}
MODULES = {
    **{"ln1": "ln_1", "qkv": "attn.c_attn", "attproj": "attn.c_proj"},
    **{"ln2": "ln_2", "fc": "mlp.c_fc", "fcproj": "mlp.c_proj"},
}
MATRICES = ("qkvw", "attprojw", "fcw", "fcprojw")
CAUSAL_MASK = re.compile(r"h\.[0-9]+\.attn\.(bias|masked_bias)")  # in files of old: constants, not parameters
EXACT_IN: dict[str, FileDtype] = {"F32": "fp32", "F16": "fp32", "BF16": "bf16"}  # the file that keeps all their values


@dataclass(frozen=True)
class Place:
    """Where a tensor is."""

    file: Path
    name: str  # in it
    tensors: Any  # of the file: opened once, as each time reads what the file says of all of them


@dataclass(frozen=True)
class HfModel:
    """A directory that was found to hold a model of ours."""

    directory: Path
    shape: ModelShape
    dtype: FileDtype  # of the model file that keeps all values
    places: dict[str, Place]  # of our parameters
    end_of_text: int | None  # what config.json says


def read_config(path: Path) -> tuple[ModelShape, dict[str, Any]]:
    """Return sizes and content of config.json `path`. RunError unless our GPT-2 computes what it describes."""
    config = read_json(path)
    architectures, model_type = config.get("architectures") or [], config.get("model_type")
    if not isinstance(architectures, list):
        architectures = [architectures]
    if model_type not in ("gpt2", None) or (ARCHITECTURE not in architectures and (architectures or not model_type)):
        named = ", ".join(map(json_text.shown, architectures[:3])) or "no architecture"
        kind = json_text.shown(model_type)
        raise RunError(f"{path} names {named}, model_type {kind}: only a {ARCHITECTURE} can be converted")
    sizes = {key: config.get(key, default) for key, default in SIZES.items()}
    for key, value in sizes.items():
        if type(value) is not int or not 1 <= value <= models.MAX_SIZE:
            raise RunError(f"{path}: {key} is {json_text.shown(value)}, it must be between 1 and {models.MAX_SIZE}")
    C, NH = sizes["n_embd"], sizes["n_head"]
    if C % NH != 0:
        raise RunError(f"{path} is damaged: n_head = {NH} does not divide n_embd = {C}")
    for key, accepted in {**FIXED, "n_inner": (None, 4 * C)}.items():
        if config.get(key, accepted[0]) not in accepted:
            known = " or ".join(json.dumps(value) for value in accepted)
            value = json_text.shown(config[key])
            raise RunError(f"{path}: {key} is {value}, llmc's GPT-2 has {known}: this model cannot be converted")
    shape = models.shape(sizes["n_positions"], sizes["vocab_size"], sizes["n_layer"], NH, C)
    core_config(str(path), shape)  # raises for sizes that the core cannot run
    return shape, config


def open_model(directory: Path, origin: str) -> HfModel:
    """Check everything in `directory` but the values. RunError if there is no model, or one that is not ours.

    origin: what transformers' from_pretrained would take: the directory, or a name of the hub.
    """
    import torch

    shape, config = read_config(directory / CONFIG)
    places: dict[str, Place] = {}  # by the name without "transformer."
    for file in weight_files(directory, origin):
        tensors = open_tensors(file)
        for name in tensors.keys():  # noqa: SIM118 (safetensors' object is not a mapping)
            plain = name.removeprefix("transformer.")
            if plain in places:
                raise RunError(
                    f"{file}: {name} is also in {places[plain].file} as {places[plain].name}: remove one of them"
                )
            places[plain] = Place(file, name, tensors)
    parameters = {}
    dtypes = set()
    for name, size in shape.parameters():
        plain = hf_name(name).removeprefix("transformer.")
        if plain not in places:
            raise RunError(
                f"{directory}: {hf_name(name)} is in none of its {WEIGHTS} files: copy or download them again"
            )
        expected = (shape.vocab_size, size[1]) if name == "wte" else size[::-1] if is_matrix(name) else size
        dtypes.add(check_tensor(places[plain], expected))
        parameters[name] = places.pop(plain)
    head = places.pop("lm_head.weight", None)
    if head and not torch.equal(read_tensor(head).float(), read_tensor(parameters["wte"]).float()):
        raise RunError(
            f"{head.file}: {head.name} differs from {parameters['wte'].name}: a model file has one matrix for both, so "
            "this model cannot be converted"
        )
    if not head and config.get("tie_word_embeddings") is False:
        raise RunError(f"{directory}: {CONFIG} has tie_word_embeddings = false, but there is no lm_head.weight")
    other = next((place for plain, place in places.items() if not CAUSAL_MASK.fullmatch(plain)), None)
    if other:
        raise RunError(f"{other.file}: {other.name} is no parameter of a {ARCHITECTURE} with {shape.num_layers} layers")
    end_of_text = config.get("eos_token_id", models.END_OF_TEXT_IDS[models.GPT2_VOCAB_SIZE])
    valid = isinstance(end_of_text, int) and 0 <= end_of_text < shape.vocab_size
    dtype: FileDtype = "bf16" if dtypes == {"bf16"} else "fp32"
    return HfModel(directory, shape, dtype, parameters, end_of_text if valid else None)


def parameters(model: HfModel) -> Iterator[dict[str, "torch.Tensor"]]:
    """Yield the parameters one at a time, with our names and layout, in the dtype of the file."""
    from torch.nn.functional import pad

    for name, place in model.places.items():
        values = read_tensor(place)
        if name == "wte":
            values = pad(values, (0, 0, 0, model.shape.padded_vocab_size - model.shape.vocab_size))
        yield {name: values.T if is_matrix(name) else values}


def write_model(
    directory: Path,
    shape: ModelShape,
    dtype: FileDtype,
    parameters: Mapping[str, "torch.Tensor"],
    end_of_text: int | None,
) -> None:
    """Write config.json, generation_config.json and model.safetensors into `directory`, and read the last back.

    `parameters` has the names and shapes of `ModelShape.parameters`; end_of_text: id, None if the vocabulary has none.
    RunError without the safetensors package, OSError if the disk is full.
    """
    import torch

    safetensors = import_safetensors()
    out = torch.float32 if dtype == "fp32" else torch.bfloat16
    tensors = {}
    for name, values in parameters.items():
        values = values[: shape.vocab_size] if name == "wte" else values.T if is_matrix(name) else values
        tensors[hf_name(name)] = values.to(out).contiguous()
    tokens = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    config = {
        "architectures": [ARCHITECTURE],
        "model_type": "gpt2",
        "vocab_size": shape.vocab_size,
        "n_positions": shape.max_seq_len,
        "n_ctx": shape.max_seq_len,  # the older name, which some readers still ask for
        "n_embd": shape.channels,
        "n_layer": shape.num_layers,
        "n_head": shape.num_heads,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),  # llmc trains without dropout
        **tokens,
        "torch_dtype": "float32" if dtype == "fp32" else "bfloat16",
    }
    write_json(directory / CONFIG, config)
    write_json(directory / "generation_config.json", {"_from_model_config": True, **tokens})
    try:  # transformers refuses files without that metadata
        safetensors.torch.save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from error
    shutil.copymode(directory / CONFIG, directory / WEIGHTS)  # it was made for its owner only
    open_model(directory, str(directory))


# ---- names and files


def hf_name(name: str) -> str:
    """transformers' name of our parameter `name`."""
    if name in ("wte", "wpe"):
        return f"transformer.{name}.weight"
    kind = {"w": "weight", "b": "bias"}[name[-1]]
    if name in ("lnfw", "lnfb"):
        return f"transformer.ln_f.{kind}"
    layer, tensor = name.removeprefix("h").split(".")
    return f"transformer.h.{layer}.{MODULES[tensor[:-1]]}.{kind}"


def is_matrix(name: str) -> bool:
    """True for the parameters that transformers holds transposed."""
    return name.endswith(MATRICES)


def weight_files(directory: Path, origin: str) -> list[Path]:
    """The safetensors files of the model. RunError if there are none, or not all."""
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    index = directory / INDEX
    if not index.is_file():
        raise RunError(f"{origin} has no {WEIGHTS}; {way_out_of_pickle(origin)}")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(map(is_file_name, names.values())):
        raise RunError(f"{index} is damaged: its weight_map does not say which files there are")
    files = [directory / name for name in sorted(set(names.values()))]
    for file in files:
        if not os.path.isfile(file):  # Path.is_file() would raise for a name that is too long
            raise RunError(f"{index} names {file.name}, which is not beside it: copy or download it, too")
    return files


def is_file_name(name: object) -> bool:
    """False also for a path: only what lies beside the index is read."""
    return isinstance(name, str) and name not in ("", "..") and Path(name).name == name


def way_out_of_pickle(origin: str) -> str:
    return (
        "a pickle (pytorch_model.bin) is not read, as it can run any program: if you trust its author, "
        'make safetensors of it with python -c "from transformers import GPT2LMHeadModel as M; '
        f"M.from_pretrained('{origin}').save_pretrained('safe')\" and convert the directory safe"
    )


def open_tensors(path: Path) -> Any:
    """safetensors' view of the file `path`, whose header and size were checked. RunError if it is damaged."""
    safetensors = import_safetensors()
    try:
        return safetensors.safe_open(path, framework="pt")
    except (OSError, safetensors.SafetensorError) as error:
        raise RunError(f"{path} is truncated or damaged ({error}): copy or download it again") from error


def import_safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise RunError("Hugging Face's files need the safetensors package: pip install safetensors") from None
    return safetensors


def read_tensor(place: Place) -> "torch.Tensor":
    tensor: torch.Tensor = place.tensors.get_tensor(place.name)
    return tensor


def check_tensor(place: Place, expected: tuple[int, ...]) -> FileDtype:
    """Return the dtype of the model file that keeps all values of the tensor. RunError unless shape and dtype fit."""
    tensor = place.tensors.get_slice(place.name)
    shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
    if shape != expected:
        raise RunError(f"{place.file}: {place.name} has shape {shape}, by {CONFIG} it is {expected}")
    if dtype not in EXACT_IN:
        raise RunError(f"{place.file}: {place.name} has dtype {dtype}, known are {', '.join(EXACT_IN)}")
    return EXACT_IN[dtype]


def read_json(path: Path) -> dict[str, Any]:
    """The object in the JSON file `path`. RunError if there is none."""
    try:
        content = json_text.parse(read_text(path, json_text.MAX_BYTES))
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise RunError(f"{path} is damaged, it is no JSON ({error}): copy or download it again") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} is damaged: it holds no JSON object")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
