"""`python -m sessa_deploy`: the command line where its script is not on PATH."""

from sessa_deploy.cli import main

if __name__ == "__main__":
    main()
