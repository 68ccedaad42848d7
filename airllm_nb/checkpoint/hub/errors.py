"""What the Hub's library raises, as one line with the remedy."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from ...config import LoadOptions
from ...errors import CheckpointError, SourceError


def unreachable() -> tuple[type[BaseException], ...]:
    """What a missing connection raises; the HTTP library below differs between versions of the Hub's."""
    from huggingface_hub import errors

    http = getattr(errors, "HTTPError", None)
    return tuple(kind for kind in (http, errors.OfflineModeIsEnabled, ConnectionError, TimeoutError) if kind)


@contextmanager
def explained(repo_id: str, options: LoadOptions) -> Iterator[None]:
    """Turn what the Hub's library raises into one line with the remedy."""
    try:
        yield
    except (SourceError, CheckpointError):
        raise
    except Exception as error:
        line = _explain(error, repo_id, options)
        if line is None:
            raise
        raise SourceError(line) from error


def _explain(error: Exception, repo_id: str, options: LoadOptions) -> str | None:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{repo_id}"
        return (f"{repo_id} is gated: accept its licence at {page}, then give a token with access as hf_token=... or "
                "in the environment as HF_TOKEN")  # fmt: skip
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id} has no revision {options.revision!r}; name a branch, a tag or a commit that exists"
    if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        return (f"{repo_id} is neither a local folder nor a repository on the Hub that can be seen; check the "
                "spelling, and if it is private give hf_token=... or HF_TOKEN")  # fmt: skip
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (f"the disk of {constants.HF_HUB_CACHE} is full while downloading {repo_id}; free some, or set HF_HOME "
                "to a folder on a larger disk, and load again")  # fmt: skip
    if isinstance(error, PermissionError):
        return f"the cache {constants.HF_HUB_CACHE} cannot be written ({error}); set HF_HOME to a folder that can"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the Hub refuses access to {repo_id} ({status}); check the token in hf_token=... or HF_TOKEN"
    if status is not None:
        return f"the Hub answers {status} for {repo_id}; try again later, what was downloaded is kept"
    if isinstance(error, (*unreachable(), errors.LocalEntryNotFoundError, errors.EntryNotFoundError)):
        return (f"the Hub cannot be reached for {repo_id} ({type(error).__name__}) and the cache does not hold it; "
                "check the connection, or name a local folder")  # fmt: skip
    return None
