"""A trained model to ask, not to train: from a model file, and the tokenizer that belongs to it."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.build import bytes_by_lifetime, core_config, core_options, is_file, memory_plan, model_shape, precision_of
from llmc.checksum import verify
from llmc.config import TrainConfig
from llmc.config_file import read_config_file
from llmc.data.shards import find_shards
from llmc.device import choose_device
from llmc.errors import RunError, UsageError
from llmc.model_file import FileDtype, ModelShape, load_model
from llmc.output_dir import CONFIG
from llmc.ranks import Ranks
from llmc.tokenizer import FILE_NAMES, Tokenizer, dataset_tokenizer, working_directory_tokenizer

if TYPE_CHECKING:
    from llmc import _C


@dataclass(frozen=True)
class ModelFile:
    """A model file whose header has been read: what can be checked before the weights are loaded."""

    path: Path
    shape: ModelShape
    dtype: FileDtype

    def load(self, batch_size: int, seq_len: int, device: str, ranks: Ranks, smaller: str) -> "_C.GPT2":
        """The model with its weights, a whole one on each of `ranks`, for rows of up to `seq_len` tokens.

        device: as --device; in bf16 on a GPU if the file is, in fp32 otherwise. RunError if it does not fit into the
        memory; `smaller` is the advice then.
        """
        from llmc import _C

        config = TrainConfig(
            model=str(self.path), batch_size=batch_size, seq_len=seq_len, device=device, recompute=2, sample_every=0
        )
        place = choose_device(config, ranks.local_rank, ranks.local_size)
        options = core_options(config, precision_of(config, place.is_cuda, self.dtype), place)
        sizes = core_config(f"-e {self.path}", self.shape)
        lifetimes = bytes_by_lifetime(memory_plan(sizes, options))
        needed, available = lifetimes["parameters"] + lifetimes["activations"], place.free_memory()
        if needed > available:
            raise RunError(
                f"{self.path} needs {needed // 2**20} MiB of memory here, {place.name} has {available // 2**20} MiB: "
                f"{smaller}"
            )
        model = _C.GPT2(sizes, options)
        verify(self.path)
        load_model(self.path, model.parameters())
        return model


def open_model(path: str) -> ModelFile:
    """Read the header of -e. UsageError or RunError if it names no model file."""
    if not is_file(path):
        raise UsageError(
            f"-e {path}: only trained weights are worth asking: give a model file, whose name ends in .bin"
        )
    shape, dtype = model_shape(TrainConfig(model=path), None)
    assert dtype is not None  # as of every file
    return ModelFile(Path(path), shape, dtype)


def tokenizer_of(model: ModelFile, given: str | None) -> Tokenizer | None:
    """The tokenizer of the model's vocabulary: the file `given`, one beside the model, of the data that the run was on
    whose output directory holds the model, or of the working directory. None: there is none; RunError if `given` is of
    another vocabulary.
    """
    V = model.shape.vocab_size
    if given:
        tokenizer = Tokenizer(given)
        if tokenizer.vocab_size != V:
            raise RunError(
                f"--tokenizer {given} has {tokenizer.vocab_size} tokens, the model {model.path} {V}: "
                "give the tokenizer that the model was trained with"
            )
        return tokenizer
    beside = [model.path.with_name(name) for name in FILE_NAMES]
    found = [Tokenizer(path) for path in beside if path.is_file()]
    with suppress(RunError, UsageError):  # the data may be elsewhere by now
        settings = read_config_file(str(model.path.with_name(CONFIG)))
        if settings.get("tokenizer"):
            found.append(Tokenizer(settings["tokenizer"]))
        if of_data := dataset_tokenizer(find_shards(settings.get("train_data", TrainConfig.train_data))[0]):
            found.append(of_data)
    fitting = (tokenizer for tokenizer in found if tokenizer.vocab_size == V)
    return next(fitting, None) or working_directory_tokenizer(V)
