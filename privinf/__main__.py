"""`python -m privinf` and the console script `privinf`."""

import os
import sys


def main() -> None:
    """Runs the command line and ends the process with its exit code."""
    if sys.argv[1:2] == ["_party"]:
        sys.exit(_party(sys.argv[2]))
    if sys.argv[1:2] == ["_parties"]:
        from privinf.local.forks import main as forked

        sys.exit(_party(forked()))
    from privinf.cli.app import main as run

    sys.exit(run())


def _party(role: str) -> int:
    """A process of a local session, started by `privinf.local.session`; once that one has gone, nobody is left to tell anything."""
    import logging
    import warnings

    from privinf.local.child import main as party

    if not os.environ.get("PRIVINF_DEBUG"):
        # the one who started us reports an error once; what the two other parties say of its consequences is noise
        warnings.simplefilter("ignore")
        logging.getLogger("privinf").setLevel(logging.ERROR)
    try:
        return party(role)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter complains when it flushes
        return 1


if __name__ == "__main__":
    main()
