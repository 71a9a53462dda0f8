"""`python -m shmcoord` is the command `shmcoord`."""

from shmcoord.cli import main

if __name__ == "__main__":
    main()
