"""Shared main function of the entry scripts: `--config` and overrides become arguments of the
`plad` command."""

import argparse
import os
import sys


def main(*commands: str) -> None:
    """Run `plad` commands, one after the other, on the cluster that the job was submitted to.

    Exit codes are those of `plad`.
    """
    parser = argparse.ArgumentParser(description=f"plad {', then plad '.join(commands)} as a Ray job")
    parser.add_argument("--config", required=True, help="the run's YAML file, as seen from the cluster")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="config keys to set")
    arguments = parser.parse_args()
    try:
        from plad_dist import __version__
        from plad_dist.cli import main as plad
    except ModuleNotFoundError as error:
        sys.stderr.write(
            f"plad: {sys.executable} on the cluster has no {error.name}: install plad-dist there, or start Ray with "
            "the PATH of an environment that has it\n"
        )
        sys.exit(2)
    submitted_version = os.environ.get("PLAD_VERSION", __version__)
    if submitted_version != __version__:
        sys.stderr.write(
            f"plad: submitted by plad-dist {submitted_version}, but the cluster has {__version__}: use one version on "
            "both\n"
        )
        sys.exit(2)
    os.environ.setdefault("RAY_ADDRESS", "auto")
    for command in commands:
        sys.argv = ["plad", command, arguments.config, *arguments.overrides]
        try:
            plad()
        except SystemExit as end:
            if end.code:
                raise
