"""A finished model on a hub: the folder as it is, with its card."""

from __future__ import annotations

from plad_dist.data.models import model_marker, model_problems
from plad_dist.errors import RunFailed, UserError, first_line
from plad_dist.evaluation.stage import last_round
from plad_dist.phases import round_phase
from plad_dist.rundir import RunDir, load_run


def push(run_dir: str, repo: str, phase: str | None = None, *, public: bool = False) -> str:
    """Upload a model of a run to ``repo`` (``owner/name``), which is made where it is not there, and return its address.

    The token is read from the environment (``HF_TOKEN``) or from where `hf auth login` keeps it; ``HF_ENDPOINT`` names another hub.

    Args:
        phase: whose model; None for the student of the last round.

    Raises:
        UserError: the run has no such model, or it is damaged; the name or the hub's address is none; the hub refuses the
            name or the token.
        RunFailed: the hub does not answer.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    config, run = load_run(run_dir).config, RunDir.at(run_dir)
    name = phase or round_phase(last_round(config, run).round)
    folder = run.model(name)
    if model_marker(folder) is None:
        there = sorted(path.name for path in folder.parent.glob("*/") if model_marker(path) is not None)
        raise UserError(f"{folder}: no finished model; the run has {', '.join(there) or 'none'} (--phase)")
    if problems := model_problems(folder):
        raise UserError(f"{problems[0]}; `plad verify {run_dir}` says more")
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
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403, 404):
            token = "with the token that is set" if get_token() else "there is no token: set HF_TOKEN"
            raise UserError(f"{repo}: the hub refuses it with status {status} ({token})") from None
        raise RunFailed(f"{repo}: the hub answers with {first_line(error)}; run again") from None
    except ValueError as error:
        raise UserError(f"{repo}: {' '.join(str(error).split())}") from None
    except Exception as error:  # noqa: BLE001 - whatever the hub's transport raises
        raise RunFailed(f"{repo}: the hub cannot be reached: {first_line(error)}; run again when it can") from None
    return f"{hub.endpoint}/{repo}"
