"""`python -m cluster` is the `tvilfm` command."""

from cluster.cli.app import main

if __name__ == "__main__":
    main()
