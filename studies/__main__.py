"""``python -m studies [name] [--flags]``: run studies and write their report."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from threadpoolctl import threadpool_limits

from secondorder.errors import InputError
from secondorder.training import NonFiniteLossError, distributed, is_main_process, on_main
from studies.command_line import Command, parse
from studies.report import write_report
from studies.results import git_commit
from studies.settings import own_folder
from studies.study import STUDIES


def run(command: Command) -> None:
    """Check everything, run every study asked for, and write the report of all results in the folder."""
    common = command.common
    torch.set_num_threads(common.threads)
    git_commit()  # of the code that is loaded now
    if common.dry_run:
        for name, settings in command.studies.items():
            print("\n".join(f"{name}: {line}" for line in STUDIES[name].dry_run(common, settings)), flush=True)
        return
    with distributed(common.device), threadpool_limits(common.threads), ExitStack() as held:
        on_main(lambda: held.enter_context(own_folder(common.folder)))
        ready = {name: STUDIES[name].check(common, settings) for name, settings in command.studies.items()}
        for name, settings in command.studies.items():
            STUDIES[name].run(common, settings, ready[name])
        if is_main_process():
            sections = {name: study.section for name, study in STUDIES.items()}
            markdown, page = write_report(common.folder, sections, common.preset)
            print(f"report: {markdown}\n        {page}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, 2 for bad input, 1 for a training that failed, 130 when interrupted; messages of one line."""
    try:
        run(parse(sys.argv[1:] if arguments is None else arguments))
    except NonFiniteLossError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
