"""From what a user calls a model to a path on this machine."""

import difflib
import os
import re
from pathlib import Path
from typing import Literal

from jaxllm.errors import CheckpointError

# What a model needs and nothing else: no pickles, no ONNX, no copies in other frameworks' formats.
HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "merges.txt", "vocab.txt"]
_UNWANTED = ["original/*", "onnx/*", "openvino/*", "consolidated*.safetensors"]
_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:[:/]([\w./-]+\.gguf))?")


def resolve_model(
    name: str | os.PathLike,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
    only: Literal["config", "tokenizer"] | None = None,
) -> Path:
    """The folder or GGUF file that `name` stands for, downloaded if need be; of a repository `only` that part, if given.

    `name` is an existing path, or `demo`, or a Hugging Face repository `owner/name`, or one GGUF file of it:
    `owner/name:file.gguf` or `owner/name/file.gguf`. `revision` (a branch, tag or commit) and `cache_dir` (default: huggingface_hub's own)
    concern repositories only. Raises CheckpointError, saying what to do, if the name leads nowhere.
    """
    name = os.fspath(name)
    path = Path(os.path.expanduser(name))
    if name and path.exists():
        return path
    if name == "demo":
        from jaxllm.checkpoints.demo import fetch_demo

        return fetch_demo(progress=progress)
    match = _HUB_NAME.fullmatch(name)
    if not match or name.startswith((".", "~")) or ".." in name:
        raise CheckpointError(
            f"There is no model {name!r}: not a path here, not 'demo', and not a Hugging Face repository (owner/name, or "
            f"owner/name:file.gguf).{_nearest(name)}"
        )
    repository, gguf = match.groups()
    wanted = {"allow_patterns": [gguf]} if gguf else {"allow_patterns": HUB_PATTERNS, "ignore_patterns": _UNWANTED}
    if only and not gguf:
        wanted = {"allow_patterns": ["config.json"] if only == "config" else [p for p in HUB_PATTERNS if p != "*.safetensors"]}
    folder = _from_hub(name, repository, revision, cache_dir, progress, **wanted)
    if gguf:
        if not (folder / gguf).is_file():
            raise CheckpointError(f"The Hugging Face repository {repository} has no file {gguf}. Look at its list of files.")
        return folder / gguf
    if only == "config":
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"The Hugging Face repository {repository} has no config.json. Of a GGUF repository name the file.")
    elif only is None and not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"The Hugging Face repository {repository} has no .safetensors files. For a GGUF repository name the file "
            f"({repository}:FILE.gguf); pickles (.bin) must be converted to safetensors first."
        )
    return folder


def download_snapshot(repository: str, *, progress: bool = True, **options: object) -> Path:
    """huggingface_hub's snapshot_download, its progress bars shown or not. Raises what it raises."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *args: object, **kwargs: object):
            super().__init__(*args, **kwargs | {"disable": True})

    return Path(snapshot_download(repository, tqdm_class=None if progress else Silent, **options))


def _from_hub(
    name: str, repository: str, revision: str | None, cache_dir: str | os.PathLike | None, progress: bool, **wanted: object
) -> Path:
    from huggingface_hub import constants, errors

    try:
        return download_snapshot(repository, revision=revision, cache_dir=cache_dir, progress=progress, **wanted)
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"The Hugging Face repository {repository} is gated: ask for access on its page, then log in here with `hf auth login` "
            "(or set HF_TOKEN)."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"The Hugging Face repository {repository} has no revision {revision!r}. Check its name.") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"There is no {name!r}: no such path here, and no Hugging Face repository {repository} that you can see. If it is private or "
            f"gated, log in with `hf auth login` (or set HF_TOKEN).{_nearest(name, cache_dir)}"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        offline = constants.is_offline_mode()
        why = "HF_HUB_OFFLINE is set" if offline else "the Hugging Face Hub cannot be reached"
        remedy = "unset HF_HUB_OFFLINE, or" if offline else "check the network and proxy, or"
        raise CheckpointError(
            f"{name!r} is neither a path here nor complete in the local Hugging Face cache, and {why}. To get it, {remedy} download it "
            f"elsewhere with `hf download {repository}`, copy the folder here, and give its path.{_nearest(name, cache_dir)}"
        ) from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{name!r} is neither a path here nor a valid name of a Hugging Face repository: {error}") from error
    except (errors.HfHubHTTPError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        login = " Log in with `hf auth login` (or set HF_TOKEN)." if status in (401, 403) else " Try again, or give a path."
        raise CheckpointError(f"Downloading {repository} from the Hugging Face Hub failed: {error}.{login}") from error


def _nearest(name: str, cache_dir: str | os.PathLike | None = None) -> str:
    """ " Did you mean ...?" with models of this machine whose names are close, or nothing."""
    from huggingface_hub import constants

    parent = Path(os.path.expanduser(name)).parent
    candidates = ["demo"]
    if parent.is_dir():
        candidates += [str(entry) for entry in parent.iterdir() if entry.is_dir() or entry.suffix == ".gguf"]
    cached = Path(cache_dir or constants.HF_HUB_CACHE).glob("models--*--*")
    candidates += [entry.name.removeprefix("models--").replace("--", "/", 1) for entry in cached]
    close = difflib.get_close_matches(os.path.normpath(name), candidates, n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(close)}?" if close else ""
