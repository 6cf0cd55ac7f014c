"""Upload of a finished model, with its card, to a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plad_dist.data.models import model_marker, model_problems
from plad_dist.errors import RunFailed, UserError, first_line
from plad_dist.evaluation.rounds import last_round
from plad_dist.phases import round_phase
from plad_dist.rundir import RunDir, load_run


def push(run_dir: str, repo: str, phase: str | None = None, *, public: bool = False) -> str:
    """Upload a model of a run to ``repo`` (``owner/name``) and return its address.

    The repository is created if it does not exist. The token comes from ``HF_TOKEN``, or from the
    file that `hf auth login` writes; ``HF_ENDPOINT`` selects another hub.

    Args:
        phase: phase that trained the model; None for the student of the last round.
        public: create a public repository instead of a private one.

    Raises:
        UserError: the run has no such model, the model is damaged, the name or the hub's address is
            invalid, or the hub refuses the name or the token.
        RunFailed: the hub does not respond.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    config, run = load_run(run_dir).config, RunDir.at(run_dir)
    name = phase or round_phase(last_round(config, run).round)
    folder = _finished_model(run, name, run_dir)
    hub = HfApi()
    if not hub.endpoint.startswith(("https://", "http://")):
        raise UserError(f"HF_ENDPOINT: {hub.endpoint}: expected an address such as https://huggingface.co")
    if repo.count("/") != 1:
        raise UserError(f"{repo}: expected OWNER/NAME")
    try:
        hub.create_repo(repo, private=not public, exist_ok=True)
        hub.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Model {name} of {run.root.name}")
    except HFValidationError as error:
        raise UserError(f"{repo}: {first_line(error)}") from None
    except HfHubHTTPError as error:
        raise _refusal(repo, error) from None
    except ValueError as error:
        raise UserError(f"{repo}: {' '.join(str(error).split())}") from None
    except Exception as error:  # noqa: BLE001 - the transport raises errors of many packages
        raise RunFailed(f"{repo}: the hub cannot be reached: {first_line(error)}; run again when it can") from None
    return f"{hub.endpoint}/{repo}"


def _finished_model(run: RunDir, name: str, run_dir: str) -> Path:
    folder = run.model(name)
    if model_marker(folder) is None:
        finished = sorted(path.name for path in folder.parent.glob("*/") if model_marker(path) is not None)
        raise UserError(f"{folder}: no finished model; the run has {', '.join(finished) or 'none'} (--phase)")
    if problems := model_problems(folder):
        raise UserError(f"{problems[0]}; run `plad verify {run_dir}` for all problems")
    return folder


def _refusal(repo: str, error: Any) -> UserError | RunFailed:
    """Return the error for a response of the hub with an HTTP error status (`HfHubHTTPError`)."""
    from huggingface_hub import get_token

    status = error.response.status_code if error.response is not None else None
    if status not in (401, 403, 404):
        return RunFailed(f"{repo}: the hub responds with {first_line(error)}; run again")
    advice = "check the token that is set" if get_token() else "no token is set; set HF_TOKEN"
    return UserError(f"{repo}: the hub refuses the upload with status {status}; {advice}")
