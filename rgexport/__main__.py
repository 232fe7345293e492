"""`python -m rgexport` is the command `rgexport`."""

from rgexport.cli import main

if __name__ == "__main__":
    main()
