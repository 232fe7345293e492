"""The command that uploads artifacts to the Hugging Face hub."""

from pathlib import Path

import click

from rgexport.commands.options import FOLDER, verbose
from rgexport.printing import print_result


@click.command()
@click.argument("artifact", type=FOLDER)
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--public", is_flag=True, help="Let everybody see a repository that is made.")
@click.option("--force", is_flag=True, help="Add it to a repository that has something else.")
@verbose
def push(artifact: Path, repo: str, public: bool, force: bool) -> None:
    """Uploads ARTIFACT to a repository of the Hugging Face hub.

    Log in first, by `hf auth login`. The repository is private unless --public is given. An upload
    that was interrupted goes on when the command is given again.
    """
    from rgexport.export.hub import PREFIX, push_artifact
    from rgexport.export.opening import open_artifact

    opened = open_artifact(artifact, verify=True)
    page = push_artifact(opened, repo, public=public, force=force)
    verb = "chat" if opened.manifest.instruction_tuned else "generate"
    file = f"/{artifact.name}" if opened.path.is_file() else ""
    name = PREFIX + repo.removeprefix(PREFIX)
    print_result(f"{page} has it. Try: rgexport {verb} {name}{file}")
