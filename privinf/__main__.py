"""`python -m privinf` and the console script `privinf`."""

import sys


def main() -> None:
    """Runs the command line and ends the process with its exit code."""
    if sys.argv[1:2] == ["_party"]:  # a process of a local session, started by privinf.party.local
        import warnings

        from privinf.party.child import main as party

        warnings.simplefilter("ignore")
        sys.exit(party(sys.argv[2]))
    from privinf.cli.app import main as run

    sys.exit(run())


if __name__ == "__main__":
    main()
