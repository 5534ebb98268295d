"""`python -m runner` is `oslo`."""

from runner.cli import main

if __name__ == "__main__":
    main()
