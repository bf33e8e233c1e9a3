"""Models and tokenizers of Hugging Face: from a folder, from object storage, or by name from the hub.

Nothing of a folder is ever run: code that comes with a model is not loaded, and weights are safetensors, or .bin files
that hold tensors only.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.util
import os
import re
import tempfile
from collections.abc import Iterator
from typing import Any, Literal

from counterpoise import storage
from counterpoise.contracts import ConfigError, ResourceError

Kind = Literal["configuration", "weights", "tokenizer"]

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_BIN = ("pytorch_model*.bin", "pytorch_model*.bin.index.json")
_TOKENIZER = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
_BESIDE = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
# what is fetched of a model, and the names of which at least one must be there
_FILES: dict[Kind, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "configuration": (("config.json",), ("config.json",)),
    "weights": (("config.json", *_WEIGHTS), ("*.safetensors", "pytorch_model*.bin")),
    "tokenizer": ((*_TOKENIZER, *_BESIDE), _TOKENIZER),
}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def transformers() -> Any:
    """The package transformers, without its progress bars and reports; ResourceError if it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise ResourceError(
            "models and tokenizers of Hugging Face need transformers; install it with `uv sync --extra text`"
        )
    import transformers as package

    package.utils.logging.set_verbosity_error()
    package.utils.logging.disable_progress_bar()
    return package


def is_place(name: str) -> bool:
    """Whether a model is named by its folder: /path, ./path, ../path, ~/path or a URI. Else it is a name of the hub."""
    return "://" in name or name.startswith(("/", "./", "../", "~/")) or name in (".", "..")


@contextlib.contextmanager
def folder(model: str, kind: Kind) -> Iterator[str]:
    """A local folder that holds the configuration, the weights or the tokenizer of a model, within a `with` block.

    A name of the hub is looked up in this machine's cache first, and fetched only if it is not there.
    """
    wanted, needed = _FILES[kind]
    if not is_place(model):
        yield _from_hub(model, kind)
    elif storage.is_local(model):
        path = os.path.expanduser(storage.local_path(model) if "://" in model else model)
        if not os.path.isdir(path):
            raise ResourceError(f"{model}: no such folder; give the folder that holds the model's config.json")
        if not _any(os.listdir(path), needed):
            raise ResourceError(f"{model}: holds no {kind} of a model (none of {', '.join(needed)})")
        yield path
    else:
        wanted = (*wanted, *_BIN) if kind == "weights" else wanted
        names = [n for n in storage.list_files(model) if "/" not in n and _any([n], wanted)]
        if not _any(names, needed):
            raise ResourceError(f"{storage.show(model)}: holds no {kind} of a model (none of {', '.join(needed)})")
        with tempfile.TemporaryDirectory(prefix="counterpoise-model-") as path:
            for name in names:
                with open(os.path.join(path, name), "wb") as file:
                    file.write(storage.read_bytes(storage.join(model, name)))
            yield path


def copy(model: str, kind: Kind, out: str) -> list[str]:
    """Copy what makes up the configuration, the weights or the tokenizer of a model to a folder; the files' names."""
    wanted, _ = _FILES[kind]
    with folder(model, kind) as path:
        names = sorted(name for name in os.listdir(path) if _any([name], wanted))
        for name in names:
            storage.write_bytes(storage.join(out, name), storage.read_bytes(os.path.join(path, name)))
    return names


def _any(names: list[str], patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _from_hub(model: str, kind: Kind) -> str:
    if not _HUB_ID.fullmatch(model):
        raise ConfigError(f"model is {model!r}; give a folder (./bert), an s3:// URI, or a name of the hub (a/b)")
    transformers()
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted, needed = _FILES[kind]
    with contextlib.suppress(LocalEntryNotFoundError):
        path = huggingface_hub.snapshot_download(model, allow_patterns=list(wanted), local_files_only=True)
        if _any(os.listdir(path), needed):
            return str(path)
    reason = "HF_HUB_OFFLINE is set"
    if not huggingface_hub.is_offline_mode():
        try:
            path = huggingface_hub.snapshot_download(model, allow_patterns=list(wanted))
            if _any(os.listdir(path), needed):
                return str(path)
            reason = f"it has none of {', '.join(needed)}"
        except Exception as error:  # whatever the network and the libraries below raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    beside = f"; for the folder of that name here, write ./{model}" if os.path.isdir(model) else ""
    raise ResourceError(
        f"the {kind} of {model!r} is not in this machine's cache of the hub and cannot be fetched ({reason}){beside}. "
        "Fetch it where there is a network (hf download) and give its folder: /path/to/folder or s3://bucket/folder"
    )
