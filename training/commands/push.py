"""The command `mohge push`."""

import argparse
import sys
from pathlib import Path


def run(options: argparse.Namespace) -> int:
    """
    Run the command with parsed arguments. The token is that of `hf auth login` or `HF_TOKEN`.

    Returns:
        `int`: 0, or 1 if the folder, loaded where mohge is missing, does not compute what it should.

    Raises:
        ValueError: for bad usage or input.
        OSError: if the Hub cannot be reached or refuses.
    """
    from mohge.model_cards.push import checked_stage, push_folder
    from mohge.model_cards.staging import pushed_files
    from mohge.model_cards.verify import ReloadError

    about = {"license": options.license, "language": options.language}
    try:
        if options.dry_run:
            with checked_stage(Path(options.folder), options.repo, **about) as (staged, card):
                print(card)
                for path in pushed_files(staged):
                    print(f"{(staged / path).stat().st_size:>16,}  {path}")
            return 0
        commit = push_folder(
            options.folder,
            options.repo,
            private=options.private,
            revision=options.revision,
            create_pr=options.create_pr,
            commit_message=options.message,
            **about,
        )
    except ReloadError as error:
        print(f"mohge push: nothing was pushed: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(commit.pr_url or commit.commit_url)
    return 0
