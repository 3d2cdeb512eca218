"""`python -m rayjobs` is the `danlu` command, where scripts of the installation are not on the PATH, as in Ray jobs."""

from rayjobs.cli import main

if __name__ == "__main__":
    main()
