"""Models of the Hugging Face hub, downloaded into its own cache, which every later call takes them from."""

import re
from pathlib import Path

from llmc.errors import RunError

SHORT_NAMES = {
    **{name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")},
    "distilgpt2": "distilbert/distilgpt2",
}
NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)  # owner/name
CONFIG_ONLY = ["config.json"]
# Without pytorch_model.bin and the like, which repositories often hold besides, as large as the model itself.
MODEL = [
    *("config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
    *("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json"),
]


def full_name(name: str) -> str | None:
    """owner/name of the model that `name` stands for; None if no model of the hub is called so."""
    return SHORT_NAMES.get(name, name if NAME.fullmatch(name) else None)


def download(name: str, patterns: list[str]) -> Path:
    """Return the directory of the model owner/name, with its files that match `patterns`. RunError if that fails."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import RepositoryNotFoundError
    except ImportError:
        raise RunError(
            f"there is no directory {name}, and a download from the Hugging Face hub needs its package: "
            "pip install huggingface_hub"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except RepositoryNotFoundError:
        raise RunError(
            f"{name} is neither a directory nor a public model of the Hugging Face hub: check the name, or, for a "
            "private model, log in with: hf auth login"
        ) from None
    except Exception as error:  # of its HTTP client, and of files: they have no common base
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RunError(
            f"cannot download {name} from the Hugging Face hub ({lines[0]}): check the network, or download the model "
            "elsewhere and give its directory"
        ) from error
