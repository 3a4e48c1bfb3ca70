"""Runs the command that is named, and says in one line why it can't be."""

import signal
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from clipfilter_wds.cli.commands import (
    ALL_DONE,
    COMMANDS,
    INTERRUPTED,
    PROGRAM,
    SOME_FAILED,
    TERMINATED,
    UNUSABLE,
    Command,
)
from clipfilter_wds.cli.options import where_is
from clipfilter_wds.console import printable
from clipfilter_wds.options import did_you_mean
from clipfilter_wds.storage.errors import without_secrets
from clipfilter_wds.version import __version__
from clipfilter_wds.workers.interrupts import TerminatedError, interrupted_by


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit: 0 all done, 1 some shards failed, 2 unusable arguments, 130 Ctrl-C, 143 SIGTERM."""
    args = sys.argv[1:] if args is None else args
    # More workers than CPUs are the user's choice; torch would warn of it with the path of a file of its own.
    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
    command = COMMANDS.get(args[0]) if args else None
    sys.exit(_run(command, args[1:]) if command else _overview(args))


def _overview(args: Sequence[str]) -> int:
    """Answer what names no command."""
    if args and args[0] in ("-h", "--help"):
        commands = "\n".join(f"  {command.name:<8} {command.summary}" for command in COMMANDS.values())
        print(
            f"usage: {PROGRAM} COMMAND [options]\n\nFilter image-caption shards by CLIP similarity.\n\n"
            f"commands:\n{commands}\n\n"
            f"{PROGRAM} rewrite --help explains the options of rewrite; {PROGRAM} --version prints the version.\n"
            f"documentation: {where_is('README.md')}"
        )
        return ALL_DONE
    if args and args[0] == "--version":
        return _print_version()
    if args and (hint := did_you_mean(args[0], COMMANDS, f"{PROGRAM} {{}}")):
        return _complain(f"{args[0]!r} is no command{hint} (see {PROGRAM} --help)", UNUSABLE)
    found = f"{args[0]!r} is no command" if args else "no command is given"
    return _complain(f"{found}; use one of {', '.join(COMMANDS)} (see {PROGRAM} --help)", UNUSABLE)


def _print_version() -> int:
    print(f"{PROGRAM} {__version__}")
    return ALL_DONE


def _run(command: Command, args: Sequence[str]) -> int:
    """Run a command with these arguments."""
    if "--version" in args:
        return _print_version()
    if {"-h", "--help"} & set(args):
        command.parser.print_help()
        return ALL_DONE
    try:
        with interrupted_by(signal.SIGTERM):
            return command.run(*command.parser.read(args))
    except ValueError as error:
        return _complain(str(error), UNUSABLE)
    except TerminatedError:
        return _complain(f"stopped by SIGTERM. {command.when_stopped}", TERMINATED)
    except KeyboardInterrupt:
        return _complain(f"stopped. {command.when_stopped}", INTERRUPTED)
    except Exception as error:
        from clipfilter_wds.workers.crashes import WorkerError

        if not isinstance(error, (OSError, WorkerError)):
            raise
        end = "" if str(error).endswith((".", "?")) else "."
        return _complain(f"{error}{end} {command.when_stopped}", SOME_FAILED)


def _complain(message: str, code: int) -> int:
    sys.stderr.write(f"{PROGRAM}: {printable(without_secrets(' '.join(message.split())))}\n")
    return code
