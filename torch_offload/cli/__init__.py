"""The command line: `torch-offload`, or `python -m torch_offload`.

Exit status: 0 all is well; 1 it ran, and the answer is bad (outputs differ, something is off); 2
the input was wrong; 3 what it needs is not here (a GPU, a package, a script of the repository).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

BAD_ANSWER, BAD_INPUT, NOT_HERE, INTERRUPTED = 1, 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status. An error is one line on standard error."""
    from torch_offload.cli.app import app
    from torch_offload.cli.output import NotHereError

    try:
        status = app(list(arguments) if arguments is not None else None, standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except BrokenPipeError:  # whoever read our output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BAD_ANSWER
    except (KeyboardInterrupt, EOFError):
        return _say("interrupted", INTERRUPTED)
    except (NotHereError, ModuleNotFoundError) as error:
        return _say(error, NOT_HERE)
    except (ValueError, TypeError, IndexError, OSError) as error:
        return _say(error, BAD_INPUT)
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's, of an option or an argument
            return _say(f"{error.format_message()} (see --help)", BAD_INPUT)
        if type(error).__name__ == "Abort":
            return _say("interrupted", INTERRUPTED)
        if os.environ.get("TORCH_OFFLOAD_DEBUG") == "1":
            raise
        hint = "" if isinstance(error, MemoryError) else "; TORCH_OFFLOAD_DEBUG=1 shows where"
        return _say(f"{type(error).__name__}: {error}{hint}", BAD_ANSWER)


def _say(error: object, status: int) -> int:
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"torch-offload: {text}", file=sys.stderr)
    return status


def run() -> None:
    """The entry point of the installed command."""
    sys.exit(main())
